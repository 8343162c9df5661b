"""TCP and IP extension counters of one network namespace: /proc/<pid>/net/netstat."""

from __future__ import annotations

from functools import lru_cache

from shoal.kernel.files import ParseError, lines, read

__all__ = ["parse_netstat", "read_netstat"]

_LARGEST = (1 << 64) - 1


def parse_netstat(data: bytes, file: str = "net/netstat") -> dict[str, int]:
    """Return {"ListenOverflows": 51, ...}: every counter under the kernel's own name.

    The file is pairs of lines, `TcpExt: <names>` then `TcpExt: <values>` (2.6 and later; the set of names grows
    with each kernel, MPTcpExt came with 5.6). Raises `ParseError` when the lines of a pair do not match.
    """
    rows = lines(data, file)
    counters: dict[str, int] = {}
    for index in range(0, len(rows), 2):
        try:
            protocol, *names = _words(rows[index])
            of, *values = rows[index + 1].split() if index + 1 < len(rows) else [b""]
            if protocol != of.decode() or len(names) != len(values):
                raise ParseError(file, index + 2, f"as many values as line {index + 1} has names")
            new = dict(zip(names, map(int, values), strict=True))
        except ValueError:
            raise ParseError(file, index + 2, "whole numbers after the protocol's name") from None
        # All at once, as there are hundreds for every network namespace; int() takes more than the kernel writes.
        if new and not (b"".join(values).isdigit() and max(new.values()) <= _LARGEST):
            raise ParseError(file, index + 2, "whole numbers of 64 bits")
        counters.update(new)
    return counters


@lru_cache(maxsize=16)
def _words(line: bytes) -> tuple[str, ...]:
    """Return the words of a line of names, which is the same in every namespace of a node."""
    return tuple(line.decode().split())


def read_netstat(proc: str, pid: int | str) -> dict[str, int]:
    """Read the counters of the network namespace of process `pid` ("self" for the own one). No privilege needed.

    Raises `Unavailable`, `Vanished` when the process ended, or `ParseError`.
    """
    path = f"{proc}/{pid}/net/netstat"
    return parse_netstat(read(path), path)
