"""Collector `inodes`: which file systems run out of inodes while df shows space, and which container uses them up."""

from __future__ import annotations

import asyncio
import logging
import os
import threading
import time
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, ClassVar

from shoal.collectors import Collector, register
from shoal.families import Family, Metric
from shoal.inventory import OWNER_LABELS, Node, Owner
from shoal.kernel.files import ParseError, Reason, Unavailable, Vanished
from shoal.kernel.inodes import CrowdedError, StuckError, Watchdog, count_inodes, read_inodes
from shoal.kernel.mounts import read_mounts, read_upper_directory

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence

    from shoal.kernel.files import Roots
    from shoal.kernel.inodes import Count, Inodes
    from shoal.kernel.mounts import Mount
    from shoal.settings import Settings

__all__ = ["InodesCollector"]

logger = logging.getLogger(__name__)

_FILESYSTEM = ("device", "fstype", "mountpoint")
_MOST_FILESYSTEMS = 20
_MOST_LAYERS = 10
_LAYER = (*OWNER_LABELS, "mountpoint")

INODES = Metric(
    "shoal_filesystem_inodes",
    "gauge",
    f"Inodes of the file system, used and free (f_files); of the {_MOST_FILESYSTEMS} with the smallest part free.",
    "statfs(2) f_files, once for each device in /proc/1/mountinfo",
    _FILESYSTEM,
)
INODES_FREE = Metric(
    "shoal_filesystem_inodes_free",
    "gauge",
    "Inodes of the file system that are free (f_ffree).",
    "statfs(2) f_ffree",
    _FILESYSTEM,
)
STUCK = Metric(
    "shoal_filesystem_stuck",
    "gauge",
    "1 if the file system has not answered in time, as when its server is gone; its inodes are absent then.",
    "statfs(2), that it returns",
    ("mountpoint",),
)
SKIPPED = Metric(
    "shoal_filesystems_skipped",
    "gauge",
    "File systems left out: under another mount or not seen through --path.rootfs (covered), failing (unreadable), "
    "not asked because too many others hang (crowded), or with more free than those that are shown (many).",
    "counted",
    ("reason",),
)
LAYER_INODES = Metric(
    "shoal_writable_layer_inodes",
    "gauge",
    f"Inodes in the writable layer of the container, the {_MOST_LAYERS} largest; a file with two names counts twice.",
    "names below the overlay's upperdir, counted in the background",
    _LAYER,
)
LAYER_AGE = Metric(
    "shoal_writable_layer_inodes_age_seconds",
    "gauge",
    "How long ago the layer was counted.",
    "clock",
    _LAYER,
)
LAYER_CUT = Metric(
    "shoal_writable_layer_inodes_cut",
    "gauge",
    "1 if the count was given up before its end, for want of time or permission, so that there are more.",
    "the walk below upperdir",
    _LAYER,
)
OTHER_LAYERS = Metric(
    "shoal_writable_layers_other_inodes",
    "gauge",
    "Inodes in all writable layers that were counted and are not among the largest.",
    "names below the overlays' upperdirs",
)
LAYERS = Metric(
    "shoal_writable_layers",
    "gauge",
    "Containers by what is known of their writable layer: counted, pending (waits for its turn), unreadable, or none "
    "(the root is no writable overlay).",
    "/proc/<pid>/mountinfo of a process of the container",
    ("state",),
)

# Interfaces of the kernel, memory, and what shows another file system's numbers. A statfs of autofs could mount it.
_NOT_REAL = frozenset(
    {
        "autofs",
        "binfmt_misc",
        "bpf",
        "cgroup",
        "cgroup2",
        "configfs",
        "debugfs",
        "devpts",
        "devtmpfs",
        "efivarfs",
        "fusectl",
        "hugetlbfs",
        "mqueue",
        "nfsd",
        "nsfs",
        "overlay",
        "proc",
        "pstore",
        "ramfs",
        "rpc_pipefs",
        "securityfs",
        "selinuxfs",
        "squashfs",
        "sysfs",
        "tracefs",
    }
)
# A tmpfs is a program's own affair, and a pod has several; but the node itself stands still without these.
_NODE_TMPFS = frozenset({"/dev/shm", "/run", "/run/lock", "/tmp"})  # noqa: S108  (names, not files of ours)
# On no block device of their own, and on no server.
_LOCAL = frozenset({"tmpfs", "zfs"})
_PATIENCE = 0.5
_MOST_HANGING = 4
# Seconds of walking for one layer and for one round: with a round every five minutes under 2 % of a CPU.
_ONE_LAYER = 1.0
_ONE_ROUND = 5.0


