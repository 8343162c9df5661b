"""The first four collectors on recorded nodes, and on what a kernel, a privilege or a race takes away."""

from __future__ import annotations

import gc
import os
import re
import shutil
import subprocess
from pathlib import Path
from types import FrameType
from typing import TYPE_CHECKING

import pytest
from tests.unit.outputs import samples

from shoal.collectors import available_names, catalogue, load
from shoal.inventory import Node
from shoal.kernel.files import Roots
from shoal.kernel.memory import read_memory_stat
from shoal.settings import resolve

if TYPE_CHECKING:
    from tests.unit.outputs import Samples

    from shoal.collectors import Collector

FIXTURES = Path(__file__).parent / "fixtures"
API = ("shop", "checkout-7d9c5b6f4-x2x9k", "api", "")
WORKER = ("shop", "checkout-7d9c5b6f4-x2x9k", "worker", "")
REPORT = ("batch", "reports-0", "report", "")
REPORTS_POD = ("batch", "reports-0", "", "")

# Collectors with a `collect` of their own, whose own tests take everything away from them.


def roots_of(kernel: str) -> Roots:
    """Return the roots of a recorded node."""
    root = FIXTURES / kernel
    return Roots(f"{root}/proc", f"{root}/sys", f"{root}/rootfs")


def copy_of(kernel: str, tmp_path: Path) -> Roots:
    """Return a copy of a recorded node, to be damaged."""
    # Nine hundred small files: cp takes a tenth of the time that shutil does.
    subprocess.run(["cp", "-a", str(FIXTURES / kernel), str(tmp_path)], check=True)
    root = tmp_path / kernel
    return Roots(f"{root}/proc", f"{root}/sys", f"{root}/rootfs")


def collector(name: str) -> Collector:
    """Make a collector with default settings."""
    return load(name)(resolve({}, {}))


def read(name: str, roots: Roots) -> tuple[Samples, dict[str, str]]:
    """Run a collector once; return its samples and, for each of its signals, the reason for its absence or ""."""
    one = collector(name)
    found = samples(one.read(Node(roots)))
    return found, {signal: why[0].value if why else "" for signal, why in one.availability.absent.items()}


def cgroup_file(roots: Roots, container: str, name: str) -> Path:
    """Return the path of a file in the cgroup of one of the recorded containers."""
    (found,) = [path for path in Path(roots.sys).rglob(name) if container in str(path.parent.name)]
    return found


@pytest.mark.parametrize("kernel", ["5.10", "6.1", "6.12"])
def test_memory_of_a_recorded_node(kernel: str) -> None:
    """The throttled, the killed, and the one killed by its pod's limit are told apart by the kernel's own numbers."""
    found, _ = read("memory", roots_of(kernel))
    assert found["shoal_node_memory_oom_kills_total"][()] == 2
    assert found["shoal_memory_high_bytes"] == {API: 30 << 20}
    events = found["shoal_memory_events_total"]
    assert events[*API, "high"] > 50
    assert events[*API, "oom_kill"] == 0
    assert events[*WORKER, "oom"] == events[*WORKER, "oom_kill"] == 1
    # The pod's limit is tighter than the container's: the kill is the container's, the limit that was hit the pod's.
    assert events[*REPORT, "oom_kill"] == 1
    assert events[*REPORT, "oom"] == 0
    assert found["shoal_memory_local_events_total"][*REPORTS_POD, "oom"] == 1
    assert found["shoal_memory_max_bytes"][REPORT] == 256 << 20
    assert found["shoal_memory_effective_limit_bytes"][REPORT] == 32 << 20
    assert found["shoal_memory_effective_limit_bytes"][API] == 128 << 20


