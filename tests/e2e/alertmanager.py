"""A real Alertmanager on loopback with the shipped example, and a webhook that keeps what arrives.

Both are context managers that end what they started, by its own id. `setpriv --pdeathsig` covers the one case in which
neither can run: the test's process being killed.
"""

from __future__ import annotations

import json
import re
import subprocess
import threading
import time
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final, TypeVar

import yaml

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence

__all__ = ["EXAMPLES", "Webhook", "alertmanager", "receiving", "wait_for"]

EXAMPLES: Final = Path(__file__).parents[2] / "rules" / "examples"

_HOST: Final = "127.0.0.1"

_T = TypeVar("_T")


def wait_for(what: str, check: Callable[[], _T | None], within: float) -> _T:
    """Ask until `check` gives anything but None or nothing, and return it. Raises `TimeoutError` naming `what`."""
    deadline = time.monotonic() + within
    while not (result := check()):
        if time.monotonic() > deadline:
            message = f"{what}: not within {within:.0f} s"
            raise TimeoutError(message)
        time.sleep(0.1)
    return result


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
def _server(arguments: Sequence[str], log: Path) -> Iterator[int]:
    """Run a server and yield the port that it, and nobody else, listens on."""
    with (
        log.open("w") as output,
        _running(arguments, stdin=subprocess.DEVNULL, stdout=output, stderr=subprocess.STDOUT) as process,
    ):

        def port() -> int | None:
            if process.poll() is not None:
                message = f"{arguments[0]} ended with {process.returncode}:\n{log.read_text()[-2000:]}"
                raise RuntimeError(message)
            sockets = subprocess.run(["ss", "-Hltnp"], check=True, capture_output=True, text=True).stdout
            own = re.search(rf" {re.escape(_HOST)}:([0-9]+) .*\bpid={process.pid},", sockets)
            return int(own[1]) if own else None

        yield wait_for(f"{arguments[0]} listens", port, within=30)


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


@contextmanager
def alertmanager(directory: Path, webhook: Webhook) -> Iterator[int]:
    """Run the shipped example of a configuration, its receivers at the webhook, and without waiting for company.

    Yields its port.
    """
    configuration = yaml.safe_load((EXAMPLES / "alertmanager.yaml").read_text(encoding="utf-8"))
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


def _routes(route: dict[str, Any]) -> Iterator[dict[str, Any]]:
    yield route
    for child in route.get("routes", []):
        yield from _routes(child)
