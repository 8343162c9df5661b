"""The addresses of a network namespace from proc, against ip(8) and arbitrary bytes."""

from __future__ import annotations

import contextlib
import ipaddress
import json
import os
import subprocess
import sys

import pytest
from hypothesis import given
from hypothesis import strategies as st

from shoal.kernel.addresses import parse_fib_trie, parse_if_inet6, read_local_addresses
from shoal.kernel.files import ParseError

TRIE = b"""Main:
  +-- 0.0.0.0/0 3 0 5
     |-- 0.0.0.0
        /0 universe UNICAST
     +-- 10.3.3.0/24 2 0 2
        |-- 10.3.3.0
           /24 link UNICAST
        |-- 10.3.3.3
           /32 host LOCAL
        |-- 10.3.3.9
           /32 universe UNICAST
        |-- 10.3.3.255
           /32 link BROADCAST
     +-- 127.0.0.0/8 2 0 2
        |-- 127.0.0.1
           /32 host LOCAL
Local:
     |-- 10.3.3.3
        /32 host LOCAL
     |-- 192.168.7.7
        /24 link UNICAST
        /32 host LOCAL tos=0x08
     |-- 10.9.0.0
        /16 host LOCAL
"""
INET6 = b"""fd000000000000000000000000000005 02 40 00 80     eth0
fe80000000000000000000000000aaaa 02 40 20 80     eth0
00000000000000000000000000000001 01 80 10 80       lo
"""

INSIDE = """
import os, subprocess, sys
for command in (["link", "set", "lo", "up"], ["link", "add", "name", "eth7", "type", "veth"],
                ["link", "set", "eth7", "up"],
                ["address", "add", "10.3.3.3/24", "dev", "eth7"], ["address", "add", "10.4.4.4/32", "dev", "lo"],
                ["address", "add", "local", "10.5.5.1", "peer", "10.5.5.2/32", "dev", "eth7"],
                ["address", "add", "fd00::5/64", "dev", "eth7", "nodad"],
                ["route", "add", "10.77.0.9/32", "dev", "eth7"], ["rule", "add", "from", "10.3.3.3", "table", "7"]):
    subprocess.run(["ip", *command], check=True)
print(os.getpid(), subprocess.run(["ip", "-j", "address"], check=True, capture_output=True, text=True).stdout)
sys.stdout.flush()
sys.stdin.read()
"""


def packed(*addresses: str) -> set[bytes]:
    """Return addresses as bytes."""
    return {ipaddress.ip_address(address).packed for address in addresses}


def test_only_the_own_addresses_of_a_routing_table() -> None:
    """Not a neighbour's route, a broadcast address, a whole local network, or the loopback address."""
    assert parse_fib_trie(TRIE) == packed("10.3.3.3", "192.168.7.7")


def test_only_addresses_that_others_may_know() -> None:
    """Global and unique local ones, without those of a link and of the host."""
    assert parse_if_inet6(INET6) == packed("fd00::5")


def test_nothing_is_no_address() -> None:
    """A namespace that was just made has an empty file."""
    assert parse_fib_trie(b"") == parse_if_inet6(b"") == frozenset()


@pytest.mark.parametrize(
    "broken", [b"/32 host LOCAL\n", b"|-- 10.3.3\n/32 host LOCAL\n", TRIE[:-1], b"|-- \xff\n/32 host LOCAL\n"]
)
def test_a_malformed_trie_is_refused(broken: bytes) -> None:
    """An address that is none, or a file cut short."""
    with pytest.raises(ParseError, match="fib_trie"):
        parse_fib_trie(broken)


@pytest.mark.parametrize("broken", [b"fd00 02 40 00 80 eth0\n", INET6[:-1], b"\n", b"x" * 32 + b" 2 4 0 8 d\n"])
def test_a_malformed_list_is_refused(broken: bytes) -> None:
    """The same for IPv6."""
    with pytest.raises(ParseError, match="if_inet6"):
        parse_if_inet6(broken)


@given(
    st.binary(max_size=300)
    | st.builds(lambda text: text.encode(), st.text("|-+ 0123456789./hostLOCAL\n", max_size=300))
)
def test_no_bytes_break_the_parsers(data: bytes) -> None:
    """Arbitrary bytes are addresses or a ParseError."""
    with contextlib.suppress(ParseError):
        assert all(len(address) == 4 for address in parse_fib_trie(data))
    with contextlib.suppress(ParseError):
        assert all(len(address) == 16 for address in parse_if_inet6(data))


@pytest.mark.root
def test_the_addresses_are_those_of_ip() -> None:
    """Of a namespace with secondary, peer and IPv6 addresses and a policy rule, seen from outside."""
    command = ["unshare", "--net", sys.executable, "-c", INSIDE]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=os.environ) as inside:
        assert inside.stdout
        pid, _, listed = inside.stdout.readline().partition(" ")
        ours = read_local_addresses("/proc", int(pid))
        inside.communicate("")
    theirs = {
        each["local"]
        for device in json.loads(listed)
        for each in device["addr_info"]
        if each["scope"] == "global" and not each["local"].startswith("127.")
    }
    assert ours == packed(*theirs) == packed("10.3.3.3", "10.4.4.4", "10.5.5.1", "fd00::5")
