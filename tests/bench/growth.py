"""How the cost of a scrape grows with pods, sockets and tracked connections: `python -m tests.bench.growth`.

For each of the three it builds nodes (node.py), as root, that differ in nothing else, and measures the CPU of a scrape
in tier 2 and 3, of one that does not ask for what grows, and of what prints the same. Draws docs/growth.svg. Ends with
1 if the cost does not grow in proportion, or grows where nothing was asked for. Run it on a machine that does nothing
else.
"""

from __future__ import annotations

import argparse
import math
import os
import statistics
import sys
import time
from contextlib import ExitStack
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Final

from tests.bench.node import REPOSITORY, TIER_2, Size, full_node
from tests.bench.scrape import PEERS, SHOAL, Way, clocked, table
from tests.bench.target import machine

from shoal.collectors import available_names

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from tests.bench.node import FullNode
    from tests.bench.target import Target

PICTURE: Final = REPOSITORY / "docs" / "growth.svg"

MOST_BEND: Final = 1.5
"""How much steeper the second half of a line may be than the whole of it."""
MOST_RISE: Final = 1.25
"""How much dearer what was not asked for may be at the end, beside the middle of all."""
SLACK: Final = 2.0
"""Milliseconds that are let pass in both."""

_WARM_UP: Final = 3
_PAUSE: Final = 0.05
_TIMES: Final = 3
# Nothing goes on in a process that has used no CPU for so many seconds.
_IDLE: Final = 0.3
# Seconds for which sockets in TIME_WAIT can be relied on, of the sixty that they last.
_RENEW: Final = 45
_DUMP_INTERVAL: Final = 10

_FEW: Final = (10, 20)
"""Pods and containers of a node on which something else grows."""


@dataclass(frozen=True, slots=True)
class Axis:
    """One thing that there is more and more of, and what is compared."""

    name: str
    unit: str
    sizes: Sequence[Size]
    amount: Callable[[Size], int]
    asking: Sequence[str]
    """The collectors that look at it; a scrape without them should not feel it."""
    peer: str
    beside: Callable[[FullNode, Size], float] | None = None
    """Times what prints the same; None for a peer that is scraped."""


@dataclass(slots=True)
class Line:
    """Milliseconds of CPU, or MiB, at each size."""

    name: str
    values: list[float] = field(default_factory=list)


def _printed(node: FullNode, size: Size, *command: str) -> float:
    """Return the seconds of CPU that a program takes on the node, and in the pods that have sockets."""
    pods = [["nsenter", f"--target={pid}", "--net", *command] for pid in node.sandboxes[: max(size.crowds - 1, 0)]]
    return statistics.median(clocked(node.command(*command), *pods)[1] for _ in range(_TIMES))


def _ss(node: FullNode, size: Size) -> float:
    return _printed(node, size, "ss", "-tan")


def _conntrack(node: FullNode, size: Size) -> float:
    return _printed(node, Size(size.pods, size.containers), "conntrack", "-L")


def _everything_but(*names: str) -> str:
    return "?" + "&".join(f"exclude[]={name}" for name in names)


AXES: Final = (
    Axis(
        "pods",
        "pods, with two containers each",
        [Size(pods, 2 * pods) for pods in (25, 50, 100, 200)],
        lambda size: size.pods,
        # What is left has nothing to do with workloads.
        [name for name in available_names() if name != "redis_aof"],
        "node_exporter",
    ),
    Axis(
        "sockets",
        "TCP sockets, half of the first 20,000 in TIME_WAIT, the others in pods",
        [Size(*_FEW, crowds=crowds) for crowds in (0, 1, 4, 9)],
        lambda size: size.sockets,
        ("ephemeral_ports", "listen_queue"),
        "ss -tan",
        _ss,
    ),
    Axis(
        "entries",
        "tracked connections",
        [Size(*_FEW, entries=entries) for entries in (10_000, 50_000, 100_000, 200_000)],
        lambda size: size.entries,
        ("conntrack",),
        "conntrack -L",
        _conntrack,
    ),
)


