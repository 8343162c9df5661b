"""The values: all documented and in the schema, and what is wrong is refused in a sentence before it is installed."""

from __future__ import annotations

import subprocess
import sys
from typing import TYPE_CHECKING, Any

import pytest
import yaml
from tests.helm.engine import CHART, CUSTOM, REPOSITORY, Refused, render, values

if TYPE_CHECKING:
    from collections.abc import Iterator


# Their parts are those of the Kubernetes API, and need not all have a default here.
KUBERNETES_OWN = {"resources", "updateStrategy", "affinity"}


def leaves(content: dict[str, Any], schema: dict[str, Any], path: str = "") -> Iterator[str]:
    """Yield the paths of the values that are not made of others, as the schema divides them."""
    for name, value in content.items():
        below = schema["properties"][name]
        if "properties" in below and isinstance(value, dict) and value:
            yield from leaves(value, below, f"{path}{name}.")
        else:
            yield path + name


def test_every_value_is_in_the_schema_and_the_other_way_round(schema: dict[str, Any]) -> None:
    """But for what is not the chart's own: `global` and `enabled` are a parent chart's."""
    defaults = values(CHART / "values.yaml")
    assert set(schema["properties"]) - set(defaults) == {"global", "enabled"}
    for name, value in defaults.items():
        known = set(schema["properties"][name].get("properties", {}))
        if name in KUBERNETES_OWN or name == "config":
            assert set(value) <= known, name
        else:
            assert set(value if known else ()) == known, name


def test_no_object_takes_what_it_does_not_know(schema: dict[str, Any]) -> None:
    """A typo is rejected at every depth at which the schema knows the names."""

    def closed(part: Any) -> Iterator[Any]:
        if isinstance(part, dict):
            if "properties" in part and part.get("type", "object") == "object" and isinstance(part["properties"], dict):
                yield part
            for below in part.values():
                yield from closed(below)
        if isinstance(part, list):
            for below in part:
                yield from closed(below)

    assert all(part["additionalProperties"] is False for part in closed(schema))


def test_readme_is_made_from_the_values() -> None:
    """`make docs` writes it; a change of a comment or default is not forgotten."""
    readme = CHART / "README.md"
    made = subprocess.run(
        [sys.executable, str(REPOSITORY / "helm" / "readme.py"), "--print"], capture_output=True, text=True, check=True
    )
    assert readme.read_text(encoding="utf-8") == made.stdout


def test_readme_has_every_value(schema: dict[str, Any]) -> None:
    """Each with a description."""
    text = (CHART / "README.md").read_text(encoding="utf-8")
    for path in leaves(values(CHART / "values.yaml"), schema):
        assert f"| `{path}` |" in text or f"| `{path.rpartition('.')[0]}` |" in text, path


