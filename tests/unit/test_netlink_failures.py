"""Netlink that fails in every way it can, namespaces that end: real collectors on a real kernel, right again after."""

from __future__ import annotations

import errno
import os
import socket
import struct
import subprocess
import sys
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import pytest

from shoal.collectors import load
from shoal.inventory import Node
from shoal.kernel.files import Reason, Roots, Unavailable
from shoal.kernel.namespaces import open_in_namespace
from shoal.kernel.netlink.core import NLM_F_DUMP_INTR, NetlinkSocket, Subsystem, open_socket
from shoal.kernel.netlink.nat_rules import read_nat_backends
from shoal.kernel.netlink.routes import read_addresses, read_links
from shoal.settings import resolve

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from shoal.collectors import Collector
    from shoal.kernel.netlink.core import RawSocket

    Change = Callable[[bytes], bytes]
    Samples = dict[str, dict[tuple[str, ...], float]]

pytestmark = pytest.mark.root

# In a network namespace of its own: a listener whose queue holds sixty connections, of two hundred that there could be.
CROWD = """
import socket, subprocess, sys
subprocess.run(["ip", "link", "set", "lo", "up"], check=True)
open("/proc/sys/net/ipv4/ip_local_port_range", "w").write("40000 40199")
server = socket.create_server(("127.0.0.1", 8080), backlog=100)
kept = [socket.create_connection(server.getsockname()) for _ in range(60)]
print("up", flush=True)
sys.stdin.read()
"""
_HEADER = struct.Struct("=IHHII")
_ATTRIBUTE = struct.pack("=HHQ", 12, 0x3FFE, 4711)


@contextmanager
def in_namespace(*program: str) -> Iterator[subprocess.Popen[str]]:
    """Run a program in a new network namespace for the length of a block, from its first line on."""
    command = ["unshare", "--net", *program]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as process:
        try:
            assert process.stdout
            assert process.stdout.readline() == "up\n"
            yield process
        finally:
            process.kill()


def rebuilt(datagram: bytes, change: Callable[[int, bytes], tuple[int, bytes]]) -> bytes:
    """Return a datagram whose dumped messages have the flags and the body that `change` makes of theirs."""
    found = b""
    offset = 0
    while offset < len(datagram):
        length, kind, flags, sequence, port = _HEADER.unpack_from(datagram, offset)
        body = datagram[offset + _HEADER.size : offset + length]
        if kind >= 0x10:
            flags, body = change(flags, body)
        found += _HEADER.pack(_HEADER.size + len(body), kind, flags, sequence, port) + body + bytes(-len(body) % 4)
        offset += (length + 3) & ~3
    return found


def unknown(datagram: bytes) -> bytes:
    """Add an attribute that no kernel has to every message."""
    return rebuilt(datagram, lambda flags, body: (flags, body + bytes(-len(body) % 4) + _ATTRIBUTE))


def interrupted(datagram: bytes) -> bytes:
    """Say of every message that the table changed."""
    return rebuilt(datagram, lambda flags, body: (flags | NLM_F_DUMP_INTR, body))


def broken_attribute(datagram: bytes) -> bytes:
    """Add an attribute to every message that is longer than what is left of it."""
    return rebuilt(datagram, lambda flags, body: (flags, body + bytes(-len(body) % 4) + struct.pack("=HH", 400, 9)))


def lost(_: bytes) -> bytes:
    """Lose messages for want of buffer."""
    raise OSError(errno.ENOBUFS, os.strerror(errno.ENOBUFS))


def silent(_: bytes) -> bytes:
    """Answer nothing, as after the timeout."""
    raise TimeoutError


FAILURES: dict[str, tuple[Change, str]] = {
    "interrupted": (interrupted, "not_readable"),
    "lost": (lost, "not_readable"),
    "silent": (silent, "not_readable"),
    "cut": (lambda datagram: datagram[:-2], "malformed"),
    "garbage": (lambda datagram: b"\xff" * len(datagram), "malformed"),
    "broken attribute": (broken_attribute, "malformed"),
    "truncated": (lambda datagram: datagram, "not_readable"),
}


def failing(failure: str = "") -> type[socket.socket]:
    """Return a `socket.socket` that gives what a failure makes of the kernel's answers, or a newer kernel of them."""
    change = FAILURES[failure][0] if failure in FAILURES else unknown

    class Failing(socket.socket):
        def recvmsg(self, *sizes: int) -> Any:
            # What is longer than the buffer the kernel truncates, and says so.
            datagram, *rest = super().recvmsg(*((64,) if failure == "truncated" else sizes))
            return (change(datagram), *rest)

    return Failing


