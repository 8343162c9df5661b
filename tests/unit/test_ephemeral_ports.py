"""Ephemeral ports: used up for real in network namespaces of the test's own, and the crowds that are no failure."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

import pytest
from hypothesis import given
from hypothesis import strategies as st

from shoal.collectors import load
from shoal.inventory import Node, Owner
from shoal.kernel.files import ParseError, Roots
from shoal.kernel.namespaces import open_in_namespace
from shoal.kernel.netlink.core import open_socket
from shoal.kernel.netlink.ports import count_ports, filter_ports, read_port_use
from shoal.kernel.port_range import PortRange, parse_port_range, parse_reserved_ports, read_port_range
from shoal.kernel.sockstat import parse_sockstat, read_tcp_sockets
from shoal.settings import resolve

if TYPE_CHECKING:
    from collections.abc import Iterator

FIXTURES = Path(__file__).parent / "fixtures"
KERNELS = sorted(path.name for path in FIXTURES.iterdir() if (path / "proc" / "1" / "net" / "sockstat").exists())

# In the client's namespace: connect to each of ADDRESSES in turn until COUNT connections are made or none can be, close
# on this side first when told to, say how far it came, and wait.
CLIENT = """
import socket, sys, time
count, close, addresses = int(sys.argv[1]), sys.argv[2] == "close", sys.argv[3:]
kept, made = [], 0
try:
    while made < count:
        c = socket.create_connection((addresses[made % len(addresses)], 8080), 5)
        made += 1
        c.close() if close else kept.append(c)
except OSError as error:
    print(made, error.strerror, flush=True)
else:
    print(made, "all", flush=True)
time.sleep(60)
"""
# Hold COUNT connections to ADDRESS, and close them all when told to by SIGTERM.
HOLDER = """
import signal, socket, sys, time
signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGTERM})
kept = [socket.create_connection((sys.argv[2], 8080), 5) for _ in range(int(sys.argv[1]))]
print("up", flush=True)
signal.sigwait({signal.SIGTERM})
for c in kept:
    c.close()
print("closed", flush=True)
time.sleep(60)
"""
SERVER = """
import socket, threading, sys
s = socket.socket(); s.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
s.bind(("0.0.0.0", 8080)); s.listen(1024); print("up", flush=True)
kept = []
while True:
    c, _ = s.accept()
    if sys.argv[1] == "keep":
        kept.append(c)
    else:
        c.recv(1); c.close()
"""


class Pair:
    """A client's and a server's network namespace, joined; the server has as many addresses as are asked for."""

    def __init__(self, stack: ExitStack, addresses: int = 1) -> None:
        self.client, self.server = f"shoal-c{os.getpid()}", f"shoal-s{os.getpid()}"
        self._stack = stack
        for name in (self.client, self.server):
            run("ip", "netns", "add", name)
            stack.callback(subprocess.run, ["ip", "netns", "delete", name], check=False)
        run("ip", "link", "add", "c0", "netns", self.client, "type", "veth", "peer", "name", "s0", "netns", self.server)
        self.addresses = [f"10.77.{number >> 8}.{(number & 255) + 2}" for number in range(addresses)]
        run("ip", "-n", self.client, "address", "add", "10.77.255.1/16", "dev", "c0")
        for address in self.addresses:
            run("ip", "-n", self.server, "address", "add", f"{address}/16", "dev", "s0")
        run("ip", "-n", self.client, "link", "set", "c0", "up")
        run("ip", "-n", self.server, "link", "set", "s0", "up")

    def sysctl(self, setting: str) -> None:
        """Change a setting of the client's namespace."""
        run("ip", "netns", "exec", self.client, "sysctl", "-qw", setting)

    def client_sockets(self) -> list[str]:
        """Return what `ss` says of the client's TCP sockets towards the server, one line each."""
        return run("ip", "netns", "exec", self.client, "ss", "-tanH", "dst", "10.77.0.2").splitlines()

    def start(self, name: str, program: str, *arguments: str) -> tuple[subprocess.Popen[str], str]:
        """Start a program in one of the two and return it with the first line that it prints."""
        command = ["ip", "netns", "exec", name, sys.executable, "-c", program, *arguments]
        process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
        self._stack.callback(end, process)
        assert process.stdout
        return process, process.stdout.readline().strip()


