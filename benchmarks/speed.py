"""Compare LocalViT-T with DeiT-T on this CPU: inference, training, memory, growth.

    make bench                                        # some minutes
    python benchmarks/speed.py --quick --output /tmp  # does it run? two rounds of the smallest batch

Written are benchmarks/results/speed_<machine>_<date>.{md,json}; benchmarks/chart.py draws them.

What is in one row took turns within one process, so both sides met the same machine. Ratios are times of the
first by times of the second: below 1, the first is faster. What this machine cannot run is named with the
reason. Training images have a benchmark of their own, `benchmarks/data.py`.
"""

import argparse
import os
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from contextlib import contextmanager
from functools import partial
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import timm
import torch
from rich.console import Console
from roofline import roofline
from timm.layers import SqueezeExcite
from timm.models._efficientnet_blocks import InvertedResidual
from torch import Tensor, nn
from writing import write

import localvit
from localvit import Grid, LocalityFeedForward
from localvit.acceleration.kernels import VARIABLE
from localvit.bench.comparison import SHORTEST, fraction, fraction_flops, training_step
from localvit.bench.engines import EngineName, check_engine, open_on
from localvit.bench.host import memory_growth
from localvit.bench.measure import (
    Quartiles,
    Work,
    interleaved,
    ratio,
    timer_for,
    using_threads,
    without_gradients,
)
from localvit.bench.peak import fastest_matmul, matmuls
from localvit.bench.result import Setting
from localvit.cost import count_macs
from localvit.data.config import DataConfig
from localvit.engines.info import ExportInfo
from localvit.errors import first_line
from localvit.models.build import preprocessing_for
from localvit.planning.memory import measure_step

OURS, BASE = "localvit_tiny_patch16_224", "deit_tiny_patch16_224"
CPU = torch.device("cpu")
WARM_UP = 4  # training steps
PYRAMID = ((56, 96), (28, 192))  # side of the grid and width of its first stages
Row = dict[str, object]

# Title -> (most or least, bound at batch 1, bound of larger ones). On another processor the first and the
# fraction of peak depend on how fast its BLAS is beside oneDNN.
GOALS: dict[str, tuple[str, float, float]] = {
    "fused / DeiT-T eager": ("<=", 1.00, 0.95),
    "fused / DeiT-T fused": ("<=", 1.03, 1.03),
    "fraction of peak, fused": (">=", 0.75, 0.80),
    "fraction of peak, OpenVINO": (">=", 0.73, 0.73),
    "training step / DeiT-T": ("<=", 1.08, 1.08),
    "training step, native / plain modules": ("<=", 1.0, 1.0),
    "kept for the backward pass / DeiT-T": ("<=", 1.0, 1.0),
    "peak memory of a step / DeiT-T": ("<=", 1.10, 1.10),
    "FFN per token, 784 / 196 tokens": ("<=", 1.2, 1.2),
    "FFN per token, 3136 / 196 tokens": ("<=", 1.2, 1.2),
    "FFN per image, batch 256 / 1": ("<=", 1.2, 1.2),
}


def row(title: str, found: Quartiles | float | str, *, threads: int, batch: int) -> Row:
    """Put a value beside its goal, if there is one; a text is the reason why there is no value."""
    sign, *bounds = GOALS.get(title, ("", 0.0, 0.0))
    bound = bounds[batch > 1]
    goal = f"{sign} {bound:g}" if sign else "-"
    about: Row = {"title": title, "threads": threads, "batch": batch, "goal": goal}
    if isinstance(found, str):
        return {**about, "missing": found}
    value = found if isinstance(found, float) else found.median
    met = None if not sign else value <= bound if sign == "<=" else value >= bound
    quartiles = {} if isinstance(found, float) else {"low": found.low, "high": found.high}
    return {**about, "value": value, **quartiles, "met": met}


SIDES: dict[str, tuple[str, EngineName]] = {
    "ours fused": (OURS, "fused"),
    "ours compiled": (OURS, "compile"),
    "ours openvino": (OURS, "openvino"),
    "base eager": (BASE, "eager"),
    "base fused": (BASE, "fused"),
    "base compiled": (BASE, "compile"),
}
QUOTIENTS = {
    "fused / DeiT-T eager": ("ours fused", "base eager"),
    "compiled / DeiT-T compiled": ("ours compiled", "base compiled"),
    "fused / DeiT-T fused": ("ours fused", "base fused"),
}
SHARES = {"fraction of peak, fused": "ours fused", "fraction of peak, OpenVINO": "ours openvino"}


