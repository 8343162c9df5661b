"""What a collector returns: a metric's fixed description and the samples of one scrape.

Nothing here knows the kernel or the wire format, so collectors and the exposition can be read apart.
"""

from __future__ import annotations

import re
from bisect import bisect_left
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Generic, Literal, TypeVar

if TYPE_CHECKING:
    from collections.abc import Hashable, Iterable, Sequence

__all__ = ["Family", "Histogram", "KeptSums", "Metric"]

_Group = TypeVar("_Group", bound="Hashable")

_NAME = re.compile(r"[a-z][a-z0-9_]*\Z")


@dataclass(frozen=True, slots=True)
class Metric:
    """The description of one metric, written once beside the collector that exports it.

    `name` is the name as PromQL knows it: base units, counters end in `_total`, no colons.
    `help` is one sentence with the kernel's own word for the number; `source` is the kernel file or
    netlink field it is read from. `labels` are the label names; one that is empty on a sample is left out.
    The last label of a histogram is `le`, and it has its samples from `Family.add_histogram` alone.
    `tier` is the least privilege that gives it: 1 none, 2 CAP_NET_ADMIN and CAP_SYS_PTRACE, 3 CAP_SYS_ADMIN.
    """

    name: str
    type: Literal["counter", "gauge", "histogram"]
    help: str
    source: str
    labels: tuple[str, ...] = ()
    tier: Literal[1, 2, 3] = 1

    def __post_init__(self) -> None:
        """Reject names that PromQL or OpenMetrics would not take, when the module is imported."""
        for name in (self.name, *self.labels):
            if not _NAME.match(name):
                raise ValueError(f"{name!r} is no name of lower-case letters, digits and underscores")
        if len(set(self.labels)) != len(self.labels):
            raise ValueError(f"{self.name} has a label name twice: {self.labels}")
        if (self.type == "counter") != self.name.endswith("_total"):
            raise ValueError(f"{self.name}: counters, and only counters, end in _total")
        if (self.type == "histogram") != (self.labels[-1:] == ("le",)):
            raise ValueError(f"{self.name}: histograms, and only histograms, have le as their last label")

    def family(self) -> Family:
        """Return an empty family of this metric, to be filled during one scrape."""
        return Family(self)


@dataclass(frozen=True, slots=True)
class Family:
    """The samples of one metric in one scrape: (label values in the metric's order, value) pairs."""

    metric: Metric
    samples: list[tuple[tuple[str, ...], float]] = field(default_factory=list)

    def add(self, labels: Sequence[str], value: float) -> None:
        """Append one sample. Raises `ValueError` when the labels do not match the metric's label names."""
        if len(labels) != len(self.metric.labels):
            raise ValueError(f"{self.metric.name} has labels {self.metric.labels}, got {tuple(labels)}")
        self.samples.append((tuple(labels), value))

    def add_histogram(self, labels: Sequence[str], histogram: Histogram) -> None:
        """Append the samples of one histogram; `labels` are without `le`. The sum is the sample whose `le` is empty."""
        count = 0
        for bound, counted in zip((*map(repr, histogram.bounds), "+Inf"), histogram.counts, strict=True):
            count += counted
            self.add((*labels, bound), count)
        self.add((*labels, ""), histogram.sum)

    def check(self) -> None:
        """Raise `TypeError` or `ValueError` when a sample is not label values and a number, as the formats need them.

        Costs a tenth of a microsecond for each label: all samples are looked at together, not one by one.
        """
        if {(type(labels), len(labels)) for labels, _ in self.samples} - {(tuple, len(self.metric.labels))}:
            raise ValueError(f"{self.metric.name} has a sample whose labels are not {self.metric.labels}")
        if not all(issubclass(kind, str) for kind in {type(label) for labels, _ in self.samples for label in labels}):
            raise TypeError(f"{self.metric.name} has a label value that is no text")
        if {type(value) for _, value in self.samples} - {int, float}:
            raise TypeError(f"{self.metric.name} has a value that is no number")


class Histogram:
    """Counts what is observed between scrapes, by size: `counts[i]` of at most `bounds[i]`, the last of any more."""

    def __init__(self, bounds: tuple[float, ...]) -> None:
        """Start with nothing observed. The bounds are rising."""
        self.bounds = bounds
        self.counts = [0] * (len(bounds) + 1)
        self.sum = 0.0

    def observe(self, value: float) -> None:
        """Count one value."""
        self.counts[bisect_left(self.bounds, value)] += 1
        self.sum += value


class KeptSums(Generic[_Group]):
    """Counters summed over owners that come and go, without the sum ever falling.

    Listeners that share an address and namespaces that share a label are one series each. When one owner
    closes, its part would drop out of the sum, and Prometheus would take the fall for a reset and count
    the whole rest as new events. So the last value of an owner that is gone stays in its group's sum.

    An owner may also be missed by a scrape, when the process that it is read by has just ended. So it is
    remembered for some scrapes, and is not counted twice when it is back. A group is forgotten with its last
    owner.
    """

    def __init__(self) -> None:
        """Start with no groups."""
        self._groups: dict[_Group, _Sum] = {}
        self._updates = 0

    def update(self, rows: Iterable[tuple[_Group, Hashable, float]]) -> dict[_Group, float]:
        """Take the (group, owner, value) rows of one scrape and return the sum of each group that is in it.

        Rows of the same owner add up. An owner whose own value fell was replaced by another of the same identity:
        its old value is kept too.
        """
        self._updates += 1
        seen: dict[_Group, dict[Hashable, float]] = {}
        for group, owner, value in rows:
            owners = seen.setdefault(group, {})
            owners[owner] = owners.get(owner, 0) + value
        for group, owners in seen.items():
            self._groups.setdefault(group, _Sum()).update(owners, self._updates)
        for group in [group for group, kept in self._groups.items() if not kept.remembers(self._updates - _REMEMBERED)]:
            del self._groups[group]
        return {group: self._groups[group].total() for group in seen}


_REMEMBERED = 10
"""Updates after which an owner that was not seen is gone for good."""


@dataclass(slots=True)
class _Sum:
    """One group: the last value of each owner with the update that saw it, and the sum of those that are gone."""

    gone: float = 0
    owners: dict[Hashable, tuple[float, int]] = field(default_factory=dict)

    def update(self, values: dict[Hashable, float], now: int) -> None:
        for owner, value in values.items():
            last, _ = self.owners.get(owner, (0, 0))
            if value < last:
                self.gone += last
            self.owners[owner] = (value, now)

    def remembers(self, oldest: int) -> bool:
        """Let owners go that were last seen before the update `oldest`, and tell whether any is left."""
        for owner, (last, seen) in list(self.owners.items()):
            if seen < oldest:
                self.gone += last
                del self.owners[owner]
        return bool(self.owners)

    def total(self) -> float:
        return self.gone + sum(value for value, _ in self.owners.values())
