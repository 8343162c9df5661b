"""The fourteen failures as the dashboards show them, and the levels of their alerts, read from the rule files."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any, Final

import promql_parser
import yaml

__all__ = ["FAILURES", "RULES", "Failure", "Level", "alerts", "levels"]

RULES: Final = Path(__file__).parents[1] / "rules"

_CALM: Final = {"info": 1, "warning": 2, "critical": 3}


@dataclass(frozen=True, slots=True)
class Failure:
    """One of the fourteen: its number, a short name for a column, a title, its alerts, and the signals it needs."""

    number: int
    column: str
    title: str
    alerts: tuple[str, ...]
    signals: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class Level:
    """The value beyond which an alert fires: above it, or below it."""

    severity: str
    value: float
    below: bool = False


# In the order in which a person rules things out: first who has the CPU and the memory, since that makes queues and
# stalls further down; then the disk and what waits for it; then the tables and ports of the node; the network last.
FAILURES: Final = (
    Failure(
        10,
        "CPU queue",
        "Waiting for a CPU",
        ("ShoalCPUStarvation", "ShoalRunQueueDelay", "ShoalCPUThrottling", "ShoalNodeCPUPressure"),
        ("delays_run_queue", "delays_throttling"),
    ),
    Failure(
        6,
        "memory.high",
        "memory.high throttles without a kill",
        ("ShoalMemoryHighThrottling", "ShoalMemoryHighStalling", "ShoalMemoryPressure"),
        ("memory_workloads", "pressure_workloads"),
    ),
    Failure(
        5,
        "OOM kill",
        "Killed below the limit",
        ("ShoalOOMKill", "ShoalOOMKillRepeated", "ShoalMemoryUnreclaimableNearLimit", "ShoalMemoryAncestorLimit"),
        ("memory_oom_kills", "memory_workloads"),
    ),
    Failure(
        8,
        "code evicted",
        "Page cache evicts the program's own code",
        ("ShoalCodeEvictionStall", "ShoalCodeEviction"),
        ("memory_workloads",),
    ),
    Failure(
        7,
        "waiting",
        "Waiting for disk or memory, not computing",
        (
            *("ShoalBlockIoStall", "ShoalBlockIoDelay", "ShoalMemoryStall"),
            *("ShoalNodeMemoryPressure", "ShoalNodeIoPressure"),
        ),
        ("delays_waits",),
    ),
    Failure(
        4,
        "inodes",
        "Inodes run out while df shows space",
        ("ShoalInodesExhausted", "ShoalInodesRunningOut", "ShoalFilesystemStuck", "ShoalInodesHeldByLayer"),
        ("inodes_filesystems",),
    ),
    Failure(
        1,
        "Redis AOF",
        "Redis stalls on its append-only file",
        (
            *(
                "ShoalRedisAofStall",
                "ShoalRedisAofWriteFailed",
                "ShoalRedisAofDelayedFsync",
                "ShoalRedisAofRewriteFailed",
            ),
            *(
                "ShoalRedisAofRewritesTooFrequent",
                "ShoalRedisRewriteMemoryRisk",
                "ShoalRedisSlowFork",
                "ShoalRedisDown",
            ),
            "ShoalRedisLatencyMonitorOff",
        ),
        ("redis_aof_servers",),
    ),
    Failure(
        2,
        "listen queue",
        "Listen queues overflow",
        ("ShoalListenQueueOverflow", "ShoalListenQueueNearlyFull", "ShoalListenQueueRequestDrops"),
        ("listen_queue_namespaces",),
    ),
    Failure(
        9,
        "conntrack",
        "The connection tracking table is full",
        (
            *(
                "ShoalConntrackDrops",
                "ShoalConntrackNearlyFull",
                "ShoalConntrackEarlyDrops",
                "ShoalConntrackInsertFailed",
            ),
            *("ShoalConntrackTopOwner", "ShoalConntrackTopDestination"),
        ),
        ("conntrack_entries",),
    ),
    Failure(
        12,
        "dead backend",
        "Connections go to a backend that is gone",
        ("ShoalConntrackBackendBlackhole", "ShoalConntrackStaleBackend", "ShoalConntrackUnansweredBackend"),
        ("conntrack_dump",),
    ),
    Failure(
        13,
        "ports",
        "The ports towards one destination are used up",
        (
            *("ShoalEphemeralPortsExhausted", "ShoalEphemeralPortsNearlyExhausted"),
            *("ShoalMasqueradePortsExhausted", "ShoalMasqueradePortsNearlyExhausted"),
        ),
        ("ephemeral_ports_own",),
    ),
    Failure(
        14,
        "TIME_WAIT",
        "TIME_WAIT uses up the ports",
        ("ShoalTimeWaitPortsExhausted", "ShoalTimeWaitPortsNearlyExhausted", "ShoalTimeWaitOverflow"),
        ("ephemeral_ports_own",),
    ),
    Failure(
        3,
        "reverse path",
        "The reverse-path filter drops packets",
        ("ShoalReversePathPeersCutOff", "ShoalReversePathDrops", "ShoalReversePathAsymmetric"),
        ("reverse_path_drops",),
    ),
    Failure(
        11,
        "neighbour",
        "A neighbour entry leads to the wrong machine",
        (
            *("ShoalNeighbourWrongMac", "ShoalNeighbourUnreachable", "ShoalNeighbourMacFlapping"),
            *("ShoalNeighbourTableOverflow", "ShoalNeighbourTableNearlyFull"),
        ),
        ("neighbours_watch",),
    ),
)


@cache
def alerts() -> dict[str, dict[str, Any]]:
    """Return every alert of the rule files by name."""
    files = [yaml.safe_load(file.read_text(encoding="utf-8")) for file in sorted(RULES.glob("*.yaml"))]
    return {
        rule["alert"]: rule for file in files for group in file["groups"] for rule in group["rules"] if "alert" in rule
    }


def levels(series: str, *names: str) -> tuple[Level, ...]:
    """Return the values beyond which the named alerts fire on a series, one for each severity, mildest first.

    Of several values in one alert (a higher one alone, a lower one beside a trend) the first counts.
    Raises `LookupError` if one of the alerts does not compare the series with a number, as after the rule was changed.
    """
    found: dict[str, Level] = {}
    for name in names:
        rule = alerts()[name]
        compared = list(_comparisons(promql_parser.parse(rule["expr"]), series))
        if not compared:
            raise LookupError(f"{name} does not compare {series} with a number")
        operator, value = compared[0]
        found[rule["labels"]["severity"]] = Level(rule["labels"]["severity"], value, below=operator.startswith("<"))
    return tuple(sorted(found.values(), key=lambda level: _CALM[level.severity]))


def _comparisons(expression: Any, series: str) -> list[tuple[str, float]]:  # noqa: ANN401  (the parser's types)
    """Return the operators and numbers that a series is compared with in an expression."""
    match expression:
        case promql_parser.BinaryExpr():
            operator = str(expression.op)
            number = expression.rhs
            compares = operator in (">", ">=", "<", "<=", "==") and series in str(expression.lhs)
            if compares and isinstance(number, promql_parser.NumberLiteral):
                return [(operator, float(number.val))]
            return _comparisons(expression.lhs, series) + _comparisons(expression.rhs, series)
        case promql_parser.Call():
            return [found for argument in expression.args for found in _comparisons(argument, series)]
        case promql_parser.ParenExpr() | promql_parser.AggregateExpr():
            return _comparisons(expression.expr, series)
    return []
