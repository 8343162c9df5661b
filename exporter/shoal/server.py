"""The aiohttp application: /metrics, /-/healthy, /-/ready and / for people."""

from __future__ import annotations

import asyncio
import gzip
import html
import logging
import re
import signal
import sys
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, cast

from aiohttp import hdrs, web
from aiohttp.http import HttpProcessingError
from aiohttp.payload import Payload
from prometheus_client import CollectorRegistry, ProcessCollector, generate_latest
from prometheus_client.openmetrics.exposition import generate_latest as generate_latest_openmetrics

from shoal import __version__, collectors, scrape
from shoal.exposition import render
from shoal.families import Family, Metric
from shoal.kernel.files import Reason
from shoal.listener import Listener, joined

if TYPE_CHECKING:
    from collections.abc import Callable, Coroutine, Hashable

    from aiohttp.abc import AbstractStreamWriter

    from shoal.scrape import Scraper
    from shoal.web_config import WebConfig

__all__ = ["BUILD_INFO", "WORKERS", "Metrics", "application", "catalogue", "serve"]

logger = logging.getLogger(__name__)

BUILD_INFO = Metric(
    "shoal_build_info",
    "gauge",
    "Always 1; the version of the exporter and of the Python that runs it.",
    "the exporter itself",
    ("version", "python"),
)

REFUSED = Metric(
    "shoal_web_refused_total",
    "counter",
    "What clients were refused because there was too much of it at once: connections that were ended or not begun,"
    " answers that were not made (503).",
    "the exporter itself",
    ("reason",),
)

WORKERS = "shoal"
"""What the names of the worker threads begin with."""

# Found when this is imported, as is what is in /proc below: reading would block the loop.
_ALL_COLLECTORS = frozenset(collectors.available_names())

# Without auto_describe it would not know which metrics ProcessCollector has when `name[]` asks for one.
_PROCESS = CollectorRegistry(auto_describe=True)
ProcessCollector(registry=_PROCESS)

_DEFAULT_TIMEOUT = 10.0
_LONGEST_TIMEOUT = 120.0

# Seconds that scrapes have to end after SIGTERM; aiohttp waits as long again for those that it then cancels.
_LAST_ANSWERS = 0.5
# Seconds that a client has to send the headers of a request, counted from its last answer, so it is also how long it
# may keep an idle connection: an hour by default, and each costs a descriptor. Prometheus asks once a minute, or more.
_IDLE = 75.0

# Different answers that may be in the making at once. Two Prometheus servers and a person ask for three.
_ANSWERS = 16
# An answer is written in pieces, and in so many seconds at most.
_PIECE = 1 << 16
_READING = 60.0

# What a probe asks for, which has no password.
_PROBES = frozenset({"/-/healthy", "/-/ready"})

_TEXT = "text/plain; version=0.0.4; charset=utf-8"
_OPENMETRICS = "application/openmetrics-text; version=1.0.0; charset=utf-8"
_QUALITY = re.compile(r";\s*q=([01](?:\.\d*)?)")


def catalogue() -> dict[str, Metric]:
    """Return every `shoal_` metric that the exporter can export, by name. Imports all collectors."""
    from shoal import web_config  # noqa: PLC0415  (most exporters run without)

    own = (*scrape.METRICS, *web_config.METRICS, REFUSED, BUILD_INFO)
    return collectors.catalogue() | {metric.name: metric for metric in own}


@dataclass(frozen=True, slots=True)
class _Request:
    """What one scrape asks for; requests that are equal and at the same time share one answer."""

    collectors: frozenset[str]
    names: frozenset[str]
    openmetrics: bool
    gzip: bool
    timeout: float


class _Answers:
    """The answers in the making: who asks for the same at the same time gets the same."""

    def __init__(self) -> None:
        self.refused = 0
        self._tasks: dict[Hashable, asyncio.Task[bytes]] = {}

    async def get(self, wanted: Hashable, make: Callable[[], Coroutine[None, None, bytes]]) -> bytes:
        """Return what `make` returns, called if nobody waits for the same yet. Raises 503 for one too many."""
        task = self._tasks.get(wanted)
        if task is None:
            if len(self._tasks) >= _ANSWERS:
                self.refused += 1
                raise web.HTTPServiceUnavailable(
                    text="too many different questions at once; ask again in a second.\n",
                    headers={hdrs.RETRY_AFTER: "1"},
                )
            task = self._tasks[wanted] = asyncio.create_task(make())
            task.add_done_callback(lambda _: self._tasks.pop(wanted, None))
        # A client that goes away must not end the work that others wait for.
        return await asyncio.shield(task)


class _Body(Payload):
    """An answer that many may share. Whoever reads it slowly keeps a piece of it in memory, and not for ever."""

    _value: bytes

    def __init__(self, value: bytes, content_type: str) -> None:
        super().__init__(value, content_type=content_type)
        self._size = len(value)

    def decode(self, encoding: str = "utf-8", errors: str = "strict") -> str:
        return self._value.decode(encoding, errors)

    async def write(self, writer: AbstractStreamWriter) -> None:
        view = memoryview(self._value)
        try:
            async with asyncio.timeout(_READING):
                for start in range(0, len(view), _PIECE):
                    await writer.write(view[start : start + _PIECE])
        except TimeoutError:
            if writer.transport:
                # Not closed, which would wait until everything is read.
                writer.transport.abort()
            raise ConnectionAbortedError from None


