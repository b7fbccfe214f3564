"""Feed-forward networks (FFNs) in their fast form.

A fast form has the parameters of the plain one with norms folded into its linear layers and convolution. It
computes activations in place, adds its branch to the residual stream in place, computes prefix tokens
separately (so that no hidden maps are concatenated), and computes images in chunks if the hidden map exceeds
the cache. It is the copied module with its class changed, so paths, attributes and the grid stay the same.
"""

import copy
import math
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import torch
from timm.layers import GluMlp, LayerNorm2d, Mlp, SwiGLU
from torch import Tensor, nn

from localvit.acceleration.fusing.folding import (
    BATCH_NORMS,
    InferenceOnly,
    add_input,
    affine_of,
    has_statistics,
    rescale,
)
from localvit.acceleration.native.build import library
from localvit.acceleration.native.form import (
    Numbers,
    covers_convolution,
    native_form,
    traceable_numbers,
)
from localvit.acceleration.native.mix import mix_, mix_in_place
from localvit.locality import (
    Grid,
    HiddenLocality,
    LocalityFeedForward,
    Pointwise,
    check_grid,
    given_grid,
    map_to_tokens,
    tokens_to_map,
    tokens_to_row,
)

# Bytes of hidden maps in a chunk, per thread: few enough to fit into caches, enough to amortize calls
# (measured on a Xeon with 2 MiB of second-level cache; from 1.3 to 5 MiB the differences are noise).
CHUNK_BYTES = 2**22

# Computes the stage in place: `(x, grid, number of act1, of act2, of the gate)`, 0 for none.
NativeStage = Callable[[Tensor, Grid, int, int, int], None]

_IN_PLACE = (nn.ReLU, nn.ReLU6, nn.Hardswish, nn.SiLU)