def run(*command: str) -> str:
    """Run a command that must succeed and return what it prints."""
    return subprocess.run(command, check=True, capture_output=True, text=True).stdout


def end(process: subprocess.Popen[str]) -> None:
    """End a process and close what is left of it."""
    process.kill()
    process.communicate()


@contextmanager
def pair(addresses: int = 1, server: str = "keep") -> Iterator[Pair]:
    """Set up the two namespaces with a server that accepts and keeps, or closes second; take all down again."""
    with ExitStack() as stack:
        two = Pair(stack, addresses)
        two.start(two.server, SERVER, server)
        yield two


def scrape(*, enter: bool = True) -> tuple[dict[str, dict[tuple[str, ...], float]], dict[str, str]]:
    """Run the collector on this machine and return its samples and the reasons of its signals."""
    one = load("ephemeral_ports")(resolve({"netns.enter": str(enter).lower()}, {}))
    families = one.read(Node(Roots()))
    found = {family.metric.name: dict(family.samples) for family in families}
    return found, {signal: why[0].value if why else "" for signal, why in one.availability.absent.items()}


@pytest.mark.root
def test_ports_used_up_by_time_wait() -> None:
    """With a range of 200 the 201st connect fails, and the tuple stands at 200 of 200; `ss` counts the same."""
    with pair(server="close") as two:
        two.sysctl("net.ipv4.ip_local_port_range=40000 40199")
        _, said = two.start(two.client, CLIENT, "300", "close", *two.addresses)
        connected, error = said.split(maxsplit=1)
        # Now and then one is reset, as its server closes first, and its port is free again at once.
        assert 200 <= int(connected) < 205
        assert error == "Cannot assign requested address"
        witness = two.client_sockets()
        deadline = time.monotonic() + 10
        while not all(line.startswith("TIME-WAIT") for line in witness) and time.monotonic() < deadline:
            time.sleep(0.05)  # the server answers the last ones yet
            witness = two.client_sockets()
        found, reasons = scrape()
        labels = (two.client, "", "", "", "", "10.77.255.1", "10.77.0.2", "8080")
        assert found["shoal_ephemeral_ports_used"][labels] == len(witness) == 200
        assert found["shoal_ephemeral_ports_time_wait"][labels] == 200
        assert found["shoal_ephemeral_ports_available"][labels] == 200
        assert found["shoal_tcp_time_wait_sockets"][two.client, "", "", "", ""] == 200
        # The server closed none of them and its port is its own: nothing of it is near an end.
        assert not any(row[0] == two.server for row in found["shoal_ephemeral_ports_used"])
        assert set(reasons.values()) == {""}


@pytest.mark.root
def test_sockets_that_find_no_place_in_time_wait() -> None:
    """With room for 20 in TIME_WAIT the others are closed without it and counted, as `nstat` and `ss` have it."""
    with pair(server="close") as two:
        two.sysctl("net.ipv4.tcp_max_tw_buckets=20")
        _, said = two.start(two.client, CLIENT, "60", "close", *two.addresses)
        assert said == "60 all"
        found, _ = scrape()
        counter = "TcpExtTCPTimeWaitOverflow"
        by_nstat = run("ip", "netns", "exec", two.client, "nstat", "-asz", counter).splitlines()[-1].split()[1]
        waiting = [line for line in two.client_sockets() if line.startswith("TIME-WAIT")]
        labels = (two.client, "", "", "", "")
        assert len(waiting) == 20
        assert found["shoal_tcp_time_wait_overflows_total"][labels] == int(by_nstat) == 40
        assert found["shoal_tcp_time_wait_sockets"][labels] == 20


