"""Listening TCP sockets of one network namespace, from NETLINK_SOCK_DIAG: how full, how large, how often too full.

Constants and structures are those of include/uapi/linux/{sock_diag,inet_diag}.h; the values are filled in by
net/ipv4/{inet_diag,tcp_diag}.c. No privilege is needed.
"""

from __future__ import annotations

import struct
from dataclasses import dataclass
from socket import AF_INET, AF_INET6, inet_ntop, ntohs
from typing import TYPE_CHECKING, Final, TypeVar

from shoal.kernel.files import ParseError
from shoal.kernel.netlink.core import NetlinkSocket, SocketOpener, Subsystem, attributes, open_socket

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator

__all__ = ["Listener", "dump_sockets", "parse_listeners", "read_listeners"]

T = TypeVar("T")

_FILE: Final = "netlink SOCK_DIAG"

# sock_diag.h
_SK_MEMINFO_DROPS: Final = 8

# inet_diag.h: the request; attributes of an answer. idiag_ext has a bit for each of the first eight, at type - 1.
_TCPDIAG_GETSOCK: Final = 18
_INET_DIAG_SKMEMINFO: Final = 7
_INET_DIAG_CGROUP_ID: Final = 21

# include/net/tcp_states.h
_TCP_LISTEN: Final = 10

# struct inet_diag_req: idiag_family, idiag_src_len and idiag_dst_len, which a dump does not look at, idiag_ext, an
# empty inet_diag_sockid, idiag_states, and idiag_dbs, which nothing looks at
_REQUEST: Final = struct.Struct("=xxxB48xI4x")

# struct inet_diag_msg: idiag_family, idiag_state, idiag_timer, idiag_retrans,
#   inet_diag_sockid: idiag_sport, idiag_dport (both big-endian), idiag_src[4], idiag_dst[4], idiag_if, idiag_cookie[2],
#   idiag_expires, idiag_rqueue, idiag_wqueue, idiag_uid, idiag_inode
_MESSAGE: Final = struct.Struct("=BB2xH2x16s16xIII4xIIII")
_MESSAGE_BYTES: Final = 72

_U64: Final = struct.Struct("=Q")
_U64_BYTES: Final = 8
_DROPS: Final = struct.Struct(f"={_SK_MEMINFO_DROPS * 4}xI")
_DROPS_BYTES: Final = _DROPS.size

_ADDRESS_BYTES: Final = {int(AF_INET): 4, int(AF_INET6): 16}


@dataclass(frozen=True, slots=True)
class Listener:
    """One listening TCP socket."""

    family: int
    """AF_INET or AF_INET6. A dual-stack socket is AF_INET6 and takes IPv4 connections too."""
    address: str
    """The address bound to, as `ss` writes it without brackets: 0.0.0.0, ::, 10.0.0.1, fe80::1, ::ffff:10.0.0.1."""
    port: int
    interface: int
    """The index of the device bound to (SO_BINDTODEVICE, or the scope of a link-local address); 0 for any."""
    queue_length: int
    """Connections that wait for accept() (sk_ack_backlog, in idiag_rqueue since 2.6)."""
    queue_limit: int
    """The least of the backlog given to listen() and somaxconn at that time (sk_max_ack_backlog, in idiag_wqueue).
    The kernel drops when the length is *above* it, so a full queue has a length of the limit plus one."""
    drops: int | None
    """Connections dropped since listen(), modulo 2**32: the part of the namespace's ListenDrops that is this
    socket's, so overflows of the queue and the rarer rest. None before 4.7, whose SKMEMINFO ends without it."""
    cgroup_id: int | None
    """The inode of the cgroup v2 directory in which the socket was made, and it does not follow a process that moves.
    1 is the root. It may belong to a cgroup that is gone. None before 5.8, or without CONFIG_SOCK_CGROUP_DATA."""
    cookie: int
    """The socket's number: never used again until the next boot."""
    uid: int
    """The owner, as seen from the user namespace of the reader."""
    inode: int
    """What /proc/<pid>/fd/ links to as socket:[inode]."""


def parse_listeners(messages: Iterable[bytes]) -> list[Listener]:
    """Decode struct inet_diag_msg and its attributes, one for each message (without netlink header).

    A socket comes out once even if it came in twice: a dump of several datagrams resumes at an ordinal number within
    a hash bucket, and a listener that is added meanwhile shifts the others. Unknown attributes are passed over.
    Raises `ParseError` naming the message by its number.
    """
    listeners: dict[int, Listener] = {}
    addresses: dict[tuple[int, bytes], str] = {}
    for number, message in enumerate(messages, 1):
        if len(message) < _MESSAGE_BYTES:
            raise ParseError(_FILE, number, f"struct inet_diag_msg of {_MESSAGE_BYTES} bytes, found {len(message)}")
        family, state, port, source, interface, low, high, length, limit, uid, inode = _MESSAGE.unpack_from(message)
        if family not in _ADDRESS_BYTES or state != _TCP_LISTEN:
            raise ParseError(_FILE, number, f"a listening IPv4 or IPv6 socket, found family {family} in state {state}")
        address = addresses.get((family, source))
        if address is None:
            address = addresses[family, source] = inet_ntop(family, source[: _ADDRESS_BYTES[family]])
        found = attributes(message, _MESSAGE_BYTES, _FILE, number)
        memory = found.get(_INET_DIAG_SKMEMINFO, b"")
        drops = _DROPS.unpack_from(memory)[0] if len(memory) >= _DROPS_BYTES else None
        cgroup = found.get(_INET_DIAG_CGROUP_ID)
        if cgroup is not None and len(cgroup) != _U64_BYTES:
            raise ParseError(_FILE, number, f"INET_DIAG_CGROUP_ID of {_U64_BYTES} bytes, found {len(cgroup)}")
        cgroup_id = None if cgroup is None else _U64.unpack(cgroup)[0]
        cookie = low | high << 32
        # By position: with keywords a record costs half as much again, and there may be thousands.
        listeners[cookie] = Listener(
            family, address, ntohs(port), interface, length, limit, drops, cgroup_id, cookie, uid, inode
        )
    return list(listeners.values())


def read_listeners(*, opener: SocketOpener = open_socket) -> list[Listener]:
    """Read all listening TCP sockets, IPv4 and IPv6, of the network namespace that `opener` opens sockets in.

    The kernel picks the listening ones, so the cost does not grow with connections. Raises `Unavailable` (NOT_IN_KERNEL
    without CONFIG_INET_DIAG) or `ParseError`.
    """
    with NetlinkSocket(Subsystem.SOCK_DIAG, opener=opener) as netlink:
        return dump_sockets(netlink, 1 << _TCP_LISTEN, parse_listeners, extensions=1 << (_INET_DIAG_SKMEMINFO - 1))


def dump_sockets(
    netlink: NetlinkSocket,
    states: int,
    reduce: Callable[[Iterator[bytes]], T],
    *,
    extensions: int = 0,
    attributes: bytes = b"",
) -> T:
    """Return what `reduce` makes of the TCP sockets in these states, those of both families; see `NetlinkSocket.dump`.

    Asks by TCPDIAG_GETSOCK, the older of the two requests that every kernel has: SOCK_DIAG_BY_FAMILY gives one family
    at a time, and each time the kernel walks the whole table of connections, which all network namespaces share
    (inet_diag_dump_compat in net/ipv4/inet_diag.c). A kernel without IPv6 has no sockets of it.
    """
    return netlink.dump(_TCPDIAG_GETSOCK, _REQUEST.pack(extensions, states) + attributes, reduce)
