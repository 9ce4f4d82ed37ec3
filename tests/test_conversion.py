"""Original checkpoints become folders that Hugging Face loads, or are refused with a reason; nothing in between."""

import copy
import fractions
import hashlib
import json
import math
import os
import pickle
import re
import stat
import subprocess
import sys
import threading
import time
from pathlib import Path

import formula
import numpy as np
import pytest
import safetensors.torch
import torch
import yaml
from conftest import REFERENCE, ROOT

from wavtokenizer_hf import WavTokenizerConfig, WavTokenizerFeatureExtractor, WavTokenizerModel
from wavtokenizer_hf.conversion.command import main
from wavtokenizer_hf.conversion.from_original import convert


ENCODER = "feature_extractor.encodec.encoder.model."
CODEBOOK = "feature_extractor.encodec.quantizer.vq.layers.0._codebook."

# ---------------------------------------------------------------------------------------------------------------------
# Small checkpoints: the names of a real one, in order, with fewer channels
# ---------------------------------------------------------------------------------------------------------------------

CHANNELS = {16: 2, 32: 4, 64: 8, 128: 16, 256: 32, 512: 64, 2048: 256, 768: 32, 2304: 48, 4096: 128}


def small_tensors(rate: int = 75) -> dict[str, torch.Tensor]:
    manifest = json.loads((REFERENCE / f"manifest_{rate}.json").read_text())
    shapes = {
        # kernel sizes, in third place, stay; so do the window and the head's rows, which CHANNELS does not list
        name: tuple(CHANNELS.get(size, size) if place < 2 else size for place, size in enumerate(shape))
        for name, shape in manifest.items()
    }
    return {name: torch.from_numpy(formula.fill(name, shape)) for name, shape in shapes.items()}


@pytest.fixture(scope="module")
def originals():
    return {rate: small_tensors(rate) for rate in (75, 40)}


@pytest.fixture
def tensors(originals):
    """A small checkpoint at 75 codes/s, by original names; the test's own to change."""
    return copy.deepcopy(originals[75])


@pytest.fixture
def save(tmp_path):
    """Writes what a Lightning checkpoint holds around the given tensors, and returns its path."""

    def save(tensors, name="model.ckpt", **others):
        torch.save({"epoch": 3, "state_dict": tensors, **others}, tmp_path / name)
        return tmp_path / name

    return save


def small_yaml(rate: int = 75) -> dict:
    """What the YAML file of such a checkpoint holds, as the published ones are built."""
    ratios = {75: [8, 5, 4, 2], 40: [6, 5, 5, 4]}[rate]
    feature_extractor = {
        "encodec_model": "encodec_24khz",
        "bandwidths": [6.6, 6.6, 6.6, 6.6],
        "train_codebooks": True,
        "num_quantizers": 1,
        "dowmsamples": ratios,
        "vq_bins": 128,
        "vq_kmeans": 200,
    }
    backbone = {"input_channels": 64, "dim": 32, "intermediate_dim": 48, "num_layers": 12, "adanorm_num_embeddings": 4}
    head = {"dim": 32, "n_fft": 4 * math.prod(ratios), "hop_length": math.prod(ratios), "padding": "same"}
    parts = {
        "feature_extractor": ("decoder.feature_extractors.EncodecFeatures", feature_extractor),
        "backbone": ("decoder.models.VocosBackbone", backbone),
        "head": ("decoder.heads.ISTFTHead", head),
    }
    model = {"sample_rate": 24000, "initial_learning_rate": 2e-4, "mel_loss_coeff": 45}
    model |= {part: {"class_path": path, "init_args": values} for part, (path, values) in parts.items()}
    return {
        "seed_everything": 3407,
        "data": {"class_path": "decoder.dataset.VocosDataModule", "init_args": {"train_params": {"batch_size": 40}}},
        "model": {"class_path": "decoder.experiment.WavTokenizer", "init_args": model},
        "trainer": {"max_steps": 2000000},
    }


@pytest.fixture
def save_yaml(tmp_path):
    def save_yaml(content, name="model.yaml"):
        (tmp_path / name).write_text(content if isinstance(content, str) else yaml.safe_dump(content))
        return tmp_path / name

    return save_yaml


