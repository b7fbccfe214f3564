"""Callbacks of a training run. The contract for other programs is `metrics.jsonl`."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from localvit.config import TrainConfig
from localvit.errors import ConfigError
from localvit.structure import to_yaml
from localvit.training.result import RunResult


class Callback:
    """Base class of callbacks, called in the main process only; an exception ends the run."""

    def on_start(self, config: TrainConfig, folder: Path | None) -> None:
        """Handle the start or resumption; `folder/metrics.jsonl` has the epochs so far."""

    def on_epoch(self, metrics: dict[str, Any]) -> None:
        """Handle a saved epoch; `metrics` is its line in `metrics.jsonl`."""

    def on_end(self, result: RunResult) -> None:
        """Handle the finished run."""


class TensorBoard(Callback):
    """TensorBoard writer of each epoch's metrics, in the folder `tensorboard` of the run.

    Raises:
        ConfigError: if tensorboard is not installed.
    """

    def __init__(self) -> None:
        try:
            from torch.utils.tensorboard import SummaryWriter  # an extra, and slow to import
        except ImportError as error:
            raise ConfigError("tensorboard is missing; run pip install 'localvit[tracking]'") from error
        self._make = SummaryWriter

    def on_start(self, config: TrainConfig, folder: Path | None) -> None:
        """Start, or resume after the last epoch of the run."""
        if folder is None:
            raise ConfigError("output=None is not accepted with TensorBoard; use a folder")
        metrics = folder / "metrics.jsonl"
        done = len(metrics.read_text(encoding="utf-8").splitlines()) if metrics.exists() else 0
        self._writer = self._make(str(folder / "tensorboard"), purge_step=done + 1)
        self._writer.add_text("config", f"```yaml\n{to_yaml(config)}```")

    def on_epoch(self, metrics: dict[str, Any]) -> None:
        """Add a point to each curve."""
        for name, value in metrics.items():
            if name != "epoch":
                self._writer.add_scalar(name, value, metrics["epoch"])
        self._writer.flush()

    def on_end(self, result: RunResult) -> None:
        """Add the test metrics."""
        self._writer.add_text("test", f"top-1 {result.test.top1:.2f} %, best epoch {result.best_epoch}")
        self._writer.close()
