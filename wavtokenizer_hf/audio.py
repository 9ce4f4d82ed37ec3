"""Sound files: the only place that reads or writes them. Needs the extra `audio` (soundfile, soxr)."""

import logging
import os
from dataclasses import dataclass
from io import BytesIO
from pathlib import Path

import numpy as np
from transformers import audio_utils


logger = logging.getLogger(__name__)

SUFFIXES = (".wav", ".flac", ".mp3", ".ogg", ".opus", ".aiff", ".aif", ".au", ".w64", ".caf")
"""Endings that are taken for sound files when a folder is searched; `load` itself goes by content."""


def load(path: str | os.PathLike, sampling_rate: int = 24000, backend: str = "soundfile") -> np.ndarray:
    """Reads a sound file as mono audio at `sampling_rate`, by transformers' `load_audio`.

    Several channels are averaged, and a warning says so; other rates are resampled, and a log line (INFO) says so.

    Args:
        path: a local file.
        sampling_rate: Hz of what is returned.
        backend: `"soundfile"` (decodes with soundfile, resamples with soxr), or `"torchcodec"` or `"torchaudio"`
            where those are installed; the three resample differently, so for equal codes use one throughout.

    Returns:
        float32 array of shape (T,), nominally in [-1, 1].

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: the file is not sound, is damaged, or holds no samples.
        ImportError: the backend is not installed.
    """
    soundfile = _soundfile()
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"There is no file {path}. Give the path of a sound file.")
    try:
        info = soundfile.info(path)
    except soundfile.LibsndfileError as error:
        if backend == "soundfile":
            raise ValueError(
                f"Cannot read {path} as sound: {error}. Expected a format that libsndfile knows (WAV, FLAC, MP3, OGG); "
                "for others install torchcodec and pass backend='torchcodec'."
            ) from error
        logger.warning("%s: cannot tell the number of channels; if there are several, they are averaged", path)
    else:
        if info.channels > 1:
            logger.warning("%s: %d channels, averaged to one", path, info.channels)
        if info.samplerate != sampling_rate:
            logger.info("%s: resampled from %d to %d Hz", path, info.samplerate, sampling_rate)
    try:
        if backend == "soundfile" and not hasattr(audio_utils, "_load_audio_soundfile"):  # transformers before 5.23
            audio = _load_by_soundfile(path, sampling_rate)
        else:
            audio = audio_utils.load_audio(str(path), sampling_rate=sampling_rate, backend=backend)
    except (RuntimeError, EOFError) as error:  # what the decoders raise for a damaged file
        raise ValueError(f"Cannot read {path} as sound: {error}. The file may be damaged.") from error
    if audio.size == 0:
        raise ValueError(f"{path} holds no samples, expected at least one.")
    return np.asarray(audio, dtype=np.float32)


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
    _soundfile()
    name = "The content" if isinstance(source, bytes) else str(source)
    if not isinstance(source, bytes) and not Path(source).is_file():
        raise FileNotFoundError(f"There is no file {source}. Give the path of a sound file.")
    try:
        channels, rate = _channels(BytesIO(source) if isinstance(source, bytes) else source)
    except (RuntimeError, EOFError) as error:  # LibsndfileError among them
        raise ValueError(
            f"Cannot read {name} as sound: {error}. It may be damaged, or of a format that libsndfile does not know."
        ) from error
    if len(channels) == 0:
        raise ValueError(f"{name} holds no samples, expected at least one.")
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
    soundfile = _soundfile()
    path = Path(path)
    if hasattr(audio, "detach"):
        audio = audio.detach().cpu().float().numpy()
    audio = np.asarray(audio)
    if audio.size == 0 or audio.size != audio.shape[-1]:
        raise ValueError(f"Got audio of shape {audio.shape}, expected one mono clip: (T,), (1, T) or (1, 1, T).")
    if not np.issubdtype(audio.dtype, np.floating) or not np.isfinite(audio).all():
        raise ValueError(f"Got audio of dtype {audio.dtype} or with NaN or infinite samples, expected finite floats.")
    format = format or path.suffix[1:].upper()
    if format not in soundfile.available_formats():
        raise ValueError(f"Cannot tell the sound format from the ending of {path}; use .wav, .flac, .ogg or .mp3.")
    subtype = subtype or soundfile.default_subtype(format)
    outside = int((np.abs(audio) > 1).sum())
    if outside and subtype not in ("FLOAT", "DOUBLE"):
        logger.warning(
            "%s: %d of %d samples lie outside [-1, 1] (peak %.3f) and are clipped; "
            "subtype='FLOAT' in a WAV file keeps them",
            path, outside, audio.size, np.abs(audio).max(),
        )  # fmt: skip
    partial = path.with_name(path.name + ".partial")
    try:
        soundfile.write(partial, audio.reshape(-1), sampling_rate, subtype=subtype, format=format)
        os.replace(partial, path)
    except soundfile.LibsndfileError as error:
        raise OSError(f"Cannot write {path}: {error}") from error
    finally:
        partial.unlink(missing_ok=True)
    return path


def _load_by_soundfile(path: Path, sampling_rate: int) -> np.ndarray:
    """What newer versions of transformers do for `backend="soundfile"`, in the same steps."""
    channels, rate = _channels(path)
    return mono(channels, rate, sampling_rate)


def _channels(file) -> tuple[np.ndarray, int]:
    """Channels (T', C), float32, and their rate in Hz; as transformers reads them. `soundfile.read` seeks first, which makes
    libsndfile round the samples of an MP3 file in another way."""
    with _soundfile().SoundFile(file) as opened:
        return opened.read(dtype="float32", always_2d=True), opened.samplerate


def _soundfile():
    try:
        import soundfile
        import soxr  # noqa: F401  (transformers resamples with it)
    except ImportError as error:
        raise ImportError("Sound files need soundfile and soxr: pip install 'wavtokenizer_hf[audio]'") from error
    return soundfile
