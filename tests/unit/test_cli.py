"""The command as it is started, told off and stopped: real processes, their exit status and what they say."""

from __future__ import annotations

import http.client
import json
import re
import signal
import socket
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from shoal import __version__
from shoal.settings import OPTIONS

if TYPE_CHECKING:
    from tests.unit.conftest import StartExporter

RECORDED = Path(__file__).parent / "fixtures" / "6.1"

HANGS = """
import sys, time
from shoal.collectors.memory import MemoryCollector
MemoryCollector.read = lambda collector, node: time.sleep(600)
from shoal.cli import main
sys.exit(main())
"""

TELLS_MODULES = """
import sys
from shoal.cli import main
status = main()
print(*sys.modules)
sys.exit(status)
"""


@pytest.fixture
def run(clean_environment: dict[str, str]) -> object:
    """Return a function that runs the command to its end."""

    def run(*arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
        command = [sys.executable, "-m", "shoal", *arguments]
        return subprocess.run(
            command, env=clean_environment | environment, capture_output=True, text=True, timeout=20, check=False
        )

    return run


if TYPE_CHECKING:
    from collections.abc import Callable

    Run = Callable[..., subprocess.CompletedProcess[str]]


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (["--web.listen-addres=:1"], "--web.listen-addres is no option; did you mean --web.listen-address? See"),
        (["--collector.memry"], "--collector.memry is no option; did you mean --collector.memory? See"),
        (["--xyzzy"], "--xyzzy is no option. See"),
        (["--log", "debug"], "--log is no option"),
        (["start"], "start is no option"),
        (["--collector.memory=true"], "--collector.memory takes no value, got 'true'. See"),
        (["--log.level"], "--log.level: expected one argument. See"),
        (["--log.level=loud"], "--log.level is 'loud', which is not one of debug, info, warning, error."),
        (["--web.listen-address=7462"], "--web.listen-address is '7462', which is not host:port, such as"),
        (["--path.procfs=/usr"], "--path.procfs is '/usr', which is not a mounted proc file system"),
        (["--path.sysfs=/etc/passwd"], "--path.sysfs is '/etc/passwd', which is not a directory."),
        (["--config.file=/nowhere.yml"], "configuration file /nowhere.yml cannot be read: No such file or directory."),
        (["--config.file=/bin/sh"], "configuration file /bin/sh is not UTF-8 text."),
        (["--config.file=/proc/self/cmdline"], "configuration file /proc/self/cmdline is not YAML: special characters"),
        (["--no-" + option.key for option in OPTIONS if option.key.startswith("collector.")], "every collector is"),
    ],
)
def test_a_wrong_argument_is_one_sentence_and_status_2(arguments: list[str], sentence: str, run: Run) -> None:
    """No usage of thirty lines, no traceback, nothing on standard output."""
    ended = run(*arguments)
    assert ended.returncode == 2
    assert ended.stdout == ""
    assert ended.stderr.startswith(f"shoal-exporter: {sentence}")
    assert ended.stderr.count("\n") == 1
    assert ended.stderr.endswith(".\n")


def test_a_wrong_variable_is_named(run: Run) -> None:
    """So that it is found among those of a unit file."""
    ended = run(SHOAL_LOG_FORMAT="xml")
    assert ended.returncode == 2
    assert ended.stderr == "shoal-exporter: SHOAL_LOG_FORMAT is 'xml', which is not one of logfmt, json.\n"


@pytest.mark.parametrize(
    ("address", "reason"),
    [
        ("192.0.2.1:7462", "Cannot assign requested address"),
        ("[2001:db8::1]:7462", "(Cannot assign requested address|Address family not supported by protocol)"),
        ("nowhere.invalid:7462", "[A-Z][a-z ]+"),
        ("x" * 70 + ":7462", "that is no host name"),
    ],
)
def test_an_address_that_cannot_be_had_is_status_1(address: str, reason: str, run: Run) -> None:
    """The resolver's or the kernel's own words, and what to do."""
    ended = run(f"--web.listen-address={address}")
    sentence = f"shoal-exporter: cannot listen on {re.escape(address)}: {reason}; choose another with"
    assert re.fullmatch(f"{sentence} --web.listen-address.\n", ended.stderr)
    assert ended.returncode == 1


