"""A directory is opened once: what is there is read once, judged, and left alone if it is refused."""

import json
import shutil
from collections import Counter
from pathlib import Path

import pytest

from localvit.config import resolve
from localvit.errors import ConfigError
from localvit.runs import RunStatus, directory as directories, read_run, saved
from localvit.runs.directory import RunDirectory
from localvit.runs.saved import SavedRun
from localvit.training.loop import train
from tests.training.conftest import TINY
from tests.training.runs import stop_after

OLD = Path(__file__).parents[1] / "fixtures" / "v0_3" / "run"


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """A finished run."""
    folder = tmp_path_factory.mktemp("finished") / "run"
    train(resolve("digits", [*TINY, "save_seconds=0", f"output={folder}"]))
    return folder


@pytest.fixture(scope="module")
def stopped(tmp_path_factory):
    """A run that was stopped in its second epoch."""
    folder = tmp_path_factory.mktemp("stopped") / "run"
    config = resolve("digits", [*TINY, "save_seconds=0", f"output={folder}"])
    stop_after(pytest.MonkeyPatch(), config, 11)
    return folder


@pytest.fixture
def copy(tmp_path):
    """A function that copies a run and returns its folder and the configuration that resumes it."""

    def make(source):
        folder = tmp_path / "run"
        shutil.copytree(source, folder)
        return folder, resolve("digits", [*TINY, "save_seconds=0", f"output={folder}"])

    return make


@pytest.fixture
def parsed(monkeypatch):
    """Counts of the files that are parsed."""
    counts = Counter()

    def count(module, name, file):
        real = getattr(module, name)

        def counted(*arguments, **options):
            counts[file] += 1
            return real(*arguments, **options)

        monkeypatch.setattr(module, name, counted)

    count(saved, "read_config", "config.yaml")
    count(RunStatus, "read", "status.json")
    count(directories, "read_newest", "state")
    return counts


def contents(folder):
    return {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def decision(config, **options):
    with RunDirectory.open(config, **options) as opened:
        return opened.decision


def test_each_state_of_a_directory_has_its_decision_and_opening_writes_nothing(
    tiny, tmp_path, finished, stopped
):
    new = decision(tiny(f"output={tmp_path / 'a' / 'run'}"))
    assert (new.kind, new.state, list(tmp_path.iterdir())) == ("new", None, [])
    for folder, kind in ((finished, "finished"), (stopped, "resume")):
        before = contents(folder)
        found = decision(resolve("digits", [*TINY, "save_seconds=0", f"output={folder}"]))
        assert found.kind == kind
        assert contents(folder) == before
    assert (found.state["epoch"], found.state["samples"]) == (1, 3 * 128)


def test_a_resume_parses_each_file_once(stopped, copy, parsed):
    _, config = copy(stopped)
    train(config)
    assert parsed == {"config.yaml": 1, "status.json": 1, "state": 1}


def test_a_finished_run_parses_each_file_once_and_no_state(finished, copy, parsed):
    _, config = copy(finished)
    train(config)
    assert parsed == {"config.yaml": 1, "status.json": 1}


def spoil(folder, file):
    """Return ways to damage a file."""
    whole = (folder / file).read_bytes()
    return {"empty": b"", "cut": whole[: len(whole) // 2], "noise": b"\x80\xff{" + whole, "list": b"[1]\n"}


@pytest.mark.parametrize("damage", ["empty", "cut", "noise", "list"])
@pytest.mark.parametrize(
    "file", ["status.json", "config.yaml", "metrics.jsonl", "best/config.json", "best/model.safetensors"]
)
def test_a_damaged_file_of_a_finished_run_is_named_and_nothing_is_trained(finished, copy, file, damage):
    folder, config = copy(finished)
    (folder / file).write_bytes(spoil(folder, file)[damage])
    before = contents(folder)
    with pytest.raises(ConfigError) as caught:
        train(config)
    assert str(folder / file) in str(caught.value)
    assert "\n" not in str(caught.value)
    assert contents(folder) == before


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"state": "done"}, "state"),
        ({"state": None}, "state"),
        ({"best": None}, "'finished', but best or test is missing"),
        ({"test": {"top1": 1.0}}, "status.json' is damaged"),
        ({"epochs_done": 1}, r"metrics\.jsonl' is damaged: epochs \[1, 2\] of 1"),
        ({"epochs_done": "2"}, "epochs_done"),
        ({"speed": 1}, "speed"),
        ({"state": "running"}, "has 2 epochs, but .*state' has no state to resume from"),
        ({"state": "interrupted"}, "has 2 epochs, but .*state' has no state to resume from"),
    ],
)
def test_a_status_that_cannot_be_is_refused(finished, copy, change, message):
    folder, config = copy(finished)
    status = json.loads((folder / "status.json").read_text()) | change
    (folder / "status.json").write_text(json.dumps(status))
    before = contents(folder)
    with pytest.raises(ConfigError, match=message):
        train(config)
    assert contents(folder) == before


