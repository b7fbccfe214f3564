"""``localvit export`` and ``localvit predict`` of what it wrote."""

import json
import resource
import subprocess
import sys
from pathlib import Path

import pytest
import timm
import torch

import localvit
from localvit.cli import main
from localvit.export import write
from localvit.export.program import export_program
from localvit.export.write import FORMATS
from localvit.inference import open_model
from tests.images import export_model, make_images

NAMES = ["ant", "bee", "cat"]


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """A model that sees images in a way of its own, images, and the model in every format that can be."""
    folder = tmp_path_factory.mktemp("export")
    seen = {"crop_pct": 0.7, "mean": (0.3, 0.4, 0.5), "std": (0.2, 0.3, 0.4), "interpolation": "bilinear"}
    export_model(folder / "model", 3, NAMES, **seen)
    make_images(folder / "images", {"x": 5, "y": 4})
    for format, form in FORMATS.items():
        file = folder / f"model{form.suffixes[0]}"
        assert main(["export", str(folder / "model"), "--format", format, "--output", str(file)]) == 0
    return folder


def predictions(place, checkpoint, capsys, *options):
    capsys.readouterr()
    command = ["predict", "--checkpoint", str(place / checkpoint), "--format", "json", "--device", "cpu"]
    assert main([*command, *options, str(place / "images")]) == 0
    return json.loads(capsys.readouterr().out)


@pytest.mark.parametrize(
    ("file", "engine"),
    [
        ("model.pt2", "torch"),
        ("model.onnx", None),
        ("model.onnx", "onnxruntime"),
        ("model.onnx", "openvino"),
        ("model.xml", None),
    ],
)
def test_predictions_are_those_of_the_model(place, file, engine, capsys):
    found = predictions(place, file, capsys, *(["--engine", engine] if engine else []))
    eager = predictions(place, "model", capsys)
    assert [one["path"] for one in found] == [one["path"] for one in eager]
    assert len({one["guesses"][0]["probability"] for one in eager}) == 9  # the images matter
    for ours, theirs in zip(found, eager, strict=True):
        assert [guess["label"] for guess in ours["guesses"]] == [g["label"] for g in theirs["guesses"]]
        probabilities = [[guess["probability"] for guess in one["guesses"]] for one in (ours, theirs)]
        assert probabilities[0] == pytest.approx(probabilities[1], abs=1e-5)


def test_a_file_of_predictions_is_bound_to_its_model(place, tmp_path, capsys):
    """An interrupted file is not gone on with by another export under the same name."""
    first = open_model(place / "model.pt2", "auto", engine="torch").fingerprint()
    assert first == open_model(place / "model.pt2", "cpu", engine="torch").fingerprint()
    other = tmp_path / "model"
    export_model(other, 3, NAMES, crop_pct=0.9)
    file = str(tmp_path / "model.pt2")
    assert main(["export", f"local-dir:{other}", "--format", "torch", "--output", file]) == 0
    assert open_model(file, engine="torch").fingerprint() != first
    out = str(tmp_path / "found.csv")
    command = ["predict", "--checkpoint", file, "--engine", "torch", "--output", out]
    assert main([*command, str(place / "images")]) == 0
    assert (tmp_path / "found.csv").read_text().count("\n") == 1 + 9 * 3


def test_an_exported_file_is_evaluated_as_its_model_is(place, capsys):
    (place / "map.txt").write_text("x\ny\nz\n")
    found = []
    for checkpoint in ("model", "model.onnx"):
        output = place / f"{checkpoint}.json"
        command = ["evaluate", "--checkpoint", str(place / checkpoint), "--data", str(place / "images")]
        options = ["--class-map", str(place / "map.txt"), "--crop-pct", "0.8", "--output", str(output)]
        assert main([*command, *options]) == 0
        found.append(json.loads(output.read_text()))
    assert [one["form"] for one in found] == ["PyTorch", "ONNX Runtime"]
    assert found[1]["metrics"]["loss"] == pytest.approx(found[0]["metrics"]["loss"], rel=1e-5)
    assert found[1]["preprocessing"]["crop_pct"] == 0.8
    assert found[1]["classes"] == found[0]["classes"]


@pytest.mark.parametrize("verb", ["export", "bench"])
def test_an_exported_file_is_no_source_of_another_one(place, tmp_path, verb, capsys):
    options = {"export": ["--output", str(tmp_path / "x.onnx")], "bench": ["--against", "test_vit"]}[verb]
    assert main([verb, str(place / "model.onnx"), *options]) == 2
    assert f"{verb}: {str(place / 'model.onnx')!r} is an exported file" in capsys.readouterr().err


@pytest.mark.parametrize("file", ["model.pt2", "model.onnx", "model.xml", "model.bin"])
def test_a_file_names_no_folder_of_the_machine(place, file):
    """The exporter notes stack traces; they tell who made a file, and make it differ between machines."""
    if not (place / file).exists():
        pytest.skip("its packages are not installed")
    content = (place / file).read_bytes()
    for folder in (Path(localvit.__file__).parent, Path(torch.__file__).parent, Path.cwd(), place):
        assert str(folder).encode() not in content
    assert b'.py", line' not in content


