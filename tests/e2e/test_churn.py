"""Pods that come and go ten times a second while the real exporter is scraped: every scrape is whole and true."""

from __future__ import annotations

import os
import re
import signal
import socket
import subprocess
import sys
import threading
import time
import urllib.request
from contextlib import closing, contextmanager, suppress
from pathlib import Path
from typing import TYPE_CHECKING

import pytest
from prometheus_client.parser import text_string_to_metric_families

if TYPE_CHECKING:
    from collections.abc import Iterator

pytestmark = pytest.mark.root

SECONDS, PODS = 6, 30


def mount_point() -> Path:
    """Return where cgroup v2 is mounted, alone or beside v1."""
    mounts = (Path("/sys/fs/cgroup"), Path("/sys/fs/cgroup/unified"))
    return next(mount for mount in mounts if (mount / "cgroup.controllers").exists())


class Pod:
    """A cgroup as a container runtime names it, with a process in it that has a network namespace of its own."""

    def __init__(self) -> None:
        self.uid = "-".join(os.urandom(size).hex() for size in (4, 2, 2, 2, 6))
        self.pod = mount_point() / f"kubepods-churn{os.getpid()}-pod{self.uid.replace('-', '_')}.slice"
        self.container = self.pod / f"cri-containerd-{os.urandom(32).hex()}.scope"
        self.container.mkdir(parents=True)
        self.process = subprocess.Popen(["unshare", "--net", "sleep", "60"])
        (self.container / "cgroup.procs").write_text(str(self.process.pid))

    def end(self) -> None:
        """Kill the process and remove the cgroups, as a runtime does."""
        self.process.kill()
        self.process.wait()
        for cgroup in (self.container, self.pod):
            for _ in range(200):
                with suppress(OSError):
                    cgroup.rmdir()
                    break
                time.sleep(0.01)


@contextmanager
def churn() -> Iterator[list[str]]:
    """Make and end ten pods a second in the background; yields a list with the UID of each that was made."""
    made: list[str] = []
    stop = threading.Event()

    def run() -> None:
        pods: list[Pod] = []
        try:
            while not stop.wait(0.1):
                pods.append(Pod())
                made.append(pods[-1].uid)
                if len(pods) > 5:
                    pods.pop(0).end()
        finally:
            for pod in pods:
                pod.end()

    thread = threading.Thread(target=run)
    thread.start()
    try:
        yield made
    finally:
        stop.set()
        thread.join()


def test_every_scrape_during_churn_is_whole() -> None:
    """No collector fails, no series is there twice, and afterwards nothing of the pods is left, in output or memory."""
    with closing(socket.socket()) as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    command = [sys.executable, "-m", "shoal", f"--web.listen-address=127.0.0.1:{port}", "--netns.enter=true"]

    def scrape() -> str:
        url = f"http://127.0.0.1:{port}/metrics"
        with urllib.request.urlopen(url, timeout=20) as answer:
            return str(answer.read().decode())

    with subprocess.Popen(command, stderr=subprocess.PIPE, text=True) as exporter:
        try:
            deadline = time.monotonic() + 60
            while time.monotonic() < deadline:
                with suppress(OSError):
                    scrape()
                    break
                time.sleep(0.1)
            seen: set[str] = set()
            with churn() as made:
                began = time.monotonic()
                # However few scrapes a slow machine has time for.
                while time.monotonic() < began + SECONDS or len(seen) < PODS:
                    assert time.monotonic() < began + 100, "the pods are not seen"
                    text = scrape()
                    assert not re.findall(r"^shoal_scrape_collector_success\{.*\} 0", text, re.MULTILINE)
                    assert 'reason="malformed"' not in text
                    series = [
                        (sample.name, tuple(sorted(sample.labels.items())))
                        for family in text_string_to_metric_families(text)
                        for sample in family.samples
                    ]
                    assert len(series) == len(set(series)), "a series is there twice"
                    told = re.findall(r'^shoal_pressure_some_seconds_total\{pod="([^"]+)"', text, re.MULTILINE)
                    # The machine may have pods of others.
                    seen.update(set(told) & set(made))
            after = scrape()
            assert not any(pod in after for pod in seen)
            inodes = {os.stat(f"/proc/{exporter.pid}/fd/{fd}").st_ino for fd in os.listdir(f"/proc/{exporter.pid}/fd")}
            assert len(inodes) < 40, "descriptors were left open"
        finally:
            exporter.send_signal(signal.SIGTERM)
            _, log = exporter.communicate(timeout=20)
    assert "Traceback" not in log
    assert "collector failed" not in log
