"""The whole path on loopback: the exporter, a Prometheus, an Alertmanager and a webhook, and namespaces to make ill.

Everything is a context manager that ends what it started, by its own id. `setpriv --pdeathsig` covers the one case in
which none of them can run: the test's process being killed.
"""

from __future__ import annotations

import json
import os
import re
import socket
import subprocess
import sys
import threading
import time
import urllib.parse
import urllib.request
from contextlib import ExitStack, closing, contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final, TypeVar

import yaml
from prometheus_client.parser import text_string_to_metric_families

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence

__all__ = ["Namespace", "Stack", "Webhook", "alertmanager", "receiving", "start", "wait_for"]

REPOSITORY: Final = Path(__file__).parents[2]
EXAMPLES: Final = REPOSITORY / "rules" / "examples"

_HOST: Final = "127.0.0.1"
_PROGRAMS: Final = ("prometheus", "prometheus-alertmanager", "ip", "nstat", "ss", "setpriv")
_UNITS: Final = {"s": 1, "m": 60, "h": 3600, "d": 86400}
_DURATION: Final = re.compile(r"\b([0-9]+)([smhd])\b")

_T = TypeVar("_T")


class Ended(Exception):  # noqa: N818  (what happened, not what went wrong: one caller tries again)
    """A process ended before it listened. `str()` has the end of its log."""


def wait_for(what: str, check: Callable[[], _T | None], within: float) -> _T:
    """Ask until `check` gives anything but None or nothing, and return it. Raises `TimeoutError` naming `what`."""
    deadline = time.monotonic() + within
    while not (result := check()):
        if time.monotonic() > deadline:
            message = f"{what}: not within {within:.0f} s"
            raise TimeoutError(message)
        time.sleep(0.1)
    return result


def _fetch(url: str) -> bytes:
    with urllib.request.urlopen(url, timeout=10) as answer:  # noqa: S310  (loopback addresses of our own making)
        return bytes(answer.read())


@contextmanager
def _running(arguments: Sequence[str], **options: Any) -> Iterator[subprocess.Popen[str]]:
    """Run a program, and end it by its process id when the block ends, however that comes about."""
    command = ["setpriv", "--pdeathsig", "TERM", "--", *arguments]
    with subprocess.Popen(command, text=True, **options) as process:
        try:
            yield process
        finally:
            process.terminate()
            try:
                process.wait(10)
            except subprocess.TimeoutExpired:
                process.kill()


@contextmanager
def _server(arguments: Sequence[str], log: Path, cwd: Path | None = None) -> Iterator[int]:
    """Run a server and yield the port that it, and nobody else, listens on. Raises `Ended`."""
    with (
        log.open("w") as output,
        _running(arguments, cwd=cwd, stdin=subprocess.DEVNULL, stdout=output, stderr=subprocess.STDOUT) as process,
    ):

        def port() -> int | None:
            if process.poll() is not None:
                raise Ended(f"{arguments[0]} ended with {process.returncode}:\n{log.read_text()[-2000:]}")
            sockets = subprocess.run(["ss", "-Hltnp"], check=True, capture_output=True, text=True).stdout
            own = re.search(rf" {re.escape(_HOST)}:([0-9]+) .*\bpid={process.pid},", sockets)
            return int(own[1]) if own else None

        yield wait_for(f"{arguments[0]} listens", port, within=30)


def _free_port() -> int:
    with closing(socket.socket()) as probe:
        probe.bind((_HOST, 0))
        return int(probe.getsockname()[1])


class Webhook:
    """Where pages arrive: keeps every alert that Alertmanager posts, in order."""

    def __init__(self, server: ThreadingHTTPServer) -> None:
        """Receive through this server, whose handler hands over what it is posted."""
        self.url = f"http://{_HOST}:{server.server_address[1]}/"
        self._alerts: list[dict[str, Any]] = []
        self._lock = threading.Lock()

    def receive(self, notification: dict[str, Any]) -> None:
        """Take one notification of Alertmanager (webhook format, version 4); each alert keeps the receiver's name."""
        with self._lock:
            self._alerts += [alert | {"receiver": notification["receiver"]} for alert in notification["alerts"]]

    def alerts(self, status: str, netns: str) -> list[dict[str, Any]]:
        """Return the alerts about this namespace that came in as `firing` or `resolved`."""
        with self._lock:
            return [one for one in self._alerts if one["status"] == status and one["labels"].get("netns") == netns]

    def everything(self) -> list[dict[str, Any]]:
        """Return every alert that came in, in order and as often as it came."""
        with self._lock:
            return list(self._alerts)


