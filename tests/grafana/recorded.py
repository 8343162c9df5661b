"""What Prometheus held in runs of the fault lab: `python -m tests.grafana.recorded KERNEL [FAILURE]...` takes one over.

A recording is what the exporter exported while the failures were on, every few seconds, with the moments at which each
was caused, paged and was cured. What the rules made of it is not in it: the tests let today's rules do that again.
"""

from __future__ import annotations

import gzip
import itertools
import json
import math
import re
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

from tests.grafana.stored import END, serve
from tests.lab.stack import OTHER
from tests.rules.pack import expand

if TYPE_CHECKING:
    from collections.abc import Iterator
    from contextlib import AbstractContextManager

    from grafana.reader import Prometheus
    from tests.grafana.sick import Sample

__all__ = ["RECORDED", "RECORDINGS", "STORIES", "Recording", "Story", "serve_recordings", "taken_over"]

HERE: Final = Path(__file__).parent / "recordings"
LAB: Final = Path(__file__).parents[2] / ".lab"
STEP: Final = 5
"""Seconds between two samples on the tests' clock, as the lab scrapes on its own kernel."""
_KEPT: Final = re.compile(r"shoal_.+|up|node_uname_info")


@dataclass(frozen=True, slots=True)
class Story:
    """A failure in the course of a recording. Moments are on the clock of the tests, whose end is END."""

    node: str
    """The name that the machine has in the tests."""
    number: int
    alert: str
    culprit: dict[str, str]
    """Labels that the page carried."""
    before: float
    """When nothing had been caused yet."""
    caused: float
    paged: float
    cured: float

    @property
    def moment(self) -> int:
        """The first moment of the tests' clock at which the page was there. Then it was confirmed, and cured after."""
        return END - math.floor((END - self.paged) / STEP) * STEP


@dataclass(frozen=True, slots=True)
class Recording:
    """One run of the lab on one kernel."""

    kernel: str
    content: dict[str, Any]

    @classmethod
    def read(cls, file: Path) -> Recording:
        """Read a recording that is kept here."""
        with gzip.open(file, "rt", encoding="utf-8") as source:
            return cls(file.name.removesuffix(".json.gz"), json.load(source))

    @property
    def node(self) -> str:
        """The name that the machine has in the tests; in the lab it is always the same."""
        return f"lab-{self.kernel}"

    @property
    def seconds(self) -> int:
        """How long it is."""
        longest = max(len(expand(values)) for _, _, values in self.content["series"])
        return int(self.content["step"] * longest)

    def samples(self) -> Iterator[Sample]:
        """Yield its series, with a gap wherever nothing was scraped at a step of the tests."""
        stride = self.content["step"] // STEP
        for name, labels, values in self.content["series"]:
            spread: list[float] = []
            for value in expand(values):
                spread += [math.nan] * (stride - 1) + [math.nan if value is None else value]
            node = f"{self.node}-{OTHER}" if labels.get("node") == OTHER else self.node
            yield name, {**labels, "node": node}, spread

    def stories(self) -> Iterator[Story]:
        """Yield the failures that it has."""
        failures = self.content["failures"]
        # Causing one takes seconds, and the lab looks at health for more than a minute before.
        before = END - max(one["caused"] for one in failures) - 60
        for one in failures:
            moments = {name: END - one[name] for name in ("caused", "paged", "cured")}
            yield Story(self.node, one["number"], one["alert"], one["culprit"], before, **moments)


def taken_over(run: dict[str, Any]) -> dict[str, Any]:
    """Make a recording of what a run of the lab left: of every series what the exporter said, at most every STEP."""
    stride = max(STEP // run["step"], 1)
    step = run["step"] * stride
    # A run that awaited the ends of its pages goes on for minutes in which nothing is wrong any more.
    last = max((one["cured"] for one in run["faults"].values()), default=math.inf) + 2 * step
    for series in run["series"]:
        series["values"] = [(float(at), value) for at, value in series["values"] if float(at) <= last]
    ends = max(at for series in run["series"] for at, _ in series["values"])
    begins = min(at for series in run["series"] for at, _ in series["values"])
    count = int((ends - begins) // step) + 1
    kept = []
    for series in run["series"]:
        name = series["metric"].pop("__name__")
        # What the machine and its kernel are called is its own affair.
        for label in ("nodename", "release", "version") if name == "node_uname_info" else ():
            series["metric"].pop(label, None)
        # By that directory a run's report leaves the virtual machine.
        if not _KEPT.fullmatch(name) or series["metric"].get("mountpoint", "").startswith("/tmp/"):  # noqa: S108
            continue
        at = {round((ends - moment) / step, 3): value for moment, value in series["values"]}
        values = [at.get(float(count - 1 - place), "_") for place in range(count)]
        if any(value != "_" for value in values):
            kept.append([name, series["metric"], _short(values)])
    failures = [
        {
            "number": one["number"],
            "alert": one["alert"],
            "culprit": one["culprit"],
            **{moment: round(ends - one[moment], 1) for moment in ("caused", "paged", "cured")},
        }
        for one in run["faults"].values()
    ]
    return {"step": step, "failures": failures, "series": sorted(kept, key=str)}


def _short(values: list[str]) -> str:
    """Write values as promtool does, one that stays the same once: `1x3` is four of them."""
    words = []
    for value, group in itertools.groupby(values):
        count = len(list(group))
        if value == "_":
            words.append(f"_x{count}")
        else:
            words.append(f"{value}x{count - 1}" if count > 1 else value)
    return " ".join(words)


def main(kernel: str, *names: str) -> None:
    """Take over what the last run on a kernel recorded: until all failures were cured, or those that are named."""
    with gzip.open(LAB / f"{kernel}.series.json.gz", "rt", encoding="utf-8") as source:
        run = json.load(source)
    run["faults"] = {name: one for name, one in run["faults"].items() if not names or name in names}
    content = taken_over(run)
    lines = ",\n".join(json.dumps(series) for series in content.pop("series"))
    text = f'{json.dumps(content)[:-1]}, "series": [\n{lines}\n]}}\n'
    # Without the time, so that the same recording is the same file.
    (HERE / f"{kernel}.json.gz").write_bytes(gzip.compress(text.encode(), 9, mtime=0))


def serve_recordings(directory: Path) -> AbstractContextManager[Prometheus]:
    """Run a Prometheus with all recordings and what the rules make of them."""
    samples = [sample for recording in RECORDINGS for sample in recording.samples()]
    seconds = max(recording.seconds for recording in RECORDINGS)
    # In the lab an alert waits for three evaluations, so that a run takes minutes.
    waits = {recording.node: 3 * recording.content["step"] for recording in RECORDINGS}
    return serve(directory, samples, seconds, step=STEP, waits=waits)


RECORDINGS: Final = [Recording.read(file) for file in sorted(HERE.glob("*.json.gz"))]
RECORDED: Final = [story for recording in RECORDINGS for story in recording.stories()]
"""Every failure of every recording."""
STORIES: Final = {story.number: story for story in RECORDED}
"""One of each failure by its number: that of the last recording which has it."""

if __name__ == "__main__":
    main(*sys.argv[1:])
