"""Checks of a study before it runs: models, differences of arms, matched budgets."""

from __future__ import annotations

import bisect
import dataclasses
import functools
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple

from torch import nn

from localvit.config import TrainConfig, differences
from localvit.cost import count_parameters, counted_macs, on_meta
from localvit.errors import ConfigError
from localvit.locality import LocalityConfig
from localvit.models import ModelConfig, build_model, check_forward, heads, preprocessing_for
from localvit.planning import Figure, count_data
from localvit.structure import plain
from localvit.studies.design.study import Arm, Study
from localvit.surgery import Plan, confounders, plan_changes
from localvit.training import build_optimizer

TOLERANCE = 0.01
"""Relative tolerance of matched budgets, whose effect is below that of seeds."""
_MOST_STEPS = 4096  # Largest hidden width or number of epochs that is tried.


@dataclass(frozen=True, kw_only=True)
class ArmSummary:
    """Summary of an arm's model.

    Attributes:
        parameters: Number of parameters.
        macs: Multiply-accumulates for one image.
        tokens: Patch and prefix tokens at the first block; `None` if the model does not report them.
        differs: Fields in which its configuration differs from its control's: path -> (there, here).
        confounders: Sentences on other differences from its control.
        matched: Description of its matched budget; empty without one.
    """

    parameters: int
    macs: int
    tokens: int | None
    differs: dict[str, tuple[Any, ...]]
    confounders: tuple[str, ...]
    matched: str


@dataclass(frozen=True, kw_only=True)
class StudySummary:
    """Summary of a study before it runs: its arms by name, and the size of its data."""

    arms: dict[str, ArmSummary]
    images: Figure
    classes: int


def check_study(study: Study, classes: int | None = None) -> StudySummary:
    """Build every arm's model without memory, and compare it with its control's.

    Args:
        classes: Number of classes; `None`: that of the data.

    Raises:
        ConfigError, UnsupportedModelError: for an arm whose model cannot be built, run or optimized.
    """
    images, counted = _count_data(study)
    number = classes or int(counted.value or 1)
    built = {arm.name: _built(study, arm, number) for arm in study.arms}
    arms = {}
    for arm in study.arms:
        control, own = built[study.control_of(arm)], built[arm.name]
        arms[arm.name] = ArmSummary(
            parameters=own.params,
            macs=own.macs,
            tokens=_tokens(own.model),
            differs=_differing(control, own),
            confounders=tuple(_confounders(control, own, number)),
            matched=_matched_text(study, arm, control, own),
        )
    return StudySummary(arms=arms, images=images, classes=number)


def matched(study: Study) -> Study:
    """Return the study with budgets matched by `study.match` and `study.budget`.

    Parameters and multiply-accumulates are matched by the hidden width of the feed-forward networks:
    `model.locality.expansion` of an arm with locality, `model.args.mlp_ratio` of one without. An arm that
    sets that field is matched by `model.args.embed_dim` instead.

    Raises:
        ConfigError: if an arm cannot come within 1 % of its control; the message has the nearest cost.
    """
    arms = {arm.name: arm for arm in study.arms}
    number = int(_count_data(study)[1].value or 1)
    for arm, control in study.contrasts():
        changed = arm
        if study.match != "none":
            target = getattr(_built(study, control, number), study.match)
            changed = _match_width(study, arm, target, number)
        if study.budget == "compute":
            changed = _match_epochs(study, changed, control, number)
        arms[arm.name] = changed
    return dataclasses.replace(study, arms=tuple(arms.values()))


def locality_sites(config: ModelConfig, classes: int) -> dict[str, bool]:
    """List the feed-forward networks with locality of a run's model: path -> if any output depends on it."""
    if config.locality is None:
        return {}
    the_plan = _plan_of(config, classes)
    return {site.name: not site.dead_parameters for site in the_plan.sites}


class _Built(NamedTuple):
    """Configuration of an arm, its model on the meta device, and the model's cost."""

    config: TrainConfig
    model: nn.Module
    params: int
    macs: int


def _built(study: Study, arm: Arm, classes: int) -> _Built:
    """Build an arm's model and optimizer, and run the model once."""
    config = study.config(arm, study.seeds[0])
    model = _build(config.model, classes)
    with counted_macs() as macs:
        check_forward(model, config.model.name, preprocessing_for(model, config.data).input_size)
    build_optimizer(model, config.optim, config.batch_size)
    return _Built(config, model, count_parameters(model), macs())


def _count_data(study: Study) -> tuple[Figure, Figure]:
    return count_data(study.base.data, study.base.seed, study.base.model.args.get("num_classes"))


def _build(config: ModelConfig, classes: int) -> nn.Module:
    return on_meta(functools.partial(build_model, dataclasses.replace(config, pretrained=False), classes))


def _plan_of(config: ModelConfig, classes: int) -> Plan:
    """Return the plan of the surgery that makes a model with locality from its baseline."""
    assert config.locality is not None
    base = _build(dataclasses.replace(config, locality=None, blocks="all"), classes)
    blocks: Any = config.blocks
    return plan_changes(base, config.locality, blocks, None, count=False)[0]


