"""On a GPU: LocalViT-T against DeiT-T, the Triton kernels against eager PyTorch and `torch.compile`, and the
bytes each must move.

    python benchmarks/kernels.py --out kernels     # writes kernels.json, kernels.md and prints both
    python benchmarks/kernels.py --models-only --device cpu --batch 2 --rounds 2   # does that part run?

Every round times all candidates one after another, with CUDA events; medians and quartiles are over
rounds. "Floor" is the time that the bytes of inputs and outputs take at the copy bandwidth measured in the
same process. Exits 2 without CUDA.
"""

import argparse
import json
import os
import sys
from collections.abc import Callable
from dataclasses import asdict, astuple
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from localvit import Grid, LocalityFeedForward
from localvit.bench import BenchConfig, EngineName, Setting, compare
from localvit.bench.measure import Quartiles, Work, cuda_time, interleaved
from localvit.locality import tokens_to_map

# Of LocalViT-T's time by DeiT-T's, set before the code was written.
GOALS = {"inference": 1.05, "training step": 1.15}


def quartiles(candidates: dict[str, Work], rounds: int) -> dict[str, tuple[float, ...]]:
    """Of milliseconds, by candidate; compilation is in the warm-up."""
    seconds = interleaved(candidates, rounds, timer=cuda_time, warm_up=5)
    return {name: tuple(1e3 * x for x in astuple(Quartiles.of(taken))) for name, taken in seconds.items()}


def bandwidth() -> float:
    """Bytes per millisecond of a large copy, read and written."""
    source = torch.empty(2**30, dtype=torch.uint8, device="cuda")
    target = torch.empty_like(source)
    _, median, _ = quartiles({"copy": lambda: target.copy_(source)}, 20)["copy"]
    return 2 * source.numel() / median


