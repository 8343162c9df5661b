"""What a connection tracking table amounts to: who fills it, which ports NAT has used up, whose backend is gone.

Fed with a stream of entries, it keeps sums of bounded size and nothing of the entries themselves, but for those that
have to be compared with the next census.
"""

from __future__ import annotations

import math
import time
from collections import Counter
from dataclasses import dataclass, field
from enum import StrEnum
from operator import itemgetter
from socket import IPPROTO_SCTP, IPPROTO_TCP, IPPROTO_UDP
from typing import TYPE_CHECKING, Any, Final, Generic, NamedTuple, TypeVar, cast

from shoal.kernel.netlink.conntrack_entries import DST_NAT, ESTABLISHED, EXPECTED, SEEN_REPLY, Entry

if TYPE_CHECKING:
    from collections.abc import Callable, Hashable, Iterable, Mapping

__all__ = ["BoundedCounts", "Census", "Destination", "Direction", "Ports", "Stale", "Staleness", "Surroundings", "take"]

K = TypeVar("K", bound="Hashable")

_KEPT: Final = 4096
_MOST_CANDIDATES: Final = 10_000

# Entries are looked at in steps, and between two steps the pace is kept.
_STEP: Final = 1000

# Protocols whose ports NAT chooses, IPPROTO_DCCP (33) and IPPROTO_UDPLITE (136) among them.
_WITH_PORTS: Final = frozenset({IPPROTO_TCP, IPPROTO_UDP, 33, IPPROTO_SCTP, 136})
_FIRST_PORT: Final = 1024

# A renewed entry lasts longer than it would have; by less than this it may be rounding: timeouts are whole seconds.
_RENEWED_SECONDS: Final = 2.0
# TCP sends again after two minutes at the latest (TCP_RTO_MAX); so long a mapping stays stale that was renewed once.
_STAYS_SECONDS: Final = 150.0
# An established TCP connection lasts for days, but for five minutes only while data is unacknowledged
# (nf_conntrack_tcp_timeout_{unacknowledged,max_retrans}). A peer that lives acknowledges within two seconds.
_UNACKNOWLEDGED_SECONDS: Final = 300
_ACKNOWLEDGING_SECONDS: Final = 2


def _fields(*names: str) -> Callable[[Entry], tuple[Any, ...]]:
    """Return what takes these fields from an entry by their places: half the time that it takes by their names."""
    return itemgetter(*map(Entry._fields.index, names))


_ENDS: Final = _fields("source", "destination", "destination_port", "protocol", "reply_source")
_REPLY: Final = _fields(
    *(
        "source",
        "source_port",
        "reply_source",
        "reply_source_port",
        "reply_destination",
        "reply_destination_port",
        "zone",
    )
)


class BoundedCounts(Generic[K]):
    """Counts how often each of many keys occurs, in memory that does not grow with their number.

    When there are too many keys, the rarer half is forgotten. So the count of a key that is frequent throughout is
    exact, one that is rare may begin anew; `total` is always exact, and what the top does not hold is the rest of it.
    """

    def __init__(self, kept: int = _KEPT) -> None:
        """Hold at most twice `kept` keys."""
        self._kept = kept
        self._counts: dict[K, int] = {}
        self.total = 0

    def add(self, key: K) -> None:
        """Count one more of `key`."""
        self.total += 1
        counts = self._counts
        counts[key] = counts.get(key, 0) + 1
        if len(counts) >= 2 * self._kept:
            self._counts = dict(self.top(self._kept))

    def __getitem__(self, key: K) -> int:
        """Return the count of `key`, 0 if it never occurred or was forgotten."""
        return self._counts.get(key, 0)

    def top(self, most: int) -> list[tuple[K, int]]:
        """Return the `most` frequent keys with their counts, the most frequent first."""
        return sorted(self._counts.items(), key=lambda item: item[1], reverse=True)[:most]


class Direction(StrEnum):
    """Which end of a connection its owner is."""

    FROM = "from"
    """The owner opened it."""
    TO = "to"
    """The owner answers it, and who opened it is not on this node."""


