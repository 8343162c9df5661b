"""What a run of the lab found out, as a person reads it and as a program does."""

from __future__ import annotations

import json
import platform
from dataclasses import asdict, dataclass, field
from typing import TYPE_CHECKING, Final

if TYPE_CHECKING:
    from pathlib import Path

__all__ = ["FAULTS", "KERNEL", "Outcome", "Report"]

FAULTS: Final = 14
KERNEL: Final = ".".join(platform.release().split(".")[:2])
"""The kernel that runs here, as reports are named for it."""

_COLUMNS: Final = (
    "",
    "failure",
    "alert",
    "detected",
    "blamed",
    "fault to page",
    "at most",
    "with the shipped `for`",
    "decoys silent",
    "confirmed",
    "cure to resolved",
)


@dataclass(slots=True)
class Outcome:
    """What became of one failure."""

    number: int
    name: str
    title: str
    alert: str
    cannot_run: str = ""
    """The feature that is missing, and why; nothing if it ran."""
    detected: bool = False
    attributed: bool = False
    blamed: list[dict[str, str]] = field(default_factory=list)
    """The labels of each page of this alert."""
    seconds_to_page: float | None = None
    seconds_at_most: float = 0.0
    """What the page may take: what the expression needs to hold, `for` as it was here, and three scrapes."""
    because: str = ""
    """How long the expression may need to hold, and why; nothing if it holds at once."""
    seconds_as_shipped: float | None = None
    """What the page would have taken with the `for` that is shipped."""
    seconds_to_resolve: float | None = None
    """From the cure to the end of the page."""
    resolve_not_awaited: bool = False
    """Its evidence stays longer in its window than this run was given."""
    confirmed: dict[str, bool] = field(default_factory=dict)
    """{command of the runbook: whether it showed what it should}"""
    checked: str = ""
    """What `shoal-exporter check` said of it while it went on."""
    decoys: dict[str, str] = field(default_factory=dict)
    """{decoy: nothing if it was silent, or what went wrong}"""
    problems: list[str] = field(default_factory=list)
    """What else is not as it should be; each makes the run fail."""
    first_try: list[str] = field(default_factory=list)
    """What was wrong when it was tried the first time, if this is the second."""

    @property
    def wrong(self) -> list[str]:
        """All that is not as it should be, in sentences."""
        missed = [] if self.detected or not self.ran else ["it did not page"]
        blamed = ["the wrong one is blamed"] if self.detected and not self.attributed else []
        decoys = [f"decoy {name}: {sentence}" for name, sentence in self.decoys.items() if sentence]
        return [*missed, *blamed, *self.problems, *decoys]

    @property
    def ran(self) -> bool:
        """Whether it could run here."""
        return not self.cannot_run

    @property
    def late(self) -> bool:
        """Whether the page took longer than it may."""
        return self.seconds_to_page is not None and self.seconds_to_page > self.seconds_at_most

    @property
    def silent(self) -> int:
        """The number of its decoys that stayed silent."""
        return sum(not wrong for wrong in self.decoys.values())

    @property
    def good(self) -> bool:
        """Whether everything about it is as it should be."""
        return not self.wrong


