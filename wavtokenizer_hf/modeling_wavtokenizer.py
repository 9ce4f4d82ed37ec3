"""WavTokenizer: 24 kHz audio to one stream of codes and back. Ji et al., ICLR 2025, arXiv 2408.16532.

In the order of the data:

    input_values (B, 1, T) -> encoder -> latents (B, D, L) -> quantizer -> audio_codes (B, 1, L)
    audio_codes (B, 1, L) -> quantizer -> quantized (B, D, L) -> backbone -> (B, L, H) -> head -> audio_values (B, 1, L * hop)

Shape letters: B rows of a batch, T samples, L = ceil(T / hop) frames, hop = hop_length samples per code,
D = hidden_size (512), K = codebook_size (4096), H = decoder_hidden_size (768), C channels, N time steps of any kind.

A padded batch gives each row what it would get alone: `Rows` says where the real part of each row lies, and every layer
that looks beyond one time step heeds it. Only to encode on a CPU, longer rows are simply taken one after another.

This file is copied unchanged into every Hub repository that we write: it imports the standard library, torch,
transformers and its siblings, and nothing else.
"""

import hashlib
import math
import threading
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import nn
from torch.amp import is_autocast_available
from torch.nn.utils.parametrize import ParametrizationList, is_parametrized
from transformers import initialization as init
from transformers.modeling_layers import GradientCheckpointingLayer
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS, PreTrainedAudioTokenizerBase
from transformers.utils import ModelOutput, can_return_tuple

from .configuration_wavtokenizer import WavTokenizerConfig, WavTokenizerEncoderConfig
from .modeling_wavtokenizer_encoder import (
    EncoderState,
    Kept,
    WavTokenizerEncoder,
    WavTokenizerLSTMLayers,
    pays_by_onednn,
    product,
)


# ---------------------------------------------------------------------------------------------------------------------
# Outputs
# ---------------------------------------------------------------------------------------------------------------------


@dataclass
class WavTokenizerEncoderOutput(ModelOutput):
    """
    Args:
        audio_codes (`torch.LongTensor` of shape `(B, 1, L)`): codes in [0, K); 0 where the mask is 0.
        audio_codes_mask (`torch.Tensor` of shape `(B, 1, L)`, *optional*): 1 for the codes of real audio, 0 for padding,
            in the dtype of `padding_mask`; with a `padding_mask`.
        latents (`torch.FloatTensor` of shape `(B, D, L)`, *optional*): the encoder's output before it is quantized,
            0 where the mask is 0; with `output_latents=True`.
    """

    audio_codes: torch.LongTensor | None = None
    audio_codes_mask: torch.Tensor | None = None
    latents: torch.FloatTensor | None = None


@dataclass
class WavTokenizerDecoderOutput(ModelOutput):
    """
    Args:
        audio_values (`torch.FloatTensor` of shape `(B, 1, L * hop)`): float32 audio at `config.sampling_rate`,
            nominally in [-1, 1] and not clipped.
    """

    audio_values: torch.FloatTensor | None = None


@dataclass
class WavTokenizerOutput(ModelOutput):
    """
    Args:
        audio_values (`torch.FloatTensor` of shape `(B, 1, T)`): the reconstruction, as long as the input.
        audio_codes, audio_codes_mask, latents: as in [`WavTokenizerEncoderOutput`].
    """

    audio_values: torch.FloatTensor | None = None
    audio_codes: torch.LongTensor | None = None
    audio_codes_mask: torch.Tensor | None = None
    latents: torch.FloatTensor | None = None


# ---------------------------------------------------------------------------------------------------------------------
# Rows of a padded batch
# ---------------------------------------------------------------------------------------------------------------------


