"""WavTokenizer: 24 kHz audio to one stream of codes and back. Ji et al., ICLR 2025, arXiv 2408.16532.

In the order of the data:

    input_values (B, 1, T) -> encoder -> latents (B, D, L) -> quantizer -> audio_codes (B, 1, L)
    audio_codes (B, 1, L) -> quantizer -> (B, D, L) -> backbone -> (B, L, H) -> head -> audio_values (B, 1, L * hop)

Shape letters: B rows of a batch, T samples, L = ceil(T / hop) frames, hop = hop_length samples per code,
D = hidden_size (512), K = codebook_size (4096), H = decoder_hidden_size (768), C channels, N time steps of any kind.

Each row of a padded batch gets what it gets alone: `PaddedBatch` says where its valid part is, and layers that look
beyond one time step respect it. modeling_wavtokenizer_batching.py decides which rows are computed together.

On a CPU, functions named `fast_...` run the expensive layers (see modeling_wavtokenizer_cpu.py). They return None
where they do not apply, and then the plain layers run.

This file is copied unchanged into every Hub repository that we write. It imports the standard library, torch,
transformers and its siblings, and nothing else.
"""

import hashlib
import math
from dataclasses import dataclass
from functools import partial
from typing import Any, NoReturn

import torch
import torch.nn.functional as F
from torch import nn
from torch.nn.utils.parametrize import ParametrizationList, is_parametrized
from transformers import initialization as init
from transformers.modeling_layers import GradientCheckpointingLayer
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS, PreTrainedAudioTokenizerBase
from transformers.utils.generic import ModelOutput

from .configuration_wavtokenizer import WavTokenizerConfig, WavTokenizerEncoderConfig
from .modeling_wavtokenizer_batching import EncodePolicy, encode_rows
from .modeling_wavtokenizer_cpu import fast_depthwise, fast_feed_forward, fast_linear, fast_scores
from .modeling_wavtokenizer_encoder import WavTokenizerEncoder, WavTokenizerLSTMLayers
from .modeling_wavtokenizer_padding import PaddedBatch
from .modeling_wavtokenizer_pickling import PicklableModel
from .modeling_wavtokenizer_precision import Float32Module
from .modeling_wavtokenizer_typing import Model, TypedModel, can_return_tuple
from .modeling_wavtokenizer_windows import decode_windows, window_frames


# ---------------------------------------------------------------------------------------------------------------------
# Outputs
# ---------------------------------------------------------------------------------------------------------------------


@dataclass
class WavTokenizerEncoderOutput(ModelOutput):
    """
    Args:
        audio_codes (`torch.LongTensor` of shape `(B, 1, L)`): codes in [0, K); 0 where the mask is 0.
        audio_codes_mask (`torch.Tensor` of shape `(B, 1, L)`, *optional*): 1 for the codes of real audio, 0 for
            padding, in the dtype of `padding_mask`; with a `padding_mask`.
        latents (`torch.FloatTensor` of shape `(B, D, L)`, *optional*): the encoder's output before it is quantized,
            0 where the mask is 0; with `output_latents=True`.
    """

    audio_codes: torch.Tensor = None  # type: ignore[assignment]  # never None, but transformers asks for a default
    audio_codes_mask: torch.Tensor | None = None
    latents: torch.Tensor | None = None


@dataclass
class WavTokenizerDecoderOutput(ModelOutput):
    """
    Args:
        audio_values (`torch.FloatTensor` of shape `(B, 1, L * hop)`): float32 audio at `config.sampling_rate`,
            nominally in [-1, 1] and not clipped.
    """

    audio_values: torch.Tensor = None  # type: ignore[assignment]  # never None


@dataclass
class WavTokenizerOutput(ModelOutput):
    """
    Args:
        audio_values (`torch.FloatTensor` of shape `(B, 1, T)`): the reconstruction, as long as the input.
        audio_codes (`torch.LongTensor` of shape `(B, 1, L)`): codes in [0, K); 0 where the mask is 0.
        audio_codes_mask (`torch.Tensor` of shape `(B, 1, L)`, *optional*): 1 for codes of audio, 0 for padding.
        latents (`torch.FloatTensor` of shape `(B, D, L)`, *optional*): the encoder's output before it is quantized.
    """

    audio_values: torch.Tensor = None  # type: ignore[assignment]  # never None
    audio_codes: torch.Tensor = None  # type: ignore[assignment]  # never None
    audio_codes_mask: torch.Tensor | None = None
    latents: torch.Tensor | None = None


