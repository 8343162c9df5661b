"""The dashboards against what the fault lab recorded on real kernels: while a failure is on, they show whose it is.

Every failure of a recording is looked at when its page had come and it had not been cured yet, in a real Prometheus
that holds the recordings and what today's rules make of them.
"""

from __future__ import annotations

import re
from typing import TYPE_CHECKING, Final
from urllib.parse import quote

import pytest
from grafana.failures import FAILURES
from grafana.node import evidence_panel
from grafana.reader import legend
from tests.grafana.clicks import follow, links_of, opened, panel, shown, tells, titled, visit
from tests.grafana.recorded import RECORDINGS, Story
from tests.grafana.test_dashboards import BOARDS
from tests.rules.pack import alerts

if TYPE_CHECKING:
    from grafana.reader import Dashboard, Prometheus, Table

pytestmark = pytest.mark.timeout(600)  # as in test_shown.py

STORIES: Final = {story.number: story for recording in RECORDINGS for story in recording.stories()}
_FAILURES: Final = {failure.number: failure for failure in FAILURES}
_SECONDS: Final = 15 * 60
_STATES: Final = {"info": 1, "warning": 2, "critical": 3}
_every_story = pytest.mark.parametrize("story", STORIES.values(), ids=lambda story: f"{story.number}-{story.kernel}")


def _names(row: dict[str, object], story: Story) -> bool:
    """Tell whether a row is about the culprit: it says nothing else of whatever it says of it, and at least one."""
    said = story.culprit.keys() & row.keys()
    return bool(said) and all(row[label] == story.culprit[label] for label in said)


def test_the_recordings_have_all_fourteen() -> None:
    """Each was caused on a real kernel, and was on when its page came."""
    assert sorted(STORIES) == list(range(1, 15))
    for story in STORIES.values():
        assert story.caused < story.paged <= story.moment <= story.cured


@_every_story
def test_fleet_shows_the_failure_and_a_click_its_culprit(lab: Prometheus, story: Story) -> None:
    """Its cell is well before and says so then; a click on it opens the table that names the culprit."""
    failure = _FAILURES[story.number]
    fleet = opened("shoal-fleet", show=">= 0")
    grid = titled(fleet, "Fourteen failures by node, worst first")
    before, now = (
        next(row for row in shown(fleet, grid, lab, at, _SECONDS).rows if row["node"] == story.node)
        for at in (story.caused, story.moment)
    )
    assert before[failure.column] <= 1
    assert now[failure.column] == _STATES[alerts()[story.alert]["labels"]["severity"]]
    (address,) = links_of(grid, failure.column)
    node, number = follow(fleet, address, now)
    assert number == evidence_panel(failure)
    rows = shown(node, panel(node, number), lab, story.moment, _SECONDS).rows
    assert any(_names(row, story) for row in rows), rows
