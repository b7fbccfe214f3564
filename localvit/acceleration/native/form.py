"""Applicability of the native kernels: a cached structure, and a check at every call."""

from collections.abc import Callable
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
from localvit.locality import HardSigmoid, LocalityFeedForward, Pointwise

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
_ENDS = ("fc1", "fc2", "norm3")
_HOOKS = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")
_ORDINARY = (Tensor, nn.Parameter)
_CONV = itemgetter("in_channels", "kernel_size", "padding", "stride", "dilation", "groups", "padding_mode")
_SETTINGS: dict[type[nn.Module], Callable[[Any], Any]] = {
    **dict.fromkeys((nn.Conv1d, nn.Conv2d, Pointwise), _CONV),
    nn.ReLU6: itemgetter("min_val", "max_val"),
    SqueezeExcite: itemgetter("add_maxpool"),
}
_DESIGN = itemgetter("conv_mid", "inner_skip", "glu", "norm_before_act")
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
        settings: Attributes of the module and its layers that change what they compute.
    """

    def __init__(self, module: Any) -> None:
        stage = {name: module._modules.get(name) for name in _STAGE}
        gate = stage["gate"]
        self.inner: dict[str, Any] = {} if gate is None else gate._modules
        self.layers = [*module._modules.values(), *self.inner.values()]
        self.kinds = [*map(type, self.layers)]
        ends = [layer for name, layer in module._modules.items() if name in _ENDS]
        self.small = all(map(_is_small, ends[:2]))
        own = [layer for layer in (*stage.values(), *self.inner.values()) if layer is not None]
        self.stage, self.ends = _calls_of(own), _calls_of(ends)
        self.watched = [(_SETTINGS[type(e)], e.__dict__) for e in (*own, *ends) if type(e) in _SETTINGS]
        if isinstance(module, LocalityFeedForward):
            self.watched.append((_DESIGN, module.__dict__))
        self.settings = self._settings_now()
        self.conv: nn.Conv2d = module.conv
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
        self.places = [*places, *statistics, *(layer._parameters for layer in ends[:2])]
        self.contents = [*chain.from_iterable(map(dict.values, self.places))]
        self.tensors = [t for t in (*self.parameters, *self.buffers) if t is not None]
        self.leaves = all(t.is_leaf for t in self.tensors)
        self.noted: tuple[list[int], list[int]] = ([], [])

    def __reduce__(self) -> Any:
        return type(None), ()

    def holds(self, module: Any) -> bool:
        """Return whether layers, settings and tensors are unchanged."""
        contents = [*chain.from_iterable(map(dict.values, self.places))]
        return (
            self.has_layers_of(module)
            and len(contents) == len(self.contents)
            and all(map(is_, contents, self.contents))
        )

    def has_layers_of(self, module: Any) -> bool:
        """Return whether layers and settings are unchanged."""
        layers = [*module._modules.values(), *self.inner.values()]
        return (
            layers == self.layers
            and [*map(type, layers)] == self.kinds
            and self._settings_now() == self.settings
        )

    def _settings_now(self) -> list[Any]:
        return [settings(attributes) for settings, attributes in self.watched]

    def patched(self) -> bool:
        """Return whether a layer of the stage has a hook or a patched `forward`."""
        return _patched(*self.stage)

    def direct(self) -> bool:
        """Return whether small point-wise layers may be computed without calls of their modules."""
        return self.small and not _patched(*self.ends)

    def addresses(self) -> list[int] | None:
        """Return the addresses of parameters and buffers, 0 for none; `None` if the kernels cannot read them.

        An address shows an assignment to `.data`; the layout and the number of elements show most other views
        of the same memory.
        """
        addresses = [*map(address, self.parameters), *map(address, self.buffers)]
        elements = [*map(Tensor.numel, self.tensors)]
        if (addresses, elements) != self.noted or not all(map(Tensor.is_contiguous, self.tensors)):
            side = self.conv.kernel_size[0]
            if not readable(self.parameters, self.channels, side, self.numbers[2], self.buffers):
                return None
            self.noted = addresses, elements
        return addresses


def readable(parameters: Any, channels: int, side: int, gate: int | None, buffers: Any = (None,) * 6) -> bool:
    """Return whether the kernels can read the tensors of a `NativeForm` with a kernel of this side and a gate
    of this number: type, layout and shape are as expected, and none is missing.
    """
    d, weight, first = channels, parameters[2], parameters[6]
    needed = [weight, *parameters[6 : 6 + {SQUEEZE: 4, ECA: 1, ECA_HARD: 1}.get(gate or NO_GATE, 0)]]
    pairs = ((buffers[0], buffers[1]), (buffers[3], buffers[4]))
    if any(t is None for t in needed) or any((mean is None) != (var is None) for mean, var in pairs):
        return False
    units = 0 if first is None else len(first)
    shapes: list[Any] = [(d,), (d,), (d, 1, side, side), (d,), (d,), (d,)]
    if gate == SQUEEZE:
        shapes += [(units, d, 1, 1), (units,), (d, units, 1, 1), (d,)]
    else:
        shapes += [() if first is None else (1, 1, first.shape[-1]), (), (), ()]
    shapes += [(d,), (d,), ()] * 2
    kinds = [*[torch.float32] * 10, *[torch.float32, torch.float32, torch.int64] * 2]
    return all(
        t is None or (is_dense(t, kind) and t.shape == shape)
        for t, kind, shape in zip((*parameters, *buffers), kinds, shapes, strict=True)
    )


def _is_small(layer: nn.Module) -> bool:
    whole = layer._parameters.keys() == {"weight", "bias"}
    return type(layer) is Pointwise and layer.small and whole and _keeps_size(layer, (1, 1), 1)


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
    if isinstance(module, LocalityFeedForward):
        in_order = module.norm_before_act or all(type(norm) is nn.Identity for norm in norms)
        if not in_order or not _covers_design(module):
            return None
    if not covers_convolution(layers.get("conv")) or library() is None:
        return None
    form = NativeForm(module)
    return form if form.addresses() is not None else None


def traceable_numbers(module: Any) -> Numbers | None:
    """Return the numbers of a stage without norms, `None` if it is unsupported, while a graph is compiled.

    Not all that `native_form` asks can be asked there; the operator checks the tensors.
    """
    norm1, act1, conv, norm2, act2, gate = stage = [getattr(module, name, None) for name in _STAGE]
    layers = [layer for layer in (*stage, *([] if gate is None else gate.children())) if layer is not None]
    if not all(norm is None or type(norm) is nn.Identity for norm in (norm1, norm2)):
        return None
    if isinstance(module, LocalityFeedForward) and not _covers_design(module):
        return None
    if not covers_convolution(conv) or _patched(*_calls_of(layers)):
        return None
    parameters = [p for layer in (conv, gate) if layer is not None for p in layer.parameters()]
    ours = all(p.dtype == torch.float32 and p.device.type == "cpu" for p in parameters)
    return numbers_of(act1, act2, gate) if ours else None


def _covers_design(ffn: LocalityFeedForward) -> bool:
    return ffn.conv_mid and not ffn.inner_skip and ffn.glu == "none"


def covers_convolution(conv: Any) -> bool:
    """Return whether the kernels support the depth-wise convolution `conv`."""
    if type(conv) is not nn.Conv2d:
        return False
    k, channels = conv.kernel_size[0], conv.out_channels
    fits = conv.in_channels == channels and channels % LANES == 0
    return fits and k in KERNEL_SIZES and _keeps_size(conv, (k, k), channels)


def _keeps_size(conv: Any, kernel: tuple[int, ...], groups: int) -> bool:
    """Return whether `conv` has this kernel, zeros around the map, which keeps its size, and nothing else."""
    ones, padding = (1,) * len(kernel), tuple(side // 2 for side in kernel)
    return (
        (conv.kernel_size, conv.padding) == (kernel, padding)
        and (conv.stride, conv.dilation) == (ones, ones)
        and (conv.groups, conv.padding_mode) == (groups, "zeros")
    )


def numbers_of(act1: Any, act2: Any, gate: Any) -> Numbers:
    """Return the kernels' numbers of activations and gate; `None` for an unsupported one."""
    return _number_of(act1), _number_of(act2), _gate_kind(gate)