def test_a_name_with_arguments_and_random_weights(tmp_path, capsys):
    file = tmp_path / "model.pt2"
    settings = ["img_size=16", "patch_size=8", "in_chans=1", "embed_dim=96", "depth=1", "num_heads=2"]
    options = [word for setting in settings for word in ("--set", setting)]
    command = ["export", "localvit_tiny_patch16_224", "--random-weights", *options]
    assert main([*command, "--format", "torch", "--output", str(file)]) == 0
    out = capsys.readouterr().out
    assert [line.split()[:3] for line in out.splitlines()[1:5]] == [
        ["random", "1", "16x16"],
        ["random", "3", "16x16"],
        ["real", "1", "16x16"],
        ["real", "3", "16x16"],
    ]
    assert "largest difference" in out
    assert main([*command, "--format", "torch", "--output", str(file)]) == 2  # it is there
    assert "exists; choose another name, or add --overwrite" in capsys.readouterr().err


def test_a_failed_parity_is_exit_code_1_and_no_file(place, tmp_path, capsys, monkeypatch):
    def other(model, info):
        with torch.no_grad():
            return export_program(timm.create_model("vit_tiny_patch16_224", **SMALL).eval(), info)

    monkeypatch.setattr(write, "export_program", other)
    file = tmp_path / "model.pt2"
    assert main(["export", str(place / "model"), "--format", "torch", "--output", str(file)]) == 1
    out, err = capsys.readouterr()
    assert (out, err.count("\n")) == ("", 1)
    assert "differs from the original by up to" in err
    assert not list(tmp_path.iterdir())


SMALL = {
    "img_size": 16,
    "patch_size": 8,
    "embed_dim": 16,
    "depth": 1,
    "num_heads": 2,
    "global_pool": "avg",
    "num_classes": 3,
}


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["MODEL"], "--output is missing"),
        (["MODEL", "--output", "x.onnx", "--format", "tflite"], "--format"),
        (["MODEL", "--output", "x.onnx", "--format", "torch"], "ends in .pt2"),
        (["MODEL", "--output", "no/x.pt2", "--format", "torch"], "the folder 'no' does not exist"),
        (["nowhere/at/all", "--output", "x.pt2", "--format", "torch"], "does not exist"),
        (["deit_tny_patch16_224", "--output", "x.pt2", "--format", "torch"], "did you mean"),
        (["MODEL", "--output", "x.pt2", "--format", "torch", "--random-weights"], "use a timm name"),
        (
            ["MODEL", "--output", "x.pt2", "--format", "torch", "--data", "none"],
            "data source 'none' does not exist",
        ),
        (["MODEL", "--output", "x.pt2", "--format", "torch", "--set", "depths=1"], "depths"),
        (["MODEL", "--output", "x.pt2", "--format", "torch", "--set", "depth"], "key=value"),
        (["MODEL", "--output", "x.pt2", "--format", "torch", "--tolerance", "0"], "use a positive number"),
        (["MODEL", "--output", "x.pt2", "--format", "torch", "--dynamic-size"], "dynamic_img_size=true"),
    ],
)
def test_wrong_use_is_one_line_and_leaves_nothing(arguments, message, place, tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert main(["export", *(word.replace("MODEL", str(place / "model")) for word in arguments)]) == 2
    out, err = capsys.readouterr()
    assert message in err
    assert (out, err.count("\n")) == ("", 1)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--checkpoint", "model.pt2"], "add --engine torch if you trust it"),
        (["--checkpoint", "model.pt2", "--engine", "torch", "--device", "meta"], "run on the CPU"),
        (["--checkpoint", "none.pt2", "--engine", "torch"], "'none.pt2' does not exist"),
        (
            ["--checkpoint", "model", "--engine", "torch"],
            "not accepted for engine='torch'; use .pt2",
        ),
        (["--checkpoint", "model.pt2", "--engine", "tensorrt"], "--engine"),
    ],
)
def test_wrong_engines_are_one_line(arguments, message, place, capsys, monkeypatch):
    monkeypatch.chdir(place)
    assert main(["predict", *arguments, "images"]) == 2
    out, err = capsys.readouterr()
    assert message in err
    assert (out, err.count("\n")) == ("", 1)


def test_a_model_without_digits_says_what_else(place, tmp_path, capsys, monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "sklearn.datasets", None)
    assert (
        main(["export", str(place / "model"), "--format", "torch", "--output", str(tmp_path / "x.pt2")]) == 2
    )
    assert "--data SRC takes other images" in capsys.readouterr().err


def test_a_full_disk_is_one_line(place, tmp_path):
    """In a process of its own: torch ended it when it wrote the file itself."""
    command = ["export", str(place / "model"), "--format", "torch", "--data", str(place / "images")]
    done = subprocess.run(
        [sys.executable, "-m", "localvit", *command, "--output", str(tmp_path / "model.pt2")],
        preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (2000, 2000)),
        capture_output=True,
        text=True,
    )
    assert (done.returncode, done.stderr.count("\n")) == (1, 1), done.stderr
    assert "model.pt2' cannot be written: File too large; make room or" in done.stderr
    assert not list(tmp_path.iterdir())
