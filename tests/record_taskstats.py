"""Record what the kernel answers about a process that has waited for everything, beside what /proc says of it.

Run as root in a throw-away virtual machine (see vm.sh), with nothing but Python 3.9 or newer:

    tests/vm.sh -w /tmp/out 6.1 -- python3 tests/record_taskstats.py /tmp/out/6.1

OUTDIR then holds reply.bin (the netlink answer to TASKSTATS_CMD_GET for the thread group, with its header),
stat and schedstat (of the same process, stopped and with a single thread, so that they cannot differ), and cpu.stat of
a cgroup that its quota stopped. It switches delay accounting on, limits memory, and adds swap, so only where
SHOAL_VM=1 is set.
"""

from __future__ import annotations

import contextlib
import mmap
import os
import signal
import socket
import struct
import subprocess
import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Callable

__all__ = ["main"]

CGROUPS = Path("/sys/fs/cgroup")
ACCOUNTING = Path("/proc/sys/kernel/task_delayacct")
MIB = 1 << 20
PAGE = 4096
HOT = 10 * MIB
NETLINK_GENERIC = 16
NLM_F_REQUEST = 1
GENL_ID_CTRL = 16
CTRL_CMD_GETFAMILY, CTRL_ATTR_FAMILY_ID, CTRL_ATTR_FAMILY_NAME = 3, 1, 2
TASKSTATS_CMD_GET, TASKSTATS_CMD_ATTR_TGID = 1, 2
GENL_HEADER_END = 20


def ask(kind: int, command: int, attribute: int, value: bytes) -> bytes:
    """Send one generic netlink request and return the answer exactly as received."""
    body = struct.pack("=BBH", command, 1, 0) + struct.pack("=HH", 4 + len(value), attribute) + value
    body += bytes(-len(body) % 4)
    with socket.socket(socket.AF_NETLINK, socket.SOCK_RAW, NETLINK_GENERIC) as link:
        link.bind((0, 0))
        link.send(struct.pack("=IHHII", 16 + len(body), kind, NLM_F_REQUEST, 1, 0) + body)
        return link.recv(1 << 16)


def family() -> int:
    """Return the number that this kernel gave to the family TASKSTATS."""
    answer = ask(GENL_ID_CTRL, CTRL_CMD_GETFAMILY, CTRL_ATTR_FAMILY_NAME, b"TASKSTATS\0")
    offset = GENL_HEADER_END
    while offset < len(answer):
        length, kind = struct.unpack_from("=HH", answer, offset)
        if kind == CTRL_ATTR_FAMILY_ID:
            return int(struct.unpack_from("=H", answer, offset + 4)[0])
        offset += (length + 3) & ~3
    message = "this kernel has no family TASKSTATS"
    raise SystemExit(message)


def run(command: str) -> None:
    """Run a shell command that must succeed."""
    subprocess.run(["sh", "-c", command], check=True, stdout=subprocess.DEVNULL)


def cgroup(name: str, **limits: str) -> Path:
    """Make a cgroup; `cpu_max="..."` is written to its cpu.max."""
    path = CGROUPS / name
    path.mkdir()
    for limit, value in limits.items():
        (path / limit.replace("_", ".", 1)).write_text(value)
    return path


def start(path: Path, job: Callable[[], None]) -> int:
    """Run a job for ever in a cgroup, on the second CPU, and return its process id."""
    pid = os.fork()
    if pid == 0:
        with contextlib.suppress(BaseException):
            (path / "cgroup.procs").write_text(str(os.getpid()))
            os.sched_setaffinity(0, {1})
            while True:
                job()
        os._exit(1)
    return pid


def spin() -> None:
    """Use the CPU for a while."""
    sum(range(100_000))


def wait_for_everything() -> None:
    """Wait for the disk, for swap, for reclaim, for pages just evicted, and for pages to be copied."""
    anonymous = mmap.mmap(-1, 30 * MIB, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    with open("/run/shoal/disk/file", "rb") as file:
        mapped = mmap.mmap(file.fileno(), 0, prot=mmap.PROT_READ)
        for _ in range(2):
            # Pages in use are activated; what then needs more room than there is evicts them, and they are missed.
            for _ in range(4):
                sum(mapped[offset] for offset in range(0, HOT, PAGE))
            for offset in range(0, len(anonymous), PAGE):
                anonymous[offset] = 1
            sum(mapped[offset] for offset in range(0, len(mapped), PAGE))
        child = os.fork()
        if child == 0:
            time.sleep(1)
            os._exit(0)
        for offset in range(0, 4 * MIB, PAGE):
            anonymous[offset] = 2
        os.waitpid(child, 0)
        mapped.close()


def main() -> int:
    """Build the scene, let it run, stop it, record."""
    out = Path(sys.argv[1])
    if os.environ.get("SHOAL_VM") != "1":
        message = "only in a virtual machine, with SHOAL_VM=1 set"
        raise SystemExit(message)
    out.mkdir(parents=True)
    (CGROUPS / "cgroup.subtree_control").write_text("+cpu +memory +io")
    if ACCOUNTING.exists():
        ACCOUNTING.write_text("1")
    run("mkdir -p /run/shoal && mount -t tmpfs -o size=500M none /run/shoal && mkdir /run/shoal/disk")
    run("modprobe loop; modprobe brd rd_nr=1 rd_size=102400; mkswap -q /dev/ram0 || mkswap /dev/ram0; swapon /dev/ram0")
    run("truncate -s 100M /run/shoal/image && mkfs.ext4 -q -F /run/shoal/image")
    run("mount -o loop /run/shoal/image /run/shoal/disk && head -c 40M /dev/zero >/run/shoal/disk/file && sync")
    Path("/proc/sys/vm/drop_caches").write_text("3")

    quota = cgroup("quota.service", cpu_max="10000 100000")
    waiting = cgroup("waiting.service", memory_max=str(24 * MIB))
    beside = cgroup("beside.service")
    spinners = [start(quota, spin), start(beside, spin)]
    pid = start(waiting, wait_for_everything)
    time.sleep(20)
    os.kill(pid, signal.SIGSTOP)
    time.sleep(1)
    Path(out, "reply.bin").write_bytes(
        ask(family(), TASKSTATS_CMD_GET, TASKSTATS_CMD_ATTR_TGID, struct.pack("=I", pid))
    )
    for name in ("stat", "schedstat"):
        Path(out, name).write_bytes(Path(f"/proc/{pid}/{name}").read_bytes())
    Path(out, "cpu.stat").write_bytes((quota / "cpu.stat").read_bytes())
    for process in (pid, *spinners):
        os.kill(process, signal.SIGKILL)
        os.waitpid(process, 0)
    print(f"recorded {os.uname().release} in {out}")  # noqa: T201 - a command's answer
    return 0


if __name__ == "__main__":
    sys.exit(main())