def new_name(name: str) -> str:
    """The name that architecture.md gives for an original one."""
    name = name.replace("feature_extractor.encodec.encoder.model.", "encoder_model.encoder.layers.")
    name = name.replace(
        "feature_extractor.encodec.quantizer.vq.layers.0._codebook.", "encoder_model.quantizer.codebook."
    )
    name = name.replace(".conv.conv.weight_g", ".conv.parametrizations.weight.original0")
    name = name.replace(".conv.conv.weight_v", ".conv.parametrizations.weight.original1")
    return name.replace(".conv.conv.bias", ".conv.bias").replace("head.out.", "head.linear.")


def is_kept(name: str) -> bool:
    return not name.startswith("feature_extractor.encodec.decoder.") and name != "head.istft.window"


def read_weights(folder: Path) -> dict[str, torch.Tensor]:
    return safetensors.torch.load_file(folder / "model.safetensors")


def same_bits(left: torch.Tensor, right: torch.Tensor) -> bool:
    return left.dtype == right.dtype == torch.float32 and torch.equal(left.view(torch.int32), right.view(torch.int32))


# ---------------------------------------------------------------------------------------------------------------------
# What a converted folder holds
# ---------------------------------------------------------------------------------------------------------------------


def test_every_kept_tensor_equals_the_originals_bit_for_bit(checkpoints, folders, rate):
    original = torch.load(checkpoints(rate), mmap=True, weights_only=True)["state_dict"]
    weights = read_weights(folders(rate))
    kept = [name for name in original if is_kept(name)]
    assert len(kept) > 200
    assert [name for name in kept if not same_bits(weights[new_name(name)], original[name])] == []


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


def test_folder_gives_the_originals_codes_where_the_package_is_absent(folders, tmp_path):
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
    # nearer ties than this may fall either way on another processor
    np.testing.assert_array_equal(codes[:, golden["margin"] > 1e-6], golden["codes"][:, golden["margin"] > 1e-6])


# ---------------------------------------------------------------------------------------------------------------------
# The model card
# ---------------------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def small_folder(originals, tmp_path_factory):
    parent = tmp_path_factory.mktemp("small")
    torch.save({"state_dict": originals[75]}, parent / "source.ckpt")
    return convert(parent / "source.ckpt", parent / "small-wavtokenizer")


def test_card_has_metadata_that_the_hub_sorts_by(small_folder):
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
    assert len(blocks) == 6  # three ways to load, sound, datasets, language models
    names = {}
    for block in blocks:
        exec(block, names)
    assert names["tokens"][0]["audio_codes"] == names["audio_codes"][0, 0].tolist()
    assert len(soundfile.read("decoded.wav")[0]) == math.ceil(12000 / 320) * 320


# ---------------------------------------------------------------------------------------------------------------------
# Forms of checkpoints
# ---------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("form", ["bare.ckpt", "bare.pt", "bare.bin", "bare.safetensors", "before_torch_1.6.ckpt"])
def test_every_form_of_the_file_gives_the_same_weights(form, tensors, small_folder, tmp_path):
    path = tmp_path / form
    if form.endswith(".safetensors"):
        safetensors.torch.save_file(tensors, path)
    else:
        torch.save(tensors, path, _use_new_zipfile_serialization=not form.startswith("before"))
    folder = convert(path, tmp_path / "converted")
    assert (folder / "model.safetensors").read_bytes() == (small_folder / "model.safetensors").read_bytes()


def test_parameters_that_share_one_piece_of_memory_are_kept(tensors, save, small_folder, tmp_path):
    names = [name for name in tensors if name.startswith(ENCODER + "13.lstm.")]  # as cuDNN lays out an LSTM
    memory = torch.cat([tensors[name].flatten() for name in names])
    pieces = memory.split([tensors[name].numel() for name in names])
    for name, piece in zip(names, pieces, strict=True):
        tensors[name] = torch.nn.Parameter(piece.view(tensors[name].shape))
    folder = convert(save(tensors), tmp_path / "converted")
    assert (folder / "model.safetensors").read_bytes() == (small_folder / "model.safetensors").read_bytes()


def test_one_tensor_under_two_names_is_written_under_both(tensors, save, tmp_path):
    tensors[CODEBOOK + "embed_avg"] = tensors[CODEBOOK + "embed"]
    weights = read_weights(convert(save(tensors), tmp_path / "converted"))
    assert same_bits(weights["encoder_model.quantizer.codebook.embed_avg"], tensors[CODEBOOK + "embed"])


