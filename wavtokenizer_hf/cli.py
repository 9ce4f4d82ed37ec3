"""The command line: `wavtokenizer encode | decode | reconstruct | tokenize | export | evaluate | convert | checkpoints | export-model |
train | info`.

Exit codes: 0, all went well; 1, some of several files failed, or a pipe was cut off (each is named with its reason, the rest is
done); 2, the command cannot be carried out as given; 130, interrupted; 141, nobody reads standard output any more; 143, ended by
SIGTERM.
"""

import argparse
import os
import signal
import sys
import threading
from contextlib import contextmanager

from huggingface_hub.errors import StrictDataclassError

from .commands import convert, evaluate, export, export_model, info, sound, tokenize, train


def main(argv: list[str] | None = None) -> int:
    """Runs one command. `argv` are the arguments without the program's name; default: those of the process."""
    arguments = _parser().parse_args(argv)
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
    except (
        ValueError,
        OSError,
        ImportError,
        StrictDataclassError,
    ) as error:  # the last: a config.json that is refused
        print(f"wavtokenizer {arguments.command}: {' '.join(str(error).split())}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print(f"wavtokenizer {arguments.command}: interrupted", file=sys.stderr)
        return 130


@contextmanager
def _cleanup_on_sigterm():
    """Let SIGTERM raise SystemExit, so that temporary files are removed. Exit code 143, as for any ended process."""
    if threading.current_thread() is not threading.main_thread():  # where Python sets no handlers
        yield
        return
    process = os.getpid()

    def end(number, frame):
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


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="wavtokenizer",
        description="24 kHz audio to one stream of 40 or 75 tokens per second, and back.",
        epilog="Exit codes: 0 all went well, 1 some of several files failed, or a pipe was cut "
        "off, and the rest is done, 2 cannot be done as given, 130 interrupted, 141 nobody reads the "
        "output any more, 143 ended by SIGTERM.",
    )
    commands = parser.add_subparsers(dest="command", required=True, metavar="command")
    for command in (sound, tokenize, export, evaluate, convert, export_model, train, info):
        command.add(commands)
    return parser
