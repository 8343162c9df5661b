"""The fault lab without its faults: what its files declare, what its report says, what it clears away and asks for.

That the faults page is for `make lab` to show.
"""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
import yaml
from tests.lab import __main__ as program
from tests.lab import inside
from tests.lab.fault import Culprit, Decoy, Shows
from tests.lab.faults import load
from tests.lab.inside import _shipped_for, _shown, _waits, confirm_section
from tests.lab.node import Node, cgroup_mount
from tests.lab.report import FAULTS, KERNEL, Outcome, Report
from tests.lab.stack import REPOSITORY, Page, Stack, _alertmanager_configuration, _prometheus_configuration

from shoal.check.snapshot import Snapshot
from shoal.check.sources import Remote, SourceError
from shoal.collectors import available_names
from shoal.collectors import load as load_collector

if TYPE_CHECKING:
    from argparse import Namespace

    from tests.lab.fault import Fault, Story

RULES = REPOSITORY / "rules"


def alerts() -> dict[str, dict[str, Any]]:
    """Return the alerting rules by name."""
    files = [yaml.safe_load(file.read_text()) for file in RULES.glob("*.yaml")]
    rules = [rule for file in files for group in file["groups"] for rule in group["rules"]]
    return {rule["alert"]: rule for rule in rules if "alert" in rule}


def test_there_are_fourteen_failures() -> None:
    """Each once, with at least one decoy and one command that confirms it."""
    assert [fault.number for fault in load()] == list(range(1, FAULTS + 1))
    assert all(fault.decoys and fault.confirm and fault.title for fault in load())


@pytest.mark.parametrize("fault", load(), ids=lambda fault: fault.name)
def test_a_failure_fits_rules_runbook_and_exporter(fault: Fault) -> None:
    """Its alert and its signal exist, and each command that confirms it stands in the runbook word for word."""
    assert fault.alert in alerts()
    # Of the same group, so that both are evaluated at the same moment.
    assert {alerts()[name]["labels"]["signal"] for name in fault.also} <= {alerts()[fault.alert]["labels"]["signal"]}
    signals = {signal for name in available_names() for signal in load_collector(name).signals}
    assert fault.signal in signals
    assert bool(fault.evidence) is bool(fault.because)
    right = [alerts()[name] for decoy in fault.decoys for name in decoy.right]
    assert all(rule["labels"]["severity"] != "critical" for rule in right)
    assert [shows.command for shows in fault.confirm if shows.command not in confirm_section(fault.alert)] == []


