"""Collector `redis_aof`: Redis and Valkey servers that stall while their append-only file is written or they fork."""

from __future__ import annotations

import asyncio
import os
from contextlib import suppress
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, ClassVar

from shoal.collectors import Collector, Sample, register
from shoal.families import Family, Histogram, Metric
from shoal.inventory import OWNER_LABELS, Node, Owner
from shoal.kernel.diskstats import disks_below, read_diskstats
from shoal.kernel.files import ParseError, Reason, Unavailable, Vanished, read, unavailable_from
from shoal.kernel.mounts import read_mounts, upper_directory
from shoal.redis.errors import Down
from shoal.redis.info import number

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable, Iterator

    from shoal.kernel.mounts import Mount
    from shoal.redis.discovery import Found
    from shoal.redis.info import LatencyEvent
    from shoal.redis.server import Reading, Server
    from shoal.redis.targets import Target
    from shoal.settings import Settings

__all__ = ["RedisAofCollector"]

_LABELS = ("server", *OWNER_LABELS)
_NAMES = (b"redis-server", b"valkey-server", b"keydb-server")
_MOST_FOUND = 10
_MICRO = 1_000_000
_MILLI = 1000

UP = Metric(
    "shoal_redis_up",
    "gauge",
    "1 if the server answers INFO, 0 with the reason if it is down, refuses, or answers too slowly.",
    "INFO",
    (*_LABELS, "reason"),
)
PING = Metric(
    "shoal_redis_ping_duration_seconds",
    "histogram",
    "How long the server took to answer a PING, five times a second: a stalled event loop cannot answer. "
    "One that got no answer counts with the time until the server was given up, 5 s.",
    "PING, timed by the exporter",
    (*_LABELS, "le"),
)
PING_EXCLUDED = Metric(
    "shoal_redis_ping_excluded_seconds_total",
    "counter",
    "Time in which the exporter itself could not run, and which is therefore left out of the PINGs' durations.",
    "the exporter's event loop",
    _LABELS,
)
AOF_ENABLED = Metric(
    "shoal_redis_aof_enabled", "gauge", "1 if the append-only file is on (aof_enabled).", "INFO aof_enabled", _LABELS
)
DELAYED_FSYNC = Metric(
    "shoal_redis_aof_delayed_fsync_total",
    "counter",
    "Writes held up by a flush that ran for over 2 s under everysec (aof_delayed_fsync). Shorter stalls, those of "
    "always and those of a fork leave it as it is.",
    "INFO aof_delayed_fsync",
    _LABELS,
)
PENDING_FSYNC = Metric(
    "shoal_redis_aof_pending_bio_fsync",
    "gauge",
    "Flushes of the append-only file that wait in the background (aof_pending_bio_fsync).",
    "INFO aof_pending_bio_fsync",
    _LABELS,
)
REWRITE_IN_PROGRESS = Metric(
    "shoal_redis_aof_rewrite_in_progress",
    "gauge",
    "1 while a child rewrites the append-only file (aof_rewrite_in_progress).",
    "INFO aof_rewrite_in_progress",
    _LABELS,
)
LAST_WRITE_OK = Metric(
    "shoal_redis_aof_last_write_ok",
    "gauge",
    "1 if the last write to the append-only file succeeded, 0 if it failed (aof_last_write_status).",
    "INFO aof_last_write_status",
    _LABELS,
)
LAST_REWRITE_OK = Metric(
    "shoal_redis_aof_last_rewrite_ok",
    "gauge",
    "1 if the last rewrite of the append-only file succeeded, 0 if it failed (aof_last_bgrewrite_status).",
    "INFO aof_last_bgrewrite_status",
    _LABELS,
)
LATEST_FORK = Metric(
    "shoal_redis_latest_fork_seconds",
    "gauge",
    "How long the last fork took, in which the server answers nobody (latest_fork_usec).",
    "INFO latest_fork_usec",
    _LABELS,
)
FORKS = Metric(
    "shoal_redis_forks_total", "counter", "Forks since the server started (total_forks).", "INFO total_forks", _LABELS
)
REWRITES = Metric(
    "shoal_redis_aof_rewrites_total",
    "counter",
    "Rewrites of the append-only file since the server started (aof_rewrites).",
    "INFO aof_rewrites",
    _LABELS,
)
AOF_LAST_COW = Metric(
    "shoal_redis_aof_last_cow_bytes",
    "gauge",
    "Memory that the last rewrite of the append-only file copied on write (aof_last_cow_size).",
    "INFO aof_last_cow_size",
    _LABELS,
)
RDB_LAST_COW = Metric(
    "shoal_redis_rdb_last_cow_bytes",
    "gauge",
    "Memory that the last snapshot copied on write (rdb_last_cow_size).",
    "INFO rdb_last_cow_size",
    _LABELS,
)
CURRENT_COW = Metric(
    "shoal_redis_current_cow_bytes",
    "gauge",
    "Memory that the child at work has copied on write so far, 0 without one (current_cow_size).",
    "INFO current_cow_size",
    _LABELS,
)
USED_MEMORY_RSS = Metric(
    "shoal_redis_used_memory_rss_bytes",
    "gauge",
    "The server's resident memory (used_memory_rss); with a rewrite's copies it has to fit "
    "shoal_memory_effective_limit_bytes of the same workload.",
    "INFO used_memory_rss",
    _LABELS,
)
MAXMEMORY = Metric(
    "shoal_redis_maxmemory_bytes",
    "gauge",
    "The server's own limit for its data (maxmemory); absent if it has none. Copies on write come on top.",
    "INFO maxmemory",
    _LABELS,
)
CONFIG_INFO = Metric(
    "shoal_redis_config_info",
    "gauge",
    "Always 1; when the append-only file is flushed (appendfsync: always, everysec or no), and whether flushing waits "
    "for a rewrite (no-appendfsync-on-rewrite).",
    "CONFIG GET appendfsync, no-appendfsync-on-rewrite",
    (*_LABELS, "appendfsync", "no_appendfsync_on_rewrite"),
)
LATENCY_THRESHOLD = Metric(
    "shoal_redis_latency_monitor_threshold_seconds",
    "gauge",
    "What the server's latency monitor takes for a spike (latency-monitor-threshold); 0 is off, as it is by default.",
    "CONFIG GET latency-monitor-threshold",
    _LABELS,
)
EVENT_LAST = Metric(
    "shoal_redis_latency_event_last_seconds",
    "gauge",
    "How long the last spike of this event took, as the server's latency monitor saw it.",
    "LATENCY LATEST",
    (*_LABELS, "event"),
)
EVENT_MAX = Metric(
    "shoal_redis_latency_event_max_seconds",
    "gauge",
    "How long the longest spike of this event took since the server started or its latency monitor was reset.",
    "LATENCY LATEST",
    (*_LABELS, "event"),
)
EVENT_SECONDS = Metric(
    "shoal_redis_latency_event_seconds_total",
    "counter",
    "How long all spikes of this event took (Valkey 8.1 and later).",
    "LATENCY LATEST",
    (*_LABELS, "event"),
)
EVENTS = Metric(
    "shoal_redis_latency_events_total",
    "counter",
    "Spikes of this event (Valkey 8.1 and later).",
    "LATENCY LATEST",
    (*_LABELS, "event"),
)
SKIPPED = Metric(
    "shoal_redis_servers_skipped",
    "gauge",
    f"Servers found on this node that are not watched: beyond the first {_MOST_FOUND}, in a network namespace that may "
    "not be entered, without an address in their process title, or with the same labels as another.",
    "process titles, counted",
)
DISK_INFO = Metric(
    "shoal_redis_disk_info",
    "gauge",
    "Always 1; a disk that the server's data directory is on.",
    "/proc/<pid>/mountinfo, /sys/dev/block",
    (*_LABELS, "device"),
)
DISK_WRITES = Metric(
    "shoal_redis_disk_writes_total",
    "counter",
    "Writes completed by the block device that the server's data directory is on: a partition's or mapped device's own "
    "(diskstats field 5).",
    "/proc/diskstats",
    _LABELS,
)
DISK_WRITE_SECONDS = Metric(
    "shoal_redis_disk_write_seconds_total",
    "counter",
    "Time that these writes took, each from its submission (diskstats field 8). What a server with appendfsync always "
    "waits for, beside flushes; of the wait for a file system's journal the pressure of a cgroup knows nothing.",
    "/proc/diskstats",
    _LABELS,
)
FLUSHES = Metric(
    "shoal_disk_flushes_total",
    "counter",
    "Cache flushes that the disk completed (diskstats field 16); for disks with a server's data.",
    "/proc/diskstats",
    ("device",),
)
FLUSH_SECONDS = Metric(
    "shoal_disk_flush_seconds_total",
    "counter",
    "Time that the disk spent on cache flushes (diskstats field 17); for disks with a server's data.",
    "/proc/diskstats",
    ("device",),
)

