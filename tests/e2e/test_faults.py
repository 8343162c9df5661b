"""What dies and comes back around the exporter, and the exporter itself: what it says afterwards is true.

A counter may fall only where Prometheus can see why: at a later `process_start_time_seconds`.
"""

from __future__ import annotations

import json
import os
import random
import socket
import subprocess
import sys
import threading
import time
import urllib.error
import urllib.parse
import urllib.request
from contextlib import ExitStack, contextmanager, suppress
from typing import TYPE_CHECKING, Any

import pytest
from tests.e2e.process import WORKLOAD, Running, Scrape, exporter, free_port

from shoal.kernel.netstat import read_netstat

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

pytestmark = pytest.mark.root

# Alone in its PID namespace, it has only its own network namespace to tell of, in which nothing comes and goes.
ALONE = ("unshare", "--mount", "--pid", "--fork", "--mount-proc", "--kill-child=KILL")
# What the exporter counts itself, and what Python and its process do.
OWN = ("shoal_redis_ping", "process_", "python_", "shoal_http", "shoal_scrape", "shoal_neighbour")


def kernels(scrape: Scrape) -> dict[Any, float]:
    """Return the counters that the kernel keeps for the node, which outlive any exporter."""
    return {
        key: value
        for key, value in scrape.counters.items()
        if not key[0].startswith(OWN) and not WORKLOAD & dict(key[1]).keys()
    }


def overflow() -> None:
    """Have the kernel drop connections of this network namespace, because a queue of accept() is full."""
    with ExitStack() as stack:
        server = stack.enter_context(socket.create_server(("127.0.0.1", 0), backlog=0))
        for _ in range(5):
            client = stack.enter_context(socket.socket())
            client.setblocking(False)  # noqa: FBT003  (the socket's own signature)
            with suppress(BlockingIOError):
                client.connect(server.getsockname())
        time.sleep(0.1)


def overflows() -> int:
    """Return what the kernel has counted of them."""
    return read_netstat("/proc", "self")["ListenOverflows"]


def started(scrape: Scrape) -> float:
    """Return when the exporter says that it has started."""
    (at,) = scrape.named("process_start_time_seconds")
    return at


def test_killed_at_any_moment(tmp_path: Path) -> None:
    """Killed while it scrapes, five times over, it starts again on the same port and goes on where the kernel is."""
    chance = random.Random(9)  # noqa: S311  (no secret)
    port = free_port()
    last: Scrape | None = None
    for _ in range(5):
        with exporter(before=ALONE, log=tmp_path / "log", port=port) as running:
            least = overflows()
            scrape = running.scrape()
            (told,) = scrape.named("shoal_listen_queue_overflows_total", netns="host")
            assert least <= told <= overflows()
            assert not scrape.failed
            if last is not None:
                assert started(scrape) > started(last)
                now = kernels(scrape)
                assert len(now.keys() & kernels(last).keys()) > 20
                assert not [key for key, value in kernels(last).items() if now.get(key, value) < value]
            last = scrape
            overflow()
            assert overflows() > least
            busy = threading.Thread(target=ask_in_vain, args=(running,))
            busy.start()
            time.sleep(chance.uniform(0, 0.3))
            running.process.kill()
            running.process.wait()
            busy.join()


def ask_in_vain(running: Running) -> None:
    """Scrape until nobody answers any more."""
    with suppress(OSError, ValueError):
        while True:
            running.get(timeout=10)


@contextmanager
def prometheus(directory: Path, exporter_port: int, port: int) -> Iterator[subprocess.Popen[bytes]]:
    """Run a Prometheus that scrapes the exporter once a second and keeps what it has in the directory."""
    configuration = {
        "global": {"scrape_interval": "1s", "scrape_timeout": "1s"},
        "scrape_configs": [{"job_name": "shoal", "static_configs": [{"targets": [f"127.0.0.1:{exporter_port}"]}]}],
    }
    (directory / "prometheus.json").write_text(json.dumps(configuration))
    command = [
        "prometheus",
        f"--config.file={directory}/prometheus.json",
        f"--storage.tsdb.path={directory}/data",
        f"--web.listen-address=127.0.0.1:{port}",
        "--log.level=error",
    ]
    with subprocess.Popen(command) as process:
        try:
            yield process
        finally:
            process.kill()


def query(port: int, expression: str) -> list[dict[str, Any]]:
    """Return the result of an instant query, none while Prometheus is not there. Fails where the query is wrong."""
    address = f"http://127.0.0.1:{port}/api/v1/query?{urllib.parse.urlencode({'query': expression})}"
    try:
        with urllib.request.urlopen(address, timeout=10) as answer:
            return list(json.loads(answer.read())["data"]["result"])
    except urllib.error.HTTPError as error:
        assert error.code == 503, error.read()  # noqa: PT017  (it is still starting)
    except OSError:
        pass
    return []


