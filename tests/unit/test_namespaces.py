"""Network namespaces: found without a capability, entered by a thread that ends there."""

from __future__ import annotations

import os
import socket
import subprocess
import threading
import time
from contextlib import suppress
from typing import TYPE_CHECKING

import pytest

from shoal.kernel.files import Reason, Unavailable
from shoal.kernel.namespaces import (
    find_network_namespaces,
    namespace_id,
    namespace_inode,
    open_in_namespace,
    visit_namespaces,
)

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

pytestmark = pytest.mark.root


@pytest.fixture
def stranger() -> Iterator[subprocess.Popen[bytes]]:
    """A process in a network namespace of its own."""
    with subprocess.Popen(["unshare", "--net", "sh", "-c", "echo; exec sleep 60"], stdout=subprocess.PIPE) as process:
        assert process.stdout
        process.stdout.readline()
        yield process
        process.kill()


def _namespaces_of_threads() -> set[int]:
    inodes = set()
    for task in os.listdir("/proc/self/task"):
        with suppress(FileNotFoundError):
            inodes.add(os.stat(f"/proc/self/task/{task}/ns/net").st_ino)
    return inodes


def test_processes_share_an_identity_exactly_when_they_share_a_namespace(stranger: subprocess.Popen[bytes]) -> None:
    """The inode of the namespace itself is the witness: both tell the same processes apart."""
    pids = [int(name) for name in os.listdir("/proc") if name.isdecimal()]
    pairs = {(namespace_id("/proc", pid), namespace_inode("/proc", pid)) for pid in pids}
    pairs = {(identity, inode) for identity, inode in pairs if identity and inode}
    assert len({identity for identity, _ in pairs}) == len({inode for _, inode in pairs}) == len(pairs)
    assert namespace_id("/proc", stranger.pid) != namespace_id("/proc", "self")


def test_a_namespace_is_found_once_by_its_lowest_process(stranger: subprocess.Popen[bytes]) -> None:
    """The stranger is in one of its own; the namespace of this process is represented by an older one."""
    found = {space.id: space.pid for space in find_network_namespaces("/proc")}
    assert found[namespace_id("/proc", stranger.pid) or 0] == stranger.pid
    assert found[namespace_id("/proc", "self") or 0] < os.getpid()


def test_a_socket_is_opened_inside_and_nobody_is_left_there(stranger: subprocess.Popen[bytes]) -> None:
    """The socket sees the other namespace's devices, this thread and all others stay where they were."""
    before = namespace_inode("/proc", os.getpid())
    opened = open_in_namespace("/proc", stranger.pid, lambda: socket.socket(socket.AF_INET, socket.SOCK_DGRAM))
    with opened, pytest.raises(OSError, match="unreachable"):
        opened.connect(("127.0.0.1", 9))  # the device lo of the new namespace is down
    assert namespace_inode("/proc", os.getpid()) == before
    assert not [thread for thread in threading.enumerate() if thread.name.startswith("shoal-netns")]
    # The kernel's part of the thread ends a moment after Python's.
    deadline = time.monotonic() + 5
    while (inside := _namespaces_of_threads()) != {before} and time.monotonic() < deadline:
        time.sleep(0.01)
    assert inside == {before}


def test_one_thread_goes_from_namespace_to_namespace(stranger: subprocess.Popen[bytes]) -> None:
    """Each is entered, one that is gone is the visitor's to pass over, and the thread is left in none of them."""
    own = namespace_inode("/proc", os.getpid())
    there = namespace_inode("/proc", stranger.pid)

    def visit(enter: Callable[[int], None]) -> list[tuple[int, int]]:
        seen = []
        for pid in (stranger.pid, os.getpid(), stranger.pid):
            enter(pid)
            seen.append((threading.get_native_id(), os.stat("/proc/thread-self/ns/net").st_ino))
        with pytest.raises(Unavailable):
            enter(0)
        return seen

    before = len(os.listdir("/proc/self/fd"))
    threads, namespaces = zip(*visit_namespaces("/proc", visit), strict=True)
    assert namespaces == (there, own, there)
    assert len(set(threads)) == 1
    assert threads[0] != threading.get_native_id()
    assert namespace_inode("/proc", os.getpid()) == own
    assert len(os.listdir("/proc/self/fd")) == before
    assert not [thread for thread in threading.enumerate() if thread.name.startswith("shoal-netns")]


def test_what_the_opener_raises_comes_out(stranger: subprocess.Popen[bytes]) -> None:
    """A failure inside the namespace is the caller's to handle, and leaves no descriptor behind."""
    before = len(os.listdir("/proc/self/fd"))

    def fail() -> None:
        raise Unavailable(Reason.NOT_IN_KERNEL, "no such family")

    with pytest.raises(Unavailable, match="no such family"):
        open_in_namespace("/proc", stranger.pid, fail)
    assert len(os.listdir("/proc/self/fd")) == before


def test_a_process_that_has_ended(stranger: subprocess.Popen[bytes]) -> None:
    """Its namespace cannot be entered any more, and that is no error of the exporter."""
    stranger.kill()
    stranger.wait()
    with pytest.raises(Unavailable):
        open_in_namespace("/proc", stranger.pid, lambda: None)
    assert namespace_id("/proc", stranger.pid) is None


def test_without_the_capability_the_reason_says_so(stranger: subprocess.Popen[bytes]) -> None:
    """An unprivileged user is refused with no_permission, and still finds every namespace."""
    os.seteuid(65534)
    try:
        with pytest.raises(Unavailable) as caught:
            open_in_namespace("/proc", stranger.pid, lambda: None)
        found = {space.pid for space in find_network_namespaces("/proc")}
    finally:
        os.seteuid(0)
    assert caught.value.reason is Reason.NO_PERMISSION
    assert stranger.pid in found
