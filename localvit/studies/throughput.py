"""Images per second of models that are compared with each other."""

from __future__ import annotations

import statistics
from collections.abc import Mapping

import torch
from torch import nn
from torch.utils.benchmark import Timer

THREADS = 1
"""On a CPU: as in training, and the number least disturbed by what else the machine does."""
_SECONDS = 0.05  # Of one measurement: long enough for the clock, short enough to alternate often.


def images_per_second(
    models: Mapping[str, nn.Module],
    input_size: tuple[int, int, int],
    *,
    batch_size: int = 64,
    rounds: int = 15,
    device: torch.device,
) -> dict[str, float]:
    """Inference throughput of each model, without loading.

    The models take turns, so that a machine that is slow for a while is slow for all of them; the median
    of the rounds is reported.

    Args:
        models: Name -> model; they are left on `device` in evaluation mode.
        input_size: (channels, height, width) of the images.
        batch_size: Images in a forward pass.
        rounds: How often each has its turn.
        device: Where to measure; on a CPU with `THREADS`.
    """
    images = torch.rand(batch_size, *input_size, device=device)
    timers = {
        name: Timer(
            "with torch.inference_mode(): model(images)",
            globals={"model": model.to(device).eval(), "images": images},
            num_threads=THREADS,
        )
        for name, model in models.items()
    }
    first = {name: timer.timeit(3).median for name, timer in timers.items()}
    repeats = {name: max(1, round(_SECONDS / seconds)) for name, seconds in first.items()}
    seconds: dict[str, list[float]] = {name: [] for name in models}
    for _ in range(rounds):
        for name, timer in timers.items():
            seconds[name].append(timer.timeit(repeats[name]).median)
    return {name: batch_size / statistics.median(taken) for name, taken in seconds.items()}
