"""Collector `conntrack`: how full the connection tracking tables are, who fills them, and where they lead nowhere."""

from __future__ import annotations

import asyncio
import logging
import threading
import time
from dataclasses import dataclass, field
from functools import partial
from ipaddress import ip_address
from socket import IPPROTO_ICMP, IPPROTO_ICMPV6, IPPROTO_SCTP, IPPROTO_TCP, IPPROTO_UDP
from typing import TYPE_CHECKING, ClassVar

from shoal.census import Census, Stale, Staleness, Surroundings, take
from shoal.collectors import Collector, register
from shoal.families import Family, KeptSums, Metric
from shoal.inventory import NETNS_LABELS
from shoal.kernel.addresses import read_local_addresses
from shoal.kernel.conntrack import ConntrackTable, read_conntrack_table
from shoal.kernel.files import ParseError, Reason, Roots, Unavailable, Vanished
from shoal.kernel.iptables import read_table_names
from shoal.kernel.modules import require_module
from shoal.kernel.namespaces import open_in_namespace
from shoal.kernel.netlink.conntrack import read_conntrack_statistics, read_conntrack_totals
from shoal.kernel.netlink.conntrack_entries import read_entries
from shoal.kernel.netlink.core import open_socket
from shoal.kernel.netlink.nat_rules import NatBackends, read_nat_backends
from shoal.kernel.sysctls import read_sysctl

if TYPE_CHECKING:
    from collections.abc import Callable
    from socket import socket

    from shoal.inventory import LabelledNamespace, Node
    from shoal.kernel.netlink.conntrack_entries import Entry
    from shoal.kernel.netlink.core import SocketOpener, Subsystem
    from shoal.kubernetes.endpoints import Endpoints
    from shoal.kubernetes.watch import EndpointWatch
    from shoal.settings import Settings

__all__ = ["ConntrackCollector"]

logger = logging.getLogger(__name__)

_NETNS = ("netns",)
_HOST = ("host", "", "", "", "")
_LOOPBACK = (ip_address("127.0.0.1").packed, ip_address("::1").packed)
_KINDS = frozenset({"host", "pod", "container", "unit"})
_MOST = 10

# How long a scrape waits for a dump: that of a table of 2,000 entries is fresh, a larger one is the next scrape's.
_PATIENCE_SECONDS = 0.02
_ENTRIES_PER_SECOND = 100_000
# What was seen longer ago than this says nothing of being renewed.
_COMPARABLE_SECONDS = 300
# Scrapes that are as far apart as dumps should be must not miss every second dump for arriving early.
_EARLY = 0.9

# Source NAT maps a port from 1024 up to one from 1024 up unless its rule names other ports (nf_nat_l4proto_unique_tuple
# in net/netfilter/nf_nat_core.c, the same from 5.10 to 6.18). Since 5.0 it gives up after some 250 attempts, so the
# last few hundred ports of a space are hardly ever found.
_AVAILABLE_PORTS = 65535 - 1024 + 1

_PROTOCOLS = {
    IPPROTO_ICMP: "icmp",
    IPPROTO_TCP: "tcp",
    IPPROTO_UDP: "udp",
    33: "dccp",
    47: "gre",
    IPPROTO_ICMPV6: "icmpv6",
    IPPROTO_SCTP: "sctp",
    136: "udplite",
}

ENTRIES = Metric(
    "shoal_conntrack_entries",
    "gauge",
    "Connections in the table of a network namespace (nf_conntrack_count): the host's, the exporter's own, and the "
    f"{_MOST} fullest others.",
    "/proc/<pid>/net/stat/nf_conntrack entries; or /proc/sys/net/netfilter/nf_conntrack_count",
    NETNS_LABELS,
)
NODE_ENTRIES = Metric(
    "shoal_conntrack_node_entries",
    "gauge",
    "Connections in the tables of all network namespaces together; the limit is not on this sum, but its memory is.",
    "/proc/<pid>/net/stat/nf_conntrack entries, summed",
)
LIMIT = Metric(
    "shoal_conntrack_limit",
    "gauge",
    "The most connections that a namespace may track; one setting for the whole node (nf_conntrack_max).",
    "/proc/sys/net/netfilter/nf_conntrack_max",
)


