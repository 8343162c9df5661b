"""Netlink framing, dump loop and errors, against scripted sockets and against the kernel."""

from __future__ import annotations

import contextlib
import errno
import itertools
import socket
import struct
import time
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import pytest
from hypothesis import given
from hypothesis import strategies as st

from shoal.kernel.files import ParseError, Reason, Unavailable, Vanished
from shoal.kernel.netlink.core import (
    NLM_F_DUMP,
    NLM_F_DUMP_INTR,
    NLM_F_REQUEST,
    NetlinkSocket,
    Subsystem,
    attributes,
    open_socket,
    split,
)

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator

KIND = 20
PORT = 77
NLMSG_ERROR = 2
NLMSG_DONE = 3
NLM_F_MULTI = 2


def message(kind: int, body: bytes = b"", *, flags: int = NLM_F_MULTI, sequence: int = 1, port: int = PORT) -> bytes:
    """Return one netlink message, padded to 4 bytes as the kernel pads it."""
    data = struct.pack("=IHHII", 16 + len(body), kind, flags, sequence, port) + body
    return data + bytes(-len(data) % 4)


def done(number: int = 0, *, flags: int = NLM_F_MULTI, sequence: int = 1) -> bytes:
    """Return the end of a dump, with the errno (positive, as errno.h has it) that it ended with."""
    return message(NLMSG_DONE, struct.pack("=i", -number), flags=flags, sequence=sequence)


def error(number: int, *, sequence: int = 1) -> bytes:
    """Return a refusal: NLMSG_ERROR with the errno, and the header of the request that it answers."""
    return message(NLMSG_ERROR, struct.pack("=i", -number) + bytes(16), flags=0, sequence=sequence)


def attribute(kind: int, value: bytes) -> bytes:
    """Return one attribute, padded."""
    data = struct.pack("=HH", 4 + len(value), kind) + value
    return data + bytes(-len(data) % 4)


@dataclass(frozen=True)
class Datagram:
    """What the script gives where the bytes alone do not say enough."""

    data: bytes
    flags: int = 0
    sender: int = 0


@dataclass
class ScriptedSocket:
    """Gives the script's datagrams, raises its exceptions, and times out when it is used up."""

    script: Iterator[bytes | Datagram | OSError]
    sent: list[bytes] = field(default_factory=list)
    received: int = 0
    closed: bool = False
    bind_error: OSError | None = None

    def bind(self, address: tuple[int, int], /) -> None:
        """Check that the kernel is let choose the port id."""
        assert address == (0, 0)
        if self.bind_error:
            raise self.bind_error

    def getsockname(self) -> tuple[int, int]:
        """Return the port id that the answers of the script carry."""
        return PORT, 0

    def settimeout(self, value: float, /) -> None:
        """Check that waiting is bounded."""
        assert 0 < value < 10

    def send(self, data: bytes, /) -> int:
        """Remember the request."""
        assert not self.closed
        self.sent.append(data)
        return len(data)

    def recvmsg(self, size: int, /) -> tuple[bytes, list[tuple[int, int, bytes]], int, tuple[int, int]]:
        """Give the next thing of the script."""
        assert not self.closed
        assert size >= 32 * 1024
        self.received += 1
        item = next(self.script, TimeoutError())
        if isinstance(item, OSError):
            raise item
        if isinstance(item, bytes):
            item = Datagram(item)
        return item.data, [], item.flags, (item.sender, 0)

    def close(self) -> None:
        """Remember that it was closed."""
        self.closed = True


class ScriptedKernel:
    """An opener that hands out one scripted socket after the other."""

    def __init__(self, *scripts: Iterable[bytes | Datagram | OSError]) -> None:
        """Take one script for each socket that may be opened."""
        self.scripts = iter(scripts)
        self.sockets: list[ScriptedSocket] = []

    def __call__(self, _: Subsystem) -> ScriptedSocket:
        """Open the next socket; an AssertionError when there should not have been one more."""
        script = next(self.scripts, None)
        assert script is not None, "a socket too many was opened"
        self.sockets.append(ScriptedSocket(iter(script)))
        return self.sockets[-1]


INTERRUPTED = NLM_F_MULTI | NLM_F_DUMP_INTR


