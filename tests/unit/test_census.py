"""What a table amounts to: owners, destinations, ports and stale mappings, and that its sums stay small and right."""

from __future__ import annotations

import random
from collections import Counter
from socket import AF_INET, AF_INET6, IPPROTO_ICMP, IPPROTO_TCP, IPPROTO_UDP, inet_pton
from typing import TYPE_CHECKING, Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from shoal.census import BoundedCounts, Census, Destination, Direction, Ports, Stale, Staleness, Surroundings, take
from shoal.kernel.netlink.conntrack_entries import ASSURED, DST_NAT, ESTABLISHED, EXPECTED, SEEN_REPLY, Entry

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable

POD = ("pod", "shop", "checkout", "", "")
OTHER_POD = ("pod", "shop", "cart", "", "")
GONE, LIVE = "10.244.0.9", "10.244.0.2"
SERVICE = "10.96.0.10"


def ip(text: str) -> bytes:
    """Return an address as the kernel sends it."""
    return inet_pton(AF_INET6 if ":" in text else AF_INET, text)


def entry(source: str, destination: str, **fields: Any) -> Entry:
    """Return an unanswered UDP connection from port 40000 to port 53, not translated unless fields say so."""
    backend, translated = ip(fields.pop("backend", destination)), ip(fields.pop("translated", source))
    one = Entry(
        ip(source), 40000, ip(destination), 53, IPPROTO_UDP, backend, 53, translated, 40000, 0, 30, None, None, 0
    )
    return one._replace(**{"reply_destination_port": fields.get("source_port", 40000)} | fields)


def through_service(backend: str = GONE, **fields: Any) -> Entry:
    """Return a connection to the service that was translated to a backend."""
    return entry("10.244.0.1", SERVICE, backend=backend, **{"status": DST_NAT} | fields)


def only_live(one: Entry) -> bool:
    """Know one backend."""
    return (one.reply_source, one.reply_source_port) == (ip(LIVE), 53)


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """Return the time as a list of one number; sleeping moves it on."""
    now = [1000.0]

    def sleep(seconds: float) -> None:
        now[0] += seconds

    monkeypatch.setattr("shoal.census.time.monotonic", lambda: now[0])
    monkeypatch.setattr("shoal.census.time.sleep", sleep)
    return now


def census(
    entries: Iterable[Entry], before: Census | None = None, surroundings: Surroundings | None = None, most: int = 10**6
) -> Census:
    """Take a census without regard to the pace."""
    return take(entries, surroundings or Surroundings(), before or Census(), most=most, entries_per_second=1e9)


def twice(
    clock: list[float],
    first: Entry,
    second: Entry,
    is_backend: Callable[[Entry], bool | None] | None = None,
    own: frozenset[bytes] = frozenset(),
) -> Counter[Stale]:
    """Return what is stale of one connection that was seen in two censuses a minute apart."""
    surroundings = Surroundings(own_addresses=own, is_backend=is_backend)
    before = census([first], surroundings=surroundings)
    assert not before.stale.total
    clock[0] += 60
    return Counter(dict(census([second], before, surroundings).stale.top(10)))


def test_who_opened_a_connection_or_answers_it() -> None:
    """The source's owner; where that is not here the answering end's, behind the service; or nobody."""
    surroundings = Surroundings({ip("10.244.0.1"): POD, ip("10.244.0.2"): OTHER_POD, ip("fd00::1"): POD})
    found = census(
        [
            entry("10.244.0.1", "1.1.1.1"),
            entry("10.244.0.1", SERVICE, backend="10.244.0.2"),
            entry("fd00::1", "fd00::9"),
            entry("192.0.2.1", SERVICE, backend="10.244.0.2"),
            entry("192.0.2.1", "192.0.2.2"),
        ],
        surroundings=surroundings,
    )
    assert found.owners == {(POD, Direction.FROM): 3, (OTHER_POD, Direction.TO): 1}
    assert found.entries == 5


