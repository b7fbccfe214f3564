"""A study from its runs to its report."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path

import torch
from rich.console import Console

from localvit.atomic import write_atomically
from localvit.bench import machine
from localvit.errors import ConfigError, check_at_least
from localvit.inference import open_model
from localvit.models import preprocessing_for
from localvit.runtime import pick_device
from localvit.structure import to_json
from localvit.studies.design import Study
from localvit.studies.execution import (
    THREADS,
    Cluster,
    StudyFailed,
    StudyFolder,
    Tuning,
    images_per_second,
    run_missing,
    save_tuning,
)
from localvit.studies.reporting import SPEED, Speed, StudyReport, read_report, read_speed, write_report


def run_study(
    study: Study,
    folder: Path,
    *,
    tuning: Tuning | None = None,
    command: str = "",
    jobs: int = 2,
    threads: int = 1,
    cluster: Cluster | None = None,
    retry: bool = True,
    reuse: Sequence[Path] = (),
    console: Console | None = None,
) -> StudyReport:
    """Run the missing runs, time the arms, compare them, and write the report.

    Args:
        study: Study with matched budgets (`checks.matched`).
        folder: Folder for runs and report (`folder.StudyFolder`).
        tuning: Search for the learning rates, saved beside the runs and cited by the report.
        command, jobs, threads, cluster, retry, reuse, console: As in `run.run_missing`. With a cluster the
            arms are not timed, because a login node is unsuitable; a later call without it times them.

    Raises:
        ConfigError, DataError: if the study is invalid or the folder holds something else; nothing was
            written.
        StudyFailed: if runs failed; the others are saved and reported.
    """
    check_at_least(2, seeds=len(study.seeds))
    store = StudyFolder(folder, study)
    failures = run_missing(
        store,
        jobs=jobs,
        threads=threads,
        cluster=cluster,
        retry=retry,
        reuse=reuse,
        command=command,
        console=console,
    )
    if tuning is not None:
        save_tuning(tuning, folder)
    if not failures and cluster is None:
        time_arms(store)
    report = read_report(folder)
    write_report(report)
    if failures:
        waits = not retry and any(store.outcome(run).state == "failed" for run in failures)
        advice = "add --retry to repeat them" if waits else "the same command resumes them"
        reasons = "; ".join(f"{run}: {reason}" for run, reason in failures.items())
        number = len(study.runs())
        raise StudyFailed(f"{len(failures)} of {number} runs failed ({reasons}); {advice}")
    return report


def time_arms(store: StudyFolder) -> None:
    """Time the first seed's models of all arms alternately, if they exist and have not been timed."""
    study = store.study
    first = {run.arm: run for run in study.runs() if run.seed == study.seeds[0]}
    if not all((store.of(run) / "best").exists() for run in first.values()):
        return
    keys = tuple(run.key for run in first.values())
    with suppress(ConfigError):  # a damaged file is measured again
        if read_speed(store.path).keys == keys:
            return
    device = pick_device(study.base.device)
    models = {name: open_model(store.of(run), device).model for name, run in first.items()}
    sizes = {
        name: preprocessing_for(model, first[name].config.data).input_size for name, model in models.items()
    }
    found = images_per_second(models, sizes, device=device)
    words = machine(THREADS if device.type == "cpu" else torch.get_num_threads())
    write_atomically(store.path / SPEED, to_json(Speed(images_per_second=found, machine=words, keys=keys)))