def steps(batch: int, side: int, channels: int, dtype: torch.dtype) -> dict[str, tuple[Work, Work, int]]:
    """Step -> Triton, the same in PyTorch, and the bytes of its inputs and outputs."""
    from localvit.locality.kernels import triton_ops as ops

    count = side * side
    x, grad, below = torch.randn(3, batch, count, channels, device="cuda", dtype=dtype)
    weight = torch.randn(channels, 1, 3, 3, device="cuda", dtype=dtype)
    projection = torch.randn(channels // 4, channels, device="cuda", dtype=dtype)
    a, b, c, d, e = torch.rand(5, channels, device="cuda")
    gate, term = torch.rand(2, batch, channels, device="cuda")
    size = x.numel() * x.element_size()

    def as_map(t: Tensor) -> Tensor:
        return tokens_to_map(t, Grid(side, side))

    def normal(t: Tensor, scale: Tensor, shift: Tensor) -> Tensor:
        return t * scale.to(dtype) + shift.to(dtype)

    def depthwise() -> tuple[Tensor, ...]:
        inner = F.hardswish(normal(x, a, b))
        y = F.conv2d(as_map(inner), weight, padding=1, groups=channels)
        return (y, *torch.var_mean(y.float(), (0, 2, 3)))

    def gate_sums() -> tuple[Tensor, ...]:
        n = normal(x, a, b)
        slope = torch.ops.aten.hardswish_backward(torch.ones_like(n), n).float()
        z, g = (x.float() - c) * d, grad.float()
        terms = (g * F.hardswish(n), slope * g, slope, slope * g * z, slope * z)
        return tuple(t.sum(1) for t in terms)

    def backward() -> tuple[Tensor, ...]:
        inward = normal(grad * gate.to(dtype)[:, None], torch.ones_like(a), term[:, None])
        inward = torch.ops.aten.hardswish_backward(inward, normal(x, a, b))
        inward = inward * c.to(dtype) + normal(x, d, e)
        n = normal(below, a, b)
        back, of_weight, _ = torch.ops.aten.convolution_backward(
            as_map(inward), as_map(F.hardswish(n)), weight, None, [1, 1], [1, 1], [1, 1], False, [0, 0],
            channels, [True, True, False],
        )  # fmt: skip
        out = torch.ops.aten.hardswish_backward(back, as_map(n)).float()
        return out, out.sum((0, 2, 3)), (out * as_map(below)).sum((0, 2, 3)), of_weight

    def project() -> Tensor:
        return (F.hardswish(normal(x, a, b)) * gate.to(dtype)[:, None]) @ projection.t()

    return {
        "depthwise": (lambda: ops.depthwise(x, weight, None, a, b, side, side, 3), depthwise, 2 * size),
        "gate sums": (lambda: ops.gate_sums(grad, x, a, b, c, d, 3), gate_sums, 2 * size),
        "depthwise backward": (
            lambda: ops.depthwise_backward(
                grad, x, below, weight, [gate, term], [a, b, c, d, e], [a, b, c, d], side, side, 3, 3
            ),
            backward,
            4 * size,
        ),
        "gated projection": (
            lambda: ops.gated_projection(x, a, b, gate, projection, 3),
            project,
            size + size // 4,
        ),
    }


def whole_step(batch: int, side: int, channels: int) -> dict[str, Work]:
    """Forward and backward pass of the feed-forward network by each form, under autocast to bfloat16."""
    ffn = LocalityFeedForward(channels // 4).cuda()
    tokens = torch.randn(batch, side * side, channels // 4, device="cuda", requires_grad=True)
    cotangent = torch.randn_like(tokens)
    compiled = torch.compile(ffn)

    def step(module: Callable[..., Tensor], **variables: str) -> Work:
        def work() -> None:
            os.environ.update({"LOCALVIT_PLAIN": "0", "LOCALVIT_KERNELS": ""} | variables)
            with torch.autocast("cuda", torch.bfloat16):
                out = module(tokens, Grid(side, side))
            out.backward(cotangent.to(out.dtype))

        return work

    return {
        "eager": step(ffn, LOCALVIT_PLAIN="1"),
        "compiled": step(compiled),
        "lean": step(ffn),
        "triton": step(ffn, LOCALVIT_KERNELS="triton"),
    }


def measure(batch: int, shapes: list[tuple[int, int]], rounds: int) -> list[dict[str, object]]:
    per_millisecond, rows = bandwidth(), []
    for side, channels in shapes:
        shape = f"{batch} x {side} x {side} x {channels}"
        for name, (ours, theirs, size) in steps(batch, side, channels, torch.bfloat16).items():
            candidates = {"eager": theirs, "compiled": torch.compile(theirs), "triton": ours}
            times = quartiles(candidates, rounds)
            rows.append({"step": name, "shape": shape, "floor_ms": size / per_millisecond, "ms": times})
        times = quartiles(whole_step(batch, side, channels), rounds)
        rows.append({"step": "training step", "shape": shape, "floor_ms": None, "ms": times})
    return rows


def models(batch: int, rounds: int, device: str) -> list[dict[str, Any]]:
    """Whole models in bfloat16, each form against the same form of DeiT-T; ours with and without Triton."""
    cases: list[tuple[bool, EngineName, str]] = [
        (False, "eager", ""), (False, "fused", ""), (False, "compile", ""),
        (True, "eager", ""), (True, "eager", "triton"), (True, "compile", ""), (True, "compile", "triton"),
    ]  # fmt: skip
    rows = []
    for train, engine, kernels in cases:
        os.environ["LOCALVIT_KERNELS"] = kernels
        torch.compiler.reset()
        found = compare(
            BenchConfig(
                model="localvit_tiny_patch16_224", engine=engine, against_engine=engine, batch_size=batch,
                rounds=rounds, train=train, precision="bf16", device=device,
            )
        )  # fmt: skip
        rows.append({"kernels": kernels or "default", "goal": GOALS[found.task], **found.to_dict()})
    return rows


def models_markdown(rows: list[dict[str, Any]]) -> str:
    lines = ["| task | form | kernels | LocalViT-T / DeiT-T | goal | ms | memory, MiB |", "|" + "---|" * 7]
    for row in rows:
        ratio, sides = Quartiles(**row["ratio"]), (row["model"], row["against"])
        times = " and ".join(f"{1e3 * side['seconds']['median']:.3g}" for side in sides)
        memory = " and ".join(f"{(side['peak_memory'] or 0) / 2**20:.0f}" for side in sides)
        verdict = f"<= {row['goal']} {'met' if ratio.median <= row['goal'] else 'missed'}"
        cells = (row["task"], sides[0]["engine"], row["kernels"], ratio, verdict, times, memory)
        lines.append(f"| {' | '.join(map(str, cells))} |")
    return "\n".join(lines)


def markdown(rows: list[dict[str, object]]) -> str:
    lines = ["| step | map | floor, ms | median ms [quartiles] |", "|---|---|---|---|"]
    for row in rows:
        times: dict[str, list[float]] = row["ms"]  # type: ignore[assignment]
        cells = ", ".join(f"{k} {m:.3f} [{low:.3f}, {high:.3f}]" for k, (low, m, high) in times.items())
        floor = f"{row['floor_ms']:.3f}" if row["floor_ms"] else "-"
        lines.append(f"| {row['step']} | {row['shape']} | {floor} | {cells} |")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--batch", type=int, default=256)
    parser.add_argument("--rounds", type=int, default=30)
    parser.add_argument("--out", type=Path, help="stem of the .json and .md that are written")
    parser.add_argument("--models-only", action="store_true", help="leave out the kernels by themselves")
    parser.add_argument("--device", default="cuda", help="of the models")
    arguments = parser.parse_args()
    if not torch.cuda.is_available() and not (arguments.models_only and arguments.device == "cpu"):
        print("benchmarks/kernels.py: CUDA is not available", file=sys.stderr)
        sys.exit(2)
    whole = models(arguments.batch, arguments.rounds, arguments.device)
    shapes = [] if arguments.models_only else [(14, 768), (28, 768), (7, 1536)]
    rows = measure(arguments.batch, shapes, arguments.rounds) if shapes else []
    setting = Setting.here(torch.device(arguments.device), "bf16")
    facts = {"setting": asdict(setting), "models": whole, "rows": rows}
    tables = "\n\n".join([str(setting), models_markdown(whole), markdown(rows)])
    for suffix, text in ((".json", json.dumps(facts, indent=1)), (".md", tables)):
        print(text)
        if arguments.out is not None:
            arguments.out.with_suffix(suffix).write_text(text + "\n")


if __name__ == "__main__":
    main()
