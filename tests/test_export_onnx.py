"""ONNX files give the codes and the audio of the model, at any length, without torch."""

import errno
import importlib
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import soundfile
import torch
from conftest import REFERENCE, tiny_config

from wavtokenizer_hf import WavTokenizerModel, audio, bundled_model
from wavtokenizer_hf.cli import main
from wavtokenizer_hf.export import WavTokenizerOnnx, export_onnx, onnx_export
from wavtokenizer_hf.long_audio import DecodeStream
from wavtokenizer_hf.token_file import TokenFile


onnx = pytest.importorskip("onnx")
onnxruntime = pytest.importorskip("onnxruntime")
SPEECH = Path(__file__).parent.parent / "examples" / "speech.flac"
LENGTHS = (
    1,
    2,
    3,
    319,
    320,
    321,
    24_000,
    24_001,
    24_319,
    100_003,
    720_007,
)  # -(-T // 320) once came out a frame short at 24,001


@pytest.fixture(scope="module", autouse=True)
def _one_thread(one_thread):
    """Use one thread, also in onnxruntime: the test machine may be busy."""


@pytest.fixture(scope="module")
def bundled():
    return WavTokenizerModel.from_pretrained(bundled_model()).eval()


@pytest.fixture(scope="module")
def folder(bundled, tmp_path_factory):
    output = tmp_path_factory.mktemp("onnx") / "bundled"
    export_onnx(bundled, output, "bundled")
    return output


@pytest.fixture(scope="module")
def exported(folder):
    return WavTokenizerOnnx(folder, num_threads=1)


@pytest.fixture(scope="module")
def speech():
    """Return 30 s of speech."""
    return np.resize(audio.load(SPEECH, 24_000), 720_007)


@pytest.fixture
def short_signals(monkeypatch):
    """Compare exports of tiny models on short signals. The export of the bundled model is compared on 30 s."""
    real = onnx_export.check_signals
    monkeypatch.setattr(onnx_export, "check_signals", lambda rate: {k: v[:3000] for k, v in real(rate).items()})


def tiny(**changes) -> WavTokenizerModel:
    """Return a tiny model whose codebook entries are its own latents."""
    torch.manual_seed(0)
    model = WavTokenizerModel(tiny_config(**changes)).eval()
    with torch.no_grad():
        hop = model.config.hop_length
        latents = model.encode(torch.randn(1, 1, 64 * hop), output_latents=True).latents[0].T
        model.quantizer.codebook.embed.copy_(latents)
    return model


@torch.inference_mode()
def codes_of(model, samples: np.ndarray) -> np.ndarray:
    return model.encode(torch.from_numpy(samples)[None, None]).audio_codes.numpy()


@torch.inference_mode()
def audio_of(model, audio_codes: np.ndarray, **options) -> np.ndarray:
    return model.decode(torch.from_numpy(audio_codes), **options).audio_values.numpy()


