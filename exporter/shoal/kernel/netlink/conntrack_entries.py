"""The entries of one network namespace's connection tracking table, streamed from NETLINK_NETFILTER.

Constants are those of include/uapi/linux/netfilter/{nfnetlink,nfnetlink_conntrack,nf_conntrack_common}.h; messages are
filled in by ctnetlink_fill_info in net/netfilter/nf_conntrack_netlink.c. Asking needs CAP_NET_ADMIN, and makes a
kernel without the module load it (see `shoal.kernel.modules`). Nothing is reset by reading.
"""

from __future__ import annotations

import struct
from functools import partial
from operator import itemgetter
from typing import TYPE_CHECKING, Any, Final, NamedTuple, TypeVar

from shoal.kernel.files import ParseError
from shoal.kernel.netlink.core import NetlinkSocket, SocketOpener, Subsystem, open_socket

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator

__all__ = ["ASSURED", "DST_NAT", "ESTABLISHED", "EXPECTED", "SEEN_REPLY", "Entry", "parse_entries", "read_entries"]

T = TypeVar("T")

_FILE: Final = "netlink NETFILTER conntrack entry"

# IPCTNL_MSG_CT_GET of NFNL_SUBSYS_CTNETLINK; its neighbour IPCTNL_MSG_CT_GET_CTRZERO would reset the counters.
_IPCTNL_MSG_CT_GET: Final = 1 << 8 | 1
# struct nfgenmsg: nfgen_family (AF_UNSPEC asks for all), version (NFNETLINK_V0), res_id
_NFGENMSG_BYTES: Final = 4
_REQUEST: Final = bytes(_NFGENMSG_BYTES)

EXPECTED: Final = 1 << 0
"""IPS_EXPECTED: a helper foresaw this connection and chose where it goes; no rule did."""
SEEN_REPLY: Final = 1 << 1
"""IPS_SEEN_REPLY: packets were seen in both directions. Without it conntrack(8) prints [UNREPLIED]."""
ASSURED: Final = 1 << 2
"""IPS_ASSURED: never thrown out early."""
DST_NAT: Final = 1 << 5
"""IPS_DST_NAT: NAT rewrote the destination."""

ESTABLISHED: Final = 3
"""TCP_CONNTRACK_ESTABLISHED of enum tcp_conntrack."""

# struct nlattr: nla_len, nla_type; the upper two bits of the type are flags.
_ATTRIBUTE: Final = struct.Struct("=HH")
_ATTRIBUTE_BYTES: Final = 4
_TYPE_MASK: Final = 0x3FFF

# Attributes that hold attributes, by the types on the way to them: CTA_TUPLE_{ORIG,REPLY}/CTA_TUPLE_{IP,PROTO},
# CTA_PROTOINFO/CTA_PROTOINFO_TCP, CTA_COUNTERS_{ORIG,REPLY}.
_NESTED: Final = frozenset({(1,), (1, 1), (1, 2), (2,), (2, 1), (2, 2), (4,), (4, 1), (9,), (10,)})
# {types on the way: (place in Entry, possible format)}
_ADDRESSES: Final = {4: "4s", 16: "16s"}
_WANTED: Final[dict[tuple[int, ...], tuple[int, dict[int, str]]]] = {
    (1, 1, 1): (0, _ADDRESSES),  # CTA_IP_V4_SRC
    (1, 1, 3): (0, _ADDRESSES),  # CTA_IP_V6_SRC
    (1, 2, 2): (1, {2: "H"}),  # CTA_PROTO_SRC_PORT
    (1, 1, 2): (2, _ADDRESSES),  # CTA_IP_V4_DST
    (1, 1, 4): (2, _ADDRESSES),  # CTA_IP_V6_DST
    (1, 2, 3): (3, {2: "H"}),  # CTA_PROTO_DST_PORT
    (1, 2, 1): (4, {1: "B"}),  # CTA_PROTO_NUM
    (2, 1, 1): (5, _ADDRESSES),
    (2, 1, 3): (5, _ADDRESSES),
    (2, 2, 2): (6, {2: "H"}),
    (2, 1, 2): (7, _ADDRESSES),
    (2, 1, 4): (7, _ADDRESSES),
    (2, 2, 3): (8, {2: "H"}),
    (3,): (9, {4: "I"}),  # CTA_STATUS
    (7,): (10, {4: "I"}),  # CTA_TIMEOUT
    (4, 1, 1): (11, {1: "B"}),  # CTA_PROTOINFO_TCP_STATE
    (10, 1): (12, {8: "Q"}),  # CTA_COUNTERS_REPLY, CTA_COUNTERS_PACKETS
    (2, 3): (13, {2: "H"}),  # CTA_TUPLE_ZONE
    (18,): (13, {2: "H"}),  # CTA_ZONE
}
_REQUIRED: Final = {0: "source", 2: "destination", 4: "protocol", 5: "reply source", 7: "reply destination"}
_MOST_LAYOUTS: Final = 64


class Entry(NamedTuple):
    """One connection. Addresses are 4 or 16 bytes; ports are 0 for a protocol that has none."""

    source: bytes
    source_port: int
    destination: bytes
    """Where the first packet was sent; with destination NAT that is the service."""
    destination_port: int
    protocol: int
    """IPPROTO_ number."""
    reply_source: bytes
    """Where answers come from; with destination NAT that is the backend."""
    reply_source_port: int
    reply_destination: bytes
    """Where answers are sent; with source NAT that is the translated source."""
    reply_destination_port: int
    status: int
    """IPS_ bits."""
    timeout: int | None
    """Seconds until it goes if nothing renews it. None while a flow table carries the connection (5.0)."""
    tcp_state: int | None
    replies: int | None
    """Packets in the direction of the reply. None unless nf_conntrack_acct was on when the connection began."""
    zone: int


