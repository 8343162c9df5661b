"""Connection tracking of one network namespace, from NETLINK_NETFILTER: how full the table is, and what went wrong.

Constants are those of include/uapi/linux/netfilter/{nfnetlink,nfnetlink_conntrack}.h; the values are filled in by
net/netfilter/nf_conntrack_netlink.c (CONFIG_NF_CT_NETLINK). Both messages exist since 3.6. Every number is a
big-endian u32. Asking needs CAP_NET_ADMIN (EPERM without), and a kernel without the module nf_conntrack_netlink
answers EINVAL, after it has tried to load it: a caller that must not cause modules to be loaded asks only where
/proc/sys/net/netfilter/nf_conntrack_max exists.
"""

from __future__ import annotations

import struct
from dataclasses import dataclass
from typing import TYPE_CHECKING, Final

from shoal.kernel.files import ParseError
from shoal.kernel.netlink.core import NetlinkSocket, SocketOpener, Subsystem, attributes, open_socket

if TYPE_CHECKING:
    from collections.abc import Iterable

__all__ = [
    "ConntrackStatistics",
    "ConntrackTotals",
    "parse_conntrack_statistics",
    "parse_conntrack_totals",
    "read_conntrack_statistics",
    "read_conntrack_totals",
]

_FILE: Final = "netlink NETFILTER conntrack"

# nfnetlink.h: a message's type is the subsystem's number and, in the low byte, the message's.
_NFNL_SUBSYS_CTNETLINK: Final = 1
# nfnetlink_conntrack.h
_IPCTNL_MSG_CT_GET_STATS_CPU: Final = _NFNL_SUBSYS_CTNETLINK << 8 | 4
_IPCTNL_MSG_CT_GET_STATS: Final = _NFNL_SUBSYS_CTNETLINK << 8 | 5

# enum ctattr_stats_global
_CTA_STATS_GLOBAL_ENTRIES: Final = 1
_CTA_STATS_GLOBAL_MAX_ENTRIES: Final = 2

# enum ctattr_stats_cpu; 1, 3, 5, 6 and 7 are no longer sent
_CTA_STATS: Final = {
    "found": 2,
    "invalid": 4,
    "insert": 8,
    "insert_failed": 9,
    "drop": 10,
    "early_drop": 11,
    "error": 12,
    "search_restart": 13,
    "clash_resolve": 14,
    "chain_toolong": 15,
}

# struct nfgenmsg: nfgen_family (AF_UNSPEC), version (NFNETLINK_V0), res_id (the CPU's number in an answer per CPU)
_NFGENMSG_BYTES: Final = 4
_REQUEST: Final = bytes(_NFGENMSG_BYTES)

_BE32: Final = struct.Struct(">I")
_U32_MASK: Final = 0xFFFFFFFF


@dataclass(frozen=True, slots=True)
class ConntrackTotals:
    """The table's fill in one network namespace."""

    entries: int
    """Connections tracked in this namespace (nf_conntrack_count)."""
    limit: int | None
    """nf_conntrack_max: one number for the whole machine, and each namespace may fill up to it. None before 4.18."""


@dataclass(frozen=True, slots=True)
class ConntrackStatistics:
    """Counters of one network namespace since it was made, summed over all possible CPUs (struct ip_conntrack_stat).

    The kernel counts in an unsigned 32-bit number per CPU, and those wrap. The sum is taken modulo 2**32, so that it
    is itself such a counter: when one CPU's wraps the sum goes on, and when the sum wraps it falls to near zero, which
    is what Prometheus takes for a reset and gets right. (A plain sum would fall by 2**32 to some large number, and a
    reset to a large number looks like that many events at once.)

    None is a counter that this kernel does not send; five others were dropped from the message over the years.
    """

    found: int | None
    """Translated addresses that were taken already, so that NAT had to look for another port."""
    invalid: int | None
    """Packets that could not be tracked, because they belong to no connection that makes sense."""
    insert: int | None
    """Entries put into the table by userspace; those that packets make are not counted here."""
    insert_failed: int | None
    """Entries that lost a race for their place (two clients masqueraded with one port), or met a chain too long."""
    drop: int | None
    """Packets dropped: no room in the table, no memory, or an insertion that failed."""
    early_drop: int | None
    """Entries thrown out before their time to make room for another in a full table."""
    error: int | None
    """ICMP and ICMPv6 packets that were refused, such as errors about no known connection."""
    search_restart: int | None
    """Lookups begun again because an entry moved to another chain under them."""
    clash_resolve: int | None
    """Insertions that lost the race and were settled without loss. None before 5.10."""
    chain_toolong: int | None
    """Insertions refused because the hash chain is too long. None before 5.15."""


