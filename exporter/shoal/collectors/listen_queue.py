"""Collector `listen_queue`: which network namespace refuses connections, and which listener does it."""

from __future__ import annotations

import asyncio
from collections import deque
from contextlib import suppress
from typing import TYPE_CHECKING, ClassVar

from shoal.collectors import Collector, register
from shoal.families import Family, KeptSums, Metric
from shoal.inventory import NETNS_LABELS, OWNER_LABELS, LabelledNamespace, Node, Owner
from shoal.kernel.files import ParseError, Reason, Unavailable, Vanished
from shoal.kernel.namespaces import visit_namespaces
from shoal.kernel.netlink.sock_diag import read_listeners
from shoal.kernel.sysctls import read_sysctl

if TYPE_CHECKING:
    from collections.abc import Callable

    from shoal.kernel.netlink.sock_diag import Listener
    from shoal.settings import Settings

__all__ = ["ListenQueueCollector"]

_Found = tuple[tuple[str, ...], "Listener"]
"""The labels of a network namespace and a listener in it."""

_LISTENER_LABELS = ("netns", "address", "port", *OWNER_LABELS)
_MOST_LISTENERS = 64
_PEAK_SECONDS = 60

OVERFLOWS = Metric(
    "shoal_listen_queue_overflows_total",
    "counter",
    "Connections refused because an accept queue was full (ListenOverflows).",
    "/proc/<pid>/net/netstat TcpExt ListenOverflows",
    NETNS_LABELS,
)
DROPS = Metric(
    "shoal_listen_queue_drops_total",
    "counter",
    "Connection requests dropped by listeners for any reason, full queues among them (ListenDrops); of a pod once "
    "there is any.",
    "/proc/<pid>/net/netstat TcpExt ListenDrops",
    NETNS_LABELS,
)
REQUEST_DROPS = Metric(
    "shoal_listen_queue_request_drops_total",
    "counter",
    "SYNs dropped because the queue of half-open requests was full (TCPReqQFullDrop); of a pod once there is any.",
    "/proc/<pid>/net/netstat TcpExt TCPReqQFullDrop",
    NETNS_LABELS,
)
REQUEST_COOKIES = Metric(
    "shoal_listen_queue_request_cookies_total",
    "counter",
    "SYNs answered by a cookie because the queue of half-open requests was full; nothing lost (TCPReqQFullDoCookies); "
    "of a pod once there is any.",
    "/proc/<pid>/net/netstat TcpExt TCPReqQFullDoCookies",
    NETNS_LABELS,
)
QUEUE_LENGTH = Metric(
    "shoal_listener_accept_queue_length",
    "gauge",
    "Connections that wait in the listener's queue to be accepted (idiag_rqueue); of a reuseport group, its fullest.",
    "sock_diag inet_diag_msg.idiag_rqueue",
    _LISTENER_LABELS,
)
QUEUE_LIMIT = Metric(
    "shoal_listener_accept_queue_limit",
    "gauge",
    "The most that the listener's queue holds, the smaller of its backlog and somaxconn (idiag_wqueue).",
    "sock_diag inet_diag_msg.idiag_wqueue",
    _LISTENER_LABELS,
)
QUEUE_PEAK = Metric(
    "shoal_listener_accept_queue_peak",
    "gauge",
    f"The longest that the queue was in the last {_PEAK_SECONDS} s, looked at once a second in the exporter's own "
    "network namespace.",
    "sock_diag inet_diag_msg.idiag_rqueue",
    _LISTENER_LABELS,
)
LISTENER_DROPS = Metric(
    "shoal_listener_drops_total",
    "counter",
    "Connection requests that this listener dropped, its part of ListenDrops (INET_DIAG_SKMEMINFO drops).",
    "sock_diag INET_DIAG_SKMEMINFO, SK_MEMINFO_DROPS",
    _LISTENER_LABELS,
)
FOLDED = Metric(
    "shoal_listeners_folded",
    "gauge",
    f"Listeners beyond the {_MOST_LISTENERS} worst, which are summed as address other.",
    "sock_diag, counted",
)
SOMAXCONN = Metric(
    "shoal_listen_queue_somaxconn",
    "gauge",
    "The cap on every listener's backlog in the exporter's network namespace (net.core.somaxconn).",
    "/proc/sys/net/core/somaxconn",
)
MAX_SYN_BACKLOG = Metric(
    "shoal_listen_queue_max_syn_backlog",
    "gauge",
    "The cap on half-open requests in the exporter's network namespace (net.ipv4.tcp_max_syn_backlog).",
    "/proc/sys/net/ipv4/tcp_max_syn_backlog",
)
ABORT_ON_OVERFLOW = Metric(
    "shoal_listen_queue_abort_on_overflow",
    "gauge",
    "1 if a full queue answers with a reset, 0 if it stays silent (net.ipv4.tcp_abort_on_overflow).",
    "/proc/sys/net/ipv4/tcp_abort_on_overflow",
)

