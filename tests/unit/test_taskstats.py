"""Delay accounting over generic netlink: struct taskstats by its version, and the live kernel against procfs."""

from __future__ import annotations

import contextlib
import ctypes
import os
import signal
import struct
import subprocess
import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from pyroute2 import TaskStats as Oracle

from shoal.kernel.files import ParseError, Reason, Unavailable, Vanished
from shoal.kernel.netlink.taskstats import (
    TaskStats,
    TaskStatsSocket,
    check_accounting,
    parse_family_id,
    parse_taskstats,
)
from shoal.kernel.schedstat import parse_task_schedstat

if TYPE_CHECKING:
    from collections.abc import Iterator

RECORDED = Path(__file__).parent / "fixtures" / "taskstats"
KERNELS = {"5.10": 10, "6.1": 13, "6.12": 14}
TICK = 0.01
NETLINK_HEADER = 16
MEMBERS = {
    "run_queue": "cpu",
    "block_io": "blkio",
    "swap_in": "swapin",
    "reclaim": "freepages",
    "thrashing": "thrashing",
    "compaction": "compact",
    "copy_on_write": "wpcopy",
    "irq": "irq",
}
GENL = bytes(4)


def delay(kind: str, *, peaks: bool) -> list[tuple[str, Any]]:
    """Return the members of one kind of delay, with its peaks behind it where version 15 put them."""
    names = [f"{kind}_count", f"{kind}_delay_total"] + [f"{kind}_delay_max", f"{kind}_delay_min"] * peaks
    return [(name, ctypes.c_uint64) for name in names]


def layout(version: int) -> type[ctypes.Structure]:
    """Describe struct taskstats to ctypes, which lays it out by the C compiler's rules: the oracle for every offset."""
    u8, u16, u32, u64 = ctypes.c_uint8, ctypes.c_uint16, ctypes.c_uint32, ctypes.c_uint64
    peaks = version == 15
    members: list[tuple[str, Any]] = [("version", u16), ("exitcode", u32), ("flag", u8), ("nice", u8)]
    members += [*delay("cpu", peaks=peaks), *delay("blkio", peaks=peaks), *delay("swapin", peaks=peaks)]
    members += [("run_real", u64), ("run_virtual", u64), ("comm", ctypes.c_char * 32), ("sched", u8), ("pad", u8 * 3)]
    # ac_uid is aligned to 8 bytes, which ctypes cannot be told of one member.
    members += [("align", u32), ("uid", u32), ("gid", u32), ("pid", u32), ("ppid", u32), ("btime", u32)]
    members += [(name, u64) for name in ("etime", "utime", "stime", "minflt", "majflt", "coremem", "virtmem")]
    members += [(name, u64) for name in ("hiwater_rss", "hiwater_vm", "rchar", "wchar", "reads", "writes")]
    members += [(name, u64) for name in ("read_bytes", "write_bytes", "cancelled", "nvcsw", "nivcsw")]
    members += [(name, u64) for name in ("utimescaled", "stimescaled", "run_real_scaled")]
    members += [*delay("freepages", peaks=peaks), *delay("thrashing", peaks=peaks), ("btime64", u64)]
    if version >= 11:
        members += delay("compact", peaks=peaks)
    if version >= 12:
        members += [("tgid", u32), ("tgetime", u64), ("exe_dev", u64), ("exe_inode", u64)]
    if version >= 13:
        members += delay("wpcopy", peaks=peaks)
    if version >= 14:
        members += delay("irq", peaks=peaks)
    if version >= 16:
        members += [(f"{kind}_delay_{peak}", u64) for kind in MEMBERS.values() for peak in ("max", "min")]
    return type(f"taskstats{version}", (ctypes.Structure,), {"_fields_": members})


def attribute(kind: int, value: bytes) -> bytes:
    """Return a netlink attribute, padded."""
    return struct.pack("=HH", 4 + len(value), kind) + value + bytes(-len(value) % 4)


def answer(stats: bytes) -> bytes:
    """Return what the kernel answers for a thread group, without the netlink header."""
    return GENL + attribute(5, attribute(2, struct.pack("=I", 42)) + attribute(3, stats))


@pytest.mark.parametrize("version", [10, 11, 12, 13, 14, 15, 16])
def test_every_version_is_read_where_a_c_compiler_puts_its_members(version: int) -> None:
    """Each total, in seconds, from a struct in which every member has another value; what a version lacks is None."""
    structure = layout(version)()
    for number, (name, kind, *_) in enumerate(structure._fields_, 1):
        if kind is ctypes.c_uint64:
            setattr(structure, name, number * 1_000_003)
    structure.version = version
    read = parse_taskstats(answer(bytes(structure)))
    assert read.version == version
    expected = {ours: getattr(structure, f"{theirs}_delay_total", None) for ours, theirs in MEMBERS.items()}
    assert {ours: getattr(read, ours) for ours in MEMBERS} == {
        ours: None if nanoseconds is None else nanoseconds / 1e9 for ours, nanoseconds in expected.items()
    }
    assert read.block_io_waits == structure.blkio_count


