"""Tuning of every arm's learning rate with one search grid, the same seeds, and the validation split.

A tuning is a study whose arms are the arms of the question at each learning rate. Its result is saved as
JSON: a user's in the folder of the study, those of the package's recipes in
`localvit/studies/execution/tuned/`.
"""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from importlib import resources
from pathlib import Path
from typing import Any

from rich.console import Console

from localvit.atomic import write_atomically
from localvit.config import TrainConfig, differences, from_older, identity_fields, merge
from localvit.runtime import versions
from localvit.structure import build, read_json, to_json
from localvit.studies.design import Arm, Study
from localvit.studies.execution.folder import StudyFolder
from localvit.studies.execution.records import remedy
from localvit.studies.execution.run import Failures, StudyFailed, run_missing

FACTORS = (0.25, 0.5, 1.0, 2.0, 4.0)
"""First search grid, as multiples of the base's learning rate; factors below 2 differ less than seeds."""
MOST_EXTENSIONS = 4
"""Maximum number of extensions of the search grid by a factor of 2 at a border with a best value."""
FIRST_SEED = 1000
"""First seed of a tuning. Test seeds count from 0, so nothing is tuned on their validation splits."""


@dataclass(frozen=True, kw_only=True)
class Tuning:
    """Learning rates that were tried, and the chosen ones.

    Attributes:
        base: Tuned configuration, without learning rate and seed.
        changes: Arm -> its changes of the base.
        grid: Learning rates of every arm, ascending.
        seeds: Seeds of every arm and learning rate.
        validation_top1: Arm -> for each rate of the grid, the best epoch's validation top-1 of each seed,
            in per cent; a run that failed has `None`.
        chosen: Arm -> the rate with the highest mean, the lower one of equals. Rates with a failed run are
            excluded.
        at_border: Arms whose chosen rate is the grid's first or last after all extensions.
        command: Command that repeats the tuning.
        versions: Package -> version.
    """

    base: dict[str, Any]
    changes: dict[str, dict[str, Any]]
    grid: list[float]
    seeds: list[int]
    validation_top1: dict[str, list[list[float | None]]]
    chosen: dict[str, float]
    at_border: list[str]
    command: str
    versions: dict[str, str]

    def departures(self, base: TrainConfig) -> dict[str, tuple[Any, ...]]:
        """Return the fields of `base` that differ from the tuned ones: path -> (tuned, here)."""
        # Read as a configuration: a field newer than the tuning has its default.
        tuned = build(TrainConfig, merge(from_older(self.base), {"optim": {"lr": base.optim.lr}}))
        return differences(_tuned_part(identity_fields(tuned)), _tuned_part(identity_fields(base)))


def tune(
    base: TrainConfig,
    arms: Sequence[Arm],
    folder: Path,
    *,
    factors: Sequence[float] = FACTORS,
    seeds: int = 3,
    jobs: int = 2,
    command: str,
    console: Console | None = None,
) -> Tuning:
    """Try the search grid with every arm; extend it for all while a best value is at its border.

    Args:
        base: Configuration of all arms; its learning rate is the centre of the grid.
        arms: Arms, of which none changes the learning rate.
        folder: Folder of the runs; the same call resumes.
        factors: First search grid, as multiples of the base's learning rate.
        seeds: Number of seeds; three average out most of the luck of one.
        command: Command that is saved in the result.

    Raises:
        ConfigError, DataError: as `run.run_missing`.
        StudyFailed: if no rate of an arm finished with all seeds.
    """
    rates = sorted(base.optim.lr * factor for factor in factors)
    for extension in range(MOST_EXTENSIONS + 1):
        study = Study(
            question="Which learning rate suits each arm?",
            base=base,
            arms=tuple(_with_rate(arm, rate) for rate in rates for arm in arms),
            seeds=tuple(range(FIRST_SEED, FIRST_SEED + seeds)),
        )
        store = StudyFolder(folder, study)
        failures = run_missing(store, jobs=jobs, console=console)
        top1 = {(run.arm, run.seed): record.validation.top1 for run, record in store.finished().items()}
        scores = {
            arm.name: [[top1.get((_name(arm, rate), seed)) for seed in study.seeds] for rate in rates]
            for arm in arms
        }
        chosen = _choose(rates, scores, failures)
        wider = _extended(rates, list(chosen.values()))
        if wider == rates or extension == MOST_EXTENSIONS:
            break
        rates = wider
    return Tuning(
        base=_tuned_part(identity_fields(base)),
        changes={arm.name: arm.changes for arm in arms},
        grid=rates,
        seeds=list(study.seeds),
        validation_top1=scores,
        chosen=chosen,
        at_border=[name for name, rate in chosen.items() if _extended(rates, [rate]) != rates],
        command=command,
        versions=versions(),
    )


def save_tuning(tuning: Tuning, folder: Path) -> None:
    """Write `tuning.json` into a folder."""
    write_atomically(folder / "tuning.json", to_json(tuning))


def load_tuning(path: Path) -> Tuning:
    """Read a `tuning.json`.

    Raises:
        ConfigError: if it is invalid.
    """
    with remedy("restore the tuning"):
        return read_json(Tuning, path)


def shipped_tuning(recipe: str) -> Tuning | None:
    """Return the package's tuning of a recipe, if it exists."""
    with resources.as_file(
        resources.files("localvit.studies.execution") / "tuned" / f"{recipe}.json"
    ) as path:
        return load_tuning(path) if path.exists() else None


def _with_rate(arm: Arm, rate: float) -> Arm:
    return Arm(name=_name(arm, rate), changes=arm.changes | {"optim.lr": rate})


def _name(arm: Arm, rate: float) -> str:
    return f"{arm.name}-lr-{rate:g}"


def _choose(
    rates: Sequence[float], scores: Mapping[str, Sequence[Sequence[float | None]]], failures: Failures
) -> dict[str, float]:
    chosen = {name: _best(rates, by_rate) for name, by_rate in scores.items()}
    found = {name: rate for name, rate in chosen.items() if rate is not None}
    if len(found) < len(chosen):
        raise StudyFailed(f"an arm finished with no learning rate ({'; '.join(failures.values())})")
    return found


def _best(rates: Sequence[float], by_rate: Sequence[Sequence[float | None]]) -> float | None:
    """Return the rate with the highest mean, the lower one of equals; `None` if each has a failed run."""
    means = {
        rate: statistics.fmean(score for score in scores if score is not None)
        for rate, scores in zip(rates, by_rate, strict=True)
        if None not in scores
    }
    return max(means, key=lambda rate: (means[rate], -rate), default=None)


def _extended(rates: Sequence[float], chosen: Sequence[float]) -> list[float]:
    """Return the search grid, extended by a factor of 2 at each end with a chosen rate."""
    below = [rates[0] / 2] if rates[0] in chosen else []
    above = [rates[-1] * 2] if rates[-1] in chosen else []
    return [*below, *rates, *above]


def _tuned_part(values: dict[str, Any]) -> dict[str, Any]:
    optim = {name: value for name, value in values["optim"].items() if name != "lr"}
    return values | {"seed": 0, "optim": optim}
