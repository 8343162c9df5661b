"""The dashboards against a real Prometheus: during a failure its panels show it, and clicks lead to the culprit."""

from __future__ import annotations

import re
from typing import TYPE_CHECKING, Final

import pytest
from grafana.failures import FAILURES
from grafana.node import evidence_panel
from tests.grafana.clicks import follow, links_of, opened, panel, shown, titled
from tests.grafana.sick import (
    ALONE,
    BUSY,
    CHECKOUT,
    GONE,
    LONG,
    MINUTES,
    OLD,
    REPORTS,
    SECOND,
    SICK,
    UNIT,
    UNSEEN,
    UNSEEN_TOO,
    many,
    node_of,
)
from tests.grafana.stored import END, serve_recorded
from tests.grafana.test_dashboards import BOARDS, links

if TYPE_CHECKING:
    from pathlib import Path

    from grafana.reader import Dashboard, Prometheus

pytestmark = pytest.mark.timeout(
    600
)  # filling Prometheus takes half a minute alone, and minutes on a machine that is busy

_SECONDS: Final = MINUTES * 60


def test_node_shows_what_fires_and_what_is_unseen(stored: Prometheus) -> None:
    """The head of Node has the node's alerts, the signals that are missing with the reason, and the collectors."""
    board = opened("shoal-node", cluster="east", node=node_of(2))
    firing, missing, collectors = (shown(board, panel(board, number), stored) for number in (1, 2, 3))
    assert [row["alertname"] for row in firing.rows][:1] == ["ShoalListenQueueOverflow"]
    assert {"alertname": "ShoalCPUThrottling", "pod": CHECKOUT["pod"]}.items() <= next(
        row for row in firing.rows if row["alertname"] == "ShoalCPUThrottling"
    ).items()
    assert [(row["signal"], row["reason"]) for row in missing.rows] == [("neighbours_verify", "not_enabled")]
    assert len(collectors.rows) == 10
    third = opened("shoal-node", cluster="east", node=node_of(3))
    assert "eth1" in {row["what"].strip() for row in shown(third, panel(third, 1), stored).rows}


def test_the_grid_is_worst_first_and_honest(stored: Prometheus) -> None:
    """Critical above warning; nodes that are well if asked for; one unseen has no state but its exporter's."""
    board = opened("shoal-fleet")
    grid = titled(board, "Fourteen failures by node, worst first")
    firing = shown(board, grid, stored)
    scores = [row["score"] for row in firing.rows]
    assert scores == sorted(scores, reverse=True)
    assert scores[0] >= 10_000
    assert ("west", SECOND) not in {(row.get("cluster"), row["node"]) for row in firing.rows}
    for node in (UNSEEN, UNSEEN_TOO, GONE):
        unseen = next(row for row in firing.rows if row["node"] == node)
        assert unseen["exporter"] == 2
        assert {unseen[failure.column] for failure in FAILURES} == {-1}
    everyone = opened("shoal-fleet", show=">= 0")
    old = next(row for row in shown(everyone, grid, stored).rows if row["node"] == OLD)
    seen = {failure.column for failure in FAILURES if "memory_workloads" not in failure.signals}
    assert {failure.column: old[failure.column] for failure in FAILURES} == {
        failure.column: 0 if failure.column in seen else -1 for failure in FAILURES
    }
    assert len(seen) == 11


def test_a_node_that_is_gone(stored: Prometheus) -> None:
    """What it was while it was there is still to be seen, as long as the time goes back; of now nothing is said."""
    node = opened("shoal-node", cluster="east", node=GONE)
    assert not shown(node, panel(node, 3), stored).rows
    assert panel(node, 3)["fieldConfig"]["defaults"]["noValue"] == "No exporter answers on this node."
    lines = [series for answer in node.ask(panel(node, 210), stored, END, _SECONDS) for series in answer.series]
    assert lines
    assert all(series.points[-1][0] < END - 10 * 60 for series in lines)
    fleet = opened("shoal-fleet")
    missing = next(
        one for one in fleet.panels() if (one["title"], one["type"]) == ("Nodes without an exporter", "table")
    )
    assert {row["node"] for row in shown(fleet, missing, stored).rows} == {GONE, UNSEEN, UNSEEN_TOO}


