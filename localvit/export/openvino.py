"""Export to OpenVINO's format, from the ONNX graph: `NAME.xml` and its weights `NAME.bin`."""

from __future__ import annotations

import tempfile
from pathlib import Path

from torch.export import ExportedProgram

from localvit.engines import KEY, ExportInfo
from localvit.export.onnx import write_onnx


def write_openvino(program: ExportedProgram, path: Path, info: ExportInfo) -> None:
    """Write the two files; the names of input and output are those of the ONNX file.

    Weights stay float32: OpenVINO's default is float16, which fails the parity check.
    `openvino.convert_model` is not used: it reports its use over the network, and lacks the name and size of
    the input of a torch graph.
    """
    import openvino

    with tempfile.TemporaryDirectory(dir=path.parent) as folder:
        graph = Path(folder) / "model.onnx"
        write_onnx(program, graph, info)
        model = openvino.Core().read_model(graph)
        model.set_rt_info(info.to_json(), KEY)
        openvino.save_model(model, path, compress_to_fp16=False)
