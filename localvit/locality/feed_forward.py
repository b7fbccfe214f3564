"""The mechanism: a depth-wise convolution over the token lattice, inside a feed-forward network (FFN).

Two forms, both built on the two views in :mod:`localvit.locality.grid`:

* :class:`LocalityFeedForward` *replaces* an FFN (``init="paper"``),
* :class:`HiddenLocality` *adds* to the FFN that is there, at first as an exact no-op
  (``init="preserve"``).

Shapes: B batch, P prefix tokens, N patch tokens on a lattice of H rows and W columns, C = ``dim``,
D = hidden width. A "column" is a map (B, C, T, 1): point-wise layers run on it over all T tokens at once.
"""

from collections.abc import Callable
from functools import partial
from typing import Optional

import torch
import torch.nn.functional as F
from timm.layers import EcaModule, LayerNorm2d, SqueezeExcite, trunc_normal_
from torch import Tensor, nn

from localvit.locality.config import DEFAULT_EXPANSION, DEFAULT_GATE_WIDTH, ConfigError, LocalityConfig
from localvit.locality.grid import Grid, GridRecord, map_to_tokens, tokens_to_map

_ACTIVATIONS: dict[str, Callable[[], nn.Module]] = {
    "none": nn.Identity,
    "relu": nn.ReLU,
    "relu6": nn.ReLU6,
    "hardswish": nn.Hardswish,
    "gelu": nn.GELU,
    "gelu_tanh": partial(nn.GELU, approximate="tanh"),
    "silu": nn.SiLU,
}


class HardSigmoid(nn.Module):
    """``relu6(x + 3) / 6``. PyTorch's own has 1/6 in single precision in its backward pass, which is a
    relative error of 1e-8 in float64."""

    def forward(self, x: Tensor) -> Tensor:
        return F.relu6(x + 3.0) / 6.0


class LatticeModule(nn.Module):
    """A module that needs the lattice of the tokens that it is given.

    The lattice comes with the call, or from the model's :class:`GridRecord`. It is never guessed from
    the number of tokens.
    """

    # TorchScript evaluates a property listed in both when it scripts the module, and keeps it as a
    # constant; so a script made after `set_input_size` has the new lattice.
    __constants__ = ("num_prefix_tokens", "static_size")
    __jit_unused_properties__ = ("static_size",)
    __jit_ignored_attributes__ = ("config", "grid_record")

    def __init__(
        self, config: LocalityConfig, num_prefix_tokens: int, grid_record: GridRecord | None
    ) -> None:
        super().__init__()
        self.config = config.resolve()
        self.num_prefix_tokens = num_prefix_tokens
        self.grid_record = grid_record

    @property
    def static_size(self) -> tuple[int, int]:
        return self.grid_record.static_size if self.grid_record is not None else (0, 0)

    def current_grid(self) -> Grid:
        """Lattice of the forward pass under way."""
        if torch.jit.is_scripting():
            height, width = self.static_size
        else:
            height, width = self._recorded_size()
        return Grid(height, width, self.num_prefix_tokens)

    @torch.jit.unused
    def _recorded_size(self) -> tuple[int, int]:
        size = self.grid_record.size if self.grid_record is not None else None
        if size is None:
            raise RuntimeError(
                f"{type(self).__name__} does not know the lattice of its tokens: run it inside the model "
                "that was localized, or pass grid=Grid(height, width, num_prefix_tokens)"
            )
        return size


