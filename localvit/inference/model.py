"""Opening of models: a run's folder, an exported folder or file, a hub reference, or a timm name."""

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
from safetensors import SafetensorError
from timm.data import ImageNetInfo, infer_imagenet_subset
from torch import Tensor, nn

from localvit.acceleration import fuse as fuse_module
from localvit.config import TrainConfig
from localvit.data import DataConfig, Preprocessing
from localvit.engines import ENGINE_NAMES, EngineKind, ExportedModel, open_engine, pick_engine
from localvit.errors import ConfigError, one_line, unknown
from localvit.imports import do_what_waits
from localvit.models import add_to_digest, check_args, preprocessing_for, why_unreadable
from localvit.runs import read_run
from localvit.runtime import pick_device
from localvit.structure import build, read_json

PLAIN = "PyTorch"
FUSED = "PyTorch, fused"

_PREFIXES = ("local-dir:", "hf-hub:", "hf_hub:")
_UNUSABLE = (
    *(OSError, RuntimeError, ValueError, TypeError, LookupError, AttributeError, AssertionError),
    *(ArithmeticError, EOFError, SafetensorError),
)


@dataclass(frozen=True, kw_only=True)
class OpenModel:
    """Model ready for use.

    Attributes:
        source: Its name or path.
        model: Module from images (B, C, H, W) to logits (B, classes), in evaluation mode.
        preprocessing: Preparation of its images.
        labels: Label of each output as the training data named it (a folder's name), if known.
        descriptions: Readable name of each label, if known; otherwise as `labels`.
        run: Configuration of the training run, if the model is in a run's folder.
        form: Form that computes, in words: `PyTorch`, `PyTorch, fused`, `ONNX Runtime`, ...
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
                f"{verb}: {self.source!r} is an exported file; use the model that it was exported from: "
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
    """Open a model for use.

    Args:
        source: A run's folder (its `best/` is taken), a folder with `config.json` and weights, a `local-dir:`
            or `hf-hub:` reference, a timm name with published weights, or a file of `localvit export`.
        device: As in `TrainConfig`; exported files run on the CPU.
        engine: Engine of an exported file; `None`: ONNX Runtime for `.onnx`, OpenVINO for `.xml`. A `.pt2`
            needs `"torch"`, because reading one may run code of its author.
        fuse: Replace the model by its fused form, where it has one (see `fused`).
        args: Constructor arguments that override the saved ones.
        random_weights: Use random weights for the timm name `source`.

    Raises:
        ConfigError: if the model does not exist or cannot be opened.
    """
    source = os.fspath(source)
    engine = engine or pick_engine(source)
    if engine is not None:
        return _open_file(source, engine, str(device), args)
    place = pick_device(str(device))
    do_what_waits()  # a caller may come here without a door
    if random_weights and not timm.is_model(source):
        raise ConfigError(f"model={source!r} is not accepted with random weights; use a timm name")
    name, run = (source, None) if random_weights else _locate(source)
    try:
        if name.startswith("local-dir:"):
            saved = read_json(dict[str, Any], Path(name.removeprefix("local-dir:")) / "config.json")
            check_args(saved.get("model_args") or {})
        model = timm.create_model(name, pretrained=not random_weights, **(args or {})).eval().to(place)
    except _UNUSABLE as error:
        reason = why_unreadable(name, error)
        remedy = f"leave out {args}, or check its files" if args else "check its files"
        raise ConfigError(f"model {source!r} cannot be loaded: {reason}; {remedy}") from error
    outputs: Any = model.num_classes  # 0: a model without a classifier, which can be timed
    if type(outputs) is not int or outputs < 0:
        raise ConfigError(
            f"model {source!r}: num_classes={outputs!r} is not accepted; use a positive integer"
        )
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
    """Return the model in its fused form (`localvit.fuse`); `form` has the reason if it stays plain.

    `opened` must not be used afterwards. An exported file is returned unchanged.
    """
    if isinstance(opened.model, EngineModel):
        return opened
    kinds = [type(module) for module in opened.model.modules()]
    try:
        model = fuse_module(opened.model)
    except ValueError as error:
        return replace(opened, form=f"{PLAIN}, not fused: {one_line(error).partition(';')[0]}")
    if [type(module) for module in model.modules()] == kinds:
        return replace(opened, form=f"{PLAIN}, not fused: LOCALVIT_KERNELS=plain")
    return replace(opened, model=model, form=FUSED)


class EngineModel(nn.Module):
    """Exported file in place of a model. Its state is the digest of its files, which identifies it.

    Args:
        engine: Opened engine.
        file: File that it runs.
    """

    digest: Tensor

    def __init__(self, engine: ExportedModel, file: Path) -> None:
        super().__init__()
        self.engine, self.num_classes = engine, engine.info.num_classes
        # As in timm's models: evaluation overrides preprocessing relative to it.
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
            f"args={dict(args)}: {source!r} is an exported file, which takes none; export it again"
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


def check_source(source: str) -> None:
    """Refuse a source that `open_model` does not find; exported files are looked for when they are opened.

    Raises:
        ConfigError: naming it, with the nearest names.
    """
    if pick_engine(source) is None:
        do_what_waits()  # a caller may come here without a door
        _locate(source)


def _locate(source: str) -> tuple[str, TrainConfig | None]:
    """Return the name for timm, and the configuration of the run that the source belongs to."""
    folder = Path(source)
    if folder.is_dir():
        for model, run in ((folder / "best", folder), (folder, folder.parent)):
            if (model / "config.json").is_file():
                known = all((run / name).is_file() for name in ("config.yaml", "status.json"))
                return f"local-dir:{model}", read_run(run).config if known else None
        raise ConfigError(f"model {source!r} has no config.json or best/config.json; use a run's folder")
    if source.startswith(_PREFIXES) or timm.is_model(source):
        return source, None
    if folder.exists():
        raise ConfigError(f"model {source!r} is not a file of an exported model; use a folder or such a file")
    if os.sep in source or source.startswith("."):
        raise ConfigError(f"model {source!r} does not exist; use a folder, a file or a timm name")
    raise unknown("model", source, timm.list_models())


def _class_names(model: nn.Module) -> tuple[tuple[str, ...] | None, tuple[str, ...] | None]:
    """Return labels and descriptions of the outputs, as far as they are known.

    ImageNet's are those of a model that names none. Outputs beyond the names were never trained for a class.
    """
    config: Any = model.pretrained_cfg
    outputs = int(model.num_classes)  # type: ignore[arg-type]
    if names := config.get("label_names"):
        names = build(tuple[str, ...], names, "config.json: label_names")
        if outputs != config["num_classes"] or len(names) > outputs:
            return None, None  # a new head
        names = (*names, *(f"output {number}" for number in range(len(names), outputs)))
        return names, names
    subset = infer_imagenet_subset(model)  # by the number of outputs: 1000 are those of ILSVRC-2012
    if subset is not None:
        info = ImageNetInfo(subset)
        labels = tuple(info.label_names())
        return labels, tuple(info.label_name_to_description(label) for label in labels)
    return None, None
