"""What no machine in use may have done to it, done to the real exporter: `make test-vm`.

Memory that is throttled, a clock that jumps, a module that goes away under it.
"""

from __future__ import annotations

import subprocess
import threading
import time
from contextlib import ExitStack, contextmanager
from itertools import cycle, pairwise
from pathlib import Path
from typing import TYPE_CHECKING

from tests.e2e.process import exporter, fallen
from tests.lab.node import cgroup_mount, remove_cgroups
from tests.vm.table import full_table

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

SIGNALS = ("conntrack_entries", "conntrack_statistics", "conntrack_namespaces", "conntrack_dump")


@contextmanager
def unit(name: str) -> Iterator[tuple[Path, tuple[str, ...]]]:
    """Make a cgroup; yields it and the command to run others in it with."""
    mount = cgroup_mount()
    (mount / "cgroup.subtree_control").write_text("+memory +cpu")
    place = mount / name
    place.mkdir()
    try:
        yield place, ("sh", "-c", f'echo $$ >{place}/cgroup.procs && exec "$@"', "sh")
    finally:
        remove_cgroups(place)


def flat(file: Path) -> dict[str, int]:
    """Return what a flat keyed file of a cgroup has."""
    return {key: int(value) for key, value in map(str.split, file.read_text().splitlines())}


def test_memory_high(tmp_path: Path) -> None:
    """Above memory.high the kernel slows it down again and again; every scrape is answered, and all of them whole."""
    # What a file takes is charged to who reads it first. Were it the throttled one, its own code would be thrown out
    # under it again and again, and no scrape would ever end.
    with exporter() as first:
        first.scrape()
    with unit("robust.service") as (place, before), ExitStack() as stack:
        running = stack.enter_context(exporter(before=before, log=tmp_path / "log"))
        assert not running.scrape().failed
        # Of what it needs, which no reclaim can give back without swap. `kernel` is told since 5.18.
        has = flat(place / "memory.stat")
        needs = has["anon"] + has["file_mapped"] + has.get("kernel", 0)
        (place / "memory.high").write_text(str(needs * 95 // 100))
        scrapes = [running.scrape() for _ in range(5)]
        assert not any(scrape.failed for scrape in scrapes)
        events = flat(place / "memory.events")
        assert events["high"] > 0, "it was never above"
        assert events["oom_kill"] == 0
        # It says so of itself, as of any other unit: both how often, and how long it was made to wait.
        robust = {"unit": "robust.service"}
        assert scrapes[-1].named("shoal_memory_events_total", event="high", **robust)[0] > 0
        waits = [scrape.named("shoal_pressure_some_seconds_total", resource="memory", **robust) for scrape in scrapes]
        assert waits[-1] > waits[0]


@contextmanager
def jumping(*seconds: int) -> Iterator[None]:
    """Set the clock off by each of these in turn, twenty times a second, and so in the middle of scrapes too."""
    done = threading.Event()

    def jump() -> None:
        for offset in cycle(seconds):
            time.clock_settime(time.CLOCK_REALTIME, right() + offset)
            if done.wait(0.05):
                break

    thread = threading.Thread(target=jump)
    right = right_time()
    thread.start()
    try:
        yield
    finally:
        done.set()
        thread.join()
        time.clock_settime(time.CLOCK_REALTIME, right())


def right_time() -> Callable[[], float]:
    """Return what tells the time that it would be, had nobody set the clock."""
    offset = time.time() - time.monotonic()
    return lambda: time.monotonic() + offset


def test_a_clock_that_jumps(tmp_path: Path) -> None:
    """An hour forward, a day back, then all the time: no counter falls, nothing fails, no age is more than passed."""
    # So that there is a dump, whose age is told. It is not repeated, so that its age grows.
    subprocess.run(["modprobe", "nf_conntrack_netlink"], check=True)
    began, right = time.monotonic(), right_time()
    with exporter("--conntrack.dump-interval=86400", log=tmp_path / "log") as running:
        scrapes = [running.settled()]
        for seconds in (3600, -86_400, 0):
            time.clock_settime(time.CLOCK_REALTIME, right() + seconds)
            scrapes.append(running.scrape())
        with jumping(3600, -86_400):
            scrapes += [running.scrape() for _ in range(3)]
    for before, after in pairwise(scrapes):
        assert not after.failed
        assert not fallen(before, after)
        assert after.signals == before.signals
    passed = time.monotonic() - began
    for scrape in scrapes:
        assert len(scrape.named("shoal_conntrack_dump_age_seconds")) == 1
        # Prometheus would take another time for a restart.
        assert scrape.named("process_start_time_seconds") == scrapes[0].named("process_start_time_seconds")
        for (name, _), value in scrape.values.items():
            if name.startswith("shoal_") and name.endswith(("age_seconds", "duration_seconds", "unconfirmed_seconds")):
                assert 0 <= value <= passed, name


def unload() -> None:
    """Unload conntrack, and first what uses it: rules that another test has left, and their modules."""
    subprocess.run(["nft", "flush", "ruleset"], check=True)
    subprocess.run(["modprobe", "-r", "nft_ct", "nft_chain_nat", "nf_conntrack_netlink", "nf_conntrack"], check=True)


def test_a_module_that_is_unloaded(tmp_path: Path) -> None:
    """With conntrack its counters are there, without it absent with the reason, and asking does not load it.

    Loaded again it counts from 0, and what is told of it goes on from where it was.
    """

    def loaded() -> bool:
        return "\nnf_conntrack " in "\n" + Path("/proc/modules").read_text()

    unload()
    subprocess.run(["modprobe", "nf_conntrack_netlink"], check=True)
    with full_table(500):
        pass
    with exporter("--conntrack.dump-interval=10", log=tmp_path / "log") as running:
        there = running.settled()
        assert [there.signals[signal] for signal in SIGNALS] == [""] * len(SIGNALS)
        (dropped,) = there.named("shoal_conntrack_drop_total", netns="host")
        assert dropped > 100
        assert there.named("shoal_conntrack_dump_age_seconds")
        unload()
        assert not loaded()
        gone = running.scrape()
        assert not gone.failed
        told = {signal: gone.signals[signal] for signal in SIGNALS if signal != "conntrack_dump"}
        assert set(told.values()) == {"not_in_kernel"}
        names = {name for name, _ in gone.values if name.startswith("shoal_conntrack_")}
        assert not names & {"shoal_conntrack_entries", "shoal_conntrack_node_entries", "shoal_conntrack_drop_total"}
        # What the last dump has told is true of its time, and stands beside its age until the next one is due.
        until = time.monotonic() + 300
        while gone.signals["conntrack_dump"] != "not_in_kernel":
            assert time.monotonic() < until, gone.signals["conntrack_dump"]
            assert gone.named("shoal_conntrack_dump_age_seconds")
            time.sleep(1)
            gone = running.scrape()
        assert not {name for name, _ in gone.values if name.startswith("shoal_conntrack_")}
        assert not loaded(), "the scrapes have loaded it again"
        subprocess.run(["modprobe", "nf_conntrack_netlink"], check=True)
        back = running.scrape()
        told = {signal: back.signals[signal] for signal in SIGNALS if signal != "conntrack_dump"}
        assert set(told.values()) == {""}
        assert back.named("shoal_conntrack_drop_total", netns="host") == [dropped]
        assert not fallen(there, back)
