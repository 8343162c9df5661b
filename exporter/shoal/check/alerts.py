"""The alert rules that `check` stands for: severities and thresholds, which a test holds equal to the rule files."""

from __future__ import annotations

from dataclasses import dataclass
from enum import IntEnum

__all__ = ["ALERTS", "Alert", "Status", "threshold"]


class Status(IntEnum):
    """How bad it is. The first three are what monitoring plugins exit with."""

    OK = 0
    WARNING = 1
    CRITICAL = 2
    UNKNOWN = 3
    """Cannot tell."""


@dataclass(frozen=True, slots=True)
class Alert:
    """An alert rule of the pack: its severity, and what it compares with what, by the name of the recorded series."""

    status: Status
    thresholds: dict[str, float]


_WARNING, _CRITICAL = Status.WARNING, Status.CRITICAL

# A test holds these equal to the rules.
ALERTS: dict[str, Alert] = {
    "ShoalRedisAofStall": Alert(
        _CRITICAL,
        {
            "server:shoal_redis_ping_slow_per_ping:ratio5m": 0.01,
            "server:shoal_pressure_some_seconds:rate5m": 0.02,
            "node:shoal_disk_flush_seconds_per_flush:ratio5m": 0.05,
            "server:shoal_redis_disk_seconds_per_write:ratio5m": 0.05,
        },
    ),
    "ShoalRedisAofWriteFailed": Alert(_CRITICAL, {"server:shoal_redis_aof_last_write_ok:last": 0}),
    "ShoalRedisAofRewriteFailed": Alert(_WARNING, {"server:shoal_redis_aof_last_rewrite_ok:last": 0}),
    "ShoalRedisRewriteMemoryRisk": Alert(
        _WARNING, {"server:shoal_redis_rewrite_memory_per_effective_limit:ratio": 0.95}
    ),
    "ShoalRedisDown": Alert(_WARNING, {"server:shoal_redis_up:max": 0}),
    "ShoalListenQueueOverflow": Alert(_CRITICAL, {"netns:shoal_listen_queue_overflows:increase5m": 30}),
    "ShoalListenQueueNearlyFull": Alert(_WARNING, {"listener:shoal_listener_accept_queue_length_per_limit:ratio": 0.8}),
    "ShoalReversePathPeersCutOff": Alert(_CRITICAL, {"netns:shoal_reverse_path_drops:increase5m": 10}),
    "ShoalReversePathDrops": Alert(
        _WARNING, {"netns:shoal_reverse_path_drops:increase5m": 30, "node:shoal_reverse_path_devices:sum": 1}
    ),
    "ShoalInodesExhausted": Alert(_CRITICAL, {"filesystem:shoal_filesystem_inodes_free_per_inodes:ratio": 0.01}),
    "ShoalInodesRunningOut": Alert(_WARNING, {"filesystem:shoal_filesystem_inodes_free_per_inodes:ratio": 0.2}),
    "ShoalFilesystemStuck": Alert(_WARNING, {"filesystem:shoal_filesystem_stuck:max": 1}),
    "ShoalOOMKill": Alert(
        _WARNING,
        {"workload:shoal_memory_oom_kills:increase15m": 0, "node:shoal_node_memory_oom_kills:increase15m": 0},
    ),
    "ShoalMemoryUnreclaimableNearLimit": Alert(
        _WARNING, {"workload:shoal_memory_unreclaimable_per_ceiling:ratio": 0.85}
    ),
    "ShoalMemoryHighThrottling": Alert(
        _CRITICAL,
        {
            "workload:shoal_memory_pressure_some_seconds:rate5m": 0.3,
            "workload:shoal_memory_pressure_full_seconds:rate5m": 0.2,
            "workload:shoal_memory_high_events:increase5m": 10,
        },
    ),
    "ShoalBlockIoStall": Alert(
        _CRITICAL,
        {
            "workload:shoal_block_io_delay_seconds_per_wait:ratio": 0.1,
            "workload:shoal_block_io_delay_seconds:rate5m": 0.5,
        },
    ),
    "ShoalBlockIoDelay": Alert(
        _WARNING,
        {
            "workload:shoal_block_io_delay_seconds_per_wait:ratio": 0.03,
            "workload:shoal_block_io_delay_seconds:rate5m": 0.2,
        },
    ),
    "ShoalMemoryStall": Alert(
        _CRITICAL,
        {
            "workload:shoal_memory_delay_seconds:rate5m": 0.5,
            "workload:shoal_memory_pressure_some_seconds:rate5m": 0.3,
            "workload:shoal_memory_high_events:increase5m": 10,
        },
    ),
    "ShoalCodeEviction": Alert(
        _WARNING,
        {
            "workload:shoal_memory_refault_file_pages:rate5m": 100,
            "workload:shoal_memory_major_faults:rate5m": 10,
            "workload:shoal_memory_current_per_ceiling:ratio": 0.95,
            "workload:shoal_memory_pressure_some_seconds:rate5m": 0.05,
        },
    ),
    "ShoalCodeEvictionStall": Alert(
        _CRITICAL,
        {
            "workload:shoal_memory_refault_file_pages:rate5m": 100,
            "workload:shoal_memory_major_faults:rate5m": 10,
            "workload:shoal_memory_current_per_ceiling:ratio": 0.95,
            "workload:shoal_memory_pressure_some_seconds:rate5m": 0.3,
            "workload:shoal_memory_pressure_full_seconds:rate5m": 0.2,
        },
    ),
    "ShoalConntrackDrops": Alert(
        _CRITICAL,
        {"netns:shoal_conntrack_drop:increase5m": 10, "kind:shoal_conntrack_entries_per_limit:max": 0.95},
    ),
    "ShoalConntrackNearlyFull": Alert(_WARNING, {"netns:shoal_conntrack_entries_per_limit:ratio": 0.9}),
    "ShoalConntrackInsertFailed": Alert(
        _WARNING,
        {"netns:shoal_conntrack_insert_failed:increase5m": 10, "kind:shoal_conntrack_entries_per_limit:max": 0.9},
    ),
    "ShoalCPUStarvation": Alert(
        _CRITICAL,
        {
            "workload:shoal_run_queue_delay_per_runnable_time:ratio": 0.8,
            "workload:shoal_run_queue_delay_seconds:rate5m": 0.5,
            "workload:shoal_cpu_usage_per_node_usage:ratio": 0.25,
            "workload:shoal_cpu_pressure_some_seconds:rate5m": 0.3,
        },
    ),
    "ShoalRunQueueDelay": Alert(
        _WARNING,
        {
            "workload:shoal_run_queue_delay_per_runnable_time:ratio": 0.5,
            "workload:shoal_run_queue_delay_seconds:rate5m": 0.2,
            "workload:shoal_cpu_usage_per_node_usage:ratio": 0.33,
            "workload:shoal_cpu_pressure_some_seconds:rate5m": 0.15,
        },
    ),
    "ShoalCPUThrottling": Alert(
        _WARNING,
        {
            "workload:shoal_cpu_throttled_periods_per_period:ratio": 0.25,
            "workload:shoal_cpu_throttled_seconds:rate5m": 0.1,
            "workload:shoal_run_queue_delay_seconds:rate5m": 0.25,
        },
    ),
    "ShoalNeighbourWrongMac": Alert(_CRITICAL, {"neighbour:shoal_neighbour_verify_answering_macs:max": 1}),
    "ShoalNeighbourUnreachable": Alert(_CRITICAL, {}),
    "ShoalNeighbourTableOverflow": Alert(_CRITICAL, {"table:shoal_neighbours_table_overflows:increase5m": 10}),
    "ShoalNeighbourTableNearlyFull": Alert(_WARNING, {"table:shoal_neighbours_table_entries_per_threshold:ratio": 0.9}),
    "ShoalConntrackBackendBlackhole": Alert(_CRITICAL, {}),
    "ShoalConntrackStaleBackend": Alert(_WARNING, {}),
    "ShoalEphemeralPortsExhausted": Alert(_CRITICAL, {"tuple:shoal_ephemeral_ports_used_per_available:ratio": 0.98}),
    "ShoalEphemeralPortsNearlyExhausted": Alert(
        _WARNING, {"tuple:shoal_ephemeral_ports_used_per_available:ratio": 0.8}
    ),
    "ShoalMasqueradePortsExhausted": Alert(
        _CRITICAL,
        {
            "tuple:shoal_conntrack_nat_ports_used_per_available:ratio": 0.75,
            "netns:shoal_conntrack_insert_failed:increase5m": 10,
        },
    ),
    "ShoalMasqueradePortsNearlyExhausted": Alert(
        _WARNING, {"tuple:shoal_conntrack_nat_ports_used_per_available:ratio": 0.7}
    ),
    "ShoalTimeWaitPortsExhausted": Alert(_CRITICAL, {"tuple:shoal_ephemeral_ports_time_wait_per_used:ratio": 0.5}),
    "ShoalTimeWaitPortsNearlyExhausted": Alert(_WARNING, {"tuple:shoal_ephemeral_ports_time_wait_per_used:ratio": 0.5}),
}


def threshold(alert: str, recorded: str) -> float:
    """Return what an alert compares a recorded series with."""
    return ALERTS[alert].thresholds[recorded]
