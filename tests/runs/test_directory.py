import io
import os
from pathlib import Path

import pytest
import timm
import torch
from rich.console import Console

from localvit.atomic import move_into_place, write_atomically
from localvit.data.config import DataConfig
from localvit.errors import ConfigError
from localvit.models.build import build_model, preprocessing_for
from localvit.runs import directory as output
from localvit.runs.directory import RunDirectory
from localvit.training.loop import train
from tests.images import make_images


@pytest.fixture
def folder(tiny, tmp_path):
    with RunDirectory.open(tiny(f"output={tmp_path / 'run'}")) as folder:
        folder.claim("some")
        yield folder


@pytest.mark.parametrize("locality", ["null", "{}"])
def test_saved_model_gives_the_same_logits_through_timm(tiny, tmp_path, locality):
    result = train(tiny("epochs=2", f"output={tmp_path / 'run'}", f"model.locality={locality}"))
    loaded = timm.create_model(f"local-dir:{tmp_path / 'run' / 'best'}", pretrained=True).eval()
    images = torch.rand(4, 1, 8, 8)
    with torch.no_grad():
        assert torch.equal(loaded(images), result.model(images))
    assert loaded.pretrained_cfg["label_names"] == [str(i) for i in range(10)]
    assert loaded.pretrained_cfg["mean"] == (0.305,) or loaded.pretrained_cfg["mean"] == [0.305]


def test_a_folder_with_a_run_is_refused_and_left_alone(tiny, tmp_path):
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "metrics.jsonl").write_text("precious")
    with pytest.raises(ConfigError, match=r"already holds a run \(metrics\.jsonl\)"):
        train(tiny(f"output={tmp_path / 'run'}"))
    assert [p.name for p in (tmp_path / "run").iterdir()] == ["metrics.jsonl"]


def test_output_that_is_a_file_is_refused(tiny, tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(ConfigError, match="is not a writable folder"):
        train(tiny(f"output={tmp_path / 'file'}"))
    with pytest.raises(ConfigError, match="is not a writable folder"):
        train(tiny(f"output={tmp_path / 'file' / 'run'}"))


def test_output_among_the_images_is_refused(tiny, tmp_path):
    folder = Path(make_images(tmp_path / "images", {"a": 10, "b": 10}))
    for place in (folder, folder / "a", folder / "run"):
        with pytest.raises(ConfigError, match="is in the folder of images"):
            train(tiny(f"data.train={folder}", f"output={place}"))
    assert sorted(path.name for path in folder.iterdir()) == ["a", "b"]


def test_a_finished_run_of_other_images(tiny, tmp_path):
    """The same command must not report the result of other images as theirs."""
    folder, output = Path(make_images(tmp_path / "images", {"a": 30, "b": 30})), tmp_path / "run"
    config, text = tiny(f"data.train={folder}", f"output={output}", "batch_size=8"), io.StringIO()
    result = train(config)
    next((folder / "a").iterdir()).unlink()
    before = {path: path.read_bytes() for path in output.rglob("*") if path.is_file()}
    with pytest.raises(ConfigError, match="holds a finished run, which differs from this one \\(data: "):
        train(config)
    folder.rename(tmp_path / "elsewhere")
    assert train(config, console=Console(file=text, width=1000)).test == result.test
    assert "finished: best epoch" in text.getvalue()
    assert "its data could not be compared: data source" in text.getvalue()
    assert {path: path.read_bytes() for path in output.rglob("*") if path.is_file()} == before


class Killed(BaseException):
    """Stands for kill -9: nothing that follows is run, except what `finally` does here."""


def kill(*_args, **_kwargs):
    raise Killed


def test_killed_before_the_rename_a_file_is_whole(tmp_path, monkeypatch):
    path = tmp_path / "status.json"
    write_atomically(path, "old")
    monkeypatch.setattr(os, "replace", kill)
    with pytest.raises(Killed):
        write_atomically(path, "new and longer")
    assert path.read_text() == "old"
    assert [p.name for p in tmp_path.iterdir()] == ["status.json"]


def test_killed_while_saving_a_model_the_old_one_is_whole(tiny, folder, monkeypatch):
    run = output_of(tiny)
    folder.save_model("best", *run)
    before = (folder.path / "best" / "model.safetensors").read_bytes()
    with torch.no_grad():
        run[0].head.bias.add_(1)
    monkeypatch.setattr(output, "move_into_place", kill)
    with pytest.raises(Killed):
        folder.save_model("best", *run)
    assert (folder.path / "best" / "model.safetensors").read_bytes() == before
    assert not list(folder.path.glob(".best-*"))
    monkeypatch.undo()
    folder.save_model("best", *run)
    assert (folder.path / "best" / "model.safetensors").read_bytes() != before


def test_killed_between_two_files_all_files_are_whole(tmp_path, monkeypatch):
    for name in ("best", "new"):
        (tmp_path / name).mkdir()
        for file in ("config.json", "model.safetensors"):
            (tmp_path / name / file).write_text(name)
    real, calls = os.replace, []

    def replace(source, target):
        if calls:
            raise Killed
        calls.append(source)
        real(source, target)

    monkeypatch.setattr(os, "replace", replace)
    with pytest.raises(Killed):
        move_into_place(tmp_path / "new", tmp_path / "best")
    assert sorted((tmp_path / "best" / f).read_text() for f in ("config.json", "model.safetensors")) == [
        "best",
        "new",
    ]


def output_of(tiny):
    config = tiny()
    model = build_model(config.model, 10)
    return model, preprocessing_for(model, config.data), [str(i) for i in range(10)]


@pytest.mark.parametrize("dynamic", [False, True])
@pytest.mark.parametrize(
    ("name", "args"),
    [
        ("deit_tiny_patch16_224", {"depth": 1}),
        ("pvt_tiny", {"depths": [1, 1, 1, 1]}),
        ("t2t_vit_7", {"depth": 1}),
    ],
)
def test_images_have_the_size_that_the_model_was_built_for(name, args, dynamic):
    model = timm.create_model(name, img_size=(64, 96), in_chans=1, dynamic_img_size=dynamic, **args)
    assert preprocessing_for(model, DataConfig()).input_size == (1, 64, 96)
