"""`localvit study`: controlled experiments from a question file to a report."""

from __future__ import annotations

import dataclasses
import shlex
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import tyro

from localvit.cli.arguments import (
    UsageError,
    check_extra,
    check_least,
    check_output,
    command_line,
    one_line_errors,
)
from localvit.cli.cluster import OnCluster, cluster_of
from localvit.errors import printable

if TYPE_CHECKING:
    from rich.console import Console

    from localvit.studies.design import Study, StudySummary
    from localvit.studies.execution import Cluster
    from localvit.studies.reporting import StudyReport

Name = Annotated[str, tyro.conf.Positional, tyro.conf.arg(metavar="NAME|FILE")]
Folder = Annotated[str, tyro.conf.Positional, tyro.conf.arg(metavar="DIR")]

_HERE = 2  # runs at a time on this machine
HELP = "Run controlled experiments.\n\nExample: localvit study run designs --seeds 3 --output runs/designs"


@dataclass(frozen=True, kw_only=True)
class List:
    """List the questions that come with localvit."""


@dataclass(frozen=True, kw_only=True)
class New:
    """Write a commented question file to edit.

    Example: localvit study new mine
    """

    name: Annotated[str, tyro.conf.Positional, tyro.conf.arg(metavar="NAME")]
    """new file, without .yaml"""


@dataclass(frozen=True, kw_only=True)
class Asked:
    """Question at a scale."""

    name: Name
    """a question that comes with localvit (see list), or a YAML file"""
    scale: Annotated[str, tyro.conf.arg(metavar="NAME")] = "digits"
    """digits (minutes on a CPU), small (such as CIFAR-10), paper (ImageNet), or one that the file defines"""
    data: Annotated[str | None, tyro.conf.arg(metavar="SRC")] = None
    """training images (as for train)"""
    val_data: Annotated[str | None, tyro.conf.arg(metavar="SRC")] = None
    """(rare) test images; default: the data's own test split, or images held out from the data"""
    data_root: Annotated[str | None, tyro.conf.arg(metavar="FOLDER")] = None
    """(rare) folder of timm's named data sets"""
    set: Annotated[tyro.conf.UseAppendAction[tuple[str, ...]], tyro.conf.arg(metavar="KEY=VALUE")] = ()
    """field of all arms, e.g. epochs=5 or model.args.depth=4"""
    match: Literal["none", "params", "macs"] | None = None
    """(rare) cost to make equal in all arms, by changing the width of their feed-forward networks"""


@dataclass(frozen=True, kw_only=True)
class Show(Asked):
    """Show the arms of a question, their differences, cost and confounders. Nothing runs.

    Example: localvit study show designs
    """


@dataclass(frozen=True, kw_only=True)
class Run(OnCluster, Asked):
    """Train every arm with every seed, compare, and write a report.

    The same command resumes; more seeds or arms reuse finished runs.

    Example: localvit study run designs --seeds 3 --output runs/designs
    """

    output: Annotated[str | None, tyro.conf.arg(metavar="DIR")] = None
    """folder for runs and report: a new one, or that of the same study; default: runs/NAME-SCALE"""
    seeds: Annotated[int, tyro.conf.arg(metavar="N")] = 5
    """number of seeds, at least 2"""
    jobs: Annotated[int | None, tyro.conf.arg(metavar="N")] = None
    """runs at a time, spread over the GPUs; default: 2, or all on a cluster"""
    threads: Annotated[int, tyro.conf.arg(metavar="N")] = 1
    """threads of each run"""
    retry: tyro.conf.FlagCreatePairsOff[bool] = False
    """repeat failed runs"""
    reuse: Annotated[tyro.conf.UseAppendAction[tuple[str, ...]], tyro.conf.arg(metavar="DIR")] = ()
    """(rare) take finished runs of the same configuration from another study's folder"""
    dry_run: tyro.conf.FlagCreatePairsOff[bool] = False
    """print the runs, their order and cost, and stop"""


@dataclass(frozen=True, kw_only=True)
class Report:
    """Write report.html and report.md again; this needs only results.jsonl."""

    folder: Folder
    """folder of a study"""


@dataclass(frozen=True, kw_only=True)
class Compare:
    """Compare two studies arm by arm, such as two scales or two versions."""

    first: Folder
    """folder of a study"""
    second: Folder
    """folder of another study"""


@dataclass(frozen=True, kw_only=True)
class Export:
    """Print the results of a study: csv has a row per run, latex and markdown have one per arm."""

    folder: Folder
    """folder of a study"""
    format: Literal["csv", "latex", "markdown"] = "markdown"
    """format of the output"""


Options = List | New | Show | Run | Report | Compare | Export