_COUNTERS = (
    (OVERFLOWS, "ListenOverflows"),
    (DROPS, "ListenDrops"),
    (REQUEST_DROPS, "TCPReqQFullDrop"),
    (REQUEST_COOKIES, "TCPReqQFullDoCookies"),
)
_SYSCTLS = (
    (SOMAXCONN, "net/core/somaxconn"),
    (MAX_SYN_BACKLOG, "net/ipv4/tcp_max_syn_backlog"),
    (ABORT_ON_OVERFLOW, "net/ipv4/tcp_abort_on_overflow"),
)


@register
class ListenQueueCollector(Collector):
    """Connections that arrive and are dropped before the application sees them (failure 2).

    Counters for every network namespace that has a process; queue, limit and drops of each listener in the exporter's
    own, and with --netns.enter in every other one. Listeners that share address and port (SO_REUSEPORT) are one series:
    their drops are summed and the fullest queue stands for all, since one full queue is enough to refuse.
    """

    name = "listen_queue"
    metrics: ClassVar = (
        OVERFLOWS,
        DROPS,
        REQUEST_DROPS,
        REQUEST_COOKIES,
        QUEUE_LENGTH,
        QUEUE_LIMIT,
        QUEUE_PEAK,
        LISTENER_DROPS,
        FOLDED,
        SOMAXCONN,
        MAX_SYN_BACKLOG,
        ABORT_ON_OVERFLOW,
    )
    signals: ClassVar = ("listen_queue_namespaces", "listen_queue_listeners", "listen_queue_pods")

    def __init__(self, settings: Settings) -> None:
        """Start with no sums to keep."""
        super().__init__(settings)
        self._counters: dict[Metric, KeptSums[tuple[str, ...]]] = {metric: KeptSums() for metric, _ in _COUNTERS}
        self._drops: KeptSums[tuple[str, ...]] = KeptSums()
        self._sampler = _Sampler()

    def read(self, node: Node) -> list[Family]:
        """Read the counters of the namespaces, the listeners, and the settings that bound them."""
        families: list[Family] = []
        with self.availability.reading("listen_queue_namespaces"):
            families += self._namespaces(node)
        found: list[_Found] = []
        own = (node.own_netns(), *Owner().labels)
        with self.availability.reading("listen_queue_listeners"):
            families += [_sysctl(node, metric, name) for metric, name in _SYSCTLS]
            found += [(own, listener) for listener in read_listeners()]
        with self.availability.reading("listen_queue_pods"):
            if not self.settings.enter_namespaces:
                raise Unavailable(Reason.NOT_ENABLED, "listeners of other network namespaces want --netns.enter")
            found += _enter(node)
        if not self.availability.absent["listen_queue_listeners"]:
            families += self._listeners(node, found)
        return families

    def _namespaces(self, node: Node) -> list[Family]:
        rows: dict[Metric, list[tuple[tuple[str, ...], int, float]]] = {metric: [] for metric, _ in _COUNTERS}
        refused: Exception | None = None
        for namespace in node.network_namespaces():
            try:
                counters = node.netstat(namespace)
            except Vanished:
                continue
            except (Unavailable, ParseError) as error:
                # The process may just have ended; only a node on which nothing can be read has lost the signal.
                refused = error
                continue
            for metric, counter in _COUNTERS:
                if counter in counters and (counters[counter] or _always(metric, namespace)):
                    rows[metric].append((namespace.labels, namespace.id, counters[counter]))
        if refused and not rows[OVERFLOWS]:
            raise refused
        return [_family(metric, self._counters[metric].update(rows[metric])) for metric, _ in _COUNTERS]

    def _listeners(self, node: Node, found: list[_Found]) -> list[Family]:
        length, limit, peak = QUEUE_LENGTH.family(), QUEUE_LIMIT.family(), QUEUE_PEAK.family()
        groups = _grouped(node, found)
        drops: list[tuple[tuple[str, ...], int, float]] = []
        netns, peaks = node.own_netns(), self._sampler.peaks()
        for labels, listeners in groups.items():
            fullest = max(listeners, key=_fill)
            length.add(labels, fullest.queue_length)
            limit.add(labels, fullest.queue_limit)
            if peaks is not None and labels[0] == netns:
                peak.add(labels, max(max(one.queue_length, peaks.get(one.cookie, 0)) for one in listeners))
            drops += [(labels, one.cookie, one.drops) for one in listeners if one.drops is not None]
        folded = FOLDED.family()
        folded.add((), sum(len(listeners) for labels, listeners in groups.items() if labels[1] == "other"))
        return [length, limit, peak, _family(LISTENER_DROPS, self._drops.update(drops)), folded]

    async def start(self) -> None:
        """Begin to sample the queues of the exporter's own network namespace."""
        self._sampler.start()

    async def stop(self) -> None:
        """End the sampling."""
        self._sampler.stop()


