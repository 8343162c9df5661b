"""The exporter as its clients see it: what they may ask for, what they get, and that they cannot harm each other."""

from __future__ import annotations

import asyncio
import contextlib
import gzip
import json
import logging
import os
import shutil
import socket
import sys
import threading
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import pytest
from aiohttp.test_utils import make_mocked_request
from prometheus_client.openmetrics.parser import text_string_to_metric_families as parse_openmetrics
from prometheus_client.parser import text_string_to_metric_families as parse_text

from shoal import __version__
from shoal.collectors import load
from shoal.families import Family, Metric
from shoal.kernel.files import Reason
from shoal.scrape import Scraper
from shoal.server import Metrics, _timeout, catalogue
from shoal.settings import resolve

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable, Iterable

    from aiohttp import web
    from aiohttp.test_utils import TestClient
    from tests.unit.conftest import MakeCollector, StartExporter

    Client = TestClient[web.Request, web.Application]
    Serve = Callable[..., Awaitable[Client]]

FIXTURES = Path(__file__).parent / "fixtures" / "6.1"
TEXT = "text/plain; version=0.0.4; charset=utf-8"
OPENMETRICS = "application/openmetrics-text; version=1.0.0; charset=utf-8"
# What Prometheus 2.53 and 3.5 send.
PROMETHEUS_2 = "application/openmetrics-text;version=1.0.0;q=0.5,application/openmetrics-text;version=0.0.1;q=0.4,text/plain;version=0.0.4;q=0.3,*/*;q=0.2"  # noqa: E501
PROMETHEUS_3 = "application/openmetrics-text;version=1.0.0;escaping=allow-utf-8;q=0.5,application/openmetrics-text;version=0.0.1;q=0.4,text/plain;version=1.0.0;escaping=allow-utf-8;q=0.3,text/plain;version=0.0.4;q=0.2,*/*;q=0.1"  # noqa: E501


TOY = Metric("shoal_toy", "gauge", "A number that a test chose.", "a test", ("which",))


def toy(which: str, value: float) -> list[Family]:
    """Return what a collector returns when all is well."""
    return [Family(TOY, [((which,), value)])]


def series(body: str, content_type: str) -> dict[str, float]:
    """Return {name{labels}: value} as prometheus_client's parser for the type sees it; a series twice is an error."""
    parse = cast("Callable[[str], Iterable[Any]]", parse_openmetrics if content_type == OPENMETRICS else parse_text)
    samples = [sample for family in parse(body) for sample in family.samples]
    found = {f"{sample.name}{sorted(sample.labels.items())}": sample.value for sample in samples}
    assert len(found) == len(samples)
    return found


@pytest.fixture
def node() -> Scraper:
    """Return a scraper with all collectors on the recorded 6.1 node."""
    paths = {f"path.{name}": str(FIXTURES / name.removesuffix("fs")) for name in ("procfs", "sysfs")}
    settings = resolve(paths | {"path.rootfs": str(FIXTURES / "rootfs")}, {})
    return Scraper(settings.roots, {name: load(name)(settings) for name in settings.collectors})


@pytest.mark.parametrize(
    ("accept", "expected"),
    [
        (None, TEXT),
        ("", TEXT),
        ("*/*", TEXT),
        ("text/html,application/xhtml+xml,*/*;q=0.8", TEXT),
        (PROMETHEUS_2, OPENMETRICS),
        (PROMETHEUS_3, OPENMETRICS),
        ("Application/OpenMetrics-Text", OPENMETRICS),
        ("application/openmetrics-text; version=junk", OPENMETRICS),
        ("application/openmetrics-text;q=0", TEXT),
        ("application/openmetrics-text;version=1.0.0;q=0.2,text/plain;version=0.0.4;q=0.7", TEXT),
        ("application/vnd.google.protobuf;proto=io.prometheus.client.MetricFamily;encoding=delimited", TEXT),
        (",;,q=,;;", TEXT),
        ("text/plain;version=" + "9" * 5000, TEXT),
        ("application/openmetrics-text;q=1e999", OPENMETRICS),
    ],
)
async def test_the_format_is_negotiated(
    accept: str | None,
    expected: str,
    make_collector: MakeCollector,
    serve: Serve,
) -> None:
    """What Prometheus prefers, the plain text for everyone else, and no error for what nobody would write."""
    client = await serve(make_collector("one", lambda: toy("a", 1)))
    async with client.get("/metrics", headers={} if accept is None else {"Accept": accept}) as answer:
        body = await answer.text()
    assert answer.status == 200
    assert answer.headers["Content-Type"] == expected
    assert answer.headers["Vary"] == "Accept, Accept-Encoding"
    assert body.endswith("# EOF\n") is (expected == OPENMETRICS)
    assert series(body, expected)["shoal_toy[('which', 'a')]"] == 1


