"""The three discriminators: multi-period, multi-resolution and DAC-style.

Tensor names are those of the reference implementation. Each discriminator takes audio (B, T) and returns one
`DiscriminatorOutput` per sub-discriminator. All layers are weight-normalized convolutions, each followed by leaky ReLU
0.1 except for the last one of a sub-discriminator.

Shape letters: B batch size, T samples, N time steps, p period, F frequency bins.
"""

from collections.abc import Iterator
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import nn
from torch.nn.utils.parametrizations import weight_norm


PERIODS = (2, 3, 5, 7, 11)
PERIOD_CHANNELS = (32, 128, 512, 1024, 1024)
RESOLUTIONS = ((1024, 256), (2048, 512), (512, 128))  # (n_fft, hop)
RESOLUTION_CHANNELS = 64
BAND_RESOLUTIONS = (2048, 1024, 512)  # n_fft; the hop is a quarter of it
BAND_CHANNELS = 32
BANDS = ((0.0, 0.1), (0.1, 0.25), (0.25, 0.5), (0.5, 0.75), (0.75, 1.0))  # fractions of the frequency bins

NAMES = {"multi_period": "multiperioddisc", "multi_resolution": "multiresddisc", "dac": "dac"}
"""Name of a discriminator -> its name in the reference implementation, which prefixes its tensors in files."""


@dataclass
class DiscriminatorOutput:
    """Output of one sub-discriminator for a batch."""

    scores: torch.Tensor  # (B, any): high for audio classified as real
    features: list[torch.Tensor]  # feature maps, for the feature matching loss

    def split_halves(self) -> tuple["DiscriminatorOutput", "DiscriminatorOutput"]:
        """Return the outputs of the first and of the second half of the batch."""
        scores, features = self.scores.chunk(2), [each.chunk(2) for each in self.features]
        first, second = (DiscriminatorOutput(scores[half], [each[half] for each in features]) for half in (0, 1))
        return first, second


class Discriminators(nn.Module):
    """All discriminators of a run, by their names in the reference implementation."""

    def __init__(self, num_embeddings: int = 4, scale: float = 1.0, names: tuple[str, ...] = tuple(NAMES)):
        """
        Args:
            num_embeddings: Number of values of `bandwidth_id`, on which multi-period and multi-resolution are
                conditioned.
            scale: Factor of all inner channel counts. 1 is the size of the reference implementation, with 41 M
                parameters each in multi-period and DAC.
            names: Discriminators to create, as keys of `NAMES`.
        """
        super().__init__()
        factories = {
            "multi_period": lambda: MultiPeriodDiscriminator(num_embeddings, scale),
            "multi_resolution": lambda: MultiResolutionDiscriminator(num_embeddings, scale),
            "dac": lambda: DACDiscriminator(scale),
        }
        self.names = tuple(names)
        for name in self.names:
            setattr(self, NAMES[name], factories[name]())

    def forward(self, audio: torch.Tensor, bandwidth_id: int) -> dict[str, list[DiscriminatorOutput]]:
        """Return, by name of the discriminator, the output of each of its sub-discriminators for audio (B, T)."""
        return {name: getattr(self, NAMES[name])(audio, bandwidth_id) for name in self.names}


class MultiPeriodDiscriminator(nn.Module):
    """Multi-period discriminator: audio folded by five periods. Conditioned on `bandwidth_id`."""

    def __init__(self, num_embeddings: int, scale: float = 1.0):
        super().__init__()
        self.discriminators = nn.ModuleList(PeriodDiscriminator(period, num_embeddings, scale) for period in PERIODS)

    def forward(self, audio: torch.Tensor, bandwidth_id: int) -> list[DiscriminatorOutput]:
        return [discriminator(audio, bandwidth_id) for discriminator in self.discriminators]


