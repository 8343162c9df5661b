"""Collector `conntrack`: on recorded nodes, with tables made to order, and on this kernel in namespaces of its own."""

from __future__ import annotations

import asyncio
import json
import os
import shutil
import subprocess
import sys
import threading
import time
import weakref
from dataclasses import replace
from functools import partial
from ipaddress import ip_address
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import pytest
from tests.unit.outputs import samples

from shoal.collectors.conntrack import ConntrackCollector
from shoal.inventory import Node
from shoal.kernel.conntrack import parse_conntrack_table
from shoal.kernel.files import ParseError, Reason, Roots, Unavailable, Vanished
from shoal.kernel.netlink.conntrack import ConntrackStatistics, ConntrackTotals
from shoal.kernel.netlink.conntrack_entries import DST_NAT, SEEN_REPLY, Entry
from shoal.kernel.netlink.nat_rules import NatBackends
from shoal.kubernetes.endpoints import Endpoints, Slice
from shoal.settings import resolve

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from tests.unit.outputs import Samples

    from shoal.kubernetes.watch import EndpointWatch

FIXTURES = Path(__file__).parent / "fixtures"
SCENE = Path(__file__).with_name("conntrack_scene.py")
HOST = ("host", "", "", "", "")
CHECKOUT = ("pod", "shop", "checkout-7d9c5b6f4-x2x9k", "", "")
REPORTS = ("pod", "batch", "reports-0", "", "")
OTHER = ("other", "", "", "", "", "")
HEADER = (
    "entries  clashres found new invalid ignore delete chainlength insert insert_failed drop early_drop icmp_error"
    "  expect_new expect_create expect_delete search_restart\n"
)


def copy_of(kernel: str, tmp_path: Path) -> Roots:
    """Return a copy of a recorded node, to be changed."""
    shutil.copytree(FIXTURES / kernel, tmp_path / kernel, symlinks=True)
    root = tmp_path / kernel
    return Roots(f"{root}/proc", f"{root}/sys", f"{root}/rootfs")


def collector(**settings: Any) -> ConntrackCollector:
    """Make the collector with default settings but for those given."""
    return ConntrackCollector(replace(resolve({}, {}), **settings))


def reasons(one: ConntrackCollector) -> dict[str, str]:
    """Return {signal without its prefix: reason for its absence, or ""}."""
    absent = one.availability.absent.items()
    return {signal.removeprefix("conntrack_"): why[0].value if why else "" for signal, why in absent}


def lacking(one: ConntrackCollector) -> set[str]:
    """Return the signals that are not there."""
    return {signal for signal, reason in reasons(one).items() if reason}


def pid_of(roots: Roots, labels: tuple[str, ...]) -> int:
    """Return the process by which a recorded namespace is read."""
    return next(space.pid for space in Node(roots).network_namespaces() if space.labels == labels)


def write_table(roots: Roots, labels: tuple[str, ...], entries: int, **counters: int) -> None:
    """Give a recorded namespace a table."""
    places = {"drop": 10, "early_drop": 11, "insert_failed": 9, "invalid": 4, "error": 12, "search_restart": 16}
    places |= {"clash_resolve": 1, "chain_toolong": 7}
    columns = [0] * 17
    columns[0] = entries
    for name, value in counters.items():
        columns[places[name]] = value
    path = Path(roots.proc, str(pid_of(roots, labels)), "net/stat/nf_conntrack")
    path.parent.mkdir(exist_ok=True)
    path.write_text(HEADER + " ".join(f"{number:08x}" for number in columns) + "\n")


@pytest.fixture
def opened(monkeypatch: pytest.MonkeyPatch) -> list[object]:
    """Return the list of netlink sockets that were asked for, none of which is opened."""
    asked: list[object] = []

    def refuse(*arguments: object) -> None:
        asked.append(arguments)
        raise OSError(1, "no socket may be opened here")

    monkeypatch.setattr("socket.socket", refuse)
    return asked


class Kernel:
    """A table, NAT rules and addresses made to order in place of netlink and proc."""

    def __init__(self) -> None:
        """Start with nothing tracked and one rule."""
        self.entries: list[Entry] = []
        self.total: int | None = None
        self.rules = NatBackends(1, frozenset([bytes([10, 244, 0, 2, 0, 53])]), (), 0)
        self.failure: Exception | None = None
        self.rules_failure: Exception | None = None
        self.addresses: dict[int | str, set[str]] = {}
        self.dumps = 0
        self.hold = threading.Event()
        self.hold.set()
        self.openers: list[object] = []

    def read_entries(self, reduce: Callable[[Iterator[Entry]], Any], *, opener: object) -> Any:
        """Stand for the function of this name."""
        self.dumps += 1
        self.openers.append(opener)
        self.hold.wait(20)
        if self.failure:
            raise self.failure
        return reduce(iter(self.entries))

    def read_conntrack_totals(self, *, opener: object) -> ConntrackTotals:
        """Stand for the function of this name."""
        self.openers.append(opener)
        return ConntrackTotals(len(self.entries) if self.total is None else self.total, 262_144)

    def read_conntrack_statistics(self, *, opener: object = None) -> ConntrackStatistics:
        """Stand for the function of this name."""
        self.openers.append(opener)
        return ConntrackStatistics(1, 2, 3, 4, 5, 6, 7, 8, None, None)

    def read_nat_backends(self, _known: object, *, opener: object) -> NatBackends:
        """Stand for the function of this name."""
        self.openers.append(opener)
        if self.rules_failure:
            raise self.rules_failure
        return self.rules

    def read_local_addresses(self, _proc: str, pid: int | str) -> frozenset[bytes]:
        """Stand for the function of this name."""
        return frozenset(ip_address(text).packed for text in self.addresses.get(pid, ()))


