"""Failure 4: a file system has no inodes left and plenty of space; a container's writable layer holds them."""

from __future__ import annotations

import errno
import os
import signal
from contextlib import contextmanager, suppress
from typing import TYPE_CHECKING, Final

from tests.lab.disk import disk
from tests.lab.fault import Culprit, Decoy, Fault, Shows
from tests.lab.node import libc, mount, ready, run

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

    from tests.lab.fault import Story
    from tests.lab.node import Node

_INODES: Final = 4096


def exhausted(node: Node) -> Story:
    """A container makes small files in its root, an overlay on an ext4 with few inodes, until it gets ENOSPC."""
    with disk("images", 128, "-N", str(_INODES)) as place, _overlay(place) as root, node.pod("thumbnails") as pod:
        yield Culprit({"mountpoint": str(place)}, instead={"/var/lib": str(place)})

        def fill() -> None:
            os.chroot(root)
            os.mkdir("/cache")
            with suppress_no_space():
                for number in range(2 * _INODES):
                    with open(f"/cache/{number}", "wb"):
                        pass
            ready()
            while True:
                signal.pause()

        pod.start(fill)
        yield None
        # Through the overlay: it keeps the inodes of files that are deleted behind its back (seen on 6.18).
        run("find", str(root / "cache"), "-type", "f", "-delete")
        yield None


@contextmanager
def _overlay(place: Path) -> Iterator[Path]:
    for name in ("lower", "upper", "work", "root"):
        (place / name).mkdir()
    root = place.parent / f"{place.name}-root"
    options = f"lowerdir={place}/lower,upperdir={place}/upper,workdir={place}/work"
    mount("overlay", root, "overlay", options=options)
    try:
        yield root
    finally:
        libc.umount2(bytes(root), 2)


@contextmanager
def suppress_no_space() -> Iterator[None]:
    """Go on when there is no space or no inode left."""
    try:
        yield
    except OSError as error:
        if error.errno != errno.ENOSPC:
            raise


def full_of_bytes(_node: Node) -> Story:
    """One large file fills another ext4 to the last byte; nearly all of its inodes are free."""
    with disk("logs", 32, "-N", str(_INODES)) as place:
        yield Culprit({"mountpoint": str(place)}, happened=lambda: os.statvfs(place).f_bavail == 0)
        with suppress(OSError), (place / "large").open("wb", buffering=0) as file:
            while file.write(bytes(1 << 20)):
                pass
        with suppress(OSError), (place / "small").open("wb", buffering=0) as file:
            while file.write(bytes(512)):
                pass
        yield None


def steady_three_quarters(_node: Node) -> Story:
    """Three quarters of the inodes are in use, and that is all there is to it."""
    with disk("mail", 32, "-N", str(_INODES)) as place:
        for number in range(_INODES * 3 // 4):
            (place / str(number)).touch()
        yield Culprit({"mountpoint": str(place)}, happened=lambda: os.statvfs(place).f_ffree < _INODES * 0.3)
        yield None


FAULT = Fault(
    number=4,
    title="Inodes run out while df shows space",
    alert="ShoalInodesExhausted",
    also=("ShoalInodesRunningOut",),
    signal="inodes_filesystems",
    story=exhausted,
    decoys=(Decoy(full_of_bytes), Decoy(steady_three_quarters)),
    confirm=(
        Shows("df -i /var/lib", r"\b4096 +4096 +0 +100%"),
        Shows("df -h /var/lib", r" [1-4]?\d% /"),
        Shows("touch /var/lib/shoal-test", "No space left on device"),
        Shows(r"find /var/lib -xdev -printf '%h\n' | sort | uniq -c | sort -n | tail -n 5", r"\d{4} \S+/upper/cache$"),
    ),
)
