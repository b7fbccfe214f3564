"""Progress of a training run on a console."""

from __future__ import annotations

import os
from collections.abc import Sequence
from types import TracebackType
from typing import Any, Self

from rich import progress
from rich.console import Console

from localvit.cost import count_parameters
from localvit.errors import printable
from localvit.evaluation import Metrics
from localvit.training.run import TrainingRun

WAIT = 0.2
"""Fraction of time waited for images above which a warning is shown."""
_WORTH_A_WORD = 10.0
"""Seconds waited in an epoch below which no warning is shown: data workers take that long to start."""


def slow_data(metrics: dict[str, Any], workers: int, gpu: bool) -> str | None:
    """Return advice about an epoch that waited for its images; `None` if there is none.

    Args:
        metrics: Metrics of the epoch.
        workers: Number of data workers.
        gpu: The model computes on a GPU. Without one and without workers, loading and computing alternate
            in one process: loading is work there, not waiting.
    """
    waited, cores = metrics["data_wait"], os.cpu_count() or 1
    if waited <= WAIT or waited * metrics["seconds"] < _WORTH_A_WORD or not (gpu or workers):
        return None
    advice = "raise workers" if workers < cores else "all cores are used, so store smaller images"
    return (
        f"training waited for images for {100 * waited:.0f} % of the epoch, with workers={workers} on "
        f"{cores} cores; {advice} (docs/data.md)"
    )


class TrainingProgress:
    """Progress bar (images/s, waiting for data, remaining time) and one line per epoch.

    Args:
        console: Console to print on; `None` shows nothing.
        run: The run.
    """

    def __init__(self, console: Console | None, run: TrainingRun) -> None:
        self.console, self.run = console or Console(quiet=True), run
        self.gpu, self.warned = run.world.device.type != "cpu", False
        self.bar = progress.Progress(
            progress.TextColumn("{task.description}"),
            progress.BarColumn(),
            progress.TextColumn("{task.fields[speed]}"),
            progress.TimeRemainingColumn(),
            console=self.console,
            transient=True,
            disable=not self.console.is_terminal,
        )
        images = run.config.epochs * run.state.steps_per_epoch * run.config.batch_size
        self.task = self.bar.add_task("training", total=images, speed="")

    def __enter__(self) -> Self:
        model, splits = self.run.config.model, self.run.splits
        size = " x ".join(map(str, self.run.preprocessing.input_size[1:]))
        locality = " + locality" if model.locality is not None else ""
        parameters = count_parameters(self.run.engine.evaluated)
        self.console.print(
            f"{printable(model.name)}{locality}: {parameters / 1e6:.3g} M parameters; images: "
            f"{len(splits.train)} training, {len(splits.validation)} validation, {len(splits.test)} test; "
            f"{splits.num_classes} classes; {size} pixels",
            markup=False,
            highlight=False,
            soft_wrap=True,
        )
        for note in self.run.notes:
            self.note(note)
        self.bar.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.bar.stop()

    def resume(self, warnings: Sequence[str]) -> None:
        """Show the step from which the run resumes."""
        for warning in warnings:
            self.note(f"warning: {warning}")
        self.note(f"resuming {self.run.state.place}")
        self.bar.update(self.task, completed=self.run.state.step * self.run.config.batch_size)

    def note(self, line: str) -> None:
        """Show a line."""
        self.console.print(printable(line), style="dim", highlight=False, soft_wrap=True, markup=False)

    def advance(self, images: int, data_wait: float) -> None:
        """Count images that were trained on; `data_wait` is the fraction of the time spent waiting."""
        self.bar.advance(self.task, images)
        speed = self.bar.tasks[0].speed
        self.bar.update(
            self.task, speed=f"{speed:,.0f} images/s, data {100 * data_wait:.0f} %" if speed else ""
        )

    def epoch(self, metrics: dict[str, Any], improved: bool) -> None:
        """Print a finished epoch; a star marks the best one so far."""
        self.console.print(
            f"epoch {metrics['epoch']:>3}/{self.run.config.epochs}  loss {metrics['train_loss']:.4f}  "
            f"validation loss {metrics['validation_loss']:.4f}  top-1 {metrics['validation_top1']:6.2f} %"
            f"{' *' if improved else '  '}  {metrics['images_per_second']:,.0f} images/s, "
            f"data {100 * metrics['data_wait']:.0f} %",
            highlight=False,
            soft_wrap=True,
        )
        if not self.warned and (warning := slow_data(metrics, self.run.config.workers, self.gpu)):
            self.warned = True
            self.note(f"warning: {warning}")

    def finish(self, best_epoch: int, test: Metrics) -> None:
        """Print the test metrics."""
        self.console.print(
            f"best epoch {best_epoch} (by validation); test on {test.images} images: "
            f"top-1 {test.top1:.2f} %, top-5 {test.top5:.2f} %, loss {test.loss:.4f}",
            highlight=False,
            soft_wrap=True,
        )
