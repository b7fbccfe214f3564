"""The training pass of the paper's feed-forward network that keeps little for the backward pass.

Plain modules keep the input and output of nearly every layer. This one keeps the input, the two
maps that convolutions make of it (and the projected one in front of its batch norm), batch statistics and
pooled means; the backward pass computes normalised maps, activations and gates again. They are memory
traffic, not matrix products, so it costs little, and the room that they took is most of what a
localized model needs beyond its baseline.
"""

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from timm.layers import SqueezeExcite
from torch import Tensor, nn

from localvit.locality.grid import Grid
from localvit.locality.kernels.fused_steps import fused_steps
from localvit.locality.kernels.pieces import activation, eca_gate, norm_of, se_gate
from localvit.locality.kernels.steps import Pass, Steps, Tensors
from localvit.locality.layers import HardSigmoid


def lean_feed_forward(ffn: Any, x: Tensor, lattice: Grid) -> Tensor:
    """What ``ffn.plain(x, lattice)`` computes, ``(B, P + N, C) -> (B, P + N, C)``.

    Only for what :func:`localvit.locality.kernels.lean_applies` accepts.
    """
    parameters = dict(ffn.named_parameters())
    if torch.is_autocast_enabled(x.device.type):  # what autocast would do in front of each convolution
        dtype = torch.get_autocast_dtype(x.device.type)
        x = x.to(dtype)
        parameters = {n: p if n.startswith("norm") else p.to(dtype) for n, p in parameters.items()}
    numbered = {1: ffn.norm1, 2: ffn.norm2, 3: ffn.norm3}
    norms = {i: norm_of(layer) for i, layer in numbered.items() if isinstance(layer, nn.BatchNorm2d)}
    acts = {0: activation(ffn.act_prefix), 1: activation(ffn.act1), 2: activation(ffn.act2)}
    padding = int(ffn.conv.padding[0])
    how = Pass(ffn, lattice, tuple(parameters), norms, acts, _gate_of(ffn.gate), padding, Steps)
    return _LeanPass.apply(x, how._replace(form=fused_steps(how, x) or Steps), *parameters.values())


def _gate_of(gate: nn.Module | None) -> Callable[[Tensor, Tensors], Tensor] | None:
    if gate is None or isinstance(gate, SqueezeExcite):
        return se_gate if gate is not None else None
    return partial(eca_gate, hard=isinstance(gate.gate, HardSigmoid))


class _LeanPass(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, how: Pass, *parameters: Tensor) -> Tensor:
        steps = how.form(how, x, dict(zip(how.names, parameters, strict=True)))
        with torch.autocast(x.device.type, enabled=False):
            y = steps.forward()
        ctx.how, ctx.kept = how, tuple(steps.kept)
        ctx.save_for_backward(x, *parameters, *steps.kept.values())
        return y

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Any:
        how: Pass = ctx.how
        x, *tensors = ctx.saved_tensors
        count = len(how.names)
        steps = how.form(how, x, dict(zip(how.names, tensors[:count], strict=True)))
        steps.kept = dict(zip(ctx.kept, tensors[count:], strict=True))
        steps.needed = dict(zip(("x", "how", *how.names), ctx.needs_input_grad, strict=True))
        with torch.autocast(x.device.type, enabled=False):
            # Gradients are recorded in a backward pass only under create_graph=True.
            found = steps.differentiable(grads[0]) if torch.is_grad_enabled() else steps.backward(grads[0])
        return tuple(found.get(name) if needed else None for name, needed in steps.needed.items())
