"""Decoding in windows: codes -> audio in constant memory, also while the codes are still being generated.

Shape letters: B rows of a batch, L codes, hop samples per code.

This file is copied unchanged into every Hub repository that we write. It imports the standard library, torch and its
siblings, and nothing else.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch

from .configuration_wavtokenizer import WavTokenizerConfig
from .modeling_wavtokenizer_padding import PaddedBatch


@dataclass
class DecoderState:
    """What windowed decoding remembers between two chunks of codes. Small and picklable."""

    audio_codes: torch.Tensor | None = None  # (B, 1, n): codes of the last window, then those of the next one so far
    next_window_start: int = 0  # where in them the next window starts
    overlap_tail: torch.Tensor | None = None  # (B, 1, n): audio of the last window from there on


def window_frames(config: WavTokenizerConfig, window_seconds: float, overlap_seconds: float) -> tuple[int, int]:
    """Return the length of a window and of an overlap in frames. Raises ValueError if they do not fit each other."""
    frame_rate = config.frame_rate
    if not (0 <= 2 * overlap_seconds <= window_seconds < math.inf and round(window_seconds * frame_rate) > 0):
        raise ValueError(
            f"Got window_seconds={window_seconds} and overlap_seconds={overlap_seconds}, expected a window of at "
            f"least one frame ({1 / frame_rate:.4f} s) and twice the overlap. Use a longer window or a shorter "
            "overlap."
        )
    size = round(window_seconds * frame_rate)
    return size, min(round(overlap_seconds * frame_rate), size // 2)


def decode_windows(
    decode: Callable, audio_codes: torch.Tensor, batch: PaddedBatch | None, window: tuple[int, int]
) -> torch.Tensor:
    """Decode codes (B, 1, L), rows aligned to the left, in windows -> audio (B, 1, L * hop).

    Rows of a padded batch go one by one, since the last window ends where the row ends. Arguments: see `decode_chunk`.
    """
    if batch is None:
        return decode_chunk(decode, audio_codes, DecoderState(), True, window)[0]
    rows = [
        decode_windows(decode, audio_codes[row : row + 1, :, :length], None, window)
        for row, length in enumerate(batch.lengths.tolist())
    ]
    hop = rows[0].shape[-1] // int(batch.lengths[0])
    size = audio_codes.shape[-1] * hop
    return torch.cat([torch.nn.functional.pad(row, (0, size - row.shape[-1])) for row in rows])


def decode_chunk(
    decode: Callable, audio_codes: torch.Tensor, state: DecoderState, final: bool, window: tuple[int, int]
) -> tuple[torch.Tensor, DecoderState]:
    """Decode the next chunk of codes in windows.

    Args:
        decode: Function from codes (B, 1, n) to audio (B, 1, n * hop).
        audio_codes: (B, 1, N) next codes, N >= 0.
        state: `DecoderState()` for the first chunk, then the state that the previous call returned.
        final: Whether the codes end with this chunk.
        window: Length of a window and overlap of two windows, in frames.

    Returns:
        Audio (B, 1, n * hop) of the n >= 0 frames that are complete now, and the new state.
    """
    size, overlap = window
    codes, start, tail = audio_codes, state.next_window_start, state.overlap_tail
    if state.audio_codes is not None:
        codes = torch.cat([state.audio_codes, codes], dim=-1)
    chunks = [torch.zeros(len(codes), 1, 0, dtype=torch.float32, device=codes.device)]
    while codes.shape[-1] - start >= size:
        codes, start = codes[..., start:], size - overlap
        audio_values = decode(codes[..., :size])
        hop = audio_values.shape[-1] // size
        chunks.append(_join(tail, audio_values))
        chunks[-1], tail = chunks[-1].tensor_split([start * hop], dim=-1)
    if not final:
        return torch.cat(chunks, dim=-1), DecoderState(codes.clone(), start, tail)
    if codes.shape[-1] - start > (0 if tail is None else overlap):
        last = codes[..., -size:]  # as long as the other windows, so it may begin before `start`
        audio_values = decode(last)
        hop = audio_values.shape[-1] // last.shape[-1]
        tail = _join(tail, audio_values[..., (last.shape[-1] - codes.shape[-1] + start) * hop :])
    return torch.cat([*chunks, *([] if tail is None else [tail])], dim=-1), DecoderState()


def _join(tail: torch.Tensor | None, audio_values: torch.Tensor) -> torch.Tensor:
    """Fade the overlap of the last window into the start of the next one, both (B, 1, n)."""
    if tail is None:
        return audio_values
    overlap = tail.shape[-1]
    return torch.cat([_cross_fade(tail, audio_values[..., :overlap]), audio_values[..., overlap:]], dim=-1)


def _cross_fade(old: torch.Tensor, new: torch.Tensor) -> torch.Tensor:
    """Fade from `old` to `new` (B, 1, n) over the middle half. At its ends a window lacks the frames beyond them."""
    steps = torch.arange(old.shape[-1], dtype=torch.float32, device=old.device) + 0.5
    return old.lerp(new, (2 * steps / old.shape[-1] - 0.5).clamp(0, 1))