# What INFO calls it, and what one of its units is of ours.
_NUMBERS = (
    (AOF_ENABLED, "aof_enabled", 1),
    (DELAYED_FSYNC, "aof_delayed_fsync", 1),
    (PENDING_FSYNC, "aof_pending_bio_fsync", 1),
    (REWRITE_IN_PROGRESS, "aof_rewrite_in_progress", 1),
    (LATEST_FORK, "latest_fork_usec", _MICRO),
    (FORKS, "total_forks", 1),
    (REWRITES, "aof_rewrites", 1),
    (AOF_LAST_COW, "aof_last_cow_size", 1),
    (RDB_LAST_COW, "rdb_last_cow_size", 1),
    (CURRENT_COW, "current_cow_size", 1),
    (USED_MEMORY_RSS, "used_memory_rss", 1),
)
# What a server can say of itself, and nothing else: its answer becomes a label, and anyone can call himself a server.
_POLICIES = (
    ("appendfsync", frozenset({"always", "everysec", "no"})),
    ("no-appendfsync-on-rewrite", frozenset({"yes", "no"})),
)
_STATES = ((LAST_WRITE_OK, "aof_last_write_status"), (LAST_REWRITE_OK, "aof_last_bgrewrite_status"))
# Of the monitor's events those that belong to this failure, and those of the slow commands that look like it.
_EVENTS = frozenset(
    {
        "aof-write",
        "aof-write-alone",
        "aof-write-active-child",
        "aof-write-pending-fsync",
        "aof-fsync-always",
        "aof-fstat",
        "aof-rename",
        "aof-rewrite-diff-write",
        "aof-rewrite-done-fsync",
        "fork",
        "command",
        "fast-command",
    }
)
_BUCKETS = (0.001, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5)


