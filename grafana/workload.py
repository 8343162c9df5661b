"""The dashboard Workload: one pod, container or unit, and why it is slow."""

from __future__ import annotations

from typing import TYPE_CHECKING, Final

from grafana_foundation_sdk.models import dashboard as models

from grafana.failures import levels
from grafana.parts import (
    RUNBOOK,
    SATURATION,
    UTILISATION,
    Column,
    Line,
    chart,
    dashboard,
    link,
    node_link,
    query_variable,
    row,
    rows,
)
from grafana.status import firing_states, status_overrides

if TYPE_CHECKING:
    from grafana_foundation_sdk.builders import dashboard as dashboards
    from grafana_foundation_sdk.builders import table, timeseries

__all__ = ["workload"]

_NODE: Final = 'cluster=~"$cluster",node=~"$node"'


def _chosen(label: str) -> str:
    """Select by a list's choice. Nothing chosen takes everything: a link from a unit's row has an empty pod.

    What follows the name is the name once more, or nothing: no two workloads differ by that.
    """
    return f'{label}=~"${label}(|${label}.*)"'


_POD: Final = f"{_NODE},{_chosen('namespace')},{_chosen('pod')},{_chosen('unit')}"
HERE: Final = f"{_POD},{_chosen('container')}"
# A network namespace is its pod's, of all containers alike.
NETNS: Final = f'{_POD},container=~"($container(|$container.*))?"'
_NAME: Final = "{{unit}}{{pod}} {{container}}"

Panels = list["timeseries.Panel | table.Panel"]


def workload() -> dashboards.Dashboard:
    """Build it."""
    board = dashboard(
        "shoal-workload",
        "Shoal / Workload",
        "One pod, container or unit: what it waits for, what it is short of, and what it refuses. All in a list takes"
        " everything that the others leave: a unit has no namespace or pod.",
        f'ALERTS{{alertname=~"Shoal.+",alertstate="firing",{NETNS}}}',
    )
    listed = '{__name__=~"(workload|listener|netns|tuple|server|layer|owner):shoal_.+",'
    board = board.with_variable(
        query_variable("cluster", "Cluster", "label_values(node:shoal_exporters:count, cluster)")
    ).with_variable(
        query_variable("node", "Node", 'label_values(node:shoal_exporters:count{cluster=~"$cluster"}, node)')
    )
    chosen = _NODE
    for name, label in (("namespace", "Namespace"), ("pod", "Pod"), ("container", "Container"), ("unit", "Unit")):
        board = board.with_variable(query_variable(name, label, f"label_values({listed}{chosen}}}, {name})"))
        if name != "container":
            chosen += f",{_chosen(name)}"
    number = 0
    for title, panels in (
        ("Why it is slow", _slow()),
        ("CPU", _cpu()),
        ("Memory", _memory()),
        ("Disk and Redis", _disk()),
        ("Connections", _connections()),
    ):
        board = board.with_row(row(title))
        for panel in panels:
            number += 1
            board = board.with_panel(panel.id(number))
    return board


def _rate(metric: str, by: str, more: str = "") -> str:
    return f"sum by ({by}) (rate({metric}{{{HERE}{more}}}[$__rate_interval]))"


def _slow() -> Panels:
    return [
        rows(
            "What fires for it",
            "Alerts that name this workload. A click on the name opens the runbook, on the node its dashboard. "
            "Normal: nothing.",
            [Column("state", firing_states(("node", "container", "unit"), NETNS))],
            hide=("severity",),
            sort="state",
            span=8,
            links={
                "alertname": [link("Runbook", RUNBOOK)],
                "node": [node_link("${cluster:queryparam}&var-node=${__data.fields.node:percentencode}")],
            },
            empty="Nothing fires for this workload.",
        ).override_by_name("state", status_overrides()),
        chart(
            "What its threads wait for",
            "Threads that wait, on average, by reason (delay accounting). Reasons overlap, so they are not stacked; "
            "run_queue includes being stopped by a CPU quota. Normal: well below the CPUs that it uses.",
            [Line(_rate("shoal_delay_seconds_total", "reason"), "{{reason}}")],
            unit="short",
            colour=SATURATION,
            span=8,
            empty="Delay accounting gives nothing: see the signals that are not available on the node.",
        ),
        chart(
            "Time in which at least one task waited",
            "Pressure (PSI some) by resource. Normal: below 5 %; CPU pressure also rises with its own quota.",
            [Line(_rate("shoal_pressure_some_seconds_total", "resource"), "{{resource}}")],
            unit="percentunit",
            colour=SATURATION,
            span=8,
        ),
    ]


