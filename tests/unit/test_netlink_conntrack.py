"""Connection tracking over nfnetlink, against pyroute2, conntrack(8), recorded kernels, and arbitrary bytes."""

from __future__ import annotations

import contextlib
import dataclasses
import json
import os
import re
import struct
import subprocess
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from pyroute2.netlink.nfnetlink.nfctsocket import AsyncNFCTSocket
from pyroute2.netlink.nlsocket import Marshal

from shoal.kernel.files import ParseError
from shoal.kernel.netlink.conntrack import (
    ConntrackStatistics,
    ConntrackTotals,
    parse_conntrack_statistics,
    parse_conntrack_totals,
)
from shoal.kernel.netlink.core import split

if TYPE_CHECKING:
    from collections.abc import Iterator

SCENE = Path(__file__).with_name("netlink_scene.py")
FIXTURES = Path(__file__).parent / "fixtures"
TOTALS = sorted(FIXTURES.glob("*/netlink/conntrack_stats.bin"))
STATISTICS = sorted(FIXTURES.glob("*/netlink/conntrack_stats_cpu.bin"))
NAMES = tuple(field.name for field in dataclasses.fields(ConntrackStatistics))
# enum ctattr_stats_cpu, in the order of NAMES
KINDS = (2, 4, 8, 9, 10, 11, 12, 13, 14, 15)

REFUSED = """
from shoal.kernel.files import Unavailable
from shoal.kernel.netlink.conntrack import read_conntrack_statistics, read_conntrack_totals
from shoal.kernel.netlink.sock_diag import read_listeners
read_listeners()
for read in (read_conntrack_totals, read_conntrack_statistics):
    try:
        read()
    except Unavailable as refusal:
        print(refusal.reason)
"""


def attribute(kind: int, value: int, size: int = 4) -> bytes:
    """Return an attribute with a big-endian number."""
    return struct.pack("=HH", 4 + size, kind) + value.to_bytes(size, "big")


def per_cpu(*values: int, cpu: int = 0) -> bytes:
    """Return the answer of one CPU: struct nfgenmsg and as many counters as are given, in the kernel's order."""
    return struct.pack(">BBH", 0, 0, cpu) + b"".join(map(attribute, KINDS, values))


def environment() -> dict[str, str]:
    """Return the environment in which a subprocess finds the exporter."""
    return os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)}


def test_the_fill_comes_with_its_limit() -> None:
    """Entries and nf_conntrack_max, both big-endian."""
    assert parse_conntrack_totals(bytes(4) + attribute(1, 300) + attribute(2, 262144)) == ConntrackTotals(300, 262144)


def test_an_old_kernel_does_not_tell_the_limit() -> None:
    """CTA_STATS_GLOBAL_MAX_ENTRIES came with 4.18."""
    assert parse_conntrack_totals(bytes(4) + attribute(1, 300)) == ConntrackTotals(300, None)


def test_counters_are_summed_over_cpus() -> None:
    """Each counter by its own attribute: ten different numbers, twice."""
    summed = parse_conntrack_statistics([per_cpu(*range(1, 11)), per_cpu(*range(100, 110), cpu=1)])
    assert dataclasses.asdict(summed) == {name: 101 + 2 * place for place, name in enumerate(NAMES)}


def test_what_a_kernel_does_not_send_is_unknown() -> None:
    """clash_resolve came with 5.10, chain_toolong with 5.15: absent, not 0."""
    summed = parse_conntrack_statistics([per_cpu(*range(1, 9))])
    assert (summed.search_restart, summed.clash_resolve, summed.chain_toolong) == (8, None, None)


def test_the_wrap_of_one_cpu_does_not_show() -> None:
    """The sum goes on by what was counted: 2 on CPU 0, past 2**32, and 3 on CPU 1."""
    most = 2**32 - 1
    before = parse_conntrack_statistics([per_cpu(most), per_cpu(1000)])
    after = parse_conntrack_statistics([per_cpu(1), per_cpu(1003)])
    assert (before.found, after.found) == (999, 1004)


def test_attributes_of_another_age_are_passed_over() -> None:
    """`searched` (1) is no longer sent, and what comes after 15 is not known yet."""
    summed = parse_conntrack_statistics([per_cpu(5) + attribute(1, 77) + attribute(16, 88, size=8)])
    assert summed.found == 5


@pytest.mark.parametrize("broken", [b"", b"\0\0\0", bytes(4) + b"\1", bytes(4) + attribute(2, 5, size=8)])
def test_broken_answers_are_malformed(broken: bytes) -> None:
    """Short, without whole attributes, or with a counter of another width."""
    with pytest.raises(ParseError, match="conntrack, line 2"):
        parse_conntrack_statistics([per_cpu(1), broken])
    with pytest.raises(ParseError, match="conntrack, line 1"):
        parse_conntrack_totals(broken)


