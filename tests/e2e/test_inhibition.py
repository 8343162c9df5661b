"""Who is told: a running Alertmanager with the shipped example mutes what a cause explains, on that node and no other.

Each case has a cluster of its own, so that all of them run at once. In it, the cause fires on one node and what it
explains on the same node, on another node, and on a node of the same name in another cluster.
"""

from __future__ import annotations

import json
import re
import time
import urllib.request
from contextlib import suppress
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final, NamedTuple

import pytest
import yaml
from tests.e2e.alertmanager import EXAMPLES, alertmanager, receiving, wait_for

if TYPE_CHECKING:
    from collections.abc import Iterator

RULES: Final = EXAMPLES.parent
POD: Final = {"namespace": "shop", "pod": "checkout-7d9c5b6f4-x2x9k", "container": "api"}
OTHER_POD: Final = {"namespace": "shop", "pod": "cart-6c9d8f7b5-kq2mz", "container": "api"}
UNIT: Final = {"unit": "redis-server.service"}
NODE: Final[dict[str, str]] = {}
"""The labels of an alert about a node as a whole: none of a workload's."""

Labels = frozenset[tuple[str, str]]


class Case(NamedTuple):
    """A cause, whose it is, what it explains, and whose that is."""

    cause: str
    whose: dict[str, str]
    symptom: str
    hit: dict[str, str]

    @property
    def cluster(self) -> str:
        """The cluster that the case has to itself."""
        return f"{self.cause}-{self.symptom}"

    @property
    def apart(self) -> list[dict[str, str]]:
        """What must be told whatever is muted: the cause, and the symptom on another node and in another cluster."""
        return [
            alert(self.cause, self.cluster, "a", self.whose),
            alert(self.symptom, self.cluster, "b", self.hit),
            alert(self.symptom, f"{self.cluster}-twin", "a", self.hit),
        ]

    @property
    def beside(self) -> dict[str, str]:
        """The symptom on the node of the cause."""
        return alert(self.symptom, self.cluster, "a", self.hit)


MUTED: Final = (
    # Users are being hurt: the warning before that is no news, whichever pod of the node it is about.
    Case("ShoalConntrackDrops", {"netns": "host"}, "ShoalConntrackNearlyFull", {"netns": "pod", **POD}),
    Case("ShoalListenQueueOverflow", {"netns": "pod", **POD}, "ShoalListenQueueNearlyFull", {"port": "80", **POD}),
    Case("ShoalMemoryHighThrottling", POD, "ShoalMemoryUnreclaimableNearLimit", OTHER_POD),
    # The whole node is short of memory: that each pod on it loses its code pages is explained.
    Case("ShoalNodeMemoryPressure", NODE, "ShoalCodeEviction", POD),
    Case("ShoalNodeMemoryPressure", NODE, "ShoalMemoryPressure", POD),
    # No room for any neighbour is why this one cannot be reached.
    Case("ShoalNeighbourTableOverflow", {"protocol": "ipv4"}, "ShoalNeighbourUnreachable", {"address": "10.0.0.9"}),
    # One workload, one page.
    Case("ShoalRedisAofStall", {"server": "10.0.0.7:6379", **POD}, "ShoalBlockIoStall", POD),
    Case("ShoalRedisAofStall", {"server": "10.0.0.7:6379", **UNIT}, "ShoalBlockIoDelay", UNIT),
    Case("ShoalMemoryHighThrottling", POD, "ShoalMemoryPressure", POD),
    Case("ShoalCodeEvictionStall", POD, "ShoalMemoryStall", POD),
    Case("ShoalMemoryStall", POD, "ShoalMemoryPressure", POD),
    # And the other way round: one throttled workload looks like pressure of the whole node.
    Case("ShoalMemoryHighThrottling", POD, "ShoalNodeMemoryPressure", NODE),
    Case("ShoalExporterDown", NODE, "ShoalCollectorFailing", {"collector": "memory"}),
    Case("ShoalExporterDown", NODE, "ShoalSignalLost", {"lost_signal": "memory_events"}),
)

TOLD: Final = (
    # Another failure on the same node is another piece of news.
    Case("ShoalConntrackDrops", {"netns": "host"}, "ShoalListenQueueOverflow", {"netns": "pod", **POD}),
    Case("ShoalConntrackDrops", {"netns": "host"}, "ShoalOOMKill", POD),
    Case("ShoalNeighbourTableOverflow", {"protocol": "ipv4"}, "ShoalReversePathPeersCutOff", {"netns": "host"}),
    # Another workload on the same node has a reason of its own.
    Case("ShoalRedisAofStall", {"server": "10.0.0.7:6379", **POD}, "ShoalBlockIoStall", OTHER_POD),
    Case("ShoalMemoryHighThrottling", POD, "ShoalMemoryStall", OTHER_POD),
    # A node's shortage explains its pods' warnings, but whoever is hurt is paged for.
    Case("ShoalNodeMemoryPressure", NODE, "ShoalMemoryStall", POD),
    Case("ShoalNodeMemoryPressure", NODE, "ShoalCodeEvictionStall", POD),
    # A warning never mutes a page, nor a warning of its own kind.
    Case("ShoalNodeMemoryPressure", NODE, "ShoalListenQueueOverflow", {"netns": "pod", **POD}),
    Case("ShoalOOMKill", POD, "ShoalMemoryUnreclaimableNearLimit", POD),
    Case("ShoalExporterDown", NODE, "ShoalOOMKill", POD),
)


