"""Collector `inodes`: real file systems that run out or hang, what looks like it, and the counting of layers."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import threading
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
from tests.unit.outputs import absent, brief

from shoal.collectors import inodes
from shoal.collectors.inodes import InodesCollector
from shoal.inventory import Node
from shoal.kernel.files import Roots
from shoal.kernel.inodes import Count, Inodes, count_inodes
from shoal.settings import resolve

if TYPE_CHECKING:
    from collections.abc import Callable

    from tests.unit.outputs import Samples


FIXTURES = Path(__file__).parent / "fixtures"
TOTAL, FREE, STUCK = "shoal_filesystem_inodes", "shoal_filesystem_inodes_free", "shoal_filesystem_stuck"
SKIPPED, LAYER = "shoal_filesystems_skipped", "shoal_writable_layer_inodes"
AGE, CUT, OTHER = f"{LAYER}_age_seconds", f"{LAYER}_cut", "shoal_writable_layers_other_inodes"
STATES = "shoal_writable_layers"


def scene(name: str, tmp_path: Path) -> dict[str, Any]:
    """Play a scene in a mount namespace of its own; return what was seen in it."""
    program = Path(__file__).parent / "inodes_scene.py"
    played = subprocess.run(
        ["unshare", "--mount", sys.executable, str(program), name, str(tmp_path)],
        check=False,
        capture_output=True,
        text=True,
        timeout=60,
        env={**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)},
    )
    assert played.returncode == 0, played.stderr
    seen: dict[str, Any] = json.loads(played.stdout)
    return seen


@pytest.mark.root
def test_a_disk_without_inodes_and_with_space(tmp_path: Path) -> None:
    """An overlay on a small ext4 is filled until ENOSPC: no inode left, as df -i has it, and most bytes free."""
    seen = scene("full", tmp_path)
    disk = seen["disk"]
    (labels,) = [labels for labels in seen["after"][TOTAL] if labels.endswith(f",ext4,{disk}")]
    assert labels.startswith("/dev/loop")
    total, free, left = seen["df"][disk]
    assert seen["before"][FREE][labels] > 200
    assert seen["made"] > 200
    assert (seen["after"][TOTAL][labels], seen["after"][FREE][labels]) == (total, free) == (256, 0)
    assert left > 50 << 20
    assert seen["after"][STUCK][disk] == 0
    # The overlay would show the same numbers once more.
    assert not [labels for labels in seen["after"][TOTAL] if "overlay" in labels]


@pytest.mark.root
def test_what_looks_like_it_and_is_not(tmp_path: Path) -> None:
    """No bytes left but inodes; a tmpfs of a program; read-only and covered ones; a bind mount is no second device."""
    seen = scene("decoys", tmp_path)
    places, found = seen["places"], seen["scrape"]
    shown = {labels.rsplit(",", 1)[1]: labels for labels in found[TOTAL]}
    assert places["bytes"] in shown
    assert found[FREE][shown[places["bytes"]]] == seen["df"][places["bytes"]][1] > 200
    assert seen["df"][places["bytes"]][2] < 1 << 20
    assert seen["df"][places["tmpfs"]][1] == 0
    for decoy in ("tmpfs", "read_only", "covered", "bound"):
        assert places[decoy] not in shown
    assert found[SKIPPED]["covered"] >= 1
    root = shown[seen["root"][2]]
    assert root == ",".join(seen["root"])
    assert found[TOTAL][root] == seen["df"]["/"][0]
    assert found[FREE][root] == pytest.approx(seen["df"]["/"][1], abs=2000)


@pytest.mark.slow
@pytest.mark.root
@pytest.mark.skipif(not os.path.exists("/dev/fuse"), reason="this kernel has no FUSE")
def test_file_systems_that_hang(tmp_path: Path) -> None:
    """A FUSE server that answers nothing costs itself only, six of them four threads, and nothing when it is gone."""
    seen = scene("fuse", tmp_path)
    places = seen["places"]
    assert seen["one"][STUCK][places[0]] == 1
    assert 0.4 < seen["one"]["took"][""] < 2
    for scrape in seen["several"]:
        assert sum(scrape[STUCK].get(place, 0) for place in places) == 4
        assert scrape[SKIPPED]["crowded"] == 2
    # Those that hang already are not waited for again.
    assert seen["several"][0]["took"][""] < 4
    assert all(scrape["took"][""] < 0.4 for scrape in seen["several"][1:])
    assert seen["hanging"] == 4
    for scrape in (seen["one"], *seen["several"], seen["dead"], seen["gone"]):
        assert scrape[STUCK][seen["disk"]] == 0
        assert [value for labels, value in scrape[TOTAL].items() if labels.endswith(seen["disk"])] == [256]
    # A server that has died answers at once, with an error.
    assert seen["dead"][SKIPPED]["unreadable"] == 6
    for scrape in (seen["dead"], seen["gone"]):
        assert not [place for place in scrape[STUCK] if place in places]
    assert seen["left"] == 0


@pytest.mark.root
def test_the_writable_layer_of_a_container(tmp_path: Path) -> None:
    """300 files and a second name of one, in an upper directory named for trouble; 50 whiteouts share one inode."""
    seen = scene("layer", tmp_path)
    labels = f"{seen['container']},{seen['disk']}"
    assert seen["before"][LAYER] == {}
    # What du counts, which knows one file by its two names.
    assert seen["after"][LAYER] == {labels: seen["du"] + 1}
    assert seen["after"][CUT] == {labels: 0}
    assert 0 <= seen["after"][AGE][labels] < 5
    assert seen["after"][STATES]["counted"] == 1
    assert seen["gone"][LAYER] == {}
    total, free, _ = seen["df"][seen["disk"]]
    assert seen["du"] < total - free < seen["du"] + 30


@dataclass
class Machine:
    """A node of files: mounts of process 1, statfs of each, and containers with their layers."""

    root: Path
    statfs: dict[str, Inodes | OSError | Callable[[], Inodes]] = field(default_factory=dict)
    rows: list[str] = field(default_factory=list)
    interval: int = 300

    def __post_init__(self) -> None:
        """Lay out an empty node, of which this process is a part."""
        self.write("sys/fs/cgroup/cgroup.controllers", "memory")
        self.write("proc/1/mountinfo", "1 1 0:1 / /proc rw - proc proc rw\n")
        (self.root / "proc/self").symlink_to(str(os.getpid()))
        settings = resolve(
            {
                "path.sysfs": f"{self.root}/sys",
                "path.rootfs": str(self.root),
                "inodes.walk-interval": str(self.interval),
            }
        )
        self.roots = Roots(f"{self.root}/proc", f"{self.root}/sys", str(self.root))
        self.collector = InodesCollector(settings)
        self.layers = self.collector._layers
        self.layers._roots = self.roots

    def write(self, path: str, content: str) -> None:
        """Write one file of the node."""
        (self.root / path).parent.mkdir(parents=True, exist_ok=True)
        (self.root / path).write_text(content)

    def mount(
        self,
        device: str,
        place: str,
        said: Inodes | OSError | Callable[[], Inodes],
        *,
        fstype: str = "ext4",
        root: str = "/",
    ) -> None:
        """Mount a file system that will answer so."""
        self.rows.append(f"9 1 {device} {root} {place} rw - {fstype} /dev/{device} rw\n")
        self.write("proc/1/mountinfo", "".join(self.rows))
        self.statfs[f"{self.root}{place}"] = said

    def answer(self, path: str) -> Inodes:
        """Answer in place of the kernel."""
        said = self.statfs[path]
        if isinstance(said, OSError):
            raise said
        return said if isinstance(said, Inodes) else said()

    def container(self, number: int, files: int, *, options: str = "") -> str:
        """Make a container with so many files in its layer, and return its label."""
        identity = f"{number:012x}".ljust(64, "0")
        upper = self.root / f"layers/{number}"
        shutil.rmtree(upper, ignore_errors=True)
        upper.mkdir(parents=True)
        for name in range(files):
            (upper / f"file{name}").touch()
        self.write(f"sys/fs/cgroup/docker-{identity}.scope/cgroup.procs", f"{1000 + number}\n")
        options = options or f"upperdir=/layers/{number},workdir=/w"
        self.write(f"proc/{1000 + number}/mountinfo", f"1 1 0:9 / / rw - overlay overlay rw,lowerdir=/l,{options}\n")
        return identity[:12]

    def end(self, number: int) -> None:
        """End a container."""
        shutil.rmtree(self.root / f"sys/fs/cgroup/docker-{f'{number:012x}'.ljust(64, '0')}.scope")
        shutil.rmtree(self.root / f"proc/{1000 + number}")

    def scrape(self) -> Samples:
        """Read the node once."""
        return brief(self.collector.read(Node(self.roots)))


@pytest.fixture
def machine(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Machine:
    """Give a node of files."""
    made = Machine(tmp_path)
    monkeypatch.setattr(inodes, "read_inodes", made.answer)
    return made


def test_each_device_once_where_it_is_whole(machine: Machine) -> None:
    """Of several mounts of a device the whole comes before a part, the shorter path before the longer."""
    same = os.makedev(8, 1)
    machine.mount("8:1", "/var/lib/kubelet/pods/x/volume", Inodes(100, 50, same), root="/sub")
    machine.mount("8:1", "/a", Inodes(100, 50, same), root="/sub")
    machine.mount("8:1", "/var/lib/containerd", Inodes(100, 50, same))
    machine.mount("8:1", "/data", Inodes(100, 50, same))
    found = machine.scrape()
    assert found[TOTAL] == {("/dev/8:1", "ext4", "/data"): 100}
    assert found[FREE] == {("/dev/8:1", "ext4", "/data"): 50}
    assert found[STUCK] == {("/data",): 0}
    assert found[SKIPPED] == {("covered",): 0, ("unreadable",): 0, ("crowded",): 0, ("many",): 0}
    assert absent(machine.collector) == {}


def test_a_mount_that_is_covered_is_seen_at_another_place(machine: Machine) -> None:
    """What answers at a covered place is another device; a place that fails is passed over."""
    same, other = os.makedev(8, 1), os.makedev(8, 2)
    machine.mount("8:1", "/a", Inodes(9, 9, other))
    machine.mount("8:1", "/bb", OSError(5, "Input/output error"))
    machine.mount("8:1", "/ccc", Inodes(100, 50, same))
    machine.mount("8:3", "/d", Inodes(9, 9, other))
    machine.mount("8:4", "/e", OSError(5, "Input/output error"))
    found = machine.scrape()
    assert found[TOTAL] == {("/dev/8:1", "ext4", "/ccc"): 100}
    assert found[SKIPPED] == {("covered",): 1, ("unreadable",): 1, ("crowded",): 0, ("many",): 0}


def test_inodes_that_cannot_run_out_are_left_out(machine: Machine) -> None:
    """Their number is 0 where they are made as needed, on btrfs, whose device is also another than in mountinfo."""
    machine.mount("0:40", "/btrfs", Inodes(0, 0, 77), fstype="btrfs")
    found = machine.scrape()
    assert found[TOTAL] == {}
    assert sum(found[SKIPPED].values()) == 0
    assert absent(machine.collector) == {}


@pytest.mark.parametrize(
    ("fstype", "place", "shown"),
    [
        ("nfs4", "/mnt/nfs", True),
        ("fuse.sshfs", "/mnt/sshfs", True),
        ("a-new-one", "/mnt/new", True),
        ("tmpfs", "/run", True),
        ("tmpfs", "/run/lock", True),
        ("tmpfs", "/var/lib/kubelet/pods/x/volumes/kubernetes.io~projected/token", False),
        ("overlay", "/run/containerd/x/rootfs", False),
        ("autofs", "/mnt/auto", False),
        ("nsfs", "/run/netns/x", False),
    ],
)
def test_which_file_systems_are_real(machine: Machine, fstype: str, place: str, *, shown: bool) -> None:
    """Those of servers and of kinds unknown are; of tmpfs only those that the node itself stands on."""
    machine.mount("0:50", place, Inodes(10, 1, os.makedev(0, 50)), fstype=fstype)
    assert (("/dev/0:50", fstype, place) in machine.scrape()[TOTAL]) is shown


def test_the_fullest_are_shown_and_the_others_counted(machine: Machine) -> None:
    """Of 25 the 20 with the smallest part free; the other five are told by number."""
    for number in range(25):
        machine.mount(f"8:{number}", f"/disk{number}", Inodes(1000, 500 - 10 * number, os.makedev(8, number)))
    found = machine.scrape()
    assert {place for *_, place in found[TOTAL]} == {f"/disk{number}" for number in range(5, 25)}
    assert found[SKIPPED]["many",] == 5


def test_two_mounts_at_one_place_of_which_one_hangs(machine: Machine, monkeypatch: pytest.MonkeyPatch) -> None:
    """One series for the place, which is stuck."""
    monkeypatch.setattr(inodes, "_PATIENCE", 0.05)
    machine.collector = InodesCollector(resolve({}, {}))
    go = threading.Event()

    def hang() -> Inodes:
        go.wait(10)
        return Inodes(1, 1, 1)

    machine.mount("8:1", "/data", hang)
    machine.rows.append("10 9 8:2 / /data rw - ext4 /dev/8:2 rw\n")
    machine.write("proc/1/mountinfo", "".join(machine.rows))
    try:
        assert machine.scrape()[STUCK] == {("/data",): 1}
    finally:
        go.set()


def test_a_node_whose_mounts_are_not_shown(machine: Machine) -> None:
    """Under hidepid there is no process 1; without the node's root nothing is where mountinfo says."""
    machine.mount("8:1", "/a", OSError(2, "No such file or directory"))
    assert TOTAL not in machine.scrape()
    assert absent(machine.collector) == {"inodes_filesystems": "no_permission"}
    shutil.rmtree(machine.root / "proc/1")
    assert TOTAL not in machine.scrape()
    assert absent(machine.collector) == {"inodes_filesystems": "no_permission"}


