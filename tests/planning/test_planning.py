"""Plans: each figure by hand."""

import pytest
import timm
import torch
from torch import nn

from localvit.config.files import resolve
from localvit.errors import ConfigError
from localvit.planning.figures import effective, open_run
from localvit.planning.memory import measure_step
from localvit.planning.run_plan import Machine, plan_run

SMALL = ["model.args={img_size: 32, patch_size: 8, embed_dim: 16, depth: 2, num_heads: 2}"]


def values(figures):
    return {figure.name: figure.value for figure in figures}


def named(figures, name):
    return next(figure for figure in figures if figure.name == name)


def test_memory_of_a_step_by_hand():
    model = nn.Sequential(nn.Flatten(), nn.Linear(12, 20), nn.ReLU(), nn.Linear(20, 5))
    optimizer = torch.optim.AdamW(model.parameters())
    found = measure_step(model, optimizer, (3, 2, 2))
    parameters = 12 * 20 + 20 + 20 * 5 + 5
    assert found.weights == found.saved == found.gradients == 4 * parameters
    assert found.optimizer == 4 * (2 * parameters + 4)  # two moments, and a count for each of four tensors
    # An image keeps: input (12), hidden state (20, for ReLU and the next layer at once), output (5).
    assert found.activations == 4 * (12 + 20 + 5)
    assert found.activations_fixed == 0  # weights are kept too, and counted already


def test_memory_is_of_what_learns():
    model = nn.Sequential(nn.Flatten(), nn.Linear(12, 20), nn.ReLU(), nn.Linear(20, 5))
    model[1].requires_grad_(False)
    optimizer = torch.optim.SGD(model[3].parameters(), lr=0.1, momentum=0.9)
    found = measure_step(model, optimizer, (3, 2, 2))
    assert found.gradients == found.optimizer == 4 * (20 * 5 + 5)
    assert found.activations == 4 * (20 + 5)


def test_activations_are_linear_and_smaller_in_bf16():
    def build():
        torch.manual_seed(0)
        model = timm.create_model("deit_tiny_patch16_224", img_size=32, embed_dim=32, depth=2, num_heads=2)
        return model, torch.optim.SGD(model.parameters(), lr=0.0)

    single = measure_step(*build(), (3, 32, 32))
    half = measure_step(*build(), (3, 32, 32), "bf16")
    assert 0.4 < half.activations / single.activations < 0.9
    assert single.activations_fixed < single.activations


def test_what_the_recipe_of_deit_comes_to_on_imagenet(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)  # no folder "imagenet"
    config = resolve("deit_imagenet", SMALL)
    figures = plan_run(config, Machine(nodes=8, gpus=8, images_per_second=500.0, memory_gb=1.0))
    found = values(figures)
    images = 1_281_167 - 12_812
    assert found["training images"] == images
    assert named(figures, "training images").basis == "assumed"
    assert found["steps per epoch"] == images // 1024 == 1238
    assert found["steps"] == 1238 * 300
    assert found["warm-up steps"] == 1238 * 5
    assert found["peak learning rate"] == 1e-3
    assert (found["GPUs"], found["batch per GPU"]) == (64, 16)
    assert found["training"] == pytest.approx(1238 * 300 * 1024 / (500 * 64) / 3600)
    assert found["data rate"] == pytest.approx(500 * 64 * 0.11)
    assert found["classes"] == 1000


def test_memory_adds_up():
    figures = plan_run(resolve("digits", ["ema_decay=0.9"]), Machine(gpus=2, memory_gb=0.01))
    found = values(figures)
    mb = {name.removeprefix("memory: "): value for name, value in found.items() if "memory: " in name}
    weights = 4 * 58_234 / 1e6
    assert mb["weights"] == mb["gradients"] == mb["average"] == mb["exchange"] == weights
    parts = ["weights", "gradients", "optimizer", "average", "exchange"]
    expected = sum(mb[part] for part in parts) + 16 * mb["activations"]
    assert mb["one GPU"] == pytest.approx(expected, rel=0.02)  # on top is what any number of images keeps
    assert found["fits"] == ("yes" if mb["one GPU"] <= 10 else "no")
    assert found["model file"] == weights
    assert found["training state"] == pytest.approx(2 * weights + mb["optimizer"])
    alone = values(plan_run(resolve("digits"), Machine()))
    assert alone["memory: exchange"] == alone["memory: average"] == 0
    assert alone["training"] is None