def test_the_table_says_why_a_signal_is_missing(stored: Prometheus) -> None:
    """Where a click lands there is a row for each signal that this node does not give, with the exporter's reason."""
    old = opened("shoal-node", cluster="west", node=OLD)
    for failure in FAILURES:
        evidence = panel(old, evidence_panel(failure))
        said = {(row.get("signal"), row.get("reason")) for row in shown(old, evidence, stored).rows if "signal" in row}
        assert said == {(signal, "cgroup_v1") for signal in failure.signals if signal == "memory_workloads"}
    # It stands beside what the other signals of the same failure say, and is no value.
    kills = panel(old, evidence_panel(next(failure for failure in FAILURES if failure.number == 5)))
    assert all(row["not reclaimable"] == -1 for row in shown(old, kills, stored).rows)


def test_a_machine_that_is_busy_and_well(stored: Prometheus) -> None:
    """What was recorded from a real exporter: nothing is wrong on Fleet, and Node has the names of its pods."""
    board = opened("shoal-fleet", show=">= 0", cluster="east")
    grid = titled(board, "Fourteen failures by node, worst first")
    row = next(row for row in shown(board, grid, stored).rows if row["node"] == BUSY)
    states = {failure.column: row[failure.column] for failure in FAILURES}
    # Of its Redis the latency monitor is off, which is worth knowing and no more.
    assert states == dict.fromkeys(states, 0) | {"Redis AOF": 1}
    node = opened("shoal-node", cluster="east", node=BUSY)
    full = {one["id"] for one in node.panels() if any(answer.series for answer in node.ask(one, stored, END))}
    # What is there without a failure: tables, queues, disks, servers, who waits and who listens.
    assert {204, 301, 202, 209, 203, 211, 207, 307, 110, 101, 102, 103, 109, 111} <= full
    assert {"cart-6c9d8f7b5-kq2mz", "redis-server.service"} <= {
        row.get("pod") or row.get("unit") for row in shown(node, panel(node, 102), stored).rows
    }


def test_a_thousand_nodes(tmp_path: Path) -> None:
    """The grid has a row for each node on which something fires, or for all if that is asked for."""
    with serve_recorded(tmp_path, many(1000)) as server:
        for show, count in (("> 0", 100), (">= 0", 1000)):
            board = opened("shoal-fleet", show=show)
            rows = shown(board, titled(board, "Fourteen failures by node, worst first"), server).rows
            assert len(rows) == count
            assert all(max(row[failure.column] for failure in FAILURES) == 3 for row in rows[:100])
        assert len(shown(board, titled(board, "What fires"), server).rows) == 500


def test_two_clusters_stay_apart(stored: Prometheus) -> None:
    """A node's name that two clusters have is two rows on Fleet, and Node shows the one that was chosen."""
    grid = titled(opened("shoal-fleet"), "Fourteen failures by node, worst first")
    states = {
        row["cluster"]: row["listen queue"]
        for row in shown(opened("shoal-fleet", show=">= 0"), grid, stored).rows
        if row["node"] == SECOND
    }
    assert states == {"east": 3, "west": 0}
    only = shown(opened("shoal-fleet", show=">= 0", cluster="west"), grid, stored)
    assert {row["cluster"] for row in only.rows} == {"west"}
    west = opened("shoal-node", cluster="west", node=SECOND)
    assert shown(west, panel(west, 1), stored).rows == []


