"""Failure 1: a Redis with appendfsync always stands still while its disk flushes, and everything else looks idle.

Where there is device-mapper (a stock kernel) the disk is slow for real, and nothing but the disk is the witness: a loop
device on a file of a file system that dm-delay slows down, so that each of its flushes is an fsync() there. Elsewhere a
preloaded library makes fdatasync() slow, and the server's latency monitor tells.

Seen on 6.1 with the server's data on the mapped device itself and 150 ms a write: one fdatasync() on ext4 was 0.65 s
long (data, then the journal); the mapped device had no flushes in diskstats, the loop device below it some of 2 ms, so
that of the disk only the time of the mapped device's own writes told; and the server's cgroup had waited for I/O, by
its pressure, a seventh of the time that it stood still, since the wait for the journal is not counted as one for I/O.
"""

from __future__ import annotations

import os
import re
import socket
import subprocess
import time
from contextlib import contextmanager, suppress
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Final, NoReturn, Protocol

from tests.lab.disk import disk
from tests.lab.fault import Culprit, Decoy, Fault, Shows
from tests.lab.features import MEMORY_CONTROLLER
from tests.lab.node import libc, ready, run

if TYPE_CHECKING:
    from collections.abc import Iterator

    from tests.lab.fault import Story
    from tests.lab.node import Node, Pod

_PORT: Final = 6379
_SLOW_MILLISECONDS: Final = 150
_MANY: Final = 100
_MEMORY: Final = 512 << 20
_DEVICE: Final = "shoal-lab-redis"
_STARTS_WITHIN: Final = 60.0
_TICK: Final = 0.2

_SHIM: Final = """
#define _GNU_SOURCE
#include <stdio.h>
#include <stdlib.h>
#include <time.h>

/* A flush takes as many milliseconds as the file named by SLOW_FSYNC says, or up to 100 more, and is not done. */
int fdatasync(int fd) {
    (void)fd;
    int milliseconds = 0;
    FILE *file = fopen(getenv("SLOW_FSYNC"), "r");
    if (file) {
        if (fscanf(file, "%d", &milliseconds) != 1) milliseconds = 0;
        fclose(file);
    }
    if (milliseconds) milliseconds += rand() % 100;
    struct timespec wait = {milliseconds / 1000, milliseconds % 1000 * 1000000L};
    nanosleep(&wait, NULL);
    return 0;
}
int fsync(int fd) { return fdatasync(fd); }
"""


def slow_disk(node: Node) -> Story:
    """Five writes a second, each of which waits for a flush of a sixth of a second or more."""
    with _slowable() as (place, environment, slow), node.pod("session-store") as pod:
        if not MEMORY_CONTROLLER.missing():
            pod.container("app", memory_max=str(_MEMORY))
        pid = _redis(pod, place, "always", environment)
        _rewrite(pod)
        yield Culprit(pod.labels, {"pid": str(pid)}, {"redis-cli": f"nsenter -t {pid} -n redis-cli"})
        slow(on=True)
        pod.start(_write)
        yield None
        slow(on=False)
        yield None


def fast_disk(node: Node) -> Story:
    """The same server and writes, and a disk that takes them as they come: memory, however busy the machine is."""
    with node.pod("fast-store") as pod:
        place = Path("/run/disks/fast-aof")
        place.mkdir(parents=True, exist_ok=True)
        _redis(pod, place, "always", {})
        yield Culprit(pod.labels, happened=lambda: _calls(pod, "set") > _MANY)
        pod.start(_write)
        yield None


