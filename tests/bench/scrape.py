"""What a scrape costs on an idle, a full and a monstrous node beside what it replaces: `python -m tests.bench.scrape`.

Builds the node (node.py), as root, runs the exporter on it with the privileges of tier 2 and, looking into every pod,
of tier 3, and beside it node_exporter, prometheus_client's server and redis_exporter; scrapes them in turn, as
Prometheus does, over a connection that stays open and asking for gzip; and times ss(8), conntrack(8) and nstat(8) on
the same sockets and entries. Ends with 1 if a scrape costs more than it may. Run it on a machine that does nothing
else.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import re
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from collections import defaultdict
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from functools import partial
from typing import TYPE_CHECKING, Any, Final

import psutil
from tests.bench.node import FULL, IDLE, MONSTER, REPOSITORY, TIER_2, TIER_3, full_node
from tests.bench.target import EXPORTER, machine, running

from shoal.collectors import available_names
from shoal.kernel.namespaces import open_in_namespace

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence
    from contextlib import AbstractContextManager
    from typing import IO

    from tests.bench.node import FullNode, Size
    from tests.bench.target import Target


@dataclass(frozen=True, slots=True)
class Bounds:
    """What a scrape in tier 2 may cost: milliseconds of CPU in the median and by the clock at p99, MiB at the peak."""

    cpu: float = math.inf
    wall: float = math.inf
    memory: float = math.inf
    ratio: float = math.inf
    """CPU, as a multiple of node_exporter's."""
    memory_ratio: float = math.inf


SIZES: Final = {
    "idle": (IDLE, Bounds(ratio=1.0, memory_ratio=2.5)),
    "full": (FULL, Bounds(cpu=120, wall=300, memory=75)),
    "monster": (MONSTER, Bounds(cpu=600, wall=1500, memory=150)),
}
MOST_LAG: Final = 10.0
"""Milliseconds that the event loop may be late."""
MOST_START: Final = 0.5
"""Seconds from the start to the first answer."""

_WARM_UP: Final = 5
_PAUSE: Final = 0.05
# Memory still grows after the scrapes that count: garbage in cycles lies for a long time, and each thread has its heap.
_SOAK: Final = 60
_DUMPS: Final = 3
_DUMP_INTERVAL: Final = 10
_STARTS: Final = 3
_ROUNDS: Final = 3
_LOOP_PROBE: Final = REPOSITORY / "tests" / "unit" / "loop_probe.py"
_DURATION: Final = re.compile(r'^shoal_scrape_collector_duration_seconds\{collector="(\w+)"\} (\S+)$', re.MULTILINE)
_FAILED: Final = re.compile(r'^shoal_scrape_collector_success\{collector="(\w+)"\} 0', re.MULTILINE)
_DUMP: Final = re.compile(r"^shoal_conntrack_dump_(entries|duration_seconds) (\S+)$", re.MULTILINE)


@dataclass(frozen=True, slots=True)
class Way:
    """A program that is scraped, and with which privileges it runs."""

    name: str
    privileges: Sequence[str] = ()
    options: tuple[str, ...] = ()
    program: tuple[str, ...] = ("-m", "shoal")

    def run(
        self, node: FullNode, *options: str, program: Sequence[str] = (), output: IO[bytes] | None = None
    ) -> AbstractContextManager[Target]:
        """Run it on the node, with more options."""
        words = [*(program or self.program), *self.options, *options]
        if words[0].startswith(("-", "/")):
            # What is installed is compiled. The first run does it, if the environment says otherwise.
            environment = ("--unset=PYTHONDONTWRITEBYTECODE", f"PYTHONPATH={EXPORTER}:{REPOSITORY}")
            words = ["env", *environment, sys.executable, *words]
        command = node.command(*words, privileges=self.privileges or ("--no-new-privs",))
        # The connection is made in the node's network namespace, and stays there.
        return running(self.name, command, there=partial(open_in_namespace, "/proc", node.pid), output=output)


SHOAL: Final = (Way("tier 2", TIER_2), Way("tier 3", TIER_3, ("--netns.enter=true",)))
PEERS: Final = (
    Way("node_exporter", program=("prometheus-node-exporter",)),
    Way("with tcpstat", options=("--collector.tcpstat",), program=("prometheus-node-exporter",)),
    Way("prometheus_client", program=("-m", "tests.bench.client")),
)


