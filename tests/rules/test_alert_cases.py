"""Whether every alert has been tested in all the ways that the pack's conventions list.

What a case means cannot be checked by a program, but that it is there can: an instance that is silent one minute and
fires the next, one that resolves, a counter that resets, a scrape seen twice, an exporter that was renamed. All are
looked for in the tests that name the alert, and for the metrics that the alert comes down to.
"""

from __future__ import annotations

from itertools import combinations, pairwise
from typing import TYPE_CHECKING, Any, Final

import promql_parser
import pytest
from tests.rules.pack import (
    FOREIGN,
    IDENTITY,
    SIGNAL_TESTS,
    TARGET,
    Series,
    alerts,
    expressions,
    labels_of,
    load,
    parsed,
    raw_metrics,
    recorded,
    selectors,
    walk,
)

if TYPE_CHECKING:
    from collections.abc import Iterator

_EXPORTER: Final = IDENTITY | {"namespace", "pod", "container"}
"""What changes when the exporter gets a new pod."""
_MINUTE: Final = 60
_UNITS: Final = {"s": 1, "m": 60, "h": 3600, "d": 86400}


class Cases:
    """The tests that name an alert: what they put in and what they expect."""

    def __init__(self, name: str) -> None:
        """Collect them."""
        self.metrics = raw_metrics(expressions()[name])
        found = [
            test
            for file in SIGNAL_TESTS
            for test in load(file)["tests"]
            if any(case["alertname"] == name for case in test.get("alert_rule_test", []))
        ]
        self.inputs = [[Series.read(one) for one in test["input_series"]] for test in found]
        self.series = [one for series in self.inputs for one in series if one.name in self.metrics]
        self.expected: list[list[tuple[int, list[Any]]]] = [
            sorted(
                (
                    (_seconds(case["eval_time"]), case["exp_alerts"] or [])
                    for case in test["alert_rule_test"]
                    if case["alertname"] == name
                ),
                key=lambda case: case[0],
            )
            for test in found
        ]

    def instances(self) -> Iterator[tuple[int, set[str], int, set[str]]]:
        """Yield what fires at each two looks that follow each other: when, who, when, who."""
        for cases in self.expected:
            for (earlier, before), (later, after) in pairwise(cases):
                yield earlier, {_who(one) for one in before}, later, {_who(one) for one in after}

    def twins(self) -> Iterator[tuple[Series, Series]]:
        """Yield every two series of one metric about the same thing: of one exporter, or of it and its successor."""
        for series in self.inputs:
            alike: dict[tuple[Any, ...], list[Series]] = {}
            for one in series:
                if one.name in self.metrics:
                    alike.setdefault((one.name, *sorted(_own(one).items())), []).append(one)
            for group in alike.values():
                yield from combinations(group, 2)


def _own(series: Series) -> dict[str, str]:
    """Return the labels that do not come from how the series was scraped, but with cluster and node."""
    kept = {"cluster", "node"} | (labels_of(series.name) - _EXPORTER)
    if series.labels.get("netns", "pod") in ("pod", "container") and "unit" not in series.labels:
        kept |= labels_of(series.name)
    return {name: value for name, value in series.labels.items() if name in kept}


def _who(instance: dict[str, Any]) -> str:
    return str(sorted(instance["exp_labels"].items()))


def _seconds(time: str) -> int:
    """Return a duration such as 1h30m in seconds."""
    total, digits = 0, ""
    for letter in str(time):
        if letter.isdigit():
            digits += letter
        else:
            total, digits = total + int(digits) * _UNITS[letter], ""
    return total


def _counters(expression: str) -> Iterator[str]:
    """Yield the metrics whose growth is looked at, in an expression and in all that it reads."""
    for part in walk(parsed(expression)):
        if isinstance(part, promql_parser.Call) and part.func.name in ("rate", "increase", "changes"):
            found = (one for one in walk(part) if isinstance(one, promql_parser.VectorSelector))
            yield from (str(one.name) for one in found if str(one.name).endswith("_total"))
    for selector in selectors(expression):
        own = recorded().get(str(selector.name))
        if own and str(selector.name) not in own:
            yield from _counters(own)


