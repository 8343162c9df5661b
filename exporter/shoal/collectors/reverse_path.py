"""Collector `reverse_path`: packets that the kernel drops because their way back would be another one."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass
from itertools import islice
from typing import TYPE_CHECKING, ClassVar

from shoal.collectors import Collector, register
from shoal.families import Family, KeptSums, Metric
from shoal.inventory import NETNS_LABELS, Node
from shoal.kernel.files import ParseError, Reason, Unavailable, Vanished
from shoal.kernel.netlink.peers import read_peers
from shoal.kernel.netlink.routes import find_route, open_routes, read_addresses, read_links, read_policy_rules
from shoal.kernel.sysctls import read_sysctl

if TYPE_CHECKING:
    from shoal.kernel.netlink.core import NetlinkSocket
    from shoal.settings import Settings

__all__ = ["ReversePathCollector"]

_DEVICE = ("device",)
_MOST_DEVICES = 10
_MOST_PEERS = 4096
_MOST_LOOKUPS = 256
_OFF, _STRICT = 0, 1

DROPS = Metric(
    "shoal_reverse_path_drops_total",
    "counter",
    "Packets dropped because their source would not be reached by the device they came in by (IPReversePathFilter).",
    "/proc/<pid>/net/netstat TcpExt IPReversePathFilter",
    NETNS_LABELS,
)
MODE = Metric(
    "shoal_reverse_path_filter_mode",
    "gauge",
    "What rp_filter amounts to on a device that is up and has a global IPv4 address, the larger of all's and its own: "
    f"0 off, 1 strict, 2 and above loose. In the exporter's network namespace; {_MOST_DEVICES} devices, strict first.",
    "/proc/sys/net/ipv4/conf/{all,<device>}/rp_filter",
    _DEVICE,
)
DEVICES = Metric(
    "shoal_reverse_path_devices",
    "gauge",
    "Devices of the exporter's network namespace that are up and have a global IPv4 address, by their rp_filter mode.",
    "netlink ROUTE RTM_GETLINK and RTM_GETADDR, /proc/sys/net/ipv4/conf/*/rp_filter",
    ("mode",),
)
RULES = Metric(
    "shoal_reverse_path_policy_rules",
    "gauge",
    "IPv4 rules that choose a routing table by the packet, which may make the way back another one (ip rule).",
    "netlink ROUTE RTM_GETRULE",
)
ASYMMETRIC = Metric(
    "shoal_reverse_path_asymmetric_peers",
    "gauge",
    "Peers of TCP connections from an address of this strict device whose route back leaves by another device that has "
    "a global address. Should their packets come in by this one, they are dropped.",
    "sock_diag idiag_src and idiag_dst, netlink ROUTE RTM_GETROUTE",
    _DEVICE,
)
UNANSWERED = Metric(
    "shoal_reverse_path_unanswered_peers",
    "gauge",
    "Those of shoal_reverse_path_asymmetric_peers that do not answer: a connection to them retransmits.",
    "sock_diag idiag_timer and idiag_retrans",
    _DEVICE,
)
UNCHECKED = Metric(
    "shoal_reverse_path_unchecked_peers",
    "gauge",
    f"Peers whose route back was not looked up, beyond the first {_MOST_LOOKUPS} (of {_MOST_PEERS} remembered).",
    "sock_diag, counted",
)


@dataclass(frozen=True, slots=True)
class _Device:
    name: str
    mode: int


@dataclass(frozen=True, slots=True)
class _Host:
    """The devices that make this host multi-homed: up, not loopback, with a global IPv4 address."""

    devices: dict[int, _Device]
    """{index: device}"""
    addresses: dict[bytes, set[int]]
    """{address: indexes of those devices that have it}"""

    def strict(self) -> dict[int, str]:
        """Return {index: name} of the strict devices, by name, as many as are exported one by one."""
        found = sorted((one.name, index) for index, one in self.devices.items() if one.mode == _STRICT)
        return {index: name for name, index in found[:_MOST_DEVICES]}


@register
class ReversePathCollector(Collector):
    """Packets that tcpdump shows and no application gets, with no firewall to blame (failure 3).

    The counter is there for every network namespace that has a process. What turns it into a cause is known of the
    exporter's own: how many devices could be the way in, which of them are strict, and which peers are answered by
    another device than the strict one that holds the address they talk to. By which device a peer's packets do come in
    no kernel interface tells, so that number is of peers at risk; the ones that do not answer are counted beside it.
    """

    name = "reverse_path"
    metrics: ClassVar = (DROPS, MODE, DEVICES, RULES, ASYMMETRIC, UNANSWERED, UNCHECKED)
    signals: ClassVar = ("reverse_path_drops", "reverse_path_devices", "reverse_path_rules", "reverse_path_peers")

    def __init__(self, settings: Settings) -> None:
        """Start with no sums to keep."""
        super().__init__(settings)
        self._drops: KeptSums[tuple[str, ...]] = KeptSums()

    def read(self, node: Node) -> list[Family]:
        """Read the counters of the namespaces, then what explains them in the own one."""
        families: list[Family] = []
        with self.availability.reading("reverse_path_drops"):
            families.append(self._namespaces(node))
        host: _Host | None = None
        with self.availability.reading("reverse_path_devices"), open_routes() as netlink:
            host = _host(node, netlink)
            families += _devices(host)
        with self.availability.reading("reverse_path_rules"), open_routes() as netlink:
            families.append(Family(RULES, [((), read_policy_rules(netlink))]))
        with self.availability.reading("reverse_path_peers"):
            if host is None:
                raise Unavailable(Reason.NOT_READABLE, "without its devices there is nothing to compare a route with")
            families += _peers(host)
        return families

    def _namespaces(self, node: Node) -> Family:
        rows: list[tuple[tuple[str, ...], int, float]] = []
        refused: Exception = Unavailable(Reason.NOT_IN_KERNEL, "no namespace has a counter IPReversePathFilter")
        for namespace in node.network_namespaces():
            try:
                counters = node.netstat(namespace)
            except Vanished:
                continue
            except (Unavailable, ParseError) as error:
                # The process may just have ended; only a node on which nothing can be read has lost the signal.
                refused = error
                continue
            if "IPReversePathFilter" in counters:
                rows.append((namespace.labels, namespace.id, counters["IPReversePathFilter"]))
        if not rows:
            raise refused
        return Family(DROPS, list(self._drops.update(rows).items()))


def _host(node: Node, netlink: NetlinkSocket) -> _Host:
    links = read_links(netlink)
    everybodys = _mode(node, "all")
    devices: dict[int, _Device | None] = {}
    addresses: dict[bytes, set[int]] = {}
    for address, indexes in read_addresses(netlink).items():
        for index in indexes:
            link = links.get(index)
            if link is None or not link.up or link.loopback:
                continue
            if index not in devices:
                devices[index] = _device(node, link.name, everybodys)
            if devices[index]:
                addresses.setdefault(address, set()).add(index)
    return _Host({index: device for index, device in devices.items() if device}, addresses)


def _device(node: Node, name: str, everybodys: int) -> _Device | None:
    """Return a device with its effective mode, None if it has just gone away."""
    try:
        return _Device(name, max(everybodys, _mode(node, name)))
    except Unavailable as error:
        if error.reason is Reason.NOT_IN_KERNEL:
            return None
        raise


def _mode(node: Node, name: str) -> int:
    return read_sysctl(node.roots.proc, f"net/ipv4/conf/{name}/rp_filter")


def _devices(host: _Host) -> list[Family]:
    ranked = sorted(host.devices.values(), key=lambda one: (one.mode != _STRICT, one.name))
    counts = Counter("off" if one.mode == _OFF else "strict" if one.mode == _STRICT else "loose" for one in ranked)
    return [
        Family(MODE, [((one.name,), one.mode) for one in ranked[:_MOST_DEVICES]]),
        Family(DEVICES, [((mode,), counts[mode]) for mode in ("off", "strict", "loose")]),
    ]


def _peers(host: _Host) -> list[Family]:
    """Ask for the way back to the peers of the strict devices' addresses; with a single device it is that one."""
    strict = host.strict()
    asymmetric, unanswered = dict.fromkeys(strict, 0), dict.fromkeys(strict, 0)
    pairs = {}
    if strict and len(host.devices) > 1:
        wanted = {address for address, indexes in host.addresses.items() if not indexes.isdisjoint(strict)}
        pairs = read_peers(wanted, _MOST_PEERS)
        with open_routes() as netlink:
            # The ones that do not answer first: they may be hurt already.
            for pair in islice(sorted(pairs, key=lambda pair: (not pairs[pair], pair)), _MOST_LOOKUPS):
                route = find_route(netlink, pair.peer, pair.local)
                holders = host.addresses[pair.local]
                if route is None or route.device in holders or route.device not in host.devices:
                    continue
                for index in holders & strict.keys():
                    asymmetric[index] += 1
                    unanswered[index] += pairs[pair]
    return [
        Family(ASYMMETRIC, [((name,), asymmetric[index]) for index, name in strict.items()]),
        Family(UNANSWERED, [((name,), unanswered[index]) for index, name in strict.items()]),
        Family(UNCHECKED, [((), max(0, len(pairs) - _MOST_LOOKUPS))]),
    ]
