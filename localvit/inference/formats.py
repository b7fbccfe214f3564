"""Formats of predictions: JSON Lines (an object per image), CSV and Parquet (a row per class)."""

from __future__ import annotations

import csv
import io
import itertools
import os
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

from localvit.inference.prediction import Prediction
from localvit.structure import build, parse_json, to_json

COLUMNS = ("path", "rank", "label", "probability", "error")
"""Columns of CSV and Parquet. An image without a prediction has one row, with its error."""
IMAGES_PER_FILE = 5000
"""Images in one file of a Parquet folder."""


def to_json_line(prediction: Prediction) -> str:
    """Write the fields of `Prediction` as one line of JSON, all ASCII."""
    return to_json(prediction, indent=None) + "\n"


def from_json_line(line: bytes) -> Prediction:
    """Read what `to_json_line` wrote.

    Raises:
        ValueError: if it is something else.
    """
    return build(Prediction, parse_json(line.decode()))


def to_csv_lines(prediction: Prediction) -> str:
    """Write a line of CSV for each row of a prediction."""
    return to_csv(rows_of(prediction), decimals=6)


def to_csv(rows: Iterable[Iterable[Any]], decimals: int | None = None) -> str:
    """Write rows of values as lines of CSV; `decimals` rounds floats."""
    text = io.StringIO()
    # Values are quoted for lines that end in \r\n: Python 3.11's reader needs quotes around \r too.
    writer = csv.writer(text, lineterminator="\r\n")
    lines = []
    for row in rows:
        rounded = decimals is not None
        writer.writerow(f"{v:.{decimals}f}" if rounded and isinstance(v, float) else v for v in row)
        lines.append(text.getvalue()[:-2])
        text.seek(text.truncate(0))
    return "\n".join([*lines, ""])


def rows_of(prediction: Prediction) -> list[tuple[Any, ...]]:
    """Return the rows of `COLUMNS`; a missing value is `None`."""
    path = prediction.path
    if prediction.error is not None:
        return [(path, None, None, None, prediction.error)]
    return [(path, i, one.label, one.probability, None) for i, one in enumerate(prediction.guesses, start=1)]


def write_csv(predictions: Iterator[Prediction], path: Path) -> None:
    """Write a line per class; names that are not UTF-8 keep their bytes."""
    with open(path, "w", encoding="utf-8", errors="surrogateescape", newline="") as file:
        file.write(to_csv([COLUMNS]))
        file.writelines(map(to_csv_lines, predictions))
        file.flush()
        os.fsync(file.fileno())


def write_parquet(predictions: Iterator[Prediction], path: Path) -> None:
    """Write a folder of files with a row per class; names that are not UTF-8 are escaped."""
    import pyarrow
    from pyarrow import parquet

    types = (pyarrow.string(), pyarrow.int32(), pyarrow.string(), pyarrow.float32(), pyarrow.string())
    schema = pyarrow.schema(list(zip(COLUMNS, types, strict=True)))
    path.mkdir()
    for number in itertools.count():
        images = list(itertools.islice(predictions, IMAGES_PER_FILE))
        if not images and number:  # a shard without images is one file without rows
            return
        rows = [dict(zip(COLUMNS, map(_text, row), strict=True)) for one in images for row in rows_of(one)]
        content = pyarrow.BufferOutputStream()  # a full disk is then an error of Python's file
        parquet.write_table(pyarrow.Table.from_pylist(rows, schema=schema), content)
        with open(path / f"part-{number:05d}.parquet", "wb") as file:
            file.write(memoryview(content.getvalue()))
            file.flush()
            os.fsync(file.fileno())


def _text(value: Any) -> Any:
    return value.encode(errors="backslashreplace").decode() if isinstance(value, str) else value


FORMATS: dict[str, Callable[[Iterator[Prediction], Path], None] | None] = {
    ".csv": write_csv,
    ".jsonl": None,
    ".parquet": write_parquet,
}
"""Suffix -> function that writes the format; `None` for JSON Lines, in which results are collected."""
