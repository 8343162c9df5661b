"""Neighbour entries and tables over netlink, against ip(8), pyroute2, recorded kernels, and arbitrary bytes."""

from __future__ import annotations

import contextlib
import errno
import json
import os
import re
import socket
import struct
import subprocess
import sys
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from shoal.kernel.files import ParseError, Reason, Unavailable
from shoal.kernel.netlink.core import split
from shoal.kernel.netlink.neighbours import (
    Event,
    Key,
    Neighbour,
    Table,
    open_events,
    parse_discards,
    parse_events,
    parse_neighbours,
    parse_tables,
    read_discards,
    read_events,
)

SCENE = Path(__file__).with_name("routing_scene.py")
RECORDINGS = sorted(Path(__file__).parent.glob("fixtures/*/netlink/route_witness.json"))
TICKS = os.sysconf("SC_CLK_TCK")
REACHABLE, STALE, DELAY, PROBE, FAILED, NOARP = 0x02, 0x04, 0x08, 0x10, 0x20, 0x40
NEWNEIGH, DELNEIGH = 28, 29
MAC = bytes.fromhex("020000000001")


def attribute(kind: int, value: bytes) -> bytes:
    """Return one netlink attribute, padded."""
    data = struct.pack("=HH", 4 + len(value), kind) + value
    return data + bytes(-len(data) % 4)


def entry(
    address: str = "10.0.0.1", *, device: int = 2, state: int = REACHABLE, mac: bytes = MAC, confirmed: float = 1.0
) -> bytes:
    """Return struct ndmsg and the attributes that the kernel sends."""
    times = struct.pack("=IIII", int(confirmed * TICKS), 7, 8, 1)
    return (
        struct.pack("=BBHiHBB", socket.AF_INET, 0, 0, device, state, 0, 1)
        + attribute(1, socket.inet_aton(address))
        + (attribute(2, mac) if mac else b"")
        + attribute(3, times)
        + attribute(4, bytes(4))
    )


def notification(kind: int, body: bytes) -> bytes:
    """Return a netlink message as a multicast group gets it."""
    return struct.pack("=IHHII", 16 + len(body), kind, 0, 0, 0) + body


def test_entries_are_summed_and_those_asked_for_kept() -> None:
    """By device and state; the longest unconfirmed of what is in use; one that is asked for with all it has."""
    wanted = Key(2, socket.inet_aton("10.0.0.1"))
    found = parse_neighbours(
        [
            entry(confirmed=2.5),
            entry("10.0.0.2", confirmed=9.25),
            entry("10.0.0.3", state=STALE, confirmed=5000),
            entry("10.0.0.4", device=3, state=STALE),
            entry("10.0.0.5", device=3, state=FAILED, mac=b""),
            entry("10.0.0.1", device=4, state=PROBE, confirmed=7),
            entry("224.0.0.1", device=4, state=NOARP),
        ],
        {wanted, Key(9, socket.inet_aton("10.0.0.1"))},
    )
    assert found.counts == {
        (2, "reachable"): 2,
        (2, "stale"): 1,
        (3, "stale"): 1,
        (3, "failed"): 1,
        (4, "probe"): 1,
        (4, "noarp"): 1,
    }
    assert found.unconfirmed_seconds == {2: 9.25, 4: 7}
    assert found.entries == {wanted: Neighbour("reachable", MAC, 2.5)}


def test_the_order_of_attributes_does_not_matter() -> None:
    """An address that does not come first is found all the same, in use or not."""
    wanted = Key(2, socket.inet_aton("10.0.0.1"))
    for state, name in ((STALE, "stale"), (DELAY, "delay")):
        head = struct.pack("=BBHiHBB", socket.AF_INET, 0, 0, 2, state, 0, 1)
        late = head + attribute(2, MAC) + attribute(1, wanted.address) + attribute(3, struct.pack("=IIII", 0, 0, 0, 0))
        for message in (late, entry(state=state, confirmed=0)):
            assert parse_neighbours([message], {wanted}).entries == {wanted: Neighbour(name, MAC, 0)}


