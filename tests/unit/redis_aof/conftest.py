"""Real redis-servers of the tests' own, servers that only pretend, and the collector with its background watching."""

from __future__ import annotations

import asyncio
import contextlib
import os
import shutil
import signal
import socket
import subprocess
import time
from contextlib import ExitStack
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Protocol

import pytest
from tests.unit.outputs import samples

from shoal.collectors import load
from shoal.scrape import Scraper
from shoal.settings import resolve

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
    from pathlib import Path

    from tests.unit.outputs import Samples

    from shoal.collectors import Collector

SHIM = """
#define _GNU_SOURCE
#include <dlfcn.h>
#include <stdio.h>
#include <stdlib.h>
#include <time.h>

/* Flushes take as many milliseconds as the file named by SLOW_FSYNC says, and are not done. */
int fdatasync(int fd) {
    (void)fd;
    int milliseconds = 0;
    FILE *file = fopen(getenv("SLOW_FSYNC"), "r");
    if (file) {
        if (fscanf(file, "%d", &milliseconds) != 1) milliseconds = 0;
        fclose(file);
    }
    struct timespec wait = {milliseconds / 1000, milliseconds % 1000 * 1000000L};
    nanosleep(&wait, NULL);
    return 0;
}
int fsync(int fd) { return fdatasync(fd); }
"""


def free_port() -> int:
    """Return a TCP port of the loopback address that nobody listens on."""
    with socket.socket() as sock:
        sock.bind(("127.0.0.1", 0))
        port: int = sock.getsockname()[1]
        return port


@dataclass(slots=True)
class RealServer:
    """A redis-server that a test started; `cli` are the arguments with which redis-cli reaches it."""

    command: list[str]
    cli: list[str]
    port: int
    directory: Path
    environment: dict[str, str]
    inside: bool
    process: subprocess.Popen[bytes] = field(init=False)

    def start(self) -> None:
        """Start it and wait until it answers, with an error if need be."""
        self.process = subprocess.Popen(
            self.command, env=os.environ | self.environment, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
        )
        until = time.monotonic() + 20
        while not self.ask("PING").strip():
            assert self.process.poll() is None, (self.directory / "log").read_text()
            assert time.monotonic() < until
            time.sleep(0.02)

    def ask(self, *words: str) -> str:
        """Return what redis-cli prints for a command; "" if nobody listens."""
        enter = ["nsenter", "--net", "--target", str(self.process.pid)] if self.inside else []
        command = [*enter, "redis-cli", *self.cli, *words]
        done = subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)
        return "" if "Could not connect" in done.stderr + done.stdout else done.stdout

    def info(self) -> dict[str, str]:
        """Return redis-cli's INFO as {field: text}."""
        return dict(line.split(":", 1) for line in self.ask("INFO").splitlines() if ":" in line)

    def stop(self) -> None:
        """End it without ceremony."""
        self.process.send_signal(signal.SIGCONT)
        self.process.kill()
        self.process.wait()


class StartRedis(Protocol):
    """The type of the fixture `start_redis`."""

    def __call__(  # noqa: PLR0913  (each is named)
        self,
        *options: str,
        cli: tuple[str, ...] = (),
        config: str = "",
        program: tuple[str, ...] = ("redis-server",),
        port: int | None = None,
        environment: dict[str, str] | None = None,
        inside: bool = False,
    ) -> RealServer:
        """Start a redis-server; `program` is what runs it, `cli` how redis-cli reaches it, `port` 0 for none.

        With `inside` redis-cli is run in the server's network namespace.
        """


@pytest.fixture
def start_redis(tmp_path: Path) -> Iterator[StartRedis]:
    """Return a starter of redis-servers on free ports, with the append-only file on; they end with the test."""
    if not shutil.which("redis-server"):
        pytest.skip("needs redis-server")
    with ExitStack() as stack:

        def start(  # noqa: PLR0913  (see above)
            *options: str,
            cli: tuple[str, ...] = (),
            config: str = "",
            program: tuple[str, ...] = ("redis-server",),
            port: int | None = None,
            environment: dict[str, str] | None = None,
            inside: bool = False,
        ) -> RealServer:
            port = free_port() if port is None else port
            directory = tmp_path / f"redis-{port}"
            directory.mkdir()
            (directory / "redis.conf").write_text(config)
            command = [*program, str(directory / "redis.conf"), "--port", str(port), "--dir", str(directory)]
            command += [
                "--logfile",
                str(directory / "log"),
                "--appendonly",
                "yes",
                "--save",
                "",
                "--enable-debug-command",
                "yes",
                *options,
            ]
            server = RealServer(command, [*(cli or ("-p", str(port)))], port, directory, environment or {}, inside)
            stack.callback(server.stop)
            server.start()
            return server

        yield start


