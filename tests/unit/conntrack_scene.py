"""Make tracked connections in the network namespace that this runs in, and print what each reader sees of them.

Run by the conntrack tests under `unshare --net`, so that no thread of the test process ever changes its namespace:

    unshare --net python conntrack_scene.py entries|rules|...
    tests/vm.sh -w OUT 6.1 -- unshare --net python tests/unit/conntrack_scene.py record OUT/conntrack_dump.bin

The answer is one JSON object: what this exporter's decoders say, and what pyroute2 and the usual tools say.
"""

from __future__ import annotations

import asyncio
import contextlib
import gc
import json
import os
import random
import re
import resource
import socket
import struct
import subprocess
import sys
import time
from collections import Counter
from dataclasses import dataclass, replace
from ipaddress import ip_address
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pyroute2.netlink.nfnetlink.nfctsocket import AsyncNFCTSocket
from pyroute2.netlink.nlsocket import Marshal

from shoal.collectors.conntrack import ConntrackCollector
from shoal.inventory import Node
from shoal.kernel.files import Roots
from shoal.kernel.iptables import read_table_names
from shoal.kernel.netlink.conntrack_entries import Entry, read_entries
from shoal.kernel.netlink.nat_rules import NatBackends, read_nat_backends
from shoal.settings import resolve

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

Rows = list[dict[str, Any]]


def run(*command: str) -> str:
    """Run a program and return what it printed."""
    return subprocess.run(command, check=True, capture_output=True, text=True).stdout


def nft(rules: str) -> None:
    """Load rules in the language of nft."""
    subprocess.run(["nft", "-f", "-"], input=rules, check=True, text=True)


def comparable(entry: Entry) -> dict[str, Any]:
    """Return an entry under the names of conntrack(8)."""
    return {
        "protocol": entry.protocol,
        "src": str(ip_address(entry.source)),
        "dst": str(ip_address(entry.destination)),
        "sport": entry.source_port,
        "dport": entry.destination_port,
        "reply_src": str(ip_address(entry.reply_source)),
        "reply_dst": str(ip_address(entry.reply_destination)),
        "reply_sport": entry.reply_source_port,
        "reply_dport": entry.reply_destination_port,
        "status": entry.status,
        "timeout": entry.timeout,
        "tcp_state": entry.tcp_state,
        "replies": entry.replies,
        "zone": entry.zone,
    }


def replies() -> bytes:
    """Return the kernel's answer to a request for all entries, received by a plain socket, without its end."""
    received = b""
    with socket.socket(socket.AF_NETLINK, socket.SOCK_RAW, 12) as link:
        link.send(struct.pack("=IHHII", 20, 0x101, 0x301, 1, 0) + bytes(4))
        while struct.unpack_from("=4xH", datagram := link.recv(1 << 18))[0] != 3:
            received += datagram
    return received


def by_pyroute2(received: bytes) -> Rows:
    """Return the entries as pyroute2 decodes them."""
    marshal = Marshal()
    marshal.msg_map = AsyncNFCTSocket.policy
    found: Rows = []
    for each in marshal.parse(received):
        row: dict[str, Any] = {}
        for which, prefix in (("CTA_TUPLE_ORIG", ""), ("CTA_TUPLE_REPLY", "reply_")):
            addresses = each.get_attr(which).get_attr("CTA_TUPLE_IP")
            protocol = each.get_attr(which).get_attr("CTA_TUPLE_PROTO")
            version = "6" if each["nfgen_family"] == socket.AF_INET6 else "4"
            row["protocol"] = protocol.get_attr("CTA_PROTO_NUM")
            row[prefix + "src"] = addresses.get_attr(f"CTA_IP_V{version}_SRC")
            row[prefix + "dst"] = addresses.get_attr(f"CTA_IP_V{version}_DST")
            row[prefix + "sport"] = protocol.get_attr("CTA_PROTO_SRC_PORT") or 0
            row[prefix + "dport"] = protocol.get_attr("CTA_PROTO_DST_PORT") or 0
        tcp = (each.get_attr("CTA_PROTOINFO") or each).get_attr("CTA_PROTOINFO_TCP")
        row["status"] = each.get_attr("CTA_STATUS")
        row["timeout"] = each.get_attr("CTA_TIMEOUT")
        row["tcp_state"] = tcp.get_attr("CTA_PROTOINFO_TCP_STATE") if tcp else None
        found.append(row)
    return found