class Metrics:
    """Answers /metrics: the collectors' families and the exporter's own, rendered in a worker thread."""

    def __init__(
        self,
        scraper: Scraper,
        answers: _Answers | None = None,
        more: Callable[[], list[Family]] = list,
    ) -> None:
        """Answer from this scraper, with the exporter's own families that `more` returns."""
        self._scraper = scraper
        self._more = more
        self._answers = answers or _Answers()

    async def handle(self, request: web.Request) -> web.Response:
        """Answer GET /metrics. `collect[]`, `exclude[]` choose collectors, `name[]` metrics by their full name."""
        accept = request.headers.get("Accept", "")
        openmetrics = _quality(accept, "application/openmetrics-text")
        wanted = _Request(
            collectors=self._chosen(request.query.getall("collect[]", []), request.query.getall("exclude[]", [])),
            names=frozenset(request.query.getall("name[]", [])),
            openmetrics=openmetrics > 0 and openmetrics >= _quality(accept, "text/plain"),
            gzip=_quality(request.headers.get("Accept-Encoding", ""), "gzip") > 0,
            timeout=_timeout(request.headers.get("X-Prometheus-Scrape-Timeout-Seconds", "")),
        )
        body = await self._answers.get(wanted, lambda: self._answer(wanted))
        headers = {"Vary": "Accept, Accept-Encoding"}
        if wanted.gzip:
            headers["Content-Encoding"] = "gzip"
        return web.Response(body=_Body(body, _OPENMETRICS if wanted.openmetrics else _TEXT), headers=headers)

    def _chosen(self, collect: list[str], exclude: list[str]) -> frozenset[str]:
        enabled = frozenset(self._scraper.collectors)
        if collect and exclude:
            raise web.HTTPBadRequest(text="collect[] and exclude[] cannot be combined; use one of them.\n")
        if unknown := sorted({*collect, *exclude} - enabled):
            raise web.HTTPBadRequest(
                text=f"there is no collector {unknown[0]!r} enabled here; there are {', '.join(sorted(enabled))}.\n"
            )
        return frozenset(collect) if collect else enabled - frozenset(exclude)

    async def _answer(self, wanted: _Request) -> bytes:
        families = await self._scraper.scrape(wanted.collectors, wanted.timeout)
        families += [*self._more(), _build_info()]
        return await asyncio.to_thread(self._body, families, wanted)

    def _body(self, families: list[Family], wanted: _Request) -> bytes:
        # The process's own numbers come from prometheus_client.
        own = _PROCESS
        if wanted.names:
            families = [family for family in families if family.metric.name in wanted.names]
            own = cast(CollectorRegistry, own.restricted_registry(wanted.names))
        # prometheus_client's part comes last, as it closes an OpenMetrics document.
        generate: Callable[[CollectorRegistry], bytes] = (
            generate_latest_openmetrics if wanted.openmetrics else generate_latest
        )
        body = render(families, openmetrics=wanted.openmetrics) + generate(own)
        # Level 1 is a third of the time of level 6 for a tenth more bytes, on this kind of text.
        return gzip.compress(body, 1) if wanted.gzip else body


def _quality(header: str, wanted: str) -> float:
    """Return how much an Accept or Accept-Encoding header wants this; 0 is not at all. Wildcards are no wish."""
    found = 0.0
    for offer in header.split(","):
        name, _, parameters = offer.partition(";")
        if name.strip().lower() == wanted:
            quality = _QUALITY.search(";" + parameters.lower())
            found = max(found, float(quality[1]) if quality else 1.0)
    return found


def _timeout(header: str) -> float:
    """Return the seconds that collectors have: what Prometheus announces, less a margin to render and send."""
    try:
        announced = float(header)
    except ValueError:
        announced = _DEFAULT_TIMEOUT
    if not announced > 0:  # true for NaN too
        announced = _DEFAULT_TIMEOUT
    announced = min(announced, _LONGEST_TIMEOUT)
    return announced - min(0.5, announced * 0.2)


def _build_info() -> Family:
    return Family(BUILD_INFO, [((__version__, "{}.{}.{}".format(*sys.version_info[:3])), 1)])


async def _ok(_request: web.Request) -> web.Response:
    return web.Response(text="ok\n")


