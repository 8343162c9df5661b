"""The fourteen failures, a file each. To add one, copy a file: its `FAULT` is found by being there."""

from __future__ import annotations

from dataclasses import replace
from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from tests.lab.fault import Fault

__all__ = ["load"]


def load() -> list[Fault]:
    """Return all failures by their number."""
    names = [file.stem for file in Path(__file__).parent.glob("[!_]*.py")]
    found = [replace(import_module(f"tests.lab.faults.{name}").FAULT, name=name) for name in names]
    return sorted(found, key=lambda fault: fault.number)
