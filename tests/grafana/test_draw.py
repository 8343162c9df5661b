"""The pictures of the dashboards, and what is written in them."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest
from grafana.draw import draw, written
from grafana.failures import FAILURES, Failure
from grafana.reader import Dashboard, Prometheus, legend
from tests.grafana.pictures import PICTURES
from tests.grafana.sick import MINUTES, node_of
from tests.grafana.stored import END
from tests.grafana.test_dashboards import BOARDS

if TYPE_CHECKING:
    from pathlib import Path


@pytest.mark.timeout(600)
@pytest.mark.parametrize(
    ("name", "node"),
    [("shoal-fleet", ""), ("shoal-node", node_of(6)), ("shoal-workload", node_of(6)), ("shoal-workload", "nobody")],
)
def test_every_dashboard_can_be_drawn(stored: Prometheus, tmp_path: Path, name: str, node: str) -> None:
    """All of it, with something to show and with nothing."""
    file = tmp_path / "picture.png"
    draw(Dashboard(BOARDS[name].content, {"cluster": "east", "node": node}), stored, END, file, seconds=MINUTES * 60)
    assert file.read_bytes()[:4] == b"\x89PNG"


@pytest.mark.parametrize("name", ["fleet", "node", "workload"])
def test_pictures_are_there_and_small(name: str) -> None:
    """The README has them, and a clone is not the larger for it."""
    assert (PICTURES / f"{name}.png").stat().st_size < 300_000
    assert f"docs/pictures/{name}.png" in (PICTURES.parents[1] / "README.md").read_text(encoding="utf-8")


@pytest.mark.parametrize("failure", FAILURES, ids=lambda failure: failure.column)
def test_the_clicks_are_written_down(failure: Failure) -> None:
    """Every failure has its line, with the column and the table as the dashboards call them."""
    text = (PICTURES.parent / "dashboards.md").read_text(encoding="utf-8")
    (line,) = [line for line in text.splitlines() if line.startswith(f"| {failure.number} ")]
    _, title, column, opens, _, _ = (part.strip() for part in line.split("|"))
    assert (title, column) == (f"{failure.number} {failure.title}", failure.column)
    evidence = next(one for one in BOARDS["shoal-node"].panels() if one["id"] == 100 + failure.number)
    assert opens.startswith(f"{evidence['title']}: ")


@pytest.mark.parametrize(
    ("value", "unit", "text"),
    [
        (0.126, "percentunit", "13%"),
        (0.062, "percentunit", "6.2%"),
        (0.19, "s", "190 ms"),
        (0.0, "s", "0 s"),
        (512 * 2**20, "bytes", "512 MiB"),
        (1275.0, "short", "1.27 K"),
        (64.0, "ops", "64 ops/s"),
    ],
)
def test_numbers_are_written_in_their_unit(value: float, unit: str, text: str) -> None:
    """As a person reads them."""
    assert written(value, unit) == text


def test_a_series_is_named_by_its_labels() -> None:
    """What a series lacks leaves no hole in its name."""
    pattern = "{{unit}}{{namespace}} {{pod}} {{container}}"
    assert legend(pattern, {"unit": "sshd.service"}) == "sshd.service"
    assert legend(pattern, {"namespace": "shop", "pod": "queue-0", "container": "redis"}) == "shop queue-0 redis"