@cache
def pack() -> dict[str, dict[str, str]]:
    """Return the labels of every alert of the pack by name."""
    files = [yaml.safe_load(file.read_text(encoding="utf-8")) for file in RULES.glob("*.yaml")]
    rules = [rule for file in files for group in file["groups"] for rule in group["rules"]]
    return {rule["alert"]: rule["labels"] for rule in rules if "alert" in rule}


def alert(name: str, cluster: str, node: str, hit: dict[str, str]) -> dict[str, str]:
    """Return the labels of an alert as Prometheus would send it."""
    return {"alertname": name, "cluster": cluster, "node": node, **pack()[name], **hit}


def key(labels: dict[str, str]) -> Labels:
    """Return labels as something that can be counted."""
    return frozenset(labels.items())


def should_arrive() -> dict[Labels, str]:
    """Return the alerts that someone is to be told of, and at which receiver."""
    told = [one for case in (*MUTED, *TOLD) for one in case.apart] + [case.beside for case in TOLD]
    return {key(one): {"critical": "pager", "warning": "chat"}[one["severity"]] for one in told}


@pytest.fixture(scope="module")
def arrived(tmp_path_factory: pytest.TempPathFactory) -> Iterator[dict[Labels, str]]:
    """Let everything fire at once and yield which alerts arrived, by labels, and at which receiver."""
    posted = [one for case in (*MUTED, *TOLD) for one in (*case.apart, case.beside)]
    posted += [alert(name, "quiet", "a", NODE) for name, labels in pack().items() if labels["severity"] == "info"]
    with receiving() as webhook, alertmanager(tmp_path_factory.mktemp("alertmanager"), webhook) as port:
        body = json.dumps([{"labels": labels} for labels in posted]).encode()
        request = urllib.request.Request(
            f"http://127.0.0.1:{port}/api/v2/alerts", body, {"Content-Type": "application/json"}
        )
        with urllib.request.urlopen(request, timeout=10) as answer:  # noqa: S310  (loopback)
            assert answer.status == 200

        def distinct() -> dict[Labels, str]:
            return {key(one["labels"]): one["receiver"] for one in webhook.everything()}

        # Which of them are missing is for the tests to say.
        with suppress(TimeoutError):
            wait_for("all that should arrive", lambda: len(distinct()) >= len(should_arrive()), within=30)
        # Some more turns of every group, which are a second each: what was only late would be here after them.
        time.sleep(4)
        yield distinct()


@pytest.mark.parametrize("case", MUTED, ids=lambda case: case.cluster)
def test_cause_mutes_its_symptom_on_that_node_only(arrived: dict[Labels, str], case: Case) -> None:
    """The cause arrives, its symptom on the same node does not, and it does from another node and another cluster."""
    assert key(case.beside) not in arrived
    assert [one for one in case.apart if key(one) not in arrived] == []


@pytest.mark.parametrize("case", TOLD, ids=lambda case: case.cluster)
def test_what_is_no_symptom_is_told(arrived: dict[Labels, str], case: Case) -> None:
    """Both arrive, though they are of the same node."""
    assert [one for one in (*case.apart, case.beside) if key(one) not in arrived] == []


def test_exactly_what_should_arrive_arrives(arrived: dict[Labels, str]) -> None:
    """Nothing else comes, no info at all, and each alert comes to the receiver of its severity."""
    assert arrived == should_arrive()


def test_every_inhibition_has_a_case() -> None:
    """No rule of the example is there without having been seen to mute."""
    configuration: dict[str, Any] = yaml.safe_load(Path(EXAMPLES, "alertmanager.yaml").read_text(encoding="utf-8"))
    for rule in configuration["inhibit_rules"]:
        assert any(
            matches(rule["source_matchers"], alert(case.cause, "east", "a", case.whose))
            and matches(rule["target_matchers"], alert(case.symptom, "east", "a", case.hit))
            for case in MUTED
        ), rule


def matches(matchers: list[str], labels: dict[str, str]) -> bool:
    """Tell whether all of Alertmanager's matchers fit, of the two kinds that the example uses."""
    for matcher in matchers:
        name, pattern, value = re.split(r"\s*(=~|=)\s*", matcher, maxsplit=1)
        wanted = value.strip('"') if pattern == "=~" else re.escape(value.strip('"'))
        if not re.fullmatch(wanted, labels.get(name, "")):
            return False
    return True
