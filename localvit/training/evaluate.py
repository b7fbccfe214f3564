"""How good a model is on pictures that it has not seen."""

from __future__ import annotations

import time
from dataclasses import dataclass

import torch
from timm.task.evaluator import ClassificationEvaluator
from torch import nn
from torch.utils.data import DataLoader

from localvit.data import Batch
from localvit.data.loading import readable


@dataclass(frozen=True, kw_only=True)
class Metrics:
    """What was measured on a set of pictures.

    Attributes:
        loss: Mean cross-entropy in nats.
        top1: Per cent of pictures whose first guess is right.
        top5: Per cent with the right class among the first five.
        images: Number of pictures.
        images_per_second: Throughput, loading included.
    """

    loss: float
    top1: float
    top5: float
    images: int
    images_per_second: float


@torch.inference_mode()
def measure(model: nn.Module, loader: DataLoader[Batch], device: torch.device) -> Metrics:
    """Evaluate a model; it is left in the mode (training or not) in which it was.

    Args:
        model: Returns logits (B, classes).
        loader: From `eval_loader`.
        device: Where the model is.

    Raises:
        UnreadableImage: if a picture cannot be decoded.
    """
    evaluator = ClassificationEvaluator(device)
    training = model.training
    model.eval()
    start = time.perf_counter()
    try:
        for batch in map(readable, loader):
            output = model(batch.images.to(device, non_blocking=True))
            evaluator.update(output, batch.targets.to(device, non_blocking=True))
    finally:
        model.train(training)
    values = evaluator.compute()  # waits for the device
    seconds = time.perf_counter() - start
    images = evaluator.num_samples
    return Metrics(**values, images=images, images_per_second=images / seconds)
