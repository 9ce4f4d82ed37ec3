"""Stream audio and codes through standard input and output. Audio needs the extra `audio` (soundfile, soxr)."""

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
"""Format of raw samples, as in `arecord -f S16_LE`, `ffmpeg -f s16le` and `sox -t s16`."""


def read_audio(
    stream: BinaryIO,
    sampling_rate: int = 24000,
    raw_rate: int | None = None,
    channel: str | int = "mean",
    on_warnings: Callable[[dict[str, str]], None] | None = None,
) -> Iterator[np.ndarray]:
    """Read mono audio from a stream: a WAV file or raw samples, block by block as they arrive.

    The header of the WAV file may lack its length. Other formats that `audio.load` reads, such as compressed WAV, are
    copied to a temporary file first and decoded when the stream ends. Channels are averaged and other sampling rates
    resampled, as in `audio.load`.

    Args:
        stream: Buffered binary stream, such as `sys.stdin.buffer`.
        sampling_rate: Sampling rate of the blocks, in Hz.
        raw_rate: Sampling rate in Hz of a stream of `RAW` samples without a header. None: the stream has a header.
        channel: `"mean"`, `"left"`, `"right"` or the index of a channel, from 0.
        on_warnings: Function called after the last block with the warnings of the stream, a dict kind -> text.

    Yields:
        float32 arrays of shape (n,), n > 0: the audio since the last block, from at most 64 KiB of the stream.

    Raises:
        AudioError: The stream is not audio, has an unknown sample format or a sampling rate outside of 1 kHz to
            768 kHz, or holds no samples or non-finite ones.
        TruncatedAudioError: The stream ends within a sample, or earlier than its header says. All blocks up to there
            come first.
    """
    if raw_rate is not None:
        rate = audio.check_sampling_rate(raw_rate, "The raw stream (--raw)")
        wav_format = _WavFormat(rate, 1, "PCM_16", None)
    else:
        start = stream.read(12)
        header = _read_wav_header(stream, start) if _is_wav(start) else start
        if not isinstance(header, _WavFormat):
            yield from _read_from_temporary_file(stream, header, sampling_rate, channel, on_warnings)
            return
        wav_format = header
        rate = audio.check_sampling_rate(wav_format.sampling_rate, "The WAV file on standard input")
    mixer = audio.Mixer(channel, wav_format.num_channels, "standard input")
    audio.log_conversion("standard input", wav_format.num_channels, rate, sampling_rate, channel)
    is_empty = True
    try:
        for block in audio.resample_blocks(map(mixer, _read_samples(stream, wav_format)), rate, sampling_rate):
            is_empty = False
            yield block
    finally:
        audio.log_warnings("standard input", mixer.warnings)
        if on_warnings is not None:
            on_warnings(mixer.warnings)
    if is_empty:
        raise AudioError("The stream holds no samples, expected at least one.", "empty")


_KNOWN_SIGNATURES = (
    b"fLaC", b"OggS", b"FORM", b".snd", b"caff", b"riff", b"RIFX", b"RF64", b"ID3", b"NIST", b"Creative Voi", b"#!AMR",
    b"\x1aE\xdf\xa3",
)  # fmt: skip


def _is_wav(start: bytes) -> bool:
    """Return whether a stream that starts with these 12 bytes is WAV, or False for other known audio formats.

    Raises:
        AudioError: It is no known audio format. Such a stream may never end, so it is not copied to a file.
    """
    if start[:4] == b"RIFF" and start[8:] == b"WAVE":
        return True
    is_mpeg = len(start) > 1 and start[0] == 0xFF and start[1] >= 0xE0
    if start.startswith(_KNOWN_SIGNATURES) or start[4:8] == b"ftyp" or is_mpeg:
        return False
    if start:
        raise AudioError(
            f"Standard input begins with {start[:4]!r}, expected a WAV file. Convert it in the pipe, for example with "
            "`ffmpeg -i FILE -f wav -`, or pass --raw RATE if it holds raw samples."
        )
    raise AudioError("Standard input is empty, expected a WAV file, or raw samples and --raw RATE.", "empty")


