"""Any model, opened for use: a run's folder, an exported folder or file, a hub reference, or a timm name."""

from __future__ import annotations

import dataclasses
import hashlib
import os
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import timm
import torch
from timm.data import ImageNetInfo, infer_imagenet_subset
from torch import Tensor, nn

from localvit.acceleration import fuse as fuse_module
from localvit.config import TrainConfig
from localvit.data import DataConfig, Preprocessing
from localvit.engines import ENGINE_NAMES, Engine, EngineKind, open_engine, pick_engine
from localvit.errors import ConfigError, one_line, unknown
from localvit.models import add_to_digest, preprocessing_for
from localvit.runs import read_run
from localvit.runtime import pick_device

PLAIN = "PyTorch"
FUSED = "PyTorch, fused"

_PREFIXES = ("local-dir:", "hf-hub:", "hf_hub:")
_UNUSABLE = (OSError, RuntimeError, ValueError, TypeError, KeyError, AssertionError)


@dataclass(frozen=True, kw_only=True)
class OpenModel:
    """Model ready for use.

    Attributes:
        source: Name or path that it was opened by.
        model: From images (B, C, H, W) to logits (B, classes), in evaluation mode.
        preprocessing: Preparation of its images.
        labels: Label of each output as the training data named it (a folder's name), if known.
        descriptions: Name that a person gives to each label, if known; otherwise as `labels`.
        run: Configuration of the training run, if the model is in a run's folder.
        form: What computes, in words: `PyTorch`, `PyTorch, fused`, `ONNX Runtime`...
    """

    source: str
    model: nn.Module
    preprocessing: Preprocessing
    labels: tuple[str, ...] | None = None
    descriptions: tuple[str, ...] | None = None
    run: TrainConfig | None = None
    form: str = PLAIN

    @property
    def num_classes(self) -> int:
        """Number of outputs."""
        return int(self.model.num_classes)  # type: ignore[arg-type]

    @property
    def device(self) -> torch.device:
        """Device of the weights."""
        return next(iter(self.model.state_dict().values())).device

    def require_pytorch(self, verb: str) -> None:
        """Refuse an exported file.

        Raises:
            ConfigError: naming it, for `verb`.
        """
        if isinstance(self.model, EngineModel):
            raise ConfigError(
                f"{verb}: {self.source!r} is an exported file; accepted is the model that it was made from: "
                "a run's folder, local-dir:FOLDER or a timm name"
            )

    def fingerprint(self) -> str:
        """Return a short digest of weights, preprocessing and names of classes."""
        digest = hashlib.sha256(repr((self.preprocessing, self.descriptions)).encode(errors="replace"))
        add_to_digest(digest, self.model.state_dict())
        return digest.hexdigest()[:16]


def open_model(
    source: str | os.PathLike[str],
    device: str | torch.device = "auto",
    *,
    engine: EngineKind | None = None,
    fuse: bool = False,
    args: Mapping[str, Any] | None = None,
    random_weights: bool = False,
) -> OpenModel:
    """Open a model for use, wherever it is.

    Args:
        source: A run's folder (its `best/` is taken), a folder with `config.json` and weights, a `local-dir:`
            or `hf-hub:` reference, a timm name with published weights, or a file of `localvit export`.
        device: As in `TrainConfig`; exported files run on the CPU.
        engine: What runs an exported file; `None`: ONNX Runtime for `.onnx`, OpenVINO for `.xml`. A `.pt2`
            needs `"torch"`, because reading one may run code of its maker.
        fuse: Replace the model by its fused form, where it has one (see `fused`).
        args: Constructor arguments in which the model is to differ from what is saved.
        random_weights: `source` is a timm name, and its published weights are not wanted.

    Raises:
        ConfigError: if there is no such model or it cannot be opened.
    """
    source = os.fspath(source)
    engine = engine or pick_engine(source)
    if engine is not None:
        return _open_file(source, engine, str(device), args)
    place = pick_device(str(device))
    if random_weights and not timm.is_model(source):
        raise ConfigError(f"random weights need the name of a model, not {source!r}")
    name, run = (source, None) if random_weights else _locate(source)
    try:
        model = timm.create_model(name, pretrained=not random_weights, **(args or {})).eval().to(place)
    except _UNUSABLE as error:
        raise ConfigError(f"model {source!r} cannot be loaded: {one_line(error)}") from error
    labels, descriptions = (None, None) if random_weights else _class_names(model)
    opened = OpenModel(
        source=source,
        model=model,
        preprocessing=preprocessing_for(model, DataConfig()),
        labels=labels,
        descriptions=descriptions,
        run=run,
    )
    return fused(opened) if fuse else opened


