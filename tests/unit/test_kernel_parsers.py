"""The parsers of small kernel files: recorded bytes of several kernels, cut and damaged ones, and arbitrary ones."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from shoal.kernel.cgroups import parse_process_cgroups
from shoal.kernel.files import ParseError, parse_flat_keyed
from shoal.kernel.memory import parse_amount
from shoal.kernel.netstat import parse_netstat, read_netstat
from shoal.kernel.pressure import Pressure, parse_pressure, read_pressure
from shoal.kernel.sysctls import parse_sysctl, read_sysctl
from shoal.kernel.vmstat import read_vmstat

if TYPE_CHECKING:
    from collections.abc import Callable

FIXTURES = Path(__file__).parent / "fixtures"
KERNELS = sorted(path.name for path in FIXTURES.iterdir() if (path / "proc" / "vmstat").is_file())
PARSERS: tuple[Callable[[bytes], Any], ...] = (
    parse_pressure,
    parse_netstat,
    parse_sysctl,
    parse_amount,
    parse_process_cgroups,
    lambda data: parse_flat_keyed(data, "vmstat"),
)


def test_kernels_were_recorded() -> None:
    """The oldest and newest kernels that the project names are among the recordings."""
    assert {"5.10", "6.1", "6.12", "6.18"} <= set(KERNELS)


def test_pressure_some_and_full() -> None:
    """Both totals come in seconds; the averages are ignored."""
    data = (
        b"some avg10=5.00 avg60=1.00 avg300=0.10 total=24923345\nfull avg10=0.00 avg60=0.00 avg300=0.00 total=1500000\n"
    )
    assert parse_pressure(data) == Pressure(some=24.923345, full=1.5)


def test_pressure_with_one_line_only() -> None:
    """The irq file has no `some`, an old kernel's cpu has no `full`: absent, not 0."""
    assert parse_pressure(b"full avg10=0.00 avg60=0.00 avg300=0.00 total=0\n") == Pressure(some=None, full=0.0)


def test_pressure_with_more_than_is_known() -> None:
    """A new kind of line and a new field after total are passed over."""
    data = b"idle total=9\nsome avg10=0.00 total=2000000 p99=1\n"
    assert parse_pressure(data) == Pressure(some=2.0, full=None)


@pytest.mark.parametrize("data", [b"", b"some", b"some avg10=0.00", b"some total=", b"some total=-1", b"\x00\xff\n"])
def test_pressure_rejects_the_malformed(data: bytes) -> None:
    """Empty, cut short and binary input is refused."""
    with pytest.raises(ParseError):
        parse_pressure(data, "cpu.pressure")


@pytest.mark.parametrize("kernel", [kernel for kernel in KERNELS if (FIXTURES / kernel / "proc/pressure").is_dir()])
def test_pressure_of_recorded_kernels(kernel: str) -> None:
    """Every kernel has some for each resource, and full since 5.13 also for the node's cpu."""
    proc = FIXTURES / kernel / "proc" / "pressure"
    for resource in ("cpu", "memory", "io"):
        pressure = read_pressure(f"{proc}/{resource}")
        assert pressure.some is not None
        assert (pressure.full is None) == (resource == "cpu" and kernel == "5.10")


@pytest.mark.parametrize("kernel", KERNELS)
def test_netstat_of_recorded_kernels(kernel: str) -> None:
    """The four counters that are exported are there on every kernel, and so is the one for the reverse path."""
    counters = read_netstat(str(FIXTURES / kernel / "proc"), "self")
    wanted = {"ListenOverflows", "ListenDrops", "TCPReqQFullDrop", "TCPReqQFullDoCookies", "IPReversePathFilter"}
    assert wanted <= counters.keys()


def test_netstat_with_new_columns() -> None:
    """A counter that a newer kernel added is kept under its own name; the others stay where they were."""
    data = b"TcpExt: ListenOverflows Novel\nTcpExt: 51 7\nIpExt: InNoRoutes\nIpExt: 3\n"
    assert parse_netstat(data) == {"ListenOverflows": 51, "Novel": 7, "InNoRoutes": 3}


