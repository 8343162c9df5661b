"""Which tables of legacy iptables a network namespace has: /proc/<pid>/net/{ip,ip6}_tables_names.

Their rules are not read: the old interface hands out a table only as one blob of per-match structures, and nodes that
still use it are few. Tables made by iptables-nft are nftables' and are not listed here. The files belong to root.
"""

from __future__ import annotations

from shoal.kernel.files import Reason, Unavailable, lines, read

__all__ = ["parse_table_names", "read_table_names"]


def parse_table_names(data: bytes, file: str = "net/ip_tables_names") -> frozenset[str]:
    """Return the names of the tables, one a line (net/netfilter/x_tables.c). Raises `ParseError`."""
    return frozenset(line.decode("ascii", "replace") for line in lines(data, file)) if data else frozenset()


def read_table_names(proc: str, pid: int | str) -> frozenset[str]:
    """Read the tables of both families; none where iptables is not loaded. Raises `Unavailable` or `Vanished`."""
    found: frozenset[str] = frozenset()
    for name in ("ip_tables_names", "ip6_tables_names"):
        path = f"{proc}/{pid}/net/{name}"
        try:
            found |= parse_table_names(read(path), path)
        except Unavailable as error:
            if error.reason is not Reason.NOT_IN_KERNEL:
                raise
    return found
