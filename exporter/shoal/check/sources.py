"""Where the scrapes come from: this node's kernel, or a running exporter somewhere else."""

from __future__ import annotations

import asyncio
import base64
import http.client
import ssl
import threading
import time
import urllib.error
import urllib.parse
import urllib.request
from dataclasses import dataclass
from http import HTTPStatus
from typing import TYPE_CHECKING

from shoal.check.snapshot import NotMetricsError, Snapshot, parse

if TYPE_CHECKING:
    from collections.abc import Callable

    from shoal.settings import Settings

__all__ = ["PASSWORD_VARIABLE", "Remote", "SourceError", "local"]

PASSWORD_VARIABLE = "SHOAL_CHECK_PASSWORD"  # noqa: S105  (where it stands, not what it is)

# Seconds that the collectors of one read have, here and in an exporter that is told nothing else: what is late is said
# to be late. An exporter has some more to answer.
_COLLECTORS = 10.0
_ANSWER = 15.0
# A node with a thousand pods answers a tenth of that.
_LARGEST = 16 << 20
_PIECE = 64 << 10


class SourceError(Exception):
    """A node could not be asked. `str()` is a sentence with its address."""


@dataclass(frozen=True, slots=True)
class Remote:
    """A running exporter. `address` is a URL; /metrics is added where it has no path."""

    address: str
    user: str = ""
    password: str = ""
    tls: ssl.SSLContext | None = None

    def scrape(self) -> Snapshot:
        """Fetch /metrics once, within 15 s. Raises `SourceError`."""
        request = urllib.request.Request(self._url(), headers={"Accept": "text/plain;version=0.0.4"})  # noqa: S310  (checked)
        if self.user:
            token = base64.b64encode(f"{self.user}:{self.password}".encode()).decode()
            request.add_header("Authorization", f"Basic {token}")
        answers: list[Snapshot | SourceError] = []

        def ask() -> None:
            try:
                answers.append(self._ask(request))
            except SourceError as error:
                answers.append(error)

        # Neither a resolver nor headers that come byte by byte know of a deadline, so nothing is waited for beyond it.
        asking = threading.Thread(target=ask, daemon=True)
        asking.start()
        asking.join(_ANSWER)
        answer = answers[0] if answers else SourceError(f"{self.address} did not answer within {_ANSWER:.0f} s")
        if isinstance(answer, SourceError):
            raise answer
        return answer

    def _ask(self, request: urllib.request.Request) -> Snapshot:
        began = time.monotonic()
        opener = urllib.request.build_opener(
            urllib.request.ProxyHandler({}), urllib.request.HTTPSHandler(context=self.tls), _NoRedirect()
        )
        try:
            with opener.open(request, timeout=_ANSWER) as answer:
                body = _body(answer, began + _ANSWER)
            snapshot = parse(body.decode("utf-8", "replace"), began)
        except urllib.error.HTTPError as error:
            error.close()
            raise SourceError(f"{self.address} answered {error.code} {error.reason}{self._hint(error)}") from None
        except NotMetricsError as error:
            raise SourceError(f"{self.address}: {error}") from None
        except (OSError, ValueError) as error:
            raise SourceError(f"{self.address} cannot be reached: {_reason(error)}") from None
        except Exception as error:  # noqa: BLE001  (http.client has many of its own for what is no HTTP)
            raise SourceError(f"{self.address} does not speak HTTP: {type(error).__name__}") from None
        if "shoal_build_info" not in snapshot.samples:
            raise SourceError(f"{self.address} has no shoal_build_info, so it is no Shoal exporter")
        return snapshot

    def _hint(self, error: urllib.error.HTTPError) -> str:
        if error.code == HTTPStatus.UNAUTHORIZED:
            if self.user:
                return f" (the name {self.user} or its password is wrong)"
            return f" (it wants --user, and the password in {PASSWORD_VARIABLE})"
        if where := error.headers.get("Location"):
            # Not followed: the password would be sent there as well.
            return f" (it leads to {where[:200]!r}; give that address if it is right)"
        return ""

    def _url(self) -> str:
        try:
            parts = urllib.parse.urlsplit(self.address if "://" in self.address else f"http://{self.address}")
            usable = (
                parts.scheme in ("http", "https") and parts.hostname and parts.port != 0 and "@" not in parts.netloc
            )
        except ValueError:
            usable = False
        if not usable or not self.address.isascii() or not self.address.isprintable() or " " in self.address:
            raise SourceError(f"{self.address!r} is no address such as http://node:7462")
        return urllib.parse.urlunsplit(
            (parts.scheme, parts.netloc, parts.path.rstrip("/") or "/metrics", parts.query, "")
        )


class _NoRedirect(urllib.request.HTTPRedirectHandler):
    """Makes an error of a redirect."""

    def redirect_request(self, *_arguments: object) -> None:
        """Follow nowhere."""


def _body(answer: http.client.HTTPResponse, until: float) -> bytes:
    """Read an answer to its end. Raises `NotMetricsError` for one that has none, or too late a one."""
    body = bytearray()
    try:
        while piece := answer.read1(_PIECE):
            body += piece
            if len(body) > _LARGEST:
                raise NotMetricsError(f"the answer is longer than {_LARGEST >> 20} MiB")
            if time.monotonic() > until:
                raise NotMetricsError(f"the answer did not end within {_ANSWER:.0f} s")
    except http.client.IncompleteRead:
        answer.length = 1
    # What was announced and did not come; the text format ends with a newline.
    if answer.length or (body and not body.endswith(b"\n")):
        raise NotMetricsError("the answer is not Prometheus' text format, or was cut off")
    return bytes(body)


def _reason(error: Exception) -> str:
    """Say in the words of the system why nothing answered."""
    reason = getattr(error, "reason", None) or error
    if isinstance(reason, ssl.SSLCertVerificationError):
        return f"its certificate is not trusted, {reason.verify_message.rstrip('.')} (--cacert names what to trust)"
    if isinstance(reason, ssl.SSLError):
        return f"the TLS handshake failed, {reason.reason or reason}"
    if isinstance(reason, (http.client.RemoteDisconnected, ConnectionResetError)):
        return "it ended the connection without an answer, perhaps for want of https:// or of a client certificate"
    return str(getattr(reason, "strerror", None) or reason)


async def local(settings: Settings, wait: Callable[[], float], take: Callable[[Snapshot], bool]) -> None:
    """Read this node's kernel again and again with the exporter's own collectors.

    `take` is given each snapshot and says whether another is wanted, `wait` returns the seconds until then. A read that
    hangs is late after 10 s and costs only what it is about.
    """
    # Imported here: what is asked of another node needs no collector.
    from shoal.collectors import load  # noqa: PLC0415  (see above)
    from shoal.exposition import render  # noqa: PLC0415  (see above)
    from shoal.scrape import Scraper, Workers  # noqa: PLC0415  (see above)

    scraper = Scraper(settings.roots, {name: load(name)(settings) for name in settings.collectors})
    asyncio.get_running_loop().set_default_executor(Workers(scraper))
    await scraper.start()
    try:
        while True:
            began = time.monotonic()
            families = await scraper.scrape(scraper.collectors, _COLLECTORS)
            body = await asyncio.to_thread(render, families, openmetrics=False)
            if not take(parse(body.decode(), began)):
                return
            await asyncio.sleep(wait())
    finally:
        await scraper.stop()
