"""Models, optimizers and schedules from their configurations; what cannot work fails before training."""

from __future__ import annotations

from functools import partial
from typing import Any, Literal

import timm
import torch
from timm.data import resolve_input_data_config
from timm.optim import (
    create_optimizer_v2,
    list_optimizers,
    param_groups_layer_decay,
    param_groups_weight_decay,
)
from timm.scheduler import create_scheduler_v2
from timm.scheduler.scheduler import Scheduler
from torch import nn

from localvit.data import DataConfig
from localvit.surgery import locality_parameters
from localvit.training.config import ConfigError, ModelConfig, OptimConfig, TrainConfig, unknown

_BAD_ARGUMENTS = (TypeError, ValueError, AssertionError, KeyError, IndexError)
# Arguments of create_optimizer_v2 that timm ignores when it is given groups of parameters.
_GROUPING = (
    "fallback_list",
    "fallback_no_weight_decay",
    "filter_bias_and_bn",
    "layer_decay_min_scale",
    "layer_decay_no_opt_scale",
    "param_group_fn",
)


def build_model(config: ModelConfig, num_classes: int) -> nn.Module:
    """The model of `config`.

    Args:
        config: Which model. Its initial weights come from torch's global random state.
        num_classes: Classes of the data.

    Raises:
        ConfigError: for an unknown name, arguments that the model refuses, a locality that does not fit
            it, or fewer outputs than `num_classes`.
    """
    name = config.name
    if ":" not in name and not timm.is_model(name):
        raise unknown("model.name", name, timm.list_models())
    args = {"num_classes": num_classes, **config.args}
    if args["num_classes"] < num_classes:
        raise ConfigError(
            f"model.args.num_classes={args['num_classes']}, but the data has {num_classes} classes"
        )
    if config.locality is not None:
        args |= {"base": name, "locality": config.locality.to_dict(), "blocks": config.blocks}
        name = "localized"
    try:
        return timm.create_model(name, pretrained=config.pretrained, **args)
    except _BAD_ARGUMENTS as error:
        raise ConfigError(f"model {config.name!r}: {one_line(error)}") from error
    except (OSError, RuntimeError) as error:
        if not config.pretrained and ":" not in config.name:
            raise
        what = "model.pretrained: no weights for" if config.pretrained else "model.name: cannot open"
        raise ConfigError(f"{what} {config.name!r}: {one_line(error)}") from error


def preprocessing(model: nn.Module, config: DataConfig) -> dict[str, Any]:
    """How pictures are prepared for `model`: `input_size` (C, H, W), `mean`, `std`, `interpolation`,
    `crop_pct`, `crop_mode`; what `config` leaves open is the model's own.

    Raises:
        ConfigError: if `mean` or `std` do not fit the model's channels.
    """
    names = ("mean", "std", "interpolation", "crop_pct")
    given = {name: getattr(config, name) for name in names if getattr(config, name) is not None}
    try:
        return resolve_input_data_config(model, {**given, "img_size": _built_for(model)})
    except ValueError as error:
        raise ConfigError(f"data: {error}") from error


def _built_for(model: nn.Module) -> tuple[int, int] | None:
    """The size of pictures that the model's patches say. For a model that takes any size
    (``dynamic_img_size``) timm recommends that of the published one, whatever this one was built for."""
    patches = (part for name, part in model.named_modules() if name.rpartition(".")[2] == "patch_embed")
    return getattr(next(patches, None), "img_size", None)


def freeze(model: nn.Module, train_only: Literal["all", "locality"]) -> None:
    """Leave only what `train_only` says trainable: ``"locality"`` is its parameters and the classifier.

    Raises:
        ConfigError: if the model has no locality.
    """
    if train_only == "all":
        return
    kept = {id(parameter) for _, parameter in locality_parameters(model)}
    if not kept:
        raise ConfigError("train_only='locality': the model has none (model.locality=null)")
    classifier = model.get_classifier()  # type: ignore[operator]
    for head in classifier if isinstance(classifier, tuple) else (classifier,):
        kept |= {id(parameter) for parameter in head.parameters()}
    for parameter in model.parameters():
        parameter.requires_grad_(parameter.requires_grad and id(parameter) in kept)


