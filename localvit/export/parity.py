"""Whether an exported file computes what the model does, in numbers."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor, nn

from localvit.engines import Size

TOLERANCE = 1e-4
"""Accepted difference, as a share of the largest logit.

Other kernels add in another order. What that makes in single precision was measured on all five families
(`benchmarks/results/`): a few millionths. Half precision makes some thousandths, so an engine that falls into
it without a word is found out, and so is every weight that matters.
"""
BATCHES = (1, 3)
"""Batch sizes that are checked; the model is traced with two pictures."""


class Inputs(NamedTuple):
    """Pictures for a check: what kind (``"random"``, ``"real"``), and (B, C, H, W) float32."""

    kind: str
    images: Tensor


@dataclass(frozen=True, kw_only=True)
class ParityCase:
    """One comparison.

    Attributes:
        inputs: ``"random"`` or ``"real"``.
        batch: Number of pictures.
        size: Their height and width.
        difference: Largest absolute difference between the logits of the file and of the model.
        scale: Largest absolute logit of the model.
        tolerance: Accepted `difference`, as a share of `scale`.
    """

    inputs: str
    batch: int
    size: Size
    difference: float
    scale: float
    tolerance: float

    @property
    def share(self) -> float:
        """The difference as a share of the largest logit."""
        return self.difference / self.scale if self.scale else float(self.difference > 0)

    @property
    def passed(self) -> bool:
        """Whether it is accepted; a difference that is no number is not."""
        return self.difference <= self.tolerance * self.scale


@dataclass(frozen=True, kw_only=True)
class Parity:
    """All comparisons of one file."""

    cases: tuple[ParityCase, ...]

    @property
    def worst(self) -> ParityCase:
        """The one with the largest share; one that is no number is larger than any."""
        return max(self.cases, key=lambda case: (not case.passed, case.share))

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
    """Standard normal pixels, as normalised pictures have them on average: each size in each of `BATCHES`."""
    generator = torch.Generator().manual_seed(seed)
    return [
        Inputs("random", torch.randn(batch, channels, *size, generator=generator))
        for size in sizes
        for batch in BATCHES
    ]


def real_inputs(load: Callable[[Size], Tensor], sizes: Sequence[Size]) -> list[Inputs]:
    """The same of real pictures; ``load(size)`` gives at least ``max(BATCHES)`` of them, normalised."""
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
        engine: Logits of a batch, as `localvit.export.open_engine` gives.
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