@pytest.fixture(scope="session")
def slow_fsync(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a library to preload that makes flushes take as long as a file says, compiled here."""
    if not shutil.which("gcc"):
        pytest.skip("needs gcc")
    directory = tmp_path_factory.mktemp("shim")
    (directory / "shim.c").write_text(SHIM)
    library = directory / "shim.so"
    subprocess.run(["gcc", "-shared", "-fPIC", "-Wall", "-Werror", "-o", library, directory / "shim.c"], check=True)
    return library


@pytest.fixture
async def pretend() -> AsyncIterator[Callable[[Callable[[bytes], bytes | None]], Awaitable[str]]]:
    """Return a starter of servers that answer each command (in lower case) as a function says: None says nothing.

    What it returns is the server's address. An answer of b"" ends the connection.
    """
    servers: list[asyncio.Server] = []

    async def start(answer: Callable[[bytes], bytes | None]) -> str:
        async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
            with contextlib.suppress(OSError, asyncio.IncompleteReadError, asyncio.CancelledError):
                while True:
                    reply = answer(await _command(reader))
                    if reply == b"":
                        break
                    if reply is not None:
                        writer.write(reply)
                        await writer.drain()
            writer.close()

        server = await asyncio.start_server(serve, "127.0.0.1", 0)
        servers.append(server)
        host, port = server.sockets[0].getsockname()
        return f"{host}:{port}"

    yield start
    for server in servers:
        server.close()


async def _command(reader: asyncio.StreamReader) -> bytes:
    words = []
    for _ in range(int((await reader.readuntil(b"\r\n"))[1:])):
        length = int((await reader.readuntil(b"\r\n"))[1:])
        words.append((await reader.readexactly(length + 2))[:-2])
    return b" ".join(words).lower()


@dataclass(slots=True)
class Watching:
    """The collector at work, scraped as the exporter does it."""

    collector: Collector
    scraper: Scraper
    took: float = 0.0

    async def scrape(self) -> Samples:
        """Scrape once; return {metric: {labels: value}}. Labels are left without the server where there is but one."""
        began = time.monotonic()
        families = await self.scraper.scrape(["redis_aof"], 9.5)
        self.took = time.monotonic() - began
        return samples(families)

    async def reasons(self) -> dict[str, str]:
        """Scrape; return {server: reason}, "" for those that are up."""
        return {labels[0]: labels[-1] for labels in (await self.scrape()).get("shoal_redis_up", {})}

    async def until(self, server: str, reason: str, within: float = 15.0) -> None:
        """Scrape until a server is in this state."""
        end = time.monotonic() + within
        while (found := (await self.reasons()).get(server)) != reason:
            assert time.monotonic() < end, f"{server} is {found!r}, not {reason!r}"
            await asyncio.sleep(0.1)

    def slow_pings(self, found: Samples, server: str, above: str) -> float:
        """Return how many PINGs of a server took longer than the bucket `above`."""
        buckets = {
            labels[-1]: value
            for labels, value in found["shoal_redis_ping_duration_seconds"].items()
            if labels[0] == server
        }
        return buckets["+Inf"] - buckets[above]


class Watch(Protocol):
    """The type of the fixture `watch`."""

    async def __call__(self, *targets: str, **options: str) -> Watching:
        """Watch these addresses; further options have underscores for the first dot."""


@pytest.fixture
async def watch() -> AsyncIterator[Watch]:
    """Return a starter of collectors, which are stopped when the test ends."""
    started: list[Scraper] = []

    async def start(*targets: str, **options: str) -> Watching:
        flags = {key.replace("_", ".", 1).replace("_", "-"): value for key, value in options.items()}
        settings = await asyncio.to_thread(resolve, {"redis.target": ",".join(targets), **flags}, {})
        collector = await asyncio.to_thread(lambda: load("redis_aof")(settings))
        scraper = Scraper(settings.roots, {"redis_aof": collector})
        started.append(scraper)
        await scraper.start()
        return Watching(collector, scraper)

    yield start
    for scraper in started:
        await scraper.stop()
    assert not [task for task in asyncio.all_tasks() if "Server.run" in repr(task) or "_receive" in repr(task)]
