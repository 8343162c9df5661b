"""Set up listeners or tracked connections in the network namespace that this runs in, and print what each reader sees.

Run by the netlink tests under `unshare --net`, so that no thread of the test process ever changes its namespace:

    unshare --net python netlink_scene.py listeners|many|conntrack

The answer is one JSON object: what this exporter's decoders say, what pyroute2 says, what the usual tools say.
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
import os
import re
import resource
import socket
import struct
import subprocess
import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pyroute2 import DiagSocket, NFCTSocket

from shoal.kernel.netlink.conntrack import read_conntrack_statistics, read_conntrack_totals
from shoal.kernel.netlink.sock_diag import read_listeners

if TYPE_CHECKING:
    from collections.abc import Callable

LISTEN = 10
SKMEMINFO = 7
OTHER_UID = 12345


def run(*command: str) -> str:
    """Run a program and return what it printed."""
    return subprocess.run(command, check=True, capture_output=True, text=True).stdout


def listen(
    family: socket.AddressFamily,
    address: str,
    backlog: int,
    *,
    port: int = 0,
    options: tuple[tuple[int, int], ...] = (),
) -> socket.socket:
    """Return a listening socket; options are pairs of level and name, each set to 1."""
    sock = socket.socket(family)
    for level, name in options:
        sock.setsockopt(level, name, 1)
    sock.bind((address, port))
    sock.listen(backlog)
    return sock


def netstat() -> dict[str, int]:
    """Return the TcpExt counters of this namespace."""
    names, values = Path("/proc/self/net/netstat").read_text().splitlines()[:2]
    return dict(zip(names.split()[1:], map(int, values.split()[1:]), strict=True))


def by_pyroute2() -> list[dict[str, Any]]:
    """Return the listeners as pyroute2 decodes them, under our names."""
    found = []
    with DiagSocket() as diag:
        diag.bind()
        for family in (socket.AF_INET, socket.AF_INET6):
            for each in diag.get_sock_stats(family=family, states=1 << LISTEN, extensions=1 << (SKMEMINFO - 1)):
                memory = bytes.fromhex(each.get_attr("INET_DIAG_SKMEMINFO").replace(":", ""))
                found.append(
                    {
                        "family": each["idiag_family"],
                        "address": each["idiag_src"],
                        "port": each["idiag_sport"],
                        "interface": each["idiag_if"],
                        "queue_length": each["idiag_rqueue"],
                        "queue_limit": each["idiag_wqueue"],
                        "drops": struct.unpack("=9I", memory)[8],
                        "cgroup_id": each.get_attr("INET_DIAG_CGROUP_ID"),
                        "cookie": each["idiag_cookie"],
                        "uid": each["idiag_uid"],
                        "inode": each["idiag_inode"],
                    }
                )
    return found


def by_ss() -> list[dict[str, Any]]:
    """Return what ss prints, in its own notation (`*` for dual-stack, brackets, a device after %)."""
    found = []
    for line in run("ss", "-ltnmeHO").splitlines():
        _, length, limit, local, *_ = line.split()
        address, _, port = local.rpartition(":")
        inode = re.search(r"ino:(\d+)", line)
        drops = re.search(r",d(\d+)\)", line)
        assert inode
        assert drops
        found.append(
            {
                "address": address,
                "port": int(port),
                "queue_length": int(length),
                "queue_limit": int(limit),
                "inode": int(inode[1]),
                "drops": int(drops[1]),
            }
        )
    return found


@contextlib.contextmanager
def cgroup() -> Any:
    """Move this process into a cgroup of its own and give the directory's inode; None without cgroup v2."""
    mount = next(
        (line.split()[1] for line in Path("/proc/mounts").read_text().splitlines() if " cgroup2 " in line), None
    )
    if mount is None:
        yield None
        return
    own = next(line.split("::")[1] for line in Path("/proc/self/cgroup").read_text().splitlines() if "::" in line)
    home = Path(mount + own)
    away = home / f"shoal-test-{os.getpid()}"
    away.mkdir()
    try:
        (away / "cgroup.procs").write_text(str(os.getpid()))
        yield away.stat().st_ino
    finally:
        (home / "cgroup.procs").write_text(str(os.getpid()))
        away.rmdir()


def overflow(listener: socket.socket, connections: int) -> None:
    """Connect without anybody accepting, and leave no retransmission running behind."""
    clients = []
    for _ in range(connections):
        client = socket.socket()
        client.settimeout(0)
        with contextlib.suppress(BlockingIOError):
            client.connect(listener.getsockname())
        clients.append(client)
    time.sleep(0.2)
    for client in clients:
        client.close()


