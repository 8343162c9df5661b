"""What the dashboards are made of: selections, panels, thresholds and links, one way each."""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Final

from grafana_foundation_sdk.builders import common as common_builders
from grafana_foundation_sdk.builders import dashboard as dashboards
from grafana_foundation_sdk.builders import prometheus, stat, table, timeseries
from grafana_foundation_sdk.models import common
from grafana_foundation_sdk.models import dashboard as models
from grafana_foundation_sdk.models.prometheus import PromQueryFormat

from grafana.failures import Level

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence

__all__ = [
    "DATASOURCE",
    "ITS_NODE",
    "RUNBOOK",
    "SAME_NODE",
    "SATURATION",
    "SEVERITY",
    "STATUS",
    "UTILISATION",
    "WELL",
    "WHO",
    "Column",
    "Line",
    "chart",
    "dashboard",
    "figure",
    "link",
    "node_link",
    "own",
    "query_variable",
    "row",
    "rows",
    "top",
    "workload_link",
]

# Okabe and Ito's colours, which people with any kind of colour blindness can tell apart, on light and on dark.
UTILISATION: Final = "#0072B2"
SATURATION: Final = "#E69F00"
WELL: Final = "#0072B2"
SEVERITY: Final = {"info": "#56B4E9", "warning": "#E69F00", "critical": "#D55E00"}
_PLAIN: Final = "transparent"

DATASOURCE: Final = models.DataSourceRef(type_val="prometheus", uid="${datasource}")
RUNBOOK: Final = (
    "https://github.com/shoal-exporter/shoal/blob/main/rules/runbooks/${__data.fields.alertname:percentencode}.md"
)
WHO: Final = ("namespace", "pod", "container", "unit")
"""The labels that name a workload: a pod's container, a container, or a unit."""
SAME_NODE: Final = "${cluster:queryparam}&${node:queryparam}"
"""For a link: the cluster and node that are chosen."""
ITS_NODE: Final = "var-cluster=${__data.fields.cluster:percentencode}&var-node=${__data.fields.node:percentencode}"
"""For a link: the cluster and node of the row."""

STATUS: Final = models.ValueMap(
    options={
        # Plain, so that what is wrong stands out.
        "-1": models.ValueMappingResult(text="not seen", color=_PLAIN),
        "0": models.ValueMappingResult(text="well", color=_PLAIN),
        "1": models.ValueMappingResult(text="info", color=SEVERITY["info"]),
        "2": models.ValueMappingResult(text="warning", color=SEVERITY["warning"]),
        "3": models.ValueMappingResult(text="CRITICAL", color=SEVERITY["critical"]),
    }
)


_NOTHING: Final = models.ValueMap(options={"-1": models.ValueMappingResult(text="-", color=_PLAIN)})


@dataclass(frozen=True, slots=True)
class Line:
    """A query of a chart and how its series are named."""

    expr: str
    legend: str


@dataclass(frozen=True, slots=True)
class Column:
    """A column of a table: its heading, the query that fills it, its unit, and the levels that colour it."""

    name: str
    expr: str
    unit: str = "short"
    levels: tuple[Level, ...] = ()
    decimals: int | None = None


def top(series: str, count: int = 5, *, least: bool = False) -> str:
    """Select the series with the highest (or lowest) values of all the time shown, so that lines do not come and go."""
    choose, over = ("bottomk", "min_over_time") if least else ("topk", "max_over_time")
    return f"{series} and {choose}({count}, {over}({series}[$__range] @ end()))"


def own(series: str, selection: str, by: Iterable[str] = WHO) -> str:
    """Select a series as exported, without the identity of the exporter's pod that a unit's series still has.

    `series` is its name, or an expression with `{}` after each name.
    """
    labels = ", ".join(by)
    others = ", ".join(label for label in by if label not in ("namespace", "pod", "container"))
    series = series if "{}" in series else f"{series}{{}}"
    workload, unit = (series.replace("{}", f'{{{selection},unit{which}""}}') for which in ("=", "!="))
    return f"max by ({labels}) ({workload})\nor\nmax by ({others}) ({unit})"


def link(title: str, url: str) -> dict[str, Any]:
    """Make a link of a value or cell."""
    return {"title": title, "url": url}


def node_link(where: str, *, panel: int | None = None) -> dict[str, Any]:
    """Link to the dashboard of a node, or to one panel of it. `where` has the variables cluster and node."""
    view = f"&viewPanel={panel}" if panel else ""
    return link(
        "This failure on this node" if panel else "This node",
        f"/d/shoal-node/shoal-node?{where}&${{datasource:queryparam}}&${{__url_time_range}}{view}",
    )


def workload_link(where: str, who: Iterable[str] = WHO, source: str = "__data.fields") -> dict[str, Any]:
    """Link to the dashboard of a workload that a row, or with another source a series, names."""
    names = "".join(f"&var-{label}=${{{source}.{label}:percentencode}}" for label in who)
    return link(
        "This workload",
        f"/d/shoal-workload/shoal-workload?{where}{names}&${{datasource:queryparam}}&${{__url_time_range}}",
    )