def test_what_counts_as_unreclaimable(tmp_path: Path) -> None:
    """A mebibyte more of a field is a mebibyte more that reclaim cannot take back, or none; no field counts twice."""
    roots = copy_of("6.12", tmp_path)
    path = cgroup_file(roots, "ef0badbf", "memory.stat")
    amounts = {name: int(value) for name, value in (line.split() for line in path.read_text().splitlines())}
    before = read("memory", roots)[0]["shoal_memory_unreclaimable_bytes"][API]
    counted = set()
    for changed in amounts:
        path.write_text("".join(f"{name} {value + (name == changed) * (1 << 20)}\n" for name, value in amounts.items()))
        more = read("memory", roots)[0]["shoal_memory_unreclaimable_bytes"][API] - before
        assert more in (0, 1 << 20)
        if more:
            counted.add(changed)
    assert counted == {
        "anon",
        "shmem",
        "sock",
        "kernel_stack",
        "pagetables",
        "sec_pagetables",
        "percpu",
        "vmalloc",
        "slab_unreclaimable",
        "file_dirty",
        "file_writeback",
    }


def test_a_workload_without_a_limit_has_usage_and_events_only() -> None:
    """What nothing bounds cannot hit a limit, so its breakdown is left out."""
    found, _ = read("memory", roots_of("6.1"))
    redis = ("", "", "", "redis-server.service")
    assert found["shoal_memory_current_bytes"][redis] > 0
    assert found["shoal_memory_events_total"][*redis, "oom_kill"] == 0
    for name in ("shoal_memory_effective_limit_bytes", "shoal_memory_unreclaimable_bytes", "shoal_memory_peak_bytes"):
        assert redis not in found[name]


def test_a_calm_workload_is_two_series_until_it_comes_near_its_limit(tmp_path: Path) -> None:
    """At half of its limit it gets the breakdown, and keeps it; an alert's rate needs what came before, too."""
    roots = copy_of("6.1", tmp_path)
    ledger = ("payments", "ledger-0", "ledger", "")
    one = collector("memory")

    def series() -> set[str]:
        found = samples(one.read(Node(roots)))
        return {name for name, values in found.items() for labels in values if labels[:4] == ledger}

    calm = {"shoal_memory_effective_limit_bytes", "shoal_memory_events_total"}
    assert series() == calm
    current = cgroup_file(roots, "crio-fe32621b", "memory.current")
    usual = current.read_bytes()
    current.write_bytes(b"33554431\n")
    assert series() == calm
    current.write_bytes(b"33554432\n")
    restless = series()
    assert restless > calm | {"shoal_memory_unreclaimable_bytes", "shoal_memory_major_faults_total"}
    current.write_bytes(usual)
    assert series() == restless


def test_a_calm_pod_is_one_series_until_it_comes_near_its_limit(tmp_path: Path) -> None:
    """Its own events tell whether its limit was hit, which is no question while it was far from it."""
    roots = copy_of("6.1", tmp_path)
    (pod,) = Path(roots.sys).rglob("kubepods-burstable-pod7c1b9a52_*.slice")
    events = (pod / "memory.events.local").read_text()
    for name, content in (
        ("memory.events.local", events.replace("max 24", "max 0").replace("oom 1", "oom 0")),
        ("memory.current", "4096\n"),
        ("memory.peak", "4096\n"),
    ):
        (pod / name).write_text(content)

    def series() -> set[str]:
        found, _ = read("memory", roots)
        return {name for name, values in found.items() for labels in values if labels[:4] == REPORTS_POD}

    assert series() == {"shoal_memory_max_bytes"}
    (pod / "memory.events.local").write_text(events)
    assert series() == {"shoal_memory_max_bytes", "shoal_memory_local_events_total"}