@pytest.mark.parametrize(
    ("header", "zipped"),
    [
        ("gzip", True),
        ("deflate, GZIP;q=0.5", True),
        ("gzip; q=1.0", True),
        ("gzip;q=0", False),
        ("gzip;q=0.000", False),
        ("identity", False),
        ("", False),
        ("x-gzip-not", False),
        ("br;q=1, gzip;q=junk", True),
    ],
)
async def test_gzip_is_for_those_who_take_it(
    header: str,
    zipped: bool,  # noqa: FBT001  (a parameter)
    make_collector: MakeCollector,
    serve: Serve,
) -> None:
    """The body is the same; Prometheus always asks for it."""
    client = await serve(make_collector("one", lambda: toy("a", 1)))
    async with client.get(
        "/metrics", headers={"Accept-Encoding": header}, auto_decompress=False, params={"name[]": "shoal_toy"}
    ) as answer:
        body = await answer.read()
    assert answer.headers.get("Content-Encoding") == ("gzip" if zipped else None)
    text = gzip.decompress(body) if zipped else body
    assert text == b'# HELP shoal_toy A number that a test chose.\n# TYPE shoal_toy gauge\nshoal_toy{which="a"} 1\n'


@pytest.mark.parametrize("accept", [TEXT, OPENMETRICS])
async def test_a_scrape_of_a_recorded_node(accept: str, node: Scraper, serve: Serve) -> None:
    """All collectors at once: no series twice, nothing that is not in the catalogue, the exporter's own metrics too."""
    client = await serve(node)
    async with client.get("/metrics", headers={"Accept": accept}) as answer:
        found = series(await answer.text(), answer.headers["Content-Type"])
    names = {name.partition("[")[0] for name in found}
    assert {
        "shoal_pressure_some_seconds_total",
        "shoal_memory_current_bytes",
        "shoal_listen_queue_overflows_total",
        "process_start_time_seconds",
        "process_cpu_seconds_total",
        "process_resident_memory_bytes",
        "process_open_fds",
    } <= names
    assert {name for name in names if name.startswith("shoal_")} <= set(await asyncio.to_thread(catalogue))
    assert found[f"shoal_build_info[('python', '{sys.version.split()[0]}'), ('version', '{__version__}')]"] == 1
    for collector in node.collectors:
        assert found[f"shoal_scrape_collector_success[('collector', '{collector}')]"] == 1
        assert 0 < found[f"shoal_scrape_collector_duration_seconds[('collector', '{collector}')]"] < 60


async def test_no_series_twice_on_this_machine(serve: Serve) -> None:
    """The same for the machine that the tests run on, whatever it is."""
    client = await serve(await asyncio.to_thread(_of_this_machine))
    async with client.get("/metrics") as answer:
        found = series(await answer.text(), answer.headers["Content-Type"])
    assert any(name.startswith("shoal_node_memory_oom_kills_total") for name in found)


def _of_this_machine() -> Scraper:
    settings = resolve({}, {})
    return Scraper(settings.roots, {name: load(name)(settings) for name in settings.collectors})


