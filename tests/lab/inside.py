"""A run of the lab from within its node: builds everything, causes everything, waits for every page and its end.

All failures run side by side on one path (on an emulated machine, a few at a time); who is hit tells them apart. Built
first, so that each counter is known to Prometheus before it moves; then caused; each is confirmed and cured when its
page has come, and taken away when all pages have ended.
"""

from __future__ import annotations

import asyncio
import gzip
import json
import os
import re
import shutil
import subprocess
import sys
import time
import traceback
from contextlib import ExitStack, closing, contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final, NoReturn

import yaml
from tests.lab.faults import load
from tests.lab.features import IN_VM
from tests.lab.node import Node, ready
from tests.lab.other_node import ALERTS, other_node
from tests.lab.report import KERNEL, Outcome, Report
from tests.lab.stack import OTHER, PORTS, REPOSITORY, Page, Stack, start, webhook

from shoal.check.report import judge, render, who
from shoal.check.snapshot import Pair
from shoal.check.sources import Remote, SourceError

if TYPE_CHECKING:
    import socket
    from collections.abc import Awaitable, Callable, Iterator, Sequence

    from tests.lab.fault import Culprit, Fault, Feature, Shows, Story

    from shoal.check.snapshot import Snapshot

__all__ = ["Pace", "confirm_section", "demo", "main"]

WORKPLACE: Final = Path("/run/lab")
"""Where everything is written, in the node's own file system."""

_RISES_AFTER: Final = 3.0
_CHECK_OVER: Final = 5.0
"""Seconds between the two scrapes of `check`, as a person has it who gives no option."""
_LOOK_EVERY: Final = 0.5
_SIDE_BY_SIDE: Final = 5
"""How many failures an emulated machine has at a time."""
_FOR: Final = 3
"""How many scrapes every alert waits here, with `for`."""
_SCRAPES: Final = 3
"""And how many more a page may take."""
_GRID: Final = 60
"""The step of the rules' subqueries, in seconds: the grid on which counters are looked at."""


@dataclass(frozen=True, slots=True)
class Pace:
    """How fast a run goes and how long it waits, in seconds."""

    interval: int
    """Between two scrapes, and between two evaluations."""
    patience: float
    """For the pages."""
    resolve_within: float
    """For their ends."""


@dataclass(slots=True)
class _Decoy:
    name: str
    right: tuple[str, ...]
    story: Story
    culprit: Culprit


@dataclass(slots=True)
class _Case:
    """One failure in the course of a run."""

    fault: Fault
    outcome: Outcome
    story: Story
    culprit: Culprit
    decoys: list[_Decoy] = field(default_factory=list)
    caused_at: float = 0.0
    cured_at: float = 0.0


def confirm_section(alert: str) -> list[str]:
    """Return the commands and outputs of a runbook's section Confirm, line by line and without their indentation."""
    text = (REPOSITORY / "rules" / "runbooks" / f"{alert}.md").read_text(encoding="utf-8")
    section = text.partition("\n## Confirm\n")[2].partition("\n## ")[0]
    return [line.strip() for line in section.splitlines() if line.startswith("    ")]


def _say(sentence: str) -> None:
    sys.stdout.write(f"{time.strftime('%H:%M:%S')} {sentence}\n")
    sys.stdout.flush()


def _begin(story: Story, stack: ExitStack) -> Culprit:
    """Build what a story begins with; it is taken away when the stack unwinds."""
    stack.enter_context(closing(story))
    culprit = next(story)
    assert culprit is not None, "a story begins by saying who is to blame"
    return culprit


