"""Lock of a folder for one process, released however the process ends."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from localvit.errors import ConfigError

_NAME = ".lock"
_held: dict[Path, list[int]] = {}  # a process is never refused its own POSIX lock


class FolderInUse(ConfigError):
    """Error for a folder in which another process is working."""


@contextmanager
def locked(folder: Path) -> Iterator[None]:
    """Keep other processes out of a folder.

    There are two locks. The lock of a file is POSIX's (`lockf`): it belongs to one process, and NFS supports
    it from version 4 on. Closing any descriptor of the file would drop it, so nothing else may open it.
    The lock of the folder (`flock`, on file systems that have it) stays if that file is removed. It belongs
    to an open file, which data workers would inherit, so forked processes close it.

    Args:
        folder: An existing folder. The file stays there: removing it would let two processes lock two files.

    Raises:
        FolderInUse: if the folder is locked already.
        ConfigError: if it cannot be written to.
    """
    import fcntl  # POSIX only; only what trains needs a lock

    path = folder.resolve() / _NAME
    if path in _held:
        raise _refusal(folder)
    descriptors: list[int] = []
    try:
        descriptors.append(os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o666))
        descriptors.append(os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC))
        fcntl.lockf(descriptors[0], fcntl.LOCK_EX | fcntl.LOCK_NB)
        try:
            fcntl.flock(descriptors[1], fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise
        except OSError:
            pass  # no such lock on this file system
    except OSError as error:
        for descriptor in descriptors:
            os.close(descriptor)
        if isinstance(error, BlockingIOError) or len(descriptors) == 2:  # POSIX allows other errors too
            raise _refusal(folder) from error
        raise ConfigError(
            f"output={str(folder)!r} cannot be written: {error.strerror}; choose another"
        ) from error
    _held[path] = descriptors
    try:
        yield
    finally:
        for descriptor in _held.pop(path, ()):  # a forked process has closed them
            os.close(descriptor)


def has_lock_file(folder: Path) -> bool:
    """Return whether the folder has a lock file, so that locking it writes nothing."""
    return (folder / _NAME).exists()


def _refusal(folder: Path) -> FolderInUse:
    return FolderInUse(f"output={str(folder)!r}: another process is working there; wait for it or end it")


def _release_in_child() -> None:
    for descriptors in _held.values():
        for descriptor in descriptors:
            with suppress(OSError):
                os.close(descriptor)
    _held.clear()


os.register_at_fork(after_in_child=_release_in_child)