def test_where_connections_were_sent() -> None:
    """The service and not its backend; a protocol without ports has port 0."""
    found = census(
        [
            through_service(GONE),
            through_service(LIVE),
            entry("10.0.0.1", "1.1.1.1", protocol=IPPROTO_ICMP, destination_port=0),
        ]
    )
    assert dict(found.destinations.top(10)) == {
        Destination(IPPROTO_UDP, ip(SERVICE), 53): 2,
        Destination(IPPROTO_ICMP, ip("1.1.1.1"), 0): 1,
    }


def masqueraded(number: int, destination: str = "1.1.1.1", **fields: Any) -> Entry:
    """Return a connection of a pod's that left with the node's address and another port."""
    port = 1024 + number
    return entry("10.244.0.1", destination, translated="192.0.2.7", reply_destination_port=port, **fields)


def test_ports_are_counted_for_each_translated_source_and_destination() -> None:
    """A protocol, a zone, a port of the destination's and a destination each have ports of their own."""
    entries = [masqueraded(number) for number in range(300)]
    entries += [masqueraded(number, f"1.0.0.{number}") for number in range(100)]
    entries += [masqueraded(number, protocol=IPPROTO_TCP) for number in range(20)]
    entries += [masqueraded(number, zone=7) for number in range(10)]
    entries += [masqueraded(number, reply_source_port=54) for number in range(5)]
    ranked = census(entries).ports(200)
    space = Ports(0, IPPROTO_UDP, ip("192.0.2.7"), ip("1.1.1.1"), 53)
    assert ranked[:4] == [
        (space, 300),
        (space._replace(protocol=IPPROTO_TCP), 20),
        (space._replace(zone=7), 10),
        (space._replace(port=54), 5),
    ]
    assert len(ranked) == 104


def test_the_nodes_own_connections_take_ports_too() -> None:
    """From the same address to the same destination; those of others, and those below 1024, do not."""
    surroundings = Surroundings(own_addresses=frozenset([ip("192.0.2.7")]))
    own = [entry("192.0.2.7", "1.1.1.1", source_port=50000 + number) for number in range(7)]
    forwarded = [entry("192.0.2.8", "1.1.1.1", source_port=50000 + number) for number in range(3)]
    low = [masqueraded(-100)]
    found = census([masqueraded(1), *own, *forwarded, *low], surroundings=surroundings)
    assert found.ports(10) == [(Ports(0, IPPROTO_UDP, ip("192.0.2.7"), ip("1.1.1.1"), 53), 8)]
    assert found.untranslated.total == 7
    # Where nothing is translated there is no space of NAT's.
    assert census(own, surroundings=surroundings).ports(10) == []


def test_a_port_alone_may_be_translated() -> None:
    """The address stays, another port is taken: masquerading of a local connection whose port was in use."""
    found = census([entry("192.0.2.7", "1.1.1.1", reply_destination_port=2000)])
    assert [count for _, count in found.ports(10)] == [1]


def test_icmp_has_no_ports() -> None:
    """Its number is an identifier of another space."""
    assert census([masqueraded(1, protocol=IPPROTO_ICMP)]).ports(10) == []


STALE = Stale(Staleness.UNREPLIED, IPPROTO_UDP, ip(SERVICE), 53, ip(GONE), 53)


def test_an_unanswered_mapping_that_is_renewed(clock: list[float]) -> None:
    """A timeout of 30 s does not outlast a minute unless a packet came."""
    assert twice(clock, through_service(), through_service(timeout=12)) == {STALE: 1}


@pytest.mark.parametrize(
    ("is_backend", "backend", "reason"),
    [
        (None, GONE, Staleness.UNREPLIED),
        (only_live, GONE, Staleness.BACKEND_GONE),
        (only_live, LIVE, Staleness.BACKEND_SILENT),
    ],
)
def test_why_an_unanswered_mapping_is_stale(
    clock: list[float], is_backend: Callable[[Entry], bool | None] | None, backend: str, reason: Staleness
) -> None:
    """By what the rules say of the backend."""
    found = twice(clock, through_service(backend), through_service(backend), is_backend)
    assert found == {STALE._replace(reason=reason, backend=ip(backend)): 1}