def _counter(word: str, meaning: str) -> Metric:
    return Metric(
        f"shoal_conntrack_{word}_total",
        "counter",
        f"{meaning} ({word}). Namespaces of one kind are summed; those that only have a name are other.",
        f"/proc/<pid>/net/stat/nf_conntrack or nfnetlink IPCTNL_MSG_CT_GET_STATS_CPU, {word}, summed over CPUs",
        _NETNS,
    )


_COUNTERS = {
    "drop": _counter("drop", "Packets of new connections dropped because the table was full"),
    "early_drop": _counter("early_drop", "Entries thrown out early to make room in a full table"),
    "insert_failed": _counter("insert_failed", "Entries that another of the same tuple had beaten to the table"),
    "search_restart": _counter("search_restart", "Look-ups begun again because the table was being resized"),
    "clash_resolve": _counter("clash_resolve", "Insertion races that the kernel settled without a loss"),
    "invalid": _counter("invalid", "Packets that belong to no connection and start none"),
    "error": _counter("error", "Packets that a protocol's tracker refused"),
    "chain_toolong": _counter("chain_toolong", "Entries dropped because their hash chain was too long"),
}

OWNER_ENTRIES = Metric(
    "shoal_conntrack_owner_entries",
    "gauge",
    "Entries of the dumped table by the namespace that has the connection's first source address (direction from), or "
    "else by the one that answers it (direction to); forwarded between other hosts, and beyond the top "
    f"{_MOST}, is netns other. Estimated where the dump was cut short.",
    "nfnetlink IPCTNL_MSG_CT_GET, CTA_TUPLE_*; /proc/<pid>/net/{fib_trie,if_inet6}",
    (*NETNS_LABELS, "direction"),
    tier=2,
)
DESTINATION_ENTRIES = Metric(
    "shoal_conntrack_destination_entries",
    "gauge",
    "Entries of the dumped table by where the connection was first sent, a service's own address and not its "
    f"backend's. The top {_MOST} and destination other. Estimated where the dump was cut short.",
    "nfnetlink IPCTNL_MSG_CT_GET, CTA_TUPLE_ORIG",
    ("protocol", "destination", "destination_port"),
    tier=2,
)
PORTS_USED = Metric(
    "shoal_conntrack_nat_ports_used",
    "gauge",
    "Source ports from 1024 up that are taken between a source address that NAT translates to and one destination, "
    f"also by connections that are not translated; the {_MOST} worst. A closed TCP connection keeps its port while it "
    "is tracked, though newer kernels let NAT take it over. Estimated where the dump was cut short.",
    "nfnetlink IPCTNL_MSG_CT_GET, CTA_TUPLE_REPLY",
    ("protocol", "source", "destination", "destination_port"),
    tier=2,
)
PORTS_AVAILABLE = Metric(
    "shoal_conntrack_nat_ports_available",
    "gauge",
    "Source ports that NAT can choose from for each such pair, 1024 to 65535, unless a rule names fewer.",
    "net/netfilter/nf_nat_core.c",
    tier=2,
)
STALE_ENTRIES = Metric(
    "shoal_conntrack_stale_entries",
    "gauge",
    "Connections that were sent to a service (destination), were translated to a backend, and have been renewed since "
    "the dump before without an answer. Reason backend_gone: no NAT rule leads to the backend any more, or no "
    "EndpointSlice has it where the rules are not known in full; unreplied: it never answered, and neither are known; "
    "backend_silent: it never answered, and is still a backend. kubernetes_service is namespace/name, with "
    f"--kubernetes.endpoints. The top {_MOST}, and what is beyond them as destination other. Estimated where the dump "
    "was cut short.",
    "nfnetlink IPCTNL_MSG_CT_GET, CTA_STATUS, CTA_TIMEOUT; NFT_MSG_GETRULE; EndpointSlices",
    ("reason", "protocol", "destination", "destination_port", "backend", "kubernetes_service"),
    tier=2,
)
ENDPOINTS = Metric(
    "shoal_conntrack_endpoints",
    "gauge",
    "Backends of the cluster's services that live or are being drained (addresses, ports and protocols of "
    "EndpointSlices), with --kubernetes.endpoints.",
    "API server, endpointslices of discovery.k8s.io/v1",
)
ENDPOINTS_AGE = Metric(
    "shoal_conntrack_endpoints_age_seconds",
    "gauge",
    "Time since the API server last told of EndpointSlices or that nothing has changed, which it does once a minute. "
    "While the watch is broken off no backend is called gone for what the slices say.",
    "measured",
)
DUMP_AGE = Metric(
    "shoal_conntrack_dump_age_seconds",
    "gauge",
    "Time since the dump of this namespace's table ended, from which the numbers of owners, destinations, NAT ports "
    "and stale entries come.",
    "measured",
    _NETNS,
    tier=2,
)
DUMP_DURATION = Metric(
    "shoal_conntrack_dump_duration_seconds",
    "gauge",
    f"How long the dump took, at most {_ENTRIES_PER_SECOND:,} entries a second by intention.",
    "measured",
    tier=2,
)
DUMP_ENTRIES = Metric(
    "shoal_conntrack_dump_entries",
    "gauge",
    "Entries that the dump looked at.",
    "nfnetlink IPCTNL_MSG_CT_GET, counted",
    tier=2,
)
DUMP_CUT = Metric(
    "shoal_conntrack_dump_cut_entries",
    "gauge",
    "Entries that the dump left out: beyond the most that it looks at (reason size), or not remembered until the next "
    "dump though they may be stale (reason memory).",
    "nfnetlink IPCTNL_MSG_CT_GET, counted",
    ("reason",),
    tier=2,
)


