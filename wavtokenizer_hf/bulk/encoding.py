"""
The work itself, the same whatever drives it: sound is read in threads ahead of the model, and encoded in
micro-batches.
"""

import ctypes
import hashlib
import sys
import threading
from collections.abc import Callable, Generator, Iterator, Sequence
from functools import partial
from typing import Any

import numpy as np
import torch

from .. import audio
from ..audio_errors import MAX_CLIP_SECONDS, failure_kind
from ..configuration_wavtokenizer import WavTokenizerConfig
from ..feature_extraction_wavtokenizer import WavTokenizerFeatureExtractor
from ..loading import load_feature_extractor, load_model
from ..modeling_wavtokenizer import WavTokenizerEncoderModel
from .records import Failure, Tokens


WINDOW = 4
"""Micro-batches among which clips are sorted by length; as much sound again is read ahead of them. More waste less
padding and hold more memory."""


def load_encoder(
    model: str,
    revision: str | None = None,
    device: str | torch.device | None = None,
    peak_dbfs: float | str = "model",
) -> tuple[WavTokenizerEncoderModel, WavTokenizerFeatureExtractor]:
    """Loads the encoder of a model, and the feature extractor beside it, which may scale clips to a peak.

    Args:
        model: name on the Hub, folder, or `bundled`.
        revision: branch, tag or commit on the Hub.
        device: default: a GPU if there is one.
        peak_dbfs: Peak level of clips, as in `loading.load_feature_extractor`.

    Raises:
        ValueError: it cannot be loaded, lacks tensors, has codes that 16 bits cannot hold; or there is no such device.
    """
    encoder = load_model(WavTokenizerEncoderModel, model, revision, device or default_device())
    check_codebook_size(encoder.config)
    return encoder, load_feature_extractor(model, revision, encoder.config, peak_dbfs)


def check_codebook_size(config: WavTokenizerConfig) -> None:
    """Raise ValueError if codes would not fit into 16 bits."""
    if config.codebook_size > np.iinfo(np.uint16).max + 1:
        raise ValueError(
            f"Got a codebook of {config.codebook_size} entries, expected at most 65,536: codes are uint16."
        )


def weights_fingerprint(model: torch.nn.Module) -> str:
    """16 hex digits that tell weights apart: an encoder can be trained on while its codebook stays the same."""
    digest = hashlib.sha256()
    for name, tensor in sorted(model.state_dict().items()):
        digest.update(name.encode())
        digest.update(np.ascontiguousarray(tensor.detach().cpu().float().numpy()).data)
    return digest.hexdigest()[:16]


def default_device(rank: int = 0) -> str:
    """The GPU of that number, counted around if there are fewer, or the CPU."""
    return f"cuda:{rank % torch.cuda.device_count()}" if torch.cuda.is_available() else "cpu"


