"""Computation of the registry: models are built on the meta device and counted."""

from typing import Any

import timm
from timm.models import get_pretrained_cfg
from torch import nn

from localvit.cost import count_macs, count_parameters, on_meta
from localvit.models.listing import ModelCard, ModelEntry
from localvit.models.table import BASELINES, VARIANTS
from localvit.surgery import confounders, plan


def names() -> list[str]:
    """Return the names of the registry, in its order: each baseline before its first variant."""
    return list(dict.fromkeys(n for name, variant in VARIANTS.items() for n in (variant.base, name)))


def count(name: str) -> ModelCard:
    """Compute the card of a model of the registry."""
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