def test_training_only_tensors_are_dropped(tensors, save, small_folder, tmp_path):
    prefixes = ("multiperioddisc", "multiresddisc", "dac", "dacdiscriminator.discriminator", "melspec_loss")
    tensors |= {f"{prefix}.discriminators.0.convs.0.weight": torch.full((2,), math.nan) for prefix in prefixes}
    folder = convert(save(tensors), tmp_path / "converted")
    assert (folder / "model.safetensors").read_bytes() == (small_folder / "model.safetensors").read_bytes()


@pytest.fixture(scope="module")
def discriminators():
    """The original's three discriminators at their full size, each tensor of one value that no other has; by original names."""
    manifest = json.loads((REFERENCE / "manifest_discriminators.json").read_text())
    return {name: torch.tensor(float(place)).expand(shape) for place, (name, shape) in enumerate(manifest.items(), 1)}


def test_discriminators_are_kept_where_training_finds_them(
    tensors, discriminators, save, small_folder, tmp_path, capsys
):
    from wavtokenizer_hf.training import Settings
    from wavtokenizer_hf.training.state import build

    # as in real files, where the critic that the codec was trained against lies in the loss, and "dac." was never used
    used = {name.replace("dac.", "dacdiscriminator.discriminator."): tensor for name, tensor in discriminators.items()}
    unused = {
        name: torch.zeros(()).expand(tensor.shape) for name, tensor in discriminators.items() if name[:3] == "dac"
    }
    checkpoint = save({**tensors, **used, **unused})
    capsys.readouterr()
    folder = convert(checkpoint, tmp_path / "converted", with_discriminators=True)
    assert f"kept in discriminators.safetensors: {len(discriminators)} tensors" in capsys.readouterr().out
    assert (folder / "model.safetensors").read_bytes() == (small_folder / "model.safetensors").read_bytes()
    critics = build(Settings(model=str(folder))).critics.state_dict()
    assert len(critics) == len(discriminators)
    for name, tensor in discriminators.items():
        weight = ".parametrizations.weight.original"
        name = name.replace(".weight_g", f"{weight}0").replace(".weight_v", f"{weight}1")
        assert critics[name].shape == tensor.shape
        assert (critics[name].flatten()[[0, -1]] == tensor.flatten()[0]).all()


def test_discriminators_that_are_asked_for_must_be_there_and_whole(tensors, discriminators, save, tmp_path):
    with pytest.raises(ValueError, match="holds no discriminators"):
        convert(save(tensors), tmp_path / "converted", with_discriminators=True)
    some = dict(list(discriminators.items())[:-1])
    with pytest.raises(ValueError, match="other discriminators"):
        convert(save({**tensors, **some}), tmp_path / "converted", with_discriminators=True)
    assert not (tmp_path / "converted").exists()


def spoil_discriminators(path: Path) -> None:
    """Changes the last bit of the file."""
    content = bytearray(path.read_bytes())
    content[-4] ^= 1
    path.write_bytes(content)


@pytest.mark.slow
def test_written_discriminators_that_differ_in_one_bit_are_found(tensors, discriminators, save, tmp_path, monkeypatch):
    path = save({**tensors, **discriminators})

    def save_and_spoil(content, file):
        safetensors.torch.save_file(content, file)
        spoil_discriminators(file)

    monkeypatch.setattr("wavtokenizer_hf.conversion.from_original.save_file", save_and_spoil)
    with pytest.raises(RuntimeError, match=r"discriminators\.safetensors: .* differs from the checkpoint"):
        convert(path, tmp_path / "converted", with_discriminators=True)
    assert os.listdir(tmp_path) == [path.name]


@pytest.mark.slow
def test_discriminators_in_a_folder_that_exists_are_compared(tensors, discriminators, save, tmp_path):
    path = save({**tensors, **discriminators})
    folder = convert(path, tmp_path / "converted", with_discriminators=True)
    convert(path, folder, with_discriminators=True, keep_existing=True)
    with pytest.raises(ValueError, match="it has discriminators, which were not asked for"):
        convert(path, folder, keep_existing=True)
    file = folder / "discriminators.safetensors"
    spoil_discriminators(file)
    with pytest.raises(ValueError, match=r"discriminators\.safetensors: .* differs from the checkpoint"):
        convert(path, folder, with_discriminators=True, keep_existing=True)
    file.write_bytes(b"damaged")
    with pytest.raises(ValueError, match="its discriminators cannot be read"):
        convert(path, folder, with_discriminators=True, keep_existing=True)


