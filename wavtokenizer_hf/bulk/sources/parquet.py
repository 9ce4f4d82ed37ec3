"""Read clips from Parquet files with a column of audio."""

import os
import threading
from pathlib import Path
from typing import Any

from ...extras import require
from .base import Item, Source, check_column, relative_path, row_id, typed_field


class ParquetSource(Source):
    """
    Parquet files with a column of audio: an Audio column (`bytes` or `path`), bytes, or paths relative to the file.

    A locator is (file, index of the row group, index of the row in it). Memory holds one row group at a time.
    """

    def __init__(self, files: list[str], base: Path, column: str):
        parquet, pyarrow = require("pyarrow.parquet", "bulk"), require("pyarrow", "bulk")
        self.column, self.items, schema = column, [], None
        self.selection = {"column": column}
        self._lock = threading.Lock()
        self._cached_group: tuple[Any, Any] = (None, None)  # (file, index) and table of the last row group
        for file in files:
            try:
                with parquet.ParquetFile(file) as opened:
                    file_schema = opened.schema_arrow.remove_metadata()
                    sizes = [opened.metadata.row_group(group).num_rows for group in range(opened.num_row_groups)]
                    check_column(file_schema.names, column, file)
                    ids = opened.read(columns=["id"])["id"].to_pylist() if "id" in file_schema.names else None
            except pyarrow.ArrowException as error:
                raise ValueError(f"Cannot read {file} as Parquet: {error}") from error
            if schema is not None and file_schema != schema:
                raise ValueError(
                    f"{file} has other columns or types than {files[0]}: {file_schema.names}, expected {schema.names}."
                )
            schema, number = file_schema, 0
            for group, size in enumerate(sizes):
                for row in range(size):
                    id = f"{relative_path(file, base)}/{number}" if ids is None else row_id(ids[number], file)
                    self.items.append(Item(id, (file, group, row)))
                    number += 1
        self.schema = pyarrow.schema(
            [typed_field(field) for field in schema or () if field.name not in (column, "id")]
        )

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_lock": None, "_cached_group": (None, None)}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state, _lock=threading.Lock())

    def _row(self, locator: tuple[str, int, int], names: list[str]) -> dict[str, Any]:
        file, group, row = locator
        with self._lock:
            if self._cached_group[0] != (file, group):
                with require("pyarrow.parquet", "bulk").ParquetFile(file) as opened:
                    self._cached_group = ((file, group), opened.read_row_group(group))
            table = self._cached_group[1]
        return table.select(names).slice(row, 1).to_pylist()[0]

    def read(self, locator: tuple[str, int, int]) -> Any:
        return _resolve_path(self._row(locator, [self.column])[self.column], os.path.dirname(locator[0]))

    def extra_columns(self, locator: tuple[str, int, int]) -> dict[str, Any]:
        return self._row(locator, self.schema.names)


def _resolve_path(value: Any, folder: str) -> Any:
    """Resolve the path in a value relative to a folder. Return a value without a path unchanged."""
    if isinstance(value, str):
        return os.path.join(folder, value)
    if isinstance(value, dict) and value.get("bytes") is None and isinstance(value.get("path"), str):
        return os.path.join(folder, value["path"])
    return value
