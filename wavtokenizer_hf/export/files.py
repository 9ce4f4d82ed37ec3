"""Files and folders that appear whole or not at all."""

import os
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path


@contextmanager
def atomic_write(path: str | os.PathLike, mode: str = "wb") -> Iterator:
    """Open a temporary file beside `path`; on success it is flushed to disk and takes that name, else it vanishes."""
    path = Path(path)
    partial = path.with_name(f".{path.name}.{os.getpid()}.partial")
    try:
        with partial.open(mode, **({} if "b" in mode else {"encoding": "utf-8"})) as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        os.replace(partial, path)
    finally:
        partial.unlink(missing_ok=True)


@contextmanager
def atomic_folder(output: str | os.PathLike) -> Iterator[Path]:
    """
    Make a new folder beside `output`; on success it takes that name, else it vanishes.

    Raises:
        ValueError: the output exists and is not an empty folder.
    """
    output = Path(output).resolve()
    if output.exists() and not (output.is_dir() and not any(output.iterdir())):
        raise ValueError(f"{output} exists and is not an empty folder. Name a new one.")
    output.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=f".{output.name}-", suffix=".partial", dir=output.parent) as temporary:
        folder = Path(temporary, output.name)  # one level down, since a temporary folder is closed to other users
        folder.mkdir()
        yield folder
        with suppress(FileNotFoundError):
            output.rmdir()  # empty; Windows replaces no folder
        os.replace(folder, output)
