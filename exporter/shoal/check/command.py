"""The subcommands `check` and `explain`: arguments, waiting, printing, and what they exit with."""

from __future__ import annotations

import asyncio
import getpass
import io
import json
import os
import re
import shutil
import ssl
import sys
import threading
import time
from collections import deque
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any

from shoal.check import runbooks
from shoal.check.alerts import Status
from shoal.check.failures import FAILURES
from shoal.check.report import JSON_VERSION, as_json, compare, judge, overall, render
from shoal.check.snapshot import Pair, Snapshot
from shoal.check.sources import PASSWORD_VARIABLE, Remote, SourceError, local
from shoal.settings import closest

if TYPE_CHECKING:
    import argparse
    from collections.abc import Iterable, Sequence

    from shoal.check.report import Verdict
    from shoal.settings import Settings

__all__ = ["DEFAULTS", "UsageError", "add_arguments", "check", "explain"]

DEFAULTS = {"netns.enter": "true", "redis.discover": "true"}
"""What a person who looks at a node wants looked at; where it is not allowed, the report says so."""

_LONGEST_INTERVAL = 3600.0
_MOST_AT_ONCE = 16


class UsageError(Exception):
    """What was asked for cannot be done so. `str()` is a sentence."""


class _ReaderGoneError(Exception):
    """Whoever read this has seen enough."""


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
    run = _Run(options)
    try:
        if options.sources:
            addresses, access = _addresses(options.sources), _access(options)
            run.remotes([Remote(address, *access) for address in addresses], interval)
        elif settings:
            run.local(settings, interval)
    except (KeyboardInterrupt, EOFError):
        # Ctrl-C or Ctrl-D; after --watch the status is that of the last look.
        _say_progress("")
    except _ReaderGoneError:
        pass
    return int(run.status)


def explain(arguments: Sequence[str]) -> int:
    """Print the runbooks of a failure, by its name or number, or of an alert, and return 0. Raises `UsageError`."""
    if len(arguments) != 1 or arguments[0] in ("-h", "--help"):
        names = "\n".join(f"  {failure.number:>2}  {failure.name:<16} {failure.title}" for failure in FAILURES)
        usage = "usage: shoal-exporter explain FAILURE"
        text = f"{usage}\n\nFAILURE is a name or a number of these, or the name of an alert:\n{names}\n"
        (sys.stderr.write if not arguments else _write)(text)
        return int(Status.UNKNOWN if not arguments else Status.OK)
    with suppress(_ReaderGoneError):
        _write(_pages(arguments[0]))
    return 0


def _pages(topic: str) -> str:
    pages = runbooks.names()
    if topic in pages:
        return runbooks.page(topic)
    # Labels and files of the lab have an underscore where these names have a dash.
    name = topic.replace("_", "-")
    wanted = next((one for one in FAILURES if name in (one.name, one.lab, str(one.number))), None)
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
            lines = Path(source).read_text(encoding="utf-8-sig").splitlines()
        except (OSError, UnicodeDecodeError) as error:
            raise UsageError(
                f"--from {source} cannot be read as text: {getattr(error, 'strerror', 'no UTF-8')}"
            ) from None
        named = [line.partition("#")[0].strip() for line in lines]
        if not any(named):
            raise UsageError(f"--from {source} has no address in it")
        found += filter(None, named)
    if any(re.match(r"(?:\w+://)?[^/?#]*@", address) for address in found):
        raise UsageError(f"an address is without a name and a password: {_PASSWORD}")
    return list(dict.fromkeys(found))


_PASSWORD = f"everyone on this machine can read it there; the password is in {PASSWORD_VARIABLE} or asked for"


def _access(options: argparse.Namespace) -> tuple[str, str, ssl.SSLContext]:
    """Return what all exporters are asked with: name, password and TLS."""
    if ":" in options.user:
        raise UsageError(f"--user is the name alone: {_PASSWORD}")
    password = ""
    if options.user:
        password = os.environ.get(PASSWORD_VARIABLE, "")
        if not password and sys.stdin.isatty():
            password = getpass.getpass(f"Password of {options.user}: ")
    if options.key and not options.cert:
        raise UsageError("--key is the key of a certificate, which --cert names")
    try:
        tls = ssl.create_default_context(cafile=options.cacert or None)
        if options.cert:
            tls.load_cert_chain(options.cert, options.key or None)
    except OSError as error:
        named = ", ".join(filter(None, (options.cacert, options.cert, options.key)))
        said = error.reason if isinstance(error, ssl.SSLError) else error.strerror
        raise UsageError(f"{named} cannot be used for TLS: {said or 'there is no certificate in it'}") from None
    # Python 3.13 would refuse certificates that curl, and Prometheus, take.
    tls.verify_flags &= ~ssl.VERIFY_X509_STRICT
    if options.insecure:
        tls.check_hostname = False
        tls.verify_mode = ssl.CERT_NONE
    return options.user, password, tls