# ---------------------------------------------------------------------------------------------------------------------
# Quantizer: latents (B, D, L) <-> audio_codes (B, 1, L)
# ---------------------------------------------------------------------------------------------------------------------


class WavTokenizerCodebook(nn.Module):
    """K entries of D numbers, with the moving averages that training keeps of them. The model itself changes none."""

    inited: torch.Tensor
    cluster_size: torch.Tensor
    embed: torch.Tensor
    embed_avg: torch.Tensor

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

    def scores(self, latents: torch.Tensor) -> torch.Tensor:
        """Latents (B, D, L) -> scores (B, L, K) of the entries: the higher, the nearer. -inf for repeated entries.

        |x - e|^2 = |x|^2 - 2 (x.e - |e|^2 / 2), so the score is the term in parentheses.
        """
        frames, entries = latents.transpose(1, 2), self.codebook.embed
        scores = fast_scores(self, frames, entries, self._bias)
        return F.linear(frames, entries, self._bias(entries)) if scores is None else scores

    @staticmethod
    def _bias(entries: torch.Tensor) -> torch.Tensor:
        """Entries (K, D) -> the scores' summand (K,). Of equal entries only the first one can win."""
        bits = (entries + 0.0).view(torch.int32).long()  # + 0.0 turns -0.0 into 0.0
        mixed = (
            bits * 6364136223846793005 + torch.arange(entries.shape[1], device=entries.device) * 1442695040888963407
        )
        hashes = ((mixed ^ (mixed >> 32)) * 6364136223846793005).sum(dim=1)
        order = hashes.argsort(stable=True)  # equal entries become neighbours, the first one first
        neighbours_equal = (entries[order[1:]] == entries[order[:-1]]).all(dim=1)
        repeated = torch.zeros_like(order, dtype=torch.bool).scatter(0, order[1:], neighbours_equal)
        return (-0.5 * torch.linalg.vector_norm(entries, dim=1).square()).masked_fill(repeated, -math.inf)

    def encode(self, latents: torch.Tensor) -> torch.Tensor:
        """Latents (B, D, L) -> codes (B, 1, L), int64: the entry at the smallest Euclidean distance."""
        return self.scores(latents).max(dim=-1).indices[:, None]  # several times as fast as argmax on a CPU

    def decode(self, audio_codes: torch.Tensor) -> torch.Tensor:
        """Codes (B, 1, L) -> quantized (B, D, L)."""
        return F.embedding(audio_codes[:, 0], self.codebook.embed).transpose(1, 2)


# ---------------------------------------------------------------------------------------------------------------------
# Backbone: quantized (B, D, L) -> hidden states (B, L, H). `mask` (B, 1, L) bool: valid frames, None without padding.
# ---------------------------------------------------------------------------------------------------------------------


def _zero_padding(hidden_states: torch.Tensor, mask: torch.Tensor | None) -> torch.Tensor:
    """Set padding to zero, as a convolution sees zeros beyond the end of a row alone."""
    return hidden_states if mask is None else hidden_states * mask


# The decoder may have another dtype than float32. Then its large products use that dtype, and all between them stays
# in float32: in bfloat16 this costs little time and loses far less.


def _cast_for(layer: nn.Module, hidden_states: torch.Tensor) -> torch.Tensor:
    """Cast to the dtype of a layer's weight. A layer that a library put there may have no float weight: no cast."""
    weight = getattr(layer, "weight", None)
    if isinstance(weight, torch.Tensor) and weight.is_floating_point():
        return hidden_states.to(weight.dtype)
    return hidden_states


def _convolve(conv: nn.Conv1d, hidden_states: torch.Tensor) -> torch.Tensor:
    """float32 -> float32, computed in the dtype of the weight."""
    return conv(_cast_for(conv, hidden_states)).float()