class Lab:
    """A run."""

    def __init__(self, faults: Sequence[Fault], pace: Pace) -> None:
        """Take what to run and how fast; nothing is built yet."""
        self.faults = faults
        self.pace = pace
        self.outcomes = {
            one.name: Outcome(
                one.number,
                one.name,
                one.title,
                one.alert,
                _lacks(one.needs),
                seconds_at_most=one.evidence + (_FOR + _SCRAPES) * pace.interval,
                because=f"{one.evidence:.0f} s: {one.because}" if one.because else "",
            )
            for one in faults
        }
        self.cases: list[_Case] = []
        self.problems: list[str] = []
        self._seen = 0

    def run(self, node: Node, stack: Stack, other: ExitStack | None = None) -> None:
        """Go through all phases; what is given as `other_node` gives it is closed before anything else goes wrong."""
        for wave in self._waves():
            # Each wave finds the machine as the first one did: cured failures and their decoys are a load too.
            with ExitStack() as scene:
                built = self.build(node, wave, scene)
                self.settle(stack)
                self._check_signals(wave, stack)
                before = _scrape(stack)
                if other:
                    other.close()
                    _say(f"the exporter of {OTHER}, of which a collector hung, is gone")
                caused = self.cause(built)
                self._await_pages(caused, stack, before)
                if other:
                    self._await_other(stack)
                self._look_at_decoys(caused, stack)
                self._await_ends(caused, stack)
        self._judge(stack)

    def build(self, node: Node, faults: Sequence[Fault], scene: ExitStack) -> list[_Case]:
        """Build what is healthy so far, of each of these failures that can run here, and return those."""
        built = []
        for fault in faults:
            outcome = self.outcomes[fault.name]
            if not outcome.ran:
                _say(f"{fault.name} cannot run here: {outcome.cannot_run}")
                continue
            try:
                story = fault.story(node)
                case = _Case(fault, outcome, story, _begin(story, scene))
                for decoy in fault.decoys:
                    if not _lacks(decoy.needs):
                        told = decoy.story(node)
                        case.decoys.append(_Decoy(decoy.story.__name__, decoy.right, told, _begin(told, scene)))
            except Exception as error:  # noqa: BLE001  (one that cannot be built leaves the others their run)
                traceback.print_exc()
                outcome.problems.append(f"could not be built: {error}")
                continue
            built.append(case)
        _say(f"{len(built)} failures and {sum(len(one.decoys) for one in built)} decoys are built")
        return built

    def settle(self, stack: Stack) -> None:
        """Wait until all that has been built was scraped and a point of the grid has passed since."""
        scraped = time.time() + 2 * self.pace.interval + 1
        time.sleep(scraped - scraped % _GRID + _GRID + 2 - time.time())
        sick = {rule["name"]: rule["lastError"] for rule in stack.rules() if rule["health"] == "err"}
        if sick:
            self.problems.append(f"Prometheus cannot evaluate {sick}")

    def _check_signals(self, faults: Sequence[Fault], stack: Stack) -> None:
        """See that the exporter has what those of them that run need, and says that it lacks what the others lack."""
        available = stack.available()
        for fault in faults:
            outcome = self.outcomes[fault.name]
            has, reason = available.get(fault.signal, (False, "it does not know the signal"))
            lacks = any(feature.kernel and feature.missing() for feature in fault.needs)
            if outcome.ran and not has:
                outcome.problems.append(f"the exporter says that {fault.signal} is not available: {reason}")
            elif lacks and has:
                outcome.problems.append(f"the exporter says that {fault.signal} is available")
            elif lacks:
                _say(f"{fault.name}: the exporter says so too, {fault.signal} is not available ({reason})")

    def _waves(self) -> list[list[Fault]]:
        """Say what goes on side by side: everything, but on an emulated machine few, and what loads it after the rest.

        Fourteen at a time were too much for one of two CPUs (6.12): it took three minutes to cause them, and a scrape
        more than twenty seconds. With nine it took fifteen, and `check` did not know what collectors had no time for.
        """
        if not IN_VM:
            return [list(self.faults)]
        # What wants the controllers of memory, CPU and I/O has them at their limit.
        rest, last = ([fault for fault in self.faults if bool(fault.needs) is needs] for needs in (False, True))
        # Five of these keep a single CPU so busy that all of them wait for it, and their decoys too (5.10).
        size = 1 if os.cpu_count() == 1 else _SIDE_BY_SIDE
        return [*_batches(rest, _SIDE_BY_SIDE), *_batches(last, size)]

    def cause(self, built: Sequence[_Case]) -> list[_Case]:
        """Set these failures and their decoys going, and return those that do."""
        caused = []
        for case in built:
            try:
                for decoy in case.decoys:
                    next(decoy.story)
                next(case.story)
            except Exception as error:  # noqa: BLE001  (as in _build)
                traceback.print_exc()
                case.outcome.problems.append(f"could not be caused: {error}")
                continue
            case.caused_at = time.time()
            caused.append(case)
            _say(f"{case.fault.name}: {case.fault.title}")
        self.cases += caused
        return caused

    def _await_pages(self, cases: Sequence[_Case], stack: Stack, before: Snapshot) -> None:
        """Wait for the pages; confirm and cure what has paged."""
        until = time.time() + self.pace.patience
        waiting = list(cases)
        while waiting and time.time() < until:
            self.tell(stack)
            for case in list(waiting):
                if page := self._page(stack, case, "firing", case.caused_at):
                    case.outcome.seconds_to_page = took = page.at - case.caused_at
                    case.outcome.seconds_as_shipped = took + _shipped_for(case.fault.alert) - _FOR * self.pace.interval
                    case.outcome.detected = True
                    self._check(case, stack, before if case.fault.one_moment else None)
                    self._confirm(case)
                    self._cure(case)
                    waiting.remove(case)
            time.sleep(_LOOK_EVERY)
        for case in waiting:
            _say(f"{case.fault.name}: no page within {self.pace.patience:.0f} s")
            _keep_evidence(case, stack)
            self._cure(case)

    def _await_other(self, stack: Stack) -> None:
        """See that the other node did not lose its exporter in silence."""
        until = time.time() + self.pace.patience
        missing = set(ALERTS)
        while missing and time.time() < until:
            self.tell(stack)
            missing -= {page.alert for page in stack.pages() if page.is_about({"node": OTHER})}
            time.sleep(_LOOK_EVERY)
        self.problems += [f"{name} did not come of {OTHER}, whose exporter failed" for name in sorted(missing)]

    def _check(self, case: _Case, stack: Stack, before: Snapshot | None) -> None:
        """See that `check` names this failure and whom it hits, from two scrapes of the exporter."""
        try:
            if before is None:
                before = _scrape(stack)
                time.sleep(_CHECK_OVER)
            pair = Pair(before, _scrape(stack))
        except SourceError as error:
            case.outcome.problems.append(f"check cannot ask: {error}")
            return
        verdict = next(one for one in judge(pair) if one.failure.number == case.fault.number)
        case.outcome.checked = render(stack.labels["node"], [verdict], seconds=pair.seconds, width=100, colour=False)
        labels = case.culprit.labels
        about = [one for one in verdict.findings if _blames(one.culprit.as_dict(), labels)]
        if not about:
            blamed = (
                "; ".join(f"{one.alert} {who(one.culprit)}" for one in verdict.findings) or verdict.why or "nothing"
            )
            case.outcome.problems.append(f"check does not say that it hits {labels}, but: {blamed}")

    def _cure(self, case: _Case) -> None:
        try:
            next(case.story)
        except Exception as error:  # noqa: BLE001  (as in build)
            traceback.print_exc()
            case.outcome.problems.append(f"could not be cured: {error}")
        case.cured_at = time.time()
        _say(f"{case.fault.name} is cured")

    def _await_ends(self, cases: Sequence[_Case], stack: Stack) -> None:
        """Wait until the pages have ended, but for those whose evidence stays longer than there is time."""
        until = time.time() + self.pace.resolve_within
        ending = [case for case in cases if case.outcome.detected]
        for case in list(ending):
            if case.fault.resolves_after > self.pace.resolve_within:
                case.outcome.resolve_not_awaited = True
                ending.remove(case)
        while ending and time.time() < until:
            self.tell(stack)
            for case in list(ending):
                if page := self._page(stack, case, "resolved", case.cured_at):
                    case.outcome.seconds_to_resolve = page.at - case.cured_at
                    ending.remove(case)
            time.sleep(_LOOK_EVERY)
        for case in ending:
            case.outcome.problems.append(f"the page was still there {time.time() - case.cured_at:.0f} s after the cure")

    def _page(self, stack: Stack, case: _Case, status: str, since: float) -> Page | None:
        labels = {**case.culprit.labels, "alertname": case.fault.alert}
        return next(
            (one for one in stack.pages() if one.status == status and one.at >= since and one.is_about(labels)), None
        )

    def keep_series(self, stack: Stack, file: Path, seconds: float) -> None:
        """Write every series that Prometheus has of so many seconds, and when each failure was caused, paged and cured.

        The dashboards are tested with it: `tests/grafana/recorded.py` takes it over.
        """
        moments = {
            case.fault.name: {
                "number": case.fault.number,
                "alert": case.fault.alert,
                "culprit": case.culprit.labels,
                "caused": case.caused_at,
                "paged": case.caused_at + (case.outcome.seconds_to_page or 0),
                "cured": case.cured_at,
            }
            for case in self.cases
            if case.outcome.detected
        }
        try:
            kept = {"step": self.pace.interval, "faults": moments, "series": stack.series(seconds, self.pace.interval)}
            file.parent.mkdir(parents=True, exist_ok=True)
            with gzip.open(file, "wt", encoding="utf-8") as out:
                json.dump(kept, out)
        except Exception as error:  # noqa: BLE001  (the run stands without it)
            _say(f"what Prometheus recorded could not be kept: {error}")

    def tell(self, stack: Stack) -> None:
        """Say what has arrived since the last time."""
        pages = stack.pages()
        for page in pages[self._seen :]:
            about = ", ".join(
                f"{name}={value}"
                for name, value in page.labels.items()
                if name not in {"alertname", "severity", "signal", *stack.labels}
            )
            _say(f"{page.receiver} has {page.alert} {page.status}: {about}")
        self._seen = len(pages)

    def _confirm(self, case: _Case) -> None:
        known = confirm_section(case.fault.alert)
        prelude = [f"{name}='{value}'" for name, value in case.culprit.variables.items()]
        for shows in case.fault.confirm:
            if shows.command not in known:
                case.outcome.problems.append(f"the runbook of {case.fault.alert} has no command {shows.command}")
                continue
            command = shows.command
            for example, here in case.culprit.instead.items():
                command = command.replace(example, here)
            if re.match(r"[a-z]+=", command):
                prelude.append(command)
                continue
            said = _shown("\n".join([*prelude, command]), shows)
            case.outcome.confirmed[shows.command] = not said
            if said:
                case.outcome.problems.append(f"`{command}` does not show {shows.pattern!r}: {said}")

    def _look_at_decoys(self, cases: Sequence[_Case], stack: Stack) -> None:
        verdicts = {}
        try:
            before = _scrape(stack)
            time.sleep(_CHECK_OVER)
            verdicts = {one.failure.number: one for one in judge(Pair(before, _scrape(stack)))}
        except SourceError as error:
            self.problems.append(f"check cannot ask about the decoys: {error}")
        for case in cases:
            for decoy in case.decoys:
                wrong = ""
                try:
                    if not decoy.culprit.happened():
                        wrong = "it did not happen, so its silence means nothing"
                except Exception as error:  # noqa: BLE001  (its witness failed, which is the finding)
                    wrong = f"its witness failed: {error}"
                for one in verdicts[case.fault.number].findings if verdicts else ():
                    if (
                        decoy.culprit.labels
                        and decoy.culprit.labels.items() <= one.culprit.as_dict().items()
                        and one.alert not in decoy.right
                    ):
                        wrong = wrong or f"check finds {one.alert} in it: {one.evidence}"
                case.outcome.decoys[decoy.name] = wrong

    def _judge(self, stack: Stack) -> None:
        """Say of each page whether it blames whom it should."""
        culprits = [labels for case in self.cases for labels in (case.culprit.labels, *case.culprit.beside)]
        firing = [page for page in stack.pages() if page.status == "firing"]
        for case in self.cases:
            outcome = case.outcome
            pages = [page for page in firing if page.alert == case.fault.alert]
            outcome.blamed = [page.labels for page in pages]
            signal = pages[0].labels["signal"] if pages else ""
            strangers = [page.labels for page in pages if not any(page.is_about(labels) for labels in culprits)]
            outcome.attributed = outcome.detected and not strangers
            if strangers:
                outcome.problems.append(f"these are blamed too: {strangers}")
            for name in case.fault.also if outcome.detected else ():
                if not any(page.alert == name and page.is_about(case.culprit.labels) for page in firing):
                    outcome.problems.append(f"{name} did not come beside {case.fault.alert}")
            for decoy in case.decoys:
                # On an emulated machine anybody may wait for a CPU, and a warning of that is right and wakes nobody.
                about = [
                    page
                    for page in firing
                    if page.is_about(decoy.culprit.labels)
                    and page.alert not in decoy.right
                    and (page.labels["severity"] == "critical" or page.labels["signal"] == signal)
                ]
                if about:
                    outcome.decoys[decoy.name] = f"it paged: {about[0].labels}"


