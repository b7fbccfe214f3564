"""`open_model`: one door for every kind of model."""

import json
import math
import shutil

import pytest
import timm
import torch

from localvit.errors import ConfigError
from localvit.inference import fused, open_model, predict
from tests.images import SIZE, export_model, make_images

NAMES = ["ant", "bee", "cat"]
SMALL = {"img_size": SIZE, "patch_size": 8, "embed_dim": 96, "depth": 1, "num_heads": 2, "num_classes": 3}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A run's folder that holds only its best model."""
    run = tmp_path_factory.mktemp("run")
    export_model(run / "best", 3, NAMES, crop_pct=0.7)
    return run


def test_one_model_by_all_its_names(folder):
    found = [
        open_model(source, "cpu") for source in (folder, folder / "best", f"local-dir:{folder / 'best'}")
    ]
    assert len({one.fingerprint() for one in found}) == 1
    for one in found:
        assert one.labels == one.descriptions == tuple(NAMES)
        assert (one.num_classes, one.device, one.form) == (3, torch.device("cpu"), "PyTorch")
        assert one.preprocessing.crop_pct == 0.7
        assert not one.model.training
        assert one.run is None


@pytest.mark.parametrize("outputs", [4, 1000])
def test_outputs_beyond_the_names_of_a_model_have_numbers_and_no_names_of_imagenet(outputs, tmp_path):
    found = open_model(export_model(tmp_path, outputs, NAMES), "cpu")
    assert found.labels == found.descriptions == (*NAMES, *(f"output {i}" for i in range(3, outputs)))


@pytest.mark.parametrize("outputs", [2, 4, 1000])
def test_a_new_head_has_no_names(folder, outputs):
    found = open_model(folder, "cpu", args={"num_classes": outputs})
    assert (found.num_classes, found.labels, found.descriptions) == (outputs, None, None)


@pytest.mark.parametrize(
    ("field", "value", "message"),
    [
        ("label_names", 5, "config.json: label_names: 5 is not accepted"),
        ("num_classes", -math.inf, "config.json' is not JSON: -Infinity is not a JSON value"),
        ("num_classes", -1, "num_classes: -1 is not accepted; use a positive number"),
        ("num_classes", False, "num_classes: False is not accepted; use a positive number"),
        ("num_heads", -2, "model.args.num_heads: -2 is not accepted; use a positive number"),
        ("patch_size", [8], "cannot be loaded: tuple index out of range; check its files"),
    ],
)
def test_impossible_values_in_config_json_are_one_line(folder, tmp_path, field, value, message):
    copy = shutil.copytree(folder, tmp_path / "copy")
    file = copy / "best" / "config.json"
    config = json.loads(file.read_text())
    (config["model_args"] if field in config["model_args"] else config)[field] = value
    file.write_text(json.dumps(config))
    with pytest.raises(ConfigError, match=message):
        open_model(str(copy), "cpu")


def test_a_model_without_a_classifier_predicts_nothing(tmp_path):
    with pytest.raises(ConfigError, match="num_classes=-1 is not accepted; use a positive integer"):
        open_model("test_vit", "cpu", random_weights=True, args={"num_classes": -1})
    opened = open_model("test_vit", "cpu", random_weights=True, args={"num_classes": 0})
    with pytest.raises(ConfigError, match="model 'test_vit' has no classes; use a model with a classifier"):
        list(predict(opened, [make_images(tmp_path, {"a": 1})]))


def test_random_weights_are_asked_for(folder):
    found = open_model("localvit_tiny_patch16_224", "cpu", random_weights=True, args=SMALL)
    assert (found.num_classes, found.labels, found.run) == (3, None, None)
    with pytest.raises(ConfigError, match="use a timm name"):
        open_model(folder, "cpu", random_weights=True)
    with pytest.raises(ConfigError, match=r"model 'localvit_tiny_patch16_224' cannot be loaded: .*depths"):
        open_model("localvit_tiny_patch16_224", "cpu", random_weights=True, args={"depths": 1})


def test_the_fused_form_computes_the_same_and_is_named(folder):
    images = torch.randn(2, 3, SIZE, SIZE)
    with torch.inference_mode():
        expected = open_model(folder, "cpu").model(images)
        found = open_model(folder, "cpu", fuse=True)
        torch.testing.assert_close(found.model(images), expected, rtol=1e-5, atol=1e-5)
    assert found.form == "PyTorch, fused"


def test_a_model_without_a_fused_form_stays_plain_and_says_so():
    opened = open_model("test_resnet", "cpu", random_weights=True, fuse=True)
    assert opened.form == "PyTorch, not fused: ResNet has no fast form"
    assert isinstance(opened.model, timm.models.resnet.ResNet)


def test_plain_kernels_are_named(folder, monkeypatch):
    monkeypatch.setenv("LOCALVIT_KERNELS", "plain")
    assert fused(open_model(folder, "cpu")).form == "PyTorch, not fused: LOCALVIT_KERNELS=plain"


def test_arguments_that_do_not_fit_the_weights_are_named(folder):
    with pytest.raises(
        ConfigError, match=r"cannot be loaded: .*; leave out {'depth': 5}, or check its files"
    ):
        open_model(folder, "cpu", args={"depth": 5})


@pytest.mark.parametrize(
    ("source", "options", "message"),
    [
        ("nowhere/at/all", {}, "does not exist"),
        ("deit_tny_patch16_224", {}, "did you mean"),
        ("", {}, "model"),
        ("x.pt2", {}, "reading a .pt2 may run its author's code"),
        ("x.onnx", {"device": "meta"}, "exported files run on the CPU"),
        ("x.onnx", {"args": {"depth": 1}}, "is an exported file, which takes none"),
        ("x.onnx", {}, "'x.onnx' does not exist"),
        ("x.txt", {"engine": "onnxruntime"}, "use .onnx"),
        ("test_vit", {"device": "meta"}, "device='meta' cannot be used here: .* use auto(, cpu)? or c"),
        ("test_vit", {"device": "tpu9"}, "device='tpu9' does not exist; use auto, cpu or cuda"),
    ],
)
def test_what_cannot_be_opened_is_one_line(source, options, message, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ConfigError, match=message) as error:
        open_model(source, **options)
    assert "\n" not in str(error.value)