@dataclass(slots=True)
class _Watch:
    """A server that is watched, and what is known of its process; both stay when the server goes down."""

    server: Server
    task: asyncio.Task[None]
    pings: Histogram
    found: int | None = None
    """The process that it was found by, None if it was named."""
    pid: int | None = None
    owner: Owner = field(default_factory=Owner)
    disks: list[str] = field(default_factory=list)
    volume: int | None = None
    """The block device (a st_dev) of the file system that its data is on, which may stand on several disks."""


@register
class RedisAofCollector(Collector):
    """Redis and Valkey: the append-only file's durability becomes the p99 (failure 1).

    The server writes and flushes its append-only file, and forks to rewrite it, in the loop that answers clients. What
    its INFO counts of this begins at two seconds; a PING from outside, five times a second, sees the rest. The disk's
    flushes stand beside it, as a slow command stalls a PING too. Nothing is changed in a server, and none is watched
    unless it is named (--redis.target) or looked for (--redis.discover).

    The copy-on-write prediction is used_memory_rss + last_cow against shoal_memory_effective_limit_bytes, and the
    server's own waiting is shoal_pressure_some_seconds_total{resource="io"}: the workload's labels are the same.
    """

    name = "redis_aof"
    metrics: ClassVar = (
        UP,
        PING,
        PING_EXCLUDED,
        *(metric for metric, _, _ in _NUMBERS),
        *(metric for metric, _ in _STATES),
        MAXMEMORY,
        CONFIG_INFO,
        LATENCY_THRESHOLD,
        EVENT_LAST,
        EVENT_MAX,
        EVENT_SECONDS,
        EVENTS,
        SKIPPED,
        DISK_INFO,
        DISK_WRITES,
        DISK_WRITE_SECONDS,
        FLUSHES,
        FLUSH_SECONDS,
    )
    signals: ClassVar = (
        "redis_aof_servers",
        "redis_aof_namespaces",
        "redis_aof_config",
        "redis_aof_latency",
        "redis_aof_disk",
    )

    def __init__(self, settings: Settings) -> None:
        """Start with nobody watched."""
        super().__init__(settings)
        self._targets: dict[Target, _Watch] = {}
        self._found: dict[tuple[int, Target], _Watch] = {}
        self._tools: tuple[type[Server], Callable[[str], list[Found]]] | None = None
        self._skipped = 0
        self._outcomes: list[tuple[_Watch, Reading | Down]] = []

    async def start(self) -> None:
        """Begin to watch the servers that were named."""
        if not (self.settings.redis_targets or self.settings.redis_discover):
            return
        if self._tools is None:
            self._tools = await asyncio.to_thread(_load)
        for target in self.settings.redis_targets:
            if target not in self._targets:
                self._targets[target] = self._watch(self._tools[0], target)

    async def stop(self) -> None:
        """Close all connections."""
        watched = [watch.task for watch in (*self._targets.values(), *self._found.values())]
        for task in watched:
            task.cancel()
        await asyncio.gather(*watched, return_exceptions=True)

    def asks(self, node: Node) -> Awaitable[None] | None:
        """Ask all servers at once, before `read` joins their answers with the kernel's."""
        return self._ask(node) if self.settings.redis_targets or self.settings.redis_discover else None

    async def _ask(self, node: Node) -> None:
        await self.start()
        if self.settings.redis_discover and self._tools:
            with self.availability.reading("redis_aof_servers"):
                await self._discover(node, *self._tools)
        watched = [*self._targets.values(), *self._found.values()]
        self._outcomes = list(zip(watched, await asyncio.gather(*map(_ask, watched)), strict=True))

    def _watch(self, server_type: type[Server], target: Target, pid: int | None = None) -> _Watch:
        pings = Histogram(_BUCKETS)
        server = server_type(target, pings.observe, self.settings.roots.proc, self.settings.redis_password_file)
        return _Watch(server, asyncio.create_task(server.run()), pings, pid, pid)

    async def _discover(self, node: Node, server_type: type[Server], find: Callable[[str], list[Found]]) -> None:
        """Watch the servers that run on the node now, and no longer those that have gone. Raises `Unavailable`."""
        found = await asyncio.to_thread(find, node.roots.proc)
        new = self._new_of(found)
        for key in self._found.keys() - new:
            self._found.pop(key).task.cancel()
        for pid, target in new:
            if (pid, target) not in self._found:
                self._found[pid, target] = self._watch(server_type, target, pid)

    def _new_of(self, found: list[Found]) -> list[tuple[int, Target]]:
        """Return the servers to watch beside those that were named, which are watched with their own login."""
        named = {target.name: watch for target, watch in self._targets.items()}
        chosen: list[tuple[int, Target]] = []
        elsewhere = self._skipped = 0
        for one in found:
            target = one.target
            if target and target.namespace_of is None and target.name in named:
                named[target.name].pid = one.pid
            elif any(one.pid == watch.pid for watch in named.values()):
                continue
            elif target and target.namespace_of is not None and not self.settings.enter_namespaces:
                elsewhere += 1
            elif target and len(chosen) < _MOST_FOUND:
                chosen.append((one.pid, target))
            else:
                self._skipped += 1
        self._skipped += elsewhere
        with self.availability.reading("redis_aof_namespaces"):
            if elsewhere:
                why = f"{elsewhere} servers are in other network namespaces, which may not be entered (--netns.enter)"
                raise Unavailable(Reason.NOT_ENABLED, why)
        return chosen

    def read(self, node: Node) -> list[Family]:
        """Turn the answers of the servers into families, with their owners and the disks that they write to."""
        families = {metric: metric.family() for metric in self.metrics}
        problems: dict[str, list[Exception]] = {"redis_aof_config": [], "redis_aof_latency": [], "redis_aof_disk": []}
        labelled: set[tuple[str, ...]] = set()
        volumes: dict[tuple[str, ...], int] = {}
        for watch, outcome in self._outcomes:
            reading = None if isinstance(outcome, Down) else outcome
            problems["redis_aof_disk"] += _identify(watch, reading, self._processes(watch, reading), node)
            labels = (watch.server.target.name, *watch.owner.labels)
            if labels in labelled:
                continue
            labelled.add(labels)
            families[PING].add_histogram(labels, watch.pings)
            families[PING_EXCLUDED].add(labels, watch.server.own_delay)
            families[UP].add((*labels, outcome.reason.value if isinstance(outcome, Down) else ""), int(bool(reading)))
            for device in watch.disks:
                families[DISK_INFO].add((*labels, device), 1)
            if watch.volume is not None:
                volumes[labels] = watch.volume
            if reading:
                problems["redis_aof_config"] += _problems(reading.config)
                problems["redis_aof_latency"] += _problems(reading.latency)
                for metric, values, value in _samples(labels, reading):
                    families[metric].add(values, value)
        if self.settings.redis_discover:
            families[SKIPPED].add((), self._skipped + len(self._outcomes) - len(labelled))
        try:
            _disk_use(node, families, volumes)
        except (Unavailable, ParseError) as error:
            problems["redis_aof_disk"].append(error)
        if self._outcomes and not any(watch.pid for watch, _ in self._outcomes):
            why = "no watched server is known to run on this node"
            problems["redis_aof_disk"].append(Unavailable(Reason.NOT_READABLE, why))
        self._note(problems)
        return list(families.values())

    def _processes(self, watch: _Watch, reading: Reading | None) -> list[int]:
        """Return the processes that a server may be, the likeliest first.

        One that was found is the process that it was found by. It is believed to be another only if that one too claims
        its address: whatever calls itself a server could else say that it is somebody else's, and have his labels.
        """
        told = reading.pid if reading else None
        if watch.found and (told, watch.server.target) not in self._found:
            told = None
        return [pid for pid in (told, watch.found or watch.pid) if pid]

    def _note(self, problems: dict[str, list[Exception]]) -> None:
        """Say of each signal whether it is there: not if any server that is up does without it."""
        nothing: Unavailable | None = None
        if not self._targets and not self.settings.redis_discover:
            why = "no server is named (--redis.target) or looked for (--redis.discover)"
            nothing = Unavailable(Reason.NOT_ENABLED, why)
        elif self._outcomes and all(isinstance(outcome, Down) for _, outcome in self._outcomes):
            nothing = Unavailable(Reason.NOT_READABLE, "no server answers; shoal_redis_up says why")
        for signal, found in problems.items():
            with self.availability.reading(signal):
                for problem in [nothing] if nothing else found:
                    raise problem
        if not self.settings.redis_discover:
            with self.availability.reading("redis_aof_servers"):
                if nothing and not self._targets:
                    raise nothing
            self.availability.lost("redis_aof_namespaces", Reason.NOT_ENABLED, "--redis.discover is off")