class _Index:
    """Answers / for a person: what runs, and which signals this node gives."""

    def __init__(self, scraper: Scraper, answers: _Answers) -> None:
        self._scraper = scraper
        self._answers = answers
        self._off = sorted(_ALL_COLLECTORS - set(scraper.collectors))

    async def handle(self, _request: web.Request) -> web.Response:
        page = await self._answers.get("/", self._answer)
        return web.Response(body=page, content_type="text/html", charset="utf-8")

    async def _answer(self) -> bytes:
        await self._scraper.scrape(self._scraper.collectors, _timeout(""))
        return self._page().encode("utf-8", "backslashreplace")

    def _page(self) -> str:
        rows = []
        for name, collector in sorted(self._scraper.collectors.items()):
            failure = self._scraper.failures.get(name)
            for signal_name, why in collector.availability.absent.items():
                state = (Reason.COLLECTOR_FAILED.value, failure) if failure else _state(why)
                rows.append((name, signal_name, *state))
        rows += [(name, "", "switched off", "") for name in self._off]
        table = "\n".join("<tr>" + "".join(f"<td>{html.escape(cell)}</td>" for cell in row) + "</tr>" for row in rows)
        return _PAGE.format(version=html.escape(__version__), rows=table)


def _state(why: tuple[Reason, str] | None) -> tuple[str, str]:
    return ("available", "") if why is None else (why[0].value, why[1])


_PAGE = """<!DOCTYPE html>
<html lang="en">
<head><meta charset="utf-8"><title>Shoal exporter</title>
<style>
body {{ font-family: sans-serif; margin: 2em; max-width: 70em; }}
table {{ border-collapse: collapse; }}
td, th {{ border-bottom: 1px solid #ccc; padding: .3em 1em .3em 0; text-align: left; vertical-align: top; }}
</style></head>
<body>
<h1>Shoal exporter {version}</h1>
<p><a href="/metrics">/metrics</a> for Prometheus, <a href="/-/healthy">/-/healthy</a> and
<a href="/-/ready">/-/ready</a> for probes.</p>
<table>
<tr><th>Collector</th><th>Signal</th><th>On this node</th><th>Why it is absent</th></tr>
{rows}
</table>
</body>
</html>
"""


def application(
    scraper: Scraper, web_config: WebConfig | None = None, listener: Listener | None = None
) -> web.Application:
    """Return the application that answers from this scraper, to those whom the web configuration lets in."""
    app = web.Application()
    listener, answers = listener or Listener(), _Answers()
    app.middlewares.append(listener.middleware)
    if web_config:
        from shoal.web_auth import Guard  # noqa: PLC0415  (most exporters run without)

        guard = Guard(web_config, _PROBES)
        app.middlewares.append(guard.middleware)
        app.on_response_prepare.append(guard.prepare)

    def more() -> list[Family]:
        refused = Family(REFUSED, [(("connections",), listener.refused), (("answers",), answers.refused)])
        return [refused, *(web_config.families() if web_config else ())]

    app.add_routes(
        [
            web.get("/", _Index(scraper, answers).handle),
            web.get("/metrics", Metrics(scraper, answers, more).handle),
            *(web.get(path, _ok) for path in sorted(_PROBES)),
        ]
    )
    return app


def _is_ours(record: logging.LogRecord) -> bool:
    """Tell whether a message of aiohttp's is more than that somebody sent what is no HTTP.

    That is answered, and would let a stranger fill the log, with what he likes or with a password that he got wrong.
    """
    return not (record.exc_info and isinstance(record.exc_info[1], HttpProcessingError))


class _Workers(ThreadPoolExecutor):
    """Threads that nothing waits for at the end: one may be stuck in the kernel, where it cannot be stopped."""

    def shutdown(self, wait: bool = True, *, cancel_futures: bool = False) -> None:  # noqa: ARG002, FBT001, FBT002  (inherited)
        """End the threads that have nothing to do; asyncio would wait for the others for ever."""
        super().shutdown(wait=False, cancel_futures=True)


async def serve(listen: tuple[str, int], scraper: Scraper, web_config: WebConfig | None = None) -> None:
    """Serve until SIGTERM or SIGINT. Raises `ListenError` when the address cannot be had."""
    loop = asyncio.get_running_loop()
    # A thread for each collector, so that one that hangs takes none from the others, and some to render.
    loop.set_default_executor(_Workers(len(scraper.collectors) + 4, thread_name_prefix=WORKERS))
    stop = asyncio.Event()
    for number in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(number, stop.set)
    logging.getLogger("aiohttp.server").addFilter(_is_ours)
    listener = Listener()
    runner = web.AppRunner(
        application(scraper, web_config, listener),
        access_log=None,
        shutdown_timeout=_LAST_ANSWERS,
        keepalive_timeout=_IDLE,
        # Who has gone away is no longer counted among those who wait.
        handler_cancellation=True,
    )
    await runner.setup()
    try:
        listener.tls = web_config.current.tls if web_config else None
        await listener.open(cast(web.Server, runner.server), *listen)
        # One log line per socket: an empty host listens on IPv4 and IPv6.
        for host, port, *_ in listener.addresses:
            logger.info("listening", extra={"address": joined(host, port), "collectors": ",".join(scraper.collectors)})
        started = [asyncio.create_task(scraper.start())]
        if web_config:
            started.append(asyncio.create_task(web_config.watch(partial(setattr, listener, "tls"))))
        await stop.wait()
        for task in started:
            task.cancel()
        logger.info("stopping")
    finally:
        await scraper.stop()
        listener.close()
        await runner.cleanup()
