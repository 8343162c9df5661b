"""A disk of the lab's own: an ext4 on a loop device, whose files are read from a device and cached like any other's."""

from __future__ import annotations

import os
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Final

from tests.lab.node import libc, run

if TYPE_CHECKING:
    from collections.abc import Iterator

__all__ = ["disk", "forget", "random_file"]

_DISKS: Final = Path("/run/disks")


@contextmanager
def disk(name: str, mebibytes: int, *options: str, below: Path = _DISKS) -> Iterator[Path]:
    """Make and mount a file system below /run/disks, with options for mkfs.ext4; it is gone after the block.

    What is written to it goes to a file in `below`, which is memory unless told otherwise.
    """
    image, place = below / f"{name}.image", _DISKS / name
    place.mkdir(parents=True)
    with image.open("wb") as file:
        file.truncate(mebibytes << 20)
    run("mkfs.ext4", "-q", "-F", "-m", "0", *options, str(image))
    run("mount", "-o", "loop", str(image), str(place))
    try:
        yield place
    finally:
        libc.umount2(bytes(place), 2)
        image.unlink()


def random_file(path: Path, mebibytes: int) -> Path:
    """Write a file of so many MiB to its disk, and leave nothing of it in memory."""
    with path.open("wb") as file:
        for _ in range(mebibytes):
            file.write(os.urandom(1 << 20))
        file.flush()
        os.fsync(file.fileno())
    forget(path)
    return path


def forget(path: Path) -> None:
    """Have the kernel drop a file's pages from memory."""
    with path.open("rb") as file:
        os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
