"""Write files and folders atomically. All modules of this package write files through this one.

A file is written under a temporary name beside its target, flushed to disk, and renamed. The temporary name is
`.HOST-PID-RANDOM.partial`. It is unique to one process and has at most 100 bytes.
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


LEFTOVER_SECONDS = 3600  # a temporary file that was modified more recently is never a leftover

# errors of fsync on file systems without it (SMB, FUSE, some network mounts)
_NO_FSYNC = (errno.EINVAL, errno.ENOTSUP, errno.ENOSYS, errno.EBADF, errno.EACCES, errno.EPERM)


@contextmanager
def atomic_write(path: str | os.PathLike, prefix: str = ".") -> Iterator[Path]:
    """Yield a temporary path to write to. Rename that file to `path` when the block ends without an error.

    Symbolic links are followed: the file that they point to is replaced. The new file keeps the permissions of the
    old one. A device, a pipe (FIFO) or a descriptor such as /dev/stdout is not replaced: the complete temporary file
    is copied into it.

    Args:
        path: Target file. Its folder must exist.
        prefix: Prefix of the temporary name, for callers that clean up their own leftovers.

    Yields:
        Path of an empty temporary file, created by this call (O_EXCL). It is removed however the block ends.

    Raises:
        IsADirectoryError: The target is a folder.
        PermissionError: The target is read-only.
        OSError: The file cannot be created, flushed or renamed. The target is unchanged.
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
        raise FileNotFoundError(f"Cannot write {path}: there is no folder {target.parent}. Create it first.")
    if target.is_dir():
        raise IsADirectoryError(f"Cannot write {path}: it is a folder, expected a file. Name a file in it.")
    if target.exists() and not os.access(target, os.W_OK):
        raise PermissionError(f"Cannot write {path}: it is read-only. Change its permissions, or name another file.")
    partial = target.with_name(_temporary_name(prefix))
    try:  # a handler of SIGTERM may raise as soon as the file exists
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
    """Write a file atomically, see `atomic_write`. Raises OSError with the path in the message."""
    path = Path(path)
    with atomic_write(path, prefix) as partial:
        try:
            partial.write_bytes(content)
        except OSError as error:
            raise cannot_write(path, error) from error
    return path


def write_text(path: str | os.PathLike, text: str, prefix: str = ".") -> Path:
    """Write a UTF-8 text file atomically, see `atomic_write`. Newlines are not translated."""
    return write_bytes(path, text.encode("utf-8"), prefix)


@contextmanager
def atomic_folder(folder: Path, previous: Path | None = None) -> Iterator[Path]:
    """Yield a temporary folder to fill. Rename it to `folder` when the block ends without an error.

    An empty `folder` is replaced. A `folder` with content is renamed to `previous` first, which replaces an earlier
    `previous`. If the process is killed between these two renames, only `previous` remains.

    Args:
        folder: Target folder. Its parents are created if missing.
        previous: New path of a replaced folder. None: a folder with content is not replaced.

    Raises:
        OSError: The folder cannot be written, or it has content and `previous` is None. The target is unchanged.
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
            with suppress(OSError):  # it was not created, or another program wrote to it
                parent.rmdir()
        raise


def cannot_write(path: str | os.PathLike, error: OSError) -> OSError:
    """Return an error with the path that the user gave, instead of the temporary one."""
    return OSError(f"Cannot write {path}: {error.strerror or error}")


def is_stream(path: str | os.PathLike) -> bool:
    """Return whether to write into a path rather than replace it: a device, pipe, socket or descriptor."""
    if _is_descriptor(path):
        return True
    try:
        mode = os.stat(path).st_mode
    except OSError:
        return False
    return not (stat.S_ISREG(mode) or stat.S_ISDIR(mode))


def refuse_inputs(outputs: Iterable[Path], inputs: Iterable[Path]) -> None:
    """Raise ValueError if an output is one of the inputs, also through symbolic or hard links.

    Args:
        outputs: Files to be written. They need not exist.
        inputs: Files to be read.
    """
    inputs_by_identity = {_identity(path): path for path in inputs}
    for path in outputs:
        same_file = inputs_by_identity.get(_identity(path))
        if same_file is not None and os.path.isfile(path):
            raise ValueError(
                f"The output {path} would overwrite the input {same_file}, which is the same file. Name another "
                "output."
            )


def remove_leftovers(folder: Path) -> None:
    """Remove temporary files and folders that killed processes of this machine left in `folder`."""
    host = re.escape(_host())
    with suppress(OSError):
        for path in folder.iterdir():
            match = re.fullmatch(rf"\..*{host}-(\d+)-[0-9a-f]{{8}}\.partial", path.name)
            if match and not _is_running(int(match[1])) and _is_old(path):
                shutil.rmtree(path, ignore_errors=True) if path.is_dir() else path.unlink(missing_ok=True)


def fsync(path: Path) -> None:
    """Flush a file to disk. Raises OSError if data was lost, but not if the file system has no fsync."""
    descriptor = os.open(path, os.O_RDWR)
    try:
        os.fsync(descriptor)
    except OSError as error:
        if error.errno not in _NO_FSYNC:
            raise
    finally:
        os.close(descriptor)


def fsync_folder(folder: Path) -> None:
    """Flush a rename to disk, where the file system supports it. Without it, a power cut may undo the rename."""
    with suppress(OSError):  # Windows cannot open folders, and SMB and FUSE mounts return EINVAL
        descriptor = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)


def _identity(path: Path) -> tuple:
    """Return a key that is equal for all names of a file: its inode, or its resolved path on mounts without inodes."""
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
    # O_APPEND without O_TRUNC and O_CREAT, since the file behind /dev/stdout may hold earlier output
    return os.fdopen(os.open(path, os.O_WRONLY | os.O_APPEND), "wb")


def _is_running(pid: int) -> bool:
    if os.name != "posix":  # elsewhere os.kill with signal 0 would end the process
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
