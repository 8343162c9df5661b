"""Servers that pretend, refuse, hang or answer garbage: each costs itself only, and says why it is down."""

from __future__ import annotations

import asyncio
import contextlib
import os
import socket
import threading
import time
from typing import TYPE_CHECKING

import pytest

from shoal.redis import client as client_module
from shoal.redis import server as server_module
from shoal.redis.errors import Down
from shoal.redis.server import Server
from shoal.redis.targets import Target

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable
    from pathlib import Path

    from tests.unit.redis_aof.conftest import StartRedis, Watch

    Pretend = Callable[[Callable[[bytes], bytes | None]], Awaitable[str]]

UNOWNED = ("", "", "", "")
INFO = b"# Server\r\nredis_version:7.0.15\r\nprocess_id:1\r\nloading:%d\r\naof_enabled:1\r\naof_delayed_fsync:%s\r\n"


def bulk(text: bytes) -> bytes:
    """Return a text as the protocol has it."""
    return b"$%d\r\n%s\r\n" % (len(text), text)


def healthy(command: bytes) -> bytes:
    """Answer as a server does that has little to say."""
    if command == b"ping":
        return b"+PONG\r\n"
    if command == b"info":
        return bulk(INFO % (0, b"7"))
    if command.startswith(b"config get"):
        return b"*0\r\n"
    return b"*0\r\n" if command == b"latency latest" else b"-ERR unknown command\r\n"


def always(reply: bytes | None) -> Callable[[bytes], bytes | None]:
    """Return a server that says one thing, whatever it is asked."""
    return lambda _: reply


def but(**replies: bytes | None) -> Callable[[bytes], bytes | None]:
    """Return a healthy server that answers some commands otherwise."""
    return lambda command: replies[word] if (word := command.split()[0].decode()) in replies else healthy(command)


def stuck_at(word: bytes, reply: bytes | None) -> Callable[[], Callable[[bytes], bytes | None]]:
    """Return a maker of servers that are healthy until a command comes, begin to answer it, and then say nothing."""

    def make() -> Callable[[bytes], bytes | None]:
        commands: list[bytes] = []

        def answer(command: bytes) -> bytes | None:
            stuck = any(earlier.startswith(word) for earlier in commands)
            commands.append(command)
            return None if stuck else reply if command.startswith(word) else healthy(command)

        return answer

    return make


SILENT = {
    "nothing at all": stuck_at(b"", None),
    "nothing from INFO on": stuck_at(b"info", None),
    "half of a reply": stuck_at(b"info", b"$100\r\nredis_version:7"),
    "the beginning of an array": stuck_at(b"info", b"*9\r\n+one\r\n"),
    "nothing from CONFIG on": stuck_at(b"config", None),
}
ANSWERS = {
    "a web server": (always(b"HTTP/1.1 400 Bad Request\r\n\r\n"), "protocol"),
    "bytes": (always(bytes(range(256)) + b"\r\n"), "protocol"),
    "an endless line": (always(b"+" + b"x" * 200_000), "protocol"),
    "a huge text": (but(info=b"$1000000000\r\n"), "protocol"),
    "a text of negative length": (but(info=b"$-7\r\n"), "protocol"),
    "an array of everything": (but(info=b"*100000000\r\n" + b":1\r\n" * 5000), "protocol"),
    "an array in an array": (but(info=b"*1\r\n" * 5000), "protocol"),
    "no number": (but(info=b":one\r\n"), "protocol"),
    "INFO unanswered, PING answered": (but(info=None), "protocol"),
    "two answers": (but(ping=b"+PONG\r\n+PONG\r\n"), "protocol"),
    "INFO is a number": (but(info=b":1\r\n"), "protocol"),
    "INFO is nothing": (but(info=b"$-1\r\n"), "protocol"),
    "INFO is empty": (but(info=bulk(b"")), "protocol"),
    "INFO of something else": (but(info=bulk(b"version:1.2\r\n")), "protocol"),
    "NOAUTH": (always(b"-NOAUTH Authentication required.\r\n"), "auth"),
    "NOAUTH for INFO": (but(info=b"-NOAUTH Authentication required.\r\n"), "auth"),
    "NOPERM": (always(b"-NOPERM this user has no permissions to run the 'ping' command\r\n"), "auth"),
    "NOPERM for INFO": (but(info=b"-NOPERM this user has no permissions\r\n"), "auth"),
    "protected mode": (always(b"-DENIED Redis is running in protected mode\r\n"), "auth"),
    "LOADING": (always(b"-LOADING Redis is loading the dataset in memory\r\n"), "loading"),
    "loading, and says so in INFO": (but(info=bulk(INFO % (1, b"7"))), "loading"),
    "BUSY": (but(ping=b"-BUSY Redis is busy running a script\r\n", info=b"-BUSY Redis is busy\r\n"), "busy"),
    "too many clients": (always(b"-ERR max number of clients reached\r\n"), "error"),
    "another error": (but(info=b"-ERR not today\r\n"), "error"),
    "closes": (always(b""), "closed"),
    "closes at INFO": (but(info=b""), "closed"),
}


