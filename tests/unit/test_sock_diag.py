"""Listening sockets over sock_diag, against pyroute2, ss, recorded kernels, and arbitrary bytes."""

from __future__ import annotations

import contextlib
import dataclasses
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
from pyroute2.netlink.diag import MarshalDiag

from shoal.kernel.files import ParseError, Reason, Unavailable
from shoal.kernel.netlink.core import Subsystem, split
from shoal.kernel.netlink.sock_diag import Listener, parse_listeners, read_listeners

if TYPE_CHECKING:
    from collections.abc import Iterator

SCENE = Path(__file__).with_name("netlink_scene.py")
RECORDINGS = sorted(Path(__file__).parent.glob("fixtures/*/netlink/sock_diag_listen_*.bin"))
SKMEMINFO = 7
CGROUP_ID = 21
LISTEN = 10


def attribute(kind: int, value: bytes) -> bytes:
    """Return one netlink attribute, padded."""
    data = struct.pack("=HH", 4 + len(value), kind) + value
    return data + bytes(-len(data) % 4)


def body(
    *attributes: bytes,
    family: int = socket.AF_INET,
    state: int = LISTEN,
    address: str = "127.0.0.1",
    port: int = 8080,
    cookie: int = 1,
) -> bytes:
    """Return struct inet_diag_msg and its attributes, field by field as the header has them."""
    source = socket.inet_pton(family, address).ljust(16, b"\0")
    identity = (
        struct.pack("!HH", port, 0) + source + bytes(16) + struct.pack("=III", 3, cookie & 0xFFFFFFFF, cookie >> 32)
    )
    return (
        struct.pack("=BBBB", family, state, 0, 0)
        + identity
        + struct.pack("=IIIII", 0, 5, 128, 1000, 4242)
        + b"".join(attributes)
    )


MEMORY = attribute(SKMEMINFO, struct.pack("=9I", *range(9)))
CGROUP = attribute(CGROUP_ID, struct.pack("=Q", 1 << 40 | 63))


def test_every_field_is_taken_from_its_place() -> None:
    """All of struct inet_diag_msg that is kept, SKMEMINFO's ninth number, and a 64-bit cgroup id and cookie."""
    (listener,) = parse_listeners([body(MEMORY, CGROUP, cookie=7 << 32 | 9)])
    assert listener == Listener(
        family=socket.AF_INET,
        address="127.0.0.1",
        port=8080,
        interface=3,
        queue_length=5,
        queue_limit=128,
        drops=8,
        cgroup_id=1 << 40 | 63,
        cookie=7 << 32 | 9,
        uid=1000,
        inode=4242,
    )


@pytest.mark.parametrize("address", ["::", "::1", "::ffff:127.0.0.1", "fe80::1", "2001:db8::5:0:0:1"])
def test_ipv6_addresses_are_written_as_ss_writes_them(address: str) -> None:
    """Shortened, and a mapped IPv4 address with dots."""
    (listener,) = parse_listeners([body(family=socket.AF_INET6, address=address)])
    assert (listener.family, listener.address) == (socket.AF_INET6, address)


def test_an_address_of_one_family_is_not_taken_for_the_other() -> None:
    """0.0.0.0 and :: are the same 16 bytes in the message."""
    both = [body(address="0.0.0.0", cookie=1), body(family=socket.AF_INET6, address="::", cookie=2)]  # noqa: S104
    assert [each.address for each in parse_listeners(both)] == ["0.0.0.0", "::"]  # noqa: S104


@pytest.mark.parametrize("words", [7, 8])
def test_an_old_kernel_does_not_tell_drops(words: int) -> None:
    """Before 4.7 SKMEMINFO ends before the drops, and before 3.6 one earlier: unknown, not 0."""
    (listener,) = parse_listeners([body(attribute(SKMEMINFO, bytes(4 * words)))])
    assert listener.drops is None


def test_a_later_kernel_may_tell_more() -> None:
    """A longer SKMEMINFO and attributes nobody knows are passed over."""
    (listener,) = parse_listeners([body(attribute(SKMEMINFO, struct.pack("=12I", *range(12))), attribute(500, b"new"))])
    assert listener.drops == 8


def test_without_attributes_only_what_they_tell_is_unknown() -> None:
    """A kernel before 5.8 sends no cgroup id."""
    (listener,) = parse_listeners([body()])
    assert (listener.drops, listener.cgroup_id, listener.queue_length) == (None, None, 5)


def test_a_socket_that_the_dump_doubles_is_given_once() -> None:
    """A dump that resumes in a bucket that changed repeats a socket; its drops must not count twice."""
    assert [each.cookie for each in parse_listeners([body(cookie=1), body(cookie=2), body(cookie=1)])] == [1, 2]


@pytest.mark.parametrize(
    "broken",
    [
        b"",
        body()[:71],
        body(state=1),
        struct.pack("=B", 1) + body()[1:],
        body(attribute(CGROUP_ID, b"1234")),
        body(b"\xff\0\1\0"),
    ],
)
def test_what_is_no_listener_is_malformed(broken: bytes) -> None:
    """Short, in another state, of another family, or with broken attributes: named by the number of its message."""
    with pytest.raises(ParseError, match="SOCK_DIAG, line 2"):
        parse_listeners([body(), broken])


