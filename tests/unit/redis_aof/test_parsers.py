"""Addresses as people write them, and replies as servers give them: recorded, damaged and arbitrary."""

from __future__ import annotations

import contextlib
from typing import TYPE_CHECKING

import pytest
from hypothesis import given
from hypothesis import strategies as st

from shoal.redis.errors import MalformedReply
from shoal.redis.info import LatencyEvent, number, parse_config, parse_info, parse_latency
from shoal.redis.targets import Login, Target, Tls, parse_targets
from shoal.settings import SettingsError, resolve

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

SECRET = "hunter2"  # noqa: S105  (nobody's)
replies = st.recursive(
    st.none() | st.integers() | st.binary(max_size=40), lambda inner: st.lists(inner, max_size=8), max_leaves=40
)


@pytest.mark.parametrize(
    ("text", "target"),
    [
        ("redis://cache", Target("cache:6379", "cache", 6379)),
        ("redis://10.0.0.7:6380/3", Target("10.0.0.7:6380", "10.0.0.7", 6380)),
        ("redis://[::1]:7000", Target("[::1]:7000", "::1", 7000)),
        ("redis://shoal@cache", Target("cache:6379", "cache", 6379, login=Login("shoal"))),
        ("redis://sh%40al@cache", Target("cache:6379", "cache", 6379, login=Login("sh@al"))),
        ("unix:///run/redis/a%20b.sock", Target("/run/redis/a b.sock", path="/run/redis/a b.sock")),
        ("unix://shoal@/run/r.sock", Target("/run/r.sock", path="/run/r.sock", login=Login("shoal"))),
        ("rediss://cache", Target("cache:6379", "cache", 6379, tls=Tls())),
        (
            "rediss://cache?ssl_ca_certs=/ca&ssl_certfile=/c&ssl_keyfile=/k&ssl_check_hostname=false&password_file=/p",
            Target(
                "cache:6379", "cache", 6379, tls=Tls("/ca", "/c", "/k", check_hostname=False), login=Login("", "/p")
            ),
        ),
    ],
)
def test_addresses(text: str, target: Target) -> None:
    """Each scheme, its defaults, and the options behind the question mark."""
    assert parse_targets(text) == (target,)


def test_lists_of_addresses() -> None:
    """Commas, spaces and line breaks separate; nothing at all is no server."""
    names = [target.name for target in parse_targets("redis://a, redis://b:1\nunix:///c")]
    assert names == ["a:6379", "b:1", "/c"]
    assert parse_targets("") == parse_targets(" ,\n") == ()


WRONG = [
    "cache:6379",
    "http://cache",
    "redis://",
    "redis://:6379",
    "redis://cache:port",
    "redis://cache:65536",
    "redis://cache/path",
    "redis://[::1",
    "unix://run/redis.sock",
    "unix://",
    "unix:///" + "x" * 120,
    "redis://cache?db=3",
    "redis://cache?ssl_ca_certs=/ca",
    "rediss://cache?ssl_check_hostname=perhaps",
    "redis://cache?password_file",
    f"redis://cache?password={SECRET}",
    f"redis://:{SECRET}@cache",
    f"redis://user:{SECRET}@cache",
    f"unix://user:{SECRET}@/run/r.sock",
    f"redis//:{SECRET}@cache",
    f"rdeis://:{SECRET}@cache",
    f"redis://:{SECRET}@[cache",
    "redis://cache redis://cache:6379",
]


@pytest.mark.parametrize("text", WRONG)
def test_wrong_addresses(text: str) -> None:
    """What is no address, has a password in it, or names a server twice is refused, and never shown."""
    with pytest.raises(SettingsError) as caught:
        resolve({"redis.target": text}, {})
    assert str(caught.value).startswith("--redis.target is not ")
    assert SECRET not in str(caught.value)
    assert "cache" not in str(caught.value)


@given(st.text() | st.from_regex(r"(redis|rediss|unix)://[^ ,]*", fullmatch=True))
def test_arbitrary_addresses(text: str) -> None:
    """Any text is a list of servers or a `ValueError`."""
    with contextlib.suppress(ValueError):
        for target in parse_targets(text):
            assert bool(target.path) != bool(target.host)


def test_flags_are_joined_and_the_file_may_hold_them_too(tmp_path: Path) -> None:
    """A variable and the file hold a list with commas; the default is nobody."""
    file = tmp_path / "shoal.yaml"
    file.write_text("redis:\n  target: redis://a,redis://b\n  discover: true\n  password-file: /secret\n")
    settings = resolve({"config.file": str(file)}, {})
    assert [target.name for target in settings.redis_targets] == ["a:6379", "b:6379"]
    assert settings.redis_discover
    assert settings.redis_password_file == "/secret"  # noqa: S105  (where it is)
    assert [one.name for one in resolve({}, {"SHOAL_REDIS_TARGET": "redis://c"}).redis_targets] == ["c:6379"]
    assert resolve({}, {}).redis_targets == ()
    assert not resolve({}, {}).redis_discover


