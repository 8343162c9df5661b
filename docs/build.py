"""Writes docs/metrics.md, the table of every metric, from the code that exports them: `make docs`."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from shoal import collectors, scrape, server, web_config

if TYPE_CHECKING:
    from collections.abc import Iterable

    from shoal.families import Metric

PAGE = Path(__file__).with_name("metrics.md")

HEAD = """\
# Every metric

Made from the code by `make docs`. What a kernel or a privilege does not give is missing from the output, never 0, and
`shoal_signal_available` has the reason. Tier 1 needs no capability, tier 2 CAP_NET_ADMIN and CAP_SYS_PTRACE, tier 3
CAP_SYS_ADMIN and `--netns.enter`. Labels that are empty are left out: a pod has no `unit`, a unit no `pod`. The
process's own `process_*` metrics are those of prometheus_client.
"""


def page() -> str:
    """Return the whole page as it should stand in the repository."""
    parts = [HEAD]
    for name in collectors.available_names():
        collector = collectors.load(name)
        parts.append(f"\n## {name}\n\n{_paragraphs(collector.__doc__ or '')}\n")
        parts.append(f"Signals: {', '.join(f'`{signal}`' for signal in collector.signals)}.\n")
        parts.append(_table(collector.metrics))
    parts.append("\n## The exporter itself\n")
    parts.append(
        _table((collectors.SIGNAL_AVAILABLE, *scrape.METRICS, *web_config.METRICS, server.REFUSED, server.BUILD_INFO))
    )
    return "".join(parts)


def _paragraphs(docstring: str) -> str:
    return "\n".join(line.strip() for line in docstring.strip().splitlines()) + "\n"


def _table(metrics: Iterable[Metric]) -> str:
    rows = [
        f"| `{metric.name}` | {metric.type} | {', '.join(metric.labels)} | {_cell(metric.help)} | "
        f"{_cell(metric.source)} | {metric.tier} |\n"
        for metric in metrics
    ]
    return "\n| name | type | labels | what it is | from | tier |\n|---|---|---|---|---|---|\n" + "".join(rows)


def _cell(text: str) -> str:
    return text.replace("|", r"\|").replace("<", "&lt;")


if __name__ == "__main__":
    PAGE.write_text(page(), encoding="utf-8")
