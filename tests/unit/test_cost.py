"""What a scrape costs on any machine: files, reads and calls for each pod, memory and allocations for each sample.

How long it takes is for `make bench` to say, which no test can.
"""

from __future__ import annotations

import gc
import itertools
import os
import shutil
import subprocess
import sys
import tracemalloc
from collections import Counter
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
from tests.bench.pods import pods

from shoal import exposition, inventory
from shoal.collectors import load
from shoal.exposition import render
from shoal.inventory import Node
from shoal.kernel.files import Roots
from shoal.settings import resolve

if TYPE_CHECKING:
    from collections.abc import Callable

    from shoal.families import Family

RECORDED = Path(__file__).parent / "fixtures" / "6.12"
CONTAINER = (
    "kubepods.slice/kubepods-podb2a4c6d8_1357_4e9f_a0b1_c2d3e4f5a6b7.slice/"
    "crio-fe32621bd7721450998cef6bb0955b37ca94ecdc69f032e702ac688d6dbf3823.scope"
)
COUNTED = ("open", "read", "stat", "scandir", "listdir")


@pytest.fixture(autouse=True)
def _labels_are_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    """Begin to count anew the texts after which labels are let go, which else may be between two that are compared."""
    monkeypatch.setattr(exposition, "_times", itertools.count(1))
    monkeypatch.setattr(inventory, "_times", itertools.count(1))


def lay_out(root: Path, number: int) -> Roots:
    """Lay out so many pods of one container, each a copy of a recorded one."""
    recorded = RECORDED / "sys" / "fs" / "cgroup"
    mount = root / "fs" / "cgroup"
    mount.mkdir(parents=True)
    shutil.copy(recorded / "cgroup.controllers", mount)
    for pod in pods(number, number):
        scope = mount / pod.cgroup(0)
        ignore = shutil.ignore_patterns("cgroup.procs")
        shutil.copytree(recorded / CONTAINER, scope.parent, ignore=ignore)
        shutil.copytree(recorded / CONTAINER, scope, ignore=ignore)
    return Roots(proc=str(RECORDED / "proc"), sys=str(root), rootfs=str(root))


def calls(monkeypatch: pytest.MonkeyPatch, work: Callable[[], object]) -> Counter[str]:
    """Return how often each of os's functions is called by this."""
    found: Counter[str] = Counter()

    def counting(name: str, function: Callable[..., Any]) -> Callable[..., Any]:
        def call(*arguments: object, **named: object) -> object:
            found[name] += 1
            return function(*arguments, **named)

        return call

    with monkeypatch.context() as patched:
        for name in COUNTED:
            patched.setattr(os, name, counting(name, getattr(os, name)))
        work()
    return found


@pytest.mark.parametrize(
    ("collectors", "opened", "read"),
    [
        # Both directories, and of the container cpu.pressure, memory.pressure and io.pressure.
        (("pressure",), 5, 3),
        # Of both the directory, cpu.stat and cpu.max.burst, which this kernel has not got.
        (("delays",), 6, 2),
        # Of both the directory, memory.current, high, max and peak, of the container memory.events and .local, and of
        # the pod memory.max and the directory once more, as that is what limits the container.
        # memory.stat, which the kernel takes longest to write, is read only of what comes near a limit.
        (("memory",), 14, 11),
        (("pressure", "delays", "memory"), 25, 16),
    ],
    ids=str,
)
def test_files_opened_and_read_for_each_pod(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, collectors: tuple[str, ...], opened: int, read: int
) -> None:
    """One pod more, with one container, wants so many more; what is not asked for wants none."""
    found = []
    for number in (10, 20):
        roots = lay_out(tmp_path / str(number), number)
        chosen = [load(name)(resolve({}, {})) for name in collectors]
        node = Node(roots)
        found.append(calls(monkeypatch, lambda chosen=chosen, node=node: [one.read(node) for one in chosen]))  # type: ignore[misc]
    more = found[1] - found[0]
    assert more["open"] / 10 == opened
    # Directories are not read, nor is what is not there; of a file the end is read too, and nothing is read twice.
    assert more["read"] / 10 == 2 * read
    # The walk looks at each once, and lists only what has others below it.
    assert more["stat"] / 10 <= 2
    assert more["scandir"] / 10 <= 1
    assert more["listdir"] == 0


