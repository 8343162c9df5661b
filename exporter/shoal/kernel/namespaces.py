"""Finds the network namespaces that have processes, without a capability, and opens a socket inside one, with one."""

from __future__ import annotations

import ctypes
import os
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import TYPE_CHECKING, TypeVar

from shoal.kernel.files import raise_if_exhausted, unavailable_from
from shoal.kernel.processes import check_processes_visible

if TYPE_CHECKING:
    from collections.abc import Callable

__all__ = [
    "NetworkNamespace",
    "find_network_namespaces",
    "named_namespaces",
    "namespace_id",
    "namespace_inode",
    "open_in_namespace",
    "visit_namespaces",
]

_T = TypeVar("_T")

_CLONE_NEWNET = 0x40000000
_LIBC = ctypes.CDLL(None, use_errno=True)


@dataclass(frozen=True, slots=True)
class NetworkNamespace:
    """A network namespace: `id` tells it from others while it lives, `pid` is the lowest process id inside.

    `id` is the inode of /proc/<pid>/net/netstat: procfs gives each namespace its own entries, so processes
    share it exactly when they share the namespace (seen on 5.10 to 6.18). Unlike /proc/<pid>/ns/net it needs
    no CAP_SYS_PTRACE.
    """

    id: int
    pid: int


def find_network_namespaces(proc: str) -> list[NetworkNamespace]:
    """List the namespaces of all visible processes, in order of their lowest process id.

    A namespace that is only kept by a bind mount and has no process is not found: nothing listens there.
    Raises `Unavailable` when <proc> cannot be listed, or hides processes.
    """
    check_processes_visible(proc)
    try:
        pids = sorted(int(name) for name in os.listdir(proc) if name.isdecimal() and name.isascii())
    except OSError as error:
        raise unavailable_from(error, proc) from None
    found: dict[int, int] = {}
    for pid in pids:
        inode = namespace_id(proc, pid)
        if inode is not None:
            found.setdefault(inode, pid)
    return [NetworkNamespace(inode, pid) for inode, pid in found.items()]


def namespace_id(proc: str, pid: int | str) -> int | None:
    """Return the identity of a process's network namespace (see `NetworkNamespace`), None when the process ended."""
    try:
        return os.stat(f"{proc}/{pid}/net/netstat").st_ino
    except OSError:
        return None


def namespace_inode(proc: str, pid: int) -> int | None:
    """Return the inode that identifies the process's network namespace to `ip netns`, None without CAP_SYS_PTRACE."""
    try:
        return os.stat(f"{proc}/{pid}/ns/net").st_ino
    except OSError:
        return None


def named_namespaces(rootfs: str) -> dict[int, str]:
    """Return {inode: name} of the namespaces that `ip netns` has named, from <rootfs>/run/netns; {} without any."""
    directory = f"{rootfs}/run/netns"
    names: dict[int, str] = {}
    try:
        listed = sorted(os.listdir(directory))
    except OSError as error:
        raise_if_exhausted(error, directory)
        return names
    for name in listed:
        try:
            names[os.stat(f"{directory}/{name}").st_ino] = name
        except OSError:
            continue
    return names


def open_in_namespace(proc: str, pid: int, opener: Callable[[], _T]) -> _T:
    """Return what `opener` opens inside the network namespace of a process: a socket belongs to where it was made.

    Raises what `visit_namespaces` raises. The socket keeps the namespace alive: close it in the same scrape.
    """

    def open_there(enter: Callable[[int], None]) -> _T:
        enter(pid)
        return opener()

    return visit_namespaces(proc, open_there)


def visit_namespaces(proc: str, visit: Callable[[Callable[[int], None]], _T]) -> _T:
    """Return what `visit` returns, which is given a function that enters the network namespace of a process.

    It is called in a thread of its own, which may enter many namespaces and ends in the last, so no thread ever has to
    find its way back; a thread for each would take fifty times as long as to enter. Entering needs CAP_SYS_ADMIN and
    CAP_SYS_PTRACE, and raises `Unavailable`, or `Vanished` when the process ended; raises what `visit` raises.
    """

    def enter(pid: int) -> None:
        path = f"{proc}/{pid}/ns/net"
        try:
            fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
        except OSError as error:
            raise unavailable_from(error, path) from None
        try:
            if _LIBC.setns(fd, _CLONE_NEWNET):
                number = ctypes.get_errno()
                raise unavailable_from(OSError(number, os.strerror(number)), f"the network namespace of process {pid}")
        finally:
            os.close(fd)

    with ThreadPoolExecutor(1, thread_name_prefix="shoal-netns") as thread:
        return thread.submit(visit, enter).result()