@pytest.mark.parametrize(
    ("kernel", "absent"),
    [("5.10", {"memory_peak", "memory_direct_scan"}), ("6.1", set()), ("6.12", set())],
)
def test_memory_signals_by_kernel(kernel: str, absent: set[str]) -> None:
    """memory.peak and pgscan_direct came after 5.10: absent there with the reason, and never 0."""
    found, reasons = read("memory", roots_of(kernel))
    assert {signal for signal, reason in reasons.items() if reason} == absent
    assert all(reasons[signal] == "not_in_kernel" for signal in absent)
    assert ("shoal_memory_peak_bytes" in found) == ("memory_peak" not in absent)
    assert ("shoal_memory_direct_scan_pages_total" in found) == ("memory_direct_scan" not in absent)


@pytest.mark.parametrize(("kernel", "reason"), [("5.10", "not_in_kernel"), ("6.12", "")])
def test_what_the_kernel_has_does_not_depend_on_who_came_near_a_limit(kernel: str, reason: str, tmp_path: Path) -> None:
    """Otherwise a signal would be lost whenever a workload of an old kernel comes near its limit."""
    roots = copy_of(kernel, tmp_path)
    calm = [path for name in ("memory.events", "memory.events.local") for path in Path(roots.sys).rglob(name)]
    for path in calm:
        path.write_text(re.sub(r" \d+", " 0", path.read_text()))
    for path in Path(roots.sys).rglob("memory.max"):
        path.write_text("max\n")
        path.with_name("memory.high").write_text("max\n")
    one = collector("memory")
    for _ in range(2):
        found = samples(one.read(Node(roots)))
        assert found["shoal_memory_events_total"]
        assert "shoal_memory_major_faults_total" not in found
        why = one.availability.absent["memory_direct_scan"]
        assert (why[0].value if why else "") == reason


@pytest.mark.parametrize("kernel", ["5.10", "6.1", "6.12"])
def test_pressure_of_a_recorded_node(kernel: str) -> None:
    """The throttled container stood still for memory; a node without trouble has its totals all the same."""
    found, reasons = read("pressure", roots_of(kernel))
    some, full = found["shoal_pressure_some_seconds_total"], found["shoal_pressure_full_seconds_total"]
    assert full[*API, "memory"] > 1
    assert full.keys() == {labels for labels, waited in some.items() if waited >= 1 and labels[-1] != "cpu"}
    assert found["shoal_node_pressure_some_seconds_total"].keys() == {("cpu",), ("memory",), ("io",)}
    assert (("cpu",) in found["shoal_node_pressure_full_seconds_total"]) == (kernel != "5.10")
    assert reasons["pressure_node"] == reasons["pressure_workloads"] == ""
    assert reasons["pressure_irq"] == (
        "" if ("irq",) in found["shoal_node_pressure_full_seconds_total"] else "not_in_kernel"
    )
    assert not any(labels[1] and not labels[2] for labels in some)


@pytest.mark.parametrize("kernel", ["5.10", "6.1", "6.12"])
def test_listen_queue_of_a_recorded_node(kernel: str) -> None:
    """The pod whose queue overflowed is the only one that dropped anything."""
    found, reasons = read("listen_queue", roots_of(kernel))
    overflows = found["shoal_listen_queue_overflows_total"]
    assert {labels[2] for labels, value in overflows.items() if value} == {"checkout-7d9c5b6f4-x2x9k"}
    assert overflows["host", "", "", "", ""] == 0
    told = {labels for labels, value in overflows.items() if value or labels[0] != "pod"}
    assert found["shoal_listen_queue_drops_total"].keys() == told
    assert reasons["listen_queue_namespaces"] == ""
    assert found["shoal_listen_queue_somaxconn"][()] == 4096