@pytest.mark.parametrize(
    ("given", "sentence"),
    [
        ("teir: full", r"additional properties 'teir' not allowed"),
        ("tier: everything", r"at '/tier': value must be one of 'counters', 'attribution', 'full'"),
        ("monitor: {kind: PodMonitor, intervall: 1m}", r"at '/monitor': additional properties 'intervall' not allowed"),
        ("monitor: {interval: 30}", r"at '/monitor/interval': got number, want string"),
        ("monitor: {interval: often}", r"at '/monitor/interval': 'often' does not match pattern"),
        ("monitor: {kind: [PodMonitor, ServiceMonitor]}", r"at '/monitor/kind': value must be one of"),
        (
            "{serviceMonitor: {enabled: true}, podMonitor: {enabled: true}}",
            r"additional properties '(podMonitor|serviceMonitor)', '(podMonitor|serviceMonitor)' not allowed",
        ),
        ("collectors: {conntrak: false}", r"at '/collectors': additional properties 'conntrak' not allowed"),
        ("collectors: {memory: 'no'}", r"at '/collectors/memory': got string, want boolean"),
        ("config: {conntrack: {dump-intervall: 5}}", r"at '/config/conntrack': additional properties 'dump-intervall'"),
        ("config: {netns: {enter: true}}", r"at '/config': additional properties 'netns' not allowed"),
        ("rules: {overrides: {ShoalOOMKill: {four: 5m}}}", r"additional properties 'four' not allowed"),
        ("rules: {overrides: {ShoalOOMKill: {for: soon}}}", r"'soon' does not match pattern"),
        ("rules: {overrides: {ShoalNothing: {for: 5m}}}", r"rules\.overrides: there is no alert ShoalNothing, "),
        ("redis: {targets: ['redis://a']}", r"at '/redis/targets/0': got string, want object"),
        ("redis: {targets: [{address: 'http://a'}]}", r"at '/redis/targets/0/address': 'http://a' does not match"),
        ("redis: {targets: [{address: 'redis://u:word@a'}]}", r"at '/redis/targets/0/address'"),
        (
            "redis: {targets: [{address: 'redis://a', caSecret: {name: a, key: b}}]}",
            r"redis://a has a caSecret, which only rediss:// has a use for",
        ),
        ("image: {digest: latest}", r"at '/image/digest': 'latest' does not match pattern"),
        ("port: 70000", r"at '/port': maximum: got 70,000, want 65,535"),
        ("updateStrategy: {rollingUpdate: {maxUnavailable: 110%}}", r"'110%' does not match pattern"),
        ("commonLabels: {a: 1}", r"at '/commonLabels/a': got number, want string"),
        ("{tier: counters, config: {neighbours: {verify: true}}}", r"needs CAP_NET_RAW, which tier counters cannot"),
        ("{tier: counters, redis: {discover: true}}", r"redis\.discover needs tier attribution"),
        ("{collectors: {redis_aof: false}, redis: {discover: true}}", r"collectors\.redis_aof is off"),
        (
            "{collectors: {redis_aof: false}, redis: {targets: [{address: 'redis://a'}]}}",
            r"redis\.targets has servers and collectors\.redis_aof is off",
        ),
        ("networkPolicy: {enabled: true}", r"no effect on pods in the node's network; set hostNetwork to false"),
        ("updateStrategy: {rollingUpdate: {maxSurge: 1}}", r"with hostNetwork it must be 0"),
        ("{tier: counters, kubernetesEndpoints: true}", r"wants collectors\.conntrack, and tier attribution or full"),
        ("web: {tls: true}", r"web\.tls tells what is in web\.configSecret; name that Secret"),
        (
            "web: {tlsSecret: a, clientCertificates: true}",
            r"web\.clientCertificates is what a file in web\.configSecret",
        ),
        (
            "monitor: {basicAuth: {username: {name: a, key: b}}}",
            r"monitor\.basicAuth wants username and password, and web\.configSecret",
        ),
        ("extraManifests: ['{{ nonsense }}']", r'function "nonsense" not defined'),
    ],
)
def test_wrong_values_are_refused(given: str, sentence: str) -> None:
    """Before anything is installed, and with the name of the value."""
    with pytest.raises(Refused, match=sentence):
        render(yaml.safe_load(given))


def test_all_collectors_off_is_refused(schema: dict[str, Any]) -> None:
    """The exporter would not start."""
    off = dict.fromkeys(schema["properties"]["collectors"]["properties"], False)
    with pytest.raises(Refused, match="leave at least one on"):
        render({"collectors": off})


@pytest.mark.parametrize("api", CUSTOM)
def test_a_missing_crd_is_told(api: str) -> None:
    """Each custom resource is asked for by one value, and the cluster that lacks it is told of it by that name."""
    asked: dict[str, dict[str, Any]] = {
        "PodMonitor": {"monitor": {"kind": "PodMonitor"}},
        "ServiceMonitor": {"monitor": {"kind": "ServiceMonitor"}},
        "PrometheusRule": {"rules": {"enabled": True}},
        "GrafanaDashboard": {"dashboards": {"kind": "GrafanaDashboard"}},
        "VerticalPodAutoscaler": {"verticalPodAutoscaler": {"enabled": True}},
    }
    given = asked[api.rpartition("/")[2]]
    render(given, apis=[api])
    with pytest.raises(Refused, match=f"the cluster has no {api}: install its CRD first"):
        render(given, apis=[other for other in CUSTOM if other != api])


@pytest.mark.parametrize(
    "given",
    [
        {"global": {"anything": {"goes": True}}},
        {"enabled": True},
        {"updateStrategy": {"rollingUpdate": {"maxUnavailable": 3}}},
        {"resources": {"requests": {"cpu": 1, "memory": "1Gi"}, "limits": {"example.com/device": 1}}},
        {"revisionHistoryLimit": 0},
    ],
)
def test_right_values_are_not_refused(given: dict[str, Any]) -> None:
    """What looks odd and is right: a parent's globals, numbers beside percentages, resources of other names."""
    assert "kind: DaemonSet" in render(given)
