"""Arguments that several commands have, and what becomes of them."""

import argparse
import json
import math
from collections.abc import Callable
from pathlib import Path

from . import COMMANDS


MODEL_HELP = (
    "bundled (the small model of this package, for a first try); name of a published checkpoint, as `wavtokenizer "
    "checkpoints` lists them (downloaded and converted on first use); folder; or OWNER/NAME on the Hub"
)


class UsageError(ValueError):
    """Arguments that do not go together. The command line prints the usage of the command before the message."""


def add_command(commands, name: str, run: Callable) -> argparse.ArgumentParser:
    help = COMMANDS[name][1]
    parser = commands.add_parser(name, help=help, description=help[0].upper() + help[1:] + ".")
    parser.add_argument("--json", action="store_true", help="print results as JSON, one object per line")
    parser.set_defaults(run=run)
    return parser


def add_model(parser: argparse.ArgumentParser, required: bool = True, decoder: bool = True) -> None:
    parser.add_argument("-m", "--model", required=required, help=MODEL_HELP)
    parser.add_argument("--revision", help="branch, tag or commit of MODEL on the Hub (default: main)")
    parser.add_argument(
        "--device", help="device of the model: cpu, cuda, cuda:1, mps (default: a GPU if there is one)"
    )
    if decoder:
        parser.add_argument(
            "--dtype",
            choices=("float32", "bfloat16", "float16"),
            default="float32",
            help="type in which the decoder computes (default: float32); tokens are always computed in float32",
        )


def load_model(arguments, encoder_only: bool = False, allow_exported: bool = True):
    quiet_transformers()

    import torch

    from .. import WavTokenizerEncoderModel, WavTokenizerModel, loading
    from ..export.wavtokenizer_onnx import CONFIG_NAME

    if Path(arguments.model, CONFIG_NAME).is_file():
        if not allow_exported:
            raise ValueError(
                f"{arguments.model} is an ONNX folder, expected a model. Measure what `wavtokenizer reconstruct` "
                "makes with it: --decoded."
            )
        return _load_exported(arguments)
    device = arguments.device or ("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(device)
    except RuntimeError as error:
        raise ValueError(f"Got the device {device!r}: {error}") from error
    model_class = WavTokenizerEncoderModel if encoder_only else WavTokenizerModel
    dtype = torch.float32 if encoder_only else getattr(torch, arguments.dtype)
    return loading.load_model(model_class, arguments.model, arguments.revision, device, dtype=dtype)


def add_channel(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--channel",
        default="mean",
        metavar="mean|left|right|N",
        help="channel to take of audio that has several: a name, or its number N from 0 (default: their mean)",
    )


def add_peak(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--peak-dbfs",
        type=_peak,
        default="model",
        metavar="DB|none|model",
        help="scale each clip to this peak level before it is encoded, in dBFS, at most 0, such as -3 for Apertus "
        "1.5; none: no scaling; model: as the model's preprocessor_config.json says (default)",
    )


def _peak(text: str) -> str | float:
    if text in ("model", "none"):
        return text
    try:
        level = float(text)
    except ValueError:
        level = math.nan
    if not -math.inf < level <= 0:
        raise argparse.ArgumentTypeError(f"got {text!r}, expected a level of at most 0 dBFS, none or model")
    return level


def quiet_transformers() -> None:
    """Turn off the progress bars of transformers ("Loading weights"), but not those of downloads from the Hub."""
    from huggingface_hub.utils import are_progress_bars_disabled, enable_progress_bars
    from transformers.utils import logging

    hidden = are_progress_bars_disabled()
    logging.disable_progress_bar()  # turns off those of huggingface_hub too
    if not hidden:
        enable_progress_bars()


def _load_exported(arguments):
    """A folder that `export-model` wrote, on the CPU."""
    from ..export import WavTokenizerOnnx

    for option, given in (("device", arguments.device), ("dtype", getattr(arguments, "dtype", None))):
        if given not in (None, "cpu", "float32"):
            raise ValueError(
                f"Got --{option} {given} for the ONNX folder {arguments.model}, which runs on the CPU as it is."
            )
    return WavTokenizerOnnx(arguments.model)


def print_facts(facts: dict, as_json: bool) -> None:
    if as_json:
        print(json.dumps(facts))
        return
    width = max(map(len, facts))
    for name, value in facts.items():
        print(
            f"{name.replace('_', ' '):<{width}}  {value:g}"
            if isinstance(value, float)
            else f"{name.replace('_', ' '):<{width}}  {value}"
        )
