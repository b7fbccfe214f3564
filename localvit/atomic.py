"""Atomic writing of files and folders: complete at every instant, also after an interruption."""

from __future__ import annotations

import errno
import os
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from localvit.errors import ConfigError, Failed, first_line

DISK_IS_FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)


class WriteFailed(Failed):
    """Result that could not be written, for example because the disk is full."""


@contextmanager
def writing(path: str | Path, after: str = " or name another place") -> Iterator[None]:
    """Turn an `OSError` inside into an error that names the file.

    Args:
        path: The file.
        after: What follows the advice to make room, or to get permission.

    Raises:
        WriteFailed: for any `OSError`.
    """
    try:
        yield
    except OSError as error:
        reason, full = error.strerror or first_line(error), error.errno in DISK_IS_FULL
        advice = "make room" if full else "get permission"
        raise WriteFailed(f"{str(path)!r} cannot be written: {reason}; {advice}{after}") from error


def check_folder_of(file: str | Path, name: str) -> None:
    """Refuse a new file whose folder does not exist or cannot be written.

    Args:
        file: The file.
        name: Its name in the message, such as `"output="`.

    Raises:
        ConfigError: naming file and folder.
    """
    folder = Path(file).parent
    if not folder.is_dir() or not os.access(folder, os.W_OK):
        state = "is not writable" if folder.is_dir() else "does not exist"
        raise ConfigError(f"{name}{str(file)!r}: the folder {str(folder)!r} {state}; choose another")


def write_atomically(path: Path, *contents: str | bytes | memoryview) -> None:
    """Write a file atomically: a reader, even after a crash, gets all of the old or all of the new content.

    Args:
        path: The file.
        contents: Parts of the content, in order; text is encoded as UTF-8.

    Raises:
        OSError: if the file cannot be written; the old one does not change.
    """
    descriptor, temporary = tempfile.mkstemp(prefix=temporary_prefix(path.name), dir=path.parent)
    try:
        with os.fdopen(descriptor, "wb") as file:
            for content in contents:
                file.write(content.encode() if isinstance(content, str) else content)
            file.flush()
            os.fsync(file.fileno())
        os.chmod(temporary, 0o666 & ~umask())
        os.replace(temporary, path)
        sync(path.parent)
    except OSError as error:
        if error.filename is None:  # a failed write names no file
            error.filename = str(path)
        raise
    finally:
        if os.path.exists(temporary):
            os.unlink(temporary)


def move_into_place(new: Path, place: Path) -> None:
    """Move the folder `new` to `place`; if `place` exists, its files are replaced one by one.

    `place` has complete files at every instant. Two checkpoints of one run differ in their weights only, so a
    mixture of old and new files is a valid model too.
    """
    sync(new)
    if place.exists():
        for file in new.iterdir():
            os.replace(file, place / file.name)
        sync(place)
    else:
        os.rename(new, place)
        sync(place.parent)


def temporary_prefix(name: str) -> str:
    """Return the prefix of the names of unfinished versions of `name`."""
    return f".{name}-"


def sync(path: Path) -> None:
    """Flush a file or folder from memory to disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def umask() -> int:
    """Return the permissions that new files of this process do not get."""
    mask = os.umask(0)
    os.umask(mask)
    return mask
