"""Collector `delays`: sums that never fall, whichever process comes or goes, and real waiting on the live kernel."""

from __future__ import annotations

import contextlib
import os
import shutil
import signal
import subprocess
import sys
import time
from dataclasses import dataclass, field
from itertools import count
from pathlib import Path
from typing import TYPE_CHECKING, Self

import pytest
from hypothesis import given
from hypothesis import strategies as st
from tests.unit.outputs import absent, brief

from shoal.collectors import delays
from shoal.collectors.delays import DelaysCollector
from shoal.inventory import Node, Owner
from shoal.kernel.cgroups import find_hierarchy
from shoal.kernel.files import ParseError, Reason, Roots, Unavailable, Vanished
from shoal.kernel.netlink.taskstats import TaskStats
from shoal.settings import resolve

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from tests.unit.outputs import Samples


FIXTURES = Path(__file__).parent / "fixtures"
DELAY, SKIPPED = "shoal_delay_seconds_total", "shoal_delay_processes_skipped"
PERIODS, THROTTLED = "shoal_cpu_periods_total", "shoal_cpu_throttled_seconds_total"
NODE = "shoal_node_run_queue_delay_seconds_total"


def stats(run_queue: float, *, version: int = 16, block_io: float = 0.0, others: float = 0.0) -> TaskStats:
    """Return what the kernel would say of one process; `others` is what it waited for each reason but those two."""
    later = [others if version >= since else None for since in (11, 13, 14)]
    return TaskStats(version, run_queue, block_io, others, others, others, int(block_io * 10), *later)


@dataclass
class Machine:
    """A node of files: cgroups, processes, and what taskstats would answer, unless it would refuse."""

    root: Path
    taskstats: dict[int, TaskStats] = field(default_factory=dict)
    refusal: Exception | None = None
    asked: list[int] = field(default_factory=list)
    collector: DelaysCollector = field(default_factory=lambda: DelaysCollector(resolve({}, {})))

    def __post_init__(self) -> None:
        """Lay out an empty node with delay accounting on, of which this process is a part."""
        for directory in ("proc/sys/kernel", "proc/pressure", "sys/fs/cgroup"):
            (self.root / directory).mkdir(parents=True)
        self.write("sys/fs/cgroup/cgroup.controllers", "cpu io memory")
        self.write("proc/sys/kernel/task_delayacct", "1\n")
        self.write("proc/pressure/irq", "full avg10=0.00 avg60=0.00 avg300=0.00 total=0\n")
        (self.root / "proc/self").symlink_to(str(os.getpid()))
        self.taskstats[os.getpid()] = stats(0)

    def write(self, path: str, content: str) -> None:
        """Write one file of the node."""
        (self.root / path).parent.mkdir(parents=True, exist_ok=True)
        (self.root / path).write_text(content)

    def cgroup(self, unit: str, *pids: int) -> None:
        """Make a cgroup with these processes in it."""
        self.write(f"sys/fs/cgroup/{unit}/cgroup.procs", "".join(f"{pid}\n" for pid in pids))
        self.write(f"sys/fs/cgroup/{unit}/cpu.stat", "usage_usec 0\n")

    def process(
        self,
        pid: int,
        said: TaskStats,
        *,
        started: int = 100,
        threads: dict[int, float] | None = None,
        nice: int = 0,
    ) -> None:
        """Make a process, or let time pass for it."""
        shutil.rmtree(self.root / f"proc/{pid}", ignore_errors=True)
        self.taskstats[pid] = said
        fields = " ".join(["S", *["0"] * 15, str(nice), "0", "0", str(started), *["0"] * 30])
        self.write(f"proc/{pid}/stat", f"{pid} (a ) b) {fields}\n")
        for thread, waited in (threads or {pid: said.run_queue}).items():
            self.write(f"proc/{pid}/task/{thread}/schedstat", f"5 {waited * 1e9:.0f} 1\n")

    def end(self, pid: int) -> None:
        """End a process without telling its cgroup, as when it ends between two reads."""
        shutil.rmtree(self.root / f"proc/{pid}")
        del self.taskstats[pid]

    def scrape(self) -> Samples:
        """Read the node once."""
        return brief(self.collector.read(Node(Roots(f"{self.root}/proc", f"{self.root}/sys", str(self.root)))))

    def __enter__(self) -> Self:
        """Stand in for a `TaskStatsSocket`."""
        if self.refusal and not isinstance(self.refusal, ParseError):
            raise self.refusal
        return self

    def __exit__(self, *_: object) -> None:
        """Close nothing."""

    def read(self, pid: int) -> TaskStats:
        """Answer as the kernel would."""
        if pid not in self.taskstats:
            raise Vanished(str(pid))
        if self.refusal and pid != os.getpid():
            raise self.refusal
        if pid != os.getpid():
            self.asked.append(pid)
        return self.taskstats[pid]


