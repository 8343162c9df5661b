"""Every parser of bytes that the exporter has, with input that a kernel, a server or a person gave it.

The recorded kernels are in tests/unit/fixtures; what they do not have stands here, as the kernel writes it.
"""

from __future__ import annotations

import asyncio
import json
import os
import struct
import tempfile
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tests.unit.fuzz.mutations import Shape

from shoal.inventory import Owner, _identity, _KubeletNames, _owner_of
from shoal.kernel import (
    addresses,
    arp,
    cgroups,
    conntrack,
    cpu,
    diskstats,
    files,
    iptables,
    memory,
    modules,
    mounts,
    netstat,
    port_range,
    pressure,
    processes,
    schedstat,
    sockstat,
    sysctls,
)
from shoal.kernel.files import ParseError, Unavailable
from shoal.kernel.netlink import (
    conntrack as ctnetlink,
)
from shoal.kernel.netlink import (
    conntrack_entries,
    core,
    nat_rules,
    neighbours,
    peers,
    ports,
    routes,
    sock_diag,
    taskstats,
)
from shoal.kubernetes import endpoints, watch
from shoal.redis import client, discovery, info, targets
from shoal.redis.errors import Down, DownReason, ErrorReply, MalformedReply
from shoal.settings import SettingsError
from shoal.web_config import WebConfig

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

__all__ = ["PARSERS", "Parser"]

FIXTURES = Path(__file__).parents[1] / "fixtures"
_MESSAGES = 12
# NLMSG_MIN_TYPE: those below are of netlink itself, such as the end of a dump.
_FIRST_TYPE = 16


@dataclass(frozen=True, slots=True)
class Parser:
    """How a parser is called, what it is given, and what it promises."""

    parse: Callable[[bytes], Any]
    seeds: tuple[bytes, ...] = field(repr=False)
    shape: Shape = Shape.TEXT
    errors: tuple[type[Exception], ...] = (ParseError,)
    sums: bool = False
    """Its numbers are sums over lines or messages, so that of fewer they are less."""
    ends_in_newline: bool = True
    """Of a text: that one without a newline at its end was cut short, and is refused."""
    sound: Callable[[Any], bool] = lambda _: True
    """What is true of all that it returns."""


