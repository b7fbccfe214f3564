"""Controlled experiment as one value: base configuration, arms, seeds."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import re
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

from localvit.config import UNCOMPARED, TrainConfig, differences, from_older, to_older
from localvit.errors import ConfigError
from localvit.structure import build, plain
from localvit.studies.design.resources import Resources

Metric = Literal["top1", "top5"]
Match = Literal["none", "params", "macs"]
Budget = Literal["epochs", "compute"]
Expectation = Literal["better", "worse"]

# The device is included: a run may move between devices, but a comparison must not.
_NOT_IDENTITY = tuple(name for name in UNCOMPARED if name != "device")
_DECIDED_BY_STUDY = ("seed", "output")


@dataclass(frozen=True, kw_only=True)
class Arm:
    """Base configuration with named fields replaced.

    Attributes:
        name: Lower-case letters, digits, `-` and `.`.
        changes: Dotted field -> its value here. A mapping (`model.args`) is replaced as a whole.
        control: Name of its control; `None`: the study's first arm. Its own name: it is only a control of
            others.
        adjusted: Fields in `changes` that were set to match a budget.
        resources: Fields of `Resources` that override the study's for its runs.
    """

    name: str
    changes: dict[str, Any] = field(default_factory=dict)
    control: str | None = None
    adjusted: tuple[str, ...] = ()
    resources: dict[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if not re.fullmatch(r"[a-z0-9][a-z0-9.-]*", self.name):
            raise ConfigError(f"arm {self.name!r} is not accepted; use lower case, digits, '-' and '.'")
        Resources().replaced(self.resources, f"arms.{self.name}.resources")


@dataclass(frozen=True, kw_only=True)
class StudyRun:
    """Training run of a study: an arm with a seed, which decide the configuration."""

    arm: str
    seed: int
    config: TrainConfig = field(compare=False)  # mappings are not hashable

    @property
    def key(self) -> str:
        """Name of the configuration, equal for runs whose results should be equal."""
        return key_of(plain(self.config))

    def __str__(self) -> str:
        return f"{self.arm} seed {self.seed}"


@dataclass(frozen=True, kw_only=True)
class Claim:
    """Claim of a publication about a question.

    Attributes:
        text: The claim in our words.
        source: Its place in the publication.
        expected: Arm -> expected comparison with its control; arms without a claim are left out.
        reported: Arm -> its published ImageNet-1k top-1 in per cent, if known.
    """

    text: str
    source: str
    expected: dict[str, Expectation] = field(default_factory=dict)
    reported: dict[str, float] = field(default_factory=dict)


@dataclass(frozen=True, kw_only=True)
class Study:
    """Arms that are trained with the same seeds and compared.

    Attributes:
        question: The question as a sentence.
        base: Configuration of all arms; its `seed` and `output` are not used.
        arms: Arms; the first one is the control of those that name no other.
        seeds: Seeds, each of which trains every arm once. Equal seeds mean the same split, order,
            augmentation and initial values of the weights that arms share.
        metric: Metric of the comparison, on the test split, in per cent.
        match: Cost that `checks.matched` makes equal to the control's in every arm, within 1 %: parameters,
            multiply-accumulates, or none. (Not time, which is not reproducible.)
        budget: `"epochs"`: every arm trains for its own epochs. `"compute"`: `checks.matched` gives every arm
            as many epochs as use the multiply-accumulates of its control's training.
        name: Name of the question file.
        scale: Name of the scale.
        claim: Claim of the paper.

    Raises:
        ConfigError: if there are no arms or seeds, a name or a seed is a duplicate, a change has an unknown
            field or a bad value, a control or a claim names an unknown arm, or two arms are equal.
    """

    question: str
    base: TrainConfig
    arms: tuple[Arm, ...]
    seeds: tuple[int, ...]
    metric: Metric = "top1"
    match: Match = "none"
    budget: Budget = "epochs"
    name: str | None = None
    scale: str | None = None
    claim: Claim | None = None

    def __post_init__(self) -> None:
        if not self.arms or not self.seeds:
            raise ConfigError(f"{len(self.arms)} arms and {len(self.seeds)} seeds are too few; add some")
        _check_unique("arm", [arm.name for arm in self.arms])
        _check_unique("seed", list(self.seeds))
        self._check_names()
        names: dict[str, str] = {}
        for arm in self.arms:
            for own in _DECIDED_BY_STUDY:
                if own in arm.changes:
                    raise ConfigError(f"arm {arm.name!r} changes {own!r}, which the study sets; leave it out")
            key = key_of(plain(self.config(arm, self.seeds[0])))
            if (first := names.setdefault(key, arm.name)) != arm.name:
                raise ConfigError(f"arms {first!r} and {arm.name!r} are equal; leave one out")

    def _check_names(self) -> None:
        known = [arm.name for arm in self.arms]
        claimed = [*self.claim.expected, *self.claim.reported] if self.claim else []
        for what, name in [*(("control", self.control_of(arm)) for arm in self.arms)] + [
            ("claim", name) for name in claimed
        ]:
            if name not in known:
                raise ConfigError(f"{what}: the arm {name!r} does not exist; use {', '.join(known)}")

    def control_of(self, arm: Arm) -> str:
        """Return the name of `arm`'s control; its own name for a control."""
        return arm.control or self.arms[0].name

    def arm(self, name: str) -> Arm:
        """Return the arm of that name."""
        return next(arm for arm in self.arms if arm.name == name)

    def contrasts(self) -> list[tuple[Arm, Arm]]:
        """Return the comparisons: (treatment, control)."""
        pairs = [(arm, self.arm(self.control_of(arm))) for arm in self.arms]
        return [(arm, control) for arm, control in pairs if arm is not control]

    def config(self, arm: Arm, seed: int) -> TrainConfig:
        """Return the configuration of one run."""
        own = {"seed": seed, "output": None}
        return build(TrainConfig, replace_fields(plain(self.base), arm.changes) | own, f"arms.{arm.name}")

    def runs(self) -> list[StudyRun]:
        """Return all runs, ordered by seed, so that partial results are balanced."""
        return [
            StudyRun(arm=arm.name, seed=seed, config=self.config(arm, seed))
            for seed in self.seeds
            for arm in self.arms
        ]

    def to_dict(self) -> dict[str, Any]:
        """Return JSON values; the inverse of `study_from_dict`."""
        values = {field.name: plain(getattr(self, field.name)) for field in dataclasses.fields(self)}
        arms = {arm.pop("name"): arm for arm in values["arms"]}
        return values | {"base": values["base"] | {"seed": 0, "output": None}, "arms": arms}


