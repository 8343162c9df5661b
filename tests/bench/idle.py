"""What the exporter costs on this machine beside prometheus-node-exporter: `python -m tests.bench.idle`.

Both run with their default collectors on loopback and are scraped in turn, as Prometheus does it: over a connection
that stays open, asking for gzip. Prints a table, and ends with 1 if the exporter costs more than it may. Run it on an
idle machine; options after `--` go to the exporter.
"""

from __future__ import annotations

import argparse
import sys
import time
from contextlib import ExitStack
from typing import TYPE_CHECKING, Final

from tests.bench.target import EXPORTER, machine, running

if TYPE_CHECKING:
    from collections.abc import Sequence

    from tests.bench.target import Target

MOST_RESIDENT: Final = 60.0
"""MiB that the idle exporter may hold."""
MOST_RATIO: Final = 1.5
"""CPU per scrape, as a multiple of node_exporter's."""

_WARM_UP: Final = 10
_PAUSE: Final = 0.02


def measure(targets: Sequence[Target], scrapes: int) -> None:
    """Scrape the targets in turn, some times to warm up and `scrapes` times that count."""
    for number in range(_WARM_UP + scrapes):
        if number == _WARM_UP:
            for target in targets:
                target.cpu_seconds = -target.cpu()
        for target in targets:
            target.scrape()
            # Go collects its garbage after the answer; it should not have to do it during the other's.
            time.sleep(_PAUSE)
    for target in targets:
        target.cpu_seconds += target.cpu()


def report(shoal: Target, node: Target, scrapes: int) -> bool:
    """Print the table and return whether the exporter keeps within its bounds."""
    rows = (
        ("CPU per scrape (ms)", *(f"{one.cpu_seconds / scrapes * 1000:.2f}" for one in (shoal, node))),
        ("resident (MiB)", *(f"{one.memory():.1f}" for one in (shoal, node))),
        ("answer, gzip (bytes)", *(f"{one.wire_bytes:,}" for one in (shoal, node))),
        ("answer, text (bytes)", *(f"{len(one.text):,}" for one in (shoal, node))),
        ("series", *(f"{one.series:,}" for one in (shoal, node))),
    )
    ratio = shoal.cpu_seconds / node.cpu_seconds
    resident = shoal.memory()
    lines = [machine(), f"{scrapes} scrapes of each, in turn", "", f"{'':22}{shoal.name:>15}{node.name:>15}"]
    lines += [f"{title:22}{mine:>15}{theirs:>15}" for title, mine, theirs in rows]
    lines += [
        "",
        f"CPU ratio {ratio:.2f} (at most {MOST_RATIO}), resident {resident:.1f} MiB (at most {MOST_RESIDENT:.0f})",
    ]
    sys.stdout.write("\n".join(lines) + "\n")
    return ratio <= MOST_RATIO and resident <= MOST_RESIDENT


def main() -> int:
    """Measure and report."""
    parser = argparse.ArgumentParser(description="CPU per scrape and memory beside prometheus-node-exporter.")
    parser.add_argument("--scrapes", type=int, default=200, help="how many of each count (default: 200)")
    parser.add_argument("options", nargs="*", help="options of the exporter, after --")
    arguments = parser.parse_args()
    with ExitStack() as stack:
        command = [sys.executable, "-m", "shoal", *arguments.options]
        shoal = stack.enter_context(running("shoal", command, cwd=EXPORTER))
        node = stack.enter_context(running("node_exporter", ["prometheus-node-exporter"]))
        measure((shoal, node), arguments.scrapes)
        kept = report(shoal, node, arguments.scrapes)
    return 0 if kept else 1


if __name__ == "__main__":
    raise SystemExit(main())
