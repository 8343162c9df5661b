"""Whole-file reads, and what each answer of the kernel becomes."""

from __future__ import annotations

import errno
import os
from typing import TYPE_CHECKING

import pytest

from shoal.kernel.files import (
    ParseError,
    Reason,
    Unavailable,
    Vanished,
    is_count,
    parse_flat_keyed,
    read,
    unavailable_from,
)

if TYPE_CHECKING:
    from pathlib import Path


def test_read_returns_a_long_proc_file_whole() -> None:
    """Procfs hands out a long file in pieces of about a page; all of it must come back."""
    data = read("/proc/kallsyms")
    assert len(data) > 1_000_000
    assert data.endswith(b"\n")


def test_read_relative_to_a_directory(tmp_path: Path) -> None:
    """A file is found below an open directory."""
    (tmp_path / "memory.max").write_bytes(b"max\n")
    fd = os.open(tmp_path, os.O_RDONLY)
    try:
        assert read("memory.max", dir_fd=fd) == b"max\n"
    finally:
        os.close(fd)


def test_read_of_an_empty_file(tmp_path: Path) -> None:
    """An empty file is empty, and no error of the reader."""
    (tmp_path / "empty").touch()
    assert read(str(tmp_path / "empty")) == b""


def test_read_leaves_no_descriptor_open(tmp_path: Path) -> None:
    """Neither success nor failure leaks a descriptor."""
    (tmp_path / "file").write_bytes(b"1\n")
    before = len(os.listdir("/proc/self/fd"))
    for _ in range(50):
        read(str(tmp_path / "file"))
        with pytest.raises(Unavailable):
            read(str(tmp_path))  # a directory opens, and cannot be read
    assert len(os.listdir("/proc/self/fd")) == before


@pytest.mark.parametrize(
    ("number", "reason"),
    [
        (errno.ENOENT, Reason.NOT_IN_KERNEL),
        (errno.ENOTDIR, Reason.NOT_IN_KERNEL),
        (errno.EACCES, Reason.NO_PERMISSION),
        (errno.EPERM, Reason.NO_PERMISSION),
        (errno.EOPNOTSUPP, Reason.DISABLED),
        (errno.EMFILE, Reason.NOT_READABLE),
        (errno.EIO, Reason.NOT_READABLE),
    ],
)
def test_what_the_kernel_refuses_becomes_a_reason(number: int, reason: Reason) -> None:
    """Each error number has the reason that a person can act on, and the sentence names the file."""
    error = unavailable_from(OSError(number, os.strerror(number)), "/proc/pressure/cpu")
    assert isinstance(error, Unavailable)
    assert error.reason is reason
    assert "/proc/pressure/cpu" in str(error)


@pytest.mark.parametrize("number", [errno.ENODEV, errno.ESRCH])
def test_what_has_ended_is_not_a_missing_feature(number: int) -> None:
    """A removed cgroup and an ended process have vanished; the kernel lacks nothing."""
    assert isinstance(unavailable_from(OSError(number, os.strerror(number)), "memory.max"), Vanished)


def test_missing_file_is_not_in_kernel(tmp_path: Path) -> None:
    """A file that is not there is a fact about the kernel."""
    with pytest.raises(Unavailable) as caught:
        read(str(tmp_path / "pressure" / "irq"))
    assert caught.value.reason is Reason.NOT_IN_KERNEL


def test_a_file_without_end_is_refused() -> None:
    """What never ends, as a wrong root may offer, costs 16 MiB and not the exporter."""
    with pytest.raises(Unavailable, match="larger than any kernel file"):
        read("/dev/zero")


def test_flat_keyed_tolerates_more_columns() -> None:
    """A wider row of a newer kernel is read for what is known."""
    assert parse_flat_keyed(b"high 107\noom_kill 2 extra\n", "memory.events") == {"high": 107, "oom_kill": 2}


@pytest.mark.parametrize(
    ("field", "expected"),
    [
        (b"0", True),
        (b"18446744073709551615", True),
        (b"18446744073709551616", False),
        (b"99999999999999999999", False),
        (b"018446744073709551615", False),
        (b"9999999999999999999", True),
        (b"-1", False),
        (b"+1", False),
        (b"1_0", False),
        ("\u0663".encode(), False),
        (b"", False),
    ],
)
def test_a_count_has_64_bits(field: bytes, expected: bool) -> None:  # noqa: FBT001  (an expectation)
    """More than that no kernel writes, whatever int() takes."""
    assert is_count(field) is expected
    if expected:
        assert parse_flat_keyed(b"key %s\n" % field, "file") == {"key": int(field)}


@pytest.mark.parametrize(
    ("data", "line"),
    [
        (b"", 1),
        (b"high", 1),
        (b"high 1\nmax 2", 2),
        (b"high x\n", 1),
        (b"\xff\xfe 1\n", 1),
        (b"\n", 1),
        (b"high 18446744073709551616\n", 1),
    ],
)
def test_flat_keyed_rejects_the_malformed(data: bytes, line: int) -> None:
    """Empty, cut short and binary input is refused, naming file and line."""
    with pytest.raises(ParseError, match=r"^memory\.events") as caught:
        parse_flat_keyed(data, "memory.events")
    assert caught.value.line == line
