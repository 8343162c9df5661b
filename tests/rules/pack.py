"""The rule pack as the tests look at it: its files, its rules, what they select, and what their tests put in.

What is returned is read once and shared: nobody changes it.
"""

from __future__ import annotations

import re
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final, NamedTuple

import promql_parser
import yaml

from shoal.server import catalogue

if TYPE_CHECKING:
    from collections.abc import Iterator

__all__ = [
    "FILES",
    "FOREIGN",
    "HOUR",
    "IDENTITY",
    "RULES",
    "SIGNAL_TESTS",
    "TARGET",
    "TESTS",
    "Sample",
    "Series",
    "alerts",
    "expand",
    "exported",
    "expressions",
    "labels_of",
    "load",
    "parsed",
    "raw_metrics",
    "recorded",
    "rules",
    "selectors",
    "walk",
]

RULES: Final = Path(__file__).parents[2] / "rules"
FILES: Final = sorted(RULES.glob("*.yaml"))
TESTS: Final = sorted((RULES / "tests").glob("*_test.yaml"))
HOUR: Final = RULES / "tests" / "healthy_hour_test.yaml"
SIGNAL_TESTS: Final = [file for file in TESTS if file != HOUR]

# What others export and the pack takes as proof that a node is there, with the labels that it looks at.
FOREIGN: Final[dict[str, set[str]]] = {
    "up": set(),
    "node_uname_info": {"nodename", "sysname"},
    "kubelet_node_name": set(),
    "kube_node_info": {"os_image"},
    "kube_node_status_condition": {"condition", "status"},
    # Prometheus' own series of what fires.
    "ALERTS": {"alertname", "alertstate", "severity", "signal"},
}
# What tells one exporter from the next on the same node. No rule may depend on it.
IDENTITY: Final = {"job", "instance", "service", "endpoint", "prometheus"}
# What a scrape adds to every series; `exported_` is what becomes of a label where honor_labels is off.
TARGET: Final = {
    *IDENTITY,
    *("cluster", "node", "namespace", "pod", "container", "zone"),
    *("exported_namespace", "exported_pod", "exported_container"),
}

Sample = float | None
"""A value, or None where a scrape has none."""

_SERIES = re.compile(r"(?P<name>[a-zA-Z_:][a-zA-Z0-9_:]*)\{(?P<labels>.*)\}\Z")
_LABEL = re.compile(r'([a-z_]+)="((?:[^"\\]|\\.)*)"')
_NUMBER = r"(?:[0-9]+(?:\.[0-9]+)?(?:[eE][+-]?[0-9]+)?|Inf|NaN)"
_WORD = re.compile(rf"(?P<first>-?{_NUMBER})(?P<step>[+-]{_NUMBER})?(?:x(?P<count>[0-9]+))?\Z")
_GAP = re.compile(r"(?:_|stale)(?:x([0-9]+))?\Z")


class Series(NamedTuple):
    """One series that a test of promtool puts in."""

    name: str
    labels: dict[str, str]
    samples: list[Sample]

    @classmethod
    def read(cls, content: dict[str, Any]) -> Series:
        """Take an element of `input_series`. Raises `ValueError` for what promtool would not understand either."""
        match = _SERIES.match(content["series"])
        if not match:
            raise ValueError(f"{content['series']} is no series")
        return cls(match["name"], dict(_LABEL.findall(match["labels"])), expand(str(content["values"])))


def expand(values: str) -> list[Sample]:
    """Return the samples that promtool makes of its notation, such as `1x3 2+5x2 _x4 stale`."""
    samples: list[Sample] = []
    for word in values.split():
        if gap := _GAP.match(word):
            samples += [None] * int(gap[1] or 1)
            continue
        match = _WORD.match(word)
        if not match:
            raise ValueError(f"{word} is no sample")
        first, step = float(match["first"]), float(match["step"] or 0)
        samples += [first + step * place for place in range(int(match["count"] or 0) + 1)]
    return samples


@cache
def load(file: Path) -> dict[str, Any]:
    """Return the content of a YAML file, all scalars as the text that they are: to YAML 0x60 would be a number."""
    content: dict[str, Any] = yaml.load(file.read_text(encoding="utf-8"), _Loader)  # noqa: S506  (a safe loader)
    return content


# The same loader in C, many times as fast, where PyYAML has been built with it.
_Loader: Final = getattr(yaml, "CBaseLoader", yaml.BaseLoader)


def rules(file: Path) -> Iterator[dict[str, Any]]:
    """Yield the rules of one file, recording and alerting."""
    for group in load(file)["groups"]:
        yield from group["rules"]


@cache
def alerts() -> dict[str, dict[str, Any]]:
    """Return every alert of the pack by name."""
    return {rule["alert"]: rule for file in FILES for rule in rules(file) if "alert" in rule}


@cache
def recorded() -> dict[str, str]:
    """Return the expression of every recorded series by name."""
    return {rule["record"]: rule["expr"] for file in FILES for rule in rules(file) if "record" in rule}


def expressions() -> dict[str, str]:
    """Return the expression of every rule, by the name of what it records or alerts on."""
    return {rule.get("record") or rule["alert"]: rule["expr"] for file in FILES for rule in rules(file)}


@cache
def parsed(expression: str) -> Any:
    """Return the tree of an expression."""
    return promql_parser.parse(expression)


@cache
def exported() -> dict[str, set[str]]:
    """Return the label names of every series that the exporter can export, by name; a histogram has three."""
    series: dict[str, set[str]] = {}
    for metric in catalogue().values():
        labels = set(metric.labels)
        if metric.type == "histogram":
            without = labels - {"le"}
            series |= {f"{metric.name}_bucket": labels, f"{metric.name}_count": without, f"{metric.name}_sum": without}
        else:
            series[metric.name] = labels
    return series


def walk(expression: Any) -> Iterator[Any]:
    """Yield a parsed expression and everything inside it, but for the ranges around a selector."""
    yield expression
    match expression:
        case promql_parser.MatrixSelector():
            yield expression.vector_selector
        case promql_parser.BinaryExpr():
            yield from walk(expression.lhs)
            yield from walk(expression.rhs)
        case promql_parser.Call():
            for argument in expression.args:
                yield from walk(argument)
        case promql_parser.VectorSelector() | promql_parser.NumberLiteral() | promql_parser.StringLiteral():
            return
        case _:
            # Aggregations, subqueries, parentheses and signs have one expression inside.
            yield from walk(expression.expr)


def selectors(expression: str) -> Iterator[promql_parser.VectorSelector]:
    """Yield the series selectors of an expression."""
    return (found for found in walk(parsed(expression)) if isinstance(found, promql_parser.VectorSelector))


@cache
def labels_of(name: str) -> set[str]:
    """Return the label names that a series can have of its own; those of all it is made of, for a recorded one."""
    own = recorded()
    if name in own:
        return {label for made_of in selectors(own[name]) if made_of.name != name for label in labels_of(made_of.name)}
    return (exported() | FOREIGN).get(name, set())


@cache
def raw_metrics(expression: str) -> set[str]:
    """Return the metrics that an expression comes down to, through whatever is recorded on the way."""
    found: set[str] = set()
    for selector in selectors(expression):
        name = str(selector.name)
        own = recorded().get(name)
        found |= raw_metrics(own) if own and name not in own else {name}
    return found
