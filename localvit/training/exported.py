"""Trained models to and from the files of other engines (`localvit.export`)."""

from __future__ import annotations

import hashlib
import itertools
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import timm
import torch
from torch import Tensor, nn

from localvit.data import DataConfig, DataError, eval_loader
from localvit.data.loading import readable
from localvit.data.splits import open_reported
from localvit.export import (
    SAFE,
    TOLERANCE,
    Engine,
    EngineKind,
    ExportInfo,
    FormatName,
    Parity,
    check_export,
    export_model,
    open_engine,
)
from localvit.export.info import Size
from localvit.export.parity import BATCHES
from localvit.training.build import pick_device, preprocessing
from localvit.training.checkpoint import Checkpoint, load_checkpoint
from localvit.training.config import ConfigError


def export_checkpoint(
    source: str,
    file: str | Path,
    format: FormatName,
    *,
    args: Mapping[str, Any] | None = None,
    random_weights: bool = False,
    dynamic_size: bool = False,
    overwrite: bool = False,
    data: str = "digits",
    config: DataConfig | None = None,
    tolerance: float = TOLERANCE,
    threads: int | None = None,
) -> Parity:
    """Write a model for another engine, with what `predict` must know, after comparing the two.

    Args:
        source: As `load_checkpoint`.
        file: As `export_model`, and so are `dynamic_size`, `overwrite`, `tolerance` and `threads`.
        format: ``"onnx"``, ``"openvino"`` or ``"torch"``.
        args: Constructor arguments in which the model is to differ, e.g. ``{"img_size": 192}``.
        random_weights: `source` is a timm name and its weights are not wanted: to measure speed.
        data: Source of the real pictures of the comparison; the first three are taken.
        config: For `root` and the names of splits.

    Raises:
        ConfigError, DataError: if the model, the pictures or the file cannot be had.
        ExportFailed, ParityError: as `localvit.export.export_model`.
    """
    check_export(file, format, overwrite=overwrite)
    args = dict(args or {})
    if random_weights:
        checkpoint = untrained(source, args)
    else:
        checkpoint = load_checkpoint(source, torch.device("cpu"), args)
    model, seen = checkpoint.model, checkpoint.data_config
    info = ExportInfo.of(
        seen,
        architecture=str(model.pretrained_cfg.get("architecture", source)),  # type: ignore[union-attr, operator]
        num_classes=model.num_classes,  # type: ignore[arg-type]
        labels=checkpoint.labels,
        descriptions=checkpoint.descriptions,
    )
    return export_model(
        model,
        file,
        format,
        info,
        pictures(data, config or DataConfig(), seen),
        dynamic_size=dynamic_size,
        overwrite=overwrite,
        tolerance=tolerance,
        threads=threads,
    )


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
    seen = preprocessing(model, DataConfig())
    return Checkpoint(source=name, model=model, data_config=seen, labels=None, descriptions=None, run=None)


def pictures(source: str, config: DataConfig, seen: dict[str, Any]) -> Callable[[Size], Tensor]:
    """The first pictures of a source, prepared for a size."""
    try:
        images = open_reported(source, config)
    except DataError as error:
        hint = "; --data SRC takes other pictures for the comparison" if source == "digits" else ""
        raise DataError(f"{error}{hint}") from error
    count = max(BATCHES)
    if len(images) < count:
        raise DataError(f"data source {source!r} has {len(images)} pictures; the comparison takes {count}")

    def load(size: Size) -> Tensor:
        sized = seen | {"input_size": (seen["input_size"][0], *size)}
        batches = map(readable, eval_loader(images, sized, batch_size=count))
        return next(itertools.islice(batches, 1)).images

    return load


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
        data_config=info.data_config,
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