@pytest.mark.parametrize(
    ("script", "pattern", "rises", "right"),
    [
        ("echo drop=7", r"drop=([1-9])", False, True),
        ("echo drop=0", r"drop=([1-9])", False, False),
        ("echo one; echo two", "one.*two", False, True),
        ("date +%s", r"(\d+)", True, True),
        ("echo 7", r"(\d+)", True, False),
        ("echo drop=7; date +drop=%s", r"drop=(\d+)", True, True),
        ("echo first; sleep 60", "first", False, True),
    ],
)
def test_what_a_command_shows(
    script: str, pattern: str, *, rises: bool, right: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The pattern is looked for in all that it prints; a number that must rise is looked at twice."""
    monkeypatch.setattr("tests.lab.inside._RISES_AFTER", 1.1)
    assert bool(_shown(script, Shows(script, pattern, rises=rises, after=2))) is not right


def test_only_waits_and_intervals_are_changed(tmp_path: Path) -> None:
    """Of the rules that Prometheus is given every expression is as shipped, and all else but how long alerts wait."""
    file, labels = _prometheus_configuration(tmp_path, 5, _waits(15))
    assert set(labels) == {"node", "cluster"}
    assert yaml.safe_load(file.read_text())["rule_files"] == [f"{tmp_path}/rules/*.yaml"]
    for shipped in RULES.glob("*.yaml"):
        given = yaml.safe_load((tmp_path / "rules" / shipped.name).read_text())
        expected = yaml.safe_load(shipped.read_text())
        for group in expected["groups"]:
            group.pop("interval", None)
            for rule in group["rules"]:
                if "alert" in rule:
                    rule.update({"for": "15s", "keep_firing_for": "15s"})
        assert given == expected


def test_nothing_is_inhibited_and_everything_arrives(tmp_path: Path) -> None:
    """Fourteen failures on one node would mute one another."""
    content = yaml.safe_load(_alertmanager_configuration(tmp_path).read_text())
    assert content["inhibit_rules"] == []
    assert {route["receiver"] for route in content["route"]["routes"]} == {"pager", "chat"}


def test_a_page_is_about_whoever_has_all_the_labels() -> None:
    """One label that differs, or is not there, makes it somebody else's."""
    page = Page(0.0, "firing", "pager", {"alertname": "A", "pod": "p", "netns": "pod"}, {})
    assert page.alert == "A"
    assert page.is_about({"pod": "p", "netns": "pod"})
    assert not page.is_about({"pod": "q"})
    assert not page.is_about({"unit": ""})


def outcome(number: int, **changes: object) -> Outcome:
    """Return what became of a failure of which everything is as it should be, but for these changes."""
    made = Outcome(
        number, f"n{number}", "t", "A", detected=True, attributed=True, seconds_to_page=9.6, decoys={"d": ""}
    )
    made.seconds_at_most, made.because = 30, "20 s: it is slow"
    for name, value in changes.items():
        setattr(made, name, value)
    return made


@pytest.mark.parametrize(
    ("changes", "line", "good"),
    [
        ({}, "2 of 14 paged, 2 of 14 blamed, 2 of 2 decoys silent, 0 cannot run here", True),
        ({"detected": False}, "1 of 14 paged, 2 of 14 blamed, 2 of 2 decoys silent, 0 cannot run here", False),
        ({"attributed": False}, "2 of 14 paged, 1 of 14 blamed, 2 of 2 decoys silent, 0 cannot run here", False),
        ({"decoys": {"d": "paged"}}, "2 of 14 paged, 2 of 14 blamed, 1 of 2 decoys silent, 0 cannot run here", False),
        ({"cannot_run": "x"}, "1 of 14 paged, 1 of 14 blamed, 1 of 1 decoys silent, 1 cannot run here", True),
        ({"problems": ["x"]}, "2 of 14 paged, 2 of 14 blamed, 2 of 2 decoys silent, 0 cannot run here", False),
    ],
)
def test_the_last_line_and_the_verdict(tmp_path: Path, changes: dict[str, object], line: str, *, good: bool) -> None:
    """They agree, and both files say the same."""
    report = Report("6.18", 60, [outcome(1), outcome(2, **changes)], [])
    assert report.line == f"lab 6.18: {line}"
    assert report.good is good
    report.write(tmp_path)
    assert sorted(os.listdir(tmp_path)) == ["6.18.json", "6.18.md"]
    content = json.loads((tmp_path / "6.18.json").read_text())
    assert content["line"] == report.line
    assert content["faults"][0]["seconds_to_page"] == 9.6
    text = (tmp_path / "6.18.md").read_text()
    assert report.line in text
    assert ("What is not as it should be" in text) is not good


def test_what_failed_is_tried_once_more(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Only that; the report has what the second try made of it, and what was wrong at the first."""
    tries: list[list[str]] = []

    def run(_arguments: object, words: list[str]) -> int:
        tries.append(words)
        if len(tries) == 1:
            Report(KERNEL, 60, [outcome(1), outcome(2, detected=False)], []).write(tmp_path)
            return 1
        second = Report(KERNEL, 30, [outcome(2)], [])
        second.write(tmp_path / "second")
        return int(not second.good)

    monkeypatch.setattr(program, "_outside", run)
    monkeypatch.setattr(program, "_missing", str)
    monkeypatch.setattr(sys, "argv", ["lab", "run", "--tries=2", f"--output={tmp_path}"])
    assert program.main() == 0
    assert tries[1][:2] == ["run", "n2"]
    assert len(tries) == 2
    both = Report.read(tmp_path)
    assert both
    assert both.good
    assert both.took_seconds == 90
    assert [one.first_try for one in both.outcomes] == [[], ["it did not page"]]
    assert "n2: it did not page" in both.markdown()


def test_what_fails_twice_is_wrong(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """And so is what is wrong with a run as a whole, which is not tried again."""
    problems: list[str] = []

    def run(arguments: Namespace, words: list[str]) -> int:
        target = tmp_path / "second" if words[0] == "run" else arguments.output
        Report(KERNEL, 60, [outcome(2, detected=bool(problems))], problems).write(target)
        return 1

    monkeypatch.setattr(program, "_outside", run)
    monkeypatch.setattr(program, "_missing", str)
    monkeypatch.setattr(sys, "argv", ["lab", "--tries=2", "run", f"--output={tmp_path}"])
    assert program.main() == 1
    assert not Report.read(tmp_path).good  # type: ignore[union-attr]
    shutil.rmtree(tmp_path / "second")
    problems.append("Prometheus cannot evaluate X")
    assert program.main() == 1
    assert not (tmp_path / "second").exists()


@pytest.mark.parametrize(
    ("took", "says"), [(30, "| 30 s | 30 s |"), (31, "| 31 s **late** | 30 s |"), (None, "| - | 30 s |")]
)
def test_a_page_has_its_time_beside_what_it_may_take(took: float | None, says: str) -> None:
    """And why it may take more than `for` and three scrapes."""
    text = Report("6.18", 60, [outcome(1, seconds_to_page=took), outcome(2, cannot_run="x")], []).markdown()
    assert says in text
    assert text.count("**late**") == ("late" in says)
    assert text.count("n1, 20 s: it is slow.") == 1
    assert "n2, 20 s" not in text
    rows = [line for line in text.splitlines() if line.startswith("|")]
    assert {row.count("|") for row in rows} == {12}


def test_the_shipped_wait_is_known_of_every_alert() -> None:
    """Whole minutes, so that the report can say what a page takes in the field."""
    assert {_shipped_for(name) > 0 for name in alerts()} == {True}
    assert _shipped_for("ShoalListenQueueOverflow") == 120


def untold() -> Story:
    """Return a story of nothing."""
    yield None


def test_of_what_did_not_page_all_that_is_known_is_kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Every series of the culprit: of its pod, since not all that an alert rests on has the container."""
    asked: list[str] = []

    class Known(Stack):
        def query(self, expression: str) -> list[dict[str, Any]]:
            asked.append(expression)
            return [{"metric": {"__name__": "up"}, "value": [0, "1"]}]

    monkeypatch.setattr(inside, "WORKPLACE", tmp_path)

    fault = load()[0]
    case = inside._Case(fault, outcome(1), untold(), Culprit({"pod": "api", "container": "app"}))
    inside._keep_evidence(case, Known(tmp_path, {}))
    assert asked == ['{pod="api"}']
    assert (tmp_path / f"{fault.alert}.log").read_text() == "{'__name__': 'up'} 1\n"


@pytest.mark.parametrize(
    ("in_vm", "cpus", "sizes"), [(False, 2, [14]), (True, 2, [5, 4, 5]), (True, 1, [5, 4, 1, 1, 1, 1, 1])]
)
def test_what_loads_an_emulated_machine_comes_after_the_rest(
    cpus: int, sizes: list[int], monkeypatch: pytest.MonkeyPatch, *, in_vm: bool
) -> None:
    """Each failure is in one wave, and those for which the controllers' limits are reached are in the last ones."""
    monkeypatch.setattr(inside, "IN_VM", in_vm)
    monkeypatch.setattr(os, "cpu_count", lambda: cpus)
    waves = inside.Lab(load(), inside.Pace(5, 1, 0))._waves()
    assert [len(wave) for wave in waves] == sizes
    assert sorted(fault.number for wave in waves for fault in wave) == list(range(1, FAULTS + 1))
    assert len(inside.Lab(load()[4:6], inside.Pace(5, 1, 0))._waves()) == (2 if in_vm and cpus == 1 else 1)


def test_a_wave_is_gone_before_the_next_is_built(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each failure with its decoys, so that what is left of one is no load for another."""
    told: list[str] = []

    def story(name: str) -> Story:
        told.append(f"{name} built")
        yield Culprit({"pod": name})
        told.append(f"{name} caused")
        try:
            yield None
        finally:
            told.append(f"{name} gone")

    def of(name: str) -> Fault:
        decoy = Decoy(lambda _: story("decoy"))
        return replace(load()[0], name=name, needs=(), story=lambda _: story(name), decoys=(decoy,))

    faults = [of("one"), of("other")]
    lab = inside.Lab(faults, inside.Pace(5, 0, 0))
    monkeypatch.setattr(lab, "_waves", lambda: [[fault] for fault in faults])
    monkeypatch.setattr(inside, "_scrape", lambda _: Snapshot(0.0))
    for phase in ("settle", "_check_signals", "_look_at_decoys", "_await_ends", "_judge"):
        monkeypatch.setattr(lab, phase, lambda *_: None)
    monkeypatch.setattr(lab, "_await_pages", lambda cases, *_: told.extend(f"{one.fault.name} paged" for one in cases))
    lab.run(Node.__new__(Node), Stack(tmp_path, {}))
    each = ["{} built", "decoy built", "decoy caused", "{} caused", "{} paged", "decoy gone", "{} gone"]
    assert told == [one.format(name) for name in ("one", "other") for one in each]


@pytest.mark.parametrize("failing", [2, 9])
def test_an_exporter_that_answers_late_is_asked_again(
    failing: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """And one that never answers costs the failure its check, with the reason, and not the run."""
    answers = iter([SourceError("timed out")] * failing + [Snapshot(0.0), Snapshot(5.0)])

    def scrape(_remote: Remote) -> Snapshot:
        if isinstance(answer := next(answers), SourceError):
            raise answer
        return answer

    monkeypatch.setattr(Remote, "scrape", scrape)
    monkeypatch.setattr(inside, "_CHECK_OVER", 0)
    fault, became = load()[1], outcome(2)
    case = inside._Case(fault, became, untold(), Culprit({"pod": "p"}))
    inside.Lab([fault], inside.Pace(5, 1, 0))._check(case, Stack(tmp_path, {"node": "n"}), None)
    (problem,) = became.problems
    assert problem.startswith("check cannot ask: timed out" if failing > 3 else "check does not say that it hits")


def lab(*arguments: str, user: tuple[str, ...] = ()) -> subprocess.CompletedProcess[str]:
    """Run the program."""
    command = [*user, sys.executable, "-m", "tests.lab", *arguments]
    return subprocess.run(command, cwd=REPOSITORY, capture_output=True, text=True, check=False)


def test_it_lists_the_failures() -> None:
    """One a line, without root."""
    assert len(lab("list").stdout.splitlines()) == FAULTS


@pytest.mark.parametrize(
    ("arguments", "says"),
    [(("run", "nonsense"), "there is no failure nonsense; there are redis_aof"), (("demo",), "say which failure")],
)
def test_a_wrong_name_is_told(arguments: tuple[str, ...], says: str) -> None:
    """In a sentence, with what there is instead."""
    done = lab(*arguments)
    assert done.returncode == 2
    assert says in done.stderr
    assert "Traceback" not in done.stderr


def test_what_is_missing_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    """No root, or a program that is not installed: one sentence."""
    monkeypatch.setattr(os, "geteuid", lambda: 1000)
    assert program._missing() == "must be root, to make namespaces and cgroups"
    monkeypatch.setattr(os, "geteuid", lambda: 0)
    monkeypatch.setattr("shutil.which", lambda name: None if name == "nft" else name)
    assert program._missing() == "nft must be installed: tests/packages.sh does it on Debian"


@pytest.mark.root
def test_what_a_killed_run_left_is_cleared_away() -> None:
    """Its cgroups and what still runs in them go; those of a run that lives stay."""
    ended = subprocess.Popen(["true"])
    ended.wait()
    dead, alive = (cgroup_mount() / f"shoallab{pid}.slice" for pid in (ended.pid, os.getpid()))
    below = dead / "kubepods.slice"
    below.mkdir(parents=True)
    alive.mkdir()
    try:
        with subprocess.Popen(["sleep", "60"]) as left:
            (below / "cgroup.procs").write_text(str(left.pid))
            program._clear_away()
            assert not dead.exists()
            assert alive.exists()
            assert left.wait(10) == -9
    finally:
        alive.rmdir()


@pytest.mark.root
@pytest.mark.slow
@pytest.mark.timeout(300)
def test_a_lab_that_is_killed_half_way_takes_everything_with_it(tmp_path: Path) -> None:
    """Its processes, and with them its networks, mounts and loop devices; the next start removes the cgroups."""
    command = [sys.executable, "-m", "tests.lab", "run", "--output", str(tmp_path), "inodes", "listen_queue"]
    with subprocess.Popen(command, cwd=REPOSITORY, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout
        assert any("2 failures and" in line and "are built" in line for line in process.stdout)
        top = cgroup_mount() / f"shoallab{process.pid}.slice"
        pids = {pid for file in top.rglob("cgroup.procs") for pid in file.read_text().split()}
        mounts = "".join(Path("/proc", pid, "mountinfo").read_text() for pid in pids)
        loops = {f"/sys/block/{name}/loop" for name in re.findall(r" /dev/(loop\d+) ", mounts)}
        assert len(pids) > 10
        assert len(loops) == 3
        process.kill()
    gone = [Path("/proc", pid) for pid in pids] + [Path(loop) for loop in loops]
    until = time.monotonic() + 20
    while any(map(Path.exists, gone)) and time.monotonic() < until:
        time.sleep(0.1)
    assert [one for one in gone if one.exists()] == []
    assert top.exists()
    program._clear_away()
    assert not top.exists()
