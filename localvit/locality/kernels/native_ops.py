"""The kernels of ``native/native.cpp`` as PyTorch operators, named as those of ``triton_ops``.

Maps are tokens (B, N, D) in raster order of a lattice of ``height`` rows and ``width`` columns, in single
precision on the CPU, dense. Sums are the same from run to run and for any number of threads.

No operator has a derivative of its own: :mod:`localvit.locality.kernels.native_steps` is the derivative.
"""

import ctypes
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from localvit.locality.grid import Grid, map_to_tokens, tokens_to_map
from localvit.locality.kernels.native_build import library
from localvit.locality.kernels.packed import linear_once

KERNEL_SIZES = (3, 5, 7)
# Channels come in vectors of so many.
LANES = 16
# As the kernels number them.
ACTIVATIONS: dict[type[nn.Module], int] = {nn.Identity: 0, nn.ReLU: 1, nn.ReLU6: 2, nn.Hardswish: 3}
_MODULES = {number: kind() for kind, number in ACTIVATIONS.items()}


def covers_convolution(conv: Any) -> bool:
    """Whether ``conv`` is a depth-wise convolution of a kind that the kernels compute."""
    if type(conv) is not nn.Conv2d:
        return False
    k, channels = conv.kernel_size[0], conv.out_channels
    like_ours = nn.Conv2d(channels, channels, k, padding=k // 2, groups=channels, device="meta")
    settings = ("kernel_size", "padding", "stride", "dilation", "groups", "in_channels", "padding_mode")
    if any(getattr(conv, name) != getattr(like_ours, name) for name in settings):
        return False
    return k in KERNEL_SIZES and channels % LANES == 0


def _stage_in_place(
    x: Tensor,
    shift: Tensor | None,
    weight: Tensor,
    bias: Tensor | None,
    gate: list[Tensor],
    height: int,
    width: int,
    act: int,
    act2: int,
) -> Tensor:
    """``x = act2(conv(act(x + shift)) + bias)`` in place; returns its means over the lattice (B, D).

    Tokens before the last ``height * width`` are prefix tokens, and stay what they were.

    ``gate``: none, or weights and biases (R, D), (R), (D, R), (D) of the linear layers in
    ``clamp(second(relu(first(means))), 0, 1)``, which is then multiplied into ``x``.
    """
    batch, tokens, channels = x.shape
    prefix = tokens - height * width
    if prefix < 0:
        raise ValueError(f"{tokens} tokens for a lattice of {height} x {width}")
    if library() is None:
        return _plain_stage_in_place(x[:, prefix:], shift, weight, bias, gate, Grid(height, width), act, act2)
    means = torch.empty((batch, channels))
    layers = gate or (None, None, None, None)
    _call("depthwise", x, weight, bias, None, shift, x, means, None, *layers, batch, prefix, height, width,
          channels, len(gate[0]) if gate else 0, weight.shape[-1], act, act2)  # fmt: skip
    return means


def _plain_stage_in_place(
    patches: Tensor,
    shift: Tensor | None,
    weight: Tensor,
    bias: Tensor | None,
    gate: list[Tensor],
    lattice: Grid,
    act: int,
    act2: int,
) -> Tensor:
    """For a model that was fused where there is a compiler, and runs where there is none."""
    h = _MODULES[act](patches if shift is None else patches + shift)
    h = F.conv2d(tokens_to_map(h, lattice), weight, bias, padding=weight.shape[-1] // 2, groups=len(weight))
    patches.copy_(map_to_tokens(_MODULES[act2](h)))
    means = patches.mean(1)
    if gate:
        first, first_bias, second, second_bias = gate
        factors = F.linear(F.linear(means, first, first_bias).relu_(), second, second_bias).clamp_(0.0, 1.0)
        patches.mul_(factors.unsqueeze(1))
    return means


# Not by `custom_op`, which takes three times as long to call: a model calls it in every block.
torch.library.define(
    "localvit::depthwise_stage_",
    "(Tensor(a!) x, Tensor? shift, Tensor weight, Tensor? bias, Tensor[] gate, int height, int width,"
    " int act, int act2) -> Tensor",
)
torch.library.impl("localvit::depthwise_stage_", "cpu", _stage_in_place)
depthwise_stage_ = torch.ops.localvit.depthwise_stage_.default


@torch.library.register_fake("localvit::depthwise_stage_")
def _(x, shift, weight, bias, gate, height, width, act, act2):  # type: ignore[no-untyped-def]
    return x.new_empty((x.shape[0], x.shape[2]))


@torch.library.custom_op("localvit::native_moments", mutates_args=())
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


@torch.library.custom_op("localvit::native_depthwise", mutates_args=())
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
    y = torch.empty_like(x)
    means, squares = torch.empty((2, batch, channels))
    _call("depthwise", x, weight, bias, scale, shift, y, means, squares, None, None, None, None,
          batch, 0, height, width, channels, 0, weight.shape[-1], act, 0)  # fmt: skip
    return y, *_mean_and_variance(means, squares, tokens)


@torch.library.custom_op("localvit::native_activated", mutates_args=())
def activated(x: Tensor, scale: Tensor, shift: Tensor, gate: Tensor, act: int) -> Tensor:
    """``act(x * scale + shift) * gate``, gate (B, D)."""
    batch, tokens, channels = x.shape
    y = torch.empty_like(x)
    _call("activated", x, scale, shift, gate, y, None, batch, tokens, channels, act)
    return y


@torch.library.custom_op("localvit::native_pooled", mutates_args=())
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
    return linear_once(activated(x, scale, shift, gate, act), weight)


@torch.library.custom_op("localvit::native_gate_sums", mutates_args=())
def gate_sums(
    grad: Tensor, x: Tensor, scale: Tensor, shift: Tensor, mean: Tensor, deviation: Tensor, act: int
) -> Tensor:
    """As :func:`localvit.locality.kernels.triton_ops.gate_sums`."""
    batch, tokens, channels = x.shape
    out = torch.empty((5, batch, channels))
    _call("gate_sums", grad, x, scale, shift, mean, deviation, out, batch, tokens, channels, act)
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
    """As :func:`localvit.locality.kernels.triton_ops.depthwise_backward`, in the memory of ``grad``."""
    sums, taps = _depthwise_backward_(
        grad, x, below, weight, [*gate, *second, *first], height, width, act, act2
    )
    return grad, sums, taps


@torch.library.custom_op("localvit::native_depthwise_backward_", mutates_args=("grad",))
def _depthwise_backward_(
    grad: Tensor,
    x: Tensor,
    below: Tensor,
    weight: Tensor,
    vectors: list[Tensor],
    height: int,
    width: int,
    act: int,
    act2: int,
) -> tuple[Tensor, Tensor]:
    batch, _, channels = x.shape
    of_bias, of_weight = torch.empty((2, batch, channels))
    taps = torch.empty((batch, *weight.shape))
    _call("depthwise_backward", grad, x, below, weight, *vectors, of_bias, of_weight, taps,
          batch, height, width, channels, weight.shape[-1], act, act2)  # fmt: skip
    return torch.stack([of_bias.sum(0), of_weight.sum(0)]), taps.sum(0)


@torch.library.custom_op("localvit::native_combine_", mutates_args=("grad",))
def combine_(grad: Tensor, x: Tensor, by_grad: Tensor, by_x: Tensor, rest: Tensor) -> None:
    """``grad = grad * by_grad + x * by_x + rest`` in place; vectors (D)."""
    batch, tokens, channels = x.shape
    _call("combine", grad, x, by_grad, by_x, rest, batch, tokens, channels)


def _call(name: str, *arguments: Tensor | int | None) -> None:
    """Tensors as pointers; the number of threads is added.

    Raises:
        ValueError: for a tensor that is not one of single precision on the CPU, or has gaps.
    """
    function = getattr(library(), f"localvit_{name}")
    values = []
    for value in arguments:
        if not isinstance(value, Tensor):
            values.append(value or 0)
        elif value.dtype is torch.float32 and value.is_cpu and value.is_contiguous():
            values.append(value.data_ptr())
        else:
            raise ValueError(
                f"{name}: {value.dtype} on {value.device} with strides {value.stride()} is not accepted "
                "(accepted: dense float32 on the CPU)"
            )
    if function.argtypes is None:  # once: integers of 64 bits, which pointers are too
        function.argtypes = [ctypes.c_int64] * (len(values) + 1)
    function(*values, torch.get_num_threads())
