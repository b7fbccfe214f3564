"""`localvit export`: a trained model for another engine, checked against the original."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated, Literal

import tyro

from localvit.cli.arguments import model_arguments, one_line_errors

if TYPE_CHECKING:
    from localvit.export import Parity


@dataclass(frozen=True, kw_only=True)
class Options:
    """Write a model for ONNX Runtime, OpenVINO or torch.export, in float32, for any batch size.

    The file is compared with the model on random and real images before it is renamed to FILE. If they
    differ, there is no FILE, and the exit code is 1. The file contains preprocessing and class names, so that
    localvit predict --checkpoint FILE works. Needs pip install 'localvit[export]'.

    Example: localvit export runs/digits --output digits.onnx
    """

    model: Annotated[tyro.conf.Positional[str], tyro.conf.arg(metavar="MODEL")]
    """a run's folder, a local-dir:FOLDER, or a timm name with published weights"""
    format: Literal["onnx", "openvino", "torch"] = "onnx"
    """onnx: one .onnx file; openvino: .xml and .bin; torch: a .pt2 file of torch.export"""
    output: Annotated[str, tyro.conf.arg(metavar="FILE")]
    """new file, with the suffix of the format"""
    dynamic_size: tyro.conf.FlagCreatePairsOff[bool] = False
    """(rare) make the file accept other image sizes, if the model does (--set dynamic_img_size=true)"""
    set: Annotated[tyro.conf.UseAppendAction[tuple[str, ...]], tyro.conf.arg(metavar="KEY=VALUE")] = ()
    """(rare) constructor argument of the model, e.g. dynamic_img_size=true"""
    random_weights: tyro.conf.FlagCreatePairsOff[bool] = False
    """(rare) export a timm name with random weights, e.g. to measure speed"""
    data: Annotated[str, tyro.conf.arg(metavar="SRC")] = "digits"
    """(rare) real images for the comparison (as for train), of which three are used"""
    data_root: Annotated[str | None, tyro.conf.arg(metavar="FOLDER")] = None
    """(rare) folder of timm's named data sets"""
    tolerance: Annotated[float, tyro.conf.arg(metavar="RATIO")] = 1e-4
    """(rare) accepted difference, relative to the largest logit"""
    overwrite: tyro.conf.FlagCreatePairsOff[bool] = False
    """replace FILE"""


def run(options: Options) -> int:
    """Export; return 0 if FILE was written."""
    from localvit.data import DataConfig

    with one_line_errors():
        from localvit.export import export_checkpoint

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
    print(f"{'inputs':<8}{'batch':>6}{'size':>11}{'difference':>13}{'largest logit':>15}{'relative':>10}")
    for case in parity.cases:
        size = "x".join(map(str, case.size))
        print(
            f"{case.inputs:<8}{case.batch:>6}{size:>11}{case.difference:>13.2e}{case.scale:>15.4g}"
            f"{case.relative:>10.1e}"
        )
    largest = max(case.difference for case in parity.cases)
    print(
        f"{options.output}: largest difference {largest:.2e}, {parity.worst.relative:.1e} of the largest "
        f"logit (accepted {options.tolerance:.0e})"
    )