# ---------------------------------------------------------------------------------------------------------------------
# Parity
# ---------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("length", LENGTHS)
def test_codes_and_audio_of_any_length_equal_the_models(bundled, exported, speech, length):
    expected = codes_of(bundled, speech[:length])
    found = exported.encode(speech[None, None, :length])
    assert found.audio_codes.shape == (1, 1, -(-length // 320)) and found.audio_codes.dtype == np.int64
    np.testing.assert_array_equal(found.audio_codes, expected)
    assert found.audio_codes_mask.all()
    decoded = exported.decode(expected).audio_values
    assert decoded.shape == (1, 1, expected.shape[-1] * 320) and decoded.dtype == np.float32
    np.testing.assert_allclose(decoded, audio_of(bundled, expected), atol=1e-5)  # float32 sums in a different order
    if length == LENGTHS[-1]:
        assert len(np.unique(expected)) > 100 and np.abs(decoded).max() > 0.1


@pytest.mark.slow  # half a minute for each rate
@pytest.mark.parametrize("name", ["chirp_1.37", "noise_0.5", "speechlike_3.0"])
def test_published_shapes_give_the_codes_and_audio_of_the_reference_implementation(models, rate, name, published):
    import formula

    golden = np.load(REFERENCE / f"{name}_{rate}.npz")
    kind, seconds = name.split("_")
    exported = published(rate)
    codes = exported.encode(formula.waveform(kind, float(seconds))[None, None]).audio_codes[0]
    clear = golden["margin"] > 1e-6
    assert clear.mean() > 0.99 and len(np.unique(golden["codes"])) > 10
    np.testing.assert_array_equal(codes[0, clear], golden["codes"][0, clear])
    decoded = exported.decode(golden["codes"][None].astype(np.int64)).audio_values[0, 0]
    np.testing.assert_allclose(decoded, golden["audio"], atol=1e-5)


@pytest.mark.slow
@pytest.mark.parametrize("length", [1, 319, 320, 24_000, 720_007])
def test_published_shapes_give_the_models_codes_at_any_length(models, rate, length, published, speech):
    samples, model = speech[:length], models(rate)
    found = published(rate).encode(samples[None, None]).audio_codes[0, 0]
    with torch.inference_mode():
        encoded = model.encode(torch.from_numpy(samples)[None, None], output_latents=True)
    expected, latents = encoded.audio_codes[0, 0].numpy(), encoded.latents[0].double().numpy()
    entries = model.encoder_model.quantizer.codebook.embed.double().numpy()
    assert found.shape == expected.shape == (-(-length // model.config.hop_length),)
    num_near_ties = onnx_export._count_near_ties(latents, entries, expected, found, "encoder.onnx")
    assert num_near_ties <= 0.001 * len(expected)


@pytest.fixture(scope="session")
def published(models, tmp_path_factory):
    """Return a function: rate -> exported model of that published shape. It is exported on first use."""
    parent, exported_models = tmp_path_factory.mktemp("published"), {}

    def exported(rate: int) -> WavTokenizerOnnx:
        if rate not in exported_models:
            report = export_onnx(models(rate), parent / str(rate), "golden")
            exported_models[rate] = WavTokenizerOnnx(parent / str(rate), num_threads=1)
            print(report)
            # the formula's entries are so close that the order of float32 sums decides some frames
            assert report.num_near_ties <= 0.001 * report.num_codes and report.max_audio_difference < 1e-5
        return exported_models[rate]

    return exported


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"num_residual_layers": 2, "upsampling_ratios": [3, 5]},  # dilation, odd strides and hop
        {"kernel_size": 3, "last_kernel_size": 1, "residual_kernel_size": 5, "upsampling_ratios": [2]},
        {"num_lstm_layers": 1, "upsampling_ratios": [7, 1, 4]},
    ],
    ids=["tiny", "dilated", "kernels", "one layer"],
)
def test_other_shapes_give_the_models_codes_whole_and_in_streams(changes, tmp_path, short_signals):
    model = tiny(**changes)
    export_onnx(model, tmp_path / "onnx", "tiny")  # compares the stream too
    exported = WavTokenizerOnnx(tmp_path / "onnx", num_threads=1)
    noise = np.random.default_rng(0).standard_normal(700).astype(np.float32)
    for length in (*range(1, 40), 699):
        expected = codes_of(model, noise[:length])
        np.testing.assert_array_equal(exported.encode(noise[None, None, :length]).audio_codes, expected)
        for block in (1, 7, 100):
            stream = exported.encode_stream()
            chunks = [stream.push(noise[start : min(start + block, length)]) for start in range(0, length, block)]
            np.testing.assert_array_equal(np.concatenate([*chunks, stream.flush()]), expected[0, 0])
    expected = audio_of(model, codes_of(model, noise))
    np.testing.assert_allclose(exported.decode(codes_of(model, noise)).audio_values, expected, atol=1e-5)


def test_a_stream_keeps_its_delay_and_gives_the_codes_of_the_whole_clip(bundled, exported, speech):
    samples = speech[:60_000]
    stream, codes = exported.encode_stream(), []
    for start in range(0, len(samples), 777):
        codes.append(stream.push(samples[start : start + 777]))
        seen = min(start + 777, len(samples))
        assert sum(map(len, codes)) >= (seen - stream.delay) // 320
    codes.append(stream.flush())
    np.testing.assert_array_equal(np.concatenate(codes), codes_of(bundled, samples)[0, 0])
    with pytest.raises(ValueError, match="flushed"):
        stream.push(samples)


def test_long_audio_is_encoded_in_chunks_with_the_codes_of_the_whole_clip(exported, speech, monkeypatch):
    whole = exported.encode(speech[None, None, :200_000]).audio_codes
    monkeypatch.setattr(exported.session("encoder"), "run", None)
    np.testing.assert_array_equal(exported.encode(speech[None, None, :200_000], chunk_seconds=1.3).audio_codes, whole)
    exported_above = exported.encode(np.resize(speech, 61 * 24_000)[None, None]).audio_codes
    np.testing.assert_array_equal(exported_above[..., :600], whole[..., :600])


def test_windowed_decoding_equals_the_models_streams(bundled, exported, speech):
    codes = codes_of(bundled, speech[:100_000])
    for window, overlap in ((1.0, 0.25), (0.5, 0.0), (100.0, 0.25)):
        stream = DecodeStream(bundled, window, overlap)
        expected = torch.cat([stream.push(torch.from_numpy(codes[0, 0])), stream.flush()]).numpy()
        found = exported.decode(codes, window_seconds=window, overlap_seconds=overlap).audio_values[0, 0]
        np.testing.assert_allclose(found, expected, atol=1e-5)
        stream = exported.decode_stream(window, overlap)
        chunks = [stream.push(codes[0, 0, start : start + 13]) for start in range(0, codes.shape[-1], 13)]
        np.testing.assert_array_equal(np.concatenate([*chunks, stream.flush()]), found)


def test_each_row_of_a_ragged_batch_gets_what_it_gets_alone(exported, speech):
    lengths = [1, 24_000, 7_777]
    batch, mask = np.zeros((3, 1, 24_000), np.float32), np.zeros((3, 24_000), np.int32)
    for row, length in enumerate(lengths):
        side = slice(24_000 - length, None) if row == 2 else slice(0, length)  # the last is padded on the left
        batch[row, 0, side], mask[row, side] = speech[row * 1000 : row * 1000 + length], 1
    encoded = exported.encode(batch, mask)
    decoded = exported.decode(encoded.audio_codes, encoded.audio_codes_mask).audio_values
    for row, length in enumerate(lengths):
        alone = exported.encode(speech[None, None, row * 1000 : row * 1000 + length]).audio_codes[0, 0]
        real = encoded.audio_codes_mask[row, 0]
        np.testing.assert_array_equal(encoded.audio_codes[row, 0, real], alone)
        assert (real[-1] and not real[0]) if row == 2 else real[0]
        samples = np.repeat(real, 320)
        np.testing.assert_array_equal(decoded[row, 0, samples], exported.decode(alone[None, None]).audio_values[0, 0])
        assert not decoded[row, 0, ~samples].any()


def test_batched_decoders_have_the_names_of_the_published_decoder(folder, exported, bundled):
    """`codes` (B, L) int64 -> `waveform` (B, L * hop) float32, as in onnx-community's decoder that OuteTTS loads."""
    session = exported.session("decoder")
    assert [(value.name, value.type) for value in session.get_inputs()] == [("codes", "tensor(int64)")]
    assert [(value.name, value.type) for value in session.get_outputs()] == [("waveform", "tensor(float)")]
    codes = np.random.default_rng(0).integers(0, bundled.config.codebook_size, (3, 20))
    (waveform,) = session.run(None, {"codes": codes})
    np.testing.assert_allclose(waveform, audio_of(bundled, codes[:, None])[:, 0], atol=1e-5)
    encoder = exported.session("encoder")
    assert [value.name for value in (*encoder.get_inputs(), *encoder.get_outputs())] == ["input_values", "audio_codes"]


@pytest.mark.slow
def test_openvino_gives_the_same_codes_and_audio_from_call_to_call(folder, exported, speech):
    """
    Also after a call with a single code. After such a call, OpenVINO 2026.4 computed attention as weights x values
    wrongly.
    """
    openvino = pytest.importorskip("openvino")
    core = openvino.Core()
    settings = {"INFERENCE_PRECISION_HINT": "f32", "INFERENCE_NUM_THREADS": 1}
    encoder, decoder = (
        core.compile_model(str(folder / f"{name}.onnx"), "CPU", settings) for name in ("encoder", "decoder")
    )
    for length in (1, 24_001, 319, 100_003):
        samples = speech[None, None, :length]
        codes = encoder([samples])[0]
        np.testing.assert_array_equal(codes, exported.encode(samples).audio_codes)
        expected = exported.decode(codes).audio_values[:, 0]
        np.testing.assert_allclose(decoder([codes[:, 0]])[0], expected, atol=1e-5)


# ---------------------------------------------------------------------------------------------------------------------
# Variants, metadata, output files
# ---------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "least_snr", "largest_share"),
    [({"dtype": "float16"}, 60, 0.55), ({"dtype": "int8"}, 35, 0.3), ({"quantize": "int8"}, 30, 0.7)],
    ids=["float16", "int8 weights", "int8 products"],
)
def test_smaller_decoders_report_their_snr_and_leave_the_encoder_alone(
    bundled, folder, tmp_path, options, least_snr, largest_share, monkeypatch, speech
):
    monkeypatch.setattr(onnx_export, "check_signals", lambda rate: {"speech": speech[:48_000]})
    report = export_onnx(bundled, tmp_path / "small", "bundled", **options)
    assert (tmp_path / "small" / "encoder.onnx").read_bytes() == (folder / "encoder.onnx").read_bytes()
    assert report.sizes["decoder.onnx"] < largest_share * (folder / "decoder.onnx").stat().st_size
    codes = codes_of(bundled, speech[:48_000])
    expected = audio_of(bundled, codes)
    difference = WavTokenizerOnnx(tmp_path / "small", num_threads=1).decode(codes).audio_values - expected
    snr = 10 * np.log10(np.square(expected).sum() / np.square(difference).sum())
    assert snr > least_snr and report.snr == pytest.approx(snr, abs=0.1)


