"""What a scrape of a full node costs beside ss(8) and conntrack(8): `python -m tests.bench.full`, as root.

Builds a node of 110 pods with 250 containers, 50,000 TCP sockets and 50,000 tracked connections (node.py), runs the
exporter on it with the privileges of tier 2 and, looking into every pod, of tier 3, and scrapes it as Prometheus does.
Prints tables, and ends with 1 if a scrape costs more than it may. Run it on an idle machine.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from collections import defaultdict
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

from tests.bench.node import CONTAINERS, PODS, REPOSITORY, TIER_2, TIER_3, full_node
from tests.bench.target import EXPORTER, machine, running

from shoal.collectors import available_names
from shoal.kernel.namespaces import open_in_namespace

if TYPE_CHECKING:
    from collections.abc import Sequence
    from contextlib import AbstractContextManager
    from typing import IO

    from tests.bench.node import FullNode
    from tests.bench.target import Target

MOST_WALL: Final = 1.0
"""Seconds that a scrape may take."""
MOST_CPU: Final = 0.5
"""Seconds of CPU that a scrape may take."""
MOST_MEMORY: Final = 90.0
"""MiB that the exporter may ever hold (VmHWM)."""
MOST_LAG: Final = 10.0
"""Milliseconds that the event loop may be late."""

_WARM_UP: Final = 3
_PAUSE: Final = 0.2
# Memory still grows after that many: garbage in cycles is left lying for a long time, and each thread has its heap.
_SOAK: Final = 60
_DUMPS: Final = 3
_DUMP_INTERVAL: Final = 10
_LOOP_PROBE: Final = REPOSITORY / "tests" / "unit" / "loop_probe.py"
_DURATION: Final = re.compile(r'^shoal_scrape_collector_duration_seconds\{collector="(\w+)"\} (\S+)$', re.MULTILINE)
_FAILED: Final = re.compile(r'^shoal_scrape_collector_success\{collector="(\w+)"\} 0', re.MULTILINE)
_DUMP: Final = re.compile(r"^shoal_conntrack_dump_(entries|duration_seconds) (\S+)$", re.MULTILINE)


@dataclass(frozen=True, slots=True)
class Way:
    """One way of running the exporter."""

    name: str
    privileges: Sequence[str]
    options: tuple[str, ...] = ()

    def run(
        self, node: FullNode, *options: str, program: Sequence[str] = ("-m", "shoal"), output: IO[bytes] | None = None
    ) -> AbstractContextManager[Target]:
        """Run the exporter this way, with more options."""
        command = ["env", f"PYTHONPATH={EXPORTER}", sys.executable, *program, *self.options, *options]
        command = node.command(*command, privileges=self.privileges)
        # The connection is made in the node's network namespace, and stays there.
        return running(self.name, command, there=partial(open_in_namespace, "/proc", node.pid), output=output)


WAYS: Final = (Way("tier 2", TIER_2), Way("tier 3", TIER_3, ("--netns.enter=true",)))


@dataclass(slots=True)
class Result:
    """What was measured of one way; times in seconds, memory in MiB."""

    wall: list[float] = field(default_factory=list)
    cpu: list[float] = field(default_factory=list)
    collectors: dict[str, list[float]] = field(default_factory=lambda: defaultdict(list))
    series: int = 0
    memory: float = 0.0
    lag: dict[str, Any] = field(default_factory=dict)


def measure(node: FullNode, way: Way, scrapes: int) -> Result:
    """Scrape `scrapes` times after a dump of the connection table, more often for memory, and again for the loop."""
    result = Result()
    node.renew_time_wait()
    with way.run(node) as target:
        for _ in range(_WARM_UP):
            target.scrape()
            time.sleep(1)
        for _ in range(scrapes):
            wall, cpu = time.perf_counter(), target.cpu()
            target.scrape()
            result.wall.append(time.perf_counter() - wall)
            result.cpu.append(target.cpu() - cpu)
            text = target.text.decode()
            if failed := _FAILED.findall(text):
                raise RuntimeError(f"{way.name}: collectors failed: {', '.join(failed)}")
            for name, seconds in _DURATION.findall(text):
                result.collectors[name].append(float(seconds))
            time.sleep(_PAUSE)
        result.series = target.series
        for _ in range(_SOAK):
            target.scrape()
        result.memory = target.memory("VmHWM")
    with tempfile.TemporaryFile() as output:
        with way.run(node, program=(str(_LOOP_PROBE),), output=output) as target:
            for _ in range(scrapes):
                target.scrape()
                time.sleep(_PAUSE)
        output.seek(0)
        result.lag = json.load(output)
    return result


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


def table(rows: Sequence[tuple[str, ...]]) -> list[str]:
    """Return lines in which the first column is flush left and the others right."""
    widths = [max(map(len, column)) + 3 for column in zip(*rows, strict=True)]
    return [
        row[0].ljust(widths[0]) + "".join(cell.rjust(width) for cell, width in zip(row[1:], widths[1:], strict=True))
        for row in rows
    ]


def report(results: dict[str, Result]) -> tuple[list[str], bool]:
    """Return the tables of the scrapes, and whether all bounds are kept."""
    found = list(results.values())

    def row(title: str, limit: str, values: Sequence[str]) -> tuple[str, ...]:
        return (title, *values, limit)

    rows = [
        row("", "at most", list(results)),
        row("wall, median (ms)", "", [_ms(statistics.median(one.wall)) for one in found]),
        row("wall, worst (ms)", _ms(MOST_WALL), [_ms(max(one.wall)) for one in found]),
        row("CPU, median (ms)", _ms(MOST_CPU), [_ms(statistics.median(one.cpu)) for one in found]),
        row("CPU, worst (ms)", "", [_ms(max(one.cpu)) for one in found]),
        row("peak memory (MiB)", f"{MOST_MEMORY:.0f}", [f"{one.memory:.1f}" for one in found]),
        row("loop late, the exporter's doing (ms)", f"{MOST_LAG:.0f}", [_ms(one.lag["unexplained"]) for one in found]),
        row("loop late, with waiting for a CPU (ms)", "", [_ms(one.lag["late"]) for one in found]),
        row("longest callback, CPU (ms)", "", [_ms(one.lag["callback"]) for one in found]),
        row("garbage collection, CPU (ms)", "", [_ms(one.lag["collection"]) for one in found]),
        row("series", "", [f"{one.series:,}" for one in found]),
    ]
    names = sorted(set().union(*(one.collectors for one in found)))
    per_collector = [("collector, median (ms)", *results)]
    per_collector += [(name, *(_ms(statistics.median(one.collectors[name])) for one in found)) for name in names]
    kept = all(
        max(one.wall) <= MOST_WALL
        and statistics.median(one.cpu) <= MOST_CPU
        and one.memory <= MOST_MEMORY
        and one.lag["unexplained"] * 1000 <= MOST_LAG
        for one in found
    )
    return [*table(rows), "", *table(per_collector)], kept


def _ms(seconds: float) -> str:
    return f"{seconds * 1000:.1f}"


def beside(node: FullNode, dump: Dump) -> list[str]:
    """Time what a person would type, where the sockets and the entries are, and put the dump beside it."""
    node.renew_time_wait()
    inside = [["nsenter", f"--target={pid}", "--net", "ss", "-tan"] for pid in node.pods_with_sockets]
    sockets = clocked(node.command("ss", "-tan"), *inside)
    entries = clocked(node.command("conntrack", "-L"))
    rows = [
        ("", "wall (ms)", "CPU (ms)", "lines"),
        ("ss -tan", _ms(sockets[0]), _ms(sockets[1]), f"{sockets[2]:,}"),
        ("conntrack -L", _ms(entries[0]), _ms(entries[1]), f"{entries[2]:,}"),
        ("the exporter's dump of connections", _ms(dump.wall), _ms(dump.cpu), f"{dump.entries:,}"),
    ]
    return [*table(rows), f"The dump is taken once a minute and adds {dump.memory:.1f} MiB at its peak."]


def main() -> int:
    """Measure and report."""
    parser = argparse.ArgumentParser(description="What a scrape of a full node costs.")
    parser.add_argument("--scrapes", type=int, default=20, help="how many of each kind count (default: 20)")
    parser.add_argument("--only", choices=[way.name for way in WAYS], help="measure one way only")
    arguments = parser.parse_args()
    ways = [way for way in WAYS if arguments.only in (None, way.name)]
    if os.geteuid():
        parser.error("only root can build a node")
    with full_node() as node:
        node.fill()
        entries = Path(f"/proc/{node.pid}/net/stat/nf_conntrack")
        tracked = int(entries.read_text().splitlines()[1].split()[0], 16) if entries.exists() else 0
        what = f"{PODS} pods with {CONTAINERS} containers, {tracked:,} tracked connections, and the sockets below"
        head = (machine(), what, f"{arguments.scrapes} scrapes each", "")
        sys.stdout.write("\n".join(head) + "\n")
        lines, kept = report({way.name: measure(node, way, arguments.scrapes) for way in ways})
        sys.stdout.write("\n".join(lines) + "\n\n")
        sys.stdout.flush()
        sys.stdout.write("\n".join(beside(node, measure_dump(node, ways[0]))) + "\n")
    return 0 if kept else 1


if __name__ == "__main__":
    raise SystemExit(main())
