"""Collector `memory`: limits that bite, what cannot be reclaimed, kills, throttling and evicted code pages."""

from __future__ import annotations

from typing import TYPE_CHECKING, ClassVar

from shoal.collectors import Collector, Sample, read_workloads, register
from shoal.families import Family, Metric
from shoal.inventory import OWNER_LABELS, Node
from shoal.kernel.cgroups import open_cgroup
from shoal.kernel.files import Reason, Unavailable
from shoal.kernel.memory import read_amount, read_events, read_memory_stat
from shoal.kernel.vmstat import read_vmstat

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator

    from shoal.inventory import Workload
    from shoal.settings import Settings

__all__ = ["MemoryCollector"]

NODE_OOM_KILLS = Metric(
    "shoal_node_memory_oom_kills_total",
    "counter",
    "Processes killed for lack of memory anywhere on the node (oom_kill); stays when the container is gone.",
    "/proc/vmstat oom_kill",
)
CURRENT = Metric(
    "shoal_memory_current_bytes",
    "gauge",
    "Memory charged to the workload, page cache included (memory.current).",
    "<cgroup>/memory.current",
    OWNER_LABELS,
)
PEAK = Metric(
    "shoal_memory_peak_bytes",
    "gauge",
    "Highest memory.current since the workload started (memory.peak).",
    "<cgroup>/memory.peak",
    OWNER_LABELS,
)
MAX = Metric(
    "shoal_memory_max_bytes",
    "gauge",
    "The workload's own hard limit, above which the kernel kills (memory.max); absent if it has none, or "
    "if it is the effective one and the workload never came near it.",
    "<cgroup>/memory.max",
    OWNER_LABELS,
)
HIGH = Metric(
    "shoal_memory_high_bytes",
    "gauge",
    "The amount above which the workload is throttled, not killed (memory.high); absent if it has none.",
    "<cgroup>/memory.high",
    OWNER_LABELS,
)
EFFECTIVE_LIMIT = Metric(
    "shoal_memory_effective_limit_bytes",
    "gauge",
    "The tightest memory.max of the workload and its ancestors, the one that bites; absent if there is none.",
    "memory.max of the cgroup and its ancestors",
    OWNER_LABELS,
)
SWAP_CURRENT = Metric(
    "shoal_memory_swap_current_bytes",
    "gauge",
    "Swap used by the workload (memory.swap.current).",
    "<cgroup>/memory.swap.current",
    OWNER_LABELS,
)
SWAP_MAX = Metric(
    "shoal_memory_swap_max_bytes",
    "gauge",
    "The workload's swap limit (memory.swap.max); absent if it has none.",
    "<cgroup>/memory.swap.max",
    OWNER_LABELS,
)
UNRECLAIMABLE = Metric(
    "shoal_memory_unreclaimable_bytes",
    "gauge",
    "Memory that reclaim cannot take back at once: anon, shmem, sock, dirty and write-back pages and kernel memory "
    "but reclaimable slab. Where there is swap, what could be swapped out is still counted.",
    "<cgroup>/memory.stat, several fields",
    OWNER_LABELS,
)
CATEGORY = Metric(
    "shoal_memory_category_bytes",
    "gauge",
    "What the workload's memory is made of, by the kernel's own field; shmem, file_mapped, file_dirty and "
    "file_writeback are parts of file, so the categories do not add up.",
    "<cgroup>/memory.stat",
    (*OWNER_LABELS, "category"),
)
EVENTS = Metric(
    "shoal_memory_events_total",
    "counter",
    "Events of the workload and its descendants: throttled (high), limit hit (max), out of memory (oom), "
    "killed (oom_kill). oom_kill without oom: an ancestor's limit or the node did it.",
    "<cgroup>/memory.events",
    (*OWNER_LABELS, "event"),
)
LOCAL_EVENTS = Metric(
    "shoal_memory_local_events_total",
    "counter",
    "The same events of this cgroup alone, for cgroups that have others below: whether its own limit was hit. Of one "
    "that had an event or came near its limit.",
    "<cgroup>/memory.events.local",
    (*OWNER_LABELS, "event"),
)
REFAULT = Metric(
    "shoal_memory_refault_file_pages_total",
    "counter",
    "File pages read again soon after they had been evicted (workingset_refault_file).",
    "<cgroup>/memory.stat workingset_refault_file",
    OWNER_LABELS,
)
ACTIVATE = Metric(
    "shoal_memory_activate_file_pages_total",
    "counter",
    "Refaulted file pages that were activated at once, being in use (workingset_activate_file).",
    "<cgroup>/memory.stat workingset_activate_file",
    OWNER_LABELS,
)
RESTORE = Metric(
    "shoal_memory_restore_file_pages_total",
    "counter",
    "Refaulted file pages that had been known as in use before they were evicted (workingset_restore_file).",
    "<cgroup>/memory.stat workingset_restore_file",
    OWNER_LABELS,
)
MAJOR_FAULTS = Metric(
    "shoal_memory_major_faults_total",
    "counter",
    "Page faults that had to wait for a read from disk (pgmajfault).",
    "<cgroup>/memory.stat pgmajfault",
    OWNER_LABELS,
)
DIRECT_SCAN = Metric(
    "shoal_memory_direct_scan_pages_total",
    "counter",
    "Pages that the workload's own tasks scanned to make room (pgscan_direct).",
    "<cgroup>/memory.stat pgscan_direct",
    OWNER_LABELS,
)

