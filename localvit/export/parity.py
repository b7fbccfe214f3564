"""Parity check: an exported file against the model, on the same inputs."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor, nn

from localvit.engines import Size
from localvit.errors import Failed

TOLERANCE = 1e-4
"""Accepted difference, relative to the largest logit.

Kernels add in different orders, which changes logits by a few millionths in float32, measured on all five
families (`benchmarks/results/`). float16 changes them by some thousandths, so an engine that silently uses it
is detected, as is a wrong weight.
"""
BATCHES = (1, 3)
"""Checked batch sizes; the model is traced with two images."""


class Inputs(NamedTuple):
    """Images for a check: their kind (`"random"`, `"real"`), and (B, C, H, W) float32."""

    kind: str
    images: Tensor


@dataclass(frozen=True, kw_only=True)
class ParityCase:
    """Comparison on one batch.

    Attributes:
        inputs: `"random"` or `"real"`.
        batch: Number of images.
        size: Their height and width.
        difference: Largest absolute difference between the logits of the file and of the model.
        scale: Largest absolute logit of the model.
        tolerance: Accepted `difference`, relative to `scale`.
    """

    inputs: str
    batch: int
    size: Size
    difference: float
    scale: float
    tolerance: float

    @property
    def relative(self) -> float:
        """The difference relative to the largest logit."""
        return self.difference / self.scale if self.scale else float(self.difference > 0)

    @property
    def passed(self) -> bool:
        """True if the difference is accepted; NaN is not."""
        return self.difference <= self.tolerance * self.scale


@dataclass(frozen=True, kw_only=True)
class Parity:
    """Comparisons of one file."""

    cases: tuple[ParityCase, ...]

    @property
    def worst(self) -> ParityCase:
        """The case with the largest relative difference; NaN is the largest."""
        return max(self.cases, key=lambda case: (not case.passed, case.relative))

    @property
    def passed(self) -> bool:
        return all(case.passed for case in self.cases)


class ParityError(Failed):
    """Error of a file that computes something other than the model; the file was deleted.

    Attributes:
        parity: The comparisons.
    """

    def __init__(self, file: str, parity: Parity) -> None:
        worst = parity.worst
        height, width = worst.size
        super().__init__(
            f"{file}: the exported model differs from the original by up to {worst.difference:.3g} "
            f"in logits up to {worst.scale:.3g} ({worst.inputs} inputs, {worst.batch} x {height}x{width}; "
            f"accepted {worst.tolerance * worst.scale:.3g}); nothing was written"
        )
        self.parity = parity


def random_inputs(channels: int, sizes: Sequence[Size]) -> list[Inputs]:
    """Return standard normal pixels, like normalised images: each size with each of `BATCHES`."""
    generator = torch.Generator().manual_seed(0)
    return [
        Inputs("random", torch.randn(batch, channels, *size, generator=generator))
        for size in sizes
        for batch in BATCHES
    ]


def real_inputs(load: Callable[[Size], Tensor], sizes: Sequence[Size]) -> list[Inputs]:
    """Return real images likewise; `load(size)` returns at least `max(BATCHES)` normalised ones."""
    return [Inputs("real", load(size)[:batch]) for size in sizes for batch in BATCHES]


@torch.no_grad()
def check_parity(
    model: nn.Module,
    engine: Callable[[Tensor], Tensor],
    inputs: Sequence[Inputs],
    tolerance: float = TOLERANCE,
) -> Parity:
    """Compare an engine with a model, on the CPU, in float32.

    Args:
        model: Model in evaluation mode.
        engine: Function from a batch to logits, such as an `ExportedModel`.
        inputs: At least one.
        tolerance: See `TOLERANCE`.
    """
    cases = []
    for kind, images in inputs:
        expected, found = model(images), engine(images)
        same = found.shape == expected.shape
        cases.append(
            ParityCase(
                inputs=kind,
                batch=len(images),
                size=(images.shape[2], images.shape[3]),
                difference=float((found - expected).abs().max()) if same else float("inf"),
                scale=float(expected.abs().max()),
                tolerance=tolerance,
            )
        )
    return Parity(cases=tuple(cases))