class LocalityFeedForward(LatticeModule):
    """Feed-forward network with locality (LocalViT, arXiv 2104.05707, figure 3 and equation 9).

    Point-wise expansion, depth-wise k x k convolution over the lattice, channel gate, point-wise
    projection, in the order and with the norms and activations that ``config`` names. This is the
    *branch*: the residual belongs to the transformer block, as with timm's MLPs. (The authors' module
    adds its input itself, and their block adds nothing; the sum is the same.)

    Equal to timm's ``InvertedResidual`` with a squeeze-and-excitation gate; what that lacks, and this
    has, is tokens in and out, prefix tokens and the rest of the design space.

    Args:
        dim: Token width C.
        config: Design; ``init`` must be ``"paper"``.
        hidden_dim: Hidden width D where ``config.expansion`` leaves it open; default: 4 C.
        num_prefix_tokens: P, used when the lattice is looked up rather than passed.
        grid_record: Where to look the lattice up; without it, ``grid`` must be passed.

    Raises:
        ConfigError: if a width that follows from ``dim`` is impossible, or ``init`` is ``"preserve"``.
    """

    def __init__(
        self,
        dim: int,
        config: LocalityConfig | None = None,
        *,
        hidden_dim: int | None = None,
        num_prefix_tokens: int = 0,
        grid_record: GridRecord | None = None,
    ) -> None:
        super().__init__(config or LocalityConfig(), num_prefix_tokens, grid_record)
        cfg = self.config
        if cfg.init != "paper":
            raise ConfigError(
                f"init={cfg.init!r} adds to an existing FFN (use localize, or HiddenLocality); "
                "LocalityFeedForward needs init='paper'"
            )
        assert cfg.norm is not None
        assert cfg.activation is not None
        if cfg.expansion is None and hidden_dim is not None:
            hidden = hidden_dim
        else:
            hidden = int(dim * (cfg.expansion or DEFAULT_EXPANSION))
        if hidden < 1:
            raise ConfigError(f"expansion={cfg.expansion} of dim={dim} leaves no hidden channel")
        norms = cfg.norm if isinstance(cfg.norm, tuple) else (cfg.norm,) * 3
        acts = cfg.activation if isinstance(cfg.activation, tuple) else (cfg.activation,) * 2
        bias = bool(cfg.bias)
        self.conv_first = cfg.depthwise and cfg.position == "first"
        self.conv_mid = cfg.depthwise and cfg.position == "mid"
        self.norm_before_act = cfg.norm_order == "norm-act"
        self.inner_skip = bool(cfg.inner_skip)
        self.prefix = str(cfg.prefix)

        self.fc1 = nn.Conv2d(dim, hidden, 1, bias=bias)
        self.norm1 = _norm(norms[0], hidden, cfg)
        self.act1 = _ACTIVATIONS[acts[0]]()
        if cfg.depthwise:
            channels = dim if self.conv_first else hidden
            self.conv = _depthwise(channels, cfg.kernel_size, bias)
            self.norm2 = _norm(norms[1], channels, cfg)
            self.act2 = _ACTIVATIONS[acts[1]]()
        self.gate = _gate(dim, hidden, cfg)
        self.fc2 = nn.Conv2d(hidden, dim, 1, bias=bias)
        self.norm3 = _norm(norms[2], dim, cfg)
        self.init_weights()

    def init_weights(self) -> None:
        """Initial values of the reference: PyTorch's own for convolutions, the linear layers of the
        squeeze-and-excitation gate normal with standard deviation 0.02 and zero bias."""
        if isinstance(self.gate, SqueezeExcite):
            for layer in (self.gate.fc1, self.gate.fc2):
                trunc_normal_(layer.weight, std=0.02)
                nn.init.zeros_(layer.bias)  # type: ignore[arg-type]

    def forward(self, tokens: Tensor, grid: Optional[Grid] = None) -> Tensor:  # noqa: UP045 (TorchScript)
        """``(B, P + N, C) -> (B, P + N, C)``; ``grid`` beats the recorded lattice."""
        if grid is None:
            grid = self.current_grid()
        _check_lattice(tokens, grid)
        prefix = grid.num_prefix_tokens
        riding = prefix if self.prefix == "mlp" else 0  # prefix tokens that take the point-wise path
        lattice = Grid(grid.height, grid.width, riding)

        x = tokens if riding == prefix else tokens[:, prefix:]
        if self.conv_first:
            x = _after_prefix(x, riding, self._convolve(tokens_to_map(x, lattice)))
        x = map_to_tokens(self._expand(_column(x)))
        if self.conv_mid:
            x = _after_prefix(x, riding, self._convolve(tokens_to_map(x, lattice)))
        if self.gate is not None:
            x = _after_prefix(x, riding, self.gate(tokens_to_map(x, lattice)))
        x = map_to_tokens(self.norm3(self.fc2(_column(x))))

        if riding == prefix:
            return x
        if self.prefix == "passthrough":
            return torch.cat([tokens[:, :prefix], x], dim=1)
        return F.pad(x, (0, 0, prefix, 0))  # the branch is zero where a token bypasses it

    def _expand(self, x: Tensor) -> Tensor:
        x = self.fc1(x)
        return self.act1(self.norm1(x)) if self.norm_before_act else self.norm1(self.act1(x))

    def _convolve(self, x: Tensor) -> Tensor:
        y = self.conv(x)
        if self.inner_skip:
            y = y + x
        return self.act2(self.norm2(y)) if self.norm_before_act else self.norm2(self.act2(y))


