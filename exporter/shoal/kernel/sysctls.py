"""Kernel settings that are one whole number: /proc/sys. They are read, and never written."""

from __future__ import annotations

from shoal.kernel.files import ParseError, lines, read, whole

__all__ = ["parse_sysctl", "read_sysctl"]


def parse_sysctl(data: bytes, file: str = "sysctl") -> int:
    """Return the number of a one-number sysctl. Raises `ParseError` for anything else."""
    try:
        (line,) = lines(data, file)
        return whole(line)
    except ValueError:
        raise ParseError(file, 1, "one whole number") from None


def read_sysctl(proc: str, name: str) -> int:
    """Read a sysctl by its path below /proc/sys, such as "net/core/somaxconn".

    Everything below net/ answers for the network namespace of the reader, whichever proc is mounted where.
    Raises `Unavailable` or `ParseError`.
    """
    path = f"{proc}/sys/{name}"
    return parse_sysctl(read(path), path)
