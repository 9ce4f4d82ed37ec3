"""Convert a folder back to a checkpoint and a YAML file of the reference implementation, for all programs that read
its files.

    python -m wavtokenizer_hf.conversion.to_original FOLDER --output DIR

This writes DIR/NAME.ckpt and DIR/NAME.yaml, where NAME is the name of the folder. `convert` makes the same folder of
them again.
"""

import argparse
import math
import os
import sys
from pathlib import Path
from typing import Any

import torch
import yaml
from safetensors import SafetensorError
from safetensors.torch import load_file

from .. import WavTokenizerConfig, WavTokenizerModel, __version__
from ..limited_files import one_line
from ..loading import check_files, check_finite
from .from_original import differing, new_folder
from .mapping import original_discriminator_names, original_name
from .source import read_source


# What the original's code has built in (decoder/feature_extractors.py, decoder/models.py), where others are refused.
BUILT_IN: dict[str, Any] = {
    "num_filters": 32,
    "num_residual_layers": 1,
    "dilation_growth_rate": 2,
    "compress": 2,
    "kernel_size": 7,
    "last_kernel_size": 7,
    "residual_kernel_size": 3,
    "num_lstm_layers": 2,
    "hidden_size": 512,
    "decoder_attention_num_groups": 32,
    "norm_eps": 1e-6,
}
UNUSED_RATIOS = (8, 5, 4, 2)  # of EnCodec's own decoder, whatever the encoder's are


def to_original(folder: str | Path, output: str | Path) -> Path:
    """
    Write a converted folder as a Lightning checkpoint and a YAML file of the reference implementation.

    The checkpoint holds every tensor that `WavTokenizer.from_pretrained0802` of the reference implementation needs:
    the model's own tensors, bit for bit, the window, and the discriminators if the folder has them. EnCodec's decoder,
    which is never used, is zeros. Optimizer states and settings of the training run are not in a folder, so they are
    not in the files.

    Args:
        folder: Converted folder, or one that training has written.
        output: Folder to write. It must not exist, or be empty.

    Returns:
        Path of the checkpoint. The YAML file is beside it.

    Raises:
        ValueError: The folder is no WavTokenizer, is damaged, or has a shape that the reference implementation cannot
            build. The output exists.
        OSError: A file cannot be read or written.
    """
    if not os.fspath(output):
        raise ValueError("Got an empty output. Name the folder to make.")
    folder, output = Path(folder).resolve(), Path(output).resolve()
    if not (folder / "config.json").is_file():
        raise ValueError(
            f"{folder} has no config.json, expected a converted folder. `wavtokenizer convert` makes one."
        )
    discriminator_file = folder / "discriminators.safetensors"
    try:
        check_files(WavTokenizerModel, str(folder))
        pair: Any = WavTokenizerModel.from_pretrained(folder, dtype=torch.float32, output_loading_info=True)
        model, loading = pair
        discriminators = load_file(discriminator_file) if discriminator_file.is_file() else {}
    except (SafetensorError, ValueError) as error:
        raise ValueError(
            f"The weights in {folder} cannot be read: {one_line(error)}. A file there is damaged: convert or "
            "download it again."
        ) from error
    if wrong := [f"{kind}: {sorted(names)[:3]}" for kind, names in loading.items() if names]:
        raise ValueError(f"{folder} does not hold one whole WavTokenizer: {'; '.join(wrong)}. Convert it again.")
    check_finite(model, str(folder))
    _check_built_in(model.config)
    tensors = {original_name(name): tensor.contiguous() for name, tensor in model.state_dict().items()}
    tensors |= _unused_decoder() | {"head.istft.window": torch.hann_window(model.config.n_fft)}
    for name, tensor in discriminators.items():
        tensors |= dict.fromkeys(original_discriminator_names(name), tensor)
    with new_folder(output) as new:
        checkpoint = new / f"{folder.name}.ckpt"
        # llama.cpp's convert_pt_to_hf.py takes the first dictionary in the file, so there must be none before this
        torch.save({"epoch": 0, "global_step": 0, "state_dict": tensors}, checkpoint)
        text = f"# Written by wavtokenizer_hf {__version__}: the model, without settings of a training run.\n"
        settings = yaml.safe_dump(_settings(model.config), sort_keys=False, default_flow_style=None)
        checkpoint.with_suffix(".yaml").write_text(text + settings, encoding="utf-8")
        _check(checkpoint, model)
    return output / checkpoint.name


def _check_built_in(config: WavTokenizerConfig) -> None:
    for field, built_in in BUILT_IN.items():
        if getattr(config, field) != built_in:
            raise ValueError(
                f"Got {field}={getattr(config, field)}; the original's code has {built_in} built in and cannot load "
                "this model. Use it with this package."
            )


