"""Where the destination NAT of one network namespace leads: nftables' rules, from NETLINK_NETFILTER.

Constants are those of include/uapi/linux/netfilter/{nfnetlink,nf_tables,nf_tables_compat}.h; the kernel's end is
net/netfilter/{nf_tables_api,nft_nat,nft_immediate,nft_lookup,nft_compat}.c. iptables-nft writes nftables rules too,
with the target of old in an expression of its own. Only as much is decoded as tells which addresses are backends: of
rules of NAT tables those that translate destinations, and the maps that they look backends up in. What is not
understood is counted, so that nobody takes the rest for all there is. Asking needs CAP_NET_ADMIN, and makes a kernel
without the module nf_tables load it (see `shoal.kernel.modules`).
"""

from __future__ import annotations

import struct
from dataclasses import dataclass, field
from functools import partial
from socket import AF_INET, AF_INET6
from typing import TYPE_CHECKING, Final, NamedTuple

from shoal.kernel.files import ParseError, Reason, Unavailable
from shoal.kernel.netlink.core import NetlinkSocket, SocketOpener, Subsystem, attributes, open_socket

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator

__all__ = ["NatBackends", "NatRules", "parse_nat_elements", "parse_nat_rules", "parse_nat_tables", "read_nat_backends"]

_FILE: Final = "netlink NETFILTER nftables"

# NFNL_SUBSYS_NFTABLES and enum nf_tables_msg_types
_NFT_MSG_GETCHAIN: Final = 10 << 8 | 4
_NFT_MSG_GETRULE: Final = 10 << 8 | 7
_NFT_MSG_GETSETELEM: Final = 10 << 8 | 13
_NFT_MSG_GETGEN: Final = 10 << 8 | 16

# struct nfgenmsg: nfgen_family, version (NFNETLINK_V0), res_id
_NFGENMSG_BYTES: Final = 4
# struct nlattr, and what attributes are padded to
_ATTRIBUTE_BYTES: Final = 4

_NFTA_GEN_ID: Final = 1
_NFTA_CHAIN_TABLE: Final = 1
_NFTA_CHAIN_TYPE: Final = 7
_NFTA_RULE_TABLE: Final = 1
_NFTA_RULE_EXPRESSIONS: Final = 4
_NFTA_EXPR_NAME: Final = 1
_NFTA_EXPR_DATA: Final = 2
_NFTA_DATA_VALUE: Final = 1
_NFTA_IMMEDIATE_DREG: Final = 1
_NFTA_IMMEDIATE_DATA: Final = 2
_NFTA_LOOKUP_SET: Final = 1
_NFTA_LOOKUP_DREG: Final = 3
_NFTA_SET_ELEM_LIST_TABLE: Final = 1
_NFTA_SET_ELEM_LIST_SET: Final = 2
_NFTA_SET_ELEM_LIST_ELEMENTS: Final = 3
_NFTA_SET_ELEM_DATA: Final = 2

_NFTA_NAT_TYPE: Final = 1
_NFT_NAT_DNAT: Final = 1
_NFTA_NAT_FAMILY: Final = 2
_NFTA_NAT_REG_ADDR_MIN: Final = 3
_NFTA_NAT_REG_ADDR_MAX: Final = 4
_NFTA_NAT_REG_PROTO_MIN: Final = 5
_NFTA_NAT_REG_PROTO_MAX: Final = 6
_UNITS_OF_FAMILY: Final[dict[int, int]] = {AF_INET: 1, AF_INET6: 4}

# nf_tables_compat.h, and of nf_nat.h struct nf_nat_range (flags, min_addr, max_addr, min_proto, max_proto,
# and more since revision 2) and nf_nat_ipv4_multi_range_compat (rangesize, flags, min_ip, max_ip, min, max).
_NFTA_TARGET_NAME: Final = 1
_NFTA_TARGET_REV: Final = 2
_NFTA_TARGET_INFO: Final = 3
_RANGE: Final = struct.Struct("=I16s16s2s2s")
_OLD_RANGE: Final = struct.Struct("=4xI4s4s2s2s")
_NF_NAT_RANGE_MAP_IPS: Final = 1 << 0
_NF_NAT_RANGE_PROTO_SPECIFIED: Final = 1 << 1

# Registers are numbered 1-4 of 16 bytes, or 8-23 of 4 bytes, over the same memory.
_NFT_REG_4: Final = 4
_NFT_REG32_00: Final = 8
_UNITS: Final = 16
_UNIT_BYTES: Final = 4