def resets(port: int) -> set[str]:
    """Return the counters of the node and not of a workload that Prometheus has seen fall."""
    without = ",".join(f'{label}=""' for label in sorted(WORKLOAD))
    names = query(port, f'group by (__name__) ({{__name__=~"shoal_.+_(total|count|sum|bucket)",{without}}})')
    found = {one["metric"]["__name__"] for one in names}
    assert len(found) > 10
    return {name for name in found if query(port, f"resets({name}{{{without}}}[5m]) > 0")}


def wait_for(port: int, expression: str) -> None:
    """Wait until a query has a result."""
    until = time.monotonic() + 60
    while not query(port, expression):
        assert time.monotonic() < until, f"{expression} has no result"
        time.sleep(0.2)


def test_prometheus_and_the_exporter_restart(tmp_path: Path) -> None:
    """A Prometheus that was killed goes on as if nothing were; of the exporter's end it sees the start and no fall."""
    port, own = free_port(), free_port()
    with ExitStack() as stack:
        running = stack.enter_context(exporter(before=ALONE, log=tmp_path / "log", port=port))
        with prometheus(tmp_path, port, own) as server:
            wait_for(own, "count_over_time(process_start_time_seconds[2m]) >= 2")
            server.kill()
        with prometheus(tmp_path, port, own):
            wait_for(own, "count_over_time(process_start_time_seconds[2m]) >= 4")
            assert not query(own, "changes(process_start_time_seconds[5m]) > 0")
            assert not resets(own)
            overflow()
            (told,) = running.scrape().named("shoal_listen_queue_overflows_total", netns="host")
            wait_for(own, f'shoal_listen_queue_overflows_total{{netns="host"}} >= {told}')
            running.process.kill()
            running.process.wait()
            wait_for(own, "up == 0")
            stack.enter_context(exporter(before=ALONE, log=tmp_path / "log", port=port))
            wait_for(own, "changes(process_start_time_seconds[5m]) == 1")
            time.sleep(2)
            assert {name for name in resets(own) if not name.startswith(OWN)} == set()


INSIDE = """
set -e
ip link set lo up
for device in 1 2; do
    ip link add d$device type veth peer name p$device
    ip address add 10.9.$device.1/24 dev d$device
    ip link set d$device up
done
ip neighbour add 10.9.1.2 lladdr 02:00:00:00:00:01 dev d1
for host in 2 3 4; do ip neighbour add 10.9.2.$host lladdr 02:00:00:00:00:02 dev d2; done
exec "$@"
"""
ASK = "import sys, urllib.request; sys.stdout.buffer.write(urllib.request.urlopen(sys.argv[1], timeout=20).read())"


def test_an_interface_that_is_renamed() -> None:
    """What is told of a device goes with it to its new name, and nothing stays under the old one; two may even swap."""
    address = f"127.0.0.1:{free_port()}"
    command = [
        "unshare",
        "--net",
        "sh",
        "-c",
        INSIDE,
        "sh",
        sys.executable,
        "-m",
        "shoal",
        "--web.listen-address",
        address,
    ]
    environment = {name: value for name, value in os.environ.items() if not name.startswith("SHOAL_")}

    def enter(*words: str) -> str:
        inside = ["nsenter", f"--net=/proc/{process.pid}/ns/net", *words]
        return subprocess.run(inside, check=True, capture_output=True, text=True).stdout

    def permanent() -> dict[str, float]:
        scrape = Scrape(enter(sys.executable, "-c", ASK, f"http://{address}/metrics"), 0)
        assert not scrape.failed
        return {
            dict(labels)["device"]: value
            for (name, labels), value in scrape.values.items()
            if name == "shoal_neighbours_entries" and dict(labels)["state"] == "permanent"
        }

    with subprocess.Popen(command, env=environment, stderr=subprocess.DEVNULL) as process:
        try:
            until = time.monotonic() + 90
            while True:
                with suppress(subprocess.CalledProcessError):
                    before = permanent()
                    break
                assert time.monotonic() < until
                time.sleep(0.1)
            assert before == {"d1": 1, "d2": 3}
            enter("ip", "link", "set", "d1", "name", "d7")
            assert permanent() == {"d7": 1, "d2": 3}
            enter("ip", "link", "set", "d2", "name", "d1")
            enter("ip", "link", "set", "d7", "name", "d2")
            assert permanent() == {"d2": 1, "d1": 3}
        finally:
            process.kill()
