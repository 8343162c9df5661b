"""Follows the cluster's EndpointSlices: one list, then one watch that goes on where it was cut off.

Where the API server is, and with what to ask it, is what Kubernetes puts into every pod: two variables, and a directory
with a token and a certificate. The service account needs get, list and watch on endpointslices of discovery.k8s.io.
"""

from __future__ import annotations

import asyncio
import logging
import os
import random
import socket
import ssl
import time
from contextlib import suppress
from dataclasses import dataclass
from http import HTTPStatus
from pathlib import Path
from typing import TYPE_CHECKING, Final

import aiohttp

from shoal.kernel.files import ParseError, Reason, Unavailable
from shoal.kubernetes.endpoints import (
    Endpoints,
    TooMany,
    parse_event,
    parse_page,
    parse_slice,
    parse_status,
)

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Mapping

__all__ = ["Cluster", "EndpointWatch", "find_cluster"]

logger = logging.getLogger(__name__)

_ACCOUNT: Final = "/var/run/secrets/kubernetes.io/serviceaccount"
_PATH: Final = "/apis/discovery.k8s.io/v1/endpointslices"
# Headless services have no address that could be translated.
_WANTED: Final = {"labelSelector": "!service.kubernetes.io/headless"}

# Parsing holds up the event loop, though it runs in a thread: 25 slices of 100 endpoints each, for 6 ms.
_PAGE_SLICES: Final = 25
_MOST_PAGES: Final = 10_000
_LARGEST_PAGE: Final = 64 << 20
_LARGEST_EVENT: Final = 4 << 20
_LARGEST_ERROR: Final = 64 << 10
_LONGEST_TEXT: Final = 200

_LIST_TIMEOUT: Final = aiohttp.ClientTimeout(total=60, sock_connect=10, sock_read=30)
# The API server ends a watch by itself after so many seconds, chosen here so that not all nodes come back at once.
_WATCH_SECONDS: Final = (300, 600)
# It sends a bookmark at least every 75 s (a minute, and up to a quarter more); without two of them it does not live.
_SILENT_SECONDS: Final = 160
_WATCH_TIMEOUT: Final = aiohttp.ClientTimeout(total=None, sock_connect=10, sock_read=_SILENT_SECONDS)
# What is known is not old while a watch that ended in the ordinary way is taken up again. One that cannot go on where
# it is to says so at once; one that stands for this long has told whatever had happened before it began.
_GAP_SECONDS: Final = 5
_SETTLED_SECONDS: Final = 2

_LONGEST_DELAY: Final = 60.0
_LASTED_SECONDS: Final = 10


@dataclass(frozen=True, slots=True)
class Cluster:
    """Where an API server is, and the files with what to ask it."""

    url: str
    token_file: str
    ca_file: str


class _Expired(Exception):  # noqa: N818  (an answer of the API server)
    """What happened since the version that was asked for is no longer known (410 Gone): list again."""


def find_cluster(environ: Mapping[str, str], account: str = _ACCOUNT) -> Cluster:
    """Return the cluster that this process is in a pod of. Raises `Unavailable` where it is in none."""
    host, port = environ.get("KUBERNETES_SERVICE_HOST", ""), environ.get("KUBERNETES_SERVICE_PORT", "")
    if not host or not port:
        why = "this is not a pod: KUBERNETES_SERVICE_HOST and KUBERNETES_SERVICE_PORT are not set"
        raise Unavailable(Reason.NOT_READABLE, why)
    where = f"[{host}]:{port}" if ":" in host else f"{host}:{port}"
    return Cluster(f"https://{where}{_PATH}", f"{account}/token", f"{account}/ca.crt")


