"""What no machine in use may have done to it, done to the real exporter: `make test-vm`.

Memory that is throttled, a clock that jumps, a module that goes away under it.
"""

from __future__ import annotations

import os
import subprocess
import time
from contextlib import ExitStack, contextmanager
from itertools import pairwise
from pathlib import Path
from typing import TYPE_CHECKING

from tests.e2e.process import exporter, fallen
from tests.lab.node import cgroup_mount, remove_cgroups

if TYPE_CHECKING:
    from collections.abc import Iterator

SIGNALS = ("conntrack_entries", "conntrack_statistics", "conntrack_namespaces")


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
    with unit("robust.service") as (place, before), ExitStack() as stack:
        running = stack.enter_context(exporter(before=before, log=tmp_path / "log"))
        assert not running.scrape().failed
        # Of what it needs, which no reclaim can give back without swap: how much that is depends on the machine, and
        # which files' pages are charged to it on who has read them before.
        needs = flat(place / "memory.stat")["anon"]
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


def test_a_clock_that_jumps(tmp_path: Path) -> None:
    """An hour forward, a day back: no counter falls, no age or duration is below 0 or of an hour, nothing times out."""
    with exporter(log=tmp_path / "log") as running:
        scrapes = [running.settled()]
        now = time.time()
        for seconds in (3600, -86_400, 0):
            time.clock_settime(time.CLOCK_REALTIME, now + seconds)
            scrapes.append(running.scrape())
    for before, after in pairwise(scrapes):
        assert not after.failed
        assert not fallen(before, after)
        assert after.signals == before.signals
    for scrape in scrapes:
        for (name, _), value in scrape.values.items():
            if name.startswith("shoal_") and name.endswith(("age_seconds", "duration_seconds", "unconfirmed_seconds")):
                assert 0 <= value < 1800, name


def unload() -> None:
    """Unload conntrack, and first what uses it: rules that another test has left, and their modules."""
    subprocess.run(["nft", "flush", "ruleset"], check=True)
    subprocess.run(["modprobe", "-r", "nft_ct", "nft_chain_nat", "nf_conntrack_netlink", "nf_conntrack"], check=True)


def test_a_module_that_is_unloaded(tmp_path: Path) -> None:
    """With conntrack its counters are there, without it absent with the reason, and asking does not load it."""

    def loaded() -> bool:
        return "\nnf_conntrack " in "\n" + Path("/proc/modules").read_text()

    unload()
    subprocess.run(["modprobe", "nf_conntrack"], check=True)
    with exporter(log=tmp_path / "log") as running:
        there = running.scrape()
        assert [there.signals[signal] for signal in SIGNALS] == [""] * 3
        assert there.named("shoal_conntrack_drop_total", netns="host")
        unload()
        assert not loaded()
        gone = running.scrape()
        assert not gone.failed
        assert [gone.signals[signal] for signal in SIGNALS] == ["not_in_kernel"] * 3
        names = {name for name, _ in gone.values if name.startswith("shoal_conntrack_")}
        assert not names & {"shoal_conntrack_entries", "shoal_conntrack_node_entries", "shoal_conntrack_drop_total"}
        assert not loaded(), "the scrape has loaded it again"
        subprocess.run(["modprobe", "nf_conntrack"], check=True)
        back = running.scrape()
        assert [back.signals[signal] for signal in SIGNALS] == [""] * 3
        assert not fallen(there, back)
        assert os.path.exists(f"/proc/{running.process.pid}")
