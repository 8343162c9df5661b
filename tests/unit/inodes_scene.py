"""Mount file systems of every kind in the mount namespace that this runs in, and print what each reader sees.

Run by the tests of the inodes collector under `unshare --mount`, so that nothing is mounted in the namespace of others:

    unshare --mount python inodes_scene.py full|decoys|fuse|layer DIRECTORY

The answer is one JSON object: what the collector says, what df and du say.
"""

from __future__ import annotations

import contextlib
import ctypes
import errno
import json
import os
import signal
import struct
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

from shoal.collectors.inodes import InodesCollector
from shoal.inventory import Node
from shoal.kernel.cgroups import find_hierarchy
from shoal.kernel.files import Roots
from shoal.settings import resolve

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

libc = ctypes.CDLL(None, use_errno=True)

# linux/fuse.h
FUSE_INIT, FUSE_FORGET = 26, 2
FUSE_IN_HEADER = struct.Struct("=IIQQIIII")
FUSE_OUT_HEADER = struct.Struct("=IiQ")
FUSE_INIT_OUT = struct.Struct("=IIIIHHIIHHI28x")
CONTAINER = f"c0ffee{os.getpid():058x}"


def run(*command: str) -> str:
    """Run a program and return what it printed."""
    return subprocess.run(command, check=True, capture_output=True, text=True).stdout


def mount(source: str, target: Path, fstype: str, options: str) -> None:
    """Make a mount by the system call, since the program would look at a file system that hangs."""
    target.mkdir(parents=True, exist_ok=True)
    if libc.mount(source.encode(), bytes(target), fstype.encode(), 0, options.encode()):
        raise OSError(ctypes.get_errno(), f"mounting {fstype} at {target}")


def ext4(directory: Path, name: str, inodes: int, size: str) -> Path:
    """Make and mount an ext4 with so many inodes; return where it is mounted."""
    image, target = directory / f"{name}.image", directory / name
    target.mkdir()
    run("truncate", "-s", size, str(image))
    run("mkfs.ext4", "-q", "-F", "-N", str(inodes), "-m", "0", str(image))
    run("mount", "-o", "loop", str(image), str(target))
    return target


def fill_with_files(directory: Path) -> int:
    """Make empty files until there is no inode left; return how many."""
    made = 0
    while True:
        try:
            (directory / f"file{made}").touch()
        except OSError as error:
            if error.errno != errno.ENOSPC:
                raise
            return made
        made += 1


def fill_with_bytes(directory: Path) -> None:
    """Write one file until there is no space left."""
    with contextlib.suppress(OSError), (directory / "large").open("wb", buffering=0) as file:
        while True:
            file.write(bytes(1 << 20))


class Scene:
    """A collector that sees the mounts of this process."""

    def __init__(self, directory: Path) -> None:
        """Lay a proc beside the real one, whose process 1 is this process."""
        self.directory = directory
        proc = directory / "proc"
        proc.mkdir()
        own = os.getpid()
        (proc / "1").symlink_to(f"/proc/{own}")
        (proc / str(own)).symlink_to(f"/proc/{own}")
        (proc / "self").symlink_to(str(own))
        self.roots = Roots(proc=str(proc))
        self.collector = InodesCollector(resolve({}, {}))
        self.collector._layers._roots = self.roots

    def show(self, pid: int) -> None:
        """Let a process that has come since then be seen."""
        (self.directory / "proc" / str(pid)).symlink_to(f"/proc/{pid}")

    def scrape(self) -> dict[str, dict[str, float]]:
        """Return {metric: {labels, joined by commas, empty ones left out: value}}, and the seconds that it took."""
        began = time.monotonic()
        families = self.collector.read(Node(self.roots))
        took = time.monotonic() - began
        found = {
            family.metric.name: {",".join(filter(None, labels)): value for labels, value in family.samples}
            for family in families
        }
        return {**found, "took": {"": took}}

    def threads(self) -> int:
        """Return how many threads hang."""
        return sum(thread.name == "shoal-watchdog" for thread in threading.enumerate())


def df_inodes(*places: Path) -> dict[str, list[int]]:
    """Return {place: [inodes, free inodes, free bytes]} as df has it."""
    rows = run("df", "--output=target,itotal,iavail,avail", "-B1", *map(str, places)).splitlines()[1:]
    return {row.split()[0]: [int(number) for number in row.split()[1:]] for row in rows}


def full(directory: Path) -> dict[str, Any]:
    """An overlay on a small ext4 is filled with small files until ENOSPC."""
    scene = Scene(directory)
    disk = ext4(directory, "disk", 256, "64M")
    for name in ("upper", "work"):
        (disk / name).mkdir()
    before = scene.scrape()
    merged, lower = directory / "merged", directory / "lower"
    lower.mkdir()
    mount("overlay", merged, "overlay", f"lowerdir={lower},upperdir={disk}/upper,workdir={disk}/work")
    made = fill_with_files(merged)
    return {"before": before, "after": scene.scrape(), "made": made, "disk": str(disk), "df": df_inodes(disk)}


