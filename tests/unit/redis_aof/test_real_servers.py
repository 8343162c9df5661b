"""The collector against real redis-servers: numbers beside redis-cli's, each way in, stalls, servers that go away."""

from __future__ import annotations

import asyncio
import os
import signal
import socket
import ssl
import subprocess
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any
from urllib.parse import quote

import pytest
import redis
from prometheus_client.openmetrics.parser import text_string_to_metric_families
from prometheus_client.parser import text_string_to_metric_families as parse_text

from shoal.exposition import render
from shoal.inventory import Owner
from shoal.redis import server as server_module

if TYPE_CHECKING:
    from tests.unit.redis_aof.conftest import RealServer, StartRedis, Watch

UNOWNED = ("", "", "", "")
parse_openmetrics: Any = text_string_to_metric_families
PASSWORD = "correct horse, battery staple"  # noqa: S105  (of a server that lives as long as a test)


def free_port() -> int:
    """Return a TCP port of the loopback address that nobody listens on."""
    with socket.socket() as sock:
        sock.bind(("127.0.0.1", 0))
        port: int = sock.getsockname()[1]
        return port


def address(server: RealServer) -> str:
    """Return the label of a server on the loopback address."""
    return f"127.0.0.1:{server.port}"


async def test_numbers_are_those_of_redis_cli(start_redis: StartRedis, watch: Watch) -> None:
    """After writes, a rewrite and two spikes each number is what redis-cli shows, in seconds and bytes."""
    options = ("--latency-monitor-threshold", "10", "--maxmemory", "64mb", "--no-appendfsync-on-rewrite", "yes")
    server = await asyncio.to_thread(start_redis, *options)

    def prepare() -> dict[str, str]:
        server.ask("DEBUG", "POPULATE", "20000", "key", "100")
        server.ask("BGREWRITEAOF")
        while server.info()["aof_rewrite_in_progress"] != "0":
            time.sleep(0.05)
        server.ask("DEBUG", "SLEEP", "0.05")
        server.ask("DEBUG", "SLEEP", "0.02")
        return server.info()

    info = await asyncio.to_thread(prepare)
    watching = await watch(f"redis://{address(server)}")
    found = await watching.scrape()
    labels = (address(server), *UNOWNED)
    assert found["shoal_redis_up"] == {(*labels, ""): 1}
    expected = {
        "shoal_redis_aof_enabled": 1,
        "shoal_redis_aof_delayed_fsync_total": int(info["aof_delayed_fsync"]),
        "shoal_redis_aof_pending_bio_fsync": int(info["aof_pending_bio_fsync"]),
        "shoal_redis_aof_rewrite_in_progress": 0,
        "shoal_redis_aof_last_write_ok": 1,
        "shoal_redis_aof_last_rewrite_ok": 1,
        "shoal_redis_latest_fork_seconds": int(info["latest_fork_usec"]) / 1e6,
        "shoal_redis_forks_total": int(info["total_forks"]),
        "shoal_redis_aof_rewrites_total": int(info["aof_rewrites"]),
        "shoal_redis_aof_last_cow_bytes": int(info["aof_last_cow_size"]),
        "shoal_redis_rdb_last_cow_bytes": int(info["rdb_last_cow_size"]),
        "shoal_redis_current_cow_bytes": 0,
        "shoal_redis_maxmemory_bytes": 64 << 20,
        "shoal_redis_latency_monitor_threshold_seconds": 0.01,
    }
    assert {name: found[name][labels] for name in expected} == expected
    assert expected["shoal_redis_forks_total"] >= 1 < expected["shoal_redis_aof_last_cow_bytes"]
    assert found["shoal_redis_used_memory_rss_bytes"][labels] == pytest.approx(int(info["used_memory_rss"]), rel=0.2)
    assert found["shoal_redis_config_info"] == {(*labels, "everysec", "yes"): 1}
    latest = (await asyncio.to_thread(server.ask, "--csv", "LATENCY", "LATEST")).replace('"', "").split(",")
    row = latest.index("command")
    assert found["shoal_redis_latency_event_last_seconds"][*labels, "command"] == int(latest[row + 2]) / 1000
    assert found["shoal_redis_latency_event_max_seconds"][*labels, "command"] == int(latest[row + 3]) / 1000
    assert "shoal_redis_latency_events_total" not in found
    assert {signal for signal, why in watching.collector.availability.absent.items() if why} == {"redis_aof_namespaces"}