def _number_of(act: Any) -> int | None:
    if act is None:
        return 0
    other_limits = type(act) is nn.ReLU6 and (act.min_val, act.max_val) != (0.0, 6.0)
    return None if other_limits else ACTIVATIONS.get(type(act))


def _gate_kind(gate: Any) -> int | None:
    if gate is None:
        return NO_GATE
    if type(gate) is SqueezeExcite:
        parts = (gate.fc1, gate.bn, gate.act, gate.fc2, gate.gate)
        known = (nn.Conv2d, nn.Identity, nn.ReLU, nn.Conv2d, HardSigmoid)
        if tuple(map(type, parts)) != known or gate.add_maxpool:
            return None
        ours = (_keeps_size(fc, (1, 1), 1) and fc.bias is not None for fc in (gate.fc1, gate.fc2))
        return SQUEEZE if all(ours) else None
    if type(gate) is EcaModule and type(gate.conv) is nn.Conv1d and gate.conv2 is None:
        k = gate.conv.kernel_size[0]
        if k % 2 == 0 or not _keeps_size(gate.conv, (k,), 1):
            return None
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
    return (
        type(tensor) in _ORDINARY
        and tensor.dtype is dtype
        and tensor.is_cpu
        and tensor.is_contiguous()
        and not tensor.is_neg()  # its memory has the other sign
        and (tensor.data_ptr() != 0 or tensor.numel() == 0)  # 0: freed, or all zeros without memory
    )


def address(tensor: Tensor | None) -> int:
    """Return the address of a tensor's memory, 0 for none."""
    return 0 if tensor is None else tensor.data_ptr()
