"""Output files and folders that are whole or absent. Every file that this package writes goes through here.

A file is written under a temporary name beside its target, flushed to disk, and renamed. The temporary name is
`.HOST-PID-RANDOM.partial`: it belongs to one process, fits wherever a name of 100 bytes fits, and is never a user's
file.
"""

import errno
import os
import re
import secrets
import shutil
import socket
import stat
import tempfile
import time
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import BinaryIO


LEFTOVER_SECONDS = 3600  # a temporary file that was written to since is never taken for a leftover

# what fsync answers on file systems that cannot do it (SMB, FUSE, some network mounts)
_NO_FSYNC = (errno.EINVAL, errno.ENOTSUP, errno.ENOSYS, errno.EBADF, errno.EACCES, errno.EPERM)


@contextmanager
def atomic_write(path: str | os.PathLike, prefix: str = ".") -> Iterator[Path]:
    """
    Yield a temporary path to write to, and put that file in the place of `path` when the block ends without an error.

    A link is followed: what it points to is replaced. A device, a pipe (FIFO) or a descriptor such as /dev/stdout is
    written into, from a temporary file that is complete. A file that is replaced keeps its permissions.

    Args:
        path: Target file. Its folder must exist.
        prefix: Beginning of the temporary name, for owners that recognize their own leftovers.

    Yields:
        Path of an empty temporary file, created by this call (O_EXCL). It is gone when the block has ended in any way.

    Raises:
        IsADirectoryError, PermissionError: The target is a folder, or a file that may not be written.
        OSError: The file cannot be created, flushed or renamed. The target is then as it was.
    """
    path = Path(path)
    if is_stream(path):
        with tempfile.TemporaryDirectory(prefix="wavtokenizer-") as folder:
            partial = Path(folder, "output")
            partial.touch()
            yield partial
            try:
                with partial.open("rb") as source, _open_stream(path) as stream:
                    shutil.copyfileobj(source, stream)
            except BrokenPipeError:
                raise
            except OSError as error:
                raise cannot_write(path, error) from error
        return
    target = Path(os.path.realpath(path))
    if not target.parent.is_dir():
        raise FileNotFoundError(f"Cannot write {path}: there is no folder {target.parent}. Make it first.")
    if target.is_dir():
        raise IsADirectoryError(f"Cannot write {path}: it is a folder, expected a file. Name a file in it.")
    if target.exists() and not os.access(target, os.W_OK):
        raise PermissionError(f"Cannot write {path}: it is read-only. Change its permissions, or name another file.")
    partial = target.with_name(_temporary_name(prefix))
    try:  # SIGTERM may raise as soon as the file is there
        os.close(os.open(partial, os.O_CREAT | os.O_EXCL | os.O_WRONLY, 0o666))
        yield partial
        fsync(partial)  # a full disk or quota may be reported only here
        if target.exists():
            shutil.copymode(target, partial)
        os.replace(partial, target)
        fsync_folder(target.parent)
    finally:
        partial.unlink(missing_ok=True)


def write_bytes(path: str | os.PathLike, content: bytes, prefix: str = ".") -> Path:
    """Write a file at once, see `atomic_write`. Raises OSError, which names the file."""
    path = Path(path)
    with atomic_write(path, prefix) as partial:
        try:
            partial.write_bytes(content)
        except OSError as error:
            raise cannot_write(path, error) from error
    return path


def write_text(path: str | os.PathLike, text: str, prefix: str = ".") -> Path:
    """Write a UTF-8 file at once, see `atomic_write`. Line ends stay as they are."""
    return write_bytes(path, text.encode("utf-8"), prefix)


@contextmanager
def atomic_folder(folder: Path, previous: Path | None = None) -> Iterator[Path]:
    """
    Yield a new folder beside `folder` to fill, and put it in its place when the block ends without an error.

    An empty folder is replaced. One that holds anything is renamed to `previous` first, and what was at `previous` is
    removed; without `previous` the block's result is refused. A kill between the two renames leaves `previous` alone.

    Args:
        folder: Target.
        previous: Where the folder that is replaced goes.

    Raises:
        OSError: It cannot be written, or the target is not an empty folder. The target is then as it was.
    """
    new_parents = [parent for parent in folder.parents if not parent.exists()]
    folder.parent.mkdir(parents=True, exist_ok=True)
    partial = folder.with_name(_temporary_name("."))
    try:
        partial.mkdir()
        yield partial
        for file in partial.rglob("*"):
            if file.is_file():
                fsync(file)
        if previous is not None and folder.is_dir() and any(folder.iterdir()):
            shutil.rmtree(previous, ignore_errors=True)
            os.replace(folder, previous)
        elif folder.exists():
            folder.rmdir()  # fails unless it is empty
        os.replace(partial, folder)
        fsync_folder(folder.parent)
    except BaseException:
        shutil.rmtree(partial, ignore_errors=True)
        for parent in new_parents:
            with suppress(OSError):  # not made, or another program has put something in it
                parent.rmdir()
        raise


