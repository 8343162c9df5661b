"""What the tests of the chart share."""

from __future__ import annotations

import json
from typing import Any

import pytest
from tests.helm.engine import CHART


@pytest.fixture(scope="session")
def schema() -> dict[str, Any]:
    """Return the schema of the chart's values."""
    content: dict[str, Any] = json.loads((CHART / "values.schema.json").read_text(encoding="utf-8"))
    return content
