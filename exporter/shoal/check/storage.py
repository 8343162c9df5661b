"""Failures of storage: Redis and its append-only file (1), inodes (4)."""

from __future__ import annotations

from typing import TYPE_CHECKING

from shoal.check.alerts import threshold
from shoal.check.finding import OWNER, Finding, percent, ratio, short, size, summed, without
from shoal.check.snapshot import Labels

if TYPE_CHECKING:
    from collections.abc import Iterator

    from shoal.check.snapshot import Pair, Vector

__all__ = ["inodes", "redis"]


def redis(pair: Pair) -> Iterator[Finding]:
    """Redis servers that stall with the disk, fail to write, or may not survive a rewrite."""
    alert = "ShoalRedisAofStall"
    for labels, value in pair.last("shoal_redis_up").items():
        if not value and labels["reason"] != "loading":
            yield Finding("ShoalRedisDown", labels.without("reason"), f"does not answer: {labels['reason']}")
    asked = pair.increase("shoal_redis_ping_duration_seconds_count")
    quick = without(pair.increase("shoal_redis_ping_duration_seconds_bucket", le="0.05"), "le")
    aof = pair.last("shoal_redis_aof_enabled")
    for labels, pings in asked.items():
        if pings < _FEWEST_PINGS or not aof.get(labels):
            continue
        slow = (pings - quick.get(labels, pings)) / pings
        if slow <= threshold(alert, "server:shoal_redis_ping_slow_per_ping:ratio5m"):
            continue
        proof = _disk_evidence(pair, labels, slow)
        if proof:
            yield Finding(alert, labels, f"{percent(slow)} of {pings:.0f} PINGs took over 50 ms; {proof}")
    for alert, metric, words in (
        ("ShoalRedisAofWriteFailed", "shoal_redis_aof_last_write_ok", "the last write to the append-only file failed"),
        ("ShoalRedisAofRewriteFailed", "shoal_redis_aof_last_rewrite_ok", "the last rewrite of the file failed"),
    ):
        for labels, value in pair.last(metric).items():
            if not value and aof.get(labels):
                yield Finding(alert, labels, words)
    yield from _rewrite_memory(pair)


_FEWEST_PINGS = 10


def _disk_evidence(pair: Pair, server: Labels, slow: float) -> str:
    """Return what shows that a stall is the disk's doing and not a slow command's; "" if nothing does."""
    alert = "ShoalRedisAofStall"
    held = pair.increase("shoal_redis_aof_delayed_fsync_total").get(server, 0)
    # A command that is slow on a busy disk meets one now and then, so one alone proves nothing.
    if held >= _HELD_TWICE:
        return f"{held:.0f} writes were held up by a flush (aof_delayed_fsync)"
    before = pair.before.samples.get("shoal_redis_latency_event_last_seconds", {})
    for labels, value in pair.last("shoal_redis_latency_event_last_seconds").items():
        if labels.without("event") == server and labels["event"].startswith("aof-") and before.get(labels) != value:
            return f"the server's own latency monitor saw {labels['event']} of {value * 1000:.0f} ms"
    disks = {labels["device"] for labels in pair.last("shoal_redis_disk_info") if labels.without("device") == server}
    flushing, flushes = pair.rate("shoal_disk_flush_seconds_total"), pair.rate("shoal_disk_flushes_total")
    most = 0.0
    for device in sorted(disks):
        label = Labels({"device": device})
        busy, often = flushing.get(label, 0), flushes.get(label, 0)
        most = max(most, often)
        if busy > slow / 2 and busy > threshold(alert, "node:shoal_disk_flush_seconds_per_flush:ratio5m") * often:
            return f"its disk {device} was flushing for {percent(busy)} of the time, {busy / often * 1000:.0f} ms each"
    policy = [
        labels["appendfsync"]
        for labels in pair.last("shoal_redis_config_info")
        if labels.without("appendfsync", "no_appendfsync_on_rewrite") == server
    ]
    writing = pair.rate("shoal_redis_disk_write_seconds_total").get(server, 0)
    writes = pair.rate("shoal_redis_disk_writes_total").get(server, 0)
    # Of a server that answers nobody before its own are done.
    if policy == ["always"] and writing > max(
        slow / 2, threshold(alert, "server:shoal_redis_disk_seconds_per_write:ratio5m") * writes
    ):
        return f"writes to its disk took {writing / writes * 1000:.0f} ms each, and appendfsync is always"
    waiting = pair.rate("shoal_pressure_some_seconds_total", resource="io").get(
        Labels(server.only(*OWNER).as_dict() | {"resource": "io"}), 0
    )
    # Many short waits are what `always` costs on a fast disk.
    if waiting > max(slow / 2, threshold(alert, "server:shoal_pressure_some_seconds:rate5m"), _SHORT_WAIT * most):
        return f"its cgroup waited for I/O {percent(waiting)} of the time"
    return ""


