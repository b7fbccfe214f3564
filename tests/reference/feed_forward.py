"""The locality feed-forward network written out, one token and one kernel tap at a time.

No nn.Module, no convolution, no view: slow and plain, to compare the real one with.
"""

import math

import torch
from torch import Tensor

from localvit.locality.config import LocalityConfig

_ACTIVATIONS = {
    "none": lambda x: x,
    "relu": lambda x: x.clamp(min=0),
    "relu6": lambda x: x.clamp(0, 6),
    "hardswish": lambda x: x * (x + 3).clamp(0, 6) / 6,
    "gelu": lambda x: 0.5 * x * (1 + torch.erf(x / math.sqrt(2))),
    "gelu_tanh": lambda x: 0.5 * x * (1 + torch.tanh(math.sqrt(2 / math.pi) * (x + 0.044715 * x**3))),
    "silu": lambda x: x / (1 + torch.exp(-x)),
}


def feed_forward(
    weights: dict[str, Tensor], config: LocalityConfig, tokens: Tensor, height: int, width: int, prefix: int
) -> Tensor:
    """Branch output for ``tokens`` (B, P + N, C), with batch norms in evaluation mode."""
    config = config.resolve()
    acts = config.activation if isinstance(config.activation, tuple) else (config.activation,) * 2
    acts = acts if config.glu == "none" else ("none", "none")
    norms = config.norm if isinstance(config.norm, tuple) else (config.norm,) * 3
    takes_mlp = config.prefix == "pointwise"
    x = tokens if takes_mlp else tokens[:, prefix:]
    riding = prefix if takes_mlp else 0

    def convolve(x: Tensor) -> Tensor:
        patches = x[:, riding:]
        y = taps(patches, weights["conv.weight"], weights.get("conv.bias"), height, width)
        if config.inner_skip:
            y = y + patches
        y = _normalise(y, norms[1], weights, "norm2", config, acts[1])
        is_linear = config.position == "mid" and acts[0] == "none"
        past = _ACTIVATIONS[acts[1] if is_linear else "none"](x[:, :riding])
        return torch.cat([past, y], dim=1)

    if config.depthwise and config.position == "first":
        x = convolve(x)
    x = _linear(x, weights, "fc1")
    x = _normalise(x, norms[0], weights, "norm1", config, acts[0])
    hidden = weights["fc2.weight"].shape[1]
    if config.depthwise and config.position == "mid":
        kept = x[..., hidden:] if config.glu == "gate" else x[..., :0]
        x = torch.cat([convolve(x[..., : x.shape[-1] - kept.shape[-1]]), kept], dim=2)
    if config.glu != "none":
        x = _ACTIVATIONS[config.activation](x[..., :hidden]) * x[..., hidden:]
    patches = x[:, riding:]
    gated = patches * _gate(patches, weights, config)[:, None]
    x = _linear(torch.cat([x[:, :riding], gated], dim=1), weights, "fc2")
    x = _norm(x, norms[2], weights, "norm3", config)

    if takes_mlp:
        return x
    first = tokens[:, :prefix]
    return torch.cat([first if config.prefix == "identity" else torch.zeros_like(first), x], dim=1)


def _linear(x: Tensor, weights: dict[str, Tensor], name: str) -> Tensor:
    y = x @ weights[f"{name}.weight"].flatten(1).T
    return y + weights[f"{name}.bias"] if f"{name}.bias" in weights else y


def taps(x: Tensor, kernel: Tensor, bias: Tensor | None, height: int, width: int) -> Tensor:
    size = kernel.shape[-1]
    out = torch.zeros_like(x)
    for row in range(height):
        for column in range(width):
            for i in range(size):
                for j in range(size):
                    r, c = row + i - size // 2, column + j - size // 2
                    if 0 <= r < height and 0 <= c < width:
                        out[:, row * width + column] += x[:, r * width + c] * kernel[:, 0, i, j]
    return out if bias is None else out + bias


def _normalise(
    x: Tensor, kind: str, weights: dict[str, Tensor], name: str, config: LocalityConfig, act: str
) -> Tensor:
    if config.norm_order == "norm-act":
        return _ACTIVATIONS[act](_norm(x, kind, weights, name, config))
    return _norm(_ACTIVATIONS[act](x), kind, weights, name, config)


def _norm(x: Tensor, kind: str, weights: dict[str, Tensor], name: str, config: LocalityConfig) -> Tensor:
    if kind == "none":
        return x
    if kind == "batch":
        mean, variance, eps = weights[f"{name}.running_mean"], weights[f"{name}.running_var"], 1e-5
    elif kind == "layer":
        mean, variance, eps = x.mean(-1, keepdim=True), x.var(-1, keepdim=True, unbiased=False), 1e-6
    else:  # group: over all tokens and the channels of a group
        groups = x.unflatten(-1, (config.norm_groups, -1))
        mean = groups.mean((1, 3), keepdim=True).expand_as(groups).flatten(2)
        variance = groups.var((1, 3), keepdim=True, unbiased=False).expand_as(groups).flatten(2)
        eps = 1e-5
    return (x - mean) / torch.sqrt(variance + eps) * weights[f"{name}.weight"] + weights[f"{name}.bias"]


def _gate(patches: Tensor, weights: dict[str, Tensor], config: LocalityConfig) -> Tensor:
    if config.gate == "none":
        return torch.ones_like(patches[:, 0])
    pooled = patches.mean(1)
    if config.gate == "se":
        squeezed = _linear(pooled, weights, "gate.fc1").clamp(min=0)
        return (_linear(squeezed, weights, "gate.fc2") + 3).clamp(0, 6) / 6
    kernel = weights["gate.conv.weight"][0, 0]
    padded = torch.nn.functional.pad(pooled, (len(kernel) // 2,) * 2)
    mixed = sum(k * padded[:, i : i + pooled.shape[1]] for i, k in enumerate(kernel))
    return (mixed + 3).clamp(0, 6) / 6 if config.gate == "eca_hard" else 1 / (1 + torch.exp(-mixed))
