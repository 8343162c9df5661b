"""Record the kernel files and netlink replies that the exporter reads, as a tree that tests use in place of / .

Run as root, on any machine, with nothing but Python 3.9 or newer:

    python3 tests/record_fixtures.py OUTDIR              # this machine as it is
    SHOAL_VM=1 python3 tests/record_fixtures.py OUTDIR --scenario   # in a throw-away virtual machine: see vm.sh

OUTDIR then holds proc/, sys/, netlink/ and KERNEL, which says what was recorded, how, and what this kernel lacks.
Every byte under proc/, sys/ and netlink/ comes from the kernel. What is left out (build host, working directories,
most processes) is listed in KERNEL; so is everything that a scenario lays out by hand because no kernel writes it.
"""

from __future__ import annotations

import argparse
import contextlib
import errno
import os
import platform
import re
import socket
import struct
import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from tests import record_scenario as scenario
else:
    import record_scenario as scenario  # found beside this file when it is run as a script

__all__ = ["Recorder", "main"]

PROC_FILES = (
    "version",
    "cmdline",
    "pressure/cpu",
    "pressure/memory",
    "pressure/io",
    "pressure/irq",
    "vmstat",
    "meminfo",
    "schedstat",
    "diskstats",
    "mounts",
    "sys/net/core/somaxconn",
    "sys/net/ipv4/tcp_max_syn_backlog",
    "sys/net/ipv4/tcp_abort_on_overflow",
    "sys/net/ipv4/ip_local_port_range",
    "sys/net/ipv4/ip_local_reserved_ports",
    "sys/net/ipv4/tcp_max_tw_buckets",
    "sys/net/netfilter/nf_conntrack_count",
    "sys/net/netfilter/nf_conntrack_max",
    "sys/kernel/task_delayacct",
)
PROCESS_FILES = ("comm", "cgroup", "net/netstat", "net/sockstat")
CGROUP_FILES = (
    "cgroup.controllers",
    "cgroup.procs",
    "cgroup.events",
    "cgroup.stat",
    "memory.current",
    "memory.peak",
    "memory.max",
    "memory.high",
    "memory.low",
    "memory.min",
    "memory.events",
    "memory.events.local",
    "memory.stat",
    "memory.pressure",
    "memory.swap.current",
    "memory.swap.max",
    "cpu.pressure",
    "cpu.stat",
    "cpu.max",
    "io.pressure",
)
CGROUP_V1_TOKEN = ("memory.usage_in_bytes", "memory.limit_in_bytes", "memory.stat")

# Mounts elsewhere (a home, a checkout, a share of the host) would tell where the recording was made.
KEPT_MOUNT = re.compile(r"/(proc|sys|dev|run)(/.*)?|/[a-z0-9]*")
TELLTALE = re.compile(r"(?<![\w/-])/(home|root|work|tmp)/")

# linux/netlink.h, linux/sock_diag.h, linux/inet_diag.h, linux/netfilter/nfnetlink_conntrack.h
NETLINK_SOCK_DIAG = 4
NETLINK_NETFILTER = 12
NLM_F_REQUEST = 0x1
NLM_F_DUMP = 0x300
NLMSG_ERROR = 2
NLMSG_DONE = 3
SOCK_DIAG_BY_FAMILY = 20
INET_DIAG_MEMINFO = 1
INET_DIAG_SKMEMINFO = 7
TCP_LISTEN = 10
NFNL_SUBSYS_CTNETLINK = 1
IPCTNL_MSG_CT_GET_STATS_CPU = 4
IPCTNL_MSG_CT_GET_STATS = 5