def test_unusual_shapes_are_inferred(tmp_path):
    fields = {
        "num_filters": 8,
        "upsampling_ratios": [5, 3],
        "num_residual_layers": 2,
        "compress": 3,
        "kernel_size": 5,
        "last_kernel_size": 9,
        "residual_kernel_size": 5,
        "num_lstm_layers": 1,
        "hidden_size": 20,
        "codebook_size": 17,
        "codebook_dim": 20,
        "decoder_hidden_size": 64,
        "decoder_intermediate_size": 50,
        "decoder_num_layers": 3,
        "adanorm_num_embeddings": 2,
    }
    originals = {}
    for name, tensor in WavTokenizerModel(WavTokenizerConfig(**fields)).state_dict().items():
        name = name.replace("encoder_model.encoder.layers.", ENCODER).replace("head.linear.", "head.out.")
        name = name.replace("encoder_model.quantizer.codebook.", CODEBOOK).replace(".conv.bias", ".conv.conv.bias")
        name = name.replace(".conv.parametrizations.weight.original0", ".conv.conv.weight_g")
        originals[name.replace(".conv.parametrizations.weight.original1", ".conv.conv.weight_v")] = tensor
    torch.save(originals, tmp_path / "model.pt")
    written = json.loads((convert(tmp_path / "model.pt", tmp_path / "converted") / "config.json").read_text())
    assert {name: written[name] for name in fields} == fields


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64], ids=str)
def test_other_float_types_become_float32_and_the_report_says_so(dtype, tensors, save, tmp_path, capsys):
    tensors["head.out.bias"] = tensors["head.out.bias"].to(dtype)
    tensors["backbone.embed.bias"] = tensors["backbone.embed.bias"].to(dtype)
    weights = read_weights(convert(save(tensors), tmp_path / "converted"))
    assert same_bits(weights["head.linear.bias"], tensors["head.out.bias"].float())
    assert f"2 {str(dtype).removeprefix('torch.')} tensors converted to float32" in capsys.readouterr().out


def test_report_says_what_was_kept_and_dropped_and_why(tensors, save, tmp_path, capsys):
    kept = [tensor for name, tensor in tensors.items() if is_kept(name)]
    dropped = sum(name.startswith("feature_extractor.encodec.decoder.") for name in tensors)
    folder = convert(save(tensors, optimizer_states=[]), tmp_path / "converted")
    report = capsys.readouterr().out
    facts = [
        f"{len(kept)} tensors, {sum(tensor.numel() for tensor in kept):,} numbers",
        "never uses",
        "optimizer_states",
    ]
    facts += [f"feature_extractor.encodec.decoder.* ({dropped})", "upsampling_ratios [8, 5, 4, 2]", str(folder)]
    facts += [json.loads((folder / "config.json").read_text())["codebook_fingerprint"], "sampling_rate 24000"]
    assert [fact for fact in facts if fact not in report] == []


# ---------------------------------------------------------------------------------------------------------------------
# The original's YAML files
# ---------------------------------------------------------------------------------------------------------------------


def test_yaml_of_either_rate_is_accepted(originals, save, save_yaml, rate, tmp_path):
    folder = convert(save(originals[rate]), tmp_path / "converted", config=save_yaml(small_yaml(rate)))
    assert WavTokenizerConfig.from_pretrained(folder).frame_rate == rate


def test_sampling_rate_is_taken_from_the_yaml(tensors, save, save_yaml, tmp_path):
    content = small_yaml()
    content["model"]["init_args"]["sample_rate"] = 16000
    folder = convert(save(tensors), tmp_path / "converted", config=save_yaml(content))
    rates = [
        json.loads((folder / f"{name}.json").read_text())["sampling_rate"]
        for name in ("config", "preprocessor_config")
    ]
    assert rates == [16000, 16000]


CONTRADICTIONS = {
    ("feature_extractor", "dowmsamples"): [6, 5, 5, 4],
    ("feature_extractor", "vq_bins"): 4096,
    ("feature_extractor", "encodec_model"): "encodec_48khz",
    ("backbone", "input_channels"): 512,
    ("backbone", "dim"): 768,
    ("backbone", "intermediate_dim"): 2304,
    ("backbone", "num_layers"): 8,
    ("backbone", "adanorm_num_embeddings"): 3,
    ("head", "dim"): 768,
    ("head", "n_fft"): 2400,
    ("head", "hop_length"): 600,
    ("head", "padding"): "center",
}


