"""The entries of a connection tracking table, against pyroute2, conntrack(8) and arbitrary bytes."""

from __future__ import annotations

import contextlib
import importlib.util
import json
import os
import socket
import struct
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from shoal.kernel.files import ParseError
from shoal.kernel.netlink.conntrack_entries import ASSURED, DST_NAT, ESTABLISHED, SEEN_REPLY, Entry, parse_entries
from shoal.kernel.netlink.core import split

SCENE = Path(__file__).with_name("conntrack_scene.py")

RECORDED = sorted((Path(__file__).parent / "fixtures").glob("*/netlink/conntrack_dump.bin"))

ANSWERED = SEEN_REPLY | ASSURED
NESTED = 0x8000


def attribute(kind: int, value: bytes) -> bytes:
    """Return an attribute with its padding."""
    return struct.pack("=HH", 4 + len(value), kind) + value + bytes(-len(value) % 4)


def nested(kind: int, *inner: bytes) -> bytes:
    """Return an attribute that holds others."""
    return attribute(kind | NESTED, b"".join(inner))


def ends(kind: int, source: str, destination: str, ports: tuple[int, int] | None, protocol: int = 17) -> bytes:
    """Return one direction of a connection, as the kernel writes it."""
    family = socket.AF_INET6 if ":" in source else socket.AF_INET
    first = 3 if family == socket.AF_INET6 else 1
    addresses = [attribute(first + i, socket.inet_pton(family, text)) for i, text in enumerate((source, destination))]
    numbers = [attribute(2 + i, port.to_bytes(2, "big")) for i, port in enumerate(ports or ())]
    return nested(kind, nested(1, *addresses), nested(2, attribute(1, bytes([protocol])), *numbers))


def u32(kind: int, value: int) -> bytes:
    """Return an attribute with a big-endian number."""
    return attribute(kind, value.to_bytes(4, "big"))


def message(
    source: str = "10.0.0.1",
    destination: str = "10.96.0.10",
    backend: str = "10.244.0.2",
    *more: bytes,
    ports: tuple[int, int] = (40000, 53),
    protocol: int = 17,
) -> bytes:
    """Return the answer for a connection with destination NAT, with more attributes after the usual ones."""
    return b"".join(
        (
            bytes(4),
            ends(1, source, destination, ports, protocol),
            ends(2, backend, source, (ports[1] + 5000, ports[0]), protocol),
            u32(3, DST_NAT),
            u32(8, 0),
            u32(12, 1234),
            u32(11, 1),
            u32(7, 29),
            *more,
        )
    )


def decode(*messages: bytes) -> list[Entry]:
    """Decode messages one after the other, as of one dump."""
    return list(parse_entries(messages))


def test_every_field_of_an_entry() -> None:
    """Both directions by their own, big-endian ports and numbers, and nothing that was not sent."""
    (entry,) = decode(message())
    assert entry == Entry(
        source=bytes([10, 0, 0, 1]),
        source_port=40000,
        destination=bytes([10, 96, 0, 10]),
        destination_port=53,
        protocol=17,
        reply_source=bytes([10, 244, 0, 2]),
        reply_source_port=5053,
        reply_destination=bytes([10, 0, 0, 1]),
        reply_destination_port=40000,
        status=DST_NAT,
        timeout=29,
        tcp_state=None,
        replies=None,
        zone=0,
    )


def test_what_only_some_connections_have() -> None:
    """The state of TCP, packets where they are counted, a zone, and IPv6."""
    extra = (
        nested(4, nested(1, attribute(1, b"\3"), attribute(2, b"\7"), attribute(4, b"\1\2"))),
        nested(9, attribute(1, (77).to_bytes(8, "big")), attribute(2, bytes(8))),
        nested(10, attribute(1, (5).to_bytes(8, "big")), attribute(2, bytes(8))),
        attribute(18, (7).to_bytes(2, "big")),
    )
    (entry,) = decode(message("fd00::1", "fd00::2", "fd00::3", *extra, protocol=6))
    assert (entry.tcp_state, entry.replies, entry.zone, entry.protocol) == (ESTABLISHED, 5, 7, 6)
    assert entry.source == socket.inet_pton(socket.AF_INET6, "fd00::1")
    assert entry.reply_source == socket.inet_pton(socket.AF_INET6, "fd00::3")


