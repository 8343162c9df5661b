"""A made-up fleet with what no run of the fault lab has: two clusters, units, the longest name, nodes that are gone.

Some of its nodes are sick, in the shapes that the rules' tests and the lab show: half an hour of calm, then the
failure. Their labels are those that Prometheus stores, the exporter's own pod on whatever has none.
"""

from __future__ import annotations

import math
import re
from pathlib import Path
from typing import TYPE_CHECKING, Final

from grafana.failures import FAILURES
from tests.rules.pack import HOUR, Series, load

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

__all__ = [
    "ALONE",
    "BUSY",
    "CALM",
    "CHECKOUT",
    "FAILING",
    "GONE",
    "LONG",
    "MINUTES",
    "OLD",
    "QUEUE",
    "REPORTS",
    "SECOND",
    "SICK",
    "STEP",
    "UNIT",
    "UNSEEN",
    "UNSEEN_TOO",
    "Sample",
    "fleet",
    "many",
    "node_of",
]

MINUTES: Final = 90
CALM: Final = 30
"""Minutes before the failures begin."""
UNSEEN: Final = "worker-15"
"""A node on which no exporter answers, and node_exporter does."""
UNSEEN_TOO: Final = "worker-18"
"""Another, which is known from kube-state-metrics."""
GONE: Final = "worker-19"
"""A node whose exporter stopped answering 35 minutes ago."""
FAILING: Final = "worker-16"
"""A node on which a collector fails."""
OLD: Final = "worker-17"
"""A node of the second cluster, whose kernel does not tell the memory of workloads."""
SECOND: Final = "worker-02"
"""A node that both clusters have; in the second it is well."""
ALONE: Final = "db-1"
"""A node outside Kubernetes, of no cluster, on which a unit is throttled at memory.high."""
BUSY: Final = "busy"
"""A machine that was recorded while it was busy and well."""
LONG: Final = "p" * 253
"""The longest name that a pod can have."""

STEP: Final = 60
"""Seconds between two samples."""

Sample = tuple[str, dict[str, str], list[float]]

_GI, _MI = 1 << 30, 1 << 20
_SIGNALS: Final = sorted(
    {
        signal
        for line in (Path(__file__).parents[2] / "docs" / "metrics.md").read_text(encoding="utf-8").splitlines()
        if line.startswith("Signals: ")
        for signal in re.findall(r"`(\w+)`", line)
    }
)
_COLLECTORS: Final = (
    *("conntrack", "delays", "ephemeral_ports", "inodes", "listen_queue"),
    *("memory", "neighbours", "pressure", "redis_aof", "reverse_path"),
)
# What the demonstration's story is about: a shop whose checkout is hit.
CHECKOUT: Final = {"namespace": "shop", "pod": "checkout-6d9f7c5b8-x2x7k", "container": "app"}
REPORTS: Final = {"namespace": "shop", "pod": "reports-7c4d8-9qzxw", "container": "reports"}
QUEUE: Final = {"namespace": "shop", "pod": "queue-0", "container": "redis"}
UNIT: Final = {"unit": "backup.service"}


