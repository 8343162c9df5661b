"""Bad input for every parser: a value or the error that it documents, and never a value that is wrong.

A hundred inputs a parser in CI; `make fuzz` tries ten thousand.
"""

from __future__ import annotations

import gc
import importlib
import inspect
import math
import pkgutil
import random
import tracemalloc
from dataclasses import fields, is_dataclass
from typing import TYPE_CHECKING

import pytest
from hypothesis import given
from hypothesis import strategies as st
from tests.unit.fuzz.mutations import MUTATIONS, Shape, damaged
from tests.unit.fuzz.parsers import PARSERS, Parser

import shoal.kernel
import shoal.kubernetes
import shoal.redis

if TYPE_CHECKING:
    from collections.abc import Iterable
    from types import ModuleType

# No number of a kernel has more digits, and one of more than 4,300 cannot even be written.
LARGEST = 10**20
EMPTY: tuple[object, ...] = ([], (), set(), frozenset(), {}, "", b"")
each = pytest.mark.parametrize("parser", PARSERS.values(), ids=[name.removeprefix("shoal.") for name in PARSERS])


def modules(*packages: ModuleType) -> Iterable[ModuleType]:
    """Import everything below these packages."""
    for package in packages:
        for found in pkgutil.walk_packages(package.__path__, f"{package.__name__}."):
            yield importlib.import_module(found.name)


def test_every_parser_is_tried() -> None:
    """Whatever is called a parser, or takes bytes from elsewhere, is in the table, and what is in it exists."""
    there = {
        f"{module.__name__}.{name}"
        for module in modules(shoal.kernel, shoal.kubernetes, shoal.redis)
        for name, function in inspect.getmembers(module, inspect.isfunction)
        if function.__module__ == module.__name__ and not name.startswith("_")
        if name.startswith("parse_")
        or next(iter(function.__annotations__.values()), "") in ("bytes", "Iterable[bytes]")
    }
    assert there <= PARSERS.keys()
    for name in PARSERS:
        module, _, member = name.rpartition(".")
        assert hasattr(importlib.import_module(module), member), name


def numbers(value: object) -> Iterable[float]:
    """Yield the numbers in what a parser has returned, keys of dictionaries included."""
    pending = [value]
    while pending:
        one = pending.pop()
        if isinstance(one, int | float):
            yield one
        elif isinstance(one, dict):
            pending += [*one.keys(), *one.values()]
        elif isinstance(one, list | tuple | set | frozenset):
            pending += one
        elif is_dataclass(one):
            pending += [getattr(one, field.name) for field in fields(one)]


def outcome(parser: Parser, data: bytes) -> object:
    """Return what the parser returns; an error that it documents is told from that by its type."""
    try:
        return parser.parse(data)
    except parser.errors as error:
        return error


@each
def test_damaged_input(parser: Parser) -> None:
    """Nothing but the documented errors comes out, and no number that no kernel could have written."""

    @given(damaged(parser.shape, parser.seeds))
    def holds(data: bytes) -> None:
        found = outcome(parser, data)
        if isinstance(found, Exception):
            return
        assert parser.sound(found)
        for number in numbers(found):
            assert math.isfinite(number)
            assert abs(number) < LARGEST

    holds()


def within(part: object, whole: object, *, sums: bool) -> bool:
    """Tell whether all that is in `part` is the same in `whole`; what is absent is in everything."""
    if part is None or part in EMPTY:
        found = True
    elif type(part) is not type(whole):
        found = False
    elif isinstance(part, dict) and isinstance(whole, dict):
        found = all(key in whole and within(value, whole[key], sums=sums) for key, value in part.items())
    elif isinstance(part, set | frozenset) and isinstance(whole, set | frozenset):
        found = part <= whole
    elif isinstance(part, list | tuple) and isinstance(whole, list | tuple):
        same = sums or all(within(one, other, sums=sums) for one, other in zip(part, whole, strict=False))
        found = len(part) <= len(whole) and same
    elif is_dataclass(part):
        found = all(within(getattr(part, one.name), getattr(whole, one.name), sums=sums) for one in fields(part))
    elif sums and isinstance(part, int | float) and isinstance(whole, int | float):
        found = part <= whole
    else:
        found = part == whole
    return found


@each
def test_input_cut_short(parser: Parser) -> None:
    """A recorded file or dump that ends anywhere is refused, or gives what the whole gives, or less: no half number."""
    whole = [(seed, outcome(parser, seed)) for seed in parser.seeds]

    @given(st.sampled_from(whole), st.integers(0, 1 << 16))
    def holds(recorded: tuple[bytes, object], place: int) -> None:
        seed, expected = recorded
        cut = seed[: place % len(seed)]
        found = outcome(parser, cut)
        if isinstance(found, Exception) or not parser.ends_in_newline or parser.shape is Shape.PACKET:
            return
        if parser.shape is Shape.TEXT:
            assert not cut or cut.endswith(b"\n"), "the end of a line is missing, and it was taken for whole"
        assert within(found, expected, sums=parser.sums)

    holds()


@each
def test_what_was_recorded_is_understood(parser: Parser) -> None:
    """No seed is refused, or nothing would be learned from what is done to it."""
    for seed in parser.seeds:
        assert not isinstance(outcome(parser, seed), Exception)


def some_damaged(parser: Parser, count: int) -> list[bytes]:
    """Return always the same damaged inputs."""
    chance = random.Random(1)  # noqa: S311  (no secret)
    found = []
    for _ in range(count):
        data = chance.choice(parser.seeds)
        for _ in range(chance.randint(1, 4)):
            data = chance.choice(MUTATIONS[parser.shape])(data, chance.randrange(1 << 20), chance.randrange(1 << 20))
        found.append(data)
    return found


def test_nothing_is_kept() -> None:
    """The same bad input over and over leaves no more behind than it left the first times."""
    inputs = {name: some_damaged(parser, 20) for name, parser in PARSERS.items()}

    def feed() -> int:
        for name, parser in PARSERS.items():
            for data in inputs[name]:
                outcome(parser, data)
        gc.collect()
        return tracemalloc.get_traced_memory()[0]

    tracemalloc.start()
    try:
        before = [feed() for _ in range(3)][-1]
        # So often that even what one parser kept of every input would be seen.
        grown = [feed() for _ in range(10)][-1] - before
    finally:
        tracemalloc.stop()
    assert grown < 16_384