def cost(target: Target, query: str = "") -> float:
    """Scrape once and return the seconds of CPU that it took."""
    before = target.cpu()
    target.scrape(query)
    # A program of Go's collects its garbage after the answer.
    time.sleep(_PAUSE)
    return target.cpu() - before


def measure(node: FullNode, axis: Axis, size: Size, scrapes: int) -> dict[str, float]:
    """Measure one node: milliseconds of CPU, and MiB."""
    # The dump of the connection table is measured by itself.
    ours_alone = [replace(way, options=(*way.options, "--conntrack.dump-interval=3600")) for way in SHOAL]
    ways = (*ours_alone, *(() if axis.beside else PEERS[:1]))
    without = _everything_but(*axis.asking)
    with ExitStack() as stack:
        targets = [stack.enter_context(way.run(node)) for way in ways]
        ours = targets[: len(SHOAL)]
        for _ in range(_WARM_UP):
            for target in targets:
                target.scrape()
        # The first one is over.
        for target in ours:
            _until_idle(target)
        asked = [(target, f"{target.name}, CPU (ms)", "") for target in targets]
        asked += [(target, f"{target.name} without, CPU (ms)", without) for target in ours]
        taken: dict[str, list[float]] = {name: [] for _, name, _ in asked}
        renewed = -math.inf
        for _ in range(scrapes):
            if time.monotonic() - renewed > _RENEW:
                node.renew_time_wait()
                renewed = time.monotonic()
                for target in targets:
                    # That may take longer than an exporter keeps a connection on which nobody asks.
                    target.connection.close()
            for target, name, query in asked:
                taken[name].append(cost(target, query) * 1000)
        found = {name: statistics.median(values) for name, values in taken.items()}
        found |= {f"{target.name}, memory (MiB)": target.memory("VmHWM") for target in ours}
    if "conntrack" in axis.asking and size.entries:
        found["a dump, CPU (ms)"] = dump(node) * 1000
    if axis.beside:
        found[f"{axis.peer}, CPU (ms)"] = axis.beside(node, size) * 1000
    return found


def dump(node: FullNode) -> float:
    """Return the seconds of CPU that one dump of the connection table takes, over what a scrape takes without."""
    others = [f"--no-collector.{name}" for name in available_names() if name != "conntrack"]
    way = Way("conntrack alone", TIER_2, (*others, f"--conntrack.dump-interval={_DUMP_INTERVAL}"))
    took = []
    with way.run(node) as target:
        target.scrape()
        for _ in range(_TIMES):
            time.sleep(_DUMP_INTERVAL)
            with_dump = _until_idle(target)
            took.append(with_dump - _until_idle(target))
    return statistics.median(took)


def _until_idle(target: Target) -> float:
    """Scrape, and return the CPU that is used until nothing goes on any more."""
    began = before = target.cpu()
    target.scrape()
    while (now := target.cpu()) != before:
        before = now
        time.sleep(_IDLE)
    return now - began


def slope(amounts: Sequence[int], values: Sequence[float]) -> float:
    """Return by how much the value rises with each one, by least squares."""
    return statistics.linear_regression(amounts, values).slope


def report(axis: Axis, lines: dict[str, Line]) -> str:
    """Return the table, with what a thousand more of it cost in its last column."""
    amounts = [axis.amount(size) for size in axis.sizes]
    per = 1 if axis.name == "pods" else 1000
    rows = [(axis.name, *(f"{amount:,}" for amount in amounts), "for each more" if per == 1 else f"for {per:,} more")]
    for line in lines.values():
        rise = slope(amounts, line.values) * per
        rows.append((line.name, *(f"{value:.1f}" for value in line.values), f"{rise:.3f}"))
    return table(rows)


def bent(axis: Axis, lines: dict[str, Line]) -> list[str]:
    """Say which line is none, and what rises though it was not asked for."""
    amounts = [axis.amount(size) for size in axis.sizes]
    found = []
    for name, line in lines.items():
        if not name.startswith(("tier", "a dump")) or "memory" in name:
            continue
        first, *_, last = line.values
        if "without" in name:
            middle = statistics.median(line.values)
            if last > middle * MOST_RISE + SLACK:
                found.append(f"{axis.name}: {name} rises to {last:.1f} from {middle:.1f}")
            continue
        step = amounts[-1] - amounts[-2]
        expected = line.values[-2] + MOST_BEND * max(0.0, last - first) / (amounts[-1] - amounts[0]) * step
        if last > expected + SLACK:
            found.append(f"{axis.name}: {name} is {last:.1f}, and as a line would be at most {expected:.1f}")
    return found


