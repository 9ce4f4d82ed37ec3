"""What a run writes down: TensorBoard curves, and sound and spectrograms of the same clips at every validation."""

from pathlib import Path

import torch

from .losses import MelLoss


class Log:
    """Writes to a folder of TensorBoard; only in the main process, the others get nothing to write to."""

    def __init__(self, folder: Path, sampling_rate: int, first_step: int):
        try:
            from torch.utils.tensorboard import SummaryWriter
        except ImportError as error:
            raise ImportError("The log needs TensorBoard: pip install 'wavtokenizer_hf[training]'") from error
        # a resumed run takes back what was logged after its checkpoint
        self.writer = SummaryWriter(folder, purge_step=first_step)
        self.sampling_rate = sampling_rate

    def figures(self, figures: dict[str, float], step: int) -> None:
        for name, value in figures.items():
            self.writer.add_scalar(name, value, step)

    def clip(self, name: str, audio: torch.Tensor, mel_loss: MelLoss, step: int) -> None:
        """audio (T,), on any device."""
        self.writer.add_audio(name, audio.float().cpu().clamp(-1, 1), step, self.sampling_rate)
        log_mel = mel_loss.log_mel(audio[None])[0].cpu()
        self.writer.add_image(f"{name}/mel", _picture(log_mel), step, dataformats="HWC")

    def close(self) -> None:
        self.writer.close()


def _picture(log_mel: torch.Tensor):
    """(num_mels, frames) -> (num_mels * 2, frames * 2, 3) of uint8; low notes below, black at 80 dB under full scale."""
    from matplotlib import colormaps

    level = (log_mel.flip(0) / 9.2 + 1).clamp(0, 1)  # ln of 80 dB is 9.2
    pixels = colormaps["magma"](level.repeat_interleave(2, 0).repeat_interleave(2, 1).numpy(), bytes=True)
    return pixels[..., :3]
