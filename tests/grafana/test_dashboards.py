"""The dashboards as files: built from the program, valid, true to the rules, and with links that lead somewhere.

The rules of Grafana's dashboard-linter are here as tests, but two: that a dashboard has variables for job and instance
and that its queries select by them. Shoal tells machines apart by cluster and node, whatever the job is called.
"""

from __future__ import annotations

import json
import re
import subprocess
from collections import Counter
from typing import TYPE_CHECKING, Any, Final
from urllib.parse import parse_qsl, urlsplit

import promql_parser
import pytest
from grafana.build import HERE, built, text
from grafana.failures import FAILURES, levels
from grafana.node import evidence_panel
from grafana.reader import ALL, Dashboard, interpolate
from tests.rules.pack import FOREIGN, RULES, TARGET, alerts, exported, expressions, labels_of, recorded, selectors, walk

if TYPE_CHECKING:
    from pathlib import Path

BOARDS: Final = {file.stem: Dashboard.load(file) for file in sorted(HERE.glob("*.json"))}
PANELS: Final = [
    pytest.param(name, panel, id=f"{name}-{panel['id']}") for name, board in BOARDS.items() for panel in board.panels()
]
QUERIES: Final = [
    pytest.param(interpolate(target["expr"], board.values(), 3600), id=f"{name}-{panel['id']}-{target['refId']}")
    for name, board in BOARDS.items()
    for panel in board.panels()
    for target in panel["targets"]
]
ANNOTATIONS: Final = {
    name: interpolate(board.content["annotations"]["list"][0]["expr"], board.values(), 3600)
    for name, board in BOARDS.items()
}
# Names that Grafana knows without a variable of the dashboard.
_BUILT_IN: Final = re.compile(r"__data\.fields\.\w+|__field\.labels\.\w+|__url_time_range")
_NEEDED: Final = re.compile(r"\$\{([\w.]+)(?::(\w+))?\}")
# Grafana's names for what is shown; the linter wants one of its list.
_UNITS: Final = {"short", "percentunit", "s", "bytes", "ops"}


def links(panel: dict[str, Any]) -> list[str]:
    """Return the addresses of all links of a panel's values."""
    return [
        link["url"]
        for override in panel["fieldConfig"]["overrides"]
        for one in override["properties"]
        if one["id"] == "links"
        for link in one["value"]
    ]


def thresholds(panel: dict[str, Any]) -> set[float]:
    """Return the levels at which a panel changes its colour."""
    settings = [panel["fieldConfig"]["defaults"].get("thresholds")]
    for override in panel["fieldConfig"]["overrides"]:
        states = any(one["id"] == "mappings" and "CRITICAL" in str(one["value"]) for one in override["properties"])
        if not states:
            settings += [one["value"] for one in override["properties"] if one["id"] == "thresholds"]
    return {step["value"] for one in settings if one for step in one["steps"] if step["value"] is not None}


def labels_of_alerts() -> set[str]:
    """Return the labels that an alert can have: those of what it was made of."""
    return {
        label for alert in alerts().values() for one in selectors(alert["expr"]) for label in labels_of(str(one.name))
    }


def test_the_json_is_what_the_program_builds() -> None:
    """`make dashboards` changes nothing: nobody edited a file, or a rule's level, and left the other as it was."""
    assert {file.name: file.read_text(encoding="utf-8") for file in HERE.glob("*.json")} == {
        name: text(content) for name, content in built().items()
    }


def test_every_alert_is_of_one_failure() -> None:
    """Fourteen failures, and every alert but those of the exporter itself is in one column of the grid."""
    assert sorted(failure.number for failure in FAILURES) == list(range(1, 15))
    counted = Counter(name for failure in FAILURES for name in failure.alerts)
    assert set(counted.values()) == {1}
    assert counted.keys() == {name for name, alert in alerts().items() if alert["labels"]["signal"] != "exporter"}


def test_every_signal_that_a_failure_needs_exists() -> None:
    """A misspelt signal would leave a column of the grid empty for ever."""
    documented = (RULES.parent / "docs" / "metrics.md").read_text(encoding="utf-8")
    for failure in FAILURES:
        assert all(f"`{signal}`" in documented for signal in failure.signals)