def _load() -> tuple[type[Server], Callable[[str], list[Found]]]:
    """Import redis-py and psutil, which cost 8 MiB and a tenth of a second, for those who have servers to watch."""
    from shoal.redis.discovery import find_servers  # noqa: PLC0415  (a node without Redis pays for no client)
    from shoal.redis.server import Server  # noqa: PLC0415  (see above)

    return Server, find_servers


async def _ask(watch: _Watch) -> Reading | Down:
    try:
        return await watch.server.read()
    except Down as down:
        return down


def _identify(watch: _Watch, reading: Reading | None, processes: list[int], node: Node) -> list[Exception]:
    """Find out which process the server is, whose it is and on which disks its data lies; return what hindered it.

    What was known stays when the server goes down, so that its series keep their labels.
    """
    if reading is None and watch.owner != Owner():
        return []
    proc = node.roots.proc
    watch.pid = next((pid for pid in processes if _is_server(proc, pid)), None)
    if watch.pid is None:
        return []
    with suppress(Unavailable, Vanished, ParseError):
        watch.owner = node.owner_of_process(watch.pid)
    try:
        if reading:
            watch.volume = _volume(node, watch.pid, reading)
            watch.disks = disks_below(node.roots.sys, watch.volume)
    except Vanished:
        return []
    except (Unavailable, ParseError) as error:
        return [error]
    return []