def _recorded() -> Iterator[Sample]:
    """Yield an hour of a machine that is busy and well, with every label that the exporter really gives."""
    for content in load(HOUR)["tests"][0]["input_series"]:
        series = Series.read(content)
        if series.labels["node"] == BUSY:
            values = series.samples[:: STEP // 30]
            yield series.name, series.labels, [math.nan if value is None else value for value in values]


def many(nodes: int) -> Iterator[Sample]:
    """Yield what the rules record of so many nodes, on every tenth of which one of the failures hits five pods."""
    flat = [1.0, 1.0, 1.0]
    for number in range(nodes):
        who = {"cluster": ("east", "west")[number % 2], "node": f"node-{number:04}"}
        yield "node:shoal_exporters:count", who, flat
        for signal in _SIGNALS:
            yield "node:shoal_signal_available:max", {**who, "signal": signal}, flat
        for collector in _COLLECTORS:
            yield "node:shoal_scrape_collector_success:avg10m", {**who, "collector": collector}, flat
            yield "shoal_scrape_collector_duration_seconds", {**who, "collector": collector}, flat
        if number % 10:
            continue
        fired = {"severity": "critical", "signal": "any"}
        yield "node:shoal_alerts_firing:count", {**who, **fired}, flat
        name = FAILURES[number // 10 % len(FAILURES)].alerts[0]
        for pod in range(5):
            labels = {"alertname": name, "alertstate": "firing", "namespace": "shop", "pod": f"checkout-{pod}"}
            yield "ALERTS", {**who, **fired, **labels}, flat


def node_of(failure: int) -> str:
    """Return the node on which a failure is on."""
    return f"worker-{failure:02}"


def _level(before: float, after: float) -> Callable[[int], float]:
    """Make a gauge that rises (or falls) within five minutes and then varies a little."""

    def value(minute: int) -> float:
        share = min(max(minute - CALM, 0) / 5, 1)
        return (before + (after - before) * share) * (1 + 0.02 * math.sin(minute * 1.7) * share)

    return value


def _slope(before: float, after: float) -> Callable[[int], float]:
    """Make a gauge that goes steadily from one value to the other from the beginning of the failure to the end."""
    return lambda minute: before + (after - before) * max(minute - CALM, 0) / (MINUTES - CALM)


def _count(before: float, after: float) -> Callable[[int], float]:
    """Make a counter with so many a second before the failure and after."""

    def value(minute: int) -> float:
        late = max(minute - CALM, 0)
        return 1000 + 60 * (before * min(minute, CALM) + after * late) + 60 * after * 0.1 * math.sin(late * 0.8) ** 2

    return value


class _Node:
    """A node's series, as a scrape stores them: with the exporter's own pod, or outside Kubernetes without one."""

    def __init__(self, cluster: str, name: str, number: int) -> None:
        self.name = name
        self.samples: list[Sample] = []
        self._target = {"node": name, "job": "shoal", "instance": f"10.0.{len(cluster)}.{number}:7462"}
        if cluster:
            pod = {"namespace": "monitoring", "pod": f"shoal-{number:05}", "container": "exporter"}
            self._target |= {"cluster": cluster, **pod}

    def put(self, name: str, shape: Callable[[int], float], **labels: str) -> None:
        """Add a series. A workload's own names win over the exporter's, as with honor_labels."""
        values = [shape(minute) for minute in range(MINUTES + 1)]
        self.samples.append((name, {**self._target, **labels}, values))


def fleet() -> Iterator[Sample]:
    """Yield the series of all nodes."""
    for number, fault in sorted(_FAULTS.items()):
        node = _Node("east", node_of(number), number)
        _well(node)
        fault(node)
        yield from node.samples
    # Story of the pictures: a checkout that its own CPU quota stops does not accept, so its queue overflows.
    story = _Node("east", node_of(2), 2)
    _throttled(story, CHECKOUT)
    _checkout_otherwise_well(story)
    yield from story.samples
    for cluster, name, number in (("east", FAILING, 16), ("west", SECOND, 1), ("west", OLD, 2)):
        node = _Node(cluster, name, number)
        _well(node)
        yield from node.samples
    gone = _Node("east", GONE, 19)
    _well(gone)
    for name, labels, values in gone.samples:
        yield name, labels, [*values[:-35], *[math.nan] * 35]
    yield "node_uname_info", {"cluster": "east", "node": GONE, "nodename": GONE}, [1.0] * (MINUTES + 1)
    yield from _recorded()
    alone = _Node("", ALONE, 1)
    _well(alone)
    _memory_high(alone, UNIT)
    yield from alone.samples
    yield "node_uname_info", {"cluster": "east", "node": UNSEEN, "nodename": UNSEEN}, [1.0] * (MINUTES + 1)
    yield from _kube_state_metrics()


def _kube_state_metrics() -> Iterator[Sample]:
    """Yield what it says of nodes and pods, scraped with honor_labels: its series carry the labels that ours carry."""
    own = {"cluster": "east", "job": "kube-state-metrics", "instance": "10.1.9.9:8080"}
    always = [1.0] * (MINUTES + 1)
    for node in (node_of(2), UNSEEN_TOO):
        of_node = {**own, "node": node}
        monitor = {"namespace": "monitoring", "pod": "kube-state-metrics-0", "container": "kube-state-metrics"}
        yield "kube_node_info", {**of_node, **monitor, "os_image": "Debian GNU/Linux 12"}, always
        yield "kube_node_status_condition", {**of_node, **monitor, "condition": "Ready", "status": "true"}, always
    of_pod = {**own, **CHECKOUT, "node": node_of(2)}
    yield "kube_pod_info", {**of_pod, "uid": "0f8d3c1e"}, always
    yield "kube_pod_container_resource_limits", {**of_pod, "resource": "cpu", "unit": "core"}, always


def _well(node: _Node) -> None:
    """Add what every exporter says of itself, and of a node on which nothing is wrong."""
    node.put("shoal_build_info", _level(1, 1), version="0.1.0", python="3.11.2")
    for place, collector in enumerate(_COLLECTORS):
        works = (node.name, collector) != (FAILING, "memory")
        node.put("shoal_scrape_collector_success", lambda _, works=works: float(works), collector=collector)  # type: ignore[misc]
        node.put(
            "shoal_scrape_collector_duration_seconds",
            _level(0.002 * (place + 1), 0.002 * (place + 1)),
            collector=collector,
        )
    for signal in _SIGNALS:
        if signal == "neighbours_verify":
            node.put("shoal_signal_available", lambda _: 0.0, signal=signal, reason="not_enabled")
        elif signal == "memory_workloads" and node.name == OLD:
            node.put("shoal_signal_available", lambda _: 0.0, signal=signal, reason="cgroup_v1")
        else:
            node.put("shoal_signal_available", lambda _: 1.0, signal=signal, reason="")
    for resource, share in (("cpu", 0.03), ("memory", 0.0), ("io", 0.01)):
        node.put("shoal_node_pressure_some_seconds_total", _count(share, share), resource=resource)
        node.put("shoal_node_pressure_full_seconds_total", _count(share / 3, share / 3), resource=resource)
    node.put("shoal_conntrack_entries", _level(4200, 4200), netns="host", namespace="monitoring")
    node.put("shoal_conntrack_limit", _level(262144, 262144))
    node.put("shoal_listen_queue_overflows_total", _count(0, 0), netns="host")
    for protocol in ("ipv4", "ipv6"):
        node.put("shoal_neighbours_table_entries", _level(80, 80), protocol=protocol)
        node.put("shoal_neighbours_table_threshold", _level(1024, 1024), protocol=protocol, level="3")
    node.put("shoal_filesystem_inodes", lambda _: 6_553_600.0, device="/dev/vda1", fstype="ext4", mountpoint="/")
    node.put(
        "shoal_filesystem_inodes_free", _level(5_900_000, 5_900_000), device="/dev/vda1", fstype="ext4", mountpoint="/"
    )
    node.put("shoal_node_memory_oom_kills_total", lambda _: 3.0)
    node.put("shoal_cpu_usage_seconds_total", _count(0.2, 0.2), **UNIT)
    node.put("shoal_reverse_path_drops_total", _count(0, 0), netns="host")


def _run_queue(node: _Node) -> None:
    node.put("shoal_cpu_usage_seconds_total", _count(0.4, 0.3), **CHECKOUT)
    node.put("shoal_delay_seconds_total", _count(0.02, 2.0), **CHECKOUT, reason="run_queue")
    node.put("shoal_pressure_some_seconds_total", _count(0.02, 0.7), **CHECKOUT, resource="cpu")
    node.put("shoal_cpu_usage_seconds_total", _count(0.1, 3.1), **{**REPORTS, "pod": LONG})
    node.put("shoal_delay_seconds_total", _count(0.01, 0.4), **{**REPORTS, "pod": LONG}, reason="run_queue")
    node.put("shoal_delay_seconds_total", _count(0.01, 0.3), **UNIT, reason="run_queue")
    _throttled(node, {"namespace": "shop", "pod": "mailer-5d6b-4kk2p", "container": "mailer"})


def _throttled(node: _Node, who: dict[str, str]) -> None:
    node.put("shoal_cpu_usage_seconds_total", _count(0.3, 0.5), **who)
    node.put("shoal_cpu_periods_total", _count(8, 10), **who)
    node.put("shoal_cpu_throttled_periods_total", _count(0.1, 7.4), **who)
    node.put("shoal_cpu_throttled_seconds_total", _count(0.01, 0.9), **who)
    node.put("shoal_delay_seconds_total", _count(0.02, 1.3), **who, reason="run_queue")
    node.put("shoal_delay_seconds_total", _count(0.01, 0.02), **who, reason="block_io")
    node.put("shoal_delay_seconds_total", _count(0.0, 0.1), **who, reason="reclaim")
    node.put("shoal_pressure_some_seconds_total", _count(0.02, 0.8), **who, resource="cpu")
    node.put("shoal_pressure_some_seconds_total", _count(0.01, 0.02), **who, resource="io")
    node.put("shoal_pressure_some_seconds_total", _count(0.0, 0.06), **who, resource="memory")


def _checkout_otherwise_well(node: _Node) -> None:
    """Add what the workload of the story has besides: most of its memory in use, and some ports and connections."""
    where = {"source": "10.1.4.21", "destination": "10.0.8.30", "destination_port": "5432", "netns": "pod"}
    node.put("shoal_ephemeral_ports_used", _level(3100, 3900), **CHECKOUT, **where)
    node.put("shoal_ephemeral_ports_available", lambda _: 28_232.0, **CHECKOUT, **where)
    node.put("shoal_ephemeral_ports_time_wait", _level(200, 300), **CHECKOUT, **where)
    node.put("shoal_conntrack_owner_entries", _level(2000, 5200), netns="pod", **_pod(CHECKOUT), direction="to")
    _memory(node, CHECKOUT, high=None, limit=1024, anon=480, cache=430)
    node.put("shoal_memory_refault_file_pages_total", _count(1, 20), **CHECKOUT)
    node.put("shoal_memory_major_faults_total", _count(0, 1), **CHECKOUT)
    node.put("shoal_memory_direct_scan_pages_total", _count(0, 40), **CHECKOUT)


def _memory(node: _Node, who: dict[str, str], *, high: int | None, limit: int, anon: int, cache: int) -> None:  # noqa: PLR0913
    """Add the memory of a workload, in MiB: half of it before the failure."""
    parts = {
        "anon": anon * 0.9,
        "shmem": anon * 0.1,
        "sock": 6,
        "slab_unreclaimable": 14,
        "kernel_stack": 3,
        "pagetables": 4,
    }
    for category, size in {**parts, "file": cache + anon * 0.1, "slab_reclaimable": 20}.items():
        node.put("shoal_memory_category_bytes", _level(size * _MI / 2, size * _MI), **who, category=category)
    total = sum(parts.values())
    node.put("shoal_memory_unreclaimable_bytes", _slope(total * _MI / 2, total * _MI), **who)
    node.put("shoal_memory_current_bytes", _level((total + cache) * _MI / 2, (total + cache) * _MI), **who)
    node.put("shoal_memory_effective_limit_bytes", lambda _: float(limit * _MI), **who)
    node.put("shoal_memory_max_bytes", lambda _: float(2 * limit * _MI), **who)
    node.put("shoal_memory_events_total", _count(0, 0.5 if high else 0), **who, event="high")
    if high:
        node.put("shoal_memory_high_bytes", lambda _: float(high * _MI), **who)


def _memory_high(node: _Node, who: dict[str, str] = CHECKOUT) -> None:
    _memory(node, who, high=512, limit=1024, anon=300, cache=190)
    node.put("shoal_pressure_some_seconds_total", _count(0.01, 0.55), **who, resource="memory")
    node.put("shoal_pressure_full_seconds_total", _count(0.0, 0.35), **who, resource="memory")


def _both_at_memory_high(node: _Node) -> None:
    """Let a pod and a unit be throttled: the unit's series carry the exporter's pod."""
    _memory_high(node)
    _memory_high(node, UNIT)


def _inodes(node: _Node) -> None:
    where = {"device": "/dev/vdb", "fstype": "ext4", "mountpoint": "/var/lib/containerd"}
    node.put("shoal_filesystem_inodes", lambda _: 1_310_720.0, **where)
    node.put(
        "shoal_filesystem_inodes_free",
        lambda minute: 1_310_720 * max(0.3 - 0.006 * max(minute - CALM, 0), 0.004),
        **where,
    )
    for who, files in ((CHECKOUT, 900_000), (REPORTS, 21_000)):
        node.put("shoal_writable_layer_inodes", _level(files / 3, files), **who, mountpoint=where["mountpoint"])


def _redis(node: _Node) -> None:
    who = {**QUEUE, "server": "10.1.4.7:6379"}
    node.put("shoal_redis_up", lambda _: 1.0, **who, reason="")
    for le, slow in (("0.001", 0.1), ("0.01", 0.09), ("0.05", 0.07), ("0.3", 0.02), ("+Inf", 0.0)):
        node.put("shoal_redis_ping_duration_seconds_bucket", _count(5, 5 * (1 - slow)), **who, le=le)
    node.put("shoal_redis_ping_duration_seconds_count", _count(5, 5), **who)
    node.put("shoal_redis_aof_enabled", lambda _: 1.0, **who)
    node.put("shoal_redis_aof_delayed_fsync_total", _count(0, 0.05), **who)
    node.put("shoal_redis_latency_event_last_seconds", _level(0.1, 0.4), **who, event="aof-fsync-always")
    node.put("shoal_redis_latest_fork_seconds", _level(0.02, 0.31), **who)
    node.put("shoal_redis_forks_total", _count(0, 1 / 600), **who)
    node.put("shoal_redis_used_memory_rss_bytes", _level(700 * _MI, 720 * _MI), **who)
    node.put("shoal_redis_aof_last_cow_bytes", _level(90 * _MI, 290 * _MI), **who)
    node.put("shoal_redis_rdb_last_cow_bytes", _level(80 * _MI, 80 * _MI), **who)
    node.put("shoal_memory_effective_limit_bytes", lambda _: float(_GI), **QUEUE)
    node.put("shoal_redis_disk_info", lambda _: 1.0, **who, device="vdb")
    node.put("shoal_disk_flushes_total", _count(1, 2), device="vdb")
    node.put("shoal_disk_flush_seconds_total", _count(0.01, 0.6), device="vdb")
    node.put("shoal_pressure_some_seconds_total", _count(0.01, 0.5), **QUEUE, resource="io")


def _listen_queue(node: _Node) -> None:
    node.put("shoal_listen_queue_overflows_total", _count(0, 4.2), netns="pod", **_pod(CHECKOUT))
    node.put("shoal_listen_queue_request_drops_total", _count(0, 0.4), netns="pod", **_pod(CHECKOUT))
    for who, port, limit, fill, drops in ((CHECKOUT, "8080", 128, 126.0, 4.2), (UNIT, "22", 128, 0.0, 0.0)):
        where = {"netns": "pod" if "pod" in who else "host", "address": "0.0.0.0", "port": port}  # noqa: S104  (a label)
        node.put("shoal_listener_accept_queue_length", _level(1, fill), **who, **where)
        node.put("shoal_listener_accept_queue_limit", lambda _, limit=limit: float(limit), **who, **where)  # type: ignore[misc]
        node.put("shoal_listener_drops_total", _count(0, drops), **who, **where)


def _pod(who: dict[str, str]) -> dict[str, str]:
    """Name a workload's pod, as series of its network namespace do."""
    return {name: value for name, value in who.items() if name != "container"}


def _ports(node: _Node, time_wait: float) -> None:
    where = {"source": "10.1.4.21", "destination": "10.0.8.30", "destination_port": "5432", "netns": "pod"}
    node.put("shoal_ephemeral_ports_used", lambda minute: min(_level(900, 28_100)(minute), 28_100), **CHECKOUT, **where)
    node.put("shoal_ephemeral_ports_available", lambda _: 28_232.0, **CHECKOUT, **where)
    node.put("shoal_ephemeral_ports_time_wait", _level(100, 28_000 * time_wait), **CHECKOUT, **where)


def _sidecar_ports(node: _Node) -> None:
    _ports(node, 0.1)
    where = {"protocol": "tcp", "source": "10.0.0.13", "destination": "198.51.100.7", "destination_port": "443"}
    node.put("shoal_conntrack_nat_ports_used", _level(2000, 60_500), **where)
    node.put("shoal_conntrack_nat_ports_available", lambda _: 64_512.0)
    node.put("shoal_conntrack_insert_failed_total", _count(0, 0.5), netns="host")


def _time_wait(node: _Node) -> None:
    _ports(node, 0.95)
    node.put("shoal_tcp_time_wait_overflows_total", _count(0, 2), netns="pod", **_pod(CHECKOUT))


def _reverse_path(node: _Node) -> None:
    node.samples[:] = [one for one in node.samples if one[0] != "shoal_reverse_path_drops_total"]
    node.put("shoal_reverse_path_drops_total", _count(0, 1.4), netns="host")
    for mode, count in (("strict", 1), ("loose", 1), ("off", 0)):
        node.put("shoal_reverse_path_devices", lambda _, count=count: float(count), mode=mode)  # type: ignore[misc]
    node.put("shoal_reverse_path_filter_mode", lambda _: 1.0, device="eth1")
    node.put("shoal_reverse_path_filter_mode", lambda _: 2.0, device="eth0")
    node.put("shoal_reverse_path_asymmetric_peers", _level(0, 7), device="eth1")
    node.put("shoal_reverse_path_unanswered_peers", _level(0, 5), device="eth1")


_FAULTS: Final[dict[int, Callable[[_Node], None]]] = {
    1: _redis,
    2: _listen_queue,
    3: _reverse_path,
    4: _inodes,
    6: _both_at_memory_high,
    10: _run_queue,
    13: _sidecar_ports,
    14: _time_wait,
}
SICK: Final = tuple(_FAULTS)
"""The failures that a node of its own has."""
