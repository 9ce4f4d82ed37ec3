"""Reference checkpoints become folders that Hugging Face loads, or are refused with a reason."""

import hashlib
import json
import math
import os
import re
import stat
import subprocess
import sys
from pathlib import Path

import formula
import numpy as np
import pytest
import safetensors.torch
import torch
import yaml
from conftest import REFERENCE, ROOT
from small_checkpoints import (  # noqa: F401
    CODEBOOK,
    after_saving,
    is_kept,
    large_checkpoint,
    memory_and_seconds,
    new_name,
    originals,
    read_weights,
    same_bits,
    save,
    save_yaml,
    small_folder,
    small_yaml,
    stop,
    tensors,
)

from wavtokenizer_hf import WavTokenizerConfig, WavTokenizerFeatureExtractor, WavTokenizerModel
from wavtokenizer_hf.conversion.command import main
from wavtokenizer_hf.conversion.from_original import convert


# ---------------------------------------------------------------------------------------------------------------------
# The content of a converted folder
# ---------------------------------------------------------------------------------------------------------------------


def test_every_converted_tensor_equals_the_reference_bit_for_bit(checkpoints, folders, rate):
    original = torch.load(checkpoints(rate), mmap=True, weights_only=True)["state_dict"]
    weights = read_weights(folders(rate))
    converted = [name for name in original if is_kept(name)]
    assert len(converted) > 200
    assert [name for name in converted if not same_bits(weights[new_name(name)], original[name])] == []


def test_tensor_names_are_exactly_those_of_the_model(folders, rate):
    with torch.device("meta"):
        model = WavTokenizerModel(WavTokenizerConfig.from_pretrained(folders(rate)))
    assert set(read_weights(folders(rate))) == set(model.state_dict())


def test_published_shapes_are_inferred_from_the_tensors_alone(folders, rate):
    expected = {
        "model_type": "wavtokenizer",
        "architectures": ["WavTokenizerModel"],
        "dtype": "float32",
        "sampling_rate": 24000,
        "audio_channels": 1,
        "num_filters": 32,
        "upsampling_ratios": {75: [8, 5, 4, 2], 40: [6, 5, 5, 4]}[rate],
        "num_residual_layers": 1,
        "dilation_growth_rate": 2,
        "compress": 2,
        "kernel_size": 7,
        "last_kernel_size": 7,
        "residual_kernel_size": 3,
        "num_lstm_layers": 2,
        "hidden_size": 512,
        "codebook_size": 4096,
        "codebook_dim": 512,
        "decoder_hidden_size": 768,
        "decoder_intermediate_size": 2304,
        "decoder_num_layers": 12,
        "adanorm_num_embeddings": 4,
        "decoder_attention_num_groups": 32,
        "norm_eps": 1e-6,
    }
    written = json.loads((folders(rate) / "config.json").read_text())
    assert {name: written[name] for name in expected} == expected


def test_auto_map_names_every_auto_class_in_plain_strings(folders):
    extractor = "feature_extraction_wavtokenizer.WavTokenizerFeatureExtractor"
    model = "modeling_wavtokenizer.WavTokenizerModel"
    assert json.loads((folders(75) / "config.json").read_text())["auto_map"] == {
        "AutoConfig": "configuration_wavtokenizer.WavTokenizerConfig",
        "AutoModel": model,
        "AutoModelForAudioTokenization": model,
        "AutoFeatureExtractor": extractor,
    }
    preprocessor = json.loads((folders(75) / "preprocessor_config.json").read_text())
    assert preprocessor["auto_map"] == {"AutoFeatureExtractor": extractor}


def test_folder_holds_weights_configuration_code_and_card_and_nothing_else(folders):
    assert sorted(path.name for path in folders(75).iterdir()) == [
        "README.md",
        "config.json",
        "configuration_wavtokenizer.py",
        "feature_extraction_wavtokenizer.py",
        "model.safetensors",
        "modeling_wavtokenizer.py",
        "modeling_wavtokenizer_batching.py",
        "modeling_wavtokenizer_cpu.py",
        "modeling_wavtokenizer_encoder.py",
        "modeling_wavtokenizer_padding.py",
        "modeling_wavtokenizer_pickling.py",
        "modeling_wavtokenizer_precision.py",
        "modeling_wavtokenizer_typing.py",
        "modeling_wavtokenizer_windows.py",
        "preprocessor_config.json",
    ]


def test_other_users_may_read_the_folder_as_far_as_the_umask_lets_them(save, tensors, tmp_path):
    folder = convert(save(tensors), tmp_path / "converted")
    plain_folder, plain_file = tmp_path / "plain", tmp_path / "plain.txt"
    plain_folder.mkdir()
    plain_file.touch()
    assert stat.S_IMODE(folder.stat().st_mode) == stat.S_IMODE(plain_folder.stat().st_mode)
    assert {stat.S_IMODE(path.stat().st_mode) for path in folder.iterdir()} == {
        stat.S_IMODE(plain_file.stat().st_mode)
    }


