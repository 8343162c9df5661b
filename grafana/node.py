"""The dashboard Node: for each of the fourteen failures its use, what suffers from it, and who it is."""

from __future__ import annotations

from functools import partial
from typing import TYPE_CHECKING, Final

from grafana.failures import FAILURES, Failure, Level, levels
from grafana.parts import (
    RUNBOOK,
    SAME_NODE,
    SATURATION,
    UTILISATION,
    WHO,
    Column,
    Line,
    chart,
    dashboard,
    link,
    own,
    query_variable,
    row,
    rows,
    top,
    workload_link,
)
from grafana.status import firing_states, status_overrides

if TYPE_CHECKING:
    from collections.abc import Callable

    from grafana_foundation_sdk.builders import dashboard as dashboards
    from grafana_foundation_sdk.builders import table, timeseries

__all__ = ["evidence_panel", "node"]

HERE: Final = 'cluster=~"$cluster",node="$node"'
NAME: Final = "{{unit}}{{namespace}} {{pod}} {{container}}"
_WORKLOAD: Final = [workload_link(SAME_NODE)]
_LINE: Final = [workload_link(SAME_NODE, source="__field.labels")]
_NETNS: Final = ("netns", *WHO)

Panels = list["timeseries.Panel | table.Panel"]


def evidence_panel(failure: Failure) -> int:
    """Return the id of the panel that names the culprit of a failure, so that other dashboards can open it."""
    return 100 + failure.number


def node() -> dashboards.Dashboard:
    """Build it."""
    board = (
        dashboard(
            "shoal-node",
            "Shoal / Node",
            "One node, failure by failure, in the order in which a person rules things out. Blue is use, orange is "
            "what suffers from it, the table beside them says who. Dashed lines are where the alerts fire.",
            f'ALERTS{{alertname=~"Shoal.+",alertstate="firing",{HERE}}}',
        )
        .with_variable(query_variable("cluster", "Cluster", "label_values(node:shoal_exporters:count, cluster)"))
        .with_variable(
            query_variable(
                "node",
                "Node",
                'label_values({__name__=~"node:shoal_exporters:count|node:shoal_exporter_expected:group",'
                'cluster=~"$cluster"}, node)',
                everything=False,
            )
        )
        .with_row(row("What fires here, and what cannot be seen"))
    )
    for number, panel in enumerate(_overview(), 1):
        board = board.with_panel(panel.id(number))
    for failure in FAILURES:
        board = board.with_row(row(f"{failure.title} (failure {failure.number})"))
        first, second, *evidence = _PANELS[failure.number](_unseen(failure))
        board = board.with_panel(first.id(200 + failure.number)).with_panel(second.id(300 + failure.number))
        for place, panel in enumerate(evidence):
            board = board.with_panel(panel.id(evidence_panel(failure) + 300 * place))
    return board


def _unseen(failure: Failure) -> str:
    """Ask which of the signals that show a failure are not available, and why."""
    signals = "|".join(failure.signals)
    return f'max by (signal, reason) (node:shoal_signal_available:max{{{HERE},signal=~"{signals}",reason!=""}}) == 0'


def _who(*columns: Column, title: str, description: str, sort: str, unseen: str, empty: str = "") -> table.Panel:
    """Make the table of the workloads behind a failure, each of which leads to its own dashboard."""
    return rows(
        title,
        description,
        columns,
        sort=sort,
        unseen=unseen,
        links=dict.fromkeys(WHO, _WORKLOAD),
        empty=empty or "No workload has such a signal on this node.",
    )


def _of(series: str, by: tuple[str, ...] = WHO, more: str = "") -> str:
    """Take a recorded series for a table's column, by the labels that make its rows."""
    return f"max by ({', '.join(by)}) ({series}{{{HERE}{more}}})"


def _line(series: str, legend: str = NAME, *, least: bool = False, more: str = "") -> Line:
    """Take the five worst of a recorded series."""
    return Line(top(f"{series}{{{HERE}{more}}}", least=least), legend)


