"""What `check` finds in two scrapes: each failure just over its threshold, and nothing just at it.

The numbers are made to order, as a threshold cannot be recorded; the fault lab runs `check` during real faults.
"""

from __future__ import annotations

import re

import pytest

from shoal.check.alerts import ALERTS, Status
from shoal.check.failures import FAILURES
from shoal.check.report import Verdict, judge, overall
from shoal.check.snapshot import NotMetricsError, Pair, Snapshot, parse

SECONDS = 10.0
SIGNALS = {name for one in FAILURES for name in (*one.signals, *(part.signal for part in one.parts))}
WEB = 'namespace="shop",pod="web-0",container="app"'
NAT_PORTS = "shoal_conntrack_nat_ports_available 1000 1000"
PAIRS = 'source="10.0.0.1",destination="10.0.0.2",destination_port="5432"'
SERVICE = 'protocol="udp",destination="10.96.0.10",destination_port="53"'

# Each line is a series with its value in the first and in the second scrape; {} is what decides. Over ten seconds 1 is
# 30 in five minutes. The last two are a value for which the alert is found and one for which it is not.
CASES: list[tuple[str, str, float, float]] = [
    ("ShoalRedisDown", f'shoal_redis_up{{server="r",reason="refused",{WEB}}} 1 {{}}', 0, 1),
    (
        "ShoalRedisAofWriteFailed",
        'shoal_redis_aof_enabled{server="r"} 1 1\nshoal_redis_aof_last_write_ok{server="r"} 1 {}',
        0,
        1,
    ),
    (
        "ShoalRedisAofRewriteFailed",
        'shoal_redis_aof_enabled{server="r"} 1 1\nshoal_redis_aof_last_rewrite_ok{server="r"} 1 {}',
        0,
        1,
    ),
    (
        "ShoalRedisAofStall",
        (
            'shoal_redis_aof_enabled{server="r"} 1 1\n'
            'shoal_redis_ping_duration_seconds_count{server="r"} 0 100\n'
            'shoal_redis_ping_duration_seconds_bucket{server="r",le="0.05"} 0 {}\n'
            'shoal_redis_aof_delayed_fsync_total{server="r"} 0 2'
        ),
        98,
        99,
    ),
    (
        "ShoalRedisAofStall",
        (
            f'shoal_redis_aof_enabled{{server="r",{WEB}}} 1 1\n'
            f'shoal_redis_ping_duration_seconds_count{{server="r",{WEB}}} 0 100\n'
            f'shoal_redis_ping_duration_seconds_bucket{{server="r",le="0.05",{WEB}}} 0 50\n'
            f'shoal_redis_config_info{{server="r",appendfsync="always",no_appendfsync_on_rewrite="no",{WEB}}} 1 1\n'
            f'shoal_redis_disk_writes_total{{server="r",{WEB}}} 0 40\n'
            f'shoal_redis_disk_write_seconds_total{{server="r",{WEB}}} 0 {{}}'
        ),
        2.6,
        2.5,
    ),
    (
        "ShoalRedisRewriteMemoryRisk",
        (
            f'shoal_redis_used_memory_rss_bytes{{server="r",{WEB}}} 90 {{}}\n'
            f'shoal_redis_aof_last_cow_bytes{{server="r",{WEB}}} 1 1\n'
            f"shoal_memory_effective_limit_bytes{{{WEB}}} 100 100"
        ),
        95,
        94,
    ),
    (
        "ShoalListenQueueOverflow",
        (
            'shoal_listen_queue_overflows_total{netns="host"} 5 {}\n'
            'shoal_listener_drops_total{netns="host",address="0.0.0.0",port="80",unit="nginx.service"} 5 9\n'
            'shoal_listener_accept_queue_length{netns="host",address="0.0.0.0",port="80",unit="nginx.service"} 17 17\n'
            'shoal_listener_accept_queue_limit{netns="host",address="0.0.0.0",port="80",unit="nginx.service"} 16 16'
        ),
        7,
        6,
    ),
    (
        "ShoalListenQueueNearlyFull",
        (
            'shoal_listener_accept_queue_length{netns="host",address="::",port="80"} 100 {}\n'
            'shoal_listener_accept_queue_limit{netns="host",address="::",port="80"} 100 100'
        ),
        81,
        80,
    ),
    (
        "ShoalReversePathPeersCutOff",
        'shoal_reverse_path_drops_total{netns="host"} 0 {}\nshoal_reverse_path_unanswered_peers{device="eth1"} 1 1',
        1,
        0,
    ),
    (
        "ShoalReversePathDrops",
        'shoal_reverse_path_drops_total{netns="host"} 0 {}\nshoal_reverse_path_devices{mode="strict"} 2 2',
        2,
        1,
    ),
    (
        "ShoalInodesExhausted",
        (
            'shoal_filesystem_inodes{device="/dev/sda",fstype="ext4",mountpoint="/"} 10000 10000\n'
            'shoal_filesystem_inodes_free{device="/dev/sda",fstype="ext4",mountpoint="/"} 99 {}'
        ),
        99,
        100,
    ),
    (
        "ShoalInodesRunningOut",
        (
            'shoal_filesystem_inodes{device="/dev/sda",fstype="ext4",mountpoint="/"} 10000 10000\n'
            'shoal_filesystem_inodes_free{device="/dev/sda",fstype="ext4",mountpoint="/"} 2050 {}'
        ),
        1999,
        2000,
    ),
    ("ShoalFilesystemStuck", 'shoal_filesystem_stuck{mountpoint="/mnt"} 0 {}', 1, 0),
    (
        "ShoalOOMKill",
        (
            f'shoal_memory_events_total{{{WEB},event="oom_kill"}} 3 {{}}\n'
            f"shoal_memory_effective_limit_bytes{{{WEB}}} 64 64"
        ),
        4,
        3,
    ),
    (
        "ShoalMemoryUnreclaimableNearLimit",
        (
            f"shoal_memory_unreclaimable_bytes{{{WEB}}} 90 {{}}\nshoal_memory_effective_limit_bytes{{{WEB}}} 100 100\n"
            f'shoal_memory_category_bytes{{{WEB},category="shmem"}} 80 80'
        ),
        86,
        85,
    ),
    (
        "ShoalMemoryHighThrottling",
        (
            f'shoal_memory_events_total{{{WEB},event="high"}} 0 100\n'
            f'shoal_pressure_some_seconds_total{{{WEB},resource="memory"}} 0 {{}}'
        ),
        3.1,
        3.0,
    ),
    (
        "ShoalBlockIoStall",
        f'shoal_delay_seconds_total{{{WEB},reason="block_io"}} 0 {{}}\nshoal_block_io_waits_total{{{WEB}}} 0 10',
        5.1,
        5.0,
    ),
    (
        "ShoalBlockIoDelay",
        f'shoal_delay_seconds_total{{{WEB},reason="block_io"}} 0 {{}}\nshoal_block_io_waits_total{{{WEB}}} 0 10',
        2.1,
        2.0,
    ),
    (
        "ShoalMemoryStall",
        (
            f'shoal_delay_seconds_total{{{WEB},reason="swap_in"}} 0 {{}}\n'
            f'shoal_pressure_some_seconds_total{{{WEB},resource="memory"}} 0 6'
        ),
        5.1,
        5.0,
    ),
    *(
        (
            alert,
            (
                f"shoal_memory_refault_file_pages_total{{{WEB}}} 0 {{}}\n"
                f"shoal_memory_major_faults_total{{{WEB}}} 0 200\n"
                f"shoal_memory_current_bytes{{{WEB}}} 99 99\nshoal_memory_high_bytes{{{WEB}}} 100 100\n"
                f'shoal_pressure_some_seconds_total{{{WEB},resource="memory"}} 0 {waited}'
            ),
            1001,
            1000,
        )
        for alert, waited in (("ShoalCodeEvictionStall", 3.1), ("ShoalCodeEviction", 0.6))
    ),
    (
        "ShoalConntrackDrops",
        (
            'shoal_conntrack_drop_total{netns="host"} 0 {}\nshoal_conntrack_entries{netns="host"} 96 96\n'
            "shoal_conntrack_limit 100 100"
        ),
        1,
        0,
    ),
    (
        "ShoalConntrackNearlyFull",
        'shoal_conntrack_entries{netns="host"} 0 {}\nshoal_conntrack_limit 100 100',
        91,
        90,
    ),
    (
        "ShoalConntrackInsertFailed",
        (
            'shoal_conntrack_insert_failed_total{netns="host"} 0 {}\nshoal_conntrack_entries{netns="host"} 9 9\n'
            "shoal_conntrack_limit 100 100"
        ),
        1,
        0,
    ),
    *(
        (
            alert,
            (
                f'shoal_delay_seconds_total{{{WEB},reason="run_queue"}} 0 {{}}\n'
                f"shoal_cpu_usage_seconds_total{{{WEB}}} 0 {used}\n"
                'shoal_cpu_usage_seconds_total{unit="batch.service"} 0 15'
            ),
            over,
            under,
        )
        for alert, used, over, under in (("ShoalCPUStarvation", 1, 5.1, 5.0), ("ShoalRunQueueDelay", 1.5, 2.1, 2.0))
    ),
    (
        "ShoalCPUThrottling",
        (
            f'shoal_delay_seconds_total{{{WEB},reason="run_queue"}} 0 8\nshoal_cpu_usage_seconds_total{{{WEB}}} 0 1\n'
            f"shoal_cpu_throttled_seconds_total{{{WEB}}} 0 8\nshoal_cpu_periods_total{{{WEB}}} 0 100\n"
            f"shoal_cpu_throttled_periods_total{{{WEB}}} 0 {{}}"
        ),
        26,
        25,
    ),
    (
        "ShoalNeighbourWrongMac",
        (
            'shoal_neighbour_verify_mismatches_total{device="eth0",address="10.0.0.1"} 3 {}\n'
            'shoal_neighbour_info{device="eth0",address="10.0.0.1",mac="02:00:00:00:00:01",role="next_hop"} 1 1'
        ),
        4,
        3,
    ),
    (
        "ShoalNeighbourUnreachable",
        (
            'shoal_neighbour_state{device="eth0",address="10.0.0.1",state="failed"} 1 {}\n'
            'shoal_neighbours_resolution_failures_total{protocol="ipv4"} 1 2'
        ),
        1,
        0,
    ),
    ("ShoalNeighbourTableOverflow", 'shoal_neighbours_table_overflows_total{protocol="ipv4"} 0 {}', 1, 0),
    (
        "ShoalNeighbourTableNearlyFull",
        (
            'shoal_neighbours_table_entries{protocol="ipv4"} 0 {}\n'
            'shoal_neighbours_table_threshold{protocol="ipv4",level="3"} 1024 1024\n'
            'shoal_neighbours_forced_collections_total{protocol="ipv4"} 0 1'
        ),
        922,
        921,
    ),
    (
        "ShoalConntrackBackendBlackhole",
        f'shoal_conntrack_stale_entries{{reason="backend_gone",{SERVICE},backend="10.0.1.7:53"}} 0 {{}}',
        11,
        10,
    ),
    (
        "ShoalConntrackStaleBackend",
        f'shoal_conntrack_stale_entries{{reason="backend_gone",{SERVICE},backend="10.0.1.7:53"}} 0 {{}}',
        1,
        0,
    ),
    (
        "ShoalMasqueradePortsExhausted",
        (
            f'shoal_conntrack_nat_ports_used{{protocol="tcp",{PAIRS}}} 0 {{}}\n{NAT_PORTS}\n'
            'shoal_conntrack_insert_failed_total{netns="host"} 0 1'
        ),
        751,
        750,
    ),
    (
        "ShoalMasqueradePortsNearlyExhausted",
        f'shoal_conntrack_nat_ports_used{{protocol="tcp",{PAIRS}}} 0 {{}}\n{NAT_PORTS}',
        701,
        700,
    ),
    *(
        (
            f"Shoal{kind}{end}",
            (
                f"shoal_ephemeral_ports_used{{{PAIRS}}} 0 {{}}\nshoal_ephemeral_ports_available{{{PAIRS}}} 1000 1000\n"
                f"shoal_ephemeral_ports_time_wait{{{PAIRS}}} 0 {waiting}"
            ),
            over,
            over - 1,
        )
        for kind, waiting in (("EphemeralPorts", 100), ("TimeWaitPorts", 799))
        for end, over in (("Exhausted", 981), ("NearlyExhausted", 801))
    ),
]

