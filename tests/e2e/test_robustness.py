"""The real exporter where the machine gives it little, lies to it or stands still: what it says stays true."""

from __future__ import annotations

import os
import resource
import signal
import socket
import subprocess
import sys
import threading
import time
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path
from typing import TYPE_CHECKING

import pytest
from tests.e2e.process import Scrape, exporter, fallen, free_port
from tests.lab.node import cgroup_mount, remove_cgroups

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

pytestmark = pytest.mark.root

NOBODY = ("setpriv", "--reuid=65534", "--regid=65534", "--clear-groups", "--bounding-set=-all", "--inh-caps=-all")
# The chart's limit of memory.
MEMORY = 128 << 20
# How long `SIGSTOP` lasts; SHOAL_STOP_SECONDS=60 makes it the minute that nobody waits for in CI.
STOPPED = float(os.environ.get("SHOAL_STOP_SECONDS", "3"))

DROPS = "shoal_listen_queue_drops_total"
# A signal that is there exactly when this metric is.
SIGNALS = {
    "listen_queue_namespaces": DROPS,
    "memory_oom_kills": "shoal_node_memory_oom_kills_total",
    "reverse_path_drops": "shoal_reverse_path_drops_total",
}


@contextmanager
def limited(controller: str, v1: dict[str, str], v2: dict[str, str]) -> Iterator[tuple[str, ...]]:
    """Make a cgroup with these settings; yields the command to run others in it with."""
    root = Path("/sys/fs/cgroup", controller)
    settings = v1
    if not root.is_dir():
        root, settings = Path("/sys/fs/cgroup"), v2
    place = root / f"shoal-robust-{os.getpid()}"
    place.mkdir()
    try:
        for name, value in settings.items():
            (place / name).write_text(value)
        yield ("sh", "-c", f'echo $$ >{place}/cgroup.procs && exec "$@"', "sh")
    finally:
        remove_cgroups(place)


def wait_for(condition: Callable[[], object], what: str) -> None:
    """Wait until something is true; a slow machine has a minute for it."""
    until = time.monotonic() + 60
    while not condition():
        assert time.monotonic() < until, what
        time.sleep(0.1)