class EndpointWatch:
    """Keeps `Endpoints` as the API server has them, and knows whether they still are."""

    def __init__(self, environ: Mapping[str, str] | None = None, account: str = _ACCOUNT) -> None:
        """Start with nothing known; `run` does the rest."""
        self._environ = os.environ if environ is None else environ
        self._account = account
        self._endpoints = Endpoints()
        self._version = ""
        """The last state that is known in full, from which a watch can go on; "" to list first."""
        self._heard: float | None = None
        """When the API server last said what is so, or that nothing has changed. None until it was listed once."""
        self._connected: float | None = None
        """Since when the present watch stands; None between two."""
        self._sure = 0.0
        """When what is known was last sure to be what is: at a list, an event, or the end of a watch that stood."""
        self._failure = Unavailable(Reason.NOT_READABLE, "the EndpointSlices are not listed yet")

    @property
    def age(self) -> float | None:
        """Seconds since the API server was last heard; None if it never was."""
        return None if self._heard is None else time.monotonic() - self._heard

    def current(self) -> Endpoints:
        """Return the endpoints if they are what the API server has now. Raises `Unavailable` if that is not sure.

        A backend that was made since the watch broke off would else be taken for one that is gone.
        """
        age = self.age
        if age is None:
            raise Unavailable(self._failure.reason, str(self._failure))
        if not self._stands() and time.monotonic() - self._sure > _GAP_SECONDS:
            raise Unavailable(self._failure.reason, f"{self._failure}; what is known is {age:.0f} s old")
        if age > _SILENT_SECONDS:
            raise Unavailable(Reason.NOT_READABLE, f"the API server has said nothing for {age:.0f} s")
        return self._endpoints

    def _stands(self) -> bool:
        return self._connected is not None and time.monotonic() - self._connected >= _SETTLED_SECONDS

    async def run(self) -> None:
        """List and watch until cancelled; after a failure again, after a delay that grows and differs among nodes."""
        failures = 0
        while True:
            began = time.monotonic()
            try:
                await self._follow()
            except _Expired:
                self._fail(Reason.NOT_READABLE, "the watch fell behind and has to begin anew")
                self._version = ""
                if (self.age or 0) >= _LASTED_SECONDS:
                    failures = 0  # an answer: the server is there, and no list of a moment ago was in vain
            except TooMany as error:
                # It would not be fewer the next time, and each list of so many costs the API server.
                self._endpoints, self._heard = Endpoints(), None
                self._fail(error.reason, str(error))
                return
            except Unavailable as error:
                self._fail(error.reason, str(error))
            except ParseError as error:
                self._fail(Reason.MALFORMED, str(error))
                self._version = ""
            except TimeoutError:
                self._fail(Reason.NOT_READABLE, "the API server does not answer")
            except Exception as error:  # noqa: BLE001  (whatever is wrong with a network must not end the watch)
                self._fail(Reason.NOT_READABLE, f"the API server cannot be asked: {_printable(error)}")
            failures = 0 if time.monotonic() - began >= _LASTED_SECONDS else failures + 1
            await asyncio.sleep(_delay(failures))

    def _fail(self, reason: Reason, detail: str) -> None:
        self._failure = Unavailable(reason, detail)
        logger.debug("watch of EndpointSlices ended", extra={"reason": reason.value, "detail": detail})

    async def _follow(self) -> None:
        """List, if that is needed, and watch once. Raises as `run` expects it."""
        cluster = find_cluster(self._environ, self._account)
        # Files are read anew each time: the token is replaced about once an hour, the certificate sometimes.
        token = await asyncio.to_thread(_read_token, cluster.token_file)
        tls = await asyncio.to_thread(_trust, cluster.ca_file)
        async with aiohttp.ClientSession(
            headers={"Authorization": f"Bearer {token}", "Accept": "application/json", "User-Agent": "shoal-exporter"},
            connector=aiohttp.TCPConnector(ssl=tls),
            cookie_jar=aiohttp.DummyCookieJar(),
        ) as session:
            if not self._version:
                await self._list(session, cluster.url)
            await self._watch(session, cluster.url)

    async def _list(self, session: aiohttp.ClientSession, url: str) -> None:
        names: set[str] = set()
        rest = ""
        for _ in range(_MOST_PAGES):
            asked = _WANTED | {"limit": str(_PAGE_SLICES)} | ({"continue": rest} if rest else {})
            async with session.get(url, params=asked, timeout=_LIST_TIMEOUT, allow_redirects=False) as response:
                await _check(response, "list")
                page = await asyncio.to_thread(parse_page, await _body(response, _LARGEST_PAGE))
            for one in page.slices:
                names.add(one.name)
                self._endpoints.put(one)
            rest = page.rest
            if not rest:
                self._endpoints.keep(names)
                self._version = page.version
                self._heard = self._sure = time.monotonic()
                return
        raise Unavailable(Reason.NOT_READABLE, "the list of EndpointSlices does not end")

    async def _watch(self, session: aiohttp.ClientSession, url: str) -> None:
        asked = _WANTED | {
            "watch": "true",
            "allowWatchBookmarks": "true",
            "resourceVersion": self._version,
            "timeoutSeconds": str(random.randint(*_WATCH_SECONDS)),  # noqa: S311  (no secret)
        }
        async with session.get(url, params=asked, timeout=_WATCH_TIMEOUT, allow_redirects=False) as response:
            await _check(response, "watch")
            _keep_alive(response)
            self._connected = time.monotonic()
            try:
                async for line in _lines(response):
                    self._take(line)
            finally:
                if self._stands():
                    self._sure = time.monotonic()
                self._connected = None
        self._fail(Reason.NOT_READABLE, "the watch of EndpointSlices has ended and not begun again")

    def _take(self, line: bytes) -> None:
        """Follow one event."""
        kind, thing, version = parse_event(line)
        if kind == "ERROR":
            if thing.get("code") == HTTPStatus.GONE:
                raise _Expired
            raise Unavailable(Reason.NOT_READABLE, f"the watch failed: {_printable(thing.get('message', ''))}")
        if kind in ("ADDED", "MODIFIED"):
            self._endpoints.put(parse_slice(thing))
        elif kind == "DELETED":
            self._endpoints.drop(parse_slice(thing).name)
        if not version:
            raise ParseError("watch event", 0, "an object with a resourceVersion")
        self._version = version
        self._heard = self._sure = time.monotonic()


