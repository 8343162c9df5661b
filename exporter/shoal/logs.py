"""One log line a message, as logfmt or JSON, with the fields that the caller gave beside it."""

from __future__ import annotations

import json
import logging
import sys
from datetime import UTC, datetime

__all__ = ["configure"]

_STANDARD = frozenset(vars(logging.makeLogRecord({}))) | {"message", "asctime", "taskName"}


class _Formatter(logging.Formatter):
    def fields(self, record: logging.LogRecord) -> dict[str, str]:
        """Return what a line says, in its order."""
        fields = {
            "ts": datetime.fromtimestamp(record.created, UTC).isoformat(timespec="milliseconds"),
            "level": record.levelname.lower(),
            "logger": record.name,
            "msg": record.getMessage(),
        }
        fields.update((key, str(value)) for key, value in vars(record).items() if key not in _STANDARD)
        if record.exc_info and record.exc_info[1]:
            # A person gets the sentence; the place in the code is for whoever asked for debug messages.
            error = record.exc_info[1]
            fields["error"] = f"{type(error).__name__}: {error}"
            if logging.getLogger("shoal").isEnabledFor(logging.DEBUG):
                fields["traceback"] = self.formatException(record.exc_info)
        return fields


class _Logfmt(_Formatter):
    def format(self, record: logging.LogRecord) -> str:
        return " ".join(f"{key}={_quoted(value)}" for key, value in self.fields(record).items())


class _Json(_Formatter):
    def format(self, record: logging.LogRecord) -> str:
        return json.dumps(self.fields(record))


def _quoted(value: str) -> str:
    """Quote what would break the line or the next field; JSON's escapes are what logfmt's readers expect."""
    plain = value.isprintable() and value and not set(value) & set(' "=\\')
    return value if plain else json.dumps(value)


def configure(level: str, style: str) -> None:
    """Send all log messages of at least `level` to standard error, in `style` "logfmt" or "json"."""
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(_Json() if style == "json" else _Logfmt())
    root = logging.getLogger()
    root.handlers = [handler]
    root.setLevel(logging.WARNING)
    logging.getLogger("shoal").setLevel(level.upper())
