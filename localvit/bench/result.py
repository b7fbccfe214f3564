"""What a benchmark found: numbers that name what they were measured with."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass, field
from typing import Any

import timm
import torch

from localvit.bench.host import allocator, cpus, environment, machine
from localvit.bench.measure import Quartiles
from localvit.config import Precision
from localvit.runtime import DTYPES
from localvit.version import __version__


@dataclass(frozen=True, kw_only=True)
class Setting:
    """What times depend on besides the code.

    Attributes:
        machine: Processor, threads, GPU.
        cpus: Processors that the process may use.
        instructions: The widest of the processor that torch uses.
        allocator: What serves ``malloc``.
        environment: Variables that steer threads, allocators and libraries of arithmetic.
        device, threads: Of torch; the engines get as many threads.
        versions: Of the packages that compute.
        dtype: Of weights and pictures, or what autocast computes in.
    """

    device: str
    threads: int
    machine: str
    cpus: int = field(default_factory=cpus)
    instructions: str = field(default_factory=torch.backends.cpu.get_cpu_capability)
    allocator: str = field(default_factory=allocator)
    environment: dict[str, str] = field(default_factory=environment)
    versions: dict[str, str] = field(default_factory=lambda: _versions())
    dtype: str = "float32"

    @classmethod
    def here(cls, device: torch.device, precision: Precision = "fp32") -> Setting:
        """Of this process, now."""
        threads = torch.get_num_threads()
        dtype = str(DTYPES[precision]).removeprefix("torch.")
        how = "" if precision == "fp32" else " by autocast"
        return cls(device=str(device), threads=threads, machine=machine(threads), dtype=dtype + how)

    def __str__(self) -> str:
        set_ = ", ".join(f"{name}={value}" for name, value in self.environment.items())
        versions = ", ".join(f"{name} {version}" for name, version in self.versions.items())
        return (
            f"{self.machine} (of {self.cpus}), {self.instructions}; device {self.device}, {self.dtype}; "
            f"allocator {self.allocator}; {set_ or 'no variables set for threads or memory'}; {versions}"
        )


@dataclass(frozen=True, kw_only=True)
class Side:
    """One of the two models.

    Attributes:
        model: Its name.
        engine: What computes.
        input_size: (C, H, W) of a picture.
        parameters: Counted as it is built.
        gmacs: Multiply-accumulates of a forward pass of one picture, in units of 1e9 (`localvit.cost`).
        seconds: Of a batch.
        images_per_second: At the median.
        fraction_of_peak: Its operations per second, as a share of what the fastest matrix product reached in
            the same rounds. A training step counts as three forward passes.
        peak_memory: Bytes that a call holds at its peak beyond what was there before it (weights, inputs,
            an optimizer's state); ``None`` where the system does not tell, or the engine keeps its memory
            between calls.
    """

    model: str
    engine: str
    input_size: tuple[int, int, int]
    parameters: int
    gmacs: float
    seconds: Quartiles
    images_per_second: float
    fraction_of_peak: Quartiles
    peak_memory: int | None


@dataclass(frozen=True, kw_only=True)
class Comparison:
    """Two models timed in turns. Every field is a JSON value (`to_dict`).

    Attributes:
        ratio: Time of `model` by time of `against` in each round; below 1, `model` is faster.
        task: ``"inference"`` or ``"training step"`` (forward, backward and an update by AdamW).
        batch_size: Pictures in a call.
        rounds: Turns of each.
        model, against: The two.
        peak_gflops: Of the fastest matrix product, at its median, in units of 1e9 operations per second.
        peak_matmul: Which that is: library and shape.
        setting: What it was measured with.
    """

    ratio: Quartiles
    task: str
    batch_size: int
    rounds: int
    model: Side
    against: Side
    peak_gflops: float
    peak_matmul: str
    setting: Setting

    def to_dict(self) -> dict[str, Any]:
        """As JSON values."""
        return dataclasses.asdict(self)


def _versions() -> dict[str, str]:

    return {"localvit": __version__, "torch": torch.__version__, "timm": timm.__version__}
