"""Makes rules/tests/healthy_hour_test.yaml: no alert of the pack fires on a machine that is busy and well.

    python -m tests.rules.build_hour            # `make rule-tests`: the alerts anew, the recorded series as they are
    python -m tests.rules.build_hour DIRECTORY  # the series too, from what record_hour.py has written there

A rule that is new needs no new recording: every series of the exporter is kept, whether a rule reads it today or not.
"""

from __future__ import annotations

import gzip
import sys
from collections import defaultdict
from itertools import dropwhile
from pathlib import Path
from typing import Final

from prometheus_client.parser import text_string_to_metric_families
from tests.rules.pack import HOUR, Sample, alerts, load

__all__ = ["INFORMED", "INTERVAL", "MINUTES", "compress", "refreshed", "render"]

INTERVAL: Final = 30
"""Seconds between two scrapes of the recording."""
MINUTES: Final = 60

INFORMED: Final = {"ShoalRedisLatencyMonitorOff": 1}
"""{alert of severity info: of how many things it is true on that machine}"""

_TARGET: Final = 'cluster="east",node="busy",job="shoal",instance="10.0.0.1:7462"'
_HEAD: Final = """\
# An hour of a machine that is busy and well, as Prometheus would have scraped it: nothing may fire.
#
# Made by tests/rules/build_hour.py, not by hand: `make rule-tests` after an alert is added, renamed or removed. The
# series are recorded from the exporter, all collectors on and in tier 3, under Debian's kernel {kernel} in a
# virtual machine with two processors; tests/rules/record_hour.py says what work that did and how to record another
# hour. Fractions are rounded to a ten-thousandth.
rule_files:
  - ../*.yaml

evaluation_interval: 30s

tests:
  - name: nothing fires in an hour of a machine that is busy and well
    interval: {interval}s
    input_series:
"""
_SAMPLES_MARK: Final = "    # Of all alerts at any moment of the hour, whatever their names.\n"


def number(value: float) -> str:
    """Write a value as promtool reads it."""
    rounded = round(value, 4)
    return str(int(rounded)) if rounded == int(rounded) else f"{rounded:.4f}".rstrip("0")


def compress(samples: list[Sample]) -> str:
    """Write samples in promtool's notation: runs of one value as `1x3`, of one step as `1+2x3` (four samples, both)."""
    words: list[str] = []
    place = 0
    while place < len(samples):
        value = samples[place]
        if value is None:
            end = place
            while end < len(samples) and samples[end] is None:
                end += 1
            # Prometheus marks a series that a scrape no longer has, so that it ends there and not five minutes later.
            missing = end - place - (1 if words else 0)
            words += ["stale"] if words else []
            words += [f"_x{missing}"] if missing else []
            place = end
            continue
        run = _run(samples, place)
        step = (samples[place + 1] or 0.0) - value if run else 0.0
        words.append(_word(value, step, run))
        place += run + 1
    return " ".join(words)


def _run(samples: list[Sample], place: int) -> int:
    """Return how many samples after this one go on by the same whole step, or are the same; 0 unless it is worth it."""
    first = samples[place]
    following = samples[place + 1] if place + 1 < len(samples) else None
    if first is None or following is None:
        return 0
    step = following - first
    if step and (step != int(step) or first != int(first)):
        return 0
    end = place + 1
    while end + 1 < len(samples) and samples[end + 1] == samples[end] + step:  # type: ignore[operator]
        end += 1
    run = end - place
    return run if run > 1 or not step else 0


def _word(value: float, step: float, run: int) -> str:
    if not run:
        return number(value)
    if not step:
        return f"{number(value)}x{run}"
    return f"{number(value)}{'+' if step > 0 else '-'}{number(abs(step))}x{run}"


def recorded(directory: Path) -> dict[str, list[Sample]]:
    """Return {series: samples} of the files that record_hour.py has written; a scrape that failed is an empty one."""
    texts = [gzip.decompress(file.read_bytes()).decode() for file in sorted(directory.glob("*.prom.gz"))]
    # The first ones may have come before the exporter was ready.
    texts = list(dropwhile(lambda text: not text, texts))
    series: dict[str, list[Sample]] = defaultdict(lambda: [None] * len(texts))
    for place, text in enumerate(texts):
        series[f"up{{{_TARGET}}}"][place] = float(bool(text))
        for family in text_string_to_metric_families(text):
            for sample in family.samples:
                if sample.name.startswith("shoal_"):
                    own = "".join(f',{name}="{value}"' for name, value in sample.labels.items())
                    series[f"{sample.name}{{{_TARGET}{own}}}"][place] = round(sample.value, 4)
    return dict(sorted(series.items()))


def render(head: str, series: dict[str, str]) -> str:
    """Return the file: its head, the series, and the alerts that the pack has now."""
    lines = [head]
    for name, values in series.items():
        lines.append(f"      - series: '{name}'\n        values: {values}\n")
    lines.append(_SAMPLES_MARK)
    lines.append("    promql_expr_test:\n")
    whole = f'count by (alertname) (count_over_time(ALERTS{{alertstate="firing"}}[{MINUTES + 5}m]))'
    lines.append(f"      - expr: {whole}\n        eval_time: {MINUTES}m\n")
    informed = {name: times for name, times in INFORMED.items() if name in alerts()}
    lines.append("        exp_samples:\n" if informed else "        exp_samples: []\n")
    for name, times in sorted(informed.items()):
        lines.append(f"          - labels: '{{alertname=\"{name}\"}}'\n            value: {times}\n")
    lines.append("    alert_rule_test:\n")
    lines += [
        f"      - eval_time: {MINUTES}m\n        alertname: {name}\n        exp_alerts: []\n"
        for name in sorted(alerts().keys() - informed.keys())
    ]
    return "".join(lines)


def refreshed() -> str:
    """Return the file with the series that it has and the alerts that there are now."""
    head, mark, _ = HOUR.read_text(encoding="utf-8").partition("    input_series:\n")
    series = {one["series"]: one["values"] for one in load(HOUR)["tests"][0]["input_series"]}
    return render(head + mark, series)


def main(arguments: list[str]) -> None:
    """Write the file. Exits with a sentence if there is nothing to make it of, or a declared alert is not info."""
    known = {name: alert["labels"]["severity"] for name, alert in alerts().items()}
    if wrong := sorted(name for name in INFORMED if known.get(name, "info") != "info"):
        sys.exit(f"build_hour.py: {', '.join(wrong)} may not fire on a healthy machine, being more than info")
    if arguments:
        directory = Path(arguments[0])
        found = recorded(directory)
        if not found:
            sys.exit(f"build_hour.py: {directory} has no recording (files named 000.prom.gz and so on)")
        kernel = (directory / "KERNEL").read_text(encoding="utf-8").strip()
        head = _HEAD.format(kernel=kernel, interval=INTERVAL)
        text = render(head, {name: compress(samples) for name, samples in found.items()})
    elif HOUR.exists():
        text = refreshed()
    else:
        sys.exit(f"build_hour.py: there is no {HOUR}; give the directory of a recording")
    HOUR.write_text(text, encoding="utf-8")


if __name__ == "__main__":
    main(sys.argv[1:])
