"""Linear layers by oneDNN, whose weights are put into its own order first.

PyTorch's BLAS on x86 is Intel's MKL, and on other makers' processors oneDNN is faster. The operators are
private to PyTorch, so they are looked for and tried before they are used.
"""

import os
from functools import lru_cache
from typing import Literal, get_args

import torch
import torch.nn.functional as F
from torch import Tensor

from localvit.locality.kernels.processor import processor

Route = Literal["linear", "conv", "packed"]
VARIABLE = "LOCALVIT_LINEAR"

# Rows for which it pays to reorder weights that are used once: about 16 images of a plain transformer.
_ROWS = 3072


def pack(weight: Tensor) -> Tensor:
    """Weights in oneDNN's own order."""
    packed: Tensor = torch.ops.mkldnn._reorder_linear_weight(weight.detach(), None)
    return packed


def packed_linear(x: Tensor, packed: Tensor, bias: Tensor | None) -> Tensor:
    """``F.linear`` with weights from :func:`pack`."""
    return torch.ops.mkldnn._linear_pointwise.default(x, packed, bias, "none", [], "")


@lru_cache(maxsize=1)
def packed_available() -> bool:
    """Whether this PyTorch has the private operators and they compute what they should."""
    try:
        x, weight, bias = torch.randn(3, 5), torch.randn(4, 5), torch.randn(4)
        y = packed_linear(x, pack(weight), bias)
        return torch.allclose(y, F.linear(x, weight, bias), atol=1e-5)
    except (AttributeError, RuntimeError, TypeError, NotImplementedError):
        return False


def chosen_route(argument: Route | None = None) -> Route | None:
    """The route that the caller, else the environment, asks for; ``None`` where neither does.

    Raises:
        ValueError: for a value that is none of the routes.
    """
    source, value = ("linear", argument) if argument is not None else (VARIABLE, os.environ.get(VARIABLE))
    if not value:
        return None
    if value not in get_args(Route):
        raise ValueError(f"{source}={value!r} is not accepted (accepted: {', '.join(get_args(Route))})")
    return value  # type: ignore[return-value]


def plain_linear(x: Tensor, weight: Tensor, bias: Tensor | None, memory: Tensor | None) -> Tensor:
    """``F.linear``; ``memory`` of the result's shape may be taken for it, because fresh memory costs more
    time on a CPU than it takes to fill. Then there is no ``bias``."""
    if memory is None:
        return F.linear(x, weight, bias)
    torch.mm(x.flatten(0, -2), weight.t(), out=memory.view(-1, memory.shape[-1]))
    return memory


def linear_once(
    x: Tensor, weight: Tensor, bias: Tensor | None = None, memory: Tensor | None = None
) -> Tensor:
    """:func:`plain_linear` for weights that change before they are used again, single precision on the CPU.

    A rule decides, not a timing, so that a training run has the same bits whenever it runs on a machine:
    oneDNN for many rows where the processor is not Intel's, or where ``LOCALVIT_LINEAR=packed`` says so.
    """
    if x.numel() // x.shape[-1] < _ROWS or not _prefers_packed():
        return plain_linear(x, weight, bias, memory)
    return packed_linear(x, pack(weight.contiguous()), bias)


def _prefers_packed() -> bool:
    asked = chosen_route()
    wanted = _not_intel() if asked is None else asked == "packed"
    return wanted and packed_available()


@lru_cache(maxsize=1)
def _not_intel() -> bool:
    """Whether the processor says that another maker than Intel made it."""
    return processor("vendor_id") not in (None, "GenuineIntel")
