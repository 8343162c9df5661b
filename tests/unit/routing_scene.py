"""Build links, routes and neighbours around the network namespace that this runs in, and print what each reader sees.

Run by the tests of routes, neighbours, ARP and reverse paths in namespaces of its own, so that no thread of the test
process ever changes its namespace and names in /run/netns are seen by nobody else:

    unshare --net --mount python routing_scene.py oracle|reverse_path|failover|asked|quiet

The answer is one JSON object. `oracle DIR` also keeps the kernel's own bytes, as fixtures.
"""

from __future__ import annotations

import asyncio
import contextlib
import dataclasses
import json
import os
import socket
import struct
import subprocess
import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

from shoal.collectors import neighbours
from shoal.collectors.neighbours import NeighboursCollector
from shoal.collectors.reverse_path import ReversePathCollector
from shoal.inventory import Node
from shoal.kernel.files import Roots
from shoal.kernel.netlink.core import NetlinkSocket, Subsystem
from shoal.kernel.netlink.neighbours import Key, find_neighbour, read_neighbours, read_tables
from shoal.kernel.netlink.routes import (
    find_default,
    find_route,
    open_routes,
    read_addresses,
    read_links,
    read_next_hops,
    read_policy_rules,
)
from shoal.settings import resolve

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from shoal.collectors import Collector

OWN = "shoal-scene"
SERVICE = "10.8.0.100"
UNFILTERED = ("net.ipv4.conf.all.rp_filter=0", "net.ipv4.conf.default.rp_filter=0")
Samples = dict[str, float]


def run(*commands: str) -> str:
    """Run programs one after the other and return what they printed."""
    return "".join(
        subprocess.run(command.split(), check=True, capture_output=True, text=True).stdout for command in commands
    )


def in_namespace(name: str, *command: str) -> subprocess.Popen[str]:
    """Start a program in a named namespace."""
    return subprocess.Popen(["ip", "netns", "exec", name, *command], stdout=subprocess.PIPE, text=True)


def python_in(name: str, program: str, *arguments: str) -> subprocess.Popen[str]:
    """Start a small Python program in a named namespace."""
    return in_namespace(name, sys.executable, "-c", program, *arguments)


def prepare(*names: str) -> None:
    """Give the own namespace a name and make others beside it."""
    Path("/run/netns").mkdir(exist_ok=True)
    run("mount -t tmpfs none /run/netns", f"ip netns attach {OWN} {os.getpid()}", "ip link set lo up")
    for name in names:
        run(f"ip netns add {name}", f"ip -n {name} link set lo up")
    # These are inherited from the first namespace, where a container runtime may have set them. A machine that forwards
    # would pass on what it gets by mistake, and the answer's own ARP request would put the sender's entry right.
    for name in (OWN, *names):
        run(f"ip netns exec {name} sysctl -qw net.ipv4.ip_forward=0 {' '.join(UNFILTERED)}")


def samples(collector: Collector) -> Samples:
    """Scrape a collector; {'metric{label,label}': value} without empty labels, and its signals as 'signal{reason}'."""
    found: Samples = {}
    for family in collector.read(Node(Roots())):
        for labels, value in family.samples:
            found[f"{family.metric.name}{{{','.join(filter(None, labels))}}}"] = value
    for signal, why in collector.availability.absent.items():
        found[f"{signal}{{{why[0].value if why else ''}}}"] = 1
    return found


def nstat(counter: str) -> int:
    """Return a counter of this namespace as nstat prints it."""
    return int(run(f"nstat -asz {counter}").splitlines()[-1].split()[1])


# What the decoders see, and what others do


