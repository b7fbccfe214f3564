"""The Triton kernels as PyTorch operators, so that a compiled or exported graph sees one operator each.

Maps are tokens (B, N, D) in raster order of a lattice of ``height`` rows and ``width`` columns; ``x`` and
``grad`` may be slices along N. Vectors are float32. Sums are float32 and the same from run to run.
``act`` numbers are those of :mod:`localvit.locality.kernels.triton_kernels`.

No operator has a derivative of its own: :mod:`localvit.locality.kernels.triton_steps` is the derivative.
"""

import os

import torch
import triton
from torch import Tensor

from localvit.locality.kernels import triton_kernels

# Tokens and channels of a tile. Not tuned.
_BLOCK_N = 32
_BLOCK_D = 64
# Programs below which an image is split among several.
_ENOUGH = 512


def _layout(batch: int, tokens: int, channels: int) -> tuple[int, int, tuple[int, int]]:
    """Channels of a tile, parts of an image, and the grid of programs; by the shape alone."""
    block = min(_BLOCK_D, max(16, triton.next_power_of_2(channels)))
    columns = triton.cdiv(channels, block)
    splits = min(triton.cdiv(tokens, _BLOCK_N), triton.cdiv(_ENOUGH, batch * columns))
    return block, splits, (batch * splits, columns)


def _check(x: Tensor) -> None:
    if x.stride(2) != 1 or x.stride(1) != x.shape[2]:
        raise ValueError(f"tokens (B, N, D) must be dense along N and D, not of strides {x.stride()}")


def _convolve(
    x: Tensor, weight: Tensor, bias: Tensor | None, vectors: list[Tensor], size: list[int], acts: list[int]
) -> tuple[Tensor, Tensor, Tensor, int]:
    _check(x)
    batch, tokens, channels = x.shape
    block, splits, grid = _layout(batch, tokens, channels)
    y = torch.empty((batch, tokens, channels), dtype=x.dtype, device=x.device)
    first, second = torch.empty((2, grid[0], channels), device=x.device)
    bias = torch.zeros(channels, device=x.device) if bias is None else bias
    finish = len(vectors) > 2
    triton_kernels.depthwise_kernel[grid](
        x, weight.contiguous(), bias, *(vectors if finish else vectors * 2), y, first, second,
        x.stride(0), tokens, channels, *size, splits, K=weight.shape[-1], ACT=acts[0], ACT2=acts[-1],
        FINISH=finish, BLOCK_N=_BLOCK_N, BLOCK_D=block,
    )  # fmt: skip
    return y, first, second, splits


@torch.library.custom_op("localvit::depthwise", mutates_args=())
def depthwise(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    scale: Tensor,
    shift: Tensor,
    height: int,
    width: int,
    act: int,
) -> tuple[Tensor, Tensor, Tensor]:
    """``conv(act(x * scale + shift)) + bias``, and its mean and variance (uncorrected) for each channel."""
    y, sums, squares, splits = _convolve(x, weight, bias, [scale, shift], [height, width], [act])
    batch, tokens, _ = x.shape
    tiles = torch.arange(triton.cdiv(tokens, _BLOCK_N), device=x.device)
    counts = torch.zeros(splits, device=x.device)
    sizes = (tokens - tiles * _BLOCK_N).clamp(max=_BLOCK_N).to(counts.dtype)
    for split in range(splits):
        counts[split] = sizes[split::splits].sum()
    counts = counts.repeat(batch)[:, None]
    mean = sums.sum(0) / (batch * tokens)
    about = (squares + counts * (sums / counts - mean).square()).sum(0)
    return y, mean, about / (batch * tokens)


@depthwise.register_fake
def _(x, weight, bias, scale, shift, height, width, act):  # type: ignore[no-untyped-def]
    return x.new_empty(x.shape), scale.new_empty(scale.shape), scale.new_empty(scale.shape)


@torch.library.custom_op("localvit::depthwise_inference", mutates_args=())
def depthwise_inference(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    scale: Tensor,
    shift: Tensor,
    scale2: Tensor,
    shift2: Tensor,
    height: int,
    width: int,
    act: int,
    act2: int,
) -> tuple[Tensor, Tensor]:
    """``act2(scale2 * (conv(act(x * scale + shift)) + bias) + shift2)`` and its means over tokens (B, D)."""
    vectors = [scale, shift, scale2, shift2]
    y, sums, _, splits = _convolve(x, weight, bias, vectors, [height, width], [act, act2])
    return y, sums.unflatten(0, (x.shape[0], splits)).sum(1) / x.shape[1]


@depthwise_inference.register_fake
def _(x, weight, bias, scale, shift, scale2, shift2, height, width, act, act2):  # type: ignore[no-untyped-def]
    return x.new_empty(x.shape), scale.new_empty((x.shape[0], x.shape[2]))


