"""The rule pack: promtool and amtool run for real, and what neither of them checks is checked here.

promtool cannot tell that an alert in a test is spelled wrong (a silent case then passes for ever), that a metric is
one that nobody exports, or that a runbook does not exist.
"""

from __future__ import annotations

import re
import subprocess
from collections import Counter
from datetime import timedelta
from typing import TYPE_CHECKING, Any

import promql_parser
import pytest
from tests.rules.pack import (
    FILES,
    FOREIGN,
    IDENTITY,
    RULES,
    SIGNAL_TESTS,
    TARGET,
    TESTS,
    Series,
    alerts,
    exported,
    expressions,
    labels_of,
    load,
    parsed,
    recorded,
    rules,
    selectors,
    walk,
)

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

    from pytest_subprocess import FakeProcess

EXAMPLES = RULES / "examples"
RUNBOOKS = RULES / "runbooks"

SEVERITIES = {"critical", "warning", "info"}
ANNOTATIONS = {"summary", "description", "impact", "runbook_url", "dashboard_url"}
HEADINGS = ["Meaning", "Impact", "Confirm", "Rule out", "Mitigate", "Prevent"]
RUNBOOK_URL = "https://github.com/shoal-exporter/shoal/blob/main/rules/runbooks/{}.md"
DASHBOARD_URL = "/d/shoal-node/shoal-node?var-cluster={{ $labels.cluster }}&var-node={{ $labels.node }}"

_MINUTES = re.compile(r"\A[0-9]+m\Z")


def run(*command: str) -> str:
    """Run a checker, fail the test with all that it said if it found something, and return that otherwise."""
    try:
        done = subprocess.run(command, capture_output=True, text=True, check=False)
    except FileNotFoundError:
        pytest.fail(
            f"{command[0]} is not installed; on Debian it is in prometheus (promtool) or prometheus-alertmanager"
        )
    said = done.stdout + done.stderr
    if done.returncode:
        pytest.fail(f"{' '.join(command)}\n{said}")
    return said


def expected_alerts() -> Iterator[tuple[str, list[Any]]]:
    """Yield the alert and the expected instances of every case in every test."""
    for file in SIGNAL_TESTS:
        for test in load(file)["tests"]:
            for case in test.get("alert_rule_test", []):
                yield case["alertname"], case["exp_alerts"]


@pytest.fixture(autouse=True)
def real_programs(fp: FakeProcess) -> None:
    """Let promtool and amtool run for real; only their absence and failure are faked, by the tests below."""
    fp.allow_unregistered(allow=True)


@pytest.mark.parametrize("file", FILES, ids=lambda file: file.name)
def test_promtool_finds_nothing(file: Path) -> None:
    """Every rule file is valid and `--lint=all` has no finding."""
    assert "SUCCESS" in run("promtool", "check", "rules", "--lint=all", "--lint-fatal", str(file))


@pytest.mark.timeout(400)  # two tests last for days of minutes: seconds of work, but minutes on a machine that is busy
@pytest.mark.parametrize("file", TESTS, ids=lambda file: file.name)
def test_promtool_tests_pass(file: Path) -> None:
    """What fires, fires on time with exact labels and annotations; no decoy does."""
    assert "SUCCESS" in run("promtool", "test", "rules", str(file))


def test_prometheus_example() -> None:
    """The example configuration of Prometheus is valid and finds every rule file."""
    assert f"{len(FILES)} rule files found" in run("promtool", "check", "config", str(EXAMPLES / "prometheus.yaml"))


def test_alertmanager_example() -> None:
    """The example configuration of Alertmanager is valid."""
    assert "SUCCESS" in run("amtool", "check-config", str(EXAMPLES / "alertmanager.yaml"))


@pytest.mark.parametrize("name", sorted(alerts()))
def test_alertmanager_routes(name: str) -> None:
    """Only what hurts users now wakes someone, whatever the signal; what only explains is told to nobody."""
    file = str(EXAMPLES / "alertmanager.yaml")
    own = alerts()[name]["labels"]
    labels = (f"alertname={name}", "cluster=east", "node=n1", *(f"{label}={value}" for label, value in own.items()))
    receiver = {"critical": "pager", "warning": "chat", "info": "nobody"}[own["severity"]]
    assert run("amtool", "config", "routes", "test", f"--config.file={file}", *labels).split()[0] == receiver


def test_alertmanager_keeps_nodes_apart() -> None:
    """Nothing is grouped or muted across nodes, and nothing of others is ever muted."""
    configuration = load(EXAMPLES / "alertmanager.yaml")
    assert configuration["route"]["group_by"] == ["cluster", "node", "signal"]
    for rule in configuration["inhibit_rules"]:
        assert {"cluster", "node"} <= set(rule["equal"])
        assert any("alertname" in matcher for matcher in rule["source_matchers"])
        assert any("alertname" in matcher for matcher in rule["target_matchers"])
        named = {
            name for matcher in rule["source_matchers"] + rule["target_matchers"] for name in _alert_names(matcher)
        }
        assert named <= alerts().keys()


