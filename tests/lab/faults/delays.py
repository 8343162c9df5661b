"""Failure 7: a container computes next to nothing, and waits: for a disk that is throttled to a few reads a second."""

from __future__ import annotations

import mmap
import os
import random
import time
from typing import TYPE_CHECKING, Final, NoReturn

from tests.lab.disk import disk, random_file
from tests.lab.fault import Culprit, Decoy, Fault, Shows
from tests.lab.features import DELAY_ACCOUNTING, IO_CONTROLLER
from tests.lab.node import ready

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

    from tests.lab.fault import Story
    from tests.lab.node import Node

_PAGE: Final = mmap.PAGESIZE


def throttled_disk(node: Node) -> Story:
    """A reader of single pages, and a limit of three reads a second on its device."""
    with disk("slow", 64) as place, node.pod("report-builder") as pod:
        file = random_file(place / "data", 16)
        device = os.stat(file).st_dev
        limit = f"{os.major(device)}:{os.minor(device)} riops="
        cgroup = pod.container("app")
        yield Culprit({**pod.labels, "container": "app"}, {"cg": str(cgroup)})
        (cgroup / "io.max").write_text(f"{limit}3")
        pod.start(_read_here_and_there(file, pause=0))
        yield None
        (cgroup / "io.max").write_text(f"{limit}max")
        yield None


def _read_here_and_there(file: Path, pause: float) -> Callable[[], NoReturn]:
    """Return a job that reads pages of a file past the page cache."""

    def job() -> NoReturn:
        chance = random.Random(1)  # noqa: S311  (no secret)
        pages = file.stat().st_size // _PAGE
        source = os.open(file, os.O_RDONLY | os.O_DIRECT)
        page = mmap.mmap(-1, _PAGE)
        ready()
        while True:
            os.preadv(source, [page], chance.randrange(pages) * _PAGE)
            time.sleep(pause)

    return job


def busy_disk(node: Node) -> Story:
    """The same reader on a disk that is as fast as it can be: it waits all the time, and never for long."""
    with disk("fast", 64) as place, node.pod("backup") as pod:
        file = random_file(place / "data", 16)
        cgroup = pod.container("app")
        yield Culprit(pod.labels, happened=lambda: " rios=0 " not in f" {(cgroup / 'io.stat').read_text()} ")
        pod.start(_read_here_and_there(file, pause=0.005))
        yield None


FAULT = Fault(
    number=7,
    title="Waiting, not computing",
    alert="ShoalBlockIoStall",
    also=("ShoalBlockIoDelay",),
    signal="delays_waits",
    story=throttled_disk,
    # On an emulated machine it waits for a CPU too, and is told so.
    decoys=(Decoy(busy_disk, right=("ShoalRunQueueDelay",)),),
    evidence=240,
    because="the wait must be half of five minutes, which are looked at once a minute",
    confirm=(
        Shows(
            'cat "$cg"/io.pressure; cat "$cg"/io.max; cat "$cg"/io.stat; sleep 5; cat "$cg"/io.stat',
            r"full avg10=(?:[5-9]\d|100)\..*riops=3 ",
        ),
    ),
    needs=(DELAY_ACCOUNTING, IO_CONTROLLER),
)