@dataclass(slots=True)
class Result:
    """What was measured of one program; times in seconds, memory in MiB."""

    wall: list[float] = field(default_factory=list)
    cpu: list[float] = field(default_factory=list)
    collectors: dict[str, list[float]] = field(default_factory=lambda: defaultdict(list))
    start: float = 0.0
    series: int = 0
    raw: int = 0
    gzip: int = 0
    memory: float = 0.0
    descriptors: int = 0
    lag: dict[str, Any] = field(default_factory=dict)

    def note(self, target: Target) -> None:
        """Scrape once and note what it took."""
        wall, cpu = time.perf_counter(), target.cpu()
        target.scrape()
        self.wall.append(time.perf_counter() - wall)
        text = target.text.decode()
        # A program of Go's collects its garbage after the answer.
        time.sleep(_PAUSE)
        self.cpu.append(target.cpu() - cpu)
        if failed := _FAILED.findall(text):
            raise RuntimeError(f"{target.name}: collectors failed: {', '.join(failed)}")
        for name, seconds in _DURATION.findall(text):
            self.collectors[name].append(float(seconds))


def measure(node: FullNode, ways: Sequence[Way], scrapes: int) -> dict[str, Result]:
    """Scrape all of them in turn, some times to warm up and `scrapes` times that count, and then for their memory."""
    results = {way.name: Result() for way in ways}
    for way in ways:
        starts = []
        for _ in range(_STARTS):
            with way.run(node) as target:
                target.scrape()
                starts.append(time.perf_counter() - target.began)
        results[way.name].start = statistics.median(starts)
    node.renew_time_wait()
    with ExitStack() as stack:
        targets = [stack.enter_context(way.run(node)) for way in ways]
        for _ in range(_WARM_UP):
            for target in targets:
                target.scrape()
                time.sleep(_PAUSE)
        for _ in range(scrapes):
            for target in targets:
                results[target.name].note(target)
        for target in targets:
            result = results[target.name]
            result.series, result.raw, result.gzip = target.series, len(target.text), target.wire_bytes
            for _ in range(_SOAK):
                target.scrape()
            result.memory, result.descriptors = target.memory("VmHWM"), target.descriptors()
    return results