_HELD_TWICE = 2
_SHORT_WAIT = 0.005


def _rewrite_memory(pair: Pair) -> Iterator[Finding]:
    alert = "ShoalRedisRewriteMemoryRisk"
    limits = pair.last("shoal_memory_effective_limit_bytes")
    copies: Vector = {}
    for metric in ("shoal_redis_aof_last_cow_bytes", "shoal_redis_rdb_last_cow_bytes"):
        for labels, value in pair.last(metric).items():
            copies[labels] = max(value, copies.get(labels, 0))
    for labels, resident in pair.last("shoal_redis_used_memory_rss_bytes").items():
        limit, copied = limits.get(labels.only(*OWNER), 0), copies.get(labels, 0)
        needs = resident + copied
        # One that has never forked has nothing to predict by.
        if (
            copied
            and limit
            and needs / limit > threshold(alert, "server:shoal_redis_rewrite_memory_per_effective_limit:ratio")
        ):
            yield Finding(
                alert,
                labels,
                f"{size(resident)} resident and {size(copied)} copied by the last rewrite, of {size(limit)}",
            )


# XFS and ZFS make inodes as they need them.
_GROWS = ("xfs", "zfs")
_LEAST_INODES = 1000


def inodes(pair: Pair) -> Iterator[Finding]:
    """File systems with hardly any inodes left, and the writable layer that has most of them."""
    every, free = pair.last("shoal_filesystem_inodes"), pair.last("shoal_filesystem_inodes_free")
    used = summed(pair.last("shoal_writable_layer_inodes"), *OWNER, "mountpoint")
    for labels, left in ratio(free, every).items():
        if labels["fstype"] in _GROWS or every[labels] < _LEAST_INODES:
            continue
        layers = {one: count for one, count in used.items() if one["mountpoint"] == labels["mountpoint"]}
        most = max(layers, key=layers.__getitem__, default=None)
        evidence = f"{free[labels]:.0f} of {every[labels]:.0f} inodes free ({percent(left)})"
        if most is not None:
            evidence += f"; the writable layer of {short(most)} has {layers[most]:.0f}"
        less = pair.before.samples.get("shoal_filesystem_inodes_free", {}).get(labels, 0) > free[labels]
        if left < threshold("ShoalInodesExhausted", "filesystem:shoal_filesystem_inodes_free_per_inodes:ratio"):
            yield Finding("ShoalInodesExhausted", labels, evidence)
        elif less and left < threshold(
            "ShoalInodesRunningOut", "filesystem:shoal_filesystem_inodes_free_per_inodes:ratio"
        ):
            yield Finding("ShoalInodesRunningOut", labels, f"{evidence}, and fewer than {pair.seconds:.0f} s ago")
    for labels, stuck in pair.last("shoal_filesystem_stuck").items():
        if stuck == threshold("ShoalFilesystemStuck", "filesystem:shoal_filesystem_stuck:max"):
            yield Finding("ShoalFilesystemStuck", labels, "does not answer")
