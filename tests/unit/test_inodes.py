"""Counting inodes of a tree whose owner may change it, and asking what may hang."""

from __future__ import annotations

import os
import subprocess
import threading
import time
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from shoal.kernel.inodes import CrowdedError, StuckError, Watchdog, count_inodes, read_inodes

if TYPE_CHECKING:
    from collections.abc import Callable


def never() -> bool:
    """Go on to the end."""
    return False


def names_by_du(directory: Path) -> int:
    """Return how many names du counts, each link as one."""
    counted = subprocess.run(
        ["du", "--inodes", "--count-links", "-s", str(directory)], check=True, capture_output=True, text=True
    )
    return int(counted.stdout.split()[0])


def test_every_name_counts(tmp_path: Path) -> None:
    """Files, directories, links, sockets and pipes, as du counts them; what a link points to is not followed."""
    (tmp_path / "a/b/c").mkdir(parents=True)
    for number in range(600):
        (tmp_path / "a" / f"file{number}").touch()
    os.link(tmp_path / "a/file0", tmp_path / "a/b/again")
    (tmp_path / "a/out").symlink_to("/usr")
    os.mkfifo(tmp_path / "a/b/c/pipe")
    count = count_inodes(str(tmp_path), never)
    assert count.complete
    assert count.inodes == names_by_du(tmp_path) == 1 + 3 + 600 + 1 + 1 + 1
    assert count.device == tmp_path.stat().st_dev


def test_a_real_tree() -> None:
    """The standard library of this Python, counted as du counts it."""
    directory = Path(os.__file__).parent
    assert count_inodes(str(directory), never).inodes == names_by_du(directory)


def test_an_empty_directory_is_one_inode(tmp_path: Path) -> None:
    """The layer itself is an inode."""
    assert count_inodes(str(tmp_path), never).inodes == 1


def test_giving_up_is_said(tmp_path: Path) -> None:
    """The count is what was seen until then, and not complete."""
    for number in range(600):
        (tmp_path / str(number)).touch()
    looks = iter([False, True])
    count = count_inodes(str(tmp_path), lambda: next(looks))
    assert not count.complete
    assert 256 < count.inodes < 600


def test_it_goes_so_deep_and_no_deeper(tmp_path: Path) -> None:
    """A tree that would take more descriptors than there are is cut, and says so; none stays open."""
    before = len(os.listdir("/proc/self/fd"))
    deep = tmp_path
    for _ in range(150):
        deep /= "d"
        deep.mkdir()
    count = count_inodes(str(tmp_path), never)
    assert not count.complete
    assert count.inodes == 101
    assert len(os.listdir("/proc/self/fd")) == before


