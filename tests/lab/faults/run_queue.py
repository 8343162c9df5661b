"""Failure 10: a container waits for a CPU that its neighbour holds, with no quota of its own.

All of it is held down to a small part of one CPU, so that what else the node does goes on: with the CPU controller of
whichever cgroup version has it, in a way that leaves the victim the smallest share.
"""

from __future__ import annotations

import os
from typing import TYPE_CHECKING, Final, NoReturn

from tests.lab.fault import Culprit, Decoy, Fault, Shows
from tests.lab.features import CPU_CONTROLLER
from tests.lab.node import ready

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

    from tests.lab.fault import Story
    from tests.lab.node import Node

_CPU: Final = max(os.sched_getaffinity(0))
_SPINNERS: Final = 12


def starved(node: Node) -> Story:
    """One process that wants a CPU, and twelve of another pod on the same one."""
    with node.pod("web-worker") as victim, node.pod("batch-import") as neighbour:
        cgroup = victim.container("app")
        yield Culprit({**victim.labels, "container": "app"}, {"cg": str(cgroup)})
        small = _hold_down(node, victim.cgroup, neighbour.cgroup)
        victim.start(_spin(small))
        spinners = [neighbour.start(_spin(small)) for _ in range(_SPINNERS)]
        yield None
        for spinner in spinners:
            neighbour.kill(spinner)
        yield None


def _hold_down(node: Node, victim: Path, neighbour: Path) -> Path | None:
    """Give both little of the CPU; return the cgroup of version 1 to enter, where that has the controller."""
    if not CPU_CONTROLLER.missing():
        (victim / "cpu.weight").write_text("1")
        (neighbour / "cpu.weight").write_text("20")
        return None
    small = node.cgroup_v1("cpu")
    (small / "cpu.shares").write_text("100")
    return small


def _spin(small: Path | None, nice: int = 0) -> Callable[[], NoReturn]:
    def job() -> NoReturn:
        if small:
            (small / "cgroup.procs").write_text("0")
        os.sched_setaffinity(0, {_CPU})
        # Whatever the lab itself was started with.
        os.setpriority(os.PRIO_PROCESS, 0, nice)
        ready()
        while True:
            pass

    return job


def own_quota(node: Node) -> Story:
    """A container spends a small quota of its own in every period, and is stopped until the next."""
    with node.pod("capped") as pod:
        cgroup = pod.container("app", cpu_max="10000 100000")
        yield Culprit(pod.labels, happened=lambda: _counter(cgroup / "cpu.stat", "nr_throttled") > 100)
        pod.start(_spin(None))
        yield None


def batch_at_nice_19(node: Node) -> Story:
    """A batch job that asked to wait, and does."""
    with node.pod("nightly") as pod:
        pids: list[int] = []
        yield Culprit(pod.labels, happened=lambda: _waited(pids[0]) > 10)
        pids.append(pod.start(_spin(None if not CPU_CONTROLLER.missing() else node.cgroup_v1("cpu"), nice=19)))
        yield None


def _counter(file: Path, name: str) -> int:
    return int(dict(line.split() for line in file.read_text().splitlines())[name])


def _waited(pid: int) -> float:
    """Return how many seconds a process has waited in a run queue."""
    with open(f"/proc/{pid}/schedstat", encoding="ascii") as file:
        return int(file.read().split()[1]) / 1e9


FAULT = Fault(
    number=10,
    title="Neighbours hold the CPU that a container waits for",
    alert="ShoalCPUStarvation",
    signal="delays_run_queue",
    story=starved,
    decoys=(Decoy(own_quota, needs=(CPU_CONTROLLER,)), Decoy(batch_at_nice_19)),
    confirm=(
        Shows(
            """grep -E 'usage|throttled' "$cg"/cpu.stat; cat $(sed 's,.*,/proc/&/schedstat,' "$cg"/cgroup.procs)""",
            r"^usage_usec \d+$.*^\d+ \d{10,} \d+$",
        ),
        Shows('cat "$cg"/cpu.pressure', r"some avg10=[4-9]\d\."),
    ),
)
