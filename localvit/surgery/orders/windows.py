"""Tokens by window (NesT): windows in raster order, and raster order in each."""

from dataclasses import dataclass

from torch import Tensor

from localvit.locality import Grid


@dataclass(frozen=True)
class Windows:
    """Tokens `(B, windows, tokens of a window, C)`.

    Attributes:
        height, width: Rows and columns of a window, in tokens.
        swapped: The axis of windows is behind that of their tokens (MaxViT's grid attention).
    """

    height: int
    width: int
    swapped: bool = False

    def size(self, x: Tensor) -> None:
        return None

    def to_tokens(self, x: Tensor, grid: Grid) -> Tensor:
        rows, columns = grid.height // self.height, grid.width // self.width
        x = x.transpose(1, 2) if self.swapped else x
        x = x.unflatten(2, (self.height, self.width)).unflatten(1, (rows, columns))
        return x.transpose(2, 3).flatten(1, 4)

    def from_tokens(self, tokens: Tensor, grid: Grid) -> Tensor:
        rows, columns = grid.height // self.height, grid.width // self.width
        x = tokens.unflatten(1, (rows, self.height, columns, self.width))
        x = x.transpose(2, 3).flatten(3, 4).flatten(1, 2)
        return x.transpose(1, 2) if self.swapped else x
