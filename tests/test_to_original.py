"""Converted folders become files of the reference implementation again, with its names, shapes and bits."""

import hashlib
import json
import os
import pickletools
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from conftest import FIXTURES, REFERENCE
from safetensors.torch import save_file
from small_checkpoints import CODEBOOK

from wavtokenizer_hf import WavTokenizerConfig, WavTokenizerFeatureExtractor, WavTokenizerModel
from wavtokenizer_hf.cli import main as command_line
from wavtokenizer_hf.conversion.from_original import convert
from wavtokenizer_hf.conversion.to_original import main, to_original


ROOT = FIXTURES.parent.parent
# the encoder that the reference implementation hard-codes, with the smallest possible decoder
FIELDS = {
    "codebook_size": 16,
    "decoder_hidden_size": 32,
    "decoder_intermediate_size": 48,
    "decoder_num_layers": 1,
}


@pytest.fixture(scope="module")
def small(tmp_path_factory):
    """Return a small converted folder for 75 codes per second."""
    torch.manual_seed(0)
    folder = tmp_path_factory.mktemp("small") / "codec"
    WavTokenizerModel(WavTokenizerConfig(upsampling_ratios=[8, 5, 4, 2], **FIELDS)).save_pretrained(folder)
    WavTokenizerFeatureExtractor(hop_length=320).save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def written(small, tmp_path_factory):
    """Return the folder of files written from it."""
    return to_original(small, tmp_path_factory.mktemp("original") / "files")


@pytest.fixture(scope="module")
def back(folders, tmp_path_factory):
    """
    Return a function: rate -> files written from the folder of that published shape. They are written on first use.
    """
    parent, checkpoints = tmp_path_factory.mktemp("back"), {}

    def back(rate: int) -> Path:
        if rate not in checkpoints:
            checkpoints[rate] = to_original(folders(rate), parent / str(rate))
        return checkpoints[rate]

    return back


BOTH_RATES = pytest.mark.parametrize("rate", [75, pytest.param(40, marks=pytest.mark.slow)])


def read(path: Path) -> dict[str, torch.Tensor]:
    return torch.load(path, weights_only=True)["state_dict"]


def same_bits(left: torch.Tensor, right: torch.Tensor) -> bool:
    return left.shape == right.shape and torch.equal(left.view(torch.int32), right.view(torch.int32))


@BOTH_RATES
def test_tensors_round_trip_bit_for_bit_with_the_reference_names_and_shapes(checkpoints, back, rate):
    source, tensors = read(checkpoints(rate)), read(back(rate))
    manifest = json.loads((REFERENCE / f"manifest_{rate}.json").read_text())
    assert {name: list(tensor.shape) for name, tensor in tensors.items()} == manifest
    converted = [name for name in source if "encodec.decoder" not in name and name != "head.istft.window"]
    assert len(converted) > 200
    assert [name for name in converted if not same_bits(tensors[name], source[name])] == []
    # the fixture's window is computed in float64
    torch.testing.assert_close(tensors["head.istft.window"], source["head.istft.window"], rtol=0, atol=1e-6)


def test_converting_the_written_file_gives_the_same_folder(small, written, tmp_path):
    first = convert(written, tmp_path / "first", config=written.with_suffix(".yaml"))
    again = convert(to_original(first, tmp_path / "back"), tmp_path / "again")
    for file in first.iterdir():
        if file.name != "README.md":  # the card names the source file
            assert (again / file.name).read_bytes() == file.read_bytes(), file.name
    assert (first / "model.safetensors").read_bytes() == (small / "model.safetensors").read_bytes()


@BOTH_RATES
def test_the_yaml_file_matches_the_reference_yaml(back, rate):
    model = yaml.safe_load(back(rate).with_suffix(".yaml").read_text())["model"]["init_args"]
    values = {part: model[part]["init_args"] for part in ("feature_extractor", "backbone", "head")}
    hop = {75: 320, 40: 600}[rate]
    # as in configs/ of the reference implementation
    assert values == {
        "feature_extractor": {
            "encodec_model": "encodec_24khz",
            "bandwidths": [6.6, 6.6, 6.6, 6.6],
            "train_codebooks": True,
            "num_quantizers": 1,
            "dowmsamples": {75: [8, 5, 4, 2], 40: [6, 5, 5, 4]}[rate],
            "vq_bins": 4096,
            "vq_kmeans": 200,
        },
        "backbone": {
            "input_channels": 512,
            "dim": 768,
            "intermediate_dim": 2304,
            "num_layers": 12,
            "adanorm_num_embeddings": 4,
        },
        "head": {"dim": 768, "n_fft": 4 * hop, "hop_length": hop, "padding": "same"},
    }
    assert model["backbone"]["class_path"] == "decoder.models.VocosBackbone"


