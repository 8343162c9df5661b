"""Which local ports TCP connections hold towards each destination, from NETLINK_SOCK_DIAG.

Constants and structures are those of include/uapi/linux/{sock_diag,inet_diag}.h. No privilege is needed.
"""

from __future__ import annotations

import struct
from dataclasses import dataclass
from socket import AF_INET, AF_INET6, htons, inet_ntop, ntohs
from typing import TYPE_CHECKING, Final

from shoal.kernel.files import ParseError
from shoal.kernel.netlink.core import NetlinkSocket, SocketOpener, Subsystem, attributes, open_socket
from shoal.kernel.netlink.sock_diag import dump_sockets

if TYPE_CHECKING:
    from collections.abc import Container, Iterable

    from shoal.kernel.port_range import PortRange

__all__ = ["PortUse", "count_ports", "filter_ports", "parse_port_use", "read_port_use"]

_FILE: Final = "netlink SOCK_DIAG"
_INET_DIAG_REQ_BYTECODE: Final = 1
_INET_DIAG_CGROUP_ID: Final = 21

# include/net/tcp_states.h: all but CLOSE (7), which has no port, and LISTEN (10), whose port is of its own choosing.
_STATES: Final = 0xFFF & ~(1 << 0 | 1 << 7 | 1 << 10)
_TIME_WAIT: Final = 6
_ON_LOOPBACK: Final = 2
# 127.0.0.0/8, ::1 and the former in IPv6, as the kernel writes them into 16 bytes.
_LOOPBACK: Final = (b"\x7f", bytes(15) + b"\1", bytes(10) + b"\xff\xff\x7f")

# struct nlattr
_ATTRIBUTE: Final = struct.Struct("=HH")
# struct inet_diag_bc_op: code, yes, no. The port to compare with is the `no` of a second op behind it.
_OPERATION: Final = struct.Struct("=BBH")
_INET_DIAG_BC_S_GE: Final = 2
_INET_DIAG_BC_S_LE: Final = 3
_COMPARISON_BYTES: Final = 2 * _OPERATION.size

# struct inet_diag_msg: idiag_family, idiag_state, two more, idiag_sport, then idiag_dport, idiag_src and idiag_dst up
# to 40, 72 in all.
_MESSAGE: Final = struct.Struct("=BB2x2s34s")
_MESSAGE_BYTES: Final = 72
_SOURCE: Final = slice(2, 18)
_PEER: Final = slice(18, 34)
_U16: Final = struct.Struct("=H")
_U64: Final = struct.Struct("=Q")
# A destination with fewer connections has not used up anything, and whose they are is not asked.
_WORTH_AN_OWNER: Final = 10

_ADDRESS_BYTES: Final = {int(AF_INET): 4, int(AF_INET6): 16}


@dataclass(frozen=True, slots=True)
class PortUse:
    """How many local ports are held between a source address and a destination, each of them by one connection."""

    source: str
    destination: str
    port: int
    """The destination's."""
    used: int
    time_wait: int
    """Those of the used that a connection in TIME_WAIT holds."""
    cgroup_id: int | None
    """The cgroup of one of the connections that are not in TIME_WAIT; None if none of them told (before 5.8)."""


def filter_ports(low: int, high: int) -> bytes:
    """Return the attribute that makes the kernel send only sockets whose local port is in a range (2.6.14).

    A program of two comparisons; a jump beyond its end rejects the socket.
    """
    length = 2 * _COMPARISON_BYTES
    program = b""
    for code, port in ((_INET_DIAG_BC_S_GE, low), (_INET_DIAG_BC_S_LE, high)):
        beyond = length - len(program) + _OPERATION.size
        program += _OPERATION.pack(code, _COMPARISON_BYTES, beyond) + _OPERATION.pack(0, 0, port)
    return _ATTRIBUTE.pack(_ATTRIBUTE.size + length, _INET_DIAG_REQ_BYTECODE) + program


