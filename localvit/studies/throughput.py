"""Images per second of models that are compared with each other."""

from __future__ import annotations

import statistics
import time
from collections.abc import Mapping

import torch
from torch import nn

THREADS = 1
"""On a CPU: as in training; several threads of small models wait for each other more than they work."""
_SECONDS = 0.05  # Of one measurement: long enough for the clock, short enough to alternate often.


def images_per_second(
    models: Mapping[str, nn.Module],
    input_sizes: Mapping[str, tuple[int, int, int]],
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
        input_sizes: Name -> (channels, height, width) of its images.
        batch_size: Images in a forward pass.
        rounds: How often each has its turn.
        device: Where to measure; on a CPU with `THREADS`.
    """
    threads = torch.get_num_threads()
    torch.set_num_threads(THREADS)
    try:
        images = {name: torch.rand(batch_size, *input_sizes[name], device=device) for name in models}
        for name, model in models.items():
            _seconds(model.to(device).eval(), images[name], 3)  # warm-up
        first = {name: _seconds(model, images[name], 3) for name, model in models.items()}
        taken: dict[str, list[float]] = {name: [] for name in models}
        for _ in range(rounds):
            for name, model in models.items():
                taken[name].append(_seconds(model, images[name], max(1, round(_SECONDS / first[name]))))
    finally:
        torch.set_num_threads(threads)
    return {name: batch_size / statistics.median(seconds) for name, seconds in taken.items()}


@torch.inference_mode()
def _seconds(model: nn.Module, images: torch.Tensor, repeats: int) -> float:
    """Mean time of a forward pass."""
    start = time.perf_counter()
    for _ in range(repeats):
        model(images)
    if images.is_cuda:
        torch.cuda.synchronize(images.device)
    return (time.perf_counter() - start) / repeats
