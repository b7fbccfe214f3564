"""Export with `torch.export`: a graph without Python, and its `.pt2` file."""

from __future__ import annotations

import io
from contextlib import suppress
from pathlib import Path
from typing import Any

import torch
from timm.models.swin_transformer import SwinTransformer
from torch import nn
from torch.export import Dim, ExportedProgram
from torch.fx import GraphModule

from localvit.acceleration import fuse
from localvit.engines import KEY, ExportInfo
from localvit.errors import ConfigError, first_line


def size_step(model: nn.Module) -> int:
    """Return the step of image sizes in pixels: the reduction of the deepest feature map.

    Raises:
        ConfigError: if the model does not report it, or is a Swin transformer.
    """
    if isinstance(model, SwinTransformer):
        raise ConfigError(
            f"--dynamic-size: {type(model).__name__} does not support it, because the masks of its windows "
            "depend on the size; export a file for each size with --set 'img_size=[HEIGHT,WIDTH]'"
        )
    features = getattr(model, "feature_info", None)
    try:
        return int(features[-1]["reduction"])  # type: ignore[index]
    except (TypeError, KeyError, IndexError) as error:
        raise ConfigError(
            f"--dynamic-size: {type(model).__name__} does not report its reduction; leave the option out"
        ) from error


def check_sizes(model: nn.Module, info: ExportInfo) -> None:
    """Run the model once at every size of the export.

    Raises:
        ConfigError: if it refuses a size, or does not return (batch, classes).
    """
    for height, width in info.sizes:
        try:
            with torch.no_grad():
                output = model(torch.zeros(1, info.input_size[0], height, width))
        except Exception as error:  # assertions of timm, shapes that do not fit in torch
            at = f"model {info.architecture!r} fails on images of {height}x{width}: {first_line(error)}"
            if info.size_step is None:
                raise ConfigError(at) from error
            raise ConfigError(
                f"--dynamic-size: {at}; build the model for any size with --set dynamic_img_size=true "
                "(plain ViT, DeiT, PVT, T2T-ViT)"
            ) from error
        if not isinstance(output, torch.Tensor) or output.shape != (1, info.num_classes):
            found = tuple(output.shape) if isinstance(output, torch.Tensor) else type(output).__name__
            raise ConfigError(f"model {info.architecture!r} returns {found}; use one with (batch, classes)")


def export_program(model: nn.Module, info: ExportInfo) -> ExportedProgram:
    """Return the graph of `model` for any batch size and, with `info.size_step`, any multiple of that size.

    It is the graph of the fused form (`localvit.fuse`), if there is one: its point-wise convolutions are
    linear layers on tokens, so engines do not convert layouts.

    Args:
        model: Model on the CPU, in evaluation mode.
        info: Metadata with the sizes.
    """
    shape: dict[int, Any] = {0: Dim("batch")}
    if info.size_step is not None:
        shape |= {2: info.size_step * Dim("height"), 3: info.size_step * Dim("width")}
    # Two images: torch.export treats 1 as a constant. If sizes are free, the larger, non-square one: a model
    # may take a shortcut at its own size, and equal sides would become one symbol.
    images = torch.zeros(2, info.input_size[0], *info.sizes[-1])
    with torch.no_grad():
        with suppress(ValueError):  # nothing in it has a fused form
            model = fuse(model)
        program = torch.export.export(model, (images,), dynamic_shapes=(shape,), strict=False)
    _forget_paths(program)
    return program


def _forget_paths(program: ExportedProgram) -> None:
    """Remove stack traces from the graph: they name files and folders of this machine."""
    for module in program.graph_module.modules():
        for node in module.graph.nodes if isinstance(module, GraphModule) else ():
            node.meta.pop("stack_trace", None)


def write_program(program: ExportedProgram, path: Path, info: ExportInfo) -> None:
    """Write a `.pt2` for `torch.export.load`.

    Reading one may run code of its author: torch unpickles parts of it and evaluates expressions in it. As
    with any pickle, load only files that you trust.
    """
    content = io.BytesIO()  # torch ends the process if it cannot write a file
    torch.export.save(program, content, extra_files={KEY: info.to_json()})
    path.write_bytes(content.getbuffer())
