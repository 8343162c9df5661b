"""What `check` says of what it could not look at: an ok must not be a guess, and nothing that is odd may break it."""

from __future__ import annotations

import re
from pathlib import Path
from typing import TYPE_CHECKING

import pytest
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st

from shoal import collectors
from shoal.check import runbooks
from shoal.check.alerts import Status
from shoal.check.failures import FAILURES, WANTS
from shoal.check.report import as_json, compare, judge, overall, render
from shoal.check.snapshot import Labels, Pair, Snapshot, parse

if TYPE_CHECKING:
    from collections.abc import Mapping
    from random import Random

    from shoal.check.report import Verdict

SIGNALS = {name for one in FAILURES for name in (*one.signals, *(part.signal for part in one.parts))}
NOT_ENTERED = dict.fromkeys(("listen_queue_pods", "ephemeral_ports_namespaces"), "no_permission")
PORTS = ("ephemeral-ports", "time-wait")


def verdicts(series: str, absent: Mapping[str, str], before: Mapping[str, str] | None = None) -> dict[str, Verdict]:
    """Judge two scrapes with these series, without the signals that are absent for a reason; by the failure's name."""

    def scrape(taken: float, missing: Mapping[str, str]) -> Snapshot:
        available = "".join(
            f'shoal_signal_available{{signal="{name}",reason="{missing.get(name, "")}"}} {int(name not in missing)}\n'
            for name in SIGNALS
        )
        return parse(f"{series}\n{available}", taken)

    pair = Pair(scrape(0.0, absent if before is None else before), scrape(5.0, absent))
    return {one.failure.name: one for one in judge(pair)}


def sockets(netns: str, count: int) -> str:
    """Return the series of a network namespace with so many TCP sockets, some of them in TIME_WAIT."""
    return (
        f"shoal_tcp_sockets_in_use{{{netns}}} {count - 10}\nshoal_tcp_time_wait_sockets{{{netns}}} 10\n"
        'shoal_tcp_sockets_in_use{netns="host"} 5000'
    )


@pytest.mark.parametrize(
    ("netns", "name"),
    [
        ('netns="pod",namespace="shop",pod="web-0"', "shop/web-0"),
        ('netns="container",container="0123456789ab"', "0123456789ab"),
        ('netns="tenant"', "network namespace tenant"),
        ('netns="other"', "all without a name"),
    ],
)
def test_ports_of_a_pod_that_was_not_entered(netns: str, name: str) -> None:
    """With sockets enough to use them up it cannot be told, and it is said whose, why and what would help."""
    found = verdicts(sockets(netns, 812), NOT_ENTERED)
    for failure in PORTS:
        assert found[failure].status is Status.UNKNOWN
        assert f"{name}: 812 TCP sockets" in found[failure].why
        assert "no_permission, it wants --netns.enter=true with CAP_SYS_ADMIN" in found[failure].why
    assert overall(found.values()) is Status.OK


def test_ports_where_no_pod_has_sockets_enough() -> None:
    """Then it is ok, as with every capability nobody would look either; what was not entered is said all the same."""
    found = verdicts(sockets('netns="pod",namespace="shop",pod="web-0"', 99), NOT_ENTERED)
    for failure in PORTS:
        assert found[failure].status is Status.OK
        assert found[failure].unseen[0].startswith("ports in other network namespaces. ephemeral_ports_namespaces: ")


def test_ports_where_nothing_is_counted() -> None:
    """Without the sockets of other namespaces an ok would be a guess."""
    assert {verdicts("", NOT_ENTERED)[failure].status for failure in PORTS} == {Status.UNKNOWN}


def test_an_exporter_that_is_not_in_the_host_s_network() -> None:
    """Its own namespace is its pod's, so the host's is one that was not entered."""
    own = 'shoal_listener_accept_queue_limit{netns="pod",address="::",port="7462",pod="shoal-x"} 100\n'
    series = own + sockets('netns="pod",namespace="shop",pod="web-0"', 50)
    assert "network namespace host: 5000 TCP sockets" in verdicts(series, NOT_ENTERED)["time-wait"].why
    # Nor does the one pod that was looked into speak for the others.
    pods = own + 'shoal_tcp_sockets_in_use{netns="pod",namespace="shop",pod="web-0"} 812'
    assert "shop/web-0: 812 TCP sockets" in verdicts(pods, NOT_ENTERED)["time-wait"].why


