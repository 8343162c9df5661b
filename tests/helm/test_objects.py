"""What the chart installs: objects that Kubernetes takes, privileges by tier, a DaemonSet that upgrades in place."""

from __future__ import annotations

import json
import re
import ssl
import subprocess
import sys
import urllib.request
from contextlib import contextmanager
from functools import cache
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from threading import Thread
from typing import TYPE_CHECKING, Any

import bcrypt
import kubernetes_validate  # type: ignore[import-untyped]
import pytest
from tests.bench.target import running
from tests.helm.engine import CUSTOM, KUBERNETES, VALUES, lint, notes, objects, values

from shoal import cli
from shoal.collectors import available_names
from shoal.settings import OPTIONS

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

    from shoal.settings import Settings

each_file = pytest.mark.parametrize("file", VALUES, ids=lambda file: file.name.removesuffix("-values.yaml"))


def one(kind: str, given: dict[str, Any] | None = None, **options: Any) -> dict[str, Any]:
    """Return the only object of this kind."""
    found = [made for made in objects(given, **options) if made["kind"] == kind]
    assert len(found) == 1, f"{len(found)} objects of kind {kind}"
    return found[0]


def pod(given: dict[str, Any] | None = None) -> dict[str, Any]:
    """Return the pod of the DaemonSet."""
    spec: dict[str, Any] = one("DaemonSet", given)["spec"]["template"]["spec"]
    return spec


def exporter(given: dict[str, Any] | None = None) -> dict[str, Any]:
    """Return its container with the exporter."""
    container: dict[str, Any] = next(each for each in pod(given)["containers"] if each["name"] == "shoal")
    return container


@cache
def validate(made: str, kubernetes: str) -> None:
    """Check an object against the schema of its kind. Most are the same for most values, and each check takes long."""
    assert kubernetes_validate.validate(json.loads(made), kubernetes, strict=True) == kubernetes


@each_file
def test_lint_finds_nothing(file: Path) -> None:
    """`helm lint --strict` has no finding, for any way to install."""
    assert lint(values(file)) == []


@pytest.mark.parametrize("kubernetes", KUBERNETES)
@each_file
def test_kubernetes_takes_every_object(file: Path, kubernetes: str) -> None:
    """Strictly: a field that the API does not know, which a cluster would silently drop, is an error."""
    for made in objects(values(file), kubernetes=kubernetes):
        if f"{made['apiVersion']}/{made['kind']}" in CUSTOM:
            continue
        validate(json.dumps(made, sort_keys=True), kubernetes)
        assert ("namespace" in made["metadata"]) is not made["kind"].startswith("ClusterRole")


def understood(made: dict[str, Any]) -> dict[str, Any]:
    """Return what the operator's own types make of an object; they pass over a field that they do not know."""
    # Imported here, as it takes seconds.
    from cloudcoil.models.prometheus_operator import v1  # noqa: PLC0415

    model = getattr(v1, made["kind"]).model_validate(made)
    found: dict[str, Any] = model.model_dump(mode="json", by_alias=True, exclude_unset=True)
    return found


@each_file
def test_the_prometheus_operator_takes_its_objects(file: Path) -> None:
    """Nothing of a monitor or a rule is lost on the way through the types of prometheus-operator."""
    own = [made for made in objects(values(file)) if made["apiVersion"].startswith("monitoring.coreos.com/")]
    assert [understood(made) for made in own] == own


def test_the_prometheus_operator_drops_what_is_misspelt() -> None:
    """What the test above rests on: a field of another name does not come back."""
    monitor = one("PodMonitor", {"monitor": {"kind": "PodMonitor"}})
    monitor["spec"]["podMetricsEndpoints"][0]["honourLabels"] = True
    assert understood(monitor) != monitor


@each_file
def test_objects_are_told_apart_and_labelled(file: Path) -> None:
    """No two have one name, every one but the user's own says whose it is, and text in YAML has come out as text."""
    made = objects(values(file))
    assert len({(each["kind"], each["metadata"].get("namespace"), each["metadata"]["name"]) for each in made}) == len(
        made
    )
    own = [each for each in made if each["metadata"]["name"] not in ("critical-pods", "shoal-note")]
    for each in own:
        labels = each["metadata"]["labels"]
        assert labels["app.kubernetes.io/instance"] == "shoal"
        assert labels["app.kubernetes.io/managed-by"] == "Helm"
        texts = (*labels.values(), *each["metadata"].get("annotations", {}).values())
        assert all(isinstance(text, str) for text in texts)


