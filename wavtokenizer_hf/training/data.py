"""Load audio segments for training.

Segments depend only on (seed, epoch, clip), not on the number of workers or processes or on resuming. Clips come from
a list file, a folder, or a dataset of the datasets library. Clips that cannot be read are skipped and reported.
"""

import logging
import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch.utils.data import DataLoader, Dataset, Sampler

from .. import audio
from ..audio_errors import AudioError
from ..extras import require
from ..find_files import describe_passed_over, find_files, utf8_name
from .settings import derived_seed


logger = logging.getLogger(__name__)

TRAINING_PEAKS = (-6.0, -1.0)  # dBFS; the peak level of a training clip is uniform in this range
VALIDATION_PEAK = -3.0  # dBFS
SAVED_DATASETS = (("state.json", "dataset_info.json"), ("dataset_dict.json",))  # files of a saved dataset
AUDIO_COLUMN = "audio"  # name of the audio column of a dataset
MAX_SKIPPED = 100  # so many unreadable clips in a row stop the run: the cause is probably not a single clip


@dataclass
class Batch:
    """Segments, with counts of short and unreadable clips."""

    audio: torch.Tensor  # (B, 1, T)
    num_repeated: int = 0  # number of clips shorter than a segment
    skipped: dict[str, str] = field(default_factory=dict)  # unreadable clip -> reason

    def pin_memory(self) -> "Batch":  # DataLoader calls this method
        self.audio = self.audio.pin_memory()
        return self


Clips = str | os.PathLike | Sequence[Any]
"""A folder, a list file, a folder saved by `save_to_disk`, or a dataset; see `open_clips`."""


def open_clips(source: Clips) -> Sequence[Any]:
    """
    Return the clips of a data source. `read_clip` reads the audio of a clip.

    Args:
        source: One of these: a folder to search for audio files; a text file with one path per line, relative to that
            file; a folder saved by `datasets.Dataset.save_to_disk`; a dataset; or a sequence of paths or rows. The
            audio column of a dataset is `audio`.

    Raises:
        ValueError: The source does not exist or has no clips, or a dataset has several splits, no length or no audio
            column.
    """
    if not isinstance(source, (str, os.PathLike)):
        clips = _without_decoding(source)
    elif any(all(Path(source, name).is_file() for name in names) for names in SAVED_DATASETS):
        clips = _without_decoding(_load_dataset(source))
    elif Path(source).is_dir():
        found = find_files(source, audio.SUFFIXES)
        clips = found.files
        if found.passed_over:
            logger.warning("%s: %s", source, describe_passed_over(found.passed_over))
    elif Path(source).is_file():
        try:
            # surrogateescape: file names may not be UTF-8
            text = Path(source).read_text(encoding="utf-8-sig", errors="surrogateescape")
            if "\0" in text:
                raise ValueError("it holds zero bytes")
        except ValueError as error:
            raise ValueError(
                f"{source} is not text, expected a list with one path of an audio file per line."
            ) from error
        lines = text.replace("\r", "\n").split("\n")  # not splitlines: file names can contain its other line ends
        clips = [str(Path(source).parent / line.strip()) for line in lines if line.strip()]
    else:
        raise ValueError(f"There is no file or folder {str(source)!r} with audio. Check the path.")
    if len(clips) == 0:
        shown = source if isinstance(source, (str, os.PathLike)) else f"the {type(source).__name__}"
        raise ValueError(
            f"There is no clip in {shown}, expected audio files ({', '.join(audio.SUFFIXES)}) or a list of them."
        )
    return clips


def read_clip(clips: Sequence, index: int, sampling_rate: int, channel: str | int = "mean") -> np.ndarray:
    """Return the audio (T,) of one clip, mono, float32. Raises the errors of `audio.load_clip`."""
    row = clips[index]
    if isinstance(row, dict) and not {"bytes", "path", "array"} & set(row):
        if AUDIO_COLUMN not in row:
            raise AudioError(
                f"Got a row of {', '.join(row) or 'nothing'}, expected audio as {AUDIO_COLUMN!r}.", "no-audio"
            )
        row = row[AUDIO_COLUMN]
    clip = audio.load_clip(row, sampling_rate, channel)
    audio.log_conversion(
        name_of(clips, index), clip.source_channels, clip.source_sampling_rate, sampling_rate, channel
    )
    audio.log_warnings(name_of(clips, index), clip.warnings)
    return clip.audio


