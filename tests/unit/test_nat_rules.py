"""Where destination NAT leads, against rules written with nft and iptables, and arbitrary bytes."""

from __future__ import annotations

import contextlib
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
from shoal.kernel.iptables import parse_table_names, read_table_names
from shoal.kernel.netlink.nat_rules import (
    NatBackends,
    NatRules,
    parse_nat_elements,
    parse_nat_rules,
    parse_nat_tables,
)

SCENE = Path(__file__).with_name("conntrack_scene.py")
V4, V6 = socket.AF_INET, socket.AF_INET6
PLACE = bytes([10, 244, 0, 2])
OTHER = bytes([10, 244, 0, 9])


def attribute(kind: int, value: bytes) -> bytes:
    """Return an attribute with its padding."""
    return struct.pack("=HH", 4 + len(value), kind) + value + bytes(-len(value) % 4)


def u32(kind: int, value: int) -> bytes:
    """Return an attribute with a big-endian number."""
    return attribute(kind, value.to_bytes(4, "big"))


def expression(name: str, *data: bytes) -> bytes:
    """Return one expression of a rule."""
    return attribute(1, attribute(1, name.encode() + b"\0") + attribute(2, b"".join(data)))


def immediate(register: int, value: bytes) -> bytes:
    """Return an expression that loads a register."""
    return expression("immediate", u32(1, register), attribute(2, attribute(1, value)))


def nat(*registers: tuple[int, int], kind: int = 1, family: int = V4) -> bytes:
    """Return an expression that translates destinations, with (attribute, register) pairs."""
    return expression("nat", u32(1, kind), u32(2, family), *(u32(*pair) for pair in registers))


def rule(*expressions: bytes, family: int = V4) -> bytes:
    """Return the answer for one rule."""
    return bytes([family, 0, 0, 0]) + attribute(1, b"nat\0") + attribute(4, b"".join(expressions))


def old_target(revision: int, info: bytes, name: str = "DNAT") -> bytes:
    """Return the expression that iptables-nft writes for a target."""
    return expression("target", attribute(1, name.encode() + b"\0"), u32(2, revision), attribute(3, info))


def test_an_address_and_a_port() -> None:
    """What `dnat to 10.244.0.2:53` is compiled to."""
    port = (53).to_bytes(2, "big")
    found = parse_nat_rules([rule(immediate(1, PLACE), immediate(2, port), nat((3, 1), (5, 2)))])
    assert (found.exact, found.ranges, found.opaque) == ({PLACE + port}, set(), 0)


@pytest.mark.parametrize(("port_register", "address_register"), [(9, 1), (9, 8), (12, 1), (2, 8), (8, 2)])
def test_registers_of_four_and_of_sixteen_bytes_are_the_same_memory(port_register: int, address_register: int) -> None:
    """A port in the second quarter of register 1, an address in its first, and so on."""
    port = (53).to_bytes(2, "big")
    loads = immediate(address_register, PLACE) + immediate(port_register, port)
    found = parse_nat_rules([rule(loads, nat((3, address_register), (5, port_register)))])
    assert (found.exact, found.opaque) == ({PLACE + port}, 0)


def test_source_nat_is_no_backend() -> None:
    """Neither are masquerading, a redirection, and a rule that only translates the port."""
    assert parse_nat_rules([rule(immediate(1, PLACE), nat((3, 1), kind=0))]) == NatRules()
    assert parse_nat_rules([rule(expression("masq")), rule(expression("redir", u32(1, 1)))]) == NatRules()
    assert parse_nat_rules([rule(immediate(1, b"\0\x35"), nat((5, 1)))]) == NatRules()


@pytest.mark.parametrize(
    "expressions",
    [
        (nat((3, 1)),),
        (immediate(2, PLACE), nat((3, 1))),
        (immediate(1, PLACE), expression("bitwise", u32(1, 1), u32(2, 1)), nat((3, 1))),
        (immediate(1, PLACE), nat((3, 1), family=V6)),
        (immediate(1, PLACE), nat((3, 1), family=5)),
        (immediate(1, PLACE), nat((3, 1), (5, 2))),
        (old_target(2, bytes(20)),),
        (old_target(1, b"\1\0\0\0" + bytes(30)),),
        (old_target(0, bytes(60), name="NETMAP"),),
    ],
)
def test_what_is_not_understood_is_counted(expressions: tuple[bytes, ...]) -> None:
    """An address that is computed, that is partly there, of an unknown family, or in a structure that is too short."""
    found = parse_nat_rules([rule(*expressions)])
    assert (found.exact, found.ranges, found.maps, found.opaque) == (set(), set(), {}, 1)


