"""Mechanism: a depth-wise convolution over the token grid, inside a feed-forward network (FFN).

Two forms, both built on the two views in `localvit.locality.grid`:

* `LocalityFeedForward` *replaces* an FFN (`init="paper"`),
* `HiddenLocality` *adds* to the existing FFN, at first as an exact no-op
  (`init="preserve"`).

Shapes: B batch, P prefix tokens, N patch tokens on a grid of H rows and W columns, C = `dim`,
D = hidden width. A "row" is a map (B, C, 1, T) of all T = P + N tokens, on which the point-wise layers run.
"""

import threading
from typing import Any, Optional

import torch
import torch.nn.functional as F
from timm.layers import SqueezeExcite, trunc_normal_
from torch import Tensor, nn

from localvit.errors import ConfigError
from localvit.locality.config import DEFAULT_EXPANSION, LocalityConfig
from localvit.locality.grid import (
    Grid,
    GridModule,
    GridRecord,
    TokenOrder,
    after_prefix,
    check_grid,
    from_raster_order,
    given_grid,
    map_to_tokens,
    to_raster_order,
    tokens_to_map,
    tokens_to_row,
)
from localvit.locality.layers import ACTIVATIONS, Pointwise, channel_gate, depthwise, norm


class LocalityFeedForward(GridModule):
    """Feed-forward network with locality (LocalViT, arXiv 2104.05707, figure 3 and equation 9).

    Three stages: `expand`, a point-wise layer; `mix`, the depth-wise k x k convolution over the
    grid with norms, activations and channel gate; `project`, a point-wise layer. This is the *branch*:
    the residual belongs to the transformer block, as with timm's MLPs. (In the authors' code the module adds
    the residual and the block does not, which gives the same sum.)

    Other published designs are in `localvit.PRESETS`.

    With a squeeze-and-excitation gate, the branch plus the residual equals timm's `InvertedResidual`. Unlike
    it, this class takes and returns tokens, handles prefix tokens and covers the rest of the design space.

    Args:
        dim: Token width C.
        config: Design; `init` must be `"paper"`.
        hidden_dim: Hidden width of the existing FFN; default: 4 C. Used if `config.expansion` is `None`; a
            gated linear unit uses two thirds of it.
        num_prefix_tokens: P, used when the grid is looked up rather than passed.
        grid_record: Record of the grid; without it, `forward` needs `grid`.
        order: Order and layout of the tokens; default: `(B, P + N, C)` in raster order.

    Raises:
        ConfigError: if a width that follows from `dim` is impossible, or `init` is `"preserve"`.
    """

    # As constants, these let TorchScript skip an `if` branch whose condition is false: the layers used in
    # that branch may not exist.
    __constants__ = (*GridModule.__constants__, "conv_first", "conv_mid")

    def __init__(
        self,
        dim: int,
        config: LocalityConfig | None = None,
        *,
        hidden_dim: int | None = None,
        num_prefix_tokens: int = 0,
        grid_record: GridRecord | None = None,
        order: TokenOrder | None = None,
    ) -> None:
        super().__init__(config or LocalityConfig(), num_prefix_tokens, grid_record, order)
        cfg = self.config
        if cfg.init != "paper":
            raise ConfigError(
                f"init={cfg.init!r} adds to an existing FFN (use localize, or HiddenLocality); "
                "LocalityFeedForward needs init='paper'"
            )
        self.conv_first = cfg.depthwise and cfg.position == "first"
        self.conv_mid = cfg.depthwise and cfg.position == "mid"
        self.norm_before_act = cfg.norm_order == "norm-act"
        self.inner_skip = bool(cfg.inner_skip)
        self.prefix = str(cfg.prefix)
        self.glu = cfg.glu
        self._add_layers(dim, _hidden_width(dim, hidden_dim, cfg))
        self.init_weights()

    def _add_layers(self, dim: int, hidden: int) -> None:
        cfg = self.config
        expanded = hidden if cfg.glu == "none" else 2 * hidden
        norms, (bias1, bias2, bias3) = _each(cfg.norm, 3), _each(cfg.bias, 3)
        # With a gated linear unit, the only activation is on the gate; `act1` and `act2` are identities.
        act1, act2 = _each(cfg.activation if cfg.glu == "none" else "none", 2)
        self.fc1 = Pointwise(dim, expanded, bias1)
        self.norm1 = norm(norms[0], expanded, cfg)
        self.act1 = ACTIVATIONS[act1]()
        if cfg.depthwise:
            channels = dim if self.conv_first else hidden if cfg.glu == "gate" else expanded
            self.conv = depthwise(channels, cfg.kernel_size, bias2)
            self.norm2 = norm(norms[1], channels, cfg)
            self.act2 = ACTIVATIONS[act2]()
            # Prefix tokens skip the convolution; without this activation, their path would be linear.
            self.act_prefix = ACTIVATIONS[act2 if self.conv_mid and act1 == "none" else "none"]()
        self.act_glu = ACTIVATIONS["none" if cfg.glu == "none" else str(cfg.activation)]()
        self.gate = channel_gate(dim, hidden, cfg)
        self.fc2 = Pointwise(hidden, dim, bias3)
        self.norm3 = norm(norms[2], dim, cfg)

    def init_weights(self) -> None:
        """Initialize as the authors' code does: PyTorch's defaults for convolutions; truncated normal weights
        with standard deviation 0.02 and zero biases in the layers of the squeeze-and-excitation gate.
        """
        if isinstance(self.gate, SqueezeExcite):
            for layer in (self.gate.fc1, self.gate.fc2):
                trunc_normal_(layer.weight, std=0.02)
                nn.init.zeros_(layer.bias)  # type: ignore[arg-type]

    def forward(
        self,
        tokens: Tensor,
        grid: Optional[Grid] = None,  # noqa: UP045 (TorchScript)
        columns: Optional[int] = None,  # noqa: UP045
    ) -> Tensor:
        """Compute the branch: `(B, P + N, C) -> (B, P + N, C)`; `grid` overrides the recorded grid."""
        if not torch.jit.is_scripting():
            grid = given_grid(grid, columns, self.num_prefix_tokens)
        if not self.raster:
            return self.in_own_order(tokens, grid)
        return self.in_raster_order(tokens, self.current_grid() if grid is None else grid)

    def in_raster_order(self, tokens: Tensor, grid: Grid) -> Tensor:
        check_grid(tokens, grid)
        prefix = grid.num_prefix_tokens
        if prefix == 0 or self.prefix == "pointwise":  # prefix tokens take the point-wise path
            return self.run(tokens, grid)
        x = self.run(tokens[:, prefix:], Grid(grid.height, grid.width, 0))
        if self.prefix == "identity":
            return torch.cat([tokens[:, :prefix], x], dim=1)
        return F.pad(x, (0, 0, prefix, 0))  # "skip": zeros, so the block adds nothing to the prefix tokens

    def transform(self, x: Tensor, grid: Grid) -> Tensor:
        """Compute the branch for all tokens of `x`; the first `grid.num_prefix_tokens` are prefix tokens:
        `(B, P + N, C) -> (B, P + N, C)`.
        """
        if self.conv_first:
            x = self._convolve(x, grid)
        return self.project(self.mix(self.expand(x), grid))

    def expand(self, x: Tensor) -> Tensor:
        """Expand the tokens (with a gated linear unit, to 2 D): `(B, T, C) -> (B, T, D or 2 D)`."""
        return map_to_tokens(self.fc1(tokens_to_row(x)))

    def mix(self, x: Tensor, grid: Grid) -> Tensor:
        """Compute the stage between the point-wise layers: `(B, P + N, D or 2 D) -> (B, P + N, D)`."""
        row = tokens_to_row(x)
        row = self.act1(self.norm1(row)) if self.norm_before_act else self.norm1(self.act1(row))
        x = map_to_tokens(row)
        value = x
        if self.glu == "gate":
            x, value = x.chunk(2, dim=-1)
        if self.conv_mid:
            x = self._convolve(x, grid)
        if self.glu == "both":
            x, value = x.chunk(2, dim=-1)
        if self.glu != "none":
            x = self.act_glu(x) * value
        if self.gate is not None:
            x = after_prefix(x, grid.num_prefix_tokens, self.gate(tokens_to_map(x, grid)))
        return x

    def project(self, x: Tensor) -> Tensor:
        """Project the hidden state: `(B, T, D) -> (B, T, C)`."""
        return map_to_tokens(self.norm3(self.fc2(tokens_to_row(x))))

    def _convolve(self, x: Tensor, grid: Grid) -> Tensor:
        """Apply the depth-wise convolution with its norm and activation; prefix tokens skip it."""
        patches = tokens_to_map(x, grid)
        y = self.conv(patches)
        if self.inner_skip:
            y = y + patches
        y = map_to_tokens(self.act2(self.norm2(y)) if self.norm_before_act else self.norm2(self.act2(y)))
        prefix = grid.num_prefix_tokens
        return y if prefix == 0 else torch.cat([self.act_prefix(x[:, :prefix]), y], dim=1)