def oracle(directory: str = "") -> dict[str, Any]:
    """Two bridged devices and a tunnel, routes of every shape, entries in every state."""
    prepare("far")
    run(
        "ip link add a0 type veth peer name b0 netns far",
        "ip link add a1 type veth peer name b1 netns far",
        # Entries that stay as they are, however slow the machine: neither a minute old nor given up.
        "sysctl -qw net.ipv4.neigh.a0.base_reachable_time_ms=3600000 net.ipv4.neigh.a0.mcast_solicit=10000",
        "ip addr add 10.8.0.1/24 dev a0",
        "ip addr add 10.8.1.1/24 dev a1",
        "ip addr add 10.8.2.1/32 dev a0",
        "ip addr add 10.8.2.1/32 dev a1",
        "ip addr add 10.8.3.1 peer 10.8.3.2 dev a1",
        "ip addr add 169.254.7.7/16 scope link dev a1",
        "ip addr add fd08::1/64 dev a0 nodad",
        "ip -n far addr add 10.8.0.2/24 dev b0",
        "ip -n far link set b0 up",
        "ip -n far link set b1 up",
        "ip link set a0 up",
        "ip link set a1 up",
        "ip route add default via 10.8.0.2",
        "ip route add 10.9.0.0/16 nexthop via 10.8.0.3 weight 1 nexthop via 10.8.1.3 weight 2",
        "ip route add 10.10.0.0/16 via inet6 fd08::9 dev a0",
        "ip route add 10.11.0.0/16 dev a1",
        "ip route add 10.12.0.0/16 via 10.8.0.3",
        "ip route add unreachable 10.13.0.0/16",
        "ip route add prohibit 10.14.0.0/16",
        "ip route add 10.15.0.0/16 via 10.8.1.4 table 77",
        "ip -6 route add fd09::/64 via fd08::5",
        "ip -6 route add default via fd08::6",
        "ip rule add from 10.8.1.1 lookup 77",
        "ip rule add fwmark 7 lookup main",
        "ip rule add pref 100 lookup local",
        "ip neigh add 10.8.0.20 lladdr 02:00:00:00:00:20 nud permanent dev a0",
        "ip neigh add 10.8.0.21 lladdr 02:00:00:00:00:21 nud noarp dev a0",
        "ip neigh add 10.8.0.22 lladdr 02:00:00:00:00:22 nud reachable dev a0",
        "ip neigh add 10.8.1.20 lladdr 02:00:00:00:01:20 nud stale dev a1",
        "ip neigh add fd08::20 lladdr 02:00:00:00:00:20 nud stale dev a0",
        "ip neigh add 10.8.1.21 nud failed dev a1",
    )
    for i in range(50):
        run(f"ip neigh add 10.8.1.{30 + i} lladdr 02:00:00:00:02:{i:02x} nud stale dev a1")
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as sock:
        for address in ("10.8.0.2", "10.8.0.9"):
            sock.sendto(b"", (address, 9))
    time.sleep(0.2)
    if directory:
        record(Path(directory))
    with open_routes() as netlink:
        wanted = [Key(socket.if_nametoindex("a0"), socket.inet_aton(f"10.8.0.{i}")) for i in (2, 20, 22, 99)]
        entries = read_neighbours(netlink, set(wanted))
        hops = [read_next_hops(netlink, family, 100) for family in FAMILIES]
        found = {
            "links": {index: dataclasses.asdict(link) for index, link in read_links(netlink).items()},
            "addresses": {socket.inet_ntoa(a): sorted(devices) for a, devices in read_addresses(netlink).items()},
            "rules": read_policy_rules(netlink),
            "next_hops": [[named(*hop) for hop in one.hops] for one in hops],
            "complete": [one.complete for one in hops],
            "first": [named(*hop) for hop in read_next_hops(netlink, socket.AF_INET, 1).hops],
            "defaults": [named(*hop) for family in FAMILIES if (hop := find_default(netlink, family))],
            "routes": [route(netlink, *ends) for ends in LOOKUPS],
            "counts": [[socket.if_indextoname(d), state, n] for (d, state), n in entries.counts.items()],
            "entries": {named(*key)[1]: show(entry) for key, entry in entries.entries.items()},
            "single": {named(*key)[1]: show(find_neighbour(netlink, key)) for key in wanted},
            "tables": {name: dataclasses.asdict(table) for name, table in read_tables(netlink).items()},
        }
    return found | witnesses()


