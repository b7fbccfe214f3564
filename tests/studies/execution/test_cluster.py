"""Runs as jobs: with submitit's local executor, and with a SLURM of three small shell scripts.

A real SLURM is in benchmarks/slurm.sh.
"""

import dataclasses
import json
import os
import signal
import time
from pathlib import Path

import pytest

from localvit.errors import ConfigError, TrainingFailed, TrainingInterrupted
from localvit.runs.lock import FolderInUse
from localvit.runtime.signals import stop_requested
from localvit.studies.demo import demo_study
from localvit.studies.design.resources import Resources
from localvit.studies.execution import cluster as cluster_module
from localvit.studies.execution.cluster import Cluster, Task
from localvit.studies.execution.folder import StudyFolder
from localvit.studies.execution.records import perform
from localvit.studies.execution.run import StudyFailed, run_missing
from localvit.studies.running import run_study

SBATCH = """
[ -f "$FAKE/refusal" ] && { cat "$FAKE/refusal" >&2; exit 1; }
id=$((100 + $(ls "$FAKE" | grep -c script)))
cp "$1" "$FAKE/script-$id"
last=$(sed -n 's/.*--array=0-\\([0-9]*\\).*/\\1/p' "$1")
if [ -n "$last" ]; then seq -f "${id}_%g" 0 "$last"; else echo $id; fi >>"$FAKE/queue"
echo "Submitted batch job $id"
"""
SQUEUE = '[ ! -f "$FAKE/down" ] && cat "$FAKE/queue"'


class Slurm:
    """Its queue is a file; between two looks at it, what `acts` says happens."""

    def __init__(self, folder):
        self.folder, self.acts = folder, []
        self.clear()

    def clear(self):
        (self.folder / "queue").write_text("")

    def scripts(self):
        return [path.read_text() for path in sorted(self.folder.glob("script-*"))]

    def sleep(self, _seconds):
        self.acts.pop(0)()


@pytest.fixture
def slurm(tmp_path, monkeypatch):
    fake = tmp_path / "slurm"
    fake.mkdir()
    for name, text in {"sbatch": SBATCH, "squeue": SQUEUE, "srun": ""}.items():
        (fake / name).write_text(f"#!/bin/sh\n{text}\n")
        (fake / name).chmod(0o755)
    monkeypatch.setenv("FAKE", str(fake))
    monkeypatch.setenv("PATH", f"{fake}:{os.environ['PATH']}")
    made = Slurm(fake)
    monkeypatch.setattr(cluster_module, "sleep", made.sleep)
    return made


def finish(folder, slurm, *runs):
    """Run the jobs here, to their end."""
    for run in runs:
        perform(run.config, folder.of(run))
    slurm.clear()


def interrupt():
    raise KeyboardInterrupt


def ids(folder):
    return {key: job["id"] for key, job in json.loads((folder.path / "jobs/jobs.json").read_text()).items()}


def test_each_class_of_resources_is_one_array(tiny, tmp_path, slurm):
    study = demo_study(tiny, 2, None)
    own = dataclasses.replace(study.arms[1], resources={"gpus": 1, "minutes": 600})
    folder = StudyFolder(tmp_path / "out", dataclasses.replace(study, arms=(study.arms[0], own)))
    asked = Resources(cpus=3, memory=1.5, partition="p", setup=("module load x",))
    slurm.acts = [interrupt]
    with pytest.raises(KeyboardInterrupt):
        run_missing(folder, cluster=Cluster(resources=asked, parallel=1))
    plain, gpu = slurm.scripts()
    for script in (plain, gpu):
        lines = script.splitlines()
        assert {"#SBATCH --array=0-1%1", "#SBATCH --cpus-per-task=3", "#SBATCH --mem=1536MB"} <= set(lines)
        assert {"#SBATCH --partition=p", "#SBATCH --requeue", "#SBATCH --signal=USR2@90"} <= set(lines)
        assert lines.index("module load x") < next(i for i, line in enumerate(lines) if "srun" in line)
        assert "srun --unbuffered" in script
        assert " --cpus-per-task=3 " in script
    assert "#SBATCH --time=60\n" in plain
    assert "gpus" not in plain
    assert "#SBATCH --time=600\n" in gpu
    assert "#SBATCH --gpus-per-node=1\n" in gpu
    arms = {run.key: run.arm for run in folder.study.runs()}
    assert {(arms[key], job) for key, job in ids(folder).items()} == {
        ("baseline", "100_0"), ("baseline", "100_1"), ("locality", "101_0"), ("locality", "101_1"),
    }  # fmt: skip


def test_an_interrupt_leaves_the_jobs_and_nothing_is_submitted_twice(folder, slurm):
    slurm.acts = [interrupt]
    with pytest.raises(KeyboardInterrupt):
        run_missing(folder, cluster=Cluster())
    with pytest.raises(ConfigError, match=r"4 runs have jobs .100_0, 100_1"):
        run_missing(folder)
    assert "running as job 100_2" in Cluster().describe(folder, folder.study.runs())[2]
    (slurm.folder / "down").touch()
    with pytest.raises(ConfigError, match="squeue does not respond"):
        run_missing(folder, cluster=Cluster())
    (slurm.folder / "down").unlink()
    slurm.acts = [
        (slurm.folder / "down").touch,  # an outage says nothing about the jobs
        lambda: None,
        lambda: None,
        lambda: [(slurm.folder / "down").unlink(), finish(folder, slurm, *folder.study.runs())],
    ]
    assert run_missing(folder, cluster=Cluster()) == {}
    assert len(folder.finished()) == len((folder.path / "results.jsonl").read_text().splitlines()) == 4
    assert run_missing(folder, cluster=Cluster()) == {}
    assert len(slurm.scripts()) == 1


