"""The question of the demo as a study: a small DeiT, and the same DeiT with the paper's locality."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

from rich.console import Console

import localvit
from localvit.locality.config import LocalityConfig
from localvit.studies.comparison import compare
from localvit.studies.records import StudyFolder, machine
from localvit.studies.report import Report, write_report
from localvit.studies.run import StudyFailed, run_missing
from localvit.studies.study import Arm, Study
from localvit.studies.throughput import THREADS, images_per_second
from localvit.studies.tuning import Tuning
from localvit.surgery import Plan, confounders
from localvit.training import ConfigError, TrainConfig
from localvit.training.build import build_model, pick_device, preprocessing
from localvit.training.checkpoint import load_checkpoint

QUESTION = "Does locality in the feed-forward networks help this vision transformer?"
ARMS = (
    Arm(name="baseline", changes={"model": {"locality": None}}),
    Arm(name="locality", changes={"model": {"locality": LocalityConfig().to_dict()}}),
)
"""The control, and the treatment; they differ in this field and in the learning rate tuned for each."""


def demo_study(base: TrainConfig, seeds: int, tuning: Tuning | None) -> Study:
    """The comparison with seeds 0, 1, ...

    Args:
        base: What both arms share.
        seeds: How many, at least 2: one pair has no spread to judge a difference by.
        tuning: Of both learning rates; ``None`` leaves the base's to both.

    Raises:
        ConfigError: for fewer than two seeds.
    """
    if seeds < 2:
        raise ConfigError(f"seeds={seeds}: at least 2 are needed to compare")
    rates = tuning.chosen if tuning else {}
    arms = tuple(
        Arm(name=arm.name, changes=arm.changes | {"optim": {"lr": rates.get(arm.name, base.optim.lr)}})
        for arm in ARMS
    )
    return Study(question=QUESTION, base=base, arms=arms, seeds=tuple(range(seeds)))


def answer(
    study: Study, folder: Path, *, tuning: Tuning | None, command: str, jobs: int, console: Console | None
) -> Report:
    """Do the runs that are missing, compare the arms, and write the report.

    Args:
        study: As `demo_study` makes it.
        folder: For the runs (`records.StudyFolder`), `report.html`, `report.md` and `summary.json`.
        tuning: Cited by the report.
        command: Noted in the report.
        jobs: Worker processes.
        console: Where progress is shown; ``None`` shows nothing.

    Raises:
        ConfigError, DataError: if the study cannot work or the folder holds something else; nothing was
            written.
        StudyFailed: if runs failed; the others are kept, and another call tries these again.
    """
    store = StudyFolder(folder, study)
    failures = run_missing(store, jobs=jobs, console=console)
    if failures:
        reasons = "; ".join(f"{run.arm} seed {run.seed}: {reason}" for run, reason in failures.items())
        raise StudyFailed(f"{len(failures)} of {len(study.runs())} runs failed ({reasons}); repeat to retry")
    records = store.finished()
    device = pick_device(study.base.device)
    first = {run.arm: run for run in records if run.seed == study.seeds[0]}
    models = {name: load_checkpoint(str(store.of(run)), device).model for name, run in first.items()}
    input_size = preprocessing(models[study.arms[0].name], study.base.data)["input_size"]
    speeds = images_per_second(models, input_size, device=device)
    treatment = models[study.arms[1].name]
    plan = _plan(study, treatment.num_classes)  # type: ignore[arg-type]
    report = Report(
        study=study,
        comparison=compare(study, records, speeds),
        records={
            arm.name: [record for run, record in records.items() if run.arm == arm.name] for arm in study.arms
        },
        treatment=treatment,
        confounders=confounders(plan, float(study.base.model.args.get("drop_path_rate", 0.0))),
        dead=tuple(site.name for site in plan.sites if site.dead_parameters),
        tuning=tuning,
        command=command,
        machine=machine(THREADS),
    )
    write_report(report, folder)
    return report


def _plan(study: Study, num_classes: int) -> Plan:
    """What locality does to the control's model."""
    treated = study.config(study.arms[1], study.seeds[0]).model
    control = build_model(dataclasses.replace(treated, locality=None, blocks="all"), num_classes)
    blocks: Any = treated.blocks  # building the model has checked it
    return localvit.plan(control, treated.locality, blocks)
