"""Families to bytes, in the Prometheus text format 0.0.4 or in OpenMetrics 1.0.

Written by hand because a node with many pods has ten thousand samples, and their labels are the same at every
scrape: the escaped label part of a line is cached, and what is left is one string per sample.
"""

from __future__ import annotations

import gc
import math
from functools import lru_cache
from itertools import count
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator

    from shoal.families import Family

__all__ = ["render"]

# About twice the samples of the largest node that the benchmarks build; a fragment is about 100 bytes.
_FRAGMENTS = 32_768
# After so many answers all fragments are let go: those of pods that are gone would fill the cache, which then has
# 16 MiB. All garbage is collected too, which `cli` leaves to this: what is in circles is little, and must not grow.
_KEPT_FOR = 32
_times = count(1)


def render(families: Iterable[Family], *, openmetrics: bool) -> bytes:
    """Return the lines of all families that have samples, without OpenMetrics' closing `# EOF`.

    Bytes of a label value that are no UTF-8, as a cgroup's name may have, are written as Python escapes them, so that
    two such names stay apart.
    """
    if not next(_times) % _KEPT_FOR:
        _fragment.cache_clear()
        gc.collect()
    lines: list[str] = []
    for family in families:
        if not family.samples:
            continue
        metric = family.metric
        described = metric.name
        text = metric.help.replace("\\", r"\\").replace("\n", r"\n")
        if openmetrics:
            # OpenMetrics names a counter without the suffix that its samples have, and escapes quotes here too.
            described = described.removesuffix("_total") if metric.type == "counter" else described
            text = text.replace('"', r"\"")
        lines.append(f"# HELP {described} {text}\n# TYPE {described} {metric.type}\n")
        name, names = metric.name, metric.labels
        if metric.type == "histogram":
            lines += _histogram_lines(family)
            continue
        lines += [f"{name}{_fragment(names, labels)} {_number(value)}\n" for labels, value in family.samples]
    return "".join(lines).encode()


def _histogram_lines(family: Family) -> Iterator[str]:
    """Yield the buckets, which have `le`, the count, which is the last bucket's, and the sum, whose `le` is empty."""
    name, names = family.metric.name, family.metric.labels
    for labels, value in family.samples:
        number = _number(value)
        if not labels[-1]:
            yield f"{name}_sum{_fragment(names[:-1], labels[:-1])} {number}\n"
            continue
        yield f"{name}_bucket{_fragment(names, labels)} {number}\n"
        if labels[-1] == "+Inf":
            yield f"{name}_count{_fragment(names[:-1], labels[:-1])} {number}\n"


@lru_cache(maxsize=_FRAGMENTS)
def _fragment(names: tuple[str, ...], values: tuple[str, ...]) -> str:
    """Return `{name="value",...}` without the labels that are empty, or nothing at all."""
    pairs = [f'{name}="{_escape(value)}"' for name, value in zip(names, values, strict=True) if value]
    return "{" + ",".join(pairs) + "}" if pairs else ""


def _escape(value: str) -> str:
    return (
        value.encode("utf-8", "backslashreplace").decode().replace("\\", r"\\").replace("\n", r"\n").replace('"', r"\"")
    )


def _number(value: float) -> str:
    if isinstance(value, int) or math.isfinite(value):
        return repr(value)
    return "NaN" if math.isnan(value) else ("+Inf" if value > 0 else "-Inf")