def test_upgrades_keep_the_daemonset() -> None:
    """From any values file to any other the DaemonSet keeps its name and what is immutable: nothing is recreated."""
    sets = {file.name: one("DaemonSet", values(file)) for file in VALUES}
    for made in sets.values():
        assert made["metadata"]["name"] == "shoal"
        assert made["spec"]["selector"] == {
            "matchLabels": {"app.kubernetes.io/name": "shoal", "app.kubernetes.io/instance": "shoal"}
        }
        assert made["spec"]["selector"]["matchLabels"].items() <= made["spec"]["template"]["metadata"]["labels"].items()
    assert {name for name, made in sets.items() if made["metadata"]["namespace"] != "monitoring"} == {
        "policies-values.yaml"
    }


def test_labels_cannot_break_the_selector() -> None:
    """Not even labels that bear the names of those that select."""
    clash = {"app.kubernetes.io/name": "other", "app.kubernetes.io/instance": "other"}
    made = one("DaemonSet", {"commonLabels": clash, "podLabels": clash})
    assert made["spec"]["template"]["metadata"]["labels"] == made["spec"]["selector"]["matchLabels"]
    assert made["spec"]["selector"] == one("DaemonSet")["spec"]["selector"]


def test_a_new_version_restarts_nothing_by_itself() -> None:
    """Versions are no part of the pods' labels: only a new image restarts the pods."""
    assert one("DaemonSet")["spec"]["template"]["metadata"]["labels"].keys() == {
        "app.kubernetes.io/name",
        "app.kubernetes.io/instance",
    }


@pytest.mark.parametrize(
    ("tier", "user", "capabilities"),
    [
        ("counters", 65534, []),
        ("attribution", 0, ["NET_ADMIN", "SYS_PTRACE"]),
        ("full", 0, ["NET_ADMIN", "SYS_PTRACE", "SYS_ADMIN"]),
    ],
)
def test_tier(tier: str, user: int, capabilities: list[str]) -> None:
    """Each tier has exactly the privileges under which tests/e2e/test_tiers.py runs the exporter."""
    container, of_pod = exporter({"tier": tier}), pod({"tier": tier})
    security = container["securityContext"]
    assert security["runAsUser"] == user
    assert security.get("runAsNonRoot", False) is (user != 0)
    assert security["capabilities"]["drop"] == ["ALL"]
    assert security["capabilities"].get("add", []) == capabilities
    assert "privileged" not in security
    assert security["readOnlyRootFilesystem"] is True
    assert security["allowPrivilegeEscalation"] is False
    assert security.get("appArmorProfile") == ({"type": "Unconfined"} if user == 0 else None)
    assert of_pod["securityContext"]["seccompProfile"] == {"type": "RuntimeDefault"}
    assert of_pod["hostPID"] is True
    assert ("--netns.enter=true" in container["args"]) is (tier == "full")


def test_the_own_seccomp_profile_is_a_choice() -> None:
    """As values.yaml says it: for the exporter's container, beside what its tier gives it."""
    own = {"type": "Localhost", "localhostProfile": "shoal/shoal.json"}
    given = {"securityContext": {"seccompProfile": own}}
    made = one("DaemonSet", given)
    validate(json.dumps(made, sort_keys=True), KUBERNETES[-1])
    assert exporter(given)["securityContext"] == exporter()["securityContext"] | {"seccompProfile": own}


def test_the_default_tier_is_attribution() -> None:
    """The least that gives all fourteen failures at node level."""
    assert exporter() == exporter({"tier": "attribution"})


def test_asking_for_mac_addresses_takes_one_capability_more() -> None:
    """CAP_NET_RAW is there when it is needed, and only then."""
    asking = exporter({"config": {"neighbours": {"verify": True}}})
    assert asking["securityContext"]["capabilities"]["add"] == ["NET_ADMIN", "SYS_PTRACE", "NET_RAW"]


@pytest.mark.parametrize("tier", ["counters", "attribution", "full"])
def test_mounts_are_read_only(tier: str) -> None:
    """All of them, proc and sys down to what is mounted in them: else root could write to the node's cgroups."""
    mounts = {mount["mountPath"]: mount for mount in exporter({"tier": tier})["volumeMounts"]}
    assert mounts.keys() == {"/host", "/host/proc", "/host/sys"}
    assert all(mount["readOnly"] for mount in mounts.values())
    assert mounts["/host"]["mountPropagation"] == "HostToContainer"
    assert mounts["/host/proc"]["recursiveReadOnly"] == mounts["/host/sys"]["recursiveReadOnly"] == "IfPossible"


