"""Arguments that several commands have, and what becomes of them."""

import argparse
import json
from collections.abc import Callable


MODEL_HELP = "name on the Hub, or folder; bundled: the small model that comes with this package, for a first try"


def add_command(commands, name: str, run: Callable, help: str) -> argparse.ArgumentParser:
    parser = commands.add_parser(name, help=help, description=help[0].upper() + help[1:] + ".")
    parser.add_argument("--json", action="store_true", help="print results as JSON, one object a line")
    parser.set_defaults(run=run)
    return parser


def add_model(parser: argparse.ArgumentParser, required: bool = True, decoder: bool = True) -> None:
    parser.add_argument("-m", "--model", required=required, help=MODEL_HELP)
    parser.add_argument("--revision", help="branch, tag or commit of MODEL on the Hub")
    parser.add_argument("--device", help="cpu, cuda, cuda:1, mps; default: a GPU if there is one")
    if decoder:
        parser.add_argument(
            "--dtype",
            choices=("float32", "bfloat16", "float16"),
            default="float32",
            help="of the decoder (default float32); tokens are always computed in float32",
        )


def load_model(arguments, encoder_only: bool = False):
    import torch

    from .. import WavTokenizerEncoderModel, WavTokenizerModel

    device = arguments.device or ("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(device)
    except RuntimeError as error:
        raise ValueError(f"Got the device {device!r}: {error}") from error
    model_class = WavTokenizerEncoderModel if encoder_only else WavTokenizerModel
    dtype = torch.float32 if encoder_only else getattr(torch, arguments.dtype)
    model = from_pretrained(model_class, arguments.model, revision=arguments.revision or "main", dtype=dtype)
    try:
        return model.eval().to(device)
    except (RuntimeError, AssertionError) as error:  # torch asserts where it was built without that device
        raise ValueError(f"Cannot use the device {device}: {error}") from error


def from_pretrained(model_class, name: str, **arguments):
    from safetensors import SafetensorError

    try:
        model, info = model_class.from_pretrained(find_model(name), output_loading_info=True, **arguments)
    except (OSError, SafetensorError, RuntimeError) as error:  # damaged files, and not every message names the model
        raise ValueError(f"Cannot load the model {name!r}: {error}") from error
    if info["missing_keys"]:  # transformers would fill them with random numbers
        missing = ", ".join(sorted(info["missing_keys"])[:3])
        raise ValueError(f"The model {name!r} lacks {len(info['missing_keys'])} tensors, such as {missing}.")
    return model


def find_model(name: str) -> str:
    """`bundled` -> where that is; any other name as it came."""
    from .. import bundled_model

    return str(bundled_model()) if name == "bundled" else name


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
