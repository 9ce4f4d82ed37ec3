"""Read token folders, which `wavtokenizer tokenize` writes."""

import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from ..bulk.output import MAX_MANIFEST_BYTES
from ..extras import require
from ..limited_files import one_line, read_json_object


MANIFEST = "manifest.json"
_MAX_SETTINGS = {"codebook_size": 2**16, "hop_length": 2**20, "sampling_rate": 768_000}  # integers, from 1 to this
_TEXT_SETTINGS = ("codebook_fingerprint", "model")
_NEVER_NULL = ("id", "num_samples")  # columns


def is_token_folder(path: str | os.PathLike) -> bool:
    """Return whether the path is an output folder of `tokenize`."""
    return Path(path, MANIFEST).is_file() and Path(path, "data").is_dir()


@dataclass
class Index:
    """
    Location of every row of a token folder, in the order of its files.

    Attributes:
        files: Index of the file in `TokenFolder.files`, (N,).
        rows: Index of the row in that file, (N,).
        columns: Values of the requested columns by name, (N,) each.
    """

    files: np.ndarray
    rows: np.ndarray
    columns: dict[str, np.ndarray]

    def __len__(self) -> int:
        return len(self.files)


class TokenFolder:
    """
    Reader of the rows of a token folder.

    Args:
        folder: Output folder of `tokenize`, complete or not.

    Attributes:
        settings: Settings of the tokenization, from manifest.json: `codebook_fingerprint`, `codebook_size`,
            `hop_length`, `sampling_rate`, `model` and more.
        complete: Whether every clip of the source either has a row or failed.
        column_names: Names of the columns.

    Raises:
        ValueError: The path is not a token folder, or the folder is damaged.
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
        self._cached_group: tuple[Any, Any] = (None, None)  # key and table of the row group that was read last

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_cached_group": (None, None)}

    def _check_settings(self) -> None:
        settings = self.settings if isinstance(self.settings, dict) else {}
        wrong = [name for name in _TEXT_SETTINGS if not isinstance(settings.get(name), str)]
        wrong += [
            name for name, maximum in _MAX_SETTINGS.items()
            if type(settings.get(name)) is not int or not 1 <= settings[name] <= maximum
        ]  # fmt: skip
        if wrong:
            raise ValueError(
                f"{self.folder / MANIFEST} is damaged: its settings have {wrong[0]}={settings.get(wrong[0])!r:.100}. "
                "Run `tokenize` again."
            )

    @contextmanager
    def _open(self, path: Path) -> Iterator:
        """
        Open a Parquet file with verification of its page checksums.

        Raises ValueError if the file is damaged. Errors of reading inside the `with` block become ValueError too.
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
        Return the location of every row.

        Args:
            columns: Names of columns to read for every row.

        Raises:
            ValueError: A column is missing, or the folder holds no rows.
        """
        if missing := sorted(set(columns) - set(self.column_names)):
            raise ValueError(f"{self.folder} has no column {missing[0]!r}, but {', '.join(self.column_names)}.")
        files, rows = [np.zeros(0, np.int32)], [np.zeros(0, np.int32)]
        values: dict[str, list] = {name: [] for name in columns}
        for file_index, path in enumerate(self.files):
            with self._open(path) as file:
                size = file.metadata.num_rows
                if columns and size:
                    table = file.read(columns=list(columns))
                    for name in columns:
                        if name in _NEVER_NULL and table[name].null_count:
                            raise ValueError(f"it has rows without {name}")
                        values[name].append(table[name].to_numpy())
            files.append(np.full(size, file_index, np.int32))
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
        Return the numbers of samples and of codes of every row, each (N,) int64.

        Raises ValueError for a row whose two numbers do not match, or a folder without rows.
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
                    num_codes = compute.fill_null(compute.list_value_length(table["audio_codes"]), 0).to_numpy()
                    codes.append(num_codes.astype(np.int64))
                    matches = (samples[-1] > 0) & (-(-samples[-1] // self.hop_length) == codes[-1])
                    if not matches.all():
                        row = int(np.argmin(matches))
                        raise ValueError(
                            f"the row {table['id'][row].as_py()!r} has {codes[-1][row]} codes of {self.hop_length} "
                            f"samples each for num_samples={table['num_samples'][row].as_py()}"
                        )
        if sum(map(len, samples)) == 0:
            raise ValueError(f"{self.folder} holds no rows. Look at its failures.jsonl.")
        return np.concatenate(samples), np.concatenate(codes)

    def read(self, index: Index, numbers: np.ndarray, columns: Sequence[str] | None = None) -> list[dict]:
        """
        Return rows by their positions in an index, in the order of `numbers`.

        Args:
            index: Index of this folder.
            numbers: Positions in the index, (n,).
            columns: Names of the columns to read. Defaults to all.

        Returns:
            One dictionary per row. `audio_codes` is a uint16 array (L,), or None.
        """
        wanted: dict[int, list[tuple[int, int]]] = {}  # file -> its rows, each with its position in the result
        for position, number in enumerate(numbers.tolist()):
            wanted.setdefault(int(index.files[number]), []).append((int(index.rows[number]), position))
        result: list[dict] = [{}] * len(numbers)
        for file, rows in sorted(wanted.items()):
            values = dict(self._read_rows(file, sorted(row for row, _ in rows), columns))
            for row, position in rows:
                result[position] = values.pop(row)
        return result

    def _read_rows(self, file: int, rows: list[int], columns: Sequence[str] | None) -> Iterator[tuple[int, dict]]:
        """Yield rows of one file with their indices. `rows` must be sorted."""
        columns = self.column_names if columns is None else list(columns)
        with self._open(self.files[file]) as parquet_file:
            start = 0
            for group in range(parquet_file.num_row_groups):
                size = parquet_file.metadata.row_group(group).num_rows
                group_rows = [row for row in rows if start <= row < start + size]
                if group_rows:
                    key = (file, group, tuple(columns))
                    if self._cached_group[0] != key:
                        self._cached_group = (key, parquet_file.read_row_group(group, columns=columns))
                    table = self._cached_group[1].take([row - start for row in group_rows])
                    yield from zip(group_rows, _to_rows(table), strict=True)
                start += size

    def iter_rows(self, columns: Sequence[str] | None = None) -> Iterator[dict]:
        """Yield all rows, file by file."""
        for file_index, path in enumerate(self.files):
            with self._open(path) as file:
                size = file.metadata.num_rows
            yield from (row for _, row in self._read_rows(file_index, list(range(size)), columns))

    def problem(self, row: dict) -> str | None:
        """Return why a row with `audio_codes` and `num_samples` is invalid, or None if it is valid."""
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
        Raise ValueError unless a model has the codebook, the sampling rate and the hop length of these rows.
        """
        model.check_codebook_fingerprint(self.codebook_fingerprint)
        for name in ("sampling_rate", "hop_length"):
            if getattr(self, name) != getattr(model.config, name):
                raise ValueError(
                    f"The tokens in {self.folder} have {name}={getattr(self, name)}, and the model has "
                    f"{getattr(model.config, name)}. Use the model that made the tokens, {self.settings['model']}."
                )

    def find(self, ids: Sequence[str]) -> list[dict]:
        """Return the rows with these ids. Raises ValueError if an id has no row."""
        index = self.index(["id"])
        numbers = {id: number for number, id in enumerate(index.columns["id"])}
        if missing := [id for id in ids if id not in numbers]:
            raise ValueError(
                f"{self.folder} has no row with the id {missing[0]!r}; the first of its {len(index)} ids is "
                f"{index.columns['id'][0]!r}. Clips that failed are in its failures.jsonl."
            )
        return self.read(index, np.array([numbers[id] for id in ids]))


