"""Links, addresses, policy rules and routes of one network namespace, from NETLINK_ROUTE.

Constants are those of include/uapi/linux/{rtnetlink,if_link,if_addr,fib_rules}.h. No privilege is needed. Written by
hand although entries are few: a generic library costs 0.2 s and 25 MB to import, and its links alone cost more than all
of this. Every function takes a socket of `open_routes`, so that one scrape opens one.
"""

from __future__ import annotations

import socket
import struct
from contextlib import suppress
from dataclasses import dataclass
from itertools import islice
from os import fsdecode
from socket import AF_INET, AF_INET6
from typing import TYPE_CHECKING, Final, NamedTuple

from shoal.kernel.files import ParseError, Unavailable, Vanished
from shoal.kernel.netlink.core import NetlinkSocket, SocketOpener, Subsystem, attributes, open_socket

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator

__all__ = [
    "Link",
    "NextHop",
    "NextHops",
    "Route",
    "find_default",
    "find_route",
    "open_routes",
    "open_strict_socket",
    "parse_addresses",
    "parse_links",
    "parse_next_hops",
    "parse_policy_rules",
    "parse_route",
    "read_addresses",
    "read_links",
    "read_next_hops",
    "read_policy_rules",
]

_FILE: Final = "netlink ROUTE"

# rtnetlink.h
_RTM_GETLINK: Final = 18
_RTM_GETADDR: Final = 22
_RTM_GETROUTE: Final = 26
_RTM_GETRULE: Final = 34

# linux/netlink.h: the kernel filters a dump by the fields of the request's header (4.20).
_SOL_NETLINK: Final = 270
_NETLINK_GET_STRICT_CHK: Final = 12

# struct ifinfomsg: ifi_family, pad, ifi_type, ifi_index, ifi_flags, ifi_change
_LINK: Final = struct.Struct("=BxHiII")
_IFLA_IFNAME: Final = 3
_IFF_UP: Final = 0x1
_IFF_LOOPBACK: Final = 0x8
_IFF_NOARP: Final = 0x80
# IFLA_EXT_MASK with RTEXT_FILTER_SKIP_STATS: half of a link's message is statistics that nobody here reads.
_WITHOUT_STATISTICS: Final = struct.pack("=HHI", 8, 29, 1 << 3)

# struct ifaddrmsg: ifa_family, ifa_prefixlen, ifa_flags, ifa_scope, ifa_index
_ADDRESS: Final = struct.Struct("=BBBBI")
_IFA_ADDRESS: Final = 1
_IFA_LOCAL: Final = 2
_RT_SCOPE_UNIVERSE: Final = 0

# struct fib_rule_hdr: family, dst_len, src_len, tos, table, res1, res2, action, flags
_RULE: Final = struct.Struct("=BBBBBxxBI")
_FR_ACT_TO_TBL: Final = 1
# FRA_PRIORITY, FRA_SUPPRESS_IFGROUP, FRA_SUPPRESS_PREFIXLEN, FRA_TABLE, FRA_PAD, FRA_PROTOCOL: none selects packets.
_NO_SELECTORS: Final = frozenset({6, 13, 14, 15, 18, 21})
# RT_TABLE_DEFAULT, RT_TABLE_MAIN, RT_TABLE_LOCAL
_EVERYBODYS_TABLES: Final = frozenset({253, 254, 255})

# struct rtmsg: rtm_family, rtm_dst_len, rtm_src_len, rtm_tos, rtm_table, rtm_protocol, rtm_scope, rtm_type, rtm_flags
_ROUTE: Final = struct.Struct("=BBBBBBBBI")
_ROUTE_BYTES: Final = 12
_RTN_UNICAST: Final = 1
_RTN_LOCAL: Final = 2
_RTA_DST: Final = 1
_RTA_SRC: Final = 2
_RTA_OIF: Final = 4
_RTA_GATEWAY: Final = 5
_RTA_PREFSRC: Final = 7
_RTA_MULTIPATH: Final = 9
_RTA_VIA: Final = 18
# struct rtnexthop: rtnh_len, rtnh_flags, rtnh_hops, rtnh_ifindex; attributes follow
_HOP: Final = struct.Struct("=HBBi")

