"""What a run takes on a machine, before it is started: hours, memory, data, files."""

from __future__ import annotations

from dataclasses import dataclass

from localvit.config import TrainConfig
from localvit.data import random_scope
from localvit.errors import ConfigError
from localvit.planning.figures import Basis, Figure, OpenRun, open_run, schedule_figures, size_figures
from localvit.planning.memory import StepMemory, measure_step

JPEG_BYTES = 110_000
"""Mean size of a picture of ImageNet-1k, about."""


@dataclass(frozen=True, kw_only=True)
class Machine:
    """What a run is planned for.

    Attributes:
        nodes: Computers.
        gpus: GPUs in each.
        images_per_second: Training speed of one GPU; `None` leaves hours and data rates unknown.
        memory_gb: Memory of one GPU, in units of 1e9 bytes; `None` leaves open whether it suffices.
    """

    nodes: int = 1
    gpus: int = 1
    images_per_second: float | None = None
    memory_gb: float | None = None

    def __post_init__(self) -> None:
        for name in ("nodes", "gpus"):
            if getattr(self, name) < 1:
                raise ConfigError(f"{name}={getattr(self, name)!r} must be at least 1")
        for name in ("images_per_second", "memory_gb"):
            value = getattr(self, name)
            if value is not None and not 0.0 < value < float("inf"):
                raise ConfigError(f"{name}={value!r} must be a positive number")

    @property
    def total(self) -> int:
        """All GPUs."""
        return self.nodes * self.gpus


def plan_run(config: TrainConfig, machine: Machine, images: int | None = None) -> list[Figure]:
    """What `config` takes on `machine`: updates, hours, memory, data rate, sizes of files.

    Args:
        config: The run.
        machine: Where.
        images: Pictures that are learned from, where the data is not at hand. `None`: they are counted;
            for a recipe's `imagenet` that is not there, the published number less what is held out.

    Raises:
        ConfigError: if the model or the optimizer cannot be built, the batch cannot be shared among the
            GPUs, or nobody knows how many pictures there are.
    """
    share = _share(config, machine.total)
    run = open_run(config, images)
    if run.images.value is None:
        raise ConfigError(f"{run.images.how}; --images N says how many pictures are learned from")
    with random_scope():
        memory = measure_step(run.model, run.optimizer, run.input_size, config.engine.precision)
    return [
        *schedule_figures(run),
        *size_figures(run),
        *_speed(run, machine),
        Figure(name="GPUs", value=machine.total, how=f"{machine.nodes} x {machine.gpus}", basis="assumed"),
        Figure(name="batch per GPU", value=share, how="global batch / GPUs"),
        *_memory(run, machine, memory, share),
        *_files(run, memory),
    ]


def _share(config: TrainConfig, gpus: int) -> int:
    """Pictures of a batch that one GPU gets."""
    pieces = gpus * config.engine.grad_accum
    share, rest = divmod(config.batch_size, pieces)
    if rest or (config.augment.mixes and share % 2):
        even = " of an even number, which mixup and cutmix need" if not rest else ""
        raise ConfigError(f"batch_size={config.batch_size} cannot be cut into {pieces} equal parts{even}")
    return config.batch_size // gpus


def _speed(run: OpenRun, machine: Machine) -> list[Figure]:
    speed = machine.images_per_second
    pictures = (run.updates or 0) * run.config.batch_size
    total = None if speed is None else speed * machine.total
    linear = "as given for one GPU, times GPUs: no loss by sharing"
    return [
        Figure(name="training speed", value=total, unit="images/s", basis="assumed", how=linear),
        Figure(
            name="training",
            value=None if total is None else pictures / total / 3600,
            unit="hours",
            how=f"{pictures:,} pictures at that speed; validation not counted",
        ),
        Figure(
            name="data rate",
            value=None if total is None else total * JPEG_BYTES / 1e6,
            unit="MB/s",
            basis="assumed",
            how=f"{JPEG_BYTES // 1000} kB per picture, ImageNet's mean as JPEG, read anew for each draw",
        ),
    ]


def _memory(run: OpenRun, machine: Machine, memory: StepMemory, share: int) -> list[Figure]:
    config = run.config
    at_once = share // config.engine.grad_accum
    average = memory.weights if config.ema_decay is not None else 0
    buckets = memory.gradients if machine.total > 1 else 0
    fixed = memory.weights + memory.gradients + memory.optimizer + average + buckets
    fixed += memory.activations_fixed
    kept = f"{config.engine.precision}, what autograd keeps of 2 and of 4 pictures on a CPU"
    if config.engine.grad_checkpointing:
        kept += "; less with engine.grad_checkpointing, which this leaves out"

    def mb(name: str, value: float, basis: Basis, how: str) -> Figure:
        return Figure(name=f"memory: {name}", value=value / 1e6, unit="MB", basis=basis, how=how)

    figures = [
        mb("weights", memory.weights, "measured", "parameters and buffers"),
        mb("gradients", memory.gradients, "measured", "after one update"),
        mb("optimizer", memory.optimizer, "measured", f"{config.optim.name}, after one update"),
        mb("average", average, "computed", "a copy of the weights" if average else "ema_decay is off"),
        mb("exchange", buckets, "assumed", "a second copy of the gradients, with more than one GPU"),
        mb("activations", memory.activations, "measured", f"a picture; {kept}"),
    ]
    total = fixed + at_once * memory.activations
    missing = "not counted: workspaces, the CUDA context" + ", the teacher" * (config.distill is not None)
    figures.append(mb("one GPU", total, "computed", f"{at_once} pictures at once; {missing}"))
    if machine.memory_gb is not None:
        room = machine.memory_gb * 1e9 - fixed
        most = max(0, int(room // max(1, memory.activations)))
        figures += [
            Figure(name="fits", value="yes" if at_once <= most else "no", how=f"{machine.memory_gb:g} GB"),
            Figure(
                name="most pictures at once", value=most, how="what is left / activations; leave a reserve"
            ),
        ]
    return figures


def _files(run: OpenRun, memory: StepMemory) -> list[Figure]:
    average = memory.saved if run.config.ema_decay is not None else 0
    state = memory.saved + memory.optimizer + average
    parts = "weights, optimizer, average" if average else "weights, optimizer"
    model = "weights and buffers that are saved; last/ and best/ hold one each"
    return [
        Figure(name="model file", value=memory.saved / 1e6, unit="MB", how=model),
        Figure(name="state to go on from", value=state / 1e6, unit="MB", how=parts),
    ]
