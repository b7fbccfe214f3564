"""`localvit data check`, and names of every kind from training to every output."""

import csv
import json
import os
import shutil
from pathlib import Path

import pytest

from localvit.cli import main
from tests.images import make_images

TINY = [
    f"--set=model.args.{a}" for a in ("img_size=16", "patch_size=8", "embed_dim=16", "depth=1", "num_heads=1")
]
TINY += ["--set=schedule.warmup_epochs=0", "--model=vit_tiny_patch16_224", "--batch-size=8", "--device=cpu"]
NAMES = ["caf\udce9", "new\nline", "cr\rx", "-x", "[bold]", "[", "<img onerror>", "\x1b[31m", "=1+1"]


@pytest.fixture
def place(tmp_path, monkeypatch):
    """The working directory, with images of two classes in `d`."""
    make_images(tmp_path / "d", {"a": 10, "[b]": 10})
    monkeypatch.chdir(tmp_path)
    return tmp_path


def test_it_counts_classes_and_names_what_is_left_out(place, capsys):
    Path("d/a/notes.txt").write_text("")
    assert main(["data", "check", "d"]) == 0
    out = capsys.readouterr().out
    rows = [[word for word in line.replace("│", " ").split() if word != "|"] for line in out.splitlines()]
    assert ["all", "16", "2", "2"] in rows
    assert any(row[:1] == ["[b]"] for row in rows)
    assert "left out because their suffix is not that of an image: 1 .txt" in out
    assert "no files of two splits have equal contents" in out


def test_it_decodes_every_image_if_asked(place, capsys):
    assert main(["data", "check", "d", "--decode"]) == 0
    assert "all images can be decoded" in capsys.readouterr().out
    for label in ("a", "[b]"):
        for image in Path("d", label).iterdir():
            image.write_text(f"no image: {image}")
    assert main(["data", "check", "d"]) == 0
    assert main(["data", "check", "d", "--decode"]) == 1
    lines = [line for line in capsys.readouterr().out.splitlines() if "cannot read image" in line]
    assert len(lines) == 20
    assert {line.partition(":")[0] for line in lines} == {"train", "validation", "test"}


def test_it_finds_copies_and_refuses_overlap(place, capsys):
    shutil.copytree("d", "copy")
    assert main(["data", "check", "d", "--val-data", "copy"]) == 1
    assert "18 of 20 test images have the same content as train images" in capsys.readouterr().out
    assert main(["data", "check", "d", "--val-data", "../" + place.name + "/d"]) == 2
    assert "all of its 20 images with " in capsys.readouterr().err
    assert main(["data", "check", "d", "--val-data", "d", "--allow-overlap"]) == 0
    assert "overlap allowed: " in capsys.readouterr().out


def test_an_overlap_that_is_allowed_is_in_the_results_of_a_run(place, capsys):
    command = ["train", *TINY, "--epochs=1", "--data", "d", "--val-data", "d", "--output", "run"]
    assert main(command) == 2
    assert main([*command, "--allow-overlap"]) == 0
    notes = json.loads(Path("run/status.json").read_text())["notes"]
    assert sum("overlap allowed: data.test='d'" in note for note in notes) == 1
    assert main(["evaluate", "--checkpoint", "run", "--device", "cpu", "--output", "e.json"]) == 0
    assert "overlap allowed" in json.loads(Path("e.json").read_text())["notes"][0]


@pytest.mark.filterwarnings("ignore:Glyph")  # of the drawing: matplotlib's font has no control characters
def test_names_of_every_kind_go_from_training_to_every_output(place, capfdbinary):
    shutil.rmtree("d/[b]")
    for name in NAMES:
        shutil.copytree("d/a", f"d/{name}")
        for i in range(3):
            os.rename(f"d/{name}/{i}.png", f"d/{name}/{i}{name}.png")
    assert main(["train", *TINY, "--epochs=1", "--data", "d", "--output", "run[/x]"]) == 0
    assert main(["train", *TINY, "--epochs=1", "--data", "d", "--output", "run[/x]"]) == 0  # is finished
    evaluated = ["evaluate", "--checkpoint", "run[/x]", "--device", "cpu"]
    assert main([*evaluated, "--output", "e.json"]) == 0
    assert main([*evaluated, "--output", "e.csv", "--confusion", "e.png"]) == 0
    labels = {name.replace("\udce9", "\\xe9") for name in [*NAMES, "a"]}
    with open("e.csv", newline="", encoding="utf-8") as file:
        rows = list(csv.DictReader(file))
    assert {row["label"] for row in rows} <= labels
    assert len(rows) == len({row["label"] for row in rows}) > 5
    predicted = ["predict", "--checkpoint", "run[/x]", "--device", "cpu", "--top-k", "1", "d"]
    for output in ("p.csv", "p.jsonl", "p.parquet"):
        assert main([*predicted, "--output", output]) == 0
    said = {}
    for form in ("table", "json", "jsonl", "csv"):
        capfdbinary.readouterr()
        assert main([*predicted, "--format", form]) == 0
        said[form] = capfdbinary.readouterr().out
    with open("p.csv", newline="", encoding="utf-8", errors="surrogateescape") as file:
        table = list(csv.DictReader(file))
    lines = [json.loads(line) for line in Path("p.jsonl").read_text().splitlines()]
    assert [row["path"] for row in table] == [line["path"] for line in lines]
    assert {os.path.exists(line["path"]) for line in lines} == {True}
    assert len({line["path"] for line in lines}) == 100
    assert {row["label"] for row in table} <= labels
    for form in ("json", "jsonl"):
        assert b"\x1b" not in said[form]
    assert b"\x1b" not in said["table"]
    assert said["csv"].count(b"caf\xe9") == said["table"].count(b"caf\xe9") == 13
    assert (
        said["csv"].decode(errors="surrogateescape").splitlines()
        == Path("p.csv").read_text(errors="surrogateescape").splitlines()
    )
