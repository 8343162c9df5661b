"""Exporters far away: TLS and passwords against a real one, and everything else that an address may lead to."""

from __future__ import annotations

import argparse
import contextlib
import gzip
import json
import re
import socket
import ssl
import subprocess
import sys
import threading
import time
from typing import TYPE_CHECKING, Any

import bcrypt
import pytest

from shoal.check import command, sources
from shoal.check.sources import Remote, SourceError

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from pathlib import Path

    from tests.unit.conftest import StartExporter

    Run = Callable[..., subprocess.CompletedProcess[str]]

pytestmark = pytest.mark.slow

PASSWORD = "the password of a test"  # noqa: S105
OK = b"HTTP/1.1 200 OK\r\n"
BUILD = b'shoal_build_info{version="9.9.9"} 1\n'


@pytest.fixture(scope="module")
def keys(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Make an authority, a server's and a client's certificate by it, and one that it did not sign."""
    directory = tmp_path_factory.mktemp("keys")
    made = {"ca": "", "server": "IP:127.0.0.1", "client": "DNS:oncall.example", "stranger": "DNS:oncall.example"}
    for name, san in made.items():
        command = ["openssl", "req", "-x509", "-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:prime256v1", "-nodes"]
        command += ["-keyout", f"{name}.key", "-out", f"{name}.crt", "-days", "2", "-subj", f"/CN={name}"]
        command += ["-addext", f"subjectAltName={san}"] if san else []
        command += ["-CA", "ca.crt", "-CAkey", "ca.key"] if name in ("server", "client") else []
        subprocess.run(command, cwd=directory, check=True, capture_output=True, timeout=30)
    return directory


@pytest.fixture
def guarded(keys: Path, start_exporter: StartExporter) -> Callable[..., str]:
    """Return a starter of exporters with TLS and a password, which returns https://127.0.0.1:PORT."""

    def start(more: str = "") -> str:
        hashed = bcrypt.hashpw(PASSWORD.encode(), bcrypt.gensalt(4)).decode()
        config = keys / "web.yml"
        config.write_text(
            f"tls_server_config: {{cert_file: server.crt, key_file: server.key{more}}}\n"
            f"basic_auth_users: {{alice: {hashed}}}\n"
        )
        return start_exporter(f"--web.config.file={config}").url.replace("http:", "https:")

    return start


def test_tls_and_a_password(guarded: Callable[..., str], keys: Path, run: Run) -> None:
    """As curl has it: --cacert, --insecure, a user; what is wrong is said in one sentence, with what would help."""
    address = guarded()
    trusted, alice = f"--cacert={keys / 'ca.crt'}", ("--user=alice",)
    wrong = "the name alice or its password is wrong"
    cases: list[tuple[tuple[str, ...], str, str]] = [
        ((trusted, *alice), PASSWORD, ""),
        (("--insecure", *alice), PASSWORD, ""),
        (alice, PASSWORD, r"its certificate is not trusted, unable to get local issuer.* \(--cacert names"),
        ((f"--cacert={keys / 'stranger.crt'}", *alice), PASSWORD, "its certificate is not trusted"),
        ((trusted, *alice), "guessed", rf"answered 401 Unauthorized \({wrong}\)"),
        ((trusted, *alice), "", rf"answered 401 Unauthorized \({wrong}\)"),
        ((trusted, "--user=bob"), PASSWORD, r"\(the name bob or its password is wrong\)"),
        ((trusted,), "", r"\(it wants --user, and the password in SHOAL_CHECK_PASSWORD\)"),
    ]
    for options, password, sentence in cases:
        done = run("check", f"--from={address}", "--interval=1", "--json", *options, SHOAL_CHECK_PASSWORD=password)
        document = json.loads(done.stdout)
        assert PASSWORD not in done.stdout + done.stderr
        if sentence:
            assert done.returncode == 3, options
            assert document["nodes"] == []
            assert re.search(sentence, document["failed"][address]), (options, document["failed"])
        else:
            assert document["failed"] == {}, options
            assert len(document["nodes"][0]["failures"]) == 14
    plain = run("check", f"--from={address.replace('https', 'http')}", "--interval=1")
    assert plain.returncode == 3
    assert "it ended the connection without an answer, perhaps for want of https://" in plain.stderr
    named = run("check", f"--from={address.replace('127.0.0.1', 'localhost')}", "--interval=1", trusted)
    assert "its certificate is not trusted, Hostname mismatch" in named.stderr


def test_a_password_is_asked_for_on_a_terminal(
    guarded: Callable[..., str], keys: Path, clean_environment: dict[str, str]
) -> None:
    """Where it is in no variable; what is typed is not shown, and Ctrl-D is no fault."""
    shoal = f"{sys.executable} -m shoal check --interval=1 --from={guarded()} --user=alice --cacert={keys / 'ca.crt'}"
    for typed, status in ((f"{PASSWORD}\n", (0, 1, 2)), ("guessed\n", (3,)), ("\x04", (3,))):
        with subprocess.Popen(
            ["script", "--quiet", "--return", "--command", shoal, "/dev/null"],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            env=clean_environment,
        ) as process:
            assert process.stdin
            assert process.stdout
            # Not before it is asked for: what is typed earlier is thrown away.
            shown = process.stdout.read(len("Password of alice: "))
            assert shown == "Password of alice: "
            process.stdin.write(typed)
            process.stdin.flush()
            shown = process.stdout.read()
            assert process.wait(timeout=30) in status, shown
        assert typed.strip() not in shown or typed == "\x04"
        assert "Traceback" not in shown
        assert "fault" not in shown


def test_a_certificate_of_the_client(guarded: Callable[..., str], keys: Path, run: Run) -> None:
    """--cert and --key, or one file with both."""
    address = guarded(", client_auth_type: RequireAndVerifyClientCert, client_ca_file: ca.crt")
    (keys / "both.pem").write_text((keys / "client.crt").read_text() + (keys / "client.key").read_text())
    common = ("check", f"--from={address}", "--interval=1", "--user=alice", f"--cacert={keys / 'ca.crt'}")

    def status(*options: str) -> tuple[int, str]:
        done = run(*common, *options, SHOAL_CHECK_PASSWORD=PASSWORD)
        return done.returncode, done.stderr

    def pair(name: str) -> tuple[str, ...]:
        return (f"--cert={keys / name}.crt", f"--key={keys / name}.key")

    for options in (pair("client"), (f"--cert={keys / 'both.pem'}",)):
        code, said = status(*options)
        assert code in (0, 1, 2), said
    for options in ((), pair("stranger")):
        code, said = status(*options)
        assert code == 3
        assert re.search(r"the TLS handshake failed|it ended the connection", said)
        assert said.count("\n") == 1


def test_certificates_that_are_only_old_fashioned(monkeypatch: pytest.MonkeyPatch) -> None:
    """Python 3.13 refuses what has no key usage or key identifier; curl and Prometheus do not, so neither does this."""
    make = ssl.create_default_context

    def as_in_3_13(**arguments: Any) -> ssl.SSLContext:
        context = make(**arguments)
        context.verify_flags |= ssl.VERIFY_X509_STRICT
        return context

    monkeypatch.setattr(ssl, "create_default_context", as_in_3_13)
    _, _, tls = command._access(argparse.Namespace(user="", cacert="", cert="", key="", insecure=False))
    assert not tls.verify_flags & ssl.VERIFY_X509_STRICT
    assert tls.verify_mode is ssl.CERT_REQUIRED
    assert tls.check_hostname


def test_no_tls_there(node: Callable[..., str], run: Run) -> None:
    """The other way round: https:// to an exporter without."""
    done = run("check", f"--from={node('no').replace('http:', 'https:')}", "--interval=1")
    assert done.returncode == 3
    assert "the TLS handshake failed, " in done.stderr


@pytest.fixture
def peer() -> Iterator[Callable[[Callable[[socket.socket], object]], str]]:
    """Return a function that gives each connection, once a request has come, to a script, and returns the address."""
    sockets: list[socket.socket] = []

    def listen(script: Callable[[socket.socket], object]) -> str:
        listener = socket.create_server(("127.0.0.1", 0))
        sockets.append(listener)

        def serve() -> None:
            with contextlib.suppress(OSError):
                while True:
                    connection, _ = listener.accept()
                    sockets.append(connection)
                    threading.Thread(target=answer, args=(connection,), daemon=True).start()

        def answer(connection: socket.socket) -> None:
            with connection, contextlib.suppress(OSError):
                connection.recv(65536)
                script(connection)

        threading.Thread(target=serve, daemon=True).start()
        return f"127.0.0.1:{listener.getsockname()[1]}"

    yield listen
    for one in sockets:
        with contextlib.suppress(OSError):
            one.shutdown(socket.SHUT_RDWR)
        one.close()


def said(address: str) -> str:
    """Return what is said of an address that is no exporter."""
    with pytest.raises(SourceError) as caught:
        Remote(address).scrape()
    assert address in str(caught.value)
    return str(caught.value)


def packed(body: bytes) -> bytes:
    """Return an answer whose body is compressed, though nobody asked for that."""
    data = gzip.compress(body)
    return OK + b"Content-Encoding: gzip\r\nContent-Length: %d\r\n\r\n" % len(data) + data


@pytest.mark.parametrize(
    ("answer", "sentence"),
    [
        (b"", "it ended the connection without an answer"),
        (b"SSH-2.0-OpenSSH_9.6\r\n", "does not speak HTTP"),
        (b"HTTP/1.1 200 OK\r\nContent-Le", "text format, or was cut off|no shoal_build_info"),
        (OK + b"Content-Length: 10000\r\n\r\n" + BUILD, "was cut off"),
        (OK + b"Transfer-Encoding: chunked\r\n\r\n26\r\n" + BUILD + b"\r\n40\r\nshoal_si", "was cut off"),
        (OK + b"\r\n" + BUILD + b"shoal_listen_queue_overflows_to", "was cut off"),
        (OK + b"\r\n<!DOCTYPE html><p>Please log in</p>\n", "is not Prometheus' text format"),
        (OK + b"\r\n" + bytes(range(256)) * 20 + b"\n", "is not Prometheus' text format"),
        (OK + b"\r\n" + BUILD.replace(b"1\n", b"one\n"), "is not Prometheus' text format"),
        (packed(BUILD), "is not Prometheus' text format"),
        (packed(bytes(200 << 20)), "is not Prometheus' text format"),
        (OK + b"\r\n", "has no shoal_build_info, so it is no Shoal exporter"),
        (OK + b"\r\n" + b"x 1\n" * (5 << 20), "the answer is longer than 16 MiB"),
        (
            b"HTTP/1.1 302 Found\r\nLocation: http://127.0.0.1:9/\r\n\r\n",
            r"302 Found \(it leads to 'http://127.0.0.1:9/'",
        ),
        (b"HTTP/1.1 301 Moved\r\n\r\n", "answered 301 Moved"),
        (b"HTTP/1.1 503 Service Unavailable\r\n\r\n", "answered 503 Service Unavailable"),
    ],
    ids=lambda value: str(value[:40]) if isinstance(value, bytes) else "",
)
def test_what_answers_is_no_exporter(answer: bytes, sentence: str, peer: Callable[..., str]) -> None:
    """Another server, a login page, noise, half an answer, too long a one: a sentence with the address."""
    assert re.search(sentence, said(peer(lambda connection: connection.sendall(answer))))


def test_a_redirect_gets_no_password(peer: Callable[..., str], run: Run) -> None:
    """It is not followed: who can answer for an exporter must not get the password sent to wherever he likes."""
    asked: list[bool] = []
    thief = peer(lambda _: asked.append(True))
    redirect = f"HTTP/1.1 302 Found\r\nLocation: http://{thief}/metrics\r\n\r\n".encode()
    honest = peer(lambda connection: connection.sendall(redirect))
    done = run("check", f"--from={honest}", "--interval=1", "--user=alice", SHOAL_CHECK_PASSWORD=PASSWORD)
    assert done.returncode == 3
    assert f"it leads to 'http://{thief}/metrics'" in done.stderr
    assert asked == []


def silence(connection: socket.socket) -> None:
    """Say nothing, as an exporter does that is stopped."""
    connection.recv(1)


def drip(connection: socket.socket, head: bytes, drop: bytes) -> None:
    """Say something now and then, so that no single wait is long."""
    connection.sendall(head)
    for _ in range(300):
        connection.sendall(drop)
        time.sleep(0.1)


@pytest.mark.parametrize(
    "script",
    [
        silence,
        lambda connection: drip(connection, OK + b"X-A: ", b"x"),
        lambda connection: drip(connection, OK + b"\r\n", b"shoal_x 1\n"),
    ],
    ids=["silence", "headers without end", "a body without end"],
)
def test_nobody_is_waited_for_for_ever(
    script: Callable[[socket.socket], None], peer: Callable[..., str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """However it keeps the connection alive: 15 s in all, of which this test waits two."""
    assert sources._ANSWER == 15
    monkeypatch.setattr(sources, "_ANSWER", 2.0)
    address = peer(script)
    began = time.monotonic()
    assert re.search("did not (answer|end) within 2 s", said(address))
    assert time.monotonic() - began < 6


@pytest.mark.parametrize(
    ("address", "sentence"),
    [
        ("127.0.0.1:1", "cannot be reached: Connection refused"),
        ("http://[::1]:1/metrics", "cannot be reached: (Connection refused|Cannot assign|Network is unreach)"),
        ("http://no-such-host.invalid:7462", "cannot be reached: .*(not known|name resolution)"),
        ("ftp://node", "is no address such as http://node:7462"),
        ("http://", "is no address"),
        ("http://:7462", "is no address"),
        ("http://node:port", "is no address"),
        ("http://node:0", "is no address"),
        ("http://node:99999", "is no address"),
        ("http://[::1", "is no address"),
        ("http://no de:7462", "is no address"),
        ("http://nöde:7462", "is no address"),
        ("http://node:7462/\x1b[31m", "is no address"),
        ("", "is no address"),
    ],
)
def test_a_wrong_address(address: str, sentence: str) -> None:
    """Each is told from the others, and nothing else happens."""
    with pytest.raises(SourceError, match=sentence):
        Remote(address).scrape()


HANGS = """
import sys, time
from shoal.collectors.conntrack import ConntrackCollector
ConntrackCollector.read = lambda collector, node: time.sleep(600)
from shoal.cli import main
sys.exit(main())
"""


def test_an_exporter_whose_read_hangs(start_exporter: StartExporter, run: Run) -> None:
    """It answers with the rest after 10 s, and so does this; what hangs is told apart from what is well."""
    exporter = start_exporter(program=("-c", HANGS))
    began = time.monotonic()
    done = run("check", f"--from={exporter.url}", "--interval=1", "--json")
    assert 10 < time.monotonic() - began < 25
    found = {one["name"]: one for one in json.loads(done.stdout)["nodes"][0]["failures"]}
    for failure in ("conntrack-full", "stale-backend"):
        assert found[failure]["status"] == "cannot tell"
        assert "did not finish in time" in found[failure]["why"]
    assert found["listen-queue"]["status"] != "cannot tell"


def test_rates_are_of_the_time_between_the_reads(node: Callable[..., str], run: Run) -> None:
    """A node that takes seconds to answer was read when it was asked: otherwise every rate would be too high."""
    signals = "".join(
        f'shoal_signal_available{{signal="{signal}"}} 1\n' for signal in ("delays_run_queue", "delays_throttling")
    )
    address = node(BUILD.decode() + signals, delays=(3.0,))
    done = run("check", f"--from={address}", "--interval=1", "--json")
    assert 3.9 < json.loads(done.stdout)["nodes"][0]["seconds"] < 8