# During these nothing may be said, though they look like it.
DECOYS: dict[str, str] = {
    "a slow command stalls Redis": 'shoal_redis_aof_enabled{server="r"} 1 1\n'
    'shoal_redis_ping_duration_seconds_count{server="r"} 0 100\n'
    'shoal_redis_ping_duration_seconds_bucket{server="r",le="0.05"} 0 50\n'
    'shoal_redis_aof_delayed_fsync_total{server="r"} 4 4',
    "a slow command, and slow writes that nobody waits for": 'shoal_redis_aof_enabled{server="r"} 1 1\n'
    'shoal_redis_ping_duration_seconds_count{server="r"} 0 100\n'
    'shoal_redis_ping_duration_seconds_bucket{server="r",le="0.05"} 0 50\n'
    'shoal_redis_config_info{server="r",appendfsync="everysec"} 1 1\n'
    'shoal_redis_disk_writes_total{server="r"} 0 40\n'
    'shoal_redis_disk_write_seconds_total{server="r"} 0 9',
    "a slow command, and many quick writes": 'shoal_redis_aof_enabled{server="r"} 1 1\n'
    'shoal_redis_ping_duration_seconds_count{server="r"} 0 100\n'
    'shoal_redis_ping_duration_seconds_bucket{server="r",le="0.05"} 0 50\n'
    'shoal_redis_config_info{server="r",appendfsync="always"} 1 1\n'
    'shoal_redis_disk_writes_total{server="r"} 0 400\n'
    'shoal_redis_disk_write_seconds_total{server="r"} 0 9',
    "Redis loads its data": 'shoal_redis_up{server="r",reason="loading"} 0 0',
    "drops without an overflow": 'shoal_listen_queue_overflows_total{netns="host"} 0 0\n'
    'shoal_listen_queue_drops_total{netns="host"} 0 500',
    "martians on a host with one device": 'shoal_reverse_path_drops_total{netns="host"} 0 500\n'
    'shoal_reverse_path_devices{mode="strict"} 1 1',
    "XFS grows its inodes": 'shoal_filesystem_inodes{fstype="xfs",mountpoint="/"} 10000 10000\n'
    'shoal_filesystem_inodes_free{fstype="xfs",mountpoint="/"} 9 1',
    "a cgroup full of page cache": f"shoal_memory_current_bytes{{{WEB}}} 100 100\n"
    f"shoal_memory_unreclaimable_bytes{{{WEB}}} 5 5\nshoal_memory_effective_limit_bytes{{{WEB}}} 100 100",
    "high without a stall": f'shoal_memory_events_total{{{WEB},event="high"}} 0 900\n'
    f'shoal_pressure_some_seconds_total{{{WEB},resource="memory"}} 0 0.1',
    "drops of a table that is not full": 'shoal_conntrack_drop_total{netns="host"} 0 50\n'
    'shoal_conntrack_entries{netns="host"} 50 50\nshoal_conntrack_limit 100 100',
    "its own quota is no noisy neighbour": f'shoal_delay_seconds_total{{{WEB},reason="run_queue"}} 0 9\n'
    f"shoal_cpu_usage_seconds_total{{{WEB}}} 0 1\nshoal_cpu_throttled_seconds_total{{{WEB}}} 0 0.9\n"
    'shoal_cpu_usage_seconds_total{unit="batch.service"} 0 15',
    "hundreds of stale neighbours": 'shoal_neighbours_entries{device="eth0",state="stale"} 900 900\n'
    'shoal_neighbours_table_entries{protocol="ipv4"} 900 900\n'
    'shoal_neighbours_table_threshold{protocol="ipv4",level="3"} 1024 1024',
    "an old dump": f'shoal_conntrack_stale_entries{{reason="backend_gone",{SERVICE},backend="10.0.1.7:53"}} 50 50\n'
    'shoal_conntrack_dump_age_seconds{netns="host"} 500 700',
    "a backend that is slow": (
        f'shoal_conntrack_stale_entries{{reason="backend_silent",{SERVICE},backend="10.0.1.7:53"}} 50 50'
    ),
}


