"""Tokens that stand far apart in the image are next to each other (Hiera's mask units, MobileViT's patches).

A stride `(y, x)` divides the grid into cells of y rows and x columns; the position inside the cell becomes
the outer axis, and the cells become the grid that the next stride divides.
"""

from dataclasses import dataclass
from typing import Literal

from torch import Tensor

from localvit.locality import Grid


@dataclass(frozen=True)
class Strided:
    """Tokens whose outer axes are positions inside cells.

    Attributes:
        strides: Rows and columns of a cell, outermost axis first.
        form: `"tokens"`: `(B, N, C)`, Hiera. `"folded"`: `(B cell, N / cell, C)`, MobileViT; `"map"`:
            `(B, C, cell, N / cell)`, MobileViT V2.
    """

    strides: tuple[tuple[int, int], ...]
    form: Literal["tokens", "folded", "map"] = "tokens"

    @property
    def channel_axis(self) -> int:
        return 1 if self.form == "map" else -1

    def size(self, x: Tensor) -> None:
        return None

    def to_tokens(self, x: Tensor, grid: Grid) -> Tensor:
        if self.form == "map":
            x = x.flatten(2).transpose(1, 2)
        elif self.form == "folded":
            x = x.unflatten(0, (-1, grid.height * grid.width // x.shape[1])).flatten(1, 2)
        height, width = self._cells(grid)
        depth = len(self.strides)
        x = x.unflatten(1, (*(n for stride in self.strides for n in stride), height, width))
        rows = [2 * depth + 1, *range(2 * depth - 1, 0, -2)]  # the innermost cells are the outermost rows
        columns = [2 * depth + 2, *range(2 * depth, 0, -2)]
        return x.permute(0, *rows, *columns, 2 * depth + 3).flatten(1, -2)

    def from_tokens(self, tokens: Tensor, grid: Grid) -> Tensor:
        height, width = self._cells(grid)
        depth = len(self.strides)
        inner = self.strides[::-1]
        x = tokens.unflatten(1, (height, *(y for y, _ in inner), width, *(x for _, x in inner)))
        axes = [axis for i in range(depth) for axis in (depth + 1 - i, 2 * depth + 2 - i)]
        x = x.permute(0, *axes, 1, depth + 2, 2 * depth + 3).flatten(1, -2)
        if self.form == "tokens":
            return x
        y, x_ = self.strides[0]
        x = x.unflatten(1, (y * x_, -1))
        return x.flatten(0, 1) if self.form == "folded" else x.permute(0, 3, 1, 2)

    def _cells(self, grid: Grid) -> tuple[int, int]:
        height, width = grid.height, grid.width
        for y, x in self.strides:
            height, width = height // y, width // x
        return height, width
