"""Published feed-forward networks written from their formulas, on maps (B, C, H, W).

``w`` has the weights under the names of :class:`localvit.LocalityFeedForward`; ``pw`` is a 1 x 1 convolution,
``dw`` a depth-wise one. In training, batch norms take the statistics of the batch.
"""

import math
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

Weights = dict[str, Tensor]


def leff(w: Weights, x: Tensor, training: bool) -> Tensor:
    """CeiT: GELU(BN(pw)), GELU(BN(dw)), BN(pw)."""
    x = gelu(batch_norm(w, "norm1", pw(w, "fc1", x), training))
    x = gelu(batch_norm(w, "norm2", dw(w, x), training))
    return batch_norm(w, "norm3", pw(w, "fc2", x), training)


def uformer_leff(w: Weights, x: Tensor, training: bool) -> Tensor:
    """Uformer: the same without norms."""
    return pw(w, "fc2", gelu(dw(w, gelu(pw(w, "fc1", x)))))


def irffn(w: Weights, x: Tensor, training: bool) -> Tensor:
    """CMT: BN(GELU(pw)), BN(GELU(dw + identity)), BN(pw)."""
    x = batch_norm(w, "norm1", gelu(pw(w, "fc1", x)), training)
    x = batch_norm(w, "norm2", gelu(dw(w, x) + x), training)
    return batch_norm(w, "norm3", pw(w, "fc2", x), training)


def conv_glu(w: Weights, x: Tensor, training: bool) -> Tensor:
    """TransNeXt: a, v = pw; pw(GELU(dw(a)) * v)."""
    a, v = halves(pw(w, "fc1", x))
    return pw(w, "fc2", gelu(dw(w, a)) * v)


def gdfn(w: Weights, x: Tensor, training: bool) -> Tensor:
    """Restormer: a, b = dw(pw); pw(GELU(a) * b)."""
    a, b = halves(dw(w, pw(w, "fc1", x)))
    return pw(w, "fc2", gelu(a) * b)


DESIGNS: dict[str, Callable[[Weights, Tensor, bool], Tensor]] = {
    "ceit_leff": leff,
    "uformer_leff": uformer_leff,
    "irffn": irffn,
    "conv_glu": conv_glu,
    "gdfn": gdfn,
}


def pw(w: Weights, name: str, x: Tensor) -> Tensor:
    y = torch.einsum("oc,bchw->bohw", w[f"{name}.weight"][:, :, 0, 0], x)
    return y + w[f"{name}.bias"][:, None, None] if f"{name}.bias" in w else y


def dw(w: Weights, x: Tensor) -> Tensor:
    kernel = w["conv.weight"]
    size = kernel.shape[-1]
    patches = F.unfold(x, size, padding=size // 2).unflatten(1, (x.shape[1], size * size))
    y = (patches * kernel.flatten(1)[:, :, None]).sum(2).unflatten(2, x.shape[2:])
    return y + w["conv.bias"][:, None, None] if "conv.bias" in w else y


def batch_norm(w: Weights, name: str, x: Tensor, training: bool) -> Tensor:
    mean, variance = w[f"{name}.running_mean"], w[f"{name}.running_var"]
    if training:
        mean, variance = x.mean((0, 2, 3)), x.var((0, 2, 3), unbiased=False)
    scale = w[f"{name}.weight"] / torch.sqrt(variance + 1e-5)
    return (x - mean[:, None, None]) * scale[:, None, None] + w[f"{name}.bias"][:, None, None]


def gelu(x: Tensor) -> Tensor:
    return 0.5 * x * (1 + torch.erf(x / math.sqrt(2)))


def halves(x: Tensor) -> tuple[Tensor, Tensor]:
    return x[:, : x.shape[1] // 2], x[:, x.shape[1] // 2 :]