def test_a_mountinfo_that_is_not_understood(machine: Machine) -> None:
    """The signal is absent with its reason, and the layers go on."""
    machine.write("proc/1/mountinfo", "nonsense\n")
    found = machine.scrape()
    assert TOTAL not in found
    assert STATES in found
    assert absent(machine.collector) == {"inodes_filesystems": "malformed"}


def test_layers_are_counted_in_the_background_and_read_in_the_scrape(machine: Machine) -> None:
    """What a scrape gives is the last count, with its age, and no more of a container that is gone."""
    machine.mount("8:1", "/", Inodes(100, 50, os.makedev(8, 1)))
    first, second = machine.container(1, 3), machine.container(2, 5)
    assert machine.scrape()[LAYER] == {}
    machine.layers.round()
    (machine.root / "layers/1/later").touch()
    found = machine.scrape()
    assert found[LAYER] == {(first,): 4, (second,): 6}
    assert found[CUT] == {(first,): 0, (second,): 0}
    assert 0 <= found[AGE][first,] < 1
    assert found[STATES] == {("counted",): 2, ("pending",): 0, ("unreadable",): 0, ("none",): 0}
    machine.end(2)
    assert machine.scrape()[LAYER] == {(first,): 4}
    machine.layers.round()
    assert machine.scrape()[LAYER] == {(first,): 5}


