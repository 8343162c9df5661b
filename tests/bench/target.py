"""What the benchmarks share: an exporter that runs and is scraped as Prometheus does it, and what this machine is."""

from __future__ import annotations

import gzip
import http.client
import os
import platform
import re
import signal
import socket
import subprocess
import sys
import tempfile
import time
from contextlib import closing, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Final, Protocol, TypeVar

import psutil

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence
    from typing import IO

__all__ = ["EXPORTER", "Place", "Target", "machine", "running"]

_T = TypeVar("_T")

EXPORTER: Final = Path(__file__).parents[2] / "exporter"

_HOST: Final = "127.0.0.1"
_HEADERS: Final = {
    "Accept": "application/openmetrics-text;version=1.0.0,text/plain;version=0.0.4;q=0.5,*/*;q=0.1",
    "Accept-Encoding": "gzip",
    "X-Prometheus-Scrape-Timeout-Seconds": "10",
}


class Place(Protocol):
    """Calls a function where an exporter listens: in its network namespace."""

    def __call__(self, function: Callable[[], _T], /) -> _T:
        """Call it there and return what it returns."""


@dataclass(slots=True)
class Target:
    """One exporter that runs and is scraped, over a connection that stays open."""

    name: str
    pid: int
    connection: http.client.HTTPConnection
    began: float
    """When it was started (time.perf_counter())."""
    there: Place
    wire_bytes: int = 0
    text: bytes = b""

    def scrape(self, query: str = "") -> None:
        """Fetch /metrics once and keep the answer."""
        if self.connection.sock is None:
            # It closes after each answer, as prometheus_client does.
            self.there(self.connection.connect)
        self.connection.request("GET", f"/metrics{query}", headers=_HEADERS)
        answer = self.connection.getresponse()
        body = answer.read()
        if answer.status != http.client.OK:
            raise RuntimeError(f"{self.name} answered {answer.status}")
        self.text = gzip.decompress(body) if answer.headers["Content-Encoding"] == "gzip" else body
        self.wire_bytes = len(body)

    @property
    def series(self) -> int:
        """How many series the last answer had."""
        return sum(not line.startswith(b"#") for line in self.text.splitlines())

    def cpu(self) -> float:
        """Return the seconds of CPU that all its threads, living and ended, have used so far.

        The process's CPU clock (clock_getcpuclockid(3), whose number is made from the process id like this) counts
        nanoseconds; /proc/<pid>/stat counts ticks of 10 ms, more than a scrape takes.
        """
        return time.clock_gettime(~self.pid << 3 | 2)

    def descriptors(self) -> int:
        """Return how many it has open."""
        return len(os.listdir(f"/proc/{self.pid}/fd"))

    def memory(self, field: str = "VmRSS") -> float:
        """Return the MiB that it holds (VmRSS), or the most that it ever held (VmHWM)."""
        status = Path(f"/proc/{self.pid}/status").read_text(encoding="ascii")
        return int(status.partition(f"{field}:")[2].split()[0]) / 1024


def _here(function: Callable[[], _T]) -> _T:
    return function()


def _free_port() -> int:
    with closing(socket.socket()) as probe:
        probe.bind((_HOST, 0))
        return int(probe.getsockname()[1])


@contextmanager
def running(
    name: str,
    command: Sequence[str],
    *,
    cwd: Path | None = None,
    there: Place = _here,
    output: IO[bytes] | None = None,
) -> Iterator[Target]:
    """Run an exporter that takes --web.listen-address, and end it after the block.

    `output` takes what it prints. The command may be one that starts the exporter as its child, as nsenter does for
    another PID namespace.
    """
    port = there(_free_port)
    began = time.perf_counter()
    arguments = [*command, f"--web.listen-address={_HOST}:{port}"]
    with (
        tempfile.TemporaryFile() as log,
        subprocess.Popen(arguments, cwd=cwd, stdout=output or log, stderr=log) as process,
    ):
        pid = process.pid
        try:
            with closing(_connected(process, port, there)) as connection:
                pid = _exporter(process.pid)
                yield Target(name, pid, connection, began, there)
        except ConnectionError:
            log.seek(0)
            sys.stderr.write(log.read().decode(errors="replace"))
            raise
        finally:
            if process.poll() is None:
                os.kill(_exporter(process.pid), signal.SIGTERM)


def _exporter(pid: int) -> int:
    """Return the exporter's own process: the last one that was started by another."""
    while children := psutil.Process(pid).children():
        pid = children[0].pid
    return pid


def _connected(process: subprocess.Popen[bytes], port: int, there: Place) -> http.client.HTTPConnection:
    """Connect as soon as the process listens. Raises `ConnectionError` when it ends or takes more than two minutes."""
    deadline = time.monotonic() + 120
    while process.poll() is None and time.monotonic() < deadline:
        connection = http.client.HTTPConnection(_HOST, port, timeout=30)
        try:
            there(connection.connect)
        except ConnectionRefusedError:
            time.sleep(0.01)
        else:
            return connection
    raise ConnectionError(f"{process.args!r} does not listen")


def machine() -> str:
    """Return what the figures depend on, for the text that they are quoted in."""
    model = re.search(r"^model name\s*: (.*)$", Path("/proc/cpuinfo").read_text(encoding="utf-8"), re.MULTILINE)
    cgroup = next(
        (root for root in ("/sys/fs/cgroup", "/sys/fs/cgroup/unified") if Path(root, "cgroup.procs").exists()), ""
    )
    cgroups = sum(1 for _ in os.walk(cgroup)) if cgroup else 0
    processes = sum(name.isdecimal() for name in os.listdir("/proc"))
    load = os.getloadavg()[0]
    return (
        f"{os.cpu_count()} x {model[1] if model else platform.machine()}, Linux {platform.release()}, "
        f"Python {platform.python_version()}\n"
        f"{cgroups} cgroups (v2) and {processes} processes, load {load:.2f}"
    )
