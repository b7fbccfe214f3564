"""Precision, memory and batch norm: each option does what it says, and nothing else."""

import copy
import sys
import types

import pytest
import timm
import torch
from safetensors.torch import load_file
from torch import nn

from localvit.config.files import resolve
from localvit.config.schema import EngineConfig
from localvit.errors import ConfigError
from localvit.inference import open_model
from localvit.runtime.distributed import World
from localvit.training.callbacks import Callback, TensorBoard
from localvit.training.engine import LossWatch, deterministic, place_model
from localvit.training.loop import train
from localvit.training.run import prepare
from tests.training.runs import CASES, status, stop_after

ALONE = World(device=torch.device("cpu"))


def engine_of(config, seed=0):
    """The engine of a run, and one batch for it."""
    run = prepare(config, ALONE)
    run.engine.train()
    return run.engine, *run.inputs(next(iter(run.train)))


def gradients(config):
    engine, images, targets = engine_of(config)
    loss = engine.backward(images, targets)
    return loss, {name: p.grad.clone() for name, p in engine.model.named_parameters()}


def test_pieces_have_the_gradient_of_the_whole(tiny):
    settings = ("model.locality={norm: none}", "augment.mixup=0.8")
    loss, whole = gradients(tiny(*settings))
    for pieces in (2, 4):
        pieced_loss, pieced = gradients(tiny(*settings, f"engine.grad_accum={pieces}"))
        assert pieced_loss == pytest.approx(loss.item(), rel=1e-6)
        for name in whole:
            assert torch.allclose(pieced[name], whole[name], rtol=1e-4, atol=1e-7), name


def norm(engine):
    return torch.stack([p.grad.norm() for p in engine.model.parameters()]).norm().item()


def test_gradients_are_clipped_by_their_common_norm(tiny):
    for limit, factor in ((1e-3, None), (1e9, 1.0)):
        engine, images, targets = engine_of(tiny(f"engine.clip_grad={limit}"))
        engine.backward(images, targets)
        before = norm(engine)
        engine.step(1)
        expected = before if factor else limit
        assert norm(engine) == pytest.approx(expected, rel=1e-3)


def test_bf16_computes_in_bf16_and_keeps_weights(tiny):
    seen = []
    engine, images, targets = engine_of(tiny("engine.precision=bf16"))
    engine.model.head.register_forward_hook(lambda _m, _i, output: seen.append(output.dtype))
    loss = engine.backward(images, targets)
    assert seen == [torch.bfloat16]
    assert {p.dtype for p in engine.model.parameters()} == {torch.float32}
    plain, others, aims = engine_of(tiny())
    exact = plain.backward(others, aims)
    assert loss.item() != exact.item()
    assert loss.item() == pytest.approx(exact.item(), rel=0.02)
    assert train(tiny("engine.precision=bf16", "epochs=2")).history[-1]["train_loss"] < 2.3


@pytest.mark.parametrize("norm", ["frozen", "average"])
def test_frozen_batch_norm_keeps_statistics_and_learns_its_scale(tiny, norm):
    config = tiny("model.locality={}", f"engine.batch_norm={norm}")
    engine, images, targets = engine_of(config)
    before = copy.deepcopy(engine.model.state_dict())
    for number in (1, 2, 3):
        engine.backward(images, targets)
        engine.step(number)
    after = engine.model.state_dict()
    for name in before:
        moved = not torch.equal(before[name], after[name])
        if name.endswith(("running_mean", "running_var", "num_batches_tracked")):
            assert moved == (norm == "average"), name
    assert not torch.equal(before["blocks.0.mlp.norm1.weight"], after["blocks.0.mlp.norm1.weight"])
    if norm == "frozen":  # an image does not depend on the rest of its batch
        with torch.no_grad():
            assert torch.allclose(engine.model(images)[:3], engine.model(images[:3]), atol=1e-5)


