"""
Write the output folder. The Parquet files are the only state: a file that exists is complete.

    data/part-….parquet  one row per clip; the schema's metadata holds the settings, a digest of the rows, and the
                         clips of this file that failed
    manifest.json        settings, totals, and size and checksum of each Parquet file
    failures.jsonl       clips that failed, each with its reason
    README.md            dataset card
"""

import hashlib
import json
import os
from collections.abc import Iterable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np

from .. import __version__
from ..atomic_files import atomic_write
from ..extras import require
from ..limited_files import read_json_object
from .card import GENERATED_MARKER, read_metadata, render_card
from .records import OWN_COLUMNS, Failure, Settings, Stamp, Summary, Tokens


METADATA_KEY = b"wavtokenizer"
"""Key in the metadata of a Parquet schema. Its value is JSON: settings, failures and their stamps, summary, digest."""


def parquet_name(ids: Sequence[str]) -> str:
    """
    Return the name of the Parquet file for these clips.

    The name depends on the ids only, so a file that is written again replaces the earlier one.
    """
    return f"part-{hashlib.sha256(json.dumps(list(ids)).encode()).hexdigest()[:20]}.parquet"


class OutputFolder:
    """
    The output folder of a run of `tokenize`.

    Args:
        folder: Folder that is missing, empty, or of an earlier run with the same settings.
        settings: Settings of the rows.
        extra_schema: Schema (pyarrow) of the extra columns.
        shard: Index of this run's shard, and number of shards.

    Attributes:
        schema: Schema of the rows: the package's own columns, then the extra columns.
        source_metadata: Metadata for the dataset card, from the card of the source.
        card_metadata: Metadata for the dataset card, from the options. It has precedence.
    """

    def __init__(
        self, folder: str | os.PathLike, settings: Settings, extra_schema: Any, shard: tuple[int, int] = (0, 1)
    ):
        self.folder, self.settings, self.shard = Path(folder), settings, shard
        self.schema = _row_schema(extra_schema)
        self.source_metadata: dict[str, Any] = {}
        self.card_metadata: dict[str, Any] = {}

    # -----------------------------------------------------------------------------------------------------------------
    # Opening
    # -----------------------------------------------------------------------------------------------------------------

    @contextmanager
    def open(self) -> Iterator["OutputFolder"]:
        """
        Create or check the folder, and lock the shard until the context ends.

        Raises:
            ValueError: The folder belongs to a run with other settings, or to something else.
            OSError: Another process works on this shard, or the folder cannot be written.
        """
        filelock = require("filelock", "bulk")

        if self.folder.exists() and not self.folder.is_dir():
            raise ValueError(f"{self.folder} is a file, expected the name of a folder.")
        manifest = self.folder / "manifest.json"
        if not manifest.exists() and self.folder.is_dir():
            foreign_names = sorted(path.name for path in self.folder.iterdir() if not path.name.startswith("."))
            foreign_names = [name for name in foreign_names if name != "data"]
            if foreign_names:
                raise ValueError(
                    f"The folder {self.folder} holds {foreign_names[0]} and no manifest.json, so no run of this "
                    "command wrote it. Name a new or an empty folder."
                )
        (self.folder / "data").mkdir(parents=True, exist_ok=True)
        index, number = self.shard
        lock = filelock.FileLock(self.folder / f".shard-{index}-of-{number}.lock", timeout=0)
        try:
            lock.acquire()
        except filelock.Timeout as error:
            raise OSError(
                f"Another process is at work on shard {index} of {number} in {self.folder}. Wait for it, or end it."
            ) from error
        try:
            self._check_number_of_shards()
            self._remove_temporary_files()
            with self._lock_folder():
                if manifest.exists():
                    self._check_settings(manifest)
                else:
                    self._write_manifest(Summary(), complete=False)
            yield self
        finally:
            self._remove_temporary_files()  # of workers that were killed
            lock.release()

    @property
    def _shard_name(self) -> str:
        return f"shard-{self.shard[0]}-of-{self.shard[1]}"

    def _remove_temporary_files(self) -> None:
        """Remove the temporary files of this shard. Its lock is held, so no other process writes them."""
        for path in self.folder.rglob(f".{self._shard_name}-*.partial"):
            path.unlink(missing_ok=True)

    def _lock_folder(self) -> AbstractContextManager[Any]:
        """Return a lock that all shards of this folder share."""
        return require("filelock", "bulk").FileLock(self.folder / ".folder.lock", timeout=600)

    def _check_number_of_shards(self) -> None:
        """
        Raise OSError if a process works on this folder with another number of shards.

        Such shards overlap, so they would encode clips twice.
        """
        filelock = require("filelock", "bulk")

        for path in self.folder.glob(".shard-*.lock"):
            number = path.stem.rsplit("-", 1)[1]
            if number == str(self.shard[1]):
                continue
            try:
                with filelock.FileLock(path, timeout=0):
                    pass
            except filelock.Timeout as error:
                raise OSError(
                    f"A process is at work in {self.folder} on one of {number} shards, and this run would be one of "
                    f"{self.shard[1]}: they would overlap. Wait for it, or use the same number of shards."
                ) from error

    def _check_settings(self, manifest: Path) -> None:
        """Raise ValueError if the manifest has other settings than this run."""
        folder_settings = read_manifest(manifest)["settings"]
        for name, value in asdict(self.settings).items():
            if folder_settings.get(name) != value:
                raise ValueError(
                    f"The folder {self.folder} was made with {name} {folder_settings.get(name)!r}, and this run has "
                    f"{value!r}. Run it as before, or name another folder."
                )

    # -----------------------------------------------------------------------------------------------------------------
    # Parquet files
    # -----------------------------------------------------------------------------------------------------------------

    def iter_files(self) -> Iterator[tuple[Path, dict[str, Any], list[str]]]:
        """
        Yield the path, metadata and ids of each Parquet file, for all shards.

        Raises:
            ValueError: A file is damaged (its footer, or its size in the manifest), or has other settings.
        """
        pyarrow, parquet = require("pyarrow", "bulk"), require("pyarrow.parquet", "bulk")

        listed_files = self._listed_files()
        for path in sorted((self.folder / "data").glob("*.parquet")):
            try:
                with parquet.ParquetFile(path) as file:
                    schema_metadata = file.schema_arrow.metadata or {}
                    ids = file.read(columns=["id"])["id"].to_pylist() if METADATA_KEY in schema_metadata else []
                size = path.stat().st_size
            except FileNotFoundError:  # `remove_clips` of another shard has just deleted it
                continue
            except (pyarrow.ArrowException, OSError) as error:
                reason = " ".join(str(error).split())
                raise ValueError(
                    f"{path} is damaged ({reason}). Delete it, and run again to encode its clips again."
                ) from error
            if METADATA_KEY not in schema_metadata:
                raise ValueError(f"{path} is not of this command. Move it away, or name another folder.")
            metadata = json.loads(schema_metadata[METADATA_KEY])
            entry = listed_files.get(path.name)
            if entry is not None and entry["digest"] == metadata["digest"] and entry["size"] != size:
                raise ValueError(
                    f"{path} is damaged ({size} bytes, manifest.json says {entry['size']}). Delete it, and run again "
                    "to encode its clips again."
                )
            if metadata["settings"] != asdict(self.settings):
                raise ValueError(
                    f"{path} was made with other settings than {self.folder / 'manifest.json'}. Move it away."
                )
            yield path, metadata, ids

    def finished_clips(self) -> tuple[set[str], dict[str, Failure], Summary]:
        """
        Return the ids of clips with a row, the failures by id, and the totals, for all shards.

        Raises:
            ValueError: A file is damaged or has other settings, or two files have a row of the same clip.
        """
        done: set[str] = set()
        failures: dict[str, Failure] = {}
        total = Summary()
        for path, metadata, ids in self.iter_files():
            if not done.isdisjoint(ids):
                duplicate = sorted(done.intersection(ids))[0]
                raise ValueError(f"{path} holds {duplicate!r}, which another file holds too. Delete one of them.")
            done.update(ids)
            failures.update({id: Failure(**failure) for id, failure in metadata["failures"].items()})
            total += Summary(**metadata["summary"])
        # a clip that failed in one run may have a row from a later run
        failures = {id: failure for id, failure in sorted(failures.items()) if id not in done}
        total.num_failures = len(failures)
        return done, failures, total

    def stamps(self) -> dict[str, Stamp]:
        """Return id -> stamp of all clips with a row or a failure, as it was when the clip was read."""
        parquet = require("pyarrow.parquet", "bulk")

        failure_stamps: dict[str, Stamp] = {}
        row_stamps: dict[str, Stamp] = {}
        for path, metadata, ids in self.iter_files():
            failure_stamps.update({id: tuple(stamp) for id, stamp in metadata["failure_stamps"].items()})
            with parquet.ParquetFile(path) as file:
                table = file.read(columns=["source_size", "source_mtime_ns"])
            stamps = zip(table["source_size"].to_pylist(), table["source_mtime_ns"].to_pylist(), strict=True)
            row_stamps.update(zip(ids, stamps, strict=True))
        return failure_stamps | row_stamps

    def remove_clips(self, ids: set[str]) -> None:
        """
        Remove the rows and failures of clips, so that the run encodes them again.

        Each file is replaced in one step. If the process is killed in between, some of the clips are still there.

        Raises:
            ValueError, OSError: A file is damaged, or cannot be written.
        """
        pyarrow, parquet = require("pyarrow", "bulk"), require("pyarrow.parquet", "bulk")

        with self._lock_folder():
            for path, metadata, file_ids in self.iter_files():
                mask = [id not in ids for id in file_ids]
                failures = {id: failure for id, failure in metadata["failures"].items() if id not in ids}
                if all(mask) and len(failures) == len(metadata["failures"]):
                    continue
                with parquet.ParquetFile(path) as file:
                    table = file.read().filter(pyarrow.array(mask, pyarrow.bool_()))
                if not len(table) and not failures:
                    path.unlink()
                    continue
                metadata["failures"] = failures
                metadata["failure_stamps"] = {id: metadata["failure_stamps"][id] for id in failures}
                self._write_table(path, table, metadata)

    def write_file(
        self,
        ids: Sequence[str],
        results: Sequence[Tokens | Failure],
        extra_columns: Sequence[dict],
        stamps: Sequence[Stamp],
    ) -> Summary:
        """
        Write the Parquet file of these clips, in their order.

        Args:
            ids: Ids of the clips.
            results: Codes or failure of each clip.
            extra_columns: Extra columns of each clip.
            stamps: Stamp of each clip's file when it was read.

        Raises:
            OSError: The file cannot be written, for example because the disk is full. Files that exist stay valid.
        """
        pyarrow = require("pyarrow", "bulk")

        indices = [index for index, result in enumerate(results) if isinstance(result, Tokens)]
        failures = {ids[index]: asdict(result) for index, result in enumerate(results) if isinstance(result, Failure)}
        rows = [result for result in results if isinstance(result, Tokens)]
        num_samples = [row.num_samples for row in rows]
        codes = np.concatenate([row.audio_codes for row in rows]) if rows else np.zeros(0, np.uint16)
        offsets = np.cumsum([0, *(len(row.audio_codes) for row in rows)])
        columns: dict[str, Any] = {
            "id": [ids[index] for index in indices],
            "audio_codes": pyarrow.ListArray.from_arrays(
                pyarrow.array(offsets, pyarrow.int32()), pyarrow.array(codes)
            ),
            "num_samples": num_samples,
            "duration": [count / self.settings.sampling_rate for count in num_samples],
            "source_sampling_rate": [row.source_sampling_rate for row in rows],
            "source_channels": [row.source_channels for row in rows],
            "codebook_fingerprint": [self.settings.codebook_fingerprint] * len(rows),
            "warnings": [list(row.warnings) for row in rows],
            "source_size": [stamps[index][0] for index in indices],
            "source_mtime_ns": [stamps[index][1] for index in indices],
            **{name: [extra_columns[index].get(name) for index in indices] for name in self.settings.columns},
        }
        try:
            table = pyarrow.table(columns, schema=self.schema)
        except pyarrow.ArrowException as error:
            raise ValueError(f"The extra columns do not have the types {self.settings.columns}: {error}") from error
        failure_stamps = {id: stamp for id, stamp in zip(ids, stamps, strict=True) if id in failures}
        metadata = {"settings": asdict(self.settings), "failures": failures, "failure_stamps": failure_stamps}
        return self._write_table(self.folder / "data" / parquet_name(ids), table, metadata)

    def _write_table(self, path: Path, table: Any, metadata: dict[str, Any]) -> Summary:
        """Write a Parquet file. Its summary and digest are added to the metadata."""
        parquet = require("pyarrow.parquet", "bulk")

        summary = summary_of(table, len(metadata["failures"]))
        metadata = {**metadata, "summary": asdict(summary), "digest": digest_of(table, metadata)}
        table = table.replace_schema_metadata({**(self.schema.metadata or {}), METADATA_KEY: json.dumps(metadata)})
        with self._atomic_write(path) as temporary_path:
            if len(table):
                parquet.write_table(
                    table, temporary_path, compression="zstd", row_group_size=10_000, write_page_checksum=True
                )
            else:  # write_table would write an empty row group, and load_dataset (datasets 5.2) fails on it
                parquet.ParquetWriter(temporary_path, table.schema).close()
        return summary

    @contextmanager
    def _atomic_write(self, path: Path) -> Iterator[Path]:
        """Call `atomic_write` with the shard in the temporary name, by which the next run finds leftover files."""
        try:
            with atomic_write(path, prefix=f".{self._shard_name}-") as temporary_path:
                yield temporary_path
        except OSError as error:
            raise OSError(f"Cannot write {path}: {error}. Finished files stay valid; run again to go on.") from error

    # -----------------------------------------------------------------------------------------------------------------
    # manifest.json, failures.jsonl and README.md
    # -----------------------------------------------------------------------------------------------------------------

    def summarize(self, all_ids: Iterable[str] | None = None) -> tuple[Summary, dict[str, Failure]]:
        """
        Write manifest.json, failures.jsonl and README.md again. Return the totals, and the failures by id.

        Args:
            all_ids: Ids of all clips of the source. If each has a row or failed, the manifest has `"complete": true`.
        """
        with self._lock_folder():
            done, failures, total = self.finished_clips()
            complete = all_ids is not None and all(id in done or id in failures for id in all_ids)
            lines = [json.dumps({"id": id, **asdict(failure)}, ensure_ascii=False) for id, failure in failures.items()]
            self._write_text("failures.jsonl", "".join(line + "\n" for line in lines))
            readme = self.folder / "README.md"
            if not readme.exists() or GENERATED_MARKER.encode() in readme.read_bytes():
                self._write_card(readme, total, complete)
            self._write_manifest(total, complete)
        return total, failures

    def _write_card(self, readme: Path, total: Summary, complete: bool) -> None:
        """
        Write README.md, with the metadata that the user added to it.

        A card whose metadata cannot be parsed stays as it is.
        """
        generated = ("size_categories", "tags", "dataset_info")
        try:
            added = {name: value for name, value in read_metadata(readme).items() if name not in generated and value}
        except ValueError:
            return
        metadata = {**self.source_metadata, **added, **self.card_metadata}
        self._write_text("README.md", render_card(self.settings, self.schema, total, complete, metadata))

    def _listed_files(self) -> dict[str, dict[str, Any]]:
        """Return file name -> size, sha256 and digest, as the manifest lists them. Empty without a manifest."""
        path = self.folder / "manifest.json"
        return read_manifest(path)["files"] if path.exists() else {}

    def _current_files(self) -> dict[str, dict[str, Any]]:
        """
        Return file name -> size, sha256 and digest of the Parquet files that exist.

        Only files that are not in the manifest, or have another digest there, are read for their checksum.
        """
        listed_files, files = self._listed_files(), {}
        for path, metadata, _ in self.iter_files():
            entry = listed_files.get(path.name)
            if entry is None or entry["digest"] != metadata["digest"]:
                entry = {"size": path.stat().st_size, "sha256": sha256_of(path), "digest": metadata["digest"]}
            files[path.name] = entry
        return files

    def _write_manifest(self, total: Summary, complete: bool) -> None:
        manifest = {
            "settings": asdict(self.settings),
            "complete": complete,
            **asdict(total),
            "hours": total.num_samples / self.settings.sampling_rate / 3600,
            "written_by": f"wavtokenizer_hf {__version__}",
            "files": self._current_files(),
        }
        self._write_text("manifest.json", json.dumps(manifest, indent=1, ensure_ascii=False) + "\n")

    def _write_text(self, name: str, text: str) -> None:
        with self._atomic_write(self.folder / name) as temporary_path:
            temporary_path.write_text(text, encoding="utf-8")


