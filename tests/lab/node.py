"""A node to make ill: pods, units and networks of its own, in namespaces that end with the process that made them.

    with Node() as node, node.pod("checkout") as pod:
        pod.start(some_function)

Pods are what a kubelet and containerd make of them as far as the kernel sees it: cgroups, a network namespace, and the
directories that the kubelet names them by. What runs in them is a function of Python's, in a process of its own.
"""

from __future__ import annotations

import ctypes
import hashlib
import os
import signal
import subprocess
import time
import traceback
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Final
from uuid import uuid4

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

__all__ = [
    "NAMESPACE",
    "Node",
    "Pod",
    "Unit",
    "cgroup_mount",
    "check",
    "libc",
    "mount",
    "ready",
    "remove_cgroups",
    "run",
]

NAMESPACE: Final = "lab"
"""The Kubernetes namespace that all pods are in."""

CLONE_NEWNET: Final = 0x40000000
_MS_BIND: Final = 4096
_GIVE_UP: Final = 10.0
_FORWARD: Final = Path("/proc/sys/net/ipv4/ip_forward")

libc = ctypes.CDLL(None, use_errno=True)


def check(result: int) -> None:
    """Raise what a C library call failed with."""
    if result:
        number = ctypes.get_errno()
        raise OSError(number, os.strerror(number))


def mount(source: str, target: Path, fstype: str, flags: int = 0, options: str = "") -> None:
    """Mount by the system call; the target is made if there is none."""
    if not target.exists():
        target.mkdir(parents=True)
    check(libc.mount(source.encode(), bytes(target), fstype.encode(), flags, options.encode()))


def run(*command: str, text: str | None = None) -> str:
    """Run a program and return what it printed. Raises `RuntimeError` with all that it said when it fails."""
    done = subprocess.run(command, input=text, capture_output=True, text=True, check=False)
    if done.returncode:
        raise RuntimeError(f"{' '.join(command)}: {(done.stderr or done.stdout).strip()}")
    return done.stdout


def cgroup_mount() -> Path:
    """Return where cgroup v2 is mounted, alone or beside v1. Raises `FileNotFoundError`."""
    for place in (Path("/sys/fs/cgroup"), Path("/sys/fs/cgroup/unified")):
        if (place / "cgroup.procs").exists():
            return place
    raise FileNotFoundError("cgroup v2 is not mounted here")


def remove_cgroups(top: Path) -> None:
    """End what still runs in these cgroups, and remove them."""
    until = time.monotonic() + _GIVE_UP
    for directory, _, _ in os.walk(top, topdown=False):
        while True:
            try:
                os.rmdir(directory)
            except FileNotFoundError:
                break
            except OSError:
                if time.monotonic() > until:
                    raise
                with suppress(OSError):
                    for pid in map(int, Path(directory, "cgroup.procs").read_text().split()):
                        os.kill(pid, signal.SIGKILL)
                time.sleep(0.02)
            else:
                break