def scrape(one: Collector, node: Node | None = None) -> tuple[Samples, dict[str, str]]:
    """Return the samples of one scrape, and the reason of each signal that is absent."""
    families = one.read(node or Node(Roots()))
    absent = {signal: why[0].value for signal, why in one.availability.absent.items() if why}
    return {family.metric.name: dict(family.samples) for family in families}, absent


def ours(found: Samples) -> dict[str, float]:
    """Return what is told of the crowd: of its listener, and of the ports towards it."""
    port = "8080"
    return {
        name: value
        for name, samples in found.items()
        for labels, value in samples.items()
        if "127.0.0.1" in labels and port in labels
    }


EXPECTED = {
    "listen_queue": {
        "shoal_listener_accept_queue_length": 60,
        "shoal_listener_accept_queue_limit": 100,
        "shoal_listener_drops_total": 0,
    },
    "ephemeral_ports": {
        "shoal_ephemeral_ports_used": 60,
        "shoal_ephemeral_ports_time_wait": 0,
        "shoal_ephemeral_ports_available": 200,
    },
}
LOST = {
    "listen_queue": {"listen_queue_listeners", "listen_queue_pods"},
    "ephemeral_ports": {"ephemeral_ports_namespaces"},
}
STAYS = {"listen_queue": "shoal_listen_queue_overflows_total", "ephemeral_ports": "shoal_tcp_sockets_in_use"}


