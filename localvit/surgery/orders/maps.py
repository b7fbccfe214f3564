"""Feature maps instead of tokens; they have the grid in their shape."""

from dataclasses import dataclass

from torch import Tensor

from localvit.locality import Grid, map_to_tokens, tokens_to_map


@dataclass(frozen=True)
class ChannelsLast:
    """Maps `(B, H, W, C)`."""

    maps = "channels last"

    def size(self, x: Tensor) -> tuple[int, int]:
        return x.shape[1], x.shape[2]

    def to_tokens(self, x: Tensor, grid: Grid) -> Tensor:
        return x.flatten(1, 2)

    def from_tokens(self, tokens: Tensor, grid: Grid) -> Tensor:
        return tokens.unflatten(1, (grid.height, grid.width))


@dataclass(frozen=True)
class ChannelsFirst:
    """Maps `(B, C, H, W)`."""

    maps = "channels first"
    channel_axis = 1

    def size(self, x: Tensor) -> tuple[int, int]:
        return x.shape[2], x.shape[3]

    def to_tokens(self, x: Tensor, grid: Grid) -> Tensor:
        return map_to_tokens(x)

    def from_tokens(self, tokens: Tensor, grid: Grid) -> Tensor:
        return tokens_to_map(tokens, grid)
