"""A real Prometheus that holds what was never scraped: series written as blocks, and what the rules make of them.

The rules are evaluated over the whole time with range queries, layer by layer, each layer being stored before the next
one asks for it; `for` is applied to the alerts. So the dashboards see recorded series and ALERTS as on any server.
"""

from __future__ import annotations

import contextlib
import socket
import subprocess
import time
import urllib.request
from typing import TYPE_CHECKING, Any, Final

from grafana.reader import Prometheus, Series
from tests.grafana.sick import STEP
from tests.rules.pack import FILES, alerts, recorded, rules, selectors

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator
    from pathlib import Path

    from tests.grafana.sick import Sample

__all__ = ["END", "serve", "serve_recorded", "write"]

END: Final = 1_790_000_040 - 1_790_000_040 % STEP
"""The moment of the last sample."""


def write(samples: Iterable[Sample], step: int = STEP) -> str:
    """Write series as OpenMetrics, a sample each so many seconds, the last of them at END."""
    lines: list[str] = []
    for name, labels, values in samples:
        head = name + _labels(labels)
        start = END - step * (len(values) - 1)
        lines += [f"{head} {value!r} {start + step * place}" for place, value in enumerate(values) if value == value]  # noqa: PLR0124  (none there)
    return "\n".join([*lines, "# EOF", ""])


@contextlib.contextmanager
def serve(
    directory: Path,
    samples: Iterable[Sample],
    seconds: int,
    *,
    step: int = STEP,
    waits: dict[str, int] | None = None,
) -> Iterator[Prometheus]:
    """Run a Prometheus with these series and all that the rules make of them.

    `step` is between two samples of a series, and between two evaluations; `waits` is {node: what every alert's `for`
    is there}, if it is not as in the rules. All are in seconds.
    """
    _store(directory, write(samples, step))
    for layer in _layers():
        with _running(directory, step) as server:
            text = "\n".join([*_evaluated(server, layer, seconds, step, waits or {}), "# EOF", ""])
        _store(directory, text)
    with _running(directory, step) as server:
        yield server


def _labels(labels: dict[str, str]) -> str:
    quoted = (f'{name}="{value}"' for name, value in labels.items() if value and name != "__name__")
    return "{" + ",".join(quoted) + "}"


@contextlib.contextmanager
def serve_recorded(directory: Path, samples: Iterable[Sample]) -> Iterator[Prometheus]:
    """Run a Prometheus with these series as they are, what rules would have made among them."""
    _store(directory, write(samples))
    with _running(directory) as server:
        yield server


def _store(directory: Path, text: str) -> None:
    (directory / "prometheus.yml").write_text("global: {}\n", encoding="utf-8")
    source = directory / "series.txt"
    source.write_text(text, encoding="utf-8")
    done = subprocess.run(
        ["promtool", "tsdb", "create-blocks-from", "openmetrics", "--quiet", str(source), str(directory / "data")],
        capture_output=True,
        text=True,
        check=False,
    )
    assert not done.returncode, done.stderr[-2000:]


@contextlib.contextmanager
def _running(directory: Path, step: int = STEP) -> Iterator[Prometheus]:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    with (directory / "log").open("ab") as log:
        process = subprocess.Popen(
            [
                "prometheus",
                f"--config.file={directory / 'prometheus.yml'}",
                f"--storage.tsdb.path={directory / 'data'}",
                "--storage.tsdb.retention.time=100y",
                # A series that ends does so at once where it was scraped; the mark of that cannot be stored.
                f"--query.lookback-delta={60 if step < STEP else 300}s",
                f"--web.listen-address=127.0.0.1:{port}",
            ],
            stdout=log,
            stderr=log,
        )
    try:
        url = f"http://127.0.0.1:{port}"
        _wait(process, url)
        yield Prometheus(url)
    finally:
        process.terminate()
        process.wait(30)


def _wait(process: subprocess.Popen[bytes], url: str) -> None:
    deadline = time.monotonic() + 60
    while time.monotonic() < deadline:
        assert process.poll() is None, "Prometheus ended; its log is beside its data"
        with contextlib.suppress(OSError), urllib.request.urlopen(f"{url}/-/ready", timeout=5):  # noqa: S310  (its own)
            return
        time.sleep(0.1)
    raise AssertionError("Prometheus did not become ready")


def _layers() -> list[list[dict[str, Any]]]:
    """Return the rules in layers, each of which needs only what is stored by the layers before it."""
    depths: dict[str, int] = {}

    def depth(name: str) -> int:
        if name == "ALERTS":
            return max(1 + of(alert["expr"]) for alert in alerts().values())
        if name not in recorded():
            return -1
        if name not in depths:
            depths[name] = of(recorded()[name])
        return depths[name]

    def of(expression: str) -> int:
        return max((1 + depth(str(selector.name)) for selector in selectors(expression)), default=0)

    layers: dict[int, list[dict[str, Any]]] = {}
    for rule in (rule for file in FILES for rule in rules(file)):
        layers.setdefault(of(rule["expr"]) if "record" in rule else depth("ALERTS"), []).append(rule)
    return [layers[place] for place in sorted(layers)]


def _evaluated(
    server: Prometheus, layer: list[dict[str, Any]], seconds: int, step: int, waits: dict[str, int]
) -> Iterator[str]:
    for rule in layer:
        for series in server.range(rule["expr"], END - seconds, END, step):
            labels = {**series.labels, **rule.get("labels", {})}
            points = series.points
            name = rule.get("record", "ALERTS")
            if "alert" in rule:
                labels |= {"alertname": rule["alert"], "alertstate": "firing"}
                points = _firing(series, waits.get(labels.get("node", ""), _seconds(rule["for"])), step)
            yield from (f"{name}{_labels(labels)} {value!r} {at:.0f}" for at, value in points)


def _seconds(duration: str) -> int:
    return int(duration[:-1]) * {"s": 1, "m": 60, "h": 3600}[duration[-1]]


def _firing(series: Series, wait: int, step: int) -> list[tuple[float, float]]:
    """Return when an alert fires that is true at these points."""
    firing, since, last = [], 0.0, 0.0
    for at, _ in series.points:
        since = at if at - last > step else since
        last = at
        if at - since >= wait:
            firing.append((at, 1.0))
    return firing