def test_fingerprint_is_the_hash_of_the_original_codebook(checkpoints, folders, rate):
    entries = torch.load(checkpoints(rate), mmap=True, weights_only=True)["state_dict"][CODEBOOK + "embed"]
    expected = hashlib.sha256(entries.numpy().astype("<f4").tobytes()).hexdigest()[:16]
    assert json.loads((folders(rate) / "config.json").read_text())["codebook_fingerprint"] == expected


def test_feature_extractor_has_the_models_hop(folders, rate):
    extractor = WavTokenizerFeatureExtractor.from_pretrained(folders(rate))
    assert (extractor.sampling_rate, extractor.hop_length) == (24000, {75: 320, 40: 600}[rate])


def test_folder_gives_the_reference_codes_without_the_package(folders, tmp_path):
    golden = np.load(REFERENCE / "chirp_1.37_75.npz")
    np.save(tmp_path / "audio.npy", formula.waveform("chirp", 1.37))
    program = """
import sys
sys.modules["wavtokenizer_hf"] = None  # importing it raises ImportError
import numpy, torch
from transformers import AutoFeatureExtractor, AutoModel
folder = sys.argv[1]
feature_extractor = AutoFeatureExtractor.from_pretrained(folder, trust_remote_code=True)
model = AutoModel.from_pretrained(folder, trust_remote_code=True)
assert type(model).__module__.startswith("transformers_modules."), type(model)
inputs = feature_extractor(numpy.load("audio.npy"), sampling_rate=24000, return_tensors="pt")
with torch.no_grad():
    numpy.save("codes.npy", model.encode(**inputs).audio_codes[0].numpy())
"""
    environment = {**os.environ, "HF_HOME": str(tmp_path / "hf_home"), "HF_HUB_OFFLINE": "1"}
    environment.pop("HF_MODULES_CACHE", None)
    run = subprocess.run(
        [sys.executable, "-c", program, folders(75)], cwd=tmp_path, env=environment, capture_output=True, text=True
    )
    assert run.returncode == 0, run.stderr
    codes = np.load(tmp_path / "codes.npy")
    assert len(np.unique(codes)) > 10
    # closer ties may be resolved differently on another processor
    np.testing.assert_array_equal(codes[:, golden["margin"] > 1e-6], golden["codes"][:, golden["margin"] > 1e-6])


# ---------------------------------------------------------------------------------------------------------------------
# The model card
# ---------------------------------------------------------------------------------------------------------------------


def test_card_has_the_metadata_that_the_hub_filters_by(small_folder):
    _, metadata, _ = (small_folder / "README.md").read_text().split("---\n", 2)
    metadata = yaml.safe_load(metadata)
    assert (metadata["license"], metadata["library_name"]) == ("mit", "transformers")
    assert metadata["pipeline_tag"] == "audio-to-audio"
    assert {"wavtokenizer", "audio-codec"} <= set(metadata["tags"])


def test_card_states_rate_bit_rate_fingerprint_and_source(small_folder):
    card = (small_folder / "README.md").read_text()
    source = small_folder.parent / "source.ckpt"
    facts = ["24000 Hz", "75 per second", "320 samples", "128 entries", "source.ckpt", "2408.16532"]
    facts += [f"{75 * 7} bit/s", hashlib.sha256(source.read_bytes()).hexdigest()]  # 128 entries are 7 bits
    facts.append(json.loads((small_folder / "config.json").read_text())["codebook_fingerprint"])
    assert [fact for fact in facts if fact not in card] == []


def test_examples_of_the_card_run(small_folder, tmp_path, monkeypatch):
    soundfile = pytest.importorskip("soundfile")
    monkeypatch.chdir(tmp_path)
    (tmp_path / small_folder.name).symlink_to(small_folder)
    soundfile.write("speech.wav", formula.waveform("speechlike", 0.5), 24000)
    blocks = re.findall(r"```python\n(.*?)```", (small_folder / "README.md").read_text(), re.DOTALL)
    assert len(blocks) == 6  # three ways to load, audio, datasets, language models
    names = {}
    for block in blocks:
        exec(block, names)
    assert names["tokens"][0]["audio_codes"] == names["audio_codes"][0, 0].tolist()
    assert len(soundfile.read("decoded.wav")[0]) == math.ceil(12000 / 320) * 320


# ---------------------------------------------------------------------------------------------------------------------
# The output appears at once and complete, or not at all
# ---------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("error", [KeyboardInterrupt(), OSError("disk full")], ids=repr)
def test_interrupted_conversion_leaves_nothing_behind(error, tensors, save, tmp_path, after_saving):
    path = save(tensors)
    after_saving(stop(error))
    with pytest.raises(type(error)):
        convert(path, tmp_path / "new" / "parents" / "converted")
    assert os.listdir(tmp_path) == [path.name]


