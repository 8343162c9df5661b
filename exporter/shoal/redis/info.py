"""What servers answer, from bytes to values: INFO, CONFIG GET and LATENCY LATEST."""

from __future__ import annotations

import re
from dataclasses import dataclass

from shoal.redis.errors import MalformedReply

__all__ = ["LatencyEvent", "number", "parse_config", "parse_info", "parse_latency"]

_MILLI = 1000
_WITH_MAX = 4
_WITH_SUM = 6
# Not int() alone, which takes underscores, other scripts' digits, and numbers that no float can hold.
_NUMBER = re.compile(r"-?[0-9]{1,19}", re.ASCII)
_LARGEST = 1 << 63


@dataclass(frozen=True, slots=True)
class LatencyEvent:
    """One event of the latency monitor, in seconds: its last time, its longest, and the sum and number of all.

    `total` and `count` are None where the server does not have them (Valkey has them since 8.1). All are of the
    events above the monitor's threshold, since the server started or someone reset the monitor.
    """

    last: float
    longest: float
    total: float | None
    count: int | None


def parse_info(reply: object) -> dict[str, str]:
    """Return {field: text} of an INFO reply: `field:value` lines between `# Section` headings.

    Raises `MalformedReply` for anything that does not tell the server's version, as every server's INFO does
    (redis_version; Valkey and KeyDB give it too, for those who look for it).
    """
    if not isinstance(reply, bytes):
        raise MalformedReply("INFO did not return text")
    # Not splitlines(), for which a vertical tab in the name of a file ends a line too.
    lines = reply.decode("utf-8", "replace").replace("\r\n", "\n").split("\n")
    fields = dict(line.split(":", 1) for line in lines if ":" in line and not line.startswith("#"))
    if "redis_version" not in fields:
        raise MalformedReply("INFO returned no redis_version")
    return fields


def number(fields: dict[str, str], field: str) -> int | None:
    """Return a whole number of INFO or CONFIG; None if the server does not have it, or has something else there."""
    text = fields.get(field, "")
    return int(text) if _NUMBER.fullmatch(text) else None


def parse_config(reply: object) -> dict[str, str]:
    """Return {parameter: text} of a CONFIG GET reply, an array of names and values in turn. Raises `MalformedReply`."""
    if not isinstance(reply, list) or len(reply) % 2 or not all(isinstance(item, bytes) for item in reply):
        raise MalformedReply("CONFIG GET did not return names and values")
    texts = [item.decode("utf-8", "surrogateescape") for item in reply]
    return dict(zip(texts[::2], texts[1::2], strict=True))


def parse_latency(reply: object) -> dict[str, LatencyEvent]:
    """Return {event: times} of a LATENCY LATEST reply, an array of (event, Unix time, last, max[, sum, count]) in ms.

    Tolerates more columns. Raises `MalformedReply`.
    """
    if not isinstance(reply, list):
        raise MalformedReply("LATENCY LATEST did not return a list")
    events: dict[str, LatencyEvent] = {}
    for row in reply:
        if not isinstance(row, list) or len(row) < _WITH_MAX or not isinstance(row[0], bytes):
            raise MalformedReply("LATENCY LATEST returned an event that is not a name and at least three numbers")
        if not all(isinstance(value, int) and 0 <= value < _LARGEST for value in row[1:_WITH_SUM]):
            raise MalformedReply("LATENCY LATEST returned a time that is no whole number")
        total, count = row[4:_WITH_SUM] if len(row) >= _WITH_SUM else (None, None)
        events[row[0].decode("utf-8", "replace")] = LatencyEvent(
            row[2] / _MILLI, row[3] / _MILLI, None if total is None else total / _MILLI, count
        )
    return events
