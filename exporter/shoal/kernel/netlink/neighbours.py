"""Neighbour entries (ARP and NDP) of one network namespace, and the tables they share, from NETLINK_ROUTE.

Constants are those of include/uapi/linux/{rtnetlink,neighbour}.h; the values are filled in by net/core/neighbour.c. No
privilege is needed. Entries belong to a network namespace, but the tables, their thresholds and their counters are one
for the whole machine, whichever namespace asks (seen on 6.18).
"""

from __future__ import annotations

import errno
import os
import socket
import struct
from collections import Counter
from dataclasses import dataclass
from typing import TYPE_CHECKING, Final, NamedTuple

from shoal.kernel.files import ParseError, Unavailable, Vanished, hexadecimal, lines, read, unavailable_from
from shoal.kernel.netlink.core import NetlinkSocket, Subsystem, attributes, open_socket, split
from shoal.kernel.processes import check_processes_visible

if TYPE_CHECKING:
    from collections.abc import Collection, Iterable, Iterator

__all__ = [
    "STATES",
    "Event",
    "Key",
    "Neighbour",
    "Neighbours",
    "Table",
    "find_neighbour",
    "open_events",
    "parse_discards",
    "parse_events",
    "parse_neighbours",
    "parse_tables",
    "read_discards",
    "read_events",
    "read_neighbours",
    "read_tables",
]

_FILE: Final = "netlink ROUTE neighbours"

# rtnetlink.h
_RTM_NEWNEIGH: Final = 28
_RTM_GETNEIGH: Final = 30
_RTM_GETNEIGHTBL: Final = 66
_RTMGRP_NEIGH: Final = 1 << 2

# struct ndmsg: ndm_family, pad, pad, ndm_ifindex, ndm_state, ndm_flags, ndm_type
_ENTRY: Final = struct.Struct("=BxxxiHBB")
_NDA_DST: Final = 1
_NDA_LLADDR: Final = 2
_NDA_CACHEINFO: Final = 3
# The header of an NDA_DST of 4 and of 16 bytes, and how many those are.
_ADDRESS_FIRST: Final = {struct.pack("=HH", 4 + size, _NDA_DST): size for size in (4, 16)}
_ADDRESS_AT: Final = _ENTRY.size + 4
# struct nda_cacheinfo: ndm_confirmed, ndm_used, ndm_updated, ndm_refcnt. Clock ticks since then.
_CACHEINFO: Final = struct.Struct("=IIII")
_TICKS: Final = os.sysconf("SC_CLK_TCK")

STATES: Final = {
    0x01: "incomplete",
    0x02: "reachable",
    0x04: "stale",
    0x08: "delay",
    0x10: "probe",
    0x20: "failed",
    0x40: "noarp",
    0x80: "permanent",
    0x00: "none",
}
"""The names of NUD_*, as `ip neigh` writes them. An entry has exactly one."""
# NUD_VALID: there is a link-layer address to send to.
_VALID: Final = 0x80 | 0x40 | 0x02 | 0x10 | 0x04 | 0x08
# In these the kernel sends through the entry, and it must be confirmed again and again. A stale entry is not in use:
# the first packet through it makes it delay.
_IN_USE: Final = 0x02 | 0x08 | 0x10

# struct ndtmsg: family
_TABLE_BYTES: Final = 4
_NDTA_NAME: Final = 1
_NDTA_THRESHOLDS: Final = (2, 3, 4)
_NDTA_CONFIG: Final = 5
_NDTA_STATS: Final = 7
# struct ndt_config: ndtc_key_len, ndtc_entry_size, ndtc_entries, ...
_CONFIG: Final = struct.Struct("=HHI")
# struct ndt_stats: allocs, destroys, hash_grows, res_failed, lookups, hits, rcv_probes_mcast, rcv_probes_ucast,
# periodic_gc_runs, forced_gc_runs, table_fulls (since 4.3)
_STATISTICS: Final = struct.Struct("=24xQ40xQQ")
_U32: Final = struct.Struct("=I")

_IPV4_BYTES: Final = 4
_DATAGRAM_BYTES: Final = 64 * 1024


class Key(NamedTuple):
    """What an entry is found by: the index of its device and its address (4 or 16 bytes)."""

    device: int
    address: bytes


@dataclass(frozen=True, slots=True)
class Neighbour:
    """One entry."""

    state: str
    """One of `STATES`."""
    mac: bytes | None
    """The link-layer address (6 bytes on Ethernet), None while there is none: incomplete and failed."""
    confirmed_seconds: float | None
    """Since the neighbour last proved that it is there. The kernel sets it 60 s back for an entry that never did."""


