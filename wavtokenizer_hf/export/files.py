"""Write files and folders of an export atomically."""

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from ..atomic_files import atomic_folder, atomic_write


@contextmanager
def open_atomic(path: str | os.PathLike, mode: str = "wb") -> Iterator:
    """Open a temporary file beside `path`. On success it is renamed to `path`, else deleted; see `atomic_write`."""
    with atomic_write(path) as partial, partial.open(mode, encoding=None if "b" in mode else "utf-8") as file:
        yield file


@contextmanager
def new_folder(output: str | os.PathLike) -> Iterator[Path]:
    """
    Yield a temporary folder that is renamed to `output` on success, see `atomic_folder`.

    Raises ValueError if `output` exists, unless it is an empty folder.
    """
    output = Path(output).resolve()
    if output.exists() and not (output.is_dir() and not any(output.iterdir())):
        raise ValueError(f"{output} exists and is not an empty folder. Name a new one.")
    with atomic_folder(output) as folder:
        yield folder