def _cpu() -> Panels:
    wait = "workload:shoal_run_queue_delay_per_runnable_time:ratio"
    throttled = "workload:shoal_cpu_throttled_periods_per_period:ratio"
    return [
        chart(
            "CPU in use",
            "CPUs that each container uses, on average. Normal: anything.",
            [Line(f"workload:shoal_cpu_usage_seconds:rate5m{{{HERE}}}", _NAME)],
            unit="short",
            colour=UTILISATION,
            span=8,
        ),
        chart(
            "Periods in which its own quota stopped it",
            "Of the 100 ms periods in which it ran. Normal: below 5 %. High with waiting threads: raise the CPU "
            "limit, or run fewer threads.",
            [Line(f"{throttled}{{{HERE}}}", _NAME)],
            unit="percentunit",
            colour=SATURATION,
            span=8,
            levels=levels(throttled, "ShoalCPUThrottling"),
            empty="No quota, or it ran for less than 30 s of the last five minutes.",
        ),
        chart(
            "Time waited for a CPU that others had",
            "Of the time in which it wanted one, where no quota of its own stops it. Normal: below 20 %. High: a "
            "neighbour's doing.",
            [Line(f"{wait}{{{HERE}}}", _NAME)],
            unit="percentunit",
            colour=SATURATION,
            span=8,
            levels=levels(wait, "ShoalRunQueueDelay", "ShoalCPUStarvation"),
            empty="Its own quota stops it, or it hardly runs: then there is no such share.",
        ),
    ]


# Okabe and Ito's, as parts of a whole touch each other and shades would run together.
_PARTS: Final = {
    "anon": "#0072B2",
    "cache": "#56B4E9",
    "shmem": "#009E73",
    "sock": "#CC79A7",
    "slab_unreclaimable": "#F0E442",
    "slab_reclaimable": "#999999",
    "kernel_stack": "#E69F00",
    "pagetables": "#332288",
    "percpu": "#882255",
}


def _memory() -> Panels:
    waited = "workload:shoal_memory_pressure_some_seconds:rate5m"
    # Parts that do not overlap: what is file is cache, clean or dirty; shmem is told apart as it cannot be dropped.
    parts = "|".join(part for part in _PARTS if part != "cache")
    made_of = (
        chart(
            "What its memory is made of, and its limits",
            "Kernel categories stacked (cache is file without shmem), beside the lines of memory.high and of the "
            "tightest limit of its own and its ancestors. Normal: cache fills what is free; what is not cache stays "
            "away from the limit.",
            [
                Line(f'sum by (category) (shoal_memory_category_bytes{{{HERE},category=~"{parts}"}})', "{{category}}"),
                Line(
                    f'sum(shoal_memory_category_bytes{{{HERE},category="file"}}) - '
                    f'sum(shoal_memory_category_bytes{{{HERE},category="shmem"}})',
                    "cache",
                ),
                Line(f"max(shoal_memory_effective_limit_bytes{{{HERE}}})", "limit that bites"),
                Line(f"max(shoal_memory_high_bytes{{{HERE}}})", "memory.high"),
            ],
            unit="bytes",
            colour=UTILISATION,
            span=8,
            stacked=True,
            empty="Memory is told in parts once half of a limit has been used; on cgroup v1 it is not.",
        )
        .override_by_name("limit that bites", _unstacked())
        .override_by_name("memory.high", _unstacked())
    )
    for part, colour in _PARTS.items():
        fixed = {"mode": "fixed", "fixedColor": colour}
        made_of = made_of.override_by_name(part, [models.DynamicConfigValue("color", fixed)])
    return [
        made_of,
        chart(
            "Throttled, at its limit, killed",
            "memory.events a second: high is a throttling at memory.high, max a reclaim at the limit, oom_kill a "
            "kill. Normal: 0.",
            [Line(_rate("shoal_memory_events_total", "event"), "{{event}}")],
            unit="ops",
            colour=SATURATION,
            span=8,
        ),
        chart(
            "Reclaim: refaults, major faults, direct scans",
            "A second. Refaults and major faults together at the limit are its own code evicted. Direct scans are its"
            " own threads making room. Normal: near 0.",
            [
                Line(_rate("shoal_memory_refault_file_pages_total", "cluster"), "refaults"),
                Line(_rate("shoal_memory_major_faults_total", "cluster"), "major faults"),
                Line(_rate("shoal_memory_direct_scan_pages_total", "cluster"), "direct scans"),
            ],
            unit="ops",
            colour=SATURATION,
            span=8,
        ),
        chart(
            "Time in which it waited for memory",
            "Share of time in which at least one task waited. Normal: near 0.",
            [Line(f"{waited}{{{HERE}}}", _NAME)],
            unit="percentunit",
            colour=SATURATION,
            levels=levels(waited, "ShoalMemoryHighStalling", "ShoalMemoryHighThrottling"),
            span=24,
            height=6,
        ),
    ]


