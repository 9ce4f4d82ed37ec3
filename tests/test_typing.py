"""The package's annotations, as type checkers and editors of users see them."""

import importlib
import inspect
import os
import re
import subprocess
import sys
from functools import cached_property
from pathlib import Path

import pytest

import wavtokenizer_hf


ROOT = Path(__file__).parent.parent
DOCUMENTED = sorted(
    set(re.findall(r"^::: (\S+)", "".join(p.read_text() for p in (ROOT / "docs/api").glob("*.md")), re.M))
)

SETTINGS_OF_A_USER = """
[mypy]
strict = true
disallow_any_generics = false

# as in an installed package, where mypy reports no errors
[mypy-wavtokenizer_hf.*]
follow_imports = silent
"""


def test_the_package_declares_its_annotations():
    assert (Path(wavtokenizer_hf.__file__).parent / "py.typed").is_file()  # PEP 561


def functions(name: str):
    """Return the function of that name, or the public methods and properties that its class defines."""
    module, _, attribute = name.rpartition(".")
    value = getattr(importlib.import_module(module), attribute)
    if not inspect.isclass(value):
        yield name, value
        return
    for member, raw in vars(value).items():
        raw = raw.__func__ if isinstance(raw, (classmethod, staticmethod)) else raw
        raw = raw.fget if isinstance(raw, property) else raw.func if isinstance(raw, cached_property) else raw
        is_own = inspect.isfunction(raw) and raw.__module__.startswith("wavtokenizer_hf")
        if is_own and (not member.startswith("_") or member in ("__init__", "__call__")):
            yield f"{name}.{member}", raw


@pytest.mark.parametrize("name", DOCUMENTED)
def test_every_documented_function_has_annotations(name):
    for full_name, function in functions(name):
        signature = inspect.signature(function)
        given = [p for p in list(signature.parameters.values()) if p.name not in ("self", "cls")]
        missing = [p.name for p in given if p.annotation is p.empty]
        assert not missing, f"{full_name} does not say of what type {', '.join(missing)} are"
        if not full_name.endswith(".__init__"):
            assert signature.return_annotation is not signature.empty, f"{full_name} does not say what it returns"


@pytest.mark.slow  # mypy reads all of torch and transformers, which takes a minute or two
def test_a_strict_type_checker_accepts_a_users_program(tmp_path):
    """
    Use mypy's default settings, like a user. `make lint` checks the same program with the settings of this repository.
    """
    client = ROOT / "tests/fixtures/typed_client.py"
    (tmp_path / "mypy.ini").write_text(SETTINGS_OF_A_USER)
    command = [sys.executable, "-m", "mypy", "--config-file", tmp_path / "mypy.ini", "--cache-dir", tmp_path, client]
    finished = subprocess.run(
        command, capture_output=True, text=True, cwd=tmp_path, env={**os.environ, "MYPYPATH": str(ROOT)}
    )
    assert finished.returncode == 0, finished.stdout + finished.stderr
