"""Do exported models compute what the originals do? All five architectures of the paper in every format.

    python benchmarks/export_parity.py    # some minutes; writes benchmarks/results/export_<date>.{md,json}

Random weights, and statistics of batch norms that are not those of a new model. A line is added as soon as it
is known, so that what fails leaves the others.
"""

import argparse
import datetime
import json
import tempfile
from importlib import metadata
from pathlib import Path
from typing import Any

import timm
import torch
from torch import nn

import localvit
from localvit.data.config import DataConfig
from localvit.engines.info import ExportInfo
from localvit.engines.open import open_engine
from localvit.errors import first_line
from localvit.export.checkpoint import first_images
from localvit.export.parity import TOLERANCE, Inputs, Parity, check_parity, random_inputs, real_inputs
from localvit.export.program import export_program
from localvit.export.write import FORMATS
from localvit.models.build import preprocessing_for

MODELS = {
    "DeiT": "localvit_tiny_patch16_224",
    "Swin": "localvit_swin_tiny_patch4_window7_224",
    "PVT": "localvit_pvt_tiny",
    "T2T-ViT": "localvit_t2t_vit_7",
    "TNT": "localvit_tnt_tiny_patch16_224",
}
PACKAGES = ("torch", "timm", "onnx", "onnxscript", "onnxruntime", "openvino")


def stirred(name: str) -> nn.Module:
    """With statistics in its batch norms that are not 0 and 1."""
    torch.manual_seed(0)
    model = timm.create_model(name).eval()
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.running_mean.normal_(std=0.1)
            module.running_var.uniform_(0.5, 2)
    return model


def measure(name: str) -> list[dict[str, Any]]:
    """A row for each format."""
    model = stirred(name)
    seen = preprocessing_for(model, DataConfig())
    info = ExportInfo.of(seen, architecture=name, num_classes=model.num_classes)
    load = first_images("digits", DataConfig(), seen)
    inputs = [*random_inputs(info.input_size[0], info.sizes), *real_inputs(load, info.sizes)]
    program = export_program(model, info)
    return [row(name, format, model, program, info, inputs) for format in FORMATS]


def row(
    name: str, format: str, model: nn.Module, program: Any, info: ExportInfo, inputs: list[Inputs]
) -> dict[str, Any]:
    form = FORMATS[format]
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / f"model{form.suffixes[0]}"
        try:
            form.write(program, file, info)
            parity = check_parity(model, open_engine(form.engine, file), inputs)
        except Exception as error:  # what failed is a result too
            return {"model": name, "format": format, "error": first_line(error)}
        size = sum(path.stat().st_size for path in Path(folder).iterdir())
    return {"model": name, "format": format, "bytes": size, **numbers(parity)}


def numbers(parity: Parity) -> dict[str, Any]:
    kinds = {case.inputs for case in parity.cases}
    largest = {kind: max(c.difference for c in parity.cases if c.inputs == kind) for kind in sorted(kinds)}
    return {
        "difference": largest,
        "largest_logit": max(case.scale for case in parity.cases),
        "share": parity.worst.relative,
        "passed": parity.passed,
    }


def line(result: dict[str, Any]) -> str:
    start = f"| `{result['model']}` | {result['format']} "
    if "error" in result:
        return f"{start}| failed: {result['error']} | | | | |"
    difference = result["difference"]
    return (
        f"{start}| {difference['random']:.1e} | {difference['real']:.1e} | {result['largest_logit']:.2f} "
        f"| {result['share']:.1e} | {'yes' if result['passed'] else 'NO'} | {result['bytes'] / 1e6:.1f} |"
    )


def write(path: Path, results: list[dict[str, Any]]) -> None:
    """Markdown for people, JSON for programs."""
    versions = {package: metadata.version(package).partition("+")[0] for package in PACKAGES}
    made = ", ".join(f"{package} {version}" for package, version in versions.items())
    head = [
        "# Parity of exported models",
        "",
        "Largest difference of logits between the file in its engine (torch, ONNX Runtime, OpenVINO) and",
        "eager torch, on a CPU, in single precision, random weights; batches of 1 and 3, random pixels and",
        f"real digits. Accepted is {TOLERANCE:.0e} of the largest logit.",
        "",
        f"localvit {localvit.__version__}, {made}.",
        "",
        "| model | format | random | real | largest logit | share | passed | MB |",
        "|---|---|---:|---:|---:|---:|---|---:|",
    ]
    path.with_suffix(".md").write_text("\n".join([*head, *map(line, results)]) + "\n")
    facts = {"versions": versions, "results": results}
    path.with_suffix(".json").write_text(json.dumps(facts, indent=1) + "\n")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--date", default=datetime.date.today().isoformat())
    date = parser.parse_args().date
    results: list[dict[str, Any]] = []
    for name in MODELS.values():
        results += measure(name)
        write(Path(__file__).parent / "results" / f"export_{date}", results)
        print(*map(line, results[-len(FORMATS) :]), sep="\n", flush=True)


if __name__ == "__main__":
    main()