FAMILIES = (socket.AF_INET, socket.AF_INET6)
LOOKUPS = (
    ("10.20.0.1", ""),
    ("10.20.0.1", "10.8.0.1"),
    ("10.15.0.1", ""),
    ("10.15.0.1", "10.8.1.1"),
    ("10.8.0.77", ""),
    ("10.13.0.1", ""),
    ("10.14.0.1", ""),
    ("10.8.0.1", ""),
    ("10.20.0.1", "10.99.0.1"),
    ("fd09::1", ""),
)


def pack(address: str) -> bytes:
    """Return an address as bytes."""
    return socket.inet_pton(socket.AF_INET6 if ":" in address else socket.AF_INET, address) if address else b""


def named(device: int, address: bytes) -> tuple[str, str]:
    """Return device and address as people write them."""
    family = socket.AF_INET if len(address) == 4 else socket.AF_INET6
    return socket.if_indextoname(device), socket.inet_ntop(family, address)


def show(entry: Any) -> dict[str, Any] | None:
    """Return an entry as JSON takes it."""
    return entry and {
        "state": entry.state,
        "mac": entry.mac and entry.mac.hex(":"),
        "confirmed": entry.confirmed_seconds,
    }


def route(netlink: Any, destination: str, source: str) -> list[Any] | None:
    """Return device, gateway, and whether it is the host's own, of a look-up."""
    found = find_route(netlink, pack(destination), pack(source))
    if found is None:
        return None
    gateway = named(found.device, found.gateway)[1] if found.gateway else None
    return [socket.if_indextoname(found.device), gateway, found.own]


def witnesses() -> dict[str, Any]:
    """Return what ip(8) and pyroute2 say of the same."""
    ip_neighbours = json.loads(run("ip -j -s neigh show"))
    from pyroute2 import IPRoute  # noqa: PLC0415  (a quarter of a second, which the other scenes need not wait)

    with IPRoute() as ipr:
        pyroute2 = [
            [e["ifindex"], e["state"], e.get_attr("NDA_DST"), e.get_attr("NDA_LLADDR")]
            for family in FAMILIES
            for e in ipr.get_neighbours(family=family)
        ]
    looked_up = []
    for destination, source in LOOKUPS:
        command = ["ip", "-j", "route", "get", destination, *(["from", source] if source else [])]
        done = subprocess.run(command, check=False, capture_output=True, text=True)
        answer = json.loads(done.stdout)[0] if done.returncode == 0 and done.stdout.strip() else None
        looked_up.append(answer and [answer["dev"], answer.get("gateway"), answer.get("type") == "local"])
    return {
        "pyroute2_neighbours": pyroute2,
        "ip_links": json.loads(run("ip -j link")),
        "ip_addresses": json.loads(run("ip -j -4 addr show up scope global")),
        "ip_neighbours": ip_neighbours,
        "ip_routes": [
            json.loads(run("ip -j -4 route show table all")),
            json.loads(run("ip -j -6 route show table all")),
        ],
        "ip_lookups": looked_up,
        "ip_rules": json.loads(run("ip -j rule")),
        "ip_tables": run("ip -s ntable show name arp_cache"),
    }


def record(directory: Path) -> None:
    """Keep what the kernel sends, and what ip(8) says of it, for tests that run without this kernel."""
    requests = {
        "links": (18, bytes(16)),
        "addresses": (22, bytes(8)),
        "routes": (26, b"\x02" + bytes(11)),
        "routes6": (26, b"\x0a" + bytes(11)),
        "rules": (34, b"\x02" + bytes(11)),
        "neighbours": (30, bytes(12)),
        "neighbour_tables": (66, bytes(4)),
    }
    directory.mkdir(parents=True, exist_ok=True)
    for name, (message, payload) in requests.items():
        with NetlinkSocket(Subsystem.ROUTE) as netlink:
            bodies = netlink.dump(message, payload, list)
        # Each with a header of its own again: the length is all that a reader needs of it.
        data = b"".join(struct.pack("=IHHII", 16 + len(body), message, 0, 0, 0) + body for body in bodies)
        (directory / f"route_{name}.bin").write_bytes(data)
    witness = {
        "rules": json.loads(run("ip -j rule")),
        "neighbours": json.loads(run("ip -j -s neigh show")),
        "routes": json.loads(run("ip -j -4 route show table all")),
        "routes6": json.loads(run("ip -j -6 route show table all")),
        "links": json.loads(run("ip -j link")),
        "addresses": json.loads(run("ip -j -4 addr show scope global")),
        "tables": run("ip -s ntable show name arp_cache"),
    }
    (directory / "route_witness.json").write_text(json.dumps(witness, indent=1) + "\n")


