"""Forms of written predictions: appended batch by batch, and readable again after any interruption."""

from __future__ import annotations

import csv
import dataclasses
import importlib.util
import io
import json
import os
from abc import ABC, abstractmethod
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

from localvit.atomic import write_atomically
from localvit.errors import ConfigError
from localvit.inference.prediction import Prediction

COLUMNS = ("path", "rank", "label", "probability", "error")
"""Of the forms with a row per guess. A file that could not be read has one row, with its error."""


class Form(ABC):
    """A file of predictions that is being written. `recover` comes first, then `append`, then `finish`.

    Args:
        path: The file, made if it is not there.
    """

    package: str | None = None
    """What must be installed for it."""

    @abstractmethod
    def __init__(self, path: Path) -> None: ...

    @classmethod
    def check(cls) -> None:
        """Refuse to begin where a package is missing.

        Raises:
            ConfigError: with what to install.
        """
        if cls.package is not None and importlib.util.find_spec(cls.package) is None:
            form = cls.__name__.lower()
            raise ConfigError(f"a .{form} file needs {cls.package}: pip install 'localvit[{form}]'")

    @staticmethod
    def name(path: str) -> str:
        """A picture's path as `recover` returns it."""
        return path

    @abstractmethod
    def recover(self) -> dict[str, bool]:
        """The pictures in the file, and whether each was unreadable; what is half-written is cut off.

        Raises:
            ConfigError: if it is damaged in another way.
        """

    @abstractmethod
    def append(self, batch: Sequence[Prediction]) -> None:
        """Add predictions."""

    @abstractmethod
    def finish(self) -> None:
        """See to it that everything is on the disk."""

    @abstractmethod
    def close(self) -> None:
        """Close the file, finished or not."""


class _Lines(Form):
    """Lines of text. Each batch reaches the operating system at once, so a killed process loses no more."""

    header = ""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._file = open(path, "r+b" if path.exists() else "w+b")  # noqa: SIM115  # see close

    def append(self, batch: Sequence[Prediction]) -> None:
        # Names that are no text keep their bytes.
        self._file.write("".join(map(self.encode, batch)).encode(errors="surrogateescape"))
        self._file.flush()

    def finish(self) -> None:
        self._file.flush()
        os.fsync(self._file.fileno())

    def close(self) -> None:
        self._file.close()

    @staticmethod
    @abstractmethod
    def encode(prediction: Prediction) -> str:
        """The whole lines of one prediction."""

    def _cut(self, end: int) -> None:
        """Drop everything from `end` on; without a whole header, begin anew."""
        self._file.truncate(end)
        self._file.seek(end)
        if not end:
            self._file.write(self.header.encode())

    def _damaged(self, offset: int) -> ConfigError:
        return ConfigError(f"{str(self._path)!r} is damaged at byte {offset}; delete it to begin anew")


class JsonLines(_Lines):
    """An object per picture: the fields of `Prediction`."""

    def recover(self) -> dict[str, bool]:
        known: dict[str, bool] = {}
        end = 0
        for line in self._file:
            if not line.endswith(b"\n"):
                break
            try:
                record = json.loads(line)
                known[record["path"]] = record["error"] is not None
            except (ValueError, KeyError, TypeError) as error:
                raise self._damaged(end) from error
            end += len(line)
        self._cut(end)
        return known

    @staticmethod
    def encode(prediction: Prediction) -> str:
        return json.dumps(dataclasses.asdict(prediction)) + "\n"


class Csv(_Lines):
    """A line per guess (see `COLUMNS`)."""

    header = ",".join(COLUMNS) + "\n"

    def recover(self) -> dict[str, bool]:
        known: dict[str, bool] = {}
        offset = end = 0

        def whole_lines() -> Iterator[str]:
            nonlocal offset
            for line in self._file:
                if not line.endswith(b"\n"):
                    return
                offset += len(line)
                yield line.decode(errors="surrogateescape")

        rows = csv.reader(whole_lines())
        if next(rows, list(COLUMNS)) != list(COLUMNS):
            raise self._damaged(0)
        last: tuple[str, bool] | None = None
        end = before = offset
        for row in rows:
            if last is not None and row[0] != last[0]:
                known[last[0]], end = last[1], before
            # Whether more guesses were to follow cannot be told, so the last picture is always done again.
            before, last = offset, (row[0], bool(row[-1]))
        self._cut(end)
        return known

    @staticmethod
    def encode(prediction: Prediction) -> str:
        text = io.StringIO()
        writer = csv.writer(text, lineterminator="\n")
        for path, rank, label, probability, error in rows_of([prediction]):
            shown = "" if probability is None else f"{probability:.6f}"
            writer.writerow([path, rank, label, shown, error])
        return text.getvalue()


class Parquet(Form):
    """A folder of files with a row per guess (see `COLUMNS`), each of them whole."""

    package = "pyarrow"
    pictures_per_file = 5000

    def __init__(self, path: Path) -> None:
        self._path = path
        self._waiting: list[Prediction] = []
        self._path.mkdir(exist_ok=True)

    @staticmethod
    def name(path: str) -> str:
        return path.encode(errors="backslashreplace").decode()  # Parquet holds nothing but text

    def recover(self) -> dict[str, bool]:
        from pyarrow import ArrowException, parquet

        known: dict[str, bool] = {}
        for file in self._files():
            try:
                table = parquet.read_table(file, columns=["path", "error"]).to_pydict()
            except ArrowException as error:
                raise ConfigError(
                    f"{str(file)!r} is damaged; delete it to have its pictures done again"
                ) from error
            known |= {p: e is not None for p, e in zip(table["path"], table["error"], strict=True)}
        return known

    def append(self, batch: Sequence[Prediction]) -> None:
        self._waiting += batch
        if len(self._waiting) >= self.pictures_per_file:
            self._write()

    def finish(self) -> None:
        # A shard without pictures is a folder with one file without rows.
        if self._waiting or not self._files():
            self._write()

    def close(self) -> None:
        if self._waiting:
            self._write()

    def _files(self) -> list[Path]:
        return sorted(self._path.glob("part-*.parquet"))

    def _write(self) -> None:
        import pyarrow
        from pyarrow import parquet

        types = (pyarrow.string(), pyarrow.int32(), pyarrow.string(), pyarrow.float32(), pyarrow.string())
        schema = pyarrow.schema(list(zip(COLUMNS, types, strict=True)))
        columns = list(zip(*rows_of(self._waiting), strict=True)) or [()] * len(COLUMNS)
        columns[0] = tuple(map(self.name, columns[0]))
        number = max((int(file.stem.removeprefix("part-")) for file in self._files()), default=-1) + 1
        # In memory first: whatever goes wrong on the disk, also at the last moment, is then an error of ours.
        content = pyarrow.BufferOutputStream()
        parquet.write_table(pyarrow.table([*map(list, columns)], schema=schema), content)
        write_atomically(self._path / f"part-{number:05d}.parquet", memoryview(content.getvalue()))
        self._waiting = []


FORMS: dict[str, type[Form]] = {".csv": Csv, ".jsonl": JsonLines, ".parquet": Parquet}
"""Suffix -> form."""


def rows_of(predictions: Iterable[Prediction]) -> Iterator[tuple[Any, ...]]:
    """The rows of `COLUMNS`; what a row does not have is ``None``."""
    for one in predictions:
        for rank, guess in enumerate(one.guesses, start=1):
            yield one.path, rank, guess.label, guess.probability, None
        if one.error is not None:
            yield one.path, None, None, None, one.error
