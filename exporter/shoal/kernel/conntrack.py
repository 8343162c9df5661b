"""Connection tracking of any network namespace, without entering it: /proc/<pid>/net/stat/nf_conntrack.

There where the kernel was built with CONFIG_NF_CONNTRACK_PROCFS and has loaded nf_conntrack; needs no capability.
"""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass

from shoal.kernel.files import ParseError, hexadecimal, lines, read
from shoal.kernel.netlink.conntrack import ConntrackStatistics

__all__ = ["ConntrackTable", "parse_conntrack_table", "read_conntrack_table"]

# The kernel's name of the column for each of ours (ct_cpu_seq_show in net/netfilter/nf_conntrack_standalone.c).
# `clashres` was `searched` before 5.10 and counted something else, `chainlength` was `delete_list` before 5.15.
_COLUMNS = {
    "found": b"found",
    "invalid": b"invalid",
    "insert": b"insert",
    "insert_failed": b"insert_failed",
    "drop": b"drop",
    "early_drop": b"early_drop",
    "error": b"icmp_error",
    "search_restart": b"search_restart",
    "clash_resolve": b"clashres",
    "chain_toolong": b"chainlength",
}
_U32_MASK = 0xFFFFFFFF


@dataclass(frozen=True, slots=True)
class ConntrackTable:
    """How many connections a network namespace tracks, and what it has counted since it was made."""

    entries: int
    statistics: ConntrackStatistics


def parse_conntrack_table(data: bytes, file: str = "net/stat/nf_conntrack") -> ConntrackTable:
    """Decode the file: a line of names, then one of hexadecimal numbers for each possible CPU, summed as netlink's are.

    The number of entries is the namespace's, and the same in each line. Raises `ParseError`.
    """
    header, *rows = lines(data, file)
    names = header.split()
    wanted = {name: names.index(column) for name, column in _COLUMNS.items() if column in names}
    if not wanted or names[0] != b"entries":
        raise ParseError(file, 1, "a line of names that begins with entries")
    if not rows:
        raise ParseError(file, 2, "a line for at least one CPU")
    entries = 0
    sums = dict.fromkeys(wanted, 0)
    # Where nothing happens the lines of all CPUs are alike, and a node has many such namespaces and many CPUs.
    for row, times in Counter(rows).items():
        fields = row.split()
        try:
            entries = hexadecimal(fields[0])
            for name, place in wanted.items():
                sums[name] += hexadecimal(fields[place]) * times
        except (IndexError, ValueError):
            raise ParseError(file, rows.index(row) + 2, f"{len(names)} hexadecimal numbers") from None
    statistics = {name: sums[name] & _U32_MASK if name in sums else None for name in _COLUMNS}
    return ConntrackTable(entries, ConntrackStatistics(**statistics))


def read_conntrack_table(proc: str, pid: int | str) -> ConntrackTable:
    """Read the table of the network namespace of process `pid`. Raises `Unavailable`, `Vanished` or `ParseError`."""
    path = f"{proc}/{pid}/net/stat/nf_conntrack"
    return parse_conntrack_table(read(path), path)
