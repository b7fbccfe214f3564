"""Folders of localized models of transformers."""

import json

import pytest
import torch

import localvit
from localvit import ConfigError, LocalityConfig, hf
from tests.surgery.test_hf import CASES, transformers

NAMES = ["vit classifier", "dinov2 gated", "swin v2 backbone", "segformer segmentation", "timm classifier"]


def _localized(name: str, **config: object) -> torch.nn.Module:
    model = CASES[name].make().eval()
    localvit.localize(model, LocalityConfig(**config), blocks=[1], count_macs=False)
    with torch.no_grad():
        for _, parameter in localvit.locality_parameters(model):
            parameter.normal_(std=0.1)
    return model


def _outputs(model: torch.nn.Module, images: torch.Tensor) -> list[torch.Tensor]:
    with torch.no_grad():
        outputs = model(images).to_tuple()
    return [t for o in outputs for t in (o if isinstance(o, tuple) else (o,))]


@pytest.mark.parametrize("init", ["preserve", "paper"])
@pytest.mark.parametrize("name", NAMES)
def test_a_saved_model_comes_back(name, init, tmp_path):
    if init == "paper" and name == "swin v2 backbone":
        pytest.skip("its FFNs are no modules")
    model, images = _localized(name, init=init), CASES[name].images()
    hf.save_pretrained(model, tmp_path / "saved")
    again = hf.from_pretrained(tmp_path / "saved")
    assert type(again) is type(model)
    assert all(map(torch.equal, _outputs(again, images), _outputs(model, images)))
    assert again.localization.plan.blocks == (1,)


def test_the_dtype_comes_back(tmp_path):
    model = _localized("vit", init="preserve").to(torch.bfloat16)
    hf.save_pretrained(model, tmp_path / "saved")
    again = hf.from_pretrained(tmp_path / "saved")
    assert {p.dtype for p in again.parameters()} == {torch.bfloat16}
    assert torch.equal(again.layernorm.weight, model.layernorm.weight)


def test_bad_folders_are_refused(tmp_path):
    plain, local = CASES["vit"].make(), _localized("vit", init="preserve")
    with pytest.raises(ConfigError, match="not a localized model of transformers"):
        hf.save_pretrained(plain, tmp_path / "a")
    hf.save_pretrained(local, tmp_path / "a")
    with pytest.raises(ConfigError, match="has files already"):
        hf.save_pretrained(local, tmp_path / "a")
    with pytest.raises(ConfigError, match=r"has no config\.json"):
        hf.from_pretrained(tmp_path / "b")
    plain.save_pretrained(tmp_path / "b")
    with pytest.raises(ConfigError, match="has no recipe"):
        hf.from_pretrained(tmp_path / "b")
    config = json.loads((tmp_path / "a/config.json").read_text())
    for change, message in (
        ({"architectures": ["Trainer"]}, "architectures='Trainer'"),
        ({"localvit": {**config["localvit"], "blocks": [0, 1]}}, "do not fit"),
        ({"localvit": {**config["localvit"], "locality": {"initt": 1}}}, "initt"),
    ):
        (tmp_path / "a/config.json").write_text(json.dumps({**config, **change}))
        with pytest.raises(ConfigError, match=message):
            hf.from_pretrained(tmp_path / "a")


def test_it_trains_in_trainer(tmp_path):
    pytest.importorskip("accelerate")
    model = _localized("vit classifier", init="preserve")
    images = CASES["vit classifier"].images(4)
    data = [{"pixel_values": image, "labels": i} for i, image in enumerate(images)]
    arguments = transformers.TrainingArguments(
        str(tmp_path / "run"), max_steps=2, save_steps=1, report_to=[], use_cpu=True, disable_tqdm=True
    )
    before = {name: p.clone() for name, p in localvit.locality_parameters(model)}
    trainer = transformers.Trainer(model, arguments, train_dataset=data)
    trainer.train()
    dead = set(model.localization.plan.dead_parameters)
    moved = {n for n, p in localvit.locality_parameters(model) if not torch.equal(p, before[n])}
    assert moved == set(before) - dead
    hf.save_pretrained(trainer.model, tmp_path / "saved")
    again = hf.from_pretrained(tmp_path / "saved")
    expected = model.eval()(images).logits
    assert torch.equal(again(images).logits, expected)
    trainer.train(resume_from_checkpoint=str(tmp_path / "run/checkpoint-1"))
    torch.testing.assert_close(model.eval()(images).logits, expected)
