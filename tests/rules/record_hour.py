r"""Records what Prometheus would scrape, for an hour, from a machine that is busy and well.

Runs as root inside a virtual machine; nothing here is made up but the names of pods and units:

    SHOAL_VM_TIMEOUT=14400 tests/vm_disk.sh -i 4 -a delayacct -k /usr/lib/gcc -k "$(cc -print-prog-name=cc1)" \
        6.12 OUTDIR -- .venv/bin/python tests/rules/record_hour.py OUTDIR 60

Every 30 seconds OUTDIR gets one file with the answer of /metrics. tests/rules/build_hour.py makes the test of them.

The work: two pods that talk to each other through a service address (DNAT, as kube-proxy makes it), a pod that computes
(stress-ng, which must be installed), a unit that compiles C, a Redis server that appends to a disk, a redis-benchmark
in bursts, UDP requests to a resolver through the service, all with limits that they keep. The machine's clock counts
its instructions (-i), sixteen nanoseconds each, and skips the time in which it has nothing to do, so that it does not
matter to it how busy its host is. Without that its tasks queue whenever others compute there, and it is not well.
"""

from __future__ import annotations

import gzip
import hashlib
import os
import shutil
import socket
import socketserver
import subprocess
import sys
import time
import urllib.request
from pathlib import Path

CGROUPS = Path("/sys/fs/cgroup")
DISK = Path("/run/disk")
MIB = 1 << 20
PORT = 7462
INTERVAL = 30

BURSTABLE = "kubepods.slice/kubepods-burstable.slice"
# Namespace, pod, UID, container, address of the pod, memory.max in MiB.
CART = ("shop", "cart-6c9d8f7b5-kq2mz", "1f0c9a44-0d3e-4b6a-9c55-7a1be2c3d401", "api", "10.244.1.2", 128)
CHECKOUT = ("shop", "checkout-7d9c5b6f4-x2x9k", "2e7d1b90-61c4-4f0e-8a3b-5d2c4e6f7a02", "api", "10.244.1.3", 128)
REPORTS = ("batch", "reports-0", "3c5a8e12-97b6-4d21-b0f4-8e9d1c2b3a03", "report", "10.244.1.4", 256)
DNS = ("kube-system", "coredns-5d78c9869d-7xk2p", "4b6f2d35-c8a7-4e19-9d02-1a3c5e7b9f04", "coredns", "10.244.1.5", 96)
PODS = (CART, CHECKOUT, REPORTS, DNS)
SERVICE, DNS_SERVICE = "10.96.0.20", "10.96.0.10"

REDIS = "system.slice/redis-server.service"
BENCHMARK = "system.slice/redis-benchmark.service"
BUILD = "system.slice/build.service"
EXPORTER = "system.slice/shoal-exporter.service"


def say(*words: object) -> None:
    """Write a line to the output of the machine."""
    print(time.strftime("%H:%M:%S"), *words, flush=True)  # noqa: T201  (a recording says what it does)


def run(*command: str) -> None:
    """Run a command that must succeed."""
    subprocess.run(command, check=True)


def cgroup(path: str, **settings: str) -> Path:
    """Make a cgroup with its ancestors and controllers; settings are file names with `_` for `.`."""
    parent = CGROUPS
    for part in Path(path).parts:
        (parent / "cgroup.subtree_control").write_text("+memory +cpu +io +pids")
        parent /= part
        parent.mkdir(exist_ok=True)
    for name, value in settings.items():
        (parent / name.replace("_", ".")).write_text(value)
    return parent


def start(path: Path, *command: str, netns: str = "") -> None:
    """Run a command for good, in a cgroup from its first moment and in a named network namespace."""
    inside = ("nsenter", f"--net=/run/netns/{netns}") if netns else ()
    shell = ("sh", "-c", 'echo $$ >"$0" && exec "$@"', str(path / "cgroup.procs"))
    with (Path("/run") / f"{path.name[-24:]}.log").open("ab") as log:
        subprocess.Popen([*shell, *inside, *command], stdin=subprocess.DEVNULL, stdout=log, stderr=log)


def me(*arguments: str) -> tuple[str, ...]:
    """Return the command that runs a part of this file."""
    return (sys.executable, "-S", "-E", __file__, *arguments)


