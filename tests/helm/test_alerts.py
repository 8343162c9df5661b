"""The PrometheusRule objects: in them is what rules/ has and promtool tests, and overrides change what they name.

promtool is given the content of the objects, taken out again, with the repository's own tests beside it.
"""

from __future__ import annotations

import os
import shutil
import subprocess
from concurrent.futures import ThreadPoolExecutor
from typing import TYPE_CHECKING, Any

import pytest
import yaml
from tests.helm.engine import REPOSITORY, Refused, objects

if TYPE_CHECKING:
    from collections.abc import Iterator
    from concurrent.futures import Future
    from pathlib import Path

RULES = REPOSITORY / "rules"
FILES = sorted(RULES.glob("*.yaml"))
OWN = {"app.kubernetes.io/name": "shoal"}


def installed(rules: dict[str, Any] | None = None) -> dict[str, dict[str, Any]]:
    """Return the content of the PrometheusRule objects, {name of the file that it came from: content}."""
    made = objects({"rules": {"enabled": True, **(rules or {})}})
    stems = {f"shoal-{file.stem.replace('_', '-')}": file.name for file in FILES}
    return {stems[each["metadata"]["name"]]: each["spec"] for each in made if each["kind"] == "PrometheusRule"}


def alerts(content: dict[str, dict[str, Any]]) -> dict[str, dict[str, Any]]:
    """Return the alerts in these contents by name."""
    rules = [rule for spec in content.values() for group in spec["groups"] for rule in group["rules"]]
    return {rule["alert"]: rule for rule in rules if "alert" in rule}


def write(content: dict[str, dict[str, Any]], directory: Path) -> Path:
    """Write the contents as the rule files that they were, with the repository's tests where those expect them."""
    for name, spec in content.items():
        (directory / name).write_text(yaml.safe_dump(spec), encoding="utf-8")
    return shutil.copytree(RULES / "tests", directory / "tests")


def promtool(*arguments: str) -> tuple[int, str]:
    """Run promtool and return its status and all that it said."""
    done = subprocess.run(["promtool", *arguments], capture_output=True, text=True, check=False)
    return done.returncode, done.stdout + done.stderr


@pytest.fixture(scope="module")
def verdicts(tmp_path_factory: pytest.TempPathFactory) -> Iterator[dict[Path, Future[tuple[int, str]]]]:
    """Give what is installed by default to promtool, as many files at once as there are CPUs: some take seconds."""
    tests = write(installed(), tmp_path_factory.mktemp("rules"))
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        yield {file: pool.submit(promtool, "test", "rules", str(tests / f"{file.stem}_test.yaml")) for file in FILES}


@pytest.fixture
def some() -> dict[str, Any]:
    """Return any alert of the pack."""
    return next(iter(alerts(installed()).values()))


def test_every_rule_file_is_installed_as_it_is() -> None:
    """Whatever is in rules/, byte for byte in every expression and template, braces and all."""
    assert installed() == {file.name: yaml.safe_load(file.read_text(encoding="utf-8")) for file in FILES}
    assert "{{ $labels.node }}" in str(installed())


@pytest.mark.timeout(400)  # tests/rules/test_rules.py says why
@pytest.mark.parametrize("file", FILES, ids=lambda file: file.name)
def test_promtool_tests_pass_on_what_is_installed(file: Path, verdicts: dict[Path, Future[tuple[int, str]]]) -> None:
    """The same tests as those of the files."""
    status, said = verdicts[file].result()
    assert status == 0, said