def by_tool() -> Rows:
    """Return what conntrack -L prints, of both families."""
    found: Rows = []
    for family in ("ipv4", "ipv6"):
        for line in run("conntrack", "-L", "-f", family, "-o", "extended").splitlines():
            fields: dict[str, list[str]] = {}
            for name, value in re.findall(r"(\w+)=(\S+)", line):
                fields.setdefault(name, []).append(value)
            ports = {name: [int(each) for each in fields.get(name, ["0", "0"])] for name in ("sport", "dport")}
            packets = fields.get("packets")
            words = line.split()
            found.append(
                {
                    "protocol": int(words[3]),
                    "src": fields["src"][0],
                    "dst": fields["dst"][0],
                    "sport": ports["sport"][0],
                    "dport": ports["dport"][0],
                    "reply_src": fields["src"][1],
                    "reply_dst": fields["dst"][1],
                    "reply_sport": ports["sport"][1],
                    "reply_dport": ports["dport"][1],
                    "unreplied": "[UNREPLIED]" in line,
                    "assured": "[ASSURED]" in line,
                    "timeout": int(words[4]),
                    "established": "ESTABLISHED" in line,
                    "replies": int(packets[1]) if packets else None,
                    "zone": int(fields.get("zone", ["0"])[0]),
                }
            )
    return found


def exchange(family: socket.AddressFamily, address: str, *, kind: socket.SocketKind) -> list[socket.socket]:
    """Send something to a server of our own and let it answer; return what must stay open."""
    server = socket.socket(family, kind)
    server.bind((address, 0))
    client = socket.socket(family, kind)
    if kind == socket.SOCK_STREAM:
        server.listen()
        client.connect(server.getsockname())
        accepted, _ = server.accept()
        client.send(b"question")
        accepted.recv(100)
        return [server, client, accepted]
    client.sendto(b"question", server.getsockname())
    _, back = server.recvfrom(100)
    server.sendto(b"answer", back)
    client.recv(100)
    return [server, client]


def make_entries() -> list[socket.socket]:
    """Make connections of both families and five protocols: answered, unanswered, translated, in a zone, counted."""
    run("ip", "address", "add", "fd00::1/128", "dev", "lo", "nodad")
    nft(
        """
        table inet t {
          chain raw { type filter hook output priority -300; udp dport 7777 ct zone set 7; }
          chain out { type nat hook output priority -100;
            ip daddr 10.96.0.1 udp dport 53 dnat ip to 127.0.0.5:5353;
            ip6 daddr fd00::99 tcp dport 80 dnat ip6 to [fd00::1]:8080; }
          chain post { type nat hook postrouting priority 100; ip daddr 127.0.0.77 snat ip to 127.0.0.66; }
          chain seen { type filter hook input priority 0; ct state new; }
        }
        """
    )
    Path("/proc/sys/net/netfilter/nf_conntrack_acct").write_text("0")
    run("ip", "route", "add", "10.96.0.0/16", "dev", "lo", "src", "127.0.0.1")
    run("ip", "route", "add", "fd00::99/128", "dev", "lo")
    kept = []
    for family, address in ((socket.AF_INET, "127.0.0.1"), (socket.AF_INET6, "fd00::1")):
        for kind in (socket.SOCK_DGRAM, socket.SOCK_STREAM):
            kept += exchange(family, address, kind=kind)
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as sender:
        for target in (("127.0.0.1", 9), ("10.96.0.1", 53), ("127.0.0.77", 99), ("127.0.0.1", 7777)):
            sender.sendto(b"unanswered", target)
    kept.append(socket.create_server(("fd00::1", 8080), family=socket.AF_INET6))
    kept.append(socket.create_connection(("fd00::99", 80)))
    with socket.socket(socket.AF_INET, socket.SOCK_RAW, socket.IPPROTO_ICMP) as ping:
        ping.sendto(bytes.fromhex("0800f7ff00000000"), ("127.0.0.1", 0))
    with socket.socket(socket.AF_INET, socket.SOCK_RAW, 89) as unknown:
        unknown.sendto(b"routing", ("127.0.0.1", 0))
    Path("/proc/sys/net/netfilter/nf_conntrack_acct").write_text("1")
    kept += exchange(socket.AF_INET, "127.0.0.2", kind=socket.SOCK_DGRAM)
    kept += exchange(socket.AF_INET, "127.0.0.2", kind=socket.SOCK_STREAM)
    return kept


