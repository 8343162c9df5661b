"""Which listener drops: real queues overflowed on loopback, and in a network namespace of the test's own."""

from __future__ import annotations

import asyncio
import os
import socket
import subprocess
import sys
import time
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from shoal.collectors import load
from shoal.inventory import Node
from shoal.kernel.files import Roots
from shoal.settings import resolve

if TYPE_CHECKING:
    from collections.abc import Iterator

    from shoal.collectors import Collector

# Listens with a backlog of 4, is connected to twelve times, and accepts nobody: five are queued, seven refused.
OVERFLOWN = """
import socket, subprocess, sys, time
subprocess.run(["ip", "link", "set", "lo", "up"], check=True)
server = socket.socket(); server.bind(("127.0.0.1", 8080)); server.listen(4)
clients = []
for _ in range(12):
    client = socket.socket(); client.setblocking(False); client.connect_ex(server.getsockname()); clients.append(client)
time.sleep(0.3)
print("up", flush=True)
time.sleep(60)
"""

# Each of the four counters of a namespace: a queue that overflows; then a client that never sees the server's SYN-ACK,
# so that its requests stay half open, where cookies are off and where they are on.
COUNTED = """
import socket, subprocess, sys
from pathlib import Path
def run(*command):
    subprocess.run(command, check=True)
def connect(server, times):
    for _ in range(times):
        clients.append(socket.socket())
        clients[-1].setblocking(False)
        clients[-1].connect_ex(server.getsockname())
clients = []
run("ip", "link", "set", "lo", "up")
cookies = Path("/proc/sys/net/ipv4/tcp_syncookies")
connect(full := socket.create_server(("127.0.0.1", 8080), backlog=4), 12)
run("nft", "add table ip t; add chain ip t c { type filter hook output priority 0; };"
    "add rule ip t c tcp sport 8081 tcp flags & (syn | ack) == syn | ack drop")
cookies.write_text("0")
connect(half := socket.create_server(("127.0.0.1", 8081), backlog=4), 14)
cookies.write_text("1")
connect(half, 11)
print("up", flush=True)
sys.stdin.read()
"""
COUNTERS = {
    "shoal_listen_queue_overflows_total": "TcpExtListenOverflows",
    "shoal_listen_queue_drops_total": "TcpExtListenDrops",
    "shoal_listen_queue_request_drops_total": "TcpExtTCPReqQFullDrop",
    "shoal_listen_queue_request_cookies_total": "TcpExtTCPReqQFullDoCookies",
}

Samples = dict[str, dict[tuple[str, ...], float]]


def collector(*, enter: bool = False) -> Collector:
    """Make the collector, allowed to enter other namespaces or not."""
    return load("listen_queue")(resolve({"netns.enter": str(enter).lower()}, {}))


def scrape(one: Collector, roots: Roots | None = None) -> Samples:
    """Run the collector once on this machine."""
    return {family.metric.name: dict(family.samples) for family in one.read(Node(roots or Roots()))}


def listen(stack: ExitStack, backlog: int, port: int = 0) -> socket.socket:
    """Return a listening socket that may share its port with others."""
    server = stack.enter_context(socket.socket())
    server.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEPORT, 1)
    server.bind(("127.0.0.1", port))
    server.listen(backlog)
    return server


def connect(stack: ExitStack, port: int, times: int) -> None:
    """Begin connections and wait for none of them."""
    for _ in range(times):
        client = stack.enter_context(socket.socket())
        client.setblocking(False)  # noqa: FBT003  (the socket's own method)
        client.connect_ex(("127.0.0.1", port))


def overflows() -> int:
    """Return this namespace's ListenOverflows as nstat reads it."""
    said = subprocess.run(["nstat", "-asz", "TcpExtListenOverflows"], check=True, capture_output=True, text=True).stdout
    return int(said.splitlines()[-1].split()[1])