# nla_len of the first attribute
_LENGTH: Final = struct.Struct("=H")
_LENGTH_END: Final = _NFGENMSG_BYTES + _LENGTH.size
_WORDS: Final = (b"nat\0", b"DNAT\0", b"NETMAP\0")

_ANY_PORT: Final = bytes(2)
_MOST_BACKENDS: Final = 100_000
_MOST_RANGES: Final = 100

_Units = tuple[bytes | int, ...]
"""Register contents, 4 bytes at a time: the bytes themselves, or at which unit of a map's data they are found."""


class _Target(NamedTuple):
    """Where a rule translates to, perhaps by what a map says."""

    low: _Units
    high: _Units
    port_low: _Units
    port_high: _Units

    def with_data(self, data: bytes) -> tuple[bytes, bytes, bytes, bytes] | None:
        """Return both addresses and both ports (empty for any) given the data of an element, None if it is short."""
        found = []
        for units in self:
            parts = [data[unit * 4 : unit * 4 + 4] if isinstance(unit, int) else unit for unit in units]
            if not all(parts):
                return None
            found.append(b"".join(parts))
        low, high, port_low, port_high = found
        if len(low) % _UNIT_BYTES or len(high) % _UNIT_BYTES or 1 in (len(port_low), len(port_high)):
            return None
        return low, high, port_low[:2], port_high[:2]


@dataclass(frozen=True, slots=True)
class NatBackends:
    """Every address that the rules of one namespace translate destinations to."""

    generation: int
    """The kernel's number of this state of the rules (NFTA_GEN_ID)."""
    exact: frozenset[bytes]
    """Addresses of 4 or 16 bytes, each followed by a port of 2 bytes, 0 for any."""
    ranges: tuple[tuple[bytes, bytes, int, int], ...]
    """First and last address, first and last port."""
    opaque: int
    """Translations of destinations that were not understood, so that backends are missing."""

    @property
    def empty(self) -> bool:
        """Whether no rule translates any destination to anywhere."""
        return not self.exact and not self.ranges

    def leads_to(self, address: bytes, port: int) -> bool:
        """Tell whether any rule translates to this address and port."""
        exact = self.exact
        if address + port.to_bytes(2, "big") in exact or address + _ANY_PORT in exact:
            return True
        return any(
            len(low) == len(address) and low <= address <= high and first <= port <= last
            for low, high, first, last in self.ranges
        )


@dataclass(slots=True)
class NatRules:
    """What has been found so far in the rules of one namespace."""

    exact: set[bytes] = field(default_factory=set)
    ranges: set[tuple[bytes, bytes, int, int]] = field(default_factory=set)
    maps: dict[bytes, list[_Target]] = field(default_factory=dict)
    """{name of a map of the table, with its end: what rules make of its elements}"""
    opaque: int = 0

    def add(self, low: bytes, high: bytes, port_low: bytes, port_high: bytes) -> None:
        """Add a backend, or a range of them; empty ports are any port."""
        first = int.from_bytes(port_low, "big")
        last = int.from_bytes(port_high, "big") if port_low else (1 << 16) - 1
        if low == high and (not port_low or first == last):
            self.exact.add(low + (port_low or _ANY_PORT))
        else:
            self.ranges.add((low, high, first, last))
        self._bound()

    def merge(self, other: NatRules) -> None:
        """Add the backends of `other`."""
        self.exact |= other.exact
        self.ranges |= other.ranges
        self.opaque += other.opaque
        self._bound()

    def _bound(self) -> None:
        if len(self.exact) > _MOST_BACKENDS or len(self.ranges) > _MOST_RANGES:
            self.opaque += 1
            self.exact.clear()
            self.ranges.clear()


def parse_nat_tables(messages: Iterable[bytes]) -> set[tuple[int, bytes]]:
    """Return (family, name) of the tables with a chain of type nat, from answers to NFT_MSG_GETCHAIN."""
    found: set[tuple[int, bytes]] = set()
    for number, message in enumerate(messages, 1):
        family = _family(message, number)
        chain = attributes(message, _NFGENMSG_BYTES, _FILE, number)
        if chain.get(_NFTA_CHAIN_TYPE, b"").rstrip(b"\0") == b"nat":
            found.add((family, chain.get(_NFTA_CHAIN_TABLE, b"")))
    return found


