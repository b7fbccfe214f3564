"""Inference throughput of models, measured alternately."""

from __future__ import annotations

import statistics
from collections.abc import Mapping
from functools import partial

import torch
from torch import nn

from localvit.bench import interleaved, timer_for, using_threads, without_gradients

THREADS = 1
"""CPU threads, as in training; with several threads, small models mostly wait."""
_SECONDS = 0.05  # per measurement: long enough for the clock, short enough to alternate often


def images_per_second(
    models: Mapping[str, nn.Module],
    input_sizes: Mapping[str, tuple[int, int, int]],
    *,
    batch_size: int = 64,
    rounds: int = 15,
    device: torch.device,
) -> dict[str, float]:
    """Measure the inference throughput of each model, without loading.

    The models are timed alternately, so that a machine that is slow for a while is slow for all. The result
    is the median over the rounds.

    Args:
        models: Name -> model; they stay on `device` in evaluation mode.
        input_sizes: Name -> (channels, height, width) of its images.
        batch_size: Images in a forward pass.
        device: Device; a CPU uses `THREADS`.
    """
    images = {name: torch.rand(batch_size, *input_sizes[name], device=device) for name in models}
    works = {
        name: without_gradients(partial(model.to(device).eval(), images[name]))
        for name, model in models.items()
    }
    with using_threads(THREADS):
        seconds = interleaved(works, rounds, timer=timer_for(device), warm_up=3, at_least=_SECONDS)
    return {name: batch_size / statistics.median(taken) for name, taken in seconds.items()}
