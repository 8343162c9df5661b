"""Failure 6: memory.high puts a container to sleep at every allocation, and nothing is killed."""

from __future__ import annotations

import mmap
from typing import TYPE_CHECKING, Final

from tests.lab.disk import disk, random_file
from tests.lab.fault import Culprit, Decoy, Fault, Shows
from tests.lab.faults.oom_kill import read_again_and_again
from tests.lab.features import MEMORY_CONTROLLER
from tests.lab.node import ready

if TYPE_CHECKING:
    from pathlib import Path

    from tests.lab.fault import Story
    from tests.lab.node import Node

_MIB: Final = 1 << 20


def throttled(node: Node) -> Story:
    """A heap of 60 MiB over a memory.high of 30, with no swap to put it: reclaim is in vain, and throttles."""
    with node.pod("api") as pod:
        cgroup = pod.container("app", memory_high=str(30 * _MIB))
        culprit = Culprit({**pod.labels, "container": "app"})
        yield culprit
        pid = pod.start(_outgrow)
        culprit.instead["<pid>"] = str(pid)
        yield None
        (cgroup / "memory.high").write_text("max")
        yield None


def _outgrow() -> None:
    ready()
    while True:
        memory = mmap.mmap(-1, 60 * _MIB, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
        for offset in range(0, len(memory), mmap.PAGESIZE):
            memory[offset] = 1
        memory.close()


def harmless_high(node: Node) -> Story:
    """A reader of files at its memory.high: `high` events all the time, and hardly a stall."""
    with disk("high", 96) as place, node.pod("log-reader") as pod:
        file = random_file(place / "data", 64)
        cgroup = pod.container("app", memory_high=str(24 * _MIB))
        yield Culprit({**pod.labels, "container": "app"}, happened=lambda: _high_events(cgroup) > 10)
        pod.start(read_again_and_again(file, pause=10))
        yield None


def _high_events(cgroup: Path) -> int:
    events = dict(line.split() for line in (cgroup / "memory.events").read_text().splitlines())
    return int(events["high"])


FAULT = Fault(
    number=6,
    title="memory.high throttles without a kill",
    alert="ShoalMemoryHighThrottling",
    signal="memory_workloads",
    story=throttled,
    decoys=(Decoy(harmless_high),),
    evidence=180,
    because="the stall must be three tenths of five minutes, which are looked at once a minute",
    confirm=(
        Shows("cg=/sys/fs/cgroup$(cut -d: -f3 /proc/<pid>/cgroup)", ""),
        Shows('cat "$cg"/memory.current "$cg"/memory.high', r"^\d{8,}\n31457280$"),
        Shows(
            'grep high "$cg"/memory.events; sleep 10; grep high "$cg"/memory.events',
            r"high (?P<before>\d+)\nhigh (?!(?P=before)\n)\d+",
        ),
        Shows('cat "$cg"/memory.pressure', r"some avg10=[1-9]\d+\.\d+ .*full avg10=[1-9]"),
    ),
    needs=(MEMORY_CONTROLLER,),
)
