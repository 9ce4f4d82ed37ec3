"""Export a model to a folder of ONNX files, and compare them with the model before the folder appears."""

import json
import os
import shutil
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from .. import __version__
from ..extras import require
from ..modeling_wavtokenizer import WavTokenizerModel
from . import graph, wavtokenizer_onnx
from .files import new_folder
from .wavtokenizer_onnx import CONFIG_NAME, WavTokenizerOnnx


DTYPES = ("float32", "float16", "int8")
QUANTIZATIONS = ("int8",)
MAX_AUDIO_DIFFERENCE = 1e-4  # of float32 decoders, on audio in [-1, 1]; float32 sums in another order give about 1e-6
MIN_SNR = 20.0  # dB, of decoders in float16 or int8
NEAR_TIE = 1e-5  # relative to the latent's norm; float32 sums in another order moved latents by at most 1.4e-6 of it
MAX_COMPARED_CODES = 2400  # decoded at once, 30 s or more at the published rates; attention is quadratic
SMALL_WEIGHT = 1024  # values; smaller weights stay in float32, since they hardly count in the file size


@dataclass
class OnnxReport:
    """
    Comparison of the exported files with the model, on speech-like audio, noise, one sample and 30 s.

    Args:
        num_codes: Number of codes that were compared.
        num_near_ties: Number of codes that differ. In each case, two codebook entries are equally near within the
            rounding of float32.
        max_audio_difference: Largest difference of a sample.
        snr: Ratio of the model's audio to the difference, in dB, over all audio together.
        sizes: Size of each file, in bytes.
    """

    num_codes: int
    num_near_ties: int
    max_audio_difference: float
    snr: float
    sizes: dict[str, int]


def export_onnx(
    model: WavTokenizerModel,
    output: str | os.PathLike,
    source: str,
    dtype: str = "float32",
    quantize: str | None = None,
    on_progress: Callable[[int, int], None] = lambda done, total: None,
) -> OnnxReport:
    """
    Write `encoder.onnx`, `encoder_stream.onnx`, `decoder.onnx`, and a module that runs them without torch.

    The encoder is always float32, since any other type changes most codes.

    Args:
        model: Model in float32, on any device.
        output: Folder to create. It must not exist, or must be empty.
        source: Name of the model, for the files' metadata.
        dtype: Type in which the decoder's weights are stored, `"float32"`, `"float16"` or `"int8"`. The decoder
            computes in float32.
        quantize: `"int8"` computes the decoder's matrix products in 8-bit integers, except the last layer and the
            inverse DFT. None: no quantization.
        on_progress: Called with the number of finished steps and of all steps. Each of the three files is a step, and
            so is each signal of the comparison.

    Returns:
        `OnnxReport`: the comparison with the model.

    Raises:
        ValueError: The arguments are invalid, the output exists, or the files differ from the model. Nothing is
            written then.
        ImportError: A package of the extra `onnx` is missing.
    """
    if dtype not in DTYPES:
        raise ValueError(f"Got dtype={dtype!r}, expected one of {', '.join(DTYPES)}.")
    if quantize not in (None, *QUANTIZATIONS):
        raise ValueError(f"Got quantize={quantize!r}, expected {', '.join(QUANTIZATIONS)} or None.")
    if model.head.linear.weight.dtype != torch.float32:
        raise ValueError(
            f"Got a model in {model.head.linear.weight.dtype}, expected float32. Load it without a dtype."
        )
    onnx, _ = require("onnx", "onnx"), require("onnxruntime", "onnx")
    config, encoder = model.config, model.encoder_model.encoder
    lstm = encoder.lstm.lstm
    facts = {
        "codebook_fingerprint": model.codebook_fingerprint,
        "sampling_rate": config.sampling_rate,
        "hop_length": config.hop_length,
        "codebook_size": config.codebook_size,
        "source": source,
        "opset": graph.OPSET,
    }
    metadata = {name: str(value) for name, value in facts.items()}
    decoder_metadata = {**metadata, "dtype": dtype, "quantize": quantize or "none"}
    num_steps = 3 + len(check_signals(config.sampling_rate))
    with new_folder(output) as folder:
        on_progress(0, num_steps)
        onnx.save(graph.encoder_graph(model, metadata, __version__), folder / "encoder.onnx")
        on_progress(1, num_steps)
        onnx.save(graph.encoder_stream_graph(model, metadata, __version__), folder / "encoder_stream.onnx")
        on_progress(2, num_steps)
        decoder = graph.decoder_graph(model, decoder_metadata, __version__)
        if quantize is not None:
            decoder = _quantize(decoder, folder)
        if dtype != "float32":
            _store_weights(decoder, dtype)
        onnx.save(decoder, folder / "decoder.onnx")
        del decoder
        sizes = {path.name: path.stat().st_size for path in sorted(folder.glob("*.onnx"))}
        shutil.copyfile(wavtokenizer_onnx.__file__, folder / "wavtokenizer_onnx.py")
        encoder_facts = {
            "frames_back": encoder.left_context,
            "frames_ahead": encoder.right_context,
            "last_reach": encoder.output_context,
            "num_lstm_layers": lstm.num_layers,
            "lstm_size": lstm.hidden_size,
        }
        content = {
            "model": {**facts, **encoder_facts},
            "decoder": {"dtype": dtype, "quantize": quantize},
            "files": list(sizes),
            "written_by": f"wavtokenizer_hf {__version__}",
        }
        _write_json(folder / CONFIG_NAME, content)
        exported = WavTokenizerOnnx(folder, num_threads=torch.get_num_threads())
        is_exact = dtype == "float32" and quantize is None
        report = compare(model, exported, sizes, is_exact, lambda done: on_progress(3 + done, num_steps))
        _write_json(folder / CONFIG_NAME, {**content, "compared_with_the_model": asdict(report)})
    return report


