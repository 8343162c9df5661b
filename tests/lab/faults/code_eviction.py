"""Failure 8: a scan fills a container's limit with page cache, and its own mapped code is evicted over and over."""

from __future__ import annotations

import mmap
import random
import time
from typing import TYPE_CHECKING, Final

from tests.lab.disk import disk, random_file
from tests.lab.fault import Culprit, Decoy, Fault, Shows
from tests.lab.faults.oom_kill import read_again_and_again
from tests.lab.features import MEMORY_CONTROLLER
from tests.lab.node import ready

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

    from tests.lab.fault import Story
    from tests.lab.node import Node

_MIB: Final = 1 << 20


def evicted(node: Node) -> Story:
    """A program of 48 MiB that is run here and there, a scan beside it, and a limit of 24."""
    with disk("code", 192) as place, node.pod("search") as pod:
        program, data = random_file(place / "program", 48), random_file(place / "data", 96)
        cgroup = pod.container("app", memory_max=str(24 * _MIB))
        culprit = Culprit({**pod.labels, "container": "app"})
        yield culprit
        culprit.instead["<pid>"] = str(pod.start(_run_here_and_there(program)))
        # Once there is room for all of it, a scan without a pause would wait for no disk and leave no CPU to anybody.
        pod.start(read_again_and_again(data, pause=0.2))
        yield None
        (cgroup / "memory.max").write_text("max")
        yield None


def _run_here_and_there(program: Path) -> Callable[[], None]:
    """Return a job that touches pages of a mapped file at random: without read-ahead each miss is a major fault."""

    def job() -> None:
        with program.open("rb") as source, mmap.mmap(source.fileno(), 0, prot=mmap.PROT_READ) as pages:
            pages.madvise(mmap.MADV_RANDOM)
            ready()
            chance = random.Random(1)  # noqa: S311  (no secret)
            while True:
                for _ in range(100):
                    pages[chance.randrange(len(pages))]
                time.sleep(0.01)

    return job


def room_to_spare(node: Node) -> Story:
    """The same program and the same scan, and a limit that holds both."""
    with disk("room", 192) as place, node.pod("search-with-room") as pod:
        program, data = random_file(place / "program", 48), random_file(place / "data", 96)
        cgroup = pod.container("app", memory_max=str(224 * _MIB))
        yield Culprit(pod.labels, happened=lambda: int((cgroup / "memory.current").read_text()) > 100 * _MIB)
        pod.start(_run_here_and_there(program))
        pod.start(read_again_and_again(data, pause=10))
        yield None


FAULT = Fault(
    number=8,
    title="Page cache evicts the program's own code",
    alert="ShoalCodeEviction",
    signal="memory_workloads",
    story=evicted,
    decoys=(Decoy(room_to_spare),),
    evidence=120,
    because="the rate over five minutes must be above its level, and is looked at once a minute",
    confirm=(
        Shows("cg=/sys/fs/cgroup$(cut -d: -f3 /proc/<pid>/cgroup)", ""),
        Shows('cat "$cg"/memory.current "$cg"/memory.max "$cg"/memory.high', r"^2[45]\d{6}\n25165824\nmax$"),
        Shows(
            "for i in 1 2; do grep -E '^(workingset_refault_file|workingset_restore_file|pgmajfault|file_mapped) '"
            ' "$cg"/memory.stat; sleep 10; done',
            r"workingset_refault_file [1-9]\d{3,}\n.*pgmajfault [1-9]\d{2,}\n",
        ),
    ),
    needs=(MEMORY_CONTROLLER,),
)
