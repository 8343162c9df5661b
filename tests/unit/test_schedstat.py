"""Run queues as procfs has them: of the node, and of the threads of a process."""

from __future__ import annotations

import contextlib
import os
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import TYPE_CHECKING

import pytest
from hypothesis import given
from hypothesis import strategies as st

from shoal.kernel.files import ParseError, Reason, Unavailable, Vanished
from shoal.kernel.processes import Process, check_pid_namespace, parse_process, read_process
from shoal.kernel.schedstat import parse_schedstat, parse_task_schedstat, read_schedstat, read_task_schedstats

if TYPE_CHECKING:
    from collections.abc import Callable

FIXTURES = Path(__file__).parent / "fixtures"


@pytest.mark.parametrize(
    ("kernel", "version", "expected"),
    [
        ("5.10", 15, {"cpu0": 3.40398529, "cpu1": 1.068820999}),
        ("6.1", 15, None),
        ("6.12", 16, None),
    ],
)
def test_a_recorded_node(kernel: str, version: int, expected: dict[str, float] | None) -> None:
    """Both versions of the format give the eighth column of each CPU, in seconds."""
    path = FIXTURES / kernel / "proc" / "schedstat"
    assert path.read_text().startswith(f"version {version}\n")
    read = read_schedstat(str(path.parent))
    rows = {
        words[0]: int(words[8]) / 1e9 for words in map(str.split, path.read_text().splitlines()) if len(words) == 10
    }
    assert read == rows
    assert set(read) == {"cpu0", "cpu1"}
    if expected:
        assert read == pytest.approx(expected, abs=60)


def test_a_kernel_without_schedstats(tmp_path: Path) -> None:
    """CONFIG_SCHEDSTATS is not everywhere: the signal is absent."""
    with pytest.raises(Unavailable) as absent:
        read_schedstat(str(tmp_path))
    assert absent.value.reason is Reason.NOT_IN_KERNEL


def test_more_columns_and_other_rows_are_passed_over() -> None:
    """A tenth column and the rows of domains, named or numbered, are none of the reader's affair."""
    data = b"version 17\ntimestamp 1\ncpu7 0 0 0 0 0 0 1 2000000000 3 99\ndomain0 MC 3 0\n"
    assert parse_schedstat(data) == {"cpu7": 2.0}


@pytest.mark.parametrize("data", [b"", b"version 15\n", b"cpu0 1 2 3\n", b"cpu0 0 0 0 0 0 0 1 x 3\n"])
def test_a_malformed_schedstat_is_refused(data: bytes) -> None:
    """Without a complete row there is no total."""
    with pytest.raises(ParseError):
        parse_schedstat(data)


@pytest.mark.parametrize("data", [b"1 2\n", b"1 x 3\n", b"1 -2 3\n", b"1 2_0 3\n"])
def test_a_malformed_row_of_a_thread_is_refused(data: bytes) -> None:
    """Three whole numbers, or nothing."""
    with pytest.raises(ParseError, match="three whole numbers"):
        parse_task_schedstat(data)


def test_the_threads_of_a_live_process() -> None:
    """Each thread has its own row, and /proc/<pid>/schedstat is that of the first alone."""
    ready, end = threading.Barrier(3), threading.Event()

    def wait() -> None:
        ready.wait()
        end.wait()

    threads = [threading.Thread(target=wait) for _ in range(2)]
    for thread in threads:
        thread.start()
    ready.wait()
    time.sleep(0.05)
    try:
        read = read_task_schedstats("/proc", os.getpid())
        for thread in threads:
            row = Path(f"/proc/self/task/{thread.native_id}/schedstat").read_bytes()
            assert read[thread.native_id or 0] == parse_task_schedstat(row)
    finally:
        end.set()
        for thread in threads:
            thread.join()
    assert os.getpid() in read


def test_a_process_that_has_ended() -> None:
    """A process without a directory is vanished, to both readers; a zombie still has its start and its row."""
    process = subprocess.Popen([sys.executable, "-c", ""])
    os.waitid(os.P_PID, process.pid, os.WEXITED | os.WNOWAIT)
    assert read_process("/proc", process.pid).started > 0
    assert list(read_task_schedstats("/proc", process.pid)) == [process.pid]
    process.wait()
    for reader in (read_process, read_task_schedstats):
        with pytest.raises(Vanished):
            reader("/proc", process.pid)


