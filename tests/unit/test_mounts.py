"""mountinfo: what is mounted where, however it is named, and where an overlay keeps what is written to it."""

from __future__ import annotations

import contextlib
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from shoal.kernel.files import ParseError, Vanished
from shoal.kernel.mounts import Mount, parse_mountinfo, parse_upper_directory, read_mounts, read_upper_directory

FIXTURES = Path(__file__).parent / "fixtures"


def test_a_row() -> None:
    """Every field that is used, with optional fields before the dash, known and unknown."""
    row = b"36 35 98:1 /sub /mnt rw,noatime master:1 new:field - ext3 /dev/root rw,errors=continue\n"
    assert parse_mountinfo(row) == [
        Mount(
            device=os.makedev(98, 1),
            root="/sub",
            mount_point="/mnt",
            read_only=False,
            fstype="ext3",
            source="/dev/root",
            options=("rw", "errors=continue"),
        )
    ]


@pytest.mark.parametrize(
    ("row", "expected"),
    [
        (b"1 1 8:1 / / rw - ext4 /dev/sda1 rw", False),
        (b"1 1 8:1 / / ro,relatime - ext4 /dev/sda1 rw", True),
        (b"1 1 8:1 / / rw - ext4 /dev/sda1 ro", True),
        (b"1 1 8:1 / / rw - ext4 /dev/sda1 rw,errors=remount-ro", False),
    ],
)
def test_read_only_is_the_mount_or_the_file_system(row: bytes, *, expected: bool) -> None:
    """Either makes it so, and no option that only sounds like it does."""
    assert parse_mountinfo(row + b"\n")[0].read_only is expected


def test_escapes_and_an_empty_source() -> None:
    """Blanks, tabs, line breaks, backslashes and # are octal; a source may be nothing at all; bytes may be any."""
    row = (
        rb"1 1 0:5 /\043 /a\040b\011c\012d\134e\134040 rw - tmpfs  rw,size=1k" + b"\n1 1 0:6 / /\xff rw - tmpfs x rw\n"
    )
    first, second = parse_mountinfo(row)
    assert (first.root, first.mount_point, first.source) == ("/#", "/a b\tc\nd\\e\\040", "")
    assert os.fsencode(second.mount_point) == b"/\xff"


@pytest.mark.parametrize(
    "data",
    [
        b"",
        b"\n",
        b"36 35 98:1 / /mnt rw - ext3 /dev/root\n",
        b"36 35 98:1 / /mnt rw - ext3 /dev/root rw",
        b"36 35 98:1 / /mnt rw master:1 ext3 /dev/root rw\n",
        b"36 35 98 / /mnt rw - ext3 /dev/root rw\n",
        b"36 35 a:b / /mnt rw - ext3 /dev/root rw\n",
        b"36 - 98:1 / /mnt rw ext3 /dev/root rw\n",
    ],
)
def test_a_malformed_row_is_refused(data: bytes) -> None:
    """Short rows, a missing dash and a device that is none are told with their line."""
    with pytest.raises(ParseError):
        parse_mountinfo(data)


@given(st.binary(max_size=300))
def test_arbitrary_bytes_are_parsed_or_refused(data: bytes) -> None:
    """No bytes make anything but mounts or `ParseError`, at the end of a good row either."""
    for start in (b"", b"36 35 98:0 / /mnt rw - ext3 /dev/root rw\n"):
        for parse in (parse_mountinfo, parse_upper_directory):
            with contextlib.suppress(ParseError):
                parse(start + data)