@contextmanager
def receiving() -> Iterator[Webhook]:
    """Serve the webhook on loopback."""

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            webhook.receive(json.loads(self.rfile.read(int(self.headers["Content-Length"]))))
            self.send_response(200)
            self.end_headers()

        def log_message(self, *_arguments: object) -> None:
            """Say nothing: the test's own output is what counts."""

    with ThreadingHTTPServer((_HOST, 0), Handler) as server:
        webhook = Webhook(server)
        thread = threading.Thread(target=server.serve_forever, name="webhook")
        thread.start()
        try:
            yield webhook
        finally:
            server.shutdown()
            thread.join()


@dataclass(frozen=True, slots=True)
class Stack:
    """The running path. Ports are those on loopback."""

    exporter: int
    prometheus: int
    webhook: Webhook
    labels: dict[str, str]
    """What the scrape configuration adds to every series: `node` and `cluster`."""

    def exported(self, netns: str) -> dict[str, float]:
        """Return {metric: value} of the exporter's counters for one network namespace, as it answers now."""
        text = _fetch(f"http://{_HOST}:{self.exporter}/metrics").decode()
        samples = [sample for family in text_string_to_metric_families(text) for sample in family.samples]
        return {one.name: one.value for one in samples if one.labels.get("netns") == netns}

    def query(self, expression: str) -> list[dict[str, Any]]:
        """Return the result of an instant query: [{"metric": {label: value}, "value": [time, text]}, ...]."""
        query = urllib.parse.urlencode({"query": expression})
        answer = json.loads(_fetch(f"http://{_HOST}:{self.prometheus}/api/v1/query?{query}"))
        return list(answer["data"]["result"])

    def rules(self) -> list[dict[str, Any]]:
        """Return every rule that Prometheus has loaded, with its health."""
        answer = json.loads(_fetch(f"http://{_HOST}:{self.prometheus}/api/v1/rules"))
        return [rule for group in answer["data"]["groups"] for rule in group["rules"]]


@contextmanager
def start(directory: Path, speed: int) -> Iterator[Stack]:
    """Start the path with the shipped rules and examples, their clock `speed` times as fast; all goes into `directory`.

    The alert needs five minutes of evidence and more to be sure of it. So every duration in a copy of the rules
    (window, step, `for`, `keep_firing_for`) is divided by the same number; nothing else of them is touched, and a
    speed of 1 runs them as they are shipped.
    """
    if missing := [name for name in _PROGRAMS if not _installed(name)]:
        message = f"{', '.join(missing)} must be installed"
        raise FileNotFoundError(message)
    with ExitStack() as stack:
        webhook = stack.enter_context(receiving())
        exporter = stack.enter_context(_exporter(directory))
        alerts = stack.enter_context(alertmanager(directory, webhook))
        scrape = _scrape_configuration(exporter)
        prometheus = stack.enter_context(_prometheus(directory, speed, scrape, alerts))
        yield Stack(exporter, prometheus, webhook, scrape["static_configs"][0]["labels"])


def _installed(name: str) -> bool:
    return subprocess.run(["sh", "-c", f"command -v {name}"], check=False, stdout=subprocess.DEVNULL).returncode == 0


@contextmanager
def _exporter(directory: Path) -> Iterator[int]:
    with ExitStack() as stack:
        for attempt in range(5):
            # Another process may take the port between the two; the exporter then says so and ends.
            port, log = _free_port(), directory / f"exporter-{attempt}.log"
            command = [sys.executable, "-m", "shoal", f"--web.listen-address={_HOST}:{port}"]
            try:
                stack.enter_context(_server(command, log, cwd=REPOSITORY / "exporter"))
            except Ended:
                if attempt == 4:
                    raise
            else:
                break
        yield port


@contextmanager
def alertmanager(directory: Path, webhook: Webhook) -> Iterator[int]:
    """Run the shipped example of a configuration, its receivers at the webhook, and without waiting for company.

    Yields its port.
    """
    configuration = _example("alertmanager.yaml")
    for receiver in configuration["receivers"]:
        for hook in receiver.get("webhook_configs", []):
            hook["url"] = webhook.url
    for route in _routes(configuration["route"]):
        route.update(group_wait="1s", group_interval="1s")
    file = directory / "alertmanager.yaml"
    file.write_text(yaml.safe_dump(configuration), encoding="utf-8")
    command = [
        "prometheus-alertmanager",
        f"--config.file={file}",
        f"--storage.path={directory / 'alertmanager'}",
        f"--web.listen-address={_HOST}:0",
        "--cluster.listen-address=",
    ]
    with _server(command, directory / "alertmanager.log") as port:
        yield port