def pair(series: str) -> Pair:
    """Return two scrapes of these series, ten seconds apart, in which every signal is available."""
    rows = [line.rsplit(" ", 2) for line in series.splitlines()]
    moments = ["".join(f"{name} {values[moment]}\n" for name, *values in rows) for moment in (0, 1)]
    available = "".join(f'shoal_signal_available{{signal="{signal}"}} 1\n' for signal in SIGNALS)
    return Pair(parse(moments[0] + available, 100.0), parse(moments[1] + available, 100.0 + SECONDS))


def found(verdicts: list[Verdict]) -> set[str]:
    """Return the alerts that something was found for."""
    return {finding.alert for verdict in verdicts for finding in verdict.findings}


@pytest.mark.parametrize(("alert", "series", "over", "under"), CASES, ids=[case[0] for case in CASES])
def test_a_failure_is_found_over_its_threshold_and_not_at_it(
    alert: str, series: str, over: float, under: float
) -> None:
    """The verdict is of the failure that the alert belongs to, as severe as the alert, with a number as evidence."""
    verdicts = judge(pair(series.replace("{}", str(over))))
    assert alert in found(verdicts)
    worst = verdicts[0]
    assert alert in worst.failure.alerts
    assert worst.status is max(ALERTS[finding.alert].status for finding in worst.findings)
    assert all(
        re.search(r"\d|does not answer|failed|nobody|packets go", finding.evidence) for finding in worst.findings
    )
    assert alert not in found(judge(pair(series.replace("{}", str(under)))))