def test_a_mapping_that_runs_out_is_not_stale(clock: list[float]) -> None:
    """SYN_SENT has 120 s: after a minute the rest is what is left of them, give or take a second."""
    for rest in (58, 60, 61):
        first, second = (
            through_service(protocol=IPPROTO_TCP, timeout=120),
            through_service(protocol=IPPROTO_TCP, timeout=rest),
        )
        assert not twice(clock, first, second)
    second = through_service(protocol=IPPROTO_TCP, timeout=90)
    assert twice(clock, through_service(protocol=IPPROTO_TCP, timeout=120), second)


def test_a_slow_backend_is_not_stale(clock: list[float]) -> None:
    """Unanswered in the first census and answered in the second."""
    answered = through_service(LIVE, status=DST_NAT | SEEN_REPLY)
    assert not twice(clock, through_service(LIVE), answered, only_live)
    assert not twice(clock, through_service(LIVE), answered)


def test_a_mapping_that_was_answered_once(clock: list[float]) -> None:
    """UDP whose backend no rule names any more: renewed by the client alone, as far as anybody can tell."""
    once = through_service(status=DST_NAT | SEEN_REPLY | ASSURED, timeout=120)
    assert twice(clock, once, once, only_live) == {STALE._replace(reason=Staleness.BACKEND_GONE): 1}
    # While a rule leads there, or the rules are not known, it is an ordinary connection.
    assert not twice(clock, once, once)
    live = once._replace(reply_source=ip(LIVE))
    assert not twice(clock, live, live, only_live)


def test_counted_answers_clear_a_mapping(clock: list[float]) -> None:
    """Where the kernel counts packets, answers that go on prove a backend that is being drained."""
    once = through_service(status=DST_NAT | SEEN_REPLY, timeout=120, replies=5)
    assert not twice(clock, once, once._replace(replies=6), only_live)
    assert twice(clock, once, once, only_live)


def test_a_drained_tcp_connection_is_not_stale(clock: list[float]) -> None:
    """Established and acknowledged it lasts for days; with data in flight it has five minutes, just begun."""
    status: dict[str, Any] = {
        "status": DST_NAT | SEEN_REPLY | ASSURED,
        "protocol": IPPROTO_TCP,
        "tcp_state": ESTABLISHED,
    }
    for timeout in (432_000, 431_990, 300, 299):
        drained = through_service(timeout=timeout, **status)
        assert not twice(clock, drained, drained, only_live), timeout
    # What closes is not held against it either.
    closing = through_service(timeout=100, **status | {"tcp_state": 7})
    assert not twice(clock, closing, closing, only_live)


def test_a_tcp_connection_without_acknowledgement_is_stale(clock: list[float]) -> None:
    """Its data was sent again and again, last some seconds ago."""
    status: dict[str, Any] = {
        "status": DST_NAT | SEEN_REPLY | ASSURED,
        "protocol": IPPROTO_TCP,
        "tcp_state": ESTABLISHED,
    }
    found = twice(clock, through_service(timeout=290, **status), through_service(timeout=280, **status), only_live)
    assert found == {STALE._replace(reason=Staleness.BACKEND_GONE, protocol=IPPROTO_TCP): 1}


def test_a_tcp_connection_stays_stale_between_two_attempts(clock: list[float]) -> None:
    """Attempts may be two minutes apart, so that a dump finds no new one; when they have ended it is over."""
    surroundings = Surroundings(is_backend=only_live)
    one = through_service(status=DST_NAT | SEEN_REPLY, protocol=IPPROTO_TCP, tcp_state=ESTABLISHED)
    found = Census()
    stale = []
    for timeout in (300, 280, 220, 160, 299, 239, 179, 119, 59, 280, 432_000, 300, 300):
        found = census([one._replace(timeout=timeout)], found, surroundings)
        stale.append(found.stale.total)
        clock[0] += 60
    # Not: right after an attempt, when none came for too long, when data was acknowledged, and when it goes on.
    assert stale == [0, 1, 1, 1, 0, 1, 1, 0, 0, 1, 0, 0, 0]


@pytest.mark.parametrize("fields", [{"status": 0}, {"status": DST_NAT | EXPECTED}, {"zone": 7}])
def test_what_no_rule_translated_is_not_judged_by_rules(clock: list[float], fields: dict[str, Any]) -> None:
    """IPVS, a helper and Open vSwitch have backends that are in no rule."""
    fields = {"status": DST_NAT} | fields
    one = through_service(**fields)
    assert twice(clock, one, one, only_live) == {STALE: 1}
    answered = one._replace(status=fields["status"] | SEEN_REPLY)
    assert not twice(clock, answered, answered, only_live)


