"""What the rule pack costs a Prometheus that sees a thousand nodes: `python -m tests.bench.rules`.

A node is the recorded one of rules/tests/healthy_hour_test.yaml, its pods repeated until it has thirty, and it runs on
as it did on average in that hour. One node in fifty has a full connection tracking table, one pod in a hundred is
throttled at memory.high. Each target stands for many nodes, so that a thousand need no thousand servers. A real
Prometheus scrapes them with the series that the pack reads, loads the whole pack, and says how long each group took;
then it evaluates every rule once more, alone, for what that takes of a processor, whatever else the machine does.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import signal
import subprocess
import sys
import tempfile
import threading
import time
import urllib.parse
import urllib.request
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from statistics import median
from typing import TYPE_CHECKING, Any, Final, NamedTuple

import yaml
from tests.bench.target import machine
from tests.rules.pack import FILES, HOUR, RULES, Series, expressions, load, raw_metrics

if TYPE_CHECKING:
    from collections.abc import Iterator

INTERVAL: Final = 30
"""Seconds between two scrapes and two evaluations, as in the example configuration."""
MOST_OF_INTERVAL: Final = 0.5
"""The part of its interval that the evaluation of a group may take of one processor."""
NODES_PER_TARGET: Final = 50

_HOST: Final = "127.0.0.1"
_SICK_NODE: Final = 50
_SICK_POD: Final = 100


class Line(NamedTuple):
    """One series of a node: the text before its value, what it starts with and how much it grows in a second."""

    text: str
    start: float
    growth: float


class Node(NamedTuple):
    """What every node has, and what each pod of the recorded one has, with {node}, {namespace} and {pod} to fill."""

    own: list[Line]
    pods: list[list[Line]]


def say(text: str) -> None:
    """Write to standard output, at once."""
    print(text, flush=True)  # noqa: T201  (a benchmark prints)


def template() -> Node:
    """Return the recorded node, with the metrics that the pack reads and nothing else."""
    read = {metric for expression in expressions().values() for metric in raw_metrics(expression)}
    own: list[Line] = []
    pods: dict[str, list[Line]] = {}
    for content in load(HOUR)["tests"][0]["input_series"]:
        series = Series.read(content)
        values = [value for value in series.samples if value is not None]
        if series.name not in read - {"up"} or not values:
            continue
        labels = series.labels | {"node": "{node}"}
        for scraped in ("job", "instance"):
            labels.pop(scraped)
        counted = series.name.endswith(("_total", "_bucket", "_sum", "_count"))
        growth = max(0.0, values[-1] - values[0]) / (len(series.samples) * INTERVAL) if counted else 0.0
        if pod := labels.get("pod"):
            labels |= {"namespace": "{namespace}", "pod": "{pod}"}
        pairs = ",".join(f'{name}="{value}"' for name, value in labels.items())
        (pods.setdefault(pod, []) if pod else own).append(Line(f"{series.name}|{pairs}", values[-1], growth))
    for proof in ("node_uname_info", 'kube_node_status_condition|condition="Ready",status="true"'):
        name, _, labels_text = proof.partition("|")
        own.append(Line(f'{name}|cluster="east",node="{{node}}",{labels_text}'.rstrip(","), 1.0, 0.0))
    return Node(own, list(pods.values()))


def lay_out(node: Node, number: int, pods: int) -> Iterator[Line]:
    """Yield the series of one node of the fleet."""
    name = f"node-{number:04}"
    for line in node.own:
        start, growth = line.start, line.growth
        if number % _SICK_NODE == 0 and line.text.startswith("shoal_conntrack_drop_total"):
            growth = 5.0
        if number % _SICK_NODE == 0 and line.text.startswith("shoal_conntrack_entries"):
            start = 1e9
        yield Line(_finish(line.text, node=name), start, growth)
    for place in range(pods):
        whole = number * pods + place
        for line in node.pods[place % len(node.pods)]:
            growth = line.growth
            if whole % _SICK_POD == 0 and line.text.startswith(("shoal_memory_events_total", "shoal_pressure_")):
                growth = 0.6
            filled = _finish(line.text, node=name, namespace=f"team-{place % 7}", pod=f"app-{place}-{whole:08x}")
            yield Line(filled, line.start, growth)


def _finish(text: str, **values: str) -> str:
    for name, value in values.items():
        text = text.replace(f"{{{name}}}", value)
    return f"{text.replace('|', '{', 1)}}} "


@contextmanager
def serving(targets: list[list[Line]]) -> Iterator[int]:
    """Serve /<number> for each target, its counters growing from now on; yield the port."""
    begun = time.monotonic()

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            passed = time.monotonic() - begun
            lines = targets[int(self.path.rpartition("/")[2])]
            body = "".join([f"{text}{start + growth * passed:.10g}\n" for text, start, growth in lines]).encode()
            self.send_response(200)
            self.send_header("Content-Type", "text/plain; version=0.0.4")
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            self.wfile.write(body)

        def log_message(self, *_arguments: object) -> None:
            """Say nothing."""

    with ThreadingHTTPServer((_HOST, 0), Handler) as server:
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        try:
            yield server.server_address[1]
        finally:
            server.shutdown()
            thread.join()


class Prometheus(NamedTuple):
    """A Prometheus that runs."""

    address: str
    pid: int
    configuration: Path

    def cpu(self) -> float:
        """Return the seconds of CPU that all its threads have used, by the process's clock (clock_getcpuclockid(3))."""
        return time.clock_gettime(~self.pid << 3 | 2)

    def ask(self, path: str, **parameters: str) -> Any:
        """Return the data of an answer of its API."""
        url = f"{self.address}/api/v1/{path}?{urllib.parse.urlencode(parameters)}"
        with urllib.request.urlopen(url, timeout=600) as answer:  # noqa: S310  (loopback)
            return json.load(answer)["data"]

    def rest(self) -> None:
        """Stop scraping and evaluating."""
        self.configuration.write_text("{}", encoding="utf-8")
        os.kill(self.pid, signal.SIGHUP)
        while self.ask("rules")["groups"] or self.ask("targets")["activeTargets"]:
            time.sleep(1)


