"""The workloads and failures that record_fixtures.py records: real processes in cgroups named as a node's are.

Names (pods, containers, units, their ids) are made up; what the kernel counts for them is not. Several container
runtimes share the node here, which no real one does, so that one recording shows every way of naming a cgroup.
"""

from __future__ import annotations

import contextlib
import ctypes
import fcntl
import hashlib
import mmap
import os
import signal
import socket
import struct
import subprocess
import sys
import time
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from tests.record_fixtures import Recorder

__all__ = ["Node", "Processes", "overflow_listener"]

CGROUPS = Path("/sys/fs/cgroup")
CLONE_NEWNET = 0x40000000
PR_SET_PDEATHSIG = 1
MS_BIND = 4096
SIOCGIFFLAGS, SIOCSIFFLAGS, IFF_UP = 0x8913, 0x8914, 1
MIB = 1 << 20

BURSTABLE = "kubepods.slice/kubepods-burstable.slice/kubepods-burstable-pod"
CHECKOUT = ("shop", "checkout-7d9c5b6f4-x2x9k", "0f8d3c1e-5b7a-4c2d-9e6f-1a2b3c4d5e6f")
REPORTS = ("batch", "reports-0", "7c1b9a52-3e44-4d0b-8f0e-6a5d4c3b2a19")
ETCD = ("kube-system", "etcd-node-1", "5f0c8a3be1d2476f9b8e7d6c5a4b3c2d")
LEDGER = ("payments", "ledger-0", "b2a4c6d8-1357-4e9f-a0b1-c2d3e4f5a6b7")
THUMBNAILS = ("media", "thumbnails-5c8d7f9b6d-q4w8z", "e9d8c7b6-a594-4837-8261-50f4e3d2c1b0")

Ready = Callable[[], None]
Job = Callable[[Ready], None]
libc = ctypes.CDLL(None, use_errno=True)


def _check(result: int) -> None:
    """Raise what a C library call failed with."""
    if result != 0:
        code = ctypes.get_errno()
        raise OSError(code, os.strerror(code))


def _say_ready(pipe: int) -> None:
    """Let the process that started this one go on."""
    os.write(pipe, b".")


class Processes:
    """Starts processes in their cgroup and network namespace, and ends them."""

    def __init__(self) -> None:
        """Start with none."""
        self.pids: list[int] = []

    def start(self, job: Job, *, cgroup: Path | None = None, network: str | int = "", comm: str = "") -> int:
        """Run `job` in a new process until it says that it is ready, and return the process id.

        `network` is "new" for a namespace of its own, or the id of the process whose namespace is shared. The process
        joins its cgroup before anything else, as a container runtime has it do, so what it uses is charged there.
        """
        readable, writable = os.pipe()
        pid = os.fork()
        if pid == 0:
            try:
                libc.prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
                if cgroup:
                    (cgroup / "cgroup.procs").write_text("0")
                if network == "new":
                    _check(libc.unshare(CLONE_NEWNET))
                elif network:
                    with Path(f"/proc/{network}/ns/net").open() as namespace:
                        _check(libc.setns(namespace.fileno(), CLONE_NEWNET))
                if comm:
                    Path("/proc/self/comm").write_text(comm)
                job(lambda: _say_ready(writable))
                while True:
                    signal.pause()
            except BaseException:  # noqa: BLE001 - whatever went wrong, the parent must not run on in two copies
                traceback.print_exc()
            os._exit(1)
        os.close(writable)
        answer = os.read(readable, 1)
        os.close(readable)
        if not answer:
            msg = f"a process of the scenario failed before it was ready: {comm or job}"
            raise RuntimeError(msg)
        self.pids.append(pid)
        return pid

    def end(self) -> None:
        """Kill every process started here."""
        for pid in self.pids:
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
                os.waitpid(pid, 0)


def _loopback(*, up: bool) -> None:
    """Switch the loopback device of the current network namespace on or off."""
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as any_socket:
        request = struct.pack("16sH14x", b"lo", 0)
        flags = struct.unpack_from("H", fcntl.ioctl(any_socket, SIOCGIFFLAGS, request), 16)[0]
        flags = flags | IFF_UP if up else flags & ~IFF_UP
        fcntl.ioctl(any_socket, SIOCSIFFLAGS, struct.pack("16sH14x", b"lo", flags))


def _listen(address: str, port: int, backlog: int) -> socket.socket:
    """Open a listening socket that may share its address with others (SO_REUSEPORT)."""
    listener = socket.socket(socket.AF_INET6 if ":" in address else socket.AF_INET, socket.SOCK_STREAM)
    listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEPORT, 1)
    listener.bind((address, port))
    listener.listen(backlog)
    return listener