def test_backends_that_a_map_holds() -> None:
    """Address and port side by side in the map's data; a port of the rule's own beside a map of addresses."""
    lookup = expression("lookup", attribute(1, b"places\0"), u32(2, 1), u32(3, 1))
    both = rule(lookup, nat((3, 1), (5, 9)))
    address = rule(lookup, immediate(9, b"\0\x50"), nat((3, 1), (5, 9)))
    elements = bytes([V4, 0, 0, 0]) + attribute(
        3,
        attribute(1, attribute(1, b"key0") + attribute(2, attribute(1, PLACE + b"\0\x35\0\0")))
        + attribute(1, attribute(1, b"key1") + attribute(2, attribute(1, OTHER + b"\0\x36\0\0")))
        + attribute(1, attribute(1, b"end0") + u32(3, 1)),
    )
    in_map = parse_nat_rules([both])
    assert (in_map.exact, in_map.opaque) == (set(), 0)
    found = parse_nat_elements([elements], in_map.maps[b"places\0"])
    assert (found.exact, found.opaque) == ({PLACE + b"\0\x35", OTHER + b"\0\x36"}, 0)
    found = parse_nat_elements([elements], parse_nat_rules([address]).maps[b"places\0"])
    assert (found.exact, found.opaque) == ({PLACE + b"\0\x50", OTHER + b"\0\x50"}, 0)
    short = elements.replace(attribute(1, PLACE + b"\0\x35\0\0"), attribute(1, PLACE[:3]))
    with contextlib.suppress(ParseError):
        assert parse_nat_elements([short], in_map.maps[b"places\0"]).opaque


def test_a_map_with_less_than_the_rule_takes_is_counted() -> None:
    """A map of addresses alone, whose rule takes the port from it too."""
    lookup = expression("lookup", attribute(1, b"places\0"), u32(2, 1), u32(3, 1))
    targets = parse_nat_rules([rule(lookup, nat((3, 1), (5, 9)))]).maps[b"places\0"]
    element = attribute(1, attribute(1, b"key0") + attribute(2, attribute(1, PLACE)))
    found = parse_nat_elements([bytes(4) + attribute(3, element)], targets)
    assert (found.exact, found.opaque) == (set(), 1)


@pytest.mark.parametrize(
    ("revision", "info"),
    [
        (0, struct.pack("=II4s4s2s2s", 1, 3, PLACE, PLACE, b"\0\x35", b"\0\x35")),
        (1, struct.pack("=I16s16s2s2s", 3, PLACE, PLACE, b"\0\x35", b"\0\x35")),
        (2, struct.pack("=I16s16s2s2s2s2x", 3, PLACE, PLACE, b"\0\x35", b"\0\x35", b"\0\0")),
    ],
)
def test_targets_of_iptables(revision: int, info: bytes) -> None:
    """The three structures that DNAT has had; without the flag for ports, or for addresses, there are none."""
    assert parse_nat_rules([rule(old_target(revision, info))]).exact == {PLACE + b"\0\x35"}
    place = 4 if revision == 0 else 0
    without_port = info[:place] + b"\1" + info[place + 1 :]
    assert parse_nat_rules([rule(old_target(revision, without_port))]).exact == {PLACE + b"\0\0"}
    without_address = info[:place] + b"\2" + info[place + 1 :]
    assert parse_nat_rules([rule(old_target(revision, without_address))]) == NatRules()


def test_which_backends_a_connection_may_have() -> None:
    """An exact one, one for any port, and ranges of addresses and ports, each family for itself."""
    rules = NatRules()
    rules.add(PLACE, PLACE, b"\0\x35", b"\0\x35")
    rules.add(OTHER, OTHER, b"", b"")
    rules.add(bytes([10, 0, 0, 1]), bytes([10, 0, 0, 5]), b"\0\x50", b"\0\x52")
    backends = NatBackends(1, frozenset(rules.exact), tuple(rules.ranges), 0)
    assert backends.leads_to(PLACE, 53)
    assert not backends.leads_to(PLACE, 54)
    assert backends.leads_to(OTHER, 1)
    assert backends.leads_to(bytes([10, 0, 0, 5]), 82)
    assert not backends.leads_to(bytes([10, 0, 0, 6]), 82)
    assert not backends.leads_to(bytes([10, 0, 0, 0]), 80)
    assert not backends.leads_to(bytes([10, 0, 0, 3]), 83)
    assert not backends.leads_to(bytes([10, 0, 0, 3]) + bytes(12), 80)
    assert not backends.empty
    assert NatBackends(1, frozenset(), (), 0).empty


def test_more_backends_than_are_remembered_are_none(monkeypatch: pytest.MonkeyPatch) -> None:
    """Part of the backends would make the others look gone."""
    monkeypatch.setattr("shoal.kernel.netlink.nat_rules._MOST_BACKENDS", 100)
    rules = NatRules()
    for number in range(101):
        rules.add(number.to_bytes(4, "big"), number.to_bytes(4, "big"), b"", b"")
    assert rules.opaque
    half = NatRules(exact={bytes([i]) * 4 for i in range(60)})
    half.merge(NatRules(exact={bytes([i]) * 4 for i in range(60, 120)}))
    assert half.opaque


