"""Options of runs on a cluster. Imports nothing heavy."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated, Literal

import tyro

from localvit.cli.arguments import UsageError

if TYPE_CHECKING:
    from localvit.studies.execution import Cluster


@dataclass(frozen=True, kw_only=True)
class OnCluster:
    """Cluster of a study, and the resources of each job (`studies.design.Resources`)."""

    cluster: Literal["slurm", "local"] | None = None
    """(rare) submit the runs as jobs: slurm (a job array) or local (on this machine, to try it out); every
    machine must see DIR and the images; jobs survive an interrupt"""
    minutes: Annotated[int, tyro.conf.arg(metavar="N")] = 60
    """(rare) time limit of a job; a longer run saves its state and is queued again"""
    gpus: Annotated[int, tyro.conf.arg(metavar="0|1")] = 0
    """(rare) GPUs of a job"""
    cpus: Annotated[int, tyro.conf.arg(metavar="N")] = 1
    """(rare) CPUs of a job, for threads and data workers"""
    memory: Annotated[float | None, tyro.conf.arg(metavar="GB")] = None
    """(rare) memory of a job"""
    partition: Annotated[str | None, tyro.conf.arg(metavar="NAME")] = None
    """(rare) as in sbatch"""
    account: Annotated[str | None, tyro.conf.arg(metavar="NAME")] = None
    """(rare) as in sbatch"""
    qos: Annotated[str | None, tyro.conf.arg(metavar="NAME")] = None
    """(rare) as in sbatch"""
    constraint: Annotated[str | None, tyro.conf.arg(metavar="WORDS")] = None
    """(rare) as in sbatch"""
    setup: Annotated[tyro.conf.UseAppendAction[tuple[str, ...]], tyro.conf.arg(metavar="LINE")] = ()
    """(rare) shell command before each run, e.g. 'module load cuda'"""


def cluster_of(options: OnCluster, parallel: int | None) -> Cluster | None:
    """Return the cluster of the options, or `None`.

    Args:
        parallel: Maximum number of jobs at a time.

    Raises:
        UsageError: if options of a cluster are given without one.
        ConfigError: as `Resources`.
    """
    from localvit.studies.design import Resources

    asked = {field.name: getattr(options, field.name) for field in dataclasses.fields(Resources)}
    resources = Resources(**asked)
    if options.cluster is not None:
        from localvit.studies.execution import Cluster

        return Cluster(kind=options.cluster, resources=resources, parallel=parallel)
    if resources != Resources():
        flag = next(name for name, value in asked.items() if value != getattr(Resources(), name))
        raise UsageError(f"--{flag} has no effect without --cluster; add --cluster")
    return None
