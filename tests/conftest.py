"""What every test directory shares: tests that need root, no skips in CI, no blocking calls in an event loop."""

from __future__ import annotations

import inspect
import os
import signal
from typing import TYPE_CHECKING

import hypothesis
import pytest
from blockbuster import blockbuster_ctx

if TYPE_CHECKING:
    from collections.abc import Iterator

# A time limit for each example measures the neighbours of this machine; pytest-timeout ends what hangs.
hypothesis.settings.register_profile("shoal", deadline=None)
# make fuzz
hypothesis.settings.register_profile("fuzz", deadline=None, max_examples=10_000)
hypothesis.settings.load_profile("shoal")


# Whoever is started in the background by a shell ignores Ctrl-C, and so would every program that a test starts.
if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.default_int_handler)


def pytest_runtest_setup(item: pytest.Item) -> None:
    """Skip what needs root elsewhere, and say so."""
    if item.get_closest_marker("root") and os.geteuid() != 0:
        pytest.skip("needs root: for network namespaces and capabilities")


@pytest.hookimpl(trylast=True)
def pytest_sessionfinish(session: pytest.Session) -> None:
    """Fail in CI if anything was skipped: a skip there would hide that nothing was tested."""
    if _skipped(session.config):
        session.exitstatus = pytest.ExitCode.TESTS_FAILED


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter, config: pytest.Config) -> None:
    """Name what made `pytest_sessionfinish` fail."""
    if names := _skipped(config):
        sentence = f"Nothing may be skipped where CI is set, and this was: {', '.join(names)}."
        terminalreporter.write_line(sentence, red=True)


def _skipped(config: pytest.Config) -> list[str]:
    reporter = config.pluginmanager.get_plugin("terminalreporter")
    if not os.environ.get("CI") or reporter is None:
        return []
    return sorted({report.nodeid for report in reporter.stats.get("skipped", [])})


@pytest.fixture(autouse=True)
def _no_blocking_calls(request: pytest.FixtureRequest) -> Iterator[None]:
    """Raise in an async test when the thread of its event loop waits: for a file, a lock or the clock."""
    if not inspect.iscoroutinefunction(getattr(request, "function", None)):
        yield
        return
    with blockbuster_ctx() as guard:
        # What measures the coverage of threads takes a lock of its own wherever it is called from.
        guard.functions["threading.Lock.acquire"].can_block_in("coverage/collector.py", "lock_data")
        yield