def entries() -> dict[str, Any]:
    """Return what each reader says of connections of every kind."""
    kept = make_entries()
    return {
        "ours": read_entries(lambda found: [comparable(one) for one in found]),
        "pyroute2": by_pyroute2(replies()),
        "tool": by_tool(),
        "open": len(kept),
    }


def record() -> dict[str, Any]:
    """Write the kernel's answer of the scene `entries` to the file that is named."""
    kept = make_entries()
    data = replies()
    Path(sys.argv[2]).write_bytes(data)
    return {"bytes": len(data), "open": len(kept)}


def rules() -> dict[str, Any]:
    """NAT rules in nft's own words, then in those of iptables, then some that are not understood."""

    def named(found: NatBackends) -> dict[str, Any]:
        return {
            "exact": sorted(f"{ip_address(one[:-2])} {int.from_bytes(one[-2:], 'big')}" for one in found.exact),
            "ranges": [[str(ip_address(low)), str(ip_address(high)), *ports] for low, high, *ports in found.ranges],
            "opaque": found.opaque,
        }

    answer: dict[str, Any] = {"empty": named(read_nat_backends())}
    nft(
        """
        table ip filter { chain f { type filter hook input priority 0; tcp dport 80 accept; }; }
        table ip proxy {
          map places { type inet_service : ipv4_addr . inet_service;
            elements = { 80 : 10.1.1.1 . 8080, 81 : 10.1.1.2 . 8081 }; }
          chain services { type nat hook prerouting priority -100;
            ip daddr 10.96.0.1 tcp dport 80 dnat to 10.2.2.2:8080;
            ip daddr 10.96.0.2 udp dport 53 dnat to numgen random mod 2 map { 0 : 10.3.3.1, 1 : 10.3.3.2 };
            ip daddr 10.96.0.3 meta l4proto tcp dnat to tcp dport map @places;
            ip daddr 10.96.0.4 dnat to 10.4.4.1-10.4.4.9;
            ip daddr 10.96.0.5 tcp dport 1 dnat to 10.5.5.5;
            ip daddr 10.96.0.6 tcp dport 1 dnat to :99;
            ip daddr 10.96.0.7 tcp dport 1 dnat to 10.6.6.6:100-200;
            ip daddr 10.96.0.8 redirect;
            ip daddr 10.96.0.9 udp dport 5 dnat to numgen random mod 2 map { 0 : 10.8.3.1, 1 : 10.8.3.2 } : 53;
            jump service;
          }
          chain service { numgen random mod 2 vmap { 0 : goto endpoint1, 1 : goto endpoint2 } ; }
          chain endpoint1 { meta l4proto tcp dnat to 10.7.7.1:80; }
          chain endpoint2 { meta l4proto tcp dnat to 10.7.7.2:80; }
          chain post { type nat hook postrouting priority 100; masquerade;
            ip saddr 10.9.9.9 meta l4proto tcp snat to 10.9.9.10:1000-2000; }
        }
        table ip6 six { chain pre { type nat hook prerouting priority -100;
          ip6 daddr fd00::1 tcp dport 80 dnat to [fd00::2]:8080; }; }
        table inet both { chain pre { type nat hook prerouting priority -100;
          tcp dport 5 dnat ip to 10.11.11.11:5; tcp dport 6 dnat ip6 to [fd00::3]; }; }
        """
    )
    first = read_nat_backends()
    answer["nft"] = named(first)
    answer["unchanged"] = read_nat_backends(first) is first
    nft("delete table ip proxy; delete table ip6 six; delete table inet both")
    answer["changed"] = named(read_nat_backends(first))
    for rule in (
        "-N KUBE-SERVICES",
        "-N KUBE-SVC",
        "-N KUBE-SEP-A",
        "-N KUBE-SEP-B",
        "-A PREROUTING -m comment --comment services -j KUBE-SERVICES",
        "-A KUBE-SERVICES -d 10.96.0.10/32 -p udp -m comment --comment kube-dns -m udp --dport 53 -j KUBE-SVC",
        "-A KUBE-SVC -m statistic --mode random --probability 0.5 -j KUBE-SEP-A",
        "-A KUBE-SVC -j KUBE-SEP-B",
        "-A KUBE-SEP-A -p udp -m udp -j DNAT --to-destination 10.244.0.2:53",
        "-A KUBE-SEP-B -p udp -m udp -j DNAT --to-destination 10.244.0.3:53",
        "-A PREROUTING -d 10.0.0.9 -j DNAT --to-destination 10.0.1.1-10.0.1.5",
        "-A PREROUTING -d 10.0.0.8 -j DNAT --to-destination 10.0.1.7",
        "-A PREROUTING -p tcp -d 10.0.0.8 -j DNAT --to-destination :77",
        "-A PREROUTING -p tcp -d 10.0.0.8 --dport 5 -j REDIRECT --to-ports 88",
        "-A POSTROUTING -j MASQUERADE",
    ):
        run("iptables-nft", "-t", "nat", *rule.split())
    backend6 = "-A PREROUTING -p tcp -d fd00::8 -j DNAT --to-destination [fd00::9]:443"
    run("ip6tables-nft", "-t", "nat", *backend6.split())
    answer["iptables"] = named(read_nat_backends())
    answer["legacy_tables_of_nft"] = sorted(read_table_names("/proc", "self"))
    whole_network = "-A PREROUTING -d 10.0.0.9 -j NETMAP --to 10.9.9.0/24"
    run("iptables-nft", "-t", "nat", *whole_network.split())
    nft("table ip o { chain p { type nat hook prerouting priority -100; dnat to ip saddr & 10.0.0.255; }; }")
    answer["opaque"] = named(read_nat_backends())
    run("iptables-legacy", "-t", "nat", "-L")
    answer["legacy_tables"] = sorted(read_table_names("/proc", "self"))
    return answer


