"""Damaged and malicious files are refused in one line, before they take memory, and no code in them is executed."""

import argparse
import collections
import io
import json
import os
import pathlib
import pickle
import struct
import subprocess
import sys
import time
import tracemalloc
import zipfile
from contextlib import contextmanager

import numpy as np
import pytest
import safetensors.torch
import torch
from huggingface_hub.errors import StrictDataclassError
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.numpy import save as save_numpy
from test_checkpoints import small_tensors

from wavtokenizer_hf import (
    WavTokenizerConfig,
    WavTokenizerEncoderModel,
    WavTokenizerFeatureExtractor,
    WavTokenizerModel,
)
from wavtokenizer_hf.cli import main
from wavtokenizer_hf.conversion.checkpoint import read_checkpoint, read_yaml
from wavtokenizer_hf.conversion.from_original import convert, load
from wavtokenizer_hf.limited_files import (
    check_archive,
    parse_json,
    parse_npy,
    parse_safetensors_header,
    parse_yaml,
    read_json_object,
)
from wavtokenizer_hf.loading import load_feature_extractor, load_model
from wavtokenizer_hf.token_file import TokenFile, bare_codes_from_bytes, load_bare_codes


pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture
def model_folder(tiny_model, tmp_path_factory):
    folder = tmp_path_factory.mktemp("model")
    tiny_model.save_pretrained(folder)
    WavTokenizerFeatureExtractor(hop_length=16).save_pretrained(folder)
    return folder


TRACED = 8  # tracemalloc slows Python down by this factor: nested brackets take 0.61 s with it, 0.08 s without


@contextmanager
def within(seconds: float, megabytes: float):
    """Fail if the block takes more processor time of this process, or more memory of Python and numpy."""
    tracemalloc.start()
    started = time.process_time()
    try:
        yield
    finally:
        used, (_, peak) = time.process_time() - started, tracemalloc.get_traced_memory()
        tracemalloc.stop()
    assert used < TRACED * seconds and peak < megabytes * 2**20, f"{used:.2f} s, {peak / 2**20:.0f} MB"


def refused(error: pytest.ExceptionInfo) -> None:
    assert "\n" not in str(error.value) and len(str(error.value)) < 800


# ---------------------------------------------------------------------------------------------------------------------
# Token files
# ---------------------------------------------------------------------------------------------------------------------


TOKENS = TokenFile(np.arange(60), "model", "fingerprint", 24000, 16, 953)


def json_tokens(**changes) -> bytes:
    return json.dumps({**json.loads(TOKENS.to_bytes("json")), **changes}).encode()


def safetensors_tokens(header: dict | bytes, data: bytes = b"") -> bytes:
    header = header if isinstance(header, bytes) else json.dumps(header).encode()
    return struct.pack("<Q", len(header)) + header + data


def npy(header: str, data: bytes = b"") -> bytes:
    header = header.encode() + b"\n"
    return b"\x93NUMPY\x01\x00" + struct.pack("<H", len(header)) + header + data


def npz() -> bytes:
    buffer = io.BytesIO()
    np.savez(buffer, np.arange(3))
    return buffer.getvalue()


