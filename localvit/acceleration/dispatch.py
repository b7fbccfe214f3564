"""Dispatch of a feed-forward network's branch to native kernels, checkpointing or plain modules."""

from typing import Any

import torch
from torch import Tensor

from localvit.acceleration.kernels import plain_kernels
from localvit.acceleration.memory import can_checkpoint, checkpointed
from localvit.acceleration.native.form import NativeForm, is_dense, native_form
from localvit.acceleration.native.mix import BATCH, mixed, norm_now, not_saved
from localvit.locality import Grid, LocalityFeedForward

FEW_TOKENS = 256
"""Number of patch tokens up to which calls take longer than arithmetic in a small feed-forward network."""

# The stages that the native kernels replace.
_STAGES = {name: getattr(LocalityFeedForward, name) for name in ("transform", "mix", "_convolve")}


def accelerated(ffn: Any, x: Tensor, grid: Grid) -> Tensor | None:
    """Compute `ffn.transform(x, grid)` by the form that applies; `None` for plain modules."""
    if not isinstance(ffn, LocalityFeedForward):
        return None
    form = training_form(ffn, x)
    # Without gradients, models of real size stay plain: their published numbers are those of plain modules, a
    # traced graph has equal bits, and users who need speed fuse them. In small models with few tokens most of
    # the time is spent calling plain modules.
    small = getattr(ffn.fc1, "small", False) and grid.height * grid.width <= FEW_TOKENS
    worth = torch.is_grad_enabled() or small
    if form is not None and worth and grid.num_prefix_tokens == 0 and _computable(form, x):
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
    kind = type(ffn)
    return (
        kind.mix is _STAGES["mix"]
        and kind.transform is _STAGES["transform"]
        and kind._convolve is _STAGES["_convolve"]
        and ffn.__dict__.keys().isdisjoint(_STAGES)
    )


def _computable(form: NativeForm, x: Tensor) -> bool:
    """Return whether there are tokens, and more than one value per channel for batch statistics, which
    PyTorch's batch norm requires.
    """
    tokens = x.shape[0] * x.shape[1]
    return tokens > 1 or (tokens == 1 and not any(norm_now(norm).mode >= BATCH for norm in form.norms))


def _natively(form: NativeForm, ffn: LocalityFeedForward, x: Tensor, grid: Grid) -> Tensor:
    hidden = ffn.expand(x)
    if not is_dense(hidden):
        hidden = hidden.contiguous()
    expected = is_dense(hidden) and hidden.shape == (len(x), grid.height * grid.width, form.channels)
    y = mixed(form, ffn, hidden, grid) if expected else None  # the expansion may have been replaced
    if y is None:
        return ffn.project(ffn.mix(hidden, grid))
    hooks: Any = torch._C._autograd
    if y.grad_fn is None or not hooks._saved_tensors_hooks_is_enabled():
        return ffn.project(y)
    with not_saved(y):
        return ffn.project(y)
