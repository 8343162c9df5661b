"""Alerts that no failure of the lab causes, each caused for real, and the commands of its runbook tried on it.

    tests/vm_disk.sh -i 3 6.12 OUT -- .venv/bin/pytest -s -p no:cacheprovider tests/vm/alerts.py

It is a whole machine that is short of memory, kept waiting by its disks, or without room in its neighbour table, so no
machine in use may have this done to it, and `make test-vm` leaves it out: it wants the counted clock. The path that a
page takes is the lab's.

Seen on 6.12: ShoalCodeEvictionStall after 280 s, ShoalMemoryStall after 297, ShoalNodeIoPressure after 305;
ShoalNeighbourTableOverflow after 309, and over 287 s after its cure; ShoalNodeMemoryPressure after 271, and over 386 s
after its cure.
"""

from __future__ import annotations

import ctypes
import errno
import mmap
import os
import random
import re
import socket
import subprocess
import sys
import threading
import time
from collections import Counter
from contextlib import ExitStack, contextmanager, suppress
from itertools import cycle
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final, NoReturn

import pytest
from tests.lab.disk import random_file
from tests.lab.features import DELAY_ACCOUNTING
from tests.lab.inside import stage
from tests.lab.node import Node, libc, ready, run
from tests.lab.stack import REPOSITORY

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from tests.lab.stack import Page, Stack

pytestmark = pytest.mark.timeout(0)

INTERVAL: Final = 30
"""Seconds between scrapes and evaluations; alerts wait three of them."""
PATIENCE: Final = 1200
MIB: Final = 1 << 20
CG: Final = "cg=/sys/fs/cgroup$(cut -d: -f3 /proc/<pid>/cgroup)\n"
WHO_WAITS: Final = (
    "grep -H ^full $(find /sys/fs/cgroup -name {}.pressure) | sed 's/avg10=//' | sort -k2 -rn | head -n 5"
)
WHO_HAS: Final = (
    'for file in $(find /sys/fs/cgroup -name memory.current); do echo "$(cat $file) $file"; done | sort -rn | head -n 5'
)
TABLE_FULLS: Final = (
    "ip -s ntable show name arp_cache | grep -E 'thresh|table_fulls'; sleep 10; "
    "ip -s ntable show name arp_cache | grep table_fulls"
)


@pytest.fixture(scope="module")
def lab() -> Iterator[tuple[Node, Stack]]:
    """Start exporter, Prometheus and Alertmanager on the shipped rules, once."""
    assert not DELAY_ACCOUNTING.missing()
    with stage([], INTERVAL) as (node, stack, _):
        yield node, stack


@pytest.fixture
def scene(lab: tuple[Node, Stack]) -> Iterator[tuple[Node, Stack, ExitStack]]:
    """Wait until no alert of an earlier scene is left; what is put on the stack ends with this one."""
    node, stack = lab
    while ask(stack, f'ALERTS{{node="{stack.labels["node"]}",alertname=~"Shoal(Node|Memory|Code|Neighbour).*"}}'):
        time.sleep(INTERVAL)
    with ExitStack() as ends:
        yield node, stack, ends


def page(stack: Stack, alert: str, since: float, status: str = "firing", **labels: str) -> Page:
    """Wait for an alert about exactly this; labels of the machine and of the alert itself go without saying."""
    known = {"alertname", "severity", "signal", *stack.labels}
    while time.time() < since + PATIENCE:
        for one in stack.pages():
            own = {name: value for name, value in one.labels.items() if name not in known}
            if one.alert == alert and one.status == status and one.at >= since and own == labels:
                say(f"{alert} {own} {status} after {one.at - since:.0f} s: {one.annotations['description']}")
                return one
        time.sleep(1)
    raise AssertionError(f"{alert} is not {status}; there are {[(one.alert, one.labels) for one in stack.pages()]}")


def ask(stack: Stack, expression: str) -> list[dict[str, Any]]:
    """Query Prometheus, again if need be: when the clock skips a wait for the disk, little is in time."""
    while True:
        with suppress(OSError):
            return stack.query(expression)


def show(stack: Stack, selector: str) -> None:
    """Say what series have now, for whoever reads along."""
    for series in ask(stack, selector):
        name = series["metric"].pop("__name__", "")
        say(f"  {name} {series['metric'].get('resource', '')} {float(series['value'][1]):.3g}")


