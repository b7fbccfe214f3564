"""Runs and their records: nothing lost, doubled or mixed up, whatever happens."""

import dataclasses
import json
import os
import signal
import subprocess
import sys
import time
from functools import partial

import pytest
from rich.console import Console

from localvit.bench.host import machine
from localvit.config.files import resolve
from localvit.errors import ConfigError, TrainingFailed
from localvit.runs.lock import locked
from localvit.studies.demo import demo_study
from localvit.studies.design.checks import check_study
from localvit.studies.execution import run as run_module
from localvit.studies.execution.folder import StudyFolder
from localvit.studies.execution.forecasting import forecast
from localvit.studies.execution.run import run_missing

pytestmark = pytest.mark.usefixtures("in_this_process")
worker = run_module._worker  # which that fixture replaces


@pytest.fixture
def performed(monkeypatch):
    """Seeds and arms of the runs that were really done."""
    done = []
    real = run_module.perform

    def perform(config, path):
        done.append((config.model.locality is not None, config.seed))
        return real(config, path)

    monkeypatch.setattr(run_module, "perform", perform)
    return done


def test_every_run_leaves_a_record_and_is_done_once(folder, performed):
    assert run_missing(folder) == {}
    records = folder.finished()
    assert [(run.arm, run.seed) for run in records] == [(run.arm, run.seed) for run in folder.study.runs()]
    for run, record in records.items():
        assert record.key == run.key
        assert record.config["seed"] == run.seed
        assert len(record.history) == 1
        assert record.test.images == 5
        assert record.macs > 0
    rows = [json.loads(line) for line in (folder.path / "results.jsonl").read_text().splitlines()]
    assert [(row["arm"], row["seed"], row["key"]) for row in rows] == [
        (run.arm, run.seed, run.key) for run in records
    ]
    assert run_missing(folder) == {}
    assert len(performed) == 4


def test_more_seeds_keep_what_is_there(folder, performed, tiny):
    run_missing(folder)
    run_missing(StudyFolder(folder.path, demo_study(tiny, 3, None)))
    assert performed[4:] == [(False, 2), (True, 2)]


def test_an_interrupted_run_is_done_again_and_the_others_stay(folder, performed, monkeypatch):
    run_missing(folder)
    third = folder.study.runs()[2]
    (folder.of(third) / "record.json").unlink()  # killed just before the end
    run_missing(folder)
    assert performed[4:] == [(False, 1)]
    assert len(folder.finished()) == 4


def test_a_failed_run_is_named_and_retried(folder, monkeypatch):
    real = run_module.perform

    def perform(config, path):
        if config.seed == 1 and config.model.locality is None:
            raise TrainingFailed("the training loss became nan")
        return real(config, path)

    monkeypatch.setattr(run_module, "perform", perform)
    failures = run_missing(folder)
    assert {(r.arm, r.seed): why for r, why in failures.items()} == {
        ("baseline", 1): "the training loss became nan"
    }
    assert len(folder.finished()) == 3
    monkeypatch.setattr(run_module, "perform", real)
    assert run_missing(folder) == {}
    assert len(folder.finished()) == 4


def test_an_interrupt_leaves_the_results_so_far(folder, monkeypatch):
    real = run_module.perform

    def perform(config, path):
        if config.seed == 1:
            raise KeyboardInterrupt
        return real(config, path)

    monkeypatch.setattr(run_module, "perform", perform)
    with pytest.raises(KeyboardInterrupt):
        run_missing(folder)
    assert len((folder.path / "results.jsonl").read_text().splitlines()) == 2


def test_another_study_is_refused_and_left_alone(folder, tiny):
    run_missing(folder)
    before = (folder.path / "study.json").read_text()
    other = demo_study(dataclasses.replace(tiny, epochs=2), 2, None)
    with pytest.raises(ConfigError, match=r"another study: base.epochs is 1 there and 2 here"):
        StudyFolder(folder.path, other)
    assert (folder.path / "study.json").read_text() == before


@pytest.mark.parametrize("file", ["runs", "results.jsonl", "config.yaml", "status.json"])
def test_a_folder_of_something_else_is_refused(study, tmp_path, file):
    """Such as a study without its file, or a run."""
    (tmp_path / file).mkdir()
    with pytest.raises(ConfigError, match=rf"holds {file} but no study\.json"):
        StudyFolder(tmp_path, study)


