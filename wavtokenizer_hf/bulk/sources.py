"""Where clips come from: folders, globs, list files, Parquet, tar shards, datasets of the datasets library.

A source lists its clips first, each with an id and the place where it lies; workers then read each by its place.
"""

import csv
import glob
import json
import os
import tarfile
import threading
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from fnmatch import fnmatch
from pathlib import Path
from types import MappingProxyType
from typing import Any

from .. import audio
from ..extras import require
from ..find_files import holds, utf8_name, walk
from .options import check_tar_names
from .records import NO_FILE, OWN_COLUMNS, Stamp


LISTS = (".txt", ".csv", ".jsonl")
PATH_COLUMNS = ("audio", "path", "file_name")  # of a list file, where none is named
TEXTS = ("cls", "csv", "json", "lab", "srt", "text", "tsv", "txt", "vtt")
"""Endings of what is carried along as text from tar shards."""


@dataclass(frozen=True)
class Item:
    """One clip: its id, the same in every run over the same source, and where the source finds it."""

    id: str
    place: Any


class Source:
    """Clips. `schema` (of pyarrow) is of the columns that are carried along; `items` are the clips in a fixed order;
    `selection` says what was taken of a source that has more: the column, config, split, revision, as far as it has them;
    `passed_over` names the files and members of shards that are no clips, nor lie beside one."""

    schema: Any
    items: Sequence[Item]
    selection: Mapping[str, str | None] = MappingProxyType({})
    passed_over: Sequence[str] = ()

    def sound(self, place: Any) -> Any:
        """What `audio.load_clip` takes. Raises ValueError or OSError if it cannot be read."""
        raise NotImplementedError

    def carried(self, place: Any) -> dict[str, Any]:
        """The carried columns of a clip."""
        raise NotImplementedError

    def file(self, place: Any) -> str | None:
        """Path of the file that holds a clip: the sound, or the shard or table that it is in. None for a dataset."""
        return place[0] if isinstance(place, tuple) else None

    def stamp(self, place: Any) -> Stamp:
        """Size and time of that file as it is now."""
        try:
            status = os.stat(self.file(place) or "")
        except (OSError, ValueError):
            return NO_FILE
        return status.st_size, status.st_mtime_ns

    def without_items(self) -> "Source":
        """For workers, which are told the places of their clips."""
        worker = object.__new__(type(self))
        worker.__dict__.update(self.__dict__, items=(), passed_over=())
        return worker


def open_source(
    source: str | os.PathLike | Any,
    column: str | None = None,
    config: str | None = None,
    split: str | None = None,
    revision: str | None = None,
    tar_names: str = "ending",
) -> Source:
    """
    Args:
        source: a folder of sound files, of tar shards or of Parquet; a glob of such files; a list file (.txt with a path a
            line; .csv or .jsonl with a column of paths, others are carried along; paths are relative to the list); a
            folder of `Dataset.save_to_disk`; the name of a dataset on the Hub; a `datasets.Dataset`.
        column: of the sound, or of the paths in a list; default: `audio`, and in lists also `path` or `file_name`.
        config, revision: of a dataset on the Hub.
        split: of a dataset on the Hub, or of several on disk; default: `train`.
        tar_names: how names in tar shards are split. `"ending"`: before the known ending of a sound, and what begins with the
            same name and a dot lies beside it. `"webdataset"`: at the first dot, as WebDataset does.

    Raises:
        ValueError: there is no such source, no clip in it, no such column; a column, config, split or revision of a source
            that has none; columns with names of the output's own; or an id twice.
        OSError: a folder or file cannot be read.
    """
    if not isinstance(source, (str, os.PathLike)):
        opened = Dataset(source, column or "audio")
    elif not os.fspath(source):
        raise ValueError(
            "Got an empty SOURCE, which would be the current folder. Is a variable not set? Name it as '.'."
        )
    else:
        opened = _open_path(str(source), column, config, split, revision, tar_names)
    if not opened.items:
        raise ValueError(
            f"Found no sound in {source}, expected files that end in {', '.join(audio.SUFFIXES)}, tar shards, Parquet, or a "
            "list or dataset of them."
        )
    for name, value in {"column": column, "config": config, "split": split, "revision": revision}.items():
        if value is not None and name not in opened.selection:
            raise ValueError(
                f"Got the {name} {value!r} for {source}, of which there is only one. Leave it out; files are chosen by a glob."
            )
    taken = sorted(set(opened.schema.names) & set(OWN_COLUMNS))
    if taken:
        raise ValueError(
            f"The source has a column {taken[0]!r}, which is a name of the output's own. Rename it in the source."
        )
    # a file's name may be any bytes, and text in Parquet may not
    opened.items = [item if item.id.isascii() else Item(utf8_name(item.id), item.place) for item in opened.items]
    ids = set()
    for item in opened.items:
        if item.id in ids:
            raise ValueError(f"The id {item.id!r} names two clips of {source}. Each clip needs an id of its own.")
        ids.add(item.id)
    return opened