def test_each_counter_of_a_namespace_is_its_own(tmp_path: Path) -> None:
    """Four counters that rise together in most faults are not mixed up with one another."""
    roots = copy_of("6.1", tmp_path)
    for path in {path.resolve() for path in Path(roots.proc).glob("*/net/netstat")}:
        names, values, *rest = path.read_text().splitlines()
        changed = dict(zip(names.split()[1:], values.split()[1:], strict=True))
        changed |= {"ListenOverflows": "11", "ListenDrops": "12", "TCPReqQFullDrop": "13", "TCPReqQFullDoCookies": "14"}
        path.write_text("\n".join([names, "TcpExt: " + " ".join(changed.values()), *rest]) + "\n")
    found, _ = read("listen_queue", roots)
    host = ("host", "", "", "", "")
    assert found["shoal_listen_queue_overflows_total"][host] == 11
    assert found["shoal_listen_queue_drops_total"][host] == 12
    assert found["shoal_listen_queue_request_drops_total"][host] == 13
    assert found["shoal_listen_queue_request_cookies_total"][host] == 14


def test_a_counter_of_a_pod_that_has_nothing_to_tell(tmp_path: Path) -> None:
    """The host's counters begin at 0; of a pod, those that no alert waits for are there once they are not 0."""
    roots = copy_of("6.1", tmp_path)
    told = {
        ("ephemeral_ports", "shoal_tcp_time_wait_overflows_total"): "TCPTimeWaitOverflow",
        ("listen_queue", "shoal_listen_queue_request_drops_total"): "TCPReqQFullDrop",
        ("listen_queue", "shoal_listen_queue_request_cookies_total"): "TCPReqQFullDoCookies",
    }
    for (name, metric), counter in told.items():
        host, pod = ("host", "", "", "", ""), ("pod", "batch", "reports-0", "", "")
        before = read(name, roots)[0][metric]
        assert before[host] == 0
        assert not [labels for labels in before if labels[0] == "pod"]
        (space,) = [space for space in Node(roots).network_namespaces() if space.labels == pod]
        path = Path(roots.proc, str(space.pid), "net", "netstat")
        names, values, *rest = path.read_text().splitlines()
        numbers = values.split()
        numbers[names.split().index(counter)] = "3"
        path.write_text("\n".join([names, " ".join(numbers), *rest]) + "\n")
        assert read(name, roots)[0][metric] == before | {pod: 3}


def test_conntrack_of_a_recorded_node() -> None:
    """Count and limit are those of the files; statistics come over netlink from this machine, or with a reason."""
    found, reasons = read("conntrack", roots_of("6.1"))
    (entries,) = found["shoal_conntrack_entries"].values()
    assert entries == int((FIXTURES / "6.1/proc/sys/net/netfilter/nf_conntrack_count").read_text())
    assert found["shoal_conntrack_limit"][()] == int(
        (FIXTURES / "6.1/proc/sys/net/netfilter/nf_conntrack_max").read_text()
    )
    assert reasons["conntrack_entries"] == ""
    assert reasons["conntrack_statistics"] in {"", "no_permission", "not_in_kernel"}


def test_cgroup_v1_is_a_reason_and_not_a_zero(tmp_path: Path) -> None:
    """On v1 no workload has memory; the node's kills, which need no cgroup, are still there."""
    roots = copy_of("6.1", tmp_path)
    shutil.rmtree(Path(roots.sys, "fs/cgroup"))
    Path(roots.sys, "fs/cgroup/memory").mkdir(parents=True)
    found, reasons = read("memory", roots)
    assert set(found) == {"shoal_node_memory_oom_kills_total"}
    assert reasons == {
        "memory_oom_kills": "",
        "memory_workloads": "cgroup_v1",
        "memory_peak": "cgroup_v1",
        "memory_direct_scan": "cgroup_v1",
    }
    found, reasons = read("pressure", roots)
    assert reasons["pressure_workloads"] == "cgroup_v1"
    assert "shoal_pressure_some_seconds_total" not in found


@pytest.mark.parametrize("kernel", ["5.10-psi0", "6.12-psi0"])
def test_pressure_switched_off_at_boot(kernel: str) -> None:
    """With psi=0 the files are missing as in a kernel without PSI; the reason tells the two apart."""
    found, reasons = read("pressure", roots_of(kernel))
    assert not any(found.values())
    assert set(reasons.values()) == {"disabled"}


