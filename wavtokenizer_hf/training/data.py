"""Segments of sound to train on. What a run sees is a function of (seed, epoch, clip): not of workers, processes or
resumption.

Clips come from a list file, a folder, or a dataset of the datasets library; clips that cannot be read are skipped,
counted and named.
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

TRAINING_PEAKS = (-6.0, -1.0)  # range of the peak level of training clips in dBFS, drawn uniformly
VALIDATION_PEAK = -3.0
SAVED_DATASETS = (("state.json", "dataset_info.json"), ("dataset_dict.json",))  # files that mark such a folder
COLUMN = "audio"  # names of the audio column of a dataset
MOST_SKIPPED = 100  # so many unreadable clips in a row mean another fault, such as a missing folder


@dataclass
class Batch:
    """Segments, with counts of short and unreadable clips."""

    audio: torch.Tensor  # (B, 1, T)
    num_repeated: int = 0  # clips shorter than a segment
    skipped: dict[str, str] = field(default_factory=dict)  # clip -> reason why it could not be read

    def pin_memory(self) -> "Batch":  # the name that DataLoader looks for
        self.audio = self.audio.pin_memory()
        return self


Clips = str | os.PathLike | Sequence[Any]
"""A folder, a list file, a folder saved by `save_to_disk`, or a dataset, see `open_clips`."""


def open_clips(source: Clips) -> Sequence[Any]:
    """
    The clips of a data source, of which `read_clip` gives the sound.

    Args:
        source: a folder, which is searched for sound files; a text file with one path a line, relative to that file; a
            folder saved by `datasets.Dataset.save_to_disk`; or a dataset itself, of the datasets library or any
            sequence of paths or of rows; the column of the sound is `audio`.

    Raises:
        ValueError: there is no such source, or no clip in it; a dataset of several splits, without a length or that
            column.
    """
    if not isinstance(source, (str, os.PathLike)):
        clips = _undecoded(source)
    elif any(all(Path(source, name).is_file() for name in names) for names in SAVED_DATASETS):
        clips = _undecoded(_load_dataset(source))
    elif Path(source).is_dir():
        found = find_files(source, audio.SUFFIXES)
        clips = found.files
        if found.passed_over:
            logger.warning("%s: %s", source, describe_passed_over(found.passed_over))
    elif Path(source).is_file():
        try:
            text = Path(source).read_text(encoding="utf-8-sig", errors="surrogateescape")  # names may not be UTF-8
            if "\0" in text:
                raise ValueError("it holds zero bytes")
        except ValueError as error:
            raise ValueError(
                f"{source} is not text, expected a list with the path of one sound file a line."
            ) from error
        lines = text.replace("\r", "\n").split("\n")  # no other characters: they occur in names
        clips = [str(Path(source).parent / line.strip()) for line in lines if line.strip()]
    else:
        raise ValueError(f"There is no file or folder {str(source)!r} to take sound from. Check the path.")
    if len(clips) == 0:
        shown = source if isinstance(source, (str, os.PathLike)) else f"the {type(source).__name__}"
        raise ValueError(
            f"There is no clip in {shown}, expected sound files ({', '.join(audio.SUFFIXES)}) or a list of them."
        )
    return clips


def read_clip(clips: Sequence, index: int, sampling_rate: int, channel: str | int = "mean") -> np.ndarray:
    """Sound (T,) of one clip, mono, float32, as `audio.load_clip` reads it. Raises what that raises."""
    row = clips[index]
    if isinstance(row, dict) and not {"bytes", "path", "array"} & set(row):
        if COLUMN not in row:
            raise AudioError(f"Got a row of {', '.join(row) or 'nothing'}, expected sound as {COLUMN!r}.", "no-audio")
        row = row[COLUMN]
    clip = audio.load_clip(row, sampling_rate, channel)
    audio.say_what_changes(
        name_of(clips, index), clip.source_channels, clip.source_sampling_rate, sampling_rate, channel
    )
    audio.log_warnings(name_of(clips, index), clip.warnings)
    return clip.audio


def cut_segment(waveform: np.ndarray, length: int, random: np.random.Generator | None) -> np.ndarray:
    """
    A segment (length,) of a clip (T,), as training sees it: the clip scaled to a peak, a piece of it cut out.

    Clips shorter than the segment are repeated to its length; silence stays silence.

    Args:
        random: draws the peak from -6 to -1 dBFS, and the place of the piece; None for validation: -3 dBFS, the
            beginning.
    """
    peak = VALIDATION_PEAK if random is None else random.uniform(*TRAINING_PEAKS)
    highest = np.abs(waveform).max()
    if highest > 0:
        waveform = waveform * np.float32(10 ** (peak / 20) / highest)
    if len(waveform) < length:
        return np.resize(waveform, length)  # numpy.resize repeats short clips
    start = 0 if random is None else int(random.integers(len(waveform) - length + 1))
    return waveform[start : start + length]


class Segments(Dataset):
    """Training segments, indexed by (epoch, clip)."""

    def __init__(self, clips: Sequence, length: int, sampling_rate: int, seed: int, channel: str | int = "mean"):
        self.clips, self.length, self.sampling_rate = clips, length, sampling_rate
        self.seed, self.channel = seed, channel

    def __getitem__(self, place: tuple[int, int]) -> Batch:
        epoch, index = place
        random = np.random.default_rng(derived_seed(self.seed, "segment", epoch, index))
        skipped = {}
        for _ in range(MOST_SKIPPED):
            try:
                waveform = read_clip(self.clips, index, self.sampling_rate, self.channel)
            except ImportError:
                raise
            except Exception as error:
                skipped[name_of(self.clips, index)] = _reason(error)
                index = int(random.integers(len(self.clips)))  # use another clip, the same one in every run
                continue
            segment = torch.from_numpy(cut_segment(waveform, self.length, random))
            return Batch(segment[None, None], int(len(waveform) < self.length), skipped)
        name, reason = next(iter(skipped.items()))
        raise ValueError(
            f"{MOST_SKIPPED} clips in a row could not be read, such as {name}: {reason} Check the training data."
        )


class EndlessBatches(Sampler):
    """Batches of (epoch, clip) without end: every epoch a new order of all clips, one epoch right after another.

    A joint batch is cut into equal parts for the processes, so one process with the whole of it sees the same.
    """

    def __init__(self, num_clips: int, batch_size: int, seed: int, rank: int = 0, world_size: int = 1, start: int = 0):
        """`start`: number of joint batches that the resumed run has used."""
        self.num_clips, self.batch_size, self.seed = num_clips, batch_size, seed
        self.rank, self.world_size, self.start = rank, world_size, start

    def __iter__(self) -> Iterator[list[tuple[int, int]]]:
        joint, batch = self.batch_size * self.world_size, self.start
        epoch, order = -1, np.zeros(0, np.int64)
        while True:
            first = batch * joint + self.rank * self.batch_size
            places = []
            for position in range(first, first + self.batch_size):
                if position // self.num_clips != epoch:
                    epoch = position // self.num_clips
                    order = np.random.default_rng(derived_seed(self.seed, "order", epoch)).permutation(self.num_clips)
                places.append((epoch, int(order[position % self.num_clips])))
            yield places
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
            # no seed from torch's global generator, which has to stay where the step left it
            generator=torch.Generator().manual_seed(0),
        )
    )


def validation_clips(source: Clips, length: int, sampling_rate: int, most: int, channel: str | int = "mean") -> Batch:
    """
    Return the starts of at most `most` clips at -3 dBFS. The clips are evenly spread over the source, and always the
    same.
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
    """Whatever reading one clip raises is the reason why that clip is skipped."""
    return str(error) if isinstance(error, (ValueError, OSError)) else f"{type(error).__name__}: {error}"