class _Run:
    """One run of `check`: asks, waits and prints, and remembers how bad it was."""

    def __init__(self, options: argparse.Namespace) -> None:
        self.status = Status.UNKNOWN
        self._options = options

    def local(self, settings: Settings, interval: float) -> None:
        """Read this node's own kernel."""
        node = os.uname().nodename
        before: Snapshot | None = None

        def take(snapshot: Snapshot) -> bool:
            nonlocal before
            if before is not None:
                self._print({node: Pair(before, snapshot)}, {})
                if not self._options.watch:
                    return False
            before = snapshot
            return True

        def wait() -> float:
            _say_progress(f"reading twice, {interval:.0f} s apart ...")
            return interval

        _say_progress("reading ...")
        asyncio.run(local(settings, wait, take))

    def remotes(self, remotes: Sequence[Remote], interval: float) -> None:
        """Scrape running exporters."""
        _say_progress("scraping ...")
        first, failed = _scrape_all(remotes)
        while True:
            if first:
                _say_progress(f"scraping twice, {interval:.0f} s apart ...")
                time.sleep(interval)
            second, gone = _scrape_all([one for one in remotes if one.address in first])
            pairs = {name: Pair(first[name], after) for name, after in second.items()}
            self._print(pairs, failed | gone)
            if not self._options.watch:
                return
            if not first:
                time.sleep(interval)
            # One that did not answer is asked again.
            again, failed = _scrape_all([one for one in remotes if one.address not in second])
            first = second | again

    def _print(self, pairs: dict[str, Pair], failed: dict[str, str]) -> None:
        verdicts: dict[str, Sequence[Verdict]] = {node: judge(pair) for node, pair in pairs.items()}
        # Before it is written: it stands, whether it is read to its end or not.
        self.status = _status(verdicts.values(), failed)
        _report(pairs, verdicts, failed, self._options)


def _scrape_all(remotes: Sequence[Remote]) -> tuple[dict[str, Snapshot], dict[str, str]]:
    """Scrape side by side; return {address: snapshot} and {address: why not}."""
    found: dict[str, Snapshot] = {}
    failed: dict[str, str] = {}

    left = deque(remotes)

    def work() -> None:
        while left:
            try:
                remote = left.popleft()
            except IndexError:
                return
            try:
                found[remote.address] = remote.scrape()
            except SourceError as error:
                failed[remote.address] = str(error)

    # Daemons, so that Ctrl-C need not wait for nodes that do not answer.
    workers = [threading.Thread(target=work, daemon=True) for _ in range(min(len(remotes), _MOST_AT_ONCE))]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()
    order = [remote.address for remote in remotes if remote.address in found]
    return {address: found[address] for address in order}, failed


def _status(verdicts: Iterable[Sequence[Verdict]], failed: dict[str, str]) -> Status:
    """Return the worst. A node that is ill counts before one that did not answer, and that before one that is well."""
    statuses = [overall(one) for one in verdicts]
    ill = max((one for one in statuses if one is not Status.UNKNOWN), default=Status.UNKNOWN)
    return Status.UNKNOWN if failed and ill is Status.OK else ill


def _report(
    pairs: dict[str, Pair], verdicts: dict[str, Sequence[Verdict]], failed: dict[str, str], options: argparse.Namespace
) -> None:
    _say_progress("")
    if options.json:
        document: dict[str, Any] = {
            "version": JSON_VERSION,
            "nodes": [as_json(node, verdicts[node], seconds=pair.seconds) for node, pair in pairs.items()],
            "failed": failed,
        }
        _write(json.dumps(document, indent=None if options.watch else 2) + "\n")
        return
    _write(_text(pairs, verdicts, options))
    for sentence in failed.values():
        sys.stderr.write(f"shoal-exporter: {sentence}.\n")


def _text(pairs: dict[str, Pair], verdicts: dict[str, Sequence[Verdict]], options: argparse.Namespace) -> str:
    terminal = sys.stdout.isatty()
    colour = terminal and not os.environ.get("NO_COLOR")
    width = shutil.get_terminal_size().columns
    clear = "\033[H\033[2J" if options.watch and terminal else ""
    parts = [
        render(node, verdicts[node], seconds=pair.seconds, width=width, colour=colour) for node, pair in pairs.items()
    ]
    if len(pairs) > 1:
        parts.append(compare(dict(verdicts), width=width, colour=colour))
    return clear + "\n".join(parts)


def _write(text: str) -> None:
    """Print it. Raises `_ReaderGoneError` if nobody reads any more, `UsageError` if it cannot be written."""
    if isinstance(sys.stdout, io.TextIOWrapper):
        # A name may have what this terminal's characters have not.
        sys.stdout.reconfigure(errors="backslashreplace")
    try:
        sys.stdout.write(text)
        sys.stdout.flush()
    except OSError as error:
        # Nothing may complain when the interpreter flushes.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        if isinstance(error, BrokenPipeError):
            raise _ReaderGoneError from None
        raise UsageError(f"the answer cannot be written: {error.strerror}") from None


def _say_progress(text: str) -> None:
    """Say on a terminal what is waited for, or take it back."""
    if sys.stderr.isatty():
        sys.stderr.write(f"\r\033[K{text}")
        sys.stderr.flush()
