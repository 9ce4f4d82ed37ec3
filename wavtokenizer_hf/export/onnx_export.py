"""A model as a folder of ONNX files, compared with the model before the folder appears."""

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
NEAR_TIE = 1e-5  # of the latents' length: another order of float32 sums moved latents by at most 1.4e-6 of it
MAX_COMPARED_CODES = 2400  # in one piece; 30 s at the published rates. Attention is quadratic
SMALL_WEIGHT = 1024  # numbers; smaller weights stay in float32: they are no part of the size


@dataclass
class OnnxReport:
    """
    What the exported files give, compared with the model on speech-like audio, noise, one sample and 30 s.

    Args:
        num_codes: codes that were compared.
        num_near_ties: codes that differ, all of them where two entries are equally near within the rounding of
            float32.
        max_audio_difference: largest difference of a sample.
        snr: ratio of the model's audio to the difference, in dB, over all audio together.
        sizes: bytes of each file.
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
    Write `encoder.onnx`, `encoder_stream.onnx`, `decoder.onnx`, and what runs them without torch.

    The encoder is always float32: in any other type most codes change.

    Args:
        model: model in float32, on any device.
        output: Folder to make; it must not exist, or be empty.
        source: Name of the model, for the files' metadata.
        dtype: type in which the decoder's weights are stored, `"float32"`, `"float16"` or `"int8"`; it computes in
            float32.
        quantize: `"int8"` computes the decoder's matrix products in 8-bit integers, but for the last layer and the
            inverse DFT.
        on_progress: Called with the number of steps that are done and of all: three files and the signals of the
            comparison.

    Returns:
        `OnnxReport`: the comparison with the model.

    Raises:
        ValueError: bad arguments, the output exists, or the files give something else than the model; then nothing is
            left.
        ImportError: a package of the extra `onnx` is missing.
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
    lstm: Any = next(layer.lstm for layer in encoder.layers if hasattr(layer, "lstm"))
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
        state = {"num_lstm_layers": lstm.num_layers, "lstm_size": lstm.hidden_size}
        content = {
            "model": {**facts, **graph.encoder_reach(encoder), **state},
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
    """The decoder with its products in int8, as onnxruntime's dynamic quantization makes it."""
    onnx, quantization = require("onnx", "onnx"), require("onnxruntime.quantization", "onnx")
    constants = {weight.name for weight in decoder.graph.initializer}
    # the last layer gives log magnitudes and phases, and what comes after it the waveform: 27 dB with them, 53 dB
    # without
    excluded = [
        node.name
        for node in decoder.graph.node
        if node.op_type == "MatMul" and (node.name == "head" or node.input[1] not in constants)
    ]
    plain, quantized = folder / "decoder_float32.onnx", folder / "decoder_int8.onnx"
    onnx.save(decoder, plain)
    quantization.quantize_dynamic(
        plain,
        quantized,
        op_types_to_quantize=["MatMul"],
        nodes_to_exclude=excluded,
        per_channel=True,
        reduce_range=True,  # 7 bits: products of 8 overflow on x86 processors without VNNI
        weight_type=quantization.QuantType.QInt8,
    )
    model = onnx.load(quantized)
    onnx.helper.set_model_props(model, {prop.key: prop.value for prop in decoder.metadata_props})
    plain.unlink()
    quantized.unlink()
    return model


def _store_weights(decoder: Any, dtype: str) -> None:
    """
    Stores large float32 weights as float16 or int8, and computes float32 of them, which runtimes do once, at load.
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
        # one scale for each output channel, or entry of the codebook: the first axis, but the last of a matrix product
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
    Run the files and the model on the same audio and codes.

    Raises:
        ValueError: codes differ where no tie explains it, or audio differs by more than `MAX_AUDIO_DIFFERENCE` if
            `exact`, else by so much that its SNR is below `MIN_SNR`.
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
                raise ValueError(f"{file} gives {len(found)} codes of the {name}, the model {len(expected)}.")
            num_near_ties += _count_near_ties(latents, entries, expected, found, f"{file} on the {name}")
            num_codes += len(found)
        difference = _decode_difference(model, exported, expected[:MAX_COMPARED_CODES])
        largest = max(largest, float(np.abs(difference[1]).max()))
        signal += float(np.square(difference[0]).sum())
        noise += float(np.square(difference[1]).sum())
    snr = float(10 * np.log10(signal / noise)) if noise > 0 else float("inf")
    if exact and not largest <= MAX_AUDIO_DIFFERENCE:
        raise ValueError(
            f"decoder.onnx differs from the model by {largest:.1e}, expected at most {MAX_AUDIO_DIFFERENCE:.0e}. "
            "Nothing was written. Please report this."
        )
    if not exact and not snr >= MIN_SNR:
        raise ValueError(
            f"The decoder's audio has an SNR of {snr:.1f} dB, expected at least {MIN_SNR:.0f}: this model does not "
            "bear it. Nothing was written. Export it in float32."
        )
    return OnnxReport(num_codes, num_near_ties, largest, snr, sizes)


def _stream(exported: WavTokenizerOnnx, audio: np.ndarray) -> np.ndarray:
    stream = exported.encode_stream()
    blocks = np.array_split(audio, -(-len(audio) // 50_000))
    return np.concatenate([*(stream.push(block) for block in blocks), stream.flush()])


def _decode_difference(
    model: WavTokenizerModel, exported: WavTokenizerOnnx, codes: np.ndarray
) -> tuple[np.ndarray, np.ndarray]:
    audio_codes = torch.from_numpy(codes)[None, None]
    expected = model.decode(audio_codes.to(model.device)).audio_values[0, 0].cpu().numpy()
    found = exported.decode(audio_codes.numpy()).audio_values[0, 0]
    return expected, found - expected


def _count_near_ties(
    latents: np.ndarray, entries: np.ndarray, expected: np.ndarray, found: np.ndarray, where: str
) -> int:
    """Number of codes that differ. Raises ValueError if one of them is no near tie."""
    (frames,) = np.nonzero(expected != found)
    for frame in frames:
        latent, nearest, other = latents[:, frame], entries[expected[frame]], entries[found[frame]]
        farther = (np.square(latent - other).sum() - np.square(latent - nearest).sum()) / 2
        if farther > NEAR_TIE * np.linalg.norm(latent) * np.linalg.norm(nearest - other):
            raise ValueError(
                f"{where} gives the code {found[frame]} in frame {frame}, the model {expected[frame]}, and they are "
                "no near tie. Nothing was written. Please report this."
            )
    return len(frames)


def check_signals(sampling_rate: int) -> dict[str, np.ndarray]:
    """Audio to compare on: speech-like audio of 3 s, noise, one sample, and 30 s of both, float32."""
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
