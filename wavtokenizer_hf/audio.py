"""Read and write audio files. Needs the extra `audio` (soundfile, soxr).

All other modules read and write audio through this one. See also:

- `pipes.py`: audio on standard input and output
- `audio_decoders.py`: decoders
- `audio_containers.py`: file headers
- `audio_errors.py`: kinds of failures and warnings
"""

import logging
import math
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from io import BytesIO
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
from numpy.typing import ArrayLike
from transformers import audio_utils

from .atomic_files import atomic_write, cannot_write
from .audio_decoders import MAX_DECODED_BYTES, decoder_message, open_decoder, torchcodec_decoder
from .audio_decoders import soundfile_module as soundfile_module
from .audio_errors import MAX_CLIP_SECONDS, AudioError, TruncatedAudioError, check_channel
from .find_files import SUFFIXES as SUFFIXES


logger = logging.getLogger(__name__)

BACKENDS = ("soundfile", "torchcodec", "torchaudio")

MIN_SAMPLING_RATE, MAX_SAMPLING_RATE = 1000, 768000
"""Accepted sampling rates in Hz. Others mean a damaged header, and resampling them would take gigabytes."""

CANCELLATION_DB = 30
"""Warn if the mean of the channels is this many dB below the channels."""

WARNING_PEAK = 8.0
"""Warn about samples beyond this magnitude. Most likely a float file holds integers."""

MAX_PEAK = 1e10
"""Refuse samples beyond this magnitude. No audio format has them, and they overflow in the model."""


def load(
    path: str | os.PathLike,
    sampling_rate: int = 24000,
    backend: str = "soundfile",
    channel: str | int = "mean",
    max_seconds: float | None = None,
) -> np.ndarray:
    """Load an audio file as mono audio at `sampling_rate`.

    The samples equal those of transformers' `load_audio`. Channels are averaged, with a warning. Other sampling rates
    are resampled, with a log line (INFO). There is a warning each for channels that cancel out in their mean, for
    digital silence, and for samples beyond ±8.

    Args:
        path: Local audio file.
        sampling_rate: Sampling rate of the result, in Hz.
        backend: Library that decodes and resamples. The backends resample differently, so use one of them throughout
            for reproducible codes.

            - `"soundfile"`: soundfile decodes, or torchcodec if soundfile does not know the format. soxr resamples.
            - `"torchcodec"`: FFmpeg decodes and resamples. Needs torchcodec.
            - `"torchaudio"`: Needs torchaudio and transformers 5.23.
        channel: `"mean"`, `"left"`, `"right"` or the index of a channel, from 0.
        max_seconds: Maximum length in seconds. Longer audio is refused, before decoding if the header has the length.

    Returns:
        float32 array of shape (T,), nominally in [-1, 1].

    Raises:
        FileNotFoundError: The file does not exist.
        AudioError: The file is not audio, is damaged or truncated, holds no samples or non-finite ones, is too long,
            or lacks the channel. It is a ValueError with a `kind`, see `audio_errors.FAILURE_KINDS`.
        ImportError: The backend is not installed.
    """
    path = Path(path)
    if backend not in BACKENDS:
        raise ValueError(f"Got backend={backend!r}, expected one of {', '.join(BACKENDS)}.")
    if backend == "soundfile":
        with AudioReader(path, sampling_rate, channel, max_seconds) as reader:
            audio = reader.read()
            reader.log_warnings()
        return audio
    return _load_by_other_backend(path, sampling_rate, backend, channel, max_seconds)


