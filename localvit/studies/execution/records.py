"""What a run leaves behind: one JSON record, which says when it was changed by hand."""

from __future__ import annotations

import dataclasses
import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from localvit.atomic import write_atomically
from localvit.bench import forget_peak_memory, machine, peak_memory
from localvit.config import TrainConfig, from_older
from localvit.cost import count_macs
from localvit.errors import ConfigError
from localvit.evaluation import Metrics
from localvit.models import preprocessing_for
from localvit.runtime import commit, versions
from localvit.structure import build, plain, read_json, to_json
from localvit.studies.design import Run, key_of
from localvit.training import train

RECORD = "record.json"


@dataclass(frozen=True, kw_only=True)
class Record:
    """The outcome of one run. All of it is JSON.

    Attributes:
        key: Names the configuration (`study.key_of`).
        config: The resolved configuration.
        history: One mapping per epoch, as in `training.RunResult`.
        best_epoch: Chosen on the validation split.
        validation: Metrics of that epoch.
        test: Metrics of its weights on the reported split.
        parameters: Number of parameters.
        macs: Multiply-accumulates for one image.
        seconds: Training took, over all parts of a run that was interrupted; validation is not counted.
        images_per_second: Of training, loading included: the median over the epochs.
        peak_memory: In bytes (`machine.peak_memory`), of the last part; ``None`` where it is not known.
        notes: Sentences about the splits.
        versions: Package -> version.
        commit: Of git, where the package is in a checkout.
        machine: In words.
        digest: Of all the rest, so that an edit shows.
    """

    key: str
    config: dict[str, Any]
    history: list[dict[str, Any]]
    best_epoch: int
    validation: Metrics
    test: Metrics
    parameters: int
    macs: int
    seconds: float
    images_per_second: float
    peak_memory: int | None
    notes: list[str]
    versions: dict[str, str]
    commit: str | None
    machine: str
    digest: str = ""

    def to_dict(self) -> dict[str, Any]:
        """Field -> JSON value."""
        return dataclasses.asdict(self)

    def sealed(self) -> Record:
        """The same with its digest."""
        return dataclasses.replace(self, digest=_digest(self.to_dict()))


def perform(config: TrainConfig, folder: Path) -> Record:
    """Train one configuration in `folder`, or the rest of it, and leave its record there.

    Raises:
        ConfigError, DataError, UnreadableImage, TrainingFailed: as `training.train`.
    """
    forget_peak_memory()
    result = train(dataclasses.replace(config, output=str(folder)))
    values = plain(dataclasses.replace(config, output=None))
    record = Record(
        key=key_of(values),
        config=values,
        history=result.history,
        best_epoch=result.best_epoch,
        validation=result.validation,
        test=result.test,
        parameters=result.parameters,
        macs=count_macs(result.model, preprocessing_for(result.model, config.data).input_size),
        seconds=sum(epoch["seconds"] for epoch in result.history),
        images_per_second=result.images_per_second,
        peak_memory=peak_memory(),
        notes=list(result.notes),
        versions=versions(),
        commit=commit(),
        machine=machine(torch.get_num_threads()),
    ).sealed()
    write_atomically(folder / RECORD, to_json(record))
    return record


def parse_record(values: Any, where: str, run: Run) -> Record:
    """The record of `run` in JSON `values`.

    Raises:
        ConfigError: if it is none, is that of another configuration, or was changed after it was written.
    """
    try:
        record = build(Record, values)
        config = plain(build(TrainConfig, from_older(record.config), "config"))
    except ConfigError as error:
        raise ConfigError(f"{where} is no record ({error})") from error
    if not key_of(config) == record.key == run.key:
        raise ConfigError(f"{where} does not hold the configuration of {run.arm} seed {run.seed}")
    if record.digest != _digest(values):
        raise ConfigError(f"{where} was changed after it was written")
    return record


def read_record(folder: Path, run: Run) -> Record | None:
    """The record in a run's folder; ``None`` if the run has not finished.

    Raises:
        ConfigError: as `parse_record`, with what to do.
    """
    path = folder / RECORD
    if not path.exists():
        return None
    try:
        return parse_record(read_json(dict[str, Any], path), repr(str(path)), run)
    except ConfigError as error:
        raise ConfigError(f"{error}; delete {str(folder)!r} to redo it") from error


def _digest(values: Mapping[str, Any]) -> str:
    rest = {name: value for name, value in values.items() if name != "digest"}
    return hashlib.sha256(json.dumps(rest, sort_keys=True).encode()).hexdigest()[:16]