def parse_nat_rules(messages: Iterable[bytes]) -> NatRules:
    """Return what the rules of one table translate destinations to, from answers to NFT_MSG_GETRULE."""
    rules = NatRules()
    for number, message in enumerate(messages, 1):
        # Most rules of a node translate nothing; looking for the words is far cheaper than decoding. They are looked
        # for behind the name of the table, which comes first and may be nat.
        (length,) = _LENGTH.unpack_from(message, _NFGENMSG_BYTES) if len(message) >= _LENGTH_END else (0,)
        if not any(message.find(word, _NFGENMSG_BYTES + length) >= 0 for word in _WORDS):
            continue
        family = _family(message, number)
        rule = attributes(message, _NFGENMSG_BYTES, _FILE, number)
        registers: dict[int, bytes | int] = {}
        looked_up = b""
        for element in _each(rule.get(_NFTA_RULE_EXPRESSIONS, b""), number):
            expression = attributes(element, 0, _FILE, number)
            name = expression.get(_NFTA_EXPR_NAME, b"").rstrip(b"\0")
            data = attributes(expression.get(_NFTA_EXPR_DATA, b""), 0, _FILE, number)
            if name == b"immediate":
                _load(registers, data, number)
            elif name == b"lookup" and _NFTA_LOOKUP_DREG in data:
                looked_up = data.get(_NFTA_LOOKUP_SET, b"")
                first = _unit(_u32(data, _NFTA_LOOKUP_DREG))
                registers = {first + place: place for place in range(_UNITS - first)}
            elif name == b"nat" and _u32(data, _NFTA_NAT_TYPE) == _NFT_NAT_DNAT:
                _native(data, registers, looked_up, rules)
            elif name == b"target":
                _compatible(data, family, rules)
            else:
                # An address is loaded right before it is used: what else may come between is not followed.
                registers.clear()
    return rules


def parse_nat_elements(messages: Iterable[bytes], targets: list[_Target]) -> NatRules:
    """Return what `targets` make of the elements of their map, from answers to NFT_MSG_GETSETELEM."""
    rules = NatRules()
    for number, message in enumerate(messages, 1):
        _family(message, number)
        listed = attributes(message, _NFGENMSG_BYTES, _FILE, number).get(_NFTA_SET_ELEM_LIST_ELEMENTS, b"")
        for element in _each(listed, number):
            data = attributes(element, 0, _FILE, number).get(_NFTA_SET_ELEM_DATA)
            if data is None:
                continue  # the end of an interval
            value = attributes(data, 0, _FILE, number).get(_NFTA_DATA_VALUE, b"")
            for target in targets:
                backend = target.with_data(value)
                if backend:
                    rules.add(*backend)
                else:
                    rules.opaque += 1
    return rules


def read_nat_backends(known: NatBackends | None = None, *, opener: SocketOpener = open_socket) -> NatBackends:
    """Read where the rules of the namespace lead that `opener` opens sockets in.

    Returns `known` when they have not changed since. Tables without NAT are not asked for their rules. Raises
    `Unavailable` (NO_PERMISSION without CAP_NET_ADMIN; NOT_READABLE when they keep changing) or `ParseError`.
    """
    with NetlinkSocket(Subsystem.NETFILTER, opener=opener) as netlink:
        answer = netlink.request(_NFT_MSG_GETGEN, bytes(_NFGENMSG_BYTES))
        generation = _u32(attributes(answer, _NFGENMSG_BYTES, _FILE, 1), _NFTA_GEN_ID)
        if known and known.generation == generation:
            return known
        rules = NatRules()
        for family, table in netlink.dump(_NFT_MSG_GETCHAIN, bytes(_NFGENMSG_BYTES), parse_nat_tables):
            for part in _read_table(netlink, family, table):
                rules.merge(part)
        if netlink.inconsistent_dumps:
            raise Unavailable(Reason.NOT_READABLE, "the NAT rules keep changing while they are being read")
    return NatBackends(generation, frozenset(rules.exact), tuple(sorted(rules.ranges)), rules.opaque)


def _read_table(netlink: NetlinkSocket, family: int, table: bytes) -> Iterator[NatRules]:
    """Yield what is found in the rules of a table, then in each map that they use."""
    header = struct.pack("=BBH", family, 0, 0)
    rules = netlink.dump(_NFT_MSG_GETRULE, header + _attribute(_NFTA_RULE_TABLE, table), parse_nat_rules)
    yield rules
    for name, targets in rules.maps.items():
        which = _attribute(_NFTA_SET_ELEM_LIST_TABLE, table) + _attribute(_NFTA_SET_ELEM_LIST_SET, name)
        elements = partial(parse_nat_elements, targets=targets)
        yield netlink.dump(_NFT_MSG_GETSETELEM, header + which, elements)


