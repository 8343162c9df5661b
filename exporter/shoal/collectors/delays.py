"""Collector `delays`: what each workload waited for instead of computing, and what its own CPU quota did to it."""

from __future__ import annotations

import os
import time
from contextlib import ExitStack
from functools import partial
from typing import TYPE_CHECKING, ClassVar

from shoal.collectors import Collector, register
from shoal.families import Family, Metric
from shoal.inventory import OWNER_LABELS, Node, Owner
from shoal.kernel.cgroups import open_cgroup
from shoal.kernel.cpu import read_cpu_burst, read_cpu_max, read_cpu_stat
from shoal.kernel.files import ParseError, Reason, Unavailable, Vanished, read
from shoal.kernel.netlink.taskstats import TaskStatsSocket, check_accounting
from shoal.kernel.processes import read_process
from shoal.kernel.schedstat import read_schedstat, read_task_schedstats

if TYPE_CHECKING:
    from collections.abc import Callable, Collection, Mapping

    from shoal.inventory import Inventory
    from shoal.kernel.netlink.taskstats import TaskStats
    from shoal.settings import Settings

    Waited = tuple[float, ...]
    """In the order of `_SUMS`; a source that gives fewer leaves the later ones out."""
    Source = Callable[[int], dict[int, Waited]]
    """Reads one process: {thread id, or 0 for all its threads together: what it waited}."""

__all__ = ["DelaysCollector"]

DELAY = Metric(
    "shoal_delay_seconds_total",
    "counter",
    "Time that the threads of the workload waited, summed over threads, by what they waited for (run_queue: "
    "cpu_delay_total, block_io: blkio_, swap_in: swapin_, reclaim: freepages_, thrashing: thrashing_, "
    "compaction: compact_, copy_on_write: wpcopy_, irq: irq_delay_total). Reasons overlap, and being stopped by a CPU "
    "quota counts as run_queue. What processes waited for a CPU at a nice value above 0 or under SCHED_IDLE is "
    "run_queue_nice instead, once there is any. For any other reason a workload has a series once it has waited for "
    "it for a second. What a process waited between the last scrape and its end is missing, and all but run_queue of a "
    "process older than the switching on of accounting.",
    "taskstats TASKSTATS_CMD_GET of each process; run_queue without CAP_NET_ADMIN: /proc/<pid>/task/*/schedstat",
    (*OWNER_LABELS, "reason"),
)
BLOCK_IO_WAITS = Metric(
    "shoal_block_io_waits_total",
    "counter",
    "How many waits the reason block_io of shoal_delay_seconds_total is the sum of (blkio_count).",
    "taskstats TASKSTATS_CMD_GET of each process",
    OWNER_LABELS,
)
NODE_RUN_QUEUE = Metric(
    "shoal_node_run_queue_delay_seconds_total",
    "counter",
    "Time that tasks were runnable and waited for a CPU, summed over all tasks and CPUs of the node (run_delay).",
    "/proc/schedstat cpu<N>, eighth column",
)
SKIPPED = Metric(
    "shoal_delay_processes_skipped",
    "gauge",
    "Processes that were not asked in this scrape, because the time for it was used up; they come first in the next.",
    "counted",
)
USAGE = Metric(
    "shoal_cpu_usage_seconds_total",
    "counter",
    "CPU time that the workload used, to compare its waiting with (usage_usec); of one that has used a second or more.",
    "<cgroup>/cpu.stat usage_usec",
    OWNER_LABELS,
)
PERIODS = Metric(
    "shoal_cpu_periods_total",
    "counter",
    "Enforcement periods of the workload's own CPU quota in which it had something to run (nr_periods).",
    "<cgroup>/cpu.stat nr_periods",
    OWNER_LABELS,
)
THROTTLED_PERIODS = Metric(
    "shoal_cpu_throttled_periods_total",
    "counter",
    "Those of the periods in which the workload used up its quota and was stopped (nr_throttled).",
    "<cgroup>/cpu.stat nr_throttled",
    OWNER_LABELS,
)
THROTTLED = Metric(
    "shoal_cpu_throttled_seconds_total",
    "counter",
    "Time that the workload was stopped by its own quota, summed over CPUs (throttled_usec).",
    "<cgroup>/cpu.stat throttled_usec",
    OWNER_LABELS,
)
BURST_PERIODS = Metric(
    "shoal_cpu_burst_periods_total",
    "counter",
    "Periods in which the workload ran over its quota with what it had saved (nr_bursts); where bursts are allowed.",
    "<cgroup>/cpu.stat nr_bursts",
    OWNER_LABELS,
)
BURST = Metric(
    "shoal_cpu_burst_seconds_total",
    "counter",
    "CPU time that the workload used over its quota in such periods (burst_usec); where bursts are allowed.",
    "<cgroup>/cpu.stat burst_usec",
    OWNER_LABELS,
)

