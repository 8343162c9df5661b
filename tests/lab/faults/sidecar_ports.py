"""Failure 13: a sidecar's open connections hold every local port towards one destination, for the whole pod."""

from __future__ import annotations

import errno
import socket
import time
from typing import TYPE_CHECKING, Final, NoReturn

from tests.lab.fault import Culprit, Decoy, Fault, Shows
from tests.lab.node import ready, run

if TYPE_CHECKING:
    from collections.abc import Callable

    from tests.lab.fault import Story
    from tests.lab.node import Node, Pod

PORTS: Final = 200
"""The local ports that the pods have; the default is 28,232."""
SERVICE: Final = 8080
_MASQUERADED: Final = 150


def held(node: Node) -> Story:
    """The sidecar holds as many connections to one upstream as there are ports."""
    with node.pod("cart", "app", "proxy") as pod, node.pod("upstream") as upstream:
        _, address = node.link(pod, upstream)
        few_ports(pod)
        upstream.start(serve)
        yield Culprit(
            {**pod.labels, "destination": address, "destination_port": str(SERVICE)},
            {"pid": str(pod.sandbox)},
            {"10.70.1.2": address},
        )
        hoarder = pod.start(hold([address], PORTS), container="proxy")
        yield None
        pod.kill(hoarder)
        yield None


def few_ports(pod: Pod) -> None:
    """Give a pod a small range of ports."""
    pod.sysctl("net.ipv4.ip_local_port_range", f"40000 {40000 + PORTS - 1}")


def serve() -> NoReturn:
    """Accept and keep every connection until its client closes it."""
    kept = []
    with socket.create_server(("", SERVICE), backlog=4 * PORTS) as server:
        ready()
        while True:
            kept.append(server.accept()[0])


def hold(addresses: list[str], each: int) -> Callable[[], NoReturn]:
    """Return a job that opens so many connections to each address, and keeps them."""

    def job() -> NoReturn:
        kept = [socket.create_connection((address, SERVICE)) for address in addresses for _ in range(each)]
        if each >= PORTS:
            with socket.socket() as one_more:
                assert one_more.connect_ex((addresses[0], SERVICE)) == errno.EADDRNOTAVAIL
        ready()
        keep(kept)

    return job


def keep(_connections: list[socket.socket]) -> NoReturn:
    """Hold connections for ever."""
    while True:
        time.sleep(60)


def spread(node: Node) -> Story:
    """More connections than there are ports, spread over destinations: each has a space of its own."""
    with node.pod("crawler") as pod, node.pod("sites") as sites:
        _, first = node.link(pod, sites)
        prefix = first.rpartition(".")[0]
        addresses = [f"{prefix}.{host}" for host in range(2, 22)]
        device = sites.ip("-br -4 addr").split()[-3].partition("@")[0]
        for address in addresses[1:]:
            sites.ip(f"address add {address}/24 dev {device}")
        few_ports(pod)
        sites.start(serve)
        yield Culprit(pod.labels, happened=lambda: pod.run("ss", "-tnH").count("ESTAB") == 20 * 30)
        pod.start(hold(addresses, 30))
        yield None


def busy_server(node: Node) -> Story:
    """Many connections of one port: a server's, which takes none of its own ports."""
    with node.pod("web") as server, node.pod("visitors") as visitors:
        address, _ = node.link(server, visitors)
        few_ports(server)
        server.start(serve)
        yield Culprit(server.labels, happened=lambda: server.run("ss", "-tnH").count("ESTAB") > 2 * PORTS)
        visitors.start(_visit(address))
        yield None


def _visit(address: str) -> Callable[[], NoReturn]:
    def job() -> NoReturn:
        kept = [socket.create_connection((address, SERVICE)) for _ in range(3 * PORTS)]
        ready()
        keep(kept)

    return job


def masqueraded(node: Node) -> Story:
    """What a pod opens to the outside goes out from the node's own address, whose ports last for much more."""
    with node.pod("browser") as pod, node.pod("registry") as outside:
        node.attach(pod)
        address, device = node.attach(outside)
        chain = f"chain post {{ type nat hook postrouting priority 100; oifname {device} masquerade; }}"
        run("nft", "-f", "-", text=f"table ip lab_masquerade {{ {chain}; }}")
        outside.start(serve)
        # Before anything is caused: the connection tracking table is dumped once in a while.
        pod.start(hold([address], _MASQUERADED))
        yield Culprit(pod.labels, happened=lambda: _masqueraded(address) == _MASQUERADED)
        yield None


def _masqueraded(address: str) -> int:
    """Return how many connections to this address have another source than they were opened from."""
    entries = run("conntrack", "-L", "-p", "tcp", "--src-nat", "--orig-dst", address)
    return entries.count("ESTABLISHED")


FAULT = Fault(
    number=13,
    title="A sidecar uses up the ports of one pod",
    alert="ShoalEphemeralPortsExhausted",
    also=("ShoalEphemeralPortsNearlyExhausted",),
    signal="ephemeral_ports_namespaces",
    story=held,
    decoys=(Decoy(spread), Decoy(busy_server), Decoy(masqueraded)),
    confirm=(
        Shows(
            """nsenter -t "$pid" -n ss -tanH | awk '{sub(/:[^:]*$/, "", $4); n[$1 " " $4 " -> " $5]++}"""
            " END {for (k in n) print n[k], k}' | sort -rn | head -n 3",
            rf"^{PORTS} ESTAB \S+ -> \S+:8080$",
        ),
        Shows(
            'nsenter -t "$pid" -n sysctl net.ipv4.ip_local_port_range net.ipv4.ip_local_reserved_ports',
            r"ip_local_port_range = 40000\s+40199",
        ),
        Shows("""nsenter -t "$pid" -n bash -c ': </dev/tcp/10.70.1.2/8080'""", "Cannot assign requested address"),
    ),
)
