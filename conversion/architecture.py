"""Infer the configuration of a WavTokenizer from its tensors, and compare it with a YAML file."""

import re
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch
from huggingface_hub.errors import StrictDataclassError

from .. import WavTokenizerConfig, WavTokenizerModel
from ..limited_files import short_repr
from .mapping import check_names, several_quantizers


# Configuration fields that the tensor shapes determine.
INFERRED = (
    "num_filters", "upsampling_ratios", "num_residual_layers", "compress", "kernel_size", "last_kernel_size",
    "residual_kernel_size", "num_lstm_layers", "hidden_size", "codebook_size", "codebook_dim", "decoder_hidden_size",
    "decoder_intermediate_size", "decoder_num_layers", "adanorm_num_embeddings",
)  # fmt: skip

# Configuration fields that no tensor shape shows. The sampling rate is 24000 unless a YAML file has another one. The
# other fields are the same in every WavTokenizer.
NOT_IN_TENSORS = ("sampling_rate", "dilation_growth_rate", "decoder_attention_num_groups", "norm_eps")

# Key in the YAML file -> configuration field. "dowmsamples" is the spelling of the reference implementation.
YAML_FIELDS = {
    ("model", "sample_rate"): "sampling_rate",
    ("feature_extractor", "dowmsamples"): "upsampling_ratios",
    ("feature_extractor", "vq_bins"): "codebook_size",
    ("backbone", "input_channels"): "codebook_dim",
    ("backbone", "dim"): "decoder_hidden_size",
    ("backbone", "intermediate_dim"): "decoder_intermediate_size",
    ("backbone", "num_layers"): "decoder_num_layers",
    ("backbone", "adanorm_num_embeddings"): "adanorm_num_embeddings",
    ("head", "dim"): "decoder_hidden_size",
    ("head", "n_fft"): "n_fft",
    ("head", "hop_length"): "hop_length",
}

# Keys with one valid value, since the model implements no other.
YAML_CONSTANTS = {
    ("feature_extractor", "encodec_model"): "encodec_24khz",
    ("head", "padding"): "same",
}

Shape = tuple[int, ...]

_ENCODER = "encoder_model.encoder.layers."
_LAYER_KINDS = {"conv": "c", "block": "b", "shortcut": "b", "lstm": "l"}  # convolution, residual block, LSTM


