"""Causes one scenario inside the network namespace that it is started in: `python causes.py SCENARIO`.

Says `ready` on standard output once the scenario is under way and goes on with it until a line comes in on standard
input; then it lets go of its sockets, says `stopped`, and stays, so that the namespace still has a process, until
standard input is closed. It ends with its parent that way, whatever happens to it.
"""

from __future__ import annotations

import select
import socket
import struct
import subprocess
import sys
from collections import deque
from contextlib import ExitStack, closing
from pathlib import Path
from typing import TYPE_CHECKING, Final

if TYPE_CHECKING:
    from collections.abc import Callable, Generator

_TICK: Final = 0.05
_LOOPBACK: Final = "127.0.0.1"

# Documentation prefixes (RFC 5737), so that no answer can reach anything real even if it left the namespace.
_SWALLOWED: Final = "198.51.100.9"
_UNROUTABLE: Final = "203.0.113.9"

BURST: Final = 100
"""Connections of the burst that the queue absorbs."""


def overflow() -> Generator[None, None, None]:
    """Keep connecting to a listener whose queue holds two and that never accepts (ListenOverflows)."""
    with ExitStack() as stack:
        port = _listener(stack, backlog=1).getsockname()[1]
        clients: deque[socket.socket] = deque()
        while True:
            clients.append(stack.enter_context(_client()))
            clients[-1].connect_ex((_LOOPBACK, port))
            if len(clients) > 2 / _TICK:
                clients.popleft().close()
            yield


def closed_port() -> Generator[None, None, None]:
    """Keep connecting to a port that is bound and not listened on; each is answered by a reset (TcpOutRsts)."""
    with closing(socket.socket()) as reserved:
        reserved.bind((_LOOPBACK, 0))
        while True:
            with _client() as client:
                client.connect_ex(reserved.getsockname())
            yield


def syn_cookies() -> Generator[None, None, None]:
    """Flood a listener from an address that swallows the answers: a full queue, cookies, no drop.

    With tcp_syncookies=1 the kernel begins to send cookies (TCPReqQFullDoCookies) when as many half-open requests
    wait as the backlog holds. A route into the loopback device makes the answers leave and reach nobody.
    """
    Path("/proc/sys/net/ipv4/tcp_syncookies").write_text("1", encoding="ascii")
    subprocess.run(["ip", "route", "add", f"{_SWALLOWED}/32", "dev", "lo"], check=True)
    yield from _flood(_SWALLOWED)


def drops_without_overflow() -> Generator[None, None, None]:
    """Flood a listener from an address that has no route back: each is dropped (ListenDrops) and no queue is full.

    tcp_conn_request() drops a request that it cannot route an answer to, and counts it like any other.
    """
    yield from _flood(_UNROUTABLE)


def absorbed_burst() -> Generator[None, None, None]:
    """Open many connections at once while the acceptor sleeps for a second, into a queue that is long enough."""
    with ExitStack() as stack:
        listener = _listener(stack, backlog=BURST)
        for _ in range(BURST):
            stack.enter_context(_client()).connect_ex(listener.getsockname())
        # Of a listener, tcpi_unacked is the number of connections that wait to be accepted.
        waiting = struct.unpack_from("24xI", listener.getsockopt(socket.IPPROTO_TCP, socket.TCP_INFO, 104))[0]
        if waiting != BURST:
            message = f"{waiting} connections wait, not {BURST}"
            raise RuntimeError(message)
        for _ in range(int(1 / _TICK)):
            yield
        for _ in range(BURST):
            stack.enter_context(listener.accept()[0])
        while True:
            yield


_SCENARIOS: Final[dict[str, Callable[[], Generator[None, None, None]]]] = {
    scenario.__name__: scenario
    for scenario in (overflow, closed_port, syn_cookies, drops_without_overflow, absorbed_burst)
}


def _listener(stack: ExitStack, backlog: int) -> socket.socket:
    listener = stack.enter_context(socket.socket())
    listener.bind((_LOOPBACK, 0))
    listener.listen(backlog)
    return listener


def _client() -> socket.socket:
    client = socket.socket()
    client.settimeout(0)
    return client


def _flood(source: str) -> Generator[None, None, None]:
    """Send ten SYNs at each tick to a listener of its own, every one from another port of `source`."""
    with ExitStack() as stack:
        address, port = _listener(stack, backlog=8).getsockname()
        raw = stack.enter_context(socket.socket(socket.AF_INET, socket.SOCK_RAW, socket.IPPROTO_RAW))
        source_port = 1024
        while True:
            for _ in range(10):
                raw.sendto(_syn(source, source_port, address, port), (address, 0))
                source_port = source_port + 1 if source_port < 65535 else 1024
            yield


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


def _say(word: str) -> None:
    sys.stdout.write(f"{word}\n")
    sys.stdout.flush()


def main() -> None:
    """Run the scenario that the first argument names."""
    with closing(_SCENARIOS[sys.argv[1]]()) as scenario:
        next(scenario)
        _say("ready")
        while not select.select([sys.stdin], [], [], _TICK)[0]:
            next(scenario)
        sys.stdin.readline()
    _say("stopped")
    sys.stdin.read()


if __name__ == "__main__":
    main()
