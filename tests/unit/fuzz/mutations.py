"""Damages recorded input as its format has it: numbers, fields and lines of text, lengths and attributes of netlink.

Arbitrary bytes are refused at the first look by any parser. What goes wrong goes wrong in input that is nearly right.
Every mutation is a function of the data and of two numbers, so that hypothesis can repeat it and make it simpler.
"""

from __future__ import annotations

import json
import re
import struct
from contextlib import suppress
from enum import Enum
from typing import TYPE_CHECKING, Any

from hypothesis import strategies as st

from shoal.kernel.files import ParseError
from shoal.kernel.netlink.core import split

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

# What a number is replaced by: the borders of its types, and what int() takes that no kernel prints.
NUMBERS = (
    *(b"0", b"1", b"-1", b"9", b"65535", b"65536", b"4294967295", b"4294967296", b"9223372036854775808"),
    *(b"18446744073709551615", b"18446744073709551616", b"9" * 21, b"9" * 400, b"9" * 5000, b"", b"+5", b"--5"),
    *(b"1_0", b"0x10", b"1.5", b"1e3", b"nan", b"inf", b"max", b"\xd9\xa1", b"\xb2", b"007", b"1 2", b"1,2", b"1\x002"),
)
# What is put in anywhere, or stands in a separator's place.
PIECES = (
    *(b"\n", b" ", b"\t", b"\r", b"\r\n", b"\x0b", b"\x0c", b"\x1c", b"\x85", b"\xe2\x80\xa8", b"\0", b"\xff", b"\n\n"),
    *(b":", b"=", b",", b"-", b"/", b"\\", b"\\012", b"\\777", b'"', b"}", b"{", b"#", b"some", b"full", b"total="),
    *(b"cpu", b"TCP:", b"TcpExt:", b"0::/", b"max", b"(", b")", b"|-- ", b"/32 host LOCAL", b"\xf0\x9f\x90\x9f"),
)
WORDS = (0, 1, 2, 3, 4, 5, 7, 8, 12, 16, 20, 0x3FFF, 0x4000, 0x7FFF, 0x8000, 0xFFFB, 0xFFFC, 0xFFFF)
LONG_WORDS = (*WORDS, 0x10000, 0x7FFFFFFF, 0x80000000, 0xFFFFFFFC, 0xFFFFFFFF)
VALUES: tuple[Any, ...] = (
    *(None, 0, 1, -1, 65536, 1 << 63, 10**30, 1.5, 1e300, "", "x", "10.0.0.1", "::1", "a\x00b", "\ud800", "-1"),
    *([], [[]], ["10.0.0.1"], [None], {}, {"a": 1}, [{}], {"metadata": None}, "x" * 5000),
)
HEADER = struct.Struct("=IHHII")
# Where attributes begin in the messages that there are: behind nfgenmsg, ndmsg, rtmsg, ..., inet_diag_msg.
BEGINNINGS = (4, 8, 12, 16, 72)


class Shape(Enum):
    """What kind of format a parser reads, and so how its input is damaged."""

    TEXT = "text"
    NETLINK = "netlink"
    JSON = "json"
    PACKET = "packet"


def _number(data: bytes, where: int, what: int) -> bytes:
    found = list(re.finditer(rb"[0-9]+", data))
    if not found:
        return data + NUMBERS[what % len(NUMBERS)]
    begin, end = found[where % len(found)].span()
    return data[:begin] + NUMBERS[what % len(NUMBERS)] + data[end:]


def _fields(data: bytes, where: int, what: int) -> bytes:
    """Drop, double or move a field of a line."""
    rows = data.split(b"\n")
    fields = rows[where % len(rows)].split(b" ")
    place = what // 3 % len(fields)
    if what % 3 == 0:
        del fields[place]
    elif what % 3 == 1:
        fields.insert(place, fields[place])
    else:
        fields.append(fields.pop(place))
    rows[where % len(rows)] = b" ".join(fields)
    return b"\n".join(rows)