def _steps(levels: Sequence[Level], base: str) -> dashboards.ThresholdsConfig:
    """Make a panel's thresholds of the levels of alerts."""
    below = [level for level in levels if level.below]
    if below:
        # Worst first: from nothing up to the lowest level it is critical, and beyond the highest all is well.
        ordered = sorted(below, key=lambda level: level.value)
        steps = [models.Threshold(color=SEVERITY[ordered[0].severity])]
        colours = [SEVERITY[level.severity] for level in ordered[1:]] + [base]
        steps += [
            models.Threshold(value=level.value, color=colour) for level, colour in zip(ordered, colours, strict=True)
        ]
    else:
        steps = [models.Threshold(color=base)]
        steps += [
            models.Threshold(value=level.value, color=SEVERITY[level.severity])
            for level in sorted(levels, key=lambda level: level.value)
        ]
    return dashboards.ThresholdsConfig().mode(models.ThresholdsMode.ABSOLUTE).steps(steps)


def _query(ref: str, expr: str) -> prometheus.Dataquery:
    return prometheus.Dataquery().ref_id(ref).expr(expr).datasource(DATASOURCE)


def chart(  # noqa: PLR0913  (what a panel has)
    title: str,
    description: str,
    lines: Sequence[Line],
    *,
    unit: str,
    colour: str,
    span: int = 6,
    height: int = 7,
    levels: Sequence[Level] = (),
    links: Sequence[dict[str, Any]] = (),
    stacked: bool = False,
    empty: str = "Nothing to show: no such signal on this node, or nothing happened.",
) -> timeseries.Panel:
    """Make a chart over time. Its lines are shades of one colour: blue for use, orange for what suffers from it."""
    panel = (
        timeseries.Panel()
        .title(title)
        .description(description)
        .datasource(DATASOURCE)
        .unit(unit)
        .min(0)
        .span(span)
        .height(height)
        .no_value(empty)
        .line_width(2)
        .fill_opacity(30 if stacked else 5)
        .span_nulls(span_nulls=False)
        .color_scheme(dashboards.FieldColor().mode(models.FieldColorModeId.SHADES).fixed_color(colour))
        .legend(
            common_builders.VizLegendOptions()
            .display_mode(common.LegendDisplayMode.TABLE)
            .placement(common.LegendPlacement.BOTTOM)
            .show_legend(show_legend=True)
            .calcs(["max", "lastNotNull"])
            .sort_by("Max")
            .sort_desc(sort_desc=True)
        )
        .tooltip(
            common_builders.VizTooltipOptions().mode(common.TooltipDisplayMode.MULTI).sort(common.SortOrder.DESCENDING)
        )
    )
    if stacked:
        panel = panel.stacking(common_builders.StackingConfig().mode(common.StackingMode.NORMAL))
    if levels:
        # Only the lines are drawn, so each has the colour of its own severity, whichever side of it is the bad one.
        lines_at = [Level(level.severity, level.value) for level in levels]
        panel = panel.thresholds(_steps(lines_at, _PLAIN)).thresholds_style(
            common_builders.GraphThresholdsStyleConfig().mode(common.GraphTresholdsStyleMode.DASHED)
        )
        # So that a calm line is seen to be far below the level.
        panel = panel.axis_soft_max(max(level.value for level in levels) * 1.1)
    for ref, line in zip("ABCDEFGHIJ", lines, strict=False):
        panel = panel.with_target(_query(ref, line.expr).range().legend_format(line.legend))
    if links:
        panel = panel.override_by_regexp("/.*/", [models.DynamicConfigValue("links", list(links))])
    return panel