def _scrape(stack: Stack) -> Snapshot:
    """Scrape as `check` does, more than once if need be: an emulated machine with fourteen failures answers late."""
    for _ in range(_SCRAPES):
        with suppress(SourceError):
            return Remote(stack.exporter).scrape()
    return Remote(stack.exporter).scrape()


def _keep_evidence(case: _Case, stack: Stack) -> None:
    """Write beside the logs what Prometheus knows now of the culprit of a failure that did not page."""
    labels = ",".join(f'{name}="{value}"' for name, value in case.culprit.labels.items() if name != "container")
    with (WORKPLACE / f"{case.fault.alert}.log").open("w", encoding="utf-8") as file:
        file.writelines(f"{one['metric']} {one['value'][1]}\n" for one in stack.query(f"{{{labels}}}"))


def _blames(found: dict[str, str], labels: dict[str, str]) -> bool:
    """Tell whether a finding is about whom it should be, as far as it says: it may name fewer labels than the page."""
    shared = labels.keys() & found.keys()
    return bool(shared) and all(found[name] == labels[name] for name in shared)


def _shown(script: str, shows: Shows) -> str:
    """Run a command of a runbook. Return nothing if it shows what it should, otherwise what it did show."""
    outputs: list[str] = []
    for _ in range(2 if shows.rises else 1):
        if outputs:
            time.sleep(_RISES_AFTER)
        command = ["timeout", str(shows.after), "bash", "-c", script]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        outputs.append(done.stdout + done.stderr)
    found = [list(re.finditer(shows.pattern, output, re.MULTILINE | re.DOTALL)) for output in outputs]
    if not all(found):
        return outputs[-1][-500:]
    if shows.rises:
        before, after = (sum(int(match[1]) for match in matches) for matches in found)
        return "" if after > before else f"{before}, then {after}"
    return ""


