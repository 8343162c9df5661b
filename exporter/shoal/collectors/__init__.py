"""One file per signal. Each turns kernel records into families; none knows another, the server or the wire format.

The names of the files are the names of the collectors, so that what is not enabled need not be imported.
"""

from __future__ import annotations

import importlib
import logging
import pkgutil
from abc import ABC, abstractmethod
from contextlib import contextmanager
from typing import TYPE_CHECKING, ClassVar

from shoal.families import Family, Metric
from shoal.kernel.cgroups import open_cgroup
from shoal.kernel.files import ParseError, Reason, Unavailable, Vanished

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable, Iterable, Iterator, Mapping

    from shoal.inventory import Inventory, Node, Workload
    from shoal.settings import Settings

__all__ = [
    "SIGNAL_AVAILABLE",
    "Availability",
    "Collector",
    "Sample",
    "available_names",
    "catalogue",
    "load",
    "read_workloads",
    "register",
]

logger = logging.getLogger(__name__)

SIGNAL_AVAILABLE = Metric(
    name="shoal_signal_available",
    type="gauge",
    help="1 if this signal can be read on this node, 0 with the reason if it is absent from the output.",
    source="the outcome of the reads of this scrape",
    labels=("signal", "reason"),
)

Sample = tuple[Metric, tuple[str, ...], float]
"""A metric, its label values in order, and the value."""

_registered: dict[str, type[Collector]] = {}


class Availability:
    """Which of a collector's signals could be read, and why the others could not."""

    def __init__(self, signals: Iterable[str]) -> None:
        """Start with every signal unread, which is the state before the first scrape."""
        self.absent: dict[str, tuple[Reason, str] | None] = dict.fromkeys(signals)
        """{signal: (reason, sentence) if it is absent, None if it is there}"""

    @contextmanager
    def reading(self, signal: str) -> Iterator[None]:
        """Read one signal inside `with`: what the kernel does not give ends the block and is noted as the reason."""
        try:
            yield
        except (Unavailable, ParseError, Vanished) as error:
            # Who raised it may have it among its variables: a circle, which keeps what the whole scrape had in hand.
            error.__traceback__ = None
            reason = Reason.MALFORMED if isinstance(error, ParseError) else Reason.NOT_READABLE
            self.lost(signal, error.reason if isinstance(error, Unavailable) else reason, str(error))
        else:
            if self.absent[signal]:
                logger.info("signal is available again", extra={"signal": signal})
            self.absent[signal] = None

    def lost(self, signal: str, reason: Reason, detail: str) -> None:
        """Note why a signal is absent; logged when the reason is new, not at every scrape."""
        before = self.absent[signal]
        if before is None or before[0] is not reason:
            logger.info("signal is not available", extra={"signal": signal, "reason": reason.value, "detail": detail})
        self.absent[signal] = (reason, detail)

    def family(self) -> Family:
        """Return `shoal_signal_available` for the signals of this collector."""
        family = SIGNAL_AVAILABLE.family()
        for signal, why in self.absent.items():
            family.add((signal, why[0].value if why else ""), 0 if why else 1)
        return family


class Collector(ABC):
    """Reads one signal of the kernel and turns it into families.

    A subclass says which failure it reveals in its docstring, names its metrics and signals, and implements `read`.
    """

    name: ClassVar[str]
    """The name of its file, its flag and its `collector` label."""
    metrics: ClassVar[tuple[Metric, ...]]
    """Everything that it can export."""
    signals: ClassVar[tuple[str, ...]]
    """The parts of it that can be absent on their own, as `shoal_signal_available` names them."""
    last: ClassVar[bool] = False
    """Whether it is read after the others, as what it sets going would contend with them."""

    def __init__(self, settings: Settings) -> None:
        """Start with nothing known of the signals; a collector with options of its own takes them from `settings`."""
        self.settings = settings
        self.availability = Availability(self.signals)

    async def start(self) -> None:  # noqa: B027  (nothing to do is the usual case)
        """Begin to watch what happens between scrapes, for a collector that has to; most have nothing to do."""

    async def stop(self) -> None:  # noqa: B027  (see start)
        """End what `start` began."""

    def asks(self, node: Node) -> Awaitable[None] | None:  # noqa: ARG002  (most have nobody to ask)
        """Return what is to be awaited on the loop before `read`: answers of servers. None if there is nothing."""
        return None

    @abstractmethod
    def read(self, node: Node) -> list[Family]:
        """Return the families of one scrape. Called in a worker thread, as the reads block.

        What is not there is noted in `availability`; anything raised is a failure.
        """


def read_workloads(
    inventory: Inventory, families: Mapping[Metric, Family], read: Callable[[Workload, int], Iterable[Sample]]
) -> None:
    """Call `read(workload, descriptor of its cgroup)` for every workload and put what it returns into the families.

    A workload is exported whole or not at all, and one that ends meanwhile is left out. One that cannot be read
    costs the others nothing; the last such error is raised when all are done. Only a missing file is passed over
    as long as some workload has it: a cgroup may be without a controller on a kernel that has it.
    """
    failed: Unavailable | ParseError | None = None
    missing: Unavailable | None = None
    done = 0
    for workload in inventory.workloads:
        try:
            with open_cgroup(inventory.hierarchy.mount + workload.cgroup.path) as fd:
                samples = list(read(workload, fd))
        except Vanished:
            continue
        except Unavailable as error:
            if error.reason is Reason.NOT_IN_KERNEL:
                missing = error
            else:
                failed = error
            continue
        except ParseError as error:
            failed = ParseError(f"{workload.cgroup.path}/{error.file}", error.line, error.expected)
            continue
        done += bool(samples)
        for metric, labels, value in samples:
            families[metric].add(labels, value)
    if failed:
        raise failed
    if missing and not done:
        raise missing


def register(collector: type[Collector]) -> type[Collector]:
    """Make a collector known; the one decorator line that a new collector needs."""
    _registered[collector.name] = collector
    return collector


def available_names() -> tuple[str, ...]:
    """Return the names of all collectors without importing them."""
    return tuple(sorted(module.name for module in pkgutil.iter_modules(__path__)))


def load(name: str) -> type[Collector]:
    """Import one collector and return its class. Raises `KeyError` for a file that registers none of its own name."""
    importlib.import_module(f"{__name__}.{name}")
    return _registered[name]


def catalogue() -> dict[str, Metric]:
    """Return every metric that any collector can export, by name. Imports them all."""
    metrics = {metric.name: metric for name in available_names() for metric in load(name).metrics}
    return {SIGNAL_AVAILABLE.name: SIGNAL_AVAILABLE, **metrics}