def infer_config(
    shapes: dict[str, Shape], original_names: dict[str, str], sampling_rate: int = 24000
) -> WavTokenizerConfig:
    """
    Infer the configuration from tensor names and shapes, except the fields in `NOT_IN_TENSORS`.

    Args:
        shapes: Shapes of the model's tensors, by their names in this package.
        original_names: Name in this package -> original name, from `mapping.sort_names`.
        sampling_rate: Sampling rate in Hz. It is 24000 in every published checkpoint.

    Returns:
        Configuration of a model with a state dict of exactly these names and shapes.

    Raises:
        ValueError: Tensors are missing or unknown, or the shapes do not belong to one WavTokenizer.
    """
    layers = _encoder_layers(shapes)
    stages = layers[1:-2]  # without the first convolution, the LSTM and the last convolution
    num_stages = sum(kind == "c" for _, kind in stages)
    counts: dict[str, Any] = {
        "num_residual_layers": (len(stages) - num_stages) // num_stages,
        "num_lstm_layers": max(1, _count(shapes, r"\.lstm\.\w+_l(\d+)")),
        "decoder_num_layers": max(1, _count(shapes, r"backbone\.convnext\.(\d+)\.")),
    }
    # names and numbers of dimensions depend only on these counts: check them before reading any size
    expected = _model_shapes(WavTokenizerConfig(upsampling_ratios=[1] * num_stages, **counts))
    check_names(original_names, expected)
    for name, shape in shapes.items():
        if len(shape) != len(expected[name]) or 0 in shape:
            raise ValueError(
                _misshapen(original_names[name], shape, f"{len(expected[name])} dimensions, none of size 0")
            )

    first, last = (shapes[_kernel(layers[index][0])] for index in (0, -1))
    widest_block = [number for number, kind in stages if kind == "b"][-1]  # gives `compress` most exactly
    bottleneck = shapes[_kernel(f"{widest_block}.block.1")]
    strides = [shapes[_kernel(number)][-1] // 2 for number, kind in stages if kind == "c"]  # kernels span two strides
    codebook = shapes["encoder_model.quantizer.codebook.embed"]
    try:
        config = WavTokenizerConfig(
            sampling_rate=sampling_rate,
            num_filters=first[0],
            upsampling_ratios=strides[::-1],
            compress=bottleneck[1] // bottleneck[0],
            kernel_size=first[-1],
            last_kernel_size=last[-1],
            residual_kernel_size=bottleneck[-1],
            hidden_size=last[0],
            codebook_size=codebook[0],
            codebook_dim=codebook[-1],
            decoder_hidden_size=shapes["backbone.embed.weight"][0],
            decoder_intermediate_size=shapes["backbone.convnext.0.pwconv1.weight"][0],
            adanorm_num_embeddings=shapes["backbone.norm.scale.weight"][0],
            **counts,
        )
    except StrictDataclassError as error:  # not a ValueError; its cause has the configuration's message
        raise ValueError(
            f"The tensors do not make a WavTokenizer. {error.__cause__} Use another checkpoint."
        ) from error
    _check_head(shapes["head.linear.weight"][0], config)
    for name, shape in _model_shapes(config).items():
        if shapes[name] != shape:
            raise ValueError(_misshapen(original_names[name], shapes[name], f"{shape} beside the other tensors"))
    return config


def check_yaml(values: dict[str, dict[str, Any]], config: WavTokenizerConfig, path: Path) -> None:
    """
    Compare the shape settings of a YAML file with the configuration that was inferred from the tensors.

    Args:
        values: Values of the file, from `checkpoint.read_yaml`.
        config: Configuration from `infer_config`.
        path: Path of the YAML file, for messages.

    Raises:
        ValueError: A value contradicts the configuration, or the file has more than one quantizer.
    """
    num_quantizers = values["feature_extractor"].get("num_quantizers", 1)
    if num_quantizers != 1:
        raise ValueError(f"{path}: {several_quantizers(num_quantizers)}")
    inferred = {key: getattr(config, field) for key, field in YAML_FIELDS.items()} | YAML_CONSTANTS
    for (part, key), expected in inferred.items():
        expected = list(expected) if isinstance(expected, (list, tuple)) else expected
        got = values[part].get(key, expected)
        if got != expected:
            field = YAML_FIELDS.get((part, key), key)
            raise ValueError(
                f"{path} contradicts the checkpoint: {part}.{key} ({field}) is {short_repr(got)}, the checkpoint has "
                f"{expected!r}. Give the YAML file that this checkpoint was trained with. The files for 40 and 75 "
                "tokens/s are easily mixed up."
            )


def yaml_sampling_rate(values: dict[str, dict[str, Any]], path: Path) -> int:
    """Return the sampling rate of a YAML file; 24000 if it has none. Raise ValueError if not 1000 to 768,000 Hz."""
    sampling_rate = values["model"].get("sample_rate", 24000)
    if type(sampling_rate) is not int or not 1000 <= sampling_rate <= 768_000:
        raise ValueError(
            f"{path}: got model.sample_rate {short_repr(sampling_rate)}, expected Hz from 1000 to 768000, such as "
            "24000. Correct it."
        )
    return sampling_rate


def _encoder_layers(shapes: dict[str, Shape]) -> list[tuple[str, str]]:
    """Return the encoder layers that have tensors, in order: (number, kind). Kinds: see `_LAYER_KINDS`."""
    kinds = {}
    for name in shapes:
        if found := re.match(re.escape(_ENCODER) + r"(\d+)\.(conv|block|shortcut|lstm)\.", name):
            kinds[found[1]] = _LAYER_KINDS[found[2]]
    layers = sorted(kinds.items(), key=lambda layer: int(layer[0]))
    order = "".join(kind for _, kind in layers)
    if not re.fullmatch("c(b+c)+lc", order) or len(set(re.findall("b+", order))) > 1:
        words = {"c": "convolution", "b": "residual block", "l": "LSTM"}
        got = ", ".join(f"{number} {words[kind]}" for number, kind in layers) or "none"
        raise ValueError(
            f"Got the encoder layers {got}. Expected a convolution, then residual blocks and a convolution for each "
            "downsampling, then an LSTM and a convolution: tensors are missing. Download or save the checkpoint again."
        )
    return layers


def _kernel(layer: str) -> str:
    return f"{_ENCODER}{layer}.conv.parametrizations.weight.original1"


def _count(names: Iterable[str], pattern: str) -> int:
    return len({found[1] for name in names if (found := re.search(pattern, name))})


def _check_head(rows: int, config: WavTokenizerConfig) -> None:
    if rows - 2 != config.n_fft:
        raise ValueError(
            f"Got {rows} rows in head.out.weight, for frames of {rows - 2} samples; expected {config.n_fft} samples: "
            f"4 hops of the encoder, which downsamples by {list(config.upsampling_ratios)}. Encoder and head are from "
            "different checkpoints. Use one checkpoint as the training code wrote it."
        )


def _misshapen(original: str, shape: Shape, expected: str) -> str:
    return (
        f"Got {original} of shape {shape}, expected {expected}. This is not one WavTokenizer. Use the checkpoint as "
        "the training code wrote it."
    )


def _model_shapes(config: WavTokenizerConfig) -> dict[str, Shape]:
    with torch.device("meta"):  # shapes without memory
        model = WavTokenizerModel(config)
    return {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}
