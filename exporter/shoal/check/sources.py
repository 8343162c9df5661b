"""Where the scrapes come from: this node's kernel, or a running exporter somewhere else."""

from __future__ import annotations

import asyncio
import base64
import time
import urllib.error
import urllib.parse
import urllib.request
from dataclasses import dataclass
from typing import TYPE_CHECKING

from shoal.check.snapshot import NotMetricsError, Snapshot, parse

if TYPE_CHECKING:
    import ssl
    from collections.abc import Callable

    from shoal.settings import Settings

__all__ = ["Remote", "SourceError", "local"]

_TIMEOUT = 20.0
_LARGEST = 64 << 20


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
        """Fetch /metrics once. Raises `SourceError`."""
        request = urllib.request.Request(self._url(), headers={"Accept": "text/plain;version=0.0.4"})  # noqa: S310  (checked)
        if self.user:
            token = base64.b64encode(f"{self.user}:{self.password}".encode()).decode()
            request.add_header("Authorization", f"Basic {token}")
        opener = urllib.request.build_opener(
            urllib.request.ProxyHandler({}), urllib.request.HTTPSHandler(context=self.tls)
        )
        try:
            with opener.open(request, timeout=_TIMEOUT) as answer:
                body = answer.read(_LARGEST + 1)
        except urllib.error.HTTPError as error:
            wants = " (give --user, and the password in SHOAL_CHECK_PASSWORD)" if error.code == 401 else ""  # noqa: PLR2004
            raise SourceError(f"{self.address} answered {error.code} {error.reason}{wants}") from None
        except (OSError, ValueError) as error:
            reason = getattr(error, "reason", None) or getattr(error, "strerror", None) or error
            reason = getattr(reason, "strerror", None) or reason
            raise SourceError(f"{self.address} cannot be reached: {reason}") from None
        except Exception as error:  # noqa: BLE001  (http.client has many of its own for what is no HTTP)
            raise SourceError(f"{self.address} does not speak HTTP: {type(error).__name__}") from None
        if len(body) > _LARGEST:
            raise SourceError(f"{self.address} answered more than {_LARGEST >> 20} MiB")
        try:
            snapshot = parse(body.decode("utf-8", "replace"), time.monotonic())
        except NotMetricsError as error:
            raise SourceError(f"{self.address}: {error}") from None
        if "shoal_build_info" not in snapshot.samples:
            raise SourceError(f"{self.address} has no shoal_build_info, so it is no Shoal exporter")
        return snapshot

    def _url(self) -> str:
        try:
            parts = urllib.parse.urlsplit(self.address if "://" in self.address else f"http://{self.address}")
            usable = parts.scheme in ("http", "https") and parts.hostname and parts.port != 0
        except ValueError:
            usable = False
        if not usable:
            raise SourceError(f"{self.address!r} is no address such as http://node:7462")
        return urllib.parse.urlunsplit(
            (parts.scheme, parts.netloc, parts.path.rstrip("/") or "/metrics", parts.query, "")
        )


async def local(settings: Settings, wait: Callable[[], float], take: Callable[[Snapshot], bool]) -> None:
    """Read this node's kernel again and again with the exporter's own collectors.

    `take` is given each snapshot and says whether another is wanted, `wait` returns the seconds until then.
    """
    # Imported here: what is asked of another node needs no collector.
    from shoal.collectors import load  # noqa: PLC0415
    from shoal.exposition import render  # noqa: PLC0415
    from shoal.scrape import Scraper  # noqa: PLC0415

    scraper = Scraper(settings.roots, {name: load(name)(settings) for name in settings.collectors})
    await scraper.start()
    try:
        while True:
            families = await scraper.scrape(scraper.collectors, _TIMEOUT)
            taken = time.monotonic()
            body = await asyncio.to_thread(render, families, openmetrics=False)
            if not take(parse(body.decode(), taken)):
                return
            await asyncio.sleep(wait())
    finally:
        await scraper.stop()