def test_the_layer_names_the_file_system_it_is_on(machine: Machine) -> None:
    """So that the container that uses up a file system's inodes is found by its mount point."""
    machine.mount("8:1", "/data", Inodes(100, 50, os.stat(machine.root).st_dev))
    dev = os.stat(machine.root).st_dev
    machine.rows[-1] = f"9 1 {os.major(dev)}:{os.minor(dev)} / /data rw - ext4 disk rw\n"
    machine.write("proc/1/mountinfo", machine.rows[-1])
    label = machine.container(1, 3)
    machine.layers.round()
    assert machine.scrape()[LAYER] == {(label, "/data"): 4}


def test_the_largest_layers_are_shown_and_the_others_summed(machine: Machine) -> None:
    """Ten of twelve have a series; what is in the other two is not lost."""
    labels = [machine.container(number, number) for number in range(1, 13)]
    machine.layers.round()
    found = machine.scrape()
    assert {label for (label,) in found[LAYER]} == set(labels[2:])
    assert found[OTHER] == {(): 2 + 3}


def test_a_round_has_a_budget_and_the_oldest_come_first(machine: Machine, monkeypatch: pytest.MonkeyPatch) -> None:
    """With time for two of five in a round, three rounds count all of them, whoever is largest."""
    clock = [0.0]
    monkeypatch.setattr(time, "monotonic", lambda: clock[0])

    def slow(directory: str, give_up: Callable[[], bool]) -> Count:
        clock[0] += 3
        return count_inodes(directory, give_up)

    monkeypatch.setattr(inodes, "count_inodes", slow)
    for number in range(1, 6):
        machine.container(number, 10 * number)
    for counted in (2, 4, 5):
        machine.layers.round()
        states = machine.scrape()[STATES]
        assert (states["counted",], states["pending",]) == (counted, 5 - counted)
        clock[0] += 300


