"""The runbooks that are packed with the program: whole for `explain`, the first commands and step for `check`."""

from __future__ import annotations

import re
from pathlib import Path

__all__ = ["confirm", "first_step", "names", "page", "url"]

_DIRECTORY = Path(__file__).parents[1] / "runbooks"
_URL = "https://github.com/shoal-exporter/shoal/blob/main/rules/runbooks/{}.md"


def names() -> list[str]:
    """Return the names of the alerts that have a page, sorted."""
    return sorted(path.stem for path in _DIRECTORY.glob("*.md"))


def page(alert: str) -> str:
    """Return an alert's page. Raises `FileNotFoundError` if it has none."""
    return (_DIRECTORY / f"{alert}.md").read_text(encoding="utf-8")


def url(alert: str) -> str:
    """Return where the page is on the web."""
    return _URL.format(alert)


def confirm(alert: str) -> list[str]:
    """Return the commands of the page's first block under Confirm."""
    block = re.search(r"^    \S.*(?:\n(?:    .*)?)*", _section(alert, "Confirm"), re.MULTILINE)
    return [line[4:] for line in block[0].rstrip().splitlines()] if block else []


def first_step(alert: str) -> str:
    """Return the first, which is the safest, step of the page's Mitigate, as one line."""
    step = re.search(r"^1\. (.*(?:\n   .*)*)", _section(alert, "Mitigate"), re.MULTILINE)
    return " ".join(step[1].split()) if step else ""


def _section(alert: str, heading: str) -> str:
    return page(alert).partition(f"\n## {heading}\n")[2].partition("\n## ")[0]