def test_only_tables_with_nat_are_asked() -> None:
    """By the type of their chains; one that is no base chain has none."""

    def chain(family: int, table: bytes, kind: bytes | None) -> bytes:
        answer = bytes([family, 0, 0, 0]) + attribute(1, table + b"\0") + attribute(3, b"c\0")
        return answer if kind is None else answer + attribute(7, kind + b"\0")

    chains = [chain(2, b"a", b"filter"), chain(2, b"b", b"nat"), chain(10, b"b", None), chain(1, b"c", b"nat")]
    assert parse_nat_tables(chains) == {(2, b"b\0"), (1, b"c\0")}


def test_names_of_legacy_tables() -> None:
    """One a line; none is an empty file; half a line is refused."""
    assert parse_table_names(b"nat\nfilter\n") == {"nat", "filter"}
    assert parse_table_names(b"") == frozenset()
    with pytest.raises(ParseError, match="ip_tables_names"):
        parse_table_names(b"na")


def test_a_node_without_legacy_iptables_has_no_tables(tmp_path: Path) -> None:
    """The files are not there unless the module is; IPv6's table counts too."""
    assert read_table_names(str(tmp_path), 1) == frozenset()
    (tmp_path / "1/net").mkdir(parents=True)
    (tmp_path / "1/net/ip6_tables_names").write_text("nat\n")
    assert read_table_names(str(tmp_path), 1) == {"nat"}


GOOD = rule(immediate(1, PLACE), immediate(2, b"\0\x35"), nat((3, 1), (5, 2)))


@given(st.integers(0, len(GOOD)), st.binary(max_size=8), st.integers(0, len(GOOD) + 8))
def test_no_damage_breaks_the_decoders(place: int, damage: bytes, length: int) -> None:
    """Good answers that were overwritten somewhere, or cut, are decoded or a ParseError."""
    damaged = (GOOD[:place] + damage + GOOD[place + len(damage) :])[:length]
    with contextlib.suppress(ParseError):
        parse_nat_rules([damaged])
    with contextlib.suppress(ParseError):
        parse_nat_tables([damaged])


@given(st.lists(st.binary(max_size=60).map(lambda data: data + b"nat\0")), st.binary(max_size=60))
def test_no_bytes_break_the_decoders(messages: list[bytes], elements: bytes) -> None:
    """Arbitrary messages are decoded or they are a ParseError."""
    for parse in (parse_nat_rules, parse_nat_tables):
        with contextlib.suppress(ParseError):
            parse(messages)
    with contextlib.suppress(ParseError):
        parse_nat_elements([elements], [])


def scene(name: str) -> dict[str, Any]:
    """Return what a scene prints that runs in a network namespace of its own."""
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)}
    command = ["unshare", "--net", sys.executable, str(SCENE), name]
    done = subprocess.run(command, check=True, stdout=subprocess.PIPE, env=environment)
    answer: dict[str, Any] = json.loads(done.stdout)
    return answer


@pytest.mark.root
def test_real_rules() -> None:
    """Rules as nft, kube-proxy and iptables-nft write them: every backend, and nothing else."""
    found = scene("rules")
    nothing = {"exact": [], "ranges": [], "opaque": 0}
    assert found["empty"] == found["changed"] == nothing
    assert found["unchanged"] is True
    assert found["nft"] == {
        "exact": [
            "10.1.1.1 8080",
            "10.1.1.2 8081",
            "10.11.11.11 5",
            "10.2.2.2 8080",
            "10.3.3.1 0",
            "10.3.3.2 0",
            "10.5.5.5 0",
            "10.7.7.1 80",
            "10.7.7.2 80",
            "10.8.3.1 53",
            "10.8.3.2 53",
            "fd00::2 8080",
            "fd00::3 0",
        ],
        "ranges": [["10.4.4.1", "10.4.4.9", 0, 65535], ["10.6.6.6", "10.6.6.6", 100, 200]],
        "opaque": 0,
    }
    assert found["iptables"] == {
        "exact": ["10.0.1.7 0", "10.244.0.2 53", "10.244.0.3 53", "fd00::9 443"],
        "ranges": [["10.0.1.1", "10.0.1.5", 0, 65535]],
        "opaque": 0,
    }
    assert found["opaque"]["opaque"] == 2
    assert found["legacy_tables_of_nft"] == []
    assert found["legacy_tables"] == ["nat"]


@pytest.mark.slow
@pytest.mark.root
def test_many_real_rules() -> None:
    """Ten thousand endpoints: all of them."""
    found = scene("many-rules")
    assert found["backends"] == 10_000
    assert found["opaque"] == 0