def _batches(faults: list[Fault], size: int) -> Iterator[list[Fault]]:
    return (faults[first : first + size] for first in range(0, len(faults), size))


def _lacks(needs: Sequence[Feature]) -> str:
    """Say which of these features this machine has not, and why."""
    return "; ".join(f"{feature.name}: {sentence}" for feature in needs if (sentence := feature.missing()))


def _alerts() -> Iterator[dict[str, Any]]:
    """Yield every alert that is shipped."""
    for file in (REPOSITORY / "rules").glob("*.yaml"):
        for group in yaml.safe_load(file.read_text(encoding="utf-8"))["groups"]:
            yield from (rule for rule in group["rules"] if "alert" in rule)


def _waits(seconds: int) -> dict[str, dict[str, str]]:
    """Return the same wait for every alert that there is."""
    waits = {"for": f"{seconds}s", "keep_firing_for": f"{seconds}s"}
    return {rule["alert"]: waits for rule in _alerts()}


def _shipped_for(alert: str) -> int:
    """Return how many seconds an alert waits as it is shipped; all of them say it in whole minutes."""
    (rule,) = (rule for rule in _alerts() if rule["alert"] == alert)
    return 60 * int(rule["for"].removesuffix("m"))


@contextmanager
def stage(faults: Sequence[Fault], interval: int) -> Iterator[tuple[Node, Stack, ExitStack]]:
    """Make the node and start the path; also give the stack on which everything else is put."""
    with ExitStack() as scene:
        node = Node()
        WORKPLACE.mkdir()
        office = scene.enter_context(node.unit("shoal-lab.service"))

        def serve() -> None:
            ready()
            webhook(WORKPLACE / "pages")

        office.start(serve)
        options = ["--netns.enter=true", *dict.fromkeys(option for fault in faults for option in fault.exporter)]
        stack = scene.enter_context(
            start(
                WORKPLACE,
                options,
                interval=interval,
                waits=_waits(_FOR * interval),
                cgroup=node.cgroup("system.slice/shoal-exporter.service"),
            )
        )
        yield node, stack, scene