def test_a_later_version_is_read_as_far_as_it_is_known() -> None:
    """Version 17 is longer; what is known of it stands where version 16 has it."""
    structure = layout(16)()
    structure.version, structure.irq_delay_total = 17, 5
    assert parse_taskstats(answer(bytes(structure) + bytes(128))).irq == 5e-9


def test_a_version_older_than_any_node_is_refused() -> None:
    """Version 8 (4.19) has no thrashing: the signal is absent, the kernel is too old."""
    structure = layout(10)()
    structure.version = 8
    with pytest.raises(Unavailable, match="version 8") as refused:
        parse_taskstats(answer(bytes(structure)))
    assert refused.value.reason is Reason.NOT_IN_KERNEL


def test_a_struct_shorter_than_its_version_says_is_refused() -> None:
    """Half of a struct would give zeros for what is cut off; the error names the member and its place."""
    structure = layout(16)()
    structure.version = 16
    with pytest.raises(ParseError, match="irq at byte 424 of version 16, found 430 bytes"):
        parse_taskstats(answer(bytes(structure)[:430]))


@pytest.mark.parametrize(
    ("message", "expected"),
    [
        (b"", "TASKSTATS_TYPE_AGGR_TGID"),
        (GENL + attribute(4, b""), "TASKSTATS_TYPE_AGGR_TGID"),
        (GENL + attribute(5, b""), "struct taskstats, found 0 bytes"),
        (GENL + attribute(5, attribute(3, b"\x10")), "struct taskstats, found 1 bytes"),
        (GENL + b"\x03\x00\x05\x00", "an attribute of 4 to 4 bytes"),
    ],
)
def test_a_malformed_answer_is_refused_with_a_sentence(message: bytes, expected: str) -> None:
    """No answer makes anything but `ParseError`, which says what was expected."""
    with pytest.raises(ParseError, match=expected):
        parse_taskstats(message)


@given(st.binary(max_size=700))
def test_arbitrary_bytes_are_decoded_or_refused(message: bytes) -> None:
    """No bytes make anything but a `TaskStats`, a number, or one of the two exceptions for it."""
    for parse in (parse_taskstats, parse_family_id):
        with contextlib.suppress(ParseError, Unavailable):
            assert isinstance(parse(message), TaskStats | int)


def test_a_family_without_its_number_is_refused() -> None:
    """CTRL_ATTR_FAMILY_ID has two bytes; without them nobody could be asked."""
    assert parse_family_id(GENL + attribute(2, b"TASKSTATS\0") + attribute(1, b"\x1f\x00")) == 31
    with pytest.raises(ParseError, match="CTRL_ATTR_FAMILY_ID"):
        parse_family_id(GENL + attribute(2, b"TASKSTATS\0"))


@pytest.mark.parametrize("kernel", KERNELS)
def test_a_recorded_answer_agrees_with_what_proc_said_of_the_process(kernel: str) -> None:
    """The run queue to the nanosecond, block I/O to the tick (field 42 of stat), and the version of that kernel."""
    read = parse_taskstats((RECORDED / kernel / "reply.bin").read_bytes()[NETLINK_HEADER:])
    assert read.version == KERNELS[kernel]
    assert read.run_queue == parse_task_schedstat((RECORDED / kernel / "schedstat").read_bytes())
    ticks = int((RECORDED / kernel / "stat").read_text().rpartition(")")[2].split()[39])
    # The kernel adds swap_in to it.
    assert read.block_io + read.swap_in == pytest.approx(ticks * TICK, abs=TICK)
    assert read.block_io > 0.1
    assert read.reclaim > 0.1


@pytest.mark.parametrize("kernel", ["6.1", "6.12"])
def test_a_process_that_waited_for_everything_shows_it(kernel: str) -> None:
    """On the newer kernels the recorded process had swapped in, missed pages just evicted, and copied pages."""
    read = parse_taskstats((RECORDED / kernel / "reply.bin").read_bytes()[NETLINK_HEADER:])
    assert 0 < read.swap_in < 1
    assert 0 < read.thrashing < 1
    assert read.compaction == 0
    assert read.copy_on_write is not None
    assert 0.01 < read.copy_on_write < 1


