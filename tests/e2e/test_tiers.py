"""The real exporter under exactly the privileges of each tier: which signals are there, and what the others say."""

from __future__ import annotations

import os
import re
import subprocess
import sys
import time
import urllib.request

import pytest
from tests.e2e.process import free_port, stranger

pytestmark = pytest.mark.root

NOBODY = ("--reuid=65534", "--regid=65534", "--clear-groups")
NO_CAPABILITY = ("--bounding-set=-all", "--inh-caps=-all", "--no-new-privs")
TIER_2 = ("--bounding-set=-all,+net_admin,+sys_ptrace", "--inh-caps=-all", "--no-new-privs")
TIER_3 = ("--bounding-set=-all,+net_admin,+sys_ptrace,+sys_admin", "--inh-caps=-all", "--no-new-privs")

# What only a capability gives on this kernel. Its statistics of conntrack come without one, from a file that kernels
# without CONFIG_NF_CONNTRACK_PROCFS do not have; signals that depend on the kernel alone are in other tests.
NET_ADMIN = {"conntrack_dump", "delays_waits"}
SYS_ADMIN = {"ephemeral_ports_namespaces", "listen_queue_pods"}
ANYONE = {
    "conntrack_entries",
    "delays_run_queue",
    "ephemeral_ports_own",
    "ephemeral_ports_sockets",
    "listen_queue_listeners",
    "listen_queue_namespaces",
    "memory_oom_kills",
    "neighbours_entries",
    "neighbours_table",
    "pressure_node",
    "reverse_path_devices",
    "reverse_path_drops",
}


def signals(privileges: tuple[str, ...], *arguments: str) -> dict[str, str]:
    """Run the exporter with these privileges and return {signal: the reason of its absence, or ""}."""
    port = free_port()
    command = [sys.executable, "-m", "shoal", f"--web.listen-address=127.0.0.1:{port}", *arguments]
    environment = {name: value for name, value in os.environ.items() if not name.startswith("SHOAL_")}
    with stranger(), subprocess.Popen(["setpriv", *privileges, *command], env=environment) as process:
        try:
            text = scrape(f"http://127.0.0.1:{port}/metrics", process)
        finally:
            process.kill()
    assert not re.findall(r'^shoal_scrape_collector_success\{collector="(\w+)"\} 0', text, re.MULTILINE)
    found = re.findall(r'^shoal_signal_available\{signal="(\w+)"(?:,reason="(\w+)")?\} ([01])$', text, re.MULTILINE)
    assert all((reason == "") == (value == "1") for _, reason, value in found)
    return {signal: reason for signal, reason, _ in found}


def scrape(url: str, process: subprocess.Popen[bytes]) -> str:
    """Return the metrics as soon as the exporter answers."""
    deadline = time.monotonic() + 90
    while True:
        try:
            with urllib.request.urlopen(url, timeout=10) as answer:  # noqa: S310  (the exporter above)
                return str(answer.read().decode())
        except OSError:
            assert process.poll() is None, "the exporter ended"
            assert time.monotonic() < deadline, "the exporter does not answer"
            time.sleep(0.1)


@pytest.mark.parametrize("user", [NOBODY, ()], ids=["nobody", "root without capabilities"])
def test_tier_1(user: tuple[str, ...]) -> None:
    """Without any capability all counters are there; the rest says which privilege it lacks, or that it is off."""
    found = signals((*user, *NO_CAPABILITY))
    assert {signal for signal in ANYONE if found[signal]} == set()
    assert {found[signal] for signal in NET_ADMIN} == {"no_permission"}
    assert {found[signal] for signal in SYS_ADMIN} == {"not_enabled"}


def test_tier_2() -> None:
    """With CAP_NET_ADMIN and CAP_SYS_PTRACE no signal is refused any more; what is absent is the kernel's affair."""
    found = signals(TIER_2)
    assert {signal for signal in ANYONE if found[signal]} == set()
    assert "no_permission" not in found.values()
    assert found["conntrack_dump"] == ""
    assert {found[signal] for signal in SYS_ADMIN} == {"not_enabled"}


def test_tier_3() -> None:
    """With CAP_SYS_ADMIN and when asked, other network namespaces are looked into."""
    found = signals(TIER_3, "--netns.enter=true")
    assert {found[signal] for signal in SYS_ADMIN} == {""}
    assert "no_permission" not in found.values()


def test_asking_without_the_capability() -> None:
    """Asked to enter namespaces without being able to, it says so for each signal that wanted to."""
    found = signals(TIER_2, "--netns.enter=true")
    assert {found[signal] for signal in SYS_ADMIN} == {"no_permission"}