def _alert_names(matcher: str) -> set[str]:
    """Return the alerts that a matcher names, not those that it only describes by a pattern."""
    _, _, value = matcher.replace("=~", "=").partition("=")
    return {name for name in value.strip(' "').split("|") if matcher.startswith("alertname") and name.isalpha()}


def test_missing_promtool_is_said_clearly(fp: FakeProcess) -> None:
    """Without the program the test names the package instead of showing a traceback of subprocess."""

    def absent(_process: object) -> None:
        raise FileNotFoundError(2, "No such file or directory", "promtool")

    fp.register(["promtool", fp.any()], callback=absent)
    with pytest.raises(pytest.fail.Exception, match=r"promtool is not installed; on Debian it is in prometheus"):
        run("promtool", "check", "rules", str(FILES[0]))


def test_failing_promtool_is_shown(fp: FakeProcess) -> None:
    """What promtool says of a broken rule is in the failure, from both of its streams."""
    fp.register(["promtool", fp.any()], returncode=3, stdout="Checking a.yaml\n", stderr="FAILED: duplicate rule\n")
    with pytest.raises(pytest.fail.Exception, match=r"(?s)Checking a\.yaml.*duplicate rule"):
        run("promtool", "check", "rules", "a.yaml")


def test_every_file_has_its_groups_and_its_test() -> None:
    """One file per signal, a group of what it records and one of what it alerts on (if it does), and a test file."""
    for file in FILES:
        groups = {group["name"]: group["rules"] for group in load(file)["groups"]}
        expected = {f"shoal.{file.stem}.rules": "record", f"shoal.{file.stem}": "alert"}
        assert list(groups) == [name for name in expected if name in groups]
        for name, found in groups.items():
            assert found
            assert all(expected[name] in rule for rule in found)
    assert [file.name for file in SIGNAL_TESTS] == [f"{file.stem}_test.yaml" for file in FILES]


def test_every_alert_fires_once_and_is_silent_twice() -> None:
    """Every alert is tested both ways, and no test names an alert that does not exist."""
    fires, silent = Counter[str](), Counter[str]()
    for name, expected in expected_alerts():
        (fires if expected else silent)[name] += 1
    assert (fires + silent).keys() == alerts().keys()
    assert {name for name in alerts() if fires[name] < 1 or silent[name] < 2} == set()


@pytest.mark.parametrize("name", sorted(alerts()))
def test_alert_is_complete(name: str) -> None:
    """Name, labels, annotations and durations are as the conventions want them."""
    alert = alerts()[name]
    assert re.fullmatch(r"Shoal[A-Z][A-Za-z]+", name)
    assert alert["labels"].keys() == {"severity", "signal"}
    assert alert["labels"]["severity"] in SEVERITIES
    # A value among the labels would make another alert of it whenever it changes.
    assert "{{" not in alert["labels"]["severity"] + alert["labels"]["signal"]
    assert name in {rule.get("alert") for rule in rules(RULES / f"{alert['labels']['signal']}.yaml")}
    assert alert["annotations"].keys() == ANNOTATIONS
    assert "{{" not in alert["annotations"]["summary"]
    assert "{{ $labels." in alert["annotations"]["description"]
    assert alert["annotations"]["runbook_url"] == RUNBOOK_URL.format(name)
    # The panel that names the culprit; tests/grafana knows which it is. The exporter's own alerts are about no failure.
    url, _, panel = alert["annotations"]["dashboard_url"].partition("&viewPanel=")
    assert url == DASHBOARD_URL
    assert panel.isdigit() is (alert["labels"]["signal"] != "exporter")
    assert _MINUTES.match(alert["for"])
    assert int(alert["for"][:-1]) >= 2  # two scrapes of a minute
    assert _MINUTES.match(alert["keep_firing_for"])


def test_every_runbook_has_its_alert_and_its_headings() -> None:
    """A page for every alert, an alert for every page, six headings in order on each, and something to paste."""
    pages = {page.stem: page.read_text(encoding="utf-8") for page in RUNBOOKS.iterdir()}
    assert pages.keys() == alerts().keys()
    for name, text in pages.items():
        assert text.startswith(f"# {name}\n")
        assert re.findall(r"^## (.+)$", text, re.MULTILINE) == HEADINGS
        assert re.search(r"^    \S", text.partition("## Confirm")[2].partition("## ")[0], re.MULTILINE)
        mentioned = set(re.findall(r"\bShoal[A-Z][A-Za-z]+", text))
        assert mentioned <= alerts().keys()


