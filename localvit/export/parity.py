"""Comparison of an exported file with its model, in numbers."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor, nn

from localvit.engines import Size

TOLERANCE = 1e-4
"""Accepted difference, as a fraction of the largest logit.

Other kernels add in another order. In single precision this gives a few millionths on all five families
(`benchmarks/results/`). Half precision gives some thousandths, so an engine that silently uses it is
detected, and so is every wrong weight that matters.
"""
BATCHES = (1, 3)
"""Batch sizes that are checked; the model is traced with two images."""


class Inputs(NamedTuple):
    """Images for a check: their kind (`"random"` or `"real"`), and (B, C, H, W) float32."""

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
        tolerance: Accepted `difference`, as a fraction of `scale`.
    """

    inputs: str
    batch: int
    size: Size
    difference: float
    scale: float
    tolerance: float

    @property
    def relative(self) -> float:
        """Difference as a fraction of the largest logit."""
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
        """Case with the largest relative difference; NaN counts as larger than any."""
        return max(self.cases, key=lambda case: (not case.passed, case.relative))

    @property
    def passed(self) -> bool:
        return all(case.passed for case in self.cases)


class ParityError(RuntimeError):
    """The file does not compute what the model does; it was deleted.

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


def random_inputs(channels: int, sizes: Sequence[Size], seed: int = 0) -> list[Inputs]:
    """Draw standard normal pixels, the distribution of normalised images: each size in each of `BATCHES`."""
    generator = torch.Generator().manual_seed(seed)
    return [
        Inputs("random", torch.randn(batch, channels, *size, generator=generator))
        for size in sizes
        for batch in BATCHES
    ]


def real_inputs(load: Callable[[Size], Tensor], sizes: Sequence[Size]) -> list[Inputs]:
    """Load real images likewise; `load(size)` returns at least `max(BATCHES)` of them, normalised."""
    return [Inputs("real", load(size)[:batch]) for size in sizes for batch in BATCHES]


@torch.no_grad()
def check_parity(
    model: nn.Module,
    engine: Callable[[Tensor], Tensor],
    inputs: Sequence[Inputs],
    tolerance: float = TOLERANCE,
) -> Parity:
    """Compare an engine with a model, on the CPU, in single precision.

    Args:
        model: In evaluation mode.
        engine: Function from a batch to its logits, from `localvit.engines.open_engine`.
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