def test_the_file_holds_dictionaries_tensors_and_plain_values_with_the_weights_as_first_dictionary(written):
    with zipfile.ZipFile(written) as archive:
        operations = list(
            pickletools.genops(archive.read(next(n for n in archive.namelist() if n.endswith("data.pkl"))))
        )
    imported = {argument for operation, argument, _ in operations if operation.name == "GLOBAL"}
    allowed = {"torch._utils _rebuild_tensor_v2", "torch FloatStorage", "collections OrderedDict"}
    assert imported <= allowed
    content = torch.load(written, weights_only=True)
    assert next(name for name, value in content.items() if isinstance(value, dict)) == "state_dict"


def test_no_two_tensors_share_memory(written):
    """The GGUF converters first write safetensors, which refuses tensors that share memory."""
    tensors = read(written)
    assert len({tensor.untyped_storage().data_ptr() for tensor in tensors.values()}) == len(tensors)
    size = sum(tensor.numel() * tensor.element_size() for tensor in tensors.values())
    # room for names and alignment, but not for a second copy
    assert written.stat().st_size < size + 500 * len(tensors)


def test_the_unused_decoder_is_silent_and_finite(written):
    tensors = {name: tensor for name, tensor in read(written).items() if "encodec.decoder." in name}
    convolutions = [name for name in tensors if name.endswith("weight_v")]
    assert len(convolutions) == 2 + 4 * 4  # first, last, and four in each of four stages
    for name in convolutions:
        direction, gain = tensors[name], tensors[name.replace("weight_v", "weight_g")]
        weight = gain * direction / direction.norm(dim=(1, 2), keepdim=True)  # weight norm's definition
        assert (weight == 0).all()


@pytest.mark.slow  # discriminators are larger than the model
def test_discriminators_round_trip(small, tmp_path):
    manifest = json.loads((REFERENCE / "manifest_discriminators.json").read_text())
    tensors = {name: torch.full(shape, float(number)) for number, (name, shape) in enumerate(manifest.items(), 1)}
    folder = tmp_path / "codec"
    folder.mkdir()
    for file in small.iterdir():
        (folder / file.name).symlink_to(file)
    save_file(
        {
            name.replace(".weight_g", ".parametrizations.weight.original0").replace(
                ".weight_v", ".parametrizations.weight.original1"
            ): tensor
            for name, tensor in tensors.items()
        },
        folder / "discriminators.safetensors",
    )
    checkpoint = to_original(folder, tmp_path / "back")
    back = read(checkpoint)
    assert [name for name, tensor in tensors.items() if not same_bits(back[name], tensor)] == []
    again = convert(checkpoint, tmp_path / "again", with_discriminators=True)
    expected = (folder / "discriminators.safetensors").read_bytes()
    assert (again / "discriminators.safetensors").read_bytes() == expected


def test_weights_in_bfloat16_become_float32_of_the_same_value(small, tmp_path):
    model = WavTokenizerModel.from_pretrained(small, dtype=torch.bfloat16)
    model.save_pretrained(tmp_path / "half")
    back = read(to_original(tmp_path / "half", tmp_path / "back"))
    assert model.head.linear.weight.dtype == torch.bfloat16
    assert torch.equal(back["head.out.weight"], model.head.linear.weight.float())


@pytest.mark.parametrize(
    ("field", "value"), [("hidden_size", 256), ("kernel_size", 5), ("num_lstm_layers", 1), ("norm_eps", 1e-5)]
)
def test_a_shape_that_the_reference_implementation_cannot_build_is_refused(field, value, tmp_path):
    fields = {**FIELDS, field: value}
    if field == "hidden_size":
        fields["codebook_dim"] = value
    WavTokenizerModel(WavTokenizerConfig(**fields)).save_pretrained(tmp_path / "codec")
    with pytest.raises(ValueError, match=f"Got {field}={value}; the reference implementation hard-codes"):
        to_original(tmp_path / "codec", tmp_path / "back")
    assert os.listdir(tmp_path) == ["codec"]