def test_listeners_of_pods_that_were_not_entered() -> None:
    """What every namespace refused is counted without entering it, so that is ok; how full queues are is not seen."""
    found = verdicts("", NOT_ENTERED)["listen-queue"]
    assert found.status is Status.OK
    [unseen] = found.unseen
    assert unseen.startswith("queues in other network namespaces; what they refused is counted. listen_queue_pods: ")
    assert unseen.endswith(
        "no_permission, it wants --netns.enter=true with CAP_SYS_ADMIN and CAP_SYS_PTRACE (tier full of the chart)"
    )


def test_redis_servers_that_could_not_be_asked() -> None:
    """They are not down, and it is not ok: nobody has asked them. One that can be asked and is down is still said."""
    closed = 'shoal_redis_up{server="127.0.0.1:6379",reason="unreachable",pod="cache-0"} 0'
    found = verdicts(closed, NOT_ENTERED)["redis-aof"]
    assert found.status is Status.UNKNOWN
    assert "1 Redis servers run here and were not asked" in found.why
    not_enabled = dict.fromkeys(NOT_ENTERED, "not_enabled")
    assert verdicts("shoal_redis_servers_skipped 3", not_enabled)["redis-aof"].status is Status.UNKNOWN
    assert verdicts("shoal_redis_servers_skipped 0", not_enabled)["redis-aof"].status is Status.OK
    assert verdicts(closed, {})["redis-aof"].status is Status.WARNING
    refused = closed.replace("unreachable", "refused")
    assert verdicts(refused, NOT_ENTERED)["redis-aof"].status is Status.WARNING


def test_what_was_not_looked_at_is_printed() -> None:
    """Under its failure, at the end, and in the JSON; a finding does not hide it."""
    overflow = 'shoal_tcp_sockets_in_use{netns="host"} 1\nshoal_redis_up{server="r",reason="refused"} 0'
    found = verdicts(overflow, NOT_ENTERED | {"neighbours_verify": "not_enabled"})
    text = " ".join(render("node", list(found.values()), seconds=5, width=80, colour=False).split())
    assert "Not seen: whether another MAC answers for an address. neighbours_verify: not_enabled, it wants" in text
    assert "1 warning, 13 ok (4 of them as far as was seen)." in text
    document = as_json("node", list(found.values()), seconds=5)
    assert sum(bool(one["unseen"]) for one in document["failures"]) == 4


@pytest.mark.parametrize("reason", ["no_permission", "not_enabled"])
def test_what_is_refused_is_named(reason: str) -> None:
    """The capability or the option, not only that one is missing."""
    for signal, wanted in (("delays_waits", "CAP_NET_ADMIN"), ("conntrack_dump", "CAP_NET_ADMIN")):
        whys = [one.why for one in verdicts("", {signal: reason}).values() if one.status is Status.UNKNOWN]
        assert [f"{signal}: {reason}, it wants {wanted}" in why for why in whys] == [True]


def test_every_signal_that_is_asked_about_exists() -> None:
    """A name that no collector has would be said to be missing for ever."""
    every = {signal for name in collectors.available_names() for signal in collectors.load(name).signals}
    assert SIGNALS | WANTS.keys() <= every


def test_a_read_that_was_late_once() -> None:
    """There is nothing to compare with, so it cannot be told, whichever of the two it was."""
    late = {"listen_queue_namespaces": "collector_failed"}
    for before, after in ((late, {}), ({}, late), (late, late)):
        found = verdicts("", after, before)["listen-queue"]
        assert found.status is Status.UNKNOWN
        assert "did not finish in time" in found.why
    # What was missing for another reason, such as a first dump that was not there yet, has come.
    assert verdicts("", {}, {"conntrack_dump": "not_readable"})["stale-backend"].status is Status.OK


