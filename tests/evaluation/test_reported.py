"""Only test images of the training, or images that the run was not trained on, are reported."""

import json
import os
import shutil
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from localvit.cli import main
from localvit.data.config import DataConfig
from localvit.data.manifest import make_manifest
from localvit.data.splits import open_splits
from localvit.evaluation.evaluation import evaluate
from localvit.runs import read_run

TINY = [
    f"--set=model.args.{a}" for a in ("img_size=16", "patch_size=8", "embed_dim=16", "depth=1", "num_heads=1")
]
TINY += [f"--set={a}" for a in ("schedule.warmup_epochs=0", "augment.crop=none", "augment.smoothing=0")]
TINY += ["--model=vit_tiny_patch16_224", "--batch-size=8", "--device=cpu", "--lr=0.02", "--epochs=12"]
COLOURS = {"a": (230, 20, 20), "b": (20, 230, 20), "c": (20, 20, 230), "0new": (9, 9, 9)}


def paint(folder, name, count, first=0):
    """Images of one colour, each a little different."""
    Path(folder, name).mkdir(parents=True, exist_ok=True)
    for i in range(first, first + count):
        rng = np.random.default_rng([i, *map(ord, folder + name)])
        values = np.clip(np.array(COLOURS[name]) + rng.integers(-15, 15, (16, 16, 3)), 0, 255)
        Image.fromarray(values.astype(np.uint8)).save(f"{folder}/{name}/{i}.png")


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """`held` and `split` are data, `run-held` and `run-split` their runs."""
    place, before = tmp_path_factory.mktemp("trained"), os.getcwd()
    os.chdir(place)
    try:
        for name in "abc":
            paint("held", name, 20)
            paint("split/train", name, 12)
            paint("split/test", name, 4)
        for source in ("held", "split"):
            assert main(["train", *TINY, "--data", source, "--output", f"run-{source}"]) == 0
    finally:
        os.chdir(before)
    return place


@pytest.fixture
def place(trained, tmp_path, monkeypatch):
    """A copy of it, as the working directory."""
    shutil.copytree(trained, tmp_path / "x", dirs_exist_ok=True)
    monkeypatch.chdir(tmp_path / "x")


