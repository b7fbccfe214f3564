"""A trained model from wherever it is: a run's folder, an exported folder, or a published name."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import timm
import torch
from timm.data import ImageNetInfo, infer_imagenet_subset
from torch import nn

from localvit.config import TrainConfig, read_config
from localvit.data import DataConfig, Preprocessing
from localvit.errors import ConfigError, one_line, unknown
from localvit.models import preprocessing_for

_PREFIXES = ("local-dir:", "hf-hub:", "hf_hub:")


@dataclass(frozen=True, kw_only=True)
class Checkpoint:
    """A model ready to be used.

    Attributes:
        source: What was asked for.
        model: In evaluation mode.
        preprocessing: Preparation of its images.
        labels: The label of each output as its training data named it (a folder's name), if known.
        descriptions: What a person calls each label, if known; otherwise as `labels`.
        run: The configuration that trained it, if it stands in a run's folder.
    """

    source: str
    model: nn.Module
    preprocessing: Preprocessing
    labels: tuple[str, ...] | None
    descriptions: tuple[str, ...] | None
    run: TrainConfig | None


def load_checkpoint(source: str, device: torch.device, args: Mapping[str, Any] | None = None) -> Checkpoint:
    """Load a model for use.

    Args:
        source: A run's folder (its ``best/`` is taken), a folder with `config.json` and weights, a
            ``local-dir:`` or ``hf-hub:`` reference, or a timm name with published weights.
        device: Where to put it.
        args: Constructor arguments in which the model is to differ from what is saved.

    Raises:
        ConfigError: if there is no such checkpoint or it cannot be loaded.
    """
    name, run = _locate(source)
    try:
        model = timm.create_model(name, pretrained=True, **(args or {}))
    except (OSError, RuntimeError, ValueError, TypeError, KeyError, AssertionError) as error:
        raise ConfigError(f"checkpoint {source!r} cannot be loaded: {one_line(error)}") from error
    labels, descriptions = _class_names(model)
    return Checkpoint(
        source=source,
        model=model.eval().to(device),
        preprocessing=preprocessing_for(model, DataConfig()),
        labels=labels,
        descriptions=descriptions,
        run=run,
    )


def _locate(source: str) -> tuple[str, TrainConfig | None]:
    """The name for timm, and the configuration of the run that the source belongs to."""
    folder = Path(source)
    if folder.is_dir():
        for model, run in ((folder / "best", folder), (folder, folder.parent)):
            if (model / "config.json").is_file():
                config = run / "config.yaml"
                known = config.is_file() and (run / "status.json").is_file()
                return f"local-dir:{model}", read_config(config) if known else None
        raise ConfigError(f"checkpoint {source!r} holds neither best/config.json nor config.json")
    if source.startswith(_PREFIXES):
        return source, None
    if timm.is_model(source):
        return source, None
    if os.sep in source or source.startswith("."):
        raise ConfigError(f"checkpoint {source!r}: there is no such folder")
    raise unknown("checkpoint", source, timm.list_models())


def _class_names(model: nn.Module) -> tuple[tuple[str, ...] | None, tuple[str, ...] | None]:
    names = model.pretrained_cfg.get("label_names")  # type: ignore[union-attr, operator]
    if names and len(names) == model.num_classes:
        return tuple(names), tuple(names)
    subset = infer_imagenet_subset(model)  # by the number of outputs: 1000 are those of ILSVRC-2012
    if subset is not None:
        info = ImageNetInfo(subset)
        labels = tuple(info.label_names())
        return labels, tuple(info.label_name_to_description(label) for label in labels)
    return None, None