def paste(alert: str, commands: str, pattern: str, pid: int = 0) -> re.Match[str]:
    """Run lines that stand in a runbook, word for word; return where their output shows the pattern."""
    text = (REPOSITORY / "rules" / "runbooks" / f"{alert}.md").read_text(encoding="utf-8")
    lines = [line.strip() for line in text.splitlines()]
    for command in commands.splitlines():
        assert command in lines, f"the page of {alert} has no line {command}"
    script = commands.replace("<pid>", str(pid))
    done = subprocess.run(["timeout", "120", "bash", "-c", script], capture_output=True, text=True, check=False)
    said = done.stdout + done.stderr
    say(f"{alert}: {script}\n{said}")
    found = re.search(pattern, said, re.MULTILINE | re.DOTALL)
    assert found, pattern
    return found


def say(text: str) -> None:
    """Show the course of a test that takes a quarter of an hour."""
    sys.stdout.write(f"{time.strftime('%H:%M:%S')} {text}\n")
    sys.stdout.flush()


def share(file: Path, kind: str, seconds: float = 30) -> float:
    """Return the share of the next seconds that was waiting, as a pressure file counts it."""

    def waited() -> int:
        return int(re.findall(rf"^{kind} .*total=(\d+)", file.read_text(), re.MULTILINE)[0])

    began, before = time.monotonic(), waited()
    time.sleep(seconds)
    return (waited() - before) / 1e6 / (time.monotonic() - began)


@contextmanager
def slow_file(name: str, mebibytes: int) -> Iterator[Path]:
    """Make a file of so many MiB, on an ext4 on a device each of whose reads takes 50 ms, however many there are.

    Below 50 ms dm-delay of 6.12, by its source, polls in a thread of its own, which is no idle machine.
    """
    image, place, size = Path(f"/run/disks/{name}.image"), Path(f"/run/disks/{name}"), (mebibytes + 48) * MIB
    place.mkdir(parents=True)
    with image.open("wb") as file:
        file.truncate(size)
    run("modprobe", "dm-delay")
    loop = run("losetup", "--find", "--show", str(image)).strip()
    table = f"0 {size // 512} delay {loop} 0 50 {loop} 0 0"
    run("dmsetup", "--noudevsync", "--noudevrules", "create", name, "--table", table)
    try:
        device = f"/dev/dm-{run('dmsetup', 'info', '--columns', '--noheadings', '-o', 'minor', name).strip()}"
        run("mkfs.ext4", "-q", "-F", "-m", "0", device)
        run("mount", device, str(place))
        yield random_file(place / "file", mebibytes)
    finally:
        libc.umount2(bytes(place), 2)
        run("dmsetup", "--noudevsync", "--noudevrules", "remove", "--deferred", name)
        run("losetup", "--detach", loop)
        image.unlink()


def run_code(program: Path, threads: int = 8) -> Callable[[], NoReturn]:
    """Return a job whose threads execute here and there in a program.

    No advice to read at random: by its source, the kernel's newer way to age pages (MGLRU, which 6.12 has on) takes
    what is mapped so for not in use, and then a wait for a page that was just evicted counts as one for I/O alone.
    """

    def execute(address: int, size: int) -> None:
        chance = random.Random(threading.get_ident())  # noqa: S311  (no secret)
        while True:
            # Reads a byte, and lets the other threads run while it waits.
            libc.strnlen(ctypes.c_void_p(address + chance.randrange(size)), 1)

    def job() -> NoReturn:
        with program.open("rb") as source:
            code = mmap.mmap(
                source.fileno(), 0, flags=mmap.MAP_PRIVATE, prot=mmap.PROT_READ | mmap.PROT_WRITE | mmap.PROT_EXEC
            )
        address = ctypes.addressof(ctypes.c_char.from_buffer(code))
        for _ in range(threads):
            threading.Thread(target=execute, args=(address, len(code))).start()
        ready()
        while True:
            time.sleep(60)

    return job


