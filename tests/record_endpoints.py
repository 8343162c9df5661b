"""Record what a real kube-apiserver answers to a list and a watch of EndpointSlices, refusals included.

    python3 tests/record_endpoints.py KUBE_APISERVER OUTDIR [SECONDS]

KUBE_APISERVER is the program of that name, ETCD on the path (Debian: etcd-server); openssl makes the certificate. Both
are started on loopback with an empty store in a temporary directory, and ended. OUTDIR then holds bodies exactly as
received (decoded from chunks, as HTTP clients hand them out), each with its status in a line of `STATUS`; `SERVER` has
the versions. With SECONDS the script then waits so long with the server running, for a client to be tried against it,
in an environment that is printed.
"""

from __future__ import annotations

import base64
import contextlib
import http.client
import json
import os
import shlex
import socket
import ssl
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path
from typing import Any

__all__ = ["ApiServer", "main"]

ADMIN = "admin-of-a-recording"
SLICES = "/apis/discovery.k8s.io/v1/endpointslices"
SHOP = "/apis/discovery.k8s.io/v1/namespaces/shop/endpointslices"
MERGE = "application/merge-patch+json"
# Long enough for a bookmark of a server that has nothing else to tell.
WATCH_SECONDS = 85
SELECTOR = "labelSelector=%21service.kubernetes.io%2Fheadless"


