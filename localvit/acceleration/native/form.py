"""Applicability of the native kernels: facts known beforehand, and checks at every call."""

from dataclasses import dataclass
from operator import itemgetter
from typing import Any

import torch
from timm.layers import EcaModule, SqueezeExcite
from torch import Tensor, nn
from torch.autograd import forward_ad
from torch.nn.modules.module import _has_any_global_hook

from localvit.acceleration.native.build import library
from localvit.locality import HardSigmoid, LocalityFeedForward

KERNEL_SIZES = (3, 5, 7)
# Channels come in vectors of so many.
LANES = 16
# As the kernels number them.
ACTIVATIONS: dict[type[nn.Module], int] = {nn.Identity: 0, nn.ReLU: 1, nn.ReLU6: 2, nn.Hardswish: 3}
NO_GATE, SQUEEZE, CLAMP, ECA, ECA_HARD = range(5)

_HOOKS = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")
_ORDINARY = (Tensor, nn.Parameter)
_settings = itemgetter(
    "kernel_size", "padding", "stride", "dilation", "groups", "in_channels", "padding_mode"
)
_STAGES = ("transform", "mix", "_convolve")
_NONE: dict[str, Any] = {"weight": None, "bias": None}


@dataclass(frozen=True)
class Form:
    """Structure of a feed-forward network's middle stage, valid until it changes.

    Attributes:
        layers: Every module that the kernels stand in for: where it was found, under which name, its class.
        hooks: Their dictionaries of hooks, which are empty.
        norms: The batch norms after the expansion and after the convolution.
        act, act2, gate: Activations and gate, as the kernels number them.
        parameters: Where the weights and biases of norm 1, the convolution, norm 2 and the gate's layers are.
        tensors: The same and the norms' buffers, with their types.
        channels: Width D of the hidden state.
        conv, settings: The convolution, and its settings as they were.
    """

    layers: tuple[tuple[dict[str, Any], str, nn.Module, type], ...]
    hooks: tuple[dict[int, Any], ...]
    norms: tuple[nn.BatchNorm2d | None, nn.BatchNorm2d | None]
    act: int
    act2: int
    gate: int
    parameters: tuple[tuple[dict[str, Any], str], ...]
    tensors: tuple[tuple[dict[str, Any], str, torch.dtype], ...]
    channels: int
    conv: nn.Conv2d
    settings: tuple[Any, ...]


def form_of(ffn: Any) -> Form | None:
    """Return the form of `ffn`, a `LocalityFeedForward`; `None` for a design or layers that are not
    covered."""
    if not (ffn.conv_mid and ffn.norm_before_act and not ffn.inner_skip and ffn.glu == "none"):
        return None
    if any(getattr(type(ffn), name) is not getattr(LocalityFeedForward, name) for name in _STAGES):
        return None
    stage = [ffn.norm1, ffn.norm2, ffn.act1, ffn.act2]
    if any(type(norm) not in (nn.BatchNorm2d, nn.Identity) for norm in stage[:2]):
        return None
    if any(type(act) not in ACTIVATIONS for act in stage[2:]) or not covers_convolution(ffn.conv):
        return None
    kind = _gate_kind(ffn.gate)
    if kind is None or not is_dense(ffn.conv.weight) or library() is None:
        return None
    gate = ffn.gate
    places = [(ffn._modules, name) for name in ("norm1", "act1", "conv", "norm2", "act2", "gate")]
    places += [(gate._modules, name) for name in gate._modules] if gate is not None else []
    layers = [(where, name, where[name]) for where, name in places if where.get(name) is not None]
    inner = {NO_GATE: (), SQUEEZE: ("fc1", "fc2")}.get(kind, ("conv",))
    owners = [ffn.norm1, ffn.conv, ffn.norm2, *(getattr(gate, name) for name in inner)]
    norm1, norm2 = (norm if isinstance(norm, nn.BatchNorm2d) else None for norm in stage[:2])
    parameters = tuple((owner._parameters or _NONE, n) for owner in owners for n in ("weight", "bias"))
    buffers = [(norm._buffers, n) for norm in (norm1, norm2) if norm is not None for n in norm._buffers]
    counts = "num_batches_tracked"
    return Form(
        layers=tuple((where, name, layer, type(layer)) for where, name, layer in layers),
        hooks=tuple(getattr(layer, hooks) for _, _, layer in layers for hooks in _HOOKS),
        norms=(norm1, norm2),
        act=ACTIVATIONS[type(ffn.act1)],
        act2=ACTIVATIONS[type(ffn.act2)],
        gate=kind,
        parameters=parameters,
        tensors=tuple(
            (d, n, torch.int64 if n == counts else torch.float32) for d, n in (*parameters, *buffers)
        ),
        channels=ffn.conv.out_channels,
        conv=ffn.conv,
        settings=_settings(ffn.conv.__dict__),
    )


