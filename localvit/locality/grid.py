"""Grid of the tokens, views between tokens and feature map, and the base class of modules with a grid.

Shapes: B batch, P prefix tokens (class, distillation, registers), N = H * W patch tokens, C channels. Patch
token `i` is in row `i // W` and column `i % W` (raster order).
"""

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any, List, NamedTuple, Optional, Self  # noqa: UP035 (TorchScript)

import torch
from torch import Tensor, nn

from localvit.locality.config import LocalityConfig


class Grid(NamedTuple):
    """Rows and columns of the patch tokens, and the number of prefix tokens in front of them."""

    height: int
    width: int
    num_prefix_tokens: int = 0


class GridRecord:
    """Record of the grid in the current forward pass: a model's hook writes it, its FFNs read it.

    All localized FFNs on one grid share one record with the hooked module: one per model in a plain
    transformer, one per stage in a pyramid. A record is transient: in a copy or a pickle its size is unset,
    because it may hold symbolic integers of an export or proxies of an fx trace. A copied model (EMA) has its
    own record: writing to that of the original would silently reshape the original's tokens.

    A model instance supports one forward pass at a time: threads that share an instance share its record.

    Args:
        source: Module with the grid for the configured input size. Scripted models use it, because
            TorchScript cannot run hooks; without it they have the last grid before scripting.
        attribute: Its attribute (height, width): `grid_size` in timm's patch embeddings.
        constant: The grid is always the configured one (TNT), so there is no hook.
        rule: How the hook reads the grid (`localvit.surgery`).
    """

    def __init__(
        self,
        source: nn.Module | None = None,
        attribute: str = "grid_size",
        constant: bool = False,
        rule: Any = None,
    ) -> None:
        self.source = source
        self.attribute = attribute
        self.constant = constant
        self.rule = rule
        self._size: tuple[int, int] | None = None

    @property
    def size(self) -> tuple[int, int] | None:
        """Rows and columns in the current forward pass; `None` if none were recorded."""
        return self.static_size if self.constant else self._size

    @size.setter
    def size(self, size: tuple[int, int] | None) -> None:
        self._size = size

    @property
    def static_size(self) -> tuple[int, int]:
        """Rows and columns for the configured input size; else the last ones recorded, or (0, 0)."""
        size = getattr(self.source, self.attribute, None) if self.attribute else None
        if size is None and self._size is not None:
            return self._size
        divide = self.rule.divide if self.rule is not None else 1
        return (int(size[0]) // divide, int(size[1]) // divide) if size is not None else (0, 0)

    def __getstate__(self) -> dict[str, Any]:  # read by copy.copy, copy.deepcopy and pickle alike
        return {**self.__dict__, "_size": None}


def tokens_to_map(tokens: Tensor, grid: Grid) -> Tensor:
    """View patch tokens as a feature map: `(B, P + N, C) -> (B, C, H, W)`.

    Tokens in memory order *are* a channels-last map, so nothing is copied. Rows are split before channels
    move: the other order gives the batch axis of a single image a stride that PyTorch does not recognize as
    channels-last, and its convolution then copies the map twice.
    """
    patches = tokens[:, grid.num_prefix_tokens :] if grid.num_prefix_tokens else tokens
    return patches.unflatten(1, (grid.height, grid.width)).permute(0, 3, 1, 2)


def map_to_tokens(feature_map: Tensor) -> Tensor:
    """Invert `tokens_to_map` without prefix tokens: `(B, C, H, W) -> (B, H * W, C)`.

    It is a view if the map is channels-last. Channels move before rows are joined: in the other order, the
    backward pass gives a single image's gradient a batch stride that PyTorch's batch norm misreads on a CPU
    (`docs/upstream.md`).
    """
    return feature_map.permute(0, 2, 3, 1).flatten(1, 2)


def tokens_to_row(tokens: Tensor) -> Tensor:
    """View tokens as a channels-last map for point-wise layers: `(B, T, C) -> (B, C, 1, T)`.

    It is a row because oneDNN's point-wise convolution works along rows and is two to three times slower on a
    map of width 1.
    """
    return tokens.transpose(1, 2).unsqueeze(2)


def after_prefix(tokens: Tensor, prefix: int, patches: Tensor) -> Tensor:
    """Put the first `prefix` tokens before those of the map `patches`: `(B, T, C), (B, C, H, W) ->
    (B, T, C)`.
    """
    rest = map_to_tokens(patches)
    return rest if prefix == 0 else torch.cat([tokens[:, :prefix], rest], dim=1)


def check_grid(tokens: Tensor, grid: Grid) -> None:
    """Refuse tokens that do not fit `grid` (RuntimeError or AssertionError, as `torch._assert`)."""
    patches = tokens.shape[1] - grid.num_prefix_tokens
    fits = patches == grid.height * grid.width
    if not torch.jit.is_scripting() and fits is True:
        return  # the message takes longer than the question
    torch._assert(
        fits,
        f"{tokens.shape[1]} tokens, {grid.num_prefix_tokens} of them prefix tokens, leave {patches} patch "
        f"tokens, but the grid has {grid.height} x {grid.width} = {grid.height * grid.width}",
    )


def given_grid(grid: Any, columns: int | None, num_prefix_tokens: int) -> Grid | None:
    """Return the grid in the arguments of an FFN: PVTv2 passes a pair, SegFormer rows and columns."""
    if grid is None or isinstance(grid, Grid):
        return grid
    height, width = grid if columns is None else (grid, columns)
    return Grid(height, width, num_prefix_tokens)


class TokenOrder(NamedTuple):
    """Order of an FFN's tokens other than raster order: their axes are split, permuted and joined again.

    `localvit.surgery.orders.token_order` makes it from a pattern. All fields are data, so that TorchScript
    can run an order. Raster order has the axes images, rows from the outermost part to the innermost,
    columns likewise, channels.

    Attributes:
        pattern: The own order, in the notation of einops.
        split: Sizes of the split axes of the own order; 1 for the four that vary.
        varying: Positions of these four in `split`: images, rows, columns, channels.
        axes: Position in `split` of each axis of raster order.
        inverse: Position in raster order of each axis in `split`.
        joined: Number of axes of `split` in each axis of the own order.
        cell: Rows and columns that `split` has for each row and column that varies.
        grid_axes: Axes of the own order that are rows and columns; empty if these are joined with others.
        channel_axis: Axis of the own order with the channels.
    """

    pattern: str
    split: List[int]  # noqa: UP006 (TorchScript)
    varying: List[int]  # noqa: UP006
    axes: List[int]  # noqa: UP006
    inverse: List[int]  # noqa: UP006
    joined: List[int]  # noqa: UP006
    cell: List[int]  # noqa: UP006
    grid_axes: List[int]  # noqa: UP006
    channel_axis: int

    def __hash__(self) -> int:
        return hash((self.pattern, *self.split))  # these determine the others


def _split_sizes(order: TokenOrder, grid: Grid, channels: int) -> List[int]:  # noqa: UP006
    sizes = [size for size in order.split]  # noqa: C416 (TorchScript)
    images, rows, columns, last = order.varying
    sizes[images] = -1
    sizes[rows] = grid.height // order.cell[0]
    sizes[columns] = grid.width // order.cell[1]
    sizes[last] = channels
    return sizes


def to_raster_order(x: Tensor, order: TokenOrder, grid: Grid) -> Tensor:
    """View an FFN's input or hidden state in `order` as tokens in raster order: `(B, N, C)`."""
    sizes = _split_sizes(order, grid, x.shape[order.channel_axis])
    return x.reshape(sizes).permute(order.axes).flatten(1, -2)


def from_raster_order(tokens: Tensor, order: TokenOrder, grid: Grid) -> Tensor:
    """Invert `to_raster_order`."""
    sizes = _split_sizes(order, grid, tokens.shape[2])
    x = tokens.reshape([sizes[axis] for axis in order.axes]).permute(order.inverse)
    shape: List[int] = []  # noqa: UP006
    first = 0
    for count in order.joined:
        size = 1
        for n in sizes[first : first + count]:
            size = -1 if n == -1 or size == -1 else size * n
        shape.append(size)
        first += count
    return x.reshape(shape)


# Computes `module.transform(x, grid)`, faster or with less memory; returns `None` where it does not apply.
Accelerator = Callable[[Any, Tensor, Grid], Tensor | None]
_accelerator: Accelerator | None = None


def set_accelerator(accelerator: Accelerator | None) -> None:
    """Set the accelerator of all modules with a grid; `None` computes with the plain modules."""
    global _accelerator
    _accelerator = accelerator


class GridModule(nn.Module):
    """Base class of modules with a grid. All support for TorchScript is here.

    The grid comes with the call or from the model's `GridRecord`. It is never guessed from the number of
    tokens. Subclasses define `transform(x, grid)`, and call `run(x, grid)`.
    """

    # TorchScript evaluates a property listed in both when it scripts the module, and keeps it as a
    # constant; so a script made after `set_input_size` has the new grid.
    __constants__: tuple[str, ...] = ("num_prefix_tokens", "static_size", "raster")
    __jit_unused_properties__ = ("static_size",)
    __jit_ignored_attributes__ = ("config", "grid_record", "noted")

    noted: Any = None
    """Cache of the accelerator, cleared when mode, device or type change."""
    selective_checkpointing: bool = False
    """True after `localvit.set_selective_checkpointing`."""
    transform: Any
    order: Optional[TokenOrder]  # noqa: UP045 (TorchScript)

    def __init__(
        self,
        config: LocalityConfig,
        num_prefix_tokens: int,
        grid_record: GridRecord | None,
        order: TokenOrder | None,
    ) -> None:
        super().__init__()
        self.config = config.resolve()
        self.num_prefix_tokens = num_prefix_tokens
        self.grid_record = grid_record
        self.order = order
        self.raster = order is None

    def in_raster_order(self, tokens: Tensor, grid: Grid) -> Tensor:
        """Compute the output of tokens in raster order: `(B, P + N, C) -> (B, P + N, C)`."""
        raise NotImplementedError

    def in_own_order(self, x: Tensor, grid: Optional[Grid]) -> Tensor:  # noqa: UP045 (TorchScript)
        """Compute the output of tokens in `order`."""
        order = self.order
        assert order is not None
        grid = self.own_grid_of(x, order) if grid is None else grid
        y = self.in_raster_order(to_raster_order(x, order, grid), grid)
        return from_raster_order(y, order, grid)

    def own_grid_of(self, x: Tensor, order: TokenOrder) -> Grid:
        """Return the grid of tokens in `order`."""
        if len(order.grid_axes) == 0:
            return self.current_grid()
        rows, columns = order.grid_axes
        return Grid(x.shape[rows], x.shape[columns], 0)

    def train(self, mode: bool = True) -> Self:
        self.noted = None
        return super().train(mode)

    def _apply(self, *args: Any, **kwargs: Any) -> Self:
        self.noted = None
        return super()._apply(*args, **kwargs)

    @property
    def static_size(self) -> tuple[int, int]:
        return self.grid_record.static_size if self.grid_record is not None else (0, 0)

    def current_grid(self) -> Grid:
        """Return the grid of the current forward pass."""
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
                f"{type(self).__name__} does not know the grid of its tokens; run it inside the localized "
                "model, or pass grid=Grid(height, width, num_prefix_tokens)"
            )
        return size

    def run(self, x: Tensor, grid: Grid) -> Tensor:
        """Compute `transform(x, grid)`, with the accelerator if it applies."""
        if torch.jit.is_scripting():
            return self.transform(x, grid)
        return self._accelerated(x, grid)

    @torch.jit.unused
    def _accelerated(self, x: Tensor, grid: Grid) -> Tensor:
        if torch.compiler.is_compiling():
            return self.transform(x, grid)
        with statistics_once(self):
            y = None if _accelerator is None else _accelerator(self, x, grid)
            return self.transform(x, grid) if y is None else y


def statistics_once(module: nn.Module) -> AbstractContextManager[None]:
    """Return a context that freezes running statistics if a backward pass is running, that is, if activation
    checkpointing repeats a forward pass.
    """
    return nullcontext() if torch._C._current_graph_task_id() == -1 else _frozen_statistics(module)


@contextmanager
def _frozen_statistics(module: nn.Module) -> Iterator[None]:
    """Keep the running statistics of batch norms in a context."""
    norms = [m for m in module.modules() if isinstance(m, nn.modules.batchnorm._BatchNorm) and m.training]
    before = [(norm.momentum, norm.num_batches_tracked) for norm in norms]
    for norm in norms:
        norm.momentum, norm.num_batches_tracked = 0.0, None
    try:
        yield
    finally:
        for norm, (momentum, count) in zip(norms, before, strict=True):
            norm.momentum, norm.num_batches_tracked = momentum, count
