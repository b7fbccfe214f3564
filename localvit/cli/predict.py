"""`localvit predict`: classes of images, predicted by a trained model."""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated, Any, Literal

import tyro

from localvit.cli.arguments import UsageError, one_line_errors
from localvit.errors import printable

if TYPE_CHECKING:
    from localvit.inference import Prediction, PredictionProgress, Shard


@dataclass(frozen=True, kw_only=True)
class Options:
    """Classify any number of images. The exit code is 0 if any image could be read, else 1.

    With --output, an interrupted command (Ctrl-C, SIGTERM) ends with exit code 0, and the same command
    resumes. Under torchrun each process takes a shard and writes NAME-RANK-of-N.SUFFIX.

    Example: localvit predict --checkpoint runs/digits images/ --output found.csv
    """

    checkpoint: Annotated[str, tyro.conf.arg(metavar="X")]
    """a run's folder, an exported folder, a timm name with published weights, or a file of localvit export"""
    engine: Literal["onnxruntime", "openvino", "torch"] | None = None
    """(rare) engine of an exported file; required for .pt2, because it may run code of its author"""
    fuse: tyro.conf.FlagCreatePairsOff[bool] = True
    """(rare) compute with the plain model, not the fused one (localvit.fuse)"""
    paths: Annotated[tyro.conf.Positional[tuple[str, ...]], tyro.conf.arg(metavar="PATHS")] = ()
    """files, and folders to search for images"""
    top_k: Annotated[int, tyro.conf.arg(metavar="N")] = 5
    """number of classes per image"""
    format: Literal["table", "json", "jsonl", "csv"] = "table"
    """format on the console; the suffix of --output decides the format of that file"""
    output: Annotated[str | None, tyro.conf.arg(metavar="FILE")] = None
    """new .csv, .jsonl or .parquet; until it is finished, results are in FILE.part.jsonl"""
    shard: Annotated[str | None, tyro.conf.arg(metavar="I/N")] = None
    """(rare) classify only block I (from 0) of N"""
    batch_size: Annotated[int, tyro.conf.arg(metavar="N")] = 32
    """images in a batch"""
    workers: Annotated[int, tyro.conf.arg(metavar="N")] = 0
    """data workers"""
    device: Annotated[str, tyro.conf.arg(metavar="NAME")] = "auto"
    """auto, cpu, cuda, cuda:1, ..."""


def run(options: Options) -> int:
    """Predict; return 0 if any image could be read or the command was interrupted, else 1."""
    if not options.paths:
        raise UsageError("PATHS is missing; add image files or folders")
    with one_line_errors():
        shard, device, output = _place(options)
        batches = {"top_k": options.top_k, "batch_size": options.batch_size, "workers": options.workers}
        opening: dict[str, Any] = {"device": device, "engine": options.engine, "fuse": options.fuse}
        if output is None:
            return _print(options, shard, batches, opening)
        form = options.format
        if form not in ("table", output.rpartition(".")[2]):
            raise UsageError(f"--format {form} is not accepted for {output}; use a name that ends in .{form}")
        return _write(options, output, {"shard": shard, **batches, **opening})


def _place(options: Options) -> tuple[Shard, str, str | None]:
    """Return shard, device and file of this process."""
    from localvit.inference import Shard, process_shard

    shard, device = process_shard(options.device)
    output, text = options.output, options.shard
    if shard.count > 1:
        if text is not None:
            raise UsageError(f"--shard {text} is not accepted under torchrun; leave it out")
        if output is None:
            raise UsageError("processes of torchrun cannot share the console; add --output FILE")
        stem, dot, suffix = output.rpartition(".")
        output = f"{stem}-{shard.index}-of-{shard.count}{dot}{suffix}"
    elif text is not None:
        index, slash, count = text.partition("/")
        if not (slash and index.isdecimal() and count.isdecimal()):
            raise UsageError(f"--shard {text} is not accepted; use two integers such as 0/4")
        shard = Shard(index=int(index), count=int(count))
    return shard, device, output