def _is_server(proc: str, pid: int) -> bool:
    """Tell whether a process is what it is taken for: a container's process id means another process here."""
    try:
        return read(f"{proc}/{pid}/comm").strip() in _NAMES
    except (Unavailable, Vanished):
        return False


def _volume(node: Node, pid: int, reading: Reading) -> int:
    directory = "" if isinstance(reading.config, Unavailable) else reading.config.get("dir", "")
    if not directory:
        # The server changes into its data directory; the link tells it to those who may trace the process.
        path = f"{node.roots.proc}/{pid}/cwd"
        try:
            directory = os.readlink(path)
        except OSError as error:
            raise unavailable_from(error, path) from None
    mount = _mount_of(node.roots.proc, pid, directory)
    if not os.major(mount.device):
        raise Unavailable(Reason.NOT_READABLE, f"{directory} is on no block device ({mount.fstype})")
    return mount.device


def _mount_of(proc: str, pid: int, directory: str) -> Mount:
    """Find what is mounted where a process has a directory; of a container's own layer, where the node keeps that.

    A stat of the directory would tell too, and hang where its file system does.
    """
    mounts = read_mounts(proc, pid)
    below = f"{directory.rstrip('/')}/"
    above = [mount for mount in mounts if below.startswith(f"{mount.mount_point.rstrip('/')}/")]
    if not above:
        raise Unavailable(Reason.NOT_READABLE, f"{directory} is under no mount of process {pid}")
    # The last of those that are mounted over each other is the one that is seen.
    mount = max(reversed(above), key=lambda one: len(one.mount_point))
    upper = upper_directory(mounts) if mount.mount_point == "/" else None
    return _mount_of(proc, 1, upper) if upper and pid != 1 else mount