def _read_from_temporary_file(
    stream: BinaryIO,
    start: bytes,
    sampling_rate: int,
    channel: str | int,
    on_warnings: Callable[[dict[str, str]], None] | None,
) -> Iterator[np.ndarray]:
    """Copy the stream to a temporary file and read that, since decoders need a seekable file."""
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
    """Write mono audio to a stream, block by block: a 16-bit WAV file, or `RAW` samples without a header.

    Args:
        stream: Binary stream, such as `sys.stdout.buffer`. It is flushed after every block.
        sampling_rate: Sampling rate of the audio, in Hz.
        num_samples: Total number of samples, if known. None: the header has an unknown length, as ffmpeg writes it.
        raw: Write no header.

    Yields:
        Function that writes the next block: float array (n,), nominally in [-1, 1]. Other samples are clipped, with a
            warning.

    Raises:
        ValueError: Raised by the function for audio that is not finite.
    """
    soundfile = audio.soundfile_module()
    monitor = audio.ClippingMonitor()
    header_done = raw

    def write(samples: np.ndarray) -> None:
        nonlocal header_done
        monitor.add(samples)
        if not header_done:  # not before the first samples, so that an earlier error leaves the stream empty
            stream.write(_wav_header(sampling_rate, num_samples))
            header_done = True
        content = BytesIO()
        soundfile.write(content, samples, sampling_rate, subtype="PCM_16", format="RAW", endian="LITTLE")
        stream.write(content.getvalue())
        stream.flush()

    yield write
    monitor.warn_of_clipping("standard output")


def read_codes(stream: Any, start: bytes = b"") -> Iterator[np.ndarray]:
    """Read whitespace-separated codes from a text stream as they arrive.

    Args:
        stream: Buffered binary stream, such as `sys.stdin.buffer`.
        start: Beginning of the stream that has been read already.

    Yields:
        int64 arrays of shape (n,), n > 0.

    Raises:
        ValueError: The stream holds anything but numbers.
    """
    pending = start
    while received := stream.read1(2**16):
        pending += received
        numbers = pending.split()
        pending = b"" if pending[-1:].isspace() else numbers.pop()  # the last number may lack digits
        if numbers:
            yield _parse_codes(numbers)
        if pending:
            _parse_codes([pending])  # refuse an invalid number at once
    if numbers := pending.split():
        yield _parse_codes(numbers)
        logger.warning("standard input: no newline after the last code, %s; it may be truncated", int(numbers[-1]))


def _parse_codes(numbers: list[bytes]) -> np.ndarray:
    if invalid := next((number for number in numbers if len(number) > 20 or not number.isdigit()), None):
        raise ValueError(f"Standard input does not hold codes: got {invalid[:20]!r}. Expected one number per line.")
    try:
        return np.array([int(number) for number in numbers], np.int64)
    except (ValueError, OverflowError) as error:
        raise ValueError(f"Standard input does not hold codes: {error}. Expected one number per line.") from error


def write_codes(stream: BinaryIO, audio_codes: np.ndarray) -> None:
    """Write codes (n,) as text, one per line, and flush the stream. `read_codes` reads them."""
    stream.write("".join(f"{code}\n" for code in audio_codes.tolist()).encode())
    stream.flush()


