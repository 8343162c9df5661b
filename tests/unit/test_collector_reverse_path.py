"""Collector `reverse_path`: the fault of two veth pairs and its decoys on a live kernel, and what may be missing."""

from __future__ import annotations

import json
import shutil
import socket
import subprocess
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

from shoal.collectors import reverse_path
from shoal.collectors.reverse_path import ReversePathCollector
from shoal.inventory import Node
from shoal.kernel.files import Reason, Roots, Unavailable
from shoal.kernel.netlink.peers import Pair
from shoal.kernel.netlink.routes import Link, Route
from shoal.settings import resolve

if TYPE_CHECKING:
    from collections.abc import Callable

FIXTURES = Path(__file__).parent / "fixtures"
SCENE = Path(__file__).with_name("routing_scene.py")


def read(roots: Roots) -> tuple[dict[str, dict[tuple[str, ...], float]], dict[str, str]]:
    """Scrape once; {metric: {labels: value}}, and for each signal the reason for its absence or ""."""
    collector = ReversePathCollector(resolve({}, {}))
    found = {family.metric.name: dict(family.samples) for family in collector.read(Node(roots))}
    return found, {signal: why[0].value if why else "" for signal, why in collector.availability.absent.items()}


def copied(tmp_path: Path) -> Roots:
    """Return a copy of a recorded node, to be damaged."""
    shutil.copytree(FIXTURES / "6.12/proc", tmp_path / "proc", symlinks=True)
    return Roots(str(tmp_path / "proc"), str(FIXTURES / "6.12/sys"), str(FIXTURES / "6.12/rootfs"))


def modes_of(tmp_path: Path, modes: dict[str, str]) -> Roots:
    """Return a node of nothing but rp_filter files."""
    for name, mode in modes.items():
        path = tmp_path / "proc/sys/net/ipv4/conf" / name
        path.mkdir(parents=True)
        (path / "rp_filter").write_text(f"{mode}\n")
    return Roots(str(tmp_path / "proc"), str(tmp_path / "sys"), str(tmp_path / "rootfs"))


@pytest.mark.parametrize("kernel", ["5.10", "6.1", "6.12"])
def test_the_counter_of_every_namespace_of_a_recorded_node(kernel: str) -> None:
    """It begins at 0 where it can be read, in each namespace; modes are not the recording's, so they are absent."""
    root = FIXTURES / kernel
    found, reasons = read(Roots(f"{root}/proc", f"{root}/sys", f"{root}/rootfs"))
    drops = found["shoal_reverse_path_drops_total"]
    assert drops["host", "", "", "", ""] == 0
    assert any(labels[0] == "pod" for labels in drops)
    assert reasons["reverse_path_drops"] == ""
    assert reasons["reverse_path_devices"] == "not_in_kernel"
    assert reasons["reverse_path_peers"] == "not_readable"
    assert "shoal_reverse_path_devices" not in found


def test_a_kernel_without_the_counter(tmp_path: Path) -> None:
    """Absent with a reason, and never 0."""
    roots = copied(tmp_path)
    for path in Path(roots.proc).glob("[0-9]*/net/netstat"):
        path.write_text("TcpExt: SyncookiesSent\nTcpExt: 0\n")
    found, reasons = read(roots)
    assert reasons["reverse_path_drops"] == "not_in_kernel"
    assert "shoal_reverse_path_drops_total" not in found


def test_damaged_counters(tmp_path: Path) -> None:
    """One namespace's damaged file costs that namespace; all of them cost the signal."""
    roots = copied(tmp_path)
    paths = sorted(path for path in Path(roots.proc).glob("[0-9]*/net/netstat") if not path.parent.is_symlink())
    whole, _ = read(roots)
    paths[-1].write_text("TcpExt: A B\nTcpExt: 1\n")
    found, reasons = read(roots)
    assert reasons["reverse_path_drops"] == ""
    assert 0 < len(found["shoal_reverse_path_drops_total"]) <= len(whole["shoal_reverse_path_drops_total"])
    for path in paths:
        path.write_text("\0\0")
    assert read(roots)[1]["reverse_path_drops"] == "malformed"


