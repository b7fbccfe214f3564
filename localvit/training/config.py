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
class TrainConfig:
    """A training run.

    Attributes:
        model: Which model.
        data: Which pictures.
        optim: The optimizer.
        schedule: The learning rate over time.
        augment: What is done to training pictures and labels.
        ema_decay: Decay per update of an exponential moving average of the weights. Where it is on, the
            averaged weights are validated, saved and reported. ``None``: off.
        epochs: Passes over the training pictures.
        batch_size: Pictures per update. 128 fits ImageNet-size tiny models into a few gigabytes.
        seed: Decides the split, the initial weights, and order and augmentation of the pictures.
        workers: Processes that load pictures; 0 loads in the training process. Results do not depend on it.
        device: ``"auto"`` takes a GPU where there is one; otherwise a torch device.
        output: Folder for the results, or ``None`` to keep them in memory only.
    """

    model: ModelConfig = field(default_factory=ModelConfig)
    data: DataConfig = field(default_factory=DataConfig)
    optim: OptimConfig = field(default_factory=OptimConfig)
    schedule: ScheduleConfig = field(default_factory=ScheduleConfig)
    augment: AugmentConfig = field(default_factory=AugmentConfig)
    ema_decay: float | None = None
    epochs: int = 100
    batch_size: int = 128
    seed: int = 0
    workers: int = 0
    device: str = "auto"
    output: str | None = None

    def __post_init__(self) -> None:
        _at_least(self, "", 1, "epochs", "batch_size")
        _at_least(self, "", 0, "seed", "workers")
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
