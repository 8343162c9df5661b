"""The subcommands `check` and `explain` as a person runs them: the process, its output, its exit status."""

from __future__ import annotations

import contextlib
import fcntl
import importlib.util
import json
import os
import pty
import re
import signal
import struct
import subprocess
import sys
import termios
import time
from pathlib import Path
from typing import TYPE_CHECKING

import pytest
from tests.lab.faults import load

from shoal.check import command, runbooks
from shoal.check.alerts import ALERTS
from shoal.check.failures import FAILURES
from shoal.check.report import compare, judge, render
from shoal.check.snapshot import Labels, Pair, parse

if TYPE_CHECKING:
    from collections.abc import Callable

    from tests.unit.conftest import StartExporter

    Done = subprocess.CompletedProcess[str]

pytestmark = pytest.mark.slow

DOCS = Path(__file__).parents[3] / "docs"

AVAILABLE = "".join(
    f'shoal_signal_available{{signal="{signal}"}} 1\n'
    for failure in FAILURES
    for signal in (*failure.signals, *(part.signal for part in failure.parts))
)
BUILD = 'shoal_build_info{version="9.9.9"} 1\n'


def overflow(count: int) -> str:
    """Return the scrape of a node on which so many connections were refused."""
    return f'{BUILD}{AVAILABLE}shoal_listen_queue_overflows_total{{netns="host"}} {count}\n'


def test_this_node(run: Callable[..., Done]) -> None:
    """Each of the fourteen has a line and a verdict, whatever this machine is, soon after the interval."""
    began = time.monotonic()
    done = run("check", "--interval=1")
    assert time.monotonic() - began < 20
    for failure in FAILURES:
        assert re.search(
            rf"^(ok|warning|critical|cannot tell) .*{re.escape(failure.title[:20])}", done.stdout, re.MULTILINE
        )
    assert done.returncode in (0, 1, 2)
    assert "\033" not in done.stdout
    assert not done.stderr


def test_a_running_exporter(start_exporter: StartExporter, run: Callable[..., Done]) -> None:
    """From afar, with the address that Prometheus has; the same fourteen, as JSON."""
    exporter = start_exporter()
    done = run("check", f"--from={exporter.url}", "--interval=1", "--json")
    document = json.loads(done.stdout)
    assert document["version"] == 1
    assert document["failed"] == {}
    assert [one["number"] for one in sorted(document["nodes"][0]["failures"], key=lambda one: one["number"])] == list(
        range(1, 15)
    )


# Version 1. A key may be added, here and in the document; one that changes its sense or goes makes it version 2.
KEYS = {
    "": {"version", "nodes", "failed"},
    "nodes": {"node", "status", "seconds", "failures"},
    "failures": {"number", "name", "title", "status", "why", "unseen", "findings"},
    "findings": {
        *("alert", "status", "culprit", "evidence", "confirm", "first_step", "first_commands", "runbook_url"),
    },
}


def test_json_is_stable_and_documented(node: Callable[..., str], run: Callable[..., Done]) -> None:
    """Scripts of others read it: exactly these keys, each of a type, and each in the document."""
    done = run("check", f"--from={node(overflow(5), overflow(25))}", "--from=127.0.0.1:1", "--interval=1", "--json")
    assert done.returncode == 2
    assert done.stderr == ""
    document = json.loads(done.stdout)
    found = {"": document}
    for outer, name in (("", "nodes"), ("nodes", "failures"), ("failures", "findings")):
        found[name] = found[outer][name][0]
    assert {name: set(one) for name, one in found.items()} == KEYS
    page = (DOCS / "check.md").read_text(encoding="utf-8")
    table = page.partition("\n## JSON\n")[2].partition("\n## ")[0]
    assert {key for keys in KEYS.values() for key in keys} <= set(re.findall(r"[a-z_]+", table))
    kinds = {key: type(value).__name__ for one in found.values() for key, value in one.items()}
    lists = dict.fromkeys(("nodes", "failures", "findings", "unseen", "confirm", "first_commands"), "list")
    others = {"failed": "dict", "culprit": "dict", "version": "int", "number": "int", "seconds": "float"}
    assert kinds == dict.fromkeys(kinds, "str") | lists | others
    assert document["version"] == 1
    assert document["failed"] == {"127.0.0.1:1": "127.0.0.1:1 cannot be reached: Connection refused"}