def _overview() -> Panels:
    return [
        rows(
            "What fires here",
            "Every alert of this node, worst first. A click on its name opens the runbook, one on a pod, container or"
            " unit that workload. Normal: nothing.",
            [
                Column("state", firing_states(WHO, HERE)),
            ],
            sort="state",
            hide=("severity",),
            links={"alertname": [link("Runbook", RUNBOOK)], **dict.fromkeys(WHO, _WORKLOAD)},
            span=12,
            height=8,
            empty="Nothing fires on this node.",
        ).override_by_name("state", status_overrides()),
        rows(
            "Signals that are not available here, and why",
            "What this kernel, container or privilege does not give. The panels of these signals are empty and their "
            "alerts are silent, whatever happens. Normal: what needs a higher tier or is switched off; the reasons "
            "are in docs/metrics.md.",
            [
                Column(
                    "available",
                    f'max by (signal, reason) (node:shoal_signal_available:max{{{HERE},reason!=""}}) == 0',
                )
            ],
            hide=("available",),
            span=7,
            height=8,
            empty="Every signal is available.",
        ),
        rows(
            "The exporter's collectors",
            "Share of the last ten minutes in which each collector succeeded, and how long it took last. Normal: 100 "
            "% and far below Prometheus' scrape timeout. A collector that fails takes its own panels and alerts with "
            "it.",
            [
                Column(
                    "succeeded",
                    f"min by (collector) (node:shoal_scrape_collector_success:avg10m{{{HERE}}})",
                    "percentunit",
                    levels("node:shoal_scrape_collector_success:avg10m", "ShoalCollectorFailing"),
                ),
                Column(
                    "took",
                    f"max by (collector) (shoal_scrape_collector_duration_seconds{{{HERE}}})",
                    "s",
                ),
            ],
            span=5,
            height=8,
            empty="No exporter answers on this node.",
        ),
    ]


def _run_queue(unseen: str) -> Panels:
    share = "workload:shoal_run_queue_delay_per_runnable_time:ratio"
    return [
        chart(
            "CPU in use",
            "CPUs that the five busiest workloads use, and all workloads together. Normal: anything; a CPU in use is "
            "no failure. Look who has it while others wait.",
            [
                _line("workload:shoal_cpu_usage_seconds:rate5m"),
                Line(f"node:shoal_cpu_usage_seconds:rate5m{{{HERE}}}", "all workloads"),
            ],
            unit="short",
            colour=UTILISATION,
            links=_LINE,
        ),
        chart(
            "Waiting for a CPU, of runnable time",
            "Share of its runnable time in which others had the CPU, of workloads that no quota of their own stops. "
            "Normal: below 20 %. At 80 % what takes 1 ms of CPU takes 5 ms.",
            [_line(share)],
            unit="percentunit",
            colour=SATURATION,
            levels=levels(share, "ShoalRunQueueDelay", "ShoalCPUStarvation"),
            links=_LINE,
        ),
        _who(
            Column(
                "waits",
                _of("workload:shoal_run_queue_delay_seconds:rate5m"),
                levels=levels("workload:shoal_run_queue_delay_seconds:rate5m", "ShoalRunQueueDelay"),
                decimals=2,
            ),
            Column(
                "of its time",
                _of(share),
                "percentunit",
                levels(share, "ShoalRunQueueDelay", "ShoalCPUStarvation"),
            ),
            Column(
                "stopped by its quota",
                _of("workload:shoal_cpu_throttled_periods_per_period:ratio"),
                "percentunit",
                levels("workload:shoal_cpu_throttled_periods_per_period:ratio", "ShoalCPUThrottling"),
            ),
            Column("of the node's CPU", _of("workload:shoal_cpu_usage_per_node_usage:ratio"), "percentunit"),
            title="Who waits, and whose doing it is",
            description="Threads that wait for a CPU, on average, and the part of the time in which it could have run. "
            "Stopped by its own quota: its owner's limit is too small. Not stopped, and a small part of the node's "
            "CPU: a neighbour holds it, the one with the largest part. Normal: waits below 0.2.",
            sort="waits",
            unseen=unseen,
        ),
    ]


def _memory_high(unseen: str) -> Panels:
    return [
        chart(
            "Memory in use, of the limit",
            "memory.current over memory.high, or over the tightest memory.max where that is lower; page cache counts."
            " Normal: up to 100 % of a memory.max, since cache fills what is free, and below memory.high.",
            [_line("workload:shoal_memory_current_per_ceiling:ratio")],
            unit="percentunit",
            colour=UTILISATION,
            links=_LINE,
        ),
        chart(
            "Time in which it waited for memory",
            "Share of time in which at least one task of the workload waited for memory (PSI some). Normal: near 0. "
            "memory.high makes whoever allocates sleep, without a kill or a line in a log.",
            [_line("workload:shoal_memory_pressure_some_seconds:rate5m")],
            unit="percentunit",
            colour=SATURATION,
            levels=levels(
                "workload:shoal_memory_pressure_some_seconds:rate5m",
                "ShoalMemoryHighStalling",
                "ShoalMemoryHighThrottling",
            ),
            links=_LINE,
        ),
        _who(
            Column(
                "any task waited",
                _of("workload:shoal_memory_pressure_some_seconds:rate5m")
                + "\nand\n"
                + _of("workload:shoal_memory_high_events:increase5m"),
                "percentunit",
                levels=levels(
                    "workload:shoal_memory_pressure_some_seconds:rate5m",
                    "ShoalMemoryHighStalling",
                    "ShoalMemoryHighThrottling",
                ),
            ),
            Column("throttled, 5 min", _of("workload:shoal_memory_high_events:increase5m"), decimals=0),
            Column(
                "all tasks waited",
                _of("workload:shoal_memory_pressure_full_seconds:rate5m")
                + "\nand\n"
                + _of("workload:shoal_memory_high_events:increase5m"),
                "percentunit",
            ),
            Column("memory.high", own("shoal_memory_high_bytes", HERE), "bytes"),
            title="Who is throttled at memory.high",
            description="How long the workload waited for memory, how often the kernel throttled it at memory.high, and"
            " the setting. Events without waiting are harmless: a workload that only fills page cache. Normal: none.",
            sort="any task waited",
            unseen=unseen,
        ),
    ]


