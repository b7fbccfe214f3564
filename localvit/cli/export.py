"""`localvit export`: a trained model for another engine, checked against the original."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated, Literal

import tyro

from localvit.cli.arguments import UsageError, model_arguments, one_line_errors

if TYPE_CHECKING:
    from localvit.export import Parity

_TOLERANCE = 1e-4


@dataclass(frozen=True, kw_only=True)
class Options:
    """Write a model for ONNX Runtime, OpenVINO or torch.export, for any batch, in single precision.

    The file is opened in its engine and compared with the model, on random and on real images, before it
    gets its name; where they differ there is no file, and the exit code is 1. Preprocessing and the names of
    classes are in it: localvit predict --checkpoint FILE images. Needs pip install 'localvit[export]'.
    """

    model: Annotated[tyro.conf.Positional[str], tyro.conf.arg(metavar="MODEL")]
    """a run's folder, a local-dir:FOLDER, or a timm name with published weights"""
    format: Literal["onnx", "openvino", "torch"] = "onnx"
    """onnx: one .onnx; openvino: .xml and .bin; torch: a .pt2 of torch.export"""
    output: Annotated[str | None, tyro.conf.arg(metavar="FILE")] = None
    """where to; its suffix is the format's"""
    dynamic_size: tyro.conf.FlagCreatePairsOff[bool] = False
    """also for other sizes of images; for models that take them (--set dynamic_img_size=true)"""
    set: Annotated[tyro.conf.UseAppendAction[tuple[str, ...]], tyro.conf.arg(metavar="KEY=VALUE")] = ()
    """build the model with another argument, e.g. dynamic_img_size=true"""
    random_weights: tyro.conf.FlagCreatePairsOff[bool] = False
    """MODEL is a timm name and its weights are not wanted: to measure speed"""
    data: Annotated[str, tyro.conf.arg(metavar="SRC")] = "digits"
    """real images for the comparison (as for train); three are taken"""
    data_root: Annotated[str | None, tyro.conf.arg(metavar="FOLDER")] = None
    """where timm's named data sets keep their files"""
    tolerance: Annotated[float, tyro.conf.arg(metavar="RATIO")] = _TOLERANCE
    """accepted difference, relative to the largest logit"""
    overwrite: tyro.conf.FlagCreatePairsOff[bool] = False
    """replace FILE"""


def run(options: Options) -> int:
    """Export; return 0 if FILE was written."""
    from localvit.data import DataConfig

    with one_line_errors():
        from localvit.export import export_checkpoint

        if options.output is None:
            raise UsageError("--output is missing; add --output FILE")
        parity = export_checkpoint(
            options.model,
            options.output,
            options.format,
            args=model_arguments(options.set),
            random_weights=options.random_weights,
            dynamic_size=options.dynamic_size,
            overwrite=options.overwrite,
            data=options.data,
            config=DataConfig(root=options.data_root),
            tolerance=options.tolerance,
        )
    _print(options, parity)
    return 0


def _print(options: Options, parity: Parity) -> None:
    print(f"{'inputs':<8}{'batch':>6}{'size':>11}{'difference':>13}{'largest logit':>15}{'share':>10}")
    for case in parity.cases:
        size = "x".join(map(str, case.size))
        print(
            f"{case.inputs:<8}{case.batch:>6}{size:>11}{case.difference:>13.2e}{case.scale:>15.4g}"
            f"{case.share:>10.1e}"
        )
    largest = max(case.difference for case in parity.cases)
    print(
        f"{options.output}: largest difference {largest:.2e}, {parity.worst.share:.1e} of the largest logit "
        f"(accepted {options.tolerance:.0e})"
    )
