"""Virtual memory counters of the whole node: /proc/vmstat."""

from __future__ import annotations

from shoal.kernel.files import parse_flat_keyed, read

__all__ = ["read_vmstat"]


def read_vmstat(proc: str) -> dict[str, int]:
    """Read /proc/vmstat: {key: pages or events}. `oom_kill` counts since 4.13. Raises `Unavailable` or `ParseError`."""
    path = f"{proc}/vmstat"
    return parse_flat_keyed(read(path), path)
