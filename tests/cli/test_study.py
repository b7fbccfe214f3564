"""Studies from the command line: what is printed and written, what is refused, what survives a kill."""

import csv
import io
import json
import shlex
import subprocess
import sys
import time

import pytest

from localvit.cli import main
from localvit.cli.arguments import command_line, parse
from localvit.cli.study import Options
from localvit.errors import TrainingFailed
from localvit.studies.execution import run as run_module
from tests.studies.tiny import SETTINGS, make_images, worker_here

QUESTION = """
question: Does locality help?
control: plain
arms:
  local: {model.locality: {}}
claim: {text: it does, source: a paper, expected: {local: better}}
scales:
  tiny: {recipe: digits}
"""
FLAGS = [word for setting in SETTINGS for word in ("--set", setting)]


@pytest.fixture(scope="module")
def images(tmp_path_factory):
    return str(make_images(tmp_path_factory.mktemp("images")))


@pytest.fixture
def question(tmp_path):
    path = tmp_path / "mine.yaml"
    path.write_text(QUESTION)
    return path


@pytest.fixture
def here(monkeypatch):
    monkeypatch.setattr(run_module, "_worker", worker_here)


def study(question, images, *arguments):
    words = [str(question), "--scale", "tiny", "--data", images, *FLAGS, *map(str, arguments)]
    return main(["study", "run", *words])


def records(folder):
    return {path: path.stat().st_mtime_ns for path in folder.glob("runs/*/record.json")}


def test_from_a_question_to_a_report(question, images, tmp_path, capsys, here, full_disk, full_console):
    out = tmp_path / "out"
    assert study(question, images, "--seeds", 2, "--output", out, "--dry-run") == 0
    text = capsys.readouterr().out
    assert not out.exists()
    assert "local (against plain): " in text
    assert "model.locality: None -> {}" in text
    assert "No pre-norm" in text
    assert [line.split()[2:5] for line in text.splitlines() if "MACs, 0:" in line] == [
        ["plain", "seed", "0:"],
        ["local", "seed", "0:"],
        ["plain", "seed", "1:"],
        ["local", "seed", "1:"],
    ]
    assert "4 of 4 runs to do" in text
    assert "measured here on random images" in text
    with full_disk(500):
        assert study(question, images, "--seeds", 2, "--output", out) == 1
    assert "study.json': File too large; make room and try again" in capsys.readouterr().err

    assert study(question, images, "--seeds", 2, "--output", out) == 0
    assert "report: " in capsys.readouterr().out
    before = records(out)
    assert len(before) == 4
    assert "it does" in (out / "report.md").read_text()

    assert study(question, images, "--seeds", 3, "--output", out) == 0
    after = records(out)
    assert len(after) == 6
    assert before.items() <= after.items()
    command = json.loads((out / "study.json").read_text())["command"]
    assert main(shlex.split(command)[1:]) == 0
    assert records(out) == after

    assert study(question, images, "--seeds", 4, "--output", out, "--dry-run") == 0
    text = capsys.readouterr().out
    assert "2 of 8 runs to do" in text
    assert "from the 6 runs that are done" in text
    other(question, images, tmp_path, out, capsys)
    full(out, capsys, full_disk, full_console)


def other(question, images, tmp_path, out, capsys):
    """Use the folder of a study in all ways, in the same test so that it is trained once."""
    assert main(["study", "report", str(out)]) == 0
    capsys.readouterr()
    assert main(["study", "export", str(out), "--format", "csv"]) == 0
    rows = list(csv.DictReader(io.StringIO(capsys.readouterr().out)))
    assert [(row["arm"], row["seed"]) for row in rows][:3] == [("plain", "0"), ("local", "0"), ("plain", "1")]
    assert main(["study", "export", str(out), "--format", "latex"]) == 0
    assert r"95 \% interval" in capsys.readouterr().out
    assert main(["study", "export", str(out)]) == 0
    assert "| local | " in capsys.readouterr().out

    second = tmp_path / "second"
    wider = QUESTION.replace("arms:", "arms:\n  eca: {model.locality: {gate: eca}}")
    question.write_text(wider)
    assert study(question, images, "--seeds", 2, "--output", second, "--reuse", out) == 0
    assert "4 of 6 runs already exist" in capsys.readouterr().out
    assert main(["study", "compare", str(out), str(second)]) == 0
    assert "| local | " in capsys.readouterr().out
    # The arm is new in the first folder too, and its other runs stay.
    assert study(question, images, "--seeds", 3, "--output", out) == 0
    assert "6 of 9 runs already exist" in capsys.readouterr().out


def full(out, capsys, full_disk, full_console):
    """Check the messages on a full disk and a full console, in the same test so that it is trained once."""
    before = {path: path.read_bytes() for path in out.glob("*.*")}
    with full_disk(500):
        assert main(["study", "report", str(out)]) == 1
    assert "' cannot be written: File too large; make room or name another place" in capsys.readouterr().err
    assert {path: path.read_bytes() for path in out.glob("*.*")} == before
    for words in (["report"], ["export"], ["compare", str(out)]):
        with full_console():
            assert main(["study", *words, str(out)]) == 1
        assert "the output: No space left on device; make room and try again\n" in capsys.readouterr().err


