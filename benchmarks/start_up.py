"""Measure the start-up time of the command line: help, version and wrong arguments, compared with `python -c pass`.

    python benchmarks/start_up.py [--repeats 5]

Prints the shortest wall time of each command in seconds. No command here needs torch, which takes seconds to import.
"""

import argparse
import subprocess
import sys
import time
from pathlib import Path


ROOT = Path(__file__).parent.parent
COMMANDS = (
    "--help", "--version", "checkpoints", "encode --help", "decode --help", "reconstruct --help", "tokenize --help",
    "export --help", "evaluate --help", "convert --help", "export-model --help", "train --help", "demo --help",
    "info --help",
    "nonsense", "encode", "encode absent.wav -m bundled -o tokens.json", "encode README.md -m bundled -o tokens.foo",
    "tokenize corpus -o tokens", "train --no-such-option",
)  # fmt: skip


def shortest_time(arguments: list[str], repeats: int) -> float:
    """Return the shortest wall time of `python ARGUMENTS`, in seconds."""
    times = []
    for _ in range(repeats):
        started = time.perf_counter()
        subprocess.run([sys.executable, *arguments], cwd=ROOT, capture_output=True)
        times.append(time.perf_counter() - started)
    return min(times)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--repeats", type=int, default=5, help="runs of each command; the shortest counts (default 5)")
    repeats = parser.parse_args().repeats
    print(f"{shortest_time(['-c', 'pass'], repeats):6.3f} s  python -c pass")
    for command in COMMANDS:
        print(f"{shortest_time(['-m', 'wavtokenizer_hf', *command.split()], repeats):6.3f} s  wavtokenizer {command}")


if __name__ == "__main__":
    main()
