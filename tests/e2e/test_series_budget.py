"""How many series a full node has: 110 pods with 250 containers, in cgroups and namespaces of their own."""

from __future__ import annotations

import shutil
import sys
from collections import Counter
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

import pytest
from prometheus_client.openmetrics.parser import text_string_to_metric_families
from tests.bench.node import CONTAINERS, PODS, TIER_2, full_node
from tests.bench.pods import pods
from tests.bench.target import EXPORTER, running

from shoal.collectors import available_names, load
from shoal.inventory import Node
from shoal.kernel.files import Roots
from shoal.kernel.namespaces import open_in_namespace
from shoal.settings import resolve

if TYPE_CHECKING:
    from collections.abc import Iterable

PER_POD = 25
PER_NODE = 600

RECORDED = Path(__file__).parents[1] / "unit" / "fixtures" / "6.12"
# Of the recorded containers, the one that has limits of memory and CPU and was never near the former.
CALM = (
    "kubepods.slice/kubepods-podb2a4c6d8_1357_4e9f_a0b1_c2d3e4f5a6b7.slice/"
    "crio-fe32621bd7721450998cef6bb0955b37ca94ecdc69f032e702ac688d6dbf3823.scope"
)
# What they read of a cgroup is missing where the controllers are those of cgroup v1.
OF_CONTROLLERS = ("memory", "delays")

Counts = Counter[tuple[str, bool]]
"""{(metric, whether the series belongs to a pod): series}"""


def count(samples: Iterable[tuple[str, dict[str, str]]]) -> Counts:
    """Count samples, given by name and labels."""
    return Counter((name, "pod" in labels) for name, labels in samples)


def scraped() -> Counts:
    """Build the node and count what a scrape with default settings has."""
    with full_node() as node:
        python = ("env", f"PYTHONPATH={EXPORTER}", sys.executable, "-m", "shoal")
        command = node.command(*python, privileges=TIER_2)
        with running("shoal", command, there=partial(open_in_namespace, "/proc", node.pid)) as target:
            # The second has what the first only begins.
            target.scrape()
            target.scrape()
    families = text_string_to_metric_families(target.text.decode())  # type: ignore[no-untyped-call]
    samples = [sample for family in families for sample in family.samples]
    failed = [sample for sample in samples if sample.name == "shoal_scrape_collector_success" and not sample.value]
    assert failed == []
    return count((sample.name, sample.labels) for sample in samples)


def copied(sys_root: Path) -> Counts:
    """Lay out the same cgroups with controllers, each a copy of a calm container, and count what is read of them.

    A pod is a copy as well, since a kubelet gives it the sum of its containers' limits.
    """
    recorded = RECORDED / "sys" / "fs" / "cgroup"
    mount = sys_root / "fs" / "cgroup"
    ignore = shutil.ignore_patterns("cgroup.procs")
    mount.mkdir(parents=True)
    shutil.copy(recorded / "cgroup.controllers", mount)
    for pod in pods(PODS, CONTAINERS):
        scopes = [mount / pod.cgroup(container) for container in range(pod.containers)]
        for cgroup in (scopes[0].parent, *scopes):
            shutil.copytree(recorded / CALM, cgroup, ignore=ignore)
    node = Node(Roots(proc=str(RECORDED / "proc"), sys=str(sys_root), rootfs=str(sys_root)))
    families = [family for name in OF_CONTROLLERS for family in load(name)(resolve({}, {})).read(node)]
    return count(
        (family.metric.name, dict(zip(family.metric.labels, labels, strict=True)))
        for family in families
        for labels, _ in family.samples
    )


def table(found: Counts) -> str:
    """Return how many series each collector has, for a pod on average and for the node."""
    owners = {metric.name: name for name in available_names() for metric in load(name).metrics}
    per_pod: Counter[str] = Counter()
    per_node: Counter[str] = Counter()
    for (metric, of_pod), number in found.items():
        (per_pod if of_pod else per_node)[owners.get(metric, "the exporter itself")] += number
    lines = [f"{'':20}{'per pod':>10}{'of pods':>10}{'of the node':>12}"]
    lines += [
        f"{name:20}{per_pod[name] / PODS:10.2f}{per_pod[name]:10}{per_node[name]:12}"
        for name in sorted(per_pod | per_node)
    ]
    of_pods, of_node = per_pod.total(), per_node.total()
    lines.append(f"{'all':20}{of_pods / PODS:10.2f}{of_pods:10}{of_node:12}")
    return "\n".join(lines)


@pytest.mark.root
@pytest.mark.timeout(300)
def test_series_budget(tmp_path: Path) -> None:
    """At most 25 series for each pod and 600 for the node, those of controllers included that this machine lacks."""
    found = scraped()
    present = {name for name, _ in found}
    absent = copied(tmp_path)
    found += Counter({key: number for key, number in absent.items() if key[0] not in present and key[1]})
    print(table(found))  # noqa: T201  (shown when it fails)
    assert sum(found.values()) <= PER_POD * PODS + PER_NODE
