"""Peak speed of this machine: that of its fastest matrix product."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
import torch.nn.functional as F

from localvit.acceleration import pack, packed_available, packed_linear
from localvit.bench.measure import Work, interleaved, timer_for

_ROUNDS = 5
# (rows, in, out): a layer of a small transformer, and larger ones, which reuse each number more often.
_SHAPES = {"cpu": [(1568, 192, 768), (1024, 1024, 1024), (2048, 1024, 1024)], "cuda": [(8192, 8192, 8192)]}


@dataclass(frozen=True)
class Matmul:
    """Matrix product that can be repeated.

    Attributes:
        words: Library and shape.
        flops: Floating-point operations, two for each multiply-accumulate.
        work: Function that computes it.
    """

    words: str
    flops: int
    work: Work


def fastest_matmul(device: torch.device, dtype: torch.dtype = torch.float32) -> Matmul:
    """Return the matrix product with the most operations per second, with the current number of threads.

    On a CPU, `F.linear` (PyTorch's BLAS) competes with oneDNN, as a 1 x 1 convolution and with packed
    weights, because either may be twice as fast on some processors. The minimum of a few rounds decides,
    because other programs only make a run slower.
    """
    known = "cuda" if device.type == "cuda" else "cpu"
    candidates = [each for shape in _SHAPES[known] for each in matmuls(*shape, device, dtype)]
    with torch.inference_mode():
        works = {each.words: each.work for each in candidates}
        seconds = interleaved(works, _ROUNDS, timer=timer_for(device))
    return max(candidates, key=lambda each: each.flops / min(seconds[each.words]))


def matmuls(rows: int, inside: int, out: int, device: torch.device, dtype: torch.dtype) -> Iterator[Matmul]:
    """Yield products of (rows, inside) by (inside, out), with a bias, by every available library."""
    x, weight = (torch.rand(n, inside, device=device, dtype=dtype) for n in (rows, out))
    bias = torch.rand(out, device=device, dtype=dtype)
    shape, flops = f"{rows} x {inside} x {out}", 2 * rows * inside * out
    yield Matmul(f"F.linear, {shape}", flops, lambda: F.linear(x, weight, bias))
    if device.type == "cpu":
        row, kernel = x.t().unsqueeze(1)[None], weight[:, :, None, None]
        yield Matmul(f"1 x 1 convolution, {shape}", flops, lambda: F.conv2d(row, kernel, bias))
        if dtype == torch.float32 and packed_available():
            packed = pack(weight)
            yield Matmul(f"oneDNN packed, {shape}", flops, lambda: packed_linear(x, packed, bias))
