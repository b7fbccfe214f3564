"""Figures of a configuration: learning rate, steps, size of the model, each with its basis."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Literal

import torch
from torch import nn

from localvit.config import TrainConfig
from localvit.cost import count_macs, count_parameters
from localvit.data import DataConfig, DataError, open_splits, random_scope
from localvit.errors import ConfigError
from localvit.models import build_model, check_forward, preprocessing_for
from localvit.training import build_optimizer, build_scheduler, check_student, freeze

Basis = Literal["measured", "computed", "assumed"]
IMAGENET = "imagenet"
"""Folder of the ImageNet-1k recipes; if it does not exist, published figures are used."""
IMAGENET_IMAGES, IMAGENET_CLASSES = 1_281_167, 1000


@dataclass(frozen=True, kw_only=True)
class Figure:
    """One line of a plan.

    Attributes:
        name: Name of the quantity.
        value: A number or a word; `None` if it is unknown.
        how: Source of the value, in words.
        unit: Unit of the number.
        basis: `"measured"` on this machine, `"computed"` from the configuration and measured values, or
            `"assumed"`.
    """

    name: str
    value: int | float | str | None
    how: str
    unit: str = ""
    basis: Basis = "computed"

    def __str__(self) -> str:
        text = "unknown" if self.value is None else str(self.value)
        if isinstance(self.value, (int, float)):
            whole = isinstance(self.value, int) or self.value >= 1000
            text = f"{self.value:,.0f}" if whole else f"{self.value:.4g}"
            text += f" {self.unit}" if self.unit else ""
        return f"{self.name}: {text} ({self.basis}: {self.how})"


@dataclass(frozen=True, kw_only=True)
class OpenRun:
    """Configuration with its model, its optimizer and the size of its data."""

    config: TrainConfig
    model: nn.Module
    optimizer: torch.optim.Optimizer
    input_size: tuple[int, int, int]
    images: Figure
    classes: Figure

    @property
    def steps_per_epoch(self) -> int | None:
        images = self.images.value
        return None if images is None else int(images) // self.config.batch_size

    @property
    def steps(self) -> int | None:
        each = self.steps_per_epoch
        return None if each is None else each * self.config.epochs


def effective(run: OpenRun) -> list[Figure]:
    """Return learning rate, steps and size of the model of a run.

    If its data could not be opened, figures that depend on their number are unknown, with the reason.
    """
    return _schedule_figures(run) + _size_figures(run)


def open_run(config: TrainConfig, images: int | None = None) -> OpenRun:
    """Build model and optimizer of `config`, without published weights, and count its data.

    Args:
        images: Number of training images. `None`: they are counted.

    Raises:
        ConfigError: if the model or the optimizer cannot be built, or the images do not fill a batch.
    """
    counted, classes = count_data(config.data, config.seed, config.model.args.get("num_classes"), images)
    if counted.value is not None and int(counted.value) < config.batch_size:
        raise ConfigError(
            f"batch_size={config.batch_size} does not fit {counted.value} training images; "
            "use at most as many"
        )
    number = int(classes.value or IMAGENET_CLASSES)
    with random_scope():
        model = build_model(replace(config.model, pretrained=False), number)
    input_size = preprocessing_for(model, config.data).input_size
    check_forward(model, config.model.name, input_size)
    freeze(model, config.train_only)
    if config.distill is not None and config.distill.token:
        check_student(model)
        model.set_distilled_training(True)  # type: ignore[operator]
    return OpenRun(
        config=config,
        model=model,
        optimizer=build_optimizer(model, config.optim, config.batch_size),
        input_size=input_size,
        images=counted,
        classes=classes,
    )


def count_data(
    data: DataConfig, seed: int, num_classes: int | None, images: int | None = None
) -> tuple[Figure, Figure]:
    """Count training images and classes; they are assumed or unknown if the data is not available.

    Args:
        data: Their sources.
        seed: Seed of the split.
        num_classes: Outputs of the model, if they are configured.
        images: Number of training images, if it is known.
    """

    def figures(count: int | None, classes: int, basis: Basis, how: str, named: str) -> tuple[Figure, Figure]:
        return (
            Figure(name="training images", value=count, basis=basis, how=how),
            Figure(name="classes", value=classes, basis=basis, how=named),
        )

    classes = IMAGENET_CLASSES if num_classes is None else int(num_classes)
    named = "ImageNet-1k's" if num_classes is None else "model.args.num_classes"
    if images is not None:
        return figures(images, classes, "assumed", "as given", named)
    try:
        splits = open_splits(data, seed=seed)
    except DataError as error:
        if data.train != IMAGENET:
            return figures(None, classes, "assumed", str(error), named)
        held = round(data.holdout * IMAGENET_IMAGES)
        left = round((IMAGENET_IMAGES - held) * data.fraction)
        how = f"ImageNet-1k's published {IMAGENET_IMAGES:,} less {held:,} held out; no folder {IMAGENET!r}"
        return figures(left, classes, "assumed", how, named)
    return figures(len(splits.train), splits.num_classes, "measured", "counted", "counted")


def _schedule_figures(run: OpenRun) -> list[Figure]:
    """Return learning rate, batch, images and steps."""
    config, each = run.config, run.steps_per_epoch
    optim, repeats = config.optim, config.augment.repeats
    scaled = f"optim.lr x {config.batch_size} / {optim.lr_batch}" if optim.lr_batch else "optim.lr"
    drawn = None if each is None else each * config.batch_size
    warmup = None
    if each is not None:
        scheduler = build_scheduler(run.optimizer, config.schedule, config.epochs, each)
        warmup = int(getattr(scheduler, "warmup_t", 0))
    how = "full batches" if repeats == 1 else f"full batches; each image {repeats} times"
    return [
        Figure(name="peak learning rate", value=config.effective_lr, how=scaled),
        Figure(name="global batch", value=config.batch_size, unit="images", how="batch_size"),
        run.images,
        Figure(name="epochs", value=config.epochs, how="epochs"),
        Figure(name="images per epoch", value=drawn, how=how),
        Figure(name="steps per epoch", value=each, how="training images // global batch"),
        Figure(name="steps", value=run.steps, how="steps per epoch x epochs"),
        Figure(name="warm-up steps", value=warmup, how="schedule.warmup_epochs x steps per epoch"),
    ]


def _size_figures(run: OpenRun) -> list[Figure]:
    """Return classes, parameters and multiply-accumulates."""
    trainable = sum(p.numel() for p in run.model.parameters() if p.requires_grad)
    size = "x".join(map(str, run.input_size))
    return [
        run.classes,
        Figure(name="parameters", value=count_parameters(run.model), basis="measured", how="counted"),
        Figure(name="trainable parameters", value=trainable, basis="measured", how="counted"),
        Figure(
            name="forward pass",
            value=count_macs(run.model, run.input_size) / 1e9,
            unit="GMACs",
            basis="measured",
            how=f"counted, one image of {size}",
        ),
    ]
