"""Feed-forward networks (FFNs) in their fast form.

Each has the parameters of the plain one with what follows a linear layer or convolution folded into it. It
computes activations in place, adds its branch to the residual stream where that is, treats prefix tokens
apart from the map (so that nothing of hidden width is concatenated), and runs image by image where the hidden
map exceeds the cache.

A fast form is the copied module with its class changed, so paths, attributes and the grid stay.
"""

import copy
import math
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from timm.layers import EcaModule, GluMlp, LayerNorm2d, Mlp, SqueezeExcite, SwiGLU
from torch import Tensor, nn

from localvit.acceleration.fusing.folding import BATCH_NORMS, add_input, affine_of, has_statistics, rescale
from localvit.acceleration.fusing.inference import InferenceOnly
from localvit.acceleration.fusing.linear import without_bias
from localvit.acceleration.native.build import library
from localvit.acceleration.native.form import ACTIVATIONS, covers_convolution
from localvit.acceleration.native.mix import mix_
from localvit.locality import (
    Grid,
    HardSigmoid,
    HiddenLocality,
    LocalityFeedForward,
    Pointwise,
    check_grid,
    map_to_tokens,
    tokens_to_map,
    tokens_to_row,
)

# Hidden maps of so many bytes, per thread, are worked on at a time: few enough for caches, enough for calls
# not to count (measured on a Xeon with 2 MiB of second-level cache; 1.3 to 5 MiB differ by the noise).
CHUNK_BYTES = 2**22

# One prefix token for so many others, or fewer, takes part in linear layers where it could be left out.
RIDERS = 64

_IN_PLACE = (nn.ReLU, nn.ReLU6, nn.Hardswish, nn.SiLU)