def lay_out_pod(pod: tuple[str, str, str, str, str, int]) -> tuple[Path, str]:
    """Make a pod's cgroups, the kubelet's names for it and its network; return the container's cgroup and namespace."""
    namespace, name, uid, container, address, limit = pod
    identity = {part: hashlib.sha256(f"{uid} {part}".encode()).hexdigest() for part in ("sandbox", container)}
    slice_ = f"{BURSTABLE}/kubepods-burstable-pod{uid.replace('-', '_')}.slice"
    sandbox = cgroup(f"{slice_}/cri-containerd-{identity['sandbox']}.scope")
    own = cgroup(f"{slice_}/cri-containerd-{identity[container]}.scope", memory_max=str(limit * MIB))
    log = Path("/var/log/pods") / f"{namespace}_{name}_{uid}" / container
    log.mkdir(parents=True)
    (log / "0.log").touch()
    link = Path("/var/log/containers") / f"{name}_{namespace}_{container}-{identity[container]}.log"
    link.parent.mkdir(exist_ok=True)
    link.symlink_to(log / "0.log")
    netns = f"cni-{uid}"
    device = f"cali{uid[:8]}"
    run("ip", "netns", "add", netns)
    run("ip", "link", "add", device, "type", "veth", "peer", "name", "eth0", "netns", netns)
    run("ip", "link", "set", device, "up")
    run("ip", "address", "add", "169.254.1.1/32", "dev", device)
    run("ip", "route", "add", address, "dev", device)
    for words in (
        "link set lo up",
        "link set eth0 up",
        f"address add {address}/32 dev eth0",
        "route add 169.254.1.1 dev eth0 scope link",
        "route add default via 169.254.1.1 dev eth0",
    ):
        run("ip", "-n", netns, *words.split())
    start(sandbox, "sleep", "infinity", netns=netns)
    return own, netns


def lay_out_node() -> None:
    """Give the machine a disk, a directory for the kubelet's names, and services as kube-proxy makes them."""
    for module in (
        "loop",
        "veth",
        "nf_conntrack",
        "nf_conntrack_netlink",
        "nft_ct",
        "nft_nat",
        "nft_masq",
        "tcp_diag",
        "udp_diag",
    ):
        subprocess.run(["modprobe", module], check=False)
    run("mount", "-t", "tmpfs", "tmpfs", "/var/log")
    run("ip", "link", "set", "lo", "up")
    image = Path("/run/disk.img")
    with image.open("wb") as file:
        file.truncate(512 * MIB)
    DISK.mkdir()
    run("mkfs.ext4", "-q", str(image))
    run("mount", "-o", "loop", str(image), str(DISK))
    Path("/proc/sys/net/ipv4/ip_forward").write_text("1")
    rules = f"""
        add table ip kube
        add chain ip kube services {{ type nat hook prerouting priority -100; }}
        add rule ip kube services ip daddr {SERVICE} tcp dport 80 dnat to {CART[4]}:8080
        add rule ip kube services ip daddr {DNS_SERVICE} udp dport 53 dnat to {DNS[4]}:53
        add chain ip kube forward {{ type filter hook forward priority 0; }}
        add rule ip kube forward ct state new counter
    """
    subprocess.run(["nft", "-f", "-"], input=rules, text=True, check=True)


def work() -> None:
    """Start everything that makes the machine busy."""
    cart, cart_net = lay_out_pod(CART)
    start(cart, *me("serve"), netns=cart_net)
    dns, dns_net = lay_out_pod(DNS)
    start(dns, *me("resolve"), netns=dns_net)
    checkout, checkout_net = lay_out_pod(CHECKOUT)
    start(checkout, *me("call"), netns=checkout_net)
    reports, reports_net = lay_out_pod(REPORTS)
    stress = "stress-ng --quiet --temp-path /run/disk --cpu 1 --cpu-load 20 --cpu-load-slice 50"
    start(reports, *stress.split(), netns=reports_net)
    redis = cgroup(REDIS, memory_max=str(256 * MIB))
    start(redis, "redis-server", "--dir", str(DISK), "--appendonly", "yes", "--save", "", "--port", "6379")
    benchmark = "while sleep 30; do redis-benchmark -q -n 100 -c 4 -r 5000 -d 200 -t set,get,lpush; done"
    start(cgroup(BENCHMARK), "sh", "-c", benchmark)
    source = DISK / "build"
    source.mkdir()
    body = "".join(f"int f{number}(int x) {{ return x * {number} + f{number - 1}(x); }}\n" for number in range(1, 60))
    (source / "a.c").write_text(f"int f0(int x) {{ return x; }}\n{body}")
    build = f"cd {source} && while :; do cc -O1 -c a.c -o a.o; sleep 60; done"
    start(cgroup(BUILD, memory_max=str(256 * MIB)), "sh", "-c", build)


