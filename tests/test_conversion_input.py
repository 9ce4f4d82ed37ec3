"""Every form of a checkpoint is read, or refused with a reason: files, YAML, tensors."""

import fractions
import json
import math
import os
import pickle
from pathlib import Path

import pytest
import safetensors.torch
import torch
from conftest import REFERENCE
from small_checkpoints import (  # noqa: F401
    CODEBOOK,
    ENCODER,
    is_kept,
    new_name,
    originals,
    read_weights,
    same_bits,
    save,
    save_yaml,
    small_folder,
    small_yaml,
    tensors,
)

from wavtokenizer_hf import WavTokenizerConfig, WavTokenizerModel
from wavtokenizer_hf.conversion.from_original import convert


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


def test_parameters_that_share_one_storage_are_converted(tensors, save, small_folder, tmp_path):
    names = [name for name in tensors if name.startswith(ENCODER + "13.lstm.")]  # the memory layout of a cuDNN LSTM
    memory = torch.cat([tensors[name].flatten() for name in names])
    views = memory.split([tensors[name].numel() for name in names])
    for name, view in zip(names, views, strict=True):
        tensors[name] = torch.nn.Parameter(view.view(tensors[name].shape))
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
    """
    Return the three reference discriminators at full size, by reference names. Each tensor is filled with its own
    constant.
    """
    manifest = json.loads((REFERENCE / "manifest_discriminators.json").read_text())
    return {
        name: torch.tensor(float(number)).expand(shape) for number, (name, shape) in enumerate(manifest.items(), 1)
    }


def test_discriminators_are_saved_where_training_finds_them(
    tensors, discriminators, save, small_folder, tmp_path, capsys
):
    from wavtokenizer_hf.training import Settings
    from wavtokenizer_hf.training.state import build

    # As in the published files: the loss holds the trained discriminator, and the one under "dac." was never used.
    used = {name.replace("dac.", "dacdiscriminator.discriminator."): tensor for name, tensor in discriminators.items()}
    never_used = {
        name: torch.zeros(()).expand(tensor.shape) for name, tensor in discriminators.items() if name[:3] == "dac"
    }
    checkpoint = save({**tensors, **used, **never_used})
    capsys.readouterr()
    folder = convert(checkpoint, tmp_path / "converted", with_discriminators=True)
    assert f"kept in discriminators.safetensors: {len(discriminators)} tensors" in capsys.readouterr().out
    assert (folder / "model.safetensors").read_bytes() == (small_folder / "model.safetensors").read_bytes()
    loaded = build(Settings(model=str(folder))).discriminators.state_dict()
    assert len(loaded) == len(discriminators)
    for name, tensor in discriminators.items():
        weight = ".parametrizations.weight.original"
        name = name.replace(".weight_g", f"{weight}0").replace(".weight_v", f"{weight}1")
        assert loaded[name].shape == tensor.shape
        assert (loaded[name].flatten()[[0, -1]] == tensor.flatten()[0]).all()


def test_requested_discriminators_must_be_present_and_complete(tensors, discriminators, save, tmp_path):
    with pytest.raises(ValueError, match="holds no discriminators"):
        convert(save(tensors), tmp_path / "converted", with_discriminators=True)
    some = dict(list(discriminators.items())[:-1])
    with pytest.raises(ValueError, match="other discriminators"):
        convert(save({**tensors, **some}), tmp_path / "converted", with_discriminators=True)
    assert not (tmp_path / "converted").exists()


def flip_one_bit(path: Path) -> None:
    """Flip a bit in the last value of the file."""
    content = bytearray(path.read_bytes())
    content[-4] ^= 1
    path.write_bytes(content)


@pytest.mark.slow
def test_written_discriminators_that_differ_in_one_bit_are_found(tensors, discriminators, save, tmp_path, monkeypatch):
    path = save({**tensors, **discriminators})

    def save_and_spoil(content, file):
        safetensors.torch.save_file(content, file)
        flip_one_bit(file)

    monkeypatch.setattr("wavtokenizer_hf.conversion.from_original.save_file", save_and_spoil)
    with pytest.raises(RuntimeError, match=r"discriminators\.safetensors: .* differs from the checkpoint"):
        convert(path, tmp_path / "converted", with_discriminators=True)
    assert os.listdir(tmp_path) == [path.name]


@pytest.mark.slow
def test_discriminators_in_an_existing_folder_are_compared(tensors, discriminators, save, tmp_path):
    path = save({**tensors, **discriminators})
    folder = convert(path, tmp_path / "converted", with_discriminators=True)
    convert(path, folder, with_discriminators=True, keep_existing=True)
    with pytest.raises(ValueError, match="it has discriminators, which were not requested"):
        convert(path, folder, keep_existing=True)
    file = folder / "discriminators.safetensors"
    flip_one_bit(file)
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


