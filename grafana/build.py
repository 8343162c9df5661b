"""Writes the dashboards beside itself: `make dashboards`. The JSON is committed, and a test rebuilds it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, Final

from grafana_foundation_sdk.cog.encoder import JSONEncoder

from grafana.fleet import fleet
from grafana.node import node
from grafana.workload import workload

__all__ = ["HERE", "built", "text"]

HERE: Final = Path(__file__).parent


def built() -> dict[str, dict[str, Any]]:
    """Return every dashboard as Grafana's JSON, by file name."""
    boards = [board().build() for board in (fleet, node, workload)]
    contents = {f"{board.uid}.json": json.loads(json.dumps(board, cls=JSONEncoder)) for board in boards}
    for content in contents.values():
        del content["style"]  # the reader's own choice
        for variable in content["templating"]["list"]:
            # Of intervals, which none is; and an id that is the same for all.
            for key in ("id", "auto", "auto_min", "auto_count"):
                variable.pop(key, None)
        for annotation in content["annotations"]["list"]:
            # What an annotation says of an alert has no place in the kit's types.
            annotation |= {
                "titleFormat": "{{alertname}}",
                "textFormat": "{{severity}} {{node}} {{pod}}{{unit}}",
                "step": "60s",
            }
    return contents


def text(content: dict[str, Any]) -> str:
    """Write a dashboard the way it is committed: by lines, for a diff, and not indented, as a ConfigMap has no room."""
    return json.dumps(content, indent=0, ensure_ascii=False) + "\n"


if __name__ == "__main__":
    for name, content in built().items():
        (HERE / name).write_text(text(content), encoding="utf-8")
