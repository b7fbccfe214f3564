"""Result of a run."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from torch import nn

from localvit.evaluation import Metrics


@dataclass(frozen=True, kw_only=True)
class RunResult:
    """Result of a run.

    Attributes:
        output: Its folder, if it has one.
        history: One mapping per epoch, as in `metrics.jsonl`: `epoch` (from 1), `lr` (at its end),
            `train_loss`, `validation_loss`, `validation_top1`, `validation_top5`, `seconds`,
            `images_per_second` (training only, loading included), `data_wait` (fraction of
            `seconds` spent waiting for images, 0 to 1; the mean of all processes).
        best_epoch: The epoch with the highest validation top-1; the lower loss, then the earlier epoch,
            decides between equals.
        validation: Metrics of that epoch, optimistic because it was chosen on them.
        test: Metrics of that epoch's weights on the test split, measured once.
        images_per_second: Median over the epochs.
        parameters: Number of parameters.
        notes: Sentences about the splits.
        model: The model with the weights of `best_epoch`, in evaluation mode.
    """

    output: str | None
    history: list[dict[str, Any]]
    best_epoch: int
    validation: Metrics
    test: Metrics
    images_per_second: float
    parameters: int
    notes: tuple[str, ...]
    model: nn.Module
