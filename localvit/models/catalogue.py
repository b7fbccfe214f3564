"""The table of names: what each costs, and what its authors report."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import timm
import torch
from timm.models import get_pretrained_cfg

from localvit.cost import count_macs, count_parameters
from localvit.models.variants import BASELINES, VARIANTS


@dataclass(frozen=True)
class Entry:
    """One name of the table; every field a JSON value.

    Attributes:
        name: For ``timm.create_model``.
        base: The plain model it is made from; its own name for a baseline.
        locality: What is put into its feed-forward networks; ``None`` for a baseline.
        args: Constructor arguments in which it differs from its base.
        parameters: Counted on the built model, 1,000 classes.
        gmacs: Multiply-accumulates of one image at `input_size`, in units of 1e9 (:func:`count_macs`).
        input_size: Channels, height, width.
        top1, top5: ImageNet-1k validation accuracy in percent that the authors report, or ``None``.
        source: Where they report it.
        weights: Where ``pretrained=True`` fetches weights from, or ``None``.
    """

    name: str
    base: str
    locality: Mapping[str, Any] | None
    args: Mapping[str, Any]
    parameters: int
    gmacs: float
    input_size: tuple[int, int, int]
    top1: float | None
    top5: float | None
    source: str | None
    weights: str | None


def catalogue() -> list[Entry]:
    """All names with locality, each after the baseline it is compared with."""
    names: list[str] = []
    for name, variant in VARIANTS.items():
        names += [n for n in (variant.base, name) if n not in names]
    return [_entry(name) for name in names]


def _entry(name: str) -> Entry:
    variant = VARIANTS.get(name)
    published = variant.published if variant else BASELINES.get(name)
    cfg = get_pretrained_cfg(name)
    assert cfg is not None
    with torch.device("meta"):  # built without memory, to be counted
        model = timm.create_model(name)
    return Entry(
        name=name,
        base=variant.base if variant else name,
        locality=variant.locality.to_dict() if variant else None,
        args=dict(variant.args) if variant else {},
        parameters=count_parameters(model),
        gmacs=round(count_macs(model, cfg.input_size) / 1e9, 4),
        input_size=cfg.input_size,
        top1=published.top1 if published else None,
        top5=published.top5 if published else None,
        source=published.source if published else None,
        weights=(f"hf-hub:{cfg.hf_hub_id}" if cfg.hf_hub_id else str(cfg.url)) if cfg.has_weights else None,
    )
