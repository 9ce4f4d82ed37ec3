"""Pipes: sound and codes on standard input and output, as they come. Sound needs the extra `audio`."""

import logging
import shutil
import struct
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from io import BytesIO
from typing import Any, BinaryIO

import numpy as np

from . import audio
from .audio_containers import UNKNOWN_SIZE
from .audio_errors import AudioError, TruncatedAudioError


logger = logging.getLogger(__name__)

RAW = "16-bit little-endian integers, mono"
"""Raw samples in pipes, in both directions: what `arecord -f S16_LE`, `ffmpeg -f s16le` and `sox -t s16` mean."""


def read_audio(
    stream: BinaryIO,
    sampling_rate: int = 24000,
    raw_rate: int | None = None,
    channel: str | int = "mean",
    on_warnings: Callable[[dict[str, str]], None] | None = None,
) -> Iterator[np.ndarray]:
    """Reads a stream of sound: a WAV file, whose header need not know its length, or raw samples, as they come.

    Other formats that `audio.load` knows, compressed WAV among them, are kept in a temporary file and read when the
    stream has ended. Several channels are averaged and other rates resampled, as by `audio.load`.

    Args:
        stream: a buffered binary stream, as `sys.stdin.buffer`.
        sampling_rate: Hz of what is given.
        raw_rate: if given, the stream has no header and holds `RAW` samples at this rate.
        channel, on_warnings: as in `audio.read_blocks`.

    Yields:
        float32 arrays of shape (n,), n > 0: what has come since the last one, at most 64 KiB of the stream.

    Raises:
        AudioError: the stream is not sound, of a sample format that is not known, holds no samples or some that are
            not finite, or has a rate outside of 1 kHz to 768 kHz.
        TruncatedAudioError: the stream ended within a sample, or before its header says; after all that came was given.
    """
    if raw_rate is not None:
        rate = audio.check_sampling_rate(raw_rate, "The raw stream (--raw)")
        form = _WavFormat(rate, 1, "PCM_16", None)
    else:
        start = stream.read(12)
        header = _read_wav_header(stream, start) if _begins_wav(start) else start
        if not isinstance(header, _WavFormat):
            yield from _read_from_file(stream, header, sampling_rate, channel, on_warnings)
            return
        form = header
        rate = audio.check_sampling_rate(form.sampling_rate, "The WAV file on standard input")
    mixer = audio.Mixer(channel, form.num_channels, "standard input")
    audio.say_what_changes("standard input", form.num_channels, rate, sampling_rate, channel)
    empty = True
    try:
        for block in audio.mono_blocks(map(mixer, _sample_blocks(stream, form)), rate, sampling_rate):
            empty = False
            yield block
    finally:
        audio.log_warnings("standard input", mixer.warnings)
        if on_warnings is not None:
            on_warnings(mixer.warnings)
    if empty:
        raise AudioError("The stream holds no samples, expected at least one.", "empty")


_KNOWN_STARTS = (
    b"fLaC", b"OggS", b"FORM", b".snd", b"caff", b"riff", b"RIFX", b"RF64", b"ID3", b"NIST", b"Creative Voi", b"#!AMR",
    b"\x1aE\xdf\xa3",
)  # fmt: skip


def _begins_wav(start: bytes) -> bool:
    """Whether it is a WAV file. Raises AudioError for what is no audio of any kind, which may never end."""
    if start[:4] == b"RIFF" and start[8:] == b"WAVE":
        return True
    is_mpeg = len(start) > 1 and start[0] == 0xFF and start[1] >= 0xE0
    if start.startswith(_KNOWN_STARTS) or start[4:8] == b"ftyp" or is_mpeg:
        return False
    if start:
        raise AudioError(
            f"Standard input begins with {start[:4]!r}, expected a WAV file. Convert it on the way, for example with "
            "`ffmpeg -i FILE -f wav -`, or say with --raw RATE that it holds raw samples."
        )
    raise AudioError("Standard input is empty, expected a WAV file, or raw samples and --raw RATE.", "empty")


