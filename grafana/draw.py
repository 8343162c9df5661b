"""Draws a dashboard's JSON as a picture, for where no Grafana can be run. It is no Grafana and says so in the picture.

Where things are, what they are called, which numbers they show and in which colour is the
JSON's; how that is drawn is not.
"""

from __future__ import annotations

import datetime as dt
import math
import textwrap
from typing import TYPE_CHECKING, Any, Final, NamedTuple

from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.colors import to_rgb
from matplotlib.figure import Figure
from matplotlib.patches import FancyBboxPatch, Rectangle
from matplotlib.ticker import MultipleLocator

from grafana.reader import ALL, Answer, Dashboard, Prometheus, interpolate, legend

if TYPE_CHECKING:
    from collections.abc import Collection
    from pathlib import Path

    from matplotlib.axes import Axes

__all__ = ["draw", "written"]

_COLUMN: Final = 60
"""Pixels of one of the page's 24 columns."""
_ROW: Final = 32
"""Pixels of one of its rows, of which a panel has about seven."""
_TOP: Final = 64
_FOOT: Final = 34
_DPI: Final = 100
_INK, _FAINT, _EDGE, _PAGE = "#24292e", "#6e7781", "#d0d7de", "#f4f5f5"
_CAPTION: Final = (
    "Drawn by grafana/draw.py from the dashboard's JSON and a Prometheus that holds what the fault lab recorded. "
    "This is no Grafana: there the same panels look a little different."
)
_DARK: Final = 0.55
"""A background of less luminance than this takes white letters."""


def written(value: float, unit: str, decimals: int | None = None) -> str:
    """Write a value in Grafana's unit."""
    match unit:
        case "percentunit":
            return f"{value * 100:.{1 if 0 < abs(value) < 0.1 else 0}f}%"  # noqa: PLR2004
        case "s":
            steps: list[tuple[float, str]] = [(1, "s"), (1e-3, "ms"), (1e-6, "µs")]
            factor, name = next((step for step in steps if abs(value) >= step[0]), (1, "s"))
            return f"{value / factor:.3g} {name}"
        case "bytes":
            names = ["B", "KiB", "MiB", "GiB", "TiB"]
            place = 0
            while abs(value) >= 1024 and place < len(names) - 1:  # noqa: PLR2004
                value, place = value / 1024, place + 1
            return f"{value:.3g} {names[place]}"
    text = f"{value:.{decimals}f}" if decimals is not None else f"{value:.3g}"
    if abs(value) >= 1000 and decimals is None:  # noqa: PLR2004
        text = f"{value / 1000:.3g} K"
    return f"{text} ops/s" if unit == "ops" else text


def draw(  # noqa: PLR0913  (what a picture is of)
    board: Dashboard,
    server: Prometheus,
    end: float,
    file: Path,
    *,
    rows: Collection[str] | None = None,
    seconds: int = 3600,
) -> None:
    """Draw a dashboard, or the named rows of it, as it is at a moment with the choices made."""
    kept = _kept(board.content["panels"], rows)
    height = max(panel["gridPos"]["y"] + panel["gridPos"]["h"] for panel in kept) * _ROW + _TOP + _FOOT
    width = 24 * _COLUMN
    figure = Figure((width / _DPI, height / _DPI), dpi=_DPI, facecolor=_PAGE)
    FigureCanvasAgg(figure)
    page = figure.add_axes((0, 0, 1, 1))
    page.set_axis_off()
    page.set_xlim(0, width)
    page.set_ylim(height, 0)
    _head(page, board, end, seconds)
    page.text(12, height - 13, _CAPTION, fontsize=8, color=_FAINT, style="italic")
    began = _began(board, server, end, seconds)
    for panel in kept:
        where = panel["gridPos"]
        left, top = where["x"] * _COLUMN + 4, where["y"] * _ROW + _TOP + 2
        wide, high = where["w"] * _COLUMN - 8, where["h"] * _ROW - 6
        if panel["type"] == "row":
            page.text(left + 4, top + 20, panel["title"], fontsize=12, color=_INK, weight="bold")
            continue
        page.add_patch(
            FancyBboxPatch(
                (left, top), wide, high, boxstyle="round,pad=0,rounding_size=4", fc="white", ec=_EDGE, lw=0.8
            )
        )
        page.text(left + 10, top + 18, panel["title"], fontsize=9, color=_INK, weight="bold", clip_on=True)
        answers = board.ask(panel, server, end, seconds)
        box = (left + 10, top + 28, wide - 20, high - 34)
        if not any(answer.series for answer in answers):
            text = "\n".join(textwrap.wrap(panel["fieldConfig"]["defaults"]["noValue"], int(box[2] / 7)))
            page.text(left + wide / 2, top + high / 2, text, ha="center", va="center", fontsize=9, color=_FAINT)
        elif panel["type"] == "stat":
            _number(page, panel, answers, (left, top, wide, high))
        elif panel["type"] == "table":
            _cells(page, board, panel, answers, box)
        else:
            _chart(_Place(figure, page, box, (end - seconds, end), began), panel, answers)
    figure.savefig(file, dpi=_DPI, pil_kwargs={"optimize": True})


