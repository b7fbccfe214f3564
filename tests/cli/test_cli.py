import csv
import errno
import importlib
import io
import json
import os
import shlex
import subprocess
import sys
from pathlib import Path

import pytest
from PIL import Image

from localvit.atomic import write_atomically
from localvit.cli import VERBS, main
from localvit.cli.arguments import one_line_errors, parse
from localvit.errors import Failed

TINY = [
    *("--recipe", "digits", "--epochs", "1", "--batch-size", "64", "--device", "cpu"),
    *("--set", "schedule.warmup_epochs=0", "--set", "model.args.embed_dim=16", "--set", "model.args.depth=1"),
]


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """The folder of a short run."""
    folder = tmp_path_factory.mktemp("cli") / "run"
    assert main(["train", *TINY, "--output", str(folder)]) == 0
    return folder


def one_line(capsys):
    out, err = capsys.readouterr()
    assert out == ""
    assert err.endswith("\n")
    assert err.count("\n") == 1
    return err


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["tain"], "the verb 'tain' does not exist; did you mean 'train'?"),
        (["train"], "data is missing; add --data SRC or --recipe NAME"),
        (["train", "--data", "digits"], "add --output FOLDER"),
        (["train", "--epocs", "3"], "--epocs"),
        (["train", "--epochs", "many"], "--epochs"),
        (["train", "--recipe", "digit", "--output", "X"], "did you mean 'digits'?"),
        (["train", "--recipe", "digits", "--set", "optm.lr=1", "--output", "X"], "did you mean 'optim'"),
        (
            ["train", "--recipe", "digits", "--set", "optim.lr=fast", "--output", "X"],
            "optim.lr: 'fast' is not accepted; use a number",
        ),
        (
            ["train", "--recipe", "digits", "--model", "deit_tny", "--output", "X"],
            "'deit_tny' does not exist",
        ),
        (["train", "--recipe", "digits", "--locality", "{kernel: 3}", "--output", "X"], "kernel_size"),
        (["train", "--recipe", "digits", "--locality", "{", "--output", "X"], "not YAML"),
        (["train", "--recipe", "digits", "--blocks", "[0]", "--output", "X"], "without model.locality"),
        (["train", "--data", "nowhere", "--output", "X"], "data source 'nowhere' does not exist"),
        (["evaluate"], "--checkpoint"),
        (
            ["evaluate", "--checkpoint", "nowhere/at/all", "--data", "digits"],
            "'nowhere/at/all' does not exist",
        ),
        (["evaluate", "--checkpoint", "deit_tny_patch16_224", "--data", "digits"], "did you mean"),
        (["predict", "--checkpoint", "deit_tiny_patch16_224"], "PATHS is missing"),
        (["predict", "--checkpoint", "deit_tiny_patch16_224", "nowhere.png"], "'nowhere.png' does not exist"),
        (["predict", "--checkpoint", "x", "--format", "xml", "y.png"], "--format"),
        (
            ["study", "run", "gate", "--output", ""],
            "--output '' is not accepted; name a folder, or leave it out",
        ),
        (["demo", "--output", ""], "--output '' is not accepted"),
        (["train", "--data", "digits", "--output", ""], "output='' is not accepted; name a folder"),
        (["train", "--recipe", "finetune", "--output", "X"], "'finetune' names no data; add --data"),
        (["train", "--epohcs", "3"], "unrecognized options: --epohcs, 3; did you mean --epochs?"),
        (["train", "--epochs", "three"], "--epochs three is not accepted; use an integer"),
        (["train", "--lr", "fast"], "--lr fast is not accepted; use a number"),
        (["study", "run", "gate", "--seeds", "two"], "--seeds two is not accepted; use an integer"),
        (["study", "reprot", "X"], "reprot is not accepted; use list, new, show, run, report,"),
        (["study"], "a subcommand is missing; use list, new, show, run, report, compare, export"),
        (["data", "chek", "X"], "action chek is not accepted; use 'check'"),
        (["data", "check"], "SRC is missing"),
        (["predict", "--checkpoint", "X", "--engine", "tensorrt"], "--engine tensorrt is not accepted; use"),
        (["predict", "--checkpoint", "empty", "empty"], "model 'empty' is not a file of an exported model"),
    ],
)
def test_wrong_use_is_one_line_and_exit_code_2(arguments, message, capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path("empty").touch()
    assert main(arguments) == 2
    assert message in one_line(capsys)
    assert [path.name for path in tmp_path.iterdir()] == ["empty"]


def test_help_lists_the_verbs_and_each_verb_helps(capsys):
    assert main(["--help"]) == 0
    out = capsys.readouterr().out
    assert all(verb in out for verb in VERBS)
    assert main([]) == 2


@pytest.mark.parametrize(
    "words", [[verb] for verb in VERBS] + [["study", "run"], ["study", "show"]], ids=" ".join
)
def test_help_fits_one_screen_and_ends_with_an_example_that_parses(words, capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "100")
    assert main([*words, "--help"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) <= 50
    assert max(map(len, lines)) <= 100
    example = shlex.split(lines[-1].removeprefix("Example: "))
    assert example[: 1 + len(words)] == ["localvit", *words]
    options = importlib.import_module(VERBS[words[0]][0]).Options
    assert parse(options, "localvit", example[2:]) is not None


def test_rare_options_are_below_the_others(capsys):
    assert main(["train", "--help"]) == 0
    common, rare = capsys.readouterr().out.split("\nrare options:\n")
    assert "  --epochs N            passes over the training images\n" in common
    assert "  --blocks YAML         blocks to localize" in rare
    assert "(rare)" not in rare


def test_version(capsys):
    import localvit

    assert main(["--version"]) == 0
    assert capsys.readouterr().out == f"localvit {localvit.__version__}\n"


def test_python_m_localvit():
    done = subprocess.run(
        [sys.executable, "-m", "localvit", "train", "--recipe", "digit"], capture_output=True, text=True
    )
    assert done.returncode == 2
    assert done.stdout == ""
    assert done.stderr.count("\n") == 1


def test_flags_beat_settings_and_settings_beat_the_recipe(capsys):
    import yaml

    arguments = [
        "--set",
        "epochs=7",
        "--set",
        "optim.lr=0.1",
        "--lr",
        "0.2",
        "--locality",
        "{kernel_size: 5}",
    ]
    assert main(["train", "--recipe", "digits", *arguments, "--print-config"]) == 0
    config = yaml.safe_load(capsys.readouterr().out)
    assert (config["epochs"], config["optim"]["lr"]) == (7, 0.2)
    assert config["model"]["locality"] == {"kernel_size": 5}
    assert config["model"]["args"]["img_size"] == 8


@pytest.mark.parametrize(
    ("flag", "expected"), [("default", {}), ("none", None), ("{init: preserve}", {"init": "preserve"})]
)
def test_locality_flag_replaces_that_of_the_recipe(capsys, flag, expected):
    import yaml

    arguments = ["--recipe", "digits", "--set", "model.locality={kernel_size: 5}", "--locality", flag]
    assert main(["train", *arguments, "--print-config"]) == 0
    assert yaml.safe_load(capsys.readouterr().out)["model"]["locality"] == expected


def test_a_word_that_is_no_locality(capsys):
    assert main(["train", "--recipe", "digits", "--locality", "defualt", "--print-config"]) == 2
    assert "--locality defualt is not accepted; use default, none or YAML" in one_line(capsys)


def test_train_never_overwrites(run, capsys):
    before = {p: p.read_bytes() for p in run.rglob("*") if p.is_file()}
    assert main(["train", *TINY, "--output", str(run)]) == 0
    assert "already holds this run, finished: best epoch 1" in capsys.readouterr().out
    assert main(["train", *TINY, "--seed", "1", "--output", str(run)]) == 2
    assert "already holds a finished run, which differs from this one (seed: 0 -> 1)" in one_line(capsys)
    assert {p: p.read_bytes() for p in run.rglob("*") if p.is_file()} == before


def test_train_says_what_was_held_out(tmp_path, capsys):
    assert main(["train", *TINY, "--locality", "default", "--output", str(tmp_path / "run")]) == 0
    out = capsys.readouterr().out
    assert "held out from 'digits'" in out
    assert "+ locality" in out
    assert "best epoch 1 (by validation); test on 500 images: top-1" in out


def test_a_corrupt_training_image_is_named_with_exit_code_1(tmp_path, capsys):
    for label in "ab":
        (tmp_path / "data" / label).mkdir(parents=True)
        for i in range(10):
            Image.new("L", (8, 8), i).save(tmp_path / "data" / label / f"{i}.png")
            (tmp_path / "data" / label / f"{i}.png").write_bytes(b"broken")
    arguments = [*TINY, "--batch-size", "4", "--data", str(tmp_path / "data")]
    assert main(["train", *arguments, "--output", str(tmp_path / "run")]) == 1
    err = capsys.readouterr().err
    assert err.count("\n") == 1
    assert "cannot read image" in err
    assert json.loads((tmp_path / "run" / "status.json").read_text())["state"] == "failed"


def test_evaluate_agrees_with_the_report_of_the_run(run, tmp_path, capsys):
    reported = json.loads((run / "status.json").read_text())["test"]
    output = tmp_path / "result.json"
    for data in ([], ["--data", "digits"]):
        assert main(["evaluate", "--checkpoint", str(run), *data, "--output", str(output)]) == 0
        metrics = json.loads(output.read_text())["metrics"]
        for name in ("loss", "top1", "top5", "images"):
            assert metrics[name] == pytest.approx(reported[name])
        output.unlink()
    assert "top-1" in capsys.readouterr().out


def test_evaluate_refuses_the_images_that_were_learned_from(tmp_path, capsys):
    for label in "ab":
        (tmp_path / "data" / label).mkdir(parents=True)
        for i in range(20):
            Image.new("L", (8, 8), i).save(tmp_path / "data" / label / f"{i}.png")
    data = str(tmp_path / "data")
    arguments = [*TINY, "--batch-size", "4", "--data", data, "--output", str(tmp_path / "run")]
    assert main(["train", *arguments]) == 0
    assert main(["evaluate", "--checkpoint", str(tmp_path / "run")]) == 0  # its own held-out part
    capsys.readouterr()
    assert main(["evaluate", "--checkpoint", str(tmp_path / "run"), "--data", data]) == 2
    assert "was trained on" in one_line(capsys)


def test_evaluate_does_not_overwrite(run, tmp_path, capsys):
    (tmp_path / "old.json").write_text("old")
    arguments = ["evaluate", "--checkpoint", str(run), "--output", str(tmp_path / "old.json")]
    assert main(arguments) == 2
    assert "the file exists" in one_line(capsys)
    assert (tmp_path / "old.json").read_text() == "old"


@pytest.fixture
def images(tmp_path):
    """Four images in a folder, the third of them broken."""
    folder = tmp_path / "images"
    folder.mkdir()
    for i in range(4):
        Image.new("RGB", (20, 12), (50 * i, 0, 0)).save(folder / f"{i}.png")
    (folder / "2.png").write_bytes(b"broken")
    (folder / "notes.txt").write_text("no image")
    return folder


def test_predict_names_a_broken_file_and_does_the_others(run, images, capsys):
    assert main(["predict", "--checkpoint", str(run / "best"), str(images), "--format", "json"]) == 0
    out, err = capsys.readouterr()
    found = json.loads(out)
    assert [p["path"] for p in found] == [str(images / f"{i}.png") for i in range(4)]
    assert [len(p["guesses"]) for p in found] == [5, 5, 0, 5]
    assert sum(g["probability"] for g in found[0]["guesses"]) <= 1.0001
    assert found[0]["guesses"][0]["label"] in "0123456789"
    assert str(images / "2.png") in err
    assert "1 of 4 files have no prediction" in err


def test_predict_as_csv_and_table(run, images, tmp_path, capsys):
    output = tmp_path / "found.csv"
    files = [str(images / "0.png"), str(images / "2.png")]
    arguments = ["--format", "csv", "--top-k", "2", "--output", str(output)]
    assert main(["predict", "--checkpoint", str(run), *arguments, *files]) == 0
    rows = list(csv.DictReader(io.StringIO(output.read_text())))
    assert [(r["path"], r["rank"]) for r in rows] == [(files[0], "1"), (files[0], "2"), (files[1], "")]
    assert rows[2]["error"]
    capsys.readouterr()
    assert main(["predict", "--checkpoint", str(run), "--top-k", "1", files[0]]) == 0
    assert "probability" in capsys.readouterr().out


def test_predict_fails_if_nothing_could_be_read(run, images, capsys):
    assert main(["predict", "--checkpoint", str(run), str(images / "2.png"), "--format", "json"]) == 1
    assert "1 of 1 files have no prediction" in capsys.readouterr().err


def test_a_crash_keeps_its_traceback(monkeypatch, tmp_path):
    from localvit import training

    def crash(*_args, **_kwargs):
        raise ZeroDivisionError

    monkeypatch.setattr(training, "train", crash)
    with pytest.raises(ZeroDivisionError):
        main(["train", *TINY, "--output", str(tmp_path / "run")])


@pytest.mark.parametrize(
    ("number", "message"),
    [
        ("ENOSPC", "No space left on device; make room and try again"),
        ("EDQUOT", "Disk quota exceeded; make room and try again"),
        ("EROFS", "Read-only file system; get permission to use it, or choose another place"),
        ("EACCES", "Permission denied; get permission to use it, or choose another place"),
        ("ENOENT", "No such file or directory; check that it exists and that you may use it"),
        ("EMFILE", r"Too many open files; raise the limit of open files \(ulimit -n\), or use fewer workers"),
        ("EIO", "Input/output error; check that it exists and that you may use it"),
    ],
)
def test_what_the_system_refuses_is_one_line_with_file_and_remedy(number, message):
    code = getattr(errno, number)
    for file, shown in (("a\udcff", r"'a\\udcff'"), (b"a", "'a'"), (None, "the output")):
        with pytest.raises(Failed, match=f"^{shown}: {message}$"), one_line_errors():
            raise OSError(code, os.strerror(code), file)


def test_a_full_disk_leaves_nothing(tmp_path, full_disk):
    with full_disk(2), pytest.raises(Failed, match=r"study\.json': File too large"), one_line_errors():
        write_atomically(tmp_path / "study.json", "more than that")
    assert not list(tmp_path.iterdir())


def test_a_console_that_is_closed():
    command = f"{sys.executable} -m localvit study list >&-"
    closed = subprocess.run(command, shell=True, capture_output=True, text=True)
    assert (closed.returncode, closed.stderr) == (0, "")


FULL = "localvit: the output: No space left on device; make room and try again\n"


@pytest.mark.parametrize(
    "line",
    [
        *("--help", "--version", "doctor --json", "models --supported --json", "models localvit_pvt_tiny"),
        *("study list", "study show gate", "data check digits", "plan --recipe digits --gpus 2 --json"),
        *(
            "train --recipe digits --print-config",
            "evaluate --checkpoint RUN",
            "export RUN --format torch --output m.pt2",
        ),
        *("predict --checkpoint RUN 0.png", "predict --checkpoint RUN 0.png --format json"),
        "bench test_vit --against test_vit --batch 1 --rounds 2 --engine eager --device cpu",
    ],
)
def test_a_full_console_is_one_line(line, run, images, monkeypatch, capsys, full_console):
    monkeypatch.chdir(images)
    with full_console():
        assert main([str(run) if word == "RUN" else word for word in line.split()]) == 1
    assert capsys.readouterr().err.endswith(FULL)


def test_training_that_cannot_be_printed_is_one_line(tmp_path, capsys, full_console):
    with full_console():
        assert main(["train", *TINY, "--output", str(tmp_path / "run")]) == 1
    assert capsys.readouterr().err == FULL


@pytest.mark.parametrize("words", [(), ("--tensorboard",)])
def test_training_on_a_full_disk_is_one_line(words, tmp_path, capsys, full_disk):
    with full_disk(500):
        assert main(["train", *TINY, *words, "--output", str(tmp_path / "run")]) == 1
    err = capsys.readouterr().err
    assert err.count("\n") == 1
    assert "run' cannot be written: File too large; earlier files are unchanged" in err