_EVENTS = ("high", "max", "oom", "oom_kill")
_CATEGORIES = (
    "anon",
    "file",
    "file_mapped",
    "file_dirty",
    "file_writeback",
    "shmem",
    "sock",
    "kernel_stack",
    "pagetables",
    "percpu",
    "slab_unreclaimable",
)
# sec_pagetables came with 6.1 (page tables of virtual machines and IOMMUs), vmalloc with 5.18.
_UNRECLAIMABLE = (
    "anon",
    "shmem",
    "sock",
    "kernel_stack",
    "pagetables",
    "sec_pagetables",
    "percpu",
    "vmalloc",
    "slab_unreclaimable",
    "file_dirty",
    "file_writeback",
)
_STAT_COUNTERS = (
    (REFAULT, "workingset_refault_file"),
    (ACTIVATE, "workingset_activate_file"),
    (RESTORE, "workingset_restore_file"),
    (MAJOR_FAULTS, "pgmajfault"),
    (DIRECT_SCAN, "pgscan_direct"),
)
_SWAP_AMOUNTS = ((SWAP_CURRENT, "memory.swap.current"), (SWAP_MAX, "memory.swap.max"))
# The part of its limit from which on a workload is looked at closely, well below where any alert begins.
_NEAR = 0.5


@register
class MemoryCollector(Collector):
    """Kills at half the limit, throttling without a kill, and code pages evicted by page cache (failures 5, 6, 8).

    Most workloads never come near a limit and have nothing to tell: they have the limit that bounds them and their
    kills. Once one has used half of that limit, its own or an ancestor's, or has had an event, it has all the rest for
    as long as it lives. One without a limit has its usage and its kills. A pod as a whole has its limits and, once it
    came as near, its own events, which tell whether the pod's limit or a container's was hit.
    """

    name = "memory"
    metrics: ClassVar = (
        NODE_OOM_KILLS,
        CURRENT,
        PEAK,
        MAX,
        HIGH,
        EFFECTIVE_LIMIT,
        SWAP_CURRENT,
        SWAP_MAX,
        UNRECLAIMABLE,
        CATEGORY,
        EVENTS,
        LOCAL_EVENTS,
        REFAULT,
        ACTIVATE,
        RESTORE,
        MAJOR_FAULTS,
        DIRECT_SCAN,
    )
    signals: ClassVar = ("memory_oom_kills", "memory_workloads", "memory_peak", "memory_direct_scan")

    def __init__(self, settings: Settings) -> None:
        """Start with no workload known to have come near its limit, and nothing of what this kernel has."""
        super().__init__(settings)
        self._restless: set[int] = set()
        self._has_direct_scan: bool | None = None

    def read(self, node: Node) -> list[Family]:
        """Read the node's kills, then the memory files of every workload."""
        kills = NODE_OOM_KILLS.family()
        with self.availability.reading("memory_oom_kills"):
            vmstat = read_vmstat(node.roots.proc)
            if "oom_kill" not in vmstat:
                raise Unavailable(Reason.NOT_IN_KERNEL, "this kernel's vmstat has no oom_kill (4.13)")
            kills.add((), vmstat["oom_kill"])
        families = {metric: metric.family() for metric in self.metrics[1:]}
        scan: _Scan | None = None
        with self.availability.reading("memory_workloads"):
            inventory = node.inventory()
            if not inventory.hierarchy.memory:
                raise Unavailable(Reason.CGROUP_V1, "the memory controller is not on cgroup v2")
            self._restless &= {workload.cgroup.id for workload in inventory.workloads}
            scan = _Scan(inventory.hierarchy.mount, self._restless, has_direct_scan=self._has_direct_scan)
            read_workloads(inventory, families, scan.workload)
            self._has_direct_scan = scan.has_direct_scan
        workloads = families[EVENTS]
        self._newer("memory_peak", "memory.peak (5.19)", workloads, found=bool(scan and scan.has_peak))
        what = "pgscan_direct in memory.stat (6.1)"
        self._newer("memory_direct_scan", what, workloads, found=bool(self._has_direct_scan))
        return [kills, *families.values()]

    def _newer(self, signal: str, what: str, sibling: Family, *, found: bool) -> None:
        """Note whether what came with a newer kernel was found where the sibling, which every kernel has, was."""
        with self.availability.reading(signal):
            why = self.availability.absent["memory_workloads"]
            if why and not sibling.samples:
                raise Unavailable(*why)
            if sibling.samples and not found:
                raise Unavailable(Reason.NOT_IN_KERNEL, f"this kernel has no {what}")


