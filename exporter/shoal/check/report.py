"""What `check` prints: for a person at any width, worst first, and the same as JSON."""

from __future__ import annotations

import textwrap
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from shoal.check import runbooks
from shoal.check.alerts import Status
from shoal.check.failures import FAILURES, WANTS

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence

    from shoal.check.failures import Failure
    from shoal.check.finding import Finding
    from shoal.check.snapshot import Labels, Pair

__all__ = ["JSON_VERSION", "Verdict", "as_json", "compare", "judge", "overall", "render"]

JSON_VERSION = 1
"""Rises when a key of the JSON changes its sense or goes; new keys do not raise it."""

_WORDS = {Status.OK: "ok", Status.WARNING: "warning", Status.CRITICAL: "critical", Status.UNKNOWN: "cannot tell"}
_COLOURS = {Status.OK: "32", Status.WARNING: "33", Status.CRITICAL: "1;31", Status.UNKNOWN: "36"}
_ORDER = (Status.CRITICAL, Status.WARNING, Status.UNKNOWN, Status.OK)
_NARROWEST, _WIDEST = 30, 100
_MOST_FINDINGS = 5

# What each value of the label `reason` means to a person.
_REASONS = {
    "not_in_kernel": "this kernel does not have it, or its module is not loaded",
    "disabled": "the kernel has it and was told not to count, by a sysctl or a boot parameter",
    "not_enabled": "the exporter was not asked for it",
    "cgroup_v1": "only cgroup v2 gives it",
    "no_permission": "a capability, a mount or the node's PID namespace is missing",
    "malformed": "the kernel's answer was not understood",
    "not_readable": "reading it failed",
    "collector_failed": "the collector raised or did not finish in time, so the node may be under heavy load",
}
# Those that whoever runs the exporter can do something about.
_REFUSALS = ("not_enabled", "no_permission")


@dataclass(frozen=True, slots=True)
class Verdict:
    """What is said of one failure. `why` is set where nothing can be told, `unseen` has what was not looked at."""

    failure: Failure
    status: Status
    findings: tuple[Finding, ...] = ()
    why: str = ""
    unseen: tuple[str, ...] = ()


def judge(pair: Pair) -> list[Verdict]:
    """Judge all fourteen, worst first."""
    verdicts = [_verdict(failure, pair) for failure in FAILURES]
    return sorted(verdicts, key=lambda one: (_ORDER.index(one.status), one.failure.number))


def _verdict(failure: Failure, pair: Pair) -> Verdict:
    # Sorted, so that the order does not change from one run to the next.
    found = sorted(set(failure.look(pair)), key=lambda one: (-one.status, one.alert, str(one.culprit.as_dict())))
    absent = {part: why for part in failure.parts if (why := _absent(part.signal, pair))}
    unseen = tuple(f"{part.unseen}. {why}" for part, why in absent.items() if part.unseen)
    if found:
        return Verdict(failure, found[0].status, tuple(found), unseen=unseen)
    for signal in failure.signals:
        if why := _absent(signal, pair):
            return Verdict(failure, Status.UNKNOWN, why=why)
    for part, why in absent.items():
        if hidden := part.hidden(pair) if part.hidden else "":
            said = f"{part.unseen} were not looked at; {hidden}" if part.unseen else hidden
            return Verdict(failure, Status.UNKNOWN, why=f"{said}. {why}")
    return Verdict(failure, Status.OK, unseen=unseen)


def _absent(signal: str, pair: Pair) -> str:
    """Return why a signal is absent and what would give it, "" if it is there."""
    reason = pair.signals().get(signal)
    if reason is None:
        exporter = f"this exporter, {pair.version}," if pair.version else "this exporter"
        return f"{exporter} has no {signal}: it is older, or the collector is off"
    if not reason:
        return ""
    if signal in WANTS and reason in _REFUSALS:
        return f"{signal}: {reason}, it wants {WANTS[signal]}"
    return f"{signal}: {_REASONS[reason]} ({reason})" if reason in _REASONS else f"{signal}: {reason}"


def overall(verdicts: Iterable[Verdict]) -> Status:
    """Return the worst; what cannot be told counts only where nothing can."""
    statuses = {one.status for one in verdicts}
    return next(
        (status for status in (Status.CRITICAL, Status.WARNING, Status.OK) if status in statuses), Status.UNKNOWN
    )


def who(labels: Labels) -> str:
    """Name the culprit in one phrase: the workload, or else its namespace, and what of it."""
    pod = "/".join(filter(None, (labels["namespace"], labels["pod"])))
    owner = _phrase(("pod", pod), ("container", labels["container"]), ("unit", labels["unit"]))
    said = [
        owner or _phrase(("network namespace", labels["netns"])),
        _phrase(("server", labels["server"])),
        _phrase(("listener" if labels["port"] else "address", labels["address"]), ("port", labels["port"])),
        _phrase(("mount", labels["mountpoint"])) or _phrase(("device", labels["device"])),
        _phrase(("destination", labels["destination"]), ("port", labels["destination_port"])),
        _phrase(("backend", labels["backend"])),
        _phrase(("protocol", labels["protocol"])),
    ]
    return ", ".join(filter(None, said)) or "the node"


