"""`wavtokenizer encode | decode | reconstruct`: audio to codes, codes to audio, and both."""

import argparse
import math
import sys
from contextlib import contextmanager
from pathlib import Path

from ..atomic_files import atomic_write, is_stream
from ..audio_errors import check_channel
from ..find_files import SUFFIXES, TOKEN_FORMATS, WRITABLE_FORMATS
from ..limited_files import read_file
from ..model_names import find_model
from ..progress import Progress
from .arguments import add_channel, add_command, add_model, add_peak, load_model
from .files import add_files, find_jobs, run_jobs
from .token_folders import token_clips


_SOUND_PIPE = "-: a WAV stream on standard input, encoded while it comes in"
_RAW = "raw samples (16-bit little-endian integers, mono)"


def add(commands) -> None:
    encode = add_command(commands, "encode", _encode)
    add_files(encode, f"audio files, or folders to search for them; {_SOUND_PIPE}")
    add_model(encode, decoder=False)
    encode.add_argument(
        "--format",
        choices=TOKEN_FORMATS,
        help="format of the token files (default: the extension of OUTPUT, else safetensors). safetensors and json "
        "record the model and the exact length; npy and txt hold the numbers alone. On standard output txt is a "
        "stream, one number per line",
    )
    _add_raw_input(encode)
    add_channel(encode)
    add_peak(encode)

    decode = add_command(commands, "decode", _decode)
    add_files(
        decode,
        "token files, folders to search for them, or a token folder of `wavtokenizer tokenize`; -: tokens on "
        "standard input",
    )
    add_model(decode)
    decode.add_argument(
        "--id", nargs="+", metavar="ID", help="ids of the clips of a token folder to decode (default: all)"
    )
    decode.add_argument(
        "--format",
        choices=TOKEN_FORMATS,
        help="format of INPUT (default: its extension; of standard input its first two bytes)",
    )
    _add_sound(decode)

    reconstruct = add_command(commands, "reconstruct", _reconstruct)
    add_files(reconstruct, f"audio files, or folders to search for them; {_SOUND_PIPE}")
    add_model(reconstruct)
    _add_raw_input(reconstruct)
    add_channel(reconstruct)
    add_peak(reconstruct)
    _add_sound(reconstruct)
    reconstruct.add_argument(
        "--plot",
        action="store_true",
        help="also write a PNG picture of both spectrograms and the tokens (files of up to five minutes)",
    )


def _add_raw_input(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--raw", type=int, metavar="RATE", help=f"standard input holds {_RAW} at this sample rate, in Hz"
    )


def _add_sound(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--audio-format",
        choices=("wav", "flac", "ogg", "mp3"),
        default="wav",
        help="format of audio files in an output folder (default: wav)",
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
        help="decode audio longer than SECONDS in overlapping windows (constant memory, approximate; standard error "
        "says so). 0: always exact. Default: files of up to five minutes exact, longer ones in windows of 10 s, "
        "pipes in windows of 3 s, which is also their latency",
    )
    parser.add_argument(
        "--overlap-seconds",
        type=float,
        metavar="SECONDS",
        help="overlap of two windows (default: 0.25, or a third of the window if that is less)",
    )


def _encode(arguments) -> int:
    named_format = Path(arguments.output).suffix[1:]
    known = named_format in TOKEN_FORMATS
    format = arguments.format or (named_format if known and len(arguments.inputs) == 1 else "safetensors")
    check_channel(arguments.channel)
    jobs = find_jobs(arguments, SUFFIXES, f".{format}", TOKEN_FORMATS, format_is_given=arguments.format is not None)
    find_model(arguments.model, arguments.revision)

    import numpy as np

    from .. import pipes
    from ..token_file import TokenFile
    from .transcode import Counts, iter_codes

    model = load_model(arguments, encoder_only=True)
    peak_level = _target_peak(arguments, model)
    fingerprint = model.codebook_fingerprint

    def work(source: Path | None, target: Path | None) -> Counts:
        counts, pieces = Counts(), []
        with _sound_blocks(source, arguments, model, counts, peak_level) as (blocks, _):
            for codes in counts.count_codes(iter_codes(model, blocks, _whole_seconds(source)), report=lambda _: None):
                pieces.append(codes.astype(np.uint16))
                if target is None and format == "txt":
                    pipes.write_codes(sys.stdout.buffer, codes)
        tokens = TokenFile(
            audio_codes=np.concatenate(pieces),
            model=arguments.model,
            codebook_fingerprint=fingerprint,
            sampling_rate=model.config.sampling_rate,
            hop_length=model.config.hop_length,
            num_samples=counts.num_samples,
        )
        if target is not None:
            tokens.save(target, format)
        elif format != "txt":
            sys.stdout.buffer.write(tokens.to_bytes(format))
            sys.stdout.buffer.flush()
        return counts

    return run_jobs(jobs, work, arguments, model)


