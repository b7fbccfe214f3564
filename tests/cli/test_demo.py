"""The demo from the command line: what it prints and writes, what it refuses, how it is interrupted."""

import importlib.util
import json
import shlex
import signal
import subprocess
import sys
import time

import pytest

from localvit.cli import main
from localvit.cli.arguments import command_line, parse
from localvit.cli.demo import Options, _default_output
from localvit.studies.execution import run as run_module, tuning as tuning_module
from tests.studies.tiny import SETTINGS, make_images, worker_here

FLAGS = [word for setting in SETTINGS for word in ("--set", setting)]


@pytest.fixture
def images(tmp_path):
    (tmp_path / "images").mkdir()
    return str(make_images(tmp_path / "images"))


def demo(*arguments):
    return main(["demo", "--recipe", "digits", *FLAGS, *map(str, arguments)])


def test_demo_in_worker_processes(images, tmp_path, capsys):
    out = tmp_path / "out"
    assert demo("--data", images, "--seeds", 2, "--output", out) == 0
    text = capsys.readouterr().out
    for words in ("baseline", "locality", "difference", "2 seeds", "report.html"):
        assert words in text
    records = {path: path.stat().st_mtime_ns for path in out.glob("runs/*/record.json")}
    assert len(records) == 4
    assert demo("--data", images, "--seeds", 2, "--output", out) == 0
    assert {path: path.stat().st_mtime_ns for path in out.glob("runs/*/record.json")} == records
    summary = json.loads((out / "summary.json").read_text())
    assert main(shlex.split(summary["command"])[1:]) == 0


def test_a_full_disk_is_one_line(images, tmp_path, capsys, full_disk):
    with full_disk(500):
        assert demo("--data", images, "--seeds", 2, "--output", tmp_path / "out") == 1
    assert "study.json': File too large; make room and try again\n" in capsys.readouterr().err


def test_own_tuning_is_used(images, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(run_module, "_worker", worker_here)
    monkeypatch.setattr(tuning_module, "MOST_EXTENSIONS", 0)
    out = tmp_path / "out"
    data = ("--data", images, "--output", out)
    assert demo(*data, "--tune", "--tune-seeds", 1, "--tune-factors", 1, 2) == 0
    assert "An asterisk marks the chosen rate" in capsys.readouterr().out
    chosen = json.loads((out / "tuning" / "tuning.json").read_text())["chosen"]
    assert demo(*data, "--seeds", 2) == 0
    arms = json.loads((out / "study.json").read_text())["arms"]
    assert {name: arm["changes"]["optim.lr"] for name, arm in arms.items()} == chosen
    assert "--tune-factors 1.0 2.0" in (out / "report.md").read_text()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--seeds", "1"), "--seeds 1 is not accepted; use at least 2"),
        (("--jobs", "0"), "--jobs 0 is not accepted; use at least 1"),
        (("--tune", "--tune-seeds", "0"), "--tune-seeds 0 is not accepted; use at least 1"),
        (("--tune", "--tune-factors", "0"), "--tune-factors (0.0,) is not accepted"),
        (("--data", "nowhere"), "data source 'nowhere' does not exist"),
        (("--recipe", "digit"), "did you mean 'digits'"),
        (("--set", "epochz=3"), "did you mean"),
        (("--set", "model.args.patch_size=3"), "not divisible by the patch size"),
        (("--set", "optim.name=adamv"), "optim.name"),
        (("--seed", "3"), "--seed"),
    ],
)
def test_wrong_use_is_one_line_and_writes_nothing(arguments, message, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    assert main(["demo", *arguments]) == 2
    error = capsys.readouterr().err
    assert message in error
    assert error.count("\n") == 1
    assert list(tmp_path.iterdir()) == []


def test_missing_extra_is_one_line_with_the_command(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    real = importlib.util.find_spec
    monkeypatch.setattr(
        importlib.util, "find_spec", lambda name, *a: None if name in ("scipy", "sklearn") else real(name, *a)
    )
    assert main(["demo"]) == 2
    expected = "localvit: localvit demo needs scipy, scikit-learn; run pip install 'localvit[study]'\n"
    assert capsys.readouterr().err == expected
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    "line",
    [
        "",
        "--data 'a folder' --val-data b.tar --seeds 3",
        "--set epochs=3 --set 'model.locality={gate: eca}' --jobs 4",
        "--tune --tune-seeds 2 --tune-factors 0.5 1.0 2.0 --output x",
    ],
)
def test_the_command_in_the_report_gives_the_same_options(line):
    options = parse(Options, "localvit demo", shlex.split(line))
    words = shlex.split(command_line(("demo",), options))
    assert words[:2] == ["localvit", "demo"]
    assert parse(Options, "localvit demo", words[2:]) == options


@pytest.mark.parametrize(
    ("data", "folder"),
    [
        ("digits", "demo"),
        ("../data/cifar10-mini/train.tar", "demo/cifar10-mini-train"),
        ("torch/cifar10", "demo/torch-cifar10"),
        ("images", "demo/images"),
    ],
)
def test_each_source_has_its_folder(data, folder):
    assert _default_output(data) == folder


def test_an_interrupt_ends_it_cleanly_and_says_how_to_go_on(images, tmp_path):
    out = tmp_path / "out"
    words = ["--data", images, "--recipe", "digits", "--output", str(out), "--set", "epochs=100000"]
    with subprocess.Popen(
        [sys.executable, "-m", "localvit", "demo", *FLAGS, *words],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        # A job that a shell started in the background ignores interrupts, and its children inherit that.
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
    ) as process:
        try:
            end = time.monotonic() + 300
            while not list(out.glob("runs/*/metrics.jsonl")):
                assert time.monotonic() < end
                assert process.poll() is None
                time.sleep(0.05)
            process.send_signal(signal.SIGINT)
            stdout, stderr = process.communicate(timeout=60)
        finally:
            process.kill()  # nothing if it has ended; else leaving the block would wait for it
    assert process.returncode == 130
    assert "the same command resumes" in stdout
    assert "Traceback" not in stderr