def test_every_alert_has_a_case_and_a_failure() -> None:
    """None is only written down, and none is looked for by two failures."""
    assert {case[0] for case in CASES} == ALERTS.keys()
    listed = [alert for failure in FAILURES for alert in failure.alerts]
    assert sorted(listed) == sorted(ALERTS)
    assert [failure.number for failure in FAILURES] == list(range(1, 15))


@pytest.mark.parametrize("series", DECOYS.values(), ids=DECOYS)
def test_decoys_are_calm(series: str) -> None:
    """What looks like a failure and is none has no finding."""
    verdicts = judge(pair(series))
    assert found(verdicts) == set()
    assert overall(verdicts) is Status.OK


def test_the_culprit_is_the_listener_that_dropped() -> None:
    """Not only the namespace: which port, whose it is, and how full its queue was."""
    series = next(case[1] for case in CASES if case[0] == "ShoalListenQueueOverflow").replace("{}", "20")
    finding = judge(pair(series))[0].findings[0]
    expected = {"netns": "host", "address": "0.0.0.0", "port": "80", "unit": "nginx.service"}  # noqa: S104  (a label)
    assert finding.culprit.as_dict() == expected
    assert "15 connections refused in 10 s" in finding.evidence
    assert "17 in a queue for 16" in finding.evidence


