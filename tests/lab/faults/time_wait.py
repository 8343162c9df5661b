"""Failure 14: short connections to one destination leave every local port in TIME_WAIT, and new ones fail.

Not on loopback, where tcp_tw_reuse=2 lets connect() take the ports back.
"""

from __future__ import annotations

import socket
import time
from contextlib import suppress
from typing import TYPE_CHECKING, Final, NoReturn

from tests.lab.fault import Culprit, Decoy, Fault, Shows
from tests.lab.faults.sidecar_ports import PORTS, SERVICE, few_ports
from tests.lab.node import ready

if TYPE_CHECKING:
    from collections.abc import Callable

    from tests.lab.fault import Story
    from tests.lab.node import Node

_TICK: Final = 0.01
_BUCKETS: Final = 50


def used_up(node: Node) -> Story:
    """A client opens a connection for each request and closes it first."""
    with node.pod("poller") as pod, node.pod("status") as server:
        _, address = node.link(pod, server)
        few_ports(pod)
        server.start(_hang_up_last)
        yield Culprit(
            {**pod.labels, "destination": address, "destination_port": str(SERVICE)},
            {"pid": str(pod.sandbox)},
            {"10.70.1.3": address, "8081": str(SERVICE)},
        )
        poller = pod.start(_poll(address))
        yield None
        pod.kill(poller)
        yield None


def _hang_up_last() -> NoReturn:
    with socket.create_server(("", SERVICE), backlog=PORTS) as server:
        ready()
        while True:
            connection = server.accept()[0]
            connection.recv(1)
            connection.close()


def _hang_up_first() -> NoReturn:
    with socket.create_server(("", SERVICE), backlog=PORTS) as server:
        ready()
        while True:
            server.accept()[0].close()


def _poll(address: str, *, wait: bool = False) -> Callable[[], NoReturn]:
    """Return a job that connects and closes, over and over; first, or with `wait` after the server."""

    def job() -> NoReturn:
        ready()
        while True:
            with suppress(OSError), socket.create_connection((address, SERVICE)) as connection:
                if wait:
                    connection.recv(1)
            time.sleep(_TICK)

    return job


def on_the_servers_side(node: Node) -> Story:
    """Hundreds in TIME_WAIT at a server that closes first: they take none of its own ports."""
    with node.pod("closing-server") as server, node.pod("its-clients") as clients:
        address, _ = node.link(server, clients)
        few_ports(server)
        server.start(_hang_up_first)
        yield Culprit(server.labels, happened=lambda: server.run("ss", "-tanH").count("TIME-WAIT") > PORTS)
        clients.start(_poll(address, wait=True))
        yield None


def more_than_are_kept(node: Node) -> Story:
    """A server that closes first, where tcp_max_tw_buckets is small: what is beyond it is closed without TIME_WAIT."""
    with node.container("busy-server") as server, node.pod("busy-clients") as clients:
        address, _ = node.link(server, clients)
        server.sysctl("net.ipv4.tcp_max_tw_buckets", _BUCKETS)
        server.start(_hang_up_first)
        yield Culprit(server.labels, happened=lambda: server.counter("TcpExtTCPTimeWaitOverflow") > PORTS)
        clients.start(_poll(address, wait=True))
        yield None


FAULT = Fault(
    number=14,
    title="TIME_WAIT uses up the ports",
    alert="ShoalTimeWaitPortsExhausted",
    also=("ShoalTimeWaitPortsNearlyExhausted",),
    signal="ephemeral_ports_namespaces",
    story=used_up,
    decoys=(Decoy(on_the_servers_side), Decoy(more_than_are_kept, right=("ShoalTimeWaitOverflow",))),
    confirm=(
        Shows(
            """nsenter -t "$pid" -n ss -tanH | awk '{sub(/:[^:]*$/, "", $4); n[$1 " " $4 " -> " $5]++}"""
            " END {for (k in n) print n[k], k}' | sort -rn | head -n 3",
            r"^(200|19\d) TIME-WAIT \S+ -> \S+:8080$",
        ),
        Shows(
            'nsenter -t "$pid" -n sysctl net.ipv4.ip_local_port_range net.ipv4.tcp_tw_reuse',
            r"ip_local_port_range = 40000\s+40199",
        ),
        Shows("""nsenter -t "$pid" -n bash -c ': </dev/tcp/10.70.1.3/8081'""", "Cannot assign requested address"),
    ),
)
