"""Export of a model to a file that exists only if it passes the parity check."""

from __future__ import annotations

import copy
import dataclasses
import os
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, get_args

from torch import Tensor, nn
from torch.export import ExportedProgram

from localvit.atomic import check_folder_of, sync, temporary_prefix, writing
from localvit.engines import EngineKind, ExportInfo, Size, check_packages, open_engine
from localvit.errors import ConfigError, Failed, first_line
from localvit.export.onnx import check_onnx, write_onnx
from localvit.export.openvino import write_openvino
from localvit.export.parity import TOLERANCE, Parity, ParityError, check_parity, random_inputs, real_inputs
from localvit.export.program import check_sizes, export_program, size_step, write_program

FormatName = Literal["onnx", "openvino", "torch"]


@dataclass(frozen=True)
class Format:
    """Row of `FORMATS`.

    Attributes:
        suffixes: Suffixes of its files; the first one is that of the named file, which is moved last.
        packages: Packages that write and check it.
        engine: Engine that checks it.
        write: Function that writes a graph to a path.
    """

    suffixes: tuple[str, ...]
    packages: tuple[str, ...]
    engine: EngineKind
    write: Callable[[ExportedProgram, Path, ExportInfo], None]


FORMATS: dict[FormatName, Format] = {
    "onnx": Format((".onnx",), ("onnx", "onnxscript", "onnxruntime"), "onnxruntime", write_onnx),
    "openvino": Format((".xml", ".bin"), ("onnx", "onnxscript", "openvino"), "openvino", write_openvino),
    "torch": Format((".pt2",), (), "torch", write_program),
}


class ExportFailed(Failed):
    """Failure of the exporter or the engine with this model."""


def check_export(file: str | Path, format: FormatName, *, overwrite: bool = False) -> None:
    """Refuse a file that cannot be written, before any work.

    Raises:
        ConfigError: for an unknown format, missing packages, a suffix other than the format's, a file that
            exists (unless `overwrite`), or a folder that cannot be written.
    """
    if format not in FORMATS:
        raise ConfigError(f"format={format!r} is not accepted; use {', '.join(get_args(FormatName))}")
    form, path = FORMATS[format], Path(file)
    if path.suffix != form.suffixes[0]:
        raise ConfigError(f"output={str(file)!r} is not accepted; use a name that ends in {form.suffixes[0]}")
    for suffix in form.suffixes:
        other = path.with_suffix(suffix)
        if other.is_dir() or (os.path.lexists(other) and not overwrite):
            raise ConfigError(f"output: {str(other)!r} exists; choose another name, or add --overwrite")
    check_folder_of(path, "output=")
    check_packages(f"format {format!r}", *form.packages)


def export_model(
    model: nn.Module,
    file: str | Path,
    format: FormatName,
    info: ExportInfo,
    real: Callable[[Size], Tensor],
    *,
    dynamic_size: bool = False,
    overwrite: bool = False,
    tolerance: float = TOLERANCE,
    threads: int | None = None,
) -> Parity:
    """Write a model for another engine, in float32, for any batch size.

    The file is written under a temporary name, opened by the engine of its format, compared with the model in
    evaluation mode, and only then renamed to `file`. The model is copied and does not change.

    Args:
        model: Model from images (B, C, H, W) to logits (B, classes).
        file: New `.onnx`, `.xml` (and a `.bin` beside it) or `.pt2`.
        format: Format of the file.
        info: Metadata of the file.
        real: Function from (height, width) to at least three preprocessed images for the comparison.
        dynamic_size: Export for any size; the model must accept several.
        overwrite: Replace an existing file.
        tolerance: See `TOLERANCE`.
        threads: Threads of the engine.

    Raises:
        ConfigError: as `check_export`; if the model refuses a size or `tolerance` is not positive.
        ExportFailed: if the model cannot be traced or the engine cannot run it.
        ParityError: if the file computes something else; it is deleted.
    """
    check_export(file, format, overwrite=overwrite)
    if not 0 < tolerance < float("inf"):
        raise ConfigError(f"tolerance={tolerance} is not accepted; use a positive number")
    form, path = FORMATS[format], Path(file)
    model = copy.deepcopy(model).cpu().float().eval()
    if "onnx" in form.packages:
        check_onnx(sum(tensor.nbytes for tensor in model.state_dict().values()))
    info = dataclasses.replace(info, size_step=size_step(model) if dynamic_size else None)
    check_sizes(model, info)
    inputs = [*random_inputs(info.input_size[0], info.sizes), *real_inputs(real, info.sizes)]
    with (
        writing(file),
        tempfile.TemporaryDirectory(prefix=temporary_prefix(path.name), dir=path.parent) as folder,
    ):
        new = Path(folder) / path.name
        try:
            form.write(export_program(model, info), new, info)
            parity = check_parity(model, open_engine(form.engine, new, threads), inputs, tolerance)
        except OSError:
            raise
        except Exception as error:  # exporters and engines raise exceptions of their own
            raise ExportFailed(f"{info.architecture} as {format}: {first_line(error)}") from error
        if not parity.passed:
            raise ParityError(str(file), parity)
        _into_place(new, path, form.suffixes)
    return parity


def _into_place(new: Path, path: Path, suffixes: tuple[str, ...]) -> None:
    """Rename files so that the named one is always absent or consistent with the others."""
    if len(suffixes) > 1:
        path.unlink(missing_ok=True)
    for suffix in reversed(suffixes):
        sync(new.with_suffix(suffix))
        os.replace(new.with_suffix(suffix), path.with_suffix(suffix))
    sync(path.parent)