@pytest.mark.root
def test_reserved_ports_are_not_available() -> None:
    """The kernel never hands out a reserved port, so the end comes earlier, at exactly what is exported."""
    with pair() as two:
        two.sysctl("net.ipv4.ip_local_port_range=40000 40199")
        two.sysctl("net.ipv4.ip_local_reserved_ports=40010,40100-40148,50000")
        _, said = two.start(two.client, CLIENT, "300", "keep", *two.addresses)
        assert said == "150 Cannot assign requested address"
        found, _ = scrape()
        labels = (two.client, "", "", "", "", "10.77.255.1", "10.77.0.2", "8080")
        assert found["shoal_ephemeral_ports_used"][labels] == found["shoal_ephemeral_ports_available"][labels] == 150
        assert found["shoal_ephemeral_ports_time_wait"][labels] == 0


@pytest.mark.root
def test_the_owner_stays_when_all_is_in_time_wait() -> None:
    """A socket in TIME_WAIT has no cgroup; whose its port is was known while it was open."""
    unit = Owner(unit="proxy.service")

    class OneOwner(Node):
        def owner_of_socket(self, cgroup_id: int | None, netns: tuple[str, ...]) -> Owner:
            return unit if cgroup_id else Owner(*netns[1:])

    collector = load("ephemeral_ports")(resolve({"netns.enter": "true"}, {}))

    def owners(client: str, state: str) -> set[str]:
        deadline = time.monotonic() + 10
        while any(not line.startswith(state) for line in two.client_sockets()) and time.monotonic() < deadline:
            time.sleep(0.05)
        families = {family.metric.name: family.samples for family in collector.read(OneOwner(Roots()))}
        return {labels[4] for labels, _ in families["shoal_ephemeral_ports_used"] if labels[0] == client}

    with pair(server="close") as two:
        two.sysctl("net.ipv4.ip_local_port_range=40000 40199")
        process, said = two.start(two.client, HOLDER, "150", *two.addresses)
        assert said == "up"
        assert owners(two.client, "ESTAB") == {"proxy.service"}
        process.terminate()
        assert process.stdout
        assert process.stdout.readline().strip() == "closed"
        assert owners(two.client, "TIME-WAIT") == {"proxy.service"}
        collector = load("ephemeral_ports")(resolve({"netns.enter": "true"}, {}))
        assert owners(two.client, "TIME-WAIT") == {""}


@pytest.mark.slow
@pytest.mark.root
def test_time_wait_that_may_be_taken_over_holds_no_port() -> None:
    """With tcp_tw_reuse=1, twice as many connections as there are ports find one, and none counts as used."""
    with pair(server="close") as two:
        two.sysctl("net.ipv4.ip_local_port_range=40000 40199")
        two.sysctl("net.ipv4.tcp_tw_reuse=1")
        for expected in ("180 all", "180 all"):
            _, said = two.start(two.client, CLIENT, "180", "close", *two.addresses)
            assert said == expected
            time.sleep(1.5)  # a second in TIME_WAIT is what the kernel wants
        found, _ = scrape()
        labels = (two.client, "", "", "", "", "10.77.255.1", "10.77.0.2", "8080")
        assert found["shoal_tcp_time_wait_sockets"][two.client, "", "", "", ""] >= 180
        assert found["shoal_ephemeral_ports_used"][labels] == found["shoal_ephemeral_ports_time_wait"][labels] == 0
        two.sysctl("net.ipv4.tcp_timestamps=0")
        found, _ = scrape()
        assert found["shoal_ephemeral_ports_used"][labels] == found["shoal_ephemeral_ports_time_wait"][labels] >= 180


