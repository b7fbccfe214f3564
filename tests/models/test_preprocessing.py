"""Preprocessing of a model, whose values may come from anybody's config.json."""

import json
import re

import pytest
import timm

from localvit.data import DataConfig
from localvit.errors import ConfigError
from localvit.models import preprocessing_for

ARGS = {"img_size": 16, "patch_size": 8, "embed_dim": 16, "depth": 1, "num_heads": 1}


@pytest.mark.parametrize(
    ("field", "value", "message"),
    [
        ("mean", "abc", "mean"),
        ("mean", ["0.5", "x", "y"], "mean"),
        ("mean", [0.5, 0.5, None], "mean"),
        ("mean", [float("nan")] * 3, "mean"),
        ("mean", [], "mean|division by zero"),
        ("mean", [1e308] * 3, "mean=.* is not accepted; use"),
        ("std", [0.0, 0.5, 0.5], "std=.* is not accepted; use"),
        ("std", [1e-320] * 3, "std=.* is not accepted; use"),
        ("std", [-0.5] * 3, "std=.* is not accepted; use"),
        ("crop_pct", -1, "crop_pct=-1.* is not accepted; use"),
        ("crop_pct", 1e-320, "crop_pct=1e-320 is not accepted; use a value from 0.1 to 2"),
        ("crop_pct", 0.001, "crop_pct=0.001 is not accepted; use a value from 0.1 to 2"),
        ("crop_pct", "all", "crop_pct"),
        ("crop_pct", float("inf"), "crop_pct"),
        ("interpolation", "magic", "interpolation"),
        ("interpolation", 3, "interpolation"),
        ("crop_mode", "middle", "crop_mode"),
    ],
)
def test_values_that_cannot_be_are_refused(field, value, message):
    model = timm.create_model("vit_tiny_patch16_224", **ARGS)
    model.pretrained_cfg = json.loads(json.dumps(dict(model.pretrained_cfg))) | {field: value}
    with pytest.raises(ConfigError, match=message) as caught:
        preprocessing_for(model, DataConfig())
    assert re.fullmatch(r"(preprocessing|data)\b.*", str(caught.value))


def test_the_model_s_own_values_are_taken():
    model = timm.create_model("vit_tiny_patch16_224", **ARGS)
    found = preprocessing_for(model, DataConfig(crop_pct=0.5))
    assert (found.input_size, found.mean, found.crop_pct) == ((3, 16, 16), (0.5, 0.5, 0.5), 0.5)
