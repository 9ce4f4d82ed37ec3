"""`wavtokenizer convert | checkpoints`: an original checkpoint to a folder, and those that are known by name."""

import json
import sys
from contextlib import redirect_stdout

from .arguments import add_command


def add(commands) -> None:
    from conversion import command

    convert = add_command(
        commands, "convert", _convert, "an original checkpoint to a folder for transformers and the Hub"
    )
    command.add_arguments(convert)
    add_command(commands, "checkpoints", _checkpoints, "the published checkpoints that `convert` knows by name")


def _convert(arguments) -> int:
    from conversion import command

    with redirect_stdout(sys.stderr if arguments.json else sys.stdout):
        results, code = command.run(arguments)
    if arguments.json:
        print(*map(json.dumps, results), sep="\n")
    return code


def _checkpoints(arguments) -> int:
    from conversion import command

    print(command.checkpoints_table(arguments.json))
    return 0
