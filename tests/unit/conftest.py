"""Fixtures of the tests above the kernel: collectors made to order, the application on a socket, the real process."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
import time
import urllib.error
import urllib.request
from contextlib import ExitStack
from dataclasses import dataclass
from typing import TYPE_CHECKING, Protocol, cast

import pytest
from aiohttp.test_utils import TestClient, TestServer

from shoal.collectors import Collector
from shoal.families import Family, Metric
from shoal.kernel.files import Roots
from shoal.scrape import Scraper
from shoal.server import application
from shoal.settings import resolve

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Awaitable, Callable, Iterator, Mapping
    from pathlib import Path

    from aiohttp import web

TOY = Metric("shoal_toy", "gauge", "A number that a test chose.", "a test", ("which",))


class MakeCollector(Protocol):
    """The type of the fixture `make_collector`."""

    def __call__(self, name: str, read: Callable[[], object], signals: tuple[str, ...] = ()) -> Collector:
        """Make a collector of this name whose `read` calls the function, in a worker thread."""


@pytest.fixture
def make_collector() -> MakeCollector:
    """Return a maker of collectors that do what a test wants."""
    settings = resolve({}, {})

    def make(name: str, read: Callable[[], object], signals: tuple[str, ...] = ()) -> Collector:
        body = {"name": name, "metrics": (TOY,), "signals": signals, "read": lambda _self, _node: read()}
        kind = cast(type[Collector], type("Toy", (Collector,), body))
        return kind(settings)

    return make


@pytest.fixture
def toy() -> Callable[[str, float], list[Family]]:
    """Return a maker of what a collector returns when all is well: one family with one sample."""
    return lambda which, value: [Family(TOY, [((which,), value)])]


@pytest.fixture
def scraper_of() -> Callable[..., Scraper]:
    """Return a maker of scrapers with the given collectors, on this machine."""
    return lambda *collectors: Scraper(Roots(), {collector.name: collector for collector in collectors})


@pytest.fixture
async def serve() -> AsyncIterator[Callable[..., Awaitable[TestClient[web.Request, web.Application]]]]:
    """Return a function that serves a scraper, or collectors, on a socket and returns a client of it."""
    clients: list[TestClient[web.Request, web.Application]] = []

    async def serve(*served: Scraper | Collector) -> TestClient[web.Request, web.Application]:
        collectors = {one.name: one for one in served if isinstance(one, Collector)}
        scrapers = [one for one in served if isinstance(one, Scraper)]
        client = TestClient(TestServer(application(scrapers[0] if scrapers else Scraper(Roots(), collectors))))
        clients.append(client)
        await client.start_server()
        return client

    yield serve
    for client in clients:
        await client.close()


@dataclass(frozen=True, slots=True)
class Answer:
    """What an HTTP server said."""

    status: int
    headers: Mapping[str, str]
    body: bytes

    @property
    def text(self) -> str:
        """The body as text."""
        return self.body.decode()


@dataclass(frozen=True, slots=True)
class Exporter:
    """A running exporter process, its address and the file that its standard error goes to."""

    process: subprocess.Popen[bytes]
    log_file: Path
    url: str

    @property
    def log(self) -> str:
        """What it has said so far."""
        return self.log_file.read_text()

    def get(self, path: str = "/metrics", **headers: str) -> Answer:
        """Ask for a path; underscores in header names stand for dashes."""
        request = urllib.request.Request(self.url + path)  # noqa: S310  (our own)
        for name, value in headers.items():
            request.add_header(name.replace("_", "-"), value)
        try:
            with urllib.request.urlopen(request, timeout=30) as answer:  # noqa: S310  (our own)
                return Answer(answer.status, dict(answer.headers), answer.read())
        except urllib.error.HTTPError as error:
            with error:
                return Answer(error.code, dict(error.headers), error.read())

    def stop(self, number: signal.Signals = signal.SIGTERM) -> tuple[int, float]:
        """Send a signal and return the exit status and the seconds that it took."""
        began = time.monotonic()
        self.process.send_signal(number)
        status = self.process.wait(timeout=20)
        return status, time.monotonic() - began


class StartExporter(Protocol):
    """The type of the fixture `start_exporter`."""

    def __call__(self, *arguments: str, program: tuple[str, ...] = ("-m", "shoal"), **environment: str) -> Exporter:
        """Start an exporter on a free port and wait until it listens."""


@pytest.fixture
def clean_environment() -> dict[str, str]:
    """Return this process's environment without variables that the exporter reads."""
    return {key: value for key, value in os.environ.items() if not key.startswith("SHOAL_")}


@pytest.fixture
def start_exporter(tmp_path: Path, clean_environment: dict[str, str]) -> Iterator[StartExporter]:
    """Return a starter of real exporter processes, which are killed when the test ends."""
    with ExitStack() as stack:

        def start(*arguments: str, program: tuple[str, ...] = ("-m", "shoal"), **environment: str) -> Exporter:
            log_file = tmp_path / "exporter.log"
            command = [sys.executable, *program, "--web.listen-address=127.0.0.1:0", *arguments]
            with log_file.open("wb") as log:
                process = subprocess.Popen(
                    command, stdout=subprocess.PIPE, stderr=log, env=clean_environment | environment
                )
            stack.callback(_end, process)
            until = time.monotonic() + 60
            while not (match := re.search(r"listening.*?127\.0\.0\.1:(\d+)", log_file.read_text())):
                assert process.poll() is None, f"it ended with {process.returncode}: {log_file.read_text()}"
                assert time.monotonic() < until, f"it does not listen: {log_file.read_text()}"
                time.sleep(0.02)
            return Exporter(process, log_file, f"http://127.0.0.1:{match[1]}")

        yield start


def _end(process: subprocess.Popen[bytes]) -> None:
    process.kill()
    process.wait()
    if process.stdout:
        process.stdout.close()