def opened(name: str, engine: EngineName, images: Tensor) -> Work:
    """A model on an engine, called once."""
    check_engine(engine, CPU)
    model = timm.create_model(name).eval()
    seen = preprocessing_for(model, DataConfig())
    info = ExportInfo.of(seen, architecture=name, num_classes=model.num_classes)
    computes = open_on(engine, model, info, CPU)
    work = without_gradients(lambda: computes(images))
    work()
    return work


def gmacs(name: str) -> float:
    return count_macs(timm.create_model(name).eval(), (3, 224, 224)) / 1e9


def inference(threads: int, batch: int, rounds: int, engines: set[EngineName]) -> Iterator[Row]:
    """Rows of whole models; all take turns with each other and with the fastest matrix product."""
    images, peak = torch.randn(batch, 3, 224, 224), fastest_matmul(CPU)
    works: dict[str, Work] = {"peak": without_gradients(peak.work)}
    missing: dict[str, str] = {}
    torch.compiler.reset()  # another batch would be compiled for any batch, which is slower
    for side, (name, engine) in SIDES.items():
        if engine in engines:
            try:
                works[side] = opened(name, engine, images)
            except Exception as error:  # no compiler, no package: the others are measured
                missing[side] = first_line(error)
    seconds = interleaved(works, rounds, at_least=SHORTEST)
    where = {"threads": threads, "batch": batch}
    for title, (a, b) in QUOTIENTS.items():
        if SIDES[a][1] in engines:
            why = missing.get(a) or missing.get(b)
            yield row(title, why or ratio(seconds[a], seconds[b]), **where)
    flops = fraction_flops(gmacs(OURS), batch)
    for title, side in SHARES.items():
        if side in missing:
            yield row(title, missing[side], **where)
        elif side in works and threads == 1:
            yield row(title, fraction(flops, seconds[side], peak.flops, seconds["peak"]), **where)


class AsNCHW(nn.Module):
    """The paper's feed-forward network as its authors have it: tokens to a map, NCHW modules, and back."""

    def __init__(self, dim: int, side: int) -> None:
        super().__init__()
        gate = partial(SqueezeExcite, rd_channels=4, gate_layer="hard_sigmoid")
        settings = {"exp_ratio": 4, "act_layer": nn.Hardswish, "se_layer": gate, "noskip": True}
        self.block, self.side = InvertedResidual(dim, dim, **settings), side

    def forward(self, tokens: Tensor) -> Tensor:
        """(B, N, C) to (B, N, C)."""
        maps = tokens.transpose(1, 2).contiguous().unflatten(2, (self.side, self.side))
        return self.block(maps).flatten(2).transpose(1, 2)


def fused_ffn(dim: int, side: int, batch: int) -> Work:
    ffn, tokens = localvit.fuse(LocalityFeedForward(dim).eval()), torch.randn(batch, side * side, dim)
    return without_gradients(lambda: ffn(tokens, Grid(side, side)))


def as_nchw(dim: int, side: int, batch: int) -> Work:
    plain, tokens = AsNCHW(dim, side).eval(), torch.randn(batch, side * side, dim)
    return without_gradients(partial(plain, tokens))


def pyramid(batch: int, rounds: int) -> Iterator[Row]:
    """The feed-forward network at the grids of a pyramid's first stages."""
    for side, dim in PYRAMID:
        works = {"ours": fused_ffn(dim, side, batch), "plain": as_nchw(dim, side, batch)}
        seconds = interleaved(works, rounds, at_least=SHORTEST)
        found = ratio(seconds["ours"], seconds["plain"])
        yield row(f"FFN {side}x{side}x{dim}, fused / NCHW modules", found, threads=1, batch=batch)


def growth(rounds: int, largest: int) -> Iterator[Row]:
    """Does the time of a token stay the same on larger images and in larger batches?"""
    works = {side: fused_ffn(192, side, 1) for side in (14, 28, 56)}
    named = {str(side): work for side, work in works.items()} | {"batch": fused_ffn(192, 14, largest)}
    seconds = interleaved(named, rounds, at_least=SHORTEST)
    for side in (28, 56):
        tokens = side * side
        found = ratio([x * 196 / tokens for x in seconds[str(side)]], seconds["14"])
        yield row(f"FFN per token, {tokens} / 196 tokens", found, threads=1, batch=1)
    found = ratio([x / largest for x in seconds["batch"]], seconds["14"])
    yield row("FFN per image, batch 256 / 1", found, threads=1, batch=largest)


@contextmanager
def plain_modules() -> Iterator[None]:
    os.environ[VARIABLE] = "plain"
    try:
        yield
    finally:
        del os.environ[VARIABLE]


