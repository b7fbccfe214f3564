"""Export of a trained model, checked on real images."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from torch import Tensor

from localvit.data import DataConfig, DataError, Preprocessing, eval_loader, open_test_split, readable
from localvit.engines import ExportInfo, Size
from localvit.export.parity import BATCHES, TOLERANCE, Parity
from localvit.export.write import FormatName, check_export, export_model
from localvit.inference import open_model


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
    """Write a model for another engine, with preprocessing and class names, and check it.

    Args:
        source: As `open_model`, except exported files.
        file: As `export_model`, and so are `dynamic_size`, `overwrite`, `tolerance` and `threads`.
        format: `"onnx"`, `"openvino"` or `"torch"`.
        args: Constructor arguments that override those of the model, e.g. `{"img_size": 192}`.
        random_weights: Use random weights for the timm name `source`, e.g. to measure speed.
        data: Source of the real images for the comparison; the first three are used.
        config: `root` and names of splits.

    Raises:
        ConfigError, DataError: if the model, the images or the file cannot be used.
        ExportFailed, ParityError: as `localvit.export.export_model`.
    """
    check_export(file, format, overwrite=overwrite)
    opened = open_model(source, "cpu", args=args, random_weights=random_weights)
    opened.require_pytorch("export")
    info = ExportInfo.of(
        opened.preprocessing,
        architecture=str(opened.model.pretrained_cfg.get("architecture", source)),  # type: ignore[union-attr, operator]
        num_classes=opened.num_classes,
        labels=opened.labels,
        descriptions=opened.descriptions,
    )
    return export_model(
        opened.model,
        file,
        format,
        info,
        first_images(data, config or DataConfig(), opened.preprocessing),
        dynamic_size=dynamic_size,
        overwrite=overwrite,
        tolerance=tolerance,
        threads=threads,
    )


def first_images(source: str, config: DataConfig, preprocessing: Preprocessing) -> Callable[[Size], Tensor]:
    """Return a function that loads the first images of a source, prepared for a size."""
    try:
        images = open_test_split(source, config)
    except DataError as error:
        hint = "; --data SRC takes other images for the comparison" if source == "digits" else ""
        raise DataError(f"{error}{hint}") from error
    count = max(BATCHES)
    if len(images) < count:
        raise DataError(f"data source {source!r} has {len(images)} images; use one with at least {count}")

    def load(size: Size) -> Tensor:
        sized = replace(preprocessing, input_size=(preprocessing.input_size[0], *size))
        return readable(next(iter(eval_loader(images, sized, batch_size=count)))).images

    return load
