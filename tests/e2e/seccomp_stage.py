"""Runs the exporter with the privileges that the chart gives a tier and puts it through all that it can do.

    python -m tests.e2e.seccomp_stage record    as root, with strace: writes packaging/seccomp/*.json

What it calls is recorded by strace, over its start, scrapes of every kind, TLS, passwords, Redis, the Kubernetes API, a
reload and its end. The tests run the same under the filter instead.
"""

from __future__ import annotations

import base64
import errno
import json
import os
import re
import shutil
import signal
import socket
import ssl
import subprocess
import sys
import tempfile
import threading
import time
import urllib.error
import urllib.request
from contextlib import ExitStack, closing, contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

import bcrypt
from tests.e2e.process import free_port, stranger
from tests.helm.engine import REPOSITORY, objects

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

__all__ = ["PROFILES", "TIERS", "granted", "listed", "stage"]

PROFILES: Final = REPOSITORY / "packaging" / "seccomp"
TIERS: Final = {"counters": "shoal.json", "attribution": "shoal.json", "full": "shoal-full.json"}
"""{tier: its profile}."""

# What the same Python calls with another C library, kernel or processor for what it calls here: each line is one job.
_ALIKE: Final = (
    {"epoll_wait", "epoll_pwait", "epoll_pwait2"},
    {"epoll_create", "epoll_create1"},
    {"poll", "ppoll", "select", "pselect6"},
    {"stat", "fstat", "lstat", "newfstatat", "fstatat64", "statx"},
    {"statfs", "fstatfs"},
    {"access", "faccessat", "faccessat2"},
    {"open", "openat"},
    {"readlink", "readlinkat"},
    {"getdents", "getdents64"},
    {"dup", "dup2", "dup3"},
    {"pipe", "pipe2"},
    {"accept", "accept4"},
    {"send", "sendto", "sendmsg", "sendmmsg"},
    {"recv", "recvfrom", "recvmsg", "shutdown"},
    {"getrlimit", "prlimit64"},
    {"futex", "futex_time64"},
    {"clock_gettime", "clock_gettime64", "clock_getres", "gettimeofday", "time"},
    {"clock_nanosleep", "nanosleep"},
    {"exit", "exit_group"},
    {"kill", "tgkill"},
    {"rseq", "set_robust_list", "set_tid_address", "membarrier"},
    {"sigaltstack", "rt_sigaction", "rt_sigprocmask", "rt_sigreturn"},
    {"uname", "sysinfo", "sched_getaffinity", "getcpu", "getrandom"},
    {"brk", "mmap", "munmap", "mremap", "mprotect", "madvise"},
    {"read", "pread64", "readv", "write", "pwrite64", "writev", "lseek", "close", "close_range"},
    {"futex", "sched_yield", "prctl"},
    {"getuid", "geteuid", "getgid", "getegid", "getpid", "gettid", "getppid"},
)
# Calls that are allowed with some arguments alone: {name: [(index, comparison, value, second value)]}, one of which
# must hold. clone: threads (CLONE_THREAD), no processes and no namespaces (CLONE_NEW*). In clone3 a filter cannot see
# the flags, so there is none, and the C library takes clone. Sockets: unix, inet, inet6, netlink and packet.
# Namespaces to enter: those of the network (CLONE_NEWNET).
_ARGUMENTS: Final = {
    "clone": [(0, "SCMP_CMP_MASKED_EQ", 0x7E030000, 0x00010000)],
    "socket": [(0, "SCMP_CMP_EQ", family, 0) for family in (1, 2, 10, 16, 17)],
    "setns": [(1, "SCMP_CMP_EQ", 0x40000000, 0)],
}
# By which a container runtime, under the filter and with no_new_privs, becomes the exporter.
_START: Final = {"execve"}
# As the command, looking at its web configuration more often.
_HURRIED: Final = """
import sys
from shoal import web_config
from shoal.cli import main
web_config._INTERVAL = 0.2
sys.exit(main())
"""
_PASSWORD: Final = "seccomp"  # noqa: S105


def granted(tier: str) -> list[str]:
    """Return the options of setpriv that make the chart's security context of a tier."""
    spec = next(made for made in objects({"tier": tier}) if made["kind"] == "DaemonSet")["spec"]["template"]["spec"]
    security = next(each for each in spec["containers"] if each["name"] == "shoal")["securityContext"]
    assert security["capabilities"]["drop"] == ["ALL"]
    assert security["allowPrivilegeEscalation"] is False
    added = "".join(f",+{name.lower()}" for name in security["capabilities"].get("add", []))
    user, group = security["runAsUser"], security["runAsGroup"]
    return [
        *(f"--reuid={user}", f"--regid={group}", "--clear-groups", "--no-new-privs", "--inh-caps=-all"),
        f"--bounding-set=-all{added}",
    ]


def listed(file: str) -> set[str]:
    """Return the calls that a profile allows."""
    profile = json.loads((PROFILES / file).read_text(encoding="utf-8"))
    return {name for rule in profile["syscalls"] if rule["action"] == "SCMP_ACT_ALLOW" for name in rule["names"]}


