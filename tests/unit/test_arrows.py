"""Who may import whom: a number is explained by one collector and one reader, and by nothing else."""

from __future__ import annotations

import ast
from pathlib import Path

import pytest

import shoal

ROOT = Path(shoal.__file__).parent
FILES = sorted(path.relative_to(ROOT) for path in ROOT.rglob("*.py"))

# {what a file's path begins with: what it may import of this package}; the longest beginning counts.
ALLOWED = {
    "kernel": ("shoal.kernel",),
    "redis": ("shoal.redis", "shoal.kernel"),
    "kubernetes": ("shoal.kubernetes", "shoal.kernel"),
    "families.py": (),
    "inventory.py": ("shoal.kernel",),
    "census.py": ("shoal.kernel",),
    "collectors": (
        *("shoal.collectors", "shoal.families", "shoal.inventory", "shoal.census", "shoal.kernel", "shoal.redis"),
        *("shoal.kubernetes", "shoal.settings"),
    ),
}
# Collectors give families; how these are written and served is the others' business.
SERVING = {"prometheus_client", "aiohttp"}


def imported(file: Path) -> set[str]:
    """Return the modules that a file imports anywhere, for the type checker alone or in a function too."""
    found: set[str] = set()
    for node in ast.walk(ast.parse((ROOT / file).read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            found |= {name.name for name in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{file}: imports are absolute"
            found.add(str(node.module))
    return found


@pytest.mark.parametrize("file", FILES, ids=str)
def test_arrows_run_one_way(file: Path) -> None:
    """Cli -> server -> scrape -> collectors -> inventory, kernel, redis, kubernetes -> kernel.files."""
    room = file.parts[0]
    modules = imported(file)
    ours = {module for module in modules if module.split(".")[0] == "shoal"}
    if room in ALLOWED:
        assert not [one for one in ours if not f"{one}.".startswith(tuple(f"{name}." for name in ALLOWED[room]))]
    if room in {"kernel", "collectors"}:
        assert not {module.split(".")[0] for module in modules} & SERVING
    if room == "collectors":
        assert not [one for one in ours if one.startswith("shoal.collectors.")], "a collector knows another"


def test_the_walk_sees_everything() -> None:
    """Nothing would be found in an empty list."""
    assert len(FILES) > 50
    assert "shoal.kubernetes.watch" in imported(Path("collectors/conntrack.py"))
    assert "aiohttp" in imported(Path("kubernetes/watch.py"))


def test_no_duration_is_read_off_the_wall() -> None:
    """The wall's clock may be set at any time; it is asked only for dates: of log lines, and of a reload."""
    asked = {
        (str(file), node.attr)
        for file in FILES
        for node in ast.walk(ast.parse((ROOT / file).read_text(encoding="utf-8")))
        if isinstance(node, ast.Attribute) and ast.unparse(node) in ("time.time", "time.time_ns", "datetime.now")
    }
    assert asked == {("web_config.py", "time")}