@register
class InodesCollector(Collector):
    """Inodes that run out while df shows space (failure 4): by file system, and by who uses them up.

    Every device is asked once, in a thread of its own, so that one which hangs costs itself only. Those of this node
    have their own few threads, so that no dead file server takes them. The writable layers of containers are
    counted by walking them in the background; project quotas are not read instead, which takes CAP_SYS_ADMIN and is
    set on hardly any layer. What a container writes to its volumes is in the volume's file system alone.
    """

    name = "inodes"
    metrics: ClassVar = (
        INODES,
        INODES_FREE,
        STUCK,
        SKIPPED,
        LAYER_INODES,
        LAYER_AGE,
        LAYER_CUT,
        OTHER_LAYERS,
        LAYERS,
    )
    signals: ClassVar = ("inodes_filesystems", "inodes_layers")

    def __init__(self, settings: Settings) -> None:
        """Start with nothing counted."""
        super().__init__(settings)
        self._local: Watchdog[_Found] = Watchdog(_PATIENCE, _MOST_HANGING)
        self._remote: Watchdog[_Found] = Watchdog(_PATIENCE, _MOST_HANGING)
        self._mount_points: dict[int, str] = {}
        self._layers = _Layers(settings.roots, settings.inodes_walk_interval)

    async def start(self) -> None:
        """Begin to count writable layers."""
        self._layers.start()

    async def stop(self) -> None:
        """End it."""
        await asyncio.to_thread(self._layers.stop)

    def read(self, node: Node) -> list[Family]:
        """Ask the file systems, and take what has been counted so far."""
        families: list[Family] = []
        with self.availability.reading("inodes_filesystems"):
            families += self._filesystems(node.roots)
        with self.availability.reading("inodes_layers"):
            families += self._counted(node)
        return families

    def _filesystems(self, roots: Roots) -> list[Family]:
        stuck: set[str] = set()
        skipped = dict.fromkeys(("covered", "unreadable", "crowded", "many"), 0)
        found: list[tuple[Mount, Inodes]] = []
        for device, mounts in _devices(roots.proc).items():
            local = os.major(device) != 0 or mounts[0].fstype in _LOCAL
            watchdog = self._local if local else self._remote
            question = _Question(roots.rootfs, mounts)
            try:
                answer = watchdog.ask(device, question.answer)
            except StuckError:
                stuck.add(mounts[0].mount_point)
                continue
            except CrowdedError:
                skipped["crowded"] += 1
                continue
            if answer.skipped:
                skipped[answer.skipped] += 1
            elif answer.inodes:
                found.append((answer.mount, answer.inodes))
        if not found and not stuck and skipped["unreadable"] + skipped["covered"]:
            raise Unavailable(Reason.NO_PERMISSION, "none of the node's file systems can be seen")
        self._mount_points = {inodes.device: mount.mount_point for mount, inodes in found}
        found.sort(key=lambda each: each[1].free / each[1].total)
        skipped["many"] = len(found[_MOST_FILESYSTEMS:])
        total, free = INODES.family(), INODES_FREE.family()
        for mount, inodes in found[:_MOST_FILESYSTEMS]:
            labels = (mount.source, mount.fstype, mount.mount_point)
            total.add(labels, inodes.total)
            free.add(labels, inodes.free)
        answering = {mount.mount_point for mount, _ in found[:_MOST_FILESYSTEMS]}
        states = Family(STUCK, [((place,), float(place in stuck)) for place in sorted(stuck | answering)])
        return [total, free, states, Family(SKIPPED, [((reason,), number) for reason, number in skipped.items()])]

    def _counted(self, node: Node) -> list[Family]:
        known = self._layers.known()
        owners = {workload.owner for workload in node.inventory().workloads}
        layers = [layer for owner, layer in known.counted.items() if owner in owners]
        layers.sort(key=lambda layer: layer.count.inodes, reverse=True)
        inodes, age, cut = LAYER_INODES.family(), LAYER_AGE.family(), LAYER_CUT.family()
        now = time.monotonic()
        for layer in layers[:_MOST_LAYERS]:
            labels = (*layer.owner.labels, self._mount_points.get(layer.count.device, ""))
            inodes.add(labels, layer.count.inodes)
            age.add(labels, now - layer.counted_at)
            cut.add(labels, 0 if layer.count.complete else 1)
        other = Family(OTHER_LAYERS, [((), sum(layer.count.inodes for layer in layers[_MOST_LAYERS:]))])
        states = {"counted": len(layers), **known.states}
        return [inodes, age, cut, other, Family(LAYERS, [((state,), number) for state, number in states.items()])]


def _devices(proc: str) -> dict[int, list[Mount]]:
    """Return where each real file system is mounted that can be written to, the likeliest place first."""
    try:
        mounts = read_mounts(proc, 1)
    except Vanished:
        raise Unavailable(Reason.NO_PERMISSION, f"{proc} does not show process 1, which sees all mounts") from None
    devices: dict[int, list[Mount]] = {}
    for mount in mounts:
        node_tmpfs = mount.fstype == "tmpfs" and mount.mount_point in _NODE_TMPFS
        if not mount.read_only and (node_tmpfs or mount.fstype not in {*_NOT_REAL, "tmpfs"}):
            devices.setdefault(mount.device, []).append(mount)
    for places in devices.values():
        places.sort(key=lambda mount: (mount.root != "/", len(mount.mount_point), mount.mount_point))
    return devices


