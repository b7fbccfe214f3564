"""Folding of batch norm into the layer before it, of an added input into a depth-wise kernel, and of
LayerScale into a projection. Sums are in float64, so that folding adds no error of its own.
"""

from typing import Any, Self

import torch
from torch import Tensor, nn
from torchvision.ops import FrozenBatchNorm2d

# Exactly these: a subclass (timm's BatchNormAct2d) may do more than normalise.
BATCH_NORMS = (nn.BatchNorm2d, nn.SyncBatchNorm, FrozenBatchNorm2d)


class InferenceOnly(nn.Module):
    """Module for inference only, because layers were folded."""

    def train(self, mode: bool = True) -> Self:
        """Stay in evaluation mode.

        Raises:
            RuntimeError: for training mode.
        """
        if mode:
            raise RuntimeError(
                f"{type(self).__name__} is for inference only; train the original model and fuse it again "
                "(localvit.fuse returns a copy)"
            )
        return super().train(False)


def has_statistics(norm: nn.Module) -> bool:
    """Return whether `norm` is a batch norm that normalises by recorded statistics in evaluation."""
    return type(norm) in BATCH_NORMS and getattr(norm, "running_mean", None) is not None


def affine_of(norm: Any) -> tuple[Tensor, Tensor]:
    """Return scale and shift per channel of a batch norm with recorded statistics, in float64."""
    mean, var = norm.running_mean.double(), norm.running_var.double()
    scale = (var + norm.eps).rsqrt()
    if norm.weight is not None:
        scale = scale * norm.weight.double()
    shift = -mean * scale
    return scale, shift if norm.bias is None else shift + norm.bias.double()


@torch.no_grad()
def rescale(layer: nn.Linear | nn.Conv2d, scale: Tensor, shift: Tensor | None = None) -> None:
    """Make `layer` give `scale * output + shift` per output channel, in place."""
    weight = layer.weight.double() * scale.double().view(-1, *[1] * (layer.weight.dim() - 1))
    bias = 0 if layer.bias is None else layer.bias.double() * scale.double()
    bias = bias if shift is None else bias + shift
    layer.weight = _frozen(weight, layer.weight)
    if isinstance(bias, Tensor):
        layer.bias = _frozen(bias, layer.weight)


@torch.no_grad()
def add_input(conv: nn.Conv2d) -> None:
    """Make a depth-wise convolution of odd size give `output + input`, in place."""
    weight = conv.weight.double()
    weight[:, 0, weight.shape[2] // 2, weight.shape[3] // 2] += 1
    conv.weight = _frozen(weight, conv.weight)


def _frozen(value: Tensor, like: Tensor) -> nn.Parameter:
    return nn.Parameter(value.to(like.dtype), requires_grad=False)
