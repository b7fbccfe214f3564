"""A file that holds PostScript must not start Ghostscript, whatever it is called and whoever reads it."""

import os
import tarfile
from pathlib import Path

import numpy as np
import pytest
from PIL import EpsImagePlugin
from torchvision.datasets import ImageFolder

from localvit.cli import main
from localvit.data.images import Part, TorchvisionImages, UnreadableImage, decode, decode_pixels
from localvit.data.loading import eval_loader, train_loader
from tests.images import PREPROCESSING, export_model, make_images

POSTSCRIPT = b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n%%EndComments\nshowpage\n"
TINY = [f"--set=model.args.{a}" for a in ("img_size=16", "patch_size=8", "embed_dim=16", "depth=1")]
TINY += ["--set=schedule.warmup_epochs=0", "--set=augment.crop=none", "--set=model.args.num_heads=2"]
TINY += ["--model=vit_tiny_patch16_224", "--batch-size=4", "--epochs=1"]


@pytest.fixture
def started(tmp_path, monkeypatch):
    """A file that is made when `gs` is started; Pillow has not looked for the program yet."""
    marker = tmp_path / "gs-was-started"
    program = tmp_path / "bin" / "gs"
    program.parent.mkdir()
    program.write_text(f"#!/bin/sh\ntouch {marker}\necho 10.0\n")
    program.chmod(0o755)
    monkeypatch.setenv("PATH", f"{program.parent}{os.pathsep}{os.environ['PATH']}")
    monkeypatch.setattr(EpsImagePlugin, "gs_binary", None)
    return marker


@pytest.fixture
def photos(tmp_path):
    """Two classes of six images; the first image of the first class is PostScript."""
    folder = Path(make_images(tmp_path / "images", {"a": 6, "b": 6}))
    (folder / "a" / "0.png").unlink()
    (folder / "a" / "0.jpg").write_bytes(POSTSCRIPT)
    return folder


def tarred(folder: Path) -> Path:
    with tarfile.open(folder.with_suffix(".tar"), "w") as tar:
        tar.add(folder, arcname="images")
    return folder.with_suffix(".tar")


def test_the_fake_program_is_found(started, tmp_path):
    """Otherwise the other tests would show nothing."""
    (tmp_path / "x.eps").write_bytes(POSTSCRIPT)
    assert EpsImagePlugin.has_ghostscript()
    assert started.exists()


def test_our_own_reading_does_not_start_it(started, tmp_path):
    (tmp_path / "x.jpg").write_bytes(POSTSCRIPT)
    with pytest.raises(UnreadableImage, match=r"x\.jpg': unknown format; accepted: .*JPEG.*PNG"):
        decode(str(tmp_path / "x.jpg"), "x.jpg")
    with pytest.raises(UnreadableImage, match=r"x\.jpg': unknown format"):
        decode_pixels(POSTSCRIPT, "x.jpg", "RGB")
    assert not started.exists()


@pytest.mark.parametrize("source", ["folder", "tar"])
@pytest.mark.parametrize("workers", [0, 1])
def test_training_does_not_start_it(started, photos, tmp_path, source, workers):
    data = photos if source == "folder" else tarred(photos)
    command = ["train", *TINY, "--data", str(data), "--output", str(tmp_path / "run"), "--device", "cpu"]
    assert main([*command, "--workers", str(workers)]) != 2
    assert (tmp_path / "run" / "config.yaml").exists()
    assert not started.exists()


@pytest.mark.parametrize("source", ["folder", "tar"])
@pytest.mark.parametrize("workers", [0, 1])
def test_evaluation_does_not_start_it(started, photos, tmp_path, source, workers, capsys):
    data = photos if source == "folder" else tarred(photos)
    model = export_model(tmp_path / "model", 2, ["a", "b"])
    command = ["evaluate", "--checkpoint", model, "--data", str(data), "--device", "cpu"]
    assert main([*command, "--workers", str(workers)]) == 1
    assert "0.jpg': unknown format; accepted:" in capsys.readouterr().err
    assert not started.exists()


@pytest.mark.parametrize("workers", [0, 1])
def test_prediction_does_not_start_it(started, photos, tmp_path, workers, capsys):
    model = export_model(tmp_path / "model", 2, ["a", "b"])
    (tmp_path / "drawing.eps").write_bytes(POSTSCRIPT)
    command = ["predict", "--checkpoint", model, "--device", "cpu", "--workers", str(workers)]
    assert main([*command, str(photos), str(tmp_path / "drawing.eps")]) == 0
    assert "2 of 13 files have no prediction" in capsys.readouterr().err
    assert not started.exists()


def test_export_does_not_start_it(started, photos, tmp_path):
    model = export_model(tmp_path / "model", 2, ["a", "b"])
    command = ["export", f"local-dir:{model}", "--format", "torch", "--data", str(photos)]
    assert main([*command, "--output", str(tmp_path / "model.pt2")]) == 1
    assert not started.exists()


@pytest.mark.parametrize("method", ["fork", "spawn"])
@pytest.mark.parametrize("training", [True, False])
def test_readers_that_are_not_ours_do_not_start_it_in_a_data_worker(started, photos, method, training):
    from localvit.data.config import AugmentConfig

    images = TorchvisionImages(ImageFolder(str(photos)), "torch/folder")
    part = Part(images, np.arange(len(images)), images.class_names)
    if training:
        loader = train_loader(part, AugmentConfig(), PREPROCESSING, batch_size=12, seed=0, workers=1)
    else:
        loader = eval_loader(part, PREPROCESSING, batch_size=12, workers=1)
    loader.multiprocessing_context = method
    (batch,) = loader
    assert list(batch.unreadable) == [0]
    assert not started.exists()


def test_readers_that_are_not_ours_do_not_start_it_in_the_command_line(started, photos):
    assert main(["models", "nowhere"]) == 2
    images = TorchvisionImages(ImageFolder(str(photos)), "torch/folder")
    with pytest.raises(UnreadableImage, match="Unable to locate Ghostscript"):
        images[0]
    assert not started.exists()


def test_workers_and_jobs_of_a_study_do_not_start_it(started, monkeypatch, tmp_path):
    from localvit.studies.execution import cluster, run

    monkeypatch.setattr(run.threading.Thread, "start", lambda self: None)  # it would wait for a parent
    monkeypatch.setattr(run.signal, "signal", lambda *_: None)
    run._start_worker(0, 1, dict(os.environ))
    assert not EpsImagePlugin.has_ghostscript()
    monkeypatch.setattr(EpsImagePlugin, "gs_binary", None)
    (tmp_path / cluster.RECORD).touch()  # the job has nothing left to do
    monkeypatch.setattr("submitit.JobEnvironment.USR_SIG", "USR2")
    cluster.Task(None, tmp_path, 1)()
    assert not EpsImagePlugin.has_ghostscript()
    assert not started.exists()
