"""cpu.stat and cpu.max of a cgroup: what its quota is and what it did."""

from __future__ import annotations

import contextlib
import os
from pathlib import Path
from typing import TYPE_CHECKING

import pytest
from hypothesis import given
from hypothesis import strategies as st

from shoal.kernel.cpu import CpuStat, parse_cpu_max, parse_cpu_stat, read_cpu_burst, read_cpu_max, read_cpu_stat
from shoal.kernel.files import ParseError

if TYPE_CHECKING:
    from collections.abc import Callable

RECORDED = Path(__file__).parent / "fixtures" / "taskstats"


@pytest.mark.parametrize(
    ("kernel", "expected"),
    [
        ("5.10", CpuStat(2.006077, 218, 206, 13.355646, None, None)),
        ("6.1", CpuStat(1.988797, 224, 206, 18.259931, 0, 0.0)),
        ("6.12", CpuStat(2.062119, 223, 196, 16.016437, 0, 0.0)),
    ],
)
def test_a_recorded_cgroup_that_its_quota_stopped(kernel: str, expected: CpuStat) -> None:
    """Times come in seconds; 5.10 knows no bursts, which are absent there and 0 on the others."""
    assert parse_cpu_stat((RECORDED / kernel / "cpu.stat").read_bytes()) == expected


def test_a_cgroup_without_the_controller() -> None:
    """Usage is there without the cpu controller, a quota is not."""
    assert parse_cpu_stat(b"usage_usec 13484000\nuser_usec 3484000\nsystem_usec 10000000\n") is None


@pytest.mark.parametrize(
    "data",
    [
        b"",
        b"nr_periods 1\n",
        b"nr_periods 1\nnr_throttled 0\n",
        b"nr_periods x\n",
        b"nr_periods 1\nnr_throttled 0\nthrottled_usec 0\n",
    ],
)
def test_a_malformed_cpu_stat_is_refused(data: bytes) -> None:
    """Periods without the use, or a quota's periods without what it did to them are half a file."""
    with pytest.raises(ParseError):
        parse_cpu_stat(data)


def test_quotas() -> None:
    """A quota is a number of CPUs; `max` is none."""
    assert parse_cpu_max(b"max 100000\n") is None
    assert parse_cpu_max(b"50000 100000\n") == 0.5
    assert parse_cpu_max(b"400000 100000\n") == 4


@pytest.mark.parametrize(
    "data",
    [b"max\n", b"100000\n", b"x 100000\n", b"1 0\n", b"-1 100000\n", b"1 2 3\n", b"99999999999999999999 1\n"],
)
def test_a_malformed_quota_is_refused(data: bytes) -> None:
    """Two words, a quota and a period that is not 0."""
    with pytest.raises(ParseError, match="a quota or the word max"):
        parse_cpu_max(data)


@given(st.binary(max_size=200))
def test_arbitrary_bytes_are_parsed_or_refused(data: bytes) -> None:
    """No bytes make anything but a result or `ParseError`."""
    parsers: tuple[Callable[[bytes], object], ...] = (parse_cpu_stat, parse_cpu_max)
    for parse in parsers:
        with contextlib.suppress(ParseError):
            parse(data)


def test_reading_through_an_open_directory(tmp_path: Path) -> None:
    """The files are found in the directory that is open; a kernel without bursts allows none."""
    (tmp_path / "cpu.stat").write_bytes((RECORDED / "6.1" / "cpu.stat").read_bytes())
    (tmp_path / "cpu.max").write_bytes(b"10000 100000\n")
    fd = os.open(tmp_path, os.O_RDONLY)
    try:
        stat = read_cpu_stat(fd)
        assert stat is not None
        assert stat.throttled_periods == 206
        assert read_cpu_max(fd) == 0.1
        assert not read_cpu_burst(fd)
        for content, expected in ((b"0\n", False), (b"5000\n", True)):
            (tmp_path / "cpu.max.burst").write_bytes(content)
            assert read_cpu_burst(fd) is expected
    finally:
        os.close(fd)