def _oom(unseen: str) -> Panels:
    kills = "workload:shoal_memory_oom_kills:increase15m"
    full = "workload:shoal_memory_unreclaimable_per_ceiling:ratio"
    bites = own("shoal_memory_effective_limit_bytes", HERE)
    # A kill is counted for a pod, limits are a container's: each container of the pod gets it, or the pod has a row.
    of_pod, of_others = _of(kills, ("namespace", "pod"), ',pod!=""'), _of(kills, more=',pod=""')
    killed = (
        f"({bites}) * 0 + on (namespace, pod) group_left () {of_pod}\n"
        f"or\n{of_pod} unless on (namespace, pod) ({bites})\n"
        f"or\n{of_others}"
    )
    return [
        chart(
            "Memory that cannot be reclaimed, of the limit",
            "anon, shmem, socket buffers, dirty pages and kernel memory over the effective limit: the tightest of the"
            " workload's own and its ancestors'. Page cache is not in it. Normal: below 85 %, or level.",
            [_line("workload:shoal_memory_unreclaimable_per_ceiling:ratio")],
            unit="percentunit",
            colour=UTILISATION,
            levels=levels("workload:shoal_memory_unreclaimable_per_ceiling:ratio", "ShoalMemoryUnreclaimableNearLimit"),
            links=_LINE,
        ),
        chart(
            "Processes killed, 15 min",
            "By workload, and of the whole node, which counts those too whose container is gone. Normal: 0.",
            [
                _line("workload:shoal_memory_oom_kills:increase15m"),
                Line(f"node:shoal_node_memory_oom_kills:increase15m{{{HERE}}}", "the whole node"),
            ],
            unit="short",
            colour=SATURATION,
            levels=levels("workload:shoal_memory_oom_kills:increase15m", "ShoalOOMKill"),
            links=_LINE,
        ),
        _who(
            Column(
                "not reclaimable",
                f"sort_desc({_of(full)})",
                "percentunit",
                levels(full, "ShoalMemoryUnreclaimableNearLimit"),
            ),
            Column(
                "limit, of its own",
                _of("workload:shoal_memory_effective_limit_per_max:ratio"),
                "percentunit",
                levels("workload:shoal_memory_effective_limit_per_max:ratio", "ShoalMemoryAncestorLimit"),
            ),
            Column("limit that bites", bites, "bytes"),
            Column("killed, 15 min", killed, levels=levels(kills, "ShoalOOMKill"), decimals=0),
            title="Who was killed, and who is close to which limit",
            description="Processes killed in the pod or unit. Below 100 % of its own, an ancestor's limit bites first: "
            "the pod's or the slice's. The open question of a kill at half the limit is answered here. Normal: nobody, "
            "and 100 %.",
            sort="killed, 15 min",
            unseen=unseen,
        ),
    ]


def _code_eviction(unseen: str) -> Panels:
    return [
        chart(
            "Memory in use, of the limit",
            "Page cache counts. Normal: up to 100 %; full alone is no failure, full with major faults is.",
            [_line("workload:shoal_memory_current_per_ceiling:ratio")],
            unit="percentunit",
            colour=UTILISATION,
            levels=levels("workload:shoal_memory_current_per_ceiling:ratio", "ShoalCodeEviction"),
            links=_LINE,
        ),
        chart(
            "Page faults that waited for the disk",
            "Major faults a second: the program's own code and mapped files read again. Normal: none but at a start.",
            [_line("workload:shoal_memory_major_faults:rate5m")],
            unit="ops",
            colour=SATURATION,
            levels=levels("workload:shoal_memory_major_faults:rate5m", "ShoalCodeEviction"),
            links=_LINE,
        ),
        _who(
            Column(
                "refaults/s",
                _of("workload:shoal_memory_refault_file_pages:rate5m"),
                levels=levels("workload:shoal_memory_refault_file_pages:rate5m", "ShoalCodeEviction"),
                decimals=0,
            ),
            Column(
                "major faults/s",
                _of("workload:shoal_memory_major_faults:rate5m"),
                levels=levels("workload:shoal_memory_major_faults:rate5m", "ShoalCodeEviction"),
                decimals=0,
            ),
            Column(
                "waited",
                _of("workload:shoal_memory_pressure_some_seconds:rate5m")
                + "\nand\n"
                + _of("workload:shoal_memory_refault_file_pages:rate5m"),
                "percentunit",
            ),
            title="Who reads its own pages again",
            description="Pages evicted and read again soon after. Refaults alone are a scan of a large file, major "
            "faults alone a cold start; both at the limit are this failure. Normal: neither.",
            sort="major faults/s",
            unseen=unseen,
        ),
    ]