ENTRY = {"dtype": "U16", "shape": [3], "data_offsets": [0, 6]}
HOSTILE_TOKENS = {
    "infinite number of samples": ("json", json_tokens(num_samples=float("inf"))),
    "infinite hop": ("json", json_tokens(hop_length=float("inf"))),
    "a hop of 1e999": ("json", json_tokens().replace(b'"hop_length": 16', b'"hop_length": 1e999')),
    "not a number": ("json", json_tokens(sampling_rate=float("nan"))),
    "half a sample": ("json", json_tokens(num_samples=953.5)),
    "a boolean": ("json", json_tokens(hop_length=True)),
    "a rate of 10**4000": ("json", json_tokens(sampling_rate=10**4000)),
    "a rate of 10**5000": ("json", json_tokens().replace(b": 24000", b": 1" + b"0" * 5000)),
    "codes beyond 64 bits": ("json", json_tokens(audio_codes=[2**70])),
    "codes in lists": ("json", json_tokens(audio_codes=[[1], [2]])),
    "no codes": ("json", json_tokens(audio_codes=None)),
    "a list": ("json", b"[1, 2, 3]"),
    "brackets nested deep": ("json", b'{"audio_codes": ' + b"[" * 100_000 + b"]" * 100_000 + b"}"),
    "brackets without end": ("json", b"[" * 3_000_000),
    "a name of numbers": ("json", json_tokens(model=7)),
    "no text": ("json", b'{"model": "\xff\xfe"}'),
    "a header of 2**60 bytes": ("safetensors", struct.pack("<Q", 2**60) + b"{}"),
    "a shape of 7 TB": ("safetensors", safetensors_tokens({"audio_codes": {**ENTRY, "shape": [2**42]}}, bytes(6))),
    "a negative shape": ("safetensors", safetensors_tokens({"audio_codes": {**ENTRY, "shape": [-3]}}, bytes(6))),
    "more data than promised": ("safetensors", safetensors_tokens({"audio_codes": ENTRY}, bytes(600))),
    "an entry that is no object": ("safetensors", safetensors_tokens({"audio_codes": 3}, bytes(6))),
    "an unknown type": ("safetensors", safetensors_tokens({"audio_codes": {**ENTRY, "dtype": "X9"}}, bytes(6))),
    "floats": ("safetensors", safetensors_tokens({"audio_codes": {**ENTRY, "dtype": "F16"}}, bytes(6))),
    "no metadata": ("safetensors", safetensors_tokens({"audio_codes": ENTRY}, bytes(6))),
    "a header nested deep": ("safetensors", safetensors_tokens(b"[" * 50_000)),
    "objects": ("npy", npy("{'descr': '|O', 'fortran_order': False, 'shape': (1,), }", pickle.dumps([1]))),
    "structures": ("npy", npy("{'descr': [('a', '<i4')], 'fortran_order': False, 'shape': (1,), }", bytes(4))),
    "an array of 7 TB": ("npy", npy("{'descr': '<i8', 'fortran_order': False, 'shape': (999999999999,), }")),
    "an array of -1": ("npy", npy("{'descr': '<i8', 'fortran_order': False, 'shape': (-1,), }", bytes(8))),
    "a header that is no dictionary": ("npy", npy("(" * 4000)),
    "a zip archive": ("npy", npz()),
    "negative codes": ("npy", npy("{'descr': '<i8', 'fortran_order': False, 'shape': (1,), }", b"\xff" * 8)),
    "numbers beyond 64 bits": ("txt", b"1 2 99999999999999999999"),
    "a number of a million digits": ("txt", b"9" * 10**6),
    "words": ("txt", b"one two"),
    "zeros": ("txt", bytes(1000)),
}


@pytest.mark.parametrize("case", HOSTILE_TOKENS)
def test_a_hostile_token_file_is_refused_in_one_line(case, tmp_path):
    format, content = HOSTILE_TOKENS[case]
    path = tmp_path / f"tokens.{format}"
    path.write_bytes(content)
    read = TokenFile.load if format in ("json", "safetensors") else load_bare_codes
    with within(seconds=1, megabytes=200), pytest.raises(ValueError, match=r"tokens\.") as error:
        read(path)
    refused(error)


def test_a_folder_of_hostile_token_files_gives_one_reason_each_and_no_audio(model_folder, tmp_path, capsys):
    folder = tmp_path / "tokens"
    folder.mkdir()
    for number, (format, content) in enumerate(HOSTILE_TOKENS.values()):
        (folder / f"{number}.{format}").write_bytes(content)
    assert main(["decode", str(folder), "-m", str(model_folder), "-o", str(tmp_path / "out")]) == 1
    said = [line for line in capsys.readouterr().err.splitlines() if ": failed: " in line]
    assert len(said) == len(HOSTILE_TOKENS) and all(len(line) < 800 for line in said)
    assert not [path for path in (tmp_path / "out").rglob("*") if path.is_file()]


