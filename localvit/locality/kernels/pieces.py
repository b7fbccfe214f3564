"""The steps of the training pass with their derivatives, as functions of tensors.

Maps are (B, C, H, W) in channels-last memory. The formulas are PyTorch's own kernels, called one by one
because the order in which they run, and what is kept between them, is chosen in
:mod:`localvit.locality.kernels.lean`.
"""

from collections.abc import Callable
from functools import partial
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

aten = torch.ops.aten


class Activation(NamedTuple):
    """An activation: value, value in place, and gradient from (gradient of the value, input)."""

    value: Callable[[Tensor], Tensor]
    in_place: Callable[[Tensor], Tensor]
    gradient: Callable[[Tensor, Tensor], Tensor]


def _same(x: Tensor) -> Tensor:
    return x


def _gelu(approximate: str) -> Activation:
    functions = (aten.gelu, aten.gelu_, aten.gelu_backward)
    return Activation(*(partial(function, approximate=approximate) for function in functions))


_ACTIVATIONS: dict[type[nn.Module], Activation] = {
    nn.Identity: Activation(_same, _same, lambda g, x: g),
    nn.ReLU: Activation(aten.relu, aten.relu_, lambda g, x: aten.threshold_backward(g, x, 0)),
    nn.ReLU6: Activation(F.relu6, aten.relu6_, lambda g, x: aten.hardtanh_backward(g, x, 0, 6)),
    nn.Hardswish: Activation(aten.hardswish, aten.hardswish_, aten.hardswish_backward),
    nn.SiLU: Activation(aten.silu, aten.silu_, aten.silu_backward),
}
ACTIVATION_TYPES = (*_ACTIVATIONS, nn.GELU)


def activation(layer: nn.Module) -> Activation:
    return _gelu(layer.approximate) if isinstance(layer, nn.GELU) else _ACTIVATIONS[type(layer)]


class Norm(NamedTuple):
    """How one batch norm normalises in this pass.

    ``batch``: by the statistics of the batch; else by the running ones, which are then constants.
    """

    batch: bool
    eps: float
    momentum: float
    running_mean: Tensor | None
    running_var: Tensor | None

    def __call__(self, x: Tensor, weight: Tensor, bias: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Normalised map, mean and variance (C); moves the running statistics where it should."""
        running = (self.running_mean, self.running_var)
        if not self.batch:
            assert self.running_mean is not None
            assert self.running_var is not None
            y = torch.native_batch_norm(x, weight, bias, *running, False, 0.0, self.eps)[0]
            return y, self.running_mean.clone(), self.running_var.clone()
        y, mean, deviation = torch.native_batch_norm(x, weight, bias, *running, True, self.momentum, self.eps)
        return y, mean, deviation.pow(-2).sub_(self.eps)

    def again(self, x: Tensor, weight: Tensor, bias: Tensor, mean: Tensor, var: Tensor) -> Tensor:
        """The normalised map once more."""
        return torch.native_batch_norm(x, weight, bias, mean, var, False, 0.0, self.eps)[0]

    def gradients(
        self, grad: Tensor, x: Tensor, weight: Tensor, mean: Tensor, var: Tensor
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Gradients of the input, the weight and the bias."""
        deviation = (var + self.eps).rsqrt()
        return aten.native_batch_norm_backward(
            grad, x, weight, mean, var, mean, deviation, self.batch, self.eps, [True, True, True]
        )


def norm_mode(layer: nn.BatchNorm2d) -> bool:
    """Whether ``layer`` normalises by the statistics of the batch now."""
    return layer.training or (layer.running_mean is None and layer.running_var is None)


def norm_of(layer: nn.BatchNorm2d) -> Norm:
    """What ``layer`` does in a forward pass now. Counts the batch, as its own forward would."""
    tracks = layer.training and layer.track_running_stats
    momentum = layer.momentum
    if tracks and layer.num_batches_tracked is not None:
        layer.num_batches_tracked.add_(1)
        if momentum is None:
            momentum = 1.0 / float(layer.num_batches_tracked)
    keeps = not layer.training or layer.track_running_stats
    mean, var = (layer.running_mean, layer.running_var) if keeps else (None, None)
    return Norm(norm_mode(layer), layer.eps, momentum if momentum is not None else 0.0, mean, var)


def convolution_gradients(
    grad: Tensor, x: Tensor, weight: Tensor, mask: list[bool], padding: int = 0
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of the input, the weight and the bias of a point-wise or depth-wise convolution.

    ``mask`` says which are wanted; the others are ``None``.
    """
    groups = x.shape[1] // weight.shape[1]
    bias = [weight.shape[0]] if mask[2] else None
    return aten.convolution_backward(
        grad, x, weight, bias, [1, 1], [padding] * 2, [1, 1], False, [0, 0], groups, mask
    )


def se_gate(pooled: Tensor, parameters: dict[str, Tensor]) -> Tensor:
    """Gate values (B, D) of squeeze-and-excitation with a hard sigmoid, from means (B, D)."""
    p = parameters
    squeezed = F.relu(F.linear(pooled, p["gate.fc1.weight"].flatten(1), p.get("gate.fc1.bias")))
    return F.relu6(F.linear(squeezed, p["gate.fc2.weight"].flatten(1), p.get("gate.fc2.bias")) + 3.0) / 6.0


def eca_gate(pooled: Tensor, parameters: dict[str, Tensor], hard: bool) -> Tensor:
    """The same of efficient channel attention."""
    weight = parameters["gate.conv.weight"]
    y = F.conv1d(pooled.unsqueeze(1), weight, padding=weight.shape[-1] // 2).squeeze(1)
    return F.relu6(y + 3.0) / 6.0 if hard else torch.sigmoid(y)
