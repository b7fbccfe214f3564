import dataclasses
import io
import json

import numpy as np
import pytest
import torch
import yaml
from rich.console import Console
from timm.task import ClassificationTask

from localvit.config import TrainConfig, resolve as resolve_config
from localvit.data.images import UnreadableImage
from localvit.errors import ConfigError, TrainingFailed
from localvit.runtime import open_world
from localvit.structure import build
from localvit.training import loop
from localvit.training.loop import train
from localvit.training.run import prepare
from tests.images import export_model


def weights(result):
    return result.model.state_dict()


def same(first, second):
    return all(torch.equal(a, b) for a, b in zip(first.values(), second.values(), strict=True))


def untimed(history):
    return [
        {k: v for k, v in h.items() if k not in ("seconds", "images_per_second", "data_wait")}
        for h in history
    ]


@pytest.mark.parametrize("settings", [(), ("model.locality={}", "augment.mixup=0.8", "ema_decay=0.9")])
def test_the_same_configuration_gives_the_same_run(tiny, settings):
    first = train(tiny(*settings))
    torch.rand(5)  # whatever happened before does not matter
    second = train(tiny(*settings))
    assert untimed(first.history) == untimed(second.history)
    assert same(weights(first), weights(second))
    assert first.test.top1 == second.test.top1
    third = train(tiny(*settings, "seed=1"))
    assert not same(weights(first), weights(third))


def test_workers_do_not_change_the_result(tiny):
    assert same(weights(train(tiny())), weights(train(tiny("workers=2"))))


def batches_seen(monkeypatch, config):
    seen = []

    def spy(task, inputs, targets):
        seen.append((inputs.clone(), targets.clone()))
        return forward(task, inputs, targets)

    forward = ClassificationTask.forward
    monkeypatch.setattr(ClassificationTask, "forward", spy)
    train(config)
    monkeypatch.undo()
    return seen


