"""A controlled experiment as one value: a base configuration, arms that replace named fields, seeds."""

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

# The device is part of it, although a run may move between devices: a comparison must not.
_NOT_IDENTITY = tuple(name for name in UNCOMPARED if name != "device")
_DECIDED_BY_STUDY = ("seed", "output")


@dataclass(frozen=True, kw_only=True)
class Arm:
    """The base configuration with named fields replaced.

    Attributes:
        name: Lower-case letters, digits, ``-`` and ``.``.
        changes: Dotted field -> its value here. A mapping (``model.args``) is replaced as a whole.
        control: The arm that this one is compared with; ``None``: the study's first. Its own name: none,
            because this arm is there for others to be compared with.
        adjusted: Those of the fields in `changes` that were set to match a budget, not to ask a question.
        resources: Fields of `Resources` in which its runs ask a cluster for something else than the others.
    """

    name: str
    changes: dict[str, Any] = field(default_factory=dict)
    control: str | None = None
    adjusted: tuple[str, ...] = ()
    resources: dict[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if not re.fullmatch(r"[a-z0-9][a-z0-9.-]*", self.name):
            raise ConfigError(f"arm {self.name!r}: a name has lower-case letters, digits, '-' and '.' only")
        Resources().replaced(self.resources, f"arms.{self.name}.resources")


@dataclass(frozen=True, kw_only=True)
class Run:
    """One training run of a study: an arm with a seed, which decide the configuration."""

    arm: str
    seed: int
    config: TrainConfig = field(compare=False)  # it holds mappings, which have no hash

    @property
    def key(self) -> str:
        """Names the configuration: equal for two runs exactly if their results are meant to be equal."""
        return key_of(plain(self.config))


@dataclass(frozen=True, kw_only=True)
class Claim:
    """What a publication says about a question.

    Attributes:
        text: In our words.
        source: Where it says so.
        expected: Arm -> how it then compares with its control; arms that it says nothing about are left out.
        reported: Arm -> its published ImageNet-1k top-1 in per cent, where one is known.
    """

    text: str
    source: str
    expected: dict[str, Expectation] = field(default_factory=dict)
    reported: dict[str, float] = field(default_factory=dict)


@dataclass(frozen=True, kw_only=True)
class Study:
    """Arms that are trained with the same seeds and compared.

    Attributes:
        question: In words.
        base: What all arms share; its `seed` and `output` are not used.
        arms: The first one is the control of those that name no other.
        seeds: Each trains every arm once. Equal seeds mean the same split, order, augmentation and
            initial values of the weights that arms share.
        metric: Of the test split, in per cent: what arms are compared in.
        match: What `checks.matched` makes equal to the control's in every arm, within 1 %: parameters,
            multiply-accumulates, or nothing. (Not time: it is not the same twice, and a run that is named
            by its configuration must be.)
        budget: ``"epochs"``: every arm trains as long as it says. ``"compute"``: `checks.matched` gives
            every arm the epochs that take the multiply-accumulates of its control's training.
        name: Of the question file it came from.
        scale: Which of its scales.
        claim: What the paper says.

    Raises:
        ConfigError: if there are no arms or seeds, a name or a seed comes twice, a change names an unknown
            field or a value that is not accepted, an arm is compared with or claimed about that is not
            there, or two arms are the same configuration.
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
            raise ConfigError(f"a study needs arms and seeds, not {len(self.arms)} and {len(self.seeds)}")
        _check_unique("arm", [arm.name for arm in self.arms])
        _check_unique("seed", list(self.seeds))
        self._check_names()
        names: dict[str, str] = {}
        for arm in self.arms:
            for own in _DECIDED_BY_STUDY:
                if own in arm.changes:
                    raise ConfigError(f"arm {arm.name!r} changes {own!r}, which the study decides")
            key = key_of(plain(self.config(arm, self.seeds[0])))
            if key in names:
                raise ConfigError(f"arms {names[key]!r} and {arm.name!r} are the same configuration")
            names[key] = arm.name

    def _check_names(self) -> None:
        known = [arm.name for arm in self.arms]
        claimed = [*self.claim.expected, *self.claim.reported] if self.claim else []
        for what, name in [*(("control", self.control_of(arm)) for arm in self.arms)] + [
            ("claim", name) for name in claimed
        ]:
            if name not in known:
                raise ConfigError(f"{what}: there is no arm {name!r} (arms: {', '.join(known)})")

    def control_of(self, arm: Arm) -> str:
        """Name of the arm that `arm` is compared with; its own for a control."""
        return arm.control or self.arms[0].name

    def arm(self, name: str) -> Arm:
        """The arm of that name."""
        return next(arm for arm in self.arms if arm.name == name)

    def contrasts(self) -> list[tuple[Arm, Arm]]:
        """The comparisons: (treatment, control)."""
        pairs = [(arm, self.arm(self.control_of(arm))) for arm in self.arms]
        return [(arm, control) for arm, control in pairs if arm is not control]

    def config(self, arm: Arm, seed: int) -> TrainConfig:
        """The configuration of one run."""
        own = {"seed": seed, "output": None}
        return build(TrainConfig, replace_fields(plain(self.base), arm.changes) | own, f"arms.{arm.name}")

    def runs(self) -> list[Run]:
        """All runs, one seed of every arm first, so that partial results are balanced."""
        return [
            Run(arm=arm.name, seed=seed, config=self.config(arm, seed))
            for seed in self.seeds
            for arm in self.arms
        ]

    def to_dict(self) -> dict[str, Any]:
        """JSON values; the inverse of `study_from_dict`."""
        values = {field.name: plain(getattr(self, field.name)) for field in dataclasses.fields(self)}
        arms = {arm.pop("name"): arm for arm in values["arms"]}
        return values | {"base": values["base"] | {"seed": 0, "output": None}, "arms": arms}


def study_from_dict(values: Mapping[str, Any]) -> Study:
    """The study that `Study.to_dict` describes.

    Raises:
        ConfigError: if it describes none.
    """
    arms = build(dict[str, dict[str, Any]], values.get("arms"), "arms")
    listed = [
        {"name": name, **arm, "changes": from_older(arm.get("changes", {}))} for name, arm in arms.items()
    ]
    return build(Study, {**values, "base": from_older(values.get("base")), "arms": listed})


def replace_fields(values: Mapping[str, Any], changes: Mapping[str, Any]) -> dict[str, Any]:
    """Nested `values` with dotted fields replaced in turn; a field in nothing makes a mapping."""
    changed = dict(values)
    for path, value in changes.items():
        first, _, rest = path.partition(".")
        inner = changed.get(first)
        inner = inner if isinstance(inner, Mapping) else {}
        changed[first] = replace_fields(inner, {rest: value}) if rest else value
    return changed


def key_of(config: Mapping[str, Any]) -> str:
    """Twelve hexadecimal digits that name a configuration (a mapping as `plain` makes it).

    Fields at their defaults are left out, so that the name survives the addition of fields. Values have
    the words of 0.3, so that it survives new words.
    """
    changed = differences(plain(TrainConfig()), config)
    identity = {path: new for path, (_, new) in changed.items() if path not in _NOT_IDENTITY}
    return hashlib.sha256(json.dumps(to_older(identity), sort_keys=True).encode()).hexdigest()[:12]


def _check_unique(what: str, values: list[Any]) -> None:
    twice = [value for value, count in Counter(values).items() if count > 1]
    if twice:
        raise ConfigError(f"{what} {twice[0]!r} comes twice")
