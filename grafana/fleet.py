"""The dashboard Fleet: which node, and which of the fourteen failures. Made for thousands of nodes."""

from __future__ import annotations

from typing import TYPE_CHECKING, Final

from grafana_foundation_sdk.builders import dashboard as dashboards
from grafana_foundation_sdk.models import dashboard as models

from grafana.failures import FAILURES, Level, levels
from grafana.node import evidence_panel
from grafana.parts import (
    ITS_NODE,
    RUNBOOK,
    SATURATION,
    UTILISATION,
    WHO,
    Column,
    Line,
    chart,
    dashboard,
    figure,
    link,
    node_link,
    query_variable,
    row,
    rows,
    workload_link,
)
from grafana.status import firing_states, state_of, status_overrides

if TYPE_CHECKING:
    from grafana_foundation_sdk.builders import stat, table, timeseries

    Panels = list[stat.Panel | table.Panel | timeseries.Panel]

__all__ = ["fleet"]

HERE: Final = 'cluster=~"$cluster"'

# One critical outweighs any number of warnings.
_SCORE: Final = f"""\
sum by (cluster, node) (
  10000 * node:shoal_alerts_firing:count{{severity="critical",{HERE}}}
  or
  100 * node:shoal_alerts_firing:count{{severity="warning",{HERE}}}
  or
  node:shoal_alerts_firing:count{{severity="info",{HERE}}}
  or
  0 * node:shoal_exporters:count{{{HERE}}}
  or
  0 * node:shoal_exporter_expected:group{{{HERE}}}
)"""
_MISSING: Final = (
    f"node:shoal_exporter_expected:group{{{HERE}}} unless on (cluster, node) node:shoal_exporters:count{{{HERE}}}"
)
_EXPORTER: Final = f"""\
2 * group by (cluster, node) (ALERTS{{alertname=~"Shoal.+",alertstate="firing",signal="exporter",node!="",{HERE}}})
or
2 * ({_MISSING})
or
0 * group by (cluster, node) (node:shoal_exporters:count{{{HERE}}})"""


def fleet() -> dashboards.Dashboard:
    """Build it."""
    board = dashboard(
        "shoal-fleet",
        "Shoal / Fleet",
        "Which node, and which failure: worst first. A click on a coloured cell opens the table that names the "
        "culprit, one on a node's name everything about that node.",
        "count by (cluster, alertname, severity) "
        f'(ALERTS{{alertname=~"Shoal.+",alertstate="firing",severity="critical",{HERE}}})',
    )
    board = board.with_variable(
        query_variable("cluster", "Cluster", "label_values(node:shoal_exporters:count, cluster)")
    ).with_variable(
        dashboards.CustomVariable("show")
        .label("Nodes")
        .values("with something firing : > 0, all : >= 0")
        .current(models.VariableOption(text="with something firing", value="> 0", selected=True))
        .options(
            [
                models.VariableOption(text="with something firing", value="> 0", selected=True),
                models.VariableOption(text="all", value=">= 0", selected=False),
            ]
        )
    )
    number = 0
    parts: list[tuple[str, Panels]] = [
        ("Where it burns", [*_figures(), _grid(), _firing(), _pods()]),
        ("One bad node or a bad fleet", [*_trends()]),
        ("What cannot be seen", [*_exporters()]),
    ]
    for title, panels in parts:
        board = board.with_row(row(title))
        for panel in panels:
            number += 1
            board = board.with_panel(panel.id(number))
    return board


def _nodes_with(severity: str) -> str:
    return f"""\
count(group by (cluster, node) (node:shoal_alerts_firing:count{{severity="{severity}",{HERE}}}))
or
0 * count(node:shoal_exporters:count{{{HERE}}})"""


def _figures() -> list[stat.Panel]:
    return [
        figure(
            "Nodes seen",
            "Nodes whose exporter answers. Normal: as many as there are.",
            f"count(node:shoal_exporters:count{{{HERE}}})",
            span=6,
        ),
        figure(
            "Nodes with a critical alert",
            "Nodes on which users are being hurt now. Normal: 0.",
            _nodes_with("critical"),
            levels=(Level("critical", 1),),
            span=6,
        ),
        figure(
            "Nodes with a warning",
            "Nodes that someone should look at today. Normal: few.",
            _nodes_with("warning"),
            levels=(Level("warning", 1),),
            span=6,
        ),
        figure(
            "Nodes without an exporter",
            "Nodes that node_exporter, the kubelet or Kubernetes knows and on which no exporter answers: what happens"
            " there is not seen. Normal: 0.",
            f"count({_MISSING})\nor\n0 * count(node:shoal_exporters:count{{{HERE}}})",
            levels=(Level("warning", 1),),
            span=6,
        ),
    ]


