"""Find files in folders, for commands, bulk work and training. Files that are skipped are counted and named."""

import os
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path


SUFFIXES = (
    ".wav", ".flac", ".mp3", ".ogg", ".opus", ".aiff", ".aif", ".au", ".w64", ".caf",
    ".aifc", ".bwf", ".mp2", ".oga", ".rf64", ".snd", ".sph", ".voc",
    ".aac", ".amr", ".ape", ".m4a", ".m4b", ".mka", ".mp4", ".wma", ".wv",
)  # fmt: skip
"""Extensions of audio files in a folder. `audio.load` goes by content. Files of the last line need torchcodec."""

WRITABLE_FORMATS = (
    "wav", "flac", "ogg", "mp3",
    "aiff", "au", "avr", "caf", "htk", "ircam", "mat4", "mat5", "mpc2k", "nist", "paf", "pvf", "raw", "rf64", "sd2",
    "sds", "svx", "voc", "w64", "wavex", "wve", "xi",
)  # fmt: skip
"""Formats of audio files that soundfile writes, each with its name as its extension. The first line is for people."""

TOKEN_FORMATS = ("safetensors", "json", "npy", "txt")
"""Formats of token files, each with its name as its extension."""


@dataclass
class FoundFiles:
    """Paths of the files that were looked for, sorted, and of all others in the folder."""

    files: list[str] = field(default_factory=list)
    passed_over: list[str] = field(default_factory=list)


def find_files(folder: str | os.PathLike, suffixes: Sequence[str]) -> FoundFiles:
    """
    Search a folder and its subfolders, links to folders included, for files by their endings.

    Args:
        folder: folder to search.
        suffixes: endings with their dot, in lower case; those of files are compared in any case.

    Raises:
        OSError: a folder in it cannot be read.
    """
    found = FoundFiles()
    for path in walk(folder):
        is_wanted = os.path.splitext(path)[1].lower() in suffixes and os.path.isfile(path)
        (found.files if is_wanted else found.passed_over).append(path)
    return found


def walk(folder: str | os.PathLike) -> list[str]:
    """
    Return all files below a folder, sorted by the parts of their paths. Raises OSError if a folder cannot be read.
    """
    paths = []
    for parent, folders, names in os.walk(os.fspath(folder), onerror=_raise, followlinks=True):
        # a link to a parent folder would never end
        folders[:] = [name for name in folders if not holds(os.path.join(parent, name), parent)]
        paths += [os.path.join(parent, name) for name in names]
    return sorted(paths, key=lambda path: path.split(os.sep))


def holds(folder: str, path: str) -> bool:
    """Return whether the path lies in the folder, after links are resolved."""
    return Path(path).resolve().is_relative_to(Path(folder).resolve())


def utf8_name(name: str) -> str:
    r"""The name as text that can be written anywhere: bytes that are not UTF-8 become `\xNN`."""
    return name.encode("utf-8", "surrogateescape").decode("utf-8", "backslashreplace")


def describe_passed_over(paths: Iterable[str]) -> str | None:
    """One line that counts and names what was passed over, by ending; None if there is nothing."""
    paths = list(paths)
    if not paths:
        return None
    endings = Counter(os.path.splitext(path)[1].lower() or "no ending" for path in paths)
    counts = ", ".join(f"{ending} {count}" for ending, count in endings.most_common(8))
    more = "" if len(endings) <= 8 else f" and {len(endings) - 8} other endings"
    return f"passed over {len(paths)} other files ({counts}{more}), such as {utf8_name(paths[0])}"


def _raise(error: OSError) -> None:
    raise error