@given(st.lists(st.binary(max_size=200)))
def test_no_bytes_break_the_decoder(messages: list[bytes]) -> None:
    """Arbitrary messages are decoded or they are a ParseError."""
    with contextlib.suppress(ParseError):
        parse_listeners(messages)


@given(st.integers(0, 200), st.binary(min_size=1, max_size=8), st.integers(0, 200))
def test_no_damage_breaks_the_decoder(place: int, damage: bytes, length: int) -> None:
    """So are good messages that were overwritten somewhere, or cut."""
    good = body(MEMORY, CGROUP)
    with contextlib.suppress(ParseError):
        parse_listeners([(good[:place] + damage + good[place + len(damage) :])[:length]])


class Kernel:
    """Answers a dump with a listener of each family, or with an errno."""

    def __init__(self, number: int = 0) -> None:
        """Refuse with errno `number`, unless it is 0."""
        self.number = number
        self.requests: list[bytes] = []
        self.closed = 0

    def __call__(self, subsystem: Subsystem) -> Kernel:
        """Open."""
        assert subsystem is Subsystem.SOCK_DIAG
        return self

    def bind(self, _: tuple[int, int], /) -> None:
        """Take port id 1."""

    def getsockname(self) -> tuple[int, int]:
        """Give port id 1."""
        return 1, 0

    def settimeout(self, _: float, /) -> None:
        """Nothing here waits."""

    def send(self, data: bytes, /) -> int:
        """Remember the request."""
        self.requests.append(data)
        return len(data)

    def recvmsg(self, _: int, /) -> tuple[bytes, list[tuple[int, int, bytes]], int, tuple[int, int]]:
        """Answer the last request."""
        (sequence,) = struct.unpack_from("=I", self.requests[-1], 8)
        if self.number:
            answer = struct.pack("=IHHIIi", 20, 2, 0, sequence, 1, -self.number)
        else:
            answer = b""
            for data in (body(), body(family=socket.AF_INET6, address="::1", cookie=2)):
                answer += struct.pack("=IHHII", 16 + len(data), 18, 2, sequence, 1) + data
            answer += struct.pack("=IHHIIi", 20, 3, 2, sequence, 1, 0)
        return answer, [], 0, (0, 0)

    def close(self) -> None:
        """Count."""
        self.closed += 1


def test_the_kernel_is_asked_once_and_for_listening_tcp_sockets_only() -> None:
    """A dump by TCPDIAG_GETSOCK, of both families; extension and states are in struct inet_diag_req, for the kernel."""
    kernel = Kernel()
    assert [each.family for each in read_listeners(opener=kernel)] == [socket.AF_INET, socket.AF_INET6]
    (request,) = kernel.requests
    assert struct.unpack_from("=IHH", request) == (16 + 60, 18, 0x301)
    assert request[16:] == struct.pack("=BBBB48xII", 0, 0, 0, 1 << (SKMEMINFO - 1), 1 << LISTEN, 0)
    assert kernel.closed == 1


@pytest.mark.parametrize(
    ("number", "reason"),
    [
        (errno.ENOENT, Reason.NOT_IN_KERNEL),
        (errno.EOPNOTSUPP, Reason.NOT_IN_KERNEL),
        (errno.EPERM, Reason.NO_PERMISSION),
        (errno.ENOMEM, Reason.NOT_READABLE),
    ],
)
def test_a_refusal_is_no_empty_list(number: int, reason: Reason) -> None:
    """None of the listeners must not pass for there being none."""
    with pytest.raises(Unavailable) as caught:
        read_listeners(opener=Kernel(number))
    assert caught.value.reason is reason


def kernel(path: Path) -> str:
    """Name the kernel and the reply that a recording is of."""
    return f"{path.parts[-3]}-{path.stem}"


def bodies(data: bytes) -> Iterator[bytes]:
    """Yield the sockets of a recorded reply, without its end."""
    return (message.body for message in split(data) if message.kind == 20)


@pytest.mark.skipif(not RECORDINGS, reason="no recorded sock_diag replies under tests/unit/fixtures")
@pytest.mark.parametrize("path", RECORDINGS, ids=kernel)
def test_recorded_kernels_are_decoded_as_pyroute2_decodes_them(path: Path) -> None:
    """Replies of each recorded kernel, field by field."""
    data = path.read_bytes()
    expected = [
        {
            "family": each["idiag_family"],
            "address": each["idiag_src"],
            "port": each["idiag_sport"],
            "interface": each["idiag_if"],
            "queue_length": each["idiag_rqueue"],
            "queue_limit": each["idiag_wqueue"],
            "drops": struct.unpack("=9I", bytes.fromhex(each.get_attr("INET_DIAG_SKMEMINFO").replace(":", "")))[8],
            "cgroup_id": each.get_attr("INET_DIAG_CGROUP_ID"),
            "cookie": each["idiag_cookie"],
            "uid": each["idiag_uid"],
            "inode": each["idiag_inode"],
        }
        for each in MarshalDiag().parse(data)
        if each["header"]["type"] == 20
    ]
    assert [dataclasses.asdict(each) for each in parse_listeners(bodies(data))] == expected