def _waiting(unseen: str) -> Panels:
    return [
        chart(
            "Time in which nothing on the node could run",
            "Share of time in which everything that wanted to run waited for I/O or memory (PSI full). Normal: below "
            "10 %; a lone backup raises I/O and hurts nobody.",
            [Line(f'node:shoal_node_pressure_full_seconds:rate5m{{{HERE},resource=~"io|memory"}}', "{{resource}}")],
            unit="percentunit",
            colour=UTILISATION,
            levels=levels(
                "node:shoal_node_pressure_full_seconds:rate5m", "ShoalNodeMemoryPressure", "ShoalNodeIoPressure"
            ),
        ),
        chart(
            "Threads that wait for I/O",
            "On average, by workload. Normal: below 0.2, or whatever a batch job likes; look at the table how long "
            "one wait takes.",
            [_line("workload:shoal_block_io_delay_seconds:rate5m")],
            unit="short",
            colour=SATURATION,
            levels=levels("workload:shoal_block_io_delay_seconds:rate5m", "ShoalBlockIoDelay", "ShoalBlockIoStall"),
            links=_LINE,
        ),
        _who(
            Column(
                "one wait takes",
                _of("workload:shoal_block_io_delay_seconds_per_wait:ratio"),
                "s",
                levels(
                    "workload:shoal_block_io_delay_seconds_per_wait:ratio", "ShoalBlockIoDelay", "ShoalBlockIoStall"
                ),
            ),
            Column("wait for I/O", _of("workload:shoal_block_io_delay_seconds:rate5m"), decimals=2),
            Column(
                "wait for memory",
                _of("workload:shoal_memory_delay_seconds:rate5m"),
                levels=levels("workload:shoal_memory_delay_seconds:rate5m", "ShoalMemoryStall"),
                decimals=2,
            ),
            title="Who waits, for what, and how long once",
            description="Threads that wait, on average, and the length of one wait for I/O. Normal: a wait of under "
            "10 ms on a spinning disk and under 1 ms on flash. Locks, timers and peers are in no kernel "
            "counter and so not here.",
            sort="wait for I/O",
            unseen=unseen,
        ),
    ]


def _inodes(unseen: str) -> Panels:
    free = "filesystem:shoal_filesystem_inodes_free_per_inodes:ratio"
    layer = "layer:shoal_writable_layer_inodes_per_inodes_used:ratio"
    low = levels(free, "ShoalInodesRunningOut")[0]
    return [
        chart(
            "Inodes that are free",
            "The five file systems with the smallest part free. Normal: above 20 %. Those that make inodes of free "
            "space (XFS, btrfs) are not here.",
            [_line(free, "{{mountpoint}}", least=True)],
            unit="percentunit",
            colour=UTILISATION,
            levels=levels(free, "ShoalInodesRunningOut", "ShoalInodesExhausted"),
        ),
        chart(
            "Inodes left in a day at this pace",
            "The last six hours carried on for a day; 0 is where no file can be made any more, with space free. "
            "Normal: above 0.",
            [
                Line(
                    f"clamp(predict_linear({free}{{{HERE}}}[6h], 24 * 3600), 0, 1) "
                    f"and bottomk(5, min_over_time({free}{{{HERE}}}[$__range] @ end()))",
                    "{{mountpoint}}",
                )
            ],
            unit="percentunit",
            colour=SATURATION,
        ),
        _who(
            Column(
                "of the inodes",
                f"{_of(layer, (*WHO, 'mountpoint'))}\nor\n1 - ({_of(free, ('mountpoint',))} < {low.value:g})",
                "percentunit",
                levels(layer, "ShoalInodesHeldByLayer"),
            ),
            Column("files", own("shoal_writable_layer_inodes", HERE, (*WHO, "mountpoint")), decimals=0),
            title="Which file system, and whose files",
            description=f"A file system with less than {low.value:.0%} of its inodes left: the part in use. A "
            "container's writable layer: its part of what is in use there; they are counted now and then, so a new one "
            "comes later. Volumes are not in it. Normal: no file system, and a few thousand files each.",
            sort="of the inodes",
            unseen=unseen,
            empty="No file system is short of inodes, and no writable layer has been counted on this node.",
        ),
    ]