@dataclass(frozen=True, slots=True)
class _Table:
    """The table to dump: whose it is, and how to get at it."""

    labels: tuple[str, ...]
    """Those of its namespace, in the order of `NETNS_LABELS`."""
    proc: str
    pid: int | str
    opener: SocketOpener


@dataclass(frozen=True, slots=True)
class _Dump:
    """What one dump ended with: a census, or the reason why there is none."""

    began: float
    ended: float
    netns: str = ""
    total: int = 0
    """Entries that the table had when the dump began."""
    census: Census | None = None
    failure: Callable[[], Exception] | None = None
    """Makes the exception that tells why there is no census."""
    backends: NatBackends | None = None
    backends_failure: Callable[[], Exception] | None = None
    services: dict[Stale, str] = field(default_factory=dict)
    """{one of the top stale mappings: namespace/name of the Kubernetes service that its backend belongs to}"""


@register
class ConntrackCollector(Collector):
    """A full table drops every new connection while established ones live on (failure 9).

    Each network namespace has a table of its own up to the node's one limit; all are counted without entering any.
    `insert_failed` without a full table is another illness, a race of two packets for one entry. Who fills the
    host's table, which ports masquerading has used up (14), and which entries still lead to a backend that is gone (12)
    comes from a dump, which is taken at its own interval, in a thread of its own, and says how old it is.
    """

    name = "conntrack"
    last = True
    metrics: ClassVar = (
        ENTRIES,
        NODE_ENTRIES,
        LIMIT,
        *_COUNTERS.values(),
        OWNER_ENTRIES,
        DESTINATION_ENTRIES,
        PORTS_USED,
        PORTS_AVAILABLE,
        STALE_ENTRIES,
        ENDPOINTS,
        ENDPOINTS_AGE,
        DUMP_AGE,
        DUMP_DURATION,
        DUMP_ENTRIES,
        DUMP_CUT,
    )
    signals: ClassVar = (
        "conntrack_entries",
        "conntrack_statistics",
        "conntrack_namespaces",
        "conntrack_dump",
        "conntrack_backends",
        "conntrack_endpoints",
    )

    def __init__(self, settings: Settings) -> None:
        """Start with no sums to keep and no dump."""
        super().__init__(settings)
        self._sums: dict[str, KeptSums[str]] = {word: KeptSums() for word in _COUNTERS}
        self._thread: threading.Thread | None = None
        self._last: _Dump | None = None
        self._watch: EndpointWatch | None = None
        self._watching: asyncio.Task[None] | None = None

    async def start(self) -> None:
        """Begin to watch EndpointSlices, if that is asked for and there are dumps to compare them with."""
        if self.settings.kubernetes_endpoints and self.settings.conntrack_dump_interval and not self._watching:
            self._watch = await asyncio.to_thread(_load_watch)
            self._watching = asyncio.create_task(self._watch.run())

    async def stop(self) -> None:
        """End the watch."""
        if self._watching:
            self._watching.cancel()
            await asyncio.gather(self._watching, return_exceptions=True)

    def read(self, node: Node) -> list[Family]:
        """Read the tables' sizes and counters, which anyone may, then what a dump tells, which needs CAP_NET_ADMIN."""
        families: list[Family] = []
        entries: int | None = None
        with self.availability.reading("conntrack_entries"):
            entries = read_sysctl(node.roots.proc, "net/netfilter/nf_conntrack_count")
            limit = read_sysctl(node.roots.proc, "net/netfilter/nf_conntrack_max")
            families.append(Family(LIMIT, [((), limit)]))
        tables: list[tuple[LabelledNamespace, ConntrackTable]] = []
        with self.availability.reading("conntrack_namespaces"):
            tables = self._tables(node)
            families += _sizes(node, tables)
        if entries is not None and not tables:
            families.append(Family(ENTRIES, [((node.own_netns(), "", "", "", ""), entries)]))
        with self.availability.reading("conntrack_statistics"):
            families += self._statistics(node, tables)
        dump: _Dump | None = None
        with self.availability.reading("conntrack_dump"):
            dump = self._dump(node)
            families += _who(dump)
        with self.availability.reading("conntrack_backends"):
            if dump is None:
                raise Unavailable(Reason.NOT_READABLE, "without a dump there is nothing to compare NAT rules with")
            if dump.backends_failure:
                raise dump.backends_failure()
        with self.availability.reading("conntrack_endpoints"):
            if self._watch is None:
                why = "EndpointSlices are not watched (--kubernetes.endpoints, with dumps of the table)"
                raise Unavailable(Reason.NOT_ENABLED, why)
            if (age := self._watch.age) is not None:
                families.append(Family(ENDPOINTS_AGE, [((), age)]))
            families.append(Family(ENDPOINTS, [((), len(self._watch.current()))]))
        return families

    def _tables(self, node: Node) -> list[tuple[LabelledNamespace, ConntrackTable]]:
        """Read the table of every namespace: from proc, or inside the namespace where that is wanted."""
        found: list[tuple[LabelledNamespace, ConntrackTable]] = []
        refused: Exception = Unavailable(Reason.NOT_IN_KERNEL, "no network namespace was found")
        for space in node.network_namespaces():
            try:
                found.append((space, read_conntrack_table(node.roots.proc, space.pid)))
            except Vanished:
                continue
            except (Unavailable, ParseError) as error:
                # The process may just have ended; only a node on which nothing can be read has lost the signal.
                refused = _again(error)()
        if found:
            return found
        if not isinstance(refused, Unavailable) or refused.reason is not Reason.NOT_IN_KERNEL:
            raise refused
        # Built without CONFIG_NF_CONNTRACK_PROCFS.
        _check_that_it_tracks(node)
        if not self.settings.enter_namespaces:
            raise Unavailable(Reason.NOT_ENABLED, f"{refused}, and the tables of other namespaces want --netns.enter")
        return _enter_all(node)

    def _statistics(self, node: Node, tables: list[tuple[LabelledNamespace, ConntrackTable]]) -> list[Family]:
        kinds = [(_kind(space), space.id, table.statistics) for space, table in tables]
        if not kinds:
            _check_that_it_tracks(node)
            kinds = [(node.own_netns(), 0, read_conntrack_statistics())]
        families = []
        for word, metric in _COUNTERS.items():
            rows = [(kind, owner, getattr(statistics, word)) for kind, owner, statistics in kinds]
            sums = self._sums[word].update([row for row in rows if row[2] is not None])
            if sums:
                families.append(Family(metric, [((kind,), value) for kind, value in sums.items()]))
        return families

    def _dump(self, node: Node) -> _Dump:
        """Return the last dump; begin another one if it is time, and wait for that a little."""
        interval = self.settings.conntrack_dump_interval
        if not interval:
            raise Unavailable(Reason.NOT_ENABLED, "dumps are switched off by --conntrack.dump-interval=0")
        running = self._thread is not None and self._thread.is_alive()
        if not running and (self._last is None or time.monotonic() - self._last.began >= interval * _EARLY):
            table = self._table(node)
            self._thread = threading.Thread(
                target=self._take_dump, args=(node, table, self._last), name="shoal-conntrack", daemon=True
            )
            self._thread.start()
        if self._thread is not None:
            self._thread.join(_PATIENCE_SECONDS)
        last = self._last
        if last is None:
            raise Unavailable(Reason.NOT_READABLE, "the first dump is not finished yet")
        if last.failure:
            raise last.failure()
        return last

    def _table(self, node: Node) -> _Table:
        """Choose the table to dump: the host's if there is a way to it, or else the exporter's own."""
        own = node.own_network_namespace()
        labels = own.labels if own else ("self", "", "", "", "")
        if labels == _HOST:
            return _Table(labels, node.roots.proc, 1, open_socket)
        if self.settings.enter_namespaces:
            return _Table(_HOST, node.roots.proc, 1, partial(_open_inside, node.roots.proc, 1))
        return _Table(labels, Roots().proc, "self", open_socket)

    def _take_dump(self, node: Node, table: _Table, last: _Dump | None) -> None:
        began = time.monotonic()
        known = last.backends if last else None
        backends: NatBackends | None = None
        backends_failure: Callable[[], Exception] | None = None
        try:
            _check_that_it_tracks(node)
            try:
                backends = _backends(node, table, known)
            except (Unavailable, ParseError) as error:
                backends_failure = _again(error)
            before = last.census if last and last.census and began - last.began < _COMPARABLE_SECONDS else None
            total = read_conntrack_totals(opener=table.opener).entries
            own = read_local_addresses(table.proc, table.pid)
            endpoints = self._endpoints()
            surroundings = Surroundings(
                _owners(node) | dict.fromkeys(_LOOPBACK, table.labels),
                own,
                partial(_is_backend, backends if backends and not backends.empty else None, endpoints, own),
            )
            census = read_entries(
                lambda entries: take(
                    entries,
                    surroundings,
                    before or Census(),
                    most=self.settings.conntrack_dump_entries,
                    entries_per_second=_ENTRIES_PER_SECOND,
                ),
                opener=table.opener,
            )
        except Exception as error:
            logger.debug("dump failed", exc_info=error, extra={"collector": self.name})
            self._last = _Dump(began, time.monotonic(), failure=_again(error))
        else:
            ended = time.monotonic()
            services = _services(census, endpoints)
            self._last = _Dump(began, ended, table.labels[0], total, census, None, backends, backends_failure, services)

    def _endpoints(self) -> Endpoints | None:
        """Return the backends that EndpointSlices have, None unless these are watched and the watch is up to date."""
        try:
            return self._watch.current() if self._watch else None
        except Unavailable:
            return None