def cut_segment(waveform: np.ndarray, length: int, random: np.random.Generator | None) -> np.ndarray:
    """
    Scale a clip to a peak level and cut a segment out of it.

    A clip shorter than the segment is repeated to its length. Silence stays silence.

    Args:
        waveform: Audio of the clip, of shape (T,).
        length: Samples of the segment.
        random: Generator of the peak level, from -6 to -1 dBFS, and of the start of the segment. None, for validation:
            -3 dBFS, and the start of the clip.

    Returns:
        Segment of shape (length,).
    """
    peak = VALIDATION_PEAK if random is None else random.uniform(*TRAINING_PEAKS)
    current_peak = np.abs(waveform).max()
    if current_peak > 0:
        waveform = waveform * np.float32(10 ** (peak / 20) / current_peak)
    if len(waveform) < length:
        return np.resize(waveform, length)  # repeats the clip
    start = 0 if random is None else int(random.integers(len(waveform) - length + 1))
    return waveform[start : start + length]


class Segments(Dataset):
    """Training segments, indexed by (epoch, clip)."""

    def __init__(self, clips: Sequence, length: int, sampling_rate: int, seed: int, channel: str | int = "mean"):
        self.clips, self.length, self.sampling_rate = clips, length, sampling_rate
        self.seed, self.channel = seed, channel

    def __getitem__(self, key: tuple[int, int]) -> Batch:
        epoch, index = key
        random = np.random.default_rng(derived_seed(self.seed, "segment", epoch, index))
        skipped = {}
        for _ in range(MAX_SKIPPED):
            try:
                waveform = read_clip(self.clips, index, self.sampling_rate, self.channel)
            except ImportError:
                raise
            except Exception as error:
                skipped[name_of(self.clips, index)] = _reason(error)
                index = int(random.integers(len(self.clips)))  # replace it by a random clip, the same one in every run
                continue
            segment = torch.from_numpy(cut_segment(waveform, self.length, random))
            return Batch(segment[None, None], int(len(waveform) < self.length), skipped)
        name, reason = next(iter(skipped.items()))
        raise ValueError(
            f"{MAX_SKIPPED} clips in a row could not be read, such as {name}: {reason} Check the training data."
        )


class EndlessBatches(Sampler):
    """Yield batches of (epoch, clip index) forever. Every epoch has a new order of all clips.

    A joint batch is split equally among the processes. So a single process with the whole joint batch gets the same
    clips. Batches can cross the end of an epoch.
    """

    def __init__(self, num_clips: int, batch_size: int, seed: int, rank: int = 0, world_size: int = 1, start: int = 0):
        """`start`: Number of joint batches that a resumed run has already used."""
        self.num_clips, self.batch_size, self.seed = num_clips, batch_size, seed
        self.rank, self.world_size, self.start = rank, world_size, start

    def __iter__(self) -> Iterator[list[tuple[int, int]]]:
        joint_batch_size, batch = self.batch_size * self.world_size, self.start
        epoch, order = -1, np.zeros(0, np.int64)
        while True:
            first = batch * joint_batch_size + self.rank * self.batch_size
            keys = []
            for position in range(first, first + self.batch_size):
                if position // self.num_clips != epoch:
                    epoch = position // self.num_clips
                    order = np.random.default_rng(derived_seed(self.seed, "order", epoch)).permutation(self.num_clips)
                keys.append((epoch, int(order[position % self.num_clips])))
            yield keys
            batch += 1


def training_batches(
    clips: Sequence, length: int, sampling_rate: int, batch_size: int, seed: int, num_workers: int, rank: int = 0,
    world_size: int = 1, start: int = 0, channel: str | int = "mean",
) -> Iterator[Batch]:  # fmt: skip
    """Yield batches (batch_size, 1, length) of this process forever, from joint batch `start` on."""
    return iter(
        DataLoader(
            Segments(clips, length, sampling_rate, seed, channel),
            batch_sampler=EndlessBatches(len(clips), batch_size, seed, rank, world_size, start),
            collate_fn=_join,
            num_workers=num_workers,
            pin_memory=torch.cuda.is_available(),
            worker_init_fn=_quiet_worker,
            # by default, DataLoader draws a seed from torch's global generator and so changes its state
            generator=torch.Generator().manual_seed(0),
        )
    )


