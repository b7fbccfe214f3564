"""The authors' released weights, with our names.

Reference repository: ofsoundof/LocalViT (paper: arXiv 2104.05707). Its checkpoints have the model under
`"model"`, besides optimizer state and an `argparse.Namespace`. Layers outside the feed-forward network have
the names of each family's authors (`localvit.models.families`). The feed-forward network is one `Sequential`
(`BLOCK.conv.conv.K`) whose positions depend on its options; `reference_layers` lists them.
"""

import argparse
import logging
import pickle
import re
from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from textwrap import shorten
from typing import Any

import timm
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn

from localvit.cost import on_meta
from localvit.errors import first_line, one_line
from localvit.locality import HiddenLocality, LocalityConfig, LocalityFeedForward
from localvit.models.families import family_of, family_of_file
from localvit.models.table import VARIANTS

_logger = logging.getLogger(__name__)

# Buffers that a model computes from its input size (Swin).
_DERIVED = ("relative_position_index", "attn_mask")
# Possible keys of the weights in a file; T2T-ViT's authors evaluate the averaged ones.
_CONTAINERS = ("model", "state_dict_ema", "state_dict", "model_ema")
# What DistributedDataParallel and `torch.compile` put before all keys.
_WRAPPERS = ("module.", "_orig_mod.")


class CheckpointError(ValueError):
    """Checkpoint file that does not fit; the message names the first differences."""


@dataclass(frozen=True)
class LoadReport:
    """Report on a loaded file, stored as `model.load_report`.

    Attributes:
        model: Name or class of the model.
        matched: Keys of the file that were loaded.
        dropped: Entries of the file that were left out on purpose -> reason.
        missing: Keys of the model that the file lacks.
        unexpected: Keys of the file that the model lacks or has in another shape.
    """

    model: str
    matched: tuple[str, ...]
    dropped: dict[str, str]
    missing: tuple[str, ...]
    unexpected: tuple[str, ...]

    def __str__(self) -> str:
        parts = [f"{len(self.matched)} tensors loaded"]
        for word in ("dropped", "missing", "unexpected"):
            keys = list(getattr(self, word))
            if keys:
                parts.append(f"{len(keys)} {word} ({listed(keys)})")
        return f"{self.model}: {', '.join(parts)}"


def load_official(
    source: str | Path | Mapping[str, Any], model: str | nn.Module | None = None, *, strict: bool = True
) -> nn.Module:
    """Load weights published by the authors of LocalViT, DeiT, T2T-ViT, PVT, TNT or Swin.

    Args:
        source: Path of a `.pth` or `.safetensors` file, or its content. Pickled files are read with
            `weights_only`, so nothing in them is executed.
        model: A name for `timm.create_model`, a model, or `None` to recognise it by keys and shapes.
            (The weights do not show the number of heads: a model with a wrong number loads without an error.)
        strict: Refuse a file that does not fit exactly.

    Returns:
        The model in eval mode, with the file's floating dtype and a `load_report`.

    Raises:
        FileNotFoundError: if there is no such file.
        CheckpointError: if the file cannot be read, is not recognised, or (`strict`) does not fit.
    """
    content = read_checkpoint(Path(source)) if isinstance(source, (str, Path)) else source
    weights, dropped = weights_of(content)
    if model is None:
        model = _recognise(weights)
    if isinstance(model, str):
        name, model = model, timm.create_model(model, **_class_count(weights))
    else:
        name = type(model).__name__
    fitting, report = _fit(name, weights, model, dropped)
    if strict and (report.missing or report.unexpected):
        raise CheckpointError(f"the file does not fit {report}; strict=False loads the rest")
    dtypes = {tensor.dtype for tensor in fitting.values() if tensor.is_floating_point()}
    if len(dtypes) == 1:
        model.to(dtypes.pop())
    model.load_state_dict(fitting, strict=False)
    model.load_report = report  # type: ignore[assignment]
    _logger.info("%s", report)
    return model.eval()