def _disk_use(node: Node, families: dict[Metric, Family], volumes: dict[tuple[str, ...], int]) -> None:
    """Add what writing and flushing has cost the disks of the servers. Raises `Unavailable` or `ParseError`."""
    wanted = {labels[-1] for labels, _ in families[DISK_INFO].samples}
    if not wanted:
        return
    disks = read_diskstats(node.roots.proc)
    by_device = {disk.device: disk for disk in disks.values()}
    for labels, device in volumes.items():
        if volume := by_device.get(device):
            families[DISK_WRITES].add(labels, volume.writes)
            families[DISK_WRITE_SECONDS].add(labels, volume.write_seconds)
    for name in sorted(wanted & disks.keys()):
        flushes, seconds = disks[name].flushes, disks[name].flush_seconds
        if flushes is None or seconds is None:
            raise Unavailable(Reason.NOT_IN_KERNEL, "this kernel's diskstats has no flushes (5.5)")
        families[FLUSHES].add((name,), flushes)
        families[FLUSH_SECONDS].add((name,), seconds)


def _problems(part: object) -> list[Exception]:
    return [part] if isinstance(part, Unavailable) else []


def _samples(labels: tuple[str, ...], reading: Reading) -> Iterator[Sample]:
    """Yield what a server told; what it does not have is left out."""
    for metric, name, units in _NUMBERS:
        value = number(reading.info, name)
        if value is not None:
            yield metric, labels, value if units == 1 else value / units
    for metric, name in _STATES:
        if name in reading.info:
            yield metric, labels, int(reading.info[name] == "ok")
    if limit := number(reading.info, "maxmemory"):
        yield MAXMEMORY, labels, limit
    if not isinstance(reading.config, Unavailable):
        yield from _config(labels, reading.config)
    if not isinstance(reading.latency, Unavailable):
        yield from _latency(labels, reading.latency)


def _config(labels: tuple[str, ...], config: dict[str, str]) -> Iterator[Sample]:
    policy = tuple(config[name] if config.get(name) in values else "" for name, values in _POLICIES)
    if any(policy):
        yield CONFIG_INFO, (*labels, *policy), 1
    threshold = number(config, "latency-monitor-threshold")
    if threshold is not None:
        yield LATENCY_THRESHOLD, labels, threshold / _MILLI


def _latency(labels: tuple[str, ...], events: dict[str, LatencyEvent]) -> Iterator[Sample]:
    for name in sorted(_EVENTS & events.keys()):
        event = events[name]
        yield EVENT_LAST, (*labels, name), event.last
        yield EVENT_MAX, (*labels, name), event.longest
        if event.total is not None and event.count is not None:
            yield EVENT_SECONDS, (*labels, name), event.total
            yield EVENTS, (*labels, name), event.count