def netlink_exchange(protocol: int, message_type: int, flags: int, payload: bytes) -> bytes:
    """Send one request and return every message of the reply exactly as received, headers and end included."""
    with socket.socket(socket.AF_NETLINK, socket.SOCK_RAW, protocol) as link:
        link.settimeout(5)
        link.bind((0, 0))
        link.send(struct.pack("=IHHII", 16 + len(payload), message_type, NLM_F_REQUEST | flags, 1, 0) + payload)
        reply = b""
        while True:
            datagram = link.recv(1 << 18)
            reply += datagram
            kinds, offset = [], 0
            while offset < len(datagram):
                length, kind = struct.unpack_from("=IH", datagram, offset)
                kinds.append(kind)
                offset += (length + 3) & ~3
            if flags != NLM_F_DUMP or NLMSG_DONE in kinds or NLMSG_ERROR in kinds:
                return reply


def listeners(family: int) -> bytes:
    """Return the raw dump of the listening TCP sockets of this network namespace."""
    extensions = 1 << (INET_DIAG_MEMINFO - 1) | 1 << (INET_DIAG_SKMEMINFO - 1)
    request = struct.pack("=BBBBI", family, socket.IPPROTO_TCP, extensions, 0, 1 << TCP_LISTEN) + bytes(48)
    return netlink_exchange(NETLINK_SOCK_DIAG, SOCK_DIAG_BY_FAMILY, NLM_F_DUMP, request)


def conntrack(message: int, flags: int) -> bytes:
    """Return the raw reply to one of the connection tracker's statistics requests."""
    request = struct.pack("=BBH", socket.AF_UNSPEC, 0, 0)
    return netlink_exchange(NETLINK_NETFILTER, NFNL_SUBSYS_CTNETLINK << 8 | message, flags, request)