@pytest.fixture
def network(monkeypatch: pytest.MonkeyPatch) -> Callable[..., None]:
    """Return a function that puts devices, their addresses, peers and routes in the kernel's place."""

    def set_up(devices: dict[str, str], pairs: dict[tuple[str, str], bool], way_back: str) -> None:
        indexes = {name: index for index, name in enumerate(devices, 2)}
        links = {index: Link(name, up=True, loopback=False, arp=True) for name, index in indexes.items()}
        links[1] = Link("lo", up=True, loopback=True, arp=True)
        links[99] = Link("down0", up=False, loopback=False, arp=True)
        addresses: dict[bytes, set[int]] = {socket.inet_aton("10.9.9.9"): {1, 99, 1000}}
        for name, address in devices.items():
            addresses.setdefault(socket.inet_aton(address), set()).add(indexes[name])
        packed = {Pair(socket.inet_aton(a), socket.inet_aton(b)): silent for (a, b), silent in pairs.items()}
        route = Route(indexes.get(way_back, 500), None, None, own=False)
        monkeypatch.setattr(reverse_path, "read_links", lambda _: links)
        monkeypatch.setattr(reverse_path, "read_addresses", lambda _: addresses)
        monkeypatch.setattr(
            reverse_path, "read_peers", lambda wanted, _: {p: s for p, s in packed.items() if p.local in wanted}
        )
        monkeypatch.setattr(reverse_path, "find_route", lambda *_: route)

    return set_up


def test_only_devices_that_can_be_a_way_in_count(tmp_path: Path, network: Callable[..., None]) -> None:
    """Neither loopback, nor what is down, nor what is gone; a device whose files have just gone is left out."""
    network({"eth0": "10.0.0.1", "eth1": "10.0.1.1", "gone0": "10.0.2.1"}, {}, "eth1")
    found, reasons = read(modes_of(tmp_path, {"all": "0", "eth0": "1", "eth1": "2", "lo": "1", "down0": "1"}))
    assert found["shoal_reverse_path_filter_mode"] == {("eth0",): 1, ("eth1",): 2}
    assert found["shoal_reverse_path_devices"] == {("off",): 0, ("strict",): 1, ("loose",): 1}
    assert reasons["reverse_path_devices"] == ""


@pytest.mark.parametrize(
    ("everybody", "own", "mode"),
    [("0", "0", "off"), ("1", "0", "strict"), ("0", "1", "strict"), ("2", "1", "loose"), ("1", "2", "loose")],
)
def test_the_larger_mode_counts(
    tmp_path: Path, network: Callable[..., None], everybody: str, own: str, mode: str
) -> None:
    """The kernel takes the larger of all's and the device's own (IN_DEV_MAXCONF)."""
    network({"eth0": "10.0.0.1"}, {}, "eth0")
    found, _ = read(modes_of(tmp_path, {"all": everybody, "eth0": own}))
    assert found["shoal_reverse_path_devices"][mode,] == 1


def test_peers_whose_way_back_is_another(tmp_path: Path, network: Callable[..., None]) -> None:
    """Of a strict device's address; those that do not answer are counted beside them; others' addresses are not."""
    pairs = {
        ("10.0.0.1", "10.5.0.1"): True,
        ("10.0.0.1", "10.5.0.2"): False,
        ("10.0.1.1", "10.5.0.3"): True,
    }
    network({"eth0": "10.0.0.1", "eth1": "10.0.1.1"}, pairs, "eth1")
    found, _ = read(modes_of(tmp_path, {"all": "0", "eth0": "1", "eth1": "0"}))
    assert found["shoal_reverse_path_asymmetric_peers"] == {("eth0",): 2}
    assert found["shoal_reverse_path_unanswered_peers"] == {("eth0",): 1}
    assert found["shoal_reverse_path_unchecked_peers"] == {(): 0}


@pytest.mark.parametrize("way_back", ["eth0", "tunnel0"])
def test_the_same_device_or_one_without_an_address_is_no_other_way(
    tmp_path: Path, network: Callable[..., None], way_back: str
) -> None:
    """A pod's own unnumbered device is the way to it and from it, although the address is another device's."""
    network({"eth0": "10.0.0.1", "eth1": "10.0.1.1"}, {("10.0.0.1", "10.5.0.1"): True}, way_back)
    found, _ = read(modes_of(tmp_path, {"all": "1", "eth0": "0", "eth1": "0"}))
    assert set(found["shoal_reverse_path_asymmetric_peers"].values()) == {0}


def test_an_address_of_many_devices_is_on_the_way_of_each(tmp_path: Path, network: Callable[..., None]) -> None:
    """Where every pod's host side has the same gateway address, the way back by any of them is the same way."""
    network({"veth1": "10.0.0.1", "veth2": "10.0.0.1"}, {("10.0.0.1", "10.5.0.1"): True}, "veth2")
    found, _ = read(modes_of(tmp_path, {"all": "1", "veth1": "0", "veth2": "0"}))
    assert found["shoal_reverse_path_asymmetric_peers"] == {("veth1",): 0, ("veth2",): 0}


