"""Export of a model to a file, which is kept only if it computes what the model does."""

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

from localvit.atomic import WriteFailed, sync, temporary_prefix
from localvit.engines import EngineKind, ExportInfo, Size, check_packages, open_engine
from localvit.errors import ConfigError, first_line
from localvit.export.onnx import check_onnx, write_onnx
from localvit.export.openvino import write_openvino
from localvit.export.parity import TOLERANCE, Parity, ParityError, check_parity, random_inputs, real_inputs
from localvit.export.program import check_sizes, export_program, size_step, write_program

FormatName = Literal["onnx", "openvino", "torch"]


@dataclass(frozen=True)
class Format:
    """Row of `FORMATS`.

    Attributes:
        suffixes: Suffixes of its files; the first is of the one that is named, which is put in place last.
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


class ExportFailed(RuntimeError):
    """Failure of the exporter or of the engine."""


def check_export(file: str | Path, format: FormatName, *, overwrite: bool = False) -> None:
    """Refuse what cannot be written, before any work.

    Raises:
        ConfigError: for an unknown format, missing packages, another suffix than the format's, a file that
            exists (unless `overwrite`), or a folder that cannot be written.
    """
    if format not in FORMATS:
        raise ConfigError(f"format={format!r} is not accepted; use one of {', '.join(get_args(FormatName))}")
    form, path = FORMATS[format], Path(file)
    if path.suffix != form.suffixes[0]:
        raise ConfigError(
            f"output={str(file)!r} is not accepted for format {format}; use the suffix {form.suffixes[0]}"
        )
    for suffix in form.suffixes:
        other = path.with_suffix(suffix)
        if other.is_dir() or (os.path.lexists(other) and not overwrite):
            raise ConfigError(
                f"output: {str(other)!r} exists already; choose another name, or replace it by --overwrite"
            )
    if not path.parent.is_dir() or not os.access(path.parent, os.W_OK):
        raise ConfigError(f"output={str(file)!r}: {str(path.parent)!r} is not a writable folder")
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
    """Write a model for another engine, in single precision, for any batch.

    A temporary file beside `file` is opened by the engine of its format and compared with the model in
    evaluation mode; only then it gets its name. The model is copied, not changed.

    Args:
        model: Maps images (B, C, H, W) to logits (B, classes).
        file: `.onnx`, `.xml` (and a `.bin` beside it) or `.pt2`.
        format: Its format.
        info: Metadata of the file.
        real: Prepared images for the comparison, at least three, of a given (height, width).
        dynamic_size: Accept any size of image; the model must take more than one.
        overwrite: Replace a file that is there.
        tolerance: See `TOLERANCE`.
        threads: Threads of the engine that is compared.

    Raises:
        ConfigError: as `check_export`; if the model does not take the sizes or `tolerance` is not positive.
        ExportFailed: if it cannot be exported or the engine cannot run it.
        ParityError: if the file computes something else. There is no file then.
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
    with tempfile.TemporaryDirectory(prefix=temporary_prefix(path.name), dir=path.parent) as folder:
        new = Path(folder) / path.name
        try:
            form.write(export_program(model, info), new, info)
            parity = check_parity(model, open_engine(form.engine, new, threads), inputs, tolerance)
        except OSError as error:
            raise WriteFailed(
                f"{str(file)!r} cannot be written: {first_line(error)}; make room or name another place"
            ) from error
        except Exception as error:  # exporters and engines raise exceptions of their own, pages long
            raise ExportFailed(f"{info.architecture} as {format}: {first_line(error)}") from error
        if not parity.passed:
            raise ParityError(str(file), parity)
        _into_place(new, path, form.suffixes)
    return parity


def _into_place(new: Path, path: Path, suffixes: tuple[str, ...]) -> None:
    """Rename the files, so that at every instant the named one is absent or belongs to the others."""
    if len(suffixes) > 1:
        path.unlink(missing_ok=True)
    for suffix in reversed(suffixes):
        sync(new.with_suffix(suffix))
        os.replace(new.with_suffix(suffix), path.with_suffix(suffix))
    sync(path.parent)