def test_no_pressure_in_the_kernel(tmp_path: Path) -> None:
    """Without PSI its signals are absent, of the node and of the workloads."""
    roots = copy_of("6.1", tmp_path)
    shutil.rmtree(Path(roots.proc, "pressure"))
    for path in Path(roots.sys).rglob("*.pressure"):
        path.unlink()
    found, reasons = read("pressure", roots)
    assert not found
    assert set(reasons.values()) == {"not_in_kernel"}


def test_no_conntrack_in_the_kernel(tmp_path: Path) -> None:
    """Without the table's files its size is absent, not 0."""
    roots = copy_of("6.1", tmp_path)
    shutil.rmtree(Path(roots.proc, "sys/net/netfilter"))
    for path in Path(roots.proc).glob("*/net/stat"):
        shutil.rmtree(path, ignore_errors=True)  # the recording links one process's to another's
    found, reasons = read("conntrack", roots)
    assert "shoal_conntrack_entries" not in found
    assert reasons["conntrack_entries"] == "not_in_kernel"


@pytest.mark.parametrize("content", [b"", b"\x00\xff\x00", b"anon 12", b"anon twelve\n"])
def test_a_damaged_file_costs_its_signal_only(tmp_path: Path, content: bytes) -> None:
    """An empty, binary or cut memory.stat is named in the reason; the other signals of the collector are there."""
    roots = copy_of("6.1", tmp_path)
    cgroup_file(roots, "ef0badbf", "memory.stat").write_bytes(content)
    found, reasons = read("memory", roots)
    assert reasons["memory_workloads"] == "malformed"
    assert found["shoal_node_memory_oom_kills_total"][()] == 2
    assert API not in found.get("shoal_memory_unreclaimable_bytes", {})
    # The reason says what is wrong with one workload; the others' numbers are right, and are there.
    assert found["shoal_memory_unreclaimable_bytes"][WORKER] > 0


def test_new_columns_and_keys_change_nothing(tmp_path: Path) -> None:
    """A kernel that knows more gives the same output."""
    roots = copy_of("6.1", tmp_path)
    before = read("memory", roots)
    for name in ("memory.stat", "memory.events"):
        path = cgroup_file(roots, "ef0badbf", name)
        path.write_bytes(path.read_bytes() + b"novel_counter 99 100\n")
    assert read("memory", roots) == before