def covers_convolution(conv: Any) -> bool:
    """Return whether `conv` is a depth-wise convolution of a kind that the kernels compute."""
    if type(conv) is not nn.Conv2d:
        return False
    k, channels = conv.kernel_size[0], conv.out_channels
    like_ours = nn.Conv2d(channels, channels, k, padding=k // 2, groups=channels, device="meta")
    if _settings(conv.__dict__) != _settings(like_ours.__dict__):
        return False
    return k in KERNEL_SIZES and channels % LANES == 0


def _gate_kind(gate: Any) -> int | None:
    if gate is None:
        return NO_GATE
    if type(gate) is SqueezeExcite:
        parts = (gate.fc1, gate.bn, gate.act, gate.fc2, gate.gate)
        known = (nn.Conv2d, nn.Identity, nn.ReLU, nn.Conv2d, HardSigmoid)
        is_ours = tuple(map(type, parts)) == known and not gate.add_maxpool
        return SQUEEZE if is_ours and gate.fc1.bias is not None and gate.fc2.bias is not None else None
    if type(gate) is EcaModule and type(gate.conv) is nn.Conv1d and gate.conv2 is None:
        return {nn.Sigmoid: ECA, HardSigmoid: ECA_HARD}.get(type(gate.gate))
    return None


def applies(form: Form, x: Tensor) -> bool:
    """Return whether the kernels compute what the modules would compute now.

    This is asked at every call, so it must be quick: it notices hooks, replaced, patched and parametrized
    layers, autocast, transforms of `torch.func`, forward-mode differentiation, tracing, dispatch modes (which
    want to see single operations) and tensors of another kind.
    """
    if (
        type(x) not in _ORDINARY
        or x.dtype is not torch.float32
        or not x.is_cpu
        or torch.is_autocast_enabled("cpu")
        or torch._C._get_tracing_state() is not None
        or torch._C._functorch.peek_interpreter_stack() is not None
        or torch._C._len_torch_dispatch_stack() > 0
        or forward_ad._current_level >= 0
        or _has_any_global_hook()
        or any(form.hooks)
    ):
        return False
    for where, name, layer, kind in form.layers:
        if where.get(name) is not layer or layer.__class__ is not kind or "forward" in layer.__dict__:
            return False
    if _settings(form.conv.__dict__) != form.settings:
        return False
    for where, name, dtype in form.tensors:  # as `is_dense` asks, whose calls would take a third of the time
        t = where.get(name, _NONE)
        if t is not None and not (
            (type(t) is nn.Parameter or type(t) is Tensor)
            and t.dtype is dtype
            and t.is_cpu
            and t.is_contiguous()
        ):
            return False
    return True


def is_dense(tensor: Tensor) -> bool:
    """Return whether `tensor` is an ordinary dense one that the kernels can read."""
    return (
        type(tensor) in _ORDINARY
        and tensor.dtype is torch.float32
        and tensor.is_cpu
        and tensor.is_contiguous()
    )
