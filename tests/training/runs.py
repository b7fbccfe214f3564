"""Helpers of the tests of resuming: a run with everything random in it, ways to end it, and a comparison."""

import json
import multiprocessing
import os
import signal
import time
from contextlib import contextmanager

import torch

from localvit.errors import TrainingInterrupted
from localvit.training import loop, run
from localvit.training.engine import TrainingEngine
from localvit.training.loop import train

# Mixup and cutmix draw from NumPy, drop-path and dropout from torch; batch norm and the average have states.
TOUGH = [
    "augment.mixup=0.8",
    "augment.cutmix=1.0",
    "model.args.drop_path_rate=0.3",
    "model.args.proj_drop_rate=0.1",
    "model.locality={}",
    "ema_decay=0.9",
    "save_seconds=0",
]


@contextmanager
def double_precision():
    """Train in double precision, where two orders of a sum agree to twelve digits."""
    build = run.build_model

    def build_double(*arguments):
        torch.set_default_dtype(torch.float32)  # which costs are counted in
        model = build(*arguments).double()
        torch.set_default_dtype(torch.float64)
        return model

    run.build_model = build_double
    try:
        yield
    finally:
        run.build_model = build
        torch.set_default_dtype(torch.float32)


def story(folder):
    """Everything that a run leaves and that should not depend on how often it was ended."""
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    status = json.loads((folder / "status.json").read_text())
    assert status["state"] == "finished"
    for timed in (*lines, status["test"], status["best"]["validation"]):
        timed.pop("images_per_second")
        timed.pop("seconds", None)
        timed.pop("data_wait", None)
    return {
        "metrics": lines,
        "test": status["test"],
        "chosen": status["best"],
        **{name: (folder / name / "model.safetensors").read_bytes() for name in ("best", "last")},
    }


def status(folder):
    return json.loads((folder / "status.json").read_text())


def states(folder):
    return sorted(path.name for path in (folder / "state").glob("*.state"))


def updates_saved(folder):
    """Updates of the newest state."""
    names = states(folder)
    return int(names[-1].removeprefix("step-").removesuffix(".state")) if names else 0


def stop_after(monkeypatch, config, updates):
    """Train, and be interrupted after so many updates."""
    step, done = TrainingEngine.step, []
    with monkeypatch.context() as patch:
        patch.setattr(TrainingEngine, "step", lambda engine, number: (step(engine, number), done.append(1)))
        patch.setattr(loop, "stop_requested", lambda: len(done) >= updates - 1)
        try:
            train(config)
        except TrainingInterrupted:
            return
    raise AssertionError("the run was over before")


def start(config):
    """Start a process that trains; forked where that works, so that it need not import torch again."""
    process = multiprocessing.get_context("fork" if _forks_can_train() else "spawn").Process(
        target=train, args=(config,)
    )
    process.start()
    return process


def _forks_can_train():
    """Return whether a fork of this process can run a backward pass, which compilation here prevents."""
    child = os.fork()
    if child == 0:
        try:
            torch.ones(1, requires_grad=True).sum().backward()
            os._exit(0)
        except RuntimeError:
            os._exit(1)
    return os.waitpid(child, 0)[1] == 0


def kill_after(config, folder, updates):
    """Train in another process until so many updates are saved, and kill it; returns whether it was alive."""
    process = start(config)
    while process.is_alive() and updates_saved(folder) < updates:
        time.sleep(0.002)
    alive = process.is_alive()
    os.kill(process.pid, signal.SIGKILL)
    process.join()
    return alive


_SMALL = [
    *("model.args.embed_dim=24", "model.args.depth=2", "model.args.num_heads=2", "device=cpu", "epochs=1"),
    *("batch_size=104", "schedule.warmup_epochs=0", "augment.mixup=0.8", "augment.cutmix=1.0"),
    *("ema_decay=0.9", "engine.clip_grad=1.0", "save_seconds=0"),
]
# For one process and for two: equal if no process sees statistics of its share alone.
CASES = {
    "none": [*_SMALL, "model.locality={norm: none}"],
    "frozen": [*_SMALL, "model.locality={}", "engine.batch_norm=frozen"],
    "average": [*_SMALL, "model.locality={}", "model.args.drop_path_rate=0.3"],
}