_REASONS = ("run_queue", "block_io", "swap_in", "reclaim", "thrashing", "compaction", "copy_on_write", "irq")
_SUMS = (*_REASONS, "block_io_waits", "run_queue_nice")
"""What is summed over processes. Niced processes are apart, as waiting is what they asked for."""
_RUN_QUEUE, _RUN_QUEUE_NICE = _SUMS.index("run_queue"), _SUMS.index("run_queue_nice")
# Reasons that not every kernel counts, each a signal of its own, and since which version of struct taskstats.
_NEWER = {"compaction": 11, "copy_on_write": 13, "irq": 14}
# Seconds of use, or of waiting for one reason. A pause container never gets there, and for most reasons most workloads
# do not: they are spared series that way, well below where any alert begins.
_LEAST = 1.0
# Seconds for asking the processes of one scrape; 3,000 threads in 1,000 processes take a tenth of it.
_BUDGET = 0.5


@register
class DelaysCollector(Collector):
    """Latency while the CPU is idle, and the scheduler's queue (failures 7 and 10): where the time went.

    Queueing without throttling is a neighbour's doing, throttling is the workload's own quota; the kernel counts both
    as waiting in the run queue (seen from 6.1 to 6.18), and counts a wait when it ends, so that long ones come late.
    There are two sources for it: taskstats has all threads of a process, ended ones too; without CAP_NET_ADMIN the
    living threads are read one by one. The source is chosen once, as the sums of one cannot be continued with the
    other. Exit messages of taskstats are not listened to: they would make every exit on the node dearer. Waiting for
    locks, timers and peers is in no kernel counter, and so in none of these. A node without /proc/schedstat gets no
    total of its own: the sum over the workloads would pass for it and leave out what belongs to none.
    """

    name = "delays"
    metrics: ClassVar = (
        DELAY,
        BLOCK_IO_WAITS,
        NODE_RUN_QUEUE,
        SKIPPED,
        USAGE,
        PERIODS,
        THROTTLED_PERIODS,
        THROTTLED,
        BURST_PERIODS,
        BURST,
    )
    signals: ClassVar = (
        "delays_run_queue",
        "delays_waits",
        *(f"delays_{reason}" for reason in _NEWER),
        "delays_throttling",
        "delays_node",
    )

    def __init__(self, settings: Settings) -> None:
        """Start with no sums, and no source chosen."""
        super().__init__(settings)
        self._sums = _Sums()
        self._cpus: dict[str, float] = {}
        self._taskstats = False
        """Whether the sums were begun with taskstats."""
        self._refused: tuple[Reason, str] | None = None
        """Why they were not."""
        self._asked: dict[int, int] = {}
        """{process id: number of the scrape that last asked it}"""
        self._scrapes = 0

    def read(self, node: Node) -> list[Family]:
        """Read the node's run queues, each workload's quota, then every process of every workload."""
        families: list[Family] = []
        with self.availability.reading("delays_node"):
            # A CPU that goes off line takes its row with it, and comes back with the same count.
            self._cpus |= read_schedstat(node.roots.proc)
            families.append(Family(NODE_RUN_QUEUE, [((), sum(self._cpus.values()))]))
        with self.availability.reading("delays_throttling"):
            families += _throttling(node.inventory())
        with self.availability.reading("delays_run_queue"):
            families += self._delays(node)
        if why := self.availability.absent["delays_run_queue"]:
            self._lose_waits(*why)
        return families

    def _delays(self, node: Node) -> list[Family]:
        processes = node.processes()
        with ExitStack() as stack:
            source, counted = self._source(node.roots.proc, stack)
            skipped = self._ask(node.roots.proc, processes, source)
        self._sums.forget(
            owners={workload.owner for workload in node.inventory().workloads},
            pids={pid for pids in processes.values() for pid in pids},
        )
        delays, block_io_waits = DELAY.family(), BLOCK_IO_WAITS.family()
        for owner, sums in self._sums.items():
            waited = dict(zip(_SUMS, sums, strict=True))
            for reason in counted:
                if reason == "run_queue" or waited[reason] >= _LEAST:
                    delays.add((*owner.labels, reason), waited[reason])
            if waited["run_queue_nice"]:
                delays.add((*owner.labels, "run_queue_nice"), waited["run_queue_nice"])
            if "block_io" in counted and waited["block_io"] >= _LEAST:
                block_io_waits.add(owner.labels, waited["block_io_waits"])
        return [delays, block_io_waits, Family(SKIPPED, [((), skipped)])]

    def _source(self, proc: str, stack: ExitStack) -> tuple[Source, Collection[str]]:
        """Return what to read processes with, and which reasons it counts on this node."""
        if self._refused is None:
            try:
                taskstats = stack.enter_context(TaskStatsSocket())
                version = taskstats.read(os.getpid()).version
            except Unavailable as error:
                if self._taskstats or error.reason not in (Reason.NO_PERMISSION, Reason.NOT_IN_KERNEL):
                    raise
                self._refused = (error.reason, str(error))
            else:
                self._taskstats = True
                return lambda pid: {0: _waited(taskstats.read(pid))}, self._counted(proc, version)
        self._lose_waits(*self._refused)
        return partial(_by_thread, proc), ("run_queue",)

    def _counted(self, proc: str, version: int) -> Collection[str]:
        counted = ["run_queue"]
        with self.availability.reading("delays_waits"):
            check_accounting(proc, version)
            counted += (reason for reason in _REASONS[1:] if reason not in _NEWER)
        for reason, since in _NEWER.items():
            with self.availability.reading(f"delays_{reason}"):
                if why := self.availability.absent["delays_waits"]:
                    raise Unavailable(*why)
                if version < since:
                    raise Unavailable(Reason.NOT_IN_KERNEL, f"{reason} came with version {since}, this is {version}")
                if reason == "irq":
                    # There exactly where the kernel accounts the time of interrupts; without, the total stays 0.
                    read(f"{proc}/pressure/irq")
                counted.append(reason)
        return counted

    def _ask(self, proc: str, processes: Mapping[Owner, Collection[int]], source: Source) -> int:
        """Add what each process has waited to the sums, and return how many there was no time for.

        Those that were asked longest ago come first. One that ends meanwhile, or refuses, is left out; raises
        `Unavailable` or `ParseError` when all refuse.
        """
        queue = [(pid, owner) for owner, pids in processes.items() for pid in pids]
        queue.sort(key=lambda item: self._asked.get(item[0], 0))
        self._scrapes += 1
        asked: dict[int, int] = {}
        until = time.monotonic() + _BUDGET
        skipped = 0
        refused: Unavailable | ParseError | None = None
        for pid, owner in queue:
            if time.monotonic() > until:
                skipped += 1
                asked[pid] = self._asked.get(pid, 0)
                continue
            try:
                process = read_process(proc, pid)
                self._sums.add(owner, pid, process.started, source(pid), niced=process.niced)
            except Vanished:
                continue
            except (Unavailable, ParseError) as error:
                refused = error
                continue
            asked[pid] = self._scrapes
        self._asked = asked
        if refused and not asked:
            raise refused
        return skipped

    def _lose_waits(self, reason: Reason, detail: str) -> None:
        for signal in ("waits", *_NEWER):
            self.availability.lost(f"delays_{signal}", reason, detail)