def _example(name: str) -> dict[str, Any]:
    content: dict[str, Any] = yaml.safe_load((EXAMPLES / name).read_text(encoding="utf-8"))
    return content


def _routes(route: dict[str, Any]) -> Iterator[dict[str, Any]]:
    yield route
    for child in route.get("routes", []):
        yield from _routes(child)


def _scrape_configuration(exporter: int) -> dict[str, Any]:
    """Return the job of the shipped example that scrapes machines named by hand, with our exporter as its target."""
    jobs: list[dict[str, Any]] = _example("prometheus.yaml")["scrape_configs"]
    job = next(job for job in jobs if job["job_name"] == "shoal")
    job["static_configs"][0]["targets"] = [f"{_HOST}:{exporter}"]
    return job


@contextmanager
def _prometheus(directory: Path, speed: int, scrape: dict[str, Any], alertmanager: int) -> Iterator[int]:
    rules = directory / "rules"
    rules.mkdir()
    for file in sorted((REPOSITORY / "rules").glob("*.yaml")):
        shipped = yaml.safe_load(file.read_text(encoding="utf-8"))
        (rules / file.name).write_text(yaml.safe_dump(faster(shipped, speed)), encoding="utf-8")
    configuration = {
        "global": {"scrape_interval": "1s", "scrape_timeout": "1s", "evaluation_interval": "1s"},
        "rule_files": [f"{rules}/*.yaml"],
        "alerting": {"alertmanagers": [{"static_configs": [{"targets": [f"{_HOST}:{alertmanager}"]}]}]},
        "scrape_configs": [scrape],
    }
    file = directory / "prometheus.yaml"
    file.write_text(yaml.safe_dump(configuration), encoding="utf-8")
    command = [
        "prometheus",
        f"--config.file={file}",
        f"--storage.tsdb.path={directory / 'prometheus'}",
        f"--web.listen-address={_HOST}:0",
    ]
    with _server(command, directory / "prometheus.log") as port:
        yield port


def faster(rules: dict[str, Any], speed: int) -> dict[str, Any]:
    """Return a copy of a rule file in which every duration is `speed` times as short."""

    def shorter(match: re.Match[str]) -> str:
        milliseconds = int(match[1]) * _UNITS[match[2]] * 1000 // speed
        return f"{milliseconds}ms"

    copy: dict[str, Any] = json.loads(json.dumps(rules))
    for group in copy["groups"]:
        for rule in group["rules"]:
            for key in {"expr", "for", "keep_firing_for"} & rule.keys():
                rule[key] = _DURATION.sub(shorter, rule[key])
    return copy


@dataclass(slots=True)
class Namespace:
    """A network namespace in which `causes.py` runs one scenario."""

    name: str
    scenario: str
    process: subprocess.Popen[str] = field(repr=False)

    @classmethod
    @contextmanager
    def ill_with(cls, scenario: str) -> Iterator[Namespace]:
        """Make a namespace and start the scenario in it; both are gone after the block."""
        # Unique among all runs on this machine, and short enough to read in an alert.
        name = f"shoal-{os.getpid()}-{scenario}"
        subprocess.run(["ip", "netns", "add", name], check=True)
        try:
            subprocess.run(["ip", "-n", name, "link", "set", "lo", "up"], check=True)
            script = Path(__file__).with_name("causes.py")
            command = ["ip", "netns", "exec", name, sys.executable, str(script), scenario]
            with _running(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as process:
                namespace = cls(name, scenario, process)
                namespace._expect("ready")
                yield namespace
        finally:
            subprocess.run(["ip", "netns", "delete", name], check=True)

    def stop(self) -> None:
        """Stop the scenario; the namespace keeps a process, so that its counters can still be read."""
        assert self.process.stdin
        self.process.stdin.write("stop\n")
        self.process.stdin.flush()
        self._expect("stopped")

    def _expect(self, word: str) -> None:
        assert self.process.stdout
        said = self.process.stdout.readline().strip()
        assert said == word, f"{self.scenario} said {said!r} instead of {word!r}"

    def counters(self) -> dict[str, int]:
        """Return the namespace's counters as nstat names them, such as TcpExtListenOverflows: the witness."""
        command = ["ip", "netns", "exec", self.name, "nstat", "-asz", "--json"]
        answer = subprocess.run(command, check=True, capture_output=True, text=True)
        counters: dict[str, int] = json.loads(answer.stdout)["kernel"]
        return counters
