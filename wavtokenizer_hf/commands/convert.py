"""`wavtokenizer convert | checkpoints`: an original checkpoint to a folder, and those that are known by name."""

import json
import sys
from contextlib import redirect_stdout

from .arguments import add_command, print_facts, quiet_transformers


def add(commands) -> None:
    from ..conversion import command

    convert = add_command(commands, "convert", _convert)
    command.add_arguments(convert)
    convert.add_argument(
        "--to-original",
        action="store_true",
        help="convert back: FILE is a converted folder, and DIR gets a .ckpt and a YAML file for the original code "
        "and for llama.cpp's converter to GGUF",
    )
    add_command(commands, "checkpoints", _checkpoints)


def _convert(arguments) -> int:
    from ..conversion import command

    quiet_transformers()
    if arguments.to_original:
        return _to_original(arguments)
    with redirect_stdout(sys.stderr if arguments.json else sys.stdout):
        results, code = command.run(arguments)
    if arguments.json:
        print(*map(json.dumps, results), sep="\n")
    return code


def _to_original(arguments) -> int:
    from ..conversion.to_original import to_original

    others = (
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
    given = [name for name in others if getattr(arguments, name)]
    if given or len(arguments.files) != 1:
        what = f"--{given[0].replace('_', '-')}" if given else f"{len(arguments.files)} inputs"
        raise ValueError(f"Got {what} with --to-original, expected one converted folder and --output alone.")
    print_facts({"output": str(to_original(arguments.files[0], arguments.output))}, arguments.json)
    return 0


def _checkpoints(arguments) -> int:
    from ..conversion import command

    print(command.checkpoints_table(arguments.json))
    return 0