def test_a_port_in_use_is_status_1(run: Run) -> None:
    """The commonest of all mistakes."""
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        ended = run(f"--web.listen-address=127.0.0.1:{port}")
    assert ended.returncode == 1
    assert ended.stderr == (
        f"shoal-exporter: cannot listen on 127.0.0.1:{port}: Address already in use; "
        "choose another with --web.listen-address.\n"
    )


@pytest.mark.parametrize("columns", ["100", "80"])
def test_help_can_be_read(columns: str, run: Run) -> None:
    """Every option, what each collector is for, the defaults; no line is too long, none is only half a word wide."""
    ended = run("--help", COLUMNS=columns)
    assert (ended.returncode, ended.stderr) == (0, "")
    lines = ended.stdout.splitlines()
    assert max(map(len, lines)) <= int(columns) + 4
    unwrapped = re.sub(r"\s+", "", ended.stdout)
    for option in OPTIONS:
        (line,) = [line for line in lines if re.match(f"  --{re.escape(option.key)}( |$)", line)]
        if option.key.startswith("collector."):
            assert re.match(r"[A-Z].{15}", line.removeprefix(f"  --{option.key}").strip()), "not described"
        else:
            default = f"Default: {option.default}" if option.default else ""
            assert re.sub(r"\s+", "", option.help + default) in unwrapped
    assert "%" not in ended.stdout
    assert "SHOAL_WEB_LISTEN_ADDRESS" in ended.stdout


def test_version(run: Run) -> None:
    """One line for programs and people."""
    ended = run("--version")
    assert (ended.returncode, ended.stdout, ended.stderr) == (0, f"shoal-exporter {__version__}\n", "")


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_ends_it_with_0(number: signal.Signals, start_exporter: StartExporter) -> None:
    """At once, whatever clients do: one keeps its connection, one does not read what it asked for, some talk noise."""
    exporter = start_exporter()
    port = int(exporter.url.rpartition(":")[2])
    for noise in (b"\x16\x03\x01\x02\x00", b"GET / HTTP/9.9\r\n\r\n", b"GET /" + b"x" * 100_000 + b" HTTP/1.1\r\n\r\n"):
        with socket.create_connection(("127.0.0.1", port)) as client:
            client.sendall(noise)
            client.shutdown(socket.SHUT_WR)
            client.recv(1000)
    with socket.create_connection(("127.0.0.1", port)) as silent:
        silent.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 2048)
        silent.sendall(b"GET /metrics HTTP/1.1\r\nHost: x\r\n\r\n" * 200)
        kept = http.client.HTTPConnection("127.0.0.1", port)
        kept.request("GET", "/-/ready")
        assert kept.getresponse().read() == b"ok\n"
        assert exporter.get().status == 200
        status, seconds = exporter.stop(number)
        kept.close()
    assert status == 0
    assert seconds < 3
    assert "Traceback" not in exporter.log
    lines = exporter.log.splitlines()
    listening = rf"ts=\S+ level=info logger=shoal.server msg=listening address=127\.0\.0\.1:{port} collectors=\S+"
    assert re.fullmatch(listening, lines[0])
    # A collector that is being read has its word after it.
    assert any(re.fullmatch(r"ts=\S+ level=info logger=shoal.server msg=stopping", line) for line in lines)
    assert all(re.match(r"ts=\S+ level=(info|warning|error) logger=\S+ msg=", line) for line in lines)