def cannot_write(path: str | os.PathLike, error: OSError) -> OSError:
    """Return an error that names the file that the user asked for, and not the temporary one."""
    return OSError(f"Cannot write {path}: {error.strerror or error}")


def is_stream(path: str | os.PathLike) -> bool:
    """
    Whether a path names something to write into rather than to replace: a device, a pipe, a socket, a descriptor.
    """
    if _is_descriptor(path):
        return True
    try:
        mode = os.stat(path).st_mode
    except OSError:
        return False
    return not (stat.S_ISREG(mode) or stat.S_ISDIR(mode))


def refuse_inputs(outputs: Iterable[Path], inputs: Iterable[Path]) -> None:
    """
    Raise ValueError if a file to be written is one of the inputs, under whatever name: links and hard links count.

    Args:
        outputs: Files to be written; those that do not exist yet are no input.
        inputs: Files that are read.
    """
    names = {_identity(path): path for path in inputs}
    for path in outputs:
        same = names.get(_identity(path))
        if same is not None and os.path.isfile(path):
            raise ValueError(
                f"The output {path} would overwrite the input {same}, which is the same file. Name another output."
            )


def remove_leftovers(folder: Path) -> None:
    """Remove temporary files and folders in `folder` that processes of this machine left when they were killed."""
    host = re.escape(_host())
    with suppress(OSError):
        for path in folder.iterdir():
            found = re.fullmatch(rf"\..*{host}-(\d+)-[0-9a-f]{{8}}\.partial", path.name)
            if found and not _is_running(int(found[1])) and _is_old(path):
                shutil.rmtree(path, ignore_errors=True) if path.is_dir() else path.unlink(missing_ok=True)


def fsync(path: Path) -> None:
    """Flush a file to disk. Raises OSError where data was lost, and not where the file system has no fsync."""
    descriptor = os.open(path, os.O_RDWR)
    try:
        os.fsync(descriptor)
    except OSError as error:
        if error.errno not in _NO_FSYNC:
            raise
    finally:
        os.close(descriptor)


def fsync_folder(folder: Path) -> None:
    """Flush a rename to disk where the file system can do that. A failure loses at most the rename in a power cut."""
    with suppress(OSError):  # Windows opens no folders; SMB and FUSE mounts answer EINVAL
        descriptor = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)


def _identity(path: Path) -> tuple:
    """Equal for two names of one file. Some network mounts number no files; there the resolved path must do."""
    try:
        status = os.stat(path)
        if status.st_ino:
            return status.st_dev, status.st_ino
    except OSError:
        pass
    return (os.path.realpath(path),)


def _temporary_name(prefix: str) -> str:
    return f"{prefix}{_host()}-{os.getpid()}-{secrets.token_hex(4)}.partial"


def _host() -> str:
    return re.sub("[^A-Za-z0-9]", "", socket.gethostname())[:32] or "host"


def _is_descriptor(path: str | os.PathLike) -> bool:
    return re.fullmatch(r"/dev/(stdin|stdout|stderr|fd/\d+)|/proc/(self|\d+)/fd/\d+", os.fspath(path)) is not None


def _open_stream(path: Path) -> BinaryIO:
    # O_APPEND: the file behind /dev/stdout may hold what was written before; no O_TRUNC and no O_CREAT
    return os.fdopen(os.open(path, os.O_WRONLY | os.O_APPEND), "wb")


def _is_running(pid: int) -> bool:
    if os.name != "posix":  # there is no harmless signal elsewhere: os.kill would end the process
        return True
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except OSError:
        return True
    return True


def _is_old(path: Path) -> bool:
    newest = max((file.stat().st_mtime for file in (path, *path.rglob("*"))), default=0.0)
    return time.time() - newest > LEFTOVER_SECONDS