def test_a_failed_run_is_listed_and_left_until_asked(question, images, tmp_path, capsys, here, monkeypatch):
    real, tried = run_module.perform, []

    def perform(config, path):
        tried.append((config.model.locality is not None, config.seed))
        if tried.count((True, 1)) == 1 and tried[-1] == (True, 1):
            raise TrainingFailed("the loss became nan")
        return real(config, path)

    monkeypatch.setattr(run_module, "perform", perform)
    out = tmp_path / "out"
    arguments = ("--seeds", 2, "--output", out)
    assert study(question, images, *arguments) == 1
    assert "1 of 4 runs failed (local seed 1: the loss became nan); add --retry" in capsys.readouterr().err
    assert "1 of 4 runs are missing (local seed 1)" in (out / "report.md").read_text()
    assert study(question, images, *arguments) == 1
    assert len(tried) == 4
    assert study(question, images, *arguments, "--dry-run") == 0
    assert "local seed 1: " in (text := capsys.readouterr().out)
    assert "failed: the loss became nan" in text
    assert study(question, images, *arguments, "--retry") == 0
    assert tried[4:] == [(True, 1)]


@pytest.mark.slow
def test_a_killed_study_goes_on_where_it_was(question, images, tmp_path):
    out = tmp_path / "out"
    words = ["study", "run", str(question), "--scale", "tiny", "--data", images, *FLAGS]
    words += ["--output", str(out), "--seeds", "2", "--jobs", "1", "--set", "epochs=6"]
    command = [sys.executable, "-m", "localvit", *words]
    with subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL) as process:
        wait_for(lambda: any(len(p.read_text().splitlines()) > 2 for p in out.glob("runs/*/metrics.jsonl")))
        process.kill()
    (begun,) = (path.parent for path in out.glob("runs/*/metrics.jsonl"))
    wait_for(lambda: standing_still(begun / "metrics.jsonl"))
    first = (begun / "metrics.jsonl").read_text().splitlines()[:2]
    assert main(words) == 0
    assert len(records(out)) == 4
    lines = (begun / "metrics.jsonl").read_text().splitlines()
    assert lines[:2] == first  # with their times: these epochs were not trained again
    assert [json.loads(line)["epoch"] for line in lines] == list(range(1, 7))
    assert len((out / "results.jsonl").read_text().splitlines()) == 4


def wait_for(condition, seconds=300.0):
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "it did not happen"
        time.sleep(0.05)


def standing_still(path):
    size = path.stat().st_size
    time.sleep(1.0)
    return path.stat().st_size == size


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("run", "gate", "--seeds", "1"), "--seeds 1 is not accepted; use at least 2"),
        (("run", "gate", "--output", "out", "--jobs", "0"), "--jobs 0 is not accepted; use at least 1"),
        (("run", "gates", "--output", "out"), "did you mean 'gate'"),
        (("run", "gate", "--output", "out", "--scale", "huge"), "'huge' does not exist"),
        (("run", "gate", "--output", "out", "--set", "epochz=3"), "did you mean"),
        (("run", "gate", "--output", "out", "--scale", "small"), "add --data SRC"),
        (("run", "gate", "--output", "out", "--scale", "paper"), "data source 'imagenet' does not exist"),
        (("run", "gate", "--output", "out", "--data", "nowhere"), "data source 'nowhere' does not exist"),
        (("run", "gate", "--output", "out", "--set", "batch_size=5000"), "exceeds the"),
        (("run", "gate", "--output", "out", "--match", "time"), "--match"),
        (("report", "nowhere"), "choose the folder of a study"),
        (("export", "nowhere"), "choose the folder of a study"),
        (("compare", "nowhere", "nowhere"), "choose the folder of a study"),
    ],
)
def test_wrong_use_is_one_line_and_writes_nothing(arguments, message, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    # One arm's model is enough to find these.
    small = ["--set", "model.args.depth=2"] if arguments[0] == "run" and "paper" in arguments else []
    assert main(["study", *arguments, *small]) == 2
    error = capsys.readouterr().err
    assert message in error
    assert error.count("\n") == 1
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(("arm", "message"), [("{}", "are equal"), ("{epoch: 3}", "did you mean")])
def test_arms_that_do_not_differ_or_do_not_exist_are_refused(
    arm, message, question, images, tmp_path, capsys
):
    question.write_text(QUESTION.replace("{model.locality: {}}", arm))
    assert study(question, images, "--output", tmp_path / "out") == 2
    assert message in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_list_and_show(capsys):
    assert main(["study", "list"]) == 0
    text = capsys.readouterr().out
    assert "placement " in text
    assert main(["study", "show", "kernel"]) == 0
    text = capsys.readouterr().out
    assert "first-7 (against first-3): 66,882 parameters" in text
    assert "model.locality.kernel_size: 3 -> 7" in text


def test_the_command_in_the_report_gives_the_same_options():
    line = "run gate --scale small --data 'a folder' --set epochs=3 --set optim.lr=1 --reuse a --dry-run"
    options = parse(Options, "localvit study", shlex.split(line))
    words = shlex.split(command_line(("study", "run"), options))
    assert words[:4] == ["localvit", "study", "run", "gate"]
    assert parse(Options, "localvit study", words[2:]) == options