@dataclass
class Rows:
    """Where the real part of each row of a padded batch lies: places `starts` to `starts + lengths` of `size`.

    Inside the model every row stands at the front of its padded length, whatever side it was padded on. So left and
    right padding are one case, and a forward LSTM meets nothing before a row's first frame.
    """

    lengths: torch.Tensor  # (B,) int64, at least 1
    starts: torch.Tensor  # (B,) int64
    size: int

    @classmethod
    def from_mask(cls, mask: torch.Tensor | None, name: str, expected_shape: tuple[int, ...]) -> "Rows | None":
        """Reads a mask (B, size) or (B, 1, size); None where nothing is padded. Raises ValueError for a bad mask."""
        if mask is None:
            return None
        if not isinstance(mask, torch.Tensor) or tuple(mask.shape) != expected_shape:
            got = tuple(mask.shape) if isinstance(mask, torch.Tensor) else type(mask).__name__
            raise ValueError(
                f"Got {name} of shape {got}, expected a tensor of shape {expected_shape}, "
                "1 for what is real and 0 for padding."
            )
        size = expected_shape[-1]
        mask = mask.reshape(-1, size)
        real = mask.bool()
        rows = cls(lengths=real.sum(-1), starts=real.int().argmax(-1), size=size)
        if torch.compiler.is_compiling():  # a compiled graph cannot look at values
            return rows
        if not (mask == real.to(mask.dtype)).all():
            raise ValueError(f"{name} holds values other than 0 and 1. Pass 1 for what is real and 0 for padding.")
        one_sided = (rows.starts == 0) | (rows.starts + rows.lengths == size)
        good = (rows.lengths > 0) & one_sided & (rows._places() == real).all(-1)
        if not good.all():
            row = int(good.int().argmin())
            reason = (
                "nothing real in it; drop the row"
                if rows.lengths[row] == 0
                else "gaps or padding on both sides; what is real must be one run that begins or ends the row"
            )
            raise ValueError(f"Row {row} of {name} has {reason}.")
        return None if (rows.lengths == size).all() else rows

    def _places(self) -> torch.Tensor:
        places = torch.arange(self.size, device=self.lengths.device)
        return (places >= self.starts[:, None]) & (places < (self.starts + self.lengths)[:, None])

    def mask(self) -> torch.Tensor:
        """(B, 1, size) bool, True where the row's real part lies in the batch as the caller sees it."""
        return self._places()[:, None]

    def front_mask(self) -> torch.Tensor:
        """(B, 1, size) bool, the same after `to_front`."""
        return (torch.arange(self.size, device=self.lengths.device) < self.lengths[:, None])[:, None]

    def to_front(self, values: torch.Tensor) -> torch.Tensor:
        """Moves each row of (B, C, size) to the front and zeroes the rest."""
        places = torch.arange(self.size, device=values.device) + self.starts[:, None]
        values = values.gather(-1, (places % self.size)[:, None].expand_as(values))
        return values.masked_fill(~self.front_mask(), 0)

    def to_place(self, values: torch.Tensor) -> torch.Tensor:
        """Undoes `to_front` and zeroes what is not real."""
        places = torch.arange(self.size, device=values.device) - self.starts[:, None]
        values = values.gather(-1, (places % self.size)[:, None].expand_as(values))
        return values.masked_fill(~self.mask(), 0)

    def frames(self, hop_length: int) -> "Rows":
        """Rows of samples -> rows of the frames that they give, padded on the same side."""
        lengths, size = -(-self.lengths // hop_length), -(-self.size // hop_length)
        return Rows(lengths, torch.where(self.starts > 0, size - lengths, 0), size)

    def samples(self, hop_length: int) -> "Rows":
        """Rows of frames -> rows of the samples that they decode to."""
        return Rows(self.lengths * hop_length, self.starts * hop_length, self.size * hop_length)


# Switches that let float32 products be computed in TF32 or bfloat16, by type of device; "none" and "ieee" mean not.
_PRECISION_SWITCHES = {
    "cpu": (torch.backends.mkldnn.matmul, torch.backends.mkldnn.conv, torch.backends.mkldnn.rnn),
    "cuda": (torch.backends.cuda.matmul, torch.backends.cudnn.conv, torch.backends.cudnn.rnn),
}
_precision_lock = threading.Lock()
_precision_users: dict[str, int] = {}  # type of device -> how many blocks of `_full_float32` are being executed
_precision_before: dict[str, list] = {}  # type of device -> switches to give back, and their values


@contextmanager
def _full_float32(device: torch.device):
    """No autocast, TF32 or bfloat16 products, whatever the surroundings ask for: each of them changes most codes.

    The switches belong to the process, so among several threads the first in sets them and the last out gives them back.
    A compiled graph cannot set them; it keeps those it was compiled under.
    """
    with torch.autocast(device.type, enabled=False) if is_autocast_available(device.type) else nullcontext():
        if torch.compiler.is_compiling():
            yield
            return
        with _precision_lock:
            if _precision_users.get(device.type, 0) == 0:
                switches = _PRECISION_SWITCHES.get(device.type, ())
                lower = [(switch, switch.fp32_precision) for switch in switches]
                lower = [(switch, value) for switch, value in lower if value not in ("none", "ieee")]
                for switch, _ in lower:
                    switch.fp32_precision = "ieee"
                _precision_before[device.type] = lower
            _precision_users[device.type] = _precision_users.get(device.type, 0) + 1
        try:
            yield
        finally:
            with _precision_lock:
                _precision_users[device.type] -= 1
                if _precision_users[device.type] == 0:
                    for switch, value in _precision_before[device.type]:
                        switch.fp32_precision = value


# ---------------------------------------------------------------------------------------------------------------------
# Quantizer: latents (B, D, L) <-> audio_codes (B, 1, L)
# ---------------------------------------------------------------------------------------------------------------------


class WavTokenizerCodebook(nn.Module):
    """K entries of D numbers, with the moving averages that training keeps of them. The model itself changes none."""

    def __init__(self, config: WavTokenizerConfig):
        super().__init__()
        shape = (config.codebook_size, config.codebook_dim)
        self.register_buffer("inited", torch.zeros(1))  # 1 once training has chosen the entries by k-means
        self.register_buffer("cluster_size", torch.zeros(shape[0]))
        self.register_buffer("embed", torch.zeros(shape))
        self.register_buffer("embed_avg", torch.zeros(shape))


class WavTokenizerQuantizer(nn.Module):
    def __init__(self, config: WavTokenizerConfig):
        super().__init__()
        self.codebook = WavTokenizerCodebook(config)
        self._kept_operands = Kept()

    def _nearness(self, latents: torch.Tensor) -> torch.Tensor:
        """latents (B, D, L) -> (B, L, K): what is larger, the smaller the Euclidean distance to an entry is.

        |x - e|^2 = |x|^2 - 2 (x.e - |e|^2 / 2), so it is the number in the parentheses.
        """
        entries = self.codebook.embed
        inference = pays_by_onednn(latents)

        def operands() -> tuple[torch.Tensor, torch.Tensor]:
            bias = -0.5 * torch.linalg.vector_norm(entries, dim=1).square()
            return torch.ops.mkldnn._reorder_linear_weight(entries, None) if inference else entries, bias

        weight, bias = self._kept_operands.get([entries], operands) if inference else operands()
        return product(latents.transpose(1, 2), weight, bias)

    def encode(self, latents: torch.Tensor) -> torch.Tensor:
        """latents (B, D, L) -> codes (B, 1, L), int64: the entry at the smallest Euclidean distance."""
        return self._nearness(latents).max(dim=-1).indices[:, None]  # several times as fast as argmax on a CPU

    def near_ties(self, latents: torch.Tensor) -> torch.Tensor:
        """latents (B, D, L) -> (B, 1, L) bool: where another order of the encoder's float32 sums might change the code.

        Latents of rows together and alone were at most 1.4e-6 of their length apart; 1e-5 is allowed for here.
        """
        entries = self.codebook.embed
        nearness, nearest = self._nearness(latents).topk(2)  # (B, L, 2)
        between = (entries[nearest[..., 0]] - entries[nearest[..., 1]]).norm(dim=-1)
        length = torch.linalg.vector_norm(latents, dim=1)
        return (nearness[..., 0] - nearness[..., 1] < 1e-5 * length * between)[:, None]

    def decode(self, audio_codes: torch.Tensor) -> torch.Tensor:
        """codes (B, 1, L) -> quantized (B, D, L)."""
        return F.embedding(audio_codes[:, 0], self.codebook.embed).transpose(1, 2)


# ---------------------------------------------------------------------------------------------------------------------
# Backbone: quantized (B, D, L) -> hidden states (B, L, H). `mask` (B, 1, L) bool: real frames, None without padding.
# ---------------------------------------------------------------------------------------------------------------------


def _zero_padding(hidden_states: torch.Tensor, mask: torch.Tensor | None) -> torch.Tensor:
    """What a convolution must see beyond a row's end: zeros, as beyond the end of a row alone."""
    return hidden_states if mask is None else hidden_states * mask


# The decoder may be in another dtype than float32. Then its large products are, and what lies between them stays in float32:
# in bfloat16 that costs little time and gives up far less.


class _Float32(nn.Module):
    """A module that stays in float32 whatever dtype it is moved to."""

    def _apply(self, function, *args, **kwargs):
        def keep_float32(tensor: torch.Tensor) -> torch.Tensor:
            moved = function(tensor)
            lossless = not moved.is_floating_point() or moved.dtype == torch.float32
            return moved if lossless else tensor.to(moved.device, torch.float32)

        return super()._apply(keep_float32, *args, **kwargs)


def _convolve(conv: nn.Conv1d, hidden_states: torch.Tensor) -> torch.Tensor:
    """float32 -> float32, computed in the dtype of the weight."""
    return conv(hidden_states.to(conv.weight.dtype)).float()


class WavTokenizerGroupNorm(_Float32, nn.GroupNorm):
    """GroupNorm of (B, H, L) with statistics over real frames only."""

    def forward(self, hidden_states: torch.Tensor, mask: torch.Tensor | None = None) -> torch.Tensor:
        if mask is None:
            return super().forward(hidden_states)
        groups = hidden_states.unflatten(1, (self.num_groups, -1))  # (B, G, H / G, L)
        mask = mask[:, None]
        count = mask.sum(dim=-1, keepdim=True) * groups.shape[2]
        mean = (groups * mask).sum(dim=(2, 3), keepdim=True) / count
        centred = (groups - mean) * mask
        variance = centred.square().sum(dim=(2, 3), keepdim=True) / count
        normed = (centred * torch.rsqrt(variance + self.eps)).flatten(1, 2)
        return torch.addcmul(self.bias[:, None], normed, self.weight[:, None])


class WavTokenizerResnetBlock(GradientCheckpointingLayer):
    """(B, H, L) -> (B, H, L)"""

    def __init__(self, config: WavTokenizerConfig):
        super().__init__()
        channels, groups = config.decoder_hidden_size, config.decoder_attention_num_groups
        self.norm1 = WavTokenizerGroupNorm(groups, channels, eps=config.norm_eps)
        self.conv1 = nn.Conv1d(channels, channels, kernel_size=3, padding=1)
        self.norm2 = WavTokenizerGroupNorm(groups, channels, eps=config.norm_eps)
        self.conv2 = nn.Conv1d(channels, channels, kernel_size=3, padding=1)
        self.dropout = nn.Dropout(0.1)  # no field of the port's config; the original always trains with 0.1

    def forward(self, hidden_states: torch.Tensor, mask: torch.Tensor | None = None) -> torch.Tensor:
        residual = hidden_states
        hidden_states = F.silu(self.norm1(hidden_states, mask))
        hidden_states = _convolve(self.conv1, _zero_padding(hidden_states, mask))
        hidden_states = self.dropout(F.silu(self.norm2(hidden_states, mask)))
        return residual + _convolve(self.conv2, _zero_padding(hidden_states, mask))


def eager_attention_forward(
    module: nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    scaling: float,
    **kwargs,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Attention with an L x L matrix: (B, 1, L, H) each -> (B, L, 1, H) and the weights (B, 1, L, L)."""
    weights = query @ key.transpose(2, 3) * scaling
    if attention_mask is not None:
        weights = weights.masked_fill(~attention_mask, torch.finfo(weights.dtype).min)
    weights = weights.softmax(dim=-1)
    return (weights @ value).transpose(1, 2), weights


class WavTokenizerPointwiseConv(nn.Conv1d):
    """(B, L, C) -> (B, L, C'): a convolution over one frame is a product with it."""

    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        return product(hidden_states, self.weight[..., 0], self.bias)


class WavTokenizerAttention(GradientCheckpointingLayer):
    """(B, H, L) -> (B, H, L): one head over all frames, without positions, added to its input."""

    def __init__(self, config: WavTokenizerConfig):
        super().__init__()
        channels = config.decoder_hidden_size
        self.config = config
        self.is_causal = False
        self.scaling = channels**-0.5
        self.norm = WavTokenizerGroupNorm(config.decoder_attention_num_groups, channels, eps=config.norm_eps)
        self.q = WavTokenizerPointwiseConv(channels, channels, kernel_size=1)
        self.k = WavTokenizerPointwiseConv(channels, channels, kernel_size=1)
        self.v = WavTokenizerPointwiseConv(channels, channels, kernel_size=1)
        self.proj_out = WavTokenizerPointwiseConv(channels, channels, kernel_size=1)

    def forward(self, hidden_states: torch.Tensor, mask: torch.Tensor | None = None) -> torch.Tensor:
        # time-major and contiguous, or sdpa on a CPU would take the way that makes an L x L matrix
        normed = self.norm(hidden_states, mask).transpose(1, 2).to(self.q.weight.dtype).contiguous()
        query, key, value = (project(normed)[:, None] for project in (self.q, self.k, self.v))
        attention = ALL_ATTENTION_FUNCTIONS.get_interface(self.config._attn_implementation, eager_attention_forward)
        # a key mask (B, 1, 1, L) is broadcast over the queries, so no L x L mask is ever made
        attention_mask = None if mask is None else mask[:, None]
        attended, _ = attention(self, query, key, value, attention_mask, scaling=self.scaling)  # (B, L, 1, H)
        return hidden_states + self.proj_out(attended.squeeze(2)).float().transpose(1, 2)


class WavTokenizerAdaLayerNorm(_Float32):
    """LayerNorm of (B, L, H) over H, whose scale and shift are row `bandwidth_id` of two tables."""

    def __init__(self, config: WavTokenizerConfig):
        super().__init__()
        self.eps = config.norm_eps
        self.scale = nn.Embedding(config.adanorm_num_embeddings, config.decoder_hidden_size)
        self.shift = nn.Embedding(config.adanorm_num_embeddings, config.decoder_hidden_size)
        self.scale.initial_value, self.shift.initial_value = 1.0, 0.0  # see _init_weights

    def forward(self, hidden_states: torch.Tensor, bandwidth_id: int) -> torch.Tensor:
        row = torch.full((), bandwidth_id, device=hidden_states.device)
        scale, shift = self.scale(row), self.shift(row)
        return F.layer_norm(hidden_states, scale.shape, scale, shift, self.eps)


class WavTokenizerLayerNorm(_Float32, nn.LayerNorm):
    """LayerNorm in float32."""


class WavTokenizerDepthwiseConv(_Float32, nn.Conv1d):
    """(B, L, H) -> (B, L, H): a convolution of each channel by itself, with zeros around each row."""

    def __init__(self, channels: int, kernel_size: int):
        super().__init__(channels, channels, kernel_size, padding=kernel_size // 2, groups=channels)

    def forward(self, hidden_states: torch.Tensor, mask: torch.Tensor | None = None) -> torch.Tensor:
        if mask is not None:
            hidden_states = hidden_states * mask.transpose(1, 2)
        if not pays_by_onednn(hidden_states):
            return super().forward(hidden_states.transpose(1, 2)).transpose(1, 2)
        length = hidden_states.shape[1]  # on a CPU, shifted sums are cheaper than turning the memory over and back
        padded = F.pad(hidden_states, (0, 0, *2 * self.padding))
        taps = self.weight[:, 0].t()
        output = torch.addcmul(self.bias, padded[:, :length], taps[0])
        for place, tap in enumerate(taps[1:], start=1):
            output.addcmul_(padded[:, place : place + length], tap)
        return output


class WavTokenizerLinear(nn.Linear):
    def forward(self, hidden_states: torch.Tensor, gelu: bool = False) -> torch.Tensor:
        return product(hidden_states, self.weight, self.bias, gelu=gelu)


class WavTokenizerConvNeXtBlock(GradientCheckpointingLayer):
    """(B, L, H) -> (B, L, H)"""

    def __init__(self, config: WavTokenizerConfig):
        super().__init__()
        channels = config.decoder_hidden_size
        self.dwconv = WavTokenizerDepthwiseConv(channels, kernel_size=7)
        self.norm = WavTokenizerAdaLayerNorm(config)
        self.pwconv1 = WavTokenizerLinear(channels, config.decoder_intermediate_size)
        self.pwconv2 = WavTokenizerLinear(config.decoder_intermediate_size, channels)
        for layer in (self.dwconv, self.pwconv1, self.pwconv2):
            layer.initial_std = 0.02  # see _init_weights
        self.gamma = nn.Parameter(torch.full((channels,), 1 / config.decoder_num_layers))

    def forward(
        self, hidden_states: torch.Tensor, bandwidth_id: int, mask: torch.Tensor | None = None
    ) -> torch.Tensor:
        residual = hidden_states
        hidden_states = self.norm(self.dwconv(hidden_states, mask), bandwidth_id)
        hidden_states = self.pwconv1(hidden_states.to(self.pwconv1.weight.dtype), gelu=True)
        return torch.addcmul(residual, self.gamma.float(), self.pwconv2(hidden_states).float())


class WavTokenizerBackbone(nn.Module):
    """(B, D, L) -> (B, L, H): a front of residual and attention blocks, then ConvNeXt blocks."""

    def __init__(self, config: WavTokenizerConfig):
        super().__init__()
        channels, groups = config.decoder_hidden_size, config.decoder_attention_num_groups
        self.embed = nn.Conv1d(config.codebook_dim, channels, kernel_size=7, padding=3)
        self.embed.initial_std = 0.02  # see _init_weights
        self.pos_net = nn.ModuleList(  # the original's name for the front; it encodes no positions
            [
                WavTokenizerResnetBlock(config),
                WavTokenizerResnetBlock(config),
                WavTokenizerAttention(config),
                WavTokenizerResnetBlock(config),
                WavTokenizerResnetBlock(config),
                WavTokenizerGroupNorm(groups, channels, eps=config.norm_eps),
            ]
        )
        self.norm = WavTokenizerAdaLayerNorm(config)
        self.convnext = nn.ModuleList(WavTokenizerConvNeXtBlock(config) for _ in range(config.decoder_num_layers))
        self.final_layer_norm = WavTokenizerLayerNorm(channels, eps=config.norm_eps)
        for module in self.modules():
            if isinstance(module, _Float32):  # from_config(config, dtype=...) builds everything in that dtype
                module.float()

    def forward(
        self, quantized: torch.Tensor, bandwidth_id: int = 0, mask: torch.Tensor | None = None
    ) -> torch.Tensor:
        hidden_states = _convolve(self.embed, _zero_padding(quantized, mask))
        for block in self.pos_net:
            hidden_states = block(hidden_states, mask)
        hidden_states = self.norm(hidden_states.transpose(1, 2).contiguous(), bandwidth_id)
        for block in self.convnext:
            hidden_states = block(hidden_states, bandwidth_id, mask)
        return self.final_layer_norm(hidden_states)


# ---------------------------------------------------------------------------------------------------------------------
# Head: hidden states (B, L, H) -> audio_values (B, 1, L * hop)
# ---------------------------------------------------------------------------------------------------------------------


class WavTokenizerISTFTHead(nn.Module):
    """Predicts a spectrum for each frame and inverts it: window of 4 hops, overlap-add, division by the envelope."""

    def __init__(self, config: WavTokenizerConfig):
        super().__init__()
        self.n_fft, self.hop_length = config.n_fft, config.hop_length
        self.linear = WavTokenizerLinear(config.decoder_hidden_size, config.n_fft + 2)

    def forward(self, hidden_states: torch.Tensor, mask: torch.Tensor | None = None) -> torch.Tensor:
        magnitude, phase = (
            self.linear(hidden_states.to(self.linear.weight.dtype)).float().chunk(2, dim=-1)
        )  # (B, L, n_fft / 2 + 1) each
        spectrum = torch.polar(magnitude.exp().clamp(max=100), phase)
        # made here rather than kept in a buffer, which a cast of the model would round
        window = torch.hann_window(self.n_fft, dtype=torch.float32, device=phase.device)
        frames = torch.fft.irfft(spectrum, n=self.n_fft) * window  # (B, L, n_fft)
        if mask is None:
            return self._overlap_add(frames) / self._overlap_add(window.square().expand(1, *frames.shape[1:]))
        mask = mask.transpose(1, 2)  # (B, L, 1)
        envelope = self._overlap_add(window.square() * mask)
        return (self._overlap_add(frames * mask) / envelope.masked_fill(envelope == 0, 1)) * self._samples(mask)

    def _overlap_add(self, frames: torch.Tensor) -> torch.Tensor:
        """Frames (B, L, n_fft), a hop apart -> their sum (B, 1, L * hop), without 1.5 hops at either end."""
        batch_size, length, _ = frames.shape
        hops = self.n_fft // self.hop_length
        blocks = frames.unflatten(-1, (hops, self.hop_length))
        total = frames.new_zeros(batch_size, length + hops - 1, self.hop_length)
        for shift in range(hops):  # hop-sized blocks, so that each shift is one addition of whole frames
            total[:, shift : shift + length] += blocks[:, :, shift]
        cut = (self.n_fft - self.hop_length) // 2
        return total.flatten(1)[:, None, cut : cut + length * self.hop_length]

    def _samples(self, mask: torch.Tensor) -> torch.Tensor:
        """Mask of frames (B, L, 1) -> mask of samples (B, 1, L * hop)."""
        return mask.expand(-1, -1, self.hop_length).flatten(1)[:, None]


@dataclass
class DecoderState:
    """What decoding in windows keeps of the codes that it has seen, for those still to come; small and picklable."""

    audio_codes: torch.Tensor | None = None  # (B, 1, n): those of the last window, and those that wait for the next
    joint: int = 0  # where in them the next window starts
    overlap: torch.Tensor | None = None  # (B, 1, n): audio of the last window from there on


def _cross_fade(old: torch.Tensor, new: torch.Tensor) -> torch.Tensor:
    """From `old` to `new` (B, 1, n), over the middle half: the end of a window lacks what follows, the start what precedes."""
    places = torch.arange(old.shape[-1], device=old.device) + 0.5
    return old.lerp(new, (2 * places / old.shape[-1] - 0.5).clamp(0, 1))


# ---------------------------------------------------------------------------------------------------------------------
# Models
# ---------------------------------------------------------------------------------------------------------------------


class WavTokenizerPreTrainedModel(PreTrainedAudioTokenizerBase):
    config_class = WavTokenizerConfig
    base_model_prefix = "encoder_model"
    main_input_name = "input_values"
    input_modalities = ("audio",)
    supports_gradient_checkpointing = True
    _no_split_modules = [
        "WavTokenizerResidualBlock",
        "WavTokenizerResnetBlock",
        "WavTokenizerAttention",
        "WavTokenizerConvNeXtBlock",
    ]
    _supports_sdpa = True
    _can_compile_fullgraph = True

    @property
    def codebook_fingerprint(self) -> str:
        """Short hash of the codebook: 16 hex digits of the SHA-256 of its entries as little-endian float32.

        Checkpoints of equal shape decode each other's codes to fluent babble; equal fingerprints rule that out.
        """
        entries = self.quantizer.codebook.embed.detach().cpu().numpy().astype("<f4")
        return hashlib.sha256(entries.tobytes()).hexdigest()[:16]

    def check_codebook_fingerprint(self, fingerprint: str) -> None:
        """Raises ValueError unless codes made with the codebook of that fingerprint are this model's."""
        own = self.codebook_fingerprint
        if fingerprint != own:
            raise ValueError(
                f"These codes were made with the codebook {fingerprint}, this model has the codebook {own}: it would "
                "decode them to sound that is not theirs. Load the checkpoint that made them."
            )

    @classmethod
    def from_pretrained(cls, *args, **kwargs):
        """Load a model, on the default device of torch unless `device_map` names another.

        Raises:
            ValueError: there is no such default device.
        """
        if kwargs.get("device_map") is None:
            device = torch.get_default_device()
            try:
                torch.empty(0, device=device)
            except (AssertionError, RuntimeError) as error:  # torch asserts where it was built without that device
                raise ValueError(
                    f"Got {str(device)!r} as torch's default device, which cannot be used: {error}. Call "
                    "torch.set_default_device('cpu'), or pass device_map='cpu'."
                ) from error
        return super().from_pretrained(*args, **kwargs)

    def save_pretrained(self, *args, **kwargs):
        if self.quantizer.codebook.embed.device.type != "meta":  # offloaded weights cannot be read here
            self.config.codebook_fingerprint = self.codebook_fingerprint
        return super().save_pretrained(*args, **kwargs)

    @torch.no_grad()
    def _init_weights(self, module):
        """The original's initialisation for training from scratch.

        Only modules with tensors of their own are handled, and what differs among them was noted on them when they
        were made: transformers 5.23.0 does not call this for others (modeling_utils.py:2371, all() of nothing is true).
        """
        if isinstance(module, ParametrizationList):  # of weight norm: the weight that PyTorch's own would be, split
            gain, direction = module.original0, module.original1
            init.kaiming_uniform_(direction, a=math.sqrt(5))
            init.copy_(gain, torch.linalg.vector_norm(direction, dim=(1, 2), keepdim=True))
        elif isinstance(module, (nn.Conv1d, nn.Linear)):
            if hasattr(module, "initial_std"):
                init.trunc_normal_(module.weight, std=module.initial_std)
                init.zeros_(module.bias)
            else:  # PyTorch's own
                if not is_parametrized(module):
                    init.kaiming_uniform_(module.weight, a=math.sqrt(5))
                bound = module.weight[0].numel() ** -0.5
                init.uniform_(module.bias, -bound, bound)
        elif isinstance(module, WavTokenizerLSTMLayers):  # PyTorch's own
            for parameter in module.parameters():
                init.uniform_(parameter, -(module.hidden_size**-0.5), module.hidden_size**-0.5)
        elif isinstance(module, nn.Embedding):
            init.constant_(module.weight, module.initial_value)
        elif isinstance(module, (nn.GroupNorm, nn.LayerNorm)):
            init.ones_(module.weight)
            init.zeros_(module.bias)
        elif isinstance(module, WavTokenizerConvNeXtBlock):
            init.constant_(module.gamma, 1 / self.config.decoder_num_layers)
        elif isinstance(module, WavTokenizerCodebook):
            init.zeros_(module.inited)
            init.zeros_(module.cluster_size)
            init.kaiming_uniform_(module.embed)
            init.copy_(module.embed_avg, module.embed)


def _gradients_for(latents: bool) -> torch.set_grad_enabled:
    """Codes have no gradient, so they are computed without, and the same, whether the caller is training or not."""
    return torch.set_grad_enabled(latents and torch.is_grad_enabled())


def _one_by_one(audio: torch.Tensor) -> bool:
    # From about half a second on, a CPU is faster with one row after the other than with all together, which its caches
    # do not hold (benchmarks/README.md); and each row gets, to the last bit, what it gets alone. Shorter rows go together,
    # and only those in which float32 does not tell which of two entries is nearer are encoded again, alone.
    return audio.shape[-1] > 12_000


class WavTokenizerEncoderModel(_Float32, WavTokenizerPreTrainedModel):
    """Encoder and quantizer: audio to codes. Loads from the files of a whole WavTokenizer, or from its own.

    It stays in float32 whatever dtype the model is loaded in or moved to: bfloat16 changes most codes.
    """

    config_class = WavTokenizerEncoderConfig
    _keep_in_fp32_modules_strict = ["encoder", "quantizer"]
    _keys_to_ignore_on_load_unexpected = [r"^backbone\.", r"^head\."]

    def __init__(self, config: WavTokenizerEncoderConfig | WavTokenizerConfig):
        if config.model_type != self.config_class.model_type:  # or it would save itself as a whole model
            config = config.encoder_config
        super().__init__(config)
        self.encoder = WavTokenizerEncoder(config)
        self.quantizer = WavTokenizerQuantizer(config)
        self.float()  # from_config(config, dtype=...) builds everything in that dtype
        self.post_init()

    @can_return_tuple
    def encode(
        self,
        input_values: torch.Tensor,
        padding_mask: torch.Tensor | None = None,
        output_latents: bool = False,
        chunk_seconds: float | None = None,
    ) -> WavTokenizerEncoderOutput:
        r"""
        Audio to codes. A row of a padded batch gets the codes that it gets alone, and long audio those of the whole.

        Args:
            input_values (`torch.FloatTensor` of shape `(B, 1, T)`): audio at `config.sampling_rate`, nominally in
                [-1, 1]; any float dtype, computed in float32.
            padding_mask (`torch.Tensor` of shape `(B, T)` or `(B, 1, T)`, *optional*): 1 for real samples, 0 for
                padding, which may stand on either side and hold anything.
            output_latents (`bool`): also return the encoder's output before it is quantized.
            chunk_seconds (`float`, *optional*): work on chunks of at most this length (but of 4 frames or more), so that
                memory does not grow with T; the codes are those of the whole. By default 3 s on a CPU for clips above
                6 s, which is also faster there, and 60 s elsewhere.

        Returns:
            [`WavTokenizerEncoderOutput`]: `audio_codes` and, with a padding mask, `audio_codes_mask` (B, 1, L) with
            L = ceil(T / hop). A row padded on the left has its codes at the right end.

        Raises (but a compiled graph cannot look at values, and checks shapes and dtypes only):
            ValueError: audio of another shape or dtype, without samples or not finite; a mask of another shape, or one
                that is not a single run of ones at the row's beginning or end; `chunk_seconds` not above 0.
        """
        audio, rows = self._read_audio(input_values, padding_mask)
        with _gradients_for(output_latents):
            latents, audio_codes = self._encode_rows(audio, rows, output_latents, chunk_seconds)
        return self._output(WavTokenizerEncoderOutput, latents, audio_codes, rows, padding_mask)

    def forward(
        self,
        input_values: torch.Tensor,
        padding_mask: torch.Tensor | None = None,
        output_latents: bool = False,
        chunk_seconds: float | None = None,
        **kwargs,
    ) -> WavTokenizerEncoderOutput:
        """The same as [`~WavTokenizerEncoderModel.encode`]."""
        return self.encode(input_values, padding_mask, output_latents, chunk_seconds, **kwargs)

    def decode(self, *args, **kwargs):
        raise ValueError(
            "WavTokenizerEncoderModel has no decoder. Load the same files with WavTokenizerModel to make audio of codes."
        )

    @staticmethod
    def _read_audio(input_values: torch.Tensor, padding_mask: torch.Tensor | None) -> tuple[torch.Tensor, Rows | None]:
        """Checks the caller's batch -> audio (B, 1, T) in float32 with its rows at the front, and where they were."""
        if not isinstance(input_values, torch.Tensor) or not input_values.is_floating_point():
            got = input_values.dtype if isinstance(input_values, torch.Tensor) else type(input_values).__name__
            raise ValueError(
                f"Got input_values of type {got}, expected a float tensor, as the feature extractor returns."
            )
        if input_values.ndim != 3 or input_values.shape[1] != 1 or input_values.numel() == 0:
            raise ValueError(
                f"Got input_values of shape {tuple(input_values.shape)}, expected (batch size, 1, samples) with at "
                "least one clip of one sample: WavTokenizer is mono. The feature extractor gives this shape."
            )
        batch_size, _, size = input_values.shape
        if isinstance(padding_mask, torch.Tensor) and padding_mask.shape == input_values.shape:
            padding_mask = padding_mask[:, 0]
        rows = Rows.from_mask(padding_mask, "padding_mask", (batch_size, size))
        audio = input_values.float() if rows is None else rows.to_front(input_values.float())
        # a sum needs no memory, unlike a mask; it may overflow, so only the mask can tell in the end
        if not torch.compiler.is_compiling() and not audio.sum().isfinite() and not audio.isfinite().all():
            row = int((~audio.isfinite()).flatten(1).any(1).int().argmax())
            raise ValueError(f"Row {row} of input_values holds NaN or infinite samples. Repair or drop the clip.")
        return audio, rows

    def encode_piece(
        self, audio: torch.Tensor, state: EncoderState, final: bool, lengths: torch.Tensor | None = None
    ) -> tuple[torch.Tensor, torch.Tensor, EncoderState]:
        """Codes of audio that comes in pieces; `long_audio.EncodeStream` is the comfortable way to this.

        Args:
            audio (`torch.FloatTensor` of shape `(B, 1, any)`): the next piece, float32.
            state (`EncoderState`): `EncoderState()` for the first piece, then what the call before returned.
            final (`bool`): whether the audio ends with this piece.
            lengths (`torch.LongTensor` of shape `(B,)`, *optional*): samples of the whole rows, if they differ.

        Returns:
            `latents` (B, D, n) and `audio_codes` (B, 1, n) of the n >= 0 frames that are complete now, and the new state.
        """
        with _full_float32(audio.device):
            latents, state = self.encoder.continue_with(audio, state, final, lengths)
            return latents, self.quantizer.encode(latents), state

    def _chunk_size(self, chunk_seconds: float | None, audio: torch.Tensor) -> int:
        """Samples in a chunk: a whole number of hops, or all that there are."""
        if chunk_seconds is None:
            automatic, above = (3, 6) if audio.device.type == "cpu" else (60, 60)
            if torch.compiler.is_compiling() or audio.shape[-1] <= above * self.config.sampling_rate:
                return audio.shape[-1]
            chunk_seconds = automatic
        if not chunk_seconds > 0:
            raise ValueError(f"Got chunk_seconds={chunk_seconds}, expected more than 0, or None for automatic chunks.")
        overlap = self.encoder.frames_back + self.encoder.frames_ahead  # of a chunk with those around it
        return max(1, math.ceil(chunk_seconds * self.config.frame_rate) - overlap) * self.config.hop_length

    def _encode_rows(
        self, audio: torch.Tensor, rows: Rows | None, output_latents: bool, chunk_seconds: float | None = None
    ) -> tuple[torch.Tensor | None, torch.Tensor]:
        """Audio (B, 1, T), rows at the front -> latents (B, D, L) or None, and codes (B, 1, L), rows at the front."""
        if audio.device.type != "cpu" or torch.compiler.is_compiling() or (len(audio) == 1 and rows is None):
            return self._encode_together(audio, rows, output_latents, chunk_seconds)
        if _one_by_one(audio):
            num_frames = -(-audio.shape[-1] // self.config.hop_length)
            latents = audio.new_zeros(len(audio), self.config.hidden_size, num_frames) if output_latents else None
            audio_codes = torch.zeros(len(audio), 1, num_frames, dtype=torch.long)
            unsettled = range(len(audio))
        else:
            latents, audio_codes = self._encode_together(audio, rows, True, chunk_seconds)
            frames = torch.ones_like(audio_codes) if rows is None else rows.frames(self.config.hop_length).front_mask()
            with _full_float32(audio.device):
                near_ties = self.quantizer.near_ties(latents) & frames.bool()
            unsettled = near_ties.any(-1).nonzero()[:, 0].tolist()
        for row in unsettled:
            clip = audio[row : row + 1, :, : audio.shape[-1] if rows is None else rows.lengths[row]]
            clip_latents, clip_codes = self._encode_together(clip, None, output_latents, chunk_seconds)
            audio_codes[row, :, : clip_codes.shape[-1]] = clip_codes[0]
            if output_latents:
                latents[row, :, : clip_codes.shape[-1]] = clip_latents[0]
        return latents if output_latents else None, audio_codes

    def _encode_together(
        self, audio: torch.Tensor, rows: Rows | None, output_latents: bool, chunk_seconds: float | None
    ) -> tuple[torch.Tensor | None, torch.Tensor]:
        """`_encode_rows` chunk after chunk, each of all rows."""
        hop, chunk_size = self.config.hop_length, self._chunk_size(chunk_seconds, audio)
        num_frames, num_pieces = -(-audio.shape[-1] // hop), -(-audio.shape[-1] // chunk_size)
        cuts = [cut * chunk_size for cut in range(1, num_pieces - 1)]
        if num_pieces > 1:  # the last two are equally long: of a short rest, sums may be in another order
            cuts.append((num_frames + (num_pieces - 2) * chunk_size // hop) // 2 * hop)
        pieces = audio.tensor_split(cuts, dim=-1)
        # made before the loop: what outlives a step of it among what does not leaves holes that little fits into (gigabytes an hour)
        audio_codes = torch.empty(audio.shape[0], 1, num_frames, dtype=torch.long, device=audio.device)
        latents = audio.new_empty(audio.shape[0], self.config.hidden_size, num_frames) if output_latents else None
        state = EncoderState()
        for index, piece in enumerate(pieces):
            place = state.num_frames
            new_latents, new_codes, state = self.encode_piece(
                piece, state, final=index == len(pieces) - 1, lengths=None if rows is None else rows.lengths
            )
            audio_codes[..., place : state.num_frames] = new_codes
            if output_latents:
                latents[..., place : state.num_frames] = new_latents
        return latents, audio_codes

    def _output(self, output_class, latents, audio_codes, rows: Rows | None, padding_mask, **fields):
        """Puts the codes and latents of each row where its audio was, beside a mask that says so."""
        mask = None if padding_mask is None else torch.ones_like(audio_codes, dtype=padding_mask.dtype)
        if rows is not None:
            frames = rows.frames(self.config.hop_length)
            audio_codes, mask = frames.to_place(audio_codes), frames.mask().to(mask.dtype)
            latents = None if latents is None else frames.to_place(latents)
        return output_class(audio_codes=audio_codes, audio_codes_mask=mask, latents=latents, **fields)


class WavTokenizerModel(WavTokenizerPreTrainedModel):
    """WavTokenizer: audio to codes (`encode`), codes to audio (`decode`), or both in one go (`forward`)."""

    _keep_in_fp32_modules_strict = [
        "encoder_model",
        "norm",
        "norm1",
        "norm2",
        "pos_net.5",
        "dwconv",
        "final_layer_norm",
    ]

    def __init__(self, config: WavTokenizerConfig):
        super().__init__(config)
        self.encoder_model = WavTokenizerEncoderModel(config.encoder_config)
        self.backbone = WavTokenizerBackbone(config)
        self.head = WavTokenizerISTFTHead(config)
        self.post_init()

    @property
    def quantizer(self) -> WavTokenizerQuantizer:
        return self.encoder_model.quantizer

    @can_return_tuple
    def encode(
        self,
        input_values: torch.Tensor,
        padding_mask: torch.Tensor | None = None,
        output_latents: bool = False,
        chunk_seconds: float | None = None,
    ) -> WavTokenizerEncoderOutput:
        """Audio to codes; see [`WavTokenizerEncoderModel.encode`]."""
        return self.encoder_model.encode(input_values, padding_mask, output_latents, chunk_seconds, return_dict=True)

    @can_return_tuple
    def decode(
        self,
        audio_codes: torch.Tensor,
        bandwidth_id: int = 0,
        audio_codes_mask: torch.Tensor | None = None,
        window_seconds: float | None = None,
        overlap_seconds: float = 0.25,
    ) -> WavTokenizerDecoderOutput:
        r"""
        Codes to audio. A row of a padded batch gets the audio that it gets alone.

        Args:
            audio_codes (`torch.LongTensor` of shape `(B, 1, L)`): codes in [0, K), of any integer dtype.
            bandwidth_id (`int`, defaults to 0): row of the adaptive norms' tables; the original always decodes with 0.
            audio_codes_mask (`torch.Tensor` of shape `(B, 1, L)`, *optional*): 1 for real codes, 0 for padding, which
                may stand on either side and hold anything.
            window_seconds (`float`, *optional*): decode windows of this length, one after another, so that memory does
                not grow with L. The audio is then not exactly that of the whole, since the decoder looks at all frames
                at once; benchmarks/README.md says how far it is off. By default the whole is decoded in one piece.
            overlap_seconds (`float`): what a window has in common with the next, over which one is faded into the
                other; at most half a window.

        Returns:
            [`WavTokenizerDecoderOutput`]: `audio_values` (B, 1, L * hop), float32, zero where the mask is zero. A row
            padded on the left has its audio at the right end.

        Raises (but a compiled graph cannot look at values, and checks shapes and dtypes only):
            ValueError: codes of another shape or dtype or outside [0, K); a mask as refused by `encode`; a
                `bandwidth_id` outside [0, config.adanorm_num_embeddings); a window shorter than a frame, or than twice the
                overlap.
        """
        codes, rows = self._read_codes(audio_codes, audio_codes_mask)
        self._check_bandwidth_id(bandwidth_id)
        if window_seconds is None:
            audio_values = self._decode_rows(codes, rows, bandwidth_id)
        else:
            window = self._window(window_seconds, overlap_seconds)
            audio_values = self._decode_windows(codes, rows, bandwidth_id, window)
        if rows is not None:
            audio_values = rows.samples(self.config.hop_length).to_place(audio_values)
        return WavTokenizerDecoderOutput(audio_values=audio_values)

    @can_return_tuple
    def forward(
        self,
        input_values: torch.Tensor,
        padding_mask: torch.Tensor | None = None,
        bandwidth_id: int = 0,
        output_latents: bool = False,
    ) -> WavTokenizerOutput:
        r"""
        Audio to codes and back; arguments and errors are those of `encode` and `decode`.

        Returns:
            [`WavTokenizerOutput`]: `audio_values` (B, 1, T) lie where the input lay and are zero where `padding_mask`
            is zero; the rest as from `encode`.
        """
        audio, rows = self.encoder_model._read_audio(input_values, padding_mask)
        self._check_bandwidth_id(bandwidth_id)
        with _gradients_for(output_latents):
            latents, audio_codes = self.encoder_model._encode_rows(audio, rows, output_latents)
        frames = None if rows is None else rows.frames(self.config.hop_length)
        audio_values = self._decode_rows(audio_codes, frames, bandwidth_id)[..., : input_values.shape[-1]]
        if rows is not None:
            audio_values = rows.to_place(audio_values)
        return self.encoder_model._output(
            WavTokenizerOutput, latents, audio_codes, rows, padding_mask, audio_values=audio_values
        )

    def _read_codes(self, audio_codes: torch.Tensor, mask: torch.Tensor | None) -> tuple[torch.Tensor, Rows | None]:
        """Checks the caller's codes -> codes (B, 1, L), int64, with their rows at the front, and where those were."""
        is_tensor = isinstance(audio_codes, torch.Tensor)
        if (
            not is_tensor
            or audio_codes.is_floating_point()
            or audio_codes.is_complex()
            or audio_codes.dtype == torch.bool
        ):
            got = audio_codes.dtype if is_tensor else type(audio_codes).__name__
            raise ValueError(f"Got audio_codes of type {got}, expected an integer tensor.")
        if audio_codes.ndim != 3 or audio_codes.shape[1] != 1 or audio_codes.numel() == 0:
            raise ValueError(
                f"Got audio_codes of shape {tuple(audio_codes.shape)}, expected (batch size, 1, codes) with at least "
                "one code; a plain list of codes becomes that by torch.tensor(codes)[None, None]."
            )
        audio_codes = audio_codes.long()
        rows = Rows.from_mask(mask, "audio_codes_mask", tuple(audio_codes.shape))
        if rows is not None:
            audio_codes = rows.to_front(audio_codes)
        if not torch.compiler.is_compiling():
            low, high = (int(limit) for limit in audio_codes.aminmax())
            if low < 0 or high >= self.config.codebook_size:
                raise ValueError(
                    f"Got audio_codes from {low} to {high}, expected 0 to {self.config.codebook_size - 1}. Ids of a "
                    "language model need their offset removed; padding needs audio_codes_mask."
                )
        return audio_codes, rows

    def _check_bandwidth_id(self, bandwidth_id: int) -> None:
        if type(bandwidth_id) is not int or not 0 <= bandwidth_id < self.config.adanorm_num_embeddings:
            raise ValueError(
                f"Got bandwidth_id={bandwidth_id}, expected an int from 0 to {self.config.adanorm_num_embeddings - 1}; "
                "the original always decodes with 0."
            )

    def decode_piece(
        self,
        audio_codes: torch.Tensor,
        state: DecoderState,
        final: bool,
        window: tuple[int, int],
        bandwidth_id: int = 0,
    ) -> tuple[torch.Tensor, DecoderState]:
        """Audio of codes that come in pieces; `long_audio.DecodeStream` is the comfortable way to this.

        Args:
            audio_codes (`torch.LongTensor` of shape `(B, 1, any)`): the next codes.
            state (`DecoderState`): `DecoderState()` for the first piece, then what the call before returned.
            final (`bool`): whether the codes end with this piece.
            window (`tuple[int, int]`): length of a window and of what two have in common, in frames.

        Returns:
            `audio_values` (B, 1, n * hop) of the n >= 0 frames that are complete now, and the new state.
        """
        size, overlap = window
        hop = self.config.hop_length
        codes, joint, old = audio_codes, state.joint, state.overlap
        if state.audio_codes is not None:
            codes = torch.cat([state.audio_codes, codes], dim=-1)
        pieces = [torch.zeros(len(codes), 1, 0, device=codes.device)]
        while codes.shape[-1] - joint >= size:
            codes, joint = codes[..., joint:], size - overlap
            pieces.append(self._join(old, self._decode_rows(codes[..., :size], None, bandwidth_id)))
            pieces[-1], old = pieces[-1].tensor_split([joint * hop], dim=-1)
        if not final:
            return torch.cat(pieces, dim=-1), DecoderState(codes.clone(), joint, old)
        if codes.shape[-1] - joint > (0 if old is None else overlap):
            last = codes[..., -size:]  # as long as the others, so it may start before the joint
            audio_values = self._decode_rows(last, None, bandwidth_id)
            old = self._join(old, audio_values[..., (last.shape[-1] - codes.shape[-1] + joint) * hop :])
        return torch.cat([*pieces, *([] if old is None else [old])], dim=-1), DecoderState()

    @staticmethod
    def _join(old: torch.Tensor | None, new: torch.Tensor) -> torch.Tensor:
        if old is None:
            return new
        overlap = old.shape[-1]
        return torch.cat([_cross_fade(old, new[..., :overlap]), new[..., overlap:]], dim=-1)

    def _window(self, window_seconds: float, overlap_seconds: float) -> tuple[int, int]:
        """Seconds -> frames of a window and of an overlap."""
        frame_rate = self.config.frame_rate
        if not (0 <= 2 * overlap_seconds <= window_seconds < math.inf and round(window_seconds * frame_rate) > 0):
            raise ValueError(
                f"Got window_seconds={window_seconds} and overlap_seconds={overlap_seconds}, expected a window of at least "
                f"one frame ({1 / frame_rate:.4f} s) and twice the overlap. Lengthen the window, or shorten the "
                "overlap."
            )
        size = round(window_seconds * frame_rate)
        return size, min(round(overlap_seconds * frame_rate), size // 2)

    def _decode_windows(
        self, audio_codes: torch.Tensor, rows: Rows | None, bandwidth_id: int, window: tuple[int, int]
    ) -> torch.Tensor:
        """`_decode_rows` in windows; each row of a padded batch by itself, since its last window ends where it ends."""
        if rows is None:
            return self.decode_piece(audio_codes, DecoderState(), True, window, bandwidth_id)[0]
        audio_values = torch.zeros(
            len(audio_codes), 1, audio_codes.shape[-1] * self.config.hop_length, device=audio_codes.device
        )
        for row, length in enumerate(rows.lengths.tolist()):
            alone = self._decode_windows(audio_codes[row : row + 1, :, :length], None, bandwidth_id, window)
            audio_values[row, :, : alone.shape[-1]] = alone[0]
        return audio_values

    def _decode_rows(self, audio_codes: torch.Tensor, rows: Rows | None, bandwidth_id: int) -> torch.Tensor:
        """Codes (B, 1, L), rows at the front -> audio (B, 1, L * hop), rows at the front, zeros after them."""
        mask = None if rows is None else rows.front_mask()
        return self.head(self.backbone(self.quantizer.decode(audio_codes), bandwidth_id, mask), mask)


__all__ = [
    "WavTokenizerDecoderOutput",
    "WavTokenizerEncoderModel",
    "WavTokenizerEncoderOutput",
    "WavTokenizerModel",
    "WavTokenizerOutput",
    "WavTokenizerPreTrainedModel",
]