class PeriodDiscriminator(nn.Module):
    def __init__(self, period: int, num_embeddings: int, scale: float):
        super().__init__()
        self.period = period
        self.convs = nn.ModuleList(_period_convs(scale))
        channels = _scaled(PERIOD_CHANNELS[-1], scale)
        self.emb = _zero_embedding(num_embeddings, channels)
        self.conv_post = weight_norm(nn.Conv2d(channels, 1, (3, 1), padding=(1, 0)))

    def forward(self, audio: torch.Tensor, bandwidth_id: int) -> DiscriminatorOutput:
        hidden_states = _fold(audio, self.period, -audio.shape[-1] % self.period)
        features = []
        for conv in self.convs:
            hidden_states = F.leaky_relu(conv(hidden_states), 0.1)
            features.append(hidden_states)
        scores = _conditioned_scores(self, hidden_states, bandwidth_id)
        # as in the reference implementation, feature matching leaves out the first layer
        return DiscriminatorOutput(scores.flatten(1), [*features[1:], scores])


class MultiResolutionDiscriminator(nn.Module):
    """Multi-resolution discriminator: magnitude spectrograms at three resolutions. Conditioned on `bandwidth_id`."""

    def __init__(self, num_embeddings: int, scale: float = 1.0):
        super().__init__()
        self.discriminators = nn.ModuleList(
            ResolutionDiscriminator(*resolution, num_embeddings, scale) for resolution in RESOLUTIONS
        )

    def forward(self, audio: torch.Tensor, bandwidth_id: int) -> list[DiscriminatorOutput]:
        return [discriminator(audio, bandwidth_id) for discriminator in self.discriminators]


class ResolutionDiscriminator(nn.Module):
    def __init__(self, n_fft: int, hop_length: int, num_embeddings: int, scale: float):
        super().__init__()
        self.n_fft, self.hop_length = n_fft, hop_length
        channels = _scaled(RESOLUTION_CHANNELS, scale)
        shapes = [  # kernel, stride, padding over (frequency, time)
            ((7, 5), (2, 2), (3, 2)),
            ((5, 3), (2, 1), (2, 1)),
            ((5, 3), (2, 2), (2, 1)),
            ((3, 3), (2, 1), (1, 1)),
            ((3, 3), (2, 2), (1, 1)),
        ]
        self.convs = nn.ModuleList(
            weight_norm(nn.Conv2d(channels if layer else 1, channels, *shape)) for layer, shape in enumerate(shapes)
        )
        self.emb = _zero_embedding(num_embeddings, channels)
        self.conv_post = weight_norm(nn.Conv2d(channels, 1, (3, 3), padding=(1, 1)))

    def forward(self, audio: torch.Tensor, bandwidth_id: int) -> DiscriminatorOutput:
        hidden_states = _stft(audio, self.n_fft, self.hop_length).abs()[:, None]  # (B, 1, F, N)
        features = []
        for conv in self.convs:
            hidden_states = F.leaky_relu(conv(hidden_states), 0.1)
            features.append(hidden_states)
        scores = _conditioned_scores(self, hidden_states, bandwidth_id)
        return DiscriminatorOutput(scores.flatten(1), [*features, scores])


class DACDiscriminator(nn.Module):
    """Multi-period and multi-band discriminators of the Descript Audio Codec. Removes DC and normalizes the peak."""

    def __init__(self, scale: float = 1.0):
        super().__init__()
        self.discriminators = nn.ModuleList(
            [DACPeriodDiscriminator(period, scale) for period in PERIODS]
            + [DACBandDiscriminator(n_fft, scale) for n_fft in BAND_RESOLUTIONS]
        )

    def forward(self, audio: torch.Tensor, bandwidth_id: int) -> list[DiscriminatorOutput]:  # ignores bandwidth_id
        audio = audio - audio.mean(dim=-1, keepdim=True)
        audio = 0.8 * audio / (audio.abs().amax(dim=-1, keepdim=True) + 1e-9)
        return [discriminator(audio) for discriminator in self.discriminators]


class DACPeriodDiscriminator(nn.Module):
    def __init__(self, period: int, scale: float):
        super().__init__()
        self.period = period
        # nested as in the reference implementation, for its tensor names
        self.convs = nn.ModuleList(nn.ModuleList([conv]) for conv in _period_convs(scale))
        self.conv_post = weight_norm(nn.Conv2d(_scaled(PERIOD_CHANNELS[-1], scale), 1, (3, 1), padding=(1, 0)))

    def forward(self, audio: torch.Tensor) -> DiscriminatorOutput:
        # unlike PeriodDiscriminator, this pads a whole period if the length is a multiple of the period
        hidden_states = _fold(audio, self.period, self.period - audio.shape[-1] % self.period)
        features = []
        for nested in self.convs:
            (conv,) = nested.children()
            hidden_states = F.leaky_relu(conv(hidden_states), 0.1)
            features.append(hidden_states)
        return DiscriminatorOutput(self.conv_post(hidden_states).flatten(1), features)


