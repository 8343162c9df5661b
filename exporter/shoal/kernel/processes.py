"""Processes: whose ids they are, what tells one from a later one of the same id, and whether one asked to wait."""

from __future__ import annotations

import os
from dataclasses import dataclass

from shoal.kernel.files import ParseError, Reason, Unavailable, Vanished, lines, read, whole

__all__ = ["Process", "check_pid_namespace", "check_processes_visible", "parse_process", "read_process"]

_STATE = 3
_NICE = 19
_START_TIME = 22
_POLICY = 41
# include/uapi/linux/sched.h
_SCHED_IDLE = 5


@dataclass(frozen=True, slots=True)
class Process:
    """What /proc/<pid>/stat says of a process by its first thread."""

    started: int
    """starttime: clock ticks from boot to its start. Stays the same over an exec."""
    niced: bool
    """Whether it asked to stand back: a nice value above 0, or the policy SCHED_IDLE."""


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


def check_processes_visible(proc: str) -> None:
    """Raise `Unavailable` where proc shows the exporter's own processes alone: mounted with hidepid, and no capability.

    Processes of others are then missing (hidepid=2 and 4) or closed (1), the first one among them. CAP_SYS_PTRACE, or
    the group that the option gid= names, opens them.
    """
    try:
        os.stat(f"{proc}/1/.")
    except OSError as error:
        if os.path.exists(f"{proc}/self/stat"):
            raise Unavailable(Reason.NO_PERMISSION, f"{proc} hides processes (hidepid): {error.strerror}") from None


def parse_process(data: bytes, file: str = "stat") -> Process:
    """Return `nice`, `starttime` and `policy`, the 19th, 22nd and 41st field of /proc/<pid>/stat. Raises `ParseError`.

    The second field is the command in brackets, and may itself hold spaces, brackets and line breaks.
    """
    # A command that has a line break in it leaves the last line whole.
    fields = lines(data, file)[-1].rpartition(b")")[2].split()
    try:
        nice, started, policy = (whole(fields[number - _STATE]) for number in (_NICE, _START_TIME, _POLICY))
    except (IndexError, ValueError):
        raise ParseError(file, 1, f"at least {_POLICY} fields, nice, starttime and policy whole numbers") from None
    return Process(started, niced=nice > 0 or policy == _SCHED_IDLE)


def read_process(proc: str, pid: int) -> Process:
    """Read a process: an id is given again, but not with the same start.

    Raises `Vanished`, `Unavailable` or `ParseError`.
    """
    path = f"{proc}/{pid}/stat"
    try:
        return parse_process(read(path), path)
    except Unavailable as error:
        if error.reason is Reason.NOT_IN_KERNEL:
            raise Vanished(f"process {pid} has ended") from None
        raise