@pytest.mark.parametrize(
    ("data", "line"),
    [
        (b"", 1),
        (b"TcpExt: ListenOverflows\n", 2),
        (b"TcpExt: ListenOverflows\nTcpExt: 5", 2),
        (b"TcpExt: ListenOverflows ListenDrops\nTcpExt: 51\n", 2),
        (b"TcpExt: ListenOverflows\nIpExt: 51\n", 2),
        (b"TcpExt: A\nTcpExt: 1\nIpExt: B\nIpExt: x\n", 4),
        (b"\x00\x01\x02\n", 2),
        (b"\n\n", 2),
    ],
)
def test_netstat_rejects_the_malformed(data: bytes, line: int) -> None:
    """A file cut short must not shift values under the wrong names; the error names the line."""
    with pytest.raises(ParseError) as caught:
        parse_netstat(data)
    assert caught.value.line == line


@pytest.mark.parametrize("kernel", KERNELS)
def test_vmstat_and_sysctls_of_recorded_kernels(kernel: str) -> None:
    """oom_kill and somaxconn are there on every kernel, as whole numbers."""
    proc = str(FIXTURES / kernel / "proc")
    assert read_vmstat(proc)["oom_kill"] >= 0
    assert read_sysctl(proc, "net/core/somaxconn") == 4096


@pytest.mark.parametrize("data", [b"", b"max\n", b"1 2\n", b"\xff"])
def test_sysctl_rejects_what_is_no_number(data: bytes) -> None:
    """One whole number, or an error."""
    with pytest.raises(ParseError):
        parse_sysctl(data)


def test_amount() -> None:
    """Bytes, or None for no limit."""
    assert parse_amount(b"31457280\n") == 31457280
    assert parse_amount(b"max\n") is None
    for data in (b"", b"-1\n", b"1 2\n", b"maximum\n"):
        with pytest.raises(ParseError):
            parse_amount(data)


def test_process_cgroups() -> None:
    """The path of cgroup v2 comes before those of v1, each once; a name may have colons and bytes that are no text."""
    both = b"5:name=systemd:/x\n4:cpu,cpuacct:/y\n3:memory:/x\n0::/system.slice/a:b.service\n"
    assert parse_process_cgroups(both) == ("/system.slice/a:b.service", "/x", "/y")
    assert parse_process_cgroups(b"2:cpu:/a\n1:name=systemd:/a\n") == ("/a",)
    assert parse_process_cgroups(b"1:cpu:/a\n0::/a\n") == ("/a",)
    assert parse_process_cgroups(b"0::/../../kubepods\n") == ("/../../kubepods",)
    assert parse_process_cgroups(b"0::/\xff\n") == ("/\udcff",)
    for broken in (b"", b"0::/a", b"\n", b"0::\n", b"0:/a\n", b"x::/a\n", b"4:memory:/x\n0::x\n"):
        with pytest.raises(ParseError):
            parse_process_cgroups(broken)


@given(data=st.binary(max_size=400))
def test_arbitrary_bytes_give_a_value_or_a_parse_error(data: bytes) -> None:
    """No parser lets any other exception out."""
    for parse in PARSERS:
        try:
            parse(data)
        except ParseError as error:
            assert str(error)  # noqa: PT017  (either outcome is right)


@given(cut=st.integers(min_value=0, max_value=10_000))
def test_recorded_files_cut_anywhere(cut: int) -> None:
    """A real file cut at any byte is refused or gives only values that the whole file has too."""
    data = (FIXTURES / "6.1" / "proc" / "self" / "net" / "netstat").read_bytes()
    whole = parse_netstat(data)
    try:
        some = parse_netstat(data[:cut])
    except ParseError:
        return
    assert some.items() <= whole.items()