class _Api(BaseHTTPRequestHandler):
    """An API server without endpoints."""

    def do_GET(self) -> None:
        """Answer a list, or a watch that ends soon."""
        self.send_response(200)
        self.end_headers()
        if "watch=" in self.path:
            time.sleep(1)
            return
        made = {"kind": "EndpointSliceList", "metadata": {"resourceVersion": "1"}, "items": []}
        self.wfile.write(json.dumps(made).encode())

    def log_message(self, *_: object) -> None:
        """Say nothing."""


@contextmanager
def _api(place: Path) -> Iterator[int]:
    server = ThreadingHTTPServer(("127.0.0.1", 0), _Api)
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(place / "cert.pem", place / "key.pem")
    server.socket = context.wrap_socket(server.socket, server_side=True)
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.05})
    thread.start()
    try:
        yield server.server_address[1]
    finally:
        server.shutdown()
        thread.join()
        server.server_close()


@contextmanager
def _redis(place: Path) -> Iterator[list[str]]:
    """Run a Redis server, and return the addresses by which the exporter is to find it, and one where there is none."""
    port, tls, nothing = free_port(), free_port(), free_port()
    command = ["redis-server", "--port", f"{port}", "--bind", "127.0.0.1", "--unixsocket", f"{place}/redis.sock"]
    command += ["--unixsocketperm", "777", "--tls-port", f"{tls}", "--tls-auth-clients", "no", "--save", ""]
    command += ["--tls-cert-file", f"{place}/cert.pem", "--tls-key-file", f"{place}/key.pem"]
    command += ["--tls-ca-cert-file", f"{place}/cert.pem", "--dir", str(place)]
    with subprocess.Popen(command, stdout=subprocess.DEVNULL) as process:
        try:
            yield [
                f"redis://localhost:{port}",
                f"unix://{place}/redis.sock",
                f"rediss://127.0.0.1:{tls}?ssl_ca_certs={place}/cert.pem",
                f"redis://127.0.0.1:{nothing}",
            ]
        finally:
            process.kill()


# In a mount namespace of its own, so that it may have a service account where a pod has one.
_POD: Final = """
set -eu
mount -t tmpfs tmpfs /run
mkdir -p /run/secrets/kubernetes.io/serviceaccount
cp "$1/cert.pem" /run/secrets/kubernetes.io/serviceaccount/ca.crt
echo token >/run/secrets/kubernetes.io/serviceaccount/token
chmod -R a+rX /run/secrets
shift
exec "$@"
"""


def stage(tier: str, before: Sequence[str] = (), after: Sequence[str] = ()) -> tuple[dict[str, str], int, str]:
    """Run the exporter of a tier through everything, with `before` before setpriv in its command and `after` after it.

    Returns {signal: the reason of its absence, or ""} at the last scrape, the exit status and the log.
    """
    with ExitStack() as stack:
        place = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="shoal-seccomp-")))
        place.chmod(0o755)
        openssl = (
            "openssl req -x509 -newkey ec -pkeyopt ec_paramgen_curve:prime256v1 -nodes -keyout key.pem -out cert.pem"
        )
        names = ["-subj", "/CN=x", "-addext", "subjectAltName=IP:127.0.0.1"]
        subprocess.run([*openssl.split(), *names], cwd=place, check=True, capture_output=True)
        (place / "key.pem").chmod(0o644)
        hashed = bcrypt.hashpw(_PASSWORD.encode(), bcrypt.gensalt(4)).decode()
        web = place / "web.yml"
        web.write_text(
            f"tls_server_config: {{cert_file: cert.pem, key_file: key.pem}}\nbasic_auth_users: {{a: '{hashed}'}}\n"
        )
        api, targets = stack.enter_context(_api(place)), stack.enter_context(_redis(place))
        stack.enter_context(stranger())
        port = free_port()
        command = ["unshare", "--mount", "sh", "-c", _POD, "sh", str(place), *before, "setpriv", *granted(tier), *after]
        command += [
            sys.executable,
            "-c",
            _HURRIED,
            f"--web.listen-address=localhost:{port}",
            f"--web.config.file={web}",
        ]
        command += ["--redis.discover=true", "--kubernetes.endpoints=true", "--inodes.walk-interval=1"]
        command += [f"--redis.target={target}" for target in targets]
        command += ["--netns.enter=true"] if tier == "full" else []
        environment = {name: value for name, value in os.environ.items() if not name.startswith("SHOAL_")}
        environment |= {"KUBERNETES_SERVICE_HOST": "127.0.0.1", "KUBERNETES_SERVICE_PORT": f"{api}"}
        with (
            (place / "log").open("wb") as log,
            subprocess.Popen(command, env=environment, stderr=log, start_new_session=True) as process,
        ):
            try:
                signals = _everything(port, place, process)
                os.killpg(process.pid, signal.SIGTERM)
                status = process.wait(timeout=20)
            except BaseException:
                os.killpg(process.pid, signal.SIGKILL)
                sys.stderr.write((place / "log").read_text())
                raise
        return signals, status, (place / "log").read_text()