def to_own_keys(content: Mapping[str, Any], model: nn.Module) -> dict[str, Tensor]:
    """Convert published weights to a state dict for `model` (a checkpoint filter for timm's loaders).

    Position tables are interpolated if the input size of `model` is not that of the file.
    """
    weights, _ = weights_of(content)
    own, names = model.state_dict(), _own_names(weights, model)
    renamed = {
        names[key]: _in_shape_of(own.get(names[key]), value)
        for key, value in weights.items()
        if names[key] in own or not _is_unused(names[key], model)
    }
    family = family_of(model)
    return dict(family.adapt(renamed, model)) if family else renamed


def read_checkpoint(path: Path) -> Mapping[str, Any]:
    """Read a checkpoint file without executing anything in it.

    Raises:
        FileNotFoundError: if there is no such file.
        CheckpointError: if it is truncated, is not a checkpoint, or has more than weights and settings.
    """
    if not path.is_file():
        hint = "; download it, and name the file" if ":/" in str(path) else ""
        raise FileNotFoundError(f"no checkpoint at {path}{hint}")
    try:
        if path.suffix == ".safetensors":
            return load_file(path)
        with torch.serialization.safe_globals([argparse.Namespace]):
            content = torch.load(path, map_location="cpu", weights_only=True)
    except (pickle.UnpicklingError, RuntimeError, SafetensorError, EOFError, OSError) as error:
        more = ", or one with more than weights" if isinstance(error, pickle.UnpicklingError) else ""
        reason = foreign(path) or f"truncated or not a checkpoint{more} ({first_line(error)})"
        raise CheckpointError(f"{path}: {reason}") from error
    if not isinstance(content, Mapping):
        raise CheckpointError(f"{path} has a {type(content).__name__}; accepted: a dictionary")
    return content


def foreign(path: Path) -> str | None:
    """Describe what the file holds instead of weights, and what to do; `None` if it may be weights."""
    with open(path, "rb") as file:
        start = file.read(100).lstrip()
    if not start:
        return "the file is empty; copy it again"
    if start.startswith(b"version https://git-lfs"):
        return "this is a pointer of Git LFS, not the weights; get them with git lfs pull"
    if start.lower().startswith((b"<!doctype", b"<html", b"<head", b"<?xml")):
        return "this is an HTML page, not the weights; download the file itself"
    return None


def why_unreadable(source: str, error: BaseException) -> str:
    """Return in one line why a model cannot be opened: by its weights, if it is a `local-dir:` reference."""
    folder = Path(source.removeprefix("local-dir:"))
    files = sorted(folder.glob("*.*")) if source.startswith("local-dir:") else []
    for file in files:
        if file.suffix in (".safetensors", ".bin", ".pth"):
            try:
                read_checkpoint(file)
            except CheckpointError as damaged:
                return str(damaged)
    return shorten(one_line(error), 400, placeholder=" ...")


def weights_of(content: Mapping[str, Any]) -> tuple[dict[str, Tensor], dict[str, str]]:
    """Return the tensors to load, and entry -> reason of those left out (not weights, derived buffers)."""
    container = next((name for name in _CONTAINERS if name in content), None)
    inner = content if container is None else content[container]
    if not isinstance(inner, Mapping):
        raise CheckpointError(f"{container!r} has a {type(inner).__name__}; accepted: a state dict")
    dropped = dict.fromkeys((k for k in content if container and k != container), "not the model's weights")
    weights = {}
    for key, value in inner.items():
        if key.rpartition(".")[2] in _DERIVED:
            dropped[key] = "computed by the model"
        elif isinstance(value, Tensor):
            weights[key] = value
        else:
            raise CheckpointError(f"{key!r} has a {type(value).__name__}; accepted: a tensor")
    if not weights:
        raise CheckpointError("the checkpoint has no tensors")
    while prefix := next((p for p in _WRAPPERS if all(key.startswith(p) for key in weights)), None):
        weights = {key.removeprefix(prefix): value for key, value in weights.items()}
    return weights, dropped


def listed(names: list[str]) -> str:
    """Return the first three names, for a message."""
    return f"{', '.join(names[:3])}{', ...' if len(names) > 3 else ''}"