def _grid() -> table.Panel:
    def shown(state: str) -> str:
        # A node without a state is said to have none, or a column that no node has would be missing.
        return f"(\n{state}\n)\nand on (cluster, node) ({_SCORE} $show)\nor\n0 * ({_SCORE} $show) - 1"

    columns = [
        Column("score", f"{_SCORE} $show"),
        *(Column(failure.column, shown(state_of(failure, HERE))) for failure in FAILURES),
        Column("exporter", shown(_EXPORTER)),
    ]
    links = {failure.column: [node_link(ITS_NODE, panel=evidence_panel(failure))] for failure in FAILURES}
    links["exporter"] = links["node"] = [node_link(ITS_NODE)]
    panel = rows(
        "Fourteen failures by node, worst first",
        "The worst alert of each failure on each node. `not seen`: this node's kernel, or the exporter's privileges, "
        "do not show the failure; `well`: it was looked for. Normal: no rows with the choice `with something firing`.",
        columns,
        links=links,
        same_rows=True,
        sort="score",
        span=24,
        height=13,
        empty="Nothing fires on any node that is seen.",
    )
    for column in columns[1:]:
        panel = panel.override_by_name(column.name, status_overrides())
    return panel.override_by_name("score", [models.DynamicConfigValue("custom.hidden", value=True)])


def _firing() -> table.Panel:
    return rows(
        "What fires",
        "Every alert and whom it hits, worst first. A click on its name opens the runbook, on the node or the "
        "workload their dashboards. Normal: nothing.",
        [Column("state", firing_states(("cluster", "node", *WHO), HERE))],
        hide=("severity",),
        sort="state",
        links={
            "alertname": [link("Runbook", RUNBOOK)],
            "node": [node_link(ITS_NODE)],
            **{label: [workload_link(ITS_NODE)] for label in WHO},
        },
        span=15,
        height=10,
        empty="Nothing fires.",
    ).override_by_name("state", status_overrides())


def _pods() -> table.Panel:
    return rows(
        "Pods that have used most of a limit",
        "Pods with more than four fifths of a limit in use, before anything fires. Normal: few, and the same ones for"
        " days.",
        [
            Column(
                "in use",
                f"max by (cluster, node, namespace, pod, signal) (pod:shoal_used_per_limit:max{{{HERE}}})",
                "percentunit",
            )
        ],
        sort="in use",
        links={"node": [node_link(ITS_NODE)], "pod": [workload_link(ITS_NODE, ("namespace", "pod"))]},
        span=9,
        height=10,
        empty="No pod has used four fifths of a limit.",
    )


def _trends() -> list[timeseries.Panel]:
    return [
        chart(
            "Part of the nodes that are hit",
            "Nodes with a critical alert or a warning, of the nodes on which that can be seen. Normal: below 1 %. "
            "Many at once is no matter of a node: look for a roll-out, a network or a storage system.",
            [
                Line(
                    "max by (cluster, signal) ("
                    f'cluster:shoal_nodes_firing:count{{severity=~"critical|warning",{HERE}}})\n'
                    f"/ on (cluster, signal) (cluster:shoal_nodes:count{{{HERE}}} > 0)",
                    "{{cluster}} {{signal}}",
                )
            ],
            unit="percentunit",
            span=8,
            colour=SATURATION,
            empty="Nothing fires.",
        ),
        chart(
            "Limits in use on the worst node",
            "The tightest limit of each kind on the node that is closest to it. Normal: below 80 %, but memory, which"
            " is what a limit is for.",
            [Line(f"cluster:shoal_used_per_limit:max{{{HERE}}}", "{{cluster}} {{signal}}")],
            unit="percentunit",
            span=8,
            colour=UTILISATION,
        ),
        chart(
            "Limits in use that nine in ten nodes stay under",
            "The same of all nodes but the worst tenth. Normal: far below the worst node; close to it, it is the "
            "fleet.",
            [Line(f"cluster:shoal_used_per_limit:quantile90{{{HERE}}}", "{{cluster}} {{signal}}")],
            unit="percentunit",
            span=8,
            colour=UTILISATION,
        ),
    ]


def _exporters() -> list[table.Panel]:
    success = "node:shoal_scrape_collector_success:avg10m"
    failing = levels(success, "ShoalCollectorFailing")[0]
    return [
        rows(
            "Nodes without an exporter",
            "Nodes that are up and on which no exporter answers. Normal: none.",
            [Column("missing", f"max by (cluster, node) ({_MISSING})")],
            hide=("missing",),
            links={"node": [node_link(ITS_NODE)]},
            span=6,
            empty="An exporter answers on every node.",
        ),
        rows(
            "Collectors that fail, and the slowest",
            "Share of the last ten minutes in which a collector succeeded, where that is low, and the ten slowest. "
            "Normal: no collector fails, and the slowest takes less than a tenth of the scrape timeout.",
            [
                Column(
                    "succeeded",
                    f"min by (cluster, node, collector) ({success}{{{HERE}}} < {failing.value:g})",
                    "percentunit",
                    (failing,),
                ),
                Column(
                    "took",
                    "topk(10, max by (cluster, node, collector) "
                    f'(shoal_scrape_collector_duration_seconds{{node!="",{HERE}}}))',
                    "s",
                ),
            ],
            sort="took",
            links={"node": [node_link(ITS_NODE)]},
            span=9,
        ),
        rows(
            "Signals that nodes do not give, and why",
            "How many nodes lack a signal, by reason. Normal: what a tier does not include; one node alone with a "
            "reason is another kernel.",
            [
                Column(
                    "nodes",
                    f"count by (cluster, signal, reason) (node:shoal_signal_available:max{{{HERE}}} == 0)",
                    decimals=0,
                )
            ],
            sort="nodes",
            span=9,
            empty="Every node gives every signal.",
        ),
    ]
