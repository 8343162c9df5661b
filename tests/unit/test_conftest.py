"""The rules that all tests are under, tried on tests that break them."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

if TYPE_CHECKING:
    from collections.abc import Callable

CONFTEST = Path(__file__).parents[1] / "conftest.py"

NEEDS_ROOT = """
import os
import pytest

os.geteuid = lambda: 1000

@pytest.mark.root
def test_of_namespaces(): raise AssertionError("it ran")

def test_of_nothing(): pass
"""

BLOCKS = """
import pathlib, time

async def test_that_sleeps(): time.sleep(0.001)

async def test_that_reads(): pathlib.Path("/proc/stat").read_bytes()

async def test_that_does_not(): pass

def test_without_a_loop(): time.sleep(0.001)
"""


@pytest.fixture
def run_pytest(tmp_path: Path, clean_environment: dict[str, str]) -> Callable[..., tuple[int, str]]:
    """Return a function that runs a file of tests under this repository's conftest and returns status and output."""

    def run(content: str, **environment: str) -> tuple[int, str]:
        (tmp_path / "conftest.py").write_text(CONFTEST.read_text(encoding="utf-8"), encoding="utf-8")
        (tmp_path / "pytest.ini").write_text(
            "[pytest]\nasyncio_mode = auto\nasyncio_default_fixture_loop_scope = function\nmarkers = root: x\n",
            encoding="utf-8",
        )
        (tmp_path / "test_it.py").write_text(content, encoding="utf-8")
        inherited = {key: value for key, value in clean_environment.items() if key != "CI"}
        # That plugin wants a package that only its own tests need; pyproject.toml leaves it out for all others.
        without = ("-p", "no:cacheprovider", "-p", "no:cloudcoil")
        command = [sys.executable, "-m", "pytest", "-rs", *without, str(tmp_path)]
        ended = subprocess.run(
            command, env=inherited | environment, capture_output=True, text=True, timeout=60, check=False
        )
        return ended.returncode, ended.stdout

    return run


def test_what_needs_root_is_skipped_with_its_reason(run_pytest: Callable[..., tuple[int, str]]) -> None:
    """Elsewhere than in CI that is all."""
    status, output = run_pytest(NEEDS_ROOT)
    assert status == 0
    assert "1 passed, 1 skipped" in output
    assert "needs root: for network namespaces and capabilities" in output


def test_a_skip_fails_in_ci(run_pytest: Callable[..., tuple[int, str]]) -> None:
    """Whatever skipped it; a sentence names the test."""
    status, output = run_pytest(NEEDS_ROOT, CI="true")
    assert status == 1
    assert "1 passed, 1 skipped" in output
    assert "Nothing may be skipped where CI is set, and this was: test_it.py::test_of_namespaces." in output


def test_a_skipped_module_fails_in_ci(run_pytest: Callable[..., tuple[int, str]]) -> None:
    """An optional import that is missing skips tests that were never counted."""
    content = 'import pytest\npytest.importorskip("no_such_module")\ndef test_of_it(): pass\n'
    status, output = run_pytest(content, CI="1")
    assert status == 1
    assert "this was: test_it.py." in output


def test_a_blocked_loop_fails(run_pytest: Callable[..., tuple[int, str]]) -> None:
    """Sleeping and reading a file, inside the loop and only there."""
    status, output = run_pytest(BLOCKS)
    assert status == 1
    assert "2 failed, 2 passed" in output
    assert "Blocking call to time.sleep" in output
    assert "Blocking call to io.BufferedReader.read" in output
