"""Which library computes the linear layers.

On a CPU ``F.linear`` goes to the BLAS that PyTorch was built with, a 1 x 1 convolution of a channels-last map
to oneDNN. Which is faster depends on the processor (twice as fast on some AMD, slower on some Intel), so a
short timing decides.
"""

import time
from collections.abc import Callable
from functools import lru_cache

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.weak import WeakTensorKeyDictionary

from localvit.fusing.inference import InferenceOnly
from localvit.locality.grid import map_to_tokens, tokens_to_row
from localvit.locality.kernels.packed import Route, pack, packed_available, packed_linear

# Rows of the probe: eight images of a plain transformer. With fewer the libraries differ less.
_ROWS = 1576
_REPEATS = 5
# Another route must be so much faster than F.linear, because noise should not change a model.
_MARGIN = 0.95
# Smaller layers (those of a channel gate) take no time worth a probe.
_SMALLEST = 2**13


class RoutedLinear(InferenceOnly, nn.Linear):
    """A linear layer computed by ``route``; parameters as in :class:`torch.nn.Linear`.

    * ``"linear"``: ``F.linear``.
    * ``"conv"``: a 1 x 1 convolution of the rows as a channels-last map.
    * ``"packed"``: oneDNN with weights reordered once. These operators are private to PyTorch, so wherever
      they do not apply (another type or device, autocast, export) it is ``F.linear``.
    """

    route: Route = "linear"

    def forward(self, x: Tensor) -> Tensor:
        if self.route == "conv":
            return conv_linear(x, self.weight, self.bias)
        if self.route == "packed" and self._packable(x):
            linear = frozen_linear if torch.compiler.is_compiling() else _frozen_linear
            return linear(x, self.weight, self.bias)
        return F.linear(x, self.weight, self.bias)

    def _packable(self, x: Tensor) -> bool:
        traced = torch.compiler.is_exporting() or torch.jit.is_tracing()
        return (
            not traced
            and x.dtype == self.weight.dtype == torch.float32
            and x.device.type == self.weight.device.type == "cpu"
            and not torch.is_autocast_enabled("cpu")
            and not (torch.is_grad_enabled() and x.requires_grad)
            # Of these nobody knows when they change; compilation holds them for constant anyway.
            and (torch.compiler.is_compiling() or not self.weight.is_inference())
        )

    def extra_repr(self) -> str:
        return f"{super().extra_repr()}, route={self.route!r}"


_packs = WeakTensorKeyDictionary()  # of weights: what tells that they were moved or changed, packed weights


def _packed_weight(weight: Tensor) -> Tensor:
    state = (weight.data_ptr(), None if weight.is_inference() else weight._version)
    found = _packs.get(weight)
    if found is None or found[0] != state:
        found = _packs[weight] = (state, pack(weight))
    packed: Tensor = found[1]
    return packed


def _frozen_linear(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    return packed_linear(x, _packed_weight(weight), bias)


# A compiled graph takes no packed weights, only an operator that packs them when it first meets them.
torch.library.define("localvit::frozen_linear", "(Tensor x, Tensor weight, Tensor? bias) -> Tensor")
torch.library.impl("localvit::frozen_linear", "cpu", _frozen_linear)
frozen_linear = torch.ops.localvit.frozen_linear.default


@torch.library.register_fake("localvit::frozen_linear")
def _(x, weight, bias):  # type: ignore[no-untyped-def]
    return x.new_empty((*x.shape[:-1], len(weight)))


def without_bias(layer: nn.Module, x: Tensor) -> tuple[Tensor, Tensor | None]:
    """``layer(x)`` without its bias, and the bias, for a caller who can add it at no cost: to ``F.linear`` it
    is one more pass over the result. All of it and ``None`` where that is not so."""
    if type(layer) is nn.Linear or (type(layer) is RoutedLinear and layer.route == "linear"):
        return F.linear(x, layer.weight), layer.bias
    return layer(x), None


def conv_linear(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """``F.linear`` by a 1 x 1 convolution."""
    if x.numel() == 0:  # a convolution refuses it
        return F.linear(x, weight, bias)
    row = tokens_to_row(x.reshape(1, -1, x.shape[-1]))
    y = F.conv2d(row, weight[:, :, None, None], bias)
    return map_to_tokens(y).reshape(*x.shape[:-1], weight.shape[0])


def fastest_route(weight: Tensor) -> Route:
    """The fastest route for weights like these with the present number of threads, by a short timing."""
    if weight.device.type != "cpu" or weight.dtype == torch.float64 or weight.numel() < _SMALLEST:
        return "linear"
    return _probe(torch.get_num_threads(), weight.dtype, *weight.shape)


@lru_cache(maxsize=256)
def _probe(threads: int, dtype: torch.dtype, out_features: int, in_features: int) -> Route:
    """``threads`` is part of what is remembered."""
    x = torch.zeros(_ROWS, in_features, dtype=dtype)
    weight, bias = torch.zeros(out_features, in_features, dtype=dtype), torch.zeros(out_features, dtype=dtype)
    routes: dict[Route, Callable[[], Tensor]] = {
        "linear": lambda: F.linear(x, weight, bias),
        "conv": lambda: conv_linear(x, weight, bias),
    }
    if dtype == torch.float32 and packed_available():
        packed = pack(weight)
        routes["packed"] = lambda: packed_linear(x, packed, bias)
    with torch.no_grad():
        times = _interleaved(routes)
    best = min(times, key=lambda route: times[route])
    return best if times[best] < _MARGIN * times["linear"] else "linear"


def _interleaved(routes: dict[Route, Callable[[], Tensor]]) -> dict[Route, float]:
    """Least seconds of each, one after the other in turn: a busy moment makes a run slower, never faster."""
    times: dict[Route, float] = dict.fromkeys(routes, float("inf"))
    for _ in range(_REPEATS):
        for route, run in routes.items():
            start = time.perf_counter()
            run()
            times[route] = min(times[route], time.perf_counter() - start)
    return times