def many_rules() -> dict[str, Any]:
    """Five thousand services of two backends, as kube-proxy writes them for nftables."""
    chains = "".join(
        f"chain s{i} {{ numgen random mod 2 vmap {{ 0 : goto e{i}a, 1 : goto e{i}b }} ; }}\n"
        f"chain e{i}a {{ meta l4proto tcp dnat to 10.{i >> 8}.{i & 255}.1:80; }}\n"
        f"chain e{i}b {{ meta l4proto tcp dnat to 10.{i >> 8}.{i & 255}.2:80; }}\n"
        for i in range(5000)
    )
    base = "chain pre { type nat hook prerouting priority -100; jump s1; }\n"
    nft(f"table ip proxy {{ {chains} {base} }}")
    found = read_nat_backends()
    return {"backends": len(found.exact), "opaque": found.opaque}


# Programs that run in the namespaces of a scene; arguments follow.
SENDER = """
import socket, sys, time
host, port, own_port = sys.argv[1], int(sys.argv[2]), int(sys.argv[3])
link = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
link.bind(("", own_port))
while True:
    try:
        link.sendto(b"question", (host, port))
    except OSError:
        pass
    time.sleep(0.3)
"""
ANSWERER = """
import socket, sys, time
port, delay = int(sys.argv[1]), float(sys.argv[2])
link = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
link.bind(("", port))
while True:
    data, sender = link.recvfrom(2000)
    if delay >= 0:
        time.sleep(delay)
        link.sendto(b"answer", sender)
"""
STREAM_CLIENT = """
import socket, sys, time
link = socket.create_connection((sys.argv[1], int(sys.argv[2])), timeout=20)
link.setblocking(False)
while True:
    try:
        link.send(b"data")
    except OSError:
        pass
    time.sleep(0.3)
"""
STREAM_SERVER = """
import socket, sys
server = socket.create_server(("", int(sys.argv[1])))
while True:
    link, _ = server.accept()
    while link.recv(2000):
        pass
"""
BURST = """
import socket, sys, time
host, port, flows = sys.argv[1], int(sys.argv[2]), int(sys.argv[3])
kept = []
for _ in range(flows):
    link = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
    link.sendto(b"x", (host, port))
    kept.append(link)
print("sent", flush=True)
time.sleep(1000)
"""