@pytest.mark.parametrize(
    "query", [*QUERIES, *(pytest.param(one, id=f"{name}-annotation") for name, one in ANNOTATIONS.items())]
)
def test_query_names_what_exists(query: str) -> None:
    """Every query parses, and selects and groups by what the exporter exports and the rules record."""
    grouped: set[str] = set()
    own: set[str] = set()
    for part in walk(promql_parser.parse(query)):
        if isinstance(part, promql_parser.VectorSelector):
            name = str(part.name)
            assert name in exported().keys() | recorded().keys() | FOREIGN.keys()
            has = labels_of(name) | (labels_of_alerts() if name == "ALERTS" else set())
            assert {matcher.name for matcher in part.matchers.matchers} <= TARGET | has
            own |= has
        elif isinstance(part, promql_parser.AggregateExpr) and part.modifier:
            grouped |= set(part.modifier.labels)
        elif isinstance(part, promql_parser.Call) and part.func.name == "label_join":
            made, _, *of = [argument.val for argument in part.args[1:]]
            own.add(made)
            assert set(of) <= labels_of_alerts() | {"lost_signal"}
    assert grouped <= TARGET | own | {"alertname", "severity", "signal"}


def test_promtool_takes_every_query(tmp_path: Path) -> None:
    """Prometheus' own parser finds nothing wrong either."""
    rules = [{"record": f"query:number{place}", "expr": one.values[0]} for place, one in enumerate(QUERIES)]
    rules += [{"record": f"annotation:of_{place}", "expr": one} for place, one in enumerate(ANNOTATIONS.values())]
    file = tmp_path / "queries.json"
    file.write_text(json.dumps({"groups": [{"name": "queries", "rules": rules}]}), encoding="utf-8")
    done = subprocess.run(
        ["promtool", "check", "rules", "--lint=none", str(file)], capture_output=True, text=True, check=False
    )
    assert f"SUCCESS: {len(rules)} rules found" in done.stdout, done.stdout + done.stderr


@pytest.mark.parametrize("query", QUERIES)
def test_counters_are_asked_for_their_rate(query: str) -> None:
    """A counter as exported is inside a rate(), over $__rate_interval; what is recorded has its window in its name."""
    for part in walk(promql_parser.parse(query)):
        if isinstance(part, promql_parser.Call) and part.func.name in ("rate", "increase"):
            assert part.args[0].range.total_seconds() == 240
            continue
    rated = {
        str(part.args[0].vector_selector.name)
        for part in walk(promql_parser.parse(query))
        if isinstance(part, promql_parser.Call) and part.func.name in ("rate", "increase")
    }
    named = {
        str(part.name) for part in walk(promql_parser.parse(query)) if isinstance(part, promql_parser.VectorSelector)
    }
    assert {name for name in named if name.endswith(("_total", "_bucket"))} == rated


@pytest.mark.parametrize(("name", "panel"), PANELS)
def test_panel_explains_itself(name: str, panel: dict[str, Any]) -> None:
    """A title, a description that says what is normal, a unit, queries that all show, and a sentence for no data."""
    del name
    # A longer title is cut off on a screen of usual width.
    assert 0 < len(panel["title"]) <= 7.5 * panel["gridPos"]["w"]
    assert "Normal: " in panel["description"]
    overridden = [one for override in panel["fieldConfig"]["overrides"] for one in override["properties"]]
    assert {
        panel["fieldConfig"]["defaults"]["unit"],
        *(one["value"] for one in overridden if one["id"] == "unit"),
    } <= _UNITS
    assert panel["fieldConfig"]["defaults"]["noValue"]
    assert panel["targets"]
    assert not any(target.get("hide") for target in panel["targets"])
    for part in (panel, *panel["targets"]):
        assert part["datasource"] == {"type": "prometheus", "uid": "${datasource}"}


@pytest.mark.parametrize(("name", "panel"), PANELS)
def test_levels_are_those_of_the_alerts(name: str, panel: dict[str, Any]) -> None:
    """Where a panel changes colour an alert compares a series of the panel with that number (counts of nodes aside)."""
    if panel["type"] == "stat":
        return
    series = {
        str(part.name)
        for target in panel["targets"]
        for part in walk(promql_parser.parse(interpolate(target["expr"], BOARDS[name].values(), 3600)))
        if isinstance(part, promql_parser.VectorSelector)
    }
    for level in thresholds(panel) - {1e-9}:
        number = rf"(?:[>=<]=?) {level:g}\b"
        assert any(
            re.search(number, expression) and any(one in expression for one in series)
            for expression in expressions().values()
        ), level