def training(threads: int, batch: int, rounds: int) -> Iterator[Row]:
    """A training step, and its memory."""
    images = torch.randn(batch, 3, 224, 224)
    works = {name: training_step(timm.create_model(name), images) for name in (OURS, BASE)}
    where = {"threads": threads, "batch": batch}
    # The first steps take up to three times as long, until the allocator holds what a step needs.
    seconds = interleaved(works, rounds, warm_up=WARM_UP)
    yield row("training step / DeiT-T", ratio(seconds[OURS], seconds[BASE]), **where)

    def plain() -> None:
        with plain_modules():
            works[OURS]()

    # Apart, because plain modules hold twice the memory, and giving it back slows down who comes next.
    seconds = interleaved({OURS: works[OURS], "plain": plain}, rounds, warm_up=WARM_UP)
    yield row("training step, native / plain modules", ratio(seconds[OURS], seconds["plain"]), **where)
    if threads > 1:
        return
    kept = {name: kept_bytes(name, batch) for name in works}
    yield row("kept for the backward pass / DeiT-T", kept[OURS] / kept[BASE], **where)
    grown = {name: in_a_fresh_process(step_growth, name, batch) for name in works}
    known = grown[OURS] and grown[BASE]
    found = grown[OURS] / grown[BASE] if known else "unknown"
    yield row("peak memory of a step / DeiT-T", found, **where)


def step_growth(name: str, batch: int) -> int | None:
    """Bytes that a training step holds at its peak beyond what the process held before it."""
    torch.set_num_threads(1)
    work = training_step(timm.create_model(name), torch.randn(batch, 3, 224, 224))
    for _ in range(WARM_UP):
        work()
    return memory_growth(work, CPU)


def in_a_fresh_process(function: Callable[..., Any], *args: object) -> Any:
    """Call `function` in a new process, which has no freed memory to reuse."""
    with ProcessPoolExecutor(1, mp_context=get_context("spawn")) as pool:
        return pool.submit(function, *args).result()


def kept_bytes(name: str, batch: int) -> int:
    model = timm.create_model(name)
    step = measure_step(model, torch.optim.AdamW(model.parameters(), lr=0.0), (3, 224, 224))
    return step.activations * batch + step.activations_fixed


def roof(batch: int, rounds: int) -> dict[str, object]:
    """Whole models under this machine's roof."""
    images, macs = torch.randn(batch, 3, 224, 224), {name: gmacs(name) for name in (OURS, BASE)}
    return roofline(
        {
            f"{title} {engine}": (opened(name, engine, images), fraction_flops(macs[name], batch))
            for title, name, engine in (
                ("LocalViT-T", OURS, "fused"),
                ("LocalViT-T", OURS, "eager"),
                ("DeiT-T", BASE, "eager"),
            )
        },
        rounds,
    )


def by_route(rounds: int, rows: int = 1576, inside: int = 192, out: int = 768) -> str:
    """Time a linear layer of the feed-forward network at batch 8 in each library: the possible gain over
    timm's model depends on it."""
    products = matmuls(rows, inside, out, CPU, torch.float32)
    works = {each.words.partition(",")[0]: without_gradients(each.work) for each in products}
    seconds = interleaved(works, rounds, at_least=SHORTEST)
    speeds = (
        f"{name} {2 * rows * inside * out / Quartiles.of(times).median / 1e9:.4g}"
        for name, times in seconds.items()
    )
    return f"A linear layer of {rows} x {inside} x {out}, GFLOP/s: {', '.join(speeds)}."


def on_device(device: torch.device, batch: int, rounds: int) -> Iterator[Row]:
    """Whole models and training steps in bfloat16 on a GPU, where the block runs as plain modules."""
    images = torch.randn(batch, 3, 224, 224, device=device)
    where = {"threads": 1, "batch": batch}
    models = {name: timm.create_model(name).to(device) for name in (OURS, BASE)}
    selective = timm.create_model(OURS).to(device)
    localvit.set_selective_checkpointing(selective)
    timer = timer_for(device)
    works = {
        name: training_step(model, images, "bf16")
        for name, model in (*models.items(), ("selective", selective))
    }
    seconds = interleaved(works, rounds, warm_up=WARM_UP, timer=timer)
    yield row("training step / DeiT-T, bf16", ratio(seconds[OURS], seconds[BASE]), **where)
    found = ratio(seconds["selective"], seconds[OURS])
    yield row("training step, selective checkpointing / plain modules", found, **where)
    for engine in ("eager", "compile"):
        calls = {}
        for name in (OURS, BASE):
            model = timm.create_model(name).to(device).eval()
            if engine == "compile":
                model = torch.compile(model)

            def infer(model: Any = model) -> None:
                with torch.inference_mode(), torch.autocast(device.type, torch.bfloat16):
                    model(images)

            infer()
            calls[name] = infer
        seconds = interleaved(calls, rounds, timer=timer)
        yield row(f"inference / DeiT-T, bf16, {engine}", ratio(seconds[OURS], seconds[BASE]), **where)


