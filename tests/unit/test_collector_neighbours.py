"""Collector `neighbours`: an address that moves, with and without a word, its decoys, and what may be missing."""

from __future__ import annotations

import json
import re
import socket
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

from shoal.collectors import neighbours
from shoal.collectors.neighbours import NeighboursCollector, _Address, _Watch
from shoal.inventory import Node
from shoal.kernel.files import ParseError, Reason, Roots, Unavailable
from shoal.kernel.netlink.neighbours import Event, Key, Neighbour, Neighbours, Table
from shoal.kernel.netlink.routes import NextHop, NextHops, Route
from shoal.settings import SettingsError, resolve

if TYPE_CHECKING:
    from collections.abc import Iterator

SCENE = Path(__file__).with_name("routing_scene.py")
FIRST, SECOND = bytes.fromhex("020000000001"), bytes.fromhex("020000000002")
KEY = Key(2, socket.inet_aton("10.0.0.1"))
Samples = dict[str, dict[tuple[str, ...], float]]


def ip(address: str) -> bytes:
    """Return an address as bytes."""
    return socket.inet_pton(socket.AF_INET6 if ":" in address else socket.AF_INET, address)


def at(mac: bytes | None, state: str = "reachable", confirmed: float = 1.0) -> Neighbour:
    """Return an entry."""
    return Neighbour(state, mac, confirmed)


def read(collector: NeighboursCollector, roots: Roots | None = None) -> tuple[Samples, dict[str, str]]:
    """Scrape once; {metric: {labels: value}}, and for each signal the reason for its absence or ""."""
    found: Samples = {}
    for family in collector.read(Node(roots or Roots())):
        assert len({labels for labels, _ in family.samples}) == len(family.samples)
        found[family.metric.name] = dict(family.samples)
    return found, {signal: why[0].value if why else "" for signal, why in collector.availability.absent.items()}


def collector(**flags: str) -> NeighboursCollector:
    """Make a collector; its watch is not started."""
    return NeighboursCollector(resolve({key.replace("_", "."): value for key, value in flags.items()}, {}))


class Network:
    """What the kernel says, in its place; devices are eth<index>."""

    def __init__(self) -> None:
        """Begin with nothing."""
        self.entries: dict[Key, Neighbour] = {}
        self.counts: dict[tuple[int, str], int] = {}
        self.unconfirmed: dict[int, float] = {}
        self.hops: list[NextHop] = []
        self.routes: dict[bytes, Route] = {}
        self.defaults: dict[int, NextHop] = {}


@pytest.fixture
def network(monkeypatch: pytest.MonkeyPatch) -> Network:
    """Put a network in the kernel's place."""
    made = Network()

    def device(index: int) -> str:
        return f"eth{index}" if index < 1000 else ""

    def entries(_: object, wanted: set[Key]) -> Neighbours:
        kept = {key: entry for key, entry in made.entries.items() if key in wanted}
        return Neighbours(made.counts, made.unconfirmed, kept)

    def hops(_: object, family: int, __: int) -> NextHops:
        return NextHops(tuple(made.hops) if family == socket.AF_INET else (), complete=True)

    monkeypatch.setattr(neighbours, "_device", device)
    monkeypatch.setattr(neighbours, "read_neighbours", entries)
    monkeypatch.setattr(neighbours, "read_next_hops", hops)
    monkeypatch.setattr(neighbours, "find_route", lambda _, address: made.routes.get(address))
    monkeypatch.setattr(neighbours, "find_default", lambda _, family: made.defaults.get(family))
    return made


