"""``localvit evaluate``: how good a trained model is on pictures."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated

import tyro

from localvit.cli.arguments import UsageError, one_line_errors


@dataclass(frozen=True, kw_only=True)
class Options:
    """Measure a trained model on pictures: loss, top-1, top-5, images per second."""

    checkpoint: Annotated[str, tyro.conf.arg(metavar="X")]
    """a run's folder, an exported folder, or a timm name with published weights"""
    data: Annotated[str | None, tyro.conf.arg(metavar="SRC")] = None
    """pictures (as for train); without it, the test split of the run that trained the model"""
    data_root: Annotated[str | None, tyro.conf.arg(metavar="FOLDER")] = None
    """where timm's named data sets keep their files"""
    batch_size: Annotated[int, tyro.conf.arg(metavar="N")] = 128
    """pictures at a time"""
    workers: Annotated[int, tyro.conf.arg(metavar="N")] = 0
    """processes that load pictures"""
    device: Annotated[str, tyro.conf.arg(metavar="NAME")] = "auto"
    """auto, cpu, cuda, cuda:1, ..."""
    output: Annotated[str | None, tyro.conf.arg(metavar="FILE")] = None
    """write the result as JSON into a new file"""


def run(options: Options) -> int:
    """Evaluate; 0 when done."""
    import dataclasses
    import json
    from pathlib import Path

    from localvit.data import DataConfig
    from localvit.training import evaluate
    from localvit.training.output import write_atomically

    if options.output is not None:
        check_new_file(options.output)
    with one_line_errors():
        result = evaluate(
            options.checkpoint,
            options.data,
            config=DataConfig(root=options.data_root),
            batch_size=options.batch_size,
            workers=options.workers,
            device=options.device,
        )
    if options.output is not None:
        write_atomically(Path(options.output), json.dumps(dataclasses.asdict(result), indent=2) + "\n")
    m = result.metrics
    print(
        f"{result.checkpoint} on {result.data}: "
        f"top-1 {m.top1:.2f} %, top-5 {m.top5:.2f} %, loss {m.loss:.4f} "
        f"({m.images} images, {m.images_per_second:,.0f} images/s)"
    )
    return 0


def check_new_file(path: str) -> None:
    """Refuse a file that exists or cannot be made.

    Raises:
        UsageError: naming it.
    """
    import os

    folder = os.path.dirname(path) or "."
    if os.path.lexists(path):
        raise UsageError(f"--output {path}: the file exists already")
    if not os.path.isdir(folder) or not os.access(folder, os.W_OK):
        raise UsageError(f"--output {path}: {folder} is no writable folder")
