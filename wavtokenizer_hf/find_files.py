"""Find files in folders by extension, for commands, bulk work and training, and report the other files."""

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
"""Extensions of audio files. They only select files in folders: `audio.load` goes by the content.

Formats of the last line need torchcodec.
"""

WRITABLE_FORMATS = (
    "wav", "flac", "ogg", "mp3",
    "aiff", "au", "avr", "caf", "htk", "ircam", "mat4", "mat5", "mpc2k", "nist", "paf", "pvf", "raw", "rf64", "sd2",
    "sds", "svx", "voc", "w64", "wavex", "wve", "xi",
)  # fmt: skip
"""Audio formats that soundfile writes, which are also the extensions. The first line has the common ones."""

TOKEN_FORMATS = ("safetensors", "json", "npy", "txt")
"""Formats of token files, which are also the extensions."""


@dataclass
class FoundFiles:
    """Sorted paths of the files in a folder that have one of the extensions, and of all other files."""

    files: list[str] = field(default_factory=list)
    passed_over: list[str] = field(default_factory=list)


def find_files(folder: str | os.PathLike, suffixes: Sequence[str]) -> FoundFiles:
    """Find files by extension in a folder and its subfolders. Links to folders are followed.

    Args:
        folder: Folder to search.
        suffixes: Extensions in lower case, with their dot. The case of file names is ignored.

    Raises:
        OSError: A folder cannot be read.
    """
    found = FoundFiles()
    for path in walk(folder):
        is_wanted = os.path.splitext(path)[1].lower() in suffixes and os.path.isfile(path)
        (found.files if is_wanted else found.passed_over).append(path)
    return found


def walk(folder: str | os.PathLike) -> list[str]:
    """Return all files below a folder, sorted by the parts of their paths. Raises OSError for an unreadable folder."""
    paths = []
    for parent, folders, names in os.walk(os.fspath(folder), onerror=_raise, followlinks=True):
        # a link to a parent folder would be an endless loop
        folders[:] = [name for name in folders if not contains_path(os.path.join(parent, name), parent)]
        paths += [os.path.join(parent, name) for name in names]
    return sorted(paths, key=lambda path: path.split(os.sep))


def contains_path(folder: str, path: str) -> bool:
    """Return whether the path is in the folder, after links are resolved."""
    return Path(path).resolve().is_relative_to(Path(folder).resolve())


def utf8_name(name: str) -> str:
    r"""Return a file name as valid UTF-8 text. Bytes that are not UTF-8 become `\xNN`."""
    return name.encode("utf-8", "surrogateescape").decode("utf-8", "backslashreplace")


def describe_passed_over(paths: Iterable[str]) -> str | None:
    """Return one line that counts the other files of a folder by extension, or None if there are none."""
    paths = list(paths)
    if not paths:
        return None
    extensions = Counter(os.path.splitext(path)[1].lower() or "no extension" for path in paths)
    counts = ", ".join(f"{extension} {count}" for extension, count in extensions.most_common(8))
    more = "" if len(extensions) <= 8 else f" and {len(extensions) - 8} other extensions"
    return f"passed over {len(paths)} other files ({counts}{more}), such as {utf8_name(paths[0])}"


def _raise(error: OSError) -> None:
    raise error
