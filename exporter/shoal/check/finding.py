"""What is found wrong, and the arithmetic and words that all fourteen failures share."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from shoal.check.alerts import ALERTS, Status

if TYPE_CHECKING:
    from shoal.check.snapshot import Labels, Pair, Vector

__all__ = ["OWNER", "Finding", "percent", "ratio", "short", "size", "summed", "within", "without"]

OWNER = ("namespace", "pod", "container", "unit")
"""The labels of a workload."""


@dataclass(frozen=True, slots=True)
class Finding:
    """One thing that is wrong: which alert it would raise, whom it hits, and the numbers that prove it."""

    alert: str
    culprit: Labels
    evidence: str

    @property
    def status(self) -> Status:
        """The severity of the alert."""
        return ALERTS[self.alert].status


# Above it a digit after the point says nothing.
_ROUND = 0.1
# From one unit of memory to the next.
_UNIT = 1024


def ratio(above: Vector, below: Vector) -> Vector:
    """Divide series with the same labels; those without a denominator are left out."""
    return {labels: value / below[labels] for labels, value in above.items() if below.get(labels)}


def summed(vector: Vector, *names: str) -> Vector:
    """Add up series over all labels but these."""
    sums: Vector = {}
    for labels, value in vector.items():
        kept = labels.only(*names)
        sums[kept] = sums.get(kept, 0.0) + value
    return sums


def without(vector: Vector, *names: str) -> Vector:
    """Drop labels that every series has one value of."""
    return {labels.without(*names): value for labels, value in vector.items()}


def percent(ratio: float) -> str:
    """Write a ratio for a person."""
    return f"{ratio:.0%}" if ratio >= _ROUND or not ratio else f"{ratio:.1%}"


def size(amount: float) -> str:
    """Write an amount of bytes for a person."""
    for unit in ("B", "KiB", "MiB", "GiB"):
        if amount < _UNIT:
            return f"{amount:.0f} {unit}"
        amount /= _UNIT
    return f"{amount:.1f} TiB"


def within(pair: Pair) -> str:
    """Write the time between the scrapes."""
    return f"in {pair.seconds:.0f} s"


def short(labels: Labels) -> str:
    """Name a workload in few words."""
    pod = "/".join(filter(None, (labels["namespace"], labels["pod"])))
    return " ".join(filter(None, (pod, labels["container"], labels["unit"]))) or "the node"