def test_many_peers_and_devices_are_cut(tmp_path: Path, network: Callable[..., None]) -> None:
    """The peers that do not answer are looked up first; what was not is counted; ten devices, strict ones first."""
    pairs = {("10.0.0.1", f"10.5.{i // 256}.{i % 256}"): i >= 390 for i in range(400)}
    devices = {"aaa0": "10.0.0.1"} | {f"eth{i}": f"10.0.{i}.2" for i in range(10, 31)}
    network(devices, pairs, "eth10")
    modes = {"all": "0", "aaa0": "1"} | {f"eth{i}": str(1 + i % 2) for i in range(10, 31)}
    found, _ = read(modes_of(tmp_path, modes))
    assert found["shoal_reverse_path_unanswered_peers"]["aaa0",] == 10
    assert found["shoal_reverse_path_asymmetric_peers"]["aaa0",] == 256
    assert found["shoal_reverse_path_unchecked_peers"] == {(): 144}
    assert len(found["shoal_reverse_path_filter_mode"]) == len(found["shoal_reverse_path_asymmetric_peers"]) == 10
    assert set(found["shoal_reverse_path_filter_mode"].values()) == {1}
    assert found["shoal_reverse_path_devices"] == {("off",): 0, ("strict",): 12, ("loose",): 10}


def test_netlink_that_fails_costs_its_own_signals(monkeypatch: pytest.MonkeyPatch) -> None:
    """The counters need no netlink, and stay."""

    def refuse() -> None:
        raise Unavailable(Reason.NO_PERMISSION, "netlink ROUTE: not permitted")

    monkeypatch.setattr(reverse_path, "open_routes", refuse)
    found, reasons = read(Roots())
    assert reasons == {
        "reverse_path_drops": "",
        "reverse_path_devices": "no_permission",
        "reverse_path_rules": "no_permission",
        "reverse_path_peers": "not_readable",
    }
    assert found.keys() == {"shoal_reverse_path_drops_total"}


@pytest.fixture(scope="module")
def scene() -> dict[str, Any]:
    """Return what happened between two namespaces with two veth pairs."""
    done = subprocess.run(
        ["unshare", "--net", "--mount", sys.executable, str(SCENE), "reverse_path"],
        check=True,
        capture_output=True,
        text=True,
    )
    found: dict[str, Any] = json.loads(done.stdout)
    return found


@pytest.mark.root
def test_seven_of_seven_packets_are_counted(scene: dict[str, Any]) -> None:
    """Strict by all, by the device, by both: each packet of the wrong way is one drop, by nstat too."""
    for modes in ("1 0", "0 1", "1 1"):
        assert scene[f"modes {modes}"] == [7, 7]
        assert scene[f"scrape {modes}"]["shoal_reverse_path_devices{strict}"] == 2


@pytest.mark.root
def test_decoys_are_not_counted(scene: dict[str, Any]) -> None:
    """Loose, off, a firewall, and martians on a single-homed host: nothing is counted, by nstat neither."""
    for modes in ("2 1", "1 2", "2 0", "0 0", "3 0"):
        assert scene[f"modes {modes}"] == [0, 0]
        assert scene[f"scrape {modes}"]["shoal_reverse_path_devices{strict}"] == 0
    assert scene["firewall"] == [0, 0]
    assert scene["single"] == [0, 0]
    assert scene["scrape single"]["shoal_reverse_path_devices{strict}"] == 1


@pytest.mark.root
def test_strict_mode_leaves_arp_unanswered(scene: dict[str, Any]) -> None:
    """The form of the failure in which nothing is sent and nothing counted: the sender's entry stays incomplete."""
    assert scene["unresolved"] == [0, 0]
    assert "INCOMPLETE" in scene["unresolved_neighbours"] or "FAILED" in scene["unresolved_neighbours"]


@pytest.mark.root
def test_a_source_without_any_route_is_dropped_by_loose_mode_too(scene: dict[str, Any]) -> None:
    """So a counter that rises on a host without a strict device is another matter: a missing route."""
    assert [scene[f"unroutable {mode}"] for mode in (0, 1, 2)] == [[0, 0], [7, 7], [7, 7]]


@pytest.mark.root
def test_who_is_at_risk_and_who_is_hurt(scene: dict[str, Any]) -> None:
    """A connection from near1's address whose peer is reached by near0: at risk when strict, hurt when it sends."""

    def peers(name: str) -> tuple[float, float]:
        found = scene[name]
        assert found["shoal_reverse_path_asymmetric_peers{near0}"] == 0
        assert found["shoal_reverse_path_unanswered_peers{near0}"] == 0
        return (
            found["shoal_reverse_path_asymmetric_peers{near1}"],
            found["shoal_reverse_path_unanswered_peers{near1}"],
        )

    assert peers("idle") == (1, 0)
    assert peers("retransmitting") == (1, 1)
    assert peers("symmetric") == (0, 0)
    assert peers("connecting") == (1, 1)
    assert scene["symmetric"]["shoal_reverse_path_policy_rules{}"] == 1
    assert scene["idle"]["shoal_reverse_path_policy_rules{}"] == 0
