"""Forecast of a study's cost: its runs in order, and their time."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from datetime import timedelta

import torch
from torch.nn import functional as F

from localvit.bench import interleaved, timer_for, using_threads
from localvit.cost import count_macs, giga
from localvit.data import random_scope
from localvit.models import build_model, preprocessing_for
from localvit.runtime import pick_device
from localvit.studies.design import Study, StudyRun, StudySummary
from localvit.studies.execution.folder import Outcome, StudyFolder

_PASSES = 3  # A backward pass costs about two forward passes.
_MACS_OF_A_MEASUREMENT = 2e9
_MOST_IMAGES = 64


@dataclass(frozen=True, kw_only=True)
class Forecast:
    """Forecast of a study.

    Attributes:
        outcomes: Outcome of each run, in order.
        macs: Multiply-accumulates of the training of each; `None` if the number of images is unknown.
        macs_per_second: Speed of one run.
        basis: Source of that number, in words.
        jobs: Runs at a time.
    """

    outcomes: dict[StudyRun, Outcome]
    macs: dict[StudyRun, float | None]
    macs_per_second: float
    basis: str
    jobs: int

    def lines(self) -> list[str]:
        """Describe the forecast."""
        found = []
        for number, (run, outcome) in enumerate(self.outcomes.items(), 1):
            macs = self.macs[run]
            cost = "unknown cost" if macs is None else f"{giga(macs)}MACs, {self._time(macs)}"
            state = f"failed: {outcome.reason}" if outcome.state == "failed" else outcome.state
            found.append(f"{number:>4}  {run.key}  {run.arm} seed {run.seed}: {cost}, {state}")
        total = [self.macs[run] for run, outcome in self.outcomes.items() if outcome.state != "done"]
        known = [macs for macs in total if macs is not None]
        text = "unknown time" if len(known) < len(total) else self._time(sum(known) / self.jobs)
        return [
            *found,
            f"{len(total)} of {len(self.outcomes)} runs to do: about {text} with {self.jobs} at a time, "
            f"validation not counted ({self.basis})",
        ]

    def _time(self, macs: float) -> str:
        return str(timedelta(seconds=round(macs / self.macs_per_second)))


def forecast(folder: StudyFolder, summary: StudySummary, jobs: int, device: str | None = None) -> Forecast:
    """Forecast the cost of a study from its folder and models; nothing is written.

    Args:
        folder: Folder of the study; it need not exist.
        summary: Summary of `checks.check_study`.
        jobs: Runs at a time.
        device: Device for a measurement, if nothing has run yet; `None`: the study's.

    Raises:
        ConfigError: if a record cannot be read.
    """
    outcomes = {run: folder.outcome(run) for run in folder.study.runs()}
    macs: dict[StudyRun, float | None] = dict.fromkeys(outcomes)
    if summary.images.value is not None:
        whole = float(summary.images.value) / folder.study.base.data.fraction
        for run in outcomes:
            config = run.config
            macs[run] = _PASSES * summary.arms[run.arm].macs * whole * config.data.fraction * config.epochs
    done = [(run, o.record) for run, o in outcomes.items() if o.record is not None and macs[run]]
    if done:
        speed = sum(macs[run] or 0.0 for run, _ in done) / sum(record.seconds for _, record in done)
        basis = f"from the {len(done)} runs that are done: {speed / 1e9:.2f} GMACs/s each"
    else:
        speed = measured_speed(folder.study, summary.classes, device)
        basis = f"measured here on random images, without loading: {speed / 1e9:.2f} GMACs/s for one run"
    return Forecast(outcomes=outcomes, macs=macs, macs_per_second=speed, basis=basis, jobs=jobs)


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
