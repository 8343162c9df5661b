"""Block devices: how often and for how long each wrote and flushed its cache, and which disks a device stands on."""

from __future__ import annotations

import os
from dataclasses import dataclass

from shoal.kernel.files import ParseError, lines, read, unavailable_from

__all__ = ["Disk", "disks_below", "parse_diskstats", "read_diskstats"]

_SHORTEST = 14
_WITH_FLUSHES = 20
# Of the counts, which begin behind the name.
_WRITES = 4
_WRITE_MILLISECONDS = 7
_MILLI = 1000
_DEEPEST = 8


@dataclass(frozen=True, slots=True)
class Disk:
    """One row of /proc/diskstats: the device, as a st_dev, and what writing to it and flushing it has cost.

    `writes` counts the writes that the device completed, `write_seconds` the time from each one's submission to its
    completion: more than a second a second where several are on their way. Of a partition and a mapped device they are
    its own, so that a mapping that is slow itself shows here and not at the disk below it.

    `flushes` counts the cache flushes that the disk completed, `flush_seconds` the time that they took. Both are
    None before 5.5, whose rows end earlier (14 columns, 18 since 4.18). The kernel merges flushes that wait for
    each other, and counts them where the queue of requests is: at the disk, never at a partition or a mapped device.
    Source: Documentation/admin-guide/iostats.rst, fields 5, 8, 16 and 17.
    """

    device: int
    writes: int
    write_seconds: float
    flushes: int | None
    flush_seconds: float | None


def parse_diskstats(data: bytes, file: str = "diskstats") -> dict[str, Disk]:
    """Return {name: disk}. Tolerates further columns; raises `ParseError` for a row of fewer than 14, as `lines`."""
    disks: dict[str, Disk] = {}
    for number, line in enumerate(lines(data, file), 1):
        fields = line.split()
        try:
            device = os.makedev(int(fields[0]), int(fields[1]))
            counts = [int(field) for field in fields[3:_WITH_FLUSHES]]
        except (IndexError, ValueError, OverflowError):
            raise ParseError(file, number, "major, minor, a name and whole numbers") from None
        if len(fields) < _SHORTEST:
            raise ParseError(file, number, f"at least {_SHORTEST} columns")
        flushes = flush_seconds = None
        if len(fields) >= _WITH_FLUSHES:
            flushes, flush_seconds = counts[-2], counts[-1] / _MILLI
        disks[os.fsdecode(fields[2])] = Disk(
            device, counts[_WRITES], counts[_WRITE_MILLISECONDS] / _MILLI, flushes, flush_seconds
        )
    return disks


def read_diskstats(proc: str) -> dict[str, Disk]:
    """Read /proc/diskstats. Raises `Unavailable` or `ParseError`."""
    path = f"{proc}/diskstats"
    return parse_diskstats(read(path), path)


def disks_below(sys: str, device: int) -> list[str]:
    """Return the names of the disks that a block device (a st_dev) stands on, as /proc/diskstats has them.

    A partition stands on its disk, a mapped or RAID device on all its members, a disk on itself. The files of
    <sys>/dev/block are links into the tree of devices (2.6.26). Raises `Unavailable` for a number without a device.
    """
    path = f"{sys}/dev/block/{os.major(device)}:{os.minor(device)}"
    try:
        os.readlink(path)
    except OSError as error:
        raise unavailable_from(error, path) from None
    return sorted(set(_disks(os.path.realpath(path), 0)))


def _disks(directory: str, depth: int) -> list[str]:
    if os.path.exists(f"{directory}/partition"):
        directory = os.path.dirname(directory)
    try:
        members = os.listdir(f"{directory}/slaves")
    except OSError:
        members = []
    if not members or depth == _DEEPEST:
        # sysfs cannot have a slash in a name, so it shows cciss/c0d0 as cciss!c0d0.
        return [os.path.basename(directory).replace("!", "/")]
    return [disk for name in members for disk in _disks(os.path.realpath(f"{directory}/slaves/{name}"), depth + 1)]