def test_the_memory_that_the_chart_gives(tmp_path: Path) -> None:
    """Within the chart's limit, all memory that the kernel charges for it included, it is not killed by its scrapes."""
    v1 = {"memory.limit_in_bytes": str(MEMORY)}
    with limited("memory", v1, {"memory.max": str(MEMORY)}) as before, ExitStack() as stack:
        running = stack.enter_context(exporter(before=before, log=tmp_path / "log"))
        for _ in range(20):
            assert not running.scrape().failed
        threads = [threading.Thread(target=running.scrape) for _ in range(50)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert not running.scrape().failed
        assert running.process.poll() is None


def test_a_fifth_of_a_cpu(tmp_path: Path) -> None:
    """A quota makes it slow; no collector fails for it within Prometheus' usual ten seconds."""
    v1 = {"cpu.cfs_period_us": "100000", "cpu.cfs_quota_us": "20000"}
    with limited("cpu", v1, {"cpu.max": "20000 100000"}) as before, ExitStack() as stack:
        running = stack.enter_context(exporter(before=before, log=tmp_path / "log"))
        for _ in range(3):
            scrape = running.scrape(timeout=10)
            assert not scrape.failed
            assert scrape.seconds < 10


def test_sixty_four_descriptors(tmp_path: Path) -> None:
    """Clients cannot take them all; where none is left signals are absent, with the reason; afterwards all is back."""
    with exporter(before=("prlimit", "--nofile=64:64"), log=tmp_path / "log") as running:
        before = running.settled()
        assert not before.failed
        owners = {labels for name, labels in before.values if name == DROPS}
        assert owners
        pid = running.process.pid

        def descriptors() -> int:
            return len(os.listdir(f"/proc/{pid}/fd"))

        wait_for(lambda: running.get("/-/healthy") and descriptors() < 40, "it keeps connections")
        alone = descriptors()
        with ExitStack() as stack:
            for _ in range(80):
                one = stack.enter_context(socket.socket())
                one.setblocking(False)  # noqa: FBT003  (the socket's own signature)
                with suppress(BlockingIOError):
                    one.connect(("127.0.0.1", running.port))
            wait_for(lambda: descriptors() > alone + 10, "nobody is let in")
            running.get("/-/healthy")
            assert descriptors() < 40, "clients took what the collectors need"
            crowded = running.scrape()
            assert not crowded.failed
            assert crowded.signals == before.signals
        asking = socket.create_connection(("127.0.0.1", running.port))
        asking.settimeout(30)
        asking.sendall(b"GET /-/healthy HTTP/1.1\r\nHost: x\r\n\r\n")
        asking.recv(1000)
        wait_for(lambda: descriptors() <= alone + 1, "those who have gone are still there")
        taken = set(map(int, os.listdir(f"/proc/{pid}/fd")))
        resource.prlimit(pid, resource.RLIMIT_NOFILE, (min(set(range(64)) - taken), 64))
        asking.sendall(b"GET /metrics HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n")
        answer = b""
        while piece := asking.recv(65536):
            answer += piece
        spent = Scrape(metrics(answer.decode()), 0)
        for signal, name in SIGNALS.items():
            assert (spent.signals[signal] == "") == bool(spent.named(name)), signal
        assert "" not in {spent.signals[signal] for signal in SIGNALS}
        assert {labels for name, labels in spent.values if name == DROPS} <= owners, "it was given to another"
        asking.close()
        resource.prlimit(pid, resource.RLIMIT_NOFILE, (64, 64))
        after = running.scrape()
        assert not after.failed
        assert after.signals == before.signals


def metrics(answer: str) -> str:
    """Return the body of an answer that came as it is sent, perhaps in pieces with their lengths between them."""
    head, _, body = answer.partition("\r\n\r\n")
    if "chunked" in head.lower():
        body = "".join(body.split("\r\n")[1::2])
    return body


def test_a_full_disk(tmp_path: Path) -> None:
    """Where its log cannot be written it goes on, ends when told to, and logs again when there is room."""
    script = (
        f"mount -t tmpfs -o size=64k tmpfs {tmp_path} && head -c 65536 /dev/zero >{tmp_path}/filler;"
        f'exec "$@" 2>>{tmp_path}/log'
    )
    before = ("unshare", "--mount", "sh", "-c", script, "sh")
    with exporter("--log.level=debug", before=before) as running:
        inside = Path(f"/proc/{running.process.pid}/root{tmp_path}")
        for _ in range(3):
            assert not running.scrape().failed
        assert (inside / "log").stat().st_size == 0, "there was room"
        (inside / "filler").unlink()
        running.process.send_signal(signal.SIGTERM)
        assert running.process.wait(timeout=20) == 0


def test_sigstop() -> None:
    """It takes up where it was: one scrape that waited is answered, and the time that it slept is no server's stall."""
    with ExitStack() as stack:
        server, port = stack.enter_context(redis())
        running = stack.enter_context(exporter(f"--redis.target=redis://127.0.0.1:{port}"))
        wait_for(lambda: running.scrape().named("shoal_redis_up") == [1], "it does not find the server")
        before = running.scrape()
        # So that a PING is on its way, for which the server takes a third of a second.
        server.send_signal(signal.SIGSTOP)
        time.sleep(0.3)
        running.process.send_signal(signal.SIGSTOP)
        server.send_signal(signal.SIGCONT)
        answers: list[object] = []
        waiting = threading.Thread(target=lambda: answers.append(running.scrape(timeout=STOPPED + 30)))
        waiting.start()
        time.sleep(STOPPED)
        assert not answers
        running.process.send_signal(signal.SIGCONT)
        waiting.join()
        enough = pings(before) + 10
        wait_for(lambda: pings(running.scrape()) > enough, "it asks the server no more")
        after = running.scrape()
        assert not after.failed
        assert after.named("shoal_redis_up") == [1]
        assert not fallen(before, after)
        assert slow_pings(after) == slow_pings(before), "the exporter's sleep was taken for the server's"
        excluded = [scrape.named("shoal_redis_ping_excluded_seconds_total")[0] for scrape in (before, after)]
        assert excluded[1] - excluded[0] > STOPPED - 1


def pings(scrape: Scrape) -> float:
    """Return how many answers of the Redis server have been timed."""
    return scrape.named("shoal_redis_ping_duration_seconds_count")[0]


def slow_pings(scrape: Scrape) -> float:
    """Return how many of them took 2.5 s or more, as the exporter's sleep did."""
    return pings(scrape) - scrape.named("shoal_redis_ping_duration_seconds_bucket", le="2.5")[0]


def listens(port: int) -> bool:
    """Tell whether somebody listens there."""
    with suppress(OSError), socket.create_connection(("127.0.0.1", port)):
        return True
    return False


@contextmanager
def redis(before: tuple[str, ...] = ()) -> Iterator[tuple[subprocess.Popen[bytes], int]]:
    """Run a Redis server on a port of its own, behind the command `before`."""
    port = free_port()
    command = [*before, "redis-server", "--port", str(port), "--save", "", "--bind", "127.0.0.1"]
    with subprocess.Popen(command, stdout=subprocess.DEVNULL) as process:
        try:
            wait_for(lambda: listens(port), "the server does not start")
            yield process, port
        finally:
            process.kill()


@pytest.mark.parametrize("hidepid", ["1", "2"])
def test_a_proc_that_hides_processes(tmp_path: Path, hidepid: str) -> None:
    """Without a capability it sees its own processes alone; so no namespace is named wrongly, and no sum is of one."""
    script = f'mount -t proc -o hidepid={hidepid} proc /proc && exec "$@"'
    before = ("unshare", "--mount", "sh", "-c", script, "sh", *NOBODY)
    with exporter(before=before, log=tmp_path / "log") as running:
        scrape = running.scrape()
    assert not scrape.failed
    signals = scrape.signals
    hidden = (
        *("conntrack_namespaces", "delays_run_queue", "ephemeral_ports_sockets", "listen_queue_namespaces"),
        *("reverse_path_drops", "neighbours_discards"),
    )
    assert {name: signals[name] for name in hidden} == dict.fromkeys(hidden, "no_permission")
    assert {dict(labels).get("netns", "self") for _, labels in scrape.values} == {"self"}
    for name in ("shoal_conntrack_node_entries", "shoal_writable_layers", "shoal_delay_processes_skipped"):
        assert not scrape.named(name)
    # What is the exporter's own to see is there all the same.
    assert scrape.named("shoal_listener_accept_queue_limit", port=str(running.port))


# Mounts of its own, and a name that would end the text if it were in it.
HOSTILE = """
import ctypes, os, sys
libc = ctypes.CDLL(None, use_errno=True)
libc.unshare(0x00020000)
libc.mount(b"none", b"/", None, 0x44000, None)
for number in range(int(sys.argv[1])):
    if libc.mount(b"/usr", b"/mnt", None, 4096, None):
        sys.exit(os.strerror(ctypes.get_errno()))
libc.prctl(15, b'x"} 1\\n# EOF\\n1)', 0, 0, 0)
print("there", flush=True)
sys.stdin.read()
"""


@pytest.mark.timeout(600)
def test_a_hostile_container(tmp_path: Path) -> None:
    """Names of processes, cgroups and mounts, and as many as the kernel takes, change nobody else's series."""
    uid, identity = "bad0bad0_bad0_bad0_bad0_bad0bad0bad0", "bad0" * 16
    top = cgroup_mount() / f"kubepods-robust{os.getpid()}-pod{uid}.slice"
    container = top / f"cri-containerd-{identity}.scope"
    victim = f"kubepods-pod{'0f8d3c1e_5b7a_4c2d_9e6f_1a2b3c4d5e6f'}.slice/cri-containerd-{'ef0badbf' * 8}.scope"
    with ExitStack() as stack:
        stack.callback(remove_cgroups, top)
        (container / victim).mkdir(parents=True)
        running = stack.enter_context(exporter("--inodes.walk-interval=1", log=tmp_path / "log"))
        enter = f'echo $$ >"{container / victim}/cgroup.procs" && exec "$@"'
        command = ["sh", "-c", enter, "sh", sys.executable, "-c", HOSTILE, "10000"]
        process = stack.enter_context(subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE))
        stack.callback(process.kill)
        assert process.stdout
        assert process.stdout.readline() == b"there\n"
        assert len(Path(f"/proc/{process.pid}/mountinfo").read_bytes().splitlines()) > 10_000
        for _ in range(3):
            scrape = running.scrape(timeout=10)
            assert not scrape.failed
            assert scrape.seconds < 10
            pods = {value for _, labels in scrape.values for key, value in labels if key == "pod"}
            assert uid.replace("_", "-") in pods
            assert "0f8d3c1e-5b7a-4c2d-9e6f-1a2b3c4d5e6f" not in pods
            time.sleep(1)


