"""Code that is told what a run does, beside `metrics.jsonl`, which is the contract."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from localvit.config import TrainConfig
from localvit.errors import ConfigError
from localvit.structure import to_yaml
from localvit.training.result import RunResult


class Callback:
    """Override what you need. Called in the first process only; an exception ends the run as failed."""

    def on_start(self, config: TrainConfig, folder: Path | None) -> None:
        """Training is about to begin or to go on; `folder` has the epochs so far in its `metrics.jsonl`."""

    def on_epoch(self, metrics: dict[str, Any]) -> None:
        """An epoch is over and saved; `metrics` is its line in `metrics.jsonl`."""

    def on_end(self, result: RunResult) -> None:
        """The run is finished."""


class TensorBoard(Callback):
    """Writes each epoch's numbers for TensorBoard, to the folder `tensorboard` in the run's own.

    Raises:
        ConfigError: if tensorboard is not installed.
    """

    def __init__(self) -> None:
        try:
            from torch.utils.tensorboard import SummaryWriter  # an extra, and slow to import
        except ImportError as error:
            raise ConfigError("TensorBoard is not installed: pip install 'localvit[tracking]'") from error
        self._make = SummaryWriter

    def on_start(self, config: TrainConfig, folder: Path | None) -> None:
        """Begin, or go on after the last epoch of the run."""
        if folder is None:
            raise ConfigError("output=None: TensorBoard needs a folder")
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
        """Add the reported numbers."""
        self._writer.add_text("test", f"top-1 {result.test.top1:.2f} %, best epoch {result.best_epoch}")
        self._writer.close()
