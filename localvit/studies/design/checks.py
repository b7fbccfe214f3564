"""Checks of a study before it runs: models, differences of arms, matched budgets."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple

from torch import nn

from localvit.config import differences
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
        arm: Its name.
        parameters: Number of parameters.
        macs: Multiply-accumulates for one image.
        tokens: Patch and prefix tokens at the first block; `None` if the model does not report them.
        differs: Fields in which its configuration differs from its control's: path -> (there, here).
        confounders: Sentences on other differences from its control.
        matched: Description of its matched budget; empty without one.
    """

    arm: str
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
        study: The study.
        classes: Number of classes; `None`: that of the data.

    Raises:
        ConfigError, UnsupportedModelError: for an arm whose model cannot be built, run or optimized.
    """
    images, counted = _count_data(study)
    number = classes or int(counted.value or 1)
    built = {arm.name: _built(study, arm, number) for arm in study.arms}
    arms: dict[str, ArmSummary] = {}
    for arm in study.arms:
        control = study.arm(study.control_of(arm))
        configs = [study.config(each, study.seeds[0]) for each in (control, arm)]
        theirs, own = built[control.name], built[arm.name]
        models, costs = (theirs.model, own.model), (theirs[1:], own[1:])
        pair = configs[0].model, configs[1].model
        same = configs[0] == configs[1]
        arms[arm.name] = ArmSummary(
            arm=arm.name,
            parameters=own.params,
            macs=own.macs,
            tokens=_tokens(own.model),
            differs=_differing(study, control, arm),
            confounders=() if same else _confounders(arm, pair, models, costs, number),
            matched=_matched_text(study, arm, *costs),
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
    """Model of an arm on the meta device, and its cost."""

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
    return _Built(model, count_parameters(model), macs())


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

    first = getattr(_built(study, arm, classes), study.match)
    if abs(first / target - 1) <= TOLERANCE:
        return arm
    config = study.config(arm, study.seeds[0]).model
    path, value = _knob(arm, config, _build(config, classes))

    def with_step(step: int) -> Arm:
        changes = arm.changes | {path: value(step)}
        return dataclasses.replace(arm, changes=changes, adjusted=(*arm.adjusted, path))

    @functools.cache
    def cost(step: int) -> int:
        return int(getattr(_built(study, with_step(step), classes), study.match))

    nearest = _nearest(cost, target)
    if abs(cost(nearest) / target - 1) > TOLERANCE:
        raise ConfigError(
            f"arm {arm.name!r} cannot match the {study.match} of its control ({target:,}) within "
            f"{TOLERANCE:.0%}: the nearest is {cost(nearest):,} at {path}={value(nearest):g}; use match: none"
        )
    return with_step(nearest)


def _knob(arm: Arm, config: ModelConfig, model: nn.Module) -> tuple[str, Callable[[int], float]]:
    """Return the field that changes an arm's width, and its value at each step, ascending."""
    dim = int(getattr(model, "embed_dim", 0) or 64)
    path = "model.args.mlp_ratio" if config.locality is None else "model.locality.expansion"
    asked = config.locality is not None and config.locality.expansion is not None
    if path in arm.changes or (asked and "model.locality" in arm.changes):
        heads = next(m.num_heads for m in model.modules() if isinstance(getattr(m, "num_heads", None), int))
        return "model.args.embed_dim", lambda step: step * heads
    return path, lambda step: step / dim  # one hidden channel more


def _nearest(cost: Callable[[int], int], target: int) -> int:
    """Return the step from 1 to `_MOST_STEPS` whose ascending cost is nearest to `target`."""
    high = 1
    while high < _MOST_STEPS and cost(high) < target:
        high *= 2
    low = high // 2
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (middle, high) if cost(middle) < target else (low, middle)
    return min((step for step in (low, high) if step > 0), key=lambda step: abs(cost(step) - target))


