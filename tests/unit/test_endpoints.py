"""EndpointSlices: recorded answers of a real API server, replayed whole, cut, mixed with refusals and garbage."""

from __future__ import annotations

import asyncio
import ipaddress
import json
import re
import ssl
import subprocess
import sys
import time
from contextlib import asynccontextmanager, suppress
from pathlib import Path
from socket import IPPROTO_SCTP, IPPROTO_TCP, IPPROTO_UDP
from typing import TYPE_CHECKING, Any

import aiohttp
import pytest
from aiohttp import web
from aiohttp.test_utils import TestServer
from hypothesis import given
from hypothesis import strategies as st

from shoal.kernel.files import ParseError, Reason, Unavailable
from shoal.kubernetes import endpoints as module
from shoal.kubernetes.endpoints import Endpoints, Slice, TooMany, parse_event, parse_page, parse_slice, parse_status
from shoal.kubernetes.watch import EndpointWatch, _delay, find_cluster

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Callable

RECORDED = Path(__file__).parent / "fixtures/kubernetes"
# Read before any event loop runs, in which a test may not wait for a file.
BYTES = {path.name: path.read_bytes() for path in sorted(RECORDED.iterdir())}
STATUS = {name: int(status) for name, status in map(str.split, BYTES["STATUS"].decode().splitlines())}
PAGES = [BYTES[name] for name in sorted(BYTES) if name.startswith("list-page-")]
EVENTS = BYTES["watch.jsonl"].splitlines(keepends=True)
BOOKMARKS = [line for line in EVENTS if json.loads(line)["type"] == "BOOKMARK"]


KEYS = ["metadata", "items", "namespace", "name", "labels", "ports", "port", "protocol", "endpoints", "addresses"]
KEYS += ["addressType", "conditions", "object", "type", "resourceVersion", "continue"]
ANYTHING = st.recursive(
    st.none() | st.booleans() | st.integers() | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.sampled_from(KEYS), inner, max_size=5),
    max_leaves=12,
)


def ip(text: str) -> bytes:
    """Return an address as the kernel has it."""
    return ipaddress.ip_address(text).packed


def known(endpoints: Endpoints) -> set[str]:
    """Return the live backends as text."""
    protocols = {IPPROTO_TCP: "tcp", IPPROTO_UDP: "udp", IPPROTO_SCTP: "sctp"}
    return {
        f"{ipaddress.ip_address(key[:-3])} {int.from_bytes(key[-3:-1], 'big')} {protocols[key[-1]]}"
        for key in endpoints._live
    }


def both(*addresses: str) -> set[str]:
    """Return the two ports of the recorded services at these addresses."""
    return {f"{address} 53 {protocol}" for address in addresses for protocol in ("udp", "tcp")}


LISTED = both("10.244.0.2", "10.244.0.3", "fd00::2", "10.244.0.20", "10.244.0.22", "10.244.0.23") | {
    "10.244.0.30 0 tcp"
}
WATCHED = LISTED - both("10.244.0.2", "fd00::2") | both("10.244.0.4", "10.244.0.50")


def of_page(data: bytes) -> Endpoints:
    """Return what a list tells."""
    endpoints = Endpoints()
    for one in parse_page(data).slices:
        endpoints.put(one)
    return endpoints


def test_a_recorded_list() -> None:
    """Ready, serving or draining counts; what fails its probe, is a name or headless does not."""
    assert known(of_page(BYTES["list.json"])) == LISTED
    assert known(of_page(BYTES["list-after.json"])) == WATCHED
    assert not len(of_page(BYTES["list-empty.json"]))


def test_recorded_pages_are_the_list() -> None:
    """Each tells how to ask for the next, the last nothing; all are of one version."""
    pages = [parse_page(data) for data in PAGES]
    assert len(pages) > 1
    assert [bool(page.rest) for page in pages] == [*[True] * (len(pages) - 1), False]
    assert len({page.version for page in pages}) == 1
    assert [one for page in pages for one in page.slices] == list(parse_page(BYTES["list.json"]).slices)


