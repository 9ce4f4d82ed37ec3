"""`wavtokenizer convert`: an original checkpoint to a folder."""

import json
import sys
from contextlib import redirect_stdout

from .arguments import add_command


def add(commands) -> None:
    convert = add_command(
        commands, "convert", _convert, "an original checkpoint to a folder for transformers and the Hub"
    )
    convert.add_argument("checkpoint", help="the original's .ckpt, or a state dict (.pt, .bin, .safetensors)")
    convert.add_argument("--config", help="the original's YAML file, to be checked against the checkpoint")
    convert.add_argument("-o", "--output", required=True, help="folder to make")
    convert.add_argument(
        "--with-discriminators",
        action="store_true",
        help="keep the discriminators in a second file, so that training can go on from them",
    )


def _convert(arguments) -> int:
    from conversion.convert import convert

    with redirect_stdout(sys.stderr if arguments.json else sys.stdout):
        folder = convert(arguments.checkpoint, arguments.output, arguments.config, arguments.with_discriminators)
    if arguments.json:
        from .. import WavTokenizerConfig

        config = WavTokenizerConfig.from_pretrained(folder)
        print(json.dumps({"output": str(folder), "codebook_fingerprint": config.codebook_fingerprint}))
    return 0