def test_code_that_does_not_fit_its_limit(scene: tuple[Node, Stack, ExitStack]) -> None:
    """A program of 48 MiB, a limit of 24, a slow disk: it stands still; with more memory it runs."""
    node, stack, ends = scene
    program = ends.enter_context(slow_file("code", 48))
    pod = ends.enter_context(node.pod("search"))
    cgroup = pod.container("app", memory_max=str(24 * MIB))
    since = time.time()
    pid = pod.start(run_code(program))
    for alert in ("ShoalCodeEvictionStall", "ShoalMemoryStall"):
        page(stack, alert, since, **pod.labels, container="app")
        show(stack, '{__name__=~"workload:shoal_(memory|cpu_usage).*",pod="search",container="app"}')
    show(stack, '{__name__=~"node:.*_pressure_full.*"}')

    usage = 'cat "$cg"/memory.current "$cg"/memory.max "$cg"/memory.pressure'
    look = f"{CG}grep -E '^(workingset_refault_file|pgmajfault) ' \"$cg\"/memory.stat; {usage}"
    stalled = r"workingset_refault_file (\d+)\npgmajfault (\d+)\n2[345]\d{6}\n25165824\nsome avg10=[3-9]\d"
    first = paste("ShoalCodeEvictionStall", look, stalled, pid)
    time.sleep(10)
    second = paste("ShoalCodeEvictionStall", look, stalled, pid)
    assert int(second[1]) - int(first[1]) > 1000
    assert int(second[2]) - int(first[2]) > 100
    counters = "grep -E '^(workingset_refault|pgmajfault|pgscan) ?' \"$cg\"/memory.stat"
    paste(
        "ShoalMemoryStall",
        f"{CG}{usage}\n{counters}; sleep 10\n{counters}",
        r"^2[345]\d{6}\n25165824\nsome avg10=[3-9]\d.*workingset_refault_file \d+\n.*workingset_refault_file \d+\n",
        pid,
    )
    before = share(cgroup / "memory.pressure", "some")
    paste("ShoalMemoryStall", f'{CG}echo 512M > "$cg"/memory.max', r"\A\Z", pid)
    # Each page is read once more, and then never again.
    time.sleep(60)
    after = share(cgroup / "memory.pressure", "some")
    say(f"waited for memory {before:.0%} of the time, with the higher limit {after:.0%}")
    assert before > 0.3
    assert after < 0.05


def scan(addresses: list[str]) -> Callable[[], NoReturn]:
    """Return a job that sends a packet to each of these addresses, up to three hundred a second, over and over.

    Each from a socket of its own: packets that wait for a neighbour's answer fill the send buffer, and one socket fills
    no table. It sent 64 a second, which are given up as fast.
    """

    def job() -> NoReturn:
        ready()
        for address in cycle(addresses):
            # No room for its neighbour entry, or told that nobody is there.
            with suppress(OSError), socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as link:
                link.sendto(b"x", (address, 9))
            time.sleep(1 / 300)
        raise AssertionError("it has no end")

    return job


def refused(addresses: list[str]) -> Counter[str]:
    """Send to each of these addresses, and count what the kernel says to one that wants to know."""
    told: Counter[str] = Counter()
    for address in addresses:
        with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as link:
            link.setsockopt(socket.IPPROTO_IP, 11, 1)  # IP_RECVERR
            try:
                link.sendto(b"x", (address, 9))
            except OSError as error:
                told[errno.errorcode[error.errno or 0]] += 1
    return told


def test_neighbour_table(scene: tuple[Node, Stack, ExitStack]) -> None:
    """A scan of a network where nobody is fills a table of 512, and more room ends it."""
    node, stack, ends = scene
    thresholds = [f"net.ipv4.neigh.default.gc_thresh{level}" for level in (1, 2, 3)]
    old = [run("sysctl", "-n", name).strip() for name in thresholds]
    ends.callback(lambda: run("sysctl", "-qw", *(f"{n}={v}" for n, v in zip(thresholds, old, strict=True))))
    segment = ends.enter_context(node.container("segment"))
    run("ip", "link", "add", "seg", "type", "veth", "peer", "name", "eth0", "netns", segment.netns)
    run("ip", "address", "add", "10.79.0.1/16", "dev", "seg")
    run("ip", "link", "set", "seg", "up")
    segment.ip("link set eth0 up")
    run("sysctl", "-qw", *(f"{n}={v}" for n, v in zip(thresholds, (128, 256, 512), strict=True)))
    scanner = ends.enter_context(node.unit("scanner.service"))
    # Known to Prometheus before it moves.
    time.sleep(2 * INTERVAL)

    since = time.time()
    scanner.start(scan([f"10.79.{third}.{fourth}" for third in range(250) for fourth in range(1, 251)]))
    page(stack, "ShoalNeighbourTableOverflow", since, protocol="ipv4")
    show(stack, '{__name__=~"table:.*overflows.*",protocol="ipv4"}')
    say(f"senders were told {refused([f'10.79.255.{fourth}' for fourth in range(1, 251)])}")
    counted = paste("ShoalNeighbourTableOverflow", TABLE_FULLS, r"thresh3 512 .*table_fulls (\d+)\s.*table_fulls (\d+)")
    assert int(counted[2]) > int(counted[1])
    paste(
        "ShoalNeighbourTableOverflow",
        "dmesg | grep 'neighbor table overflow' | tail -n 1",
        "arp_cache: neighbor table ov",
    )
    paste(
        "ShoalNeighbourTableOverflow",
        "for pid in $(lsns -t net -n -o PID); do printf '%s %s\\n' "
        '"$(nsenter -t $pid -n ip -4 neigh | wc -l)" "$pid"; done | sort -rn | head',
        r"^[45]\d\d \d+$",
    )
    say(run("bash", "-c", "ip -4 neigh | awk '{print $NF}' | sort | uniq -c"))
    raised = time.time()
    paste(
        "ShoalNeighbourTableOverflow",
        "sysctl -w net.ipv4.neigh.default.gc_thresh1=4096 net.ipv4.neigh.default.gc_thresh2=8192 "
        "net.ipv4.neigh.default.gc_thresh3=16384",
        "gc_thresh3 = 16384",
    )
    counted = paste("ShoalNeighbourTableOverflow", TABLE_FULLS, r"table_fulls (\d+)\s.*table_fulls (\d+)")
    assert int(counted[2]) == int(counted[1])
    page(stack, "ShoalNeighbourTableOverflow", raised, "resolved", protocol="ipv4")


