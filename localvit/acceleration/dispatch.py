"""Dispatch of a feed-forward network's branch to native kernels, checkpointing or plain modules."""

from operator import attrgetter
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from localvit.acceleration.kernels import plain_kernels
from localvit.acceleration.memory import can_checkpoint, checkpointed
from localvit.acceleration.native.form import NativeForm, is_dense, native_form
from localvit.acceleration.native.mix import BATCH, mixed, norm_now, not_saved
from localvit.locality import Grid, LocalityFeedForward, map_to_tokens, tokens_to_row

FEW_TOKENS = 256
"""Number of patch tokens up to which calls take longer than arithmetic in a small feed-forward network."""

# The methods that the native kernels replace.
_STAGES = ("transform", "expand", "mix", "_convolve", "project")
_stages = attrgetter(*_STAGES)
_ours = _stages(LocalityFeedForward)


def accelerated(ffn: Any, x: Tensor, grid: Grid) -> Tensor | None:
    """Compute `ffn.transform(x, grid)` by the form that applies; `None` for plain modules."""
    if not isinstance(ffn, LocalityFeedForward):
        return None
    form = training_form(ffn, x)
    if form is not None and grid.num_prefix_tokens == 0 and _computable(form, x) and _is_worth(form, grid):
        return _natively(form, ffn, x, grid)
    return checkpointed(ffn, x, grid) if ffn.selective_checkpointing and can_checkpoint(x) else None


def training_form(ffn: LocalityFeedForward, x: Tensor) -> NativeForm | None:
    """Return the form with which native kernels can compute all of `ffn.mix` now, else `None`."""
    if plain_kernels() or not _are_ours(ffn):
        return None
    form = native_form(ffn, x)
    return None if form is None or None in form.numbers else form


def _are_ours(ffn: LocalityFeedForward) -> bool:
    """Return whether no subclass or patch overrides the stages."""
    return _stages(type(ffn)) == _ours and ffn.__dict__.keys().isdisjoint(_STAGES)


def _computable(form: NativeForm, x: Tensor) -> bool:
    """Return whether there are tokens, and more than one value per channel for batch statistics, which
    PyTorch's batch norm requires.
    """
    tokens = x.shape[0] * x.shape[1]
    return tokens > 1 or (tokens == 1 and not any(norm_now(norm).mode >= BATCH for norm in form.norms))


def _is_worth(form: NativeForm, grid: Grid) -> bool:
    """Return whether the kernels are used: always for gradients, otherwise in small models with few tokens,
    where most of the time is spent calling plain modules.

    Other models stay plain without gradients: their published numbers are those of plain modules, a traced
    graph has equal bits, and users who need speed fuse them.
    """
    return torch.is_grad_enabled() or (form.small and grid.height * grid.width <= FEW_TOKENS)


def _natively(form: NativeForm, ffn: LocalityFeedForward, x: Tensor, grid: Grid) -> Tensor:
    direct = form.direct()
    hidden = _linear(ffn, "fc1", x) if direct else ffn.expand(x)
    if not is_dense(hidden):
        hidden = hidden.contiguous()
    expected = is_dense(hidden) and hidden.shape == (len(x), grid.height * grid.width, form.channels)
    y = mixed(form, ffn, hidden, grid) if expected else None  # the expansion may have been replaced
    if y is None:
        return ffn.project(ffn.mix(hidden, grid))
    hooks: Any = torch._C._autograd
    if y.grad_fn is None or not hooks._saved_tensors_hooks_is_enabled():
        return _project(ffn, y, direct)
    with not_saved(y):
        return _project(ffn, y, direct)


def _project(ffn: LocalityFeedForward, y: Tensor, direct: bool) -> Tensor:
    if not direct:
        return ffn.project(y)
    y = _linear(ffn, "fc2", y)
    norm: Any = ffn._modules["norm3"]
    if type(norm) is nn.BatchNorm2d:  # of single tokens: two views, where a row of them needs four
        return norm(y.view(-1, y.shape[2], 1, 1)).view_as(y)
    return y if type(norm) is nn.Identity else map_to_tokens(norm(tokens_to_row(y)))


def _linear(ffn: Any, name: str, x: Tensor) -> Tensor:
    """Compute a small point-wise layer without the views, the call and the attributes of its module."""
    parameters = ffn._modules[name]._parameters
    return F.linear(x, parameters["weight"].flatten(1), parameters["bias"])
