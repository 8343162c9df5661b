"""Real containers of a real Docker: the inventory beside what Docker itself says of them.

The daemon has a socket, data, state, cgroups and a mount namespace of its own, and neither a bridge nor a firewall, so
that it takes nothing from one that the machine may have. It is spoken to over its API: not every Debian has the
command in the same package.
"""

from __future__ import annotations

import ctypes
import http.client
import io
import json
import os
import re
import shutil
import socket
import subprocess
import sys
import tarfile
import time
import urllib.request
from contextlib import closing, contextmanager, suppress
from dataclasses import dataclass
from glob import glob
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING, Any, Final
from urllib.parse import quote

import psutil
import pytest
from tests.e2e.seccomp_stage import PROFILES, TIERS
from tests.helm.engine import REPOSITORY, objects

from shoal.inventory import Node, Owner
from shoal.kernel.files import Roots

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

pytestmark = pytest.mark.root

V2_BESIDE_V1: Final = Path("/sys/fs/cgroup/unified")
CGROUPS: Final = f'shoal test\'s "{os.getpid()}" ☃ \\'
"""The cgroup that all containers are below, in every hierarchy: a name as odd as the kernel allows."""
PR_SET_CHILD_SUBREAPER: Final = 36
WITHIN: Final = 20
"""The longest that one step may take, in seconds."""


class UnixConnection(http.client.HTTPConnection):
    """HTTP over a unix socket."""

    def connect(self) -> None:
        """Connect to the socket that the host's name is the path of."""
        self.sock = socket.socket(socket.AF_UNIX)
        self.sock.settimeout(WITHIN)
        self.sock.connect(self.host)


@dataclass(frozen=True, slots=True)
class Container:
    """A running container as `docker inspect` has it."""

    id: str
    pid: int

    @property
    def owner(self) -> Owner:
        """What the exporter must call it."""
        return Owner(container=self.id[:12])

    @property
    def netns(self) -> tuple[str, str, str, str, str]:
        """The labels of a network namespace of its own."""
        return ("container", *self.owner.labels)

    @property
    def processes(self) -> set[int]:
        """The processes in it, by who started whom."""
        first = psutil.Process(self.pid)
        return {one.pid for one in (first, *first.children(recursive=True))}


@dataclass(frozen=True, slots=True)
class Docker:
    """A daemon of the test's own."""

    socket: Path

    def ask(self, method: str, path: str, body: Any = None) -> Any:
        """Send one request to the API and return what it answers."""
        raw = body if isinstance(body, bytes) else json.dumps(body).encode() if body is not None else None
        kind = "application/x-tar" if isinstance(body, bytes) else "application/json"
        with closing(UnixConnection(str(self.socket))) as connection:
            connection.request(method, path, raw, {"Content-Type": kind, "Host": "docker"})
            answer = connection.getresponse()
            text = answer.read().decode()
        assert answer.status < 300, f"{method} {path}: {answer.status} {text}"
        return json.loads(text) if answer.headers.get_content_type() == "application/json" and text else text

    @contextmanager
    def run(
        self, *command: str, network: str = "none", name: str = "", below: str = "", user: str = "", **more: Any
    ) -> Iterator[Container]:
        """Run a container and remove it afterwards, if it is still there. `more` is what HostConfig has in the API."""
        host = more | {
            "NetworkMode": network,
            "CgroupParent": f"/{CGROUPS}{below}",
            # Its own profile would need AppArmor's compiler, wherever the kernel has AppArmor.
            "SecurityOpt": ["apparmor=unconfined", *more.get("SecurityOpt", [])],
        }
        body = {"Image": "shoal", "Cmd": command or ("sleep", "600"), "User": user, "HostConfig": host}
        made = self.ask("POST", f"/containers/create?name={quote(name)}" if name else "/containers/create", body)["Id"]
        try:
            self.ask("POST", f"/containers/{made}/start")
            yield self.inspect(made)
        finally:
            if any(one["Id"] == made for one in self.ask("GET", "/containers/json?all=1")):
                self.remove(made)

    def inspect(self, identity: str) -> Container:
        """Return what Docker says of a container now."""
        said = self.ask("GET", f"/containers/{identity}/json")
        assert said["State"]["Running"], said["State"]
        return Container(said["Id"], said["State"]["Pid"])

    def remove(self, identity: str) -> None:
        """Kill a container and remove it."""
        self.ask("DELETE", f"/containers/{identity}?force=1")