@contextmanager
def overflown_namespace() -> Iterator[subprocess.Popen[str]]:
    """Yield a process whose own network namespace has a listener that overflowed."""
    command = ["unshare", "--net", sys.executable, "-c", OVERFLOWN]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        try:
            assert process.stdout
            process.stdout.readline()
            yield process
        finally:
            process.kill()


def of_port(samples: dict[tuple[str, ...], float], port: int) -> float:
    """Return the value of the one listener on a port of the exporter's own namespace."""
    (value,) = [value for labels, value in samples.items() if labels[0] == "host" and labels[2] == str(port)]
    return value


def test_the_full_queue_is_told_by_its_own_series() -> None:
    """Depth, limit and drops are those of `ss`; the drops rise one for one with ListenOverflows; the other is calm."""
    with ExitStack() as stack:
        full, calm = listen(stack, 4), listen(stack, 100)
        one = collector()
        port, other = full.getsockname()[1], calm.getsockname()[1]
        before = overflows()
        connect(stack, port, 12)
        connect(stack, other, 3)
        time.sleep(0.2)
        found = scrape(one)
        said = subprocess.run(["ss", "-ltnH", f"sport = {port}"], check=True, capture_output=True, text=True)
        depth, limit = map(int, said.stdout.split()[1:3])
        assert of_port(found["shoal_listener_accept_queue_length"], port) == depth == 5
        assert of_port(found["shoal_listener_accept_queue_limit"], port) == limit == 4
        # Whoever was refused tries again after a second, so the counters go on; they are read close to one another.
        dropped = of_port(found["shoal_listener_drops_total"], port)
        assert 7 <= dropped <= overflows() - before
        assert of_port(found["shoal_listener_drops_total"], other) == 0
        assert of_port(found["shoal_listener_accept_queue_length"], other) == 3


@pytest.mark.root
def test_the_counters_of_a_namespace_are_those_of_nstat() -> None:
    """Four numbers, none of them 0 or another's: what overflowed, what was dropped, what waited half open too long."""
    name = f"shoal-nstat{os.getpid()}"
    inside = ["ip", "netns", "exec", name]
    with ExitStack() as stack:
        subprocess.run(["ip", "netns", "add", name], check=True)
        stack.callback(subprocess.run, ["ip", "netns", "delete", name], check=True)
        pipe = subprocess.PIPE
        process = stack.enter_context(
            subprocess.Popen([*inside, sys.executable, "-c", COUNTED], stdin=pipe, stdout=pipe, text=True)
        )
        stack.callback(process.kill)
        assert process.stdout
        assert process.stdout.readline() == "up\n"
        # Who is not answered asks again after a second, so both are read until nothing came in between.
        for _ in range(50):
            before = nstat(*inside)
            found = scrape(collector())
            if before == nstat(*inside):
                break
    ours = {metric: found[metric][name, "", "", "", ""] for metric in COUNTERS}
    assert ours == {metric: before[counter] for metric, counter in COUNTERS.items()}
    assert all(ours.values())
    assert len(set(ours.values())) == len(ours)


def nstat(*inside: str) -> dict[str, int]:
    """Return the counters as nstat reads them."""
    command = [*inside, "nstat", "-asz", *COUNTERS.values()]
    rows = subprocess.run(command, check=True, capture_output=True, text=True).stdout.splitlines()
    return {name: int(value) for name, value, _ in (row.split() for row in rows if not row.startswith("#"))}


def test_a_shared_port_is_one_series_that_never_falls() -> None:
    """Of a reuseport group the fullest queue stands for all, drops are summed, and stay when a member closes."""
    with ExitStack() as stack:
        first = listen(stack, 1)
        port = first.getsockname()[1]
        listen(stack, 50, port)
        one = collector()
        connect(stack, port, 60)
        time.sleep(0.2)
        found = scrape(one)
        dropped = of_port(found["shoal_listener_drops_total"], port)
        assert dropped > 0
        assert of_port(found["shoal_listener_accept_queue_limit"], port) == 1
        assert of_port(found["shoal_listener_accept_queue_length"], port) == 2
        first.close()
        found = scrape(one)
        assert of_port(found["shoal_listener_drops_total"], port) >= dropped
        assert of_port(found["shoal_listener_accept_queue_limit"], port) == 50