def total(bodies: Iterable[bytes]) -> int:
    """Sum the bodies as numbers: a reducer in which anything counted twice shows."""
    return sum(int.from_bytes(body, "big") for body in bodies)


def numbered(*numbers: int, flags: int = NLM_F_MULTI, sequence: int = 1) -> bytes:
    """Return one datagram with a message for each number."""
    return b"".join(message(KIND, number.to_bytes(4, "big"), flags=flags, sequence=sequence) for number in numbers)


def dump(kernel: ScriptedKernel, *, timeout: float = 1.0) -> int:
    """Return the sum of one dump."""
    with NetlinkSocket(Subsystem.SOCK_DIAG, opener=kernel, timeout=timeout) as netlink:
        return netlink.dump(KIND, b"", total)


def test_a_request_carries_its_length_type_flags_sequence_and_port() -> None:
    """The header is struct nlmsghdr, and each request has a sequence number of its own."""
    kernel = ScriptedKernel([message(KIND, b"answer!!"), numbered(7, sequence=2), done(sequence=2)])
    with NetlinkSocket(Subsystem.SOCK_DIAG, opener=kernel) as netlink:
        assert netlink.request(KIND, b"payload!") == b"answer!!"
        assert netlink.dump(KIND, b"pay", total, flags=0x400) == 7
    first, second = kernel.sockets[0].sent
    assert first == struct.pack("=IHHII", 24, KIND, NLM_F_REQUEST, 1, PORT) + b"payload!"
    assert second == struct.pack("=IHHII", 19, KIND, NLM_F_REQUEST | NLM_F_DUMP | 0x400, 2, PORT) + b"pay"


def test_a_dump_is_received_as_it_is_consumed() -> None:
    """One datagram is held at most: the second is asked for when the first is used up."""
    kernel = ScriptedKernel([numbered(1, 2), numbered(3), done()])
    received: list[int] = []

    def reduce(bodies: Iterator[bytes]) -> list[bytes]:
        received.extend(kernel.sockets[0].received for _ in bodies)
        return []

    with NetlinkSocket(Subsystem.SOCK_DIAG, opener=kernel) as netlink:
        netlink.dump(KIND, b"", reduce)
    assert received == [1, 1, 2]
    assert kernel.sockets[0].received == 3


def test_the_end_of_a_dump_may_share_a_datagram_with_its_last_messages() -> None:
    """NLMSG_DONE is found wherever it stands, and nothing is received after it."""
    assert dump(ScriptedKernel([numbered(1, 2) + done()])) == 3


def test_an_interrupted_dump_is_begun_again_and_counts_nothing_twice() -> None:
    """NLM_F_DUMP_INTR halfway: what was summed before is thrown away, and a fresh socket is asked once more."""
    kernel = ScriptedKernel(
        [numbered(1, 2), numbered(4, flags=INTERRUPTED), done()],
        [numbered(1, 2, 4, sequence=2), done(sequence=2)],
    )
    assert dump(kernel) == 7
    assert [each.closed for each in kernel.sockets] == [True, True]


def test_an_interruption_told_only_at_the_end_counts_too() -> None:
    """The kernel puts the flag on NLMSG_DONE as well, and there it may stand alone."""
    kernel = ScriptedKernel(
        [numbered(1, 2), done(flags=INTERRUPTED)],
        [numbered(8, sequence=2), done(sequence=2)],
    )
    assert dump(kernel) == 8


@pytest.mark.parametrize("lost", [OSError(errno.ENOBUFS, "no buffer space"), error(errno.ENOBUFS)])
def test_a_dump_with_lost_messages_is_begun_again(lost: bytes | OSError) -> None:
    """ENOBUFS, from recvmsg or in a message, loses messages: the sum is that of the next dump alone."""
    kernel = ScriptedKernel([numbered(1, 2), lost], [numbered(1, 2, 4, sequence=2), done(sequence=2)])
    assert dump(kernel) == 7


@pytest.mark.parametrize("how", ["lost", "interrupted"])
def test_dumps_that_are_spoilt_again_and_again_end(how: str) -> None:
    """Four times are enough, and a table that never rests is not given; the fifth socket is never opened."""
    lost: list[bytes | OSError] = [OSError(errno.ENOBUFS, "no buffer space")]
    interrupted = ([numbered(1, 2, flags=INTERRUPTED, sequence=number)] for number in range(1, 5))
    kernel = ScriptedKernel(*([lost] * 4 if how == "lost" else interrupted))
    with pytest.raises(Unavailable, match="SOCK_DIAG") as caught:
        dump(kernel)
    assert caught.value.reason is Reason.NOT_READABLE
    assert len(kernel.sockets) == 4