def reference_layers(config: LocalityConfig) -> dict[str, str]:
    """Return position in the reference's `Sequential` -> name in `LocalityFeedForward`."""
    config = config.resolve()
    expand, convolve = ["fc1", "norm1", "act1"], ["conv", "norm2", "act2"]
    if not config.depthwise:
        order = expand
    else:
        order = convolve + expand if config.position == "first" else expand + convolve
    order = order + (["gate"] if config.gate != "none" else []) + ["fc2", "norm3"]
    names: dict[str, str] = {}
    for position, layer in enumerate(order):
        if layer == "gate" and config.gate == "se":
            names |= {f"{position}.fc.0": "gate.fc1", f"{position}.fc.2": "gate.fc2"}
        elif not layer.startswith("act"):
            names[str(position)] = layer
    return names


def _own_names(weights: Mapping[str, Tensor], model: nn.Module) -> dict[str, str]:
    """Return key of the file -> our key (the model may lack it)."""
    local = {}
    for path, module in model.named_modules():
        if isinstance(module, LocalityFeedForward):
            theirs = {ours: position for position, ours in reference_layers(module.config).items()}
            block = path.rpartition(".")[0]
            for key in module.state_dict():
                layer, _, leaf = key.rpartition(".")
                position = theirs.get(layer) or f"{theirs[layer.split('.')[0]]}.{layer.partition('.')[2]}"
                local[f"{block}.conv.conv.{position}.{leaf}"] = f"{path}.{key}"
    family = family_of(model)
    names = family.own_keys(weights) if family else {key: key for key in weights}
    return {key: local.get(name, name) for key, name in names.items()}


def _is_unused(key: str, model: nn.Module) -> bool:
    """Return True if the reference stores this weight and never uses it."""
    family = family_of(model)
    return family is not None and family.unused is not None and re.search(family.unused, key) is not None


def _fit(
    name: str, weights: Mapping[str, Tensor], model: nn.Module, dropped: Mapping[str, str]
) -> tuple[dict[str, Tensor], LoadReport]:
    own = {k: v for k, v in model.state_dict().items() if k.rpartition(".")[2] not in _DERIVED}
    names, dropped = _own_names(weights, model), dict(dropped)
    fitting, unexpected = {}, []
    for key, value in weights.items():
        target = own.get(names[key])
        value = _in_shape_of(target, value)
        if target is None and _is_unused(names[key], model):
            dropped[key] = "stored by the reference, never used by it"
        elif target is None or target.shape != value.shape:
            unexpected.append(
                key if target is None else f"{key} {list(value.shape)}, not {list(target.shape)}"
            )
        else:
            fitting[names[key]] = value
    matched = tuple(key for key in weights if names[key] in fitting)
    kernels = {f"{path}.conv.weight" for path, m in model.named_modules() if isinstance(m, HiddenLocality)}
    neutral = set() if kernels & fitting.keys() else kernels  # a plain file: they start at zero
    missing = tuple(key for key in own if key not in fitting and key not in neutral)
    return fitting, LoadReport(name, matched, dropped, missing, tuple(unexpected))


def _in_shape_of(target: Tensor | None, value: Tensor) -> Tensor:
    """Reshape a weight to the shape of `target` if only the form differs.

    A linear weight (out, in) becomes one of a 1x1 convolution; a position table (1, positions, channels)
    becomes (1, channels, height, width).
    """
    if target is not None and target.ndim == 4 and target.numel() == value.numel():
        if value.ndim == 2:
            return value[:, :, None, None]
        if value.ndim == 3:
            return value.transpose(1, 2).reshape(target.shape)
    return value


def _recognise(weights: Mapping[str, Tensor]) -> str:
    bases = timm.list_models(list(family_of_file(weights).bases))
    is_local = any(".conv." in key for key in weights)
    names = [name for name, variant in VARIANTS.items() if variant.base in bases] if is_local else bases
    reports = {}
    for name in names:
        model = on_meta(partial(timm.create_model, name, **_class_count(weights)))
        _, reports[name] = _fit(name, weights, model, {})
        if not reports[name].missing and not reports[name].unexpected:
            return name
    nearest = max(reports.values(), key=lambda report: len(report.matched))
    raise CheckpointError(f"the file fits none of {', '.join(reports)}; nearest is {nearest}")


def _class_count(weights: Mapping[str, Tensor]) -> dict[str, Any]:
    bias = next((weights[key] for key in ("head.bias", "head.fc.bias") if key in weights), None)
    return {} if bias is None else {"num_classes": bias.shape[0]}