async def test_a_burst_between_two_scrapes_is_seen() -> None:
    """The queue was full for a moment and is empty again: the length says 0, the peak what it was."""
    with ExitStack() as stack:
        server = listen(stack, 10)
        port = server.getsockname()[1]
        one = await asyncio.to_thread(collector)
        found = await asyncio.to_thread(scrape, one)
        assert not found["shoal_listener_accept_queue_peak"], "nothing was sampled yet, so there is no peak"
        connect(stack, port, 8)
        await one.start()
        await asyncio.sleep(0.5)
        for _ in range(8):
            stack.enter_context((await asyncio.to_thread(server.accept))[0])
        found = await asyncio.to_thread(scrape, one)
        await one.stop()
        assert of_port(found["shoal_listener_accept_queue_length"], port) == 0
        assert of_port(found["shoal_listener_accept_queue_peak"], port) == 8


@pytest.mark.root
def test_the_listener_of_another_namespace() -> None:
    """Its namespace's counter is there for all, the listener itself only when the exporter may enter."""
    with overflown_namespace() as process:
        one = collector()
        found = scrape(one)
        assert max(found["shoal_listen_queue_overflows_total"].values()) >= 7
        absent = one.availability.absent["listen_queue_pods"]
        assert absent is not None
        assert absent[0] == "not_enabled"
        one = collector(enter=True)
        found = scrape(one)
        assert one.availability.absent["listen_queue_pods"] is None
        (labels,) = [
            labels
            for labels, length in found["shoal_listener_accept_queue_length"].items()
            if labels[1:3] == ("127.0.0.1", "8080") and length == 5
        ]
        assert labels[0] != "host"
        assert found["shoal_listener_accept_queue_limit"][labels] == 4
        assert found["shoal_listener_drops_total"][labels] >= 7
        assert process.poll() is None


@pytest.mark.root
def test_the_owner_of_a_listener(tmp_path: Path) -> None:
    """A listener made in a container's cgroup is the container's, by the cgroup id that the socket carries."""
    mount = next(path for path in (Path("/sys/fs/cgroup/unified"), Path("/sys/fs/cgroup"))
                 if (path / "cgroup.controllers").exists())  # fmt: skip
    identity = os.urandom(32).hex()
    cgroup = mount / f"docker-{identity}.scope"
    program = (
        f"import os, socket, time; open('{cgroup}/cgroup.procs', 'w').write(str(os.getpid()))\n"
        "s = socket.socket(); s.bind(('127.0.0.1', 0)); s.listen(); print(s.getsockname()[1], flush=True)\n"
        "time.sleep(60)"
    )
    cgroup.mkdir()
    try:
        with subprocess.Popen([sys.executable, "-c", program], stdout=subprocess.PIPE, text=True) as process:
            try:
                assert process.stdout
                port = int(process.stdout.readline())
                found = scrape(collector(), Roots(rootfs=str(tmp_path)))
                (labels,) = [row for row in found["shoal_listener_accept_queue_limit"] if row[2] == str(port)]
                assert labels == ("host", "127.0.0.1", str(port), "", "", identity[:12], "")
            finally:
                process.kill()
    finally:
        cgroup.rmdir()


def test_listeners_beyond_the_worst_are_folded() -> None:
    """Eighty listeners are 64 series and one for the rest, and the one that dropped is never among the rest."""
    with ExitStack() as stack:
        servers = [listen(stack, 5) for _ in range(80)]
        bad = servers[-1].getsockname()[1]
        connect(stack, bad, 12)
        found = scrape(collector())
        rows = found["shoal_listener_accept_queue_length"]
        assert len([row for row in rows if row[0] == "host"]) == 65
        assert ("host", "other", "", "", "", "", "") in rows
        assert found["shoal_listeners_folded"][()] >= 16
        assert of_port(found["shoal_listener_drops_total"], bad) >= 1
