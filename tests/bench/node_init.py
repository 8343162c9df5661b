"""Process 1 of a `FullNode`: makes its pods, fills it on demand, and ends with its standard input.

Run by node.py in new namespaces, with the arguments of `Node`.
Answers with one line of JSON when the node is ready, and after each order that it reads.
"""

from __future__ import annotations

import ctypes
import json
import os
import resource
import shutil
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING, Final, NoReturn

from tests.bench.pods import SANDBOX, Pod
from tests.bench.pods import pods as make_pods

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

_LIBC: Final = ctypes.CDLL(None, use_errno=True)
_CLONE_NEWNET: Final = 0x40000000
_MS_BIND: Final = 4096
_MNT_DETACH: Final = 2

# A crowd: 5,000 connections within loopback are 10,000 sockets.
_CONNECTIONS: Final = 5_000
_TIME_WAIT: Final = 10_000
_FILES: Final = 2 * _CONNECTIONS + 100

# Of a pod that comes and goes.
_CONTAINERS_OF_ONE: Final = 2

_FIRST_PORT: Final = 8080
_SERVICE: Final = "10.96.0.10"
_GATEWAY_MAC: Final = "ee:ee:ee:ee:ee:ee"
_RULES: Final = """
table ip bench {
  chain raw_in { type filter hook prerouting priority -300; iif lo notrack; }
  chain raw_out { type filter hook output priority -300; oif lo notrack; }
  chain services { type nat hook prerouting priority -100;
    ip daddr %s udp dport 53 dnat to numgen inc mod 4 map { %s }; }
  chain leaving { type nat hook postrouting priority 100; oif eth0 masquerade; }
}
"""


def _check(result: int) -> None:
    if result:
        number = ctypes.get_errno()
        raise OSError(number, os.strerror(number))


def _mount(source: str, target: str, fstype: str, flags: int = 0, options: str = "") -> None:
    _check(_LIBC.mount(source.encode(), target.encode(), fstype.encode(), flags, options.encode()))


def _umount(target: str) -> None:
    """Take a mount away from the tree, as container runtimes do, though somebody may just be looking into it."""
    _check(_LIBC.umount2(target.encode(), _MNT_DETACH))


def _ip(*lines: str) -> None:
    """Run lines of ip(8) in one go."""
    subprocess.run(["ip", "-batch", "-"], input="\n".join(lines), text=True, check=True)


def _fork(function: Callable[[], None]) -> int:
    """Run a function in a process of its own, which ends with it."""
    pid = os.fork()
    if pid:
        return pid
    status = 1
    try:
        function()
        status = 0
    finally:
        sys.stderr.flush()
        os._exit(status)


def _wait(pid: int) -> None:
    if os.waitpid(pid, 0)[1]:
        raise RuntimeError("a part of the node could not be made; see above")


