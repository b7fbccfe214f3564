"""Record of a run as JSON, with a digest that shows manual changes."""

from __future__ import annotations

import dataclasses
import hashlib
import json
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
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
from localvit.studies.design import StudyRun, key_of
from localvit.training import train

RECORD = "record.json"


@dataclass(frozen=True, kw_only=True)
class Record:
    """Result of one run, in JSON values.

    Attributes:
        key: Name of the configuration (`study.key_of`).
        config: The resolved configuration.
        history: One mapping per epoch, as in `training.RunResult`.
        best_epoch: Best epoch on the validation split.
        validation: Metrics of that epoch.
        test: Metrics of its weights on the test split.
        parameters: Number of parameters.
        macs: Multiply-accumulates for one image.
        seconds: Training time without validation, over all parts of an interrupted run.
        images_per_second: Training throughput, loading included: the median over the epochs.
        peak_memory: Peak memory in bytes (`bench.peak_memory`) of the last part; `None` if unknown.
        notes: Sentences about the splits.
        versions: Package -> version.
        commit: Git commit, if the package is in a checkout.
        machine: Description of the machine.
        digest: Digest of the other fields, which shows an edit.
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

    def sealed(self) -> Record:
        """Return the record with its digest."""
        return dataclasses.replace(self, digest=_digest(plain(self)))


def perform(config: TrainConfig, folder: Path) -> Record:
    """Train one configuration in `folder`, or the rest of it, and write its record.

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


def parse_record(values: Any, where: str, run: StudyRun) -> Record:
    """Return the record of `run` in JSON `values`.

    Raises:
        ConfigError: if it is invalid, has another configuration, or was changed afterwards.
    """
    try:
        record = build(Record, values)
        config = plain(build(TrainConfig, from_older(record.config), "config"))
    except ConfigError as error:
        raise ConfigError(f"{where} is not a record: {error}; restore it") from error
    if not key_of(config) == record.key == run.key:
        raise ConfigError(f"{where} does not belong to {run}; restore it")
    if record.digest != _digest(values):
        raise ConfigError(f"{where} was changed after it was written; restore it")
    return record


def read_record(folder: Path, run: StudyRun) -> Record | None:
    """Read the record in a run's folder; `None` if the run has not finished.

    Raises:
        ConfigError: as `parse_record`, with a remedy.
    """
    path = folder / RECORD
    if not path.exists():
        return None
    with remedy(f"delete {str(folder)!r} to redo it"):
        return parse_record(read_json(dict[str, Any], path), repr(str(path)), run)


@contextmanager
def remedy(advice: str) -> Iterator[None]:
    """Add a remedy to an error."""
    try:
        yield
    except ConfigError as error:
        raise ConfigError(f"{error}; {advice}") from error


def _digest(values: Mapping[str, Any]) -> str:
    rest = {name: value for name, value in values.items() if name != "digest"}
    return hashlib.sha256(json.dumps(rest, sort_keys=True).encode()).hexdigest()[:16]