def _redis(unseen: str) -> Panels:
    name = "{{server}} {{namespace}} {{pod}}"
    by = ("server", *WHO)
    logged = "server:shoal_redis_latency_event_last_seconds:changes5m"
    # Both are there only if one takes over 50 ms: flushes of a disk, or of a mapped device, which shows none, writes.
    flushes, writes = "server:shoal_disk_flush_seconds:rate5m", "server:shoal_redis_disk_write_seconds:rate5m"
    return [
        chart(
            "Time its disk spends on slow flushes",
            "Share of time that the slowest disk below the server's data spends on flushes of more than 50 ms each. "
            "Normal: nothing to show.",
            [_line(flushes, name)],
            unit="percentunit",
            colour=UTILISATION,
            links=_LINE,
            empty="No disk of a watched server is slow, or none is watched (--redis.target, --redis.discover).",
        ),
        chart(
            "PINGs that took longer than 50 ms",
            "Share of the five PINGs a second: above 1 % the server's own p99 is over 50 ms. Normal: 0. A slow "
            "command does this too; then the evidence beside it stays empty.",
            [_line("server:shoal_redis_ping_slow_per_ping:ratio5m", name)],
            unit="percentunit",
            colour=SATURATION,
            levels=levels("server:shoal_redis_ping_slow_per_ping:ratio5m", "ShoalRedisAofStall"),
            links=_LINE,
            empty="No server is watched (--redis.target, --redis.discover).",
        ),
        _who(
            Column("slow PINGs", _of("server:shoal_redis_ping_slow_per_ping:ratio5m", by), "percentunit"),
            Column(
                "AOF stalls",
                _of(logged, by),
                levels=levels(logged, "ShoalRedisAofStall"),
                decimals=0,
            ),
            Column(
                "late flushes",
                _of("server:shoal_redis_aof_delayed_fsync:increase5m", by),
                levels=levels("server:shoal_redis_aof_delayed_fsync:increase5m", "ShoalRedisAofDelayedFsync"),
                decimals=0,
            ),
            Column("slow disk", f"{_of(flushes, by)} or {_of(writes, by)}", "percentunit", _some("warning")),
            Column(
                "last fork",
                _of("server:shoal_redis_latest_fork_seconds:last", by),
                "s",
                levels("server:shoal_redis_latest_fork_seconds:last", "ShoalRedisSlowFork"),
            ),
            Column("waited for I/O", _of("server:shoal_pressure_some_seconds:rate5m", by), "percentunit"),
            Column(
                "rewrite memory",
                _of("server:shoal_redis_rewrite_memory_per_effective_limit:ratio", by),
                "percentunit",
                levels("server:shoal_redis_rewrite_memory_per_effective_limit:ratio", "ShoalRedisRewriteMemoryRisk"),
            ),
            title="Which server, and what holds it up",
            description="Of the last five minutes: stalls that it logged and put down to its append-only file, writes "
            "held up by a flush of over 2 s, and the time that its disk spent on flushes or writes of over 50 ms "
            "each. The last fork, in which nobody is answered, the time that its workload waited for I/O, and what a "
            "rewrite needs of its memory limit. Normal: 0, 0, nothing, under 200 ms, under 2 %, under 95 %.",
            sort="slow PINGs",
            unseen=unseen,
            empty="No server is watched (--redis.target, --redis.discover).",
        ),
    ]


