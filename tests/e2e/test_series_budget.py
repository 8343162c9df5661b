"""How many series a full node has: 110 pods with 250 containers, in cgroups and namespaces of their own.

It is filled with sockets and connections, so that the lists that are bounded for the whole node are at their bounds. A
node with half as many pods stands beside it: by what the two differ, whatever it is called, is the pods'.
"""

from __future__ import annotations

import shutil
import sys
import time
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
# Who reads files that a cgroup has only where the controllers are on cgroup v2, and only if it has limits. On every
# machine these series are those of the copies.
OF_CONTROLLERS = ("memory", "delays")
COPIED = {
    metric.name for name in OF_CONTROLLERS for metric in load(name).metrics if metric.source.startswith("<cgroup>/")
} | {"shoal_memory_effective_limit_bytes"}

Counts = Counter[tuple[str, bool]]
"""{(metric, whether the series belongs to a pod): series}"""


def count(samples: Iterable[tuple[str, dict[str, str]]]) -> Counts:
    """Count samples, given by name and labels."""
    return Counter((name, "pod" in labels) for name, labels in samples)


def scraped(pods: int, containers: int) -> Counts:
    """Build a node and count what a scrape with default settings has."""
    with full_node(pods, containers) as node:
        node.fill()
        python = ("env", f"PYTHONPATH={EXPORTER}", sys.executable, "-m", "shoal")
        command = node.command(*python, privileges=TIER_2)
        with running("shoal", command, there=partial(open_in_namespace, "/proc", node.pid)) as target:
            # The second has what the first only begins, and the connections are there when all have been counted.
            target.scrape()
            target.scrape()
            while b"shoal_conntrack_dump_entries" not in target.text:
                time.sleep(0.2)
                target.scrape()
    families = text_string_to_metric_families(target.text.decode())  # type: ignore[no-untyped-call]
    samples = [sample for family in families for sample in family.samples]
    failed = [sample for sample in samples if sample.name == "shoal_scrape_collector_success" and not sample.value]
    assert failed == []
    return count((sample.name, sample.labels) for sample in samples)


def copied(sys_root: Path, number: int, containers: int) -> Counts:
    """Lay out the same cgroups with controllers, each a copy of a calm container, and count what is read of them.

    A pod is a copy as well, since a kubelet gives it the sum of its containers' limits.
    """
    recorded = RECORDED / "sys" / "fs" / "cgroup"
    mount = sys_root / "fs" / "cgroup"
    ignore = shutil.ignore_patterns("cgroup.procs")
    mount.mkdir(parents=True)
    shutil.copy(recorded / "cgroup.controllers", mount)
    for pod in pods(number, containers):
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


def counted(sys_root: Path, number: int, containers: int) -> Counts:
    """Count the series of a node of so many pods and containers, whatever controllers this machine has."""
    live, copy = scraped(number, containers), copied(sys_root, number, containers)
    return Counter(
        {key: series for key, series in live.items() if not (key[1] and key[0] in COPIED)}
        | {key: series for key, series in copy.items() if key[1] and key[0] in COPIED}
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
    """At most 25 series for each pod and 600 for the node, whether one goes by their labels or by what pods add."""
    full = counted(tmp_path / "full", PODS, CONTAINERS)
    half = counted(tmp_path / "half", PODS // 2, CONTAINERS // 2)
    each = (full.total() - half.total()) / (PODS - PODS // 2)
    print(table(full), f"{each:.2f} with each pod", sep="\n")  # noqa: T201  (shown when it fails)
    assert sum(series for (_, of_pod), series in full.items() if of_pod) <= PER_POD * PODS
    assert each <= PER_POD
    assert full.total() - each * PODS <= PER_NODE
