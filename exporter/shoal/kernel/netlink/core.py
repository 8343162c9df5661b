"""Netlink by hand: an AF_NETLINK socket, `struct`, and every check that stands between a dump and wrong numbers.

Written by hand because decoding sockets is what this exporter does most of: a generic decoder makes an object of
every attribute of every socket, `struct` makes none. Layouts are those of include/uapi/linux/netlink.h, unchanged
since 2.6 but for the flags named below. Headers are in the machine's own byte order.
"""

from __future__ import annotations

import errno
import os
import socket
import struct
import time
from collections.abc import Callable, Iterator
from enum import IntEnum
from typing import Final, NamedTuple, Protocol, Self, TypeVar

from shoal.kernel.files import ParseError, Reason, Unavailable, Vanished

__all__ = [
    "NLM_F_DUMP",
    "NLM_F_DUMP_INTR",
    "NLM_F_REQUEST",
    "Message",
    "NetlinkSocket",
    "RawSocket",
    "SocketOpener",
    "Subsystem",
    "attributes",
    "open_socket",
    "split",
]

T = TypeVar("T")

# struct nlmsghdr: nlmsg_len, nlmsg_type, nlmsg_flags, nlmsg_seq, nlmsg_pid
_HEADER: Final = struct.Struct("=IHHII")
_HEADER_BYTES: Final = 16
# struct nlattr: nla_len, nla_type
_ATTRIBUTE: Final = struct.Struct("=HH")
_ATTRIBUTE_BYTES: Final = 4
_ERRNO: Final = struct.Struct("=i")

NLM_F_REQUEST: Final = 0x001
NLM_F_DUMP_INTR: Final = 0x010
"""The table changed while it was being dumped: entries may be missing or doubled. Since 3.1; told of links, addresses
and nftables, and not of neighbours, routes, rules, sockets and connections (seen on 6.18)."""
NLM_F_DUMP: Final = 0x300
"""NLM_F_ROOT | NLM_F_MATCH."""

_NLMSG_ERROR: Final = 2
_NLMSG_DONE: Final = 3
_NLMSG_MIN_TYPE: Final = 0x10
# Without NLA_F_NESTED (0x8000) and NLA_F_NET_BYTEORDER (0x4000).
_NLA_TYPE_MASK: Final = 0x3FFF

# The kernel fills datagrams of a dump up to what the reader offered, and to 32 KiB at most.
_DATAGRAM_BYTES: Final = 64 * 1024
_TIMEOUT_SECONDS: Final = 3.0
_MOST_ATTEMPTS: Final = 4
# MAX_ERRNO of include/linux/err.h
_MAX_ERRNO: Final = 4095

_NOT_IN_KERNEL: Final = frozenset(
    {errno.ENOENT, errno.EOPNOTSUPP, errno.EPROTONOSUPPORT, errno.EAFNOSUPPORT, errno.EINVAL}
)
_NO_PERMISSION: Final = frozenset({errno.EPERM, errno.EACCES})


class Subsystem(IntEnum):
    """The netlink protocols in use: who answers at the kernel's end (include/uapi/linux/netlink.h)."""

    ROUTE = 0
    """NETLINK_ROUTE: links, addresses, routes, rules, neighbours. Reading needs no privilege."""
    SOCK_DIAG = 4
    """NETLINK_SOCK_DIAG, called NETLINK_INET_DIAG before 3.3: sockets. Needs no privilege."""
    NETFILTER = 12
    """NETLINK_NETFILTER: conntrack and nftables. Every request needs CAP_NET_ADMIN in the namespace's owner."""
    GENERIC = 16
    """NETLINK_GENERIC: families that are found by name, such as TASKSTATS. Who may ask depends on the family."""


class Message(NamedTuple):
    """One netlink message: header fields, and what follows the header."""

    kind: int
    flags: int
    sequence: int
    port: int
    body: bytes


class RawSocket(Protocol):
    """What is used of `socket.socket`; tests put a scripted one in its place."""

    def bind(self, address: tuple[int, int], /) -> None:
        """Take a port id (0: the kernel chooses)."""

    def getsockname(self) -> tuple[int, int]:
        """Return the port id and the multicast groups."""

    def settimeout(self, value: float, /) -> None:
        """Bound every wait, in seconds."""

    def send(self, data: bytes, /) -> int:
        """Send to the kernel."""

    def recvmsg(self, size: int, /) -> tuple[bytes, list[tuple[int, int, bytes]], int, tuple[int, int]]:
        """Return one datagram, ancillary data, MSG_ flags, and the sender's port id and groups."""

    def close(self) -> None:
        """Let go of the socket, and with it of its network namespace."""


SocketOpener = Callable[[Subsystem], RawSocket]
"""Opens an unbound socket; another one than `open_socket` opens it inside another network namespace."""


class _SpoiltError(Unavailable):
    """The dump has to be begun again: its table changed (NLM_F_DUMP_INTR), or messages were lost (ENOBUFS)."""


