"""What is mounted where: /proc/<pid>/mountinfo, in the eyes of one process."""

from __future__ import annotations

import os
import re
from dataclasses import dataclass

from shoal.kernel.files import ParseError, Reason, Unavailable, Vanished, lines, read

__all__ = [
    "Mount",
    "parse_mountinfo",
    "parse_upper_directory",
    "read_mounts",
    "read_upper_directory",
    "upper_directory",
]

_ESCAPE = re.compile(rb"\\([0-3][0-7]{2})")
_BACKSLASH = re.compile(r"\\(.)", re.DOTALL)
_DEVICE = re.compile(rb"(\d{1,9}):(\d{1,9})\Z")
# Before the optional fields: ids of mount and parent, device, root, mount point, options.
_FIXED = 6
_MOUNT_POINT = 4
# After the "-" that ends them: type, source, options of the file system.
_LAST = 3


@dataclass(frozen=True, slots=True)
class Mount:
    """One row of mountinfo (2.6.26). Two mounts with one `device` are one file system, seen at two places."""

    device: int
    """What stat calls st_dev of everything on it, but for btrfs, whose subvolumes have numbers of their own."""
    root: str
    """The directory of the file system that is mounted; not "/" for a bind mount of a part of it."""
    mount_point: str
    read_only: bool
    """This mount, or the whole file system, cannot be written to."""
    fstype: str
    source: str
    options: tuple[str, ...]
    """The file system's own options, still with octal escapes."""


def _unescape(field: bytes) -> str:
    r"""Undo \040 and the like, with which the kernel writes blanks, line breaks, backslashes and #."""
    return os.fsdecode(_ESCAPE.sub(lambda match: bytes([int(match[1], 8)]), field))


def parse_mountinfo(data: bytes, file: str = "mountinfo") -> list[Mount]:
    """Return the mounts in the kernel's order. Optional fields, known or not, are passed over.

    Paths that are no UTF-8 keep their bytes as surrogates, as in a directory listing.
    """
    mounts: list[Mount] = []
    for number, line in enumerate(lines(data, file), 1):
        fields = line.split(b" ")
        try:
            end = fields.index(b"-", _FIXED)
            fstype, source, options = fields[end + 1 : end + 1 + _LAST]
            device = _DEVICE.match(fields[2])
        except ValueError:
            raise ParseError(file, number, "six fields, optional ones, a dash and three more") from None
        if not device:
            raise ParseError(file, number, "a device as major:minor in the third field")
        mounts.append(
            Mount(
                device=os.makedev(int(device[1]), int(device[2])),
                root=_unescape(fields[3]),
                mount_point=_unescape(fields[4]),
                read_only=b"ro" in fields[5].split(b",") or b"ro" in options.split(b","),
                fstype=_unescape(fstype),
                source=_unescape(source),
                options=tuple(os.fsdecode(options).split(",")),
            )
        )
    if not mounts:
        raise ParseError(file, 0, "at least one mount")
    return mounts


def read_mounts(proc: str, pid: int) -> list[Mount]:
    """Read what a process sees mounted below its root. Needs no capability.

    Raises `Vanished`, `Unavailable` or `ParseError`.
    """
    return parse_mountinfo(*_read(proc, pid))


def upper_directory(mounts: list[Mount]) -> str | None:
    """Return where an overlay mounted at / keeps what is written to it; None for any other root.

    The path is that of the process which mounted it: the runtime's, so usually the node's. The kernel shows it as it
    was given, with a backslash before what means something to overlayfs (seen on 6.18).
    """
    roots = [mount for mount in mounts if mount.mount_point == "/"]
    if not roots or roots[-1].fstype != "overlay":
        return None
    for option in roots[-1].options:
        if option.startswith("upperdir="):
            return _BACKSLASH.sub(r"\1", _unescape(os.fsencode(option.removeprefix("upperdir="))))
    return None


def parse_upper_directory(data: bytes, file: str = "mountinfo") -> str | None:
    """Return the same from a whole mountinfo. Of the hundreds of mounts that it may have, that at / is decoded."""
    rows = [
        line + b"\n" for line in lines(data, file) if line.split(b" ", _MOUNT_POINT + 1)[_MOUNT_POINT:][:1] == [b"/"]
    ]
    return upper_directory(parse_mountinfo(b"".join(rows), file))


def read_upper_directory(proc: str, pid: int) -> str | None:
    """Read where what a process writes to its root is kept. Raises as `read_mounts`."""
    return parse_upper_directory(*_read(proc, pid))


def _read(proc: str, pid: int) -> tuple[bytes, str]:
    path = f"{proc}/{pid}/mountinfo"
    try:
        return read(path), path
    except Unavailable as error:
        if error.reason is Reason.NOT_IN_KERNEL:
            raise Vanished(f"process {pid} has ended") from None
        raise
