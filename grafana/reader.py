"""Reads a dashboard the way Grafana does, as far as these three need it: variables, queries, transformations.

The tests ask a real Prometheus with it, and the pictures are drawn from it. It is no Grafana.
"""

from __future__ import annotations

import json
import re
import urllib.error
import urllib.parse
import urllib.request
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final, NamedTuple

__all__ = ["ALL", "Answer", "Dashboard", "Prometheus", "Series", "Table", "interpolate", "legend"]

ALL: Final = "$__all"
_REFERENCE: Final = re.compile(r"\$(?:\{(?P<braced>\w+)(?::\w+)?\}|(?P<bare>[A-Za-z_]\w*))")
_FIELD: Final = re.compile(r"\{\{\s*(\w+)\s*\}\}")
_SPECIAL: Final = re.compile(r"[\\^$*+?.()|\[\]{}]")


class Series(NamedTuple):
    """One line of a chart: its labels and its points (seconds since 1970, value)."""

    labels: dict[str, str]
    points: list[tuple[float, float]]


@dataclass(frozen=True, slots=True)
class Table:
    """What a table shows: its columns in order, and rows by column."""

    columns: list[str]
    rows: list[dict[str, Any]]


@dataclass(frozen=True, slots=True)
class Answer:
    """What the query of one target returned."""

    target: dict[str, Any]
    series: list[Series]


@dataclass(slots=True)
class Prometheus:
    """A server's query API. `Prometheus.query` and `range` raise `ValueError` with what it says of a wrong query."""

    url: str

    def query(self, expr: str, time: float) -> list[Series]:
        """Ask for the values at one moment."""
        result = self._ask("query", query=expr, time=str(time))
        if result["resultType"] != "vector":
            raise ValueError(f"{expr} is a {result['resultType']} and no vector")
        return [Series(one["metric"], [(float(one["value"][0]), float(one["value"][1]))]) for one in result["result"]]

    def range(self, expr: str, start: float, end: float, step: float) -> list[Series]:
        """Ask for the values over time."""
        result = self._ask("query_range", query=expr, start=str(start), end=str(end), step=str(step))
        return [
            Series(one["metric"], [(float(at), float(value)) for at, value in one["values"]])
            for one in result["result"]
        ]

    def label_values(self, label: str, selector: str, start: float, end: float) -> list[str]:
        """Ask for the values that a label has, as `label_values()` of a variable does."""
        query = urllib.parse.urlencode({"match[]": selector, "start": str(start), "end": str(end)})
        found: list[str] = self._get(f"label/{label}/values?{query}")
        return found

    def _ask(self, path: str, **parameters: str) -> dict[str, Any]:
        found: dict[str, Any] = self._get(path, urllib.parse.urlencode(parameters).encode())
        return found

    def _get(self, path: str, body: bytes | None = None) -> Any:  # noqa: ANN401  (JSON)
        request = urllib.request.Request(f"{self.url}/api/v1/{path}", body)  # noqa: S310  (the caller's own server)
        try:
            with urllib.request.urlopen(request, timeout=60) as answer:  # noqa: S310
                return json.load(answer)["data"]
        except urllib.error.HTTPError as error:
            with error:
                raise ValueError(json.load(error).get("error", str(error))) from None


def interpolate(text: str, values: dict[str, str], seconds: int) -> str:
    """Put the variables' values in, and for `$__range` and the like those of so many seconds."""
    known = {**values, "__range": f"{seconds}s", "__rate_interval": "240s", "__interval": "60s"}
    return _REFERENCE.sub(lambda match: known[match["braced"] or match["bare"]], text)


def _escape(match: re.Match[str]) -> str:
    """Escape a character for a regular expression inside a quoted string."""
    return r"\\\\" if match[0] == "\\" else rf"\\{match[0]}"


def legend(pattern: str, labels: dict[str, str]) -> str:
    """Name a series by its labels, as a target's legend says."""
    return " ".join(_FIELD.sub(lambda match: labels.get(match[1], ""), pattern).split())


@dataclass(slots=True)
class Dashboard:
    """A dashboard of the JSON, with values chosen for its variables. The others are All, or their first choice."""

    content: dict[str, Any]
    chosen: dict[str, str] = field(default_factory=dict)

    @classmethod
    def load(cls, file: Path, **chosen: str) -> Dashboard:
        """Read one from its file."""
        return cls(json.loads(Path(file).read_text(encoding="utf-8")), chosen)

    def panels(self) -> list[dict[str, Any]]:
        """Return the panels that have queries."""
        return [panel for panel in self.content["panels"] if panel["type"] != "row"]

    def variables(self) -> dict[str, dict[str, Any]]:
        """Return the variables by name."""
        return {variable["name"]: variable for variable in self.content["templating"]["list"]}

    def values(self) -> dict[str, str]:
        """Return what stands for each variable in a query."""
        found = {}
        for name, variable in self.variables().items():
            default = variable.get("current", {}).get("value", "")
            value = self.chosen.get(name, default)
            if variable.get("includeAll"):
                # Grafana escapes what goes into a regular expression only where there may be more than one value.
                value = variable["allValue"] if value == ALL else _SPECIAL.sub(_escape, value)
            found[name] = value
        return found

    def ask(self, panel: dict[str, Any], server: Prometheus, end: float, seconds: int = 3600) -> list[Answer]:
        """Run the queries of a panel."""
        answers = []
        for target in panel["targets"]:
            expr = interpolate(target["expr"], self.values(), seconds)
            found = (
                server.query(expr, end)
                if target.get("instant")
                else server.range(expr, end - seconds, end, seconds / 120)
            )
            answers.append(Answer(target, found))
        return answers

    @staticmethod
    def table(panel: dict[str, Any], answers: list[Answer]) -> Table:
        """Make the rows of a table panel: merge, organize and sortBy."""
        several = sum(bool(answer.series) for answer in answers) > 1
        merged: dict[frozenset[tuple[str, str]], dict[str, Any]] = {}
        columns: list[str] = []
        for answer in answers:
            value = f"Value #{answer.target['refId']}" if several else "Value"
            for series in answer.series:
                row = merged.setdefault(frozenset(series.labels.items()), dict(series.labels))
                row[value] = series.points[-1][1]
                columns += [label for label in series.labels if label not in columns]
        columns += [f"Value #{answer.target['refId']}" if several else "Value" for answer in answers if answer.series]
        rows = list(merged.values())
        for transformation in panel["transformations"]:
            options = transformation["options"]
            if transformation["id"] == "organize":
                names, hidden = options["renameByName"], options["excludeByName"]
                order = options["indexByName"]
                columns.sort(key=lambda name: order.get(name, len(order)))
                columns = [names.get(name, name) for name in columns if not hidden.get(name)]
                rows = [{names.get(key, key): value for key, value in row.items()} for row in rows]
            elif transformation["id"] == "sortBy":
                by = options["sort"][0]
                rows.sort(key=lambda row: row.get(by["field"], float("-inf")), reverse=by.get("desc", False))
        return Table(columns, rows)
