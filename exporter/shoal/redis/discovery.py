"""Finds the servers that run on this node, by the names of their processes."""

from __future__ import annotations

import ipaddress
import os
import re
from dataclasses import dataclass

import psutil

from shoal.kernel.files import Reason, Unavailable, unavailable_from
from shoal.kernel.namespaces import namespace_id
from shoal.redis.targets import LONGEST_PATH, Target

__all__ = ["NAMES", "Found", "find_servers"]

NAMES = ("redis-server", "valkey-server", "keydb-server")

# The process title that servers write: "redis-server 127.0.0.1:6379 [cluster]", "redis-server unixsocket:/run/r.sock".
_LISTENS = re.compile(r"(?:unixsocket:(?P<path>/\S+)|(?P<host>\S*):(?P<port>[0-9]{1,5}))(?: \[\w+\])?$", re.ASCII)
_WILDCARDS = {"*": "127.0.0.1", "0.0.0.0": "127.0.0.1", "::": "::1", "::*": "::1", "localhost": "127.0.0.1"}  # noqa: S104  (compared, not bound)
_HIGHEST_PORT = 65535


@dataclass(frozen=True, slots=True)
class Found:
    """A server's process. `target` is None where its title does not tell where it listens.

    A server in another network namespace than the exporter's has its own process as `target.namespace_of`.
    """

    pid: int
    target: Target | None


def find_servers(proc: str) -> list[Found]:
    """List the servers of the visible processes, in order of their process ids.

    Where a server listens is in its process title, which anyone may read (set-proc-title and proc-title-template as
    they are by default). The title is only text: nothing that could be a password is sent to a server found so, and
    it must be at an address of its own network namespace. A server's children, which write its files, are left out.
    Raises `Unavailable` when <proc> cannot be listed.
    """
    psutil.PROCFS_PATH = proc
    try:
        processes = {process.pid: process for process in psutil.process_iter(["name"]) if process.info["name"] in NAMES}
    except OSError as error:
        raise unavailable_from(error, proc) from None
    except (psutil.Error, LookupError, RuntimeError, ValueError) as error:
        # psutil reads more of proc than the names, and trusts it to be there.
        raise Unavailable(Reason.NOT_READABLE, f"psutil cannot read {proc}: {error}") from None
    own = namespace_id(proc, "self") or namespace_id("/proc", "self")
    found: list[Found] = []
    for pid, process in sorted(processes.items()):
        try:
            if process.ppid() in processes:
                continue
            title = " ".join(process.cmdline()).strip()
        except psutil.Error:
            continue
        found.append(Found(pid, _target(title, proc, pid, elsewhere=namespace_id(proc, pid) != own)))
    return found


def _target(title: str, proc: str, pid: int, *, elsewhere: bool) -> Target | None:
    match = _LISTENS.search(title)
    if not match:
        return None
    if path := match["path"]:
        if len(os.fsencode(path)) > LONGEST_PATH:
            return None
        # The path is one in the server's own file system, which may be a container's.
        return Target(path, path=f"{proc}/{pid}/root{path}", login=None)
    # A leading dash tells the server not to mind if it cannot have the address.
    host = match["host"].removeprefix("-")
    host = _WILDCARDS.get(host, host)
    try:
        address = ipaddress.ip_address(host)
    except ValueError:
        return None
    port = int(match["port"])
    if not 0 < port <= _HIGHEST_PORT:
        return None
    name = f"[{address}]:{port}" if ":" in host else f"{address}:{port}"
    return Target(name, str(address), port, login=None, namespace_of=pid if elsewhere else None)