def test_no_token_and_no_permission() -> None:
    """Neither the account nor the pods have a token, and there are no roles."""
    made = objects()
    assert next(each for each in made if each["kind"] == "ServiceAccount")["automountServiceAccountToken"] is False
    assert pod()["automountServiceAccountToken"] is False
    assert not [each for each in made if "Role" in each["kind"]]


def test_endpointslices_take_a_token_and_one_permission() -> None:
    """Asked for, the pods' account may read EndpointSlices of all namespaces, and nothing else."""
    given = {"kubernetesEndpoints": True, "serviceAccount": {"name": "agent"}}
    role, binding = one("ClusterRole", given), one("ClusterRoleBinding", given)
    assert role["rules"] == [
        {"apiGroups": ["discovery.k8s.io"], "resources": ["endpointslices"], "verbs": ["get", "list", "watch"]}
    ]
    assert binding["roleRef"]["name"] == role["metadata"]["name"] == "monitoring-shoal"
    assert binding["subjects"] == [{"kind": "ServiceAccount", "name": "agent", "namespace": "monitoring"}]
    assert pod(given)["serviceAccountName"] == "agent"
    assert pod(given)["automountServiceAccountToken"] is True
    assert "--kubernetes.endpoints=true" in exporter(given)["args"]


@pytest.mark.parametrize(
    ("web", "scheme", "sources"),
    [
        ({}, "HTTP", []),
        ({"configSecret": "a"}, "HTTP", [{"secret": {"name": "a"}}]),
        ({"configSecret": "a", "tls": True}, "HTTPS", [{"secret": {"name": "a"}}]),
        ({"configSecret": "a", "tlsSecret": "b"}, "HTTPS", [{"secret": {"name": "a"}}, {"secret": {"name": "b"}}]),
        ({"tlsSecret": "b"}, "HTTPS", [{"configMap": {"name": "shoal-web"}}, {"secret": {"name": "b"}}]),
    ],
)
def test_web_configuration(web: dict[str, Any], scheme: str, sources: list[Any]) -> None:
    """The file and what it names are in one directory; probes, Prometheus and `helm test` speak as it does."""
    given = {"web": web, "monitor": {"kind": "PodMonitor"}}
    container, volumes = exporter(given), {volume["name"]: volume for volume in pod(given)["volumes"]}
    assert ("--web.config.file=/etc/shoal/web/web-config.yaml" in container["args"]) is bool(sources)
    if sources:
        assert volumes["web"]["projected"]["sources"] == sources
        assert {mount["name"]: mount["mountPath"] for mount in container["volumeMounts"]}["web"] == "/etc/shoal/web"
    assert container["livenessProbe"]["httpGet"]["scheme"] == container["readinessProbe"]["httpGet"]["scheme"] == scheme
    endpoint = one("PodMonitor", given)["spec"]["podMetricsEndpoints"][0]
    assert endpoint.get("scheme", "http").upper() == scheme
    url = {entry["name"]: entry.get("value") for entry in one("Pod", given)["spec"]["containers"][0]["env"]}["URL"]
    assert url == f"{scheme.lower()}://shoal.monitoring.svc:7462/metrics"


def test_probes_without_a_certificate() -> None:
    """A kubelet has none to show, so it only opens a connection where every client is asked for one."""
    container = exporter({"web": {"configSecret": "a", "tls": True, "clientCertificates": True}})
    for probe in (container["livenessProbe"], container["readinessProbe"]):
        assert probe["tcpSocket"] == {"port": "metrics"}
        assert "httpGet" not in probe


