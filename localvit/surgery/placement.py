"""Choice of blocks: the JSON values of `blocks`, and the indices that they select."""

from collections.abc import Sequence
from typing import Literal

BlockSpec = (
    Literal["all", "lower-half", "lower-third", "middle-third", "upper-third"] | Sequence[int | Sequence[int]]
)

_FRACTIONS = {
    "all": (0, 1, 1),
    "lower-half": (0, 1, 2),
    "lower-third": (0, 1, 3),
    "middle-third": (1, 2, 3),
    "upper-third": (2, 3, 3),
}


def select_blocks(blocks: BlockSpec, depth: int) -> tuple[int, ...]:
    """Return the indices that `blocks` selects in a model of `depth` blocks, in order of depth.

    Args:
        blocks: `"all"`, `"lower-half"`, `"lower-third"`, `"middle-third"`, `"upper-third"` (lower is nearer
            to the input; boundaries are rounded), a list of indices, or a list of `[start, stop]` pairs (stop
            excluded).
        depth: Number of blocks of the model.

    Raises:
        ValueError: for any other value, and for one that selects no block, a block twice, or a block that
            does not exist.
    """
    if isinstance(blocks, str):
        if blocks not in _FRACTIONS:
            raise ValueError(
                f"blocks={blocks!r} is not accepted; use {', '.join(map(repr, _FRACTIONS))}, "
                "a list of indices, or a list of [start, stop] pairs"
            )
        start, stop, parts = _FRACTIONS[blocks]
        chosen = list(range(round(depth * start / parts), round(depth * stop / parts)))
    else:
        if not isinstance(blocks, (list, tuple)):
            raise ValueError(f"blocks={blocks!r} is not accepted; use a name or a list")
        chosen = [index for item in blocks for index in _indices(item, blocks)]
    if not chosen:
        raise ValueError(f"blocks={blocks!r} selects no block; the model has {depth}")
    outside = [i for i in chosen if not 0 <= i < depth]
    if outside:
        raise ValueError(f"blocks={blocks!r} selects block {outside[0]}; accepted: 0 to {depth - 1}")
    if len(set(chosen)) < len(chosen):
        raise ValueError(f"blocks={blocks!r} selects a block more than once; name each block once")
    return tuple(sorted(chosen))


def _indices(item: object, blocks: object) -> Sequence[int]:
    if isinstance(item, int) and not isinstance(item, bool):
        return (item,)
    if isinstance(item, (list, tuple)) and len(item) == 2 and all(type(i) is int for i in item):
        return range(item[0], item[1])
    raise ValueError(f"blocks={blocks!r}: {item!r} is not accepted; use an index or a [start, stop] pair")
