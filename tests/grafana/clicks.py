"""What a person does with the dashboards: opens one, reads a panel, clicks on a link."""

from __future__ import annotations

import re
from typing import TYPE_CHECKING, Any, Final
from urllib.parse import parse_qs, quote, unquote, urlsplit

from grafana.reader import ALL, Answer, Dashboard
from tests.grafana.sick import MINUTES
from tests.grafana.stored import END
from tests.grafana.test_dashboards import BOARDS

if TYPE_CHECKING:
    from grafana.reader import Prometheus, Table

__all__ = ["follow", "links_of", "opened", "panel", "shown", "tells", "titled", "visit"]

_DATA: Final = re.compile(r"\$\{__data\.fields\.(\w+)(?::percentencode)?\}")
_VARIABLE: Final = re.compile(r"\$\{(\w+):(percentencode|queryparam)\}")


def opened(name: str, **chosen: str) -> Dashboard:
    """Open a dashboard with these choices."""
    return Dashboard(BOARDS[name].content, chosen)


def panel(board: Dashboard, number: int) -> dict[str, Any]:
    """Return a panel by its id."""
    return next(one for one in board.panels() if one["id"] == number)


def titled(board: Dashboard, title: str) -> dict[str, Any]:
    """Return a panel by its title."""
    return next(one for one in board.panels() if one["title"] == title)


def shown(
    board: Dashboard, which: dict[str, Any], server: Prometheus, at: float = END, seconds: int = MINUTES * 60
) -> Table:
    """Return what a table shows at a moment."""
    return board.table(which, board.ask(which, server, at, seconds))


def tells(answer: Answer) -> bool:
    """Tell whether a query has something to show, and not only -1 for the rows that others have."""
    return any(value != -1 for series in answer.series for _, value in series.points)


def links_of(which: dict[str, Any], column: str) -> list[str]:
    """Return the addresses to which a column of a table leads."""
    return [
        link["url"]
        for override in which["fieldConfig"]["overrides"]
        if override["matcher"] == {"id": "byName", "options": column}
        for one in override["properties"]
        if one["id"] == "links"
        for link in one["value"]
    ]


def follow(board: Dashboard, address: str, row: dict[str, str]) -> tuple[Dashboard, int]:
    """Click on a link in a row: return the dashboard as it opens, and the panel that it shows alone (0: all)."""
    values = board.chosen
    address = _DATA.sub(lambda match: quote(str(row.get(match[1], "")), safe=""), address)
    address = _VARIABLE.sub(
        lambda match: (
            quote(values.get(match[1], ALL), safe="")
            if match[2] == "percentencode"
            else f"var-{match[1]}={quote(values.get(match[1], ''), safe='')}"
        ),
        address,
    ).replace("${__url_time_range}", "from=now-1h&to=now")
    assert "$" not in unquote(address).replace(ALL, "")
    return visit(address)


def visit(address: str) -> tuple[Dashboard, int]:
    """Open an address: return the dashboard, and the panel that it shows alone (0: all)."""
    parts = urlsplit(address)
    # What a row does not have is empty in the address, and Grafana (11 and newer) keeps it so until a person chooses.
    query = {key: value[0] for key, value in parse_qs(parts.query, keep_blank_values=True).items()}
    chosen = {key.removeprefix("var-"): value for key, value in query.items() if key.startswith("var-")}
    return opened(parts.path.split("/")[2], **chosen), int(query.get("viewPanel", 0))
