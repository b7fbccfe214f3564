"""Predictions in files that grow: an interrupted one is continued, a finished one is left alone.

Until it is finished, ``found.csv`` is called ``found.csv.part``, and ``found.csv.part.json`` says how it was
begun, so that it is continued in the same way. A finished file never has missing pictures.
"""

from __future__ import annotations

import fcntl
import hashlib
import io
import json
import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from localvit.atomic import writing
from localvit.engines import EngineKind
from localvit.errors import ConfigError, check_at_least
from localvit.inference.checkpoint import Checkpoint
from localvit.inference.exported import open_checkpoint
from localvit.inference.prediction import WHOLE, Prediction, Shard, classify, find_files
from localvit.inference.prediction_formats import FORMS, Form

_REMEDY = "make room, then the same command goes on"


@dataclass(kw_only=True)
class Progress:
    """How far a file is.

    Attributes:
        total: Pictures that belong into it.
        kept: How many were there when it was continued.
        written: How many have been written since.
        unreadable: How many of all these could not be read.
    """

    total: int
    kept: int = 0
    written: int = 0
    unreadable: int = 0

    @property
    def done(self) -> int:
        """Pictures in the file."""
        return self.kept + self.written


def check_predictions_file(output: str) -> Path:
    """Refuse a file that cannot take predictions. Writes nothing.

    Raises:
        ConfigError: if it is there already, cannot be made, or its name tells no format.
    """
    path = Path(output)
    if path.suffix not in FORMS:
        raise ConfigError(f"output={output!r} must end in {', '.join(FORMS)}")
    if os.path.lexists(path):
        raise ConfigError(f"output={output!r} is finished already; choose another name")
    if not path.parent.is_dir() or not os.access(path.parent, os.W_OK):
        raise ConfigError(f"output={output!r} cannot be written: {str(path.parent)!r} is no writable folder")
    FORMS[path.suffix].check()
    return path


def write_predictions(
    checkpoint: str,
    paths: Sequence[str],
    output: str,
    *,
    top_k: int = 5,
    batch_size: int = 32,
    workers: int = 0,
    device: str = "auto",
    shard: Shard = WHOLE,
    engine: EngineKind | None = None,
    watch: Callable[[Progress, Sequence[Prediction]], None] = lambda *_: None,
) -> Progress:
    """Classify pictures into a file, or go on with one that was interrupted.

    Pictures that are in the file are skipped; what was half-written is dropped first. Interrupt it however
    you like: the same call goes on where it was.

    Args:
        checkpoint: As `open_checkpoint`.
        paths: As `predict`.
        output: A ``.csv`` (a line per guess), a ``.jsonl`` (a line per picture) or a ``.parquet`` (a folder
            of files with a row per guess; needs pyarrow).
        top_k: As `predict`, and so are `batch_size`, `workers`, `device`, `shard` and `engine`.
        watch: Called at the start and with each batch after it was written.

    Raises:
        ConfigError: as `predict` and `check_predictions_file`; if an unfinished file was begun with another
            model or other settings, is damaged, or is being written by another process.
        WriteFailed: if the file cannot be written, as on a full disk; the same call goes on.
    """
    check_at_least(1, top_k=top_k, batch_size=batch_size)
    check_at_least(0, workers=workers)
    path = check_predictions_file(output)
    files = shard.take(find_files(paths))
    model = open_checkpoint(checkpoint, device, engine)
    part = path.with_name(path.name + ".part")
    settings = {
        "checkpoint": checkpoint,
        "weights": fingerprint(model),
        "top_k": top_k,
        "shard": f"{shard.index}/{shard.count}",
    }
    with _begun(path, part, settings), _opened(path, part) as file:
        with writing(path, _REMEDY):
            known = file.recover()
        todo = [one for one in files if file.name(one) not in known]
        unreadable = sum(known.get(file.name(one), False) for one in files)
        progress = Progress(total=len(files), kept=len(files) - len(todo), unreadable=unreadable)
        watch(progress, ())
        for batch in classify(model, todo, top_k=top_k, batch_size=batch_size, workers=workers):
            with writing(path, _REMEDY):
                file.append(batch)
            progress.written += len(batch)
            progress.unreadable += sum(one.error is not None for one in batch)
            watch(progress, batch)
        with writing(path, _REMEDY):
            file.finish()
    return progress


def fingerprint(model: Checkpoint) -> str:
    """A short value that tells two models apart: of weights, preprocessing and names of classes."""
    digest = hashlib.sha256(repr((model.preprocessing, model.descriptions)).encode())
    for name, value in model.model.state_dict().items():
        digest.update(name.encode())
        digest.update(value.detach().cpu().contiguous().view(-1).view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()[:16]


@contextmanager
def _opened(path: Path, part: Path) -> Iterator[Form]:
    """Open the unfinished file `part` of `path`, and close it."""
    with writing(path, _REMEDY):
        file = FORMS[path.suffix](part)
    try:
        yield file
    finally:
        with writing(path, _REMEDY):  # closing writes what is still in memory
            file.close()


@contextmanager
def _begun(path: Path, part: Path, settings: dict[str, Any]) -> Iterator[None]:
    """Keep `part` to one process and one way of being written; give it its name if all goes well.

    The file beside it that says how it was begun is locked meanwhile. The lock is POSIX's (``lockf``), which
    forked data workers do not share, so it ends with this process.
    """
    beside = part.with_name(part.name + ".json")
    with writing(path, _REMEDY):
        file = open(beside, "ab+", buffering=0)  # noqa: SIM115  # unbuffered, so that closing writes nothing
    with file:
        try:
            fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except (BlockingIOError, PermissionError) as error:  # POSIX allows either
            raise ConfigError(f"output={str(path)!r}: another process is writing it") from error
        check_predictions_file(str(path))  # the other process may just have finished it
        if part.exists():
            file.seek(0)
            _check_settings(part, file.read().decode(errors="replace"), settings)
        else:
            with writing(path, _REMEDY):
                _write_settings(file, settings)
        yield
        with writing(path, _REMEDY):
            os.replace(part, path)
            beside.unlink()


def _write_settings(file: io.FileIO, settings: dict[str, Any]) -> None:
    file.truncate(0)
    rest = (json.dumps(settings, indent=2) + "\n").encode()
    while rest:  # an unbuffered file may take less than it is given
        rest = rest[file.write(rest) :]


def _check_settings(part: Path, text: str, settings: dict[str, Any]) -> None:
    remedy = f"delete {str(part)!r} to begin anew"
    try:
        before = json.loads(text)
    except ValueError as error:
        raise ConfigError(f"{part.name + '.json'!r} does not say how it was begun; {remedy}") from error
    for name, value in settings.items():
        if before.get(name) != value:
            raise ConfigError(
                f"{part.name!r} was begun with {name}={before.get(name)!r}, not {value!r}; {remedy}"
            )
