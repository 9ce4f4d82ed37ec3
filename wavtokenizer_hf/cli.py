"""The command line: `wavtokenizer encode | decode | reconstruct | tokenize | evaluate | convert | checkpoints | train | info`.

Exit codes: 0, all went well; 1, some of several files failed, or a pipe was cut off (each is named with its reason, the rest is
done); 2, the command cannot be carried out as given; 130, interrupted; 141, nobody reads standard output any more.
"""

import argparse
import json
import math
import os
import sys
import time
from collections.abc import Callable
from contextlib import contextmanager, redirect_stdout
from pathlib import Path

import numpy as np
from huggingface_hub.errors import StrictDataclassError

from .token_file import FORMATS
from .training import settings


def main(argv: list[str] | None = None) -> int:
    """Runs one command. `argv` are the arguments without the program's name; default: those of the process."""
    arguments = _parser().parse_args(argv)
    try:
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


def _parser() -> argparse.ArgumentParser:
    from conversion import command as conversion

    parser = argparse.ArgumentParser(
        prog="wavtokenizer",
        description="24 kHz audio to one stream of 40 or 75 tokens per second, and back.",
        epilog="Exit codes: 0 all went well, 1 some of several files failed, or a pipe was cut "
        "off, and the rest is done, 2 cannot be done as given.",
    )
    commands = parser.add_subparsers(dest="command", required=True, metavar="command")

    encode = _add(commands, "encode", _encode, "sound files to token files")
    _add_files(encode, f"sound files, or folders to search for them; {_SOUND_PIPE}")
    _add_model(encode)
    encode.add_argument(
        "--format",
        choices=FORMATS,
        help="of token files; default: the ending of OUTPUT, else safetensors. safetensors and json remember the "
        "model and the exact length, npy and txt hold the numbers alone. To standard output txt flows, one number a line",
    )
    _add_raw_input(encode)

    decode = _add(commands, "decode", _decode, "token files to sound files")
    _add_files(decode, "token files, or folders to search for them; -: tokens from standard input")
    _add_model(decode)
    decode.add_argument(
        "--format", choices=FORMATS, help="of INPUT; default: its ending, or for standard input its first two bytes"
    )
    _add_sound(decode)

    reconstruct = _add(commands, "reconstruct", _reconstruct, "sound files to tokens and back, to hear what is lost")
    _add_files(reconstruct, f"sound files, or folders to search for them; {_SOUND_PIPE}")
    _add_model(reconstruct)
    _add_raw_input(reconstruct)
    _add_sound(reconstruct)
    reconstruct.add_argument(
        "--plot",
        action="store_true",
        help="also write a .png with both spectrograms and the tokens (files up to five minutes)",
    )

    _add_tokenize(commands)
    _add_evaluate(commands)

    convert = _add(commands, "convert", _convert, "an original checkpoint to a folder for transformers and the Hub")
    conversion.add_arguments(convert)

    _add(commands, "checkpoints", _checkpoints, "the published checkpoints that `convert` knows by name")

    train = _add(commands, "train", _train, "a new model, or more training for a converted one")
    settings.add_arguments(train)

    info = _add(commands, "info", _info, "what a model, or a token file, is")
    info.add_argument("source", help="name or folder of a model, or a token file (.safetensors, .json)")
    return parser


def _add(commands, name: str, run: Callable, help: str) -> argparse.ArgumentParser:
    parser = commands.add_parser(name, help=help, description=help[0].upper() + help[1:] + ".")
    parser.add_argument("--json", action="store_true", help="print results as JSON, one object a line")
    parser.set_defaults(run=run)
    return parser


def _add_files(parser: argparse.ArgumentParser, help: str) -> None:
    parser.add_argument("inputs", nargs="+", metavar="INPUT", help=help)
    parser.add_argument(
        "-o",
        "--output",
        required=True,
        help="a file for one input file; -: standard output; else a folder, in which the inputs' folders are mirrored",
    )


def _add_model(parser: argparse.ArgumentParser, required: bool = True) -> None:
    parser.add_argument("-m", "--model", required=required, help="name on the Hub, or folder")
    parser.add_argument("--revision", help="branch, tag or commit of MODEL on the Hub")
    parser.add_argument("--device", help="cpu, cuda, cuda:1, mps; default: a GPU if there is one")
    parser.add_argument(
        "--dtype",
        choices=("float32", "bfloat16", "float16"),
        default="float32",
        help="of the decoder (default float32); tokens are always computed in float32",
    )