def measure_loop(node: FullNode, way: Way, scrapes: int) -> dict[str, Any]:
    """Scrape again with a probe in the event loop, three times; return what it saw in the middle one.

    The worst moment of so many thousands is the machine's own now and then.
    """
    rounds = [_probe_loop(node, way, scrapes) for _ in range(_ROUNDS)]
    return sorted(rounds, key=lambda found: float(found["unexplained"]))[_ROUNDS // 2]


def _probe_loop(node: FullNode, way: Way, scrapes: int) -> dict[str, Any]:
    with tempfile.TemporaryFile() as output:
        with way.run(node, program=(str(_LOOP_PROBE),), output=output) as target:
            for _ in range(scrapes):
                target.scrape()
                time.sleep(_PAUSE)
        output.seek(0)
        found: dict[str, Any] = json.load(output)
        return found


@dataclass(frozen=True, slots=True)
class Dump:
    """What one dump of the connection table takes: seconds, and MiB more than without dumps."""

    entries: int
    wall: float
    cpu: float
    memory: float


def measure_dump(node: FullNode, way: Way) -> Dump:
    """Compare an exporter with the conntrack collector alone that dumps at every scrape with one that never dumps."""
    others = [f"--no-collector.{name}" for name in available_names() if name != "conntrack"]
    cpu: dict[int, float] = {}
    memory: dict[int, float] = {}
    found: dict[str, str] = {}
    for interval in (0, _DUMP_INTERVAL):
        with way.run(node, *others, f"--conntrack.dump-interval={interval}") as target:
            target.scrape()
            time.sleep(_DUMP_INTERVAL)
            began = target.cpu()
            for _ in range(_DUMPS):
                target.scrape()
                time.sleep(_DUMP_INTERVAL)
            cpu[interval], memory[interval] = (target.cpu() - began) / _DUMPS, target.memory("VmHWM")
            found = dict(_DUMP.findall(target.text.decode()))
    return Dump(
        int(float(found["entries"])),
        float(found["duration_seconds"]),
        cpu[_DUMP_INTERVAL] - cpu[0],
        memory[_DUMP_INTERVAL] - memory[0],
    )


def clocked(*commands: Sequence[str]) -> tuple[float, float, int]:
    """Run programs one after another and return the wall time and CPU of all, and the lines that they printed."""
    before, began, lines = resource.getrusage(resource.RUSAGE_CHILDREN), time.perf_counter(), 0
    for command in commands:
        printed = subprocess.run(command, check=True, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL).stdout
        lines += printed.count(b"\n")
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    cpu = after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime
    return time.perf_counter() - began, cpu, lines


def table(rows: Sequence[tuple[str, ...]]) -> str:
    """Return a table of Markdown, the first row its head."""
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    lines = [
        "| " + " | ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)) + " |" for row in rows
    ]
    lines.insert(1, "|" + "|".join("-" * (width + 2) for width in widths) + "|")
    return "\n".join(lines)


def report(results: dict[str, Result]) -> str:
    """Return the table of what was scraped."""
    found = list(results.values())

    def row(title: str, values: Sequence[str]) -> tuple[str, ...]:
        return (title, *values)

    return table(
        [
            row("", list(results)),
            row("CPU, median (ms)", [_ms(statistics.median(one.cpu)) for one in found]),
            row("CPU, p99 (ms)", [_ms(_p99(one.cpu)) for one in found]),
            row("wall, median (ms)", [_ms(statistics.median(one.wall)) for one in found]),
            row("wall, p99 (ms)", [_ms(_p99(one.wall)) for one in found]),
            row("peak memory (MiB)", [f"{one.memory:.1f}" for one in found]),
            row("descriptors", [f"{one.descriptors}" for one in found]),
            row("answer, text (bytes)", [f"{one.raw:,}" for one in found]),
            row("answer, gzip (bytes)", [f"{one.gzip:,}" for one in found]),
            row("series", [f"{one.series:,}" for one in found]),
            row("start to first answer (s)", [f"{one.start:.2f}" for one in found]),
            row("loop late, its own doing (ms)", [_ms(one.lag["unexplained"]) if one.lag else "" for one in found]),
            row("longest callback, CPU (ms)", [_ms(one.lag["callback"]) if one.lag else "" for one in found]),
        ]
    )


def shares(results: dict[str, Result]) -> str:
    """Return the table of the collectors: the time of each, and its part of all."""
    of_shoal = {name: one.collectors for name, one in results.items() if one.collectors}
    names = sorted(set().union(*of_shoal.values()))
    rows = [("collector, median (ms)", *(title for name in of_shoal for title in (name, "part")))]
    medians = {way: {name: statistics.median(of_shoal[way][name]) for name in names} for way in of_shoal}
    for name in names:
        cells = []
        for way in of_shoal:
            cells += [_ms(medians[way][name]), f"{medians[way][name] / sum(medians[way].values()):.0%}"]
        rows.append((name, *cells))
    return table(rows)


def broken(results: dict[str, Result], bounds: Bounds) -> list[str]:
    """Say which bounds are not kept."""
    mine, peer = results["tier 2"], results["node_exporter"]
    cpu = statistics.median(mine.cpu)
    found = {
        "CPU (ms)": (cpu * 1000, bounds.cpu),
        "wall, p99 (ms)": (_p99(mine.wall) * 1000, bounds.wall),
        "memory (MiB)": (mine.memory, bounds.memory),
        "CPU beside node_exporter": (cpu / statistics.median(peer.cpu), bounds.ratio),
        "memory beside node_exporter": (mine.memory / peer.memory, bounds.memory_ratio),
        "start (s)": (mine.start, MOST_START),
        "loop late (ms)": (mine.lag["unexplained"] * 1000, MOST_LAG),
    }
    return [f"{name}: {value:.2f}, at most {most}" for name, (value, most) in found.items() if value > most]


def _p99(values: Sequence[float]) -> float:
    return sorted(values)[math.ceil(0.99 * len(values)) - 1]


def _ms(seconds: float) -> str:
    return f"{seconds * 1000:.1f}"


def beside(node: FullNode, size: Size, tier_3: Result, dump: Dump | None) -> str:
    """Time what a person would type, where the sockets and the entries are, and put what does the same beside it."""
    node.renew_time_wait()
    pids = node.sandboxes[: max(size.crowds - 1, 0)]
    enter = [["nsenter", f"--target={pid}", "--net"] for pid in pids]
    sockets = clocked(node.command("ss", "-tanp"), *([*one, "ss", "-tanp"] for one in enter))
    counters = clocked(node.command("nstat", "-asz"), *([*one, "nstat", "-asz"] for one in enter))
    rows = [("", "wall (ms)", "CPU (ms)", "lines or entries")]
    rows.append(
        ("ss -tanp, on the node and in the pods with sockets", _ms(sockets[0]), _ms(sockets[1]), f"{sockets[2]:,}")
    )
    mine = [statistics.median(tier_3.collectors[name]) for name in ("listen_queue", "ephemeral_ports")]
    rows.append(
        ("listen_queue and ephemeral_ports, on the node and in every pod", _ms(sum(mine)), "", f"{size.sockets:,}")
    )
    rows.append(("nstat -asz, in the same places", _ms(counters[0]), _ms(counters[1]), f"{counters[2]:,}"))
    if dump:
        entries = clocked(node.command("conntrack", "-L"))
        rows.append(("conntrack -L", _ms(entries[0]), _ms(entries[1]), f"{entries[2]:,}"))
        rows.append(("the exporter's dump, once a minute", _ms(dump.wall), _ms(dump.cpu), f"{dump.entries:,}"))
    text = table(rows)
    return f"{text}\n\nThe dump adds {dump.memory:.1f} MiB at its peak." if dump else text


@contextmanager
def redis(node: FullNode) -> Iterator[str]:
    """Run a redis-server with an append-only file on the node and give its address."""
    with tempfile.TemporaryDirectory() as place:
        options = ("--port", "6399", "--dir", place, "--appendonly", "yes", "--save", "")
        with subprocess.Popen(node.command("redis-server", *options), stdout=subprocess.DEVNULL) as server:
            time.sleep(2)
            try:
                yield "127.0.0.1:6399"
            finally:
                # Below nsenter, which passes on no signal.
                for process in psutil.Process(server.pid).children(recursive=True):
                    process.terminate()


def measure_redis(node: FullNode, scrapes: int) -> dict[str, Result]:
    """Compare the collector of Redis alone with redis_exporter, on the same server."""
    with redis(node) as address:
        others = tuple(f"--no-collector.{name}" for name in available_names() if name != "redis_aof")
        ways = (
            Way("redis_aof alone", TIER_2, (*others, f"--redis.target=redis://{address}")),
            Way("redis_exporter", options=(f"--redis.addr=redis://{address}",), program=("prometheus-redis-exporter",)),
        )
        return measure(node, ways, scrapes)


def main() -> int:
    """Measure and report."""
    parser = argparse.ArgumentParser(description="What a scrape costs, beside what it replaces.")
    parser.add_argument("sizes", nargs="*", default=list(SIZES), help=f"of {', '.join(SIZES)}; all by default")
    parser.add_argument("--scrapes", type=int, default=50, help="how many of each count (50)")
    arguments = parser.parse_args()
    if wrong := set(arguments.sizes) - SIZES.keys():
        parser.error(f"there is no size {', '.join(wrong)}; there are {', '.join(SIZES)}")
    if os.geteuid():
        parser.error("only root can build a node")
    kept = True
    _say(machine(), f"{arguments.scrapes} scrapes of each, in turn.")
    for name in arguments.sizes:
        size, bounds = SIZES[name]
        with full_node(size.pods, size.containers) as node:
            node.fill(size)
            _say(
                f"## {name}",
                f"{size.pods} pods with {size.containers:,} containers and {size.listeners:,} listeners, "
                f"{size.sockets:,} other TCP sockets, {size.entries:,} tracked connections, "
                f"{size.neighbours:,} neighbours.",
            )
            results = measure(node, (*SHOAL, *PEERS), arguments.scrapes)
            for way in SHOAL:
                results[way.name].lag = measure_loop(node, way, arguments.scrapes)
            _say(report(results), shares(results))
            dump = measure_dump(node, SHOAL[0]) if size.entries else None
            _say(beside(node, size, results["tier 3"], dump))
            if name == "idle":
                _say(report(measure_redis(node, arguments.scrapes)))
            wrong_now = broken(results, bounds)
            _say("Every bound is kept." if not wrong_now else "Not kept: " + "; ".join(wrong_now))
            kept = kept and not wrong_now
    return 0 if kept else 1


def _say(*paragraphs: str) -> None:
    sys.stdout.write("".join(f"{paragraph}\n\n" for paragraph in paragraphs))
    sys.stdout.flush()


if __name__ == "__main__":
    raise SystemExit(main())