def _lines(data: bytes, where: int, what: int) -> bytes:
    """Drop, double or move a line."""
    rows = data.split(b"\n")
    place = where % len(rows)
    if what % 3 == 0:
        del rows[place]
    elif what % 3 == 1:
        rows.insert(place, rows[place])
    else:
        rows.insert(what // 3 % len(rows), rows.pop(place))
    return b"\n".join(rows)


def _cut(data: bytes, where: int, _: int) -> bytes:
    return data[: where % (len(data) + 1)]


def _piece(data: bytes, where: int, what: int) -> bytes:
    place = where % (len(data) + 1)
    return data[:place] + PIECES[what % len(PIECES)] + data[place:]


def _separator(data: bytes, where: int, what: int) -> bytes:
    found = list(re.finditer(rb"[^0-9A-Za-z]+", data))
    if not found:
        return data
    begin, end = found[where % len(found)].span()
    return data[:begin] + PIECES[what % len(PIECES)] + data[end:]


def _byte(data: bytes, where: int, what: int) -> bytes:
    if not data:
        return data
    place = where % len(data)
    return data[:place] + bytes([what % 256]) + data[place + 1 :]


def _messages(data: bytes) -> list[bytes]:
    """Return whole netlink messages, header and all; what is damaged already is one message."""
    found = []
    with suppress(ParseError):
        for message in split(data):
            length = HEADER.size + len(message.body)
            found.append(HEADER.pack(length, *message[:-1]) + message.body)
    return found or [data]


def _joined(messages: Sequence[bytes]) -> bytes:
    return b"".join(message + bytes(-len(message) % 4) for message in messages)


def _message(data: bytes, where: int, what: int) -> bytes:
    """Drop, double or move a message."""
    messages = _messages(data)
    place = where % len(messages)
    if what % 3 == 0:
        del messages[place]
    elif what % 3 == 1:
        messages.insert(place, messages[place])
    else:
        messages.insert(what // 3 % len(messages), messages.pop(place))
    return _joined(messages)


def _word(data: bytes, where: int, what: int) -> bytes:
    """Put another number into two or four aligned bytes: lengths and types of attributes are such."""
    short = what % 2 == 0
    size, values = (2, WORDS) if short else (4, LONG_WORDS)
    if len(data) < size:
        return data
    place = where % (len(data) // size) * size
    return data[:place] + values[what // 2 % len(values)].to_bytes(size, "little") + data[place + size :]


def _shorter(data: bytes, where: int, what: int) -> bytes:
    """Cut a message, so that its header says so."""
    messages = _messages(data)
    message = messages[where % len(messages)]
    message = message[: max(HEADER.size, what % (len(message) + 1))]
    if len(message) >= HEADER.size:
        messages[where % len(messages)] = struct.pack("=I", len(message)) + message[4:]
    return _joined(messages)


def _attributes(data: bytes) -> list[tuple[int, bytes]]:
    """Return (type with its flags, value) of attributes that fill the data, [] of anything else."""
    found = []
    offset = 0
    while offset < len(data):
        length, kind = struct.unpack_from("=HH", data, offset) if len(data) - offset >= 4 else (0, 0)
        if not 4 <= length <= len(data) - offset:
            return []
        found.append((kind, data[offset + 4 : offset + length]))
        offset += length + 3 & ~3
    return found


def _count(data: bytes) -> int:
    """Count attributes, and those inside of attributes."""
    return sum(1 + _count(value) for _, value in _attributes(data))


def _changed(data: bytes, place: int, what: int) -> bytes:
    """Drop, double, empty, lengthen or shorten the attribute of this number; what is around it stays well formed."""
    packed = b""
    for kind, value in _attributes(data):
        inside = _count(value)
        if place == 0:
            choice = what % 5
            size = what // 5 % 9
            new = (value, value, b"", value + bytes(size), value[: max(0, len(value) - size)])[choice]
            copies = (0, 2, 1, 1, 1)[choice]
        else:
            new = _changed(value, place - 1, what) if 0 < place <= inside else value
            copies = 1
        packed += (struct.pack("=HH", 4 + len(new) & 0xFFFF, kind) + new + bytes(-len(new) % 4)) * copies
        place -= 1 + inside
    return packed


def _attribute(data: bytes, where: int, what: int) -> bytes:
    """Change an attribute of a message, however deep it is."""
    messages = _messages(data)
    chosen = where % len(messages)
    message = messages[chosen]
    body = message[HEADER.size :]
    for beginning in BEGINNINGS:
        if count := _count(body[beginning:]):
            body = body[:beginning] + _changed(body[beginning:], where // len(messages) % count, what)
            break
    messages[chosen] = struct.pack("=I", HEADER.size + len(body)) + message[4 : HEADER.size] + body
    return _joined(messages)


def _json_value(data: bytes, where: int, what: int) -> bytes:
    """Put another value, or nothing, in the place of one of the values."""
    try:
        content = json.loads(data)
    except (ValueError, RecursionError):
        return data
    places: list[tuple[Any, Any]] = []
    pending = [content]
    while pending:
        holder = pending.pop()
        keys = range(len(holder)) if isinstance(holder, list) else list(holder)
        places += [(holder, key) for key in keys]
        pending += [holder[key] for key in keys if isinstance(holder[key], dict | list)]
    if not places:
        return data
    holder, key = places[where % len(places)]
    value = what % (len(VALUES) + 1)
    if value == len(VALUES):
        del holder[key]
    else:
        holder[key] = VALUES[value]
    return json.dumps(content).encode()


def _nested(data: bytes, where: int, what: int) -> bytes:
    """Put brackets into the brackets, a hundred thousand deep at most."""
    depth = (10, 1000, 100_000)[what % 3]
    place = where % (len(data) + 1)
    return data[:place] + b"[" * depth + b"]" * depth + data[place:]


_BYTES = (_cut, _byte, _piece)
MUTATIONS: dict[Shape, tuple[Callable[[bytes, int, int], bytes], ...]] = {
    Shape.TEXT: (*_BYTES, _number, _number, _fields, _lines, _separator),
    Shape.NETLINK: (_cut, _byte, _word, _word, _message, _shorter, _attribute, _attribute),
    Shape.JSON: (*_BYTES, _json_value, _json_value, _json_value, _nested),
    Shape.PACKET: (_cut, _byte, _word),
}


def damaged(shape: Shape, seeds: Sequence[bytes]) -> st.SearchStrategy[bytes]:
    """Return input that begins as one of the seeds, perhaps goes on as another, and has up to four things wrong."""
    number = st.integers(0, (1 << 20) - 1)
    steps = st.lists(st.tuples(st.sampled_from(MUTATIONS[shape]), number, number), min_size=1, max_size=4)

    def apply(seed: bytes, other: bytes, share: int, steps: list[tuple[Any, int, int]]) -> bytes:
        data = seed
        if share % 8 == 0:
            # Such as the beginning of one kernel's file and the end of another's.
            data = seed[: share % (len(seed) + 1)] + other[share % (len(other) + 1) :]
        for mutation, where, what in steps:
            data = mutation(data, where, what)
        return data

    return st.builds(apply, st.sampled_from(seeds), st.sampled_from(seeds), number, steps)
