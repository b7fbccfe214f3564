"""``localvit predict``: what a trained model sees in pictures."""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated, Any, Literal

import tyro

from localvit.cli.arguments import UsageError, one_line_errors

if TYPE_CHECKING:
    from localvit.inference import Prediction, Progress, Shard


@dataclass(frozen=True, kw_only=True)
class Options:
    """Classify pictures, as many as there are. Exit code 0 if any could be read, 1 if none could.

    With --output, an interrupted command (Ctrl-C, SIGTERM) ends with exit code 0, and the same command goes
    on where it was. Under torchrun each process takes a shard and writes NAME-RANK-of-N.SUFFIX.
    """

    checkpoint: Annotated[str, tyro.conf.arg(metavar="X")]
    """a run's folder, an exported folder, a timm name with published weights, or a file of localvit export"""
    engine: Literal["onnxruntime", "openvino", "torch"] | None = None
    """what runs an exported file; it need not be named for .onnx and .xml, and must be for .pt2 (trust it)"""
    paths: Annotated[tyro.conf.Positional[tuple[str, ...]], tyro.conf.arg(metavar="PATHS")] = ()
    """files, and folders that are searched for pictures"""
    top_k: Annotated[int, tyro.conf.arg(metavar="N")] = 5
    """how many classes to name"""
    format: Literal["table", "json", "jsonl", "csv"] = "table"
    """on the console: a table for reading, the others for programs; a file's name tells its own"""
    output: Annotated[str | None, tyro.conf.arg(metavar="FILE")] = None
    """write a .csv, .jsonl or .parquet; called FILE.part until it is finished"""
    shard: Annotated[str | None, tyro.conf.arg(metavar="I/N")] = None
    """take block I (from 0) of N; results of 0/N to N-1/N, one after the other, are those of all"""
    batch_size: Annotated[int, tyro.conf.arg(metavar="N")] = 32
    """pictures at a time"""
    workers: Annotated[int, tyro.conf.arg(metavar="N")] = 0
    """processes that load pictures"""
    device: Annotated[str, tyro.conf.arg(metavar="NAME")] = "auto"
    """auto, cpu, cuda, cuda:1, ..."""


def run(options: Options) -> int:
    """Predict; 0 if any picture could be read or it was interrupted, else 1."""
    from localvit.inference import process_share

    if not options.paths:
        raise UsageError("PATHS is missing: files or folders to classify")
    with one_line_errors():
        shard, device = process_share(options.device)
        output = options.output
        if shard.count > 1:
            output = _own_file(options, shard)
        elif options.shard is not None:
            shard = _shard(options.shard)
        arguments = {
            "top_k": options.top_k,
            "batch_size": options.batch_size,
            "workers": options.workers,
            "device": device,
            "shard": shard,
            "engine": options.engine,
        }
        if output is None:
            return _print(options, arguments)
        if options.format != "table":
            _check_format(options.format, output)
        return _write(options, output, arguments)


def _shard(text: str) -> Shard:
    from localvit.inference import Shard

    index, slash, count = text.partition("/")
    if not (slash and index.isdecimal() and count.isdecimal()):
        raise UsageError(f"--shard {text}: two whole numbers are meant, such as 0/4")
    return Shard(index=int(index), count=int(count))


def _own_file(options: Options, shard: Shard) -> str:
    """The file of one of several processes."""
    import os

    if options.shard is not None:
        raise UsageError(f"--shard {options.shard}: under torchrun each process has its shard already")
    if options.output is None:
        raise UsageError("--output FILE is missing: processes of torchrun cannot share the console")
    stem, suffix = os.path.splitext(options.output)
    return f"{stem}-{shard.index}-of-{shard.count}{suffix}"


def _check_format(form: str, output: str) -> None:
    if not output.endswith(f".{form}"):
        raise UsageError(f"--format {form} is for the console, or the name {output} must end in .{form}")


