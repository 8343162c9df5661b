"""A table of connections that is full, on a machine of which nobody else uses it."""

from __future__ import annotations

import contextlib
import socket
import subprocess
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Iterator

__all__ = ["full_table"]

_LIMIT = Path("/proc/sys/net/netfilter/nf_conntrack_max")


@contextlib.contextmanager
def full_table(most: int) -> Iterator[None]:
    """Have conntrack, which is loaded, drop connections as its table of `most` is full; afterwards it is as it was.

    Whoever comes next would else have his own connections over the loopback device dropped.
    """
    before = _LIMIT.read_text(encoding="ascii")
    rules = "table inet t { chain c { type filter hook output priority 0; ct state new counter; }; }"
    try:
        subprocess.run(["ip", "link", "set", "lo", "up"], check=True)
        subprocess.run(["nft", rules], check=True)
        _LIMIT.write_text(str(most), encoding="ascii")
        with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as sender:
            for number in range(4 * most):
                with contextlib.suppress(OSError):
                    sender.sendto(b"x", (f"127.0.{number >> 8}.{number & 255}", 7000))
        yield
    finally:
        subprocess.run(["nft", "flush", "ruleset"], check=True)
        subprocess.run(["conntrack", "-F"], check=True, capture_output=True)
        _LIMIT.write_text(before, encoding="ascii")
