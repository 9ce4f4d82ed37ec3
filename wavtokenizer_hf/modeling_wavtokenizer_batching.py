"""How WavTokenizer encodes the rows of a batch: all together, one after the other, or one after the other up to the
LSTM.

The codes do not depend on it. Rows that are computed together get float32 sums in another order than alone, and that
can change the code of a frame which is nearly as near to another entry of the codebook (a near tie). On a CPU such
rows are encoded again, alone. On a GPU they are not: benchmarks/README.md says how often a code differs there.

Shape letters: B rows of a batch, T samples, L frames, D = hidden_size, K = codebook_size.

This file is copied unchanged into every Hub repository that we write. It imports the standard library, torch and its
siblings, and nothing else.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import torch
import torch.nn.functional as F

from .modeling_wavtokenizer_encoder import EncoderState, WavTokenizerEncoder, WavTokenizerLSTM, chunk_ranges
from .modeling_wavtokenizer_padding import valid_mask
from .modeling_wavtokenizer_precision import full_float32


class EncoderModel(Protocol):
    """What the functions below need of a WavTokenizerEncoderModel, whose file imports this one."""

    config: Any
    encoder: WavTokenizerEncoder
    quantizer: Any


@dataclass(frozen=True)
class EncodePolicy:
    """Which rows are computed together, and in what chunks. Measured by benchmarks/batches.py and long_audio.py."""

    together_seconds: float  # rows up to this length go through all layers together (infinity: without a recheck)
    shared_lstm_seconds: float  # longer rows up to this length share the steps of the LSTM; the rest go one by one
    block_seconds: float | None  # length of the blocks in which one clip goes through the convolutions
    chunk_seconds: float = 60.0  # longer rows are encoded in chunks of this length, in constant memory

    def block_size(self, config: Any) -> int | None:
        """Frames of a block, None for no blocks."""
        return None if self.block_seconds is None else math.ceil(self.block_seconds * config.frame_rate)


# A CPU's caches do not hold the hidden states of more than about half a second of several rows, nor of 6 s of one.
CPU_POLICY = EncodePolicy(together_seconds=0.5, shared_lstm_seconds=30, block_seconds=3)
TOGETHER_POLICY = EncodePolicy(together_seconds=math.inf, shared_lstm_seconds=0, block_seconds=None)


def default_policy(audio: torch.Tensor) -> EncodePolicy:
    """Return `CPU_POLICY` on a CPU, outside of compiled graphs, else `TOGETHER_POLICY`."""
    return CPU_POLICY if audio.device.type == "cpu" and not torch.compiler.is_compiling() else TOGETHER_POLICY


ROWS_PER_LSTM = 8  # more rows do not make a step of the LSTM cheaper per row

# Bounds on |latents together - latents alone| / |latents alone|. The largest measured were 1.4e-6 and 3e-7
# (benchmarks/README.md).
MASKS_TOLERANCE = 1e-5
SHARED_LSTM_TOLERANCE = 1e-6
# Bound on the change of two scores' difference by rounding, over |latents| * |entry|. The largest measured was 5e-7.
SCORE_TOLERANCE = 1e-6


def encode_rows(
    model: EncoderModel,
    audio: torch.Tensor,
    lengths: torch.Tensor | None,
    output_latents: bool = False,
    chunk_seconds: float | None = None,
    policy: EncodePolicy | None = None,
) -> tuple[torch.Tensor | None, torch.Tensor]:
    """Encode rows that are aligned to the left.

    Args:
        model: A WavTokenizerEncoderModel.
        audio: (B, 1, T) float32.
        lengths: (B,) valid samples of each row. None if all are valid.
        output_latents: Whether to return latents.
        chunk_seconds: Length of chunks. Defaults to the policy's.
        policy: Defaults to `default_policy(audio)`.

    Returns:
        Latents (B, D, L), or None, and codes (B, 1, L). Both are 0 after the end of a row.
    """
    policy = default_policy(audio) if policy is None else policy
    seconds = audio.shape[-1] / model.config.sampling_rate
    if policy.together_seconds == math.inf or (lengths is None and audio.shape[0] == 1):
        return _encode_together(model, audio, lengths, output_latents, chunk_seconds, policy)
    if seconds <= policy.together_seconds:
        return _encode_together_and_recheck(model, audio, lengths, output_latents, chunk_seconds, policy)

    num_frames = -(-audio.shape[-1] // model.config.hop_length)
    codes = torch.zeros(len(audio), 1, num_frames, dtype=torch.long, device=audio.device)
    latents = audio.new_zeros(len(audio), model.config.hidden_size, num_frames) if output_latents else None
    row_lengths = [audio.shape[-1]] * len(audio) if lengths is None else lengths.tolist()
    order = sorted(range(len(audio)), key=row_lengths.__getitem__)
    if chunk_seconds is None and seconds <= policy.shared_lstm_seconds:
        groups = [order[start : start + ROWS_PER_LSTM] for start in range(0, len(order), ROWS_PER_LSTM)]
    else:
        groups = [[row] for row in order]
    for group in groups:
        clips = [audio[row : row + 1, :, : row_lengths[row]] for row in group]
        encoded: Sequence[tuple[torch.Tensor | None, torch.Tensor]]
        if len(group) == 1:
            encoded = [_encode_together(model, clips[0], None, output_latents, chunk_seconds, policy)]
        else:
            encoded = _encode_with_shared_lstm(model, clips, policy)
        for row, (clip_latents, clip_codes) in zip(group, encoded, strict=True):
            codes[row, :, : clip_codes.shape[-1]] = clip_codes[0]
            if latents is not None and clip_latents is not None:
                latents[row, :, : clip_codes.shape[-1]] = clip_latents[0]
    return latents, codes


def encode_chunk(
    model: EncoderModel,
    audio: torch.Tensor,
    state: EncoderState,
    final: bool,
    lengths: torch.Tensor | None = None,
    policy: EncodePolicy | None = None,
) -> tuple[torch.Tensor, torch.Tensor, EncoderState]:
    """Encode the next chunk of a signal.

    Args:
        model: A WavTokenizerEncoderModel.
        audio: (B, 1, N) next samples, N >= 0, float32.
        state: `EncoderState()` for the first chunk, then the state that the previous call returned.
        final: Whether the signal ends with this chunk.
        lengths: (B,) valid samples of the whole rows. None if all are valid.
        policy: Defaults to `default_policy(audio)`.

    Returns:
        Latents (B, D, n) and codes (B, 1, n) of the n >= 0 frames that are complete now, and the new state.
    """
    policy = default_policy(audio) if policy is None else policy
    with full_float32(audio.device):
        latents, state = model.encoder.forward_chunk(audio, state, final, lengths, policy.block_size(model.config))
        return latents, model.quantizer.encode(latents), state


def check_latents(latents_sum: torch.Tensor, audio: torch.Tensor) -> None:
    """Raise ValueError if a sum of latents is not finite, since their codes would mean nothing."""
    if not torch.compiler.is_compiling() and not latents_sum.isfinite():
        raise ValueError(
            "The encoder gave NaN or infinite latents. The largest sample of the audio is "
            f"{audio.abs().max().item():.3g}, expected about 1: scale the audio. If its level is right, the weights "
            "of the model are damaged: load them again."
        )


def _encode_together(
    model: EncoderModel,
    audio: torch.Tensor,
    lengths: torch.Tensor | None,
    output_latents: bool,
    chunk_seconds: float | None,
    policy: EncodePolicy,
) -> tuple[torch.Tensor | None, torch.Tensor]:
    """Encode all rows at once, in chunks of all rows."""
    hop = model.config.hop_length
    num_frames = -(-audio.shape[-1] // hop)
    # Preallocate the outputs: mixing long- and short-lived allocations fragments the heap.
    codes = torch.empty(audio.shape[0], 1, num_frames, dtype=torch.long, device=audio.device)
    latents = audio.new_empty(audio.shape[0], model.config.hidden_size, num_frames) if output_latents else None
    ranges = chunk_ranges(num_frames, _chunk_size(model, chunk_seconds, num_frames, policy))
    state, position, total = EncoderState(), 0, audio.new_zeros(())
    for first, last in ranges:
        chunk_latents, chunk_codes, state = encode_chunk(
            model, audio[..., first * hop : last * hop], state, last == num_frames, lengths, policy
        )
        codes[..., position : state.num_frames] = chunk_codes
        if latents is not None:
            latents[..., position : state.num_frames] = chunk_latents
        total = total + chunk_latents.detach().sum()
        position = state.num_frames
    check_latents(total, audio)
    if lengths is not None:
        valid = valid_mask(-(-lengths // hop), num_frames)
        codes = codes * valid
        latents = None if latents is None else latents * valid
    return latents, codes


def _encode_together_and_recheck(
    model: EncoderModel,
    audio: torch.Tensor,
    lengths: torch.Tensor | None,
    output_latents: bool,
    chunk_seconds: float | None,
    policy: EncodePolicy,
) -> tuple[torch.Tensor | None, torch.Tensor]:
    """Encode all rows at once, and rows with near ties again, alone."""
    latents, codes = _encode_together(model, audio, lengths, True, chunk_seconds, policy)
    assert latents is not None
    hop = model.config.hop_length
    row_lengths = [audio.shape[-1]] * len(audio) if lengths is None else lengths.tolist()
    for row, length in enumerate(row_lengths):
        num_frames = -(-length // hop)
        if clear_codes(model, latents[row : row + 1, :, :num_frames], MASKS_TOLERANCE) is None:
            clip = audio[row : row + 1, :, :length]
            alone, codes[row, :, :num_frames] = _encode_together(model, clip, None, True, chunk_seconds, policy)
            assert alone is not None
            latents[row, :, :num_frames] = alone[0]
    return latents if output_latents else None, codes


def _encode_with_shared_lstm(
    model: EncoderModel, clips: list[torch.Tensor], policy: EncodePolicy
) -> list[tuple[torch.Tensor, torch.Tensor]]:
    """
    Encode clips (1, 1, T_b) of rising length: the steps of the LSTM for all clips, the other layers clip by clip.
    """
    encoder, block_size = model.encoder, policy.block_size(model.config)
    encoded = []
    with full_float32(clips[0].device):
        frames = [encoder.downsample(clip, block_size=block_size) for clip in clips]
        for clip, own_frames, shared in zip(clips, frames, _shared_lstm(encoder.lstm, frames), strict=True):
            latents = encoder.project(shared)
            check_latents(latents.sum(), clip)
            codes = clear_codes(model, latents, SHARED_LSTM_TOLERANCE)
            if codes is None:
                latents = encoder.project(encoder.lstm(own_frames)[0])
                codes = model.quantizer.encode(latents)
            encoded.append((latents, codes))
    return encoded


def _shared_lstm(lstm: WavTokenizerLSTM, frames: list[torch.Tensor]) -> list[torch.Tensor]:
    """Run the LSTM over clips (1, C, L_b) of rising length, one step of all clips at a time."""
    lengths = [clip.shape[-1] for clip in frames]
    batch = torch.cat([F.pad(clip, (0, lengths[-1] - clip.shape[-1])) for clip in frames])
    outputs, state, start = [], None, 0
    for end in sorted(set(lengths)):
        num_ended = sum(length <= start for length in lengths)
        if state is not None:
            state = tuple(values[:, -(len(lengths) - num_ended) :] for values in state)
        output, state = lstm(batch[num_ended:, :, start:end], state)
        outputs.append(F.pad(output, (0, 0, 0, 0, num_ended, 0)))
        start = end
    joined = torch.cat(outputs, dim=-1)
    return [joined[row : row + 1, :, :length] for row, length in enumerate(lengths)]


def clear_codes(model: EncoderModel, latents: torch.Tensor, tolerance: float) -> torch.Tensor | None:
    """Return the codes (B, 1, L) of latents (B, D, L), or None if one is a near tie.

    A near tie might be another code if the latents moved by `tolerance` of their length.
    """
    entries = model.quantizer.codebook.embed
    with full_float32(latents.device):
        scores, nearest = model.quantizer.scores(latents).topk(2)  # (B, L, 2)
        first, second = entries[nearest[..., 0]], entries[nearest[..., 1]]
        length = torch.linalg.vector_norm(latents, dim=1)
        possible_change = length * (tolerance * (first - second).norm(dim=-1) + SCORE_TOLERANCE * first.norm(dim=-1))
        clear = (scores[..., 0] - scores[..., 1] >= possible_change).all()
    return nearest[..., 0][:, None] if clear else None


def _chunk_size(model: EncoderModel, chunk_seconds: float | None, num_frames: int, policy: EncodePolicy) -> int:
    """Frames of a chunk, so that it is no longer than `chunk_seconds` with the frames around it."""
    if chunk_seconds is None:
        if torch.compiler.is_compiling() or num_frames <= policy.chunk_seconds * model.config.frame_rate:
            return num_frames
        chunk_seconds = policy.chunk_seconds
    if not chunk_seconds > 0:
        raise ValueError(f"Got chunk_seconds={chunk_seconds}, expected more than 0, or None for automatic chunks.")
    context = model.encoder.left_context + model.encoder.right_context
    return max(1, math.ceil(chunk_seconds * model.config.frame_rate) - context)