def overflow_listener(recorder: Recorder) -> Job:
    """Return a job that overflows an accept queue in its namespace and records the listeners there."""

    def job(ready: Ready) -> None:
        _loopback(up=True)
        kept = [
            _listen("127.0.0.1", 8080, 4),
            _listen("127.0.0.1", 9090, 128),
            _listen("0.0.0.0", 9100, 16),  # noqa: S104 - a namespace of its own
            _listen("0.0.0.0", 9100, 16),  # noqa: S104 - same
        ]
        with contextlib.suppress(OSError):
            kept.append(_listen("::", 8443, 64))
        for _ in range(20):
            client = socket.socket()
            client.setblocking(False)  # noqa: FBT003 - the standard library's signature
            client.connect_ex(("127.0.0.1", 8080))
            kept.append(client)
        for _ in range(3):
            client = socket.create_connection(("127.0.0.1", 9100))
            kept.append(client)
        time.sleep(4)
        # Without a device nothing is sent again: the counters of the socket and of the namespace stand still and agree.
        _loopback(up=False)
        recorder.record_listeners()
        ready()
        while kept:
            signal.pause()

    return job


def _idle(ready: Ready) -> None:
    ready()


def _fill(size: int) -> mmap.mmap:
    """Allocate anonymous memory and touch each page of it."""
    memory = mmap.mmap(-1, size, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    for offset in range(0, size, mmap.PAGESIZE):
        memory[offset] = 1
    return memory


def _allocate(size: int) -> Job:
    """Return a job that is ready first and then allocates, since memory.high slows it down for longer than we wait."""

    def job(ready: Ready) -> None:
        ready()
        memory = _fill(size)
        while memory:
            signal.pause()

    return job


def _lose_child(size: int) -> Job:
    """Return a job whose child allocates until the kernel kills it; the job itself lives on, and with it the cgroup."""

    def job(ready: Ready) -> None:
        child = os.fork()
        if child == 0:
            _fill(size)
            os._exit(0)
        if os.WTERMSIG(os.waitpid(child, 0)[1]) != signal.SIGKILL:
            msg = "the child was to be killed for want of memory, and was not"
            raise RuntimeError(msg)
        ready()

    return job


def _refault(file: Path) -> Job:
    """Return a job that maps a file larger than its cgroup may hold, and touches each page in turn, twice.

    Without read-ahead each touch of an evicted page is a major fault, as with code that is run here and there.
    """

    def job(ready: Ready) -> None:
        with file.open("rb") as source, mmap.mmap(source.fileno(), 0, prot=mmap.PROT_READ) as pages:
            pages.madvise(mmap.MADV_RANDOM)
            for _ in range(2):
                sum(pages[offset] for offset in range(0, len(pages), mmap.PAGESIZE))
        ready()

    return job


def _spin(seconds: float) -> Job:
    """Return a job that computes for a while, against its quota."""

    def job(ready: Ready) -> None:
        until = time.monotonic() + seconds
        while time.monotonic() < until:
            pass
        ready()

    return job


def _serve(port: int) -> Job:
    """Return a job that listens on the loopback address."""

    def job(ready: Ready) -> None:
        listener = _listen("127.0.0.1", port, 511)
        ready()
        while listener:
            signal.pause()

    return job


def _container_id(*names: str) -> str:
    """Return 64 hexadecimal digits that stay the same from one recording to the next."""
    return hashlib.sha256("/".join(names).encode()).hexdigest()


class Node:
    """One node's cgroups, processes, kubelet directories and failures."""

    def __init__(self, recorder: Recorder, processes: Processes) -> None:
        """Build nothing yet."""
        self.recorder = recorder
        self.processes = processes

    def build(self) -> None:
        """Lay everything out and let it fail; return when the kernel has counted it."""
        self._reports()
        self._other_pods()
        self._outside_kubernetes()
        # Last, since on 5.10 a process over memory.high keeps a processor busy with vain reclaim.
        started = time.monotonic()
        throttled = self._checkout()
        self._fill_conntrack()
        time.sleep(max(0.0, started + 12 - time.monotonic()))
        self._say("memory.events of the container over memory.high", throttled / "memory.events")
        self.recorder.note(
            "rootfs/: laid out by hand, not recorded: what the kubelet and the container runtime keep under /var/log,"
            " and empty files for the names under /run/netns.",
        )
        self.recorder.note("names of cgroups, pods, containers and units are made up; processes and counts are real.")
        self.recorder.note("netlink/sock_diag_listen_{inet,inet6}.bin: from pod checkout; ..._host.bin: from the host.")

    def _say(self, what: str, file: Path) -> None:
        self.recorder.note(f"{what}: {' '.join(file.read_text().split())}")

    def _cgroup(self, path: str, **settings: str) -> Path:
        """Make a cgroup with all its ancestors; settings are file names with `_` for `.`."""
        parent = CGROUPS
        for part in Path(path).parts:
            for controller in ("+memory", "+cpu", "+io"):
                try:
                    (parent / "cgroup.subtree_control").write_text(controller)
                except OSError as error:
                    self.recorder.note(f"controller {controller} in {parent}: {error.strerror}")
            parent = parent / part
            parent.mkdir(exist_ok=True)
        for name, value in settings.items():
            (parent / name.replace("_", ".")).write_text(value)
        return parent

    def _kubelet(self, pod: tuple[str, str, str], *containers: str) -> None:
        """Lay out the log directories that the kubelet would have made."""
        namespace, name, uid = pod
        for container in containers:
            log = f"var/log/pods/{namespace}_{name}_{uid}/{container}/0.log"
            self.recorder.write(f"rootfs/{log}", b"")
            link = f"{name}_{namespace}_{container}-{_container_id(uid, container)}.log"
            self.recorder.link(f"rootfs/var/log/containers/{link}", f"/{log}")

    def _name_network(self, name: str, pid: int) -> None:
        """Give a network namespace a name, as `ip netns` and the network plugins do."""
        place = Path("/run/netns") / name
        place.parent.mkdir(exist_ok=True)
        place.touch()
        _check(libc.mount(f"/proc/{pid}/ns/net".encode(), str(place).encode(), None, MS_BIND, None))
        self.recorder.write(f"rootfs/run/netns/{name}", b"")

    def _checkout(self) -> Path:
        """Make a pod with two containers that fail: one over memory.high and its accept queue, one over memory.max."""
        uid = CHECKOUT[2]
        pod = f"{BURSTABLE}{uid.replace('-', '_')}.slice"
        names = ("sandbox", "api", "worker")
        scopes = {name: f"{pod}/cri-containerd-{_container_id(uid, name)}.scope" for name in names}
        self._cgroup(pod, memory_max=str(256 * MIB))
        api = self._cgroup(scopes["api"], memory_high=str(30 * MIB), memory_max=str(128 * MIB), cpu_max="50000 100000")
        worker = self._cgroup(scopes["worker"], memory_max=str(40 * MIB))
        start = self.processes.start
        sandbox = start(_idle, cgroup=self._cgroup(scopes["sandbox"]), network="new", comm="pause")
        start(_allocate(60 * MIB), cgroup=api, network=sandbox, comm="api")
        start(overflow_listener(self.recorder), cgroup=api, network=sandbox, comm="api-acceptor")
        start(_lose_child(80 * MIB), cgroup=worker, network=sandbox, comm="worker")
        self._name_network("cni-6f1d2c3b-4a59-4687-9706-a5b4c3d2e1f0", sandbox)
        self._kubelet(CHECKOUT, "api", "worker")
        self._say("memory.events of the container over its own memory.max", worker / "memory.events")
        return api

    def _reports(self) -> None:
        """Make a pod whose own limit is below its container's: what kills the container is its ancestor."""
        uid = REPORTS[2]
        pod = f"{BURSTABLE}{uid.replace('-', '_')}.slice"
        slice_ = self._cgroup(pod, memory_max=str(32 * MIB))
        scope = self._cgroup(
            f"{pod}/cri-containerd-{_container_id(uid, 'report')}.scope",
            memory_max=str(256 * MIB),
        )
        self.processes.start(_lose_child(64 * MIB), cgroup=scope, network="new", comm="report")
        self._kubelet(REPORTS, "report")
        self._say("pod-level limit: memory.events of the pod", slice_ / "memory.events")
        self._say("pod-level limit: memory.events.local of the pod", slice_ / "memory.events.local")
        self._say("pod-level limit: memory.events of the container", scope / "memory.events")
        self._say("pod-level limit: memory.events.local of the container", scope / "memory.events.local")

    def _other_pods(self) -> None:
        """Make a static pod on the host's network, a guaranteed pod of CRI-O, and one under the cgroupfs driver."""
        start = self.processes.start
        etcd = self._cgroup(f"{BURSTABLE}{ETCD[2]}.slice/cri-containerd-{_container_id(ETCD[2], 'etcd')}.scope")
        start(_serve(2379), cgroup=etcd, comm="etcd")
        self._kubelet(ETCD, "etcd")

        uid = LEDGER[2]
        pod = f"kubepods.slice/kubepods-pod{uid.replace('-', '_')}.slice"
        identity = _container_id(uid, "ledger")
        ledger = self._cgroup(f"{pod}/crio-{identity}.scope", memory_max=str(64 * MIB), cpu_max="20000 100000")
        conmon = self._cgroup(f"{pod}/crio-conmon-{identity}.scope")
        start(_idle, cgroup=conmon, comm="conmon")
        start(_spin(3), cgroup=ledger, network="new", comm="ledger")
        self._kubelet(LEDGER, "ledger")

        uid = THUMBNAILS[2]
        pod = f"kubepods/besteffort/pod{uid}"
        sandbox = self._cgroup(f"{pod}/{_container_id(uid, 'sandbox')}")
        thumbnails = self._cgroup(f"{pod}/{_container_id(uid, 'thumbnails')}")
        namespace = start(_idle, cgroup=sandbox, network="new", comm="pause")
        start(_idle, cgroup=thumbnails, network=namespace, comm="thumbnails")
        self._kubelet(THUMBNAILS, "thumbnails")

    def _outside_kubernetes(self) -> None:
        """Make containers of Docker and Podman, and systemd units of the kinds that are named differently."""
        start = self.processes.start
        docker = self._cgroup(f"system.slice/docker-{_container_id('docker', 'web')}.scope", memory_max=str(12 * MIB))
        start(self._refault_job(), cgroup=docker, network="new", comm="web")
        podman = self._cgroup(f"machine.slice/libpod-{_container_id('podman', 'builder')}.scope/container")
        start(_idle, cgroup=podman, network="new", comm="builder")
        start(_serve(6379), cgroup=self._cgroup("system.slice/redis-server.service"), comm="redis-server")
        openvpn = start(_idle, cgroup=self._cgroup("system.slice/openvpn.service"), network="new", comm="openvpn")
        self._name_network("blue", openvpn)
        units = {
            "init.scope": "systemd",
            "system.slice/system-postgresql.slice/postgresql@15-main.service": "postgres",
            "user.slice/user-1000.slice/user@1000.service/init.scope": "systemd",
            "user.slice/user-1000.slice/user@1000.service/app.slice/backup.service": "backup",
        }
        for path, comm in units.items():
            start(_idle, cgroup=self._cgroup(path), comm=comm)

    def _refault_job(self) -> Job:
        """Make a disk with a 16 MiB file (a loop device: what is on tmpfs is never read again), and its reader."""
        image, mount_point = Path("/run/shoal-disk.img"), Path("/run/shoal-disk")
        try:
            with image.open("wb") as disk:
                disk.truncate(64 * MIB)
            mount_point.mkdir()
            self._run("modprobe", "loop")
            self._run("mkfs.ext4", "-q", str(image))
            self._run("mount", "-o", "loop", str(image), str(mount_point))
        except (OSError, subprocess.CalledProcessError) as error:
            self.recorder.note(f"no refaults are shown in the Docker container: {error}")
            return _idle
        file = mount_point / "code"
        file.write_bytes(os.urandom(MIB) * 16)
        os.sync()
        Path("/proc/sys/vm/drop_caches").write_text("1")
        return _refault(file)

    def _fill_conntrack(self) -> None:
        """Track the loopback traffic, lower the limit to just above what is tracked, and start 400 flows."""
        for module in ("nf_conntrack", "nf_conntrack_netlink", "nft_ct"):
            self._run("modprobe", module)
        self._run("nft", "add table inet shoal")
        self._run("nft", "add chain inet shoal output { type filter hook output priority 0; }")
        self._run("nft", "add rule inet shoal output ct state new counter")
        limit = Path("/proc/sys/net/netfilter/nf_conntrack_max")
        self._say("nf_conntrack_max before it was lowered", limit)
        limit.write_text("64")
        for _ in range(400):
            with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as flow, contextlib.suppress(OSError):
                flow.sendto(b"?", ("127.0.0.1", 53))
        self._say("nf_conntrack_count after 400 flows", limit.with_name("nf_conntrack_count"))

    def _run(self, *command: str) -> None:
        done = subprocess.run(command, check=False, capture_output=True, text=True)
        if done.returncode != 0:
            print(done.stderr, file=sys.stderr)  # noqa: T201 - a command's answer
            done.check_returncode()
