"""The roots under which the kernel's files are found, whole-file reads, shared formats, and every reader's errors.

A file that is not there is a fact about this kernel, not a failure: it becomes `Unavailable` with one of a
fixed set of reasons, and ends as an absent signal.
"""

from __future__ import annotations

import errno
import os
import re
from dataclasses import dataclass
from enum import StrEnum

__all__ = [
    "ParseError",
    "Reason",
    "Roots",
    "Unavailable",
    "Vanished",
    "hexadecimal",
    "is_count",
    "lines",
    "parse_flat_keyed",
    "raise_if_exhausted",
    "read",
    "unavailable_from",
    "whole",
]

_CHUNK = 64 * 1024
_LIMIT = 16 * 1024 * 1024
# The kernel's numbers have 64 bits. int() takes much more: underscores, a plus, thousands of digits.
_LARGEST = b"%d" % (2**64 - 1)
_DIGITS = len(_LARGEST)
_HEXADECIMAL = re.compile(rb"[0-9a-fA-F]{1,16}")


class Reason(StrEnum):
    """Why a signal is absent: the fixed set of values of the label `reason`."""

    NOT_IN_KERNEL = "not_in_kernel"
    """This kernel is too old for it, was built without it, or has not loaded the module."""
    DISABLED = "disabled"
    """The kernel has it and was told not to count, by a boot parameter or a sysctl."""
    NOT_ENABLED = "not_enabled"
    """The exporter was not asked for it: an option of its own is off, or names nothing."""
    CGROUP_V1 = "cgroup_v1"
    """Only the unified hierarchy (cgroup v2) gives it, and the controller is not there."""
    NO_PERMISSION = "no_permission"
    """The kernel refused: a capability or a mount is missing."""
    MALFORMED = "malformed"
    """The kernel gave something that is not understood; a newer or damaged format."""
    NOT_READABLE = "not_readable"
    """Reading failed for any other reason, such as no free file descriptor."""
    COLLECTOR_FAILED = "collector_failed"
    """The collector raised or did not finish within the scrape's deadline."""


class Unavailable(Exception):  # noqa: N818  (absence is an answer here, not an error)
    """A signal cannot be had here. `reason` is the label value; `str()` is a sentence for a person."""

    def __init__(self, reason: Reason, detail: str) -> None:
        """Keep the reason beside a sentence that names what was tried."""
        super().__init__(detail)
        self.reason = reason


class ParseError(Exception):
    """The kernel gave a line that is short or malformed. `str()` names file, line and what was expected."""

    def __init__(self, file: str, line: int, expected: str) -> None:
        """Keep the place (`line` counts from 1; 0 is the file as a whole) and what should have been there."""
        place = f"{file}, line {line}" if line else file
        super().__init__(f"{place}: expected {expected}")
        self.file = file
        self.line = line
        self.expected = expected


class Vanished(Exception):  # noqa: N818  (what it belonged to ended between two reads; nobody's error)
    """The cgroup or process that a file belongs to went away between two reads."""


@dataclass(frozen=True, slots=True)
class Roots:
    """Where procfs, sysfs and the root file system are mounted, without a trailing slash ("" for /)."""

    proc: str = "/proc"
    sys: str = "/sys"
    rootfs: str = ""


def unavailable_from(error: OSError, path: str) -> Unavailable | Vanished:
    """Translate what the kernel answered for `path` into the exception that a reader should raise.

    ENODEV is what kernfs gives for a file of a removed cgroup, ESRCH what procfs gives for an ended process
    (both seen on 5.10 to 6.18); EOPNOTSUPP is /proc/pressure under psi=0.
    """
    if error.errno in (errno.ENODEV, errno.ESRCH):
        return Vanished(f"{path} belongs to something that has ended")
    if error.errno in (errno.ENOENT, errno.ENOTDIR):
        return Unavailable(Reason.NOT_IN_KERNEL, f"{path} does not exist")
    if error.errno in (errno.EACCES, errno.EPERM):
        return Unavailable(Reason.NO_PERMISSION, f"{path} may not be read: {error.strerror}")
    if error.errno == errno.EOPNOTSUPP:
        return Unavailable(Reason.DISABLED, f"{path} is switched off in this kernel")
    return Unavailable(Reason.NOT_READABLE, f"{path} cannot be read: {error.strerror}")


def raise_if_exhausted(error: OSError, path: str) -> None:
    """Raise `Unavailable` where the exporter or the machine had nothing left to open `path` with.

    That says nothing of what is there: who takes it for an empty directory takes a pod's name from it.
    """
    if error.errno in (errno.EMFILE, errno.ENFILE, errno.ENOMEM):
        raise unavailable_from(error, path)


def read(path: str, *, dir_fd: int | None = None) -> bytes:
    """Return the whole content of a kernel file, relative to an open directory when `dir_fd` is given.

    Never stats first: a kernel file's size says nothing, and it may be gone by then. procfs hands out long
    files in pieces, so it is read until it says that it is at its end. Raises `Unavailable` or `Vanished`;
    a file of over 16 MiB is no kernel file and is refused.
    """
    try:
        fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NOCTTY | os.O_NONBLOCK, dir_fd=dir_fd)
    except OSError as error:
        raise unavailable_from(error, path) from None
    try:
        data = os.read(fd, _CHUNK)
        if not data:
            return b""
        pieces = [data]
        total = len(data)
        while piece := os.read(fd, _CHUNK):
            total += len(piece)
            if total > _LIMIT:
                raise Unavailable(Reason.NOT_READABLE, f"{path} is larger than any kernel file ({_LIMIT} bytes)")
            pieces.append(piece)
        return b"".join(pieces)
    except OSError as error:
        raise unavailable_from(error, path) from None
    finally:
        os.close(fd)


def lines(data: bytes, file: str) -> list[bytes]:
    """Return the lines of a kernel file, which all end in a newline.

    Raises `ParseError` for an empty file and for one cut short: half of a number is a wrong number.
    """
    if not data.endswith(b"\n"):
        found = "the file cut short" if data else "an empty file"
        raise ParseError(file, data.count(b"\n") + 1, f"whole lines, found {found}")
    return data.split(b"\n")[:-1]


def is_count(field: bytes) -> bool:
    """Tell whether this is a number of at least 0 as the kernel prints one."""
    return field.isdigit() and (len(field) < _DIGITS or (len(field) == _DIGITS and field <= _LARGEST))


def whole(field: bytes) -> int:
    """Return a number that may be below 0, as the kernel prints one. Raises `ValueError` for anything else."""
    if not is_count(field.removeprefix(b"-")):
        raise ValueError(field[:_DIGITS])
    return int(field)


def hexadecimal(field: bytes) -> int:
    """Return a hexadecimal number as the kernel prints one. Raises `ValueError` for anything else."""
    if not _HEXADECIMAL.fullmatch(field):
        raise ValueError(field[:_DIGITS])
    return int(field, 16)


def parse_flat_keyed(data: bytes, file: str) -> dict[str, int]:
    """Return {key: number} of a file of `key value` lines, as /proc/vmstat and cgroup v2's flat keyed files are.

    Further columns are tolerated. Raises `ParseError` on a line without a whole number, and as `lines`.
    """
    rows: dict[str, int] = {}
    for number, line in enumerate(lines(data, file), 1):
        fields = line.split()
        try:
            # There are thousands of them, and a call for each takes half as long again.
            plain = fields[1].isdigit() and len(fields[1]) < _DIGITS
            rows[fields[0].decode()] = int(fields[1]) if plain else whole(fields[1])
        except (IndexError, ValueError):
            raise ParseError(file, number, "a key and a whole number") from None
    return rows
