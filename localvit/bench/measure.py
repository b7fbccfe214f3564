"""Interleaved timing: a machine that is slow for a while is slow for all."""

from __future__ import annotations

import contextlib
import statistics
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass

import torch

Work = Callable[[], object]
Timer = Callable[[Work], float]
"""Function that times one call of a work, in seconds."""


@dataclass(frozen=True)
class Quartiles:
    """Median and quartiles of measurements."""

    low: float
    median: float
    high: float

    @classmethod
    def of(cls, values: Sequence[float]) -> Quartiles:
        """Compute the quartiles of at least two values, with linear interpolation."""
        return cls(*statistics.quantiles(values, n=4, method="inclusive"))

    def __str__(self) -> str:
        return f"{self.median:.3g} [{self.low:.3g}, {self.high:.3g}]"


def wall_clock(work: Work, clock: Callable[[], float] = time.perf_counter) -> float:
    """Measure the elapsed seconds, or those of another clock."""
    start = clock()
    work()
    return clock() - start


def cuda_time(work: Work) -> float:
    """Measure the GPU seconds between two events."""
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    start.record()
    work()
    end.record()
    end.synchronize()
    return float(start.elapsed_time(end)) / 1e3


def timer_for(device: torch.device) -> Timer:
    """Return the timer of a device."""
    return cuda_time if device.type == "cuda" else wall_clock


def interleaved(
    works: Mapping[str, Work],
    rounds: int,
    *,
    timer: Timer = wall_clock,
    warm_up: int = 2,
    at_least: float = 0.0,
    progress: Callable[[range], Iterable[int]] = iter,
) -> dict[str, list[float]]:
    """Measure the seconds of each work in each round.

    Each work has a turn in every round. Every other round is in reverse order, so that a machine that becomes
    slower or faster favours none.

    Args:
        works: Name -> work.
        timer: Timer of one call.
        warm_up: Untimed calls of each beforehand (compilation, caches, first allocations).
        at_least: Seconds of a turn; shorter work is repeated within it, and its mean is reported.
        progress: Wrapper of the rounds, such as `rich.progress.track`.
    """
    repeats = dict.fromkeys(works, 1)
    for name, work in works.items():
        for _ in range(warm_up):
            work()
        if at_least > 0:
            repeats[name] = max(1, round(at_least / timer(work)))
    seconds: dict[str, list[float]] = {name: [] for name in works}
    for number in progress(range(rounds)):
        for name in list(works) if number % 2 == 0 else reversed(list(works)):
            seconds[name].append(timer(_repeated(works[name], repeats[name])) / repeats[name])
    return seconds


def ratio(seconds: Sequence[float], against: Sequence[float]) -> Quartiles:
    """Return the quartiles of the ratios of each round; below 1, the first is faster."""
    return Quartiles.of([a / b for a, b in zip(seconds, against, strict=True)])


def _repeated(work: Work, times: int) -> Work:
    def repeated() -> None:
        for _ in range(times):
            work()

    return repeated


@contextlib.contextmanager
def using_threads(threads: int | None) -> Iterator[None]:
    """Use this number of torch's threads in a context; `None` keeps theirs."""
    before = torch.get_num_threads()
    torch.set_num_threads(threads or before)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def without_gradients(work: Work) -> Work:
    """Return `work` in torch's inference mode."""

    def inference() -> object:
        with torch.inference_mode():
            return work()

    return inference