def _print(options: Options, arguments: dict[str, Any]) -> int:
    """Predictions to the console, each batch as soon as it is there."""
    from localvit.inference import predict

    predictions = predict(options.checkpoint, options.paths, **arguments)
    count = failed = 0

    def counted() -> Iterator[Prediction]:
        nonlocal count, failed
        for prediction in predictions:
            yield prediction
            count += 1
            failed += prediction.error is not None
            _complain([prediction])

    for piece in _FORMATS[options.format](counted()):
        print(piece, end="")
    return _conclude(failed, count)


def _write(options: Options, output: str, arguments: dict[str, Any]) -> int:
    """Predictions to a file."""
    from localvit.inference import write_predictions
    from localvit.runtime import stop_on_signals, stop_requested

    last: list[Progress] = []
    with stop_on_signals(), _bar() as show:

        def watch(progress: Progress, batch: Sequence[Prediction]) -> None:
            if not last and progress.kept:
                print(f"{output}.part: going on after {progress.kept:,} of {progress.total:,} pictures")
            last[:] = [progress]
            _complain(batch)
            show(progress)
            if stop_requested():  # not in the midst of a batch, which a process that loads is handing over
                raise KeyboardInterrupt

        try:
            done = write_predictions(options.checkpoint, options.paths, output, **arguments, watch=watch)
        except KeyboardInterrupt:
            where = f"after {last[0].done:,} of {last[0].total:,} pictures" if last else "before the first"
            print(f"localvit: interrupted {where}; the same command goes on", file=sys.stderr)
            return 0
    print(f"{output}: {done.total:,} pictures")
    return _conclude(done.unreadable, done.total)


@contextlib.contextmanager
def _bar() -> Iterator[Callable[[Progress], None]]:
    """A function that shows how far a file is, on a terminal."""
    from rich import progress
    from rich.console import Console

    console = Console(stderr=True)
    columns = (progress.BarColumn(), progress.MofNCompleteColumn(), progress.TimeRemainingColumn())
    bar = progress.Progress(*columns, console=console, transient=True, disable=not console.is_terminal)
    task = bar.add_task("pictures", total=None)
    with bar:
        yield lambda now: bar.update(task, total=now.total, completed=now.done)


def _complain(predictions: Sequence[Prediction]) -> None:
    for one in predictions:
        if one.error is not None:
            print(f"localvit: cannot read image {one.path}: {one.error}", file=sys.stderr)


def _conclude(failed: int, count: int) -> int:
    if failed:
        print(f"localvit: {failed} of {count} files could not be read", file=sys.stderr)
    return 0 if failed < count or not count else 1


def _table(predictions: Iterator[Prediction]) -> Iterator[str]:
    yield f"{'probability':>11}  {'class':<32}  file\n"
    for one in predictions:
        for guess in one.guesses:
            yield f"{guess.probability:11.3f}  {guess.label:<32}  {one.path}\n"
        if one.error is not None:
            yield f"{'-':>11}  {'(unreadable)':<32}  {one.path}\n"


def _json(predictions: Iterator[Prediction]) -> Iterator[str]:
    from localvit.inference import JsonLines

    separator = "[\n"
    for one in predictions:
        yield separator + JsonLines.encode(one).rstrip("\n")
        separator = ",\n"
    yield "\n]\n" if separator.startswith(",") else "[]\n"


def _jsonl(predictions: Iterator[Prediction]) -> Iterator[str]:
    from localvit.inference import JsonLines

    return map(JsonLines.encode, predictions)


def _csv(predictions: Iterator[Prediction]) -> Iterator[str]:
    from localvit.inference import Csv

    yield Csv.header
    yield from map(Csv.encode, predictions)


_FORMATS: dict[str, Callable[[Iterator[Prediction]], Iterator[str]]] = {
    "table": _table,
    "json": _json,
    "jsonl": _jsonl,
    "csv": _csv,
}