def test_report_lists_converted_and_dropped_tensors_with_reasons(tensors, save, tmp_path, capsys):
    converted = [tensor for name, tensor in tensors.items() if is_kept(name)]
    dropped = sum(name.startswith("feature_extractor.encodec.decoder.") for name in tensors)
    folder = convert(save(tensors, optimizer_states=[]), tmp_path / "converted")
    report = capsys.readouterr().out
    facts = [
        f"{len(converted)} tensors, {sum(tensor.numel() for tensor in converted):,} numbers",
        "never uses",
        "optimizer_states",
    ]
    facts += [f"feature_extractor.encodec.decoder.* ({dropped})", "upsampling_ratios [8, 5, 4, 2]", str(folder)]
    facts += [json.loads((folder / "config.json").read_text())["codebook_fingerprint"], "sampling_rate 24000"]
    assert [fact for fact in facts if fact not in report] == []


# ---------------------------------------------------------------------------------------------------------------------
# YAML files of the reference implementation
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
def test_yaml_of_another_model_is_refused(case, originals, save, save_yaml, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    content, reason = BAD_YAML[case]
    with pytest.raises(ValueError, match=reason):
        convert(save(originals[75]), tmp_path / "converted", config=save_yaml(content))
    assert sorted(os.listdir(tmp_path)) == ["model.ckpt", "model.yaml"]


@pytest.mark.parametrize("sample_rate", [0, "24000", 24000.0, None], ids=repr)
def test_invalid_sampling_rate_is_refused(sample_rate, originals, save, save_yaml, tmp_path):
    content = small_yaml()
    content["model"]["init_args"]["sample_rate"] = sample_rate
    with pytest.raises(ValueError, match=r"model\.sample_rate"):
        convert(save(originals[75]), tmp_path / "converted", config=save_yaml(content))


@pytest.mark.parametrize("where", ["missing", "folder"])
def test_yaml_path_that_is_not_a_file_is_refused(where, originals, save, tmp_path):
    (tmp_path / "folder").mkdir()
    with pytest.raises(ValueError, match="expected a YAML file"):
        convert(save(originals[75]), tmp_path / "converted", config=tmp_path / where)


def test_several_quantizers_in_the_yaml_are_refused(originals, save, save_yaml, tmp_path):
    content = small_yaml()
    content["model"]["init_args"]["feature_extractor"]["init_args"]["num_quantizers"] = 8
    with pytest.raises(ValueError, match="num_quantizers=8, expected 1"):
        convert(save(originals[75]), tmp_path / "converted", config=save_yaml(content))


# ---------------------------------------------------------------------------------------------------------------------
# Files that are not usable checkpoints
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
    "truncated.safetensors": (truncated_safetensors, "damaged or truncated"),
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
def test_file_that_is_not_a_checkpoint_is_refused_with_a_reason(name, tmp_path):
    make, reason = BAD_FILES[name]
    make(tmp_path / name)
    with pytest.raises(ValueError, match=reason) as error:
        convert(tmp_path / name, tmp_path / "converted")
    assert str(tmp_path / name) in str(error.value)
    assert "expected a" in str(error.value).lower()


class RunsCode:
    """An object whose pickle creates a file when it is loaded."""

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


def test_the_code_execution_trap_of_these_tests_works(tmp_path):
    save_plain(RunsCode(tmp_path / "executed"), tmp_path / "trap.ckpt")
    pickle.loads((tmp_path / "trap.ckpt").read_bytes())
    assert (tmp_path / "executed").exists()


def test_object_of_another_class_is_refused_by_name(tmp_path):
    save_zipped(fractions.Fraction(1, 2), tmp_path / "model.ckpt")
    with pytest.raises(ValueError, match=r"namely fractions\.Fraction"):
        convert(tmp_path / "model.ckpt", tmp_path / "converted")


def test_environment_variable_that_loosens_torch_load_is_ignored(tmp_path, monkeypatch):
    monkeypatch.setenv("TORCH_FORCE_NO_WEIGHTS_ONLY_LOAD", "1")
    save_zipped(RunsCode(tmp_path / "executed"), tmp_path / "trap.ckpt")
    with pytest.raises(ValueError, match="Nothing was executed"):
        convert(tmp_path / "trap.ckpt", tmp_path / "converted")
    assert os.listdir(tmp_path) == ["trap.ckpt"]


# ---------------------------------------------------------------------------------------------------------------------
# Tensors of other architectures
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
def test_tensors_of_another_architecture_are_refused_with_a_reason(case, tensors, save, tmp_path):
    change, reason = BAD_TENSORS[case]
    change(tensors)
    with pytest.raises(ValueError, match=reason):
        convert(save(tensors), tmp_path / "converted")


@pytest.mark.parametrize("case", BAD_TENSORS)
def test_refused_tensors_leave_no_output(case, tensors, save, tmp_path):
    BAD_TENSORS[case][0](tensors)
    path = save(tensors)
    with pytest.raises(ValueError, match=BAD_TENSORS[case][1]):
        convert(path, tmp_path / "new" / "converted")
    assert os.listdir(tmp_path) == [path.name]


@pytest.mark.parametrize("first", range(5))
def test_every_missing_tensor_is_named(first, tensors, save, tmp_path):
    converted = [name for name in tensors if is_kept(name)]
    missing = converted[first::13]  # 17 or 18 tensors across the model, and no complete layer
    remove(*missing)(tensors)
    with pytest.raises(ValueError, match=f"{len(missing)} of the {len(converted)} tensors") as error:
        convert(save(tensors), tmp_path / "converted")
    assert [name for name in missing if name not in str(error.value)] == []
