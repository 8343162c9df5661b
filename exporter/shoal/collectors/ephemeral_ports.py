"""Collector `ephemeral_ports`: who has used up the local ports towards one destination."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

from shoal.collectors import Collector, register
from shoal.families import Family, KeptSums, Metric
from shoal.inventory import NETNS_LABELS, OWNER_LABELS, LabelledNamespace, Node, Owner
from shoal.kernel.files import ParseError, Reason, Unavailable, Vanished
from shoal.kernel.namespaces import open_in_namespace
from shoal.kernel.netlink.core import Subsystem, open_socket
from shoal.kernel.netlink.ports import PortUse, read_port_use
from shoal.kernel.netlink.sock_diag import read_listeners
from shoal.kernel.port_range import PortRange, read_port_range
from shoal.kernel.sockstat import TcpSockets, read_tcp_sockets
from shoal.kernel.sysctls import read_sysctl

if TYPE_CHECKING:
    import socket

    from shoal.settings import Settings

__all__ = ["EphemeralPortsCollector"]

_MOST = 10
_Tuple = tuple[int, str, str, int]
"""Namespace id, source, destination and its port."""
_TUPLE_LABELS = ("netns", *OWNER_LABELS, "source", "destination", "destination_port")
# Below this many sockets no useful range is in danger, so the namespace is not entered to learn its range.
_WORTH_A_LOOK = 100
# A namespace is dumped when it has more sockets than this part of its range: the dump costs 4 ms and 1 us a socket.
_WORTH_A_DUMP = 0.1

IN_USE = Metric(
    "shoal_tcp_sockets_in_use",
    "gauge",
    "TCP sockets of the network namespace but those in TIME_WAIT (sockstat inuse, IPv4 and IPv6); of a pod "
    f"only if it has {_WORTH_A_LOOK} with them.",
    "/proc/<pid>/net/{sockstat,sockstat6}",
    NETNS_LABELS,
)
TIME_WAIT = Metric(
    "shoal_tcp_time_wait_sockets",
    "gauge",
    "TCP sockets in TIME_WAIT, each of which keeps a local port from its destination for a minute (sockstat tw); of "
    "the same namespaces.",
    "/proc/<pid>/net/sockstat",
    NETNS_LABELS,
)
TIME_WAIT_LIMIT = Metric(
    "shoal_tcp_time_wait_limit",
    "gauge",
    "The most sockets in TIME_WAIT in the exporter's network namespace (net.ipv4.tcp_max_tw_buckets).",
    "/proc/sys/net/ipv4/tcp_max_tw_buckets",
)
TIME_WAIT_OVERFLOWS = Metric(
    "shoal_tcp_time_wait_overflows_total",
    "counter",
    "Sockets closed without TIME_WAIT because its limit was reached (TCPTimeWaitOverflow); of a pod if there are any, "
    f"or if it has {_WORTH_A_LOOK} sockets.",
    "/proc/<pid>/net/netstat TcpExt TCPTimeWaitOverflow",
    NETNS_LABELS,
)
USED = Metric(
    "shoal_ephemeral_ports_used",
    "gauge",
    "Local ports held from this source address to this destination, by TIME_WAIT too unless tcp_tw_reuse lets "
    "connect() take those over; beyond shoal_ephemeral_ports_available connect() fails with EADDRNOTAVAIL. The worst "
    f"of each namespace that has enough sockets to matter, and the {_MOST} worst of all.",
    "sock_diag, counted by idiag_src, idiag_dst and idiag_dport",
    _TUPLE_LABELS,
)
USED_BY_TIME_WAIT = Metric(
    "shoal_ephemeral_ports_time_wait",
    "gauge",
    "Those of shoal_ephemeral_ports_used that a connection in TIME_WAIT holds.",
    "sock_diag idiag_state",
    _TUPLE_LABELS,
)
AVAILABLE = Metric(
    "shoal_ephemeral_ports_available",
    "gauge",
    "Local ports that there are from this source address to this destination (ip_local_port_range without "
    "ip_local_reserved_ports).",
    "/proc/sys/net/ipv4/{ip_local_port_range,ip_local_reserved_ports}",
    _TUPLE_LABELS,
)
TUPLES_CUT = Metric(
    "shoal_ephemeral_ports_tuples_cut",
    "gauge",
    "Pairs of a source address and a destination that were counted and are not exported one by one.",
    "sock_diag, counted",
)


@dataclass(frozen=True, slots=True)
class _Crowded:
    """A namespace that was dumped: its worst tuples, how many it has in all, and its range."""

    namespace: LabelledNamespace
    worst: list[PortUse]
    tuples: int
    ports: PortRange


@register
class EphemeralPortsCollector(Collector):
    """EADDRNOTAVAIL while everything looks healthy (failures 13 and 14): local ports used up towards one destination.

    The space is one per source address, destination address and destination port, so no global number tells. Sockets
    are counted for every network namespace; which destination has the ports is looked up where a namespace has more
    sockets than a tenth of its range: in the exporter's own, and with --netns.enter in every other one.
    """

    name = "ephemeral_ports"
    metrics: ClassVar = (
        IN_USE,
        TIME_WAIT,
        TIME_WAIT_LIMIT,
        TIME_WAIT_OVERFLOWS,
        USED,
        USED_BY_TIME_WAIT,
        AVAILABLE,
        TUPLES_CUT,
    )
    signals: ClassVar = ("ephemeral_ports_sockets", "ephemeral_ports_own", "ephemeral_ports_namespaces")

    def __init__(self, settings: Settings) -> None:
        """Start with no sums to keep and no owner known."""
        super().__init__(settings)
        self._overflows: KeptSums[tuple[str, ...]] = KeptSums()
        self._owners: dict[_Tuple, Owner] = {}

    def read(self, node: Node) -> list[Family]:
        """Count the sockets of every namespace, then look into the crowded ones."""
        families: list[Family] = []
        sockets: dict[int, TcpSockets] = {}
        with self.availability.reading("ephemeral_ports_sockets"):
            sockets = _sockets(node)
            families += self._counts(node, sockets)
            families.append(
                Family(TIME_WAIT_LIMIT, [((), read_sysctl(node.roots.proc, "net/ipv4/tcp_max_tw_buckets"))])
            )
        crowded: list[_Crowded] = []
        own = node.own_network_namespace()
        with self.availability.reading("ephemeral_ports_own"):
            if own is None or own.id not in sockets:
                raise Unavailable(Reason.NOT_READABLE, "the exporter's own network namespace is not in its proc")
            ports = read_port_range(node.roots.proc)
            if _enough(sockets[own.id], ports):
                crowded.append(_own(own, ports))
        with self.availability.reading("ephemeral_ports_namespaces"):
            if not self.settings.enter_namespaces:
                raise Unavailable(Reason.NOT_ENABLED, "ports of other network namespaces want --netns.enter")
            others = [space for space in node.network_namespaces() if own is None or space.id != own.id]
            crowded += _look_into(node, others, sockets)
        absent = self.availability.absent
        if not absent["ephemeral_ports_own"] or not absent["ephemeral_ports_namespaces"]:
            families += self._tuples(node, crowded)
        return families

    def _counts(self, node: Node, sockets: dict[int, TcpSockets]) -> list[Family]:
        in_use: dict[tuple[str, ...], int] = {}
        time_wait: dict[tuple[str, ...], int] = {}
        overflows: list[tuple[tuple[str, ...], int, float]] = []
        for space in node.network_namespaces():
            if space.id not in sockets:
                continue
            shown = space.labels[0] != "pod" or _total(sockets[space.id]) >= _WORTH_A_LOOK
            if shown:
                in_use[space.labels] = in_use.get(space.labels, 0) + sockets[space.id].in_use
                time_wait[space.labels] = time_wait.get(space.labels, 0) + sockets[space.id].time_wait
            try:
                overflowed = node.netstat(space)["TCPTimeWaitOverflow"]
            except (Unavailable, Vanished, ParseError, KeyError):
                continue
            if shown or overflowed:
                overflows.append((space.labels, space.id, overflowed))
        return [
            Family(IN_USE, list(in_use.items())),
            Family(TIME_WAIT, list(time_wait.items())),
            Family(TIME_WAIT_OVERFLOWS, list(self._overflows.update(overflows).items())),
        ]

    def _tuples(self, node: Node, crowded: list[_Crowded]) -> list[Family]:
        used: dict[tuple[str, ...], int] = {}
        time_wait: dict[tuple[str, ...], int] = {}
        available: dict[tuple[str, ...], int] = {}
        owners: dict[_Tuple, Owner] = {}
        rows = [(use, one, rank == 0) for one in crowded for rank, use in enumerate(one.worst)]
        rows.sort(key=lambda row: row[0].used, reverse=True)
        chosen = [row for index, row in enumerate(rows) if index < _MOST or row[2]]
        for use, one, _ in reversed(chosen):
            key = (one.namespace.id, use.source, use.destination, use.port)
            owner = node.owner_of_socket(use.cgroup_id, one.namespace.labels)
            # A socket in TIME_WAIT has no cgroup, so when all are, the owner is whose they were before.
            owners[key] = self._owners.get(key, owner) if use.cgroup_id is None else owner
            # Two nameless namespaces may hold the same tuple: the worse one, which comes last, stands for both.
            labels = (one.namespace.labels[0], *owners[key].labels, use.source, use.destination, str(use.port))
            used[labels], time_wait[labels], available[labels] = use.used, use.time_wait, one.ports.available
        self._owners = owners
        cut = sum(one.tuples for one in crowded) - len(used)
        return [
            Family(USED, list(used.items())),
            Family(USED_BY_TIME_WAIT, list(time_wait.items())),
            Family(AVAILABLE, list(available.items())),
            Family(TUPLES_CUT, [((), cut)]),
        ]


def _sockets(node: Node) -> dict[int, TcpSockets]:
    """Return {namespace id: sockets}; only a node on which no namespace can be read has lost the signal."""
    found: dict[int, TcpSockets] = {}
    refused: Unavailable | ParseError = Unavailable(Reason.NOT_IN_KERNEL, "no network namespace has a sockstat")
    for space in node.network_namespaces():
        try:
            found[space.id] = read_tcp_sockets(node.roots.proc, space.pid)
        except Vanished:
            continue
        except (Unavailable, ParseError) as error:
            refused = error
    if not found:
        raise refused
    return found


def _total(sockets: TcpSockets) -> int:
    return sockets.in_use + sockets.time_wait


def _enough(sockets: TcpSockets, ports: PortRange) -> bool:
    return _total(sockets) > ports.available * _WORTH_A_DUMP


def _own(own: LabelledNamespace, ports: PortRange) -> _Crowded:
    servers = {listener.port for listener in read_listeners()}
    worst, tuples = read_port_use(ports, servers, _MOST)
    return _Crowded(own, worst, tuples, ports)


def _look_into(node: Node, others: list[LabelledNamespace], sockets: dict[int, TcpSockets]) -> list[_Crowded]:
    """Enter the namespaces that have many sockets; one that ends meanwhile is left out, a refusal ends the signal."""
    many = [space for space in others if space.id in sockets and _total(sockets[space.id]) >= _WORTH_A_LOOK]
    crowded = []
    # One is entered in any case, so that a missing capability is known before the day on which it matters.
    for space in many or others[:1]:
        try:
            ports = open_in_namespace(node.roots.proc, space.pid, lambda: read_port_range(node.roots.proc))
            if space.id in sockets and _enough(sockets[space.id], ports):
                crowded.append(_enter(node, space, ports))
        except Vanished:
            continue
        except Unavailable as error:
            if error.reason is not Reason.NOT_IN_KERNEL:
                raise
    return crowded


def _enter(node: Node, space: LabelledNamespace, ports: PortRange) -> _Crowded:
    def inside(subsystem: Subsystem) -> socket.socket:
        return open_in_namespace(node.roots.proc, space.pid, lambda: open_socket(subsystem))

    servers = {listener.port for listener in read_listeners(opener=inside)}
    worst, tuples = read_port_use(ports, servers, _MOST, opener=inside)
    return _Crowded(space, worst, tuples, ports)
