"""Orders of tokens other than `(B, P + N, C)` in raster order, from patterns in the notation of einops."""

import math
import re
from typing import Any

from localvit.errors import ConfigError
from localvit.locality import TokenOrder

_AXIS = r"\([\w ]+\)|\w+"


def token_order(pattern: str, **sizes: int) -> TokenOrder:
    """Return the order of an FFN's tokens.

    Args:
        pattern: The axes of the FFN's input, with those of one memory axis in parentheses: `b` images, `c`
            channels, `h` rows and `w` columns. Numbers are for rows and columns that are divided, from the
            outermost part to the innermost: `h1 x w1` windows of `h2 x w2` tokens are
            `"b (h1 w1) (h2 w2) c"`.
        sizes: Sizes of all rows and columns but one each, which follow from the grid.

    Raises:
        ConfigError: for another pattern, or sizes that do not belong to it.
    """
    groups = [group.strip("()").split() for group in re.findall(_AXIS, pattern)]
    names = [name for group in groups for name in group]
    parts = [
        [name for name in sorted(names, key=_number) if re.fullmatch(rf"{axis}\d*", name)] for axis in "hw"
    ]
    order = ["b", *parts[0], *parts[1], "c"]
    free = [[name for name in part if name not in sizes] for part in parts]
    known = len(set(names)) == len(names) and set(names) == set(order) and ["c"] in groups
    if not known or re.sub(_AXIS, "", pattern).strip() or any(len(part) != 1 for part in free):
        raise ConfigError(
            f"pattern={pattern!r} with sizes {sizes} is not accepted; use b, c, h and w (or h1, h2, ..., w1, "
            "w2, ...) once each, c alone, and sizes for all h and w but one each"
        )
    if unknown := [f"{name}={size}" for name, size in sizes.items() if name not in names or size < 1]:
        raise ConfigError(f"{unknown[0]} is not accepted for pattern={pattern!r}; use sizes of its h and w")
    rows, columns = free[0][0], free[1][0]
    return TokenOrder(
        pattern=pattern,
        split=[sizes.get(name, 1) for name in names],
        varying=[names.index(name) for name in ("b", rows, columns, "c")],
        axes=[names.index(name) for name in order],
        inverse=[order.index(name) for name in names],
        joined=[len(group) for group in groups],
        cell=[math.prod(sizes.get(name, 1) for name in part) for part in parts],
        grid_axes=[groups.index([name]) for name in (rows, columns)]
        if len(groups) == len(names) == 4
        else [],
        channel_axis=groups.index(["c"]),
    )


def _number(name: str) -> int:
    return int(name[1:]) if name[1:].isdecimal() else 0


# Feature maps have the grid in their shape.
CHANNELS_LAST = token_order("b h w c")
CHANNELS_FIRST = token_order("b c h w")


def strided(strides: Any, pattern: str = "b ({} h w) c") -> TokenOrder:
    """Return the order of tokens that stand far apart in the image and next to each other in memory.

    A stride `(y, x)` divides the grid into cells of y rows and x columns. The position inside a cell becomes
    an outer axis, and the cells become the grid that the next stride divides (Hiera's mask units).

    Args:
        strides: Rows and columns of a cell, outermost axis first.
        pattern: Where the positions inside cells, `{}`, and the cells `h w` stand.
    """
    depth = len(strides)  # the first stride has the innermost cells
    sizes = {
        f"{axis}{depth - i}": n for i, cell in enumerate(strides) for axis, n in zip("hw", cell, strict=True)
    }
    return token_order(pattern.format(" ".join(sizes)), **sizes)