def test_the_walk_cannot_be_led_out(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A directory that is replaced by a link between being listed and being opened is not followed."""
    inside, outside = tmp_path / "victim/inside", tmp_path / "outside"
    inside.mkdir(parents=True)
    outside.mkdir()
    for number in range(50):
        (outside / str(number)).touch()
    real = os.open

    def swap(path: str, flags: int, mode: int = 0o777, *, dir_fd: int | None = None) -> int:
        if path == "inside":
            inside.rmdir()
            inside.symlink_to(outside)
        return real(path, flags, mode, dir_fd=dir_fd)

    monkeypatch.setattr(os, "open", swap)
    count = count_inodes(str(tmp_path / "victim"), never)
    assert (count.inodes, count.complete) == (2, False)


@pytest.mark.parametrize("kind", ["link", "file", "missing"])
def test_a_layer_that_is_no_directory_is_refused(tmp_path: Path, kind: str) -> None:
    """The layer itself is not reached over a link either."""
    (tmp_path / "file").touch()
    (tmp_path / "link").symlink_to("/usr")
    with pytest.raises(OSError, match=r"link|file|missing"):
        count_inodes(str(tmp_path / kind), never)


def test_a_directory_that_may_not_be_read_leaves_the_count_incomplete(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It counts as one, and what is in it is missing."""
    (tmp_path / "open").mkdir()
    (tmp_path / "closed").mkdir()
    (tmp_path / "open/file").touch()
    (tmp_path / "closed/file").touch()
    real = os.open

    def refuse(path: str, flags: int, mode: int = 0o777, *, dir_fd: int | None = None) -> int:
        if path == "closed":
            raise PermissionError(path)
        return real(path, flags, mode, dir_fd=dir_fd)

    monkeypatch.setattr(os, "open", refuse)
    count = count_inodes(str(tmp_path), never)
    assert (count.inodes, count.complete) == (4, False)


@pytest.mark.root
def test_whiteouts_share_inodes(tmp_path: Path) -> None:
    """Device 0:0, linked many times over, is as many inodes as it really is; another device is one of its own."""
    os.mknod(tmp_path / "white", 0o020000, os.makedev(0, 0))
    for number in range(40):
        os.link(tmp_path / "white", tmp_path / f"white{number}")
    os.mknod(tmp_path / "other", 0o020000, os.makedev(0, 0))
    os.mknod(tmp_path / "null", 0o020666, os.makedev(1, 3))
    os.link(tmp_path / "null", tmp_path / "null2")
    assert count_inodes(str(tmp_path), never).inodes == 1 + 1 + 1 + 2


def test_statfs_of_the_live_machine() -> None:
    """As df has it."""
    row = subprocess.run(["df", "--output=itotal,iavail", "/"], check=True, capture_output=True, text=True).stdout
    total, free = map(int, row.splitlines()[1].split())
    read = read_inodes("/")
    assert read.total == total
    assert read.free == pytest.approx(free, abs=2000)
    assert read.device == Path("/").stat().st_dev


class Hanging:
    """Functions that hang until they are told to go on."""

    def __init__(self) -> None:
        """Hang."""
        self.go = threading.Event()
        self.calls = 0

    def __call__(self) -> int:
        """Count, and hang."""
        self.calls += 1
        self.go.wait(10)
        return self.calls


def wait_for(true: Callable[[], bool]) -> None:
    """Wait until it is, for no more than a few seconds."""
    until = time.monotonic() + 5
    while not true():
        assert time.monotonic() < until
        time.sleep(0.01)


def watchdogs() -> int:
    """Return how many threads wait."""
    return sum(thread.name == "shoal-watchdog" for thread in threading.enumerate())


def test_what_answers_is_answered() -> None:
    """Results and exceptions come through, and no thread is left."""
    watchdog: Watchdog[int] = Watchdog(1, 2)
    assert watchdog.ask("a", lambda: 7) == 7

    def fail() -> int:
        raise OSError(107, "Transport endpoint is not connected")

    with pytest.raises(OSError, match="not connected"):
        watchdog.ask("a", fail)
    assert watchdog.ask("a", lambda: 8) == 8
    wait_for(lambda: watchdogs() == 0)


def test_what_hangs_costs_one_thread_and_is_not_asked_again() -> None:
    """The first call waits for its patience, the next ones not at all; when it answers it is asked anew."""
    watchdog: Watchdog[int] = Watchdog(0.2, 3)
    hanging = Hanging()
    for patience in (0.2, 0.0, 0.0):
        began = time.monotonic()
        with pytest.raises(StuckError):
            watchdog.ask("a", hanging)
        assert time.monotonic() - began == pytest.approx(patience, abs=0.15)
    assert hanging.calls == 1
    assert watchdogs() == 1
    assert watchdog.ask("b", lambda: 7) == 7
    hanging.go.set()
    wait_for(lambda: watchdogs() == 0)
    assert watchdog.ask("a", hanging) == 2


def test_never_more_than_a_few_threads() -> None:
    """With as many hanging as may hang nothing more is asked, and something is when one of them answers."""
    watchdog: Watchdog[int] = Watchdog(0.05, 2)
    hanging = [Hanging() for _ in range(2)]
    for key, one in enumerate(hanging):
        with pytest.raises(StuckError):
            watchdog.ask(key, one)
    with pytest.raises(CrowdedError):
        watchdog.ask("c", lambda: 7)
    with pytest.raises(StuckError):
        watchdog.ask(0, hanging[0])
    assert watchdogs() == 2
    hanging[1].go.set()
    wait_for(lambda: watchdogs() == 1)
    assert watchdog.ask("c", lambda: 7) == 7
    hanging[0].go.set()