def held(*pids: int) -> int:
    """Return the bytes of memory that these processes hold together, a shared page counted once (Pss)."""
    rollups = [Path(f"/proc/{pid}/smaps_rollup").read_text().splitlines() for pid in pids]
    return 1024 * sum(int(line.split()[1]) for rollup in rollups for line in rollup if line.startswith("Pss:"))


def rewrite_under_writes(server: RealServer) -> int:
    """Have half of the data written to while a child rewrites the file; return what both hold when that is done."""
    server.ask("BGREWRITEAOF")
    children = Path(f"/proc/{server.process.pid}/task/{server.process.pid}/children")
    until = time.monotonic() + 20
    while not (child := children.read_text().strip()):
        assert time.monotonic() < until
    # So that it is still there after the writes, however slow the machine is.
    os.kill(int(child), signal.SIGSTOP)
    server.ask("EVAL", "for i = 0, 12499 do redis.call('SETRANGE', 'key:' .. i, 0, 'new') end", "0")
    together = held(server.process.pid, int(child))
    os.kill(int(child), signal.SIGCONT)
    while server.info()["aof_rewrite_in_progress"] != "0":
        time.sleep(0.05)
        assert time.monotonic() < until + 40
    assert server.info()["aof_last_bgrewrite_status"] == "ok"
    return together


async def test_what_a_rewrite_needs_is_foretold(start_redis: StartRedis, watch: Watch) -> None:
    """Resident memory and the last copies are what the kernel counts for server and child in the next rewrite."""
    server = await asyncio.to_thread(start_redis, "--rdb-key-save-delay", "1")
    await asyncio.to_thread(server.ask, "DEBUG", "POPULATE", "25000", "key", "2000")
    watching = await watch(f"redis://{address(server)}")
    labels = (address(server), *UNOWNED)
    found = await watching.scrape()
    assert found["shoal_redis_aof_last_cow_bytes"][labels] == 0
    await asyncio.to_thread(rewrite_under_writes, server)
    found = await watching.scrape()
    resident = found["shoal_redis_used_memory_rss_bytes"][labels]
    copied = found["shoal_redis_aof_last_cow_bytes"][labels]
    needed = await asyncio.to_thread(rewrite_under_writes, server)
    info = await asyncio.to_thread(server.info)
    assert needed > 1.3 * resident
    assert resident + copied == pytest.approx(needed, rel=0.15)
    assert copied == pytest.approx(int(info["aof_last_cow_size"]), rel=0.25)
    found = await watching.scrape()
    assert found["shoal_redis_aof_last_cow_bytes"][labels] == int(info["aof_last_cow_size"])


async def test_names_that_need_care(start_redis: StartRedis, watch: Watch, tmp_path: Path) -> None:
    """The path that was asked for comes back as it is written; what clients and files are called is nowhere."""
    odd = 'a "quoted", \\ and 🐟 } 1\\n'
    path = tmp_path / odd
    # A path has 107 bytes; the rest of the name is of as many as are left.
    path /= "two\nlines" + "x" * (107 - len(os.fsencode(path)) - 10)
    assert len(os.fsencode(path)) == 107
    await asyncio.to_thread(path.parent.mkdir)
    directory = tmp_path / f"data {odd}" / ("y" * 255) / ("z" * 255)
    await asyncio.to_thread(directory.mkdir, parents=True)
    options = ("--unixsocket", str(path), "--dir", str(directory))
    await asyncio.to_thread(start_redis, *options, cli=("-s", str(path)), port=0)

    def connect() -> redis.Redis:
        client = redis.Redis(unix_socket_path=str(path), single_connection_client=True)
        client.client_setname('"}' * 2048)
        return client

    client = await asyncio.to_thread(connect)
    watching = await watch("unix://" + quote(str(path)))
    families = await watching.scraper.scrape(["redis_aof"], 9.5)
    assert await asyncio.to_thread(client.client_getname) == '"}' * 2048
    await asyncio.to_thread(client.close)
    for openmetrics, parse in ((True, parse_openmetrics), (False, parse_text)):
        text = (render(families, openmetrics=openmetrics) + b"# EOF\n" * openmetrics).decode()
        samples = [sample for family in parse(text) for sample in family.samples]
        up = [sample for sample in samples if sample.name == "shoal_redis_up"]
        assert [(sample.labels, sample.value) for sample in up] == [({"server": str(path)}, 1)]
        values = {value for sample in samples for name, value in sample.labels.items() if name != "server"}
        assert not [value for value in values if odd in value or '"' in value]
        assert len([one for one in samples if one.labels.get("server") == str(path)]) > 20


