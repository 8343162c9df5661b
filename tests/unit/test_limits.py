"""What many clients, slow ones and hostile ones can take from a real server: a little, and nobody else's scrape."""

from __future__ import annotations

import asyncio
import contextlib
import os
import random
import re
import ssl
import subprocess
import time
from base64 import b64encode
from collections import Counter
from pathlib import Path
from typing import TYPE_CHECKING, Any

import bcrypt
import pytest

from shoal.settings import OPTIONS

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Awaitable, Callable, Iterable, Iterator

    from tests.unit.conftest import Exporter, StartExporter

pytestmark = pytest.mark.slow

ONE_COLLECTOR = tuple(
    f"--no-{option.key}"
    for option in OPTIONS
    if option.key.startswith("collector.") and option.key != "collector.pressure"
)
# As the command; prints at the end how often collectors ran and answers were made, and does first what a test wants:
# a collector may wait until so many have asked, or until a file is there, however long that takes on a slow machine.
COUNTED = """
import os, resource, sys, time
from shoal import listener, scrape, server
from shoal.cli import main
runs, made, asked, samples, read, body = 0, 0, 0, 0, scrape._read, server.Metrics._body
handle, ready = server.Metrics.handle, lambda: True
{}
async def heard(metrics, request):
    global asked
    asked += 1
    return await handle(metrics, request)
def counted(run):
    global runs
    runs += 1
    until = time.monotonic() + 100
    while not ready() and time.monotonic() < until:
        time.sleep(0.01)
    families, spent = read(run)
    for family in families[:1]:
        family.samples.extend((("x" * 400 + str(n),) * len(family.metric.labels), 1) for n in range(samples))
    return families, spent
def rendered(*arguments):
    global made
    made += 1
    return body(*arguments)
async def stopped(scraper):
    print(runs, made, flush=True)
    await stop(scraper)
scrape._read, server.Metrics._body, stop, scrape.Scraper.stop = counted, rendered, scrape.Scraper.stop, stopped
server.Metrics.handle = heard
sys.exit(main())
"""
SCRAPE = b"GET /metrics HTTP/1.1\r\nHost: x\r\nX-Prometheus-Scrape-Timeout-Seconds: 110\r\n\r\n"
READY = b"GET /-/ready HTTP/1.1\r\nHost: x\r\n\r\n"
LAST = b"Host: x\r\nConnection: close\r\n"


def program(first: str = "") -> tuple[str, str]:
    """Return how to run the exporter that counts."""
    return ("-c", COUNTED.format(first))


def port_of(exporter: Exporter) -> int:
    """Return where an exporter listens."""
    return int(exporter.url.rpartition(":")[2])


def resident(exporter: Exporter) -> int:
    """Return the memory that an exporter has, in bytes."""
    text = Path(f"/proc/{exporter.process.pid}/smaps_rollup").read_text()
    return int(re.findall(r"^Private_Dirty: +(\d+) kB", text, re.MULTILINE)[0]) * 1024


def descriptors(exporter: Exporter) -> int:
    """Return how many descriptors an exporter has open."""
    return len(os.listdir(f"/proc/{exporter.process.pid}/fd"))


def kernel_memory(port: int) -> int:
    """Return the bytes that the kernel keeps for what is written to the connections of a server and not yet read."""
    text = subprocess.run(["ss", "-tmnH", "sport", f"= :{port}"], capture_output=True, text=True, check=True).stdout
    queued = re.findall(r"skmem:.*?,w(\d+),", text)
    assert queued
    return sum(map(int, queued))


def work_of(exporter: Exporter) -> tuple[int, int]:
    """End an exporter and return how often its collectors ran, and how many answers of /metrics were made of that.

    It ends as it should, and has not lost its composure.
    """
    status, _ = exporter.stop()
    assert exporter.process.stdout
    assert status == 0, exporter.log
    assert "Traceback" not in exporter.log
    assert "level=error" not in exporter.log
    runs, made = exporter.process.stdout.read().split()
    return int(runs), int(made)


def refused(exporter: Exporter) -> dict[str, int]:
    """Return what an exporter says that it refused, by reason."""
    found = re.findall(r'^shoal_web_refused_total\{reason="(\w+)"\} (\d+)$', exporter.get().text, re.MULTILINE)
    return {reason: int(value) for reason, value in found}


