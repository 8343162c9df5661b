"""The dashboards against what the fault lab recorded on real kernels: while a failure is on, they show whose it is.

Every failure of a recording is looked at when its page had come and it had not been cured yet, in a real Prometheus
that holds the recordings and what today's rules make of them.
"""

from __future__ import annotations

import gzip
import json
import re
from typing import TYPE_CHECKING, Any, Final
from unittest.mock import Mock
from urllib.parse import quote

import pytest
from grafana.failures import FAILURES
from grafana.node import evidence_panel
from tests.grafana.clicks import follow, links_of, opened, panel, shown, tells, titled, visit
from tests.grafana.recorded import RECORDED, STORIES, Recording, Story, taken_over
from tests.grafana.stored import END
from tests.grafana.test_dashboards import BOARDS
from tests.lab.fault import Culprit
from tests.lab.faults import load
from tests.lab.inside import Lab, Pace, _Case
from tests.rules.pack import alerts

if TYPE_CHECKING:
    from pathlib import Path

    from grafana.reader import Dashboard, Prometheus

pytestmark = pytest.mark.timeout(600)  # as in test_shown.py

_FAILURES: Final = {failure.number: failure for failure in FAILURES}
_SECONDS: Final = 15 * 60
_STATES: Final = {"info": 1, "warning": 2, "critical": 3}
_every_story = pytest.mark.parametrize("story", RECORDED, ids=lambda story: f"{story.number}-{story.node}")

# Whom the page does not name, as it is about all tables of a kind, and the dashboard does.
_PODS: Final = {9: "resolver-client"}
# The panels of Workload that say what is wrong with the culprit.
_WHY: Final = {
    1: ("Redis: PINGs, the slowest of a hundred", "Redis: what holds it up"),
    2: ("Its accept queues in use", "Connections refused by a full queue, 5 min", "Its listeners"),
    3: ("Packets dropped by the reverse-path filter, 5 min",),
    5: ("What its memory is made of, and its limits", "Throttled, at its limit, killed"),
    6: (
        "What its memory is made of, and its limits",
        "Throttled, at its limit, killed",
        "Time in which it waited for memory",
    ),
    7: ("What its threads wait for", "How long one wait for I/O takes"),
    8: ("Reclaim: refaults, major faults, direct scans", "Time in which it waited for memory"),
    9: ("Its connections in tracking tables",),
    10: ("What its threads wait for", "Time waited for a CPU that others had", "CPU in use"),
    13: ("Its ports in use towards one destination", "Its ports, by destination"),
    14: ("Its ports in use towards one destination", "Its ports, by destination"),
}
# Panels in the row of a failure that show another, which in the lab a decoy has.
_OF_A_DECOY: Final = {313, 314}
# {(dashboard, panel, query): why it may have no answer yet when its own failure's page comes; it has one at others'}
_LATER: Final = {
    ("shoal-node", 104, "B"): "writable layers are counted every five minutes, and the page is quicker",
    ("shoal-node", 314, "A"): "an increase takes two points of the rules' grid of a minute, and the page is quicker",
}


def _names(labels: dict[str, Any], story: Story) -> bool:
    """Tell whether a row or a series is about the culprit: it has one of its labels, and none that differs."""
    said = story.culprit.keys() & labels.keys()
    return bool(said) and all(labels[label] == story.culprit[label] for label in said)


def _evidence(story: Story, server: Prometheus, board: Dashboard) -> dict[str, Any]:
    """Return the row that names the culprit in the table to which every click and page leads: its first."""
    rows = shown(board, panel(board, evidence_panel(_FAILURES[story.number])), server, story.moment, _SECONDS).rows
    # On an emulated machine everybody waits for a CPU, the exporter too.
    named = [row for row in rows[: 3 if story.number == 10 else 1] if _names(row, story)]
    assert named, rows[:3]
    return named[0]


def _coloured(which: dict[str, Any], row: dict[str, Any]) -> set[str]:
    """Return the columns that have the colour of an alert in a row."""
    return {
        column
        for override in which["fieldConfig"]["overrides"]
        for one in override["properties"]
        if one["id"] == "thresholds" and (column := override["matcher"]["options"]) in row
        if row[column] >= min(step["value"] for step in one["value"]["steps"] if step["value"] is not None)
    }


def test_the_recordings_have_all_fourteen() -> None:
    """Each was caused on a real kernel, and was on when its page came."""
    assert sorted(STORIES) == list(range(1, 15))
    for story in RECORDED:
        assert story.before < story.caused < story.paged <= story.moment <= story.cured


