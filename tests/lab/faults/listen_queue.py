"""Failure 2: a pod's acceptor hangs, its accept queue is full, and connections are refused without a word."""

from __future__ import annotations

import socket
import struct
import time
from collections import deque
from contextlib import ExitStack, closing
from typing import TYPE_CHECKING, Final, NoReturn

from tests.lab.fault import Culprit, Decoy, Fault, Shows
from tests.lab.node import ready

if TYPE_CHECKING:
    from tests.lab.fault import Story
    from tests.lab.node import Node

_LOOPBACK: Final = "127.0.0.1"
_PORT: Final = 8080
_TICK: Final = 0.05
_BURST: Final = 100
"""Connections of the burst that the queue absorbs."""

# Documentation prefixes (RFC 5737), so that no answer could reach anything real.
_SWALLOWED: Final = "198.51.100.9"
_UNROUTABLE: Final = "203.0.113.9"


def overflow(node: Node) -> Story:
    """A listener whose queue holds sixteen never accepts, and clients keep connecting."""
    with node.pod("checkout") as pod:
        yield Culprit(pod.labels, {"pid": str(pod.sandbox)})
        sick = pod.start(_never_accept)
        yield None
        pod.kill(sick)
        yield None


def _never_accept() -> NoReturn:
    with ExitStack() as stack:
        address = _listener(stack, backlog=16).getsockname()
        clients: deque[socket.socket] = deque()
        ready()
        while True:
            clients.append(stack.enter_context(_client()))
            clients[-1].connect_ex(address)
            if len(clients) > 4 / _TICK:
                clients.popleft().close()
            time.sleep(_TICK)


def closed_port(node: Node) -> Story:
    """Every connection goes to a port that is bound and not listened on, and is answered by a reset (TcpOutRsts)."""
    with node.pod("closed-port") as pod:
        yield Culprit(pod.labels, happened=lambda: pod.counter("TcpOutRsts") > _BURST)
        pod.start(_knock)
        yield None


def _knock() -> NoReturn:
    with closing(socket.socket()) as reserved:
        reserved.bind((_LOOPBACK, 0))
        ready()
        while True:
            with _client() as client:
                client.connect_ex(reserved.getsockname())
            time.sleep(_TICK)


def syn_cookies(node: Node) -> Story:
    """A SYN flood is answered by cookies and nothing is lost: a full queue of requests, not of connections.

    With tcp_syncookies=1 the kernel begins to send cookies (TCPReqQFullDoCookies) when as many half-open requests
    wait as the backlog holds. A route into the loopback device makes the answers leave and reach nobody.
    """
    with node.pod("syn-flood") as pod:
        pod.sysctl("net.ipv4.tcp_syncookies", 1)
        pod.ip(f"route add {_SWALLOWED}/32 dev lo")
        yield Culprit(pod.labels, happened=lambda: pod.counter("TcpExtTCPReqQFullDoCookies") > _BURST)
        pod.start(lambda: _flood(_SWALLOWED))
        yield None


def without_cookies(node: Node) -> Story:
    """The same flood where no cookies are sent: requests are dropped (TCPReqQFullDrop), and no connection is."""
    with node.pod("syn-flood-no-cookies") as pod:
        pod.sysctl("net.ipv4.tcp_syncookies", 0)
        pod.ip(f"route add {_SWALLOWED}/32 dev lo")
        yield Culprit(pod.labels, happened=lambda: pod.counter("TcpExtTCPReqQFullDrop") > _BURST)
        pod.start(lambda: _flood(_SWALLOWED))
        yield None


def drops_without_overflow(node: Node) -> Story:
    """SYNs come from where no route leads back: each is dropped (ListenDrops), and no queue is full.

    tcp_conn_request() drops a request that it cannot route an answer to, and counts it like any other.
    """
    with node.pod("no-route-back") as pod:
        yield Culprit(pod.labels, happened=lambda: pod.counter("TcpExtListenDrops") > _BURST)
        pod.start(lambda: _flood(_UNROUTABLE))
        yield None