@pytest.mark.parametrize(
    ("query", "collectors"),
    [
        ("", {"a", "b", "c"}),
        ("collect[]=a", {"a"}),
        ("collect[]=a&collect[]=c&collect[]=a", {"a", "c"}),
        ("collect%5B%5D=b", {"b"}),
        ("exclude[]=a", {"b", "c"}),
        ("exclude[]=a&exclude[]=b&exclude[]=c", set()),
        ("unknown=1", {"a", "b", "c"}),
    ],
)
async def test_collectors_are_chosen(
    query: str,
    collectors: set[str],
    make_collector: MakeCollector,
    serve: Serve,
) -> None:
    """Only those that are asked for run, and only they are in the answer."""
    client = await serve(*(make_collector(name, partial(toy, name, 1)) for name in "abc"))
    async with client.get(f"/metrics?{query}") as answer:
        found = series(await answer.text(), TEXT)
    assert answer.status == 200
    for name in "abc":
        assert (f"shoal_toy[('which', '{name}')]" in found) is (name in collectors)
        assert (f"shoal_scrape_collector_success[('collector', '{name}')]" in found) is (name in collectors)


@pytest.mark.parametrize(
    ("query", "sentence"),
    [
        ("collect[]=nope", "there is no collector 'nope' enabled here; there are a, b.\n"),
        ("exclude[]=a&exclude[]=zz", "there is no collector 'zz' enabled here; there are a, b.\n"),
        ("collect[]=", "there is no collector '' enabled here; there are a, b.\n"),
        ("collect[]=a&exclude[]=b", "collect[] and exclude[] cannot be combined; use one of them.\n"),
        ("collect[]=%0d%0aX: y", "there is no collector '\\r\\nX: y' enabled here; there are a, b.\n"),
    ],
)
async def test_collectors_that_are_not_there(
    query: str, sentence: str, make_collector: MakeCollector, serve: Serve
) -> None:
    """Unknown, switched off, both ways at once: a bad request that says what there is, and nothing runs."""
    read: list[str] = []

    def note() -> list[Family]:
        read.append("")
        return toy("a", 1)

    client = await serve(make_collector("a", note), make_collector("b", note))
    async with client.get(f"/metrics?{query}") as answer:
        assert (answer.status, await answer.text()) == (400, sentence)
    assert not read


async def test_metrics_are_chosen_by_name(node: Scraper, serve: Serve) -> None:
    """By the name that PromQL knows, in both formats; one that nobody has gives an empty answer."""
    client = await serve(node)
    query = "name[]=shoal_node_memory_oom_kills_total&name[]=process_cpu_seconds_total&name[]=shoal_build_info"
    for accept in (TEXT, OPENMETRICS):
        async with client.get(f"/metrics?{query}", headers={"Accept": accept}) as answer:
            found = series(await answer.text(), accept)
        assert {name.partition("[")[0] for name in found} == {part.partition("=")[2] for part in query.split("&")}
    for accept, empty in ((TEXT, ""), (OPENMETRICS, "# EOF\n")):
        async with client.get("/metrics?name[]=nope", headers={"Accept": accept}) as answer:
            assert (answer.status, await answer.text()) == (200, empty)


@pytest.mark.parametrize(
    ("header", "seconds"),
    [
        ("", 9.5),
        ("junk", 9.5),
        ("nan", 9.5),
        ("-3", 9.5),
        ("0", 9.5),
        ("10", 9.5),
        ("10.000000", 9.5),
        ("1", 0.8),
        ("0.1", 0.08),
        ("1e-300", 8e-301),
        ("60", 59.5),
        ("1e308", 119.5),
        ("inf", 119.5),
        ("9" * 4000, 119.5),
    ],
)
def test_the_deadline_is_inside_that_of_prometheus(header: str, seconds: float) -> None:
    """What is announced, less a margin to render and send; the default of 10 s for what makes no sense."""
    assert _timeout(header) == pytest.approx(seconds)


