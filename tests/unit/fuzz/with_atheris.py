"""Fuzzes one parser with libFuzzer, which looks for input that reaches new lines of it. By hand, as it takes its time.

    python3.11 -m venv /tmp/atheris && /tmp/atheris/bin/pip install atheris
    PYTHONPATH=.:exporter:.venv/lib/python3.11/site-packages /tmp/atheris/bin/python -m tests.unit.fuzz.with_atheris \
        shoal.kernel.mounts.parse_mountinfo -max_total_time=3600

atheris is not in the lock: it has wheels for few versions of Python. What it finds becomes a case of a unit test.
"""

from __future__ import annotations

import contextlib
import math
import os
import sys
import tempfile

import atheris  # type: ignore[import-untyped]  # see above

with atheris.instrument_imports(include=["shoal"]):
    from tests.unit.fuzz.parsers import PARSERS

from tests.unit.fuzz.test_fuzz import LARGEST, numbers


def main() -> None:
    """Run until the time is over or something is found, which libFuzzer then writes into a file."""
    _, name, *options = sys.argv
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