def _write_json(path: Path, content: dict) -> None:
    path.write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")


def _quantize(decoder: Any, folder: Path) -> Any:
    """Return the decoder with matrix products in int8, by onnxruntime's dynamic quantization."""
    onnx, quantization = require("onnx", "onnx"), require("onnxruntime.quantization", "onnx")
    constants = {weight.name for weight in decoder.graph.initializer}
    # Excluded are the last layer, which predicts log magnitudes and phases, and the inverse DFT after it. The SNR is
    # 53 dB without them and 27 dB with them.
    excluded = [
        node.name
        for node in decoder.graph.node
        if node.op_type == "MatMul" and (node.name == "head" or node.input[1] not in constants)
    ]
    float32_path, int8_path = folder / "decoder_float32.onnx", folder / "decoder_int8.onnx"
    onnx.save(decoder, float32_path)
    quantization.quantize_dynamic(
        float32_path,
        int8_path,
        op_types_to_quantize=["MatMul"],
        nodes_to_exclude=excluded,
        per_channel=True,
        reduce_range=True,  # 7 bits, since products of 8 bits overflow on x86 processors without VNNI
        weight_type=quantization.QuantType.QInt8,
    )
    model = onnx.load(int8_path)
    onnx.helper.set_model_props(model, {prop.key: prop.value for prop in decoder.metadata_props})
    float32_path.unlink()
    int8_path.unlink()
    return model


def _store_weights(decoder: Any, dtype: str) -> None:
    """
    Store large float32 weights as float16 or int8, and convert them back in the graph. Runtimes do that once, at load.
    """
    onnx = require("onnx", "onnx")
    float32, from_array, make_node = onnx.TensorProto.FLOAT, onnx.numpy_helper.from_array, onnx.helper.make_node
    nodes, scales = [], []
    for weight in decoder.graph.initializer:
        values, name = onnx.numpy_helper.to_array(weight), weight.name
        if weight.data_type != float32 or values.size < SMALL_WEIGHT or values.ndim < 2:
            continue
        stored, cast = f"{name}.{dtype}", f"{name}.float32"
        if dtype == "float16":
            weight.CopyFrom(from_array(values.astype(np.float16), stored))
            nodes.append(make_node("Cast", [stored], [name], name=cast, to=float32))
            continue
        # one scale per output channel or codebook entry: the first axis, or the last axis for a matrix product
        axes = tuple(range(1, values.ndim)) if values.ndim == 3 or name == "codebook" else (0,)
        scale = np.abs(values).max(axis=axes, keepdims=True) / 127
        scale[scale == 0] = 1
        weight.CopyFrom(from_array(np.round(values / scale).astype(np.int8), stored))
        scales.append(from_array(scale, f"{name}.scale"))
        nodes.append(make_node("Cast", [stored], [cast], name=cast, to=float32))
        nodes.append(make_node("Mul", [cast, f"{name}.scale"], [name], name=f"{name}.scaled"))
    decoder.graph.initializer.extend(scales)
    nodes += decoder.graph.node
    del decoder.graph.node[:]
    decoder.graph.node.extend(nodes)


# ---------------------------------------------------------------------------------------------------------------------
# Comparison
# ---------------------------------------------------------------------------------------------------------------------


