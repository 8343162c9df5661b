"""Failure 12: a backend is gone, and connection tracking goes on sending a service's clients to it."""

from __future__ import annotations

import selectors
import socket
import time
from contextlib import suppress
from typing import TYPE_CHECKING, Final, NoReturn

from tests.lab.fault import Culprit, Decoy, Fault, Shows
from tests.lab.node import ready, run

if TYPE_CHECKING:
    from collections.abc import Callable

    from tests.lab.fault import Story
    from tests.lab.node import Node

_CLIENTS: Final = 15
_TICK: Final = 0.3
_PORT: Final = 53
_OWN_PORT: Final = 20000

_SERVICE: Final = "10.99.0.10"
"""The runbook's example."""
_SLOW_SERVICE: Final = "10.99.0.11"
_DRAINED_SERVICE: Final = "10.99.0.12"


def backend_gone(node: Node) -> Story:
    """Fifteen clients keep their source ports, as resolvers do, and their backend is taken away under them."""
    with node.pod("dns-clients") as clients, node.pod("dns-old") as old, node.pod("dns-new") as new:
        node.attach(clients)
        (before, device), (after, _) = node.attach(old), node.attach(new)
        old.start(_answer(0))
        new.start(_answer(0))
        _lead(_SERVICE, before)
        clients.start(_ask(_SERVICE))
        yield Culprit({"destination": _SERVICE, "destination_port": str(_PORT)})
        _lead(_SERVICE, after)
        old.end()
        run("ip", "link", "del", device)
        yield None
        run("conntrack", "-D", "-p", "udp", "--orig-dst", _SERVICE)
        yield None


def slow_backend(node: Node) -> Story:
    """A backend that takes three seconds for each answer, and is alive."""
    with node.pod("slow-clients") as clients, node.pod("slow-backend") as backend:
        node.attach(clients)
        address, _ = node.attach(backend)
        backend.start(_answer(3))
        _lead(_SLOW_SERVICE, address)
        yield Culprit({"destination": _SLOW_SERVICE}, happened=lambda: _mappings(_SLOW_SERVICE) >= _CLIENTS)
        clients.start(_ask(_SLOW_SERVICE))
        yield None


def drained_backend(node: Node) -> Story:
    """TCP connections to a backend that no rule leads to any more, which still answers: a deliberate grace period.

    Of UDP the kernel does not say whether the answers go on, so there a drained backend cannot be told from a dead one
    before the clients stop; the alert's `for` is what keeps it silent.
    """
    with node.pod("drained-clients") as clients, node.pod("drained-backend") as old, node.pod("its-successor") as new:
        node.attach(clients)
        (before, _), (after, _) = node.attach(old), node.attach(new)
        old.start(_echo)
        _lead(_DRAINED_SERVICE, before, "tcp")
        clients.start(_talk)
        yield Culprit(
            {"destination": _DRAINED_SERVICE}, happened=lambda: _mappings(_DRAINED_SERVICE, "tcp", before) >= _CLIENTS
        )
        _lead(_DRAINED_SERVICE, after, "tcp")
        yield None


def _echo() -> NoReturn:
    with socket.create_server(("", _PORT), backlog=_CLIENTS) as server, selectors.DefaultSelector() as open_:
        open_.register(server, selectors.EVENT_READ)
        ready()
        while True:
            for key, _ in open_.select():
                link = key.fileobj
                assert isinstance(link, socket.socket)
                if link is server:
                    open_.register(server.accept()[0], selectors.EVENT_READ)
                else:
                    link.send(link.recv(2000))


def _talk() -> NoReturn:
    clients = [socket.create_connection((_DRAINED_SERVICE, _PORT), timeout=20) for _ in range(_CLIENTS)]
    ready()
    while True:
        for client in clients:
            client.send(b"question")
            client.recv(2000)
        time.sleep(_TICK)


def _lead(service: str, backend: str, protocol: str = "udp") -> None:
    """Replace the service's NAT rule by one that leads to this backend, as kube-proxy does."""
    name = f"lab_{service.rpartition('.')[2]}"
    rule = f"ip daddr {service} {protocol} dport {_PORT} dnat to {backend}:{_PORT}"
    chain = f"chain pre {{ type nat hook prerouting priority -100; {rule}; }}"
    run("nft", "-f", "-", text=f"table ip {name} {{}}; delete table ip {name}; table ip {name} {{ {chain}; }}")


def _mappings(service: str, protocol: str = "udp", backend: str = "") -> int:
    return run("conntrack", "-L", "-p", protocol, "--orig-dst", service).count(f"src={backend}" if backend else "dst=")


def _answer(delay: float) -> Callable[[], NoReturn]:
    def job() -> NoReturn:
        with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as link:
            link.bind(("", _PORT))
            ready()
            while True:
                _, client = link.recvfrom(2000)
                if not delay:
                    link.sendto(b"answer", client)
                    continue
                # All that have asked meanwhile get their answer together, late.
                waiting = {client}
                until = time.monotonic() + delay
                while (left := until - time.monotonic()) > 0:
                    link.settimeout(left)
                    with suppress(TimeoutError):
                        waiting.add(link.recvfrom(2000)[1])
                link.settimeout(None)
                for client in waiting:
                    link.sendto(b"answer", client)

    return job


def _ask(service: str) -> Callable[[], NoReturn]:
    def job() -> NoReturn:
        clients = []
        for number in range(_CLIENTS):
            client = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
            client.bind(("", _OWN_PORT + number))
            client.connect((service, _PORT))
            clients.append(client)
        first = True
        while True:
            for client in clients:
                with suppress(OSError):
                    client.send(b"question")
            if first:
                ready()
                first = False
            time.sleep(_TICK)

    return job


FAULT = Fault(
    number=12,
    title="conntrack sends traffic to a deleted backend",
    alert="ShoalConntrackBackendBlackhole",
    also=("ShoalConntrackStaleBackend",),
    signal="conntrack_backends",
    story=backend_gone,
    decoys=(Decoy(slow_backend), Decoy(drained_backend)),
    evidence=40,
    because="an entry must be found renewed by a second dump, and the lab has one every 20 s",
    confirm=(
        Shows(
            "conntrack -L -p udp --orig-dst 10.99.0.10 2>/dev/null | head -n 3",
            r"^udp .* dst=10\.99\.0\.10 sport=\d+ dport=53 .*src=10\.76\.\d+\.2 dst=",
        ),
        Shows("nft list ruleset | grep 10.99.0.10", r"ip daddr 10\.99\.0\.10 udp dport 53 dnat to 10\.76\.\d+\.2:53"),
    ),
    exporter=("--conntrack.dump-interval=20",),
)
