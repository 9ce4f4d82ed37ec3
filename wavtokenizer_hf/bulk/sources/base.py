"""Base class of the sources of clips, and helpers that they share."""

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType
from typing import Any

from ...extras import require
from ..records import NO_FILE, Stamp


@dataclass(frozen=True)
class Item:
    """
    One clip of a source, before its audio is read.

    Args:
        id: Id of the clip, the same in every run over the same source.
        locator: Position of the clip in the source. Each class of sources has its own kind.
    """

    id: str
    locator: Any


class Source:
    """
    Source of clips. It lists them when it is opened. Worker processes read them later.

    Attributes:
        schema: Schema (pyarrow) of the extra columns, which are copied to the output.
        items: All clips, in a fixed order.
        selection: Column, config, split and revision that were selected, as far as this kind of source has them.
        passed_over: Files, and members of tar shards, that were skipped because they belong to no clip.
    """

    schema: Any
    items: Sequence[Item]
    selection: Mapping[str, str | None] = MappingProxyType({})
    passed_over: Sequence[str] = ()

    def read(self, locator: Any) -> Any:
        """
        Return the audio of a clip, as `audio.load_clip` takes it.

        Raises:
            ValueError, OSError: The audio cannot be read.
        """
        raise NotImplementedError

    def extra_columns(self, locator: Any) -> dict[str, Any]:
        """Return the extra columns of a clip."""
        raise NotImplementedError

    def file(self, locator: Any) -> str | None:
        """Return the path of the audio file, tar shard or table with a clip. None for a dataset."""
        return locator[0] if isinstance(locator, tuple) else None

    def stamp(self, locator: Any) -> Stamp:
        """Return the current size and time of the file with a clip."""
        try:
            status = os.stat(self.file(locator) or "")
        except (OSError, ValueError):
            return NO_FILE
        return status.st_size, status.st_mtime_ns

    def without_items(self) -> "Source":
        """Return a copy without the list of clips, for workers: they get the clips of one Parquet file at a time."""
        source = object.__new__(type(self))
        source.__dict__.update(self.__dict__, items=(), passed_over=())
        return source


def relative_path(file: str, base: Path) -> str:
    """Return the path of a file relative to a folder, with `/` on every system."""
    return Path(os.path.relpath(file, base)).as_posix()


def check_column(names: list[str], column: str, where: str) -> None:
    """Raise ValueError if a table has no such column. `where` names the table."""
    if column not in names:
        raise ValueError(
            f"There is no column {column!r} in {where}, which has {', '.join(names)}. Name the column with the audio."
        )


def row_id(value: Any, where: str) -> str:
    """Return a value of the column `id` as text. Raises ValueError for null. `where` names the table."""
    if value is None:
        raise ValueError(f"A row of {where} has nothing in the column 'id'. Fill it, or rename the column.")
    return str(value)


def typed_field(field: Any) -> Any:
    """Return a pyarrow field. A field of type null, whose values are all missing, gets the type string."""
    pyarrow = require("pyarrow", "bulk")
    return field.with_type(pyarrow.string()) if pyarrow.types.is_null(field.type) else field
