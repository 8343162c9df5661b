"""Metric descriptions that the formats would not take, families that cannot be rendered, sums that never fall."""

from __future__ import annotations

from typing import Any, cast

import pytest
from hypothesis import given
from hypothesis import strategies as st

from shoal.families import Family, KeptSums, Metric

GAUGE = Metric("shoal_length", "gauge", "A length.", "a test", ("netns", "pod"))

Rows = list[tuple[str, str, float]]


@pytest.mark.parametrize(
    ("name", "kind", "labels"),
    [
        ("shoal:length", "gauge", ()),
        ("shoal_länge", "gauge", ()),
        ("7shoal", "gauge", ()),
        ("shoal_length\n", "gauge", ()),
        ("", "gauge", ()),
        ("shoal_drops", "counter", ()),
        ("shoal_drops_total", "gauge", ()),
        ("shoal_length", "gauge", ("Pod",)),
        ("shoal_length", "gauge", ("__name__",)),
        ("shoal_length", "gauge", ("pod-name",)),
        ("shoal_length", "gauge", ("pod", "pod")),
    ],
)
def test_a_description_that_no_format_takes_is_refused(name: str, kind: Any, labels: tuple[str, ...]) -> None:
    """It fails when its module is imported, which is long before anyone scrapes."""
    with pytest.raises(ValueError, match=r"letters, digits and underscores|_total|twice"):
        Metric(name, kind, "Help.", "a test", labels)


def test_labels_must_match_the_metric() -> None:
    """A label value too few would shift the others."""
    family = GAUGE.family()
    family.add(("host", "api"), 1)
    with pytest.raises(ValueError, match=r"shoal_length has labels .*got \('host',\)"):
        family.add(("host",), 1)
    assert family.samples == [(("host", "api"), 1)]
    family.check()


@pytest.mark.parametrize(
    "sample",
    [
        ((), 1),
        (("host",), 1),
        (("host", "api", "more"), 1),
        (["host", "api"], 1),
        ("ab", 1),
        (("host", 7), 1),
        (("host", None), 1),
        (("host", b"api"), 1),
        (("host", "api"), "1"),
        (("host", "api"), None),
        (("host", "api"), True),
        (("host", "api"), 1j),
        (("host", "api"),),
        None,
    ],
)
def test_check_finds_what_cannot_be_rendered(sample: object) -> None:
    """Samples that did not go through `add` are looked at too, wherever among good ones they are."""
    good = (("host", "api"), 1.5)
    with pytest.raises((TypeError, ValueError)):
        Family(GAUGE, cast(Any, [good, sample, good])).check()


def test_a_sum_keeps_the_part_of_an_owner_that_is_gone() -> None:
    """Two listeners of one address; one closes. What it dropped stays counted, so nothing looks like a reset."""
    sums: KeptSums[str] = KeptSums()
    assert sums.update([("80", "a", 10), ("80", "b", 5)]) == {"80": 15}
    assert sums.update([("80", "b", 6)]) == {"80": 16}
    for _ in range(50):
        assert sums.update([("80", "b", 6)]) == {"80": 16}


def test_an_owner_that_begins_again_adds_to_its_past() -> None:
    """The identity was given to another: what the first had stays, the second's is added."""
    sums: KeptSums[str] = KeptSums()
    sums.update([("80", "a", 10)])
    assert sums.update([("80", "a", 3)]) == {"80": 13}


def test_an_owner_missed_by_a_scrape_is_not_counted_twice() -> None:
    """A namespace is read by one of its processes; when that ends just then, the next scrape has it again."""
    sums: KeptSums[str] = KeptSums()
    sums.update([("other", "a", 1000), ("other", "b", 1)])
    assert sums.update([("other", "b", 1)]) == {"other": 1001}
    assert sums.update([("other", "a", 1000), ("other", "b", 1)]) == {"other": 1001}


def test_a_group_missed_by_a_scrape_does_not_begin_anew() -> None:
    """Its sum has a past that its owner's value has not: a fall would be a reset, and the whole rest new events."""
    sums: KeptSums[str] = KeptSums()
    sums.update([("host", "a", 1000)])
    assert sums.update([("host", "b", 50)]) == {"host": 1050}
    assert sums.update([]) == {}
    assert sums.update([("host", "b", 50)]) == {"host": 1050}


def test_nothing_is_remembered_of_groups_that_are_gone() -> None:
    """Pods come and go for months; their sums do not stay in memory."""
    sums: KeptSums[str] = KeptSums()
    for number in range(1000):
        sums.update([(f"pod-{number}", number, 1)])
    assert len(sums._groups) < 20
    for number in range(1000):
        sums.update([("host", number, 1)])
    assert len(sums._groups["host"].owners) < 20
    assert sums.update([("host", "last", 1)]) == {"host": 1001}


@given(
    st.lists(
        st.lists(
            st.tuples(st.sampled_from("gh"), st.sampled_from("abc"), st.integers(0, 100)),
            unique_by=lambda row: row[:2],
        ),
        max_size=30,
    )
)
def test_a_sum_never_falls_and_never_misses_an_event(scrapes: list[Rows]) -> None:
    """Whatever owners do, a group's sum is at least that of its owners and at least what it was before."""
    sums: KeptSums[str] = KeptSums()
    before: dict[str, float] = {}
    for rows in scrapes:
        after = sums.update(rows)
        assert set(after) == {group for group, _, _ in rows}
        for group, total in after.items():
            assert total >= before.get(group, 0)
            assert total >= sum(value for of, _, value in rows if of == group)
        # A group that is not in a scrape may be forgotten, and then begins anew.
        before = {group: total for group, total in (before | after).items() if group in sums._groups}
