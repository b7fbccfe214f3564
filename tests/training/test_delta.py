"""The delta file at the end of a run that started from pretrained weights."""

import io

import pytest
import timm
import torch
from rich.console import Console
from timm.models import save_for_hf

from localvit.config import resolve
from localvit.models import load_locality
from localvit.training.loop import train
from tests.training.conftest import TINY
from tests.training.runs import stop_after

LOCAL = ["model.locality={init: preserve}", "epochs=1", "schedule.warmup_epochs=0"]


@pytest.fixture(scope="module")
def pretrained(tmp_path_factory):
    """A folder of weights as a hub has them, with a classifier of other classes."""
    folder = tmp_path_factory.mktemp("hub") / "base"
    args = resolve("digits", TINY).model.args
    model = timm.create_model("deit_tiny_patch16_224", num_classes=3, **args)
    model.pretrained_cfg = {**model.pretrained_cfg, "input_size": (1, 8, 8)}
    save_for_hf(model, str(folder), model_args=args, safe_serialization=True)
    return f"local-dir:{folder}"


@pytest.fixture
def run(tiny, tmp_path, pretrained):
    """A function from settings to the configuration of a run in `tmp_path / "run"` from those weights."""
    start = [f"model.name={pretrained}", "model.pretrained=true", f"output={tmp_path / 'run'}"]
    return lambda *settings: tiny(*LOCAL, *start, *settings)


def printed(config):
    console = Console(file=io.StringIO(), width=200)
    return train(config, console=console), console.file.getvalue()


@pytest.mark.parametrize("settings", [["locality"], ["locality-alone", "ema_decay=0.5"], ["head"]])
def test_a_run_with_a_frozen_base_leaves_all_that_it_learned(
    run, pretrained, tmp_path, settings, monkeypatch
):
    config = run(f"train_only={settings[0]}", *settings[1:])
    stop_after(monkeypatch, config, 3)  # the base is also known to the run that resumes
    result, text = printed(config)
    file = tmp_path / "run" / "best" / "locality.safetensors"
    assert f"{file} holds only locality and classifier" in text
    base = timm.create_model(pretrained, pretrained=True).eval()
    load_locality(base, file)
    images = torch.randn(2, 1, 8, 8)
    with torch.no_grad():
        assert torch.equal(base(images), result.model(images))


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        (
            ["train_only=all"],
            "no delta file: the pretrained weights were trained too; train_only=locality keeps them",
        ),
        (["train_only=locality", "model.pretrained=false"], ""),
        (["train_only=head", "model.locality=null"], ""),
    ],
)
def test_no_delta_where_it_would_not_be_enough(run, tmp_path, settings, said):
    _, text = printed(run(*settings))
    assert said in text
    assert ("delta" in text) == bool(said)
    assert not list((tmp_path / "run").rglob("locality.safetensors"))
