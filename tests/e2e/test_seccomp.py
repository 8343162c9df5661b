"""The exporter under exactly the privileges and system calls that the chart can leave it: nothing is missing."""

from __future__ import annotations

import ctypes
import json
import os
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from tests.e2e.seccomp_stage import PROFILES, TIERS, granted, listed, stage

pytestmark = pytest.mark.root

FILTERED = Path(__file__).with_name("filtered.py")


def under(file: str | Path, action: str) -> list[str]:
    """Return how a command is put under a profile."""
    return [sys.executable, str(FILTERED), str(PROFILES / file), action]


@pytest.mark.parametrize("tier", TIERS)
def test_nothing_outside_the_profile_is_called(tier: str) -> None:
    """From its start to its end, doing all that it can: one call more, and the kernel would have killed it.

    No signal lacks a permission that the tier gives, and what the kernel offers is there.
    """
    signals, status, log = stage(tier, after=under(TIERS[tier], "kill"))
    assert status == 0, log
    assert "Traceback" not in log
    there = {name for name, reason in signals.items() if not reason}
    assert {"listen_queue_listeners", "memory_oom_kills", "pressure_node", "redis_aof_servers"} <= there
    refused = {name for name, reason in signals.items() if reason == "no_permission"}
    if tier == "counters":
        assert {"conntrack_dump", "delays_waits"} <= refused
    else:
        assert refused == set()
        assert "conntrack_dump" in there
    assert ("listen_queue_pods" in there) is (tier == "full")


def test_the_profile_as_it_is_hides_no_signal() -> None:
    """Refused or not, the same signals are there as without it."""
    without, status, _ = stage("full")
    assert status == 0
    within, status, _ = stage("full", after=under("shoal-full.json", "errno"))
    assert status == 0
    # Watches of endpoints come and go by themselves.
    assert {**within, "conntrack_endpoints": ""} == {**without, "conntrack_endpoints": ""}


CALLS = {
    "ptrace": "ctypes.CDLL(None, use_errno=True).ptrace(0, 0, 0, 0)",
    "a process": "os.fork()",
    "a mount": "ctypes.CDLL(None, use_errno=True).mount(b'x', b'/tmp', b'tmpfs', 0, 0)",
    "a user namespace": "ctypes.CDLL(None, use_errno=True).unshare(0x10000000)",
    "a socket of another family": "socket.socket(socket.AF_ALG)",
    "a file made": "os.mkdir('/tmp/shoal-seccomp-made')",
    "a file removed": "os.unlink('/tmp/shoal-seccomp-none')",
    "another namespace than a network": "ctypes.CDLL(None, use_errno=True).setns(0, 0x20000000)",
}


@pytest.mark.parametrize("call", CALLS)
def test_what_is_not_in_the_profile_is_not_called(call: str) -> None:
    """The filter that the test above passes is one: what an intruder would want ends the process, or fails."""
    program = f"import ctypes, os, socket; answer = {CALLS[call]}; print(answer)"
    command = ["setpriv", *granted("full"), *under("shoal-full.json", "kill"), sys.executable, "-c", program]
    killed = subprocess.run(command, capture_output=True, text=True, timeout=20, check=False)
    assert killed.returncode == -signal.SIGSYS, killed
    command[command.index("kill")] = "errno"
    refused = subprocess.run(command, capture_output=True, text=True, timeout=20, check=False)
    assert "Function not implemented" in refused.stderr or refused.stdout == "-1\n", refused
    assert "filtered.py" not in refused.stderr


def test_profiles_are_one_list() -> None:
    """Tier full may do one thing more, and none may do what changes a machine."""
    assert listed("shoal-full.json") - listed("shoal.json") == {"setns"}
    changes = (
        "mount",
        "umount2",
        "unlink",
        "rename",
        "mkdir",
        "chmod",
        "chown",
        "ptrace",
        "bpf",
        "init_module",
        "reboot",
    )
    more = (
        "unshare",
        "keyctl",
        "io_uring_setup",
        "perf_event_open",
        "process_vm_readv",
        "userfaultfd",
        "fork",
        "vfork",
    )
    for file in set(TIERS.values()):
        assert not listed(file) & {*changes, *more}
        profile: dict[str, Any] = json.loads((PROFILES / file).read_text(encoding="utf-8"))
        assert profile["defaultAction"] == "SCMP_ACT_ERRNO"
        assert not os.access(PROFILES / file, os.X_OK)


# What the kernel of aarch64 has, whose table is the one of all newer processors, for older calls of x86. arch_prctl, by
# which the C library of x86-64 sets up threads, is a register there.
ON_ARM = {
    "access": "faccessat",
    "arch_prctl": "set_tid_address",
    "clock_gettime64": "clock_gettime",
    "epoll_create": "epoll_create1",
    "epoll_wait": "epoll_pwait",
    "fstatat64": "newfstatat",
    "futex_time64": "futex",
    "getdents": "getdents64",
    "lstat": "newfstatat",
    "open": "openat",
    "poll": "ppoll",
    "readlink": "readlinkat",
    "recv": "recvfrom",
    "select": "pselect6",
    "send": "sendto",
    "stat": "newfstatat",
    "time": "clock_gettime",
}


@pytest.mark.parametrize("file", sorted(set(TIERS.values())))
def test_the_profile_has_the_calls_of_arm(file: str) -> None:
    """Whatever is recorded on x86-64 and is no call of aarch64 is there by the name of the call that does it there."""
    library = ctypes.CDLL("libseccomp.so.2")
    resolve = library.seccomp_syscall_resolve_name_arch
    resolve.argtypes = [ctypes.c_uint32, ctypes.c_char_p]
    there = {name for name in listed(file) if resolve(0xC00000B7, name.encode()) >= 0}  # AUDIT_ARCH_AARCH64
    assert listed(file) - there == ON_ARM.keys()
    assert set(ON_ARM.values()) <= there
