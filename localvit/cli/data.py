"""`localvit data check`: the data as a run would use it, and what is wrong with it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated, Literal

import tyro

from localvit.cli.arguments import data_section, one_line_errors
from localvit.errors import printable

if TYPE_CHECKING:
    from localvit.data import Part, Splits

_MOST_CLASSES = 40


@dataclass(frozen=True, kw_only=True)
class Options:
    """Open data as a training run does: count classes, refuse overlap, compare the contents of all files.

    Exit code 0 if nothing is wrong; 1 if files of two splits have equal contents or an image cannot be
    decoded; 2 if a run would be refused. Nothing is written.

    Example: localvit data check photos/train --val-data photos/test
    """

    action: Annotated[Literal["check"], tyro.conf.Positional]
    """check"""
    data: Annotated[str, tyro.conf.Positional, tyro.conf.arg(metavar="SRC")]
    """training images: digits, an image folder, a .tar, or a name for timm.data.create_dataset"""
    val_data: Annotated[str | None, tyro.conf.arg(metavar="SRC")] = None
    """test images (as for train)"""
    data_root: Annotated[str | None, tyro.conf.arg(metavar="FOLDER")] = None
    """folder of timm's named data sets"""
    seed: Annotated[int, tyro.conf.arg(metavar="N")] = 0
    """seed of the run, which decides the validation split"""
    allow_overlap: tyro.conf.FlagCreatePairsOff[bool] = False
    """count images that are in two splits or two classes instead of refusing them"""
    decode: tyro.conf.FlagCreatePairsOff[bool] = False
    """decode every image too"""
    set: Annotated[tyro.conf.UseAppendAction[tuple[str, ...]], tyro.conf.arg(metavar="KEY=VALUE")] = ()
    """any field of the configuration, e.g. data.validation=SRC or data.train_split=NAME"""


def run(options: Options) -> int:
    """Check; 0 if nothing is wrong, 1 for equal contents or damaged images."""
    from localvit.config import resolve

    with one_line_errors():
        config = resolve(None, options.set, {"data": data_section(options)})  # before torch (see train)
        from localvit.data import equal_contents, open_splits

        splits = open_splits(config.data, seed=options.seed)
        _print(splits)
        parts = {"train": splits.train, "test": splits.test, "validation": splits.validation}
        copies = equal_contents(parts, None)
        damaged = _decode(parts) if options.decode else []
    for note in (*splits.notes, *copies, *damaged):
        print(printable(note))
    if not copies:
        print("no files of two splits have equal contents")
    if options.decode and not damaged:
        print("all images can be decoded")
    return 1 if copies or damaged else 0


def _decode(parts: Mapping[str, Part]) -> list[str]:
    """Decode all images; return a sentence about each that is damaged."""
    from rich.console import Console
    from rich.progress import track

    from localvit.data import UnreadableImage

    images = [(name, part, i) for name, part in parts.items() for i in range(len(part))]
    damaged = []
    for name, part, i in track(images, "decoding", console=Console(stderr=True), transient=True):
        try:
            part[i]
        except UnreadableImage as error:
            damaged.append(f"{name}: {error}")
    return damaged


def _print(splits: Splits) -> None:
    """Print the number of images of each class."""
    import numpy as np
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    parts = (splits.train, splits.validation, splits.test)
    counts = np.stack([np.bincount(part.labels, minlength=splits.num_classes) for part in parts], axis=1)
    table = Table("class", "train", "validation", "test")
    for name, row in list(zip(splits.class_names, counts.tolist(), strict=True))[:_MOST_CLASSES]:
        table.add_row(Text(printable(name)), *map(str, row))
    if splits.num_classes > _MOST_CLASSES:
        table.add_row(f"({splits.num_classes - _MOST_CLASSES} more classes)")
    table.add_row("all", *map(str, counts.sum(0).tolist()))
    Console().print(table)