@pytest.fixture
def kernel(monkeypatch: pytest.MonkeyPatch, opened: list[object]) -> Iterator[Kernel]:
    """Return a kernel made to order; nothing may ask the real one."""
    made = Kernel()
    for name in dir(made):
        if name.startswith("read_"):
            monkeypatch.setattr(f"shoal.collectors.conntrack.{name}", getattr(made, name))
    # A dump is waited for until it has ended, however busy the machine is.
    monkeypatch.setattr("shoal.collectors.conntrack._PATIENCE_SECONDS", 20)
    yield made
    made.hold.set()
    assert not opened


def udp(source: str, destination: str, backend: str = "", **fields: Any) -> Entry:
    """Return an unanswered connection; with a backend its destination was translated."""
    addresses = [ip_address(text).packed for text in (source, destination, backend or destination)]
    one = Entry(addresses[0], 4000, addresses[1], 53, 17, addresses[2], 53, addresses[0], 4000, 0, 30, None, None, 0)
    return one._replace(**{"status": DST_NAT if backend else 0} | fields)


@pytest.mark.parametrize("version", ["5.10", "6.1", "6.12"])
def test_a_recorded_node(version: str, kernel: Kernel) -> None:
    """The host's table was filled to its limit: its size, its drops, and every namespace without entering any."""
    root = FIXTURES / version
    one = collector()
    found = samples(one.read(Node(Roots(f"{root}/proc", f"{root}/sys", f"{root}/rootfs"))))
    assert found["shoal_conntrack_entries"] == {HOST: 64}
    assert found["shoal_conntrack_node_entries"] == {(): 64}
    assert found["shoal_conntrack_limit"] == {(): 64}
    recorded = parse_conntrack_table((root / "proc/1/net/stat/nf_conntrack").read_bytes()).statistics
    for word in ("drop", "early_drop", "insert_failed", "search_restart", "clash_resolve", "invalid", "error"):
        values = found[f"shoal_conntrack_{word}_total"]
        assert values["host",] == getattr(recorded, word)
        assert all(value == 0 for labels, value in values.items() if labels != ("host",))
    assert found["shoal_conntrack_drop_total"]["host",] > 200
    assert ("shoal_conntrack_chain_toolong_total" in found) == (version != "5.10")
    assert lacking(one) == {"endpoints"}
    assert kernel.dumps == 1


def test_no_request_where_nothing_is_tracked(tmp_path: Path, opened: list[object]) -> None:
    """A conntrack request makes the kernel load nf_conntrack: without its files no socket is even opened."""
    roots = copy_of("6.1", tmp_path)
    shutil.rmtree(Path(roots.proc, "sys/net/netfilter"))
    shutil.rmtree(Path(roots.proc, "1/net/stat"))
    one = collector()
    assert not samples(one.read(Node(roots)))
    assert {signal: reason for signal, reason in reasons(one).items() if reason != "not_in_kernel"} == {
        "backends": "not_readable",
        "endpoints": "not_enabled",
    }
    assert not opened


def test_no_request_that_would_load_the_netlink_module(tmp_path: Path, opened: list[object]) -> None:
    """With nf_conntrack loaded and nf_conntrack_netlink not, what proc tells is read and no socket is opened."""
    roots = copy_of("6.1", tmp_path)
    Path(roots.proc, "modules").write_text("nf_conntrack 188416 1 xt_conntrack, Live 0x0000000000000000\n")
    one = collector()
    found = samples(one.read(Node(roots)))
    assert found["shoal_conntrack_entries"] == {HOST: 64}
    assert found["shoal_conntrack_drop_total"]["host",] > 200
    assert reasons(one)["dump"] == "not_in_kernel"
    shutil.rmtree(Path(roots.proc, "1/net/stat"))
    one = collector()
    assert set(samples(one.read(Node(roots)))) == {"shoal_conntrack_entries", "shoal_conntrack_limit"}
    assert reasons(one)["statistics"] == reasons(one)["namespaces"] == "not_in_kernel"
    assert not opened


def test_no_request_that_would_load_nftables(tmp_path: Path, kernel: Kernel) -> None:
    """Its rules are not asked for unless nf_tables is loaded; the dump goes on without them."""
    roots = copy_of("6.1", tmp_path)
    Path(roots.proc, "modules").write_text("nf_conntrack_netlink 53248 0 - Live 0x0000000000000000\n")
    one = collector()
    found = samples(one.read(Node(roots)))
    assert reasons(one)["backends"] == "not_in_kernel"
    assert reasons(one)["dump"] == ""
    assert "shoal_conntrack_owner_entries" in found
    assert len(kernel.openers) == 2


def test_a_request_where_it_loads_nothing(tmp_path: Path, opened: list[object]) -> None:
    """The counterpart of those above: they would see a socket."""
    one = collector()
    one.read(Node(copy_of("6.1", tmp_path)))
    assert opened
    assert reasons(one)["dump"] == "no_permission"


@pytest.mark.usefixtures("kernel")
def test_namespaces_that_track_nothing_have_no_series(tmp_path: Path) -> None:
    """The host's has one always, a pod's once it tracks; the sum is over all."""
    roots = copy_of("6.1", tmp_path)
    write_table(roots, CHECKOUT, 500)
    write_table(roots, REPORTS, 0)
    found = samples(collector().read(Node(roots)))
    assert found["shoal_conntrack_entries"] == {HOST: 64, CHECKOUT: 500}
    assert found["shoal_conntrack_node_entries"] == {(): 564}