def _check_that_it_tracks(node: Node) -> None:
    """Raise `Unavailable` where a request could make the kernel load a module.

    Where nothing is tracked, asking would make it load nf_conntrack, and so begin to track.
    """
    read_sysctl(node.roots.proc, "net/netfilter/nf_conntrack_count")
    require_module(node.roots, "nf_conntrack_netlink")


def _again(error: Exception) -> Callable[[], Exception]:
    """Return a maker of exceptions like this one, which does not keep the scrape that it was raised in."""
    if isinstance(error, Unavailable):
        return partial(Unavailable, error.reason, str(error))
    if isinstance(error, ParseError):
        return partial(ParseError, error.file, error.line, error.expected)
    if isinstance(error, Vanished):
        return partial(Unavailable, Reason.NOT_READABLE, str(error))
    return partial(RuntimeError, f"{type(error).__name__}: {error}")


def _open_inside(proc: str, pid: int, subsystem: Subsystem) -> socket:
    return open_in_namespace(proc, pid, lambda: open_socket(subsystem))


def _enter_all(node: Node) -> list[tuple[LabelledNamespace, ConntrackTable]]:
    """Ask inside every namespace; one that ends meanwhile is left out, a refusal ends the signal."""
    found = []
    for space in node.network_namespaces():
        opener = partial(_open_inside, node.roots.proc, space.pid)
        try:
            entries = read_conntrack_totals(opener=opener).entries
            found.append((space, ConntrackTable(entries, read_conntrack_statistics(opener=opener))))
        except Vanished:
            continue
        except Unavailable as error:
            if error.reason is not Reason.NOT_IN_KERNEL:
                raise
    return found


