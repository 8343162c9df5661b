"""Draws the README's pictures of the dashboards, of the fleet that the tests are about: `make pictures`."""

from __future__ import annotations

import sys
import tempfile
from pathlib import Path
from typing import Final

from grafana.build import HERE
from grafana.draw import draw
from grafana.reader import Dashboard
from tests.grafana.sick import CHECKOUT, MINUTES, fleet, node_of
from tests.grafana.stored import END, serve

PICTURES: Final = HERE.parent / "docs" / "pictures"


def main() -> None:
    """Draw them."""
    with (
        tempfile.TemporaryDirectory(prefix="shoal-pictures-") as directory,
        serve(Path(directory), fleet(), MINUTES * 60) as server,
    ):
        PICTURES.mkdir(exist_ok=True)
        for name, chosen, rows in (
            ("fleet", {}, {"Where it burns"}),
            (
                "node",
                {"cluster": "east", "node": node_of(2)},
                {
                    "What fires here, and what cannot be seen",
                    "Waiting for a CPU (failure 10)",
                    "Killed below the limit (failure 5)",
                    "Listen queues overflow (failure 2)",
                },
            ),
            (
                "workload",
                {"cluster": "east", "node": node_of(2), **CHECKOUT},
                {"Why it is slow", "CPU", "Memory", "Connections"},
            ),
        ):
            board = Dashboard.load(HERE / f"shoal-{name}.json", **chosen)
            draw(board, server, END, PICTURES / f"{name}.png", rows=rows, seconds=75 * 60)
            sys.stdout.write(f"{PICTURES / name}.png\n")


if __name__ == "__main__":
    main()
