"""Links, addresses, rules and routes over netlink, against ip(8), recorded kernels, and arbitrary bytes."""

from __future__ import annotations

import contextlib
import errno
import json
import os
import socket
import struct
import subprocess
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from shoal.kernel.files import ParseError
from shoal.kernel.netlink.core import Subsystem, split
from shoal.kernel.netlink.routes import (
    NextHop,
    NextHops,
    Route,
    find_default,
    find_route,
    open_routes,
    parse_addresses,
    parse_links,
    parse_next_hops,
    parse_policy_rules,
    parse_route,
)

if TYPE_CHECKING:
    from collections.abc import Callable

SCENE = Path(__file__).with_name("routing_scene.py")
RECORDINGS = sorted(Path(__file__).parent.glob("fixtures/*/netlink/route_witness.json"))
UNICAST, LOCAL = 1, 2


def attribute(kind: int, value: bytes) -> bytes:
    """Return one netlink attribute, padded."""
    data = struct.pack("=HH", 4 + len(value), kind) + value
    return data + bytes(-len(data) % 4)


def ip(address: str) -> bytes:
    """Return an address as bytes."""
    return socket.inet_pton(socket.AF_INET6 if ":" in address else socket.AF_INET, address)


def route(*attributes: bytes, prefix: int = 0, kind: int = UNICAST) -> bytes:
    """Return struct rtmsg and its attributes."""
    return struct.pack("=BBBBBBBBI", socket.AF_INET, prefix, 0, 0, 254, 3, 0, kind, 0) + b"".join(attributes)


def by(device: int) -> bytes:
    """Return RTA_OIF."""
    return attribute(4, struct.pack("=i", device))


def via(address: str) -> bytes:
    """Return RTA_GATEWAY."""
    return attribute(5, ip(address))


def rule(*attributes: bytes, table: int = 254, source: int = 0, tos: int = 0, action: int = 1) -> bytes:
    """Return struct fib_rule_hdr and its attributes."""
    return struct.pack("=BBBBBBBBI", socket.AF_INET, 0, source, tos, table, 0, 0, action, 0) + b"".join(attributes)


def hop(device: int, *attributes: bytes) -> bytes:
    """Return struct rtnexthop and its attributes."""
    content = b"".join(attributes)
    return struct.pack("=HBBi", 8 + len(content), 0, 0, device) + content


def test_next_hops_of_every_shape() -> None:
    """A gateway, several, an IPv6 one of an IPv4 route; on the link and other types have none; the same one once."""
    paths = hop(3, via("10.0.0.3")) + hop(4, attribute(18, struct.pack("=H", 10) + ip("fe80::4"))) + hop(5)
    found = parse_next_hops(
        [
            route(by(2), via("10.0.0.9"), prefix=16),
            route(by(2), prefix=24),
            route(attribute(9, paths), prefix=8),
            route(by(2), via("10.0.0.1")),
            route(by(7), via("10.0.0.7"), kind=LOCAL),
            route(by(2), via("10.0.0.9"), prefix=17),
        ],
        100,
    )
    assert found == NextHops(
        # The default route's first, then the one of two routes, then the others.
        (
            NextHop(2, ip("10.0.0.1")),
            NextHop(2, ip("10.0.0.9")),
            NextHop(3, ip("10.0.0.3")),
            NextHop(4, ip("fe80::4")),
        ),
        complete=True,
    )


def test_a_long_table_is_not_read_to_its_end() -> None:
    """No more than asked for, and it says so; exactly as many as asked for is complete."""
    routes = [route(by(2), via(f"10.0.0.{i}"), prefix=24) for i in range(3)]
    assert parse_next_hops(iter(routes), 3).complete
    assert parse_next_hops(iter(routes), 2) == NextHops(
        (NextHop(2, ip("10.0.0.0")), NextHop(2, ip("10.0.0.1"))), complete=False
    )


def test_a_looked_up_route() -> None:
    """Device, gateway, source, and whether it is the host's own address; a route without a device has index 0."""
    assert parse_route(route(by(2), via("10.0.0.1"), attribute(7, ip("10.0.0.5")))) == Route(
        2, ip("10.0.0.1"), ip("10.0.0.5"), own=False
    )
    assert parse_route(route(by(1), kind=LOCAL)) == Route(1, None, None, own=True)
    assert parse_route(route()).device == 0


