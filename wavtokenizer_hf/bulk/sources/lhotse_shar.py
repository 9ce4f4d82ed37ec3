"""Cuts of Lhotse Shar."""

import gzip
import os
import re
import zlib
from pathlib import Path
from typing import Any

import numpy as np

from ... import audio
from ...audio_errors import AudioError
from ...extras import require
from ...find_files import walk
from ...limited_files import one_line, parse_json
from .base import Item, Source
from .recent_values import RecentValues


MAX_CUT_BYTES = 2**24  # of one line of a CutSet; real ones have a few kilobytes


def is_shar(folder: Path) -> bool:
    """Whether a folder holds Lhotse Shar: a CutSet and recordings in tar shards."""
    return any(folder.glob("cuts*.jsonl*")) and any(folder.glob("recording*.tar"))


class LhotseSource(Source):
    """
    Cuts of a Lhotse Shar folder, with `recording` as audio. A locator is the numbers of shard and cut.

    Text and speaker of the first supervision are carried along. A shard is read whole, as Shar is meant to be. Two
    shards are held in memory, and those that readers are at.
    """

    def __init__(self, folder: Path):
        require("lhotse", "lhotse")
        pyarrow = require("pyarrow", "bulk")
        self.folder = folder
        self._shards = [(str(cuts), str(folder / _beside(cuts.name))) for cuts in sorted(folder.glob("cuts*.jsonl*"))]
        self._cuts = RecentValues()
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

    def file(self, locator: tuple[int, int]) -> str:
        return self._shards[locator[0]][1]

    def _cut(self, locator: tuple[int, int]) -> Any:
        number, position = locator

        def read() -> list:
            cuts, recordings = self._shards[number]
            fields = {"cuts": [cuts], "recording": [recordings]}
            try:
                return list(require("lhotse", "lhotse").CutSet.from_shar(fields=fields))
            except Exception as error:  # of lhotse, tarfile and gzip
                raise AudioError(f"lhotse cannot read the shard {recordings}: {_reason(error)}") from error

        return self._cuts.get(number, read)[position]

    def read(self, locator: tuple[int, int]) -> audio.Channels:
        cut = self._cut(locator)
        recording, name = getattr(cut, "recording", None), f"the cut {cut.id!r}"
        if recording is not None and not recording.transforms and isinstance(recording.sources[0].source, bytes):
            return _of_recording(cut, recording, name)
        try:  # mixed or augmented cuts
            samples = cut.load_audio()
        except Exception as error:  # lhotse's own classes, which derive from Exception alone
            raise AudioError(f"lhotse cannot read {name}: {_reason(error)}") from error
        return audio.Channels(np.atleast_2d(samples).T, cut.sampling_rate, name)

    def extra_columns(self, locator: tuple[int, int]) -> dict[str, Any]:
        supervisions = self._cut(locator).supervisions
        first = supervisions[0] if supervisions else None
        return {"text": getattr(first, "text", None), "speaker": getattr(first, "speaker", None)}


def _of_recording(cut: Any, recording: Any, name: str) -> audio.Channels:
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
    ids: list[str] = []
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
