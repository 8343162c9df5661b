"""ARP requests and answers: the packet's layout, what is no answer, and what a missing privilege or device says."""

from __future__ import annotations

import errno
import socket
import struct
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from shoal.kernel.arp import BROADCAST, open_arp, parse_answer, read_answers, request
from shoal.kernel.files import Reason, Unavailable

OWN, OTHER = bytes.fromhex("020000000001"), bytes.fromhex("020000000002")
HERE, THERE = socket.inet_aton("10.0.0.1"), socket.inet_aton("10.0.0.9")


def packet(operation: int = 2, mac: bytes = OTHER, address: bytes = THERE) -> bytes:
    """Return an ARP packet, padded as Ethernet pads it."""
    return struct.pack(">HHBBH", 1, 0x0800, 6, 4, operation) + mac + address + OWN + HERE + bytes(18)


class ScriptedLink:
    """A packet socket that remembers what was sent and gives what it was told."""

    def __init__(self, *packets: bytes, failure: OSError | None = None) -> None:
        """Take what will be heard, and how sending fails."""
        self.packets = iter(packets)
        self.failure = failure
        self.sent: list[tuple[bytes, tuple[Any, ...]]] = []

    def getsockname(self) -> tuple[str, int, int, int, bytes]:
        """Return the device with its MAC address."""
        return ("eth7", 0x0806, 0, 1, OWN)

    def sendto(self, data: bytes, address: tuple[Any, ...]) -> None:
        """Remember."""
        if self.failure:
            raise self.failure
        self.sent.append((data, address))

    def recv(self, _: int) -> bytes:
        """Give the next packet."""
        found = next(self.packets, None)
        if found is None:
            raise BlockingIOError
        return found


def test_the_request_is_that_of_rfc_826() -> None:
    """Hardware and protocol, sizes, operation 1, the sender's two addresses, an empty target MAC, the target's IP."""
    link: Any = ScriptedLink()
    request(link, HERE, THERE)
    request(link, HERE, THERE, OTHER)
    expected = bytes.fromhex("0001 0800 06 04 0001") + OWN + HERE + bytes(6) + THERE
    assert link.sent == [
        (expected, ("eth7", 0x0806, 0, 0, BROADCAST)),
        (expected, ("eth7", 0x0806, 0, 0, OTHER)),
    ]


def test_answers_are_replies_of_the_address_asked_for() -> None:
    """Each machine once; requests, other addresses, and what is no ARP are passed over; never more than asked for."""
    link: Any = ScriptedLink(
        packet(),
        packet(operation=1, mac=OWN),
        packet(address=HERE),
        b"\0" * 10,
        packet(),
        packet(mac=OWN),
        packet(mac=BROADCAST),
    )
    assert read_answers(link, THERE, 6) == {OTHER, OWN}
    assert read_answers(link, THERE, 6) == {BROADCAST}
    assert read_answers(link, THERE, 6) == set()


@pytest.mark.parametrize(("place", "length"), [(4, 8), (5, 16), (4, 0), (5, 0)])
def test_addresses_of_other_lengths_are_no_answer(place: int, length: int) -> None:
    """What stands where the sender's MAC and IP address would stand is then something else."""
    odd = bytearray(packet())
    odd[place] = length
    assert parse_answer(bytes(odd)) is None


@given(st.binary(max_size=80))
def test_no_bytes_break_the_decoder(data: bytes) -> None:
    """Whatever is on the wire, it is an answer or it is nothing."""
    for each in (data, packet()[:8] + data):
        answer = parse_answer(each)
        assert answer is None or [len(part) for part in answer] == [4, 6]


def test_what_cannot_be_sent_says_why() -> None:
    """A device that went down meanwhile costs this request."""
    link: Any = ScriptedLink(failure=OSError(errno.ENETDOWN, "Network is down"))
    with pytest.raises(Unavailable, match="eth7: Network is down"):
        request(link, HERE, THERE)


def test_without_the_capability_it_is_no_permission(monkeypatch: pytest.MonkeyPatch) -> None:
    """socket(2) answers EPERM without CAP_NET_RAW."""

    def refuse(*_: object) -> socket.socket:
        raise PermissionError(errno.EPERM, "Operation not permitted")

    monkeypatch.setattr(socket, "socket", refuse)
    with pytest.raises(Unavailable) as caught:
        open_arp("eth0")
    assert caught.value.reason is Reason.NO_PERMISSION


@pytest.mark.root
@pytest.mark.parametrize(("device", "reason"), [("nosuch0", Reason.NOT_READABLE), ("lo", Reason.NOT_IN_KERNEL)])
def test_a_device_without_arp(device: str, reason: Reason) -> None:
    """One that is gone, and one that is no Ethernet."""
    with pytest.raises(Unavailable, match=device) as caught:
        open_arp(device)
    assert caught.value.reason is reason