class Staleness(StrEnum):
    """Why a connection whose destination was translated counts as stale."""

    BACKEND_GONE = "backend_gone"
    """Its backend is none of those that live: no NAT rule leads there any more, or no EndpointSlice has it."""
    UNREPLIED = "unreplied"
    """It was never answered; which backends live is not known."""
    BACKEND_SILENT = "backend_silent"
    """It was never answered, though its backend is one of those that live: that hangs, or never answers by design."""


class Destination(NamedTuple):
    """Where a connection was sent before any translation. Port 0 is a protocol without ports."""

    protocol: int
    address: bytes
    port: int


class Ports(NamedTuple):
    """What shares one space of source ports: the kernel must tell two answers apart by the port they are sent to."""

    zone: int
    protocol: int
    source: bytes
    address: bytes
    port: int


class Stale(NamedTuple):
    """A mapping from a service to a backend that keeps being used without an answer."""

    reason: Staleness
    protocol: int
    address: bytes
    port: int
    backend: bytes
    backend_port: int


class _Sighting(NamedTuple):
    """What is remembered of a connection that may be stale, until the next census."""

    at: float
    timeout: int
    replies: int | None
    renewed: float
    """When it was last found renewed; minus infinity for never."""


@dataclass(frozen=True, slots=True)
class Surroundings:
    """What has to be known of the node to make sense of its connections."""

    owners: Mapping[bytes, tuple[str, ...]] = field(default_factory=dict)
    """{address: labels of the one network namespace that has it}"""
    own_addresses: frozenset[bytes] = frozenset()
    """The addresses of the namespace whose table this is."""
    is_backend: Callable[[Entry], bool | None] | None = None
    """Tells whether what answers a connection that a rule translated is a backend that lives; None if nobody knows."""


@dataclass(slots=True)
class Census:
    """The sums over the entries of one dump."""

    entries: int = 0
    """Entries that were looked at."""
    cut_short: bool = False
    """Whether it ended before the table did."""
    owners: Counter[tuple[tuple[str, ...], Direction]] = field(default_factory=Counter)
    """{(labels of the owner, which end it is): entries}; what neither end of is on this node is in none of them."""
    destinations: BoundedCounts[Destination] = field(default_factory=BoundedCounts)
    translated: BoundedCounts[Ports] = field(default_factory=BoundedCounts)
    """Ports that source NAT took, from 1024 up."""
    untranslated: BoundedCounts[Ports] = field(default_factory=BoundedCounts)
    """Ports that connections of the namespace's own took from the same spaces."""
    stale: BoundedCounts[Stale] = field(default_factory=BoundedCounts)
    candidates: dict[tuple[bytes | int, ...], _Sighting] = field(default_factory=dict)
    """What may be stale, and is if the next census finds it renewed."""
    forgotten: int = 0
    """What may be stale and was too much to remember."""

    def ports(self, most: int) -> list[tuple[Ports, int]]:
        """Return the `most` spaces that source NAT has used most of, with the ports that are taken by anybody."""
        taken = [(space, count + self.untranslated[space]) for space, count in self.translated.top(_KEPT)]
        return sorted(taken, key=lambda item: item[1], reverse=True)[:most]


def take(
    entries: Iterable[Entry], surroundings: Surroundings, before: Census, *, most: int, entries_per_second: float
) -> Census:
    """Sum up the entries, at most `most` of them, and compare what may be stale with the census `before`.

    Goes no faster than `entries_per_second`, so that it never takes a CPU for long. Entries come in the order of their
    hash, so the first ones of a table that is too large are a fair sample of it.
    """
    census = Census()
    owners, own = surroundings.owners, surroundings.own_addresses
    # Counted by address first, and only those that have an owner: an owner's labels take longer to look up.
    opened: dict[bytes, int] = {}
    answered: dict[bytes, int] = {}
    # Tuples as they are; a `Destination` takes five times as long to make, and is the same to a dictionary.
    add_destination = cast("Callable[[tuple[int, bytes, int]], None]", census.destinations.add)
    began = now = time.monotonic()
    for entry in entries:
        if census.entries == most:
            census.cut_short = True
            break
        census.entries += 1
        if not census.entries % _STEP:
            now = _keep_pace(began + census.entries / entries_per_second)
        source, destination, port, protocol, replier = _ENDS(entry)
        if source in owners:
            opened[source] = opened.get(source, 0) + 1
        elif replier in owners:
            answered[replier] = answered.get(replier, 0) + 1
        add_destination((protocol, destination, port))
        if protocol in _WITH_PORTS:
            _count_port(entry, census, own)
            if replier != destination and replier not in own:
                _suspect(entry, census, surroundings.is_backend, before.candidates, now)
    for direction, found in ((Direction.FROM, opened), (Direction.TO, answered)):
        for address, number in found.items():
            census.owners[owners[address], direction] += number
    return census