@pytest.mark.parametrize(("collector", "most"), [("pressure", 260), ("delays", 300), ("memory", 500)])
def test_calls_for_each_pod(tmp_path: Path, collector: str, most: int) -> None:
    """One pod more takes so many calls, of functions in Python and in C, from the walk to the text of its samples."""

    def count(number: int) -> int:
        roots = lay_out(tmp_path / str(number), number)
        reading = load(collector)(resolve({}, {}))
        # What is remembered from one scrape to the next is there in the second.
        render(reading.read(Node(roots)), openmetrics=True)
        counted = 0

        def profile(_frame: object, event: str, _argument: object) -> None:
            nonlocal counted
            counted += event in ("call", "c_call")

        sys.setprofile(profile)
        try:
            render(reading.read(Node(roots)), openmetrics=True)
        finally:
            sys.setprofile(None)
        return counted

    each = (count(20) - count(10)) / 10
    assert most / 2 <= each <= most


def test_what_is_allocated_for_each_sample(tmp_path: Path) -> None:
    """At its highest a scrape holds the samples and their text twice, as lines and as a whole, and little beside."""
    peaks, samples = [], []
    for number in (10, 60):
        roots = lay_out(tmp_path / str(number), number)
        collector = load("memory")(resolve({}, {}))
        render(collector.read(Node(roots)), openmetrics=True)
        node = Node(roots)
        node.inventory()
        tracemalloc.start()
        try:
            families = collector.read(node)
            text = render(families, openmetrics=True)
            peaks.append(tracemalloc.get_traced_memory()[1])
        finally:
            tracemalloc.stop()
        samples.append(sum(len(family.samples) for family in families))
        assert text.count(b"\n") > samples[-1]
    each = (peaks[1] - peaks[0]) / (samples[1] - samples[0])
    assert each <= 250


START = """
import asyncio, os, sys, threading
from shoal import cli

def heaps():
    # glibc maps one for each thread: 64 MiB at a multiple of that, the first part in use and the rest not yet. A stack
    # may begin at such a place too.
    barrier = threading.Barrier(9)
    def allocate():
        kept = bytes(100_000)
        barrier.wait()
        barrier.wait()
    for _ in range(8):
        threading.Thread(target=allocate).start()
    barrier.wait()
    with open("/proc/self/maps") as maps:
        found = [[*(int(end, 16) for end in words[0].split("-")), words[1]] for words in map(str.split, maps)]
    barrier.wait()
    return sum(
        used[0] % (64 << 20) == 0 and used[1:] == [rest[0], "rw-p"] and rest[1:] == [used[0] + (64 << 20), "---p"]
        for used, rest in zip(found, found[1:])
    )

def run(serving):
    serving.close()
    client = sys.modules["aiohttp.connector"]
    for context in (client._SSL_CONTEXT_VERIFIED, client._SSL_CONTEXT_UNVERIFIED):
        print(context.cert_store_stats()["x509"], context.verify_mode.name)
    print(os.environ.get("SSL_CERT_FILE"), os.environ.get("SSL_CERT_DIR"))
    print(heaps())

asyncio.run = run
cli.main(["--web.listen-address=127.0.0.1:0"])
"""


def test_what_a_process_that_serves_does_without(tmp_path: Path) -> None:
    """The authorities that aiohttp's client would trust, read for nobody, and a heap for each thread.

    The environment stays as it was.
    """
    authority = tmp_path / "authority.pem"
    making = ("openssl", "req", "-x509", "-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:P-256", "-nodes")
    subprocess.run(
        [*making, "-subj", "/CN=authority", "-keyout", tmp_path / "key.pem", "-out", authority],
        check=True,
        capture_output=True,
    )
    environment = {name: value for name, value in os.environ.items() if name != "SSL_CERT_DIR"}
    environment["SSL_CERT_FILE"] = str(authority)
    command = [sys.executable, "-c", START]
    said = subprocess.run(command, env=environment, check=True, capture_output=True, text=True).stdout
    assert said.splitlines() == ["0 CERT_REQUIRED", "0 CERT_NONE", f"{authority} None", "0"]


def test_memory_for_each_sample(tmp_path: Path) -> None:
    """A sample is a tuple of its labels, which the samples of a workload share, and a number."""
    roots = lay_out(tmp_path, 20)
    collector = load("memory")(resolve({}, {}))
    collector.read(Node(roots))
    node = Node(roots)
    node.inventory()
    gc.collect()
    before = sys.getallocatedblocks()
    families: list[Family] = collector.read(node)
    blocks = sys.getallocatedblocks() - before
    samples = sum(len(family.samples) for family in families)
    assert samples > 20 * 3
    assert blocks / samples <= 5
    # The label part of a line is made once, and there is no more of it than there are sets of labels.
    render(families, openmetrics=True)
    gc.collect()
    before = sys.getallocatedblocks()
    render(families, openmetrics=True)
    assert sys.getallocatedblocks() - before < samples / 10
