"""Pipes: sound and codes on standard input and output, as they come. Sound needs the extra `audio`."""

import logging
import struct
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from io import BytesIO
from typing import BinaryIO

import numpy as np

from . import audio


logger = logging.getLogger(__name__)

RAW = "16-bit little-endian integers, mono"
"""Raw samples in pipes, in both directions: what `arecord -f S16_LE`, `ffmpeg -f s16le` and `sox -t s16` mean."""


def read_sound(stream: BinaryIO, sampling_rate: int = 24000, raw_rate: int | None = None) -> Iterator[np.ndarray]:
    """Reads a stream of sound as it comes: a WAV file, whose header need not know its length, or raw samples.

    Several channels are averaged and other rates resampled, as by `audio.load`.

    Args:
        stream: a buffered binary stream, as `sys.stdin.buffer`.
        sampling_rate: Hz of what is given.
        raw_rate: if given, the stream has no header and holds `RAW` samples at this rate.

    Yields:
        float32 arrays of shape (n,), n > 0: what has come since the last one, at most 64 KiB of the stream.

    Raises:
        ValueError: the stream is not WAV, or of a sample format that is not known, or holds no samples.
        CutOffError: the stream ended within a sample, or before its header says; after all that came was given.
    """
    if raw_rate is not None and not raw_rate > 0:
        raise ValueError(f"Got a rate of {raw_rate} Hz for raw samples, expected more than 0.")
    rate, channels, subtype, size = (raw_rate, 1, "PCM_16", None) if raw_rate is not None else _read_wav_header(stream)
    audio.say_what_changes("standard input", channels, rate, sampling_rate)
    empty = True
    for block in audio.mono_blocks(_sample_blocks(stream, rate, channels, subtype, size), rate, sampling_rate):
        empty = False
        yield block
    if empty:
        raise ValueError("The stream holds no samples, expected at least one.")


@contextmanager
def writing_sound(
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
    levels = audio.Levels()
    has_header = raw

    def write(samples: np.ndarray) -> None:
        nonlocal has_header
        levels.add(samples)
        if not has_header:  # only now: what is refused before the first sample leaves no trace in the stream
            stream.write(_wav_header(sampling_rate, num_samples))
            has_header = True
        content = BytesIO()
        soundfile.write(content, samples, sampling_rate, subtype="PCM_16", format="RAW", endian="LITTLE")
        stream.write(content.getvalue())
        stream.flush()

    yield write
    levels.warn_of_clipping("standard output")


def read_codes(stream: BinaryIO, start: bytes = b"") -> Iterator[np.ndarray]:
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
_UNKNOWN_SIZE = 0x7FFF0000  # who cannot know the size writes 0, 0xFFFFFFFF (ffmpeg), 0x7FFFF000 (sox) or the like


def _read_wav_header(stream: BinaryIO) -> tuple[int, int, str, int | None]:
    """Reads up to the first sample -> rate, channels, sample format, and bytes of samples, None if the header knows not.

    libsndfile cannot do this: it takes the size that a pipe's header gives at its word, and drops half a sample.
    """
    start = stream.read(12)
    if len(start) < 12 or start[:4] != b"RIFF" or start[8:] != b"WAVE":
        raise ValueError(
            f"Standard input begins with {start[:4]!r}, expected a WAV file. Convert it on the way, for example with "
            "`ffmpeg -i FILE -f wav -`, or say with --raw RATE that it holds raw samples."
            if start
            else "Standard input is empty, expected a WAV file, or raw samples and --raw RATE."
        )
    form = None
    while True:
        head = stream.read(8)
        if len(head) < 8:
            raise ValueError("The WAV file on standard input ends before its samples begin.")
        name, size = struct.unpack("<4sI", head)
        if name == b"data":
            break
        body = stream.read(size + size % 2)  # chunks are padded to even lengths
        if name == b"fmt " and size >= 16:
            form = body
    if form is None:
        raise ValueError("The WAV file on standard input does not say its sample format before its samples.")
    tag, channels, rate, _, _, bits = struct.unpack("<HHIIHH", form[:16])
    if tag == 0xFFFE and len(form) >= 26:  # "extensible": the tag proper stands further on
        (tag,) = struct.unpack("<H", form[24:26])
    if (tag, bits) not in _WAV_SUBTYPES or channels == 0 or rate == 0:
        raise ValueError(
            f"The WAV file on standard input has format {tag}, {bits} bits, {channels} channels, {rate} Hz; expected "
            "integers of 8, 16, 24 or 32 bits, floats of 32 or 64, A-law or mu-law."
        )
    return rate, channels, _WAV_SUBTYPES[tag, bits], None if size == 0 or size >= _UNKNOWN_SIZE else size


def _sample_blocks(stream: BinaryIO, rate: int, channels: int, subtype: str, size: int | None) -> Iterator[np.ndarray]:
    """Samples as they come, (n, channels) float32, n > 0; `size` in bytes if it is known."""
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
        raise audio.CutOffError(f"The stream ends within a sample: {len(rest)} of its {frame_size} bytes came.")
    if left:
        raise audio.CutOffError(
            f"The stream ends early: {size - left} of the {size} bytes of samples in its header came."
        )


def _wav_header(sampling_rate: int, num_samples: int | None) -> bytes:
    """Header of a mono 16-bit WAV file, of unknown length if `num_samples` is None or more than it can say."""
    unknown = 0xFFFFFFFF
    size = unknown if num_samples is None or 2 * num_samples > audio.MAX_WAV_SIZE else 2 * num_samples
    riff_size = unknown if size == unknown else size + 36
    form = struct.pack("<4sIHHIIHH", b"fmt ", 16, 1, 1, sampling_rate, 2 * sampling_rate, 2, 16)
    return struct.pack("<4sI4s", b"RIFF", riff_size, b"WAVE") + form + struct.pack("<4sI", b"data", size)
