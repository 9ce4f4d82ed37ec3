"""The README: its Python runs, its commands work, its tree is true."""

import re
import shlex
import shutil
from pathlib import Path

import pytest
import soundfile

from wavtokenizer_hf.cli import main


ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text()


@pytest.fixture
def workplace(folders, tmp_path, monkeypatch):
    """A folder with what the README's examples name: a converted checkpoint and a sound file."""
    (tmp_path / "wavtokenizer-75").symlink_to(folders(75))
    shutil.copy(ROOT / "examples" / "speech.flac", tmp_path)
    monkeypatch.chdir(tmp_path)
    return tmp_path


def test_its_python_runs(workplace):
    blocks = re.findall(r"```python\n(.*?)```", README, re.DOTALL)
    assert len(blocks) >= 2
    names = {}
    for block in blocks:
        exec(compile(block, "README.md", "exec"), names)
    assert soundfile.info("decoded.wav").frames == soundfile.info("speech.flac").frames
    assert len(names["audio_codes"].unique()) > 10


def test_its_commands_work(workplace, checkpoints):
    commands = re.findall(r"^wavtokenizer (.*?)(?:\s+#.*)?$", README, re.MULTILINE)
    assert {shlex.split(command)[0] for command in commands} == {"encode", "decode", "reconstruct", "info", "convert"}
    (workplace / "wavtokenizer_large_unify_600_24k.ckpt").symlink_to(checkpoints(40))
    for command in commands:
        assert main(shlex.split(command)) == 0, command
    assert soundfile.info("decoded.wav").frames == soundfile.info("speech.flac").frames
    assert Path("again.png").exists() and Path("wavtokenizer-large-unify-40/model.safetensors").exists()


def test_its_tree_is_true():
    tree = README.split("## The picture")[1].split("```")[3]
    named = set(re.findall(r"^  (\w+\.py(?:, \w+\.py)*)", tree, re.MULTILINE))
    named = {name for names in named for name in names.split(", ")}
    assert named == {path.name for path in (ROOT / "wavtokenizer_hf").glob("*.py")} - {"__init__.py"}
    for folder in re.findall(r"^(\w+)/", tree, re.MULTILINE):
        assert (ROOT / folder).is_dir(), folder


def test_its_links_lead_somewhere():
    for target in re.findall(r"\]\(([^)]+)\)", README):
        if not target.startswith("http"):
            assert (ROOT / target).exists(), target
