"""Failure 11: an address has moved to another machine, and the node goes on sending to the old one's MAC address.

The exporter's own question (--neighbours.verify) puts an entry right that is merely old. What stays wrong is an entry
that cannot change, so it is a permanent one here, as someone has made it who wanted to be safe.
"""

from __future__ import annotations

import json
import signal
import socket
import time
from contextlib import ExitStack
from typing import TYPE_CHECKING, Final, NoReturn

from tests.lab.fault import Culprit, Decoy, Fault, Shows
from tests.lab.node import ready, run

if TYPE_CHECKING:
    from tests.lab.fault import Story
    from tests.lab.node import Node, Pod

_MOVED: Final = "10.78.1.100"
_FAILED_OVER: Final = "10.78.2.100"
_STALE: Final = 250
_TAKES: Final = 75
"""Seconds that a failover takes: a point of the rules' grid is among them, and not the four that an alert waits for."""


def wrong_mac(node: Node) -> Story:
    """The address moves without a word; the old machine lives on, and a permanent entry leads to it."""
    with ExitStack() as stack:
        device, old, new = _segment(node, stack, 1, _MOVED)
        yield Culprit({"device": device, "address": _MOVED}, instead={"<address>": _MOVED, "<device>": device})
        run("ip", "neigh", "replace", _MOVED, "lladdr", _mac(old), "nud", "permanent", "dev", device)
        old.ip(f"address del {_MOVED}/24 dev eth0")
        new.ip(f"address add {_MOVED}/24 dev eth0")
        yield None
        run("ip", "neigh", "del", _MOVED, "dev", device)
        yield None


def _segment(node: Node, stack: ExitStack, number: int, service: str) -> tuple[str, Pod, Pod]:
    """Put the node and two machines on one bridge; the first of them has the service's address."""
    switch, old, new = (stack.enter_context(node.container(f"{name}-{number}")) for name in ("switch", "old", "new"))
    device, network = f"seg{number}", service.rpartition(".")[0]
    switch.ip("link add br0 type bridge")
    switch.ip("link set br0 up")
    run("ip", "link", "add", device, "type", "veth", "peer", "name", "p0", "netns", switch.netns)
    run("ip", "address", "add", f"{network}.1/24", "dev", device)
    run("ip", "link", "set", device, "up")
    for port, machine in enumerate((old, new), 1):
        machine.ip(f"link add eth0 type veth peer name p{port} netns {switch.netns}")
        machine.ip(f"address add {network}.{port + 1}/24 dev eth0")
        machine.ip("link set eth0 up")
    for port in range(3):
        switch.ip(f"link set p{port} master br0 up")
    old.ip(f"address add {service}/24 dev eth0")
    stack.callback(run, "ip", "link", "del", device)
    return device, old, new


def _mac(machine: Pod) -> str:
    return str(json.loads(machine.ip("-j link show dev eth0"))[0]["address"])


def clean_failover(node: Node) -> Story:
    """A watched address is nobody's for a minute, and then another machine's, which announces itself."""
    with ExitStack() as stack:
        device, old, new = _segment(node, stack, 2, _FAILED_OVER)
        run("ping", "-c", "1", "-W", "5", _FAILED_OVER)
        mac = _mac(new)
        yield Culprit(
            {"address": _FAILED_OVER}, happened=lambda: mac in run("ip", "neigh", "show", _FAILED_OVER, "dev", device)
        )

        def talk() -> NoReturn:
            # An entry that is not in use is thrown out.
            with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as link:
                ready()
                while True:
                    link.sendto(b"x", (_FAILED_OVER, 9))
                    time.sleep(1)

        def fail_over() -> NoReturn:
            old.ip(f"address del {_FAILED_OVER}/24 dev eth0")
            run("ip", "neigh", "flush", "to", _FAILED_OVER, "dev", device)
            ready()
            time.sleep(_TAKES)
            new.ip(f"address add {_FAILED_OVER}/24 dev eth0")
            new.run("arping", "-U", "-c", "3", "-I", "eth0", _FAILED_OVER)
            while True:
                signal.pause()

        stack.enter_context(node.unit("client.service")).start(talk)
        stack.enter_context(node.unit("failover.service")).start(fail_over)
        yield None


def quiet_segment(node: Node) -> Story:
    """Hundreds of entries that nobody has used for a while."""
    with ExitStack() as stack:
        device, _, _ = _segment(node, stack, 3, "10.78.3.100")
        yield Culprit(
            {"device": device},
            happened=lambda: run("ip", "neigh", "show", "nud", "stale", "dev", device).count("\n") > _STALE // 2,
        )
        entries = "".join(
            f"neigh replace 10.78.3.{host} lladdr 02:00:00:00:03:{host:02x} nud stale dev {device}\n"
            for host in range(4, 4 + _STALE)
            if host != 100
        )

        def renew() -> NoReturn:
            # The kernel throws out what was made a minute ago if there are more than gc_thresh1 of them.
            while True:
                run("ip", "neigh", "flush", "dev", device, "nud", "stale")
                run("ip", "-batch", "-", text=entries)
                ready()
                time.sleep(20)

        stack.enter_context(node.unit("quiet.service")).start(renew)
        yield None


FAULT = Fault(
    number=11,
    title="A neighbour entry points at the wrong machine",
    alert="ShoalNeighbourWrongMac",
    signal="neighbours_verify",
    story=wrong_mac,
    decoys=(Decoy(clean_failover), Decoy(quiet_segment)),
    one_moment=True,
    evidence=180,
    because="the neighbour is asked once a minute, must be wrong twice, and the counter is looked at once a minute",
    confirm=(
        Shows("ip neigh show <address>", r"^\S+ dev seg1 lladdr \S+ PERMANENT"),
        Shows("arping -c 3 -w 4 -I <device> <address>", r"reply from|bytes from"),
    ),
    exporter=(f"--neighbours.watch={_MOVED},{_FAILED_OVER}", "--neighbours.verify=true"),
)
