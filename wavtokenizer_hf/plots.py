"""Plot spectrograms and codes. Needs the extra `audio` (matplotlib)."""

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
    """
    Plot the spectrogram of the original, the codes, and the spectrogram of the reconstruction on one time axis.

    Args:
        path: File to write. Its extension (.png, .svg, .pdf) names the format.
        original: Audio of shape (T,).
        reconstruction: Audio of shape (T,).
        audio_codes: Codes of shape (L,).
        sampling_rate: Sampling rate of the audio, in Hz.
        title: Title of the figure.
        format: `png`, `svg` or `pdf`, for a path whose extension names no format.

    Raises:
        ImportError: matplotlib is missing.
        OSError: The file cannot be written.
    """
    figure = new_figure((10, 7))
    seconds = len(original) / sampling_rate
    top, middle, bottom = figure.subplots(3, 1, sharex=True)
    for axes, audio, name in ((top, original, "original"), (bottom, reconstruction, "reconstruction")):
        spectrogram = _decibels(audio)
        image = axes.imshow(
            spectrogram,
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
    Return the spectrogram of a clip as a PNG image without axes, with time to the right and 0 Hz at the bottom.

    Args:
        audio: Audio of shape (T,).
        max_width: Largest width, in pixels.

    Raises:
        ImportError: matplotlib is missing.
    """
    imsave = require("matplotlib.image", "audio").imsave
    spectrogram = _decibels(audio, step=max(256, -(-len(audio) // max_width)))
    spectrogram = spectrogram[:-1].reshape(256, 2, -1).max(1)  # 256 rows of 47 Hz at 24 kHz
    file = BytesIO()
    imsave(file, spectrogram, origin="lower", vmin=-80, vmax=0, cmap="magma", format="png")
    return file.getvalue()


def new_figure(size: tuple[float, float]) -> Any:
    """Return an empty matplotlib figure of this width and height in inches. Raises ImportError without matplotlib."""
    # pyplot would open windows and keep global state
    return require("matplotlib.figure", "audio").Figure(figsize=size, layout="constrained")


def save_figure(figure: Any, path: str | os.PathLike, format: str | None = None) -> Path:
    """Write a matplotlib figure. The file appears when it is complete.

    Args:
        figure: Figure to write.
        path: File to write.
        format: Format by matplotlib's name. Defaults to the extension of `path`, or png.

    Raises:
        OSError: The file cannot be written.
    """
    path = Path(path)
    with atomic_write(path) as partial:
        try:
            figure.savefig(partial, dpi=120, format=format or path.suffix[1:] or "png")
        except OSError as error:
            raise cannot_write(path, error) from error
    return path


def _decibels(audio: np.ndarray, size: int = 1024, step: int = 256) -> np.ndarray:
    """Return the magnitude spectrogram (size / 2 + 1, frames) in dB relative to its largest value, at least -120."""
    audio = np.pad(audio, size // 2)
    frames = np.lib.stride_tricks.sliding_window_view(audio, size)[::step] * np.hanning(size)
    magnitude = np.abs(np.fft.rfft(frames)).T
    return 20 * np.log10(np.maximum(magnitude / max(magnitude.max(), 1e-9), 1e-6))
