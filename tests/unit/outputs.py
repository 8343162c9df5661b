"""What a collector gave, in the shape in which tests compare it."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence

    from shoal.collectors import Collector
    from shoal.families import Family

Samples = dict[str, dict[tuple[str, ...], float]]


def samples(families: Iterable[Family]) -> Samples:
    """Return {metric: {labels: value}} of metrics that have samples; two samples with the same labels are an error."""
    found: Samples = {}
    for family in families:
        family.check()
        for labels, value in family.samples:
            assert labels not in found.setdefault(family.metric.name, {}), f"{family.metric.name}{labels} twice"
            found[family.metric.name][labels] = value
    return found


def brief(families: Sequence[Family]) -> Samples:
    """Return the same, with what has no sample and without empty labels."""
    found: Samples = {family.metric.name: {} for family in families}
    for name, rows in samples(families).items():
        found[name] = {tuple(filter(None, labels)): value for labels, value in rows.items()}
    return found


def absent(collector: Collector) -> dict[str, str]:
    """Return {signal: reason} of the signals that are absent."""
    return {signal: why[0].value for signal, why in collector.availability.absent.items() if why}