def test_level_follows_the_rule() -> None:
    """Levels come from the rule's text: mildest first, below where the alert is, an error where there is none."""
    found = levels(
        "filesystem:shoal_filesystem_inodes_free_per_inodes:ratio", "ShoalInodesExhausted", "ShoalInodesRunningOut"
    )
    assert [(level.severity, level.value, level.below) for level in found] == [
        ("warning", 0.2, True),
        ("critical", 0.01, True),
    ]
    with pytest.raises(LookupError, match="ShoalOOMKill does not compare nothing:shoal with a number"):
        levels("nothing:shoal", "ShoalOOMKill")


@pytest.mark.parametrize("name", BOARDS)
def test_dashboard_is_complete(name: str) -> None:
    """Grafana imports it without asking: a uid, no inputs, a data source to choose, variables that follow the time."""
    content = BOARDS[name].content
    assert content["uid"] == name
    assert content["editable"] is False
    assert not content.keys() & {"__inputs", "__requires", "id"}
    datasource, *others = content["templating"]["list"]
    assert datasource["label"] == "Data source"
    assert datasource["current"]["value"] == "default"
    assert (datasource["name"], datasource["type"], datasource["query"]) == ("datasource", "datasource", "prometheus")
    for variable in others:
        if variable["type"] == "query":
            assert variable["refresh"] == 2
            assert variable["datasource"]["uid"] == "${datasource}"
    assert {"cluster"} <= BOARDS[name].variables().keys()
    (annotation,) = content["annotations"]["list"]
    assert annotation["enable"]
    assert annotation["titleFormat"] == "{{alertname}}"


@pytest.mark.parametrize("name", BOARDS)
def test_dashboard_fits_into_a_config_map(name: str) -> None:
    """And into the annotation in which `kubectl apply` keeps all of an object: 256 KiB, some of it for the rest."""
    content = json.dumps((HERE / f"{name}.json").read_text(encoding="utf-8"), ensure_ascii=False)
    assert len(content.encode()) < (256 - 16) * 1024


@pytest.mark.parametrize("name", BOARDS)
def test_variables_are_chained(name: str) -> None:
    """The choices of each list depend on all lists before it, so that a node's pods are offered and no others."""
    variables = [one for one in BOARDS[name].variables().values() if one["type"] == "query"]
    assert [one["name"] for one in variables] == [
        *("cluster", "node", "namespace", "pod", "container", "unit")[: len(variables)]
    ]
    for place, variable in enumerate(variables):
        query = variable["query"]["query"]
        for earlier in variables[:place]:
            # A unit is in no container, so choosing one must not empty the list of the other.
            if (variable["name"], earlier["name"]) != ("unit", "container"):
                assert f'{earlier["name"]}=~"${earlier["name"]}' in query


@pytest.mark.parametrize("name", BOARDS)
def test_panels_lie_side_by_side(name: str) -> None:
    """Ids are unique, nothing overlaps, nothing is wider than the page."""
    panels = BOARDS[name].content["panels"]
    ids = [panel["id"] for panel in BOARDS[name].panels()]
    assert len(set(ids)) == len(ids)
    taken: set[tuple[int, int]] = set()
    for panel in panels:
        where = panel["gridPos"]
        cells = {(where["x"] + x, where["y"] + y) for x in range(where["w"]) for y in range(where["h"])}
        assert where["x"] + where["w"] <= 24
        assert not taken & cells, panel["title"]
        taken |= cells


