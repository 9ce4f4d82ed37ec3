"""The command line, `wavtokenizer COMMAND`.

Help, the version and the errors of wrong arguments appear without an import of torch or transformers, which takes
seconds.

Exit codes: 0, all went well; 1, some of several files failed, or a pipe was cut off (each is named with its reason,
the rest is done); 2, the command cannot be carried out as given; 130, interrupted; 141, nobody reads standard output
any more; 143, ended by SIGTERM.
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
    Run one command and return the exit code. `argv` holds the arguments after the program's name (default: sys.argv).
    """
    argv = sys.argv[1:] if argv is None else list(argv)
    if "_ARGCOMPLETE" in os.environ:
        _complete()
    parser, commands = _parsers(next((argument for argument in argv if not argument.startswith("-")), ""))
    arguments, unknown = parser.parse_known_args(argv)
    if unknown:  # argparse alone would print the usage of `wavtokenizer`, without that of the command
        commands[arguments.command].error(f"unrecognized arguments: {' '.join(unknown)}")
    if hasattr(sys.stdout, "reconfigure"):
        sys.stdout.reconfigure(errors="backslashreplace")  # names of files may be no UTF-8
    try:
        _refuse_empty(arguments)
        with _cleanup_on_sigterm():
            code = arguments.run(arguments)
        sys.stdout.flush()  # here, where an error is still met
        return code
    except BrokenPipeError:
        # nobody reads any more, as after `head`; Python would complain once more at its end, so it gets another place
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
    """Whether an error says what is wrong with the input, in one line, and is not a fault of this program."""
    hub = sys.modules.get("huggingface_hub.errors")  # imported here, it would take half a second
    refused_config = () if hub is None else (hub.StrictDataclassError,)
    return isinstance(error, (ValueError, OSError, ImportError, *refused_config))


@contextmanager
def _cleanup_on_sigterm() -> Iterator[None]:
    """Let SIGTERM raise SystemExit, so that temporary files are removed. Exit code 143, as for any ended process."""
    if threading.current_thread() is not threading.main_thread():  # where Python sets no handlers
        yield
        return
    process = os.getpid()

    def end(number: int, frame: object) -> None:
        if os.getpid() != process:  # a forked worker has nothing to clean up
            signal.signal(number, signal.SIG_DFL)
            os.kill(os.getpid(), number)
        raise SystemExit(128 + number)

    before = signal.signal(signal.SIGTERM, end)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before if before is not None else signal.SIG_DFL)


def _refuse_empty(arguments: argparse.Namespace) -> None:
    """Raises ValueError for an empty argument, as `"$UNSET"` is: as a path it would mean the current folder."""
    for name, value in vars(arguments).items():
        if value == "" or (isinstance(value, list) and "" in value):
            name = name.replace("inputs", "input").replace("_", "-").upper()
            raise ValueError(f"Got an empty {name}, expected a value. Is a variable of the shell not set?")


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        if "-m/--model" in message:
            message += " (-m bundled is the small model of this package)"
        super().error(message)


def _parser() -> argparse.ArgumentParser:
    """The parser with the arguments of all commands."""
    return _parsers(None)[0]


def _parsers(command: str | None) -> tuple[argparse.ArgumentParser, Mapping[str, argparse.ArgumentParser]]:
    """The parser, and those of the commands. `command` alone has its arguments; None: all have them."""
    parser = _Parser(
        prog="wavtokenizer",
        description="24 kHz audio to one stream of 40 or 75 tokens per second, and back.",
        epilog="Exit codes: 0 all went well, 1 some of several files failed, or a pipe was cut "
        "off, and the rest is done, 2 cannot be done as given, 130 interrupted, 141 nobody reads the "
        "output any more, 143 ended by SIGTERM. Completion in bash and zsh: pip install argcomplete, then "
        'eval "$(register-python-argcomplete wavtokenizer)".',
    )
    parser.add_argument("--version", action="version", version=f"wavtokenizer_hf {__version__}")
    commands = parser.add_subparsers(dest="command", required=True, metavar="command")
    wanted = [module for name, (module, _) in COMMANDS.items() if command in (None, name)]
    for name, (module, help) in COMMANDS.items():
        if module not in wanted:
            commands.add_parser(name, help=help)
        elif name not in commands.choices:
            import_module(f".commands.{module}", __package__).add(commands)
    return parser, commands.choices


def _complete() -> None:
    """Answer the shell, which asks for completions by this variable, if argcomplete is installed."""
    try:
        import argcomplete
    except ImportError:
        return
    argcomplete.autocomplete(_parser())