def read_blocks(
    path: str | os.PathLike,
    sampling_rate: int = 24000,
    block_seconds: float = 5.0,
    channel: str | int = "mean",
    on_warnings: Callable[[dict[str, str]], None] | None = None,
) -> Iterator[np.ndarray]:
    """Read an audio file block by block, in constant memory. The concatenated blocks equal the samples of `load`.

    Args:
        path: Local audio file.
        sampling_rate: Sampling rate of the blocks, in Hz.
        block_seconds: Approximate length of a block, in seconds. Resampled blocks vary a little.
        channel: `"mean"`, `"left"`, `"right"` or the index of a channel, from 0.
        on_warnings: Function called after the last block with the warnings of the file, a dict kind -> text.

    Yields:
        float32 arrays of shape (n,), n > 0.

    Raises:
        FileNotFoundError: The file does not exist. All errors are raised while the blocks are read.
        AudioError: The file is not audio, is damaged, holds no samples or non-finite ones, or lacks the channel. The
            blocks before the damage come first.
        TruncatedAudioError: The file ends early. All blocks up to there come first.
    """
    with AudioReader(Path(path), sampling_rate, channel) as reader:
        try:
            yield from reader.blocks(block_seconds)
        finally:
            reader.log_warnings()
            if on_warnings is not None:
                on_warnings(reader.warnings)


def seconds(path: str | os.PathLike) -> float:
    """Return the length of an audio file in seconds. It is decoded only if its header has no length.

    Raises:
        FileNotFoundError: The file does not exist.
        AudioError: The file is not audio, is damaged or truncated, or holds no samples.
    """
    with AudioReader(Path(path)) as reader:
        if reader.source_seconds is not None:
            return reader.source_seconds
        return sum(map(len, reader.blocks(10.0))) / reader.sampling_rate


@dataclass
class AudioClip:
    """Mono audio of one clip, and properties of its source.

    Args:
        audio: float32 array of shape (T,).
        source_sampling_rate: Sampling rate of the source, in Hz.
        source_channels: Number of channels of the source.
        warnings: Warnings about the clip, kind (see `audio_errors.WARNING_KINDS`) -> text.
    """

    audio: np.ndarray
    source_sampling_rate: int
    source_channels: int
    warnings: dict[str, str] = field(default_factory=dict)


@dataclass
class Channels:
    """All channels of a clip, at the sampling rate of its source.

    Args:
        samples: float32 array of shape (T', C).
        sampling_rate: Sampling rate of the samples, in Hz.
        name: Name of the clip in messages.
    """

    samples: np.ndarray
    sampling_rate: int
    name: str


def read_channels(source: str | os.PathLike | bytes, name: str | None = None) -> Channels:
    """Read all channels of an audio file at its own sampling rate.

    Args:
        source: Local audio file, or the content of one.
        name: Name of the audio in messages. Default: the path, or "the content".

    Raises:
        AudioError: As in `load`, or the samples take more than `MAX_DECODED_BYTES`.
        OSError: The file cannot be read.
    """
    with AudioReader(source, name=name, quiet=True) as reader:
        rate, frame_size = reader.source_sampling_rate, 4 * reader.source_channels
        _check_memory(frame_size * rate * (reader.source_seconds or 0), reader.name)
        blocks, num_bytes = [], 0
        for block in reader.channel_blocks():
            num_bytes += block.nbytes
            _check_memory(num_bytes, reader.name)
            blocks.append(block)
        return Channels(np.concatenate(blocks), rate, reader.name)


def decode(
    source: str | os.PathLike | bytes,
    sampling_rate: int = 24000,
    channel: str | int = "mean",
    max_seconds: float | None = None,
) -> AudioClip:
    """Decode audio as `load` does with the soundfile backend, and return the warnings instead of logging them.

    Args:
        source: Local audio file, or the content of one.
        sampling_rate: Sampling rate of the result, in Hz.
        channel: `"mean"`, `"left"`, `"right"` or the index of a channel, from 0.
        max_seconds: Maximum length in seconds. Longer audio is refused, before decoding if the header has the length.

    Returns:
        `AudioClip`: float32 audio (T,), nominally in [-1, 1], with warnings and properties of the source.

    Raises:
        AudioError: The audio is damaged, truncated, empty, not finite or too long, or lacks the channel; see `kind`.
        OSError: The file cannot be read.
        ImportError: soundfile or soxr is missing.
    """
    with AudioReader(source, sampling_rate, channel, max_seconds, quiet=True) as reader:
        audio = reader.read()
        return AudioClip(audio, reader.source_sampling_rate, reader.source_channels, reader.warnings)