@pytest.mark.parametrize(("name", "panel"), PANELS)
def test_links_lead_somewhere(name: str, panel: dict[str, Any]) -> None:
    """A link names a dashboard that exists, variables and a panel that it has, keeps the time, fills in what it has."""
    for address in links(panel):
        for reference, how in _NEEDED.findall(address):
            assert _BUILT_IN.fullmatch(reference) or reference in BOARDS[name].variables(), reference
            assert reference == "__url_time_range" or how in ("percentencode", "queryparam")
        if address.startswith("https:"):
            continue
        parts = urlsplit(_NEEDED.sub(lambda match: f"var-{match[1]}=x" if match[2] == "queryparam" else "x", address))
        target = BOARDS[parts.path.split("/")[2]]
        assert parts.path == f"/d/{target.content['uid']}/{target.content['uid']}"
        query = dict(parse_qsl(parts.query, keep_blank_values=True))
        passed = {key.removeprefix("var-") for key in query if key.startswith("var-")}
        assert {"datasource", "cluster", "node"} <= passed <= target.variables().keys()
        assert "${__url_time_range}" in address
        if "viewPanel" in query:
            assert int(query["viewPanel"]) in {one["id"] for one in target.panels()}


@pytest.mark.parametrize("name", sorted(alerts()))
def test_alert_lands_on_a_dashboard(name: str) -> None:
    """Every alert's dashboard_url is of a dashboard that is here, and opens the panel of its failure."""
    parts = urlsplit(alerts()[name]["annotations"]["dashboard_url"])
    target = BOARDS[parts.path.split("/")[2]]
    query = dict(parse_qsl(parts.query))
    panels = [evidence_panel(failure) for failure in FAILURES if name in failure.alerts]
    assert [int(query.pop("viewPanel"))] == panels if panels else "viewPanel" not in query
    assert set(panels) <= {one["id"] for one in target.panels()}
    passed = {key.removeprefix("var-") for key in query}
    assert passed == {"cluster", "node"}
    assert passed <= target.variables().keys()


def test_runbooks_that_are_linked_exist() -> None:
    """The link is made of the alert's name, as the alert's own is."""
    (address,) = {
        link for name in BOARDS for panel in BOARDS[name].panels() for link in links(panel) if link[:6] == "https:"
    }
    for name, alert in alerts().items():
        assert address.replace("${__data.fields.alertname:percentencode}", name) == alert["annotations"]["runbook_url"]
        assert (RULES / "runbooks" / f"{name}.md").exists()


def test_the_colours_can_be_told_apart() -> None:
    """No red beside green: every colour that is set is of a palette made for that."""
    allowed = {"#0072B2", "#E69F00", "#D55E00", "#56B4E9", "#009E73", "#CC79A7", "#F0E442", "#999999"}
    allowed |= {"#332288", "#882255"}  # Tol's, for the two thinnest parts of memory
    for name in BOARDS:
        assert set(re.findall(r"#[0-9A-Fa-f]{6}", json.dumps(BOARDS[name].content))) <= allowed
        assert not re.findall(r'"(?:red|green|yellow|orange)"', json.dumps(BOARDS[name].content))


def test_a_name_is_escaped_where_grafana_escapes_it() -> None:
    """What goes into a regular expression has its special characters escaped once for it and once for the string."""
    board = Dashboard(BOARDS["shoal-workload"].content, {"unit": r"a\x2db.service", "pod": "queue-0"})
    query = interpolate('x{unit=~"$unit",pod=~"${pod}"}', board.values(), 60)
    (selector,) = walk(promql_parser.parse(query))
    (pattern, _) = (matcher.value for matcher in selector.matchers.matchers)
    assert re.fullmatch(pattern, r"a\x2db.service")


@pytest.mark.parametrize("label", ["namespace", "pod", "container", "unit"])
def test_a_choice_takes_itself_all_or_everything(label: str) -> None:
    """A name takes that name and no longer one that begins with it; All and an empty choice take everything."""
    for chosen, taken, left in (("queue-1", "queue-1", "queue-10"), ("", "any", None), (ALL, "any", None)):
        values = Dashboard(BOARDS["shoal-workload"].content, {label: chosen}).values()
        target = next(one for one in BOARDS["shoal-workload"].panels() if one["title"] == "CPU in use")["targets"][0]
        (selector,) = walk(promql_parser.parse(interpolate(target["expr"], values, 60)))
        (pattern,) = (one.value for one in selector.matchers.matchers if one.name == label)
        assert re.fullmatch(pattern, taken)
        assert left is None or not re.fullmatch(pattern, left)
