"""The recorded hour of a busy and healthy machine: silent however badly it is scraped, and loud when it is ill.

Each case changes the recorded series as that mistake or that fault would change them, and has promtool evaluate the
whole pack over them; a rule whose evaluation fails makes promtool fail.
"""

from __future__ import annotations

import json
import subprocess
from typing import TYPE_CHECKING, Final

import pytest
from hypothesis import given
from hypothesis.strategies import integers, lists, none
from tests.rules.build_hour import INFORMED, INTERVAL, MINUTES, compress, refreshed
from tests.rules.pack import HOUR, RULES, Series, expand, exported, expressions, load, raw_metrics

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from pathlib import Path

    from tests.rules.pack import Sample

pytestmark = pytest.mark.timeout(400)  # a second or two each, but many times that on a machine that is busy

WORKLOAD: Final = ("namespace", "pod", "container")
EXPORTER: Final = {"namespace": "monitoring", "pod": "shoal-x7k2p", "container": "shoal"}
POD: Final = "checkout-7d9c5b6f4-x2x9k"
UNIT: Final = "redis-server.service"
SCRAPES: Final = MINUTES * 60 // INTERVAL


def hour() -> list[Series]:
    """Return the recorded series."""
    return [Series.read(one) for one in load(HOUR)["tests"][0]["input_series"]]


def evaluate(directory: Path, hours: list[list[Series]], expected: dict[str, int], interval: int = INTERVAL) -> str:
    """Run promtool over each of the hours, expecting that many of these alerts; return what it says if not.

    What is true of that machine, and of severity info, is left out: how often it is true depends on the mistake.
    """
    firing = f'ALERTS{{alertstate="firing",alertname!~"{"|".join(INFORMED)}"}}'
    fired = f"count by (alertname) (count_over_time({firing}[{MINUTES + 5}m]))"
    samples = [{"labels": f'{{alertname="{name}"}}', "value": value} for name, value in sorted(expected.items())]
    content = {
        "rule_files": [str(RULES / "*.yaml")],
        "evaluation_interval": f"{interval}s",
        "tests": [
            {
                "interval": f"{interval}s",
                "input_series": [{"series": written(one), "values": compress(one.samples)} for one in series],
                "promql_expr_test": [{"expr": fired, "eval_time": f"{MINUTES}m", "exp_samples": samples}],
            }
            for series in hours
        ],
    }
    file = directory / "test.yaml"
    # JSON is YAML, and is written many times as fast.
    file.write_text(json.dumps(content), encoding="utf-8")
    done = subprocess.run(["promtool", "test", "rules", str(file)], capture_output=True, text=True, check=False)
    return done.stdout + done.stderr if done.returncode else ""


def written(series: Series) -> str:
    """Return a series as promtool reads it."""
    return f"{series.name}{{{','.join(f'{name}={json.dumps(value)}' for name, value in series.labels.items())}}}"


def test_names_every_alert() -> None:
    """The file is what `make rule-tests` writes for the alerts that there are now."""
    assert HOUR.read_text(encoding="utf-8") == refreshed()


def test_lasts_an_hour() -> None:
    """Twice a minute for an hour the exporter answered, and all its collectors succeeded most of the time."""
    up = next(series for series in hour() if series.name == "up")
    assert len(up.samples) >= SCRAPES
    assert sum(value == 1 for value in up.samples) > 0.98 * SCRAPES
    for series in hour():
        if series.name == "shoal_scrape_collector_success":
            assert sum(value == 1 for value in series.samples) > 0.9 * SCRAPES, series.labels


def test_is_busy() -> None:
    """It computes, writes, forks, serves and translates addresses: an idle machine would prove little."""
    last: dict[str, float] = {}
    for series in hour():
        values = [value for value in series.samples if value is not None]
        if series.name.endswith("_total"):
            last[series.name] = max(last.get(series.name, 0.0), values[-1] - values[0])
        else:
            last[series.name] = max(last.get(series.name, 0.0), *values)
    assert last["shoal_node_pressure_some_seconds_total"] > 300  # of 3600
    assert last["shoal_conntrack_entries"] > 100
    assert last["shoal_redis_aof_enabled"] == 1
    assert last["shoal_disk_flushes_total"] > 100
    assert last["shoal_tcp_time_wait_sockets"] > 10


