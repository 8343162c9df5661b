"""Kernel interfaces spoken over netlink: framing in `core`, one module for each interface beside it."""

from __future__ import annotations

__all__: list[str] = []
