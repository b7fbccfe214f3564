"""The processes that train one model together, as `torchrun` starts them; one process is the plain case."""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from typing import Any, TypeVar
from uuid import uuid4

import torch
from torch import distributed as dist

from localvit.errors import ConfigError
from localvit.runtime.devices import pick_device

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
    """The processes that `torchrun` started (it says so in the environment), or this one alone.

    Gloo connects CPUs, NCCL GPUs. A process group that is there already is used and left open.

    Args:
        device: As in `TrainConfig`; with several processes, `"auto"` and `"cuda"` give each its own GPU
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
        backend = "cpu:gloo,cuda:nccl" if chosen.type == "cuda" else "gloo"
        try:
            store, rank, size = next(dist.rendezvous("env://", timeout=TIMEOUT))
        except ValueError as error:  # a variable is missing
            raise ConfigError(f"WORLD_SIZE={size} is set, but not by torchrun: {error}") from error
        fresh = dist.PrefixStore(name_of_start(store, rank, size, TIMEOUT), store)
        dist.init_process_group(backend, store=fresh, rank=rank, world_size=size, timeout=TIMEOUT)
    try:
        yield World(device=chosen, rank=dist.get_rank(), size=size)
    finally:
        if opened:
            dist.destroy_process_group()


def name_of_start(store: dist.Store, rank: int, size: int, timeout: timedelta) -> str:
    """A name for this start of the processes: the same in all of them, and like none before it.

    torchrun keeps one store for all its restarts (torch/distributed/elastic/rendezvous/dynamic_rendezvous.py,
    where the TCPStore is shared), and what dead processes wrote still stands in it: a new one that reads the
    address of a dead one waits for it until the timeout. Under a new name there is nothing to be mistaken.

    Each process calls with a word of its own, and only an answer to that very word can be meant for it; the
    first process answers every call, those of the dead too, until all of the living have heard its name.

    Args:
        store: Where all processes of this start, and perhaps of earlier ones, write.
        rank: Of this process.
        size: Number of processes.
        timeout: How long to wait for the others.

    Raises:
        RuntimeError: if a process does not call, or is not answered, within `timeout`.
    """
    word = uuid4().hex
    store.set_timeout(timeout)
    if rank > 0:
        store.set(f"start/call/{rank}", word)
        name = store.get(f"start/answer/{word}").decode()
        store.set(f"start/heard/{name}/{rank}", "")
        return name
    missing, end = set(range(1, size)), time.monotonic() + timeout.total_seconds()
    while missing:
        for other in missing:
            if store.check([f"start/call/{other}"]):
                store.set(f"start/answer/{store.get(f'start/call/{other}').decode()}", word)
        missing = {other for other in missing if not store.check([f"start/heard/{word}/{other}"])}
        if missing and time.monotonic() > end:
            raise RuntimeError(f"{len(missing)} of {size} processes did not call within {timeout}")
        time.sleep(0.02)
    return word


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
