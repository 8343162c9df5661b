"""From a data directory to the disks that flush for it, on trees of files laid out like a node's."""

from __future__ import annotations

import os
from typing import TYPE_CHECKING

import pytest

from shoal.collectors.redis_aof import _mount_of, _volume
from shoal.inventory import Node
from shoal.kernel.files import Reason, Roots, Unavailable, Vanished
from shoal.redis.server import Reading

if TYPE_CHECKING:
    from pathlib import Path

ROOT = "27 1 254:1 / / rw - ext4 /dev/vda1 rw"
PROC = "28 27 0:21 / /proc rw - proc proc rw"
SLOW = "29 27 8:17 / /var/lib rw - xfs /dev/sdb1 rw"
DATA = r"30 27 253:3 /pvc /data\040of\040redis rw - ext4 /dev/mapper/data rw"
OVER = r"31 27 8:33 / /data\040of\040redis rw - ext4 /dev/sdc1 rw"
OVERLAY = "40 1 0:51 / / rw - overlay overlay rw,lowerdir=/l,upperdir=/var/lib/containerd/9/fs,workdir=/w"
NFS = "41 40 0:60 / /mnt rw - nfs4 filer:/export rw"


def mounted(proc: Path, pid: int, *rows: str) -> None:
    """Write what a process sees mounted."""
    (proc / str(pid)).mkdir(parents=True)
    (proc / str(pid) / "mountinfo").write_text("".join(f"{row}\n" for row in rows))


@pytest.mark.parametrize(
    ("directory", "device"),
    [
        ("/", (254, 1)),
        ("/var/libs", (254, 1)),
        ("/var/lib", (8, 17)),
        ("/var/lib/redis", (8, 17)),
        ("/data of redis/appendonlydir", (8, 33)),
    ],
)
def test_the_mount_of_a_directory(tmp_path: Path, directory: str, device: tuple[int, int]) -> None:
    """The longest mount point above it, by whole names, and the last of those that cover each other."""
    mounted(tmp_path, 7, ROOT, PROC, SLOW, DATA, OVER)
    assert _mount_of(str(tmp_path), 7, directory).device == os.makedev(*device)


def test_a_containers_own_layer(tmp_path: Path) -> None:
    """Data in a container's writable layer is where the runtime keeps that layer, as the node sees it."""
    mounted(tmp_path, 1, ROOT, PROC, SLOW)
    mounted(tmp_path, 7, OVERLAY, PROC, NFS)
    assert _mount_of(str(tmp_path), 7, "/data").device == os.makedev(8, 17)


def test_no_block_device(tmp_path: Path) -> None:
    """Data on NFS are on no disk of this node, and nothing of that file system is touched."""
    mounted(tmp_path / "proc", 7, OVERLAY, NFS)
    node = Node(Roots(f"{tmp_path}/proc", f"{tmp_path}/sys", str(tmp_path)))
    with pytest.raises(Unavailable, match="nfs4") as caught:
        _volume(node, 7, Reading({}, {"dir": "/mnt/redis"}, {}, 7))
    assert caught.value.reason is Reason.NOT_READABLE


def test_without_config(tmp_path: Path) -> None:
    """Where CONFIG is refused, the process's own directory tells; where that is refused too, the reason is that."""
    mounted(tmp_path / "proc", 7, ROOT, SLOW)
    (tmp_path / "proc/7/cwd").symlink_to("/var/lib/redis")
    node = Node(Roots(f"{tmp_path}/proc", f"{tmp_path}/sys", str(tmp_path)))
    refused = Unavailable(Reason.NO_PERMISSION, "CONFIG is refused")
    assert _volume(node, 7, Reading({}, refused, refused, 7)) == os.makedev(8, 17)
    assert _volume(node, 7, Reading({}, {"dir": "/srv"}, refused, 7)) == os.makedev(254, 1)
    (tmp_path / "proc/7/cwd").unlink()
    with pytest.raises(Unavailable):
        _volume(node, 7, Reading({}, refused, refused, 7))
    with pytest.raises(Vanished):
        _volume(node, 8, Reading({}, {"dir": "/srv"}, refused, 8))
