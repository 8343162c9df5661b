"""Collector `conntrack` on a stock kernel whose modules are loaded one by one: `make test-vm`, on no machine in use."""

from __future__ import annotations

import re
import subprocess
import time
from pathlib import Path

from tests.vm.table import full_table

from shoal.collectors.conntrack import ConntrackCollector
from shoal.inventory import Node
from shoal.kernel.files import Reason, Roots
from shoal.settings import resolve

HOST = ("host", "", "", "", "")
SIGNALS = ("entries", "statistics", "namespaces", "dump", "backends")


def loaded() -> set[str]:
    """Return the names of the kernel modules that are loaded."""
    return {line.split()[0] for line in Path("/proc/modules").read_text(encoding="ascii").splitlines()}


def scrape() -> tuple[dict[str, dict[tuple[str, ...], float]], list[str]]:
    """Return {metric: {labels: value}} of one scrape, and the reason for the absence of each signal, or ""."""
    collector = ConntrackCollector(resolve({}, {}))
    until = time.monotonic() + 60
    while True:
        found = {family.metric.name: dict(family.samples) for family in collector.read(Node(Roots()))}
        dump = collector.availability.absent["conntrack_dump"]
        # A scrape does not wait for long until the first dump is finished, and this machine is slow.
        if dump is None or dump[0] is not Reason.NOT_READABLE or time.monotonic() > until:
            break
        time.sleep(0.1)
    absent = [collector.availability.absent[f"conntrack_{signal}"] for signal in SIGNALS]
    return found, [why[0].value if why else "" for why in absent]


def test_no_scrape_loads_a_module_and_a_full_table_is_seen() -> None:
    """Nothing is loaded by looking, whatever is loaded already; a full table is seen as conntrack -S and -C see it."""
    told = []
    for modules in ((), ("nf_conntrack",), ("nf_conntrack_netlink",), ("nft_ct", "nft_chain_nat")):
        for module in modules:
            subprocess.run(["modprobe", module], check=True)
        before = loaded()
        told.append(scrape()[1])
        assert loaded() == before
    assert told == [
        ["not_in_kernel", "not_in_kernel", "not_in_kernel", "not_in_kernel", "not_readable"],
        ["", "", "", "not_in_kernel", "not_readable"],
        ["", "", "", "", "not_in_kernel"],
        ["", "", "", "", ""],
    ]

    with full_table(500):
        found, _ = scrape()
        counted = subprocess.run(["conntrack", "-S"], check=True, capture_output=True, text=True).stdout
    for word in ("drop", "early_drop", "insert_failed"):
        numbers = [int(number) for number in re.findall(rf" {word}=(\d+)", counted)]
        assert found[f"shoal_conntrack_{word}_total"]["host",] == sum(numbers)
    assert found["shoal_conntrack_drop_total"]["host",] > 100
    assert found["shoal_conntrack_entries"][HOST] == found["shoal_conntrack_limit"][()] == 500
    assert found["shoal_conntrack_owner_entries"][*HOST, "from"] == found["shoal_conntrack_dump_entries"][()] == 500