def _unused_decoder() -> dict[str, torch.Tensor]:
    """
    Return EnCodec's decoder by its original names, as zeros. The reference implementation loads no file without it.
    """
    prefix, tensors = "feature_extractor.encodec.decoder.model.", {}

    def convolution(name: str, out_channels: int, in_channels: int, kernel: int, transposed: bool = False) -> None:
        shape = (in_channels, out_channels, kernel) if transposed else (out_channels, in_channels, kernel)
        tensors[f"{prefix}{name}.bias"] = torch.zeros(out_channels)
        tensors[f"{prefix}{name}.weight_g"] = torch.zeros(shape[0], 1, 1)
        tensors[f"{prefix}{name}.weight_v"] = torch.ones(shape)  # weight norm divides by its length

    channels = BUILT_IN["num_filters"] * 2 ** len(UNUSED_RATIOS)
    convolution("0.conv.conv", channels, BUILT_IN["hidden_size"], BUILT_IN["kernel_size"])
    lstm = torch.nn.LSTM(channels, channels, BUILT_IN["num_lstm_layers"])
    tensors |= {f"{prefix}1.lstm.{name}": torch.zeros_like(weight) for name, weight in lstm.state_dict().items()}
    for stage, ratio in enumerate(UNUSED_RATIOS):
        layer, channels = 3 + 3 * stage, channels // 2
        convolution(f"{layer}.convtr.convtr", channels, 2 * channels, 2 * ratio, transposed=True)
        convolution(f"{layer + 1}.block.1.conv.conv", channels // 2, channels, BUILT_IN["residual_kernel_size"])
        convolution(f"{layer + 1}.block.3.conv.conv", channels, channels // 2, 1)
        convolution(f"{layer + 1}.shortcut.conv.conv", channels, channels, 1)
    convolution(f"{3 + 3 * len(UNUSED_RATIOS)}.conv.conv", 1, channels, BUILT_IN["last_kernel_size"])
    return tensors


def _settings(config: WavTokenizerConfig) -> dict:
    """Return the model's part of the YAML file. "dowmsamples" is spelled as in the reference implementation."""
    ratios = list(config.upsampling_ratios)
    feature_extractor = {
        "encodec_model": "encodec_24khz",
        "bandwidths": [6.6, 6.6, 6.6, 6.6],
        "train_codebooks": True,
        "num_quantizers": 1,
        "dowmsamples": ratios,
        "vq_bins": config.codebook_size,
        "vq_kmeans": 200,
    }
    backbone = {
        "input_channels": config.codebook_dim,
        "dim": config.decoder_hidden_size,
        "intermediate_dim": config.decoder_intermediate_size,
        "num_layers": config.decoder_num_layers,
        "adanorm_num_embeddings": config.adanorm_num_embeddings,
    }
    head = {
        "dim": config.decoder_hidden_size,
        "n_fft": config.n_fft,
        "hop_length": math.prod(ratios),
        "padding": "same",
    }
    parts = {
        "feature_extractor": {
            "class_path": "decoder.feature_extractors.EncodecFeatures",
            "init_args": feature_extractor,
        },
        "backbone": {"class_path": "decoder.models.VocosBackbone", "init_args": backbone},
        "head": {"class_path": "decoder.heads.ISTFTHead", "init_args": head},
    }
    init_args = {"sample_rate": config.sampling_rate, **parts}
    return {"model": {"class_path": "decoder.experiment.WavTokenizer", "init_args": init_args}}


def _check(checkpoint: Path, model: WavTokenizerModel) -> None:
    """Read the files as `convert` does. A difference is a bug of this program."""
    source = read_source([checkpoint], checkpoint.with_suffix(".yaml"))
    if problems := differing(model.state_dict(), source.weights):
        raise RuntimeError(
            f"{checkpoint.name} would not hold the folder's weights: {problems[:3]}. Please report this."
        )


def main(argv: list[str] | None = None) -> int:
    """Run the command line. Returns the exit code: 0, or 2 for a folder or output that cannot be used."""
    parser = argparse.ArgumentParser(
        prog="python -m wavtokenizer_hf.conversion.to_original",
        description="Turn a converted folder into a checkpoint and a YAML file for the original's code.",
    )
    parser.add_argument("folder", metavar="FOLDER", help="a converted folder, or one that training has written")
    parser.add_argument(
        "--output", metavar="DIR", required=True, help="the folder to make; must not exist, or be empty"
    )
    arguments = parser.parse_args(argv)
    try:
        print(f"written to: {to_original(arguments.folder, arguments.output)}")
    except (ValueError, OSError) as error:
        print(f"error: {' '.join(str(error).split())}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