def test_a_recorded_watch() -> None:
    """Added, changed and deleted slices and bookmarks, each with the version to go on from."""
    kinds = [parse_event(line)[0] for line in EVENTS]
    assert {"ADDED", "MODIFIED", "DELETED", "BOOKMARK"} == set(kinds)
    versions = [int(parse_event(line)[2]) for line in EVENTS]
    assert versions == sorted(versions)


def test_recorded_refusals() -> None:
    """What the API server says when it refuses."""
    assert STATUS["list-403.json"] == 403
    assert "cannot list resource" in parse_status(BYTES["list-403.json"])
    assert STATUS["list-401.json"] == 401
    assert parse_status(BYTES["list-401.json"]) == "Unauthorized"
    assert STATUS["list-410.json"] == 410
    assert parse_status(b"<html>") == parse_status(b"[]") == parse_status(b'{"message": 1}') == ""


def test_a_port_that_is_any_and_the_service() -> None:
    """A port without a number is all ports of its protocol; whose a backend is stays known for a while."""
    endpoints = of_page(BYTES["list.json"])
    assert endpoints.lives(ip("10.244.0.30"), 4711, IPPROTO_TCP)
    assert not endpoints.lives(ip("10.244.0.30"), 4711, IPPROTO_UDP)
    assert not endpoints.lives(ip("10.244.0.2"), 54, IPPROTO_UDP)
    assert endpoints.service(ip("10.244.0.30"), 4711, IPPROTO_TCP) == "shop/any"
    assert endpoints.service(ip("10.244.0.2"), 53, IPPROTO_UDP) == "shop/dns"
    endpoints.drop("shop/dns-a")
    assert not endpoints.lives(ip("10.244.0.2"), 53, IPPROTO_UDP)
    assert endpoints.service(ip("10.244.0.2"), 53, IPPROTO_UDP) == "shop/dns"
    assert endpoints.service(ip("10.9.9.9"), 53, IPPROTO_UDP) == ""


def test_a_backend_of_two_slices_lives_while_one_has_it(monkeypatch: pytest.MonkeyPatch) -> None:
    """Two services of one pod, or one slice that takes over from another; what has gone is forgotten in the end."""
    monkeypatch.setattr(module, "_MOST_WITHDRAWN", 2)
    endpoints = Endpoints()
    address = ip("10.0.0.1")
    backend = address + b"\0\x35\x11"
    endpoints.put(Slice("a/1", "a/one", (backend,)))
    endpoints.put(Slice("a/2", "a/two", (backend,)))
    endpoints.put(Slice("a/1", "a/one", ()))
    assert endpoints.lives(address, 53, IPPROTO_UDP)
    assert endpoints.service(address, 53, IPPROTO_UDP) == "a/two"
    endpoints.keep(["a/1"])
    assert not endpoints.lives(address, 53, IPPROTO_UDP)
    assert endpoints.service(address, 53, IPPROTO_UDP) == "a/two"
    for number in range(3):
        endpoints.put(Slice("b/1", "b/three", (bytes([10, 0, 1, number, 0, 53, 17]),)))
    endpoints.keep([])
    assert endpoints.service(address, 53, IPPROTO_UDP) == ""
    assert len(endpoints._withdrawn) == 2
    assert not endpoints._slices


def test_more_backends_than_a_node_remembers(monkeypatch: pytest.MonkeyPatch) -> None:
    """It is said, not survived by guessing."""
    monkeypatch.setattr(module, "_MOST_BACKENDS", 3)
    with pytest.raises(TooMany, match="more than 3 backends"):
        of_page(BYTES["list.json"])