def encode(
    encoder: WavTokenizerEncoderModel,
    feature_extractor: WavTokenizerFeatureExtractor,
    waveforms: Sequence[np.ndarray],
    batch_seconds: float,
) -> list[np.ndarray | Failure]:
    """
    Codes (L,), uint16, of each clip (T,), encoded in micro-batches of clips of like lengths.

    A batch for which a device has too little memory, or that the model refuses, is halved; so the one clip at fault
    fails.
    """
    results: list[np.ndarray | Failure] = [Failure("not encoded")] * len(waveforms)
    budget = batch_seconds * encoder.config.sampling_rate
    batches = micro_batches([len(waveform) for waveform in waveforms], budget)
    while batches:
        batch = batches.pop()
        try:
            codes = _encode_batch(encoder, feature_extractor, [waveforms[index] for index in batch])
        except (RuntimeError, ValueError) as error:
            is_memory = isinstance(error, torch.OutOfMemoryError) or "can't allocate memory" in str(error)  # of a CPU
            if is_memory:
                torch.cuda.empty_cache()
            elif isinstance(error, RuntimeError):
                raise
            if len(batch) == 1 and is_memory:
                results[batch[0]] = Failure(f"The device has too little memory for the clip: {error}", "memory")
            elif len(batch) == 1:
                results[batch[0]] = Failure(
                    " ".join(str(error).split()), "not-finite" if "finite" in str(error) else "error"
                )
            else:
                batches += [batch[: len(batch) // 2], batch[len(batch) // 2 :]]
            continue
        finally:
            if encoder.device.type == "cpu":
                _give_back_memory()
        for index, clip_codes in zip(batch, codes, strict=True):
            results[index] = clip_codes
    return results


def _give_back_memory() -> None:
    """
    Glibc keeps what is freed, and clips of ever new lengths leave ever more holes in it: gigabytes after some hundred.
    """
    if sys.platform == "linux" and hasattr(libc := ctypes.CDLL(None), "malloc_trim"):
        libc.malloc_trim(0)


def micro_batches(lengths: Sequence[int], budget: float) -> list[list[int]]:
    """
    Return the indices of clips, sorted by length and cut so that a batch, padded to its longest clip, stays within the
    budget.

    A clip that is longer than the budget is a batch by itself.
    """
    batches: list[list[int]] = []
    for index in sorted(range(len(lengths)), key=lambda index: -lengths[index]):
        if batches and (len(batches[-1]) + 1) * lengths[batches[-1][0]] <= budget:  # the first is the longest
            batches[-1].append(index)
        else:
            batches.append([index])
    return batches


@torch.inference_mode()
def _encode_batch(encoder: Any, feature_extractor: Any, waveforms: list[np.ndarray]) -> list[np.ndarray]:
    inputs = feature_extractor(waveforms, sampling_rate=encoder.config.sampling_rate, return_tensors="pt")
    encoded = encoder.encode(**inputs.to(encoder.device))
    codes, mask = encoded.audio_codes[:, 0].cpu().numpy(), encoded.audio_codes_mask[:, 0].bool().cpu().numpy()
    return [row[real].astype(np.uint16) for row, real in zip(codes, mask, strict=True)]


def tokenize_clips(
    encoder: WavTokenizerEncoderModel,
    feature_extractor: WavTokenizerFeatureExtractor,
    read: Sequence[Callable[[], Any]],
    batch_seconds: float,
    num_readers: int,
    channel: str | int = "mean",
    max_clip_seconds: float = MAX_CLIP_SECONDS,
) -> Generator[list[Tokens | Failure], None, None]:
    """
    Codes of clips, in the order of `read`, a window of them at a time.

    Args:
        read: gives the sound of each clip, as `audio.load_clip` takes it. Whatever it raises is the reason of that
            clip's failure, but for a package that is missing.
        batch_seconds: of sound in a micro-batch.
        num_readers: threads that read, decode and resample ahead of the model.
        channel: of clips that have several, as `audio.load` takes it.
        max_clip_seconds: a longer clip fails.
    """
    sampling_rate = encoder.config.sampling_rate
    limit = WINDOW * batch_seconds * sampling_rate

    def read_one(get: Callable[[], Any]) -> audio.AudioClip | Failure:
        try:
            return audio.load_clip(get(), sampling_rate, channel, max_clip_seconds)
        except ImportError:
            raise
        except (ValueError, OSError) as error:
            return Failure(" ".join(str(error).split()), failure_kind(error))
        except MemoryError as error:  # a damaged header may promise terabytes
            return Failure(f"Too little memory for the clip, or its header is damaged: {error}", "memory")
        except Exception as error:
            return Failure(" ".join(f"{type(error).__name__}: {error}".split()))

    window, size = [], 0
    with OrderedPrefetcher(read_one, read, limit, num_readers) as sounds:
        for sound in sounds:
            window.append(sound)
            size += _size(sound)
            if size >= limit:
                yield _encode_window(encoder, feature_extractor, window, batch_seconds)
                window, size = [], 0
    if window:
        yield _encode_window(encoder, feature_extractor, window, batch_seconds)


def _encode_window(encoder: Any, feature_extractor: Any, window: Any, batch_seconds: float) -> list[Tokens | Failure]:
    good = [sound for sound in window if isinstance(sound, audio.AudioClip)]
    codes = iter(encode(encoder, feature_extractor, [sound.audio for sound in good], batch_seconds))
    results = []
    for sound in window:
        result = next(codes) if isinstance(sound, audio.AudioClip) else sound
        if not isinstance(result, Failure):
            result = Tokens(
                result, len(sound.audio), sound.source_sampling_rate, sound.source_channels, tuple(sound.warnings)
            )
        results.append(result)
    return results


def _size(sound: audio.AudioClip | Failure) -> int:
    return 0 if isinstance(sound, Failure) else len(sound.audio)


class OrderedPrefetcher:
    """Iterates over `work(job)` of each job, in order; threads compute it ahead, until `limit` samples wait to be
    taken.

    Decoding and resampling leave Python's lock to others, so threads do.
    """

    def __init__(self, work: Callable, jobs: Sequence, limit: float, num_threads: int):
        self._work, self._jobs, self._limit = work, jobs, limit
        self._changed = threading.Condition()
        self._next, self._waiting, self._closed = 0, 0, False
        self._results: dict[int, Any] = {}
        self._threads = [threading.Thread(target=self._run, daemon=True) for _ in range(num_threads)]

    def __enter__(self) -> "OrderedPrefetcher":
        for thread in self._threads:
            thread.start()
        return self

    def __exit__(self, *exception: object) -> None:
        with self._changed:
            self._closed = True
            self._changed.notify_all()
        for thread in self._threads:
            thread.join()

    def _run(self) -> None:
        while True:
            with self._changed:
                # jobs are taken in order, so what the reader waits for is never behind what waits for the reader
                self._changed.wait_for(lambda: self._waiting < self._limit or self._closed)
                if self._closed or self._next == len(self._jobs):
                    return
                index, self._next = self._next, self._next + 1
            try:
                result = self._work(self._jobs[index])
            except BaseException as error:  # goes to whoever takes the result
                result = error
            with self._changed:
                self._results[index] = result
                self._waiting += 0 if isinstance(result, BaseException) else _size(result)
                self._changed.notify_all()

    def __iter__(self) -> Iterator:
        for index in range(len(self._jobs)):
            with self._changed:
                self._changed.wait_for(partial(self._results.__contains__, index))
                result = self._results.pop(index)
                self._waiting -= 0 if isinstance(result, BaseException) else _size(result)
                self._changed.notify_all()
            if isinstance(result, BaseException):
                raise result
            yield result