@given(
    lists(none() | integers(-9, 9).map(float) | integers(-99999, 99999).map(lambda value: value / 10000), max_size=20)
)
def test_notation_loses_nothing(samples: list[Sample]) -> None:
    """What is written for promtool is read as the same samples."""
    assert expand(compress(samples)) == samples


# What others scrape, and how Shoal is scraped: nothing of it may make the pack fire.


def not_honored(series: Series) -> Iterator[Series]:
    """Scrape without honor_labels, a pod as the target: what is the workload's own is renamed."""
    own = {f"exported_{name}" if name in WORKLOAD else name: value for name, value in series.labels.items()}
    yield series._replace(labels=own | EXPORTER)


def target_labels(series: Series) -> Iterator[Series]:
    """Scrape with honor_labels and a pod as the target: what has no workload gets the exporter's."""
    yield series._replace(labels=EXPORTER | series.labels)


def two_clusters(series: Series) -> Iterator[Series]:
    """See a second cluster in which the node has the same name and everything is half as large."""
    yield series
    yield series._replace(labels=series.labels | {"cluster": "west"})


def scraped_twice(series: Series) -> Iterator[Series]:
    """Scrape by two jobs, one of which adds a label."""
    yield series
    yield series._replace(labels=series.labels | {"job": "pods", "zone": "a"})


def without_node(series: Series) -> Iterator[Series]:
    """Scrape without saying which node it is."""
    yield series._replace(labels={name: value for name, value in series.labels.items() if name != "node"})


def rebooted(series: Series) -> Iterator[Series]:
    """Start every counter again after half an hour, with two scrapes missed."""
    half = len(series.samples) // 2
    before, after = series.samples[:half], series.samples[half + 2 :]
    first = next((value for value in after if value is not None), 0.0)
    if series.name.endswith(("_total", "_bucket", "_sum", "_count")):
        after = [None if value is None else value - first for value in after]
    yield series._replace(samples=[*before, None, None, *after])


def renamed(series: Series) -> Iterator[Series]:
    """Replace the exporter's pod every ten minutes."""
    for number in range(0, len(series.samples), 20):
        gaps: list[Sample] = [None] * number
        labels = EXPORTER | series.labels | {"instance": f"10.0.0.{number}:7462"}
        yield series._replace(labels=labels, samples=[*gaps, *series.samples[number : number + 20], None])


