"""The exporter's process with servers to watch: flags, what it shows and logs, what promtool thinks of it, its end."""

from __future__ import annotations

import shutil
import signal
import socket
import subprocess
import time
from typing import TYPE_CHECKING

import pytest
from prometheus_client.parser import text_string_to_metric_families as parse

if TYPE_CHECKING:
    from pathlib import Path

    from tests.unit.conftest import StartExporter
    from tests.unit.redis_aof.conftest import StartRedis

RIGHT, WRONG = "Tr0ub4dor-and-3", "correct-horse-battery"


def test_no_password_is_ever_shown(start_redis: StartRedis, start_exporter: StartExporter, tmp_path: Path) -> None:
    """Neither a right nor a wrong password is in the metrics, on the page, in the log or among the arguments."""
    server = start_redis(config=f"requirepass {RIGHT}\nuser shoal on >{RIGHT} +@all\n")
    wrong = tmp_path / "wrong"
    wrong.write_text(f"{WRONG}\n")
    exporter = start_exporter(
        f"--redis.target=redis://127.0.0.1:{server.port}",
        f"--redis.target=redis://shoal@localhost:{server.port}?password_file={wrong}",
        "--log.level=debug",
        SHOAL_REDIS_PASSWORD=RIGHT,
    )
    metrics = exporter.get().text
    assert f'shoal_redis_up{{server="127.0.0.1:{server.port}"}} 1' in metrics
    assert f'shoal_redis_up{{server="localhost:{server.port}",reason="auth"}} 0' in metrics
    page = exporter.get("/").text
    assert "redis_aof_servers" in page
    with open(f"/proc/{exporter.process.pid}/cmdline") as file:
        arguments = file.read()
    exporter.stop()
    assert "redis server is down" in exporter.log
    for text in (metrics, page, exporter.log, arguments):
        assert RIGHT not in text
        assert WRONG not in text
    assert str(wrong) not in metrics + page


def test_promtool_and_the_parser_take_it(start_redis: StartRedis, start_exporter: StartExporter) -> None:
    """What the process serves has the histogram as Prometheus wants it, and no more series than a server needs."""
    server = start_redis("--maxmemory", "64mb")
    exporter = start_exporter(f"--redis.target=redis://127.0.0.1:{server.port}", "--redis.discover=true")
    exporter.get()
    time.sleep(0.5)
    text = exporter.get("/metrics?collect[]=redis_aof").text
    families = {family.name: family for family in parse(text)}
    assert families["shoal_redis_ping_duration_seconds"].type == "histogram"
    assert families["shoal_redis_aof_delayed_fsync"].type == "counter"
    own = [sample for family in families.values() for sample in family.samples if sample.labels.get("server")]
    assert len([sample for sample in own if sample.labels["server"] == f"127.0.0.1:{server.port}"]) <= 36
    if not shutil.which("promtool"):
        pytest.skip("needs promtool")
    done = subprocess.run(["promtool", "check", "metrics"], input=text, capture_output=True, text=True, check=False)
    complaints = [line for line in (done.stdout + done.stderr).splitlines() if line.startswith("shoal_")]
    assert complaints == []


@pytest.mark.slow
def test_it_ends_at_once_while_servers_hang(start_redis: StartRedis, start_exporter: StartExporter) -> None:
    """SIGTERM is not kept waiting by a server that hangs, one that never accepts, and a name that no one knows."""
    server = start_redis()
    with socket.create_server(("127.0.0.1", 0)) as silent:
        exporter = start_exporter(
            f"--redis.target=redis://127.0.0.1:{server.port},redis://127.0.0.1:{silent.getsockname()[1]}",
            "--redis.target=redis://redis.invalid",
        )
        exporter.get()
        server.process.send_signal(signal.SIGSTOP)
        time.sleep(0.5)
        status, seconds = exporter.stop()
    assert status == 0
    assert seconds < 5
    assert "Traceback" not in exporter.log
