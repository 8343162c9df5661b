"""The rule pack: promtool and amtool run for real, and what neither of them checks is checked here.

promtool cannot tell that an alert in a test is spelled wrong (a silent case then passes for ever), that a metric is
one that nobody exports, or that a runbook does not exist.
"""

from __future__ import annotations

import re
import subprocess
from collections import Counter
from pathlib import Path
from typing import TYPE_CHECKING, Any

import promql_parser
import pytest
import yaml

from shoal.collectors import catalogue
from shoal.scrape import DURATION, SUCCESS
from shoal.server import BUILD_INFO

if TYPE_CHECKING:
    from collections.abc import Iterator

    from pytest_subprocess import FakeProcess

RULES = Path(__file__).parents[2] / "rules"
FILES = sorted(RULES.glob("*.yaml"))
TESTS = sorted((RULES / "tests").glob("*_test.yaml"))
EXAMPLES = RULES / "examples"
RUNBOOKS = RULES / "runbooks"

SEVERITIES = {"critical", "warning", "info"}
ANNOTATIONS = {"summary", "description", "impact", "runbook_url", "dashboard_url"}
HEADINGS = ["Meaning", "Impact", "Confirm", "Rule out", "Mitigate", "Prevent"]
RUNBOOK_URL = "https://github.com/shoal-exporter/shoal/blob/main/rules/runbooks/{}.md"
DASHBOARD_URL = "/d/shoal-node/shoal-node?var-cluster={{ $labels.cluster }}&var-node={{ $labels.node }}"

# What others export and the pack takes as proof that a node is there, with the labels that it looks at.
FOREIGN = {
    "up": set(),
    "node_uname_info": {"nodename", "sysname"},
    "kubelet_node_name": set(),
    "kube_node_info": {"os_image"},
    "kube_node_status_condition": {"condition", "status"},
}
# What a scrape adds to every series; `exported_` is what becomes of a label where honor_labels is off.
TARGET = {"cluster", "node", "job", "instance", "namespace", "pod", "container", "service", "endpoint", "prometheus"}
TARGET |= {"zone", "exported_namespace", "exported_pod", "exported_container"}

_SERIES = re.compile(r"(?P<name>[a-zA-Z_:][a-zA-Z0-9_:]*)\{(?P<labels>.*)\}\Z")
_LABEL = re.compile(r'([a-z_]+)="')
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


def load(file: Path) -> dict[str, Any]:
    """Return the content of a YAML file."""
    content: dict[str, Any] = yaml.safe_load(file.read_text(encoding="utf-8"))
    return content


def rules(file: Path) -> Iterator[dict[str, Any]]:
    """Yield the rules of one file, recording and alerting."""
    for group in load(file)["groups"]:
        yield from group["rules"]


def alerts() -> dict[str, dict[str, Any]]:
    """Return every alert of the pack by name."""
    return {rule["alert"]: rule for file in FILES for rule in rules(file) if "alert" in rule}


def recorded() -> dict[str, str]:
    """Return the expression of every recorded series by name."""
    return {rule["record"]: rule["expr"] for file in FILES for rule in rules(file) if "record" in rule}


def exported() -> dict[str, set[str]]:
    """Return the label names of every metric that the exporter can export, by name."""
    metrics = [*catalogue().values(), SUCCESS, DURATION, BUILD_INFO]
    series: dict[str, set[str]] = {}
    for metric in metrics:
        labels = set(metric.labels)
        if metric.type == "histogram":
            without = labels - {"le"}
            series |= {f"{metric.name}_bucket": labels, f"{metric.name}_count": without, f"{metric.name}_sum": without}
        else:
            series[metric.name] = labels
    return series


