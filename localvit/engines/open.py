"""Exported files, opened by the engine that runs them: images in, logits out."""

from __future__ import annotations

import importlib.util
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, get_args

import torch
from torch import Tensor

from localvit.engines.info import KEY, ExportInfo
from localvit.errors import ConfigError, first_line

EngineKind = Literal["torch", "onnxruntime", "openvino"]
"""Engine that can run a file."""

ENGINE_NAMES: dict[EngineKind, str] = {
    "torch": "torch.export",
    "onnxruntime": "ONNX Runtime",
    "openvino": "OpenVINO",
}
"""Engine -> readable name."""

READS: dict[EngineKind, tuple[str, ...]] = {
    "torch": (".pt2",),
    "onnxruntime": (".onnx",),
    "openvino": (".xml", ".onnx"),
}
"""Engine -> suffixes that it reads."""

_DEFAULTS: dict[str, EngineKind] = {".onnx": "onnxruntime", ".xml": "openvino"}
"""Suffix -> default engine."""

Shape = tuple[int | None, ...]
"""Sides of a tensor; `None` where any number is accepted."""


@dataclass(frozen=True)
class ExportedModel:
    """Exported model on the CPU, in float32.

    Attributes:
        info: Preprocessing and outputs, from the file.
        input_shape: (batch, C, H, W).
        output_shape: (batch, classes).
        compute: Function from float32 images to logits.
    """

    info: ExportInfo
    input_shape: Shape
    output_shape: Shape
    compute: Callable[[Tensor], Tensor]

    def __call__(self, images: Tensor) -> Tensor:
        """Compute logits (B, classes) of normalised float32 images (B, C, H, W)."""
        return self.compute(images)


def pick_engine(file: str) -> EngineKind | None:
    """Return the engine of an exported file, by its suffix; `None` for anything else.

    Raises:
        ConfigError: for a `.pt2`. Reading one may run code of its author, so its engine must be named.
    """
    suffix = Path(file).suffix
    if suffix in (".pt2", *_DEFAULTS) and Path(file).is_dir():
        return None
    if suffix == ".pt2":
        raise ConfigError(
            f"{file!r}: reading a .pt2 may run its author's code; add --engine torch if you trust it"
        )
    return _DEFAULTS.get(suffix)


def open_engine(kind: EngineKind, file: str | Path, threads: int | None = None) -> ExportedModel:
    """Open an exported file.

    Args:
        kind: The engine. Name `"torch"` only for files that you trust: see `write_program`.
        file: A file of `localvit export`.
        threads: Threads of the engine; `None`: its default. With `"torch"` they are those of the process.

    Raises:
        ConfigError: if the engine is not installed or does not read such files, or the file does not exist,
            is damaged or was not written by `localvit export`.
    """
    if kind not in READS:
        raise ConfigError(f"engine={kind!r} is not accepted; use {', '.join(get_args(EngineKind))}")
    file = str(file)
    if Path(file).suffix not in READS[kind]:
        raise ConfigError(f"{file!r} is not accepted for engine={kind!r}; use {' or '.join(READS[kind])}")
    if threads is not None and threads < 1:
        raise ConfigError(f"threads={threads} is not accepted; use at least 1")
    check_packages(f"engine={kind!r}", *([] if kind == "torch" else [kind]))
    if not Path(file).is_file():
        raise ConfigError(f"{file!r} does not exist; check its name")
    open_kind = {"torch": _open_torch, "onnxruntime": _open_onnxruntime, "openvino": _open_openvino}[kind]
    try:
        engine = open_kind(file, threads)
    except ConfigError:
        raise
    except Exception as error:  # each engine has exceptions of its own for files that it cannot read
        raise ConfigError(
            f"{file!r} cannot be opened with {kind}: {first_line(error)}; export it again"
        ) from error
    for what, said, taken in (
        ("input_size", engine.info.input_size, engine.input_shape[1:]),
        ("num_classes", (engine.info.num_classes,), engine.output_shape[1:]),
    ):
        if len(said) != len(taken) or any(b not in (None, a) for a, b in zip(said, taken, strict=True)):
            raise ConfigError(
                f"{file!r}: {what} is {said} in its metadata but {taken} in its model; export it again"
            )
    return engine


def check_packages(what: str, *modules: str) -> None:
    """Refuse to start without packages of the extra `export`.

    Raises:
        ConfigError: naming them and the command that installs them.
    """
    missing = [name for name in modules if importlib.util.find_spec(name) is None]
    if missing:
        raise ConfigError(f"{what} needs {', '.join(missing)}; run pip install 'localvit[export]'")


def _open_torch(file: str, threads: int | None) -> ExportedModel:
    extra = {KEY: ""}
    program = torch.export.load(file, extra_files=extra)
    info = ExportInfo.from_json(extra[KEY], file)
    if threads is not None:
        torch.set_num_threads(threads)
    module = program.module()
    nodes = {node.name: node for node in program.graph.nodes}
    (entry,), (result,) = program.graph_signature.user_inputs, program.graph_signature.user_outputs
    taken, given = (_numbers(nodes[str(name)].meta["val"].shape) for name in (entry, result))

    def compute(images: Tensor) -> Tensor:
        with torch.no_grad():
            return module(images)

    return ExportedModel(info, taken, given, compute)


def _open_onnxruntime(file: str, threads: int | None) -> ExportedModel:
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = threads or 0  # 0: its default
    options.log_severity_level = 3  # errors only
    session = onnxruntime.InferenceSession(file, options, providers=["CPUExecutionProvider"])
    info = ExportInfo.from_json(session.get_modelmeta().custom_metadata_map.get(KEY, ""), file)
    (entry,), (result,) = session.get_inputs(), session.get_outputs()

    def compute(images: Tensor) -> Tensor:
        return torch.from_numpy(session.run([result.name], {entry.name: images.numpy()})[0])

    return ExportedModel(info, _numbers(entry.shape), _numbers(result.shape), compute)


def _open_openvino(file: str, threads: int | None) -> ExportedModel:
    import openvino

    # On processors with bfloat16, OpenVINO would use it by default.
    settings: dict[str, Any] = {"INFERENCE_PRECISION_HINT": "f32"}
    if threads is not None:
        settings["INFERENCE_NUM_THREADS"] = threads
    core = openvino.Core()
    model = core.read_model(file)
    place = [KEY] if model.has_rt_info(KEY) else ["framework", KEY]  # place of an ONNX file's metadata
    text = model.get_rt_info(place).astype(str) if model.has_rt_info(place) else ""
    info = ExportInfo.from_json(text, file)
    compiled = core.compile_model(model, "CPU", settings)
    entry, result = compiled.input(0), compiled.output(0)

    def compute(images: Tensor) -> Tensor:
        return torch.from_numpy(compiled(images.numpy(), share_inputs=True)[result].copy())

    taken, given = (
        tuple(side.get_length() if side.is_static else None for side in port.partial_shape)
        for port in (entry, result)
    )
    return ExportedModel(info, taken, given, compute)


def _numbers(shape: Any) -> Shape:
    """Return the sides of a shape; symbols and names become `None`."""
    return tuple(side if isinstance(side, int) else None for side in shape)
