"""The encoder of WavTokenizer: input_values (B, 1, T) -> latents (B, D, L). modeling_wavtokenizer.py imports it.

Shape letters: B rows of a batch, T samples, L = ceil(T / hop) frames, D = hidden_size (512), C channels, N time steps.

This file is copied unchanged into every Hub repository that we write. It imports the standard library, torch,
transformers and its siblings, and nothing else.
"""

from dataclasses import dataclass

import torch
from torch import nn
from torch.nn.utils.parametrizations import weight_norm
from transformers.modeling_layers import GradientCheckpointingLayer

from .configuration_wavtokenizer import WavTokenizerConfig
from .modeling_wavtokenizer_cpu import fast_convolve, fast_lstm
from .modeling_wavtokenizer_padding import reflect_pad


class WavTokenizerConv1d(nn.Module):
    """Weight-normalised convolution (B, C, N) -> (B, C', ceil(N / stride)) that reflects each row at its ends."""

    def __init__(self, in_channels: int, out_channels: int, kernel_size: int, stride: int = 1, dilation: int = 1):
        super().__init__()
        self.conv = weight_norm(nn.Conv1d(in_channels, out_channels, kernel_size, stride, dilation=dilation))
        total = (kernel_size - 1) * dilation + 1 - stride
        self.stride = stride
        self.right = total // 2
        self.left = total - self.right  # an odd total pads one more on the left

    def forward(self, hidden_states: torch.Tensor, lengths: torch.Tensor | None = None) -> torch.Tensor:
        return self.conv(reflect_pad(hidden_states, lengths, self.left, self.right, self.stride))


class WavTokenizerResidualBlock(GradientCheckpointingLayer):
    """(B, C, N) -> (B, C, N)"""

    def __init__(self, config: WavTokenizerConfig, channels: int, dilation: int):
        super().__init__()
        inner = channels // config.compress
        narrow = WavTokenizerConv1d(channels, inner, config.residual_kernel_size, dilation=dilation)
        self.block = nn.ModuleList([nn.ELU(), narrow, nn.ELU(), WavTokenizerConv1d(inner, channels, 1)])
        self.shortcut = WavTokenizerConv1d(channels, channels, 1)

    def forward(self, hidden_states: torch.Tensor, lengths: torch.Tensor | None = None) -> torch.Tensor:
        return self.shortcut(hidden_states, lengths) + _run_layers(self.block, hidden_states, lengths)