@pytest.mark.parametrize("name", EXPECTED)
def test_the_next_scrape_is_right_again(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each failure costs what netlink tells and nothing else, says why, and is gone with its cause."""
    with in_namespace(sys.executable, "-c", CROWD):
        one = load(name)(resolve({"netns.enter": "true"}, {}))
        found, absent = scrape(one)
        assert ours(found) == EXPECTED[name]
        assert absent == {}
        for failure, (_, reason) in FAILURES.items():
            with monkeypatch.context() as patched:
                patched.setattr("socket.socket", failing(failure))
                found, absent = scrape(one)
            assert ours(found) == {}, failure
            assert absent.keys() >= LOST[name], failure
            assert set(absent.values()) == {reason}, failure
            assert found[STAYS[name]], failure
            found, absent = scrape(one)
            assert ours(found) == EXPECTED[name], failure
            assert absent == {}, failure


@pytest.mark.parametrize("name", [*EXPECTED, "neighbours", "reverse_path"])
def test_attributes_that_are_not_known_change_nothing(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """A newer kernel says more of everything."""
    with in_namespace(sys.executable, "-c", CROWD):
        one = load(name)(resolve({"netns.enter": "true"}, {}))
        before, absent_before = scrape(one)
        monkeypatch.setattr("socket.socket", failing())
        found, absent = scrape(one)
    assert ours(found) == EXPECTED.get(name, {})
    assert found.keys() == before.keys()
    assert absent == absent_before


@pytest.mark.parametrize("buried", [True, False])
@pytest.mark.parametrize("name", [*EXPECTED, "conntrack", "reverse_path"])
def test_a_namespace_that_ends_while_it_is_read(name: str, *, buried: bool) -> None:
    """Its last process exits after it was listed and before it is read, and may be a zombie: it costs no signal."""
    with in_namespace(sys.executable, "-c", CROWD), in_namespace(sys.executable, "-c", CROWD) as other:
        one = load(name)(resolve({"netns.enter": "true"}, {}))
        _, absent_before = scrape(one)
        node = Node(Roots())
        assert [space.pid for space in node.network_namespaces()].count(other.pid) == 1
        other.kill()
        os.waitid(os.P_PID, other.pid, os.WEXITED | os.WNOWAIT)
        if buried:
            other.wait()
        found, absent = scrape(one, node)
        assert ours(found) == EXPECTED.get(name, {})
        assert absent.items() <= absent_before.items()
        found, absent = scrape(one)
        assert ours(found) == EXPECTED.get(name, {})
        assert absent.items() <= absent_before.items()


@pytest.mark.parametrize("name", ["neighbours", "reverse_path"])
@pytest.mark.parametrize("failure", FAILURES)
def test_what_is_asked_of_the_routing_tables(name: str, failure: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """The same for those who ask rtnetlink, of this machine as it is: every signal is lost that was there."""
    one = load(name)(resolve({}, {}))
    before, absent_before = scrape(one)
    _, reason = FAILURES[failure]
    with monkeypatch.context() as patched:
        patched.setattr("socket.socket", failing(failure))
        _, absent = scrape(one)
    assert reason in {why for signal, why in absent.items() if signal not in absent_before}
    after, absent_after = scrape(one)
    assert absent_after == absent_before
    assert after.keys() == before.keys()


class Meddler:
    """Opens sockets inside a namespace, and changes a table there after the first datagram that each gives."""

    def __init__(self, pid: int, command: str, *, sockets: int) -> None:
        self.pid = pid
        self.opened = 0
        self._command = command
        self._sockets = sockets

    def __call__(self, subsystem: Subsystem) -> RawSocket:
        """Open one more."""
        self.opened += 1
        real = open_in_namespace("/proc", self.pid, lambda: open_socket(subsystem))
        return _Meddled(real, self)

    def meddle(self) -> None:
        """Change the table, unless it was often enough."""
        if self.opened <= self._sockets:
            run_inside(self.pid, self._command.format(number=self.opened))


class _Meddled:
    def __init__(self, real: socket.socket, meddler: Meddler) -> None:
        self._real = real
        self._meddler: Meddler | None = meddler

    def __getattr__(self, name: str) -> Any:
        return getattr(self._real, name)

    def recvmsg(self, size: int, /) -> tuple[bytes, list[tuple[int, int, bytes]], int, tuple[int, int]]:
        received = self._real.recvmsg(size)
        if self._meddler and len(received[0]) > 4096:
            self._meddler.meddle()
            self._meddler = None
        return received


def run_inside(pid: int, *commands: str) -> None:
    """Run shell commands in the network namespace of a process."""
    script = "\n".join(commands)
    subprocess.run(["nsenter", f"--target={pid}", "--net", "sh", "-e"], input=script, text=True, check=True)


def addresses(opener: Meddler) -> int:
    """Return how many addresses are found."""
    with NetlinkSocket(Subsystem.ROUTE, opener=opener) as netlink:
        return len(read_addresses(netlink))


def links(opener: Meddler) -> int:
    """Return how many devices are found."""
    with NetlinkSocket(Subsystem.ROUTE, opener=opener) as netlink:
        return len(read_links(netlink))


def backends(opener: Meddler) -> int:
    """Return how many backends the NAT rules lead to."""
    return len(read_nat_backends(opener=opener).exact)


NFT_FILL = (
    "nft 'add table ip nat; add chain ip nat c {{ type nat hook prerouting priority -100; }}'; "
    "for i in $(seq {entries}); do echo add rule ip nat c tcp dport $i dnat to 10.2.$((i >> 8)).$((i & 255)):80; done "
    "| nft -f -"
)
CHANGING: dict[str, tuple[Callable[[Meddler], int], str, str, int]] = {
    "addresses": (
        addresses,
        "for i in $(seq {entries}); do echo address add 10.1.$((i >> 8)).$((i & 255))/32 dev lo; done | ip -batch -",
        "ip address add 10.9.0.{number}/32 dev lo",
        1500,
    ),
    "links": (
        links,
        "for i in $(seq {entries}); do echo link add v$i type veth peer name w$i; done | ip -batch -",
        "ip link add x{number} type veth peer name y{number}",
        60,
    ),
    "backends": (
        backends,
        NFT_FILL,
        "nft add rule ip nat c udp dport {number} dnat to 10.9.0.{number}:53",
        1000,
    ),
}


@pytest.mark.parametrize("table", CHANGING)
def test_the_kernel_says_that_a_table_changed_under_a_dump(table: str) -> None:
    """Not provoked by luck: the table is changed between two datagrams of its dump, and is then read as it is."""
    count, fill, change, entries = CHANGING[table]
    with in_namespace("sh", "-c", "echo up; exec cat") as process:
        run_inside(process.pid, fill.format(entries=entries))
        settled = count(Meddler(process.pid, change, sockets=0))
        assert settled >= entries
        once = Meddler(process.pid, change, sockets=1)
        # A pair of devices is two.
        added = 2 if table == "links" else 1
        assert count(once) == settled + added
        assert once.opened == 2, "the kernel did not say so"
        for_ever = Meddler(process.pid, change.replace("{number}", "2{number}"), sockets=9)
        with pytest.raises(Unavailable, match="keeps changing") as caught:
            count(for_ever)
        assert caught.value.reason is Reason.NOT_READABLE
        assert for_ever.opened == 4
        assert count(Meddler(process.pid, change, sockets=0)) == settled + 5 * added