def test_rules_that_everybody_has_are_no_policy() -> None:
    """The three of each kernel, one that was moved; whatever looks at the packet or goes elsewhere counts."""
    priority, protocol, suppress = attribute(6, bytes(4)), attribute(21, b"\2"), attribute(14, b"\xff\xff\xff\xff")
    ordinary = [rule(attribute(15, bytes(4)), priority, protocol, suppress, table=table) for table in (253, 254, 255)]
    assert parse_policy_rules(ordinary) == 0
    policies = [
        rule(attribute(2, ip("10.0.0.1")), source=32),
        rule(tos=8),
        rule(table=77),
        rule(action=6),
        rule(attribute(10, b"\0\0\0\7")),
        rule(attribute(99, b"")),
    ]
    for policy in policies:
        assert parse_policy_rules([*ordinary, policy]) == 1


def test_addresses_of_global_scope_by_device() -> None:
    """The own end of a point-to-point address, an address of two devices; none of link scope, none of IPv6."""

    def address(index: int, *attributes: bytes, family: int = socket.AF_INET, scope: int = 0) -> bytes:
        return struct.pack("=BBBBI", family, 24, 0, scope, index) + b"".join(attributes)

    assert parse_addresses(
        [
            address(2, attribute(1, ip("10.0.0.2")), attribute(2, ip("10.0.0.1"))),
            address(3, attribute(1, ip("10.0.0.1"))),
            address(4, attribute(2, ip("169.254.0.1")), scope=253),
            address(5, attribute(1, ip("fd00::1")), family=socket.AF_INET6),
        ]
    ) == {ip("10.0.0.1"): {2, 3}}


@pytest.mark.parametrize(
    ("parse", "message"),
    [
        (parse_links, bytes(15)),
        (parse_links, bytes(16)),
        (parse_addresses, bytes(7)),
        (parse_addresses, struct.pack("=BBBBI", 2, 24, 0, 0, 2)),
        (parse_addresses, struct.pack("=BBBBI", 2, 24, 0, 0, 2) + attribute(2, bytes(5))),
        (parse_policy_rules, bytes(11)),
        (lambda messages: parse_next_hops(messages, 9), bytes(11)),
        (lambda messages: parse_next_hops(messages, 9), route(by(2), attribute(5, bytes(3)))),
        (lambda messages: parse_next_hops(messages, 9), route(attribute(4, bytes(3)), via("10.0.0.1"))),
        (lambda messages: parse_next_hops(messages, 9), route(attribute(9, bytes(5)))),
        (lambda messages: parse_next_hops(messages, 9), route(attribute(9, struct.pack("=HBBi", 7, 0, 0, 2)))),
        (lambda messages: parse_next_hops(messages, 9), route(attribute(9, struct.pack("=HBBi", 12, 0, 0, 2)))),
        (lambda messages: parse_route(messages[0]), bytes(11)),
    ],
)
def test_what_is_short_or_damaged_is_named(parse: Callable[[list[bytes]], object], message: bytes) -> None:
    """A sentence that names netlink and the message, no number."""
    with pytest.raises(ParseError, match="netlink ROUTE, line 1"):
        parse([message])


@given(st.binary(max_size=120))
def test_no_bytes_break_the_decoders(data: bytes) -> None:
    """Whatever comes, it is understood or it is a ParseError, and it ends; also behind a proper header."""
    for message in (data, route(data), route(attribute(9, data)), bytes(16) + data, rule(data)):
        for parse in (parse_links, parse_addresses, parse_policy_rules):
            with contextlib.suppress(ParseError):
                parse([message])
        with contextlib.suppress(ParseError):
            parse_next_hops([message], 3)
        with contextlib.suppress(ParseError):
            parse_route(message)


def bodies(recording: Path, name: str) -> list[bytes]:
    """Return the messages that a kernel sent."""
    return [message.body for message in split(recording.with_name(f"route_{name}.bin").read_bytes())]


@pytest.mark.parametrize("recording", RECORDINGS, ids=lambda path: str(path.parts[-3]))
def test_recorded_kernels(recording: Path) -> None:
    """What each kernel sent is what ip(8) read from that kernel."""
    witness = json.loads(recording.read_text())
    links = parse_links(bodies(recording, "links"))
    compare_links({index: (link.name, link.up, link.arp) for index, link in links.items()}, witness["links"])
    found = {
        socket.inet_ntoa(address): sorted(links[index].name for index in indexes)
        for address, indexes in parse_addresses(bodies(recording, "addresses")).items()
    }
    assert found == addresses_of(witness["addresses"])
    assert parse_policy_rules(bodies(recording, "rules")) == policies_of(witness["rules"]) == 2
    for name in ("routes", "routes6"):
        hops = parse_next_hops(bodies(recording, name), 1000)
        assert hops.complete
        assert {(links[one.device].name, text(one.address)) for one in hops.hops} == hops_of(witness[name])