def _linear(layer: nn.Linear, hidden_states: torch.Tensor) -> torch.Tensor:
    """(B, L, C) -> (B, L, C')"""
    output = fast_linear(layer, hidden_states)
    return layer(hidden_states) if output is None else output


def _pointwise(conv: nn.Conv1d, hidden_states: torch.Tensor) -> torch.Tensor:
    """(B, L, C) -> (B, L, C'), by a convolution of kernel size 1."""
    output = fast_linear(conv, hidden_states)
    return conv(hidden_states.transpose(1, 2)).transpose(1, 2).contiguous() if output is None else output


class WavTokenizerGroupNorm(Float32Module, nn.GroupNorm):
    """GroupNorm of (B, H, L) with statistics over valid frames only."""

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
        self.dropout = nn.Dropout(0.1)  # no field of the config: the reference implementation always trains with it

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
    **kwargs: Any,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Attention with an L x L matrix: (B, 1, L, H) each -> (B, L, 1, H) and the weights (B, 1, L, L)."""
    weights = query @ key.transpose(2, 3) * scaling
    if attention_mask is not None:
        weights = weights.masked_fill(~attention_mask, torch.finfo(weights.dtype).min)
    weights = weights.softmax(dim=-1)
    return (weights @ value).transpose(1, 2), weights


class WavTokenizerAttention(GradientCheckpointingLayer):
    """(B, H, L) -> (B, H, L): one head over all frames, without positions, added to its input."""

    def __init__(self, config: WavTokenizerConfig):
        super().__init__()
        channels = config.decoder_hidden_size
        self.config = config
        self.is_causal = False
        self.scaling = channels**-0.5
        self.norm = WavTokenizerGroupNorm(config.decoder_attention_num_groups, channels, eps=config.norm_eps)
        self.q = nn.Conv1d(channels, channels, kernel_size=1)
        self.k = nn.Conv1d(channels, channels, kernel_size=1)
        self.v = nn.Conv1d(channels, channels, kernel_size=1)
        self.proj_out = nn.Conv1d(channels, channels, kernel_size=1)

    def forward(self, hidden_states: torch.Tensor, mask: torch.Tensor | None = None) -> torch.Tensor:
        # contiguous (B, 1, L, H): for other layouts sdpa on a CPU would make an L x L matrix
        normed = _cast_for(self.q, self.norm(hidden_states, mask)).transpose(1, 2).contiguous()
        query, key, value = (_pointwise(conv, normed)[:, None] for conv in (self.q, self.k, self.v))
        attention = ALL_ATTENTION_FUNCTIONS.get_interface(self.config._attn_implementation, eager_attention_forward)
        # a key mask (B, 1, 1, L) is broadcast over the queries, so no L x L mask is ever made
        attention_mask = None if mask is None else mask[:, None]
        attended, _ = attention(self, query, key, value, attention_mask, scaling=self.scaling)  # (B, L, 1, H)
        return hidden_states + _pointwise(self.proj_out, attended.squeeze(2)).float().transpose(1, 2)


class WavTokenizerAdaLayerNorm(Float32Module):
    """LayerNorm of (B, L, H) over H, whose scale and shift are row `bandwidth_id` of two tables."""

    def __init__(self, config: WavTokenizerConfig):
        super().__init__()
        self.eps = config.norm_eps
        self.scale = nn.Embedding(config.adanorm_num_embeddings, config.decoder_hidden_size)
        self.shift = nn.Embedding(config.adanorm_num_embeddings, config.decoder_hidden_size)
        self.scale.initial_value, self.shift.initial_value = 1.0, 0.0  # type: ignore[assignment]  # see _init_weights

    def forward(self, hidden_states: torch.Tensor, bandwidth_id: int) -> torch.Tensor:
        row = torch.full((), bandwidth_id, dtype=torch.long, device=hidden_states.device)
        scale, shift = self.scale(row), self.shift(row)
        return F.layer_norm(hidden_states, scale.shape, scale, shift, self.eps)


class WavTokenizerLayerNorm(Float32Module, nn.LayerNorm):
    """LayerNorm in float32."""


class WavTokenizerDepthwiseConv(Float32Module, nn.Conv1d):
    """(B, H, L) -> (B, H, L): a float32 convolution of each channel by itself, with zeros around each row."""

    def __init__(self, channels: int, kernel_size: int):
        super().__init__(channels, channels, kernel_size, padding=kernel_size // 2, groups=channels)


class WavTokenizerConvNeXtBlock(GradientCheckpointingLayer):
    """(B, L, H) -> (B, L, H)"""

    def __init__(self, config: WavTokenizerConfig):
        super().__init__()
        channels = config.decoder_hidden_size
        self.dwconv = WavTokenizerDepthwiseConv(channels, kernel_size=7)
        self.norm = WavTokenizerAdaLayerNorm(config)
        self.pwconv1 = nn.Linear(channels, config.decoder_intermediate_size)
        self.pwconv2 = nn.Linear(config.decoder_intermediate_size, channels)
        for layer in (self.dwconv, self.pwconv1, self.pwconv2):
            layer.initial_std = 0.02  # type: ignore[assignment]  # see _init_weights
        self.gamma = nn.Parameter(torch.full((channels,), 1 / config.decoder_num_layers))

    def forward(
        self, hidden_states: torch.Tensor, bandwidth_id: int, mask: torch.Tensor | None = None
    ) -> torch.Tensor:
        residual = hidden_states
        hidden_states = self._depthwise(_zero_padding(hidden_states, None if mask is None else mask.transpose(1, 2)))
        hidden_states = self._feed_forward(_cast_for(self.pwconv1, self.norm(hidden_states, bandwidth_id)))
        return torch.addcmul(residual, self.gamma.float(), hidden_states.float())

    def _depthwise(self, hidden_states: torch.Tensor) -> torch.Tensor:
        output = fast_depthwise(self.dwconv, hidden_states)
        return self.dwconv(hidden_states.transpose(1, 2)).transpose(1, 2) if output is None else output

    def _feed_forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        output = fast_feed_forward(self.pwconv1, self.pwconv2, hidden_states)
        return self.pwconv2(F.gelu(self.pwconv1(hidden_states))) if output is None else output


class WavTokenizerBackbone(nn.Module):
    """(B, D, L) -> (B, L, H): a front of residual and attention blocks, then ConvNeXt blocks."""

    def __init__(self, config: WavTokenizerConfig):
        super().__init__()
        channels, groups = config.decoder_hidden_size, config.decoder_attention_num_groups
        self.embed = nn.Conv1d(config.codebook_dim, channels, kernel_size=7, padding=3)
        self.embed.initial_std = 0.02  # type: ignore[assignment]  # see _init_weights
        self.pos_net = nn.ModuleList(  # the name in the files; it encodes no positions
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
            if isinstance(module, Float32Module):  # from_config(config, dtype=...) builds everything in that dtype
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
        self.linear = nn.Linear(config.decoder_hidden_size, config.n_fft + 2)

    def forward(self, hidden_states: torch.Tensor, mask: torch.Tensor | None = None) -> torch.Tensor:
        output = _linear(self.linear, _cast_for(self.linear, hidden_states)).float()
        magnitude, phase = output.chunk(2, dim=-1)  # (B, L, n_fft / 2 + 1) each
        spectrum = torch.polar(magnitude.exp().clamp(max=100), phase)
        # computed here: a cast of the model would round a buffer
        window = torch.hann_window(self.n_fft, dtype=torch.float32, device=phase.device)
        frames = torch.fft.irfft(spectrum, n=self.n_fft) * window  # (B, L, n_fft)
        if mask is None:
            return self._overlap_add(frames) / self._overlap_add(window.square().expand(1, *frames.shape[1:]))
        mask = mask.transpose(1, 2)  # (B, L, 1)
        envelope = self._overlap_add(window.square() * mask)
        samples = mask.expand(-1, -1, self.hop_length).flatten(1)[:, None]  # (B, 1, L * hop)
        return self._overlap_add(frames * mask) / envelope.masked_fill(envelope == 0, 1) * samples

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


# ---------------------------------------------------------------------------------------------------------------------
# Models
# ---------------------------------------------------------------------------------------------------------------------


class WavTokenizerPreTrainedModel(TypedModel, PicklableModel, PreTrainedAudioTokenizerBase):  # type: ignore[misc]  # `to`
    config_class = WavTokenizerConfig
    base_model_prefix = "encoder_model"
    main_input_name = "input_values"
    input_modalities = ("audio",)  # type: ignore[assignment]  # as in the native model
    supports_gradient_checkpointing = True
    _no_split_modules = [
        "WavTokenizerResidualBlock", "WavTokenizerResnetBlock", "WavTokenizerAttention", "WavTokenizerConvNeXtBlock"
    ]  # fmt: skip
    _supports_sdpa = True
    _can_compile_fullgraph = True
    config: WavTokenizerConfig
    quantizer: WavTokenizerQuantizer

    @property
    def codebook_fingerprint(self) -> str:
        """Short hash of the codebook: 16 hex digits of the SHA-256 of its entries as little-endian float32.

        Checkpoints of equal shape decode each other's codes to unrelated audio. Equal fingerprints rule that out.
        """
        entries = self.quantizer.codebook.embed.detach().cpu().numpy().astype("<f4")
        return hashlib.sha256(entries.tobytes()).hexdigest()[:16]

    def check_codebook_fingerprint(self, fingerprint: str) -> None:
        """Raise ValueError if `fingerprint`, 16 hex digits, is not that of this model's codebook."""
        own = self.codebook_fingerprint
        if fingerprint != own:
            raise ValueError(
                f"These codes were made with the codebook {fingerprint}, this model has the codebook {own}. It would "
                "decode them to wrong audio. Load the checkpoint that made them."
            )

    @classmethod
    def from_pretrained(cls: type[Model], *args: Any, **kwargs: Any) -> Model:
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

    def save_pretrained(self, *args: Any, **kwargs: Any) -> Any:
        if self.quantizer.codebook.embed.device.type != "meta":  # offloaded weights cannot be read here
            self.config.codebook_fingerprint = self.codebook_fingerprint
        return super().save_pretrained(*args, **kwargs)

    @torch.no_grad()
    def _init_weights(self, module: nn.Module) -> None:
        """Initialise for training from scratch, as the reference implementation does.

        Only modules with tensors of their own are handled. What differs among them is an attribute set by their
        parent, since transformers does not call this for modules without tensors (5.23.0, modeling_utils.py:2371).
        """
        if isinstance(module, ParametrizationList):  # weight norm: PyTorch's, split into gain and direction
            gain, direction = module.get_parameter("original0"), module.get_parameter("original1")
            init.kaiming_uniform_(direction, a=math.sqrt(5))
            init.copy_(gain, torch.linalg.vector_norm(direction, dim=(1, 2), keepdim=True))
        elif isinstance(module, (nn.Conv1d, nn.Linear)):
            if (initial_std := getattr(module, "initial_std", None)) is not None:
                init.trunc_normal_(module.weight, std=initial_std)
                if module.bias is not None:
                    init.zeros_(module.bias)
            else:  # PyTorch's own
                if not is_parametrized(module):
                    init.kaiming_uniform_(module.weight, a=math.sqrt(5))
                if module.bias is not None:
                    bound = module.weight[0].numel() ** -0.5
                    init.uniform_(module.bias, -bound, bound)
        elif isinstance(module, WavTokenizerLSTMLayers):  # PyTorch's own
            for parameter in module.parameters():
                init.uniform_(parameter, -(module.hidden_size**-0.5), module.hidden_size**-0.5)
        elif isinstance(module, nn.Embedding):
            init.constant_(module.weight, module.initial_value)  # type: ignore[arg-type]  # set by the parent
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


