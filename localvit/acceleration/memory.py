"""Selective activation checkpointing of feed-forward networks with locality, for every design.

The outputs of linear layers and convolutions of maps are saved for the backward pass, and everything else is
computed again: norms, activations and gates move memory and compute little. Outputs and gradients are those
of the plain modules, bit for bit.
"""

from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import CheckpointPolicy, checkpoint, create_selective_checkpoint_contexts

from localvit.locality import Grid, LocalityFeedForward, statistics_once

_aten = torch.ops.aten
_PRODUCTS = {_aten.mm.default, _aten.addmm.default, _aten.bmm.default}


def set_selective_checkpointing(model: nn.Module, enable: bool = True) -> int:
    """Save only the outputs of linear layers and convolutions of each `LocalityFeedForward` for the backward
    pass.

    It changes no number. It costs the time of the other layers once more, and applies where the native
    kernels, which save as little by themselves, do not: other designs, CUDA, no C++ compiler. Off by default,
    because time is measured there and memory is not always short (`docs/performance.md`). PyTorch computes no
    second derivatives (`create_graph=True`) with it, and it stands back for `torch.func`.

    Args:
        model: A localized model; it may hold other modules too.
        enable: Whether to switch it on or off.

    Returns:
        The number of feed-forward networks that were switched.
    """
    networks = [module for module in model.modules() if isinstance(module, LocalityFeedForward)]
    for ffn in networks:
        ffn.selective_checkpointing = enable
    return len(networks)


def checkpointed(ffn: LocalityFeedForward, x: Tensor, grid: Grid) -> Tensor:
    """Compute `ffn.transform(x, grid)`, saving little for the backward pass."""
    contexts = partial(create_selective_checkpoint_contexts, _policy)
    result: Tensor = checkpoint(_transform, ffn, x, grid, use_reentrant=False, context_fn=contexts)
    return result


def can_checkpoint(x: Tensor) -> bool:
    """Return whether a backward pass may follow that `checkpoint` supports."""
    hooks: Any = torch._C._autograd
    return (
        torch.is_grad_enabled()
        and isinstance(x, Tensor)
        and torch._C._functorch.peek_interpreter_stack() is None
        and hooks._saved_tensors_hooks_is_enabled()
    )


def _policy(context: Any, operator: Any, *args: Any, **kwargs: Any) -> CheckpointPolicy:
    """Save maps, but not the gate's layers, which are small and whose activation works in place."""
    save = operator in _PRODUCTS or (operator is _aten.convolution.default and args[0].shape[2:].numel() > 1)
    return CheckpointPolicy.MUST_SAVE if save else CheckpointPolicy.PREFER_RECOMPUTE


def _transform(ffn: LocalityFeedForward, x: Tensor, grid: Grid) -> Tensor:
    with statistics_once(ffn):
        return ffn.transform(x, grid)
