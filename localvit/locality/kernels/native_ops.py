"""The kernels of ``native.cpp`` as functions of tensors, by the names that ``triton_ops`` has for its own.

Maps are tokens (B, N, D) in raster order of a lattice of ``height`` rows and ``width`` columns, in single
precision on the CPU. Sums are the same from run to run and for any number of threads.
"""

import ctypes
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from localvit.locality.grid import Grid, map_to_tokens, tokens_to_map
from localvit.locality.kernels.native_build import library

KERNEL_SIZES = (3, 5, 7)
# Channels come in vectors of so many.
LANES = 16
# As the kernels number them.
ACTIVATIONS: dict[type[nn.Module], int] = {nn.Identity: 0, nn.ReLU: 1, nn.ReLU6: 2, nn.Hardswish: 3}
_MODULES = {number: kind() for kind, number in ACTIVATIONS.items()}


def covers_convolution(conv: Any) -> bool:
    """Whether ``conv`` is a depth-wise convolution of a kind that the kernels compute."""
    channels = conv.out_channels
    return (
        type(conv) is nn.Conv2d
        and conv.in_channels == conv.groups == channels
        and channels % LANES == 0
        and conv.kernel_size[0] == conv.kernel_size[1]
        and conv.kernel_size[0] in KERNEL_SIZES
        and conv.padding == (conv.kernel_size[0] // 2,) * 2
        and conv.stride == conv.dilation == (1, 1)
        and conv.padding_mode == "zeros"
    )


def depthwise_stage_(
    x: Tensor, weight: Tensor, bias: Tensor | None, height: int, width: int, act: int, act2: int
) -> Tensor:
    """``x = act2(conv(act(x)) + bias)`` in place; returns its means over tokens (B, D).

    A compiled graph sees one operator.
    """
    if torch.compiler.is_compiling():
        return _depthwise_stage_(x, weight, bias, height, width, act, act2)
    return _stage(x, weight, bias, height, width, act, act2)


def _stage(
    x: Tensor, weight: Tensor, bias: Tensor | None, height: int, width: int, act: int, act2: int
) -> Tensor:
    if library() is None:  # for a model that was made where there is a compiler
        y = F.conv2d(_MODULES[act](tokens_to_map(x, Grid(height, width))), weight, bias,
                     padding=weight.shape[-1] // 2, groups=len(weight))  # fmt: skip
        return x.copy_(map_to_tokens(_MODULES[act2](y))).mean(1)
    batch, tokens, channels = x.shape
    means = torch.empty((batch, channels))
    _call("depthwise", x, tokens * channels, weight, bias, None, None, None, None, x, means, None,
          batch, height, width, channels, weight.shape[-1], act, act2)  # fmt: skip
    return means


_depthwise_stage_ = torch.library.custom_op("localvit::depthwise_stage_", _stage, mutates_args=("x",))


@_depthwise_stage_.register_fake
def _(x, weight, bias, height, width, act, act2):  # type: ignore[no-untyped-def]
    return x.new_empty((x.shape[0], x.shape[2]))


def moments(x: Tensor) -> tuple[Tensor, Tensor]:
    """Mean and variance (uncorrected) for each channel."""
    batch, tokens, channels = x.shape
    means, squares = torch.empty((2, batch, channels))
    _call("moments", x, means, squares, batch, tokens, channels)
    return _mean_and_variance(means, squares, tokens)


def _mean_and_variance(means: Tensor, squares: Tensor, tokens: int) -> tuple[Tensor, Tensor]:
    """From each image's means, and squares about them (B, D)."""
    mean = means.mean(0)
    return mean, (means - mean).square_().mean(0) + squares.mean(0) / tokens


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
    batch, tokens, channels = x.shape
    y = torch.empty((batch, tokens, channels))
    means, squares = torch.empty((2, batch, channels))
    _call("depthwise", x, x.stride(0), weight, bias, scale, shift, None, None, y, means, squares,
          batch, height, width, channels, weight.shape[-1], act, 0)  # fmt: skip
    return y, *_mean_and_variance(means, squares, tokens)


def activated(x: Tensor, scale: Tensor, shift: Tensor, gate: Tensor, act: int) -> Tensor:
    """``act(x * scale + shift) * gate``, gate (B, D)."""
    batch, tokens, channels = x.shape
    y = torch.empty_like(x)
    _call("activated", x, scale, shift, gate, y, None, batch, tokens, channels, act)
    return y


def pooled(x: Tensor, scale: Tensor, shift: Tensor, act: int) -> Tensor:
    """Means over tokens of ``act(x * scale + shift)`` (B, D)."""
    batch, tokens, channels = x.shape
    means = torch.empty((batch, channels))
    _call("activated", x, scale, shift, None, None, means, batch, tokens, channels, act)
    return means


def gated_projection(
    x: Tensor, scale: Tensor, shift: Tensor, gate: Tensor, weight: Tensor, act: int
) -> Tensor:
    """``(act(x * scale + shift) * gate) @ weight.T``: (B, N, D), gate (B, D), weight (C, D) -> (B, N, C)."""
    return F.linear(activated(x, scale, shift, gate, act), weight)


def gate_sums(
    grad: Tensor, x: Tensor, scale: Tensor, shift: Tensor, mean: Tensor, deviation: Tensor, act: int
) -> Tensor:
    """As :func:`localvit.locality.kernels.triton_ops.gate_sums`."""
    batch, tokens, channels = x.shape
    out = torch.empty((5, batch, channels))
    _call("gate_sums", grad, grad.stride(0), x, scale, shift, mean, deviation, out,
          batch, tokens, channels, act)  # fmt: skip
    return out


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
    """As :func:`localvit.locality.kernels.triton_ops.depthwise_backward`."""
    batch, _, channels = x.shape
    out = torch.empty_like(x)
    sums = torch.empty((2, batch, channels))
    taps = torch.empty((batch, *weight.shape))
    k, (of_bias, of_weight) = weight.shape[-1], sums
    _call("depthwise_backward", grad, grad.stride(0), x, below, weight, *gate, *second, *first,
          out, of_bias, of_weight, taps, batch, height, width, channels, k, act, act2)  # fmt: skip
    return out, sums.sum(1), taps.sum(0)


def combine_(grad: Tensor, x: Tensor, by_grad: Tensor, by_x: Tensor, rest: Tensor) -> Tensor:
    """``grad = grad * by_grad + x * by_x + rest`` in place; vectors (D)."""
    batch, tokens, channels = x.shape
    _call("combine", grad, x, by_grad, by_x, rest, batch, tokens, channels)
    return grad


def _call(name: str, *arguments: Tensor | int | None) -> None:
    """Tensors as pointers, whose layout the caller answers for; the number of threads is added."""
    kernels = library()
    assert kernels is not None
    values: list[Any] = []
    for argument in (*arguments, torch.get_num_threads()):
        if isinstance(argument, int):
            values.append(ctypes.c_int64(argument))
        else:
            values.append(ctypes.c_void_p(None if argument is None else argument.data_ptr()))
    getattr(kernels, f"localvit_{name}")(*values)