def _native(data: dict[int, bytes], registers: dict[int, bytes | int], looked_up: bytes, rules: NatRules) -> None:
    """Add the target of an expression nat."""
    if _NFTA_NAT_REG_ADDR_MIN not in data:
        return  # only the port is translated
    units = _UNITS_OF_FAMILY.get(_u32(data, _NFTA_NAT_FAMILY), 0)

    def register(kind: int, otherwise: int, count: int) -> _Units:
        kind = kind if kind in data else otherwise
        if kind not in data:
            return ()
        first = _unit(_u32(data, kind))
        return tuple(registers.get(first + place, b"") for place in range(count))

    target = _Target(
        register(_NFTA_NAT_REG_ADDR_MIN, 0, units),
        register(_NFTA_NAT_REG_ADDR_MAX, _NFTA_NAT_REG_ADDR_MIN, units),
        register(_NFTA_NAT_REG_PROTO_MIN, 0, 1),
        register(_NFTA_NAT_REG_PROTO_MAX, _NFTA_NAT_REG_PROTO_MIN, 1),
    )
    if not units or b"" in sum(target, ()):
        rules.opaque += 1
    elif any(isinstance(unit, int) for unit in sum(target, ())):
        rules.maps.setdefault(looked_up, []).append(target)
    elif backend := target.with_data(b""):
        rules.add(*backend)
    else:
        rules.opaque += 1


def _compatible(data: dict[int, bytes], family: int, rules: NatRules) -> None:
    """Add the target of an expression target, which is one of iptables'."""
    name = data.get(_NFTA_TARGET_NAME, b"").rstrip(b"\0")
    if name == b"NETMAP":
        rules.opaque += 1
    if name != b"DNAT":
        return
    info, revision = data.get(_NFTA_TARGET_INFO, b""), _u32(data, _NFTA_TARGET_REV)
    structure = _RANGE if revision else _OLD_RANGE
    if len(info) < structure.size or family not in _UNITS_OF_FAMILY:
        rules.opaque += 1
        return
    flags, low, high, port_low, port_high = structure.unpack_from(info)
    if not flags & _NF_NAT_RANGE_MAP_IPS:
        return
    length = _UNITS_OF_FAMILY[family] * _UNIT_BYTES
    if len(low) < length:
        rules.opaque += 1
        return
    if not flags & _NF_NAT_RANGE_PROTO_SPECIFIED:
        port_low = port_high = b""
    rules.add(low[:length], high[:length], port_low, port_high)


def _load(registers: dict[int, bytes | int], data: dict[int, bytes], number: int) -> None:
    """Do what an expression immediate does: put bytes into registers."""
    value = attributes(data.get(_NFTA_IMMEDIATE_DATA, b""), 0, _FILE, number).get(_NFTA_DATA_VALUE, b"")
    first = _unit(_u32(data, _NFTA_IMMEDIATE_DREG))
    for place in range(0, len(value), _UNIT_BYTES):
        registers[first + place // _UNIT_BYTES] = value[place : place + _UNIT_BYTES]


def _unit(register: int) -> int:
    """Return where a register begins, in units of 4 bytes; one that holds no data is beyond all that do."""
    if 1 <= register <= _NFT_REG_4:
        return (register - 1) * 4
    return register - _NFT_REG32_00 if register >= _NFT_REG32_00 else _UNITS


def _u32(data: dict[int, bytes], kind: int) -> int:
    value = data.get(kind, b"")
    if len(value) != _UNIT_BYTES:
        raise ParseError(_FILE, 0, f"attribute {kind} of {_UNIT_BYTES} bytes, found {len(value)}")
    return int.from_bytes(value, "big")


def _family(message: bytes, number: int) -> int:
    if len(message) < _NFGENMSG_BYTES:
        raise ParseError(_FILE, number, f"struct nfgenmsg of {_NFGENMSG_BYTES} bytes, found {len(message)}")
    return message[0]


def _each(nested: bytes, number: int) -> Iterator[bytes]:
    """Yield the values of attributes that are all of one type, of which `attributes` would keep the last."""
    offset = 0
    while offset < len(nested):
        left = len(nested) - offset
        length = _LENGTH.unpack_from(nested, offset)[0] if left >= _ATTRIBUTE_BYTES else 0
        if not _ATTRIBUTE_BYTES <= length <= left:
            raise ParseError(_FILE, number, f"an attribute of {_ATTRIBUTE_BYTES} to {left} bytes, found {length}")
        yield nested[offset + _ATTRIBUTE_BYTES : offset + length]
        offset += (length + 3) & ~3


def _attribute(kind: int, value: bytes) -> bytes:
    length = _ATTRIBUTE_BYTES + len(value)
    return struct.pack("=HH", length, kind) + value + bytes(-length % _ATTRIBUTE_BYTES)