def test_a_listener_that_has_ended() -> None:
    """It refused, and has neither queue nor limit any more; so has an older exporter."""
    before, after = (
        parse(
            f'shoal_listen_queue_overflows_total{{netns="host"}} {count}\n'
            f'shoal_listener_drops_total{{netns="host",address="::",port="80"}} {count}\n',
            float(count),
        )
        for count in (0, 20)
    )
    verdict = next(one for one in judge(Pair(before, after)) if one.failure.name == "listen-queue")
    assert verdict.findings[0].evidence.endswith("20 of them by port 80")


# Every name that the modules which judge ask for.
NAMES = sorted(
    {
        name
        for file in (Path(__file__).parents[3] / "exporter/shoal/check").glob("*.py")
        for name in re.findall(r'"(shoal_[a-z_0-9]+)"', file.read_text(encoding="utf-8"))
    }
)
ODD = "x\x1b[31m\n'$(reboot)"
LABELS = {
    "netns": ("host", "pod", ODD),
    "pod": ("", "web-0", ODD),
    "unit": ("", ODD),
    "reason": ("run_queue", "block_io", "reclaim", "backend_gone", "refused"),
    "event": ("", "high", "oom_kill", "aof-write"),
    "resource": ("memory", "cpu", "io"),
    "device": ("", "eth0", ODD),
    "address": ("", "::", "other"),
    "port": ("", "80"),
    "server": ("", "[::1]:6379", ODD),
    "mountpoint": ("", "/data", ODD),
    "destination": ("", "10.0.0.1"),
    "state": ("failed", "stale"),
    "level": ("3", "1"),
    "mode": ("strict", ""),
    "le": ("0.05", "+Inf"),
    "protocol": ("", "ipv4", "udp"),
}
VALUES = (0.0, 1.0, 0.5, 50.0, 5000.0, 1e308, -1.0, float("inf"), float("-inf"), float("nan"))


@pytest.mark.slow
@given(st.randoms(use_true_random=False))
# Without making a failure smaller, which takes minutes here and tells nothing more.
@settings(max_examples=80, deadline=None, phases=[Phase.generate], suppress_health_check=[HealthCheck.too_slow])
def test_whatever_the_numbers_are(chance: Random) -> None:
    """Series that are missing, odd or absurd, as those of an older, a newer or a broken exporter: a verdict each."""
    before, after = Snapshot(0.0), Snapshot(5.0)
    # Few, so that series of different metrics have the same labels, as those that are compared do.
    pool = [{name: chance.choice(values) for name, values in LABELS.items() if chance.random() < 0.5} for _ in "12"]
    metrics = chance.sample(NAMES, chance.randint(0, len(NAMES)))
    for metric, labels in ((metric, labels) for metric in metrics for labels in [*pool, {}]):
        for snapshot in (before, after):
            if chance.random() < 0.8:
                snapshot.samples.setdefault(metric, {})[Labels(labels)] = chance.choice(VALUES)
    found = judge(Pair(before, after))
    assert len(found) == 14
    text = "".join(render("node", found, seconds=5.0, width=width, colour=False) for width in (40, 80))
    text += compare({"a": found, "b": judge(Pair(before, before))}, width=80, colour=False)
    assert "\x1b" not in text, "a name has reached the terminal as it is"
    commands = [line for line in text.splitlines() if line.startswith(("    $ ", "    # "))]
    assert not [one for one in commands if "reboot" in one], "a name has become a command"
    as_json("node", found, seconds=5.0)


def test_a_mount_point_that_is_a_command() -> None:
    """Anybody who may mount may name it so; what is pasted by root must not run it."""
    assert runbooks.confirm("ShoalInodesExhausted", Labels({"mountpoint": "/mnt/$(reboot)"}))[0] == (
        "df -i '/mnt/$(reboot)'"
    )
    six = runbooks.confirm("ShoalRedisAofStall", Labels({"server": "[::1]:6379"}))
    assert six[0].startswith("redis-cli -h ::1 -p 6379 ")


def test_the_names_are_there() -> None:
    """Nothing would be made up of an empty list."""
    assert len(NAMES) > 50
