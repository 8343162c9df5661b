"""One Prometheus of each kind for all tests of the dashboards: filling one takes half a minute."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest
from tests.grafana.recorded import serve_recordings
from tests.grafana.sick import MINUTES, fleet
from tests.grafana.stored import serve

if TYPE_CHECKING:
    from collections.abc import Iterator

    from grafana.reader import Prometheus


@pytest.fixture(scope="session")
def stored(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Prometheus]:
    """A Prometheus that holds the sick fleet, with what the rules make of it."""
    with serve(tmp_path_factory.mktemp("prometheus"), fleet(), MINUTES * 60) as server:
        yield server


@pytest.fixture(scope="session")
def lab(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Prometheus]:
    """A Prometheus that holds what the fault lab recorded, with what the rules make of it."""
    with serve_recordings(tmp_path_factory.mktemp("lab")) as server:
        yield server
