"""The lattice that tokens come from, and the two views between tokens and feature map.

Shapes: B batch, P prefix tokens (class, distillation, registers), N = height * width patch tokens,
C channels. Patch token ``i`` is row ``i // width``, column ``i % width`` (raster order).
"""

from typing import Any, NamedTuple

import torch
from torch import Tensor, nn


class Grid(NamedTuple):
    """Lattice of the patch tokens and the number of prefix tokens in front of them."""

    height: int
    width: int
    num_prefix_tokens: int = 0


class GridRecord:
    """Where a model's hook leaves the lattice of the forward pass under way, for its FFNs to read.

    All localized FFNs that work on one lattice share one record, and so does the module whose forward is
    hooked: one per model in a plain transformer, one per stage in a pyramid. A record is transient: in a
    copy or a pickle its size is unset, because it may hold symbolic integers of an export or proxies of an
    fx trace. The record of a copied model belongs to the copy: a copy (EMA, say) that wrote to the record
    of its original would silently reshape the original's tokens.

    One forward pass at a time per model instance: two threads that share an instance share its record.

    Args:
        source: Module that knows the lattice for the configured input size. TorchScript cannot run hooks,
            so scripted models use that one.
        attribute: Its attribute (height, width): ``grid_size`` in timm's patch embeddings.
        constant: The lattice is always the configured one (TNT), so there is no hook.
    """

    def __init__(
        self, source: nn.Module | None = None, attribute: str = "grid_size", constant: bool = False
    ) -> None:
        self.source = source
        self.attribute = attribute
        self.constant = constant
        self._size: tuple[int, int] | None = None

    @property
    def size(self) -> tuple[int, int] | None:
        """Lattice of the forward pass under way; ``None`` where none was recorded."""
        return self.static_size if self.constant else self._size

    @size.setter
    def size(self, size: tuple[int, int]) -> None:
        self._size = size

    @property
    def static_size(self) -> tuple[int, int]:
        """Lattice for the configured input size, (0, 0) where there is none."""
        size = getattr(self.source, self.attribute, None)
        return (int(size[0]), int(size[1])) if size is not None else (0, 0)

    def __getstate__(self) -> dict[str, Any]:  # read by copy.copy, copy.deepcopy and pickle alike
        return {**self.__dict__, "_size": None}


def tokens_to_map(tokens: Tensor, grid: Grid) -> Tensor:
    """Patch tokens as a feature map: ``(B, P + N, C) -> (B, C, height, width)``.

    A view: tokens in memory order *are* a channels-last map, so nothing is copied. Rows are split before
    channels move: the other way round gives the batch axis of a single image a stride that PyTorch does not
    take for channels-last, and its convolution then copies the map to and fro.
    """
    patches = tokens[:, grid.num_prefix_tokens :] if grid.num_prefix_tokens else tokens
    return patches.unflatten(1, (grid.height, grid.width)).permute(0, 3, 1, 2)


def map_to_tokens(feature_map: Tensor) -> Tensor:
    """Inverse of :func:`tokens_to_map` without prefix tokens: ``(B, C, height, width) -> (B, N, C)``.

    A view if the map is channels-last. Channels move before rows are joined: the other way round, the
    backward pass gives a single image's gradient a batch stride that PyTorch's batch norm misreads on a CPU
    (``docs/upstream.md``).
    """
    return feature_map.permute(0, 2, 3, 1).flatten(1, 2)


def tokens_to_row(tokens: Tensor) -> Tensor:
    """``(B, T, C) -> (B, C, 1, T)``, a channels-last view for point-wise layers.

    A row, not a column: oneDNN's point-wise convolution works along rows and is two to three times
    slower on a map of width 1.
    """
    return tokens.transpose(1, 2).unsqueeze(2)


def after_prefix(tokens: Tensor, prefix: int, patches: Tensor) -> Tensor:
    """The first ``prefix`` of ``tokens``, followed by the tokens of the map ``patches``."""
    rest = map_to_tokens(patches)
    return rest if prefix == 0 else torch.cat([tokens[:, :prefix], rest], dim=1)