def test_an_answer_without_numbers_is_malformed() -> None:
    """No CPU at all, CPUs without a known counter, and a total without entries are no zeros."""
    for messages in ([], [bytes(4)], [bytes(4) + attribute(99, 1)]):
        with pytest.raises(ParseError, match="at least one CPU"):
            parse_conntrack_statistics(messages)
    with pytest.raises(ParseError, match="CTA_STATS_GLOBAL_ENTRIES"):
        parse_conntrack_totals(bytes(4) + attribute(2, 5))


@given(st.lists(st.binary(max_size=120)))
def test_no_bytes_break_the_decoders(messages: list[bytes]) -> None:
    """Arbitrary messages are decoded or they are a ParseError."""
    with contextlib.suppress(ParseError):
        parse_conntrack_statistics(messages)
    for message in messages:
        with contextlib.suppress(ParseError):
            parse_conntrack_totals(message)


@given(st.integers(0, 90), st.binary(min_size=1, max_size=8), st.integers(0, 90))
def test_no_damage_breaks_the_decoders(place: int, damage: bytes, length: int) -> None:
    """So are good messages that were overwritten somewhere, or cut."""
    good = per_cpu(*range(10))
    damaged = (good[:place] + damage + good[place + len(damage) :])[:length]
    for parse in (lambda: parse_conntrack_statistics([damaged]), lambda: parse_conntrack_totals(damaged)):
        with contextlib.suppress(ParseError):
            parse()


def kernel(path: Path) -> str:
    """Name the kernel that a recording is from."""
    return path.parts[-3]


def by_pyroute2(data: bytes) -> Iterator[Any]:
    """Decode recorded messages with pyroute2."""
    marshal = Marshal()
    marshal.msg_map = AsyncNFCTSocket.policy
    decoded: Iterator[Any] = iter(marshal.parse(data))
    return decoded


@pytest.mark.skipif(not STATISTICS, reason="no recorded conntrack_stats_cpu.bin under tests/unit/fixtures")
@pytest.mark.parametrize("path", STATISTICS, ids=kernel)
def test_recorded_statistics_are_those_of_pyroute2(path: Path) -> None:
    """Replies of each recorded kernel, counter by counter."""
    data = path.read_bytes()
    theirs = [dict(each["attrs"]) for each in by_pyroute2(data) if each["header"]["type"] == 0x104]
    summed = parse_conntrack_statistics(message.body for message in split(data) if message.kind == 0x104)
    for name in NAMES:
        key = f"CTA_STATS_{name.upper()}"
        assert getattr(summed, name) == (sum(each[key] for each in theirs) if key in theirs[0] else None)
    version = tuple(map(int, re.findall(r"\d+", kernel(path))[:2]))
    assert (summed.clash_resolve is None) == (version < (5, 10))
    assert (summed.chain_toolong is None) == (version < (5, 15))


@pytest.mark.skipif(not TOTALS, reason="no recorded conntrack_stats.bin under tests/unit/fixtures")
@pytest.mark.parametrize("path", TOTALS, ids=kernel)
def test_recorded_totals_are_those_of_pyroute2(path: Path) -> None:
    """The one message of each recorded kernel."""
    data = path.read_bytes()
    expected = next(by_pyroute2(data))
    (totals,) = [parse_conntrack_totals(message.body) for message in split(data) if message.kind == 0x105]
    assert totals.entries == expected.get_attr("CTA_STATS_GLOBAL_ENTRIES")
    assert totals.limit == expected.get_attr("CTA_STATS_GLOBAL_MAX_ENTRIES")


@pytest.fixture(scope="module")
def scene() -> dict[str, Any]:
    """Return what ours, pyroute2 and conntrack(8) say of a network namespace with connections made for it."""
    command = ["unshare", "--net", sys.executable, str(SCENE), "conntrack"]
    answer: dict[str, Any] = json.loads(
        subprocess.run(command, check=True, stdout=subprocess.PIPE, env=environment()).stdout
    )
    return answer


@pytest.mark.root
def test_real_statistics_are_those_of_others(scene: dict[str, Any]) -> None:
    """Same sums as pyroute2 and conntrack -S, and they count what was done: five insertions, seven stray packets."""
    assert scene["statistics"] == scene["statistics_pyroute2"] == scene["statistics_tool"]
    assert scene["statistics"]["insert"] == 5
    assert scene["statistics"]["invalid"] >= 7


@pytest.mark.root
def test_real_totals_are_those_of_others(scene: dict[str, Any]) -> None:
    """Five entries put in by hand and three by packets, of this namespace alone; the limit is the sysctl's."""
    assert scene["totals"] == scene["totals_pyroute2"]
    assert scene["totals"]["entries"] == scene["entries_tool"] == 8
    assert scene["totals"]["limit"] == scene["limit_sysctl"]


@pytest.mark.root
@pytest.mark.parametrize("lost", ["net_admin", "all"])
def test_without_net_admin_conntrack_is_refused_and_listeners_are_not(lost: str) -> None:
    """EPERM becomes no_permission; sock_diag asks for nothing."""
    command = ["setpriv", f"--bounding-set=-{lost}", f"--inh-caps=-{lost}", sys.executable, "-c", REFUSED]
    answer = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True, env=environment())
    assert answer.stdout.split() == ["no_permission", "no_permission"]
