"""Read segments of recordings, from a list with the columns `start` and `duration`."""

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
    Segments of recordings. A locator is (path, start, duration, extra columns), with times in seconds.

    Clips are sorted by recording, so that each recording is read once for all its segments. Memory holds the last two
    recordings, and the recordings that reader threads wait for.

    Args:
        rows: Rows of the list, with `start` and `duration` in seconds.
        column: Column of the recordings' paths, relative to `base`.
        schema: Schema (pyarrow) of the extra columns.
        base: Folder of the list.

    Raises:
        ValueError: A row has no valid start or duration.
    """

    def __init__(self, rows: list[dict], column: str, schema: Any, base: Path):
        self.schema, self.selection = schema, {"column": column}
        self._recordings = RecentValues()  # path -> channels
        items = []
        for number, row in enumerate(rows, start=1):
            start, duration = (_seconds(row, name, number) for name in (START, DURATION))
            id = row["id"] if row.get("id") is not None else f"{row[column]}#{start:g}+{duration:g}"
            extra_columns = {name: row.get(name) for name in schema.names}
            items.append(Item(str(id), (str(base / row[column]), start, duration, extra_columns)))
        self.items = sorted(items, key=lambda item: item.locator[:2])

    def read(self, locator: Any) -> audio.Channels:
        path, start, duration, _ = locator
        # at the recording's sampling rate: the segment is resampled later, as if it were a file by itself
        recording = self._recordings.get(path, lambda: audio.read_channels(path))
        rate, length = recording.sampling_rate, len(recording.samples)
        if start + duration > length / rate + 0.01:  # durations in lists are rounded
            raise AudioError(
                f"The segment {start:g} s + {duration:g} s ends after {path}, which has {length / rate:g} s.",
                "truncated",
            )
        first, num_samples = round(start * rate), max(1, round(duration * rate))
        samples = recording.samples[first : first + num_samples]
        return audio.Channels(samples, rate, f"the segment at {start:g} s of {path}")

    def extra_columns(self, locator: Any) -> dict[str, Any]:
        return locator[3]


def _seconds(row: Mapping, name: str, number: int) -> float:
    """Return a column of a row as seconds. Raises ValueError with the row's number if it holds no valid time."""
    try:
        value = float(row[name])
    except (KeyError, TypeError, ValueError) as error:
        raise ValueError(f"Row {number} has {row.get(name)!r} as {name}, expected seconds.") from error
    if not (0 <= value < float("inf")) or (name == DURATION and value == 0):
        raise ValueError(
            f"Row {number} has {value} as {name}, expected seconds {'above' if name == DURATION else 'from'} 0."
        )
    return value