def validation_clips(source: Clips, length: int, sampling_rate: int, most: int, channel: str | int = "mean") -> Batch:
    """
    Return the first `length` samples of at most `most` clips, scaled to -3 dBFS.

    The clips are evenly spaced over the source, and are the same in every run.
    """
    clips = open_clips(source)
    segments, skipped, num_repeated = [], {}, 0
    for index in np.linspace(0, len(clips) - 1, min(most, len(clips))).round().astype(int).tolist():
        try:
            waveform = read_clip(clips, index, sampling_rate, channel)
        except ImportError:
            raise
        except Exception as error:
            skipped[name_of(clips, index)] = _reason(error)
            continue
        num_repeated += len(waveform) < length
        segments.append(torch.from_numpy(cut_segment(waveform, length, None)))
    if not segments:
        raise ValueError(
            f"None of the {len(skipped)} validation clips can be read, such as {next(iter(skipped.items()))}."
        )
    return Batch(torch.stack(segments)[:, None], num_repeated, skipped)


def _reason(error: Exception) -> str:
    """Return the text that reports why a clip could not be read."""
    return str(error) if isinstance(error, (ValueError, OSError)) else f"{type(error).__name__}: {error}"


def name_of(clips: Sequence, index: int) -> str:
    """Return the name of a clip in reports: its path, or its index in the dataset."""
    row = clips[index]
    row = row.get(AUDIO_COLUMN) if isinstance(row, dict) else row
    path = row.get("path") if isinstance(row, dict) else row
    return utf8_name(str(path)) if isinstance(path, (str, os.PathLike)) else f"clip {index}"


def _without_decoding(dataset: Any) -> Sequence:
    """Return a dataset whose audio is not decoded by torchcodec, but by wavtokenizer_hf.audio."""
    if isinstance(dataset, dict):
        raise ValueError(f"Got a dataset of the splits {', '.join(dataset)}. Give one of them.")
    if not hasattr(dataset, "__len__"):
        raise ValueError(
            f"Got {type(dataset).__name__}, which has no length, expected a dataset with random access. Load it "
            "without streaming."
        )
    if not hasattr(dataset, "cast_column"):
        return dataset
    if AUDIO_COLUMN not in dataset.column_names:
        raise ValueError(
            f"The dataset has no column {AUDIO_COLUMN!r}, but {', '.join(dataset.column_names)}. Rename the audio "
            "column."
        )
    if type(dataset.features[AUDIO_COLUMN]).__name__ != "Audio":  # paths, or rows with arrays
        return dataset.select_columns(AUDIO_COLUMN)
    import datasets

    return dataset.select_columns(AUDIO_COLUMN).cast_column(AUDIO_COLUMN, datasets.Audio(decode=False))


def _load_dataset(folder: str | os.PathLike) -> Any:
    datasets = require("datasets", "bulk")
    try:
        return datasets.load_from_disk(str(folder))
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise ValueError(f"Cannot read {folder} as a saved dataset: {' '.join(str(error).split())[:300]}") from error


def _join(batches: list[Batch]) -> Batch:
    skipped = {clip: reason for batch in batches for clip, reason in batch.skipped.items()}
    return Batch(torch.cat([batch.audio for batch in batches]), sum(batch.num_repeated for batch in batches), skipped)


class _OncePerKind(logging.Filter):
    """Log each kind of message once, not once per file."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: set[str] = set()

    def filter(self, record: logging.LogRecord) -> bool:
        is_first = record.msg not in self.seen
        self.seen.add(record.msg)
        return is_first


@contextmanager
def log_each_kind_once() -> Iterator[None]:
    """Log each kind of message once in a `with` block. A stereo corpus would give a warning per clip and epoch."""
    once = _OncePerKind()
    audio.logger.addFilter(once)
    try:
        yield
    finally:
        audio.logger.removeFilter(once)


def _quiet_worker(worker: int) -> None:
    audio.logger.addFilter(_OncePerKind())  # never removed, because the process ends with the loader
