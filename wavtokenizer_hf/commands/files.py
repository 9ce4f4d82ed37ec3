"""Commands that do something to each of many files, or to standard input."""

import argparse
import json
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path

from ..atomic_files import is_stream, refuse_inputs, remove_leftovers
from ..audio_errors import failure_kind
from ..find_files import describe_passed_over, find_files
from ..progress import Progress, write
from .arguments import UsageError


def add_files(parser: argparse.ArgumentParser, help: str) -> None:
    parser.add_argument("inputs", nargs="+", metavar="INPUT", help=help)
    parser.add_argument(
        "-o",
        "--output",
        required=True,
        help="output file for a single input file; -: standard output; else a folder, which gets the subfolders of "
        "the inputs",
    )


def find_sources(inputs: list[str], suffixes: tuple[str, ...]) -> list[tuple[Path, Path]]:
    """Files and, for each, its place: the path below the folder that was named, or the file's name.

    Standard error tells what is passed over in folders.
    """
    sources, passed_over = [], []
    for name in map(Path, inputs):
        if name.is_dir():
            found = find_files(name, suffixes)
            if not found.files:
                raise ValueError(f"The folder {name} holds no file that ends in {', '.join(suffixes)}.")
            sources += [(Path(file), Path(file).relative_to(name)) for file in found.files]
            passed_over += found.passed_over
        elif name.is_file():
            sources.append((name, Path(name.name)))
        else:
            raise FileNotFoundError(f"There is no file or folder {name}.")
    if passed_over:
        print(describe_passed_over(passed_over), file=sys.stderr)
    return sources


def find_jobs(
    arguments, suffixes: tuple[str, ...], new_suffix: str, formats: Sequence[str], format_is_given: bool = False
) -> list[tuple[Path | None, Path | None]]:
    """
    Find the files to read, and name the file to write for each.

    Args:
        arguments: Arguments of the command.
        suffixes: Extensions of files that are read from a folder.
        new_suffix: Extension of files that are written to a folder.
        formats: Formats that a single output file may name by its extension, the usual ones first.
        format_is_given: Whether an option names the format, so that the extension of a single output file does not
            matter.

    Returns:
        Pairs of a file to read and the file to write; None is standard input or output.

    Raises:
        UsageError: Inputs and output do not go together, or the extension of the output names no format.
        FileNotFoundError: There is no such input.
    """
    inputs, output = arguments.inputs, arguments.output
    from_pipe = "-" in inputs
    if from_pipe and len(inputs) > 1:
        raise ValueError(f"Got standard input among {len(inputs)} inputs, expected it alone.")
    for option, used, pipe in (("raw", from_pipe, "input"), ("raw_output", output == "-", "output")):
        if getattr(arguments, option, None) is not None and not used:
            raise ValueError(f"Got --{option.replace('_', '-')} without -, standard {pipe}. Files say what they hold.")
    sources = [(None, None)] if from_pipe else find_sources(inputs, suffixes)
    if output == "-":
        if len(sources) != 1:
            raise ValueError(f"Got {len(sources)} files for standard output, expected one. Name a folder instead.")
        return [(sources[0][0], None)]
    folder = Path(output)
    is_folder = folder.is_dir() or output.endswith(("/", "\\"))
    if from_pipe and is_folder:
        raise ValueError(f"Got the folder {output} for standard input, which has no name. Name a file as OUTPUT.")
    if len(inputs) == 1 and (from_pipe or Path(inputs[0]).is_file()) and not is_folder:
        if not format_is_given:
            _check_suffix(folder, formats)
        return _without_overwriting(arguments, [(sources[0][0], folder)])
    if not is_folder and folder.suffix[1:].lower() in formats:
        raise UsageError(
            f"Got the file {output} as the output of {len(sources)} files, expected a folder: {folder.stem}/"
        )
    jobs = []
    seen: dict[Path, Path | None] = {}
    for source, place in sources:
        target = folder / place.with_suffix(new_suffix)
        if target in seen:
            raise ValueError(
                f"{seen[target]} and {source} would both become {target}. Give them different names or outputs."
            )
        seen[target] = source
        jobs.append((source, target))
    return _without_overwriting(arguments, jobs)