def test_pieces_of_a_batch_and_precision_save_memory():
    whole = values(plan_run(resolve("digits"), Machine()))
    pieces = values(plan_run(resolve("digits", ["engine.grad_accum=4"]), Machine()))
    fixed = whole["memory: one GPU"] - 32 * whole["memory: activations"]
    assert pieces["memory: one GPU"] == pytest.approx(8 * whole["memory: activations"] + fixed, abs=1e-6)
    half = values(plan_run(resolve("digits", ["engine.precision=bf16"]), Machine()))
    assert half["memory: activations"] < 0.9 * whole["memory: activations"]


def test_most_images_at_once_is_the_border(tmp_path):
    config = resolve("digits")
    found = values(plan_run(config, Machine()))
    total = found["memory: one GPU"]
    at = [values(plan_run(config, Machine(memory_gb=(total + slack) / 1000))) for slack in (-0.05, 0.05)]
    assert [plan["fits"] for plan in at] == ["no", "yes"]
    assert at[0]["most images at once"] < 32 <= at[1]["most images at once"]


def test_effective_values_of_data_that_is_there_and_of_data_that_is_not():
    found = values(effective(open_run(resolve("digits", ["augment.repeats=3"]))))
    assert found["training images"] == 1038
    assert (found["steps per epoch"], found["images per epoch"]) == (32, 1024)
    assert found["parameters"] == 58_234
    figures = effective(
        open_run(resolve("small_images", ["train_only=locality", "model.locality={init: preserve}"]))
    )
    missing = values(figures)
    assert missing["steps"] is missing["training images"] is None
    assert "data source 'DATA' does not exist" in str(named(figures, "training images"))
    assert missing["trainable parameters"] == 6 * 512 * 9 + 128 * 1000 + 1000


@pytest.mark.parametrize(
    ("settings", "machine", "images", "message"),
    [
        ([], {"gpus": 0}, None, "gpus=0 is not accepted; use 1 or more"),
        (
            [],
            {"images_per_second": -1.0},
            None,
            r"images_per_second=-1\.0 is not accepted; use a positive number",
        ),
        ([], {"images_per_second": float("nan")}, None, "images_per_second=nan is not accepted"),
        ([], {"memory_gb": 0.0}, None, r"memory_gb=0\.0 is not accepted"),
        ([], {"gpus": 5}, None, "batch_size=32 cannot be split into 5 equal microbatches"),
        (
            ["engine.grad_accum=5"],
            {"gpus": 2},
            None,
            "batch_size=32 cannot be split into 10 equal microbatches",
        ),
        (
            ["augment.mixup=0.8"],
            {"gpus": 32},
            None,
            "split into 32 equal microbatches of even size, for mixup",
        ),
        ([], {}, 20, "batch_size=32 does not fit 20 training images"),
        (["batch_size=2000"], {}, None, "batch_size=2000 does not fit 1038 training images"),
        (["data.train=nowhere"], {}, None, "data source 'nowhere' does not exist.*--images N"),
        (["model.name=deit_tny_patch16_224"], {}, None, "did you mean"),
        (["model.args.img_size=9"], {}, None, "9x9 is not divisible by the patch size"),
        (["distill.teacher=nowhere"], {}, None, "has no distillation token"),
        (["train_only=locality"], {}, None, "the model has no locality"),
    ],
)
def test_nonsense_is_refused(settings, machine, images, message):
    with pytest.raises(ConfigError, match=message) as caught:
        plan_run(resolve("digits", settings), Machine(**machine), images)
    assert "\n" not in str(caught.value)