def test_outside_kubernetes_and_without_a_cluster(stored: Prometheus) -> None:
    """A node without a `cluster` label has its row; its units are named, without columns of pods, and lead on."""
    fleet = opened("shoal-fleet")
    grid = titled(fleet, "Fourteen failures by node, worst first")
    row = next(row for row in shown(fleet, grid, stored).rows if row["node"] == ALONE)
    assert row["memory.high"] == 3
    node, number = follow(fleet, links_of(grid, "memory.high")[0], row)
    assert node.chosen["cluster"] == ""
    evidence = shown(node, panel(node, number), stored)
    assert not {"namespace", "pod", "container"} & set(evidence.columns)
    assert evidence.rows[0]["unit"] == UNIT["unit"]
    workload, _ = follow(node, links_of(panel(node, number), "unit")[0], evidence.rows[0])
    assert shown(workload, titled(workload, "What fires for it"), stored).rows
    memory = titled(workload, "What its memory is made of, and its limits")
    assert all(answer.series for answer in workload.ask(memory, stored, END, _SECONDS))


def test_a_link_with_empty_names_shows_all_that_is_known(stored: Prometheus) -> None:
    """A unit has no pod, and a pod's network namespace no container: neither may hide what the others say of it."""
    node = opened("shoal-node", cluster="east", node=node_of(6))
    row = next(row for row in shown(node, panel(node, 106), stored).rows if row.get("unit") == UNIT["unit"])
    unit, _ = follow(node, links_of(panel(node, 106), "unit")[0], row)
    assert (unit.chosen["pod"], unit.chosen["unit"]) == ("", UNIT["unit"])
    # As exported a unit's series carry the exporter's pod, so an empty choice must not mean an empty label.
    memory = titled(unit, "What its memory is made of, and its limits")
    assert all(answer.series for answer in unit.ask(memory, stored, END, _SECONDS))
    node = opened("shoal-node", cluster="east", node=node_of(2))
    row = next(
        row for row in shown(node, panel(node, 1), stored).rows if row["alertname"] == "ShoalListenQueueOverflow"
    )
    pod, _ = follow(node, links_of(panel(node, 1), "pod")[0], row)
    assert (pod.chosen["pod"], pod.chosen["container"]) == (CHECKOUT["pod"], "")
    for title in ("CPU in use", "Its listeners", "Connections refused by a full queue, 5 min"):
        assert all(answer.series for answer in pod.ask(titled(pod, title), stored, END, _SECONDS)), title


def test_the_longest_pod_name(stored: Prometheus) -> None:
    """A name of 253 characters is a row, a link that keeps it whole, and a selection."""
    node = opened("shoal-node", cluster="east", node=node_of(10))
    evidence = panel(node, 110)
    row = next(row for row in shown(node, evidence, stored).rows if row.get("pod") == LONG)
    workload, _ = follow(node, links_of(evidence, "pod")[0], row)
    assert (workload.chosen["pod"], workload.chosen["container"]) == (LONG, REPORTS["container"])
    usage = titled(workload, "CPU in use")
    assert len(workload.ask(usage, stored, END, _SECONDS)[0].series) == 1


def test_exporter_and_kube_state_metrics_are_nobody(stored: Prometheus) -> None:
    """Prometheus puts the exporter's pod on what has none, and kube-state-metrics has our labels: neither is shown."""
    for number in SICK:
        board = opened("shoal-node", cluster="east", node=node_of(number))
        for one in board.panels():
            for answer in board.ask(one, stored, END, _SECONDS):
                said = [value for series in answer.series for value in series.labels.values()]
                assert not [value for value in said if re.match(r"shoal-\d|exporter$|kube-state|core$", value)], one[
                    "title"
                ]


def test_the_pod_that_holds_the_inodes(stored: Prometheus) -> None:
    """A file system that runs out, then whose files they are; the lab cures it before these have been counted."""
    node = opened("shoal-node", cluster="east", node=node_of(4))
    evidence = panel(node, 104)
    first, second, *_ = shown(node, evidence, stored).rows
    assert (first["mountpoint"], first.get("pod"), first["files"]) == ("/var/lib/containerd", None, -1)
    assert second["pod"] == CHECKOUT["pod"]
    assert second["files"] > 100_000
    workload, _ = follow(node, links_of(evidence, "pod")[0], second)
    assert workload.chosen["pod"] == CHECKOUT["pod"]