def _check_suffix(path: Path, formats: Sequence[str]) -> None:
    """Raise UsageError if the extension of an output file names no format. A token file may have none."""
    suffix = path.suffix[1:].lower()
    if suffix in formats or is_stream(path) or (not suffix and "safetensors" in formats):
        return
    expected = ", ".join(f".{format}" for format in formats[:4])
    what = f"the extension .{suffix}" if suffix else "no extension"
    raise UsageError(f"Got {what} of the output {path}, expected {expected}, or a folder: {path}/")


def _without_overwriting(
    arguments, jobs: list[tuple[Path | None, Path | None]]
) -> list[tuple[Path | None, Path | None]]:
    """The jobs. Raises ValueError if an output is a folder, or an input of any of them, under whatever name."""
    targets = [target for _, target in jobs]
    if getattr(arguments, "plot", False):
        targets += [target.with_suffix(".png") for target in targets]
    for target in targets:
        if target.is_dir():
            raise ValueError(
                f"The output {target} is a folder, expected a file. Move it away, or name another output."
            )
    refuse_inputs(targets, [source for source, _ in jobs if source is not None])
    for folder in {target.parent for target in targets}:
        remove_leftovers(folder)
    return jobs


def run_jobs(jobs: list[tuple[Path | None, Path | None]], work: Callable, arguments, model) -> int:
    """Does every job, says what came of it, goes on after a failed one; returns the exit code."""
    with Progress(len(jobs), "files", shown=len(jobs) > 1) as progress:
        return _run_jobs(jobs, work, arguments, model, progress)


def _run_jobs(jobs, work: Callable, arguments, model, progress: Progress) -> int:
    import torch

    failures = 0
    for number, (source, target) in enumerate(jobs):
        progress.update(number - progress.done)
        name = "standard input" if source is None else str(source)
        started = time.perf_counter()
        try:
            if target is not None and not is_stream(target):
                target.parent.mkdir(parents=True, exist_ok=True)
            tally = work(source, target)
        except BrokenPipeError:
            raise
        except ImportError:
            raise
        except Exception as error:
            is_known = isinstance(error, (ValueError, OSError, MemoryError, torch.OutOfMemoryError))
            if len(jobs) == 1:
                if is_known:
                    raise ValueError(f"{name}: {error}") from error
                raise
            failures += 1
            reason = str(error) if is_known else f"{type(error).__name__}: {error}"
            result = {"input": name, "error": reason, "kind": failure_kind(error)}
            _tell(arguments, result, f"{name}: failed: {reason}", target, failed=True)
            continue
        output = "standard output" if target is None else str(target)
        result = {"input": name, "output": output, **_figures(model, tally, time.perf_counter() - started)}
        message = (
            f"{name} -> {output}: {result['seconds']:.2f} s, {tally.num_tokens} tokens, "
            f"{result['times_real_time']:.1f} x real time"
        )
        if tally.window_seconds is not None:
            write(
                f"{name}: decoded in windows of {tally.window_seconds:g} s that share {tally.overlap_seconds:.3g} s, "
                "close to the exact sound; --window-seconds 0 gives that, in memory that grows with the length",
                file=sys.stderr,
            )
        if tally.cut_off is not None:
            failures += 1
            result |= {"error": str(tally.cut_off), "kind": tally.cut_off.kind}
            message = f"{name}: cut off: {tally.cut_off} What came before was done: {result['seconds']:.2f} s"
        _tell(arguments, result, message, target, failed=tally.cut_off is not None)
    if failures and len(jobs) > 1:
        print(f"wavtokenizer {arguments.command}: {failures} of {len(jobs)} files failed", file=sys.stderr)
    return 1 if failures else 0


def _tell(arguments, result: dict, message: str, target: Path | None, failed: bool) -> None:
    """Says what came of one job; on standard error where standard output holds the result itself."""
    if arguments.json:
        write(json.dumps(result), file=sys.stderr if target is None else sys.stdout)
    elif failed or target is not None:
        write(message, file=sys.stderr if failed else sys.stdout)


def _figures(model, tally, seconds: float) -> dict:
    duration = tally.num_samples / model.config.sampling_rate
    return {
        "seconds": duration,
        "times_real_time": duration / seconds,
        **{name: value for name, value in vars(tally).items() if name != "cut_off"},
    }
