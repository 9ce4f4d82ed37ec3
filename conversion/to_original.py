"""Convert a folder back to a checkpoint and a YAML file of the reference implementation.

    python -m wavtokenizer_hf.conversion.to_original FOLDER --output DIR

This writes DIR/NAME.ckpt and DIR/NAME.yaml, for programs that read such files. NAME is the name of the folder.
`convert` turns them into the same folder again.
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
from .from_original import new_folder, tensor_differences
from .mapping import original_discriminator_names, original_name
from .source import read_source


# Values that the reference implementation hard-codes (decoder/feature_extractors.py, decoder/models.py).
HARD_CODED: dict[str, Any] = {
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
UNUSED_DECODER_RATIOS = (8, 5, 4, 2)  # upsampling ratios of EnCodec's own decoder, for every encoder


def to_original(folder: str | Path, output: str | Path) -> Path:
    """
    Write a converted folder as a Lightning checkpoint and a YAML file of the reference implementation.

    The checkpoint holds every tensor that `WavTokenizer.from_pretrained0802` of the reference implementation needs:
    the model's own tensors, bit for bit, the window, and the discriminators if the folder has them. EnCodec's own
    decoder is never used, so its weights are zeros. A folder has no optimizer states or training settings, so the
    files have none either.

    Args:
        folder: Converted folder, or a folder that training wrote.
        output: Folder to write. It must not exist, or it must be empty.

    Returns:
        Path of the checkpoint. The YAML file is beside it.

    Raises:
        ValueError: The folder is not a WavTokenizer, is damaged, or has a shape that the reference implementation
            cannot build. The output exists.
        OSError: A file cannot be read or written.
    """
    if not os.fspath(output):
        raise ValueError("Got an empty output. Name the folder to write.")
    folder, output = Path(folder).resolve(), Path(output).resolve()
    if not (folder / "config.json").is_file():
        raise ValueError(
            f"{folder} has no config.json, expected a converted folder. `wavtokenizer convert` writes one."
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
    if problems := [f"{kind}: {sorted(names)[:3]}" for kind, names in loading.items() if names]:
        raise ValueError(f"{folder} does not hold one whole WavTokenizer: {'; '.join(problems)}. Convert it again.")
    check_finite(model, str(folder))
    _check_hard_coded_fields(model.config)
    tensors = {original_name(name): tensor.contiguous() for name, tensor in model.state_dict().items()}
    tensors |= _unused_decoder() | {"head.istft.window": torch.hann_window(model.config.n_fft)}
    for name, tensor in discriminators.items():
        tensors |= dict.fromkeys(original_discriminator_names(name), tensor)
    with new_folder(output) as partial_output:
        checkpoint = partial_output / f"{folder.name}.ckpt"
        # llama.cpp's convert_pt_to_hf.py reads the first dictionary in the file, so it must be the state dict
        torch.save({"epoch": 0, "global_step": 0, "state_dict": tensors}, checkpoint)
        header = f"# Written by wavtokenizer_hf {__version__}: the model, without settings of a training run.\n"
        settings = yaml.safe_dump(_yaml_settings(model.config), sort_keys=False, default_flow_style=None)
        checkpoint.with_suffix(".yaml").write_text(header + settings, encoding="utf-8")
        _check_files(checkpoint, model)
    return output / checkpoint.name


def _check_hard_coded_fields(config: WavTokenizerConfig) -> None:
    for field, expected in HARD_CODED.items():
        if getattr(config, field) != expected:
            raise ValueError(
                f"Got {field}={getattr(config, field)}; the reference implementation hard-codes {expected} and cannot "
                "load this model. Use it with this package."
            )


def _unused_decoder() -> dict[str, torch.Tensor]:
    """Return EnCodec's own decoder as zeros, by original names. The reference implementation needs it."""
    prefix, tensors = "feature_extractor.encodec.decoder.model.", {}

    def convolution(name: str, out_channels: int, in_channels: int, kernel: int, transposed: bool = False) -> None:
        shape = (in_channels, out_channels, kernel) if transposed else (out_channels, in_channels, kernel)
        tensors[f"{prefix}{name}.bias"] = torch.zeros(out_channels)
        tensors[f"{prefix}{name}.weight_g"] = torch.zeros(shape[0], 1, 1)
        tensors[f"{prefix}{name}.weight_v"] = torch.ones(shape)  # weight norm divides by its length

    channels = HARD_CODED["num_filters"] * 2 ** len(UNUSED_DECODER_RATIOS)
    convolution("0.conv.conv", channels, HARD_CODED["hidden_size"], HARD_CODED["kernel_size"])
    lstm = torch.nn.LSTM(channels, channels, HARD_CODED["num_lstm_layers"])
    tensors |= {f"{prefix}1.lstm.{name}": torch.zeros_like(weight) for name, weight in lstm.state_dict().items()}
    for stage, ratio in enumerate(UNUSED_DECODER_RATIOS):
        layer, channels = 3 + 3 * stage, channels // 2
        convolution(f"{layer}.convtr.convtr", channels, 2 * channels, 2 * ratio, transposed=True)
        convolution(f"{layer + 1}.block.1.conv.conv", channels // 2, channels, HARD_CODED["residual_kernel_size"])
        convolution(f"{layer + 1}.block.3.conv.conv", channels, channels // 2, 1)
        convolution(f"{layer + 1}.shortcut.conv.conv", channels, channels, 1)
    convolution(f"{3 + 3 * len(UNUSED_DECODER_RATIOS)}.conv.conv", 1, channels, HARD_CODED["last_kernel_size"])
    return tensors


def _yaml_settings(config: WavTokenizerConfig) -> dict:
    """Return the model section of the YAML file. "dowmsamples" is the spelling of the reference implementation."""
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


def _check_files(checkpoint: Path, model: WavTokenizerModel) -> None:
    """Read the files as `convert` does, and compare them with the model. A difference is a bug in this package."""
    source = read_source([checkpoint], checkpoint.with_suffix(".yaml"))
    if problems := tensor_differences(model.state_dict(), source.weights):
        raise RuntimeError(
            f"{checkpoint.name} would not hold the folder's weights: {problems[:3]}. Please report this."
        )


def main(argv: list[str] | None = None) -> int:
    """Run the command line. Return the exit code: 0, or 2 for an unusable folder or output."""
    parser = argparse.ArgumentParser(
        prog="python -m wavtokenizer_hf.conversion.to_original",
        description="Convert a folder back to a checkpoint and a YAML file of the reference implementation.",
    )
    parser.add_argument("folder", metavar="FOLDER", help="converted folder, or a folder that training wrote")
    parser.add_argument(
        "--output", metavar="DIR", required=True, help="folder to write; it must not exist, or it must be empty"
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