def _unstacked() -> list[models.DynamicConfigValue]:
    """Draw a limit as a line over the stack, not as a part of it."""
    return [
        models.DynamicConfigValue("custom.stacking", {"mode": "none", "group": "A"}),
        models.DynamicConfigValue("custom.fillOpacity", 0),
        models.DynamicConfigValue("custom.lineStyle", {"fill": "dash", "dash": [10, 10]}),
        models.DynamicConfigValue("color", {"mode": "fixed", "fixedColor": "#D55E00"}),
    ]


def _disk() -> Panels:
    wait = "workload:shoal_block_io_delay_seconds_per_wait:ratio"
    return [
        chart(
            "How long one wait for I/O takes",
            "Normal: under 10 ms on a spinning disk, under 1 ms on flash.",
            [Line(f"{wait}{{{HERE}}}", _NAME)],
            unit="s",
            colour=SATURATION,
            span=8,
            levels=levels(wait, "ShoalBlockIoDelay", "ShoalBlockIoStall"),
            empty="It hardly waits for I/O, or delay accounting gives nothing.",
        ),
        chart(
            "Redis: PINGs, the slowest of a hundred",
            "p99 of five PINGs a second, as a client on this node feels it. Normal: under 1 ms.",
            [
                Line(
                    "histogram_quantile(0.99, sum by (server, le) "
                    f"(rate(shoal_redis_ping_duration_seconds_bucket{{{HERE}}}[$__rate_interval])))",
                    "{{server}}",
                )
            ],
            unit="s",
            colour=SATURATION,
            span=8,
            empty="No Redis or Valkey of this workload is watched.",
        ),
        chart(
            "Redis: what holds it up",
            "Share of slow PINGs beside the share of time that its disk flushes slowly and that its workload waits "
            "for I/O: those that rise together belong together. What it logged itself is on Node. Normal: 0.",
            [
                Line(f"server:shoal_redis_ping_slow_per_ping:ratio5m{{{HERE}}}", "slow PINGs {{server}}"),
                Line(f"server:shoal_disk_flush_seconds:rate5m{{{HERE}}}", "slow flushes {{server}}"),
                Line(f"server:shoal_pressure_some_seconds:rate5m{{{HERE}}}", "waited for I/O {{server}}"),
            ],
            unit="percentunit",
            colour=SATURATION,
            span=8,
            levels=levels("server:shoal_redis_ping_slow_per_ping:ratio5m", "ShoalRedisAofStall"),
            empty="No Redis or Valkey of this workload is watched.",
        ),
    ]