def test_a_listener_of_another_pod_is_not_blamed() -> None:
    """Two pods refuse at the same time; each is blamed for its own."""
    series = "\n".join(
        f'shoal_listen_queue_overflows_total{{netns="pod",pod="{pod}"}} 0 {refused}\n'
        f'shoal_listener_drops_total{{netns="pod",address="::",port="{port}",pod="{pod}"}} 0 {refused}\n'
        f'shoal_listener_accept_queue_length{{netns="pod",address="::",port="{port}",pod="{pod}"}} 6 6\n'
        f'shoal_listener_accept_queue_limit{{netns="pod",address="::",port="{port}",pod="{pod}"}} 5 5'
        for pod, port, refused in (("a", 80, 90), ("b", 81, 40))
    )
    verdict = judge(pair(series))[0]
    assert {(one.culprit["pod"], one.culprit["port"]) for one in verdict.findings} == {("a", "80"), ("b", "81")}


@pytest.mark.parametrize("reason", ["no_permission", "not_in_kernel", "a_reason_of_a_newer_exporter"])
def test_what_is_absent_cannot_be_told(reason: str) -> None:
    """With the reason, and neither ok nor a failure; what another signal proves is still said."""
    text = f'shoal_signal_available{{signal="conntrack_entries",reason="{reason}"}} 0\n'
    snapshot = parse(text, 1.0)
    verdict = next(one for one in judge(Pair(snapshot, snapshot)) if one.failure.name == "conntrack-full")
    assert verdict.status is Status.UNKNOWN
    assert reason in verdict.why


def test_an_older_exporter_is_named() -> None:
    """One that does not know a signal is not taken for one where all is well."""
    snapshot = parse('shoal_build_info{version="0.0.1"} 1\n', 1.0)
    verdicts = judge(Pair(snapshot, snapshot))
    assert {one.status for one in verdicts} == {Status.UNKNOWN}
    assert overall(verdicts) is Status.UNKNOWN
    assert all("0.0.1" in one.why for one in verdicts)


def test_counters_that_begin_again() -> None:
    """After a restart a counter counts from 0, and what is new in it is small."""
    rise = pair('shoal_x_total{a="b"} 1000 3').increase("shoal_x_total")
    assert list(rise.values()) == [3]


@pytest.mark.parametrize("text", ["<html>404</html>", "shoal_x{", "\x00\x01", "shoal_x one"])
def test_what_is_no_metrics(text: str) -> None:
    """One kind of error, whatever it is."""
    with pytest.raises(NotMetricsError):
        parse(text, 0.0)


def test_an_empty_scrape_breaks_nothing() -> None:
    """No series at all: nothing can be told, of anything."""
    empty = Snapshot(0.0)
    assert {one.status for one in judge(Pair(empty, empty))} == {Status.UNKNOWN}