@pytest.mark.usefixtures("kernel")
def test_only_the_fullest_namespaces_have_series(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """However many there are: the fullest, the host's, and the sum."""
    roots = copy_of("6.1", tmp_path)
    monkeypatch.setattr("shoal.collectors.conntrack._MOST", 2)
    others = [space for space in Node(roots).network_namespaces() if space.labels != HOST]
    for number, space in enumerate(others):
        write_table(roots, space.labels, 1000 + number)
    found = samples(collector().read(Node(roots)))
    assert found["shoal_conntrack_entries"].keys() == {HOST, others[-1].labels, others[-2].labels}
    assert found["shoal_conntrack_node_entries"][()] == 64 + sum(range(1000, 1000 + len(others)))


@pytest.mark.usefixtures("kernel")
def test_counters_are_summed_by_kind_and_never_fall(tmp_path: Path) -> None:
    """All pods are one series; one that is deleted keeps its part, and its successor adds to it."""
    roots = copy_of("6.1", tmp_path)
    write_table(roots, CHECKOUT, 5, drop=100, early_drop=1, insert_failed=2, invalid=3)
    write_table(roots, REPORTS, 5, drop=10, error=4, search_restart=5, clash_resolve=6, chain_toolong=7)
    one = collector()
    found = samples(one.read(Node(roots)))
    sums = {
        name.removeprefix("shoal_conntrack_"): values["pod",] for name, values in found.items() if ("pod",) in values
    }
    assert sums == {
        "drop_total": 110,
        "early_drop_total": 1,
        "insert_failed_total": 2,
        "invalid_total": 3,
        "error_total": 4,
        "search_restart_total": 5,
        "clash_resolve_total": 6,
        "chain_toolong_total": 7,
    }
    shutil.rmtree(Path(roots.proc, str(pid_of(roots, CHECKOUT))))
    write_table(roots, REPORTS, 5, drop=11)
    assert samples(one.read(Node(roots)))["shoal_conntrack_drop_total"]["pod",] == 111


def without_files(tmp_path: Path) -> Roots:
    """Return a node whose kernel was built without CONFIG_NF_CONNTRACK_PROCFS."""
    roots = copy_of("6.1", tmp_path)
    for path in Path(roots.proc).glob("*/net/stat"):
        shutil.rmtree(path)
    return roots


def test_a_kernel_without_the_files(tmp_path: Path, kernel: Kernel) -> None:
    """The own table over netlink, the others not at all unless they may be entered."""
    one = collector(conntrack_dump_interval=0)
    found = samples(one.read(Node(without_files(tmp_path))))
    assert found["shoal_conntrack_entries"] == {HOST: 64}
    assert found["shoal_conntrack_drop_total"] == {("host",): 5}
    assert "shoal_conntrack_clash_resolve_total" not in found
    assert "shoal_conntrack_node_entries" not in found
    assert reasons(one)["entries"] == reasons(one)["statistics"] == ""
    assert reasons(one)["namespaces"] == "not_enabled"
    assert kernel.openers == [None]


def test_a_kernel_without_the_files_whose_namespaces_may_be_entered(tmp_path: Path, kernel: Kernel) -> None:
    """Each is asked inside, for its size and its counters."""
    roots = without_files(tmp_path)
    kernel.total = 7
    one = collector(enter_namespaces=True, conntrack_dump_interval=0)
    found = samples(one.read(Node(roots)))
    spaces = Node(roots).network_namespaces()
    inside = [opener.args for opener in kernel.openers if isinstance(opener, partial)]
    assert inside == [(roots.proc, space.pid) for space in spaces for _ in range(2)]
    assert found["shoal_conntrack_node_entries"] == {(): 7 * len(spaces)}
    assert found["shoal_conntrack_entries"][HOST] == found["shoal_conntrack_entries"][CHECKOUT] == 7
    assert found["shoal_conntrack_drop_total"]["host",] == 5
    assert found["shoal_conntrack_drop_total"]["pod",] == 5 * sum(space.labels[0] == "pod" for space in spaces)
    assert reasons(one)["namespaces"] == ""


@pytest.mark.parametrize(
    ("failure", "reason"),
    [
        (Vanished("gone"), ""),
        (Unavailable(Reason.NOT_IN_KERNEL, "gone"), ""),
        (Unavailable(Reason.NO_PERMISSION, "no"), "no_permission"),
    ],
)
def test_namespaces_that_cannot_be_entered(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kernel: Kernel, failure: Exception, reason: str
) -> None:
    """One that has just ended costs itself only; a refusal is one for all."""
    roots = without_files(tmp_path)
    checkout = pid_of(roots, CHECKOUT)

    def statistics(*, opener: Any = None) -> ConntrackStatistics:
        if opener and opener.args[1] == checkout:
            raise failure
        return ConntrackStatistics(1, 2, 3, 4, 5, 6, 7, 8, 9, 10)

    monkeypatch.setattr("shoal.collectors.conntrack.read_conntrack_statistics", statistics)
    kernel.total = 7
    one = collector(enter_namespaces=True)
    found = samples(one.read(Node(roots)))
    assert reasons(one)["namespaces"] == reason
    assert ("shoal_conntrack_node_entries" in found) == (not reason)
    assert found["shoal_conntrack_drop_total"]["host",] == 5


@pytest.mark.parametrize("content", ["", "entries drop\n", HEADER + "0 0\n", "\udcff\n"])
@pytest.mark.usefixtures("kernel")
def test_a_malformed_table_costs_its_namespace_only(tmp_path: Path, content: str) -> None:
    """The other namespaces are there; where every one is malformed the signal says so."""
    roots = copy_of("6.1", tmp_path)
    write_table(roots, CHECKOUT, 5)
    Path(roots.proc, str(pid_of(roots, CHECKOUT)), "net/stat/nf_conntrack").write_text(
        content, errors="surrogateescape"
    )
    one = collector()
    assert samples(one.read(Node(roots)))["shoal_conntrack_entries"] == {HOST: 64}
    assert reasons(one)["namespaces"] == ""
    for path in Path(roots.proc).glob("*/net/stat/nf_conntrack"):
        path.write_text(content, errors="surrogateescape")
    one.read(Node(roots))
    assert reasons(one)["namespaces"] == "malformed"


def test_who_fills_the_table(tmp_path: Path, kernel: Kernel) -> None:
    """Pods by the addresses of their namespaces, one that two have is nobody's; destinations before translation."""
    roots = copy_of("6.1", tmp_path)
    kernel.addresses = {
        1: {"192.0.2.7", "10.88.0.1"},
        pid_of(roots, CHECKOUT): {"10.244.0.1", "fd00::1", "10.88.0.1"},
        pid_of(roots, REPORTS): {"10.244.0.2"},
    }
    kernel.entries = [
        *[udp("10.244.0.1", f"1.1.{number}.1") for number in range(20)],
        *[udp("10.244.0.2", "10.96.0.10", "10.244.0.1")] * 7,
        udp("192.0.2.7", "1.1.1.1"),
        udp("198.51.100.1", "192.0.2.7", "10.244.0.2"),
        udp("10.88.0.1", "10.88.0.9"),
        udp("fd00::1", "fd00::9", protocol=6, destination_port=443),
        udp("198.51.100.1", "198.51.100.2", protocol=1, destination_port=0),
    ]
    found = samples(collector().read(Node(roots)))
    assert found["shoal_conntrack_owner_entries"] == {
        (*CHECKOUT, "from"): 21,
        (*REPORTS, "from"): 7,
        (*HOST, "from"): 1,
        (*REPORTS, "to"): 1,
        OTHER: 2,
    }
    destinations = found["shoal_conntrack_destination_entries"]
    assert len(destinations) == 11
    assert destinations["udp", "10.96.0.10", "53"] == 7
    assert sum(destinations.values()) == len(kernel.entries) == found["shoal_conntrack_dump_entries"][()]
    kernel.entries = kernel.entries[-2:]
    destinations = samples(collector().read(Node(roots)))["shoal_conntrack_destination_entries"]
    assert destinations == {("tcp", "fd00::9", "443"): 1, ("icmp", "198.51.100.2", ""): 1, ("", "other", ""): 0}


def test_owners_beyond_the_top_are_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kernel: Kernel) -> None:
    """As many series as that, whatever the number of pods; what is cut is other, and the sum is right."""
    roots = copy_of("6.1", tmp_path)
    monkeypatch.setattr("shoal.collectors.conntrack._MOST", 2)
    for number, labels in enumerate((HOST, CHECKOUT, REPORTS), 1):
        address = f"10.244.0.{number}"
        kernel.addresses[pid_of(roots, labels)] = {address}
        kernel.entries += [udp(address, "1.1.1.1")] * number
    found = samples(collector().read(Node(roots)))
    assert found["shoal_conntrack_owner_entries"] == {(*REPORTS, "from"): 3, (*CHECKOUT, "from"): 2, OTHER: 1}


