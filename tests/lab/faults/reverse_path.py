"""Failure 3: packets come in by another device than the way back to their sender leaves by, and are dropped.

The sender has a permanent neighbour entry: the strict mode leaves its ARP requests unanswered too, and then nothing
is sent that could be counted.
"""

from __future__ import annotations

import json
import socket
import time
from typing import TYPE_CHECKING, Final, NoReturn

from tests.lab.fault import Culprit, Decoy, Fault, Shows
from tests.lab.faults.sidecar_ports import SERVICE, keep, serve
from tests.lab.node import ready, run

if TYPE_CHECKING:
    from collections.abc import Callable

    from tests.lab.fault import Story
    from tests.lab.node import Node, Pod

_TICK: Final = 0.1
_MANY: Final = 100


def strict(node: Node) -> Story:
    """A pod with two devices, rp_filter 1, and a peer that sends from the address of one over the other."""
    with node.pod("multi-homed") as pod, node.pod("peer") as peer:
        send = _two_ways(node, pod, peer, mode=1)
        yield Culprit(
            pod.labels,
            instead={"nstat": f"nsenter -t {pod.sandbox} -n nstat", "sysctl": f"nsenter -t {pod.sandbox} -n sysctl"},
        )
        sender = peer.start(send)
        yield None
        peer.kill(sender)
        yield None


def _two_ways(node: Node, pod: Pod, peer: Pod, mode: int) -> Callable[[], NoReturn]:
    """Join two pods by two links, and return a job for the peer that sends by the wrong one."""
    (_, source), (destination, _) = node.link(pod, peer), node.link(pod, peer)
    devices = sorted(link["ifname"] for link in json.loads(pod.ip("-j link")) if link["ifname"] != "lo")
    for device in ("all", "default", *devices):
        pod.sysctl(f"net.ipv4.conf.{device}.rp_filter", mode if device == "all" else 0)
    out = next(link["dev"] for link in json.loads(peer.ip(f"-j route get {destination}")))
    mac = next(link["address"] for link in json.loads(pod.ip("-j link")) if link["ifname"] == out)
    peer.ip(f"neigh replace {destination} lladdr {mac} dev {out} nud permanent")

    def send() -> NoReturn:
        with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as sock:
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_BINDTODEVICE, out.encode())
            sock.bind((source, 0))
            ready()
            while True:
                sock.sendto(b"x", (destination, 9))
                time.sleep(_TICK)

    return send


def loose(node: Node) -> Story:
    """The same packets with mode 2: they are let in."""
    with node.pod("multi-homed-loose") as pod, node.pod("peer-of-loose") as peer:
        send = _two_ways(node, pod, peer, mode=2)
        yield Culprit(pod.labels, happened=lambda: pod.counter("UdpNoPorts") > _MANY)
        peer.start(send)
        yield None


def firewall(node: Node) -> Story:
    """The same packets with the filter off and a firewall that drops them."""
    with node.pod("firewalled") as pod, node.pod("peer-of-firewalled") as peer:
        send = _two_ways(node, pod, peer, mode=0)
        pod.run(
            "nft", "-f", "-", text="table ip lab { chain in { type filter hook input priority 0; counter drop; }; }"
        )
        yield Culprit(pod.labels, happened=lambda: "counter packets 0 " not in pod.run("nft", "list", "ruleset"))
        peer.start(send)
        yield None


def answered(node: Node) -> Story:
    """The node talks from a strict device's address to a peer behind another device, and is answered by that one."""
    with node.pod("strict-side") as strict, node.pod("its-storage") as peer, node.unit("backup.service") as unit:
        (address, device), (storage, _) = node.attach(strict), node.attach(peer)
        run("sysctl", "-qw", "net.ipv4.conf.all.rp_filter=0", f"net.ipv4.conf.{device}.rp_filter=1")
        own = f"{address.rpartition('.')[0]}.1"
        peer.start(serve)

        def talk() -> NoReturn:
            with socket.create_connection((storage, SERVICE), source_address=(own, 0)) as link:
                ready()
                keep([link])

        yield Culprit(
            {"device": device},
            happened=lambda: own in run("ss", "-tnH", "state", "established", "dst", f"{storage}:{SERVICE}"),
        )
        unit.start(talk)
        yield None


FAULT = Fault(
    number=3,
    title="The reverse-path filter drops packets silently",
    alert="ShoalReversePathDrops",
    signal="reverse_path_drops",
    story=strict,
    decoys=(Decoy(loose), Decoy(firewall), Decoy(answered, right=("ShoalReversePathAsymmetric",))),
    evidence=180,
    because="packets must have been dropped in three of the last five minutes",
    confirm=(
        Shows(
            "nstat -asz TcpExtIPReversePathFilter; sleep 10; nstat -asz TcpExtIPReversePathFilter",
            r"IPReversePathFilter +([1-9]\d*) .*IPReversePathFilter +(?!\1 )[1-9]",
        ),
        Shows(r"sysctl -a 2>/dev/null | grep '\.rp_filter'; ip -br -4 addr", r"conf\.all\.rp_filter = 1"),
    ),
)
