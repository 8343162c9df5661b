"""Run the exporter as its command does, with a probe in its event loop, and print at the end what the probe saw.

    python loop_probe.py [OPTION ...]

What a loop owes its clients is to come round within 10 ms. A late round has these causes, told apart here:

- a callback computes: the processor time of the loop's thread inside each callback, which neither waiting nor other
  processes add to;
- the garbage collector stops all threads: its processor time, whichever thread it runs in;
- another thread of this process holds the interpreter's lock: the probe, which sleeps 1 ms at a time, wakes late;
- this machine has no processor to spare, for the loop's thread or for the one that holds the lock. The kernel counts
  for each thread how long it was ready to run and had to wait (/proc/<pid>/task/<tid>/schedstat, second field, ns).
  What the loop's thread and the worst of the others waited is taken off how late the probe was: that is not the
  exporter's doing, and a busy test machine has plenty of it.

A callback that waits in the kernel is not looked for here, but in every async test, by blockbuster.
"""

from __future__ import annotations

import asyncio
import gc
import json
import os
import sys
import threading
import time
from asyncio.events import Handle
from typing import Any

from shoal.cli import main
from shoal.scrape import Scraper

_SLEEP = 0.001
_files: dict[int, int] = {}
seen: dict[str, Any] = {"rounds": 0, "late": 0.0, "unexplained": 0.0, "collection": 0.0, "callback": 0.0, "which": ""}


def waits() -> dict[int, int]:
    """Return {thread: nanoseconds for which it has waited for a processor}."""
    found = {}
    for thread in threading.enumerate():
        number = thread.native_id or 0
        try:
            if number not in _files:
                _files[number] = os.open(f"/proc/self/task/{number}/schedstat", os.O_RDONLY)
            found[number] = int(os.pread(_files[number], 100, 0).split()[1])
        except OSError:
            continue  # it has just ended
    # Left open they would be more and more, and the kernel makes whoever opens the 65th wait for its table to grow.
    for number in _files.keys() - found.keys():
        os.close(_files.pop(number))
    return found


async def probe() -> None:
    """Note how late the loop is, again and again."""
    loop_thread = threading.get_native_id()
    while True:
        before, began = waits(), time.perf_counter()
        await asyncio.sleep(_SLEEP)
        late = time.perf_counter() - began - _SLEEP
        waited = {number: (total - before.get(number, total)) / 1e9 for number, total in waits().items()}
        own = waited.pop(loop_thread, 0)
        seen["rounds"] = seen["rounds"] + 1
        seen["late"] = max(seen["late"], late)
        seen["unexplained"] = max(seen["unexplained"], late - own - max(waited.values(), default=0))


def collecting(phase: str, _info: dict[str, int]) -> None:
    """Note the processor time of each garbage collection."""
    if phase == "start":
        seen["_began"] = time.thread_time()
    else:
        seen["collection"] = max(seen["collection"], time.thread_time() - seen.pop("_began"))


def instrument() -> None:
    """Time every callback, start the probe with the collectors, and print when they stop."""
    start, stop, run = Scraper.start, Scraper.stop, Handle._run
    running: set[asyncio.Task[None]] = set()

    def timed(handle: Handle) -> None:
        began = time.thread_time()
        run(handle)
        spent = time.thread_time() - began
        if running and spent > seen["callback"]:
            seen.update(callback=spent, which=repr(handle)[:300])

    async def started(scraper: Scraper) -> None:
        running.add(asyncio.create_task(probe()))
        gc.callbacks.append(collecting)
        await start(scraper)

    async def stopped(scraper: Scraper) -> None:
        for task in running:
            task.cancel()
        gc.callbacks.remove(collecting)
        running.clear()
        sys.stdout.write(json.dumps(seen))
        sys.stdout.flush()
        await stop(scraper)

    for owner, name, function in ((Handle, "_run", timed), (Scraper, "start", started), (Scraper, "stop", stopped)):
        setattr(owner, name, function)


if __name__ == "__main__":
    instrument()
    sys.exit(main())
