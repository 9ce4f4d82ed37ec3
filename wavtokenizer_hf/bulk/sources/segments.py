"""Segments of recordings, from a list with the columns `start` and `duration`."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ... import audio
from ...audio_errors import AudioError
from .base import Item, Source
from .recent_values import RecentValues


START, DURATION = "start", "duration"


class SegmentSource(Source):
    """
    Rows of a manifest that name a recording, and where in it a clip lies; a locator is path, start, duration and
    carried columns.

    Rows of one recording follow each other, so that it is read once for all of them. Two recordings are held in
    memory, and those that readers are at.

    Args:
        rows: as in the manifest.
        column: of the paths, relative to `base`.
        schema: of the carried columns.
        base: folder of the manifest.
    """

    def __init__(self, rows: list[dict], column: str, schema: Any, base: Path):
        self.schema, self.selection = schema, {"column": column}
        self._recordings = RecentValues()
        items = []
        for number, row in enumerate(rows, start=1):
            start, duration = (_seconds(row, name, number) for name in (START, DURATION))
            id = row["id"] if row.get("id") is not None else f"{row[column]}#{start:g}+{duration:g}"
            carried = {name: row.get(name) for name in schema.names}
            items.append(Item(str(id), (str(base / row[column]), start, duration, carried)))
        self.items = sorted(items, key=lambda item: item.locator[:2])

    def read(self, locator: Any) -> audio.Channels:
        path, start, duration, _ = locator
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

    def extra_columns(self, locator: Any) -> dict[str, Any]:
        return locator[3]


def _seconds(row: Mapping, name: str, number: int) -> float:
    try:
        value = float(row[name])
    except (KeyError, TypeError, ValueError) as error:
        raise ValueError(f"Row {number} has {row.get(name)!r} as {name}, expected seconds.") from error
    if not (0 <= value < float("inf")) or (name == DURATION and value == 0):
        raise ValueError(f"Row {number} has {value} as {name}, expected seconds.")
    return value