def test_a_zone_of_one_direction() -> None:
    """CTA_TUPLE_ZONE of the reply stands where there is no CTA_ZONE."""
    direction = ends(2, "10.244.0.2", "10.0.0.1", (53, 40000))[4:] + attribute(3, (9).to_bytes(2, "big"))
    (entry,) = decode(bytes(4) + ends(1, "10.0.0.1", "10.96.0.10", (40000, 53)) + nested(2, direction))
    assert entry.zone == 9


def test_a_connection_without_ports_timeout_and_status() -> None:
    """GRE before 3.x, an unknown protocol, a connection that a flow table carries: absent is 0 or None."""
    (entry,) = decode(bytes(4) + ends(1, "10.0.0.1", "10.0.0.2", None, 89) + ends(2, "10.0.0.2", "10.0.0.1", None, 89))
    assert (entry.source_port, entry.destination_port, entry.status, entry.timeout) == (0, 0, 0, None)
    assert entry.protocol == 89


def test_attributes_of_another_age_are_passed_over() -> None:
    """One that is not known, in front of, between and behind the known ones, and flags in the type."""
    usual = message()
    novel = attribute(99, b"novel")
    first = 4 + len(ends(1, "10.0.0.1", "10.96.0.10", (40000, 53)))
    changed = [usual[:4] + novel + usual[4:], usual[:first] + novel + usual[first:], usual + novel]
    assert decode(usual, *changed) == decode(usual) * 4
    assert decode(message("10.0.0.1", "10.96.0.10", "10.244.0.2", nested(99, novel, novel))) == decode(usual)


def test_layouts_of_one_length_are_told_apart() -> None:
    """Status and timeout in each other's place: the same length, and neither is taken for the other."""
    usual = message()
    status, timeout = u32(3, DST_NAT), u32(7, 29)
    swapped = usual.replace(status, b"elsewhere").replace(timeout, status).replace(b"elsewhere", timeout)
    assert len(swapped) == len(usual)
    assert decode(usual, swapped, usual, swapped) == decode(usual) * 4


def test_many_layouts_are_not_kept() -> None:
    """More than are remembered: each is decoded all the same."""
    messages = [
        message("10.0.0.1", "10.96.0.10", "10.244.0.2", attribute(99, bytes(size))) for size in range(0, 800, 4)
    ]
    assert decode(*messages, *messages) == decode(message()) * len(messages) * 2
    entries = parse_entries(messages)
    for _ in messages:
        next(entries)
        assert len(entries.gi_frame.f_locals["known"]) <= 64  # type: ignore[attr-defined]  # a generator has it


@pytest.mark.parametrize(
    "broken",
    [
        b"",
        b"\0\0\0",
        bytes(4),
        bytes(4) + b"\1",
        bytes(4) + ends(1, "10.0.0.1", "10.0.0.2", (1, 2)),
        bytes(4) + ends(2, "10.0.0.1", "10.0.0.2", (1, 2)),
        message()[:-1],
        message()[:40],
        message().replace(struct.pack("=HH", 8, 1), struct.pack("=HH", 9, 1), 1),
        message().replace(struct.pack("=HH", 5, 1), struct.pack("=HH", 4, 1), 1),
        bytes(4) + nested(1, nested(1), nested(2)),
        message("10.0.0.1", "10.96.0.10", "10.244.0.2", attribute(18, b"\1")),
    ],
)
def test_broken_answers_are_malformed(broken: bytes) -> None:
    """Short, without an address, with an address of five bytes, half a number: named by their place in the dump."""
    with pytest.raises(ParseError, match="conntrack entry, line 3"):
        decode(message(), message(), broken)


@given(st.lists(st.binary(max_size=160)))
def test_no_bytes_break_the_decoder(messages: list[bytes]) -> None:
    """Arbitrary messages are decoded or they are a ParseError."""
    with contextlib.suppress(ParseError):
        decode(*messages)


@given(st.integers(0, 160), st.binary(min_size=1, max_size=8), st.integers(0, 200), st.booleans())
def test_a_remembered_layout_changes_no_outcome(place: int, damage: bytes, length: int, ipv6: bool) -> None:  # noqa: FBT001
    """A damaged message after a good one is decoded, or refused, exactly as it is alone."""
    good = message("fd00::1", "fd00::2", "fd00::3") if ipv6 else message()
    damaged = (good[:place] + damage + good[place + len(damage) :])[:length]
    alone: list[Entry] | None = None
    after: list[Entry] | None = None
    with contextlib.suppress(ParseError):
        alone = decode(damaged)
    with contextlib.suppress(ParseError):
        after = decode(good, damaged)[1:]
    assert alone == after


