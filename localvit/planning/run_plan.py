"""Plan of a run on a machine, before it starts: hours, memory, data, files."""

from __future__ import annotations

from dataclasses import dataclass

from localvit.config import TrainConfig
from localvit.data import random_scope
from localvit.errors import ConfigError
from localvit.planning.figures import Basis, Figure, OpenRun, effective, open_run
from localvit.planning.memory import StepMemory, measure_step

JPEG_BYTES = 110_000
"""Approximate mean size of an ImageNet-1k image."""


@dataclass(frozen=True, kw_only=True)
class Machine:
    """Machine for a planned run.

    Attributes:
        nodes: Number of nodes.
        gpus: Number of GPUs per node.
        images_per_second: Training speed of one GPU; `None`: hours and data rate are unknown.
        memory_gb: Memory of one GPU, in units of 1e9 bytes; `None`: no check of whether the run fits.
    """

    nodes: int = 1
    gpus: int = 1
    images_per_second: float | None = None
    memory_gb: float | None = None

    def __post_init__(self) -> None:
        for name in ("nodes", "gpus"):
            if getattr(self, name) < 1:
                raise ConfigError(f"{name}={getattr(self, name)!r} is not accepted; use 1 or more")
        for name in ("images_per_second", "memory_gb"):
            value = getattr(self, name)
            if value is not None and not 0.0 < value < float("inf"):
                raise ConfigError(f"{name}={value!r} is not accepted; use a positive number")

    @property
    def total(self) -> int:
        """Number of all GPUs."""
        return self.nodes * self.gpus


def plan_run(config: TrainConfig, machine: Machine, images: int | None = None) -> list[Figure]:
    """Return steps, hours, memory, data rate and file sizes of `config` on `machine`.

    Args:
        images: Number of training images, if the data is not available. `None`: they are counted; without a
            recipe's folder `imagenet`, it is the published number minus the held-out images.

    Raises:
        ConfigError: if the model or the optimizer cannot be built, the batch cannot be split among the GPUs,
            or the number of images is unknown.
    """
    per_gpu = _batch_per_gpu(config.batch_size, machine.total, config.engine.grad_accum, config.augment.mixes)
    run = open_run(config, images)
    if run.images.value is None:
        raise ConfigError(f"{run.images.how}; give the number of training images with --images N")
    with random_scope():
        memory = measure_step(run.model, run.optimizer, run.input_size, config.engine.precision)
    return [
        *effective(run),
        *_speed(run, machine),
        Figure(name="GPUs", value=machine.total, how=f"{machine.nodes} x {machine.gpus}", basis="assumed"),
        Figure(name="batch per GPU", value=per_gpu, how="global batch / GPUs"),
        *_memory(run, machine, memory, per_gpu),
        *_files(run, memory),
    ]


def _batch_per_gpu(batch_size: int, gpus: int, grad_accum: int, mixes: bool) -> int:
    """Return the number of images of a batch per GPU."""
    microbatches = gpus * grad_accum
    size, rest = divmod(batch_size, microbatches)
    if rest or (mixes and size % 2):
        even = " of even size, for mixup and cutmix" if not rest else ""
        raise ConfigError(
            f"batch_size={batch_size} cannot be split into {microbatches} equal microbatches{even}; "
            "change it, the number of GPUs or engine.grad_accum"
        )
    return batch_size // gpus


def _speed(run: OpenRun, machine: Machine) -> list[Figure]:
    speed = machine.images_per_second
    images = (run.steps or 0) * run.config.batch_size
    total = None if speed is None else speed * machine.total
    linear = "speed of one GPU x GPUs, without loss by communication"
    return [
        Figure(name="training speed", value=total, unit="images/s", basis="assumed", how=linear),
        Figure(
            name="training",
            value=None if total is None else images / total / 3600,
            unit="hours",
            how=f"{images:,} images at that speed; validation not counted",
        ),
        Figure(
            name="data rate",
            value=None if total is None else total * JPEG_BYTES / 1e6,
            unit="MB/s",
            basis="assumed",
            how=f"{JPEG_BYTES // 1000} kB per image, ImageNet's mean as JPEG, read again for each sample",
        ),
    ]


def _memory(run: OpenRun, machine: Machine, memory: StepMemory, per_gpu: int) -> list[Figure]:
    config = run.config
    at_once = per_gpu // config.engine.grad_accum
    average = memory.weights if config.ema_decay is not None else 0
    buckets = memory.gradients if machine.total > 1 else 0
    fixed = memory.weights + memory.gradients + memory.optimizer + average + buckets
    fixed += memory.activations_fixed
    saved = f"{config.engine.precision}, tensors saved by autograd for 2 and for 4 images on a CPU"
    if config.engine.grad_checkpointing:
        saved += "; less with engine.grad_checkpointing, which is not counted"

    def mb(name: str, value: float, basis: Basis, how: str) -> Figure:
        return Figure(name=f"memory: {name}", value=value / 1e6, unit="MB", basis=basis, how=how)

    figures = [
        mb("weights", memory.weights, "measured", "parameters and buffers"),
        mb("gradients", memory.gradients, "measured", "after one step"),
        mb("optimizer", memory.optimizer, "measured", f"{config.optim.name}, after one step"),
        mb("average", average, "computed", "a copy of the weights" if average else "ema_decay is off"),
        mb("exchange", buckets, "assumed", "a second copy of the gradients, with more than one GPU"),
        mb("activations", memory.activations, "measured", f"per image; {saved}"),
    ]
    total = fixed + at_once * memory.activations
    missing = "not counted: workspaces, the CUDA context" + ", the teacher" * (config.distill is not None)
    figures.append(mb("one GPU", total, "computed", f"{at_once} images at once; {missing}"))
    if machine.memory_gb is not None:
        room = machine.memory_gb * 1e9 - fixed
        most = max(0, int(room // max(1, memory.activations)))
        figures += [
            Figure(name="fits", value="yes" if at_once <= most else "no", how=f"{machine.memory_gb:g} GB"),
            Figure(name="most images at once", value=most, how="free memory / activations; leave a reserve"),
        ]
    return figures


def _files(run: OpenRun, memory: StepMemory) -> list[Figure]:
    average = memory.saved if run.config.ema_decay is not None else 0
    state = memory.saved + memory.optimizer + average
    parts = "weights, optimizer, average" if average else "weights, optimizer"
    model = "saved weights and buffers; last/ and best/ have one file each"
    return [
        Figure(name="model file", value=memory.saved / 1e6, unit="MB", how=model),
        Figure(name="training state", value=state / 1e6, unit="MB", how=parts),
    ]
