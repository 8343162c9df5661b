"""What a machine may lack for a failure to be caused on it, and how to tell."""

from __future__ import annotations

import os
from typing import Final

from tests.lab.fault import Feature
from tests.lab.node import cgroup_mount

__all__ = ["MEMORY_CONTROLLER", "OWN_MACHINE"]


def _no_memory_controller() -> str:
    controllers = (cgroup_mount() / "cgroup.controllers").read_text().split()
    return "" if "memory" in controllers else "this kernel has the memory controller on cgroup v1"


def _shared_machine() -> str:
    return "" if os.environ.get("SHOAL_VM") else "nf_conntrack_max is this machine's own and is left alone"


MEMORY_CONTROLLER: Final = Feature("memory controller of cgroup v2", _no_memory_controller, kernel=True)

OWN_MACHINE: Final = Feature("a machine to itself", _shared_machine)
"""For a setting of the initial namespace, which is the whole machine's."""
