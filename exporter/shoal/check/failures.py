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

__all__ = ["FAILURES", "Failure"]


@dataclass(frozen=True, slots=True)
class Failure:
    """One of the fourteen. `alerts` are those it can find; `signals` are those without which nothing can be told."""

    number: int
    name: str
    title: str
    alerts: tuple[str, ...]
    signals: tuple[str, ...]
    look: Callable[[Pair], Iterable[Finding]]


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
    ),
    Failure(
        2,
        "listen-queue",
        "Listen queues overflow",
        ("ShoalListenQueueOverflow", "ShoalListenQueueNearlyFull"),
        ("listen_queue_namespaces",),
        network.listen_queue,
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
    ),
    Failure(
        12,
        "stale-backend",
        "Connections go to a backend that is gone",
        ("ShoalConntrackBackendBlackhole", "ShoalConntrackStaleBackend"),
        ("conntrack_dump", "conntrack_backends"),
        network.stale_backends,
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
    ),
    Failure(
        14,
        "time-wait",
        "TIME_WAIT uses up the ports",
        ("ShoalTimeWaitPortsExhausted", "ShoalTimeWaitPortsNearlyExhausted"),
        ("ephemeral_ports_own",),
        network.time_wait_ports,
    ),
)