def test_the_head_of_the_document_is_current() -> None:
    """It is written by a program after a run of the lab, and says there what it says here."""
    spec = importlib.util.spec_from_file_location("docs_check", DOCS / "check.py")
    assert spec
    assert spec.loader
    program = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(program)
    assert (DOCS / "check.md").read_text(encoding="utf-8").startswith(program.HEAD)


def test_a_failure_far_away(node: Callable[..., str], run: Callable[..., Done]) -> None:
    """Worst first: the verdict, the proof, a command to paste, the first step, the runbook; status 2."""
    done = run("check", f"--from={node(overflow(5), overflow(25))}", "--interval=1")
    assert done.returncode == 2
    lines = done.stdout.splitlines()
    assert lines[1].startswith("critical    Listen queues overflow")
    assert "20 connections refused" in done.stdout
    assert "network namespace host" in done.stdout
    assert "$ nsenter" in done.stdout
    assert "First: " in done.stdout
    assert "explain ShoalListenQueueOverflow" in done.stdout
    assert lines[-1] == "1 critical, 13 ok."


def test_all_is_well(node: Callable[..., str], run: Callable[..., Done]) -> None:
    """Status 0 and fourteen lines of ok."""
    done = run("check", f"--from={node(overflow(5))}", "--interval=1")
    assert done.returncode == 0
    assert done.stdout.splitlines()[-1] == "14 ok."


def test_nodes_are_compared(node: Callable[..., str], run: Callable[..., Done], tmp_path: Path) -> None:
    """From a file of addresses: which differ, and in what; one that is gone is said and costs the others nothing."""
    ill, well = node(overflow(5), overflow(25)), node(overflow(5))
    names = tmp_path / "nodes"
    names.write_text(f"# two nodes\n{ill}\n\n{well} # fine\n")
    done = run("check", f"--from={names}", "--interval=1")
    assert done.returncode == 2
    assert (
        f"Listen queues overflow (listen-queue) differs:\n    critical:\n        {ill}\n    ok:\n        {well}"
        in done.stdout
    )
    assert "Listen queues overflow (listen-queue) differs" in done.stdout
    gone = run("check", f"--from={well}", "--from=127.0.0.1:1", "--interval=1")
    assert gone.returncode == 3
    assert "127.0.0.1:1 cannot be reached: Connection refused." in gone.stderr
    assert "14 ok." in gone.stdout


def test_a_file_with_bad_lines(node: Callable[..., str], run: Callable[..., Done], tmp_path: Path) -> None:
    """Comments, blank lines and doubles are passed over; a line that is no address costs the others nothing."""
    well = node(overflow(5))
    names = tmp_path / "nodes"
    names.write_text(f"\ufeff# comment\n\n  {well}  # twice\r\n{well}\n#\nftp://elsewhere\nnot an address\n")
    done = run("check", f"--from={names}", "--interval=1", "--json")
    assert done.returncode == 3
    document = json.loads(done.stdout)
    assert [one["node"] for one in document["nodes"]] == [well]
    assert document["failed"] == {
        bad: f"{bad!r} is no address such as http://node:7462" for bad in ("ftp://elsewhere", "not an address")
    }


@pytest.mark.parametrize(
    ("content", "sentence"),
    [
        (b"# nothing\n\n", "has no address in it"),
        (b"\xff\xfe\x00", "cannot be read as text: no UTF-8"),
        (b"http://ann:secret@node:7462\n", "without a name and a password"),
    ],
)
def test_a_file_without_addresses(content: bytes, sentence: str, run: Callable[..., Done], tmp_path: Path) -> None:
    """One sentence, which does not repeat a password."""
    (tmp_path / "nodes").write_bytes(content)
    done = run("check", f"--from={tmp_path / 'nodes'}", "--interval=1")
    assert done.returncode == 3
    assert sentence in done.stderr
    assert done.stderr.count("\n") == 1
    assert "secret" not in done.stderr


