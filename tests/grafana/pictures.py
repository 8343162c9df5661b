"""Draws the README's pictures of the dashboards, of what the fault lab recorded: `make pictures`."""

from __future__ import annotations

import sys
import tempfile
from pathlib import Path
from typing import Final

from grafana.build import HERE
from grafana.draw import draw
from grafana.reader import Dashboard
from tests.grafana.recorded import STORIES, serve_recordings

PICTURES: Final = HERE.parent / "docs" / "pictures"
_SECONDS: Final = 6 * 60
"""About a run of the lab."""


def main() -> None:
    """Draw them."""
    listener, api = STORIES[2], STORIES[6]
    with (
        tempfile.TemporaryDirectory(prefix="shoal-pictures-") as directory,
        serve_recordings(Path(directory)) as server,
    ):
        PICTURES.mkdir(exist_ok=True)
        for name, at, chosen, rows in (
            ("fleet", listener.moment, {}, {"Where it burns"}),
            (
                "node",
                listener.moment,
                {"cluster": "east", "node": listener.node},
                {
                    "What fires here, and what cannot be seen",
                    "Listen queues overflow (failure 2)",
                    "Connections go to a backend that is gone (failure 12)",
                    "The ports towards one destination are used up (failure 13)",
                },
            ),
            (
                "workload",
                api.moment,
                {"cluster": "east", "node": api.node, **api.culprit},
                {"Why it is slow", "CPU", "Memory"},
            ),
        ):
            board = Dashboard.load(HERE / f"shoal-{name}.json", **chosen)
            draw(board, server, at, PICTURES / f"{name}.png", rows=rows, seconds=_SECONDS)
            sys.stdout.write(f"{PICTURES / name}.png\n")


if __name__ == "__main__":
    main()
