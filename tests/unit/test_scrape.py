"""Collectors that raise, hang, return junk or leak cost their own families, and the next scrape finds them well."""

from __future__ import annotations

import asyncio
import gc
import logging
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from typing import TYPE_CHECKING, Any, cast

import pytest

from shoal.collectors import available_names, load
from shoal.families import Family, Metric
from shoal.kernel.files import Reason, Unavailable

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from tests.unit.conftest import MakeCollector

    from shoal.scrape import Scraper

    Toy = Callable[[str, float], list[Family]]
    ScraperOf = Callable[..., Scraper]

LONG = 10.0
SHORT = 0.1


class Gate:
    """Holds the worker threads that pass through it until it is opened, and counts them."""

    def __init__(self) -> None:
        """Start closed."""
        self.opened = threading.Event()
        self.entered = 0
        self._lock = threading.Lock()

    def __call__(self) -> None:
        """Wait until the gate is open."""
        with self._lock:
            self.entered += 1
        assert self.opened.wait(20)

    async def reached(self, count: int = 1) -> None:
        """Return when so many threads have come to the gate."""
        await eventually(lambda: self.entered >= count)


async def eventually(condition: Callable[[], bool]) -> None:
    """Return when the condition, which a thread brings about, holds."""
    async with asyncio.timeout(10):
        while not condition():  # noqa: ASYNC110  (a thread cannot set an asyncio.Event)
            await asyncio.sleep(0.001)


@pytest.fixture
def gate() -> Iterator[Gate]:
    """Return a gate that lets all through at the end, so that no thread outlives its test."""
    gate = Gate()
    yield gate
    gate.opened.set()


def values(families: list[Family], metric: str) -> dict[tuple[str, ...], float]:
    """Return the samples of one metric."""
    return {labels: value for family in families if family.metric.name == metric for labels, value in family.samples}


def success(families: list[Family]) -> dict[str, float]:
    """Return {collector: 1 or 0}."""
    return {name: value for (name,), value in values(families, "shoal_scrape_collector_success").items()}


async def test_families_of_all_collectors_are_one(
    make_collector: MakeCollector, scraper_of: ScraperOf, toy: Toy
) -> None:
    """A metric that two collectors export is one family; every collector has its success and its duration."""
    scraper = scraper_of(make_collector("b", lambda: toy("b", 2)), make_collector("a", lambda: toy("a", 1)))
    families = await scraper.scrape(["b", "a"], LONG)
    assert values(families, "shoal_toy") == {("a",): 1, ("b",): 2}
    assert len({family.metric.name for family in families}) == len(families)
    assert success(families) == {"a": 1, "b": 1}
    durations = values(families, "shoal_scrape_collector_duration_seconds")
    assert set(durations) == {("a",), ("b",)}
    assert all(0 <= seconds < 5 for seconds in durations.values())
    assert success(await scraper.scrape(["a"], LONG)) == {"a": 1}
    assert await scraper.scrape([], LONG) == []


@pytest.mark.parametrize(
    "error",
    [
        ValueError("what\nhappened"),
        KeyError("oom_kill"),
        OSError(24, "Too many open files"),
        RecursionError(),
        MemoryError(),
        AssertionError(),
        asyncio.CancelledError(),
        TimeoutError(),
        StopIteration(),
        Unavailable(Reason.NOT_IN_KERNEL, "noticed too late"),
    ],
    ids=lambda error: type(error).__name__,
)
async def test_a_collector_that_raises_costs_its_own_families(
    error: BaseException,
    make_collector: MakeCollector,
    scraper_of: ScraperOf,
    toy: Toy,
    caplog: pytest.LogCaptureFixture,
) -> None:
    """Success 0, its signals absent with the reason, the other untouched; said once, and again when it is well."""
    broken = True

    def read() -> list[Family]:
        if broken:
            raise error
        return toy("recovered", 1)

    caplog.set_level(logging.INFO, "shoal")
    scraper = scraper_of(make_collector("bad", read, ("one", "two")), make_collector("good", lambda: toy("good", 1)))
    for _ in range(3):
        families = await scraper.scrape(["bad", "good"], LONG)
        assert success(families) == {"bad": 0, "good": 1}
        assert values(families, "shoal_toy") == {("good",): 1}
        assert values(families, "shoal_signal_available") == {
            ("one", "collector_failed"): 0,
            ("two", "collector_failed"): 0,
        }
        assert ("bad",) in values(families, "shoal_scrape_collector_duration_seconds")
    assert set(scraper.failures) == {"bad"}
    assert str(error) in scraper.failures["bad"]
    broken = False
    families = await scraper.scrape(["bad", "good"], LONG)
    assert success(families) == {"bad": 1, "good": 1}
    assert values(families, "shoal_toy") == {("good",): 1, ("recovered",): 1}
    assert scraper.failures == {}
    assert [record.message for record in caplog.records] == ["collector failed", "collector works again"]
    assert not any(record.exc_info for record in caplog.records)