def _open_path(
    source: str, column: str | None, config: str | None, split: str | None, revision: str | None, tar_names: str
) -> Source:
    from . import segment_sources  # it imports this module

    path = Path(source)
    if path.is_dir():
        if (path / "state.json").is_file() or (path / "dataset_dict.json").is_file():
            return _from_disk(path, column or "audio", split)
        if segment_sources.is_shar(path):
            return segment_sources.LhotseShar(path)
        files, base = walk(path), path
    elif path.is_file() and path.suffix.lower() in LISTS:
        return _list_file(path, column)
    elif path.is_file():
        files, base = [source], path.parent
    elif glob.has_magic(source):
        base = Path(_before_magic(source))
        _check_folders(base, Path(source).parts[len(base.parts) :])
        files = sorted(file for file in glob.glob(source, recursive=True) if os.path.isfile(file))
    elif path.is_absolute() or source.startswith(".") or source.count("/") > 1 or path.suffix.lower() in _KNOWN:
        raise FileNotFoundError(f"There is no file or folder {source}.")
    else:
        return _from_hub(source, column or "audio", config, split or "train", revision)
    return _of_files(files, base, source, column or "audio", tar_names)


def _of_files(files: list[str], base: Path, source: str, column: str, tar_names: str) -> Source:
    """By the endings of the files, of which only one kind may be there."""
    kinds: dict[str, list[str]] = {"sound files": [], "tar shards": [], "Parquet": []}
    passed_over = []
    for file in files:
        ending = os.path.splitext(file)[1].lower()
        kind = "sound files" if ending in audio.SUFFIXES else {".tar": "tar shards", ".parquet": "Parquet"}.get(ending)
        (kinds[kind] if kind is not None and os.path.isfile(file) else passed_over).append(file)
    found = [kind for kind, of_kind in kinds.items() if of_kind]
    if len(found) > 1:
        raise ValueError(f"{source} holds {' and '.join(found)}. Say which by a glob, for example '{base}/**/*.tar'.")
    if kinds["tar shards"]:
        opened = TarShards(kinds["tar shards"], base, tar_names)
    elif kinds["Parquet"]:
        opened = Parquet(kinds["Parquet"], base, column)
    else:
        opened = Files([Item(_relative(file, base), (file, {})) for file in kinds["sound files"]])
    opened.passed_over = [*passed_over, *opened.passed_over]
    return opened


_KNOWN = (*audio.SUFFIXES, *LISTS, ".tar", ".parquet")


def _refuse(error: OSError):
    raise error