@pytest.mark.parametrize("deadline", ["3", "60"], ids=["answered without it", "waiting for it"])
def test_a_signal_ends_it_while_a_collector_hangs(deadline: str, start_exporter: StartExporter) -> None:
    """Whether its scrape has been answered without it or still waits: nothing else can end a thread in the kernel."""
    exporter = start_exporter(program=("-c", HANGS))
    waiting = deadline == "60"
    if waiting:
        scrape = threading.Thread(target=_given_up, args=(exporter.url, deadline))
        scrape.start()
        time.sleep(0.5)
    else:
        answer = exporter.get(X_Prometheus_Scrape_Timeout_Seconds=deadline)
        assert 'shoal_scrape_collector_success{collector="memory"} 0\n' in answer.text
        assert 'shoal_scrape_collector_success{collector="pressure"} 1\n' in answer.text
    status, seconds = exporter.stop()
    assert status == 0
    assert seconds < 3
    if waiting:
        scrape.join(10)
    assert "ended without waiting for threads that hang" in exporter.log
    assert "Traceback" not in exporter.log


def _given_up(url: str, deadline: str) -> None:
    connection = http.client.HTTPConnection(url.removeprefix("http://"))
    connection.request("GET", "/metrics", headers={"X-Prometheus-Scrape-Timeout-Seconds": deadline})
    with pytest.raises(http.client.RemoteDisconnected):
        connection.getresponse()
    connection.close()


def test_it_imports_what_is_enabled(start_exporter: StartExporter) -> None:
    """A collector that is off costs no memory, nor does the parser of a configuration file that is not there."""
    keys = [option.key for option in OPTIONS if option.key.startswith("collector.")]
    off = [f"--no-{key}" for key in keys if key != "collector.pressure"]
    exporter = start_exporter(*off, program=("-c", TELLS_MODULES))
    assert exporter.stop()[0] == 0
    assert exporter.process.stdout is not None
    modules = set(exporter.process.stdout.read().decode().split())
    assert {module for module in modules if module.startswith("shoal.collectors.")} == {"shoal.collectors.pressure"}
    assert not {"yaml", "redis", "pyroute2", "psutil", "bcrypt", "shoal.web_config", "shoal.web_auth"} & modules


def test_help_and_version_load_no_server(run: Run) -> None:
    """They answer at once: the web server takes five times as long to load as the rest."""
    ended = run("--version", PYTHONPROFILEIMPORTTIME="1")
    assert "shoal.settings" in ended.stderr
    assert "aiohttp" not in ended.stderr


def test_memory_stays_small(start_exporter: StartExporter) -> None:
    """At most 60 MiB resident after twenty scrapes in both formats, by its own metric and by the kernel's.

    On a recorded node, as the machine that runs the tests may have any number of namespaces.
    """
    exporter = start_exporter(
        f"--path.procfs={RECORDED}/proc", f"--path.sysfs={RECORDED}/sys", f"--path.rootfs={RECORDED}/rootfs"
    )
    for number in range(20):
        accept = "application/openmetrics-text" if number % 2 else "text/plain"
        answer = exporter.get(Accept=accept, Accept_Encoding="gzip")
        assert answer.status == 200
    own = float(re.search(r"^process_resident_memory_bytes (\S+)$", exporter.get().text, re.MULTILINE)[1])  # type: ignore[index]
    status = Path(f"/proc/{exporter.process.pid}/status").read_text(encoding="utf-8")
    resident = int(re.search(r"VmRSS:\s+(\d+) kB", status)[1]) * 1024  # type: ignore[index]
    assert own <= 60 << 20
    assert resident <= 60 << 20


def test_a_file_of_settings(start_exporter: StartExporter, tmp_path: Path) -> None:
    """From the variable that names it to the collectors that run."""
    file = tmp_path / "shoal.yml"
    file.write_text("log: {format: json}\ncollector:\n  memory: off\n  conntrack: false\n")
    exporter = start_exporter(SHOAL_CONFIG_FILE=str(file), SHOAL_COLLECTOR_CONNTRACK="true")
    listening = json.loads(exporter.log.splitlines()[0])
    assert "conntrack" in listening["collectors"].split(",")
    assert "memory" not in listening["collectors"].split(",")
    assert listening["address"] == exporter.url.removeprefix("http://")
    assert "shoal_memory_" not in exporter.get().text
