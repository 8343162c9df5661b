"""Runs the collectors of one scrape, in turn as long as they are quick, so that none can cost another its families."""

from __future__ import annotations

import asyncio
import logging
import time
from collections import deque
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any

from shoal.collectors import SIGNAL_AVAILABLE
from shoal.families import Family, Metric
from shoal.inventory import Node
from shoal.kernel.files import Reason

if TYPE_CHECKING:
    from collections.abc import Awaitable, Coroutine, Iterable, Mapping, Sequence

    from shoal.collectors import Collector
    from shoal.kernel.files import Roots

__all__ = ["METRICS", "WORKERS", "Scraper", "Workers"]

logger = logging.getLogger(__name__)

WORKERS = "shoal"
"""What the names of the worker threads begin with."""

_STOP_SECONDS = 1.0
# How long a collector may be read before those that wait for its thread get another. With 20 ms a full node had two or
# three threads contend at every scrape, which was then no sooner answered and cost a fifth more.
_PATIENCE_SECONDS = 0.1
# Of one collector. A node of 500 pods has 15,000 in all; more than this is a fault, or somebody's intent.
_MOST_SAMPLES = 50_000

_Result = tuple[list[Family], float]

SUCCESS = Metric(
    "shoal_scrape_collector_success",
    "gauge",
    "1 if the collector finished in time, 0 if it raised, hung or was still running from an earlier scrape.",
    "the scrape itself",
    ("collector",),
)
DURATION = Metric(
    "shoal_scrape_collector_duration_seconds",
    "gauge",
    "How long the collector took, or has taken so far if it did not finish.",
    "the scrape itself",
    ("collector",),
)
METRICS = (SUCCESS, DURATION)
"""What the scrape exports about itself."""


@dataclass(frozen=True, slots=True, eq=False)
class _Run:
    """One run of one collector. `outcome` is its families and its duration in seconds, or what it raised."""

    collector: Collector
    node: Node
    outcome: asyncio.Future[_Result]
    started: float


class Scraper:
    """Owns the collectors and runs each at most once at a time.

    Scrapes at the same time share a run. A run that missed its deadline cannot be stopped, as its thread waits in
    the kernel; until it ends its collector fails at once, so that hanging threads do not pile up.
    """

    def __init__(self, roots: Roots, collectors: Mapping[str, Collector]) -> None:
        """Take the collectors by name; nothing runs yet."""
        self._roots = roots
        self.collectors = collectors
        self.failures: dict[str, str] = {}
        """{collector: why} of those whose last run gave nothing."""
        self._runs: dict[str, _Run] = {}
        self._working: set[asyncio.Task[None]] = set()

    async def scrape(self, names: Iterable[str], timeout: float) -> list[Family]:  # noqa: ASYNC109  (per collector)
        """Run the named collectors and return their families merged by metric, within `timeout` seconds.

        Never raises: what a collector could not give is absent, with its success 0 and its signals unavailable.
        """
        began = time.monotonic()
        runs = self._begin(sorted(names, key=lambda name: (self.collectors[name].last, name)))
        # What hangs from an earlier scrape is not waited for, or it would make each as late as it may be.
        awaited = {run.outcome for run in runs if began - run.started < timeout}
        if awaited:
            await asyncio.wait(awaited, timeout=began + timeout - time.monotonic())
        results = [self._result(run, timeout, awaited=run.outcome in awaited) for run in runs]
        merged: dict[Metric, Family] = {}
        for families in results:
            for family in families:
                merged.setdefault(family.metric, family.metric.family()).samples.extend(family.samples)
        return list(merged.values())

    async def start(self) -> None:
        """Start what collectors watch between scrapes. One that cannot start is logged and still scraped."""
        await asyncio.gather(*(self._start(name, collector) for name, collector in self.collectors.items()))

    async def _start(self, name: str, collector: Collector) -> None:
        try:
            await collector.start()
        except Exception as error:  # noqa: BLE001  (one collector's failure is not the others')
            logger.warning("collector did not start", extra={"collector": name, "detail": _sentence(error)})

    async def stop(self) -> None:
        """End what `start` began, as far as it ends within a second."""
        stops = [asyncio.create_task(collector.stop()) for collector in self.collectors.values()]
        for stop in stops:
            stop.add_done_callback(_look)
        if stops:
            await asyncio.wait(stops, timeout=_STOP_SECONDS)

    def _begin(self, names: Iterable[str]) -> list[_Run]:
        """Return a run of each of these: the one that goes on, or a new one."""
        node = Node(self._roots)
        loop = asyncio.get_running_loop()
        runs, blocking = [], []
        for name in names:
            run = self._runs.get(name)
            if run is None:
                collector = self.collectors[name]
                run = _Run(collector, node, loop.create_future(), time.monotonic())
                self._runs[name] = run
                run.outcome.add_done_callback(partial(self._ended, name))
                if asks := collector.asks(node):
                    self._background(_ask_and_read(asks, run))
                else:
                    blocking.append(run)
            runs.append(run)
        if blocking:
            self._background(_read_in_turn(blocking))
        return runs

    def _background(self, work: Coroutine[Any, Any, None]) -> None:
        """Run what goes on though the scrape that began it is answered."""
        task = asyncio.create_task(work)
        self._working.add(task)
        task.add_done_callback(self._working.discard)

    def _result(self, run: _Run, timeout: float, *, awaited: bool) -> list[Family]:
        collector, outcome, elapsed = run.collector, run.outcome, time.monotonic() - run.started
        if not awaited:
            return self._failed(collector, elapsed, f"still running from an earlier scrape, for {elapsed:.1f} s")
        if not outcome.done():
            return self._failed(collector, elapsed, f"not finished within {timeout:.1f} s")
        if outcome.cancelled():
            return self._failed(collector, elapsed, "cancelled")
        if error := outcome.exception():
            logger.debug("collector raised", exc_info=error, extra={"collector": collector.name})
            return self._failed(collector, elapsed, _sentence(error))
        if self.failures.pop(collector.name, None):
            logger.info("collector works again", extra={"collector": collector.name})
        families, duration = outcome.result()
        return [*families, *_outcome(collector.name, 1, duration)]

    def _ended(self, name: str, outcome: asyncio.Future[_Result]) -> None:
        """Let go of a run and its result; the next scrape starts another."""
        del self._runs[name]
        _look(outcome)

    def _failed(self, collector: Collector, duration: float, why: str) -> list[Family]:
        if collector.name not in self.failures:
            # Once, not at every scrape: the metric and the page at / say it as long as it lasts.
            logger.warning("collector failed", extra={"collector": collector.name, "detail": why})
        self.failures[collector.name] = why
        absent = SIGNAL_AVAILABLE.family()
        for signal in collector.signals:
            absent.add((signal, Reason.COLLECTOR_FAILED.value), 0)
        return [absent, *_outcome(collector.name, 0, duration)]


