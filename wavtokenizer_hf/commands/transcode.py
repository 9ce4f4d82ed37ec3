"""Audio -> codes -> audio in one pass, of any length, in memory that does not grow with it: what the command line
does.

Everything is an iterator of pieces: audio (n,) float32 arrays at the model's rate, codes (n,) int64 arrays. So a file,
a pipe and a live source are one case, and what is chained together runs together.
"""

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from itertools import chain

import numpy as np
import torch

from ..audio_errors import TruncatedAudioError
from ..long_audio import DecodeStream, EncodeStream


WHOLE_SECONDS = 300
"""A clip up to this length is taken in one piece, as by `model.encode` and `model.decode`."""


@dataclass
class Counts:
    """What has gone through, filled in on the way; complete when the last piece is out.

    Args:
        num_samples: of audio.
        num_tokens: codes.
        window_seconds, overlap_seconds: of the windows that the codes were decoded in; None if they were decoded
            whole.
        cut_off: set if the audio ended before its time.
        warnings: kinds of what is strange about the audio.
    """

    num_samples: int = 0
    num_tokens: int = 0
    window_seconds: float | None = None
    overlap_seconds: float | None = None
    cut_off: TruncatedAudioError | None = None
    warnings: list[str] = field(default_factory=list)

    def count_audio(self, blocks: Iterable[np.ndarray], report: Callable[[int], None]) -> Iterator[np.ndarray]:
        """
        Pass audio on, and report its length. An early end of it is kept in `cut_off`: what came is still worth its
        codes.
        """
        try:
            for block in blocks:
                self.num_samples += len(block)
                yield block
                report(len(block))
        except TruncatedAudioError as error:
            if self.num_samples == 0:
                raise
            self.cut_off = error

    def count_codes(self, pieces: Iterable[np.ndarray], report: Callable[[int], None]) -> Iterator[np.ndarray]:
        """Pass codes on, and report their number."""
        for piece in pieces:
            self.num_tokens += len(piece)
            yield piece
            report(len(piece))


@dataclass
class Windows:
    """How to decode what is long: see `DecodeStream`.

    Args:
        seconds, overlap_seconds: of a window.
        above_seconds: what is no longer than this is decoded whole.
    """

    seconds: float
    overlap_seconds: float
    above_seconds: float


def iter_codes(model, blocks: Iterable[np.ndarray], whole_seconds: float = WHOLE_SECONDS) -> Iterator[np.ndarray]:
    """Audio -> its codes. Audio longer than `whole_seconds` is encoded as it comes, with the same codes.

    Raises ValueError if there is no audio.
    """
    head, blocks, is_all = _begin(blocks, whole_seconds * model.config.sampling_rate)
    if not head:
        raise ValueError("Got no samples, expected at least one.")
    if is_all:
        yield _encode(model, np.concatenate(head))
        return
    stream = EncodeStream(model) if _is_torch(model) else model.encode_stream()
    for block in chain(head, blocks):
        codes = stream.push(block)
        if len(codes) > 0:
            yield np.asarray(codes)
    yield np.asarray(stream.flush())


def iter_audio(model, codes: Iterable[np.ndarray], windows: Windows, counts: Counts) -> Iterator[np.ndarray]:
    """Codes -> their audio, `hop_length` samples for each. Sets the windows in `counts` if there are any.

    Raises ValueError if there are no codes.
    """
    head, codes, is_all = _begin(codes, windows.above_seconds * model.config.frame_rate)
    if not head:
        raise ValueError("Got no codes, expected at least one.")
    if is_all:
        yield _decode(model, np.concatenate(head).astype(np.int64))
        return
    stream = decode_stream(model, windows.seconds, windows.overlap_seconds)
    num_tokens = 0
    for piece in chain(head, codes):
        num_tokens += len(piece)
        if num_tokens > stream.delay:
            counts.window_seconds, counts.overlap_seconds = windows.seconds, windows.overlap_seconds
        yield np.asarray(stream.push(piece.astype(np.int64)))
    yield np.asarray(stream.flush())


def _is_torch(model) -> bool:
    """Whether the model is one of torch, and not an exported one, which takes and gives numpy arrays."""
    return isinstance(model, torch.nn.Module)


def decode_stream(model, seconds: float, overlap_seconds: float):
    """The stream of either kind of model. Raises ValueError for windows that are none."""
    stream = DecodeStream if _is_torch(model) else type(model).decode_stream
    return stream(model, seconds, overlap_seconds)


@torch.inference_mode()
def _encode(model, audio: np.ndarray) -> np.ndarray:
    """Audio (T,) -> codes (L,)."""
    if not _is_torch(model):
        return model.encode(audio[None, None]).audio_codes[0, 0]
    return model.encode(torch.from_numpy(audio)[None, None].to(model.device)).audio_codes[0, 0].cpu().numpy()


@torch.inference_mode()
def _decode(model, audio_codes: np.ndarray) -> np.ndarray:
    """Codes (L,) -> audio (L * hop,)."""
    if not _is_torch(model):
        return model.decode(audio_codes[None, None]).audio_values[0, 0]
    return model.decode(torch.from_numpy(audio_codes)[None, None].to(model.device)).audio_values[0, 0].cpu().numpy()


def cut_to_length(
    blocks: Iterable[np.ndarray], num_samples: Callable[[], int], hop_length: int
) -> Iterator[np.ndarray]:
    """
    Audio of whole codes -> its first `num_samples()` samples, which lie in the last code and may be known at the end
    only.
    """
    num_given, held = 0, np.zeros(0, np.float32)
    for block in blocks:
        held = np.concatenate([held, block])
        ready = held[: max(0, len(held) - hop_length + 1)]
        if len(ready) > 0:
            num_given, held = num_given + len(ready), held[len(ready) :]
            yield ready
    if num_samples() > num_given:
        yield held[: num_samples() - num_given]


def _begin(pieces: Iterable[np.ndarray], size: float) -> tuple[list[np.ndarray], Iterator[np.ndarray], bool]:
    """The first pieces up to more than `size` numbers, the rest, and whether there is none."""
    head, length, pieces = [], 0, iter(pieces)
    for piece in pieces:
        head.append(piece)
        length += len(piece)
        if length > size:
            return head, pieces, False
    return head, pieces, True