def test_the_files_describe_themselves(folder, bundled):
    for name in ("encoder", "encoder_stream", "decoder"):
        model = onnx.load(folder / f"{name}.onnx")
        facts = {prop.key: prop.value for prop in model.metadata_props}
        assert facts["codebook_fingerprint"] == bundled.codebook_fingerprint and facts["source"] == "bundled"
        size = str(bundled.config.codebook_size)
        assert (facts["sampling_rate"], facts["hop_length"], facts["codebook_size"]) == ("24000", "320", size)
        assert facts["opset"] == str(model.opset_import[0].version) and len(model.opset_import) == 1
        assert {node.domain for node in model.graph.node} == {""}  # no operator of onnxruntime's own
    written = json.loads((folder / "wavtokenizer_onnx.json").read_text())
    assert written["compared_with_the_model"]["num_near_ties"] == 0
    assert written["compared_with_the_model"]["num_codes"] > 5000


def test_files_that_differ_from_the_model_are_removed(bundled, tmp_path, monkeypatch):
    other = tiny()
    monkeypatch.setattr(onnx_export, "check_signals", lambda rate: {"noise": np.ones(4000, np.float32)})
    changed = WavTokenizerModel.from_pretrained(bundled_model()).eval()
    real = onnx_export.graph.decoder_graph

    def wrong(model, *arguments):
        with torch.no_grad():
            changed.head.linear.bias.add_(0.01)
        return real(changed, *arguments)

    monkeypatch.setattr(onnx_export.graph, "decoder_graph", wrong)
    with pytest.raises(ValueError, match=r"decoder\.onnx differs from the model by"):
        export_onnx(bundled, tmp_path / "new" / "onnx", "bundled")
    monkeypatch.setattr(onnx_export.graph, "decoder_graph", real)
    real_encoder = onnx_export.graph.encoder_graph

    def wrong_encoder(model, *arguments):
        other.quantizer.codebook.embed.neg_()
        exported_encoder = real_encoder(other, *arguments)
        other.quantizer.codebook.embed.neg_()
        return exported_encoder

    monkeypatch.setattr(onnx_export.graph, "encoder_graph", wrong_encoder)
    with pytest.raises(ValueError, match="they are no near tie"):
        export_onnx(other, tmp_path / "new" / "onnx", "tiny")
    assert not any(path.is_file() for path in tmp_path.rglob("*"))


