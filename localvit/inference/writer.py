"""Predictions in a file: appended as JSON Lines, resumed after any interruption, converted at the end.

Until `found.csv` is finished, `found.csv.part.jsonl` holds the predictions and `found.csv.part.json` the
settings that they were started with. A finished file never has missing images. The settings of a finished
shard stay in `found.csv.shard.json`, for the check that the other shards are of the same images.
"""

from __future__ import annotations

import fcntl
import hashlib
import importlib.util
import io
import os
import shutil
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from localvit.atomic import WriteFailed, check_folder_of, sync, writing
from localvit.engines import EngineKind
from localvit.errors import ConfigError, first_line
from localvit.inference.formats import FORMATS, from_json_line, to_json_line
from localvit.inference.model import fused, open_model
from localvit.inference.prediction import WHOLE, Prediction, Shard, check_settings, classify, find_files
from localvit.structure import build, parse_json, to_json

_AFTER = "; the same command resumes"


@dataclass(kw_only=True)
class PredictionProgress:
    """Progress of a file of predictions.

    Attributes:
        form: Form that computes (see `OpenModel`).
        total: Number of images in the finished file.
        found: Number of images in all shards; if it differs between shards, a folder has changed in between.
        resumed: Number of images that were in it when it was resumed.
        written: Number of images written since then.
        unreadable: Number of these images without a prediction.
        notes: Sentences about files that were left out.
    """

    form: str
    total: int
    found: int
    resumed: int = 0
    written: int = 0
    unreadable: int = 0
    notes: tuple[str, ...] = ()

    @property
    def done(self) -> int:
        """Images in the file."""
        return self.resumed + self.written


def write_predictions(
    model: str,
    paths: str | Sequence[str],
    output: str,
    *,
    top_k: int = 5,
    batch_size: int = 32,
    workers: int = 0,
    device: str = "auto",
    shard: Shard = WHOLE,
    engine: EngineKind | None = None,
    fuse: bool = True,
    watch: Callable[[PredictionProgress, Sequence[Prediction]], None] = lambda *_: None,
) -> PredictionProgress:
    """Classify images into a file, or resume one that was interrupted.

    After any interruption, the same call skips the images that are in the file. If only the conversion
    failed, it only converts.

    Args:
        model, paths: As `predict`, and so are `top_k`, `batch_size`, `workers`, `device`, `shard`, `engine`
            and `fuse`.
        output: A `.csv` (a line per class), a `.jsonl` (a line per image) or a `.parquet` (a folder of files
            with a row per class; needs pyarrow).
        watch: Function that is called at the start and after each written batch.

    Raises:
        ConfigError: as `predict`; if the file exists, cannot be created, is being written by another process,
            is damaged, or was started with another model, other images or other settings; if another shard of
            the same paths, in the same folder, is of other images.
        WriteFailed: if the file cannot be written, as on a full disk; the same call resumes.
    """
    check_settings(top_k, batch_size, workers)
    paths = [paths] if isinstance(paths, str) else paths
    path, (found, notes) = check_output(output), find_files(paths)
    opened = open_model(model, device, engine=engine)
    weights = opened.fingerprint()
    opened = fused(opened) if fuse else opened
    begun = {
        "weights": weights,
        "top_k": top_k,
        "shard": f"{shard.index}/{shard.count}",
        "form": opened.form,
        "images": f"{len(found)} files, digest {_digest(found)}",
        "inputs": _digest([os.path.abspath(each) for each in paths]),
    }
    files = shard.take(found)
    with _begun(path, begun), PredictionWriter(path, files) as writer:
        progress = PredictionProgress(
            form=opened.form, total=len(files), found=len(found), resumed=writer.images, notes=notes
        )
        progress.unreadable = writer.unreadable
        watch(progress, ())
        todo = files[writer.images :]
        for batch in classify(opened, todo, top_k=top_k, batch_size=batch_size, workers=workers):
            writer.append(batch)
            progress.written += len(batch)
            progress.unreadable += sum(one.error is not None for one in batch)
            watch(progress, batch)
        writer.finish()
    return progress


def check_output(output: str) -> Path:
    """Refuse a file that predictions cannot be written to. Writes nothing.

    Raises:
        ConfigError: if it exists, cannot be created, or has an unknown suffix.
    """
    path = Path(output)
    if path.suffix not in FORMATS:
        raise ConfigError(f"output={output!r} is not accepted; use a name that ends in {', '.join(FORMATS)}")
    if os.path.lexists(path):
        raise ConfigError(f"output={output!r} is already finished; choose another name")
    check_folder_of(path, "output=")
    if os.path.lexists(old := f"{output}.part"):
        raise ConfigError(f"{old!r} is from an older version and cannot be resumed; delete it")
    if path.suffix == ".parquet" and importlib.util.find_spec("pyarrow") is None:
        raise ConfigError("pyarrow is missing; run pip install 'localvit[parquet]'")
    return path


