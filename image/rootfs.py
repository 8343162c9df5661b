"""Lays out the image's root file system: the virtual environment, Python and the libraries that they load, and an SBOM.

Run in the build stage of the Dockerfile, by the virtual environment's own Python: `python rootfs.py DIRECTORY`.
"""

from __future__ import annotations

import compileall
import json
import os
import re
import shutil
import subprocess
import sys
import sysconfig
from importlib import metadata
from pathlib import Path
from py_compile import PycInvalidationMode
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Iterable

VENV = Path(sys.prefix)
STDLIB = Path(sysconfig.get_path("stdlib"))
# Of the standard library, what a server never imports; the last lines are extension modules and their libraries.
NOT_NEEDED = (
    *("ensurepip", "idlelib", "lib2to3", "pydoc_data", "test", "tkinter", "turtledemo", "unittest", "venv"),
    *("curses", "dbm", "sqlite3", "sitecustomize.py"),
    *("_curses*.so", "_curses_panel*.so", "_dbm*.so", "_gdbm*.so", "_sqlite3*.so", "_test*.so", "readline*.so"),
)
CERTIFICATES = Path("/etc/ssl/certs/ca-certificates.crt")
SBOM = Path("usr/share/sbom.cdx.json")

_LIBRARY = re.compile(r"(/\S+) \(0x")


def main(target: Path) -> None:
    """Write everything below `target`."""
    _run(sys.executable, "-m", "pip", "uninstall", "--yes", "--quiet", *_not_needed_by("shoal-exporter"))
    interpreter = Path(sys.executable).resolve()
    _copy(interpreter, target)
    (target / "usr/bin/python3").symlink_to(interpreter.name)
    _copy_tree(STDLIB, target, NOT_NEEDED)
    _copy_tree(VENV, target, ("Activate.ps1", "activate", "activate.csh", "activate.fish"))
    _copy(CERTIFICATES, target)
    loaded = [interpreter, *target.rglob("*.so")]
    libraries = sorted({library for file in loaded for library in _libraries(file)})
    for library in libraries:
        _copy(library, target)
    for name, line in (("passwd", "nobody:x:65534:65534::/:"), ("group", "nogroup:x:65534:")):
        file = target / "etc" / name
        file.write_text(f"root:x:0:0::/:\n{line}\n" if name == "passwd" else f"root:x:0:\n{line}\n", encoding="ascii")
    # Compiled here, since nothing can be written there later; then the sources are a fifth of the image for nothing.
    unchecked = PycInvalidationMode.UNCHECKED_HASH
    compileall.compile_dir(str(target), stripdir=str(target), quiet=1, legacy=True, invalidation_mode=unchecked)
    for source in [file for file in target.rglob("*.py") if file.with_suffix(".pyc").exists()]:
        source.unlink()
    components = _debian([interpreter, STDLIB / "os.py", STDLIB / "asyncio/__init__.py", *libraries]) + _python()
    bom = {"bomFormat": "CycloneDX", "specVersion": "1.5", "version": 1, "components": components}
    (target / SBOM).parent.mkdir(parents=True, exist_ok=True)
    (target / SBOM).write_text(json.dumps(bom, indent=1) + "\n", encoding="utf-8")


def _run(*command: str) -> str:
    return subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True).stdout


def _not_needed_by(name: str) -> list[str]:
    """Return the installed packages that this one does not need to run: those that built it, and pip."""
    there = {_normal(one.name): one for one in metadata.distributions(path=[sysconfig.get_path("purelib")])}
    needed, left = set[str](), [name]
    while left:
        if (one := left.pop()) in there and one not in needed:
            needed.add(one)
            requirements = [each for each in there[one].requires or [] if "extra ==" not in each]
            left += [_normal(re.split(r"[^\w.-]", each, maxsplit=1)[0]) for each in requirements]
    return sorted(there.keys() - needed)


def _normal(name: str) -> str:
    return re.sub("[-_.]+", "-", name).lower()


def _copy(file: Path, target: Path) -> None:
    """Copy what the path leads to, under the path."""
    place = target / file.relative_to("/")
    place.parent.mkdir(parents=True, exist_ok=True)
    shutil.copy(file, place)


def _copy_tree(directory: Path, target: Path, without: Iterable[str]) -> None:
    ignore = shutil.ignore_patterns("__pycache__", "*.pyi", "*.pxd", "*.pyx", "*.c", "*.h", "config-3*", *without)
    shutil.copytree(directory, target / directory.relative_to("/"), symlinks=True, ignore=ignore)


def _libraries(file: Path) -> list[Path]:
    """Return the shared libraries that a file needs, the dynamic loader included, by the paths that it opens."""
    done = subprocess.run(["ldd", str(file)], check=False, capture_output=True, text=True)
    return [Path(path) for path in _LIBRARY.findall(done.stdout)]


def _debian(files: Iterable[Path]) -> list[dict[str, Any]]:
    """Return the Debian packages that own the files."""
    owners: set[str] = set()
    for file in files:
        # A path may lead through a link of a directory, such as /lib, that dpkg knows by its other name.
        for path in (str(file), os.path.realpath(file), f"/usr{file}"):
            done = subprocess.run(["dpkg-query", "--search", path], check=False, capture_output=True, text=True)
            found = [line for line in done.stdout.splitlines() if not line.startswith("diversion ")]
            if found:
                owners.update(found[0].partition(": ")[0].split(", "))
                break
    # The file with all certificates is made when its package is installed.
    owners.add("ca-certificates")
    listed = _run("dpkg-query", "--show", "--showformat", "${Package} ${Version} ${Architecture}\n", *sorted(owners))
    return [
        {
            "type": "library",
            "name": name,
            "version": version,
            "purl": f"pkg:deb/debian/{name}@{version}?arch={architecture}",
        }
        for name, version, architecture in (line.split() for line in listed.splitlines())
    ]


def _python() -> list[dict[str, Any]]:
    """Return what is in the virtual environment."""
    found = sorted((str(one.name), one.version) for one in metadata.distributions(path=[sysconfig.get_path("purelib")]))
    return [
        {
            "type": "application" if name == "shoal-exporter" else "library",
            "name": name,
            "version": version,
            "purl": f"pkg:pypi/{_normal(name)}@{version}",
        }
        for name, version in found
    ]


if __name__ == "__main__":
    main(Path(sys.argv[1]))
