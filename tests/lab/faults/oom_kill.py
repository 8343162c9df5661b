"""Failure 5: a container is killed at half its own limit, because its pod's is smaller and a tmpfs fills it."""

from __future__ import annotations

import mmap
import os
import signal
import time
from pathlib import Path
from typing import TYPE_CHECKING, Final

from tests.lab.disk import disk, random_file
from tests.lab.fault import Culprit, Decoy, Fault, Shows
from tests.lab.features import MEMORY_CONTROLLER
from tests.lab.node import ready

if TYPE_CHECKING:
    from collections.abc import Callable

    from tests.lab.fault import Story
    from tests.lab.node import Node

_MIB: Final = 1 << 20


def killed_at_half(node: Node) -> Story:
    """The container may have 96 MiB, the pod 48; 30 in a tmpfs and 30 of a child's heap are too much."""
    with node.pod("reports", limits={"memory_max": str(48 * _MIB)}) as pod:
        pod.container("app", memory_max=str(96 * _MIB))
        scratch = Path("/run/scratch")
        yield Culprit(pod.labels)
        pod.start(lambda: _lose_a_child(scratch))
        yield None
        scratch.unlink()
        pod.end()
        yield None


def _lose_a_child(scratch: Path) -> None:
    scratch.write_bytes(bytes(30 * _MIB))
    child = os.fork()
    if child == 0:
        _fill(30 * _MIB)
        os._exit(0)
    status = os.waitpid(child, 0)[1]
    assert os.WIFSIGNALED(status), "the child was not killed"
    ready()
    # The main process lives on, as a server does that loses a worker.
    while True:
        signal.pause()


def _fill(size: int) -> mmap.mmap:
    memory = mmap.mmap(-1, size, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    for offset in range(0, size, mmap.PAGESIZE):
        memory[offset] = 1
    return memory


def clean_page_cache(node: Node) -> Story:
    """A container at its limit, full of clean page cache, which is given back before anything is killed."""
    limit = 24 * _MIB
    with disk("cache", 96) as place, node.pod("cache-reader") as pod:
        file = random_file(place / "data", 64)
        cgroup = pod.container("app", memory_max=str(limit))
        yield Culprit(pod.labels, happened=lambda: int((cgroup / "memory.current").read_text()) > 0.9 * limit)
        pod.start(read_again_and_again(file, pause=5))
        yield None


def read_again_and_again(file: Path, pause: float) -> Callable[[], None]:
    """Return a job that reads a file from end to end, so many seconds apart."""

    def job() -> None:
        while True:
            with file.open("rb", buffering=0) as source:
                while source.read(_MIB):
                    pass
            ready()
            time.sleep(pause)

    return job


FAULT = Fault(
    number=5,
    title="OOM-killed at half the limit",
    alert="ShoalOOMKill",
    signal="memory_workloads",
    story=killed_at_half,
    decoys=(Decoy(clean_page_cache),),
    evidence=60,
    because="the counter is looked at once a minute",
    confirm=(
        Shows("grep oom_kill /proc/vmstat", r"^oom_kill [1-9]"),
        # The limit that was hit is the pod's, the process that was killed is the container's.
        Shows(
            "dmesg -T | grep -E 'oom-kill:|Killed process' | tail -n 4",
            r"oom_memcg=\S*-pod([0-9a-f_]+)\.slice,task_memcg=\S*-pod\1\.slice/cri-containerd-.*Killed process",
        ),
    ),
    needs=(MEMORY_CONTROLLER,),
    one_moment=True,
    resolves_after=16 * 60,
)
