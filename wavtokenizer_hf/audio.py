"""Sound files: the only place that reads or writes them; pipes.py does so for streams. Needs the extra `audio` (soundfile, soxr)."""

import logging
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from io import BytesIO
from pathlib import Path

import numpy as np
from transformers import audio_utils

from .atomic_files import atomic_write, cannot_write


logger = logging.getLogger(__name__)

SUFFIXES = (".wav", ".flac", ".mp3", ".ogg", ".opus", ".aiff", ".aif", ".au", ".w64", ".caf")
"""Endings that are taken for sound files when a folder is searched; `load` itself goes by content."""

BACKENDS = ("soundfile", "torchcodec", "torchaudio")


def load(path: str | os.PathLike, sampling_rate: int = 24000, backend: str = "soundfile") -> np.ndarray:
    """Reads a sound file as mono audio at `sampling_rate`, by transformers' `load_audio`.

    Several channels are averaged, and a warning says so; other rates are resampled, and a log line (INFO) says so.

    Args:
        path: a local file.
        sampling_rate: Hz of what is returned.
        backend: `"soundfile"` (decodes with soundfile, resamples with soxr), or where those are installed `"torchcodec"` (by
            FFmpeg, so other formats too) or `"torchaudio"` (needs transformers 5.23). The three resample differently, so for
            equal codes use one throughout.

    Returns:
        float32 array of shape (T,), nominally in [-1, 1].

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: the file is not sound, is damaged, or holds no samples.
        ImportError: the backend is not installed.
    """
    path = Path(path)
    if backend not in BACKENDS:
        raise ValueError(f"Got backend={backend!r}, expected one of {', '.join(BACKENDS)}.")
    if backend != "torchcodec":  # which says it itself, of all formats that it knows
        with _open(path) as file:
            say_what_changes(path, file.channels, file.samplerate, sampling_rate)
    else:
        _check_file(path)
    newer = hasattr(audio_utils, "_load_audio_soundfile")  # transformers 5.23
    if backend == "torchaudio" and not newer:
        raise ImportError(
            "backend='torchaudio' needs transformers 5.23 or newer. Upgrade it, or choose another backend."
        )
    try:
        if backend == "torchcodec":
            audio = _load_by_torchcodec(path, sampling_rate)
        elif newer:
            audio = audio_utils.load_audio(str(path), sampling_rate=sampling_rate, backend=backend)
        else:
            audio = _load_by_soundfile(path, sampling_rate)
    except (RuntimeError, EOFError) as error:  # what the decoders raise for a damaged file
        raise ValueError(f"Cannot read {path} as sound: {_reason(error)}. The file may be damaged.") from error
    if audio.size == 0:
        raise ValueError(f"{path} holds no samples, expected at least one.")
    return np.asarray(audio, dtype=np.float32)