@pytest.fixture(scope="module")
def docker() -> Iterator[Docker]:
    """Start a daemon and leave nothing of it, whatever has happened meanwhile."""
    with TemporaryDirectory(prefix="shoal-docker-") as directory, no_cgroups(), no_orphans():
        made = Docker(Path(directory) / "socket")
        with daemon(Path(directory), made):
            made.ask("POST", "/images/create?fromSrc=-&repo=shoal", image())
            yield made


@contextmanager
def daemon(root: Path, made: Docker) -> Iterator[None]:
    """Run dockerd, which starts a containerd, in a mount namespace that ends with the last of their processes."""
    (root / "settings.json").write_text("{}")
    options = {
        "host": f"unix://{made.socket}",
        "config-file": root / "settings.json",
        "data-root": root / "data",
        "exec-root": root / "state",
        "pidfile": root / "pid",
        "storage-driver": "vfs",
        "bridge": "none",
        "iptables": "false",
        "ip6tables": "false",
        "ip-forward": "false",
    }
    # It keeps a key in /etc/docker and its shims' sockets in /run, wherever it is told to keep the rest.
    prepare = 'set -e; mkdir -p /etc/docker; for d in /run /etc/docker; do mount -t tmpfs tmpfs $d; done; exec "$@"'
    arguments = [f"--{name}={value}" for name, value in options.items()]
    command = ["unshare", "--mount", "sh", "-c", prepare, "-", "dockerd", *arguments]
    with (root / "log").open("wb") as log, subprocess.Popen(command, stdout=log, stderr=log) as process:
        try:
            wait_for_daemon(made, process, root / "log")
            yield
        finally:
            process.terminate()
            try:
                process.wait(WITHIN)
            except subprocess.TimeoutExpired:
                process.kill()


def wait_for_daemon(made: Docker, process: subprocess.Popen[bytes], log: Path) -> None:
    """Return when the daemon answers; fail with its last words when it does not."""
    deadline = time.monotonic() + WITHIN
    while True:
        try:
            made.ask("GET", "/_ping")
        except (OSError, http.client.HTTPException):
            last = log.read_text()[-2000:]
            assert process.poll() is None, f"the daemon ended: {last}"
            assert time.monotonic() < deadline, f"the daemon does not answer: {last}"
            time.sleep(0.1)
        else:
            return


@contextmanager
def no_orphans() -> Iterator[None]:
    """End what outlives the daemon: containers and their shims are nobody's children then, and so become ours."""
    prctl = ctypes.CDLL(None, use_errno=True).prctl
    before = set(psutil.Process().children())
    assert prctl(PR_SET_CHILD_SUBREAPER, 1, 0, 0, 0) == 0
    try:
        yield
    finally:
        deadline = time.monotonic() + WITHIN
        # Whoever is killed leaves us its children, so there may be others each time.
        while (left := set(psutil.Process().children()) - before) and time.monotonic() < deadline:
            for one in left:
                with suppress(psutil.NoSuchProcess):
                    one.kill()
            psutil.wait_procs(left, timeout=1)
        prctl(PR_SET_CHILD_SUBREAPER, 0, 0, 0, 0)
        assert not left, f"these could not be ended: {left}"


@contextmanager
def no_cgroups() -> Iterator[None]:
    """Remove the cgroups that containers were in, once no process is in them any more."""
    try:
        yield
    finally:
        for root in ("/sys/fs/cgroup", *glob("/sys/fs/cgroup/*/")):
            for directory, _, _ in os.walk(os.path.join(root, CGROUPS), topdown=False):
                os.rmdir(directory)


