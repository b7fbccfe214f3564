"""Results of a benchmark: numbers with the machine and the versions that they were measured with."""

from __future__ import annotations

from dataclasses import dataclass, field

import timm
import torch

from localvit.bench.host import allocator, cpus, environment, machine
from localvit.bench.measure import Quartiles
from localvit.config import Precision
from localvit.runtime import DTYPES
from localvit.version import __version__

_VERSIONS = {"localvit": __version__, "torch": torch.__version__, "timm": timm.__version__}


@dataclass(frozen=True, kw_only=True)
class Setting:
    """Circumstances that times depend on besides the code.

    Attributes:
        machine: Processor, threads, GPU.
        cpus: Number of processors that the process may use.
        instructions: Widest vector instructions that torch uses.
        allocator: Library that serves `malloc`.
        environment: Variables that control threads, allocators and numerical libraries.
        device, threads: Device and threads of torch; the engines get as many threads.
        versions: Versions of the packages that compute.
        dtype: Type of weights and images, or of autocast.
    """

    device: str
    threads: int
    machine: str
    cpus: int = field(default_factory=cpus)
    instructions: str = field(default_factory=torch.backends.cpu.get_cpu_capability)
    allocator: str = field(default_factory=allocator)
    environment: dict[str, str] = field(default_factory=environment)
    versions: dict[str, str] = field(default_factory=_VERSIONS.copy)
    dtype: str = "float32"

    @classmethod
    def here(cls, device: torch.device, precision: Precision = "fp32") -> Setting:
        """Describe this process."""
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
    """Result of one of the two models.

    Attributes:
        model: Its name.
        engine: Its engine (`EngineName`).
        form: The engine in words, with the reason if the fused form is missing.
        input_size: (C, H, W) of an image.
        parameters: Number of parameters as built.
        gmacs: Multiply-accumulates of a forward pass of one image, in units of 1e9 (`localvit.cost`).
        seconds: Time of a batch.
        images_per_second: Throughput at the median.
        fraction_of_peak: Its operations per second, as a fraction of those of the fastest matrix product
            in the same rounds. A training step counts as three forward passes.
        peak_memory: Peak memory of a call beyond that before it (weights, inputs, an optimizer's state), in
            bytes; `None` if the system does not report it, or the engine keeps memory between calls.
    """

    model: str
    engine: str
    form: str
    input_size: tuple[int, int, int]
    parameters: int
    gmacs: float
    seconds: Quartiles
    images_per_second: float
    fraction_of_peak: Quartiles
    peak_memory: int | None


@dataclass(frozen=True, kw_only=True)
class Comparison:
    """Two models timed alternately. Every field is a JSON value.

    Attributes:
        ratio: Time of `model` by time of `against` in each round; below 1, `model` is faster.
        task: `"inference"` or `"training step"` (forward, backward, AdamW).
        batch_size: Images in a batch.
        rounds: Number of rounds.
        model, against: The two models.
        peak_gflops: Median speed of the fastest matrix product, in units of 1e9 operations per second.
        peak_matmul: Library and shape of that product.
        setting: Circumstances of the measurement.
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