def _match_epochs(study: Study, arm: Arm, control: Arm, classes: int) -> Arm:
    """Return the arm with the number of epochs that costs as much as its control's training."""
    own, theirs = (_built(study, each, classes).macs for each in (arm, control))
    epochs = max(1, round(study.config(control, study.seeds[0]).epochs * theirs / own))
    if epochs == study.config(arm, study.seeds[0]).epochs:
        return arm
    changes = arm.changes | {"epochs": epochs}
    return dataclasses.replace(arm, changes=changes, adjusted=(*arm.adjusted, "epochs"))


def _matched_text(study: Study, arm: Arm, control: tuple[int, int], own: tuple[int, int]) -> str:
    parts = [f"{path}={arm.changes[path]:g}" for path in arm.adjusted]
    if study.match == "none" and not parts:
        return ""
    change = [
        f"{what} {here / there - 1:+.1%}"
        for what, there, here in zip(("parameters", "MACs"), control, own, strict=True)
    ]
    how = f" by {', '.join(parts)}" if parts else " without a change"
    return f"{arm.name}: matched{how}; {', '.join(change)} against its control"


def _tokens(model: nn.Module) -> int | None:
    """Return the number of patches of the first patch embedding, plus prefix tokens."""
    for module in (model, *model.modules()):
        patches = getattr(module, "num_patches", None)
        if isinstance(patches, int):
            return patches + int(getattr(model, "num_prefix_tokens", 0) or 0)
    return None


def _confounders(
    arm: Arm,
    configs: tuple[ModelConfig, ModelConfig],
    models: tuple[nn.Module, nn.Module],
    sizes: tuple[tuple[int, int], tuple[int, int]],
    classes: int,
) -> tuple[str, ...]:
    """Describe differences between an arm and its control, the second of each pair, in other fields."""
    control, own = configs
    before, after = map(heads, models)
    found = [] if before == after else [f"Heads differ: {before} in the control, {after} here."]
    plain = own.name == control.name and control.locality is None and own.locality is not None
    if plain:
        sentences = confounders(_plan_of(own, classes), float(own.args.get("drop_path_rate", 0.0)))
        found += [
            s for s in sentences if not s.startswith("Not matched")
        ]  # counted below, for all arms alike
    elif control.locality is not None and own.locality is not None:
        found += _following(arm, control.locality, own.locality)
    tokens = [_tokens(model) for model in models]
    if tokens[0] != tokens[1]:
        found.append(f"Tokens differ: {tokens[0]} in the control, {tokens[1]} here.")
    for what, there, here in zip(("parameters", "multiply-accumulates"), *sizes, strict=True):
        if abs(here / there - 1) > TOLERANCE:
            found.append(
                f"Not matched in {what}: {there:,} in the control, {here:,} here ({here / there - 1:+.1%})."
            )
    return tuple(found)


def _differing(study: Study, control: Arm, arm: Arm) -> dict[str, tuple[Any, ...]]:
    """Return the fields that differ; those of locality one by one where both have it."""
    configs = [study.config(each, study.seeds[0]) for each in (control, arm)]
    found = differences(*map(plain, configs))
    pair = [config.model.locality for config in configs]
    if "model.locality" in found and None not in pair:
        del found["model.locality"]
        fields = differences(*(dataclasses.asdict(locality) for locality in pair if locality))
        found |= {f"model.locality.{name}": values for name, values in fields.items()}
    return found


def _following(arm: Arm, control: LocalityConfig, own: LocalityConfig) -> list[str]:
    """Return fields of locality that differ because others decide them."""
    resolved = [dataclasses.asdict(locality.resolve()) for locality in (control, own)]
    named = {f.name for f in dataclasses.fields(own) if getattr(own, f.name) != getattr(control, f.name)}
    return [
        f"{name} follows from the fields that differ: {there!r} in the control, {here!r} here."
        for name, (there, here) in differences(*resolved).items()
        if name not in named
    ]
