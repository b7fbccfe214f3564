"""`localvit bench`: speed of a model on this machine, against another."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated, Literal

import tyro

from localvit.cli.arguments import model_arguments, one_line_errors

if TYPE_CHECKING:
    from localvit.bench import Comparison, Side

EngineName = Literal["eager", "fused", "compile", "onnxruntime", "openvino"]


@dataclass(frozen=True, kw_only=True)
class Options:
    """Time two models alternately, and print their ratio, times, memory and fraction of this machine's peak.

    Numbers are medians and quartiles over the rounds. The peak is the speed of the fastest matrix product,
    timed in the same rounds. Ratios transfer to other machines better than times.

    Example: localvit bench localvit_tiny_patch16_224 --batch 1 --threads 1
    """

    model: Annotated[tyro.conf.Positional[str], tyro.conf.arg(metavar="MODEL")]
    """timm name (random weights) or a run's folder"""
    against: Annotated[str | None, tyro.conf.arg(metavar="NAME")] = None
    """other model; default: the baseline of a localvit model"""
    engine: EngineName | None = None
    """engine of MODEL; default: fused (localvit.fuse) if possible, eager in training; compile (takes minutes)
    also fuses, except in training; the last two need pip install 'localvit[export]'"""
    against_engine: EngineName | None = None
    """(rare) engine of the other model; default: fused if possible, eager in training"""
    fuse: tyro.conf.FlagCreatePairsOff[bool] = True
    """(rare) make eager the default engine"""
    batch: Annotated[int, tyro.conf.arg(metavar="N")] = 8
    """images in a batch"""
    size: Annotated[int | None, tyro.conf.arg(metavar="PX")] = None
    """(rare) height and width of the images; default: each model's own"""
    threads: Annotated[int | None, tyro.conf.arg(metavar="N")] = None
    """CPU threads; default: PyTorch's choice"""
    rounds: Annotated[int, tyro.conf.arg(metavar="N")] = 15
    """(rare) number of rounds"""
    train: tyro.conf.FlagCreatePairsOff[bool] = False
    """time a training step: forward, backward, optimizer"""
    precision: Literal["fp32", "bf16", "fp16"] = "fp32"
    """type of the forward pass under autocast; fp16 needs a GPU"""
    device: str = "auto"
    """auto, cpu, cuda, cuda:1, ..."""
    set: Annotated[tyro.conf.UseAppendAction[tuple[str, ...]], tyro.conf.arg(metavar="KEY=VALUE")] = ()
    """(rare) constructor argument of both models, e.g. depth=4"""
    json: tyro.conf.FlagCreatePairsOff[bool] = False
    """print JSON"""


def run(options: Options) -> int:
    """Compare and print."""
    import dataclasses
    import json

    from rich.console import Console
    from rich.progress import track

    with one_line_errors():
        from localvit.bench import BenchConfig, compare

        same = {field.name for field in dataclasses.fields(BenchConfig)} & vars(options).keys()
        values = {name: getattr(options, name) for name in same}
        config = BenchConfig(**values, batch_size=options.batch, args=model_arguments(options.set))
        quiet = Console(stderr=True)
        found = compare(config, lambda rounds: track(rounds, "timing", console=quiet, transient=True))
    if options.json:
        print(json.dumps(dataclasses.asdict(found), indent=1))
    else:
        _print(found)
    return 0


def _print(found: Comparison) -> None:
    from rich import box
    from rich.console import Console
    from rich.table import Table

    console = Console(highlight=False)
    console.print(
        f"ratio {found.ratio} (below 1, the first is faster): {found.task} of {found.batch_size}, "
        f"{found.model.model} ({found.model.form}) / {found.against.model} ({found.against.form})",
        markup=False,
    )
    if found.model.engine != found.against.engine:
        console.print("note: the two sides use different engines; --against-engine names that of the second")
    if found.model.input_size != found.against.input_size:
        console.print("note: the images of the two sides differ in size; --size PX makes them equal")
    table = Table(
        box=box.SIMPLE, padding=(0, 1, 0, 0), title=f"median \\[quartiles] of {found.rounds} rounds"
    )
    table.add_column("")
    for side in (found.model, found.against):
        table.add_column(f"{side.model} ({side.form})", justify="right")
    sides = [_figures(found, side) for side in (found.model, found.against)]
    for name in sides[0]:
        table.add_row(name, *(side[name] for side in sides))
    console.print(table)
    console.print(f"peak: {found.peak_gflops:.4g} GFLOP/s ({found.peak_matmul})", markup=False)
    console.print(f"machine: {found.setting}", markup=False)


def _figures(found: Comparison, side: Side) -> dict[str, str]:
    """Return the rows of the table."""
    times = (1e3 * side.seconds.median, 1e3 * side.seconds.low, 1e3 * side.seconds.high)
    peak = side.fraction_of_peak
    percent = (100 * peak.median, 100 * peak.low, 100 * peak.high)
    return {
        "ms": "{:.4g} \\[{:.4g}, {:.4g}]".format(*times),
        "images/s": f"{side.images_per_second:.4g}",
        "fraction of peak, %": "{:.3g} \\[{:.3g}, {:.3g}]".format(*percent),
        "memory of a call, MiB": "-" if side.peak_memory is None else f"{side.peak_memory / 2**20:.1f}",
        "GMACs": f"{side.gmacs:.4g}",
        "parameters, M": f"{side.parameters / 1e6:.2f}",
        "image": "x".join(map(str, side.input_size)),
    }