@pytest.mark.parametrize("field", ["sampling_rate", "hop_length"])
def test_tokens_of_another_rate_are_refused(field, model_folder, tiny_model, tmp_path, capsys):
    fields = {"model": "m", "codebook_fingerprint": tiny_model.codebook_fingerprint, "num_samples": 16}
    changed = {"sampling_rate": 24000, "hop_length": 16, field: 44100 if field == "sampling_rate" else 32}
    TokenFile(np.array([1]), **fields, **changed).save(tmp_path / "tokens.json")
    assert main(["decode", str(tmp_path / "tokens.json"), "-m", str(model_folder), "-o", str(tmp_path / "x.wav")]) == 2
    assert f"The tokens have {field}={changed[field]}" in capsys.readouterr().err


def test_a_code_beyond_the_codebook_is_refused(model_folder, tmp_path, capsys):
    (tmp_path / "tokens.txt").write_text("1\n64\n")  # the tiny model has 64 entries
    assert main(["decode", str(tmp_path / "tokens.txt"), "-m", str(model_folder), "-o", str(tmp_path / "x.wav")]) == 2
    assert "64" in capsys.readouterr().err and not (tmp_path / "x.wav").exists()


def test_a_sparse_file_of_7_tb_is_refused_by_its_size(model_folder, tmp_path, capsys):
    path = tmp_path / "tokens.json"
    with path.open("wb") as file:
        file.truncate(7 * 10**12)
    assert main(["decode", str(path), "-m", str(model_folder), "-o", str(tmp_path / "x.wav")]) == 2
    assert "it has 7000000000000 bytes" in capsys.readouterr().err


@pytest.mark.parametrize("start", [b"\0", b"1", b"{"])
def test_an_endless_stream_is_refused(start, model_folder, tmp_path, capsys, monkeypatch):
    class Endless(io.RawIOBase):
        def readable(self):
            return True

        def readinto(self, buffer):
            buffer[:] = start * len(buffer)
            return len(buffer)

    monkeypatch.setattr("wavtokenizer_hf.token_file.MAX_BYTES", 2**22)
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BufferedReader(Endless())))
    with within(seconds=60, megabytes=200):
        assert main(["decode", "-", "-m", str(model_folder), "-o", str(tmp_path / "x.wav")]) == 2
    assert "standard input: " in capsys.readouterr().err and os.listdir(tmp_path) == []


# ---------------------------------------------------------------------------------------------------------------------
# Models
# ---------------------------------------------------------------------------------------------------------------------


def change_tensor(change):
    def damage(folder):
        tensors = safetensors.torch.load_file(folder / "model.safetensors")
        name = next(name for name in tensors if name.endswith("codebook.embed"))
        tensors[name] = change(tensors[name].clone())
        safetensors.torch.save_file(tensors, folder / "model.safetensors", {"format": "pt"})

    return damage


def change_config(**changes):
    def damage(folder):
        config = json.loads((folder / "config.json").read_text())
        (folder / "config.json").write_text(json.dumps({**config, **changes}))

    return damage


def write(name, content):
    return lambda folder: (folder / name).write_bytes(content)


def cut(folder):
    path = folder / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-1])


def one_nan(tensor):
    tensor[3, 5] = float("nan")
    return tensor