def text(address: bytes) -> str:
    """Return an address as people write it."""
    return socket.inet_ntop(socket.AF_INET if len(address) == 4 else socket.AF_INET6, address)


def compare_links(found: dict[int, tuple[str, bool, bool]], witness: list[dict[str, Any]]) -> None:
    """Compare devices with `ip -j link`."""
    assert found == {
        one["ifindex"]: (one["ifname"], "UP" in one["flags"], "NOARP" not in one["flags"]) for one in witness
    }


def addresses_of(witness: list[dict[str, Any]]) -> dict[str, list[str]]:
    """Return {address: devices} of `ip -j -4 addr show scope global`."""
    found: dict[str, list[str]] = {}
    for device in witness:
        for address in device.get("addr_info", []):
            if address.get("scope") == "global":
                found.setdefault(address["local"], []).append(device["ifname"])
    return {address: sorted(devices) for address, devices in found.items()}


def policies_of(witness: list[dict[str, Any]]) -> int:
    """Count the rules of `ip -j rule` that look at the packet."""
    return sum(one["src"] != "all" or "fwmark" in one for one in witness)


def hops_of(witness: list[dict[str, Any]]) -> set[tuple[str, str]]:
    """Return the gateways of `ip -j route`."""
    found = set()
    for one in witness:
        for path in one.get("nexthops", [one]):
            gateway = path.get("gateway") or path.get("via", {}).get("host")
            if gateway and one.get("type", "unicast") == "unicast":
                found.add((path["dev"], gateway))
    return found


@pytest.mark.root
def test_a_live_kernel() -> None:
    """Devices, addresses, rules, gateways and look-ups of a namespace made for it are what ip(8) says."""
    done = subprocess.run(
        ["unshare", "--net", "--mount", sys.executable, str(SCENE), "oracle"],
        check=True,
        capture_output=True,
        text=True,
    )
    found = json.loads(done.stdout)
    compare_links(
        {int(index): (link["name"], link["up"], link["arp"]) for index, link in found["links"].items()},
        found["ip_links"],
    )
    names = {int(index): link["name"] for index, link in found["links"].items()}
    ours = {address: sorted(names[index] for index in indexes) for address, indexes in found["addresses"].items()}
    assert ours == addresses_of(found["ip_addresses"])
    assert found["rules"] == policies_of(found["ip_rules"]) == 2
    for hops, witness in zip(found["next_hops"], found["ip_routes"], strict=True):
        assert {tuple(one) for one in hops} == hops_of(witness)
    assert found["complete"] == [True, True]
    assert len(found["first"]) <= 1
    assert [one[0] for one in found["next_hops"]] == found["defaults"] == [["a0", "10.8.0.2"], ["a0", "fd08::6"]]
    assert found["routes"] == found["ip_lookups"]


class Refusing:
    """A socket whose every request is refused with one errno."""

    def __init__(self, number: int) -> None:
        """Take the errno."""
        self.number = number

    def __call__(self, _: Subsystem) -> Refusing:
        """Open."""
        return self

    def bind(self, _: tuple[int, int], /) -> None:
        """Take any port id."""

    def getsockname(self) -> tuple[int, int]:
        """Return a port id."""
        return 7, 0

    def settimeout(self, _: float, /) -> None:
        """Never wait."""

    def send(self, data: bytes, /) -> int:
        """Take the request."""
        return len(data)

    def recvmsg(self, _: int, /) -> tuple[bytes, list[tuple[int, int, bytes]], int, tuple[int, int]]:
        """Refuse."""
        return struct.pack("=IHHIIi16x", 36, 2, 0, 1, 7, -self.number), [], 0, (0, 0)

    def close(self) -> None:
        """Close."""


@pytest.mark.parametrize("number", [errno.ENETUNREACH, errno.EHOSTUNREACH, errno.EACCES, errno.EINVAL, errno.ESRCH])
def test_no_route_is_an_answer(number: int) -> None:
    """Unreachable, prohibited, and asked from an address that is not here: nowhere, and no failure."""
    with open_routes(opener=Refusing(number)) as netlink:
        assert find_route(netlink, ip("10.0.0.1"), ip("10.0.0.2")) is None
    with open_routes(opener=Refusing(number)) as netlink:
        assert find_default(netlink, socket.AF_INET6) is None


def test_a_socket_is_closed_with_its_block() -> None:
    """No descriptor is left, which would pin the namespace."""
    before = len(os.listdir("/proc/self/fd"))
    with open_routes() as netlink:
        find_route(netlink, ip("127.0.0.1"))
        assert len(os.listdir("/proc/self/fd")) == before + 1
    assert len(os.listdir("/proc/self/fd")) == before
