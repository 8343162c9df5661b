"""The backends of services, from EndpointSlices (discovery.k8s.io/v1): address, port and protocol, and whose they are.

Of a slice no more is kept than this, so that a cluster of any sort costs a node little.
"""

from __future__ import annotations

import json
from collections import OrderedDict
from dataclasses import dataclass
from socket import AF_INET, AF_INET6, IPPROTO_SCTP, IPPROTO_TCP, IPPROTO_UDP, inet_pton
from typing import TYPE_CHECKING, Any, Final

from shoal.kernel.files import ParseError, Reason, Unavailable

if TYPE_CHECKING:
    from collections.abc import Iterable

__all__ = ["Endpoints", "Page", "Slice", "TooMany", "parse_event", "parse_page", "parse_slice", "parse_status"]

_FILE: Final = "EndpointSlice"
_FAMILIES: Final = {"IPv4": AF_INET, "IPv6": AF_INET6}
_PROTOCOLS: Final = {"TCP": IPPROTO_TCP, "UDP": IPPROTO_UDP, "SCTP": IPPROTO_SCTP}
_ANY_PORT: Final = 0
_HIGHEST_PORT: Final = 65535
# They take 15 MiB. A cluster that has more is larger than those that Kubernetes is made for (150,000 pods).
_MOST_BACKENDS: Final = 150_000
# Whose a backend was is asked for when it is gone; a mapping to it is found a dump or two later.
_MOST_WITHDRAWN: Final = 4096


class TooMany(Unavailable):
    """There are more backends than a node should have to remember."""


@dataclass(frozen=True, slots=True)
class Slice:
    """One EndpointSlice."""

    name: str
    """Its namespace and name."""
    service: str
    """Namespace and name of the service whose backends these are."""
    backends: tuple[bytes, ...]
    """Those that may be sent to, or are being drained: see `_key`."""


@dataclass(frozen=True, slots=True)
class Page:
    """One part of a list."""

    slices: tuple[Slice, ...]
    version: str
    """The state of the cluster that the whole list is of (resourceVersion)."""
    rest: str
    """What to ask for the next part with; "" for the last one."""


def parse_slice(content: Any) -> Slice:  # noqa: ANN401  (what JSON held)
    """Reduce an EndpointSlice, given as the values of its JSON. Raises `ParseError`.

    A backend counts from the time that it is ready, or serves though it is not to be sent new connections, until it is
    removed from the slice: one that terminates is being drained, for as long as its grace period lasts, and stands in
    the slice with the condition `terminating` (1.22). Conditions that are not known are to be taken for ready.
    """
    try:
        metadata = content["metadata"]
        namespace = _text(metadata["namespace"])
        service = _text((metadata.get("labels") or {}).get("kubernetes.io/service-name", ""))
        ports = [_port(port) for port in content.get("ports") or () if port.get("protocol", "TCP") in _PROTOCOLS]
        family = _FAMILIES.get(content["addressType"])
        backends = tuple(
            _key(inet_pton(family, address), port, protocol)
            for endpoint in content.get("endpoints") or ()
            if family and _may_answer(endpoint.get("conditions") or {})
            for address in endpoint["addresses"]
            for port, protocol in ports
        )
        return Slice(f"{namespace}/{_text(metadata['name'])}", f"{namespace}/{service}" if service else "", backends)
    except (AttributeError, KeyError, OSError, TypeError, ValueError) as error:
        raise ParseError(_FILE, 0, f"metadata, addresses and ports ({type(error).__name__}: {error})") from None


def parse_page(data: bytes) -> Page:
    """Reduce one part of an EndpointSliceList. Raises `ParseError`."""
    content = _json(data)
    try:
        metadata, items = content["metadata"], content["items"] or ()
        version, rest = _text(metadata["resourceVersion"]), _text(metadata.get("continue", ""))
    except (AttributeError, KeyError, TypeError) as error:
        raise ParseError("EndpointSliceList", 0, f"metadata and items ({type(error).__name__}: {error})") from None
    if not isinstance(items, list | tuple):
        raise ParseError("EndpointSliceList", 0, "items that are a list")
    return Page(tuple(map(parse_slice, items)), version, rest)


