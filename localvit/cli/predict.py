"""``localvit predict``: what a trained model sees in pictures."""

from __future__ import annotations

import sys
from collections.abc import Iterable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated, Literal

import tyro

from localvit.cli.arguments import UsageError, one_line_errors
from localvit.cli.evaluate import check_new_file

if TYPE_CHECKING:
    from localvit.training import Prediction


@dataclass(frozen=True, kw_only=True)
class Options:
    """Classify pictures. Exit code 0 if any could be read, 1 if none could."""

    checkpoint: Annotated[str, tyro.conf.arg(metavar="X")]
    """a run's folder, an exported folder, or a timm name with published weights"""
    paths: Annotated[tyro.conf.Positional[tuple[str, ...]], tyro.conf.arg(metavar="PATHS")] = ()
    """files, and folders that are searched for pictures"""
    top_k: Annotated[int, tyro.conf.arg(metavar="N")] = 5
    """how many classes to name"""
    format: Literal["table", "json", "csv"] = "table"
    """table for reading, JSON or CSV for programs"""
    output: Annotated[str | None, tyro.conf.arg(metavar="FILE")] = None
    """write into a new file instead of the console"""
    batch_size: Annotated[int, tyro.conf.arg(metavar="N")] = 32
    """pictures at a time"""
    workers: Annotated[int, tyro.conf.arg(metavar="N")] = 0
    """processes that load pictures"""
    device: Annotated[str, tyro.conf.arg(metavar="NAME")] = "auto"
    """auto, cpu, cuda, cuda:1, ..."""


def run(options: Options) -> int:
    """Predict; 0 if any picture could be read, else 1."""
    from pathlib import Path

    from localvit.training import predict
    from localvit.training.output import write_atomically

    if not options.paths:
        raise UsageError("PATHS is missing: files or folders to classify")
    if options.output is not None:
        check_new_file(options.output)
    with one_line_errors():
        predictions = list(
            predict(
                options.checkpoint,
                options.paths,
                top_k=options.top_k,
                batch_size=options.batch_size,
                workers=options.workers,
                device=options.device,
            )
        )
    text = {"table": _table, "json": _json, "csv": _csv}[options.format](predictions)
    if options.output is not None:
        write_atomically(Path(options.output), text)
    else:
        print(text, end="")
    failed = [p for p in predictions if p.error is not None]
    for prediction in failed:
        print(f"localvit: cannot read image {prediction.path}: {prediction.error}", file=sys.stderr)
    if failed:
        print(f"localvit: {len(failed)} of {len(predictions)} files could not be read", file=sys.stderr)
    return 0 if len(failed) < len(predictions) else 1


def _table(predictions: Iterable[Prediction]) -> str:
    from rich.console import Console
    from rich.table import Table

    table = Table("file", "class", "probability")
    for prediction in predictions:
        labels = "\n".join(guess.label for guess in prediction.guesses)
        shares = "\n".join(f"{guess.probability:.3f}" for guess in prediction.guesses)
        table.add_row(prediction.path, labels or "(unreadable)", shares)
    console = Console()
    with console.capture() as capture:
        console.print(table)
    return capture.get()


def _json(predictions: Iterable[Prediction]) -> str:
    import dataclasses
    import json

    return json.dumps([dataclasses.asdict(p) for p in predictions], indent=2) + "\n"


def _csv(predictions: Iterable[Prediction]) -> str:
    import csv
    import io

    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(["path", "rank", "label", "probability", "error"])
    for prediction in predictions:
        for rank, guess in enumerate(prediction.guesses, start=1):
            writer.writerow([prediction.path, rank, guess.label, f"{guess.probability:.6f}", ""])
        if prediction.error is not None:
            writer.writerow([prediction.path, "", "", "", prediction.error])
    return text.getvalue()
