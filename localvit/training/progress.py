"""What a person sees while a model trains."""

from __future__ import annotations

from collections.abc import Sequence
from types import TracebackType
from typing import Any, Self

from rich import progress
from rich.console import Console

from localvit.data import Splits
from localvit.training.config import TrainConfig
from localvit.training.evaluate import Metrics


class Progress:
    """A bar with images/s and remaining time for the whole run, and a line per epoch.

    Args:
        console: Where to; ``None`` shows nothing.
        config: The run.
        splits: Its data.
        parameters: Size of its model.
    """

    def __init__(self, console: Console | None, config: TrainConfig, splits: Splits, parameters: int) -> None:
        self.console = console or Console(quiet=True)
        self.config, self.splits, self.parameters = config, splits, parameters
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

    def advance(self, images: int) -> None:
        """So many images more have been trained on."""
        self.bar.advance(self.task, images)
        speed = self.bar.tasks[0].speed
        self.bar.update(self.task, speed=f"{speed:,.0f} images/s" if speed else "")

    def epoch(self, metrics: dict[str, Any], improved: bool) -> None:
        """Show the line of a finished epoch; a star marks the best one so far."""
        self.console.print(
            f"epoch {metrics['epoch']:>3}/{self.config.epochs}  loss {metrics['train_loss']:.4f}  "
            f"validation loss {metrics['validation_loss']:.4f}  top-1 {metrics['validation_top1']:6.2f} %"
            f"{' *' if improved else '  '}  {metrics['images_per_second']:,.0f} images/s",
            highlight=False,
            soft_wrap=True,
        )

    def finish(self, best_epoch: int, test: Metrics) -> None:
        """Show the result that is reported."""
        self.console.print(
            f"best epoch {best_epoch} (by validation); test on {test.images} images: "
            f"top-1 {test.top1:.2f} %, top-5 {test.top5:.2f} %, loss {test.loss:.4f}",
            highlight=False,
            soft_wrap=True,
        )
