"""Log-mel spectrograms, for the mel loss in training, and mel distance and mel-cepstral distortion in evaluation."""

import torch
from torch import nn
from transformers.audio_utils import mel_filter_bank


class LogMel(nn.Module):
    """Log-mel spectrogram of the published training objective.

    The logarithm is natural, and magnitudes below 1e-7 count as 1e-7.

    Args:
        sampling_rate: Sampling rate of the audio, in Hz.
        n_fft: Window size, in samples.
        hop_length: Hop between frames, in samples.
        num_mels: Number of mel bands from 0 Hz to half the sampling rate.
    """

    filters: torch.Tensor
    window: torch.Tensor

    def __init__(self, sampling_rate: int = 24000, n_fft: int = 1024, hop_length: int = 256, num_mels: int = 100):
        super().__init__()
        self.n_fft, self.hop_length = n_fft, hop_length
        filters = mel_filter_bank(n_fft // 2 + 1, num_mels, 0.0, sampling_rate / 2, sampling_rate, mel_scale="htk")
        self.register_buffer("filters", torch.from_numpy(filters).float().T.contiguous(), persistent=False)
        self.register_buffer("window", torch.hann_window(n_fft), persistent=False)

    def forward(self, audio: torch.Tensor) -> torch.Tensor:
        """Return the log-mel spectrogram of audio (T,) or (B, T): (num_mels, frames) or (B, num_mels, frames)."""
        with torch.autocast(audio.device.type, enabled=False):
            spectrum = torch.stft(audio.float(), self.n_fft, self.hop_length, window=self.window, return_complex=True)
            magnitudes = spectrum.abs()
            # for clips of under 12 frames, the order of this product changes the last bits; keep metrics reproducible
            mel = (magnitudes.T @ self.filters.T.contiguous()).T if audio.ndim == 1 else self.filters @ magnitudes
            return mel.clamp(min=1e-7).log()