@pytest.mark.parametrize("case", ANSWERS)
async def test_what_it_answers_is_its_reason(
    pretend: Pretend, watch: Watch, monkeypatch: pytest.MonkeyPatch, case: str
) -> None:
    """Each answer that is not Redis's, or is a refusal, is a reason of its own, and is not waited for any longer."""
    monkeypatch.setattr(server_module, "_READ_SECONDS", 60)
    answer, reason = ANSWERS[case]
    name = await pretend(answer)
    watching = await watch(f"redis://{name}")
    found = await watching.scrape()
    assert found["shoal_redis_up"] == {(name, *UNOWNED, reason): 0}
    assert "shoal_redis_aof_enabled" not in found
    assert found["shoal_scrape_collector_success"] == {("redis_aof",): 1}


async def test_an_answer_too_many_ends_the_connection(
    pretend: Pretend, watch: Watch, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Even where it would pass for a right one: from there on nobody knows which answer belongs to which question."""
    # Otherwise it could pass for the answer to a PING, and is no PONG.
    monkeypatch.setattr(server_module, "_PING_SECONDS", 60)
    name = await pretend(but(latency=b"*0\r\n" * 2))
    watching = await watch(f"redis://{name}")
    assert await watching.reasons() == {name: ""}
    for _ in range(100):
        await asyncio.sleep(0.05)
        if (reasons := await watching.reasons()) != {name: ""}:
            break
    assert reasons == {name: "protocol"}


@pytest.mark.parametrize("case", SILENT)
async def test_silence_is_a_timeout(pretend: Pretend, watch: Watch, monkeypatch: pytest.MonkeyPatch, case: str) -> None:
    """A server that accepts and does not answer, or not to the end: the scrape waits a second at most."""
    monkeypatch.setattr(server_module, "_READ_SECONDS", 0.3)
    monkeypatch.setattr(server_module, "_SILENCE_SECONDS", 0.5)
    name = await pretend(SILENT[case]())
    watching = await watch(f"redis://{name}")
    for _ in range(4):
        assert await watching.reasons() == {name: "timeout"}
        assert watching.took < 5


@pytest.mark.slow
async def test_one_good_among_the_bad(pretend: Pretend, start_redis: StartRedis, watch: Watch) -> None:
    """A real server is read and timed as if it were alone, while others hang, refuse, flood and cannot be found."""
    server = await asyncio.to_thread(start_redis)
    good = f"127.0.0.1:{server.port}"
    bad = [
        await pretend(answer)
        for answer in (*(make() for make in SILENT.values()), *(answer for answer, _ in ANSWERS.values()))
    ]
    # 192.0.2.0/24 is nowhere; .invalid has no address.
    targets = [f"redis://{name}" for name in (good, *bad, "192.0.2.1:6379", "redis.invalid:6379", "127.0.0.1:1")]
    watching = await watch(*targets)
    for _ in range(3):
        found = await watching.scrape()
        assert watching.took < 8
        assert found["shoal_redis_up"][good, *UNOWNED, ""] == 1
        assert {labels[0] for labels in found["shoal_redis_aof_enabled"]} == {good}
        await asyncio.sleep(0.5)
    reasons = await watching.reasons()
    assert reasons["redis.invalid:6379"] in ("unreachable", "timeout")
    assert reasons["192.0.2.1:6379"] in ("unreachable", "timeout", "refused")
    assert reasons["127.0.0.1:1"] == "refused"
    assert watching.slow_pings(found, good, "1.0") == 0


async def test_everything_is_asked_at_once(pretend: Pretend, watch: Watch) -> None:
    """A server that stalls at every turn of its loop, and answers in the next all that came meanwhile, is read."""
    held: list[bytes] = []

    def answer(command: bytes) -> bytes | None:
        if not held and command != b"info":
            return healthy(command)
        held.append(healthy(command))
        if command != b"latency latest":
            return None
        replies = b"".join(held)
        held.clear()
        return replies

    name = await pretend(answer)
    watching = await watch(f"redis://{name}")
    assert await watching.reasons() == {name: ""}
    assert await watching.reasons() == {name: ""}


async def test_the_next_scrape_is_right_again(pretend: Pretend, watch: Watch, monkeypatch: pytest.MonkeyPatch) -> None:
    """A server that goes through every trouble in turn is up again after the last, with its numbers."""
    monkeypatch.setattr(server_module, "_FIRST_RETRY_SECONDS", 0.05)
    monkeypatch.setattr(server_module, "_LAST_RETRY_SECONDS", 0.05)
    monkeypatch.setattr(server_module, "_SILENCE_SECONDS", 0.3)
    monkeypatch.setattr(server_module, "_READ_SECONDS", 0.3)
    now: list[Callable[[bytes], bytes | None]] = [healthy]
    name = await pretend(lambda command: now[-1](command))  # noqa: PLW0108  (the last one of then, not of now)
    watching = await watch(f"redis://{name}")
    open_before = len(await asyncio.to_thread(os.listdir, "/proc/self/fd"))
    for answer, reason in ANSWERS.values():
        now.append(answer)
        await watching.until(name, reason)
        now.append(healthy)
        await watching.until(name, "")
    assert (await watching.scrape())["shoal_redis_aof_delayed_fsync_total"] == {(name, *UNOWNED): 7}
    assert len(await asyncio.to_thread(os.listdir, "/proc/self/fd")) <= open_before + 4


async def test_a_full_disk_is_told(pretend: Pretend, watch: Watch) -> None:
    """A server that cannot write its append-only file answers PING with an error: it is up, and INFO has the news."""
    info = INFO % (0, b"7") + b"aof_last_write_status:err\r\naof_last_bgrewrite_status:ok\r\n"
    name = await pretend(but(ping=b"-MISCONF Errors writing to the AOF file\r\n", info=bulk(info)))
    watching = await watch(f"redis://{name}")
    await asyncio.sleep(0.5)
    found = await watching.scrape()
    assert found["shoal_redis_up"] == {(name, *UNOWNED, ""): 1}
    assert found["shoal_redis_aof_last_write_ok"] == {(name, *UNOWNED): 0}
    assert found["shoal_redis_aof_last_rewrite_ok"] == {(name, *UNOWNED): 1}
    assert found["shoal_redis_ping_duration_seconds"][name, *UNOWNED, "+Inf"] >= 2


async def test_a_node_without_anything(pretend: Pretend, watch: Watch, tmp_path: Path) -> None:
    """With a proc and a sys that have no more than they must, a server has its numbers, and no owner and no disk."""
    for name in ("proc", "sys"):
        await asyncio.to_thread((tmp_path / name).mkdir)
    await asyncio.to_thread((tmp_path / "proc/stat").write_text, "cpu 0\n")
    name = await pretend(healthy)
    paths = {"path_procfs": f"{tmp_path}/proc", "path_sysfs": f"{tmp_path}/sys", "path_rootfs": str(tmp_path)}
    watching = await watch(f"redis://{name}", redis_discover="true", **paths)
    found = await watching.scrape()
    assert found["shoal_redis_aof_delayed_fsync_total"] == {(name, *UNOWNED): 7}
    assert found["shoal_signal_available"]["redis_aof_disk", "not_readable"] == 0
    assert found["shoal_signal_available"]["redis_aof_servers", "not_readable"] == 0


async def test_errors_are_not_endless(pretend: Pretend, watch: Watch) -> None:
    """What a server says is cut before it gets into a log or on a page."""
    name = await pretend(but(config=b"-NOPERM " + b"x" * 50_000 + b"\r\n"))
    watching = await watch(f"redis://{name}")
    assert (await watching.scrape())["shoal_signal_available"]["redis_aof_config", "no_permission"] == 0
    reason = watching.collector.availability.absent["redis_aof_config"]
    assert reason
    assert len(reason[1]) < 300


async def test_numbers_that_are_none(pretend: Pretend, watch: Watch) -> None:
    """A field with something else than a number in it is absent, and the rest is there."""
    for text in (b"many", b"", b"1e3", b"1_000", b"9" * 400, "٣".encode()):
        name = await pretend(but(info=bulk(INFO % (0, text))))
        found = await (await watch(f"redis://{name}")).scrape()
        assert "shoal_redis_aof_delayed_fsync_total" not in found
        assert found["shoal_redis_aof_enabled"] == {(name, *UNOWNED): 1}


@pytest.mark.parametrize("odd", ['"quoted"', "two\nlines", "🐟", "always ", "x" * 4096])
async def test_words_that_are_no_setting(pretend: Pretend, watch: Watch, odd: str) -> None:
    """What a server calls its settings is a label only if it is one that there is; a directory is none in any case."""

    def config(policy: str) -> bytes:
        words = ("appendfsync", policy, "no-appendfsync-on-rewrite", "yes", "dir", odd)
        return b"*6\r\n" + b"".join(bulk(word.encode()) for word in words)

    name = await pretend(but(config=config("always")))
    watching = await watch(f"redis://{name}")
    assert (await watching.scrape())["shoal_redis_config_info"] == {(name, *UNOWNED, "always", "yes"): 1}
    name = await pretend(but(config=config(odd)))
    watching = await watch(f"redis://{name}")
    found = await watching.scrape()
    assert found["shoal_redis_config_info"] == {(name, *UNOWNED, "", "yes"): 1}
    assert not [labels for samples in found.values() for labels in samples if odd in labels]


async def test_valkeys_sums_of_events(pretend: Pretend, watch: Watch) -> None:
    """Valkey 8.1 tells the sum and number of spikes too; events that are no business of this failure are left out."""
    rows = b"*3\r\n" + b"".join(
        b"*6\r\n%s:1738651470\r\n:254\r\n:1005\r\n:1259\r\n:2\r\n" % bulk(event)
        for event in (b"aof-fsync-always", b"expire-cycle", b'ev"il\n')
    )
    name = await pretend(but(latency=rows))
    found = await (await watch(f"redis://{name}")).scrape()
    labels = (name, *UNOWNED, "aof-fsync-always")
    assert found["shoal_redis_latency_event_last_seconds"] == {labels: 0.254}
    assert found["shoal_redis_latency_event_max_seconds"] == {labels: 1.005}
    assert found["shoal_redis_latency_event_seconds_total"] == {labels: 1.259}
    assert found["shoal_redis_latency_events_total"] == {labels: 2}


async def test_silence_counts_in_the_pings(pretend: Pretend, watch: Watch, monkeypatch: pytest.MonkeyPatch) -> None:
    """PINGs that were never answered are in the histogram, with the time until the server was given up."""
    monkeypatch.setattr(server_module, "_SILENCE_SECONDS", 1.0)
    quiet = False
    name = await pretend(lambda command: None if quiet else healthy(command))
    watching = await watch(f"redis://{name}")
    assert await watching.reasons() == {name: ""}
    quiet = True
    await asyncio.sleep(1.6)
    found = await watching.scrape()
    assert found["shoal_redis_up"] == {(name, *UNOWNED, "timeout"): 0}
    assert watching.slow_pings(found, name, "0.1") >= 4
    assert watching.slow_pings(found, name, "0.5") >= 2


@pytest.mark.slow
async def test_the_exporters_own_delay_is_no_stall(pretend: Pretend, watch: Watch) -> None:
    """When the exporter itself cannot run for 0.4 s, no PING is slow, and the time is counted as left out."""
    asked = asyncio.Event()

    def answer(command: bytes) -> bytes:
        asked.set()
        return healthy(command)

    name = await pretend(answer)
    watching = await watch(f"redis://{name}")
    await watching.until(name, "")
    for _ in range(5):
        asked.clear()
        await asked.wait()
        until = time.perf_counter() + 0.4
        while time.perf_counter() < until:
            pass
        await asyncio.sleep(0.05)
    found = await watching.scrape()
    assert watching.slow_pings(found, name, "0.1") == 0
    assert found["shoal_redis_ping_excluded_seconds_total"][name, *UNOWNED] > 1.5


async def test_a_name_server_that_hangs(watch: Watch, monkeypatch: pytest.MonkeyPatch) -> None:
    """Looking up a name costs one thread, whatever the number of attempts, and none of those that collectors share."""
    hang = threading.Event()

    def getaddrinfo(*_: object, **__: object) -> list[object]:
        hang.wait(20)
        return []

    monkeypatch.setattr(server_module, "_SILENCE_SECONDS", 0.2)
    monkeypatch.setattr(server_module, "_FIRST_RETRY_SECONDS", 0.05)
    monkeypatch.setattr(server_module, "_LAST_RETRY_SECONDS", 0.05)
    monkeypatch.setattr(socket, "getaddrinfo", getaddrinfo)
    watching = await watch("redis://one.example:1", "redis://two.example:2")
    await asyncio.sleep(1.5)
    assert await watching.reasons() == {"one.example:1": "timeout", "two.example:2": "timeout"}
    looking = [thread for thread in threading.enumerate() if thread.name == "shoal-redis"]
    assert len(looking) == 2
    assert all(thread.daemon for thread in looking)
    hang.set()
    await watching.until("one.example:1", "unreachable")


async def test_an_accept_queue_that_is_full(
    watch: Watch, tmp_path: os.PathLike[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """A Unix socket that nobody accepts on refuses at once, where TCP would drop the SYN: it is `timeout` like that."""
    path = os.path.join(tmp_path, "full.sock")
    with contextlib.ExitStack() as stack:
        listener = stack.enter_context(socket.socket(socket.AF_UNIX))
        listener.bind(path)
        listener.listen(0)
        filler = stack.enter_context(socket.socket(socket.AF_UNIX))
        await asyncio.to_thread(filler.connect, path)
        monkeypatch.setattr(server_module, "_READ_SECONDS", 60)
        watching = await watch(f"unix://{path}")
        assert await watching.reasons() == {path: "timeout"}


async def test_a_found_server_must_be_where_it_says(pretend: Pretend, monkeypatch: pytest.MonkeyPatch) -> None:
    """A process title that names another machine's address makes the exporter say nothing there."""
    heard: list[bytes] = []

    def answer(command: bytes) -> bytes:
        heard.append(command)
        return healthy(command)

    host, _, port = (await pretend(answer)).rpartition(":")
    monkeypatch.setattr(client_module, "_same_host", lambda _local, _peer: False)
    server = Server(Target("found", host, int(port), login=None), lambda _: None, "/proc", "")
    task = asyncio.create_task(server.run())
    with pytest.raises(Down, match="no address of the server's own") as caught:
        await server.read()
    assert caught.value.reason == "unreachable"
    assert not heard
    task.cancel()
    await asyncio.wait({task})


@pytest.mark.parametrize(
    ("local", "peer", "same"),
    [
        ("10.0.0.7", "10.0.0.7", True),
        ("127.0.0.1", "127.0.0.2", True),
        ("::1", "::1", True),
        ("10.0.0.7", "10.0.0.8", False),
        ("fe80::1%eth0", "fe80::2%eth0", False),
        ("2001:db8::1", "2001:db8::2", False),
    ],
)
def test_same_host(local: str, peer: str, same: bool) -> None:  # noqa: FBT001
    """A connection that stays in its namespace has one address twice, or one of the loopback device."""
    assert client_module._same_host(local, peer) is same