# Reverse paths

SEND = """
import socket, sys
with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as sock:
    sock.setsockopt(socket.SOL_SOCKET, socket.SO_BINDTODEVICE, b"far1")
    sock.bind((sys.argv[1], 0))
    for _ in range(7):
        sock.sendto(b"x", ("10.7.1.1", 9))
"""
SERVE = """
import socket
listener = socket.create_server(("10.7.0.2", 80))
print("ready", flush=True)
kept = []
while True:
    kept.append(listener.accept())
"""
DROPS = f"shoal_reverse_path_drops_total{{{OWN}}}"


def set_modes(everybody: int, own: int) -> None:
    """Set rp_filter of all and of each device."""
    for name, mode in (("all", everybody), ("near0", own), ("near1", own)):
        Path(f"/proc/sys/net/ipv4/conf/{name}/rp_filter").write_text(str(mode))


def send(collector: Collector, source: str = "10.7.0.2") -> list[float]:
    """Send seven packets from the other side over its second device; what the exporter and nstat counted of them."""
    before, by_nstat = samples(collector)[DROPS], nstat("TcpExtIPReversePathFilter")
    python_in("far", SEND, source).wait()
    time.sleep(0.1)
    return [samples(collector)[DROPS] - before, nstat("TcpExtIPReversePathFilter") - by_nstat]


def reverse_path() -> dict[str, Any]:
    """Two veth pairs between two namespaces; packets from the address of one come in by the other."""
    prepare("far")
    for i in range(2):
        run(
            f"ip link add near{i} type veth peer name far{i} netns far",
            f"ip addr add 10.7.{i}.1/24 dev near{i}",
            f"ip -n far addr add 10.7.{i}.2/24 dev far{i}",
            f"ip link set near{i} up",
            f"ip -n far link set far{i} up",
        )
    run("ip -n far addr add 10.99.0.1/32 dev lo")
    collector = ReversePathCollector(resolve({}, {}))
    found: dict[str, Any] = {}
    set_modes(1, 0)
    found["unresolved"] = send(collector)
    found["unresolved_neighbours"] = run("ip -n far neigh show dev far1")
    run(f"ip -n far neigh replace 10.7.1.1 lladdr {link_address('near1')} dev far1 nud permanent")
    for everybody, own in ((1, 0), (0, 1), (1, 1), (2, 1), (1, 2), (2, 0), (0, 0), (3, 0)):
        set_modes(everybody, own)
        found[f"modes {everybody} {own}"] = send(collector)
        found[f"scrape {everybody} {own}"] = samples(collector)
    for mode in (0, 1, 2):
        set_modes(mode, 0)
        found[f"unroutable {mode}"] = send(collector, "10.99.0.1")
    set_modes(0, 0)
    run("nft add table ip t", "nft add chain ip t c { type filter hook input priority 0 ; policy drop ; }")
    found["firewall"] = send(collector)
    run("nft delete table ip t")
    found |= connections(collector)
    set_modes(1, 0)
    run("ip link set near0 down", "ip route add default via 10.7.1.2")
    found["single"] = send(collector, "10.99.0.1")
    found["scrape single"] = samples(collector)
    return found


def link_address(device: str) -> str:
    """Return the MAC address of a device of this namespace (sysfs shows another's)."""
    return str(json.loads(run(f"ip -j link show dev {device}"))[0]["address"])


