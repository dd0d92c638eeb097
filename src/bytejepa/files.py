"""Files that are either whole or not there: written beside their place, flushed to the disk, then renamed."""

from __future__ import annotations

import contextlib
import errno
import glob
import os
import secrets
import stat
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import BinaryIO

import filelock

from bytejepa.errors import BytejepaError, file_errors_as

MOST_NAMED = 50
"""Characters of a file's name in that of its temporary file."""


@contextlib.contextmanager
def atomic_file(
    path: Path, *, mode: int | None = None, check: Callable[[Path], None] | None = None
) -> Iterator[BinaryIO]:
    """Yield a binary file that becomes `path` when the block ends well, and vanishes when it does not.

    Of a symbolic link, what it leads to is replaced. A FIFO or character device (/dev/null) is written to, not replaced.
    `check` is given the place of the finished file before it becomes `path`, and raises what speaks against it; what goes
    into a stream cannot be read back and is not checked.
    `mode`: permissions of the file; None: those of the file that it replaces, of a new one those that the umask leaves.
    Raises: OSError as the system gives it (callers turn it into their own error); what stood at `path` is then untouched.
    """
    require_writable(path)
    if is_stream(path):
        with os.fdopen(os.open(path, os.O_WRONLY), "wb") as stream:
            yield stream
        return
    place = Path(os.path.realpath(path))
    if mode is None and place.exists():
        mode = permissions(place)
    # begins as the file does, by which those who tidy up know it (`unfinished`); names have an end at 255 bytes
    temporary = place.with_name(f".{place.name[:MOST_NAMED]}.{secrets.token_hex(8)}.tmp")
    # with permissions to be set, nobody else reads it until it has them
    created = os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o666 if mode is None else 0o600)
    try:
        with os.fdopen(created, "wb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        if mode is not None:
            temporary.chmod(mode)
        if check is not None:
            check(temporary)
        temporary.replace(place)
        flush_folder(place.parent)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise


def write_atomically(path: Path, data: bytes) -> None:
    """Make `data` the content of `path`, or leave what was there, as `atomic_file`. Raises: OSError."""
    with atomic_file(path) as file:
        file.write(data)


@contextlib.contextmanager
def locked(path: Path, error: type[BytejepaError], what_it_does: str) -> Iterator[None]:
    """Hold the lock file `path`, made with its folder if need be: one process at a time.

    Raises: `error` if it cannot be made, or if another process has it, of which `what_it_does` is said ("is training in runs/first").
    """
    lock = filelock.FileLock(path)
    with file_errors_as(error, "make the folder", path.parent):
        path.parent.mkdir(parents=True, exist_ok=True)
    with file_errors_as(error, "lock", path.parent):
        try:
            lock.acquire(timeout=0)
        except filelock.Timeout:  # an OSError, too
            raise error(f"another process {what_it_does}", hint="wait for it or stop it") from None
    try:
        yield
    finally:
        lock.release()


def unfinished(path: Path) -> list[Path]:
    """Return what writes to `path` that were killed have left beside it; also what one has that is under way."""
    return list(path.parent.glob(f".{glob.escape(path.name[:MOST_NAMED])}.*.tmp"))


def require_writable(path: Path) -> None:
    """Raise the OSError that writing to `path` would end in, as far as it can be known before work that takes long."""
    if is_stream(path):
        checked, needed = path, os.W_OK
    elif path.is_dir():
        raise IsADirectoryError(errno.EISDIR, os.strerror(errno.EISDIR), str(path))
    elif path.exists() and not path.is_file():
        raise OSError(errno.EINVAL, "it is no file, FIFO or character device", str(path))
    elif Path(os.path.realpath(path)).is_symlink():
        raise OSError(errno.ELOOP, os.strerror(errno.ELOOP), str(path))
    else:
        checked, needed = Path(os.path.realpath(path)).parent, os.W_OK | os.X_OK
        if not stat.S_ISDIR(checked.stat().st_mode):
            raise NotADirectoryError(errno.ENOTDIR, os.strerror(errno.ENOTDIR), str(checked))
    if not os.access(checked, needed):
        # no permissions help where a disk is mounted for reading only
        read_only = os.name != "nt" and os.statvfs(checked).f_flag & os.ST_RDONLY
        reason = errno.EROFS if read_only else errno.EACCES
        raise OSError(reason, os.strerror(reason), str(checked))


def is_stream(path: Path) -> bool:
    """Return whether `path` is, or leads to, a FIFO or a character device: it takes what is written and keeps nothing."""
    return path.is_fifo() or path.is_char_device()


def permissions(path: Path) -> int:
    """Return the permission bits of a file, those for who runs it as another user left out. Raises: OSError."""
    return stat.S_IMODE(path.stat().st_mode) & 0o777


def flush_folder(folder: Path) -> None:
    """Flush a folder's entries, so that a rename survives a power cut. Windows cannot open a folder, and does it by itself."""
    if os.name == "nt":
        return
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
