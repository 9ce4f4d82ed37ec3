"""Files and folders that appear whole or not at all, by the package's own way to write them."""

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from ..atomic_files import atomic_folder, atomic_write


@contextmanager
def open_atomic(path: str | os.PathLike, mode: str = "wb") -> Iterator:
    """Open a temporary file beside `path`, see `atomic_write`. On success it takes that name, else it vanishes."""
    with atomic_write(path) as partial, partial.open(mode, encoding=None if "b" in mode else "utf-8") as file:
        yield file


@contextmanager
def new_folder(output: str | os.PathLike) -> Iterator[Path]:
    """`atomic_folder` for an output that must not exist, or be an empty folder. Raises ValueError if it does."""
    output = Path(output).resolve()
    if output.exists() and not (output.is_dir() and not any(output.iterdir())):
        raise ValueError(f"{output} exists and is not an empty folder. Name a new one.")
    with atomic_folder(output) as folder:
        yield folder
