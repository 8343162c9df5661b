"""Memory of one cgroup v2: limits, usage, events and what the usage is made of."""

from __future__ import annotations

from shoal.kernel.files import ParseError, is_count, lines, parse_flat_keyed, read

__all__ = ["parse_amount", "read_amount", "read_events", "read_memory_stat"]


def parse_amount(data: bytes, file: str = "memory") -> int | None:
    """Return the bytes of a one-value memory file, or None for `max`, which means no limit."""
    (text, *more) = lines(data, file)
    if text == b"max":
        return None
    if more or not is_count(text):
        raise ParseError(file, 1, "bytes or the word max")
    return int(text)


def read_amount(name: str, dir_fd: int) -> int | None:
    """Read memory.current, .max, .high (4.5), .swap.current, .swap.max or .peak (5.19) of an open cgroup directory.

    Raises `Unavailable` (the root cgroup has none of these), `Vanished` or `ParseError`.
    """
    return parse_amount(read(name, dir_fd=dir_fd), name)


def read_events(name: str, dir_fd: int) -> dict[str, int]:
    """Read memory.events (4.5; counts descendants too) or memory.events.local (5.3; the cgroup alone).

    `oom` and `max` count in the cgroup whose limit was hit, `oom_kill` in the one whose process was killed.
    """
    return parse_flat_keyed(read(name, dir_fd=dir_fd), name)


def read_memory_stat(dir_fd: int) -> dict[str, int]:
    """Read memory.stat of an open cgroup directory: bytes for the amounts, pages or events for the counters.

    Grows with every kernel: `workingset_refault_file` since 5.9, `pgscan_direct` since 6.1.
    """
    return parse_flat_keyed(read("memory.stat", dir_fd=dir_fd), "memory.stat")