def connections(collector: Collector) -> dict[str, Any]:
    """Connect from the address of one device to a peer that is reached by the other, then turn the filter on."""
    found: dict[str, Any] = {}
    server = python_in("far", SERVE)
    assert server.stdout
    server.stdout.readline()
    with socket.create_connection(("10.7.0.2", 80), source_address=("10.7.1.1", 0)) as client:
        with socket.create_connection(("10.7.0.2", 80)):
            set_modes(1, 0)
            found["idle"] = samples(collector)
        client.send(b"x")
        time.sleep(1.5)
        found["retransmitting"] = samples(collector)
        run("ip rule add from 10.7.1.1 lookup 77", "ip route add 10.7.0.0/24 via 10.7.1.2 table 77")
        found["symmetric"] = samples(collector)
        run("ip rule del from 10.7.1.1 lookup 77")
    with socket.socket() as client:
        client.bind(("10.7.1.1", 0))
        client.setblocking(False)  # noqa: FBT003  (positional only)
        with contextlib.suppress(BlockingIOError):
            client.connect(("10.7.0.2", 80))
        time.sleep(1.5)
        found["connecting"] = samples(collector)
    server.kill()
    return found


# Neighbours


@contextlib.contextmanager
def watching(**flags: str) -> Iterator[NeighboursCollector]:
    """Run the collector with its watch."""
    collector = NeighboursCollector(resolve({key.replace("_", "."): value for key, value in flags.items()}, {}))
    asyncio.run(collector.start())
    samples(collector)
    try:
        yield collector
    finally:
        asyncio.run(collector.stop())


def segment() -> None:
    """Put this namespace and the machines `old` and `new` on one bridge; `old` has the service's address."""
    prepare("switch", "old", "new")
    run("ip -n switch link add br0 type bridge", "ip -n switch link set br0 up")
    run(
        "ip link add eth0 type veth peer name p0 netns switch",
        "ip link set eth0 up",
        "ip addr add 10.8.0.1/24 dev eth0",
    )
    for i, name in enumerate(("old", "new"), 2):
        run(
            f"ip -n {name} link add eth0 type veth peer name p{i} netns switch",
            f"ip -n {name} addr add 10.8.0.{i}/24 dev eth0",
            f"ip -n {name} link set eth0 up",
        )
    for i in (0, 2, 3):
        run(f"ip -n switch link set p{i} master br0 up")
    run(f"ip -n old addr add {SERVICE}/24 dev eth0")


def mac_of(name: str) -> str:
    """Return the MAC address of a machine on the segment."""
    return str(json.loads(run(f"ip -n {name} -j link show dev eth0"))[0]["address"])


def entry() -> dict[str, Any]:
    """Return the service's entry as ip(8) shows it."""
    found = json.loads(run(f"ip -j -s neigh show {SERVICE} dev eth0"))
    return {"mac": found[0].get("lladdr"), "state": found[0]["state"][0]} if found else {}


def talk(packets: int = 1) -> None:
    """Send datagrams to the service, a tenth of a second apart."""
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as sock:
        for _ in range(packets):
            sock.sendto(b"x", (SERVICE, 9))
            time.sleep(0.1)


ANNOUNCE = """
import socket, struct
with socket.socket(socket.AF_PACKET, socket.SOCK_DGRAM, 0) as link:
    link.bind(("eth0", 0x0806))
    mac, ip = link.getsockname()[4], socket.inet_aton("10.8.0.100")
    packet = struct.pack(">HHBBH6s4s6s4s", 1, 0x0800, 6, 4, 1, mac, ip, bytes(6), ip)
    link.sendto(packet, ("eth0", 0x0806, 0, 0, b"\\xff" * 6))
"""


def failover() -> dict[str, Any]:
    """The service's address moves without a word and back with a gratuitous ARP, while it is watched and not asked."""
    segment()
    found: dict[str, Any] = {"macs": [mac_of("old"), mac_of("new")]}
    with watching(neighbours_watch=SERVICE) as collector:
        talk()
        found["before"] = [samples(collector), entry()]
        run(f"ip -n old addr del {SERVICE}/24 dev eth0", f"ip -n new addr add {SERVICE}/24 dev eth0")
        talk(20)
        found["silent"] = [samples(collector), entry()]
        # What the entry's timers would do by themselves, after up to a minute.
        run("ip neigh flush to 10.8.0.100")
        talk(5)
        found["resolved"] = [samples(collector), entry()]
        time.sleep(1.1)
        run(f"ip -n new addr del {SERVICE}/24 dev eth0", f"ip -n old addr add {SERVICE}/24 dev eth0")
        python_in("old", ANNOUNCE).wait()
        time.sleep(0.5)
        found["announced"] = [samples(collector), entry()]
        for i in range(6):
            run(f"ip neigh replace {SERVICE} lladdr 02:00:00:00:00:0{i} nud reachable dev eth0")
        time.sleep(0.5)
        found["six"] = [samples(collector), entry()]
    return found