@pytest.mark.parametrize(
    ("answer", "status", "sentence"),
    [
        ("<html>hello</html>", 200, "is not Prometheus' text format"),
        ("up 1\n", 200, "no Shoal exporter"),
        ("no", 401, "it wants --user"),
        ("no", 503, "answered 503"),
    ],
)
def test_what_is_no_exporter(
    answer: str,
    status: int,
    sentence: str,
    node: Callable[..., str],
    run: Callable[..., Done],
) -> None:
    """One sentence with the address, status 3."""
    done = run("check", f"--from={node(answer, status=status)}", "--interval=1")
    assert done.returncode == 3
    assert sentence in done.stderr
    assert done.stderr.count("\n") == 1


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (("check", "--interval=0"), "not a number of seconds from 1 to 3600"),
        (("check", "--interval=soon"), "not a number of seconds"),
        (("check", "--from=ftp://node"), "is no address such as"),
        (("check", "--from=http://:7462"), "is no address such as"),
        (("check", "--from=http://node:port"), "is no address such as"),
        (("check", "--intervall=3"), "did you mean --interval?"),
        (("check", "--cacert=/nonexistent", "--from=https://127.0.0.1:1"), "cannot be used for TLS"),
        (("check", "--from=https://127.0.0.1:1", "--cacert=/dev/null"), "/dev/null cannot be used for TLS"),
        (("check", "--from=https://127.0.0.1:1", "--cert=/dev/null"), "/dev/null cannot be used for TLS"),
        (("check", "--from=https://127.0.0.1:1", "--key=/dev/null"), "--cert names"),
        (("check", "--from=http://127.0.0.1:1", "--user=ann:secret"), "--user is the name alone"),
        (("check", "--from=ann:secret@127.0.0.1:1"), "an address is without a name and a password"),
        (("check", "--path.procfs=/etc"), "--path.procfs is '/etc'"),
        (("explain", "listen-que"), "did you mean listen-queue?"),
        (("explain", "nothing-like-it"), "there is no failure 'nothing-like-it'"),
    ],
)
def test_wrong_arguments(arguments: tuple[str, ...], sentence: str, run: Callable[..., Done]) -> None:
    """One sentence and status 3, for 2 would say that something is critical."""
    done = run(*arguments)
    assert done.returncode == 3
    assert sentence in done.stderr
    assert done.stderr.count("\n") == 1
    assert "secret" not in done.stderr


def test_an_older_exporter(node: Callable[..., str], run: Callable[..., Done]) -> None:
    """What it does not have cannot be told, and it is said that it does not have it."""
    done = run("check", f"--from={node(BUILD)}", "--interval=1")
    assert done.returncode == 3
    assert "this exporter, 9.9.9, has no listen_queue_namespaces" in " ".join(done.stdout.split())


def test_a_password_is_sent_and_never_shown(node: Callable[..., str], run: Callable[..., Done]) -> None:
    """It comes from the environment, not from the arguments, which everyone on the machine can read."""
    done = run("check", f"--from={node('no', status=403)}", "--interval=1", "--user=ann", SHOAL_CHECK_PASSWORD="s3cret")  # noqa: S106
    assert done.returncode == 3
    assert "s3cret" not in done.stdout + done.stderr


def shell(command: str, environment: dict[str, str]) -> Done:
    """Run a command line in which `shoal` is the exporter."""
    command = command.replace("shoal", f"{sys.executable} -m shoal", 1)
    # What is left in a buffer is written at the end, which is where a closed pipe is met again.
    environment = {name: value for name, value in environment.items() if name != "PYTHONUNBUFFERED"}
    return subprocess.run(
        ["bash", "-c", command], capture_output=True, text=True, check=False, timeout=60, env=environment
    )


@pytest.mark.parametrize("reader", ["true", "head -1"])
def test_a_pipe_that_closes(reader: str, node: Callable[..., str], clean_environment: dict[str, str]) -> None:
    """`check | head -1` ends without a complaint, with the status that it found; so does `explain`."""
    address = node(overflow(5), overflow(25))
    line = f"shoal check --interval=1 --from={address} | {reader}; echo ${{PIPESTATUS[0]}} >&2"
    assert shell(line, clean_environment).stderr == "2\n"
    # It goes on and on, so here it is certain that somebody has closed it.
    line = f"shoal check --interval=1 --watch --from={address} | {reader}; echo ${{PIPESTATUS[0]}} >&2"
    assert shell(line, clean_environment).stderr in ("2\n", "0\n")
    assert shell(f"shoal explain oom | {reader}; echo ${{PIPESTATUS[0]}} >&2", clean_environment).stderr == "0\n"


def test_a_disk_that_is_full(node: Callable[..., str], clean_environment: dict[str, str]) -> None:
    """What cannot be written is said, in one sentence."""
    for line in (f"shoal check --interval=1 --from={node(overflow(5))}", "shoal explain oom"):
        done = shell(f"{line} >/dev/full", clean_environment)
        assert done.returncode == 3
        assert done.stderr == "shoal-exporter: the answer cannot be written: No space left on device.\n"