async def test_what_a_server_does_not_have_is_absent(start_redis: StartRedis, watch: Watch) -> None:
    """No append-only file, no limit of memory, no latency monitor: no numbers of them, and the monitor stays off."""
    server = await asyncio.to_thread(start_redis, "--appendonly", "no")
    watching = await watch(f"redis://{address(server)}")
    found = await watching.scrape()
    labels = (address(server), *UNOWNED)
    assert found["shoal_redis_aof_enabled"] == {labels: 0}
    assert not found.keys() & {"shoal_redis_aof_delayed_fsync_total", "shoal_redis_maxmemory_bytes"}
    assert found["shoal_redis_latency_monitor_threshold_seconds"] == {labels: 0}
    assert found["shoal_signal_available"]["redis_aof_latency", "disabled"] == 0
    assert (await asyncio.to_thread(server.ask, "CONFIG", "GET", "latency-monitor-threshold")).split()[1] == "0"


async def test_only_harmless_commands_are_sent(start_redis: StartRedis, watch: Watch) -> None:
    """The server's own count of commands, from the first connection to the last scrape, has none that writes."""
    server = await asyncio.to_thread(start_redis)
    await asyncio.to_thread(server.ask, "CONFIG", "RESETSTAT")
    watching = await watch(f"redis://{address(server)}")
    for _ in range(3):
        await watching.scrape()
    stats = await asyncio.to_thread(server.ask, "INFO", "commandstats")
    commands = {line.partition(":")[0] for line in stats.splitlines() if line.startswith("cmdstat_")}
    # redis-cli itself resets the statistics and asks for them.
    allowed = {"ping", "info", "config|get", "latency|latest", "config|resetstat"}
    assert commands <= {f"cmdstat_{command}" for command in allowed}