def _listen_queue(unseen: str) -> Panels:
    by = ("address", "port", *WHO)
    fill = "listener:shoal_listener_accept_queue_length_per_limit:ratio"
    # Of short queues too, which the recorded series leaves out. What a listener drops is no proof: it also drops what
    # it has no route back to.
    most = own(
        "max_over_time(shoal_listener_accept_queue_length{}[5m]) / shoal_listener_accept_queue_limit{}", HERE, by
    )
    return [
        chart(
            "Accept queues in use",
            "Connections that wait to be accepted, of the most that the queue holds; queues of 16 and more. Normal: "
            "near 0; the application accepts as fast as connections come.",
            [_line(fill, "{{address}}:{{port}} {{unit}}{{namespace}} {{pod}}")],
            unit="percentunit",
            colour=UTILISATION,
            levels=levels(fill, "ShoalListenQueueNearlyFull"),
            links=_LINE,
        ),
        chart(
            "Connections refused by a full queue, 5 min",
            "ListenOverflows of each network namespace. The client saw its connection accepted or timing out, the "
            "application saw nothing. Normal: 0.",
            [
                _line(
                    "netns:shoal_listen_queue_overflows:increase5m",
                    "{{netns}} {{unit}}{{namespace}} {{pod}} {{container}}",
                ),
                Line(
                    top(f"netns:shoal_listen_queue_request_drops:increase5m{{{HERE}}}"),
                    "SYNs lost: {{netns}} {{namespace}} {{pod}} {{container}}",
                ),
            ],
            unit="short",
            colour=SATURATION,
            levels=levels("netns:shoal_listen_queue_overflows:increase5m", "ShoalListenQueueOverflow"),
            links=_LINE,
        ),
        _who(
            Column("most in use, 5 min", most, "percentunit", levels(fill, "ShoalListenQueueNearlyFull")),
            Column(
                "dropped, 5 min",
                _of("listener:shoal_listener_drops:increase5m", by),
                levels=_some("warning"),
                decimals=0,
            ),
            Column("limit", own("shoal_listener_accept_queue_limit", HERE, by), decimals=0),
            title="Which listener drops",
            description="Listeners with their queue's use, their own drops and the queue's limit: the smaller of the "
            "application's backlog and somaxconn. A limit of 128 is a default that nobody chose. Drops of a queue that "
            "is not full have another reason, such as no route back. Normal: no drops.",
            sort="most in use, 5 min",
            unseen=unseen,
            empty="No listener is known: those inside pods need --netns.enter.",
        ),
    ]


def _some(severity: str) -> tuple[Level, ...]:
    """Colour whatever is above 0: drops of a listener are part of an alert on more than one series."""
    return (Level(severity, 1e-9),)


def _conntrack(unseen: str) -> Panels:
    fill = "netns:shoal_conntrack_entries_per_limit:ratio"
    owner, target = (
        "owner:shoal_conntrack_owner_entries_per_limit:ratio",
        "destination:shoal_conntrack_destination_entries_per_limit:ratio",
    )
    return [
        chart(
            "Connection tracking tables in use",
            "Entries of each network namespace's table, of the node's one limit. Normal: below 75 %, or level.",
            [_line(fill, "{{netns}} {{unit}}{{namespace}} {{pod}} {{container}}")],
            unit="percentunit",
            colour=UTILISATION,
            levels=levels(fill, "ShoalConntrackNearlyFull"),
            links=_LINE,
        ),
        chart(
            "Packets and connections lost, 5 min",
            "Dropped: new connections that found the table full. Early: unanswered ones thrown out to make room. "
            "Insertion races: two packets wanted one entry and one was lost, with room in the table. Normal: 0.",
            [
                Line(f"netns:shoal_conntrack_drop:increase5m{{{HERE}}}", "dropped: {{netns}}"),
                Line(f"netns:shoal_conntrack_early_drop:increase5m{{{HERE}}}", "early: {{netns}}"),
                Line(f"netns:shoal_conntrack_insert_failed:increase5m{{{HERE}}}", "insertion races: {{netns}}"),
            ],
            unit="short",
            colour=SATURATION,
            levels=levels("netns:shoal_conntrack_drop:increase5m", "ShoalConntrackDrops"),
        ),
        _who(
            Column(
                "of the limit",
                f"{_of(owner, ('direction', *_NETNS))}\nor\n"
                f'label_replace({_of(fill, _NETNS)}, "direction", "own table", "", "")',
                "percentunit",
                levels(owner, "ShoalConntrackTopOwner"),
            ),
            title="Whose table is full, and who fills the host's",
            description="Own table: that of a network namespace. Entries of the host's by the workload that opened "
            "them (from) or answers them (to). All of the one limit, which each table has for itself. Normal: nobody "
            "has much more than its part.",
            sort="of the limit",
            unseen=unseen,
            empty="Nothing is tracked, or it cannot be read.",
        ),
        rows(
            "Where they lead to",
            "Entries of the host's table by where the connection was first sent: a service's own address, not its "
            "backend's. Normal: nothing stands out.",
            [
                Column(
                    "of the limit",
                    _of(target, ("protocol", "destination", "destination_port")),
                    "percentunit",
                    levels(target, "ShoalConntrackTopDestination"),
                )
            ],
            sort="of the limit",
            span=24,
            height=6,
            empty="Nothing is tracked in the host's table, or there is no dump of it (CAP_NET_ADMIN).",
        ),
    ]