@torch.inference_mode()
def compare(
    model: WavTokenizerModel,
    exported: WavTokenizerOnnx,
    sizes: dict[str, int],
    exact: bool,
    on_progress: Callable[[int], None] = lambda done: None,
) -> OnnxReport:
    """
    Compare the files with the model on the same audio and codes.

    Args:
        model: Model that was exported.
        exported: Exported files.
        sizes: Size of each file in bytes, for the report.
        exact: Whether to limit the difference of the audio by `MAX_AUDIO_DIFFERENCE` instead of `MIN_SNR`.
        on_progress: Called with the number of finished signals.

    Returns:
        `OnnxReport`.

    Raises:
        ValueError: Codes differ without a near tie, the audio differs by more than `MAX_AUDIO_DIFFERENCE`, or its SNR
            is below `MIN_SNR`.
    """
    entries = model.encoder_model.quantizer.codebook.embed.double().cpu().numpy()
    num_codes = num_near_ties = 0
    largest = signal = noise = 0.0
    for index, (name, audio) in enumerate(check_signals(model.config.sampling_rate).items()):
        on_progress(index)
        encoded = model.encode(torch.from_numpy(audio)[None, None].to(model.device), output_latents=True)
        expected = encoded.audio_codes[0, 0].cpu().numpy()
        assert encoded.latents is not None
        latents = encoded.latents[0].double().cpu().numpy()  # (D, L)
        encoders: dict[str, Callable] = {"encoder.onnx": lambda audio: exported.encode(audio[None, None])[0][0, 0]}
        if "encoder_stream.onnx" in exported.files:
            encoders["encoder_stream.onnx"] = lambda audio: _stream(exported, audio)
        for file, encode in encoders.items():
            found = encode(audio)
            if found.shape != expected.shape:
                raise ValueError(
                    f"{file} returns {len(found)} codes for the {name}, the model {len(expected)}. Nothing was "
                    "written. Please report this."
                )
            num_near_ties += _count_near_ties(latents, entries, expected, found, f"{file} on the {name}")
            num_codes += len(found)
        decoded, difference = _decode_difference(model, exported, expected[:MAX_COMPARED_CODES])
        largest = max(largest, float(np.abs(difference).max()))
        signal += float(np.square(decoded).sum())
        noise += float(np.square(difference).sum())
    snr = float(10 * np.log10(signal / noise)) if noise > 0 else float("inf")
    if exact and not largest <= MAX_AUDIO_DIFFERENCE:
        raise ValueError(
            f"decoder.onnx differs from the model by {largest:.1e}, expected at most {MAX_AUDIO_DIFFERENCE:.0e}. "
            "Nothing was written. Please report this."
        )
    if not exact and not snr >= MIN_SNR:
        raise ValueError(
            f"The decoder's audio has an SNR of {snr:.1f} dB, expected at least {MIN_SNR:.0f} dB. This model is too "
            "sensitive to this dtype or quantization. Nothing was written. Export it in float32."
        )
    return OnnxReport(num_codes, num_near_ties, largest, snr, sizes)


def _stream(exported: WavTokenizerOnnx, audio: np.ndarray) -> np.ndarray:
    stream = exported.encode_stream()
    blocks = np.array_split(audio, -(-len(audio) // 50_000))
    return np.concatenate([*(stream.push(block) for block in blocks), stream.flush()])


def _decode_difference(
    model: WavTokenizerModel, exported: WavTokenizerOnnx, codes: np.ndarray
) -> tuple[np.ndarray, np.ndarray]:
    """Return the model's audio of codes (L,), and the difference of the exported decoder's audio from it."""
    audio_codes = torch.from_numpy(codes)[None, None]
    expected = model.decode(audio_codes.to(model.device)).audio_values[0, 0].cpu().numpy()
    found = exported.decode(audio_codes.numpy()).audio_values[0, 0]
    return expected, found - expected


def _count_near_ties(
    latents: np.ndarray, entries: np.ndarray, expected: np.ndarray, found: np.ndarray, where: str
) -> int:
    """Return the number of codes that differ. Raises ValueError if one of them is no near tie."""
    (frames,) = np.nonzero(expected != found)
    for frame in frames:
        latent, nearest, other = latents[:, frame], entries[expected[frame]], entries[found[frame]]
        margin = (np.square(latent - other).sum() - np.square(latent - nearest).sum()) / 2
        if margin > NEAR_TIE * np.linalg.norm(latent) * np.linalg.norm(nearest - other):
            raise ValueError(
                f"{where} gives the code {found[frame]} in frame {frame}, the model {expected[frame]}, and they are "
                "no near tie. Nothing was written. Please report this."
            )
    return len(frames)


def check_signals(sampling_rate: int) -> dict[str, np.ndarray]:
    """Return float32 signals for the comparison: 3 s of speech-like audio, noise, one sample, and 30 s of both."""
    random = np.random.default_rng(0)
    time = np.arange(3 * sampling_rate) / sampling_rate
    phase = 2 * np.pi * np.cumsum(120 + 40 * np.sin(2 * np.pi * 0.6 * time)) / sampling_rate
    voice = sum(np.sin(harmonic * phase) * np.exp(-(((harmonic * 120 - 600) / 900) ** 2)) for harmonic in range(1, 30))
    syllables = np.clip(np.sin(2 * np.pi * 3.7 * time) + 0.4, 0, 1)
    speech = 0.1 * syllables * voice + 0.005 * random.standard_normal(len(time))
    noise = 0.1 * random.standard_normal(sampling_rate + 1)
    signals = {
        "speech-like audio": speech,
        "noise": noise,
        "single sample": np.array([0.3]),
        "30 s of audio": np.resize(np.concatenate([speech, 0.3 * noise, speech[::-1]]), 30 * sampling_rate + 7),
    }
    return {name: signal.astype(np.float32) for name, signal in signals.items()}