def vanished(series: Series) -> Iterator[Series]:
    """Lose the node after half an hour."""
    yield series._replace(samples=[*series.samples[: len(series.samples) // 2], None])


def every_other_scrape(series: Series) -> Iterator[Series]:
    """Lose every second scrape."""
    yield series._replace(samples=[None if place % 2 else value for place, value in enumerate(series.samples)])


@pytest.mark.parametrize(
    ("mistake", "more"),
    [
        (not_honored, {"ShoalScrapeMisconfigured": 1}),
        (target_labels, {}),
        (two_clusters, {}),
        (scraped_twice, {}),
        (without_node, {"ShoalScrapeMisconfigured": 1}),
        (rebooted, {}),
        (renamed, {}),
        (vanished, {}),
        (every_other_scrape, {}),
    ],
    ids=lambda value: getattr(value, "__name__", ""),
)
def test_no_page_however_it_is_scraped(
    tmp_path: Path, mistake: Callable[[Series], Iterator[Series]], more: dict[str, int]
) -> None:
    """No alert but the one that says what is wrong with the scraping, and no rule that cannot be evaluated."""
    changed = [one for series in hour() for one in mistake(series)]
    assert evaluate(tmp_path, [changed], more) == ""


def kube_state_metrics() -> Iterator[Series]:
    """Yield what kube-state-metrics, the kubelet and node_exporter say of the same pods, with labels of their own."""
    pods = {(one.labels["namespace"], one.labels["pod"]) for one in hour() if one.labels.get("pod")}
    always: list[Sample] = [1.0] * SCRAPES
    ksm = {"cluster": "east", "node": "busy", "job": "kube-state-metrics", "instance": "10.0.9.9:8080"}
    for namespace, pod in sorted(pods):
        yield Series("kube_pod_info", ksm | {"namespace": namespace, "pod": pod, "host_ip": "10.0.0.1"}, always)
        for resource, limit in (("memory", 128 * 2**20), ("cpu", 1)):
            labels = ksm | {"namespace": namespace, "pod": pod, "container": "api", "resource": resource}
            yield Series("kube_pod_container_resource_limits", labels, [float(limit)] * SCRAPES)
    own = {"namespace": "monitoring", "pod": "kube-state-metrics-0", "container": "kube-state-metrics"}
    for status, value in (("true", 1.0), ("false", 0.0), ("unknown", 0.0)):
        labels = ksm | own | {"condition": "Ready", "status": status}
        yield Series("kube_node_status_condition", labels, [value] * SCRAPES)
    yield Series("kube_node_info", ksm | own | {"os_image": "Debian GNU/Linux 12"}, always)
    yield Series("kubelet_node_name", {"cluster": "east", "node": "busy", "job": "kubelet"}, always)
    yield Series("node_uname_info", {"cluster": "east", "node": "busy", "job": "node", "sysname": "Linux"}, always)


def test_no_page_beside_others(tmp_path: Path) -> None:
    """The same pods and nodes, as others export them, are matched with nothing."""
    assert evaluate(tmp_path, [[*hour(), *kube_state_metrics()]], {}) == ""


def test_no_page_from_an_older_exporter(tmp_path: Path) -> None:
    """One node for each metric, which lacks just that one: nothing fires for want of it, and every rule is evaluated.

    Half an hour of one pod and one unit at one scrape a minute: enough for every window but the longest.
    """
    read = {metric for expression in expressions().values() for metric in raw_metrics(expression)}
    thinned = [
        one._replace(samples=one.samples[: SCRAPES // 2 : 2])
        for one in hour()
        if one.name in read and one.labels.get("pod", POD) == POD and one.labels.get("unit", UNIT) == UNIT
    ]
    names = sorted({one.name for one in thinned} & exported().keys())
    # promtool loads no more than 10,000 samples at once, so there are a few nodes in a test.
    changed = [
        [
            one._replace(labels=one.labels | {"node": f"without-{name}"})
            for name in names[first : first + 5]
            for one in thinned
            if one.name != name
        ]
        for first in range(0, len(names), 5)
    ]
    assert evaluate(tmp_path, changed, {}, interval=60) == ""


# What the hour would look like on a machine that is ill.


def overflowing(series: Series) -> Series:
    """Refuse two connections a second for ten minutes."""
    if series.name != "shoal_listen_queue_overflows_total" or series.labels["netns"] != "host":
        return series
    return grown(series, 2)


def full_table(series: Series) -> Series:
    """Fill the connection tracking table and drop five packets a second for ten minutes."""
    if series.name == "shoal_conntrack_drop_total" and series.labels["netns"] == "host":
        return grown(series, 5)
    if series.name == "shoal_conntrack_entries" and series.labels["netns"] == "host":
        return series._replace(samples=[*series.samples[:20], *[1e6] * 20, *series.samples[40:]])
    return series


def killed(series: Series) -> Series:
    """Kill one process for want of memory."""
    if series.name != "shoal_node_memory_oom_kills_total":
        return series
    return series._replace(samples=[(value or 0) + (place > 20) for place, value in enumerate(series.samples)])


def grown(series: Series, rate: float) -> Series:
    """Let a counter grow by so much a second from minute 10 to minute 20."""
    more = [min(max(place - 20, 0), 20) * INTERVAL * rate for place in range(len(series.samples))]
    return series._replace(samples=[(value or 0) + add for value, add in zip(series.samples, more, strict=True)])


@pytest.mark.parametrize(
    ("fault", "alert"),
    [(overflowing, "ShoalListenQueueOverflow"), (full_table, "ShoalConntrackDrops"), (killed, "ShoalOOMKill")],
    ids=lambda value: getattr(value, "__name__", ""),
)
def test_a_fault_in_the_hour_is_seen(tmp_path: Path, fault: Callable[[Series], Series], alert: str) -> None:
    """The silence means something: with one fault in it the same hour is not silent."""
    assert f'{{alertname="{alert}"}} 1' in evaluate(tmp_path, [[fault(series) for series in hour()]], {})