def test_ports_that_masquerading_has_used(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kernel: Kernel) -> None:
    """The worst pair of translated source and destination, beside what there is; each zone has ports of its own."""
    roots = copy_of("6.1", tmp_path)
    monkeypatch.setattr("shoal.collectors.conntrack._MOST", 3)
    node = ip_address("192.0.2.7").packed
    for destination, count, zones in (("1.1.1.1", 30, (0,)), ("1.0.0.1", 20, (3, 4)), ("9.9.9.9", 10, (0,))):
        one = udp("10.244.0.1", destination, reply_destination=node)
        ports = range(2000, 2000 + count)
        kernel.entries += [one._replace(reply_destination_port=port, zone=zone) for zone in zones for port in ports]
    found = samples(collector().read(Node(roots)))
    assert found["shoal_conntrack_nat_ports_used"] == {
        ("udp", "192.0.2.7", "1.1.1.1", "53"): 30,
        ("udp", "192.0.2.7", "1.0.0.1", "53"): 20,
    }
    assert found["shoal_conntrack_nat_ports_available"] == {(): 64_512}


def test_the_hosts_table_has_a_series_always(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kernel: Kernel) -> None:
    """Empty, and not the exporter's own; the own has one too, and other empty ones have none."""
    roots = copy_of("6.1", tmp_path)
    spaces = Node(roots).network_namespaces()
    monkeypatch.setattr(
        Node, "own_network_namespace", lambda _node: next(one for one in spaces if one.labels == REPORTS)
    )
    for labels in (HOST, CHECKOUT, REPORTS):
        write_table(roots, labels, 0)
    found = samples(collector().read(Node(roots)))
    assert found["shoal_conntrack_entries"] == {HOST: 0, REPORTS: 0}
    assert kernel.dumps == 1


def test_a_failure_keeps_nothing_of_its_scrape(tmp_path: Path, kernel: Kernel) -> None:
    """Until the next dump it is repeated at every scrape, and the memory of those is not to wait for that."""
    one = collector()
    for failure in (Unavailable(Reason.NO_PERMISSION, "no"), ParseError("entry", 7, "a source"), Vanished("gone")):
        kernel.failure = failure
        one._last = None
        node = Node(copy_of("6.1", tmp_path / str(failure)))
        kept = weakref.ref(node)
        for _ in range(2):
            one.read(node)
            assert reasons(one)["dump"] != ""
        del node
        kernel.failure = None
        failure.__traceback__ = None
        assert kept() is None


def test_a_table_that_is_too_large_is_estimated(tmp_path: Path, kernel: Kernel) -> None:
    """A quarter was looked at: four times what was found, and what was cut beside it."""
    roots = copy_of("6.1", tmp_path)
    kernel.addresses = {pid_of(roots, CHECKOUT): {"10.244.0.1"}}
    kernel.entries = [udp("10.244.0.1", "1.1.1.1")] * 2000
    kernel.total = 4000
    found = samples(collector(conntrack_dump_entries=1000).read(Node(roots)))
    assert found["shoal_conntrack_owner_entries"] == {(*CHECKOUT, "from"): 4000, OTHER: 0}
    assert found["shoal_conntrack_destination_entries"]["udp", "1.1.1.1", "53"] == 4000
    assert found["shoal_conntrack_dump_entries"] == {(): 1000}
    assert found["shoal_conntrack_dump_cut_entries"] == {("size",): 3000, ("memory",): 0}
    # Where it was not cut short, entries that came or went meanwhile are no estimate.
    found = samples(collector().read(Node(roots)))
    assert found["shoal_conntrack_owner_entries"] == {(*CHECKOUT, "from"): 2000, OTHER: 0}
    assert found["shoal_conntrack_dump_cut_entries"] == {("size",): 0, ("memory",): 0}


