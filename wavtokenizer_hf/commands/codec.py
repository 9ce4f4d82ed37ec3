"""`wavtokenizer encode | decode | reconstruct`: audio to codes, codes to audio, and both."""

import argparse
import math
import sys
from collections.abc import Callable, Iterable, Iterator
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..atomic_files import atomic_write, is_stream
from ..audio_errors import check_channel
from ..find_files import SUFFIXES, TOKEN_FORMATS, WRITABLE_FORMATS
from ..limited_files import read_file
from ..model_names import find_model
from ..progress import Progress
from .arguments import Commands, add_channel, add_command, add_model, add_peak, load_model
from .files import Job, add_files, find_jobs, run_jobs
from .token_folders import token_clips


if TYPE_CHECKING:
    import numpy as np

    from .transcode import Codec, Counts, Encoder, Windows

_AUDIO_INPUT = "audio files, or folders to search for them; -: WAV stream on standard input, encoded as it arrives"
_RAW = "raw samples (16-bit little-endian integers, mono)"
_FAILURES = "If one of several files fails, the reason is printed and the others are processed."


def add(commands: Commands) -> None:
    encode = add_command(
        commands,
        "encode",
        _encode,
        f"Audio is resampled to the rate of the model and mixed to one channel. {_FAILURES}",
        example="speech.flac -m bundled -o speech.safetensors",
    )
    add_files(encode, _AUDIO_INPUT)
    add_model(encode, decoder=False)
    encode.add_argument(
        "--format",
        choices=TOKEN_FORMATS,
        help="format of the token files (default: the extension of OUTPUT, else safetensors). safetensors and json "
        "record the model and the exact length; npy and txt hold the codes alone. On standard output, txt is a "
        "stream with one code per line",
    )
    _add_raw_input(encode)
    add_channel(encode)
    add_peak(encode)

    decode = add_command(
        commands,
        "decode",
        _decode,
        "MODEL must have the codebook that made the tokens. safetensors, json and token folders record it, and "
        f"another one is refused. {_FAILURES}",
        example="speech.safetensors -m bundled -o decoded.wav",
    )
    add_files(
        decode,
        "token files, folders to search for them, or a token folder of `wavtokenizer tokenize`; -: tokens on "
        "standard input",
    )
    add_model(decode)
    decode.add_argument(
        "--id",
        nargs="+",
        metavar="ID",
        help="ids of the clips to decode from a token folder (default: all). For one id, OUTPUT may be a file",
    )
    decode.add_argument(
        "--format",
        choices=TOKEN_FORMATS,
        help="format of INPUT (default: by its extension; standard input: by its first two bytes)",
    )
    _add_audio_output(decode)

    reconstruct = add_command(
        commands,
        "reconstruct",
        _reconstruct,
        f"The output has the length of the input, at the rate of the model. {_FAILURES}",
        example="speech.flac -m bundled -o decoded.wav --plot",
    )
    add_files(reconstruct, _AUDIO_INPUT)
    add_model(reconstruct)
    _add_raw_input(reconstruct)
    add_channel(reconstruct)
    add_peak(reconstruct)
    _add_audio_output(reconstruct)
    reconstruct.add_argument(
        "--plot",
        action="store_true",
        help="also write a PNG beside each output, with both spectrograms and the tokens (files up to five minutes)",
    )


def _add_raw_input(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--raw", type=int, metavar="RATE", help=f"standard input holds {_RAW} at this sampling rate in Hz"
    )


def _add_audio_output(parser: argparse.ArgumentParser) -> None:
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
        help="decode audio longer than SECONDS in overlapping windows: constant memory, approximate, reported on "
        "standard error. 0: always exact. Default: files up to five minutes are exact, longer ones use windows of "
        "10 s, pipes use windows of 3 s, which is also their latency",
    )
    parser.add_argument(
        "--overlap-seconds",
        type=float,
        metavar="SECONDS",
        help="overlap of two windows (default: 0.25, or a third of the window if that is less)",
    )


