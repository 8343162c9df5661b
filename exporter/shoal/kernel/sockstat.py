"""How many TCP sockets one network namespace has: /proc/<pid>/net/sockstat and sockstat6."""

from __future__ import annotations

from dataclasses import dataclass

from shoal.kernel.files import ParseError, Reason, Unavailable, lines, read, whole

__all__ = ["TcpSockets", "parse_sockstat", "read_tcp_sockets"]


@dataclass(frozen=True, slots=True)
class TcpSockets:
    """TCP sockets of one network namespace."""

    in_use: int
    """Sockets in the kernel's table, listening ones among them, TIME_WAIT not: inuse of IPv4 and IPv6."""
    time_wait: int
    """Sockets in TIME_WAIT, of both families (tw)."""


def parse_sockstat(data: bytes, file: str = "net/sockstat") -> dict[str, dict[str, int]]:
    """Return {"TCP": {"inuse": 1, "orphan": 0, ...}, ...}: the pairs of each line under its protocol.

    `orphan`, `alloc` and `mem` are of the whole node, whichever namespace is read. Raises `ParseError`.
    """
    rows: dict[str, dict[str, int]] = {}
    for number, line in enumerate(lines(data, file), 1):
        protocol, colon, rest = line.partition(b":")
        fields = rest.split()
        try:
            names = [name.decode() for name in fields[::2]]
            rows[protocol.decode()] = dict(zip(names, map(whole, fields[1::2]), strict=True))
        except ValueError:
            raise ParseError(file, number, "a protocol and pairs of a name and a whole number") from None
        if not colon:
            raise ParseError(file, number, "a protocol and a colon")
    return rows


def read_tcp_sockets(proc: str, pid: int | str) -> TcpSockets:
    """Read both families of the namespace of process `pid`. A kernel without IPv6 has no second file.

    Raises `Unavailable`, `Vanished` when the process ended, or `ParseError`. No privilege is needed.
    """
    path = f"{proc}/{pid}/net/sockstat"
    rows = parse_sockstat(read(path), path)
    if not {"inuse", "tw"} <= rows.get("TCP", {}).keys():
        raise ParseError(path, 0, "a line TCP: with inuse and tw")
    in_use = rows["TCP"]["inuse"]
    try:
        in_use += parse_sockstat(read(f"{path}6"), f"{path}6").get("TCP6", {}).get("inuse", 0)
    except Unavailable as error:
        if error.reason is not Reason.NOT_IN_KERNEL:
            raise
    return TcpSockets(in_use, rows["TCP"]["tw"])