def _keep_pace(due: float) -> float:
    """Sleep until `due` unless that is past; return the time."""
    now = time.monotonic()
    if now < due:
        time.sleep(due - now)
        return time.monotonic()
    return now


def _count_port(entry: Entry, census: Census, own: frozenset[bytes]) -> None:
    """Count the port that answers are sent to, if it is one that source NAT could have chosen."""
    source, source_port, replier, replier_port, target, port, zone = _REPLY(entry)
    if port < _FIRST_PORT:
        return
    if target != source or port != source_port:
        counts = census.translated
    elif target in own:
        counts = census.untranslated
    else:
        return
    counts.add(Ports(zone, entry.protocol, target, replier, replier_port))


def _suspect(
    entry: Entry,
    census: Census,
    is_backend: Callable[[Entry], bool | None] | None,
    before: Mapping[tuple[bytes | int, ...], _Sighting],
    now: float,
) -> None:
    """Count a connection with destination NAT as stale, or remember it as one that may be."""
    reason = _staleness(entry, is_backend)
    if reason is None or entry.timeout is None:
        return
    key = entry[:7]
    last = before.get(key)
    renewed = -math.inf
    if last and entry.replies == last.replies:
        extended = entry.timeout > last.timeout - (now - last.at) + _RENEWED_SECONDS
        renewed = now if extended else last.renewed
    if now - renewed <= _STAYS_SECONDS and not _may_be_answered(entry):
        census.stale.add(Stale(reason, entry.protocol, *entry[2:4], *entry[5:7]))
    if len(census.candidates) < _MOST_CANDIDATES:
        census.candidates[key] = _Sighting(now, entry.timeout, entry.replies, renewed)
    else:
        census.forgotten += 1


def _staleness(entry: Entry, is_backend: Callable[[Entry], bool | None] | None) -> Staleness | None:
    """Return why this connection would be stale if it is renewed, or None.

    Of TCP the timeout tells whether data is unacknowledged, so a connection that is being drained is left alone. Of UDP
    that was answered once nothing is known but that it is being renewed, unless the kernel counts packets.
    """
    # What a helper foresaw, Open vSwitch did (which has zones) or IPVS did (which sets no DST_NAT), no rule did.
    by_rule = entry.status & DST_NAT and not entry.status & EXPECTED and not entry.zone
    lives = is_backend(entry) if is_backend and by_rule else None
    if not entry.status & SEEN_REPLY:
        if lives is None:
            return Staleness.UNREPLIED
        return Staleness.BACKEND_SILENT if lives else Staleness.BACKEND_GONE
    if lives is False and (entry.protocol != IPPROTO_TCP or _is_unacknowledged(entry)):
        return Staleness.BACKEND_GONE
    return None


def _is_unacknowledged(entry: Entry, seconds: int = 0) -> bool:
    """Tell whether TCP has waited for at least so long for its data to be acknowledged."""
    if entry.tcp_state != ESTABLISHED or entry.timeout is None:
        return False
    return entry.timeout <= _UNACKNOWLEDGED_SECONDS - seconds


def _may_be_answered(entry: Entry) -> bool:
    """Tell whether data was sent so lately that it may yet be acknowledged."""
    return _is_unacknowledged(entry) and not _is_unacknowledged(entry, _ACKNOWLEDGING_SECONDS)
