"""Applicability of the native kernels: a cached structure, and a check at every call."""

from itertools import chain
from operator import is_, itemgetter
from typing import Any

import torch
from timm.layers import EcaModule, SqueezeExcite
from torch import Tensor, nn
from torch.autograd import forward_ad
from torch.nn.modules.module import _has_any_global_hook
from torch.overrides import _get_current_function_mode_stack
from torch.utils._device import DeviceContext

from localvit.acceleration.native.build import library
from localvit.locality import HardSigmoid, HiddenLocality, Pointwise

KERNEL_SIZES = (3, 5, 7)
# Channels per vector.
LANES = 16
# Numbers in the kernels.
ACTIVATIONS: dict[type[nn.Module], int] = {nn.Identity: 0, nn.ReLU: 1, nn.ReLU6: 2, nn.Hardswish: 3}
NO_GATE, SQUEEZE, ECA, ECA_HARD = range(4)

Numbers = tuple[int | None, int | None, int | None]
_GATE_LAYERS = {SQUEEZE: ("fc1", "fc2"), ECA: ("conv",), ECA_HARD: ("conv",)}
_STATISTICS = ("running_mean", "running_var", "num_batches_tracked")
_STAGE = ("norm1", "act1", "conv", "norm2", "act2", "gate")
_HOOKS = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")
_ORDINARY = (Tensor, nn.Parameter)
_settings = itemgetter(
    "kernel_size", "padding", "stride", "dilation", "groups", "in_channels", "padding_mode"
)
_tracing = torch._C._get_tracing_state
_interpreter = torch._C._functorch.peek_interpreter_stack
_dispatch_modes = torch._C._len_torch_dispatch_stack
_function_modes = torch._C._len_torch_function_stack


class NativeForm:
    """Structure of a module's middle stage, valid while `holds`.

    A copy or a pickle of the module starts without it.

    Attributes:
        norms: The batch norms after the expansion and after the convolution, `None` for none.
        numbers: The kernels' numbers of both activations and the gate; `None` for an unsupported one.
        channels: Width D of the hidden state.
        parameters: Weights and biases of norm 1, the convolution, norm 2 and the gate's two layers, `None`
            for missing ones.
        names: Their names in the module's state dict.
        buffers: Mean, variance and number of batches of both norms, likewise.
        small: True if the point-wise layers around the stage are small (see `Pointwise`), so that views and
            calls of modules take longer than their arithmetic.
        leaves: True if no tensor has a history, so that the form may be cached.
    """

    def __init__(self, module: Any) -> None:
        stage = {name: module._modules.get(name) for name in _STAGE}
        gate = stage["gate"]
        self.inner: dict[str, Any] = {} if gate is None else gate._modules
        self.layers = [*module._modules.values(), *self.inner.values()]
        self.kinds = [*map(type, self.layers)]
        ends = [layer for name, layer in module._modules.items() if name in ("fc1", "fc2")]
        self.small = all(type(layer) is Pointwise and layer.small for layer in ends)
        own = [layer for layer in (*stage.values(), *self.inner.values()) if layer is not None]
        self.stage, self.ends = _calls_of(own), _calls_of(ends)
        self.conv: nn.Conv2d = module.conv
        self.settings = _settings(self.conv.__dict__)
        self.channels = self.conv.out_channels
        self.norms = [n if type(n) is nn.BatchNorm2d else None for n in (stage["norm1"], stage["norm2"])]
        self.numbers = numbers_of(stage["act1"], stage["act2"], gate)
        owners = {name: stage[name] for name in ("norm1", "conv", "norm2")}
        owners |= {
            f"gate.{name}": self.inner[name] for name in _GATE_LAYERS.get(self.numbers[2] or NO_GATE, ())
        }
        self.names = [f"{name}.{kind}" for name in owners for kind in ("weight", "bias")]
        places = [getattr(owner, "_parameters", {}) for owner in owners.values()]
        self.parameters: list[Any] = [place.get(kind) for place in places for kind in ("weight", "bias")]
        self.parameters += [None] * (10 - len(self.parameters))
        statistics = [{} if norm is None else norm._buffers for norm in self.norms]
        self.buffers: list[Any] = [place.get(name) for place in statistics for name in _STATISTICS]
        self.places = [*places, *statistics]
        self.contents = [*chain.from_iterable(map(dict.values, self.places))]
        self.leaves = all(t is None or t.is_leaf for t in (*self.parameters, *self.buffers))
        self.noted: list[int] = []

    def __reduce__(self) -> Any:
        return type(None), ()

    def holds(self, module: Any) -> bool:
        """Return whether layers, settings and tensors are unchanged."""
        layers = [*module._modules.values(), *self.inner.values()]
        contents = [*chain.from_iterable(map(dict.values, self.places))]
        return (
            layers == self.layers
            and [*map(type, layers)] == self.kinds
            and _settings(self.conv.__dict__) == self.settings
            and len(contents) == len(self.contents)
            and all(map(is_, contents, self.contents))
        )

    def patched(self) -> bool:
        """Return whether a layer of the stage has a hook or a patched `forward`."""
        return _patched(*self.stage)

    def direct(self) -> bool:
        """Return whether small point-wise layers may be computed without calls of their modules."""
        return self.small and not _patched(*self.ends)

    def addresses(self) -> list[int] | None:
        """Return the addresses of parameters and buffers, 0 for none; `None` if the kernels cannot read them.

        An address shows an assignment to `.data`, but not another contiguous view of the same memory.
        """
        addresses = [*map(address, self.parameters), *map(address, self.buffers)]
        if addresses != self.noted or not self.parameters[2].is_contiguous():
            if not self._readable():
                return None
            self.noted = addresses
        return addresses

    def _readable(self) -> bool:
        """Return whether all tensors have the type and shape that the kernels expect."""
        d, first = self.channels, self.parameters[6]
        shapes: list[Any] = [(d,), (d,), (d, 1, *self.conv.kernel_size), (d,), (d,), (d,)]
        if self.numbers[2] == SQUEEZE:
            shapes += [(len(first), d, 1, 1), (len(first),), (d, len(first), 1, 1), (d,)]
        else:
            shapes += [() if first is None else (1, 1, first.shape[-1]), (), (), ()]
        shapes += [(d,), (d,), ()] * 2
        tensors = [*self.parameters, *self.buffers]
        kinds = [*[torch.float32] * 10, *[torch.float32, torch.float32, torch.int64] * 2]
        return self.parameters[2] is not None and all(
            t is None or (is_dense(t, kind) and t.shape == shape)
            for t, kind, shape in zip(tensors, kinds, shapes, strict=True)
        )