REASONS = [
    (errno.EPERM, Reason.NO_PERMISSION),
    (errno.EACCES, Reason.NO_PERMISSION),
    (errno.ENOENT, Reason.NOT_IN_KERNEL),
    (errno.EOPNOTSUPP, Reason.NOT_IN_KERNEL),
    (errno.EPROTONOSUPPORT, Reason.NOT_IN_KERNEL),
    (errno.EAFNOSUPPORT, Reason.NOT_IN_KERNEL),
    (errno.EINVAL, Reason.NOT_IN_KERNEL),
    (errno.EBUSY, Reason.NOT_READABLE),
    (errno.EMFILE, Reason.NOT_READABLE),
    (-5, Reason.NOT_READABLE),
    (2**31, Reason.NOT_READABLE),
]


@pytest.mark.parametrize(("number", "reason"), REASONS)
def test_what_the_kernel_refuses_becomes_a_reason(number: int, reason: Reason) -> None:
    """NLMSG_ERROR to a request, to a dump, and the errno of NLMSG_DONE all say the same."""
    for answer in (error(number), done(number)):
        with pytest.raises(Unavailable) as caught:
            dump(ScriptedKernel([numbered(1), answer]))
        assert caught.value.reason is reason
    with (
        pytest.raises(Unavailable) as caught,
        NetlinkSocket(Subsystem.NETFILTER, opener=ScriptedKernel([error(number)])) as netlink,
    ):
        netlink.request(KIND, b"")
    assert caught.value.reason is reason
    assert "NETFILTER" in str(caught.value)


@pytest.mark.parametrize(("number", "reason"), [each for each in REASONS if each[0] > 0])
def test_failing_to_open_or_send_becomes_a_reason(number: int, reason: Reason) -> None:
    """socket(2), bind(2) and send(2) fail with the same errnos, and no socket stays open."""

    def refuse(_: Subsystem) -> ScriptedSocket:
        raise OSError(number, "refused")

    with pytest.raises(Unavailable) as caught:
        NetlinkSocket(Subsystem.SOCK_DIAG, opener=refuse)
    assert caught.value.reason is reason

    unbound = ScriptedSocket(iter(()), bind_error=OSError(number, "refused"))
    with pytest.raises(Unavailable) as caught:
        NetlinkSocket(Subsystem.SOCK_DIAG, opener=lambda _: unbound)
    assert caught.value.reason is reason
    assert unbound.closed


def test_an_acknowledgement_is_not_an_answer() -> None:
    """NLMSG_ERROR with errno 0 is passed over."""
    with NetlinkSocket(Subsystem.SOCK_DIAG, opener=ScriptedKernel([error(0), message(KIND, b"1234")])) as netlink:
        assert netlink.request(KIND, b"") == b"1234"
    assert dump(ScriptedKernel([error(0) + numbered(1), done()])) == 1


def test_what_is_not_for_us_is_passed_over() -> None:
    """Another sequence number, another port id, another sender than the kernel: none of it is counted."""
    kernel = ScriptedKernel(
        [
            numbered(16, sequence=9) + done(sequence=9),
            message(KIND, b"\0\0\0\x20", port=PORT + 1),
            Datagram(numbered(64) + done(), sender=4711),
            numbered(1, sequence=9) + numbered(2),
            done(),
        ]
    )
    assert dump(kernel) == 2


@pytest.mark.parametrize("foreign", [Datagram(numbered(1), sender=4711), numbered(1, sequence=9)])
def test_a_stream_of_messages_for_others_does_not_hang(foreign: bytes | Datagram) -> None:
    """The deadline counts from the last message of our own, so others cannot keep the scrape waiting."""
    began = time.monotonic()
    with pytest.raises(Unavailable, match="did not answer") as caught:
        dump(ScriptedKernel(itertools.repeat(foreign)), timeout=0.05)
    assert caught.value.reason is Reason.NOT_READABLE
    assert time.monotonic() - began < 2