def test_a_terminal_of_ascii(node: Callable[..., str], clean_environment: dict[str, str]) -> None:
    """What it has not is written in another way; a name of a unit may have anything in it."""
    fish = 'shoal_redis_up{server="r",reason="refused",unit="\U0001f41f.service"} 0\n'
    environment = clean_environment | {"PYTHONIOENCODING": "ascii", "PYTHONUTF8": "0"}
    done = shell(f"shoal check --interval=1 --from={node(overflow(5) + fish)}", environment)
    assert done.returncode == 1
    assert "unit \\U0001f41f.service" in done.stdout
    assert done.stderr == ""


BROKEN = """
import sys
from shoal.check import command
command.judge = lambda pair: {}["a fault"]
from shoal.cli import main
sys.exit(main())
"""


def test_a_fault_of_its_own(node: Callable[..., str], clean_environment: dict[str, str]) -> None:
    """Whoever was woken can do nothing with a traceback."""
    done = subprocess.run(
        [sys.executable, "-c", BROKEN, "check", "--interval=1", f"--from={node(overflow(5))}"],
        capture_output=True,
        text=True,
        check=False,
        env=clean_environment,
        timeout=60,
    )
    assert done.returncode == 3
    assert done.stderr == ("shoal-exporter: this is a fault of check itself, please report it: KeyError: 'a fault'.\n")


@pytest.mark.parametrize("columns", [40, 80, 200])
def test_no_line_is_too_wide(columns: int) -> None:
    """But for commands, which are to be pasted."""
    pair = Pair(parse(overflow(5), 0.0), parse(overflow(25), 5.0))
    text = render("node", judge(pair), seconds=5.0, width=columns, colour=False)
    wide = [
        line
        for line in text.splitlines()
        if len(line) > min(columns, 100) and not line.startswith(("    $ ", "    # "))
    ]
    assert not wide


def test_a_terminal_gets_colours_and_progress(node: Callable[..., str], clean_environment: dict[str, str]) -> None:
    """Colours where a person looks, a line while it waits that is taken back, nothing of it with NO_COLOR."""
    seen = {}
    command = [sys.executable, "-m", "shoal", "check", "--interval=1", f"--from={node(overflow(5), overflow(25))}"]
    for environment in ({}, {"NO_COLOR": "1"}):
        seen[bool(environment)] = on_a_terminal(command, 80, clean_environment | environment)[0]
    assert "\033[1;31mcritical" in seen[False]
    assert "\033[1;31m" not in seen[True]
    assert "scraping twice, 1 s apart" in seen[False]


def on_a_terminal(command: list[str], columns: int, environment: dict[str, str]) -> tuple[str, int]:
    """Run it on a terminal of so many columns and return what is on it, and the exit status."""
    leader, follower = pty.openpty()
    fcntl.ioctl(follower, termios.TIOCSWINSZ, struct.pack("HHHH", 24, columns, 0, 0))
    environment = {name: value for name, value in environment.items() if name not in ("COLUMNS", "LINES")}
    with subprocess.Popen(command, stdout=follower, stderr=follower, env=environment) as process:
        os.close(follower)
        data = b""
        with contextlib.suppress(OSError):
            while piece := os.read(leader, 65536):
                data += piece
    os.close(leader)
    return data.decode(), process.returncode


def test_a_terminal_of_40_columns(node: Callable[..., str], clean_environment: dict[str, str]) -> None:
    """Nothing is wider, but for commands, which are to be pasted; and nothing is missing."""
    command = [sys.executable, "-m", "shoal", "check", "--interval=1"]
    command += [f"--from={node(overflow(5), overflow(25))}", f"--from={node(overflow(5))}"]
    text, status = on_a_terminal(command, 40, clean_environment | {"NO_COLOR": "1"})
    assert status == 2
    lines = [line.split("\x1b[K")[-1] for line in text.splitlines()]
    assert not [line for line in lines if len(line) > 40 and not line.startswith(("    $ ", "    # "))]
    assert "1 critical, 13 ok." in lines
    assert "Listen queues overflow (listen-queue) differs:" in " ".join(text.split())


def test_watch_goes_on_until_it_is_told(node: Callable[..., str], clean_environment: dict[str, str]) -> None:
    """A document a line, each from the last interval; Ctrl-C ends it with the last status and no complaint."""
    command = [sys.executable, "-m", "shoal", "check", "--interval=1", "--watch", "--json"]
    command.append(f"--from={node(overflow(5), overflow(25), overflow(25), overflow(45))}")
    with subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=clean_environment
    ) as process:
        assert process.stdout
        assert process.stderr
        documents = [json.loads(process.stdout.readline()) for _ in range(3)]
        process.send_signal(signal.SIGINT)
        assert process.wait(timeout=20) == 2
        assert process.stderr.read() == ""
    assert [one["nodes"][0]["status"] for one in documents] == ["critical", "ok", "critical"]


