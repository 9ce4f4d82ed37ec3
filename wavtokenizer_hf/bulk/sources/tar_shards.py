"""Read clips from tar shards without unpacking them."""

import os
import tarfile
from pathlib import Path
from typing import Any

from ...extras import require
from ...find_files import SUFFIXES, utf8_name
from ..options import check_tar_names
from .base import Item, Source, relative_path


TEXT_EXTENSIONS = ("cls", "csv", "json", "lab", "srt", "text", "tsv", "txt", "vtt")
"""Extensions of the files in tar shards that become text columns. Other files become columns of bytes."""

_Member = tuple[int, int]  # offset and size in the tar shard, in bytes
_Samples = dict[
    str, tuple[_Member, dict[str, _Member]]
]  # key -> audio file, and extension -> other file of the sample


class TarSource(Source):
    """
    Tar shards of audio files. Other files of the same sample become extra columns: text or bytes.

    A locator is (path of the tar shard, (offset, size) of the audio file, extension -> (offset, size) of the sample's
    other files). The headers are read once, when the source is opened.
    """

    def __init__(self, shards: list[str], base: Path, tar_names: str = "ending"):
        pyarrow = require("pyarrow", "bulk")
        check_tar_names(tar_names)
        group_members = _group_by_extension if tar_names == "ending" else _group_by_first_dot
        self.items, self.passed_over = [], []
        extensions: set[str] = set()
        for shard in shards:
            samples, skipped_names = group_members(shard, self._members(shard))
            self.passed_over += [f"{relative_path(shard, base)}/{name}" for name in skipped_names]
            for key, (audio_member, other_members) in samples.items():
                columns = {utf8_name(extension): member for extension, member in other_members.items()}
                extensions.update(columns)
                self.items.append(Item(f"{relative_path(shard, base)}/{key}", (shard, audio_member, columns)))
        self.schema = pyarrow.schema(
            [(name, pyarrow.string() if _is_text(name) else pyarrow.binary()) for name in sorted(extensions)]
        )

    @staticmethod
    def _members(shard: str) -> dict[str, _Member]:
        """Return name -> (offset, size) of each file in a tar shard."""
        members: dict[str, _Member] = {}
        try:
            with tarfile.open(shard, "r:") as file:
                for member in file:
                    if member.issym() or member.islnk():
                        raise ValueError(
                            f"{shard} holds {member.name!r} as a link. Expected files (tar --dereference "
                            "--hard-dereference)."
                        )
                    if member.isfile():
                        if member.name in members:
                            raise ValueError(f"{shard} holds {member.name!r} twice.")
                        members[member.name] = (member.offset_data, member.size)
                end = file.offset
            with open(shard, "rb") as file:
                file.seek(end)
                while block := file.read(2**20):
                    if block.count(0) < len(block):  # tarfile silently ignores the rest
                        raise ValueError(
                            f"{shard} goes on after the end of the archive, at byte {end}. It is damaged, or several "
                            "archives were joined to one file. Write each archive to its own file."
                        )
        except tarfile.TarError as error:
            raise ValueError(
                f"Cannot read the shard {shard}: {error}. Expected a plain tar, not compressed."
            ) from error
        return members

    @staticmethod
    def _read_member(shard: str, member: _Member) -> bytes:
        offset, size = member
        with open(shard, "rb") as file:
            file.seek(offset)
            content = file.read(size)
        if len(content) < size:
            raise ValueError(f"{shard} ends within this clip. The shard may be damaged.")
        return content

    def read(self, locator: Any) -> bytes:
        return self._read_member(locator[0], locator[1])

    def extra_columns(self, locator: Any) -> dict[str, Any]:
        shard, _, columns = locator
        contents = {name: self._read_member(shard, member) for name, member in columns.items()}
        try:
            return {name: content.decode() if _is_text(name) else content for name, content in contents.items()}
        except UnicodeDecodeError as error:
            raise ValueError(f"A text file of this clip in {shard} is not UTF-8: {error}") from error


def _group_by_extension(shard: str, members: dict[str, _Member]) -> tuple[_Samples, list[str]]:
    """
    Split names before the known extension of an audio file, so that the key may contain dots.

    Returns:
        The samples by key, and the names of the members that belong to no audio file.
    """
    samples: _Samples = {}
    for name, member in members.items():
        key, extension = os.path.splitext(name)
        if extension.lower() in SUFFIXES:
            if key in samples:
                raise ValueError(f"{shard} holds several audio files for {key!r}. Expected one per name.")
            samples[key] = (member, {})
    skipped_names = []
    for name, member in members.items():
        key, extension = os.path.splitext(name)
        if extension.lower() in SUFFIXES:
            continue
        while extension and key not in samples:
            key, extension = os.path.splitext(key)
        if key in samples:
            samples[key][1][name[len(key) + 1 :]] = member
        else:
            skipped_names.append(name)
    return samples, skipped_names


def _group_by_first_dot(shard: str, members: dict[str, _Member]) -> tuple[_Samples, list[str]]:
    """
    Split names at the first dot, as WebDataset does.

    Returns:
        The samples by key, and the names of the members that belong to no audio file.
    """
    names_by_key: dict[str, dict[str, str]] = {}  # key -> extension -> name
    for name in members:
        folder, base = os.path.split(name)
        key, _, extension = base.partition(".")
        names_by_key.setdefault(os.path.join(folder, key) if key else name, {})[extension] = name
    samples = {}
    skipped_names: list[str] = []
    for key, names in names_by_key.items():
        audio_extensions = [extension for extension in names if f".{extension.lower()}".endswith(SUFFIXES)]
        if len(audio_extensions) > 1:
            raise ValueError(
                f"{shard} holds several audio files for {key!r}: {audio_extensions}. Expected one per name."
            )
        if not audio_extensions:
            skipped_names += names.values()
            continue
        audio_member = members[names.pop(audio_extensions[0])]
        samples[key] = (audio_member, {extension: members[name] for extension, name in names.items()})
    return samples, skipped_names


def _is_text(extension: str) -> bool:
    return extension.lower().rpartition(".")[2] in TEXT_EXTENSIONS