def test_silence_ends_in_a_timeout() -> None:
    """Neither a request nor a dump that stops halfway waits for ever."""
    with pytest.raises(Unavailable, match="did not answer"):
        dump(ScriptedKernel([numbered(1)]))
    with (
        pytest.raises(Unavailable, match="did not answer"),
        NetlinkSocket(Subsystem.SOCK_DIAG, opener=ScriptedKernel([])) as netlink,
    ):
        netlink.request(KIND, b"")


def test_a_real_socket_times_out() -> None:
    """The timeout reaches the kernel's socket: a dump that is asked for no answer gets none."""
    began = time.monotonic()
    with NetlinkSocket(Subsystem.SOCK_DIAG, timeout=0.05) as netlink, pytest.raises(Unavailable, match="within"):
        netlink.request(1, b"")  # NLMSG_NOOP: not answered by any kernel
    assert time.monotonic() - began < 2


def test_a_truncated_datagram_is_refused() -> None:
    """MSG_TRUNC means that messages are missing: better no number than a wrong one."""
    with pytest.raises(Unavailable, match="at once") as caught:
        dump(ScriptedKernel([Datagram(numbered(1, 2) + done(), flags=socket.MSG_TRUNC)]))
    assert caught.value.reason is Reason.NOT_READABLE


def test_the_socket_is_closed_whatever_happens() -> None:
    """An open socket pins its network namespace."""
    kernel = ScriptedKernel([numbered(1), done()])
    dump(kernel)
    assert kernel.sockets[0].closed
    kernel = ScriptedKernel([error(errno.EPERM)])
    with pytest.raises(Unavailable):
        dump(kernel)
    assert kernel.sockets[0].closed


def test_one_socket_serves_dumps_that_end_well() -> None:
    """Opening a socket in another namespace costs two setns, so it is not done without need."""
    kernel = ScriptedKernel([numbered(1), done(), numbered(2, sequence=2), done(sequence=2)])
    with NetlinkSocket(Subsystem.SOCK_DIAG, opener=kernel) as netlink:
        assert netlink.dump(KIND, b"", total) == 1
        assert netlink.dump(KIND, b"", total) == 2


def test_a_dump_left_in_the_middle_does_not_spoil_the_next() -> None:
    """The kernel runs one dump per socket, so what was left unread goes with the socket."""
    kernel = ScriptedKernel([numbered(1, 2)], [numbered(1, 2, sequence=2)], [numbered(4, sequence=3), done(sequence=3)])

    def fail(bodies: Iterator[bytes]) -> int:
        file = "a table"
        raise ParseError(file, 1, str(next(bodies)))

    with NetlinkSocket(Subsystem.SOCK_DIAG, opener=kernel) as netlink:
        assert netlink.dump(KIND, b"", next) == b"\0\0\0\1"
        with pytest.raises(ParseError):
            netlink.dump(KIND, b"", fail)
        assert netlink.dump(KIND, b"", total) == 4


@pytest.mark.parametrize("broken", [message(NLMSG_ERROR, b"\xff"), b"\x10", message(KIND)[:12], bytes(16)])
def test_what_is_no_netlink_is_malformed(broken: bytes) -> None:
    """A short errno, a short header, a length of nothing: a sentence, not a number."""
    with pytest.raises(ParseError, match="netlink SOCK_DIAG"):
        dump(ScriptedKernel([broken + bytes(-len(broken) % 4)]))


def test_messages_are_split_at_their_padding() -> None:
    """Concatenated datagrams come apart; the last message may go without its padding."""
    data = message(KIND, b"12345", flags=1, sequence=2, port=3) + message(KIND + 1, b"1").rstrip(b"\0")
    first, second = split(data)
    assert (first.kind, first.flags, first.sequence, first.port, first.body) == (KIND, 1, 2, 3, b"12345")
    assert (second.kind, second.body) == (KIND + 1, b"1")
    assert list(split(b"")) == []


def test_a_message_longer_than_its_datagram_is_named() -> None:
    """The place is the file and the number of the message."""
    with pytest.raises(ParseError) as caught:
        list(split(message(KIND) + struct.pack("=IHHII", 20, KIND, 0, 1, 1), "some table"))
    assert (caught.value.file, caught.value.line) == ("some table", 2)