@dataclass(slots=True)
class Report:
    """What became of all."""

    kernel: str
    took_seconds: float
    outcomes: list[Outcome]
    problems: list[str]
    """What is wrong with the run as a whole."""

    @property
    def line(self) -> str:
        """The last line of a run."""
        ran = [one for one in self.outcomes if one.ran]
        paged, blamed = sum(one.detected for one in ran), sum(one.attributed for one in ran)
        silent, decoys = sum(one.silent for one in ran), sum(len(one.decoys) for one in ran)
        return (
            f"lab {self.kernel}: {paged} of {FAULTS} paged, {blamed} of {FAULTS} blamed, "
            f"{silent} of {decoys} decoys silent, {len(self.outcomes) - len(ran)} cannot run here"
        )

    @property
    def wrong(self) -> list[str]:
        """All that is not as it should be, in sentences."""
        return [*self.problems, *(f"{one.name}: {sentence}" for one in self.outcomes for sentence in one.wrong)]

    @property
    def good(self) -> bool:
        """Whether the run succeeded."""
        return not self.wrong

    @staticmethod
    def forget(directory: Path) -> None:
        """Remove what was written of this kernel, so that no earlier run is taken for this one."""
        for suffix in ("json", "md"):
            (directory / f"{KERNEL}.{suffix}").unlink(missing_ok=True)

    @classmethod
    def read(cls, directory: Path) -> Report | None:
        """Read what `write` wrote of this kernel, if it came to that."""
        if not (directory / f"{KERNEL}.json").exists():
            return None
        content = json.loads((directory / f"{KERNEL}.json").read_text(encoding="utf-8"))
        outcomes = [Outcome(**one) for one in content["faults"]]
        return cls(content["kernel"], content["took_seconds"], outcomes, content["problems"])

    @property
    def failed(self) -> list[str]:
        """The names of the failures that are not as they should be."""
        return [one.name for one in self.outcomes if not one.good]

    def tried_again(self, second: Report) -> Report:
        """Return this one with what a second try of some made of them, and what was wrong at the first."""
        again = {one.name: one for one in second.outcomes}
        for one in self.outcomes:
            if one.name in again:
                again[one.name].first_try = one.wrong
        outcomes = [again.get(one.name, one) for one in self.outcomes]
        took = self.took_seconds + second.took_seconds
        return Report(self.kernel, took, outcomes, self.problems + second.problems)

    def write(self, directory: Path) -> None:
        """Write it as <kernel>.md and <kernel>.json."""
        directory.mkdir(parents=True, exist_ok=True)
        content = {"kernel": self.kernel, "took_seconds": round(self.took_seconds), "line": self.line}
        content |= {"problems": self.problems, "faults": [asdict(one) for one in self.outcomes]}
        for suffix, text in (("json", json.dumps(content, indent=1) + "\n"), ("md", self.markdown())):
            # Another run may write the same at the same time.
            partial = directory / f".{self.kernel}.{suffix}.partial"
            partial.write_text(text, encoding="utf-8")
            partial.replace(directory / f"{self.kernel}.{suffix}")

    def markdown(self) -> str:
        """Return it as Markdown."""
        rows = [
            f"# Fault lab, kernel {self.kernel}",
            "",
            f"{self.line}. Taken in {self.took_seconds / 60:.0f} minutes.",
            "",
            f"| {' | '.join(_COLUMNS)} |",
            "|---" * len(_COLUMNS) + "|",
        ]
        for one in self.outcomes:
            about = f"| {one.number} | `{one.name}` {one.title} | {one.alert} |"
            if not one.ran:
                rows.append(f"{about} cannot run here: {one.cannot_run} | | | | | | | |")
                continue
            resolved = "not awaited" if one.resolve_not_awaited else _seconds(one.seconds_to_resolve)
            rows.append(
                f"{about} {_yes(one.detected)} | {_yes(one.attributed)}"
                f" | {_seconds(one.seconds_to_page)}{' **late**' if one.late else ''}"
                f" | {_seconds(one.seconds_at_most)} | {_seconds(one.seconds_as_shipped)}"
                f" | {one.silent} of {len(one.decoys)} | {sum(one.confirmed.values())} of {len(one.confirmed)}"
                f" | {resolved} |"
            )
        rows += [
            "",
            "At most is `for`, which the lab shortens to three scrapes, three scrapes more, and of an expression that",
            "looks back over a time what it needs to hold if the failure begins just after a point that it looks at:",
            "",
        ]
        rows += [f"- {one.name}, {one.because}." for one in self.outcomes if one.ran and one.because]
        tried = [f"- {one.name}: {sentence}" for one in self.outcomes for sentence in one.first_try]
        if tried:
            rows += [
                "",
                "As it should be or not, the table has the second try of these; at the first it was:",
                "",
                *tried,
            ]
        if self.wrong:
            rows += ["", "What is not as it should be:", "", *(f"- {sentence}" for sentence in self.wrong)]
        return "\n".join(rows) + "\n"


def _yes(value: bool) -> str:  # noqa: FBT001  (it is what is put into words)
    return "yes" if value else "**no**"


def _seconds(value: float | None) -> str:
    return "-" if value is None else f"{value:.0f} s"
