"""Files of questions: the question, its arms, and its scales.

```yaml
question: A sentence.
control: name of the first arm           # default: base
base: {model.locality: {gate: none}}     # dotted fields over the scale's recipe, in every arm
arms:
  wide: {model.locality.expansion: 6.0}  # dotted fields replaced in the base
  wider: {against: wide, model.locality.expansion: 8.0}   # compared with an arm other than the first
  long: {epochs: 90, resources: {minutes: 600}}           # asks a cluster for more than the others
scales:                                  # only where a question needs other values there
  digits: {base: {model.args.depth: 6}, arms: {wide: {epochs: 20}}}
  mine: {recipe: mine.yaml}              # further scales begin with a recipe
metric: top1                             # top1 | top5
match: none                              # none | params | macs
budget: epochs                           # epochs | compute
claim: {text: ..., source: ..., expected: {wide: better}, reported: {wide: 74.8}}
```

An arm `against` itself is only a control of others. The scales `digits`, `small` and
`paper` are in `scales.yaml`, for all questions.
"""

from __future__ import annotations

import os
import shlex
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field
from importlib import resources
from pathlib import Path
from typing import Any

from localvit.atomic import write_atomically, writing
from localvit.config import TrainConfig, load_recipe, merge, parse_setting
from localvit.errors import ConfigError, unknown
from localvit.structure import build, plain, read_yaml
from localvit.studies.design.study import Arm, Budget, Claim, Match, Metric, Study, replace_fields

_FILES = (".yaml", ".yml")
_HERE = resources.files("localvit.studies.design")


@dataclass(frozen=True, kw_only=True)
class Scale:
    """Scale of a question.

    Attributes:
        recipe: Name or file; `None` if the shared scale of that name has one.
        base: Dotted fields over the recipe.
        arms: Arm -> dotted fields over those of every scale.
    """

    recipe: str | None = None
    base: dict[str, Any] = field(default_factory=dict)
    arms: dict[str, dict[str, Any]] = field(default_factory=dict)


@dataclass(frozen=True, kw_only=True)
class Question:
    """Question file; the module has the format.

    Attributes:
        question: The question as a sentence.
        arms: Name -> dotted fields, and perhaps `against` and `resources`.
        control: Name of the arm without changes.
        base: Dotted fields of all arms.
        scales: Name -> its differences.
        metric, match, budget, claim: As in `Study`.
        name: Name of the file.
    """

    question: str
    arms: dict[str, dict[str, Any]]
    control: str = "base"
    base: dict[str, Any] = field(default_factory=dict)
    scales: dict[str, Scale] = field(default_factory=dict)
    metric: Metric = "top1"
    match: Match = "none"
    budget: Budget = "epochs"
    claim: Claim | None = None
    name: str | None = None

    def __post_init__(self) -> None:
        arms = [self.control, *self.arms]
        for scale, changed in self.scales.items():
            if changed.recipe is None and scale not in (shared := _shared_scales()):
                raise ConfigError(f"scales.{scale}.recipe is missing; add it, or use {', '.join(shared)}")
            _check_known(f"scales.{scale}.arms", changed.arms, self.arms)
            _check_against(f"scales.{scale}.arms", changed.arms, arms)
        _check_against("arms", self.arms, arms)
        if self.claim:
            for what in ("expected", "reported"):
                _check_known(f"claim.{what}", getattr(self.claim, what), arms)

    def study(self, scale: str, seeds: int, settings: Sequence[str] = (), **data: str | None) -> Study:
        """Return the study at a scale, with seeds 0, 1, ...

        Args:
            scale: Its name.
            seeds: Number of seeds.
            settings: `key=value` over the base.
            data: Fields of the data section that override all others, if not `None`.

        Raises:
            ConfigError: for an unknown scale, field or value, and as `Study`.
        """
        base = self._base(scale)
        for setting in settings:
            base = merge(base, parse_setting(setting))
        given = {f"data.{name}": value for name, value in data.items() if value is not None}
        return Study(
            question=self.question,
            base=build(TrainConfig, replace_fields(base, given)),
            arms=(Arm(name=self.control), *(self._arm(name, scale) for name in self.arms)),
            seeds=tuple(range(seeds)),
            metric=self.metric,
            match=self.match,
            budget=self.budget,
            name=self.name,
            scale=scale,
            claim=self.claim,
        )

    def _base(self, scale: str) -> dict[str, Any]:
        every = _shared_scales()
        if scale not in every.keys() | self.scales.keys():
            raise unknown(f"question {self.name!r}, scale", scale, dict.fromkeys([*every, *self.scales]))
        shared, own = every.get(scale, Scale()), self.scales.get(scale, Scale())
        recipe = own.recipe or shared.recipe
        assert recipe is not None  # checked above
        base: dict[str, Any] = plain(build(TrainConfig, load_recipe(recipe)))
        for changes in (self.base, shared.base, own.base):
            base = replace_fields(base, changes)
        return base

    def _arm(self, name: str, scale: str) -> Arm:
        changes = {**self.arms[name], **self.scales.get(scale, Scale()).arms.get(name, {})}
        control, resources = changes.pop("against", None), changes.pop("resources", {})
        return Arm(name=name, control=control, changes=changes, resources=resources)


def list_questions() -> list[str]:
    """Return the names of the package's questions."""
    names = (file.name for file in _HERE.joinpath("questions").iterdir())
    return sorted(name.removesuffix(".yaml") for name in names if name.endswith(".yaml"))


def write_question(name: str) -> Path:
    """Write a commented example question, which runs as it is, to edit.

    Args:
        name: Name of the file, with or without `.yaml`.

    Returns:
        The file.

    Raises:
        ConfigError: if the file exists; it does not change.
        WriteFailed: if it cannot be written.
    """
    path = Path(name if name.endswith(_FILES) else f"{name}.yaml")
    text = _HERE.joinpath("new.yaml").read_text(encoding="utf-8")
    if os.path.lexists(path):
        raise ConfigError(f"{str(path)!r} exists; choose another name")
    with writing(path):
        write_atomically(path, text.replace("FILE", shlex.quote(str(path))))
    return path


def load_question(question: str) -> Question:
    """Load a question of the package, or a YAML file.

    Raises:
        ConfigError: if the question does not exist, or a field is unknown or wrong.
    """
    if question.endswith(_FILES):
        values, name = read_yaml(question), Path(question).stem
    elif question in list_questions():
        values, name = _read(f"questions/{question}.yaml"), question
    else:
        error = unknown("study", question, list_questions())
        raise ConfigError(f"{error} (accepted: {', '.join(list_questions())}, or a .yaml file)")
    try:
        return build(Question, {"name": name, **values})
    except ConfigError as error:
        raise ConfigError(f"question {question!r}: {error}") from error


def _check_known(where: str, names: Collection[str], known: Collection[str]) -> None:
    for name in names:
        if name not in known:
            raise unknown(where, name, known)


def _check_against(where: str, arms: Mapping[str, Mapping[str, Any]], known: Collection[str]) -> None:
    for name, changes in arms.items():
        if "against" in changes:
            _check_known(f"{where}.{name}.against", [str(changes["against"])], known)


def _shared_scales() -> dict[str, Scale]:
    return build(dict[str, Scale], _read("scales.yaml"))


def _read(name: str) -> dict[str, Any]:
    with resources.as_file(_HERE.joinpath(name)) as path:
        return read_yaml(path)