_I32: Final = struct.Struct("=i")
_FAMILY: Final = struct.Struct("=H")
# Addresses that are given to nobody: TEST-NET-3 of RFC 5737, and RFC 3849.
_NOBODYS: Final = {
    AF_INET: socket.inet_aton("203.0.113.1"),
    AF_INET6: socket.inet_pton(AF_INET6, "2001:db8:ffff::1"),
}
_FAMILY_OF_BYTES: Final = {4: AF_INET, 16: AF_INET6}


@dataclass(frozen=True, slots=True)
class Link:
    """A network device. `name` is as the file system has it: bytes that are no UTF-8 are surrogates."""

    name: str
    up: bool
    loopback: bool
    arp: bool
    """Whether the device resolves addresses (no IFF_NOARP)."""


class NextHop(NamedTuple):
    """A gateway: the index of the device that it is reached by, and its address (4 or 16 bytes)."""

    device: int
    address: bytes


@dataclass(frozen=True, slots=True)
class NextHops:
    """The gateways of the routes that were read: those of default routes first, then those of the most routes."""

    hops: tuple[NextHop, ...]
    complete: bool
    """False if there were more routes than the caller wanted to read."""


@dataclass(frozen=True, slots=True)
class Route:
    """Where the kernel would send a packet: device, gateway (None on the link), and address to send from."""

    device: int
    gateway: bytes | None
    source: bytes | None
    own: bool
    """Whether the destination is an address of this host (RTN_LOCAL)."""


def open_strict_socket(subsystem: Subsystem) -> socket.socket:
    """Open a socket whose dumps the kernel filters by what the request's header says (4.20; unfiltered before)."""
    opened = open_socket(subsystem)
    with suppress(OSError):
        opened.setsockopt(_SOL_NETLINK, _NETLINK_GET_STRICT_CHK, 1)
    return opened


def open_routes(*, opener: SocketOpener = open_strict_socket) -> NetlinkSocket:
    """Return a socket for the functions of this module; closed by `with`. Raises `Unavailable`."""
    return NetlinkSocket(Subsystem.ROUTE, opener=opener)


def parse_links(messages: Iterable[bytes]) -> dict[int, Link]:
    """Decode struct ifinfomsg into {index: link}. Raises `ParseError` naming the message by its number."""
    links: dict[int, Link] = {}
    for number, message in enumerate(messages, 1):
        _require(message, _LINK, "struct ifinfomsg", number)
        _, _, index, flags, _ = _LINK.unpack_from(message)
        name = attributes(message, _LINK.size, _FILE, number).get(_IFLA_IFNAME, b"").rstrip(b"\0")
        if not name:
            raise ParseError(_FILE, number, "IFLA_IFNAME")
        links[index] = Link(fsdecode(name), bool(flags & _IFF_UP), bool(flags & _IFF_LOOPBACK), not flags & _IFF_NOARP)
    return links


def parse_addresses(messages: Iterable[bytes]) -> dict[bytes, set[int]]:
    """Decode struct ifaddrmsg into {IPv4 address of global scope: indexes of the devices that have it}.

    One address may be on many devices, as where each container's host side has the same gateway address.
    Raises `ParseError`.
    """
    found: dict[bytes, set[int]] = {}
    for number, message in enumerate(messages, 1):
        _require(message, _ADDRESS, "struct ifaddrmsg", number)
        family, _, _, scope, index = _ADDRESS.unpack_from(message)
        if family != AF_INET or scope != _RT_SCOPE_UNIVERSE:
            continue
        values = attributes(message, _ADDRESS.size, _FILE, number)
        # On a point-to-point device IFA_ADDRESS is the other end's.
        address = values.get(_IFA_LOCAL) or values.get(_IFA_ADDRESS) or b""
        if _FAMILY_OF_BYTES.get(len(address)) != AF_INET:
            raise ParseError(_FILE, number, f"IFA_LOCAL of 4 bytes, found {len(address)}")
        found.setdefault(address, set()).add(index)
    return found