def parse_conntrack_totals(message: bytes) -> ConntrackTotals:
    """Decode the answer to IPCTNL_MSG_CT_GET_STATS (without netlink header). Raises `ParseError`."""
    found = _numbers(message, 1, (_CTA_STATS_GLOBAL_ENTRIES, _CTA_STATS_GLOBAL_MAX_ENTRIES))
    if _CTA_STATS_GLOBAL_ENTRIES not in found:
        raise ParseError(_FILE, 1, "CTA_STATS_GLOBAL_ENTRIES")
    return ConntrackTotals(found[_CTA_STATS_GLOBAL_ENTRIES], found.get(_CTA_STATS_GLOBAL_MAX_ENTRIES))


def parse_conntrack_statistics(messages: Iterable[bytes]) -> ConntrackStatistics:
    """Sum the answers to IPCTNL_MSG_CT_GET_STATS_CPU, one for each possible CPU (without netlink headers).

    Attributes that are not known are passed over. Raises `ParseError`, also when no CPU answered.
    """
    wanted = tuple(_CTA_STATS.values())
    sums: dict[int, int] = {}
    for number, message in enumerate(messages, 1):
        for kind, value in _numbers(message, number, wanted).items():
            sums[kind] = sums.get(kind, 0) + value & _U32_MASK
    if not sums:
        raise ParseError(_FILE, 0, "counters of at least one CPU")
    return ConntrackStatistics(**{name: sums.get(kind) for name, kind in _CTA_STATS.items()})


def read_conntrack_totals(*, opener: SocketOpener = open_socket) -> ConntrackTotals:
    """Read the fill of the table of the network namespace that `opener` opens sockets in.

    Raises `Unavailable` (NO_PERMISSION without CAP_NET_ADMIN, NOT_IN_KERNEL without the module) or `ParseError`.
    """
    with NetlinkSocket(Subsystem.NETFILTER, opener=opener) as netlink:
        return parse_conntrack_totals(netlink.request(_IPCTNL_MSG_CT_GET_STATS, _REQUEST))


def read_conntrack_statistics(*, opener: SocketOpener = open_socket) -> ConntrackStatistics:
    """Read the counters of the network namespace that `opener` opens sockets in. Raises as `read_conntrack_totals`."""
    with NetlinkSocket(Subsystem.NETFILTER, opener=opener) as netlink:
        return netlink.dump(_IPCTNL_MSG_CT_GET_STATS_CPU, _REQUEST, parse_conntrack_statistics)


def _numbers(message: bytes, number: int, wanted: tuple[int, ...]) -> dict[int, int]:
    if len(message) < _NFGENMSG_BYTES:
        raise ParseError(_FILE, number, f"struct nfgenmsg of {_NFGENMSG_BYTES} bytes, found {len(message)}")
    found = attributes(message, _NFGENMSG_BYTES, _FILE, number)
    numbers: dict[int, int] = {}
    for kind in wanted:
        value = found.get(kind)
        if value is None:
            continue
        if len(value) != _BE32.size:
            raise ParseError(_FILE, number, f"attribute {kind} of {_BE32.size} bytes, found {len(value)}")
        (numbers[kind],) = _BE32.unpack(value)
    return numbers