def name_of(clips: Sequence, index: int) -> str:
    """Return the name of a clip in reports: its path, or its index in the dataset."""
    row = clips[index]
    row = row.get(COLUMN) if isinstance(row, dict) else row
    path = row.get("path") if isinstance(row, dict) else row
    return utf8_name(str(path)) if isinstance(path, (str, os.PathLike)) else f"clip {index}"


def _undecoded(dataset: Any) -> Sequence:
    """Return a dataset whose audio wavtokenizer_hf.audio decodes, and not torchcodec."""
    if isinstance(dataset, dict):
        raise ValueError(f"Got a dataset of the splits {', '.join(dataset)}. Give one of them.")
    if not hasattr(dataset, "__len__"):
        raise ValueError(
            f"Got {type(dataset).__name__}, which has no length, expected a dataset whose clips can be taken in any "
            "order. Load it without streaming."
        )
    if not hasattr(dataset, "cast_column"):
        return dataset
    if COLUMN not in dataset.column_names:
        raise ValueError(
            f"The dataset has no column {COLUMN!r}, but {', '.join(dataset.column_names)}. Rename that of the sound."
        )
    if type(dataset.features[COLUMN]).__name__ != "Audio":  # paths, or rows with arrays
        return dataset.select_columns(COLUMN)
    import datasets

    return dataset.select_columns(COLUMN).cast_column(COLUMN, datasets.Audio(decode=False))


def _load_dataset(folder: str | os.PathLike) -> Any:
    datasets = require("datasets", "bulk")
    try:
        return datasets.load_from_disk(str(folder))
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise ValueError(f"Cannot read {folder} as a saved dataset: {' '.join(str(error).split())[:300]}") from error


def _join(batches: list[Batch]) -> Batch:
    skipped = {clip: reason for batch in batches for clip, reason in batch.skipped.items()}
    return Batch(torch.cat([batch.audio for batch in batches]), sum(batch.num_repeated for batch in batches), skipped)


class _OneOfAKind(logging.Filter):
    """Log each kind of message once, not once per file."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: set[str] = set()

    def filter(self, record: logging.LogRecord) -> bool:
        new = record.msg not in self.seen
        self.seen.add(record.msg)
        return new


@contextmanager
def one_warning_of_a_kind() -> Iterator[None]:
    """Log each kind of message once inside: a stereo corpus would give a warning for every clip of every epoch."""
    once = _OneOfAKind()
    audio.logger.addFilter(once)
    try:
        yield
    finally:
        audio.logger.removeFilter(once)


def _quiet_worker(worker: int) -> None:
    audio.logger.addFilter(_OneOfAKind())  # never removed: the process lives as long as the loader
