"""The steps of the training pass with their derivatives, as functions of tensors.

Maps are (B, C, H, W) in channels-last memory. The formulas are PyTorch's own kernels, called one by one
because the order in which they run, and what is kept between them, is chosen in
:mod:`localvit.locality.kernels.lean`.
"""

from collections.abc import Callable, Iterator
from functools import partial
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

aten = torch.ops.aten


class Activation(NamedTuple):
    """An activation: value; value in the input's memory; and gradient, from (gradient of the value, input)
    in the memory of the first."""

    value: Callable[[Tensor], Tensor]
    in_place: Callable[[Tensor], Tensor]
    gradient: Callable[[Tensor, Tensor], Tensor]


def _same(x: Tensor) -> Tensor:
    return x


def _gelu(how: str) -> Activation:
    return Activation(
        partial(aten.gelu, approximate=how),
        partial(aten.gelu_, approximate=how),
        lambda g, x: aten.gelu_backward.grad_input(g, x, approximate=how, grad_input=g),
    )


_ACTIVATIONS: dict[type[nn.Module], Activation] = {
    nn.Identity: Activation(_same, _same, lambda g, x: g),
    nn.ReLU: Activation(
        aten.relu, aten.relu_, lambda g, x: aten.threshold_backward.grad_input(g, x, 0, grad_input=g)
    ),
    nn.ReLU6: Activation(
        F.relu6, aten.relu6_, lambda g, x: aten.hardtanh_backward.grad_input(g, x, 0, 6, grad_input=g)
    ),
    nn.Hardswish: Activation(
        aten.hardswish, aten.hardswish_, lambda g, x: aten.hardswish_backward.out(g, x, out=g)
    ),
    nn.SiLU: Activation(
        aten.silu, aten.silu_, lambda g, x: aten.silu_backward.grad_input(g, x, grad_input=g)
    ),
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

    def moved(self, mean: Tensor, var: Tensor, count: int) -> None:
        """Move the running statistics by those of a batch of ``count`` values a channel."""
        if self.running_mean is not None and self.running_var is not None:
            self.running_mean.lerp_(mean, self.momentum)
            self.running_var.lerp_(var * (count / (count - 1)), self.momentum)

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


class Stage(NamedTuple):
    """A norm and an activation that have run once and run again, on maps (B, D, H, W), in the backward pass.

    On the CPU it goes through a batch in pieces that stay in the cache, because these steps move memory
    and compute little. ``norm`` is ``None``, and so are its tensors, where there is none.
    """

    norm: Norm | None
    act: Activation
    weight: Tensor | None = None
    bias: Tensor | None = None
    mean: Tensor | None = None
    var: Tensor | None = None

    def value(self, x: Tensor, scale: Tensor | None = None) -> Tensor:
        """The activated map, times ``scale`` (B, D, 1, 1)."""
        out, affine = torch.empty_like(x), self._affine_map()
        for y, piece, factor in _pieces(out, x, scale):
            self.act.in_place(_normalise(piece, affine, y))
            if factor is not None:
                y.mul_(factor)
        return out

    def pooled(self, grad: Tensor, x: Tensor) -> Tensor:
        """Sums over the lattice of ``grad`` times the activated map (B, D)."""
        affine, sums = self._affine_map(), []
        for g, piece in _pieces(grad, x):
            value = self.act.in_place(_normalise(piece, affine, torch.empty_like(piece)))
            sums.append(value.mul_(g).sum((2, 3)))
        return torch.cat(sums)

    def gradients(
        self, grad: Tensor, x: Tensor, scale: Tensor | None = None, shift: Tensor | None = None
    ) -> tuple[Tensor, Tensor | None, Tensor | None]:
        """Gradients of ``x`` (in the memory of ``grad``), of the norm's weight and of its bias.

        ``grad`` is that of the activated map; if ``scale`` and ``shift`` (B, D, 1, 1) are given,
        ``grad * scale + shift`` is.
        """
        affine, sums = self._affine_map(), []
        for g, piece, factor, term in _pieces(grad, x, scale, shift):
            if factor is not None:
                torch.addcmul(term, g, factor, out=g)
            self.act.gradient(g, _normalise(piece, affine, torch.empty_like(piece)))
            if self.norm is not None:
                sums.append(self._sums(g, piece))
        if not sums:
            return grad, None, None
        of_weight, of_bias = (torch.stack(parts).sum(0) for parts in zip(*sums, strict=True))
        self.through_norm(grad, x, of_weight, of_bias)
        return grad, of_weight, of_bias

    def _affine_map(self) -> tuple[Tensor, Tensor] | None:
        if self.norm is None:
            return None
        scale, shift = self.affine()
        return _channels(scale), _channels(shift)

    def affine(self) -> tuple[Tensor, Tensor]:
        """The norm as scale and shift (D)."""
        assert self.weight is not None
        assert self.bias is not None
        assert self.mean is not None
        scale = self.weight * self.deviation()
        return scale, self.bias - self.mean * scale

    def _sums(self, grad: Tensor, x: Tensor) -> tuple[Tensor, Tensor]:
        """What a piece adds to the gradients of the norm's weight and bias."""
        assert self.norm is not None
        statistics = (
            self.mean,
            self.var,
            self.mean,
            self.deviation(),
            True,
            self.norm.eps,
            [False, True, True],
        )
        return aten.native_batch_norm_backward(grad, x, self.weight, *statistics)[1:]

    def through_norm(self, grad: Tensor, x: Tensor, of_weight: Tensor, of_bias: Tensor) -> None:
        by_grad, by_x, rest = map(_channels, self.coefficients(x, of_weight, of_bias))
        assert self.norm is not None
        if not self.norm.batch:
            grad.mul_(by_grad)
            return
        for g, piece in _pieces(grad, x):
            torch.addcmul(torch.addcmul(rest, piece, by_x), g, by_grad, out=g)

    def coefficients(self, x: Tensor, of_weight: Tensor, of_bias: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """The gradient of ``x`` is that of the normalised map times the first, plus ``x`` times the second,
        plus the third (D each). The last two are zero if running statistics, which are constants, normalise.
        """
        assert self.norm is not None
        assert self.weight is not None
        assert self.mean is not None
        deviation = self.deviation()
        by_grad = self.weight * deviation
        if not self.norm.batch:
            return by_grad, torch.zeros_like(by_grad), torch.zeros_like(by_grad)
        count = x.numel() // len(by_grad)
        by_x = -by_grad * deviation * of_weight / count
        return by_grad, by_x, -by_grad * of_bias / count - by_x * self.mean

    def deviation(self) -> Tensor:
        """One over the standard deviation (D)."""
        assert self.norm is not None
        assert self.var is not None
        return (self.var + self.norm.eps).rsqrt()


def _channels(values: Tensor) -> Tensor:
    return values[:, None, None]


def _normalise(x: Tensor, affine: tuple[Tensor, Tensor] | None, out: Tensor) -> Tensor:
    """``x`` by scale and shift, in the memory of ``out``."""
    return out.copy_(x) if affine is None else torch.addcmul(affine[1], x, affine[0], out=out)


# Bytes of a map that are gone through at once on a CPU: several such pieces fit into a core's own cache.
_PIECE = 2**19


def _pieces(first: Tensor, *others: Tensor | None) -> Iterator[tuple[Any, ...]]:
    """Tensors with a batch dimension, a few images at a time; ``None`` stays ``None``."""
    batch = first.shape[0]
    size = batch if first.is_cuda else max(1, _PIECE * batch // (first.numel() * first.element_size()))
    for i in range(0, batch, size):
        yield tuple(None if t is None else t[i : i + size] for t in (first, *others))


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