@pytest.mark.parametrize("state", [0x01, FAILED, 0x00])
def test_an_address_that_failed_is_no_address(state: int) -> None:
    """The kernel may leave the old link-layer address in an entry that has none."""
    (event,) = parse_events(notification(NEWNEIGH, entry(state=state)))
    assert event.neighbour.mac is None


def test_notifications_of_changes() -> None:
    """Entries made or changed, several in a datagram; deletions and what is not of neighbours are passed over."""
    data = notification(NEWNEIGH, entry()) + notification(DELNEIGH, entry()) + notification(16, bytes(16))
    assert parse_events(data) == [Event(Key(2, socket.inet_aton("10.0.0.1")), Neighbour("reachable", MAC, 1.0))]


def table(*, statistics: int = 88, thresholds: tuple[int, ...] = (2, 3, 4), config: bool = True) -> bytes:
    """Return struct ndtmsg of a table, or of a device's settings (no config)."""
    numbers = struct.pack("=11Q", *range(100, 111))[:statistics]
    return (
        bytes(4)
        + attribute(1, b"arp_cache\0")
        + b"".join(attribute(kind, struct.pack("=I", 128 * kind)) for kind in thresholds)
        + (attribute(5, struct.pack("=HHIIIIIII", 4, 336, 42, 0, 0, 0, 7, 0, 0)) if config else b"")
        + attribute(7, numbers)
    )


def test_a_table_and_its_counters() -> None:
    """res_failed is the fourth number, forced_gc_runs the tenth, table_fulls the eleventh; devices are passed over."""
    assert parse_tables([table(), table(config=False)]) == {"arp_cache": Table(42, (256, 384, 512), 103, 109, 110)}
    assert parse_tables([table(statistics=88) + attribute(99, b"new")])["arp_cache"].overflows == 110


@pytest.mark.parametrize("broken", [bytes(3), table(statistics=80), table(thresholds=(2, 3)), table()[:60]])
def test_a_damaged_table_is_named(broken: bytes) -> None:
    """A sentence that names the message."""
    with pytest.raises(ParseError, match="neighbours, line 1"):
        parse_tables([broken])


@pytest.mark.parametrize(
    "broken",
    [
        entry()[:11],
        entry()[:14],
        struct.pack("=BBHiHBB", 2, 0, 0, 2, REACHABLE, 0, 1) + attribute(3, bytes(12)),
    ],
)
def test_a_damaged_entry_is_named(broken: bytes) -> None:
    """In a dump and in a notification alike."""
    with pytest.raises(ParseError, match="neighbours, line 1"):
        parse_neighbours([broken])
    with pytest.raises(ParseError, match="neighbours, line 1"):
        parse_events(notification(NEWNEIGH, broken))


@given(st.binary(max_size=120))
def test_no_bytes_break_the_decoders(data: bytes) -> None:
    """Whatever comes, it is understood or it is a ParseError, and it ends."""
    for body in (data, entry() + data, bytes(4) + data, struct.pack("=BBHiHBB", 2, 0, 0, 2, REACHABLE, 0, 1) + data):
        with contextlib.suppress(ParseError):
            parse_neighbours([body], {Key(2, b"")})
        with contextlib.suppress(ParseError):
            parse_tables([body])
        with contextlib.suppress(ParseError):
            parse_events(notification(NEWNEIGH, body))
    with contextlib.suppress(ParseError):
        parse_events(data)
    with contextlib.suppress(ParseError):
        parse_discards(data)


def test_discards_are_hexadecimal_and_summed_over_cpus() -> None:
    """Found by the column's name, wherever the kernel puts it."""
    data = b"entries  unresolved_discards table_fulls\n00000002 0000000a 1\n00000002 00000006 2\n"
    assert parse_discards(data) == 16
    assert parse_discards(b"unresolved_discards\n") == 0