_WAV_SUBTYPES = {  # (format tag, bits per sample) -> sample format, by its soundfile name
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
_MAX_CHUNK_BYTES = 2**16  # larger chunks before the samples are skipped, since no decoder needs them


@dataclass
class _WavFormat:
    """Sample format of a WAV stream.

    Args:
        sampling_rate: Sampling rate, in Hz.
        num_channels: Number of channels.
        subtype: Sample format, by its soundfile name.
        num_bytes: Bytes of samples, or None if the header lacks the length.
    """

    sampling_rate: int
    num_channels: int
    subtype: str
    num_bytes: int | None


def _read_wav_header(stream: BinaryIO, start: bytes) -> "_WavFormat | bytes":
    """Read the WAV header, up to the first sample.

    libsndfile cannot stream plain samples: it trusts the size in a pipe's header and drops half a sample.

    Returns:
        Format of plain samples, or the bytes read so far if libsndfile has to decode the samples.
    """
    fmt_chunk, header_parts = None, [start]
    while True:
        chunk_header = stream.read(8)
        header_parts.append(chunk_header)
        if len(chunk_header) < 8:
            raise AudioError("The WAV file on standard input ends before its samples begin.", "truncated")
        name, size = struct.unpack("<4sI", chunk_header)
        if name == b"data":
            break
        content = stream.read(min(size + size % 2, _MAX_CHUNK_BYTES))  # chunks are padded to even lengths
        header_parts.append(content)
        if name == b"fmt " and size >= 16:
            fmt_chunk = content
        bytes_left = size + size % 2 - len(content)
        if bytes_left > 0:
            header_parts[-2:] = []
        while bytes_left > 0 and (skipped := stream.read(min(bytes_left, 2**20))):
            bytes_left -= len(skipped)
    if fmt_chunk is None or len(fmt_chunk) < 16:
        raise AudioError("The WAV file on standard input has no sample format before its samples.")
    tag, channels, rate, _, _, bits = struct.unpack("<HHIIHH", fmt_chunk[:16])
    if tag == 0xFFFE and len(fmt_chunk) >= 26:  # WAVE_FORMAT_EXTENSIBLE: the actual tag is in the extension
        (tag,) = struct.unpack("<H", fmt_chunk[24:26])
    if channels == 0:
        raise AudioError("The WAV file on standard input has 0 channels, expected at least one.")
    is_plain = (tag, bits) in _WAV_SUBTYPES
    if not is_plain or struct.unpack("<H", fmt_chunk[12:14])[0] != channels * _SAMPLE_SIZES[_WAV_SUBTYPES[tag, bits]]:
        return b"".join(header_parts)
    return _WavFormat(rate, channels, _WAV_SUBTYPES[tag, bits], None if size == 0 or size >= UNKNOWN_SIZE else size)


def _read_samples(stream: Any, wav_format: _WavFormat) -> Iterator[np.ndarray]:
    """Yield samples as they arrive, (n, channels) float32, n > 0."""
    rate, channels, subtype = wav_format.sampling_rate, wav_format.num_channels, wav_format.subtype
    promised = wav_format.num_bytes
    frame_size, bytes_left, pending, num_bytes = _SAMPLE_SIZES[subtype] * channels, promised, b"", 0
    while bytes_left is None or bytes_left > 0:
        received = stream.read1(2**16 if bytes_left is None else min(2**16, bytes_left))
        if not received:
            break
        bytes_left = None if bytes_left is None else bytes_left - len(received)
        pending, num_bytes = pending + received, num_bytes + len(received)
        complete = len(pending) - len(pending) % frame_size
        if complete > 0:
            samples, pending = BytesIO(pending[:complete]), pending[complete:]
            yield audio.soundfile_module().read(
                samples, samplerate=rate, channels=channels, subtype=subtype, format="RAW", endian="LITTLE",
                dtype="float32", always_2d=True,
            )[0]  # fmt: skip
    is_padding = promised is None and pending == b"\0" and num_bytes % 2 == 0  # odd WAV chunks end in a zero byte
    if pending and not is_padding:
        raise TruncatedAudioError(f"The stream ends within a sample, after {len(pending)} of its {frame_size} bytes.")
    if bytes_left and promised is not None:
        raise TruncatedAudioError(
            f"The stream ends early, after {promised - bytes_left} of the {promised} bytes of samples in its header."
        )


def _wav_header(sampling_rate: int, num_samples: int | None) -> bytes:
    """Return the header of a mono 16-bit WAV file.

    Its length is unknown if `num_samples` is None or exceeds the limit of WAV.
    """
    unknown = 0xFFFFFFFF
    size = unknown if num_samples is None or 2 * num_samples > audio.MAX_WAV_SIZE else 2 * num_samples
    riff_size = unknown if size == unknown else size + 36
    fmt_chunk = struct.pack("<4sIHHIIHH", b"fmt ", 16, 1, 1, sampling_rate, 2 * sampling_rate, 2, 16)
    return struct.pack("<4sI4s", b"RIFF", riff_size, b"WAVE") + fmt_chunk + struct.pack("<4sI", b"data", size)