@pytest.fixture
def machine(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Machine:
    """Give a node of files whose taskstats the collector asks."""
    made = Machine(tmp_path)
    monkeypatch.setattr(delays, "TaskStatsSocket", lambda: made)
    return made


def test_what_processes_waited_is_summed_by_workload_and_reason(machine: Machine) -> None:
    """Two processes of one unit are one series for each reason, and nothing is absent."""
    machine.cgroup("a.service", 7, 8)
    machine.cgroup("a.service/below", 9)
    machine.cgroup("b.service", 10)
    for pid in (7, 8, 9, 10):
        machine.process(pid, stats(pid, block_io=0.5, others=1.5))
    found = machine.scrape()
    assert found[DELAY]["a.service", "run_queue"] == 24
    assert found[DELAY]["a.service", "block_io"] == 1.5
    assert found["shoal_block_io_waits_total"]["a.service",] == 15
    assert found[DELAY]["b.service", "run_queue"] == 10
    assert {reason for unit, reason in found[DELAY] if unit == "b.service"} == {
        "run_queue",
        "swap_in",
        "reclaim",
        "thrashing",
        "compaction",
        "copy_on_write",
        "irq",
    }
    assert found[SKIPPED] == {(): 0}
    assert absent(machine.collector) == {"delays_node": "not_in_kernel"}


def test_a_workload_that_hardly_waited_is_one_series(machine: Machine) -> None:
    """Delay accounting may be on: until it has waited a second for a reason, only the run queue is told, from 0 on."""
    machine.cgroup("a.service", 7)
    machine.process(7, stats(0, block_io=0.9, others=0.9))
    found = machine.scrape()
    assert found[DELAY] == {("a.service", "run_queue"): 0}
    assert found["shoal_block_io_waits_total"] == {}
    machine.process(7, stats(0, block_io=1, others=0.9))
    found = machine.scrape()
    assert found[DELAY] == {("a.service", "run_queue"): 0, ("a.service", "block_io"): 1}
    assert found["shoal_block_io_waits_total"] == {("a.service",): 10}


def test_a_sum_does_not_fall_when_a_process_ends(machine: Machine) -> None:
    """What the dead had waited stays, what the living wait is added, and an empty unit keeps its series."""
    machine.cgroup("a.service", 7, 8)
    machine.process(7, stats(5))
    machine.process(8, stats(1))
    assert machine.scrape()[DELAY]["a.service", "run_queue"] == 6
    machine.cgroup("a.service", 8)
    machine.end(7)
    machine.process(8, stats(1.5))
    assert machine.scrape()[DELAY]["a.service", "run_queue"] == 6.5
    machine.cgroup("a.service")
    machine.end(8)
    assert machine.scrape()[DELAY]["a.service", "run_queue"] == 6.5
    shutil.rmtree(machine.root / "sys/fs/cgroup/a.service")
    assert machine.scrape()[DELAY] == {}


@pytest.mark.parametrize("source", ["taskstats", "threads"])
def test_a_process_that_stands_back_waits_apart(machine: Machine, source: str) -> None:
    """Waiting at nice 19 is a reason of its own, from the moment the process is niced, and of the run queue alone."""
    if source == "threads":
        machine.refusal = Unavailable(Reason.NO_PERMISSION, "refused")
    machine.cgroup("a.service", 7, 8)
    machine.process(7, stats(5), nice=19)
    machine.process(8, stats(1))
    found = machine.scrape()[DELAY]
    assert (found["a.service", "run_queue"], found["a.service", "run_queue_nice"]) == (1, 5)
    machine.process(8, stats(3, block_io=2), nice=1)
    found = machine.scrape()[DELAY]
    assert (found["a.service", "run_queue"], found["a.service", "run_queue_nice"]) == (1, 7)
    assert found.get(("a.service", "block_io")) == (2 if source == "taskstats" else None)


def test_a_process_id_given_again_is_another_process(machine: Machine) -> None:
    """The later process has waited longer than the earlier; all of it is new, as its start tells."""
    machine.cgroup("a.service", 7)
    machine.process(7, stats(5), started=100)
    machine.scrape()
    machine.process(7, stats(6), started=101)
    assert machine.scrape()[DELAY]["a.service", "run_queue"] == 11


def test_a_process_that_moves_takes_nothing_along(machine: Machine) -> None:
    """What it waited in the runtime's cgroup, before it was put into the container's, is not the container's."""
    machine.cgroup("runtime.service", 7)
    machine.cgroup("a.service")
    machine.process(7, stats(5))
    machine.scrape()
    machine.cgroup("runtime.service")
    machine.cgroup("a.service", 7)
    machine.process(7, stats(5.25))
    found = machine.scrape()[DELAY]
    assert (found["runtime.service", "run_queue"], found["a.service", "run_queue"]) == (5, 0.25)


def test_a_total_that_falls_back_is_not_counted_again(machine: Machine) -> None:
    """A thread that is ending is in the kernel's total twice for a moment; the moment passes without a trace."""
    machine.cgroup("a.service", 7)
    for waited in (5.0, 8.0, 6.0, 7.0, 8.0):
        machine.process(7, stats(waited))
        found = machine.scrape()
    assert found[DELAY]["a.service", "run_queue"] == 8


def test_a_process_that_ends_between_two_reads_costs_only_itself(machine: Machine) -> None:
    """It is still in cgroup.procs, and gone from proc or from netlink."""
    machine.cgroup("a.service", 7, 8, 9)
    for pid in (7, 8, 9):
        machine.process(pid, stats(1))
    machine.end(7)
    del machine.taskstats[8]
    assert machine.scrape()[DELAY]["a.service", "run_queue"] == 1
    assert "delays_run_queue" not in absent(machine.collector)


def test_the_budget_cuts_and_says_so(machine: Machine, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whoever waited longest to be asked comes first, and nobody is taken for dead and counted twice."""
    machine.cgroup("a.service", *range(1000, 1010))
    for pid in range(1000, 1010):
        machine.process(pid, stats(1))
    clock = count(step=0.1)
    monkeypatch.setattr(time, "monotonic", lambda: next(clock))
    monkeypatch.setattr(delays, "_BUDGET", 0.45)
    first = machine.scrape()
    assert first[SKIPPED] == {(): 6}
    assert first[DELAY]["a.service", "run_queue"] == 4
    second = machine.scrape()
    assert second[DELAY]["a.service", "run_queue"] == 8
    assert machine.scrape()[DELAY]["a.service", "run_queue"] == 10
    assert len(set(machine.asked[:10])) == 10
    assert machine.scrape()[DELAY]["a.service", "run_queue"] == 10


def test_without_the_capability_threads_are_read_one_by_one(machine: Machine) -> None:
    """All threads, not the first alone; one that ends keeps its part, and the other reasons are absent."""
    machine.refusal = Unavailable(Reason.NO_PERMISSION, "refused")
    machine.cgroup("a.service", 7)
    machine.process(7, stats(99), threads={7: 1, 8: 2, 9: 3})
    assert machine.scrape()[DELAY] == {("a.service", "run_queue"): 6}
    machine.process(7, stats(99), threads={7: 1.5, 9: 3})
    assert machine.scrape()[DELAY] == {("a.service", "run_queue"): 6.5}
    assert absent(machine.collector) == dict.fromkeys(
        ("delays_waits", "delays_compaction", "delays_copy_on_write", "delays_irq"), "no_permission"
    ) | {"delays_node": "not_in_kernel"}


def test_a_source_once_chosen_is_kept(machine: Machine) -> None:
    """What taskstats had counted cannot be continued thread by thread: the signal is lost for as long as it fails."""
    machine.cgroup("a.service", 7)
    machine.process(7, stats(5))
    machine.scrape()
    machine.refusal = Unavailable(Reason.NO_PERMISSION, "no more")
    assert DELAY not in machine.scrape()
    assert absent(machine.collector)["delays_run_queue"] == "no_permission"
    assert absent(machine.collector)["delays_waits"] == "no_permission"
    machine.refusal = None
    assert machine.scrape()[DELAY]["a.service", "run_queue"] == 5


def test_a_source_is_kept_when_a_better_one_comes(machine: Machine) -> None:
    """What was counted thread by thread is in the total of the process, and would be counted again."""
    machine.cgroup("a.service", 7)
    machine.process(7, stats(5))
    machine.refusal = Unavailable(Reason.NOT_IN_KERNEL, "no such family")
    machine.scrape()
    machine.refusal = None
    (machine.root / "proc/self").unlink()
    machine.scrape()
    (machine.root / "proc/self").symlink_to(str(os.getpid()))
    assert machine.scrape()[DELAY] == {("a.service", "run_queue"): 5}
    assert absent(machine.collector)["delays_waits"] == "not_in_kernel"


def test_a_process_that_cannot_be_read_once_is_not_counted_twice(machine: Machine) -> None:
    """It is alive, and what it had waited when it was last read is counted already."""
    machine.cgroup("a.service", 7, 8)
    machine.process(7, stats(5))
    machine.process(8, stats(1))
    machine.scrape()
    whole = (machine.root / "proc/7/stat").read_text()
    machine.write("proc/7/stat", whole[:20])
    assert machine.scrape()[DELAY]["a.service", "run_queue"] == 6
    machine.write("proc/7/stat", whole)
    assert machine.scrape()[DELAY]["a.service", "run_queue"] == 6


def test_a_failure_that_passes_chooses_no_source(machine: Machine) -> None:
    """A socket that could not be had this once is not the lack of a capability."""
    machine.cgroup("a.service", 7)
    machine.process(7, stats(5), threads={7: 3})
    machine.refusal = Unavailable(Reason.NOT_READABLE, "too many open files")
    assert DELAY not in machine.scrape()
    assert absent(machine.collector)["delays_run_queue"] == "not_readable"
    machine.refusal = None
    assert machine.scrape()[DELAY]["a.service", "run_queue"] == 5


def test_answers_that_are_not_understood(machine: Machine) -> None:
    """When no process can be read the signal is absent, with the reason, and not a sum of nothing."""
    machine.cgroup("a.service", 7)
    machine.process(7, stats(5))
    machine.refusal = ParseError("netlink taskstats", 1, "something else")
    assert DELAY not in machine.scrape()
    assert absent(machine.collector)["delays_run_queue"] == "malformed"


def test_accounting_that_is_off_is_absent_and_not_0(machine: Machine) -> None:
    """Whatever the kernel answers for what it does not count, it is not told; the run queue it always counts."""
    machine.cgroup("a.service", 7)
    machine.process(7, stats(5, block_io=5, others=5))
    machine.write("proc/sys/kernel/task_delayacct", "0\n")
    assert machine.scrape()[DELAY] == {("a.service", "run_queue"): 5}
    lost = absent(machine.collector)
    assert {lost[f"delays_{part}"] for part in ("waits", "compaction", "copy_on_write", "irq")} == {"disabled"}


@pytest.mark.parametrize(
    ("version", "missing"),
    [
        (10, {"compaction", "copy_on_write", "irq"}),
        (13, {"irq"}),
        (14, set()),
    ],
)
def test_what_an_older_kernel_does_not_count(machine: Machine, version: int, missing: set[str]) -> None:
    """A reason that this kernel's struct lacks is absent, with a signal that says so."""
    machine.taskstats[os.getpid()] = stats(0, version=version)
    machine.cgroup("a.service", 7)
    machine.process(7, stats(5, version=version, block_io=5, others=5))
    reasons = {reason for _, reason in machine.scrape()[DELAY]}
    assert reasons == {*delays._REASONS} - missing
    lost = absent(machine.collector)
    assert {name for name in lost if name != "delays_node"} == {f"delays_{reason}" for reason in missing}


def test_interrupts_that_the_kernel_does_not_time(machine: Machine) -> None:
    """Without CONFIG_IRQ_TIME_ACCOUNTING the struct has the member and it stays 0: absent, as irq pressure is."""
    machine.cgroup("a.service", 7)
    machine.process(7, stats(5, others=5))
    assert ("a.service", "irq") in machine.scrape()[DELAY]
    (machine.root / "proc/pressure/irq").unlink()
    assert ("a.service", "irq") not in machine.scrape()[DELAY]
    assert absent(machine.collector)["delays_irq"] == "not_in_kernel"


def test_another_pid_namespace(machine: Machine) -> None:
    """Ids of one namespace looked up in the proc of another would blame whoever has the same id there."""
    machine.cgroup("a.service", 7)
    machine.process(7, stats(5))
    (machine.root / "proc/self").unlink()
    (machine.root / "proc/self").symlink_to("1")
    assert DELAY not in machine.scrape()
    assert absent(machine.collector)["delays_run_queue"] == "no_permission"


def test_processes_that_the_namespace_does_not_show(machine: Machine) -> None:
    """cgroup.procs names them 0: there are some, and nothing can be said of them."""
    machine.cgroup("a.service", 0, 7)
    machine.process(7, stats(5))
    assert DELAY not in machine.scrape()
    assert absent(machine.collector)["delays_run_queue"] == "no_permission"


Scrape = dict[int, tuple[int, float]]


@given(
    st.lists(
        st.dictionaries(st.integers(1, 4), st.tuples(st.integers(0, 2), st.floats(0, 100)), max_size=4), max_size=12
    )
)
def test_no_history_makes_a_sum_fall(history: list[Scrape]) -> None:
    """{pid: (start, waited)} of some scrapes: the sum is that of every process's highest, and never falls."""
    sums = delays._Sums()
    owner = Owner(unit="a.service")
    highest: dict[tuple[int, int, int], float] = {}
    lives: dict[int, tuple[int, int]] = {}
    before = 0.0
    for number, scrape in enumerate(history):
        for pid, (started, waited) in scrape.items():
            if pid not in lives or lives[pid][0] != started:
                lives[pid] = (started, number)
            life = (pid, *lives[pid])
            highest[life] = max(highest.get(life, 0.0), waited)
            sums.add(owner, pid, started, {0: (waited,)})
        sums.forget({owner}, scrape)
        lives = {pid: life for pid, life in lives.items() if pid in scrape}
        for found, total in sums.items():
            assert found == owner
            assert total[0] >= before
            assert total[0] == pytest.approx(sum(highest.values()))
            before = total[0]


def test_throttling_of_those_that_have_a_quota(machine: Machine) -> None:
    """A quota in force, a new one, a lifted one, and none; a cgroup without the controller has nothing to say."""
    stat = "usage_usec 1\nnr_periods {}\nnr_throttled {}\nthrottled_usec {}\nnr_bursts {}\nburst_usec {}\n"
    for unit, numbers, quota, burst in (
        ("new.service", (0, 0, 0, 0, 0), "50000 100000", "0"),
        ("full.service", (224, 206, 18_259_931, 3, 1_500_000), "10000 100000", "5000"),
        ("lifted.service", (9, 1, 250_000, 0, 0), "max 100000", "0"),
        ("free.service", (0, 0, 0, 0, 0), "max 100000", "0"),
    ):
        machine.cgroup(unit)
        machine.write(f"sys/fs/cgroup/{unit}/cpu.stat", stat.format(*numbers))
        machine.write(f"sys/fs/cgroup/{unit}/cpu.max", f"{quota}\n")
        machine.write(f"sys/fs/cgroup/{unit}/cpu.max.burst", burst)
    machine.cgroup("none.service")
    found = machine.scrape()
    # One that was never throttled has the time alone, at 0; of how many periods is told once there was one.
    assert found[PERIODS] == {("full.service",): 224, ("lifted.service",): 9}
    assert found["shoal_cpu_throttled_periods_total"] == {("full.service",): 206, ("lifted.service",): 1}
    assert found[THROTTLED] == {("new.service",): 0, ("full.service",): 18.259931, ("lifted.service",): 0.25}
    assert found["shoal_cpu_burst_periods_total"] == {("full.service",): 3}
    assert found["shoal_cpu_burst_seconds_total"] == {("full.service",): 1.5}


def test_what_a_workload_used(machine: Machine) -> None:
    """From a second up, whether there is a quota or not; a pod's containers have what it used."""
    pod = "kubepods.slice/kubepods-podb2a4c6d8_1357_4e9f_a0b1_c2d3e4f5a6b7.slice"
    container = f"{pod}/cri-containerd-{'ab' * 32}.scope"
    for cgroup, used in ((pod, 9), (container, 9), ("busy.service", 2.5), ("idle.service", 0.9)):
        machine.cgroup(cgroup)
        stat = f"usage_usec {used * 1e6:.0f}\nnr_periods 0\nnr_throttled 0\nthrottled_usec 0\n"
        machine.write(f"sys/fs/cgroup/{cgroup}/cpu.stat", stat)
        machine.write(f"sys/fs/cgroup/{cgroup}/cpu.max", "max 100000\n")
    found = machine.scrape()["shoal_cpu_usage_seconds_total"]
    assert found == {("b2a4c6d8-1357-4e9f-a0b1-c2d3e4f5a6b7", "ab" * 6): 9, ("busy.service",): 2.5}


def test_one_damaged_cgroup_costs_the_others_nothing(machine: Machine) -> None:
    """A cpu.stat that is not understood is one workload's loss; all of them are the signal's."""
    machine.cgroup("bad.service")
    machine.write("sys/fs/cgroup/bad.service/cpu.stat", "nr_periods\n")
    assert PERIODS not in machine.scrape()
    assert absent(machine.collector)["delays_throttling"] == "malformed"
    machine.cgroup("good.service")
    machine.scrape()
    assert "delays_throttling" not in absent(machine.collector)


def test_the_cpu_controller_on_cgroup_v1(machine: Machine) -> None:
    """A hybrid node has the tree and not the controller: cgroup_v1, while delays go on."""
    machine.write("sys/fs/cgroup/cgroup.controllers", "\n")
    machine.cgroup("a.service", 7)
    machine.process(7, stats(5))
    found = machine.scrape()
    assert PERIODS not in found
    assert found[DELAY]["a.service", "run_queue"] == 5
    assert absent(machine.collector)["delays_throttling"] == "cgroup_v1"


def test_a_cpu_that_goes_off_line_takes_nothing_from_the_node(machine: Machine) -> None:
    """Its row goes, its count does not, and comes back as it was."""
    rows = {name: f"{name} 0 0 0 0 0 0 9 {seconds}000000000 1\n" for name, seconds in (("cpu0", 3), ("cpu1", 4))}
    for shown, expected in (("cpu0 cpu1", 7), ("cpu0", 7), ("cpu0 cpu1", 7)):
        machine.write("proc/schedstat", "version 15\ntimestamp 1\n" + "".join(rows[name] for name in shown.split()))
        assert machine.scrape()[NODE] == {(): expected}


@pytest.mark.parametrize("kernel", ["5.10", "6.1", "6.12"])
def test_a_recorded_node(kernel: str) -> None:
    """Real files: the node's run queues, the two containers with a quota, and no process of this PID namespace."""
    root = FIXTURES / kernel
    collector = DelaysCollector(resolve({}, {}))
    found = brief(collector.read(Node(Roots(f"{root}/proc", f"{root}/sys", f"{root}/rootfs"))))
    assert found[NODE][()] > 1
    api, ledger = ("shop", "checkout-7d9c5b6f4-x2x9k", "api"), ("payments", "ledger-0", "ledger")
    assert set(found[PERIODS]) == set(found[THROTTLED]) == {api, ledger}
    assert found["shoal_cpu_throttled_periods_total"][api] < found[PERIODS][api]
    assert found["shoal_cpu_burst_periods_total"] == {}
    assert absent(collector)["delays_run_queue"] == "no_permission"


@contextlib.contextmanager
def live_cgroup(name: str) -> Iterator[Path]:
    """Make a cgroup on the live kernel and remove it."""
    path = Path(find_hierarchy("/sys").mount, f"shoal-test-{os.getpid()}-{name}.service")
    path.mkdir()
    try:
        yield path
    finally:
        until = time.monotonic() + 5
        while (path / "cgroup.procs").read_text():
            assert time.monotonic() < until
            time.sleep(0.05)
        path.rmdir()


@pytest.fixture
def start() -> Iterator[Callable[[Path, str], int]]:
    """Give a function that runs a program in a cgroup, on the first CPU, until the test ends."""
    processes: list[subprocess.Popen[bytes]] = []

    def run(cgroup: Path, program: str) -> int:
        join = f"import os\nopen({str(cgroup / 'cgroup.procs')!r}, 'w').write(str(os.getpid()))\n"
        pinned = f"{join}os.sched_setaffinity(0, {{0}})\nprint(flush=True)\n{program}"
        process = subprocess.Popen([sys.executable, "-c", pinned], stdout=subprocess.PIPE)
        assert process.stdout is not None
        process.stdout.readline()
        processes.append(process)
        return process.pid

    yield run
    for process in processes:
        process.kill()
        process.communicate()


def wait_until_stopped(*pids: int) -> None:
    """Stop processes, and return when they stand still."""
    for pid in pids:
        os.kill(pid, signal.SIGSTOP)
    until = time.monotonic() + 5
    while any(") T " not in Path(f"/proc/{pid}/stat").read_text() for pid in pids):
        assert time.monotonic() < until
        time.sleep(0.01)


@pytest.mark.slow
@pytest.mark.root
@pytest.mark.parametrize("source", ["taskstats", "threads"])
def test_eight_spinners_beside_a_victim(
    start: Callable[[Path, str], int], monkeypatch: pytest.MonkeyPatch, source: str
) -> None:
    """On one CPU nine share: the victim waits most of the time, to the nanosecond as procfs has it, by either source.

    Who belongs to which workload is asked of ps, which reads /proc/<pid>/cgroup of every process.
    """
    if source == "threads":

        def refuse() -> None:
            raise Unavailable(Reason.NO_PERMISSION, "refused")

        monkeypatch.setattr(delays, "TaskStatsSocket", refuse)
    collector = DelaysCollector(resolve({}, {}))
    spin = "while True: pass"
    # Whoever starts the tests under nice(1) has these wait under it.
    run_queue = "run_queue_nice" if os.nice(0) > 0 else "run_queue"
    with live_cgroup("victim") as victim, live_cgroup("spinners") as spinners:
        try:
            pids = [start(victim, spin), *(start(spinners, spin) for _ in range(8))]
            before = brief(collector.read(Node(Roots())))[DELAY]
            time.sleep(1)
            wait_until_stopped(*pids)
            node = Node(Roots())
            after = brief(collector.read(node))[DELAY]
            listed = subprocess.run(
                ["ps", "-ww", "-eo", "pid=,cgroup="], check=True, capture_output=True, text=True
            ).stdout
            for cgroup in (victim, spinners):
                by_ps = {int(row.split()[0]) for row in listed.splitlines() if cgroup.name in row}
                assert node.processes()[Owner(unit=cgroup.name)] == by_ps
                waited = sum(int(Path(f"/proc/{pid}/schedstat").read_text().split()[1]) for pid in by_ps)
                assert after[cgroup.name, run_queue] == pytest.approx(waited / 1e9, abs=1e-8)
            growth = {name: after[name, run_queue] - before[name, run_queue] for name in (victim.name, spinners.name)}
            # Eight of nine parts of a second at best; 0.6 leaves room for what else the machine does to the clock.
            assert growth[victim.name] > 0.6
            assert growth[spinners.name] > 3 * growth[victim.name]
        finally:
            for pid in pids:
                os.kill(pid, signal.SIGKILL)
    assert not [labels for labels in brief(collector.read(Node(Roots())))[DELAY] if labels[0] == victim.name]