def test_a_cgroup_that_vanishes_in_the_middle(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A container that ends between the walk and the read is left out whole; the others are untouched."""
    roots = copy_of("6.1", tmp_path)
    node = Node(roots)
    node.inventory()
    shutil.rmtree(cgroup_file(roots, "ef0badbf", "memory.stat").parent)
    one = collector("memory")
    found = samples(one.read(node))
    assert not any(labels[:3] == API[:3] for values in found.values() for labels in values)
    assert found["shoal_memory_current_bytes"][WORKER] > 0
    assert not any(one.availability.absent.values())
    # And one that ends between two of its own files: half of a workload is never exported.
    node = Node(roots)
    node.inventory()
    victim = cgroup_file(roots, "5ec70550", "memory.stat").parent

    def end_then_read(fd: int) -> dict[str, int]:
        shutil.rmtree(victim, ignore_errors=True)
        return read_memory_stat(fd)

    monkeypatch.setattr("shoal.collectors.memory.read_memory_stat", end_then_read)
    found = samples(collector("memory").read(node))
    assert not any(labels[:3] == WORKER[:3] for values in found.values() for labels in values)


def test_counters_of_processes_that_end_while_they_are_read(tmp_path: Path) -> None:
    """A namespace whose process has just ended is left out; the others have their counters."""
    roots = copy_of("6.1", tmp_path)
    node = Node(roots)
    ended = next(space for space in node.network_namespaces() if space.labels[2] == "reports-0")
    for path in Path(roots.proc).iterdir():
        if path.name == str(ended.pid):
            shutil.rmtree(path)
    one = collector("listen_queue")
    found = samples(one.read(node))
    assert {labels[2] for labels in found["shoal_listen_queue_overflows_total"]} >= {"checkout-7d9c5b6f4-x2x9k"}
    assert not any(labels[2] == "reports-0" for labels in found["shoal_listen_queue_overflows_total"])
    assert one.availability.absent["listen_queue_namespaces"] is None


@pytest.mark.parametrize("name", available_names())
def test_a_node_without_anything(tmp_path: Path, name: str) -> None:
    """Every collector survives a proc and a sys with nothing in them, and gives a reason for each missing file."""
    (tmp_path / "proc").mkdir()
    (tmp_path / "sys").mkdir()
    one = collector(name)
    node = Node(Roots(f"{tmp_path}/proc", f"{tmp_path}/sys", str(tmp_path)))
    found = samples(one.read(node))
    reasons = {signal: why[0].value if why else "" for signal, why in one.availability.absent.items()}
    assert set(reasons.values()) <= {"", "not_in_kernel", "no_permission", "not_enabled", "not_readable"}
    if all(reasons.values()):
        assert not any(found.values()), "every signal is absent, and something was exported"


def test_the_catalogue_has_every_metric_once() -> None:
    """No two collectors export one name, and each says what it is and where it comes from."""
    names = [metric.name for name in available_names() for metric in load(name).metrics]
    assert len(names) == len(set(names))
    assert set(names) < set(catalogue())
    for metric in catalogue().values():
        assert metric.name.startswith("shoal_")
        assert metric.help.endswith(".")
        assert metric.source


@pytest.mark.parametrize("name", available_names())
def test_a_collector_says_which_failure_it_reveals(name: str) -> None:
    """Its name is its file's, its signals begin with it, and its docstring is there."""
    one = load(name)
    assert one.name == name
    assert one.__doc__
    assert all(signal.startswith(f"{name}_") or signal == name for signal in one.signals)


@pytest.mark.skipif(os.geteuid() != 0, reason="needs root: it becomes an unprivileged user")
@pytest.mark.root
def test_without_permission_the_reason_says_so(tmp_path: Path) -> None:
    """Files that may not be read are absent with no_permission."""
    tmp_path.chmod(0o755)
    for parent in tmp_path.parents:
        if str(parent).startswith("/tmp/"):  # noqa: S108  (pytest's own directories, which only root may enter)
            parent.chmod(0o755)
    roots = copy_of("6.1", tmp_path)
    for path in [*Path(roots.sys).rglob("memory.*"), *Path(roots.proc, "pressure").iterdir()]:
        path.chmod(0o000)
    os.seteuid(65534)
    try:
        _, memory = read("memory", roots)
        _, pressure = read("pressure", roots)
    finally:
        os.seteuid(0)
    assert memory["memory_workloads"] == "no_permission"
    assert pressure["pressure_node"] == "no_permission"


@pytest.mark.parametrize("name", available_names())
def test_what_is_absent_leaves_nothing_for_the_garbage_collector(name: str, tmp_path: Path) -> None:
    """An exception that is kept holds the frames of the whole scrape, and full collections are rare on purpose."""
    one, roots = collector(name), copy_of("6.12", tmp_path)
    shutil.rmtree(Path(roots.sys))
    for entry in Path(roots.proc).iterdir():
        if not entry.name.isdigit():
            shutil.rmtree(entry) if entry.is_dir() and not entry.is_symlink() else entry.unlink()
    one.read(Node(roots))
    assert any(one.availability.absent.values())
    gc.collect()
    gc.set_debug(gc.DEBUG_SAVEALL)
    try:
        one.read(Node(roots))
        gc.collect()
        left = [found.f_code.co_qualname for found in gc.garbage if isinstance(found, FrameType)]
    finally:
        gc.set_debug(0)
        gc.garbage.clear()
    assert left == []
