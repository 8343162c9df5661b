"""Whether what a runbook has its reader paste can run at all: the shell is right, the programs and options are there.

What a command shows is another matter: the lab runs those of the fourteen failures against the failure itself.
"""

from __future__ import annotations

import re
import subprocess
from typing import TYPE_CHECKING, Final

import pytest
from tests.rules.pack import RULES, exported, parsed, recorded, selectors

from shoal.settings import OPTIONS

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

PAGES: Final = sorted((RULES / "runbooks").glob("*.md"))

PLAIN: Final = {
    *("awk", "basename", "bash", "cat", "cd", "cut", "df", "dirname", "dmesg", "du", "echo", "find"),
    *(
        "grep",
        "head",
        "ionice",
        "ip",
        "journalctl",
        "kill",
        "lsns",
        "mkfs.ext4",
        "modprobe",
        "nsenter",
        "nstat",
        "pgrep",
        "ping",
    ),
    *("printf", "ps", "renice", "resize2fs", "sed", "seq", "sleep", "sort", "ss", "stat", "sysctl", "systemctl"),
    *("tail", "timeout", "touch", "umount", "uname", "uniq", "wc"),
}
"""What a node has, whichever image it was made from."""
OF_THE_SERVICE: Final = {"crictl", "iptables", "iptables-save", "kubectl", "promtool", "redis-cli"}
"""What is there where the failure can be."""
PACKAGES: Final = {
    "arping": "iputils-arping",
    "conntrack": "conntrack",
    "curl": "curl",
    "iostat": "sysstat",
    "nft": "nftables",
    "tcpdump": "tcpdump",
}
"""What must be installed, and the package in Debian and Ubuntu, which a page that uses it names first in Confirm."""
KEYWORDS: Final = {"done", "for", "while"}

_BLOCK = re.compile(r"(?:^ {4,}\S.*\n)+", re.MULTILINE)
_INLINE = re.compile(r"`([^`]+)`")
_PROMQL = re.compile(r"\A\w+\{[^}]*\}\Z")
# What stands where the shell looks for a program, also the program that another one starts.
_PROGRAM = re.compile(
    r"(?:^|[|;&(`]|\s-(?:exec|n)(?= ))\s*(?:(?:do|then|time)\s+|\w+=\S*\s+)*(?P<name>[a-z/][\w./-]*)(?=[\s;)]|$)",
    re.MULTILINE,
)


def blocks(page: Path) -> Iterator[str]:
    """Yield what a page shows indented: commands, or what they print."""
    for block in _BLOCK.findall(page.read_text(encoding="utf-8")):
        yield "\n".join(line.strip() for line in block.splitlines())


def commands(page: Path) -> Iterator[str]:
    """Yield what there is to paste: what begins with a program, with a word for each gap."""
    known = PLAIN | OF_THE_SERVICE | PACKAGES.keys()
    inline = (re.sub(r"\s+", " ", found) for found in _INLINE.findall(page.read_text(encoding="utf-8")))
    for text in (*blocks(page), *(one for one in inline if " " in one)):
        first = re.match(r"[\w./-]+(?=\s)", text)
        if re.match(r"for |[A-Za-z]+=[$/%]", text) or (first and first[0] in known):
            yield re.sub(r"<[^<>\n]+>", "GAP", text)


def programs(command: str) -> set[str]:
    """Return the programs that a command starts, without those in its quoted parts, which are for others to read."""
    bare = re.sub(r"'[^']*'", "''", command)
    return {found["name"] for found in _PROGRAM.finditer(bare)} - KEYWORDS


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.stem)
def test_commands_are_shell(page: Path) -> None:
    """The shell can read each of them, and starts programs that are known to be there."""
    for command in commands(page):
        done = subprocess.run(["bash", "-n"], input=command, capture_output=True, text=True, check=False)
        assert not done.returncode, f"{command}\n{done.stderr}"
        assert programs(command) <= PLAIN | OF_THE_SERVICE | PACKAGES.keys(), command


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.stem)
def test_packages_are_named(page: Path) -> None:
    """The section Confirm begins with the packages that a page's programs need, and names no other."""
    needed = {PACKAGES[name] for command in commands(page) for name in programs(command) & PACKAGES.keys()}
    confirm = page.read_text(encoding="utf-8").partition("\n## Confirm\n")[2]
    named = re.match(r"Debian packages: (.+)\.\n", confirm)
    assert needed == (set(named[1].split(", ")) if named else set())


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.stem)
def test_names_exist(page: Path) -> None:
    """Metrics, and options of the exporter, are ones that there are."""
    text = page.read_text(encoding="utf-8")
    metrics = set(re.findall(r"\bshoal_\w+\b(?![(_])", text))
    assert metrics <= exported().keys() | recorded().keys()
    options = {f"--{option.key}" for option in OPTIONS} | {"--no-collector."}
    assert set(re.findall(r"--[a-z-]+\.[a-z-]*[a-z](?=[`= ])|--no-collector\.", text)) <= options
    for query in (line for block in blocks(page) for line in block.splitlines() if _PROMQL.match(line)):
        assert [one.name for one in selectors(query)]
        assert parsed(query)


def test_a_wrong_command_is_found(tmp_path: Path) -> None:
    """What the tests above look for, they find."""
    page = tmp_path / "page.md"
    page.write_text(
        "## Confirm\n    cat /proc/<pid>/stat | conntrak -L; nsenter -t 1 -n arpin $(ipp -4 a)\n\n"
        "    for i in 1; do slep 1\n\n    sleep: not found\n"
    )
    first, second = commands(page)
    assert programs(first) - PLAIN == {"conntrak", "arpin", "ipp"}
    assert programs(second) == {"slep"}
    assert subprocess.run(["bash", "-n"], input=second, capture_output=True, text=True, check=False).returncode