def _check_folders(base: Path, parts: Sequence[str]) -> None:
    """Raises OSError if a folder that the glob of these parts looks into cannot be read: glob passes over it silently."""
    for parent, folders, _ in os.walk(base, onerror=_refuse, followlinks=True):
        depth = len(Path(parent).relative_to(base).parts)
        pattern = "*" if "**" in parts[: depth + 1] else parts[depth] if depth < len(parts) - 1 else ""
        folders[:] = [
            name
            for name in folders
            if fnmatch(name, pattern)
            and (pattern.startswith(".") or not name.startswith("."))
            and not holds(os.path.join(parent, name), parent)
        ]


def _relative(file: str, base: Path) -> str:
    return Path(os.path.relpath(file, base)).as_posix()


def _before_magic(pattern: str) -> str:
    """The folders of a glob before its first wildcard."""
    parts = Path(pattern).parts
    fixed = [part for part, so_far in zip(parts, _beginnings(parts), strict=True) if not glob.has_magic(so_far)]
    return os.path.join(*fixed) if fixed else "."


def _beginnings(parts: tuple[str, ...]) -> list[str]:
    return [os.path.join(*parts[: index + 1]) for index in range(len(parts))]


# ---------------------------------------------------------------------------------------------------------------------
# Files, and lists of them
# ---------------------------------------------------------------------------------------------------------------------


class Files(Source):
    """Sound files; a place is a path and the carried columns."""

    def __init__(self, items: list[Item], schema=None, column: str | None = None):
        self.items = items
        self.selection = {} if column is None else {"column": column}
        self.schema = require("pyarrow", "bulk").schema([]) if schema is None else schema

    def sound(self, place: tuple[str, dict]) -> str:
        return place[0]

    def carried(self, place: tuple[str, dict]) -> dict[str, Any]:
        return place[1]


_TOO_MANY = "more fields than the header"  # csv's key for them


def _list_file(path: Path, column: str | None) -> Files:
    pyarrow = require("pyarrow", "bulk")
    try:
        # spreadsheets begin it with a mark of UTF-8; names of files may be no UTF-8
        with path.open(encoding="utf-8-sig", errors="surrogateescape", newline="") as file:
            if path.suffix.lower() == ".txt":
                rows = [{"audio": line.strip()} for line in file if line.strip()]
            elif path.suffix.lower() == ".csv":
                rows = list(csv.DictReader(file, restkey=_TOO_MANY))
            else:
                rows = [json.loads(line) for line in file if line.strip()]
    except (ValueError, RecursionError, csv.Error) as error:  # UnicodeDecodeError and JSONDecodeError are ValueErrors
        raise ValueError(f"Cannot read the list {path}: {' '.join(str(error).split())[:300]}") from error
    names = list(dict.fromkeys(name for row in rows for name in row)) if all(isinstance(r, dict) for r in rows) else []
    if rows and column is None:
        column = next((name for name in PATH_COLUMNS if name in names), None)
    if _TOO_MANY in names:
        number = next(number for number, row in enumerate(rows, start=1) if _TOO_MANY in row)
        raise ValueError(f"Row {number} of {path} has more fields than the {len(names) - 1} of its header.")
    if rows and column not in names:
        raise ValueError(
            f"The list {path} has the columns {names}, expected one of paths: {', '.join(PATH_COLUMNS)}, or another that you "
            "name as the column."
        )
    has_segments = {"start", "duration"} <= set(names)
    id_column = "id" if "id" in names else column
    items = []
    for number, row in enumerate(rows, start=1):
        if not isinstance(row.get(column), str) or row.get(id_column) is None:
            raise ValueError(f"Row {number} of {path} has no text in {column!r} or nothing in {id_column!r}.")
        carried = {name: row.get(name) for name in names if name not in (column, "id", *_not_carried(has_segments))}
        items.append(Item(str(row[id_column]), (str(path.parent / row[column]), carried)))
    carried_names = [name for name in names if name not in (column, "id", *_not_carried(has_segments))]
    try:
        table = pyarrow.Table.from_pylist([item.place[1] for item in items], schema=None) if carried_names else None
    except (pyarrow.ArrowException, OverflowError) as error:
        raise ValueError(f"The columns of {path} are not of one type each: {error}") from error
    fields = [] if table is None else [_typed(table.schema.field(name)) for name in carried_names]
    if has_segments:
        from . import segment_sources  # it imports this module

        return segment_sources.Segments(rows, column, pyarrow.schema(fields), path.parent)
    return Files(items, pyarrow.schema(fields), column)


