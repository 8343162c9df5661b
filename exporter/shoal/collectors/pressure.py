"""Collector `pressure`: for how long the node and each workload waited for CPU, memory or I/O."""

from __future__ import annotations

from typing import TYPE_CHECKING, ClassVar

from shoal.collectors import Collector, Sample, read_workloads, register
from shoal.families import Family, Metric
from shoal.inventory import OWNER_LABELS, Node
from shoal.kernel.pressure import check_pressure, read_pressure

if TYPE_CHECKING:
    from collections.abc import Iterator

    from shoal.inventory import Workload

__all__ = ["PressureCollector"]

_RESOURCES = ("cpu", "memory", "io")
# Seconds of waiting from which on it matters whether all tasks waited at once; well below where any alert begins.
_LEAST = 1.0

NODE_SOME = Metric(
    "shoal_node_pressure_some_seconds_total",
    "counter",
    "Time in which at least one task of the node waited for the resource (PSI some total).",
    "/proc/pressure/{cpu,memory,io}",
    ("resource",),
)
NODE_FULL = Metric(
    "shoal_node_pressure_full_seconds_total",
    "counter",
    "Time in which all non-idle tasks of the node waited for the resource at once (PSI full total).",
    "/proc/pressure/{cpu,memory,io,irq}",
    ("resource",),
)
SOME = Metric(
    "shoal_pressure_some_seconds_total",
    "counter",
    "Time in which at least one task of the workload waited for the resource (PSI some total).",
    "<cgroup>/{cpu,memory,io}.pressure",
    (*OWNER_LABELS, "resource"),
)
FULL = Metric(
    "shoal_pressure_full_seconds_total",
    "counter",
    "Time in which all non-idle tasks of the workload waited for the resource at once (PSI full total); once some of "
    "them have waited for it for a second.",
    "<cgroup>/{memory,io}.pressure",
    (*OWNER_LABELS, "resource"),
)


@register
class PressureCollector(Collector):
    """Waiting that no utilisation graph shows (failures 6, 7 and 10): the totals of pressure stall information.

    The kernel's averages are not exported: `rate()` over a total gives any window. A pod as a whole is left out,
    as its containers have it.
    """

    name = "pressure"
    metrics: ClassVar = (NODE_SOME, NODE_FULL, SOME, FULL)
    signals: ClassVar = ("pressure_node", "pressure_irq", "pressure_workloads")

    def read(self, node: Node) -> list[Family]:
        """Read the node's files, then those of every workload."""
        some, full = NODE_SOME.family(), NODE_FULL.family()
        proc = node.roots.proc
        with self.availability.reading("pressure_node"):
            check_pressure(proc)
            for resource in _RESOURCES:
                pressure = read_pressure(f"{proc}/pressure/{resource}")
                if pressure.some is not None:
                    some.add((resource,), pressure.some)
                if pressure.full is not None:
                    full.add((resource,), pressure.full)
        with self.availability.reading("pressure_irq"):
            check_pressure(proc)
            irq = read_pressure(f"{proc}/pressure/irq").full
            if irq is not None:
                full.add(("irq",), irq)
        families = {SOME: SOME.family(), FULL: FULL.family()}
        with self.availability.reading("pressure_workloads"):
            check_pressure(proc)
            read_workloads(node.inventory(), families, _workload)
        return [some, full, *families.values()]


def _workload(workload: Workload, fd: int) -> Iterator[Sample]:
    if workload.whole_pod:
        return
    for resource in _RESOURCES:
        pressure = read_pressure(f"{resource}.pressure", dir_fd=fd)
        labels = (*workload.owner.labels, resource)
        if pressure.some is not None:
            yield SOME, labels, pressure.some
        # That all of a workload's tasks wait for a CPU is its own quota's doing, and cpu.stat has it. And while some
        # hardly waited all did less: most workloads are spared a series that way.
        if pressure.full is not None and resource != "cpu" and (pressure.some or 0) >= _LEAST:
            yield FULL, labels, pressure.full
