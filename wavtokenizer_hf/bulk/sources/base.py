"""What all sources of clips have in common."""

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
    """One clip: its id, the same in every run over the same source, and where the source finds it."""

    id: str
    locator: Any


class Source:
    """
    Clips, listed when the source is opened and read later, by worker processes.

    Args:
        schema: Schema (pyarrow) of the extra columns, which the output gets too.
        items: All clips, in a fixed order.
        selection: What was taken of a source that has more: its column, config, split and revision, as far as it has
            them.
        passed_over: Files and members of shards that are no clips and belong to none.
    """

    schema: Any
    items: Sequence[Item]
    selection: Mapping[str, str | None] = MappingProxyType({})
    passed_over: Sequence[str] = ()

    def read(self, locator: Any) -> Any:
        """
        Return the audio of a clip, as `audio.load_clip` takes it. Raises ValueError or OSError if it cannot be read.
        """
        raise NotImplementedError

    def extra_columns(self, locator: Any) -> dict[str, Any]:
        """Return the extra columns of a clip."""
        raise NotImplementedError

    def file(self, locator: Any) -> str | None:
        """
        Return the path of the file that holds a clip: its own, or the shard or table that it is in. None for a
        dataset.
        """
        return locator[0] if isinstance(locator, tuple) else None

    def stamp(self, locator: Any) -> Stamp:
        """Return size and time of that file as it is now."""
        try:
            status = os.stat(self.file(locator) or "")
        except (OSError, ValueError):
            return NO_FILE
        return status.st_size, status.st_mtime_ns

    def without_items(self) -> "Source":
        """Return a copy for workers, which get the items of each Parquet file one after another."""
        worker = object.__new__(type(self))
        worker.__dict__.update(self.__dict__, items=(), passed_over=())
        return worker


def relative_path(file: str, base: Path) -> str:
    """Return the path below a folder, with `/` on every system."""
    return Path(os.path.relpath(file, base)).as_posix()


def check_column(names: list[str], column: str, where: str) -> None:
    """Raise ValueError if a table has no such column. `where` names the table."""
    if column not in names:
        raise ValueError(
            f"There is no column {column!r} in {where}, which has {', '.join(names)}. Name the one of sound."
        )


def row_id(value: Any, where: str) -> str:
    """Return the id in a column `id` as text. Raises ValueError if there is none."""
    if value is None:
        raise ValueError(f"A row of {where} has nothing in the column 'id'. Fill it, or rename the column.")
    return str(value)


def typed_field(field: Any) -> Any:
    """Return a field of pyarrow; one of nothing but nulls becomes one of text."""
    pyarrow = require("pyarrow", "bulk")
    return field.with_type(pyarrow.string()) if pyarrow.types.is_null(field.type) else field