HOSTILE_MODELS = {
    "a number that is none": (change_tensor(one_nan), "1 of the 1024 numbers of .*embed are NaN or infinite"),
    "infinite numbers": (change_tensor(lambda tensor: tensor / 0), "are NaN or infinite"),
    "integers": (change_tensor(lambda tensor: (100 * tensor).int()), "holds numbers of type I32, expected floats"),
    "another shape": (change_tensor(lambda tensor: tensor[:50].contiguous()), r"has the shape \(50, 16\), and "
    r"config.json"),
    "a cut file": (cut, "damaged or truncated"),
    "a header of 2**60 bytes": (write("model.safetensors", struct.pack("<Q", 2**60) + b"{}"), "a header of"),
    "10**9 layers of an LSTM": (change_config(num_lstm_layers=10**9), "num_lstm_layers=1000000000, expected at most"),
    "500 layers of an LSTM": (change_config(num_lstm_layers=500), "num_lstm_layers=500, and the weights hold"),
    "10**9 blocks": (change_config(decoder_num_layers=10**9), "decoder_num_layers=1000000000, expected at most"),
    "a width of 10**12": (change_config(hidden_size=10**12, codebook_dim=10**12), "expected at most"),
    "a rate of 10**23": (change_config(sampling_rate=10**23), "sampling_rate=10+, expected at most 768000"),
    "10**4 ratios": (change_config(upsampling_ratios=[2] * 10**4), "expected 1 to 16 positive integers"),
    "a config that is a list": (write("config.json", b"[1]"), "holds a list, expected a JSON object"),
    "a config nested deep": (write("config.json", b'{"a":' * 2000 + b"1" + b"}" * 2000), "nested more than 100 deep"),
    "a config of 2 MB": (write("config.json", b" " * 2**21 + b"{}"), "bytes or more, expected at most"),
    "an extractor that is a list": (write("preprocessor_config.json", b"[1]"), "holds a list, expected a JSON object"),
    "an extractor nested deep": (write("preprocessor_config.json", b"[" * 1000 + b"]" * 1000), "nested more than 100 "
    "deep"),
    "an extractor of text": (write("preprocessor_config.json", b'{"sampling_rate": "fast"}'), "feature "
    "extractor|fast"),
}  # fmt: skip


@pytest.mark.parametrize("case", HOSTILE_MODELS)
def test_a_hostile_model_is_refused_in_one_line(case, model_folder):
    damage, message = HOSTILE_MODELS[case]
    damage(model_folder)
    model_class = WavTokenizerEncoderModel if "number" in case else WavTokenizerModel
    with pytest.raises(ValueError, match=message) as error:
        load_feature_extractor(model_folder, None, load_model(model_class, model_folder).config)
    refused(error)
    assert str(model_folder) in str(error.value)


def test_encode_with_a_hostile_model_returns_exit_code_2(model_folder, tmp_path, capsys):
    change_tensor(one_nan)(model_folder)
    (tmp_path / "a.wav").write_bytes(b"")  # the model is refused before any file is opened
    assert main(["encode", str(tmp_path / "a.wav"), "-m", str(model_folder), "-o", str(tmp_path / "x.json")]) == 2
    assert "are NaN or infinite" in capsys.readouterr().err


def test_shards_and_half_precision_still_load(model_folder, tiny_model, tmp_path):
    tiny_model.to(torch.bfloat16).save_pretrained(tmp_path / "shards", max_shard_size="20KB")
    assert len(list((tmp_path / "shards").glob("*.safetensors"))) > 1
    assert load_model(WavTokenizerModel, tmp_path / "shards").codebook_fingerprint
    index = tmp_path / "shards" / "model.safetensors.index.json"
    content = json.loads(index.read_text())
    content["weight_map"] = dict.fromkeys(content["weight_map"], "../outside.safetensors")
    index.write_text(json.dumps(content))
    with pytest.raises(ValueError, match="expected files beside it"):
        load_model(WavTokenizerModel, tmp_path / "shards")


# ---------------------------------------------------------------------------------------------------------------------
# Checkpoints
# ---------------------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def tensors():
    return small_tensors(75)


@pytest.fixture(scope="module")
def expected(tensors, tmp_path_factory):
    """Return the weights of the plain checkpoint."""
    path = tmp_path_factory.mktemp("plain") / "plain.ckpt"
    torch.save({"state_dict": tensors}, path)
    return load(path).state_dict()


def prefixed(tensors, prefix):
    return {prefix + name: tensor for name, tensor in tensors.items()}


def wrapped_names(tensors):
    """Return the tensors with names as torch.compile and DDP write them around single modules."""
    return {name.replace("backbone.", "backbone._orig_mod.module."): tensor for name, tensor in tensors.items()}


