"""Cost of a module: parameters and multiply-accumulates. It imports torch only, so every room may use it."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils.flop_counter import FlopCounterMode


def count_parameters(module: nn.Module) -> int:
    """Count the parameters, shared ones once; buffers are not counted."""
    return sum(p.numel() for p in module.parameters())


def count_macs(model: nn.Module, input_size: tuple[int, int, int]) -> int:
    """Count multiply-accumulates of a forward pass on one image of `input_size` (channels, height, width).

    Counted: convolutions, linear layers, attention and other matrix products. Not counted: norms,
    activations, gating products, pooling. The tables of the papers count in the same way.
    """
    return macs_of(model, torch.empty(1, *input_size, device="meta"))


def macs_of(module: nn.Module, *inputs: Any) -> int:
    """Count the multiply-accumulates of `module(*inputs)`; tensors in `inputs` must be on the meta device.

    Nothing is computed, and the module does not change, on any device.
    """
    # A module that is used in two places is swapped once: the second time would keep the meta tensors.
    on_meta = {
        f"{path}.{name}".lstrip("."): _as_meta(tensor)
        for path, part in module.named_modules()
        for name, tensor in (*part._parameters.items(), *part._buffers.items())
        if tensor is not None
    }
    with torch.no_grad(), counted_macs() as macs:
        torch.func.functional_call(module, on_meta, inputs, tie_weights=False)
    return macs()


@contextmanager
def counted_macs() -> Iterator[Callable[[], int]]:
    """Count the multiply-accumulates in a context, which yields a function that returns their number."""
    with FlopCounterMode(display=False) as counter:
        yield lambda: counter.get_total_flops() // 2


def _as_meta(tensor: Tensor) -> Tensor:
    dtype = torch.get_default_dtype() if tensor.is_floating_point() else tensor.dtype
    return torch.empty_like(tensor, device="meta", dtype=dtype)


def on_meta(build: Callable[[], nn.Module]) -> nn.Module:
    """Call `build()` on the meta device, without memory or random numbers."""
    with torch.device("meta"), _WithoutInit():
        return build()


class _WithoutInit(TorchFunctionMode):
    """Mode that skips initialisation, which takes most of the time and has no effect on the meta device."""

    _METHODS = frozenset(
        getattr(Tensor, name)
        for name in ("uniform_", "normal_", "clamp_", "erfinv_", "mul_", "add_", "fill_", "zero_", "copy_")
    )

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func in self._METHODS and args[0].is_meta:
            return args[0]
        return func(*args, **(kwargs or {}))


def giga(macs: float) -> str:
    """Format a number in units of 1e6, 1e9 or 1e12, such as `"1.25 G"`."""
    if macs >= 1e12:
        return f"{macs / 1e12:,.3g} T"
    return f"{macs / 1e9:.3g} G" if macs >= 1e8 else f"{macs / 1e6:.3g} M"