def test_a_file_is_not_a_folder(study, tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(ConfigError, match=r"output='.*file' is not a folder; choose another name"):
        StudyFolder(tmp_path / "file", study)


@pytest.mark.parametrize("call", [run_missing, lambda *words, **kwords: forecast(*words, None, 1, **kwords)])
def test_only_a_study_is_reused(folder, tmp_path, call):
    with pytest.raises(ConfigError, match=r"nothing/study\.json' does not exist; choose the folder"):
        call(folder, reuse=[tmp_path / "nothing"])


def test_a_forecast_counts_what_is_reused(folder, tmp_path):
    run_missing(folder)
    other, summary = StudyFolder(tmp_path / "other", folder.study), check_study(folder.study)
    assert "4 of 4 runs to do" in forecast(other, summary, 1)[-1]
    assert "0 of 4 runs to do" in forecast(other, summary, 1, reuse=[folder.path])[-1]
    assert not other.path.exists()


@pytest.mark.parametrize("text", [b"", b"[]", b"{}", b'{"config": {"epochz": 3}}', b"\x80{", b"[" * 9000])
@pytest.mark.parametrize("file", ["record.json", "failure.json", "study.json"])
def test_a_damaged_file_is_named(folder, file, text):
    path = folder.path if file == "study.json" else folder.of(folder.study.runs()[0])
    path.mkdir(parents=True)
    (path / file).write_bytes(text)
    read = partial(StudyFolder, folder.path, folder.study) if file == "study.json" else folder.finished
    with pytest.raises(ConfigError, match=rf"^.*{file}'.*; (delete|restore) .*") as caught:
        read()
    assert "\n" not in str(caught.value)


def test_a_record_of_another_configuration_is_not_mixed_in(folder):
    run_missing(folder)
    first, _, third, _ = folder.study.runs()
    text = (folder.of(first) / "record.json").read_text()
    (folder.of(third) / "record.json").write_text(text)
    with pytest.raises(ConfigError, match="does not belong to baseline seed"):
        folder.finished()


def test_a_record_changed_by_hand_is_refused(folder):
    run_missing(folder)
    path = folder.of(folder.study.runs()[0]) / "record.json"
    path.write_text(path.read_text().replace('"epochs": 1,', '"epochs": 2,'))
    with pytest.raises(ConfigError, match="does not belong to baseline seed"):
        folder.finished()


def test_two_processes_do_not_work_in_one_folder(folder):
    folder.path.mkdir()
    with locked(folder.path), pytest.raises(ConfigError, match="another process is working there"):
        run_missing(folder)


def test_a_study_that_another_process_has_just_written_is_left_alone(folder, tiny):
    with StudyFolder(folder.path, demo_study(dataclasses.replace(tiny, epochs=2), 2, None)).claim():
        pass
    written = (folder.path / "study.json").read_bytes()
    with pytest.raises(ConfigError, match=r"holds another study: base\.epochs is 2 there and 1 here"):
        run_missing(folder)
    assert (folder.path / "study.json").read_bytes() == written


def test_what_cannot_work_fails_before_anything_is_written(tiny, tmp_path):
    wrong = dataclasses.replace(tiny, model=dataclasses.replace(tiny.model, args={"img_size": 8}))
    folder = StudyFolder(tmp_path / "out", demo_study(wrong, 2, None))
    with pytest.raises(ConfigError):
        run_missing(folder)
    assert not (tmp_path / "out").exists()


def test_progress_is_a_line_for_each_run(folder):
    with open(os.devnull, "w") as file:
        console = Console(file=file, record=True, width=120)
        run_missing(folder, console=console)
        for run in folder.study.runs()[:2]:
            (folder.of(run) / "record.json").unlink()
        run_missing(folder, console=console)
    text = console.export_text()
    assert text.count("/4  locality seed") == 3
    assert "  4/4  " in text
    assert "2 of 4 runs already exist" in text


def test_machine_in_words():
    assert ", 1 thread" in machine(1)
    assert ", 2 threads" in machine(2)


KILLED = """
import sys
from pathlib import Path
from localvit.studies.demo import demo_study
from localvit.studies.execution.folder import StudyFolder
from localvit.studies.execution.forecasting import forecast
from localvit.studies.execution.run import run_missing
from localvit.config import resolve
if __name__ == "__main__":
    study = demo_study(resolve("digits", {settings!r}), 2, None)
    run_missing(StudyFolder(Path(sys.argv[1]), study), jobs=1)
"""


@pytest.mark.parametrize("value", ["one", "two", None])
def test_a_worker_has_the_environment_of_its_start(monkeypatch, value):
    """Also a later one, whose server is older."""
    monkeypatch.delenv("LOCALVIT_TEST", raising=False)
    if value is not None:
        monkeypatch.setenv("LOCALVIT_TEST", value)
    with worker(0, 1) as started:
        assert started.submit(os.getenv, "LOCALVIT_TEST").result() == value


def test_workers_end_with_a_killed_parent(tmp_path, settings):
    settings = (*settings, "epochs=100000")
    script, out = tmp_path / "script.py", tmp_path / "out"
    script.write_text(KILLED.format(settings=settings))
    study = demo_study(resolve("digits", settings), 2, None)
    history = StudyFolder(out, study).of(study.runs()[0]) / "metrics.jsonl"
    with subprocess.Popen([sys.executable, script, out], stderr=subprocess.DEVNULL) as parent:
        try:
            wait_for(history.exists)
        finally:
            parent.send_signal(signal.SIGKILL)
    # The worker still adds a line every few milliseconds unless it has ended too.
    wait_for(lambda: standing_still(history))
    assert StudyFolder(out, study).finished() == {}


def standing_still(path, seconds=1.0):
    size = path.stat().st_size
    time.sleep(seconds)
    return path.stat().st_size == size


def wait_for(condition, seconds=300.0):
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "it did not happen"
        time.sleep(0.05)