def _not_carried(has_segments: bool) -> tuple[str, ...]:
    """The output has a `duration` of its own."""
    return ("duration",) if has_segments else ()


def _typed(field):
    """A column of nothing but nulls becomes one of text."""
    pyarrow = require("pyarrow", "bulk")
    return field.with_type(pyarrow.string()) if pyarrow.types.is_null(field.type) else field


# ---------------------------------------------------------------------------------------------------------------------
# Tar shards
# ---------------------------------------------------------------------------------------------------------------------


class TarShards(Source):
    """Tar files of sounds and what lies beside them, which is carried along as text or bytes.

    A place is the shard, the sound's (offset, size) and those of the other members of its name, by their ending. Members are
    found by reading the headers once; nothing is unpacked.
    """

    def __init__(self, shards: list[str], base: Path, tar_names: str = "ending"):
        pyarrow = require("pyarrow", "bulk")
        check_tar_names(tar_names)
        group = _by_ending if tar_names == "ending" else _by_first_dot
        self.items, self.passed_over, endings = [], [], set()
        for shard in shards:
            samples, others = group(shard, self._members(shard))
            self.passed_over += [f"{_relative(shard, base)}/{name}" for name in others]
            for key, (sound, beside) in samples.items():
                beside = {utf8_name(ending): member for ending, member in beside.items()}
                endings.update(beside)
                self.items.append(Item(f"{_relative(shard, base)}/{key}", (shard, sound, beside)))
        self.schema = pyarrow.schema(
            [(ending, pyarrow.string() if _is_text(ending) else pyarrow.binary()) for ending in sorted(endings)]
        )

    @staticmethod
    def _members(shard: str) -> dict[str, tuple[int, int]]:
        """Name -> (offset, size) of each file in the shard."""
        members: dict[str, tuple[int, int]] = {}
        try:
            with tarfile.open(shard, "r:") as file:
                for member in file:
                    if member.issym() or member.islnk():
                        raise ValueError(
                            f"{shard} holds {member.name!r} as a link. Expected files (tar --dereference --hard-dereference)."
                        )
                    if member.isfile():
                        if member.name in members:
                            raise ValueError(f"{shard} holds {member.name!r} twice.")
                        members[member.name] = (member.offset_data, member.size)
                end = file.offset
            with open(shard, "rb") as file:
                file.seek(end)
                while block := file.read(2**20):
                    if block.count(0) < len(block):  # tarfile would be content with what comes before
                        raise ValueError(
                            f"{shard} goes on after the end of the archive, at byte {end}. It is damaged, or several in one "
                            "file: write each to a file of its own."
                        )
        except tarfile.TarError as error:
            raise ValueError(
                f"Cannot read the shard {shard}: {error}. Expected a plain tar, not compressed."
            ) from error
        return members

    @staticmethod
    def _content(shard: str, place: tuple[int, int]) -> bytes:
        with open(shard, "rb") as file:
            file.seek(place[0])
            content = file.read(place[1])
        if len(content) < place[1]:
            raise ValueError(f"{shard} ends within this clip. The shard may be damaged.")
        return content

    def sound(self, place) -> bytes:
        return self._content(place[0], place[1])

    def carried(self, place) -> dict[str, Any]:
        contents = {name: self._content(place[0], where) for name, where in place[2].items()}
        try:
            return {name: content.decode() if _is_text(name) else content for name, content in contents.items()}
        except UnicodeDecodeError as error:
            raise ValueError(f"The text beside it in {place[0]} is not UTF-8: {error}") from error


