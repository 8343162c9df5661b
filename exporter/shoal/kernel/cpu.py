"""CPU of one cgroup v2: what it used, its quota, and for how long the quota stopped it."""

from __future__ import annotations

from dataclasses import dataclass

from shoal.kernel.files import ParseError, Reason, Unavailable, is_count, lines, parse_flat_keyed, read

__all__ = ["CpuStat", "parse_cpu_max", "parse_cpu_stat", "read_cpu_burst", "read_cpu_max", "read_cpu_stat"]

_MICRO = 1_000_000


@dataclass(frozen=True, slots=True)
class CpuStat:
    """What was used, and what the quota did, from cpu.stat (4.15).

    The quota is the cgroup's own alone, not its ancestors' or descendants'; the use has its descendants in it.
    """

    usage: float
    """usage_usec, in seconds."""
    periods: int
    """nr_periods: enforcement periods in which the cgroup had something to run, since it has a quota."""
    throttled_periods: int
    """nr_throttled: those of them in which it was stopped."""
    throttled: float
    """throttled_usec, in seconds: summed over CPUs, so that it can be more than the time that passed."""
    burst_periods: int | None
    """nr_bursts: periods in which it ran over its quota with what it had saved. None before 5.14."""
    burst: float | None
    """burst_usec, in seconds: what it ran over its quota. None before 5.14."""


def parse_cpu_stat(data: bytes, file: str = "cpu.stat") -> CpuStat | None:
    """Return what the quota did, or None where the cpu controller is not enabled: there is usage alone."""
    stat = parse_flat_keyed(data, file)
    if "nr_periods" not in stat:
        return None
    for key in ("usage_usec", "nr_throttled", "throttled_usec"):
        if key not in stat:
            raise ParseError(file, 0, f"{key} beside nr_periods")
    burst = stat.get("burst_usec")
    return CpuStat(
        usage=stat["usage_usec"] / _MICRO,
        periods=stat["nr_periods"],
        throttled_periods=stat["nr_throttled"],
        throttled=stat["throttled_usec"] / _MICRO,
        burst_periods=stat.get("nr_bursts"),
        burst=None if burst is None else burst / _MICRO,
    )


def read_cpu_stat(dir_fd: int) -> CpuStat | None:
    """Read cpu.stat of an open cgroup directory. Raises `Unavailable`, `Vanished` or `ParseError`."""
    return parse_cpu_stat(read("cpu.stat", dir_fd=dir_fd))


def parse_cpu_max(data: bytes, file: str = "cpu.max") -> float | None:
    """Return the quota in CPUs (microseconds allowed by microseconds of a period), or None for `max`, no quota."""
    (line, *more) = lines(data, file)
    fields = line.split()
    if more or len(fields) != 2 or not is_count(fields[1]) or int(fields[1]) == 0:  # noqa: PLR2004  (quota and period)
        raise ParseError(file, 1, "a quota or the word max, and a period")
    if fields[0] == b"max":
        return None
    if not is_count(fields[0]):
        raise ParseError(file, 1, "a quota or the word max, and a period")
    return int(fields[0]) / int(fields[1])


def read_cpu_max(dir_fd: int) -> float | None:
    """Read cpu.max of an open cgroup directory. Raises `Unavailable`, `Vanished` or `ParseError`."""
    return parse_cpu_max(read("cpu.max", dir_fd=dir_fd))


def read_cpu_burst(dir_fd: int) -> bool:
    """Tell from cpu.max.burst (5.14) of an open cgroup directory whether unused quota is saved at all."""
    try:
        return read("cpu.max.burst", dir_fd=dir_fd).strip() not in (b"", b"0")
    except Unavailable as error:
        if error.reason is Reason.NOT_IN_KERNEL:
            return False
        raise