@pytest.mark.parametrize("kernel", ["5.10", "6.1", "6.12"])
def test_a_recorded_node(kernel: str) -> None:
    """Real mountinfo, with overlays, a loop device and namespaces that are mounts."""
    mounts = read_mounts(f"{FIXTURES}/{kernel}/proc", 1)
    by_place = {mount.mount_point: mount for mount in mounts}
    assert by_place["/"].fstype == "9p"
    assert by_place["/"].read_only
    assert by_place["/sys/fs/cgroup"].fstype == "cgroup2"
    assert by_place["/run/shoal-disk"].device == os.makedev(7, 0)
    assert by_place["/etc"].fstype == "overlay"
    assert any(mount.root.startswith("net:[") for mount in mounts)
    assert read_upper_directory(f"{FIXTURES}/{kernel}/proc", 1) is None


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        (rb"rw,lowerdir=/l,upperdir=/var/lib/x/1/fs,workdir=/w", "/var/lib/x/1/fs"),
        (rb"rw,lowerdir=/l,upperdir=/a\040b\134\054c\134\134d,workdir=/w", "/a b,c\\d"),
        (rb"rw,lowerdir=l/A:l/B,upperdir=abc/diff,workdir=abc/work", "abc/diff"),
        (rb"ro,lowerdir=/l:/m", None),
    ],
)
def test_where_an_overlay_keeps_what_is_written(options: bytes, expected: str | None) -> None:
    """The kernel escapes what overlayfs had escaped already; an overlay without an upper layer keeps nothing."""
    assert parse_upper_directory(b"1 1 0:9 / / rw - overlay overlay " + options + b"\n") == expected


def test_the_root_alone_is_the_writable_layer() -> None:
    """An overlay elsewhere is not the container's, and what was mounted over the root last is the root."""
    rows = b"1 1 0:9 / / rw - ext4 /dev/sda rw\n2 1 0:10 / /data rw - overlay o rw,upperdir=/u\n"
    assert parse_upper_directory(rows) is None
    rows += b"3 1 0:11 / / rw - overlay o rw,upperdir=/v\n"
    assert parse_upper_directory(rows) == "/v"


def test_a_process_that_has_ended() -> None:
    """Its mountinfo is gone, which is no kernel's lack."""
    process = subprocess.Popen(["true"])
    process.wait()
    for reader in (read_mounts, read_upper_directory):
        with pytest.raises(Vanished):
            reader("/proc", process.pid)


def test_a_process_without_a_root_is_refused() -> None:
    """A row that is not understood elsewhere costs nothing; without one for / there is nothing to say."""
    assert parse_upper_directory(b"nonsense\n1 1 0:9 / / rw - overlay o rw,upperdir=/u\n") == "/u"
    for data in (b"", b"1 1 0:9 / /x rw - overlay o rw,upperdir=/u\n", b"1 1 0:9 / / rw - overlay\n"):
        with pytest.raises(ParseError):
            parse_upper_directory(data)


@pytest.mark.root
def test_libmount_sees_the_same(tmp_path: Path) -> None:
    """Every mount of a namespace is as findmnt has it, also where some are named to cause trouble."""
    names = ["a b", "tab\there", "line\nbreak", "back\\slash", "\\040", "#hash", "ünïcode 🐟", 'quo"te']
    for name in names:
        (tmp_path / name).mkdir()
    program = f"""
import dataclasses, json, os, subprocess
from shoal.kernel.mounts import read_mounts
for place in {[str(tmp_path / name) for name in names]!r}:
    source = "source of " + os.path.basename(place)
    subprocess.run(["mount", "-t", "tmpfs", "-o", "size=64k", source, place], check=True)
findmnt = ["findmnt", "--kernel", "--list", "--json", "-o", "TARGET,SOURCE,FSTYPE,MAJ:MIN"]
theirs = json.loads(subprocess.run(findmnt, check=True, capture_output=True, text=True).stdout)
print(json.dumps([[dataclasses.asdict(mount) for mount in read_mounts("/proc", os.getpid())], theirs]))
"""
    command = ["unshare", "--mount", sys.executable, "-c", program]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    answer = subprocess.run(command, check=True, capture_output=True, text=True, env=environment)
    ours, theirs = json.loads(answer.stdout)
    expected = [
        (row["target"], row["source"] or "", row["fstype"], row["maj:min"].strip()) for row in theirs["filesystems"]
    ]
    found = []
    for mount in ours:
        # It writes the root of a bind mount behind its source.
        source = mount["source"] + (f"[{mount['root']}]" if mount["root"] != "/" else "")
        device = f"{os.major(mount['device'])}:{os.minor(mount['device'])}"
        found.append((mount["mount_point"], source, mount["fstype"], device))
    assert found == expected
    assert {str(tmp_path / name) for name in names} <= {place for place, *_ in found}
