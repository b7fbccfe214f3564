"""Forecast of a study's cost: its runs in order, and their time."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from datetime import timedelta
from pathlib import Path

import torch
from torch.nn import functional as F

from localvit.bench import interleaved, timer_for, using_threads
from localvit.cost import count_macs, giga
from localvit.data import random_scope
from localvit.models import build_model, preprocessing_for
from localvit.runtime import pick_device
from localvit.studies.design import Study, StudyRun, StudySummary
from localvit.studies.execution.folder import StudyFolder, check_reuse

_PASSES = 3  # A backward pass costs about two forward passes.
_MACS_OF_A_MEASUREMENT = 2e9
_MOST_IMAGES = 64


def forecast(
    folder: StudyFolder,
    summary: StudySummary,
    jobs: int,
    device: str | None = None,
    reuse: Sequence[Path] = (),
) -> list[str]:
    """Describe a study's runs in order, with their costs, and the time of those to do; nothing is written.

    Args:
        folder: Folder of the study; it need not exist.
        summary: Summary of `checks.check_study`.
        jobs: Runs at a time.
        device: Device for a measurement, if nothing has run yet; `None`: the study's.
        reuse: As in `run_missing`.

    Raises:
        ConfigError: if a record cannot be read, or a folder to reuse is none of a study.
    """
    check_reuse(reuse)
    outcomes = {run: folder.outcome_with(run, reuse) for run in folder.study.runs()}
    macs = _training_macs(folder.study, summary)
    done = {run: o.record.seconds for run, o in outcomes.items() if o.record is not None and run in macs}
    if done:
        speed = sum(macs[run] for run in done) / sum(done.values())
        basis = f"from the {len(done)} runs that are done: {speed / 1e9:.2f} GMACs/s each"
    else:
        speed = measured_speed(folder.study, summary.classes, device)
        basis = f"measured here on random images, without loading: {speed / 1e9:.2f} GMACs/s for one run"

    def duration(macs: float) -> str:
        return str(timedelta(seconds=round(macs / speed)))

    lines = []
    for number, (run, outcome) in enumerate(outcomes.items(), 1):
        cost = f"{giga(macs[run])}MACs, {duration(macs[run])}" if macs else "unknown cost"
        state = f"failed: {outcome.reason}" if outcome.state == "failed" else outcome.state
        lines.append(f"{number:>4}  {run.key}  {run}: {cost}, {state}")
    left = [run for run, outcome in outcomes.items() if outcome.state != "done"]
    text = duration(sum(macs[run] for run in left) / jobs) if macs or not left else "unknown time"
    total = f"{len(left)} of {len(outcomes)} runs to do: about {text} with {jobs} at a time"
    return [*lines, f"{total}, validation not counted ({basis})"]


def _training_macs(study: Study, summary: StudySummary) -> dict[StudyRun, float]:
    """Return the multiply-accumulates of each run's training; empty if the number of images is unknown."""
    if summary.images.value is None:
        return {}
    whole = float(summary.images.value) / study.base.data.fraction
    return {
        run: _PASSES * summary.arms[run.arm].macs * whole * run.config.data.fraction * run.config.epochs
        for run in study.runs()
    }


def measured_speed(study: Study, classes: int, device_name: str | None) -> float:
    """Measure the multiply-accumulates per second of a few steps of the base, on a GPU or a CPU thread."""
    config = study.config(study.arms[0], study.seeds[0])
    device = pick_device(device_name or config.device)
    with using_threads(1):
        with random_scope():
            plain = dataclasses.replace(config.model, pretrained=False)
            model = build_model(plain, classes).to(device)
        size = preprocessing_for(model, config.data).input_size
        macs = count_macs(model.eval(), size)
        count = min(config.batch_size, _MOST_IMAGES, max(2, int(_MACS_OF_A_MEASUREMENT / macs)))
        images = torch.zeros(count, *size, device=device)
        labels = torch.zeros(count, dtype=torch.long, device=device)
        model.train()
        update = {"step": lambda: F.cross_entropy(model(images), labels).backward()}
        seconds = interleaved(update, 4, timer=timer_for(device), warm_up=0)  # the first ones warm up
    return _PASSES * macs * count / min(seconds["step"])