def _kept(panels: list[dict[str, Any]], rows: Collection[str] | None) -> list[dict[str, Any]]:
    """Return the panels of the named rows, moved up to where the ones before them are left out."""
    kept: list[dict[str, Any]] = []
    keep, start, shift = True, 0, 0
    for panel in panels:
        where = panel["gridPos"]
        if panel["type"] == "row":
            if not keep:
                shift += where["y"] - start
            keep, start = rows is None or panel["title"] in rows, where["y"]
        if keep:
            kept.append({**panel, "gridPos": {**where, "y": where["y"] - shift}})
    return kept


def _head(page: Axes, board: Dashboard, end: float, seconds: int) -> None:
    page.text(12, 24, board.content["title"], fontsize=14, color=_INK, weight="bold")
    until = dt.datetime.fromtimestamp(end, dt.UTC)
    since = until - dt.timedelta(seconds=seconds)
    page.text(
        24 * _COLUMN - 12,
        24,
        f"{since:%H:%M} to {until:%H:%M}",
        fontsize=10,
        color=_FAINT,
        ha="right",
        family="monospace",
    )
    place = 12.0
    for name, variable in board.variables().items():
        value = board.chosen.get(name, variable.get("current", {}).get("value", "Prometheus"))
        labels = {option["value"]: option["text"] for option in variable.get("options") or ()}
        text = f"{variable['label']}: {'All' if value == ALL else labels.get(value, value)}"
        page.text(place, 48, text, fontsize=9, color=_INK, bbox={"fc": "white", "ec": _EDGE, "pad": 3, "lw": 0.8})
        place += 7.4 * len(text) + 26


def _began(board: Dashboard, server: Prometheus, end: float, seconds: int) -> set[float]:
    """Return when the alerts began that the dashboard marks in its charts."""
    (annotation,) = board.content["annotations"]["list"]
    query = interpolate(annotation["expr"], board.values(), seconds)
    found = server.range(query, end - seconds, end, seconds / 120)
    return {series.points[0][0] for series in found if series.points[0][0] > end - seconds}


def _steps(settings: dict[str, Any] | None, value: float) -> str | None:
    """Return the colour that thresholds give a value; none where they are plain."""
    colour = None
    for step in (settings or {}).get("steps", ()):
        if step["value"] is None or value >= step["value"]:
            colour = step["color"]
    return None if colour == "transparent" else colour


def _number(page: Axes, panel: dict[str, Any], answers: list[Answer], box: tuple[float, float, float, float]) -> None:
    left, top, wide, high = box
    value = answers[0].series[0].points[-1][1]
    colour = _steps(panel["fieldConfig"]["defaults"]["thresholds"], value) or _INK
    ink = colour
    if panel["options"]["colorMode"] == "background_solid":
        page.add_patch(Rectangle((left + 1, top + 26), wide - 2, high - 27, fc=colour, ec="none"))
        ink = _ink(colour)
    page.text(
        left + wide / 2,
        top + high / 2 + 14,
        written(value, "short"),
        fontsize=26,
        color=ink,
        ha="center",
        va="center",
        weight="bold",
    )


def _properties(panel: dict[str, Any], column: str) -> dict[str, Any]:
    """Return what the overrides say of a column."""
    return {
        one["id"]: one["value"]
        for override in panel["fieldConfig"]["overrides"]
        if override["matcher"] == {"id": "byName", "options": column}
        for one in override["properties"]
    }


