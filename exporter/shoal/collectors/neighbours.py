"""Collector `neighbours`: a next hop whose MAC address is another machine's, and neighbour tables that are full."""

from __future__ import annotations

import asyncio
import ipaddress
import logging
import random
import select
import socket
import threading
import time
from collections import Counter
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, ClassVar

from shoal.collectors import Collector, register
from shoal.families import Family, Metric
from shoal.kernel.arp import check_permission, open_arp, read_answers, request
from shoal.kernel.files import ParseError, Reason, Unavailable
from shoal.kernel.netlink.neighbours import (
    STATES,
    Key,
    find_neighbour,
    open_events,
    read_discards,
    read_events,
    read_neighbours,
    read_tables,
)
from shoal.kernel.netlink.routes import find_default, find_route, open_routes, read_next_hops

if TYPE_CHECKING:
    from shoal.inventory import Node
    from shoal.kernel.netlink.core import NetlinkSocket
    from shoal.kernel.netlink.neighbours import Neighbour, Neighbours, Table
    from shoal.settings import Settings

__all__ = ["NeighboursCollector"]

logger = logging.getLogger(__name__)

_MOST_DEVICES = 5
_MOST_WATCHED = 10
# Of each protocol; a router may have a million.
_MOST_ROUTES = 2000
_SEEN_SECONDS = 300.0
_MOST_SEEN = 16

_IDLE_SECONDS = 0.5
_BATCH_SECONDS = 0.1
_MOST_DATAGRAMS = 1024
_VERIFY_SECONDS = 60.0
# Each request may turn the kernel to the other claimant for a moment, so a known conflict is looked at less often.
_CONFLICT_SECONDS = 600.0
# Longer than the second for which an entry that has just changed is locked against another answer.
_ANSWER_SECONDS = 1.1
_MOST_PACKETS = 1024

_IPV4_BYTES = 4
_FAMILIES = (socket.AF_INET, socket.AF_INET6)

_PROTOCOL = ("protocol",)
_WATCHED = ("device", "address")
_TABLES = {"arp_cache": "ipv4", "ndisc_cache": "ipv6"}
# What `ip neigh` leaves out: multicast and loopback addresses, which need no resolution.
_UNRESOLVED = ("noarp", "none")
_IN_USE = ("reachable", "delay", "probe")

ENTRIES = Metric(
    "shoal_neighbours_entries",
    "gauge",
    "Neighbour entries (ARP and NDP) of the exporter's network namespace by state (ndm_state, without noarp). Stale is "
    f"the normal state of an entry that is not in use. The {_MOST_DEVICES} devices with the most entries, and other.",
    "netlink ROUTE RTM_GETNEIGH",
    ("device", "state"),
)
OLDEST_CONFIRMATION = Metric(
    "shoal_neighbours_oldest_confirmation_seconds",
    "gauge",
    "The longest time since a neighbour that packets are being sent to last proved that it is there (ndm_confirmed of "
    "entries in reachable, delay or probe). Up to 50 s is normal with the kernel's defaults.",
    "netlink ROUTE RTM_GETNEIGH, NDA_CACHEINFO",
    ("device",),
)
TABLE_ENTRIES = Metric(
    "shoal_neighbours_table_entries",
    "gauge",
    "Entries in the table of a protocol: of all network namespaces together, which share it (ndtc_entries).",
    "netlink ROUTE RTM_GETNEIGHTBL, NDTA_CONFIG",
    _PROTOCOL,
)
THRESHOLD = Metric(
    "shoal_neighbours_table_threshold",
    "gauge",
    "Table sizes up to which entries are left alone (1), from which unused ones are thrown out early (2), and at which "
    "there is no room for another (3): gc_thresh1 to 3. Permanent entries are in the table and do not count for them.",
    "netlink ROUTE RTM_GETNEIGHTBL, NDTA_THRESH1 to 3",
    ("protocol", "level"),
)


def _table_counter(word: str, meaning: str) -> Metric:
    return Metric(
        f"shoal_neighbours_{word}_total",
        "counter",
        f"{meaning}, on the whole machine.",
        "netlink ROUTE RTM_GETNEIGHTBL, NDTA_STATS",
        _PROTOCOL,
    )