class PredictionWriter:
    """Growing file of predictions: a context, in which it is recovered, appended to and finished.

    Args:
        path: The finished file.
        files: Images of the finished file, in order.

    Attributes:
        images: Number of images that were in the file when it was opened.
        unreadable: Number of these images without a prediction.

    Raises:
        ConfigError: if the file is damaged.
        WriteFailed: if it cannot be written.
    """

    def __init__(self, path: Path, files: Sequence[str]) -> None:
        self.path, self.part = path, _beside(path, "jsonl")
        self.images = self.unreadable = 0
        end = self._recover(files) if self.part.exists() else 0
        with writing(path, _AFTER):
            # Unbuffered: a killed process loses no more than a batch, and closing writes nothing.
            self._file = open(self.part, "ab", buffering=0)  # noqa: SIM115  # see __exit__
            self._file.truncate(end)

    def __enter__(self) -> PredictionWriter:
        return self

    def __exit__(self, *_: object) -> None:
        self._file.close()

    def append(self, batch: Sequence[Prediction]) -> None:
        """Add predictions."""
        with writing(self.path, _AFTER):
            _write(self._file, "".join(map(to_json_line, batch)).encode())

    def finish(self) -> None:
        """Convert the predictions and give the file its name.

        Raises:
            WriteFailed: if that fails; the predictions stay.
        """
        convert, new = FORMATS[self.path.suffix], self.part
        with writing(self.path, _AFTER):
            os.fsync(self._file.fileno())
            if not os.path.samestat(os.fstat(self._file.fileno()), self.part.stat()):
                raise WriteFailed(f"{str(self.part)!r} was replaced by another process; repeat the command")
            if convert is not None:
                new = self._converted(convert)
            os.replace(new, self.path)
            self.part.unlink(missing_ok=True)
            sync(self.path.parent)

    def _converted(self, convert: Callable[[Iterator[Prediction], Path], None]) -> Path:
        """Write the predictions in another format and return where."""
        new = _beside(self.path, "new")
        _remove(new)  # of a process that was killed
        try:
            with open(self.part, "rb") as lines:
                convert(map(from_json_line, lines), new)
        except Exception as error:  # formats have exceptions of their own
            _remove(new)
            if isinstance(error, OSError):
                raise
            raise WriteFailed(
                f"{str(self.path)!r} cannot be written: {first_line(error)}; the predictions are in "
                f"{str(self.part)!r}, and the same command converts them"
            ) from error
        return new

    def _recover(self, files: Sequence[str]) -> int:
        """Count whole lines, which must be those of the first files, and return the position of their end."""
        end = 0
        with open(self.part, "rb") as lines:
            for line in lines:
                if not line.endswith(b"\n"):
                    break
                try:
                    prediction = from_json_line(line)
                    if prediction.path != files[self.images]:
                        raise ValueError("another image")
                except (ValueError, IndexError) as error:
                    raise ConfigError(
                        f"{str(self.part)!r} is damaged at byte {end}; delete it to start over"
                    ) from error
                self.images += 1
                self.unreadable += prediction.error is not None
                end += len(line)
        return end


@contextmanager
def _begun(path: Path, begun: dict[str, Any]) -> Iterator[None]:
    """Keep the growing file of `path` to one process and one set of settings.

    The file with these settings is locked meanwhile. The lock is POSIX's (`lockf`), which forked data
    workers do not inherit, so it ends with this process.
    """
    header, part = _beside(path, "json"), _beside(path, "jsonl")
    with writing(path, _AFTER):
        file = open(header, "ab+", buffering=0)  # noqa: SIM115
    with file:
        try:
            fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except (BlockingIOError, PermissionError) as error:  # POSIX allows either
            raise ConfigError(f"output={str(path)!r} is in use; wait for the other process") from error
        check_output(str(path))  # the other process may just have finished it
        _check_shards(path, begun)
        if part.exists():
            file.seek(0)
            _check_begun(part, file.read(), begun)
        else:
            with writing(path, _AFTER):
                file.truncate(0)
                _write(file, to_json(begun, indent=2).encode())
        yield
        with writing(path, _AFTER):
            if begun["shard"].endswith("/1"):
                header.unlink()
            else:
                os.replace(header, path.with_name(f"{path.name}.shard.json"))


def _check_shards(path: Path, begun: dict[str, Any]) -> None:
    """Refuse a shard if another shard of these inputs in the folder of `path` is of other images."""
    alike = {name: begun[name] for name in ("weights", "inputs")}
    others = {*path.parent.glob("*.shard.json"), *path.parent.glob("*.part.json")}
    for other in sorted(others - {_beside(path, "json")}):
        try:
            there = build(dict[str, Any], parse_json(other.read_text()))
        except (OSError, ValueError):
            continue  # not ours
        _, _, count = str(there.get("shard")).partition("/")
        same = begun["shard"].endswith(f"/{count}") and alike.items() <= there.items()
        if same and there.get("images") != begun["images"]:
            raise ConfigError(
                f"{other.name!r}: shard {there['shard']} is of {there['images']}, but now there are "
                f"{begun['images']}; delete it with its results, and classify all shards again"
            )


def _check_begun(part: Path, text: bytes, begun: dict[str, Any]) -> None:
    remedy = f"repeat the command that started it, or delete {str(part)!r} to start over"
    try:
        before = build(dict[str, Any], parse_json(text.decode()))
    except ValueError as error:
        raise ConfigError(
            f"{part.stem + '.json'!r} is damaged, so {part.name!r} cannot be resumed; {remedy}"
        ) from error
    for name, value in begun.items():
        if before.get(name) != value:
            raise ConfigError(
                f"{part.name!r} was started with {name}={before.get(name)!r}, not {value!r}; {remedy}"
            )


def _beside(path: Path, suffix: str) -> Path:
    return path.with_name(f"{path.name}.part.{suffix}")


def _digest(files: Sequence[str]) -> str:
    digest = hashlib.sha256()
    for file in files:
        digest.update(os.fsencode(file) + b"\0")
    return digest.hexdigest()[:16]


def _write(file: io.FileIO, content: bytes) -> None:
    """Write all of `content`; one call of an unbuffered file may write less."""
    while content:
        content = content[file.write(content) :]


def _remove(path: Path) -> None:
    if path.is_dir():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)