def _divisors(expression: str) -> Iterator[str]:
    """Yield the metrics that something is divided by, in an expression and in all that it reads."""
    for part in walk(parsed(expression)):
        if isinstance(part, promql_parser.BinaryExpr) and str(part.op) == "/":
            for found in walk(part.rhs):
                if isinstance(found, promql_parser.VectorSelector):
                    yield from raw_metrics(str(found.name))
    for selector in selectors(expression):
        own = recorded().get(str(selector.name))
        if own and str(selector.name) not in own:
            yield from _divisors(own)


@pytest.fixture(params=sorted(alerts()))
def name(request: pytest.FixtureRequest) -> str:
    """One alert after the other."""
    return str(request.param)


@pytest.fixture
def tests(name: str) -> Cases:
    """What tests that alert."""
    return Cases(name)


def test_has_a_healthy_node_beside_the_sick_one(tests: Cases) -> None:
    """Where it fires, a node called healthy is there and does not."""
    healthy = [
        any(one.labels.get("node", "").startswith("healthy") for one in series)
        for series, cases in zip(tests.inputs, tests.expected, strict=True)
        if any(expected for _, expected in cases)
    ]
    assert any(healthy)
    assert not any("healthy" in who for *_, after in tests.instances() for who in after)


def test_fires_with_all_that_it_says(name: str, tests: Cases) -> None:
    """Some instance is expected with its labels and every annotation."""
    said = [one for cases in tests.expected for _, expected in cases for one in expected if "exp_annotations" in one]
    assert any(one["exp_annotations"].keys() == alerts()[name]["annotations"].keys() for one in said)


def test_is_silent_just_before(tests: Cases) -> None:
    """Some instance is not there at one look and is there a minute later, so `for` is as long as it says."""
    assert any(after - before and later - earlier <= _MINUTE for earlier, before, later, after in tests.instances())


def test_resolves(tests: Cases) -> None:
    """Some instance that was there is gone at a later look."""
    assert any(before - after for _, before, _, after in tests.instances())


def test_meets_a_reset(name: str, tests: Cases) -> None:
    """A counter whose growth it looks at starts again from less, if there is one."""
    if counters := set(_counters(expressions()[name])):
        assert any(
            before is not None and after is not None and after < before
            for one in tests.series
            if one.name in counters
            for before, after in pairwise(one.samples)
        )


def test_meets_what_is_absent(tests: Cases) -> None:
    """Some node lacks a metric that another has, or a series ends."""
    metrics: dict[tuple[str, str], set[str]] = {}
    for one in tests.series:
        metrics.setdefault((one.labels.get("cluster", ""), one.labels.get("node", "")), set()).add(one.name)
    assert any(found < other for found in metrics.values() for other in metrics.values()) or any(
        None in one.samples for one in tests.series
    )


def test_meets_a_divisor_of_nothing(name: str, tests: Cases) -> None:
    """What it divides by is 0 somewhere, or a counter that stands still, if it divides."""
    if divisors := {metric for metric in _divisors(expressions()[name]) if metric in tests.metrics}:
        assert any(
            0 in one.samples or (one.name.endswith("_total") and len(set(one.samples)) == 1)
            for one in tests.series
            if one.name in divisors
        )


def test_meets_a_label_more(tests: Cases) -> None:
    """Something is there twice at the same time, once with one label more."""
    assert any(
        one.labels.keys() ^ other.labels.keys() <= TARGET
        and one.labels.keys() != other.labels.keys()
        and any(left is not None and right is not None for left, right in zip(one.samples, other.samples, strict=False))
        for one, other in tests.twins()
    )


def test_survives_a_new_exporter(tests: Cases) -> None:
    """An exporter is replaced by one with another name: one series ends, and one that is the same to us begins."""
    if not tests.metrics - FOREIGN.keys():
        return
    assert any(
        {label for label in _EXPORTER if one.labels.get(label) != other.labels.get(label)}
        and (one.samples[-1] is None or len(one.samples) < len(other.samples))
        and other.samples[0] is None
        for pair in tests.twins()
        for one, other in (pair, pair[::-1])
    )


def test_keeps_clusters_apart(tests: Cases) -> None:
    """A node of the same name is in two clusters."""
    for series in tests.inputs:
        places = {(one.labels.get("node"), one.labels.get("cluster")) for one in series if one.labels.get("node")}
        if len({node for node, _ in places}) < len(places):
            return
    pytest.fail("no test has a node of the same name in two clusters")