def backup(file: Path) -> Callable[[], NoReturn]:
    """Return a job that reads a file past the page cache, over and over."""

    def job() -> NoReturn:
        ready()
        command = f"while dd if={file} of=/dev/null iflag=direct bs=64k status=none; do :; done"
        os.execvp("sh", ["sh", "-c", command])  # noqa: S606  (it is to be it)

    return job


def test_a_disk_that_all_wait_for(scene: tuple[Node, Stack, ExitStack]) -> None:
    """With readers on a slow disk, and nothing else to do, the node waits for its disk."""
    node, stack, ends = scene
    file = ends.enter_context(slow_file("reads", 16))
    pod = ends.enter_context(node.pod("backup"))
    since = time.time()
    for _ in range(4):
        pod.start(backup(file))
    page(stack, "ShoalNodeIoPressure", since, resource="io")
    show(stack, '{__name__=~"node:.*_pressure_full.*"}')
    paste(
        "ShoalNodeIoPressure",
        "cat /proc/pressure/io\niostat -dxmy 5 1",
        r"^full avg10=\S+ avg60=[4-9]\d.*^dm-0 +\d",
    )
    paste(
        "ShoalNodeIoPressure",
        WHO_WAITS.format("io"),
        r"kubepods.*io.pressure:full [5-9]\d",
    )
    pod.end()
    after = share(Path("/proc/pressure/io"), "full")
    say(f"without the readers nothing could run {after:.0%} of the time")
    assert after < 0.2


def hold(mebibytes: int) -> Callable[[], NoReturn]:
    """Return a job that has so much memory in use; there is no swap."""

    def job() -> NoReturn:
        memory = mmap.mmap(-1, mebibytes * MIB, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
        for offset in range(0, len(memory), mmap.PAGESIZE):
            memory[offset] = 1
        ready()
        while True:
            time.sleep(60)

    return job


def available() -> int:
    """Return how many MiB of memory the kernel could give away."""
    return int(re.findall(r"MemAvailable: +(\d+)", Path("/proc/meminfo").read_text())[0]) >> 10


def test_node_short_of_memory(scene: tuple[Node, Stack, ExitStack]) -> None:
    """Heaps leave a program without a limit half of what it needs, and nothing on the node runs for long."""
    node, stack, ends = scene
    program = ends.enter_context(slow_file("program", 400))
    server = ends.enter_context(node.unit("server.service"))
    heaps = ends.enter_context(node.unit("heaps.service"))
    say(f"{available()} MiB are available")
    since = time.time()
    # The kernel says less than it has: with 150 MiB the program gets 220, and one of 200 had no need to wait.
    heaps.start(hold(available() - 150))
    say(f"{available()} MiB are available")
    server.start(run_code(program))
    page(stack, "ShoalNodeMemoryPressure", since, resource="memory")
    show(stack, '{__name__=~"node:.*_pressure_full.*"}')
    show(stack, '{__name__=~"workload:shoal_memory.*",unit="server.service"}')
    paste("ShoalNodeMemoryPressure", "cat /proc/pressure/memory", r"^full avg10=\S+ avg60=[1-9]\d")
    paste(
        "ShoalNodeMemoryPressure",
        WHO_WAITS.format("memory"),
        r"server.service/memory.pressure:full [1-9]\d",
    )
    paste("ShoalNodeMemoryPressure", "grep -E '^Mem(Total|Available)' /proc/meminfo", r"^MemAvailable: +\d{4,6} kB")
    paste("ShoalNodeMemoryPressure", WHO_HAS, r"^[12]\d{9} \S+system.slice/heaps.service/memory.current")
    before = share(Path("/proc/pressure/memory"), "full")
    ended = time.time()
    heaps.end()
    # Each page is read once more.
    time.sleep(120)
    after = share(Path("/proc/pressure/memory"), "full")
    say(f"nothing could run {before:.0%} of the time, without the heaps {after:.0%}")
    assert before > 0.1
    assert after < 0.05
    page(stack, "ShoalNodeMemoryPressure", ended, "resolved", resource="memory")