@torch.library.custom_op("localvit::gate_sums", mutates_args=())
def gate_sums(
    grad: Tensor, x: Tensor, scale: Tensor, shift: Tensor, mean: Tensor, deviation: Tensor, act: int
) -> Tensor:
    """Sums over tokens (5, B, D) that give the gradients of a gate and of the batch norm in front of it.

    With n = x * scale + shift, a = act'(n) and z = (x - mean) * deviation, the terms are grad * act(n),
    a * grad, a, a * grad * z and a * z. The gradient of n is a * (grad * gate + shift of the pooling),
    linear in two numbers of the image that are not known before the first sum is.
    """
    _check(grad)
    batch, tokens, channels = x.shape
    block, _, (_, columns) = _layout(batch, tokens, channels)
    out = torch.empty((5, batch, channels), device=x.device)
    triton_kernels.gate_sums_kernel[(batch, columns)](
        grad, x, scale, shift, mean, deviation, out, grad.stride(0), tokens, channels, batch,
        ACT=act, BLOCK_N=_BLOCK_N, BLOCK_D=block,
    )  # fmt: skip
    return out


@gate_sums.register_fake
def _(grad, x, scale, shift, mean, deviation, act):  # type: ignore[no-untyped-def]
    return scale.new_empty((5, x.shape[0], x.shape[2]))


@torch.library.custom_op("localvit::depthwise_backward", mutates_args=())
def depthwise_backward(
    grad: Tensor,
    x: Tensor,
    below: Tensor,
    weight: Tensor,
    gate: list[Tensor],
    second: list[Tensor],
    first: list[Tensor],
    height: int,
    width: int,
    act: int,
    act2: int,
) -> tuple[Tensor, Tensor, Tensor]:
    """Back from the gated map to the normalised expanded one.

    Args:
        grad: Gradient of the gated map.
        x: The convolved map.
        below: The expanded map.
        weight: (D, 1, k, k).
        gate: Factor and term (B, D): the activated map's gradient is ``grad * factor + term``.
        second: Scale and shift of norm 2, and the three coefficients of its backward pass (D each;
            ``Stage.coefficients``).
        first: Scale, shift, mean and one over the deviation of norm 1.

    Returns:
        Gradient of the normalised expanded map; its sums, plain and times the standardised map (2, D);
        gradient of the weight.
    """
    _check(grad)
    batch, tokens, channels = x.shape
    block, splits, grid = _layout(batch, tokens, channels)
    k = weight.shape[-1]
    out = torch.empty_like(x)
    sums = torch.empty((2, grid[0], channels), device=x.device)
    taps = torch.empty((grid[0], k * k, channels), device=x.device)
    triton_kernels.depthwise_backward_kernel[grid](
        grad, x, below, weight.contiguous(), *gate, *second, *first, out, sums, taps,
        grad.stride(0), tokens, channels, height, width, splits, grid[0],
        K=k, TAPS=triton.next_power_of_2(k * k), ACT=act, ACT2=act2, BLOCK_N=_BLOCK_N, BLOCK_D=block,
    )  # fmt: skip
    of_weight = taps.sum(0).t().reshape(weight.shape).to(weight.dtype)
    return out, sums.sum(1), of_weight.contiguous()


@depthwise_backward.register_fake
def _(grad, x, below, weight, gate, second, first, height, width, act, act2):  # type: ignore[no-untyped-def]
    return torch.empty_like(x), first[0].new_empty((2, x.shape[2])), weight.new_empty(weight.shape)


@torch.library.custom_op("localvit::gated_projection", mutates_args=())
def gated_projection(
    x: Tensor, scale: Tensor, shift: Tensor, gate: Tensor, weight: Tensor, act: int
) -> Tensor:
    """``(act(x * scale + shift) * gate) @ weight.T``: (B, N, D), gate (B, D), weight (C, D) -> (B, N, C)."""
    batch, tokens, channels = x.shape
    rows, width = batch * tokens, weight.shape[0]
    blocks = {"BLOCK_M": 64, "BLOCK_C": 64, "BLOCK_D": 32}
    out = torch.empty((batch, tokens, width), dtype=x.dtype, device=x.device)
    grid = (triton.cdiv(rows, 64), triton.cdiv(width, 64))
    triton_kernels.gated_projection_kernel[grid](
        x, scale, shift, gate, weight.contiguous(), out, rows, tokens, channels, width,
        ACT=act, WIDE=os.environ.get("TRITON_INTERPRET") == "1", **blocks,
    )  # fmt: skip
    return out


@gated_projection.register_fake
def _(x, scale, shift, gate, weight, act):  # type: ignore[no-untyped-def]
    return x.new_empty((x.shape[0], x.shape[1], weight.shape[0]))