class _Sums:
    """What workloads have waited, summed over processes that come and go, without a sum ever falling.

    A process adds what it has waited since it was last asked. So one that ended keeps what it had added, one that
    there was no time for is not taken for ended, and one that moves to another workload takes nothing along.
    """

    def __init__(self) -> None:
        self._sums: dict[Owner, list[float]] = {}
        self._last: dict[int, tuple[int, dict[int, Waited]]] = {}
        """{process id: (when it started, {thread id: the most that it was seen to have waited})}"""

    def add(self, owner: Owner, pid: int, started: int, threads: dict[int, Waited], *, niced: bool = False) -> None:
        """Add one process. Another start is another process; another thread of the same id has waited from 0 again."""
        before = self._last.get(pid)
        known = before[1] if before and before[0] == started else {}
        total = self._sums.setdefault(owner, [0.0] * len(_SUMS))
        highest: dict[int, Waited] = {}
        for thread, waited in threads.items():
            last = known.get(thread, (0.0,) * len(waited))
            # The kernel counts a thread that is just ending twice for a moment, so that a total can fall back.
            highest[thread] = tuple(map(max, waited, last))
            for index, (now, then) in enumerate(zip(highest[thread], last, strict=True)):
                total[_RUN_QUEUE_NICE if niced and index == _RUN_QUEUE else index] += now - then
        self._last[pid] = (started, highest)

    def forget(self, owners: Collection[Owner], pids: Collection[int]) -> None:
        """Forget the workloads and the processes that are not among these."""
        self._sums = {owner: total for owner, total in self._sums.items() if owner in owners}
        self._last = {pid: last for pid, last in self._last.items() if pid in pids}

    def items(self) -> Collection[tuple[Owner, list[float]]]:
        """Return each workload with its sums, in the order of `_SUMS`."""
        return self._sums.items()