def _decode(arguments) -> int:
    clips = token_clips(arguments)  # of a token folder; else None
    token_files = tuple(f".{format}" for format in TOKEN_FORMATS)
    jobs = clips.jobs if clips is not None else _sound_jobs(arguments, token_files)
    find_model(arguments.model, arguments.revision)

    from .transcode import Counts, cut_to_length, iter_audio

    model = load_model(arguments)
    if clips is not None:
        clips.folder.check_model(model)
    _windows(arguments, model, live=False)  # refuses what makes no sense before any file is met

    def work(source: Path | None, target: Path | None) -> Counts:
        counts = Counts()
        if clips is not None:
            pieces, num_samples = clips.read(source, model)
        else:
            pieces, num_samples = _read_tokens(source, arguments.format, model)
        windows = _windows(arguments, model, live=num_samples is None)
        seconds = 0 if num_samples is None else num_samples / model.config.sampling_rate
        with Progress(seconds, "s of audio", shown=seconds > 0) as progress:
            pieces = counts.count_codes(pieces, report=lambda count: progress.update(count / model.config.frame_rate))
            blocks = iter_audio(model, pieces, windows, counts)
            if num_samples is not None:
                blocks = cut_to_length(blocks, lambda: num_samples, model.config.hop_length)
            with _writing_sound(target, arguments, model, num_samples) as write:
                for block in blocks:
                    write(block)
                    counts.num_samples += len(block)
        return counts

    return run_jobs(jobs, work, arguments, model)


def _reconstruct(arguments) -> int:
    jobs = _sound_jobs(arguments, SUFFIXES)
    if arguments.plot and any(None in job for job in jobs):
        raise ValueError("Got --plot for a pipe, expected files: a picture is of a whole clip, and has a name.")
    check_channel(arguments.channel)
    find_model(arguments.model, arguments.revision)

    import numpy as np

    from .. import audio
    from ..plots import plot_reconstruction
    from .transcode import WHOLE_SECONDS, Counts, cut_to_length, iter_audio, iter_codes

    model = load_model(arguments)
    peak_level = _target_peak(arguments, model)
    windows = _windows(arguments, model, live=jobs[0][0] is None)

    def work(source: Path | None, target: Path | None) -> Counts:
        if arguments.plot and audio.seconds(source) > WHOLE_SECONDS:
            raise ValueError(f"Got --plot for {audio.seconds(source):.0f} s, expected at most {WHOLE_SECONDS} s.")
        counts = Counts()
        waveform: list = []
        all_codes: list = []
        reconstruction: list = []

        def keep(pieces, kept: list):
            for piece in pieces:
                if arguments.plot:
                    kept.append(piece)
                yield piece

        with _sound_blocks(source, arguments, model, counts, peak_level, passes=2) as (blocks, progress):
            codes = iter_codes(model, keep(blocks, waveform), _whole_seconds(source))
            codes = counts.count_codes(keep(codes, all_codes), report=lambda _: None)
            decoded = iter_audio(model, codes, windows, counts)
            decoded = cut_to_length(decoded, lambda: counts.num_samples, model.config.hop_length)
            picture = target.with_suffix(".png") if arguments.plot else None
            # the sound appears with its picture, or neither does
            with _picture_file(picture) as partial, _writing_sound(target, arguments, model) as write:
                for block in keep(decoded, reconstruction):
                    write(block)
                    progress.update(len(block) / model.config.sampling_rate)
                if arguments.plot:
                    original, decoded_audio, tokens = (
                        np.concatenate(blocks) for blocks in (waveform, reconstruction, all_codes)
                    )
                    try:
                        plot_reconstruction(
                            partial, original, decoded_audio, tokens, model.config.sampling_rate, source.name, "png"
                        )
                    except OSError as error:
                        raise OSError(f"Cannot write the picture {picture}: {error.__cause__ or error}") from error
        return counts

    return run_jobs(jobs, work, arguments, model)


@contextmanager
def _picture_file(path: Path | None):
    """`atomic_write` of a picture that may not have been asked for."""
    if path is None:
        yield None
        return
    with atomic_write(path) as partial:
        yield partial


def _sound_jobs(arguments, suffixes: tuple[str, ...]) -> list[tuple[Path | None, Path | None]]:
    return find_jobs(arguments, suffixes, f".{arguments.audio_format}", WRITABLE_FORMATS)


