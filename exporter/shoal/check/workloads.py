"""Failures of a workload that waits or is killed: memory, disk, CPU (5, 6, 7, 8, 10)."""

from __future__ import annotations

from typing import TYPE_CHECKING

from shoal.check.alerts import ALERTS, threshold
from shoal.check.finding import Finding, percent, ratio, short, size, within, without
from shoal.check.snapshot import Labels

if TYPE_CHECKING:
    from collections.abc import Iterator

    from shoal.check.snapshot import Pair, Vector

__all__ = ["code_eviction", "memory_high", "oom", "run_queue", "waiting"]


def _ceiling(pair: Pair) -> Vector:
    """Return the tighter of memory.high and the effective memory.max of each workload."""
    ceiling = dict(pair.last("shoal_memory_effective_limit_bytes"))
    for labels, high in pair.last("shoal_memory_high_bytes").items():
        ceiling[labels] = min(high, ceiling.get(labels, high))
    return ceiling


def oom(pair: Pair) -> Iterator[Finding]:
    """Processes that were killed, and workloads whose memory cannot be reclaimed and is near the limit."""
    alert = "ShoalOOMKill"
    killed = without(pair.increase("shoal_memory_events_total", event="oom_kill"), "event")
    limits = pair.last("shoal_memory_effective_limit_bytes")
    for labels, kills in killed.items():
        if kills > threshold(alert, "workload:shoal_memory_oom_kills:increase15m"):
            limit = f"; the limit that bites is {size(limits[labels])}" if labels in limits else ""
            yield Finding(alert, labels, f"{kills:.0f} processes killed {within(pair)}{limit}")
    node = sum(pair.increase("shoal_node_memory_oom_kills_total").values())
    if node > max(0, threshold(alert, "node:shoal_node_memory_oom_kills:increase15m")) and not any(killed.values()):
        yield Finding(alert, Labels({}), f"{node:.0f} processes killed {within(pair)}, of no workload that is left")
    ceiling = _ceiling(pair)
    kept = pair.lower("shoal_memory_unreclaimable_bytes")
    swap = pair.last("shoal_memory_swap_current_bytes")
    for labels, full in ratio(kept, ceiling).items():
        if (
            full
            > threshold("ShoalMemoryUnreclaimableNearLimit", "workload:shoal_memory_unreclaimable_per_ceiling:ratio")
            and swap.get(labels, 0) <= ceiling[labels] / 100
        ):
            yield Finding(
                "ShoalMemoryUnreclaimableNearLimit",
                labels,
                f"{size(kept[labels])} that cannot be reclaimed, of {size(ceiling[labels])} ({percent(full)});"
                f" {_largest(pair, labels)}",
            )


def _largest(pair: Pair, workload: Labels) -> str:
    parts = {
        labels["category"]: value
        for labels, value in pair.last("shoal_memory_category_bytes").items()
        if labels.without("category") == workload
    }
    worst = max(parts, key=parts.__getitem__, default="")
    return f"most of it {worst}, {size(parts[worst])}" if worst else "what it is made of is not known"


def _stalled(pair: Pair, alert: str, labels: Labels) -> str:
    """Return by how much the workload waited for memory, if that is more than the alert allows; "" otherwise."""
    resource = Labels(labels.as_dict() | {"resource": "memory"})
    thresholds = ALERTS[alert].thresholds
    for kind, metric in (("some", "shoal_pressure_some_seconds_total"), ("full", "shoal_pressure_full_seconds_total")):
        waited = pair.rate(metric, resource="memory").get(resource, 0)
        limit = thresholds.get(f"workload:shoal_memory_pressure_{kind}_seconds:rate5m")
        if limit is not None and waited > limit:
            return f"tasks waited for memory {percent(waited)} of the time (PSI {kind})"
    return ""


def memory_high(pair: Pair) -> Iterator[Finding]:
    """Workloads that are throttled at memory.high and wait for it."""
    alert = "ShoalMemoryHighThrottling"
    highs = pair.last("shoal_memory_high_bytes")
    counted = without(pair.increase("shoal_memory_events_total", event="high"), "event")
    for labels, rise in without(pair.increase5m("shoal_memory_events_total", event="high"), "event").items():
        waited = _stalled(pair, alert, labels)
        if waited and rise > threshold(alert, "workload:shoal_memory_high_events:increase5m"):
            high = f" of {size(highs[labels])}" if labels in highs else ""
            yield Finding(
                alert, labels, f"throttled {counted[labels]:.0f} times at memory.high{high} {within(pair)}; {waited}"
            )


def _delays(pair: Pair, *reasons: str) -> Vector:
    """Return the longest of the waits of each workload, in seconds of waiting per second."""
    longest: Vector = {}
    for reason in reasons:
        for labels, value in without(pair.rate("shoal_delay_seconds_total", reason=reason), "reason").items():
            longest[labels] = max(value, longest.get(labels, 0))
    return longest


_MEMORY_WAITS = ("reclaim", "swap_in", "thrashing", "compaction")


