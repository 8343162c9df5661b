"""Where the time of a scrape goes on a full node: `python -m tests.bench.profile`, with py-spy on the path.

Builds the node (node.py), as root, scrapes the exporter on it one scrape after another and has py-spy(1) look a few
hundred times a second at what its threads do, from outside. Prints which part of the samples each collector had, and
each function by itself; and how much of the CPU was the kernel's.
"""

from __future__ import annotations

import argparse
import os
import re
import shutil
import subprocess
import sys
import tempfile
import time
from collections import Counter
from pathlib import Path
from typing import TYPE_CHECKING, Final

from tests.bench.node import full_node
from tests.bench.scrape import SHOAL, SIZES, table
from tests.bench.target import machine

if TYPE_CHECKING:
    from tests.bench.node import FullNode
    from tests.bench.target import Target

_RATE: Final = 250
_WARM_UP: Final = 5
_MOST: Final = 25
_FRAME: Final = re.compile(r"^(?P<function>.+) \((?P<file>.+?)(?::\d+)?\)$")
# By a function that the stack has, the first of these.
_PARTS: Final = {
    "_take_dump": "conntrack, the dump",
    "build_inventory": "the inventory of cgroups",
    "_label_namespaces": "the network namespaces",
    "_body": "the text and its compression",
    "_run_once": "the event loop and HTTP",
}
# Where a thread is that waits for something to do, or for another thread: none of these takes time of the CPU.
_WAITING: Final = re.compile(
    r"(?:^_worker|^wait|\.wait|\.select|_Watch\._turn|\._wait_for_tstate_lock|_Once\.get) \([^)]*\)$"
)
_COLLECTOR: Final = re.compile(r"shoal/collectors/(?!__init__)(\w+)\.py")


def record(node: FullNode, target: Target, seconds: float) -> tuple[Counter[tuple[str, ...]], int]:
    """Return {stack: samples} of the exporter while it is scraped all the time, and how often that was."""
    with tempfile.TemporaryDirectory() as place:
        raw = Path(place, "raw")
        options = ("--format", "raw", "--rate", str(_RATE), "--duration", str(round(seconds)))
        # In the same PID namespace, where it can tell threads that wait from those that run.
        pid = re.findall(r"^NSpid:.*\s(\d+)$", Path(f"/proc/{target.pid}/status").read_text(), re.MULTILINE)[0]
        command = node.command("py-spy", "record", "--pid", pid, *options, "--output", str(raw))
        scrapes = 0
        with subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE) as spy:
            while spy.poll() is None:
                target.scrape()
                scrapes += 1
            if spy.returncode:
                raise RuntimeError(f"py-spy: {spy.stderr.read().decode() if spy.stderr else spy.returncode}")
        stacks: Counter[tuple[str, ...]] = Counter()
        for line in raw.read_text().splitlines():
            stack, _, samples = line.rpartition(" ")
            if not _WAITING.search(stack.rpartition(";")[2]):
                stacks[tuple(stack.split(";"))] += int(samples)
        return stacks, scrapes


def _place(frame: str) -> str:
    """Return a frame as module and function."""
    match = _FRAME.match(frame)
    if not match:
        return frame
    file = match["file"]
    _, found, inside = file.rpartition("/shoal/") if "/shoal/" in file else ("", "", file)
    return f"{inside if found or file.startswith('<') else '/'.join(file.split('/')[-2:])} {match['function']}"


def _part(stack: tuple[str, ...]) -> str:
    """Return which part of the exporter a stack belongs to."""
    text = ";".join(stack)
    for function, name in _PARTS.items():
        if function in text:
            return name
    match = _COLLECTOR.search(text)
    return match[1] if match else "the rest"


def report(stacks: Counter[tuple[str, ...]]) -> str:
    """Return two tables: the parts, and the functions that have most of the time by themselves."""
    total = stacks.total()
    parts: Counter[str] = Counter()
    alone: Counter[str] = Counter()
    for stack, samples in stacks.items():
        parts[_part(stack)] += samples
        alone[_place(stack[-1])] += samples

    def rows(title: str, found: Counter[str]) -> str:
        return table([(title, "part"), *((name, f"{count / total:.1%}") for name, count in found.most_common(_MOST))])

    return "\n\n".join((rows("part of the exporter", parts), rows("function, by itself", alone)))


def main() -> int:
    """Profile and report."""
    parser = argparse.ArgumentParser(description="Where the time of a scrape goes.")
    parser.add_argument("size", nargs="?", default="full", choices=SIZES, help=f"one of {', '.join(SIZES)} (full)")
    parser.add_argument("--seconds", type=float, default=30, help="for how long, of each tier (30)")
    arguments = parser.parse_args()
    if os.geteuid():
        parser.error("only root can build a node")
    if not shutil.which("py-spy"):
        parser.error("there is no py-spy on the path; install the package py-spy where you like")
    size, _ = SIZES[arguments.size]
    _say(machine())
    with full_node(size.pods, size.containers) as node:
        node.fill(size)
        for way in SHOAL:
            # What is in TIME_WAIT is there for a minute.
            node.renew_time_wait()
            with way.run(node) as target:
                for _ in range(_WARM_UP):
                    target.scrape()
                time.sleep(1)
                before = _times(target.pid)
                stacks, scrapes = record(node, target, arguments.seconds)
                user, system = (after - first for after, first in zip(_times(target.pid), before, strict=True))
            _say(
                f"## {arguments.size}, {way.name}",
                f"{scrapes} scrapes, {stacks.total():,} samples. CPU for each scrape: {user / scrapes * 1000:.0f} ms "
                f"of its own and {system / scrapes * 1000:.0f} ms in the kernel.",
                report(stacks),
            )
    return 0


def _times(pid: int) -> tuple[float, float]:
    """Return the seconds of CPU that a process has used itself, and in the kernel."""
    fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    tick = os.sysconf("SC_CLK_TCK")
    return int(fields[11]) / tick, int(fields[12]) / tick


def _say(*paragraphs: str) -> None:
    sys.stdout.write("".join(f"{paragraph}\n\n" for paragraph in paragraphs))
    sys.stdout.flush()


if __name__ == "__main__":
    raise SystemExit(main())