@given(st.data())
def test_no_history_leaves_a_trace(data: st.DataObject) -> None:
    """However slices come, change and go, what lives is what the last state of each slice has."""
    names, backends = st.sampled_from("abc"), st.lists(st.sampled_from(range(6)), max_size=4, unique=True)
    endpoints = Endpoints()
    now: dict[str, list[int]] = {}
    for name, has in data.draw(st.lists(st.tuples(names, st.none() | backends), max_size=30)):
        if has is None:
            now.pop(name, None)
            endpoints.drop(name)
        else:
            now[name] = has
            endpoints.put(Slice(name, name, tuple(bytes([10, 0, 0, one, 0, 53, 17]) for one in has)))
        live = {one for has in now.values() for one in has}
        assert {one for one in range(6) if endpoints.lives(bytes([10, 0, 0, one]), 53, IPPROTO_UDP)} == live
        assert len(endpoints) == len(live)


@given(ANYTHING)
def test_arbitrary_json_is_decoded_or_refused(content: Any) -> None:
    """Nothing but `ParseError` comes out."""
    data = json.dumps(content).encode()
    for parse in (parse_page, parse_event, lambda _data: parse_slice(content)):
        with suppress(ParseError):
            parse(data)
    parse_status(data)


@given(st.sampled_from([*BYTES.values()]), st.data())
def test_damaged_answers_are_decoded_or_refused(recorded: bytes, data: st.DataObject) -> None:
    """Cut anywhere, or with one byte changed."""
    place = data.draw(st.integers(0, max(0, len(recorded) - 1)))
    changed = recorded[:place] + bytes([data.draw(st.integers(0, 255))]) + recorded[place + 1 :]
    for damaged in (recorded[:place], changed):
        for parse in (parse_page, parse_event):
            with suppress(ParseError):
                parse(damaged)


def test_delays_grow_and_differ() -> None:
    """From a second to a minute, and never the same on all nodes."""
    for failures, most in ((0, 1), (1, 2), (3, 8), (6, 60), (10_000, 60)):
        delays = {_delay(failures) for _ in range(20)}
        assert len(delays) > 1
        assert all(most / 2 <= delay <= most for delay in delays)


@pytest.mark.parametrize(
    ("environ", "url"),
    [
        ({"KUBERNETES_SERVICE_HOST": "10.96.0.1", "KUBERNETES_SERVICE_PORT": "443"}, "https://10.96.0.1:443"),
        ({"KUBERNETES_SERVICE_HOST": "fd00::1", "KUBERNETES_SERVICE_PORT": "6443"}, "https://[fd00::1]:6443"),
        ({"KUBERNETES_SERVICE_HOST": "10.96.0.1"}, ""),
        ({}, ""),
    ],
)
def test_where_the_api_server_is(environ: dict[str, str], url: str) -> None:
    """As Kubernetes tells every pod; elsewhere a sentence says so."""
    if url:
        assert find_cluster(environ).url == f"{url}/apis/discovery.k8s.io/v1/endpointslices"
    else:
        with pytest.raises(Unavailable, match="this is not a pod"):
            find_cluster(environ)