@pytest.mark.slow
@pytest.mark.root
def test_time_wait_on_loopback_holds_no_port() -> None:
    """The kernel's default is to take over ports in TIME_WAIT on loopback, and nowhere else."""
    with pair(server="close") as two:
        run("ip", "-n", two.server, "link", "set", "lo", "up")
        run("ip", "netns", "exec", two.server, "sysctl", "-qw", "net.ipv4.ip_local_port_range=40000 40199")
        assert run("ip", "netns", "exec", two.server, "sysctl", "-n", "net.ipv4.tcp_tw_reuse").strip() == "2"
        for _ in range(2):
            _, said = two.start(two.server, CLIENT, "180", "close", "127.0.0.1")
            assert said == "180 all"
            time.sleep(1.5)
        found, _ = scrape()
        assert found["shoal_tcp_time_wait_sockets"][two.server, "", "", "", ""] >= 180
        assert found["shoal_ephemeral_ports_used"][two.server, "", "", "", "", "127.0.0.1", "127.0.0.1", "8080"] == 0


@pytest.mark.root
def test_many_connections_spread_over_many_destinations() -> None:
    """As many sockets as there are ports, over twenty destinations: each is far from its end."""
    with pair(addresses=20) as two:
        two.sysctl("net.ipv4.ip_local_port_range=40000 40199")
        _, said = two.start(two.client, CLIENT, "200", "keep", *two.addresses)
        assert said == "200 all"
        found, _ = scrape()
        used = {row: value for row, value in found["shoal_ephemeral_ports_used"].items() if row[0] == two.client}
        # Ten at most are shown, of which other namespaces of a busy machine may have some; the worst is always there.
        assert 1 <= len(used) <= 10
        assert set(used.values()) == {10}
        assert found["shoal_ephemeral_ports_tuples_cut"][()] >= 10


@pytest.mark.root
def test_a_busy_server_holds_no_ephemeral_port() -> None:
    """A server whose own port lies in the range has one port, however many clients and however much TIME_WAIT."""
    with pair() as two:
        run("ip", "netns", "exec", two.server, "sysctl", "-qw", "net.ipv4.ip_local_port_range=8000 8199")
        _, said = two.start(two.client, CLIENT, "150", "keep", *two.addresses)
        assert said == "150 all"
        found, _ = scrape()
        assert found["shoal_tcp_sockets_in_use"][two.server, "", "", "", ""] == 151
        assert not any(row[0] == two.server for row in found["shoal_ephemeral_ports_used"])


@pytest.mark.root
def test_without_being_asked_no_namespace_is_entered() -> None:
    """The counts of every namespace are there without a privilege; the tuples are absent with a reason."""
    with pair() as two:
        two.sysctl("net.ipv4.ip_local_port_range=40000 40199")
        two.start(two.client, CLIENT, "150", "keep", *two.addresses)
        found, reasons = scrape(enter=False)
        assert found["shoal_tcp_sockets_in_use"][two.client, "", "", "", ""] == 150
        assert not any(row[0] == two.client for row in found["shoal_ephemeral_ports_used"])
        assert reasons["ephemeral_ports_namespaces"] == "not_enabled"


@pytest.mark.root
def test_the_kernel_picks_the_ports_and_tells_the_owner() -> None:
    """Only ports of the range are sent, down to its edges, and a tuple with live connections has a cgroup."""
    with pair() as two:
        two.sysctl("net.ipv4.ip_local_port_range=40000 40063")
        process, said = two.start(two.client, CLIENT, "60", "keep", *two.addresses)
        assert said == "60 all"
        ports = [int(line.split()[3].rpartition(":")[2]) for line in two.client_sockets()]

        def count(low: int, high: int) -> int:
            use, _ = read_port_use(
                PortRange(low, high, 0, 0),
                (),
                1,
                opener=lambda subsystem: open_in_namespace("/proc", process.pid, lambda: open_socket(subsystem)),
            )
            return use[0].used if use else 0

        assert count(40000, 40063) == 60
        assert count(min(ports), max(ports)) == 60
        assert count(min(ports) + 1, max(ports)) == count(min(ports), max(ports) - 1) == 59
        assert count(1024, 39999) == 0
        use, tuples = read_port_use(
            PortRange(40000, 40063, 0, 0),
            (),
            1,
            opener=lambda subsystem: open_in_namespace("/proc", process.pid, lambda: open_socket(subsystem)),
        )
        assert tuples == 1
        assert use[0].cgroup_id is not None


