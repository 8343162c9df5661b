"""prometheus_client's own server with nothing to collect: what a scrape costs a Python program that only answers."""

from __future__ import annotations

import sys
import threading

from prometheus_client import start_http_server


def main() -> None:
    """Serve where --web.listen-address says, until it is ended."""
    host, _, port = sys.argv[1].removeprefix("--web.listen-address=").rpartition(":")
    start_http_server(int(port), host)
    threading.Event().wait()


if __name__ == "__main__":
    main()
