"""Inputs and outputs of commands that process many files, or standard input."""

import argparse
import json
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeAlias

from ..atomic_files import is_stream, refuse_inputs, remove_leftovers
from ..audio_errors import failure_kind
from ..find_files import describe_passed_over, find_files
from ..progress import Progress, write
from .arguments import UsageError


if TYPE_CHECKING:
    from .transcode import Counts, Encoder

Job: TypeAlias = tuple[Path | None, Path | None]
"""File to read and file to write; None is standard input or output."""


def add_files(parser: argparse.ArgumentParser, help: str) -> None:
    parser.add_argument("inputs", nargs="+", metavar="INPUT", help=help)
    parser.add_argument(
        "-o",
        "--output",
        required=True,
        help="output file if INPUT is one file or -; else a folder (created if missing), which keeps the subfolders "
        "of INPUT. -: standard output",
    )


def find_sources(inputs: list[str], suffixes: tuple[str, ...]) -> list[tuple[Path, Path]]:
    """
    Find input files, each with the relative path of its output: the path below the input folder, or the file's name.

    Standard error lists the files of folders that have other extensions.
    """
    sources: list[tuple[Path, Path]] = []
    passed_over: list[str] = []
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
    arguments: argparse.Namespace,
    suffixes: tuple[str, ...],
    new_suffix: str,
    formats: Sequence[str],
    format_is_given: bool = False,
) -> list[Job]:
    """
    Find the files to read, and name the file to write for each.

    Args:
        arguments: Arguments of the command.
        suffixes: Extensions of the files to read from a folder.
        new_suffix: Extension of the files to write to a folder.
        formats: Formats that a single output file may name by its extension, the usual ones first.
        format_is_given: Whether an option names the format, so that the extension of a single output file does not
            matter.

    Raises:
        UsageError: Inputs and output do not go together, or the extension of the output names no format.
        ValueError: Standard input or output does not go with the other arguments, a folder holds no such file, or an
            output would overwrite an input or another output.
        FileNotFoundError: There is no such input.
    """
    inputs, output = arguments.inputs, arguments.output
    from_pipe = "-" in inputs
    if from_pipe and len(inputs) > 1:
        raise ValueError(f"Got standard input among {len(inputs)} inputs, expected it alone.")
    for option, has_pipe, pipe in (("raw", from_pipe, "input"), ("raw_output", output == "-", "output")):
        if getattr(arguments, option, None) is not None and not has_pipe:
            raise ValueError(
                f"Got --{option.replace('_', '-')} without -, standard {pipe}. Leave it out: files have a header."
            )
    sources = [] if from_pipe else find_sources(inputs, suffixes)
    first = None if from_pipe else sources[0][0]
    if output == "-":
        if len(sources) > 1:
            raise ValueError(f"Got {len(sources)} files for standard output, expected one. Name a folder instead.")
        return [(first, None)]
    folder = Path(output)
    is_folder = folder.is_dir() or output.endswith(("/", "\\"))
    if from_pipe and is_folder:
        raise ValueError(f"Got the folder {output} for standard input, which has no name. Name a file as OUTPUT.")
    if len(inputs) == 1 and (from_pipe or Path(inputs[0]).is_file()) and not is_folder:
        if not format_is_given:
            _check_suffix(folder, formats)
        return _check_targets(arguments, [(first, folder)])
    if not is_folder and folder.suffix[1:].lower() in formats:
        raise UsageError(
            f"Got the file {output} as the output of {len(sources)} files, expected a folder: {folder.stem}/"
        )
    source_by_target: dict[Path, Path] = {}
    for source, relative_path in sources:
        target = folder / relative_path.with_suffix(new_suffix)
        if target in source_by_target:
            raise ValueError(
                f"{source_by_target[target]} and {source} would both become {target}. Give them different names or "
                "outputs."
            )
        source_by_target[target] = source
    return _check_targets(arguments, [(source, target) for target, source in source_by_target.items()])