def build_optimizer(
    model: nn.Module, config: OptimConfig, batch_size: int | None = None
) -> torch.optim.Optimizer:
    """timm's optimizer over the trainable parameters; see `OptimConfig` for what is decayed.

    Args:
        model: Where the parameters are.
        config: Which optimizer.
        batch_size: Pictures per update; it scales the rate where `config.lr_batch` is set.

    Raises:
        ConfigError: for an unknown name, arguments that the optimizer refuses, or what the model does not
            support.
    """
    known = [str(name) for name in list_optimizers()]
    if config.name not in known:
        raise unknown("optim.name", config.name, known)
    if config.lr_batch is not None and batch_size is None:
        raise ConfigError(f"optim.lr_batch={config.lr_batch}: the learning rate needs the batch size")
    if config.layer_decay is not None and not hasattr(model, "group_matcher"):
        raise ConfigError(
            f"optim.layer_decay={config.layer_decay:g}: {type(model).__name__} does not say which parameter "
            "is in which layer (it has no group_matcher)"
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
        raise ConfigError(f"optim.args={config.args}: {one_line(error)}") from error


def _own_groups(config: OptimConfig, no_decay: tuple[str, ...]) -> Any:
    """timm's grouping of parameters, with `no_decay` in the place of the model's list."""
    ignored = sorted(set(config.args) & set(_GROUPING))
    if ignored:
        raise ConfigError(f"optim.args.{ignored[0]} has no effect with optim.no_decay")
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
    optimizer: torch.optim.Optimizer, config: TrainConfig, updates_per_epoch: int
) -> Scheduler:
    """timm's schedule over `config.epochs`, moved with ``step_update(number of updates done)``."""
    schedule = config.schedule
    scheduler, _ = create_scheduler_v2(
        optimizer,
        sched=schedule.name,
        num_epochs=config.epochs,
        warmup_epochs=schedule.warmup_epochs,  # type: ignore[arg-type]  # a fraction works: it counts updates
        warmup_lr=schedule.warmup_lr,
        min_lr=schedule.min_lr,
        decay_rate=1.0,  # the exponent of "poly"
        step_on_epochs=False,
        updates_per_epoch=updates_per_epoch,
    )
    return scheduler


def pick_device(name: str) -> torch.device:
    """The device of that name; ``"auto"`` is the first GPU if there is one, else the CPU.

    Raises:
        ConfigError: if there is no such device here.
    """
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
        torch.empty(1, device=device)
    except (RuntimeError, AssertionError, NotImplementedError) as error:
        raise ConfigError(f"device={name!r} cannot be used here: {one_line(error)}") from error
    return device


def check_forward(model: nn.Module, name: str, input_size: tuple[int, int, int]) -> None:
    """Run `model` once on zeros of `input_size` (C, H, W), in evaluation mode, where its weights are (on the
    meta device this costs nothing and finds what shapes alone can tell).

    Raises:
        ConfigError: if its patches do not tile the image, if it fails, or returns other than class scores.
    """
    patch = getattr(getattr(model, "patch_embed", None), "patch_size", None)
    if patch and any(size % side for size, side in zip(input_size[1:], patch, strict=True)):
        # timm's patch embedding would drop the remaining pixels without a word.
        size = "x".join(map(str, input_size[1:]))
        raise ConfigError(
            f"model.args.img_size: {size} is not divisible by the patch size {patch[0]}x{patch[1]}"
        )
    try:
        with torch.no_grad():
            device = next(model.parameters()).device
            output = model.eval()(torch.zeros(1, *input_size, device=device))
    except (*_BAD_ARGUMENTS, RuntimeError) as error:
        at = f"model {name!r} fails on an image of size {input_size}"
        raise ConfigError(f"{at}: {one_line(error)}") from error
    finally:
        model.train()
    if output.shape != (1, model.num_classes):
        raise ConfigError(f"model {name!r} does not return (batch, classes) but {tuple(output.shape)}")


def one_line(error: BaseException) -> str:
    """The message of an error, or its kind, in one line."""
    return " ".join(str(error).split()) or type(error).__name__