@dataclass(frozen=True, slots=True)
class Neighbours:
    """All entries of a namespace, summed, and the few that were asked for."""

    counts: dict[tuple[int, str], int]
    """{(index of the device, state): entries}"""
    unconfirmed_seconds: dict[int, float]
    """{index of the device: the longest time since confirmation of the entries that are in use}"""
    entries: dict[Key, Neighbour]
    """Those that were asked for and exist."""


@dataclass(frozen=True, slots=True)
class Event:
    """An entry was made, or its state or its link-layer address changed."""

    key: Key
    neighbour: Neighbour


@dataclass(frozen=True, slots=True)
class Table:
    """The table of one protocol: the whole machine's. The counters begin at boot."""

    entries: int
    """Entries of all network namespaces together (ndtc_entries)."""
    thresholds: tuple[int, int, int]
    """gc_thresh1 to 3: below the first nothing is collected, above the third no entry is made."""
    resolution_failures: int
    """Neighbours that never answered (ndts_res_failed)."""
    forced_collections: int
    """Times that entries were thrown out before their time to make room (ndts_forced_gc_runs)."""
    overflows: int
    """Entries that could not be made because the table was full (ndts_table_fulls)."""


def parse_neighbours(messages: Iterable[bytes], wanted: Collection[Key] = ()) -> Neighbours:
    """Sum the entries (struct ndmsg and its attributes) of a dump, and pick out those `wanted`.

    Thousands may come, so what is not needed of one is not decoded. Raises `ParseError` naming the message by number.
    """
    counts: Counter[tuple[int, int]] = Counter()
    unconfirmed: dict[int, float] = {}
    entries: dict[Key, Neighbour] = {}
    for number, message in enumerate(messages, 1):
        if len(message) < _ENTRY.size:
            raise ParseError(_FILE, number, f"struct ndmsg of {_ENTRY.size} bytes, found {len(message)}")
        _, device, state, _, _ = _ENTRY.unpack_from(message)
        counts[device, state] += 1
        in_use = state & _IN_USE
        # The kernel puts the address first. Should it not, the entry is decoded, which costs eight times as much.
        size = _ADDRESS_FIRST.get(message[_ENTRY.size : _ENTRY.size + 4])
        if not in_use and size and (device, message[_ADDRESS_AT : _ADDRESS_AT + size]) not in wanted:
            continue
        key, neighbour = _decode(message, number)
        seconds = neighbour.confirmed_seconds
        if in_use and seconds is not None and seconds >= unconfirmed.get(device, 0):
            unconfirmed[device] = seconds
        if key in wanted:
            entries[key] = neighbour
    named = Counter[tuple[int, str]]()
    for (device, state), count in counts.items():
        named[device, STATES.get(state, "none")] += count
    return Neighbours(dict(named), unconfirmed, entries)


def parse_events(datagram: bytes) -> list[Event]:
    """Decode a notification of entries that were made or changed; others are passed over. Raises `ParseError`."""
    return [
        Event(*_decode(message.body, number))
        for number, message in enumerate(split(datagram, _FILE), 1)
        if message.kind == _RTM_NEWNEIGH
    ]


def parse_tables(messages: Iterable[bytes]) -> dict[str, Table]:
    """Decode {"arp_cache": ..., "ndisc_cache": ...} from struct ndtmsg and its attributes.

    The dump has a message for each table, and one more for each device with settings of its own, which are passed over.
    Raises `ParseError`.
    """
    tables: dict[str, Table] = {}
    for number, message in enumerate(messages, 1):
        if len(message) < _TABLE_BYTES:
            raise ParseError(_FILE, number, f"struct ndtmsg of {_TABLE_BYTES} bytes, found {len(message)}")
        values = attributes(message, _TABLE_BYTES, _FILE, number)
        if _NDTA_CONFIG not in values:
            continue
        try:
            first, second, third = (int(_U32.unpack(values[kind])[0]) for kind in _NDTA_THRESHOLDS)
            (_, _, count) = _CONFIG.unpack_from(values[_NDTA_CONFIG])
            failures, forced, overflows = _STATISTICS.unpack_from(values[_NDTA_STATS])
            name = values[_NDTA_NAME].rstrip(b"\0").decode("ascii")
        except (KeyError, struct.error, UnicodeDecodeError):
            raise ParseError(_FILE, number, "name, thresholds, configuration and statistics of a table") from None
        tables[name] = Table(count, (first, second, third), failures, forced, overflows)
    return tables