@dataclass(frozen=True, slots=True)
class _Found:
    """What one file system answered: numbers, or why it is left out, or neither where inodes cannot run out."""

    mount: Mount
    inodes: Inodes | None = None
    skipped: str = ""


@dataclass(frozen=True, slots=True)
class _Question:
    """Asks one file system at the first of its mounts that shows it: what covers a mount would answer in its place."""

    rootfs: str
    mounts: Sequence[Mount]

    def answer(self) -> _Found:
        skipped = ""
        for mount in self.mounts:
            try:
                inodes = read_inodes(self.rootfs + mount.mount_point)
            except OSError:
                skipped = "unreadable"
                continue
            if inodes.total == 0:
                return _Found(mount)
            if inodes.device == mount.device:
                return _Found(mount, inodes)
            skipped = skipped or "covered"
        return _Found(self.mounts[0], None, skipped)


@dataclass(frozen=True, slots=True)
class _Layer:
    """The count of one writable layer. `counted_at` is of the monotonic clock, in seconds."""

    owner: Owner
    directory: str
    count: Count
    counted_at: float


@dataclass(frozen=True, slots=True)
class _Known:
    """What is known of all writable layers at one moment."""

    counted: Mapping[Owner, _Layer] = field(default_factory=dict)
    states: Mapping[str, int] = field(default_factory=lambda: dict.fromkeys(("pending", "unreadable", "none"), 0))


class _Layers:
    """Counts the inodes of writable layers in a thread of its own, round after round.

    A round has a budget, and so has a layer. Those that were counted longest ago come first, so that one round after
    the other all are counted, however many there are.
    """

    def __init__(self, roots: Roots, interval: int) -> None:
        self._roots = roots
        self._interval = interval
        self._known = _Known()
        self._failure: tuple[Reason, str] | None = None
        self._end = threading.Event()
        self._thread: threading.Thread | None = None

    def start(self) -> None:
        if self._interval and self._thread is None:
            self._thread = threading.Thread(target=self._run, name="shoal-layers", daemon=True)
            self._thread.start()

    def stop(self) -> None:
        self._end.set()
        if self._thread:
            self._thread.join(_PATIENCE)

    def known(self) -> _Known:
        """Return what is known so far. Raises `Unavailable` when the last round could not begin."""
        if not self._interval:
            raise Unavailable(Reason.NOT_ENABLED, "--inodes.walk-interval is 0")
        if self._failure:
            raise Unavailable(*self._failure)
        return self._known

    def _run(self) -> None:
        while not self._end.is_set():
            try:
                self.round()
                self._failure = None
            except Unavailable as error:
                self._failure = (error.reason, str(error))
            except ParseError as error:
                self._failure = (Reason.MALFORMED, str(error))
            except Exception as error:  # noqa: BLE001  (this round's failure is not the next one's)
                logger.warning("counting writable layers failed", extra={"detail": f"{type(error).__name__}: {error}"})
                self._failure = (Reason.COLLECTOR_FAILED, str(error))
            self._end.wait(self._interval)

    def round(self) -> None:
        """Find the layers of all containers, and count as many as there is time for."""
        directories, none, unreadable = self._find()
        counted = {
            owner: layer for owner, layer in self._known.counted.items() if directories.get(owner) == layer.directory
        }
        until = time.monotonic() + _ONE_ROUND
        refused = 0
        for owner in sorted(directories, key=lambda owner: counted[owner].counted_at if owner in counted else 0):
            if self._end.is_set() or time.monotonic() > until:
                break
            try:
                count = count_inodes(self._roots.rootfs + directories[owner], self._giving_up())
            except OSError:
                counted.pop(owner, None)
                refused += 1
                continue
            counted[owner] = _Layer(owner, directories[owner], count, time.monotonic())
        pending = len(directories) - len(counted) - refused
        unreadable += refused
        self._known = _Known(counted, {"pending": pending, "unreadable": unreadable, "none": none})

    def _giving_up(self) -> Callable[[], bool]:
        until = time.monotonic() + _ONE_LAYER
        return lambda: self._end.is_set() or time.monotonic() > until

    def _find(self) -> tuple[dict[Owner, str], int, int]:
        """Return where each container's writable layer is, and how many have none or could not be asked."""
        directories: dict[Owner, str] = {}
        none = unreadable = 0
        for owner, pids in Node(self._roots).processes().items():
            if self._end.is_set():
                break
            if not owner.container:
                continue
            try:
                directory = read_upper_directory(self._roots.proc, min(pids))
            except Vanished:
                continue
            except (Unavailable, ParseError):
                unreadable += 1
                continue
            if directory is None:
                none += 1
            elif not directory.startswith("/"):
                # Mounted from inside a directory that only the runtime knows, to keep the options below a page.
                unreadable += 1
            else:
                directories[owner] = directory
        return directories, none, unreadable
