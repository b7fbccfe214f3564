"""Models from their configurations, with checks before training."""

from __future__ import annotations

import dataclasses
import difflib
import math
import re
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

import timm
import torch
from safetensors import SafetensorError
from timm.data import resolve_input_data_config
from timm.models import load_checkpoint
from torch import nn

from localvit.data import DataConfig, Preprocessing
from localvit.errors import ConfigError, one_line, unknown
from localvit.imports import do_what_waits
from localvit.locality import LocalityConfig
from localvit.models.config import ModelConfig
from localvit.models.published import CheckpointError, load_official, why_unreadable
from localvit.structure import build
from localvit.surgery import localize

_REFUSED = (TypeError, ValueError, AssertionError, LookupError, AttributeError, ArithmeticError)
# Arguments of timm's models that are sizes or counts, or lists of them.
_POSITIVE = (
    *("img_size", "patch_size", "window_size", "in_chans", "num_classes", "depth", "depths", "mlp_ratio"),
    *("mlp_ratios", "embed_dim", "embed_dims", "inner_dim", "token_dim", "hidden_size"),
    *("num_heads", "num_heads_inner", "num_heads_outer"),
)
# Arguments of timm's factory that a run decides elsewhere, and where.
_ELSEWHERE = {
    "device": "device",
    "dtype": "engine.precision",
    "pretrained": "model.pretrained",
    "features_only": "a model with a classifier",
}


def build_model(config: ModelConfig, num_classes: int) -> nn.Module:
    """Build the model of `config`; its initial weights come from torch's global random state.

    Saved by timm's `save_for_hf`, it is self-contained: a `local-dir:` or `hf-hub:` reference is resolved to
    its architecture and arguments.

    Args:
        config: Name, locality and arguments of the model.
        num_classes: Number of classes of the data.

    Raises:
        ConfigError: for an unknown name, arguments that the model refuses, a locality that does not fit the
            model, weights that cannot be read or do not fit, or fewer outputs than `num_classes`.
    """
    do_what_waits()  # a worker process may come here without importing a door
    name = config.name
    if ":" not in name and not timm.is_model(name):
        raise unknown("model.name", name, timm.list_models())
    args = {"num_classes": num_classes, **config.args}
    check_args(args)
    outputs = args["num_classes"]
    if type(outputs) is not int or outputs < num_classes:
        raise ConfigError(
            f"model.args.num_classes={outputs} is not accepted; "
            f"the data has {num_classes} classes, so use {num_classes} or more"
        )
    path = args.pop("checkpoint_path", None)
    try:
        return _create(config, args, Path(path) if path else None)
    except _REFUSED as error:
        found = re.search(r"unexpected keyword argument '(\w+)'", str(error))
        if found and found[1] in config.args:
            near = difflib.get_close_matches(found[1], _POSITIVE, n=1)
            hint = f"did you mean {near[0]!r}?" if near else "leave it out"
            raise ConfigError(
                f"model.args.{found[1]} is not an argument of model {name!r}; {hint}"
            ) from error
        raise ConfigError(f"model {name!r}: {one_line(error)}; check model.args {config.args}") from error
    except (OSError, RuntimeError, EOFError, SafetensorError) as error:
        what = "model.name: cannot open" if ":" in name else "model"
        what = "model.pretrained: no weights for" if config.pretrained else what
        remedy = "check its files" if path or ":" in name else "check model.args"
        if config.pretrained and not path:
            remedy = "check the connection, or name a file in model.args.checkpoint_path"
        raise ConfigError(f"{what} {name!r}: {why_unreadable(name, error)}; {remedy}") from error


def check_args(args: Mapping[str, Any]) -> None:
    """Refuse constructor arguments that no model can have.

    Raises:
        ConfigError: naming the first.
    """
    for name, value in args.items():
        given = f"model.args.{name}: {value!r} is not accepted"
        each = value if isinstance(value, list | tuple) else (value,)
        numbers = [number for number in each if isinstance(number, int | float)]
        words = [word for word in each if isinstance(word, str)]
        if name in _ELSEWHERE:
            raise ConfigError(f"{given}; use {_ELSEWHERE[name]}")
        if name in _POSITIVE and (words or not all(0 < number < math.inf for number in numbers)):
            raise ConfigError(f"{given}; use a positive number, or a list such as [32, 40]")
        if name.endswith("_rate") and not all(0 <= number <= 1 for number in numbers):
            raise ConfigError(f"{given}; use a number from 0 to 1")
        if name == "checkpoint_path" and value and not Path(value).is_file():
            raise ConfigError(f"{given}; use an existing file")


def _create(config: ModelConfig, args: dict[str, Any], weights: Path | None) -> nn.Module:
    """Create the model; `weights` are those of the plain model or of the localized one."""
    blocks: Any = config.blocks
    also = {} if config.locality is None else args.pop("also", {})
    groups = {group: LocalityConfig.from_dict(values) for group, values in also.items()}
    model = timm.create_model(config.name, pretrained=config.pretrained, **args)
    saved: Any = model._model_args
    if ":" in str(saved.get("base", "")):  # version 0.3 saved references
        saved["base"] = model.base_name
    if config.locality is not None:
        if weights:
            with suppress(CheckpointError):  # then they are those of the localized model
                _load(model, weights)
                weights = None
        localize(model, config.locality, blocks, also=groups, keep_originals=False, count_macs=False)
    if weights:
        _load(model, weights)
    return model


def _load(model: nn.Module, path: Path) -> None:
    """Load a file, unless the model is on the meta device."""
    like = next(model.parameters())
    if like.is_meta:
        return
    if path.suffix in (".npz", ".npy"):
        load_checkpoint(model, str(path))  # the model's own reader
    else:
        load_official(path, model).train().to(like.dtype)


def preprocessing_for(model: nn.Module, config: DataConfig) -> Preprocessing:
    """Return the preprocessing for `model`; fields that are `None` in `config` are the model's own.

    Raises:
        ConfigError: if `mean` or `std` has not one number per channel of the model, or a value from its
            `config.json` is not accepted.
    """
    given = {name: getattr(config, name) for name in ("mean", "std", "interpolation", "crop_pct")}
    try:
        found = resolve_input_data_config(model, {**given, "img_size": _built_for(model)})
    except ValueError as error:
        raise ConfigError(f"data: {error}") from error
    except _REFUSED as error:  # the model's own come from its config.json
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
    except (*_REFUSED, RuntimeError) as error:
        at = f"model {name!r} fails on an image of size {input_size}"
        raise ConfigError(f"{at}: {one_line(error)}") from error
    finally:
        model.train()
    if output.shape != (1, model.num_classes):
        raise ConfigError(
            f"model {name!r} returns {tuple(output.shape)}; accepted: class scores (batch, classes)"
        )
