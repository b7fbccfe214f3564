"""Model with its loss: timm's tasks, and a checked teacher with its own preprocessing."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from timm.loss import create_classification_loss
from timm.task import ClassificationTask, LogitDistillationTask, TokenDistillationTask, TrainingTask
from torch import Tensor, nn
from torch.nn import functional as F

from localvit.config import DistillConfig
from localvit.data import AugmentConfig, Preprocessing, random_scope
from localvit.errors import ConfigError
from localvit.inference import OpenModel, open_model
from localvit.models import check_forward


def build_task(
    model: nn.Module,
    augment: AugmentConfig,
    distill: DistillConfig | None,
    preprocessing: Preprocessing,
    class_names: Sequence[str],
    *,
    device: torch.device,
) -> TrainingTask:
    """Build timm's task; the global random state does not change.

    Args:
        model: Model to train, on `device`.
        augment: Its `smoothing` and `mixes` decide the loss.
        distill: A teacher, or `None`.
        preprocessing: Preparation of the images.
        class_names: Name of each label.
        device: Device of the model and of a teacher.

    Raises:
        ConfigError: if a teacher cannot be loaded, has other classes or refuses the model's image size, or
            if the model lacks the distillation token of `distill.token`.
    """
    criterion = create_classification_loss(smoothing=augment.smoothing, soft_targets=augment.mixes)
    if distill is None:
        return ClassificationTask(model, criterion, device=device, verbose=False)
    if distill.token:
        check_student(model)
    with random_scope():  # building a model draws numbers, even if weights are loaded over them
        teacher = _load_teacher(distill.teacher, model, preprocessing, class_names, device)
    task = _distillation(model, teacher.model, distill, criterion, device)
    # timm takes both from the models' own configuration, which ignores data.mean and data.std.
    task.student_mean, task.student_std = _per_channel(preprocessing, device)
    task.teacher.mean_kd, task.teacher.std_kd = _per_channel(teacher.preprocessing, device)  # type: ignore
    return task


def check_student(model: nn.Module) -> None:
    """Raise `ConfigError` if `model` has no distillation token."""
    if not hasattr(model, "set_distilled_training"):
        raise ConfigError(
            f"distill.token=true: {type(model).__name__} has no distillation token; use a deit_*_distilled_* "
            "model or distill.token=false"
        )


def _distillation(
    model: nn.Module, teacher: nn.Module, config: DistillConfig, criterion: nn.Module, device: torch.device
) -> TrainingTask:
    shared: dict[str, Any] = {
        "student_model": model,
        "teacher_model": teacher,
        "criterion": criterion,
        "task_loss_weight": 1.0 - config.alpha,
        "distill_loss_weight": config.alpha,
        "temperature": config.temperature,
        "device": device,
        "verbose": False,
    }
    if config.token:
        return TokenDistillationTask(distill_type=config.kind, **shared)
    return LogitDistillationTask(**shared) if config.kind == "soft" else HardDistillationTask(**shared)


class HardDistillationTask(LogitDistillationTask):
    """Hard distillation at the classifier, without a token (the paper's table 3), which timm lacks."""

    def forward(self, input: Tensor, target: Tensor) -> dict[str, Tensor]:
        """(B, C, H, W) images and their labels -> `loss`, `output`, `task_loss`, `kd_loss`."""
        output = self.trainable_module(input)
        task_loss = self.criterion(output, target)
        with torch.no_grad():
            mean, std = self.get_buffer("student_mean"), self.get_buffer("student_std")
            seen = self.teacher.normalize_input(input, mean, std)
            choice = self.teacher(seen).argmax(dim=-1)
        kd_loss = F.cross_entropy(output, choice)
        loss = self.task_loss_weight * task_loss + self.distill_loss_weight * kd_loss
        return {"loss": loss, "output": output, "task_loss": task_loss, "kd_loss": kd_loss}


def _load_teacher(
    source: str,
    student: nn.Module,
    preprocessing: Preprocessing,
    class_names: Sequence[str],
    device: torch.device,
) -> OpenModel:
    try:
        teacher = open_model(source, "cpu")
        theirs, ours = teacher.model.num_classes, student.num_classes
        if theirs != ours:
            raise ConfigError(f"it has {theirs} classes and the student {ours}; use another teacher")
        own = teacher.model.pretrained_cfg.get("label_names")  # type: ignore[union-attr, operator]
        different = [pair for pair in zip(own or (), class_names, strict=False) if len(set(pair)) > 1]
        if different:
            raise ConfigError("its class {!r} is {!r} in the data; use another teacher".format(*different[0]))
        check_forward(teacher.model, source, preprocessing.input_size)
    except ConfigError as error:
        raise ConfigError(f"distill.teacher={source!r}: {error}") from error
    teacher.model.eval().requires_grad_(False).to(device)
    return teacher


def _per_channel(preprocessing: Preprocessing, device: torch.device) -> tuple[Tensor, Tensor]:
    """Return mean and standard deviation as (1, C, 1, 1)."""
    values = (preprocessing.mean, preprocessing.std)
    mean, std = (torch.tensor(value, device=device).view(1, -1, 1, 1) for value in values)
    return mean, std
