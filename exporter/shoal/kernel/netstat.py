"""TCP and IP extension counters of one network namespace: /proc/<pid>/net/netstat."""

from __future__ import annotations

import re

from shoal.kernel.files import ParseError, lines, read

__all__ = ["parse_netstat", "read_netstat"]

# All of a line at once, as there are hundreds of numbers for every network namespace.
_VALUES = re.compile(rb"\S+(?:[ \t]+-?[0-9]{1,20})*\s*")


def parse_netstat(data: bytes, file: str = "net/netstat") -> dict[str, int]:
    """Return {"ListenOverflows": 51, ...}: every counter under the kernel's own name.

    The file is pairs of lines, `TcpExt: <names>` then `TcpExt: <values>` (2.6 and later; the set of names grows
    with each kernel, MPTcpExt came with 5.6). Raises `ParseError` when the lines of a pair do not match.
    """
    rows = lines(data, file)
    counters: dict[str, int] = {}
    for index in range(0, len(rows), 2):
        names = rows[index].split()
        values = rows[index + 1].split() if index + 1 < len(rows) else []
        if not names or len(names) != len(values) or names[0] != values[0]:
            raise ParseError(file, index + 2, f"as many values as line {index + 1} has names")
        if not _VALUES.fullmatch(rows[index + 1]):
            raise ParseError(file, index + 2, "whole numbers after the protocol's name")
        try:
            counters.update(zip((name.decode() for name in names[1:]), map(int, values[1:]), strict=True))
        except ValueError:
            raise ParseError(file, index + 1, "names of ASCII letters") from None
    return counters


def read_netstat(proc: str, pid: int | str) -> dict[str, int]:
    """Read the counters of the network namespace of process `pid` ("self" for the own one). No privilege needed.

    Raises `Unavailable`, `Vanished` when the process ended, or `ParseError`.
    """
    path = f"{proc}/{pid}/net/netstat"
    return parse_netstat(read(path), path)