def test_an_empty_table(tmp_path: Path, kernel: Kernel) -> None:
    """Nothing tracked is counted as nothing."""
    found = samples(collector().read(Node(copy_of("6.1", tmp_path))))
    assert found["shoal_conntrack_owner_entries"] == {OTHER: 0}
    assert found["shoal_conntrack_destination_entries"] == {("", "other", ""): 0}
    assert "shoal_conntrack_nat_ports_used" not in found
    assert set(found["shoal_conntrack_stale_entries"].values()) == {0}
    assert kernel.dumps == 1


@pytest.fixture
def minutes(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """Return the time as a list of one number, which moves on by hand."""
    now = [10_000.0]
    monkeypatch.setattr("shoal.collectors.conntrack.time.monotonic", lambda: now[0])
    return now


def stale_of(found: Samples) -> dict[tuple[str, ...], float]:
    """Return the stale entries that are not zero."""
    return {labels: value for labels, value in found["shoal_conntrack_stale_entries"].items() if value}


def test_stale_mappings(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kernel: Kernel, minutes: list[float]) -> None:
    """By service and backend, the top and the rest, from the second dump on; IPv6 addresses in brackets."""
    monkeypatch.setattr("shoal.collectors.conntrack._MOST", 2)
    node = Node(copy_of("6.1", tmp_path))
    kernel.entries = [
        *[udp("10.244.0.1", "10.96.0.10", "10.244.0.9", source_port=number) for number in range(3)],
        *[udp("fd00::1", "fd00::10", "fd00::9", source_port=number) for number in range(2)],
        *[udp("10.244.0.1", f"10.96.1.{number}", "10.244.0.9") for number in range(4)],
        udp("10.244.0.1", "10.96.0.11", "10.244.0.2"),
    ]
    one = collector()
    assert stale_of(samples(one.read(node))) == {}
    minutes[0] += 60
    found = samples(one.read(node))
    assert stale_of(found) == {
        ("backend_gone", "udp", "10.96.0.10", "53", "10.244.0.9:53", ""): 3,
        ("backend_gone", "udp", "fd00::10", "53", "[fd00::9]:53", ""): 2,
        ("backend_gone", "", "other", "", "", ""): 4,
        ("backend_silent", "", "other", "", "", ""): 1,
    }
    assert found["shoal_conntrack_stale_entries"]["unreplied", "", "other", "", "", ""] == 0


@pytest.mark.parametrize(
    ("spoil", "reason"),
    [
        (lambda kernel: setattr(kernel, "rules", NatBackends(1, frozenset([b"10240253"]), (), 1)), "not_readable"),
        (lambda kernel: setattr(kernel, "rules_failure", Unavailable(Reason.NO_PERMISSION, "no")), "no_permission"),
        (lambda kernel: setattr(kernel, "rules_failure", ParseError("nftables", 1, "a rule")), "malformed"),
        (lambda kernel: setattr(kernel, "rules", NatBackends(1, frozenset(), (), 0)), ""),
    ],
)
def test_no_backend_is_gone_where_the_rules_are_not_known(
    tmp_path: Path, kernel: Kernel, minutes: list[float], spoil: Callable[[Kernel], None], reason: str
) -> None:
    """Not understood, refused, malformed, or none at all: then NAT is somebody else's."""
    spoil(kernel)
    node = Node(copy_of("6.1", tmp_path))
    kernel.entries = [udp("10.244.0.1", "10.96.0.10", "10.244.0.9")]
    one = collector()
    one.read(node)
    minutes[0] += 60
    found = samples(one.read(node))
    assert stale_of(found) == {("unreplied", "udp", "10.96.0.10", "53", "10.244.0.9:53", ""): 1}
    assert reasons(one)["backends"] == reason
    assert reasons(one)["dump"] == ""


def test_legacy_iptables_may_lead_anywhere(tmp_path: Path, kernel: Kernel) -> None:
    """Its NAT table is not read, so no backend can be called gone."""
    roots = copy_of("6.1", tmp_path)
    Path(roots.proc, "1/net/ip_tables_names").write_text("nat\n")
    one = collector()
    one.read(Node(roots))
    assert reasons(one)["backends"] == "not_readable"
    assert "legacy iptables" in str(one.availability.absent["conntrack_backends"])
    assert kernel.dumps == 1


class Slices:
    """Stands for the watch of EndpointSlices: what it knows, or why it knows nothing."""

    def __init__(self, *live: str, withdrawn: tuple[str, ...] = ()) -> None:
        """Know the backends of the service shop/dns at port 53 of these addresses."""
        self.known = Endpoints()
        self.age: float | None = 7.0
        self.failure: Unavailable | None = None
        for addresses in ((*live, *withdrawn), live):
            keys = tuple(ip_address(text).packed + b"\0\x35\x11" for text in addresses)
            self.known.put(Slice("shop/dns-a", "shop/dns", keys))

    def current(self) -> Endpoints:
        """Stand for the method of this name."""
        if self.failure:
            raise self.failure
        return self.known


def seen_twice(
    kernel: Kernel, minutes: list[float], tmp_path: Path, watch: Slices, *entries: Entry
) -> tuple[ConntrackCollector, Samples]:
    """Return the collector and what it found of connections that were renewed between two dumps."""
    one = collector(kubernetes_endpoints=True)
    one._watch = cast("EndpointWatch", watch)
    roots = copy_of("6.1", tmp_path)
    kernel.addresses = {1: {"192.0.2.1"}}
    kernel.entries = list(entries)
    one.read(Node(roots))
    minutes[0] += 60
    return one, samples(one.read(Node(roots)))


ANSWERED = {"status": DST_NAT | SEEN_REPLY, "timeout": 120}


@pytest.mark.parametrize("opaque", [True, False])
def test_backends_by_endpoint_slices(tmp_path: Path, kernel: Kernel, minutes: list[float], *, opaque: bool) -> None:
    """Without rules that are known, what no slice has is gone, and whose it was is told; not behind a node's port."""
    kernel.rules = NatBackends(1, frozenset([b"10240253"] if opaque else []), (), int(opaque))
    entries = (
        udp("10.244.0.1", "10.96.0.10", "10.244.0.9", **ANSWERED),
        udp("10.244.0.1", "10.96.0.11", "10.244.0.9"),
        udp("10.244.0.1", "10.96.0.12", "10.244.0.2"),
        udp("10.244.0.1", "10.96.0.13", "10.244.0.2", **ANSWERED),
        udp("10.244.0.1", "10.96.0.14", "10.244.0.8", **ANSWERED),
        udp("10.9.9.9", "192.0.2.1", "10.244.0.7", **ANSWERED),
        udp("10.9.9.9", "192.0.2.1", "10.244.0.6"),
        udp("10.244.0.1", "10.96.0.12", "10.244.0.2", protocol=6, timeout=120),
    )
    one, found = seen_twice(kernel, minutes, tmp_path, Slices("10.244.0.2", withdrawn=("10.244.0.9",)), *entries)
    assert stale_of(found) == {
        ("backend_gone", "udp", "10.96.0.10", "53", "10.244.0.9:53", "shop/dns"): 1,
        ("backend_gone", "udp", "10.96.0.11", "53", "10.244.0.9:53", "shop/dns"): 1,
        ("backend_silent", "udp", "10.96.0.12", "53", "10.244.0.2:53", "shop/dns"): 1,
        ("backend_gone", "udp", "10.96.0.14", "53", "10.244.0.8:53", ""): 1,
        ("unreplied", "udp", "192.0.2.1", "53", "10.244.0.6:53", ""): 1,
        ("backend_gone", "tcp", "10.96.0.12", "53", "10.244.0.2:53", ""): 1,
    }
    assert found["shoal_conntrack_endpoints"] == {(): 1}
    assert found["shoal_conntrack_endpoints_age_seconds"] == {(): 7}
    assert lacking(one) == ({"backends"} if opaque else set())


def test_backends_by_rules_and_endpoint_slices(tmp_path: Path, kernel: Kernel, minutes: list[float]) -> None:
    """A backend that is being drained has no rule any more and is in its slice; a published port only has a rule."""
    entries = (
        udp("10.244.0.1", "10.96.0.10", "10.244.0.22", **ANSWERED),
        udp("10.9.9.9", "10.96.0.11", "10.244.0.2", **ANSWERED),
        udp("10.244.0.1", "10.96.0.12", "10.244.0.9", **ANSWERED),
        udp("10.9.9.9", "192.0.2.1", "10.244.0.9", **ANSWERED),
    )
    one, found = seen_twice(kernel, minutes, tmp_path, Slices("10.244.0.22"), *entries)
    assert stale_of(found) == {
        ("backend_gone", "udp", "10.96.0.12", "53", "10.244.0.9:53", ""): 1,
        ("backend_gone", "udp", "192.0.2.1", "53", "10.244.0.9:53", ""): 1,
    }
    assert not lacking(one)


@pytest.mark.parametrize("age", [None, 400.0])
def test_endpoint_slices_that_are_old_call_nothing_gone(
    tmp_path: Path, kernel: Kernel, minutes: list[float], age: float | None
) -> None:
    """A backend made since would be among those that no slice has. How old they are is told, not how many there are."""
    kernel.rules_failure = Unavailable(Reason.NO_PERMISSION, "no")
    watch = Slices("10.244.0.2")
    watch.age, watch.failure = age, Unavailable(Reason.NO_PERMISSION, "the API server refuses (403)")
    entries = (
        udp("10.244.0.1", "10.96.0.10", "10.244.0.9", **ANSWERED),
        udp("10.244.0.1", "10.96.0.11", "10.244.0.9"),
    )
    one, found = seen_twice(kernel, minutes, tmp_path, watch, *entries)
    assert stale_of(found) == {("unreplied", "udp", "10.96.0.11", "53", "10.244.0.9:53", ""): 1}
    assert reasons(one)["endpoints"] == "no_permission"
    assert one.availability.absent["conntrack_endpoints"] == (Reason.NO_PERMISSION, "the API server refuses (403)")
    assert "shoal_conntrack_endpoints" not in found
    assert found.get("shoal_conntrack_endpoints_age_seconds") == (None if age is None else {(): age})


def test_a_cluster_without_any_backend(tmp_path: Path, kernel: Kernel, minutes: list[float]) -> None:
    """Like rules that lead nowhere: then NAT is somebody else's."""
    kernel.rules_failure = Unavailable(Reason.NO_PERMISSION, "no")
    entry = udp("10.244.0.1", "10.96.0.10", "10.244.0.9", **ANSWERED)
    one, found = seen_twice(kernel, minutes, tmp_path, Slices(), entry)
    assert stale_of(found) == {}
    assert found["shoal_conntrack_endpoints"] == {(): 0}
    assert lacking(one) == {"backends"}


async def test_endpoint_slices_are_watched_if_wanted(monkeypatch: pytest.MonkeyPatch) -> None:
    """From the start of the exporter to its end; not without dumps to compare them with; outside a pod it says so."""
    monkeypatch.delenv("KUBERNETES_SERVICE_HOST", raising=False)
    for settings in ({}, {"kubernetes_endpoints": True, "conntrack_dump_interval": 0}):
        one = await asyncio.to_thread(partial(collector, **settings))
        await one.start()
        assert one._watching is None
        await one.stop()
    one = await asyncio.to_thread(partial(collector, kubernetes_endpoints=True))
    await one.start()
    task = one._watching
    await one.start()
    assert task is not None
    assert one._watching is task
    for _ in range(100):
        await asyncio.sleep(0.01)
        assert one._watch
        with pytest.raises(Unavailable) as error:
            one._watch.current()
        if "not a pod" in str(error.value):
            break
    assert "this is not a pod" in str(error.value)
    await one.stop()
    assert task.done()


def test_dumps_that_are_long_ago_are_not_compared(tmp_path: Path, kernel: Kernel, minutes: list[float]) -> None:
    """After an hour without scrapes the same connection may be another one."""
    node = Node(copy_of("6.1", tmp_path))
    kernel.entries = [udp("10.244.0.1", "10.96.0.10", "10.244.0.9")]
    one = collector()
    one.read(node)
    minutes[0] += 3600
    assert stale_of(samples(one.read(node))) == {}
    minutes[0] += 60
    assert stale_of(samples(one.read(node)))


def test_a_dump_has_an_interval_of_its_own(tmp_path: Path, kernel: Kernel, minutes: list[float]) -> None:
    """Scrapes in between repeat the last one with its age; one that comes a little early does not lose its turn."""
    node = Node(copy_of("6.1", tmp_path))
    one = collector(conntrack_dump_interval=60)
    ages = []
    for wait in (0, 15, 15, 15, 14, 30):
        minutes[0] += wait
        (age,) = samples(one.read(node))["shoal_conntrack_dump_age_seconds"].values()
        ages.append((age, kernel.dumps))
    assert ages == [(0, 1), (15, 1), (30, 1), (45, 1), (0, 2), (30, 2)]


def test_a_dump_that_takes_long_is_not_waited_for(
    tmp_path: Path, kernel: Kernel, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The scrape goes on without; a second dump is not begun; when it has ended it is there."""
    monkeypatch.setattr("shoal.collectors.conntrack._PATIENCE_SECONDS", 0.02)
    roots = copy_of("6.1", tmp_path)
    one = collector()
    kernel.hold.clear()
    for _ in range(2):
        began = time.monotonic()
        found = samples(one.read(Node(roots)))
        assert time.monotonic() - began < 2
        assert found["shoal_conntrack_entries"] == {HOST: 64}
        assert "shoal_conntrack_owner_entries" not in found
        assert reasons(one)["dump"] == reasons(one)["backends"] == "not_readable"
    kernel.hold.set()
    assert one._thread
    one._thread.join(20)
    assert "shoal_conntrack_owner_entries" in samples(one.read(Node(roots)))
    assert kernel.dumps == 1
    assert lacking(one) == {"endpoints"}


def test_the_last_dump_stands_while_the_next_is_taken(
    tmp_path: Path, kernel: Kernel, minutes: list[float], monkeypatch: pytest.MonkeyPatch
) -> None:
    """With its age, so that nobody takes it for fresh."""
    node = Node(copy_of("6.1", tmp_path))
    one = collector()
    one.read(node)
    monkeypatch.setattr("shoal.collectors.conntrack._PATIENCE_SECONDS", 0.02)
    kernel.hold.clear()
    minutes[0] += 61
    found = samples(one.read(node))
    assert list(found["shoal_conntrack_dump_age_seconds"].values()) == [61]
    assert "shoal_conntrack_owner_entries" in found


@pytest.mark.parametrize(
    ("failure", "reason"),
    [
        (Unavailable(Reason.NO_PERMISSION, "no"), "no_permission"),
        (ParseError("conntrack entry", 7, "a source"), "malformed"),
        (Vanished("the namespace went away"), "not_readable"),
    ],
)
def test_a_dump_that_fails_costs_itself_only(
    tmp_path: Path, kernel: Kernel, minutes: list[float], failure: Exception, reason: str
) -> None:
    """The reason says why; what proc tells is there; the next dump is right again."""
    node = Node(copy_of("6.1", tmp_path))
    one = collector()
    one.read(node)
    kernel.failure = failure
    minutes[0] += 60
    found = samples(one.read(node))
    assert reasons(one)["dump"] == reason
    assert found["shoal_conntrack_entries"] == {HOST: 64}
    assert "shoal_conntrack_owner_entries" not in found
    kernel.failure = None
    minutes[0] += 60
    assert "shoal_conntrack_owner_entries" in samples(one.read(node))
    assert lacking(one) == {"endpoints"}


def test_a_mistake_in_the_thread_is_seen(tmp_path: Path, kernel: Kernel) -> None:
    """What is no answer of the kernel's fails the collector, as it would without a thread."""
    kernel.failure = ZeroDivisionError("a mistake")
    with pytest.raises(RuntimeError, match="ZeroDivisionError: a mistake"):
        collector().read(Node(copy_of("6.1", tmp_path)))


def test_dumps_can_be_switched_off(tmp_path: Path, kernel: Kernel) -> None:
    """Then nothing is asked, and the reason says so."""
    one = collector(conntrack_dump_interval=0)
    found = samples(one.read(Node(copy_of("6.1", tmp_path))))
    assert reasons(one)["dump"] == "not_enabled"
    assert "shoal_conntrack_dump_age_seconds" not in found
    assert not kernel.openers


@pytest.mark.parametrize(
    "case", [(HOST, False, "host"), (HOST, True, "host"), (CHECKOUT, False, "pod"), (CHECKOUT, True, "host")]
)
def test_whose_table_is_dumped(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kernel: Kernel, case: tuple[tuple[str, ...], bool, str]
) -> None:
    """The host's, entered if that is wanted; otherwise the exporter's own, and the age says whose it is."""
    own, enter, netns = case
    roots = copy_of("6.1", tmp_path)
    space = next(space for space in Node(roots).network_namespaces() if space.labels == own)
    monkeypatch.setattr(Node, "own_network_namespace", lambda _node: space)
    kernel.entries = [udp("127.0.0.1", "127.0.0.9"), udp("::1", "::1")]
    one = collector(enter_namespaces=enter)
    found = samples(one.read(Node(roots)))
    assert found["shoal_conntrack_dump_age_seconds"].keys() == {(netns,)}
    inside = own != HOST and enter
    assert [isinstance(opener, partial) for opener in kernel.openers] == [inside] * 3
    # Every namespace has a loopback device; in a table it is that of its own.
    assert found["shoal_conntrack_owner_entries"][*(own if netns != "host" else HOST), "from"] == 2


def test_options() -> None:
    """The interval is off or long enough to tell what is renewed."""
    settings = resolve({"conntrack.dump-interval": "10", "conntrack.dump-entries": "1000"}, {})
    assert (settings.conntrack_dump_interval, settings.conntrack_dump_entries) == (10, 1000)
    assert resolve({"conntrack.dump-interval": "0"}, {}).conntrack_dump_interval == 0
    assert not settings.kubernetes_endpoints
    assert resolve({}, {"SHOAL_KUBERNETES_ENDPOINTS": "true"}).kubernetes_endpoints
    for key, text in (("interval", "9"), ("interval", "-1"), ("interval", "1.5"), ("entries", "999"), ("entries", "x")):
        with pytest.raises(Exception, match="a whole number from"):
            resolve({f"conntrack.dump-{key}": text}, {})


def scene(name: str) -> dict[str, Any]:
    """Return what a scene prints that runs in a network namespace of its own."""
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)}
    command = ["unshare", "--net", sys.executable, str(SCENE), name]
    done = subprocess.run(command, check=True, stdout=subprocess.PIPE, env=environment)
    answer: dict[str, Any] = json.loads(done.stdout)
    return answer


