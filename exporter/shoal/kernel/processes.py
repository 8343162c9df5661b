"""Process ids: whose they are, and what tells a process from a later one that was given the same id."""

from __future__ import annotations

import os

from shoal.kernel.files import ParseError, Reason, Unavailable, Vanished, read

__all__ = ["check_pid_namespace", "parse_start_time", "read_start_time"]

_STATE = 3
_START_TIME = 22


def check_pid_namespace(proc: str) -> None:
    """Raise `Unavailable` unless this proc knows processes by the ids that the kernel gives to the exporter.

    cgroup.procs and netlink name processes as the reader's own PID namespace does, /proc as the one does that it was
    mounted for. In a container that has the node's proc but not its PID namespace, one id means two processes.
    """
    try:
        known_as = os.readlink(f"{proc}/self")
    except OSError:
        known_as = ""
    if known_as != str(os.getpid()):
        raise Unavailable(Reason.NO_PERMISSION, f"the exporter is not in the PID namespace of {proc}")


def parse_start_time(data: bytes, file: str = "stat") -> int:
    """Return `starttime`, the 22nd field of /proc/<pid>/stat: clock ticks from boot to the start of the process.

    The second field is the command in brackets, and may itself hold spaces, brackets and line breaks.
    """
    fields = data[data.rfind(b")") + 1 :].split()
    try:
        return int(fields[_START_TIME - _STATE])
    except (IndexError, ValueError):
        raise ParseError(file, 1, f"at least {_START_TIME} fields, starttime a whole number") from None


def read_start_time(proc: str, pid: int) -> int:
    """Read when a process started: an id is given again, but not with the same start. Stays the same over an exec.

    Raises `Vanished`, `Unavailable` or `ParseError`.
    """
    path = f"{proc}/{pid}/stat"
    try:
        return parse_start_time(read(path), path)
    except Unavailable as error:
        if error.reason is Reason.NOT_IN_KERNEL:
            raise Vanished(f"process {pid} has ended") from None
        raise