async def test_the_announced_deadline_is_kept(make_collector: MakeCollector, serve: Serve) -> None:
    """A collector that hangs costs a scrape with one second no more than that second."""
    release = threading.Event()
    hangs = make_collector("hangs", lambda: release.wait(20) and toy("late", 1))
    client = await serve(hangs, make_collector("good", lambda: toy("good", 1)))
    loop = asyncio.get_running_loop()
    began = loop.time()
    async with client.get("/metrics", headers={"X-Prometheus-Scrape-Timeout-Seconds": "0.5"}) as answer:
        found = series(await answer.text(), TEXT)
    assert 0.4 <= loop.time() - began < 2
    release.set()
    assert found["shoal_scrape_collector_success[('collector', 'hangs')]"] == 0
    assert found["shoal_toy[('which', 'good')]"] == 1


async def test_probes_and_unknown_paths(make_collector: MakeCollector, serve: Serve) -> None:
    """Probes answer without a scrape; what is not there is 404, what is not GET is 405; HEAD has no body."""
    read: list[str] = []

    def note() -> list[Family]:
        read.append("")
        return toy("a", 1)

    client = await serve(make_collector("one", note))
    for path in ("/-/healthy", "/-/ready"):
        async with client.get(path) as answer:
            assert (answer.status, await answer.text()) == (200, "ok\n")
    for path in ("/metric", "/metrics/", "/../etc/passwd", "/favicon.ico", "/-/"):
        async with client.get(path) as answer:
            assert answer.status == 404
            assert "Traceback" not in await answer.text()
    async with client.post("/metrics", data=b"x") as answer:
        assert answer.status == 405
    assert not read
    async with client.head("/metrics") as answer:
        assert (answer.status, await answer.read()) == (200, b"")
        assert answer.headers["Content-Type"] == TEXT
        assert int(answer.headers["Content-Length"]) > 100


async def test_the_page_has_every_signal_and_why(make_collector: MakeCollector, serve: Serve) -> None:
    """Which are there, which are not and for what reason, which collector failed and how; nothing is markup."""

    def raises() -> list[Family]:
        raise ValueError("<script>alert('&')</script>")

    some = make_collector("partial", lambda: toy("a", 1), ("there", "absent"))
    some.availability.absent["absent"] = (Reason.NO_PERMISSION, 'file <b>"x"</b> may not be read')
    client = await serve(some, make_collector("broken", raises, ("lost", "too")))
    async with client.get("/") as answer:
        page = await answer.text()
    assert answer.headers["Content-Type"] == "text/html; charset=utf-8"
    rows = [line for line in page.splitlines() if line.startswith("<tr><td>")]
    markup = "file &lt;b&gt;&quot;x&quot;&lt;/b&gt; may not be read"
    sentence = "ValueError: &lt;script&gt;alert(&#x27;&amp;&#x27;)&lt;/script&gt;"
    assert rows[:4] == [
        f"<tr><td>broken</td><td>lost</td><td>collector_failed</td><td>{sentence}</td></tr>",
        f"<tr><td>broken</td><td>too</td><td>collector_failed</td><td>{sentence}</td></tr>",
        "<tr><td>partial</td><td>there</td><td>available</td><td></td></tr>",
        f"<tr><td>partial</td><td>absent</td><td>no_permission</td><td>{markup}</td></tr>",
    ]
    assert "<tr><td>memory</td><td></td><td>switched off</td><td></td></tr>" in rows
    assert "<b>" not in page
    assert "<script>" not in page
    for link in ("/metrics", "/-/healthy", "/-/ready"):
        assert f'href="{link}"' in page


