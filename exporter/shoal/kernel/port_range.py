"""Which local ports the kernel hands out in the reader's network namespace: sysctls below net.ipv4."""

from __future__ import annotations

from dataclasses import dataclass

from shoal.kernel.files import ParseError, is_count, lines, read
from shoal.kernel.sysctls import read_sysctl

__all__ = ["PortRange", "parse_port_range", "parse_reserved_ports", "read_port_range"]

_HIGHEST = 65535


@dataclass(frozen=True, slots=True)
class PortRange:
    """The ports from `low` to `high`, of which `available` are not reserved. IPv6 uses the same."""

    low: int
    high: int
    available: int
    time_wait_reuse: int
    """Whether connect() may take over the port of a connection in TIME_WAIT: 0 no, 1 yes, 2 on loopback only."""


def parse_port_range(data: bytes, file: str = "ip_local_port_range") -> tuple[int, int]:
    r"""Return (low, high) of `32768\t60999`. Raises `ParseError`."""
    (line, *more) = lines(data, file)
    fields = line.split()
    if more or len(fields) != 2 or not all(map(is_count, fields)):  # noqa: PLR2004  (low and high)
        raise ParseError(file, 1, "the lowest and the highest port")
    low, high = map(int, fields)
    if not low <= high <= _HIGHEST:
        raise ParseError(file, 1, "the lowest and the highest port, in that order")
    return low, high


def parse_reserved_ports(data: bytes, file: str = "ip_local_reserved_ports") -> list[tuple[int, int]]:
    """Return the (first, last) of each item of `8080,9148-9150`; an empty line reserves none. Raises `ParseError`."""
    reserved = []
    for item in b",".join(lines(data, file)).split(b","):
        if not item:
            continue
        first, dash, last = item.partition(b"-")
        last = last if dash else first
        if not is_count(first) or not is_count(last) or not int(first) <= int(last) <= _HIGHEST:
            raise ParseError(file, 1, "ports and ranges of ports between commas")
        reserved.append((int(first), int(last)))
    return reserved


def read_port_range(proc: str) -> PortRange:
    """Read the range of the network namespace that the calling thread is in. Raises `Unavailable` or `ParseError`."""
    path = f"{proc}/sys/net/ipv4/ip_local_port_range"
    low, high = parse_port_range(read(path), path)
    path = f"{proc}/sys/net/ipv4/ip_local_reserved_ports"
    reserved = parse_reserved_ports(read(path), path)
    taken = sum(max(0, min(last, high) - max(first, low) + 1) for first, last in reserved)
    # The timestamps of the old connection are what tells its late packets from those of the new one.
    reuse = read_sysctl(proc, "net/ipv4/tcp_tw_reuse") if read_sysctl(proc, "net/ipv4/tcp_timestamps") else 0
    return PortRange(low, high, high - low + 1 - taken, reuse)