def test_the_filter_is_as_long_as_it_says() -> None:
    """An attribute of two comparisons, each an operation and the port behind it."""
    attribute = filter_ports(32768, 60999)
    assert len(attribute) == 20 == int.from_bytes(attribute[:2], sys.byteorder)


@given(bodies=st.lists(st.binary(max_size=200), max_size=20))
def test_arbitrary_messages_are_counted_or_refused(bodies: list[bytes]) -> None:
    """No other exception than `ParseError` comes out."""
    try:
        counted = count_ports(bodies, ())
    except ParseError:
        return
    assert sum(count for count, _, _ in counted.values()) == len(bodies)


@pytest.mark.parametrize("kernel", KERNELS)
def test_sockstat_of_recorded_kernels(kernel: str) -> None:
    """Each kernel has the two numbers, and a range that is the default."""
    proc = str(FIXTURES / kernel / "proc")
    sockets = read_tcp_sockets(proc, 1)
    assert sockets.in_use >= 0
    assert sockets.time_wait >= 0


def test_sockets_of_both_families_are_added(tmp_path: Path) -> None:
    """IPv6 sockets are in a file of their own, which a kernel without IPv6 lacks; TIME_WAIT has both already."""
    (tmp_path / "1/net").mkdir(parents=True)
    (tmp_path / "1/net/sockstat").write_bytes(b"sockets: used 9\nTCP: inuse 5 orphan 0 tw 7 alloc 1 mem 305\n")
    assert read_tcp_sockets(str(tmp_path), 1).in_use == 5
    (tmp_path / "1/net/sockstat6").write_bytes(b"TCP6: inuse 4\nUDP6: inuse 1\n")
    sockets = read_tcp_sockets(str(tmp_path), 1)
    assert (sockets.in_use, sockets.time_wait) == (9, 7)
    (tmp_path / "1/net/sockstat").write_bytes(b"TCP: inuse 5\n")
    with pytest.raises(ParseError):
        read_tcp_sockets(str(tmp_path), 1)


def test_port_range_and_reserved_ports(tmp_path: Path) -> None:
    """Reserved ports count only inside the range, and a range that is none is refused."""
    (tmp_path / "sys/net/ipv4").mkdir(parents=True)
    (tmp_path / "sys/net/ipv4/ip_local_port_range").write_bytes(b"32768\t60999\n")
    (tmp_path / "sys/net/ipv4/ip_local_reserved_ports").write_bytes(b"8080,32000-32769,60999\n")
    (tmp_path / "sys/net/ipv4/tcp_tw_reuse").write_bytes(b"2\n")
    (tmp_path / "sys/net/ipv4/tcp_timestamps").write_bytes(b"1\n")
    ports = read_port_range(str(tmp_path))
    assert ports.time_wait_reuse == 2
    assert (ports.low, ports.high, ports.available) == (32768, 60999, 28232 - 3)
    for data in (b"", b"1\n", b"2 1\n", b"1 2 3\n", b"1 99999\n", b"a b\n"):
        with pytest.raises(ParseError):
            parse_port_range(data)
    assert parse_reserved_ports(b"\n") == []
    for data in (b"", b"a\n", b"1-\n", b"-1\n", b"1-2-3\n"):
        with pytest.raises(ParseError):
            parse_reserved_ports(data)


@given(data=st.binary(max_size=200))
def test_arbitrary_bytes(data: bytes) -> None:
    """The parsers of the small files give a value or a `ParseError`."""
    for parse in (parse_sockstat, parse_port_range, parse_reserved_ports):
        try:
            parse(data)
        except ParseError as error:
            assert str(error)  # noqa: PT017  (either outcome is right)
