"""Models on engines: functions from images to logits."""

from __future__ import annotations

import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Literal, get_args

import torch
from torch import Tensor, nn

from localvit.acceleration import fuse
from localvit.config import Precision
from localvit.engines import ENGINE_NAMES, ExportInfo, check_packages, open_engine
from localvit.errors import ConfigError
from localvit.export import FORMATS, FormatName, export_model

EngineName = Literal["eager", "fused", "compile", "onnxruntime", "openvino"]
"""`eager`: the model as built; `fused`: `localvit.fuse`; `compile`: that (in training the model as built),
compiled by `torch.compile`; the others run a file of `localvit.export` on the CPU."""

FORMS: dict[EngineName, str] = {
    "eager": "PyTorch",
    "fused": "PyTorch, fused",
    "compile": "PyTorch, compiled",
    "onnxruntime": ENGINE_NAMES["onnxruntime"],
    "openvino": ENGINE_NAMES["openvino"],
}
"""Engine -> its form in words."""

FILES: dict[str, FormatName] = {"onnxruntime": "onnx", "openvino": "openvino"}
"""Engine of files -> format."""


def check_engine(
    engine: EngineName, device: torch.device, *, train: bool = False, precision: Precision = "fp32"
) -> None:
    """Refuse an engine that cannot be measured, before any work.

    Raises:
        ConfigError: for an unknown engine, one whose packages are missing, one that does not run on `device`
            or in `precision`, or cannot train.
    """
    if engine not in get_args(EngineName):
        raise ConfigError(f"engine={engine!r} is not accepted; use {', '.join(get_args(EngineName))}")
    if train and engine not in ("eager", "compile"):
        raise ConfigError(f"engine={engine!r} is not accepted in training; use 'eager' or 'compile'")
    if precision == "fp16" and device.type == "cpu":
        raise ConfigError("precision='fp16' is not accepted on a CPU; use 'bf16'")
    if engine in FILES:
        if precision != "fp32":
            raise ConfigError(f"precision={precision!r} is not accepted for engine={engine!r}; use 'fp32'")
        if device.type != "cpu":
            raise ConfigError(f"device={str(device)!r} is not accepted for engine={engine!r}; use 'cpu'")
        check_packages(f"engine {engine!r}", *FORMATS[FILES[engine]].packages)


def open_on(
    engine: EngineName, model: nn.Module, info: ExportInfo, device: torch.device
) -> Callable[[Tensor], Tensor]:
    """Return `model` for inference on an engine, with torch's current number of threads.

    Exported files are compared with the model first, on random images, and are deleted once opened.

    Args:
        model: Model in evaluation mode. It is moved to `device`, and otherwise unchanged.
        info: Metadata of the file.

    Raises:
        ConfigError: if nothing in the model has a fast form.
        ExportFailed, ParityError: as `localvit.export.export_model`.
    """
    if engine in FILES:
        return _exported(engine, model, info)
    model = model.to(device).eval()
    if engine == "eager":
        return model
    try:
        return fuse(model, compile=engine == "compile")
    except ValueError as error:
        raise ConfigError(f"engine={engine!r}: {error}; use another engine") from error


def _exported(engine: EngineName, model: nn.Module, info: ExportInfo) -> Callable[[Tensor], Tensor]:
    format, threads = FILES[engine], torch.get_num_threads()
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / f"model{FORMATS[format].suffixes[0]}"
        noise = torch.randn(3, *info.input_size)
        export_model(model, file, format, info, lambda size: noise, threads=threads)
        return open_engine(FORMATS[format].engine, file, threads)
