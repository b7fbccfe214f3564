"""When the lean pass stands in for the plain modules: one question, asked at every forward."""

from typing import Any

import torch
from timm.layers import EcaModule, SqueezeExcite
from torch import Tensor, nn
from torch.autograd import forward_ad
from torch.nn.modules.module import _has_any_global_hook

from localvit.locality.kernels.pieces import ACTIVATION_TYPES
from localvit.locality.layers import HardSigmoid
from localvit.locality.switch import plain_forms

# Attribute of the FFN -> classes that the lean pass knows. Exact ones: a subclass may compute otherwise.
_KNOWN: dict[str, tuple[type, ...]] = {
    **dict.fromkeys(("fc1", "conv", "fc2"), (nn.Conv2d,)),
    **dict.fromkeys(("norm1", "norm2", "norm3"), (nn.BatchNorm2d, nn.Identity)),
    **dict.fromkeys(("act1", "act2", "act_prefix"), ACTIVATION_TYPES),
    "act_glu": (nn.Identity,),
    "gate": (type(None), SqueezeExcite, EcaModule),
}
_HOOKS = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")


def lean_applies(ffn: Any, tokens: Any) -> bool:
    """Whether the lean pass computes what ``ffn``, a ``LocalityFeedForward``, would compute of ``tokens``.

    It does where gradients are wanted and the layers are the paper's in kind (convolution in the middle,
    batch norm or none in front of each activation), none replaced, none hooked. Everything else is left
    to the plain modules: compilation, export and tracing, which want single operations to see and fuse;
    ``torch.func`` and forward-mode differentiation; tensor subclasses; ``LOCALVIT_PLAIN=1``.
    """
    if torch.compiler.is_compiling() or type(tokens) not in (Tensor, nn.Parameter):
        return False
    if plain_forms() or not torch.is_grad_enabled() or _is_transformed():
        return False
    return _is_known(ffn) and _is_bare(ffn) and _fits(ffn, tokens)


def _is_transformed() -> bool:
    is_dual = forward_ad._current_level >= 0
    return torch.jit.is_tracing() or is_dual or torch._C._functorch.peek_interpreter_stack() is not None


def _is_known(ffn: Any) -> bool:
    """Whether the design and every layer's class are among those that the lean pass covers."""
    if not (ffn.conv_mid and ffn.norm_before_act and not ffn.inner_skip and ffn.glu == "none"):
        return False
    if any(type(getattr(ffn, name)) not in types for name, types in _KNOWN.items()):
        return False
    norms = (ffn.norm1, ffn.norm2, ffn.norm3)
    if any(isinstance(norm, nn.BatchNorm2d) and not norm.affine for norm in norms):
        return False
    gate = ffn.gate
    if isinstance(gate, SqueezeExcite):
        parts = (gate.fc1, gate.bn, gate.act, gate.fc2, gate.gate)
        kinds = (nn.Conv2d, nn.Identity, nn.ReLU, nn.Conv2d, HardSigmoid)
        return tuple(map(type, parts)) == kinds and not gate.add_maxpool
    if isinstance(gate, EcaModule):
        known = type(gate.gate) in (nn.Sigmoid, HardSigmoid)
        return known and type(gate.conv) is nn.Conv1d and gate.conv2 is None
    return True


def _is_bare(ffn: nn.Module) -> bool:
    """Whether nothing is attached to the layers inside that a pass around their ``forward`` would skip."""
    if _has_any_global_hook():
        return False
    for layer in ffn.modules():
        attributes = layer.__dict__
        if layer is not ffn and ("forward" in attributes or any(attributes[hooks] for hooks in _HOOKS)):
            return False
    return True


def _fits(ffn: nn.Module, tokens: Tensor) -> bool:
    """Whether tensors are ordinary ones, on one device, of data types whose plain form is the same."""
    parameters = dict(ffn.named_parameters())
    tensors = (tokens, *parameters.values())
    device = tokens.device
    if device.type not in ("cpu", "cuda") or tokens.shape[0] * tokens.shape[1] < 2:
        return False
    if not any(t.requires_grad for t in tensors):
        return False
    if any(type(t) not in (Tensor, nn.Parameter) or t.device != device for t in tensors):
        return False
    wide = {p.dtype for name, p in parameters.items() if name.startswith("norm")}
    narrow = {p.dtype for name, p in parameters.items() if not name.startswith("norm")}
    if torch.is_autocast_enabled(device.type):
        cast = {torch.float32, torch.get_autocast_dtype(device.type)}
        return narrow | {tokens.dtype} <= cast and wide <= {torch.float32}
    return narrow == {tokens.dtype} and wide <= {tokens.dtype} & {torch.float32, torch.float64}