@pytest.fixture(scope="module")
def account(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a directory as a pod has it, with the key of the server's certificate beside it."""
    directory = tmp_path_factory.mktemp("account")
    command = "req -x509 -newkey ec -pkeyopt ec_paramgen_curve:P-256 -nodes -days 2 -subj /CN=kube-apiserver"
    alternative = ["-addext", "subjectAltName=IP:127.0.0.1,IP:::1", "-keyout", "server.key", "-out", "ca.crt"]
    subprocess.run(["openssl", *command.split(), *alternative], cwd=directory, check=True, capture_output=True)
    (directory / "token").write_text("first-token\n")
    return directory


class Api:
    """Answers as it was told, one entry of `script` for each request; then with the whole list and a silent watch."""

    def __init__(self) -> None:
        """Start with no script."""
        self.script: list[Any] = []
        self.asked: list[dict[str, str]] = []
        self.tokens: list[str] = []
        self.ended = asyncio.Event()

    async def answer(self, request: web.Request) -> web.StreamResponse:
        """Take the next entry: (status, body), a list of parts to stream, or a function."""
        self.asked.append(dict(request.query))
        self.tokens.append(request.headers["Authorization"])
        if self.script:
            step = self.script.pop(0)
        elif "watch" in request.query:
            step = [None]
        else:
            step = (200, BYTES["list.json"])
        if callable(step):
            answered: web.StreamResponse = await step(request)
            return answered
        if isinstance(step, tuple):
            return web.Response(status=step[0], body=step[1], content_type="application/json")
        response = web.StreamResponse()
        response.content_type = "application/json"
        await response.prepare(request)
        for part in step:
            if part is None:
                with suppress(TimeoutError):
                    await asyncio.wait_for(self.ended.wait(), 30)
            elif part is ConnectionError:
                assert request.transport
                request.transport.abort()
            else:
                await response.write(part)
        return response


@asynccontextmanager
async def watching(
    account: Path, *script: Any, host: str = "127.0.0.1", token: Path | None = None
) -> AsyncIterator[tuple[EndpointWatch, Api]]:
    """Serve a script over TLS and watch it."""
    api = Api()
    api.script = list(script)
    application = web.Application()
    application.router.add_get("/apis/discovery.k8s.io/v1/endpointslices", api.answer)
    tls = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    await asyncio.to_thread(tls.load_cert_chain, account / "ca.crt", account / "server.key")
    server = TestServer(application, scheme="https", host=host)
    await server.start_server(ssl=tls)
    environ = {"KUBERNETES_SERVICE_HOST": host, "KUBERNETES_SERVICE_PORT": str(server.port)}
    one = EndpointWatch(environ, str(token or account))
    task = asyncio.create_task(one.run())
    try:
        yield one, api
    finally:
        task.cancel()
        await asyncio.gather(task, return_exceptions=True)
        api.ended.set()
        await server.close()


async def until(true: Callable[[], bool], seconds: float = 20) -> None:
    """Wait for something to become true."""
    end = time.monotonic() + seconds
    while not true():
        assert time.monotonic() < end, "it did not come to that"
        await asyncio.sleep(0.01)


def current(one: EndpointWatch) -> set[str] | None:
    """Return the backends if they are known to be right."""
    try:
        return known(one.current())
    except Unavailable:
        return None


def why(one: EndpointWatch) -> tuple[str, str]:
    """Return reason and sentence of what is not known."""
    with pytest.raises(Unavailable) as error:
        one.current()
    return error.value.reason.value, str(error.value)


@pytest.fixture(autouse=True)
def delays(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Wait hardly at all between attempts; return the failures before each."""
    seen: list[int] = []

    def short(failures: int) -> float:
        seen.append(failures)
        return 0.02

    monkeypatch.setattr("shoal.kubernetes.watch._delay", short)
    return seen


async def test_a_list_in_pages_then_one_watch(account: Path) -> None:
    """The pages follow each other, the watch begins where they are, and afterwards all is as the cluster has it."""
    script = [*[(200, page) for page in PAGES], [*EVENTS, None]]
    async with watching(account, *script) as (one, api):
        await until(lambda: current(one) == WATCHED)
        assert [asked.get("continue", "") for asked in api.asked[: len(PAGES)]] == [
            "",
            *(parse_page(page).rest for page in PAGES[:-1]),
        ]
        watch = api.asked[len(PAGES)]
        assert watch["resourceVersion"] == parse_page(PAGES[0]).version
        assert watch["watch"] == watch["allowWatchBookmarks"] == "true"
        assert 300 <= int(watch["timeoutSeconds"]) <= 600
        assert all(asked["labelSelector"] == "!service.kubernetes.io/headless" for asked in api.asked)
        assert set(api.tokens) == {"Bearer first-token"}
        await asyncio.sleep(0.1)
        assert len(api.asked) == len(PAGES) + 1
        assert one.age is not None
        assert one.age < 10


async def test_events_may_come_in_any_pieces(account: Path) -> None:
    """What one read gives is neither a line nor ends with one."""
    stream = b"".join(EVENTS)
    pieces = [stream[place : place + 700] for place in range(0, len(stream), 700)]
    async with watching(account, (200, BYTES["list.json"]), [*pieces, None]) as (one, _):
        await until(lambda: current(one) == WATCHED)


@pytest.mark.parametrize("end", [[], [ConnectionError]])
async def test_a_watch_that_is_cut_off_goes_on_where_it_was(account: Path, end: list[Any]) -> None:
    """In the middle of an event, by an orderly end or a reset: it is asked for again from the last whole one on."""
    kept = EVENTS[:2]
    script = [(200, BYTES["list.json"]), [*kept, EVENTS[2][:40], *end], [*EVENTS[2:], None]]
    async with watching(account, *script) as (one, api):
        await until(lambda: current(one) == WATCHED)
        assert len(api.asked) == 3
        assert api.asked[2]["resourceVersion"] == parse_event(kept[-1])[2]


EXPIRED = [(410, BYTES["list-410.json"]), [BYTES["watch-410.jsonl"]]]


@pytest.mark.parametrize("refusal", EXPIRED, ids=["answer", "event"])
async def test_after_410_it_lists_again(account: Path, refusal: Any, delays: list[int]) -> None:
    """As an answer, and as the server of today says it, in a watch that has begun; what went meanwhile is gone."""
    script = [(200, BYTES["list.json"]), refusal, (200, BYTES["list-after.json"])]
    async with watching(account, *script) as (one, api):
        await until(lambda: len(api.asked) == 4)
        assert current(one) == WATCHED
        assert "watch" not in api.asked[2]
        assert api.asked[3]["resourceVersion"] == parse_page(BYTES["list-after.json"]).version
        assert delays == [1]


async def test_410_long_after_the_last_list_is_no_failure(account: Path, delays: list[int]) -> None:
    """After an outage, for which the delays have grown, it lists at once; if no list is fresh enough they grow."""
    script = [(200, BYTES["list.json"]), *[(503, b"")] * 5, EXPIRED[0]]
    async with watching(account, *script) as (one, api):
        await until(lambda: one._heard is not None)
        assert one._heard
        one._heard -= 100
        await until(lambda: len(api.asked) == 9)
        assert delays == [1, 2, 3, 4, 5, 1]
    delays.clear()
    async with watching(account, *[(200, BYTES["list.json"]), EXPIRED[1]] * 3) as (one, api):
        await until(lambda: len(api.asked) == 8)
        assert delays == [1, 2, 3]


async def test_a_watch_that_has_just_begun_proves_nothing(account: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The server accepts it and then tells that it is too old; one that stands for a while has told what happened."""
    begun, told, hold = asyncio.Event(), asyncio.Event(), asyncio.Event()

    async def accepted(request: web.Request) -> web.StreamResponse:
        response = web.StreamResponse()
        await response.prepare(request)
        begun.set()
        await told.wait()
        await response.write(BYTES["watch-410.jsonl"])
        return response

    async def held(_request: web.Request) -> web.StreamResponse:
        await hold.wait()
        return web.Response(status=503)

    async with watching(account, (200, BYTES["list.json"]), [EVENTS[0]], accepted, held) as (one, _):
        await begun.wait()
        await until(lambda: one._connected is not None)
        one._sure -= 100
        assert current(one) is None
        told.set()
        await until(lambda: one._connected is None)
        assert current(one) is None
        hold.set()
        await until(lambda: current(one) == LISTED)
        await until(lambda: one._connected is not None)
        one._sure -= 100
        monkeypatch.setattr("shoal.kubernetes.watch._SETTLED_SECONDS", 0.1)
        await until(lambda: current(one) == LISTED)


async def test_a_list_that_expires_between_two_pages(account: Path) -> None:
    """It is begun again from the first page."""
    script = [(200, PAGES[0]), (410, BYTES["list-410.json"]), (200, BYTES["list.json"])]
    async with watching(account, *script) as (one, api):
        await until(lambda: current(one) == LISTED)
        assert [bool(asked.get("continue")) for asked in api.asked[:3]] == [False, True, False]


@pytest.mark.parametrize(
    ("answer", "reason", "sentence"),
    [
        ((403, BYTES["list-403.json"]), "no_permission", r"refuses to list EndpointSlices \(403\): .*cannot list"),
        ((401, BYTES["list-401.json"]), "no_permission", r"\(401\): Unauthorized"),
        ((400, BYTES["list-400.json"]), "not_readable", r"\(400\): "),
        ((503, b"<html>no\nbackend</html>"), "not_readable", r"\(503\): Service Unavailable"),
        ((200, b"<html>"), "malformed", "expected JSON"),
        ((200, b"\xff\xfe"), "malformed", "expected JSON"),
        ((200, b""), "malformed", "expected JSON"),
        ((200, b"[" * 100_000), "malformed", "expected JSON"),
        ((200, b'{"metadata": {"resourceVersion": "1"}, "items": [7]}'), "malformed", "EndpointSlice"),
        ((200, PAGES[0][:-200]), "malformed", "expected JSON"),
        ([b'{"kind": "Endp', ConnectionError], "not_readable", "cannot be asked"),
    ],
)
async def test_answers_that_are_none(account: Path, answer: Any, reason: str, sentence: str, delays: list[int]) -> None:
    """Each has its reason and a sentence, nothing is known, and when the server is well again all is."""
    async with watching(account, *[answer] * 3) as (one, api):
        await until(lambda: len(delays) >= 1)
        found = why(one)
        assert found[0] == reason
        assert re.search(sentence, found[1]), found[1]
        assert "\n" not in found[1]
        await until(lambda: current(one) == LISTED)
        assert delays[:3] == [1, 2, 3]
        assert len(api.asked) >= 4


@pytest.mark.parametrize(
    ("line", "reason"),
    [
        (b"garbage\n", "malformed"),
        (b"\0" * 5_000_000, "malformed"),
        (b'{"type": "ADDED", "object": {"metadata": {}}}\n', "malformed"),
        (b'{"type": "BOOKMARK", "object": {"metadata": {}}}\n', "malformed"),
        (b'{"type": "ERROR", "object": {"code": 500, "message": "etcd\\nfailed"}}\n', "not_readable"),
    ],
)
async def test_a_watch_that_turns_to_garbage(
    account: Path, monkeypatch: pytest.MonkeyPatch, line: bytes, reason: str, delays: list[int]
) -> None:
    """It is given up and begun anew; until then nothing that is old is taken for what is."""
    monkeypatch.setattr("shoal.kubernetes.watch._GAP_SECONDS", -1)
    hold = asyncio.Event()

    async def held(_request: web.Request) -> web.StreamResponse:
        await hold.wait()
        return web.Response(status=503)

    async with watching(account, (200, BYTES["list.json"]), [*EVENTS[:1], line, None], held) as (one, _):
        await until(lambda: len(delays) >= 1)
        found = why(one)
        assert found[0] == reason
        assert re.search(r"what is known is \d+ s old", found[1])
        hold.set()
        await until(lambda: current(one) is not None)


async def test_a_server_that_never_answers(account: Path, monkeypatch: pytest.MonkeyPatch, delays: list[int]) -> None:
    """Neither to the list nor to the watch; each attempt ends, and the reason says so."""
    brief = aiohttp.ClientTimeout(total=None, sock_connect=5, sock_read=0.2)
    monkeypatch.setattr("shoal.kubernetes.watch._LIST_TIMEOUT", brief)
    monkeypatch.setattr("shoal.kubernetes.watch._WATCH_TIMEOUT", brief)
    monkeypatch.setattr("shoal.kubernetes.watch._GAP_SECONDS", 0)

    async def never(_request: web.Request) -> web.StreamResponse:
        await asyncio.sleep(20)
        return web.Response()

    async with watching(account, never, (200, BYTES["list.json"]), never, never) as (one, api):
        await until(lambda: len(delays) >= 1)
        assert why(one) == ("not_readable", "the API server does not answer")
        await until(lambda: len(delays) >= 2)
        reason, sentence = why(one)
        assert reason == "not_readable"
        assert sentence.startswith("the API server does not answer; what is known is")
        await until(lambda: len(api.asked) >= 4)
        assert api.asked[3]["resourceVersion"] == parse_page(BYTES["list.json"]).version


async def test_a_watch_that_falls_silent_is_not_believed(account: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A connection that stands and brings no bookmark proves nothing; one that does is believed."""
    async with watching(account, (200, BYTES["list.json"]), [None]) as (one, _):
        await until(lambda: one._connected is not None)
        assert current(one) == LISTED
        monkeypatch.setattr("shoal.kubernetes.watch._SILENT_SECONDS", 0.05)
        await until(lambda: current(one) is None)
        assert why(one)[1].startswith("the API server has said nothing for")
    monkeypatch.undo()
    async with watching(account, (200, BYTES["list.json"]), [None]) as (one, _):
        await until(lambda: one._connected is not None)
        assert one._heard
        one._heard -= 1000
        assert current(one) is None
        one._take(BOOKMARKS[0])
        assert current(one) == LISTED


async def test_the_token_is_read_anew(account: Path, tmp_path: Path) -> None:
    """The kubelet replaces it about once an hour; a watch that begins later has the new one."""
    await asyncio.to_thread(_copy, account, tmp_path)

    async def rotate(_request: web.Request) -> web.StreamResponse:
        await asyncio.to_thread((tmp_path / "token").write_text, "second-token")
        return web.Response(body=b"")

    async with watching(account, (200, BYTES["list.json"]), rotate, [None], token=tmp_path) as (one, api):
        await until(lambda: len(api.tokens) == 3)
        assert api.tokens == ["Bearer first-token"] * 2 + ["Bearer second-token"]
        assert current(one) == LISTED


def _copy(account: Path, to: Path) -> None:
    for name in ("ca.crt", "token"):
        (to / name).write_bytes((account / name).read_bytes())


@pytest.mark.parametrize(
    ("spoil", "expected"),
    [
        (lambda path: (path / "token").unlink(), "no_permission: the token .* cannot be read: No such file"),
        (lambda path: (path / "token").write_text(" \n"), "no_permission: there is no token in"),
        (lambda path: (path / "token").write_text("a\r\nX-Evil: b"), "no_permission: there is no token in"),
        (lambda path: (path / "token").write_bytes(b"\xff"), "no_permission: there is no token in"),
        (lambda path: (path / "ca.crt").unlink(), "not_readable: the certificate .* cannot be read: No such file"),
        (lambda path: (path / "ca.crt").write_text("x"), "not_readable: the certificate .* cannot be read"),
    ],
)
async def test_an_account_that_is_not_there(
    account: Path, tmp_path: Path, spoil: Callable[[Path], object], expected: str, delays: list[int]
) -> None:
    """A pod without a token (automountServiceAccountToken: false), or with half of one; put right, it is used."""
    await asyncio.to_thread(_copy, account, tmp_path)
    await asyncio.to_thread(spoil, tmp_path)
    async with watching(account, token=tmp_path) as (one, api):
        await until(lambda: len(delays) >= 1)
        assert re.match(expected, ": ".join(why(one)))
        assert not api.asked
        await asyncio.to_thread(_copy, account, tmp_path)
        await until(lambda: current(one) == LISTED)


async def test_a_server_that_is_not_trusted(account: Path, tmp_path: Path, delays: list[int]) -> None:
    """The token is not shown to whom the cluster's certificate does not vouch for."""
    await asyncio.to_thread(_copy, account, tmp_path)
    command = (
        "req -x509 -newkey ec -pkeyopt ec_paramgen_curve:P-256 -nodes -days 2 -subj /CN=other -keyout k -out ca.crt"
    )
    process = await asyncio.to_thread(
        subprocess.run, ["openssl", *command.split()], cwd=tmp_path, check=True, capture_output=True
    )
    assert process.returncode == 0
    async with watching(account, token=tmp_path) as (one, api):
        await until(lambda: len(delays) >= 1)
        assert why(one)[0] == "not_readable"
        assert "certificate" in why(one)[1].lower()
        assert not api.asked


async def test_a_redirect_is_not_followed(account: Path, delays: list[int]) -> None:
    """The token is for the API server alone."""

    async def elsewhere(request: web.Request) -> web.StreamResponse:
        return web.Response(status=302, headers={"Location": str(request.url)})

    async with watching(account, elsewhere) as (one, api):
        await until(lambda: len(delays) >= 1)
        assert "(302)" in why(one)[1]
        assert len(api.asked) == 1


async def test_ipv6(account: Path) -> None:
    """A cluster of IPv6 alone."""
    async with watching(account, host="::1") as (one, _):
        await until(lambda: current(one) == LISTED)


async def test_a_cluster_too_large_is_not_asked_again(account: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its list would be as large the next time."""
    monkeypatch.setattr(module, "_MOST_BACKENDS", 3)
    async with watching(account) as (one, api):
        await until(lambda: "more than 3" in str(one._failure))
        await asyncio.sleep(0.2)
        assert len(api.asked) == 1
        assert why(one)[0] == Reason.NOT_READABLE.value
        assert not len(one._endpoints)


async def test_an_answer_without_an_end(account: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """It is not read to where it would cost the node its memory."""
    with monkeypatch.context() as patched:
        patched.setattr("shoal.kubernetes.watch._LARGEST_PAGE", 1000)
        async with watching(account) as (one, _):
            await until(lambda: "is larger than 1,000 bytes" in str(one._failure))
            assert why(one)[0] == Reason.NOT_READABLE.value


def test_ports_and_items_that_are_none() -> None:
    """A port may be null, which is any; no other value but a port's number is taken for one."""
    (recorded,) = [one for one in json.loads(BYTES["list.json"])["items"] if one["metadata"]["name"] == "dns-a"]
    assert parse_slice(recorded | {"ports": None}).backends == ()
    assert len(parse_slice(recorded | {"ports": [{"port": None}]}).backends) == 2
    assert parse_slice(recorded | {"ports": [{"port": 53, "protocol": "QUIC"}]}).backends == ()
    for port in (-1, 65536, "53", 1.5):
        with pytest.raises(ParseError, match="port"):
            parse_slice(recorded | {"ports": [{"port": port}]})
    with pytest.raises(ParseError, match="items that are a list"):
        parse_page(b'{"metadata": {"resourceVersion": "1"}, "items": {"a": 1}}')


async def test_a_list_without_an_end(account: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A server that always has another page does not keep the exporter for ever."""
    monkeypatch.setattr("shoal.kubernetes.watch._MOST_PAGES", 5)
    async with watching(account, *[(200, PAGES[0])] * 5) as (one, api):
        await until(lambda: "does not end" in str(one._failure))
        await until(lambda: current(one) == LISTED)
        assert len(api.asked) >= 6


def test_nothing_is_imported_unless_it_is_wanted() -> None:
    """Nor does reading slices take the web."""
    code = "import sys, shoal.collectors.conntrack; print([name for name in sys.modules if 'kubernetes' in name])"
    found = subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True)
    assert found.stdout == "[]\n"
