"""Run queues: for how long threads, or all that ran on a CPU, were runnable and waited for one.

A wait is counted when it ends, so that a thread which has waited for a minute and still does shows none of it.
"""

from __future__ import annotations

import os

from shoal.kernel.files import ParseError, Reason, Unavailable, Vanished, is_count, lines, read, unavailable_from

__all__ = ["parse_schedstat", "parse_task_schedstat", "read_schedstat", "read_task_schedstats"]

_NANO = 1_000_000_000
_TASK_WAITED = 1
_TASK_FIELDS = 3
# cpu<N>, nine columns: the seventh is time running, the eighth time waiting, the ninth slices.
_CPU_WAITED = 8
_CPU_FIELDS = 10


def parse_task_schedstat(data: bytes, file: str = "schedstat") -> float:
    """Return how long one thread has waited for a CPU since it started: seconds.

    /proc/<pid>/task/<tid>/schedstat (2.6.23) has three numbers: ns running, ns waiting, and slices run.
    """
    fields = lines(data, file)[0].split()[:_TASK_FIELDS]
    if len(fields) < _TASK_FIELDS or not all(map(is_count, fields)):
        raise ParseError(file, 1, "three whole numbers")
    return int(fields[_TASK_WAITED]) / _NANO


def read_task_schedstats(proc: str, pid: int) -> dict[int, float]:
    """Read {thread id: seconds waited for a CPU} of the living threads of a process.

    /proc/<pid>/schedstat is not enough: it has the first thread alone. Raises `Vanished` when the process has ended,
    `Unavailable` (NOT_IN_KERNEL where neither CONFIG_SCHEDSTATS nor CONFIG_TASK_DELAY_ACCT is built) or `ParseError`.
    """
    directory = f"{proc}/{pid}/task"
    waited: dict[int, float] = {}
    missing: Unavailable | None = None
    for name in _threads(directory):
        path = f"{directory}/{name}/schedstat"
        try:
            waited[int(name)] = parse_task_schedstat(read(path), path)
        except Vanished:
            continue
        except Unavailable as error:
            if error.reason is not Reason.NOT_IN_KERNEL:
                raise
            missing = error
    if missing and not waited and os.path.exists(f"{proc}/{pid}/stat"):
        raise missing
    if not waited:
        raise Vanished(f"process {pid} has ended")
    return waited


def _threads(directory: str) -> list[str]:
    try:
        return [name for name in os.listdir(directory) if name.isdecimal()]
    except FileNotFoundError:
        raise Vanished(f"{directory} has gone with its process") from None
    except OSError as error:
        raise unavailable_from(error, directory) from None


def parse_schedstat(data: bytes, file: str = "schedstat") -> dict[str, float]:
    """Return {cpu: seconds that tasks waited in its run queue} from /proc/schedstat.

    Versions 15 (5.10, 6.1) and 16 (6.12) differ in the rows of scheduling domains only, which are passed over.
    A CPU that is off line has no row.
    """
    waited: dict[str, float] = {}
    for number, line in enumerate(lines(data, file), 1):
        if not line.startswith(b"cpu"):
            continue
        fields = line.split()
        if len(fields) < _CPU_FIELDS or not is_count(fields[_CPU_WAITED]):
            raise ParseError(file, number, "cpu<N> and nine whole numbers")
        waited[fields[0].decode("ascii", "replace")] = int(fields[_CPU_WAITED]) / _NANO
    if not waited:
        raise ParseError(file, 0, "a row for at least one CPU")
    return waited


def read_schedstat(proc: str) -> dict[str, float]:
    """Read /proc/schedstat. Raises `Unavailable` (NOT_IN_KERNEL without CONFIG_SCHEDSTATS) or `ParseError`."""
    path = f"{proc}/schedstat"
    return parse_schedstat(read(path), path)