def _dead_backend(unseen: str) -> Panels:
    stale = "backend:shoal_conntrack_stale_entries:max"
    by = ("protocol", "destination", "destination_port", "backend", "reason")
    return [
        chart(
            "Connections of the busiest destinations",
            "Of the limit of the table, what the node sends where, for comparison: a destination that has many and "
            "gets no answers is a service that is down. Normal: anything.",
            [
                _line(
                    "destination:shoal_conntrack_destination_entries_per_limit:ratio",
                    "{{destination}}:{{destination_port}} {{protocol}}",
                )
            ],
            unit="percentunit",
            colour=UTILISATION,
        ),
        chart(
            "Connections to backends without a rule",
            "Renewed without an answer since the last look, by destination. Normal: none, or for a minute after a pod"
            " has gone.",
            [
                Line(
                    f'sum without (backend, reason) ({stale}{{{HERE},reason="backend_gone"}})',
                    "{{destination}}:{{destination_port}} {{protocol}}",
                )
            ],
            unit="short",
            colour=SATURATION,
            levels=levels(stale, "ShoalConntrackBackendBlackhole"),
        ),
        rows(
            "Which backend",
            "The backend to which connections still go. backend_gone: no NAT rule leads there. unreplied: the rules "
            "are not known in full. backend_silent: a rule leads there and it does not answer. Normal: none.",
            [Column("connections", _of(stale, by), levels=levels(stale, "ShoalConntrackBackendBlackhole"), decimals=0)],
            sort="connections",
            unseen=unseen,
            empty="No connection is sent to a backend in vain, or there is no dump of the table (CAP_NET_ADMIN).",
        ),
    ]


def _ports(unseen: str, *, time_wait: bool) -> Panels:
    used, waiting = (
        "tuple:shoal_ephemeral_ports_used_per_available:ratio",
        "tuple:shoal_ephemeral_ports_time_wait_per_used:ratio",
    )
    by = ("source", "destination", "destination_port", *_NETNS)
    # What tells failure 14 from 13 is the same share as in their alerts. Without the share, 13 speaks for both.
    share = levels(waiting, "ShoalTimeWaitPortsExhausted")[0].value
    which = f"{used}{{{HERE}}} {'and' if time_wait else 'unless'} {waiting}{{{HERE}}} > {share:g}"
    name = "{{source}} to {{destination}}:{{destination_port}} {{unit}}{{namespace}} {{pod}}"
    own_alerts = (
        ("ShoalTimeWaitPortsNearlyExhausted", "ShoalTimeWaitPortsExhausted")
        if time_wait
        else ("ShoalEphemeralPortsNearlyExhausted", "ShoalEphemeralPortsExhausted")
    )
    if time_wait:
        second = chart(
            "Connections closed without TIME_WAIT, 5 min",
            "tcp_max_tw_buckets was reached, so their ports are free at once. Normal: 0. With ports running out and "
            "none of these, the limit is the port range and not the buckets.",
            [
                _line(
                    "netns:shoal_tcp_time_wait_overflows:increase5m",
                    "{{netns}} {{unit}}{{namespace}} {{pod}} {{container}}",
                )
            ],
            unit="short",
            colour=SATURATION,
            levels=levels("netns:shoal_tcp_time_wait_overflows:increase5m", "ShoalTimeWaitOverflow"),
            links=_LINE,
        )
    else:
        nat = "tuple:shoal_conntrack_nat_ports_used_per_available:ratio"
        second = chart(
            "Ports of masquerading in use",
            "The node's own port space between one translated source and one destination. Normal: below 80 %.",
            [_line(nat, "{{source}} to {{destination}}:{{destination_port}} {{protocol}}")],
            unit="percentunit",
            colour=SATURATION,
            levels=levels(nat, "ShoalMasqueradePortsNearlyExhausted", "ShoalMasqueradePortsExhausted"),
            empty="Nothing is masqueraded, or there is no dump of the table (CAP_NET_ADMIN).",
        )
    return [
        chart(
            "Ports in use, mostly TIME_WAIT" if time_wait else "Ports in use, mostly open connections",
            "Local ports held from one source address to one destination, of those that there are. At 100 % connect()"
            " fails with EADDRNOTAVAIL. Normal: below 80 %.",
            [Line(f"({which}) and topk(5, max_over_time({used}{{{HERE}}}[$__range] @ end()))", name)],
            unit="percentunit",
            colour=UTILISATION,
            levels=levels(used, *own_alerts),
            links=_LINE,
        ),
        second,
        _who(
            Column("in use", f"max by ({', '.join(by)}) ({which})", "percentunit", levels(used, *own_alerts)),
            Column(
                "of them TIME_WAIT",
                f"max by ({', '.join(by)}) ({waiting}{{{HERE}}} {'>' if time_wait else '<='} {share:g})",
                "percentunit",
            ),
            title="Who holds the ports, and towards what",
            description="The owner, its source address and the destination. A proxy's 127.0.0.6 is a source of its "
            "own. "
            + (
                "Whoever closes first keeps the port for a minute: keep connections open instead. "
                if time_wait
                else "Open connections: a leak, or a pool without a bound. "
            )
            + "Normal: far from 80 %.",
            sort="in use",
            unseen=unseen,
            empty="No namespace has enough sockets to matter; those inside pods need --netns.enter.",
        ),
    ]


