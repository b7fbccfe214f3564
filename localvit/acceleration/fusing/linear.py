"""Linear layers of fused models.

PyTorch's BLAS on x86 is Intel's MKL. On other vendors' processors oneDNN with packed weights is faster; on
Intel's it is faster for many rows and weights of middle size. A rule decides, not a timing, so that results
are reproducible.
"""

from functools import lru_cache

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.weak import WeakTensorKeyDictionary

from localvit.acceleration.cpu import processor
from localvit.acceleration.fusing.folding import InferenceOnly

# Smaller layers (those of a channel gate) take negligible time.
_SMALLEST = 2**13
# On Intel's processors: weights, and fewest rows of an input (docs/decisions/acceleration.md has the times).
_INTEL_WEIGHTS, _INTEL_ROWS = range(2**15, 2**20 + 1), 512


class PackedLinear(InferenceOnly, nn.Linear):
    """Linear layer by oneDNN with packed weights; parameters as in `torch.nn.Linear`.

    The weight is packed again after an in-place change of the parameter (`load_state_dict`, `copy_` under
    `torch.no_grad()`) and after an assignment to it or its `.data`. PyTorch does not count an in-place change
    through `.data` (`weight.data.mul_(2)`), so it is not detected: change the parameter itself.

    The operators are private to PyTorch. If they do not apply (another type or device, autocast, export),
    `F.linear` computes the layer.

    Attributes:
        fewest_rows: `F.linear` computes the layer for inputs of fewer rows.
    """

    fewest_rows = 1

    def forward(self, x: Tensor) -> Tensor:
        weight, bias = self.weight, self.bias  # each access of a module's parameter takes time
        if not self._packable(x, weight):
            return F.linear(x, weight, bias)
        linear = frozen_linear if torch.compiler.is_compiling() else _frozen_linear
        return linear(x, weight, bias)

    def _packable(self, x: Tensor, weight: Tensor) -> bool:
        return (
            x.dtype is weight.dtype is torch.float32
            and x.is_cpu
            and weight.is_cpu
            and not (x.requires_grad and torch.is_grad_enabled())
            and not torch.is_autocast_enabled("cpu")
            and not torch.compiler.is_exporting()
            and not torch.jit.is_tracing()
            # After the question about export: a condition on the rows would limit the graph's batch sizes.
            and x.shape[:-1].numel() >= self.fewest_rows
            # Inference tensors do not count their changes; compilation takes weights as constants anyway.
            and (torch.compiler.is_compiling() or not weight.is_inference())
        )


def packed_rows(weight: Tensor) -> int | None:
    """Return the fewest rows for which a layer with this weight should be packed (`None`: never)."""
    ours = weight.device.type == "cpu" and weight.dtype == torch.float32 and weight.numel() >= _SMALLEST
    vendor = processor("vendor_id") if ours else None  # reads a file
    if vendor is None or not packed_available():
        return None
    if vendor == "GenuineIntel":
        return _INTEL_ROWS if weight.numel() in _INTEL_WEIGHTS else None
    return 1


def pack(weight: Tensor) -> Tensor:
    """Return weights in oneDNN's own order."""
    packed: Tensor = torch.ops.mkldnn._reorder_linear_weight(weight.detach(), None)
    return packed


def packed_linear(x: Tensor, packed: Tensor, bias: Tensor | None) -> Tensor:
    """Compute `F.linear` with weights from `pack`."""
    return torch.ops.mkldnn._linear_pointwise.default(x, packed, bias, "none", [], "")


@lru_cache(maxsize=1)
def packed_available() -> bool:
    """Return whether this PyTorch has the private operators and they are correct."""
    try:
        x, weight, bias = (torch.arange(float(n)).sin() for n in (15, 20, 4))  # not random
        x, weight = x.view(3, 5), weight.view(4, 5)
        y = packed_linear(x, pack(weight), bias)
        return torch.allclose(y, F.linear(x, weight, bias), atol=1e-5)
    except (AttributeError, RuntimeError, TypeError, NotImplementedError):
        return False


_packs = WeakTensorKeyDictionary()  # weight -> (address and version, packed weight)


def _packed_weight(weight: Tensor) -> Tensor:
    state = (weight.data_ptr(), None if weight.is_inference() else weight._version)
    entry = _packs.get(weight)
    if entry is None or entry[0] != state:
        entry = _packs[weight] = (state, pack(weight))
    packed: Tensor = entry[1]
    return packed


def _frozen_linear(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    return packed_linear(x, _packed_weight(weight), bias)


# A compiled graph cannot hold packed weights, so it has an operator that packs them at its first call.
torch.library.define("localvit::frozen_linear", "(Tensor x, Tensor weight, Tensor? bias) -> Tensor")
torch.library.impl("localvit::frozen_linear", "cpu", _frozen_linear)
frozen_linear = torch.ops.localvit.frozen_linear.default


@torch.library.register_fake("localvit::frozen_linear")
def _(x, weight, bias):  # type: ignore[no-untyped-def]
    return x.new_empty((*x.shape[:-1], len(weight)))