def _row_schema(extra_schema: Any) -> Any:
    """Return the schema of the rows: the package's own columns, then the extra columns."""
    pyarrow = require("pyarrow", "bulk")
    own_columns = [
        ("id", pyarrow.string()),
        ("audio_codes", pyarrow.list_(pyarrow.uint16())),
        ("num_samples", pyarrow.int64()),
        ("duration", pyarrow.float64()),
        ("source_sampling_rate", pyarrow.int32()),
        ("source_channels", pyarrow.int16()),
        ("codebook_fingerprint", pyarrow.string()),
        ("warnings", pyarrow.list_(pyarrow.string())),
        ("source_size", pyarrow.int64()),
        ("source_mtime_ns", pyarrow.int64()),
    ]
    assert tuple(name for name, _ in own_columns) == OWN_COLUMNS
    schema = pyarrow.schema([*own_columns, *((field.name, field.type) for field in extra_schema)])
    if b"huggingface" not in (extra_schema.metadata or {}):
        return schema
    # a dataset's features hold more than its column types, such as the names of a ClassLabel
    features = require("datasets", "bulk").Features
    return features({**features.from_arrow_schema(schema), **features.from_arrow_schema(extra_schema)}).arrow_schema


MAX_MANIFEST_BYTES = 2**28  # enough for a million Parquet files


