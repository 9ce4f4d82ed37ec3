"""The encoder of WavTokenizer: input_values (B, 1, T) -> latents (B, D, L). See modeling_wavtokenizer.py, which imports it.

Shape letters as there. What lies here: the products that inference on a CPU is made of, the convolution with its padding, the
layers, and the encoder with the state that it carries from one piece of audio to the next.

This file is copied unchanged into every Hub repository that we write: it imports the standard library, torch,
transformers and its sibling configuration, and nothing else.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import nn
from torch.nn.utils.parametrizations import weight_norm
from transformers.modeling_layers import GradientCheckpointingLayer

from .configuration_wavtokenizer import WavTokenizerConfig


# torch's usual products on a CPU, MKL's, are far slower on AMD's processors than oneDNN's, and as fast on Intel's. These are
# the operators that torch.compile's own CPU backend calls; builds of torch for other processors may lack them.
_HAS_ONEDNN = all(
    hasattr(torch.ops.mkldnn, name)
    for name in ("_linear_pointwise", "_reorder_linear_weight", "_reorder_mkldnn_rnn_layer_weight")
)

_ONEDNN_LSTM = 2  # among oneDNN's kinds of recurrent layers


def pays_by_onednn(values: torch.Tensor) -> bool:
    """Whether products of these values are for oneDNN, whose operators know no gradients: inference on a CPU."""
    usual = torch.is_grad_enabled() or torch.compiler.is_compiling() or torch.is_autocast_enabled("cpu")
    return _HAS_ONEDNN and values.device.type == "cpu" and not usual


def product(
    inputs: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None = None,
    onto: torch.Tensor | None = None,
    gelu: bool = False,
) -> torch.Tensor:
    """inputs (..., C) x weight (C', C) transposed + bias, then GELU if asked for, then + `onto` -> (..., C')."""
    if not pays_by_onednn(inputs):
        output = F.linear(inputs, weight, bias)
        output = F.gelu(output) if gelu else output
        return output if onto is None else onto + output
    if onto is None:
        activation, algorithm = ("gelu", "none") if gelu else ("none", "")
        return torch.ops.mkldnn._linear_pointwise(inputs, weight, bias, activation, [], algorithm)
    return torch.ops.mkldnn._linear_pointwise.binary(inputs, onto, weight, bias, "add")


class Kept:
    """What is computed of weights and kept until they change; copied or pickled, it is empty, and computed again.

    A change through `.data`, or by a fused optimizer, counts in no tensor's version, so a number of each row is compared as well.
    """

    def __init__(self):
        self._kept = None

    def get(self, weights: Sequence[torch.Tensor], compute: Callable):
        versions = [(weight.data_ptr(), None if weight.is_inference() else weight._version) for weight in weights]
        sample = torch.cat([weight.detach().flatten()[:: max(1, weight[0].numel() - 1)] for weight in weights])
        kept = self._kept
        if kept is None or kept[0] != versions or not torch.equal(kept[1], sample):
            kept = self._kept = versions, sample, compute()
        return kept[2]

    def __reduce__(self):
        return Kept, ()


def _reflect(values: torch.Tensor, left: int, right: int) -> torch.Tensor:
    """Continues (B, C, N) by reflection at both ends; a signal too short for that is first lengthened by zeros."""
    missing = max(left, right) + 1 - values.shape[-1]
    if missing <= 0:
        return F.pad(values, (left, right), mode="reflect")
    return F.pad(F.pad(values, (0, missing)), (left, right), mode="reflect")[..., :-missing]


def _reflect_rows(values: torch.Tensor, lengths: torch.Tensor, left: int, right: int, stride: int) -> torch.Tensor:
    """`_reflect` of each row (C, lengths[b]) of (B, C, N) at its own two ends, filled up to one length."""
    most_right = right + stride - 1
    own_right = right + (-lengths) % stride
    extended = torch.maximum(lengths, own_right.clamp(min=left) + 1)[:, None]  # the short-signal rule, per row
    lengths = lengths[:, None]
    before = torch.arange(-left, 0, device=values.device).expand(len(values), -1)
    after = lengths + torch.arange(most_right, device=values.device)
    places = torch.cat([before, after], dim=1)  # (B, left + most_right): what lies around each row
    sources = places.abs()
    sources = torch.where(sources < extended, sources, 2 * (extended - 1) - sources)
    real = (sources >= 0) & (sources < lengths)
    index = sources.clamp(0, values.shape[-1] - 1)[:, None].expand(-1, values.shape[1], -1)
    around = values.gather(-1, index).masked_fill(~real[:, None], 0)
    places = (places + left)[:, None].expand_as(around)
    return F.pad(values, (left, most_right)).scatter_(-1, places, around)


def _one_of_few_sizes(size: int, second: float) -> int:
    """The next of sizes that are an eighth of an octave apart, at most an eighth and one larger; 1, 2, 3 and 4 seconds are
    among them.

    For each size that oneDNN has not met yet it makes new code, which takes as long as a second of audio.
    """
    octave = second * 2.0 ** math.floor(math.log2(size / second))
    return math.ceil(octave * math.ceil(8 * size / octave) / 8)


class WavTokenizerConv1d(nn.Module):
    """Weight-normalised convolution (B, C, N) -> (B, C', ceil(N / stride)) that reflects the signal at its ends.

    `lengths` are those of the rows. One number stands for a single clip, whose rest nobody looks at, that is to be computed
    as products (`can_be_products`). With `elu`, of the ELU of its input; `onto` (B, C', ceil(N / stride)) is added to what
    comes out.
    """

    def __init__(self, in_channels: int, out_channels: int, kernel_size: int, stride: int = 1, dilation: int = 1):
        super().__init__()
        self.conv = weight_norm(nn.Conv1d(in_channels, out_channels, kernel_size, stride, dilation=dilation))
        total = (kernel_size - 1) * dilation + 1 - stride
        self.stride = stride
        self.right = total // 2
        self.left = total - self.right  # an odd total pads one more on the left
        self._kept_taps = Kept()

    def forward(
        self,
        hidden_states: torch.Tensor,
        lengths: torch.Tensor | int | None = None,
        elu: bool = False,
        onto: torch.Tensor | None = None,
    ) -> torch.Tensor:
        if isinstance(lengths, int):
            return self._as_products(hidden_states, lengths, elu, onto)
        padded = hidden_states
        if lengths is not None and self.left + self.right > 0:
            padded = _reflect_rows(hidden_states, lengths, self.left, self.right, self.stride)
        elif self.left + self.right > 0:
            right = self.right + -hidden_states.shape[-1] % self.stride  # so that the last window is full
            padded = _reflect(hidden_states, self.left, right)
        if elu:
            padded = F.elu(padded, inplace=padded is not hidden_states)
        output = self.conv(padded)
        return output if onto is None else onto + output

    @property
    def can_be_products(self) -> bool:
        # not on a GPU of a device_map, nor offloaded: accelerate loads those weights, which are meta until then, when
        # self.conv is called
        return self.conv.dilation == (1,) and self.conv.bias.device.type == "cpu"

    def _as_products(
        self, hidden_states: torch.Tensor, real: int, elu: bool, onto: torch.Tensor | None
    ) -> torch.Tensor:
        """The same for one clip (1, C, N) that lies in memory time step after time step, as what comes out then does.

        A block of `stride` time steps is one run of memory there, and a window is a few blocks. So the convolution is one
        product for each block of the window, of all blocks from that one on, and no window has to be copied. The clip is the
        first `real` time steps, and nothing that comes after them counts.
        """
        steps = padded = hidden_states[0].t().contiguous()  # (N, C)
        right = self.right + -real % self.stride
        if elu or self.left + right > 0:
            size = (-(-len(steps) // self.stride) - 1) * self.stride + self.conv.kernel_size[0]
            padded = steps.new_empty(size, steps.shape[1])
            before, inside, after, unused = padded.split([self.left, real, right, size - self.left - real - right])
            torch.ops.aten.elu.out(steps[:real], out=inside) if elu else inside.copy_(steps[:real])
            before.copy_(inside[1 : 1 + self.left].flip(0))
            after.copy_(inside[-1 - right : -1].flip(0))
            unused.zero_()
        taps = self._taps()
        if steps.shape[1] == 1:  # windows as small as these are worth a copy
            blocks = padded[:, 0].unfold(0, self.conv.kernel_size[0], self.stride)
        else:
            blocks = padded.view(-1, self.stride * steps.shape[1])
        length = len(blocks) - len(taps) + 1
        output = product(blocks[:length], taps[0], self.conv.bias, None if onto is None else onto[0].t())
        for place, tap in enumerate(taps[1:], start=1):
            output = product(blocks[place : place + length], tap, onto=output)
        return output.t()[None]

    def _taps(self) -> list[torch.Tensor]:
        """The weight, folded and cut into blocks of `stride` time steps (C', stride * C), as oneDNN wants them."""
        parametrization = self.conv.parametrizations.weight
        gain, direction = parametrization.original0, parametrization.original1

        def fold() -> list[torch.Tensor]:
            weight = self.conv.weight.transpose(1, 2)  # (C', K, C)
            size = weight.shape[1] if weight.shape[2] == 1 else self.stride
            taps = [tap.flatten(1).contiguous() for tap in weight.split(size, dim=1)]
            return [torch.ops.mkldnn._reorder_linear_weight(tap, None) for tap in taps]

        return self._kept_taps.get([gain, direction], fold)


class WavTokenizerResidualBlock(GradientCheckpointingLayer):
    """(B, C, N) -> (B, C, N)"""

    def __init__(self, config: WavTokenizerConfig, channels: int, dilation: int):
        super().__init__()
        inner = channels // config.compress
        self.block = nn.ModuleList(
            [
                nn.ELU(),  # computed by the convolution after it, as all are
                WavTokenizerConv1d(channels, inner, config.residual_kernel_size, dilation=dilation),
                nn.ELU(),
                WavTokenizerConv1d(inner, channels, 1),
            ]
        )
        self.shortcut = WavTokenizerConv1d(channels, channels, 1)

    def forward(self, hidden_states: torch.Tensor, lengths: torch.Tensor | int | None = None) -> torch.Tensor:
        _, narrow, _, widen = self.block
        inner = narrow(hidden_states, lengths, elu=True)
        return widen(inner, lengths, elu=True, onto=self.shortcut(hidden_states, lengths))


class WavTokenizerLSTMLayers(nn.RNNBase):
    """nn.LSTM under another name, since torch.compile refuses to trace that class: (L, B, C) -> (L, B, C), state."""

    def __init__(self, channels: int, num_layers: int):
        super().__init__("LSTM", channels, channels, num_layers)
        self._kept_weights = Kept()

    def forward(self, inputs: torch.Tensor, state: tuple[torch.Tensor, torch.Tensor] | None = None):
        if state is None:
            zeros = inputs.new_zeros(self.num_layers, inputs.shape[1], self.hidden_size)
            state = (zeros, zeros)
        if pays_by_onednn(inputs):
            return self._by_onednn(inputs, state)
        weights = [weight for layer in self.all_weights for weight in layer]
        output, *state = torch.lstm(
            inputs, state, weights, self.bias, self.num_layers, 0.0, self.training, False, False
        )
        return output, tuple(state)

    def _by_onednn(self, inputs: torch.Tensor, state: tuple[torch.Tensor, torch.Tensor]):
        """What torch.lstm calls on a CPU, but that the weights are not reordered for oneDNN each time, which takes
        longer than 20 frames of audio."""
        inputs, size, states = inputs.contiguous(), self.hidden_size, []
        for layer, weights in enumerate(self._packed_weights()):
            hidden, cell = (values[layer : layer + 1].contiguous() for values in state)
            inputs, hidden, cell, _ = torch.ops.aten.mkldnn_rnn_layer(
                inputs, *weights, hidden, cell, False, [], _ONEDNN_LSTM, size, 1, True, False, False, False
            )
            states.append((hidden, cell))
        return inputs, tuple(torch.cat(values) for values in zip(*states, strict=True))

    def _packed_weights(self) -> list[tuple[torch.Tensor, ...]]:
        """For each layer the weights of inputs and state, as oneDNN wants them, and their biases."""

        def pack() -> list[tuple[torch.Tensor, ...]]:
            reorder = torch.ops.mkldnn._reorder_mkldnn_rnn_layer_weight
            return [
                (*reorder(by_input, by_state, self.hidden_size, False, True, False), input_bias, state_bias)
                for by_input, by_state, input_bias, state_bias in self.all_weights
            ]

        weights = [weight for layer in self.all_weights for weight in layer]
        return self._kept_weights.get(weights, pack)


class WavTokenizerLSTM(nn.Module):
    """(B, C, L) -> (B, C, L): a forward LSTM, its input added to its output; and its state after the last frame."""

    def __init__(self, config: WavTokenizerConfig, channels: int):
        super().__init__()
        self.lstm = WavTokenizerLSTMLayers(channels, config.num_lstm_layers)

    def forward(
        self, hidden_states: torch.Tensor, state: tuple[torch.Tensor, torch.Tensor] | None = None
    ) -> tuple[torch.Tensor, tuple[torch.Tensor, torch.Tensor]]:
        output, state = self.lstm(hidden_states.permute(2, 0, 1), state)
        return hidden_states + output.permute(1, 2, 0), state


@dataclass
class EncoderState:
    """What the encoder keeps of the audio that it has seen, for the audio that is still to come; small and picklable."""

    audio: torch.Tensor | None = None  # (B, 1, N): samples that later frames reach back to, or wait for others
    audio_start: int = 0  # where the first of them lies, in frames
    num_convolved: int = 0  # frames that have gone through the convolutions and the LSTM
    lstm: tuple[torch.Tensor, torch.Tensor] | None = None
    frames: torch.Tensor | None = None  # (B, C, N): frames after the LSTM that the last convolution still needs
    frames_start: int = 0
    num_frames: int = 0  # frames given out


class WavTokenizerEncoder(nn.Module):
    """SEANet encoder: (B, 1, T) -> (B, D, L). `lengths` (B,) are the rows' samples, None without padding.

    All but the LSTM reaches a fixed distance, and the LSTM runs forward: so audio can come in pieces (`continue_with`), and
    gives what it gives in one piece.
    """

    def __init__(self, config: WavTokenizerConfig):
        super().__init__()
        channels = config.num_filters
        layers = [WavTokenizerConv1d(config.audio_channels, channels, config.kernel_size)]
        for stride in reversed(config.upsampling_ratios):
            for layer in range(config.num_residual_layers):
                layers.append(WavTokenizerResidualBlock(config, channels, config.dilation_growth_rate**layer))
            layers.append(nn.ELU())
            layers.append(WavTokenizerConv1d(channels, 2 * channels, 2 * stride, stride))
            channels *= 2
        layers.append(WavTokenizerLSTM(config, channels))
        layers.append(nn.ELU())
        layers.append(WavTokenizerConv1d(channels, config.hidden_size, config.last_kernel_size))
        self.layers = nn.ModuleList(layers)
        self.hop_length, self.frame_rate = config.hop_length, config.frame_rate
        self.convolutions = [layer for layer in self.modules() if isinstance(layer, WavTokenizerConv1d)]
        self.frames_back, self.frames_ahead = self._reach()
        self.last_reach = self.layers[-1].left  # frames, to either side

    def forward(self, input_values: torch.Tensor, lengths: torch.Tensor | None = None) -> torch.Tensor:
        latents, _ = self.continue_with(input_values, EncoderState(), final=True, lengths=lengths)
        return latents

    def continue_with(
        self, audio: torch.Tensor, state: EncoderState, final: bool, lengths: torch.Tensor | None = None
    ) -> tuple[torch.Tensor, EncoderState]:
        """Takes the next piece of audio (B, 1, any) and gives the latents (B, D, any) that are complete with it.

        Each stage works on the new frames and on as many around them as they reach to, and keeps the new ones: so what it
        mirrors at the ends of a piece shows only where the audio itself ends. `lengths` are those of the whole rows.
        Nothing can follow a `final` piece.
        """
        hop = self.hop_length
        audio = audio if state.audio is None else torch.cat([state.audio, audio], dim=-1)
        end = state.audio_start * hop + audio.shape[-1]  # samples seen
        first, last = state.num_convolved, -(-end // hop) if final else end // hop - self.frames_ahead
        frames, lstm = state.frames, state.lstm
        if last > first:
            hidden_states = self._convolve(audio, None if lengths is None else lengths - state.audio_start * hop)
            hidden_states = hidden_states[..., first - state.audio_start : last - state.audio_start]
            hidden_states, lstm = self.layers[-3](hidden_states, lstm)
            frames = hidden_states if frames is None else torch.cat([frames, hidden_states], dim=-1)
        last = max(first, last)
        audio_start = max(0, last - self.frames_back)

        given, ready = state.num_frames, last if final else last - self.last_reach
        if ready > given:
            lengths = None if lengths is None else -(-lengths // hop) - state.frames_start
            latents = self.layers[-1](frames, self._lengths_within(frames, lengths, self.last_reach), elu=True)
            latents = latents[..., given - state.frames_start : ready - state.frames_start]
        else:
            latents = audio.new_zeros(len(audio), self.layers[-1].conv.out_channels, 0)
        ready = max(given, ready)
        frames_start = max(0, ready - self.last_reach)
        return (
            latents,
            EncoderState(
                audio=audio[..., (audio_start - state.audio_start) * hop :].clone(),  # a view would keep all of it
                audio_start=audio_start,
                num_convolved=last,
                lstm=lstm,
                frames=None if frames is None else frames[..., frames_start - state.frames_start :].clone(),
                frames_start=frames_start,
                num_frames=ready,
            ),
        )

    def _convolve(self, hidden_states: torch.Tensor, lengths: torch.Tensor | None) -> torch.Tensor:
        """The layers before the LSTM: audio (B, 1, T) -> (B, C, ceil(T / hop))."""
        num_frames = -(-hidden_states.shape[-1] // self.hop_length)
        lengths = self._lengths_within(hidden_states, lengths, self.frames_back * self.hop_length)
        if isinstance(lengths, int):
            size = _one_of_few_sizes(num_frames, self.frame_rate) * self.hop_length
            hidden_states = F.pad(hidden_states, (0, size - lengths))
        for place, layer in enumerate(self.layers[:-3]):
            if isinstance(layer, WavTokenizerResidualBlock):
                hidden_states = layer(hidden_states, lengths)
            elif isinstance(layer, WavTokenizerConv1d):
                hidden_states = layer(hidden_states, lengths, elu=place > 0)
                lengths = None if lengths is None else -(-lengths // layer.stride)
        return hidden_states[..., :num_frames]

    def _lengths_within(
        self, values: torch.Tensor, lengths: torch.Tensor | None, reach: int
    ) -> torch.Tensor | int | None:
        """Lengths as convolutions that reach `reach` steps take them: those of the rows as far as they lie within (B, C, N),
        where a row that has ended counts as 1 and nobody looks at it; N for a single clip if products pay; else None.
        """
        if lengths is not None:
            return lengths.clamp(1, values.shape[-1])
        if not pays_by_onednn(values) or len(values) > 1 or values.shape[-1] <= reach:
            return None
        return values.shape[-1] if all(layer.can_be_products for layer in self.convolutions) else None

    def _reach(self) -> tuple[int, int]:
        """How many frames the layers before the LSTM reach back and ahead of a frame, mirrored audio at an end included."""
        back = ahead = 0
        rate = 1  # samples per time step of the layer at hand
        for layer in self.layers[:-3]:
            for conv in layer.modules():
                if isinstance(conv, WavTokenizerConv1d):
                    most_right = conv.right + conv.stride - 1
                    # what is mirrored at the end of a row lies so far back, and at its start so far ahead
                    mirrored = max(conv.left, most_right) * rate
                    back, ahead = back + mirrored, ahead + mirrored
                    rate *= conv.stride
        return -(-back // self.hop_length), -(-max(ahead + 1 - self.hop_length, 0) // self.hop_length)
