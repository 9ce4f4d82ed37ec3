"""Detect the kind of a source by its path or name, and open it."""

import glob
import os
from collections.abc import Sequence
from fnmatch import fnmatch
from pathlib import Path
from typing import Any, NoReturn

from ...find_files import SUFFIXES, contains_path, utf8_name, walk
from ..records import OWN_COLUMNS
from .base import Item, Source, relative_path
from .files import LIST_EXTENSIONS, FileSource, open_list
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
        source: Folder of audio files, tar shards or Parquet files; glob of such files; list of paths (.txt with one
            path per line; .csv or .jsonl with a column of paths and further columns; paths are relative to the list);
            list of segments; folder of Lhotse Shar or of `Dataset.save_to_disk`; name of a dataset on the Hub; or a
            `datasets.Dataset`.
        column: Column of the audio, or of the paths in a list. Defaults to `audio`, and in lists also `path` or
            `file_name`.
        config: Configuration of a dataset on the Hub.
        split: Split of a dataset on the Hub, or of several on disk. Defaults to `train`.
        revision: Branch, tag or commit of a dataset on the Hub.
        tar_names: Where names in tar shards are split. `"ending"`: before the known extension of an audio file; files
            with the same name and any other extension belong to it. `"webdataset"`: at the first dot, as WebDataset
            does.

    Returns:
        `Source`: the clips with their ids and extra columns.

    Raises:
        ValueError: There is no such source, or no clip or column in it; the source has no column, config, split or
            revision to choose from; it has a column with the name of one of the output's own columns; or two clips
            have the same id.
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
            f"Found no audio in {source}, expected audio files ({', '.join(SUFFIXES)}), tar shards, Parquet files, or "
            "a list or dataset of them."
        )
    for name, value in {"column": column, "config": config, "split": split, "revision": revision}.items():
        if value is not None and name not in opened.selection:
            raise ValueError(
                f"Got the {name} {value!r} for {source}, which has no {name} to choose. Leave it out. To choose "
                "files, pass a glob."
            )
    conflicts = sorted(set(opened.schema.names) & set(OWN_COLUMNS))
    if conflicts:
        raise ValueError(
            f"The source has a column {conflicts[0]!r}, but the output has its own column of that name. Rename it in "
            "the source."
        )
    # a file name can be any bytes, but a string in Parquet must be UTF-8
    opened.items = [item if item.id.isascii() else Item(utf8_name(item.id), item.locator) for item in opened.items]
    ids = set()
    for item in opened.items:
        if item.id in ids:
            raise ValueError(f"The id {item.id!r} names two clips of {source}. Give each clip its own id.")
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
    elif path.is_file() and path.suffix.lower() in LIST_EXTENSIONS:
        return open_list(path, column)
    elif path.is_file():
        files, base = [source], path.parent
    elif glob.has_magic(source):
        base = Path(_fixed_folder(source))
        _check_folders(base, Path(source).parts[len(base.parts) :])
        files = sorted(file for file in glob.glob(source, recursive=True) if os.path.isfile(file))
    elif path.is_absolute() or source.startswith(".") or source.count("/") > 1 or path.suffix.lower() in _EXTENSIONS:
        raise FileNotFoundError(f"There is no file or folder {source}.")
    else:
        return open_hub(source, column or "audio", config, split or "train", revision)
    return _open_files(files, base, source, column or "audio", tar_names)


def _open_files(files: list[str], base: Path, source: str, column: str, tar_names: str) -> Source:
    """
    Open audio files, tar shards or Parquet files. The extensions decide which.

    Raises:
        ValueError: There are files of several kinds.
    """
    files_by_kind: dict[str, list[str]] = {"audio files": [], "tar shards": [], "Parquet files": []}
    passed_over: list[str] = []
    opened: Source
    for file in files:
        extension = os.path.splitext(file)[1].lower()
        other_kinds = {".tar": "tar shards", ".parquet": "Parquet files"}
        kind = "audio files" if extension in SUFFIXES else other_kinds.get(extension)
        (files_by_kind[kind] if kind is not None and os.path.isfile(file) else passed_over).append(file)
    kinds = [kind for kind, paths in files_by_kind.items() if paths]
    if len(kinds) > 1:
        raise ValueError(f"{source} holds {' and '.join(kinds)}. Choose one by a glob, such as '{base}/**/*.tar'.")
    if files_by_kind["tar shards"]:
        opened = TarSource(files_by_kind["tar shards"], base, tar_names)
    elif files_by_kind["Parquet files"]:
        opened = ParquetSource(files_by_kind["Parquet files"], base, column)
    else:
        opened = FileSource([Item(relative_path(file, base), (file, {})) for file in files_by_kind["audio files"]])
    opened.passed_over = [*passed_over, *opened.passed_over]
    return opened


_EXTENSIONS = (*SUFFIXES, *LIST_EXTENSIONS, ".tar", ".parquet")


def _raise(error: OSError) -> NoReturn:
    raise error


def _check_folders(base: Path, parts: Sequence[str]) -> None:
    """
    Check that the folders of a glob can be read. `glob.glob` silently skips those that cannot.

    Args:
        base: Folder that the glob starts from.
        parts: Parts of the pattern below it.

    Raises:
        OSError: A folder cannot be read.
    """
    for parent, folders, _ in os.walk(base, onerror=_raise, followlinks=True):
        depth = len(Path(parent).relative_to(base).parts)
        pattern = "*" if "**" in parts[: depth + 1] else parts[depth] if depth < len(parts) - 1 else ""
        folders[:] = [
            name
            for name in folders
            if fnmatch(name, pattern)
            and (pattern.startswith(".") or not name.startswith("."))
            and not contains_path(os.path.join(parent, name), parent)
        ]


def _fixed_folder(pattern: str) -> str:
    """Return the folder of a glob before its first wildcard."""
    parts = Path(pattern).parts
    fixed = [part for part, prefix in zip(parts, _prefixes(parts), strict=True) if not glob.has_magic(prefix)]
    return os.path.join(*fixed) if fixed else "."


def _prefixes(parts: tuple[str, ...]) -> list[str]:
    """Return the paths of the first part, of the first two, and so on."""
    return [os.path.join(*parts[: index + 1]) for index in range(len(parts))]