class Node:
    """The node, from within its namespaces."""

    def __init__(self) -> None:
        """Mount what is the node's own over what is the machine's, and bring up its loopback device."""
        self.cgroups = cgroup_mount()
        for directory in ("/run", "/var/log"):
            mount("tmpfs", Path(directory), "tmpfs")
        for directory in ("/run/netns", "/var/log/pods", "/var/log/containers"):
            os.makedirs(directory)
        run("ip", "link", "set", "lo", "up")
        self.cgroup("system.slice/shoal-exporter.service")
        self._links = 0

    def cgroup(self, path: str, **settings: str) -> Path:
        """Make a cgroup and its ancestors with all controllers that there are; settings have `_` for the first dot."""
        made = self.cgroups
        for part in Path(path).parts:
            for controller in ("+memory", "+cpu", "+io"):
                # Absent where v1 has them, and then whatever needs them says that it cannot run.
                with suppress(OSError):
                    (made / "cgroup.subtree_control").write_text(controller)
            made = made / part
            made.mkdir(exist_ok=True)
        for name, value in settings.items():
            (made / name.replace("_", ".", 1)).write_text(value)
        return made

    @contextmanager
    def pod(self, name: str, *containers: str, limits: dict[str, str] | None = None) -> Iterator[Pod]:
        """Make a pod with a network namespace and these containers (`app` if none is named); `limits` are the pod's."""
        uid = str(uuid4())
        slices = f"kubepods.slice/kubepods-burstable.slice/kubepods-burstable-pod{uid.replace('-', '_')}.slice"
        cgroup = self.cgroup(slices, **(limits or {}))
        netns = f"cni-{uid}"
        pod = Pod(self, name, uid, cgroup, netns)
        try:
            pod.container("sandbox", named=False)
            for container in containers or ("app",):
                pod.container(container)
            os.makedirs(f"/var/log/pods/{NAMESPACE}_{name}_{uid}")
            pod.sandbox = pod.start(_idle, container="sandbox")
            pod.name_network()
            yield pod
        finally:
            pod.end()
            for log in Path("/var/log/containers").glob(f"{name}_{NAMESPACE}_*"):
                log.unlink()
            with suppress(OSError):
                os.rmdir(f"/var/log/pods/{NAMESPACE}_{name}_{uid}")
            pod.forget_network()
            remove_cgroups(cgroup)

    @contextmanager
    def container(self, name: str) -> Iterator[Pod]:
        """Make a container as Docker makes it, with a network namespace; it is a pod without a name, in one cgroup."""
        identity = hashlib.sha256(f"{os.getpid()}/{name}".encode()).hexdigest()
        pod = Pod(self, "", identity, self.cgroup(f"system.slice/docker-{identity}.scope"), name)
        try:
            pod.sandbox = pod.start(_idle)
            pod.name_network()
            yield pod
        finally:
            pod.end()
            pod.forget_network()
            remove_cgroups(pod.cgroup)

    @contextmanager
    def unit(self, name: str, **settings: str) -> Iterator[Unit]:
        """Make a systemd unit's cgroup, in the node's own network namespace."""
        unit = Unit(name, self.cgroup(f"system.slice/{name}", **settings))
        try:
            yield unit
        finally:
            unit.end()
            remove_cgroups(unit.cgroup)

    def attach(self, pod: Pod) -> tuple[str, str]:
        """Join a pod to the node, its way to everywhere. Return its address and the node's device for it."""
        _FORWARD.write_text("1")
        self._links += 1
        network, device = f"10.76.{self._links}", f"lab{self._links}"
        run("ip", "link", "add", device, "type", "veth", "peer", "name", "eth0", "netns", pod.netns)
        run("ip", "address", "add", f"{network}.1/24", "dev", device)
        run("ip", "link", "set", device, "up")
        pod.ip(f"address add {network}.2/24 dev eth0")
        pod.ip("link set eth0 up")
        pod.ip(f"route add default via {network}.1")
        return f"{network}.2", device

    def link(self, first: Pod, second: Pod) -> tuple[str, str]:
        """Join two pods by a veth pair of a network of its own; return their addresses. Devices are called eth<N>."""
        self._links += 1
        network, device = f"10.77.{self._links}", f"eth{self._links}"
        first.ip(f"link add {device} type veth peer name {device} netns {second.netns}")
        for pod, host in ((first, 1), (second, 2)):
            pod.ip(f"address add {network}.{host}/24 dev {device}")
            pod.ip(f"link set {device} up")
        return f"{network}.1", f"{network}.2"


@dataclass(slots=True)
class _Workload:
    """What runs in cgroups, and ends."""

    pids: set[int] = field(default_factory=set, init=False)

    def _fork(self, job: Callable[[], object], cgroup: Path, network: int | None) -> int:
        """Run a function in a new process in this cgroup and network (0: a new one); return when it has entered both.

        The function may say that it is ready by `ready()`; if it never does, its end or its error is waited for.
        """
        readable, writable = os.pipe()
        pid = os.fork()
        if pid == 0:
            try:
                os.close(readable)
                # An interrupt from the terminal is for the lab to handle.
                os.setsid()
                signal.signal(signal.SIGTERM, signal.SIG_DFL)
                (cgroup / "cgroup.procs").write_text("0")
                if network == 0:
                    check(libc.unshare(CLONE_NEWNET))
                elif network:
                    with open(f"/proc/{network}/ns/net", "rb") as namespace:
                        check(libc.setns(namespace.fileno(), CLONE_NEWNET))
                _READY.append(writable)
                job()
            except BaseException:  # noqa: BLE001  (whatever went wrong, the lab must not run on in two copies)
                traceback.print_exc()
            finally:
                os._exit(1)
        os.close(writable)
        self.pids.add(pid)
        said = os.read(readable, 1)
        os.close(readable)
        if not said:
            raise RuntimeError(f"{getattr(job, '__name__', job)} ended before it was ready; what it said is above")
        return pid

    def kill(self, pid: int) -> None:
        """End one process."""
        self.pids.discard(pid)
        with suppress(ProcessLookupError, ChildProcessError):
            os.kill(pid, signal.SIGKILL)
            os.waitpid(pid, 0)

    def end(self) -> None:
        """End all processes."""
        for pid in list(self.pids):
            self.kill(pid)