def _check_suffix(path: Path, formats: Sequence[str]) -> None:
    """Raise UsageError if the extension of an output file names no format. A token file may have none."""
    suffix = path.suffix[1:].lower()
    if suffix in formats or is_stream(path) or (not suffix and "safetensors" in formats):
        return
    expected = ", ".join(f".{format}" for format in formats[:4])
    what = f"the extension .{suffix}" if suffix else "no extension"
    raise UsageError(f"Got {what} of the output {path}, expected {expected}, or a folder: {path}/")


def _check_targets(arguments: argparse.Namespace, jobs: list[Job]) -> list[Job]:
    """Return the jobs after removing temporary files that killed runs left in their output folders.

    Raises ValueError if an output is a folder, or is one of the inputs under any name.
    """
    targets = [target for _, target in jobs if target is not None]
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


def run_jobs(
    jobs: list[Job],
    work: Callable[[Path | None, Path | None], "Counts"],
    arguments: argparse.Namespace,
    model: "Encoder",
) -> int:
    """Run every job and report its result. Continue after a job that fails. Return the exit code."""
    with Progress(len(jobs), "files", shown=len(jobs) > 1) as progress:
        return _run_jobs(jobs, work, arguments, model, progress)


def _run_jobs(
    jobs: list[Job],
    work: Callable[[Path | None, Path | None], "Counts"],
    arguments: argparse.Namespace,
    model: "Encoder",
    progress: Progress,
) -> int:
    import torch

    failures = 0
    for number, (source, target) in enumerate(jobs):
        progress.update(number - progress.done)
        name = "standard input" if source is None else str(source)
        started = time.perf_counter()
        result: dict[str, Any]
        try:
            if target is not None and not is_stream(target):
                target.parent.mkdir(parents=True, exist_ok=True)
            counts = work(source, target)
        except (BrokenPipeError, ImportError):  # they end every job
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
            _report(arguments, result, f"{name}: failed: {reason}", target, failed=True)
            continue
        output = "standard output" if target is None else str(target)
        result = {"input": name, "output": output, **_facts(model, counts, time.perf_counter() - started)}
        message = (
            f"{name} -> {output}: {result['seconds']:.2f} s, {counts.num_tokens} tokens, "
            f"{result['times_real_time']:.1f} x real time"
        )
        if counts.window_seconds is not None:
            write(
                f"{name}: decoded in windows of {counts.window_seconds:g} s that overlap by "
                f"{counts.overlap_seconds:.3g} s, close to exact decoding. --window-seconds 0 decodes exactly, in "
                "memory that grows with the length",
                file=sys.stderr,
            )
        if counts.truncation is not None:
            failures += 1
            result |= {"error": str(counts.truncation), "kind": counts.truncation.kind}
            message = f"{name}: cut off: {counts.truncation} What came before was done: {result['seconds']:.2f} s"
        _report(arguments, result, message, target, failed=counts.truncation is not None)
    if failures and len(jobs) > 1:
        print(f"wavtokenizer {arguments.command}: {failures} of {len(jobs)} files failed", file=sys.stderr)
    return 1 if failures else 0


def _report(
    arguments: argparse.Namespace, result: dict[str, Any], message: str, target: Path | None, failed: bool
) -> None:
    """Print the result of one job, on standard error if standard output holds the output itself."""
    if arguments.json:
        write(json.dumps(result), file=sys.stderr if target is None else sys.stdout)
    elif failed or target is not None:
        write(message, file=sys.stderr if failed else sys.stdout)


def _facts(model: "Encoder", counts: "Counts", seconds: float) -> dict[str, Any]:
    """Return duration, speed and counts of one job that took `seconds`."""
    duration = counts.num_samples / model.config.sampling_rate
    return {
        "seconds": duration,
        "times_real_time": duration / seconds,
        **{name: value for name, value in vars(counts).items() if name != "truncation"},
    }
