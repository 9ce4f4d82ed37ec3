"""Sources of segments: parts of recordings, in a manifest with `start` and `duration`, or in the shards of Lhotse Shar."""

import gzip
import os
import re
import threading
import zlib
from collections import deque
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any
from weakref import WeakValueDictionary

import numpy as np

from .. import audio
from ..audio_errors import AudioError
from ..extras import require
from ..find_files import walk
from ..limited_files import one_line, parse_json
from .sources import Item, Source


START, DURATION = "start", "duration"
MAX_CUT_BYTES = 2**24  # of one line of a CutSet; real ones have a few kilobytes


class _Entry:
    """A value that is read once, by the first thread that needs it."""

    def __init__(self):
        self.lock, self.value = threading.Lock(), None


class _RecentValues:
    """
    Values by key: the last two, and those that a thread waits for.

    Readers at the end of one recording and at the beginning of the next share both, so each is read once.
    """

    def __init__(self):
        self._lock, self._entries, self._recent = threading.Lock(), WeakValueDictionary(), deque(maxlen=2)

    def __reduce__(self):
        return _RecentValues, ()  # another process reads for itself

    def get(self, key, read: Callable[[], Any]) -> Any:
        """The value of `key`, by calling `read` if it is not there."""
        with self._lock:
            entry = self._entries.get(key)
            if entry is None:
                entry = self._entries[key] = _Entry()
            if entry not in self._recent:
                self._recent.append(entry)
        with entry.lock:
            if entry.value is None:
                entry.value = read()
            return entry.value


class Segments(Source):
    """
    Rows of a manifest that name a recording, and where in it a clip lies; a place is path, start, duration and carried columns.

    Rows of one recording follow each other, so that it is read once for all of them. Two recordings are held in memory, and those that readers are at.

    Args:
        rows: as in the manifest.
        column: of the paths, relative to `base`.
        schema: of the carried columns.
        base: folder of the manifest.
    """

    def __init__(self, rows: list[dict], column: str, schema, base: Path):
        self.schema, self.selection = schema, {"column": column}
        self._recordings = _RecentValues()
        items = []
        for number, row in enumerate(rows, start=1):
            start, duration = (_seconds(row, name, number) for name in (START, DURATION))
            id = row["id"] if row.get("id") is not None else f"{row[column]}#{start:g}+{duration:g}"
            carried = {name: row.get(name) for name in schema.names}
            items.append(Item(str(id), (str(base / row[column]), start, duration, carried)))
        self.items = sorted(items, key=lambda item: item.place[:2])

    def sound(self, place) -> audio.Channels:
        path, start, duration, _ = place
        # at its own rate, so that a segment is resampled as a file of its own would be
        recording = self._recordings.get(path, lambda: audio.read_channels(path))
        rate, length = recording.sampling_rate, len(recording.samples)
        if start + duration > length / rate + 0.01:  # durations in manifests are rounded
            raise AudioError(
                f"The segment {start:g} s + {duration:g} s ends after {path}, which has {length / rate:g} s.",
                "truncated",
            )
        first, count = round(start * rate), max(1, round(duration * rate))
        return audio.Channels(recording.samples[first : first + count], rate, f"the segment at {start:g} s of {path}")

    def carried(self, place) -> dict[str, Any]:
        return place[3]


def _seconds(row: Mapping, name: str, number: int) -> float:
    try:
        value = float(row[name])
    except (KeyError, TypeError, ValueError) as error:
        raise ValueError(f"Row {number} has {row.get(name)!r} as {name}, expected seconds.") from error
    if not (0 <= value < float("inf")) or (name == DURATION and value == 0):
        raise ValueError(f"Row {number} has {value} as {name}, expected seconds.")
    return value


# ---------------------------------------------------------------------------------------------------------------------
# Lhotse Shar
# ---------------------------------------------------------------------------------------------------------------------


def is_shar(folder: Path) -> bool:
    """Whether a folder holds Lhotse Shar: a CutSet and recordings in tar shards."""
    return any(folder.glob("cuts*.jsonl*")) and any(folder.glob("recording*.tar"))