def test_what_is_not_translated_or_stays_here_is_not_stale(clock: list[float]) -> None:
    """No service, the same address, a redirection to the node itself, and a connection that a flow table carries."""
    for one in (
        entry("10.244.0.1", "1.1.1.1"),
        through_service(SERVICE, reply_source_port=5353),
        through_service("192.0.2.7"),
        through_service(timeout=None),
    ):
        assert not twice(clock, one, one, only_live, frozenset([ip("192.0.2.7")]))


def test_only_the_same_connection_is_renewed(clock: list[float]) -> None:
    """Another port of the client's, or another backend, is another connection."""
    for other in (through_service(source_port=40001), through_service("10.244.0.8")):
        assert not twice(clock, through_service(), other)


def test_more_candidates_than_are_remembered_are_counted(monkeypatch: pytest.MonkeyPatch) -> None:
    """And the remembered ones are no more than that."""
    monkeypatch.setattr("shoal.census._MOST_CANDIDATES", 100)
    found = census(through_service(source_port=number) for number in range(130))
    assert (len(found.candidates), found.forgotten) == (100, 30)


def test_a_table_that_is_too_large_is_sampled(clock: list[float]) -> None:
    """It ends after the most that it may look at, without asking for more, and says so."""
    asked = []

    def stream() -> Iterable[Entry]:
        for number in range(50):
            asked.append(number)
            yield through_service()

    found = census(stream(), most=20)
    assert (found.entries, found.cut_short, len(asked)) == (20, True, 21)
    whole = census([through_service()] * 20, most=20)
    assert (whole.entries, whole.cut_short) == (20, False)
    assert clock == [1000.0]


def test_the_pace_is_kept(clock: list[float]) -> None:
    """Ten thousand entries at a thousand a second take ten seconds, and no wait is longer than a second."""
    take((through_service() for _ in range(10_000)), Surroundings(), Census(), most=10**6, entries_per_second=1000)
    assert clock[0] == pytest.approx(1010)


def test_frequent_keys_are_exact_among_too_many() -> None:
    """Ten keys among a hundred thousand that occur once, in any order: their counts, the total, and little memory."""
    order = [f"often{number}" for number in range(10) for _ in range(1000 + number)]
    order += [f"once{number}" for number in range(100_000)]
    random.Random(7).shuffle(order)  # noqa: S311  (any order will do)
    counts: BoundedCounts[str] = BoundedCounts(kept=1000)
    for key in order:
        counts.add(key)
        assert len(counts._counts) <= 2000
    assert counts.top(10) == [(f"often{number}", 1000 + number) for number in reversed(range(10))]
    assert counts.total == len(order)
    assert counts["never"] == 0


@given(st.lists(st.integers(0, 30)))
def test_counts_are_never_too_high(keys: list[int]) -> None:
    """With hardly any room the counts may be low and are never high; with room they are exact."""
    true = Counter(keys)
    cramped: BoundedCounts[int] = BoundedCounts(kept=2)
    roomy: BoundedCounts[int] = BoundedCounts(kept=100)
    for key in keys:
        cramped.add(key)
        roomy.add(key)
    assert all(count <= true[key] for key, count in cramped.top(10))
    assert dict(roomy.top(100)) == true


@pytest.mark.slow
def test_memory_does_not_grow_with_the_table() -> None:
    """Eighty thousand entries, none like another, take no more than ten thousand do."""
    import tracemalloc  # noqa: PLC0415  (slows down what comes after)

    def peak(number: int) -> int:
        one = through_service(translated="192.0.2.7")
        numbers = (i.to_bytes(4, "big") for i in range(number))
        entries = (one._replace(destination=b"1" + i, reply_source=b"2" + i) for i in numbers)
        tracemalloc.start()
        try:
            census(entries)
            return tracemalloc.get_traced_memory()[1]
        finally:
            tracemalloc.stop()

    small, large = peak(10_000), peak(80_000)
    assert large < min(2 * small, 16 << 20)
