"""Cluster resources of a run."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from localvit.errors import ConfigError, at_least
from localvit.structure import build, plain


@dataclass(frozen=True, kw_only=True)
class Resources:
    """Resources of one run, which is one process; `None` is the cluster's default.

    Attributes:
        minutes: Time limit of the job. The run saves its state 90 seconds before and resumes in a requeued
            job, so the limit may be shorter than the run.
        gpus: 0 or 1.
        cpus: CPUs for the run's threads and data workers.
        memory: Memory in GB.
        partition, account, qos, constraint: As SLURM's `sbatch` names them.
        setup: Shell commands before the run, e.g. `module load cuda`.

    Raises:
        ConfigError: for a number that is not accepted.
    """

    minutes: int = 60
    gpus: int = 0
    cpus: int = 1
    memory: float | None = None
    partition: str | None = None
    account: str | None = None
    qos: str | None = None
    constraint: str | None = None
    setup: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        for name, least in (("minutes", 1), ("gpus", 0), ("cpus", 1)):
            at_least(self, "", least, name)
        if self.gpus > 1:
            raise ConfigError(f"gpus={self.gpus} is not accepted; use 0 or 1")
        if self.memory is not None and self.memory <= 0:
            raise ConfigError(f"memory={self.memory} is not accepted; use a positive number of GB")

    def replaced(self, own: Mapping[str, Any], where: str = "resources") -> Resources:
        """Return resources with some fields replaced (`Arm.resources`, at `where` of a question).

        Raises:
            ConfigError: for an unknown field or a value that is not accepted.
        """
        return build(Resources, {**plain(self), **build(dict[str, Any], own, where)}, where)

    def __str__(self) -> str:
        words = [f"{self.minutes} minutes", f"{self.cpus} CPU{'s' if self.cpus > 1 else ''}"]
        words += [f"{self.gpus} GPU"] if self.gpus else []
        words += [f"{self.memory:g} GB"] if self.memory else []
        names = ("partition", "account", "qos", "constraint")
        return ", ".join([*words, *(f"{n} {getattr(self, n)}" for n in names if getattr(self, n))])