def _everything(port: int, place: Path, process: subprocess.Popen[bytes]) -> dict[str, str]:
    context = ssl.create_default_context(cafile=str(place / "cert.pem"))
    context.verify_flags &= ~ssl.VERIFY_X509_STRICT

    def ask(path: str, password: str = _PASSWORD, **headers: str) -> tuple[int, bytes]:
        request = urllib.request.Request(f"https://127.0.0.1:{port}{path}")
        request.add_header("Authorization", "Basic " + base64.b64encode(f"a:{password}".encode()).decode())
        for name, value in headers.items():
            request.add_header(name.replace("_", "-"), value)
        try:
            with urllib.request.urlopen(request, timeout=20, context=context) as answer:  # noqa: S310  (our own)
                return int(answer.status), answer.read()
        except urllib.error.HTTPError as error:
            with error:
                return error.code, error.read()

    deadline = time.monotonic() + 60
    while True:
        try:
            assert ask("/-/ready") == (200, b"ok\n")
            break
        except OSError:
            assert process.poll() is None, "the exporter ended"
            assert time.monotonic() < deadline, "the exporter does not answer"
            time.sleep(0.1)
    assert ask("/metrics", Accept="application/openmetrics-text", Accept_Encoding="gzip")[0] == 200
    assert ask("/")[0] == 200
    assert ask("/metrics", "wrong")[0] == 401
    assert ask("/metrics?collect[]=nothing")[0] == 400
    assert ask("/nowhere")[0] == 404
    with closing(socket.create_connection(("127.0.0.1", port))) as plain:
        plain.sendall(b"GET / HTTP/1.1\r\n\r\n")
    web = place / "web.yml"
    good = web.read_text()
    for text in ("nonsense: 1\n", good):
        web.write_text(text)
        wanted = b"shoal_web_config_last_reload_successful %d\n" % (text == good)
        while wanted not in ask("/metrics?name[]=shoal_web_config_last_reload_successful")[1]:
            assert time.monotonic() < deadline, "it is not read again"
            time.sleep(0.3)
    text = ask("/metrics")[1].decode()
    assert not re.findall(r'^shoal_scrape_collector_success\{collector="(\w+)"\} 0', text, re.MULTILINE)
    found = re.findall(r'^shoal_signal_available\{signal="(\w+)"(?:,reason="(\w+)")?\} [01]$', text, re.MULTILINE)
    return dict(found)


def record() -> None:
    """Write the profiles anew from what strace sees."""
    found: dict[str, set[str]] = {}
    for tier, file in TIERS.items():
        with tempfile.TemporaryDirectory() as directory:
            trace = Path(directory) / "trace"
            signals, status, log = stage(tier, before=["strace", "-f", "-qq", "-o", str(trace)])
            sys.stderr.write(f"{tier}: status {status}, {signals}\n{log}\n")
            text = trace.read_text(errors="replace")
        calls = re.findall(r"^\d+ +(?:<\.\.\. )?(\w+)(?:\(| resumed)", text[text.rindex(" execve(") :], re.MULTILINE)
        found.setdefault(file, set()).update(calls)
    PROFILES.mkdir(parents=True, exist_ok=True)
    found["shoal-full.json"] |= found["shoal.json"]
    for file, names in found.items():
        more = set().union(*(alike for alike in _ALIKE if alike & names)) | _START
        sys.stderr.write(f"{file}: {len(names)} calls seen: {' '.join(sorted(names))}\n")
        (PROFILES / file).write_text(json.dumps(profile(names | more), indent=2) + "\n", encoding="utf-8")


def profile(names: set[str]) -> dict[str, Any]:
    """Return a profile in the format of the OCI runtimes. What is not in it is answered as by a kernel without it."""
    rules: list[dict[str, Any]] = [
        {"names": sorted(names - {"clone3"} - _ARGUMENTS.keys()), "action": "SCMP_ACT_ALLOW"}
    ]
    for name in sorted(names & _ARGUMENTS.keys() | {"clone"}):
        for index, comparison, value, second in _ARGUMENTS[name]:
            condition = {"index": index, "value": value, "valueTwo": second, "op": comparison}
            rules.append({"names": [name], "action": "SCMP_ACT_ALLOW", "args": [condition]})
    return {
        "defaultAction": "SCMP_ACT_ERRNO",
        "defaultErrnoRet": errno.ENOSYS,
        "architectures": ["SCMP_ARCH_X86_64", "SCMP_ARCH_AARCH64"],
        "syscalls": [*rules, {"names": ["clone3"], "action": "SCMP_ACT_ERRNO", "errnoRet": errno.ENOSYS}],
    }


if __name__ == "__main__":
    if sys.argv[1:] != ["record"] or not shutil.which("strace"):
        sys.exit("usage: python -m tests.e2e.seccomp_stage record   (with strace)")
    record()
