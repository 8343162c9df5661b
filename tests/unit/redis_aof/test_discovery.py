"""Servers found by their processes: here, in other network namespaces, named as well, lying, and gone."""

from __future__ import annotations

import asyncio
import os
import shutil
import subprocess
import sys
from contextlib import ExitStack
from typing import TYPE_CHECKING

import pytest

from shoal.redis.discovery import _target, find_servers
from shoal.redis.targets import Target

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from pathlib import Path

    from tests.unit.redis_aof.conftest import RealServer, StartRedis, Watch


def found_target(pid: int) -> Target | None:
    """Return what discovery takes a process for; fails if it does not find it."""
    (found,) = [one for one in find_servers("/proc") if one.pid == pid]
    return found.target


@pytest.fixture
def imposter(tmp_path: Path) -> Iterator[Callable[[str], int]]:
    """Return a starter of processes that are called redis-server, give themselves any title, and do nothing."""
    program = tmp_path / "redis-server"
    shutil.copy("/bin/cat", program)
    with ExitStack() as stack:

        def start(title: str) -> int:
            process = subprocess.Popen([title], executable=program, stdin=subprocess.PIPE)
            stack.callback(process.wait)
            stack.callback(process.kill)
            assert process.stdin
            stack.callback(process.stdin.close)
            return process.pid

        yield start


def test_a_server_is_found(start_redis: StartRedis) -> None:
    """Its title tells where it listens; its child, which rewrites a file under the same name, is none."""
    server = start_redis("--rdb-key-save-delay", "1000000")
    assert found_target(server.process.pid) == Target(f"127.0.0.1:{server.port}", "127.0.0.1", server.port, login=None)
    server.ask("DEBUG", "POPULATE", "100")
    server.ask("BGSAVE")
    assert server.info()["rdb_bgsave_in_progress"] == "1"
    with open(f"/proc/{server.process.pid}/task/{server.process.pid}/children") as file:
        children = set(map(int, file.read().split()))
    assert children
    assert not {one.pid for one in find_servers("/proc")} & children


def test_a_unix_socket_is_found(start_redis: StartRedis, tmp_path: Path) -> None:
    """A server without a port is reached by its path, in its own file system."""
    path = tmp_path / "redis.sock"
    server = start_redis("--unixsocket", str(path), cli=("-s", str(path)), port=0)
    pid = server.process.pid
    assert found_target(pid) == Target(str(path), path=f"/proc/{pid}/root{path}", login=None)


@pytest.mark.parametrize(
    ("title", "name"),
    [
        ("redis-server *:6379", "127.0.0.1:6379"),
        ("/usr/bin/redis-server 0.0.0.0:6379 [cluster]", "127.0.0.1:6379"),
        ("valkey-server 10.0.0.7:7000", "10.0.0.7:7000"),
        ("redis-server ::1:6379", "[::1]:6379"),
        ("redis-server -::1:6379", "[::1]:6379"),
        ("keydb-server localhost:6379 [sentinel]", "127.0.0.1:6379"),
        ("redis-server unixsocket:/run/r.sock", "/run/r.sock"),
        ("redis-server unixsocket:/run/" + "r" * 120, None),
        ("redis-server", None),
        ("redis-server /etc/redis.conf", None),
        ("redis-server cache.example:6379", None),
        ("redis-server 127.0.0.1:0", None),
        ("redis-server 127.0.0.1:65536", None),
        ("redis-server 127.0.0.1:123456", None),
        ('redis-server 127.0.0.1"\n:6379', None),
        ("redis-server ٣.0.0.1:6379", None),
        ("", None),
    ],
)
def test_titles(title: str, name: str | None) -> None:
    """Titles as servers write them, and those that tell nothing: no name is ever looked up for a process title."""
    target = _target(title, "/proc", 7, elsewhere=False)
    assert (target.name if target else None) == name
    assert target is None or (target.login is None and target.namespace_of is None)


async def test_found_and_named(start_redis: StartRedis, watch: Watch) -> None:
    """A server that is both is watched once, as it was named; one that ends is no longer watched."""
    named, found = await asyncio.to_thread(lambda: (start_redis(), start_redis()))
    watching = await watch(f"redis://localhost:{named.port}", redis_discover="true")
    # Its process is known from the first answer on.
    await watching.scrape()
    reasons = await watching.reasons()
    assert reasons[f"localhost:{named.port}"] == ""
    assert f"127.0.0.1:{named.port}" not in reasons
    assert reasons[f"127.0.0.1:{found.port}"] == ""
    await asyncio.to_thread(found.stop)
    assert f"127.0.0.1:{found.port}" not in await watching.reasons()


