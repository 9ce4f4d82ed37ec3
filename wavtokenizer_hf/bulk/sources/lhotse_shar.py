"""Read clips from a folder of Lhotse Shar."""

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


MAX_CUT_BYTES = 2**24  # largest line of a CutSet that is read; real lines have a few kilobytes


def is_shar(folder: Path) -> bool:
    """Return whether a folder holds Lhotse Shar: a CutSet, and recordings in tar shards."""
    return any(folder.glob("cuts*.jsonl*")) and any(folder.glob("recording*.tar"))


class LhotseSource(Source):
    """
    Cuts of a Lhotse Shar folder. The field `recording` is the audio. A locator is (index of the shard, index of the
    cut in it).

    Extra columns are the text and speaker of the first supervision. A tar shard is read as a whole, because Shar is
    made for sequential reading. Memory holds the last two shards, and the shards that reader threads wait for.
    """

    def __init__(self, folder: Path):
        require("lhotse", "lhotse")
        pyarrow = require("pyarrow", "bulk")
        self.folder = folder
        self._shards = [
            (str(cuts), str(folder / _recordings_name(cuts.name))) for cuts in sorted(folder.glob("cuts*.jsonl*"))
        ]
        self._cuts = RecentValues()  # index of a shard -> its cuts
        self.items = []
        for shard_index, (cuts, recordings) in enumerate(self._shards):
            if not os.path.isfile(recordings):
                raise ValueError(f"{cuts} has no recordings: expected the file {recordings}.")
            for cut_index, id in enumerate(_read_cut_ids(cuts)):
                self.items.append(Item(id, (shard_index, cut_index)))
        self.schema = pyarrow.schema([("text", pyarrow.string()), ("speaker", pyarrow.string())])
        shard_paths = {path for shard in self._shards for path in shard}
        self.passed_over = [path for path in walk(folder) if path not in shard_paths]

    def file(self, locator: tuple[int, int]) -> str:
        return self._shards[locator[0]][1]

    def _cut(self, locator: tuple[int, int]) -> Any:
        shard_index, cut_index = locator

        def read() -> list:
            cuts, recordings = self._shards[shard_index]
            fields = {"cuts": [cuts], "recording": [recordings]}
            try:
                return list(require("lhotse", "lhotse").CutSet.from_shar(fields=fields))
            except Exception as error:  # lhotse, tarfile and gzip raise errors of many classes
                raise AudioError(f"lhotse cannot read the shard {recordings}: {_reason(error)}") from error

        return self._cuts.get(shard_index, read)[cut_index]

    def read(self, locator: tuple[int, int]) -> audio.Channels:
        cut = self._cut(locator)
        recording, name = getattr(cut, "recording", None), f"the cut {cut.id!r}"
        if recording is not None and not recording.transforms and isinstance(recording.sources[0].source, bytes):
            return _read_cut(cut, recording, name)
        try:  # mixed or augmented cuts
            samples = cut.load_audio()
        except Exception as error:  # the classes of lhotse's errors have no other common base
            raise AudioError(f"lhotse cannot read {name}: {_reason(error)}") from error
        return audio.Channels(np.atleast_2d(samples).T, cut.sampling_rate, name)

    def extra_columns(self, locator: tuple[int, int]) -> dict[str, Any]:
        supervisions = self._cut(locator).supervisions
        first = supervisions[0] if supervisions else None
        return {"text": getattr(first, "text", None), "speaker": getattr(first, "speaker", None)}


def _read_cut(cut: Any, recording: Any, name: str) -> audio.Channels:
    """Return the audio of a cut. Its recording's bytes are decoded as those of any other source."""
    whole = audio.read_channels(recording.sources[0].source, name)
    if whole.sampling_rate != recording.sampling_rate:
        raise AudioError(f"{name} has {whole.sampling_rate} Hz, but its manifest says {recording.sampling_rate} Hz.")
    start, num_samples = round(cut.start * whole.sampling_rate), cut.num_samples
    if start + num_samples > len(whole.samples) + whole.sampling_rate // 100:
        raise AudioError(
            f"{name} needs {start + num_samples} samples, but its recording has {len(whole.samples)}.", "truncated"
        )
    channels = cut.channel if isinstance(cut.channel, list) else [cut.channel]
    try:
        columns = [recording.channel_ids.index(channel) for channel in channels]
        samples = whole.samples[start : start + num_samples, columns]
    except (ValueError, IndexError) as error:
        raise AudioError(
            f"{name} needs the channels {channels}, but its recording has {whole.samples.shape[1]} channels.",
            "no-channel",
        ) from error
    return audio.Channels(samples, whole.sampling_rate, name)


def _reason(error: Exception) -> str:
    """Return the message of an error without memory addresses, which differ from run to run."""
    return one_line(re.sub(r" at 0x[0-9a-f]+", "", str(error) or type(error).__name__))


def _recordings_name(cuts: str) -> str:
    """Return the name of the tar shard for a file of cuts: cuts.000000.jsonl.gz -> recording.000000.tar."""
    return cuts.replace("cuts", "recording", 1).removesuffix(".gz").removesuffix(".jsonl") + ".tar"


def _read_cut_ids(path: str) -> list[str]:
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
                    raise ValueError(f"line {len(ids) + 1} is not a cut whose id is a string")
                ids.append(cut["id"])
    except (ValueError, OSError, EOFError, zlib.error) as error:
        raise ValueError(f"Cannot read the cuts of {path}: {one_line(error)}") from error
    return ids