def parse_discards(data: bytes, file: str = "net/stat/arp_cache") -> int:
    """Sum the column unresolved_discards, hexadecimal and a row for each CPU. Raises `ParseError`.

    Packets dropped because the queue of an unresolved neighbour was full (unres_qlen). Those that still wait in it when
    the neighbour is given up are not among them (seen on 6.18: 908 of 1,000). Netlink does not send it.
    """
    header, *rows = lines(data, file)
    try:
        column = header.split().index(b"unresolved_discards")
    except ValueError:
        raise ParseError(file, 1, "a column unresolved_discards") from None
    total = 0
    for number, row in enumerate(rows, 2):
        try:
            total += hexadecimal(row.split()[column])
        except (IndexError, ValueError):
            raise ParseError(file, number, "as many hexadecimal numbers as line 1 has names") from None
    return total


def read_neighbours(netlink: NetlinkSocket, wanted: Collection[Key] = ()) -> Neighbours:
    """Read the entries of all protocols and devices. `netlink` speaks ROUTE. Raises `Unavailable` or `ParseError`."""

    def reduce(messages: Iterator[bytes]) -> Neighbours:
        return parse_neighbours(messages, wanted)

    return netlink.dump(_RTM_GETNEIGH, bytes(_ENTRY.size), reduce)


def find_neighbour(netlink: NetlinkSocket, key: Key) -> Neighbour | None:
    """Read one entry, None if there is none (or before 5.0). Raises `ParseError`."""
    family = socket.AF_INET if len(key.address) == _IPV4_BYTES else socket.AF_INET6
    request = _ENTRY.pack(family, key.device, 0, 0, 0)
    request += struct.pack("=HH", 4 + len(key.address), _NDA_DST) + key.address
    try:
        return _decode(netlink.request(_RTM_GETNEIGH, request), 1)[1]
    except (Unavailable, Vanished):
        return None


def read_tables(netlink: NetlinkSocket) -> dict[str, Table]:
    """Read the tables by name: arp_cache, and ndisc_cache with IPv6. Raises `Unavailable` or `ParseError`."""
    return netlink.dump(_RTM_GETNEIGHTBL, bytes(_TABLE_BYTES), parse_tables)


def read_discards(proc: str, table: str) -> int:
    """Read `parse_discards` of a table, since boot, of the whole machine.

    The file is in the first network namespace only, which process 1 of the host is in. Raises `Unavailable` or
    `ParseError`.
    """
    check_processes_visible(proc)
    path = f"{proc}/1/net/stat/{table}"
    return parse_discards(read(path), path)


def open_events() -> socket.socket:
    """Return a socket that hears of every change of an entry in this namespace, for `read_events`.

    It pins the namespace, so it is for the exporter's own only. Raises `Unavailable`.
    """
    try:
        opened = open_socket(Subsystem.ROUTE)
        opened.settimeout(0)
        opened.bind((0, _RTMGRP_NEIGH))
    except OSError as error:
        raise unavailable_from(error, _FILE) from None
    return opened


def read_events(events: socket.socket, most: int) -> tuple[list[Event], bool]:
    """Return what has happened since the last call, `most` datagrams of it, and whether the kernel had to drop some.

    Never waits. Raises `Unavailable` or `ParseError`.
    """
    found: list[Event] = []
    lost = False
    for _ in range(most):
        try:
            datagram, _, _, sender = events.recvmsg(_DATAGRAM_BYTES)
        except BlockingIOError:
            break
        except OSError as error:
            if error.errno != errno.ENOBUFS:
                raise unavailable_from(error, _FILE) from None
            lost = True
            continue
        if sender[0] == 0:
            found += parse_events(datagram)
    return found, lost


def _decode(message: bytes, number: int) -> tuple[Key, Neighbour]:
    if len(message) < _ENTRY.size:
        raise ParseError(_FILE, number, f"struct ndmsg of {_ENTRY.size} bytes, found {len(message)}")
    _, device, state, _, _ = _ENTRY.unpack_from(message)
    values = attributes(message, _ENTRY.size, _FILE, number)
    times = values.get(_NDA_CACHEINFO)
    if times is not None and len(times) < _CACHEINFO.size:
        raise ParseError(_FILE, number, f"struct nda_cacheinfo of {_CACHEINFO.size} bytes, found {len(times)}")
    confirmed = None if times is None else _CACHEINFO.unpack_from(times)[0] / _TICKS
    # A failed entry may still carry the address that failed.
    mac = values.get(_NDA_LLADDR) if state & _VALID else None
    return Key(device, values.get(_NDA_DST, b"")), Neighbour(STATES.get(state, "none"), mac or None, confirmed)