def parse_event(line: bytes) -> tuple[str, Any, str]:
    """Return type, object and resourceVersion ("" if it has none) of one line of a watch. Raises `ParseError`."""
    content = _json(line)
    try:
        thing = content["object"]
        version = (thing.get("metadata") or {}).get("resourceVersion", "")
        return _text(content["type"]), thing, _text(version)
    except (AttributeError, KeyError, TypeError) as error:
        raise ParseError("watch event", 0, f"a type and an object ({type(error).__name__}: {error})") from None


def parse_status(data: bytes) -> str:
    """Return the message of a Status, which is what the API server answers when it refuses; "" of anything else."""
    try:
        return _text(_json(data)["message"])
    except (KeyError, ParseError, TypeError):
        return ""


class Endpoints:
    """The backends that live, and a bounded number of those that lived lately.

    One thread puts slices in, any may ask: a backend that moves from one slice to another is there all the time.
    """

    def __init__(self) -> None:
        """Start with nothing known."""
        self._slices: dict[str, Slice] = {}
        self._live: dict[bytes, tuple[Slice, ...]] = {}
        self._withdrawn: OrderedDict[bytes, str] = OrderedDict()

    def __len__(self) -> int:
        """Return how many backends live."""
        return len(self._live)

    def put(self, one: Slice) -> None:
        """Add a slice, or put it in the place of the one of its name. Raises `TooMany`."""
        before = self._slices.pop(one.name, None)
        if one.backends:
            self._slices[one.name] = one
        alone = (one,)
        for backend in one.backends:
            self._live[backend] = (*self._live[backend], one) if backend in self._live else alone
            self._withdrawn.pop(backend, None)
        if before:
            self._remove(before)
        if len(self._live) > _MOST_BACKENDS:
            raise TooMany(Reason.NOT_READABLE, f"the cluster has more than {_MOST_BACKENDS:,} backends")

    def drop(self, name: str) -> None:
        """Remove a slice, whether it is there or not."""
        if before := self._slices.pop(name, None):
            self._remove(before)

    def keep(self, names: Iterable[str]) -> None:
        """Remove all slices but these, after a list of all there are."""
        for name in self._slices.keys() - set(names):
            self.drop(name)

    def lives(self, address: bytes, port: int, protocol: int) -> bool:
        """Tell whether any service has this backend."""
        return _key(address, port, protocol) in self._live or _key(address, _ANY_PORT, protocol) in self._live

    def service(self, address: bytes, port: int, protocol: int) -> str:
        """Return namespace/name of a service that has this backend, or had it; "" if that is not known."""
        for key in (_key(address, port, protocol), _key(address, _ANY_PORT, protocol)):
            if owners := self._live.get(key):
                return owners[0].service
            if key in self._withdrawn:
                return self._withdrawn.get(key, "")
        return ""

    def _remove(self, one: Slice) -> None:
        for backend in one.backends:
            owners = tuple(owner for owner in self._live.get(backend, ()) if owner is not one)
            if owners:
                self._live[backend] = owners
            elif self._live.pop(backend, None):
                self._withdrawn[backend] = one.service
        while len(self._withdrawn) > _MOST_WITHDRAWN:
            self._withdrawn.popitem(last=False)


def _may_answer(conditions: dict[str, Any]) -> bool:
    return conditions.get("ready") is not False or bool(conditions.get("serving") or conditions.get("terminating"))


def _port(port: dict[str, Any]) -> tuple[int, int]:
    """Return number and protocol; a port without a number is any of them."""
    number = port.get("port", _ANY_PORT)
    if number is None:
        number = _ANY_PORT
    if not isinstance(number, int) or not 0 <= number <= _HIGHEST_PORT:
        raise ValueError(f"port {number!r}")
    return number, _PROTOCOLS[port.get("protocol", "TCP")]


def _key(address: bytes, port: int, protocol: int) -> bytes:
    """Return what a backend is known by: its address of 4 or 16 bytes, its port and its IPPROTO_ number."""
    return address + port.to_bytes(2, "big") + protocol.to_bytes(1, "big")


def _text(value: object) -> str:
    if not isinstance(value, str):
        raise TypeError(f"text, found {type(value).__name__}")
    return value


def _json(data: bytes) -> Any:  # noqa: ANN401  (what JSON holds)
    try:
        return json.loads(data)
    except (ValueError, RecursionError) as error:
        raise ParseError("answer of the API server", 0, f"JSON ({error})") from None
