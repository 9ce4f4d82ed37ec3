"""The shape of the package: what may import what, and what works with the core dependencies alone."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest


PACKAGE = Path(__file__).parent.parent / "wavtokenizer_hf"
CORE = ("configuration_wavtokenizer", "feature_extraction_wavtokenizer", "modeling_wavtokenizer")
CORE_DEPENDENCIES = {"torch", "transformers", "safetensors", "huggingface_hub", "numpy"}
ALLOWED_TOGETHER = {
    "cli": {"audio", "token_file", "plots", "evaluation", ""},  # "" is the package: the core
    "__main__": {"cli"},
    "evaluation": {"audio", ""},  # what it measures are sound files
}
FILES = sorted(PACKAGE.rglob("*.py"))


def room_of(path: Path) -> str:
    """A room is a file of the package, or a folder in it with all its files."""
    return path.relative_to(PACKAGE).parts[0].removesuffix(".py")


def name_of(path: Path) -> str:
    return path.relative_to(PACKAGE).with_suffix("").as_posix()


def imports(path: Path, everywhere: bool = True) -> set[str]:
    """Modules that a file imports; `.name` for another room. Only at its top level unless `everywhere`."""
    tree = ast.parse(path.read_text())
    depth = len(path.relative_to(PACKAGE).parts)
    nodes = ast.walk(tree) if everywhere else iter(tree.body)
    found = set()
    for node in nodes:
        if isinstance(node, ast.Import):
            found |= {alias.name.split(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            if node.level == 0:
                found.add(node.module.split(".")[0])
            elif node.level < depth:
                pass  # within its own room
            elif node.module:
                found.add("." + node.module.split(".")[0])
            else:
                rooms = {room_of(file) for file in FILES}
                found |= {"." + (alias.name if alias.name in rooms else "") for alias in node.names}
    return found


@pytest.mark.parametrize("name", CORE)
def test_the_core_imports_what_every_hub_user_has_and_no_room(name):
    allowed = {".configuration_wavtokenizer"} if name == "modeling_wavtokenizer" else set()
    outside = imports(PACKAGE / f"{name}.py") - allowed - set(sys.stdlib_module_names)
    assert outside <= CORE_DEPENDENCIES, f"the core imports {outside - CORE_DEPENDENCIES}"


@pytest.mark.parametrize("path", FILES, ids=name_of)
def test_rooms_import_the_core_and_no_other_room(path):
    if room_of(path) in (*CORE, "__init__"):
        return
    rooms = {name[1:] for name in imports(path) if name.startswith(".")} - set(CORE)
    assert rooms <= ALLOWED_TOGETHER.get(room_of(path), {""})


@pytest.mark.parametrize("path", FILES, ids=name_of)
def test_extras_are_imported_where_they_are_used(path):
    third_party = imports(path, everywhere=False) - set(sys.stdlib_module_names)
    assert {name for name in third_party if not name.startswith(".")} <= CORE_DEPENDENCIES


def test_everything_imports_without_the_extras_and_says_which_is_missing(tmp_path):
    code = """
import sys
for name in ("soundfile", "soxr", "matplotlib", "datasets", "torchaudio", "torchcodec", "accelerate",
             "scipy", "librosa", "pesq", "pystoi", "auraloss"):
    sys.modules[name] = None
import pkgutil, importlib, wavtokenizer_hf, conversion.convert
for module in pkgutil.walk_packages(wavtokenizer_hf.__path__, "wavtokenizer_hf."):
    if not module.name.endswith("__main__"):
        importlib.import_module(module.name)
from wavtokenizer_hf import audio, plots
for function in (lambda: audio.load("x.wav"), lambda: plots.plot_reconstruction("x.png", [0], [0], [0])):
    try:
        function()
    except ImportError as error:
        assert "pip install 'wavtokenizer_hf[audio]'" in str(error), error
    else:
        raise AssertionError("no error")
"""
    subprocess.run([sys.executable, "-c", code], check=True, cwd=PACKAGE.parent)
