"""Connection tracking of any namespace from proc, against netlink, conntrack(8) and recorded kernels."""

from __future__ import annotations

import contextlib
import dataclasses
import os
import subprocess
import sys
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from shoal.kernel.conntrack import parse_conntrack_table, read_conntrack_table
from shoal.kernel.files import ParseError
from shoal.kernel.netlink.conntrack import parse_conntrack_statistics
from shoal.kernel.netlink.core import split

FIXTURES = Path(__file__).parent / "fixtures"
RECORDED = sorted(FIXTURES.glob("*/proc/1/net/stat/nf_conntrack"))

HEADER = (
    b"entries  clashres found new invalid ignore delete chainlength insert insert_failed drop early_drop icmp_error"
    b"  expect_new expect_create expect_delete search_restart\n"
)
OLD_HEADER = HEADER.replace(b"clashres", b"searched").replace(b"chainlength", b"delete_list")
NUMBERS = {
    "clash_resolve": 1,
    "found": 2,
    "invalid": 4,
    "chain_toolong": 7,
    "insert": 8,
    "insert_failed": 9,
    "drop": 10,
    "early_drop": 11,
    "error": 12,
    "search_restart": 16,
}

WITNESS = """
import dataclasses, json, os, re, socket, subprocess, sys
from shoal.kernel.conntrack import read_conntrack_table
from shoal.kernel.netlink.conntrack import read_conntrack_statistics, read_conntrack_totals
subprocess.run(["ip", "link", "set", "lo", "up"], check=True)
subprocess.run(["nft", "add table inet t; add chain inet t c { type filter hook input priority 0; };"
                "add rule inet t c ct state new"], check=True)
with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as sock:
    for port in range(1, 30):
        sock.sendto(b"new", ("127.0.0.1", port))
with socket.socket(socket.AF_INET, socket.SOCK_RAW, socket.IPPROTO_TCP) as raw:
    for _ in range(7):
        raw.sendto(bytes(20), ("127.0.0.1", 0))
here = read_conntrack_table("/proc", "self")
assert here.entries == read_conntrack_totals().entries >= 29, here
assert here.statistics == read_conntrack_statistics(), here
tool = subprocess.run(["conntrack", "-S"], check=True, capture_output=True, text=True).stdout
for name, ours in dataclasses.asdict(here.statistics).items():
    name = "chaintoolong" if name == "chain_toolong" else name
    assert ours == sum(int(number) for number in re.findall(rf"\\b{name}=(\\d+)", tool)), (name, ours, tool)
assert here.statistics.invalid >= 7
print(os.getpid(), here.entries, here.statistics.invalid, flush=True)
sys.stdin.read()
"""


def row(*numbers: int) -> bytes:
    """Return a line as the kernel prints it."""
    return b" ".join(b"%08x" % number for number in numbers) + b"\n"


def test_each_column_is_its_own() -> None:
    """Seventeen different numbers, on two CPUs, hexadecimal; the entries are the namespace's and not summed."""
    table = parse_conntrack_table(HEADER + row(255, *range(1, 17)) + row(255, *range(101, 117)))
    assert table.entries == 255
    assert dataclasses.asdict(table.statistics) == {name: 100 + 2 * place for name, place in NUMBERS.items()}


def test_an_old_kernel_counted_something_else_there() -> None:
    """Before 5.10 the second column, before 5.15 the eighth, meant something else: absent, not 0."""
    statistics = parse_conntrack_table(OLD_HEADER + row(5, *range(1, 17))).statistics
    assert (statistics.clash_resolve, statistics.chain_toolong) == (None, None)
    assert statistics.search_restart == 16


def test_the_wrap_of_one_cpu_does_not_show() -> None:
    """As over netlink: the sum goes on by what was counted."""
    columns = [0] * 17
    columns[10] = 2**32 - 1
    before = parse_conntrack_table(HEADER + row(*columns) + row(*[0] * 10, 1000, *[0] * 6))
    after = parse_conntrack_table(HEADER + row(*[0] * 10, 1, *[0] * 6) + row(*[0] * 10, 1003, *[0] * 6))
    assert (before.statistics.drop, after.statistics.drop) == (999, 1004)


def test_equal_lines_are_counted_as_often_as_they_are_there() -> None:
    """Three CPUs that counted the same are three."""
    assert parse_conntrack_table(HEADER + row(*range(17)) * 3).statistics.drop == 30


def test_new_columns_change_nothing() -> None:
    """Columns are found by name, so one more at the end or in between is passed over."""
    data = HEADER.replace(b" drop", b" novel drop").replace(b"\n", b" more\n") + row(*range(19))
    assert parse_conntrack_table(data).statistics.drop == 11


@pytest.mark.parametrize(
    "broken",
    [
        b"",
        b"\n",
        HEADER,
        HEADER[:-1],
        b"drop found\n0 0\n",
        HEADER + b"0 0\n",
        HEADER + row(*range(17))[:-3],
        HEADER + row(*range(17)) + b"x " * 17 + b"\n",
    ],
)
def test_what_is_short_or_malformed_is_refused(broken: bytes) -> None:
    """No line of a CPU, half a number, other names, no numbers: never a zero."""
    with pytest.raises(ParseError, match="net/stat/nf_conntrack"):
        parse_conntrack_table(broken)


@given(st.binary(max_size=300) | st.builds(lambda tail: HEADER + tail, st.binary(max_size=300)))
def test_no_bytes_break_the_parser(data: bytes) -> None:
    """Arbitrary bytes are a table or a ParseError."""
    with contextlib.suppress(ParseError):
        parse_conntrack_table(data)


@pytest.mark.parametrize("path", RECORDED, ids=lambda path: path.parts[-6])
def test_recorded_tables_are_those_of_netlink(path: Path) -> None:
    """The same node recorded both ways: equal but for what went on counting between the two recordings."""
    table = parse_conntrack_table(path.read_bytes())
    proc = path.parents[3]
    assert table.entries == int((proc / "sys/net/netfilter/nf_conntrack_count").read_text())
    recording = (proc.parent / "netlink/conntrack_stats_cpu.bin").read_bytes()
    theirs = parse_conntrack_statistics(message.body for message in split(recording) if message.kind == 0x104)
    for name, ours in dataclasses.asdict(table.statistics).items():
        other = getattr(theirs, name)
        assert (ours is None) == (other is None), name
        assert ours is None or abs(ours - other) <= 0.1 * other, name


@pytest.mark.root
def test_a_namespace_is_read_from_outside() -> None:
    """What netlink and conntrack -S say inside is what proc says outside, without entering; the own one is another."""
    command = ["unshare", "--net", sys.executable, "-c", WITNESS]
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)}
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=environment) as inside:
        assert inside.stdout
        pid, entries, invalid = map(int, inside.stdout.readline().split())
        table = read_conntrack_table("/proc", pid)
        assert (table.entries, table.statistics.invalid) == (entries, invalid)
        inside.communicate("")
    assert inside.returncode == 0
