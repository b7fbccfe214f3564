"""A training run as one frozen value: every field a JSON value, every default with its reason."""

from __future__ import annotations

import difflib
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any, Literal

from localvit.data import AugmentConfig, DataConfig
from localvit.locality.config import ConfigError, LocalityConfig

__all__ = [
    "AugmentConfig",
    "ConfigError",
    "DataConfig",
    "EngineConfig",
    "LocalityConfig",
    "ModelConfig",
    "OptimConfig",
    "ScheduleConfig",
    "TrainConfig",
]


@dataclass(frozen=True, kw_only=True)
class ModelConfig:
    """Which model; control and treatment of a comparison differ in `locality` only.

    Attributes:
        name: Any name that ``timm.create_model`` knows.
        locality: ``None`` takes the model as it is; otherwise its feed-forward networks are localized.
        blocks: Which blocks: ``"all"``, ``"lower-half"``, ``"lower-third"``, ``"middle-third"``,
            ``"upper-third"``, a list of indices, or a list of ``[start, stop]`` pairs.
        pretrained: Start from published weights.
        args: Further arguments of ``timm.create_model`` (`img_size`, `patch_size`, `in_chans`,
            `embed_dim`, `depth`, `num_heads`, `drop_path_rate`, ...). `num_classes` comes from the data
            unless it is given here.
    """

    name: str = "deit_tiny_patch16_224"
    locality: LocalityConfig | None = None
    blocks: str | list[Any] = "all"
    pretrained: bool = False
    args: dict[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if self.locality is None and self.blocks != "all":
            raise ConfigError(f"model.blocks={self.blocks!r} has no effect without model.locality")


@dataclass(frozen=True, kw_only=True)
class OptimConfig:
    """The optimizer. Biases, one-dimensional parameters and what the model itself names are not decayed.

    Attributes:
        name: Any of ``timm.optim.list_optimizers()``.
        lr: Peak learning rate. 5e-4 at batch 512 is DeiT's.
        weight_decay: DeiT's 0.05.
        momentum: For optimizers that have one.
        args: Further arguments of ``timm.optim.create_optimizer_v2`` (`betas`, `eps`, `layer_decay`, ...).
    """

    name: str = "adamw"
    lr: float = 5e-4
    weight_decay: float = 0.05
    momentum: float = 0.9
    args: dict[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        _at_least(self, "optim", 0.0, "weight_decay")
        if not 0.0 < self.lr < float("inf"):
            raise ConfigError(f"optim.lr={self.lr!r} must be positive")


@dataclass(frozen=True, kw_only=True)
class ScheduleConfig:
    """How the learning rate moves, update by update, within `epochs`.

    As in DeiT's recipe, the warm-up lies over the start of the schedule: after it, the rate is where the
    schedule without a warm-up would be.

    Attributes:
        name: A schedule of timm.
        warmup_epochs: Length of the linear warm-up; 5 is DeiT's.
        warmup_lr: Where the warm-up starts; DeiT's.
        min_lr: Where the decay ends; DeiT's.
    """

    name: Literal["cosine", "tanh", "poly", "wsd", "constant"] = "cosine"
    warmup_epochs: float = 5.0
    warmup_lr: float = 1e-6
    min_lr: float = 1e-5

    def __post_init__(self) -> None:
        _at_least(self, "schedule", 0.0, "warmup_epochs", "warmup_lr", "min_lr")


@dataclass(frozen=True, kw_only=True)
class EngineConfig:
    """How an update is computed: precision, memory, batch norm, reproducibility.

    Attributes:
        precision: Of the forward pass, by autocast; weights and optimizer stay float32. ``"fp16"`` scales
            the loss and needs a GPU; ``"bf16"`` needs no scaling.
        grad_accum: Pieces that a process cuts its share of a batch into, one after the other, to save
            memory. Same gradients, except that batch norm sees a piece where it would see a share.
        clip_grad: Largest norm of the gradient of all weights; ``None``: not clipped.
        channels_last: Store images and maps channels last, which GPUs with tensor cores prefer.
        compile: ``torch.compile`` the model.
        grad_checkpointing: Recompute activations in the backward pass to save memory.
        batch_norm: What batch norm does where several processes train, each on its share of a batch.
            ``"local"``: every process normalises by its share; the running statistics of the first are
            evaluated and saved. ``"average"``: the same, with the running statistics averaged over the
            processes before each evaluation; the default because it uses all pictures, as timm's script
            does. ``"sync"``: statistics of the whole batch, on GPUs only (PyTorch has no other).
            ``"frozen"``: running statistics normalise in training too and never change (with any number
            of processes); scale and shift still learn, so the parameters are those of the other modes.
        deterministic: Only algorithms that give the same bits every time; an operation without one is an
            error. CPUs need no such option.
    """

    precision: Literal["fp32", "bf16", "fp16"] = "fp32"
    grad_accum: int = 1
    clip_grad: float | None = None
    channels_last: bool = False
    compile: bool = False
    grad_checkpointing: bool = False
    batch_norm: Literal["local", "sync", "average", "frozen"] = "average"
    deterministic: bool = False

    def __post_init__(self) -> None:
        _at_least(self, "engine", 1, "grad_accum")
        if self.clip_grad is not None and not 0.0 < self.clip_grad < float("inf"):
            raise ConfigError(f"engine.clip_grad={self.clip_grad!r} must be positive (off: null)")


@dataclass(frozen=True, kw_only=True)
class TrainConfig:
    """A training run.

    Attributes:
        model: Which model.
        data: Which pictures.
        optim: The optimizer.
        schedule: The learning rate over time.
        augment: What is done to training pictures and labels.
        engine: How an update is computed.
        ema_decay: Decay per update of an exponential moving average of the weights and of batch norm's
            statistics. Where it is on, the averaged model is validated, saved and reported. ``None``: off.
        epochs: Passes over the training pictures.
        batch_size: Pictures per update, over all processes. 128 fits ImageNet-size tiny models into a few
            gigabytes.
        seed: Decides the split, the initial weights, and order and augmentation of the pictures.
        workers: Processes that load pictures; 0 loads in the training process. Results do not depend on it.
        device: ``"auto"`` takes a GPU where there is one; otherwise a torch device.
        output: Folder for the results, or ``None`` to keep them in memory only.
        save_seconds: Time between two saves of the state that a killed run goes on from: what a kill
            may cost, besides the start. Saves at the end of each epoch come on top.
        max_bad_images: Training pictures that may be unreadable; each is named, counted and replaced by
            another one that is drawn by its seed, so that batches stay full. 0: the first one stops the
            run. Pictures to evaluate on must all be readable, as scores on fewer could not be compared.
    """

    model: ModelConfig = field(default_factory=ModelConfig)
    data: DataConfig = field(default_factory=DataConfig)
    optim: OptimConfig = field(default_factory=OptimConfig)
    schedule: ScheduleConfig = field(default_factory=ScheduleConfig)
    augment: AugmentConfig = field(default_factory=AugmentConfig)
    engine: EngineConfig = field(default_factory=EngineConfig)
    ema_decay: float | None = None
    epochs: int = 100
    batch_size: int = 128
    seed: int = 0
    workers: int = 0
    device: str = "auto"
    output: str | None = None
    save_seconds: float = 60.0
    max_bad_images: int = 0

    def __post_init__(self) -> None:
        _at_least(self, "", 1, "epochs", "batch_size")
        _at_least(self, "", 0, "seed", "workers", "save_seconds", "max_bad_images")
        if self.ema_decay is not None and not 0.0 < self.ema_decay < 1.0:
            raise ConfigError(f"ema_decay={self.ema_decay!r} is not between 0 and 1 (off: null)")
        if self.schedule.name != "constant" and self.schedule.warmup_epochs >= self.epochs:
            warmup = self.schedule.warmup_epochs
            raise ConfigError(f"schedule.warmup_epochs={warmup:g} must be less than epochs={self.epochs}")
        if self.schedule.name != "constant" and self.schedule.min_lr > self.optim.lr:
            low = self.schedule.min_lr
            raise ConfigError(f"schedule.min_lr={low:g} must not be above optim.lr={self.optim.lr:g}")
        if self.augment.mixes and self.batch_size % 2:
            raise ConfigError(
                f"batch_size={self.batch_size} must be even for augment.mixup and augment.cutmix"
            )


def unknown(what: str, name: str, known: Iterable[str]) -> ConfigError:
    """An error for a name that does not exist, with the nearest ones that do."""
    near = difflib.get_close_matches(name, list(known), n=3, cutoff=0.5)
    hint = f"; did you mean {' or '.join(repr(n) for n in near)}?" if near else ""
    return ConfigError(f"{what}: there is no {name!r}{hint}")


def _at_least(config: Any, prefix: str, low: float, *names: str) -> None:
    for name in names:
        value = getattr(config, name)
        if not low <= value < float("inf"):
            where = f"{prefix}.{name}" if prefix else name
            raise ConfigError(f"{where}={value!r} must be at least {low:g}")
