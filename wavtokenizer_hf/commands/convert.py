"""`wavtokenizer convert | checkpoints`: convert original checkpoints, and list the published ones."""

import argparse
import json
import sys
from contextlib import redirect_stdout

from .arguments import Commands, add_command, print_facts, quiet_transformers


def add(commands: Commands) -> None:
    from ..conversion import command

    convert = add_command(
        commands,
        "convert",
        _convert,
        "The checkpoint is a FILE, or a published one that --checkpoint downloads. For example: wavtokenizer convert "
        "--checkpoint small-speech-75 -o wavtokenizer-small-75",
    )
    command.add_arguments(convert)
    convert.add_argument(
        "--to-original",
        action="store_true",
        help="convert back: FILE is a converted folder, and DIR gets a .ckpt and a YAML file for the reference "
        "implementation and for llama.cpp's converter to GGUF",
    )
    add_command(
        commands,
        "checkpoints",
        _checkpoints,
        "Prints name, codes per second, training data, repository and file of each. A checkpoint is downloaded and "
        "converted when its name is first used.",
    )


def _convert(arguments: argparse.Namespace) -> int:
    from ..conversion import command

    quiet_transformers()
    if arguments.to_original:
        return _to_original(arguments)
    with redirect_stdout(sys.stderr if arguments.json else sys.stdout):
        results, code = command.run(arguments)
    if arguments.json:
        print(*map(json.dumps, results), sep="\n")
    return code


def _to_original(arguments: argparse.Namespace) -> int:
    from ..conversion.to_original import to_original

    other_options = (
        "checkpoint",
        "all",
        "revision",
        "config",
        "average",
        "with_discriminators",
        "push_to_hub",
        "private",
        "create_pr",
    )
    given = [name for name in other_options if getattr(arguments, name)]
    if given or len(arguments.files) != 1:
        got = f"--{given[0].replace('_', '-')}" if given else f"{len(arguments.files)} inputs"
        raise ValueError(f"Got {got} with --to-original, expected one converted folder and --output alone.")
    print_facts({"output": str(to_original(arguments.files[0], arguments.output))}, arguments.json)
    return 0


def _checkpoints(arguments: argparse.Namespace) -> int:
    from ..conversion import command

    print(command.checkpoints_table(arguments.json))
    return 0