def parts(quick: bool) -> Iterator[tuple[str, int, Callable[[], Iterator[Row]]]]:
    """(what, threads, its rows), in the order of the table."""
    rounds = 2 if quick else 11
    most = min(2, len(os.sched_getaffinity(0)))
    for threads in (1,) if quick else range(1, most + 1):
        for batch in (1,) if quick else (1, 8, 32):
            engines: set[EngineName] = {"eager", "fused"}
            if threads == 1 and not quick:
                engines |= {"compile"}
            if threads == 1 and (quick or batch == 8):
                engines |= {"openvino"}
            what = f"inference, {threads} thread(s), batch {batch}"
            yield what, threads, partial(inference, threads, batch, rounds, engines)
    yield "pyramid", 1, partial(pyramid, 2 if quick else 16, rounds)
    yield "growth", 1, partial(growth, rounds, 4 if quick else 256)
    for threads in (1,) if quick else range(1, most + 1):
        batch = 2 if quick else 32
        what = f"training, {threads} thread(s), batch {batch}"
        yield what, threads, partial(training, threads, batch, 2 if quick else 5)


def cells(found: Row) -> tuple[str, ...]:
    """A line of the table."""
    where = f"T{found['threads']} B{found['batch']}"
    if "missing" in found:
        return str(found["title"]), where, f"not measured: {found['missing']}", str(found["goal"]), "-"
    spread = " [{low:.3g}, {high:.3g}]".format(**found) if "low" in found else ""
    return (
        str(found["title"]),
        where,
        f"{found['value']:.3g}{spread}",
        str(found["goal"]),
        {True: "met", False: "missed", None: ""}[found["met"]],
    )


def device_table(device: torch.device, args: argparse.Namespace) -> None:
    """Measure on a GPU and write the table."""
    rows = list(on_device(device, 8 if args.quick else 256, 2 if args.quick else 21))
    setting = Setting.here(device)
    about = f"# LocalViT-T beside DeiT-T on a GPU\n\n{setting}.{' ' + args.note if args.note else ''}\n"
    path = write(
        args.output,
        "speed",
        setting.machine,
        about,
        ("what", "where", "value", "goal", ""),
        list(map(cells, rows)),
        rows,
    )
    print(f"written: {path}.md and .json")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="two rounds of small batches: does it run?")
    parser.add_argument(
        "--device",
        default="cpu",
        choices=["cpu", "cuda"],
        help="cuda: whole models and training steps on a GPU instead",
    )
    parser.add_argument("--note", default="", help="a sentence for the result file")
    parser.add_argument("--output", type=Path, default=Path(__file__).parent / "results")
    args = parser.parse_args()
    rows: list[Row] = []
    if args.device == "cuda" and not torch.cuda.is_available():
        raise SystemExit("--device cuda: PyTorch finds no GPU here; use --device cpu")
    if args.device != "cpu":
        return device_table(torch.device(args.device), args)
    with Console(stderr=True).status("starting") as status:
        for what, threads, measure in parts(args.quick):
            status.update(what)
            with using_threads(threads):
                for found in measure():
                    rows.append(found)
                    status.console.print("  ".join(cells(found)), markup=False, highlight=False)
        status.update("roofline")
        with using_threads(1):
            under = roof(1 if args.quick else 8, 2 if args.quick else 11)
            under["linear"] = by_route(2 if args.quick else 21)
            setting = Setting.here(CPU)
    about = (
        f"# LocalViT-T beside DeiT-T\n\n{setting}.{' ' + args.note if args.note else ''}\n\n"
        "224 px, float32; T threads, B images in a call; medians of turns [quartiles]. Times of the first "
        f"by those of the second: below 1, the first is faster. Peak of one thread: "
        f"{under['peak_gflops']:.4g} GFLOP/s ({under['peak_matmul']}). {under['linear']}\n"
    )
    header = ("what", "where", "value", "goal", "")
    hardware = setting.machine.removesuffix(", 1 thread")
    path = write(args.output, "speed", hardware, about, header, list(map(cells, rows)), rows, roofline=under)
    print(f"written: {path}.md and .json")


if __name__ == "__main__":
    main()
