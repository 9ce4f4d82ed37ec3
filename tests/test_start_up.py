"""Lazy imports of the package and its command line, with Auto classes that work all the same."""

import os
import resource
import subprocess
import sys
from pathlib import Path

import pytest
from test_package import CORE

import wavtokenizer_hf
from wavtokenizer_hf.commands import COMMANDS


ROOT = Path(__file__).parent.parent
HEAVY = ("torch", "transformers", "numpy", "huggingface_hub", "gradio")


def run(*arguments: str) -> subprocess.CompletedProcess:
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")])}
    line = [sys.executable, *arguments]
    return subprocess.run(line, capture_output=True, text=True, env=environment, cwd=ROOT, timeout=900)


ARGUMENTS = [
    (["--help"], 0),
    (["--version"], 0),
    (["checkpoints"], 0),
    *(([command, "--help"], 0) for command in COMMANDS),
    ([], 2),
    (["nonsense"], 2),
    (["encode"], 2),
    (["encode", "absent.wav", "-m", "bundled", "-o", "x.json"], 2),
    (["encode", "examples/speech.flac", "-m", "bundled", "-o", "x.json", "--channel", "middle"], 2),
    (["tokenize", "corpus", "-o", "tokens"], 2),
    (["tokenize", "corpus", "-m", "bundled", "-o", "tokens", "--batch-seconds", "0"], 2),
    (["train", "--no-such-option"], 2),
]


def test_help_and_wrong_arguments_import_no_heavy_packages():
    code = f"""
import io, sys
from contextlib import redirect_stderr, redirect_stdout
from wavtokenizer_hf.cli import main
for arguments, expected in {ARGUMENTS}:
    with redirect_stdout(io.StringIO()), redirect_stderr(io.StringIO()):
        try:
            exit_code = main(arguments)
        except SystemExit as error:
            exit_code = error.code
    heavy = sorted(set({HEAVY}) & set(sys.modules))
    assert exit_code == expected, (arguments, exit_code)
    assert not heavy, (arguments, heavy)
"""
    result = run("-c", code)
    assert result.returncode == 0, result.stderr


def test_help_takes_less_than_0_3_seconds():
    """
    Processor time, which other programs on the machine hardly change. With torch and transformers it would be 3 s.
    """

    def seconds() -> float:
        before = resource.getrusage(resource.RUSAGE_CHILDREN)
        assert run("-m", "wavtokenizer_hf", "--help").returncode == 0
        after = resource.getrusage(resource.RUSAGE_CHILDREN)
        return after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime

    assert min(seconds() for _ in range(5)) < 0.3


FIRST_IMPORTS = [  # not covered elsewhere: all other tests import this package first
    "from transformers import AutoModel; import wavtokenizer_hf",
    "import wavtokenizer_hf.modeling_wavtokenizer_batching",
]


def check_first_imports(imports: list[str]) -> None:
    """
    Run each line in a process that imported torch but not transformers. Our classes must be registered afterwards.
    """
    code = f"""
import os, sys, torch, huggingface_hub
for line in {imports}:
    assert "transformers" not in sys.modules and "wavtokenizer_hf" not in sys.modules
    if (child := os.fork()) == 0:
        exec(line)
        from transformers import AutoModel
        from transformers.models.auto.modeling_auto import MODEL_MAPPING
        import wavtokenizer_hf
        from wavtokenizer_hf import WavTokenizerConfig, WavTokenizerModel, upgrade
        assert MODEL_MAPPING[WavTokenizerConfig] is WavTokenizerModel, line
        assert callable(upgrade), line
        assert not any(type(finder).__module__.startswith("wavtokenizer") for finder in sys.meta_path), line
        assert not type(sys.modules["transformers"].__spec__.loader).__module__.startswith("wavtokenizer"), line
        os._exit(0)
    assert os.waitpid(child, 0)[1] == 0, line
"""
    result = run("-c", code)
    assert result.returncode == 0, result.stderr


@pytest.mark.skipif(sys.platform == "win32", reason="needs fork")
def test_the_auto_classes_return_ours_for_every_import_order():
    check_first_imports(FIRST_IMPORTS)


@pytest.mark.slow
@pytest.mark.skipif(sys.platform == "win32", reason="needs fork")
def test_every_module_of_the_core_can_be_the_first_import():
    """A module that waits for transformers must never be seen half imported."""
    check_first_imports([f"import wavtokenizer_hf.{name}" for name in (*CORE, "native_upgrade")])


def test_a_module_found_but_not_imported_has_a_complete_loader():
    code = """
import importlib.util, sys
import wavtokenizer_hf
spec = importlib.util.find_spec("transformers")
assert spec.loader.is_package("transformers") and spec.loader.get_code("transformers") is not None
assert spec.submodule_search_locations and "transformers" not in sys.modules
"""
    result = run("-c", code)
    assert result.returncode == 0, result.stderr


def test_the_public_names_are_complete():
    for name in wavtokenizer_hf.__all__:
        assert getattr(wavtokenizer_hf, name) is not None
    assert set(wavtokenizer_hf.__all__) <= set(dir(wavtokenizer_hf))
    with pytest.raises(AttributeError, match="has no attribute 'nothing'"):
        wavtokenizer_hf.nothing  # noqa: B018
