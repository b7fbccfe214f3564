"""Choice of the form that computes the branch of a feed-forward network."""

from typing import Any

import torch
from torch import Tensor

from localvit.acceleration.kernels import plain_kernels
from localvit.acceleration.memory import can_checkpoint, checkpointed
from localvit.acceleration.native.form import Form, applies, form_of, is_dense
from localvit.acceleration.native.mix import BATCH, mixed, norm_now, not_kept
from localvit.locality import Grid, LocalityFeedForward


def accelerated(ffn: Any, x: Tensor, grid: Grid) -> Tensor | None:
    """Compute `ffn.transform(x, grid)` by the form that applies; `None`: by the plain modules."""
    if not isinstance(ffn, LocalityFeedForward):
        return None
    form = None if plain_kernels() else native_form(ffn)
    # Without gradients, models of real size stay plain: their published numbers are those of plain modules,
    # and who wants speed fuses them. In small ones, calling the plain modules takes most of the time.
    worth = torch.is_grad_enabled() or getattr(ffn.fc1, "small", False)
    if form is not None and worth and grid.num_prefix_tokens == 0 and applies(form, x) and _fits(form, x):
        return _natively(form, ffn, x, grid)
    return checkpointed(ffn, x, grid) if ffn.selective_checkpointing and can_checkpoint(x) else None


def native_form(ffn: LocalityFeedForward) -> Form | None:
    """Return what the native kernels know of `ffn` until its mode or device changes; `None`: they do not
    cover it."""
    known = ffn.noted
    if known is None:
        known = ffn.noted = Noted(ffn)
    # Neither a shallow copy, which shares the notes, nor a gate that was added later.
    same = known.modules is ffn._modules and known.gate is ffn._modules.get("gate")
    return known.form if same else None


class Noted:
    """Notes about a module. A copy or a pickle of the module starts without them."""

    def __init__(self, ffn: LocalityFeedForward) -> None:
        self.modules, self.gate, self.form = ffn._modules, ffn._modules.get("gate"), form_of(ffn)

    def __reduce__(self) -> Any:
        return type(None), ()


def _fits(form: Form, x: Tensor) -> bool:
    """Return whether statistics can be had: of one value per channel PyTorch's own norm says that they
    cannot."""
    return x.shape[0] * x.shape[1] > 1 or not any(norm_now(norm).mode == BATCH for norm in form.norms)


def _natively(form: Form, ffn: LocalityFeedForward, x: Tensor, grid: Grid) -> Tensor:
    hidden = ffn.expand(x)
    if not is_dense(hidden):
        hidden = hidden.contiguous()
    if not is_dense(hidden) or hidden.shape != (len(x), grid.height * grid.width, form.channels):
        return ffn.project(ffn.mix(hidden, grid))  # a layer that somebody put there may give anything
    y = mixed(form, ffn, hidden, grid)
    hooks: Any = torch._C._autograd
    if y.grad_fn is None or not hooks._saved_tensors_hooks_is_enabled():
        return ffn.project(y)
    with not_kept(y):
        return ffn.project(y)
