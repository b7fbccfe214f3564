"""Registry of models: the cost of each, and the accuracy that its authors report.

The numbers are read from `cards.jsonl`, so that a list needs neither torch nor a model;
`localvit.models.counting` computes them.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache
from importlib.resources import files
from typing import Any

from localvit.structure import build, parse_json


@dataclass(frozen=True)
class ModelEntry:
    """One model of the registry; every field is a JSON value.

    Attributes:
        name: Name for `timm.create_model`.
        base: Name of its plain model; its own name for a baseline.
        locality: Locality of its feed-forward networks; `None` for a baseline.
        also: Locality of further groups of feed-forward networks, by group.
        args: Constructor arguments in which it differs from its base.
        parameters: Number of parameters, counted on the built model with 1,000 classes.
        gmacs: Multiply-accumulates of one image at `input_size`, in units of 1e9 (`count_macs`).
        input_size: Channels, height, width.
        top1, top5: ImageNet-1k validation accuracy in percent that the authors report, or `None`.
        source: Source of that accuracy.
        weights: Source of the weights of `pretrained=True`, or `None`.
    """

    name: str
    base: str
    locality: Mapping[str, Any] | None
    also: Mapping[str, Mapping[str, Any]]
    args: Mapping[str, Any]
    parameters: int
    gmacs: float
    input_size: tuple[int, int, int]
    top1: float | None
    top5: float | None
    source: str | None
    weights: str | None


@dataclass(frozen=True)
class ModelCard:
    """Full description of one model of the registry; every field is a JSON value.

    Attributes:
        entry: Its entry in the registry.
        base: Entry of its plain model; `None` for a baseline.
        confounders: Sentences on differences between the two besides the depth-wise convolution.
        notes: Facts that do not follow from the configuration.
        dead_parameters: Number of parameters that no output depends on (`localvit.Plan`).
        matched: Name of the variant without the confounders around the feed-forward network.
    """

    entry: ModelEntry
    base: ModelEntry | None
    confounders: tuple[str, ...]
    notes: tuple[str, ...]
    dead_parameters: int
    matched: str | None


@cache
def registry() -> dict[str, ModelCard]:
    """Return name -> card of all models with locality, each after its baseline."""
    lines = (files("localvit.models") / "cards.jsonl").read_text(encoding="utf-8").splitlines()
    cards = [build(ModelCard, parse_json(line, "cards.jsonl")) for line in lines]
    return {card.entry.name: card for card in cards}
