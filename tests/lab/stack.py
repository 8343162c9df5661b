"""The path that a page takes, in a node of the lab: the exporter, a Prometheus, an Alertmanager and a webhook.

The node has its loopback device to itself, so all listen where the shipped examples say, and those are used as they
are. Changed in them are the intervals and how long an alert waits (`for`, `keep_firing_for`), never an expression or
a window; and nothing is inhibited, because fourteen failures that share a node would mute one another, as they should.
"""

from __future__ import annotations

import http.client
import json
import os
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.parse
import urllib.request
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

import yaml
from prometheus_client.parser import text_string_to_metric_families

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

__all__ = [
    "OTHER",
    "OTHER_PORTS",
    "PORTS",
    "PROGRAMS",
    "REPOSITORY",
    "Page",
    "Stack",
    "running",
    "start",
    "wait_until_it_listens",
    "webhook",
]

REPOSITORY: Final = Path(__file__).parents[2]
PROGRAMS: Final = ("prometheus", "prometheus-alertmanager", "prometheus-node-exporter")
PORTS: Final = {"exporter": 7462, "prometheus": 9090, "alertmanager": 9093, "webhook": 9095}
"""Where each listens on the node's loopback address, as the examples have it."""
OTHER: Final = "db-2"
"""A node that Prometheus is told of besides; `other_node.py` makes it, or nobody does."""
OTHER_PORTS: Final = {"exporter": 7463, "node_exporter": 9100}
"""Where its exporters listen, on the same address."""

_HOST: Final = "127.0.0.1"
_RULES: Final = REPOSITORY / "rules"
_STARTS_WITHIN: Final = 900.0


@dataclass(frozen=True, slots=True)
class Page:
    """One alert of a notification that Alertmanager sent."""

    at: float
    """When it came in (time.time())."""
    status: str
    receiver: str
    labels: dict[str, str]
    annotations: dict[str, str]

    @property
    def alert(self) -> str:
        """The alert's name."""
        return self.labels["alertname"]

    def is_about(self, labels: dict[str, str]) -> bool:
        """Tell whether the alert carries all of these labels."""
        return labels.items() <= self.labels.items()


def webhook(file: Path) -> None:
    """Serve until killed: write each alert that Alertmanager posts to a file, one JSON object a line."""

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            notification = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
            with file.open("a", encoding="utf-8") as out:
                for alert in notification["alerts"]:
                    page = Page(
                        time.time(), alert["status"], notification["receiver"], alert["labels"], alert["annotations"]
                    )
                    out.write(json.dumps({name: getattr(page, name) for name in Page.__slots__}) + "\n")
            self.send_response(http.client.OK)
            self.end_headers()

        def log_message(self, *_arguments: object) -> None:
            """Say nothing: the lab's own output is what counts."""

    HTTPServer((_HOST, PORTS["webhook"]), Handler).serve_forever()


@dataclass(frozen=True, slots=True)
class Stack:
    """The running path. What each program logs and the webhook's pages are in `directory`."""

    directory: Path
    labels: dict[str, str]
    """What the scrape configuration adds to every series: `node` and `cluster`."""

    def pages(self) -> list[Page]:
        """Return every alert that has arrived, in order."""
        file = self.directory / "pages"
        return [Page(**json.loads(line)) for line in file.read_text().splitlines()] if file.exists() else []

    def available(self) -> dict[str, tuple[bool, str]]:
        """Return {signal: (available, reason)} as the exporter says it now."""
        text = _fetch("exporter", "/metrics").decode()
        samples = [one for family in text_string_to_metric_families(text) for one in family.samples]
        return {
            one.labels["signal"]: (bool(one.value), one.labels.get("reason", ""))
            for one in samples
            if one.name == "shoal_signal_available"
        }

    @property
    def exporter(self) -> str:
        """The exporter's address."""
        return f"http://{_HOST}:{PORTS['exporter']}"

    def query(self, expression: str) -> list[dict[str, Any]]:
        """Return the result of an instant query: [{"metric": {label: value}, "value": [time, text]}, ...]."""
        answer = json.loads(_fetch("prometheus", f"/api/v1/query?{urllib.parse.urlencode({'query': expression})}"))
        return list(answer["data"]["result"])

    def series(self, seconds: float, step: int) -> list[dict[str, Any]]:
        """Return every series of the last so many seconds: [{"metric": ..., "values": [[time, text], ...]}, ...]."""
        now = time.time()
        asked = {"query": '{__name__=~".+"}', "start": now - seconds, "end": now, "step": step}
        answer = json.loads(_fetch("prometheus", f"/api/v1/query_range?{urllib.parse.urlencode(asked)}", timeout=600))
        return list(answer["data"]["result"])

    def rules(self) -> list[dict[str, Any]]:
        """Return every rule that Prometheus has loaded, with its health."""
        answer = json.loads(_fetch("prometheus", "/api/v1/rules"))
        return [rule for group in answer["data"]["groups"] for rule in group["rules"]]


def _fetch(program: str, path: str, timeout: float = 30) -> bytes:
    url = f"http://{_HOST}:{PORTS[program]}{path}"
    with urllib.request.urlopen(url, timeout=timeout) as answer:
        return bytes(answer.read())