def draw(found: dict[str, tuple[Axis, dict[str, Line]]]) -> None:
    """Draw a panel for each axis into docs/growth.svg."""
    # Only here: it takes a second and 40 MiB.
    import matplotlib as mpl  # noqa: PLC0415  (only for who wants the picture)

    mpl.use("svg")
    from matplotlib import pyplot as plt  # noqa: PLC0415  (see above)
    from matplotlib.ticker import MaxNLocator  # noqa: PLC0415  (see above)

    # Text as text, and the same ids each time, keep the file small and its changes readable.
    plt.rcParams.update({"svg.fonttype": "none", "svg.hashsalt": "growth", "font.size": 9})
    figure, panels = plt.subplots(1, len(found), figsize=(4 * len(found), 3.4), squeeze=False)
    for panel, (axis, lines) in zip(panels[0], found.values(), strict=True):
        amounts = [axis.amount(size) for size in axis.sizes]
        for name, line in lines.items():
            if "CPU" not in name:
                continue
            style = ":" if "without" in name else "--" if name.startswith(axis.peer) else "-"
            panel.plot(amounts, line.values, style, marker="o", markersize=3, label=name.removesuffix(", CPU (ms)"))
        panel.set_xlabel(axis.unit if len(axis.unit) < 40 else axis.unit.partition(",")[0])
        panel.set_ylabel("CPU (ms)")
        panel.set_xlim(left=0)
        panel.set_ylim(bottom=0)
        panel.ticklabel_format(style="plain")
        panel.xaxis.set_major_formatter(lambda value, _: f"{value:,.0f}")
        panel.xaxis.set_major_locator(MaxNLocator(4))
        panel.grid(visible=True, linewidth=0.3)
        panel.legend(fontsize=7)
    figure.tight_layout()
    figure.savefig(PICTURE, metadata={"Date": None})


def main() -> int:
    """Measure, report and draw."""
    names = [axis.name for axis in AXES]
    parser = argparse.ArgumentParser(description="How the cost of a scrape grows.")
    parser.add_argument(
        "axes", nargs="*", default=names, help=f"of {', '.join(names)}; all, and the picture, by default"
    )
    parser.add_argument("--scrapes", type=int, default=20, help="how many of each count (20)")
    arguments = parser.parse_args()
    if wrong := set(arguments.axes) - set(names):
        parser.error(f"nothing grows that is called {', '.join(wrong)}; there are {', '.join(names)}")
    if os.geteuid():
        parser.error("only root can build a node")
    _say(machine(), f"The median of {arguments.scrapes} scrapes each, in turn.")
    found: dict[str, tuple[Axis, dict[str, Line]]] = {}
    wrong_lines = []
    for axis in AXES:
        if axis.name not in arguments.axes:
            continue
        lines: dict[str, Line] = {}
        for size in axis.sizes:
            with full_node(size.pods, size.containers) as node:
                node.fill(size)
                for name, value in measure(node, axis, size, arguments.scrapes).items():
                    lines.setdefault(name, Line(name)).values.append(value)
        found[axis.name] = (axis, lines)
        without = ", ".join(axis.asking) if len(axis.asking) < len(available_names()) - 1 else "all but redis_aof"
        _say(f"## {axis.unit}", f"'without' leaves out {without}.", report(axis, lines))
        wrong_lines += bent(axis, lines)
    if len(found) == len(AXES):
        draw(found)
    _say("Every line is one." if not wrong_lines else "Not kept: " + "; ".join(wrong_lines))
    return 1 if wrong_lines else 0


def _say(*paragraphs: str) -> None:
    sys.stdout.write("".join(f"{paragraph}\n\n" for paragraph in paragraphs))
    sys.stdout.flush()


if __name__ == "__main__":
    raise SystemExit(main())