class DACBandDiscriminator(nn.Module):
    """Multi-band discriminator: real and imaginary parts of a spectrogram, with separate convolutions per band."""

    def __init__(self, n_fft: int, scale: float):
        super().__init__()
        self.n_fft = n_fft
        bins = n_fft // 2 + 1
        self.bands = [(int(low * bins), int(high * bins)) for low, high in BANDS]
        channels = _scaled(BAND_CHANNELS, scale)
        self.band_convs = nn.ModuleList(
            nn.ModuleList(nn.ModuleList([conv]) for conv in _band_convs(channels)) for _ in self.bands
        )
        self.conv_post = weight_norm(nn.Conv2d(channels, 1, (3, 3), padding=(1, 1)))

    def forward(self, audio: torch.Tensor) -> DiscriminatorOutput:
        spectrum = torch.view_as_real(_stft(audio, self.n_fft, self.n_fft // 4))
        spectrum = spectrum.permute(0, 3, 2, 1)  # (B, 2, N, F)
        features, bands = [], []
        for (low, high), convs in zip(self.bands, self.band_convs, strict=True):
            hidden_states = spectrum[..., low:high]
            for nested in convs.children():
                (conv,) = nested.children()
                hidden_states = F.leaky_relu(conv(hidden_states), 0.1)
                features.append(hidden_states)
            bands.append(hidden_states)
        return DiscriminatorOutput(self.conv_post(torch.cat(bands, dim=-1)).flatten(1), features)


# ---------------------------------------------------------------------------------------------------------------------
# Building blocks
# ---------------------------------------------------------------------------------------------------------------------


def _scaled(channels: int, scale: float) -> int:
    return max(1, round(channels * scale))


def _period_convs(scale: float) -> Iterator[nn.Module]:
    widths = [1, *(_scaled(channels, scale) for channels in PERIOD_CHANNELS)]
    for inputs, outputs, stride in zip(widths, widths[1:], (3, 3, 3, 3, 1), strict=False):
        yield weight_norm(nn.Conv2d(inputs, outputs, (5, 1), (stride, 1), (2, 0)))


def _band_convs(channels: int) -> Iterator[nn.Module]:
    yield weight_norm(nn.Conv2d(2, channels, (3, 9), (1, 1), (1, 4)))
    for _ in range(3):
        yield weight_norm(nn.Conv2d(channels, channels, (3, 9), (1, 2), (1, 4)))
    yield weight_norm(nn.Conv2d(channels, channels, (3, 3), (1, 1), (1, 1)))


def _zero_embedding(num_embeddings: int, channels: int) -> nn.Embedding:
    embedding = nn.Embedding(num_embeddings, channels)
    nn.init.zeros_(embedding.weight)
    return embedding


def _conditioned_scores(
    discriminator: PeriodDiscriminator | ResolutionDiscriminator, hidden_states: torch.Tensor, bandwidth_id: int
) -> torch.Tensor:
    """Return scores (B, 1, any, any), plus the inner product of the last feature map with the embedding."""
    index = torch.full((), bandwidth_id, device=hidden_states.device)
    projection = (discriminator.emb(index)[:, None, None] * hidden_states).sum(dim=1, keepdim=True)
    return discriminator.conv_post(hidden_states) + projection


def _fold(audio: torch.Tensor, period: int, padding: int) -> torch.Tensor:
    """Fold audio (B, T) to (B, 1, (T + padding) / p, p), with reflection padding at the end."""
    if padding:
        audio = F.pad(audio[:, None], (0, padding), mode="reflect")
    return audio.reshape(len(audio), 1, -1, period)


def _stft(audio: torch.Tensor, n_fft: int, hop_length: int) -> torch.Tensor:
    """Return the complex STFT (B, F, N) of audio (B, T): centered, rectangular window, float32 even under autocast."""
    with torch.autocast(audio.device.type, enabled=False):
        window = torch.ones(n_fft, device=audio.device)  # explicit, because torch warns without a window
        return torch.stft(audio.float(), n_fft, hop_length, window=window, return_complex=True)