def _waited(stats: TaskStats) -> Waited:
    return tuple(getattr(stats, name) or 0.0 for name in _SUMS[:_RUN_QUEUE_NICE])


def _by_thread(proc: str, pid: int) -> dict[int, Waited]:
    return {thread: (waited,) for thread, waited in read_task_schedstats(proc, pid).items()}


def _throttling(inventory: Inventory) -> list[Family]:
    """Read what each workload used, and of those that have or had a CPU quota of their own what it did to them.

    A pod as a whole can have a quota too; what it used its containers have.
    """
    if b"cpu" not in read(f"{inventory.hierarchy.mount}/cgroup.controllers").split():
        raise Unavailable(Reason.CGROUP_V1, "the cpu controller is not on cgroup v2")
    families = {
        metric: metric.family() for metric in (USAGE, PERIODS, THROTTLED_PERIODS, THROTTLED, BURST_PERIODS, BURST)
    }
    readable, refused = 0, None
    for workload in inventory.workloads:
        try:
            with open_cgroup(inventory.hierarchy.mount + workload.cgroup.path) as fd:
                samples = _read_cpu(fd, whole_pod=workload.whole_pod)
        except Vanished:
            continue
        except (Unavailable, ParseError) as error:
            refused = error
            continue
        readable += 1
        for metric, value in samples:
            families[metric].add(workload.owner.labels, value)
    if refused and not readable:
        raise refused
    return list(families.values())


def _read_cpu(fd: int, *, whole_pod: bool) -> list[tuple[Metric, float]]:
    stat = read_cpu_stat(fd)
    if stat is None:
        return []
    samples: list[tuple[Metric, float]] = []
    if stat.usage >= _LEAST and not whole_pod:
        samples.append((USAGE, stat.usage))
    if stat.periods == 0 and read_cpu_max(fd) is None:
        return samples
    samples.append((THROTTLED, stat.throttled))
    if stat.throttled_periods and not whole_pod:
        # Out of how many periods matters only once there was one, and of a pod its containers have it.
        samples += [(PERIODS, stat.periods), (THROTTLED_PERIODS, stat.throttled_periods)]
    if stat.burst_periods is not None and stat.burst is not None and (stat.burst_periods or read_cpu_burst(fd)):
        samples += [(BURST_PERIODS, stat.burst_periods), (BURST, stat.burst)]
    return samples
