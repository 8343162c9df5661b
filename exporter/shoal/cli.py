"""The command `shoal-exporter`: arguments to settings, then the server until it is told to stop."""

from __future__ import annotations

import argparse
import asyncio
import ctypes
import gc
import logging
import os
import sys
import threading
import time
from contextlib import contextmanager, suppress
from functools import partial
from typing import TYPE_CHECKING, NoReturn

from shoal import __version__
from shoal.collectors import load
from shoal.logs import configure
from shoal.settings import OPTIONS, Settings, SettingsError, closest, resolve

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

__all__ = ["main"]

logger = logging.getLogger(__name__)

# malloc.h of glibc
_M_ARENA_MAX = -8

# Of collections of the middle generation before a full one: years.
_NO_FULL_COLLECTION = 1_000_000

# The variables that tell OpenSSL where certificate authorities are.
_AUTHORITIES = ("SSL_CERT_FILE", "SSL_CERT_DIR")

# Seconds that idle threads have to notice the end.
_THREADS_END = 0.3

_DESCRIPTION = """\
Prometheus exporter for the failures of Linux and Kubernetes nodes that ordinary
monitoring does not show: listen-queue overflows, memory.high throttling, kills
below the limit, full conntrack tables and others. It only reads: no setting is
written, no entry deleted, no accounting switched on.
"""

_EPILOG = """\
Every option is also a variable (--web.listen-address is SHOAL_WEB_LISTEN_ADDRESS)
and a key of the configuration file (web.listen-address). A flag wins over the
variable, the variable over the file. --no-collector.NAME is collector.NAME false.

Look at http://127.0.0.1:7462/ to see which signals this node gives, and why
others are absent.

    shoal-exporter check     what is wrong with this node, now (check --help)
    shoal-exporter explain   the runbook of a failure or an alert
"""

_CHECK = """\
Goes through the fourteen failures and says which of them this node has now, whom
it hits, what proves it and what to do first. Reads twice and compares.
"""

_CHECK_EPILOG = """\
Where this node's own kernel is read, the options of the exporter count too (see
shoal-exporter --help); --netns.enter and --redis.discover are true here unless
they are given.
Exit status: 0 nothing is wrong, 1 a warning, 2 critical, 3 nothing can be told or
a node did not answer.
"""


class _Parser(argparse.ArgumentParser):
    def parse(self, arguments: Sequence[str]) -> tuple[dict[str, str], argparse.Namespace]:
        """Return {key: text} of the exporter's options, whose keys have a dot, and everything that was parsed."""
        parsed, unknown = self.parse_known_args(arguments)
        if unknown:
            flag = unknown[0].partition("=")[0]
            self.error(f"{flag} is no option{closest(flag, list(self._option_string_actions))}")
        flags = {key: text for key, text in vars(parsed).items() if "." in key}
        return {key: ",".join(text) if isinstance(text, list) else text for key, text in flags.items()}, parsed

    def error(self, message: str) -> NoReturn:
        """Say what was wrong in one sentence and where to look; the usage of every flag would bury it."""
        message = message.removeprefix("argument ").replace(": ignored explicit argument", " takes no value, got")
        _fail(f"{_stop(message)} See {self.prog} --help.", 3 if self.prog.endswith(" check") else 2)

    def format_help(self) -> str:
        """Describe the collectors by the first line of their own files, which are imported only for this."""
        for action in self._actions:
            if action.option_strings[0].startswith("--collector.") and action.help is not argparse.SUPPRESS:
                module = sys.modules[load(action.dest.removeprefix("collector.")).__module__]
                line = str(module.__doc__).partition("\n")[0].partition(": ")[2]
                action.help = line[:1].upper() + line[1:].replace("%", "%%")
        return super().format_help()


def _stop(sentence: str) -> str:
    return sentence if sentence.endswith("?") else f"{sentence}."


def _fail(message: str, status: int) -> NoReturn:
    sys.stderr.write(f"shoal-exporter: {message}\n")
    raise SystemExit(status)


def _parser(prog: str = "shoal-exporter", description: str = _DESCRIPTION, epilog: str = _EPILOG) -> _Parser:
    parser = _Parser(
        prog=prog,
        description=description,
        epilog=epilog,
        allow_abbrev=False,
        formatter_class=partial(argparse.RawDescriptionHelpFormatter, max_help_position=34),
        argument_default=argparse.SUPPRESS,
        usage=f"{prog} [OPTION ...]",
    )
    parser.add_argument("--version", action="version", version=f"shoal-exporter {__version__}")
    return parser


