"""Optimizers and schedules from their configurations, checked before training."""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
from timm.optim import (
    create_optimizer_v2,
    get_optimizer_info,
    list_optimizers,
    param_groups_layer_decay,
    param_groups_weight_decay,
)
from timm.scheduler import create_scheduler_v2
from timm.scheduler.scheduler import Scheduler
from torch import nn

from localvit.config import OptimConfig, ScheduleConfig, TrainOnly
from localvit.errors import ConfigError, one_line, unknown
from localvit.models import head_parameters
from localvit.surgery import locality_parameters

_BAD_ARGUMENTS = (TypeError, ValueError, AssertionError, LookupError, ArithmeticError)
# Arguments of create_optimizer_v2 that timm ignores when it is given groups of parameters.
_GROUPING = (
    "fallback_list",
    "fallback_no_weight_decay",
    "filter_bias_and_bn",
    "layer_decay_min_scale",
    "layer_decay_no_opt_scale",
    "param_group_fn",
)


def freeze(model: nn.Module, train_only: TrainOnly) -> None:
    """Freeze all parameters but those that `train_only` names (see `TrainConfig`).

    Raises:
        ConfigError: if the model has none of them.
    """
    if train_only == "all":
        return
    local = [] if train_only == "head" else locality_parameters(model)
    head = [] if train_only == "locality-alone" else head_parameters(model)
    if not local and train_only != "head":
        raise ConfigError(
            f"train_only={train_only!r}: the model has no locality (model.locality=null); use 'head' or 'all'"
        )
    trained = {id(parameter) for _, parameter in (*local, *head)}
    for parameter in model.parameters():
        parameter.requires_grad_(parameter.requires_grad and id(parameter) in trained)


def build_optimizer(
    model: nn.Module, config: OptimConfig, batch_size: int | None = None
) -> torch.optim.Optimizer:
    """Build timm's optimizer over the trainable parameters; see `OptimConfig` for what is decayed.

    Args:
        model: Owner of the parameters.
        config: Name and settings of the optimizer.
        batch_size: Images per step; it scales the learning rate if `config.lr_batch` is set.

    Raises:
        ConfigError: for an unknown name, or for settings that optimizer or model do not support.
    """
    known = [str(name) for name in list_optimizers()]
    if config.name not in known:
        raise unknown("optim.name", config.name, known)
    if get_optimizer_info(config.name).second_order:
        raise ConfigError(
            f"optim.name={config.name!r} needs second derivatives, which are not computed; use another"
        )
    if config.lr_batch is not None and batch_size is None:
        raise ConfigError(f"optim.lr_batch={config.lr_batch} needs a batch size; pass batch_size")
    if config.layer_decay is not None and not hasattr(model, "group_matcher"):
        raise ConfigError(
            f"optim.layer_decay={config.layer_decay:g}: {type(model).__name__} has no group_matcher, which "
            "assigns parameters to layers; leave the option out"
        )
    args = config.args
    if config.no_decay is not None:
        args = {**args, "param_group_fn": _own_groups(config, config.no_decay)}
    try:
        return create_optimizer_v2(
            model,
            opt=config.name,
            lr=config.lr if batch_size is None else config.effective_lr(batch_size),
            weight_decay=config.weight_decay,
            momentum=config.momentum,
            layer_decay=config.layer_decay,
            **args,
        )
    except _BAD_ARGUMENTS as error:
        raise ConfigError(f"optim.args={config.args}: {one_line(error)}; change them") from error


def _own_groups(config: OptimConfig, no_decay: tuple[str, ...]) -> Any:
    """Return timm's grouping of parameters, with `no_decay` in place of the model's list."""
    ignored = sorted(set(config.args) & set(_GROUPING))
    if ignored:
        raise ConfigError(f"optim.args.{ignored[0]} has no effect with optim.no_decay; leave one out")
    if config.layer_decay is None:
        return partial(
            param_groups_weight_decay,
            weight_decay=config.weight_decay,
            no_weight_decay_list=no_decay,
        )
    return partial(
        param_groups_layer_decay,
        weight_decay=config.weight_decay,
        no_weight_decay_list=no_decay,
        layer_decay=config.layer_decay,
    )


def build_scheduler(
    optimizer: torch.optim.Optimizer, config: ScheduleConfig, epochs: int, steps_per_epoch: int
) -> Scheduler:
    """Build timm's schedule, which `step_update(number of finished steps)` moves.

    Args:
        optimizer: Optimizer whose learning rate it sets.
        config: Kind and settings of the schedule.
        epochs: Its length.
        steps_per_epoch: Steps per epoch.
    """
    scheduler, _ = create_scheduler_v2(
        optimizer,
        sched=config.name,
        num_epochs=epochs,
        warmup_epochs=config.warmup_epochs,  # type: ignore[arg-type]  # a fraction works: it counts steps
        warmup_lr=config.warmup_lr,
        min_lr=config.min_lr,
        decay_rate=1.0,  # the exponent of "poly"
        step_on_epochs=False,
        updates_per_epoch=steps_per_epoch,
    )
    return scheduler
