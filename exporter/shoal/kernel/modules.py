"""Whether a kernel module is there already, so that a request never makes the kernel load one.

A netlink request to a subsystem that nobody serves makes the kernel run modprobe for it (request_module in
net/netfilter/nfnetlink.c), and a module that tracks connections changes what the machine does with its packets.
"""

from __future__ import annotations

import os
from typing import TYPE_CHECKING

from shoal.kernel.files import Reason, Unavailable, lines, read

if TYPE_CHECKING:
    from shoal.kernel.files import Roots

__all__ = ["parse_modules", "require_module"]


def parse_modules(data: bytes) -> frozenset[str]:
    """Return the names in /proc/modules: the first word of each line, with underscores. Empty without any."""
    if not data:
        return frozenset()
    return frozenset(line.split(b" ", 1)[0].decode("ascii", "replace") for line in lines(data, "modules"))


def require_module(roots: Roots, name: str) -> None:
    """Return if the module `name` (with underscores) is loaded, is built in, or could not be loaded anyway.

    A kernel without /proc/modules (CONFIG_MODULES off) loads nothing. Otherwise the module is in that list, or in
    the list of what was built in, which the distribution installs as /lib/modules/<release>/modules.builtin.
    Raises `Unavailable` (NOT_IN_KERNEL) when neither has it: then a request could load it.
    """
    try:
        loaded = parse_modules(read(f"{roots.proc}/modules"))
    except Unavailable as error:
        if error.reason is Reason.NOT_IN_KERNEL:
            return
        raise
    if name in loaded or name in _built_in(roots):
        return
    raise Unavailable(Reason.NOT_IN_KERNEL, f"the kernel module {name} is not loaded, and asking would load it")


def _built_in(roots: Roots) -> frozenset[str]:
    """Return the modules that this kernel was built with; none where the list is not installed or not mounted."""
    try:
        listed = read(f"{roots.rootfs}/lib/modules/{os.uname().release}/modules.builtin")
    except Unavailable:
        return frozenset()
    paths = listed.decode("ascii", "replace").split("\n")
    return frozenset(path.rpartition("/")[2].partition(".")[0].replace("-", "_") for path in paths)
