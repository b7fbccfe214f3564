"""Runs on a cluster from the command line: what is refused, and what would be submitted."""

import re
import shlex
import sys

import pytest

from localvit.cli import main
from localvit.cli.arguments import command_line, parse
from localvit.cli.study import Options
from tests.studies.tiny import SETTINGS, make_images

QUESTION = """
question: Does locality help?
control: plain
arms:
  local: {model.locality: {}, resources: {minutes: 600}}
scales:
  tiny: {recipe: digits}
"""
FLAGS = [word for setting in SETTINGS for word in ("--set", setting)]


@pytest.fixture
def words(tmp_path, monkeypatch):
    """A study's command but for its options on the cluster, in a folder that it must leave as it was."""
    (tmp_path / "images").mkdir()
    make_images(tmp_path / "images")
    (tmp_path / "mine.yaml").write_text(QUESTION)
    monkeypatch.chdir(tmp_path)
    given = ["mine.yaml", "--scale", "tiny", "--data", "images", "--output", "out", "--seeds", "2"]
    return ["study", "run", *given, *FLAGS]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--cluster", "slurm"), "'sbatch' is missing"),
        (("--cluster", "pbs"), "--cluster"),
        (("--cluster", "local", "--minutes", "0"), "minutes=0 is not accepted; use at least 1"),
        (("--cluster", "local", "--cpus", "0"), "cpus=0 is not accepted; use at least 1"),
        (("--cluster", "local", "--gpus", "2"), "use 0 or 1"),
        (("--cluster", "local", "--memory", "0"), "memory=0.0 is not accepted"),
        (("--cluster", "local", "--threads", "2"), "arm 'plain': threads=2 exceed cpus=1"),
        (("--cluster", "local", "--jobs", "3"), "parallel=3 is not accepted for local jobs"),
        (("--partition", "gpu"), "--partition has no effect without --cluster"),
    ],
)
def test_wrong_use_is_one_line_and_writes_nothing(arguments, message, words, tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("PATH", str(tmp_path))
    assert main([*words, *arguments]) == 2
    error = capsys.readouterr().err
    assert message in error
    assert error.count("\n") == 1
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("own", "message"),
    [
        ("{minuts: 3}", r"arms\.local\.resources\.minuts: .*did you mean"),
        ("{gpus: -1}", r"arms\.local\.resources: gpus=-1 is not accepted; use at least 0"),
        ("{minutes: long}", r"arms\.local\.resources\.minutes: 'long' is not"),
        ("3", r"arms\.local\.resources: 3 is not accepted; use a mapping"),
    ],
)
def test_wrong_resources_of_an_arm_are_named(own, message, words, tmp_path, capsys):
    (tmp_path / "mine.yaml").write_text(QUESTION.replace("{minutes: 600}", own))
    assert main(words) == 2
    error = capsys.readouterr().err
    assert re.search(message, error)
    assert error.count("\n") == 1
    assert not (tmp_path / "out").exists()


def test_without_submitit_the_extra_is_named(words, tmp_path, monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "submitit", None)
    assert main([*words, "--cluster", "local"]) == 2
    assert capsys.readouterr().err == ("localvit: submitit is missing; run pip install 'localvit[cluster]'\n")
    assert not (tmp_path / "out").exists()


def test_a_dry_run_says_what_would_be_submitted(words, tmp_path, capsys):
    assert main([*words, "--cluster", "local", "--memory", "1.5", "--dry-run"]) == 0
    text = capsys.readouterr().out
    each = "an array of 2 jobs, each"
    assert f"local: {each} 60 minutes, 1 CPU, 1.5 GB: plain seed 0, plain seed 1\n" in text
    assert f"local: {each} 600 minutes, 1 CPU, 1.5 GB: local seed 0, local seed 1\n" in text
    assert not (tmp_path / "out").exists()


def test_the_command_in_the_report_asks_for_the_same():
    line = "run gate --cluster slurm --gpus 1 --memory 2.5 --setup 'module load a' --setup b --jobs 9"
    options = parse(Options, "localvit study", shlex.split(line))
    words = shlex.split(command_line(("study", "run"), options))
    assert parse(Options, "localvit study", words[2:]) == options