@pytest.mark.parametrize(("rule", "expression"), sorted(expressions().items()))
def test_every_metric_in_a_rule_exists(rule: str, expression: str) -> None:
    """Rules select what the exporter exports, what the pack records, or a named few of others, by labels these have."""
    for selector in selectors(expression):
        assert selector.name in exported().keys() | recorded().keys() | FOREIGN.keys(), rule
        assert {matcher.name for matcher in selector.matchers.matchers} <= TARGET | labels_of(selector.name), rule


@pytest.mark.parametrize(("rule", "expression"), sorted(expressions().items()))
def test_no_rule_depends_on_how_it_is_scraped(rule: str, expression: str) -> None:
    """No job or instance is written down, and a result is of exporters that have a node alone."""
    for selector in selectors(expression):
        assert not {matcher.name for matcher in selector.matchers.matchers} & IDENTITY, rule
    for selector in deciding(parsed(expression)):
        # Without a node one machine cannot be told from another; the alert that says so looks for just these.
        named = {matcher.name for matcher in selector.matchers.matchers}
        assert selector.name not in exported() or named & {"node", "exported_pod"}, rule


def deciding(expression: Any) -> Iterator[promql_parser.VectorSelector]:
    """Yield the selectors whose series a result has: of all operators but `or`, the left side's."""
    for part in walk(expression):
        if isinstance(part, promql_parser.BinaryExpr):
            yield from deciding(part.lhs)
            if str(part.op) == "or":
                yield from deciding(part.rhs)
            return
        if isinstance(part, promql_parser.VectorSelector):
            yield part


@pytest.mark.parametrize(("rule", "expression"), sorted(expressions().items()))
def test_windows_hold_four_scrapes(rule: str, expression: str) -> None:
    """A counter is looked at over four scrapes of a minute at least, so that one that is missed changes little."""
    for call in (part for part in walk(parsed(expression)) if isinstance(part, promql_parser.Call)):
        if call.func.name in ("rate", "increase", "changes"):
            assert call.args[0].range >= timedelta(minutes=4), rule
        assert call.func.name not in ("irate", "idelta"), rule


@pytest.mark.parametrize(("rule", "expression"), sorted(expressions().items()))
def test_no_ratio_of_nothing(rule: str, expression: str) -> None:
    """What is divided by is compared with a number first, so that it is neither 0 nor the noise of a handful."""
    for part in walk(parsed(expression)):
        if isinstance(part, promql_parser.BinaryExpr) and str(part.op) == "/":
            assert bounded(part.rhs), rule


def bounded(divisor: Any) -> bool:
    """Tell whether a divisor is a number, or has been compared with one, maybe when it was recorded."""
    match divisor:
        case promql_parser.NumberLiteral():
            return True
        case promql_parser.VectorSelector():
            return divisor.name in recorded() and bounded(parsed(recorded()[divisor.name]))
        case promql_parser.ParenExpr() | promql_parser.AggregateExpr():
            return bounded(divisor.expr)
        case promql_parser.BinaryExpr() if str(divisor.op) == "or":
            return bounded(divisor.lhs) and bounded(divisor.rhs)
        case promql_parser.BinaryExpr():
            return str(divisor.op) in (">", ">=") and isinstance(divisor.rhs, promql_parser.NumberLiteral)
    return False


def test_every_recorded_series_is_used_or_is_a_roll_up() -> None:
    """What nobody reads is not recorded, but for the roll-ups by pod, node and cluster that dashboards need."""
    used = {found.name for expression in expressions().values() for found in selectors(expression)}
    assert {name for name in recorded().keys() - used if not name.startswith(("pod:", "node:", "cluster:"))} == set()


@pytest.mark.parametrize("name", sorted(recorded()))
def test_recorded_name(name: str) -> None:
    """`level:metric:operations`, with no `_total` left after the operation."""
    level, metric, operations = name.split(":")
    assert re.fullmatch(r"[a-z_]+", level)
    assert metric.startswith("shoal_")
    assert not metric.endswith("_total")
    assert re.fullmatch(r"[a-z]+([0-9]+m?)?", operations)


@pytest.mark.parametrize("file", TESTS, ids=lambda file: file.name)
def test_every_series_in_a_test_exists(file: Path) -> None:
    """A misspelt metric or label in a silent case would pass for ever, so both must be ones that can be there."""
    for series in (Series.read(one) for test in load(file)["tests"] for one in test["input_series"]):
        assert series.name in exported() or series.name in FOREIGN
        assert series.labels.keys() <= labels_of(series.name) | TARGET, series.name