# Calls itself a server, and says of itself what it should not, first of all that it is another process.
HOSTILE_REDIS = """
import ctypes, socket, sys
ctypes.CDLL(None).prctl(15, b"redis-server", 0, 0, 0)
victim, address = sys.argv[1:]
bulk = lambda text: b"$%d\\r\\n%s\\r\\n" % (len(text), text)
pair = lambda name, value: b"*2\\r\\n" + bulk(name) + bulk(value)
evil = b'1"} 1\\n# EOF\\n'
info = b"redis_version:%s\\r\\nprocess_id:%s\\r\\naof_enabled:%s\\r\\ntotal_forks:%s\\r\\nused_memory_rss:1e400\\r\\n"
info %= evil, victim.encode(), evil, b"9" * 400
server = socket.create_server(("127.0.0.1", int(address.rpartition(":")[2])))
print("there", flush=True)
while True:
    connection, _ = server.accept()
    while data := connection.recv(65536):
        for command in data.split(b"*")[1:]:
            if b"PING" in command:
                answer = b"+PONG\\r\\n"
            elif b"INFO" in command:
                answer = bulk(info)
            elif b"dir" in command:
                answer = pair(b"dir", b"/proc/%s/cwd" % victim.encode())
            elif b"appendfsync" in command:
                answer = pair(b"appendfsync", b"always" + evil)
            elif b"LATENCY" in command:
                answer = b"*1\\r\\n*4\\r\\n" + bulk(evil) + b":1\\r\\n:1\\r\\n:1\\r\\n"
            else:
                answer = b"*0\\r\\n"
            connection.sendall(answer)
"""