def _wrong_columns(schema: Any) -> str | None:
    """Return the first error in the columns that every token file must have, or None."""
    types = require("pyarrow", "bulk").types
    checks = {
        "id": types.is_string,
        "audio_codes": lambda kind: types.is_list(kind) and types.is_uint16(kind.value_type),
        "num_samples": types.is_int64,
        "codebook_fingerprint": types.is_string,
    }
    for name, has_type in checks.items():
        if name not in schema.names:
            return f"no column {name}"
        if not has_type(schema.field(name).type):
            return f"{name} of type {schema.field(name).type}"
    return None


def _to_rows(table: Any) -> list[dict]:
    """
    Convert a table to dictionaries. Codes stay arrays: lists of Python integers are slow, and 20 times as large.
    """
    columns = {name: table[name].to_pylist() for name in table.column_names if name != "audio_codes"}
    if "audio_codes" in table.column_names:
        codes = table["audio_codes"].combine_chunks()
        offsets, values = codes.offsets.to_numpy(), codes.values.to_numpy()
        validity = codes.is_valid().to_pylist()
        columns["audio_codes"] = [
            values[start:stop] if is_valid else None
            for start, stop, is_valid in zip(offsets[:-1], offsets[1:], validity, strict=True)
        ]
    return [dict(zip(columns, values, strict=True)) for values in zip(*columns.values(), strict=True)]