def load_clip(
    value: Any, sampling_rate: int, channel: str | int = "mean", max_seconds: float | None = MAX_CLIP_SECONDS
) -> AudioClip:
    """Load a clip from a dataset row, path, bytes or array. The samples equal those of `load`.

    Args:
        value: Path, content of an audio file, row of an Audio column of the datasets library (decoded or not), or
            `Channels`. Arrays are resampled as files are.
        sampling_rate: Sampling rate of the result, in Hz.
        channel: `"mean"`, `"left"`, `"right"` or the index of a channel, from 0.
        max_seconds: Maximum length in seconds. Longer audio is refused. None: no limit.

    Returns:
        `AudioClip`: float32 audio (T,), nominally in [-1, 1], with warnings and properties of the source.

    Raises:
        AudioError: The value is not audio, or is refused for another reason of `audio_errors.FAILURE_KINDS`.
        OSError: The file cannot be read.
    """
    if isinstance(value, Channels):
        _check_seconds(len(value.samples) / value.sampling_rate, max_seconds, value.name)
        return _mono_clip(value.samples, value.sampling_rate, sampling_rate, channel, value.name)
    if hasattr(value, "as_py"):  # pyarrow scalar, from datasets with format "arrow"
        value = value.as_py()
    encoded = getattr(value, "_hf_encoded", None)  # path and bytes behind a decoder object of the datasets library
    value = value if encoded is None else encoded
    if isinstance(value, dict) and value.get("array") is not None:
        return _read_array(value["array"], value.get("sampling_rate"), sampling_rate, channel, max_seconds)
    if isinstance(value, dict):
        value = value.get("path") if value.get("bytes") is None else value["bytes"]
    value = bytes(value) if isinstance(value, (bytearray, memoryview)) else value
    if not isinstance(value, (str, os.PathLike, bytes)):
        raise AudioError(
            f"Got {type(value).__name__} as audio, expected a path, bytes, or a row of an Audio column.", "no-audio"
        )
    return decode(value, sampling_rate, channel, max_seconds)


def _read_array(array: Any, rate: Any, sampling_rate: int, channel: str | int, max_seconds: float | None) -> AudioClip:
    try:
        samples = np.asarray(array, dtype=np.float32)
    except (TypeError, ValueError) as error:
        raise AudioError(f"Got an array that is not numeric: {error}.", "no-audio") from error
    rate = check_sampling_rate(rate, "the array")
    if samples.ndim != 1 or samples.size == 0:
        raise AudioError(
            f"Got an array of shape {samples.shape}, expected mono audio (T,) with at least one sample.",
            "empty" if samples.size == 0 else "no-audio",
        )
    _check_seconds(len(samples) / rate, max_seconds, "The array")
    return _mono_clip(samples[:, None], rate, sampling_rate, channel, "the array")