def count_ports(
    messages: Iterable[bytes], without: Container[bytes]
) -> dict[tuple[int, bytes], tuple[int, int, int | None]]:
    """Count struct inet_diag_msg by family and (destination port, source, destination).

    Returns {(family, those 34 bytes): (count, those in TIME_WAIT, cgroup id)}. `without` are local ports, as two bytes
    in network order, that are a server's and not handed out. Only the bytes of the tuple are taken from each message,
    as there may be hundreds of thousands. Raises `ParseError`.
    """
    unpack = _MESSAGE.unpack_from
    counts: dict[tuple[int, bytes], int] = {}
    waiting: dict[tuple[int, bytes], int] = {}
    owners: dict[tuple[int, bytes], int] = {}
    for number, message in enumerate(messages, 1):
        if len(message) < _MESSAGE_BYTES:
            raise ParseError(_FILE, number, f"struct inet_diag_msg of {_MESSAGE_BYTES} bytes, found {len(message)}")
        family, state, port, ends = unpack(message)
        if port in without:
            continue
        key = family, ends
        count = counts[key] = counts.get(key, 0) + 1
        if state == _TIME_WAIT:
            waiting[key] = waiting.get(key, 0) + 1
        elif count >= _WORTH_AN_OWNER and key not in owners:
            cgroup = attributes(message, _MESSAGE_BYTES, _FILE, number).get(_INET_DIAG_CGROUP_ID, b"")
            if len(cgroup) == _U64.size:
                owners[key] = _U64.unpack(cgroup)[0]
    return {key: (count, waiting.get(key, 0), owners.get(key)) for key, count in counts.items()}


def parse_port_use(family: int, key: bytes, used: int, time_wait: int, cgroup_id: int | None) -> PortUse:
    """Turn a tuple that was counted into what a person reads."""
    size = _ADDRESS_BYTES[family]
    source, destination = inet_ntop(family, key[2 : 2 + size]), inet_ntop(family, key[18 : 18 + size])
    return PortUse(source, destination, ntohs(_U16.unpack_from(key)[0]), used, time_wait, cgroup_id)


def _may_take_over(key: bytes, reuse: int) -> bool:
    """Tell whether net.ipv4.tcp_tw_reuse lets connect() take over a port in TIME_WAIT (net/ipv4/tcp_ipv4.c, 4.19)."""
    return reuse == 1 or (
        reuse == _ON_LOOPBACK and (key[_SOURCE].startswith(_LOOPBACK) or key[_PEER].startswith(_LOOPBACK))
    )


def read_port_use(
    ports: PortRange, servers: Iterable[int], most: int, *, opener: SocketOpener = open_socket
) -> tuple[list[PortUse], int]:
    """Return the `most` tuples that hold the most ports of the range, and how many tuples there are in all.

    `servers` are local ports that something listens on. A port in TIME_WAIT that connect() may take over is not held;
    the kernel wants it to have been there for a second, of which nothing is known. Of the network namespace that
    `opener` opens sockets in; the kernel picks the ports. Raises `Unavailable` or `ParseError`.
    """
    without = {_U16.pack(htons(port)) for port in servers}

    with NetlinkSocket(Subsystem.SOCK_DIAG, opener=opener) as netlink:
        counts = dump_sockets(
            netlink,
            _STATES,
            lambda messages: count_ports(messages, without),
            attributes=filter_ports(ports.low, ports.high),
        )
    found: list[tuple[int, int, bytes, int, int | None]] = []
    for (family, key), (used, time_wait, cgroup) in counts.items():
        if family not in _ADDRESS_BYTES:
            raise ParseError(_FILE, 0, f"IPv4 or IPv6 sockets, found family {family}")
        if time_wait and _may_take_over(key, ports.time_wait_reuse):
            found.append((used - time_wait, family, key, 0, cgroup))
        else:
            found.append((used, family, key, time_wait, cgroup))
    found.sort(key=lambda row: row[0], reverse=True)
    worst = [
        parse_port_use(family, key, used, time_wait, cgroup) for used, family, key, time_wait, cgroup in found[:most]
    ]
    return worst, len(found)