class _Answer(socketserver.StreamRequestHandler):
    def handle(self) -> None:
        """Answer every line, until the other side has had enough."""
        for line in self.rfile:
            self.wfile.write(hashlib.sha256(line).hexdigest().encode() + b"\n")


def serve() -> None:
    """Be a server with an accept queue of ordinary length."""
    socketserver.ThreadingTCPServer.request_queue_size = 128
    socketserver.ThreadingTCPServer.allow_reuse_address = True
    socketserver.ThreadingTCPServer(("", 8080), _Answer).serve_forever()


def resolve() -> None:
    """Answer datagrams, as a resolver does."""
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as server:
        server.bind(("", 53))
        while True:
            data, sender = server.recvfrom(512)
            server.sendto(data, sender)


def call() -> None:
    """Resolve and then ask, every second or two, with a new connection each time; one connection is kept."""
    kept = socket.create_connection((SERVICE, 80))
    kept_lines = kept.makefile("rb")
    while True:
        with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as query:
            query.settimeout(5)
            query.sendto(b"cart", (DNS_SERVICE, 53))
            query.recv(512)
        with socket.create_connection((SERVICE, 80), 5) as connection:
            connection.sendall(b"how much?\n")
            connection.makefile("rb").readline()
        kept.sendall(b"still there?\n")
        kept_lines.readline()
        time.sleep(1.5)


def record(directory: Path, minutes: float) -> None:
    """Lay everything out, run the exporter, and save what it says every 30 seconds."""
    if not os.environ.get("SHOAL_VM"):
        sys.exit(
            "this lays out cgroups, namespaces and firewall rules: run it in the virtual machine of tests/vm_disk.sh"
        )
    lay_out_node()
    work()
    options = "--netns.enter=true --redis.discover=true --log.level=info --neighbours.watch=10.244.1.2"
    start(cgroup(EXPORTER), sys.executable, "-m", "shoal", *options.split(), f"--web.listen-address=127.0.0.1:{PORT}")
    say("everything is started")
    (directory / "KERNEL").write_text(os.uname().release)
    # What starts is not what runs: a machine under emulation needs minutes until all programs are read from the share.
    due = time.monotonic() + 120
    for number in range(int(minutes * 60 / INTERVAL) + 1):
        time.sleep(max(0.0, due - time.monotonic()))
        begun = time.monotonic()
        request = urllib.request.Request(
            f"http://127.0.0.1:{PORT}/metrics", headers={"X-Prometheus-Scrape-Timeout-Seconds": "25"}
        )
        try:
            with urllib.request.urlopen(request, timeout=29) as answer:  # noqa: S310  (loopback)
                text = answer.read()
        except OSError as error:
            say("scrape", number, error)
            text = b""
        due += INTERVAL
        (directory / f"{number:03}.prom.gz").write_bytes(gzip.compress(text, mtime=0))
        if number % 10 == 0:
            say(
                "scrape",
                number,
                len(text),
                f"{time.monotonic() - begun:.2f} s",
                Path("/proc/loadavg").read_text().strip(),
            )
            for log in Path("/run").glob("*.log"):
                shutil.copy(log, directory)


if __name__ == "__main__":
    match sys.argv[1:]:
        case ["serve"]:
            serve()
        case ["resolve"]:
            resolve()
        case ["call"]:
            call()
        case [directory, minutes]:
            record(Path(directory), float(minutes))
        case _:
            sys.exit(__doc__)