def image() -> bytes:
    """Return a root file system with nothing but busybox, as a tar."""
    packed = io.BytesIO()
    with tarfile.open(fileobj=packed, mode="w") as tar:
        tar.add(str(shutil.which("busybox")), "bin/busybox")
        for applet in ("sh", "sleep", "httpd"):
            link = tarfile.TarInfo(f"bin/{applet}")
            link.type, link.linkname = tarfile.SYMTYPE, "busybox"
            tar.addfile(link)
    return packed.getvalue()


def node() -> Node:
    """Return the node as the next scrape would see it."""
    return Node(Roots())


def networks(*containers: Container) -> list[tuple[str, ...]]:
    """Return the labels of each network namespace that any of these containers is in."""
    ids = {os.stat(f"/proc/{one.pid}/net/netstat").st_ino for one in containers}
    return [space.labels for space in node().network_namespaces() if space.id in ids]


def labels() -> list[tuple[str, ...]]:
    """Return the labels of every network namespace of the machine."""
    return [space.labels for space in node().network_namespaces()]


def test_each_container_has_its_network_and_its_processes(docker: Docker) -> None:
    """Under the first 12 digits of its id, whatever it and the cgroups above it are called."""
    command = ("sh", "-c", "sleep 600 & sleep 600 & wait")
    with docker.run(*command) as one, docker.run(*command, name="x_Y.9-z", below="/a b/\t'%n") as other:
        assert labels().count(one.netns) == labels().count(other.netns) == 1
        assert set(networks(one, other)) == {one.netns, other.netns}
        for container in (one, other):
            assert container.owner in {workload.owner for workload in node().inventory().workloads}
            assert len(container.processes) == 3
            assert node().processes()[container.owner] == container.processes


def test_one_network_of_two_containers(docker: Docker) -> None:
    """It is listed once, as that of the container that was there first; the processes remain each one's own."""
    with docker.run() as one, docker.run(network=f"container:{one.id}") as other:
        assert networks(one, other) == [one.netns]
        assert other.netns not in labels()
        found = node().processes()
        assert found[one.owner] == {one.pid}
        assert found[other.owner] == {other.pid}


def test_the_hosts_network(docker: Docker) -> None:
    """A container without a network of its own does not make the host's network its own."""
    with docker.run(network="host") as one:
        assert networks(one) == [("host", "", "", "", "")]
        assert one.netns not in labels()
        assert node().processes()[one.owner] == {one.pid}


def test_a_restarted_and_a_removed_container(docker: Docker) -> None:
    """It is the same container after a restart, though nothing else is, and gone in the scrape after its removal."""
    with docker.run() as before:
        assert networks(before) == [before.netns]
        docker.ask("POST", f"/containers/{before.id}/restart?t=0")
        after = docker.inspect(before.id)
        assert after.pid != before.pid
        assert networks(after) == [before.netns]
        assert labels().count(after.netns) == 1
        assert node().processes()[after.owner] == {after.pid}
        docker.remove(after.id)
        assert after.netns not in labels()
        assert after.owner not in {workload.owner for workload in node().inventory().workloads}
        assert after.owner not in node().processes()


def test_listeners_of_containers_that_share_a_network(docker: Docker) -> None:
    """The exporter itself tells by their cgroups which of the two containers listens where."""
    with (
        docker.run("httpd", "-f", "-p", "127.0.0.1:7001") as one,
        docker.run("httpd", "-f", "-p", "127.0.0.1:7002", network=f"container:{one.id}") as other,
    ):
        found = re.findall(
            r'^shoal_listener_accept_queue_limit\{netns="container",address="127.0.0.1",port="(700.)",container="(\w+)"',
            scraped(lambda text: 'port="7001"' in text and 'port="7002"' in text),
            re.MULTILINE,
        )
        assert dict(found) == {"7001": one.owner.container, "7002": other.owner.container}


