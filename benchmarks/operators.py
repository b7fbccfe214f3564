"""Profile the operators behind the rows of benchmarks/speed.py.

    python benchmarks/operators.py                 # LocalViT-T, DeiT-T, a pyramid's FFNs; some minutes
    python benchmarks/operators.py --batch 1 --batch 8

Written are benchmarks/results/operators_<machine>_<date>.{md,json}. Milliseconds are those of an operator
itself, without what it calls, per call of the model; the models take turns. The profiler costs about a
microsecond for each operator, so sums are a little above the times of benchmarks/speed.py.
"""

import argparse
from collections import defaultdict
from collections.abc import Mapping
from pathlib import Path

import timm
import torch
from speed import BASE, CPU, OURS, PYRAMID, WARM_UP, as_nchw, fused_ffn, in_a_fresh_process, opened
from torch.profiler import ProfilerActivity, profile
from writing import write

from localvit.bench.comparison import training_step
from localvit.bench.measure import Quartiles, Work, using_threads
from localvit.bench.result import Setting

SHOWN = 14
COLUMNS = ("LocalViT-T", "DeiT-T", "DeiT-T eager", "NCHW modules")
Times = dict[str, float]


def own_times(work: Work) -> Times:
    """Operator -> its own milliseconds in one call."""
    with profile(activities=[ProfilerActivity.CPU]) as profiled:
        work()
    return {event.key: event.self_cpu_time_total / 1e3 for event in profiled.key_averages()}


def in_turns(works: Mapping[str, Work], rounds: int, warm_up: int = 1) -> dict[str, Times]:
    """The median of every operator's time over the rounds."""
    found: dict[str, dict[str, list[float]]] = {name: defaultdict(list) for name in works}
    for work in works.values():
        for _ in range(warm_up):
            work()
    for _ in range(rounds):
        for name, work in works.items():
            for operator, time in own_times(work).items():
                found[name][operator].append(time)
    return {
        name: {operator: Quartiles.of(times).median for operator, times in all_times.items()}
        for name, all_times in found.items()
    }


def rows_of(what: str, times: Mapping[str, Times]) -> list[dict[str, object]]:
    """The operators that take most, the others together, and the sum; a column for each model."""
    most = defaultdict(float)
    for of_one in times.values():
        for operator, time in of_one.items():
            most[operator] = max(most[operator], time)
    shown = sorted(most, key=lambda operator: -most[operator])[:SHOWN]
    rows = [{name: of_one.get(operator, 0.0) for name, of_one in times.items()} for operator in shown]
    sums = {name: sum(of_one.values()) for name, of_one in times.items()}
    others = {name: sums[name] - sum(row[name] for row in rows) for name in times}
    named = zip([*shown, "others", "sum"], [*rows, others, sums], strict=True)
    return [{"what": what, "operator": operator, **row} for operator, row in named]


def inference(batch: int, rounds: int) -> list[dict[str, object]]:
    images = torch.randn(batch, 3, 224, 224)
    works = {
        "LocalViT-T": opened(OURS, "fused", images),
        "DeiT-T": opened(BASE, "fused", images),
        "DeiT-T eager": opened(BASE, "eager", images),
    }
    return rows_of(f"fused, B{batch}", in_turns(works, rounds))


def training(batch: int, rounds: int) -> list[dict[str, object]]:
    torch.set_num_threads(1)
    images = torch.randn(batch, 3, 224, 224)
    models = {"LocalViT-T": OURS, "DeiT-T": BASE}
    works = {title: training_step(timm.create_model(name), images) for title, name in models.items()}
    return rows_of(f"training step, B{batch}", in_turns(works, rounds, WARM_UP))


def pyramid(batch: int, rounds: int) -> list[dict[str, object]]:
    """The feed-forward network alone; the first column is LocalViT-T's, fused."""
    rows = []
    for side, dim in PYRAMID:
        works = {
            "LocalViT-T": fused_ffn(dim, side, batch),
            "NCHW modules": as_nchw(dim, side, batch),
        }
        rows += rows_of(f"FFN {side}x{side}x{dim}, B{batch}", in_turns(works, rounds))
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--batch", type=int, action="append", help="images in a call (1, 8 and 32)")
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--output", type=Path, default=Path(__file__).parent / "results")
    args = parser.parse_args()
    with using_threads(1):
        rows = pyramid(16, args.rounds)  # first: later the allocator has memory to spare
        rows += [row for batch in args.batch or (1, 8, 32) for row in inference(batch, args.rounds)]
        rows += in_a_fresh_process(training, (args.batch or [32])[-1], 5)
        setting = Setting.here(CPU)
    cells = [
        (
            str(row["what"]),
            str(row["operator"]),
            *(f"{row[name]:.2f}" if name in row else "" for name in COLUMNS),
        )
        for row in rows
    ]
    about = (
        f"# Operators of LocalViT-T and DeiT-T\n\n{setting}.\n\n224 px, float32; milliseconds of an operator "
        "itself in one call, medians of turns. Training steps are of models as built. An FFN is that of "
        "LocalViT-T at a pyramid's grid, fused, beside the authors' modules on NCHW maps.\n"
    )
    hardware = setting.machine
    path = write(args.output, "operators", hardware, about, ("what", "operator", *COLUMNS), cells, rows)
    print(f"written: {path}.md and .json")


if __name__ == "__main__":
    main()