def free_port() -> int:
    """Return a port of loopback that is free now."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def openssl(*arguments: str, data: bytes = b"") -> bytes:
    """Run openssl and return what it prints."""
    return subprocess.run(["openssl", *arguments], input=data, check=True, capture_output=True).stdout


class ApiServer:
    """etcd and kube-apiserver in a directory, with an administrator's token and RBAC."""

    def __init__(self, program: str, directory: Path) -> None:
        """Start both and wait until the server is ready."""
        self.directory = directory
        self.port, self.etcd_port = free_port(), free_port()
        self.key, self.ca = directory / "account.key", directory / "tls/apiserver.crt"
        openssl("genrsa", "-out", str(self.key), "2048")
        (directory / "tokens.csv").write_text(f'{ADMIN},admin,admin,"system:masters"\n')
        self.log = (directory / "log").open("wb")
        etcd_url = f"http://127.0.0.1:{self.etcd_port}"
        peer_url = f"http://127.0.0.1:{free_port()}"
        self.processes = [
            self._start(
                "etcd",
                f"--data-dir={directory}/etcd",
                f"--listen-client-urls={etcd_url}",
                f"--advertise-client-urls={etcd_url}",
                f"--listen-peer-urls={peer_url}",
                f"--initial-advertise-peer-urls={peer_url}",
                f"--initial-cluster=default={peer_url}",
            )
        ]
        self.command = [
            program,
            f"--etcd-servers={etcd_url}",
            f"--secure-port={self.port}",
            "--bind-address=127.0.0.1",
            "--advertise-address=127.0.0.1",
            f"--cert-dir={directory}/tls",
            f"--token-auth-file={directory}/tokens.csv",
            "--authorization-mode=RBAC",
            "--service-account-issuer=https://kubernetes.default.svc",
            f"--service-account-key-file={self.key}",
            f"--service-account-signing-key-file={self.key}",
            "--service-cluster-ip-range=10.96.0.0/16",
            "--disable-admission-plugins=ServiceAccount",
            "--endpoint-reconciler-type=none",
        ]
        self.processes.append(self._start(*self.command))
        self.wait()

    def _start(self, *command: str) -> subprocess.Popen[bytes]:
        return subprocess.Popen(command, stdout=self.log, stderr=self.log)

    def wait(self) -> None:
        """Wait until the server is ready, RBAC's own roles included."""
        until = time.monotonic() + 180
        while time.monotonic() < until:
            with contextlib.suppress(OSError, http.client.HTTPException):
                if self.ask("GET", "/readyz")[0] == 200:
                    return
            time.sleep(0.5)
        raise SystemExit(f"kube-apiserver is not ready; see {self.log.name}")

    def restart(self) -> None:
        """End kube-apiserver and start it again, so that it remembers no more than etcd does."""
        self.processes[-1].terminate()
        self.processes[-1].wait()
        self.processes[-1] = self._start(*self.command)
        self.wait()

    def end(self) -> None:
        """End both."""
        for process in reversed(self.processes):
            process.terminate()
            process.wait()
        self.log.close()

    def connection(self, timeout: float = 90) -> http.client.HTTPSConnection:
        """Return a connection that trusts the server's own certificate."""
        trust = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
        trust.load_verify_locations(self.ca)
        return http.client.HTTPSConnection("127.0.0.1", self.port, context=trust, timeout=timeout)

    def ask(
        self, method: str, path: str, content: Any = None, *, token: str = ADMIN, kind: str = "application/json"
    ) -> tuple[int, bytes]:
        """Return the status and the body of one answer."""
        with contextlib.closing(self.connection()) as connection:
            headers = {"Authorization": f"Bearer {token}", "Accept": "application/json", "Content-Type": kind}
            connection.request(method, path, None if content is None else json.dumps(content), headers)
            answer = connection.getresponse()
            return answer.status, answer.read()

    def change(self, method: str, path: str, content: Any = None, kind: str = "application/json") -> dict[str, Any]:
        """Do what has to succeed, and return the answer."""
        status, body = self.ask(method, path, content, kind=kind)
        if status >= 300:
            raise SystemExit(f"{method} {path}: {status} {body!r}")
        return dict(json.loads(body))

    def account(self, name: str, *, allowed: bool) -> str:
        """Make a service account, bound to the role that the exporter needs if it is `allowed`; return a token."""
        base = {"apiVersion": "rbac.authorization.k8s.io/v1"}
        namespace = "/api/v1/namespaces/default/serviceaccounts"
        self.change("POST", namespace, {"apiVersion": "v1", "kind": "ServiceAccount", "metadata": {"name": name}})
        if allowed:
            rule = {"apiGroups": ["discovery.k8s.io"], "resources": ["endpointslices"]}
            role: dict[str, Any] = base | {"kind": "ClusterRole", "metadata": {"name": name}}
            role["rules"] = [rule | {"verbs": ["get", "list", "watch"]}]
            binding: dict[str, Any] = base | {"kind": "ClusterRoleBinding", "metadata": {"name": name}}
            binding["roleRef"] = {"apiGroup": "rbac.authorization.k8s.io", "kind": "ClusterRole", "name": name}
            binding["subjects"] = [{"kind": "ServiceAccount", "name": name, "namespace": "default"}]
            self.change("POST", "/apis/rbac.authorization.k8s.io/v1/clusterroles", role)
            self.change("POST", "/apis/rbac.authorization.k8s.io/v1/clusterrolebindings", binding)
        request = {
            "apiVersion": "authentication.k8s.io/v1",
            "kind": "TokenRequest",
            "spec": {"expirationSeconds": 7200},
        }
        return str(self.change("POST", f"{namespace}/{name}/token", request)["status"]["token"])

    def expired(self, token: str) -> str:
        """Return the same token as it is when its time has passed, signed by the server's own key."""
        head, claims, _ = token.split(".")
        content = json.loads(base64.urlsafe_b64decode(claims + "==="))
        now = int(time.time())
        content |= {"iat": now - 7200, "nbf": now - 7200, "exp": now - 3600}
        signed = f"{head}.{_base64(json.dumps(content).encode())}"
        return f"{signed}.{_base64(openssl('dgst', '-sha256', '-sign', str(self.key), data=signed.encode()))}"


def _base64(data: bytes) -> str:
    return base64.urlsafe_b64encode(data).rstrip(b"=").decode()


def endpoint(address: str, *, ready: bool = True, serving: bool = True, terminating: bool = False) -> dict[str, Any]:
    """Return an endpoint as the EndpointSlice controller writes it."""
    conditions = {"ready": ready, "serving": serving, "terminating": terminating}
    return {"addresses": [address], "conditions": conditions, "nodeName": "node-1"}