def _connections() -> Panels:
    fill = "listener:shoal_listener_accept_queue_length_per_limit:ratio"
    drops = "netns:shoal_listen_queue_overflows:increase5m"
    used = "tuple:shoal_ephemeral_ports_used_per_available:ratio"
    waiting = "tuple:shoal_ephemeral_ports_time_wait_per_used:ratio"
    filtered = "netns:shoal_reverse_path_drops:increase5m"
    return [
        chart(
            "Its accept queues in use",
            "By listener. Normal: near 0.",
            [Line(f"{fill}{{{HERE}}}", "{{address}}:{{port}}")],
            unit="percentunit",
            colour=UTILISATION,
            span=8,
            levels=levels(fill, "ShoalListenQueueNearlyFull"),
            empty="No listener is known: those inside pods need --netns.enter.",
        ),
        chart(
            "Connections refused by a full queue, 5 min",
            "Of its network namespace. Normal: 0.",
            [Line(f"{drops}{{{NETNS}}}", "{{netns}} {{pod}}{{unit}}")],
            unit="short",
            colour=SATURATION,
            span=8,
            levels=levels(drops, "ShoalListenQueueOverflow"),
        ),
        rows(
            "Its listeners",
            "Use of the queue, connections dropped and the queue's limit. Normal: no drops.",
            [
                Column(
                    "in use",
                    f"max by (address, port) ({fill}{{{HERE}}})",
                    "percentunit",
                    levels(fill, "ShoalListenQueueNearlyFull"),
                ),
                Column(
                    "dropped, 5 min",
                    f"max by (address, port) (listener:shoal_listener_drops:increase5m{{{HERE}}})",
                    decimals=0,
                ),
                Column("limit", f"max by (address, port) (shoal_listener_accept_queue_limit{{{HERE}}})", decimals=0),
            ],
            sort="dropped, 5 min",
            span=8,
            empty="No listener is known: those inside pods need --netns.enter.",
        ),
        chart(
            "Its ports in use towards one destination",
            "Of the local ports that there are from one source to one destination; at 100 % connect() fails. Normal: "
            "below 80 %.",
            [Line(f"{used}{{{NETNS}}}", "{{source}} to {{destination}}:{{destination_port}}")],
            unit="percentunit",
            colour=UTILISATION,
            span=8,
            levels=levels(used, "ShoalEphemeralPortsNearlyExhausted", "ShoalEphemeralPortsExhausted"),
            empty="Too few sockets to matter, or they are inside a pod and need --netns.enter.",
        ),
        chart(
            "Its connections in tracking tables",
            "Of the limit: in the host's table opened by it (from) or answered by it (to), and all in its own. "
            "Normal: no more than its part.",
            [
                Line(
                    f"owner:shoal_conntrack_owner_entries_per_limit:ratio{{{NETNS}}}", "{{direction}} {{pod}}{{unit}}"
                ),
                Line(f"netns:shoal_conntrack_entries_per_limit:ratio{{{NETNS}}}", "own table {{pod}}{{unit}}"),
            ],
            unit="percentunit",
            colour=UTILISATION,
            span=8,
            levels=levels("owner:shoal_conntrack_owner_entries_per_limit:ratio", "ShoalConntrackTopOwner"),
            empty="It is not among the ten that have most, or there is no dump of the host's table (CAP_NET_ADMIN).",
        ),
        rows(
            "Its ports, by destination",
            "Where its ports go, and how many of them are in TIME_WAIT: above one half it closes first and too often,"
            " below it keeps them open. Normal: below 80 %.",
            [
                Column("in use", f"max by (source, destination, destination_port) ({used}{{{NETNS}}})", "percentunit"),
                Column(
                    "TIME_WAIT", f"max by (source, destination, destination_port) ({waiting}{{{NETNS}}})", "percentunit"
                ),
            ],
            sort="in use",
            span=8,
            empty="Too few sockets to matter, or they are inside a pod and need --netns.enter.",
        ),
        chart(
            "Packets dropped by the reverse-path filter, 5 min",
            "Of its network namespace: packets whose source is routed back by another device. Normal: a handful.",
            [Line(f"{filtered}{{{NETNS}}}", "{{netns}} {{pod}}{{unit}}")],
            unit="short",
            colour=SATURATION,
            span=24,
            height=6,
            levels=levels(filtered, "ShoalReversePathDrops"),
        ),
    ]
