"""What an hour of scrapes, one a second, leaves behind while pods come and go: `python -m tests.bench.soak`.

On a node of its own (node.py), as root, a pod starts and another ends each second. The exporter runs with the
privileges of tier 3 and everything on that those allow: it looks into every pod, dumps the connection table and counts
writable layers every ten seconds, and watches a Redis. After each scrape its memory, descriptors, threads and the
network namespaces that it holds are looked at from outside. Ends with 1 if any of them has grown, or a scrape failed.
"""

from __future__ import annotations

import argparse
import ctypes
import itertools
import os
import re
import statistics
import sys
import threading
import time
from collections import deque
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from fcntl import ioctl
from pathlib import Path
from typing import TYPE_CHECKING, Final

from tests.bench.node import TIER_3, Size, full_node
from tests.bench.scrape import Way, redis, table
from tests.bench.target import machine

from shoal.collectors import available_names

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence

    from tests.bench.node import FullNode
    from tests.bench.target import Target

SIZE: Final = Size(pods=30, containers=70, listeners=200, crowds=2, entries=10_000, neighbours=100)
COMING: Final = 10
"""How many pods there are beside those, and for how many seconds each of them lives."""
PARTS: Final = 6
MOST_GROWTH: Final = 1.0
"""MiB of its own memory by which the last part may have more than the second; the first fills what is cached."""
MOST_THREADS: Final = len(available_names()) + 4 + 4
"""A worker for each collector and four to render (`scrape.Workers`), which a busy machine comes to need, and a few."""

_FAILED: Final = re.compile(r'^shoal_scrape_collector_success\{collector="(\w+)"\} 0', re.MULTILINE)
# The same number on every machine since 5.6 (asm-generic/unistd.h); Python 3.11 has os.pidfd_open alone.
_PIDFD_GETFD: Final = 438
# linux/sockios.h: returns a descriptor of the network namespace that a socket is in.
_SIOCGSKNS: Final = 0x894C
_LIBC: Final = ctypes.CDLL(None, use_errno=True)


@dataclass(frozen=True, slots=True)
class Moment:
    """What the exporter had just after it had answered."""

    wall: float
    """Seconds that the scrape took."""
    cpu: float
    """Seconds of CPU since the moment before, what it does between scrapes included."""
    series: int
    rss: float
    """MiB, with what it shares with the files that it was read from."""
    memory: float
    """MiB that are its own (RssAnon)."""
    descriptors: int
    threads: int
    namespaces: int
    failed: tuple[str, ...] = ()
    """The collectors that gave nothing."""


def held_namespaces(pid: int) -> set[int]:
    """Return the inodes of the network namespaces that a process is in, has open or has a socket in."""
    found = set()
    for task in Path(f"/proc/{pid}/task").iterdir():
        with suppress(OSError):
            found.add((task / "ns" / "net").stat().st_ino)
    process = os.pidfd_open(pid)
    try:
        for link in Path(f"/proc/{pid}/fd").iterdir():
            with suppress(OSError):
                target = os.readlink(link)
                if target.startswith("net:["):
                    found.add(link.stat().st_ino)
                elif target.startswith("socket:["):
                    found.add(_namespace_of_socket(process, int(link.name)))
    finally:
        os.close(process)
    return found


def _namespace_of_socket(process: int, descriptor: int) -> int:
    copy = _LIBC.syscall(_PIDFD_GETFD, process, descriptor, 0)
    if copy < 0:
        number = ctypes.get_errno()
        raise OSError(number, os.strerror(number))
    try:
        namespace = ioctl(copy, _SIOCGSKNS)
    finally:
        os.close(copy)
    try:
        return os.stat(namespace).st_ino
    finally:
        os.close(namespace)


@dataclass(slots=True)
class Coming:
    """Pods that come and go beside the scrapes, in a thread of its own."""

    node: FullNode
    begun: int = 0
    error: BaseException | None = None
    _stop: threading.Event = field(default_factory=threading.Event)

    @contextmanager
    def going(self) -> Iterator[None]:
        """Start with as many pods as there are to be at any time, and go on until the block ends."""
        thread = threading.Thread(target=self._run)
        thread.start()
        try:
            yield
        finally:
            self._stop.set()
            thread.join()

    def _run(self) -> None:
        pods: deque[int] = deque()
        try:
            while not self._stop.wait(0.0 if len(pods) < COMING else 1.0):
                number = SIZE.pods + self.begun
                self.node.begin_pod(number)
                pods.append(number)
                self.begun += 1
                if len(pods) > COMING:
                    self.node.end_pod(pods.popleft())
        except BaseException as error:  # noqa: BLE001  (raised where the scrapes are)
            self.error = error


def look(target: Target, before: float) -> Moment:
    """Scrape once and look. `before` is what it had used of the CPU at the last moment, in seconds."""
    began = time.perf_counter()
    target.scrape()
    wall = time.perf_counter() - began
    status = dict(re.findall(r"^(\w+):\s*(\d+)", Path(f"/proc/{target.pid}/status").read_text(), re.MULTILINE))
    return Moment(
        wall,
        target.cpu() - before,
        target.series,
        int(status["VmRSS"]) / 1024,
        int(status["RssAnon"]) / 1024,
        target.descriptors(),
        int(status["Threads"]),
        len(held_namespaces(target.pid)),
        tuple(_FAILED.findall(target.text.decode())),
    )