class Recorder:
    """Copies from the live machine into one directory, and remembers what was not there."""

    def __init__(self, out: Path) -> None:
        """Start an empty recording in `out`, which must not hold one already."""
        self.out = out
        self.missing: dict[tuple[str, str, str], int] = {}
        self.notes: list[str] = []
        self._namespaces: dict[int, int] = {}

    def note(self, sentence: str) -> None:
        """Keep a sentence for KERNEL."""
        self.notes.append(sentence)

    def read(self, path: str, *, group: str = "") -> bytes | None:
        """Read a live file, or note its absence; absences of one `group` (a cgroup file's name) count together."""
        step = "open"
        try:
            descriptor = os.open(f"/{path}", os.O_RDONLY)
            step = "read"
            with open(descriptor, "rb", buffering=0) as file:
                return file.readall()
        except OSError as error:
            self._note_missing(group or path, step, error)
            return None

    def _note_missing(self, path: str, step: str, error: OSError) -> None:
        name = errno.errorcode.get(error.errno or 0, str(error))
        self.missing[path, step, name] = self.missing.get((path, step, name), 0) + 1

    def write(self, path: str, data: bytes) -> None:
        """Write one file of the recording."""
        target = self.out / path
        target.parent.mkdir(parents=True, exist_ok=True)
        target.write_bytes(data)

    def link(self, path: str, target: str) -> None:
        """Make a symbolic link in the recording (process namespaces, and what the kernel itself links)."""
        place = self.out / path
        place.parent.mkdir(parents=True, exist_ok=True)
        place.symlink_to(target)

    def copy(self, path: str, *, group: str = "") -> None:
        """Copy one live file unchanged."""
        data = self.read(path, group=group)
        if data is not None:
            self.write(path, data)

    def record_system(self) -> None:
        """Copy the files of the whole machine."""
        for name in PROC_FILES:
            data = self.read(f"proc/{name}")
            if data is not None and name == "version":
                data = re.sub(rb"\(\S+@\S+\) ", b"", data, count=1)
            if data is not None and name == "cmdline":
                kept = re.findall(rb"\b(?:psi=|delayacct|cgroup|swapaccount|systemd\.unified)\S*", data)
                data = b" ".join(kept) + b"\n"
            if data is not None and name == "mounts":
                data = self._without_private_mounts(data, mount_point=1)
            if data is not None:
                self.write(f"proc/{name}", data)
        self.note("proc/version: the build user and host are cut out.")
        self.note("proc/cmdline: only arguments that decide about PSI, delay accounting and cgroups are kept.")
        stat = self.read("proc/stat") or b""
        self.write("proc/stat", b"".join(row for row in stat.splitlines(keepends=True) if not row.startswith(b"intr")))
        self.note("proc/stat: the row `intr` (a column per interrupt) is cut out.")
        self.note(
            "mounts and mountinfo: only /proc, /sys, /dev and /run with all below, and top-level directories; rows that"
            " name a working directory of the recording machine are cut out.",
        )

    def _without_private_mounts(self, data: bytes, mount_point: int) -> bytes:
        rows = []
        for row in data.splitlines(keepends=True):
            place = row.split()[mount_point].decode()
            if KEPT_MOUNT.fullmatch(place) and not TELLTALE.search(row.decode()):
                rows.append(row)
        return b"".join(rows)

    def record_process(self, pid: int, name: str = "") -> None:
        """Copy the files of one process. Processes that share a network namespace share one `net` directory.

        The exporter recognises a shared namespace by the inode of /proc/<pid>/net/netstat, which a copy cannot have;
        a symbolic link to the first process's directory keeps that property.
        """
        base = f"proc/{name or pid}"
        namespace = os.stat(f"/proc/{pid}/net/netstat").st_ino
        try:
            self.link(f"{base}/ns/net", os.readlink(f"/proc/{pid}/ns/net"))
        except OSError as error:
            self._note_missing(f"proc/{pid}/ns/net", "readlink", error)
        first = self._namespaces.setdefault(namespace, pid)
        for file in PROCESS_FILES:
            if (file.startswith("net/") and first != pid) or (file == "comm" and pid == 1):
                continue
            data = self.read(f"proc/{pid}/{file}", group=f"proc/<pid>/{file}")
            if data is not None and file == "cgroup":
                data = re.sub(rb"(?m)^([1-9]\d*:[^:]*:)/.*$", rb"\1/", data)
            if data is not None:
                self.write(f"{base}/{file}", data)
        if first != pid:
            self.link(f"{base}/net", f"../{first}/net")
        if name == "self" or pid == 1:
            data = self.read(f"proc/{pid}/mountinfo") or b""
            self.write(f"{base}/mountinfo", self._without_private_mounts(data, mount_point=4))

    def record_self(self) -> None:
        """Copy process 1, and this process as proc/self, with the links that the kernel has beside them."""
        self.record_process(1)
        self.note("proc/1/comm: left out; it names what runs the recording machine.")
        self.record_process(os.getpid(), name="self")
        self.link("proc/net", "self/net")
        data = self.read("proc/self/net/stat/nf_conntrack")
        if data is not None:
            self.write("proc/self/net/stat/nf_conntrack", data)

    def record_cgroups(self) -> None:
        """Copy the cgroup v2 tree, and of a v1 memory controller as much as shows that it is one."""
        root = Path("/sys/fs/cgroup")
        if (root / "cgroup.controllers").exists():
            directories = sorted(path for path in (root, *root.rglob("*")) if path.is_dir())
        else:
            directories = [root / "unified"]
            self.note("sys/fs/cgroup: a v1 machine. Only the root of `unified`, and three files of v1 `memory`.")
            for name in CGROUP_V1_TOKEN:
                self.copy(f"sys/fs/cgroup/memory/{name}")
            self.note("proc/<pid>/cgroup: the paths in v1 rows are cut down to `/`.")
        ids = []
        for directory in directories:
            path = str(directory)[1:]
            (self.out / path).mkdir(parents=True, exist_ok=True)
            ids.append(f"{directory.stat().st_ino} /{directory.relative_to(directories[0])}\n".replace("/.\n", "/\n"))
            for name in CGROUP_FILES:
                self.copy(f"{path}/{name}", group=f"sys/fs/cgroup/.../{name}")
        self.write("netlink/cgroup_ids", "".join(ids).encode())
        self.note("netlink/cgroup_ids: inode of each cgroup directory on the live machine, as in INET_DIAG_CGROUP_ID.")

    def record_conntrack(self) -> None:
        """Keep the connection tracker's replies for this network namespace, refusals included.

        Where nf_conntrack is not loaded nothing is asked: the request itself, made by root, would load it.
        """
        if not os.path.exists("/proc/sys/net/netfilter/nf_conntrack_max"):
            self.note("netlink/conntrack*: not asked for, since asking would load nf_conntrack, which is not in use.")
            return
        requests = (
            ("conntrack_stats", IPCTNL_MSG_CT_GET_STATS, 0),
            ("conntrack_stats_cpu", IPCTNL_MSG_CT_GET_STATS_CPU, NLM_F_DUMP),
        )
        for name, message, flags in requests:
            try:
                self.write(f"netlink/{name}.bin", conntrack(message, flags))
            except OSError as error:
                self._note_missing(f"netlink/{name}", "request", error)

    def record_listeners(self, suffix: str = "") -> None:
        """Keep the dumps of the listeners of the network namespace that the caller is in."""
        for name, family in (("inet", socket.AF_INET), ("inet6", socket.AF_INET6)):
            self.write(f"netlink/sock_diag_listen_{name}{suffix}.bin", listeners(family))

    def write_kernel(self, command: str) -> None:
        """Write KERNEL: what this recording is, in words for people and, at its end, in rows for tests."""
        lines = [
            f"release: {platform.release()}",
            f"version: {(self.out / 'proc/version').read_text().strip()}",
            f"machine: {platform.machine()}, {os.cpu_count()} processors",
            f"recorded: {time.strftime('%Y-%m-%d %H:%M UTC', time.gmtime())} by: {command}",
            "",
            *(f"- {sentence}" for sentence in self.notes),
            "",
            "Not there (path, what failed, errno, how often; tab separated):",
        ]
        lines += ["\t".join((*what, str(count))) for what, count in sorted(self.missing.items())]
        self.write("KERNEL", ("\n".join(lines) + "\n").encode())