def _match_width(study: Study, arm: Arm, target: int, classes: int) -> Arm:
    """Return the arm with the width whose cost is nearest to `target`, unless it is within `TOLERANCE`."""
    first = _built(study, arm, classes)
    if abs(getattr(first, study.match) / target - 1) <= TOLERANCE:
        return arm
    path, value = _knob(arm, first)

    @functools.cache
    def cost(step: int) -> int:
        return int(getattr(_built(study, _adjusted(arm, path, value(step)), classes), study.match))

    nearest = _nearest(cost, target)
    if abs(cost(nearest) / target - 1) > TOLERANCE:
        raise ConfigError(
            f"arm {arm.name!r} cannot match the {study.match} of its control ({target:,}) within "
            f"{TOLERANCE:.0%}: the nearest is {cost(nearest):,} at {path}={value(nearest):g}; use match: none"
        )
    return _adjusted(arm, path, value(nearest))


def _adjusted(arm: Arm, path: str, value: float) -> Arm:
    """Return the arm with a field set to match a budget."""
    return dataclasses.replace(arm, changes=arm.changes | {path: value}, adjusted=(*arm.adjusted, path))


def _knob(arm: Arm, built: _Built) -> tuple[str, Callable[[int], float]]:
    """Return the field that changes an arm's width, and its value at each step, ascending."""
    locality, modules = built.config.model.locality, built.model.modules()
    path = "model.args.mlp_ratio" if locality is None else "model.locality.expansion"
    asked = locality is not None and locality.expansion is not None
    if path in arm.changes or (asked and "model.locality" in arm.changes):
        heads = next(m.num_heads for m in modules if isinstance(getattr(m, "num_heads", None), int))
        return "model.args.embed_dim", lambda step: step * heads
    dim = int(getattr(built.model, "embed_dim", 0) or 64)
    return path, lambda step: step / dim  # one hidden channel more


def _nearest(cost: Callable[[int], int], target: int) -> int:
    """Return the step from 1 to `_MOST_STEPS` whose ascending cost is nearest to `target`."""
    steps = range(1, _MOST_STEPS + 1)
    at = bisect.bisect_left(steps, target, key=cost)
    return min(steps[max(0, at - 1) : at + 1], key=lambda step: abs(cost(step) - target))


def _match_epochs(study: Study, arm: Arm, control: Arm, classes: int) -> Arm:
    """Return the arm with the number of epochs that costs as much as its control's training."""
    own, theirs = (_built(study, each, classes) for each in (arm, control))
    epochs = max(1, round(theirs.config.epochs * theirs.macs / own.macs))
    return arm if epochs == own.config.epochs else _adjusted(arm, "epochs", epochs)


def _matched_text(study: Study, arm: Arm, control: _Built, own: _Built) -> str:
    parts = [f"{path}={arm.changes[path]:g}" for path in arm.adjusted]
    if study.match == "none" and not parts:
        return ""
    how = f" by {', '.join(parts)}" if parts else " without a change"
    parameters, macs = own.params / control.params - 1, own.macs / control.macs - 1
    return f"{arm.name}: matched{how}; parameters {parameters:+.1%}, MACs {macs:+.1%} against its control"


def _tokens(model: nn.Module) -> int | None:
    """Return the number of patches of the first patch embedding, plus prefix tokens."""
    for module in (model, *model.modules()):
        patches = getattr(module, "num_patches", None)
        if isinstance(patches, int):
            return patches + int(getattr(model, "num_prefix_tokens", 0) or 0)
    return None


def _confounders(control: _Built, own: _Built, classes: int) -> list[str]:
    """Describe differences between an arm and its control in fields that it does not name."""
    before, after = heads(control.model), heads(own.model)
    found = [] if before == after else [f"Heads differ: {before} in the control, {after} here."]
    base, model = control.config.model, own.config.model
    if model.name == base.name and base.locality is None and model.locality is not None:
        sentences = confounders(_plan_of(model, classes), float(model.args.get("drop_path_rate", 0.0)))
        # Counted below, for all arms alike.
        found += [sentence for sentence in sentences if not sentence.startswith("Not matched")]
    elif base.locality is not None and model.locality is not None:
        found += _following(base.locality, model.locality)
    tokens = [_tokens(each.model) for each in (control, own)]
    if tokens[0] != tokens[1]:
        found.append(f"Tokens differ: {tokens[0]} in the control, {tokens[1]} here.")
    for what, there, here in (
        ("parameters", control.params, own.params),
        ("multiply-accumulates", control.macs, own.macs),
    ):
        if abs(here / there - 1) > TOLERANCE:
            found.append(
                f"Not matched in {what}: {there:,} in the control, {here:,} here ({here / there - 1:+.1%})."
            )
    return found


def _differing(control: _Built, own: _Built) -> dict[str, tuple[Any, ...]]:
    """Return the fields that differ; those of locality one by one where both have it."""
    found = differences(plain(control.config), plain(own.config))
    there, here = control.config.model.locality, own.config.model.locality
    if there and here and found.pop("model.locality", None):
        fields = differences(dataclasses.asdict(there), dataclasses.asdict(here))
        used = differences(dataclasses.asdict(there.resolve()), dataclasses.asdict(here.resolve()))
        # A field that is not set has the value that `init` decides, if it decides one.
        found |= {f"model.locality.{name}": used.get(name, values) for name, values in fields.items()}
    return found


def _following(control: LocalityConfig, own: LocalityConfig) -> list[str]:
    """Return fields of locality that differ because others decide them."""
    named = differences(dataclasses.asdict(control), dataclasses.asdict(own))
    resolved = (dataclasses.asdict(locality.resolve()) for locality in (control, own))
    return [
        f"{name} follows from the fields that differ: {there!r} in the control, {here!r} here."
        for name, (there, here) in differences(*resolved).items()
        if name not in named
    ]