def soak(node: FullNode, minutes: float, say: Callable[[str], None]) -> tuple[list[Moment], int]:
    """Scrape once a second for so long; return what was seen, and how many pods came."""
    moments: list[Moment] = []
    options = ("--netns.enter=true", "--conntrack.dump-interval=10", "--inodes.walk-interval=10")
    coming = Coming(node)
    with redis(node) as address:
        way = Way("soak", TIER_3, (*options, f"--redis.target=redis://{address}"))
        with way.run(node) as target, coming.going():
            began = time.monotonic()
            used = target.cpu()
            for number in range(round(minutes * 60)):
                time.sleep(max(0.0, began + number - time.monotonic()))
                if coming.error:
                    raise coming.error
                moments.append(look(target, used))
                used = target.cpu()
                if moments[-1].failed:
                    say(f"scrape {number}: no answer of {', '.join(moments[-1].failed)}")
    return moments, coming.begun


def parts(moments: Sequence[Moment]) -> list[Sequence[Moment]]:
    """Cut what was seen into so many parts of the same length."""
    ends = [len(moments) * part // PARTS for part in range(PARTS + 1)]
    return [moments[first:last] for first, last in itertools.pairwise(ends)]


def report(moments: Sequence[Moment]) -> str:
    """Return the table: the first minute, or what there is of it, and each part."""

    def row(name: str, part: Sequence[Moment]) -> tuple[str, ...]:
        wall = sorted(one.wall for one in part)
        return (
            name,
            f"{len(part):,}",
            f"{sum(bool(one.failed) for one in part)}",
            f"{statistics.median(one.series for one in part):,.0f}",
            f"{statistics.median(one.rss for one in part):.1f}",
            f"{statistics.median(one.memory for one in part):.2f}",
            f"{max(one.descriptors for one in part)}",
            f"{max(one.threads for one in part)}",
            f"{max(one.namespaces for one in part)}",
            f"{statistics.mean(one.cpu for one in part) * 1000:.0f}",
            f"{statistics.median(wall) * 1000:.0f}",
            f"{wall[len(wall) * 99 // 100] * 1000:.0f}",
        )

    head = (
        "minutes",
        "scrapes",
        "failed",
        "series",
        "memory (MiB)",
        "its own (MiB)",
        "descriptors",
        "threads",
        "namespaces",
        "CPU a second (ms)",
        "wall, median (ms)",
        "wall, p99 (ms)",
    )
    rows = [head, row("the first", moments[:60])]
    ends = [len(moments) * part / PARTS / 60 for part in range(PARTS + 1)]
    rows += [row(f"{ends[part]:.0f} to {ends[part + 1]:.0f}", found) for part, found in enumerate(parts(moments))]
    return table(rows)


def grown(moments: Sequence[Moment]) -> list[str]:
    """Say what the last part has more of than the second."""
    _, base, *_, last = parts(moments)
    found = []
    memory = statistics.median(one.memory for one in last) - statistics.median(one.memory for one in base)
    if memory > MOST_GROWTH:
        found.append(f"memory grew by {memory:.2f} MiB, and may by {MOST_GROWTH}")
    if (threads := max(one.threads for one in last)) > MOST_THREADS:
        found.append(f"there are {threads} threads, and may be {MOST_THREADS}")
    for name in ("descriptors", "namespaces"):
        # Of most moments: one may fall into a dump, whose socket is open.
        before, after = (statistics.median_high(getattr(one, name) for one in part) for part in (base, last))
        if after > before:
            found.append(f"{name} grew from {before} to {after}")
    if failed := sum(bool(one.failed) for one in moments):
        found.append(f"{failed} scrapes were not whole")
    return found


def main() -> int:
    """Soak and report."""
    parser = argparse.ArgumentParser(description="What an hour of scrapes leaves behind while pods come and go.")
    parser.add_argument("--minutes", type=float, default=60, help="for how long (60)")
    arguments = parser.parse_args()
    if os.geteuid():
        parser.error("only root can build a node")

    def say(text: str) -> None:
        sys.stdout.write(f"{text}\n\n")
        sys.stdout.flush()

    say(machine())
    with full_node(SIZE.pods, SIZE.containers) as node:
        node.fill(SIZE)
        moments, pods = soak(node, arguments.minutes, say)
    say(
        f"{SIZE.pods} pods with {SIZE.containers} containers stay, {COMING} more last for {COMING} s each: {pods:,} "
        f"came and went. {SIZE.listeners} listeners, {SIZE.entries:,} tracked connections, a Redis."
    )
    say(report(moments))
    wrong = grown(moments)
    say("Nothing grew." if not wrong else "Not kept: " + "; ".join(wrong))
    say(f"load at the end {os.getloadavg()[0]:.2f}")
    return 1 if wrong else 0


if __name__ == "__main__":
    raise SystemExit(main())