class FastFeedForward(InferenceOnly):
    """Branch of an FFN in parts: patch tokens, prefix tokens. Subclasses say how each is computed."""

    hidden_features: int

    @property
    def ends_in_projection(self) -> bool:
        """Whether what leaves ``fc2`` is the branch of every token, so that it can be scaled there."""
        raise NotImplementedError

    def own_grid(self) -> Grid | None:
        """Of the patch tokens; ``None`` where the FFN treats all tokens alike."""
        raise NotImplementedError

    def on_patches(self, x: Tensor, grid: Grid | None) -> Tensor:
        """The branch (b, N, C) of the patch tokens of (b, P + N, C)."""
        raise NotImplementedError

    def on_prefix(self, x: Tensor) -> Tensor | None:
        """The branch of prefix tokens (b, P, C), which does not depend on patches; ``None`` for zero."""
        raise NotImplementedError

    def add_to(self, residual: Tensor, x: Tensor, grid: Grid | None = None) -> Tensor:
        """``residual + branch(x)``, in place. ``x`` may be ``residual`` itself."""
        grid = self.own_grid() if grid is None else grid
        prefix = 0 if grid is None else grid.num_prefix_tokens
        if grid is not None:
            check_grid(x, grid)
        if prefix > 0:
            branch = self.on_prefix(x[:, :prefix])
            if branch is not None:
                residual[:, :prefix].add_(branch)
        for rows in self._chunks(x):
            residual[rows, prefix:].add_(self.on_patches(x[rows], grid))
        return residual

    def forward(self, x: Tensor, grid: Grid | None = None) -> Tensor:
        """The branch alone: ``(B, P + N, C) -> (B, P + N, C)``."""
        grid = self.own_grid() if grid is None else grid
        if grid is not None:
            return self.add_to(torch.zeros_like(x), x, grid)
        parts = [self.on_patches(x[rows], None) for rows in self._chunks(x)]
        return parts[0] if len(parts) == 1 else torch.cat(parts)

    def _chunks(self, x: Tensor) -> Iterator[slice]:
        """Images at a time. A graph (export, compilation) takes all, for any batch size."""
        if torch.compiler.is_compiling() or torch.jit.is_tracing() or x.device.type != "cpu":
            yield slice(None)
            return
        image = math.prod(x.shape[1:-1]) * self.hidden_features * x.element_size()
        step = max(1, CHUNK_BYTES * torch.get_num_threads() // max(1, image))
        for start in range(0, max(1, len(x)), step):
            yield slice(start, start + step)


class FastLocalityFeedForward(FastFeedForward, LocalityFeedForward):
    """:class:`localvit.LocalityFeedForward` with linear layers ``fc1`` and ``fc2``.

    ``native``: whether the native kernels may compute the stage between them.
    """

    native: bool

    @property
    def ends_in_projection(self) -> bool:
        return isinstance(self.norm3, nn.Identity) and self.prefix != "passthrough"

    def own_grid(self) -> Grid:
        return self.current_grid()

    def expand(self, x: Tensor) -> Tensor:
        return self.fc1(x)

    def project(self, x: Tensor) -> Tensor:
        return _on_tokens(self.norm3, self.fc2(x))

    def on_patches(self, x: Tensor, grid: Grid | None) -> Tensor:
        assert grid is not None
        if self.native:
            layers = children_of(self, "fc1", "act1", "conv", "act2", "fc2")
            if native_applies(x, *layers):
                return self._natively(x, grid, layers)
        return self.transform(patches_of(x, grid), Grid(grid.height, grid.width))

    def _natively(self, x: Tensor, grid: Grid, layers: list[Any]) -> Tensor:
        """Few prefix tokens go through the linear layers too, and what becomes of them is dropped: that costs
        less than to copy all others away from them."""
        tokens = grid.height * grid.width
        if grid.num_prefix_tokens * RIDERS > tokens:
            x = patches_of(x, grid)
        fc1, act1, conv, act2, fc2 = layers
        before, after = (ACTIVATIONS.get(type(act)) for act in (act1, act2))
        h, shift = (act1(fc1(x)), None) if before is None else without_bias(fc1, x)
        h = h.contiguous()  # a layer that somebody put there may give anything
        gate: Any = self.gate
        squeeze = gate.weights() if gate is not None and after is not None else ()
        height, width, _ = grid
        mean = mix_(h, shift, conv.weight, conv.bias, squeeze, height, width, before or 0, after or 0)
        if after is None:
            h = act2(h)
            mean = h[:, -tokens:].mean(1)
        if gate is not None and not squeeze:
            h.mul_(gate.values(mean).unsqueeze(1))
        return _on_tokens(self.norm3, fc2(h))[:, -tokens:]

    def on_prefix(self, x: Tensor) -> Tensor | None:
        if self.prefix != "mlp":
            return x if self.prefix == "passthrough" else None
        row = tokens_to_row(self.fc1(x))
        h = map_to_tokens(self.act1(self.norm1(row)) if self.norm_before_act else self.norm1(self.act1(row)))
        if self.conv_mid:
            h = self.act_prefix(h)
        if self.glu != "none":
            gate, value = h.chunk(2, dim=-1)
            h = self.act_glu(gate) * value
        return self.project(h)


class Clamp(nn.Module):
    """What is left of a hard sigmoid, `relu6(x + 3) / 6`, whose sum and quotient are folded."""

    def forward(self, x: Tensor) -> Tensor:
        return x.clamp_(0.0, 1.0)


class FastGate(InferenceOnly):
    """Channel gate of a fused model: its values from the means of channels, and the gated map in place.

    A squeeze-and-excitation gate has linear layers `fc1` and `fc2`.
    """

    def __init__(self, gate: Any) -> None:
        super().__init__()
        self.squeezes = isinstance(gate, SqueezeExcite)
        self.gate = gate.gate
        if self.squeezes:
            if type(gate.gate) is HardSigmoid:
                sixth = torch.full_like(gate.fc2.weight[:, 0, 0, 0], 1 / 6, dtype=torch.float64)
                rescale(gate.fc2, sixth, 3 * sixth)
                self.gate = Clamp()
            self.fc1, self.act, self.fc2 = _linear(gate.fc1), gate.act, _linear(gate.fc2)
        else:
            self.conv = gate.conv
        self.eval()

    def values(self, mean: Tensor) -> Tensor:
        """``(b, D) -> (b, D)``."""
        if not self.squeezes:
            return self.gate(self.conv(mean.unsqueeze(1))).squeeze(1)
        return self.gate(self.fc2(self.act(self.fc1(mean))))

    def forward(self, x: Tensor) -> Tensor:
        """``(b, D, H, W) -> (b, D, H, W)``, in the memory of `x`."""
        return x.mul_(self.values(x.mean((2, 3)))[:, :, None, None])

    def weights(self) -> Sequence[Tensor]:
        """Return weights and biases of a gate that the native kernel computes; nothing for another one."""
        if not self.squeezes:
            return ()
        first, act, second, clamp = layers = children_of(self, "fc1", "act", "fc2", "gate")
        known = isinstance(first, nn.Linear) and isinstance(second, nn.Linear)
        if not known or type(act) is not nn.ReLU or type(clamp) is not Clamp or any(map(hooked, layers)):
            return ()
        if first.bias is None or second.bias is None:
            return ()
        return first.weight, first.bias, second.weight, second.bias


class FoldedHiddenLocality(HiddenLocality):
    """:class:`HiddenLocality` with the added input folded into its kernel; takes the patch tokens alone, and
    their memory."""

    native: bool

    def forward(self, patches: Tensor, grid: Grid | None = None) -> Tensor:
        """``(b, N, D) -> (b, N, D)``."""
        assert grid is not None
        if self.native and native_applies(patches, self.conv):
            mix_(patches, None, self.conv.weight, self.conv.bias, (), grid.height, grid.width, 0, 0)
            return patches
        return map_to_tokens(self.conv(tokens_to_map(patches, Grid(grid.height, grid.width))))


class _FastHidden(FastFeedForward):
    """timm's MLPs, with or without a depth-wise convolution on the hidden state."""

    fc2: Any
    norm: Any
    drop1: Any

    @property
    def ends_in_projection(self) -> bool:
        return True

    def hidden(self, x: Tensor) -> Tensor:
        """The hidden state (b, T, D), point-wise."""
        raise NotImplementedError

    def own_grid(self) -> Grid | None:
        return self.drop1.current_grid() if isinstance(self.drop1, FoldedHiddenLocality) else None

    def on_patches(self, x: Tensor, grid: Grid | None) -> Tensor:
        h = self.hidden(patches_of(x, grid))
        if grid is not None:
            h = self.drop1(h, grid)
        return self.fc2(self.norm(h))

    def on_prefix(self, x: Tensor) -> Tensor:
        return self.fc2(self.norm(self.hidden(x)))


class FastMlp(_FastHidden, Mlp):
    def hidden(self, x: Tensor) -> Tensor:
        return self.act(self.fc1(x))


class FastGluMlp(_FastHidden, GluMlp):
    def hidden(self, x: Tensor) -> Tensor:
        first, second = self.fc1(x).chunk(2, dim=-1)
        return first * self.act(second) if self.gate_last else self.act(first) * second


class FastSwiGLU(_FastHidden, SwiGLU):
    def hidden(self, x: Tensor) -> Tensor:
        return self.act(self.fc1_g(x)).mul_(self.fc1_x(x))


def native_applies(x: Tensor, *layers: nn.Module) -> bool:
    """Whether the native kernel can take these tokens now: it has no derivative, an exported graph is for
    other machines, and hooks on ``layers`` are to see what they would see without it."""
    if not _compiled_kernels():  # the model was fused on another machine
        return False
    traced = torch.jit.is_tracing() or torch.compiler.is_exporting()
    plain = x.dtype == torch.float32 and x.device.type == "cpu" and not torch.is_autocast_enabled("cpu")
    differentiated = torch.is_grad_enabled() and x.requires_grad
    return plain and not traced and not differentiated and x.is_contiguous() and not any(map(hooked, layers))


@torch.compiler.assume_constant_result
def _compiled_kernels() -> bool:
    return library() is not None


def patches_of(x: Tensor, grid: Grid | None) -> Tensor:
    """Tokens without prefix tokens, and without gaps between images: these would keep a linear layer from
    being one product with its bias."""
    return x if grid is None else x[:, grid.num_prefix_tokens :].contiguous()


def children_of(module: nn.Module, *names: str) -> list[Any]:
    """Submodules by name. As attributes they take several times as long, which a single image feels."""
    children = module._modules
    return [children[name] for name in names]


def hooked(module: nn.Module) -> bool:
    """Whether a hook sees what ``module`` is given or gives."""
    return bool(module._forward_hooks or module._forward_pre_hooks)


def fuse_locality(ffn: Any) -> str | None:
    """Change ``ffn`` to its fast form. Returns why not, where it has none."""
    if any(hooked(module) for module in ffn.modules() if module is not ffn):
        return "hooks on its layers"
    stages = [(ffn.fc1, "norm1"), (ffn.fc2, "norm3")] + (
        [(ffn.conv, "norm2")] if ffn.config.depthwise else []
    )
    for layer, name in stages:
        norm = getattr(ffn, name)
        if type(layer) not in (nn.Conv2d, Pointwise):
            return f"{type(layer).__name__} in the place of a convolution"
        if not (has_statistics(norm) or type(norm) in (nn.Identity, LayerNorm2d)):
            return f"{type(norm).__name__}, whose statistics are over more than one token"
    if not _known_gate(ffn.gate):
        return f"the gate {type(ffn.gate).__name__}"

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
    if ffn.gate is not None:
        ffn.gate = FastGate(ffn.gate)
    ffn.hidden_features = ffn.fc1.out_features
    folded = type(ffn.norm1) is nn.Identity and ffn.conv_mid and type(ffn.norm2) is nn.Identity
    ffn.native = folded and ffn.glu == "none" and _natively(ffn.conv)
    ffn.__class__ = FastLocalityFeedForward
    return None


def _natively(conv: Any) -> bool:
    """Return whether the native kernels are there, and know this convolution."""
    weight = conv.weight
    ours = weight.dtype == torch.float32 and weight.device.type == "cpu"
    return ours and covers_convolution(conv) and _compiled_kernels()


def _known_gate(gate: Any) -> bool:
    if type(gate) is SqueezeExcite:
        return not gate.add_maxpool and type(gate.bn) is nn.Identity
    return gate is None or (type(gate) is EcaModule and gate.conv2 is None)


_FAST_MLPS: dict[type[nn.Module], type[_FastHidden]] = {
    Mlp: FastMlp,
    GluMlp: FastGluMlp,
    SwiGLU: FastSwiGLU,
}


def fuse_mlp(mlp: Any) -> str | None:
    """The same for timm's MLPs."""
    if any(hooked(module) for module in mlp.modules() if module is not mlp):
        return "hooks on its layers"
    if type(mlp.fc2) is not nn.Linear:
        return f"{type(mlp.fc2).__name__} in the place of a linear layer"
    if type(mlp.drop1) is HiddenLocality:
        if type(mlp.drop1.conv) is not nn.Conv2d or type(mlp.drop1.then) is not nn.Identity:
            return "other layers on the hidden state"
        hidden: Any = mlp.drop1
        add_input(hidden.conv)
        hidden.native = _natively(hidden.conv)
        hidden.__class__ = FoldedHiddenLocality
    elif type(mlp.drop1) is not nn.Identity:  # dropout is gone by now
        return f"{type(mlp.drop1).__name__} on the hidden state"
    _in_place_activations(mlp, "act")
    mlp.hidden_features = mlp.fc2.in_features
    mlp.__class__ = _FAST_MLPS[type(mlp)]
    return None


def _linear(conv: Any) -> nn.Linear:
    """A 1 x 1 convolution as the linear layer that it is."""
    linear = nn.Linear(conv.in_channels, conv.out_channels, conv.bias is not None, device="meta").eval()
    linear.weight = nn.Parameter(conv.weight.detach().flatten(1), requires_grad=False)
    if conv.bias is not None:
        linear.bias = nn.Parameter(conv.bias.detach(), requires_grad=False)
    return linear


def _in_place_activations(module: nn.Module, *names: str) -> None:
    for name in names:
        activation: Any = getattr(module, name, None)
        if type(activation) in _IN_PLACE:
            activation = copy.copy(activation)  # not in place where the same one serves elsewhere too
            activation.inplace = True
            setattr(module, name, activation)


def _on_tokens(norm: nn.Module, x: Tensor) -> Tensor:
    """A norm made for maps, applied to tokens (b, T, C)."""
    if isinstance(norm, nn.Identity):
        return x
    return map_to_tokens(norm(tokens_to_row(x)))