class WavTokenizerEncoderModel(Float32Module, WavTokenizerPreTrainedModel):  # type: ignore[misc]  # `to`
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
        Encode audio to codes. Each row of a padded batch gets the codes that it gets alone. Long audio gets the same
        codes in chunks as in one piece.

        Args:
            input_values (`torch.FloatTensor` of shape `(B, 1, T)`):
                Audio at `config.sampling_rate`, nominally in [-1, 1], of any float dtype. It is computed in float32.
            padding_mask (`torch.Tensor` of shape `(B, T)` or `(B, 1, T)`, *optional*):
                1 for valid samples and 0 for padding, on the left or right of a row. Padding may hold any values.
            output_latents (`bool`, defaults to `False`): Whether to return the encoder's output before quantization.
            chunk_seconds (`float`, *optional*):
                Maximum length of the chunks, at least 4 frames. Memory does not grow with T. Defaults to 60.

        Returns:
            [`WavTokenizerEncoderOutput`]: `audio_codes` (B, 1, L), int64 in [0, K), L = ceil(T / hop). With a padding
            mask also `audio_codes_mask` (B, 1, L), with `output_latents` also `latents` (B, D, L). A row that is
            padded on the left has its codes at the right end.

        Raises:
            ValueError: Audio of another shape or dtype, without samples, not finite, or so loud that latents are not
                finite. A mask of another shape or on another device, or one that is not a single run of ones at the
                start or end of each row. `chunk_seconds` not above 0. A compiled graph checks shapes and dtypes only.
        """
        return self._encode(input_values, padding_mask, output_latents, chunk_seconds)

    def forward(
        self,
        input_values: torch.Tensor,
        padding_mask: torch.Tensor | None = None,
        output_latents: bool = False,
        chunk_seconds: float | None = None,
        **kwargs: Any,
    ) -> WavTokenizerEncoderOutput:
        return self.encode(input_values, padding_mask, output_latents, chunk_seconds, **kwargs)

    forward.__doc__ = encode.__doc__

    def decode(self, *args: Any, **kwargs: Any) -> NoReturn:
        raise ValueError("WavTokenizerEncoderModel has no decoder. Load the same files with WavTokenizerModel.")

    def _encode(
        self,
        input_values: torch.Tensor,
        padding_mask: torch.Tensor | None = None,
        output_latents: bool = False,
        chunk_seconds: float | None = None,
        policy: EncodePolicy | None = None,
    ) -> WavTokenizerEncoderOutput:
        audio, batch = self._read_audio(input_values, padding_mask)
        latents, audio_codes = self._encode_rows(audio, batch, output_latents, chunk_seconds, policy)
        return WavTokenizerEncoderOutput(**self._output_fields(latents, audio_codes, batch, padding_mask))

    @staticmethod
    def _read_audio(
        input_values: torch.Tensor, padding_mask: torch.Tensor | None
    ) -> tuple[torch.Tensor, PaddedBatch | None]:
        """Check a batch and return it as (B, 1, T) float32, rows aligned to the left, with its padding."""
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
        batch = PaddedBatch.from_mask(padding_mask, "padding_mask", (batch_size, size), input_values.device)
        audio = input_values.float() if batch is None else batch.left_align(input_values.float())
        # a sum needs no memory, unlike a mask; but it may overflow, so the mask decides
        if not torch.compiler.is_compiling() and not audio.sum().isfinite() and not audio.isfinite().all():
            row = int((~audio.isfinite()).flatten(1).any(1).int().argmax())
            raise ValueError(f"Row {row} of input_values holds NaN or infinite samples. Repair or drop the clip.")
        return audio, batch

    def _encode_rows(
        self,
        audio: torch.Tensor,
        batch: PaddedBatch | None,
        output_latents: bool,
        chunk_seconds: float | None = None,
        policy: EncodePolicy | None = None,
    ) -> tuple[torch.Tensor | None, torch.Tensor]:
        """Audio (B, 1, T) -> latents (B, D, L) or None, and codes (B, 1, L), rows aligned to the left."""
        with torch.set_grad_enabled(output_latents and torch.is_grad_enabled()):  # codes have no gradient
            lengths = None if batch is None else batch.lengths
            return encode_rows(self, audio, lengths, output_latents, chunk_seconds, policy)

    def _output_fields(
        self, latents: torch.Tensor | None, codes: torch.Tensor, batch: PaddedBatch | None, mask: torch.Tensor | None
    ) -> dict[str, Any]:
        """Move the codes and latents of each row to where its audio was, and add their mask."""
        codes_mask = None if mask is None else torch.ones_like(codes, dtype=mask.dtype)
        if batch is not None and codes_mask is not None:
            frames = batch.frames(self.config.hop_length)
            codes, codes_mask = frames.restore_padding(codes), frames.mask().to(codes_mask.dtype)
            latents = None if latents is None else frames.restore_padding(latents)
        return {"audio_codes": codes, "audio_codes_mask": codes_mask, "latents": latents}


class WavTokenizerModel(WavTokenizerPreTrainedModel):
    """WavTokenizer: audio to codes (`encode`), codes to audio (`decode`), or both in one go (`forward`)."""

    _keep_in_fp32_modules_strict = [
        "encoder_model", "norm", "norm1", "norm2", "pos_net.5", "dwconv", "final_layer_norm"
    ]  # fmt: skip

    def __init__(self, config: WavTokenizerConfig):
        super().__init__(config)
        self.encoder_model = WavTokenizerEncoderModel(config.encoder_config)
        self.backbone = WavTokenizerBackbone(config)
        self.head = WavTokenizerISTFTHead(config)
        self.post_init()

    @property
    def quantizer(self) -> WavTokenizerQuantizer:  # type: ignore[override]  # an attribute of the encoder model
        return self.encoder_model.quantizer

    @can_return_tuple
    def encode(
        self,
        input_values: torch.Tensor,
        padding_mask: torch.Tensor | None = None,
        output_latents: bool = False,
        chunk_seconds: float | None = None,
    ) -> WavTokenizerEncoderOutput:
        return self.encoder_model._encode(input_values, padding_mask, output_latents, chunk_seconds)

    encode.__doc__ = WavTokenizerEncoderModel.encode.__doc__

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
        Decode codes to audio. Each row of a padded batch gets the audio that it gets alone.

        Args:
            audio_codes (`torch.LongTensor` of shape `(B, 1, L)`): Codes in [0, K), of any integer dtype.
            bandwidth_id (`int`, defaults to 0): Row of the adaptive norms' tables, in
                [0, config.adanorm_num_embeddings). The reference implementation always decodes with 0.
            audio_codes_mask (`torch.Tensor` of shape `(B, 1, L)`, *optional*):
                1 for valid codes and 0 for padding, on the left or on the right of a row. Padding may hold any values.
            window_seconds (`float`, *optional*):
                Length of the windows in which the codes are decoded, in constant memory. The result is approximate
                (benchmarks/README.md says how close), since the decoder looks at all frames. Default: no windows.
            overlap_seconds (`float`, defaults to 0.25):
                Overlap of two windows, over which the first fades into the second. At most half a window.

        Returns:
            [`WavTokenizerDecoderOutput`]: `audio_values` (B, 1, L * hop), float32, 0 where the mask is 0. A row that
            is padded on the left has its audio at the right end.

        Raises:
            ValueError: Codes of another shape or dtype, or outside [0, K). A mask of another shape or device, or one
                that is not a single run of ones at one end of each row. A `bandwidth_id` outside its range. A window
                shorter than a frame or than twice the overlap. A compiled graph checks shapes and dtypes only.
        """
        codes, batch = self._read_codes(audio_codes, audio_codes_mask)
        self._check_bandwidth_id(bandwidth_id)
        if window_seconds is None:
            audio_values = self._decode_rows(codes, batch, bandwidth_id)
        else:
            window = window_frames(self.config, window_seconds, overlap_seconds)
            audio_values = decode_windows(partial(self._decode_rows, bandwidth_id=bandwidth_id), codes, batch, window)
        if batch is not None:
            audio_values = batch.samples(self.config.hop_length).restore_padding(audio_values)
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
        Encode audio to codes, and decode all of these at once. Each row of a padded batch gets what it gets alone.

        Args:
            input_values (`torch.FloatTensor` of shape `(B, 1, T)`):
                Audio at `config.sampling_rate`, nominally in [-1, 1], of any float dtype. It is encoded in float32.
            padding_mask (`torch.Tensor` of shape `(B, T)` or `(B, 1, T)`, *optional*):
                1 for valid samples and 0 for padding, on the left or on the right of a row.
            bandwidth_id (`int`, defaults to 0): Row of the adaptive norms' tables, 0 in the reference implementation.
            output_latents (`bool`, defaults to `False`): Whether to return the encoder's output before quantization.

        Returns:
            [`WavTokenizerOutput`]: `audio_values` (B, 1, T), float32, at the positions of the input, 0 where
            `padding_mask` is 0, and `audio_codes` (B, 1, L). With a padding mask also `audio_codes_mask`, with
            `output_latents` `latents`.

        Raises:
            ValueError: Audio of another shape or dtype, empty or not finite. A mask of another shape or device, or one
                that is not a single run of ones at one end of each row. A `bandwidth_id` outside its range.
        """
        audio, batch = self.encoder_model._read_audio(input_values, padding_mask)
        self._check_bandwidth_id(bandwidth_id)
        latents, audio_codes = self.encoder_model._encode_rows(audio, batch, output_latents)
        frames = None if batch is None else batch.frames(self.config.hop_length)
        audio_values = self._decode_rows(audio_codes, frames, bandwidth_id)[..., : input_values.shape[-1]]
        if batch is not None:
            audio_values = batch.restore_padding(audio_values)
        fields = self.encoder_model._output_fields(latents, audio_codes, batch, padding_mask)
        return WavTokenizerOutput(audio_values=audio_values, **fields)

    def _read_codes(
        self, audio_codes: torch.Tensor, mask: torch.Tensor | None
    ) -> tuple[torch.Tensor, PaddedBatch | None]:
        """Check codes and return them as (B, 1, L) int64, rows aligned to the left, with their padding."""
        dtype = audio_codes.dtype if isinstance(audio_codes, torch.Tensor) else None
        if dtype is None or dtype.is_floating_point or dtype.is_complex or dtype == torch.bool:
            got = dtype or type(audio_codes).__name__
            raise ValueError(f"Got audio_codes of type {got}, expected an integer tensor.")
        if audio_codes.ndim != 3 or audio_codes.shape[1] != 1 or audio_codes.numel() == 0:
            raise ValueError(
                f"Got audio_codes of shape {tuple(audio_codes.shape)}, expected (batch size, 1, codes) with at least "
                "one code; a plain list of codes becomes that by torch.tensor(codes)[None, None]."
            )
        audio_codes = audio_codes.long()
        batch = PaddedBatch.from_mask(mask, "audio_codes_mask", tuple(audio_codes.shape), audio_codes.device)
        if batch is not None:
            audio_codes = batch.left_align(audio_codes)
        if not torch.compiler.is_compiling():
            low, high = (int(limit) for limit in audio_codes.aminmax())
            if low < 0 or high >= self.config.codebook_size:
                raise ValueError(
                    f"Got audio_codes from {low} to {high}, expected 0 to {self.config.codebook_size - 1}. Ids of a "
                    "language model need their offset removed; padding needs audio_codes_mask."
                )
        return audio_codes, batch

    def _check_bandwidth_id(self, bandwidth_id: int) -> None:
        if type(bandwidth_id) is not int or not 0 <= bandwidth_id < self.config.adanorm_num_embeddings:
            raise ValueError(
                f"Got bandwidth_id={bandwidth_id}, expected an int from 0 to "
                f"{self.config.adanorm_num_embeddings - 1}; the reference implementation always decodes with 0."
            )

    def _decode_rows(
        self, audio_codes: torch.Tensor, batch: PaddedBatch | None = None, bandwidth_id: int = 0
    ) -> torch.Tensor:
        """Codes (B, 1, L) -> audio (B, 1, L * hop), rows aligned to the left, 0 after them."""
        mask = None if batch is None else batch.left_aligned_mask()
        return self.head(self.backbone(self.quantizer.decode(audio_codes), bandwidth_id, mask), mask)


__all__ = [
    "WavTokenizerDecoderOutput",
    "WavTokenizerEncoderModel",
    "WavTokenizerEncoderOutput",
    "WavTokenizerModel",
    "WavTokenizerOutput",
    "WavTokenizerPreTrainedModel",
]
