"""The subcommands `check` and `explain`: arguments, waiting, printing, and what they exit with."""

from __future__ import annotations

import asyncio
import getpass
import json
import os
import shutil
import ssl
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import TYPE_CHECKING, Any

from shoal.check import runbooks
from shoal.check.alerts import Status
from shoal.check.failures import FAILURES
from shoal.check.report import JSON_VERSION, as_json, compare, judge, overall, render
from shoal.check.snapshot import Pair, Snapshot
from shoal.check.sources import Remote, SourceError, local
from shoal.settings import closest

if TYPE_CHECKING:
    import argparse
    from collections.abc import Callable, Sequence

    from shoal.check.report import Verdict
    from shoal.settings import Settings

__all__ = ["DEFAULTS", "PASSWORD_VARIABLE", "UsageError", "add_arguments", "check", "explain"]

PASSWORD_VARIABLE = "SHOAL_CHECK_PASSWORD"  # noqa: S105  (where it stands, not what it is)

DEFAULTS = {"netns.enter": "true", "redis.discover": "true"}
"""What a person who looks at a node wants looked at; where it is not allowed, the report says so."""

_LONGEST_INTERVAL = 3600.0
_MOST_AT_ONCE = 16


class UsageError(Exception):
    """The arguments cannot be used. `str()` is a sentence."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the flags that only `check` has."""
    parser.add_argument("--interval", metavar="SECONDS", default="5", help="Seconds between the two reads. Default: 5")
    parser.add_argument(
        "--from",
        dest="sources",
        metavar="ADDRESS",
        action="append",
        default=[],
        help="Judge from a running exporter, such as http://node:7462, and not from this kernel. Given several times,"
        " or with the name of a file that has an address on each line, it compares nodes.",
    )
    parser.add_argument(
        "--user",
        metavar="NAME",
        default="",
        help=f"For basic auth; the password is in {PASSWORD_VARIABLE} or asked for.",
    )
    parser.add_argument("--cacert", metavar="FILE", default="", help="Certificates to trust instead of the system's.")
    parser.add_argument(
        "--cert", metavar="FILE", default="", help="Client certificate, with its key unless --key has it."
    )
    parser.add_argument("--key", metavar="FILE", default="", help="Key of the client certificate.")
    parser.add_argument(
        "--insecure", action="store_true", default=False, help="Do not verify the exporter's certificate."
    )
    parser.add_argument("--watch", action="store_true", default=False, help="Go on, every interval anew, until Ctrl-C.")
    parser.add_argument(
        "--json", action="store_true", default=False, help="Print JSON; with --watch, one document a line."
    )


def check(options: argparse.Namespace, settings: Settings | None) -> int:
    """Run `check` and return 0, 1, 2 or 3 as monitoring plugins do; `settings` are those for this node's own kernel.

    3 is for a node that could not be asked, or of which nothing can be told. Raises `UsageError`.
    """
    interval = _interval(options.interval)
    remotes = [_remote(address, options) for address in _addresses(options.sources)]
    status = Status.UNKNOWN
    try:
        if remotes:
            status = _check_remotes(remotes, interval, options)
        elif settings:
            status = _check_local(settings, interval, options)
    except KeyboardInterrupt:
        _say_progress("")
    except BrokenPipeError:
        # Whoever read this has seen enough; nothing may complain when the interpreter flushes.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    return int(status)


def explain(arguments: Sequence[str]) -> int:
    """Print the runbooks of a failure, by its name or number, or of an alert, and return 0. Raises `UsageError`."""
    if len(arguments) != 1 or arguments[0] in ("-h", "--help"):
        names = "\n".join(f"  {failure.number:>2}  {failure.name:<16} {failure.title}" for failure in FAILURES)
        usage = "usage: shoal-exporter explain FAILURE"
        text = f"{usage}\n\nFAILURE is a name or a number of these, or the name of an alert:\n{names}\n"
        (sys.stderr if not arguments else sys.stdout).write(text)
        return int(Status.UNKNOWN if not arguments else Status.OK)
    try:
        sys.stdout.write(_pages(arguments[0]))
        sys.stdout.flush()
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    return 0


def _pages(topic: str) -> str:
    pages = runbooks.names()
    if topic in pages:
        return runbooks.page(topic)
    wanted = next((failure for failure in FAILURES if topic in (failure.name, str(failure.number))), None)
    if wanted is None:
        known = [failure.name for failure in FAILURES]
        near = closest(topic, known + pages) or f"; there are {', '.join(known)}, and the names of alerts"
        raise UsageError(f"there is no failure {topic!r}{near}")
    return "\n".join(runbooks.page(alert) for alert in wanted.alerts)


def _interval(text: str) -> float:
    try:
        seconds = float(text)
    except ValueError:
        seconds = 0.0
    if not 1 <= seconds <= _LONGEST_INTERVAL:
        raise UsageError(f"--interval is {text!r}, which is not a number of seconds from 1 to {_LONGEST_INTERVAL:.0f}")
    return seconds


