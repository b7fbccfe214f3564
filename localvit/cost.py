"""What a module costs: parameters and multiply-accumulates. Knows torch only, so every room may use it."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils.flop_counter import FlopCounterMode


def count_parameters(module: nn.Module) -> int:
    """Number of parameters, shared ones once; buffers are not counted."""
    return sum(p.numel() for p in module.parameters())


def count_macs(model: nn.Module, input_size: tuple[int, int, int]) -> int:
    """Multiply-accumulates of one forward pass on one image of `input_size` (channels, height, width).

    Counted: convolutions, linear layers, attention and other matrix products. Not counted: norms,
    activations, gating products, pooling. This is the counting of the papers' tables.
    """
    return macs_of(model, torch.empty(1, *input_size, device="meta"))


def macs_of(module: nn.Module, *inputs: Any) -> int:
    """Multiply-accumulates of `module(*inputs)`, where tensors among `inputs` are on the meta device.

    Nothing is computed and the module is left as it is, wherever its weights are.
    """
    tensors = {**dict(module.named_parameters()), **dict(module.named_buffers())}
    on_meta = {name: _as_meta(tensor) for name, tensor in tensors.items()}
    counter = FlopCounterMode(display=False)
    with torch.no_grad(), counter:
        torch.func.functional_call(module, on_meta, inputs)
    return counter.get_total_flops() // 2


def _as_meta(tensor: Tensor) -> Tensor:
    dtype = torch.get_default_dtype() if tensor.is_floating_point() else tensor.dtype
    return torch.empty_like(tensor, device="meta", dtype=dtype)


def on_meta(build: Callable[[], nn.Module]) -> nn.Module:
    """`build()` without memory and without random numbers: for counting."""
    with torch.device("meta"), _WithoutInit():
        return build()


class _WithoutInit(TorchFunctionMode):
    """Initial values are not drawn. On the meta device they are no values, and take most of the time."""

    _METHODS = frozenset(
        getattr(Tensor, name)
        for name in ("uniform_", "normal_", "clamp_", "erfinv_", "mul_", "add_", "fill_", "zero_", "copy_")
    )

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func in self._METHODS and args[0].is_meta:
            return args[0]
        return func(*args, **(kwargs or {}))


def giga(macs: float) -> str:
    """`"1.25 G"`, in units of 1e6, 1e9 or 1e12 as it suits the number."""
    if macs >= 1e12:
        return f"{macs / 1e12:,.3g} T"
    return f"{macs / 1e9:.3g} G" if macs >= 1e8 else f"{macs / 1e6:.3g} M"