OVERFLOWS = _table_counter("table_overflows", "Entries that could not be made because the table was full (table_fulls)")
FORCED = _table_counter("forced_collections", "Times that entries were thrown out early to make room (forced_gc_runs)")
FAILURES = _table_counter("resolution_failures", "Neighbours that never answered (res_failed)")
DISCARDS = Metric(
    "shoal_neighbours_unresolved_discards_total",
    "counter",
    "Packets dropped because too many waited already for their neighbour to be resolved (unresolved_discards), on the "
    "whole machine.",
    "/proc/1/net/stat/{arp_cache,ndisc_cache}",
    _PROTOCOL,
)
UNWATCHED = Metric(
    "shoal_neighbours_unwatched",
    "gauge",
    f"Addresses that are not watched: beyond the first {_MOST_WATCHED}, or named but on none of this node's networks. "
    f"Of routes the first {_MOST_ROUTES} are looked through.",
    "netlink ROUTE RTM_GETROUTE, counted",
)
STATE = Metric(
    "shoal_neighbour_state",
    "gauge",
    "1 for the state that the entry of a watched address is in; none if the kernel has no entry.",
    "netlink ROUTE RTM_GETNEIGH, ndm_state",
    (*_WATCHED, "state"),
)
INFO = Metric(
    "shoal_neighbour_info",
    "gauge",
    "1, with the MAC address that packets to a watched address are sent to (NDA_LLADDR), and why it is watched: as a "
    "next hop, or because it was named.",
    "netlink ROUTE RTM_GETNEIGH, NDA_LLADDR",
    (*_WATCHED, "mac", "role"),
)
CONFIRMATION = Metric(
    "shoal_neighbour_confirmation_seconds",
    "gauge",
    "Time since a watched address last proved that it is there (ndm_confirmed), while packets are being sent to it.",
    "netlink ROUTE RTM_GETNEIGH, NDA_CACHEINFO",
    _WATCHED,
)
CHANGES = Metric(
    "shoal_neighbour_mac_changes_total",
    "counter",
    "Changes of the MAC address of a watched address since it is watched; a clean failover is one.",
    "netlink ROUTE notifications RTM_NEWNEIGH, NDA_LLADDR",
    _WATCHED,
)
SEEN = Metric(
    "shoal_neighbour_macs",
    "gauge",
    f"Different MAC addresses that a watched address had, or answered from, in the last {_SEEN_SECONDS:.0f} s.",
    "netlink ROUTE notifications RTM_NEWNEIGH, NDA_LLADDR, and ARP replies",
    _WATCHED,
)
LOST = Metric(
    "shoal_neighbours_notifications_lost_total",
    "counter",
    "Times that the kernel dropped notifications because too many came at once (ENOBUFS): changes may be missing.",
    "netlink ROUTE notifications",
)
REQUESTS = Metric(
    "shoal_neighbour_verify_requests_total",
    "counter",
    "ARP requests sent for a watched address (--neighbours.verify).",
    "AF_PACKET",
    _WATCHED,
)
MISMATCHES = Metric(
    "shoal_neighbour_verify_mismatches_total",
    "counter",
    "ARP requests that were answered from another MAC address than the one that the kernel sends to.",
    "AF_PACKET, against NDA_LLADDR just before the request",
    _WATCHED,
)
ANSWERING = Metric(
    "shoal_neighbour_verify_answering_macs",
    "gauge",
    "Different MAC addresses that answered the last ARP request: more than one is an address that two machines claim.",
    "AF_PACKET",
    _WATCHED,
)


@dataclass(slots=True)
class _Address:
    """What is remembered of a watched address between scrapes."""

    mac: bytes | None = None
    changes: int = 0
    seen: dict[bytes, float] = field(default_factory=dict)
    """{MAC address: when it was last set or heard, by the monotonic clock}"""
    requests: int = 0
    mismatches: int = 0
    answering: int | None = None
    ask_at: float = 0.0

    def note(self, neighbour: Neighbour | None) -> None:
        """Take in what the kernel says. An entry without a MAC address leaves the last one to compare with."""
        if neighbour is None or neighbour.mac is None:
            return
        if neighbour.mac != self.mac:
            self.changes += self.mac is not None
            self.mac = neighbour.mac
            self.hear(neighbour.mac)

    def hear(self, mac: bytes) -> None:
        """Remember that this MAC address was there now, and forget the ones of long ago."""
        now = time.monotonic()
        self.seen.pop(mac, None)
        self.seen[mac] = now
        recent = [(mac, heard) for mac, heard in self.seen.items() if now - heard < _SEEN_SECONDS]
        self.seen = dict(recent[-_MOST_SEEN:])

    def macs(self) -> int:
        """Return how many MAC addresses it has had lately; the one that it still has counts however old."""
        now = time.monotonic()
        recent = {mac for mac, heard in self.seen.items() if now - heard < _SEEN_SECONDS}
        return len(recent | ({self.mac} if self.mac else set()))


