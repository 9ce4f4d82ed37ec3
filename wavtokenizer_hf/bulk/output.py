"""
The output folder. The Parquet files are the only state: a file that exists is complete.

    data/part-….parquet  one row per clip; the schema's metadata holds the settings, a digest of the rows, and the
                         clips of this file that failed
    manifest.json        settings, totals, and size and checksum of each Parquet file
    failures.jsonl       clips that failed, each with its reason
    README.md            dataset card

A part is one Parquet file. It is named after the ids of its clips.
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
from .card import GENERATED_MARKER, card, read_metadata
from .records import OWN_COLUMNS, Failure, Settings, Stamp, Summary, Tokens


METADATA = b"wavtokenizer"  # key in the schema's metadata


def part_name(ids: Sequence[str]) -> str:
    """
    Return the file name for these clips. It depends on their ids only, so a part that is made again replaces itself.
    """
    return f"part-{hashlib.sha256(json.dumps(list(ids)).encode()).hexdigest()[:20]}.parquet"


class Output:
    """
    An output folder of this kind of rows.

    Args:
        folder: new, empty, or begun with the same settings.
        settings: what the rows are made with.
        schema: of the carried columns.
        shard: index and number of shards, of which this process makes one.
    """

    def __init__(self, folder: str | os.PathLike, settings: Settings, schema: Any, shard: tuple[int, int] = (0, 1)):
        self.folder, self.settings, self.shard = Path(folder), settings, shard
        self.schema = _schema(settings, schema)
        self.source_metadata: dict[str, Any] = {}  # of the card: from the card of the source
        self.card_metadata: dict[str, Any] = {}  # of the card: from the options, which have precedence

    # -----------------------------------------------------------------------------------------------------------------
    # Opening
    # -----------------------------------------------------------------------------------------------------------------

    @contextmanager
    def open(self) -> Iterator["Output"]:
        """
        Checks or begins the folder, and keeps other runs of the same shard out until it is left.

        Raises:
            ValueError: the folder is of another run, or something else.
            OSError: another process works on it, or it cannot be written.
        """
        filelock = require("filelock", "bulk")

        if self.folder.exists() and not self.folder.is_dir():
            raise ValueError(f"{self.folder} is a file, expected the name of a folder.")
        manifest = self.folder / "manifest.json"
        if not manifest.exists() and self.folder.is_dir():
            strange = sorted(path.name for path in self.folder.iterdir() if not path.name.startswith("."))
            strange = [name for name in strange if name != "data"]
            if strange:
                raise ValueError(
                    f"The folder {self.folder} holds {strange[0]} and no manifest.json, so it is not of a run of this "
                    "command. Name a new or an empty folder."
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
            self._refuse_other_shards()
            self._remove_leftovers()
            with self._alone():
                if manifest.exists():
                    self._compare(manifest)
                else:
                    self._write_manifest(Summary(), complete=False)
            yield self
        finally:
            self._remove_leftovers()  # of workers that were ended with this run
            lock.release()

    @property
    def _tag(self) -> str:
        return f"shard-{self.shard[0]}-of-{self.shard[1]}"

    def _remove_leftovers(self) -> None:
        """Temporary files of this shard, whose lock is held: nobody else is writing them."""
        for leftover in self.folder.rglob(f".{self._tag}-*.partial"):
            leftover.unlink(missing_ok=True)

    def _alone(self) -> AbstractContextManager[Any]:
        """Among the shards that work on this folder."""
        return require("filelock", "bulk").FileLock(self.folder / ".folder.lock", timeout=600)

    def _refuse_other_shards(self) -> None:
        """Shards of n and of m overlap, and would make clips twice."""
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
                    f"A process is at work in {self.folder} on one of {number} shards, and this one would be one of "
                    f"{self.shard[1]}: they would overlap. Wait for it, or take the same number."
                ) from error

    def _compare(self, manifest: Path) -> None:
        before = read_manifest(manifest)["settings"]
        for name, value in asdict(self.settings).items():
            if before.get(name) != value:
                raise ValueError(
                    f"The folder {self.folder} was made with {name} {before.get(name)!r}, and this run has "
                    f"{value!r}. Run it as before, or name another folder."
                )

    # -----------------------------------------------------------------------------------------------------------------
    # Parts
    # -----------------------------------------------------------------------------------------------------------------

    def parts(self) -> Iterator[tuple[Path, dict[str, Any], Any]]:
        """
        Path, metadata and ids of each part, of all shards.

        Raises:
            ValueError: A part is damaged, by its footer or its size in the manifest, or of other settings.
        """
        pyarrow, parquet = require("pyarrow", "bulk"), require("pyarrow.parquet", "bulk")

        known = self._known_files()
        for path in sorted((self.folder / "data").glob("*.parquet")):
            try:
                with parquet.ParquetFile(path) as file:
                    metadata = file.schema_arrow.metadata or {}
                    ids = file.read(columns=["id"])["id"].to_pylist() if METADATA in metadata else []
                size = path.stat().st_size
            except FileNotFoundError:  # another shard has just emptied it, see `drop`
                continue
            except (pyarrow.ArrowException, OSError) as error:
                reason = " ".join(str(error).split())
                raise ValueError(f"{path} is damaged ({reason}). Delete it, and run again to make it anew.") from error
            if METADATA not in metadata:
                raise ValueError(f"{path} is not of this command. Move it away, or name another folder.")
            part = json.loads(metadata[METADATA])
            entry = known.get(path.name)
            if entry is not None and entry["digest"] == part["digest"] and entry["size"] != size:
                raise ValueError(
                    f"{path} is damaged ({size} bytes, manifest.json says {entry['size']}). Delete it, and run again "
                    "to make it anew."
                )
            if part["settings"] != asdict(self.settings):
                raise ValueError(
                    f"{path} was made with other settings than {self.folder / 'manifest.json'}. Move it away."
                )
            yield path, part, ids

    def finished(self) -> tuple[set[str], dict[str, Failure], Summary]:
        """
        Ids of the clips that have rows, reasons of those that failed, and totals, over the parts of all shards.

        Raises:
            ValueError: a part is damaged, of other settings, or there are two rows of one clip.
        """
        done: set[str] = set()
        failures: dict[str, Failure] = {}
        total = Summary()
        for path, part, ids in self.parts():
            if not done.isdisjoint(ids):
                twice = sorted(done.intersection(ids))[0]
                raise ValueError(f"{path} holds {twice!r}, which another part holds too. Delete one of them.")
            done.update(ids)
            failures.update({id: Failure(**failure) for id, failure in part["failures"].items()})
            total += Summary(**part["summary"])
        failures = {
            id: failure for id, failure in sorted(failures.items()) if id not in done
        }  # else it went well later
        total.num_failures = len(failures)
        return done, failures, total

    def stamps(self) -> dict[str, Stamp]:
        """Id -> size and time that its file had when the clip was read, of all clips with a row or a failure."""
        parquet = require("pyarrow.parquet", "bulk")

        failed: dict[str, Stamp] = {}
        done: dict[str, Stamp] = {}
        for path, part, ids in self.parts():
            failed.update({id: tuple(stamp) for id, stamp in part["failure_stamps"].items()})
            with parquet.ParquetFile(path) as file:
                table = file.read(columns=["source_size", "source_mtime_ns"])
            stamps = zip(table["source_size"].to_pylist(), table["source_mtime_ns"].to_pylist(), strict=True)
            done.update(zip(ids, stamps, strict=True))
        return failed | done

    def drop(self, ids: set[str]) -> None:
        """
        Remove the rows and failures of clips, which are then done again like new ones.

        Each part is rewritten in one step; a kill in between leaves some of the clips as they were.

        Raises:
            ValueError, OSError: A part is damaged, or cannot be written.
        """
        pyarrow, parquet = require("pyarrow", "bulk"), require("pyarrow.parquet", "bulk")

        with self._alone():
            for path, part, part_ids in self.parts():
                keep = [id not in ids for id in part_ids]
                failures = {id: failure for id, failure in part["failures"].items() if id not in ids}
                if all(keep) and len(failures) == len(part["failures"]):
                    continue
                with parquet.ParquetFile(path) as file:
                    table = file.read().filter(pyarrow.array(keep, pyarrow.bool_()))
                if not len(table) and not failures:
                    path.unlink()
                    continue
                part["failures"] = failures
                part["failure_stamps"] = {id: part["failure_stamps"][id] for id in failures}
                self._write_table(path, table, part)

    def write_part(
        self,
        ids: Sequence[str],
        tokens: Sequence[Tokens | Failure],
        extra_columns: Sequence[dict],
        stamps: Sequence[Stamp],
    ) -> Summary:
        """
        Writes the part of these clips, in their order.

        Args:
            ids: of all clips of the part.
            tokens: what became of each.
            extra_columns: Extra columns of each clip.
            stamps: size and time of the file of each when it was read.

        Raises:
            OSError: it cannot be written, as on a full disk. What is finished stays as it is.
        """
        pyarrow = require("pyarrow", "bulk")

        good = [index for index, result in enumerate(tokens) if isinstance(result, Tokens)]
        failures = {ids[index]: asdict(result) for index, result in enumerate(tokens) if isinstance(result, Failure)}
        rows = [result for result in tokens if isinstance(result, Tokens)]
        num_samples = [row.num_samples for row in rows]
        codes = np.concatenate([row.audio_codes for row in rows]) if rows else np.zeros(0, np.uint16)
        offsets = np.cumsum([0, *(len(row.audio_codes) for row in rows)])
        columns: dict[str, Any] = {
            "id": [ids[index] for index in good],
            "audio_codes": pyarrow.ListArray.from_arrays(
                pyarrow.array(offsets, pyarrow.int32()), pyarrow.array(codes)
            ),
            "num_samples": num_samples,
            "duration": [count / self.settings.sampling_rate for count in num_samples],
            "source_sampling_rate": [row.source_sampling_rate for row in rows],
            "source_channels": [row.source_channels for row in rows],
            "codebook_fingerprint": [self.settings.codebook_fingerprint] * len(rows),
            "warnings": [list(row.warnings) for row in rows],
            "source_size": [stamps[index][0] for index in good],
            "source_mtime_ns": [stamps[index][1] for index in good],
            **{name: [extra_columns[index].get(name) for index in good] for name in self.settings.columns},
        }
        try:
            table = pyarrow.table(columns, schema=self.schema)
        except pyarrow.ArrowException as error:
            raise ValueError(f"The extra columns do not have the types {self.settings.columns}: {error}") from error
        failed = {id: stamp for id, stamp in zip(ids, stamps, strict=True) if id in failures}
        part = {"settings": asdict(self.settings), "failures": failures, "failure_stamps": failed}
        return self._write_table(self.folder / "data" / part_name(ids), table, part)

    def _write_table(self, path: Path, table: Any, part: dict[str, Any]) -> Summary:
        """Write rows as a part, with `part` and what follows from the rows in the schema's metadata."""
        parquet = require("pyarrow.parquet", "bulk")

        summary = summary_of(table, len(part["failures"]))
        part = {**part, "summary": asdict(summary), "digest": digest_of(table, part)}
        table = table.replace_schema_metadata({**(self.schema.metadata or {}), METADATA: json.dumps(part)})
        with self._replaced(path) as partial:
            if len(table):
                parquet.write_table(
                    table, partial, compression="zstd", row_group_size=10_000, write_page_checksum=True
                )
            else:  # write_table would write a group of no rows, at which load_dataset (datasets 5.2) stops
                parquet.ParquetWriter(partial, table.schema).close()
        return summary

    @contextmanager
    def _replaced(self, path: Path) -> Iterator[Path]:
        """`atomic_write` under a temporary name by which the next run of this shard knows its leftovers."""
        try:
            with atomic_write(path, prefix=f".{self._tag}-") as partial:
                yield partial
        except OSError as error:
            raise OSError(
                f"Cannot write {path}: {error}. What is finished stays valid; run again to go on."
            ) from error

    # -----------------------------------------------------------------------------------------------------------------
    # What is read by people and by load_dataset
    # -----------------------------------------------------------------------------------------------------------------

    def summarize(self, all_ids: Iterable[str] | None = None) -> tuple[Summary, dict[str, Failure]]:
        """Writes manifest.json, failures.jsonl and README.md anew; gives the totals, and the failures.

        `all_ids` are those of the whole source; if all of them have rows or failed, the manifest says "complete".
        """
        with self._alone():
            done, failures, total = self.finished()
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
        Write README.md. Metadata that the user added stays; a card whose metadata cannot be parsed stays as it is.
        """
        own = ("size_categories", "tags", "dataset_info")
        try:
            before = {name: value for name, value in read_metadata(readme).items() if name not in own and value}
        except ValueError:
            return
        metadata = {**self.source_metadata, **before, **self.card_metadata}
        self._write_text("README.md", card(self.settings, self.schema, total, complete, metadata))

    def _known_files(self) -> dict[str, dict[str, Any]]:
        """Name of a part -> its size, sha256 and digest in the manifest, if there is one."""
        path = self.folder / "manifest.json"
        return read_manifest(path)["files"] if path.exists() else {}

    def _files(self) -> dict[str, dict[str, Any]]:
        """The same for all parts as they are. Only those are read whole that the manifest does not know."""
        known, files = self._known_files(), {}
        for path, part, _ in self.parts():
            entry = known.get(path.name)
            if entry is None or entry["digest"] != part["digest"]:
                entry = {"size": path.stat().st_size, "sha256": sha256_of(path), "digest": part["digest"]}
            files[path.name] = entry
        return files

    def _write_manifest(self, total: Summary, complete: bool) -> None:
        manifest = {
            "settings": asdict(self.settings),
            "complete": complete,
            **asdict(total),
            "hours": total.num_samples / self.settings.sampling_rate / 3600,
            "written_by": f"wavtokenizer_hf {__version__}",
            "files": self._files(),
        }
        self._write_text("manifest.json", json.dumps(manifest, indent=1, ensure_ascii=False) + "\n")

    def _write_text(self, name: str, text: str) -> None:
        with self._replaced(self.folder / name) as partial:
            partial.write_text(text, encoding="utf-8")


def _schema(settings: Settings, carried: Any) -> Any:
    """Own columns, then the carried ones."""
    pyarrow = require("pyarrow", "bulk")
    own = [
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
    assert tuple(name for name, _ in own) == OWN_COLUMNS
    schema = pyarrow.schema([*own, *((field.name, field.type) for field in carried)])
    if b"huggingface" not in (carried.metadata or {}):
        return schema
    features = require("datasets", "bulk").Features  # of a dataset: what the numbers of a ClassLabel mean, for example
    return features({**features.from_arrow_schema(schema), **features.from_arrow_schema(carried)}).arrow_schema


MAX_MANIFEST_BYTES = 2**28  # a million parts


def read_manifest(path: Path) -> dict[str, Any]:
    """Read manifest.json. Raises ValueError if it is damaged."""
    content = read_json_object(path, MAX_MANIFEST_BYTES)
    if not isinstance(content.get("settings"), dict):
        raise ValueError(f"{path} is damaged: it has no settings. Name another folder.")
    files = content.setdefault("files", {})
    if not isinstance(files, dict) or not all(
        isinstance(entry, dict) and {"size", "sha256", "digest"} <= entry.keys() for entry in files.values()
    ):
        raise ValueError(f"{path} is damaged: its list of files is none. Name another folder.")
    return content


def summary_of(table: Any, num_failures: int) -> Summary:
    """Totals of the rows of a part."""
    compute = require("pyarrow.compute", "bulk")
    num_warned = int((_lengths(table["warnings"]) > 0).sum())
    num_samples = compute.sum(table["num_samples"]).as_py() or 0
    return Summary(len(table), num_failures, num_samples, int(_lengths(table["audio_codes"]).sum()), num_warned)


def digest_of(table: Any, part: dict[str, Any]) -> str:
    """
    16 hex digits of the rows and failures of a part, whatever the bytes of its file; equal digests, equal content.
    """
    pyarrow = require("pyarrow", "bulk")
    digest = hashlib.sha256()
    digest.update(json.dumps([part["failures"], part["failure_stamps"]], sort_keys=True).encode())
    for name in table.column_names:
        column = table[name]
        if name == "audio_codes":
            digest.update(_lengths(column).astype("<i8").tobytes())
            for chunk in column.chunks:
                digest.update(chunk.flatten().to_numpy(zero_copy_only=False).astype("<u2").tobytes())
            continue
        if pyarrow.types.is_temporal(column.type):  # Python has no nanoseconds
            column = column.cast(pyarrow.int64() if column.type.bit_width == 64 else pyarrow.int32())
        digest.update(repr((name, column.to_pylist())).encode("utf-8", "surrogatepass"))
    return digest.hexdigest()[:16]


def sha256_of(path: Path) -> str:
    """The checksum of a file."""
    with path.open("rb") as file:
        digest = hashlib.sha256()
        while block := file.read(2**20):
            digest.update(block)
    return digest.hexdigest()


def _lengths(column: Any) -> np.ndarray:
    """Number of values in each row of a column of lists; 0 for null."""
    compute = require("pyarrow.compute", "bulk")
    return compute.fill_null(compute.list_value_length(column), 0).to_numpy().astype(np.int64)
