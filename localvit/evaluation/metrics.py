"""Loss and accuracy from counts that add up over batches and processes."""

from __future__ import annotations

import time
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from timm.task.evaluator import ClassificationEvaluator
from torch import distributed

if TYPE_CHECKING:
    from jaxtyping import Float, Int


@dataclass(frozen=True, kw_only=True)
class Metrics:
    """Metrics on a set of images.

    Attributes:
        loss: Mean cross-entropy in nats.
        top1: Per cent of images whose top-1 prediction is correct.
        top5: Per cent with the right class among the first five.
        images: Number of images.
        images_per_second: Throughput, loading included.
    """

    loss: float
    top1: float
    top5: float
    images: int
    images_per_second: float


class Tally:
    """Sums of one process, held on the device so that no batch waits for another.

    Counts are integers and the loss is summed in float64 (timm's evaluator does both). Batch size and number
    of processes change the loss by rounding only, and accuracy not at all.

    Args:
        device: Device of the logits.
    """

    def __init__(self, device: torch.device) -> None:
        self._evaluator = ClassificationEvaluator(device)
        self._start = time.perf_counter()

    def add(self, logits: Float[torch.Tensor, "B classes"], targets: Int[torch.Tensor, " B"]) -> None:
        """Count a batch: logits (B, classes), targets (B,) int64. An empty batch changes nothing."""
        self._evaluator.update(logits, targets)

    def merge(self) -> None:
        """Add up the sums of all processes in each of them; call it once, in every process.

        Without a process group there is nothing to add. An image that two processes counted counts twice:
        give each image to one process (`indices[rank::world_size]`; shards may differ in size or be empty).
        """
        if distributed.is_initialized():
            distributed.all_reduce(self._evaluator.counts)
            distributed.all_reduce(self._evaluator.loss_sum)

    def result(self) -> Metrics:
        """Return the metrics; throughput is that since the tally was made."""
        images = int(self._evaluator.counts[0])
        values = self._evaluator.compute()  # waits for the device
        seconds = time.perf_counter() - self._start
        return Metrics(**values, images=images, images_per_second=images / seconds)