def waiting(pair: Pair) -> Iterator[Finding]:
    """Workloads whose threads wait for the disk or for memory instead of computing."""
    disk, memory = _delays(pair, "block_io"), _delays(pair, *_MEMORY_WAITS)
    waits = pair.rate("shoal_block_io_waits_total")
    used = pair.rate("shoal_cpu_usage_seconds_total")
    for labels, waited in disk.items():
        each = waited / waits[labels] if waits.get(labels, 0) > _FEWEST_WAITS else 0
        if memory.get(labels, 0) > waited / 2:
            continue
        for alert, busy in (("ShoalBlockIoStall", 0.25), ("ShoalBlockIoDelay", 1.0)):
            if (
                waited > threshold(alert, "workload:shoal_block_io_delay_seconds:rate5m")
                and each > threshold(alert, "workload:shoal_block_io_delay_seconds_per_wait:ratio")
                and used.get(labels, 0) <= busy * waited
            ):
                yield Finding(
                    alert,
                    labels,
                    f"threads waited {waited:.1f} s for the disk in every second, {each * 1000:.0f} ms each time",
                )
                break
    alert = "ShoalMemoryStall"
    highs = without(pair.increase5m("shoal_memory_events_total", event="high"), "event")
    for labels, waited in memory.items():
        stalled = _stalled(pair, alert, labels)
        if (
            waited > threshold(alert, "workload:shoal_memory_delay_seconds:rate5m")
            and stalled
            and used.get(labels, 0) <= waited
            and highs.get(labels, 0) <= threshold(alert, "workload:shoal_memory_high_events:increase5m")
        ):
            yield Finding(alert, labels, f"threads waited {waited:.1f} s for memory in every second; {stalled}")


_FEWEST_WAITS = 0.1


def code_eviction(pair: Pair) -> Iterator[Finding]:
    """Workloads at their limit whose own pages are evicted and read again."""
    refaults = pair.rate("shoal_memory_refault_file_pages_total")
    faults = pair.rate("shoal_memory_major_faults_total")
    full = ratio(pair.last("shoal_memory_current_bytes"), _ceiling(pair))
    for labels, refaulted in refaults.items():
        for alert in ("ShoalCodeEvictionStall", "ShoalCodeEviction"):
            waited = _stalled(pair, alert, labels)
            if (
                refaulted > threshold(alert, "workload:shoal_memory_refault_file_pages:rate5m")
                and faults.get(labels, 0) > threshold(alert, "workload:shoal_memory_major_faults:rate5m")
                and full.get(labels, 0) > threshold(alert, "workload:shoal_memory_current_per_ceiling:ratio")
                and waited
            ):
                yield Finding(
                    alert,
                    labels,
                    f"{refaulted:.0f} evicted pages read again and {faults[labels]:.0f} major faults a second at"
                    f" {percent(full[labels])} of the limit; {waited}",
                )
                break


def run_queue(pair: Pair) -> Iterator[Finding]:
    """Workloads that wait for a CPU, by a neighbour or by their own quota."""
    queued, used = _delays(pair, "run_queue"), pair.rate("shoal_cpu_usage_seconds_total")
    stopped = pair.rate("shoal_cpu_throttled_seconds_total")
    everyone = sum(used.values())
    share = ratio(pair.increase("shoal_cpu_throttled_periods_total"), pair.increase("shoal_cpu_periods_total"))
    hog = max(used, key=used.__getitem__, default=None)
    for labels, waited in queued.items():
        part = waited / (waited + used.get(labels, 0)) if waited else 0
        pressed = pair.rate("shoal_pressure_some_seconds_total", resource="cpu").get(
            Labels(labels.as_dict() | {"resource": "cpu"})
        )
        throttled = stopped.get(labels, 0) > _OWN_QUOTA
        for alert in ("ShoalCPUStarvation", "ShoalRunQueueDelay"):
            if (
                not throttled
                and everyone
                and waited > threshold(alert, "workload:shoal_run_queue_delay_seconds:rate5m")
                and part > threshold(alert, "workload:shoal_run_queue_delay_per_runnable_time:ratio")
                and used.get(labels, 0) / everyone < threshold(alert, "workload:shoal_cpu_usage_per_node_usage:ratio")
                and (pressed is None or pressed >= threshold(alert, "workload:shoal_cpu_pressure_some_seconds:rate5m"))
            ):
                by = f"; {short(hog)} uses most CPU, {used[hog]:.1f} cores" if hog is not None and hog != labels else ""
                yield Finding(
                    alert,
                    labels,
                    f"waited {waited:.1f} s for a CPU in every second, {percent(part)} of when it could run{by}",
                )
                break
        alert = "ShoalCPUThrottling"
        if (
            share.get(labels, 0) > threshold(alert, "workload:shoal_cpu_throttled_periods_per_period:ratio")
            and stopped.get(labels, 0) > threshold(alert, "workload:shoal_cpu_throttled_seconds:rate5m")
            and waited > threshold(alert, "workload:shoal_run_queue_delay_seconds:rate5m")
        ):
            yield Finding(alert, labels, f"stopped by its own CPU quota in {percent(share[labels])} of its periods")


_OWN_QUOTA = 0.02
