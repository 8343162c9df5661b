"""The other ends of TCP connections over sock_diag, against ss and arbitrary bytes."""

from __future__ import annotations

import contextlib
import socket
import struct
import subprocess

import pytest
from hypothesis import given
from hypothesis import strategies as st

from shoal.kernel.files import ParseError
from shoal.kernel.netlink.peers import Pair, parse_peers, read_peers

ESTABLISHED = 1
RETRANSMISSION, KEEPALIVE = 1, 2
HERE, THERE = socket.inet_aton("10.0.0.1"), socket.inet_aton("10.0.0.9")


def connection(
    local: str = "10.0.0.1", peer: str = "10.0.0.9", *, timer: int = 0, retransmissions: int = 0, kind: str = "inet"
) -> bytes:
    """Return struct inet_diag_msg of a connection; `kind` is inet, inet6 or mapped."""
    family = socket.AF_INET if kind == "inet" else socket.AF_INET6
    prefix = "::ffff:" if kind == "mapped" else ""
    ends = b"".join(socket.inet_pton(family, prefix + one).ljust(16, b"\0") for one in (local, peer))
    head = struct.pack("=BBBB", family, ESTABLISHED, timer, retransmissions) + struct.pack("!HH", 40000, 443)
    return head + ends + bytes(12) + struct.pack("=IIIII", 0, 0, 0, 0, 0)


def test_pairs_once_each_with_their_worst() -> None:
    """Many connections are one pair, and one that retransmits is enough; other timers count other things."""
    found = parse_peers(
        [
            connection(),
            connection(timer=RETRANSMISSION, retransmissions=2),
            connection(),
            connection(peer="10.0.0.8", timer=RETRANSMISSION),
            connection(peer="10.0.0.7", timer=KEEPALIVE, retransmissions=5),
            connection(peer="10.0.0.6", kind="mapped", timer=RETRANSMISSION, retransmissions=1),
            connection("fd00::1", "fd00::2", kind="inet6"),
            connection("10.0.0.2"),
        ],
        {HERE},
        100,
    )
    assert found == {
        Pair(HERE, THERE): True,
        Pair(HERE, socket.inet_aton("10.0.0.8")): False,
        Pair(HERE, socket.inet_aton("10.0.0.7")): False,
        Pair(HERE, socket.inet_aton("10.0.0.6")): True,
    }


def test_many_pairs_are_cut_and_the_silent_ones_kept() -> None:
    """From the bound on, only a peer that does not answer is worth its memory."""
    connections = [connection(peer=f"10.0.1.{i}") for i in range(5)]
    found = parse_peers([*connections, connection(timer=RETRANSMISSION, retransmissions=1)], {HERE}, 3)
    assert len(found) == 4
    assert found[Pair(HERE, THERE)]


@given(st.binary(max_size=100))
def test_no_bytes_break_the_decoder(data: bytes) -> None:
    """Whatever comes, it is understood or it is a ParseError."""
    for message in (data, connection() + data):
        with contextlib.suppress(ParseError):
            parse_peers([message], {HERE, bytes(4)}, 3)
    with pytest.raises(ParseError, match="SOCK_DIAG, line 1"):
        parse_peers([data[:71]], {HERE}, 3)


def test_a_live_kernel_against_ss() -> None:
    """Connections of both families, an IPv4 one on a dual-stack listener among them, are the peers that ss prints."""
    here = socket.inet_aton("127.0.0.1")
    dual = socket.create_server(("", 0), family=socket.AF_INET6, dualstack_ipv6=True)
    with dual, socket.create_connection(("127.0.0.1", dual.getsockname()[1]), source_address=("127.0.0.5", 0)):
        found = read_peers({here}, 4096)
        witness = subprocess.run(
            ["ss", "-tnH", "state", "connected", "exclude", "time-wait", "src", "127.0.0.1"],
            check=True,
            capture_output=True,
            text=True,
        ).stdout
    peers = {socket.inet_ntoa(pair.peer) for pair in found}
    assert "127.0.0.5" in peers
    assert all(pair.local == here for pair in found)
    assert "127.0.0.5" in witness
