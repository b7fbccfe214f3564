"""Folders of localized models of transformers."""

import functools
import json

import pytest
import timm
import torch
from timm.models import vision_transformer

import localvit
from localvit import ConfigError, LocalityConfig, hf
from tests.surgery.test_hf import CASES, transformers

NAMES = ["vit classifier", "dinov2 gated", "swin v2 backbone", "segformer segmentation", "timm classifier"]
NO_MODULES = ("swin v2 backbone", "paper")


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


@pytest.mark.parametrize(
    ("name", "init"),
    [(name, init) for name in NAMES for init in ("preserve", "paper") if (name, init) != NO_MODULES],
)
def test_a_saved_model_comes_back(name, init, tmp_path):
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
    with pytest.raises(ConfigError, match="already has files"):
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
        str(tmp_path / "run"), max_steps=2, save_strategy="no", report_to=[], use_cpu=True, disable_tqdm=True
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


def _to_timm(model: torch.nn.Module) -> dict[str, torch.Tensor]:
    """Return the weights of transformers' DINOv2 by timm's names."""
    names = {
        "patch_embeddings.projection": "patch_embed.proj",
        "position_embeddings": "pos_embed",
        "embeddings.": "",
        "encoder.layer.": "blocks.",
        "layer_scale1.lambda1": "ls1.gamma",
        "layer_scale2.lambda1": "ls2.gamma",
        "attention.o_proj": "attn.proj",
        "layernorm.": "norm.",
    }
    weights = {}
    for key, value in model.state_dict().items():
        for theirs, timms in names.items():
            key = key.replace(theirs, timms)
        weights[key] = value
    del weights["mask_token"]
    for start in {k.partition(".attention.")[0] for k in weights if ".attention." in k}:
        for kind in ("weight", "bias"):
            parts = [weights.pop(f"{start}.attention.{part}_proj.{kind}") for part in "qkv"]
            weights[f"{start}.attn.qkv.{kind}"] = torch.cat(parts)
    return weights


@pytest.mark.parametrize("antialias", [True, False])
def test_timm_and_transformers_resize_position_embeddings_differently(antialias, monkeypatch):
    """They differ at another size than the trained one, unless timm does not antialias; localized, too."""
    theirs = CASES["dinov2"].make(drop_path_rate=0.0, image_size=72, mlp_ratio=4, layer_norm_eps=1e-6).eval()
    sizes = {"img_size": 72, "patch_size": 8, "embed_dim": 24, "depth": 2, "num_heads": 3, "num_classes": 0}
    model = timm.create_model("vit_small_patch14_dinov2", **sizes, dynamic_img_size=True).eval()
    model.load_state_dict(_to_timm(theirs))
    for each in (theirs, model):
        localvit.localize(each, LocalityConfig(init="preserve"), count_macs=False)
        for _, kernel in localvit.locality_parameters(each):
            torch.nn.init.constant_(kernel, 0.1)
    if not antialias:
        resample = functools.partial(vision_transformer.resample_abs_pos_embed, antialias=False)
        monkeypatch.setattr(vision_transformer, "resample_abs_pos_embed", resample)
    images = torch.randn(2, 3, 48, 64)
    with torch.no_grad():
        difference = (theirs(images).last_hidden_state - model.forward_features(images)).abs().max()
    assert difference < 1e-4 if not antialias else difference > 0.01