def rows(  # noqa: PLR0913  (what a panel has)
    title: str,
    description: str,
    columns: Sequence[Column],
    *,
    links: dict[str, list[dict[str, Any]]] | None = None,
    hide: Sequence[str] = (),
    same_rows: bool = False,
    sort: str = "",
    unseen: str = "",
    span: int = 12,
    height: int = 7,
    empty: str = "Nothing to show: no such signal on this node, or nothing happened.",
) -> table.Panel:
    """Make a table: a row for each set of labels, a column for each query, the worst first. `links` is by column.

    `unseen` asks for signals that are not available: each is a row with the reason, and no values.

    Grafana names a column after its query only if another query has an answer too, and joins rows by the labels that
    all answers have. So every query has every row, with -1 (shown as a dash) where there is nothing, unless
    `same_rows` says that they do so by themselves.
    """
    panel = (
        table.Panel()
        .title(title)
        .description(description)
        .datasource(DATASOURCE)
        .unit("short")
        .span(span)
        .height(height)
        .no_value(empty)
        .cell_height(common.TableCellHeight.SM)
    )
    refs = "ABCDEFGHIJKLMNOPQRSTUVWXYZ"[: len(columns)]
    renamed = {}
    fill = ""
    if len(columns) > 1 and not same_rows:
        every = "\nor\n".join(f"({column.expr})" for column in columns)
        fill = f"\nor\n-1 * group by ({', '.join(_labels(columns))}) (\n{every}\n)"
    if unseen:
        fill += f"\nor\n({unseen}) - 1"
    for ref, column in zip(refs, columns, strict=True):
        query = _query(ref, f"({column.expr}){fill}" if fill else column.expr).instant().format(PromQueryFormat.TABLE)
        panel = panel.with_target(query)
        # Grafana calls the value of an only query by the one name and those of several by the other.
        renamed["Value" if len(columns) == 1 else f"Value #{ref}"] = column.name
    incoming = {column: name for name, column in renamed.items()}
    labels = (*_labels(columns), *(("signal", "reason") if unseen else ()), *renamed)
    panel = panel.with_transformation(models.DataTransformerConfig("merge", options={})).with_transformation(
        models.DataTransformerConfig(
            "organize",
            options={
                "excludeByName": dict.fromkeys(("Time", *(incoming.get(name, name) for name in hide)), True),
                "renameByName": renamed,
                "indexByName": {name: place for place, name in enumerate(dict.fromkeys(labels))},
            },
        )
    )
    # An empty cell is empty: the sentence for no data is the panel's.
    panel = panel.override_by_regexp("/.*/", [models.DynamicConfigValue("noValue", "")])
    if sort:
        panel = panel.with_transformation(
            models.DataTransformerConfig("sortBy", options={"sort": [{"field": sort, "desc": True}]})
        )
    for column in columns:
        properties = [models.DynamicConfigValue("unit", column.unit)]
        if fill:
            properties.append(models.DynamicConfigValue("mappings", [_NOTHING]))
        if column.decimals is not None:
            properties.append(models.DynamicConfigValue("decimals", column.decimals))
        if column.levels:
            properties += [
                models.DynamicConfigValue("thresholds", _steps(column.levels, _PLAIN).build()),
                models.DynamicConfigValue("custom.cellOptions", {"type": "color-background", "mode": "basic"}),
            ]
        panel = panel.override_by_name(column.name, properties)
    for name, of_column in (links or {}).items():
        panel = panel.override_by_name(name, [models.DynamicConfigValue("links", of_column)])
    return panel


def _labels(columns: Sequence[Column]) -> list[str]:
    """Return the labels that make a table's rows, in the order in which its queries name them."""
    groups = [group for column in columns for group in re.findall(r"by \(([^)]*)\)", column.expr)]
    return list(dict.fromkeys(name.strip() for group in groups for name in group.split(",")))


def figure(title: str, description: str, expr: str, *, levels: Sequence[Level] = (), span: int = 4) -> stat.Panel:
    """Make one number."""
    return (
        stat.Panel()
        .title(title)
        .description(description)
        .datasource(DATASOURCE)
        .unit("short")
        .span(span)
        .height(4)
        .no_value("no data")
        .color_mode(common.BigValueColorMode.BACKGROUND_SOLID if levels else common.BigValueColorMode.VALUE)
        .graph_mode(common.BigValueGraphMode.NONE)
        .thresholds(_steps(levels, WELL))
        .color_scheme(dashboards.FieldColor().mode(models.FieldColorModeId.THRESHOLDS))
        .with_target(_query("A", expr).instant())
    )


def row(title: str) -> dashboards.Row:
    """Make a heading."""
    return dashboards.Row(title)


def query_variable(name: str, label: str, query: str, *, everything: bool = True) -> dashboards.QueryVariable:
    """Make a variable whose choices are a query's. All is `.*`, which also takes series without the label."""
    variable = (
        dashboards.QueryVariable(name)
        .label(label)
        .query({"query": query, "refId": "variable"})
        .datasource(DATASOURCE)
        .refresh(models.VariableRefresh.ON_TIME_RANGE_CHANGED)
        .sort(models.VariableSort.ALPHABETICAL_ASC)
    )
    if everything:
        variable = (
            variable.include_all(include_all=True)
            .all_value(".*")
            .current(models.VariableOption(text="All", value="$__all", selected=True))
        )
    return variable


def dashboard(uid: str, title: str, description: str, annotation: str) -> dashboards.Dashboard:
    """Make an empty dashboard with what all have: data source, tags, links to the others, alerts as annotations."""
    return (
        dashboards.Dashboard(title)
        .uid(uid)
        .description(description)
        .tags(["shoal"])
        .readonly()
        .tooltip(models.DashboardCursorSync.CROSSHAIR)
        .time("now-1h", "now")
        .refresh("1m")
        .timezone("browser")
        .with_variable(
            # Grafana's default, if that is a Prometheus; without this the first by name.
            dashboards.DatasourceVariable("datasource")
            .label("Data source")
            .type("prometheus")
            .current(models.VariableOption(text="default", value="default", selected=True))
        )
        .link(
            dashboards.DashboardLink("Shoal")
            .type(models.DashboardLinkType.DASHBOARDS)
            .tags(["shoal"])
            .as_dropdown(as_dropdown=False)
            .include_vars(include_vars=True)
            .keep_time(keep_time=True)
        )
        .annotation(
            dashboards.AnnotationQuery()
            .name("Alerts")
            .datasource(DATASOURCE)
            .enable(enable=True)
            .icon_color(SEVERITY["critical"])
            .expr(annotation)
        )
    )