def endpoint_slice(
    name: str, service: str, endpoints: list[dict[str, Any]], family: str = "IPv4", **labels: str
) -> dict[str, Any]:
    """Return a slice of a service with DNS ports."""
    ports = [{"name": "dns", "protocol": "UDP", "port": 53}, {"name": "dns-tcp", "protocol": "TCP", "port": 53}]
    labels = {"kubernetes.io/service-name": service} | {key.replace("__", "/"): text for key, text in labels.items()}
    return {
        "apiVersion": "discovery.k8s.io/v1",
        "kind": "EndpointSlice",
        "metadata": {"name": name, "labels": labels},
        "addressType": family,
        "endpoints": endpoints,
        "ports": ports,
    }


class Recorder:
    """Writes answers into a directory."""

    def __init__(self, server: ApiServer, directory: Path) -> None:
        self.server, self.directory = server, directory
        self.statuses: list[str] = []

    def ask(self, name: str, query: str, token: str) -> bytes:
        """Record the answer to one request."""
        status, body = self.server.ask("GET", f"{SLICES}?{SELECTOR}&{query}", token=token)
        return self.write(name, status, body)

    def write(self, name: str, status: int, body: bytes) -> bytes:
        """Keep a body and its status."""
        (self.directory / name).write_bytes(body)
        self.statuses.append(f"{name} {status}\n")
        (self.directory / "STATUS").write_text("".join(self.statuses))
        return body

    def watch(self, name: str, version: str, token: str, seconds: int) -> threading.Thread:
        """Record a watch from a version on, until the server ends it by itself; returns once it has begun."""
        began = threading.Event()

        def run() -> None:
            with contextlib.closing(self.server.connection()) as connection:
                query = f"{SELECTOR}&watch=true&allowWatchBookmarks=true&resourceVersion={version}"
                headers = {"Authorization": f"Bearer {token}", "Accept": "application/json"}
                connection.request("GET", f"{SLICES}?{query}&timeoutSeconds={seconds}", headers=headers)
                answer = connection.getresponse()
                began.set()
                self.write(name, answer.status, answer.read())

        thread = threading.Thread(target=run)
        thread.start()
        began.wait(60)
        return thread


def record(server: ApiServer, directory: Path) -> str:
    """Record everything; return the token of the account that may list and watch."""
    recorder = Recorder(server, directory)
    token = server.account("shoal", allowed=True)
    stranger = server.account("stranger", allowed=False)
    server.change("POST", "/api/v1/namespaces", {"kind": "Namespace", "apiVersion": "v1", "metadata": {"name": "shop"}})
    early = json.loads(recorder.ask("list-empty.json", "limit=50", token))["metadata"]["resourceVersion"]
    make_slices(server)
    page = recorder.ask("list-page-1.json", "limit=3", token)
    first = json.loads(page)["metadata"]["continue"]
    number = 2
    while rest := json.loads(page)["metadata"].get("continue"):
        page = recorder.ask(f"list-page-{number}.json", f"limit=3&continue={rest}", token)
        number += 1
    listed = json.loads(recorder.ask("list.json", "limit=50", token))["metadata"]["resourceVersion"]
    watch = recorder.watch("watch.jsonl", listed, token, WATCH_SECONDS)
    change_slices(server)
    recorder.ask("list-403.json", "limit=50", stranger)
    recorder.ask("watch-403.json", "watch=true&resourceVersion=0", stranger)
    recorder.ask("list-401.json", "limit=50", server.expired(token))
    recorder.ask("list-400.json", "limit=50&continue=nonsense", token)
    watch.join()
    recorder.ask("list-after.json", "limit=50", token)
    forget(server)
    recorder.ask("list-410.json", f"limit=3&continue={first}", token)
    recorder.ask("watch-410.jsonl", f"watch=true&allowWatchBookmarks=true&resourceVersion={early}", token)
    _, version = server.ask("GET", "/version")
    etcd = subprocess.run(["etcd", "--version"], check=True, capture_output=True, text=True).stdout.splitlines()[0]
    what = f"kube-apiserver {json.loads(version)['gitVersion']}\n{etcd}\n{time.strftime('%Y-%m-%d')}\n"
    (directory / "SERVER").write_text(what)
    return token