@pytest.mark.parametrize(("part", "key"), CONTRADICTIONS)
def test_yaml_that_contradicts_the_tensors_is_refused_with_both_values(
    part, key, originals, save, save_yaml, tmp_path
):
    content = small_yaml()
    values = content["model"]["init_args"][part]["init_args"]
    own, values[key] = values[key], CONTRADICTIONS[part, key]
    with pytest.raises(ValueError, match="contradicts the checkpoint") as error:
        convert(save(originals[75]), tmp_path / "converted", config=save_yaml(content))
    assert f"{part}.{key}" in str(error.value)
    assert repr(own) in str(error.value)
    assert repr(values[key]) in str(error.value)


def test_classes_that_a_yaml_names_are_never_imported(tensors, save, save_yaml, tmp_path, monkeypatch):
    (tmp_path / "vocos_trap.py").write_text(f"open({str(tmp_path / 'imported')!r}, 'w')")
    monkeypatch.syspath_prepend(tmp_path)
    content = small_yaml()
    for part in ("feature_extractor", "backbone", "head"):
        content["model"]["init_args"][part]["class_path"] = "vocos_trap.Trap"
    convert(save(tensors), tmp_path / "converted", config=save_yaml(content))
    assert not (tmp_path / "imported").exists()


def without(*keys: str) -> dict:
    content = small_yaml()
    part = content
    for key in keys[:-1]:
        part = part[key]
    del part[keys[-1]]
    return content


BAD_YAML = {
    "list": ("- a\n- b\n", "no mapping"),
    "empty": ("", "no mapping"),
    "not_yaml": ("model: [1, 2\n", "not plain YAML"),
    "runs_code": ("!!python/object/apply:os.system ['touch executed']", "not plain YAML"),
    "other_project": ({"model": {"name": "something"}}, "no model with init_args"),
    "no_backbone": (without("model", "init_args", "backbone"), "no backbone with init_args"),
    "no_head": (without("model", "init_args", "head", "init_args"), "no head with init_args"),
}