class FastFeedForward(InferenceOnly):
    """Branch of an FFN, computed separately for patch and prefix tokens by subclasses."""

    hidden_features: int
    out_features: int

    @property
    def ends_in_projection(self) -> bool:
        """True if the output of `fc2` is the branch of every token, so that it can be scaled there."""
        raise NotImplementedError

    def own_grid(self, x: Tensor) -> Grid:
        """Return the grid of these tokens in the current forward pass."""
        raise NotImplementedError

    def on_patches(self, x: Tensor, grid: Grid) -> Tensor:
        """Compute the branch of patch tokens, which are contiguous: `(B, N, C) -> (B, N, C)`."""
        raise NotImplementedError

    def on_prefix(self, x: Tensor) -> Tensor | None:
        """Compute the branch of prefix tokens, which does not depend on patches; `None` for zero."""
        raise NotImplementedError

    def add_to(self, residual: Tensor, x: Tensor, grid: Grid | None = None) -> Tensor:
        """Compute `residual + branch(x)` in place. `x` may be `residual` itself."""
        grid = self.own_grid(x) if grid is None else grid
        check_grid(x, grid)
        prefix, patches = grid.num_prefix_tokens, Grid(grid.height, grid.width)
        branch = self.on_prefix(x[:, :prefix]) if prefix > 0 else None
        if branch is not None:
            residual[:, :prefix].add_(branch)
        for rows in self._chunks(x):
            residual[rows, prefix:].add_(self.on_patches(x[rows, prefix:].contiguous(), patches))
        return residual

    def forward(self, x: Tensor, grid: Grid | None = None, columns: int | None = None) -> Tensor:
        """Compute the branch alone: `(B, P + N, C) -> (B, P + N, C')`."""
        zeros = x.new_zeros(*x.shape[:-1], self.out_features)
        return self.add_to(zeros, x, given_grid(grid, columns, 0))

    def _chunks(self, x: Tensor) -> Iterator[slice]:
        """Divide the images into chunks: one for a graph (export, compilation), which fits any batch size."""
        if torch.compiler.is_compiling() or torch.jit.is_tracing() or x.device.type != "cpu":
            yield slice(None)
            return
        image = math.prod(x.shape[1:-1]) * self.hidden_features * x.element_size()
        step = max(1, CHUNK_BYTES * torch.get_num_threads() // max(1, image))
        for start in range(0, max(1, len(x)), step):
            yield slice(start, start + step)


class FastLocalityFeedForward(FastFeedForward, LocalityFeedForward):
    """`localvit.LocalityFeedForward` with linear layers `fc1` and `fc2`.

    Attributes:
        native: The native kernels may compute the stage between them.
    """

    native: bool

    @property
    def ends_in_projection(self) -> bool:
        return isinstance(self.norm3, nn.Identity) and self.prefix != "identity"

    def own_grid(self, x: Tensor) -> Grid:
        return self.current_grid()

    def on_patches(self, x: Tensor, grid: Grid) -> Tensor:
        return self.transform(x, grid)

    def on_prefix(self, x: Tensor) -> Tensor | None:
        if self.prefix != "pointwise":
            return x if self.prefix == "identity" else None
        row = tokens_to_row(self.fc1(x))
        h = map_to_tokens(self.act1(self.norm1(row)) if self.norm_before_act else self.norm1(self.act1(row)))
        if self.conv_mid:
            h = self.act_prefix(h)
        if self.glu != "none":
            gate, value = h.chunk(2, dim=-1)
            h = self.act_glu(gate) * value
        return self.project(h)

    def expand(self, x: Tensor) -> Tensor:
        return self.fc1(x)

    def mix(self, x: Tensor, grid: Grid) -> Tensor:
        found = None if "_convolve" in self.__dict__ else native_stage(self, x)
        if found is None:
            return super().mix(x, grid)
        (before, after, kind), compute = found
        x = (self.act1(x) if before is None else x).contiguous()  # a replaced layer may return any layout
        gate = kind if kind and after is not None else 0
        compute(x, grid, before or 0, after or 0, gate)
        x = self.act2(x) if after is None else x
        return x if gate or self.gate is None else map_to_tokens(self.gate(tokens_to_map(x, grid)))

    def project(self, x: Tensor) -> Tensor:
        y = self.fc2(x)
        return y if isinstance(self.norm3, nn.Identity) else map_to_tokens(self.norm3(tokens_to_row(y)))


class FoldedHiddenLocality(HiddenLocality):
    """`HiddenLocality` with the added input folded into its kernel, on patch tokens only, in place."""

    native: bool

    def transform(self, hidden: Tensor, grid: Grid) -> Tensor:
        """Apply the convolution: `(B, N, D) -> (B, N, D)`."""
        found = native_stage(self, hidden)
        if found is None or not hidden.is_contiguous():
            return map_to_tokens(self.conv(tokens_to_map(hidden, grid)))
        _, compute = found
        compute(hidden, grid, 0, 0, 0)
        return hidden


class _FastMlp(FastFeedForward):
    """timm's MLPs, with or without a depth-wise convolution on the hidden state."""

    fc2: Any
    norm: Any
    drop1: Any

    ends_in_projection = True

    def hidden(self, x: Tensor) -> Tensor:
        """Compute the hidden state of any tokens: `(B, T, C) -> (B, T, D)`."""
        raise NotImplementedError

    def own_grid(self, x: Tensor) -> Grid:
        local = isinstance(self.drop1, FoldedHiddenLocality)
        return self.drop1.current_grid() if local else Grid(1, x.shape[1])

    def on_patches(self, x: Tensor, grid: Grid) -> Tensor:
        h = self.hidden(x)
        if isinstance(self.drop1, FoldedHiddenLocality):
            h = self.drop1(h, grid)
        return self.fc2(self.norm(h))

    def on_prefix(self, x: Tensor) -> Tensor:
        return self.fc2(self.norm(self.hidden(x)))

    def forward(self, x: Tensor, grid: Grid | None = None, columns: int | None = None) -> Tensor:
        """Compute the branch alone: `(B, T, C) -> (B, T, C')`."""
        local = isinstance(self.drop1, FoldedHiddenLocality)
        return super().forward(x, grid, columns) if local else self.on_prefix(x)


class FastMlp(_FastMlp, Mlp):
    def hidden(self, x: Tensor) -> Tensor:
        return self.act(self.fc1(x))


class FastGluMlp(_FastMlp, GluMlp):
    def hidden(self, x: Tensor) -> Tensor:
        first, second = self.fc1(x).chunk(2, dim=-1)
        return first * self.act(second) if self.gate_last else self.act(first) * second


class FastSwiGLU(_FastMlp, SwiGLU):
    def hidden(self, x: Tensor) -> Tensor:
        return self.act(self.fc1_g(x)).mul_(self.fc1_x(x))


def native_stage(module: Any, x: Tensor) -> tuple[Numbers, NativeStage] | None:
    """Return what the native kernels can compute of the stage now, if anything: their numbers of activations
    and gate (`None` for an unsupported one), and the function that computes it.

    They have no derivative here, and an exported or traced graph may run on other machines. A compiled graph
    calls them as an operator.
    """
    differentiated = torch.is_grad_enabled() and x.requires_grad
    traced = torch.jit.is_tracing() or torch.compiler.is_exporting()
    # A model may move from a machine with a compiler to one without.
    if not module.native or differentiated or traced or x.numel() == 0 or not _compiled_kernels():
        return None
    if not torch.compiler.is_compiling():
        form = native_form(module, x)
        if form is None or form.norms != [None, None] or form.addresses() is None:
            return None
        return form.numbers, partial(mix_in_place, form)
    if x.dtype != torch.float32 or x.device.type != "cpu" or torch.is_autocast_enabled("cpu"):
        return None
    numbers = traceable_numbers(module)
    return None if numbers is None else (numbers, partial(_mix_by_operator, module))


def _mix_by_operator(module: Any, x: Tensor, grid: Grid, act: int, act2: int, gate: int) -> None:
    conv, own = module.conv, module.gate if gate else None
    layers = [] if own is None else [own.fc1, own.fc2] if hasattr(own, "fc1") else [own.conv]
    weights = [parameter for layer in layers for parameter in (layer.weight, layer.bias)]
    weights += [None] * (4 - len(weights))
    mix_(x, conv.weight, conv.bias, weights, grid.height, grid.width, act, act2, gate)


@torch.compiler.assume_constant_result
def _compiled_kernels() -> bool:
    return library() is not None


def hooked(module: nn.Module) -> bool:
    """Return whether a hook sees the inputs or outputs of `module`."""
    return bool(module._forward_hooks or module._forward_pre_hooks)


def fuse_locality(ffn: Any) -> str | None:
    """Change `ffn` to its fast form. Return the reason if it has none."""
    if any(hooked(module) for module in ffn.modules() if module is not ffn):
        return "hooks on its layers"
    if not ffn.raster:
        return "tokens in another order or layout"
    stages = [
        (ffn.fc1, "norm1"),
        (ffn.fc2, "norm3"),
        *([(ffn.conv, "norm2")] if ffn.config.depthwise else []),
    ]
    for layer, name in stages:
        norm = getattr(ffn, name)
        if type(layer) not in (nn.Conv2d, Pointwise):
            return f"{type(layer).__name__} in place of a convolution"
        if not (has_statistics(norm) or type(norm) in (nn.Identity, LayerNorm2d)):
            return f"{type(norm).__name__}, whose statistics span more than one token"

    if ffn.config.depthwise and ffn.inner_skip:
        add_input(ffn.conv)
        ffn.inner_skip = False
    for layer, name in stages:
        norm = getattr(ffn, name)
        if type(norm) in BATCH_NORMS and (ffn.norm_before_act or name == "norm3"):
            rescale(layer, *affine_of(norm))
            setattr(ffn, name, nn.Identity())
    ffn.fc1, ffn.fc2 = (_linear(layer) for layer in (ffn.fc1, ffn.fc2))
    _in_place_activations(ffn, "act1", "act2", "act_glu")
    ffn.hidden_features, ffn.out_features = ffn.fc1.out_features, ffn.fc2.out_features
    folded = ffn.conv_mid and type(ffn.norm1) is nn.Identity and type(ffn.norm2) is nn.Identity
    ffn.native = folded and ffn.glu == "none" and _natively(ffn.conv)
    ffn.__class__ = FastLocalityFeedForward
    return None


def _natively(conv: Any) -> bool:
    """Return whether the native kernels are available and support this convolution."""
    ours = conv.weight.dtype == torch.float32 and conv.weight.device.type == "cpu"
    return ours and covers_convolution(conv) and _compiled_kernels()


_FAST_MLPS: dict[type[nn.Module], type[_FastMlp]] = {Mlp: FastMlp, GluMlp: FastGluMlp, SwiGLU: FastSwiGLU}


def fuse_mlp(mlp: Any) -> str | None:
    """Change one of timm's MLPs to its fast form. Return the reason if it has none."""
    if any(hooked(module) for module in mlp.modules() if module is not mlp):
        return "hooks on its layers"
    if type(last := mlp.fc2) is not nn.Linear:
        return f"{type(last).__module__}.{type(last).__name__} in place of a linear layer"
    if type(mlp.drop1) is HiddenLocality:
        hidden: Any = mlp.drop1
        if not hidden.raster:
            return "tokens in another order or layout"
        if type(hidden.conv) is not nn.Conv2d or type(hidden.then) is not nn.Identity:
            return "other layers on the hidden state"
        add_input(hidden.conv)
        hidden.native = _natively(hidden.conv)
        hidden.__class__ = FoldedHiddenLocality
    elif type(mlp.drop1) is not nn.Identity:  # dropout was removed before
        return f"{type(mlp.drop1).__name__} on the hidden state"
    _in_place_activations(mlp, "act")
    mlp.hidden_features, mlp.out_features = mlp.fc2.in_features, mlp.fc2.out_features
    mlp.__class__ = _FAST_MLPS[type(mlp)]
    return None


def _linear(conv: Any) -> nn.Linear:
    """Return a 1 x 1 convolution as a linear layer."""
    linear = nn.Linear(conv.in_channels, conv.out_channels, conv.bias is not None, device="meta").eval()
    linear.weight = nn.Parameter(conv.weight.detach().flatten(1), requires_grad=False)
    if conv.bias is not None:
        linear.bias = nn.Parameter(conv.bias.detach(), requires_grad=False)
    return linear


def _in_place_activations(module: nn.Module, *names: str) -> None:
    for name in names:
        activation: Any = getattr(module, name, None)
        if type(activation) in _IN_PLACE:
            activation = copy.copy(activation)  # other modules may use it too
            activation.inplace = True
            setattr(module, name, activation)