def test_named_addresses_come_first_and_next_hops_after_them(network: Network) -> None:
    """The default's gateway before others; what is behind a gateway, one's own, or on a lost device is not watched."""
    network.routes = {
        ip("10.0.0.9"): Route(2, None, None, own=False),
        ip("10.0.0.8"): Route(1, None, None, own=True),
        ip("8.8.8.8"): Route(2, ip("10.0.0.1"), None, own=False),
    }
    network.defaults = {socket.AF_INET: NextHop(2, ip("10.0.0.1")), socket.AF_INET6: NextHop(3, ip("fe80::1"))}
    network.hops = [NextHop(2, ip("10.0.0.9")), NextHop(1001, ip("10.0.0.7"))]
    network.hops += [NextHop(4, ip(f"10.4.0.{i}")) for i in range(1, 20)]
    network.entries = {Key(2, ip("10.0.0.9")): at(FIRST), Key(3, ip("fe80::1")): at(SECOND, "stale", 900)}
    found, _ = read(collector(neighbours_watch="10.0.0.9,10.0.0.8,8.8.8.8,192.0.2.77,fe80::9%nosuch0"))
    states = list(found["shoal_neighbour_state"])
    assert states[:3] == [
        ("eth2", "10.0.0.9", "reachable"),
        ("eth2", "10.0.0.1", "none"),
        ("eth3", "fe80::1", "stale"),
    ]
    assert len(states) == 10
    # Four named ones in vain, one hop whose device is gone, and what is beyond ten.
    assert found["shoal_neighbours_unwatched"] == {(): 4 + 1 + 12}
    assert found["shoal_neighbour_info"] == {
        ("eth2", "10.0.0.9", "02:00:00:00:00:01", "named"): 1,
        ("eth3", "fe80::1", "02:00:00:00:00:02", "next_hop"): 1,
    }
    assert found["shoal_neighbour_confirmation_seconds"] == {("eth2", "10.0.0.9"): 1.0}


def test_a_link_local_address_is_watched_on_its_device(network: Network) -> None:
    """The device that was named with it, which no route could tell."""
    network.entries = {Key(1, ip("fe80::9")): at(FIRST)}
    found, _ = read(collector(neighbours_watch="fe80::9%lo"))
    assert list(found["shoal_neighbour_state"]) == [("eth1", "fe80::9", "reachable")]


def test_entries_of_many_devices_are_cut(network: Network) -> None:
    """The five largest, the others summed; every state of a device that is there is a number, noarp is none."""
    network.counts = {(index, "stale"): index * 10 for index in range(2, 10)}
    network.counts |= {(2, "failed"): 3, (9, "noarp"): 1000, (1005, "stale"): 7, (99, "noarp"): 5}
    network.unconfirmed = {9: 3.0, 2: 40.0, 3: 50.0}
    found, _ = read(collector())
    entries = found["shoal_neighbours_entries"]
    assert {labels[0] for labels in entries} == {"eth9", "eth8", "eth7", "eth6", "eth5", "other"}
    assert entries["eth9", "stale"] == 90
    assert entries["eth9", "failed"] == 0
    assert entries["other", "stale"] == 20 + 30 + 40 + 7
    assert entries["other", "failed"] == 3
    assert not any(state in ("noarp", "none") for _, state in entries)
    assert found["shoal_neighbours_oldest_confirmation_seconds"] == {("eth9",): 3.0, ("other",): 50.0}


def test_changes_are_found_by_scrapes_alone_but_not_told_without_the_watch(network: Network) -> None:
    """A change that the watch missed is in the next dump; without any watch the count would be too low, so absent."""
    network.hops = [NextHop(2, ip("10.0.0.1"))]
    network.entries = {KEY: at(FIRST)}
    one = collector()
    found, reasons = read(one)
    assert reasons["neighbours_watch"] == "not_readable"
    assert "shoal_neighbour_mac_changes_total" not in found
    one._watch.failure = None
    assert read(one)[0]["shoal_neighbour_mac_changes_total"] == {("eth2", "10.0.0.1"): 0}
    for entry, changes, macs in (
        (at(SECOND), 1, 2),
        (at(None, "failed"), 1, 2),
        (at(SECOND, "stale"), 1, 2),
        (at(FIRST), 2, 2),
    ):
        network.entries = {KEY: entry}
        found, _ = read(one)
        assert found["shoal_neighbour_mac_changes_total"] == {("eth2", "10.0.0.1"): changes}
        assert found["shoal_neighbour_macs"] == {("eth2", "10.0.0.1"): macs}