@pytest.mark.parametrize(
    ("sysctl", "cmdline", "version", "expected"),
    [
        ("1\n", "", 16, None),
        ("0\n", "delayacct", 16, Reason.DISABLED),
        (None, "quiet", 10, None),
        (None, "quiet nodelayacct", 10, Reason.DISABLED),
        (None, "quiet", 13, Reason.NOT_IN_KERNEL),
    ],
)
def test_whether_delays_are_counted(
    tmp_path: Path, sysctl: str | None, cmdline: str, version: int, expected: Reason | None
) -> None:
    """The sysctl says it; 5.10 has none and counts unless it was booted not to; a later one without it cannot."""
    (tmp_path / "sys/kernel").mkdir(parents=True)
    (tmp_path / "cmdline").write_text(cmdline)
    if sysctl is not None:
        (tmp_path / "sys/kernel/task_delayacct").write_text(sysctl)
    if expected is None:
        check_accounting(str(tmp_path), version)
        return
    with pytest.raises(Unavailable) as refused:
        check_accounting(str(tmp_path), version)
    assert refused.value.reason is expected


@pytest.fixture
def stopped() -> Iterator[int]:
    """Give the id of a process that has competed for a CPU and is stopped, so that its numbers stand still."""
    spin = [sys.executable, "-c", "import os\nos.sched_setaffinity(0, {0})\nwhile True: pass"]
    processes = [subprocess.Popen(spin) for _ in range(3)]
    try:
        time.sleep(0.5)
        pid = processes[0].pid
        os.kill(pid, signal.SIGSTOP)
        until = time.monotonic() + 5
        while ") T " not in Path(f"/proc/{pid}/stat").read_text():
            assert time.monotonic() < until
            time.sleep(0.01)
        yield pid
    finally:
        for process in processes:
            process.kill()
            process.wait()


@pytest.mark.root
def test_the_live_kernel_agrees_with_its_own_procfs_and_with_pyroute2(stopped: int) -> None:
    """Three readers of one stopped process: the run-queue delay is the same to the nanosecond."""
    with TaskStatsSocket() as taskstats:
        read = taskstats.read(stopped)
    assert read.run_queue == parse_task_schedstat(Path(f"/proc/{stopped}/schedstat").read_bytes())
    assert read.run_queue > 0.05
    with Oracle() as oracle:
        oracle.bind()
        (message,) = oracle.get_pid_stat(stopped)
    theirs = message.get_attr("TASKSTATS_TYPE_AGGR_PID").get_attr("TASKSTATS_TYPE_STATS")
    assert theirs["version"] == read.version
    assert read.run_queue == theirs["cpu_delay_total"] / 1e9


@pytest.mark.root
@pytest.mark.usefixtures("stopped")
def test_threads_that_have_ended_are_in_the_total() -> None:
    """A thread competes for a CPU and ends: its waiting stays in the total, and procfs has forgotten it."""
    program = """
import os, threading, time
os.sched_setaffinity(0, {0})
def spin():
    end = time.thread_time() + 0.2
    while time.thread_time() < end: pass
thread = threading.Thread(target=spin)
thread.start()
thread.join()
print(flush=True)
input()
"""
    with subprocess.Popen([sys.executable, "-c", program], stdin=subprocess.PIPE, stdout=subprocess.PIPE) as process:
        assert process.stdout is not None
        process.stdout.readline()
        until = time.monotonic() + 5
        while os.listdir(f"/proc/{process.pid}/task") != [str(process.pid)]:
            assert time.monotonic() < until
            time.sleep(0.01)
        with TaskStatsSocket() as taskstats:
            total = taskstats.read(process.pid).run_queue
        living = parse_task_schedstat(Path(f"/proc/{process.pid}/schedstat").read_bytes())
        process.kill()
    assert total > living + 0.1


@pytest.mark.root
def test_a_process_that_has_ended_is_vanished_and_the_socket_goes_on() -> None:
    """ESRCH is no failure, and the next process is answered over the same socket."""
    process = subprocess.Popen(["true"])
    process.wait()
    with TaskStatsSocket() as taskstats:
        for _ in range(2):
            with pytest.raises(Vanished):
                taskstats.read(process.pid)
            assert taskstats.read(os.getpid()).version >= 10


@pytest.mark.root
@pytest.mark.parametrize(
    ("command", "expected"),
    [
        (["setpriv", "--bounding-set=-net_admin"], "no_permission"),
        (["unshare", "--net"], "answered"),
        (["unshare", "--user", "--map-root-user"], "no_permission"),
    ],
)
def test_what_it_takes_to_ask(command: list[str], expected: str) -> None:
    """CAP_NET_ADMIN of the initial user namespace is needed; any network namespace will do."""
    program = """
import os
from shoal.kernel.files import Unavailable
from shoal.kernel.netlink.taskstats import TaskStatsSocket
try:
    with TaskStatsSocket() as taskstats:
        taskstats.read(os.getpid())
    print("answered")
except Unavailable as error:
    print(error.reason.value)
"""
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    answered = subprocess.run(
        [*command, sys.executable, "-c", program], check=True, capture_output=True, text=True, env=environment
    )
    assert answered.stdout.strip() == expected