def _read_from_file(
    stream: BinaryIO,
    start: bytes,
    sampling_rate: int,
    channel: str | int,
    on_warnings: Callable[[dict[str, str]], None] | None,
) -> Iterator[np.ndarray]:
    """What is no plain WAV: decoders of other formats look at the end of a file before its beginning."""
    with tempfile.TemporaryFile() as file:
        file.write(start)
        shutil.copyfileobj(stream, file)
        with audio.AudioReader(file, sampling_rate, channel, name="standard input") as reader:
            try:
                yield from reader.blocks()
            finally:
                reader.log_warnings()
                if on_warnings is not None:
                    on_warnings(reader.warnings)


@contextmanager
def audio_writer(
    stream: BinaryIO, sampling_rate: int = 24000, num_samples: int | None = None, raw: bool = False
) -> Iterator[Callable]:
    """`audio.writing` to a stream, as `sys.stdout.buffer`: a 16-bit WAV file, or `RAW` samples without a header.

    Args:
        stream: takes the bytes; flushed after every block.
        sampling_rate: Hz of the audio.
        num_samples: how many will come, if that is known; without it the header says "unknown", as ffmpeg's does.
        raw: no header.
    """
    soundfile = audio.soundfile_module()
    monitor = audio.ClippingMonitor()
    has_header = raw

    def write(samples: np.ndarray) -> None:
        nonlocal has_header
        monitor.add(samples)
        if not has_header:  # only now: what is refused before the first sample leaves no trace in the stream
            stream.write(_wav_header(sampling_rate, num_samples))
            has_header = True
        content = BytesIO()
        soundfile.write(content, samples, sampling_rate, subtype="PCM_16", format="RAW", endian="LITTLE")
        stream.write(content.getvalue())
        stream.flush()

    yield write
    monitor.warn_of_clipping("standard output")


def read_codes(stream: Any, start: bytes = b"") -> Iterator[np.ndarray]:
    """Reads numbers between white space as they come, after `start`, which was read before: int64 arrays (n,), n > 0.

    Raises ValueError for anything but numbers.
    """
    rest = start
    while new := stream.read1(2**16):
        rest += new
        numbers = rest.split()
        rest = b"" if rest[-1:].isspace() else numbers.pop()  # more of its digits may come
        if numbers:
            yield _codes(numbers)
        if rest:
            _codes([rest])  # what is no number is refused at once
    if numbers := rest.split():
        yield _codes(numbers)
        logger.warning("standard input: no end of line after the last code, %s; it may be cut off", int(numbers[-1]))


def _codes(numbers: list[bytes]) -> np.ndarray:
    if strange := next((number for number in numbers if len(number) > 20 or not number.isdigit()), None):
        raise ValueError(f"Standard input does not hold codes: got {strange[:20]!r}. Expected one number a line.")
    try:
        return np.array([int(number) for number in numbers], np.int64)
    except (ValueError, OverflowError) as error:
        raise ValueError(f"Standard input does not hold codes: {error}. Expected one number a line.") from error


def write_codes(stream: BinaryIO, audio_codes: np.ndarray) -> None:
    """Writes codes (n,) as `read_codes` reads them, one a line, at once."""
    stream.write("".join(f"{code}\n" for code in audio_codes.tolist()).encode())
    stream.flush()


_WAV_SUBTYPES = {  # (format tag, bits) -> soundfile's name of the sample format
    (1, 8): "PCM_U8",
    (1, 16): "PCM_16",
    (1, 24): "PCM_24",
    (1, 32): "PCM_32",
    (3, 32): "FLOAT",
    (3, 64): "DOUBLE",
    (6, 8): "ALAW",
    (7, 8): "ULAW",
}
_SAMPLE_SIZES = {"PCM_U8": 1, "PCM_16": 2, "PCM_24": 3, "PCM_32": 4, "FLOAT": 4, "DOUBLE": 8, "ALAW": 1, "ULAW": 1}
_LARGEST_KEPT = 2**16  # bytes of a chunk that are kept: more of them hold nothing that is needed