def rows(found: dict[str, list[list[Any]]], name: str) -> dict[tuple[str, ...], int]:
    """Return the samples of one metric of a scene."""
    return {tuple(labels): value for labels, value in found.get(name, [])}


@pytest.mark.root
def test_real_connections_and_who_made_them() -> None:
    """Three containers and the node itself: every number is that of conntrack -L at the same moment."""
    real = scene("who")
    found = real["found"]
    containers = {name: ("container", "", "", real[name], "") for name in ("own", "busy", "quiet", "outside")}
    assert rows(found, "shoal_conntrack_entries")[containers["own"]] == real["count"] == real["entries"]
    owners = rows(found, "shoal_conntrack_owner_entries")
    assert owners[*containers["busy"], "from"] == 340
    assert owners[*containers["quiet"], "from"] == 26
    assert owners[*containers["outside"], "from"] == 5
    assert owners[*containers["own"], "from"] == 23
    assert sum(owners.values()) == real["entries"]
    destinations = rows(found, "shoal_conntrack_destination_entries")
    for (protocol, destination, port), value in destinations.items():
        if destination != "other":
            assert value == real["destinations"][f"17 {destination} {port}"], (protocol, destination, port)
    assert destinations["udp", "10.96.0.20", "53"] == 40
    assert sum(destinations.values()) == real["entries"]
    ports = rows(found, "shoal_conntrack_nat_ports_used")
    worst = ("udp", real["outside_gateway"], real["outside_address"], "9999")
    assert ports[worst] == max(ports.values()) == 300 + 11 + 23
    for (_, source, destination, port), value in ports.items():
        assert value == real["ports"][f"{source} {destination} {port}"]
    assert len(ports) == 10