async def test_password(start_redis: StartRedis, watch: Watch, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """None and a wrong one are `auth`; the right one is read from a file or a variable, anew at the next attempt."""
    monkeypatch.setattr(server_module, "_LAST_RETRY_SECONDS", 0.2)
    monkeypatch.setattr(server_module, "_FIRST_RETRY_SECONDS", 0.2)
    server = await asyncio.to_thread(
        start_redis, "--requirepass", PASSWORD, cli=("-p", str(port := free_port()), "-a", PASSWORD), port=port
    )
    name = address(server)
    bare = await watch(f"redis://{name}")
    assert await bare.reasons() == {name: "auth"}
    file = tmp_path / "password"
    missing = await watch(f"redis://{name}", redis_password_file=str(file))
    assert await missing.reasons() == {name: "auth"}
    await asyncio.to_thread(file.write_text, "wrong\n")
    wrong = await watch(f"redis://{name}", redis_password_file=str(file))
    assert await wrong.reasons() == {name: "auth"}
    await asyncio.to_thread(file.write_text, f"{PASSWORD}\n")
    await missing.until(name, "")
    await wrong.until(name, "")
    of_its_own = await watch(f"redis://{name}?password_file={file}", redis_password_file=str(tmp_path / "none"))
    assert await of_its_own.reasons() == {name: ""}
    monkeypatch.setenv("SHOAL_REDIS_PASSWORD", PASSWORD)
    await bare.until(name, "")
    monkeypatch.delenv("SHOAL_REDIS_PASSWORD")
    monkeypatch.setenv("ANOTHER", PASSWORD)
    variable = await watch(f"redis://{name}?password_variable=ANOTHER")
    assert await variable.reasons() == {name: ""}


async def test_user_who_may_only_look(start_redis: StartRedis, watch: Watch, monkeypatch: pytest.MonkeyPatch) -> None:
    """With PING and INFO alone CONFIG and LATENCY are absent with a reason, asked for at one scrape of three."""
    server = await asyncio.to_thread(start_redis, config="user shoal on >secret1 +ping +info\n")
    monkeypatch.setenv("SHOAL_REDIS_PASSWORD", "secret1")
    watching = await watch(f"redis://shoal@{address(server)}")
    for _ in range(3):
        found = await watching.scrape()
        assert found["shoal_redis_aof_delayed_fsync_total"] == {(address(server), *UNOWNED): 0}
        assert not found.keys() & {"shoal_redis_config_info", "shoal_redis_latency_monitor_threshold_seconds"}
        assert found["shoal_signal_available"]["redis_aof_config", "no_permission"] == 0
        assert found["shoal_signal_available"]["redis_aof_latency", "no_permission"] == 0
    denied = (await asyncio.to_thread(server.ask, "ACL", "LOG")).splitlines()
    assert [denied[place + 1] for place, word in enumerate(denied) if word == "count"] == ["1", "4"]
    assert sorted(denied[place + 1] for place, word in enumerate(denied) if word == "object") == [
        "config|get",
        "latency|latest",
    ]
    # The data directory is found without CONFIG, by the link that the process itself is.
    assert found["shoal_signal_available"]["redis_aof_disk", ""] == 1
    assert found["shoal_redis_disk_info"]


async def test_user_who_may_not_even_look(
    start_redis: StartRedis, watch: Watch, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Without INFO the server is down for this user, while its PINGs are still timed; without PING it is down."""
    users = "user timer on >secret1 +ping\nuser nobody on >secret1 -@all\n"
    server = await asyncio.to_thread(start_redis, config=users)
    monkeypatch.setenv("SHOAL_REDIS_PASSWORD", "secret1")
    name = address(server)
    timer = await watch(f"redis://timer@{name}")
    assert await timer.reasons() == {name: "auth"}
    await asyncio.sleep(0.5)
    assert (await timer.scrape())["shoal_redis_ping_duration_seconds"][name, *UNOWNED, "+Inf"] >= 2
    nobody = await watch(f"redis://nobody@{name}")
    assert await nobody.reasons() == {name: "auth"}


async def test_renamed_config(start_redis: StartRedis, watch: Watch) -> None:
    """A server whose operator has taken CONFIG away: absent, as disabled, and the rest is there."""
    server = await asyncio.to_thread(start_redis, "--rename-command", "CONFIG", "")
    found = await (await watch(f"redis://{address(server)}")).scrape()
    assert found["shoal_signal_available"]["redis_aof_config", "disabled"] == 0
    assert found["shoal_redis_up"] == {(address(server), *UNOWNED, ""): 1}


async def test_unix_socket(start_redis: StartRedis, watch: Watch, tmp_path: Path) -> None:
    """A server that listens on a Unix socket alone, whose process the kernel names."""
    path = tmp_path / "with space,and,comma" / "redis.sock"
    await asyncio.to_thread(path.parent.mkdir)
    await asyncio.to_thread(start_redis, "--unixsocket", str(path), cli=("-s", str(path)), port=0)
    quoted = str(path).replace(" ", "%20").replace(",", "%2C")
    watching = await watch(f"unix://{quoted}", f"unix://{quoted}.none")
    found = await watching.scrape()
    assert found["shoal_redis_up"] == {(str(path), *UNOWNED, ""): 1, (f"{path}.none", *UNOWNED, "refused"): 0}
    assert [labels[0] for labels in found["shoal_redis_disk_info"]] == [str(path)]


def certificates(directory: Path) -> None:
    """Make an authority, a server's certificate for `localhost`, a client's, and an authority that signed neither."""

    def openssl(*arguments: str) -> None:
        subprocess.run(["openssl", *arguments], cwd=directory, check=True, capture_output=True)

    for authority in ("ca", "other"):
        openssl(
            *("req", "-x509", "-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:P-256", "-nodes", "-days", "2"),
            *("-subj", f"/CN={authority}", "-keyout", f"{authority}.key", "-out", f"{authority}.crt"),
        )
    for name, alternative in (("server", "subjectAltName=DNS:localhost"), ("client", "subjectAltName=DNS:shoal")):
        (directory / f"{name}.ext").write_text(alternative)
        openssl(
            *("req", "-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:P-256", "-nodes", "-subj", f"/CN={name}"),
            *("-keyout", f"{name}.key", "-out", f"{name}.csr"),
        )
        openssl(
            *(
                "x509",
                "-req",
                "-in",
                f"{name}.csr",
                "-CA",
                "ca.crt",
                "-CAkey",
                "ca.key",
                "-CAcreateserial",
                "-days",
                "2",
            ),
            *("-extfile", f"{name}.ext", "-out", f"{name}.crt"),
        )


async def test_tls(start_redis: StartRedis, watch: Watch, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A server that wants TLS and a client's certificate: reached with both, `tls` with one missing or wrong.

    Whatever Python it is: from 3.13 on it is strict unless told otherwise, and these have no key identifiers.
    """
    create = ssl.create_default_context

    def strict(**arguments: Any) -> ssl.SSLContext:
        context = create(**arguments)
        context.verify_flags |= ssl.VERIFY_X509_STRICT
        return context

    monkeypatch.setattr(ssl, "create_default_context", strict)
    await asyncio.to_thread(certificates, tmp_path)
    files = [str(tmp_path / name) for name in ("ca.crt", "server.crt", "server.key", "client.crt", "client.key")]
    ca, _, _, client, key = files
    port = free_port()
    tls = ("--tls-port", str(port), "--tls-ca-cert-file", ca, "--tls-cert-file", files[1], "--tls-key-file", files[2])
    cli = ("-p", str(port), "--tls", "--cacert", ca, "--cert", client, "--key", key)
    await asyncio.to_thread(start_redis, *tls, cli=cli, port=0)
    own = f"ssl_certfile={client}&ssl_keyfile={key}"
    cases = {
        f"rediss://localhost:{port}?ssl_ca_certs={ca}&{own}": "",
        f"rediss://127.0.0.1:{port}?ssl_ca_certs={ca}&{own}&ssl_check_hostname=false": "",
        f"rediss://127.0.0.1:{port}?ssl_ca_certs={ca}&{own}": "tls",
        f"rediss://localhost:{port}?ssl_ca_certs={tmp_path / 'other.crt'}&{own}": "tls",
        f"rediss://localhost:{port}?{own}": "tls",
        f"rediss://localhost:{port}?ssl_ca_certs={ca}.none": "tls",
        f"redis://localhost:{port}": "closed",
    }
    for target, reason in cases.items():
        watching = await watch(target)
        assert list((await watching.reasons()).values()) == [reason], target
    without = await watch(f"rediss://localhost:{port}?ssl_ca_certs={ca}")
    # TLS 1.3 tells a client that its certificate is missing only after the handshake.
    assert next(iter((await without.reasons()).values())) in ("tls", "closed")


async def test_no_tls_there(start_redis: StartRedis, watch: Watch) -> None:
    """TLS spoken to a plain server does not hang: the server closes, or the exporter sees no TLS."""
    server = await asyncio.to_thread(start_redis)
    watching = await watch(f"rediss://{address(server)}")
    assert next(iter((await watching.reasons()).values())) in ("tls", "closed", "timeout")


@pytest.mark.slow
async def test_restart(start_redis: StartRedis, watch: Watch) -> None:
    """A server that ends is down at the next scrape; back again it is read anew, and the PINGs go on counting."""
    server = await asyncio.to_thread(start_redis)
    name, labels = address(server), (address(server), *UNOWNED)
    watching = await watch(f"redis://{name}")
    await asyncio.to_thread(server.ask, "BGREWRITEAOF")
    await asyncio.sleep(1)
    before = await watching.scrape()
    assert before["shoal_redis_forks_total"][labels] >= 1
    await asyncio.to_thread(server.stop)
    await watching.until(name, "refused", within=3)
    gone = await watching.scrape()
    assert "shoal_redis_forks_total" not in gone
    await asyncio.to_thread(server.start)
    await watching.until(name, "")
    await asyncio.sleep(0.5)
    after = await watching.scrape()
    assert after["shoal_redis_forks_total"][labels] == 0
    counts = [found["shoal_redis_ping_duration_seconds"][*labels, "+Inf"] for found in (before, gone, after)]
    assert counts == sorted(counts)
    assert counts[-1] > counts[0]


@pytest.mark.slow
async def test_hang(start_redis: StartRedis, watch: Watch, monkeypatch: pytest.MonkeyPatch) -> None:
    """A stopped process: the scrape ends in time, the PINGs without an answer count as 5 s, and its end is seen."""
    server = await asyncio.to_thread(start_redis)
    name, labels = address(server), (address(server), *UNOWNED)
    watching = await watch(f"redis://{name}")
    await watching.scrape()
    server.process.send_signal(signal.SIGSTOP)
    assert await watching.reasons() == {name: "timeout"}
    assert watching.took < 5
    await asyncio.sleep(6)
    # It is known to be down by now and is not waited for.
    monkeypatch.setattr(server_module, "_READ_SECONDS", 60)
    hung = await watching.scrape()
    assert hung["shoal_redis_up"] == {(*labels, "timeout"): 0}
    # 25 PINGs were due in 5 s, more if this machine was busy, and half of them waited for over 2.5 s.
    assert 20 <= watching.slow_pings(hung, name, "0.1") <= 35
    assert 10 <= watching.slow_pings(hung, name, "2.5") <= 20
    server.process.send_signal(signal.SIGCONT)
    await watching.until(name, "")


async def test_stall_of_300_ms(start_redis: StartRedis, watch: Watch) -> None:
    """A command that takes 0.3 s is seen in the PINGs, and in no number that the server has of its flushes."""
    server = await asyncio.to_thread(start_redis)
    name, labels = address(server), (address(server), *UNOWNED)
    watching = await watch(f"redis://{name}")
    await asyncio.sleep(0.5)
    before = await watching.scrape()
    await asyncio.to_thread(server.ask, "DEBUG", "SLEEP", "0.3")
    await asyncio.sleep(0.1)
    found = await watching.scrape()
    # PINGs are due 0.2 s apart: one or two are on their way meanwhile, and wait for 0.1 s at least.
    assert 1 <= watching.slow_pings(found, name, "0.05") - watching.slow_pings(before, name, "0.05") <= 3
    assert found["shoal_redis_aof_delayed_fsync_total"] == {labels: 0}


@pytest.mark.slow
@pytest.mark.parametrize("policy", ["always", "everysec"])
async def test_slow_flushes_of_half_a_second(
    start_redis: StartRedis, watch: Watch, slow_fsync: Path, tmp_path: Path, policy: str
) -> None:
    """Flushes of 0.5 s: every write stalls clients under `always`, none under `everysec`, and INFO shows neither."""
    delay = tmp_path / "delay"
    await asyncio.to_thread(delay.write_text, "0")
    shim = {"LD_PRELOAD": str(slow_fsync), "SLOW_FSYNC": str(delay)}
    server = await asyncio.to_thread(start_redis, "--appendfsync", policy, environment=shim)
    name, labels = address(server), (address(server), *UNOWNED)
    watching = await watch(f"redis://{name}")
    await asyncio.to_thread(server.ask, "-r", "20", "-i", "0.05", "SET", "key", "value")
    quiet = await watching.scrape()
    await asyncio.to_thread(delay.write_text, "500")
    await asyncio.to_thread(server.ask, "-r", "6", "-i", "0.1", "SET", "key", "value")
    found = await watching.scrape()
    assert found["shoal_redis_config_info"] == {(*labels, policy, "no"): 1}
    assert found["shoal_redis_aof_delayed_fsync_total"] == {labels: 0}
    slow = watching.slow_pings(found, name, "0.25") - watching.slow_pings(quiet, name, "0.25")
    assert slow >= 5 if policy == "always" else slow == 0
    await asyncio.to_thread(delay.write_text, "0")


@pytest.mark.slow
async def test_flushes_of_over_two_seconds(
    start_redis: StartRedis, watch: Watch, slow_fsync: Path, tmp_path: Path
) -> None:
    """Flushes of 3 s under `everysec`, with writes going on: aof_delayed_fsync rises, as redis-cli sees it."""
    delay = tmp_path / "delay"
    await asyncio.to_thread(delay.write_text, "0")
    shim = {"LD_PRELOAD": str(slow_fsync), "SLOW_FSYNC": str(delay)}
    server = await asyncio.to_thread(start_redis, "--appendfsync", "everysec", environment=shim)
    name, labels = address(server), (address(server), *UNOWNED)
    watching = await watch(f"redis://{name}")
    await asyncio.to_thread(delay.write_text, "3000")
    await asyncio.to_thread(server.ask, "-r", "60", "-i", "0.1", "SET", "key", "value")
    await asyncio.to_thread(delay.write_text, "0")
    await watching.until(name, "")
    found = await watching.scrape()
    info = await asyncio.to_thread(server.info)
    assert int(info["aof_delayed_fsync"]) >= 1
    assert found["shoal_redis_aof_delayed_fsync_total"] == {labels: int(info["aof_delayed_fsync"])}


async def test_disk_of_the_data(start_redis: StartRedis, watch: Watch, tmp_path: Path) -> None:
    """The disk that the append-only file is on has its writes and flushes beside it, and they are the kernel's."""
    server = await asyncio.to_thread(start_redis, "--appendfsync", "always")
    watching = await watch(f"redis://{address(server)}")
    found = await watching.scrape()
    if os.major((await asyncio.to_thread(tmp_path.stat)).st_dev) == 0:
        assert found["shoal_signal_available"]["redis_aof_disk", "not_readable"] == 0
        pytest.skip("the temporary directory is on no block device")
    devices = {labels[-1] for labels in found["shoal_redis_disk_info"]}
    assert devices == {labels[0] for labels in found["shoal_disk_flushes_total"]}
    (device,) = devices
    before = found["shoal_disk_flushes_total"][device,]
    await asyncio.to_thread(server.ask, "-r", "50", "SET", "key", "value")
    later = await watching.scrape()
    rows = [row.split() for row in (await asyncio.to_thread(Path("/proc/diskstats").read_text)).splitlines()]
    now = next(int(row[18]) for row in rows if row[2] == device)
    assert before + 50 <= later["shoal_disk_flushes_total"][device,] <= now
    number = (await asyncio.to_thread(tmp_path.stat)).st_dev
    volume = next(row for row in rows if (int(row[0]), int(row[1])) == (os.major(number), os.minor(number)))
    labels = (address(server), *UNOWNED)
    writes, seconds = (f"shoal_redis_disk_{name}_total" for name in ("writes", "write_seconds"))
    assert found[writes][labels] + 50 <= later[writes][labels] <= int(volume[7])
    assert found[seconds][labels] < later[seconds][labels] <= int(volume[10]) / 1000


@pytest.mark.root
async def test_owner(start_redis: StartRedis, watch: Watch, tmp_path: Path) -> None:
    """A server in a pod's cgroup has the pod's labels, which stay when it goes down: its series do not change names."""
    mounts = await asyncio.to_thread(Path("/proc/mounts").read_text)
    hierarchy = next((row.split()[1] for row in mounts.splitlines() if row.split()[2] == "cgroup2"), "")
    if not hierarchy:
        pytest.skip("there is no cgroup v2 here")
    uid = f"{os.getpid():08x}-0000-0000-0000-00000000a0f0"
    pod = Path(hierarchy, f"kubepods-besteffort-pod{uid.replace('-', '_')}.slice")
    container = pod / f"cri-containerd-{'ab' * 28}{os.getpid():08x}.scope"
    await asyncio.to_thread(container.mkdir, parents=True)
    await asyncio.to_thread((tmp_path / f"var/log/pods/shop_cart-0_{uid}").mkdir, parents=True)
    server = await asyncio.to_thread(start_redis)
    try:
        await asyncio.to_thread((container / "cgroup.procs").write_text, str(server.process.pid))
        watching = await watch(f"redis://{address(server)}", path_rootfs=str(tmp_path))
        owner = Owner("shop", "cart-0", f"{'ab' * 6}").labels
        assert (await watching.scrape())["shoal_redis_up"] == {(address(server), *owner, ""): 1}
        await asyncio.to_thread(server.stop)
        await watching.until(address(server), "refused")
        assert (await watching.scrape())["shoal_redis_up"] == {(address(server), *owner, "refused"): 0}
    finally:
        await asyncio.to_thread(server.stop)
        await asyncio.to_thread(container.rmdir)
        await asyncio.to_thread(pod.rmdir)