def _encode(arguments: argparse.Namespace) -> int:
    extension = Path(arguments.output).suffix[1:]
    is_format = extension in TOKEN_FORMATS
    format = arguments.format or (extension if is_format and len(arguments.inputs) == 1 else "safetensors")
    check_channel(arguments.channel)
    jobs = find_jobs(arguments, SUFFIXES, f".{format}", TOKEN_FORMATS, format_is_given=arguments.format is not None)
    find_model(arguments.model, arguments.revision)

    import numpy as np

    from .. import pipes
    from ..token_file import TokenFile
    from .transcode import Counts, iter_codes

    model: Encoder = load_model(arguments, encoder_only=True)
    peak_level = _target_peak(arguments, model)
    fingerprint = model.codebook_fingerprint

    def work(source: Path | None, target: Path | None) -> Counts:
        counts = Counts()
        chunks: list[np.ndarray] = []
        with _audio_blocks(source, arguments, model, counts, peak_level) as (blocks, _):
            for codes in counts.count_codes(iter_codes(model, blocks, _whole_seconds(source)), report=lambda _: None):
                chunks.append(codes.astype(np.uint16))
                if target is None and format == "txt":
                    pipes.write_codes(sys.stdout.buffer, codes)
        tokens = TokenFile(
            audio_codes=np.concatenate(chunks),
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


def _decode(arguments: argparse.Namespace) -> int:
    clips = token_clips(arguments)  # None unless the input is a token folder
    suffixes = tuple(f".{format}" for format in TOKEN_FORMATS)
    jobs = clips.jobs if clips is not None else _audio_jobs(arguments, suffixes)
    find_model(arguments.model, arguments.revision)

    from .transcode import Counts, cut_to_length, iter_audio

    model: Codec = load_model(arguments)
    if clips is not None:
        clips.folder.check_model(model)
    _windows(arguments, model, live=False)  # refuses invalid windows before the first file

    def work(source: Path | None, target: Path | None) -> Counts:
        counts = Counts()
        codes: Iterator[np.ndarray]
        num_samples: int | None
        if clips is not None:
            assert source is not None  # the clips of a token folder have names
            codes, num_samples = clips.read(source, model)
        else:
            codes, num_samples = _read_tokens(source, arguments.format, model)
        windows = _windows(arguments, model, live=num_samples is None)
        seconds = 0 if num_samples is None else num_samples / model.config.sampling_rate
        with Progress(seconds, "s of audio", shown=seconds > 0) as progress:
            codes = counts.count_codes(codes, report=lambda count: progress.update(count / model.config.frame_rate))
            blocks = iter_audio(model, codes, windows, counts)
            if num_samples is not None:
                blocks = cut_to_length(blocks, lambda: num_samples, model.config.hop_length)
            with _open_output(target, arguments, model, num_samples) as write:
                for block in blocks:
                    write(block)
                    counts.num_samples += len(block)
        return counts

    return run_jobs(jobs, work, arguments, model)


def _reconstruct(arguments: argparse.Namespace) -> int:
    jobs = _audio_jobs(arguments, SUFFIXES)
    if arguments.plot and any(None in job for job in jobs):
        raise ValueError("Got --plot for a pipe, expected files: a plot shows a whole clip and needs a file name.")
    check_channel(arguments.channel)
    find_model(arguments.model, arguments.revision)

    import numpy as np

    from .. import audio
    from ..plots import plot_reconstruction
    from .transcode import WHOLE_SECONDS, Counts, cut_to_length, iter_audio, iter_codes

    model: Codec = load_model(arguments)
    peak_level = _target_peak(arguments, model)
    windows = _windows(arguments, model, live=jobs[0][0] is None)

    def work(source: Path | None, target: Path | None) -> Counts:
        picture = None
        if arguments.plot:
            assert source is not None and target is not None  # checked above
            if (seconds := audio.seconds(source)) > WHOLE_SECONDS:
                raise ValueError(f"Got --plot for {seconds:.0f} s, expected at most {WHOLE_SECONDS} s.")
            picture = target.with_suffix(".png")
        counts = Counts()
        original: list[np.ndarray] = []
        audio_codes: list[np.ndarray] = []
        reconstruction: list[np.ndarray] = []

        def record(chunks: Iterable[np.ndarray], recording: list[np.ndarray]) -> Iterator[np.ndarray]:
            for chunk in chunks:
                if arguments.plot:
                    recording.append(chunk)
                yield chunk

        with _audio_blocks(source, arguments, model, counts, peak_level, passes=2) as (blocks, progress):
            codes = iter_codes(model, record(blocks, original), _whole_seconds(source))
            codes = counts.count_codes(record(codes, audio_codes), report=lambda _: None)
            decoded = iter_audio(model, codes, windows, counts)
            decoded = cut_to_length(decoded, lambda: counts.num_samples, model.config.hop_length)
            # audio file and picture appear together, or neither does
            with _picture_file(picture) as partial, _open_output(target, arguments, model) as write:
                for block in record(decoded, reconstruction):
                    write(block)
                    progress.update(len(block) / model.config.sampling_rate)
                if source is not None and partial is not None:
                    try:
                        plot_reconstruction(
                            partial,
                            np.concatenate(original),
                            np.concatenate(reconstruction),
                            np.concatenate(audio_codes),
                            model.config.sampling_rate,
                            source.name,
                            "png",
                        )
                    except OSError as error:
                        raise OSError(f"Cannot write the picture {picture}: {error.__cause__ or error}") from error
        return counts

    return run_jobs(jobs, work, arguments, model)


@contextmanager
def _picture_file(path: Path | None) -> Iterator[Path | None]:
    """Yield the temporary file of `atomic_write`, or None for no picture."""
    if path is None:
        yield None
        return
    with atomic_write(path) as partial:
        yield partial


def _audio_jobs(arguments: argparse.Namespace, suffixes: tuple[str, ...]) -> list[Job]:
    """Find jobs that write audio files."""
    return find_jobs(arguments, suffixes, f".{arguments.audio_format}", WRITABLE_FORMATS)


def _whole_seconds(source: Path | None) -> float:
    """
    Return the length up to which audio is encoded whole. Chunks have the same codes, reach a pipe at once, and show
    progress.
    """
    return 0 if source is None else 20


def _windows(arguments: argparse.Namespace, model: "Codec", live: bool) -> "Windows":
    """Return the windows of --window-seconds and --overlap-seconds. Raises ValueError for invalid values."""
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
    decode_stream(model, seconds, overlap)  # raises ValueError for an invalid window
    return Windows(seconds, overlap, above_seconds)


def _target_peak(arguments: argparse.Namespace, model: "Encoder") -> float | None:
    """Return the peak level of --peak-dbfs or of the model. If a pipe has to wait for it, report this."""
    from ..loading import load_feature_extractor, target_peak

    config: Any = model.config  # that of an exported model is a namespace with the same fields
    extractor = load_feature_extractor(arguments.model, arguments.revision, config, arguments.peak_dbfs)
    level = target_peak(extractor)
    if level is not None and "-" in arguments.inputs:
        print(
            f"standard input: read to its end first, since each clip is scaled to a peak of {level:g} dBFS",
            file=sys.stderr,
        )
    return level


@contextmanager
def _audio_blocks(
    source: Path | None,
    arguments: argparse.Namespace,
    model: "Encoder",
    counts: "Counts",
    peak_level: float | None,
    passes: int = 1,
) -> "Iterator[tuple[Iterator[np.ndarray], Progress]]":
    """Yield blocks of audio of a file or of standard input, scaled to the peak level, and their progress.

    Args:
        source: File; None for standard input.
        arguments: Arguments of the command.
        model: Model whose sampling rate the blocks get.
        counts: Counts to which samples and warnings are added.
        peak_level: Level in dBFS; None for no scaling.
        passes: 2 if the caller adds the seconds that it decoded to the progress.
    """
    from .. import audio, pipes
    from ..long_audio import scale_to_peak

    rate = model.config.sampling_rate
    channel, on_warnings = arguments.channel, counts.warnings.extend
    seconds: float = 0
    if source is None:
        blocks = pipes.read_audio(sys.stdin.buffer, rate, arguments.raw, channel=channel, on_warnings=on_warnings)
    else:
        on_cpu = not hasattr(model, "device") or model.device.type == "cpu"  # an exported model has no device
        # the chunk length at which the model itself is fastest
        block_seconds = 5 if on_cpu else 60
        blocks = audio.read_blocks(source, rate, block_seconds, channel=channel, on_warnings=on_warnings)
        with audio.AudioReader(source, rate, quiet=True) as reader:
            seconds = reader.source_seconds or 0
    with Progress(passes * seconds, "s of audio", shown=seconds > 0) as progress:
        counted = counts.count_audio(blocks, report=lambda count: progress.update(count / rate))
        yield scale_to_peak(counted, peak_level), progress


def _open_output(
    target: Path | None, arguments: argparse.Namespace, model: "Codec", num_samples: int | None = None
) -> "AbstractContextManager[Callable[[np.ndarray], None]]":
    """Return a context with a function that writes blocks of audio to a file or to standard output."""
    from .. import audio, pipes

    rate = model.config.sampling_rate
    if target is not None:
        # a device or a pipe may have no extension that names the format
        format = arguments.audio_format.upper() if is_stream(target) and not target.suffix else None
        return audio.writing(target, rate, format=format)
    return pipes.audio_writer(sys.stdout.buffer, rate, num_samples, bool(arguments.raw_output))


def _read_tokens(source: Path | None, format: str | None, model: "Codec") -> "tuple[Iterator[np.ndarray], int | None]":
    """Return chunks of codes, and the number of samples that they decode to.

    The number is None for txt on standard input, which is decoded as it arrives. Raises ValueError for codes of
    another codebook.
    """
    from .. import pipes
    from ..token_file import MAX_BYTES, TokenFile, bare_codes_from_bytes, detect_format, read_tokens

    stdin = sys.stdin.buffer
    start = stdin.read(2) if source is None else b""
    if source is None and not start:
        raise ValueError("Got no tokens: standard input is empty.")
    name = "standard input" if source is None else source
    format = format or (detect_format(start) if source is None else source.suffix[1:])
    if format in ("npy", "txt"):
        print(
            f"{name}: {format} does not record the model: decoded unchecked, to whole codes",
            file=sys.stderr,
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
    return (codes[index : index + 1024] for index in range(0, len(codes), 1024)), num_samples