class Workers(ThreadPoolExecutor):
    """Threads that nothing waits for at the end: one may be stuck in the kernel, where it cannot be stopped."""

    def __init__(self, scraper: Scraper) -> None:
        """Have one for each collector, so that one that hangs takes none from the others, and some to render."""
        super().__init__(len(scraper.collectors) + 4, thread_name_prefix=WORKERS)

    def shutdown(self, wait: bool = True, *, cancel_futures: bool = False) -> None:  # noqa: ARG002, FBT001, FBT002  (inherited)
        """End the threads that have nothing to do; asyncio would wait for the others for ever."""
        super().shutdown(wait=False, cancel_futures=True)


async def _ask_and_read(asks: Awaitable[None], run: _Run) -> None:
    try:
        await asks
    except BaseException as error:  # noqa: BLE001  (of the collector, whatever it is)
        run.outcome.set_exception(error)
    else:
        await _read_in_turn([run])


async def _read_in_turn(runs: Sequence[_Run]) -> None:
    """Read these one after another in a worker thread; behind one that is slow another thread goes on with the rest.

    Python runs one thread at a time: ten that contend for it, or are woken one by one, cost twice as much as one that
    does all ten. What has ended is handed to those who wait when all has, or when the loop looks for the slow ones.
    """
    waiting = deque(runs)
    ended: deque[tuple[_Run, _Result | BaseException]] = deque()

    def work() -> None:
        while waiting:
            # Another thread may have taken the last.
            with suppress(IndexError):
                run = waiting.popleft()
                ended.append((run, _read(run)))

    def hand_over() -> None:
        while ended:
            run, result = ended.popleft()
            if isinstance(result, BaseException):
                run.outcome.set_exception(result)
            else:
                run.outcome.set_result(result)

    loop = asyncio.get_running_loop()
    workers: set[asyncio.Future[None]] = set()
    before = -1
    while waiting or workers:
        if waiting and len(waiting) in {len(runs), before}:
            workers.add(loop.run_in_executor(None, work))
        before = len(waiting)
        # First in this order: what ended before the last was taken is handed over, what ends later ends its thread.
        patience = _PATIENCE_SECONDS if waiting else None
        hand_over()
        _, workers = await asyncio.wait(workers, timeout=patience, return_when=asyncio.FIRST_COMPLETED)
    hand_over()


def _read(run: _Run) -> _Result | BaseException:
    """Return what a collector read and how long it took, or what it raised."""
    started = time.monotonic()
    try:
        families = run.collector.read(run.node)
        _check(families)
    except StopIteration:
        # asyncio would not hand this one on.
        return RuntimeError("a StopIteration was not caught")
    except BaseException as error:  # noqa: BLE001  (of the collector, whatever it is)
        return error
    # The availability belongs to these families: the next run may begin to change it before anybody reads it.
    return [*families, run.collector.availability.family()], time.monotonic() - started


def _check(families: object) -> None:
    """Refuse what could not be rendered, so that it costs its collector and not the whole scrape."""
    if not isinstance(families, list):
        raise TypeError(f"read() returned {type(families).__name__}, not a list of families")
    for family in families:
        if not isinstance(family, Family):
            raise TypeError(f"read() returned a list with {type(family).__name__} in it, which is no family")
        family.check()
    if (samples := sum(len(family.samples) for family in families)) > _MOST_SAMPLES:
        raise ValueError(f"{samples} samples, and {_MOST_SAMPLES} are the most that an answer has of one collector")


def _look(task: asyncio.Future[Any]) -> None:
    """Look at the outcome of a task that nobody may wait for any more, so that asyncio does not complain of it."""
    if not task.cancelled():
        task.exception()


def _sentence(error: BaseException) -> str:
    return f"{type(error).__name__}: {error}" if str(error) else type(error).__name__


def _outcome(name: str, success: int, duration: float) -> list[Family]:
    return [Family(SUCCESS, [((name,), success)]), Family(DURATION, [((name,), duration)])]