@dataclass(frozen=True)
class Place:
    """A network namespace behind this one, in a cgroup that makes it a container's."""

    process: subprocess.Popen[bytes]
    address: str
    gateway: str
    device: str
    container: str

    def start(self, program: str, *arguments: object) -> subprocess.Popen[bytes]:
        """Run one of the programs inside."""
        prefix = ["nsenter", "-t", str(self.process.pid), "-n"]
        command = [*prefix, sys.executable, "-c", program, *map(str, arguments)]
        return subprocess.Popen(command, stdout=subprocess.PIPE, stdin=subprocess.DEVNULL)


class Network:
    """This namespace as a node that forwards between others."""

    def __init__(self) -> None:
        """Forward, and use addresses that no other test has at the same time."""
        self.octet = random.randint(64, 250)  # noqa: S311  (no secret)
        self.programs: list[subprocess.Popen[bytes]] = []
        self.cgroups: list[Path] = []
        Path("/proc/sys/net/ipv4/ip_forward").write_text("1")
        mounts = (line.split() for line in Path("/proc/mounts").read_text().splitlines())
        self.cgroup_root = Path(next(fields[1] for fields in mounts if fields[2] == "cgroup2"))
        own = next(line[3:] for line in Path("/proc/self/cgroup").read_text().splitlines() if line.startswith("0::"))
        self.home = Path(str(self.cgroup_root) + own)
        self.container = self._contain(0, os.getpid())

    def _contain(self, number: int, pid: int) -> str:
        """Move a process into a cgroup like a container's; return what the container is called."""
        identity = f"{pid:08x}{number:04x}" + "0" * 52
        cgroup = self.cgroup_root / f"docker-{identity}.scope"
        cgroup.mkdir()
        self.cgroups.append(cgroup)
        (cgroup / "cgroup.procs").write_text(str(pid))
        return identity[:12]

    def add(self, number: int) -> Place:
        """Make a namespace that is joined to this one."""
        process = subprocess.Popen(["unshare", "--net", "sleep", "1000"])
        self.programs.append(process)
        own = Path("/proc/self/ns/net").readlink()
        while Path(f"/proc/{process.pid}/ns/net").readlink() == own:
            time.sleep(0.01)
        container = self._contain(number, process.pid)
        gateway, address, device = f"10.{self.octet}.{number}.1", f"10.{self.octet}.{number}.2", f"to{number}"
        inside = ["nsenter", "-t", str(process.pid), "-n"]
        run("ip", "link", "add", "name", device, "type", "veth", "peer", "name", "eth0", "netns", str(process.pid))
        run("ip", "address", "add", f"{gateway}/24", "dev", device)
        run("ip", "link", "set", device, "up")
        run(*inside, "ip", "address", "add", f"{address}/24", "dev", "eth0")
        run(*inside, "ip", "link", "set", "eth0", "up")
        run(*inside, "ip", "route", "add", "default", "via", gateway)
        return Place(process, address, gateway, device, container)

    def start(self, place: Place, program: str, *arguments: object) -> subprocess.Popen[bytes]:
        """Run a program in a namespace until the scene ends."""
        started = place.start(program, *arguments)
        self.programs.append(started)
        return started

    def remove(self, place: Place) -> None:
        """Let a namespace go away at once, so that not even its last packets arrive."""
        run("ip", "link", "delete", place.device)
        inside = Path(f"/proc/{place.process.pid}/ns/net").readlink()
        for program in self.programs:
            if program.poll() is None and Path(f"/proc/{program.pid}/ns/net").readlink() == inside:
                program.kill()

    def end(self) -> None:
        """Leave nothing behind."""
        for program in self.programs:
            program.kill()
            program.wait()
        (self.home / "cgroup.procs").write_text(str(os.getpid()))
        for cgroup in self.cgroups:
            for _ in range(50):
                try:
                    cgroup.rmdir()
                    break
                except OSError:
                    time.sleep(0.02)