def test_a_layer_too_large_for_its_budget_is_cut_and_says_so(machine: Machine, monkeypatch: pytest.MonkeyPatch) -> None:
    """What was counted until then is a lower bound."""
    monkeypatch.setattr(inodes, "_ONE_LAYER", -1.0)
    label = machine.container(1, 1000)
    machine.layers.round()
    found = machine.scrape()
    assert found[CUT] == {(label,): 1}
    assert 100 < found[LAYER][label,] < 1000


def test_containers_without_a_layer_to_count(machine: Machine) -> None:
    """Another root, a read-only one, a directory that only the runtime knows, one that is not there, and garbage."""
    machine.container(1, 1)
    machine.write("proc/1001/mountinfo", "1 1 0:9 / / rw - btrfs /dev/sda rw\n")
    machine.container(2, 1, options="rw")
    machine.container(3, 1, options="upperdir=abc/diff")
    Path(f"{machine.root}abc/diff").mkdir(parents=True)
    machine.container(4, 1, options="upperdir=/not/there")
    machine.container(5, 1)
    machine.write("proc/1005/mountinfo", "nonsense\n")
    machine.container(6, 1)
    (machine.root / "proc/1006/mountinfo").unlink()
    machine.layers.round()
    found = machine.scrape()
    assert found[LAYER] == {}
    assert found[STATES] == {("counted",): 0, ("pending",): 0, ("unreadable",): 3, ("none",): 2}


