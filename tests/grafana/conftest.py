"""One Prometheus for all tests of the dashboards: filling it takes half a minute."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest
from tests.grafana.sick import MINUTES, fleet
from tests.grafana.stored import serve

if TYPE_CHECKING:
    from collections.abc import Iterator

    from grafana.reader import Prometheus


@pytest.fixture(scope="session")
def stored(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Prometheus]:
    """A Prometheus that holds the sick fleet, with what the rules make of it."""
    with serve(tmp_path_factory.mktemp("prometheus"), fleet(), MINUTES) as server:
        yield server
