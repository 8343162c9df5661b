"""`shoal-exporter check` and the rules: what one compares the other compares, with the same number."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import promql_parser
import pytest
import yaml

from shoal.check.alerts import ALERTS

if TYPE_CHECKING:
    from collections.abc import Iterator

EVERY = [
    rule
    for file in (Path(__file__).parents[2] / "rules").glob("*.yaml")
    for group in yaml.safe_load(file.read_text(encoding="utf-8"))["groups"]
    for rule in group["rules"]
]
RULES = {rule["alert"]: rule for rule in EVERY if "alert" in rule}
RECORDED = {rule["record"]: rule["expr"] for rule in EVERY if "record" in rule}


def comparisons(expression: Any) -> Iterator[tuple[str, float]]:
    """Yield (series, number) for each comparison of a series, or of a function of one, with a number."""
    match expression:
        case promql_parser.BinaryExpr():
            names = list(series(expression.lhs))
            if isinstance(expression.rhs, promql_parser.NumberLiteral) and len(names) == 1:
                yield names[0], expression.rhs.val
            yield from comparisons(expression.lhs)
            yield from comparisons(expression.rhs)
        case promql_parser.Call():
            for argument in expression.args:
                yield from comparisons(argument)
        case promql_parser.ParenExpr() | promql_parser.AggregateExpr() | promql_parser.SubqueryExpr():
            yield from comparisons(expression.expr)


def series(expression: Any) -> Iterator[str]:
    """Yield the names of the series in an expression."""
    match expression:
        case promql_parser.BinaryExpr():
            yield from series(expression.lhs)
            yield from series(expression.rhs)
        case promql_parser.VectorSelector():
            yield expression.name or ""
        case promql_parser.MatrixSelector():
            yield expression.vector_selector.name or ""
        case promql_parser.Call():
            for argument in expression.args:
                yield from series(argument)
        case promql_parser.ParenExpr() | promql_parser.AggregateExpr() | promql_parser.SubqueryExpr():
            yield from series(expression.expr)


@pytest.mark.parametrize("alert", sorted(ALERTS))
def test_thresholds_are_those_of_the_rule(alert: str) -> None:
    """The severity too, so that a rule that changes makes `check` change."""
    rule = RULES[alert]
    assert ALERTS[alert].status.name.lower() == rule["labels"]["severity"]
    expression = promql_parser.parse(rule["expr"])
    compared = set(comparisons(expression))
    # What the alert compares may be compared already where it is recorded.
    for name in set(series(expression)) & RECORDED.keys():
        compared |= set(comparisons(promql_parser.parse(RECORDED[name])))
    assert set(ALERTS[alert].thresholds.items()) <= compared


def test_every_alert_that_hurts_is_checked() -> None:
    """A critical alert that a later rule adds is one that `check` has to know."""
    critical = {name for name, rule in RULES.items() if rule["labels"]["severity"] == "critical"}
    # Repeated kills are kills; seconds cannot tell whether they go on for half an hour.
    assert critical - ALERTS.keys() == {"ShoalOOMKillRepeated"}