@contextmanager
def prometheus(directory: Path, port: int, targets: int) -> Iterator[Prometheus]:
    """Run Prometheus with the whole pack."""
    jobs = [
        {
            "job_name": f"shoal-{number:02}",
            "honor_labels": True,
            "metrics_path": f"/{number}",
            "static_configs": [{"targets": [f"{_HOST}:{port}"]}],
        }
        for number in range(targets)
    ]
    configuration = {
        "global": {"scrape_interval": f"{INTERVAL}s", "evaluation_interval": f"{INTERVAL}s"},
        "rule_files": [f"{RULES}/*.yaml"],
        "scrape_configs": jobs,
    }
    file = directory / "prometheus.yaml"
    file.write_text(yaml.safe_dump(configuration), encoding="utf-8")
    with (directory / "log").open("w+", encoding="utf-8") as log:
        command = ["prometheus", f"--config.file={file}", f"--storage.tsdb.path={directory / 'data'}"]
        command += [f"--web.listen-address={_HOST}:0", "--query.timeout=10m"]
        process = subprocess.Popen(command, stdout=log, stderr=log)
        try:
            yield Prometheus(f"http://{_HOST}:{_port(process)}", process.pid, file)
        finally:
            process.terminate()
            process.wait(60)


def _port(process: subprocess.Popen[bytes]) -> int:
    """Return the port that the process listens on. Raises `RuntimeError` if it ends first."""
    while process.poll() is None:
        sockets = subprocess.run(["ss", "-Hltnp"], check=True, capture_output=True, text=True).stdout
        if own := re.search(rf" {re.escape(_HOST)}:([0-9]+) .*\bpid={process.pid},", sockets):
            return int(own[1])
        time.sleep(0.2)
    raise RuntimeError(f"prometheus ended with {process.returncode}")


def alone(server: Prometheus, groups: list[dict[str, Any]], at: float) -> dict[str, float]:
    """Evaluate every rule once, one after the other, and return the seconds of CPU by group.

    Without what it takes to store the results, which is little beside it.
    """
    costs = {}
    for group in groups:
        before = server.cpu()
        for rule in group["rules"]:
            server.ask("query", query=f"count({rule['query']})", time=str(at))
        costs[group["name"]] = server.cpu() - before
    return costs


def report(server: Prometheus, times: dict[str, list[float]]) -> bool:
    """Print a line for each group, and return whether all keep within their part of the interval."""
    groups = server.ask("rules")["groups"]
    head = server.ask("status/tsdb")["headStats"]
    at = time.time() - 5
    server.rest()
    costs = alone(server, groups, at)
    say(f"{machine()}\n{head['numSeries']:,} series in Prometheus\n")
    titles = f"{'median (s)':>12}{'worst (s)':>11}{'CPU (s)':>9}{'of interval':>13}"
    say(f"{'group':28}{'rules':>6}{'firing':>8}{titles}")
    failed = False
    for group in sorted(groups, key=lambda group: -costs[group["name"]]):
        name, interval = group["name"], group["interval"]
        firing = sum(alert["state"] == "firing" for rule in group["rules"] for alert in rule.get("alerts", ()))
        took = (
            f"{median(times[name]):>12.3f}{max(times[name]):>11.3f}{costs[name]:>9.3f}{costs[name] / interval:>13.1%}"
        )
        say(f"{name:28}{len(group['rules']):>6}{firing:>8}{took}")
        wrong = [f"    {rule['name']}: {rule['lastError']}" for rule in group["rules"] if rule["health"] == "err"]
        for text in wrong:
            say(text)
        failed |= bool(wrong) or costs[name] > interval * MOST_OF_INTERVAL
    whole, busy = sum(costs.values()), sum(costs[group["name"]] / group["interval"] for group in groups)
    say(f"{'all':28}{sum(len(group['rules']) for group in groups):>6}{'':31}{whole:>9.3f}{busy:>13.1%}")
    return not failed


def main() -> None:
    """Run for some minutes, print the table, and end with 1 if a rule failed or a group took too long."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--nodes", type=int, default=1000)
    parser.add_argument("--pods", type=int, default=30, help="on each node")
    parser.add_argument(
        "--minutes", type=float, default=20, help="to run; the longest window that matters is 15 minutes"
    )
    options = parser.parse_args()
    node = template()
    fleet = [list(lay_out(node, number, options.pods)) for number in range(options.nodes)]
    say(
        f"{options.nodes} nodes with {options.pods} pods each, {sum(map(len, fleet)):,} series that the pack's"
        f" {len(FILES)} files read"
    )
    targets = [
        [line for each in fleet[first : first + NODES_PER_TARGET] for line in each]
        for first in range(0, options.nodes, NODES_PER_TARGET)
    ]
    begun = time.monotonic()
    times: dict[str, list[float]] = {}
    with (
        tempfile.TemporaryDirectory(prefix="shoal-bench-rules-") as directory,
        serving(targets) as port,
        prometheus(Path(directory), port, len(targets)) as server,
    ):
        while time.monotonic() < begun + options.minutes * 60:
            time.sleep(INTERVAL)
            for group in server.ask("rules")["groups"]:
                times.setdefault(group["name"], []).append(group["evaluationTime"])
        sys.exit(0 if report(server, times) else 1)


if __name__ == "__main__":
    main()
