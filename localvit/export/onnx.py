"""Export to ONNX with torch's exporter."""

from __future__ import annotations

from pathlib import Path

from torch.export import ExportedProgram

from localvit.engines import KEY, ExportInfo
from localvit.errors import ConfigError

OPSET = 20
"""Opset that torch's exporter writes without conversion: the first with GELU. ONNX Runtime reads it since
1.17, OpenVINO since 2024. It is fixed, so that files do not depend on torch's version."""
INPUT, OUTPUT = "images", "logits"
LIMIT = 2**31
"""Maximum size of a protocol buffer, thus of an ONNX file with weights, in bytes."""


def check_onnx(weight_bytes: int) -> None:
    """Refuse a model that does not fit into one file.

    Raises:
        ConfigError: if its weights are too large.
    """
    if weight_bytes >= LIMIT:
        raise ConfigError(
            f"{weight_bytes / 2**30:.1f} GiB of weights exceed ONNX's 2 GiB; use format='torch'"
        )


def write_onnx(program: ExportedProgram, path: Path, info: ExportInfo) -> None:
    """Write one file with weights and, in its `metadata_props`, `info`.

    Input `images` (batch, C, H, W), output `logits` (batch, classes), both float32.
    """
    import torch

    made = torch.onnx.export(
        program,
        dynamo=True,
        opset_version=OPSET,
        input_names=[INPUT],
        output_names=[OUTPUT],
        external_data=False,
        verbose=False,
    )
    assert made is not None
    for node in made.model.graph.all_nodes():
        node.metadata_props.pop("pkg.torch.onnx.stack_trace", None)  # has file names of this machine
    made.model.metadata_props[KEY] = info.to_json()
    made.save(str(path))