async def test_no_password_for_what_is_found(
    start_redis: StartRedis, watch: Watch, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A found server that wants a password is `auth`: anyone can call a process redis-server, and wait for one."""
    monkeypatch.setenv("SHOAL_REDIS_PASSWORD", "secret1")
    server = await asyncio.to_thread(start_redis, config="requirepass secret1\n")
    watching = await watch(redis_discover="true")
    assert (await watching.reasons())[f"127.0.0.1:{server.port}"] == "auth"
    log = await asyncio.to_thread(server.ask, "-a", "secret1", "--no-auth-warning", "INFO", "commandstats")
    assert "cmdstat_auth:calls=1," in log, "the one of redis-cli"


async def test_imposters(imposter: Callable[[str], int], watch: Watch) -> None:
    """Processes that only call themselves servers, even ten and two with one address, cost a refusal each."""
    titles = [f"redis-server 127.0.0.{number}:1" for number in range(2, 12)]
    await asyncio.to_thread(lambda: [imposter(title) for title in (*titles, titles[0], "redis-server", titles[-1])])
    watching = await watch(redis_discover="true")
    found = await watching.scrape()
    assert len(found["shoal_redis_up"]) <= 10
    assert found["shoal_redis_servers_skipped"][()] >= 3
    assert {
        labels[-1]
        for labels in found["shoal_redis_up"]
        if labels[0].startswith("127.0.0.") and labels[0].endswith(":1")
    } == {"refused"}


@pytest.fixture
def elsewhere(start_redis: StartRedis) -> RealServer:
    """Return a server in a network namespace of its own."""
    # redis-cli does not see it, so it is asked inside.
    program = ("unshare", "--net", "sh", "-c", 'ip link set lo up && exec redis-server "$@"', "sh")
    return start_redis(program=program, inside=True)


@pytest.mark.root
async def test_another_network_namespace(elsewhere: RealServer, watch: Watch) -> None:
    """A server in another namespace is left out and counted, with a signal that says so, unless it may be entered."""
    name = f"127.0.0.1:{elsewhere.port}"
    outside = await watch(redis_discover="true")
    found = await outside.scrape()
    assert name not in await outside.reasons()
    assert found["shoal_redis_servers_skipped"][()] >= 1
    assert found["shoal_signal_available"]["redis_aof_namespaces", "not_enabled"] == 0
    inside = await watch(redis_discover="true", netns_enter="true")
    assert (await inside.reasons())[name] == ""
    found = await inside.scrape()
    assert found["shoal_signal_available"]["redis_aof_namespaces", ""] == 1
    assert any(labels[0] == name for labels in found["shoal_redis_disk_info"])
    own = await asyncio.to_thread(os.readlink, "/proc/self/ns/net")
    assert {
        await asyncio.to_thread(os.readlink, f"/proc/self/task/{task}/ns/net")
        for task in await asyncio.to_thread(os.listdir, "/proc/self/task")
    } == {own}
    await asyncio.to_thread(elsewhere.stop)
    assert name not in await inside.reasons()


def test_nothing_is_imported_for_nobody() -> None:
    """An exporter without servers to watch loads neither redis-py nor psutil, and says that nothing was asked for."""
    program = """
import asyncio, sys
from shoal.collectors import load
from shoal.scrape import Scraper
from shoal.settings import resolve
async def main():
    collector = load("redis_aof")(resolve({}, {}))
    scraper = Scraper(collector.settings.roots, {"redis_aof": collector})
    await scraper.start()
    for family in await scraper.scrape(["redis_aof"], 5):
        for labels, value in family.samples:
            print(family.metric.name, *labels, value)
    await scraper.stop()
asyncio.run(main())
print(sorted({"redis", "psutil"} & set(sys.modules)))
"""
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    *lines, modules = done.stdout.splitlines()
    assert modules == "[]"
    assert [line for line in lines if not line.startswith("shoal_scrape_")] == [
        f"shoal_signal_available redis_aof_{signal} not_enabled 0"
        for signal in ("servers", "namespaces", "config", "latency", "disk")
    ]


async def test_a_proc_that_cannot_be_listed(watch: Watch, monkeypatch: pytest.MonkeyPatch) -> None:
    """Discovery that fails is a reason of the signal, and those that were named are watched all the same."""

    def refuse(*_: object) -> list[int]:
        raise PermissionError(13, "Permission denied")

    watching = await watch("redis://127.0.0.1:1", redis_discover="true")
    await watching.scrape()
    monkeypatch.setattr("psutil._pslinux.pids", refuse)
    monkeypatch.setattr("psutil.pids", refuse)
    found = await watching.scrape()
    assert found["shoal_signal_available"]["redis_aof_servers", "no_permission"] == 0
    assert "127.0.0.1:1" in {labels[0] for labels in found["shoal_redis_up"]}