def test_two_models_see_the_same_batches(tiny, monkeypatch):
    # Drop-path makes the models use random numbers, each in its own measure; mixup draws some too.
    shared = ("augment.mixup=0.8", "augment.cutmix=1.0", "model.args.drop_path_rate=0.5")
    np.random.seed(1)
    plain = batches_seen(monkeypatch, tiny(*shared))
    np.random.seed(2)  # mixup, cutmix and some transforms draw from NumPy's global state
    local = batches_seen(monkeypatch, tiny(*shared, "model.locality={}", "model.args.depth=3"))
    assert len(plain) == 2 * (1038 // 128)
    for (inputs, targets), (others, aims) in zip(plain, local, strict=True):
        assert torch.equal(inputs, others)
        assert torch.equal(targets, aims)
    assert targets.ndim == 2  # mixed


@pytest.mark.parametrize(
    "setting",
    [
        "model.name=deit_tny_patch16_224",
        "model.args.img_size=9",
        "model.args.embed_dm=9",
        "model.args.num_heads=7",
        "model.args.num_classes=5",
        "model.args.in_chans=2",
        "model.locality={gate: none, kernel_size: 3, expansion: 0.001}",
        "data.train=nowhere",
        "data.mean=[0.1, 0.2]",
        "batch_size=2000",
        "optim.name=adamm",
        "optim.args.betta=1",
        "device=tpu",
    ],
)
def test_what_cannot_work_fails_before_anything_is_written(tiny, tmp_path, setting):
    from localvit.data.config import DataError

    with pytest.raises((ConfigError, DataError)) as caught:
        train(tiny(setting, f"output={tmp_path / 'run'}"))
    assert not (tmp_path / "run").exists()
    assert "\n" not in str(caught.value)


def test_blocks_that_do_not_exist_are_refused(tiny):
    with pytest.raises(ConfigError, match="block"):
        train(tiny("model.locality={}", "model.blocks=[0, 9]"))


def test_layers_that_are_not_decayed():
    import timm

    from localvit.config.schema import OptimConfig
    from localvit.training.optim import build_optimizer

    model = timm.create_model("deit_tiny_patch16_224", depth=1, img_size=32)
    optimizer = build_optimizer(model, OptimConfig(weight_decay=0.1))
    names = {id(p): name for name, p in model.named_parameters()}
    decayed = {names[id(p)] for g in optimizer.param_groups if g["weight_decay"] for p in g["params"]}
    assert decayed == {
        "patch_embed.proj.weight",
        "blocks.0.attn.qkv.weight",
        "blocks.0.attn.proj.weight",
        "blocks.0.mlp.fc1.weight",
        "blocks.0.mlp.fc2.weight",
        "head.weight",
    }


def test_learning_rate_warms_up_and_decays(tiny):
    settings = ("epochs=6", "schedule.warmup_epochs=2", "schedule.min_lr=0", "optim.lr=1e-3")
    rates = [h["lr"] for h in train(tiny(*settings)).history]
    assert max(rates) == rates[1] <= 1e-3
    assert rates[0] == pytest.approx(0.5e-3, rel=0.01)
    assert rates[-1] < 1e-5


@pytest.mark.parametrize("name", ["cosine", "tanh", "poly", "wsd", "constant"])
def test_every_schedule_runs(tiny, name):
    rates = [h["lr"] for h in train(tiny("epochs=4", f"schedule.name={name}")).history]
    assert 3e-3 < rates[0] <= 4e-3  # after one epoch of warm-up, a quarter down the way of the schedule
    assert rates[-1] == (pytest.approx(4e-3) if name == "constant" else pytest.approx(1e-5, abs=3e-4))


def test_averaged_weights_are_the_ones_reported(tiny):
    plain, averaged = train(tiny()), train(tiny("ema_decay=0.99"))
    assert [h["train_loss"] for h in plain.history] == [h["train_loss"] for h in averaged.history]
    assert plain.history[-1]["validation_loss"] != averaged.history[-1]["validation_loss"]
    # With hardly any memory, the average is the model itself.
    short = train(tiny("ema_decay=1e-9"))
    assert short.history[-1]["validation_loss"] == pytest.approx(
        plain.history[-1]["validation_loss"], rel=1e-5
    )


def test_best_epoch_is_chosen_on_validation(tiny, monkeypatch):
    # Validation says that epoch 2 of 3 is best; the result must hold its weights and no others.
    real, seen = loop.measure, []

    def measure(model, loader, device, **options):
        metrics = real(model, loader, device, **options)
        if metrics.images != 259:
            return metrics
        seen.append({k: v.clone() for k, v in model.state_dict().items()})
        return dataclasses.replace(metrics, top1=[10.0, 90.0, 20.0][len(seen) - 1])

    monkeypatch.setattr(loop, "measure", measure)
    result = train(tiny("epochs=3"))
    assert result.best_epoch == 2
    assert result.validation.top1 == 90.0
    assert same(weights(result), seen[1])
    assert result.test.images == 500


def test_a_loss_that_is_no_number_stops_the_run(tiny, tmp_path):
    settings = ("optim.name=sgd", "optim.lr=1e30", f"output={tmp_path / 'run'}")
    with pytest.raises(TrainingFailed, match="loss became nan in epoch 1, step 3, at learning rate"):
        train(tiny(*settings))
    status = json.loads((tmp_path / "run" / "status.json").read_text())
    assert status["state"] == "failed"
    assert "TrainingFailed" in status["error"]


def test_interruption_is_recorded(tiny, tmp_path, monkeypatch):
    def stop(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr(loop.TrainingProgress, "epoch", stop)
    with pytest.raises(KeyboardInterrupt):
        train(tiny(f"output={tmp_path / 'run'}"))
    status = json.loads((tmp_path / "run" / "status.json").read_text())
    assert (status["state"], status["epochs_done"]) == ("interrupted", 1)


def test_a_corrupt_image_stops_training_with_its_name(tmp_path):
    from PIL import Image

    for label in "ab":
        (tmp_path / "data" / label).mkdir(parents=True)
        for i in range(20):
            Image.new("RGB", (8, 8), (i, 0, 0)).save(tmp_path / "data" / label / f"{i}.png")
    bad = tmp_path / "data" / "a" / "3.png"
    bad.write_bytes(bad.read_bytes()[:50])
    args = "{img_size: 8, patch_size: 4, embed_dim: 8, depth: 1, num_heads: 1}"
    config = resolve_config(
        settings=[f"data.train={tmp_path / 'data'}", f"model.args={args}", "batch_size=8", "epochs=6"]
    )
    with pytest.raises(UnreadableImage, match=str(bad)):
        train(config)


def test_output_folder_tells_the_whole_story(tiny, tmp_path):
    config = tiny(f"output={tmp_path / 'run'}")
    result = train(config)
    assert sorted(p.name for p in (tmp_path / "run").iterdir()) == [
        ".lock",
        "best",
        "config.yaml",
        "last",
        "manifest.json",
        "metrics.jsonl",
        "status.json",
    ]
    assert build(TrainConfig, yaml.safe_load((tmp_path / "run" / "config.yaml").read_text())) == config
    lines = (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()
    assert [json.loads(line) for line in lines] == result.history
    status = json.loads((tmp_path / "run" / "status.json").read_text())
    assert status["state"] == "finished"
    assert status["best"]["epoch"] == result.best_epoch
    assert status["test"] == dataclasses.asdict(result.test)
    assert status["notes"] == ["validation: 259 images held out from 'digits' (chosen by seed 0)"]
    assert set(status["versions"]) == {"localvit", "torch", "timm", "python"}


def test_digits_are_learned_in_a_few_epochs():
    settings = ["epochs=4", "schedule.warmup_epochs=1", "model.locality={}", "device=cpu", "batch_size=32"]
    assert train(resolve_config("digits", settings)).test.top1 > 80


def notes(config):
    with open_world("cpu") as world:
        return prepare(config, world).notes


@pytest.mark.parametrize("decay", [0.9, 0.99, 0.9999])
def test_an_average_that_stays_mostly_initial_is_named_with_its_share(tiny, decay):
    steps = 2 * (1038 // 128)
    said = [note for note in notes(tiny(f"ema_decay={decay}")) if "ema_decay" in note]
    assert len(said) == (decay**steps > 0.5)
    if said:
        assert f"after all {steps} steps, {100 * decay**steps:.0f}% of the averaged" in said[0]


@pytest.mark.parametrize(
    ("settings", "random"),
    [((), True), (("model.pretrained=true",), False), (("model.name=test_vit",), False)],
)
def test_random_weights_of_a_saved_model_are_named(tiny, tmp_path, settings, random):
    source = export_model(tmp_path, 10)
    own = ("model.args={img_size: 16, depth: 1, global_pool: avg}", f"model.name=local-dir:{source}")
    said = [note for note in notes(tiny(*own, *settings)) if "random weights" in note]
    assert [f"local-dir:{source}" in note for note in said] == [True] * random


def test_a_mapping_is_no_configuration():
    with pytest.raises(
        ConfigError, match=r"config={'epochs': 1} is not accepted; use a localvit\.TrainConfig"
    ):
        train({"epochs": 1})


def test_square_brackets_in_names_are_printed(tiny, tmp_path):
    source = export_model(tmp_path / "[/m]", 10)
    args = "model.args={img_size: 16, embed_dim: 16, depth: 1, num_heads: 2, global_pool: avg}"
    short = (args, "epochs=1", "schedule.warmup_epochs=0", f"output={tmp_path / '[/x]'}")
    config, text = tiny(f"model.name=local-dir:{source}", *short), io.StringIO()
    for _ in range(2):
        train(config, console=Console(file=text, width=1000))
    assert f"{source}: 0.00" in text.getvalue()
    assert f"{tmp_path}/[/x] already holds this run" in text.getvalue()