class _Scan:
    """Reads the workloads of one scrape.

    `restless` are the cgroup ids of those that came near their limit, in this scrape or an earlier one;
    `has_direct_scan` is None until it is known. The limits of ancestors are read once, however many workloads they
    bound.
    """

    def __init__(self, mount: str, restless: set[int], *, has_direct_scan: bool | None) -> None:
        self.has_peak = False
        self.has_direct_scan = has_direct_scan
        self._mount = mount
        self._restless = restless
        self._ancestors: dict[str, int | None] = {}

    def workload(self, workload: Workload, fd: int) -> Iterator[Sample]:
        labels = workload.owner.labels
        own_max, high = read_amount("memory.max", fd), read_amount("memory.high", fd)
        limit = self._tightest(workload.cgroup.path, own_max)
        current, peak = read_amount("memory.current", fd), _read_optional("memory.peak", fd)
        self.has_peak |= peak is not None
        if self.has_direct_scan is None:
            # Of one that may be calm: whether the kernel has it does not come and go with those that are not.
            self.has_direct_scan = "pgscan_direct" in read_memory_stat(fd)
        amounts = {HIGH: high}
        ceiling = min((bound for bound in (limit, high) if bound is not None), default=None)
        events = {} if workload.whole_pod else read_events("memory.events", fd)
        local = read_events("memory.events.local", fd) if workload.cgroup.children else {}
        if ceiling is not None and max(current or 0, peak or 0) >= ceiling * _NEAR:
            self._restless.add(workload.cgroup.id)
        if any(counts.get(event) for event in _EVENTS for counts in (events, local)):
            self._restless.add(workload.cgroup.id)
        restless = workload.cgroup.id in self._restless
        if workload.whole_pod or restless or own_max != limit:
            amounts |= {MAX: own_max}
        if not workload.whole_pod:
            amounts |= {EFFECTIVE_LIMIT: limit}
            if restless or ceiling is None:
                amounts |= {CURRENT: current}
            if restless and ceiling is not None:
                amounts |= {PEAK: peak}
                amounts |= {metric: _read_optional(name, fd) for metric, name in _SWAP_AMOUNTS}
                yield from _breakdown(labels, read_memory_stat(fd))
        yield from _events(EVENTS, labels, events, _EVENTS if restless else ("oom_kill",))
        yield from _events(LOCAL_EVENTS, labels, local, _EVENTS if restless else ())
        yield from ((metric, labels, amount) for metric, amount in amounts.items() if amount is not None)

    def _tightest(self, path: str, own: int | None) -> int | None:
        above = self._above(path)
        return min((limit for limit in (own, above) if limit is not None), default=None)

    def _above(self, path: str) -> int | None:
        if not path:
            return None
        parent = path.rpartition("/")[0]
        if parent not in self._ancestors:
            with open_cgroup(self._mount + parent) as fd:
                own = _read_optional("memory.max", fd)
            self._ancestors[parent] = self._tightest(parent, own)
        return self._ancestors[parent]


def _breakdown(labels: tuple[str, ...], stat: dict[str, int]) -> Iterator[Sample]:
    yield UNRECLAIMABLE, labels, sum(stat.get(field, 0) for field in _UNRECLAIMABLE)
    yield from ((CATEGORY, (*labels, field), stat[field]) for field in _CATEGORIES if field in stat)
    yield from ((metric, labels, stat[field]) for metric, field in _STAT_COUNTERS if field in stat)


def _events(metric: Metric, labels: tuple[str, ...], counts: dict[str, int], wanted: Iterable[str]) -> Iterator[Sample]:
    return ((metric, (*labels, event), counts[event]) for event in wanted if event in counts)


def _read_optional(name: str, fd: int) -> int | None:
    """Read a file that an older kernel, or one without swap accounting, does not have."""
    try:
        return read_amount(name, fd)
    except Unavailable as error:
        if error.reason is Reason.NOT_IN_KERNEL:
            return None
        raise