def test_the_average_has_the_statistics_of_batch_norm_too(tiny):
    config = tiny("model.locality={}", "ema_decay=0.75")
    engine, images, targets = engine_of(config)
    expected = None
    for number in (1, 2, 3, 4):
        engine.backward(images, targets)
        engine.step(number)
        now = {name: value.double() for name, value in engine.model.state_dict().items()}
        if expected is None:  # timm takes over the model with the first update
            expected = now
        else:
            expected = {name: 0.75 * old + 0.25 * now[name] for name, old in expected.items()}
    average = engine.average.state_dict()
    assert any(name.endswith("running_var") for name in average)
    for name, value in average.items():
        if name.endswith("num_batches_tracked"):
            assert value == engine.model.state_dict()[name]
        else:
            assert torch.allclose(value.double(), expected[name], rtol=1e-5, atol=1e-7), name


@pytest.mark.parametrize(
    "option", ["channels_last", "grad_checkpointing", "selective_checkpointing", "deterministic"]
)
def test_options_for_speed_and_memory_do_not_change_the_gradient(tiny, option):
    config = tiny("model.locality={}", f"engine.{option}=true")
    calls = []
    with deterministic(config.engine):
        engine, images, targets = engine_of(config)
        engine.model.blocks[0].register_forward_pre_hook(lambda *_: calls.append(1))
        loss = engine.backward(images, targets)
        assert torch.are_deterministic_algorithms_enabled() == (option == "deterministic")
    assert not torch.are_deterministic_algorithms_enabled()
    assert len(calls) == (2 if option == "grad_checkpointing" else 1)  # once more in the backward pass
    plain_loss, plain = gradients(tiny("model.locality={}"))
    assert loss.item() == pytest.approx(plain_loss.item(), rel=1e-5)
    for name, parameter in engine.model.named_parameters():
        assert torch.allclose(parameter.grad, plain[name], rtol=1e-3, atol=1e-6), name
    if option == "channels_last":
        assert engine.model.patch_embed.proj.weight.is_contiguous(memory_format=torch.channels_last)


@pytest.mark.parametrize("more", [(), ("ema_decay=0.9",)])
def test_a_channels_last_model_is_saved_as_it_is(tiny, tmp_path, more):
    short = ("epochs=1", "schedule.warmup_epochs=0", "model.args.depth=1", f"output={tmp_path / 'run'}")
    trained = train(tiny("engine.channels_last=true", "model.locality={}", *short, *more)).model.state_dict()
    saved = open_model(tmp_path / "run", "cpu").model.state_dict()
    assert saved.keys() == trained.keys()
    assert all(torch.equal(saved[key], trained[key]) for key in saved)


def test_a_compiled_model_is_saved_under_its_plain_names(tiny, tmp_path, monkeypatch):
    compiled, real = [], torch.compile
    # Without code generation, which takes a minute: what is tested is the wrapper.
    monkeypatch.setattr(
        torch, "compile", lambda model, **_: (compiled.append(1), real(model, backend="eager"))[1]
    )
    torch._dynamo.reset()
    settings = ("engine.compile=true", "model.locality={}", "save_seconds=0")
    folders = [tmp_path / "one", tmp_path / "two"]
    for folder in folders:
        whole = tiny(*settings, f"output={folder}")
        if folder == folders[1]:
            stop_after(monkeypatch, whole, 11)
        train(whole)
    assert compiled
    one, two = (load_file(folder / "best" / "model.safetensors") for folder in folders)
    assert all(torch.equal(one[name], two[name]) for name in one)
    assert not any("_orig_mod" in name for name in one)
    timm.create_model(f"local-dir:{folders[0] / 'best'}", pretrained=True)


def test_what_the_model_or_the_machine_lacks_is_refused(tiny, monkeypatch):
    with pytest.raises(ConfigError, match=r"engine\.precision='fp16' is not accepted on a CPU"):
        prepare(tiny("engine.precision=fp16"), ALONE)
    plain = nn.Sequential(nn.Flatten(), nn.Linear(64, 10))
    with pytest.raises(ConfigError, match="the model does not support it"):
        place_model(plain, EngineConfig(grad_checkpointing=True), ALONE)
    with pytest.raises(ConfigError, match="the model has no locality"):
        place_model(plain, EngineConfig(selective_checkpointing=True), ALONE)


