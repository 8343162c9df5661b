"""The fourteen failures in one table: what they are called, which alerts they stand for, and who looks for them.

Each looks at the numbers that its alert rules look at, against the same thresholds. What a rule asks of a window of
minutes is asked here of the seconds between two scrapes; what it asks of a trend over hours is not asked.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from shoal.check import network, storage, workloads

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable

    from shoal.check.finding import Finding
    from shoal.check.snapshot import Pair

__all__ = ["FAILURES", "WANTS", "Failure", "Part"]


@dataclass(frozen=True, slots=True)
class Part:
    """A part of a failure that goes unseen where `signal` is absent: `unseen` is that part, in words.

    `hidden` returns in words what is known to be there all the same, "" if nothing is: then an ok would be a guess.
    """

    signal: str
    unseen: str
    hidden: Callable[[Pair], str] | None = None


@dataclass(frozen=True, slots=True)
class Failure:
    """One of the fourteen. `alerts` are those it can find; `signals` are those without which nothing can be told."""

    number: int
    name: str
    title: str
    alerts: tuple[str, ...]
    signals: tuple[str, ...]
    look: Callable[[Pair], Iterable[Finding]]
    parts: tuple[Part, ...] = ()
    lab: str = ""
    """What the fault lab calls it, and who has seen it there, if that is another name."""


_ENTER = "--netns.enter=true with CAP_SYS_ADMIN and CAP_SYS_PTRACE (tier full of the chart)"
_NET_ADMIN = "CAP_NET_ADMIN (tier attribution of the chart)"
WANTS: dict[str, str] = {
    "conntrack_backends": _NET_ADMIN,
    "conntrack_dump": _NET_ADMIN,
    "conntrack_namespaces": _ENTER,
    "delays_waits": _NET_ADMIN,
    "ephemeral_ports_namespaces": _ENTER,
    "listen_queue_pods": _ENTER,
    "neighbours_verify": "--neighbours.verify=true with CAP_NET_RAW",
    "redis_aof_servers": "--redis.discover=true, or --redis.target",
}
"""{signal: what gives it}, of those that are the exporter's to ask for."""

_PORTS_ELSEWHERE = Part("ephemeral_ports_namespaces", "ports in other network namespaces", network.crowded_namespaces)

FAILURES: tuple[Failure, ...] = (
    Failure(
        1,
        "redis-aof",
        "Redis stalls on its append-only file",
        (
            "ShoalRedisAofStall",
            "ShoalRedisAofWriteFailed",
            "ShoalRedisAofRewriteFailed",
            "ShoalRedisRewriteMemoryRisk",
            "ShoalRedisDown",
        ),
        ("redis_aof_servers",),
        storage.redis,
        # This signal tells whether other network namespaces may be entered; redis_aof_namespaces does not, if entering
        # was tried and refused.
        (Part("listen_queue_pods", "", storage.servers_not_asked),),
    ),
    Failure(
        2,
        "listen-queue",
        "Listen queues overflow",
        ("ShoalListenQueueOverflow", "ShoalListenQueueNearlyFull"),
        ("listen_queue_namespaces",),
        network.listen_queue,
        (
            Part("listen_queue_listeners", "how full the queues are; what was refused is counted"),
            Part("listen_queue_pods", "queues in other network namespaces; what they refused is counted"),
        ),
    ),
    Failure(
        3,
        "reverse-path",
        "The reverse-path filter drops packets",
        ("ShoalReversePathPeersCutOff", "ShoalReversePathDrops"),
        ("reverse_path_drops",),
        network.reverse_path,
    ),
    Failure(
        4,
        "inodes",
        "Inodes run out while df shows space",
        ("ShoalInodesExhausted", "ShoalInodesRunningOut", "ShoalFilesystemStuck"),
        ("inodes_filesystems",),
        storage.inodes,
    ),
    Failure(
        5,
        "oom",
        "Killed below the limit",
        ("ShoalOOMKill", "ShoalMemoryUnreclaimableNearLimit"),
        ("memory_workloads",),
        workloads.oom,
        lab="oom-kill",
    ),
    Failure(
        6,
        "memory-high",
        "memory.high throttles without a kill",
        ("ShoalMemoryHighThrottling",),
        ("memory_workloads", "pressure_workloads"),
        workloads.memory_high,
    ),
    Failure(
        7,
        "waiting",
        "Waiting for disk or memory, not computing",
        ("ShoalBlockIoStall", "ShoalBlockIoDelay", "ShoalMemoryStall"),
        ("delays_waits",),
        workloads.waiting,
        lab="delays",
    ),
    Failure(
        8,
        "code-eviction",
        "Page cache evicts the program's own code",
        ("ShoalCodeEvictionStall", "ShoalCodeEviction"),
        ("memory_workloads",),
        workloads.code_eviction,
    ),
    Failure(
        9,
        "conntrack-full",
        "The connection tracking table is full",
        ("ShoalConntrackDrops", "ShoalConntrackNearlyFull", "ShoalConntrackInsertFailed"),
        ("conntrack_entries",),
        network.conntrack,
        (
            Part("conntrack_statistics", "dropped packets"),
            Part("conntrack_namespaces", "the tables of other network namespaces"),
        ),
    ),
    Failure(
        10,
        "run-queue",
        "Waiting for a CPU",
        ("ShoalCPUStarvation", "ShoalRunQueueDelay", "ShoalCPUThrottling"),
        ("delays_run_queue", "delays_throttling"),
        workloads.run_queue,
    ),
    Failure(
        11,
        "neighbours",
        "A neighbour entry leads to the wrong machine",
        (
            "ShoalNeighbourWrongMac",
            "ShoalNeighbourUnreachable",
            "ShoalNeighbourTableOverflow",
            "ShoalNeighbourTableNearlyFull",
        ),
        ("neighbours_watch",),
        network.neighbours,
        (Part("neighbours_verify", "whether another MAC answers for an address"),),
    ),
    Failure(
        12,
        "stale-backend",
        "Connections go to a backend that is gone",
        ("ShoalConntrackBackendBlackhole", "ShoalConntrackStaleBackend"),
        ("conntrack_dump", "conntrack_backends"),
        network.stale_backends,
        lab="conntrack-stale",
    ),
    Failure(
        13,
        "ephemeral-ports",
        "The ports towards one destination are used up",
        (
            "ShoalEphemeralPortsExhausted",
            "ShoalEphemeralPortsNearlyExhausted",
            "ShoalMasqueradePortsExhausted",
            "ShoalMasqueradePortsNearlyExhausted",
        ),
        ("ephemeral_ports_own",),
        network.client_ports,
        (_PORTS_ELSEWHERE, Part("conntrack_dump", "ports for masquerading")),
        lab="sidecar-ports",
    ),
    Failure(
        14,
        "time-wait",
        "TIME_WAIT uses up the ports",
        ("ShoalTimeWaitPortsExhausted", "ShoalTimeWaitPortsNearlyExhausted"),
        ("ephemeral_ports_own",),
        network.time_wait_ports,
        (_PORTS_ELSEWHERE,),
    ),
)
