"""TLS, passwords and headers as clients see them, with node_exporter given the same file as the witness."""

from __future__ import annotations

import asyncio
import base64
import contextlib
import http.client
import os
import re
import shutil
import socket
import ssl
import subprocess
import sys
import threading
import time
from contextlib import ExitStack
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any, Protocol, cast

import bcrypt
import pytest
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st

from shoal import web_auth
from shoal.settings import OPTIONS, SettingsError
from shoal.web_auth import Passwords, TooManyError
from shoal.web_config import WebConfig

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from tests.unit.conftest import Exporter, StartExporter

pytestmark = pytest.mark.slow

DOCUMENT = Path(__file__).parents[2] / "docs" / "web-config.md"
# One is enough here, and quick.
ONE_COLLECTOR = tuple(
    f"--no-{option.key}"
    for option in OPTIONS
    if option.key.startswith("collector.") and option.key != "collector.pressure"
)
PASSWORD = "the password of a test"  # noqa: S105
HASH = bcrypt.hashpw(PASSWORD.encode(), bcrypt.gensalt(4)).decode()
TLS = "tls_server_config: {cert_file: server.crt, key_file: server.key"
CLIENTS = "client_auth_type: RequireAndVerifyClientCert, client_ca_file: ca.crt"
USERS = f"basic_auth_users: {{alice: {HASH}}}\n"