def make_slices(server: ApiServer) -> None:
    """Make one slice of each kind."""
    unready = endpoint("10.244.0.21", ready=False, serving=False)
    draining = endpoint("10.244.0.22", ready=False, terminating=True)
    closing = endpoint("10.244.0.23", ready=False, serving=False, terminating=True)
    bare = endpoint_slice("any-a", "any", [{"addresses": ["10.244.0.30"]}]) | {"ports": [{"name": "every"}]}
    headless = {"service.kubernetes.io__headless": ""}
    for one in (
        endpoint_slice("dns-a", "dns", [endpoint("10.244.0.2"), endpoint("10.244.0.3")]),
        endpoint_slice("dns-v6", "dns", [endpoint("fd00::2")], "IPv6"),
        endpoint_slice("web-a", "web", [endpoint("10.244.0.20"), unready, draining, closing]),
        bare,
        endpoint_slice("none-a", "none", []) | {"ports": []},
        endpoint_slice("outside-a", "outside", [{"addresses": ["db.example.com"]}], "FQDN"),
        endpoint_slice("db-a", "db", [endpoint("10.244.0.40")], **headless),
    ):
        server.change("POST", SHOP, one)


def change_slices(server: ApiServer) -> None:
    """Have a backend come, one terminate and go, a slice come and one go."""
    endpoints = [endpoint("10.244.0.2"), endpoint("10.244.0.3"), endpoint("10.244.0.4")]
    server.change("PATCH", f"{SHOP}/dns-a", {"endpoints": endpoints}, MERGE)
    endpoints[0] = endpoint("10.244.0.2", ready=False, terminating=True)
    server.change("PATCH", f"{SHOP}/dns-a", {"endpoints": endpoints}, MERGE)
    server.change("PATCH", f"{SHOP}/dns-a", {"endpoints": endpoints[1:]}, MERGE)
    server.change("POST", SHOP, endpoint_slice("new-a", "new", [endpoint("10.244.0.50")]))
    server.change("DELETE", f"{SHOP}/dns-v6")


def forget(server: ApiServer) -> None:
    """Make what has happened so far unknown: etcd is compacted, and the server's own memory begins anew."""
    for number in range(20):
        server.change("PATCH", f"{SHOP}/dns-a", {"metadata": {"annotations": {"step": str(number)}}}, MERGE)
    revision = json.loads(server.ask("GET", f"{SLICES}?limit=1")[1])["metadata"]["resourceVersion"]
    with contextlib.closing(http.client.HTTPConnection("127.0.0.1", server.etcd_port, timeout=30)) as etcd:
        etcd.request("POST", "/v3/kv/compaction", json.dumps({"revision": revision, "physical": True}))
        answer = etcd.getresponse()
        if answer.status != 200:
            raise SystemExit(f"compaction: {answer.status} {answer.read()!r}")
    server.restart()


def main() -> None:
    """Start the servers, record, wait if that is wanted, and end them."""
    program, out = sys.argv[1], Path(sys.argv[2])
    out.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix="shoal-apiserver-") as temporary:
        directory = Path(temporary)
        server = ApiServer(program, directory)
        try:
            token = record(server, out)
            if len(sys.argv) > 3:
                account = directory / "account"
                account.mkdir()
                (account / "token").write_text(token)
                (account / "ca.crt").write_bytes(server.ca.read_bytes())
                environment = {
                    "KUBERNETES_SERVICE_HOST": "127.0.0.1",
                    "KUBERNETES_SERVICE_PORT": str(server.port),
                    "ACCOUNT": str(account),
                    "ADMIN": ADMIN,
                    "ETCD": str(server.etcd_port),
                    "PID": str(server.processes[-1].pid),
                }
                print(*(f"{name}={shlex.quote(text)}" for name, text in environment.items()), flush=True)  # noqa: T201
                time.sleep(float(sys.argv[3]))
        finally:
            server.end()
            if os.environ.get("KEEP_LOG"):
                Path(os.environ["KEEP_LOG"]).write_bytes((directory / "log").read_bytes())


if __name__ == "__main__":
    main()
