"""The IP addresses that a network namespace has, without entering it: /proc/<pid>/net/{fib_trie,if_inet6}."""

from __future__ import annotations

from ipaddress import AddressValueError, IPv4Address

from shoal.kernel.files import ParseError, Unavailable, hexadecimal, lines, read

__all__ = ["parse_fib_trie", "parse_if_inet6", "read_local_addresses"]

_IPV6_BYTES = 16
_LEAF = b"|--"
_LOCAL = b"/32 host LOCAL"
_LOOPBACK = 127


def parse_fib_trie(data: bytes, file: str = "net/fib_trie") -> frozenset[bytes]:
    """Return the IPv4 addresses that are local, each as 4 bytes, loopback left out.

    The file draws the routing tables as trees (net/ipv4/fib_trie.c): a leaf is `|-- <address>`, and the lines below
    it say what the address is; an address of the namespace's own is `/32 host LOCAL`. Raises `ParseError`.
    """
    found: set[bytes] = set()
    if not data:
        return frozenset()
    leaf = b""
    for number, line in enumerate(lines(data, file), 1):
        text = line.strip()
        if text.startswith(_LEAF):
            leaf = text[len(_LEAF) :].strip()
        elif text.startswith(_LOCAL):
            try:
                address = IPv4Address(leaf.decode("ascii", "replace")).packed
            except AddressValueError:
                raise ParseError(file, number, "a leaf with an IPv4 address above it") from None
            if address[0] != _LOOPBACK:
                found.add(address)
    return frozenset(found)


def parse_if_inet6(data: bytes, file: str = "net/if_inet6") -> frozenset[bytes]:
    """Return the IPv6 addresses, each as 16 bytes, those of a link or of the host alone left out.

    Rows are `<address> <index> <prefix> <scope> <flags> <device>` in hexadecimal (net/ipv6/addrconf.c). Scope 0 is
    global, and unique local addresses count as such. Raises `ParseError`.
    """
    found: set[bytes] = set()
    for number, line in enumerate(lines(data, file) if data else [], 1):
        try:
            address, _, _, scope, *_ = line.split()
            packed = bytes.fromhex(address.decode("ascii", "replace"))
            is_global = hexadecimal(scope) == 0
        except ValueError:
            packed, is_global = b"", False
        if len(packed) != _IPV6_BYTES:
            raise ParseError(file, number, "an IPv6 address of 32 hexadecimal digits and five more fields")
        if is_global:
            found.add(packed)
    return frozenset(found)


def read_local_addresses(proc: str, pid: int | str) -> frozenset[bytes]:
    """Read the addresses of the network namespace of process `pid` that other hosts may know.

    Raises `Unavailable`, also for a routing table of over 16 MiB of text, `Vanished`, or `ParseError`. A kernel
    without IPv6 has none of its addresses.
    """
    found = parse_fib_trie(read(f"{proc}/{pid}/net/fib_trie"), f"{proc}/{pid}/net/fib_trie")
    try:
        data = read(f"{proc}/{pid}/net/if_inet6")
    except Unavailable:
        return found
    return found | parse_if_inet6(data, f"{proc}/{pid}/net/if_inet6")