@pytest.mark.parametrize("name", BOARDS)
def test_nothing_to_show_is_no_error(stored: Prometheus, name: str) -> None:
    """A node that nobody knows: no query fails, and every panel has a sentence for it."""
    board = opened(name, cluster="nowhere", node="nobody")
    for one in board.panels():
        assert not any(answer.series for answer in board.ask(one, stored, END, _SECONDS))
        assert one["fieldConfig"]["defaults"]["noValue"]


def test_no_query_answers_twice_for_one_row(stored: Prometheus) -> None:
    """A table's columns meet in one row for each thing: the same labels in all, or fewer where there are none."""
    board = opened("shoal-node", cluster="east", node=node_of(10))
    rows = shown(board, panel(board, 110), stored).rows
    keys = [(row.get("namespace"), row.get("pod"), row.get("container"), row.get("unit")) for row in rows]
    assert len(set(keys)) == len(keys)
    checkout = next(row for row in rows if row.get("pod") == CHECKOUT["pod"])
    assert checkout["waits"] > 1
    # It has no quota, and the mailer has: every row has every column.
    assert checkout["stopped by its quota"] == -1
    assert {row["pod"]: row["stopped by its quota"] > 0.25 for row in rows if "mailer" in row.get("pod", "")} == {
        "mailer-5d6b-4kk2p": True
    }


def test_the_lists_offer_what_is_there(stored: Prometheus) -> None:
    """Clusters, nodes (without an exporter too), a node's namespaces, pods and units, the exporter's own not."""

    def choices(board: Dashboard, name: str) -> list[str]:
        query = board.variables()[name]["query"]["query"]
        match = re.fullmatch(r"label_values\((.+), ?(\w+)\)", query, re.DOTALL)
        assert match
        selector = match[1]
        for variable, value in board.values().items():
            selector = selector.replace(f"${variable}", value)
        return stored.label_values(match[2], selector, END - _SECONDS, END)

    node = opened("shoal-node", cluster="east")
    assert choices(node, "cluster") == ["east", "west"]
    assert {UNSEEN, UNSEEN_TOO, node_of(1), node_of(14)} <= set(choices(node, "node"))
    workload = opened("shoal-workload", cluster="east", node=node_of(10))
    assert choices(workload, "namespace") == ["shop"]
    assert set(choices(workload, "pod")) == {CHECKOUT["pod"], LONG, "mailer-5d6b-4kk2p"}
    assert choices(workload, "unit") == [UNIT["unit"]]
    # kube-state-metrics has a label `unit` too, of quantities.
    assert choices(opened("shoal-workload", cluster="east", node=node_of(2)), "unit") == [UNIT["unit"]]


@pytest.mark.parametrize("name", BOARDS)
def test_annotations_are_the_alerts(stored: Prometheus, name: str) -> None:
    """The alerts of the selection are marked in every chart."""
    board = opened(name, cluster="east", node=node_of(6))
    query = board.content["annotations"]["list"][0]["expr"]
    for variable, value in board.values().items():
        query = query.replace(f"${variable}", value)
    assert "ShoalMemoryHighThrottling" in {series.labels["alertname"] for series in stored.query(query, END)}


def test_links_of_every_table_are_of_columns_that_it_has() -> None:
    """A link on a column that no query makes could never be clicked."""
    for board in BOARDS.values():
        for one in board.panels():
            labels = {label for target in one["targets"] for label in re.findall(r"by \(([^)]*)\)", target["expr"])}
            made = {name.strip() for group in labels for name in group.split(",")}
            made |= set(
                next(
                    (t["options"]["renameByName"].values() for t in one["transformations"] if t["id"] == "organize"), ()
                )
            )
            for override in one["fieldConfig"]["overrides"]:
                if override["matcher"]["id"] == "byName" and links(one):
                    assert override["matcher"]["options"] in made, (one["title"], override["matcher"])
