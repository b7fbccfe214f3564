"""What a person sees while a model trains."""

from __future__ import annotations

import os
from collections.abc import Sequence
from types import TracebackType
from typing import Any, Self

from rich import progress
from rich.console import Console

from localvit.config import TrainConfig
from localvit.data import Splits
from localvit.evaluation import Metrics

WAIT = 0.2
"""Share of the time spent waiting for pictures from which on a person is told."""
_WORTH_A_WORD = 10.0
"""Seconds waited in an epoch below which nobody is: then it was the start of the processes that load."""


def slow_data(metrics: dict[str, Any], workers: int, gpu: bool) -> str | None:
    """What to do about an epoch that waited for its pictures; ``None`` if that is nothing.

    Args:
        metrics: Of the epoch.
        workers: Processes that load.
        gpu: Whether the model computes on a GPU. Without one and without workers, one process does one thing
            after the other: loading is work there, not waiting.
    """
    share, cores = metrics["data_wait"], os.cpu_count() or 1
    if share <= WAIT or share * metrics["seconds"] < _WORTH_A_WORD or not (gpu or workers):
        return None
    advice = "raise workers" if workers < cores else "no core is left for more, so store the pictures smaller"
    return (
        f"training waited for pictures for {100 * share:.0f} % of the epoch, with workers={workers} on "
        f"{cores} cores: {advice} (docs/data.md)"
    )


class Progress:
    """A bar with images/s, waiting for data and remaining time for the whole run, and a line per epoch.

    Args:
        console: Where to; ``None`` shows nothing.
        config: The run.
        splits: Its data.
        parameters: Size of its model.
        gpu: Whether it computes elsewhere than on the cores that load pictures.
    """

    def __init__(
        self,
        console: Console | None,
        config: TrainConfig,
        splits: Splits,
        parameters: int,
        *,
        gpu: bool = False,
    ) -> None:
        self.console = console or Console(quiet=True)
        self.config, self.splits, self.parameters = config, splits, parameters
        self.gpu, self.warned = gpu, False
        self.bar = progress.Progress(
            progress.TextColumn("{task.description}"),
            progress.BarColumn(),
            progress.TextColumn("{task.fields[speed]}"),
            progress.TimeRemainingColumn(),
            console=self.console,
            transient=True,
            disable=not self.console.is_terminal,
        )
        whole_batches = len(splits.train) // config.batch_size * config.batch_size
        self.task = self.bar.add_task("training", total=config.epochs * whole_batches, speed="")

    def __enter__(self) -> Self:
        splits = self.splits
        locality = " + locality" if self.config.model.locality is not None else ""
        self.console.print(
            f"{self.config.model.name}{locality}: {self.parameters / 1e6:.3g} M parameters; images: "
            f"{len(splits.train)} training, {len(splits.validation)} validation, {len(splits.test)} test; "
            f"{splits.num_classes} classes",
            highlight=False,
            soft_wrap=True,
        )
        for note in splits.notes:
            self.note(note)
        self.bar.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.bar.stop()

    def resume(self, images: int, where: str, warnings: Sequence[str]) -> None:
        """The run goes on: so many images were trained on before."""
        for warning in warnings:
            self.note(f"warning: {warning}")
        self.note(f"going on {where}")
        self.bar.update(self.task, completed=images)

    def note(self, line: str) -> None:
        """Show a line."""
        self.console.print(line, style="dim", highlight=False, soft_wrap=True, markup=False)

    def advance(self, images: int, data_wait: float) -> None:
        """So many images more have been trained on; a share `data_wait` of the time went by waiting."""
        self.bar.advance(self.task, images)
        speed = self.bar.tasks[0].speed
        self.bar.update(
            self.task, speed=f"{speed:,.0f} images/s, data {100 * data_wait:.0f} %" if speed else ""
        )

    def epoch(self, metrics: dict[str, Any], improved: bool) -> None:
        """Show the line of a finished epoch; a star marks the best one so far."""
        self.console.print(
            f"epoch {metrics['epoch']:>3}/{self.config.epochs}  loss {metrics['train_loss']:.4f}  "
            f"validation loss {metrics['validation_loss']:.4f}  top-1 {metrics['validation_top1']:6.2f} %"
            f"{' *' if improved else '  '}  {metrics['images_per_second']:,.0f} images/s, "
            f"data {100 * metrics['data_wait']:.0f} %",
            highlight=False,
            soft_wrap=True,
        )
        if not self.warned and (warning := slow_data(metrics, self.config.workers, self.gpu)):
            self.warned = True
            self.note(f"warning: {warning}")

    def finish(self, best_epoch: int, test: Metrics) -> None:
        """Show the result that is reported."""
        self.console.print(
            f"best epoch {best_epoch} (by validation); test on {test.images} images: "
            f"top-1 {test.top1:.2f} %, top-5 {test.top5:.2f} %, loss {test.loss:.4f}",
            highlight=False,
            soft_wrap=True,
        )