def refused(capsys, *arguments):
    """The line with which `evaluate` refuses, without its beginning."""
    assert main(["evaluate", "--device", "cpu", "--checkpoint", *arguments]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    return line.removeprefix("localvit: ")


def rights(found):
    return {row.label: (row.images, row.right) for row in found.classes}


def test_the_same_data_are_evaluated_as_in_training(place):
    for source, images in (("held", 6), ("split", 12)):
        found = evaluate(f"run-{source}", device="cpu")
        assert found.metrics.images == images
        assert found.metrics.top1 == read_run(f"run-{source}").status.test["top1"] == 100
        assert found.notes == ()


def test_a_copy_elsewhere_is_the_same(place, monkeypatch):
    shutil.rmtree("run-held/last")
    os.makedirs("y")
    shutil.move("held", "y/held")
    shutil.move("run-held", "y/run")
    monkeypatch.chdir("y")
    assert evaluate("run", device="cpu").metrics.top1 == 100


def test_data_are_found_from_another_folder(trained, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    run = os.path.relpath(trained / "run-held")
    assert evaluate(run, device="cpu").metrics.images == 6
    line = refused(capsys, run, "--data", os.path.relpath(trained / "held"))
    assert "was trained on 49 of these 60 images" in line  # 5 validation images were not trained on


@pytest.mark.parametrize("source", ["held", "split"])
def test_a_class_that_is_gone_is_named(place, capsys, source):
    before = rights(evaluate("run-split", device="cpu"))
    for folder in Path(source).rglob("a"):
        shutil.rmtree(folder)
    line = refused(capsys, f"run-{source}")
    assert "has changed since training: classes 'a' are gone" in line
    assert line.endswith(
        "restore the data, or choose other images with --data, or allow it with --allow-change data"
    )
    if source == "split":  # labels by name: what remains is right as before
        found = evaluate("run-split", device="cpu", allow_change=["data"])
        assert rights(found) == {name: before[name] for name in "bc"}
        assert found.notes[0].startswith("change allowed: the test split")


def test_a_class_that_is_new_is_named(place, capsys):
    paint("held", "0new", 20)
    assert "classes '0new' are new" in refused(capsys, "run-held")
    assert "class '0new' is not among" in refused(
        capsys, "run-held", "--allow-change", "data", "--allow-overlap"
    )
    paint("split/train", "0new", 8)  # only in the training images: the test images are what they were
    assert evaluate("run-split", device="cpu").metrics.top1 == 100


def test_images_that_were_added_move_trained_images_into_the_test_split(place, capsys):
    paint("held", "b", 20, first=100)
    line = refused(capsys, "run-held")
    assert "6 images are now 8; " in line
    assert "images changed, such as '" in line
    line = refused(capsys, "run-held", "--allow-change", "data")
    assert "test images were trained on, such as '" in line
    found = evaluate("run-held", config=DataConfig(allow_overlap=True), device="cpu", allow_change=["data"])
    assert [note.partition(":")[0] for note in found.notes] == ["change allowed", "overlap allowed"]


@pytest.mark.parametrize("change", ["rename", "replace", "remove"])
def test_an_image_that_changed_is_counted(place, capsys, change):
    image = Path("split/test/c/2.png")
    if change == "rename":
        image.rename("split/test/c/9.png")
    elif change == "replace":
        Image.new("RGB", (16, 16)).save(image)
    else:
        image.unlink()
    count = {"rename": 2, "replace": 2, "remove": 1}[change]
    line = refused(capsys, "run-split")
    assert f"{count} images changed, such as 'c/2.png'" in line
    assert "classes 'c' changed; " in line
    assert ("12 images are now 11" in line) == (change == "remove")


def test_other_data_are_compared_with_the_training_images(place, capsys, monkeypatch):
    line = refused(capsys, "run-split", "--data", "split/train")
    assert "was trained on 32 of these 36 images" in line
    assert line.endswith(
        "leave --data out to use the test split of that run, or allow it with --allow-overlap"
    )
    assert main(["evaluate", "--checkpoint", "run-split", "--data", "split/test", "--device", "cpu"]) == 0
    os.symlink("split/train", "elsewhere")
    assert "'run-split' was trained on" in refused(capsys, "run-split", "--data", "elsewhere")
    output = ["--output", "e.json", "--allow-overlap"]
    assert (
        main(["evaluate", "--checkpoint", "run-split", "--data", "elsewhere", "--device", "cpu", *output])
        == 0
    )
    assert (
        "overlap allowed: data='elsewhere': 'run-split' was"
        in json.loads(Path("e.json").read_text())["notes"][0]
    )
    assert "overlap allowed" in capsys.readouterr().out


def test_copies_of_training_images_are_a_warning(place, capsys):
    shutil.copytree("split/train", "copy")
    found = evaluate("run-split", "copy", device="cpu")
    (note,) = found.notes
    assert note.startswith("warning: 32 of 36 test images have the same content as train images")


def test_training_images_that_are_gone_are_said(place):
    shutil.move("split/train", "gone")
    shutil.rmtree("../x/split/test")
    run = Path("run-split/manifest.json")
    manifest = json.loads(run.read_text())
    run.write_text(json.dumps(manifest | {"paths": {}}))
    paint("new", "a", 2)
    (note,) = evaluate("run-split", "new", device="cpu").notes
    assert note.startswith("warning: not compared with the training images of 'run-split': ")


def test_a_run_of_0_3_has_no_manifest(place):
    for name in ("run-held", "run-split"):
        os.unlink(f"{name}/manifest.json")
    assert evaluate("run-held", device="cpu").notes == ()
    before = rights(evaluate("run-split", device="cpu"))
    for folder in Path("split").rglob("a"):
        shutil.rmtree(folder)
    found = evaluate("run-split", device="cpu")
    assert rights(found) == {name: before[name] for name in "bc"}
    assert "warning: the data has changed since training: 32+4+12 images, 3 classes, now" in found.notes[0]


@pytest.mark.parametrize("damage", ["{", "[]", "names", "noise", "splits"])
def test_a_damaged_manifest_is_named(place, capsys, damage):
    path = Path("run-split/manifest.json")
    if damage in ("names", "noise", "splits"):
        values = json.loads(path.read_text())
        if damage in ("names", "noise"):
            values["splits"]["test"]["names"] = {"names": "eJwx", "noise": "AAAA"}[damage]
        else:
            del values["splits"]["test"]
        path.write_text(json.dumps(values))
        paint("split/test", "a", 1, first=77)
    else:
        path.write_text(damage)
    assert "run-split/manifest.json' is damaged" in refused(capsys, "run-split")


def test_a_manifest_is_small_and_has_the_names(place):
    manifest = read_run("run-held").manifest
    assert manifest.class_names == ("a", "b", "c")
    assert sum(split.count for split in manifest.splits.values()) == 60
    assert {entry.rpartition("/")[0] for entry in manifest.splits["test"].entries()} < {
        f"{c}/{i}.png" for c in "abc" for i in range(20)
    }
    assert manifest.fingerprint() == read_run("run-held").status.data


def test_a_copy_and_an_archive_have_the_fingerprint_of_the_folder(place):
    shutil.copytree("split", "other")
    shutil.make_archive("packed", "tar", ".", "split")
    configs = [DataConfig(train=source) for source in ("split", "other", "packed.tar")]
    (fingerprint,) = {make_manifest(open_splits(c), c).fingerprint() for c in configs}
    os.rename("other/train/a/0.png", "other/train/a/00.png")
    assert make_manifest(open_splits(configs[1]), configs[1]).fingerprint() != fingerprint