def test_an_address_that_is_no_longer_a_next_hop_ends_its_series(network: Network) -> None:
    """And begins anew at 0 when it is one again."""
    network.hops = [NextHop(2, ip("10.0.0.1"))]
    network.entries = {KEY: at(FIRST)}
    one = collector()
    one._watch.failure = None
    read(one)
    network.entries = {KEY: at(SECOND)}
    assert read(one)[0]["shoal_neighbour_mac_changes_total"] == {("eth2", "10.0.0.1"): 1}
    hops, network.hops = network.hops, []
    assert read(one)[0]["shoal_neighbour_mac_changes_total"] == {}
    network.hops = hops
    assert read(one)[0]["shoal_neighbour_mac_changes_total"] == {("eth2", "10.0.0.1"): 0}


def test_mac_addresses_are_forgotten_in_time(monkeypatch: pytest.MonkeyPatch) -> None:
    """Five minutes after; the one that it still has counts however old, and never more than sixteen are kept."""
    now = 1000.0
    monkeypatch.setattr(time, "monotonic", lambda: now)
    address = _Address()
    assert address.macs() == 0
    address.note(at(FIRST))
    now += 10
    address.note(at(SECOND))
    assert address.macs() == 2
    now += 295
    assert address.macs() == 1
    now += 1000
    assert address.macs() == 1
    for i in range(100):
        address.note(at(bytes([2, 0, 0, 0, 1, i])))
    assert address.macs() == len(address.seen) == 16
    assert address.changes == 101


def test_signals_without_netlink(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Nothing is watched, nothing is 0, and each signal says why; with the next scrape it may be there again."""

    def refuse() -> None:
        raise Unavailable(Reason.NO_PERMISSION, "netlink ROUTE: not permitted")

    one = collector(neighbours_verify="true")
    one._watch.failure = None
    with monkeypatch.context() as patched:
        patched.setattr(neighbours, "open_routes", refuse)
        found, reasons = read(one, Roots(str(tmp_path), str(tmp_path), str(tmp_path)))
    assert found == {}
    assert reasons == {
        "neighbours_entries": "no_permission",
        "neighbours_watch": "not_readable",
        "neighbours_verify": "not_readable",
        "neighbours_table": "no_permission",
        "neighbours_discards": "not_in_kernel",
    }
    assert set(read(one)[1].values()) - {"not_in_kernel"} == {""}


def test_verification_is_off_unless_asked_for() -> None:
    """And says so."""
    found, reasons = read(collector())
    assert reasons["neighbours_verify"] == "not_enabled"
    assert not any("verify" in name for name in found)


def test_the_tables_of_both_protocols(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Thresholds by level, counters by protocol; a kernel without IPv6 has one table and no failure."""
    monkeypatch.setattr(
        neighbours,
        "read_tables",
        lambda _: {"arp_cache": Table(7, (128, 512, 1024), 1, 2, 3), "clip": Table(1, (1, 2, 3), 1, 1, 1)},
    )
    (tmp_path / "1/net/stat").mkdir(parents=True)
    (tmp_path / "1/net/stat/arp_cache").write_text("unresolved_discards\n2a\n")
    found, reasons = read(collector(), Roots(str(tmp_path), str(tmp_path), str(tmp_path)))
    assert found["shoal_neighbours_table_entries"] == {("ipv4",): 7}
    assert found["shoal_neighbours_table_threshold"] == {("ipv4", "1"): 128, ("ipv4", "2"): 512, ("ipv4", "3"): 1024}
    assert found["shoal_neighbours_resolution_failures_total"] == {("ipv4",): 1}
    assert found["shoal_neighbours_forced_collections_total"] == {("ipv4",): 2}
    assert found["shoal_neighbours_table_overflows_total"] == {("ipv4",): 3}
    assert found["shoal_neighbours_unresolved_discards_total"] == {("ipv4",): 42}
    assert reasons["neighbours_discards"] == ""
    (tmp_path / "1/net/stat/ndisc_cache").write_text("damaged\n")
    assert (
        read(collector(), Roots(str(tmp_path), str(tmp_path), str(tmp_path)))[1]["neighbours_discards"] == "malformed"
    )


@pytest.fixture
def pair() -> Iterator[tuple[socket.socket, socket.socket]]:
    """Return two connected sockets: what is sent by the one wakes the watch on the other."""
    ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_DGRAM)
    with ours, theirs:
        yield ours, theirs