class AudioReader:
    """Open audio file. All functions of this package that read audio use it.

    Args:
        source: Local audio file, the content of one, or a seekable binary file.
        sampling_rate: Sampling rate of the result, in Hz.
        channel: `"mean"`, `"left"`, `"right"` or the index of a channel, from 0.
        max_seconds: Maximum length in seconds. Longer audio is refused, before decoding if the header has the length.
        name: Name of the audio in messages. Default: the path, or "the content".
        quiet: Do not log that the audio is averaged or resampled.

    Attributes:
        source_sampling_rate: Sampling rate of the source, in Hz.
        source_channels: Number of channels of the source.
        source_seconds: Length of the source by its header, in seconds, or None.
        warnings: Warnings, kind -> text. Complete after the last block.

    Raises:
        OSError: The file cannot be read.
        AudioError: The audio is refused.
    """

    def __init__(
        self,
        source: str | os.PathLike | bytes | BinaryIO,
        sampling_rate: int = 24000,
        channel: str | int = "mean",
        max_seconds: float | None = None,
        name: str | None = None,
        quiet: bool = False,
    ):
        soundfile_module()
        path = None
        self._file: BinaryIO
        if isinstance(source, (str, os.PathLike)):
            path = Path(source)
            self._file = _open_file(path)
        else:
            self._file = BytesIO(source) if isinstance(source, bytes) else source
        self.name = name or ("the content" if path is None else str(path))
        self.sampling_rate, self._max_seconds = sampling_rate, max_seconds
        try:
            if self._file.seek(0, 2) == 0:
                raise AudioError(f"Cannot read {self.name} as audio: it is empty (0 bytes).", "empty")
            self._decoder = open_decoder(self._file, self.name, path)
            self.source_sampling_rate = check_sampling_rate(self._decoder.sampling_rate, self.name)
            self.source_channels = self._decoder.num_channels
            self._mixer = Mixer(channel, self.source_channels, self.name)
            num_frames = self._decoder.num_frames
            self.source_seconds = None if num_frames is None else num_frames / self.source_sampling_rate
            if self.source_seconds is not None:
                self._check_length(self.source_seconds)
        except BaseException:
            self.close()
            raise
        if not quiet:
            log_conversion(self.name, self.source_channels, self.source_sampling_rate, sampling_rate, channel)

    def blocks(self, block_seconds: float = 5.0) -> Iterator[np.ndarray]:
        """Yield mono audio at `sampling_rate`, float32 arrays (n,), n > 0.

        Raises:
            TruncatedAudioError: The file ends early. All blocks up to there come first.
            AudioError: The audio is refused for another reason.
        """
        block_size, num_samples = max(1, round(block_seconds * self.source_sampling_rate)), 0
        for block in resample_blocks(self._mono_blocks(block_size), self.source_sampling_rate, self.sampling_rate):
            num_samples += len(block)
            yield block
        if num_samples == 0:
            raise AudioError(f"{self.name} holds no samples, expected at least one.", "empty")

    def read(self) -> np.ndarray:
        """Return the whole audio, float32 (T,). Raises as `blocks` does."""
        return np.concatenate(list(self.blocks()))

    @property
    def warnings(self) -> dict[str, str]:
        return self._mixer.warnings

    def log_warnings(self) -> None:
        log_warnings(self.name, self.warnings)

    def channel_blocks(self) -> Iterator[np.ndarray]:
        """Yield all channels at the source's sampling rate, float32 blocks (n, C), n > 0. Raises as `blocks` does."""
        num_samples = 0
        for block in self._decoder.blocks():
            num_samples += len(block)
            self._check_length(num_samples / self.source_sampling_rate)
            yield block
        if num_samples == 0:
            raise AudioError(f"{self.name} holds no samples, expected at least one.", "empty")

    def _mono_blocks(self, block_size: int) -> Iterator[np.ndarray]:
        """Yield mono audio at the source's sampling rate in blocks of `block_size` samples; the last is shorter."""
        pending, num_pending, num_samples, truncation = [], 0, 0, None
        try:
            for block in self._decoder.blocks():
                num_samples += len(block)
                self._check_length(num_samples / self.source_sampling_rate)
                pending.append(self._mixer(block))
                num_pending += len(block)
                while num_pending >= block_size:
                    joined = np.concatenate(pending)
                    yield joined[:block_size]
                    pending, num_pending = [joined[block_size:]], num_pending - block_size
        except TruncatedAudioError as error:
            truncation = error
        if num_pending > 0:
            yield np.concatenate(pending)
        if truncation is not None:
            raise truncation

    def _check_length(self, seconds: float) -> None:
        _check_seconds(seconds, self._max_seconds, self.name)

    def close(self) -> None:
        if hasattr(self, "_decoder"):
            self._decoder.close()
        self._file.close()

    def __enter__(self) -> "AudioReader":
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()