def test_a_kernel_without_sched_info(tmp_path: Path) -> None:
    """Threads without a schedstat in a process that is there: the kernel has none, the process has not ended."""
    (tmp_path / "7/task/7").mkdir(parents=True)
    (tmp_path / "7/stat").write_bytes(b"7 (x) S")
    with pytest.raises(Unavailable) as absent:
        read_task_schedstats(str(tmp_path), 7)
    assert absent.value.reason is Reason.NOT_IN_KERNEL


def test_a_thread_that_ends_between_listing_and_reading(tmp_path: Path) -> None:
    """The others are read all the same."""
    for thread in ("7", "8"):
        (tmp_path / "7/task" / thread).mkdir(parents=True)
    (tmp_path / "7/task/7/schedstat").write_bytes(b"1 2000000000 3\n")
    assert read_task_schedstats(str(tmp_path), 7) == {7: 2.0}


@pytest.mark.parametrize("command", ["plain", "a b", ") S 1 (", "x)\n(y"])
def test_when_a_process_started(command: str) -> None:
    """The start is the 22nd field, however the command is named; a process may call itself anything."""
    rest = "S " + " ".join(str(number) for number in range(4, 53))
    assert parse_process(f"42 ({command}) {rest}\n".encode()) == Process(22, niced=True)


@pytest.mark.parametrize(("nice", "policy", "niced"), [(0, 0, False), (-5, 0, False), (1, 0, True), (0, 5, True)])
def test_whether_a_process_stands_back(nice: int, policy: int, *, niced: bool) -> None:
    """A nice value above 0 says so, and SCHED_IDLE; a negative one does not."""
    fields = [0] * 50
    fields[15], fields[37] = nice, policy
    assert parse_process(f"42 (x) S {' '.join(map(str, fields))}\n".encode()).niced is niced


def test_a_live_process_that_stands_back() -> None:
    """What nice(1) and chrt(1) do to a process is read so."""
    for command, niced in ((["nice", "-n", "3"], True), (["chrt", "--idle", "0"], True), (["env"], False)):
        with subprocess.Popen([*command, "cat"], stdin=subprocess.PIPE, stdout=subprocess.PIPE) as process:
            assert process.stdin
            assert process.stdout
            process.stdin.write(b"x\n")
            process.stdin.flush()
            process.stdout.readline()
            # The machine that runs the tests may itself stand back.
            assert read_process("/proc", process.pid).niced is (niced or os.nice(0) > 0)


def test_when_a_live_process_started() -> None:
    """In ticks since boot, as sysconf counts them: this one started before now and after boot."""
    started = read_process("/proc", os.getpid()).started / os.sysconf("SC_CLK_TCK")
    assert 0 < started <= time.clock_gettime(time.CLOCK_BOOTTIME)


@pytest.mark.parametrize("data", [b"\n", b"1 (x) S 1 2\n", b"1 (x) " + b"y " * 60 + b"\n"])
def test_a_malformed_stat_is_refused(data: bytes) -> None:
    """A short row or words in place of numbers are no start."""
    with pytest.raises(ParseError, match="starttime"):
        parse_process(data)


@given(st.binary(max_size=300))
def test_arbitrary_bytes_are_parsed_or_refused(data: bytes) -> None:
    """No bytes make anything but a result or `ParseError`."""
    parsers: tuple[Callable[[bytes], object], ...] = (parse_schedstat, parse_task_schedstat, parse_process)
    for parse in parsers:
        with contextlib.suppress(ParseError):
            parse(data)


def test_whose_process_ids(tmp_path: Path) -> None:
    """The machine's own proc knows this process by its id; another's, or a directory that is none, does not."""
    check_pid_namespace("/proc")
    (tmp_path / "self").symlink_to("1")
    for proc in (str(tmp_path), str(tmp_path / "nothing")):
        with pytest.raises(Unavailable) as refused:
            check_pid_namespace(proc)
        assert refused.value.reason is Reason.NO_PERMISSION