@pytest.mark.parametrize("path", RECORDED, ids=lambda path: path.parts[-3])
def test_recorded_entries_are_those_of_pyroute2(path: Path) -> None:
    """Every connection of a recorded kernel, whose attributes came in the order of its time."""
    spec = importlib.util.spec_from_file_location("conntrack_scene", SCENE)
    assert spec
    assert spec.loader
    witness = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = witness
    spec.loader.exec_module(witness)
    data = path.read_bytes()
    theirs = witness.by_pyroute2(data)
    ours = [witness.comparable(one) for one in parse_entries(message.body for message in split(data))]
    assert [{name: one[name] for name in row} for one, row in zip(ours, theirs, strict=True)] == theirs
    assert {one["protocol"] for one in ours} >= {1, 6, 17, 89}
    assert {one["zone"] for one in ours} == {0, 7}
    assert {one["replies"] is None for one in ours} == {True, False}


@pytest.fixture(scope="module")
def scene() -> dict[str, Any]:
    """Return what ours, pyroute2 and conntrack(8) say of connections made in a network namespace."""
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)}
    command = ["unshare", "--net", sys.executable, str(SCENE), "entries"]
    done = subprocess.run(command, check=True, stdout=subprocess.PIPE, env=environment)
    answer: dict[str, Any] = json.loads(done.stdout)
    return answer


def by_ends(rows: list[dict[str, Any]]) -> dict[tuple[Any, ...], dict[str, Any]]:
    """Return the rows by what tells connections apart."""
    found = {(row["protocol"], row["src"], row["dst"], row["sport"], row["dport"]): row for row in rows}
    assert len(found) == len(rows)
    return found


@pytest.mark.root
def test_real_entries_are_those_of_pyroute2(scene: dict[str, Any]) -> None:
    """Every connection, both directions, status and state of TCP; a second may have passed."""
    ours, theirs = by_ends(scene["ours"]), by_ends(scene["pyroute2"])
    assert ours.keys() == theirs.keys()
    for key, row in theirs.items():
        assert abs(row.pop("timeout") - ours[key]["timeout"]) <= 2
        assert row == {name: ours[key][name] for name in row}


@pytest.mark.root
def test_real_entries_are_those_of_the_tool(scene: dict[str, Any]) -> None:
    """Every connection as conntrack -L prints it, with zones and packets, and what it calls unreplied and assured."""
    ours, theirs = by_ends(scene["ours"]), by_ends(scene["tool"])
    assert ours.keys() == theirs.keys()
    assert len(ours) >= 13
    for key, row in theirs.items():
        one = ours[key]
        assert abs(row.pop("timeout") - one["timeout"]) <= 2
        assert row.pop("unreplied") == (not one["status"] & SEEN_REPLY)
        assert row.pop("assured") == bool(one["status"] & ASSURED)
        assert row.pop("established") == (one["tcp_state"] == ESTABLISHED)
        assert row == {name: one[name] for name in row}


@pytest.mark.root
def test_the_scene_has_every_kind(scene: dict[str, Any]) -> None:
    """The comparison above saw translations both ways, IPv6, a zone, no ports, and counted packets."""
    rows = scene["ours"]
    assert any(
        row["dst"] == "10.96.0.1" and row["reply_src"] == "127.0.0.5" and row["reply_sport"] == 5353 for row in rows
    )
    assert any(
        row["dst"] == "fd00::99" and row["reply_src"] == "fd00::1" and row["reply_sport"] == 8080 for row in rows
    )
    assert any(row["src"] == "127.0.0.1" and row["reply_dst"] == "127.0.0.66" for row in rows)
    for row in rows:
        assert bool(row["status"] & DST_NAT) == (row["dst"] != row["reply_src"])
    assert {row["zone"] for row in rows} == {0, 7}
    assert {row["protocol"] for row in rows} >= {1, 6, 17, 89}
    assert {row["replies"] is None for row in rows} == {True, False}
