"""The README: its Python runs, its commands work, its tree is true."""

import json
import re
import shlex
import shutil
from pathlib import Path

import huggingface_hub
import pytest
import soundfile
import torch
from conftest import REFERENCE
from hub_server import put_into_cache
from language_models import byte_level, tiny_llama
from test_conversion import small_tensors
from tiny_training import write_clips
from transformers import AutoModel

from wavtokenizer_hf import WavTokenizerModel
from wavtokenizer_hf.cli import _parser, main
from wavtokenizer_hf.training.settings import read_arguments


ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text()
# what makes a recipe a matter of seconds; all that it says beside these holds
TINY_RUN = {
    "steps": 1, "mel_only_steps": 1, "continuous_steps": 0, "batch_size": 1, "segment_seconds": 0.1, "num_workers": 0,
    "kmeans_latents": 20, "kmeans_iterations": 1, "num_validation_clips": 1,
}  # fmt: skip


def commands(of_sections: bool) -> list[list[str]]:
    """The README's `wavtokenizer …` lines as arguments: those of the sections on training and measuring, or all others."""
    sections = [
        section for section in README.split("\n## ") if section.startswith(("Train", "Measure")) == of_sections
    ]
    return [
        shlex.split(line) for line in re.findall(r"^wavtokenizer (.*?)(?:\s+#.*)?$", "\n".join(sections), re.MULTILINE)
    ]


@pytest.fixture
def workplace(tmp_path, monkeypatch):
    """A folder with what the README's examples name: a sound file and a language model."""
    shutil.copy(ROOT / "examples" / "speech.flac", tmp_path)
    tokenizer = byte_level()
    tokenizer.save_pretrained(tmp_path / "some-llm")
    tiny_llama(len(tokenizer)).save_pretrained(tmp_path / "some-llm")
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
    assert names["malformed"] == [] and len(names["sounds"]) == 1
    assert (
        sum(label != -100 for label in names["batch"]["labels"][0]) == names["audio_codes"].numel() + 3
    )  # marks, end of text


def test_its_commands_work(workplace, checkpoints, monkeypatch):
    found = commands(of_sections=False)
    assert {command[0] for command in found} == {"encode", "decode", "reconstruct", "info", "convert", "checkpoints"}
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(workplace / "cache"))
    put_into_cache(
        workplace / "cache", "novateur/WavTokenizer", {"WavTokenizer_small_320_24k_4096.ckpt": checkpoints(75)}
    )
    (workplace / "wavtokenizer_large_unify_600_24k.ckpt").symlink_to(checkpoints(40))
    for command in found:
        assert main(command) == 0, command
    assert soundfile.info("decoded.wav").frames == soundfile.info("speech.flac").frames
    assert Path("again.png").exists() and Path("wavtokenizer-large-unify-40/model.safetensors").exists()


def test_its_commands_of_training_and_measuring_work(tmp_path, monkeypatch, tiny_model):
    """In their order, on tiny clips and models; each training makes one step."""
    monkeypatch.chdir(tmp_path)
    shutil.copy(ROOT / "examples" / "speech.flac", tmp_path)
    tiny_model.save_pretrained("wavtokenizer-75")
    for folder in ("clips", "other_clips", "other_codec"):
        write_clips(tmp_path / folder, count=2, seconds=0.6)
    manifest = json.loads((REFERENCE / "manifest_discriminators.json").read_text())
    discriminators = {name: torch.zeros(()).expand(shape) for name, shape in manifest.items()}
    checkpoint = {"state_dict": {**small_tensors(75), **discriminators}}
    torch.save(checkpoint, "WavTokenizer_small_320_24k_4096.ckpt")
    found = commands(of_sections=True)
    assert {command[0] for command in found} == {"train", "convert", "evaluate"}
    for command in found:
        if command[0] == "train":
            command += [f"--{name}={value}" for name, value in TINY_RUN.items()]
        elif command[0] == "evaluate":
            command += ["--num-workers=0", "--metrics", "stoi", "mel_distance"]
        assert main(command) == 0, command
    assert Path("report/report.json").exists()
    for folder in ("run/best", "run/last", "tuned/best", "tuned-decoder/best"):
        assert isinstance(AutoModel.from_pretrained(folder), WavTokenizerModel)
    assert Path("wavtokenizer-small-75/discriminators.safetensors").exists() and any(Path("run/log").iterdir())


def test_its_command_for_many_gpus_is_understood():
    """It is not run: that takes accelerate's launcher and GPUs."""
    (command,) = re.findall(r"^accelerate launch --num_processes 8 -m wavtokenizer_hf (.*)$", README, re.MULTILINE)
    settings = read_arguments(_parser().parse_args(shlex.split(command)))
    assert settings.steps == 1_000_000 and settings.train_data == "train.txt" and settings.output == "run"


def test_its_metrics_are_those_that_there_are():
    from wavtokenizer_hf.evaluation import METRICS
    from wavtokenizer_hf.evaluation.metrics import DISTRIBUTIONS

    table = README.split("\n## Measure")[1].split("\n## ")[0].lower()
    for metric in METRICS.values():
        assert metric.title.lower() in table
        assert not metric.packages or DISTRIBUTIONS.get(metric.packages[0], metric.packages[0]) in table


def test_its_tree_is_true():
    tree = README.split("## The picture")[1].split("```")[3]
    named = set(re.findall(r"^  (\w+\.py(?:, \w+\.py)*)", tree, re.MULTILINE))
    named = {name for names in named for name in names.split(", ")}
    assert named == {path.name for path in (ROOT / "wavtokenizer_hf").glob("*.py")} - {"__init__.py"}
    for folder in re.findall(r"^(\w+)/", tree, re.MULTILINE):
        assert (ROOT / folder).is_dir(), folder
    rooms = set(re.findall(r"^  (\w+)/", tree, re.MULTILINE))
    assert rooms == {path.parent.name for path in (ROOT / "wavtokenizer_hf").glob("*/__init__.py")} | {"bundled"}


def test_its_links_lead_somewhere():
    for target in re.findall(r"\]\(([^)]+)\)", README):
        if not target.startswith("http"):
            assert (ROOT / target).exists(), target
