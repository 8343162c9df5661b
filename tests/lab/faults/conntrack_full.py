"""Failure 9: a connection tracking table is full, and the first packet of every new connection is dropped.

The limit is one number for the machine, the table each network namespace's own. So on a machine that others use a pod's
table is filled up to the limit as it is (262,144 entries took 13 s on kernel 6.18), and in a virtual machine the limit
is lowered. The entries are ASSURED, as answered connections are: others are thrown out early to make room.
"""

from __future__ import annotations

import re
import socket
import struct
import time
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING, Final, NoReturn

from tests.lab.fault import Culprit, Decoy, Fault, Shows
from tests.lab.features import IN_VM
from tests.lab.node import ready, run

if TYPE_CHECKING:
    from collections.abc import Iterator

    from tests.lab.fault import Story
    from tests.lab.node import Node, Pod

_LIMIT: Final = Path("/proc/sys/net/netfilter/nf_conntrack_max")
_LOWERED: Final = 4096
_TRACK: Final = "table inet lab { chain out { type filter hook output priority 0; ct state new; }; };"
_TRACK_IN: Final = "table inet lab { chain in { type filter hook input priority 0; ct state new; }; };"
_TICK: Final = 0.05


def full(node: Node) -> Story:
    """A pod's table is at its limit, and a client in it goes on asking."""
    limit = _limit()
    with node.pod("resolver-client") as pod:
        pod.run("nft", "-f", "-", text=_TRACK)
        yield Culprit({"netns": "pod"}, instead={"conntrack": f"nsenter -t {pod.sandbox} -n conntrack"})
        _fill(pod, limit)
        pod.start(_ask)
        yield None
        pod.run("conntrack", "-F")
        yield None


def _limit() -> int:
    run("conntrack", "-C")  # which loads the module
    if IN_VM:
        _LIMIT.write_text(str(_LOWERED))
    return int(_LIMIT.read_text())


def _fill(pod: Pod, entries: int) -> None:
    pod.run("conntrack", "-R", "-", text="".join(_flows(entries)))


def _flows(number: int) -> Iterator[str]:
    for flow in range(number):
        source, port = f"10.{1 + (flow >> 15)}.0.1", 1024 + (flow & 32767)
        yield f"-I -p udp -s {source} -d 10.200.0.2 --sport {port} --dport 53 -t 3600 -u SEEN_REPLY,ASSURED\n"


def _ask() -> NoReturn:
    ready()
    port = 1024
    while True:
        with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as question, suppress(OSError):
            question.bind(("127.0.0.1", port))
            question.sendto(b"?", ("127.0.0.1", 53))
        port = port + 1 if port < 65535 else 1024
        time.sleep(_TICK)


def nearly_full_and_steady(node: Node) -> Story:
    """A table is 70 % full and stays so, as on a busy day."""
    limit = _limit()
    with node.container("busy") as container:
        _fill(container, limit * 7 // 10)
        yield Culprit(
            {"netns": "container", **container.labels},
            happened=lambda: int(container.run("conntrack", "-C")) > limit * 6 // 10,
        )
        yield None


def invalid_packets(node: Node) -> Story:
    """Packets that belong to no connection come in by the hundred; each is counted as invalid."""
    with node.container("noise") as container:
        container.run("nft", "-f", "-", text=_TRACK_IN)
        yield Culprit(
            {"netns": "container", **container.labels},
            happened=lambda: re.search(r" invalid=[1-9]", container.run("conntrack", "-S")),
        )
        container.start(_make_noise)
        yield None


def _make_noise() -> NoReturn:
    ready()
    with socket.socket(socket.AF_INET, socket.SOCK_RAW, socket.IPPROTO_TCP) as raw:
        while True:
            raw.sendto(struct.pack("!20x"), ("127.0.0.1", 0))
            time.sleep(_TICK)


FAULT = Fault(
    number=9,
    title="The connection tracking table is full",
    alert="ShoalConntrackDrops",
    also=("ShoalConntrackNearlyFull",),
    signal="conntrack_statistics",
    story=full,
    decoys=(Decoy(nearly_full_and_steady), Decoy(invalid_packets)),
    evidence=180,
    because="packets must have been dropped in three of the last five minutes",
    confirm=(
        # Of all CPUs: which of them drops changes with where the senders run.
        Shows("conntrack -S", r" drop=(\d+) ", rises=True),
        Shows("dmesg | grep 'table full' | tail -n 1", r"nf_conntrack: table full"),
    ),
)