def study_from_dict(values: Mapping[str, Any]) -> Study:
    """Return the study of `Study.to_dict`.

    Raises:
        ConfigError: if the values are invalid.
    """
    arms = build(dict[str, dict[str, Any]], values.get("arms"), "arms")
    listed = [
        {"name": name, **arm, "changes": from_older(arm.get("changes", {}))} for name, arm in arms.items()
    ]
    return build(Study, {**values, "base": from_older(values.get("base")), "arms": listed})


def replace_fields(values: Mapping[str, Any], changes: Mapping[str, Any]) -> dict[str, Any]:
    """Return nested `values` with dotted fields replaced in turn; missing mappings are created."""
    changed = dict(values)
    for path, value in changes.items():
        first, _, rest = path.partition(".")
        inner = changed.get(first)
        inner = inner if isinstance(inner, Mapping) else {}
        changed[first] = replace_fields(inner, {rest: value}) if rest else value
    return changed


def key_of(config: Mapping[str, Any]) -> str:
    """Return twelve hexadecimal digits that identify a configuration (a mapping of `plain`).

    Fields at their defaults are left out, so that new fields do not change it. Values are written as in 0.3,
    so that renamed values do not change it.
    """
    changed = differences(plain(TrainConfig()), config)
    identity = {path: new for path, (_, new) in changed.items() if path not in _NOT_IDENTITY}
    return hashlib.sha256(json.dumps(to_older(identity), sort_keys=True).encode()).hexdigest()[:12]


def _check_unique(what: str, values: list[Any]) -> None:
    twice = [value for value, count in Counter(values).items() if count > 1]
    if twice:
        raise ConfigError(f"{what} {twice[0]!r} is a duplicate; remove one")