class Client:
    """One connection."""

    def __init__(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        """Speak by these."""
        self.reader, self.writer = reader, writer

    @classmethod
    async def open(cls, port: int, **options: Any) -> Client:
        """Connect."""
        return cls(*await asyncio.open_connection("127.0.0.1", port, **options))

    async def said(self, request: bytes, seconds: float = 110) -> bytes:
        """Send something and return all that is answered until the connection ends."""
        with contextlib.suppress(ConnectionError):
            self.writer.write(request)
            if not request.endswith(b"\r\n\r\n"):
                # More might come; who says that there is nothing more ends the connection, before the answer it may be.
                self.writer.write_eof()
            async with asyncio.timeout(seconds):
                return await self.reader.read()
        return b""

    async def is_open(self) -> bool:
        """Tell whether the server has not ended it."""
        try:
            async with asyncio.timeout(0.01):
                return bool(await self.reader.read(1))
        except TimeoutError:
            return True
        except ConnectionError:
            return False

    async def close(self) -> None:
        """End it at once."""
        self.writer.transport.abort()
        await asyncio.sleep(0)


@contextlib.asynccontextmanager
async def many(port: int, number: int, **options: Any) -> AsyncIterator[list[Client]]:
    """Open so many connections that say nothing, and end them when the block ends."""
    clients: list[Client] = []
    try:
        for _ in range(number):
            # One after the other: what was opened is closed, should the next one fail.
            clients.append(await Client.open(port, **options))  # noqa: PERF401
        yield clients
    finally:
        for client in clients:
            await client.close()


async def ask(port: int, request: bytes, **options: Any) -> bytes:
    """Return what is answered to one request on a connection of its own, which ends with it."""
    async with many(port, 1, **options) as (client,):
        return await client.said(request.replace(b"Host: x\r\n", LAST))


async def together(asked: Iterable[Awaitable[bytes]]) -> list[bytes]:
    """Return all answers."""
    return list(await asyncio.gather(*asked))


async def until(condition: Callable[[], object]) -> None:
    """Return when something is true, of which a slow machine may take its time."""
    async with asyncio.timeout(60):
        while not condition():  # noqa: ASYNC110  (another process makes it true)
            await asyncio.sleep(0.05)


def status(answer: bytes) -> int:
    """Return the status of an answer, 0 if there is none."""
    return int(answer.split(b" ", 2)[1]) if answer.startswith(b"HTTP/1.") else 0


@pytest.fixture
def secured(tmp_path: Path) -> tuple[str, dict[str, Any]]:
    """Make a web configuration with TLS and a password, and return its flag and how a client connects."""
    command = "openssl req -x509 -newkey ec -pkeyopt ec_paramgen_curve:prime256v1 -nodes -keyout key.pem -out cert.pem"
    name = ["-subj", "/CN=x", "-addext", "subjectAltName=IP:127.0.0.1"]
    subprocess.run([*command.split(), *name], cwd=tmp_path, check=True, capture_output=True)
    hashed = bcrypt.hashpw(b"secret", bcrypt.gensalt(8)).decode()
    (tmp_path / "web.yml").write_text(
        f"tls_server_config: {{cert_file: cert.pem, key_file: key.pem}}\nbasic_auth_users: {{a: '{hashed}'}}\n"
    )
    context = ssl.create_default_context(cafile=str(tmp_path / "cert.pem"))
    context.verify_flags &= ~ssl.VERIFY_X509_STRICT
    return f"--web.config.file={tmp_path / 'web.yml'}", {"ssl": context}


def test_two_hundred_scrapes_at_once_are_one_run(start_exporter: StartExporter) -> None:
    """Everyone is answered, and the collector ran once."""
    exporter = start_exporter(*ONE_COLLECTOR, program=program("ready = lambda: asked >= 200"))
    answers = asyncio.run(together(ask(port_of(exporter), SCRAPE) for _ in range(200)))
    assert Counter(map(status, answers)) == {200: 200}
    assert all(b"shoal_node_pressure" in answer or b"shoal_pressure" in answer for answer in answers)
    assert work_of(exporter) == (1, 1)


def test_two_hundred_with_tls_and_password(start_exporter: StartExporter, secured: tuple[str, dict[str, Any]]) -> None:
    """The same, and one comparison of the password for all."""
    flag, options = secured
    exporter = start_exporter(flag, *ONE_COLLECTOR, program=program("ready = lambda: asked >= 200"))
    request = SCRAPE.replace(b"\r\n\r\n", b"\r\nAuthorization: Basic YTpzZWNyZXQ=\r\n\r\n")
    answers = asyncio.run(together(ask(port_of(exporter), request, **options) for _ in range(200)))
    assert Counter(map(status, answers)) == {200: 200}
    assert work_of(exporter) == (1, 1)


def test_who_asks_for_something_else_each_time(start_exporter: StartExporter) -> None:
    """Two hundred different questions at once: one run, sixteen answers, and the others are told to come back."""
    exporter = start_exporter(*ONE_COLLECTOR, program=program("ready = lambda: asked >= 200"))
    questions = [b"name[]=shoal_build_info&name[]=%d" % number for number in range(100)]
    requests = [SCRAPE.replace(b" HTTP", b"?%s HTTP" % each) for each in questions]
    requests += [SCRAPE.replace(b": 110", b": 110.%d" % number) for number in range(100, 200)]
    answers = asyncio.run(together(ask(port_of(exporter), request) for request in requests))
    assert Counter(map(status, answers)) == {200: 16, 503: 184}
    assert all(b"Retry-After: 1\r\n" in answer for answer in answers if status(answer) == 503)
    assert refused(exporter) == {"connections": 0, "answers": 184}
    assert work_of(exporter) == (2, 17)


def bad_requests(seed: int, many: int) -> Iterator[bytes]:
    """Yield what nobody should send, the same for the same seed."""
    chance = random.Random(seed)  # noqa: S311  (nothing is secret)
    noise = chance.randbytes
    made = (
        lambda: noise(chance.randrange(1, 400)),
        lambda: b"GET /metrics?collect[]=%s HTTP/1.1\r\n" % noise(8).hex().encode() + LAST + b"\r\n",
        lambda: b"GET /%s HTTP/1.1\r\n" % noise(20).hex().encode() + LAST + b"\r\n",
        lambda: b"GET /metrics?collect[]=pressure&exclude[]=pressure HTTP/1.1\r\n" + LAST + b"\r\n",
        lambda: b"POST /metrics HTTP/1.1\r\nContent-Length: 9\r\n" + LAST + b"\r\n" + b"x" * 5 + b"\r\n\r\n",
        lambda: b"POST / HTTP/1.1\r\nTransfer-Encoding: chunked\r\n\r\nfffffff\r\n" + noise(30),
        lambda: b"PUT /metrics HTTP/1.1\r\nContent-Encoding: gzip\r\nContent-Length: 50\r\n\r\n" + noise(50),
        lambda: b"GET /metrics HTTP/1.1\r\nContent-Length: x" + noise(4).hex().encode() + b"\r\n\r\n",
        lambda: b"GET /metrics HTTP/1.%c\r\n\r\n" % chance.randrange(128, 256),
        lambda: b"GET /metrics HTTP/1.1\r\n" + noise(30) + b"\r\n\r\n",
        lambda: b"GET /metrics HTTP/1.1\r\n" + b"X: y\r\n" * 300 + b"\r\n",
        lambda: b"GET /metrics HTTP/1.1\r\nX: " + b"y" * 9000 + b"\r\n\r\n",
        lambda: b"GET /" + b"y" * 9000 + b" HTTP/1.1\r\n\r\n",
        lambda: b"OPTIONS * HTTP/1.1\r\n" + LAST + b"\r\n",
        lambda: b"CONNECT x:1 HTTP/1.1\r\nHost: x\r\n\r\n" + noise(20),
        lambda: b"GET /-/ready HTTP/1.1\r\nUpgrade: websocket\r\nConnection: Upgrade\r\n\r\n" + noise(20),
        lambda: b"GET //../%2e%2e/metrics%00 HTTP/1.1\r\n" + LAST + b"\r\n",
        lambda: b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n" + noise(20),
        lambda: b"\x16\x03\x01\x02\x00" + noise(60),
        lambda: b"GET http://[::1/metrics HTTP/1.1\r\n" + LAST + b"\r\n",
        lambda: b"GET /metrics HTTP/1.1\r\nHost: x\r\n",
    )
    for number in range(many):
        yield made[number % len(made)]()


async def all_of(port: int, requests: Iterator[bytes], abreast: int = 16) -> Counter[int]:
    """Send them, so many at a time, each on a connection of its own; return how often each status was answered."""
    found: Counter[int] = Counter()

    async def one_after_the_other() -> None:
        for request in requests:
            async with many(port, 1) as (client,):
                found[status(await client.said(request))] += 1

    await asyncio.gather(*(one_after_the_other() for _ in range(abreast)))
    return found


@pytest.mark.timeout(900)
def test_ten_thousand_bad_requests(start_exporter: StartExporter) -> None:
    """No scrape for them, no error of ours, no memory, no descriptor; and who comes after them is answered."""
    exporter = start_exporter(*ONE_COLLECTOR, program=program())
    port = port_of(exporter)
    assert exporter.get().status == 200
    found = asyncio.run(all_of(port, bad_requests(1, 1000)))
    before = resident(exporter), descriptors(exporter)
    found += asyncio.run(all_of(port, bad_requests(2, 9000)))
    after = resident(exporter), descriptors(exporter)
    assert found.total() == 10_000
    assert found.keys() <= {0, 200, 400, 404, 405}, found
    assert found[400] > 4000
    assert found[404] > 1000
    assert after[0] - before[0] < 8 << 20
    assert after[1] <= before[1] + 2
    assert exporter.get().status == 200
    assert work_of(exporter) == (2, 2)


def test_a_stranger_does_not_write_the_log(start_exporter: StartExporter) -> None:
    """What is no HTTP is answered 400 and not logged: it may have a password in it, and would fill a disk."""
    exporter = start_exporter(*ONE_COLLECTOR, "--log.level=debug", program=program())
    before = exporter.log
    secret = b64encode(b"a:secret")
    for noise in (
        b"GET /metrics HTTP/1.1\r\nAuthorization Basic %s\r\n\r\n" % secret,
        b"GET /metrics HTTP/1.1\r\nHost: x\r\nAuthorization: Basic %s\x01\r\n\r\n" % secret,
        b"GET /%s\x7f HTTP/1.1\r\n\r\n" % secret,
        b"GET /metrics HTTP/1.1\r\nHost: x\r\nX: %s\r\n\r\n" % (secret * 1000),
    ):
        answer = asyncio.run(ask(port_of(exporter), noise))
        assert status(answer) == 400, answer
    assert exporter.log == before
    work_of(exporter)


def test_strangers_cause_no_scrape(start_exporter: StartExporter, tmp_path: Path) -> None:
    """Where there is a password, whoever does not know it makes no collector run, nor bcrypt more than now and then."""
    hashed = bcrypt.hashpw(b"secret", bcrypt.gensalt(10)).decode()
    (tmp_path / "web.yml").write_text(f"basic_auth_users: {{a: '{hashed}'}}\n")
    exporter = start_exporter(f"--web.config.file={tmp_path / 'web.yml'}", *ONE_COLLECTOR, program=program())

    def requests() -> Iterator[bytes]:
        for number in range(1000):
            path = (b"/metrics", b"/", b"/metrics?name[]=%d" % number)[number % 3]
            guess = (
                b"",
                b"Authorization: Basic junk\r\n",
                b"Authorization: Basic %s\r\n" % b64encode(b"a:%d" % number),
            )
            yield b"GET %s HTTP/1.1\r\n%s%s\r\n" % (path, LAST, guess[number // 3 % 3])

    found = asyncio.run(all_of(port_of(exporter), requests()))
    assert found.keys() == {401, 429}, found
    assert found.total() == 1000
    assert work_of(exporter) == (0, 0)


@pytest.mark.parametrize("first", ["", "resource.setrlimit(resource.RLIMIT_NOFILE, (64, 64))"], ids=["256", "64 files"])
def test_idle_connections_are_bounded(first: str, start_exporter: StartExporter) -> None:
    """However many come: the oldest go, the newest are served, and the collectors have descriptors left."""
    exporter = start_exporter(program=program(first))
    port, most = port_of(exporter), 16 if first else 256

    async def crowd() -> None:
        async with many(port, most + 100) as clients:
            async with asyncio.timeout(60):
                expected = [False] * 100 + [True] * most
                while [await client.is_open() for client in clients] != expected:  # noqa: ASYNC110  (the server does it)
                    await asyncio.sleep(0.1)
            text = (await ask(port, SCRAPE)).decode()
            assert re.findall(r'^shoal_scrape_collector_success\{collector="(\w+)"\} 0', text, re.MULTILINE) == []
            collectors = [one for one in OPTIONS if one.key.startswith("collector.")]
            assert text.count("\nshoal_scrape_collector_success{") == len(collectors)
            assert 'shoal_web_refused_total{reason="connections"} 101\n' in text
            # The last comer, which is served when it asks at last.
            assert status(await clients[-1].said(READY.replace(b"Host: x\r\n", LAST))) == 200

    asyncio.run(crowd())
    work_of(exporter)


def test_handshakes_are_bounded(start_exporter: StartExporter, secured: tuple[str, dict[str, Any]]) -> None:
    """Those that connect and say nothing make room for those that do."""
    flag, options = secured
    # None of them ends by itself.
    exporter = start_exporter(flag, *ONE_COLLECTOR, program=program("listener._HANDSHAKE = 1000.0"))
    port = port_of(exporter)

    async def crowd() -> None:
        async with many(port, 356):
            await until(lambda: descriptors(exporter) > 256)
            assert status(await ask(port, READY, **options)) == 200
            assert descriptors(exporter) < 256 + 40

    asyncio.run(crowd())
    work_of(exporter)


def test_who_waits_for_an_answer_is_not_sent_away(start_exporter: StartExporter, tmp_path: Path) -> None:
    """And those who have gone away without waiting leave nothing that waits for them."""
    ready, came = tmp_path / "ready", tmp_path / "came"
    first = f"ready = lambda: open({str(came)!r}, 'w') and os.path.exists({str(ready)!r})"
    exporter = start_exporter(*ONE_COLLECTOR, program=program(first))
    port = port_of(exporter)

    async def crowd() -> None:
        patient = asyncio.create_task(ask(port, SCRAPE))
        await until(came.exists)
        before = resident(exporter)
        for _ in range(1500):
            async with many(port, 1) as (client,):
                client.writer.write(SCRAPE)
                await client.writer.drain()
        assert resident(exporter) - before < 3 << 20
        assert not patient.done()
        async with many(port, 300):
            assert status(await ask(port, READY)) == 200
            assert not patient.done()
            ready.touch()
            assert status(await patient) == 200

    asyncio.run(crowd())
    work_of(exporter)


def test_who_does_not_read_keeps_little_and_not_for_ever(start_exporter: StartExporter) -> None:
    """Two hundred that ask for an answer of 8 MB and do not read it: less than that of memory for all, for 2 s."""
    exporter = start_exporter(*ONE_COLLECTOR, program=program("samples = 20_000; server._READING = 2.0"))
    port = port_of(exporter)
    assert len(exporter.get().body) > 8_000_000
    before = resident(exporter), descriptors(exporter)

    async def crowd() -> tuple[int, float]:
        async with many(port, 200, limit=1) as clients:
            await until(lambda: descriptors(exporter) > before[1] + 190)
            began, most = time.monotonic(), 0
            for client in clients:
                client.writer.write(SCRAPE)
            while descriptors(exporter) > before[1] + 5 and time.monotonic() - began < 60:
                most = max(most, resident(exporter))
                await asyncio.sleep(0.1)
            return most, time.monotonic() - began

    most, ended = asyncio.run(crowd())
    assert most - before[0] < 100 << 20
    assert 2 < ended < 60
    work_of(exporter)


def test_who_does_not_read_makes_room(start_exporter: StartExporter) -> None:
    """The kernel keeps little of what is on its way to him, and his connection ends when others want to come."""
    exporter = start_exporter(*ONE_COLLECTOR, program=program("samples = 20_000"))
    port, base = port_of(exporter), descriptors(exporter)

    async def crowd() -> None:
        async with many(port, 100, limit=1) as clients:
            for client in clients:
                client.writer.write(SCRAPE)
            # All have as much of it as there will be.
            queued = [-1, 0]
            while queued[-1] != queued[-2] or not queued[-1]:
                await asyncio.sleep(1)
                queued.append(kernel_memory(port))
            assert queued[-1] < 100 * 100_000
            async with many(port, 256):
                # Who is answered has come after them, so all of them have been accepted.
                assert status(await ask(port, READY)) == 200
                assert 250 < descriptors(exporter) - base < 262

    asyncio.run(crowd())
    work_of(exporter)


def test_what_a_client_sends_without_end(start_exporter: StartExporter) -> None:
    """Headers, a body, chunks, one request after the other without reading: it is cut off, or not read on."""
    exporter = start_exporter(*ONE_COLLECTOR, program=program())
    port = port_of(exporter)
    assert exporter.get().status == 200
    before = resident(exporter)

    async def pour(begins: bytes, again: bytes) -> None:
        async with many(port, 1) as (client,):
            with contextlib.suppress(ConnectionError, TimeoutError):
                client.writer.write(begins)
                async with asyncio.timeout(1.5):
                    for _ in range(100_000_000 // len(again)):
                        client.writer.write(again)
                        await client.writer.drain()

    async def streams() -> None:
        await asyncio.gather(
            pour(b"GET /metrics HTTP/1.1\r\n", (b"X: " + b"y" * 1000 + b"\r\n") * 50),
            pour(b"GET /metrics HTTP/1.1\r\nX: ", b"y" * 50_000),
            pour(b"POST /metrics HTTP/1.1\r\nContent-Length: 1000000000000\r\n\r\n", b"y" * 50_000),
            pour(
                b"POST /metrics HTTP/1.1\r\nTransfer-Encoding: chunked\r\n\r\n", b"c350\r\n" + b"y" * 50_000 + b"\r\n"
            ),
            pour(b"", READY * 1000),
        )

    asyncio.run(streams())
    assert resident(exporter) - before < 16 << 20
    assert exporter.get().status == 200
    work_of(exporter)
