"""The real exporter as a process under conditions of a test's making, and what it says."""

from __future__ import annotations

import os
import re
import signal
import socket
import subprocess
import sys
import time
import urllib.request
from contextlib import closing, contextmanager, suppress
from dataclasses import dataclass
from typing import TYPE_CHECKING

from prometheus_client.parser import text_string_to_metric_families

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

__all__ = ["WORKLOAD", "Running", "Scrape", "exporter", "fallen", "free_port", "stranger"]

# The labels that tell a workload from the node.
WORKLOAD = {"namespace", "pod", "container", "unit"}
# A machine without KVM takes a minute for what takes a second here.
_PATIENCE = 180 if "SHOAL_VM" in os.environ else 30


def free_port() -> int:
    """Return a port of the loopback address that nobody listens on."""
    with closing(socket.socket()) as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


@contextmanager
def stranger() -> Iterator[None]:
    """Run a process in a network namespace of its own, so that there is another one to look into."""
    with subprocess.Popen(["unshare", "--net", "sh", "-c", "echo; exec sleep 600"], stdout=subprocess.PIPE) as process:
        try:
            assert process.stdout
            process.stdout.readline()
            yield
        finally:
            process.kill()


@dataclass(frozen=True, slots=True)
class Scrape:
    """What one scrape gave."""

    text: str
    seconds: float

    @property
    def values(self) -> dict[tuple[str, frozenset[tuple[str, str]]], float]:
        """{(name, labels): value}. Fails where a series is there twice, or the text is none of Prometheus'."""
        found: dict[tuple[str, frozenset[tuple[str, str]]], float] = {}
        for family in text_string_to_metric_families(self.text):
            for sample in family.samples:
                key = (sample.name, frozenset(sample.labels.items()))
                assert key not in found, f"{key} is there twice"
                found[key] = sample.value
        return found

    @property
    def counters(self) -> dict[tuple[str, frozenset[tuple[str, str]]], float]:
        """The same of what may not fall: counters, and the buckets, counts and sums of histograms."""
        kinds = ("counter", "histogram")
        return {
            (sample.name, frozenset(sample.labels.items())): sample.value
            for family in text_string_to_metric_families(self.text)
            if family.type in kinds
            for sample in family.samples
            if not sample.name.endswith("_created")
        }

    @property
    def signals(self) -> dict[str, str]:
        """{signal: the reason of its absence, or ""}."""
        found = re.findall(r'^shoal_signal_available\{signal="(\w+)"(?:,reason="(\w+)")?\}', self.text, re.MULTILINE)
        return dict(found)

    @property
    def failed(self) -> set[str]:
        """The collectors that gave nothing."""
        return set(re.findall(r'^shoal_scrape_collector_success\{collector="(\w+)"\} 0', self.text, re.MULTILINE))

    def named(self, name: str, **labels: str) -> list[float]:
        """Return the values of the samples of this name that have these labels."""
        return [value for (one, has), value in self.values.items() if one == name and labels.items() <= set(has)]


def fallen(before: Scrape, after: Scrape) -> list[object]:
    """Return the counters that are there and lower than they were.

    Those of workloads are left out: one that is made anew counts anew, and the machine may have those of others.
    """
    now = after.counters
    lower = [key for key, value in before.counters.items() if now.get(key, value) < value]
    return [key for key in lower if not WORKLOAD & dict(key[1]).keys()]


@dataclass(frozen=True, slots=True)
class Running:
    """A running exporter. `process` may be a program that has started it."""

    process: subprocess.Popen[bytes]
    port: int

    def get(self, path: str = "/metrics", timeout: float = _PATIENCE) -> str:
        """Return what it answers. Raises `OSError`."""
        request = urllib.request.Request(f"http://127.0.0.1:{self.port}{path}")
        request.add_header("X-Prometheus-Scrape-Timeout-Seconds", str(timeout))
        with urllib.request.urlopen(request, timeout=timeout) as answer:  # noqa: S310  (our own)
            return str(answer.read().decode())

    def scrape(self, timeout: float = _PATIENCE) -> Scrape:
        """Scrape it once."""
        began = time.monotonic()
        return Scrape(self.get(timeout=timeout), time.monotonic() - began)

    def settled(self) -> Scrape:
        """Scrape it until the first dump of conntrack is finished, for which a scrape waits a moment only."""
        until = time.monotonic() + 2 * _PATIENCE
        while (scrape := self.scrape()).signals["conntrack_dump"] == "not_readable":
            assert time.monotonic() < until, "the first dump is not finished"
            time.sleep(0.1)
        return scrape


@contextmanager
def exporter(
    *arguments: str, before: tuple[str, ...] = (), log: Path | None = None, port: int | None = None
) -> Iterator[Running]:
    """Run the exporter behind the command `before`, wait until it answers, and end it with SIGTERM.

    What it logs is in `log`; fails where that has a traceback, or where it does not end as it was told.
    """
    port = port or free_port()
    command = [*before, sys.executable, "-m", "shoal", f"--web.listen-address=127.0.0.1:{port}", *arguments]
    environment = {name: value for name, value in os.environ.items() if not name.startswith("SHOAL_")}
    with open(log or os.devnull, "ab") as out, subprocess.Popen(command, stderr=out, env=environment) as process:
        running = Running(process, port)
        try:
            # With a quota of CPU it takes long to read its own modules.
            until = time.monotonic() + 3 * _PATIENCE
            while True:
                assert process.poll() is None, f"it ended: {log.read_text() if log else ''}"
                assert time.monotonic() < until, "it does not answer"
                with suppress(OSError):
                    running.get("/-/healthy", timeout=5)
                    break
                time.sleep(0.05)
            yield running
        except BaseException:
            process.kill()
            raise
        if process.poll() is None:
            # A program that has forked, as unshare may, keeps the signal to itself.
            end = signal.SIGKILL if "--fork" in before else signal.SIGTERM
            process.send_signal(end)
            assert process.wait(timeout=_PATIENCE) in (0, -end)
    assert not log or "Traceback" not in log.read_text()