@pytest.mark.parametrize("unit", ["", "/containerd.service"])
def test_a_container_that_is_in_v1_only(docker: Docker, unit: str) -> None:
    """Where runc left it before 1.1, in v2's root or the runtime's unit: its network is its own, and nobody else's.

    Without cgroup v1 there is no such place, and the container keeps being found where it is.
    """
    with docker.run() as one:
        if V2_BESIDE_V1.is_dir():
            cgroup = V2_BESIDE_V1 / CGROUPS / unit.strip("/") if unit else V2_BESIDE_V1
            cgroup.mkdir(exist_ok=True)
            (cgroup / "cgroup.procs").write_text(str(one.pid))
        assert networks(one) == [one.netns]
        assert node().owner_of_process(one.pid) == one.owner
        holders = {owner for owner, pids in node().processes().items() if one.pid in pids}
        assert holders <= {one.owner}


@pytest.mark.parametrize("tier", TIERS)
def test_a_runtime_takes_the_seccomp_profiles(tier: str, docker: Docker) -> None:
    """The exporter runs in a container as the chart makes it, with the list of system calls that runc was given."""
    with closing(socket.socket()) as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    spec = next(made for made in objects({"tier": tier}) if made["kind"] == "DaemonSet")["spec"]["template"]["spec"]
    security = next(each for each in spec["containers"] if each["name"] == "shoal")["securityContext"]
    # It finds Python and the exporter where this test does.
    places = {"/usr", "/lib", "/lib64", sys.prefix, sys.base_prefix, str(REPOSITORY)}
    command = [sys.executable, "-m", "shoal", f"--web.listen-address=127.0.0.1:{port}"]
    command += ["--netns.enter=true"] if tier == "full" else []
    more = {
        "PidMode": "host",
        "CapDrop": ["ALL"],
        "CapAdd": security["capabilities"].get("add", []),
        "ReadonlyRootfs": True,
        "Binds": [f"{place}:{place}:ro" for place in sorted(places)],
        "SecurityOpt": [f"seccomp={(PROFILES / TIERS[tier]).read_text()}", "no-new-privileges"],
    }
    user = f"{security['runAsUser']}:{security['runAsGroup']}"
    with docker.run(*command, network="host", user=user, **more) as one:
        text, deadline = "", time.monotonic() + WITHIN
        # The first scrape begins the dump.
        complete = "shoal_build_info" if tier == "counters" else 'shoal_signal_available{signal="conntrack_dump"} 1'
        while complete not in text:
            logs = f"/containers/{one.id}/logs?stderr=1"
            assert time.monotonic() < deadline, f"something is missing: {docker.ask('GET', logs)}"
            time.sleep(0.1)
            with suppress(OSError), urllib.request.urlopen(f"http://127.0.0.1:{port}/metrics", timeout=10) as answer:
                text = answer.read().decode()
        status = Path(f"/proc/{one.pid}/status").read_text()
    assert re.findall(r"^Seccomp:\t(\d)$", status, re.MULTILINE) == ["2"]
    assert not re.findall(r'^shoal_scrape_collector_success\{collector="(\w+)"\} 0', text, re.MULTILINE)
    found = re.findall(r'^shoal_signal_available\{signal="(\w+)"\} 1$', text, re.MULTILINE)
    assert {"listen_queue_listeners", "pressure_node", "reverse_path_drops"} <= set(found)
    assert ("conntrack_dump" in found) is (tier != "counters")
    assert ("listen_queue_pods" in found) is (tier == "full")


def scraped(complete: Callable[[str], bool]) -> str:
    """Run the exporter, allowed to enter network namespaces, and return its metrics as soon as they are complete."""
    with closing(socket.socket()) as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    command = [sys.executable, "-m", "shoal", f"--web.listen-address=127.0.0.1:{port}", "--netns.enter=true"]
    environment = {name: value for name, value in os.environ.items() if not name.startswith("SHOAL_")}
    deadline = time.monotonic() + WITHIN
    with subprocess.Popen(command, env=environment) as process:
        try:
            while True:
                text = ""
                with (
                    suppress(OSError),
                    urllib.request.urlopen(f"http://127.0.0.1:{port}/metrics", timeout=10) as answer,
                ):
                    text = answer.read().decode()
                if complete(text):
                    return text
                assert process.poll() is None, "the exporter ended"
                assert time.monotonic() < deadline, f"something is missing from: {text}"
                time.sleep(0.2)
        finally:
            process.kill()
