"""The versions in constraints.txt: each package is pinned once for each Python, and all of them can be installed."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from packaging.requirements import Requirement


ROOT = Path(__file__).parent.parent
PYTHONS = ["3.10", "3.11", "3.12", "3.13"]
PINS = [
    Requirement(line)
    for line in (ROOT / "constraints.txt").read_text().splitlines()
    if line and not line.startswith("#")
]


@pytest.mark.parametrize("version", PYTHONS)
def test_every_package_is_pinned_once_for_every_python(version):
    environment = {"python_version": version, "python_full_version": f"{version}.0"}
    pinned = [pin.name for pin in PINS if pin.marker is None or pin.marker.evaluate(environment)]
    assert sorted(pinned) == sorted({pin.name for pin in PINS})


def interpreter(version: str) -> str | None:
    """Return a Python of this version: the running one, one on the path, or one of pyenv's."""
    pyenv = Path(os.environ.get("PYENV_ROOT", Path.home() / ".pyenv"), "versions")
    found = (sys.executable, shutil.which(f"python{version}"), *map(str, pyenv.glob(f"{version}.*/bin/python")))
    for path in filter(None, found):
        asked = [path, "-c", "import sys; print('%d.%d' % sys.version_info[:2])"]
        if subprocess.run(asked, capture_output=True, text=True, check=False).stdout.strip() == version:
            return path
    return None


@pytest.mark.slow
@pytest.mark.parametrize("version", PYTHONS)
def test_the_pinned_versions_can_be_installed(version):
    """Ask the package index, and download only the files that pip needs to resolve versions."""
    if (python := interpreter(version)) is None:
        pytest.skip(f"there is no Python {version} here")
    process = subprocess.run(
        [sys.executable, "-m", "pip", "--python", python, "install", "--dry-run", "--ignore-installed",
         "--constraint", "constraints.txt", "--editable", ".[dev]"],
        capture_output=True, text=True, cwd=ROOT, check=False,
    )  # fmt: skip
    assert process.returncode == 0, process.stderr
    would_install = process.stdout.splitlines()[-1].replace("_", "-")
    for pin in PINS:
        environment = {"python_version": version, "python_full_version": f"{version}.0"}
        if pin.name == "transformers" and pin.marker.evaluate(environment):
            assert f" transformers-{str(pin.specifier).removeprefix('==')}" in would_install