OTHER = Metric("shoal_other", "gauge", "Help.", "a test", ("which",))


@pytest.mark.parametrize(
    "junk",
    [
        None,
        {},
        "families",
        42,
        (),
        [None],
        [OTHER],
        [OTHER.family(), "family"],
        [Family(OTHER, [((), 1)])],
        [Family(OTHER, [(("a", "b"), 1)])],
        [Family(OTHER, cast(Any, [(("a",), None)]))],
        [Family(OTHER, cast(Any, [(("a",), "1")]))],
        [Family(OTHER, cast(Any, [((1,), 1)]))],
        [Family(OTHER, cast(Any, [(["a"], 1)]))],
        [Family(OTHER, cast(Any, None))],
        [Family(cast(Any, "shoal_other"), [(("a",), 1)])],
    ],
)
async def test_junk_costs_its_collector(
    junk: object, make_collector: MakeCollector, scraper_of: ScraperOf, toy: Toy
) -> None:
    """What could not be rendered is found before it is merged with what the others gave."""
    scraper = scraper_of(make_collector("junk", lambda: junk), make_collector("good", lambda: toy("good", 1)))
    families = await scraper.scrape(["junk", "good"], LONG)
    assert success(families) == {"junk": 0, "good": 1}
    assert values(families, "shoal_toy") == {("good",): 1}
    assert values(families, "shoal_other") == {}


async def test_a_collector_with_too_many_samples(
    make_collector: MakeCollector, scraper_of: ScraperOf, toy: Toy
) -> None:
    """What somebody multiplied without bound costs its collector, not the memory of exporter and Prometheus."""

    def many(samples: int) -> list[Family]:
        family = toy("0", 1)[0]
        family.samples.extend(((f"{number}",), 1) for number in range(1, samples))
        return [family]

    scraper = scraper_of(
        make_collector("most", lambda: many(50_000)),
        make_collector("more", lambda: many(50_001)),
        make_collector("well", lambda: toy("well", 1)),
    )
    families = await scraper.scrape(["most", "more", "well"], LONG)
    assert success(families) == {"most": 1, "more": 0, "well": 1}
    assert len(values(families, "shoal_toy")) == 50_001
    assert scraper.failures["more"].startswith("ValueError: 50001 samples, and 50000 are the most")


async def test_a_collector_that_hangs(
    gate: Gate, make_collector: MakeCollector, scraper_of: ScraperOf, toy: Toy
) -> None:
    """It costs the first scrape its deadline, later ones nothing, and is well as soon as its thread is free."""

    def read() -> list[Family]:
        gate()
        return toy("late", 1)

    scraper = scraper_of(make_collector("stuck", read, ("signal",)), make_collector("good", lambda: toy("good", 1)))
    began = time.monotonic()
    families = await scraper.scrape(["stuck", "good"], 0.3)
    assert 0.3 <= time.monotonic() - began < 2
    assert success(families) == {"stuck": 0, "good": 1}
    assert values(families, "shoal_signal_available") == {("signal", "collector_failed"): 0}
    assert values(families, "shoal_scrape_collector_duration_seconds")["stuck",] >= 0.29
    assert scraper.failures["stuck"] == "not finished within 0.3 s"

    began = time.monotonic()
    families = await scraper.scrape(["stuck", "good"], 0.3)
    assert time.monotonic() - began < 0.25
    assert success(families) == {"stuck": 0, "good": 1}
    assert values(families, "shoal_toy") == {("good",): 1}
    assert scraper.failures["stuck"].startswith("still running from an earlier scrape")

    gate.opened.set()
    await eventually(lambda: not scraper._runs)
    families = await scraper.scrape(["stuck", "good"], LONG)
    assert success(families) == {"stuck": 1, "good": 1}
    assert gate.entered == 2