class Mixer:
    """Mix channels (n, C), float32, to mono (n,), block by block, and collect `warnings` about the samples.

    Args:
        channel: `"mean"`, `"left"`, `"right"` or the index of a channel, from 0.
        num_channels: Number of channels C of the blocks.
        name: Name of the audio in messages.

    Raises:
        AudioError: There is no such channel. A call raises it for samples that are not finite.
    """

    def __init__(self, channel: str | int, num_channels: int, name: str):
        self._index = check_channel(channel)
        self._name = name
        if self._index is not None and self._index >= num_channels:
            raise AudioError(
                f"{name} has {num_channels} channels, expected a channel with index {self._index}.", "no-channel"
            )
        self._peak = self._energy = self._channel_energy = 0.0
        self._num_samples = 0

    def __call__(self, channels: np.ndarray) -> np.ndarray:
        if channels.shape[1] == 1:
            mono = channels[:, 0]
        elif self._index is not None:
            mono = channels[:, self._index]
        else:
            with np.errstate(all="ignore"):  # non-finite samples are refused below
                mono = channels.mean(axis=1)
        is_invalid = ~(np.abs(mono) <= MAX_PEAK)  # NaN too
        if is_invalid.any():
            first = int(np.flatnonzero(is_invalid)[0])
            raise AudioError(
                f"{self._name} holds NaN or infinite samples, or some beyond ±{MAX_PEAK:g}: the first is "
                f"{mono[first]:g}, at sample {self._num_samples + first} of the source. Expected finite numbers. "
                "Repair or drop it.",
                "not-finite",
            )
        if channels.shape[1] > 1 and self._index is None:
            with np.errstate(all="ignore"):
                self._channel_energy += float(np.einsum("nc,nc->", channels, channels)) / channels.shape[1]
                self._energy += float(np.dot(mono, mono))
        self._num_samples += len(mono)
        self._peak = max(self._peak, float(np.abs(mono).max(initial=0)))
        return mono

    @property
    def warnings(self) -> dict[str, str]:
        """Warnings about all blocks up to now, kind -> text."""
        texts = {}
        if self._num_samples > 0 and self._energy * 10 ** (CANCELLATION_DB / 10) <= self._channel_energy > 0:
            attenuation = "to silence"
            if self._energy > 0:
                attenuation = f"to {10 * math.log10(self._channel_energy / self._energy):.0f} dB below them"
            texts["cancelled"] = (
                f"the channels cancel each other in their mean, {attenuation}; choose one with channel='left' "
                "(--channel left)"
            )
        elif self._num_samples > 0 and self._peak == 0:
            texts["silent"] = "every sample is zero"
        if self._peak > WARNING_PEAK:
            texts["out-of-range"] = (
                f"the largest sample is {self._peak:.5g}, far from [-1, 1]; if the samples are integers stored as "
                "floats, divide them by their full scale, such as 32768"
            )
        return texts


def _check_seconds(seconds: float, max_seconds: float | None, name: str) -> None:
    if max_seconds is not None and seconds > max_seconds:
        raise AudioError(
            f"{name} lasts {seconds:.0f} s or more, expected at most {max_seconds:g} s. Cut it, or raise the limit "
            "(--max-clip-seconds).",
            "too-long",
        )


def _check_memory(num_bytes: float, name: str) -> None:
    if num_bytes > MAX_DECODED_BYTES:
        raise AudioError(
            f"{name} would take {num_bytes / 2**30:.0f} GiB of memory, since it is read at once; expected at most "
            f"{MAX_DECODED_BYTES / 2**30:.0f}. Cut it.",
            "memory",
        )


def check_sampling_rate(rate: Any, name: str) -> int:
    """Return the sampling rate in Hz as an integer. Raises AudioError unless it is a whole number in range."""
    try:
        number = int(rate)
    except (TypeError, ValueError, OverflowError):
        number = None
    if number is None or number != rate or not MIN_SAMPLING_RATE <= number <= MAX_SAMPLING_RATE:
        raise AudioError(
            f"{name} has a sampling rate of {rate} Hz, expected a whole number from {MIN_SAMPLING_RATE:,} to "
            f"{MAX_SAMPLING_RATE:,} Hz. Its header may be damaged.",
            "sampling-rate",
        )
    return number


