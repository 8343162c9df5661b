"""From the kernel to a page: a real overflow of a listen queue arrives at a webhook, and what looks like one does not.

Five network namespaces are ill at the same time on the same path. The page for one of them proves that the path was
alive while it stayed silent for the others. SHOAL_E2E_SPEED=1 runs the rules at the pace they are shipped with, which
takes a quarter of an hour (and --timeout=1800).
"""

from __future__ import annotations

import os
import time
from contextlib import ExitStack, suppress
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Final

import pytest
from tests.e2e.stack import Namespace, Stack, start, wait_for

if TYPE_CHECKING:
    from collections.abc import Iterator

pytestmark = pytest.mark.root

SPEED: Final = int(os.environ.get("SHOAL_E2E_SPEED", "20"))
ALERT: Final = "ShoalListenQueueOverflow"
DECOYS: Final = {
    "closed_port": "TcpOutRsts",
    "syn_cookies": "TcpExtTCPReqQFullDoCookies",
    "drops_without_overflow": "TcpExtListenDrops",
    "absorbed_burst": "TcpPassiveOpens",
}
"""{scenario of causes.py: the counter that shows that it happened}"""
WITNESSES: Final = {
    "shoal_listen_queue_overflows_total": "TcpExtListenOverflows",
    "shoal_listen_queue_drops_total": "TcpExtListenDrops",
    "shoal_listen_queue_request_drops_total": "TcpExtTCPReqQFullDrop",
    "shoal_listen_queue_request_cookies_total": "TcpExtTCPReqQFullDoCookies",
}
"""{metric: the same counter in nstat}"""


@dataclass(frozen=True, slots=True)
class Incident:
    """What happened, once every scenario was stopped."""

    stack: Stack
    namespaces: dict[str, Namespace]

    @property
    def sick(self) -> str:
        """The name of the namespace whose queue overflowed."""
        return self.namespaces["overflow"].name

    @property
    def page(self) -> dict[str, Any]:
        """The page about it, as the webhook received it."""
        pages = self.stack.webhook.alerts("firing", self.sick)
        assert pages, "no page arrived"
        return pages[0]


@pytest.fixture(scope="module")
def incident(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Incident]:
    """Make five namespaces ill, wait for the page, give the decoys as long again as `for` takes, and stop them all.

    That no page comes is for the tests to say, each of what it needs one for.
    """
    with ExitStack() as stack:
        path = stack.enter_context(start(tmp_path_factory.mktemp("stack"), SPEED))
        namespaces = {scenario: stack.enter_context(Namespace.ill_with(scenario)) for scenario in ("overflow", *DECOYS)}
        made = Incident(path, namespaces)
        with suppress(TimeoutError):
            # Three changes on a grid of a minute, then two minutes of `for`, and time to be told.
            wait_for("the page", lambda: path.webhook.alerts("firing", made.sick), within=20 + 6 * 60 / SPEED)
        time.sleep(120 / SPEED)
        for namespace in namespaces.values():
            namespace.stop()
        yield made


def test_page_says_where_and_what_to_do(incident: Incident) -> None:
    """The page goes to whoever gets up, names namespace and node, nothing of the exporter's, and has its runbook."""
    node = incident.stack.labels["node"]
    assert incident.page["receiver"] == "pager"
    assert incident.page["labels"] == {
        "alertname": ALERT,
        "severity": "critical",
        "signal": "listen_queue",
        "netns": incident.sick,
        **incident.stack.labels,
    }
    annotations = incident.page["annotations"]
    assert incident.sick in annotations["description"]
    assert node in annotations["description"]
    assert annotations["runbook_url"].endswith(f"/rules/runbooks/{ALERT}.md")
    assert f"var-node={node}" in annotations["dashboard_url"]
    assert {"summary", "impact"} <= annotations.keys()


@pytest.mark.parametrize("scenario", ["overflow", *DECOYS])
def test_exporter_agrees_with_nstat(incident: Incident, scenario: str) -> None:
    """Each counter of each namespace is what nstat reads inside it, between two readings of nstat that are equal."""
    namespace = incident.namespaces[scenario]

    def undisturbed() -> tuple[dict[str, int], dict[str, float]] | None:
        before = namespace.counters()
        exported = incident.stack.exported(namespace.name)
        return (before, exported) if namespace.counters() == before else None

    counters, exported = wait_for("counters at rest", undisturbed, within=10)
    assert {metric: exported.get(metric) for metric in WITNESSES} == {
        metric: counters[name] for metric, name in WITNESSES.items()
    }


def test_overflow_was_an_overflow(incident: Incident) -> None:
    """The page was for what the kernel counted: more refused connections than the alert asks for."""
    assert incident.namespaces["overflow"].counters()["TcpExtListenOverflows"] > 30


def test_page_resolves(incident: Incident) -> None:
    """Once nothing is refused any more, the evidence leaves its window, `keep_firing_for` passes, and the page ends."""
    assert incident.page
    resolved = wait_for(
        "the end of the page",
        lambda: incident.stack.webhook.alerts("resolved", incident.sick),
        within=20 + 11 * 60 / SPEED,
    )
    assert resolved[0]["labels"] == incident.page["labels"]


@pytest.mark.parametrize(("scenario", "counter"), DECOYS.items())
def test_decoy_stays_silent(incident: Incident, scenario: str, counter: str) -> None:
    """What looks like an overflow really happened, Prometheus saw it, and no alert came of it, not even pending."""
    decoy = incident.namespaces[scenario]
    counters = decoy.counters()
    assert counters[counter] >= 100
    assert counters["TcpExtListenOverflows"] == 0
    if scenario != "drops_without_overflow":
        assert counters["TcpExtListenDrops"] == 0
    stored = incident.stack.query(f'shoal_listen_queue_overflows_total{{netns="{decoy.name}"}}')
    assert [one["value"][1] for one in stored] == ["0"]
    assert not incident.stack.query(f'count_over_time(ALERTS{{netns="{decoy.name}"}}[1h])')
    assert not incident.stack.webhook.alerts("firing", decoy.name)
    assert incident.page, "silence on a path that is dead means nothing"


def test_every_rule_was_evaluated(incident: Incident) -> None:
    """Prometheus loaded the whole pack and could evaluate each rule of it on what a real exporter gives."""
    rules = incident.stack.rules()
    assert ALERT in {rule["name"] for rule in rules}
    assert {rule["name"]: rule["lastError"] for rule in rules if rule["health"] != "ok"} == {}
