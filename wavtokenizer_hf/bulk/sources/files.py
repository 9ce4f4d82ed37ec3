"""Read clips from audio files, and from lists of audio files."""

import csv
import json
from pathlib import Path
from typing import Any

from ...extras import require
from .base import Item, Source, typed_field
from .segments import SegmentSource


LIST_EXTENSIONS = (".txt", ".csv", ".jsonl")
PATH_COLUMNS = ("audio", "path", "file_name")  # default columns of the paths in a list, in order of preference


class FileSource(Source):
    """Audio files. A locator is (path, extra columns)."""

    def __init__(self, items: list[Item], schema: Any = None, column: str | None = None):
        self.items = items
        self.selection = {} if column is None else {"column": column}
        self.schema = require("pyarrow", "bulk").schema([]) if schema is None else schema

    def read(self, locator: tuple[str, dict]) -> str:
        return locator[0]

    def extra_columns(self, locator: tuple[str, dict]) -> dict[str, Any]:
        return locator[1]


_SURPLUS_FIELDS = "more fields than the header"  # key of the fields in a CSV row that have no column


def open_list(path: Path, column: str | None) -> Source:
    """
    Open a list (.txt, .csv or .jsonl) of paths or of segments.

    The readers of pyarrow are not used. They guess types (`007` becomes 7, text becomes timestamps), refuse file names
    that are not UTF-8, and give no row numbers in errors.

    Args:
        path: Path of the list.
        column: Column of the paths. Defaults to the first of PATH_COLUMNS that the list has.

    Raises:
        ValueError: The list cannot be parsed, a row lacks a path, or a column has values of several types.
    """
    pyarrow = require("pyarrow", "bulk")
    try:
        # utf-8-sig: spreadsheets write a byte order mark; surrogateescape: file names may not be UTF-8
        with path.open(encoding="utf-8-sig", errors="surrogateescape", newline="") as file:
            if path.suffix.lower() == ".txt":
                rows = [{"audio": line.strip()} for line in file if line.strip()]
            elif path.suffix.lower() == ".csv":
                rows = list(csv.DictReader(file, restkey=_SURPLUS_FIELDS))
            else:
                rows = [json.loads(line) for line in file if line.strip()]
    except (ValueError, RecursionError, csv.Error) as error:  # UnicodeDecodeError and JSONDecodeError are ValueErrors
        raise ValueError(f"Cannot read the list {path}: {' '.join(str(error).split())[:300]}") from error
    names = list(dict.fromkeys(name for row in rows for name in row)) if all(isinstance(r, dict) for r in rows) else []
    if rows and column is None:
        column = next((name for name in PATH_COLUMNS if name in names), None)
    if _SURPLUS_FIELDS in names:
        number = next(number for number, row in enumerate(rows, start=1) if _SURPLUS_FIELDS in row)
        raise ValueError(f"Row {number} of {path} has more fields than the {len(names) - 1} of its header.")
    if rows and column not in names:
        raise ValueError(
            f"The list {path} has the columns {names}, expected a column of paths: {', '.join(PATH_COLUMNS)}, or "
            "another one that you name."
        )
    column = column or PATH_COLUMNS[0]  # an empty list has no columns
    has_segments = {"start", "duration"} <= set(names)
    id_column = "id" if "id" in names else column
    # the output has its own `duration`, which is that of the segment
    own_columns = (column, "id", "duration") if has_segments else (column, "id")
    extra_names = [name for name in names if name not in own_columns]
    items = []
    for number, row in enumerate(rows, start=1):
        if not isinstance(row.get(column), str) or row.get(id_column) is None:
            raise ValueError(f"Row {number} of {path} has no text in {column!r} or nothing in {id_column!r}.")
        extra_columns = {name: row.get(name) for name in extra_names}
        items.append(Item(str(row[id_column]), (str(path.parent / row[column]), extra_columns)))
    try:
        table = pyarrow.Table.from_pylist([item.locator[1] for item in items], schema=None) if extra_names else None
    except (pyarrow.ArrowException, OverflowError) as error:
        raise ValueError(f"The columns of {path} are not of one type each: {error}") from error
    fields = [] if table is None else [typed_field(table.schema.field(name)) for name in extra_names]
    if has_segments:
        return SegmentSource(rows, column, pyarrow.schema(fields), path.parent)
    return FileSource(items, pyarrow.schema(fields), column)