_Member = tuple[int, int]
_Samples = dict[str, tuple[_Member, dict[str, _Member]]]  # key -> its sound, and what lies beside it by ending


def _by_ending(shard: str, members: dict[str, _Member]) -> tuple[_Samples, list[str]]:
    """Sounds are known by their ending, the rest of the name may hold dots. Gives the samples, and members without a sound."""
    samples: _Samples = {}
    for name, member in members.items():
        key, ending = os.path.splitext(name)
        if ending.lower() in audio.SUFFIXES:
            if key in samples:
                raise ValueError(f"{shard} holds several sounds for {key!r}. Expected one for each name.")
            samples[key] = (member, {})
    others = []
    for name, member in members.items():
        key, ending = os.path.splitext(name)
        if ending.lower() in audio.SUFFIXES:
            continue
        while ending and key not in samples:
            key, ending = os.path.splitext(key)
        if key in samples:
            samples[key][1][name[len(key) + 1 :]] = member
        else:
            others.append(name)
    return samples, others


def _by_first_dot(shard: str, members: dict[str, _Member]) -> tuple[_Samples, list[str]]:
    """WebDataset's rule: names are split at the first dot. Gives the samples, and members without a sound."""
    groups: dict[str, dict[str, str]] = {}
    for name in members:
        folder, base = os.path.split(name)
        key, _, ending = base.partition(".")
        groups.setdefault(os.path.join(folder, key) if key else name, {})[ending] = name
    samples, others = {}, []
    for key, names in groups.items():
        sounds = [ending for ending in names if f".{ending.lower()}".endswith(audio.SUFFIXES)]
        if len(sounds) > 1:
            raise ValueError(f"{shard} holds several sounds for {key!r}: {sounds}. Expected one for each name.")
        if not sounds:
            others += names.values()
            continue
        sound = members[names.pop(sounds[0])]
        samples[key] = (sound, {ending: members[name] for ending, name in names.items()})
    return samples, others


def _is_text(ending: str) -> bool:
    return ending.lower().rpartition(".")[2] in TEXTS


# ---------------------------------------------------------------------------------------------------------------------
# Tables
# ---------------------------------------------------------------------------------------------------------------------


class Parquet(Source):
    """Parquet files with a column of sound: an Audio column (`bytes` or `path`), bytes, or paths relative to the file.

    A place is (file, row group, row in it). A reader holds one row group at a time.
    """

    def __init__(self, files: list[str], base: Path, column: str):
        parquet, pyarrow = require("pyarrow.parquet", "bulk"), require("pyarrow", "bulk")
        self.column, self.items, schema = column, [], None
        self.selection = {"column": column}
        self._lock, self._held = threading.Lock(), (None, None)
        for file in files:
            try:
                with parquet.ParquetFile(file) as opened:
                    own = opened.schema_arrow.remove_metadata()
                    sizes = [opened.metadata.row_group(group).num_rows for group in range(opened.num_row_groups)]
                    check_column(own.names, column, file)
                    ids = opened.read(columns=["id"])["id"].to_pylist() if "id" in own.names else None
            except pyarrow.ArrowException as error:
                raise ValueError(f"Cannot read {file} as Parquet: {error}") from error
            if schema is not None and own != schema:
                raise ValueError(f"{file} has other columns than {files[0]}: {own.names}, expected {schema.names}.")
            schema, number = own, 0
            for group, size in enumerate(sizes):
                for row in range(size):
                    id = f"{_relative(file, base)}/{number}" if ids is None else _id(ids[number], file)
                    self.items.append(Item(id, (file, group, row)))
                    number += 1
        self.schema = pyarrow.schema([_typed(field) for field in schema if field.name not in (column, "id")])

    def __getstate__(self):
        return {**self.__dict__, "_lock": None, "_held": (None, None)}

    def __setstate__(self, state):
        self.__dict__.update(state, _lock=threading.Lock())

    def _row(self, place: tuple[str, int, int], names: list[str]) -> dict[str, Any]:
        file, group, row = place
        with self._lock:
            if self._held[0] != (file, group):
                with require("pyarrow.parquet", "bulk").ParquetFile(file) as opened:
                    self._held = ((file, group), opened.read_row_group(group))
            table = self._held[1]
        return table.select(names).slice(row, 1).to_pylist()[0]

    def sound(self, place: tuple[str, int, int]) -> Any:
        return _from_folder(self._row(place, [self.column])[self.column], os.path.dirname(place[0]))

    def carried(self, place: tuple[str, int, int]) -> dict[str, Any]:
        return self._row(place, self.schema.names)