@_every_story
def test_fleet_shows_the_failure_and_a_click_its_culprit(lab: Prometheus, story: Story) -> None:
    """Its cell is well before and says so then; a click on it opens the table that names the culprit."""
    failure = _FAILURES[story.number]
    fleet = opened("shoal-fleet", show=">= 0")
    grid = titled(fleet, "Fourteen failures by node, worst first")
    before, now = (
        next(row for row in shown(fleet, grid, lab, at, _SECONDS).rows if row["node"] == story.node)
        for at in (story.before, story.moment)
    )
    assert before[failure.column] <= 1
    # It may be worse by then: one killed over and over.
    assert now[failure.column] >= _STATES[alerts()[story.alert]["labels"]["severity"]]
    (address,) = links_of(grid, failure.column)
    node, number = follow(fleet, address, now)
    assert number == evidence_panel(failure)
    assert _evidence(story, lab, node)


@_every_story
def test_the_page_opens_the_table_that_names_the_culprit(lab: Prometheus, story: Story) -> None:
    """The alert's link, filled in as Prometheus does it, leads to the same table, and what fires is above it."""
    address = alerts()[story.alert]["annotations"]["dashboard_url"]
    for label, value in (("cluster", "east"), ("node", story.node)):
        address = re.sub(rf"\{{\{{ *\$labels\.{label} *\}}\}}", quote(value), address)
    node, number = visit(address)
    assert number == evidence_panel(_FAILURES[story.number])
    assert node.chosen == {"cluster": "east", "node": story.node}
    assert _evidence(story, lab, node)
    firing = shown(node, panel(node, 1), lab, story.moment, _SECONDS).rows
    page = [row for row in firing if row["alertname"] == story.alert]
    assert any(_names(row, story) or "pod" not in story.culprit for row in page)


@pytest.mark.parametrize("number", STORIES)
def test_every_panel_of_the_failure_shows_it(lab: Prometheus, number: int) -> None:
    """Each query of its row on Node has an answer in a recording of it, and what names anybody names the culprit."""
    stories = [story for story in RECORDED if story.number == number]
    boards = [(opened("shoal-node", cluster="east", node=story.node), story) for story in stories]
    for one in boards[0][0].panels():
        if one["id"] < 100 or one["id"] % 100 != number:
            continue
        silent = {target["refId"] for target in one["targets"]}
        for board, story in boards:
            answers = board.ask(one, lab, story.moment, _SECONDS)
            silent -= {answer.target["refId"] for answer in answers if tells(answer)}
            about = [series.labels for answer in answers for series in answer.series]
            about = [labels for labels in about if labels.keys() & story.culprit.keys()]
            others = not about or one["id"] in _OF_A_DECOY
            assert others or any(_names(labels, story) for labels in about), one["title"]
        assert silent <= {ref for _, panel_id, ref in _LATER if panel_id == one["id"]}, one["title"]


@_every_story
def test_the_culprit_is_coloured_while_the_failure_is_on(lab: Prometheus, story: Story) -> None:
    """Its row in the table has the colour of an alert then, and had none before."""
    board = opened("shoal-node", cluster="east", node=story.node)
    evidence = panel(board, evidence_panel(_FAILURES[story.number]))
    assert _coloured(evidence, _evidence(story, lab, board))
    before = [row for row in shown(board, evidence, lab, story.before, _SECONDS).rows if _names(row, story)]
    assert not any(_coloured(evidence, row) for row in before)


@pytest.mark.parametrize("number", _WHY)
def test_workload_says_why(lab: Prometheus, number: int) -> None:
    """A click on the culprit's name in that table opens Workload, whose panels of the failure have it."""
    story = STORIES[number]
    node = opened("shoal-node", cluster="east", node=story.node)
    row = _evidence(story, lab, node)
    assert row["pod"] == _PODS.get(number, story.culprit.get("pod"))
    (address,) = links_of(panel(node, evidence_panel(_FAILURES[number])), "pod")
    workload, _ = follow(node, address, row)
    for title in _WHY[number]:
        one = titled(workload, title)
        assert any(tells(answer) for answer in workload.ask(one, lab, story.moment, _SECONDS)), title
    firing = shown(workload, titled(workload, "What fires for it"), lab, story.moment, _SECONDS).rows
    assert number in _PODS or story.alert in {row["alertname"] for row in firing}