def open_socket(subsystem: Subsystem) -> socket.socket:
    """Open a netlink socket in the network namespace of the calling thread."""
    return socket.socket(socket.AF_NETLINK, socket.SOCK_RAW, subsystem)


def split(datagram: bytes, file: str = "netlink") -> Iterator[Message]:
    """Yield the messages of one datagram (or of several, concatenated). `file` is named in a `ParseError`.

    Lengths are rounded up to 4 bytes between messages; the last one may go without its padding.
    """
    for kind, flags, sequence, port, start, stop in _headers(datagram, file):
        yield Message(kind, flags, sequence, port, datagram[start:stop])


def _headers(datagram: bytes, file: str) -> Iterator[tuple[int, int, int, int, int, int]]:
    """Yield kind, flags, sequence number and port of each message, and where its body begins and ends."""
    unpack = _HEADER.unpack_from
    end = len(datagram)
    offset = 0
    number = 0
    while offset < end:
        number += 1
        left = end - offset
        if left < _HEADER_BYTES:
            raise ParseError(file, number, f"a header of {_HEADER_BYTES} bytes, found {left}")
        length, kind, flags, sequence, port = unpack(datagram, offset)
        if not _HEADER_BYTES <= length <= left:
            raise ParseError(file, number, f"a length from {_HEADER_BYTES} to {left} bytes, found {length}")
        yield kind, flags, sequence, port, offset + _HEADER_BYTES, offset + length
        offset += (length + 3) & ~3


def attributes(body: bytes, offset: int, file: str, number: int) -> dict[int, bytes]:
    """Return {type: value} of the attributes that begin `offset` bytes into a message.

    Types that the caller does not know stay in the dictionary unread; of a repeated type the last one is kept, as
    the kernel's own parser does. `file` and `number` (of the message, from 1) are named in a `ParseError`.
    """
    unpack = _ATTRIBUTE.unpack_from
    found: dict[int, bytes] = {}
    end = len(body)
    while offset < end:
        left = end - offset
        if left < _ATTRIBUTE_BYTES:
            raise ParseError(file, number, f"an attribute's header of {_ATTRIBUTE_BYTES} bytes, found {left}")
        length, kind = unpack(body, offset)
        if not _ATTRIBUTE_BYTES <= length <= left:
            raise ParseError(file, number, f"an attribute of {_ATTRIBUTE_BYTES} to {left} bytes, found {length}")
        found[kind & _NLA_TYPE_MASK] = body[offset + _ATTRIBUTE_BYTES : offset + length]
        offset += (length + 3) & ~3
    return found


