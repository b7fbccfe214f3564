"""Registry of models: the cost of each, and the accuracy that its authors report."""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import timm
from timm.models import get_pretrained_cfg
from torch import nn

from localvit.cost import count_macs, count_parameters, on_meta
from localvit.models.table import BASELINES, VARIANTS
from localvit.surgery import confounders, plan


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


def model_card(name: str) -> ModelCard:
    """Return the card of a model of the registry.

    Raises:
        KeyError: for a name that is not in the registry.
    """
    if name not in names():
        raise KeyError(name)
    variant, entry = VARIANTS.get(name), _entry(name)
    if variant is None:
        return ModelCard(entry, None, (), (), 0, None)
    base, model = _on_meta(variant.base), _on_meta(name)
    the_plan = plan(_on_meta(variant.base, **variant.args), variant.locality, also=variant.also)
    dead = set(the_plan.dead_parameters)
    matched = f"{name}_matched"
    return ModelCard(
        entry=entry,
        base=_entry(variant.base),
        confounders=(*_other_heads(base, model), *confounders(the_plan)),
        notes=variant.notes,
        dead_parameters=sum(p.numel() for key, p in model.named_parameters() if key in dead),
        matched=matched if matched in VARIANTS else None,
    )


def _other_heads(base: nn.Module, model: nn.Module) -> list[str]:
    control, local = heads(base), heads(model)
    if control == local:
        return []
    return [f"Attention heads: {control} in the control, {local} with locality."]


def heads(model: nn.Module) -> str:
    """Return the different numbers of attention heads by depth: `"2/4/8"`."""
    return "/".join(dict.fromkeys(str(m.num_heads) for m in model.modules() if hasattr(m, "num_heads")))


def registry() -> Iterator[ModelEntry]:
    """Iterate over all models with locality, each after its baseline; each is counted when it is reached."""
    return map(_entry, names())


def names() -> list[str]:
    """Return the names of the registry, in its order."""
    return list(dict.fromkeys(n for name, variant in VARIANTS.items() for n in (variant.base, name)))


def _entry(name: str) -> ModelEntry:
    variant = VARIANTS.get(name)
    published = variant.published if variant else BASELINES.get(name)
    cfg = get_pretrained_cfg(name)
    assert cfg is not None
    model = _on_meta(name)
    return ModelEntry(
        name=name,
        base=variant.base if variant else name,
        locality=variant.locality.to_dict() if variant else None,
        also={group: config.to_dict() for group, config in variant.also.items()} if variant else {},
        args=dict(variant.args) if variant else {},
        parameters=count_parameters(model),
        gmacs=round(count_macs(model, cfg.input_size) / 1e9, 4),
        input_size=cfg.input_size,
        top1=published.top1 if published else None,
        top5=published.top5 if published else None,
        source=published.source if published else None,
        weights=(f"hf-hub:{cfg.hf_hub_id}" if cfg.hf_hub_id else str(cfg.url)) if cfg.has_weights else None,
    )


def _on_meta(name: str, **args: Any) -> nn.Module:
    """Build a model on the meta device, for counting."""
    return on_meta(lambda: timm.create_model(name, **args))
