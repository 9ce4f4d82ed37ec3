"""Log a run: TensorBoard scalars, audio and spectrograms of the validation clips, and a plot of the curves."""

import io
import logging
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch

from .. import audio as audio_files
from ..atomic_files import write_bytes
from ..extras import require
from ..limited_files import one_line
from .losses import MelLoss


logger = logging.getLogger(__name__)

PANELS = {
    "mel loss": {"loss/mel": "training", "validation/mel": "validation"},
    "codebook in use": {"codebook/utilization": "training", "validation/utilization": "validation"},
    "discriminators": {"discriminator/total": "their loss"},
    "learning rate": {"learning_rate/codec": "codec", "learning_rate/discriminators": "discriminators"},
}
"""Title of a plot -> name in the log -> label of the line."""


class Log:
    """Write log/ for TensorBoard and audio files in samples/. Only for the main process.

    If a write fails, such as on a full disk, one warning is logged and the training continues without a log.

    Args:
        output: Folder of the run.
        sampling_rate: Sampling rate of the audio in Hz.
        first_step: First step to log. Entries of an interrupted run from this step on are removed.
    """

    def __init__(self, output: Path, sampling_rate: int, first_step: int):
        require("tensorboard", "training")  # names the missing package; the import of torch's module does not
        from torch.utils.tensorboard import SummaryWriter

        self.folder, self.samples = output / "log", output / "samples"
        self.sampling_rate = sampling_rate
        self._previous_hook, threading.excepthook = threading.excepthook, self._on_thread_error
        self.writer: Any = None  # SummaryWriter; None if it cannot be opened
        self.failed = False
        self._try(lambda: setattr(self, "writer", SummaryWriter(self.folder, purge_step=first_step)))

    def scalars(self, metrics: dict[str, float], step: int) -> None:
        self._try(lambda: [self.writer.add_scalar(name, value, step) for name, value in metrics.items()])

    def clip(self, name: str, audio: torch.Tensor, mel_loss: MelLoss, step: int) -> None:
        """
        Log audio (T,) and its spectrogram, and write the audio to samples/NAME.wav.

        The file of the previous validation is replaced. The audio may be on any device.
        """
        audio = audio.float().cpu().clamp(-1, 1)
        log_mel = mel_loss.log_mel(audio[None].to(mel_loss.log_mel.window.device))[0].cpu()
        image = draw_mel(log_mel, len(audio) / self.sampling_rate)

        def add() -> None:
            self.writer.add_audio(name, audio, step, self.sampling_rate)
            self.writer.add_image(f"{name}/mel", image, step, dataformats="HWC")
            self.samples.mkdir(exist_ok=True)
            audio_files.save(self.samples / f"{name.replace('/', '_')}.wav", audio.numpy(), self.sampling_rate)

        self._try(add)

    def close(self) -> None:
        self._try(lambda: self.writer.close())
        threading.excepthook = self._previous_hook

    def _try(self, write: Callable[[], object]) -> None:
        if self.failed:
            return
        try:
            write()
        except OSError as error:
            self.failed = True
            logger.warning("Cannot write the log in %s (%s): nothing more is logged.", self.folder, one_line(error))

    def _on_thread_error(self, arguments: threading.ExceptHookArgs) -> None:
        # the next call of the writer raises the error of TensorBoard's thread, so do not print its traceback too
        if not (
            type(arguments.thread).__module__.startswith("tensorboard.") and issubclass(arguments.exc_type, OSError)
        ):
            self._previous_hook(arguments)


def draw_mel(log_mel: torch.Tensor, seconds: float) -> np.ndarray:
    """Draw a mel spectrogram (num_mels, frames) with axes. Return uint8 (height, width, 3); colors span 80 dB."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(6, 3), dpi=100)  # fixed layout, because a computed one takes seconds on a CPU
    canvas = FigureCanvasAgg(figure)
    axes = figure.add_axes((0.1, 0.17, 0.75, 0.78))
    decibels = log_mel.numpy() * (20 / np.log(10))
    image = axes.imshow(
        decibels, origin="lower", aspect="auto", cmap="magma", extent=(0, seconds, 0, len(log_mel)), vmin=-80, vmax=0
    )
    axes.set(xlabel="time (s)", ylabel="mel band")
    figure.colorbar(image, cax=figure.add_axes((0.87, 0.17, 0.02, 0.78)), label="dB")
    canvas.draw()
    return np.asarray(canvas.buffer_rgba())[..., :3].copy()


def write_curves(log: Path, path: Path) -> None:
    """Draw the curves of a run as PNG, including those from before it was resumed.

    Args:
        log: Folder of the TensorBoard log.
        path: PNG file to write.
    """
    from matplotlib.figure import Figure
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(log), size_guidance={"scalars": 0}).Reload()
    logged = set(events.Tags()["scalars"])
    panels = {
        title: {name: label for name, label in lines.items() if name in logged} for title, lines in PANELS.items()
    }
    panels = {title: lines for title, lines in panels.items() if lines}
    figure = Figure(figsize=(4 * len(panels), 3))
    figure.subplots_adjust(left=0.05, right=0.98, bottom=0.17, top=0.9, wspace=0.25)
    for axes, (title, lines) in zip(figure.subplots(1, len(panels), squeeze=False)[0], panels.items(), strict=True):
        for name, label in lines.items():
            points = events.Scalars(name)
            axes.plot([point.step for point in points], [point.value for point in points], label=label)
        axes.set(title=title, xlabel="step")
        axes.legend()
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=100)
    write_bytes(path, buffer.getvalue())