def _kind(space: LabelledNamespace) -> str:
    return space.labels[0] if space.labels[0] in _KINDS else "other"


def _sizes(node: Node, tables: list[tuple[LabelledNamespace, ConntrackTable]]) -> list[Family]:
    own = node.own_network_namespace()
    always = {space.id for space, _ in tables if space.labels[0] == "host" or (own and space.id == own.id)}
    others = [(space, table) for space, table in tables if space.id not in always and table.entries]
    others.sort(key=lambda one: one[1].entries, reverse=True)
    sizes: dict[tuple[str, ...], int] = {}
    for space, table in [*others[:_MOST], *(one for one in tables if one[0].id in always)]:
        # Namespaces without a name of their own share one; the fullest of them stands for all.
        sizes[space.labels] = max(sizes.get(space.labels, 0), table.entries)
    total = sum(table.entries for _, table in tables)
    return [Family(ENTRIES, list(sizes.items())), Family(NODE_ENTRIES, [((), total)])]


def _owners(node: Node) -> dict[bytes, tuple[str, ...]]:
    """Return {address: labels of the namespace that has it}; one that several have is nobody's."""
    found: dict[bytes, tuple[str, ...]] = {}
    several: set[bytes] = set()
    for space in node.network_namespaces():
        try:
            addresses = read_local_addresses(node.roots.proc, space.pid)
        except (Unavailable, Vanished, ParseError):
            continue
        several |= addresses & found.keys()
        found |= dict.fromkeys(addresses, space.labels)
    for address in several:
        del found[address]
    return found