class _Sampler:
    """Looks at the queues once a second, since a burst comes and goes between two scrapes; 0.2 ms each time.

    What it saw stays for a minute, and not until the next scrape, so that two Prometheus servers both get it.
    """

    def __init__(self) -> None:
        self._seen: deque[dict[int, int]] = deque(maxlen=_PEAK_SECONDS)
        self._task: asyncio.Task[None] | None = None

    def start(self) -> None:
        self._task = asyncio.create_task(self._run())

    def stop(self) -> None:
        if self._task:
            self._task.cancel()

    def peaks(self) -> dict[int, int] | None:
        """Return {socket cookie: longest queue of the last minute}; None if nothing was sampled."""
        longest: dict[int, int] = {}
        for lengths in list(self._seen):
            for cookie, length in lengths.items():
                longest[cookie] = max(length, longest.get(cookie, 0))
        return longest if self._seen else None

    async def _run(self) -> None:
        while True:
            with suppress(Unavailable, ParseError):
                self._seen.append(await asyncio.to_thread(_queue_lengths))
            await asyncio.sleep(1)


def _queue_lengths() -> dict[int, int]:
    return {one.cookie: one.queue_length for one in read_listeners() if one.queue_length}


def _enter(node: Node) -> list[_Found]:
    """Read the listeners of every other namespace; one that ends meanwhile is left out, a refusal ends the signal."""
    own = node.own_network_namespace()
    others = [space for space in node.network_namespaces() if own is None or space.id != own.id]

    def visit(enter: Callable[[int], None]) -> list[_Found]:
        found: list[_Found] = []
        for space in others:
            try:
                enter(space.pid)
                found += [(space.labels, one) for one in read_listeners()]
            except Vanished:
                continue
            except Unavailable as error:
                if error.reason is not Reason.NOT_IN_KERNEL:
                    raise
        return found

    return visit_namespaces(node.roots.proc, visit)


def _grouped(node: Node, found: list[_Found]) -> dict[tuple[str, ...], list[Listener]]:
    """Group listeners by their labels; the ones beyond the worst are all `other`, those that dropped come first."""
    groups: dict[tuple[str, ...], list[Listener]] = {}
    for space, listener in found:
        labels = (space[0], listener.address, str(listener.port), *_owner(node, space, listener))
        groups.setdefault(labels, []).append(listener)

    def badness(labels: tuple[str, ...]) -> tuple[float, float]:
        members = groups[labels]
        return (sum(one.drops or 0 for one in members), max(map(_fill, members)))

    ranked = sorted(sorted(groups), key=badness, reverse=True)
    kept = {labels: groups[labels] for labels in ranked[:_MOST_LISTENERS]}
    for labels in ranked[_MOST_LISTENERS:]:
        kept.setdefault((labels[0], "other", "", *Owner().labels), []).extend(groups[labels])
    return kept


def _owner(node: Node, space: tuple[str, ...], listener: Listener) -> tuple[str, ...]:
    """Return whose the listener is, by the cgroup that made it and the namespace it is in."""
    return node.owner_of_socket(listener.cgroup_id, space).labels


def _fill(listener: Listener) -> float:
    """Return how full the queue is; the kernel refuses when the length is above the limit, so 0 counts as 1."""
    return listener.queue_length / max(listener.queue_limit, 1)


def _family(metric: Metric, sums: dict[tuple[str, ...], float]) -> Family:
    return Family(metric, list(sums.items()))


def _always(metric: Metric, namespace: LabelledNamespace) -> bool:
    """Tell whether a counter is exported at 0: of a pod, of which there are many, only refused connections."""
    return metric is OVERFLOWS or namespace.labels[0] != "pod"


def _sysctl(node: Node, metric: Metric, name: str) -> Family:
    family = metric.family()
    family.add((), read_sysctl(node.roots.proc, name))
    return family
