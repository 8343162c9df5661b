"""Log lines that programs read back: one line a message, in logfmt and in JSON."""

from __future__ import annotations

import json
import logging
import re
from datetime import datetime, timedelta
from typing import TYPE_CHECKING

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from shoal.logs import configure

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

BOTH = pytest.mark.parametrize("style", ["logfmt", "json"])
_PAIR = re.compile(r'([a-z_]+)=("(?:[^"\\]|\\.)*"|[^ "=]*)(?: |$)')


@pytest.fixture(autouse=True)
def _as_before() -> Iterator[None]:
    """Put the process's logging back as pytest had it."""
    root, shoal = logging.getLogger(), logging.getLogger("shoal")
    handlers, levels = root.handlers, (root.level, shoal.level)
    yield
    root.handlers = handlers
    root.setLevel(levels[0])
    shoal.setLevel(levels[1])


def read_back(line: str, style: str) -> dict[str, str]:
    """Return the fields of a line, by json or by the rules of logfmt; whatever is not a field is an error."""
    if style == "json":
        return dict(json.loads(line))
    fields: dict[str, str] = {}
    end = 0
    for match in _PAIR.finditer(line):
        assert match.start() == end, f"no field: {line[end : match.start()]!r}"
        end = match.end()
        fields[match[1]] = json.loads(match[2]) if match[2].startswith('"') else match[2]
    assert end == len(line)
    return fields


@pytest.fixture
def logged(capsys: pytest.CaptureFixture[str]) -> Callable[..., list[dict[str, str]]]:
    """Return a function that logs one message and returns the fields of the lines that came of it."""

    def log(style: str, message: str, *, level: str = "info", **fields: object) -> list[dict[str, str]]:
        capsys.readouterr()
        configure(level, style)
        logging.getLogger("shoal.test").warning(message, extra=fields)
        lines = capsys.readouterr().err
        assert lines.endswith("\n")
        assert lines.count("\n") == len(lines.splitlines())
        return [read_back(line, style) for line in lines[:-1].split("\n")]

    return log


@BOTH
@pytest.mark.parametrize(
    "value",
    [
        "plain",
        "",
        "two words",
        "two\nlines\r\nand\x0bmore\x85of\u2028them",
        'say "hi"',
        "back\\slash",
        "a=b",
        "\x1b[31mred\x00",
        "grüße 🐟",
        "\udcff",
        "nan",
        "x" * 5000,
    ],
)
def test_a_field_comes_back_as_it_was(value: str, style: str, logged: Callable[..., list[dict[str, str]]]) -> None:
    """Also one with line ends of any kind, escape sequences for a terminal, and bytes that are no UTF-8."""
    (fields,) = logged(style, value, detail=value)
    assert fields["detail"] == value
    assert fields["msg"] == value
    assert fields["level"] == "warning"
    assert fields["logger"] == "shoal.test"
    when = datetime.fromisoformat(fields["ts"])
    assert when.utcoffset() == timedelta(0)


@BOTH
@settings(suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(value=st.text())
def test_any_text_comes_back(value: str, style: str, logged: Callable[..., list[dict[str, str]]]) -> None:
    """Whatever the text, it is one line and the same text again."""
    (fields,) = logged(style, "message", detail=value)
    assert fields["detail"] == value


@BOTH
def test_an_exception_is_a_sentence(style: str, capsys: pytest.CaptureFixture[str]) -> None:
    """At info an error has no traceback; at debug it has one, still on its one line."""
    for level, traceback in (("info", False), ("debug", True)):
        configure(level, style)
        try:
            int("no\nnumber")
        except ValueError:
            logging.getLogger("aiohttp.server").exception("Error handling request")
        (line,) = capsys.readouterr().err.splitlines()
        fields = read_back(line, style)
        assert fields["error"] == "ValueError: invalid literal for int() with base 10: 'no\\nnumber'"
        assert fields["msg"] == "Error handling request"
        assert ("Traceback" in fields.get("traceback", "")) is traceback
        assert ("Traceback" in line) is traceback


def test_levels(capsys: pytest.CaptureFixture[str]) -> None:
    """What is below the level is not written; of libraries only warnings and worse ever are."""
    configure("warning", "logfmt")
    logging.getLogger("shoal.test").info("no")
    logging.getLogger("shoal.test").warning("yes")
    configure("debug", "logfmt")
    logging.getLogger("shoal.test").debug("yes")
    logging.getLogger("asyncio").debug("no")
    messages = [read_back(line, "logfmt")["msg"] for line in capsys.readouterr().err.splitlines()]
    assert messages == ["yes", "yes"]