def listeners() -> dict[str, Any]:
    """Listeners of every kind, two of them too full, one in a cgroup of its own, one of another user."""
    loopback6 = "::1"
    mapped = "::ffff:127.0.0.1"
    reuse = ((socket.SOL_SOCKET, socket.SO_REUSEPORT),)
    v6only = ((socket.IPPROTO_IPV6, socket.IPV6_V6ONLY),)
    dual = socket.socket(socket.AF_INET6)
    dual.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, 0)
    dual.bind(("::", 0))
    dual.listen(7)
    made = {
        "any": listen(socket.AF_INET, "", 3),
        "dual": dual,
        "v6only": listen(socket.AF_INET6, "::", 9, options=v6only),
        "loopback6": listen(socket.AF_INET6, loopback6, 11),
        "mapped": listen(socket.AF_INET6, mapped, 12),
        "beyond_somaxconn": listen(socket.AF_INET, "127.0.0.2", 1 << 20),
        "zero": listen(socket.AF_INET, "127.0.0.3", 0),
        "full": listen(socket.AF_INET, "127.0.0.4", 2),
        "fuller": listen(socket.AF_INET, "127.0.0.5", 4),
        "reuse1": (first := listen(socket.AF_INET, "127.0.0.6", 5, options=reuse)),
        "reuse2": listen(socket.AF_INET, "127.0.0.6", 6, port=first.getsockname()[1], options=reuse),
    }
    bound = socket.socket()
    bound.setsockopt(socket.SOL_SOCKET, socket.SO_BINDTODEVICE, b"lo")
    bound.bind(("127.0.0.7", 0))
    bound.listen(8)
    made["bound"] = bound
    os.seteuid(OTHER_UID)
    made["other_user"] = listen(socket.AF_INET, "127.0.0.8", 1)
    os.seteuid(0)
    with cgroup() as cgroup_id:
        made["own_cgroup"] = listen(socket.AF_INET, "127.0.0.9", 1)
        overflow(made["full"], 12)
        overflow(made["fuller"], 25)
        return {
            "ours": [dataclasses.asdict(each) for each in read_listeners()],
            "pyroute2": by_pyroute2(),
            "ss": by_ss(),
            "netstat": netstat(),
            "somaxconn": int(Path("/proc/sys/net/core/somaxconn").read_text()),
            "lo": socket.if_nametoindex("lo"),
            "cgroup_id": cgroup_id,
            "made": {name: [*sock.getsockname()[:2], os.fstat(sock.fileno()).st_ino] for name, sock in made.items()},
        }


def many() -> dict[str, Any]:
    """Two thousand listeners, IPv4 and IPv6, as we read them and as ss does."""
    resource.setrlimit(resource.RLIMIT_NOFILE, (4096, 4096))
    kept = [listen(*((socket.AF_INET, "127.0.0.1") if i % 2 else (socket.AF_INET6, "::1")), 8) for i in range(2000)]
    return {
        "made": len(kept),
        "ours": [each.inode for each in read_listeners()],
        "ss": [each["inode"] for each in by_ss()],
    }


def conntrack() -> dict[str, Any]:
    """Connections put in by hand and by packets, and a packet that belongs to none."""
    run(
        "nft",
        "add table inet t; add chain inet t c { type filter hook input priority 0; }; add rule inet t c ct state new",
    )
    for port in range(1, 6):
        run(
            "conntrack",
            "-I",
            "-s",
            "10.0.0.1",
            "-d",
            "10.0.0.2",
            "-p",
            "udp",
            "--sport",
            str(port),
            "--dport",
            "53",
            "-t",
            "60",
        )
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as sock:
        for port in range(1, 4):
            sock.sendto(b"new", ("127.0.0.1", port))
    with socket.socket(socket.AF_INET, socket.SOCK_RAW, socket.IPPROTO_TCP) as raw:
        for _ in range(7):
            raw.sendto(bytes(20), ("127.0.0.1", 0))
    names = [field.name for field in dataclasses.fields(read_conntrack_statistics())]
    with NFCTSocket() as nfct:
        per_cpu = [dict(each["attrs"]) for each in nfct.stat()]
        (totals,) = nfct.count()
    tool = [dict(re.findall(r"(\w+)=(\d+)", line)) for line in run("conntrack", "-S").splitlines()]
    return {
        "statistics": dataclasses.asdict(read_conntrack_statistics()),
        "totals": dataclasses.asdict(read_conntrack_totals()),
        "statistics_pyroute2": {name: sum(each[f"CTA_STATS_{name.upper()}"] for each in per_cpu) for name in names},
        "totals_pyroute2": {
            "entries": totals.get_attr("CTA_STATS_GLOBAL_ENTRIES"),
            "limit": totals.get_attr("CTA_STATS_GLOBAL_MAX_ENTRIES"),
        },
        "statistics_tool": {
            name: sum(int(each["chaintoolong" if name == "chain_toolong" else name]) for each in tool) for name in names
        },
        "entries_tool": int(run("conntrack", "-C")),
        "limit_sysctl": int(Path("/proc/sys/net/netfilter/nf_conntrack_max").read_text()),
    }


if __name__ == "__main__":
    scenes: dict[str, Callable[[], dict[str, Any]]] = {"listeners": listeners, "many": many, "conntrack": conntrack}
    run("ip", "link", "set", "lo", "up")
    json.dump(scenes[sys.argv[1]](), sys.stdout)
