"""Program that `test_distributed.py` starts by `torchrun`: both processes run it.

Arguments: ``equality FOLDER`` or ``elastic FOLDER CONFIG``.
"""

import os
import signal
import sys
from datetime import timedelta
from pathlib import Path

import pytest
import torch
from torch import distributed as dist

from localvit.cli import main
from localvit.config.files import resolve
from localvit.data.config import DataConfig, DataError
from localvit.data.images import Part
from localvit.data.loading import eval_loader
from localvit.evaluation.evaluation import measure
from localvit.evaluation.reported import open_equal_splits
from localvit.runtime import distributed
from localvit.runtime.distributed import open_world
from localvit.training.engine import TrainingEngine
from localvit.training.loop import train
from localvit.training.run import prepare
from tests.training.runs import CASES, double_precision, stop_after


def equality(folder):
    """Train every case, one of them in two parts; results are compared by the test that started this."""
    # Once for all: `train` uses what is there.
    dist.init_process_group("gloo", timeout=distributed.TIMEOUT)
    for name, settings in CASES.items():
        train(resolve("digits", [*settings, f"output={folder / name}"]))
    cut = [*CASES["average"], f"output={folder / 'cut'}"]
    stop_after(pytest.MonkeyPatch(), resolve("digits", cut), 5)
    train(resolve("digits", cut))
    stop_after(pytest.MonkeyPatch(), resolve("digits", [*CASES["none"], f"output={folder / 'fewer'}"]), 5)
    check_statistics()
    check_counting()
    check_data()
    dist.destroy_process_group()


def check_statistics():
    """Running statistics are averaged, or the first process's, in the model and in its average."""
    for mode, expected in (("average", 1.5), ("local", 1.0)):
        with open_world("cpu") as world:
            run = prepare(resolve("digits", [*CASES["average"], f"engine.batch_norm={mode}"]), world)
        for model in (run.engine.model, run.engine.average):
            name = next(name for name in model.state_dict() if name.endswith("running_mean"))
            model.state_dict()[name].fill_(dist.get_rank() + 1.0)
        run.engine.share_statistics()
        for model in (run.engine.model, run.engine.average):
            assert model.state_dict()[name].eq(expected).all(), (mode, model.state_dict()[name])


def check_counting():
    """Every image counts once, also if there are fewer than processes."""
    with open_world("cpu") as world:
        run = prepare(resolve("digits", CASES["none"]), world)
    part = run.splits.test
    for size in (1, 2, 7):
        few = Part(part.images, part.indices[:size], part.class_names)
        shares = {"rank": world.rank, "world_size": world.size}
        counted = measure(
            run.engine.evaluated,
            eval_loader(few, run.preprocessing, batch_size=4, **shares),
            world.device,
            distributed=True,
        )
        alone = measure(run.engine.evaluated, eval_loader(few, run.preprocessing, batch_size=4), world.device)
        assert counted.images == alone.images == size
        assert (counted.top1, counted.top5) == (alone.top1, alone.top5)
        assert abs(counted.loss - alone.loss) < 1e-12


def check_data():
    """Processes that have other images are refused, in all of them."""
    with (
        open_world("cpu") as world,
        pytest.raises(DataError, match="the processes have different images: '1"),
    ):
        open_equal_splits(DataConfig(holdout=0.1 + world.rank / 10), 0, world)


def elastic(folder, config):
    """Train by the command line; the second process kills itself once, after 5 updates."""
    step, done = TrainingEngine.step, []

    def deadly(engine, number):
        step(engine, number)
        done.append(1)
        if dist.get_rank() == 1 and len(done) == 5 and not (folder / "killed").exists():
            (folder / "killed").write_text("")
            os.kill(os.getpid(), signal.SIGKILL)

    TrainingEngine.step = deadly
    return main(["train", "--recipe", config])


if __name__ == "__main__":
    torch.set_num_threads(1)
    distributed.TIMEOUT = timedelta(seconds=60)
    with double_precision():
        if sys.argv[1] == "equality":
            equality(Path(sys.argv[2]))
        else:
            raise SystemExit(elastic(Path(sys.argv[2]), sys.argv[3]))