def test_the_command_line_writes_the_same_files(small, written, tmp_path, capsys):
    assert command_line(["convert", "--to-original", str(small), "--output", str(tmp_path / "files"), "--json"]) == 0
    assert json.loads(capsys.readouterr().out) == {"output": str(tmp_path / "files" / written.name)}
    assert {path.name for path in (tmp_path / "files").iterdir()} == {written.name, written.with_suffix(".yaml").name}
    expected = read(written)
    assert all(same_bits(tensor, expected[name]) for name, tensor in read(tmp_path / "files" / written.name).items())
    refused = ["convert", "--to-original", str(small), "--average", "--output", str(tmp_path / "other")]
    assert command_line(refused) == 2 and "Got --average with --to-original" in capsys.readouterr().err


def test_a_folder_without_a_model_is_refused_in_one_line(tmp_path, capsys):
    assert main([str(tmp_path), "--output", str(tmp_path / "back")]) == 2
    assert capsys.readouterr().err.startswith(f"error: {tmp_path} has no config.json")


@pytest.mark.parametrize("name", ["model.safetensors", "discriminators.safetensors"])
def test_a_damaged_file_is_refused_in_one_line(name, small, tmp_path, capsys):
    folder = tmp_path / "codec"
    shutil.copytree(small, folder)
    (folder / name).write_bytes((small / "model.safetensors").read_bytes()[:-100])
    assert main([str(folder), "--output", str(tmp_path / "back")]) == 2
    error = capsys.readouterr().err.splitlines()[-1]  # after transformers' progress bars
    assert error.startswith(f"error: The weights in {folder} cannot be read") and "again" in error
    assert os.listdir(tmp_path) == ["codec"]


def test_an_existing_output_is_left_alone(small, tmp_path, capsys):
    (tmp_path / "mine").write_text("mine")
    assert main([str(small), "--output", str(tmp_path)]) == 2
    assert "exists and is not an empty folder" in capsys.readouterr().err
    assert os.listdir(tmp_path) == ["mine"]


@pytest.mark.slow
@pytest.mark.skipif(
    "WAVTOKENIZER_ORIGINAL" not in os.environ, reason="set it to a checkout of jishengpeng/WavTokenizer"
)
def test_the_reference_implementation_loads_the_files_and_gives_its_codes(back, rate, monkeypatch):
    monkeypatch.syspath_prepend(ROOT / "benchmarks")
    import formula
    from original import encode, load_original

    checkout = os.environ["WAVTOKENIZER_ORIGINAL"]
    checkpoint = back(rate)
    load_original(checkout, rate, read(checkpoint))  # also imports it
    original = sys.modules["decoder.pretrained"].WavTokenizer
    model = original.from_pretrained0802(str(checkpoint.with_suffix(".yaml")), str(checkpoint))
    golden = np.load(REFERENCE / f"chirp_1.37_{rate}.npz")
    codes = encode(model, torch.from_numpy(formula.waveform("chirp", 1.37))[None]).numpy()
    clear = golden["margin"] > 1e-6
    np.testing.assert_array_equal(codes[0, clear], golden["codes"][0, clear])
    assert CODEBOOK + "embed" in model.state_dict()


@pytest.mark.slow
@pytest.mark.skipif("LLAMA_CPP" not in os.environ, reason="set it to a checkout of ggml-org/llama.cpp")
def test_llama_cpps_converters_produce_gguf_from_the_written_file(back):
    """
    The commands are those of docs/onnx.md. llama.cpp's own reader confirms that every tensor of the result is one of
    the model.
    """
    checkout, checkpoint = Path(os.environ["LLAMA_CPP"]), back(75)
    gguf = checkpoint.parent / "wavtokenizer.gguf"
    for command in (
        ["tools/tts/convert_pt_to_hf.py", checkpoint],
        ["convert_hf_to_gguf.py", checkpoint.parent, "--outfile", gguf, "--outtype", "f32"],
    ):
        subprocess.run([sys.executable, checkout / command[0], *command[1:]], check=True)
    script = (
        "import gguf, hashlib, sys; "
        "print(*(hashlib.sha256(t.data).hexdigest() for t in gguf.GGUFReader(sys.argv[1]).tensors))"
    )
    run = subprocess.run(
        [sys.executable, "-c", script, gguf],
        env={
            **os.environ,
            "PYTHONPATH": os.pathsep.join([str(checkout / "gguf-py"), os.environ.get("PYTHONPATH", "")]),
        },
        capture_output=True,
        check=True,
        text=True,
    )
    # llama.cpp uses the first row of norms with one row per bandwidth, as decoding does
    tensors = [
        part for tensor in read(checkpoint).values() for part in (tensor, tensor[0] if tensor.ndim == 2 else tensor)
    ]
    expected = {hashlib.sha256(tensor.numpy().tobytes()).hexdigest() for tensor in tensors}
    written = run.stdout.split()
    assert len(written) == 161 and set(written) <= expected