@contextlib.contextmanager
def network() -> Iterator[Network]:
    """Make a network and take it away."""
    made = Network()
    try:
        yield made
    finally:
        made.end()


def scrape(collector: ConntrackCollector) -> dict[str, list[list[Any]]]:
    """Return {metric: [[labels, value], ...]} of one scrape."""
    families = collector.read(Node(Roots()))
    return {family.metric.name: [[list(labels), value] for labels, value in family.samples] for family in families}


def next_dump(collector: ConntrackCollector) -> dict[str, list[list[Any]]]:
    """Scrape until another dump has been taken, and return what it says."""
    before = collector._last
    until = time.monotonic() + 30
    while time.monotonic() < until:
        found = scrape(collector)
        if collector._last is not before and "shoal_conntrack_dump_entries" in found:
            return found
        time.sleep(0.1)
    raise TimeoutError(str(collector.availability.absent))


def lead(**backends: str) -> None:
    """Replace the NAT rules of six services by ones that lead to these addresses."""
    services = {
        "unanswered": "10.96.0.10 udp dport 53 dnat to {}:5310",
        "stream": "10.96.0.11 tcp dport 80 dnat to {}:8011",
        "answered": "10.96.0.12 udp dport 53 dnat to {}:5312",
        "drained": "10.96.0.13 tcp dport 80 dnat to {}:8013",
        "silent": "10.96.0.14 udp dport 514 dnat to {}:5314",
        "slow": "10.96.0.15 udp dport 53 dnat to {}:5315",
    }
    rules = "".join(f"ip daddr {services[name].format(address)};\n" for name, address in backends.items())
    chain = f"chain pre {{ type nat hook prerouting priority -100; {rules} }}"
    nft(f"table ip services {{}}; delete table ip services; table ip services {{ {chain}; }}")


def stale() -> dict[str, Any]:
    """A backend goes away under three clients; beside it one is drained, one never answers, one is slow."""
    with network() as made:
        client, gone, alive = made.add(1), made.add(2), made.add(3)
        made.start(gone, ANSWERER, 5310, -1)
        made.start(gone, STREAM_SERVER, 8011)
        made.start(gone, ANSWERER, 5312, 0)
        for program, *arguments in (
            (STREAM_SERVER, 8013),
            (ANSWERER, 5314, -1),
            (ANSWERER, 5315, 3),
            (ANSWERER, 5310, 0),
            (STREAM_SERVER, 8011),
            (ANSWERER, 5312, 0),
        ):
            made.start(alive, program, *arguments)
        here, there = gone.address, alive.address
        lead(unanswered=here, stream=here, answered=here, drained=there, silent=there)
        time.sleep(0.7)
        made.start(client, SENDER, "10.96.0.10", 53, 41010)
        made.start(client, STREAM_CLIENT, "10.96.0.11", 80)
        made.start(client, SENDER, "10.96.0.12", 53, 41012)
        made.start(client, STREAM_CLIENT, "10.96.0.13", 80)
        made.start(client, SENDER, "10.96.0.14", 514, 41014)
        time.sleep(2)
        # The rules follow the backends, as kube-proxy makes them; conntrack's mappings stay as they are.
        elsewhere = f"10.{made.octet}.3.77"
        lead(unanswered=there, stream=there, answered=there, drained=elsewhere, silent=there, slow=there)
        made.remove(gone)
        made.start(client, SENDER, "10.96.0.15", 53, 41015)
        collector = ConntrackCollector(replace(resolve({}, {}), conntrack_dump_interval=5))
        dumps = []
        until = time.monotonic() + 80
        expected = {"10.96.0.10", "10.96.0.11", "10.96.0.12"}
        while time.monotonic() < until:
            dumps.append(next_dump(collector)["shoal_conntrack_stale_entries"])
            if {labels[2] for labels, _ in dumps[-1] if labels[0] == "backend_gone"} >= expected and len(dumps) >= 4:
                break
        known = {signal: why and why[0].value for signal, why in collector.availability.absent.items()}
        tool = by_tool()
        nft("table ip more { chain pre { type nat hook prerouting priority -99; dnat to ip saddr & 10.0.0.255; }; }")
        next_dump(collector)
        unknown = next_dump(collector)["shoal_conntrack_stale_entries"]
        return {
            "gone": here,
            "alive": there,
            "dumps": dumps,
            "signals": known,
            "tool": tool,
            "unknown": unknown,
            "unknown_signals": {signal: why and why[0].value for signal, why in collector.availability.absent.items()},
        }


