"""Processes that train one model together, started by `torchrun`; by default there is one process."""

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
"""Time to wait for a process that stops responding (a host without power); a process that exits is noticed at
once. It covers the work of the main process alone: opening the data and writing checkpoints."""


@dataclass(frozen=True, kw_only=True)
class World:
    """One process and its connection to the others. All processes must call each method together.

    Attributes:
        device: Device of this process.
        rank: Index of this process, 0 to `size` - 1.
        size: Number of processes.
    """

    device: torch.device
    rank: int = 0
    size: int = 1

    @property
    def is_main_process(self) -> bool:
        """True in the main process, which writes files and messages."""
        return self.rank == 0

    def all_reduce_max(self, *values: float) -> list[float]:
        """Return the maximum of each value over all processes."""
        if self.size == 1:
            return list(values)
        largest = torch.tensor(values, dtype=torch.float64)  # on the CPU, so no GPU has to wait
        dist.all_reduce(largest, op=dist.ReduceOp.MAX)
        return largest.tolist()

    def total(self, values: torch.Tensor) -> torch.Tensor:
        """Return the sum over all processes."""
        if self.size > 1:
            values = values.clone()
            dist.all_reduce(values)
        return values

    def gather(self, value: T) -> list[T]:
        """Return the values of all processes, by rank, in the main process; an empty list in the others."""
        if self.size == 1:
            return [value]
        values: list[Any] | None = [None] * self.size if self.is_main_process else None
        dist.gather_object(value, values)
        return values or []

    def distinct(self, value: T) -> list[T]:
        """Return the different values of all processes, by rank, in all processes."""
        values: list[Any] = [value] * self.size
        if self.size > 1:
            dist.all_gather_object(values, value)
        return list(dict.fromkeys(values))

    def broadcast_from_main(self, make: Callable[[], T]) -> T:
        """Call `make` in the main process only; return its result, or raise its error, in all processes."""
        if self.size == 1:
            return make()
        box: list[Any] = [None, None]
        if self.is_main_process:
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
    """Connect the processes that `torchrun` started (by its environment variables), or use this one alone.

    Gloo connects CPUs, NCCL connects GPUs. An existing process group is used and stays open.

    Args:
        device: Device as in `TrainConfig`. With several processes, `"auto"` and `"cuda"` give each one its
            own GPU of its machine.

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
            raise ConfigError(
                f"WORLD_SIZE={size} is set, but not by torchrun: {error}; unset it or use torchrun"
            ) from error
        fresh = dist.PrefixStore(name_of_start(store, rank, size, TIMEOUT), store)
        dist.init_process_group(backend, store=fresh, rank=rank, world_size=size, timeout=TIMEOUT)
    try:
        yield World(device=chosen, rank=dist.get_rank(), size=size)
    finally:
        if opened:
            dist.destroy_process_group()


def name_of_start(store: dist.Store, rank: int, size: int, timeout: timedelta) -> str:
    """Agree on a new name for this start, the same in all processes.

    torchrun has one store for all its restarts (the shared TCPStore in
    torch/distributed/elastic/rendezvous/dynamic_rendezvous.py). The store still has the entries of dead
    processes: a new process that reads the address of a dead one waits for it until the timeout. A new name
    for each start separates their entries.

    Each process calls with a random word of its own and accepts only an answer to that word. The main process
    answers every call, including those of dead processes, until all live processes have the name.

    Args:
        store: Store of all processes of this start, and perhaps of earlier ones.
        rank: Index of this process.
        size: Number of processes.
        timeout: Time to wait for the others.

    Raises:
        RuntimeError: if a process does not call, or gets no answer, within `timeout`.
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
            raise RuntimeError(
                f"{len(missing)} of {size} processes did not call within {timeout}; start all of them"
            )
        time.sleep(0.02)
    return word


def _own_device(name: str, local_rank: int) -> torch.device:
    """Return the device of one of several processes on a machine."""
    if name == "auto" and not torch.cuda.is_available():
        return torch.device("cpu")
    if name.startswith("cuda:"):
        raise ConfigError(f"device={name!r} is not accepted for several processes; use 'cuda' or 'auto'")
    if name in ("auto", "cuda"):
        count = torch.cuda.device_count()
        if local_rank >= count:
            raise ConfigError(
                f"device={name!r}: no GPU for process {local_rank}; this machine has {count} GPUs, so start "
                "fewer processes"
            )
        return torch.device("cuda", local_rank)
    return pick_device(name)