async def test_two_hundred_sockets_at_once_are_one_scrape(make_collector: MakeCollector, serve: Serve) -> None:
    """Everyone gets the same answer of one run, those with gzip and in the other format too."""
    release, reads = threading.Event(), iter(range(1000))

    def read() -> list[Family]:
        release.wait(20)
        return toy("reads", next(reads))

    client = await serve(make_collector("one", read))
    host, port = client.host, client.port
    kinds = [b"", b"Accept-Encoding: gzip\r\n", b"Accept: application/openmetrics-text\r\n"]

    async def ask(kind: bytes) -> tuple[bytes, bytes]:
        reader, writer = await asyncio.open_connection(host, port)
        writer.write(b"GET /metrics HTTP/1.1\r\nHost: x\r\n" + kind + b"Connection: close\r\n\r\n")
        answer = await reader.read()
        writer.close()
        await writer.wait_closed()
        return kind, answer

    asking = [asyncio.create_task(ask(kinds[number % 3])) for number in range(200)]
    server = cast(Any, client.server).runner.server
    async with asyncio.timeout(20):
        while len(server.connections) < 200:  # noqa: ASYNC110  (aiohttp has no event for it)
            await asyncio.sleep(0.01)
    await asyncio.sleep(0.1)
    release.set()
    answers = await asyncio.gather(*asking)
    assert next(reads) == 1
    bodies: dict[bytes, set[bytes]] = {}
    for kind, answer in answers:
        head, _, body = answer.partition(b"\r\n\r\n")
        assert head.startswith(b"HTTP/1.1 200 ")
        bodies.setdefault(kind, set()).add(gzip.decompress(body) if b"gzip" in kind else body)
    assert all(len(same) == 1 for same in bodies.values())
    assert all(b'shoal_toy{which="reads"} 0\n' in same.pop() for same in bodies.values())


async def test_a_client_that_goes_away(
    make_collector: MakeCollector,
    serve: Serve,
    caplog: pytest.LogCaptureFixture,
) -> None:
    """While the scrape runs, in the middle of the answer, with and without a reset: nobody else notices."""
    release = threading.Event()
    large = [(("x" * 500,), 1)] * 20_000
    family = toy("large", 1)[0]
    family.samples.extend(large)

    def read() -> list[Family]:
        release.wait(20)
        return [family]

    caplog.set_level(logging.INFO)
    client = await serve(make_collector("one", read))
    writers = []
    for _ in range(5):
        _, writer = await asyncio.open_connection(client.host, client.port)
        writer.write(b"GET /metrics HTTP/1.1\r\nHost: x\r\n\r\n")
        await writer.drain()
        writers.append(writer)
    waiting = asyncio.create_task(client.get("/metrics?name[]=shoal_build_info"))
    await asyncio.sleep(0.1)
    for number, writer in enumerate(writers[:4]):
        if number % 2:
            # A linger of zero: the kernel sends a reset.
            writer.get_extra_info("socket").setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, b"\1\0\0\0\0\0\0\0")
        writer.close()
    release.set()
    async with await waiting as answer:
        assert answer.status == 200
    await asyncio.sleep(0.2)
    writers[4].transport.abort()
    async with client.get("/metrics") as answer:
        assert len(await answer.read()) > 10_000_000
    assert [record.getMessage() for record in caplog.records if record.name != "aiohttp.access"] == []


async def test_a_request_that_is_cancelled_does_not_end_the_work_of_others(
    make_collector: MakeCollector, scraper_of: Callable[..., Scraper]
) -> None:
    """The server may cancel the handler of a client that is gone; the answer is also that of others."""
    release = threading.Event()

    def read() -> list[Family]:
        release.wait(20)
        return toy("shared", 1)

    metrics = Metrics(scraper_of(make_collector("one", read)))
    gone, stays = (asyncio.create_task(metrics.handle(make_mocked_request("GET", "/metrics"))) for _ in range(2))
    await asyncio.sleep(0.05)
    gone.cancel()
    await asyncio.sleep(0.05)
    release.set()
    assert 'shoal_toy{which="shared"} 1\n' in cast(Any, (await stays).body).decode()
    assert gone.cancelled()