def test_interrupted_conversion_leaves_existing_folders_alone(tensors, save, tmp_path, after_saving):
    path = save(tensors)
    (tmp_path / "models" / "other").mkdir(parents=True)
    after_saving(stop(KeyboardInterrupt()))
    with pytest.raises(KeyboardInterrupt):
        convert(path, tmp_path / "models" / "converted")
    assert os.listdir(tmp_path / "models") == ["other"]


def test_output_does_not_exist_before_it_is_complete(tensors, save, tmp_path, after_saving):
    seen = []
    after_saving(lambda folder: seen.append((tmp_path / "converted").exists()))
    convert(save(tensors), tmp_path / "converted")
    assert seen == [False]


def test_written_weights_that_differ_in_one_bit_are_found(tensors, save, tmp_path, after_saving):
    tensors["head.out.bias"][7] = 0.0

    def spoil(folder):
        weights = read_weights(folder)
        weights["head.linear.bias"][7] = -0.0
        safetensors.torch.save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})

    path = save(tensors)
    after_saving(spoil)
    with pytest.raises(RuntimeError, match=r"head\.linear\.bias differs"):
        convert(path, tmp_path / "converted")
    assert os.listdir(tmp_path) == [path.name]


def test_missing_weights_in_the_written_file_are_found(tensors, save, tmp_path, after_saving):
    def spoil(folder):
        weights = read_weights(folder)
        del weights["head.linear.bias"]
        safetensors.torch.save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})

    after_saving(spoil)
    with pytest.raises(RuntimeError, match=r"missing_keys: \['head\.linear\.bias'\]"):
        convert(save(tensors), tmp_path / "converted")


def test_empty_folder_may_be_the_output(tensors, save, tmp_path):
    (tmp_path / "converted").mkdir()
    assert (convert(save(tensors), tmp_path / "converted") / "config.json").is_file()


def test_output_may_be_in_folders_that_do_not_exist(tensors, save, tmp_path):
    assert convert(save(tensors), tmp_path / "a" / "b" / "converted") == tmp_path / "a" / "b" / "converted"


@pytest.mark.parametrize("kind", ["file", "folder"])
def test_existing_output_is_refused_and_left_alone(kind, tensors, save, tmp_path):
    existing = tmp_path / "converted" if kind == "file" else tmp_path / "converted" / "notes.txt"
    existing.parent.mkdir(exist_ok=True)
    existing.write_text("mine")
    with pytest.raises(ValueError, match=r"exists and is not an empty folder\. Remove it, or choose another"):
        convert(save(tensors), tmp_path / "converted")
    assert existing.read_text() == "mine"


# ---------------------------------------------------------------------------------------------------------------------
# Command line
# ---------------------------------------------------------------------------------------------------------------------


def test_command_line_converts_and_returns_0(tensors, save, save_yaml, tmp_path):
    output = tmp_path / "converted"
    assert main([str(save(tensors)), "--config", str(save_yaml(small_yaml())), "--output", str(output)]) == 0
    assert (output / "config.json").is_file()


def test_command_line_refuses_in_one_line_and_returns_2(tmp_path, capsys):
    (tmp_path / "page.ckpt").write_text("<html>")
    assert main([str(tmp_path / "page.ckpt"), "--output", str(tmp_path / "converted")]) == 2
    captured = capsys.readouterr()
    assert captured.out == ""
    assert re.fullmatch(r"error: .* is a web page.*\n", captured.err)


def test_command_line_reports_a_failed_write_in_one_line(tensors, save, tmp_path, capsys, after_saving):
    path = save(tensors)
    after_saving(stop(OSError("disk\nfull")))
    assert main([str(path), "--output", str(tmp_path / "converted")]) == 2
    assert capsys.readouterr().err.splitlines()[-1] == "error: disk full"


def test_module_runs_as_a_program(tmp_path):
    command = [sys.executable, "-m", "conversion.convert", tmp_path / "none.ckpt", "--output", tmp_path / "converted"]
    run = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert (run.returncode, run.stdout) == (2, "")
    assert re.fullmatch(r"error: There is no file .*\n", run.stderr)


# ---------------------------------------------------------------------------------------------------------------------
# Memory
# ---------------------------------------------------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="memory is read from Linux's /proc")
def test_checkpoint_with_optimizer_states_needs_little_memory_and_less_than_a_minute(checkpoints, tmp_path):
    large = large_checkpoint(checkpoints(75), tmp_path / "large.ckpt")
    memory, seconds = memory_and_seconds([large, "--output", tmp_path / "converted"])
    assert memory < 2 * (tmp_path / "converted" / "model.safetensors").stat().st_size
    assert seconds < 60  # on two cores
