"""Numbers of the authors' own code, and the weights they belong to (see fill.py).

Every weight is a function of its key in the reference and its shape, so an implementation that can name
its tensors by the reference's keys gets the same weights.
"""

import json
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from .fill import fill, is_filled, make_input, noise, tap

__all__ = ["arrays", "facts", "filled", "make_input", "noise", "tap"]

_HERE = Path(__file__).parent


@cache
def facts(name: str) -> dict[str, Any]:
    return json.loads((_HERE / f"{name}.json").read_text())


@cache
def arrays(name: str) -> dict[str, np.ndarray]:
    with np.load(_HERE / f"{name}.npz") as content:
        return dict(content)


def filled(keys: list[list[Any]]) -> dict[str, Tensor]:
    """State dict in float64 for ``[key, shape]`` entries; what is not filled is a zero counter."""
    return {
        key: torch.from_numpy(np.asarray(fill(key, tuple(shape))))
        if is_filled(key)
        else torch.zeros(shape, dtype=torch.int64)
        for key, shape, *_ in keys
    }
