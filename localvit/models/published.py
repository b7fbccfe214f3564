"""The authors' released weights, under our names.

Reference repository: ofsoundof/LocalViT (paper: arXiv 2104.05707). Its checkpoints hold the model under
``"model"``, beside optimizer state and an ``argparse.Namespace``. Attention, embeddings and head have
timm's keys. The feed-forward network is one ``Sequential`` (``blocks.N.conv.conv.K``) whose positions
depend on its options; :func:`reference_layers` spells them out.
"""

import argparse
import logging
import pickle
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import timm
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn

from localvit.locality import LocalityConfig, LocalityFeedForward

_logger = logging.getLogger(__name__)

# Buffers that a model computes from its own geometry (Swin).
_DERIVED = ("relative_position_index", "attn_mask")
# Architectures that a file is tried against when no model is named.
_CANDIDATES = ["localvit_*", "deit_*"]


class CheckpointError(ValueError):
    """The file is not what it should be; the message names the first differences."""


@dataclass(frozen=True)
class LoadReport:
    """What became of a file; kept on the loaded model as ``model.load_report``.

    Attributes:
        model: Name or class of the model.
        matched: Keys of the file that were loaded.
        dropped: Entries of the file that were left out on purpose -> why.
        missing: Keys of the model that the file lacks.
        unexpected: Keys of the file that the model lacks, or has in another shape.
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
                parts.append(f"{len(keys)} {word} ({', '.join(keys[:3])}{', ...' if len(keys) > 3 else ''})")
        return f"{self.model}: {', '.join(parts)}"


def load_official(
    source: str | Path | Mapping[str, Any], model: str | nn.Module | None = None, *, strict: bool = True
) -> nn.Module:
    """A model with the weights that the authors of LocalViT (or DeiT) published.

    Args:
        source: Path of a ``.pth`` or ``.safetensors`` file, or its content. Pickled files are read with
            ``weights_only``, so nothing in them is executed.
        model: A name for ``timm.create_model``, a model, or ``None`` to recognise it by keys and shapes.
            (The number of heads leaves no trace in the weights: a wrong one loads without complaint.)
        strict: Refuse a file that does not fit exactly.

    Returns:
        The model, in the file's floating dtype and in eval mode, with its ``load_report``.

    Raises:
        FileNotFoundError: if there is no such file.
        CheckpointError: if it cannot be read, is not recognised, or (``strict``) does not fit.
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
        raise CheckpointError(f"the file does not fit {report}")
    dtypes = {tensor.dtype for tensor in fitting.values() if tensor.is_floating_point()}
    if len(dtypes) == 1:
        model.to(dtypes.pop())
    model.load_state_dict(fitting, strict=False)
    model.load_report = report  # type: ignore[assignment]
    _logger.info("%s", report)
    return model.eval()


def to_own_keys(content: Mapping[str, Any], model: nn.Module) -> dict[str, Tensor]:
    """Published weights as a state dict for ``model``: the checkpoint filter for timm's loaders."""
    weights, _ = weights_of(content)
    own = model.state_dict()
    names = _own_names(model)
    return {names.get(k, k): _as_conv(v, own.get(names.get(k, k))) for k, v in weights.items()}


def read_checkpoint(path: Path) -> Mapping[str, Any]:
    """Content of a checkpoint file, executing nothing that is in it.

    Raises:
        FileNotFoundError: if there is no such file.
        CheckpointError: if it is truncated, of another kind, or holds other than weights and settings.
    """
    if not path.is_file():
        raise FileNotFoundError(f"no checkpoint at {path}")
    try:
        if path.suffix == ".safetensors":
            return load_file(path)
        with torch.serialization.safe_globals([argparse.Namespace]):
            content = torch.load(path, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        reason = str(error).splitlines()[0]
        raise CheckpointError(f"{path}: not a checkpoint, or one with more than weights: {reason}") from error
    except (RuntimeError, SafetensorError, EOFError, OSError) as error:
        raise CheckpointError(f"{path}: truncated or not a checkpoint ({error})") from error
    if not isinstance(content, Mapping):
        raise CheckpointError(f"{path}: holds a {type(content).__name__}, not a dictionary")
    return content


def weights_of(content: Mapping[str, Any]) -> tuple[dict[str, Tensor], dict[str, str]]:
    """The tensors to load, and what is left out: other entries of the file, derived buffers."""
    inner = content.get("model", content)
    if not isinstance(inner, Mapping):
        raise CheckpointError(f"'model' holds a {type(inner).__name__}, not a state dict")
    dropped = {key: "not the model's weights" for key in content if inner is not content and key != "model"}
    weights = {}
    for key, value in inner.items():
        if key.rpartition(".")[2] in _DERIVED:
            dropped[key] = "computed by the model"
        elif isinstance(value, Tensor):
            weights[key] = value
        else:
            raise CheckpointError(f"{key!r} holds a {type(value).__name__}, not a tensor")
    if not weights:
        raise CheckpointError("no tensors in it")
    return weights, dropped


def reference_layers(config: LocalityConfig) -> dict[str, str]:
    """Position in the reference's ``Sequential`` -> name in :class:`LocalityFeedForward`."""
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


def _own_names(model: nn.Module) -> dict[str, str]:
    """Reference key -> own key, where they differ."""
    names = {}
    for path, module in model.named_modules():
        if isinstance(module, LocalityFeedForward):
            theirs = {ours: position for position, ours in reference_layers(module.config).items()}
            block = path.rpartition(".")[0]
            for key in module.state_dict():
                layer, _, leaf = key.rpartition(".")
                position = theirs.get(layer) or f"{theirs[layer.split('.')[0]]}.{layer.partition('.')[2]}"
                names[f"{block}.conv.conv.{position}.{leaf}"] = f"{path}.{key}"
    return names


def _fit(
    name: str, weights: Mapping[str, Tensor], model: nn.Module, dropped: dict[str, str]
) -> tuple[dict[str, Tensor], LoadReport]:
    own = {k: v for k, v in model.state_dict().items() if k.rpartition(".")[2] not in _DERIVED}
    names = _own_names(model)
    fitting, unexpected = {}, []
    for key, value in weights.items():
        target = own.get(names.get(key, key))
        value = _as_conv(value, target)
        if target is None or target.shape != value.shape:
            unexpected.append(
                key if target is None else f"{key} {list(value.shape)}, not {list(target.shape)}"
            )
        else:
            fitting[names.get(key, key)] = value
    matched = tuple(key for key in weights if names.get(key, key) in fitting)
    missing = tuple(key for key in own if key not in fitting)
    return fitting, LoadReport(name, matched, dropped, missing, tuple(unexpected))


def _as_conv(value: Tensor, target: Tensor | None) -> Tensor:
    """A linear weight (out, in) as the 1x1 convolution (out, in, 1, 1) that stands in its place."""
    if target is not None and value.ndim == 2 and target.ndim == 4:
        return value[:, :, None, None]
    return value


def _recognise(weights: Mapping[str, Tensor]) -> str:
    reports = {}
    for name in timm.list_models(_CANDIDATES):
        with torch.device("meta"):
            model = timm.create_model(name, **_class_count(weights))
        _, reports[name] = _fit(name, weights, model, {})
        if not reports[name].missing and not reports[name].unexpected:
            return name
    nearest = max(reports.values(), key=lambda report: len(report.matched))
    raise CheckpointError(f"the file fits none of {', '.join(reports)}; nearest is {nearest}")


def _class_count(weights: Mapping[str, Tensor]) -> dict[str, Any]:
    return {"num_classes": weights["head.bias"].shape[0]} if "head.bias" in weights else {}