def shifted(tensors):
    return {name: tensor + 1 for name, tensor in tensors.items()}


WRAPPED = {
    "DDP": (lambda t: {"state_dict": prefixed(t, "module.")}, "names: module."),
    "torch.compile": (lambda t: prefixed(t, "_orig_mod."), "names: _orig_mod."),
    "Fabric": (lambda t: {"state_dict": prefixed(t, "_forward_module.")}, "names: _forward_module."),
    "nested": (lambda t: {"model": prefixed(t, "_forward_module.module._orig_mod.")}, "names: _forward_module."),
    "inside": (lambda t: {"state_dict": wrapped_names(t)}, "names: _orig_mod."),
    "DeepSpeed": (lambda t: {"module": t, "optimizer": None}, "taken from 'module'"),
    "a plain loop": (lambda t: {"model": t, "epoch": 3}, "taken from 'model'"),
    "a leading model.": (lambda t: {"state_dict": prefixed(t, "model.")}, "names: model."),
    "an average beside": (lambda t: {"state_dict": t, "ema_state_dict": shifted(t)}, "dropped: ema_state_dict"),
    "an average among": (lambda t: {**t, **prefixed(shifted(t), "ema.")}, "of an averaged copy (EMA) beside"),
    "an average alone": (lambda t: {"ema": t, "step": 1}, "taken from 'ema'"),
    "AveragedModel": (lambda t: {**prefixed(t, "module."), "n_averaged": torch.tensor(3)}, "n_averaged"),
}


@pytest.mark.parametrize("case", WRAPPED)
def test_wrapper_prefixes_are_removed_from_names_and_reported(case, tensors, expected, tmp_path, capsys):
    wrap, said = WRAPPED[case]
    torch.save(wrap(tensors), tmp_path / "wrapped.ckpt")
    convert(tmp_path / "wrapped.ckpt", tmp_path / "out")
    assert said in capsys.readouterr().out
    converted = safetensors.torch.load_file(tmp_path / "out" / "model.safetensors")
    assert all(torch.equal(tensor, expected[name]) for name, tensor in converted.items())


def test_two_different_tensors_of_the_same_name_are_refused(tensors, tmp_path):
    torch.save({**tensors, **prefixed(shifted(tensors), "module.")}, tmp_path / "twice.ckpt")
    with pytest.raises(ValueError, match="holds two different tensors for") as error:
        convert(tmp_path / "twice.ckpt", tmp_path / "out")
    refused(error)


HARMLESS = {
    "numpy scalars": {"loss": np.float32(0.5), "steps": np.int64(3), "flag": np.bool_(True)},
    "numpy arrays": {"history": np.arange(5), "words": np.array(["a"])},
    "paths": {"output": pathlib.PurePosixPath("/x"), "here": pathlib.Path("x")},
    "a namespace": argparse.Namespace(lr=1e-4, path=pathlib.Path("x"), values=np.ones(3)),
    "sets": {"names": {"a", "b"}, "frozen": frozenset([1])},
    "defaultdicts": collections.defaultdict(list, a=[1], b=[2]),
    "counters": collections.Counter("abc"),
}


@pytest.mark.parametrize("zipped", [True, False])
@pytest.mark.parametrize("case", HARMLESS)
def test_harmless_values_beside_the_weights_are_skipped(case, zipped, tmp_path):
    content = {"state_dict": {"head.out.bias": torch.ones(3)}, "hyper_parameters": HARMLESS[case]}
    torch.save(content, tmp_path / "x.ckpt", _use_new_zipfile_serialization=zipped)
    checkpoint = read_checkpoint(tmp_path / "x.ckpt")
    assert torch.equal(checkpoint.tensors["head.out.bias"], torch.ones(3))
    assert checkpoint.others == ["hyper_parameters"]


class Calls:
    """An object whose pickle calls a function."""

    def __init__(self, function, *arguments):
        self.call = function, arguments

    def __reduce__(self):
        return self.call


