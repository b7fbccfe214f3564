"""Confidence interval of a measured accuracy, and calibration of a model."""

from __future__ import annotations

import math
from dataclasses import dataclass
from statistics import NormalDist
from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    from jaxtyping import Bool, Float

CONFIDENCE = 0.95
BINS = 15


@dataclass(frozen=True, kw_only=True)
class Interval:
    """Interval of a proportion, in per cent.

    Attributes:
        low: Lower end.
        high: Upper end.
    """

    low: float
    high: float


@dataclass(frozen=True, kw_only=True)
class Bin:
    """Images on which the model is about equally confident.

    Attributes:
        low: Lower end of the confidence (exclusive), in per cent.
        high: Upper end (inclusive).
        images: Number of images; 0 leaves the other fields `None`.
        confidence: Mean probability of the top-1 prediction, in per cent.
        accuracy: Per cent of top-1 predictions that were correct.
    """

    low: float
    high: float
    images: int
    confidence: float | None
    accuracy: float | None


def wilson_interval(right: int, images: int) -> Interval:
    """Return the 95 % score interval of a proportion, for images drawn at random from a population.

    Wilson, "Probable inference, the law of succession, and statistical inference", JASA 22 (1927), 209-212.
    Unlike the proportion plus or minus 1.96 standard errors it stays within 0 to 100 % and is valid near
    the ends.

    Args:
        right: Images whose top-1 prediction is correct.
        images: All of them; with 0 the proportion is unknown.
    """
    if images == 0:
        return Interval(low=0.0, high=100.0)
    z = NormalDist().inv_cdf((1 + CONFIDENCE) / 2)
    share = right / images
    scale = 1 / (1 + z * z / images)
    centre = scale * (share + z * z / (2 * images))
    half = scale * z * math.sqrt(share * (1 - share) / images + (z / (2 * images)) ** 2)
    # At 0 and 1 the ends are the proportion itself, up to rounding.
    low, high = min(centre - half, share), max(centre + half, share)
    return Interval(low=100 * max(low, 0.0), high=100 * min(high, 1.0))


def calibration(confidences: Float[np.ndarray, " N"], right: Bool[np.ndarray, " N"]) -> tuple[Bin, ...]:
    """Sort images into 15 bins of equal width by the probability of the top-1 prediction.

    Guo et al., "On Calibration of Modern Neural Networks", ICML 2017 (arXiv 1706.04599), section 2: bin m
    holds confidences above (m - 1) / 15 up to m / 15.

    Args:
        confidences: (N,) probability of the top-1 prediction, 0 to 1.
        right: (N,) whether it was right.
    """
    edges = np.linspace(0.0, 1.0, BINS + 1)
    number = np.clip(np.searchsorted(edges, confidences, side="left") - 1, 0, BINS - 1)
    bins = []
    for i in range(BINS):
        inside = number == i
        images = int(inside.sum())
        bins.append(
            Bin(
                low=100 * float(edges[i]),
                high=100 * float(edges[i + 1]),
                images=images,
                confidence=100 * float(confidences[inside].mean()) if images else None,
                accuracy=100 * float(right[inside].mean()) if images else None,
            )
        )
    return tuple(bins)


def expected_calibration_error(bins: tuple[Bin, ...]) -> float:
    """Return the mean distance of accuracy and confidence over the bins, weighted by their images, in points.

    Guo et al. (see `calibration`), equation 3.
    """
    images = sum(one.images for one in bins)
    gaps = [
        one.images * abs(one.accuracy - one.confidence)
        for one in bins
        if one.accuracy is not None and one.confidence is not None
    ]
    return sum(gaps) / max(images, 1)
