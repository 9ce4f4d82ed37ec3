"""Sound files: the only place that reads or writes them; pipes.py does so for streams. Needs the extra `audio`
(soundfile, soxr).

`audio_decoders.py` holds the decoders, `audio_containers.py` what headers promise, `audio_errors.py` the kinds of
failures.
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
from .audio_decoders import LARGEST_WHOLE, open_decoder, torchcodec_decoder
from .audio_decoders import reason as _reason
from .audio_decoders import soundfile_module as soundfile_module
from .audio_errors import MAX_CLIP_SECONDS, AudioError, TruncatedAudioError, check_channel
from .find_files import SUFFIXES as SUFFIXES


logger = logging.getLogger(__name__)

BACKENDS = ("soundfile", "torchcodec", "torchaudio")

SAMPLING_RATES = (1000, 768000)
"""Hz that are taken for real: a header that says less or more is damaged, and resampling it would take gigabytes."""

CANCELLED_DB = 30
"""How far the mean of the channels may lie below them."""

LARGEST_SAMPLE = 8.0
"""What lies beyond is reported: integers in a float file, most likely."""

NO_SAMPLE = 1e10
"""What lies beyond is refused: no format has such numbers, and they overflow in the model."""


def load(
    path: str | os.PathLike,
    sampling_rate: int = 24000,
    backend: str = "soundfile",
    channel: str | int = "mean",
    max_seconds: float | None = None,
) -> np.ndarray:
    """Reads a sound file as mono audio at `sampling_rate`, to the same samples as transformers' `load_audio`.

    Several channels are averaged, and a warning says so; other rates are resampled, and a log line (INFO) says so. A
    mean in which the channels cancel each other, digital silence and samples beyond ±8 give a warning each.

    Args:
        path: a local file.
        sampling_rate: Hz of what is returned.
        backend: `"soundfile"` (decodes with soundfile, or with torchcodec what that does not know; resamples with
            soxr), or where those are installed `"torchcodec"` (decodes and resamples by FFmpeg) or `"torchaudio"`
            (needs transformers 5.23). The three resample differently, so for equal codes use one throughout.
        channel: `"mean"`, `"left"`, `"right"` or the number of a channel, from 0.
        max_seconds: longer audio is refused, before it is read if its header says so.

    Returns:
        float32 array of shape (T,), nominally in [-1, 1].

    Raises:
        FileNotFoundError: there is no such file.
        AudioError: a ValueError with a `kind` (see `audio_errors.FAILURE_KINDS`): the file is not sound, is damaged or
            cut off, holds no samples or some that are not finite, is too long, or lacks the channel.
        ImportError: the backend is not installed.
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
    """Reads a sound file block by block: joined, the very samples of `load`, in memory that does not grow with the
    file.

    Args:
        path: Local file.
        sampling_rate: Hz of the blocks.
        block_seconds: Approximate length of a block. Resampled blocks vary a little.
        channel: `"mean"`, `"left"`, `"right"` or the number of a channel, from 0.
        on_warnings: Function that gets the warnings of the file, kind -> text, after its last block.

    Yields:
        float32 arrays of shape (n,), n > 0.

    Raises:
        FileNotFoundError: There is no such file. All errors are raised when the blocks are read.
        AudioError: The file is not audio, is damaged, holds no samples or some that are not finite, or lacks the
            channel. A file that is damaged later on fails there. A truncated file gives all that is left, and then
            TruncatedAudioError.
    """
    with AudioReader(Path(path), sampling_rate, channel) as reader:
        try:
            yield from reader.blocks(block_seconds)
        finally:
            reader.log_warnings()
            if on_warnings is not None:
                on_warnings(reader.warnings)


def seconds(path: str | os.PathLike) -> float:
    """Return the length of an audio file in seconds, by its header, or by decoding it if the header has no length.

    Raises:
        FileNotFoundError: There is no such file.
        AudioError: The file is not audio, is damaged or truncated, or holds no samples.
    """
    with AudioReader(Path(path)) as reader:
        if reader.source_seconds is not None:
            return reader.source_seconds
        return sum(map(len, reader.blocks(10.0))) / reader.sampling_rate


