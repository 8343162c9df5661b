"""Runs the collectors of one scrape side by side, each under a deadline, so that none can cost another its families."""

from __future__ import annotations

import asyncio
import logging
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any

from shoal.collectors import SIGNAL_AVAILABLE
from shoal.families import Family, Metric
from shoal.inventory import Node
from shoal.kernel.files import Reason

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping

    from shoal.collectors import Collector
    from shoal.kernel.files import Roots

__all__ = ["METRICS", "WORKERS", "Scraper", "Workers"]

logger = logging.getLogger(__name__)

WORKERS = "shoal"
"""What the names of the worker threads begin with."""

_STOP_SECONDS = 1.0
_HEAD_START_SECONDS = 0.02

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


@dataclass(frozen=True, slots=True)
class _Run:
    """One run of one collector. `task` ends with its families and its duration in seconds."""

    task: asyncio.Task[tuple[list[Family], float]]
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

    async def scrape(self, names: Iterable[str], timeout: float) -> list[Family]:  # noqa: ASYNC109  (per collector)
        """Run the named collectors and return their families merged by metric, within `timeout` seconds.

        Never raises: what a collector could not give is absent, with its success 0 and its signals unavailable.
        """
        node = Node(self._roots)
        deadline = time.monotonic() + timeout
        runs = []
        for name in sorted(names):
            runs.append(asyncio.create_task(self._collect(name, node, deadline - time.monotonic())))
            # Python runs one thread at a time, and ten that contend for it cost more than ten in turn: 13.9 ms of CPU
            # a scrape against 8.4 on an idle machine. So each has a head start, and only the slow ones overlap.
            await asyncio.wait({runs[-1]}, timeout=_HEAD_START_SECONDS)
        results = await asyncio.gather(*runs)
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

    async def _collect(self, name: str, node: Node, timeout: float) -> list[Family]:  # noqa: ASYNC109  (see above)
        collector = self.collectors[name]
        run = self._runs.get(name)
        if run is None:
            run = _Run(asyncio.create_task(_timed(collector, node)), time.monotonic())
            self._runs[name] = run
            run.task.add_done_callback(partial(self._ended, name))
        elif (elapsed := time.monotonic() - run.started) >= timeout:
            return self._failed(collector, elapsed, f"still running from an earlier scrape, for {elapsed:.1f} s")
        await asyncio.wait({run.task}, timeout=timeout)
        elapsed = time.monotonic() - run.started
        if not run.task.done():
            return self._failed(collector, elapsed, f"not finished within {timeout:.1f} s")
        if run.task.cancelled():
            return self._failed(collector, elapsed, "cancelled")
        if error := run.task.exception():
            logger.debug("collector raised", exc_info=error, extra={"collector": name})
            return self._failed(collector, elapsed, _sentence(error))
        if self.failures.pop(name, None):
            logger.info("collector works again", extra={"collector": name})
        families, duration = run.task.result()
        return [*families, *_outcome(name, 1, duration)]

    def _ended(self, name: str, task: asyncio.Task[tuple[list[Family], float]]) -> None:
        """Let go of a run and its result; the next scrape starts another."""
        del self._runs[name]
        _look(task)

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


async def _timed(collector: Collector, node: Node) -> tuple[list[Family], float]:
    started = time.monotonic()
    families = await collector.collect(node)
    # Looked at in a thread, as a large node has ten thousand samples.
    await asyncio.to_thread(_check, families)
    # The availability belongs to these families: the next run may begin to change it before anybody reads it.
    return [*families, collector.availability.family()], time.monotonic() - started


def _check(families: object) -> None:
    """Refuse what could not be rendered, so that it costs its collector and not the whole scrape."""
    if not isinstance(families, list):
        raise TypeError(f"collect() returned {type(families).__name__}, not a list of families")
    for family in families:
        if not isinstance(family, Family):
            raise TypeError(f"collect() returned a list with {type(family).__name__} in it, which is no family")
        family.check()


def _look(task: asyncio.Task[Any]) -> None:
    """Look at the outcome of a task that nobody may wait for any more, so that asyncio does not complain of it."""
    if not task.cancelled():
        task.exception()


def _sentence(error: BaseException) -> str:
    return f"{type(error).__name__}: {error}" if str(error) else type(error).__name__


def _outcome(name: str, success: int, duration: float) -> list[Family]:
    return [Family(SUCCESS, [((name,), success)]), Family(DURATION, [((name,), duration)])]