def _backends(node: Node, table: _Table, known: NatBackends | None) -> NatBackends:
    """Return where the NAT rules lead. Raises `Unavailable` where they cannot be known in full, or `ParseError`."""
    require_module(node.roots, "nf_tables")
    if "nat" in read_table_names(table.proc, table.pid):
        raise Unavailable(Reason.NOT_READABLE, "there are NAT rules of legacy iptables, which are not read")
    backends = read_nat_backends(known, opener=table.opener)
    if backends.opaque:
        raise Unavailable(Reason.NOT_READABLE, f"{backends.opaque} NAT rules translate in a way that is not understood")
    return backends


def _load_watch() -> EndpointWatch:
    """Import what talks to the API server, for those who have one to ask."""
    from shoal.kubernetes.watch import EndpointWatch  # noqa: PLC0415  (only with --kubernetes.endpoints)

    return EndpointWatch()


def _is_backend(
    rules: NatBackends | None, endpoints: Endpoints | None, own: frozenset[bytes], entry: Entry
) -> bool | None:
    """Tell whether a backend lives: by EndpointSlices, which have those that are being drained too, else by NAT rules.

    Where the rules are not known, a backend that no slice has is gone, unless the connection was sent to the node
    itself: what answers a published port of a container need be no service's backend. A cluster without any backend,
    like rules that lead nowhere, says that somebody else translates here.
    """
    if endpoints and endpoints.lives(entry.reply_source, entry.reply_source_port, entry.protocol):
        return True
    if rules:
        return rules.leads_to(entry.reply_source, entry.reply_source_port)
    return False if endpoints and entry.destination not in own else None