class HiddenLocality(LatticeModule):
    """Depth-wise convolution added to the hidden state of an existing FFN: ``h + conv(h)`` on the patch
    tokens, then the layer it stands in front of.

    The kernel starts at zero, so the FFN computes bit for bit what it did; the gradient of a zero kernel
    is not zero, so it learns from the first step. Prefix tokens pass unchanged.

    Args:
        hidden_dim: Width D of the hidden state.
        then: The layer that follows (the dropout in front of the projection, in timm's MLPs).
        config: Design; ``init`` must be ``"preserve"``.
        num_prefix_tokens, grid_record: As for :class:`LocalityFeedForward`.
    """

    def __init__(
        self,
        hidden_dim: int,
        then: nn.Module,
        config: LocalityConfig,
        *,
        num_prefix_tokens: int = 0,
        grid_record: GridRecord | None = None,
    ) -> None:
        super().__init__(config, num_prefix_tokens, grid_record)
        if config.init != "preserve":
            raise ConfigError(f"init={config.init!r} replaces an FFN; HiddenLocality needs init='preserve'")
        self.conv = _depthwise(hidden_dim, config.kernel_size, bias=False)
        self.then = then
        self.init_weights()

    def init_weights(self) -> None:
        """Zero, so that the FFN starts as it was."""
        nn.init.zeros_(self.conv.weight)

    def forward(self, hidden: Tensor, grid: Optional[Grid] = None) -> Tensor:  # noqa: UP045 (TorchScript)
        """``(B, P + N, D) -> (B, P + N, D)``; ``grid`` beats the recorded lattice."""
        if grid is None:
            grid = self.current_grid()
        _check_lattice(hidden, grid)
        patches = tokens_to_map(hidden, grid)
        return self.then(_after_prefix(hidden, grid.num_prefix_tokens, patches + self.conv(patches)))


def _check_lattice(tokens: Tensor, grid: Grid) -> None:
    patches = tokens.shape[1] - grid.num_prefix_tokens
    torch._assert(
        patches == grid.height * grid.width,
        f"{tokens.shape[1]} tokens, {grid.num_prefix_tokens} of them prefix tokens, leave {patches} patch "
        f"tokens, but the lattice has {grid.height} x {grid.width} = {grid.height * grid.width}",
    )


def _column(tokens: Tensor) -> Tensor:
    """``(B, T, C) -> (B, C, T, 1)``, a channels-last view."""
    return tokens_to_map(tokens, Grid(tokens.shape[1], 1, 0))


def _after_prefix(tokens: Tensor, prefix: int, patches: Tensor) -> Tensor:
    """The first ``prefix`` of ``tokens``, followed by the tokens of the map ``patches``."""
    rest = map_to_tokens(patches)
    return rest if prefix == 0 else torch.cat([tokens[:, :prefix], rest], dim=1)


def _depthwise(channels: int, kernel_size: int, bias: bool) -> nn.Conv2d:
    return nn.Conv2d(channels, channels, kernel_size, padding=kernel_size // 2, groups=channels, bias=bias)


def _norm(name: str, channels: int, config: LocalityConfig) -> nn.Module:
    if name == "batch":
        return nn.BatchNorm2d(channels)
    if name == "layer":
        return LayerNorm2d(channels)
    if name == "group":
        if channels % config.norm_groups:
            raise ConfigError(f"norm_groups={config.norm_groups} does not divide {channels} channels")
        return nn.GroupNorm(config.norm_groups, channels)
    return nn.Identity()


def _gate(dim: int, hidden: int, config: LocalityConfig) -> nn.Module | None:
    if config.gate in ("eca", "eca_hard"):
        return EcaModule(hidden, gate_layer=HardSigmoid if config.gate == "eca_hard" else nn.Sigmoid)
    if config.gate != "se":
        return None
    width = config.gate_width or DEFAULT_GATE_WIDTH
    if config.gate_reduction is not None:
        width = int(hidden // (dim if config.gate_reduction == "dim" else config.gate_reduction))
        if width < 1:
            raise ConfigError(
                f"gate_reduction={config.gate_reduction} of {hidden} hidden channels leaves no squeeze unit "
                f"(accepted: at most {hidden})"
            )
    return SqueezeExcite(hidden, rd_channels=width, gate_layer=HardSigmoid)
