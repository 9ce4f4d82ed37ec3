"""Pictures of what the codec does. Needs the extra `audio` (matplotlib)."""

import os
from io import BytesIO
from pathlib import Path
from typing import Any

import numpy as np

from .atomic_files import atomic_write, cannot_write
from .extras import require


def plot_reconstruction(
    path: str | os.PathLike,
    original: np.ndarray,
    reconstruction: np.ndarray,
    audio_codes: np.ndarray,
    sampling_rate: int = 24000,
    title: str = "",
    format: str | None = None,
) -> Path:
    """Writes a picture of three parts on one time axis: spectrogram of the original, tokens, spectrogram after
    decoding.

    Args:
        path: where to write; the ending (.png, .svg, .pdf) names the format.
        original, reconstruction: audio of shape (T,).
        audio_codes: codes of shape (L,).
        sampling_rate: Hz.
        title: a line above the picture.
        format: `png`, `svg` or `pdf`, for a path whose ending says nothing.
    """
    figure = new_figure((10, 7))
    seconds = len(original) / sampling_rate
    top, middle, bottom = figure.subplots(3, 1, sharex=True)
    for axes, audio, name in ((top, original, "original"), (bottom, reconstruction, "reconstruction")):
        level = _decibels(audio)
        image = axes.imshow(
            level,
            origin="lower",
            aspect="auto",
            extent=(0, seconds, 0, sampling_rate / 2000),
            vmin=-80,
            vmax=0,
            cmap="magma",
        )
        axes.set(ylabel="kHz", title=name)
        figure.colorbar(image, ax=axes, label="dB")
    times = (np.arange(len(audio_codes)) + 0.5) * seconds / len(audio_codes)
    middle.plot(times, audio_codes, ".", markersize=4)
    middle.set(ylabel="code", title=f"{len(audio_codes)} tokens, {len(np.unique(audio_codes))} different")
    bottom.set(xlabel="seconds", xlim=(0, seconds))
    figure.suptitle(title)
    return save_figure(figure, path, format)


def spectrogram_png(audio: np.ndarray, max_width: int = 1000) -> bytes:
    """
    Return the spectrogram of a clip as a PNG picture without axes: time to the right, 0 Hz at the bottom.

    Args:
        audio: Audio of shape (T,).
        max_width: Largest width, in pixels.

    Raises:
        ImportError: matplotlib is missing.
    """
    imsave = require("matplotlib.image", "audio").imsave
    level = _decibels(audio, step=max(256, -(-len(audio) // max_width)))
    level = level[:-1].reshape(256, 2, -1).max(1)  # 256 rows of 47 Hz at 24 kHz
    file = BytesIO()
    imsave(file, level, origin="lower", vmin=-80, vmax=0, cmap="magma", format="png")
    return file.getvalue()


def new_figure(size: tuple[float, float]) -> Any:
    """Return an empty matplotlib figure of this width and height in inches. Raises ImportError without matplotlib."""
    # not pyplot: no window, no state
    return require("matplotlib.figure", "audio").Figure(figsize=size, layout="constrained")


def save_figure(figure: Any, path: str | os.PathLike, format: str | None = None) -> Path:
    """
    Write a matplotlib figure at once. The ending of `path` names the format unless `format` does. Raises OSError.
    """
    path = Path(path)
    with atomic_write(path) as partial:
        try:
            figure.savefig(partial, dpi=120, format=format or path.suffix[1:] or "png")
        except OSError as error:
            raise cannot_write(path, error) from error
    return path


def _decibels(audio: np.ndarray, size: int = 1024, step: int = 256) -> np.ndarray:
    """Magnitude spectrogram (size / 2 + 1, frames) in dB below its largest value."""
    audio = np.pad(audio, size // 2)
    frames = np.lib.stride_tricks.sliding_window_view(audio, size)[::step] * np.hanning(size)
    magnitude = np.abs(np.fft.rfft(frames)).T
    return 20 * np.log10(np.maximum(magnitude / max(magnitude.max(), 1e-9), 1e-6))