def _delay(failures: int) -> float:
    """Return the seconds to wait: up to a minute, and not the same on all nodes, which lost the API server together."""
    return min(_LONGEST_DELAY, 2.0 ** min(failures, 10)) * random.uniform(0.5, 1)  # noqa: S311  (no secret)


def _read_token(path: str) -> str:
    """Return the token of the service account. Blocks; raises `Unavailable`."""
    try:
        token = Path(path).read_text(encoding="ascii").strip()
    except OSError as error:
        raise Unavailable(Reason.NO_PERMISSION, f"the token {path} cannot be read: {error.strerror}") from None
    except UnicodeDecodeError:
        token = ""
    if not token or not token.isprintable():
        raise Unavailable(Reason.NO_PERMISSION, f"there is no token in {path}")
    return token


def _trust(path: str) -> ssl.SSLContext:
    """Return what trusts the API server's certificate. Blocks; raises `Unavailable`."""
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    try:
        context.load_verify_locations(path)
    except OSError as error:
        why = f"the certificate {path} cannot be read: {error.strerror or _printable(error)}"
        raise Unavailable(Reason.NOT_READABLE, why) from None
    return context


async def _check(response: aiohttp.ClientResponse, verb: str) -> None:
    """Raise as `EndpointWatch.run` expects it unless the API server does what it was asked."""
    if response.status == HTTPStatus.OK:
        return
    if response.status == HTTPStatus.GONE:
        raise _Expired
    refused = response.status in (HTTPStatus.UNAUTHORIZED, HTTPStatus.FORBIDDEN)
    message = _printable(parse_status(await _body(response, _LARGEST_ERROR))) or response.reason
    why = f"the API server refuses to {verb} EndpointSlices ({response.status}): {message}"
    raise Unavailable(Reason.NO_PERMISSION if refused else Reason.NOT_READABLE, why)


async def _body(response: aiohttp.ClientResponse, most: int) -> bytes:
    body = bytearray()
    async for chunk in response.content.iter_any():
        body += chunk
        if len(body) > most:
            raise Unavailable(Reason.NOT_READABLE, f"the API server's answer is larger than {most:,} bytes")
    return bytes(body)


async def _lines(response: aiohttp.ClientResponse) -> AsyncIterator[bytes]:
    """Yield the lines of a stream; one that was cut off is left out, as the next watch has it again."""
    rest = b""
    async for chunk in response.content.iter_any():
        *lines, rest = (rest + chunk).split(b"\n")
        for line in lines:
            if line.strip():
                yield line
        if len(rest) > _LARGEST_EVENT:
            raise ParseError("watch event", 0, f"at most {_LARGEST_EVENT:,} bytes")


def _keep_alive(response: aiohttp.ClientResponse) -> None:
    """Have the kernel find out within half a minute when the API server's machine is gone, of which nobody tells."""
    transport = response.connection.transport if response.connection else None
    link = transport.get_extra_info("socket") if transport else None
    if link is not None:
        with suppress(OSError):
            link.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
            link.setsockopt(socket.IPPROTO_TCP, socket.TCP_KEEPIDLE, 10)
            link.setsockopt(socket.IPPROTO_TCP, socket.TCP_KEEPINTVL, 5)
            link.setsockopt(socket.IPPROTO_TCP, socket.TCP_KEEPCNT, 3)


def _printable(value: object) -> str:
    text = str(value) or type(value).__name__ if isinstance(value, BaseException) else str(value)
    return "".join(letter if letter.isprintable() else " " for letter in text)[:_LONGEST_TEXT]