@pytest.fixture(scope="module")
def keys(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Make a certificate authority, what it signed, and what it did not."""
    directory = tmp_path_factory.mktemp("keys")

    def openssl(*arguments: str) -> None:
        subprocess.run(["openssl", *arguments], cwd=directory, check=True, capture_output=True, timeout=30)

    def make(name: str, sans: str, *signed: str) -> None:
        key = ("-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:prime256v1", "-nodes", "-keyout", f"{name}.key")
        about = ("-subj", f"/CN={name}", *(("-addext", f"subjectAltName={sans}") if sans else ()))
        openssl("req", "-x509", *key, "-out", f"{name}.crt", "-days", "2", *about, *signed)

    make("ca", "")
    by_ca = ("-CA", "ca.crt", "-CAkey", "ca.key")
    for name in ("server", "renewed"):
        make(name, "DNS:localhost,IP:127.0.0.1", *by_ca)
    make("prometheus", "DNS:prometheus.example,URI:spiffe://example/prometheus,email:p@example", *by_ca)
    make("address", "IP:2001:db8::1", *by_ca)
    make("nameless", "", *by_ca)
    make("stranger", "DNS:prometheus.example")
    openssl("ec", "-in", "server.key", "-aes128", "-passout", "pass:x", "-out", "encrypted.key")
    (directory / "empty.crt").touch()
    (directory / "noise.crt").write_bytes(os.urandom(200))
    os.mkfifo(directory / "pipe.crt")
    return directory


@pytest.fixture
def place(keys: Path, tmp_path: Path) -> Path:
    """Return a directory of the test's own with the keys, for its web.yml."""
    directory = tmp_path / "web"
    directory.mkdir()
    for path in keys.iterdir():
        if path.is_file():
            shutil.copy(path, directory)
    os.mkfifo(directory / "pipe.crt")
    return directory


def written(place: Path, text: str) -> Path:
    """Write web.yml as a careful person does, at once."""
    (place / "new.yml").write_text(text)
    return (place / "new.yml").rename(place / "web.yml")


def basic(user: str, password: str) -> str:
    """Return the value of an Authorization header."""
    return "Basic " + base64.b64encode(f"{user}:{password}".encode()).decode()


@dataclass(frozen=True)
class Asker:
    """A client: what it says who it is, and which TLS it speaks."""

    user: str | None = "alice"
    says: str = PASSWORD
    certificate: str = ""
    header: str = ""
    versions: tuple[ssl.TLSVersion, ssl.TLSVersion] = (ssl.TLSVersion.TLSv1_2, ssl.TLSVersion.TLSv1_3)
    ciphers: str = ""
    curve: str = ""
    plain: bool = False
    seen: dict[str, Any] = field(default_factory=dict, compare=False)

    def context(self, keys: Path) -> ssl.SSLContext:
        """Return what it connects with; it checks the server's certificate."""
        context = ssl.create_default_context(cafile=str(keys / "ca.crt"))
        # As `openssl req` makes them, these have no key identifier, which Python 3.13 would want.
        context.verify_flags &= ~ssl.VERIFY_X509_STRICT
        context.minimum_version, context.maximum_version = self.versions
        if self.ciphers:
            context.set_ciphers(self.ciphers)
        if self.curve:
            context.set_ecdh_curve(self.curve)
        if self.certificate:
            context.load_cert_chain(keys / f"{self.certificate}.crt", keys / f"{self.certificate}.key")
        return context

    def headers(self) -> dict[str, str]:
        """Return the header that says who asks."""
        if self.header:
            return {"Authorization": self.header}
        if self.user is None:
            return {}
        return {"Authorization": basic(self.user, self.says)}

    def ask(self, port: int, keys: Path, path: str = "/metrics") -> int | str:
        """Return the status, or "refused" when the connection was ended without an answer."""
        connection = (
            http.client.HTTPConnection("127.0.0.1", port, timeout=20)
            if self.plain
            else http.client.HTTPSConnection("127.0.0.1", port, timeout=20, context=self.context(keys))
        )
        try:
            connection.request("GET", path, headers=self.headers())
            answer = connection.getresponse()
            self.seen.update(headers=answer.headers, body=answer.read())
        except (OSError, http.client.HTTPException):
            return "refused"
        finally:
            connection.close()
        return answer.status


def port_of(exporter: Exporter) -> int:
    """Return where an exporter listens."""
    return int(exporter.url.rpartition(":")[2])


# As the command, looking at its files more often, and less patient.
HURRIED = """
import sys
from shoal import listener, server, web_config
from shoal.cli import main
web_config._INTERVAL = 0.5
server._IDLE = listener._HANDSHAKE = float(sys.argv.pop()) if sys.argv[-1].isdigit() else 10.0
sys.exit(main())
"""


class Start(Protocol):
    """The type of the fixture `start`."""

    def __call__(self, text: str, *arguments: str, program: tuple[str, ...] = ("-c", HURRIED)) -> Exporter:
        """Start an exporter with this text as its web.yml."""


@pytest.fixture
def start(start_exporter: StartExporter, place: Path) -> Start:
    """Return a starter of exporters."""

    def start(text: str, *arguments: str, program: tuple[str, ...] = ("-c", HURRIED)) -> Exporter:
        file = written(place, text)
        return start_exporter(f"--web.config.file={file}", *ONE_COLLECTOR, *arguments, program=program)

    return start


@pytest.fixture
def witness(place: Path) -> Iterator[Callable[[], int]]:
    """Return a starter of node_exporter with the same web.yml, which returns its port."""
    with ExitStack() as stack:

        def start() -> int:
            command = [
                "prometheus-node-exporter",
                f"--web.config.file={place / 'web.yml'}",
                "--web.listen-address=127.0.0.1:0",
                "--collector.disable-defaults",
            ]
            log_file = place / "witness.log"
            with log_file.open("wb") as log:
                process = subprocess.Popen(command, stderr=log)
            stack.callback(process.wait)
            stack.callback(process.kill)
            until = time.monotonic() + 20
            while not (match := re.search(r"address=127\.0\.0\.1:(\d+)", log_file.read_text())):
                assert process.poll() is None, log_file.read_text()
                assert time.monotonic() < until, log_file.read_text()
                time.sleep(0.02)
            return int(match[1])

        yield start


# {file: {who asks: status}}
COMMON: dict[str, dict[Asker, int | str]] = {
    "{}": {Asker(None, plain=True): 200, Asker(plain=True): 200, Asker(): "refused"},
    USERS: {
        Asker(plain=True): 200,
        Asker(says="wrong", plain=True): 401,
        Asker(says="", plain=True): 401,
        Asker("bob", plain=True): 401,
        Asker("", plain=True): 401,
        Asker(None, plain=True): 401,
        Asker(header="Basic", plain=True): 401,
        Asker(header="Basic !!!", plain=True): 401,
        Asker(header="Basic " + base64.b64encode(b"alice").decode(), plain=True): 401,
        Asker(header=basic("alice", PASSWORD).replace("Basic", "bAsIc"), plain=True): 200,
        Asker(header=f"Bearer {PASSWORD}", plain=True): 401,
        Asker(header="Basic " + base64.b64encode(b"\xff\xfe:\xff").decode(), plain=True): 401,
        Asker(says=HASH, plain=True): 401,
    },
    TLS + "}\n" + USERS: {
        Asker(): 200,
        Asker(says="wrong"): 401,
        Asker("bob"): 401,
        Asker(None): 401,
        Asker(versions=(ssl.TLSVersion.TLSv1_2,) * 2): 200,
        Asker(certificate="stranger"): 200,
    },
    TLS + f", {CLIENTS}}}\n" + USERS: {
        Asker(certificate="prometheus"): 200,
        Asker(certificate="prometheus", says="wrong"): 401,
        Asker(certificate="stranger"): "refused",
        Asker(): "refused",
        Asker(versions=(ssl.TLSVersion.TLSv1_2,) * 2): "refused",
    },
    TLS + ", client_auth_type: VerifyClientCertIfGiven, client_ca_file: ca.crt}": {
        Asker(certificate="prometheus"): 200,
        Asker(): 200,
        Asker(certificate="stranger"): "refused",
    },
    # A certificate that is named is trusted by itself, whoever signed it.
    TLS + ", client_auth_type: RequireAndVerifyClientCert, client_ca_file: prometheus.crt}": {
        Asker(certificate="prometheus"): 200,
        Asker(certificate="address"): "refused",
    },
    TLS + ", client_auth_type: RequestClientCert}": {Asker(certificate="stranger"): 200, Asker(): 200},
    TLS + ", min_version: TLS13}": {Asker(): 200, Asker(versions=(ssl.TLSVersion.TLSv1_2,) * 2): "refused"},
    TLS + ", max_version: TLS12}": {Asker(): 200, Asker(versions=(ssl.TLSVersion.TLSv1_3,) * 2): "refused"},
    # Go's HTTP/2 would want another suite too.
    TLS
    + ", max_version: TLS12, cipher_suites: [TLS_ECDHE_ECDSA_WITH_AES_256_GCM_SHA384]}\n"
    + "http_server_config: {http2: false}": {
        Asker(): 200,
        Asker(ciphers="ECDHE-ECDSA-AES256-GCM-SHA384"): 200,
        Asker(ciphers="ECDHE-ECDSA-AES128-GCM-SHA256"): "refused",
    },
    TLS + ", curve_preferences: [CurveP384]}": {
        Asker(curve="secp384r1"): 200,
        Asker(curve="prime256v1"): "refused",
    },
    # A password is looked at up to its 72nd byte.
    "basic_auth_users:\n  ü: " + bcrypt.hashpw(b"x" * 72, bcrypt.gensalt(4)).decode() + "\n": {
        Asker("ü", "x" * 72, plain=True): 200,
        Asker("ü", "x" * 71, plain=True): 401,
        Asker("ü", "x\0" * 72, plain=True): 401,
    },
}


@pytest.mark.parametrize("text", COMMON, ids=[f"file {number}" for number in range(len(COMMON))])
def test_the_same_file_gives_the_same_answers(text: str, start: Start, witness: Callable[[], int], place: Path) -> None:
    """Whoever asks, node_exporter answers alike."""
    exporter = start(text)
    ours, theirs = port_of(exporter), witness()
    for asker, status in COMMON[text].items():
        found = {"here": asker.ask(ours, place), "there": asker.ask(theirs, place)}
        assert found == {"here": status, "there": status}, asker
    assert exporter.stop()[0] == 0
    assert "Traceback" not in exporter.log


def promtool(file: Path) -> bool:
    """Tell whether promtool takes a web configuration file."""
    ended = subprocess.run(
        ["promtool", "check", "web-config", file], capture_output=True, text=True, timeout=20, check=False
    )
    assert ended.returncode in (0, 1)
    return ended.returncode == 0


def test_the_example_of_the_documentation(place: Path) -> None:
    """It is taken here and by promtool, with the files it names beside it."""
    (text,) = re.findall(r"```yaml\n(.*?)```", DOCUMENT.read_text(encoding="utf-8"), re.DOTALL)
    shutil.copy(place / "ca.crt", place / "clients.crt")
    config = WebConfig(str(written(place, text))).current
    assert config.tls
    assert config.tls.verify_mode == ssl.CERT_REQUIRED
    assert list(config.users) == [b"prometheus"]
    assert config.headers == {"Strict-Transport-Security": "max-age=63072000"}
    assert promtool(place / "web.yml")


def indented(path: Path) -> str:
    """Return the content of a file for a YAML block."""
    return "\n" + "".join(f"    {line}\n" for line in path.read_text().splitlines())


@pytest.mark.parametrize("more", ["", ", cipher_suites: [TLS_ECDHE_ECDSA_WITH_AES_128_CBC_SHA]"])
def test_tls_below_1_2_is_not_spoken(more: str, place: Path) -> None:
    """Unless the file asks for more, 1.2 is the least; a client of today's OpenSSL could not even ask for less."""
    config = WebConfig(str(written(place, TLS + more + "}"))).current
    assert config.tls
    assert config.tls.minimum_version == ssl.TLSVersion.TLSv1_2


def test_certificates_may_stand_in_the_file(start: Start, place: Path) -> None:
    """With the key and the authority of clients, as newer versions of the toolkit allow."""
    text = "tls_server_config:\n  client_auth_type: RequireAndVerifyClientCert\n"
    for name, file in (("cert", "server.crt"), ("key", "server.key"), ("client_ca", "ca.crt")):
        text += f"  {name}: |{indented(place / file)}"
    port = port_of(start(text))
    assert Asker(certificate="prometheus").ask(port, place) == 200
    assert Asker().ask(port, place) == "refused"


SECTION = "tls_server_config"
# (file, the end of the sentence, whether promtool refuses it too)
BAD: list[tuple[str, str, bool]] = [
    ("[1, 2]", "it should have keys and values below it", True),
    ("text", "it should have keys and values below it", True),
    ("a: b: c", "it is not YAML, line 1: mapping values are not allowed here", True),
    ("a: *hidden", "it is not YAML, line 1", True),
    ("{a: 1", "it is not YAML, line 1", True),
    ("tls_sever_config: {}", "there is no key tls_sever_config; did you mean tls_server_config?", True),
    (TLS + ", cert_fle: x}", f"there is no key {SECTION}.cert_fle; did you mean cert_file?", True),
    ("http_server_config: {http3: true}", "there is no key http_server_config.http3; did you mean http2?", True),
    ("basic_auth_users: {}\nbasic_auth_users: {}", "key basic_auth_users is given twice", True),
    (f"basic_auth_users: {{a: '{HASH}', a: '{HASH}'}}", "key basic_auth_users.a is given twice", True),
    ("? [x]\n: y", "line 1 should have a name for its key", True),
    ("basic_auth_users: alice", "basic_auth_users should have keys and values below it", True),
    ("basic_auth_users: {alice: secret}", "basic_auth_users.alice should be a bcrypt hash of a cost", True),
    ("basic_auth_users: {alice: }", "basic_auth_users.alice should be a bcrypt hash of a cost", True),
    ("basic_auth_users: {alice: [x]}", "basic_auth_users.alice should be one value", True),
    (
        "basic_auth_users: {alice: " + HASH.replace("$04$", "$31$") + "}",
        "basic_auth_users.alice should be a bcrypt hash of a cost from 4 to 18",
        False,
    ),
    (f"basic_auth_users: {{'a:b': {HASH}}}", "basic_auth_users, line 1 should begin with a user's name", False),
    (f"{SECTION}: {{key_file: server.key}}", f"{SECTION}.cert_file is missing", True),
    (f"{SECTION}: {{cert_file: server.crt}}", f"{SECTION}.key_file is missing", True),
    (f"{SECTION}: {{min_version: TLS12}}", f"{SECTION}.cert_file is missing", False),
    (TLS.replace("server.crt", "no.crt") + "}", f"{SECTION}.cert_file cannot be read: ", True),
    (TLS.replace("server.crt", ".") + "}", f"{SECTION}.cert_file ", True),
    (TLS.replace("server.crt", "'\\0'") + "}", f"{SECTION}.cert_file ", True),
    (TLS.replace("server.crt", '"a\\0b"') + "}", f"{SECTION}.cert_file is no name of a file", True),
    (TLS.replace("server.crt", "pipe.crt") + "}", f"{SECTION}.cert_file should name a regular file", False),
    (TLS.replace("server.crt", "empty.crt") + "}", f"{SECTION}.cert_file should name a file in PEM format", True),
    (TLS.replace("server.crt", "noise.crt") + "}", f"{SECTION}.cert_file should be a certificate in PEM", True),
    (TLS.replace("server.crt", "server.key") + "}", f"{SECTION}.cert_file should be a certificate in PEM", True),
    (TLS.replace("server.key", "server.crt") + "}", f"{SECTION}.key_file should be a private key in PEM", True),
    (TLS.replace("server.key", "renewed.key") + "}", f"{SECTION}.key_file is not the key of {SECTION}.cert_file", True),
    (TLS.replace("server.key", "encrypted.key") + "}", f"{SECTION}.key_file is encrypted, and there is nobody", True),
    (TLS + ", cert: x}", f"{SECTION}.cert and {SECTION}.cert_file cannot be combined", True),
    (TLS + ", min_version: TLS11}", f"{SECTION}.min_version should be one of TLS12, TLS13", False),
    (TLS + ", min_version: 1.2}", f"{SECTION}.min_version should be one of TLS12, TLS13", True),
    (TLS + ", min_version: TLS13, max_version: TLS12}", f"{SECTION}.min_version should not be above", False),
    (TLS + ", cipher_suites: [RC4]}", f"{SECTION}.cipher_suites has a name that is none of Go's secure suites", True),
    (
        TLS + ", cipher_suites: [TLS_ECDHE_ECDSA_WITH_AES_128_GCM_SHA]}",
        "none of Go's secure suites; did you mean TLS_ECDHE_ECDSA_WITH_AES_128_GCM_SHA256?",
        True,
    ),
    (TLS + ", cipher_suites: TLS_AES_128_GCM_SHA256}", f"{SECTION}.cipher_suites should be a list", True),
    (
        TLS + ", max_version: TLS12, cipher_suites: [TLS_AES_128_GCM_SHA256]}",
        f"{SECTION}.cipher_suites should have a suite of TLS 1.2",
        False,
    ),
    (TLS + ", prefer_server_cipher_suites: maybe}", "prefer_server_cipher_suites should be one of true, false", True),
    (TLS + ", curve_preferences: [CurveP256, X25519]}", f"{SECTION}.curve_preferences should be left out", False),
    (TLS + ", curve_preferences: [P256]}", f"{SECTION}.curve_preferences should be left out", True),
    (TLS + ", client_auth_type: Require}", f"{SECTION}.client_auth_type should be one of NoClientCert", True),
    (TLS + ", client_auth_type: RequireAnyClientCert, client_ca_file: ca.crt}", "should be one of NoClientCert", False),
    (TLS + ", client_auth_type: RequireAndVerifyClientCert}", f"{SECTION}.client_ca_file is missing", False),
    (TLS + ", client_ca_file: ca.crt}", f"{SECTION}.client_ca_file needs client_auth_type", True),
    (TLS + f", {CLIENTS}}}".replace("ca.crt", "noise.crt"), f"{SECTION}.client_ca_file should be certificates", False),
    (TLS + f", {CLIENTS}}}".replace("ca.crt", "no.crt"), f"{SECTION}.client_ca_file cannot be read", True),
    (TLS + f", {CLIENTS}, client_allowed_sans: []}}", f"{SECTION}.client_allowed_sans should have at least", True),
    (TLS + ", client_allowed_sans: [x]}", f"{SECTION}.client_allowed_sans needs client_auth_type", True),
    ("http_server_config: {http2: maybe}", "http_server_config.http2 should be one of true, false", True),
    ("http_server_config: {headers: {Server: x}}", "there is no key http_server_config.headers.Server", True),
    ("http_server_config: {headers: {X-Frame-Options: no}}", "X-Frame-Options should be deny or sameorigin", True),
    (
        'http_server_config: {headers: {X-XSS-Protection: "a\\r\\nSet-Cookie: b"}}',
        "http_server_config.headers.X-XSS-Protection should be one line of ASCII characters",
        False,
    ),
    ("hidden as it is: x", "there is no key in line 1; there are tls_server_config, ", True),
    ("rate_limit: {burst: 1}", "there is no key rate_limit; there are tls_server_config, ", True),
]


@pytest.mark.parametrize(("text", "sentence", "refused"), BAD, ids=[f"file {number}" for number in range(len(BAD))])
def test_a_bad_file_is_one_sentence(
    text: str,
    sentence: str,
    refused: bool,  # noqa: FBT001  (a parameter)
    place: Path,
) -> None:
    """It names the file, the key and what is right, and has nothing secret in it. promtool refuses most of them too."""
    file = written(place, text)
    with pytest.raises(SettingsError) as error:
        WebConfig(str(file))
    said = str(error.value)
    assert said.startswith(f"web configuration file {file}: ")
    assert sentence in said
    assert "\n" not in said
    assert not said.endswith(".")
    assert "hidden" not in said
    assert "secret" not in said.replace("secure", "")
    assert HASH not in said
    # promtool would wait for the pipe's writer for ever.
    assert "pipe" in text or promtool(file) is not refused


def test_a_bad_file_ends_the_start_with_status_2(place: Path, clean_environment: dict[str, str]) -> None:
    """As other bad settings do, whether it is there or not."""
    for text, sentence in (
        ("basic_auth_users: {alice: hunter2}", "basic_auth_users.alice should be a bcrypt hash of a cost from 4 to 18"),
        (TLS + ", cert_fle: x}", f"there is no key {SECTION}.cert_fle; did you mean cert_file? See"),
        (None, "the file cannot be read: "),
    ):
        file = written(place, text) if text else place / "nowhere.yml"
        ended = subprocess.run(
            [sys.executable, "-m", "shoal", f"--web.config.file={file}"],
            env=clean_environment,
            capture_output=True,
            text=True,
            timeout=20,
            check=False,
        )
        assert ended.returncode == 2
        assert ended.stderr.startswith(
            f"shoal-exporter: web configuration file {file}: {sentence.removesuffix(' See')}"
        )
        assert ended.stderr.count("\n") == 1
        assert "hunter2" not in ended.stderr


@given(st.text() | st.binary())
@example("basic_auth_users: &a {x: *a}")
@example("&a [*a]")
@example("[" * 5000)
@example("tls_server_config: {cert: !!python/object/apply:os.system [x]}")
@example("tls_server_config: {cipher_suites: &a [*a]}")
@settings(suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_whatever_the_file_is(tmp_path: Path, content: str | bytes) -> None:
    """It is taken or refused in one sentence; nothing else is raised."""
    file = tmp_path / "web.yml"
    file.write_bytes(content if isinstance(content, bytes) else content.encode("utf-8", "surrogatepass"))
    try:
        WebConfig(str(file))
    except SettingsError as error:
        assert "\n" not in str(error).replace(str(file), "")  # noqa: PT017  (either is right)


def test_a_large_file_is_not_read(tmp_path: Path) -> None:
    """Somebody named the wrong one."""
    file = tmp_path / "web.yml"
    with file.open("wb") as large:
        large.truncate(1 << 40)
    with pytest.raises(SettingsError, match="at most 1 MiB"):
        WebConfig(str(file))


@pytest.mark.parametrize(
    ("names", "statuses"),
    [
        ("[prometheus.example]", {"prometheus": 200, "address": 403, "nameless": 403, "stranger": "refused"}),
        ("[other, 'spiffe://example/prometheus', '2001:DB8:0::1']", {"prometheus": 200, "address": 200}),
        ("[p@example, '2001:db8::2']", {"prometheus": 200, "address": 403}),
        ("[PROMETHEUS.EXAMPLE, example, nameless]", {"prometheus": 403, "nameless": 403}),
    ],
)
def test_names_of_client_certificates(names: str, statuses: dict[str, int | str], start: Start, place: Path) -> None:
    """One of the alternative names, of whatever kind, and exactly; those of a stranger's certificate do not count."""
    port = port_of(start(TLS + f", {CLIENTS}, client_allowed_sans: {names}}}"))
    for certificate, status in statuses.items():
        for path in ("/metrics", "/-/healthy", "/"):
            assert Asker(certificate=certificate).ask(port, place, path) == status


def test_a_resumed_session_is_still_somebodys(start: Start, place: Path) -> None:
    """A client that resumes its session does not send its certificate again; its names are known all the same."""
    port = port_of(start(TLS + f", {CLIENTS}, client_allowed_sans: [prometheus.example], max_version: TLS12}}"))
    context = Asker(certificate="prometheus").context(place)
    session = None
    for resumed in (False, True):
        with socket.create_connection(("127.0.0.1", port)) as plain:
            client = context.wrap_socket(plain, server_hostname="127.0.0.1", session=session)
            client.sendall(b"GET /-/ready HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n")
            assert client.recv(1000).startswith(b"HTTP/1.1 200 ")
            assert client.session_reused is resumed
            session = client.session
            client.close()


def test_probes_need_no_password(start: Start, place: Path) -> None:
    """Whoever asks and however wrongly; everything else does, also what is not there."""
    port = port_of(start(TLS + "}\n" + USERS))
    for asker in (Asker(None), Asker("bob"), Asker(header="junk")):
        for path in ("/-/healthy", "/-/ready"):
            assert asker.ask(port, place, path) == 200
            assert asker.seen["body"] == b"ok\n"
    for path in ("/", "/metrics", "/nowhere", "/-/healthy/", "//-/healthy", "/-/healthy/../../metrics", "/-/healthyx"):
        asker = Asker(None)
        assert asker.ask(port, place, path) == 401
        assert asker.seen["body"] == b"401: Unauthorized"
        assert asker.seen["headers"]["WWW-Authenticate"] == 'Basic realm="shoal", charset="UTF-8"'
    assert Asker(None).ask(port, place, "/%2D/ready") == 200


def test_headers_are_on_every_answer(start: Start, place: Path) -> None:
    """Those with a value, on success and on errors; http2 is logged if it is asked for, and only then."""
    text = "http_server_config: {headers: {X-Frame-Options: deny, Content-Security-Policy: default-src 'self', "
    text += "X-Content-Type-Options: }, http2: "
    exporter = start(f"{text}true}}\n{USERS}")
    for asker, path, status in (
        (Asker(plain=True), "/metrics", 200),
        (Asker(None, plain=True), "/metrics", 401),
        (Asker(plain=True), "/nowhere", 404),
        (Asker(plain=True), "/metrics?collect[]=x", 400),
    ):
        assert asker.ask(port_of(exporter), place, path) == status
        assert asker.seen["headers"]["X-Frame-Options"] == "deny"
        assert asker.seen["headers"]["Content-Security-Policy"] == "default-src 'self'"
        assert "X-Content-Type-Options" not in asker.seen["headers"]
    assert exporter.log.count("there is HTTP/1.1 only") == 1
    exporter.stop()
    assert "HTTP/1.1 only" not in start(f"{text}false}}").log
    assert "HTTP/1.1 only" not in start("{}").log


def test_secrets_are_nowhere(start: Start, place: Path) -> None:
    """Not in the log at its most talkative, on any page, in the arguments or the environment."""
    exporter = start(TLS + "}\n" + USERS, "--log.level=debug")
    port = port_of(exporter)
    said = b""
    for asker in (Asker(), Asker(says=PASSWORD + "x"), Asker("bob", "word of bob")):
        for path in ("/", "/metrics", "/nowhere", "/-/ready"):
            asker.ask(port, place, path)
            said += asker.seen["body"]
    written(place, USERS.replace("$04$", "$4$"))
    wait_for(lambda: "is wrong" in exporter.log)
    (place / "web.yml").write_text(f"{PASSWORD}: {HASH}\n{PASSWORD}: &{HASH}")
    wait_for(lambda: exporter.log.count("is wrong") == 2)
    process = Path(f"/proc/{exporter.process.pid}")
    said += exporter.log.encode() + (process / "cmdline").read_bytes() + (process / "environ").read_bytes()
    key = (place / "server.key").read_text().splitlines()[1]
    for secret in (PASSWORD, HASH, HASH[10:], "word of bob", key, basic("alice", PASSWORD)):
        assert secret.encode() not in said


def wait_for(condition: Callable[[], object], seconds: float = 60) -> None:
    """Return when something is true."""
    until = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < until, "it does not become true"
        time.sleep(0.05)


def says(exporter: Exporter, text: str, times: int = 1) -> bool:
    """Tell whether an exporter has said something so many times."""
    return exporter.log.count(text) == times


def reload_state(port: int, place: Path, **who: Any) -> tuple[float, float]:
    """Return the two metrics about the last reload."""
    asker = Asker(**who)
    assert asker.ask(port, place) == 200
    text = asker.seen["body"].decode()
    names = ("successful", "success_timestamp_seconds")
    found = [re.search(rf"^shoal_web_config_last_reload_{name} (\S+)$", text, re.MULTILINE) for name in names]
    return float(found[0][1]), float(found[1][1])  # type: ignore[index]


def serial(port: int, keys: Path) -> str:
    """Return the serial number of the certificate that a new connection gets."""
    with (
        socket.create_connection(("127.0.0.1", port)) as plain,
        Asker().context(keys).wrap_socket(plain, server_hostname="127.0.0.1") as client,
    ):
        return str(cast("dict[str, str]", client.getpeercert())["serialNumber"])


def test_what_changes_is_taken(start: Start, place: Path) -> None:
    """A renewed certificate, another password, TLS off and on again; a connection from before gets one more answer."""
    exporter = start(TLS + "}\n" + USERS)
    port = port_of(exporter)
    first = serial(port, place)
    successful, read_at = reload_state(port, place)
    assert successful == 1
    assert abs(time.time() - read_at) < 20
    kept = http.client.HTTPSConnection("127.0.0.1", port, context=Asker().context(place), timeout=20)
    kept.request("GET", "/-/ready")
    assert kept.getresponse().read() == b"ok\n"

    # As cert-manager and certbot do: the certificate, and some time later its key.
    shutil.copy(place / "renewed.crt", place / "server.crt")
    time.sleep(0.1)
    shutil.copy(place / "renewed.key", place / "server.key")
    wait_for(lambda: serial(port, place) != first)
    assert exporter.log.count("web configuration read again") == 1
    kept.request("GET", "/-/ready")
    answer = kept.getresponse()
    assert (answer.status, answer.read(), answer.headers["Connection"]) == (200, b"ok\n", "close")
    kept.close()

    other = bcrypt.hashpw(b"other", bcrypt.gensalt(4)).decode()
    written(place, TLS + f"}}\nbasic_auth_users: {{alice: '{other}'}}")
    wait_for(lambda: Asker(says="other").ask(port, place) == 200)
    assert Asker().ask(port, place) == 401

    written(place, USERS)
    wait_for(lambda: Asker(plain=True).ask(port, place) == 200)
    assert Asker().ask(port, place) == "refused"
    written(place, TLS + f", {CLIENTS}}}")
    wait_for(lambda: Asker(certificate="prometheus").ask(port, place) == 200)
    assert Asker().ask(port, place) == "refused"
    assert Asker(plain=True).ask(port, place) == "refused"
    assert exporter.log.count("level=error") == 0
    assert exporter.stop()[0] == 0


def test_nobody_is_refused_while_the_sockets_change_hands(start: Start, place: Path) -> None:
    """New connections all the time, across reloads."""
    exporter = start(TLS + "}")
    port, answers, done = port_of(exporter), [], threading.Event()

    def ask() -> None:
        while not done.is_set():
            answers.append(Asker().ask(port, place, "/-/ready"))

    clients = [threading.Thread(target=ask) for _ in range(2)]
    for client in clients:
        client.start()
    for number in range(3):
        written(place, TLS + f"}}  # {number}")
        wait_for(partial(says, exporter, "read again", number + 1))
    done.set()
    for client in clients:
        client.join()
    assert set(answers) == {200}
    assert len(answers) > 20


def test_a_bad_change_leaves_the_old_one_in_force(start: Start, place: Path) -> None:
    """The metric is 0 and the log has one line, until it is right again; a certificate that comes late is enough."""
    exporter = start(TLS + "}\n" + USERS)
    port = port_of(exporter)
    _, read_at = reload_state(port, place)
    first = serial(port, place)
    good = (place / "web.yml").read_text()
    for number, bad in enumerate((good + "nope: 1\n", TLS.replace("server.crt", "late.crt") + "}\n" + USERS), 1):
        written(place, bad)
        wait_for(partial(says, exporter, "level=error", number))
        assert reload_state(port, place) == (0, read_at)
        assert Asker(None).ask(port, place) == 401
    time.sleep(2)
    lines = [line for line in exporter.log.splitlines() if "level=error" in line]
    assert len(lines) == 2
    assert "there is no key nope" in lines[0]
    assert f"{SECTION}.cert_file cannot be read: {place / 'late.crt'}: No such file or directory" in lines[1]
    (place / "server.crt").rename(place / "late.crt")
    wait_for(lambda: reload_state(port, place)[0] == 1)
    assert reload_state(port, place)[1] > read_at
    assert serial(port, place) == first


def test_half_a_file_is_not_taken(start: Start, place: Path) -> None:
    """A file that is being written, and for a while has no users in it, does not open the door."""
    exporter = start(USERS)
    port = port_of(exporter)
    with (place / "web.yml").open("w") as file:
        for _ in range(20):
            file.write("# on its way\n")
            file.flush()
            assert Asker(None, plain=True).ask(port, place) == 401
            time.sleep(0.1)
        file.write(USERS)
    wait_for(lambda: "read again" in exporter.log)
    assert Asker(None, plain=True).ask(port, place) == 401
    assert Asker(plain=True).ask(port, place) == 200


def test_a_secret_of_kubernetes_is_followed(start_exporter: StartExporter, place: Path, tmp_path: Path) -> None:
    """A kubelet replaces a link to the directory with all files at once."""
    volume = tmp_path / "volume"
    for generation, certificate in enumerate(("server", "renewed")):
        directory = volume / f"..{generation}"
        directory.mkdir(parents=True)
        for kind in ("crt", "key"):
            shutil.copy(place / f"{certificate}.{kind}", directory / f"server.{kind}")
        (directory / "web.yml").write_text(TLS + "}")
    (volume / "..data").symlink_to("..0")
    for name in ("server.crt", "server.key", "web.yml"):
        (volume / name).symlink_to(f"..data/{name}")
    exporter = start_exporter(f"--web.config.file={volume / 'web.yml'}", *ONE_COLLECTOR, program=("-c", HURRIED))
    port = port_of(exporter)
    first = serial(port, place)
    (volume / "..new").symlink_to("..1")
    (volume / "..new").rename(volume / "..data")
    wait_for(lambda: serial(port, place) != first)


def users(**costs: int) -> dict[bytes, bytes]:
    """Return users whose password is their name, with hashes of these costs."""
    return {name.encode(): bcrypt.hashpw(name.encode(), bcrypt.gensalt(cost)) for name, cost in costs.items()}


def test_every_attempt_takes_the_same_time(monkeypatch: pytest.MonkeyPatch) -> None:
    """By the rounds of bcrypt, which are exact, and by the clock: whoever the user is, if any."""
    known = users(cheap=4, middle=8, dear=10)
    rounds: list[int] = []
    check = bcrypt.checkpw

    def counted(password: bytes, hashed: bytes) -> bool:
        rounds.append(1 << int(hashed.split(b"$")[2]))
        return check(password, hashed)

    monkeypatch.setattr(bcrypt, "checkpw", counted)
    spent: dict[bytes, list[float]] = {}
    for _ in range(5):
        for user in (*known, b"nobody"):
            rounds.clear()
            right, seconds = web_auth._compare(known, user, b"wrong")
            assert not right
            assert sum(rounds) == 1 << 10
            spent.setdefault(user, []).append(seconds)
    best = [min(times) for times in spent.values()]
    # The rounds of another cost would be four times as many.
    assert max(best) < 2 * min(best)
    assert [web_auth._compare(known, user, user)[0] for user in (*known, b"nobody")] == [True, True, True, False]


async def test_a_right_password_is_compared_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """Two hundred at once and all after them; not with another password, hash or user, nor when it was wrong."""
    compared: list[bytes] = []
    compare = web_auth._compare

    def noted(known: dict[bytes, bytes], user: bytes, password: bytes) -> tuple[bool, float]:
        compared.append(user)
        return compare(known, user, password)[0], 0

    monkeypatch.setattr(web_auth, "_compare", noted)
    passwords, known = Passwords(), users(a=4, b=4)
    assert all(await asyncio.gather(*(passwords.right(known, b"a", b"a", "x") for _ in range(200))))
    assert await passwords.right(known, b"a", b"a", "y")
    assert compared == [b"a"]
    for user, password in ((b"a", b"b"), (b"b", b"a"), (b"aa", b""), (b"", b"a"), (b"a", b"b")):
        assert not await passwords.right(known, user, password, "x")
    assert compared == [b"a", b"a", b"b", b"aa", b"", b"a"]
    # Its hash is another now, or it is gone.
    assert await passwords.right(known | users(a=4), b"a", b"a", "x")
    assert len(compared) == 7
    assert not await passwords.right(users(b=4), b"a", b"a", "x")
    assert not await passwords.right({b"a": known[b"b"]}, b"a", b"a", "x")
    assert PASSWORD.encode() not in repr(vars(passwords)).encode()


async def test_attempts_wait_in_a_short_line(monkeypatch: pytest.MonkeyPatch) -> None:
    """One at a time, eight in all, one of each address; who is known already does not wait."""
    release, running, most = threading.Event(), [0], [0]

    def slow(known: dict[bytes, bytes], user: bytes, password: bytes) -> tuple[bool, float]:
        running[0] += 1
        most[0] = max(most[0], running[0])
        release.wait(20)
        running[0] -= 1
        return known.get(user) == password, 0

    monkeypatch.setattr(web_auth, "_compare", slow)
    passwords, known = Passwords(), {b"a": b"right", b"b": b"right too"}
    release.set()
    assert await passwords.right(known, b"a", b"right", "first")
    release.clear()
    waiting = [asyncio.create_task(passwords.right(known, b"a", b"%d" % number, f"{number}")) for number in range(7)]
    waiting.append(asyncio.create_task(passwords.right(known, b"b", b"right too", "7")))
    await asyncio.sleep(0.05)
    with pytest.raises(TooManyError):
        await passwords.right(known, b"x", b"y", "another address")
    assert await passwords.right(known, b"a", b"right", "3")
    waiting.append(asyncio.create_task(passwords.right(known, b"b", b"right too", "the same attempt")))
    await asyncio.sleep(0.05)
    waiting[7].cancel()
    release.set()
    answers = await asyncio.gather(*waiting, return_exceptions=True)
    assert isinstance(answers.pop(7), asyncio.CancelledError)
    assert answers == [False] * 7 + [True]
    assert most == [1]
    release.clear()
    one = asyncio.create_task(passwords.right(known, b"x", b"1", "same"))
    await asyncio.sleep(0.05)
    with pytest.raises(TooManyError):
        await passwords.right(known, b"x", b"2", "same")
    release.set()
    assert not await one


async def test_after_a_wrong_password_the_next_waits(monkeypatch: pytest.MonkeyPatch) -> None:
    """Nine times as long as it took, whoever comes next; the wrong one has its answer at once, and a right one too."""
    now, sleep = [1000.0], asyncio.sleep
    waited: list[float] = []

    async def slept(seconds: float) -> None:
        waited.append(seconds)
        now[0] += max(0.0, seconds)
        await sleep(0)

    monkeypatch.setattr(web_auth, "_compare", lambda known, user, password: (known[user] == password, 0.05))
    monkeypatch.setattr(web_auth, "time", SimpleNamespace(monotonic=lambda: now[0]))
    monkeypatch.setattr(web_auth, "asyncio", SimpleNamespace(**{**vars(asyncio), "sleep": slept}))
    passwords, known = Passwords(), {b"a": b"right"}
    for password in (b"wrong", b"wrong too", b"right", b"right"):
        assert await passwords.right(known, b"a", password, "x") is (password == b"right")
        now[0] += 0.125
    # The last one is remembered, so that it does not wait at all.
    assert waited == [-1000, pytest.approx(0.325), pytest.approx(0.325)]


def test_who_tries_passwords_costs_little(start: Start, place: Path) -> None:
    """Four clients without end: a tenth of the time goes into comparing, and a scrape is answered before an attempt."""
    hashed = bcrypt.hashpw(PASSWORD.encode(), bcrypt.gensalt(11))
    costs = []
    for _ in range(3):
        began = time.thread_time()
        bcrypt.checkpw(b"wrong", hashed)
        costs.append(time.thread_time() - began)
    exporter = start(f"basic_auth_users: {{alice: '{hashed.decode()}'}}")
    port, done = port_of(exporter), threading.Event()
    answers: list[tuple[int | str, float]] = []
    assert Asker(plain=True).ask(port, place) == 200

    def timed(asker: Asker, path: str) -> tuple[int | str, float]:
        asked = time.monotonic()
        return asker.ask(port, place, path), time.monotonic() - asked

    def attack(number: int) -> None:
        attempts = 0
        while not done.is_set():
            attempts += 1
            answers.append(timed(Asker(f"user {number}", f"{attempts}", plain=True), "/metrics"))
            time.sleep(0.02)

    attackers = [threading.Thread(target=attack, args=(number,)) for number in range(4)]
    began = time.monotonic()
    for attacker in attackers:
        attacker.start()
    scrapes = []
    while [status for status, _ in answers].count(401) < 4 and time.monotonic() - began < 60:
        scrapes.append(timed(Asker(plain=True), "/metrics?name[]=shoal_build_info&exclude[]=pressure"))
        time.sleep(0.2)
    done.set()
    for attacker in attackers:
        attacker.join()
    took = time.monotonic() - began
    assert {status for status, _ in answers} == {401, 429}
    assert {status for status, _ in scrapes} == {200}
    wrong = sorted(seconds for status, seconds in answers if status == 401)
    # Between two of them is nine times what one takes; a comparison there may be somewhat quicker than any was here.
    assert 9 * (len(wrong) - 1) * min(costs) / 1.5 < took
    assert sorted(seconds for _, seconds in scrapes)[len(scrapes) // 2] < wrong[len(wrong) // 2]


def test_others_are_answered_while_a_password_is_compared(start: Start, place: Path) -> None:
    """A comparison that takes a second keeps nobody waiting, over TLS and with a handshake for each request."""
    hashed = bcrypt.gensalt(14).decode() + "." * 31
    port = port_of(start(TLS + f"}}\nbasic_auth_users: {{alice: '{hashed}'}}"))
    wrong = threading.Thread(target=Asker().ask, args=(port, place))
    wrong.start()
    meanwhile = 0
    while wrong.is_alive():
        assert Asker(user=None).ask(port, place, "/-/ready") == 200
        meanwhile += 1
    # In the loop it would let two in: one before it begins, and one that waits for its end.
    assert meanwhile > 5


def test_a_signal_ends_it_while_clients_keep_their_tls(start: Start, place: Path) -> None:
    """One has not begun its handshake, one does not end its session, one has its password compared."""
    cost = 17
    began = time.thread_time()
    bcrypt.checkpw(b"x", bcrypt.gensalt(10) + b"." * 31)
    compares = (time.thread_time() - began) * (1 << cost - 10)
    hashed = bcrypt.gensalt(cost).decode() + "." * 31
    exporter = start(TLS + f"}}\nbasic_auth_users: {{alice: '{hashed}'}}")
    port = port_of(exporter)
    with socket.create_connection(("127.0.0.1", port)), socket.create_connection(("127.0.0.1", port)) as plain:
        client = Asker().context(place).wrap_socket(plain, server_hostname="127.0.0.1")
        client.sendall(b"GET /-/ready HTTP/1.1\r\nHost: x\r\n\r\n")
        assert client.recv(1000).startswith(b"HTTP/1.1 200 ")
        compared = threading.Thread(target=Asker().ask, args=(port, place))
        compared.start()
        time.sleep(0.3)
        status, seconds = exporter.stop()
        compared.join()
        client.close()
    assert status == 0
    assert seconds < compares / 2
    assert "Traceback" not in exporter.log
    assert "Error" not in exporter.log


@pytest.mark.parametrize("tls", [False, True], ids=["plain", "tls"])
def test_who_sends_nothing_is_sent_away(
    tls: bool,  # noqa: FBT001  (a parameter)
    start: Start,
    place: Path,
) -> None:
    """Whoever does not begin, does not end his headers, or keeps an idle connection, here for two seconds."""
    port = port_of(start(TLS + "}" if tls else "{}", "2"))
    request = b"GET /-/ready HTTP/1.1\r\nHost: x\r\n"
    for begins, drips in ((b"", b""), (request, b"X"), (request + b"\r\n", b"")):
        began = time.monotonic()
        with socket.create_connection(("127.0.0.1", port), timeout=30) as plain, ExitStack() as stack:
            client = plain
            if tls and begins:
                client = Asker().context(place).wrap_socket(plain, server_hostname="127.0.0.1")
                stack.enter_context(client)
            client.sendall(begins)
            client.settimeout(0.2)
            said = b"it is open"
            while said:
                # Without what this exporter was started with it would be 75 s.
                assert time.monotonic() - began < 60
                with contextlib.suppress(TimeoutError):
                    try:
                        said = client.recv(1000)
                        client.sendall(drips)
                    except (ConnectionError, ssl.SSLEOFError):
                        break
            assert time.monotonic() - began > 1.99


def test_what_is_no_tls(start: Start, place: Path) -> None:
    """Noise, plain HTTP, half a handshake: the connection ends, nothing is logged, and the next client is served."""
    exporter = start(TLS + "}")
    port = port_of(exporter)
    for noise in (
        b"GET / HTTP/1.1\r\n\r\n",
        os.urandom(1000),
        b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03" + bytes(50),
    ):
        with socket.create_connection(("127.0.0.1", port), timeout=10) as client:
            client.sendall(noise)
            client.shutdown(socket.SHUT_WR)
            with contextlib.suppress(ConnectionResetError):
                while client.recv(1000):
                    pass
    assert Asker().ask(port, place) == 200
    assert "level=warning" not in exporter.log
    assert "level=error" not in exporter.log