def slow_command(node: Node) -> Story:
    """A command that takes 300 ms, every two seconds: no PING is answered meanwhile, and no disk is to blame."""
    with disk("slow-command", 64) as place, node.pod("leaderboard") as pod:
        _redis(pod, place, "everysec", {})
        yield Culprit(pod.labels, happened=lambda: _calls(pod, "debug") > _MANY // 2)
        pod.start(_sleep_in_the_server)
        yield None


class _Switch(Protocol):
    """Makes a disk slow, or fast again."""

    def __call__(self, *, on: bool) -> None:
        """Switch."""


@contextmanager
def _slowable() -> Iterator[tuple[Path, dict[str, str], _Switch]]:
    """Give a directory for a server's data, what its environment must have, and how to make it slow and fast again."""
    if _has_device_mapper():
        with _delayed_disk() as (below, slow), disk("aof", 32, below=below) as place:
            yield place, {}, slow
        return
    with disk("aof", 64) as place:
        source, library, delay = (place / name for name in ("shim.c", "shim.so", "delay"))
        source.write_text(_SHIM)

        def slow(*, on: bool) -> None:
            delay.write_text(str(_SLOW_MILLISECONDS if on else 0))

        run("gcc", "-shared", "-fPIC", "-o", str(library), str(source))
        yield (
            place,
            {"LD_PRELOAD": str(library), "SLOW_FSYNC": str(delay)},
            slow,
        )


@cache
def _has_device_mapper() -> bool:
    return subprocess.run(["modprobe", "dm-delay"], capture_output=True, check=False).returncode == 0


@contextmanager
def _delayed_disk() -> Iterator[tuple[Path, _Switch]]:
    """Make an ext4 on dm-delay on a loop device, and give how to delay what is written to it."""
    image, place = Path("/run/disks/delayed.image"), Path("/run/disks/delayed")
    place.mkdir(parents=True)
    with image.open("wb") as file:
        file.truncate(64 << 20)
    loop = run("losetup", "--find", "--show", str(image)).strip()

    def table(milliseconds: int) -> str:
        return f"0 {(64 << 20) // 512} delay {loop} 0 0 {loop} 0 {milliseconds}"

    def slow(*, on: bool) -> None:
        # A flush of the disk above is an fsync() here, which waits for a write three times: data, journal, its commit.
        _dmsetup("reload", _DEVICE, "--table", table(_SLOW_MILLISECONDS // 3 if on else 0))
        _dmsetup("suspend", _DEVICE)
        _dmsetup("resume", _DEVICE)

    _dmsetup("create", _DEVICE, "--table", table(0))
    try:
        # Its name below /dev/mapper is for udev to make; this one is the kernel's.
        device = f"/dev/dm-{run('dmsetup', 'info', '--columns', '--noheadings', '-o', 'minor', _DEVICE).strip()}"
        run("mkfs.ext4", "-q", "-F", device)
        run("mount", device, str(place))
        yield place, slow
    finally:
        slow(on=False)
        libc.umount2(bytes(place), 2)
        _dmsetup("remove", "--deferred", _DEVICE)
        run("losetup", "--detach", loop)


def _dmsetup(*arguments: str) -> None:
    # There is no udev to wait for.
    run("dmsetup", "--noudevsync", "--noudevrules", *arguments)


def _redis(pod: Pod, place: Path, appendfsync: str, environment: dict[str, str]) -> int:
    """Start a redis-server in the pod and return its process id once it answers."""
    options = {
        "port": _PORT,
        "dir": place,
        "logfile": place / "log",
        "save": "",
        "appendonly": "yes",
        "appendfsync": appendfsync,
        "latency-monitor-threshold": 0 if _has_device_mapper() else 50,
        "enable-debug-command": "yes",
    }
    words = [word for name, value in options.items() for word in (f"--{name}", str(value))]

    def serve() -> NoReturn:
        ready()
        os.execvpe("redis-server", ["redis-server", *words], os.environ | environment)  # noqa: S606  (it is to be it)

    pid = pod.start(serve)
    until = time.monotonic() + _STARTS_WITHIN
    while True:
        with suppress(RuntimeError):
            if "PONG" in pod.run("redis-cli", "ping"):
                return pid
        if time.monotonic() > until:
            raise TimeoutError("redis-server does not answer")
        time.sleep(_TICK)


def _rewrite(pod: Pod) -> None:
    """Have the append-only file rewritten once, as it is from time to time; what that copied on write stays in INFO."""
    pod.run("redis-cli", "bgrewriteaof")
    until = time.monotonic() + _STARTS_WITHIN
    while not re.search(r"aof_last_cow_size:[1-9]", pod.run("redis-cli", "info", "persistence")):
        if time.monotonic() > until:
            raise TimeoutError("the append-only file is not rewritten")
        time.sleep(_TICK)


def _calls(pod: Pod, command: str) -> int:
    """Return how often a command was called, as the server counts."""
    found = re.search(rf"cmdstat_{command}:calls=(\d+)", pod.run("redis-cli", "info", "commandstats"))
    return int(found[1]) if found else 0


def _ask_over_and_over(pause: float, *words: str) -> NoReturn:
    """Send one command after the other, with a pause after each answer."""
    request = f"*{len(words)}\r\n" + "".join(f"${len(word)}\r\n{word}\r\n" for word in words)
    with socket.create_connection(("127.0.0.1", _PORT)) as link:
        ready()
        with suppress(ConnectionError):
            while True:
                link.sendall(request.encode())
                link.recv(1000)
                time.sleep(pause)
    # The server ended before its client.
    os._exit(0)


def _write() -> NoReturn:
    _ask_over_and_over(_TICK, "set", "session", "x" * 100)


def _sleep_in_the_server() -> NoReturn:
    _ask_over_and_over(2, "debug", "sleep", "0.3")


FAULT = Fault(
    number=1,
    title="The append-only file is the p99 of Redis",
    alert="ShoalRedisAofStall",
    signal="redis_aof_servers",
    story=slow_disk,
    # Where the monitor is off, and a PING takes long for whatever reason, that is said for information.
    decoys=(
        Decoy(fast_disk, right=("ShoalRedisLatencyMonitorOff",)),
        Decoy(slow_command, right=("ShoalRedisLatencyMonitorOff",)),
    ),
    evidence=240,
    because=(
        "PINGs must have been slow in three of the last five minutes, and where the latency monitor is the witness, "
        "its first spike is only the first that is known"
    ),
    confirm=(
        Shows("redis-cli -p 6379 --latency-history -i 5", r"max: \d{2,}|^\d+ \d{2,} ", after=7),
        # The preloaded library only sleeps.
        Shows(
            """for i in 1 2 3 4 5; do ps -L -o pid,stat,wchan:20,comm -p "$pid" | sed -n 2p; sleep 0.2; done""",
            r" D\S* .*redis-server|nanosleep",
        ),
        Shows("redis-cli -p 6379 config get appendfsync", r"always"),
    ),
    exporter=("--redis.discover=true",),
)
