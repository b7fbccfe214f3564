"""A controlled experiment as one value: a base configuration, arms that change named fields, seeds."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import re
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from localvit.training import ConfigError, TrainConfig, from_dict, to_dict
from localvit.training.files import merge
from localvit.training.identity import UNCOMPARED

# The device is part of it, although a run may move between devices: a comparison must not.
_NOT_IDENTITY = tuple(name for name in UNCOMPARED if name != "device")


@dataclass(frozen=True, kw_only=True)
class Arm:
    """The base configuration with named fields replaced.

    Attributes:
        name: Lower-case letters, digits, ``-`` and ``.``.
        changes: Nested mapping of the fields, as in a recipe.
    """

    name: str
    changes: dict[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if not re.fullmatch(r"[a-z0-9][a-z0-9.-]*", self.name):
            raise ConfigError(f"arm {self.name!r}: a name has lower-case letters, digits, '-' and '.' only")


@dataclass(frozen=True, kw_only=True)
class Run:
    """One training run of a study: an arm with a seed, which decide the configuration."""

    arm: str
    seed: int
    config: TrainConfig = field(compare=False)  # it holds mappings, which have no hash

    @property
    def key(self) -> str:
        """Names the configuration: equal for two runs exactly if their results are meant to be equal."""
        return key_of(to_dict(self.config))


@dataclass(frozen=True, kw_only=True)
class Study:
    """Arms that are trained with the same seeds and compared.

    Attributes:
        question: In words.
        base: What all arms share; its `seed` and `output` are not used.
        arms: The first one is the control.
        seeds: Each trains every arm once. Equal seeds mean the same split, order, augmentation and
            initial values of the weights that arms share.

    Raises:
        ConfigError: if there are no arms or seeds, a name or a seed comes twice, a change names an unknown
            field or a value that is not accepted, or two arms are the same configuration.
    """

    question: str
    base: TrainConfig
    arms: tuple[Arm, ...]
    seeds: tuple[int, ...]

    def __post_init__(self) -> None:
        if not self.arms or not self.seeds:
            raise ConfigError(f"a study needs arms and seeds, not {len(self.arms)} and {len(self.seeds)}")
        _check_unique("arm", [arm.name for arm in self.arms])
        _check_unique("seed", list(self.seeds))
        names: dict[str, str] = {}
        for arm in self.arms:
            for own in ("seed", "output"):
                if own in arm.changes:
                    raise ConfigError(f"arm {arm.name!r} changes {own!r}, which the study decides")
            key = key_of(to_dict(self.config(arm, self.seeds[0])))
            if key in names:
                raise ConfigError(f"arms {names[key]!r} and {arm.name!r} are the same configuration")
            names[key] = arm.name

    def config(self, arm: Arm, seed: int) -> TrainConfig:
        """The configuration of one run."""
        own = {"seed": seed, "output": None}
        try:
            return from_dict(merge(merge(to_dict(self.base), arm.changes), own))
        except ConfigError as error:
            raise ConfigError(f"arm {arm.name!r}: {error}") from error

    def runs(self) -> list[Run]:
        """All runs, one seed of every arm first, so that partial results are balanced."""
        return [
            Run(arm=arm.name, seed=seed, config=self.config(arm, seed))
            for seed in self.seeds
            for arm in self.arms
        ]

    def to_dict(self) -> dict[str, Any]:
        """JSON values: the question, the base, the arms with their changes, the seeds."""
        return {
            "question": self.question,
            "base": to_dict(dataclasses.replace(self.base, seed=0, output=None)),
            "arms": {arm.name: arm.changes for arm in self.arms},
            "seeds": list(self.seeds),
        }


def key_of(config: Mapping[str, Any]) -> str:
    """Twelve hexadecimal digits that name a configuration (a mapping as `training.to_dict` makes it)."""
    identity = {name: value for name, value in config.items() if name not in _NOT_IDENTITY}
    return hashlib.sha256(json.dumps(identity, sort_keys=True).encode()).hexdigest()[:12]


def _check_unique(what: str, values: list[Any]) -> None:
    twice = [value for value, count in Counter(values).items() if count > 1]
    if twice:
        raise ConfigError(f"{what} {twice[0]!r} comes twice")
