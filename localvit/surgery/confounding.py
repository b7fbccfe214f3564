"""Confounders: changes that come together with the depth-wise convolution."""

from __future__ import annotations

from localvit.locality import LocalityConfig
from localvit.surgery.preview import Plan


def confounders(plan: Plan, drop_path_rate: float | None = None) -> list[str]:
    """Return sentences on how a localized model differs from its base beyond the depth-wise convolution.

    Args:
        plan: Result of `localvit.plan` for the base model.
        drop_path_rate: Drop-path rate of the base in training; `None` if it is not decided.
    """
    locality = plan.config.resolve()
    found = [*_around(locality, drop_path_rate), *_inside(locality), *_tokens(locality, plan)]
    found.append(_size("parameters", plan.parameters))
    return found + ([_size("multiply-accumulates", plan.macs)] if plan.macs else [])


def _around(locality: LocalityConfig, drop_path_rate: float | None) -> list[str]:
    found = []
    if not locality.prenorm:
        found.append("No pre-norm: the block's LayerNorm before the feed-forward network is removed.")
    if not locality.drop_path:
        if drop_path_rate is None:
            effect = "which the control has in training"
        elif drop_path_rate:
            effect = f"the control drops that branch at a rate of up to {drop_path_rate:g}"
        else:
            effect = "without effect here, since the control has none either"
        found.append(f"No drop-path on the feed-forward branch ({effect}).")
    return found


def _inside(locality: LocalityConfig) -> list[str]:
    found = []
    if locality.activation is not None:
        found.append(f"Activation {locality.activation} instead of the control's (GELU in DeiT).")
    if locality.norm not in (None, "none"):
        found.append(f"Norm ({locality.norm}) inside the feed-forward network; the control has none.")
    if locality.glu != "none":
        found.append("A gated linear unit; the control has one activated hidden map.")
    if locality.gate not in (None, "none"):
        found.append(f"A channel gate ({locality.gate}) on the hidden map; the control has none.")
    return found


def _tokens(locality: LocalityConfig, plan: Plan) -> list[str]:
    found = []
    sites = [site for site in plan.sites if site.num_prefix_tokens]
    if locality.prefix == "skip" and sites:
        where = "the" if len(sites) == len(plan.sites) else f"{len(sites)} of {len(plan.sites)}"
        found.append(
            f"The class token skips {where} feed-forward networks; in the control it passes through."
        )
    if locality.prefix == "identity" and sites:
        found.append(
            "The feed-forward networks return the class token unchanged; in the control they transform it."
        )
    for site in plan.sites:
        if site.dead_parameters:
            found.append(
                f"{site.name} of the last block has {site.parameters[1]:,} parameters that no output depends "
                "on (the head reads the class token only): in effect, the treatment has one network fewer."
            )
    return found


def _size(what: str, values: tuple[int, int]) -> str:
    before, after = values
    change = after / before - 1
    return f"Not matched in {what}: {before:,} in the control, {after:,} with locality ({change:+.1%})."
