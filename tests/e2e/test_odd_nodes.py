"""The real exporter among names that are made to break a format, and namespaces that no process is in."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import time
import urllib.request
from contextlib import ExitStack, closing, contextmanager, suppress
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
from prometheus_client.openmetrics.parser import text_string_to_metric_families as parse_openmetrics
from prometheus_client.parser import text_string_to_metric_families as parse_text
from tests.bench.target import EXPORTER, running

from shoal.kernel.namespaces import open_in_namespace

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    Series = set[tuple[str, frozenset[tuple[str, str]]]]

pytestmark = pytest.mark.root

ODD = 'a "quoted" name, \\ and 🐟 } 1\\n'
LONGEST_NAME = 255
LONGEST_PATH = 4095
FORMATS: dict[str, Any] = {"text/plain": parse_text, "application/openmetrics-text": parse_openmetrics}
LISTEN = (
    "import socket, sys; s = socket.create_server(('127.0.0.1', 8099)); print('there', flush=True); sys.stdin.read()"
)
MOUNT_AND_RUN = """
import ctypes, os, sys
libc = ctypes.CDLL(None, use_errno=True)
if libc.mount(sys.argv[1].encode(), sys.argv[2].encode(), b"ext4", 0, None):
    sys.exit(os.strerror(ctypes.get_errno()))
os.execv(sys.argv[3], sys.argv[3:])
"""


def longest(name: str, ending: str = "") -> str:
    """Return a name that begins so and is as long as a file's name may be."""
    return name + "x" * (LONGEST_NAME - len((name + ending).encode())) + ending


@contextmanager
def exporter(*arguments: str, before: tuple[str, ...] = ()) -> Iterator[Callable[[], Series]]:
    """Run the exporter; yield a function that scrapes it in both formats and returns the series that are in both."""
    with closing(socket.socket()) as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    command = [*before, sys.executable, "-m", "shoal", f"--web.listen-address=127.0.0.1:{port}", *arguments]
    environment = {name: value for name, value in os.environ.items() if not name.startswith("SHOAL_")}

    def get(kind: str) -> str:
        request = urllib.request.Request(f"http://127.0.0.1:{port}/metrics", headers={"Accept": kind})
        with urllib.request.urlopen(request, timeout=30) as answer:  # noqa: S310  (our own)
            return str(answer.read().decode())

    def scrape() -> Series:
        found = []
        for kind, parse in FORMATS.items():
            samples = [sample for family in parse(get(kind)) for sample in family.samples]
            failed = [one.labels for one in samples if one.name == "shoal_scrape_collector_success" and not one.value]
            assert not failed
            series = [(sample.name, frozenset(sample.labels.items())) for sample in samples]
            assert len(series) == len(set(series)), "a series is there twice"
            found.append(set(series))
        return found[0] & found[1]

    with subprocess.Popen(command, stderr=subprocess.PIPE, text=True, env=environment) as process:
        try:
            until = time.monotonic() + 30
            while process.poll() is None and time.monotonic() < until:
                with suppress(OSError):
                    get("text/plain")
                    break
                time.sleep(0.1)
            yield scrape
        finally:
            # What unshare has started has a signal of its own from it.
            process.send_signal(signal.SIGKILL if before else signal.SIGTERM)
            _, log = process.communicate(timeout=20)
    assert "Traceback" not in log


def labelled(series: Series, label: str, value: str) -> set[str]:
    """Return the names of the metrics that have a label of this value."""
    return {name for name, labels in series if (label, value) in labels}


def test_a_namespace_without_a_process() -> None:
    """It has no series, and costs none; once a process is in it, under its odd name, it has, and again none after."""
    name = longest(f"{os.getpid()} {ODD} two\nlines")
    with ExitStack() as stack:
        subprocess.run(["ip", "netns", "add", name], check=True)
        stack.callback(subprocess.run, ["ip", "netns", "delete", name], check=True)
        subprocess.run(["ip", "-n", name, "link", "set", "lo", "up"], check=True)
        scrape = stack.enter_context(exporter("--netns.enter=true"))
        assert not labelled(scrape(), "netns", name)
        command = ["ip", "netns", "exec", name, sys.executable, "-c", LISTEN]
        pipe = subprocess.PIPE
        with subprocess.Popen(command, stdin=pipe, stdout=pipe) as process:
            assert process.stdout
            assert process.stdout.readline() == b"there\n"
            there = labelled(scrape(), "netns", name)
            process.kill()
        assert {"shoal_listen_queue_overflows_total", "shoal_listener_accept_queue_limit"} <= there
        assert not labelled(scrape(), "netns", name)


def cgroup_mount() -> Path:
    """Return where cgroup v2 is mounted, alone or beside v1."""
    mounts = (Path("/sys/fs/cgroup"), Path("/sys/fs/cgroup/unified"))
    return next(mount for mount in mounts if (mount / "cgroup.controllers").exists())


def test_a_unit_with_an_odd_name() -> None:
    """A cgroup is named as whoever makes it likes, but for a newline, which the kernel refuses."""
    mount = cgroup_mount()
    name = longest(f"shoal{os.getpid()} {ODD}", ".service")
    with ExitStack() as stack:
        (mount / name).mkdir()
        stack.callback((mount / name).rmdir)
        scrape = stack.enter_context(exporter())
        with subprocess.Popen(["sleep", "60"]) as process:
            (mount / name / "cgroup.procs").write_text(str(process.pid))
            assert "shoal_pressure_some_seconds_total" in labelled(scrape(), "unit", name)
            process.kill()