class NetlinkSocket:
    """One netlink socket for the length of one `with`, which is within one scrape.

    A socket that is open pins its network namespace, so it never outlives the scrape. Nothing here waits for longer
    than a few seconds for the next datagram, and no more than one datagram is held.
    """

    __slots__ = (
        "_idle",
        "_name",
        "_open",
        "_port",
        "_sequence",
        "_socket",
        "_subsystem",
        "_timeout",
    )

    def __init__(
        self, subsystem: Subsystem, *, opener: SocketOpener = open_socket, timeout: float = _TIMEOUT_SECONDS
    ) -> None:
        """Open and bind at once. `opener` is asked again when a dump has to be begun again; `timeout` is in seconds.

        Raises `Unavailable` when the kernel has no such netlink protocol or does not let it be used.
        """
        self._subsystem = subsystem
        self._name = f"netlink {subsystem.name}"
        self._open = opener
        self._timeout = timeout
        self._sequence = 0
        self._connect()

    def __enter__(self) -> Self:
        """Return itself; the socket is already open."""
        return self

    def __exit__(self, *_: object) -> None:
        """Close the socket."""
        self._socket.close()

    def request(self, message_type: int, payload: bytes, flags: int = 0) -> bytes:
        """Ask for one thing and return the body of the one message that answers.

        Raises `Unavailable` with what the kernel said, or after the timeout; `Vanished` when it said that there is no
        such process; `ParseError` when the answer is no netlink message.
        """
        self._send(message_type, payload, NLM_F_REQUEST | flags)
        while True:
            for message in self._receive():
                if message.kind >= _NLMSG_MIN_TYPE:
                    self._idle = True
                    return message.body
                self._check(message)

    def dump(self, message_type: int, payload: bytes, reduce: Callable[[Iterator[bytes]], T], flags: int = 0) -> T:
        """Ask for a whole table and return what `reduce` makes of the bodies of its messages.

        `reduce` is handed an iterator that receives as it is consumed, so a table of any size costs one datagram.
        It is a function, and not a loop in the caller, because a dump may have to be begun again halfway, when the
        kernel says that the table changed (NLM_F_DUMP_INTR) or that messages were lost (ENOBUFS). Then the iterator
        raises through `reduce`, what that call had gathered is thrown away with it, and `reduce` is called anew on a
        new dump: nothing can be counted twice, and no caller has to think of it. So `reduce` must keep its state in
        its own call and return a finished result, not a generator. It may stop early.

        Raises what `request` raises, and `Unavailable` after the fourth dump that was spoilt: a table that never rests
        is not given with entries that may be missing or doubled.
        """
        attempts = 0
        while True:
            try:
                return reduce(self._stream(message_type, payload, flags))
            except _SpoiltError:
                attempts += 1
                if attempts == _MOST_ATTEMPTS:
                    raise

    def _stream(self, message_type: int, payload: bytes, flags: int) -> Iterator[bytes]:
        self._send(message_type, payload, NLM_F_REQUEST | NLM_F_DUMP | flags)
        name, own = self._name, (self._sequence, self._port)
        deadline = time.monotonic() + self._timeout
        while True:
            datagram = self._datagram(deadline)
            ours = False
            # No `Message` is made of what there may be hundreds of thousands of.
            for kind, marks, sequence, port, start, stop in _headers(datagram, name):
                if (sequence, port) != own:
                    continue
                ours = True
                if marks & NLM_F_DUMP_INTR:
                    raise _SpoiltError(Reason.NOT_READABLE, f"{name}: the table keeps changing while it is read")
                if kind >= _NLMSG_MIN_TYPE:
                    yield datagram[start:stop]
                    continue
                self._check(Message(kind, marks, sequence, port, datagram[start:stop]))
                if kind == _NLMSG_DONE:
                    self._idle = True
                    return
            if ours:
                deadline = time.monotonic() + self._timeout

    def _connect(self) -> None:
        try:
            self._socket = self._open(self._subsystem)
            try:
                self._socket.settimeout(self._timeout)
                self._socket.bind((0, 0))
                self._port = self._socket.getsockname()[0]
            except OSError:
                self._socket.close()
                raise
        except OSError as error:
            raise self._failure(error.errno) from None
        self._idle = True

    def _send(self, message_type: int, payload: bytes, flags: int) -> None:
        # The kernel runs one dump per socket (EBUSY for a second), so one that was left in the middle, by an error
        # or by a reader that had enough, leaves a socket that only a new one can replace.
        if not self._idle:
            self._socket.close()
            self._connect()
        self._idle = False
        self._sequence += 1
        header = _HEADER.pack(_HEADER_BYTES + len(payload), message_type, flags, self._sequence, self._port)
        try:
            self._socket.send(header + payload)
        except OSError as error:
            raise self._failure(error.errno) from None

    def _receive(self) -> list[Message]:
        """Return the messages of the next datagram that has any for us.

        What others send (port id not 0, another sequence number, another addressee) is passed over, for no longer
        than the timeout: the deadline holds even under a stream of such messages.
        """
        sequence, port = self._sequence, self._port
        deadline = time.monotonic() + self._timeout
        while True:
            own = [
                message
                for message in split(self._datagram(deadline), self._name)
                if message.sequence == sequence and message.port == port
            ]
            if own:
                return own

    def _datagram(self, deadline: float) -> bytes:
        """Return the next datagram of the kernel's that comes before the deadline (time.monotonic())."""
        while time.monotonic() < deadline:
            try:
                datagram, _, flags, sender = self._socket.recvmsg(_DATAGRAM_BYTES)
            except TimeoutError:
                break
            except OSError as error:
                raise self._failure(error.errno) from None
            if sender[0] != 0:
                continue
            if flags & socket.MSG_TRUNC:
                raise Unavailable(Reason.NOT_READABLE, f"{self._name} sent more than {_DATAGRAM_BYTES} bytes at once")
            return datagram
        raise Unavailable(Reason.NOT_READABLE, f"{self._name} did not answer within {self._timeout} s")

    def _check(self, message: Message) -> None:
        """Raise what a control message tells: the errno of NLMSG_ERROR (0 is an acknowledgement) or of NLMSG_DONE."""
        if message.kind in (_NLMSG_ERROR, _NLMSG_DONE):
            if len(message.body) < _ERRNO.size:
                raise ParseError(self._name, 0, f"an error number of 4 bytes, found {len(message.body)}")
            (number,) = _ERRNO.unpack_from(message.body)
            if number:
                raise self._failure(-number)

    def _failure(self, number: int | None) -> Unavailable | Vanished:
        """Turn an errno into the exception to raise; a number that is no errno ends as NOT_READABLE.

        EINVAL means absence here: it is what nfnetlink answers when the module behind a message is not there
        (net/netfilter/nfnetlink.c), and our own requests are well-formed wherever their receiver exists. ESRCH means
        that the process asked for has ended, as in `unavailable_from`.
        """
        number = number or 0
        said = os.strerror(number) if 0 < number <= _MAX_ERRNO else f"error {number}"
        if number == errno.ESRCH:
            return Vanished(f"{self._name}: {said}")
        if number == errno.ENOBUFS:
            return _SpoiltError(Reason.NOT_READABLE, f"{self._name}: {said}")
        if number in _NO_PERMISSION:
            return Unavailable(Reason.NO_PERMISSION, f"{self._name}: {said} (a capability is missing)")
        if number in _NOT_IN_KERNEL:
            return Unavailable(Reason.NOT_IN_KERNEL, f"{self._name}: {said} (this kernel has not got it)")
        return Unavailable(Reason.NOT_READABLE, f"{self._name}: {said}")