@pytest.mark.skipif(not RECORDINGS, reason="no recorded sock_diag replies under tests/unit/fixtures")
@pytest.mark.parametrize("path", [each for each in RECORDINGS if each.stem == "sock_diag_listen_inet"], ids=kernel)
def test_recorded_listeners_tell_drops_and_cgroup(path: Path) -> None:
    """Each recorded kernel has a listener that dropped, and the cgroup ids are inodes of its cgroup directories."""
    found = parse_listeners(bodies(path.read_bytes()))
    assert max(each.drops or 0 for each in found) > 0
    inodes = {int(line.split()[0]) for line in path.with_name("cgroup_ids").read_text().splitlines()}
    assert {each.cgroup_id for each in found} <= inodes


@pytest.fixture(scope="module")
def scene() -> dict[str, Any]:
    """Return what ours, pyroute2, ss and netstat say of real listeners in a network namespace of their own."""
    return run_scene("listeners")


def run_scene(name: str) -> dict[str, Any]:
    """Run one scene in a subprocess with a network namespace of its own."""
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)}
    command = ["unshare", "--net", sys.executable, str(SCENE), name]
    answer: dict[str, Any] = json.loads(
        subprocess.run(command, check=True, stdout=subprocess.PIPE, env=environment).stdout
    )
    return answer


@pytest.mark.root
def test_real_listeners_are_those_of_pyroute2(scene: dict[str, Any]) -> None:
    """Same sockets, same numbers, every field."""
    assert sorted(scene["ours"], key=str) == sorted(scene["pyroute2"], key=str)
    assert {each["inode"] for each in scene["ours"]} == {inode for _, _, inode in scene["made"].values()}


@pytest.mark.root
def test_real_listeners_are_those_of_ss(scene: dict[str, Any]) -> None:
    """Same queues and drops under the same inode; ss marks families and devices in its own way."""
    by_inode = {each["inode"]: each for each in scene["ours"]}
    assert len(scene["ss"]) == len(by_inode)
    for theirs in scene["ss"]:
        ours = by_inode[theirs["inode"]]
        assert theirs["address"].strip("[]").replace("%lo", "").replace("*", "::") == ours["address"]
        for name in ("port", "queue_length", "queue_limit", "drops"):
            assert theirs[name] == ours[name]


@pytest.mark.root
def test_real_listeners_are_as_they_were_made(scene: dict[str, Any]) -> None:
    """Address, backlog, device, user and cgroup of sockets whose making is known."""
    by_inode = {each["inode"]: each for each in scene["ours"]}
    made = {name: by_inode[inode] for name, (_, _, inode) in scene["made"].items()}
    for name, (address, port, _) in scene["made"].items():
        assert (made[name]["address"], made[name]["port"]) == (address, port)
    assert {name: each["queue_limit"] for name, each in made.items()} == {
        "any": 3,
        "dual": 7,
        "v6only": 9,
        "loopback6": 11,
        "mapped": 12,
        "beyond_somaxconn": scene["somaxconn"],
        "zero": 0,
        "full": 2,
        "fuller": 4,
        "reuse1": 5,
        "reuse2": 6,
        "bound": 8,
        "other_user": 1,
        "own_cgroup": 1,
    }
    assert made["bound"]["interface"] == scene["lo"]
    assert made["other_user"]["uid"] == 12345
    assert made["reuse1"]["port"] == made["reuse2"]["port"]
    if scene["cgroup_id"] is not None:
        assert made["own_cgroup"]["cgroup_id"] == scene["cgroup_id"]
        assert made["any"]["cgroup_id"] != scene["cgroup_id"]


@pytest.mark.root
def test_the_listener_that_drops_is_told_from_the_others(scene: dict[str, Any]) -> None:
    """Its own drops, one for one with the namespace's ListenOverflows, and a full queue is one above its limit."""
    by_inode = {each["inode"]: each for each in scene["ours"]}
    drops = {name: by_inode[inode]["drops"] for name, (_, _, inode) in scene["made"].items()}
    assert drops.pop("full") == 12 - 3
    assert drops.pop("fuller") == 25 - 5
    assert set(drops.values()) == {0}
    assert scene["netstat"]["ListenOverflows"] == scene["netstat"]["ListenDrops"] == 29
    assert by_inode[scene["made"]["full"][2]]["queue_length"] == 3


@pytest.mark.root
def test_thousands_of_listeners_come_complete() -> None:
    """Two thousand, over many datagrams, as ss has them."""
    scene = run_scene("many")
    assert sorted(scene["ours"]) == sorted(scene["ss"])
    assert len(scene["ours"]) == 2000