@contextmanager
def start(
    directory: Path,
    options: Sequence[str],
    *,
    interval: int,
    waits: dict[str, dict[str, str]],
    cgroup: Path,
) -> Iterator[Stack]:
    """Start the path, with these options of the exporter; the webhook is running already.

    `interval` is that of scrapes and evaluations in seconds, `waits` is {alert: {"for": ..., "keep_firing_for": ...}},
    `cgroup` is where the exporter runs.
    """
    configuration, labels = _prometheus_configuration(directory, interval, waits)
    alertmanager = _alertmanager_configuration(directory)
    commands: dict[str, list[str]] = {
        "exporter": [sys.executable, "-m", "shoal", *options],
        "alertmanager": [
            "prometheus-alertmanager",
            f"--config.file={alertmanager}",
            f"--storage.path={directory / 'alertmanager'}",
            f"--web.listen-address={_HOST}:{PORTS['alertmanager']}",
            "--cluster.listen-address=",
        ],
        "prometheus": [
            "prometheus",
            f"--config.file={configuration}",
            f"--storage.tsdb.path={directory / 'prometheus'}",
            f"--web.listen-address={_HOST}:{PORTS['prometheus']}",
        ],
    }
    with ExitStack() as stack:
        for name, command in commands.items():
            place = cgroup if name == "exporter" else None
            process = stack.enter_context(running(command, directory / f"{name}.log", place))
            wait_until_it_listens(name, PORTS[name], process, directory / f"{name}.log")
        yield Stack(directory, labels)


@contextmanager
def running(command: list[str], log: Path, cgroup: Path | None = None) -> Iterator[subprocess.Popen[bytes]]:
    """Run a server, in its cgroup if it has one, and end it when the block ends."""
    if cgroup:
        command = ["sh", "-c", 'echo 0 >"$0/cgroup.procs" && exec "$@"', str(cgroup), *command]
    with (
        log.open("wb") as output,
        subprocess.Popen(
            command,
            cwd=REPOSITORY / "exporter",
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=output,
            env={name: value for name, value in os.environ.items() if not name.startswith("SHOAL_")},
            # An interrupt from the terminal is for the lab to handle.
            start_new_session=True,
        ) as process,
    ):
        try:
            yield process
        finally:
            process.terminate()
            try:
                process.wait(10)
            except subprocess.TimeoutExpired:
                process.kill()


def wait_until_it_listens(name: str, port: int, process: subprocess.Popen[bytes], log: Path) -> None:
    """Wait until a server can be connected to. Raises `RuntimeError` with the end of its log if it never can."""
    deadline = time.monotonic() + _STARTS_WITHIN
    while True:
        with suppress(OSError), socket.create_connection((_HOST, port), timeout=1):
            return
        if process.poll() is not None or time.monotonic() > deadline:
            raise RuntimeError(f"{name} does not run; the end of its log: {log.read_text()[-2000:]}")
        time.sleep(0.2)


def _example(name: str) -> dict[str, Any]:
    content: dict[str, Any] = yaml.safe_load((_RULES / "examples" / name).read_text(encoding="utf-8"))
    return content


def _prometheus_configuration(
    directory: Path, interval: int, waits: dict[str, dict[str, str]]
) -> tuple[Path, dict[str, str]]:
    """Write the shipped example and copies of the rules; also return what labels it adds.

    It is of one node; node_exporter is the other's, which has an exporter too.
    """
    rules = directory / "rules"
    rules.mkdir()
    for file in sorted(_RULES.glob("*.yaml")):
        shipped = yaml.safe_load(file.read_text(encoding="utf-8"))
        for group in shipped["groups"]:
            # As all the others here, at the pace of the run.
            group.pop("interval", None)
            for rule in group["rules"]:
                rule.update(waits.get(rule.get("alert", ""), {}))
        (rules / file.name).write_text(yaml.safe_dump(shipped), encoding="utf-8")
    configuration = _example("prometheus.yaml")
    configuration["global"] = {
        "scrape_interval": f"{interval}s",
        "scrape_timeout": f"{interval}s",
        "evaluation_interval": f"{interval}s",
    }
    configuration["rule_files"] = [f"{rules}/*.yaml"]
    jobs = {job["job_name"]: job["static_configs"] for job in configuration["scrape_configs"]}
    labels = jobs["shoal"][0]["labels"]
    other = {
        name: {"targets": [f"{_HOST}:{port}"], "labels": {**labels, "node": OTHER}}
        for name, port in OTHER_PORTS.items()
    }
    jobs["shoal"].append(other["exporter"])
    jobs["node"][:] = [other["node_exporter"]]
    file = directory / "prometheus.yaml"
    file.write_text(yaml.safe_dump(configuration), encoding="utf-8")
    return file, labels


def _alertmanager_configuration(directory: Path) -> Path:
    """Write the shipped example, without inhibition and without waiting for company."""
    configuration = _example("alertmanager.yaml")
    configuration["inhibit_rules"] = []
    for route in _routes(configuration["route"]):
        route.update(group_wait="1s", group_interval="1s")
        # What informs nobody in the field is still to be seen arriving here.
        if route["receiver"] == "nobody":
            route["receiver"] = "chat"
    file = directory / "alertmanager.yaml"
    file.write_text(yaml.safe_dump(configuration), encoding="utf-8")
    return file


def _routes(route: dict[str, Any]) -> Iterator[dict[str, Any]]:
    yield route
    for child in route.get("routes", []):
        yield from _routes(child)