# What each field is where the message has not got it; None for fields that are required.
_DEFAULTS: Final = (None, 0, None, 0, None, None, 0, None, 0, 0, None, None, None, 0)


class _Layout(NamedTuple):
    """Where things are in messages whose attributes have these headers.

    A message is one number, little-endian, of which `mask` leaves the headers.
    """

    mask: int
    headers: int
    unpack_values: Callable[[bytes], tuple[Any, ...]]
    order: Callable[[tuple[Any, ...]], tuple[Any, ...]]


def parse_entries(messages: Iterable[bytes]) -> Iterator[Entry]:
    """Decode answers to IPCTNL_MSG_CT_GET (without netlink headers), one by one. Raises `ParseError`.

    Connections of one protocol have messages of one layout. Walking nested attributes costs ten times what `struct`
    costs on a layout that is known, so a layout is learned from the first message that has it, and recognised by
    comparing the headers of all attributes: a message that differs in any length or type is walked anew.
    """
    known: dict[int, list[_Layout]] = {}
    # What `Entry._make` does, without a call in Python for each.
    make = partial(tuple.__new__, Entry)
    for number, message in enumerate(messages, 1):
        whole = int.from_bytes(message, "little")
        for layout in known.get(len(message), ()):
            if whole & layout.mask == layout.headers:
                break
        else:
            layout = _learn(message, number)
            if sum(map(len, known.values())) >= _MOST_LAYOUTS:
                known.clear()
            known.setdefault(len(message), []).append(layout)
        yield make(layout.order(layout.unpack_values(message) + _DEFAULTS))


def read_entries(reduce: Callable[[Iterator[Entry]], T], *, opener: SocketOpener = open_socket) -> T:
    """Return what `reduce` makes of the entries of the namespace that `opener` opens sockets in.

    They are received as `reduce` asks for them, so a table of any size costs one datagram, and it may stop early; the
    kernel gives them in the order of their hash, which is as good as random. See `NetlinkSocket.dump`. Raises
    `Unavailable` (NO_PERMISSION without CAP_NET_ADMIN, NOT_IN_KERNEL without the module) or `ParseError`.
    """
    with NetlinkSocket(Subsystem.NETFILTER, opener=opener) as netlink:
        return netlink.dump(_IPCTNL_MSG_CT_GET, _REQUEST, lambda messages: reduce(parse_entries(messages)))


def _learn(message: bytes, number: int) -> _Layout:
    """Walk one message and return its layout. Raises `ParseError`."""
    mask = bytearray(len(message))
    values = ">"
    value_end = 0
    places: list[int] = []
    for path, offset, length in _walk(message, number):
        header_end = offset + _ATTRIBUTE_BYTES
        mask[offset:header_end] = b"\xff" * _ATTRIBUTE_BYTES
        place, formats = _WANTED.get(path, (-1, {}))
        if place < 0 or place in places:
            continue
        size = length - _ATTRIBUTE_BYTES
        if size not in formats:
            raise ParseError(_FILE, number, f"attribute {path} of {' or '.join(map(str, formats))} bytes, found {size}")
        values += f"{header_end - value_end}x{formats[size]}"
        value_end = header_end + size
        places.append(place)
    for place, name in _REQUIRED.items():
        if place not in places:
            raise ParseError(_FILE, number, f"a {name}")
    read_values = struct.Struct(f"{values}{len(message) - value_end}x")
    # Values come in the message's order, followed by the defaults.
    order = [places.index(place) if place in places else len(places) + place for place in range(len(_DEFAULTS))]
    bits = int.from_bytes(mask, "little")
    return _Layout(bits, int.from_bytes(message, "little") & bits, read_values.unpack, itemgetter(*order))


def _walk(message: bytes, number: int) -> Iterator[tuple[tuple[int, ...], int, int]]:
    """Yield (types on the way, offset, length with header) of every attribute, outer before inner. Raises."""
    if len(message) < _NFGENMSG_BYTES:
        raise ParseError(_FILE, number, f"struct nfgenmsg of {_NFGENMSG_BYTES} bytes, found {len(message)}")
    spans: list[tuple[tuple[int, ...], int, int]] = [((), _NFGENMSG_BYTES, len(message))]
    while spans:
        above, offset, end = spans.pop()
        if offset >= end:
            continue
        left = end - offset
        if left < _ATTRIBUTE_BYTES:
            raise ParseError(_FILE, number, f"an attribute's header of {_ATTRIBUTE_BYTES} bytes, found {left}")
        length, kind = _ATTRIBUTE.unpack_from(message, offset)
        if not _ATTRIBUTE_BYTES <= length <= left:
            raise ParseError(_FILE, number, f"an attribute of {_ATTRIBUTE_BYTES} to {left} bytes, found {length}")
        path = (*above, kind & _TYPE_MASK)
        yield path, offset, length
        spans.append((above, offset + (length + 3 & ~3), end))
        if path in _NESTED:
            spans.append((path, offset + _ATTRIBUTE_BYTES, offset + length))