def test_what_jobs_left_undone_is_said_and_done_by_the_next_call(folder, slurm):
    first, second, third, fourth = folder.study.runs()
    slurm.acts = [lambda: finish(folder, slurm, first, second, third), lambda: None]
    said = (
        r"1 of 4 runs failed .locality seed 1: its job 100_3 ended before the run.*; the same command resumes"
    )
    with pytest.raises(StudyFailed, match=said):
        run_study(folder.study, folder.path, cluster=Cluster(), retry=False)
    (line,) = Cluster(parallel=2).describe(folder, [fourth])
    assert line.endswith("an array of 1 jobs, at most 2 at a time, each 60 minutes, 1 CPU: locality seed 1")
    slurm.acts = [lambda: finish(folder, slurm, fourth)]
    assert run_missing(folder, cluster=Cluster()) == {}
    assert ids(folder)[fourth.key] == "101"
    assert "--array" not in slurm.scripts()[1]


def test_a_refusal_is_told_and_leaves_no_jobs(folder, slurm):
    (slurm.folder / "refusal").write_text("sbatch: error: invalid partition\nspecified: nowhere\n")
    with pytest.raises(ConfigError, match=r"slurm refuses 4 jobs .60 minutes.*invalid partition specified"):
        run_missing(folder, cluster=Cluster(resources=Resources(partition="nowhere")))
    assert not (folder.path / "jobs/jobs.json").exists()


def test_other_resources_are_the_same_study(folder, tmp_path):
    with folder.claim():
        pass
    arms = [dataclasses.replace(arm, resources={"minutes": 5}) for arm in folder.study.arms]
    StudyFolder(folder.path, dataclasses.replace(folder.study, arms=tuple(arms)))
    assert [run.key for run in folder.study.runs()] == [
        run.key for run in dataclasses.replace(folder.study, arms=tuple(arms)).runs()
    ]


def test_a_task_trains_on_after_sigterm_and_makes_room_on_sigusr2(tiny, tmp_path, monkeypatch):
    asked = []

    def stopped(config, folder):
        asked.append((signal.SIGTERM, signal.SIGUSR2)[len(asked)])
        signal.raise_signal(asked[-1])
        assert stop_requested()
        raise TrainingInterrupted("the state is saved")

    def requeue(number, frame):
        raise SystemExit(-1)

    monkeypatch.setattr(cluster_module, "perform", stopped)
    before = signal.signal(signal.SIGUSR2, requeue)
    try:
        task = Task(tiny, tmp_path, 1)
        with pytest.raises(SystemExit):
            task()
        assert signal.getsignal(signal.SIGUSR2) is requeue
    finally:
        signal.signal(signal.SIGUSR2, before)
    assert asked == [signal.SIGTERM, signal.SIGUSR2]
    assert task.checkpoint().function is task
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(("error", "noted"), [(TrainingFailed("nan"), True), (FolderInUse("other"), False)])
def test_a_task_notes_failures_but_not_that_another_is_at_it(error, noted, tiny, tmp_path, monkeypatch):
    def fail(config, folder):
        raise error

    monkeypatch.setattr(cluster_module, "perform", fail)
    with pytest.raises(type(error)):
        Task(tiny, tmp_path, 1)()
    assert (tmp_path / "failure.json").exists() == noted


@pytest.mark.filterwarnings("ignore:subprocess:ResourceWarning")  # jobs are meant to outlive their submission
@pytest.mark.slow
def test_jobs_that_fail_are_preempted_and_killed(tiny, tmp_path, monkeypatch):
    """The first run fails at once, the second is requeued by a signal and then killed; both end well."""
    base = dataclasses.replace(tiny, epochs=30, save_seconds=0.0)
    folder = StudyFolder(tmp_path / "out", dataclasses.replace(demo_study(base, 2, None), seeds=(0,)))
    first, second = folder.study.runs()
    folder.of(first).mkdir(parents=True)
    (folder.of(first) / "metrics.jsonl").write_text("of something else")
    history, lines = folder.of(second) / "metrics.jsonl", []

    def disturb(seconds):
        monkeypatch.setattr(cluster_module, "sleep", time.sleep)
        job = ids(folder)[second.key]
        log = folder.path / f"jobs/{job}_0_log.out"
        wait_for(lambda: epochs(history) >= 3)
        os.kill(task_of(job), signal.SIGUSR2)
        wait_for(lambda: log.read_text().count(f"localvit: run {second.key}") == 2)
        lines.extend(history.read_text().splitlines())
        wait_for(lambda: epochs(history) > len(lines))
        for process in (int(job), task_of(job)):
            os.kill(process, signal.SIGKILL)

    monkeypatch.setattr(cluster_module, "sleep", disturb)
    failures = run_missing(folder, cluster=Cluster(kind="local"))
    assert "already holds a run" in failures[first]
    assert "ended before the run did" in failures[second]
    assert folder.outcome(second).state == "begun"
    jobs = ids(folder)

    assert run_missing(folder, cluster=Cluster(kind="local"), retry=True) == {}
    assert all(ids(folder)[run.key] != jobs[run.key] for run in (first, second))
    after = history.read_text().splitlines()
    assert after[: len(lines)] == lines  # with their times: these epochs were not trained again
    assert [json.loads(line)["epoch"] for line in after] == list(range(1, 31))
    jobs = ids(folder)
    assert run_missing(folder, cluster=Cluster(kind="local")) == {}
    assert ids(folder) == jobs


def epochs(history):
    return len(history.read_text().splitlines()) if history.exists() else 0


def task_of(controller):
    (child,) = Path(f"/proc/{controller}/task/{controller}/children").read_text().split()
    return int(child)


def wait_for(condition, seconds=300.0):
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "it did not happen"
        time.sleep(0.05)