def _run_layers(layers: nn.ModuleList, hidden_states: torch.Tensor, lengths: torch.Tensor | None) -> torch.Tensor:
    """Run ELUs, convolutions and residual blocks. `lengths` (B,) are the valid steps of each row, None if all are."""
    for layer in layers:
        if isinstance(layer, nn.ELU):
            hidden_states = layer(hidden_states)
            continue
        hidden_states = layer(hidden_states, lengths)
        if lengths is not None:
            lengths = -(-lengths // getattr(layer, "stride", 1))
    return hidden_states


LSTMState = tuple[torch.Tensor, torch.Tensor]  # hidden and cell state (layers, B, C)


class WavTokenizerLSTMLayers(nn.RNNBase):
    """nn.LSTM (L, B, C) -> (L, B, C) and its state, under another name: torch.compile refuses to trace that class."""

    def __init__(self, channels: int, num_layers: int):
        super().__init__("LSTM", channels, channels, num_layers)

    def forward(self, inputs: torch.Tensor, state: LSTMState | None = None) -> tuple[torch.Tensor, LSTMState]:
        if state is None:
            zeros = inputs.new_zeros(self.num_layers, inputs.shape[1], self.hidden_size)
            state = (zeros, zeros)
        fast = fast_lstm(self, inputs, state)
        if fast is not None:
            return fast
        weights: list[torch.Tensor] = [weight for layer in self.all_weights for weight in layer]
        output, hidden, cell = torch.lstm(
            inputs, state, weights, self.bias, self.num_layers, 0.0, self.training, False, False
        )
        return output, (hidden, cell)


class WavTokenizerLSTM(nn.Module):
    """(B, C, L) -> (B, C, L): a forward LSTM, its input added to its output; and its state after the last frame."""

    def __init__(self, config: WavTokenizerConfig, channels: int):
        super().__init__()
        self.lstm = WavTokenizerLSTMLayers(channels, config.num_lstm_layers)

    def forward(self, hidden_states: torch.Tensor, state: LSTMState | None = None) -> tuple[torch.Tensor, LSTMState]:
        output, state = self.lstm(hidden_states.permute(2, 0, 1), state)
        return hidden_states + output.permute(1, 2, 0), state


@dataclass
class EncoderState:
    """What the encoder remembers between two chunks of a signal. Small and picklable."""

    audio: torch.Tensor | None = None  # (B, 1, N): samples that later frames depend on
    audio_start: int = 0  # position of the first of them, in frames
    num_lstm_frames: int = 0  # frames that went through the convolutions and the LSTM
    lstm: LSTMState | None = None
    frames: torch.Tensor | None = None  # (B, C, N): frames after the LSTM that the last convolution still needs
    frames_start: int = 0  # position of the first of them
    num_frames: int = 0  # frames returned so far


class WavTokenizerEncoder(nn.Module):
    """SEANet encoder: (B, 1, T) -> (B, D, L).

    All layers but the LSTM look a fixed distance around a frame, and the LSTM runs forward. So a signal that comes in
    chunks (`forward_chunk`) gets the latents of the whole signal.
    """

    def __init__(self, config: WavTokenizerConfig):
        super().__init__()
        channels = config.num_filters
        layers: list[nn.Module] = [WavTokenizerConv1d(config.audio_channels, channels, config.kernel_size)]
        for stride in reversed(config.upsampling_ratios):
            for layer in range(config.num_residual_layers):
                layers.append(WavTokenizerResidualBlock(config, channels, config.dilation_growth_rate**layer))
            layers.append(nn.ELU())
            layers.append(WavTokenizerConv1d(channels, 2 * channels, 2 * stride, stride))
            channels *= 2
        layers.append(WavTokenizerLSTM(config, channels))
        layers.append(nn.ELU())
        last_conv = WavTokenizerConv1d(channels, config.hidden_size, config.last_kernel_size)
        self.layers = nn.ModuleList([*layers, last_conv])
        self.hop_length, self.hidden_size = config.hop_length, config.hidden_size
        self.left_context, self.right_context = self._context()  # frames around a frame that `downsample` looks at
        self.output_context = last_conv.left  # the same to either side, of `project`

    @property
    def downsampling_layers(self) -> nn.ModuleList:
        return self.layers[:-3]

    @property
    def lstm(self) -> WavTokenizerLSTM:
        return self.layers[-3]  # type: ignore[return-value]  # a ModuleList does not know the class of each layer

    @property
    def output_layers(self) -> nn.ModuleList:
        return self.layers[-2:]

    def forward(self, input_values: torch.Tensor, lengths: torch.Tensor | None = None) -> torch.Tensor:
        """Encode whole rows. `lengths` (B,) are the valid samples of each row, None if all are valid."""
        frames, _ = self.lstm(self.downsample(input_values, lengths))
        return self.project(frames, None if lengths is None else -(-lengths // self.hop_length))

    def downsample(
        self, audio: torch.Tensor, lengths: torch.Tensor | None = None, block_size: int | None = None
    ) -> torch.Tensor:
        """Audio (B, 1, T) -> frames (B, C, L): the layers before the LSTM.

        With `block_size`, frames of one clip are computed in blocks of about that many. The result is the same, but
        the hidden states of a block stay in a CPU's cache.
        """
        num_frames = -(-audio.shape[-1] // self.hop_length)
        if block_size is None or lengths is not None or num_frames <= 2 * block_size:
            frames = fast_convolve(self.downsampling_layers, audio) if lengths is None else None
            return _run_layers(self.downsampling_layers, audio, lengths) if frames is None else frames
        blocks = []
        for first, last in chunk_ranges(num_frames, block_size):
            start = max(0, first - self.left_context)
            block = audio[..., start * self.hop_length : (last + self.right_context) * self.hop_length]
            blocks.append(self.downsample(block)[..., first - start : last - start])
        return torch.cat(blocks, dim=-1)

    def project(self, frames: torch.Tensor, lengths: torch.Tensor | None = None) -> torch.Tensor:
        """Frames (B, C, L) -> latents (B, D, L): the layers after the LSTM."""
        latents = fast_convolve(self.output_layers, frames) if lengths is None else None
        return _run_layers(self.output_layers, frames, lengths) if latents is None else latents

    def forward_chunk(
        self,
        audio: torch.Tensor,
        state: EncoderState,
        final: bool,
        lengths: torch.Tensor | None = None,
        block_size: int | None = None,
    ) -> tuple[torch.Tensor, EncoderState]:
        """Encode the next chunk of a signal.

        Each stage computes the frames that are complete now. It also computes the frames around them, so that the
        reflection at the ends of a chunk shows only where the signal itself ends.

        Args:
            audio: (B, 1, N) samples, N >= 0.
            state: `EncoderState()` for the first chunk, then the state that the previous call returned.
            final: Whether the signal ends with this chunk.
            lengths: (B,) valid samples of the whole rows. None if all are valid.
            block_size: As in `downsample`.

        Returns:
            Latents (B, D, n) of the n >= 0 frames that are complete now, and the new state.
        """
        hop = self.hop_length
        audio = audio if state.audio is None else torch.cat([state.audio, audio], dim=-1)
        end = state.audio_start * hop + audio.shape[-1]  # samples seen so far
        first, last = state.num_lstm_frames, -(-end // hop) if final else end // hop - self.right_context
        frames, lstm_state = state.frames, state.lstm
        if last > first:
            own_lengths = None if lengths is None else (lengths - state.audio_start * hop).clamp(1, audio.shape[-1])
            new_frames = self.downsample(audio, own_lengths, block_size)
            new_frames = new_frames[..., first - state.audio_start : last - state.audio_start]
            new_frames, lstm_state = self.lstm(new_frames, lstm_state)
            frames = new_frames if frames is None else torch.cat([frames, new_frames], dim=-1)
        last = max(first, last)
        audio_start = max(0, last - self.left_context)

        done, ready = state.num_frames, last if final else last - self.output_context
        if frames is not None and ready > done:
            valid = None if lengths is None else (-(-lengths // hop) - state.frames_start).clamp(1, frames.shape[-1])
            latents = self.project(frames, valid)[..., done - state.frames_start : ready - state.frames_start]
        else:
            latents = audio.new_zeros(audio.shape[0], self.hidden_size, 0)
        ready = max(done, ready)
        frames_start = max(0, ready - self.output_context)
        return (
            latents,
            EncoderState(
                audio=audio[..., (audio_start - state.audio_start) * hop :].clone(),  # a view would keep all of it
                audio_start=audio_start,
                num_lstm_frames=last,
                lstm=lstm_state,
                frames=None if frames is None else frames[..., frames_start - state.frames_start :].clone(),
                frames_start=frames_start,
                num_frames=ready,
            ),
        )

    def _context(self) -> tuple[int, int]:
        """Frames before and after a frame that `downsample` looks at, including audio reflected at an end."""
        left = right = 0
        rate = 1  # samples per time step of the current layer
        for layer in self.downsampling_layers:
            for conv in layer.modules():
                if isinstance(conv, WavTokenizerConv1d):
                    max_right = conv.right + conv.stride - 1
                    reflected = max(conv.left, max_right) * rate
                    left, right = left + reflected, right + reflected
                    rate *= conv.stride
        return -(-left // self.hop_length), -(-max(right + 1 - self.hop_length, 0) // self.hop_length)


def chunk_ranges(num_frames: int, size: int) -> list[tuple[int, int]]:
    """Split frames into ranges of `size`, the last two equally long: libraries sum short ones in another order."""
    cuts = list(range(0, num_frames, size))
    if len(cuts) > 1:
        cuts[-1] = (cuts[-2] + num_frames) // 2
    return list(zip(cuts, [*cuts[1:], num_frames], strict=True))