def selectors(expression: Any) -> Iterator[promql_parser.VectorSelector]:
    """Yield the series selectors of a parsed expression."""
    match expression:
        case promql_parser.VectorSelector():
            yield expression
        case promql_parser.MatrixSelector():
            yield expression.vector_selector
        case promql_parser.BinaryExpr():
            yield from selectors(expression.lhs)
            yield from selectors(expression.rhs)
        case promql_parser.Call():
            for argument in expression.args:
                yield from selectors(argument)
        case promql_parser.NumberLiteral() | promql_parser.StringLiteral():
            return
        case _:
            # Aggregations, subqueries, parentheses and signs have one expression inside.
            yield from selectors(expression.expr)


def expected_alerts() -> Iterator[tuple[str, list[Any]]]:
    """Yield the alert and the expected instances of every case in every test."""
    for file in TESTS:
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


@pytest.mark.parametrize(("severity", "receiver"), [("critical", "pager"), ("warning", "chat"), ("info", "nobody")])
def test_alertmanager_routes(severity: str, receiver: str) -> None:
    """Only what hurts users now wakes someone."""
    file = str(EXAMPLES / "alertmanager.yaml")
    labels = ("alertname=ShoalConntrackDrops", "cluster=east", "node=n1", "signal=conntrack", f"severity={severity}")
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
    """One file per signal, with a recording group and an alerting group of its name, and a test file beside."""
    for file in FILES:
        names = [group["name"] for group in load(file)["groups"]]
        assert names == [f"shoal.{file.stem}.rules", f"shoal.{file.stem}"]
    assert [file.name for file in TESTS] == [f"{file.stem}_test.yaml" for file in FILES]


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
    assert name in {rule.get("alert") for rule in rules(RULES / f"{alert['labels']['signal']}.yaml")}
    assert alert["annotations"].keys() == ANNOTATIONS
    assert "{{" not in alert["annotations"]["summary"]
    assert "{{ $labels." in alert["annotations"]["description"]
    assert alert["annotations"]["runbook_url"] == RUNBOOK_URL.format(name)
    assert alert["annotations"]["dashboard_url"] == DASHBOARD_URL
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


def test_every_metric_in_a_rule_exists() -> None:
    """Rules select what the exporter exports, what the pack records, or a named few of others, by labels these have."""
    known, own = exported(), recorded()
    expressions = [rule["expr"] for file in FILES for rule in rules(file)]
    for selector in (found for expression in expressions for found in selectors(promql_parser.parse(expression))):
        name, labels = selector.name or "", {matcher.name for matcher in selector.matchers.matchers}
        assert name in known or name in own or name in FOREIGN, name
        allowed = TARGET | known.get(name, set()) | FOREIGN.get(name, set())
        # A recorded series has labels of what it was made of, and those alone.
        for made_of in selectors(promql_parser.parse(own[name])) if name in own else ():
            allowed |= known.get(made_of.name or "", set())
        assert labels <= allowed, str(selector)


def test_every_recorded_series_is_used_or_is_a_roll_up() -> None:
    """What nobody reads is not recorded, but for the roll-ups by node and cluster that dashboards need."""
    used = {
        found.name for file in FILES for rule in rules(file) for found in selectors(promql_parser.parse(rule["expr"]))
    }
    assert {name for name in recorded().keys() - used if not name.startswith(("node:", "cluster:"))} == set()


@pytest.mark.parametrize("name", sorted(recorded()))
def test_recorded_name(name: str) -> None:
    """`level:metric:operations`, with no `_total` left after the operation."""
    level, metric, operations = name.split(":")
    assert re.fullmatch(r"[a-z_]+", level)
    assert metric.startswith("shoal_")
    assert not metric.endswith("_total")
    assert re.fullmatch(r"[a-z]+([0-9]+m)?", operations)


def test_every_series_in_a_test_exists() -> None:
    """A misspelt metric or label in a silent case would pass for ever, so both must be ones that can be there."""
    known = exported() | FOREIGN
    for file in TESTS:
        for series in (one["series"] for test in load(file)["tests"] for one in test["input_series"]):
            match = _SERIES.match(series)
            assert match, series
            assert match["name"] in known, series
            assert set(_LABEL.findall(match["labels"])) <= known[match["name"]] | TARGET, series