def parse_policy_rules(messages: Iterable[bytes]) -> int:
    """Count the rules (struct fib_rule_hdr) that make the choice of a routing table depend on the packet.

    Not counted are rules that send every packet to local, main or default, wherever they stand: each kernel begins with
    three, and some network plugins move them. What this module does not know counts as a choice. Raises `ParseError`.
    """
    count = 0
    for number, message in enumerate(messages, 1):
        _require(message, _RULE, "struct fib_rule_hdr", number)
        _, destination, source, tos, table, action, _ = _RULE.unpack_from(message)
        selectors = attributes(message, _RULE.size, _FILE, number).keys() - _NO_SELECTORS
        everybody = not (destination or source or tos or selectors)
        if not (everybody and action == _FR_ACT_TO_TBL and table in _EVERYBODYS_TABLES):
            count += 1
    return count


def parse_next_hops(messages: Iterable[bytes], most: int) -> NextHops:
    """Decode the gateways of the first `most` routes (struct rtmsg), those of multipath routes included.

    Raises `ParseError` naming the message by its number.
    """
    ranks: dict[NextHop, tuple[int, int]] = {}
    iterator = iter(messages)
    for number, message in enumerate(islice(iterator, most), 1):
        _require(message, _ROUTE, "struct rtmsg", number)
        _, prefix, _, _, _, _, _, kind, _ = _ROUTE.unpack_from(message)
        if kind != _RTN_UNICAST:
            continue
        for hop in _hops(attributes(message, _ROUTE_BYTES, _FILE, number), number):
            defaults, routes = ranks.get(hop, (0, 0))
            ranks[hop] = (defaults - (not prefix), routes - 1)
    complete = next(iterator, None) is None
    return NextHops(tuple(sorted(ranks, key=lambda hop: (ranks[hop], hop))), complete)


def parse_route(message: bytes) -> Route:
    """Decode the answer to a look-up (struct rtmsg). Raises `ParseError`."""
    _require(message, _ROUTE, "struct rtmsg", 1)
    _, _, _, _, _, _, _, kind, _ = _ROUTE.unpack_from(message)
    values = attributes(message, _ROUTE_BYTES, _FILE, 1)
    source = values.get(_RTA_PREFSRC)
    if source is not None and len(source) not in _FAMILY_OF_BYTES:
        raise ParseError(_FILE, 1, f"RTA_PREFSRC of 4 or 16 bytes, found {len(source)}")
    return Route(_device(values, 1), _gateway(values, 1), source, kind == _RTN_LOCAL)


def read_links(netlink: NetlinkSocket) -> dict[int, Link]:
    """Read all devices as {index: link}. Raises `Unavailable` or `ParseError`."""
    return netlink.dump(_RTM_GETLINK, bytes(_LINK.size) + _WITHOUT_STATISTICS, parse_links)


def read_addresses(netlink: NetlinkSocket) -> dict[bytes, set[int]]:
    """Read {IPv4 address of global scope: indexes of its devices}. Raises `Unavailable` or `ParseError`."""
    return netlink.dump(_RTM_GETADDR, _ADDRESS.pack(AF_INET, 0, 0, 0, 0), parse_addresses)


def read_policy_rules(netlink: NetlinkSocket) -> int:
    """Count the IPv4 rules that choose a table by the packet (see `parse_policy_rules`).

    Raises `Unavailable` (NOT_IN_KERNEL without CONFIG_IP_MULTIPLE_TABLES) or `ParseError`.
    """
    return netlink.dump(_RTM_GETRULE, _RULE.pack(AF_INET, 0, 0, 0, 0, 0, 0), parse_policy_rules)


