"""What changes together with the depth-wise convolution, so that nobody credits it with the rest."""

from __future__ import annotations

from localvit.locality.config import LocalityConfig
from localvit.surgery import Plan
from localvit.training import ModelConfig


def confounders(model: ModelConfig, plan: Plan) -> list[str]:
    """Sentences on how a localized model differs from its base beyond the depth-wise convolution.

    Args:
        model: The localized arm's.
        plan: What `localvit.plan` says about its base model.
    """
    locality = plan.config.resolve()
    return [
        *_around(locality, float(model.args.get("drop_path_rate", 0.0))),
        *_inside(locality),
        *_tokens(locality, plan),
        _size("parameters", plan.parameters),
        _size("multiply-accumulates", plan.macs),
    ]


def _around(locality: LocalityConfig, drop_path_rate: float) -> list[str]:
    found = []
    if not locality.prenorm:
        found.append("No pre-norm: the block's LayerNorm in front of the feed-forward network is gone.")
    if not locality.drop_path:
        effect = (
            f"the control drops that branch at a rate of up to {drop_path_rate:g}"
            if drop_path_rate
            else "without effect here, since the control has none either"
        )
        found.append(f"No drop-path on the feed-forward branch ({effect}).")
    return found


def _inside(locality: LocalityConfig) -> list[str]:
    found = []
    if locality.activation is not None:
        found.append(f"Activation {locality.activation} in the place of the control's (GELU in DeiT).")
    if locality.norm not in (None, "none"):
        found.append(f"Norm ({locality.norm}) inside the feed-forward network, where the control has none.")
    if locality.gate not in (None, "none"):
        found.append(f"A channel gate ({locality.gate}) on the hidden map, which the control lacks.")
    return found


def _tokens(locality: LocalityConfig, plan: Plan) -> list[str]:
    found = []
    if locality.prefix == "bypass":
        found.append("The class token bypasses the feed-forward networks; in the control it passes through.")
    if plan.dead_parameters:
        last = plan.sites[-1]
        found.append(
            f"{last.name} of the last block has {last.parameters[1]:,} parameters that no output depends on "
            "(the head reads the class token only): the treatment works with one such network fewer."
        )
    return found


def _size(what: str, values: tuple[int, int]) -> str:
    before, after = values
    change = after / before - 1
    return f"Not matched in {what}: {before:,} in the control, {after:,} with locality ({change:+.1%})."