@pytest.mark.parametrize("arguments", [(), ("--watch",)])
def test_ctrl_c_while_this_node_is_read(arguments: tuple[str, ...], clean_environment: dict[str, str]) -> None:
    """Between the two reads: at once, and nothing can be told yet."""
    command = [sys.executable, "-m", "shoal", "check", "--interval=60", *arguments]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, env=clean_environment) as process:
        time.sleep(3)
        process.send_signal(signal.SIGINT)
        assert process.wait(timeout=10) == 3
        assert process.communicate() == (b"", b"")


def test_watch_takes_up_a_node_that_comes_back(node: Callable[..., str], clean_environment: dict[str, str]) -> None:
    """One that does not answer is asked again, until it does."""
    late = node("no metrics", "no metrics", overflow(5), overflow(25))
    command = [sys.executable, "-m", "shoal", "check", "--interval=1", "--watch", "--json", f"--from={late}"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=clean_environment) as process:
        assert process.stdout
        documents = [json.loads(process.stdout.readline()) for _ in range(3)]
        process.send_signal(signal.SIGINT)
        assert process.wait(timeout=20) == 2
    assert [bool(one["failed"]) for one in documents] == [True, True, False]


def test_all_nodes_agree() -> None:
    """Which is said, and not an empty answer."""
    verdicts = judge(Pair(parse(overflow(5), 0.0), parse(overflow(5), 5.0)))
    assert compare({"a": verdicts, "b": verdicts}, width=80, colour=False) == "All nodes agree in everything.\n"


@pytest.mark.parametrize("failure", FAILURES, ids=lambda failure: failure.name)
def test_explain(failure: object, run: Callable[..., Done]) -> None:
    """By name and by number the same pages, which begin with the worst alert's."""
    by_name, by_number = run("explain", failure.name), run("explain", str(failure.number))  # type: ignore[attr-defined]
    assert by_name.returncode == 0
    assert by_name.stdout == by_number.stdout
    assert by_name.stdout.startswith(f"# {failure.alerts[0]}\n")  # type: ignore[attr-defined]


def test_explain_knows_the_names_of_the_lab(capsys: pytest.CaptureFixture[str]) -> None:
    """Who has seen `make demo FAULT=oom_kill` asks for that; and `signal` in a page has underscores."""
    for fault in load():
        assert command.explain([fault.name]) == 0
        first = next(one for one in FAILURES if one.number == fault.number).alerts[0]
        assert capsys.readouterr().out.startswith(f"# {first}\n")


@pytest.mark.parametrize("alert", sorted(ALERTS))
def test_every_alert_has_commands_and_a_first_step(alert: str) -> None:
    """They come from the runbook, so it has to have them where they are looked for."""
    assert runbooks.confirm(alert, Labels({}))
    assert runbooks.first_step(alert)
    assert runbooks.url(alert).endswith(f"/rules/runbooks/{alert}.md")


def test_commands_are_about_the_culprit() -> None:
    """Where a page has an example there stands what was found, so that it can be pasted."""
    stuck = runbooks.confirm("ShoalFilesystemStuck", Labels({"mountpoint": "/data"}))
    assert any("/data" in command for command in stuck)
    assert not any("/mnt/share" in command for command in stuck)
    wrong = runbooks.first_commands("ShoalNeighbourWrongMac", Labels({"address": "10.0.0.9", "device": "eth1"}))
    assert wrong == ["ip neigh del 10.0.0.9 dev eth1"]
    server = runbooks.confirm("ShoalRedisAofStall", Labels({"server": "10.0.0.7:6380"}))
    assert server[0].startswith("redis-cli -h 10.0.0.7 -p 6380 ")
    assert runbooks.first_commands("ShoalConntrackDrops", Labels({})) == [
        "sysctl -w net.netfilter.nf_conntrack_max=524288"
    ]


def test_the_runbooks_are_those_of_the_rules() -> None:
    """Linked, not copied."""
    packed = Path(runbooks.__file__).parents[1] / "runbooks"
    assert packed.resolve() == Path(__file__).parents[3] / "rules" / "runbooks"
