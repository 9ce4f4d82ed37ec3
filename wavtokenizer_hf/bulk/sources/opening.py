"""Finds out what kind of source a path or name is, and opens it."""

import glob
import os
from collections.abc import Sequence
from fnmatch import fnmatch
from pathlib import Path
from typing import Any, NoReturn

from ...find_files import SUFFIXES, holds, utf8_name, walk
from ..records import OWN_COLUMNS
from .base import Item, Source, relative_path
from .files import LISTS, FileSource, open_list
from .hf_datasets import HFDatasetSource, open_disk, open_hub
from .lhotse_shar import LhotseSource, is_shar
from .parquet import ParquetSource
from .tar_shards import TarSource


def open_source(
    source: str | os.PathLike | Any,
    column: str | None = None,
    config: str | None = None,
    split: str | None = None,
    revision: str | None = None,
    tar_names: str = "ending",
) -> Source:
    """
    Open a source of clips, and list its clips.

    Args:
        source: Folder of audio files, tar shards or Parquet; glob of such files; list of paths (.txt with one path per
            line; .csv or .jsonl with a column of paths and further columns; paths are relative to the list); list of
            segments; folder of Lhotse Shar or of `Dataset.save_to_disk`; name of a dataset on the Hub; or a
            `datasets.Dataset`.
        column: Column of the audio, or of the paths in a list. Defaults to `audio`, and in lists also `path` or
            `file_name`.
        config: Configuration of a dataset on the Hub.
        split: Split of a dataset on the Hub, or of several on disk. Defaults to `train`.
        revision: Branch, tag or commit of a dataset on the Hub.
        tar_names: Where names in tar shards are split. `"ending"`: before the known ending of an audio file; files
            with the same name and a further dot belong to it. `"webdataset"`: at the first dot, as WebDataset does.

    Returns:
        `Source`: the clips with their ids and extra columns.

    Raises:
        ValueError: There is no such source, no clip in it, no such column; a column, config, split or revision of a
            source that has none; columns with names of the output's own; or an id twice.
        OSError: A folder or file cannot be read.
    """
    opened: Source
    if not isinstance(source, (str, os.PathLike)):
        opened = HFDatasetSource(source, column or "audio")
    elif not os.fspath(source):
        raise ValueError(
            "Got an empty SOURCE, which would be the current folder. Is a variable not set? Name it as '.'."
        )
    else:
        opened = _open_path(str(source), column, config, split, revision, tar_names)
    if not opened.items:
        raise ValueError(
            f"Found no sound in {source}, expected files that end in {', '.join(SUFFIXES)}, tar shards, Parquet, or a "
            "list or dataset of them."
        )
    for name, value in {"column": column, "config": config, "split": split, "revision": revision}.items():
        if value is not None and name not in opened.selection:
            raise ValueError(
                f"Got the {name} {value!r} for {source}, of which there is only one. Leave it out; files are chosen "
                "by a glob."
            )
    taken = sorted(set(opened.schema.names) & set(OWN_COLUMNS))
    if taken:
        raise ValueError(
            f"The source has a column {taken[0]!r}, which is a name of the output's own. Rename it in the source."
        )
    # a file's name may be any bytes, and text in Parquet may not
    opened.items = [item if item.id.isascii() else Item(utf8_name(item.id), item.locator) for item in opened.items]
    ids = set()
    for item in opened.items:
        if item.id in ids:
            raise ValueError(f"The id {item.id!r} names two clips of {source}. Each clip needs an id of its own.")
        ids.add(item.id)
    return opened


def _open_path(
    source: str, column: str | None, config: str | None, split: str | None, revision: str | None, tar_names: str
) -> Source:
    path = Path(source)
    if path.is_dir():
        if (path / "state.json").is_file() or (path / "dataset_dict.json").is_file():
            return open_disk(path, column or "audio", split)
        if is_shar(path):
            return LhotseSource(path)
        files, base = walk(path), path
    elif path.is_file() and path.suffix.lower() in LISTS:
        return open_list(path, column)
    elif path.is_file():
        files, base = [source], path.parent
    elif glob.has_magic(source):
        base = Path(_before_magic(source))
        _check_folders(base, Path(source).parts[len(base.parts) :])
        files = sorted(file for file in glob.glob(source, recursive=True) if os.path.isfile(file))
    elif path.is_absolute() or source.startswith(".") or source.count("/") > 1 or path.suffix.lower() in _KNOWN:
        raise FileNotFoundError(f"There is no file or folder {source}.")
    else:
        return open_hub(source, column or "audio", config, split or "train", revision)
    return _of_files(files, base, source, column or "audio", tar_names)


def _of_files(files: list[str], base: Path, source: str, column: str, tar_names: str) -> Source:
    """By the endings of the files, of which only one kind may be there."""
    kinds: dict[str, list[str]] = {"sound files": [], "tar shards": [], "Parquet": []}
    passed_over: list[str] = []
    opened: Source
    for file in files:
        ending = os.path.splitext(file)[1].lower()
        kind = "sound files" if ending in SUFFIXES else {".tar": "tar shards", ".parquet": "Parquet"}.get(ending)
        (kinds[kind] if kind is not None and os.path.isfile(file) else passed_over).append(file)
    found = [kind for kind, of_kind in kinds.items() if of_kind]
    if len(found) > 1:
        raise ValueError(f"{source} holds {' and '.join(found)}. Say which by a glob, for example '{base}/**/*.tar'.")
    if kinds["tar shards"]:
        opened = TarSource(kinds["tar shards"], base, tar_names)
    elif kinds["Parquet"]:
        opened = ParquetSource(kinds["Parquet"], base, column)
    else:
        opened = FileSource([Item(relative_path(file, base), (file, {})) for file in kinds["sound files"]])
    opened.passed_over = [*passed_over, *opened.passed_over]
    return opened


_KNOWN = (*SUFFIXES, *LISTS, ".tar", ".parquet")


def _refuse(error: OSError) -> NoReturn:
    raise error


def _check_folders(base: Path, parts: Sequence[str]) -> None:
    """
    Raises OSError if a folder that the glob of these parts looks into cannot be read: glob passes over it silently.
    """
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


def _before_magic(pattern: str) -> str:
    """The folders of a glob before its first wildcard."""
    parts = Path(pattern).parts
    fixed = [part for part, so_far in zip(parts, _beginnings(parts), strict=True) if not glob.has_magic(so_far)]
    return os.path.join(*fixed) if fixed else "."


def _beginnings(parts: tuple[str, ...]) -> list[str]:
    return [os.path.join(*parts[: index + 1]) for index in range(len(parts))]