_SOUND_PIPE = "-: a WAV stream on standard input, taken as it comes"
_RAW = "raw samples (16-bit little-endian integers, mono)"


def _add_raw_input(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--raw", type=int, metavar="RATE", help=f"standard input holds {_RAW} at RATE Hz")


def _add_sound(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--sound-format", choices=("wav", "flac", "ogg", "mp3"), default="wav", help="in a folder; default wav"
    )
    parser.add_argument(
        "--raw-output",
        action="store_true",
        default=None,
        help=f"write {_RAW} to standard output instead of a WAV stream",
    )
    parser.add_argument(
        "--window-seconds",
        type=float,
        metavar="SECONDS",
        help="decode what is longer than this in windows of this length, in memory that does not grow; the sound is then "
        "close to the exact one, and standard error says so. 0: always exact. Default: files up to five minutes exact, "
        "longer ones in windows of 10, pipes in windows of 3, which is also how long their sound is behind",
    )
    parser.add_argument(
        "--overlap-seconds",
        type=float,
        metavar="SECONDS",
        help="what a window has in common with the next; default 1, or a third of the window if that is less",
    )


def _add_tokenize(commands) -> None:
    tokenize = _add(commands, "tokenize", _tokenize, "a corpus to a folder of Parquet, resumable")
    tokenize.description += (
        " Killed at any time and run again, it goes on where it was; clips added to SOURCE since are picked up. A clip that "
        "cannot be read is listed in failures.jsonl with the reason. The rows do not depend on the number of processes or "
        "on the batches. Needs the extra `bulk`."
    )
    tokenize.add_argument(
        "source",
        metavar="SOURCE",
        help="a folder of sound files, tar shards or Parquet, or a glob of them in quotes; a list of paths (.txt, or .csv or "
        ".jsonl with further columns); a dataset on disk, or its name on the Hub",
    )
    tokenize.add_argument("-m", "--model", required=True, help="name on the Hub, or folder")
    tokenize.add_argument("--revision", help="branch, tag or commit of MODEL on the Hub")
    tokenize.add_argument("-o", "--output", required=True, help="folder, new or of an earlier run")
    tokenize.add_argument(
        "--column", help="of the sound, or of the paths in a list; default: audio, and in lists also path or file_name"
    )
    tokenize.add_argument("--dataset-config", help="of a dataset on the Hub")
    tokenize.add_argument("--dataset-revision", help="of a dataset on the Hub")
    tokenize.add_argument("--split", default="train", help="of a dataset (default train)")
    tokenize.add_argument("--device", help="cpu, cuda, cuda:1; default: each process has a GPU, if there is one")
    tokenize.add_argument(
        "--num-processes",
        type=int,
        help="with a model each; default: one for each GPU, or for two processors, and 2 with Ray",
    )
    tokenize.add_argument(
        "--num-readers",
        type=int,
        help="threads in each process that decode and resample ahead; default: its processors",
    )
    tokenize.add_argument(
        "--batch-seconds", type=float, default=120, help="of sound that are encoded at once (default 120)"
    )
    tokenize.add_argument(
        "--part-size",
        type=int,
        help="clips in a Parquet file, which is what a crash costs for each process; default: up to 2000",
    )
    tokenize.add_argument(
        "--shard", default="0/1", metavar="I/N", help="only shard I of N, from 0; all may write to one OUTPUT at once"
    )
    tokenize.add_argument(
        "--on-error", choices=("record", "fail"), default="record", help="list failed clips, or stop at the first"
    )
    tokenize.add_argument("--retry-failed", action="store_true", help="try again what failed in earlier runs")
    tokenize.add_argument("--engine", choices=("processes", "ray"), default="processes", help="default processes")
    tokenize.add_argument("--ray-address", help="of a Ray cluster; default: Ray is started on this machine")
    tokenize.add_argument("--push-to-hub", metavar="NAME", help="upload OUTPUT to this dataset on the Hub in the end")


def _add_evaluate(commands) -> None:
    evaluate = _add(
        commands, "evaluate", _evaluate, "how much of the sound survives a model, or any other codec, in numbers"
    )
    evaluate.description += (
        " Encodes and decodes each file with MODEL and compares what comes back with what went in: means with 95 % "
        "intervals, and with --compare or --decoded also the differences, file by file. A file that cannot be read and a "
        "number that cannot be computed are listed with the reason, count as failures, and are left out of the means. "
        "Needs the extra `evaluation`."
    )
    evaluate.add_argument("--audio", nargs="+", required=True, metavar="INPUT", help="sound files, or folders of them")
    _add_model(evaluate, required=False)
    evaluate.add_argument("--compare", metavar="MODEL", help="a second model, measured on the same files")
    evaluate.add_argument(
        "--decoded",
        metavar="FOLDER",
        help="what any other codec decoded: sound files with the names and sub-folders of those in INPUT, in any format",
    )
    evaluate.add_argument(
        "-o", "--output", metavar="FOLDER", help="for report.json, files.csv, metrics.png and codebook.png"
    )
    evaluate.add_argument(
        "--metrics",
        nargs="+",
        metavar="NAME",
        help="only these of pesq_wb, stoi, si_sdr, mel_distance, stft_distance, f0_error, voicing_f1, utmos; one that "
        "cannot run here is then an error",
    )
    evaluate.add_argument(
        "--utmos",
        metavar="FILE",
        help="adds UTMOS: a TorchScript that takes float32 audio (1, samples) at 16 kHz and gives one number; without it "
        "UTMOS is reported as not run, nothing is downloaded",
    )
    evaluate.add_argument(
        "--num-workers",
        type=int,
        default=os.cpu_count() or 1,
        help="processes for the metrics (default: one per processor; 0: none); results do not depend on it",
    )


# ---------------------------------------------------------------------------------------------------------------------
# Commands
# ---------------------------------------------------------------------------------------------------------------------


def _encode(arguments) -> int:
    from . import audio, pipes
    from .token_file import TokenFile
    from .transcode import Tally, codes_of

    named_format = Path(arguments.output).suffix[1:]
    known = named_format in FORMATS
    format = arguments.format or (named_format if known and len(arguments.inputs) == 1 else "safetensors")
    jobs = _jobs(arguments, audio.SUFFIXES, f".{format}")
    model = _load_model(arguments, encoder_only=True)
    fingerprint = model.codebook_fingerprint

    def work(source: Path | None, target: Path | None) -> Tally:
        tally, pieces = Tally(), []
        with _sound_blocks(source, arguments, model, tally) as blocks:
            for codes in tally.count_codes(codes_of(model, blocks, _whole_seconds(source)), tell=lambda _: None):
                pieces.append(codes.astype(np.uint16))
                if target is None and format == "txt":
                    pipes.write_codes(sys.stdout.buffer, codes)
        tokens = TokenFile(
            audio_codes=np.concatenate(pieces),
            model=arguments.model,
            codebook_fingerprint=fingerprint,
            sampling_rate=model.config.sampling_rate,
            hop_length=model.config.hop_length,
            num_samples=tally.num_samples,
        )
        if target is not None:
            tokens.save(target, format)
        elif format != "txt":
            sys.stdout.buffer.write(tokens.to_bytes(format))
            sys.stdout.buffer.flush()
        return tally

    return _each(jobs, work, arguments, model)


def _decode(arguments) -> int:
    from .transcode import Tally, audio_of, cut_to_length

    jobs = _sound_jobs(arguments, tuple(f".{format}" for format in FORMATS))
    model = _load_model(arguments)
    _windows(arguments, model, live=False)  # refuses what makes no sense before any file is met

    def work(source: Path | None, target: Path | None) -> Tally:
        tally = Tally()
        pieces, num_samples = _read_tokens(source, arguments.format, model)
        windows = _windows(arguments, model, live=num_samples is None)
        seconds = 0 if num_samples is None else num_samples / model.config.sampling_rate
        with _progress(seconds) as bar:
            pieces = tally.count_codes(pieces, tell=lambda count: bar.update(count / model.config.frame_rate))
            blocks = audio_of(model, pieces, windows, tally)
            if num_samples is not None:
                blocks = cut_to_length(blocks, lambda: num_samples, model.config.hop_length)
            with _writing_sound(target, arguments, model, num_samples) as write:
                for block in blocks:
                    write(block)
                    tally.num_samples += len(block)
        return tally

    return _each(jobs, work, arguments, model)


def _reconstruct(arguments) -> int:
    from . import audio
    from .transcode import WHOLE_SECONDS, Tally, audio_of, codes_of, cut_to_length

    jobs = _sound_jobs(arguments, audio.SUFFIXES)
    if arguments.plot and any(None in job for job in jobs):
        raise ValueError("Got --plot for a pipe, expected files: a picture is of a whole clip, and has a name.")
    model = _load_model(arguments)
    windows = _windows(arguments, model, live=jobs[0][0] is None)

    def work(source: Path | None, target: Path | None) -> Tally:
        if source is not None and target is not None and target.exists() and source.samefile(target):
            raise ValueError(f"{target} would be overwritten by its own reconstruction. Name another output.")
        if arguments.plot and audio.seconds(source) > WHOLE_SECONDS:
            raise ValueError(f"Got --plot for {audio.seconds(source):.0f} s, expected at most {WHOLE_SECONDS} s.")
        tally, waveform, all_codes, reconstruction = Tally(), [], [], []

        def keep(pieces, kept: list):
            for piece in pieces:
                if arguments.plot:
                    kept.append(piece)
                yield piece

        with _sound_blocks(source, arguments, model, tally) as blocks:
            codes = codes_of(model, keep(blocks, waveform), _whole_seconds(source))
            codes = tally.count_codes(keep(codes, all_codes), tell=lambda _: None)
            decoded = audio_of(model, codes, windows, tally)
            decoded = cut_to_length(decoded, lambda: tally.num_samples, model.config.hop_length)
            with _writing_sound(target, arguments, model) as write:
                for block in keep(decoded, reconstruction):
                    write(block)
        if arguments.plot:
            from .plots import plot_reconstruction

            clips = [np.concatenate(pieces) for pieces in (waveform, reconstruction, all_codes)]
            plot_reconstruction(target.with_suffix(".png"), *clips, model.config.sampling_rate, source.name)
        return tally

    return _each(jobs, work, arguments, model)


def _tokenize(arguments) -> int:
    from .bulk import tokenize

    index, slash, number = arguments.shard.partition("/")
    if not (slash and index.isdecimal() and number.isdecimal()):
        raise ValueError(f"Got --shard {arguments.shard}, expected I/N, for example 0/8.")
    options = {
        name: value
        for name, value in vars(arguments).items()
        if name not in ("command", "run", "json", "source", "model", "output", "shard")
    }
    result = tokenize(
        arguments.source,
        arguments.model,
        arguments.output,
        shard=(int(index), int(number)),
        progress=True,
        **options,
    )
    facts = {
        "output": arguments.output,
        "clips": result.total.num_clips,
        "clips_done_now": result.done_now.num_clips,
        "clips_failed": len(result.failures),
        "hours": result.total.num_samples / result.sampling_rate / 3600,
        "tokens": result.total.num_codes,
        "hours_per_hour": result.done_now.num_samples / result.sampling_rate / result.seconds,
    }
    _print_facts(facts, arguments.json)
    for clip, reason in list(result.failures.items())[:10]:
        print(f"{clip}: failed: {reason}", file=sys.stderr)
    if result.failures:
        print(
            f"wavtokenizer tokenize: {len(result.failures)} clips failed; all of them are in "
            f"{Path(arguments.output, 'failures.jsonl')}",
            file=sys.stderr,
        )
    return 1 if result.failures else 0


def _evaluate(arguments) -> int:
    from . import audio
    from .evaluation import DecodedFolder, Model, evaluate

    if arguments.num_workers < 0:
        raise ValueError(f"Got --num-workers {arguments.num_workers}, expected 0 or more.")
    references = _sources(arguments.audio, audio.SUFFIXES)
    systems = [
        Model(name, _load_model(argparse.Namespace(**{**vars(arguments), "model": name, "revision": revision})))
        for name, revision in ((arguments.model, arguments.revision), (arguments.compare, None))
        if name is not None
    ]
    if arguments.decoded is not None:
        systems.append(DecodedFolder(arguments.decoded))
    if not systems:
        raise ValueError("Got nothing to measure. Give --model, --decoded, or both.")
    if arguments.output is not None:  # a folder that cannot be made should stop the work before it begins
        Path(arguments.output).mkdir(parents=True, exist_ok=True)
    report = evaluate(
        references,
        systems,
        metrics=arguments.metrics,
        utmos_weights=arguments.utmos,
        num_workers=min(arguments.num_workers, len(references)),
        progress=sys.stderr.isatty(),
    )
    written = [] if arguments.output is None else report.save(arguments.output)
    if arguments.json:
        print(json.dumps(report.to_dict(), allow_nan=False))
    else:
        print(report.table())
        print(*(f"wrote {path}" for path in written), sep="\n", end="\n" if written else "")
    for failure in report.failures:
        names = ", ".join(failure["metrics"])
        print(f"{failure['file']}: {failure['system']}: {names}: {failure['reason']}", file=sys.stderr)
    return 1 if report.failures else 0


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


def _train(arguments) -> int:
    from .training import train

    state = train(settings.read_arguments(arguments))
    facts = {
        "output": state.settings.output,
        "steps": state.step,
        "best_validation_score": state.best_score,
        "clips_skipped": len(state.skipped),
    }
    if state.accelerator.is_main_process:
        _print_facts(facts, arguments.json)
    return 0


def _info(arguments) -> int:
    if Path(arguments.source).is_file():
        from .token_file import TokenFile

        tokens = TokenFile.load(arguments.source)
        facts = {
            "model": tokens.model,
            "codebook_fingerprint": tokens.codebook_fingerprint,
            "num_tokens": len(tokens.audio_codes),
            "num_samples": tokens.num_samples,
            "sampling_rate": tokens.sampling_rate,
            "seconds": tokens.num_samples / tokens.sampling_rate,
            "tokens_per_second": tokens.sampling_rate / tokens.hop_length,
        }
    else:
        from . import WavTokenizerModel

        model = _from_pretrained(WavTokenizerModel, arguments.source)
        config = model.config
        facts = {
            "model": arguments.source,
            "codebook_fingerprint": model.codebook_fingerprint,
            "sampling_rate": config.sampling_rate,
            "tokens_per_second": config.frame_rate,
            "codebook_size": config.codebook_size,
            "bits_per_second": config.bit_rate,
            "samples_per_token": config.hop_length,
            "num_parameters": model.num_parameters(),
            "dtype": str(model.head.linear.weight.dtype).removeprefix("torch."),
        }
    _print_facts(facts, arguments.json)
    return 0


# ---------------------------------------------------------------------------------------------------------------------
# What the commands share
# ---------------------------------------------------------------------------------------------------------------------


def _sources(inputs: list[str], suffixes: tuple[str, ...]) -> list[tuple[Path, Path]]:
    """Files and, for each, its place: the path below the folder that was named, or the file's name."""
    sources = []
    for name in map(Path, inputs):
        if name.is_dir():
            found = sorted(file for file in name.rglob("*") if file.suffix.lower() in suffixes and file.is_file())
            if not found:
                raise ValueError(f"The folder {name} holds no file that ends in {', '.join(suffixes)}.")
            sources += [(file, file.relative_to(name)) for file in found]
        elif name.is_file():
            sources.append((name, Path(name.name)))
        else:
            raise FileNotFoundError(f"There is no file or folder {name}.")
    return sources


def _jobs(arguments, suffixes: tuple[str, ...], new_suffix: str) -> list[tuple[Path | None, Path | None]]:
    """Pairs of a file to read and the file to write for it; None is standard input or output."""
    inputs, output = arguments.inputs, arguments.output
    from_pipe = "-" in inputs
    if from_pipe and len(inputs) > 1:
        raise ValueError(f"Got standard input among {len(inputs)} inputs, expected it alone.")
    for option, used, pipe in (("raw", from_pipe, "input"), ("raw_output", output == "-", "output")):
        if getattr(arguments, option, None) is not None and not used:
            raise ValueError(f"Got --{option.replace('_', '-')} without -, standard {pipe}. Files say what they hold.")
    sources = [(None, None)] if from_pipe else _sources(inputs, suffixes)
    if output == "-":
        if len(sources) != 1:
            raise ValueError(f"Got {len(sources)} files for standard output, expected one. Name a folder instead.")
        return [(sources[0][0], None)]
    folder = Path(output)
    is_folder = folder.is_dir() or output.endswith(("/", "\\"))
    if from_pipe and is_folder:
        raise ValueError(f"Got the folder {output} for standard input, which has no name. Name a file as OUTPUT.")
    if len(inputs) == 1 and (from_pipe or Path(inputs[0]).is_file()) and not is_folder:
        return [(sources[0][0], folder)]
    jobs, seen = [], {}
    for source, place in sources:
        target = folder / place.with_suffix(new_suffix)
        if target in seen:
            raise ValueError(
                f"{seen[target]} and {source} would both become {target}. Give them different names or outputs."
            )
        seen[target] = source
        jobs.append((source, target))
    return jobs


def _sound_jobs(arguments, suffixes: tuple[str, ...]) -> list[tuple[Path | None, Path | None]]:
    return _jobs(arguments, suffixes, f".{arguments.sound_format}")


def _each(jobs: list[tuple[Path | None, Path | None]], work: Callable, arguments, model) -> int:
    """Does every job, says what came of it, goes on after a failed one; returns the exit code."""
    import torch
    from tqdm import tqdm

    failures = 0
    for source, target in tqdm(jobs, unit="file", disable=len(jobs) == 1 or not sys.stderr.isatty()):
        name = "standard input" if source is None else str(source)
        started = time.perf_counter()
        try:
            if target is not None:
                target.parent.mkdir(parents=True, exist_ok=True)
            tally = work(source, target)
        except BrokenPipeError:
            raise
        except (ValueError, OSError, torch.OutOfMemoryError) as error:
            if len(jobs) == 1:
                raise ValueError(f"{name}: {error}") from error
            failures += 1
            _tell(arguments, {"input": name, "error": str(error)}, f"{name}: failed: {error}", target, failed=True)
            continue
        output = "standard output" if target is None else str(target)
        result = {"input": name, "output": output, **_figures(model, tally, time.perf_counter() - started)}
        message = (
            f"{name} -> {output}: {result['seconds']:.2f} s, {tally.num_tokens} tokens, "
            f"{result['times_real_time']:.1f} x real time"
        )
        if tally.window_seconds is not None:
            tqdm.write(
                f"{name}: decoded in windows of {tally.window_seconds:g} s that share {tally.overlap_seconds:.3g} s, close to "
                "the exact sound; --window-seconds 0 gives that, in memory that grows with the length",
                file=sys.stderr,
            )
        if tally.cut_off is not None:
            failures += 1
            result["error"] = str(tally.cut_off)
            message = f"{name}: cut off: {tally.cut_off} What came before was done: {result['seconds']:.2f} s"
        _tell(arguments, result, message, target, failed=tally.cut_off is not None)
    if failures and len(jobs) > 1:
        print(f"wavtokenizer {arguments.command}: {failures} of {len(jobs)} files failed", file=sys.stderr)
    return 1 if failures else 0


def _tell(arguments, result: dict, message: str, target: Path | None, failed: bool) -> None:
    """Says what came of one job; on standard error where standard output holds the result itself."""
    from tqdm import tqdm

    if arguments.json:
        tqdm.write(json.dumps(result), file=sys.stderr if target is None else sys.stdout)
    elif failed or target is not None:
        tqdm.write(message, file=sys.stderr if failed else sys.stdout)


def _whole_seconds(source: Path | None) -> float:
    """Up to what length audio is encoded in one piece: what comes through a pipe is wanted as soon as it comes."""
    from .transcode import WHOLE_SECONDS

    return 0 if source is None else WHOLE_SECONDS


def _windows(arguments, model, live: bool):
    """How to decode, by --window-seconds and --overlap-seconds; refuses what makes no sense."""
    from .long_audio import DecodeStream
    from .transcode import WHOLE_SECONDS, Windows

    seconds, overlap = arguments.window_seconds, arguments.overlap_seconds
    if seconds == 0:
        if overlap is not None:
            raise ValueError("Got --overlap-seconds with --window-seconds 0, which uses no windows. Leave one out.")
        return Windows(seconds=0, overlap_seconds=0, above_seconds=math.inf)
    above_seconds = 0 if live or seconds is not None else WHOLE_SECONDS
    seconds = (3.0 if live else 10.0) if seconds is None else seconds
    overlap = min(1.0, seconds / 3) if overlap is None else overlap
    if not (math.isfinite(seconds) and math.isfinite(overlap)):
        raise ValueError(f"Got a window of {seconds} s and an overlap of {overlap} s, expected finite numbers.")
    DecodeStream(model, seconds, overlap)  # raises
    return Windows(seconds, overlap, above_seconds)


@contextmanager
def _sound_blocks(source: Path | None, arguments, model, tally):
    """The audio of a file, or of standard input, in blocks, counted by `tally` and shown by a bar."""
    from . import audio, pipes

    rate = model.config.sampling_rate
    if source is None:
        blocks, seconds = pipes.read_sound(sys.stdin.buffer, rate, arguments.raw), 0
    else:
        # as long as the chunks that the model itself encodes best in
        blocks = audio.read_blocks(source, rate, block_seconds=5 if model.device.type == "cpu" else 60)
        seconds = audio.seconds(source)
    with _progress(seconds) as bar:
        yield tally.count_audio(blocks, tell=lambda count: bar.update(count / rate))


def _progress(seconds: float):
    """A bar of seconds of audio, for what takes long and before someone's eyes."""
    from tqdm import tqdm

    from .transcode import WHOLE_SECONDS

    form = "{l_bar}{bar}| {n:.0f}/{total:.0f} s of audio [{elapsed}<{remaining}]"
    hidden = seconds <= WHOLE_SECONDS or not sys.stderr.isatty()
    return tqdm(total=seconds, bar_format=form, disable=hidden, leave=False)


def _writing_sound(target: Path | None, arguments, model, num_samples: int | None = None):
    """A context that gives a function to write blocks of audio with, to a file or to standard output."""
    from . import audio, pipes

    rate = model.config.sampling_rate
    if target is not None:
        return audio.writing(target, rate)
    return pipes.writing_sound(sys.stdout.buffer, rate, num_samples, bool(arguments.raw_output))


def _load_model(arguments, encoder_only: bool = False):
    import torch

    from . import WavTokenizerEncoderModel, WavTokenizerModel

    device = arguments.device or ("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(device)
    except RuntimeError as error:
        raise ValueError(f"Got the device {device!r}: {error}") from error
    model_class = WavTokenizerEncoderModel if encoder_only else WavTokenizerModel
    model = _from_pretrained(
        model_class, arguments.model, revision=arguments.revision or "main", dtype=getattr(torch, arguments.dtype)
    )
    try:
        return model.eval().to(device)
    except (RuntimeError, AssertionError) as error:  # torch asserts where it was built without that device
        raise ValueError(f"Cannot use the device {device}: {error}") from error


def _from_pretrained(model_class, name: str, **arguments):
    from safetensors import SafetensorError

    try:
        model, info = model_class.from_pretrained(name, output_loading_info=True, **arguments)
    except (OSError, SafetensorError, RuntimeError) as error:  # damaged files, and not every message names the model
        raise ValueError(f"Cannot load the model {name!r}: {error}") from error
    if info["missing_keys"]:  # transformers would fill them with random numbers
        missing = ", ".join(sorted(info["missing_keys"])[:3])
        raise ValueError(f"The model {name!r} lacks {len(info['missing_keys'])} tensors, such as {missing}.")
    return model


def _read_tokens(source: Path | None, format: str | None, model) -> tuple:
    """Codes in pieces, and the number of samples that they stand for; refuses those of another codebook.

    The number is None for txt on standard input, which is taken as it comes.
    """
    from . import pipes
    from .token_file import TokenFile, bare_codes_from_bytes, format_of

    stdin = sys.stdin.buffer
    start = stdin.read(2) if source is None else b""
    if source is None and not start:
        raise ValueError("Got no tokens: standard input is empty.")
    name = "standard input" if source is None else source
    format = format or (format_of(start) if source is None else source.suffix[1:])
    if format in ("npy", "txt"):
        print(
            f"{name}: says nothing of the model that made it; decoded unchecked and to whole tokens", file=sys.stderr
        )
        if format == "txt" and source is None:
            return pipes.read_codes(stdin, start), None
    content = start + stdin.read() if source is None else source.read_bytes()
    if format in ("npy", "txt"):
        codes = bare_codes_from_bytes(content, format)
        num_samples = len(codes) * model.config.hop_length
    else:
        tokens = TokenFile.from_bytes(content, format)
        model.check_codebook_fingerprint(tokens.codebook_fingerprint)
        codes, num_samples = tokens.audio_codes, tokens.num_samples
    return (codes[start : start + 1024] for start in range(0, len(codes), 1024)), num_samples


def _figures(model, tally, seconds: float) -> dict:
    duration = tally.num_samples / model.config.sampling_rate
    return {
        "seconds": duration,
        "times_real_time": duration / seconds,
        **{name: value for name, value in vars(tally).items() if name != "cut_off"},
    }


def _print_facts(facts: dict, as_json: bool) -> None:
    if as_json:
        print(json.dumps(facts))
        return
    width = max(map(len, facts))
    for name, value in facts.items():
        print(
            f"{name.replace('_', ' '):<{width}}  {value:g}"
            if isinstance(value, float)
            else f"{name.replace('_', ' '):<{width}}  {value}"
        )