class Node:
    """The node from within."""

    def __init__(self, mount: str, cgroup: str, pods: int, containers: int) -> None:
        """Take the mount point of cgroup v2, what is to be the node's root, and how many pods and containers it has."""
        self._own_cgroup = cgroup
        self._cgroups = Path(mount)
        self.pods = make_pods(pods, containers)
        self._renewable = 0.0
        self._holders: list[tuple[int, int]] = []
        """The descriptors by which those who hold sockets are told to renew them, and tell that they have."""

    def build(self) -> dict[str, list[int]]:
        """Make the pods, and return the sandboxes' processes of those that will have sockets."""
        # The kernel refuses to mount cgroup v2 where it is mounted, in whichever cgroup namespace.
        _mount(self._own_cgroup, str(self._cgroups), "", _MS_BIND)
        for unit in ("init.scope", "system.slice/shoal-exporter.service", "system.slice/proxy.service"):
            (self._cgroups / unit).mkdir(parents=True)
        self._enter_cgroup("init.scope")
        for directory in ("/var/log", "/run"):
            _mount("tmpfs", directory, "tmpfs")
        for directory in ("/var/log/pods", "/var/log/containers", "/run/netns", "/run/layers"):
            os.makedirs(directory)
        Path("/proc/sys/net/ipv4/ip_forward").write_text("1")
        _ip(
            "link set lo up",
            # Not every kernel has dummy devices. What leaves by eth0 arrives at the other end as somebody else's.
            "link add eth0 type veth peer name wire",
            "address add 192.0.2.10/24 dev eth0",
            "link set eth0 up",
            "link set wire up",
            "route add default via 192.0.2.1 dev eth0",
            f"neighbour add 192.0.2.1 lladdr {_GATEWAY_MAC} dev eth0 nud permanent",
        )
        self._begin(self.pods)
        return {"sandboxes": [self._sandbox(pod) for pod in self.pods]}

    def _begin(self, pods: Sequence[Pod]) -> None:
        for pod in pods:
            self._lay_out(pod)
            _wait(_fork(lambda pod=pod: self._start(pod)))  # type: ignore[misc]
        _ip(
            *(f"link set veth{pod.number} up" for pod in pods),
            *(f"route add {pod.address}/32 dev veth{pod.number}" for pod in pods),
        )

    def begin(self, number: int) -> None:
        """Start one pod more."""
        self._begin([Pod(number, _CONTAINERS_OF_ONE)])

    def end(self, number: int) -> None:
        """Kill what runs in a pod and remove what was made for it; its veth pair and route go with its namespace."""
        pod = Pod(number, _CONTAINERS_OF_ONE)
        scopes = [self._cgroups / pod.cgroup(each) for each in range(SANDBOX, pod.containers)]
        for scope in scopes:
            # Each has only what it was started as, and whose parent is gone is process 1's.
            process = int((scope / "cgroup.procs").read_text())
            os.kill(process, signal.SIGKILL)
            os.waitpid(process, 0)
        for cgroup in (*scopes, scopes[0].parent):
            cgroup.rmdir()
        _umount(pod.netns)
        os.unlink(pod.netns)
        layers = Path("/run/layers", pod.uid)
        for root in layers.glob("*/root"):
            _umount(str(root))
        shutil.rmtree(layers)
        shutil.rmtree(f"/var/log/pods/{pod.namespace}_{pod.name}_{pod.uid}")
        for log in Path("/var/log/containers").glob(f"{pod.name}_*"):
            log.unlink()

    def _sandbox(self, pod: Pod) -> int:
        return int((self._cgroups / pod.cgroup(SANDBOX) / "cgroup.procs").read_text())

    def _enter_cgroup(self, path: str) -> None:
        (self._cgroups / path / "cgroup.procs").write_text("0")

    def _lay_out(self, pod: Pod) -> None:
        """Make what the kubelet and containerd make of a pod before anything runs in it."""
        Path(pod.netns).touch()
        layers = Path("/run/layers", pod.uid)
        for number in range(SANDBOX, pod.containers):
            (self._cgroups / pod.cgroup(number)).mkdir(parents=True)
            for part in ("lower", "upper", "work", "root"):
                (layers / str(number) / part).mkdir(parents=True)
            place = layers / str(number)
            options = f"lowerdir={place}/lower,upperdir={place}/upper,workdir={place}/work"
            _mount("overlay", f"{place}/root", "overlay", options=options)
            if number < 0:
                continue
            Path("/var/log/pods", f"{pod.namespace}_{pod.name}_{pod.uid}", pod.container_name(number)).mkdir(
                parents=True
            )
            log = f"{pod.name}_{pod.namespace}_{pod.container_name(number)}-{pod.identity(number)}.log"
            Path("/var/log/containers", log).touch()

    def _start(self, pod: Pod) -> None:
        """Make the network of a pod, with the veth pair of a routed network, and start its containers."""
        _check(_LIBC.unshare(_CLONE_NEWNET))
        _mount("/proc/self/ns/net", pod.netns, "", _MS_BIND)
        _ip(
            "link set lo up",
            f"link add eth0 type veth peer name veth{pod.number} address {_GATEWAY_MAC} netns 1",
            f"address add {pod.address}/32 dev eth0",
            "link set eth0 up",
            "route add 169.254.1.1 dev eth0 scope link",
            "route add default via 169.254.1.1 dev eth0",
            f"neighbour add 169.254.1.1 lladdr {_GATEWAY_MAC} dev eth0 nud permanent",
        )
        # Its writing end is closed when the last of them has become what it runs.
        running, starting = os.pipe()
        for number in range(SANDBOX, pod.containers):
            _fork(lambda number=number: self._run_container(pod, number))  # type: ignore[misc]
        os.close(starting)
        os.read(running, 1)

    def _run_container(self, pod: Pod, number: int) -> NoReturn:
        """Become a container: one that listens, unless it is the sandbox."""
        self._enter_cgroup(pod.cgroup(number))
        # However nice the test is: who waits at a nice value above 0 is told apart.
        os.setpriority(os.PRIO_PROCESS, 0, 0)
        if number >= 0:
            # `sleep` inherits it and never accepts, and nobody connects.
            os.set_inheritable(socket.create_server(("", _FIRST_PORT + number)).detach(), True)  # noqa: FBT003  (its API)
        os.execvp("sleep", ["sleep", "infinity"])  # noqa: S606  (it is to be this process)

    def fill(self, listeners: int, crowds: int, entries: int, neighbours: int) -> None:
        """Make listeners in every pod, sockets on the node and in some, and what the node itself keeps of others."""
        more = listeners - sum(pod.containers for pod in self.pods)
        for pod in self.pods:
            upto, before = (more * number // len(self.pods) for number in (pod.number + 1, pod.number))
            self._listen(pod, upto - before)
        if crowds:
            self._hold("system.slice/proxy.service", "/proc/1/ns/net", _TIME_WAIT)
        for pod in self.pods[: max(crowds - 1, 0)]:
            self._hold(pod.cgroup(0), pod.netns, 0)
        self.renew()
        # Permanent, as the kernel throws out what it has not used for a minute.
        _ip(
            *(
                f"neighbour add 198.18.{number // 250}.{number % 250 + 1} lladdr {_GATEWAY_MAC} dev eth0 nud permanent"
                for number in range(neighbours)
            )
        )
        if entries:
            self._track(entries)

    def _listen(self, pod: Pod, number: int) -> None:
        """Have the pod's first container listen on so many more ports."""
        if number <= 0:
            return
        ready = os.pipe()

        def listen() -> None:
            self._enter_cgroup(pod.cgroup(0))
            _enter_network(pod.netns)
            servers = [socket.create_server(("", _FIRST_PORT + 100 + each)) for each in range(number)]
            for server in servers:
                os.set_inheritable(server.detach(), True)  # noqa: FBT003  (its API)
            os.write(ready[1], b"x")
            os.execvp("sleep", ["sleep", "infinity"])  # noqa: S606  (it is to be this process)

        _fork(listen)
        os.close(ready[1])
        if not os.read(ready[0], 1):
            raise RuntimeError("the listeners could not be made; see above")
        os.close(ready[0])

    def renew(self) -> None:
        """Have those who hold sockets make theirs in TIME_WAIT anew, once the last ones have given back their ports."""
        if not self._holders:
            return
        time.sleep(max(0.0, self._renewable - time.monotonic()))
        for orders, _ in self._holders:
            os.write(orders, b"x")
        for _, answers in self._holders:
            if not os.read(answers, 1):
                raise RuntimeError("the sockets could not be made; see above")
        self._renewable = time.monotonic() + 61  # a second more than a socket stays in TIME_WAIT

    def _hold(self, cgroup: str, netns: str, time_wait: int) -> None:
        """Start a process that holds connections to itself, and makes more that it closes when it is told to."""
        orders, answers = os.pipe(), os.pipe()

        def hold() -> None:
            self._enter_cgroup(cgroup)
            _enter_network(netns)
            os.close(orders[1])
            resource.setrlimit(resource.RLIMIT_NOFILE, (_FILES, _FILES))
            # Otherwise connections within loopback take over the ports of those in TIME_WAIT.
            Path("/proc/sys/net/ipv4/tcp_tw_reuse").write_text("0")
            with socket.create_server(("127.0.0.1", 7000), backlog=16) as server:
                kept = [_connect(server) for _ in range(_CONNECTIONS)]
                while kept and os.read(orders[0], 1):
                    for _ in range(time_wait):
                        client, accepted = _connect(server)
                        # The one that closes first is the one in TIME_WAIT.
                        client.close()
                        accepted.close()
                    os.write(answers[1], b"x")

        _fork(hold)
        os.close(orders[0])
        os.close(answers[1])
        self._holders.append((orders[1], answers[0]))

    def _track(self, entries: int) -> None:
        """Have every pod send to a service and to the world: what is translated twice, and what is masqueraded."""
        backends = ", ".join(f"{number} : {pod.address}" for number, pod in enumerate(self.pods[:4]))
        subprocess.run(["nft", "-f", "-"], input=_RULES % (_SERVICE, backends), text=True, check=True)
        # Unanswered flows are forgotten after 30 s; this setting is each namespace's own.
        Path("/proc/sys/net/netfilter/nf_conntrack_udp_timeout").write_text("86400")
        each = -(-entries // len(self.pods))
        for pod in self.pods:
            _wait(_fork(lambda pod=pod: _send(pod, each)))  # type: ignore[misc]


def _connect(server: socket.socket) -> tuple[socket.socket, socket.socket]:
    client = socket.create_connection(server.getsockname())
    return client, server.accept()[0]


def _enter_network(netns: str) -> None:
    with open(netns, "rb") as file:
        _check(_LIBC.setns(file.fileno(), _CLONE_NEWNET))


def _send(pod: Pod, flows: int) -> None:
    """Send one packet from each of many ports: one in five to the service, the others to hosts elsewhere."""
    _enter_network(pod.netns)
    for number in range(flows):
        destination = (_SERVICE, 53) if number % 5 == 0 else (f"198.51.100.{number % 40}", 443)
        with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as sock:
            sock.bind(("", 20_000 + number))
            sock.sendto(b"x", destination)


def main() -> None:
    """Build, then follow orders until there are no more."""
    # However nice the caller is: who waits at a nice value above 0 is told apart.
    os.setpriority(os.PRIO_PROCESS, 0, 0)
    mount, cgroup, pods, containers = sys.argv[1:]
    node = Node(mount, cgroup, int(pods), int(containers))
    _say(node.build())
    orders: dict[str, Callable[..., None]] = {
        "fill": node.fill,
        "renew": node.renew,
        "begin": node.begin,
        "end": node.end,
    }
    for line in sys.stdin:
        order, *numbers = line.split()
        orders[order](*map(int, numbers))
        _say({})


def _say(answer: dict[str, list[int]]) -> None:
    sys.stdout.write(json.dumps(answer) + "\n")
    sys.stdout.flush()


if __name__ == "__main__":
    main()