def _addresses(sources: Sequence[str]) -> list[str]:
    """Return the addresses, those in files included; blank lines and what follows # are passed over."""
    found: list[str] = []
    for source in sources:
        if "://" in source or not os.path.isfile(source):
            found.append(source)
            continue
        try:
            lines = Path(source).read_text(encoding="utf-8").splitlines()
        except (OSError, UnicodeDecodeError) as error:
            raise UsageError(
                f"--from {source} cannot be read as text: {getattr(error, 'strerror', 'no UTF-8')}"
            ) from None
        named = [line.partition("#")[0].strip() for line in lines]
        if not any(named):
            raise UsageError(f"--from {source} has no address in it")
        found += filter(None, named)
    return list(dict.fromkeys(found))


def _remote(address: str, options: argparse.Namespace) -> Remote:
    password = ""
    if options.user:
        password = os.environ.get(PASSWORD_VARIABLE, "")
        if not password and sys.stdin.isatty():
            password = os.environ[PASSWORD_VARIABLE] = getpass.getpass(f"Password of {options.user}: ")
    try:
        tls = ssl.create_default_context(cafile=options.cacert or None)
        if options.cert:
            tls.load_cert_chain(options.cert, options.key or None)
    except (OSError, ssl.SSLError) as error:
        named = ", ".join(filter(None, (options.cacert, options.cert, options.key)))
        raise UsageError(f"{named} cannot be used for TLS: {error.strerror or error}") from None
    if options.insecure:
        tls.check_hostname = False
        tls.verify_mode = ssl.CERT_NONE
    return Remote(address, options.user, password, tls)


def _check_local(settings: Settings, interval: float, options: argparse.Namespace) -> Status:
    node = os.uname().nodename
    before: Snapshot | None = None
    status = Status.UNKNOWN

    def take(snapshot: Snapshot) -> bool:
        nonlocal before, status
        if before is not None:
            status = _print({node: Pair(before, snapshot)}, {}, options)
            if not options.watch:
                return False
        before = snapshot
        return True

    def wait() -> float:
        _say_progress(f"reading twice, {interval:.0f} s apart ...")
        return interval

    asyncio.run(local(settings, wait, take))
    return status


def _check_remotes(remotes: Sequence[Remote], interval: float, options: argparse.Namespace) -> Status:
    first, failed = _scrape_all(remotes)
    while True:
        status = Status.UNKNOWN
        if first:
            _say_progress(f"scraping twice, {interval:.0f} s apart ...")
            time.sleep(interval)
        second, gone = _scrape_all([one for one in remotes if one.address in first])
        status = _print({name: Pair(first[name], after) for name, after in second.items()}, failed | gone, options)
        if not options.watch:
            return status
        if not first:
            time.sleep(interval)
        # One that did not answer is asked again.
        again, failed = _scrape_all([one for one in remotes if one.address not in second])
        first = second | again


def _scrape_all(remotes: Sequence[Remote]) -> tuple[dict[str, Snapshot], dict[str, str]]:
    """Scrape side by side; return {address: snapshot} and {address: why not}."""
    found: dict[str, Snapshot] = {}
    failed: dict[str, str] = {}

    def one(remote: Remote) -> None:
        try:
            found[remote.address] = remote.scrape()
        except SourceError as error:
            failed[remote.address] = str(error)

    if remotes:
        with ThreadPoolExecutor(min(len(remotes), _MOST_AT_ONCE)) as threads:
            list(threads.map(one, remotes))
    order = [remote.address for remote in remotes if remote.address in found]
    return {address: found[address] for address in order}, failed


def _print(pairs: dict[str, Pair], failed: dict[str, str], options: argparse.Namespace) -> Status:
    _say_progress("")
    verdicts: dict[str, Sequence[Verdict]] = {node: judge(pair) for node, pair in pairs.items()}
    if options.json:
        document: dict[str, Any] = {
            "version": JSON_VERSION,
            "nodes": [as_json(node, verdicts[node], seconds=pair.seconds) for node, pair in pairs.items()],
            "failed": failed,
        }
        text = json.dumps(document, indent=None if options.watch else 2) + "\n"
    else:
        text = _text(pairs, verdicts, options)
    sys.stdout.write(text)
    sys.stdout.flush()
    for sentence in failed.values() if not options.json else ():
        sys.stderr.write(f"shoal-exporter: {sentence}.\n")
    statuses = [overall(one) for one in verdicts.values()] + [Status.UNKNOWN] * bool(failed)
    known = [status for status in statuses if status is not Status.UNKNOWN]
    # A node that is ill is said before one that did not answer.
    return max(known, default=Status.UNKNOWN) if not failed or any(known) else Status.UNKNOWN


def _text(pairs: dict[str, Pair], verdicts: dict[str, Sequence[Verdict]], options: argparse.Namespace) -> str:
    terminal = sys.stdout.isatty()
    colour = terminal and not os.environ.get("NO_COLOR")
    width = shutil.get_terminal_size().columns
    show: Callable[[str], str] = lambda node: render(  # noqa: E731  (three lines below is all of its use)
        node, verdicts[node], seconds=pairs[node].seconds, width=width, colour=colour
    )
    clear = "\033[H\033[2J" if options.watch and terminal else ""
    parts = [show(node) for node in pairs]
    if len(pairs) > 1:
        parts.append(compare(dict(verdicts), width=width, colour=colour))
    return clear + "\n".join(parts)


def _say_progress(text: str) -> None:
    """Say on a terminal what is waited for, or take it back."""
    if sys.stderr.isatty():
        sys.stderr.write(f"\r\033[K{text}")
        sys.stderr.flush()
