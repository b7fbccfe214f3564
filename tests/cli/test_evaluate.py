import csv
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from localvit.cli import main
from tests.images import export_model, make_images

CLASSES = {"ant": 3, "[bee]": 4}  # brackets are markup for rich


@pytest.fixture(scope="module")
def exported(tmp_path_factory):
    """Arguments that evaluate a tiny model on seven images."""
    folder = tmp_path_factory.mktemp("evaluate")
    checkpoint = export_model(folder / "model", 2, list(CLASSES))
    data = make_images(folder / "images", CLASSES)
    return ["evaluate", "--checkpoint", checkpoint, "--data", data, "--device", "cpu"]


def test_it_prints_metrics_intervals_and_classes(exported, capsys):
    assert main([*exported, "--batch-size", "2"]) == 0
    out = capsys.readouterr().out
    assert "top-1" in out
    assert " to " in out.splitlines()[0]
    assert "calibration error" in out
    assert "(7 images" in out
    assert "[bee]" in out
    assert "restricted" not in out
    assert main([*exported, "--restrict"]) == 0
    assert "restricted to the 2 classes" in capsys.readouterr().out


@pytest.mark.parametrize(("option", "form"), [([], "PyTorch"), (["--fuse"], "PyTorch, fused")])
def test_it_computes_by_the_plain_form_unless_asked_and_says_so(exported, tmp_path, capsys, option, form):
    output = tmp_path / "all.json"
    assert main([*exported, *option, "--output", str(output)]) == 0
    assert f"({form}) on" in capsys.readouterr().out
    result = json.loads(output.read_text())
    assert result["form"] == form
    assert main([*exported, "--output", str(tmp_path / "plain.json")]) == 0
    plain = json.loads((tmp_path / "plain.json").read_text())
    assert result["metrics"]["loss"] == pytest.approx(plain["metrics"]["loss"], rel=1e-5)
    assert result["classes"] == plain["classes"]


def test_it_writes_json_csv_and_an_image(exported, tmp_path):
    files = {name: tmp_path / name for name in ("all.json", "classes.csv", "confusion.png")}
    assert (
        main([*exported, "--output", str(files["all.json"]), "--confusion", str(files["confusion.png"])]) == 0
    )
    assert main([*exported, "--output", str(files["classes.csv"])]) == 0
    result = json.loads(files["all.json"].read_text())
    with open(files["classes.csv"]) as file:
        rows = list(csv.DictReader(file))
    assert {row["label"]: int(row["images"]) for row in rows} == CLASSES
    assert [row["top1"] for row in rows] == [str(row["top1"]) for row in result["classes"]]
    assert files["confusion.png"].read_bytes().startswith(b"\x89PNG")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--output", "old.json"], "--output old.json: the file exists"),
        (["--output", "result.txt"], "use a name in .json or .csv"),
        (["--confusion", "result.jpg"], "use a name in .png"),
        (["--confusion", "nowhere/result.png"], "the folder 'nowhere' does not exist"),
        (["--class-map", "none.txt"], "class_map='none.txt' is not accepted; use a .txt file"),
        (["--real-labels", "default"], "ILSVRC-2012's 1000 classes"),
        (["--batch-size", "0"], "batch_size=0 is not accepted; use at least 1"),
        (["--crop-pct", "1.5"], "crop_pct=1.5"),
        (["--device", "tpu"], "device='tpu'"),
    ],
)
def test_wrong_use_is_one_line_before_anything_is_written(
    exported, arguments, message, capsys, tmp_path, monkeypatch
):
    monkeypatch.chdir(tmp_path)
    Path("old.json").write_text("old")
    assert main([*exported, *arguments]) == 2
    out, err = capsys.readouterr()
    assert message in err
    assert (out, err.count("\n")) == ("", 1)
    assert [p.name for p in tmp_path.iterdir()] == ["old.json"]
    assert Path("old.json").read_text() == "old"


def test_without_matplotlib_it_says_what_to_install_before_work(exported, capsys, tmp_path, monkeypatch):
    import importlib.util

    found = importlib.util.find_spec
    monkeypatch.setattr(
        importlib.util, "find_spec", lambda name: None if name == "matplotlib" else found(name)
    )
    monkeypatch.setattr("localvit.evaluation.evaluate", lambda *_, **__: pytest.fail("it began to work"))
    assert main([*exported, "--confusion", str(tmp_path / "x.png")]) == 2
    assert "pip install 'localvit[study]'" in capsys.readouterr().err


def test_two_processes_count_every_image_once(exported, tmp_path):
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    output = [tmp_path / "one.json", tmp_path / "two.json"]
    command = [*exported, "--batch-size", "2", "--output"]
    assert main([*command, str(output[0])]) == 0
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [*launch, "-m", "localvit", *command, str(output[1])], capture_output=True, text=True, env=environment
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("top-1 ") == 1  # the first process prints, the other does not
    one, two = (json.loads(path.read_text()) for path in output)
    assert two["metrics"]["images"] == 7
    assert two["metrics"].pop("loss") == pytest.approx(one["metrics"].pop("loss"), rel=1e-6)
    for result in (one, two):
        del result["metrics"]["images_per_second"]
        del result["calibration"], result["calibration_error"]  # means of rounded numbers
    assert one == two


def test_a_console_that_is_not_read_costs_no_file(exported, tmp_path, monkeypatch):
    def end(_):
        raise BrokenPipeError

    monkeypatch.setattr("localvit.cli.evaluate._print", end)
    with pytest.raises(BrokenPipeError):
        main([*exported, "--output", str(tmp_path / "all.json")])
    assert json.loads((tmp_path / "all.json").read_text())["metrics"]["images"] == 7


@pytest.mark.parametrize("file", ["--output=all.json", "--output=classes.csv", "--confusion=confusion.png"])
def test_a_full_disk_is_one_line_after_the_numbers(exported, tmp_path, monkeypatch, full_disk, capsys, file):
    monkeypatch.chdir(tmp_path)
    with full_disk(10):
        assert main([*exported, file]) == 1
    shown = capsys.readouterr()
    assert "top-1" in shown.out
    assert shown.err.count("\n") == 1
    assert f"{file.partition('=')[2]!r} cannot be written: File too large" in shown.err
    assert not list(tmp_path.iterdir())