def _mono_clip(
    channels: np.ndarray, rate: int, sampling_rate: int, channel: str | int = "mean", name: str = "the clip"
) -> AudioClip:
    """Mix channels (T', C), float32, to mono and resample them from `rate` to `sampling_rate`. Raises AudioError."""
    rate = check_sampling_rate(rate, name)
    mixer = Mixer(channel, channels.shape[1], name)
    blocks = list(resample_blocks(iter([mixer(channels)] if len(channels) else []), rate, sampling_rate))
    if not blocks:
        raise AudioError(f"{name} holds no samples, expected at least one.", "empty")
    return AudioClip(np.concatenate(blocks), rate, channels.shape[1], mixer.warnings)


def save(
    path: str | os.PathLike,
    audio: ArrayLike,
    sampling_rate: int = 24000,
    subtype: str | None = None,
    format: str | None = None,
) -> Path:
    """Save mono audio to a file. The write is atomic: `path` is never a partial file.

    Args:
        path: Output file. Its extension (.wav, .flac, .ogg, .mp3) selects the format.
        audio: Array or tensor of shape (T,), (1, T) or (1, 1, T), nominally in [-1, 1]. Integer formats clip other
            samples, and a warning counts them.
        sampling_rate: Sampling rate of `audio`, in Hz.
        subtype: Sample format, by its soundfile name. Default: 16-bit integers where the format has them. `"FLOAT"`
            in a WAV file preserves all values.
        format: File format, by its soundfile name. Needed only if the extension does not determine it.

    Returns:
        Path of the file, equal to `path`.

    Raises:
        ValueError: The audio has another shape, is empty or not finite, or the extension names no format.
        OSError: The file cannot be written.
    """
    if hasattr(audio, "detach"):
        audio = audio.detach().cpu().float().numpy()
    audio = np.asarray(audio)
    if audio.size == 0 or audio.size != audio.shape[-1]:
        raise ValueError(f"Got audio of shape {audio.shape}, expected one mono clip: (T,), (1, T) or (1, 1, T).")
    _check_finite(audio)
    with writing(path, sampling_rate, subtype, format) as write:
        write(audio.reshape(-1))
    return Path(path)


@contextmanager
def writing(
    path: str | os.PathLike, sampling_rate: int = 24000, subtype: str | None = None, format: str | None = None
) -> Iterator[Callable]:
    """Write mono audio block by block: `with writing(path) as write: write(block)`.

    The file appears at `path` when the `with` block ends without an error, and after a check that all samples were
    written. An error leaves no file.

    Args:
        path: Output file. Its extension (.wav, .flac, .ogg, .mp3) selects the format.
        sampling_rate: Sampling rate of the audio, in Hz.
        subtype: Sample format, by its soundfile name. Default: 16-bit integers where the format has them.
        format: File format, by its soundfile name. Needed only if the extension does not determine it.

    Yields:
        Function that writes the next block: float array (n,), n >= 0, nominally in [-1, 1]. Integer formats clip
            other samples, with a warning.

    Raises:
        ValueError: The audio is not finite, there is none, or the extension names no format.
        OSError: The file cannot be written.
    """
    soundfile = soundfile_module()
    path = Path(path)
    format = format or path.suffix[1:].upper()
    if format not in soundfile.available_formats():
        raise ValueError(f"Cannot infer the audio format from the extension of {path}; use .wav, .flac, .ogg or .mp3.")
    subtype = subtype or soundfile.default_subtype(format)
    monitor = ClippingMonitor()

    def write(audio: np.ndarray) -> None:
        monitor.add(audio)
        try:
            for start in range(0, len(audio), WRITE_SAMPLES):
                file.write(audio[start : start + WRITE_SAMPLES])
        except AssertionError as error:  # SoundFile.write (0.14) raises it if not all samples were written
            output.check()
            raise OSError(f"Cannot write {path}: not all samples were written. Is the disk full?") from error
        output.check()
        if format == "WAV" and output.size > MAX_WAV_SIZE:
            raise ValueError(f"{path} would exceed 4 GiB, the limit of WAV files. Name a .flac or .w64 file.")

    with atomic_write(path) as partial, _CheckedOutput(partial, path) as output:
        try:
            with soundfile.SoundFile(output, "w", sampling_rate, 1, subtype=subtype, format=format) as file:
                yield write
        except soundfile.LibsndfileError as error:
            output.check()
            raise OSError(f"Cannot write {path}: {error}") from error
        output.finish()
        if monitor.num_samples and format != "RAW":  # raw files have no header to check
            _check_written(partial, path, monitor.num_samples)
    if subtype not in ("FLOAT", "DOUBLE"):
        monitor.warn_of_clipping(str(path))