@each_file
def test_the_exporter_takes_its_arguments(file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The command itself accepts them, and is to listen on the address of the pod or the node, never on all."""
    container = exporter(values(file))
    assert {"NODE_IP", "POD_IP"} <= {entry["name"] for entry in container["env"]}
    arguments = [
        argument.replace("$(NODE_IP)", "192.0.2.9").replace("$(POD_IP)", "2001:db8::9").replace("=/host", "=/")
        for argument in container["args"]
    ]
    given: list[Settings] = []

    def run(settings: Settings) -> int:
        given.append(settings)
        return 0

    monkeypatch.setattr(cli, "configure", lambda *_: None)
    monkeypatch.setattr(cli, "_run", run)
    assert cli.main(arguments) == 0
    (settings,) = given
    assert settings.listen == ("192.0.2.9" if values(file).get("hostNetwork", True) else "2001:db8::9", 7462)


def test_options_reach_the_exporter() -> None:
    """Numbers stay whole, lists are joined, collectors are switched off, passwords come from mounted Secrets."""
    given = values(next(file for file in VALUES if file.name == "full-values.yaml"))
    given["collectors"] = {"memory": False}
    made = exporter(given)
    for argument in (
        "--conntrack.dump-entries=1000000",
        "--neighbours.watch=192.0.2.1,2001:db8::1",
        "--no-collector.memory",
        "--redis.discover=true",
        "--redis.target=redis://$(NODE_IP):6379",
        (
            "--redis.target=rediss://monitor@cache.example:6380?password_file=/etc/shoal/redis/redis-monitor/password"
            "&ssl_ca_certs=/etc/shoal/redis/redis-ca/ca.crt"
        ),
    ):
        assert argument in made["args"]
    secrets = {volume["name"]: volume["secret"] for volume in pod(given)["volumes"] if "secret" in volume}
    mounted = {mount["mountPath"]: secrets[mount["name"]]["secretName"] for mount in made["volumeMounts"][3:]}
    assert mounted == {"/etc/shoal/redis/redis-monitor": "redis-monitor", "/etc/shoal/redis/redis-ca": "redis-ca"}
    # User 65534 reads them too.
    assert {secret["defaultMode"] for secret in secrets.values()} == {0o444}


def test_every_option_of_the_exporter_is_there(schema: dict[str, Any]) -> None:
    """Each is a value, or follows from one; a new option or collector is not forgotten here."""
    sections = schema["properties"]["config"]["properties"]
    config = {f"{section}.{option}" for section, below in sections.items() for option in below["properties"]}
    set_by_the_chart = {
        *("config.file", "web.listen-address", "path.procfs", "path.sysfs", "path.rootfs", "netns.enter"),
        *("redis.target", "redis.password-file", "redis.discover", "web.config.file", "kubernetes.endpoints"),
    }
    options = {option.key for option in OPTIONS if not option.key.startswith("collector.")}
    assert config | set_by_the_chart == options
    assert not config & set_by_the_chart
    assert sorted(schema["properties"]["collectors"]["properties"]) == sorted(available_names())


def test_probes_need_no_password_and_are_patient() -> None:
    """They ask the paths that are never behind a password, and a node short of CPU keeps its witness for minutes."""
    container = exporter({"livenessProbe": {"periodSeconds": 20}})
    liveness, readiness = container["livenessProbe"], container["readinessProbe"]
    assert liveness["httpGet"] == {"path": "/-/healthy", "port": "metrics", "scheme": "HTTP"}
    assert readiness["httpGet"] == {"path": "/-/ready", "port": "metrics", "scheme": "HTTP"}
    assert liveness["periodSeconds"] * liveness["failureThreshold"] == 120
    assert liveness["timeoutSeconds"] == 10


def test_every_node_with_any_taint_but_no_virtual_one() -> None:
    """All taints are tolerated, NoExecute too, and nodes without a kernel of their own are left out."""
    made = pod()
    assert made["tolerations"] == [{"operator": "Exists"}]
    assert made["nodeSelector"] == {"kubernetes.io/os": "linux"}
    assert made["priorityClassName"] == "system-node-critical"
    (term,) = made["affinity"]["nodeAffinity"]["requiredDuringSchedulingIgnoredDuringExecution"]["nodeSelectorTerms"]
    assert {expression["key"]: expression["values"] for expression in term["matchExpressions"]} == {
        "type": ["virtual-kubelet"],
        "eks.amazonaws.com/compute-type": ["fargate"],
    }


def test_affinity_is_merged_with_the_users() -> None:
    """Terms are alternatives, so each of the user's has to keep off virtual nodes; the rest of it stays."""
    given = values(next(file for file in VALUES if file.name == "policies-values.yaml"))
    asked = given["affinity"]["nodeAffinity"]
    made = pod(given)["affinity"]["nodeAffinity"]
    preferred = "preferredDuringSchedulingIgnoredDuringExecution"
    assert made[preferred] == asked[preferred]
    required = "requiredDuringSchedulingIgnoredDuringExecution"
    terms = made[required]["nodeSelectorTerms"]
    assert len(terms) == 2
    for term, users in zip(terms, asked[required]["nodeSelectorTerms"], strict=True):
        keys = [expression["key"] for expression in term["matchExpressions"]]
        assert keys[-2:] == ["type", "eks.amazonaws.com/compute-type"]
        assert term["matchExpressions"][:-2] == users.get("matchExpressions", [])
        assert term.get("matchFields") == users.get("matchFields")


@pytest.mark.parametrize(
    ("given", "image"),
    [
        ({}, "shoal-exporter/shoal:0.1.0"),
        ({"image": {"tag": "1.2"}}, "shoal-exporter/shoal:1.2"),
        ({"image": {"registry": "a.example"}}, "a.example/shoal-exporter/shoal:0.1.0"),
        (
            {"image": {"registry": "a.example"}, "global": {"imageRegistry": "b.example"}},
            "b.example/shoal-exporter/shoal:0.1.0",
        ),
        ({"image": {"tag": "1.2", "digest": f"sha256:{64 * 'a'}"}}, f"shoal-exporter/shoal@sha256:{64 * 'a'}"),
    ],
)
def test_image(given: dict[str, Any], image: str) -> None:
    """The digest wins over the tag, the global registry over the chart's; `helm test` uses the same image."""
    assert exporter(given)["image"] == image
    assert one("Pod", given)["spec"]["containers"][0]["image"] == image


def test_pull_secrets_are_joined() -> None:
    """Global ones may be names or objects, and one that is given twice is there once."""
    given = {
        "global": {"imagePullSecrets": ["a", {"name": "b"}]},
        "image": {"pullSecrets": ["b", "c"]},
    }
    expected = [{"name": "a"}, {"name": "b"}, {"name": "c"}]
    assert pod(given)["imagePullSecrets"] == expected
    assert one("Pod", given)["spec"]["imagePullSecrets"] == expected


@pytest.mark.parametrize(
    ("kind", "endpoints"), [("PodMonitor", "podMetricsEndpoints"), ("ServiceMonitor", "endpoints")]
)
def test_monitor(kind: str, endpoints: str) -> None:
    """One kind, which selects the chart's own pods or Service and scrapes a port that is there."""
    given = {"monitor": {"kind": kind, "scrapeTimeout": "10s", "relabelings": [{"targetLabel": "cluster"}]}}
    made = objects(given)
    (monitor,) = (each for each in made if each["kind"].endswith("Monitor"))
    assert monitor["kind"] == kind
    (endpoint,) = monitor["spec"][endpoints]
    assert endpoint["honorLabels"] is True
    assert endpoint["interval"] == "30s"
    assert endpoint["scrapeTimeout"] == "10s"
    service = next(each for each in made if each["kind"] == "Service")
    daemonset = next(each for each in made if each["kind"] == "DaemonSet")
    wanted = monitor["spec"]["selector"]["matchLabels"].items()
    assert wanted <= service["metadata"]["labels"].items()
    assert wanted <= daemonset["spec"]["template"]["metadata"]["labels"].items()
    assert service["spec"]["selector"] == daemonset["spec"]["selector"]["matchLabels"]
    assert service["spec"]["clusterIP"] == "None"
    (port,) = daemonset["spec"]["template"]["spec"]["containers"][0]["ports"]
    assert endpoint["port"] == port["name"] == service["spec"]["ports"][0]["name"]
    assert endpoint["relabelings"][-1] == {"targetLabel": "cluster"}


def test_relabelings_leave_what_the_rules_need() -> None:
    """A target gets `node` and `instance` from its node, and loses what a new exporter pod would change."""
    steps = one("PodMonitor", {"monitor": {"kind": "PodMonitor"}})["spec"]["podMetricsEndpoints"][0]["relabelings"]
    # What the operator has set by then.
    labels = {"namespace": "monitoring", "pod": "shoal-x2x4z", "container": "shoal", "endpoint": "metrics"}
    labels |= {"service": "shoal", "job": "monitoring/shoal", "instance": "192.0.2.9:7462"}
    for step in steps:
        if step["action"] == "replace":
            assert step["sourceLabels"] == ["__meta_kubernetes_pod_node_name"]
            labels[step["targetLabel"]] = "node-1"
        else:
            assert step["action"] == "labeldrop"
            labels = {name: text for name, text in labels.items() if not re.fullmatch(step["regex"], name)}
    assert labels == {"job": "monitoring/shoal", "instance": "node-1", "node": "node-1"}


def test_network_policy_allows_the_port_alone() -> None:
    """Those who may connect, and `helm test`, reach the port of the metrics and nothing else."""
    given = values(next(file for file in VALUES if file.name == "pod-network-values.yaml"))
    policy, test = one("NetworkPolicy", given)["spec"], one("Pod", given)
    (rule,) = policy["ingress"]
    assert policy["policyTypes"] == ["Ingress"]
    assert rule["ports"] == [{"port": "metrics", "protocol": "TCP"}]
    assert rule["from"][:-1] == given["networkPolicy"]["from"]
    assert rule["from"][-1]["podSelector"]["matchLabels"].items() <= test["metadata"]["labels"].items()
    assert not policy["podSelector"]["matchLabels"].items() <= test["metadata"]["labels"].items()
    open_to_all = one("NetworkPolicy", {"hostNetwork": False, "networkPolicy": {"enabled": True}})
    assert "from" not in open_to_all["spec"]["ingress"][0]


def test_parts_of_the_users() -> None:
    """Volumes, containers, manifests and the resolver of the user's are there beside the chart's own."""
    given = values(next(file for file in VALUES if file.name == "policies-values.yaml"))
    made = objects(given)
    spec = pod(given)
    assert [container["name"] for container in spec["containers"]] == ["shoal", "proxy"]
    assert [container["name"] for container in spec["initContainers"]] == ["wait"]
    assert spec["volumes"][-1] == given["extraVolumes"][0]
    assert exporter(given)["volumeMounts"][-1] == given["extraVolumeMounts"][0]
    assert spec["dnsConfig"] == given["dnsConfig"]
    assert spec["securityContext"]["seLinuxOptions"] == {"type": "spc_t"}
    assert one("DaemonSet", given)["spec"]["updateStrategy"] == {"type": "OnDelete"}
    names = {(each["kind"], each["metadata"]["name"]): each for each in made}
    assert names["ResourceQuota", "critical-pods"]["metadata"]["namespace"] == "node-agents"
    assert names["ConfigMap", "shoal-note"]["metadata"]["namespace"] == "node-agents"


@pytest.mark.parametrize(
    ("given", "said", "unsaid"),
    [
        ({}, ["Nothing scrapes it yet", "No alert is installed", "in tier attribution"], ["hostNetwork is off"]),
        (
            {"monitor": {"kind": "PodMonitor"}, "rules": {"enabled": True}},
            ["through the PodMonitor shoal", "PrometheusRule objects"],
            ["Nothing scrapes it yet", "No alert is installed"],
        ),
        ({"tier": "counters", "hostNetwork": False}, ["no stale backends", "hostNetwork is off"], []),
        ({"namespaceOverride": "agents"}, ["kubectl -n agents rollout status daemonset/shoal"], []),
    ],
)
def test_notes_say_what_is_next(given: dict[str, Any], said: list[str], unsaid: list[str]) -> None:
    """How to see that it works, who scrapes it, and what these values leave out."""
    text = notes(given)
    assert "helm -n monitoring test shoal --logs" in text
    assert [sentence for sentence in said if sentence not in text] == []
    assert [sentence for sentence in unsaid if sentence in text] == []


@contextmanager
def serving(text: str) -> Iterator[str]:
    """Answer every request on a free port with this text, and give the address."""

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            self.send_response(200)
            self.end_headers()
            self.wfile.write(text.encode())

        def log_message(self, *_: object) -> None:
            pass

    with ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        Thread(target=server.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{server.server_port}/metrics"
        server.shutdown()


def run_hook(url: str, **environment: str) -> subprocess.CompletedProcess[str]:
    """Run the script of the `helm test` hook, as its pod does, towards this address."""
    (script,) = one("Pod")["spec"]["containers"][0]["args"]
    command = [sys.executable, "-c", script]
    return subprocess.run(
        command, env={"URL": url, **environment}, capture_output=True, text=True, check=False, timeout=60
    )


def test_helm_test_scrapes_once() -> None:
    """The hook asks the Service, and a real exporter makes it succeed and say which signals there are."""
    made = one("Pod")
    assert made["metadata"]["annotations"]["helm.sh/hook"] == "test"
    environment = {entry["name"]: entry["value"] for entry in made["spec"]["containers"][0]["env"]}
    assert environment["URL"] == "http://shoal.monitoring.svc:7462/metrics"
    with running("shoal", [sys.executable, "-m", "shoal"]) as target:
        done = run_hook(f"http://127.0.0.1:{target.connection.port}/metrics")
    assert (done.returncode, done.stderr) == (0, "")
    assert re.search(r"^  pressure_node: available$", done.stdout, re.MULTILINE)


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("up 1\n", "that is no Shoal exporter"),
        (
            (
                'shoal_signal_available{signal="b"} 1\nshoal_scrape_collector_success{collector="c"} 0\n'
                'shoal_build_info{version="1"} 1\n'
            ),
            "these collectors fail: c",
        ),
    ],
)
def test_helm_test_fails_for_what_does_not_work(text: str, said: str) -> None:
    """Something else that answers, and an exporter whose collectors fail."""
    with serving(text) as url:
        done = run_hook(url)
    assert done.returncode == 1
    assert said in done.stderr


