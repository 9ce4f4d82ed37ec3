"""What a run writes down: TensorBoard curves, and sound and spectrograms of the same clips at every validation."""

import logging
import threading
from pathlib import Path

import torch

from ..limited_files import one_line
from .losses import MelLoss


logger = logging.getLogger(__name__)


class Log:
    """Writes to a folder of TensorBoard; only in the main process, the others get nothing to write to.

    If it cannot be written any more, as on a full disk, one warning says so and the training goes on without it.
    """

    def __init__(self, folder: Path, sampling_rate: int, first_step: int):
        try:
            from torch.utils.tensorboard import SummaryWriter
        except ImportError as error:
            raise ImportError("The log needs TensorBoard: pip install 'wavtokenizer_hf[training]'") from error
        self.folder, self.sampling_rate = folder, sampling_rate
        self._hook, threading.excepthook = threading.excepthook, self._on_thread_error
        self.writer, self.failed = None, False
        # a resumed run takes back what was logged after its checkpoint
        self._try(lambda: setattr(self, "writer", SummaryWriter(folder, purge_step=first_step)))

    def figures(self, figures: dict[str, float], step: int) -> None:
        self._try(lambda: [self.writer.add_scalar(name, value, step) for name, value in figures.items()])

    def clip(self, name: str, audio: torch.Tensor, mel_loss: MelLoss, step: int) -> None:
        """audio (T,), on any device."""
        log_mel = mel_loss.log_mel(audio[None])[0].cpu()

        def add() -> None:
            self.writer.add_audio(name, audio.float().cpu().clamp(-1, 1), step, self.sampling_rate)
            self.writer.add_image(f"{name}/mel", _picture(log_mel), step, dataformats="HWC")

        self._try(add)

    def close(self) -> None:
        self._try(lambda: self.writer.close())
        threading.excepthook = self._hook

    def _try(self, write) -> None:
        if self.failed:
            return
        try:
            write()
        except OSError as error:
            self.failed = True
            logger.warning("Cannot write the log in %s (%s): nothing more is logged.", self.folder, one_line(error))

    def _on_thread_error(self, arguments) -> None:
        # TensorBoard's thread keeps its error, which the next call raises; Python would print a traceback as well
        if not (
            type(arguments.thread).__module__.startswith("tensorboard.") and issubclass(arguments.exc_type, OSError)
        ):
            self._hook(arguments)


def _picture(log_mel: torch.Tensor):
    """(num_mels, frames) -> (num_mels * 2, frames * 2, 3) of uint8; low notes below, black at 80 dB under full scale."""
    from matplotlib import colormaps

    level = (log_mel.flip(0) / 9.2 + 1).clamp(0, 1)  # ln of 80 dB is 9.2
    pixels = colormaps["magma"](level.repeat_interleave(2, 0).repeat_interleave(2, 1).numpy(), bytes=True)
    return pixels[..., :3]