def test_a_damaged_notification_costs_the_signal_until_the_next(
    monkeypatch: pytest.MonkeyPatch, pair: tuple[socket.socket, socket.socket]
) -> None:
    """The watch goes on, whatever the kernel sends."""
    script: list[object] = [ParseError("netlink", 1, "something"), ([Event(KEY, at(SECOND))], True)]

    def scripted(events: socket.socket, _: int) -> object:
        events.recv(10)
        item = script.pop(0)
        if isinstance(item, Exception):
            raise item
        return item

    monkeypatch.setattr(neighbours, "open_events", lambda: pair[0])
    monkeypatch.setattr(neighbours, "read_events", scripted)
    watch = _Watch(verify=False)
    watch.update([KEY], {KEY: at(FIRST)})
    watch.start()
    try:
        pair[1].send(b"x")
        assert until(lambda: isinstance(watch.failure, ParseError))
        pair[1].send(b"x")
        assert until(lambda: watch.failure is None)
        assert until(lambda: watch.addresses[KEY].changes == 1)
        assert watch.lost == 1
    finally:
        watch.stop()


def test_a_watch_that_ends_says_so(
    monkeypatch: pytest.MonkeyPatch, pair: tuple[socket.socket, socket.socket], caplog: pytest.LogCaptureFixture
) -> None:
    """What nobody thought of ends the thread, and the signal with it."""

    def fail(*_: object) -> None:
        raise RuntimeError("what nobody thought of")

    monkeypatch.setattr(neighbours, "open_events", lambda: pair[0])
    monkeypatch.setattr(neighbours, "read_events", fail)
    watch = _Watch(verify=False)
    watch.start()
    pair[1].send(b"x")
    assert until(lambda: watch.failure is not None)
    assert isinstance(watch.failure, Unavailable)
    assert watch.failure.reason is Reason.COLLECTOR_FAILED
    assert "what nobody thought of" in caplog.text
    watch.stop()


def until(condition: Any) -> bool:
    """Wait for a condition, five seconds at most."""
    deadline = time.monotonic() + 5
    while time.monotonic() < deadline:
        if condition():
            return True
        time.sleep(0.01)
    return False


@pytest.fixture
def made() -> tuple[NeighboursCollector, NeighboursCollector]:
    """Return two collectors, made outside of any loop."""
    return collector(), collector()


async def test_starting_and_stopping_leaves_nothing(made: tuple[NeighboursCollector, NeighboursCollector]) -> None:
    """The thread is gone when stop returns, and one that never started can be stopped."""
    one, never = made
    await one.start()
    assert any(thread.name == "shoal-neighbours" for thread in threading.enumerate())
    await one.stop()
    assert not any(thread.name == "shoal-neighbours" for thread in threading.enumerate())
    await never.stop()


def test_a_kernel_that_gives_no_notifications(monkeypatch: pytest.MonkeyPatch) -> None:
    """start() raises what the log shall say, and the signal keeps the reason."""

    def refuse() -> None:
        raise Unavailable(Reason.NO_PERMISSION, "no notifications")

    monkeypatch.setattr(neighbours, "open_events", refuse)
    one = collector()
    with pytest.raises(Unavailable):
        one._watch.start()
    assert read(one)[1]["neighbours_watch"] == "no_permission"


@pytest.mark.parametrize(
    ("error", "reason"),
    [
        (Unavailable(Reason.NO_PERMISSION, "a packet socket"), "no_permission"),
        (ParseError("netlink", 1, "something"), "malformed"),
        (Unavailable(Reason.NOT_READABLE, "eth2 is down"), ""),
    ],
)
def test_verification_that_fails(
    network: Network, monkeypatch: pytest.MonkeyPatch, error: Exception, reason: str
) -> None:
    """No capability costs the signal; a device that is down costs its address, which is then not asked."""

    def fail(_: Key) -> bool:
        raise error

    network.hops = [NextHop(2, ip("10.0.0.1"))]
    one = collector(neighbours_verify="true")
    one._watch.failure = None
    read(one)
    one._watch.addresses[KEY].ask_at = 0
    monkeypatch.setattr(one._watch, "_ask", fail)
    one._watch._ask_next()
    found, reasons = read(one)
    assert reasons["neighbours_verify"] == reason
    assert one._watch.addresses[KEY].ask_at > time.monotonic() + 50
    if not reason:
        assert found["shoal_neighbour_verify_requests_total"] == {("eth2", "10.0.0.1"): 0}
        assert found["shoal_neighbour_verify_answering_macs"] == {}