def test_a_hostile_redis(tmp_path: Path) -> None:
    """It says that it is another's process, and nonsense for numbers: it has no label of his, and no number."""
    pods = {"bad": "bad0bad0-bad0-bad0-bad0-000000000001", "good": "900d900d-900d-900d-900d-000000000001"}
    enter: dict[str, tuple[str, ...]] = {}
    with ExitStack() as stack:
        for name, uid in pods.items():
            top = cgroup_mount() / f"kubepods-robust{os.getpid()}-pod{uid.replace('-', '_')}.slice"
            stack.callback(remove_cgroups, top)
            container = top / f"cri-containerd-{uid[:4] * 16}.scope"
            container.mkdir(parents=True)
            enter[name] = ("sh", "-c", f'echo $$ >{container}/cgroup.procs && exec "$@"', "sh")
        victim, port = stack.enter_context(redis(enter["good"]))
        victims, own = f"127.0.0.1:{port}", f"127.0.0.1:{free_port()}"
        command = [*enter["bad"], sys.executable, "-c", HOSTILE_REDIS, str(victim.pid), own]
        process = stack.enter_context(subprocess.Popen(command, stdout=subprocess.PIPE))
        stack.callback(process.kill)
        assert process.stdout
        assert process.stdout.readline() == b"there\n"
        running = stack.enter_context(exporter("--redis.discover=true", log=tmp_path / "log"))
        both = {victims: pods["good"], own: pods["bad"]}

        def up() -> bool:
            return all(running.scrape().named("shoal_redis_up", server=server) == [1] for server in both)

        wait_for(up, "they are not found")
        scrape = running.scrape()
        assert not scrape.failed
        told = {
            (name, dict(labels)["server"], dict(labels).get("pod"))
            for name, labels in scrape.values
            if dict(labels).get("server") in both
        }
        assert {(server, pod) for _, server, pod in told} == set(both.items())
        assert ("shoal_redis_aof_enabled", victims, pods["good"]) in told
        numbers = {name for name, server, _ in told if server == own and "_ping_" not in name}
        disk = {f"shoal_redis_disk_{what}" for what in ("info", "writes_total", "write_seconds_total")}
        assert numbers <= {"shoal_redis_up", *disk}


@pytest.mark.timeout(600)
def test_ten_thousand_cgroups_in_the_middle_of_a_scrape(tmp_path: Path) -> None:
    """A container that makes them gets not one series more, and scrapes are whole meanwhile and afterwards."""
    uid = "0f8d3c1e_5b7a_4c2d_9e6f_000000010000"
    top = cgroup_mount() / f"kubepods-robust{os.getpid()}-pod{uid}.slice"
    container = top / f"cri-containerd-{'10f0' * 16}.scope"

    def make() -> None:
        for number in range(10_000):
            os.mkdir(f"{container}/{number}")

    with ExitStack() as stack:
        stack.callback(remove_cgroups, top)
        container.mkdir(parents=True)
        running = stack.enter_context(exporter(log=tmp_path / "log"))
        before = running.scrape()
        made = threading.Thread(target=make)
        made.start()
        during = []
        while made.is_alive():
            during.append(running.scrape(timeout=10))
        made.join()
        during.append(running.scrape(timeout=10))
        mine = {key for key in before.values if ("pod", uid.replace("_", "-")) in key[1]}
        assert mine
        for scrape in during:
            assert not scrape.failed
            assert {key for key in scrape.values if ("pod", uid.replace("_", "-")) in key[1]} == mine