@pytest.mark.parametrize(
    "data", [b"", b"entries\n1\n", b"entries unresolved_discards\n1\n", b"unresolved_discards\nx\n"]
)
def test_damaged_discards_are_named(data: bytes) -> None:
    """Without the column or with a row too short there is no number."""
    with pytest.raises(ParseError, match="net/stat/arp_cache"):
        parse_discards(data)


def test_discards_are_those_of_process_1(tmp_path: Path) -> None:
    """The file is in the first network namespace only: elsewhere it is absent, and no 0."""
    (tmp_path / "1/net/stat").mkdir(parents=True)
    (tmp_path / "1/net/stat/arp_cache").write_text("unresolved_discards\n2a\n")
    assert read_discards(str(tmp_path), "arp_cache") == 42
    with pytest.raises(Unavailable) as caught:
        read_discards(str(tmp_path), "ndisc_cache")
    assert caught.value.reason is Reason.NOT_IN_KERNEL


class ScriptedEvents:
    """A socket that gives what it was told, then nothing."""

    def __init__(self, *script: bytes | OSError | tuple[bytes, int]) -> None:
        """Take datagrams, errors, and datagrams with the port id of a sender."""
        self.script = iter(script)

    def recvmsg(self, _: int) -> tuple[bytes, list[Any], int, tuple[int, int]]:
        """Give the next."""
        item = next(self.script, BlockingIOError())
        if isinstance(item, OSError):
            raise item
        data, sender = item if isinstance(item, tuple) else (item, 0)
        return data, [], 0, (sender, 4)


def test_reading_events_ends_and_tells_of_losses() -> None:
    """ENOBUFS is told, and what follows is read; only the kernel is believed; never more datagrams than asked for."""
    one = notification(NEWNEIGH, entry())
    events: Any = ScriptedEvents(one, OSError(errno.ENOBUFS, "no buffer space"), (one, 4711), one)
    found, lost = read_events(events, 100)
    assert (len(found), lost) == (2, True)
    events = ScriptedEvents(one, one, one)
    assert len(read_events(events, 2)[0]) == 2
    assert len(read_events(events, 2)[0]) == 1
    assert read_events(events, 2) == ([], False)
    events = ScriptedEvents(OSError(errno.ENOMEM, "no memory"))
    with pytest.raises(Unavailable):
        read_events(events, 2)


OVERFLOW = """
import json, subprocess
from shoal.kernel.netlink.neighbours import open_events, read_events
run = lambda *command, **more: subprocess.run(["ip", *command], check=True, text=True, **more)
run("link", "add", "a0", "type", "veth", "peer", "name", "a1")
run("link", "set", "a0", "up")
with open_events() as events:
    macs = [f"02:00:00:00:{n >> 8:02x}:{n & 255:02x}" for n in range(4000)]
    lines = [f"neigh replace 10.8.0.1 lladdr {mac} nud stale dev a0" for mac in macs]
    run("-batch", "-", input="\\n".join(lines))
    many, lost = read_events(events, 100_000)
    run("neigh", "replace", "10.9.0.1", "lladdr", "02:00:00:00:ff:ff", "nud", "stale", "dev", "a0")
    after, again = read_events(events, 100)
told = {event.key.address.hex() for event in after if event.neighbour.mac == bytes.fromhex("02000000ffff")}
print(json.dumps([len(many), lost, again, sorted(told)]))
"""


@pytest.mark.root
def test_the_kernel_tells_of_a_receive_buffer_that_overflowed() -> None:
    """Four thousand changes of one entry that nobody read: some are lost, it is told, and the next one is heard."""
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    command = ["unshare", "--net", sys.executable, "-c", OVERFLOW]
    answer = subprocess.run(command, check=True, capture_output=True, text=True, env=environment)
    heard, lost, again, told = json.loads(answer.stdout)
    assert 0 < heard < 4000
    assert (lost, again, told) == (True, False, ["0a090001"])