def test_where_the_password_is(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The address's own file, then its own variable, then the common file, then the common variable; no line break."""
    own, common = tmp_path / "own", tmp_path / "common"
    own.write_text("one\n")
    common.write_text("three\r\n")
    monkeypatch.setenv("OWN", "two")
    monkeypatch.setenv("SHOAL_REDIS_PASSWORD", "four")
    assert Login("", str(own), "OWN").password(str(common)) == "one"
    assert Login("", "", "OWN").password(str(common)) == "two"
    assert Login().password(str(common)) == "three"
    assert Login().password("") == "four"
    monkeypatch.delenv("SHOAL_REDIS_PASSWORD")
    assert Login().password("") == ""
    assert Login("", "", "NOT_SET").password(str(common)) == ""
    with pytest.raises(OSError, match="No such file"):
        Login("", str(tmp_path / "none")).password("")


def test_info() -> None:
    """Fields under headings; a value may hold a colon; what is no field is passed over."""
    server, persistence = b"# Server\r\nredis_version:7.0.15\r\nexecutable:/a:b\r\n", b"# Persistence\r\nloading:0\r\n"
    fields = parse_info(server + b"\r\nodd line\r\nx:\xff\r\n" + persistence)
    assert fields["executable"] == "/a:b"
    assert number(fields, "loading") == 0
    assert number(fields, "executable") is None
    assert number(fields, "absent") is None


def test_info_with_a_name_that_looks_like_lines() -> None:
    """What a person may call a file: only the protocol's own line breaks end a line."""
    name = "/tmp/\x0bloading:1\x1cloading:1\u2028loading:1\x85loading:1"  # noqa: S108  (nobody's file)
    fields = parse_info(f"redis_version:7.0.15\r\nloading:0\r\nconfig_file:{name}\r\n".encode())
    assert fields == {"redis_version": "7.0.15", "loading": "0", "config_file": name}


@pytest.mark.parametrize(
    ("text", "value"), [("-1", -1), ("007", 7), ("+1", None), (" 1", None), ("1.5", None), ("٣", None)]
)
def test_numbers(text: str, value: int | None) -> None:
    """Whole numbers as servers write them, and nothing else that Python would take for one."""
    assert number({"field": text}, "field") == value


def test_config() -> None:
    """Names and values in turn; a directory need not be UTF-8."""
    assert parse_config([b"appendfsync", b"always", b"dir", b"/\xff"]) == {"appendfsync": "always", "dir": "/\udcff"}
    assert parse_config([]) == {}


def test_latency() -> None:
    """Four columns, Valkey's six, and more than are known."""
    rows = [[b"fork", 1738651470, 254, 1005], [b"aof-write", 1, 2, 3, 5, 2, b"new"]]
    assert parse_latency(rows) == {
        "fork": LatencyEvent(0.254, 1.005, None, None),
        "aof-write": LatencyEvent(0.002, 0.003, 0.005, 2),
    }


@pytest.mark.parametrize(
    ("parse", "reply"),
    [
        (parse_info, b""),
        (parse_info, []),
        (parse_info, None),
        (parse_config, [b"one"]),
        (parse_config, [b"one", 1]),
        (parse_config, b"one"),
        (parse_latency, None),
        (parse_latency, [b"fork"]),
        (parse_latency, [[b"fork", 1, 2]]),
        (parse_latency, [[b"fork", 1, 2, b"3"]]),
        (parse_latency, [[b"fork", 1, 2, -3]]),
        (parse_latency, [[b"fork", 1, 2, 10**400]]),
        (parse_latency, [[1, 1, 2, 3]]),
    ],
)
def test_the_malformed_is_refused(parse: Callable[[object], object], reply: object) -> None:
    """What no server answers is said so, not taken for zeros."""
    with pytest.raises(MalformedReply):
        parse(reply)


@given(replies)
def test_arbitrary_replies(reply: object) -> None:
    """Nothing but `MalformedReply` comes out of any reply that the protocol can carry."""
    for parse in (parse_info, parse_config, parse_latency):
        with contextlib.suppress(MalformedReply):
            parse(reply)


@given(st.binary())
def test_arbitrary_info(data: bytes) -> None:
    """An INFO with anything in it is fields, and each of them a number or none."""
    fields = parse_info(b"redis_version:1\r\n" + data)
    assert all(isinstance(number(fields, field), int | None) for field in fields)
