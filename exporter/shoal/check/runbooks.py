"""The runbooks that are packed with the program: whole for `explain`, the first commands and step for `check`."""

from __future__ import annotations

import re
import shlex
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from shoal.check.snapshot import Labels

__all__ = ["confirm", "first_commands", "first_step", "names", "page", "url"]

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


def confirm(alert: str, culprit: Labels) -> list[str]:
    """Return the commands that begin the page's Confirm, with the culprit where the page has an example."""
    # What they print stands after a blank line.
    block = re.search(r"^    \S.*(?:\n    \S.*)*", _section(alert, "Confirm"), re.MULTILINE)
    return [_about(line[4:], culprit) for line in block[0].splitlines()] if block else []


def first_step(alert: str) -> str:
    """Return the first, which is the safest, step of the page's Mitigate, as one line."""
    step = _first(alert)
    return " ".join(step[1].split()) if step else ""


def first_commands(alert: str, culprit: Labels) -> list[str]:
    """Return the commands that the page gives for that step, with the culprit where the page has an example."""
    step = _first(alert)
    return [_about(line.strip(), culprit) for line in (step[2] or "").splitlines() if line] if step else []


def _first(alert: str) -> re.Match[str] | None:
    step = r"^1\. (.*(?:\n   \S.*)*)(?:\n\n((?:       \S.*\n)+))?"
    return re.search(step, _section(alert, "Mitigate"), re.MULTILINE)


# The examples that the pages use, and the label that has what is meant.
_EXAMPLES = (
    ("<address>", "address"),
    ("<device>", "device"),
    ("/var/lib", "mountpoint"),
    ("/mnt/share", "mountpoint"),
    ("10.99.0.10", "destination"),
    ("10.62.0.2", "destination"),
    ("10.62.0.1", "source"),
    ("-p udp", "protocol"),
    (":8080", "port"),
    ("-p 6379", "server"),
)


def _about(command: str, culprit: Labels) -> str:
    for example, label in _EXAMPLES:
        value = culprit[label]
        if not value or not value.isprintable():
            continue
        # The commands are to be pasted by root, and a mount point is called what whoever mounted it likes.
        new = shlex.quote(value)
        if label == "protocol":
            new = f"-p {new}"
        elif label == "port":
            new = f":{new}"
        elif label == "server":
            host, _, port = value.rpartition(":")
            if not port.isdigit():
                continue
            new = f"-h {shlex.quote(host.strip('[]'))} -p {port}"
        command = command.replace(example, new)
    return command


def _section(alert: str, heading: str) -> str:
    try:
        text = page(alert)
    except OSError:
        # A package that was built without them can still say what is wrong.
        return ""
    return text.partition(f"\n## {heading}\n")[2].partition("\n## ")[0]