def test_the_kernel_gives_notifications_to_anyone() -> None:
    """The socket opens without a privilege, does not wait, and begins empty."""
    with open_events() as events:
        assert events.getsockname()[1] == 4
        assert events.gettimeout() == 0
        read_events(events, 10)


def bodies(recording: Path, name: str) -> list[bytes]:
    """Return the messages that a kernel sent."""
    return [message.body for message in split(recording.with_name(f"route_{name}.bin").read_bytes())]


def states_of(witness: list[dict[str, Any]]) -> Counter[tuple[str, str]]:
    """Count devices and states of `ip -j neigh`, which leaves noarp out."""
    return Counter((one["dev"], state.lower()) for one in witness for state in one["state"])


def of_table(text: str, name: str) -> int:
    """Return a number of `ip -s ntable`."""
    match = re.search(rf"\b{name} (\d+)", text)
    assert match
    return int(match[1])


def compare_table(found: dict[str, Any], text: str) -> None:
    """Compare a table with `ip -s ntable`; entries of others come and go between the two."""
    assert list(found["thresholds"]) == [of_table(text, f"thresh{level}") for level in (1, 2, 3)]
    assert found["resolution_failures"] == of_table(text, "res_failed")
    assert found["forced_collections"] == of_table(text, "forced_gc_runs")
    assert found["overflows"] == of_table(text, "table_fulls")
    assert abs(found["entries"] - of_table(text, "entries")) <= 10


@pytest.mark.parametrize("recording", RECORDINGS, ids=lambda path: str(path.parts[-3]))
def test_recorded_kernels(recording: Path) -> None:
    """What each kernel sent is what ip(8) read from that kernel."""
    witness = json.loads(recording.read_text())
    names = {one["ifindex"]: one["ifname"] for one in witness["links"]}
    key = Key(next(i for i, name in names.items() if name == "a0"), socket.inet_aton("10.8.0.20"))
    found = parse_neighbours(bodies(recording, "neighbours"), {key})
    ours = {(names[device], state): n for (device, state), n in found.counts.items() if state not in ("noarp", "none")}
    assert ours == states_of(witness["neighbours"])
    assert ours["a1", "stale"] == 51
    assert found.entries[key].state == "permanent"
    assert found.entries[key].mac == bytes.fromhex("020000000020")
    tables = parse_tables(bodies(recording, "neighbour_tables"))
    assert tables.keys() == {"arp_cache", "ndisc_cache"}
    arp = tables["arp_cache"]
    compare_table({name: getattr(arp, name) for name in Table.__slots__}, witness["tables"])


@pytest.mark.root
def test_a_live_kernel() -> None:
    """Entries in every state, single look-ups and tables are what `ip -s neigh`, `ip -s ntable` and pyroute2 say."""
    done = subprocess.run(
        ["unshare", "--net", "--mount", sys.executable, str(SCENE), "oracle"],
        check=True,
        capture_output=True,
        text=True,
    )
    found = json.loads(done.stdout)
    ours = {(device, state): n for device, state, n in found["counts"] if state != "noarp"}
    assert ours == states_of(found["ip_neighbours"])
    assert {state for _, state in ours} >= {"reachable", "stale", "permanent", "failed", "incomplete"}
    by_pyroute2 = {address: mac for _, _, address, mac in found["pyroute2_neighbours"]}
    by_ip = {one["dst"]: one for one in found["ip_neighbours"]}
    assert found["entries"].keys() == {"10.8.0.2", "10.8.0.20", "10.8.0.22"}
    for address, one in found["entries"].items():
        assert one["mac"] == by_ip[address]["lladdr"] == by_pyroute2[address]
        assert one["state"].upper() in by_ip[address]["state"]
        assert 0 <= by_ip[address]["confirmed"] + 1 - one["confirmed"] <= 5
        assert found["single"][address] | {"confirmed": 0} == one | {"confirmed": 0}
    assert found["single"]["10.8.0.99"] is None
    compare_table(found["tables"]["arp_cache"], found["ip_tables"])