LEAK = Metric("shoal_leak", "gauge", "Help.", "a test")


async def test_fifty_scrapes_with_a_hanging_collector_leave_nothing(
    gate: Gate, make_collector: MakeCollector, scraper_of: ScraperOf
) -> None:
    """One thread hangs, not fifty; no run, no task and no family of a past scrape is kept."""

    def read() -> list[Family]:
        gate()
        return [Family(LEAK, [((), 1)])]

    scraper = scraper_of(make_collector("stuck", read), make_collector("good", lambda: [Family(LEAK, [((), 2)])]))
    # Room for fifty threads to hang, so that they would be seen.
    asyncio.get_running_loop().set_default_executor(ThreadPoolExecutor(60))
    await scraper.scrape(["stuck", "good"], SHORT)
    threads, tasks = threading.active_count(), len(asyncio.all_tasks())
    for _ in range(50):
        assert success(await scraper.scrape(["stuck", "good"], SHORT)) == {"stuck": 0, "good": 1}
    assert gate.entered == 1
    # One or two more are idle ones of the pool, which starts another when none is idle yet.
    assert threading.active_count() <= threads + 3
    assert len(asyncio.all_tasks()) <= tasks
    gate.opened.set()
    await eventually(lambda: not scraper._runs)
    gc.collect()
    assert not [kept for kept in gc.get_objects() if isinstance(kept, Family) and kept.metric is LEAK]


async def test_two_hundred_scrapes_at_once_share_one_run(
    gate: Gate, make_collector: MakeCollector, scraper_of: ScraperOf, toy: Toy
) -> None:
    """The kernel is read once, everyone has the same values."""
    reads = iter(range(1000))

    def read() -> list[Family]:
        gate()
        return toy("shared", next(reads))

    scraper = scraper_of(make_collector("one", read))
    scrapes = [asyncio.create_task(scraper.scrape(["one"], LONG)) for _ in range(200)]
    await gate.reached()
    gate.opened.set()
    answers = await asyncio.gather(*scrapes)
    assert gate.entered == 1
    assert all(values(families, "shoal_toy") == {("shared",): 0} for families in answers)
    assert values(await scraper.scrape(["one"], LONG), "shoal_toy") == {("shared",): 1}


async def test_scrapes_of_different_collectors_share_what_they_have_in_common(
    gate: Gate, make_collector: MakeCollector, scraper_of: ScraperOf, toy: Toy
) -> None:
    """Each gets what it asked for and nothing else."""
    reads: list[str] = []

    def reader(name: str) -> Callable[[], list[Family]]:
        def read() -> list[Family]:
            reads.append(name)
            gate()
            return toy(name, 1)

        return read

    scraper = scraper_of(*(make_collector(name, reader(name)) for name in "abc"))
    wanted = ["ab", "bc", "abc", "c", ""]
    scrapes = [asyncio.create_task(scraper.scrape(names, LONG)) for names in wanted]
    await gate.reached(3)
    await asyncio.sleep(0.2)  # longer than the head starts, so that every scrape has begun all its own
    gate.opened.set()
    answers = await asyncio.gather(*scrapes)
    assert sorted(reads) == ["a", "b", "c"]
    for names, families in zip(wanted, answers, strict=True):
        assert values(families, "shoal_toy") == {(name,): 1 for name in names}
        assert success(families) == dict.fromkeys(names, 1)


async def test_an_impatient_scrape_does_not_cost_the_others(
    gate: Gate, make_collector: MakeCollector, scraper_of: ScraperOf, toy: Toy
) -> None:
    """Whoever gives a collector a millisecond fails alone; those that wait, before and after it, get their answer."""

    def read() -> list[Family]:
        gate()
        return toy("slow", 1)

    scraper = scraper_of(make_collector("slow", read))
    patient = asyncio.create_task(scraper.scrape(["slow"], LONG))
    await gate.reached()
    assert success(await scraper.scrape(["slow"], 0.001)) == {"slow": 0}
    later = asyncio.create_task(scraper.scrape(["slow"], LONG))
    await asyncio.sleep(0.01)
    gate.opened.set()
    assert success(await patient) == success(await later) == {"slow": 1}
    assert gate.entered == 1