def decoys(directory: Path) -> dict[str, Any]:
    """What looks like it and is not: no bytes left, a full tmpfs, read-only, covered and bound mounts."""
    scene = Scene(directory)
    bytes_full = ext4(directory, "bytes", 256, "32M")
    fill_with_bytes(bytes_full)
    tmpfs = directory / "tmpfs"
    mount("tmpfs", tmpfs, "tmpfs", "nr_inodes=10")
    fill_with_files(tmpfs)
    read_only = ext4(directory, "read_only", 256, "16M")
    run("mount", "-o", "remount,ro", str(read_only))
    covered = ext4(directory, "covered", 256, "16M")
    mount("tmpfs", covered, "tmpfs", "")
    bound = directory / "a"
    bound.mkdir()
    (bytes_full / "part").mkdir()
    run("mount", "--bind", str(bytes_full / "part"), str(bound))
    places = {
        "bytes": bytes_full,
        "tmpfs": tmpfs,
        "read_only": read_only,
        "covered": covered,
        "bound": bound,
    }
    numbers = df_inodes(*places.values(), Path("/"))
    return {
        "scrape": scene.scrape(),
        "df": numbers,
        "places": {name: str(place) for name, place in places.items()},
        "root": run("findmnt", "-n", "-o", "SOURCE,FSTYPE,TARGET", "/").split(),
    }


class Fuse:
    """A file system that answers nothing but the greeting."""

    def __init__(self, target: Path) -> None:
        """Mount it and greet the kernel."""
        self.fd = os.open("/dev/fuse", os.O_RDWR)
        mount("hanging", target, "fuse", f"fd={self.fd},rootmode=40000,user_id=0,group_id=0")
        request = os.read(self.fd, 1 << 16)
        _, opcode, unique, *_ = FUSE_IN_HEADER.unpack_from(request)
        if opcode != FUSE_INIT:
            raise OSError(errno.EPROTO, f"the kernel began with {opcode}")
        greeting = FUSE_INIT_OUT.pack(7, 31, 0, 0, 0, 0, 4096, 0, 0, 0, 0)
        os.write(self.fd, FUSE_OUT_HEADER.pack(FUSE_OUT_HEADER.size + len(greeting), 0, unique) + greeting)

    def end(self) -> None:
        """Die: whoever waits is told so."""
        os.close(self.fd)


def fuse(directory: Path) -> dict[str, Any]:
    """Six file systems hang beside one that does not; then their servers die, and the mounts go."""
    scene = Scene(directory)
    disk = ext4(directory, "disk", 256, "16M")
    places = [directory / f"fuse{number}" for number in range(6)]
    servers = [Fuse(place) for place in places[:1]]
    one = scene.scrape()
    servers += [Fuse(place) for place in places[1:]]
    several = [scene.scrape() for _ in range(3)]
    hanging = scene.threads()
    for server in servers:
        server.end()
    time.sleep(0.5)
    dead = scene.scrape()
    for place in places:
        libc.umount2(bytes(place), 2)
    gone = scene.scrape()
    return {
        "one": one,
        "several": several,
        "hanging": hanging,
        "dead": dead,
        "gone": gone,
        "left": scene.threads(),
        "disk": str(disk),
        "places": [str(place) for place in places],
    }


@contextlib.contextmanager
def container(merged: Path, work: Callable[[], None]) -> Iterator[int]:
    """Run a process whose root is `merged`, in a cgroup that is named as Docker names it; it works, then sleeps."""
    cgroup = Path(find_hierarchy("/sys").mount, f"docker-{CONTAINER}.scope")
    cgroup.mkdir()
    receive, send = os.pipe()
    pid = os.fork()
    if pid == 0:
        try:
            (cgroup / "cgroup.procs").write_text(str(os.getpid()))
            os.chroot(merged)
            os.chdir("/")
            work()
            os.write(send, b".")
            signal.pause()
        finally:
            os._exit(1)
    os.close(send)
    try:
        if os.read(receive, 1) != b".":
            raise RuntimeError("the process in the container did not begin")
        yield pid
    finally:
        os.kill(pid, signal.SIGKILL)
        os.waitpid(pid, 0)
        while (cgroup / "cgroup.procs").read_text():
            time.sleep(0.01)
        cgroup.rmdir()


def layer(directory: Path) -> dict[str, Any]:
    """A container writes 300 files, of which one has two names, and deletes 50 of its image."""
    scene = Scene(directory)
    disk = ext4(directory, "disk", 2048, "64M")
    lower, merged, upper = directory / "lower", directory / "merged", disk / "up, \\per=1"
    lower.mkdir()
    for number in range(50):
        (lower / f"image{number}").touch()
    upper.mkdir()
    (disk / "work").mkdir()
    escaped = str(upper).replace("\\", "\\\\").replace(",", "\\,")
    mount("overlay", merged, "overlay", f"lowerdir={lower},upperdir={escaped},workdir={disk}/work")

    def work() -> None:
        for number in range(300):
            directory = Path(f"/d{number % 7}")
            directory.mkdir(exist_ok=True)
            (directory / f"f{number}").touch()
        os.link("/d0/f0", "/d0/again")
        os.symlink("/", "/d1/out")
        for number in range(50):
            Path(f"/image{number}").unlink()

    with container(merged, work) as pid:
        scene.show(pid)
        before = scene.scrape()
        scene.collector._layers.round()
        after = scene.scrape()
    return {
        "before": before,
        "after": after,
        "gone": scene.scrape(),
        "disk": str(disk),
        "container": CONTAINER[:12],
        "du": int(run("du", "--inodes", "-s", str(upper)).split()[0]),
        "df": df_inodes(disk),
    }


def main() -> int:
    """Play one scene."""
    # What is mounted here must not appear elsewhere, whatever the namespace was made with.
    run("mount", "--make-rprivate", "/")
    scenes: dict[str, Callable[[Path], dict[str, Any]]] = {"full": full, "decoys": decoys, "fuse": fuse, "layer": layer}
    json.dump(scenes[sys.argv[1]](Path(sys.argv[2])), sys.stdout)
    return 0


if __name__ == "__main__":
    sys.exit(main())