def test_attributes_keep_unknown_types_and_lose_their_flags() -> None:
    """NLA_F_NESTED and NLA_F_NET_BYTEORDER are no part of the type; the last of two stands, as in the kernel."""
    body = b"head" + attribute(1, b"a") + attribute(0x8000 | 2, b"bcdef") + attribute(999, b"") + attribute(1, b"z")
    assert attributes(body, 4, "some table", 1) == {1: b"z", 2: b"bcdef", 999: b""}
    assert attributes(b"head", 4, "some table", 1) == {}


@pytest.mark.parametrize("broken", [b"\0", b"\0\0\0\0", b"\3\0\1\0", b"\x08\0\1\0", attribute(1, b"1234") + b"\0\0"])
def test_broken_attributes_are_malformed(broken: bytes) -> None:
    """Neither a length of 0, which would never end, nor one beyond the message is believed."""
    with pytest.raises(ParseError) as caught:
        attributes(broken, 0, "some table", 7)
    assert (caught.value.file, caught.value.line) == ("some table", 7)


@given(st.binary(max_size=200))
def test_no_bytes_break_the_walks(data: bytes) -> None:
    """Whatever comes, it is understood or it is a ParseError, and it ends."""
    for walk in (lambda: list(split(data)), lambda: attributes(data, 0, "", 1)):
        with contextlib.suppress(ParseError):
            walk()


@given(
    st.lists(
        st.one_of(
            st.binary(max_size=80),
            st.builds(
                message,
                st.integers(0, 40),
                st.binary(max_size=40),
                flags=st.integers(0, 65535),
                sequence=st.integers(1, 3),
            ),
            st.builds(OSError, st.integers(1, 140), st.just("")),
        ),
        max_size=6,
    )
)
def test_no_answer_breaks_the_dump_loop(script: list[bytes | OSError]) -> None:
    """Whatever a kernel answers: a result or one of the errors of kernel.files, and a bounded number of sockets."""
    scripts = [script] * 6
    with (
        contextlib.suppress(ParseError, Unavailable, Vanished),
        NetlinkSocket(Subsystem.SOCK_DIAG, opener=ScriptedKernel(*scripts)) as netlink,
    ):
        netlink.dump(KIND, b"", total)
    with (
        contextlib.suppress(ParseError, Unavailable, Vanished),
        NetlinkSocket(Subsystem.SOCK_DIAG, opener=ScriptedKernel(*scripts)) as netlink,
    ):
        netlink.request(KIND, b"")


def test_the_kernel_names_what_it_has_not_got() -> None:
    """The errnos of a real kernel: ENOENT for a family without sock_diag, EPROTONOSUPPORT for a protocol."""
    with NetlinkSocket(Subsystem.SOCK_DIAG) as netlink, pytest.raises(Unavailable) as caught:
        netlink.dump(20, struct.pack("=BB54x", socket.AF_SNA, 0), list)
    assert caught.value.reason is Reason.NOT_IN_KERNEL
    with pytest.raises(Unavailable) as caught:
        NetlinkSocket(Subsystem.SOCK_DIAG, opener=lambda _: socket.socket(socket.AF_NETLINK, socket.SOCK_RAW, 31))
    assert caught.value.reason is Reason.NOT_IN_KERNEL


@pytest.mark.root
def test_netfilter_answers_einval_for_a_module_that_is_not_there() -> None:
    """A subsystem of nfnetlink that no kernel has stands for nf_conntrack_netlink not being loaded."""
    with NetlinkSocket(Subsystem.NETFILTER) as netlink, pytest.raises(Unavailable) as caught:
        netlink.request(99 << 8, bytes(4))
    assert caught.value.reason is Reason.NOT_IN_KERNEL


def test_the_kernel_answers_a_dump() -> None:
    """Without any privilege: the listeners of this namespace, every message a struct inet_diag_msg at least."""
    request = struct.pack("=BBBxI48x", socket.AF_INET, socket.IPPROTO_TCP, 0, 1 << 10)
    with socket.create_server(("127.0.0.1", 0)), NetlinkSocket(Subsystem.SOCK_DIAG, opener=open_socket) as netlink:
        bodies = netlink.dump(20, request, list)
        assert bodies
        assert all(len(body) >= 72 for body in bodies)
        assert netlink.dump(20, request, next)
        assert len(netlink.dump(20, request, list)) >= 1