@pytest.mark.parametrize(
    ("setting", "message"),
    [
        ("engine.precision=fp8", r"engine\.precision: 'fp8' is not accepted; use 'fp32', 'bf16' or 'fp16'"),
        ("engine.grad_accum=0", r"engine\.grad_accum=0 is not accepted; use at least 1"),
        ("engine.clip_grad=0", r"engine\.clip_grad=0\.0 is not accepted"),
        ("engine.batch_norm=global", r"engine\.batch_norm: 'global' is not accepted; use 'local'"),
        ("save_seconds=-1", r"save_seconds=-1\.0 is not accepted; use at least 0"),
        ("max_bad_images=-1", r"max_bad_images=-1 is not accepted; use at least 0"),
    ],
)
def test_values_that_cannot_be_are_refused(setting, message):
    with pytest.raises(ConfigError, match=message):
        resolve(settings=[setting])


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_on_a_gpu_a_loss_that_is_no_number_is_found_one_update_later():
    watch = LossWatch()
    losses = [torch.tensor(value, device="cuda") for value in (1.0, float("nan"), 2.0)]
    found = [watch.look(loss, number) for number, loss in enumerate(losses)]
    assert found[:2] == [None, None]
    assert found[2][1] == 1
    assert watch.flush() is None


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("precision", ["fp32", "bf16", "fp16"])
def test_on_a_gpu_runs_go_on(tiny, tmp_path, monkeypatch, precision):
    config = tiny(*CASES["average"], "device=cuda", f"engine.precision={precision}", f"output={tmp_path}")
    stop_after(monkeypatch, config, 5)
    assert train(config).test.images == 500


class Writer:
    """Stands for TensorBoard's writer."""

    def __init__(self, folder, purge_step):
        self.folder, self.purge_step, self.scalars = folder, purge_step, []
        made.append(self)

    def add_text(self, *_):
        pass

    def add_scalar(self, name, value, step):
        self.scalars.append((name, value, step))

    def flush(self):
        pass

    def close(self):
        self.scalars.append("closed")


made = []


def test_curves_go_to_tensorboard_and_go_on_where_they_were(tiny, tmp_path, monkeypatch):
    fake = types.ModuleType("torch.utils.tensorboard")
    fake.SummaryWriter = Writer
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", fake)
    made.clear()
    config = tiny("save_seconds=0", f"output={tmp_path / 'run'}")
    stop_after(monkeypatch, config, 11)
    result = train(config, callbacks=[TensorBoard()])
    (writer,) = made
    assert writer.folder == str(tmp_path / "run" / "tensorboard")
    assert writer.purge_step == 2
    assert ("train_loss", result.history[1]["train_loss"], 2) in writer.scalars
    assert {step for _, _, step in writer.scalars[:-1]} == {2}
    assert writer.scalars[-1] == "closed"


def test_curves_can_be_read_back(tiny, tmp_path):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    result = train(tiny(f"output={tmp_path / 'run'}"), callbacks=[TensorBoard()])
    events = EventAccumulator(str(tmp_path / "run" / "tensorboard"))
    events.Reload()
    assert [e.value for e in events.Scalars("lr")] == pytest.approx([h["lr"] for h in result.history])


def test_without_tensorboard_it_says_what_to_install(tmp_path, monkeypatch, capsys):
    from localvit.cli import main

    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", None)
    arguments = ["--recipe", "digits", "--output", str(tmp_path / "run"), "--tensorboard"]
    assert main(["train", *arguments]) == 2
    assert "pip install 'localvit[tracking]'" in capsys.readouterr().err
    assert not (tmp_path / "run").exists()


def test_an_error_of_a_callback_ends_the_run_as_failed(tiny, tmp_path):
    class Broken(Callback):
        def on_epoch(self, metrics):
            raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        train(tiny(f"output={tmp_path / 'run'}"), callbacks=[Broken()])
    assert status(tmp_path / "run")["state"] == "failed"
