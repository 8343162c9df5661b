"""Fuzzes parsers with libFuzzer, which looks for input that reaches new lines of them. By hand, as it takes its time.

    python3.11 -m venv /tmp/atheris && /tmp/atheris/bin/pip install atheris
    PYTHONPATH=.:exporter:.venv/lib/python3.11/site-packages /tmp/atheris/bin/python -m tests.unit.fuzz.with_atheris \
        shoal.kernel.mounts.parse_mountinfo -max_total_time=3600

With `all` for a name it is one after the other, so long for each, and a line for each says how much was tried, and
which input was the last to reach a line that none had reached before: how much longer is worth the while.
atheris is not in the lock: it has wheels for few versions of Python. What it finds becomes a case of a unit test.
"""

from __future__ import annotations

import contextlib
import math
import os
import re
import resource
import subprocess
import sys
import tempfile

import atheris  # type: ignore[import-untyped]  # see above

with atheris.instrument_imports(include=["shoal"]):
    from tests.unit.fuzz.parsers import PARSERS

from tests.unit.fuzz.test_fuzz import LARGEST, numbers


def in_a_process(name: str, options: list[str]) -> None:
    """Fuzz one parser in a process of its own, which libFuzzer ends, and say how much it tried and what it found."""
    command = [sys.executable, "-m", "tests.unit.fuzz.with_atheris", name, *options, "-print_final_stats=1"]
    before = resource.getrusage(resource.RUSAGE_CHILDREN).ru_utime
    done = subprocess.run(command, capture_output=True, text=True, errors="replace", check=False)
    spent = resource.getrusage(resource.RUSAGE_CHILDREN).ru_utime - before
    tried = re.findall(r"number_of_executed_units: +(\d+)", done.stderr)
    last, most = "0", 0
    for number, covered in re.findall(r"^#(\d+)\t\w+ +cov: (\d+)", done.stderr, re.MULTILINE):
        if int(covered) > most:
            last, most = number, int(covered)
    count = tried[-1] if tried else "none"
    sys.stdout.write(f"{name}: {count} tried in {spent:.0f} s of CPU, number {last} reached the last new line\n")
    if done.returncode:
        sys.stdout.write("".join(done.stderr.splitlines(keepends=True)[-60:]))
    sys.stdout.flush()


def main() -> None:
    """Run until the time is over or something is found, which libFuzzer then writes into a file."""
    _, name, *options = sys.argv
    if name == "all":
        for one in PARSERS:
            in_a_process(one, options)
        return
    parser = PARSERS[name]

    def try_one(data: bytes) -> None:
        with contextlib.suppress(*parser.errors):
            found = parser.parse(data)
            if not parser.sound(found) or not all(math.isfinite(one) and abs(one) < LARGEST for one in numbers(found)):
                raise RuntimeError(f"{found!r} is wrong")

    with tempfile.TemporaryDirectory() as corpus:
        for number, seed in enumerate(parser.seeds):
            with open(os.path.join(corpus, str(number)), "wb") as file:
                file.write(seed)
        atheris.Setup([sys.argv[0], *options, corpus], try_one)
        atheris.Fuzz()


if __name__ == "__main__":
    main()
