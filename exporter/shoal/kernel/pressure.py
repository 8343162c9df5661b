"""Pressure stall information: for how long tasks waited for CPU, memory or I/O, of the node or of one cgroup."""

from __future__ import annotations

from dataclasses import dataclass

from shoal.kernel.files import ParseError, Reason, Unavailable, is_count, lines, read

__all__ = ["Pressure", "check_pressure", "parse_pressure", "read_pressure"]

_MICRO = 1_000_000


@dataclass(frozen=True, slots=True)
class Pressure:
    """Cumulated stall times of one resource, in seconds.

    `some`: at least one task waited; `full`: all non-idle tasks waited at once. None where the kernel has no
    such line: `irq` has no `some` (6.1), the node's `cpu` had no `full` before 5.13.
    Source: /proc/pressure/<resource> (4.20) and <cgroup>/<resource>.pressure (4.20).
    """

    some: float | None
    full: float | None


def parse_pressure(data: bytes, file: str = "pressure") -> Pressure:
    """Read `some avg10=.. avg60=.. avg300=.. total=<microseconds>` and the same with `full`.

    The averages are left alone: they are windows of the kernel's choosing, `total` has all of it.
    Lines that start otherwise are skipped. Raises `ParseError` when neither is there or a total is no number.
    """
    found: dict[bytes, float] = {}
    for number, line in enumerate(lines(data, file), 1):
        kind, _, rest = line.partition(b" ")
        if kind not in (b"some", b"full"):
            continue
        _, _, total = rest.partition(b"total=")
        digits = total.split(b" ", 1)[0]
        if not is_count(digits):
            raise ParseError(file, number, "total=<microseconds>")
        found[kind] = int(digits) / _MICRO
    if not found:
        raise ParseError(file, 0, "a line that starts with some or full")
    return Pressure(found.get(b"some"), found.get(b"full"))


def check_pressure(proc: str) -> None:
    """Raise `Unavailable` with DISABLED if this kernel was started with psi=0.

    Its files are then missing, as they are in a kernel without PSI (5.10 to 6.12); only the command line tells.
    """
    try:
        arguments = read(f"{proc}/cmdline").split()
    except Unavailable:
        return
    if b"psi=0" in arguments:
        raise Unavailable(Reason.DISABLED, "psi=0 on the kernel's command line switches pressure stall information off")


def read_pressure(path: str, *, dir_fd: int | None = None) -> Pressure:
    """Read one pressure file. Raises `Unavailable`, `Vanished` or `ParseError`.

    A cgroup has none when its cgroup.pressure is 0 (6.1), and one that gives ENOTSUP under psi=0 on 5.10.
    """
    return parse_pressure(read(path, dir_fd=dir_fd), path)