class LhotseShar(Source):
    """
    Cuts of a Lhotse Shar folder, with `recording` as audio. A place is the numbers of shard and cut.

    Text and speaker of the first supervision are carried along. A shard is read whole, as Shar is meant to be. Two shards
    are held in memory, and those that readers are at.
    """

    def __init__(self, folder: Path):
        require("lhotse", "lhotse")
        pyarrow = require("pyarrow", "bulk")
        self.folder = folder
        self._shards = [(str(cuts), str(folder / _beside(cuts.name))) for cuts in sorted(folder.glob("cuts*.jsonl*"))]
        self._cuts = _RecentValues()
        self.items = []
        for number, (cuts, recordings) in enumerate(self._shards):
            if not os.path.isfile(recordings):
                raise ValueError(
                    f"{cuts} has no {os.path.basename(recordings)} beside it, in which its recordings lie."
                )
            for position, id in enumerate(_cut_ids(cuts)):
                self.items.append(Item(id, (number, position)))
        self.schema = pyarrow.schema([("text", pyarrow.string()), ("speaker", pyarrow.string())])
        used = {path for shard in self._shards for path in shard}
        self.passed_over = [path for path in walk(folder) if path not in used]

    def file(self, place: tuple[int, int]) -> str:
        return self._shards[place[0]][1]

    def _cut(self, place: tuple[int, int]):
        number, position = place

        def read() -> list:
            cuts, recordings = self._shards[number]
            fields = {"cuts": [cuts], "recording": [recordings]}
            try:
                return list(require("lhotse", "lhotse").CutSet.from_shar(fields=fields))
            except Exception as error:  # of lhotse, tarfile and gzip
                raise AudioError(f"lhotse cannot read the shard {recordings}: {_reason(error)}") from error

        return self._cuts.get(number, read)[position]

    def sound(self, place: tuple[int, int]) -> audio.Channels:
        cut = self._cut(place)
        recording, name = getattr(cut, "recording", None), f"the cut {cut.id!r}"
        if recording is not None and not recording.transforms and isinstance(recording.sources[0].source, bytes):
            return _of_recording(cut, recording, name)
        try:  # mixed or augmented cuts
            samples = cut.load_audio()
        except Exception as error:  # lhotse's own classes, which derive from Exception alone
            raise AudioError(f"lhotse cannot read {name}: {_reason(error)}") from error
        return audio.Channels(np.atleast_2d(samples).T, cut.sampling_rate, name)

    def carried(self, place: tuple[int, int]) -> dict[str, Any]:
        supervisions = self._cut(place).supervisions
        first = supervisions[0] if supervisions else None
        return {"text": getattr(first, "text", None), "speaker": getattr(first, "speaker", None)}


def _of_recording(cut, recording, name: str) -> audio.Channels:
    """A cut of a recording that lies in the shard, decoded as the same bytes in any other source are."""
    whole = audio.read_channels(recording.sources[0].source, name)
    if whole.sampling_rate != recording.sampling_rate:
        raise AudioError(f"{name} has {whole.sampling_rate} Hz, and its manifest says {recording.sampling_rate} Hz.")
    first, count = round(cut.start * whole.sampling_rate), cut.num_samples
    if first + count > len(whole.samples) + whole.sampling_rate // 100:
        raise AudioError(
            f"{name} needs {first + count} samples, and its recording has {len(whole.samples)}.", "truncated"
        )
    wanted = cut.channel if isinstance(cut.channel, list) else [cut.channel]
    try:
        samples = whole.samples[first : first + count, [recording.channel_ids.index(number) for number in wanted]]
    except (ValueError, IndexError) as error:
        raise AudioError(
            f"{name} names the channels {wanted}, and its recording has {whole.samples.shape[1]}.", "no-channel"
        ) from error
    return audio.Channels(samples, whole.sampling_rate, name)


def _reason(error: Exception) -> str:
    """Without addresses in memory, which are others each time."""
    return one_line(re.sub(r" at 0x[0-9a-f]+", "", str(error) or type(error).__name__))


def _beside(cuts: str) -> str:
    """cuts.000000.jsonl.gz -> recording.000000.tar"""
    return cuts.replace("cuts", "recording", 1).removesuffix(".gz").removesuffix(".jsonl") + ".tar"


def _cut_ids(path: str) -> list[str]:
    ids = []
    try:
        with (gzip.open if path.endswith(".gz") else open)(path, "rb") as file:
            while line := file.readline(MAX_CUT_BYTES + 1):
                if len(line) > MAX_CUT_BYTES:
                    raise ValueError(f"line {len(ids) + 1} has more than {MAX_CUT_BYTES} bytes")
                if not line.strip():
                    continue
                cut = parse_json(line)
                if not isinstance(cut, dict) or not isinstance(cut.get("id"), str):
                    raise ValueError(f"line {len(ids) + 1} is no cut with an id of text")
                ids.append(cut["id"])
    except (ValueError, OSError, EOFError, zlib.error) as error:
        raise ValueError(f"Cannot read the cuts of {path}: {one_line(error)}") from error
    return ids
