"""Encode clips in one process: threads read audio ahead of the model, which encodes it in micro-batches."""

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


BATCHES_PER_WINDOW = 4
"""
Micro-batches per window, within which clips are sorted by length. The threads read one more window ahead. A larger
number needs less padding and more memory.
"""


def load_encoder(
    model: str,
    revision: str | None = None,
    device: str | torch.device | None = None,
    peak_dbfs: float | str = "model",
) -> tuple[WavTokenizerEncoderModel, WavTokenizerFeatureExtractor]:
    """
    Load the encoder of a model and its feature extractor, which may scale clips to a peak.

    Args:
        model: Name on the Hub, folder, or `bundled`.
        revision: Branch, tag or commit on the Hub.
        device: Device of the encoder. Defaults to the first GPU, or the CPU.
        peak_dbfs: Peak level of clips, as in `loading.load_feature_extractor`.

    Raises:
        ValueError: The model cannot be loaded, lacks tensors, or has codes that do not fit into 16 bits; or there is
            no such device.
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
    """
    Return a hash of the weights, 16 hex digits.

    The fingerprint of the codebook is not enough: training can change an encoder and leave its codebook as it is.
    """
    digest = hashlib.sha256()
    for name, tensor in sorted(model.state_dict().items()):
        digest.update(name.encode())
        digest.update(np.ascontiguousarray(tensor.detach().cpu().float().numpy()).data)
    return digest.hexdigest()[:16]


def default_device(rank: int = 0) -> str:
    """Return the GPU for the worker of this rank, modulo the number of GPUs, or the CPU if there is none."""
    return f"cuda:{rank % torch.cuda.device_count()}" if torch.cuda.is_available() else "cpu"


def encode(
    encoder: WavTokenizerEncoderModel,
    feature_extractor: WavTokenizerFeatureExtractor,
    waveforms: Sequence[np.ndarray],
    batch_seconds: float,
) -> list[np.ndarray | Failure]:
    """
    Encode each clip (T,) to codes (L,), uint16. Clips of similar length share a micro-batch.

    If a batch does not fit into memory, or the model refuses it, it is halved until only the clip at fault fails.
    """
    results: list[np.ndarray | Failure] = [Failure("not encoded")] * len(waveforms)
    budget = batch_seconds * encoder.config.sampling_rate
    batches = micro_batches([len(waveform) for waveform in waveforms], budget)
    while batches:
        batch = batches.pop()
        try:
            codes = _encode_batch(encoder, feature_extractor, [waveforms[index] for index in batch])
        except (RuntimeError, ValueError) as error:
            # on a CPU, torch raises a plain RuntimeError with this text
            out_of_memory = isinstance(error, torch.OutOfMemoryError) or "can't allocate memory" in str(error)
            if out_of_memory:
                torch.cuda.empty_cache()
            elif isinstance(error, RuntimeError):
                raise
            if len(batch) == 1 and out_of_memory:
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
                _trim_heap()
        for index, clip_codes in zip(batch, codes, strict=True):
            results[index] = clip_codes
    return results


def _trim_heap() -> None:
    """
    Return freed memory to the operating system, on Linux with glibc.

    glibc keeps freed memory, and clips of ever new lengths fragment it: by gigabytes after some hundred clips.
    """
    if sys.platform == "linux" and hasattr(libc := ctypes.CDLL(None), "malloc_trim"):
        libc.malloc_trim(0)


def micro_batches(lengths: Sequence[int], budget: float) -> list[list[int]]:
    """
    Group clips of similar length into batches, and return the indices of each batch.

    A batch, padded to its longest clip, stays within the budget. A clip longer than the budget is a batch by itself.

    Args:
        lengths: Length of each clip.
        budget: Largest size of a padded batch, in the unit of `lengths`.
    """
    batches: list[list[int]] = []
    for index in sorted(range(len(lengths)), key=lambda index: -lengths[index]):
        if batches and (len(batches[-1]) + 1) * lengths[batches[-1][0]] <= budget:  # its first clip is the longest
            batches[-1].append(index)
        else:
            batches.append([index])
    return batches


@torch.inference_mode()
def _encode_batch(encoder: Any, feature_extractor: Any, waveforms: list[np.ndarray]) -> list[np.ndarray]:
    inputs = feature_extractor(waveforms, sampling_rate=encoder.config.sampling_rate, return_tensors="pt")
    encoded = encoder.encode(**inputs.to(encoder.device))
    codes, mask = encoded.audio_codes[:, 0].cpu().numpy(), encoded.audio_codes_mask[:, 0].bool().cpu().numpy()
    return [row[is_valid].astype(np.uint16) for row, is_valid in zip(codes, mask, strict=True)]


def tokenize_clips(
    encoder: WavTokenizerEncoderModel,
    feature_extractor: WavTokenizerFeatureExtractor,
    readers: Sequence[Callable[[], Any]],
    batch_seconds: float,
    num_readers: int,
    channel: str | int = "mean",
    max_clip_seconds: float = MAX_CLIP_SECONDS,
) -> Generator[list[Tokens | Failure], None, None]:
    """
    Encode clips window by window. Yield the results of each window, in the order of `readers`.

    Args:
        encoder: Encoder of the model.
        feature_extractor: Feature extractor of the model.
        readers: One function per clip that returns its audio, as `audio.load_clip` takes it. If it raises, the clip
            fails for that reason. Only an ImportError, for a missing package, is raised here.
        batch_seconds: Seconds of audio per micro-batch.
        num_readers: Threads that read, decode and resample ahead of the model.
        channel: Channel of clips that have several, as in `audio.load`.
        max_clip_seconds: A longer clip fails.
    """
    sampling_rate = encoder.config.sampling_rate
    limit = BATCHES_PER_WINDOW * batch_seconds * sampling_rate

    def read_clip(read: Callable[[], Any]) -> audio.AudioClip | Failure:
        try:
            return audio.load_clip(read(), sampling_rate, channel, max_clip_seconds)
        except ImportError:
            raise
        except (ValueError, OSError) as error:
            return Failure(" ".join(str(error).split()), failure_kind(error))
        except MemoryError as error:  # a damaged header may promise terabytes
            return Failure(f"Too little memory for the clip, or its header is damaged: {error}", "memory")
        except Exception as error:
            return Failure(" ".join(f"{type(error).__name__}: {error}".split()))

    window, window_samples = [], 0
    with OrderedPrefetcher(read_clip, readers, limit, num_readers) as clips:
        for clip in clips:
            window.append(clip)
            window_samples += _num_samples(clip)
            if window_samples >= limit:
                yield _encode_window(encoder, feature_extractor, window, batch_seconds)
                window, window_samples = [], 0
    if window:
        yield _encode_window(encoder, feature_extractor, window, batch_seconds)


def _encode_window(encoder: Any, feature_extractor: Any, window: Any, batch_seconds: float) -> list[Tokens | Failure]:
    waveforms = [clip.audio for clip in window if isinstance(clip, audio.AudioClip)]
    codes = iter(encode(encoder, feature_extractor, waveforms, batch_seconds))
    results = []
    for clip in window:
        result = next(codes) if isinstance(clip, audio.AudioClip) else clip
        if not isinstance(result, Failure):
            result = Tokens(
                result, len(clip.audio), clip.source_sampling_rate, clip.source_channels, tuple(clip.warnings)
            )
        results.append(result)
    return results


def _num_samples(clip: audio.AudioClip | Failure) -> int:
    return 0 if isinstance(clip, Failure) else len(clip.audio)


class OrderedPrefetcher:
    """
    Compute `work(job)` ahead in threads, and iterate over the results in the order of the jobs.

    Threads are enough, because decoding and resampling release the GIL.

    Args:
        work: Function that returns a clip, or a failure.
        jobs: Its arguments, one per clip.
        limit: Samples of finished clips at which the threads pause.
        num_threads: Number of threads.
    """

    def __init__(self, work: Callable, jobs: Sequence, limit: float, num_threads: int):
        self._work, self._jobs, self._limit = work, jobs, limit
        self._changed = threading.Condition()
        self._next, self._closed = 0, False
        self._waiting = 0  # samples of finished clips that were not taken yet
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
                # jobs start in order, so the clip that is needed next started before those that fill the limit
                self._changed.wait_for(lambda: self._waiting < self._limit or self._closed)
                if self._closed or self._next == len(self._jobs):
                    return
                index, self._next = self._next, self._next + 1
            try:
                result = self._work(self._jobs[index])
            except BaseException as error:  # raised again by __iter__
                result = error
            with self._changed:
                self._results[index] = result
                self._waiting += 0 if isinstance(result, BaseException) else _num_samples(result)
                self._changed.notify_all()

    def __iter__(self) -> Iterator:
        for index in range(len(self._jobs)):
            with self._changed:
                self._changed.wait_for(partial(self._results.__contains__, index))
                result = self._results.pop(index)
                self._waiting -= 0 if isinstance(result, BaseException) else _num_samples(result)
                self._changed.notify_all()
            if isinstance(result, BaseException):
                raise result
            yield result
