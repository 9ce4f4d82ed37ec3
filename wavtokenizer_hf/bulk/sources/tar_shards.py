"""Tar shards, read without unpacking them."""

import os
import tarfile
from pathlib import Path
from typing import Any

from ...extras import require
from ...find_files import SUFFIXES, utf8_name
from ..options import check_tar_names
from .base import Item, Source, relative_path


TEXTS = ("cls", "csv", "json", "lab", "srt", "text", "tsv", "txt", "vtt")
"""Endings of what is carried along as text from tar shards."""


class TarSource(Source):
    """Tar files of sounds and what lies beside them, which is carried along as text or bytes.

    A locator is the shard, the sound's (offset, size) and those of the other members of its name, by their ending.
    Members are found by reading the headers once; nothing is unpacked.
    """

    def __init__(self, shards: list[str], base: Path, tar_names: str = "ending"):
        pyarrow = require("pyarrow", "bulk")
        check_tar_names(tar_names)
        group = _by_ending if tar_names == "ending" else _by_first_dot
        self.items, self.passed_over = [], []
        endings: set[str] = set()
        for shard in shards:
            samples, others = group(shard, self._members(shard))
            self.passed_over += [f"{relative_path(shard, base)}/{name}" for name in others]
            for key, (sound, beside) in samples.items():
                beside = {utf8_name(ending): member for ending, member in beside.items()}
                endings.update(beside)
                self.items.append(Item(f"{relative_path(shard, base)}/{key}", (shard, sound, beside)))
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
                    if block.count(0) < len(block):  # tarfile would be content with what comes before
                        raise ValueError(
                            f"{shard} goes on after the end of the archive, at byte {end}. It is damaged, or several "
                            "in one file: write each to a file of its own."
                        )
        except tarfile.TarError as error:
            raise ValueError(
                f"Cannot read the shard {shard}: {error}. Expected a plain tar, not compressed."
            ) from error
        return members

    @staticmethod
    def _content(shard: str, locator: tuple[int, int]) -> bytes:
        with open(shard, "rb") as file:
            file.seek(locator[0])
            content = file.read(locator[1])
        if len(content) < locator[1]:
            raise ValueError(f"{shard} ends within this clip. The shard may be damaged.")
        return content

    def read(self, locator: Any) -> bytes:
        return self._content(locator[0], locator[1])

    def extra_columns(self, locator: Any) -> dict[str, Any]:
        contents = {name: self._content(locator[0], where) for name, where in locator[2].items()}
        try:
            return {name: content.decode() if _is_text(name) else content for name, content in contents.items()}
        except UnicodeDecodeError as error:
            raise ValueError(f"The text beside it in {locator[0]} is not UTF-8: {error}") from error


_Member = tuple[int, int]
_Samples = dict[str, tuple[_Member, dict[str, _Member]]]  # key -> its sound, and what lies beside it by ending


def _by_ending(shard: str, members: dict[str, _Member]) -> tuple[_Samples, list[str]]:
    """
    Sounds are known by their ending, the rest of the name may hold dots. Gives the samples, and members without a
    sound.
    """
    samples: _Samples = {}
    for name, member in members.items():
        key, ending = os.path.splitext(name)
        if ending.lower() in SUFFIXES:
            if key in samples:
                raise ValueError(f"{shard} holds several sounds for {key!r}. Expected one for each name.")
            samples[key] = (member, {})
    others = []
    for name, member in members.items():
        key, ending = os.path.splitext(name)
        if ending.lower() in SUFFIXES:
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
    samples = {}
    others: list[str] = []
    for key, names in groups.items():
        sounds = [ending for ending in names if f".{ending.lower()}".endswith(SUFFIXES)]
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