class _Watch:
    """Hears what happens to the watched addresses between scrapes, in a thread that sleeps until something does.

    It looks at what has happened at most ten times a second, so that a storm of notifications costs little.
    """

    def __init__(self, *, verify: bool) -> None:
        """Watch nothing yet."""
        self.addresses: dict[Key, _Address] = {}
        self.lost = 0
        self.failure: Unavailable | ParseError | None = Unavailable(Reason.NOT_READABLE, "the watch has not begun")
        self.verify_failure: Unavailable | ParseError | None = None
        self.lock = threading.Lock()
        """Held while `addresses` or what they hold is used."""
        self._verify = verify
        self._stopping = threading.Event()
        self._thread: threading.Thread | None = None

    def start(self) -> None:
        """Begin. Raises `Unavailable` when the kernel gives no notifications."""
        try:
            events = open_events()
        except Unavailable as error:
            self.failure = error
            raise
        self.failure = None
        if self._verify:
            try:
                check_permission()
            except Unavailable as error:
                self.verify_failure = error
        self._thread = threading.Thread(target=self._run, args=(events,), name="shoal-neighbours", daemon=True)
        self._thread.start()

    def stop(self) -> None:
        """End, and wait for it."""
        self._stopping.set()
        if self._thread:
            self._thread.join()

    def update(self, wanted: list[Key], entries: dict[Key, Neighbour]) -> None:
        """Watch these addresses from now on, and take in what a dump said of them: it stands in for what was lost."""
        with self.lock:
            self.addresses = {key: self.addresses.get(key) or _new() for key in wanted}
            for key, address in self.addresses.items():
                address.note(entries.get(key))

    def _run(self, events: socket.socket) -> None:
        try:
            with events:
                while not self._stopping.is_set():
                    self._turn(events)
        except Exception as error:
            # Nobody waits for this thread, so its end has to be told.
            logger.exception("the watch of neighbours ended")
            self.failure = Unavailable(Reason.COLLECTOR_FAILED, f"the watch ended: {error}")

    def _turn(self, events: socket.socket) -> None:
        """Wait for a while for something to happen, and take it in; then ask, if it is time."""
        ready, _, _ = select.select([events], [], [], _IDLE_SECONDS)
        try:
            if ready:
                self._stopping.wait(_BATCH_SECONDS)
                self._hear(events)
            self.failure = None
        except (Unavailable, ParseError) as error:
            self.failure = error
        if self._verify:
            self._ask_next()

    def _hear(self, events: socket.socket) -> None:
        found, lost = read_events(events, _MOST_DATAGRAMS)
        with self.lock:
            self.lost += lost
            for event in found:
                if address := self.addresses.get(event.key):
                    address.note(event.neighbour)

    def _ask_next(self) -> None:
        """Verify the address that has waited longest, if it is time."""
        with self.lock:
            due = [(one.ask_at, key) for key, one in self.addresses.items() if len(key.address) == _IPV4_BYTES]
            at, key = min(due, default=(float("inf"), None))
        if key is None or time.monotonic() < at:
            return
        conflict = False
        failure: Unavailable | ParseError | None = None
        try:
            conflict = self._ask(key)
        except ParseError as error:
            failure = error
        except Unavailable as error:
            # Any other reason is this address's own, as a device that is down; its requests cease to be counted.
            if error.reason is Reason.NO_PERMISSION:
                failure = error
        self.verify_failure = failure
        with self.lock:
            if address := self.addresses.get(key):
                address.ask_at = time.monotonic() + (_CONFLICT_SECONDS if conflict else _VERIFY_SECONDS)

    def _ask(self, key: Key) -> bool:
        """Ask everybody on the link for an address; return whether two machines claim it.

        The kernel hears the answers too and follows the first. Where the machine that it sent to before is among those
        that answered, that one alone is asked again once the kernel would listen, so that the entry ends as it was.
        """
        with open_routes() as netlink:
            route = find_route(netlink, key.address)
            if route is None or route.device != key.device or route.gateway or route.own or not route.source:
                return False
            before = find_neighbour(netlink, key)
            cached = before.mac if before else None
            with open_arp(_device(key.device)) as link:
                request(link, route.source, key.address)
                self._stopping.wait(_ANSWER_SECONDS)
                macs = read_answers(link, key.address, _MOST_PACKETS)
                after = find_neighbour(netlink, key)
                if cached in macs and after and after.mac not in (None, cached):
                    request(link, route.source, key.address, cached)
        with self.lock:
            if address := self.addresses.get(key):
                address.requests += 1
                address.mismatches += cached is not None and bool(macs - {cached})
                address.answering = len(macs)
                for mac in macs:
                    address.hear(mac)
        return len(macs) > 1


