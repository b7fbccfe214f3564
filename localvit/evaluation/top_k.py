"""Five most probable classes of each image, and results of each class."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import distributed

if TYPE_CHECKING:
    from jaxtyping import Float, Int

GUESSES = 5


@dataclass(frozen=True, kw_only=True)
class ClassResult:
    """Result of one class.

    Attributes:
        label: The class.
        description: Its readable name.
        images: Number of its images; classes without any are left out.
        right: Number of correct top-1 predictions.
        top1: Correct top-1 predictions in per cent.
        confused_with: Label of the most frequent wrong top-1 prediction, or `None` if there is none; of
            equally frequent ones, the first in the order of the model's outputs.
        confused: Number of these predictions.
    """

    label: str
    description: str
    images: int
    right: int
    top1: float
    confused_with: str | None
    confused: int


@dataclass(frozen=True, kw_only=True)
class Confusion:
    """Images of one class that were predicted as another class.

    Attributes:
        label: Their class.
        guess: Class that was predicted.
        images: Number of images.
    """

    label: str
    guess: str
    images: int


class TopKPredictions:
    """Five most probable classes of each image of a set, one row per image.

    Rows of images that other processes predict stay zero until `merge`, so that the sum over processes puts
    every prediction in its place.

    Args:
        images: Number of images in the whole set.
        device: Device of the logits.
    """

    def __init__(self, images: int, device: torch.device) -> None:
        self._guesses = torch.zeros(images, GUESSES, dtype=torch.int64, device=device)
        self._confidences = torch.zeros(images, device=device)
        self._predicted = torch.zeros(images, dtype=torch.int64, device=device)

    def add(self, rows: Sequence[int], logits: Float[torch.Tensor, "B classes"]) -> None:
        """Add the logits (B, classes) of the images `rows` (B) of the set."""
        index = torch.tensor(rows, device=logits.device)
        logits = logits.float()
        # From logits, as in `Tally`: two different logits may have the same probability.
        best, guesses = logits.topk(min(GUESSES, logits.shape[1]))
        self._guesses[index, : guesses.shape[1]] = guesses
        self._guesses[index, guesses.shape[1] :] = -1
        self._confidences[index] = (best[:, 0] - logits.logsumexp(-1)).exp()
        self._predicted[index] += 1

    def merge(self) -> None:
        """Gather the predictions of all processes in each of them.

        Raises:
            RuntimeError: if an image was predicted by no process or by several.
        """
        if distributed.is_initialized():
            for values in (self._guesses, self._confidences, self._predicted):
                distributed.all_reduce(values)
        wrong = int((self._predicted != 1).sum())
        if wrong:
            raise RuntimeError(f"{wrong} images were not predicted exactly once; give each to one process")

    @property
    def guesses(self) -> Int[np.ndarray, "N 5"]:
        """(N, 5) int64: outputs, the most probable first; -1 where the model has fewer."""
        return self._guesses.cpu().numpy()

    @property
    def confidences(self) -> Float[np.ndarray, " N"]:
        """(N,) float64: probability of the top-1 prediction."""
        return self._confidences.cpu().numpy().astype(np.float64)


def by_class(
    targets: Int[np.ndarray, " N"],
    guesses: Int[np.ndarray, " N"],
    labels: Sequence[str],
    descriptions: Sequence[str],
) -> tuple[tuple[ClassResult, ...], tuple[Confusion, ...]]:
    """Return a row for each class that has images, and its confusions, the most frequent first.

    Args:
        targets: (N,) class of each image.
        guesses: (N,) top-1 prediction.
        labels: Label of every output.
        descriptions: Description of every output.
    """
    rows: dict[int, Counter[int]] = {}
    for target, guess in sorted(zip(targets.tolist(), guesses.tolist(), strict=True)):
        rows.setdefault(target, Counter())[guess] += 1
    classes, confusions = [], []
    for target, row in rows.items():
        images, right = row.total(), row[target]
        wrong = sorted((-count, guess) for guess, count in row.items() if guess != target)
        classes.append(
            ClassResult(
                label=labels[target],
                description=descriptions[target],
                images=images,
                right=right,
                top1=100 * right / images,
                confused_with=labels[wrong[0][1]] if wrong else None,
                confused=-wrong[0][0] if wrong else 0,
            )
        )
        confusions += [
            Confusion(label=labels[target], guess=labels[guess], images=-count) for count, guess in wrong
        ]
    return tuple(classes), tuple(sorted(confusions, key=lambda c: -c.images))