def test_a_missing_capability_is_known_before_the_first_request(monkeypatch: pytest.MonkeyPatch) -> None:
    """The first request is sent within a minute; until then the signal would seem to be there."""

    def refuse() -> None:
        raise Unavailable(Reason.NO_PERMISSION, "a packet socket")

    monkeypatch.setattr(neighbours, "check_permission", refuse)
    one = collector(neighbours_verify="true")
    one._watch.start()
    try:
        assert read(one)[1]["neighbours_verify"] == "no_permission"
        assert read(one)[1]["neighbours_watch"] == ""
    finally:
        one._watch.stop()


def test_who_is_asked_next(network: Network, monkeypatch: pytest.MonkeyPatch) -> None:
    """The one that waited longest, IPv4 only, nobody before it is time; a conflict is looked at less often."""
    asked: list[Key] = []

    def ask(key: Key) -> bool:
        asked.append(key)
        return key == KEY

    network.hops = [NextHop(2, ip("10.0.0.1")), NextHop(2, ip("10.0.0.2")), NextHop(2, ip("fe80::1"))]
    one = collector(neighbours_verify="true")
    read(one)
    monkeypatch.setattr(one._watch, "_ask", ask)
    addresses = one._watch.addresses
    now = time.monotonic()
    assert all(now <= address.ask_at <= now + 61 for address in addresses.values())
    addresses[KEY].ask_at, addresses[Key(2, ip("10.0.0.2"))].ask_at = 20, 10
    for _ in range(5):
        one._watch._ask_next()
    assert asked == [Key(2, ip("10.0.0.2")), KEY]
    assert now + 55 < addresses[Key(2, ip("10.0.0.2"))].ask_at < now + 70
    assert now + 500 < addresses[KEY].ask_at < now + 700


def scene_of(name: str) -> dict[str, Any]:
    """Run a scene in namespaces of its own."""
    done = subprocess.run(
        ["unshare", "--net", "--mount", sys.executable, str(SCENE), name], check=True, capture_output=True, text=True
    )
    found: dict[str, Any] = json.loads(done.stdout)
    return found


SERVICE = "{eth0,10.8.0.100}"


@pytest.mark.slow
@pytest.mark.root
def test_a_move_without_a_word_and_a_clean_failover() -> None:
    """What states and counters say of the fault while nobody asks, and of the decoy: one change that was followed."""
    scene = scene_of("failover")
    old, new = scene["macs"]
    before, entry = scene["before"]
    assert entry == {"mac": old, "state": "REACHABLE"}
    assert before[f"shoal_neighbour_mac_changes_total{SERVICE}"] == 0
    assert before[f"shoal_neighbour_info{{eth0,10.8.0.100,{old},named}}"] == 1
    # The fault: the entry is wrong, reachable, and nothing but the age of its confirmation moves.
    silent, entry = scene["silent"]
    assert entry == {"mac": old, "state": "REACHABLE"}
    assert silent["shoal_neighbour_state{eth0,10.8.0.100,reachable}"] == 1
    assert silent[f"shoal_neighbour_mac_changes_total{SERVICE}"] == 0
    assert silent[f"shoal_neighbour_confirmation_seconds{SERVICE}"] >= 2
    assert silent["shoal_neighbours_oldest_confirmation_seconds{eth0}"] >= 2
    # An entry that was deleted and resolved anew has changed all the same.
    resolved, entry = scene["resolved"]
    assert entry == {"mac": new, "state": "REACHABLE"}
    assert resolved[f"shoal_neighbour_mac_changes_total{SERVICE}"] == 1
    assert resolved[f"shoal_neighbour_macs{SERVICE}"] == 2
    # The clean failover is followed at once.
    announced, entry = scene["announced"]
    assert entry["mac"] == old
    assert announced[f"shoal_neighbour_mac_changes_total{SERVICE}"] == 2
    assert announced[f"shoal_neighbour_info{{eth0,10.8.0.100,{old},named}}"] == 1
    assert announced[f"shoal_neighbour_macs{SERVICE}"] == 2
    # Six changes between two scrapes: a dump alone would have seen one.
    assert scene["six"][0][f"shoal_neighbour_mac_changes_total{SERVICE}"] == 8
    assert scene["six"][0]["neighbours_verify{not_enabled}"] == 1


