"""Token folders, as `wavtokenizer tokenize` writes them, as an input."""

import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from ..extras import require
from ..limited_files import one_line, read_json_object


MANIFEST = "manifest.json"
MAX_MANIFEST_BYTES = 2**28  # a million parts
_NUMBERS = {"codebook_size": 2**16, "hop_length": 2**20, "sampling_rate": 768_000}  # of the settings -> largest value
_TEXTS = ("codebook_fingerprint", "model")  # of the settings


def is_token_folder(path: str | os.PathLike) -> bool:
    """Whether the path is an output folder of `tokenize`."""
    return Path(path, MANIFEST).is_file() and Path(path, "data").is_dir()


@dataclass
class Index:
    """
    Where the rows of a token folder lie, in the order of its files: `files` and `rows` (N,), and columns by name (N,).
    """

    files: np.ndarray
    rows: np.ndarray
    columns: dict[str, np.ndarray]

    def __len__(self) -> int:
        return len(self.files)


class TokenFolder:
    """
    The rows of a token folder.

    Args:
        folder: what `tokenize` wrote, complete or not.

    Attributes:
        settings: what the rows were made with, as in manifest.json: `codebook_fingerprint`, `codebook_size`,
            `hop_length`, `sampling_rate`, `model` and more.
        complete: whether every clip of the source has a row or failed.
        column_names: names of the columns.

    Raises:
        ValueError: it is not such a folder, is damaged, or holds no rows.
    """

    def __init__(self, folder: str | os.PathLike):
        self.folder = Path(folder)
        if not is_token_folder(folder):
            raise ValueError(f"{folder} is not a token folder, expected one that `wavtokenizer tokenize` wrote.")
        manifest = read_json_object(self.folder / MANIFEST, MAX_MANIFEST_BYTES)
        self.settings: dict[str, Any] = manifest.get("settings") or {}
        self.complete = manifest.get("complete") is True
        self._check_settings()
        self.hop_length, self.sampling_rate = self.settings["hop_length"], self.settings["sampling_rate"]
        self.codebook_fingerprint = self.settings["codebook_fingerprint"]
        self.files = sorted((self.folder / "data").glob("*.parquet"))
        if missing := sorted(set(manifest.get("files") or ()) - {path.name for path in self.files}):
            raise ValueError(
                f"{self.folder / 'data' / missing[0]} is missing, and manifest.json lists it. Run `tokenize` again."
            )
        self.column_names: list[str] = []
        if self.files:
            with self._open(self.files[0]) as file:
                self.column_names = file.schema_arrow.names
        self._held: tuple[Any, Any] = (None, None)  # the row group that was read last

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_held": (None, None)}

    def _check_settings(self) -> None:
        settings = self.settings if isinstance(self.settings, dict) else {}
        wrong = [name for name in _TEXTS if not isinstance(settings.get(name), str)]
        wrong += [
            name for name, most in _NUMBERS.items()
            if type(settings.get(name)) is not int or not 1 <= settings[name] <= most
        ]  # fmt: skip
        if wrong:
            raise ValueError(
                f"{self.folder / MANIFEST} is damaged: its settings have {wrong[0]}={settings.get(wrong[0])!r:.100}. "
                "Run `tokenize` again."
            )

    @contextmanager
    def _open(self, path: Path) -> Iterator:
        """
        A Parquet file, whose page checksums are compared. Raises ValueError if it is damaged, here or in the block.
        """
        parquet, pyarrow = require("pyarrow.parquet", "bulk"), require("pyarrow", "bulk")
        try:
            with parquet.ParquetFile(path, page_checksum_verification=True) as file:
                if wrong := _wrong_columns(file.schema_arrow):
                    raise ValueError(f"it has {wrong}")
                yield file
        except (pyarrow.ArrowException, OSError, ValueError) as error:
            raise ValueError(f"{path} is damaged ({one_line(error)}). Delete it, and run `tokenize` again.") from error

    def index(self, columns: Sequence[str] = ()) -> Index:
        """
        Where each row lies. Raises ValueError for a column that is not there, or a folder without rows.

        Args:
            columns: names of columns to read for every row.
        """
        if missing := sorted(set(columns) - set(self.column_names)):
            raise ValueError(f"{self.folder} has no column {missing[0]!r}, but {', '.join(self.column_names)}.")
        files, rows = [np.zeros(0, np.int32)], [np.zeros(0, np.int32)]
        values: dict[str, list] = {name: [] for name in columns}
        for number, path in enumerate(self.files):
            with self._open(path) as file:
                size = file.metadata.num_rows
                if columns and size:
                    table = file.read(columns=list(columns))
                    for name in columns:
                        if name in _NEVER_NULL and table[name].null_count:
                            raise ValueError(f"it has rows without {name}")
                        values[name].append(table[name].to_numpy())
            files.append(np.full(size, number, np.int32))
            rows.append(np.arange(size, dtype=np.int32))
        index = Index(
            np.concatenate(files),
            np.concatenate(rows),
            {name: np.concatenate(parts) if parts else np.zeros(0) for name, parts in values.items()},
        )
        if len(index) == 0:
            raise ValueError(f"{self.folder} holds no rows. Look at its failures.jsonl.")
        return index

    def lengths(self) -> tuple[np.ndarray, np.ndarray]:
        """
        Samples and codes of every row, each (N,) int64. Raises ValueError for a row whose lengths do not fit together.
        """
        compute = require("pyarrow.compute", "bulk")
        samples, codes = [np.zeros(0, np.int64)], [np.zeros(0, np.int64)]
        for path in self.files:
            with self._open(path) as file:
                for group in range(file.num_row_groups):
                    table = file.read_row_group(group, columns=["id", "num_samples", "audio_codes"])
                    if table["num_samples"].null_count:
                        raise ValueError("it has rows without num_samples")
                    samples.append(table["num_samples"].to_numpy())
                    found = compute.fill_null(compute.list_value_length(table["audio_codes"]), 0).to_numpy()
                    codes.append(found.astype(np.int64))
                    fits = (samples[-1] > 0) & (-(-samples[-1] // self.hop_length) == codes[-1])
                    if not fits.all():
                        row = int(np.argmin(fits))
                        raise ValueError(
                            f"the row {table['id'][row].as_py()!r} has {codes[-1][row]} codes of {self.hop_length} "
                            f"samples each for num_samples={table['num_samples'][row].as_py()}"
                        )
        if sum(map(len, samples)) == 0:
            raise ValueError(f"{self.folder} holds no rows. Look at its failures.jsonl.")
        return np.concatenate(samples), np.concatenate(codes)

    def read(self, index: Index, numbers: np.ndarray, columns: Sequence[str] | None = None) -> list[dict]:
        """Rows of an index by their numbers in it, in that order; `audio_codes` as uint16 arrays (L,), or None."""
        places: dict[Any, Any] = {}  # file -> rows and their positions; then (file, row) -> values
        for position, number in enumerate(numbers.tolist()):
            places.setdefault(int(index.files[number]), []).append((int(index.rows[number]), position))
        result: list[dict] = [{}] * len(numbers)
        for file, wanted in sorted(places.items()):
            for row, values in self._rows_of(file, sorted(row for row, _ in wanted), columns):
                places[file, row] = values
            for row, position in wanted:
                result[position] = places.pop((file, row))
        return result

    def _rows_of(self, file: int, rows: list[int], columns: Sequence[str] | None) -> Iterator[tuple[int, dict]]:
        """The rows of one file, whose numbers are sorted."""
        columns = self.column_names if columns is None else list(columns)
        with self._open(self.files[file]) as opened:
            start = 0
            for group in range(opened.num_row_groups):
                size = opened.metadata.row_group(group).num_rows
                inside = [row for row in rows if start <= row < start + size]
                if inside:
                    key = (file, group, tuple(columns))
                    if self._held[0] != key:
                        self._held = (key, opened.read_row_group(group, columns=columns))
                    table = self._held[1].take([row - start for row in inside])
                    yield from zip(inside, _to_rows(table), strict=True)
                start += size

    def iter_rows(self, columns: Sequence[str] | None = None) -> Iterator[dict]:
        """All rows, file by file."""
        for number, path in enumerate(self.files):
            with self._open(path) as file:
                size = file.metadata.num_rows
            yield from (row for _, row in self._rows_of(number, list(range(size)), columns))

    def problem(self, row: dict) -> str | None:
        """Why a row with `audio_codes` and `num_samples` cannot be used, or None."""
        codes, num_samples = row["audio_codes"], row["num_samples"]
        if codes is None or len(codes) == 0:
            return "it has no codes"
        if num_samples is None or num_samples < 1 or -(-num_samples // self.hop_length) != len(codes):
            return f"it has {len(codes)} codes of {self.hop_length} samples each for num_samples={num_samples}"
        if (largest := int(codes.max())) >= self.settings["codebook_size"]:
            return f"it has the code {largest}, expected codes below {self.settings['codebook_size']}"
        return None

    def check_model(self, model: Any) -> None:
        """
        Raise ValueError unless a model has the codebook, the sampling rate and the samples per code of these rows.
        """
        model.check_codebook_fingerprint(self.codebook_fingerprint)
        for name in ("sampling_rate", "hop_length"):
            if getattr(self, name) != getattr(model.config, name):
                raise ValueError(
                    f"The tokens in {self.folder} have {name}={getattr(self, name)}, and the model has "
                    f"{getattr(model.config, name)}. Use the model that made them, {self.settings['model']}."
                )

    def find(self, ids: Sequence[str]) -> list[dict]:
        """The rows of these ids. Raises ValueError for an id that has none."""
        index = self.index(["id"])
        numbers = {id: number for number, id in enumerate(index.columns["id"])}
        if missing := [id for id in ids if id not in numbers]:
            raise ValueError(
                f"{self.folder} has no row with the id {missing[0]!r}; the first of its {len(index)} ids is "
                f"{index.columns['id'][0]!r}. Clips that failed are in its failures.jsonl."
            )
        return self.read(index, np.array([numbers[id] for id in ids]))


_NEVER_NULL = ("id", "num_samples")


def _wrong_columns(schema: Any) -> str | None:
    """What is wrong with the columns that every token file has, or None."""
    types = require("pyarrow", "bulk").types
    checks = {
        "id": types.is_string,
        "audio_codes": lambda kind: types.is_list(kind) and types.is_uint16(kind.value_type),
        "num_samples": types.is_int64,
        "codebook_fingerprint": types.is_string,
    }
    for name, is_right in checks.items():
        if name not in schema.names:
            return f"no column {name}"
        if not is_right(schema.field(name).type):
            return f"{name} of type {schema.field(name).type}"
    return None


def _to_rows(table: Any) -> list[dict]:
    """
    A table as dictionaries. Codes stay arrays: as lists of Python's numbers they are slow, and 20 times as large.
    """
    columns = {name: table[name].to_pylist() for name in table.column_names if name != "audio_codes"}
    if "audio_codes" in table.column_names:
        codes = table["audio_codes"].combine_chunks()
        offsets, values = codes.offsets.to_numpy(), codes.values.to_numpy()
        there = codes.is_valid().to_pylist()
        columns["audio_codes"] = [
            values[start:stop] if valid else None
            for start, stop, valid in zip(offsets[:-1], offsets[1:], there, strict=True)
        ]
    return [dict(zip(columns, values, strict=True)) for values in zip(*columns.values(), strict=True)]
