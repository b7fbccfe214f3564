"""Models from their configurations, with checks before training."""

from __future__ import annotations

import dataclasses

import timm
import torch
from timm.data import resolve_input_data_config
from torch import nn

from localvit.data import DataConfig, Preprocessing
from localvit.errors import ConfigError, one_line, unknown
from localvit.imports import do_what_waits
from localvit.models.config import ModelConfig
from localvit.structure import build

_BAD_ARGUMENTS = (TypeError, ValueError, AssertionError, KeyError, IndexError)


def build_model(config: ModelConfig, num_classes: int) -> nn.Module:
    """Build the model of `config`; its initial weights come from torch's global random state.

    Args:
        config: Name, locality and arguments of the model.
        num_classes: Number of classes of the data.

    Raises:
        ConfigError: for an unknown name, arguments that the model refuses, a locality that does not fit the
            model, or fewer outputs than `num_classes`.
    """
    do_what_waits()  # a worker process may have come here past every door
    name = config.name
    if ":" not in name and not timm.is_model(name):
        raise unknown("model.name", name, timm.list_models())
    args = {"num_classes": num_classes, **config.args}
    if args["num_classes"] < num_classes:
        raise ConfigError(
            f"model.args.num_classes={args['num_classes']} is not accepted; "
            f"the data has {num_classes} classes, so use {num_classes} or more"
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


def preprocessing_for(model: nn.Module, config: DataConfig) -> Preprocessing:
    """Return the preprocessing for `model`; fields that are `None` in `config` are the model's own.

    Raises:
        ConfigError: if `mean` or `std` has not one number per channel of the model, or a value from its
            `config.json` is not accepted.
    """
    names = ("mean", "std", "interpolation", "crop_pct")
    given = {name: getattr(config, name) for name in names if getattr(config, name) is not None}
    try:
        found = resolve_input_data_config(model, {**given, "img_size": _built_for(model)})
    except ValueError as error:
        raise ConfigError(f"data: {error}") from error
    except (TypeError, AttributeError, AssertionError) as error:  # the model's own come from its config.json
        raise ConfigError(f"preprocessing of the model: {one_line(error)}; repair its config.json") from error
    fields = [field.name for field in dataclasses.fields(Preprocessing)]
    return build(Preprocessing, {name: found[name] for name in fields}, "preprocessing")


def _built_for(model: nn.Module) -> tuple[int, int] | None:
    """Return the image size of the model's patch embedding, or `None`.

    For a model with `dynamic_img_size`, timm recommends the size of the published model, not the size that
    this one was built for.
    """
    patches = (part for name, part in model.named_modules() if name.rpartition(".")[2] == "patch_embed")
    return getattr(next(patches, None), "img_size", None)


def check_forward(model: nn.Module, name: str, input_size: tuple[int, int, int]) -> None:
    """Run `model` once on zeros of `input_size` (C, H, W), in evaluation mode, on the device of its weights.

    On the meta device this costs nothing and finds errors of shapes.

    Raises:
        ConfigError: if its patches do not tile the image, or if it fails or does not return class scores.
    """
    patch = getattr(getattr(model, "patch_embed", None), "patch_size", None)
    if patch and any(size % side for size, side in zip(input_size[1:], patch, strict=True)):
        # timm's patch embedding would silently drop the remaining pixels.
        size = "x".join(map(str, input_size[1:]))
        raise ConfigError(
            f"model.args.img_size: {size} is not divisible by the patch size {patch[0]}x{patch[1]}; "
            "use a multiple of it"
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
        raise ConfigError(
            f"model {name!r} returns {tuple(output.shape)}; accepted: class scores (batch, classes)"
        )
