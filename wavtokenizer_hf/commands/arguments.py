"""Arguments that several commands share, and functions that evaluate them."""

import argparse
import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeAlias

from . import COMMANDS


Commands: TypeAlias = "argparse._SubParsersAction[argparse.ArgumentParser]"
"""What the `add` function of a command's module takes. A string, because the class has no parameters at run time."""

MODEL_HELP = (
    "bundled (small model of this package, for a first try), name of a published checkpoint (see `wavtokenizer "
    "checkpoints`; downloaded and converted on first use), folder, or OWNER/NAME on the Hub"
)
REVISION_HELP = "branch, tag or commit of MODEL on the Hub (default: main)"


class UsageError(ValueError):
    """Arguments that do not go together. The command line prints the usage of the command before the message."""


def add_command(
    commands: Commands,
    name: str,
    run: Callable[[argparse.Namespace], int],
    details: str = "",
    example: str | None = None,
) -> argparse.ArgumentParser:
    """
    Add a command and return its parser.

    Args:
        commands: Action that holds the parsers of all commands.
        name: Name of the command, a key of `COMMANDS`.
        run: Function that runs the command and returns the exit code.
        details: Sentences that follow the one-line help at the top of the help text.
        example: Arguments of an example, for the end of the help text.
    """
    help = COMMANDS[name][1]
    description = f"{help[0].upper()}{help[1:]}. {details}".rstrip()
    epilog = None if example is None else f"Example: wavtokenizer {name} {example}"
    parser = commands.add_parser(name, help=help, description=description, epilog=epilog)
    parser.add_argument("--json", action="store_true", help="print results as JSON, one object per line")
    parser.set_defaults(run=run)
    return parser


def add_model(parser: argparse.ArgumentParser, required: bool = True, decoder: bool = True) -> None:
    parser.add_argument("-m", "--model", required=required, help=MODEL_HELP)
    parser.add_argument("--revision", help=REVISION_HELP)
    parser.add_argument(
        "--device", help="device of the model: cpu, cuda, cuda:1, mps (default: cuda if there is a GPU, else cpu)"
    )
    if decoder:
        parser.add_argument(
            "--dtype",
            choices=("float32", "bfloat16", "float16"),
            default="float32",
            help="data type of the decoder (default: float32); encoder and codebook always use float32",
        )


def load_model(arguments: argparse.Namespace, encoder_only: bool = False, allow_exported: bool = True) -> Any:
    """
    Load the model that --model names.

    Args:
        arguments: Arguments of the command.
        encoder_only: Whether to load the encoder without the decoder.
        allow_exported: Whether the model may be an ONNX folder.

    Returns:
        A `WavTokenizerOnnx` for an ONNX folder; else a `WavTokenizerEncoderModel` or `WavTokenizerModel`.

    Raises:
        ValueError: The model cannot be loaded, or not with these arguments.
    """
    quiet_transformers()

    import torch

    from .. import WavTokenizerEncoderModel, WavTokenizerModel, loading
    from ..export.wavtokenizer_onnx import CONFIG_NAME

    if Path(arguments.model, CONFIG_NAME).is_file():
        if not allow_exported:
            raise ValueError(
                f"{arguments.model} is an ONNX folder, expected a model. Run `wavtokenizer reconstruct` with it, and "
                "pass the output folder as --decoded."
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
        help="channel of audio that has several: left, right, a number from 0, or mean of all (default: mean)",
    )


def add_peak(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--peak-dbfs",
        type=_peak,
        default="model",
        metavar="DB|none|model",
        help="peak level to scale each clip to before encoding, in dBFS, at most 0, such as -3 for Apertus 1.5. none: "
        "no scaling. Default: model, which follows the model's preprocessor_config.json",
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

    hub_bars_disabled = are_progress_bars_disabled()
    logging.disable_progress_bar()  # also disables those of huggingface_hub
    if not hub_bars_disabled:
        enable_progress_bars()


def _load_exported(arguments: argparse.Namespace) -> Any:
    """Load a folder that `export-model` wrote, on the CPU."""
    from ..export import WavTokenizerOnnx

    for option, value in (("device", arguments.device), ("dtype", getattr(arguments, "dtype", None))):
        if value not in (None, "cpu", "float32"):
            raise ValueError(
                f"Got --{option} {value} for the ONNX folder {arguments.model}, which runs on the CPU in the data "
                "types of its files. Leave the option out."
            )
    return WavTokenizerOnnx(arguments.model)


def print_facts(facts: dict[str, Any], as_json: bool) -> None:
    """Print names and values as a table or as one JSON object."""
    if as_json:
        print(json.dumps(facts))
        return
    width = max(map(len, facts))
    for name, value in facts.items():
        text = f"{value:g}" if isinstance(value, float) else f"{value}"
        print(f"{name.replace('_', ' '):<{width}}  {text}")