def test_a_mount_point_of_4095_bytes(tmp_path: Path) -> None:
    """As long as the kernel takes, in odd names; the file system is there under its whole name."""
    place = str(tmp_path)
    while (left := LONGEST_PATH - len(place.encode()) - 1) > 0:
        part = longest(f"{ODD} two\nlines")
        place += "/" + (part if left > LONGEST_NAME + 20 else "y" * min(left, LONGEST_NAME - 20))
    os.makedirs(place)
    assert len(place.encode()) == LONGEST_PATH
    image = tmp_path / "image"
    subprocess.run(["truncate", "-s", "4M", str(image)], check=True)
    subprocess.run(["mkfs.ext4", "-q", "-F", str(image)], check=True)
    device = subprocess.run(["losetup", "--find", "--show", str(image)], check=True, capture_output=True, text=True)
    loop = device.stdout.strip()
    # The exporter reads the mounts of process 1, so it has to be that.
    unshare = ("unshare", "--mount", "--pid", "--fork", "--mount-proc", "--kill-child=TERM")
    before = (*unshare, sys.executable, "-c", MOUNT_AND_RUN, loop, place)
    try:
        with exporter(before=before) as scrape:
            assert "shoal_filesystem_inodes" in labelled(scrape(), "mountpoint", place)
    finally:
        subprocess.run(["losetup", "--detach", loop], check=True)


def test_a_pod_and_a_container_with_odd_names(tmp_path: Path) -> None:
    """No API server gives such names; a directory of the kubelet's may have them, a newline and all."""
    uid = "-".join(os.urandom(size).hex() for size in (4, 2, 2, 2, 6))
    identity = os.urandom(32).hex()
    namespace, pod, container = f"namespace {ODD}", f"pod {ODD} two\nlines", f"container {ODD}"
    (tmp_path / "var/log/pods" / f"{namespace}_{pod}_{uid}" / container).mkdir(parents=True)
    logs = tmp_path / "var/log/containers"
    logs.mkdir()
    (logs / f"{pod}_{namespace}_{container}-{identity}.log").touch()
    slice_ = cgroup_mount() / f"kubepods-odd{os.getpid()}-pod{uid.replace('-', '_')}.slice"
    scope = slice_ / f"cri-containerd-{identity}.scope"
    with ExitStack() as stack:
        slice_.mkdir()
        stack.callback(slice_.rmdir)
        scope.mkdir()
        stack.callback(scope.rmdir)
        scrape = stack.enter_context(exporter(f"--path.rootfs={tmp_path}"))
        with subprocess.Popen(["unshare", "--net", "sleep", "60"]) as process:
            (scope / "cgroup.procs").write_text(str(process.pid))
            found = scrape()
            process.kill()
    whose = {("namespace", namespace), ("pod", pod)}
    of_pod = {name for name, labels in found if whose <= labels}
    of_container = {name for name, labels in found if {*whose, ("container", container)} <= labels}
    assert "shoal_listen_queue_overflows_total" in of_pod
    assert {"shoal_pressure_some_seconds_total", "shoal_delay_seconds_total"} <= of_container


def test_devices_with_odd_names() -> None:
    """A device's name has 15 bytes, any but blanks, slashes and colons."""
    odd = ['"quoted"', "back\\slash\\n", '{a="b"},#', "🐟🐟🐟"]
    lines = ["link set lo up"]
    for number in range(len(odd)):
        lines += [
            f"link add d{number} type veth peer name p{number}",
            f"link set p{number} up",
            f"address add 10.81.{number}.1/24 dev d{number}",
        ]
    with subprocess.Popen(
        ["unshare", "--net", "sh", "-c", "echo there; exec cat"], stdin=subprocess.PIPE, stdout=subprocess.PIPE
    ) as process:
        try:
            assert process.stdout
            assert process.stdout.readline() == b"there\n"
            inside = ["nsenter", "--net", f"--target={process.pid}"]
            subprocess.run([*inside, "ip", "-batch", "-"], input="\n".join(lines), text=True, check=True)
            for number, name in enumerate(odd):
                for command in (
                    ["link", "set", f"d{number}", "name", name],
                    ["link", "set", name, "up"],
                    ["neighbour", "add", f"10.81.{number}.2", "lladdr", "02:00:00:00:00:01", "dev", name],
                ):
                    subprocess.run([*inside, "ip", *command], check=True)
            there = partial(open_in_namespace, "/proc", process.pid)
            with running("shoal", [*inside, sys.executable, "-m", "shoal"], cwd=EXPORTER, there=there) as target:
                target.scrape()
        finally:
            process.kill()
    parse = FORMATS["application/openmetrics-text"]
    samples = [sample for family in parse(target.text.decode()) for sample in family.samples]
    assert not [one.labels for one in samples if one.name == "shoal_scrape_collector_success" and not one.value]
    for metric in ("shoal_reverse_path_filter_mode", "shoal_neighbours_entries"):
        assert {sample.labels["device"] for sample in samples if sample.name == metric} >= set(odd)
