"""What a file of `faults/` declares: one failure, how it is caused and cured, what looks like it, and how it shows.

A story is a generator over a node. It builds what is healthy and yields who will be to blame; resumed, it causes the
failure and yields; resumed, it cures it and yields; closed, it takes away what it built. A decoy's story is shorter:
built, going on, and no cure.
"""

from __future__ import annotations

from collections.abc import Callable, Generator
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from tests.lab.node import Node

__all__ = ["Culprit", "Decoy", "Fault", "Feature", "Shows", "Story"]


@dataclass(frozen=True, slots=True)
class Culprit:
    """Who is to be blamed, or, of a decoy, who is not: labels that an alert about it carries.

    `variables` are the shell variables that the runbook's commands leave open; `instead` is {what stands in them as an
    example or a gap: what it is here}.
    `happened` of a decoy tells whether that which looks like the failure has really taken place.
    """

    labels: dict[str, str]
    variables: dict[str, str] = field(default_factory=dict)
    instead: dict[str, str] = field(default_factory=dict)
    happened: Callable[[], object] = bool
    beside: tuple[dict[str, str], ...] = ()
    """Labels of others whom the same alert may rightly name too."""


Story = Generator["Culprit | None", None, None]


@dataclass(frozen=True, slots=True)
class Shows:
    """A command of the runbook's Confirm section, word for word, and what its output must show.

    With `rises` the command is run twice, three seconds apart, and the sum of the numbers that `pattern` captures must
    have grown.
    A command that goes on for ever is stopped `after` so many seconds.
    """

    command: str
    pattern: str
    rises: bool = False
    after: float = 120


@dataclass(frozen=True, slots=True)
class Feature:
    """What a failure cannot do without. `missing` says in a sentence why this machine has it not, or nothing.

    `kernel` tells that the exporter cannot do without it either, so that its signal must be absent too.
    """

    name: str
    missing: Callable[[], str]
    kernel: bool = False


@dataclass(frozen=True, slots=True)
class Decoy:
    """What looks like a failure and is not."""

    story: Callable[[Node], Story]
    needs: tuple[Feature, ...] = ()
    right: tuple[str, ...] = ()
    """Alerts about it that are right, none of which pages."""


@dataclass(frozen=True, slots=True)
class Fault:
    """One failure of the fourteen."""

    number: int
    title: str
    alert: str
    signal: str
    """The signal of the exporter that the alert rests on, as `shoal_signal_available` names it."""
    story: Callable[[Node], Story]
    decoys: tuple[Decoy, ...]
    confirm: tuple[Shows, ...]
    needs: tuple[Feature, ...] = ()
    also: tuple[str, ...] = ()
    """Other alerts that must come beside this one, because they hold whenever it does: warnings, mostly."""
    exporter: tuple[str, ...] = ()
    """Options that the exporter must be given to see it."""
    one_moment: bool = False
    """Whether `check` must have begun before it to see it: it happens once, or the exporter asks once a minute."""
    evidence: float = 0
    """How long the alert's expression may take to hold once the failure is there, in seconds; `because` says why."""
    because: str = ""
    resolves_after: float = 420
    """The longest that its page may stay after the cure, in seconds: the window of its evidence, and a margin."""
    name: str = ""
    """The name of its file, which is put in when that is loaded."""
