"""Files that an older version wrote are still read (tests/fixtures/v0_3/README.md says which and how)."""

import json
import shutil
from pathlib import Path

import pytest

from localvit.cli import main

FIXTURES = Path(__file__).parent / "fixtures" / "v0_3"


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """A copy of the files, as the working directory."""
    copy = tmp_path / "v0_3"
    shutil.copytree(FIXTURES, copy)
    monkeypatch.chdir(copy)
    return copy


def run(*arguments: str) -> int:
    """Run the command line and return its exit code."""
    try:
        return int(main(list(arguments)) or 0)
    except SystemExit as end:
        return int(end.code or 0) if not isinstance(end.code, str) else 2


def test_a_run_is_evaluated(folder):
    assert run("evaluate", "--checkpoint", "run", "--device", "cpu", "--output", "now.json") == 0
    then = json.loads((folder / "run" / "status.json").read_text())["test"]
    now = json.loads((folder / "now.json").read_text())["metrics"]
    assert now["top1"] == then["top1"]
    assert now["images"] == then["images"]
    assert now["loss"] == pytest.approx(then["loss"], rel=1e-4)


def test_a_run_predicts(folder, capsys):
    assert (
        run("predict", "--checkpoint", "run", "--device", "cpu", "images/dark", "--output", "found.csv") == 0
    )
    rows = (folder / "found.csv").read_text().splitlines()
    assert len(rows) == 1 + 12 * 2  # two classes each
    assert all("dark" in row or "bright" in row for row in rows[1:])


def test_a_run_is_exported_and_the_file_predicts(folder):
    assert run("export", "run", "--format", "torch", "--output", "new.pt2") == 0
    answers = []
    for name in ("model.pt2", "new.pt2"):
        output = f"{name}.csv"
        options = ("--checkpoint", name, "--engine", "torch", "--device", "cpu", "--output", output)
        assert run("predict", *options, "images/bright") == 0
        answers.append([row.split(",")[:3] for row in (folder / output).read_text().splitlines()])
    assert answers[0] == answers[1]
    assert len(answers[0]) == 1 + 12 * 2


def test_the_same_training_is_finished(folder, capsys):
    tiny = ("embed_dim=16", "depth=2", "num_heads=2")
    settings = [f"model.args.{each}" for each in tiny]
    settings += ["epochs=2", "batch_size=4", "schedule.warmup_epochs=0"]
    options = [word for each in settings for word in ("--set", each)]
    before = (folder / "run" / "status.json").read_bytes()
    recipe = ("--recipe", "digits", "--data", "images", "--locality", "default", "--device", "cpu")
    assert run("train", *recipe, *options, "--output", "run") == 0
    out = capsys.readouterr().out
    assert "finished" in out
    assert "its data could not be compared: the run is of localvit 0.3" in out
    assert (folder / "run" / "status.json").read_bytes() == before


def test_a_study_is_reported_compared_and_exported(folder, capsys):
    assert run("study", "report", "study") == 0
    assert "local" in (folder / "study" / "report.html").read_text()
    assert run("study", "compare", "study", "study") == 0
    capsys.readouterr()
    assert run("study", "export", "study", "--format", "csv") == 0
    assert len(capsys.readouterr().out.strip().splitlines()) == 1 + 4