def fused(opened: OpenModel) -> OpenModel:
    """Return the model in its fused form (`localvit.fuse`); `form` says so, or why it stays plain.

    `opened` must not be used afterwards. An exported file is returned as it is.
    """
    if isinstance(opened.model, EngineModel):
        return opened
    kinds = [type(module) for module in opened.model.modules()]
    try:
        model = fuse_module(opened.model)
    except ValueError as error:
        return replace(opened, form=f"{PLAIN}, not fused: {one_line(error).partition(' (')[0]}")
    if [type(module) for module in model.modules()] == kinds:
        return replace(opened, form=f"{PLAIN}, not fused: LOCALVIT_KERNELS=plain")
    return replace(opened, model=model, form=FUSED)


class EngineModel(nn.Module):
    """Exported file in the place of a model. Its state is the digest of its files, which tells two apart.

    Args:
        engine: What computes.
        file: Where it was read.
    """

    digest: Tensor

    def __init__(self, engine: Engine, file: Path) -> None:
        super().__init__()
        self.engine, self.num_classes = engine, engine.info.num_classes
        # As timm's models have it: evaluation derives departures from the preprocessing from it.
        self.pretrained_cfg = dataclasses.asdict(engine.info)
        digest = hashlib.sha256()
        for part in (file, file.with_suffix(".bin")) if file.suffix == ".xml" else (file,):
            digest.update(part.read_bytes())
        self.register_buffer("digest", torch.frombuffer(bytearray(digest.digest()), dtype=torch.uint8))

    def forward(self, images: Tensor) -> Tensor:
        """Compute logits (B, classes) of images (B, C, H, W)."""
        return self.engine(images)


def _open_file(source: str, engine: EngineKind, device: str, args: Mapping[str, Any] | None) -> OpenModel:
    """Open a file of `localvit export`."""
    if device not in ("auto", "cpu"):
        raise ConfigError(f"device={device!r}: exported files run on the CPU; use 'cpu' or 'auto'")
    if args:
        raise ConfigError(
            f"args={dict(args)}: {source!r} is an exported file, which takes none; export it anew"
        )
    opened = open_engine(engine, source)
    info = opened.info
    return OpenModel(
        source=source,
        model=EngineModel(opened, Path(source)).eval(),
        preprocessing=info,
        labels=info.labels,
        descriptions=info.descriptions,
        form=ENGINE_NAMES[engine],
    )


def _locate(source: str) -> tuple[str, TrainConfig | None]:
    """Return the name for timm, and the configuration of the run that the source belongs to."""
    folder = Path(source)
    if folder.is_dir():
        for model, run in ((folder / "best", folder), (folder, folder.parent)):
            if (model / "config.json").is_file():
                known = all((run / name).is_file() for name in ("config.yaml", "status.json"))
                return f"local-dir:{model}", read_run(run).config if known else None
        raise ConfigError(f"model {source!r} holds neither best/config.json nor config.json")
    if source.startswith(_PREFIXES):
        return source, None
    if timm.is_model(source):
        return source, None
    if os.sep in source or source.startswith("."):
        raise ConfigError(f"model {source!r}: there is no such folder")
    raise unknown("model", source, timm.list_models())


def _class_names(model: nn.Module) -> tuple[tuple[str, ...] | None, tuple[str, ...] | None]:
    """Return labels and descriptions of the outputs, as far as they are known."""
    names = model.pretrained_cfg.get("label_names")  # type: ignore[union-attr, operator]
    if names and len(names) == model.num_classes:
        return tuple(names), tuple(names)
    subset = infer_imagenet_subset(model)  # by the number of outputs: 1000 are those of ILSVRC-2012
    if subset is not None:
        info = ImageNetInfo(subset)
        labels = tuple(info.label_names())
        return labels, tuple(info.label_name_to_description(label) for label in labels)
    return None, None