def _cells(
    page: Axes, board: Dashboard, panel: dict[str, Any], answers: list[Answer], box: tuple[float, float, float, float]
) -> None:
    left, top, wide, high = box
    table = board.table(panel, answers)
    settings = {column: _properties(panel, column) for column in table.columns}
    columns = [column for column in table.columns if not settings[column].get("custom.hidden")]
    fit = int((high - 22) // 20)
    if len(table.rows) > fit:  # the last line says how many more there are
        fit = int((high - 34) // 20)
    texts = [{column: _cell(row.get(column), settings[column]) for column in columns} for row in table.rows[:fit]]
    sizes = [max(len(column) * 1.3, *(_length(row[column]) for row in texts)) + 2 for column in columns]
    share = wide / sum(sizes)
    # A long name gives way to the other columns.
    sizes = [min(size, 30) if share < 5.6 else size for size in sizes]  # noqa: PLR2004
    share = wide / sum(sizes)
    at = left
    for column, size in zip(columns, sizes, strict=True):
        room = max(int(size * share / 6.5), 3)
        page.text(at + 4, top + 14, _cut(column, room), fontsize=8, color="#0550ae", weight="bold")
        for place, (row, shown) in enumerate(zip(table.rows, texts, strict=False)):
            y = top + 22 + 20 * place
            value, colour = row.get(column), None
            if isinstance(value, float):
                colour = _colour_of(value, settings[column])
            if colour:
                page.add_patch(Rectangle((at, y + 1), size * share - 2, 18, fc=colour, ec="none"))
            plain = _FAINT if _mapped(value, settings[column]) else _INK
            ink = (
                _ink(colour)
                if colour
                else "#0969da"
                if isinstance(value, str) and settings[column].get("links")
                else plain
            )
            page.text(at + 4, y + 14, _cut(shown[column], room), fontsize=8, color=ink)
        at += size * share
    if len(table.rows) > len(texts):
        page.text(
            left + wide, top + high, f"{len(table.rows) - len(texts)} more rows", fontsize=7, color=_FAINT, ha="right"
        )


def _mapped(value: Any, settings: dict[str, Any]) -> dict[str, str] | None:  # noqa: ANN401  (a label or a number)
    """Return the text and colour that stand for a value."""
    if not isinstance(value, float):
        return None
    mapped = (mapping["options"].get(f"{value:g}") for mapping in settings.get("mappings", ()))
    return next((one for one in mapped if one), None)


def _cell(value: Any, settings: dict[str, Any]) -> str:  # noqa: ANN401  (a label or a number)
    if value is None:
        return ""
    if isinstance(value, str):
        return " ".join(value.split())
    if found := _mapped(value, settings):
        return found["text"]
    return written(value, settings.get("unit", "short"), settings.get("decimals"))


def _colour_of(value: float, settings: dict[str, Any]) -> str | None:
    if found := _mapped(value, settings):
        return None if found["color"] == "transparent" else found["color"]
    return _steps(settings.get("thresholds"), value)


def _length(text: str) -> float:
    """Return how long a text is in letters of usual width."""
    return len(text) * (1.3 if text.isupper() else 1)


def _ink(colour: str) -> str:
    """Choose letters that can be read on a colour."""
    red, green, blue = to_rgb(colour)
    return "white" if 0.2126 * red + 0.7152 * green + 0.0722 * blue < _DARK else _INK


def _cut(text: str, room: int) -> str:
    return text if len(text) <= room else text[: max(room - 1, 1)] + "…"


def _shades(colour: str, count: int) -> list[tuple[float, float, float]]:
    """Make shades of a colour, the colour itself first, then lighter and darker ones."""
    red, green, blue = to_rgb(colour)
    weights = [0, 0.45, -0.4, 0.68, -0.62, 0.25][:count] + [0.8] * max(count - 6, 0)
    return [
        (
            *((part + (1 - part) * weight if weight > 0 else part * (1 + weight)) for part in (red, green, blue)),  # type: ignore[misc]
        )
        for weight in weights
    ]


class _Place(NamedTuple):
    """Where a chart is drawn: on what, in which box, over which time, with marks at which moments."""

    figure: Figure
    page: Axes
    box: tuple[float, float, float, float]
    span: tuple[float, float]
    began: set[float]


def _chart(place: _Place, panel: dict[str, Any], answers: list[Answer]) -> None:
    figure, page, box, span, began = place
    left, top, wide, high = box
    defaults = panel["fieldConfig"]["defaults"]
    lines = [
        (legend(answer.target["legendFormat"], series.labels), dict(series.points))
        for answer in answers
        for series in answer.series
    ]
    lines.sort(key=lambda line: -max(line[1].values()))
    table = min(len(lines), 3) * 15 + 14
    total_high, total_wide = page.get_ylim()[0], page.get_xlim()[1]
    chart = (high - table - 20) / total_high
    axes = figure.add_axes(
        ((left + 44) / total_wide, 1 - (top + high - table - 20) / total_high, (wide - 50) / total_wide, chart)
    )
    axes.set_facecolor("white")
    stacked = defaults["custom"].get("stacking", {}).get("mode") == "normal"
    colours: list[Any] = _shades(defaults["color"].get("fixedColor", "#0072B2"), len(lines))
    times = sorted({at for _, points in lines for at in points})
    base = [0.0] * len(times)
    for number, (name, points) in enumerate(lines):
        settings = _properties(panel, name)
        colours[number] = settings.get("color", {}).get("fixedColor") or colours[number]
        line = settings.get("custom.stacking", {}).get("mode") == "none"
        values = [points.get(at, float("nan")) for at in times]
        if stacked and not line:
            filled = [0.0 if value != value else value for value in values]  # noqa: PLR0124  (not a number)
            upper = [below + value for below, value in zip(base, filled, strict=True)]
            axes.fill_between(times, base, upper, color=colours[number], alpha=0.75, lw=0.4)
            base = upper
            continue
        axes.plot(times, values, color=colours[number], lw=1.6, ls="--" if line else "-")
    for at in began:
        axes.axvline(at, color="#D55E00", lw=0.8, alpha=0.6)
    _axes(axes, defaults, span, max([*(max(points.values()) for _, points in lines), *base]))
    for text, right in (("Max", 84), ("Last", 8)):
        page.text(
            left + wide - right, top + high - table + 12, text, fontsize=7, color=_FAINT, ha="right", weight="bold"
        )
        for row, (name, points) in enumerate(lines[:3]):
            y = top + high - table + 26 + 15 * row
            if text == "Max":
                page.add_patch(Rectangle((left, y - 6), 12, 3, fc=colours[row], ec="none"))
                page.text(left + 18, y, _cut(name, int((wide - 170) / 5.6)), fontsize=8, color=_INK)
            value = max(points.values()) if text == "Max" else points[max(points)]
            page.text(left + wide - right, y, written(value, defaults["unit"]), fontsize=8, color=_INK, ha="right")
    if len(lines) > 3:  # noqa: PLR2004
        page.text(left, top + high - table + 12, f"{len(lines) - 3} more below", fontsize=7, color=_FAINT)


def _axes(axes: Axes, defaults: dict[str, Any], span: tuple[float, float], highest: float) -> None:
    """Lay out a chart's axes, and the levels of the alerts as dashed lines."""
    for step in defaults.get("thresholds", {}).get("steps", ()) if "thresholdsStyle" in defaults["custom"] else ():
        if step["value"] is not None:
            axes.axhline(
                step["value"], color=step["color"] if step["color"] != "transparent" else _FAINT, lw=1, ls=(0, (5, 4))
            )
    highest = max(highest, defaults["custom"].get("axisSoftMax", 0))
    axes.set_xlim(*span)
    axes.set_ylim(0, highest * 1.08 or 1)
    # About six, on whole minutes, or quarters of an hour.
    every = next((step for step in (60, 120, 300) if (span[1] - span[0]) / step <= 7), 900)  # noqa: PLR2004
    ticks = [at for at in range(int(span[0]) // 60 * 60, int(span[1]) + 1, 60) if at % every == 0 and at >= span[0]]
    axes.set_xticks(ticks, [f"{dt.datetime.fromtimestamp(at, dt.UTC):%H:%M}" for at in ticks], fontsize=7)
    if defaults["unit"] == "bytes" and highest:
        axes.yaxis.set_major_locator(MultipleLocator(2 ** round(math.log2(highest / 4))))
    marks = axes.get_yticks()
    axes.set_yticks(marks[:-1][:: max(len(marks) // 5, 1)])
    axes.yaxis.set_major_formatter(lambda value, _: written(value, defaults["unit"]) if value else "0")
    axes.tick_params(labelsize=7, colors=_FAINT, length=0)
    axes.grid(color="#eaeef2", lw=0.8)
    for side in axes.spines.values():
        side.set_visible(False)
    axes.set_ylim(0, highest * 1.08 or 1)