def _new() -> _Address:
    """Return a new address, to be asked at a random moment of the first minute: nodes are often started together."""
    return _Address(ask_at=time.monotonic() + random.uniform(0, _VERIFY_SECONDS))  # noqa: S311  (no secret)


@dataclass(frozen=True, slots=True)
class _Target:
    """An address to watch, why, and its label values."""

    key: Key
    role: str
    labels: tuple[str, str]


@register
class NeighboursCollector(Collector):
    """Traffic that goes on to a machine that is no longer the one (failure 11), and tables with no room for more.

    A stale entry is normal and a wrong one may be reachable, so states alone prove nothing. For the next hops of the
    routing tables and for the addresses named by --neighbours.watch this tells when the neighbour last proved that it
    is there, each change of its MAC address, and whether it was seen with two. With --neighbours.verify it asks.
    """

    name = "neighbours"
    metrics: ClassVar = (
        ENTRIES,
        OLDEST_CONFIRMATION,
        TABLE_ENTRIES,
        THRESHOLD,
        OVERFLOWS,
        FORCED,
        FAILURES,
        DISCARDS,
        UNWATCHED,
        STATE,
        INFO,
        CONFIRMATION,
        CHANGES,
        SEEN,
        LOST,
        REQUESTS,
        MISMATCHES,
        ANSWERING,
    )
    signals: ClassVar = (
        "neighbours_entries",
        "neighbours_table",
        "neighbours_discards",
        "neighbours_watch",
        "neighbours_verify",
    )

    def __init__(self, settings: Settings) -> None:
        """Take the addresses to watch; nothing is watched yet."""
        super().__init__(settings)
        self._watch = _Watch(verify=settings.neighbours_verify)

    async def start(self) -> None:
        """Begin to hear notifications."""
        await asyncio.to_thread(self._watch.start)

    async def stop(self) -> None:
        """End it, within a second."""
        await asyncio.to_thread(self._watch.stop)

    def read(self, node: Node) -> list[Family]:
        """Read the entries and the tables, and what the watch has heard since it began."""
        families: list[Family] = []
        targets: list[_Target] | None = None
        with self.availability.reading("neighbours_entries"), open_routes() as netlink:
            targets, unwatched = self._targets(netlink)
            neighbours = read_neighbours(netlink, {target.key for target in targets})
            self._watch.update([target.key for target in targets], neighbours.entries)
            families += _entries(neighbours)
            families += _states(targets, neighbours.entries)
            families.append(Family(UNWATCHED, [((), unwatched)]))
        with self.availability.reading("neighbours_watch"):
            families += self._heard(targets)
        with self.availability.reading("neighbours_verify"):
            families += self._verified(targets)
        with self.availability.reading("neighbours_table"), open_routes() as netlink:
            families += _tables(read_tables(netlink))
        with self.availability.reading("neighbours_discards"):
            families.append(_discards(node))
        return families

    def _targets(self, netlink: NetlinkSocket) -> tuple[list[_Target], int]:
        """Return the addresses to watch, named ones before next hops, and how many were left out."""
        wanted: dict[Key, str] = {}
        unwatched = 0
        for text in self.settings.neighbours_watch:
            if key := _on_link(netlink, text):
                wanted[key] = "named"
            else:
                unwatched += 1
        for family in _FAMILIES:
            if hop := find_default(netlink, family):
                wanted.setdefault(Key(*hop), "next_hop")
        for family in _FAMILIES:
            for hop in read_next_hops(netlink, family, _MOST_ROUTES).hops:
                wanted.setdefault(Key(*hop), "next_hop")
        targets: list[_Target] = []
        for key, role in wanted.items():
            name = _device(key.device)
            if not name or len(targets) == _MOST_WATCHED:
                unwatched += 1
                continue
            family = socket.AF_INET if len(key.address) == _IPV4_BYTES else socket.AF_INET6
            targets.append(_Target(key, role, (name, socket.inet_ntop(family, key.address))))
        return targets, unwatched

    def _heard(self, targets: list[_Target] | None) -> list[Family]:
        if self._watch.failure:
            raise self._watch.failure
        changes, seen, lost = CHANGES.family(), SEEN.family(), LOST.family()
        for target, address in self._watched(targets):
            changes.add(target.labels, address.changes)
            seen.add(target.labels, address.macs())
        lost.add((), self._watch.lost)
        return [changes, seen, lost]

    def _verified(self, targets: list[_Target] | None) -> list[Family]:
        if not self.settings.neighbours_verify:
            raise Unavailable(Reason.NOT_ENABLED, "no address is asked without --neighbours.verify")
        if error := self._watch.failure or self._watch.verify_failure:
            raise error
        requests, mismatches, answering = REQUESTS.family(), MISMATCHES.family(), ANSWERING.family()
        for target, address in self._watched(targets):
            if len(target.key.address) != _IPV4_BYTES:
                continue
            requests.add(target.labels, address.requests)
            mismatches.add(target.labels, address.mismatches)
            if address.answering is not None:
                answering.add(target.labels, address.answering)
        return [requests, mismatches, answering]

    def _watched(self, targets: list[_Target] | None) -> list[tuple[_Target, _Address]]:
        """Return what is remembered of each target. Raises `Unavailable` when the targets are not known."""
        if targets is None:
            raise Unavailable(Reason.NOT_READABLE, "which addresses to watch is not known without the routing tables")
        with self._watch.lock:
            return [(target, self._watch.addresses[target.key]) for target in targets]


