"""Losses of training. The keys of the dict of loss weights are also the names in the log.

The values equal those of the reference implementation; `tests/test_training_losses.py` compares them.
"""

import functools
from collections.abc import Iterable

import torch
import torch.nn.functional as F
from torch import nn

from ..log_mel import LogMel
from .discriminators import NAMES, DiscriminatorOutput


MEL_SCALES = (256, 512, 2048)


class MelLoss(nn.Module):
    """L1 distance of log-mel spectrograms. Takes the arguments of `LogMel`."""

    def __init__(self, sampling_rate: int = 24000, n_fft: int = 1024, hop_length: int = 256, num_mels: int = 100):
        super().__init__()
        self.log_mel = LogMel(sampling_rate, n_fft, hop_length, num_mels)

    def forward(self, fake: torch.Tensor, real: torch.Tensor) -> torch.Tensor:
        """Return the distance of two batches of audio (B, T)."""
        with torch.no_grad():
            target = self.log_mel(real)
        return F.l1_loss(self.log_mel(fake), target)


class MelScalesLoss(nn.Module):
    """Mean of mel losses at window sizes other than the published 1024 samples.

    The hop is a quarter of the window, and the number of mels is proportional to it. Not in the published objective.
    Without discriminators, no other loss resolves what happens within the 43 ms window of `MelLoss`.
    """

    def __init__(self, sampling_rate: int = 24000):
        super().__init__()
        # 80 mels per 1024 samples: with more, the lowest mel filters would contain no frequency bin
        self.scales = nn.ModuleList(
            MelLoss(sampling_rate, n_fft, n_fft // 4, n_fft * 80 // 1024) for n_fft in MEL_SCALES
        )

    def forward(self, fake: torch.Tensor, real: torch.Tensor) -> torch.Tensor:
        """Return the distance of two batches of audio (B, T)."""
        return sum_losses(scale(fake, real) for scale in self.scales) / len(self.scales)


class InstantaneousFrequencyLoss(nn.Module):
    """Distance between the phase advances per frame of spectral bins below 2.4 kHz.

    The product of a frame and the conjugate of the previous frame gives the frequency within a bin. It does not depend
    on the absolute phase, which codes need not represent. Mel losses do not determine the pitch within a bin. Not in
    the published objective.
    """

    def __init__(self, sampling_rate: int = 24000, highest: float = 2400.0):
        super().__init__()
        self.sizes = (1024, 2048)
        self.bins = [int(highest / sampling_rate * n_fft) + 1 for n_fft in self.sizes]
        for n_fft in self.sizes:
            self.register_buffer(f"window_{n_fft}", torch.hann_window(n_fft), persistent=False)

    def _advances(self, audio: torch.Tensor, n_fft: int, bins: int) -> torch.Tensor:
        """
        Return products of neighboring STFT frames, with magnitudes to the power 0.25.

        Args:
            audio: Audio of shape (B, T).
            n_fft: Window size in samples.
            bins: Number of frequency bins to use.

        Returns:
            Real and imaginary parts, of shape (B, bins, frames - 1, 2).
        """
        window = getattr(self, f"window_{n_fft}")
        spectrum = torch.stft(audio.float(), n_fft, n_fft // 8, window=window, return_complex=True)[:, :bins]
        parts = torch.view_as_real(spectrum[..., 1:] * spectrum[..., :-1].conj())
        # 1e-4 keeps the gradient finite in silence
        return parts * (parts.square().sum(dim=-1, keepdim=True) + 1e-4) ** -0.375

    def forward(self, fake: torch.Tensor, real: torch.Tensor) -> torch.Tensor:
        """Return the mean distance in the complex plane for audio (B, T), divided by the mean magnitude of `real`."""
        distances = []
        with torch.autocast(fake.device.type, enabled=False):
            for n_fft, bins in zip(self.sizes, self.bins, strict=True):
                with torch.no_grad():
                    target = self._advances(real, n_fft, bins)
                    scale = target.square().sum(dim=-1).sqrt().mean().clamp(min=1e-3)
                difference = self._advances(fake, n_fft, bins) - target
                distances.append((difference.square().sum(dim=-1) + 1e-8).sqrt().mean() / scale)
        return sum_losses(distances) / len(distances)


def discriminator_losses(
    real: dict[str, list[DiscriminatorOutput]], fake: dict[str, list[DiscriminatorOutput]]
) -> dict[str, torch.Tensor]:
    """
    Return the losses of the discriminators by name.

    They are hinge losses, averaged over sub-discriminators. For dac they are least squares losses, summed over them.
    """
    losses = {}
    for name in real:
        pairs = [(r.scores.float(), f.scores.float()) for r, f in zip(real[name], fake[name], strict=True)]
        if name == "dac":
            losses[name] = sum_losses((1 - r).square().mean() + f.square().mean() for r, f in pairs)
        else:
            losses[name] = sum_losses(F.relu(1 - r).mean() + F.relu(1 + f).mean() for r, f in pairs) / len(pairs)
    return losses


def adversarial_losses(
    real: dict[str, list[DiscriminatorOutput]], fake: dict[str, list[DiscriminatorOutput]]
) -> dict[str, torch.Tensor]:
    """Return the adversarial and feature matching losses of the codec by name."""
    losses = {}
    for name in fake:
        scores = [output.scores.float() for output in fake[name]]
        distances = [
            F.l1_loss(f.float(), r.float().detach())
            for real_output, fake_output in zip(real[name], fake[name], strict=True)
            for r, f in zip(real_output.features, fake_output.features, strict=True)
        ]
        if name == "dac":  # summed over sub-discriminators, not averaged
            losses[name] = sum_losses((1 - score).square().mean() for score in scores)
            losses[f"{name}_features"] = sum_losses(distances)
        else:
            losses[name] = sum_losses(F.relu(1 - score).mean() for score in scores) / len(scores)
            losses[f"{name}_features"] = sum_losses(distances) / len(scores)
    return losses


def weighted_sum(losses: dict[str, torch.Tensor], weights: dict[str, float]) -> torch.Tensor:
    """Return the weighted sum of losses. Raises KeyError for a loss without a weight."""
    return sum_losses(weights[name] * loss for name, loss in losses.items())


def sum_losses(values: Iterable[torch.Tensor]) -> torch.Tensor:
    return functools.reduce(torch.add, values)


def used_discriminators(weights: dict[str, float]) -> tuple[str, ...]:
    """Return the names of the discriminators with a nonzero weight."""
    return tuple(name for name in NAMES if weights[name] or weights[f"{name}_features"])
