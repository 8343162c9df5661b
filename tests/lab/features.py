"""What a machine may lack for a failure to be caused on it, and how to tell."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Final

from tests.lab.fault import Feature
from tests.lab.node import cgroup_mount

__all__ = ["CPU_CONTROLLER", "DELAY_ACCOUNTING", "IN_VM", "IO_CONTROLLER", "MEMORY_CONTROLLER"]

IN_VM: Final = bool(os.environ.get("SHOAL_VM"))
"""Whether the machine is the lab's own, so that settings of its initial namespace may be changed."""

_DELAYACCT: Final = Path("/proc/sys/kernel/task_delayacct")


def _controller(name: str, *, kernel: bool) -> Feature:
    def missing() -> str:
        controllers = (cgroup_mount() / "cgroup.controllers").read_text().split()
        return "" if name in controllers else f"this kernel has the {name} controller on cgroup v1"

    return Feature(f"{name} controller of cgroup v2", missing, kernel=kernel)


def _no_delay_accounting() -> str:
    # Before 5.14 there is no such file, and accounting is on unless a boot parameter says otherwise.
    if not _DELAYACCT.exists():
        return "it was switched off at boot" if "nodelayacct" in Path("/proc/cmdline").read_text().split() else ""
    if IN_VM:
        _DELAYACCT.write_text("1")
    return "" if _DELAYACCT.read_text().strip() == "1" else "kernel.task_delayacct is 0, for the whole machine"


MEMORY_CONTROLLER: Final = _controller("memory", kernel=True)
CPU_CONTROLLER: Final = _controller("cpu", kernel=True)
IO_CONTROLLER: Final = _controller("io", kernel=False)
DELAY_ACCOUNTING: Final = Feature("delay accounting", _no_delay_accounting, kernel=True)
