"""What is asked for again and again is made once, and what is not asked for any more is let go."""

from __future__ import annotations

from shoal.recent import Recent


def test_what_is_in_use_is_made_once_and_what_is_gone_is_forgotten() -> None:
    """A hundred that stay, and one more each round that is never asked for again."""
    made: list[int] = []

    def make(key: int) -> str:
        made.append(key)
        return str(key)

    recent = Recent(make)
    most = 0
    for number in range(100, 5000):
        for key in (*range(100), number):
            assert recent.get(key) == str(key)
        recent.forget(101)
        most = max(most, len(recent))
    assert len(made) == len(set(made)) == 5000
    assert most <= 400


def test_a_small_round_between_large_ones_costs_nothing() -> None:
    """Somebody asks for few things between two who ask for everything."""
    made: list[int] = []

    def make(key: int) -> int:
        made.append(key)
        return key

    recent = Recent(make)
    for _ in range(50):
        for key in range(100):
            recent.get(key)
        recent.forget(100)
        recent.get(5)
        recent.forget(1)
    assert len(made) == 100


def test_a_result_that_is_false_is_remembered_too() -> None:
    """The labels of a sample that has none are no text."""
    made: list[int] = []

    def make(key: int) -> str:
        made.append(key)
        return ""

    recent = Recent(make)
    assert [recent.get(1), recent.get(1)] == ["", ""]
    assert made == [1]
