"""`wavtokenizer convert | checkpoints`: an original checkpoint to a folder, and those that are known by name."""

import json
import sys
from contextlib import redirect_stdout

from conversion import command

from .arguments import add_command


def add(commands) -> None:
    convert = add_command(
        commands, "convert", _convert, "an original checkpoint to a folder for transformers and the Hub"
    )
    command.add_arguments(convert)
    add_command(commands, "checkpoints", _checkpoints, "the published checkpoints that `convert` knows by name")


def _convert(arguments) -> int:
    with redirect_stdout(sys.stderr if arguments.json else sys.stdout):
        results, code = command.run(arguments)
    if arguments.json:
        print(*map(json.dumps, results), sep="\n")
    return code


def _checkpoints(arguments) -> int:
    print(command.checkpoints_table(arguments.json))
    return 0
