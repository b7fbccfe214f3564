"""Selective activation checkpointing of feed-forward networks with locality, for every design.

The outputs of linear layers and convolutions of maps are saved for the backward pass, and all others are
recomputed: norms, activations and gates are cheap. Outputs and gradients equal those of the plain modules bit
for bit.
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

    It changes no result, and computes the other layers twice. It applies where the native kernels, which save
    as little, do not: other designs, CUDA, no C++ compiler. It is off by default, because it costs time, and
    memory is not always scarce (`docs/performance.md`). PyTorch computes no second derivatives
    (`create_graph=True`) with it, and `torch.func` turns it off.

    Args:
        model: A localized model; it may have other modules too.
        enable: Turn it on, else off.

    Returns:
        Number of changed feed-forward networks.
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
    """Return whether `checkpoint` supports the possible backward pass."""
    hooks: Any = torch._C._autograd
    return (
        torch.is_grad_enabled()
        and isinstance(x, Tensor)
        and torch._C._functorch.peek_interpreter_stack() is None
        and hooks._saved_tensors_hooks_is_enabled()
    )


def _policy(context: Any, operator: Any, *args: Any, **kwargs: Any) -> CheckpointPolicy:
    """Save maps, but not the gate's layers, which are small and have in-place activations."""
    save = operator in _PRODUCTS or (operator is _aten.convolution.default and args[0].shape[2:].numel() > 1)
    return CheckpointPolicy.MUST_SAVE if save else CheckpointPolicy.PREFER_RECOMPUTE


def _transform(ffn: LocalityFeedForward, x: Tensor, grid: Grid) -> Tensor:
    with statistics_once(ffn):
        return ffn.transform(x, grid)
