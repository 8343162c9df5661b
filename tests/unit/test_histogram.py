"""Histograms, from what is observed to bytes; prometheus_client's instrument and its parsers are the oracles."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st
from prometheus_client import CollectorRegistry
from prometheus_client import Histogram as Instrument
from prometheus_client.openmetrics.parser import text_string_to_metric_families as parse_openmetrics
from prometheus_client.parser import text_string_to_metric_families as parse_text

from shoal.exposition import render
from shoal.families import Family, Histogram, Metric

BOUNDS = (0.001, 0.25, 1.0, 2.5)
METRIC = Metric("shoal_x_seconds", "histogram", "Times.", "tests", ("server", "unit", "le"))


def family_of(values: list[float], server: str = "a") -> Family:
    """Return a family with one histogram of these values."""
    histogram = Histogram(BOUNDS)
    for value in values:
        histogram.observe(value)
    family = METRIC.family()
    family.add_histogram((server, ""), histogram)
    return family


@given(st.lists(st.floats(0, 10) | st.sampled_from(BOUNDS)))
def test_buckets_are_those_of_prometheus_client(values: list[float]) -> None:
    """Every bucket, the count and the sum are what the reference instrument gives, values on a bound included."""
    registry = CollectorRegistry()
    instrument = Instrument("shoal_x_seconds", "Times.", ["server"], buckets=BOUNDS, registry=registry).labels("a")
    for value in values:
        instrument.observe(value)
    expected = {
        (sample.name, tuple(sample.labels.items())): sample.value
        for metric in registry.collect()
        for sample in metric.samples
        if not sample.name.endswith("_created")
    }
    family = family_of(values)
    family.check()
    (parsed,) = parse_text(render([family], openmetrics=False).decode())
    assert parsed.type == "histogram"
    assert {(sample.name, tuple(sample.labels.items())): sample.value for sample in parsed.samples} == expected


def test_openmetrics_takes_it() -> None:
    """The stricter parser, which checks the order of the buckets and that the count is the last one's, is content."""
    text = render([family_of([0.1, 0.3, 9.0])], openmetrics=True).decode() + "# EOF\n"
    (parsed,) = parse_openmetrics(text)  # type: ignore[no-untyped-call]  # prometheus_client leaves it untyped
    assert {sample.name.removeprefix("shoal_x_seconds_") for sample in parsed.samples} == {"bucket", "count", "sum"}
    assert [sample.value for sample in parsed.samples if sample.labels.get("le") == "+Inf"] == [3]


@pytest.mark.parametrize(("kind", "labels"), [("histogram", ("server",)), ("histogram", ()), ("gauge", ("le",))])
def test_le_belongs_to_histograms(kind: str, labels: tuple[str, ...]) -> None:
    """A histogram without `le`, and anything else with it, is refused when its module is imported."""
    with pytest.raises(ValueError, match="le as their last label"):
        Metric("shoal_x_seconds", kind, "Times.", "tests", labels)  # type: ignore[arg-type]