WRITE_SAMPLES = 2**16
"""Samples per call of libsndfile. Its OGG encoder crashes on millions of samples at once (libsndfile 1.2.2)."""


class _CheckedOutput:
    """Output file for libsndfile that stores the first write error. libsndfile ignores errors in OGG, MP3 and FLAC."""

    def __init__(self, partial: Path, path: Path):
        self._file, self._path = partial.open("r+b"), path
        self._error: OSError | None = None
        self.size = 0  # bytes, headers included

    def __enter__(self) -> "_CheckedOutput":
        return self

    def __exit__(self, *exception: object) -> None:
        with suppress(OSError):
            self._file.close()

    def write(self, content: bytes) -> int:
        try:
            self._file.write(content)
            self.size = max(self.size, self._file.tell())
        except OSError as error:
            self._error = self._error or error
            return 0
        return len(content)

    def read(self, size: int = -1) -> bytes:
        return self._file.read(size)

    def seek(self, offset: int, whence: int = 0) -> int:
        try:
            return self._file.seek(offset, whence)  # flushes the buffer, which can fail
        except OSError as error:
            self._error = self._error or error
            return -1

    def tell(self) -> int:
        return self._file.tell()

    def flush(self) -> None:
        try:
            self._file.flush()
        except OSError as error:
            self._error = self._error or error

    def check(self) -> None:
        """Raise OSError if a write has failed."""
        if self._error is not None:
            raise cannot_write(self._path, self._error) from self._error

    def finish(self) -> None:
        """Flush the buffer, then check."""
        self.flush()
        self.check()


def _check_written(partial: Path, path: Path, num_samples: int) -> None:
    """Raise OSError unless the header of the written file can be read and has the number of samples."""
    try:
        with soundfile_module().SoundFile(partial) as file:
            num_written = file.frames
    except soundfile_module().LibsndfileError as error:
        raise OSError(
            f"Cannot write {path}: the written file cannot be read back ({decoder_message(error)})."
        ) from error
    if num_written != num_samples:
        raise OSError(f"Cannot write {path}: {num_written} of {num_samples} samples can be read back.")


MAX_WAV_SIZE = 2**32 - 2**16
"""Largest WAV file in bytes. Its header counts them in 32 bits, and libsndfile does not report an overflow."""


class ClippingMonitor:
    """Check blocks of audio before they are written, and count the samples outside [-1, 1]."""

    def __init__(self) -> None:
        self.num_samples, self.num_clipped, self.peak = 0, 0, 0.0

    def add(self, audio: np.ndarray) -> None:
        """Count the samples of a block. Raises ValueError unless they are finite floats."""
        _check_finite(audio)
        self.num_samples += audio.size
        self.num_clipped += int((np.abs(audio) > 1).sum())
        self.peak = max(self.peak, float(np.abs(audio).max(initial=0)))

    def warn_of_clipping(self, name: str) -> None:
        if self.num_clipped:
            logger.warning(
                "%s: %d of %d samples lie outside [-1, 1] (peak %.3f) and are clipped; "
                "audio.save(..., subtype='FLOAT') keeps them in a WAV file",
                name, self.num_clipped, self.num_samples, self.peak,
            )  # fmt: skip


def _check_finite(audio: np.ndarray) -> None:
    if not np.issubdtype(audio.dtype, np.floating) or not np.isfinite(audio).all():
        raise ValueError(f"Got audio of dtype {audio.dtype} or with NaN or infinite samples, expected finite floats.")


def log_conversion(name: str, channels: int, rate: int, sampling_rate: int, channel: str | int = "mean") -> None:
    """Log that channels are averaged or that the audio is resampled."""
    if channels > 1 and channel == "mean":
        logger.warning("%s: %d channels, averaged to one", name, channels)
    if rate != sampling_rate:
        logger.info("%s: resampled from %d to %d Hz", name, rate, sampling_rate)