@pytest.mark.parametrize("number", [5, 6, 7, 8, 10])
def test_the_kernel_that_lacks_a_signal_says_why(lab: Prometheus, number: int) -> None:
    """Five failures cannot be seen under cgroup v1: their cells are not seen, and a click on one gives the reason."""
    story, failure = STORIES[2], _FAILURES[number]
    fleet = opened("shoal-fleet")
    grid = titled(fleet, "Fourteen failures by node, worst first")
    row = next(row for row in shown(fleet, grid, lab, story.moment, _SECONDS).rows if row["node"] == story.node)
    # Of the tenth the pressure of the whole node, which has no need of cgroups, may inform.
    assert row[failure.column] <= (_STATES["info"] if number == 10 else -1)
    node, place = follow(fleet, links_of(grid, failure.column)[0], row)
    rows = shown(node, panel(node, place), lab, story.moment, _SECONDS).rows
    reasons = {row["signal"]: row["reason"] for row in rows if "signal" in row}
    assert reasons
    assert reasons.keys() <= set(failure.signals)
    assert set(reasons.values()) <= {"cgroup_v1", "disabled"}


@pytest.mark.parametrize("name", BOARDS)
def test_every_query_has_an_answer_in_a_recording(lab: Prometheus, name: str) -> None:
    """No query waits for what no exporter exports or no run has seen: a new one wants a recording that has it."""
    silent = set()
    boards = [(opened(name, show=">= 0", cluster="east", node=story.node), story) for story in RECORDED]
    for one in boards[0][0].panels():
        missing = {target["refId"] for target in one["targets"]}
        for board, story in boards:
            if missing:
                missing -= {a.target["refId"] for a in board.ask(one, lab, story.moment, _SECONDS) if tells(a)}
        silent |= {(name, one["id"], ref) for ref in missing}
    assert silent == set()


def test_a_run_of_the_lab_becomes_a_recording(tmp_path: Path) -> None:
    """Of what its Prometheus had, the exporter's series stay, with their gaps, and moments count from the end."""
    exported = {"__name__": "shoal_listener_drops_total", "node": "db-1", "pod": "checkout"}
    values = [[1000, "5"], [1005, "5"], [1010, "5"], [1020, "1e+06"]]
    series = [
        {"metric": exported, "values": values},
        {"metric": {"__name__": "ALERTS", "alertname": "ShoalListenQueueOverflow"}, "values": values},
        {"metric": {"__name__": "shoal_filesystem_inodes", "mountpoint": "/tmp/out"}, "values": values},  # noqa: S108
    ]
    stack = Mock(**{"series.return_value": series})
    (fault,) = (fault for fault in load() if fault.number == 2)
    lab = Lab([fault], Pace(interval=5, patience=0, resolve_within=0))
    outcome = lab.outcomes[fault.name]
    outcome.detected, outcome.seconds_to_page = True, 6.5
    lab.cases.append(_Case(fault, outcome, Mock(), Culprit({"pod": "checkout"}), caused_at=1004.0, cured_at=1019.5))
    lab.keep_series(stack, tmp_path / "kept" / "6.18.series.json.gz", 60)
    with gzip.open(tmp_path / "kept" / "6.18.series.json.gz", "rt", encoding="utf-8") as source:
        recording = Recording("6.18", taken_over(json.load(source)))
    ((name, labels, samples),) = recording.samples()
    assert (name, labels) == ("shoal_listener_drops_total", {"node": "lab-6.18", "pod": "checkout"})
    assert [*map(str, samples)] == ["5.0", "5.0", "5.0", "nan", "1000000.0"]
    assert recording.content["series"][0][2] == "5x2 _x1 1e+06"
    (story,) = recording.stories()
    assert (story.number, story.alert, story.culprit) == (2, "ShoalListenQueueOverflow", {"pod": "checkout"})
    assert (END - story.caused, END - story.paged, END - story.cured) == (16, 9.5, 0.5)
    assert END - story.moment == 5


def test_a_run_stands_without_its_recording(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """A Prometheus that does not answer any more does not cost the report."""
    stack = Mock(**{"series.side_effect": TimeoutError("timed out")})
    Lab([], Pace(interval=5, patience=0, resolve_within=0)).keep_series(stack, tmp_path / "6.18.series.json.gz", 60)
    assert capsys.readouterr().out.endswith("what Prometheus recorded could not be kept: timed out\n")


def test_a_slow_run_has_gaps_at_the_pace_of_the_tests() -> None:
    """A lab in a virtual machine scrapes more seldom: what is between two of its samples is not made up."""
    series = {"metric": {"__name__": "up"}, "values": [[1000, "1"], [1030, "0"]]}
    ((_, _, samples),) = Recording("6.1", taken_over({"step": 30, "faults": {}, "series": [series]})).samples()
    assert samples[5::6] == [1, 0]
    assert sum(sample == sample for sample in samples) == 2  # noqa: PLR0124  (the others are no numbers)