@pytest.mark.parametrize("case", BAD_YAML)
def test_yaml_of_something_else_is_refused(case, originals, save, save_yaml, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    content, reason = BAD_YAML[case]
    with pytest.raises(ValueError, match=reason):
        convert(save(originals[75]), tmp_path / "converted", config=save_yaml(content))
    assert sorted(os.listdir(tmp_path)) == ["model.ckpt", "model.yaml"]


@pytest.mark.parametrize("sample_rate", [0, "24000", 24000.0, None], ids=repr)
def test_sampling_rate_that_is_none_is_refused(sample_rate, originals, save, save_yaml, tmp_path):
    content = small_yaml()
    content["model"]["init_args"]["sample_rate"] = sample_rate
    with pytest.raises(ValueError, match=r"model\.sample_rate"):
        convert(save(originals[75]), tmp_path / "converted", config=save_yaml(content))


@pytest.mark.parametrize("where", ["missing", "folder"])
def test_yaml_that_is_no_file_is_refused(where, originals, save, tmp_path):
    (tmp_path / "folder").mkdir()
    with pytest.raises(ValueError, match="expected a YAML file"):
        convert(save(originals[75]), tmp_path / "converted", config=tmp_path / where)


def test_several_quantizers_in_the_yaml_are_refused(originals, save, save_yaml, tmp_path):
    content = small_yaml()
    content["model"]["init_args"]["feature_extractor"]["init_args"]["num_quantizers"] = 8
    with pytest.raises(ValueError, match="num_quantizers=8, expected 1"):
        convert(save(originals[75]), tmp_path / "converted", config=save_yaml(content))


# ---------------------------------------------------------------------------------------------------------------------
# Files that are no usable checkpoint
# ---------------------------------------------------------------------------------------------------------------------


def truncated(path: Path, zipped: bool = True) -> None:
    torch.save({"state_dict": {"head.out.bias": torch.ones(1000)}}, path, _use_new_zipfile_serialization=zipped)
    path.write_bytes(path.read_bytes()[:-1000])


def truncated_safetensors(path: Path) -> None:
    safetensors.torch.save_file({"head.out.bias": torch.ones(1000)}, path)
    path.write_bytes(path.read_bytes()[:-1000])


GIT_LFS = "version https://git-lfs.github.com/spec/v1\noid sha256:4d7a2146\nsize 1754879650\n"

BAD_FILES = {
    "missing.ckpt": (lambda path: None, "There is no file"),
    "folder.ckpt": (Path.mkdir, "is a folder"),
    "empty.ckpt": (Path.touch, "is empty"),
    "truncated.ckpt": (truncated, "cut short"),
    "truncated_before_torch_1.6.ckpt": (lambda path: truncated(path, zipped=False), "cut short"),
    "truncated.safetensors": (truncated_safetensors, "cut short"),
    "page.ckpt": (lambda path: path.write_text("\n<!DOCTYPE html><html>Sign in</html>"), "is a web page"),
    "pointer.ckpt": (lambda path: path.write_text(GIT_LFS), "git LFS pointer"),
    "pointer.safetensors": (lambda path: path.write_text(GIT_LFS), "git LFS pointer"),
    "random.ckpt": (lambda path: path.write_bytes(bytes(range(256)) * 8), "cannot be read"),
    "other.zip": (lambda path: path.write_bytes(b"PK\x05\x06" + bytes(18)), "cannot be read"),
    "tensor.pt": (lambda path: torch.save(torch.ones(3), path), "holds one Tensor"),
    "numbers.pt": (lambda path: torch.save({"epoch": 3, "loss": 0.5}, path), "holds no tensors, but 'epoch', 'loss'"),
    "nothing.pt": (lambda path: torch.save({"state_dict": {}}, path), "holds nothing"),
    "list.pt": (lambda path: torch.save({"state_dict": [torch.ones(3)]}, path), "a state_dict of type list"),
}


@pytest.mark.parametrize("name", BAD_FILES)
def test_file_that_is_no_checkpoint_is_refused_with_a_reason(name, tmp_path):
    make, reason = BAD_FILES[name]
    make(tmp_path / name)
    with pytest.raises(ValueError, match=reason) as error:
        convert(tmp_path / name, tmp_path / "converted")
    assert str(tmp_path / name) in str(error.value)
    assert "expected a" in str(error.value).lower()


class RunsCode:
    """Pickled, this makes a file when it is opened."""

    def __init__(self, path: Path):
        self.command = f"touch {path}"

    def __reduce__(self):
        return os.system, (self.command,)


def save_zipped(content, path):
    torch.save({"state_dict": {"head.out.bias": torch.ones(3)}, "callbacks": content}, path)


def save_before_torch_1_6(content, path):
    torch.save({"state_dict": {}, "callbacks": content}, path, _use_new_zipfile_serialization=False)


def save_protocol_4(content, path):
    torch.save({"state_dict": {}, "callbacks": content}, path, pickle_protocol=4)


def save_plain(content, path):
    path.write_bytes(pickle.dumps(content))


SAVERS = [save_zipped, save_before_torch_1_6, save_protocol_4, save_plain]


@pytest.mark.filterwarnings("ignore:Detected pickle protocol")
@pytest.mark.parametrize("save_pickle", SAVERS)
def test_pickle_that_would_run_code_is_refused_and_not_executed(save_pickle, tmp_path):
    save_pickle(RunsCode(tmp_path / "executed"), tmp_path / "trap.ckpt")
    with pytest.raises(ValueError, match=r"would run code, namely \w+\.system\. Nothing was executed"):
        convert(tmp_path / "trap.ckpt", tmp_path / "converted")
    assert os.listdir(tmp_path) == ["trap.ckpt"]


def test_trap_of_the_tests_above_works(tmp_path):
    save_plain(RunsCode(tmp_path / "executed"), tmp_path / "trap.ckpt")
    pickle.loads((tmp_path / "trap.ckpt").read_bytes())
    assert (tmp_path / "executed").exists()


def test_object_of_another_class_is_refused_by_name(tmp_path):
    save_zipped(fractions.Fraction(1, 2), tmp_path / "model.ckpt")
    with pytest.raises(ValueError, match=r"namely fractions\.Fraction"):
        convert(tmp_path / "model.ckpt", tmp_path / "converted")


def test_setting_that_loosens_torch_load_is_not_heeded(tmp_path, monkeypatch):
    monkeypatch.setenv("TORCH_FORCE_NO_WEIGHTS_ONLY_LOAD", "1")
    save_zipped(RunsCode(tmp_path / "executed"), tmp_path / "trap.ckpt")
    with pytest.raises(ValueError, match="Nothing was executed"):
        convert(tmp_path / "trap.ckpt", tmp_path / "converted")
    assert os.listdir(tmp_path) == ["trap.ckpt"]


# ---------------------------------------------------------------------------------------------------------------------
# Tensors that do not make a WavTokenizer
# ---------------------------------------------------------------------------------------------------------------------


def remove(*names: str):
    def change(tensors):
        for name in names:
            del tensors[name]

    return change


def put(name: str, value):
    def change(tensors):
        tensors[name] = value(tensors[name]) if callable(value) else value

    return change


def with_value(value: float, dtype: torch.dtype = torch.float32):
    def change(tensor):
        tensor = tensor.to(dtype)
        tensor.view(-1)[5] = value
        return tensor

    return change


BAD_TENSORS = {
    "missing": (remove("head.out.bias", CODEBOOK + "embed"), f"head.out.bias|{CODEBOOK}embed"),
    "missing_layer": (
        remove(*(f"{ENCODER}3.conv.conv.{part}" for part in ("weight_g", "weight_v", "bias"))),
        "encoder layers",
    ),
    "only_backbone": (lambda t: [t.pop(n) for n in list(t) if not n.startswith("backbone.")], "encoder layers none"),
    "unknown": (put("backbone_ema.embed.weight", torch.ones(3)), r"1 in all: backbone_ema\.embed\.weight"),
    "unknown_in_backbone": (
        put("backbone.embed.weight_ema", torch.ones(3)),
        r"1 in all: backbone\.embed\.weight_ema",
    ),
    "unknown_in_lstm": (
        put(ENCODER + "13.lstm.weight_ih_l0_reverse", torch.ones(3)),
        r"13\.lstm\.weight_ih_l0_reverse",
    ),
    "converted": (
        lambda t: t.update({new_name(n): t.pop(n) for n in list(t)}),
        "load its folder with from_pretrained",
    ),
    "two_quantizers": (put(CODEBOOK.replace(".0.", ".1.") + "embed", torch.ones(3)), "num_quantizers=2, expected 1"),
    "nan": (put("head.out.weight", with_value(math.nan)), r"head\.out\.weight with 1 of .* finite"),
    "infinite": (put("backbone.embed.bias", with_value(-math.inf)), r"backbone\.embed\.bias with 1 of .* finite"),
    "beyond_float32": (put("backbone.embed.bias", with_value(1e300, torch.float64)), "beyond float32"),
    "integer": (put("head.out.bias", lambda tensor: tensor.int()), r"head\.out\.bias of type torch\.int32"),
    "sparse": (put("head.out.bias", lambda tensor: tensor.to_sparse()), r"head\.out\.bias of type .*sparse"),
    "number": (put("head.out.bias", 3), "Got int for head.out.bias"),
    "no_dimensions": (put(CODEBOOK + "embed", torch.tensor(1.0)), r"embed of shape \(\), expected 2 dimensions"),
    "no_size": (
        put(ENCODER + "1.block.1.conv.conv.weight_v", torch.ones(0, 4, 3)),
        r"\(0, 4, 3\), expected 3 dimensions",
    ),
    "misshapen": (
        put("backbone.convnext.7.gamma", torch.ones(31)),
        r"convnext\.7\.gamma of shape \(31,\), expected \(32,\)",
    ),
    "head_of_other_rate": (put("head.out.weight", torch.ones(2402, 32)), "frames of 2400 samples; expected 1280"),
    "not_grouped": (put("backbone.embed.weight", torch.ones(33, 64, 7)), "expected a multiple"),
}


@pytest.mark.parametrize("case", BAD_TENSORS)
def test_tensors_that_do_not_make_a_wavtokenizer_are_refused_with_a_reason(case, tensors, save, tmp_path):
    change, reason = BAD_TENSORS[case]
    change(tensors)
    with pytest.raises(ValueError, match=reason):
        convert(save(tensors), tmp_path / "converted")


@pytest.mark.parametrize("case", BAD_TENSORS)
def test_refused_tensors_leave_nothing_behind(case, tensors, save, tmp_path):
    BAD_TENSORS[case][0](tensors)
    path = save(tensors)
    with pytest.raises(ValueError, match=BAD_TENSORS[case][1]):
        convert(path, tmp_path / "new" / "converted")
    assert os.listdir(tmp_path) == [path.name]


@pytest.mark.parametrize("first", range(5))
def test_every_missing_tensor_is_named(first, tensors, save, tmp_path):
    kept = [name for name in tensors if is_kept(name)]
    missing = kept[first::13]  # 17 or 18 from all over the model, and no layer of it as a whole
    remove(*missing)(tensors)
    with pytest.raises(ValueError, match=f"{len(missing)} of the {len(kept)} tensors") as error:
        convert(save(tensors), tmp_path / "converted")
    assert [name for name in missing if name not in str(error.value)] == []


# ---------------------------------------------------------------------------------------------------------------------
# The output appears at once and complete, or not at all
# ---------------------------------------------------------------------------------------------------------------------


@pytest.fixture
def after_saving(monkeypatch):
    """Calls a function of the test, with the folder, after the model has been written there."""

    def after_saving(function):
        save_pretrained = WavTokenizerModel.save_pretrained

        def replacement(self, folder):
            save_pretrained(self, folder)
            function(folder)

        monkeypatch.setattr(WavTokenizerModel, "save_pretrained", replacement)

    return after_saving


def stop(error):
    def function(folder):
        raise error

    return function


@pytest.mark.parametrize("error", [KeyboardInterrupt(), OSError("disk full")], ids=repr)
def test_interrupted_conversion_leaves_nothing_behind(error, tensors, save, tmp_path, after_saving):
    path = save(tensors)
    after_saving(stop(error))
    with pytest.raises(type(error)):
        convert(path, tmp_path / "new" / "parents" / "converted")
    assert os.listdir(tmp_path) == [path.name]


def test_interrupted_conversion_leaves_older_folders_alone(tensors, save, tmp_path, after_saving):
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


def test_output_may_lie_in_folders_that_do_not_exist(tensors, save, tmp_path):
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


class PeakMemory:
    """Largest anonymous memory of another process, in bytes, sampled every few milliseconds.

    ru_maxrss would count the pages of mapped files too, which the kernel takes back whenever it needs the room.
    """

    def __init__(self, process: int):
        self.status = Path(f"/proc/{process}/status")
        self.peak, self.done = self.now(), threading.Event()
        self.thread = threading.Thread(target=self.watch)

    def now(self) -> int:
        found = dict(re.findall(r"(RssAnon|RssShmem):\s+(\d+) kB", self.status.read_text()))
        return 1024 * sum(map(int, found.values()))

    def watch(self):
        while not self.done.is_set():
            self.peak = max(self.peak, self.now())
            time.sleep(0.003)

    def __enter__(self):
        self.thread.start()
        return self

    def __exit__(self, *_):
        self.done.set()
        self.thread.join()


def large_checkpoint(checkpoint: Path, path: Path) -> Path:
    """The checkpoint with optimizer states beside it, as large as the published ones."""
    content = torch.load(checkpoint, mmap=True, weights_only=True)
    content["optimizer_states"] = [{"state": {i: {"exp_avg": torch.zeros(10**7)} for i in range(36)}}]
    torch.save(content, path)
    assert path.stat().st_size > 1.75e9
    return path


def memory_and_seconds(arguments: list, **environment: str) -> tuple[int, float]:
    """What a conversion takes in a process of its own: peak memory above that of the imports, in bytes, and seconds."""
    program = """
import sys, torch, transformers
from wavtokenizer_hf.conversion.command import main
print("ready", flush=True)
sys.stdin.readline()
code = main(sys.argv[1:])
print("done", flush=True)
sys.stdin.readline()
sys.exit(code)
"""
    process = subprocess.Popen(
        [sys.executable, "-c", program, *arguments],
        cwd=ROOT,
        env={**os.environ, **environment},
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )
    with process:
        assert process.stdout.readline() == "ready\n"
        before, start = (memory := PeakMemory(process.pid)).peak, time.perf_counter()
        with memory:
            process.stdin.write("\n")
            process.stdin.flush()
            while process.stdout.readline() not in ("done\n", ""):
                pass
        seconds = time.perf_counter() - start
        process.stdin.write("\n")
    assert process.returncode == 0
    assert before > 50e6  # torch itself, or nothing was measured
    print(f"peak {(memory.peak - before) / 1e6:.0f} MB above the imports, {seconds:.1f} s")
    return memory.peak - before, seconds


@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="memory is read from Linux's /proc")
def test_checkpoint_with_optimizer_states_needs_little_memory_and_less_than_a_minute(checkpoints, tmp_path):
    large = large_checkpoint(checkpoints(75), tmp_path / "large.ckpt")
    memory, seconds = memory_and_seconds([large, "--output", tmp_path / "converted"])
    assert memory < 2 * (tmp_path / "converted" / "model.safetensors").stat().st_size
    assert seconds < 60  # on two cores
