"""`localvit evaluate`: metrics of a trained model on images."""

from __future__ import annotations

import os
from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated, Literal

import tyro

from localvit.atomic import check_folder_of
from localvit.cli.arguments import UsageError, one_line_errors
from localvit.errors import printable

if TYPE_CHECKING:
    from localvit.evaluation import Evaluation

_WEAKEST = 10


@dataclass(frozen=True, kw_only=True)
class Options:
    """Measure a trained model on images: loss, top-1, top-5, calibration, classes, images per second.

    Under torchrun the processes share the images, and the main process prints and writes.

    Example: localvit evaluate --checkpoint runs/digits --output digits.json
    """

    checkpoint: Annotated[str, tyro.conf.arg(metavar="X")]
    """a run's folder, an exported folder, a timm name with published weights, or a file of localvit export"""
    engine: Literal["onnxruntime", "openvino", "torch"] | None = None
    """(rare) engine of an exported file; required for .pt2, because it may run code of its author"""
    fuse: Annotated[bool, tyro.conf.FlagCreatePairsOff] = False
    """(rare) compute with the fused model (localvit.fuse): faster, equal up to rounding"""
    data: Annotated[str | None, tyro.conf.arg(metavar="SRC")] = None
    """images (as for train); default: the test split of the run that trained the model"""
    data_root: Annotated[str | None, tyro.conf.arg(metavar="FOLDER")] = None
    """(rare) folder of timm's named data sets"""
    split: Annotated[str, tyro.conf.arg(metavar="NAME")] = "validation"
    """(rare) split of an hfds/ or wds/ data set, e.g. 'val-{0000..0049}.tar'"""
    crop_pct: Annotated[float | None, tyro.conf.arg(metavar="RATIO")] = None
    """(rare) side of the centre crop as a fraction of the resized image; default: the model's own"""
    interpolation: Literal["nearest", "bilinear", "bicubic"] | None = None
    """(rare) interpolation of resized images; default: the model's own"""
    class_map: Annotated[str | None, tyro.conf.arg(metavar="FILE")] = None
    """(rare) .txt with the class name of each output, one per line"""
    restrict: Annotated[bool, tyro.conf.FlagCreatePairsOff] = False
    """(rare) predict only classes that have images"""
    real_labels: Annotated[str | None, tyro.conf.arg(metavar="FILE")] = None
    """(rare) also measure on reassessed ImageNet labels: default, or a JSON file of them"""
    allow_overlap: Annotated[bool, tyro.conf.FlagCreatePairsOff] = False
    """(rare) accept images that the model was trained on; the result says how many"""
    allow_change: Annotated[tyro.conf.UseAppendAction[tuple[str, ...]], tyro.conf.arg(metavar="data")] = ()
    """(rare) data: accept a test split that has changed since training; the result says how"""
    batch_size: Annotated[int, tyro.conf.arg(metavar="N")] = 128
    """images in a batch"""
    workers: Annotated[int, tyro.conf.arg(metavar="N")] = 0
    """data workers"""
    device: Annotated[str, tyro.conf.arg(metavar="NAME")] = "auto"
    """auto, cpu, cuda, cuda:1, ..."""
    output: Annotated[str | None, tyro.conf.arg(metavar="FILE")] = None
    """new file: .json for all results, .csv for one line per class"""
    confusion: Annotated[str | None, tyro.conf.arg(metavar="FILE")] = None
    """new .png file for the confusion matrix"""


def run(options: Options) -> int:
    """Evaluate; return 0."""
    from localvit.data import DataConfig
    from localvit.evaluation import check_drawing, evaluate

    with one_line_errors():
        _check_files(options)
        if options.confusion is not None:
            check_drawing()
        config = DataConfig(
            root=options.data_root,
            test_split=options.split,
            crop_pct=options.crop_pct,
            interpolation=options.interpolation,
            allow_overlap=options.allow_overlap,
        )
        result = evaluate(
            options.checkpoint,
            options.data,
            config=config,
            batch_size=options.batch_size,
            workers=options.workers,
            device=options.device,
            class_map=options.class_map,
            restrict=options.restrict,
            real_labels=options.real_labels,
            engine=options.engine,
            fuse=options.fuse,
            allow_change=options.allow_change,
        )
    if os.environ.get("RANK", "0") == "0":
        try:
            with one_line_errors():
                _write(options, result)
        finally:  # a full disk loses no numbers, and a console whose reader has ended no file
            _print(result)
    return 0


def _check_files(options: Options) -> None:
    """Refuse files of another kind, and those that exist or cannot be created."""
    for flag, path, suffixes in (
        ("output", options.output, (".json", ".csv")),
        ("confusion", options.confusion, (".png",)),
    ):
        if path is None:
            continue
        if not path.endswith(suffixes):
            raise UsageError(f"--{flag} {path} is not accepted; use a name in {' or '.join(suffixes)}")
        if os.path.lexists(path):
            raise UsageError(f"--{flag} {path}: the file exists; choose another name")
        check_folder_of(path, f"--{flag} ")


def _write(options: Options, result: Evaluation) -> None:
    from pathlib import Path

    from localvit.atomic import write_atomically, writing
    from localvit.evaluation import as_csv, as_json, draw_confusion

    form = as_csv if str(options.output).endswith(".csv") else as_json
    for path, make in ((options.output, form), (options.confusion, draw_confusion)):
        if path is not None:
            with writing(path):
                write_atomically(Path(path), make(result))


def _print(result: Evaluation) -> None:
    m = result.metrics
    print(
        printable(f"{result.checkpoint} ({result.form}) on {result.data}: ")
        + f"top-1 {m.top1:.2f} % [{result.top1.low:.2f} to {result.top1.high:.2f}], "
        f"top-5 {m.top5:.2f} % [{result.top5.low:.2f} to {result.top5.high:.2f}], loss {m.loss:.4f}, "
        f"calibration error {result.calibration_error:.2f} "
        f"({m.images} images, {m.images_per_second:,.0f} images/s)"
    )
    for note in result.notes:
        print(printable(note))
    if result.restricted:
        print(f"predictions restricted to the {len(result.classes)} classes that have images")
    if result.real is not None:
        real = result.real
        print(f"reassessed labels: top-1 {real.top1:.2f} %, top-5 {real.top5:.2f} % ({real.images} images)")
    _print_classes(result)


def _print_classes(result: Evaluation) -> None:
    """Print a table of the classes with the lowest top-1."""
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    weakest = sorted(result.classes, key=lambda row: row.top1)[:_WEAKEST]
    shown = "classes" if len(weakest) == len(result.classes) else f"weakest of {len(result.classes)} classes"
    table = Table(shown, "images", "top-1, %", "most often confused with")
    for row in weakest:
        confused = f"{row.confused_with} ({row.confused})" if row.confused_with is not None else "-"
        name = row.label if row.description == row.label else f"{row.label} {row.description}"
        table.add_row(*(Text(printable(t)) for t in (name, str(row.images), f"{row.top1:.2f}", confused)))
    Console().print(table)
