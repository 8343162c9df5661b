"""/proc/diskstats of several kernels and the tree of devices: rows of each width, and which disk a device stands on."""

from __future__ import annotations

import contextlib
import os
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from shoal.kernel.diskstats import Disk, disks_below, parse_diskstats, read_diskstats
from shoal.kernel.files import ParseError, Unavailable

FIXTURES = Path(__file__).parent / "fixtures"
ROW = b" 254       0 vda 112936 14511 7035410 52604 22503 71056 8030944 23281 0 13072 76414"


@pytest.mark.parametrize(
    ("rest", "flushes", "seconds"),
    [
        (b"", None, None),
        (b" 4987 40 963480 438", None, None),
        (b" 4987 40 963480 438 2309 89", 2309, 0.089),
        (b" 4987 40 963480 438 2309 89 7 new", 2309, 0.089),
    ],
    ids=["4.17", "4.18", "5.5", "newer"],
)
def test_rows_of_each_width(rest: bytes, flushes: int | None, seconds: float | None) -> None:
    """Flushes came last: a row that ends before them has none, which is not 0; what comes after them is passed over."""
    assert parse_diskstats(ROW + rest + b"\n") == {
        "vda": Disk(os.makedev(254, 0), 22503, 23.281, flushes, seconds),
    }


@pytest.mark.parametrize("kernel", ["5.10", "6.1", "6.12"])
def test_a_recorded_node(kernel: str) -> None:
    """The recorded kernels are younger than 5.5: every device has flushes, the loop device in use some of them."""
    disks = read_diskstats(f"{FIXTURES / kernel}/proc")
    assert disks["loop0"].flushes == 5
    assert all(disk.flushes is not None and disk.flush_seconds is not None for disk in disks.values())


@pytest.mark.parametrize(
    "data", [b"", ROW, b"254 0 vda 1 2 3\n", b"254 zero vda" + b" 1" * 11 + b"\n", b"\n", ROW + b" x 1 1 1 1 1\n"]
)
def test_the_malformed_is_refused(data: bytes) -> None:
    """A row cut short, one without numbers and an empty file are no disks."""
    with pytest.raises(ParseError):
        parse_diskstats(data)


@given(st.binary())
def test_arbitrary_bytes(data: bytes) -> None:
    """Nothing but a `ParseError` comes out of bytes that are no diskstats."""
    with contextlib.suppress(ParseError):
        parse_diskstats(data)


def test_the_disk_of_this_machine() -> None:
    """Every device here stands on devices that /proc/diskstats knows."""
    disks = read_diskstats("/proc")
    for name, disk in disks.items():
        below = disks_below("/sys", disk.device)
        assert below
        assert set(below) <= set(disks), name


def device(sys: Path, number: str, path: str, *slaves: str, partition: bool = False) -> None:
    """Lay a device out as sysfs does: a directory in the tree, a link by number, links to what it stands on."""
    directory = sys / "devices" / path
    (directory / "slaves").mkdir(parents=True)
    if partition:
        (directory / "partition").write_text("2\n")
    (sys / "dev/block").mkdir(parents=True, exist_ok=True)
    (sys / "dev/block" / number).symlink_to(f"../../devices/{path}")
    for slave in slaves:
        target = os.path.relpath(sys / "devices" / slave, directory / "slaves")
        (directory / "slaves" / Path(slave).name).symlink_to(target)


def test_partitions_and_mapped_devices(tmp_path: Path) -> None:
    """A volume on a mirror of two partitions flushes two disks; neither it, nor the mirror, nor a partition counts."""
    device(tmp_path, "8:0", "pci/block/sda")
    device(tmp_path, "8:2", "pci/block/sda/sda2", partition=True)
    device(tmp_path, "104:0", "pci/block/cciss!c0d0")
    device(tmp_path, "104:1", "pci/block/cciss!c0d0/cciss!c0d0p1", partition=True)
    device(tmp_path, "9:0", "virtual/block/md0", "pci/block/sda/sda2", "pci/block/cciss!c0d0/cciss!c0d0p1")
    device(tmp_path, "253:7", "virtual/block/dm-7", "virtual/block/md0")
    assert disks_below(str(tmp_path), os.makedev(8, 0)) == ["sda"]
    assert disks_below(str(tmp_path), os.makedev(8, 2)) == ["sda"]
    assert disks_below(str(tmp_path), os.makedev(253, 7)) == ["cciss/c0d0", "sda"]


def test_a_number_without_a_device(tmp_path: Path) -> None:
    """tmpfs, overlay and NFS have numbers that no block device has."""
    with pytest.raises(Unavailable):
        disks_below(str(tmp_path), os.makedev(0, 45))


def test_devices_that_go_round_in_a_circle(tmp_path: Path) -> None:
    """A tree that no kernel makes ends too."""
    device(tmp_path, "253:0", "virtual/block/dm-0", "virtual/block/dm-1")
    device(tmp_path, "253:1", "virtual/block/dm-1", "virtual/block/dm-0")
    assert disks_below(str(tmp_path), os.makedev(253, 0))
