"""Fixtures of the tests of `check`: the command as a person runs it, and nodes that answer what a test wants."""

from __future__ import annotations

import contextlib
import http.server
import subprocess
import sys
import threading
import time
from typing import TYPE_CHECKING

import pytest

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator


@pytest.fixture
def run(clean_environment: dict[str, str]) -> Callable[..., subprocess.CompletedProcess[str]]:
    """Return a function that runs the command to its end."""

    def run(*arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
        command = [sys.executable, "-m", "shoal", *arguments]
        done = subprocess.run(
            command, capture_output=True, text=True, check=False, timeout=60, env=clean_environment | environment
        )
        assert "Traceback" not in done.stderr + done.stdout
        return done

    return run


@pytest.fixture
def node() -> Iterator[Callable[..., str]]:
    """Return a function that serves answers in turn, the last one for ever, and returns the address.

    The first of them come as many seconds late as `delays` has it.
    """
    servers: list[http.server.HTTPServer] = []

    def serve(*answers: str, status: int = 200, delays: tuple[float, ...] = ()) -> str:
        left, waits = list(answers), list(delays)

        class Handler(http.server.BaseHTTPRequestHandler):
            def do_GET(self) -> None:
                time.sleep(waits.pop(0) if waits else 0)
                body = (left.pop(0) if len(left) > 1 else left[0]).encode()
                self.send_response(status)
                self.send_header("Content-Length", str(len(body)))
                self.end_headers()
                with contextlib.suppress(OSError):
                    self.wfile.write(body)

            def log_message(self, *_arguments: object) -> None:
                """Say nothing."""

        server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        servers.append(server)
        threading.Thread(target=server.serve_forever, daemon=True).start()
        return f"http://127.0.0.1:{server.server_address[1]}"

    yield serve
    for server in servers:
        server.shutdown()
        server.server_close()