def _print(options: Options, shard: Shard, batches: dict[str, int], opening: dict[str, Any]) -> int:
    """Print predictions batch by batch."""
    from localvit.inference import check_settings, classify, find_files, open_model

    check_settings(**batches)
    found, notes = find_files(options.paths)
    files = shard.take(found)
    model = open_model(options.checkpoint, **opening)
    for note in (f"{model.source}: {model.form}", *notes):
        print(f"localvit: {printable(note)}", file=sys.stderr)
    begin, encode, separator, end = _layout(options.format)
    count = failed = 0
    for one in (one for batch in classify(model, files, **batches) for one in batch):
        print(separator if count else begin, encode(one), sep="", end="")
        count += 1
        failed += one.error is not None
        _complain([one])
    print(end if count else begin + end, end="")
    return _conclude(failed, count)


def _layout(format: str) -> tuple[str, Callable[[Prediction], str], str, str]:
    """Return the beginning, the encoder of a prediction, the separator, and the end."""
    from localvit.inference import COLUMNS, to_csv, to_csv_lines, to_json_line

    if format == "json":
        return "[\n", lambda one: to_json_line(one).rstrip("\n"), ",\n", "\n]\n"
    if format == "jsonl":
        return "", to_json_line, "", ""
    if format == "csv":
        return to_csv([COLUMNS]), to_csv_lines, "", ""
    return _table_row("probability", "class", "file"), _table_rows, "", ""


def _table_rows(one: Prediction) -> str:
    if one.error is not None:
        return _table_row("-", "(no prediction)", one.path)
    rows = ((f"{guess.probability:.3f}", guess.label, one.path) for guess in one.guesses)
    return "".join(_table_row(*row) for row in rows)


def _table_row(probability: str, label: str, path: str) -> str:
    return f"{probability:>11}  {printable(label):<32}  {printable(path)}\n"


def _write(options: Options, output: str, arguments: dict[str, Any]) -> int:
    """Write predictions to a file."""
    from localvit.inference import write_predictions
    from localvit.runtime import stop_on_signals, stop_requested

    last: list[PredictionProgress] = []
    with stop_on_signals(), _bar() as show:

        def watch(progress: PredictionProgress, batch: Sequence[Prediction]) -> None:
            for note in () if last else progress.notes:
                print(f"localvit: {printable(note)}", file=sys.stderr)
            if not last and progress.resumed:
                print(f"{output}: resumed after {progress.resumed:,} of {progress.total:,} images")
            last[:] = [progress]
            _complain(batch)
            show(progress)
            if stop_requested():  # between batches: a data worker may be sending one
                raise KeyboardInterrupt

        try:
            done = write_predictions(options.checkpoint, options.paths, output, **arguments, watch=watch)
        except KeyboardInterrupt:
            where = f"after {last[0].done:,} of {last[0].total:,} images" if last else "before the first"
            print(f"localvit: interrupted {where}; the same command resumes", file=sys.stderr)
            return 0
    of = f" of {done.found:,}" if done.found > done.total else ""
    print(f"{output}: {done.total:,}{of} images ({done.form})")
    return _conclude(done.unreadable, done.total)


@contextlib.contextmanager
def _bar() -> Iterator[Callable[[PredictionProgress], None]]:
    """Yield a function that shows the progress of a file on a terminal."""
    from rich import progress
    from rich.console import Console

    console = Console(stderr=True)
    columns = (progress.BarColumn(), progress.MofNCompleteColumn(), progress.TimeRemainingColumn())
    bar = progress.Progress(*columns, console=console, transient=True, disable=not console.is_terminal)
    task = bar.add_task("images", total=None)
    with bar:
        yield lambda now: bar.update(task, total=now.total, completed=now.done)


def _complain(predictions: Sequence[Prediction]) -> None:
    for one in predictions:
        if one.error is not None:
            path, error = printable(one.path), printable(one.error)
            print(f"localvit: cannot classify {path}: {error}", file=sys.stderr)


def _conclude(failed: int, count: int) -> int:
    if failed:
        print(f"localvit: {failed} of {count} files have no prediction", file=sys.stderr)
    return 0 if failed < count or not count else 1