@dataclass
class AudioClip:
    """Mono audio (T,), float32, and what it was made of: the rate in Hz and the number of channels of its source.

    `warnings` maps kinds (`audio_errors.WARNING_KINDS`) to a text each.
    """

    audio: np.ndarray
    source_sampling_rate: int
    source_channels: int
    warnings: dict[str, str] = field(default_factory=dict)


@dataclass
class Channels:
    """Audio as its source has it: samples (T', C), float32, at `sampling_rate` Hz. `name` is for messages."""

    samples: np.ndarray
    sampling_rate: int
    name: str


def read_channels(source: str | os.PathLike | bytes, name: str | None = None) -> Channels:
    """Read an audio file, or the content of one, with all its channels, at its own rate.

    Raises AudioError and OSError, as `load` does, also for more than `LARGEST_WHOLE` bytes of samples.
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
    """Reads sound as `load` does with soundfile, to the same samples, and says in the result what `load` says in the
    log.

    Args:
        source: Local file, or the content of one.
        sampling_rate: Hz of the result.
        channel: `"mean"`, `"left"`, `"right"` or the number of a channel, from 0.
        max_seconds: Longest audio that is read. Longer audio is refused, before it is read if its header gives the
            length.

    Returns:
        `AudioClip`: float32 audio (T,), nominally in [-1, 1], with rate and channels of its source, and warnings.

    Raises:
        AudioError: The audio is damaged, truncated, empty, not finite or too long, or lacks the channel; see `kind`.
        OSError: the file cannot be read.
        ImportError: soundfile or soxr is missing.
    """
    with AudioReader(source, sampling_rate, channel, max_seconds, quiet=True) as reader:
        audio = reader.read()
        return AudioClip(audio, reader.source_sampling_rate, reader.source_channels, reader.warnings)


def load_clip(
    value: Any, sampling_rate: int, channel: str | int = "mean", max_seconds: float | None = MAX_CLIP_SECONDS
) -> AudioClip:
    """
    Reads a clip as a dataset or another source gives it, to the samples of `load`; arrays are resampled likewise.

    Args:
        value: Path, content of an audio file, row of an Audio column of the datasets library (decoded or not), or
            `Channels`.
        sampling_rate: Hz of the result.
        channel: `"mean"`, `"left"`, `"right"` or the number of a channel, from 0.
        max_seconds: Longest audio that is read; longer audio is refused. None: no limit.

    Returns:
        `AudioClip`: float32 audio (T,), nominally in [-1, 1], with rate and channels of its source, and warnings.

    Raises:
        AudioError: it is not sound, or is refused for another reason of `audio_errors.FAILURE_KINDS`.
        OSError: its file cannot be read.
    """
    if isinstance(value, Channels):
        _check_seconds(len(value.samples) / value.sampling_rate, max_seconds, value.name)
        return mono(value.samples, value.sampling_rate, sampling_rate, channel, value.name)
    if hasattr(value, "as_py"):  # a scalar of pyarrow, in the format "arrow" of datasets
        value = value.as_py()
    encoded = getattr(value, "_hf_encoded", None)  # what the decoder objects of the datasets library are made of
    value = value if encoded is None else encoded
    if isinstance(value, dict) and value.get("array") is not None:
        return _read_array(value["array"], value.get("sampling_rate"), sampling_rate, channel, max_seconds)
    if isinstance(value, dict):
        value = value.get("path") if value.get("bytes") is None else value["bytes"]
    value = bytes(value) if isinstance(value, (bytearray, memoryview)) else value
    if not isinstance(value, (str, os.PathLike, bytes)):
        raise AudioError(
            f"Got {type(value).__name__} as sound, expected a path, bytes, or a row of an Audio column.", "no-audio"
        )
    return decode(value, sampling_rate, channel, max_seconds)


def _read_array(array: Any, rate: Any, sampling_rate: int, channel: str | int, max_seconds: float | None) -> AudioClip:
    try:
        samples = np.asarray(array, dtype=np.float32)
    except (TypeError, ValueError) as error:
        raise AudioError(f"Got an array that holds no numbers: {error}.", "no-audio") from error
    rate = check_sampling_rate(rate, "the array")
    if samples.ndim != 1 or samples.size == 0:
        raise AudioError(
            f"Got an array of shape {samples.shape}, expected mono audio (T,) with a sample or more.",
            "empty" if samples.size == 0 else "no-audio",
        )
    _check_seconds(len(samples) / rate, max_seconds, "The array")
    return mono(samples[:, None], rate, sampling_rate, channel, "the array")


class AudioReader:
    """
    An opened sound file, or the content of one: every reader of this package is made of it.

    Args:
        source: a local file, the content of one, or a seekable binary file.
        sampling_rate: Hz of what is given.
        channel: `"mean"`, `"left"`, `"right"` or the number of a channel, from 0.
        max_seconds: longer audio is refused, before it is read if its header says so.
        name: for messages. Default: the path, or "the content".
        quiet: nothing is logged.

    Attributes:
        source_sampling_rate, source_channels: of the source.
        source_seconds: its length as its header says, or None.
        warnings: kind -> text, complete after the last block.

    Raises:
        OSError: the file cannot be read.
        AudioError: it is refused.
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
                raise AudioError(f"Cannot read {self.name} as sound: it is empty (0 bytes).", "empty")
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
            say_what_changes(self.name, self.source_channels, self.source_sampling_rate, sampling_rate, channel)

    def blocks(self, block_seconds: float = 5.0) -> Iterator[np.ndarray]:
        """Gives the audio, float32 arrays (n,), n > 0. Raises AudioError; TruncatedAudioError after all that came."""
        size, count = max(1, round(block_seconds * self.source_sampling_rate)), 0
        for block in mono_blocks(self._joined(size), self.source_sampling_rate, self.sampling_rate):
            count += len(block)
            yield block
        if count == 0:
            raise AudioError(f"Got no samples in {self.name}, which holds no samples; expected at least one.", "empty")

    def read(self) -> np.ndarray:
        """Gives all of the audio, (T,), float32."""
        return np.concatenate(list(self.blocks()))

    @property
    def warnings(self) -> dict[str, str]:
        return self._mixer.warnings

    def log_warnings(self) -> None:
        log_warnings(self.name, self.warnings)

    def channel_blocks(self) -> Iterator[np.ndarray]:
        """Gives what the decoder gives: blocks (n, C), float32, at the source's rate. Raises as `blocks` does."""
        count = 0
        for block in self._decoder.blocks():
            count += len(block)
            self._check_length(count / self.source_sampling_rate)
            yield block
        if count == 0:
            raise AudioError(f"Got no samples in {self.name}, which holds no samples; expected at least one.", "empty")

    def _joined(self, size: int) -> Iterator[np.ndarray]:
        """The decoder's blocks, mono, `size` samples at a time. What comes before a cut is given before its error."""
        pending, length, count, late = [], 0, 0, None
        try:
            for block in self._decoder.blocks():
                count += len(block)
                self._check_length(count / self.source_sampling_rate)
                pending.append(self._mixer(block))
                length += len(block)
                while length >= size:
                    joined = np.concatenate(pending)
                    yield joined[:size]
                    pending, length = [joined[size:]], length - size
        except TruncatedAudioError as error:
            late = error
        if length > 0:
            yield np.concatenate(pending)
        if late is not None:
            raise late

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
    """
    Channels (n, C), float32 -> mono (n,), block by block; keeps what is strange about them in `warnings`.

    Args:
        channel: `"mean"`, `"left"`, `"right"` or the number of a channel, from 0.
        num_channels: C.
        name: for messages.

    Raises:
        AudioError: there is no such channel; when called: samples that are not finite.
    """

    def __init__(self, channel: str | int, num_channels: int, name: str):
        self._index = check_channel(channel)
        self._name = name
        if self._index is not None and self._index >= num_channels:
            raise AudioError(
                f"{name} has {num_channels} channels, expected one of number {self._index}.", "no-channel"
            )
        self._peak = self._energy = self._channel_energy = 0.0
        self._num_samples = 0

    def __call__(self, channels: np.ndarray) -> np.ndarray:
        if channels.shape[1] == 1:
            mono = channels[:, 0]
        elif self._index is not None:
            mono = channels[:, self._index]
        else:
            with np.errstate(all="ignore"):  # what is not finite is refused below
                mono = channels.mean(axis=1)
        is_bad = ~(np.abs(mono) <= NO_SAMPLE)
        if is_bad.any():
            first = int(np.flatnonzero(is_bad)[0])
            raise AudioError(
                f"{self._name} holds NaN or infinite samples, or some beyond ±{NO_SAMPLE:g}: the first is "
                f"{mono[first]:g}, at sample {self._num_samples + first} of its own. Expected finite numbers; repair "
                "or drop it.",
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
        """Kind -> text, of all blocks up to now."""
        found = {}
        if self._num_samples > 0 and self._energy * 10 ** (CANCELLED_DB / 10) <= self._channel_energy > 0:
            how_far = "to silence"
            if self._energy > 0:
                how_far = f"to {10 * math.log10(self._channel_energy / self._energy):.0f} dB below them"
            found["cancelled"] = (
                f"the channels cancel each other in their mean, {how_far}; choose one with channel='left' (--channel "
                "left)"
            )
        elif self._num_samples > 0 and self._peak == 0:
            found["silent"] = "every sample is zero"
        if self._peak > LARGEST_SAMPLE:
            found["out-of-range"] = (
                f"the largest sample is {self._peak:.5g}, far from [-1, 1]; if it holds integers as floats, divide "
                "them by their full scale, such as 32768"
            )
        return found


def _check_seconds(seconds: float, max_seconds: float | None, name: str) -> None:
    if max_seconds is not None and seconds > max_seconds:
        raise AudioError(
            f"{name} lasts {seconds:.0f} s or more, expected at most {max_seconds:g} s. Cut it, or raise the limit "
            "(--max-clip-seconds).",
            "too-long",
        )


def _check_memory(num_bytes: float, name: str) -> None:
    if num_bytes > LARGEST_WHOLE:
        raise AudioError(
            f"{name} would take {num_bytes / 2**30:.0f} GiB of memory, since it is read whole; expected at most "
            f"{LARGEST_WHOLE / 2**30:.0f}. Cut it.",
            "memory",
        )


def check_sampling_rate(rate: Any, name: str) -> int:
    """The rate in Hz as an integer. Raises AudioError if it is no number, or none that audio has."""
    try:
        number = int(rate)
    except (TypeError, ValueError, OverflowError):
        number = None
    if number is None or number != rate or not SAMPLING_RATES[0] <= number <= SAMPLING_RATES[1]:
        raise AudioError(
            f"{name} has a sampling rate of {rate} Hz, expected a whole number from {SAMPLING_RATES[0]:,} to "
            f"{SAMPLING_RATES[1]:,} Hz. Its header may be damaged.",
            "sampling-rate",
        )
    return number


def mono(
    channels: np.ndarray, rate: int, sampling_rate: int, channel: str | int = "mean", name: str = "the clip"
) -> AudioClip:
    """
    Channels (T', C), float32, at `rate` Hz -> one of them or their mean at `sampling_rate` Hz. Raises AudioError.
    """
    rate = check_sampling_rate(rate, name)
    mixer = Mixer(channel, channels.shape[1], name)
    blocks = list(mono_blocks(iter([mixer(channels)] if len(channels) else []), rate, sampling_rate))
    if not blocks:
        raise AudioError(f"Got no samples in {name}, expected at least one.", "empty")
    return AudioClip(np.concatenate(blocks), rate, channels.shape[1], mixer.warnings)


def save(
    path: str | os.PathLike,
    audio: ArrayLike,
    sampling_rate: int = 24000,
    subtype: str | None = None,
    format: str | None = None,
) -> Path:
    """Writes mono audio to a sound file, first under a temporary name, so that no half-written file can be met.

    Args:
        path: where to write; the ending (.wav, .flac, .ogg, .mp3) names the format.
        audio: numpy array or torch tensor of shape (T,), (1, T) or (1, 1, T), nominally in [-1, 1]. What lies outside
            is clipped in integer formats, and a warning says how much.
        sampling_rate: Hz of `audio`.
        subtype: sample format by soundfile's name; default 16-bit integers where the format has them. `"FLOAT"` in a
            WAV file keeps every value.
        format: container by soundfile's name, for a path whose ending says nothing.

    Returns:
        `path`.

    Raises:
        ValueError: audio of another shape, empty or not finite, or an ending that names no format.
        OSError: the file cannot be written.
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

    The file gets its name when the `with` block ends without an error and the file reads back with every sample. After
    an error nothing is left.

    Args:
        path: File to write. Its ending (.wav, .flac, .ogg, .mp3) names the format.
        sampling_rate: Hz of the audio.
        subtype: Sample format by soundfile's name. Defaults to 16-bit integers where the format has them.
        format: Container by soundfile's name, for a path whose ending says nothing.

    Yields:
        Function that takes the next block: float array (n,), n >= 0, nominally in [-1, 1]. Integer formats clip, with
            a warning.

    Raises:
        ValueError: Audio that is not finite, no audio at all, or an ending that names no format.
        OSError: The file cannot be written.
    """
    soundfile = soundfile_module()
    path = Path(path)
    format = format or path.suffix[1:].upper()
    if format not in soundfile.available_formats():
        raise ValueError(f"Cannot tell the sound format from the ending of {path}; use .wav, .flac, .ogg or .mp3.")
    subtype = subtype or soundfile.default_subtype(format)
    monitor = ClippingMonitor()

    def write(audio: np.ndarray) -> None:
        monitor.add(audio)
        try:
            for start in range(0, len(audio), WRITE_SAMPLES):
                file.write(audio[start : start + WRITE_SAMPLES])
        except AssertionError as error:  # so SoundFile.write (0.14) says that not all was written
            output.check()
            raise OSError(f"Cannot write {path}: not all samples were written. Is the disk full?") from error
        output.check()
        if format == "WAV" and output.size > MAX_WAV_SIZE:
            raise ValueError(f"{path} would be longer than a WAV file can be, 4 GiB. Name a .flac or .w64 file.")

    with atomic_write(path) as partial, _CheckedOutput(partial, path) as output:
        try:
            with soundfile.SoundFile(output, "w", sampling_rate, 1, subtype=subtype, format=format) as file:
                yield write
        except soundfile.LibsndfileError as error:
            output.check()
            raise OSError(f"Cannot write {path}: {error}") from error
        output.finish()
        if monitor.size and format != "RAW":  # which has no header to compare
            _check_written(partial, path, monitor.size)
    if subtype not in ("FLOAT", "DOUBLE"):
        monitor.warn_of_clipping(str(path))


WRITE_SAMPLES = 2**16
"""Samples per call of libsndfile, whose OGG encoder crashes on millions at once (libsndfile 1.2.2)."""


class _CheckedOutput:
    """The file that libsndfile writes to. It keeps the first error: libsndfile ignores errors in OGG, MP3 and FLAC."""

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
            return self._file.seek(offset, whence)  # writes what is buffered
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
        """Raise the OSError of the first write that failed."""
        if self._error is not None:
            raise cannot_write(self._path, self._error) from self._error

    def finish(self) -> None:
        """Write what is buffered, then check."""
        self.flush()
        self.check()


def _check_written(partial: Path, path: Path, num_samples: int) -> None:
    """Raise OSError unless the header of the written file can be read and promises every sample."""
    try:
        with soundfile_module().SoundFile(partial) as file:
            found = file.frames
    except soundfile_module().LibsndfileError as error:
        raise OSError(f"Cannot write {path}: what was written cannot be read back ({_reason(error)}).") from error
    if found != num_samples:
        raise OSError(f"Cannot write {path}: {found} of {num_samples} samples can be read back.")


MAX_WAV_SIZE = 2**32 - 2**16
"""Bytes; the header of a WAV file counts them in 32 bits, and libsndfile would go on without a word."""


class ClippingMonitor:
    """How much of the audio that was written lies outside [-1, 1]."""

    def __init__(self) -> None:
        self.size, self.outside, self.peak = 0, 0, 0.0

    def add(self, audio: np.ndarray) -> None:
        _check_finite(audio)
        self.size += audio.size
        self.outside += int((np.abs(audio) > 1).sum())
        self.peak = max(self.peak, float(np.abs(audio).max(initial=0)))

    def warn_of_clipping(self, name: str) -> None:
        if self.outside:
            logger.warning(
                "%s: %d of %d samples lie outside [-1, 1] (peak %.3f) and are clipped; "
                "audio.save(..., subtype='FLOAT') keeps them in a WAV file",
                name, self.outside, self.size, self.peak,
            )  # fmt: skip


def _check_finite(audio: np.ndarray) -> None:
    if not np.issubdtype(audio.dtype, np.floating) or not np.isfinite(audio).all():
        raise ValueError(f"Got audio of dtype {audio.dtype} or with NaN or infinite samples, expected finite floats.")


def say_what_changes(name: str, channels: int, rate: int, sampling_rate: int, channel: str | int = "mean") -> None:
    if channels > 1 and channel == "mean":
        logger.warning("%s: %d channels, averaged to one", name, channels)
    if rate != sampling_rate:
        logger.info("%s: resampled from %d to %d Hz", name, rate, sampling_rate)


def log_warnings(name: str, warnings: dict[str, str]) -> None:
    """Logs the warnings of a clip, kind -> text."""
    for kind, text in warnings.items():
        logger.warning(
            f"%s: {kind}: %s", name, text
        )  # one message for each kind, so that a filter can tell them apart


def mono_blocks(blocks: Iterator[np.ndarray], rate: int, sampling_rate: int) -> Iterator[np.ndarray]:
    """Mono blocks (n,) at `rate` -> blocks (m,), m > 0, float32, at `sampling_rate`.

    Joined, they are what transformers' `load_audio` makes of the whole, for `backend="soundfile"`.
    """
    import soxr

    resampler = None if rate == sampling_rate else soxr.ResampleStream(rate, sampling_rate, 1, "float32", "HQ")
    num_read = num_given = 0
    cut_off = None
    try:
        for block in blocks:
            num_read += len(block)
            block = np.ascontiguousarray(block, dtype=np.float32)
            if resampler is not None:
                block = resampler.resample_chunk(block)
            num_given += len(block)
            if len(block) > 0:
                yield block
    except TruncatedAudioError as error:
        cut_off = error
    if resampler is not None and num_read > 0:
        rest = resampler.resample_chunk(np.zeros(0, np.float32), last=True)
        missing = -(-num_read * sampling_rate // rate) - num_given
        rest = np.pad(rest, (0, max(0, missing - len(rest))))[:missing]
        if len(rest) > 0:
            yield rest
    if cut_off is not None:
        raise cut_off


def _open_file(path: Path) -> BinaryIO:
    _check_file(path)
    return open(path, "rb")


def _check_file(path: Path) -> None:
    if not path.is_file():
        raise FileNotFoundError(f"There is no file {path}. Give the path of a sound file.")
    if not os.access(path, os.R_OK):
        raise PermissionError(f"There is no permission to read {path}. Give it, or choose another file.")


def _load_by_other_backend(
    path: Path, sampling_rate: int, backend: str, channel: str | int, max_seconds: float | None
) -> np.ndarray:
    """By torchaudio as transformers' `load_audio` does, or by torchcodec with a mean: FFmpeg joins two channels to be
    louder than that by 3 dB."""
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
            say_what_changes(str(path), metadata.num_channels, metadata.sample_rate, sampling_rate, channel)
            duration = metadata.duration_seconds_from_header
            if max_seconds is not None and duration is not None and duration > max_seconds:
                raise AudioError(f"{path} lasts {duration:.0f} s, expected at most {max_seconds:g} s.", "too-long")
            audio = decoder.get_all_samples().data.T.numpy()
    except (RuntimeError, EOFError) as error:  # what the decoders raise for a damaged file
        raise AudioError(f"Cannot read {path} as sound: {_reason(error)}. The file may be damaged.") from error
    if audio.size == 0:
        raise AudioError(f"{path} holds no samples, expected at least one.", "empty")
    mixer = Mixer(channel, audio.shape[1], str(path))
    audio = np.ascontiguousarray(mixer(np.asarray(audio, dtype=np.float32)))
    log_warnings(str(path), mixer.warnings)
    return audio