async def test_a_scrape_that_is_given_up_does_not_end_the_run(
    gate: Gate, make_collector: MakeCollector, scraper_of: ScraperOf, toy: Toy
) -> None:
    """Others may wait for the same run."""

    def read() -> list[Family]:
        gate()
        return toy("kept", 1)

    scraper = scraper_of(make_collector("one", read))
    given_up, waiting = (asyncio.create_task(scraper.scrape(["one"], LONG)) for _ in range(2))
    await gate.reached()
    given_up.cancel()
    await asyncio.sleep(0)
    gate.opened.set()
    assert success(await waiting) == {"one": 1}
    assert given_up.cancelled()


async def test_a_collector_that_cannot_start_or_stop(
    make_collector: MakeCollector, scraper_of: ScraperOf, toy: Toy, caplog: pytest.LogCaptureFixture
) -> None:
    """The others start all the same, it is scraped all the same, and the end does not wait for it."""
    bad, good = make_collector("bad", lambda: toy("bad", 1)), make_collector("good", lambda: toy("good", 1))
    started = []

    async def raises() -> None:
        raise OSError(1, "Operation not permitted")

    async def hangs() -> None:
        await asyncio.sleep(60)

    async def notes() -> None:
        started.append("good")

    bad.start, bad.stop, good.start = raises, hangs, notes  # type: ignore[method-assign]
    scraper = scraper_of(bad, good)
    await scraper.start()
    assert started == ["good"]
    assert [record.message for record in caplog.records] == ["collector did not start"]
    assert success(await scraper.scrape(["bad", "good"], LONG)) == {"bad": 1, "good": 1}
    began = time.monotonic()
    await scraper.stop()
    assert time.monotonic() - began < 2


async def test_availability_is_that_of_the_run(make_collector: MakeCollector, scraper_of: ScraperOf, toy: Toy) -> None:
    """A signal that is absent says why, beside the families that are there."""
    collector = make_collector("partial", lambda: toy("there", 1), ("one", "two"))
    collector.availability.lost("one", Reason.DISABLED, "switched off")
    families = await scraper_of(collector).scrape(["partial"], LONG)
    assert values(families, "shoal_signal_available") == {("one", "disabled"): 0, ("two", ""): 1}
    assert success(families) == {"partial": 1}


async def test_collectors_take_turns_until_one_is_slow(
    gate: Gate, make_collector: MakeCollector, scraper_of: ScraperOf, toy: Toy
) -> None:
    """Quick ones never contend with one another; behind one that hangs the next begins all the same."""
    running: list[str] = []
    together: list[tuple[str, ...]] = []

    def quick(name: str) -> Callable[[], list[Family]]:
        def read() -> list[Family]:
            running.append(name)
            time.sleep(0.002)
            together.append(tuple(running))
            running.remove(name)
            return toy(name, 1)

        return read

    def slow() -> list[Family]:
        gate()
        return toy("slow", 1)

    names = [f"quick{number}" for number in range(8)]
    scraper = scraper_of(make_collector("a", slow), *(make_collector(name, quick(name)) for name in names))
    scrape = asyncio.create_task(scraper.scrape(["a", *names], LONG))
    await gate.reached()
    while len(together) < len(names):  # noqa: ASYNC110  (what is waited for happens in threads)
        await asyncio.sleep(0.01)
    gate.opened.set()
    assert len(values(await scrape, "shoal_toy")) == 9
    assert together == [(name,) for name in names]


async def test_a_collector_that_sets_work_going_is_read_last(
    make_collector: MakeCollector, scraper_of: ScraperOf, toy: Toy
) -> None:
    """Those before it have the processor to themselves, whatever its name is."""
    read: list[str] = []

    def reading(name: str) -> Callable[[], list[Family]]:
        return lambda: read.append(name) or toy(name, 1)  # type: ignore[func-returns-value]

    collectors = [make_collector(name, reading(name)) for name in ("a", "b", "c")]
    type(collectors[1]).last = True
    await scraper_of(*collectors).scrape(["a", "b", "c"], LONG)
    assert read == ["a", "c", "b"]


def test_conntrack_is_read_last() -> None:
    """Its dump takes a processor for longer than all the others take together."""
    assert [name for name in available_names() if load(name).last] == ["conntrack"]
