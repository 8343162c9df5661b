"""The tree of cgroup v2: where it is mounted and which cgroups exist."""

from __future__ import annotations

import os
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING

from shoal.kernel.files import (
    ParseError,
    Reason,
    Unavailable,
    Vanished,
    is_count,
    lines,
    raise_if_exhausted,
    read,
    unavailable_from,
)

if TYPE_CHECKING:
    from collections.abc import Iterator

__all__ = [
    "Cgroup",
    "Hierarchy",
    "find_hierarchy",
    "open_cgroup",
    "parse_process_cgroups",
    "parse_processes",
    "read_process_cgroups",
    "read_processes",
    "walk",
]

_DEEPEST = 32
_LEAF_LINKS = 2


@dataclass(frozen=True, slots=True)
class Hierarchy:
    """The mount point of cgroup v2 and whether the memory controller is on it.

    On a hybrid system v2 is mounted beside v1 at <sys>/fs/cgroup/unified and has pressure but no controllers.
    """

    mount: str
    memory: bool


@dataclass(frozen=True, slots=True)
class Cgroup:
    """One cgroup: `path` below the mount point ("/" for the root) and `id`, the inode of its directory.

    The id is what the kernel calls the cgroup id, and what socket dumps carry (INET_DIAG_CGROUP_ID).
    """

    path: str
    id: int
    children: bool


def find_hierarchy(sys: str) -> Hierarchy:
    """Find cgroup v2 below <sys>/fs/cgroup. Raises `Unavailable`, with CGROUP_V1 where only v1 is mounted."""
    refused: Unavailable | None = None
    for mount in (f"{sys}/fs/cgroup", f"{sys}/fs/cgroup/unified"):
        try:
            controllers = read(f"{mount}/cgroup.controllers").split()
        except Unavailable as error:
            if error.reason is not Reason.NOT_IN_KERNEL:
                refused = error
            continue
        return Hierarchy(mount, b"memory" in controllers)
    if refused:
        raise refused
    try:
        mounted = os.listdir(f"{sys}/fs/cgroup")
    except OSError as error:
        raise unavailable_from(error, f"{sys}/fs/cgroup") from None
    if mounted:
        raise Unavailable(Reason.CGROUP_V1, f"{sys}/fs/cgroup has cgroup v1 only")
    raise Unavailable(Reason.NOT_IN_KERNEL, f"no cgroup file system is mounted at {sys}/fs/cgroup")


def walk(mount: str) -> Iterator[Cgroup]:
    """Yield every cgroup below a mount point, parents before children, down to 32 levels.

    Only directories that have others below them are listed, and the listing carries type and inode. What vanishes
    while it is walked is left out. Raises `Unavailable` only when the mount point itself cannot be listed, or when
    there is no descriptor left to list anything with.
    """
    root = _children(mount)
    if isinstance(root, OSError):
        raise unavailable_from(root, mount) from None
    pending = [("", root, 0)]
    while pending:
        parent, names, depth = pending.pop()
        for name, inode in names:
            path = f"{parent}/{name}"
            below = _children(mount + path) if depth < _DEEPEST else []
            if isinstance(below, OSError):
                continue
            yield Cgroup(path, inode, children=bool(below))
            if below:
                pending.append((path, below, depth + 1))


def _children(directory: str) -> list[tuple[str, int]] | OSError:
    try:
        # kernfs gives a directory two links and one more for each directory in it. Most cgroups have none, and to
        # list one's 34 files and more takes five times as long. File systems that do not count say 1, and are listed.
        if os.stat(directory).st_nlink == _LEAF_LINKS:
            return []
        with os.scandir(directory) as entries:
            return [(entry.name, entry.inode()) for entry in entries if entry.is_dir(follow_symlinks=False)]
    except OSError as error:
        raise_if_exhausted(error, directory)
        return error


@contextmanager
def open_cgroup(directory: str) -> Iterator[int]:
    """Open a cgroup's directory, so that its files are found without walking the path again; yields the descriptor.

    A file that is missing because the cgroup has been removed raises `Vanished` out of the block, a file that
    this kernel does not have stays `Unavailable`.
    """
    try:
        fd = os.open(directory, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    except FileNotFoundError:
        raise Vanished(f"{directory} has been removed") from None
    except OSError as error:
        raise unavailable_from(error, directory) from None
    try:
        yield fd
    except Unavailable as error:
        if error.reason is Reason.NOT_IN_KERNEL and not os.access(directory, os.F_OK):
            raise Vanished(f"{directory} has been removed") from None
        raise
    finally:
        os.close(fd)


def parse_processes(data: bytes, file: str = "cgroup.procs") -> set[int]:
    """Return the process ids of a cgroup from its cgroup.procs (4.5), which may name one twice.

    0 is among them when the cgroup has a process for which the reader's own PID namespace has no id.
    """
    pids: set[int] = set()
    for number, line in enumerate(lines(data, file) if data else [], 1):
        if not is_count(line):
            raise ParseError(file, number, "a process id")
        pids.add(int(line))
    return pids


def read_processes(directory: str) -> set[int]:
    """Read cgroup.procs of one cgroup, those below it left out. Raises `Unavailable`, `Vanished` or `ParseError`.

    A threaded cgroup refuses (EOPNOTSUPP): its processes are listed in the cgroup that its threads belong to.
    """
    path = f"{directory}/cgroup.procs"
    return parse_processes(read(path), path)


def parse_process_cgroups(data: bytes, file: str = "cgroup") -> tuple[str, ...]:
    """Return the paths of a process from /proc/<pid>/cgroup, each once: of cgroup v2 (`0::`), then of v1's hierarchies.

    Seen from another cgroup namespace a path begins with one /.. for each level above the reader's root.
    Bytes that are no UTF-8 are kept as surrogates, as the names in a directory listing are.
    """
    paths: dict[str, None] = {}
    for number, line in enumerate(lines(data, file), 1):
        hierarchy, _, rest = line.partition(b":")
        path = os.fsdecode(rest.partition(b":")[2])
        if not hierarchy.isdigit() or not path.startswith("/"):
            raise ParseError(file, number, "the number of a hierarchy, its controllers and a path")
        paths = {path: None} | paths if hierarchy == b"0" else paths | {path: None}
    return tuple(paths)


def read_process_cgroups(proc: str, pid: int) -> tuple[str, ...]:
    """Read /proc/<pid>/cgroup. Raises `Unavailable`, `Vanished` or `ParseError`."""
    path = f"{proc}/{pid}/cgroup"
    return parse_process_cgroups(read(path), path)