def who() -> dict[str, Any]:
    """A pod that opens many connections, the node that opens some, and masquerading towards one destination."""
    resource.setrlimit(resource.RLIMIT_NOFILE, (4096, 4096))
    with network() as made:
        busy, quiet, outside = made.add(1), made.add(2), made.add(4)
        service = f"ip daddr 10.96.0.20 udp dport 53 dnat to {quiet.address}:5353"
        masquerade = f"ip daddr {outside.address} masquerade"
        nft(f"table ip a {{ chain pre {{ type nat hook prerouting priority -100; {service}; }}; }}")
        nft(f"table ip b {{ chain post {{ type nat hook postrouting priority 100; {masquerade}; }}; }}")
        bursts = [
            made.start(busy, BURST, outside.address, 9999, 300),
            made.start(quiet, BURST, outside.address, 9999, 11),
            made.start(busy, BURST, "10.96.0.20", 53, 40),
            made.start(outside, BURST, quiet.address, 777, 5),
            *(made.start(quiet, BURST, outside.address, 10_000 + number, 1) for number in range(15)),
        ]
        own = []
        for _ in range(23):
            link = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
            link.sendto(b"x", (outside.address, 9999))
            own.append(link)
        for burst in bursts:
            assert burst.stdout
            assert burst.stdout.readline() == b"sent\n"
        collector = ConntrackCollector(resolve({}, {}))
        found = next_dump(collector)
        rows = by_tool()
        return {
            "busy": busy.container,
            "quiet": quiet.container,
            "outside": outside.container,
            "outside_address": outside.address,
            "outside_gateway": outside.gateway,
            "found": found,
            "own": made.container,
            "destinations": Counter(f"{row['protocol']} {row['dst']} {row['dport']}" for row in rows),
            "ports": Counter(f"{row['reply_dst']} {row['reply_src']} {row['reply_sport']}" for row in rows),
            "entries": len(rows),
            "count": int(Path("/proc/sys/net/netfilter/nf_conntrack_count").read_text()),
        }


def many() -> dict[str, Any]:
    """Fifty thousand entries, each to a destination of its own: what a dump counts, keeps and delays."""
    nft("table inet t { chain c { type filter hook output priority 0; ct state new; }; }")
    number = 50_000
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as sender:
        for i in range(number):
            with contextlib.suppress(ConnectionRefusedError):
                sender.sendto(b"x", (f"127.{1 + (i >> 16)}.{i >> 8 & 255}.{i & 255}", 1000))
    next_dump(ConntrackCollector(resolve({}, {})))
    collector = ConntrackCollector(resolve({}, {}))
    # As the exporter does when it starts.
    gc.collect()
    gc.freeze()
    resident = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    lag = 0.0

    def dump() -> None:
        scrape(collector)
        assert collector._thread
        collector._thread.join()

    async def watch() -> None:
        nonlocal lag
        running = asyncio.create_task(asyncio.to_thread(dump))
        while not running.done():
            before, worked = time.perf_counter(), time.process_time()
            await asyncio.sleep(0.005)
            late, worked = time.perf_counter() - before - 0.005, time.process_time() - worked
            # Late only by as much as this process worked meanwhile: the rest is the doing of others on this machine.
            lag = max(lag, min(late, worked))
        await running

    asyncio.run(watch())
    grown = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - resident
    listed = run("conntrack", "-L").count("\n")
    return {"found": scrape(collector), "listed": listed, "lag": lag, "grown_kib": grown}


if __name__ == "__main__":
    scenes: dict[str, Callable[[], dict[str, Any]]] = {
        "entries": entries,
        "record": record,
        "rules": rules,
        "many-rules": many_rules,
        "many": many,
        "stale": stale,
        "who": who,
    }
    run("ip", "link", "set", "lo", "up")
    json.dump(scenes[sys.argv[1]](), sys.stdout)