def _services(census: Census, endpoints: Endpoints | None) -> dict[Stale, str]:
    """Return whose the backends are that the top stale mappings lead to."""
    if endpoints is None:
        return {}
    top = [stale for stale, _ in census.stale.top(_MOST)]
    return {stale: endpoints.service(stale.backend, stale.backend_port, stale.protocol) for stale in top}


def _who(dump: _Dump) -> list[Family]:
    """Turn a census into families."""
    census = dump.census
    if census is None:
        return []
    cut = max(0, dump.total - census.entries) if census.cut_short else 0
    scale = 1 + cut / census.entries if census.entries else 1
    age = DUMP_AGE.family()
    age.add((dump.netns,), time.monotonic() - dump.ended)
    return [
        _by_owner(census, scale),
        _by_destination(census, scale),
        _by_ports(census, scale),
        Family(PORTS_AVAILABLE, [((), _AVAILABLE_PORTS)]),
        _stale(census, dump.services, scale),
        age,
        Family(DUMP_DURATION, [((), dump.ended - dump.began)]),
        Family(DUMP_ENTRIES, [((), census.entries)]),
        Family(DUMP_CUT, [(("size",), cut), (("memory",), census.forgotten)]),
    ]


def _by_owner(census: Census, scale: float) -> Family:
    rest = census.entries
    rows: dict[tuple[str, ...], int] = {}
    for (owner, direction), count in census.owners.most_common(_MOST):
        rows[*owner, direction] = count
        rest -= count
    other = ("other", "", "", "", "", "")
    rows[other] = rest
    return _scaled(OWNER_ENTRIES, rows, scale)


def _by_destination(census: Census, scale: float) -> Family:
    rest = census.destinations.total
    rows: dict[tuple[str, ...], int] = {}
    for (protocol, address, port), count in census.destinations.top(_MOST):
        rows[_protocol(protocol), _address(address), str(port) if port else ""] = count
        rest -= count
    rows["", "other", ""] = rest
    return _scaled(DESTINATION_ENTRIES, rows, scale)


def _by_ports(census: Census, scale: float) -> Family:
    rows: dict[tuple[str, ...], int] = {}
    for space, count in census.ports(_MOST):
        labels = (_protocol(space.protocol), _address(space.source), _address(space.address), str(space.port))
        # Zones are spaces of their own; the worst one stands for all.
        rows[labels] = max(rows.get(labels, 0), count)
    return _scaled(PORTS_USED, rows, scale)


def _stale(census: Census, services: dict[Stale, str], scale: float) -> Family:
    rows: dict[tuple[str, ...], int] = {(reason.value, "", "other", "", "", ""): 0 for reason in Staleness}
    for rank, (stale, count) in enumerate(census.stale.top(census.stale.total)):
        backend = _address(stale.backend)
        place = f"[{backend}]:{stale.backend_port}" if ":" in backend else f"{backend}:{stale.backend_port}"
        which = (_protocol(stale.protocol), _address(stale.address), str(stale.port), place, services.get(stale, ""))
        labels = (stale.reason.value, *which)
        if rank >= _MOST:
            labels = (stale.reason.value, "", "other", "", "", "")
        rows[labels] = rows.get(labels, 0) + count
    return _scaled(STALE_ENTRIES, rows, scale)


def _scaled(metric: Metric, rows: dict[tuple[str, ...], int], scale: float) -> Family:
    return Family(metric, [(labels, round(count * scale)) for labels, count in rows.items()])


def _protocol(number: int) -> str:
    return _PROTOCOLS.get(number, str(number))


def _address(packed: bytes) -> str:
    return ip_address(packed).compressed