@pytest.mark.parametrize("name", ["epoch", "seconds", "images_per_second"])
@pytest.mark.parametrize("value", [None, "fast", [], "missing"])
def test_an_epoch_without_its_numbers_is_refused(finished, copy, name, value):
    folder, config = copy(finished)
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    lines[1][name] = value
    if value == "missing":
        del lines[1][name]
    (folder / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    with pytest.raises(ConfigError, match=rf"metrics\.jsonl' is damaged: .*{name}"):
        train(config)


@pytest.mark.parametrize("damage", ["empty", "cut", "noise", "list"])
@pytest.mark.parametrize("file", ["status.json", "config.yaml"])
def test_a_damaged_file_of_a_stopped_run_is_named(stopped, copy, file, damage):
    folder, config = copy(stopped)
    (folder / file).write_bytes(spoil(folder, file)[damage])
    before = contents(folder)
    with pytest.raises(ConfigError, match=file) as caught:
        train(config)
    assert "\n" not in str(caught.value)
    assert contents(folder) == before


def test_a_run_of_an_older_version_is_read_and_not_resumed(stopped, copy):
    old = read_run(OLD)
    assert (old.status.state, old.status.versions["localvit"], old.status.epochs_done) == (
        "finished",
        "0.3.2",
        2,
    )
    assert (old.config.epochs, len(old.history), old.best) == (2, 2, OLD / "best")
    folder, config = copy(stopped)
    status = json.loads((folder / "status.json").read_text())
    status["versions"]["localvit"] = "0.3.2"
    (folder / "status.json").write_text(json.dumps(status))
    before = contents(folder)
    with pytest.raises(ConfigError) as caught:
        train(config, allow_change=["versions"])
    assert str(caught.value).startswith(
        f"output={str(folder)!r} holds an unfinished run of localvit 0.3.2, which 0."
    )
    assert str(caught.value).endswith("finish it with localvit 0.3.2, or choose another folder")
    assert contents(folder) == before


def test_a_status_is_written_as_it_was_read():
    text = (OLD / "status.json").read_text()
    assert RunStatus.read(OLD).to_json() == text
    failed = RunStatus(state="failed", error="it broke", failed_batch=("a.png",))
    values = json.loads(failed.to_json())
    assert (values["error"], values["failed_batch"]) == ("it broke", ["a.png"])


def test_a_reader_reads_what_it_is_asked_for(tmp_path, finished, monkeypatch, parsed):
    run = read_run(finished)
    assert run.status.state == run.status.state == "finished"
    assert parsed == {"status.json": 1}
    assert SavedRun(tmp_path / "nowhere").status is None


def test_an_empty_name_is_refused(tiny, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ConfigError, match="output='' is not accepted; name a folder"):
        train(tiny("output=''"))
    assert not list(tmp_path.iterdir())


def test_the_folder_of_a_study_is_refused(tiny, tmp_path):
    (tmp_path / "study.json").write_text("{}")
    with pytest.raises(ConfigError, match=r"already holds a study \(study.json\); choose another folder"):
        train(tiny(f"output={tmp_path}"))
    assert [path.name for path in tmp_path.iterdir()] == ["study.json"]


def test_a_configuration_of_another_project_is_named(tiny, tmp_path):
    (tmp_path / "config.yaml").write_text("theme: dark\noutput: site\n")
    with pytest.raises(ConfigError, match=r"config\.yaml': theme: this field does not exist"):
        train(tiny(f"output={tmp_path}"))
    assert [path.name for path in tmp_path.iterdir()] == ["config.yaml"]


def test_numbers_that_json_lacks_become_null(tiny, tmp_path):
    with RunDirectory.open(tiny(f"output={tmp_path / 'run'}")) as opened:
        opened.claim("data")
        opened.begin(history=[{"epoch": 1, "validation_loss": float("nan"), "lr": float("inf")}])
    line = (tmp_path / "run" / "metrics.jsonl").read_text()
    assert json.loads(line) == {"epoch": 1, "validation_loss": None, "lr": None}
