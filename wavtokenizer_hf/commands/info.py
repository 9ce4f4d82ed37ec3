"""`wavtokenizer info`: describe a model, a token file or a token folder."""

import argparse
import math
from pathlib import Path
from typing import Any

from ..model_names import find_model, is_exported
from .arguments import MODEL_HELP, Commands, add_command, print_facts, quiet_transformers


def add(commands: Commands) -> None:
    info = add_command(
        commands,
        "info",
        _info,
        "Prints the sampling rate, the tokens per second, the codebook fingerprint and more. Tokens and models belong "
        "together if their fingerprints are equal.",
        example="bundled",
    )
    info.add_argument(
        "source",
        metavar="SOURCE",
        help=f"model: {MODEL_HELP}; or folder of `wavtokenizer export-model`, token file (.safetensors, .json), or "
        "folder of `wavtokenizer tokenize`",
    )
    info.add_argument("--revision", help="branch, tag or commit of a model on the Hub (default: main)")


def _info(arguments: argparse.Namespace) -> int:
    from ..export.token_folder import is_token_folder

    if Path(arguments.source).is_file():
        from ..token_file import TokenFile

        tokens = TokenFile.load(arguments.source)
        facts: dict[str, Any] = {
            "model": tokens.model,
            "codebook_fingerprint": tokens.codebook_fingerprint,
            "num_tokens": len(tokens.audio_codes),
            "num_samples": tokens.num_samples,
            "sampling_rate": tokens.sampling_rate,
            "seconds": tokens.num_samples / tokens.sampling_rate,
            "tokens_per_second": tokens.sampling_rate / tokens.hop_length,
        }
    elif is_token_folder(arguments.source):
        facts = _folder_facts(arguments.source)
    elif is_exported(arguments.source):
        facts = _exported_facts(arguments.source)
    else:
        find_model(arguments.source, arguments.revision)
        quiet_transformers()

        from .. import WavTokenizerModel
        from ..loading import load_model

        model = load_model(WavTokenizerModel, arguments.source, arguments.revision)
        config = model.config
        facts = {
            "model": arguments.source,
            "codebook_fingerprint": model.codebook_fingerprint,
            "sampling_rate": config.sampling_rate,
            "tokens_per_second": config.frame_rate,
            "codebook_size": config.codebook_size,
            "bits_per_second": config.bit_rate,
            "samples_per_token": config.hop_length,
            "num_parameters": model.num_parameters(),
            "dtype": str(model.head.linear.weight.dtype).removeprefix("torch."),
        }
    print_facts(facts, arguments.json)
    return 0


def _exported_facts(path: str) -> dict[str, Any]:
    from ..export import WavTokenizerOnnx

    model = WavTokenizerOnnx(path)
    config = model.config
    return {
        "model": path,
        "format": "onnx",
        "codebook_fingerprint": model.codebook_fingerprint,
        "sampling_rate": config.sampling_rate,
        "tokens_per_second": config.frame_rate,
        "codebook_size": config.codebook_size,
        "bits_per_second": config.frame_rate * math.log2(config.codebook_size),
        "samples_per_token": config.hop_length,
        "files": ", ".join(model.files),
    }


def _folder_facts(path: str) -> dict[str, Any]:
    from ..export.token_folder import TokenFolder

    folder = TokenFolder(path)
    num_samples, num_codes = folder.lengths()
    return {
        "model": folder.settings["model"],
        "codebook_fingerprint": folder.codebook_fingerprint,
        "codebook_size": folder.settings["codebook_size"],
        "num_clips": len(num_samples),
        "hours": int(num_samples.sum()) / folder.sampling_rate / 3600,
        "num_tokens": int(num_codes.sum()),
        "sampling_rate": folder.sampling_rate,
        "tokens_per_second": folder.sampling_rate / folder.hop_length,
        "complete": folder.complete,
        "columns": ", ".join(folder.column_names),
    }