async def test_what_is_no_http(make_collector: MakeCollector, serve: Serve) -> None:
    """Noise, a TLS hello, a header without end: a bad request or a closed connection, and the next client is served."""
    client = await serve(make_collector("one", lambda: toy("a", 1)))
    for noise in (
        b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03" + bytes(200),
        b"\r\n\r\n\r\n",
        b"GET /metrics\r\n\r\n",
        b"GET /metrics HTTP/9.9\r\n\r\n",
        b"GET /metrics HTTP/1.1\r\nContent-Length: -1\r\n\r\n",
        b"GET /metrics HTTP/1.1\r\nX: " + b"x" * 100_000 + b"\r\n\r\n",
        b"GET /metrics?" + b"x" * 100_000 + b" HTTP/1.1\r\n\r\n",
        os.urandom(500),
    ):
        reader, writer = await asyncio.open_connection(client.host, client.port)
        writer.write(noise)
        writer.write_eof()
        async with asyncio.timeout(5):
            said = b""
            with contextlib.suppress(ConnectionResetError):
                said = await reader.read()
        assert b"Traceback" not in said
        writer.close()
    async with client.get("/metrics") as answer:
        assert answer.status == 200


@pytest.fixture(scope="module")
def large_node(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Lay out a node of 500 pods with a container each, all with the files of one that was recorded."""
    root = tmp_path_factory.mktemp("large")
    recorded = FIXTURES / "sys/fs/cgroup"
    (pod,) = recorded.glob("kubepods.slice/kubepods-burstable.slice/*0f8d3c1e*")
    (container,) = pod.glob("*ef0badbf*")
    tree = root / "sys/fs/cgroup"
    copy_files(recorded, tree)
    copy_files(pod, root / "pod")
    copy_files(container, root / "container")
    for number in range(500):
        uid, identity = f"{number:08x}-0000-4000-8000-000000000000", f"{number:064x}"
        slice_ = tree / f"kubepods.slice/kubepods-pod{uid.replace('-', '_')}.slice"
        link_files(root / "pod", slice_)
        link_files(root / "container", slice_ / f"cri-containerd-{identity}.scope")
        (root / f"var/log/pods/shop_web-{number}_{uid}/web").mkdir(parents=True)
    return root


def copy_files(source: Path, target: Path) -> None:
    """Copy the files of a cgroup that collectors read."""
    target.mkdir(parents=True)
    for path in source.iterdir():
        if path.name.startswith("memory.") or path.name.endswith((".pressure", ".controllers")):
            shutil.copyfile(path, target / path.name)


def link_files(source: Path, target: Path) -> None:
    """Link the files of a directory, which is quicker than to copy them."""
    target.mkdir(parents=True)
    for entry in os.scandir(source):
        os.link(entry.path, target / entry.name)


def test_the_loop_comes_round_within_ten_milliseconds(large_node: Path, start_exporter: StartExporter) -> None:
    """Under scrapes that overlap, of a node with 500 pods: more than 15,000 series, 2 MB of text.

    What is measured, and why a busy machine does not fail it, is in loop_probe.py. The best of three rounds counts:
    an exporter that blocks does so in each.
    """
    rounds = []
    for _ in range(3):
        exporter = start_exporter(
            f"--path.sysfs={large_node}/sys",
            f"--path.rootfs={large_node}",
            program=(str(Path(__file__).with_name("loop_probe.py")),),
        )
        kinds = [{"Accept-Encoding": "gzip"}, {"Accept": OPENMETRICS}, {}] * 3
        with ThreadPoolExecutor(3) as clients:
            answers = list(clients.map(lambda headers, ask=exporter.get: ask("/metrics", **headers), kinds))
        assert all(answer.status == 200 for answer in answers)
        assert answers[2].body.count(b"\nshoal_") > 14_000
        assert exporter.stop()[0] == 0
        assert exporter.process.stdout is not None
        seen = json.loads(exporter.process.stdout.read())
        assert seen["rounds"] > 100
        rounds.append(seen)
        if max(seen["callback"], seen["collection"], seen["unexplained"]) < 0.01:
            return
    pytest.fail(f"the loop did not come round within 10 ms: {rounds}")