def _whole_seconds(source: Path | None) -> float:
    """
    Up to what length audio is encoded in one piece. Chunks have the same codes, reach a pipe at once, and show
    progress.
    """
    return 0 if source is None else 20


def _windows(arguments, model, live: bool):
    """How to decode, by --window-seconds and --overlap-seconds; refuses what makes no sense."""
    from .transcode import WHOLE_SECONDS, Windows, decode_stream

    seconds, overlap = arguments.window_seconds, arguments.overlap_seconds
    if seconds == 0:
        if overlap is not None:
            raise ValueError("Got --overlap-seconds with --window-seconds 0, which uses no windows. Leave one out.")
        return Windows(seconds=0, overlap_seconds=0, above_seconds=math.inf)
    above_seconds = 0 if live or seconds is not None else WHOLE_SECONDS
    seconds = (3.0 if live else 10.0) if seconds is None else seconds
    overlap = min(0.25, seconds / 3) if overlap is None else overlap
    if not (math.isfinite(seconds) and math.isfinite(overlap)):
        raise ValueError(f"Got a window of {seconds} s and an overlap of {overlap} s, expected finite numbers.")
    decode_stream(model, seconds, overlap)  # raises
    return Windows(seconds, overlap, above_seconds)


def _target_peak(arguments, model) -> float | None:
    """Return the peak level of --peak-dbfs or of the model. Standard error says that a pipe has to wait for it."""
    from ..loading import load_feature_extractor, target_peak

    extractor = load_feature_extractor(arguments.model, arguments.revision, model.config, arguments.peak_dbfs)
    level = target_peak(extractor)
    if level is not None and "-" in arguments.inputs:
        print(
            f"standard input: read to its end first, since each clip is scaled to a peak of {level:g} dBFS",
            file=sys.stderr,
        )
    return level


@contextmanager
def _sound_blocks(source: Path | None, arguments, model, counts, peak_level: float | None, passes: int = 1):
    """Yield the audio of a file or of standard input in blocks, scaled and counted by `counts`, and its progress.

    With two passes the progress is complete when as much audio was decoded.
    """
    from .. import audio, pipes
    from ..long_audio import scale_to_peak

    rate = model.config.sampling_rate
    options = {"channel": arguments.channel, "on_warnings": counts.warnings.extend}
    if source is None:
        blocks, seconds = pipes.read_audio(sys.stdin.buffer, rate, arguments.raw, **options), 0
    else:
        on_cpu = not hasattr(model, "device") or model.device.type == "cpu"  # an exported model has none
        # as long as the chunks that the model itself encodes best in
        blocks = audio.read_blocks(source, rate, block_seconds=5 if on_cpu else 60, **options)
        with audio.AudioReader(source, rate, quiet=True) as reader:
            seconds = reader.source_seconds or 0
    with Progress(passes * seconds, "s of audio", shown=seconds > 0) as progress:
        counted = counts.count_audio(blocks, report=lambda count: progress.update(count / rate))
        yield scale_to_peak(counted, peak_level), progress


def _writing_sound(target: Path | None, arguments, model, num_samples: int | None = None):
    """A context that gives a function to write blocks of audio with, to a file or to standard output."""
    from .. import audio, pipes

    rate = model.config.sampling_rate
    if target is not None:
        # a device or pipe has no ending that could name the format
        format = arguments.audio_format.upper() if is_stream(target) and not target.suffix else None
        return audio.writing(target, rate, format=format)
    return pipes.audio_writer(sys.stdout.buffer, rate, num_samples, bool(arguments.raw_output))


def _read_tokens(source: Path | None, format: str | None, model) -> tuple:
    """Codes in pieces, and the number of samples that they stand for; refuses those of another codebook.

    The number is None for txt on standard input, which is taken as it comes.
    """
    from .. import pipes
    from ..token_file import MAX_BYTES, TokenFile, bare_codes_from_bytes, format_of, read_tokens

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
    content = read_tokens(stdin, format, start) if source is None else read_file(source, MAX_BYTES)
    if format in ("npy", "txt"):
        codes = bare_codes_from_bytes(content, format)
        num_samples = len(codes) * model.config.hop_length
    else:
        tokens = TokenFile.from_bytes(content, format)
        model.check_codebook_fingerprint(tokens.codebook_fingerprint)
        tokens.check_rate(model.config)
        codes, num_samples = tokens.audio_codes, tokens.num_samples
    return (codes[start : start + 1024] for start in range(0, len(codes), 1024)), num_samples