def _calls_of(layers: list[nn.Module]) -> tuple[list[Any], list[dict[str, Any]]]:
    """Return hooks and attributes of layers, which show what changes their calls."""
    hooks = [getattr(layer, hooks) for layer in layers for hooks in _HOOKS]
    return hooks, [layer.__dict__ for layer in layers]


def _patched(hooks: list[Any], attributes: list[dict[str, Any]]) -> bool:
    if any(hooks):
        return True
    for attribute in attributes:  # noqa: SIM110 (a generator takes three times as long)
        if "forward" in attribute:
            return True
    return False


def form_of(module: Any) -> NativeForm | None:
    """Return the form of a `LocalityFeedForward` or `HiddenLocality`; `None` if it is unsupported."""
    layers = module._modules
    norms = [layers[name] for name in ("norm1", "norm2") if name in layers]
    if any(type(norm) not in (nn.BatchNorm2d, nn.Identity) for norm in norms):
        return None
    if not isinstance(module, HiddenLocality):
        in_order = module.norm_before_act or all(type(norm) is nn.Identity for norm in norms)
        if not module.conv_mid or module.inner_skip or module.glu != "none" or not in_order:
            return None
    if not covers_convolution(layers.get("conv")) or library() is None:
        return None
    form = NativeForm(module)
    return form if form.addresses() is not None else None


def covers_convolution(conv: Any) -> bool:
    """Return whether the kernels support the depth-wise convolution `conv`."""
    if type(conv) is not nn.Conv2d:
        return False
    k, channels = conv.kernel_size[0], conv.out_channels
    ours = ((k, k), (k // 2, k // 2), (1, 1), (1, 1), channels, channels, "zeros")
    return _settings(conv.__dict__) == ours and k in KERNEL_SIZES and channels % LANES == 0


def numbers_of(act1: Any, act2: Any, gate: Any) -> Numbers:
    """Return the kernels' numbers of activations and gate; `None` for an unsupported one."""
    first, second = (0 if act is None else ACTIVATIONS.get(type(act)) for act in (act1, act2))
    return first, second, _gate_kind(gate)


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


def native_form(module: Any, x: Tensor) -> NativeForm | None:
    """Return the form with which the kernels can replace the modules now, else `None`.

    It runs at every call, so it must be fast. The kernels do not apply to hooks, replaced, patched and
    parametrized layers, autocast, `torch.func`, forward-mode differentiation, tracing, function and dispatch
    modes (which see single operations), and other kinds of tensors.
    """
    if (
        type(x) not in _ORDINARY
        or x.dtype is not torch.float32
        or not x.is_cpu
        or torch.is_autocast_enabled("cpu")
        or _tracing() is not None
        or _interpreter() is not None
        or _dispatch_modes() > 0
        or (_function_modes() > 0 and not _only_a_default_device())
        or forward_ad._current_level >= 0
        or _has_any_global_hook()
    ):
        return None
    form = module.noted
    if form is None:
        form = module.noted = form_of(module) or False
    elif form and not form.holds(module):
        form = form_of(module)
        if form and form.leaves:
            module.noted = form
    return form if form and not form.patched() else None


def _only_a_default_device() -> bool:
    """Return whether all function modes only set the default device."""
    return all(type(mode) is DeviceContext for mode in _get_current_function_mode_stack())


def is_dense(tensor: Tensor, dtype: torch.dtype = torch.float32) -> bool:
    """Return whether `tensor` is dense and readable for the kernels."""
    return type(tensor) in _ORDINARY and tensor.dtype is dtype and tensor.is_cpu and tensor.is_contiguous()


def address(tensor: Tensor | None) -> int:
    """Return the address of a tensor's memory, 0 for none."""
    return 0 if tensor is None else tensor.data_ptr()
