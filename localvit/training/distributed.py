"""The processes that train one model together, as ``torchrun`` starts them; one process is the plain case."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from typing import Any, TypeVar

import torch
from torch import distributed as dist

from localvit.training.build import pick_device
from localvit.training.config import ConfigError

T = TypeVar("T")

TIMEOUT = timedelta(minutes=10)
"""How long processes wait for one that vanished without a word (a host without power); a process that ends is
noticed at once. Long enough for what the first does alone: to look at the data and to write states."""


@dataclass(frozen=True, kw_only=True)
class World:
    """This process among all of them. Every method but `first` must be called by all processes.

    Attributes:
        device: Where this process computes.
        rank: 0 to `size` - 1.
        size: Number of processes.
    """

    device: torch.device
    rank: int = 0
    size: int = 1

    @property
    def first(self) -> bool:
        """Whether this is the process that writes and speaks."""
        return self.rank == 0

    def agree(self, *values: float) -> list[float]:
        """The largest of each value over the processes."""
        if self.size == 1:
            return list(values)
        largest = torch.tensor(values, dtype=torch.float64)  # on the CPU: no GPU has to wait
        dist.all_reduce(largest, op=dist.ReduceOp.MAX)
        return largest.tolist()

    def total(self, values: torch.Tensor) -> torch.Tensor:
        """The sum over the processes."""
        if self.size > 1:
            values = values.clone()
            dist.all_reduce(values)
        return values

    def gather(self, value: T) -> list[T]:
        """What each process gave, by rank; empty in all but the first."""
        if self.size == 1:
            return [value]
        values: list[Any] | None = [None] * self.size if self.first else None
        dist.gather_object(value, values)
        return values or []

    def from_first(self, make: Callable[[], T]) -> T:
        """What `make` returns, or the error that it raises, in the first process, which alone calls it."""
        if self.size == 1:
            return make()
        box: list[Any] = [None, None]
        if self.first:
            try:
                box[0] = make()
            except Exception as error:
                box[1] = error
        dist.broadcast_object_list(box)
        if box[1] is not None:
            raise box[1]
        return box[0]


@contextmanager
def open_world(device: str) -> Iterator[World]:
    """The processes that ``torchrun`` started (it says so in the environment), or this one alone.

    Gloo connects CPUs, NCCL GPUs. A process group that is there already is used and left open.

    Args:
        device: As in `TrainConfig`; with several processes, ``"auto"`` and ``"cuda"`` give each its own GPU
            of its machine.

    Raises:
        ConfigError: if there is no such device for this process.
    """
    size = int(os.environ.get("WORLD_SIZE", "1"))
    if size == 1:
        yield World(device=pick_device(device))
        return
    chosen = _own_device(device, int(os.environ.get("LOCAL_RANK", "0")))
    if chosen.type == "cuda":
        torch.cuda.set_device(chosen)
    opened = not dist.is_initialized()
    if opened:
        try:
            backend = "cpu:gloo,cuda:nccl" if chosen.type == "cuda" else "gloo"
            dist.init_process_group(backend, timeout=TIMEOUT)
        except ValueError as error:  # a variable is missing
            raise ConfigError(f"WORLD_SIZE={size} is set, but not by torchrun: {error}") from error
    try:
        yield World(device=chosen, rank=dist.get_rank(), size=size)
    finally:
        if opened:
            dist.destroy_process_group()


def _own_device(name: str, local_rank: int) -> torch.device:
    """The device of one process among several on its machine."""
    if name == "auto" and not torch.cuda.is_available():
        return torch.device("cpu")
    if name.startswith("cuda:"):
        raise ConfigError(f"device={name!r} is one GPU for several processes; use 'cuda' or 'auto'")
    if name in ("auto", "cuda"):
        count = torch.cuda.device_count()
        if local_rank >= count:
            raise ConfigError(
                f"device={name!r}: process {local_rank} of this machine, which has {count} GPUs"
            )
        return torch.device("cuda", local_rank)
    return pick_device(name)