def absorbed_burst(node: Node) -> Story:
    """Many connections come at once while the acceptor sleeps for a second, and the queue is long enough."""
    with node.pod("burst") as pod:
        yield Culprit(pod.labels, happened=lambda: pod.counter("TcpPassiveOpens") >= _BURST)
        pod.start(_absorb)
        yield None


def _absorb() -> NoReturn:
    with ExitStack() as stack:
        listener = _listener(stack, backlog=_BURST)
        for _ in range(_BURST):
            stack.enter_context(_client()).connect_ex(listener.getsockname())
        # Of a listener, tcpi_unacked is the number of connections that wait to be accepted.
        waiting = struct.unpack_from("24xI", listener.getsockopt(socket.IPPROTO_TCP, socket.TCP_INFO, 104))[0]
        assert waiting == _BURST, f"{waiting} connections wait, not {_BURST}"
        time.sleep(1)
        for _ in range(_BURST):
            stack.enter_context(listener.accept()[0])
        ready()
        while True:
            time.sleep(60)


def _listener(stack: ExitStack, backlog: int) -> socket.socket:
    listener = stack.enter_context(socket.socket())
    listener.bind((_LOOPBACK, _PORT))
    listener.listen(backlog)
    return listener


def _client() -> socket.socket:
    client = socket.socket()
    client.settimeout(0)
    return client


def _flood(source: str) -> NoReturn:
    """Send ten SYNs at each tick to a listener of its own, every one from another port of `source`."""
    with ExitStack() as stack:
        address, port = _listener(stack, backlog=8).getsockname()
        raw = stack.enter_context(socket.socket(socket.AF_INET, socket.SOCK_RAW, socket.IPPROTO_RAW))
        source_port = 1024
        ready()
        while True:
            for _ in range(10):
                raw.sendto(_syn(source, source_port, address, port), (address, 0))
                source_port = source_port + 1 if source_port < 65535 else 1024
            time.sleep(_TICK)


def _syn(source: str, source_port: int, destination: str, port: int) -> bytes:
    """Return an IPv4 packet with a SYN and no options; the kernel fills in the checksum of the IP header."""
    addresses = socket.inet_aton(source) + socket.inet_aton(destination)
    before, after = struct.pack("!HHIIBBH", source_port, port, 1, 0, 5 << 4, 0x02, 65535), bytes(2)
    pseudo = addresses + struct.pack("!HH", socket.IPPROTO_TCP, 20)
    segment = before + struct.pack("!H", _checksum(pseudo + before + bytes(2) + after)) + after
    return struct.pack("!BxHHxxBBxx", 0x45, 20 + len(segment), 0, 64, socket.IPPROTO_TCP) + addresses + segment


def _checksum(data: bytes) -> int:
    total: int = sum(struct.unpack(f"!{len(data) // 2}H", data))
    while total >> 16:
        total = (total & 0xFFFF) + (total >> 16)
    return ~total & 0xFFFF


FAULT = Fault(
    number=2,
    title="A full accept queue refuses connections",
    alert="ShoalListenQueueOverflow",
    also=("ShoalListenQueueNearlyFull",),
    signal="listen_queue_namespaces",
    story=overflow,
    decoys=(
        Decoy(closed_port),
        Decoy(syn_cookies),
        Decoy(without_cookies, right=("ShoalListenQueueRequestDrops",)),
        Decoy(drops_without_overflow),
        Decoy(absorbed_burst),
    ),
    evidence=180,
    because="connections must have been refused in three of the last five minutes",
    confirm=(
        Shows('nsenter -t "$pid" -n nstat -asz TcpExtListenOverflows', r"TcpExtListenOverflows +(\d+)", rises=True),
        # More wait than the limit, and the listener's own drop counter is not 0.
        Shows('nsenter -t "$pid" -n ss -ltnmp', r"LISTEN +17 +16 +127\.0\.0\.1:8080 .*?,d[1-9]\d*\)"),
    ),
)