def main() -> int:
    """Record, and end every process that the recording needed."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("outdir", type=Path, help="a directory that does not exist yet")
    parser.add_argument("--scenario", action="store_true", help="build a node's workloads and failures first (VM only)")
    options = parser.parse_args()
    if os.geteuid() != 0:
        parser.error("must be root: processes, namespaces and the connection tracker are read")
    if options.scenario and os.environ.get("SHOAL_VM") != "1":
        parser.error("--scenario overloads the machine it runs on: only in a virtual machine, with SHOAL_VM=1 set")
    if options.outdir.exists():
        parser.error(f"{options.outdir} exists: a recording is not mixed with an older one")
    options.outdir.mkdir(parents=True)
    recorder = Recorder(options.outdir)
    processes = scenario.Processes()
    with contextlib.ExitStack() as stack:
        stack.callback(processes.end)
        if options.scenario:
            node = scenario.Node(recorder, processes)
            node.build()
            recorder.record_listeners("_host")
        else:
            processes.start(scenario.overflow_listener(recorder), network="new")
            recorder.note(
                "netlink/sock_diag*: from a network namespace made for the recording, with a listener whose accept"
                f" queue overflowed; process {processes.pids[0]} lives in it.",
            )
        recorder.record_system()
        recorder.record_self()
        for pid in processes.pids:
            recorder.record_process(pid)
        recorder.record_conntrack()
        recorder.record_cgroups()
        recorder.note("proc/<pid>/net is a symbolic link where two processes share a network namespace.")
        recorder.write_kernel("tests/record_fixtures.py OUTDIR" + " --scenario" * options.scenario)
    print(f"recorded {platform.release()} in {options.outdir}")  # noqa: T201 - a command's answer
    return 0


if __name__ == "__main__":
    sys.exit(main())
