"""Encode and decode audio of any length in one pass, in constant memory.

Audio and codes are iterators of chunks: audio (n,) float32 at the model's rate, codes (n,) int64. So a file, a pipe
and a live source are one case, and chained steps work chunk by chunk.
"""

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from itertools import chain
from typing import TYPE_CHECKING, TypeAlias

import numpy as np
import torch

from ..audio_errors import TruncatedAudioError
from ..long_audio import DecodeStream, EncodeStream


if TYPE_CHECKING:
    from .. import WavTokenizerEncoderModel, WavTokenizerModel
    from ..export import WavTokenizerOnnx
    from ..export.wavtokenizer_onnx import DecodeStream as OnnxDecodeStream

Encoder: TypeAlias = "WavTokenizerEncoderModel | WavTokenizerModel | WavTokenizerOnnx"
Codec: TypeAlias = "WavTokenizerModel | WavTokenizerOnnx"
WHOLE_SECONDS = 300
"""Longest clip that is encoded or decoded whole, as by `model.encode` and `model.decode`."""


@dataclass
class Counts:
    """Counts of one file or stream, complete when its last chunk was yielded.

    Args:
        num_samples: Number of audio samples.
        num_tokens: Number of codes.
        window_seconds, overlap_seconds: Length and overlap of the windows in which the codes were decoded; None if
            they were decoded whole.
        truncation: Error of audio that ended early.
        warnings: Kinds of the warnings about the audio.
    """

    num_samples: int = 0
    num_tokens: int = 0
    window_seconds: float | None = None
    overlap_seconds: float | None = None
    truncation: TruncatedAudioError | None = None
    warnings: list[str] = field(default_factory=list)

    def count_audio(self, blocks: Iterable[np.ndarray], report: Callable[[int], None]) -> Iterator[np.ndarray]:
        """Pass audio on, and report the length of each block.

        If audio ends early after at least one sample, store the error in `truncation` instead of raising it.
        """
        try:
            for block in blocks:
                self.num_samples += len(block)
                yield block
                report(len(block))
        except TruncatedAudioError as error:
            if self.num_samples == 0:
                raise
            self.truncation = error

    def count_codes(self, chunks: Iterable[np.ndarray], report: Callable[[int], None]) -> Iterator[np.ndarray]:
        """Pass codes on, and report the length of each chunk."""
        for chunk in chunks:
            self.num_tokens += len(chunk)
            yield chunk
            report(len(chunk))


@dataclass
class Windows:
    """How long audio is decoded, see `DecodeStream`.

    Args:
        seconds, overlap_seconds: Length and overlap of the windows.
        above_seconds: Audio up to this length is decoded whole.
    """

    seconds: float
    overlap_seconds: float
    above_seconds: float


def iter_codes(
    model: Encoder, blocks: Iterable[np.ndarray], whole_seconds: float = WHOLE_SECONDS
) -> Iterator[np.ndarray]:
    """Yield the codes of audio. Audio longer than `whole_seconds` is encoded as it arrives, with the same codes.

    Raises ValueError if there is no audio.
    """
    head, blocks, is_all = _split_head(blocks, whole_seconds * model.config.sampling_rate)
    if not head:
        raise ValueError("Got no samples, expected at least one.")
    if is_all:
        yield _encode(model, np.concatenate(head))
        return
    stream = EncodeStream(model) if isinstance(model, torch.nn.Module) else model.encode_stream()
    for block in chain(head, blocks):
        codes = stream.push(block)
        if len(codes) > 0:
            yield np.asarray(codes)
    yield np.asarray(stream.flush())


def iter_audio(model: Codec, codes: Iterable[np.ndarray], windows: Windows, counts: Counts) -> Iterator[np.ndarray]:
    """Yield the audio of codes, `hop_length` samples for each. Stores the windows in `counts` if any are used.

    Raises ValueError if there are no codes.
    """
    head, codes, is_all = _split_head(codes, windows.above_seconds * model.config.frame_rate)
    if not head:
        raise ValueError("Got no codes, expected at least one.")
    if is_all:
        yield _decode(model, np.concatenate(head).astype(np.int64))
        return
    stream = decode_stream(model, windows.seconds, windows.overlap_seconds)
    num_tokens = 0
    for chunk in chain(head, codes):
        num_tokens += len(chunk)
        if num_tokens > stream.delay:
            counts.window_seconds, counts.overlap_seconds = windows.seconds, windows.overlap_seconds
        yield np.asarray(stream.push(chunk.astype(np.int64)))
    yield np.asarray(stream.flush())


def decode_stream(model: Codec, seconds: float, overlap_seconds: float) -> "DecodeStream | OnnxDecodeStream":
    """Return a stream that decodes in windows. Raises ValueError if the window or the overlap is invalid."""
    if isinstance(model, torch.nn.Module):
        return DecodeStream(model, seconds, overlap_seconds)
    return model.decode_stream(seconds, overlap_seconds)


@torch.inference_mode()
def _encode(model: Encoder, audio: np.ndarray) -> np.ndarray:
    """Encode audio (T,) -> codes (L,)."""
    if not isinstance(model, torch.nn.Module):
        return model.encode(audio[None, None]).audio_codes[0, 0]
    return model.encode(torch.from_numpy(audio)[None, None].to(model.device)).audio_codes[0, 0].cpu().numpy()


@torch.inference_mode()
def _decode(model: Codec, audio_codes: np.ndarray) -> np.ndarray:
    """Decode codes (L,) -> audio (L * hop_length,)."""
    if not isinstance(model, torch.nn.Module):
        return model.decode(audio_codes[None, None]).audio_values[0, 0]
    return model.decode(torch.from_numpy(audio_codes)[None, None].to(model.device)).audio_values[0, 0].cpu().numpy()


def cut_to_length(
    blocks: Iterable[np.ndarray], num_samples: Callable[[], int], hop_length: int
) -> Iterator[np.ndarray]:
    """
    Yield the first `num_samples()` samples of decoded audio, whose end lies within its last `hop_length` samples.

    `num_samples` is called after the last block, because a stream has no known length before.
    """
    num_yielded, held_back = 0, np.zeros(0, np.float32)
    for block in blocks:
        held_back = np.concatenate([held_back, block])
        ready = held_back[: max(0, len(held_back) - hop_length + 1)]
        if len(ready) > 0:
            num_yielded, held_back = num_yielded + len(ready), held_back[len(ready) :]
            yield ready
    if num_samples() > num_yielded:
        yield held_back[: num_samples() - num_yielded]


def _split_head(chunks: Iterable[np.ndarray], size: float) -> tuple[list[np.ndarray], Iterator[np.ndarray], bool]:
    """Return chunks until they exceed `size` numbers in all, the remaining ones, and whether none can remain."""
    head, length, remaining = [], 0, iter(chunks)
    for chunk in remaining:
        head.append(chunk)
        length += len(chunk)
        if length > size:
            return head, remaining, False
    return head, remaining, True
