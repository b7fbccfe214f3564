"""The lattice that tokens come from, and the two views between tokens and feature map.

Shapes: B batch, P prefix tokens (class, distillation, registers), N = height * width patch tokens,
C channels. Patch token ``i`` is row ``i // width``, column ``i % width`` (raster order).
"""

from typing import Any, NamedTuple

from torch import Tensor, nn


class Grid(NamedTuple):
    """Lattice of the patch tokens and the number of prefix tokens in front of them."""

    height: int
    width: int
    num_prefix_tokens: int = 0


class GridRecord:
    """Where a model's hook leaves the lattice of the forward pass under way, for its FFNs to read.

    All localized FFNs of one model share one record, and so does the module (``source``) whose input
    size decides the lattice. A record is transient: in a copy or a pickle ``size`` is unset, because it
    may hold symbolic integers of an export or proxies of an fx trace. The record of a copied model
    belongs to the copy: a copy (EMA, say) that wrote to the record of its original would silently
    reshape the original's tokens.

    One forward pass at a time per model instance: two threads that share an instance share its record.

    Args:
        source: Module with ``grid_size``, the lattice for the configured input size (timm's patch
            embeddings). TorchScript cannot run hooks, so scripted models use that one.
    """

    def __init__(self, source: nn.Module | None = None) -> None:
        self.source = source
        self.size: tuple[int, int] | None = None

    @property
    def static_size(self) -> tuple[int, int]:
        """Lattice for the configured input size, (0, 0) where there is none."""
        size = getattr(self.source, "grid_size", None)
        return (int(size[0]), int(size[1])) if size is not None else (0, 0)

    def __getstate__(self) -> dict[str, Any]:  # read by copy.copy, copy.deepcopy and pickle alike
        return {"source": self.source, "size": None}


def tokens_to_map(tokens: Tensor, grid: Grid) -> Tensor:
    """Patch tokens as a feature map: ``(B, P + N, C) -> (B, C, height, width)``.

    A view: tokens in memory order *are* a channels-last map, so nothing is copied.
    """
    patches = tokens[:, grid.num_prefix_tokens :] if grid.num_prefix_tokens else tokens
    return patches.transpose(1, 2).unflatten(2, (grid.height, grid.width))


def map_to_tokens(feature_map: Tensor) -> Tensor:
    """Inverse of :func:`tokens_to_map` without prefix tokens: ``(B, C, height, width) -> (B, N, C)``.

    A view if the map is channels-last.
    """
    return feature_map.flatten(2).transpose(1, 2)
