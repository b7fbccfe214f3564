"""Layers of a configuration: activations, norms, channel gates, the depth-wise convolution."""

from collections.abc import Callable
from functools import partial

import torch.nn.functional as F
from timm.layers import EcaModule, LayerNorm2d, SqueezeExcite
from torch import Tensor, nn

from localvit.errors import ConfigError
from localvit.locality.config import DEFAULT_GATE_WIDTH, LocalityConfig

ACTIVATIONS: dict[str, Callable[[], nn.Module]] = {
    "none": nn.Identity,
    "relu": nn.ReLU,
    "relu6": nn.ReLU6,
    "hardswish": nn.Hardswish,
    "gelu": nn.GELU,
    "gelu_tanh": partial(nn.GELU, approximate="tanh"),
    "silu": nn.SiLU,
}


class HardSigmoid(nn.Module):
    """Hard sigmoid `relu6(x + 3) / 6`. PyTorch's own has 1/6 in float32 in its backward pass, a relative
    error of 1e-8 in float64.
    """

    def forward(self, x: Tensor) -> Tensor:
        return F.relu6(x + 3.0) / 6.0


# Number of weights up to which `F.linear` computes a point-wise layer: there the call takes longer than the
# arithmetic (`python benchmarks/old_new.py`, tiny models), and a convolution's call three times as long.
SMALL_POINTWISE = 2**14


class Pointwise(nn.Conv2d):
    """1 x 1 convolution of a map `(B, C, H, W)`; a small one is computed by `F.linear`."""

    def __init__(self, in_channels: int, out_channels: int, bias: bool) -> None:
        super().__init__(in_channels, out_channels, 1, bias=bias)
        self.small = in_channels * out_channels <= SMALL_POINTWISE

    def forward(self, x: Tensor) -> Tensor:
        if not self.small:
            return self._conv_forward(x, self.weight, self.bias)
        y = F.linear(x.permute(0, 2, 3, 1), self.weight.flatten(1), self.bias)
        return y.permute(0, 3, 1, 2)


def depthwise(channels: int, kernel_size: int, bias: bool) -> nn.Conv2d:
    """Make a depth-wise convolution that preserves the size of the map."""
    return nn.Conv2d(channels, channels, kernel_size, padding=kernel_size // 2, groups=channels, bias=bias)


def norm(kind: str, channels: int, config: LocalityConfig) -> nn.Module:
    """Make a norm of this kind for a map of this many channels."""
    if kind == "batch":
        return nn.BatchNorm2d(channels)
    if kind == "layer":
        return LayerNorm2d(channels)
    if kind == "group":
        if channels % config.norm_groups:
            raise ConfigError(
                f"norm_groups={config.norm_groups} does not divide {channels} channels; use a divisor"
            )
        return nn.GroupNorm(config.norm_groups, channels)
    return nn.Identity()


def channel_gate(dim: int, hidden: int, config: LocalityConfig) -> nn.Module | None:
    """Make the channel gate of a hidden map of `hidden` channels, for tokens of width `dim`."""
    if config.gate in ("eca", "eca_hard"):
        return EcaModule(hidden, gate_layer=HardSigmoid if config.gate == "eca_hard" else nn.Sigmoid)
    if config.gate != "se":
        return None
    width = config.gate_width or DEFAULT_GATE_WIDTH
    if config.gate_reduction is not None:
        width = int(hidden // (dim if config.gate_reduction == "dim" else config.gate_reduction))
        if width < 1:
            raise ConfigError(
                f"gate_reduction={config.gate_reduction} of {hidden} hidden channels leaves no squeeze unit; "
                f"use at most {hidden}"
            )
    return SqueezeExcite(hidden, rd_channels=width, gate_layer=HardSigmoid)