def _reverse_path(unseen: str) -> Panels:
    drops = "netns:shoal_reverse_path_drops:increase5m"
    return [
        chart(
            "Devices that could be the way in",
            "Devices of the host that are up with a global address, and those of them in strict mode. Normal: one. It"
            " takes two, one of them strict, for this failure.",
            [
                Line(f"node:shoal_reverse_path_devices:sum{{{HERE}}}", "devices"),
                Line(f"node:shoal_reverse_path_strict_devices:max{{{HERE}}}", "of them strict"),
            ],
            unit="short",
            colour=UTILISATION,
        ),
        chart(
            "Packets dropped by the filter, 5 min",
            "IPReversePathFilter of each network namespace. Normal: a handful; that is the noise of the internet.",
            [_line(drops, "{{netns}} {{unit}}{{namespace}} {{pod}} {{container}}")],
            unit="short",
            colour=SATURATION,
            levels=levels(drops, "ShoalReversePathDrops"),
            links=_LINE,
        ),
        _who(
            Column(
                "dropped, 5 min",
                f"{_of(drops, _NETNS)} > 0",
                levels=levels(drops, "ShoalReversePathDrops"),
                decimals=0,
            ),
            Column("peers", _of("device:shoal_reverse_path_asymmetric_peers:max", ("device",)), decimals=0),
            Column(
                "do not answer",
                _of("device:shoal_reverse_path_unanswered_peers:max5m", ("device",)),
                levels=_some("critical"),
                decimals=0,
            ),
            Column("mode", f"max by (device) (shoal_reverse_path_filter_mode{{{HERE}}})", decimals=0),
            title="Where they are dropped, by which device, and how many peers",
            description="Network namespaces that drop, and the host's devices: peers whose route back leaves by "
            "another device than the strict one that they talk to, and those of them that do not answer. Mode 1 is "
            "strict, 2 is loose. Normal: no such peers.",
            sort="dropped, 5 min",
            unseen=unseen,
        ),
    ]


def _neighbours(unseen: str) -> Panels:
    by = ("device", "address")
    return [
        chart(
            "Neighbour table in use",
            "Entries of the table that all network namespaces share, of gc_thresh3. Normal: below 90 %; hundreds of "
            "stale entries are normal too.",
            [Line(f"table:shoal_neighbours_table_entries_per_threshold:ratio{{{HERE}}}", "{{protocol}}")],
            unit="percentunit",
            colour=UTILISATION,
            levels=levels("table:shoal_neighbours_table_entries_per_threshold:ratio", "ShoalNeighbourTableNearlyFull"),
        ),
        chart(
            "Changes of a MAC address, 15 min",
            "Of next hops and of addresses that are watched. Normal: 0; one is a clean failover.",
            [_line("neighbour:shoal_neighbour_mac_changes:increase15m", "{{address}} on {{device}}")],
            unit="short",
            colour=SATURATION,
            levels=levels("neighbour:shoal_neighbour_mac_changes:increase15m", "ShoalNeighbourMacFlapping"),
        ),
        rows(
            "Which neighbour",
            "Answers from another MAC address than the one that the kernel sends to (with --neighbours.verify: "
            "proof), minutes of the last five in which the kernel could not send, and the time since it proved that "
            "it is there. Normal: 0, 0, under 50 s.",
            [
                Column(
                    "wrong answers",
                    _of("neighbour:shoal_neighbour_verify_mismatches:increase25m", by),
                    levels=levels("neighbour:shoal_neighbour_verify_mismatches:increase25m", "ShoalNeighbourWrongMac"),
                    decimals=0,
                ),
                Column(
                    "unreachable",
                    _of("neighbour:shoal_neighbour_unresolved:sum5m", by),
                    levels=levels("neighbour:shoal_neighbour_unresolved:sum5m", "ShoalNeighbourUnreachable"),
                    decimals=0,
                ),
                Column("MACs", f"max by (device, address) (shoal_neighbour_macs{{{HERE}}})", decimals=0),
                Column("confirmed", f"max by (device, address) (shoal_neighbour_confirmation_seconds{{{HERE}}})", "s"),
            ],
            sort="wrong answers",
            unseen=unseen,
        ),
    ]


_PANELS: Final[dict[int, Callable[[str], Panels]]] = {
    10: _run_queue,
    6: _memory_high,
    5: _oom,
    8: _code_eviction,
    7: _waiting,
    4: _inodes,
    1: _redis,
    2: _listen_queue,
    9: _conntrack,
    12: _dead_backend,
    13: partial(_ports, time_wait=False),
    14: partial(_ports, time_wait=True),
    3: _reverse_path,
    11: _neighbours,
}