def log_warnings(name: str, warnings: dict[str, str]) -> None:
    """Log the warnings of a clip, kind -> text."""
    for kind, text in warnings.items():
        # the kind is part of the format string, so that logging filters see one message per kind
        logger.warning(f"%s: {kind}: %s", name, text)


def resample_blocks(blocks: Iterator[np.ndarray], rate: int, sampling_rate: int) -> Iterator[np.ndarray]:
    """Resample mono blocks (n,) from `rate` to `sampling_rate` Hz, to float32 blocks (m,), m > 0.

    The concatenated blocks equal the samples of transformers' `load_audio` with `backend="soundfile"`.
    """
    import soxr

    resampler = None if rate == sampling_rate else soxr.ResampleStream(rate, sampling_rate, 1, "float32", "HQ")
    num_read = num_yielded = 0
    truncation = None
    try:
        for block in blocks:
            num_read += len(block)
            block = np.ascontiguousarray(block, dtype=np.float32)
            if resampler is not None:
                block = resampler.resample_chunk(block)
            num_yielded += len(block)
            if len(block) > 0:
                yield block
    except TruncatedAudioError as error:
        truncation = error
    if resampler is not None and num_read > 0:
        tail = resampler.resample_chunk(np.zeros(0, np.float32), last=True)
        num_missing = -(-num_read * sampling_rate // rate) - num_yielded
        tail = np.pad(tail, (0, max(0, num_missing - len(tail))))[:num_missing]
        if len(tail) > 0:
            yield tail
    if truncation is not None:
        raise truncation


def _open_file(path: Path) -> BinaryIO:
    _check_file(path)
    return open(path, "rb")


def _check_file(path: Path) -> None:
    if not path.is_file():
        raise FileNotFoundError(f"There is no file {path}. Give the path of an audio file.")
    if not os.access(path, os.R_OK):
        raise PermissionError(f"There is no permission to read {path}. Grant it, or choose another file.")


def _load_by_other_backend(
    path: Path, sampling_rate: int, backend: str, channel: str | int, max_seconds: float | None
) -> np.ndarray:
    """Load audio with torchaudio, as transformers' `load_audio` does, or with torchcodec.

    With torchcodec, channels are averaged here, since FFmpeg's downmix of two channels is 3 dB louder than their mean.
    """
    _check_file(path)
    if backend == "torchaudio":
        if not hasattr(audio_utils, "_load_audio_soundfile"):  # transformers 5.23
            raise ImportError(
                "backend='torchaudio' needs transformers 5.23 or newer. Upgrade it, or choose another backend."
            )
        if check_channel(channel) is not None:
            raise ValueError(f"Got channel={channel!r} with backend='torchaudio', expected 'mean'.")
        with AudioReader(path, sampling_rate, channel, max_seconds):
            pass
    try:
        if backend == "torchaudio":
            audio = audio_utils.load_audio(str(path), sampling_rate=sampling_rate, backend=backend)[:, None]
        else:
            decoder = torchcodec_decoder()(str(path), sample_rate=sampling_rate)
            metadata = decoder.metadata
            log_conversion(str(path), metadata.num_channels, metadata.sample_rate, sampling_rate, channel)
            duration = metadata.duration_seconds_from_header
            if max_seconds is not None and duration is not None and duration > max_seconds:
                raise AudioError(f"{path} lasts {duration:.0f} s, expected at most {max_seconds:g} s.", "too-long")
            audio = decoder.get_all_samples().data.T.numpy()
    except (RuntimeError, EOFError) as error:  # the decoders raise these for a damaged file
        raise AudioError(f"Cannot read {path} as audio: {decoder_message(error)}. The file may be damaged.") from error
    if audio.size == 0:
        raise AudioError(f"{path} holds no samples, expected at least one.", "empty")
    mixer = Mixer(channel, audio.shape[1], str(path))
    audio = np.ascontiguousarray(mixer(np.asarray(audio, dtype=np.float32)))
    log_warnings(str(path), mixer.warnings)
    return audio