def read_manifest(path: Path) -> dict[str, Any]:
    """Read manifest.json. Raises ValueError if it is damaged."""
    content = read_json_object(path, MAX_MANIFEST_BYTES)
    if not isinstance(content.get("settings"), dict):
        raise ValueError(f"{path} is damaged: it has no settings. Name another folder.")
    files = content.setdefault("files", {})
    if not isinstance(files, dict) or not all(
        isinstance(entry, dict) and {"size", "sha256", "digest"} <= entry.keys() for entry in files.values()
    ):
        raise ValueError(f"{path} is damaged: its list of files is invalid. Name another folder.")
    return content


def summary_of(table: Any, num_failures: int) -> Summary:
    """Return the totals of a table of rows."""
    compute = require("pyarrow.compute", "bulk")
    num_warned = int((_lengths(table["warnings"]) > 0).sum())
    num_samples = compute.sum(table["num_samples"]).as_py() or 0
    return Summary(len(table), num_failures, num_samples, int(_lengths(table["audio_codes"]).sum()), num_warned)


def digest_of(table: Any, metadata: dict[str, Any]) -> str:
    """
    Return a hash of the rows and failures of a Parquet file, 16 hex digits.

    It depends on the content only, not on how the file encodes or compresses it.
    """
    pyarrow = require("pyarrow", "bulk")
    digest = hashlib.sha256()
    digest.update(json.dumps([metadata["failures"], metadata["failure_stamps"]], sort_keys=True).encode())
    for name in table.column_names:
        column = table[name]
        if name == "audio_codes":
            digest.update(_lengths(column).astype("<i8").tobytes())
            for chunk in column.chunks:
                digest.update(chunk.flatten().to_numpy(zero_copy_only=False).astype("<u2").tobytes())
            continue
        if pyarrow.types.is_temporal(column.type):  # Python's times have no nanoseconds
            column = column.cast(pyarrow.int64() if column.type.bit_width == 64 else pyarrow.int32())
        digest.update(repr((name, column.to_pylist())).encode("utf-8", "surrogatepass"))
    return digest.hexdigest()[:16]


def sha256_of(path: Path) -> str:
    """Return the SHA-256 checksum of a file, in hex digits."""
    with path.open("rb") as file:
        digest = hashlib.sha256()
        while block := file.read(2**20):
            digest.update(block)
    return digest.hexdigest()


def _lengths(column: Any) -> np.ndarray:
    """Return the number of values in each row of a column of lists, 0 for null."""
    compute = require("pyarrow.compute", "bulk")
    return compute.fill_null(compute.list_value_length(column), 0).to_numpy().astype(np.int64)
