"""Documents that are made from the code are as the code would make them now."""

from __future__ import annotations

import importlib.util
from pathlib import Path

DOCS = Path(__file__).parents[2] / "docs"


def test_the_table_of_metrics_is_current() -> None:
    """`make docs` was run after the last change of a metric."""
    spec = importlib.util.spec_from_file_location("docs_build", DOCS / "build.py")
    assert spec
    assert spec.loader
    build = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(build)
    assert (DOCS / "metrics.md").read_text(encoding="utf-8") == build.page(), "run make docs"