def test_a_near_tie_is_counted_and_is_not_an_error():
    entries = np.array([[1.0, 0.0], [0.0, 1.0], [5.0, 5.0]])
    latents = np.array([[0.5], [0.5 - 1e-7]])
    assert onnx_export._count_near_ties(latents, entries, np.array([0]), np.array([1]), "x") == 1
    with pytest.raises(ValueError, match="gives the code 2 in frame 0, the model 0"):
        onnx_export._count_near_ties(latents, entries, np.array([0]), np.array([2]), "x")


# ---------------------------------------------------------------------------------------------------------------------
# Without torch; the command line; bad input
# ---------------------------------------------------------------------------------------------------------------------


def test_the_folder_runs_without_torch_and_transformers(folder, exported, speech, tmp_path):
    moved = tmp_path / "elsewhere"
    shutil.copytree(folder, moved)
    np.save(tmp_path / "audio.npy", speech[:30_000])
    code = """
import sys
for name in ("torch", "transformers", "onnx", "wavtokenizer_hf", "huggingface_hub"):
    sys.modules[name] = None
import numpy as np
from wavtokenizer_onnx import WavTokenizerOnnx
model = WavTokenizerOnnx(sys.argv[1], num_threads=1)
codes = model.encode(np.load("audio.npy")[None, None]).audio_codes
np.savez("result.npz", codes=codes, audio=model.decode(codes).audio_values)
"""
    subprocess.run([sys.executable, "-c", code, moved], check=True, cwd=tmp_path, env={"PYTHONPATH": str(moved)})
    result = np.load(tmp_path / "result.npz")
    expected = exported.encode(speech[None, None, :30_000]).audio_codes
    np.testing.assert_array_equal(result["codes"], expected)
    np.testing.assert_array_equal(result["audio"], exported.decode(expected).audio_values)