def test_a_layer_that_cannot_be_read_any_more(machine: Machine) -> None:
    """Its last count is not shown for ever."""
    machine.container(1, 3)
    machine.layers.round()
    shutil.rmtree(machine.root / "layers/1")
    machine.layers.round()
    found = machine.scrape()
    assert found[LAYER] == {}
    assert (found[STATES]["counted",], found[STATES]["unreadable",]) == (0, 1)


def test_a_container_that_was_started_anew(machine: Machine, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its layer is another directory, and the count of the old one is not shown for it."""
    label = machine.container(1, 3)
    machine.layers.round()
    machine.container(2, 9)
    row = "1 1 0:9 / / rw - overlay overlay rw,upperdir=/layers/2\n"
    machine.write("proc/1001/mountinfo", row)
    machine.end(2)
    with monkeypatch.context() as patch:
        patch.setattr(inodes, "_ONE_ROUND", -1.0)
        machine.layers.round()
    found = machine.scrape()
    assert found[LAYER] == {}
    assert found[STATES]["pending",] == 1
    machine.layers.round()
    assert machine.scrape()[LAYER] == {(label,): 10}


def test_units_and_pods_as_a_whole_have_no_layer(machine: Machine) -> None:
    """Only containers are asked."""
    machine.container(1, 3)
    machine.end(1)
    machine.write("sys/fs/cgroup/a.service/cgroup.procs", "1001\n")
    machine.write("proc/1001/mountinfo", "1 1 0:9 / / rw - overlay overlay rw,upperdir=/layers/1\n")
    machine.layers.round()
    assert sum(machine.scrape()[STATES].values()) == 0


def test_counting_switched_off(tmp_path: Path) -> None:
    """--inodes.walk-interval 0: no thread, no series, and the reason."""
    machine = Machine(tmp_path, interval=0)
    machine.layers.start()
    assert machine.layers._thread is None
    assert LAYER not in machine.scrape()
    assert absent(machine.collector)["inodes_layers"] == "not_enabled"


def test_the_thread_goes_on_after_a_failure_and_ends(machine: Machine) -> None:
    """What a round fails with is the signal's reason until a round succeeds; stop ends the thread at once."""
    machine.layers._interval = 0.01  # type: ignore[assignment]  # fractions are for tests
    own, processes = machine.root / "proc/self", "sys/fs/cgroup/a.service/cgroup.procs"
    own.unlink()
    machine.layers.start()
    thread = machine.layers._thread
    assert thread is not None

    def wait_until(reason: str | None) -> None:
        until = time.monotonic() + 5
        while machine.scrape() and absent(machine.collector).get("inodes_layers") != reason:
            assert time.monotonic() < until
            time.sleep(0.01)

    wait_until("no_permission")
    own.symlink_to(str(os.getpid()))
    wait_until(None)
    machine.write(processes, "x\n")
    wait_until("malformed")
    machine.write(processes, "")
    wait_until(None)
    machine.layers.stop()
    assert not thread.is_alive()


async def test_the_collector_starts_and_stops_without_blocking(machine: Machine) -> None:
    """The event loop waits for no thread, and a collector that was never started can be stopped."""
    await InodesCollector(machine.collector.settings).stop()
    await machine.collector.start()
    await machine.collector.stop()


@pytest.mark.parametrize("kernel", ["5.10", "6.1", "6.12"])
def test_a_recorded_node(kernel: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of the mounts of a real kernel three are asked: the loop device and the node's own tmpfs; / is read-only."""
    asked = []

    def answer(path: str) -> Inodes:
        asked.append(path)
        raise OSError(2, "No such file or directory")

    monkeypatch.setattr(inodes, "read_inodes", answer)
    root = FIXTURES / kernel
    collector = InodesCollector(resolve({}, {}))
    collector.read(Node(Roots(f"{root}/proc", f"{root}/sys", "")))
    assert sorted(asked) == ["/dev/shm", "/run", "/run/shoal-disk"]  # noqa: S108  (nothing is written there)