def test_promtool_accepts_overrides(tmp_path: Path) -> None:
    """Every kind of override, on every alert of the pack at once."""
    override = {
        "for": "45m",
        "keep_firing_for": "7m",
        "severity": "page",
        "expr": "vector(1) > 2",
        "labels": {"team": "a"},
        "annotations": {"summary": "Changed for {{ $labels.node }}.", "extra": "b"},
    }
    names = alerts(installed())
    content = installed(
        {
            "overrides": dict.fromkeys(names, override),
            "alertLabels": {"tenant": "c"},
            "runbookUrl": "https://wiki.example/shoal/",
            "grafanaUrl": "https://grafana.example/",
        }
    )
    write(content, tmp_path)
    status, said = promtool("check", "rules", *map(str, sorted(tmp_path.glob("*.yaml"))))
    assert status == 0, said
    changed = alerts(content)
    assert changed.keys() == names.keys()
    for name, alert in changed.items():
        before = names[name]
        assert alert["for"] == "45m"
        assert alert["keep_firing_for"] == "7m"
        assert alert["expr"] == "vector(1) > 2"
        assert alert["labels"] == {"tenant": "c", "signal": before["labels"]["signal"], "severity": "page", "team": "a"}
        assert alert["annotations"] == before["annotations"] | {
            "summary": "Changed for {{ $labels.node }}.",
            "extra": "b",
            "runbook_url": f"https://wiki.example/shoal/{name}.md",
            "dashboard_url": f"https://grafana.example{before['annotations']['dashboard_url']}",
        }


def test_an_override_changes_when_an_alert_fires(tmp_path: Path) -> None:
    """The tests that pass with the defaults fail with a `for` that is longer: promtool looks at what is installed."""
    tests = write(installed({"overrides": {"ShoalListenQueueOverflow": {"for": "12h"}}}), tmp_path)
    status, said = promtool("test", "rules", str(tests / "listen_queue_test.yaml"))
    assert status == 1
    assert "alertname: ShoalListenQueueOverflow" in said


def test_an_override_changes_nothing_else(some: dict[str, Any]) -> None:
    """Only the alert that it names, and of that only what it names."""
    before, after = installed(), installed({"overrides": {some["alert"]: {"for": "9h"}}})
    assert alerts(after)[some["alert"]] == some | {"for": "9h"}
    for spec in (*before.values(), *after.values()):
        for group in spec["groups"]:
            group["rules"] = [rule for rule in group["rules"] if rule.get("alert") != some["alert"]]
    assert before == after


def test_an_override_for_one_severity_wins(some: dict[str, Any]) -> None:
    """What is said of a name and severity is more than what is said of the name, and of another severity is unknown."""
    name, severity = some["alert"], some["labels"]["severity"]
    overrides = {name: {"for": "1h", "keep_firing_for": "2h"}, f"{name}/{severity}": {"for": "3h", "severity": "none"}}
    changed = alerts(installed({"overrides": overrides}))[name]
    assert (changed["for"], changed["keep_firing_for"], changed["labels"]["severity"]) == ("3h", "2h", "none")
    with pytest.raises(Refused, match=f"there is no alert {name}/none"):
        installed({"overrides": {f"{name}/none": {"disabled": True}}})


def test_a_disabled_alert_is_gone(some: dict[str, Any]) -> None:
    """Alone; what it is made of is recorded all the same."""
    overrides = {some["alert"]: {"disabled": True}}
    assert alerts(installed({"overrides": overrides})).keys() == alerts(installed()).keys() - {some["alert"]}
    everything = installed({"overrides": {name: {"disabled": True} for name in alerts(installed())}})
    assert [group["name"] for spec in everything.values() for group in spec["groups"]] == [
        f"shoal.{file.stem}.rules" for file in FILES
    ]


def test_unknown_alert_is_refused_though_rules_are_off() -> None:
    """The sentence names what was given and what there is."""
    with pytest.raises(Refused, match=r"rules\.overrides: there is no alert ShoalOOMKil\b.*ShoalOOMKill, "):
        objects({"rules": {"overrides": {"ShoalOOMKil": {"disabled": True}}}})


def test_objects_are_where_prometheus_looks() -> None:
    """In the namespace and with the labels that it is told to select."""
    made = objects({"rules": {"enabled": True, "namespace": "monitoring-rules", "labels": {"release": "stack"}}})
    found = [each["metadata"] for each in made if each["kind"] == "PrometheusRule"]
    assert len(found) == len(FILES)
    for metadata in found:
        assert metadata["namespace"] == "monitoring-rules"
        assert metadata["labels"].items() >= {"release": "stack", **OWN}.items()


def test_rules_are_off_by_default() -> None:
    """They need the operator's CRD, and an installation without it is to succeed."""
    assert not [each for each in objects(apis=()) if each["kind"] == "PrometheusRule"]