@pytest.mark.slow
@pytest.mark.root
def test_asking_proves_it_and_leaves_the_entry_as_it_was() -> None:
    """Healthy, moved, claimed by two, pinned to the wrong one, gone: what answers say, and what the kernel keeps."""
    scene = scene_of("asked")
    old, new = scene["macs"]
    seen = {
        name: tuple(
            found[0][f"shoal_neighbour_verify_{what}{SERVICE}"] for what in ("mismatches_total", "answering_macs")
        )
        for name, found in scene.items()
        if name != "macs"
    }
    assert seen["healthy"] == (0, 1)
    assert scene["healthy"][1] == {"mac": old, "state": "REACHABLE"}
    # One mismatch is the proof; the kernel has heard the answer and followed it, so there is no second.
    assert seen["moved"] == (1, 1)
    assert scene["moved"][1] == {"mac": new, "state": "REACHABLE"}
    # Two claim it: each request shows it, and the entry is the one that the kernel had.
    assert seen["two"][0] >= seen["moved"][0] + 1
    assert seen["two, other"][0] >= seen["two"][0] + 1
    assert seen["two"][1] == seen["two, other"][1] == 2
    assert scene["two"][0][f"shoal_neighbour_macs{SERVICE}"] == 2
    assert scene["two"][1]["mac"] == new
    assert scene["two, other"][1]["mac"] == old
    # A permanent entry is never followed: each request is a mismatch.
    assert seen["pinned"][0] >= seen["two, other"][0] + 1
    assert seen["pinned"][1] == 1
    assert scene["pinned"][1] == {"mac": old, "state": "PERMANENT"}
    # One more may have been under way when the last machine let go of it.
    assert seen["nobody"][0] - seen["pinned"][0] <= 1
    assert seen["nobody"][1] == 0


@pytest.mark.slow
@pytest.mark.root
def test_stale_entries_are_nothing_and_a_storm_is_counted() -> None:
    """Hundreds of stale entries leave the watched next hop alone; notifications that were lost are told."""
    scene = scene_of("quiet")
    found, by_ip = scene["stale"]
    assert found["shoal_neighbours_entries{eth0,stale}"] == len(by_ip) == 250
    assert found["shoal_neighbour_state{eth0,10.8.0.2,none}"] == 1
    assert found["shoal_neighbour_mac_changes_total{eth0,10.8.0.2}"] == 0
    assert found["shoal_neighbours_notifications_lost_total{}"] == 0
    assert not any(name.startswith("shoal_neighbours_oldest") for name in found)
    assert not any("10.8.0.4" in name for name in found)
    storm, _ = scene["storm"]
    assert storm["shoal_neighbours_notifications_lost_total{}"] >= 1
    assert storm["shoal_neighbour_info{eth0,10.8.0.2,02:00:00:00:00:bb,next_hop}"] == 1


def test_the_addresses_of_the_option() -> None:
    """Separated by commas, each once, as `ipaddress` writes them, with the device where an address needs one."""
    given = resolve({"neighbours.watch": " 10.0.0.1,2001:DB8::1, fe80::1%eth0,10.0.0.1,"}, {})
    assert given.neighbours_watch == ("10.0.0.1", "2001:db8::1", "fe80::1%eth0")
    assert resolve({}, {}).neighbours_watch == ()
    assert not resolve({}, {}).neighbours_verify


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("10.0.0", "IP addresses"),
        ("10.0.0.0/24", "IP addresses"),
        ("gateway", "IP addresses"),
        ("fe80::1", "fe80::1%eth0"),
    ],
)
def test_what_is_no_address_is_refused(text: str, said: str) -> None:
    """A sentence that names the option and what would be right."""
    with pytest.raises(SettingsError, match=re.escape(said)) as caught:
        resolve({"neighbours.watch": text}, {})
    assert "--neighbours.watch" in str(caught.value)