def main(names: Sequence[str], pace: Pace, *, output: Path) -> int:
    """Run the named failures, or all, and return the exit status."""
    began = time.monotonic()
    faults = [fault for fault in load() if not names or fault.name in names]
    lab = Lab(faults, pace)
    try:
        with stage(faults, pace.interval) as (node, stack, scene):
            _say("exporter, Prometheus and Alertmanager answer")
            # The exporter's own failures are the same on every kernel, and an emulated machine has enough to do.
            other = None if IN_VM else scene.enter_context(other_node(WORKPLACE))
            lab.run(node, stack, other)
            lab.keep_series(stack, output / f"{KERNEL}.series.json.gz", time.monotonic() - began)
    finally:
        keep_logs(output / f"{KERNEL}.logs")
    report = Report(KERNEL, time.monotonic() - began, list(lab.outcomes.values()), lab.problems)
    report.write(output)
    sys.stdout.write(f"\n{report.markdown()}\n{report.line}\n")
    sys.stdout.flush()
    return 0 if report.good else 1


def demo(name: str, pace: Pace, *, doors: Sequence[socket.socket]) -> NoReturn:
    """Show one failure: build, cause, and say what the path makes of it until interrupted.

    `doors` listen on the machine, in the order of `PORTS`: whoever comes in there is led to the program inside.
    """
    (fault,) = (fault for fault in load() if fault.name == name)
    if lacks := _lacks(fault.needs):
        raise RuntimeError(f"{name} cannot run here: {lacks}")
    lab = Lab([fault], pace)
    with stage([fault], pace.interval) as (node, stack, scene):
        scene.enter_context(node.unit("shoal-doors.service")).start(lambda: asyncio.run(_open(doors)))
        built = lab.build(node, [fault], scene)
        _say("a minute of health first, so that every counter is known before it moves")
        lab.settle(stack)
        lab.cause(built)
        _say(f"waiting for {fault.alert}; rules/runbooks/{fault.alert}.md says what to do; Ctrl-C ends it all")
        told = ""
        while True:
            lab.tell(stack)
            states = sorted(
                {alert["metric"]["alertstate"] for alert in stack.query(f'ALERTS{{alertname="{fault.alert}"}}')}
            )
            if (now := " and ".join(states) or "not there yet") != told:
                _say(f"{fault.alert} is {now}")
                told = now
            time.sleep(1)


async def _open(doors: Sequence[socket.socket]) -> None:
    """Lead whoever comes in by a door to the program that it is for."""

    async def copy(source: asyncio.StreamReader, target: asyncio.StreamWriter) -> None:
        with suppress(OSError):
            while data := await source.read(65536):
                target.write(data)
                await target.drain()
        target.close()

    def lead_to(port: int) -> Callable[[asyncio.StreamReader, asyncio.StreamWriter], Awaitable[None]]:
        async def lead(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
            with suppress(OSError):
                there, back = await asyncio.open_connection("127.0.0.1", port)
                await asyncio.gather(copy(reader, back), copy(there, writer))

        return lead

    for door, port in zip(doors, PORTS.values(), strict=True):
        await asyncio.start_server(lead_to(port), sock=door)
    ready()
    await asyncio.Event().wait()


def keep_logs(directory: Path) -> None:
    """Copy what the programs said out of the node."""
    directory.mkdir(parents=True, exist_ok=True)
    for file in [*WORKPLACE.glob("*.log"), *WORKPLACE.glob("pages")]:
        shutil.copy(file, directory / file.name)
