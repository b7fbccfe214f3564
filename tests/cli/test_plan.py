"""``localvit plan`` and the effective values of ``localvit train --print-config``."""

import json

import pytest
import yaml

from localvit.cli import main
from localvit.config import TrainConfig, resolve
from localvit.structure import build

SMALL = ["--set", "model.args={img_size: 32, patch_size: 8, embed_dim: 16, depth: 2, num_heads: 2}"]


def test_every_line_says_what_it_rests_on(capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    arguments = ["--gpus", "8x8", "--images-per-second", "500", "--memory-gb", "16", *SMALL]
    assert main(["plan", "--recipe", "deit_imagenet", *arguments]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert all(any(f" ({word}: " in line for word in ("measured", "computed", "assumed")) for line in lines)
    assert "steps: 371,400 (computed: steps per epoch x epochs)" in lines
    assert any(line.startswith("training: 3.301 hours (computed: 380,313,600 images") for line in lines)
    assert any(line.startswith("GPUs: 64 (assumed: 8 x 8") for line in lines)
    assert list(tmp_path.iterdir()) == []


def test_json_has_the_same_lines(capsys):
    assert main(["plan", "--recipe", "digits", "--gpus", "2", "--json"]) == 0
    figures = {figure["name"]: figure for figure in json.loads(capsys.readouterr().out)}
    assert figures["steps"]["value"] == 32 * 40
    assert figures["training"]["value"] is None
    assert figures["parameters"] == {
        "name": "parameters",
        "value": 58_234,
        "how": "counted",
        "unit": "",
        "basis": "measured",
    }


def test_images_that_are_not_there_can_be_told(capsys):
    assert main(["plan", "--recipe", "small_images", "--images", "5000", "--json"]) == 0
    figures = {figure["name"]: figure for figure in json.loads(capsys.readouterr().out)}
    assert figures["steps per epoch"]["value"] == 5000 // 128
    assert figures["training images"]["basis"] == "assumed"


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--gpus", "8xx8"], "--gpus '8xx8' is not accepted; use a number or NODESxGPUS"),
        (["--gpus", "0x8"], "nodes=0 is not accepted; use 1 or more"),
        (["--gpus", "5"], "batch_size=32 cannot be split into 5 equal microbatches"),
        (["--images-per-second", "0"], "images_per_second=0.0 is not accepted; use a positive number"),
        (["--data", "nowhere"], "number of training images with --images N"),
        (["--images", "-4"], "batch_size=32 does not fit -4 training images"),
        (["--set", "optm.lr=1"], "did you mean 'optim'"),
    ],
)
def test_nonsense_is_one_line(capsys, arguments, message):
    assert main(["plan", "--recipe", "digits", *arguments]) == 2
    out, err = capsys.readouterr()
    assert out == ""
    assert err.count("\n") == 1
    assert message in err


def test_printed_configuration_has_its_effect_below_and_stays_yaml(capsys):
    assert (
        main(["train", "--recipe", "digits", "--set", "epochs=5", "--set", "seed=3", "--print-config"]) == 0
    )
    out = capsys.readouterr().out
    assert build(TrainConfig, yaml.safe_load(out)) == resolve("digits", ["epochs=5", "seed=3"])
    block = out.partition("# effective\n")[2].splitlines()
    assert all(line.startswith("#   ") for line in block)
    assert "#   steps: 160 (computed: steps per epoch x epochs)" in block
    assert "#   peak learning rate: 0.004 (computed: optim.lr)" in block


def test_printed_configuration_says_what_data_is_missing(capsys):
    assert main(["train", "--recipe", "finetune", "--data", "nowhere", *SMALL, "--print-config"]) == 0
    out = capsys.readouterr().out
    assert "#   training images: unknown (assumed: data source 'nowhere' does not exist" in out
    assert "#   steps: unknown" in out
