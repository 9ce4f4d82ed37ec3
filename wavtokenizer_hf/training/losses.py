"""The losses of training. One dict of weights says which count how much; its keys are the names in the log.

The values equal those of the original's code; `tests/test_training_losses.py` holds them against it.
"""

import functools
from collections.abc import Iterable

import torch
import torch.nn.functional as F
from torch import nn

from ..log_mel import LogMel
from .discriminators import NAMES, Judgement


MEL_SCALES = (256, 512, 2048)


class MelLoss(nn.Module):
    """
    L1 distance of log-mel spectrograms, the part of the objective that needs no discriminator. Arguments as of
    `LogMel`.
    """

    def __init__(self, sampling_rate: int = 24000, n_fft: int = 1024, hop_length: int = 256, num_mels: int = 100):
        super().__init__()
        self.log_mel = LogMel(sampling_rate, n_fft, hop_length, num_mels)

    def forward(self, made: torch.Tensor, real: torch.Tensor) -> torch.Tensor:
        """Distance of two batches of audio (B, T)."""
        with torch.no_grad():
            target = self.log_mel(real)
        return F.l1_loss(self.log_mel(made), target)


class MelScalesLoss(nn.Module):
    """Mean of mel losses at other window sizes than the published one, each with a quarter as hop and mels in
    proportion.

    No part of the published objective. Without discriminators nothing else asks for what happens within a window of 43
    ms.
    """

    def __init__(self, sampling_rate: int = 24000):
        super().__init__()
        # 80 mels at 1024: more, and the lowest triangles would fall between two bins of the spectrum
        self.scales = nn.ModuleList(
            MelLoss(sampling_rate, n_fft, n_fft // 4, n_fft * 80 // 1024) for n_fft in MEL_SCALES
        )

    def forward(self, made: torch.Tensor, real: torch.Tensor) -> torch.Tensor:
        """Distance of two batches of audio (B, T)."""
        return sum_losses(scale(made, real) for scale in self.scales) / len(self.scales)


class InstantaneousFrequencyLoss(nn.Module):
    """Distance of how far the phase of each spectral bin moves from one frame to the next, below 2.4 kHz.

    Not in the published objective. The product of a frame and the conjugate of the frame before says at which
    frequency a bin swings, much finer than bins are wide, and nothing of absolute phase, which the codes need not
    carry. Mel losses leave the pitch to chance within a bin.
    """

    def __init__(self, sampling_rate: int = 24000, highest: float = 2400.0):
        super().__init__()
        self.sizes = (1024, 2048)
        self.bins = [int(highest / sampling_rate * n_fft) + 1 for n_fft in self.sizes]
        for n_fft in self.sizes:
            self.register_buffer(f"window_{n_fft}", torch.hann_window(n_fft), persistent=False)

    def _advances(self, audio: torch.Tensor, n_fft: int, bins: int) -> torch.Tensor:
        """audio (B, T) -> (B, bins, frames - 1, 2): real and imaginary parts; their magnitudes to the power 0.25."""
        window = getattr(self, f"window_{n_fft}")
        spectrum = torch.stft(audio.float(), n_fft, n_fft // 8, window=window, return_complex=True)[:, :bins]
        parts = torch.view_as_real(spectrum[..., 1:] * spectrum[..., :-1].conj())
        # the constant keeps the gradient finite in silence
        return parts * (parts.square().sum(dim=-1, keepdim=True) + 1e-4) ** -0.375

    def forward(self, made: torch.Tensor, real: torch.Tensor) -> torch.Tensor:
        """Mean distance in the complex plane of two batches of audio (B, T), over the mean magnitude of the second."""
        distances = []
        with torch.autocast(made.device.type, enabled=False):
            for n_fft, bins in zip(self.sizes, self.bins, strict=True):
                with torch.no_grad():
                    target = self._advances(real, n_fft, bins)
                    scale = target.square().sum(dim=-1).sqrt().mean().clamp(min=1e-3)
                difference = self._advances(made, n_fft, bins) - target
                distances.append((difference.square().sum(dim=-1) + 1e-8).sqrt().mean() / scale)
        return sum_losses(distances) / len(distances)


def discriminator_losses(
    real: dict[str, list[Judgement]], made: dict[str, list[Judgement]]
) -> dict[str, torch.Tensor]:
    """
    Losses of the discriminators, by name: hinge losses, averaged over sub-discriminators, and least squares for dac.
    """
    losses = {}
    for name in real:
        pairs = [(r.scores.float(), m.scores.float()) for r, m in zip(real[name], made[name], strict=True)]
        if name == "dac":
            losses[name] = sum_losses((1 - r).square().mean() + m.square().mean() for r, m in pairs)
        else:
            losses[name] = sum_losses(F.relu(1 - r).mean() + F.relu(1 + m).mean() for r, m in pairs) / len(pairs)
    return losses


def adversarial_losses(real: dict[str, list[Judgement]], made: dict[str, list[Judgement]]) -> dict[str, torch.Tensor]:
    """Adversarial and feature matching losses of the codec."""
    losses = {}
    for name in made:
        scores = [judgement.scores.float() for judgement in made[name]]
        distances = [
            F.l1_loss(m.float(), r.float().detach())
            for real_judgement, made_judgement in zip(real[name], made[name], strict=True)
            for r, m in zip(real_judgement.features, made_judgement.features, strict=True)
        ]
        if name == "dac":  # summed, not averaged
            losses[name] = sum_losses((1 - score).square().mean() for score in scores)
            losses[f"{name}_features"] = sum_losses(distances)
        else:
            losses[name] = sum_losses(F.relu(1 - score).mean() for score in scores) / len(scores)
            losses[f"{name}_features"] = sum_losses(distances) / len(scores)
    return losses


def total(losses: dict[str, torch.Tensor], weights: dict[str, float]) -> torch.Tensor:
    """The weighted sum of all losses by name; a KeyError for one that no weight was given for."""
    return sum_losses(weights[name] * loss for name, loss in losses.items())


def sum_losses(values: Iterable[torch.Tensor]) -> torch.Tensor:
    return functools.reduce(torch.add, values)


def used_discriminators(weights: dict[str, float]) -> tuple[str, ...]:
    """Return the discriminators with a weight other than 0."""
    return tuple(name for name in NAMES if weights[name] or weights[f"{name}_features"])