def asked() -> dict[str, Any]:
    """Verified: the address moves without a word, is claimed by two and by none, and is pinned by a permanent entry."""
    neighbours._VERIFY_SECONDS = 0.5
    neighbours._CONFLICT_SECONDS = 0.5
    segment()
    found: dict[str, Any] = {"macs": [mac_of("old"), mac_of("new")]}
    with watching(neighbours_watch=SERVICE, neighbours_verify="true") as collector:

        def verified(times: int) -> list[Any]:
            before = samples(collector)[REQUESTS]
            while (now := samples(collector))[REQUESTS] < before + times:
                time.sleep(0.05)
            # The entry is put right within the packet's way there and back after the count, and before the next.
            time.sleep(0.1)
            return [now, entry()]

        talk()
        found["healthy"] = verified(1)
        run(f"ip -n old addr del {SERVICE}/24 dev eth0", f"ip -n new addr add {SERVICE}/24 dev eth0")
        found["moved"] = verified(2)
        # Whichever of the two is the quicker to answer, the entry shall stay the one that the kernel had.
        run(f"ip -n old addr add {SERVICE}/24 dev eth0")
        found["two"] = verified(2)
        run(f"ip neigh replace {SERVICE} lladdr {found['macs'][0]} nud reachable dev eth0")
        found["two, other"] = verified(2)
        run(f"ip -n old addr del {SERVICE}/24 dev eth0")
        verified(1)
        run(f"ip neigh replace {SERVICE} lladdr {found['macs'][0]} nud permanent dev eth0")
        found["pinned"] = verified(2)
        run(f"ip -n new addr del {SERVICE}/24 dev eth0")
        verified(1)
        found["nobody"] = verified(1)
    return found


REQUESTS = f"shoal_neighbour_verify_requests_total{{eth0,{SERVICE}}}"


def quiet() -> dict[str, Any]:
    """Hundreds of stale entries on a quiet segment, and a storm of notifications that overruns the watch.

    The table is one for the whole machine, and a full one would be everybody's trouble: the storm changes few entries
    often.
    """
    segment()
    run("ip route add default via 10.8.0.2")
    with watching() as collector:
        stale(rounds=1)
        found = {"stale": [samples(collector), json.loads(run("ip -j neigh show nud stale dev eth0"))]}
        neighbours._BATCH_SECONDS = 2.0
        stale(rounds=10)
        run("ip neigh replace 10.8.0.2 lladdr 02:00:00:00:00:aa nud reachable dev eth0")
        run("ip neigh replace 10.8.0.2 lladdr 02:00:00:00:00:bb nud reachable dev eth0")
        time.sleep(3)
        found["storm"] = [samples(collector), []]
    return found


def stale(*, rounds: int) -> None:
    """Make 250 stale entries, and give them other MAC addresses in each further round, in one go."""
    batch = "".join(
        f"neigh replace 10.8.0.{i} lladdr 02:00:00:00:{turn:02x}:{i:02x} nud stale dev eth0\n"
        for turn in range(rounds)
        for i in range(4, 254)
    )
    subprocess.run(["ip", "-batch", "-"], input=batch, check=True, text=True)


if __name__ == "__main__":
    scenes: dict[str, Callable[..., dict[str, Any]]] = {
        "oracle": oracle,
        "reverse_path": reverse_path,
        "failover": failover,
        "asked": asked,
        "quiet": quiet,
    }
    json.dump(scenes[sys.argv[1]](*sys.argv[2:]), sys.stdout)
