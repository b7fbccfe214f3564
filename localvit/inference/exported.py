"""Trained models to and from the files of other engines (`localvit.export`)."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import timm
import torch
from torch import Tensor, nn

from localvit.data import DataConfig
from localvit.engines import SAFE, Engine, EngineKind, open_engine
from localvit.errors import ConfigError
from localvit.inference.checkpoint import Checkpoint, load_checkpoint
from localvit.models import preprocessing_for
from localvit.runtime import pick_device


def untrained(name: str, args: Mapping[str, Any]) -> Checkpoint:
    """A timm name with random weights.

    Raises:
        ConfigError: if there is no such name or it does not take `args`.
    """
    if not timm.is_model(name):
        raise ConfigError(f"random weights need the name of a model, not {name!r}")
    try:
        model = timm.create_model(name, **args).eval()
    except (TypeError, ValueError, AssertionError, KeyError) as error:
        raise ConfigError(f"model {name!r} with {args}: {error}") from error
    return Checkpoint(
        source=name,
        model=model,
        preprocessing=preprocessing_for(model, DataConfig()),
        labels=None,
        descriptions=None,
        run=None,
    )


def open_checkpoint(source: str, device: str, engine: EngineKind | None = None) -> Checkpoint:
    """A model ready to be used, whether in a folder, under a name, or in an exported file.

    Args:
        source: As `load_checkpoint`, or a file of `localvit export`.
        device: As in `TrainConfig`; exported files run on the CPU.
        engine: What runs an exported file; ``None``: ONNX Runtime an ``.onnx``, OpenVINO an ``.xml``.
            ``"torch"`` has to be named, because reading a ``.pt2`` may run code of its maker.

    Raises:
        ConfigError: if it cannot be loaded.
    """
    suffix = Path(source).suffix
    if suffix == ".pt2" and engine is None:
        raise ConfigError(
            f"checkpoint {source!r}: reading a .pt2 may run its maker's code; --engine torch, if you trust it"
        )
    engine = engine or SAFE.get(suffix)
    if engine is None:
        return load_checkpoint(source, pick_device(device))
    if device not in ("auto", "cpu"):
        raise ConfigError(f"device={device!r}: exported files run on the CPU")
    opened = open_engine(engine, source)
    info = opened.info
    return Checkpoint(
        source=source,
        model=EngineModel(opened, Path(source)).eval(),
        preprocessing=info,
        labels=info.labels,
        descriptions=info.descriptions,
        run=None,
    )


class EngineModel(nn.Module):
    """An engine in the place of a model. Its state is the digest of its files, which tells two of them apart.

    Args:
        engine: What computes.
        file: Where it was read.
    """

    digest: Tensor

    def __init__(self, engine: Engine, file: Path) -> None:
        super().__init__()
        self.engine, self.num_classes = engine, engine.info.num_classes
        digest = hashlib.sha256()
        for part in (file, file.with_suffix(".bin")) if file.suffix == ".xml" else (file,):
            digest.update(part.read_bytes())
        self.register_buffer("digest", torch.frombuffer(bytearray(digest.digest()), dtype=torch.uint8))

    def forward(self, images: Tensor) -> Tensor:
        """Pictures (B, C, H, W) to logits (B, classes)."""
        return self.engine(images)