def run(options: Options) -> int:
    """Run a subcommand; return 0."""
    from rich.console import Console

    check_extra("study")
    console = Console()
    with one_line_errors():
        match options:
            case List():
                _list(console)
            case New(name=name):
                from localvit.studies.design import write_question

                path = write_question(name)
                _print(console, f"written: {path}; run it with localvit study run {shlex.quote(str(path))}")
            case Run():
                return _run(options, console)
            case Show():
                study = _study(options, 1)
                from localvit.studies.design import check_study

                _print(console, describe(study, check_study(study)))
            case Report(folder=folder):
                from localvit.studies.reporting import read_report, write_report

                write_report(report := read_report(Path(folder)))
                print_report(report, console)
            case Compare(first=first, second=second):
                from localvit.studies.reporting import compare_studies

                _print(console, compare_studies(Path(first), Path(second)))
            case Export(folder=folder, format=form):
                from localvit.studies.reporting import export_study

                print(export_study(Path(folder), form), end="")
    return 0


def print_report(report: StudyReport, console: Console) -> None:
    """Print the main table and the verdicts."""
    from localvit.studies.reporting import result_notes, result_table, verdicts

    console.print(result_table(report).rich(report.study.question))
    warnings = [f"warning: {warning}" for warning in report.warnings]
    lines = [result_notes(report), *verdicts(report), *warnings, f"report: {report.folder / 'report.html'}"]
    _print(console, "\n".join(lines))


def _list(console: Console) -> None:
    from localvit.studies.design import list_questions, load_question

    for name in list_questions():
        question = load_question(name)
        _print(console, f"{name:<14} {question.question} ({len(question.arms) + 1} arms)")


def _study(options: Asked, seeds: int) -> Study:
    from localvit.studies.design import load_question

    question = load_question(options.name)
    study = question.study(
        options.scale, seeds, options.set, train=options.data, test=options.val_data, root=options.data_root
    )
    if options.match is not None:
        study = dataclasses.replace(study, match=options.match)
    from localvit.studies.design import matched  # imports torch (see train)

    return matched(study)


def describe(study: Study, summary: StudySummary) -> str:
    """Describe a study before it runs."""
    from localvit.cost import giga

    lines = [
        study.question,
        f"base: {study.base.model.name} on {study.base.data.train}, {study.base.epochs} epochs",
    ]
    for name, arm in summary.arms.items():
        cost = f"{arm.parameters:,} parameters, {giga(arm.macs)}MACs, {arm.tokens or '?'} tokens"
        control = study.control_of(study.arm(name))
        lines.append(f"{name}{f' (against {control})' if control != name else ''}: {cost}")
        lines += [f"  {path}: {there!r} -> {here!r}" for path, (there, here) in arm.differs.items()]
        lines += [f"  also: {sentence}" for sentence in arm.confounders]
        lines += [f"  {arm.matched}"] if arm.matched else []
    if study.claim:
        lines.append(f"claim: {study.claim.text} ({study.claim.source})")
    return "\n".join(lines)


def _run(options: Run, console: Console) -> int:
    here = _HERE if options.jobs is None else options.jobs
    check_least(seeds=(options.seeds, 2), jobs=(here, 1), threads=(options.threads, 1))
    cluster = cluster_of(options, options.jobs)
    study = _study(options, options.seeds)
    check_output(options.output)
    folder = Path(options.output or f"runs/{study.name}-{study.scale}")
    if options.dry_run:
        _dry_run(study, folder, options, cluster, console)
        return 0
    if study.base.data.train == "DATA":
        raise UsageError(f"scale {options.scale!r} has no images; add --data SRC")
    from localvit.studies import run_study

    try:
        made = run_study(
            study,
            folder,
            command=command_line(("study", "run"), options),
            jobs=here,
            threads=options.threads,
            cluster=cluster,
            retry=options.retry,
            reuse=[Path(other) for other in options.reuse],
            console=console,
        )
    except KeyboardInterrupt:
        left = "its jobs keep running, " if options.cluster == "slurm" else ""
        print(f"stopped; {left}finished runs are in {folder}, and the same command resumes")
        return 130
    print_report(made, console)
    return 0


def _dry_run(study: Study, path: Path, options: Run, cluster: Cluster | None, console: Console) -> None:
    from localvit.studies.design import check_study
    from localvit.studies.execution import StudyFolder, forecast

    if cluster is not None:
        cluster.check(study, options.threads)
    summary = check_study(study)
    folder = StudyFolder(path, study)
    jobs = options.jobs or (len(study.runs()) if cluster else _HERE)
    lines = [describe(study, summary), f"data: {summary.images}"]
    reuse = [Path(other) for other in options.reuse]
    lines += forecast(folder, summary, jobs, "cpu" if cluster else None, reuse)
    if cluster is not None:
        waiting = ("new", "begun", "failed") if options.retry else ("new", "begun")
        left = [run for run in study.runs() if folder.outcome(run).state in waiting]
        lines += cluster.describe(folder, left)
    _print(console, "\n".join(lines))


def _print(console: Console, text: str) -> None:
    shown = "\n".join(map(printable, text.split("\n")))
    console.print(shown, markup=False, highlight=False, soft_wrap=True)