def test_the_command_line_accepts_an_exported_folder(folder, tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    for name, model in (("onnx", str(folder)), ("torch", "bundled")):
        assert main(["encode", str(SPEECH), "-m", model, "-o", str(tmp_path / f"{name}.safetensors")]) == 0
        assert (
            main(["decode", str(tmp_path / f"{name}.safetensors"), "-m", model, "-o", str(tmp_path / f"{name}.wav")])
            == 0
        )
    tokens = [TokenFile.load(tmp_path / f"{name}.safetensors") for name in ("onnx", "torch")]
    np.testing.assert_array_equal(tokens[0].audio_codes, tokens[1].audio_codes)
    decoded = [soundfile.read(tmp_path / f"{name}.wav")[0] for name in ("onnx", "torch")]
    assert len(decoded[0]) == soundfile.info(SPEECH).frames
    np.testing.assert_allclose(*decoded, atol=1e-4)  # 16 bits
    window = ["decode", str(tmp_path / "onnx.safetensors"), "-m", str(folder), "--window-seconds", "1"]
    assert main([*window, "-o", str(tmp_path / "window.wav")]) == 0
    assert soundfile.info(tmp_path / "window.wav").frames == len(decoded[0])
    capsys.readouterr()
    assert main([*window, "-o", str(tmp_path / "half.wav"), "--dtype", "bfloat16"]) == 2
    assert "Got --dtype bfloat16 for the ONNX folder" in capsys.readouterr().err
    assert main(["evaluate", "--audio", str(SPEECH), "-m", str(folder), "--num-workers", "0"]) == 2
    assert "is an ONNX folder, expected a model" in capsys.readouterr().err


def test_export_model_writes_the_folder_and_prints_the_comparison(tmp_path, capsys, short_signals):
    tiny().save_pretrained(tmp_path / "tiny")
    assert main(["export-model", str(tmp_path / "tiny"), "-o", str(tmp_path / "onnx"), "--json"]) == 0
    facts = json.loads(capsys.readouterr().out)
    assert facts["near_ties"] == 0 and facts["max_audio_difference"] < 1e-5 and facts["codes_compared"] > 100
    assert main(["export-model", str(tmp_path / "tiny"), "-o", str(tmp_path / "onnx")]) == 2
    assert "exists and is not an empty folder" in capsys.readouterr().err


@pytest.fixture
def copy(folder, tmp_path):
    shutil.copytree(folder, tmp_path / "copy")
    return tmp_path / "copy"


def test_a_folder_of_another_hop_or_with_a_missing_file_is_refused(copy, tmp_path, capsys, short_signals):
    export_onnx(tiny(), tmp_path / "tiny", "tiny")
    shutil.copy(tmp_path / "tiny" / "decoder.onnx", copy)
    with pytest.raises(ValueError, match=r"decoder\.onnx has hop_length 16, and wavtokenizer_onnx\.json has 320"):
        WavTokenizerOnnx(copy).decode(np.zeros((1, 1, 3), np.int64))
    (copy / "decoder.onnx").write_bytes(b"no graph")
    with pytest.raises(ValueError, match=r"onnxruntime cannot load .*decoder\.onnx"):
        WavTokenizerOnnx(copy).decode(np.zeros((1, 1, 3), np.int64))
    (copy / "decoder.onnx").unlink()
    with pytest.raises(ValueError, match=r"lacks decoder\.onnx"):
        WavTokenizerOnnx(copy)
    assert main(["decode", str(SPEECH), "-m", str(copy), "-o", str(tmp_path / "x.wav")]) == 2
    assert "lacks decoder.onnx" in capsys.readouterr().err and not (tmp_path / "x.wav").exists()
    (copy / "wavtokenizer_onnx.json").write_text("{}")
    with pytest.raises(ValueError, match="is damaged"):
        WavTokenizerOnnx(copy)
    with pytest.raises(ValueError, match="expected a folder that `wavtokenizer export-model` wrote"):
        WavTokenizerOnnx(tmp_path)


@pytest.mark.parametrize("value", [np.nan, np.inf, 1e37])
def test_samples_that_overflow_within_the_encoder_are_refused(value, exported):
    audio = np.full((1, 1, 500), value, np.float32)
    with pytest.raises(ValueError, match="NaN or infinite samples, or some beyond"):
        exported.encode(audio)
    with pytest.raises(ValueError, match="expected finite floats"):
        exported.encode_stream().push(audio[0, 0])


HOSTILE_CONFIGS = {
    "brackets": lambda fields: "[" * 200_000,
    "2 MB": lambda fields: " " * 2**21 + "{}",
    "a hop of 0": lambda fields: {**fields, "model": {**fields["model"], "hop_length": 0}},
    "an infinite rate": lambda fields: {**fields, "model": {**fields["model"], "sampling_rate": float("inf")}},
    "10**9 layers": lambda fields: {**fields, "model": {**fields["model"], "num_lstm_layers": 10**9}},
    "files of numbers": lambda fields: {**fields, "files": [1]},
    "a file elsewhere": lambda fields: {**fields, "files": ["../encoder.onnx"]},
    "a list": lambda fields: [],
}


@pytest.mark.parametrize("case", HOSTILE_CONFIGS)
def test_a_hostile_configuration_is_refused_in_one_line(case, folder, tmp_path):
    content = HOSTILE_CONFIGS[case](json.loads((folder / "wavtokenizer_onnx.json").read_text()))
    (tmp_path / "wavtokenizer_onnx.json").write_text(content if isinstance(content, str) else json.dumps(content))
    with pytest.raises(ValueError, match=r"wavtokenizer_onnx\.json is damaged") as error:
        WavTokenizerOnnx(tmp_path)
    assert "\n" not in str(error.value) and len(str(error.value)) < 800


def test_export_to_the_longest_folder_name_works_without_fsync(tmp_path, short_signals, monkeypatch):
    def no_fsync(descriptor):
        raise OSError(errno.EINVAL, "Invalid argument")

    monkeypatch.setattr(os, "fsync", no_fsync)
    export_onnx(tiny(), tmp_path / ("x" * 250), "tiny")
    assert [path.name for path in tmp_path.iterdir()] == ["x" * 250]


def test_missing_packages_are_named(bundled, copy, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "onnxruntime", None)
    with pytest.raises(ImportError, match="pip install onnxruntime"):
        WavTokenizerOnnx(copy).encode(np.zeros((1, 1, 3), np.float32))
    with pytest.raises(ImportError, match=r"onnxruntime: pip install 'wavtokenizer_hf\[onnx\]'"):
        export_onnx(bundled, tmp_path / "new", "bundled")
    assert not (tmp_path / "new").exists()


def test_bad_arguments_are_refused(exported, bundled, tmp_path):
    floats, size = np.zeros((2, 1, 640), np.float32), bundled.config.codebook_size
    bad_audio = {
        "expected floats of shape": [
            np.zeros(5, np.float32),
            np.zeros((1, 2, 5), np.float32),
            np.zeros((1, 1, 0)),
            floats.astype(int),
        ],
        "NaN or infinite": [np.full((1, 1, 5), np.nan, np.float32)],
    }
    for message, values in bad_audio.items():
        for value in values:
            with pytest.raises(ValueError, match=message):
                exported.encode(value)
    gap = np.ones((2, 640), int)
    gap[1, 5] = 0
    for mask, message in (
        (gap, "Row 1 .* not a single run"),
        (gap * 0, "nothing real"),
        (gap[:1], "one entry for each"),
    ):
        with pytest.raises(ValueError, match=message):
            exported.encode(floats, mask)
    for codes, message in (
        (np.full((1, 1, 2), size), f"from {size} to {size}, expected 0 to {size - 1}"),
        (np.full((1, 1, 2), -1), "from -1 to -1"),
        (np.zeros((1, 1, 2)), "expected integers"),
        (np.zeros((1, 2), int), "expected \\(batch size, 1, codes\\)"),
    ):
        with pytest.raises(ValueError, match=message):
            exported.decode(codes)
    with pytest.raises(ValueError, match="twice the overlap"):
        exported.decode(np.zeros((1, 1, 2), int), window_seconds=0.1)
    with pytest.raises(ValueError, match="other audio"):
        exported.check_codebook_fingerprint("f" * 16)
    with pytest.raises(ValueError, match="dtype='float8'"):
        export_onnx(bundled, tmp_path / "x", "bundled", dtype="float8")
    with pytest.raises(ValueError, match="Got the provider NoSuchProvider"):
        WavTokenizerOnnx(exported.folder, providers=["NoSuchProvider"]).decode(np.zeros((1, 1, 2), int))


def test_the_runtime_file_imports_numpy_and_onnxruntime_only():
    module = importlib.import_module("wavtokenizer_hf.export.wavtokenizer_onnx")
    from test_package import imports

    third_party = imports(Path(module.__file__)) - set(sys.stdlib_module_names)
    assert third_party == {"numpy", "onnxruntime"}