@pytest.mark.slow
@pytest.mark.root
def test_real_backends_that_are_gone() -> None:
    """A namespace goes away under UDP and TCP clients; the slow, the silent and the drained backend are not gone."""
    real = scene("stale")
    gone = {
        ("backend_gone", "udp", "10.96.0.10", "53", f"{real['gone']}:5310", ""): 1,
        ("backend_gone", "tcp", "10.96.0.11", "80", f"{real['gone']}:8011", ""): 1,
        ("backend_gone", "udp", "10.96.0.12", "53", f"{real['gone']}:5312", ""): 1,
    }
    silent = {("backend_silent", "udp", "10.96.0.14", "514", f"{real['alive']}:5314", ""): 1}
    dumps = [{tuple(labels): value for labels, value in dump if value} for dump in real["dumps"]]
    assert dumps[0] == {}
    assert dumps[-1] == gone | silent
    # Never anything else: the decoys are silent all the while, and conntrack -L shows that they were there.
    assert all(dump.items() <= (gone | silent).items() for dump in dumps)
    assert {row["dst"] for row in real["tool"]} == {f"10.96.0.{number}" for number in range(10, 16)}
    (drained,) = [row for row in real["tool"] if row["dst"] == "10.96.0.13"]
    assert (drained["established"], drained["reply_src"]) == (True, real["alive"])
    (slow,) = [row for row in real["tool"] if row["dst"] == "10.96.0.15"]
    assert slow["unreplied"] is False
    assert {signal: reason for signal, reason in real["signals"].items() if reason} == {
        "conntrack_endpoints": "not_enabled"
    }
    unknown = {tuple(labels): value for labels, value in real["unknown"] if value}
    assert unknown.keys() == {
        ("unreplied", *labels[1:]) for labels in (*gone, *silent) if labels[2] in {"10.96.0.10", "10.96.0.14"}
    }
    assert real["unknown_signals"]["conntrack_backends"] == "not_readable"


@pytest.mark.slow
@pytest.mark.root
def test_fifty_thousand_real_entries() -> None:
    """All are counted, in memory that does not grow with them, and the loop goes on."""
    real = scene("many")
    found = real["found"]
    assert rows(found, "shoal_conntrack_dump_entries")[()] == real["listed"] == 50_000
    assert sum(rows(found, "shoal_conntrack_destination_entries").values()) == 50_000
    assert len(rows(found, "shoal_conntrack_destination_entries")) == 11
    assert real["grown_kib"] < 16 << 10
    assert real["lag"] < 0.1