class Dataset(Source):
    """A `datasets.Dataset`, read as it is stored: nothing is decoded by it. A place is a row's number."""

    def __init__(self, dataset, column: str, **selection: str | None):
        if not isinstance(dataset, require("datasets", "bulk").Dataset):
            raise ValueError(
                f"Got a {type(dataset).__name__} as the source, expected a path or a datasets.Dataset. Of a dictionary take a "
                "split; a stream is for tokenize_dataset."
            )
        check_column(dataset.column_names, column, "the dataset")
        ids = [_id(id, "the dataset") for id in dataset["id"]] if "id" in dataset.column_names else None
        self.items = [Item(f"{row:09d}" if ids is None else ids[row], row) for row in range(len(dataset))]
        self.column, self.dataset = column, dataset.with_format("arrow")
        self.selection = {"column": column, **selection}
        kept = {name: feature for name, feature in dataset.features.items() if name not in (column, "id")}
        self.schema = type(dataset.features)(kept).arrow_schema

    def sound(self, place: int) -> Any:
        return self.dataset.select_columns([self.column])[place].to_pylist()[0][self.column]

    def carried(self, place: int) -> dict[str, Any]:
        if not self.schema.names:
            return {}
        return self.dataset.select_columns(self.schema.names)[place].to_pylist()[0]


def check_column(names: list[str], column: str, where: str) -> None:
    if column not in names:
        raise ValueError(
            f"There is no column {column!r} in {where}, which has {', '.join(names)}. Name the one of sound."
        )


def _id(value: Any, where: str) -> str:
    if value is None:
        raise ValueError(f"A row of {where} has nothing in the column 'id'. Fill it, or rename the column.")
    return str(value)


def _from_folder(value: Any, folder: str) -> Any:
    """Paths that are relative to a folder, from there."""
    if isinstance(value, str):
        return os.path.join(folder, value)
    if isinstance(value, dict) and value.get("bytes") is None and isinstance(value.get("path"), str):
        return os.path.join(folder, value["path"])
    return value


def _from_disk(path: Path, column: str, split: str | None) -> Dataset:
    datasets = require("datasets", "bulk")
    try:
        dataset = datasets.load_from_disk(str(path))
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise ValueError(f"Cannot read {path} as a dataset on disk: {' '.join(str(error).split())[:300]}") from error
    if isinstance(dataset, datasets.DatasetDict):
        split = split or "train"
        if split not in dataset:
            raise ValueError(
                f"The dataset {path} has the splits {', '.join(dataset)}, and no {split!r}. Name one of them."
            )
        return Dataset(dataset[split], column, split=split)
    return Dataset(dataset, column)


def _from_hub(name: str, column: str, config: str | None, split: str, revision: str | None) -> Dataset:
    datasets = require("datasets", "bulk")
    try:
        dataset = datasets.load_dataset(name, config, split=split, revision=revision)
    except (OSError, ValueError, datasets.exceptions.DatasetsError) as error:
        raise ValueError(
            f"There is no file or folder {name}, and it cannot be loaded as a dataset of the Hub either: {error}"
        ) from error
    return Dataset(dataset, column, config=config, split=split, revision=revision)
