"""Failure 10: a container waits for a CPU that its neighbour holds, with no quota of its own.

Of all pods these have the smallest weights, so that the rest of the lab goes on. The victim has used a CPU before, as
a service has that was well: the exporter tells the use of a workload from its first second on, and the most starved of
all might not get that far. Where the CPU controller is on cgroup v1 the exporter cannot tell a quota from a neighbour,
and the alert is silent.
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
_WAITS_SECONDS: Final = 10


def starved(node: Node) -> Story:
    """A process that has a CPU to itself, until another pod's with twenty times its weight wants the same one."""
    with (
        node.pod("web-worker", limits={"cpu_weight": "1"}) as victim,
        node.pod("batch-import", limits={"cpu_weight": "20"}) as neighbour,
    ):
        cgroup = victim.container("app")
        victim.start(_spin())
        # On an emulated machine the rest of the lab holds the CPU that the neighbour wants, too.
        yield Culprit({**victim.labels, "container": "app"}, {"cg": str(cgroup)}, beside=(neighbour.labels,))
        spinner = neighbour.start(_spin())
        yield None
        neighbour.kill(spinner)
        yield None


def _spin(nice: int = 0) -> Callable[[], NoReturn]:
    def job() -> NoReturn:
        # Whatever the lab itself was started with.
        os.setpriority(os.PRIO_PROCESS, 0, nice)
        # Before it is the last in the queue.
        ready()
        os.sched_setaffinity(0, {_CPU})
        while True:
            pass

    return job


def own_quota(node: Node) -> Story:
    """A container spends a small quota of its own in every period, and is stopped until the next."""
    with node.pod("capped") as pod:
        cgroup = pod.container("app", cpu_max="10000 100000")
        yield Culprit(pod.labels, happened=lambda: _counter(cgroup / "cpu.stat", "nr_throttled") > 100)
        pod.start(_spin())
        yield None


def batch_at_nice_19(node: Node) -> Story:
    """A batch job that asked to wait, and does."""
    low = {"cpu_weight": "1"}
    with node.pod("nightly", limits=low) as pod, node.pod("daily", limits=low) as other:
        pids: list[int] = []
        yield Culprit(pod.labels, happened=lambda: _waited(pids[0]) > _WAITS_SECONDS)
        pids.append(pod.start(_spin(nice=19)))
        other.start(_spin(nice=19))
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
    signal="delays_throttling",
    story=starved,
    decoys=(Decoy(own_quota, right=("ShoalCPUThrottling",)), Decoy(batch_at_nice_19)),
    evidence=300,
    because="of five minutes, in which it ran before, it must have waited four fifths",
    confirm=(
        Shows(
            """grep -E 'usage|throttled' "$cg"/cpu.stat; cat $(sed 's,.*,/proc/&/schedstat,' "$cg"/cgroup.procs)""",
            r"^usage_usec \d+$.*^\d+ \d{10,} \d+$",
        ),
        Shows('cat "$cg"/cpu.pressure', r"some avg10=[4-9]\d\."),
    ),
    needs=(CPU_CONTROLLER,),
)