@pytest.mark.parametrize(
    ("function", "arguments"),
    [
        (os.mkdir, ("executed",)),
        (eval, ("__import__('os').mkdir('executed')",)),
        (pathlib.Path.mkdir, (pathlib.Path("executed"),)),
        (np.save, ("executed", [1])),
        (getattr, ("text", "upper")),
    ],
)
def test_globals_not_on_the_allow_list_are_refused_and_not_executed(function, arguments, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for beside in (Calls(function, *arguments), {"a": {Calls(function, *arguments)}, "b": np.float32(1)}):
        torch.save({"state_dict": {"head.out.bias": torch.ones(3)}, "extra": beside}, "trap.ckpt")
        with pytest.raises(ValueError, match=r"[Nn]othing (in it )?was executed") as error:
            read_checkpoint(tmp_path / "trap.ckpt")
        refused(error)
        assert os.listdir(tmp_path) == ["trap.ckpt"]


def test_an_array_that_claims_terabytes_beside_the_weights_takes_no_memory(tmp_path):
    content = {"state_dict": {"head.out.bias": torch.ones(3)}, "extra": Calls(np.ndarray, (10**12,))}
    torch.save(content, tmp_path / "x.ckpt")
    with within(seconds=2, megabytes=50):
        assert read_checkpoint(tmp_path / "x.ckpt").others == ["extra"]


def rewrite(path, change):
    """Write the members of an archive again."""
    with zipfile.ZipFile(path) as archive:
        members = [(info.filename, archive.read(info)) for info in archive.infolist()]
    with zipfile.ZipFile(path, "w") as archive:
        for name, content in members:
            change(archive, name, content)


def zip_bomb(path):
    def bomb(archive, name, content):
        content = content + bytes(60 * 2**20) if name.endswith("/data/0") else content
        archive.writestr(name, content, zipfile.ZIP_DEFLATED)

    rewrite(path, bomb)


def deflated_pickle(path):
    rewrite(
        path,
        lambda archive, name, content: archive.writestr(
            name, content, zipfile.ZIP_DEFLATED if name.endswith("data.pkl") else zipfile.ZIP_STORED
        ),
    )


def same_bytes_many_times(path):
    """Give one member 51 entries, as in an overlapping zip bomb."""
    with zipfile.ZipFile(path, "a") as archive:
        archive.filelist += 50 * [info for info in archive.infolist() if info.filename.endswith("/data/0")]
        archive.writestr("last", b"")  # so that the directory of members is written again


@pytest.mark.parametrize("damage", [zip_bomb, deflated_pickle, same_bytes_many_times])
def test_a_decompression_bomb_is_refused_before_it_is_unpacked(damage, tmp_path):
    path = tmp_path / "bomb.ckpt"
    torch.save({"state_dict": {"head.out.bias": torch.ones(30_000)}}, path)
    damage(path)
    with within(seconds=2, megabytes=50), pytest.raises(ValueError, match=r"compress|promise more bytes") as error:
        read_checkpoint(path)
    refused(error)


def test_an_expanded_tensor_is_refused_before_it_is_copied(tensors, tmp_path):
    name = "feature_extractor.encodec.quantizer.vq.layers.0._codebook.embed"
    torch.save({"state_dict": {**tensors, name: torch.ones(1, 1).expand(10**7, 512)}}, tmp_path / "expanded.ckpt")
    with within(seconds=2, megabytes=50), pytest.raises(ValueError, match="which needs 20480000000 bytes") as error:
        convert(tmp_path / "expanded.ckpt", tmp_path / "out")
    refused(error)


def test_a_tensor_without_values_is_refused(tmp_path):
    torch.save({"state_dict": {"head.out.bias": torch.ones(3, device="meta")}}, tmp_path / "meta.ckpt")
    with pytest.raises(ValueError, match=r"without its values|cannot be read"):
        read_checkpoint(tmp_path / "meta.ckpt")


# ---------------------------------------------------------------------------------------------------------------------
# YAML
# ---------------------------------------------------------------------------------------------------------------------


def billion_laughs(make_line) -> bytes:
    lines = ["a0: &a0 [ha, ha]" if make_line is list_line else "a0: &a0 {x: ha}"]
    return "\n".join([*lines, *(make_line(number) for number in range(1, 40)), "model: *a39"]).encode()


def list_line(number):
    return f"a{number}: &a{number} [{', '.join([f'*a{number - 1}'] * 9)}]"


def merge_line(number):
    return f"a{number}: &a{number} {{<<: [{', '.join([f'*a{number - 1}'] * 9)}], k{number}: 1}}"


HOSTILE_YAML = {
    "lists that multiply": (billion_laughs(list_line), "aliases"),
    "merges that multiply": (billion_laughs(merge_line), "aliases"),
    "an anchor in itself": (b"model: &a [*a]", "contains itself"),
    "brackets": (b"model: " + b"[" * 20_000, "nested|YAML"),
    "blocks": ("\n".join(" " * depth + "a:" for depth in range(400)).encode(), "nested|YAML"),
    "100 kB": (b"# " + b"x" * 100_000, "bytes or more"),
    "a call": (b"model: !!python/object/apply:os.mkdir [executed]", "could not determine a constructor"),
    "a date that is none": (b"model: 2001-99-99", "month"),
    "a number of 5000 digits": (b"model: " + b"9" * 5000, "."),
    "no text": (b"\xff\xfe\x00", "."),
}


@pytest.mark.parametrize("case", HOSTILE_YAML)
def test_hostile_yaml_is_refused_in_one_line(case, tmp_path, monkeypatch):
    content, message = HOSTILE_YAML[case]
    monkeypatch.chdir(tmp_path)
    (tmp_path / "x.yaml").write_bytes(content)
    with within(seconds=3, megabytes=100), pytest.raises(ValueError, match=message) as error:
        read_yaml(tmp_path / "x.yaml")
    refused(error)
    assert os.listdir(tmp_path) == ["x.yaml"]


@pytest.mark.parametrize(
    "rate", ["1" + "0" * 23, "0", "999", "768001", "24000.5", "true", "[24000]", "0x" + "f" * 9000]
)
def test_an_impossible_yaml_sampling_rate_is_refused(rate, tensors, tmp_path):
    torch.save({"state_dict": tensors}, tmp_path / "x.ckpt")
    part = "{init_args: {}}"
    (tmp_path / "x.yaml").write_text(
        f"model: {{init_args: {{sample_rate: {rate}, feature_extractor: {part}, backbone: {part}, head: {part}}}}}"
    )
    with pytest.raises(ValueError, match="expected Hz from 1000 to 768000") as error:
        convert(tmp_path / "x.ckpt", tmp_path / "out", tmp_path / "x.yaml")
    refused(error)


def test_aliases_that_do_not_multiply_are_read():
    assert parse_yaml(b"a: &a {x: 1}\nb: [*a, *a]\nc: {<<: *a, y: 2}") == {
        "a": {"x": 1},
        "b": [{"x": 1}, {"x": 1}],
        "c": {"x": 1, "y": 2},
    }


# ---------------------------------------------------------------------------------------------------------------------
# Mutated files
# ---------------------------------------------------------------------------------------------------------------------


def _checkpoint_bytes(tensors=None, zipped=True) -> bytes:
    buffer = io.BytesIO()
    content = {"state_dict": tensors or {"head.out.bias": torch.ones(30)}, "epoch": 3, "args": argparse.Namespace(a=1)}
    torch.save(content, buffer, _use_new_zipfile_serialization=zipped)
    return buffer.getvalue()


def _read_checkpoint(content: bytes, path: pathlib.Path) -> None:
    path.write_bytes(content)
    read_checkpoint(path)


def _read_config(content: bytes, path: pathlib.Path) -> None:
    path.write_bytes(content)
    fields = read_json_object(path)
    WavTokenizerConfig(**{name: value for name, value in fields.items() if name in WavTokenizerConfig.__annotations__})


def _check_archive(content: bytes, path: pathlib.Path) -> None:
    path.write_bytes(content)
    check_archive(path)


YAML = (pathlib.Path(__file__).parent.parent / "wavtokenizer_hf" / "training" / "recipes").glob("*.yaml")
READERS = {
    "JSON": (TOKENS.to_bytes("json"), lambda content, path: parse_json(content)),
    "tokens as JSON": (TOKENS.to_bytes("json"), lambda content, path: TokenFile.from_bytes(content, "json")),
    "tokens as safetensors": (
        TOKENS.to_bytes("safetensors"),
        lambda content, path: TokenFile.from_bytes(content, "safetensors"),
    ),
    "codes as npy": (TOKENS.to_bytes("npy"), lambda content, path: bare_codes_from_bytes(content, "npy")),
    "codes as text": (TOKENS.to_bytes("txt"), lambda content, path: bare_codes_from_bytes(content, "txt")),
    "npy": (
        npy("{'descr': '<f4', 'fortran_order': True, 'shape': (2, 3), }", bytes(24)),
        lambda c, path: parse_npy(c),
    ),
    "safetensors": (
        save_numpy({"a": np.ones((3, 4), np.float32), "b": np.zeros(5, np.int64)}, {"format": "pt"}),
        lambda content, path: parse_safetensors_header(content, len(content)),
    ),
    "YAML": (next(YAML).read_bytes(), lambda content, path: parse_yaml(content)),
    "YAML with aliases": (b"a: &a {x: 1}\nb: [*a, *a]\nc: {<<: *a, y: 2001-01-01}", lambda c, path: parse_yaml(c)),
    "config.json": (json.dumps(WavTokenizerConfig().to_dict()).encode(), _read_config),
    "archive": (_checkpoint_bytes(), _check_archive),
    "checkpoint": (_checkpoint_bytes(), _read_checkpoint),
    "checkpoint before torch 1.6": (_checkpoint_bytes(zipped=False), _read_checkpoint),
}

EDITS = st.lists(
    st.tuples(st.sampled_from(["flip", "cut", "insert"]), st.floats(0, 1), st.binary(min_size=1, max_size=8)),
    min_size=1,
    max_size=6,
)


def edited(content: bytes, edits) -> bytes:
    content = bytearray(content)
    for kind, share, noise in edits:
        position = int(share * len(content))
        if kind == "flip":
            content[position : position + len(noise)] = noise[: max(0, len(content) - position)]
        elif kind == "cut":
            del content[position : position + 1 + noise[0] ** 2 // 16]
        else:
            content[position:position] = noise
    return bytes(content)


def check_reader(kind: str, path: pathlib.Path, examples: int) -> None:
    content, read = READERS[kind]
    read(content, path)  # valid files are read

    @settings(
        max_examples=examples, derandomize=True, deadline=None, database=None, suppress_health_check=list(HealthCheck)
    )
    @given(EDITS)
    def fuzz(edits):
        with within(seconds=1, megabytes=200):
            assert "\n" not in answer(edited(content, edits))

    def answer(content: bytes) -> str:
        try:
            read(content, path)
        except (ValueError, StrictDataclassError) as error:  # the latter comes from the configuration
            return "" if isinstance(error, StrictDataclassError) else str(error)
        return ""

    fuzz()


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("kind", READERS)
def test_a_mutated_file_is_read_or_refused(kind, tmp_path):
    check_reader(kind, tmp_path / "x.ckpt", examples=40)


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("kind", READERS)
def test_thousands_of_mutated_files_are_read_or_refused(kind, tmp_path):
    check_reader(kind, tmp_path / "x.ckpt", examples=4000)


@pytest.mark.slow
def test_zeros_on_standard_input_take_no_memory(model_folder, tmp_path):
    line = f"{sys.executable} -m wavtokenizer_hf decode - -m {model_folder} -o {tmp_path}/x.wav < /dev/zero"
    done = subprocess.run(["sh", "-c", f"ulimit -v 8000000; {line}"], capture_output=True, text=True, timeout=300)
    assert done.returncode == 2 and "expected a safetensors file" in done.stderr