def _on_link(netlink: NetlinkSocket, text: str) -> Key | None:
    """Return where a named address is found as a neighbour, None if it is this host's own or behind a gateway."""
    host, _, device = text.partition("%")
    address = ipaddress.ip_address(host).packed
    if device:
        try:
            return Key(socket.if_nametoindex(device), address)
        except OSError:
            return None
    route = find_route(netlink, address)
    if route is None or route.own or route.gateway:
        return None
    return Key(route.device, address)


def _device(index: int) -> str:
    """Return the name of a device, "" if it is gone."""
    try:
        return socket.if_indextoname(index)
    except OSError:
        return ""


def _entries(neighbours: Neighbours) -> list[Family]:
    """Sum the entries by device and state; the states that a device has not are 0."""
    totals: Counter[int] = Counter()
    for (device, state), count in neighbours.counts.items():
        if state not in _UNRESOLVED:
            totals[device] += count
    largest = sorted(totals, key=lambda device: (-totals[device], device))[:_MOST_DEVICES]
    names = {device: _device(device) or "other" for device in largest}
    sums = {(name, state): 0 for name in names.values() for state in STATES.values() if state not in _UNRESOLVED}
    for (device, state), count in neighbours.counts.items():
        if state not in _UNRESOLVED:
            label = names.get(device, "other")
            sums[label, state] = sums.get((label, state), 0) + count
    oldest: dict[str, float] = {}
    for device, seconds in neighbours.unconfirmed_seconds.items():
        label = names.get(device, "other")
        oldest[label] = max(seconds, oldest.get(label, 0))
    return [
        Family(ENTRIES, list(sums.items())),
        Family(OLDEST_CONFIRMATION, [((label,), seconds) for label, seconds in oldest.items()]),
    ]


def _states(targets: list[_Target], entries: dict[Key, Neighbour]) -> list[Family]:
    state, info, confirmation = STATE.family(), INFO.family(), CONFIRMATION.family()
    for target in targets:
        entry = entries.get(target.key)
        state.add((*target.labels, entry.state if entry else "none"), 1)
        if entry and entry.mac:
            info.add((*target.labels, entry.mac.hex(":"), target.role), 1)
        if entry and entry.state in _IN_USE and entry.confirmed_seconds is not None:
            confirmation.add(target.labels, entry.confirmed_seconds)
    return [state, info, confirmation]


def _tables(tables: dict[str, Table]) -> list[Family]:
    entries, threshold = TABLE_ENTRIES.family(), THRESHOLD.family()
    overflows, forced, failures = OVERFLOWS.family(), FORCED.family(), FAILURES.family()
    for name, protocol in _TABLES.items():
        if (table := tables.get(name)) is None:
            continue
        entries.add((protocol,), table.entries)
        for level, value in enumerate(table.thresholds, 1):
            threshold.add((protocol, str(level)), value)
        overflows.add((protocol,), table.overflows)
        forced.add((protocol,), table.forced_collections)
        failures.add((protocol,), table.resolution_failures)
    return [entries, threshold, overflows, forced, failures]


def _discards(node: Node) -> Family:
    family = DISCARDS.family()
    for name, protocol in _TABLES.items():
        try:
            family.add((protocol,), read_discards(node.roots.proc, name))
        except Unavailable as error:
            # A kernel without IPv6 has no second table; one whose first is missing shows another namespace's files.
            if error.reason is not Reason.NOT_IN_KERNEL or not family.samples:
                raise
    return family