def read_next_hops(netlink: NetlinkSocket, family: socket.AddressFamily, most: int) -> NextHops:
    """Read the gateways of the first `most` unicast routes of all tables. Raises `Unavailable` or `ParseError`."""
    request = _ROUTE.pack(family, 0, 0, 0, 0, 0, 0, _RTN_UNICAST, 0)

    def reduce(messages: Iterator[bytes]) -> NextHops:
        return parse_next_hops(messages, most)

    return netlink.dump(_RTM_GETROUTE, request, reduce)


def find_default(netlink: NetlinkSocket, family: socket.AddressFamily) -> NextHop | None:
    """Ask for the gateway of what has no route of its own, None without one. Raises `ParseError`.

    A dump of a long table may end before it: the kernel walks the tables in no useful order, and IPv6 gives the default
    route last.
    """
    route = find_route(netlink, _NOBODYS[family])
    return NextHop(route.device, route.gateway) if route and route.gateway else None


def find_route(netlink: NetlinkSocket, destination: bytes, source: bytes = b"") -> Route | None:
    """Ask where a packet to `destination` (4 or 16 bytes) would go, from `source` if given; None if nowhere.

    With a source this is the look-up that reverse-path filtering makes for a packet that came the other way, policy
    rules included, marks excepted. Raises `ParseError`.
    """
    family = _FAMILY_OF_BYTES[len(destination)]
    request = _ROUTE.pack(family, len(destination) * 8, len(source) * 8, 0, 0, 0, 0, 0, 0)
    request += struct.pack("=HH", 4 + len(destination), _RTA_DST) + destination
    if source:
        request += struct.pack("=HH", 4 + len(source), _RTA_SRC) + source
    try:
        return parse_route(netlink.request(_RTM_GETROUTE, request))
    except (Unavailable, Vanished):
        # ENETUNREACH and its like, EACCES of a prohibit route, EINVAL for a source that is no address of this host.
        return None


def _hops(values: dict[int, bytes], number: int) -> Iterator[NextHop]:
    """Yield the gateways of one route's attributes."""
    if _RTA_MULTIPATH not in values:
        if gateway := _gateway(values, number):
            yield NextHop(_device(values, number), gateway)
        return
    paths = values[_RTA_MULTIPATH]
    offset = 0
    while offset < len(paths):
        left = len(paths) - offset
        length, _, _, device = _HOP.unpack_from(paths, offset) if left >= _HOP.size else (0, 0, 0, 0)
        if not _HOP.size <= length <= left:
            raise ParseError(_FILE, number, f"struct rtnexthop within {left} bytes")
        if gateway := _gateway(attributes(paths[offset : offset + length], _HOP.size, _FILE, number), number):
            yield NextHop(device, gateway)
        offset += (length + 3) & ~3


def _gateway(values: dict[int, bytes], number: int) -> bytes | None:
    """Return the gateway's address, which for an IPv4 route may be an IPv6 one (RTA_VIA, 5.2)."""
    gateway = values.get(_RTA_GATEWAY)
    if gateway is None and _RTA_VIA in values:
        # struct rtvia: rtvia_family, rtvia_addr
        gateway = values[_RTA_VIA][_FAMILY.size :]
    if gateway is not None and len(gateway) not in _FAMILY_OF_BYTES:
        raise ParseError(_FILE, number, f"a gateway of 4 or 16 bytes, found {len(gateway)}")
    return gateway


def _device(values: dict[int, bytes], number: int) -> int:
    """Return the index of a route's device, 0 for a route without one."""
    device = values.get(_RTA_OIF, bytes(_I32.size))
    if len(device) != _I32.size:
        raise ParseError(_FILE, number, f"RTA_OIF of 4 bytes, found {len(device)}")
    return int(_I32.unpack(device)[0])


def _require(message: bytes, structure: struct.Struct, what: str, number: int) -> None:
    if len(message) < structure.size:
        raise ParseError(_FILE, number, f"{what} of {structure.size} bytes, found {len(message)}")