def _phrase(*named: tuple[str, str]) -> str:
    return " ".join(f"{kind} {name}" for kind, name in named if name)


def render(node: str, verdicts: Sequence[Verdict], *, seconds: float, width: int, colour: bool) -> str:
    """Return the report of one node as lines of at most `width` columns, as far as words allow."""
    width = max(_NARROWEST, min(width, _WIDEST))
    lines = _wrapped(f"{node}, {seconds:.0f} s of its kernel's counters", "", width)
    told = 0
    for verdict in verdicts:
        word = _WORDS[verdict.status]
        shown = f"\033[{_COLOURS[verdict.status]}m{word:<12}\033[0m" if colour else f"{word:<12}"
        title = _wrapped(f"{verdict.failure.title} ({verdict.failure.name})", "", width - 12)
        lines.append(shown + title[0])
        lines += [" " * 12 + line for line in title[1:]]
        if verdict.why:
            lines += _wrapped(verdict.why, "    ", width)
        if verdict.findings:
            lines += _findings(verdict.findings, width)
        for unseen in verdict.unseen:
            lines += _wrapped(f"Not seen: {unseen}", "    ", width)
        told += verdict.status is not Status.UNKNOWN
    lines.append("")
    lines += _wrapped(_summary(verdicts, told), "", width)
    return "\n".join(lines) + "\n"


def _findings(findings: Sequence[Finding], width: int) -> list[str]:
    lines: list[str] = []
    for finding in findings[:_MOST_FINDINGS]:
        lines += _wrapped(f"{who(finding.culprit)}: {finding.evidence}", "    ", width)
    if len(findings) > _MOST_FINDINGS:
        lines += _wrapped(f"and {len(findings) - _MOST_FINDINGS} more; --json has them all", "    ", width)
    alert, culprit = findings[0].alert, findings[0].culprit
    # Not wrapped: a command that is broken cannot be pasted.
    lines += [f"    $ {command}" for command in runbooks.confirm(alert, culprit)]
    if step := runbooks.first_step(alert):
        lines += _wrapped(f"First: {step}", "    ", width)
    lines += [f"    # {command}" for command in runbooks.first_commands(alert, culprit)]
    lines += _wrapped(f"Runbook: shoal-exporter explain {alert}", "    ", width)
    return lines


def _summary(verdicts: Sequence[Verdict], told: int) -> str:
    counts = {status: sum(one.status is status for one in verdicts) for status in _ORDER}
    said = ", ".join(f"{count} {_WORDS[status]}" for status, count in counts.items() if count)
    if partly := sum(one.status is Status.OK and bool(one.unseen) for one in verdicts):
        said += f" ({partly} of them as far as was seen)"
    return f"{said}." if told else f"{said}: nothing can be told."


def _wrapped(text: str, indent: str, width: int) -> list[str]:
    # Whatever a name has in it, it is shown, and not obeyed by the terminal.
    text = "".join(one if one.isprintable() else repr(one)[1:-1] for one in text)
    return textwrap.wrap(text, width, initial_indent=indent, subsequent_indent=indent, break_on_hyphens=False) or [
        indent
    ]


def as_json(node: str, verdicts: Sequence[Verdict], *, seconds: float) -> dict[str, Any]:
    """Return what `--json` prints of one node."""
    return {
        "node": node,
        "status": _WORDS[overall(verdicts)],
        "seconds": round(seconds, 3),
        "failures": [
            {
                "number": one.failure.number,
                "name": one.failure.name,
                "title": one.failure.title,
                "status": _WORDS[one.status],
                "why": one.why,
                "unseen": list(one.unseen),
                "findings": [
                    {
                        "alert": finding.alert,
                        "status": _WORDS[finding.status],
                        "culprit": finding.culprit.as_dict(),
                        "evidence": finding.evidence,
                        "confirm": runbooks.confirm(finding.alert, finding.culprit),
                        "first_step": runbooks.first_step(finding.alert),
                        "first_commands": runbooks.first_commands(finding.alert, finding.culprit),
                        "runbook_url": runbooks.url(finding.alert),
                    }
                    for finding in one.findings
                ],
            }
            for one in verdicts
        ],
    }


def compare(nodes: dict[str, Sequence[Verdict]], *, width: int, colour: bool) -> str:
    """Return which nodes differ in what, then each node that is not well by itself."""
    width = max(_NARROWEST, min(width, _WIDEST))
    lines = []
    for failure in FAILURES:
        by: dict[Status, list[str]] = {}
        for node, verdicts in nodes.items():
            status = next(one.status for one in verdicts if one.failure is failure)
            by.setdefault(status, []).append(node)
        if len(by) == 1:
            continue
        lines += _wrapped(f"{failure.title} ({failure.name}) differs:", "", width)
        for status in _ORDER:
            if status in by:
                word = f"\033[{_COLOURS[status]}m{_WORDS[status]}\033[0m" if colour else _WORDS[status]
                lines += [f"    {word}:", *_wrapped(", ".join(by[status]), "        ", width)]
    return "\n".join(lines or ["All nodes agree in everything."]) + "\n"
