"""Two scrapes of one node, and what happened between them, as small vectors: {labels: value}."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Mapping

__all__ = ["FIVE_MINUTES", "Labels", "NotMetricsError", "Pair", "Snapshot", "Vector", "parse"]

FIVE_MINUTES = 300.0
"""Seconds of the window that the alert rules look at."""


class Labels:
    """The labels of one series, usable as a key. `labels[name]` is "" where the series has no such label."""

    __slots__ = ("_pairs",)

    def __init__(self, labels: Mapping[str, str]) -> None:
        """Leave out what is empty, as the exporter does."""
        self._pairs = tuple(sorted((name, value) for name, value in labels.items() if value))

    def __getitem__(self, wanted: str) -> str:
        """Return the value of one label."""
        return next((value for name, value in self._pairs if name == wanted), "")

    def __hash__(self) -> int:
        return hash(self._pairs)

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Labels) and self._pairs == other._pairs

    def as_dict(self) -> dict[str, str]:
        """Return them as the format wrote them."""
        return dict(self._pairs)

    def only(self, *names: str) -> Labels:
        """Return these labels alone."""
        return Labels({name: value for name, value in self._pairs if name in names})

    def without(self, *names: str) -> Labels:
        """Return the others."""
        return Labels({name: value for name, value in self._pairs if name not in names})


Vector = dict[Labels, float]
"""The series of one metric, as an instant query returns them."""


@dataclass(frozen=True, slots=True)
class Snapshot:
    """One scrape. `samples` has every series by the name that PromQL knows.

    `taken` is when it began, in seconds of a steady clock: what is quick was read then, however long the rest took.
    """

    taken: float
    samples: dict[str, Vector] = field(default_factory=dict)


_LATE = "collector_failed"


class NotMetricsError(ValueError):
    """What answered is no text format. `str()` is a sentence."""


def parse(text: str, taken: float) -> Snapshot:
    """Parse Prometheus' text format. Raises `NotMetricsError` for anything else."""
    from prometheus_client.parser import text_string_to_metric_families  # noqa: PLC0415  (`check` alone needs it)

    snapshot = Snapshot(taken)
    try:
        for family in text_string_to_metric_families(text):
            for sample in family.samples:
                snapshot.samples.setdefault(sample.name, {})[Labels(sample.labels)] = float(sample.value)
    except (ValueError, KeyError, IndexError, TypeError) as error:
        raise NotMetricsError("the answer is not Prometheus' text format") from error
    return snapshot


@dataclass(frozen=True, slots=True)
class Pair:
    """What two scrapes of one node say together."""

    before: Snapshot
    after: Snapshot

    @property
    def seconds(self) -> float:
        """How long it was from one scrape to the other."""
        return max(self.after.taken - self.before.taken, 0.001)

    def last(self, name: str, **match: str) -> Vector:
        """Return the later values of the series with these labels."""
        return _matching(self.after.samples.get(name, {}), match)

    def lower(self, name: str, **match: str) -> Vector:
        """Return the smaller of both values: what was so at each look, of a gauge that comes and goes."""
        first = _matching(self.before.samples.get(name, {}), match)
        return {
            labels: min(value, first[labels]) for labels, value in self.last(name, **match).items() if labels in first
        }

    def increase(self, name: str, **match: str) -> Vector:
        """Return how much the counters rose; one that fell began again, one that is new began at 0.

        A counter that the first scrape did not have, while it had others of the name, belongs to something that
        began in between.
        """
        first = _matching(self.before.samples.get(name, {}), match)
        if not first:
            return {}
        return {
            labels: value - first.get(labels, 0.0) if value >= first.get(labels, 0.0) else value
            for labels, value in self.last(name, **match).items()
        }

    def increase5m(self, name: str, **match: str) -> Vector:
        """Return what the increase comes to in five minutes, if it goes on, which is what the rules compare."""
        return {labels: value * FIVE_MINUTES / self.seconds for labels, value in self.increase(name, **match).items()}

    def rate(self, name: str, **match: str) -> Vector:
        """Return the increase per second."""
        return {labels: value / self.seconds for labels, value in self.increase(name, **match).items()}

    def signals(self) -> dict[str, str]:
        """Return {signal: why it is absent, "" if it is there}; what was late once has nothing to be compared with."""
        late = {
            labels["signal"]: _LATE
            for labels in self.before.samples.get("shoal_signal_available", {})
            if labels["reason"] == _LATE
        }
        return {labels["signal"]: labels["reason"] for labels in self.last("shoal_signal_available")} | late

    @property
    def version(self) -> str:
        """The exporter's version."""
        return next((labels["version"] for labels in self.last("shoal_build_info")), "")


def _matching(vector: Vector, match: Mapping[str, str]) -> Vector:
    if not match:
        return vector
    return {
        labels: value for labels, value in vector.items() if all(labels[name] == want for name, want in match.items())
    }
