"""What is installed, not the checkout: the runbooks are packed with the program, in the image's build too."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

pytestmark = pytest.mark.slow

ROOT = Path(__file__).parents[3]
PAGES = {file.name for file in (ROOT / "rules" / "runbooks").glob("*.md")}


def python(*arguments: str, cwd: Path, **environment: str) -> str:
    """Run this Python and return what it prints."""
    done = subprocess.run(
        [sys.executable, *arguments],
        capture_output=True,
        text=True,
        check=False,
        cwd=cwd,
        timeout=110,
        env=os.environ | environment,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


def copied(target: Path) -> None:
    """Copy what the Dockerfile copies into the build stage, and nothing else."""
    lines = (ROOT / "Dockerfile").read_text(encoding="utf-8").splitlines()
    for line in (line for line in lines if line.startswith("COPY ") and "--from" not in line):
        *sources, place = line.split()[1:]
        for source in sources:
            if (ROOT / source).is_dir():
                shutil.copytree(
                    ROOT / source, target / place, symlinks=True, ignore=shutil.ignore_patterns("__pycache__")
                )
            else:
                (target / place).mkdir(parents=True, exist_ok=True)
                shutil.copy(ROOT / source, target / place)


@pytest.mark.parametrize("made_from", ["checkout", "sdist", "image"])
def test_runbooks_are_in_the_package(made_from: str, tmp_path: Path) -> None:
    """Every page, as it is; and `explain` finds them where the wheel has put them."""
    source = str(ROOT)
    if made_from == "sdist":
        python("-m", "hatchling", "build", "--target", "sdist", "--directory", str(tmp_path), cwd=ROOT)
        [archive] = tmp_path.glob("*.tar.gz")
        source = str(archive)
    if made_from == "image":
        source = str(tmp_path / "src")
        copied(tmp_path / "src")
    # With what the lock has installed here, so that nothing is fetched.
    offline = ("--quiet", "--no-index", "--no-deps", "--disable-pip-version-check")
    python("-m", "pip", "wheel", *offline, "--no-build-isolation", "--wheel-dir", str(tmp_path), source, cwd=tmp_path)
    [wheel] = tmp_path.glob("*.whl")
    with zipfile.ZipFile(wheel) as packed:
        found = {Path(name).name for name in packed.namelist() if name.startswith("shoal/runbooks/")}
    assert found == PAGES
    place = tmp_path / "installed"
    python("-m", "pip", "install", *offline, "--target", str(place), str(wheel), cwd=tmp_path)
    said = python("-m", "shoal", "explain", "ShoalOOMKill", cwd=tmp_path, PYTHONPATH=str(place))
    assert said == (ROOT / "rules" / "runbooks" / "ShoalOOMKill.md").read_text(encoding="utf-8")
    where = python("-c", "import shoal; print(shoal.__file__)", cwd=tmp_path, PYTHONPATH=str(place))
    assert where.startswith(str(place))


def test_the_image_trusts_what_it_has() -> None:
    """The file with all certificates is copied, and OpenSSL is told of it: its own default is not in the image."""
    [said] = re.findall(r"SSL_CERT_FILE=(\S+)", (ROOT / "Dockerfile").read_text(encoding="utf-8"))
    [copied_from] = re.findall(r'^CERTIFICATES = Path\("(.+)"\)$', (ROOT / "image/rootfs.py").read_text(), re.MULTILINE)
    assert said == copied_from
