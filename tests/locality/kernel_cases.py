"""What every set of kernels must compute, against the plain formula in float64.

``operators`` is the module that has them; ``gap``, how many tokens of something else lie in front of an image
where the operators take slices.
"""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

ACTS = {0: lambda x: x, 1: F.relu, 2: F.relu6, 3: F.hardswish, 4: F.silu}
TOLERANCE = {torch.float32: 2e-5, torch.float16: 4e-3, torch.bfloat16: 3e-2}


def vectors(*shape: int) -> list[Tensor]:
    return [torch.randn(*shape) * 0.5 + 0.3 for _ in range(4)]


def tokens(batch: int, n: int, channels: int, dtype: torch.dtype, gap: int = 0) -> Tensor:
    """Tokens as a slice, with ``gap`` tokens of something else in front of each image."""
    x = torch.randn(batch, gap + n, channels).to(dtype)
    x[:, :gap] = float("nan")
    return x[:, gap:]


def as_map(x: Tensor, height: int, width: int) -> Tensor:
    return x.double().transpose(1, 2).unflatten(2, (height, width))


def close(got: Tensor, want: Tensor, dtype: torch.dtype) -> None:
    want = want.detach().to(torch.float64)
    assert got.shape == want.shape
    error = (got.double() - want).abs().max()
    assert error <= TOLERANCE[dtype] * (1 + want.abs().max()), float(error)


def per_channel(v: Tensor) -> Tensor:
    return v.double()[:, None, None]


def check_depthwise(operators: Any, case: tuple, gap: int = 0) -> None:
    """The convolution behind a norm and an activation, and its statistics."""
    batch, height, width, channels, k, act, _, dtype = case
    x = tokens(batch, height * width, channels, dtype, gap=gap)
    weight, bias = torch.randn(channels, 1, k, k).to(dtype), torch.randn(channels)
    scale, shift, *_ = vectors(channels)
    inner = ACTS[act](as_map(x, height, width) * per_channel(scale) + per_channel(shift))
    for offset in (None, bias):
        wide = None if offset is None else offset.double()
        want = F.conv2d(inner, weight.double(), wide, padding=k // 2, groups=channels)
        y, mean, var = operators.depthwise(x, weight, offset, scale, shift, height, width, act)
        close(y, want.flatten(2).transpose(1, 2), dtype)
        close(mean, want.mean((0, 2, 3)), dtype)
        close(var, want.var((0, 2, 3), correction=0), dtype)


def check_variance_far_from_zero(operators: Any, k: int) -> None:
    """Mean 1000, deviation 0.1: a sum of squares in float32 would lose all of it."""
    x = 1000 + 0.1 * torch.randn(1, 63, 16)
    one, weight = torch.ones(16), torch.zeros(16, 1, k, k)
    weight[:, :, k // 2, k // 2] = 1.0
    *_, var = operators.depthwise(x, weight, None, one, 0 * one, 9, 7, 0)
    torch.testing.assert_close(var, x.double().var((0, 1), correction=0).float(), rtol=1e-3, atol=0)


def check_slopes(operators: Any, act: int, channels: int) -> None:
    """At corners they are those of PyTorch."""
    x = torch.tensor([-7.0, -3.0, 0.0, 3.0, 6.0, 7.0], requires_grad=True)
    one, zero = torch.ones(channels), torch.zeros(channels)
    maps = x.detach()[:, None, None].repeat(1, 1, channels)  # an image of one pixel for each
    sums = operators.gate_sums(torch.ones_like(maps), maps, one, zero, zero, one, act)
    ACTS[act](x).sum().backward()
    torch.testing.assert_close(sums[1], x.grad[:, None].expand(-1, channels))


def check_backward(operators: Any, case: tuple, gap: int = 0) -> None:
    """All of it against autograd in float64: gate sums, norm 2, the convolution and norm 1's sums."""
    batch, height, width, channels, k, act, act2, dtype = case
    count = height * width
    below, grad = tokens(batch, count, channels, dtype), tokens(batch, count, channels, dtype, gap=gap)
    weight = torch.randn(channels, 1, k, k).to(dtype)
    scale, shift, mean, deviation = vectors(channels)
    weight2, bias2, mean2, _ = vectors(channels)
    deviation2, gate = torch.rand(channels) + 0.5, torch.rand(batch, channels)
    x = tokens(batch, count, channels, dtype)
    term, by_x, rest = torch.randn(batch, channels), *torch.randn(2, channels)

    convolved = as_map(x, height, width).requires_grad_()
    normal = (convolved - per_channel(mean2)) * per_channel(deviation2)
    value = ACTS[act2](normal * per_channel(weight2) + per_channel(bias2))
    upward = as_map(grad, height, width)
    scale2 = weight2 * deviation2
    affine2 = (scale2, bias2 - mean2 * scale2)
    sums = operators.gate_sums(grad, x, *affine2, mean2, deviation2, act2)
    close(sums[0], (upward * value).sum((2, 3)), dtype)
    inward = upward * gate.double()[:, :, None, None] + term.double()[:, :, None, None]
    (of_value,) = torch.autograd.grad(value, convolved, inward)
    of_normal = of_value / per_channel(scale2)  # in front of act2
    close((gate * sums[1] + term * sums[2]), of_normal.sum((2, 3)), dtype)
    close((gate * sums[3] + term * sums[4]), (of_normal * normal).sum((2, 3)), dtype)

    by_grad = vectors(channels)[0]
    outward = of_normal * per_channel(by_grad) + convolved.detach() * per_channel(by_x) + per_channel(rest)
    lower = (as_map(below, height, width) * per_channel(scale) + per_channel(shift)).requires_grad_()
    kernel = weight.double().requires_grad_()
    y = F.conv2d(ACTS[act](lower), kernel, padding=k // 2, groups=channels)
    want, of_kernel = torch.autograd.grad(y, (lower, kernel), outward)
    out, of_norm, of_weight = operators.depthwise_backward(
        grad, x, below, weight, [gate, term], [*affine2, by_grad, by_x, rest],
        [scale, shift, mean, deviation], height, width, act, act2,
    )  # fmt: skip
    close(out, want.flatten(2).transpose(1, 2), dtype)
    close(of_weight, of_kernel, dtype)
    standard = (as_map(below, height, width) - per_channel(mean)) * per_channel(deviation)
    close(of_norm, torch.stack([want.sum((0, 2, 3)), (want * standard).sum((0, 2, 3))]), dtype)