def _add_options(parser: _Parser, *, shown: bool = True) -> _Parser:
    collectors = parser.add_argument_group("collectors, all on unless --no-collector.NAME switches one off")
    for option in OPTIONS:
        flag = f"--{option.key}"
        if option.key.startswith("collector."):
            # What stands for this help is found when it is asked for; see format_help.
            described = None if shown else argparse.SUPPRESS
            collectors.add_argument(flag, action="store_const", const="true", dest=option.key, help=described)
            collectors.add_argument(
                f"--no-{option.key}", action="store_const", const="false", dest=option.key, help=argparse.SUPPRESS
            )
        else:
            text = f"{option.help} Default: {option.default}" if option.default else option.help
            parser.add_argument(
                flag,
                action="append" if option.repeatable else "store",
                dest=option.key,
                metavar=option.metavar,
                help=text.replace("%", "%%") if shown else argparse.SUPPRESS,
            )
    return parser


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the exporter with these arguments (those of the process by default) and return its exit status.

    0 after it was told to stop, 1 when it could not serve, 2 when an argument or a setting is wrong.
    """
    arguments = sys.argv[1:] if arguments is None else list(arguments)
    if arguments[:1] in (["check"], ["explain"]):
        return _subcommand(arguments[0], arguments[1:])
    flags, _ = _add_options(_parser()).parse(arguments)
    try:
        settings = resolve(flags)
        configure(settings.log_level, settings.log_format)
        status = _run(settings)
    except SettingsError as error:
        _fail(_stop(str(error)), 2)
    _end_without_hanging_threads(status)
    return status


def _subcommand(name: str, arguments: Sequence[str]) -> int:
    """Run `check` or `explain`. A wrong argument is status 3, as monitoring plugins have it: 2 would say critical."""
    # Imported here: an exporter that serves needs nothing of it.
    from shoal.check import command  # noqa: PLC0415  (an exporter that runs needs none of it)

    try:
        if name == "explain":
            return command.explain(arguments)
        parser = _add_options(_parser("shoal-exporter check", _CHECK, _CHECK_EPILOG), shown=False)
        command.add_arguments(parser)
        flags, own = parser.parse(arguments)
        settings = None if own.sources else resolve(command.DEFAULTS | flags)
        configure("error", "logfmt")
        status = command.check(own, settings)
    except (SettingsError, command.UsageError) as error:
        _fail(_stop(str(error)), 3)
    except Exception as error:  # noqa: BLE001  (whoever was woken can do nothing with a traceback)
        _fail(f"this is a fault of {name} itself, please report it: {type(error).__name__}: {error}.", 3)
    _end_without_hanging_threads(status)
    return status


def _run(settings: Settings) -> int:
    # Nothing that is imported is garbage, and to look for it takes a twentieth of the time to start.
    gc.disable()
    # Imported here so that --help and a wrong argument answer without loading the web server.
    with _without_authorities():
        from shoal.listener import ListenError  # noqa: PLC0415  (`check` and `--help` serve nobody, and aiohttp takes long)
        from shoal.scrape import Scraper  # noqa: PLC0415  (see above)
        from shoal.server import serve  # noqa: PLC0415  (see above)

    # With a heap for each thread, as glibc has it by default, each keeps what it once needed: 2 MiB, seventeen times.
    # Other C libraries have one heap, and not this function.
    with suppress(AttributeError):
        ctypes.CDLL(None).mallopt(_M_ARENA_MAX, 1)
    # Worker threads parse while the loop answers; a shorter turn keeps the loop's wait under its 10 ms.
    sys.setswitchinterval(0.001)
    web_config = None
    if settings.web_config_file:
        # Imported here because most exporters run without, and the parser and bcrypt cost 3 MiB.
        from shoal.web_config import WebConfig  # noqa: PLC0415  (most exporters run without)

        web_config = WebConfig(settings.web_config_file)
    scraper = Scraper(settings.roots, {name: load(name)(settings) for name in settings.collectors})
    # A full garbage collection stops all threads, for 20 ms if it has to look at everything that was imported. What a
    # scrape leaves in cycles is young and found by the others; `exposition` has a full one made now and then.
    gc.collect()
    gc.freeze()
    gc.set_threshold(*gc.get_threshold()[:2], _NO_FULL_COLLECTION)
    gc.enable()
    try:
        asyncio.run(serve(settings.listen, scraper, web_config))
    except ListenError as error:
        _fail(_stop(str(error)), 1)
    except KeyboardInterrupt:
        pass
    return 0


@contextmanager
def _without_authorities() -> Iterator[None]:
    """Let OpenSSL find no certificate authorities while aiohttp is imported, which reads all of them twice.

    That takes a tenth of the time to start and 2 MiB, and is for a client that is not told whom to trust. None here is
    like that, and one that was would trust nobody.
    """
    before = {name: os.environ.get(name) for name in _AUTHORITIES}
    os.environ.update(dict.fromkeys(_AUTHORITIES, os.devnull))
    try:
        yield
    finally:
        for name, value in before.items():
            os.environ.pop(name)
            if value is not None:
                os.environ[name] = value


def _end_without_hanging_threads(status: int) -> None:
    """End the process here if a worker is stuck in the kernel: Python would wait for it for ever."""
    from shoal.scrape import WORKERS  # noqa: PLC0415  (loaded by now, if there are any)

    workers = [thread for thread in threading.enumerate() if thread.name.startswith(WORKERS)]
    until = time.monotonic() + _THREADS_END
    for thread in workers:
        thread.join(max(0.0, until - time.monotonic()))
    if any(thread.is_alive() for thread in workers):
        logger.warning("ended without waiting for threads that hang")
        logging.shutdown()
        os._exit(status)
