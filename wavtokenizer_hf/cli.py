"""The command line, `wavtokenizer COMMAND`.

Help, the version and errors of wrong arguments do not import torch or transformers, which takes seconds.

Exit codes: 0, success; 1, some of several files failed, or a pipe was cut off (each is reported with its reason, the
rest is done); 2, the command cannot be carried out as given; 130, interrupted; 141, standard output was closed; 143,
ended by SIGTERM.
"""

import argparse
import os
import signal
import sys
import threading
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from importlib import import_module
from typing import NoReturn

from . import __version__
from .commands import COMMANDS
from .commands.arguments import UsageError


def main(argv: Sequence[str] | None = None) -> int:
    """
    Run one command and return the exit code. `argv` holds the arguments after the program's name, by default those of
    sys.argv.
    """
    argv = sys.argv[1:] if argv is None else list(argv)
    if "_ARGCOMPLETE" in os.environ:
        _complete()
    parser, commands = _parsers(next((argument for argument in argv if not argument.startswith("-")), ""))
    arguments, unknown = parser.parse_known_args(argv)
    if unknown:  # argparse alone would print the usage of `wavtokenizer`, without that of the command
        commands[arguments.command].error(f"unrecognized arguments: {' '.join(unknown)}")
    if hasattr(sys.stdout, "reconfigure"):
        sys.stdout.reconfigure(errors="backslashreplace")  # file names need not be UTF-8
    try:
        _refuse_empty(arguments)
        with _cleanup_on_sigterm():
            code = arguments.run(arguments)
        sys.stdout.flush()  # here, so that a BrokenPipeError is handled below
        return code
    except BrokenPipeError:
        # the reader closed the pipe, as `head` does. Python flushes standard output again when it exits, which would
        # raise a second error, so redirect it to /dev/null
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 141
    except KeyboardInterrupt:
        print(f"wavtokenizer {arguments.command}: interrupted", file=sys.stderr)
        return 130
    except Exception as error:
        if not _is_about_input(error):
            raise
        if isinstance(error, UsageError):
            commands[arguments.command].print_usage(sys.stderr)
        print(f"wavtokenizer {arguments.command}: {' '.join(str(error).split())}", file=sys.stderr)
        return 2


def _is_about_input(error: Exception) -> bool:
    """Return whether an error is about the input, so that one line explains it, and not a bug of this program."""
    hub = sys.modules.get("huggingface_hub.errors")  # an import would take half a second
    refused_config = () if hub is None else (hub.StrictDataclassError,)
    return isinstance(error, (ValueError, OSError, ImportError, *refused_config))


@contextmanager
def _cleanup_on_sigterm() -> Iterator[None]:
    """Let SIGTERM raise SystemExit with exit code 143, so that temporary files are removed."""
    if threading.current_thread() is not threading.main_thread():  # Python sets signal handlers only there
        yield
        return
    process = os.getpid()

    def handle(number: int, frame: object) -> None:
        if os.getpid() != process:  # a forked worker has nothing to clean up
            signal.signal(number, signal.SIG_DFL)
            os.kill(os.getpid(), number)
        raise SystemExit(128 + number)

    previous = signal.signal(signal.SIGTERM, handle)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, previous if previous is not None else signal.SIG_DFL)


def _refuse_empty(arguments: argparse.Namespace) -> None:
    """Raise ValueError for an empty argument such as `"$UNSET"`, which as a path would mean the current folder."""
    for name, value in vars(arguments).items():
        if value == "" or (isinstance(value, list) and "" in value):
            name = name.replace("inputs", "input").replace("_", "-").upper()
            raise ValueError(f"Got an empty {name}, expected a value. Is a shell variable unset?")


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        if "-m/--model" in message:
            message += " (-m bundled is the small model of this package)"
        super().error(message)


def _parser() -> argparse.ArgumentParser:
    """Return the parser with the arguments of all commands."""
    return _parsers(None)[0]


def _parsers(command: str | None) -> tuple[argparse.ArgumentParser, Mapping[str, argparse.ArgumentParser]]:
    """Return the main parser and the parsers of the commands.

    Only the parser of `command` gets its arguments, because adding them imports a module. None: all parsers get them.
    """
    parser = _Parser(
        prog="wavtokenizer",
        description="Encode 24 kHz audio as one stream of 40 or 75 tokens per second, and decode the tokens. "
        "`wavtokenizer COMMAND --help` describes a command.",
        epilog="Exit codes: 0 success, 1 some of several files failed or a pipe was cut off (the rest is done), 2 the "
        "command cannot be carried out as given, 130 interrupted, 141 standard output was closed, 143 ended by "
        "SIGTERM. Completion in bash and zsh: pip install argcomplete, then run "
        'eval "$(register-python-argcomplete wavtokenizer)".',
    )
    parser.add_argument("--version", action="version", version=f"wavtokenizer_hf {__version__}")
    commands = parser.add_subparsers(dest="command", required=True, metavar="command")
    selected_modules = [module for name, (module, _) in COMMANDS.items() if command in (None, name)]
    for name, (module, help) in COMMANDS.items():
        if module not in selected_modules:
            commands.add_parser(name, help=help)
        elif name not in commands.choices:
            import_module(f".commands.{module}", __package__).add(commands)
    return parser, commands.choices


def _complete() -> None:
    """Answer a completion request of the shell, if argcomplete is installed."""
    try:
        import argcomplete
    except ImportError:
        return
    argcomplete.autocomplete(_parser())
