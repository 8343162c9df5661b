"""A full Kubernetes node on this machine, in namespaces and cgroups of its own: what the exporter has to cope with.

    with full_node() as node:
        node.fill()
        subprocess.run(node.command("ss", "-tan"))

It has a process 1, a `/proc`, a network and a cgroup tree of its own, so nothing else that runs on the machine is
counted. Its pods are what a kubelet and containerd make of them, without the programs: a `sleep` in each container.
Its processes end with the Python that made it, also when that is killed; what is left then, empty cgroups, the next
one clears away.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from contextlib import contextmanager, suppress
from dataclasses import astuple, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Final, cast

import psutil

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence
    from typing import IO

__all__ = ["CONTAINERS", "FULL", "IDLE", "MONSTER", "PODS", "TIER_2", "TIER_3", "FullNode", "Size", "full_node"]

PODS: Final = 110
"""What a kubelet allows (maxPods)."""
CONTAINERS: Final = 250
"""Of all pods together; each pod has a sandbox besides, which holds its network namespace."""


@dataclass(frozen=True, slots=True)
class Size:
    """How much there is on a node."""

    pods: int
    containers: int
    listeners: int = 0
    """TCP, of all containers together; each has one at least."""
    crowds: int = 0
    """Places with ten thousand established TCP sockets: the node itself, which has as many in TIME_WAIT, then pods."""
    entries: int = 0
    """Of connection tracking, in the node's own table."""
    neighbours: int = 0
    """Of the node, beside its pods."""

    @property
    def sockets(self) -> int:
        """All TCP sockets but those that listen."""
        return (self.crowds + (self.crowds > 0)) * CROWD


CROWD: Final = 10_000
IDLE: Final = Size(0, 0)
FULL: Final = Size(PODS, CONTAINERS, listeners=2_000, crowds=4, entries=50_000, neighbours=1_000)
MONSTER: Final = Size(250, 1_000, listeners=2_000, crowds=19, entries=250_000, neighbours=1_000)

TIER_2: Final = ("--bounding-set=-all,+net_admin,+sys_ptrace", "--inh-caps=-all", "--no-new-privs")
TIER_3: Final = ("--bounding-set=-all,+net_admin,+sys_ptrace,+sys_admin", "--inh-caps=-all", "--no-new-privs")
"""Options of setpriv(1) for the privileges of the exporter, as design.md numbers them."""

REPOSITORY: Final = Path(__file__).parents[2]

_PREFIX: Final = "shoalnode"
# With --kill-child the first process, and with it all others, ends when unshare does; unshare ends when it is killed.
_UNSHARE: Final = ("unshare", "--mount", "--pid", "--net", "--cgroup", "--fork", "--kill-child", "--mount-proc")
_ENTER_CGROUP: Final = 'echo 0 >"$0/cgroup.procs" && exec "$@"'
_GIVE_UP: Final = 60.0


@dataclass(frozen=True, slots=True)
class FullNode:
    """A node that runs."""

    pid: int
    """Of its process 1, as this machine numbers it."""
    sandboxes: tuple[int, ...]
    """A process of each pod, first of those that `fill` puts sockets into."""
    _cgroup: Path
    _orders: IO[str]
    _answers: IO[str]

    def fill(self, size: Size = FULL) -> None:
        """Make the listeners, sockets, neighbours and entries of connection tracking."""
        self._order("fill", *astuple(size)[2:])

    def renew_time_wait(self) -> None:
        """Make the sockets in TIME_WAIT anew, which last for a minute."""
        self._order("renew")

    def begin_pod(self, number: int) -> None:
        """Start a pod more, with two containers. Numbers begin where those of the node's own pods end."""
        self._order("begin", number)

    def end_pod(self, number: int) -> None:
        """Kill a pod that `begin_pod` started, and remove all that was made for it."""
        self._order("end", number)

    def command(self, *command: str, privileges: Sequence[str] = ("--no-new-privs",)) -> list[str]:
        """Return the command that runs this one on the node, as a unit of systemd's."""
        enter = ("nsenter", f"--target={self.pid}", "--mount", "--pid", "--net", "--cgroup")
        # nsenter waits outside the PID namespace: in the unit's cgroup it would be a process without a number.
        unit = str(cgroup_mount() / "system.slice" / "shoal-exporter.service")
        place = ("sh", "-c", _ENTER_CGROUP, unit, "setpriv", *privileges)
        return ["sh", "-c", _ENTER_CGROUP, str(self._cgroup), *enter, *place, *command]

    def _order(self, order: str, *numbers: int) -> dict[str, list[int]]:
        self._orders.write(" ".join((order, *map(str, numbers))) + "\n")
        self._orders.flush()
        return _answer(self._answers)


@contextmanager
def full_node(pods: int = PODS, containers: int = CONTAINERS) -> Iterator[FullNode]:
    """Build a node, and take all of it down after the block. Needs root."""
    mount = cgroup_mount()
    for left in mount.glob(f"{_PREFIX}*.slice"):
        owner = left.name.removeprefix(_PREFIX).removesuffix(".slice")
        if not Path("/proc", owner).exists():
            remove_cgroups(left)
    top = mount / f"{_PREFIX}{os.getpid()}.slice"
    top.mkdir()
    inside = [sys.executable, "-m", "tests.bench.node_init", str(mount), str(top), str(pods), str(containers)]
    try:
        with subprocess.Popen(
            ["sh", "-c", _ENTER_CGROUP, str(top), *_UNSHARE, *inside],
            cwd=REPOSITORY,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        ) as process:
            orders, answers = cast("IO[str]", process.stdin), cast("IO[str]", process.stdout)
            try:
                ready = _answer(answers)
                first, processes = psutil.Process(process.pid).children()[0], _numbers_outside(top)
                yield FullNode(first.pid, tuple(processes[pid] for pid in ready["sandboxes"]), top, orders, answers)
            finally:
                process.kill()
    finally:
        remove_cgroups(top)


def _answer(answers: IO[str]) -> dict[str, list[int]]:
    line = answers.readline()
    if not line:
        raise RuntimeError("the node ended; what it said is above")
    return cast("dict[str, list[int]]", json.loads(line))


def _numbers_outside(top: Path) -> dict[int, int]:
    """Return {process id on the node: process id on this machine}."""
    found = {}
    for listing in top.rglob("cgroup.procs"):
        for pid in map(int, listing.read_text().split()):
            with suppress(FileNotFoundError):
                status = Path(f"/proc/{pid}/status").read_text()
                found[int(status.partition("NSpid:")[2].partition("\n")[0].split()[-1])] = pid
    return found


def cgroup_mount() -> Path:
    """Return where cgroup v2 is mounted, alone or beside v1."""
    for mount in (Path("/sys/fs/cgroup"), Path("/sys/fs/cgroup/unified")):
        if (mount / "cgroup.procs").exists():
            return mount
    raise RuntimeError("there is no cgroup v2 on this machine")


def remove_cgroups(top: Path) -> None:
    """End what still runs in these cgroups, and remove them."""
    until = time.monotonic() + _GIVE_UP
    for directory, _, _ in os.walk(top, topdown=False):
        while True:
            try:
                os.rmdir(directory)
            except FileNotFoundError:
                break
            except OSError:
                if time.monotonic() > until:
                    raise
                _kill(Path(directory))
                time.sleep(0.01)
            else:
                break


def _kill(cgroup: Path) -> None:
    with suppress(OSError):
        for pid in map(int, (cgroup / "cgroup.procs").read_text().split()):
            with suppress(ProcessLookupError):
                os.kill(pid, 9)