@dataclass(slots=True)
class Unit(_Workload):
    """A systemd unit."""

    name: str
    cgroup: Path

    @property
    def labels(self) -> dict[str, str]:
        """What an alert calls it."""
        return {"unit": self.name}

    def start(self, job: Callable[[], object]) -> int:
        """Run a function in the unit and return its process id once it is ready."""
        return self._fork(job, self.cgroup, None)


@dataclass(slots=True)
class Pod(_Workload):
    """A pod with its sandbox, containers and network namespace."""

    node: Node = field(repr=False)
    name: str
    uid: str
    cgroup: Path
    netns: str
    """The name of its network namespace under /run/netns."""
    sandbox: int = 0
    """The process that keeps the network namespace."""

    @property
    def labels(self) -> dict[str, str]:
        """What an alert calls it as a whole."""
        return {"namespace": NAMESPACE, "pod": self.name} if self.name else {"container": self.uid[:12]}

    def container(self, name: str, *, named: bool = True, **settings: str) -> Path:
        """Make a container's cgroup, or change its settings, and return the cgroup."""
        if not self.name:
            return self.cgroup
        identity = hashlib.sha256(f"{self.uid}/{name}".encode()).hexdigest()
        if named:
            Path("/var/log/containers", f"{self.name}_{NAMESPACE}_{name}-{identity}.log").touch()
        path = self.cgroup.relative_to(self.node.cgroups) / f"cri-containerd-{identity}.scope"
        return self.node.cgroup(str(path), **settings)

    def start(self, job: Callable[[], object], container: str = "app") -> int:
        """Run a function in a container and return its process id once it is ready (see `ready`)."""
        return self._fork(job, self.container(container, named=container != "sandbox"), self.sandbox)

    def name_network(self) -> None:
        """Give its network namespace a name, as network plugins do, and bring up the loopback device."""
        Path("/run/netns", self.netns).touch()
        mount(f"/proc/{self.sandbox}/ns/net", Path("/run/netns", self.netns), "", _MS_BIND)
        self.ip("link set lo up")

    def forget_network(self) -> None:
        """Take the name away again."""
        libc.umount2(f"/run/netns/{self.netns}".encode(), 2)
        Path("/run/netns", self.netns).unlink(missing_ok=True)

    def ip(self, command: str) -> str:
        """Have the program `ip` do this in the pod's network namespace."""
        return run("ip", "-n", self.netns, *command.split())

    def run(self, *command: str, text: str | None = None) -> str:
        """Run a program in the pod's network namespace, outside its cgroups."""
        return run("ip", "netns", "exec", self.netns, *command, text=text)

    def sysctl(self, name: str, value: object) -> None:
        """Set a sysctl of the pod's network namespace."""
        self.run("sysctl", "-qw", f"{name}={value}")

    def counter(self, name: str) -> int:
        """Return a counter of the network namespace as nstat names it, such as TcpExtListenOverflows."""
        return int(self.run("nstat", "-asz", name).split()[-2])


_READY: Final[list[int]] = []


def ready() -> None:
    """Tell the lab, from within a job, that what it was to set going is going."""
    with suppress(IndexError):
        descriptor = _READY.pop()
        os.write(descriptor, b".")
        os.close(descriptor)


def _idle() -> None:
    ready()
    while True:
        signal.pause()