_load = threading.local()  # state of the current load: list of missing keys, kernels filled in so far


class HiddenLocality(GridModule):
    """Depth-wise convolution added to the hidden state of an existing FFN: `h + conv(h)` on the patch tokens,
    then the next layer.

    The kernel starts at zero, so the outputs of the FFN stay the same bit for bit. The gradient of a zero
    kernel is not zero, so it learns from the first step. Prefix tokens pass unchanged.

    Args:
        hidden_dim: Width D of the hidden state.
        then: The next layer (in timm's MLPs, the dropout before the projection).
        config: Design; `init` must be `"preserve"`.
        num_prefix_tokens, grid_record, order: As for `LocalityFeedForward`.
    """

    def __init__(
        self,
        hidden_dim: int,
        then: nn.Module,
        config: LocalityConfig,
        *,
        num_prefix_tokens: int = 0,
        grid_record: GridRecord | None = None,
        order: TokenOrder | None = None,
    ) -> None:
        super().__init__(config, num_prefix_tokens, grid_record, order)
        if config.init != "preserve":
            raise ConfigError(f"init={config.init!r} replaces an FFN; HiddenLocality needs init='preserve'")
        self.conv = depthwise(hidden_dim, config.kernel_size, bias=False)
        self.then = then
        self.init_weights()

    def init_weights(self) -> None:
        """Set the kernel to zero, so that the FFN is unchanged."""
        nn.init.zeros_(self.conv.weight)

    def forward(self, hidden: Tensor, grid: Optional[Grid] = None) -> Tensor:  # noqa: UP045 (TorchScript)
        """Add locality: `(B, P + N, D) -> (B, P + N, D)`; `grid` overrides the recorded grid."""
        if not self.raster:
            return self.then(self.in_own_order(hidden, grid))
        return self.then(self.in_raster_order(hidden, self.current_grid() if grid is None else grid))

    def in_raster_order(self, tokens: Tensor, grid: Grid) -> Tensor:
        check_grid(tokens, grid)
        return self.transform(tokens, grid)

    def in_own_order(self, x: Tensor, grid: Optional[Grid]) -> Tensor:  # noqa: UP045 (TorchScript)
        order = self.order
        assert order is not None
        grid = self.own_grid_of(x, order) if grid is None else grid
        tokens = to_raster_order(x, order, grid)
        check_grid(tokens, grid)
        change = map_to_tokens(self.conv(tokens_to_map(tokens, grid)))
        return x + from_raster_order(change, order, grid)  # in the memory layout of `x`

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *args: Any) -> None:
        """Load a kernel of zeros if the checkpoint is plain, that is, has no kernel for any block.

        PyTorch shows a module only its own entries, so `_load` keeps what earlier modules of the load found.
        The list of missing keys is the same object throughout a load, so it identifies the load.
        """
        key, missing = f"{prefix}conv.weight", args[2]
        if getattr(_load, "missing", None) is not missing:
            _load.missing, _load.filled = missing, []
        if key in state_dict:  # not a plain checkpoint, so the kernels filled in earlier count as missing
            missing += _load.filled or []
            _load.filled = None
        elif _load.filled is not None:
            weight = self.conv.weight
            device = "cpu" if weight.is_meta else weight.device
            state_dict[key] = torch.zeros(weight.shape, dtype=weight.dtype, device=device)
            _load.filled.append(key)
        super()._load_from_state_dict(state_dict, prefix, *args)

    def transform(self, hidden: Tensor, grid: Grid) -> Tensor:
        """Add the convolution to the patch tokens: `(B, P + N, D) -> (B, P + N, D)`."""
        patches = tokens_to_map(hidden, grid)
        return after_prefix(hidden, grid.num_prefix_tokens, patches + self.conv(patches))


def _hidden_width(dim: int, of_base: int | None, config: LocalityConfig) -> int:
    """Return the hidden width D that `config` sets, or else that of the existing FFN."""
    if config.expansion is not None:
        hidden = int(dim * config.expansion)
    else:
        hidden = of_base if of_base is not None else int(dim * DEFAULT_EXPANSION)
        if config.glu != "none":
            hidden = 2 * hidden // 3
    if hidden < 1:
        raise ConfigError(
            f"expansion={config.expansion} of dim={dim} leaves no hidden channels; use a larger expansion"
        )
    return hidden


def _each(value: Any, count: int) -> tuple[Any, ...]:
    return value if isinstance(value, tuple) else (value,) * count