def test_helm_test_says_when_nobody_answers() -> None:
    """In a sentence and not in a traceback."""
    done = run_hook("http://127.0.0.1:9/metrics")
    assert done.returncode == 1
    assert done.stderr.startswith("http://127.0.0.1:9/metrics does not answer: ")
    assert "Traceback" not in done.stderr


def test_names_follow_the_release() -> None:
    """Every document is YAML of its own, for a release whose name is not the chart's too."""
    assert {made["metadata"]["name"] for made in objects(release="east")} == {"east-shoal", "east-shoal-test"}
    longest = {made["metadata"]["name"] for made in objects(release="r" * 53)}
    assert max(map(len, longest)) <= 63
    assert {made["metadata"]["name"] for made in objects({"fullnameOverride": "x"}, release="e")} == {"x", "x-test"}


@pytest.fixture
def secured(tmp_path: Path) -> Iterator[str]:
    """Run the exporter with the file that the chart makes for HTTPS, a password added, and give the address."""
    certificate = ["openssl", "req", "-x509", "-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:P-256", "-nodes"]
    certificate += ["-subj", "/CN=shoal", "-days", "2", "-keyout", "tls.key", "-out", "tls.crt"]
    subprocess.run(certificate, cwd=tmp_path, check=True, capture_output=True)
    text = one("ConfigMap", {"web": {"tlsSecret": "a"}})["data"]["web-config.yaml"]
    password = bcrypt.hashpw(b"word", bcrypt.gensalt(4)).decode()
    (tmp_path / "web-config.yaml").write_text(f"{text}basic_auth_users:\n  prometheus: {password}\n", encoding="utf-8")
    command = [sys.executable, "-m", "shoal", f"--web.config.file={tmp_path / 'web-config.yaml'}"]
    with running("shoal", command) as target:
        yield f"https://127.0.0.1:{target.connection.port}"