@dataclass
class _WavFormat:
    """Of a WAV stream: Hz, channels, soundfile's name of the sample format, and bytes of samples, None if unknown."""

    sampling_rate: int
    num_channels: int
    subtype: str
    size: int | None


def _read_wav_header(stream: BinaryIO, start: bytes) -> "_WavFormat | bytes":
    """Reads up to the first sample. Gives the format, or all that was read if libsndfile has to decode it.

    libsndfile cannot do the first: it takes the size that a pipe's header gives at its word, and drops half a sample.
    """
    form, kept = None, [start]
    while True:
        head = stream.read(8)
        kept.append(head)
        if len(head) < 8:
            raise AudioError("The WAV file on standard input ends before its samples begin.", "truncated")
        name, size = struct.unpack("<4sI", head)
        if name == b"data":
            break
        body = stream.read(min(size + size % 2, _LARGEST_KEPT))  # chunks are padded to even lengths
        kept.append(body)
        if name == b"fmt " and size >= 16:
            form = body
        left = size + size % 2 - len(body)
        if left > 0:  # no decoder needs it
            kept[-2:] = []
        while left > 0 and (skipped := stream.read(min(left, 2**20))):
            left -= len(skipped)
    if form is None or len(form) < 16:
        raise AudioError("The WAV file on standard input does not say its sample format before its samples.")
    tag, channels, rate, _, _, bits = struct.unpack("<HHIIHH", form[:16])
    if tag == 0xFFFE and len(form) >= 26:  # "extensible": the tag proper stands further on
        (tag,) = struct.unpack("<H", form[24:26])
    if channels == 0:
        raise AudioError("The WAV file on standard input has 0 channels, expected at least one.")
    is_plain = (tag, bits) in _WAV_SUBTYPES
    if not is_plain or struct.unpack("<H", form[12:14])[0] != channels * _SAMPLE_SIZES[_WAV_SUBTYPES[tag, bits]]:
        return b"".join(kept)
    return _WavFormat(rate, channels, _WAV_SUBTYPES[tag, bits], None if size == 0 or size >= UNKNOWN_SIZE else size)


def _sample_blocks(stream: Any, form: _WavFormat) -> Iterator[np.ndarray]:
    """Samples as they come, (n, channels) float32, n > 0."""
    rate, channels, subtype, size = form.sampling_rate, form.num_channels, form.subtype, form.size
    frame_size, left, rest, num_bytes = _SAMPLE_SIZES[subtype] * channels, size, b"", 0
    while left is None or left > 0:
        new = stream.read1(2**16 if left is None else min(2**16, left))
        if not new:
            break
        left = None if left is None else left - len(new)
        rest, num_bytes = rest + new, num_bytes + len(new)
        whole = len(rest) - len(rest) % frame_size
        if whole > 0:
            samples, rest = BytesIO(rest[:whole]), rest[whole:]
            yield audio.soundfile_module().read(
                samples, samplerate=rate, channels=channels, subtype=subtype, format="RAW", endian="LITTLE",
                dtype="float32", always_2d=True,
            )[0]  # fmt: skip
    is_padding = size is None and rest == b"\0" and num_bytes % 2 == 0  # WAV chunks of odd length end in a zero
    if rest and not is_padding:
        raise TruncatedAudioError(f"The stream ends within a sample: {len(rest)} of its {frame_size} bytes came.")
    if left and size is not None:
        raise TruncatedAudioError(
            f"The stream ends early: {size - left} of the {size} bytes of samples in its header came."
        )


def _wav_header(sampling_rate: int, num_samples: int | None) -> bytes:
    """Header of a mono 16-bit WAV file, of unknown length if `num_samples` is None or more than it can say."""
    unknown = 0xFFFFFFFF
    size = unknown if num_samples is None or 2 * num_samples > audio.MAX_WAV_SIZE else 2 * num_samples
    riff_size = unknown if size == unknown else size + 36
    form = struct.pack("<4sIHHIIHH", b"fmt ", 16, 1, 1, sampling_rate, 2 * sampling_rate, 2, 16)
    return struct.pack("<4sI4s", b"RIFF", riff_size, b"WAVE") + form + struct.pack("<4sI", b"data", size)
