"""One process per folder, by a lock that ends with its owner, however the owner ends."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from localvit.errors import ConfigError

_NAME = ".lock"
_held: set[Path] = set()  # a process is never refused its own POSIX lock, so it has to remember


class FolderInUse(ConfigError):
    """Another process trains in the folder."""


@contextmanager
def locked(folder: Path) -> Iterator[None]:
    """Keep other processes out of a folder.

    The lock is POSIX's (``lockf``), which belongs to one process. One of ``flock`` belongs to an open file,
    which forked data workers share: it would outlive a killed trainer until its workers notice. Closing any
    descriptor of the file would drop a POSIX lock, so nothing else may open it. Where another machine
    trains into the same folder, the file system must pass locks on (NFS from version 4 does).

    Args:
        folder: It exists. The file stays there: removing it would let two processes lock two files.

    Raises:
        FolderInUse: if the folder is locked already.
        ConfigError: if it cannot be written to.
    """
    import fcntl  # POSIX only; what does not train needs no lock

    path = folder.resolve() / _NAME
    if path in _held:
        raise _refusal(folder)
    try:
        descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o666)
    except OSError as error:
        raise ConfigError(f"output={str(folder)!r} cannot be written: {error.strerror}") from error
    try:
        try:
            fcntl.lockf(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except (BlockingIOError, PermissionError) as error:  # POSIX allows either
            raise _refusal(folder) from error
        _held.add(path)
        yield
    finally:
        _held.discard(path)
        os.close(descriptor)


def has_lock_file(folder: Path) -> bool:
    """Whether a run ever locked the folder, so that trying to lock it writes nothing new."""
    return (folder / _NAME).exists()


def _refusal(folder: Path) -> FolderInUse:
    return FolderInUse(f"output={str(folder)!r}: another process trains there; wait for it or end it")