def read_blocks(
    path: str | os.PathLike, sampling_rate: int = 24000, block_seconds: float = 5.0
) -> Iterator[np.ndarray]:
    """Reads a sound file block by block: joined, the very samples of `load`, in memory that does not grow with the file.

    Args:
        path, sampling_rate: as in `load`.
        block_seconds: length of a block, about; resampled ones vary a little.

    Yields:
        float32 arrays of shape (n,), n > 0.

    Raises:
        FileNotFoundError, ValueError: as `load` does, when the blocks are asked for. A file that is damaged further on
            fails only there.
    """
    path = Path(path)
    with _open(path) as file:
        say_what_changes(path, file.channels, file.samplerate, sampling_rate)
        # SoundFile.read (0.14) seeks to where it already is, after every block; an MP3 decoder then gives other samples
        file.seekable = lambda: False
        size = max(1, round(block_seconds * file.samplerate))
        count = 0
        try:
            for block in mono_blocks(_file_blocks(file, size), file.samplerate, sampling_rate):
                count += len(block)
                yield block
        except soundfile_module().LibsndfileError as error:
            raise ValueError(f"Cannot read {path} as sound: {_reason(error)}. The file may be damaged.") from error
        expected = -(-file.frames * sampling_rate // file.samplerate)
    if count == 0:
        raise ValueError(f"{path} holds no samples, expected at least one.")
    if count < expected:
        logger.warning("%s: %d samples came, its header promises %d; it may be cut off", path, count, expected)


def seconds(path: str | os.PathLike) -> float:
    """Length of a sound file by its header. Raises as `load` does."""
    with _open(Path(path)) as file:
        return file.frames / file.samplerate


class CutOffError(ValueError):
    """A stream of sound that ends before its time. Everything that came in whole samples has been given before."""


@dataclass
class Sound:
    """Mono audio (T,), float32, and what it was made of: the rate in Hz and the number of channels of its source."""

    audio: np.ndarray
    source_sampling_rate: int
    source_channels: int


def decode(source: str | os.PathLike | bytes, sampling_rate: int = 24000) -> Sound:
    """Reads sound as `load` does with soundfile, to the same samples, and says in the result what `load` says in the log.

    Args:
        source: a local file, or the content of one.
        sampling_rate: Hz of what is returned.

    Raises:
        ValueError: it is not sound, is damaged, or holds no samples.
        OSError: the file cannot be read.
        ImportError: soundfile or soxr is missing.
    """
    soundfile_module()
    name = "the content" if isinstance(source, bytes) else str(source)
    if not isinstance(source, bytes):
        _check_file(Path(source))
    try:
        channels, rate = _channels(BytesIO(source) if isinstance(source, bytes) else source)
    except (RuntimeError, EOFError) as error:  # LibsndfileError among them
        raise ValueError(
            f"Cannot read {name} as sound: {_reason(error)}. It may be damaged, or of a format that libsndfile does not know."
        ) from error
    if len(channels) == 0:
        raise ValueError(f"Got no samples in {name}, expected at least one.")
    return Sound(mono(channels, rate, sampling_rate), rate, channels.shape[1])


def mono(channels: np.ndarray, rate: int, sampling_rate: int) -> np.ndarray:
    """Channels (T', C) at `rate` Hz -> their mean at `sampling_rate` Hz, (T,), float32.

    The same steps as transformers' `load_audio` for `backend="soundfile"`.
    """
    import soxr

    audio = channels[:, 0] if channels.shape[1] == 1 else channels.mean(axis=1)
    if rate != sampling_rate:
        size = -(-len(audio) * sampling_rate // rate)
        audio = soxr.resample(audio, rate, sampling_rate, quality="HQ")[:size]
        audio = np.pad(audio, (0, size - len(audio)))
    return np.ascontiguousarray(audio, dtype=np.float32)


def save(
    path: str | os.PathLike, audio, sampling_rate: int = 24000, subtype: str | None = None, format: str | None = None
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
    """`save` for audio that comes block by block: gives a function that takes the next block (n,), float, n >= 0.

    The file gets its name when the `with` block ends well and the file reads back with every sample; when it ends in an
    error, nothing is left. Raises as `save`.
    """
    soundfile = soundfile_module()
    path = Path(path)
    format = format or path.suffix[1:].upper()
    if format not in soundfile.available_formats():
        raise ValueError(f"Cannot tell the sound format from the ending of {path}; use .wav, .flac, .ogg or .mp3.")
    subtype = subtype or soundfile.default_subtype(format)
    levels = Levels()

    def write(audio: np.ndarray) -> None:
        levels.add(audio)
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
        if levels.size and format != "RAW":  # which has no header to compare
            _check_written(partial, path, levels.size)
    if subtype not in ("FLOAT", "DOUBLE"):
        levels.warn_of_clipping(str(path))


WRITE_SAMPLES = 2**16
"""Samples per call of libsndfile, whose OGG encoder crashes on millions at once (libsndfile 1.2.2)."""


class _CheckedOutput:
    """The file that libsndfile writes to. It keeps the first error: libsndfile ignores errors in OGG, MP3 and FLAC."""

    def __init__(self, partial: Path, path: Path):
        self._file, self._path, self._error = partial.open("r+b"), path, None
        self.size = 0  # bytes, headers included

    def __enter__(self) -> "_CheckedOutput":
        return self

    def __exit__(self, *exception) -> None:
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


class Levels:
    """How much of the audio that was written lies outside [-1, 1]."""

    def __init__(self):
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


def say_what_changes(name, channels: int, rate: int, sampling_rate: int) -> None:
    if channels > 1:
        logger.warning("%s: %d channels, averaged to one", name, channels)
    if rate != sampling_rate:
        logger.info("%s: resampled from %d to %d Hz", name, rate, sampling_rate)


def mono_blocks(blocks: Iterator[np.ndarray], rate: int, sampling_rate: int) -> Iterator[np.ndarray]:
    """Blocks (n, channels) at `rate` -> blocks (m,), m > 0, at `sampling_rate`: the steps of `load`, with their result."""
    import soxr

    resampler = None if rate == sampling_rate else soxr.ResampleStream(rate, sampling_rate, 1, "float32", "HQ")
    num_read = num_given = 0
    cut_off = None
    try:
        for block in blocks:
            num_read += len(block)
            block = block[:, 0] if block.shape[1] == 1 else block.mean(axis=1)
            if resampler is not None:
                block = resampler.resample_chunk(np.ascontiguousarray(block))
            num_given += len(block)
            if len(block) > 0:
                yield block
    except CutOffError as error:
        cut_off = error
    if resampler is not None and num_read > 0:
        rest = resampler.resample_chunk(np.zeros(0, np.float32), last=True)
        missing = -(-num_read * sampling_rate // rate) - num_given
        rest = np.pad(rest, (0, max(0, missing - len(rest))))[:missing]
        if len(rest) > 0:
            yield rest
    if cut_off is not None:
        raise cut_off


def _file_blocks(file, size: int) -> Iterator[np.ndarray]:
    while len(block := file.read(size, dtype="float32", always_2d=True)) > 0:
        yield block


def _open(path: Path):
    """Opens a sound file with soundfile. Raises OSError, or ValueError if it is not one."""
    soundfile = soundfile_module()
    _check_file(path)
    try:
        return soundfile.SoundFile(path)
    except soundfile.LibsndfileError as error:
        raise ValueError(
            f"Cannot read {path} as sound: {_reason(error)}. Expected a format that libsndfile knows (WAV, FLAC, MP3, OGG); "
            "for others install torchcodec and use audio.load(..., backend='torchcodec')."
        ) from error


def _check_file(path: Path) -> None:
    if not path.is_file():
        raise FileNotFoundError(f"There is no file {path}. Give the path of a sound file.")
    if not os.access(path, os.R_OK):
        raise PermissionError(f"There is no permission to read {path}. Give it, or choose another file.")


def _reason(error: Exception) -> str:
    """What libsndfile says, without what soundfile puts before it: of content in memory that is its address, new each time."""
    return str(getattr(error, "error_string", error)).rstrip(".")


def _load_by_torchcodec(path: Path, sampling_rate: int) -> np.ndarray:
    """Not by transformers' `load_audio`, which lets FFmpeg join the channels: two of them become louder than their mean by 3 dB."""
    try:
        from torchcodec.decoders import AudioDecoder
    except (ImportError, RuntimeError, OSError) as error:  # the latter two where FFmpeg is missing
        reason = str(error).strip().partition("\n")[0]
        raise ImportError(f"backend='torchcodec' needs torchcodec and the libraries of FFmpeg: {reason}") from error
    decoder = AudioDecoder(str(path), sample_rate=sampling_rate)
    say_what_changes(path, decoder.metadata.num_channels, decoder.metadata.sample_rate, sampling_rate)
    return decoder.get_all_samples().data.mean(dim=0).numpy()


def _load_by_soundfile(path: Path, sampling_rate: int) -> np.ndarray:
    """What newer versions of transformers do for `backend="soundfile"`, in the same steps."""
    channels, rate = _channels(path)
    return mono(channels, rate, sampling_rate)


def _channels(file) -> tuple[np.ndarray, int]:
    """Channels (T', C), float32, and their rate in Hz; as transformers reads them. `soundfile.read` seeks first, which makes
    libsndfile round the samples of an MP3 file in another way."""
    with soundfile_module().SoundFile(file) as opened:
        return opened.read(dtype="float32", always_2d=True), opened.samplerate


def soundfile_module():
    try:
        import soundfile
        import soxr  # noqa: F401  (transformers resamples with it)
    except ImportError as error:
        raise ImportError("Sound files need soundfile and soxr: pip install 'wavtokenizer_hf[audio]'") from error
    return soundfile
