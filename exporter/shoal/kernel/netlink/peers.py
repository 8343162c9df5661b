"""The other ends of TCP connections of one network namespace, from NETLINK_SOCK_DIAG, and whether they still answer.

Constants and structures are those of include/uapi/linux/inet_diag.h; the values are filled in by net/ipv4/inet_diag.c.
No privilege is needed.
"""

from __future__ import annotations

import struct
from socket import AF_INET6
from typing import TYPE_CHECKING, Final, NamedTuple

from shoal.kernel.files import ParseError
from shoal.kernel.netlink.core import NetlinkSocket, SocketOpener, Subsystem, open_socket
from shoal.kernel.netlink.sock_diag import dump_sockets

if TYPE_CHECKING:
    from collections.abc import Container, Iterable, Iterator

__all__ = ["Pair", "parse_peers", "read_peers"]

_FILE: Final = "netlink SOCK_DIAG"

# include/net/tcp_states.h: all but TIME_WAIT, CLOSE, LISTEN and NEW_SYN_RECV, which have no timer or no peer.
_STATES: Final = sum(1 << state for state in (1, 2, 3, 4, 5, 8, 9, 11))

# struct inet_diag_msg: idiag_family, idiag_state, idiag_timer, idiag_retrans, idiag_sport, idiag_dport, idiag_src,
# idiag_dst; what follows is not needed here
_MESSAGE: Final = struct.Struct("=BBBB4x16s16x")
_MESSAGE_BYTES: Final = 72
_PEER: Final = slice(24, 40)
# idiag_timer: the one that sends again what was not acknowledged. Others count keep-alives and probes in idiag_retrans.
_RETRANSMISSION: Final = 1
# ::ffff:0:0/96: an IPv4 connection of a socket that was made for both
_MAPPED: Final = bytes(10) + b"\xff\xff"


class Pair(NamedTuple):
    """The two ends of connections: an address of this host and the peer's, 4 bytes each."""

    local: bytes
    peer: bytes


def parse_peers(messages: Iterable[bytes], wanted: Container[bytes], most: int) -> dict[Pair, bool]:
    """Decode struct inet_diag_msg into {pair: whether a connection of it has sent without an answer, twice or more}.

    Only IPv4 connections from a `wanted` local address. From `most` pairs on, only those that get no answer are added,
    so that fifty thousand clients do not cost their memory. Raises `ParseError` naming the message by its number.
    """
    pairs: dict[Pair, bool] = {}
    for number, message in enumerate(messages, 1):
        if len(message) < _MESSAGE_BYTES:
            raise ParseError(_FILE, number, f"struct inet_diag_msg of {_MESSAGE_BYTES} bytes, found {len(message)}")
        family, _, timer, retransmissions, local = _MESSAGE.unpack_from(message)
        peer = message[_PEER]
        if family == AF_INET6:
            if not local.startswith(_MAPPED):
                continue
            local, peer = local[12:], peer[12:]
        local = local[:4]
        if local in wanted:
            pair = Pair(local, peer[:4])
            if timer == _RETRANSMISSION and retransmissions > 0:
                pairs[pair] = True
            elif len(pairs) < most:
                pairs.setdefault(pair, False)
    return pairs


def read_peers(wanted: Container[bytes], most: int, *, opener: SocketOpener = open_socket) -> dict[Pair, bool]:
    """Read the peers of the connections from the `wanted` IPv4 addresses; see `parse_peers`.

    Costs 1 us a connection and some milliseconds for the walk of the kernel's table, so it is for those who must know.
    Raises `Unavailable` or `ParseError`.
    """

    def reduce(messages: Iterator[bytes]) -> dict[Pair, bool]:
        return parse_peers(messages, wanted, most)

    with NetlinkSocket(Subsystem.SOCK_DIAG, opener=opener) as netlink:
        return dump_sockets(netlink, _STATES, reduce)