def test_helm_test_with_tls_and_a_password(secured: str) -> None:
    """It logs in as the monitor does, and says what is missing when it is not told how; probes get through."""
    login = {name: {"name": "login", "key": name} for name in ("username", "password")}
    given = {"web": {"configSecret": "a", "tls": True}, "monitor": {"basicAuth": login}}
    environment = {entry["name"]: entry.get("valueFrom") for entry in one("Pod", given)["spec"]["containers"][0]["env"]}
    assert environment["USERNAME"] == {"secretKeyRef": login["username"]}
    assert environment["PASSWORD"] == {"secretKeyRef": login["password"]}
    done = run_hook(f"{secured}/metrics", USERNAME="prometheus", PASSWORD="word")  # noqa: S106  (that of the fixture)
    assert (done.returncode, done.stderr) == (0, "")
    refused = run_hook(f"{secured}/metrics")
    assert refused.returncode == 1
    assert "answers 401 Unauthorized; it wants a password: name its Secrets in monitor.basicAuth" in refused.stderr
    for probe in ("livenessProbe", "readinessProbe"):
        path = exporter(given)[probe]["httpGet"]["path"]
        # A kubelet does not look at the certificate either.
        context = ssl._create_unverified_context()  # noqa: S323
        with urllib.request.urlopen(secured + path, context=context, timeout=30) as answer:  # noqa: S310
            assert answer.status == 200