def recorded(*patterns: str, most: int = 8) -> tuple[bytes, ...]:
    """Return the different contents of recorded files, shortest first."""
    found = {path.read_bytes() for pattern in patterns for path in sorted(FIXTURES.glob(pattern)) if path.is_file()}
    kept = sorted((data for data in found if data), key=lambda data: (len(data), data))
    assert kept, f"nothing is recorded as {patterns}"
    # Evenly over all sizes.
    return tuple(kept[:: max(1, len(kept) // most)])


def dumps(pattern: str) -> tuple[bytes, ...]:
    """Return recorded netlink messages, the first dozen of each dump."""

    def first(data: bytes) -> bytes:
        end = 0
        for number, message in enumerate(core.split(data)):
            if number == _MESSAGES:
                break
            end += 16 + len(message.body) + 3 & ~3
        return data[:end]

    return tuple(map(first, recorded(f"*/netlink/{pattern}.bin")))


def message(body: bytes) -> bytes:
    """Return a netlink message."""
    return struct.pack("=IHHII", 16 + len(body), 28, 0, 1, 1) + body


def attribute(kind: int, value: bytes) -> bytes:
    """Return a netlink attribute, padded."""
    return struct.pack("=HH", 4 + len(value), kind) + value + bytes(-len(value) % 4)


def bodies(data: bytes) -> Iterator[bytes]:
    """Return what follows the headers of netlink messages."""
    return (one.body for one in core.split(data) if one.kind >= _FIRST_TYPE)


def _expression(name: bytes, *data: bytes) -> bytes:
    return attribute(1, attribute(1, name + b"\0") + attribute(2, b"".join(data)))


def _u32(kind: int, value: int) -> bytes:
    return attribute(kind, value.to_bytes(4, "big"))


def _immediate(register: int, value: bytes) -> bytes:
    return _expression(b"immediate", _u32(1, register), attribute(2, attribute(1, value)))


def _rule(*expressions: bytes, family: int = 2) -> bytes:
    return message(bytes([family, 0, 0, 0]) + attribute(1, b"nat\0") + attribute(4, b"".join(expressions)))


_DNAT = _expression(b"nat", _u32(1, 1), _u32(2, 2), _u32(3, 1), _u32(5, 2))
_DNAT6 = _expression(b"nat", _u32(1, 1), _u32(2, 10), _u32(3, 1), _u32(5, 2))
_INFO = struct.pack("=I16s16s2s2s", 3, bytes([10, 0, 0, 1]), bytes([10, 0, 0, 9]), b"\0\x50", b"\0\x50")
_OLD_INFO = struct.pack("=4xI4s4s2s2s", 3, bytes([10, 0, 0, 1]), bytes([10, 0, 0, 1]), b"\0\x50", b"\0\x50")
_RULES = (
    _rule(_immediate(1, bytes([10, 244, 0, 2])), _immediate(2, b"\0\x35"), _DNAT),
    _rule(_immediate(1, bytes(15) + b"\1"), _immediate(2, b"\0\x35"), _DNAT6, family=10),
    _rule(_expression(b"lookup", attribute(1, b"m\0"), _u32(2, 1), _u32(3, 1)), _DNAT),
    _rule(_expression(b"target", attribute(1, b"DNAT\0"), _u32(2, 2), attribute(3, _INFO))),
    _rule(_expression(b"target", attribute(1, b"DNAT\0"), _u32(2, 0), attribute(3, _OLD_INFO))),
    _rule(_expression(b"target", attribute(1, b"NETMAP\0"), _u32(2, 0), attribute(3, _OLD_INFO))),
)
_ELEMENT = attribute(
    1, attribute(1, attribute(1, bytes(4))) + attribute(2, attribute(1, bytes([10, 0, 0, 1, 0, 80, 0, 0])))
)
_ELEMENTS = message(bytes([2, 0, 0, 0]) + attribute(1, b"nat\0") + attribute(2, b"m\0") + attribute(3, _ELEMENT * 3))
_MAP_TARGETS = [nat_rules._Target((0,), (0,), (1,), (1,))]
_CHAINS = b"".join(
    message(bytes([2, 0, 0, 0]) + attribute(1, name + b"\0") + attribute(7, kind + b"\0"))
    for name, kind in ((b"nat", b"nat"), (b"filter", b"filter"))
)
_FAMILY = message(bytes(4) + attribute(2, b"TASKSTATS\0") + attribute(1, struct.pack("=H", 28)))
_ARP = struct.pack(">HHBBH", 1, 0x0800, 6, 4, 2) + bytes(range(20)) + bytes(18)

_TRIE = b"""Main:
  +-- 0.0.0.0/0 3 0 5
     |-- 0.0.0.0
        /0 universe UNICAST
     +-- 10.3.3.0/24 2 0 2
        |-- 10.3.3.0
           /24 link UNICAST
        |-- 10.3.3.3
           /32 host LOCAL
        |-- 10.3.3.255
           /32 link BROADCAST
Local:
     |-- 127.0.0.1
        /32 host LOCAL
"""
_INET6 = b"""fd000000000000000000000000000005 02 40 00 80     eth0
fe80000000000000000000000000aaaa 02 40 20 80     eth0
00000000000000000000000000000001 01 80 10 80       lo
"""
_ARP_CACHE = b"""entries  allocs   destroys hash_grows lookups  hits     unresolved_discards table_fulls
00000002 00004f66 00004864 00000008   00021661 00013e7a 00000a00            00000001
00000002 00005966 00006066 00000000   00027c97 00016d98 0000000b            00000000
"""
_OVERLAY = (
    b"617 480 0:57 / / rw,relatime master:301 - overlay overlay rw,lowerdir=/l/A:/l/B,upperdir=/o/a1/diff,"
    b"workdir=/o/a1/work\n618 617 0:59 / /proc rw,nosuid - proc proc rw\n"
)
_MODULES = b"nf_conntrack 172032 2 nf_nat,xt_conntrack, Live 0x0000000000000000\nnf_nat 57344 0 - Live 0x00\n"
_INFO_REPLY = (
    b"# Server\r\nredis_version:7.0.15\r\nprocess_id:4242\r\nconfig_file:/etc/redis/redis.conf\r\n\r\n"
    b"# Persistence\r\nloading:0\r\naof_enabled:1\r\naof_delayed_fsync:17\r\naof_last_write_status:ok\r\n"
)
_CONFIG_REPLY = json.dumps(["appendfsync", "everysec", "dir", "/var/lib/redis"]).encode()
_LATENCY_REPLY = json.dumps([["aof-fsync-always", 1764115200, 12, 300], ["fork", 1764115201, 4, 5, 70, 3]]).encode()
_WEB = (
    b"""tls_server_config: {}
http_server_config:
  http2: false
  headers:
    X-Frame-Options: deny
basic_auth_users:
  alice: $2b$10$CyHXoAACDKWyTYGtEdnlCOCV8Sf2kT3Zl6V0TLOJZIJ5RUqcSxuMW
""",
    b'{"http_server_config": {"headers": {"X-Content-Type-Options": "nosniff"}}}\n',
)
_UID = "0f8d3c1e-5b7a-4c2d-9e6f-1a2b3c4d5e6f"
_ID = "ef0badbf557b9fb38522b095277dc1a94e8cb3b48cf4aac4dcdbc0e8a811b63d"
_PATHS = (
    f"/kubepods.slice/kubepods-pod{_UID.replace('-', '_')}.slice/cri-containerd-{_ID}.scope".encode(),
    f"/kubepods/burstable/pod{_UID}/{_ID}/below".encode(),
    f"/system.slice/docker-{_ID}.scope".encode(),
    b"/user.slice/user-1000.slice/user@1000.service/app.slice/a.service",
)
_TITLES = (
    b"redis-server 127.0.0.1:6379 [cluster]",
    b"/usr/bin/valkey-server *:7000",
    b"redis-server unixsocket:/run/redis/r.sock",
    b"redis-server -::1:6379",
)


def _objects(data: bytes) -> object:
    """Return what redis-py makes of a reply of arrays, numbers and texts, here written as JSON."""

    def made(value: object) -> object:
        if isinstance(value, list):
            return [made(item) for item in value]
        if isinstance(value, bool | float | dict):
            return str(value).encode()
        return value.encode("utf-8", "surrogatepass") if isinstance(value, str) else value

    return made(json.loads(data))


def _reply(parse: Callable[[object], object]) -> Callable[[bytes], object]:
    def call(data: bytes) -> object:
        try:
            reply = _objects(data)
        except (ValueError, RecursionError):
            return None
        return parse(reply)

    return call


class _Nowhere:
    """Takes what is written to a server."""

    def writelines(self, _: object) -> None:
        """Let it go."""

    def close(self) -> None:
        """Be closed already."""

    abort = close

    @property
    def transport(self) -> _Nowhere:
        """Return what can be aborted."""
        return self


def _protocol(data: bytes) -> object:
    """Return what a connection makes of the bytes that come from a server, to INFO, CONFIG GET and LATENCY LATEST."""

    async def ask() -> list[object]:
        reader = client._Reader(asyncio.get_running_loop())
        connection = client._Connection("a server", reader, _Nowhere(), "", "")  # type: ignore[arg-type]
        connection._reader, connection._writer = connection._stream
        connection._parser.on_connect(connection)  # type: ignore[no-untyped-call]
        asked = client.Client(connection, reader, _Nowhere(), None, same_host=True)  # type: ignore[arg-type]
        replies = [asked.send(word) for word in ("INFO", "CONFIG", "LATENCY")]
        reader.feed_data(data)
        reader.feed_eof()
        await asked.ended
        found: list[object] = []
        for reply, parse in zip(replies, (info.parse_info, info.parse_config, info.parse_latency), strict=True):
            try:
                found.append(parse(await reply))
            except (Down, ErrorReply, MalformedReply):
                found.append(None)
        await asked.close(Down(DownReason.CLOSED, "the end"))
        return found

    return asyncio.run(ask())


_RESP = (
    b"$%d\r\n%s\r\n*2\r\n$3\r\ndir\r\n$4\r\n/var\r\n*1\r\n*4\r\n$4\r\nfork\r\n:1764115200\r\n:12\r\n:300\r\n"
    % (len(_INFO_REPLY), _INFO_REPLY),
    b"-NOAUTH Authentication required.\r\n-NOPERM no\r\n*0\r\n",
)


def _web_config(data: bytes) -> object:
    with tempfile.NamedTemporaryFile() as file:
        file.write(data)
        file.flush()
        return WebConfig(file.name).current.headers


def _take(data: bytes) -> object:
    following = watch.EndpointWatch({}, "")
    for line in data.split(b"\n"):
        if line.strip():
            following._take(line)
    return len(following._endpoints)


def _one_address_long(backends: nat_rules.NatRules) -> bool:
    return all(len(one) in (6, 18) for one in backends.exact) and all(
        len(low) == len(high) in (4, 16) and 0 <= first <= 65535 and 0 <= last <= 65535
        for low, high, first, last in backends.ranges
    )


def _known_addresses(route: routes.Route) -> bool:
    return all(one is None or len(one) in (4, 16) for one in (route.gateway, route.source))


def _entry_is_sound(entries: list[conntrack_entries.Entry]) -> bool:
    return all(
        {len(one.source), len(one.destination), len(one.reply_source), len(one.reply_destination)} <= {4, 16}
        and max(one.source_port, one.destination_port, one.reply_source_port, one.reply_destination_port) <= 65535
        for one in entries
    )


def _ports_are_sound(ranges: list[tuple[int, int]]) -> bool:
    return all(0 <= first <= last <= 65535 for first, last in ranges)


def _slice(data: bytes) -> object:
    try:
        content = json.loads(data)
    except (ValueError, RecursionError):
        return None
    return endpoints.parse_slice(content)


_SLICES = tuple(
    json.dumps(json.loads(line)["object"]).encode()
    for data in recorded("kubernetes/watch.jsonl")
    for line in data.splitlines()[:2]
)
_NETLINK = Shape.NETLINK

PARSERS: dict[str, Parser] = {
    "shoal.kernel.addresses.parse_fib_trie": Parser(addresses.parse_fib_trie, (_TRIE,)),
    "shoal.kernel.addresses.parse_if_inet6": Parser(addresses.parse_if_inet6, (_INET6,)),
    "shoal.kernel.arp.parse_answer": Parser(arp.parse_answer, (_ARP,), Shape.PACKET, ()),
    "shoal.kernel.cgroups.parse_process_cgroups": Parser(
        cgroups.parse_process_cgroups, recorded("*/proc/*/cgroup"), sound=lambda paths: all(p[0] == "/" for p in paths)
    ),
    "shoal.kernel.cgroups.parse_processes": Parser(
        cgroups.parse_processes,
        recorded("*/sys/fs/cgroup/**/cgroup.procs"),
        sound=lambda pids: min(pids, default=0) >= 0,
    ),
    "shoal.kernel.conntrack.parse_conntrack_table": Parser(
        conntrack.parse_conntrack_table, recorded("*/proc/*/net/stat/nf_conntrack"), sums=True
    ),
    "shoal.kernel.cpu.parse_cpu_max": Parser(cpu.parse_cpu_max, recorded("*/sys/fs/cgroup/**/cpu.max")),
    "shoal.kernel.cpu.parse_cpu_stat": Parser(cpu.parse_cpu_stat, recorded("*/sys/fs/cgroup/**/cpu.stat")),
    "shoal.kernel.diskstats.parse_diskstats": Parser(diskstats.parse_diskstats, recorded("*/proc/diskstats")),
    "shoal.kernel.files.hexadecimal": Parser(
        files.hexadecimal, (b"00004f66",), errors=(ValueError,), ends_in_newline=False
    ),
    "shoal.kernel.files.is_count": Parser(
        lambda data: int(data) if files.is_count(data) else None, (b"4711",), errors=(), ends_in_newline=False
    ),
    "shoal.kernel.files.whole": Parser(files.whole, (b"-4711",), errors=(ValueError,), ends_in_newline=False),
    "shoal.kernel.files.lines": Parser(lambda data: files.lines(data, "file"), recorded("*/proc/vmstat")),
    "shoal.kernel.files.parse_flat_keyed": Parser(
        lambda data: files.parse_flat_keyed(data, "file"),
        recorded("*/proc/vmstat", most=2) + recorded("*/sys/fs/cgroup/**/memory.events", most=2),
    ),
    "shoal.kernel.iptables.parse_table_names": Parser(iptables.parse_table_names, (b"filter\nnat\n",)),
    "shoal.kernel.memory.parse_amount": Parser(
        memory.parse_amount, recorded("*/sys/fs/cgroup/**/memory.max") + recorded("*/sys/fs/cgroup/**/memory.current")
    ),
    "shoal.kernel.modules.parse_modules": Parser(modules.parse_modules, (_MODULES,)),
    "shoal.kernel.mounts.parse_mountinfo": Parser(mounts.parse_mountinfo, (*recorded("*/proc/1/mountinfo"), _OVERLAY)),
    "shoal.kernel.mounts.parse_upper_directory": Parser(
        mounts.parse_upper_directory, (_OVERLAY, *recorded("*/proc/1/mountinfo", most=2))
    ),
    "shoal.kernel.netstat.parse_netstat": Parser(netstat.parse_netstat, recorded("*/proc/1/net/netstat")),
    "shoal.kernel.port_range.parse_port_range": Parser(
        port_range.parse_port_range,
        recorded("*/proc/sys/net/ipv4/ip_local_port_range"),
        sound=lambda two: two[0] <= two[1],
    ),
    "shoal.kernel.port_range.parse_reserved_ports": Parser(
        port_range.parse_reserved_ports, (b"\n", b"8080,9148-9150\n"), sound=_ports_are_sound
    ),
    "shoal.kernel.pressure.parse_pressure": Parser(pressure.parse_pressure, recorded("*/proc/pressure/*")),
    "shoal.kernel.processes.parse_process": Parser(
        processes.parse_process, (*recorded("taskstats/*/stat"), b"7 (a) b\n) 1) S 1" + b" 5" * 49 + b"\n")
    ),
    "shoal.kernel.schedstat.parse_schedstat": Parser(schedstat.parse_schedstat, recorded("*/proc/schedstat")),
    "shoal.kernel.schedstat.parse_task_schedstat": Parser(
        schedstat.parse_task_schedstat, recorded("taskstats/*/schedstat")
    ),
    "shoal.kernel.sockstat.parse_sockstat": Parser(sockstat.parse_sockstat, recorded("*/proc/1/net/sockstat")),
    "shoal.kernel.sysctls.parse_sysctl": Parser(
        sysctls.parse_sysctl, recorded("*/proc/sys/net/core/somaxconn", "*/proc/sys/net/netfilter/nf_conntrack_max")
    ),
    "shoal.kernel.netlink.conntrack.parse_conntrack_statistics": Parser(
        lambda data: ctnetlink.parse_conntrack_statistics(bodies(data)),
        dumps("conntrack_stats_cpu"),
        _NETLINK,
        sums=True,
    ),
    "shoal.kernel.netlink.conntrack.parse_conntrack_totals": Parser(
        lambda data: list(map(ctnetlink.parse_conntrack_totals, bodies(data))), dumps("conntrack_stats"), _NETLINK
    ),
    "shoal.kernel.netlink.conntrack_entries.parse_entries": Parser(
        lambda data: list(conntrack_entries.parse_entries(bodies(data))),
        dumps("conntrack_dump"),
        _NETLINK,
        sound=_entry_is_sound,
    ),
    "shoal.kernel.netlink.core.attributes": Parser(
        lambda data: [core.attributes(body, 12, "file", 1) for body in bodies(data)], dumps("route_routes"), _NETLINK
    ),
    "shoal.kernel.netlink.core.split": Parser(
        lambda data: list(core.split(data)), dumps("route_addresses") + dumps("sock_diag_listen_inet"), _NETLINK
    ),
    "shoal.kernel.netlink.nat_rules.parse_nat_elements": Parser(
        lambda data: nat_rules.parse_nat_elements(bodies(data), _MAP_TARGETS),
        (_ELEMENTS,),
        _NETLINK,
        sums=True,
        sound=_one_address_long,
    ),
    "shoal.kernel.netlink.nat_rules.parse_nat_rules": Parser(
        lambda data: nat_rules.parse_nat_rules(bodies(data)),
        (*_RULES, b"".join(_RULES)),
        _NETLINK,
        sums=True,
        sound=_one_address_long,
    ),
    "shoal.kernel.netlink.nat_rules.parse_nat_tables": Parser(
        lambda data: nat_rules.parse_nat_tables(bodies(data)), (_CHAINS,), _NETLINK
    ),
    "shoal.kernel.netlink.neighbours.parse_discards": Parser(neighbours.parse_discards, (_ARP_CACHE,), sums=True),
    "shoal.kernel.netlink.neighbours.parse_events": Parser(
        neighbours.parse_events, dumps("route_neighbours"), _NETLINK
    ),
    "shoal.kernel.netlink.neighbours.parse_neighbours": Parser(
        lambda data: neighbours.parse_neighbours(bodies(data)), dumps("route_neighbours"), _NETLINK, sums=True
    ),
    "shoal.kernel.netlink.neighbours.parse_tables": Parser(
        lambda data: neighbours.parse_tables(bodies(data)), dumps("route_neighbour_tables"), _NETLINK
    ),
    "shoal.kernel.netlink.peers.parse_peers": Parser(
        lambda data: peers.parse_peers(bodies(data), {bytes(4), bytes([127, 0, 0, 1])}, 4),
        dumps("sock_diag_listen_inet*"),
        _NETLINK,
        sums=True,
    ),
    "shoal.kernel.netlink.ports.count_ports": Parser(
        lambda data: list(ports.count_ports(list(bodies(data)) * 10, ()).items()),
        dumps("sock_diag_listen_inet*"),
        _NETLINK,
        sums=True,
    ),
    "shoal.kernel.netlink.ports.parse_port_use": Parser(
        lambda data: ports.parse_port_use((2, 10)[len(data) % 2], data.ljust(34, b"\0"), 1, 0, None),
        (bytes(range(34)), bytes(34)),
        Shape.PACKET,
        (),
        sound=lambda use: 0 <= use.port <= 65535,
        sums=True,
    ),
    "shoal.kernel.netlink.routes.parse_addresses": Parser(
        lambda data: routes.parse_addresses(bodies(data)), dumps("route_addresses"), _NETLINK
    ),
    "shoal.kernel.netlink.routes.parse_links": Parser(
        lambda data: routes.parse_links(bodies(data)), dumps("route_links"), _NETLINK
    ),
    "shoal.kernel.netlink.routes.parse_next_hops": Parser(
        lambda data: routes.parse_next_hops(bodies(data), 100),
        dumps("route_routes*"),
        _NETLINK,
        sums=True,
        sound=lambda hops: all(len(hop.address) in (4, 16) for hop in hops.hops),
    ),
    "shoal.kernel.netlink.routes.parse_policy_rules": Parser(
        lambda data: routes.parse_policy_rules(bodies(data)), dumps("route_rules"), _NETLINK, sums=True
    ),
    "shoal.kernel.netlink.routes.parse_route": Parser(
        lambda data: list(map(routes.parse_route, bodies(data))),
        dumps("route_routes*"),
        _NETLINK,
        sound=lambda found: all(map(_known_addresses, found)),
    ),
    "shoal.kernel.netlink.sock_diag.parse_listeners": Parser(
        lambda data: sock_diag.parse_listeners(bodies(data)),
        dumps("sock_diag_listen_inet*"),
        _NETLINK,
        sound=lambda found: all(0 <= one.port <= 65535 for one in found),
    ),
    "shoal.kernel.netlink.taskstats.parse_family_id": Parser(
        lambda data: list(map(taskstats.parse_family_id, bodies(data))), (_FAMILY,), _NETLINK
    ),
    "shoal.kernel.netlink.taskstats.parse_taskstats": Parser(
        lambda data: list(map(taskstats.parse_taskstats, bodies(data))),
        recorded("taskstats/*/reply.bin"),
        _NETLINK,
        (ParseError, Unavailable),
    ),
    "shoal.kubernetes.endpoints.parse_event": Parser(
        # The object is looked at by others.
        lambda data: endpoints.parse_event(data)[::2],
        tuple(recorded("kubernetes/watch*.json*")[0].splitlines()),
        Shape.JSON,
    ),
    "shoal.kubernetes.endpoints.parse_page": Parser(
        endpoints.parse_page, recorded("kubernetes/list-[ape]*.json"), Shape.JSON
    ),
    "shoal.kubernetes.endpoints.parse_slice": Parser(_slice, _SLICES, Shape.JSON),
    "shoal.kubernetes.endpoints.parse_status": Parser(
        endpoints.parse_status, recorded("kubernetes/list-4*.json"), Shape.JSON, ()
    ),
    "shoal.kubernetes.watch.EndpointWatch": Parser(
        _take,
        recorded("kubernetes/watch.jsonl"),
        Shape.JSON,
        (ParseError, Unavailable, watch._Expired),
        ends_in_newline=False,
    ),
    "shoal.redis.client.Client": Parser(_protocol, _RESP, errors=(), ends_in_newline=False),
    "shoal.redis.discovery.find_servers": Parser(
        lambda title: discovery._target(os.fsdecode(title), "/proc", 1, elsewhere=False),
        _TITLES,
        errors=(),
        ends_in_newline=False,
    ),
    "shoal.redis.info.parse_config": Parser(_reply(info.parse_config), (_CONFIG_REPLY,), Shape.JSON, (MalformedReply,)),
    "shoal.redis.info.parse_info": Parser(
        info.parse_info, (_INFO_REPLY,), errors=(MalformedReply,), ends_in_newline=False
    ),
    "shoal.redis.info.parse_latency": Parser(
        _reply(info.parse_latency), (_LATENCY_REPLY,), Shape.JSON, (MalformedReply,)
    ),
    "shoal.redis.targets.parse_targets": Parser(
        lambda data: targets.parse_targets(os.fsdecode(data)),
        (b"redis://shoal@cache:6380/3?password_file=/p", b"rediss://[::1]:7000, unix:///run/redis/a%20b.sock"),
        errors=(ValueError,),
        ends_in_newline=False,
    ),
    "shoal.inventory.build_inventory": Parser(
        lambda path: _owner_of(_identity(os.fsdecode(path)), _KubeletNames()) or Owner(),
        _PATHS,
        errors=(),
        ends_in_newline=False,
    ),
    "shoal.web_config.WebConfig": Parser(_web_config, _WEB, errors=(SettingsError,), ends_in_newline=False),
}
"""{module and name: how it is tried}. All that begin with `parse_`, or take bytes, are here: a test sees to it."""
