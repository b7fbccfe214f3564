"""Checkpoints that travel: self-contained, opened at other sizes, plain, wrapped or damaged."""

import json
import shutil

import pytest
import timm
import torch
from safetensors.torch import load_file, save_file
from timm.models import PretrainedCfg, get_pretrained_cfg, save_for_hf

import localvit
from localvit import CheckpointError, LocalityConfig
from localvit.errors import ConfigError
from localvit.inference import open_model
from localvit.models import ModelConfig, build_model
from tests.models.test_names import FAMILIES, VIT

PRESERVE = {"init": "preserve"}
SMALL = {"img_size": 32, "num_classes": 5, **VIT.args}
BASES = {
    "vit_tiny_patch16_224": SMALL,
    "deit_tiny_distilled_patch16_224": SMALL,
    "swin_tiny_patch4_window7_224": {"img_size": 64, "num_classes": 5, **FAMILIES["swin"].args},
    "pvt_tiny": {"img_size": 64, "num_classes": 5, **FAMILIES["pvt"].args},
    "t2t_vit_7": {"img_size": 64, "num_classes": 5, **FAMILIES["t2t"].args},
    "tnt_s_patch16_224": {"img_size": 64, "num_classes": 5, **FAMILIES["tnt"].args},
}
CHANGES = [
    *((base, change) for base in BASES for change in ({"img_size": 96}, {"in_chans": 1}, {"num_classes": 7})),
    ("vit_tiny_patch16_224", {"patch_size": 4}),
    ("swin_tiny_patch4_window7_224", {"patch_size": 2}),
    ("swin_tiny_patch4_window7_224", {"window_size": 2}),
]


def save(model, folder):
    save_for_hf(model, str(folder), safe_serialization=True)
    return f"local-dir:{folder}"


def same(first, second):
    return first.keys() == second.keys() and all(torch.equal(first[key], second[key]) for key in first)


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """A plain model of each base, and the same with kernels of zeros: reference of each."""
    folder, references = tmp_path_factory.mktemp("saved"), {}
    for base, args in BASES.items():
        model = timm.create_model(base, **args)
        plain = save(model, folder / f"{base}-plain")
        localvit.localize(model, LocalityConfig(**PRESERVE))
        references[base] = plain, save(model, folder / base)
    return references


@pytest.mark.parametrize(("base", "change"), CHANGES)
def test_a_saved_localized_model_opens_at_another_size_as_its_base_does(saved, base, change):
    plain, local = (timm.create_model(name, pretrained=True, **change).eval() for name in saved[base])
    assert getattr(local, "localization", None)
    x = torch.randn(2, change.get("in_chans", 3), *[change.get("img_size", BASES[base]["img_size"])] * 2)
    with torch.no_grad():
        assert torch.equal(plain.forward_features(x), local.forward_features(x))
        assert local(x).shape == (2, change.get("num_classes", 5))


@pytest.mark.parametrize("change", [{"img_size": 64}, {"in_chans": 1}, {"num_classes": 7}])
@pytest.mark.parametrize("name", ["localvit_tiny_patch16_224", "localized"])
def test_locality_of_the_paper_keeps_its_weights_at_another_size(name, change, tmp_path):
    args = {"base": "deit_tiny_patch16_224"} if name == "localized" else {}
    model = timm.create_model(name, **args, **SMALL)
    opened = timm.create_model(save(model, tmp_path), pretrained=True, **change)
    mlps = [{k: v for k, v in m.state_dict().items() if ".mlp." in k} for m in (model, opened)]
    assert any("conv" in key for key in mlps[0])
    assert same(*mlps)


@pytest.mark.parametrize("classes", [5, 7])
@pytest.mark.parametrize("lost", ["blocks.1.mlp.drop1.conv.weight", "blocks.0.attn.qkv.weight", ".conv."])
def test_a_damaged_localized_file_is_refused_for_any_number_of_classes(lost, classes, tmp_path):
    source = save(
        timm.create_model("localized", base="vit_tiny_patch16_224", locality=PRESERVE, **SMALL), tmp_path
    )
    file = tmp_path / "model.safetensors"
    save_file({key: value for key, value in load_file(file).items() if lost not in key}, file)
    with pytest.raises(ConfigError, match=r"weights are damaged: [12] tensors are missing \(blocks"):
        open_model(source, "cpu", args={"num_classes": classes})


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    """Weights of a plain model in a file, and the weights."""
    folder = tmp_path_factory.mktemp("files")
    weights = timm.create_model("vit_tiny_patch16_224", **SMALL).state_dict()
    torch.save(weights, folder / "mine.pth")
    return folder, weights


def test_what_timm_takes_for_a_base_reaches_it(files):
    folder, weights = files
    config = get_pretrained_cfg("vit_tiny_patch16_224")
    mine = {"file": str(folder / "mine.pth"), "num_classes": 5, "input_size": (3, 32, 32)}
    for given in (
        {"pretrained": True, "pretrained_cfg_overlay": {**mine, "hf_hub_id": None}},
        {"pretrained": True, "pretrained_cfg": {**mine, "classifier": "head"}},
        {"pretrained": True, "pretrained_cfg": PretrainedCfg(**mine, classifier="head")},
        {"checkpoint_path": str(folder / "mine.pth")},
    ):
        made = timm.create_model(
            "localized", base="vit_tiny_patch16_224", locality=PRESERVE, **given, **SMALL
        )
        assert torch.equal(made.head.weight, weights["head.weight"]), given
        assert torch.equal(made.blocks[1].mlp.fc1.weight, weights["blocks.1.mlp.fc1.weight"]), given
    tagged = timm.create_model(
        "localized",
        base="vit_tiny_patch16_224",
        pretrained_cfg="augreg_in21k",
        **{**SMALL, "num_classes": None},
    )
    assert config.tag != tagged.pretrained_cfg["tag"] == "augreg_in21k"
    assert tagged.num_classes == 21843


def test_a_preset_is_a_value_of_locality_and_is_saved(tmp_path):
    made = timm.create_model(
        "localized", base="vit_tiny_patch16_224", locality={"preset": "mix_ffn"}, **SMALL
    )
    assert made.localization.plan.config == localvit.preset("mix_ffn")
    opened = timm.create_model(save(made, tmp_path), pretrained=True)
    assert same(opened.state_dict(), made.state_dict())


def test_a_plain_checkpoint_loads_into_a_preserved_model(files):
    folder, weights = files
    model = timm.create_model("localized", base="vit_tiny_patch16_224", locality=PRESERVE, **SMALL)
    kernels = [block.mlp.drop1.conv.weight for block in model.blocks]
    for load in (
        lambda: model.load_state_dict(weights, strict=True),
        lambda: model.load_state_dict(weights, strict=True, assign=True),
        lambda: localvit.load_official(folder / "mine.pth", model),
        lambda: timm.models.load_checkpoint(model, str(folder / "mine.pth")),
        lambda: torch.nn.ModuleDict({"m": model}).load_state_dict({f"m.{k}": v for k, v in weights.items()}),
    ):
        for kernel in kernels:
            torch.nn.init.ones_(kernel)
        load()
        kernels = [block.mlp.drop1.conv.weight for block in model.blocks]
        assert not any(kernel.any() for kernel in kernels)
        assert torch.equal(model.head.weight, weights["head.weight"])
    with torch.device("meta"):
        empty = timm.create_model("localized", base="vit_tiny_patch16_224", locality=PRESERVE, **SMALL)
    empty.load_state_dict(weights, strict=True, assign=True)
    assert not empty.blocks[0].mlp.drop1.conv.weight.any()


@pytest.mark.parametrize("lost", [0, 1])
def test_a_file_with_some_of_the_kernels_is_damaged(lost):
    model = timm.create_model("localized", base="vit_tiny_patch16_224", locality=PRESERVE, **SMALL)
    weights = {k: v + 1 for k, v in model.state_dict().items() if k != f"blocks.{lost}.mlp.drop1.conv.weight"}
    with pytest.raises(RuntimeError, match=rf"Missing key.*blocks\.{lost}\.mlp\.drop1"):
        model.load_state_dict(weights)
    with pytest.raises(CheckpointError, match=rf"1 missing \(blocks\.{lost}\.mlp\.drop1\.conv\.weight"):
        localvit.load_official(weights, model)
    model.load_state_dict(weights, strict=False)  # as ever
    assert model.blocks[1 - lost].mlp.drop1.conv.weight.mean() == 1


def test_a_localized_checkpoint_in_a_plain_model_names_the_kernels(files):
    local = timm.create_model(
        "localized", base="vit_tiny_patch16_224", locality=PRESERVE, **SMALL
    ).state_dict()
    plain = timm.create_model("vit_tiny_patch16_224", **SMALL)
    named = r"blocks\.0\.mlp\.drop1\.conv\.weight"
    with pytest.raises(RuntimeError, match=rf"Unexpected key.*{named}"):
        plain.load_state_dict(local)
    with pytest.raises(CheckpointError, match=rf"2 unexpected \({named}, blocks\.1"):
        localvit.load_official(local, plain)
    loaded = localvit.load_official(local, plain, strict=False)
    assert len(loaded.load_report.unexpected) == 2


WRAPPED = {
    "module.": lambda w: {f"module.{k}": v for k, v in w.items()},
    "_orig_mod.": lambda w: {f"_orig_mod.{k}": v for k, v in w.items()},
    "both": lambda w: {"state_dict": {f"module._orig_mod.{k}": v for k, v in w.items()}},
    "state_dict": lambda w: {"state_dict": w, "epoch": 3},
    "model_ema": lambda w: {"model_ema": w, "epoch": 3},
    "state_dict_ema": lambda w: {"state_dict_ema": w, "state_dict": {k: v + 1 for k, v in w.items()}},
    "model": lambda w: {"model": {f"module.{k}": v for k, v in w.items()}, "optimizer": {}},
}


@pytest.mark.parametrize("locality", [None, LocalityConfig(), LocalityConfig(init="preserve")])
@pytest.mark.parametrize("wrapped", WRAPPED)
def test_wrapped_weights_are_understood(files, tmp_path, wrapped, locality):
    torch.save(WRAPPED[wrapped](files[1]), tmp_path / "x.pth")
    config = ModelConfig(
        name="vit_tiny_patch16_224",
        locality=locality,
        args={**SMALL, "checkpoint_path": str(tmp_path / "x.pth")},
    )
    made = build_model(config, 5)
    assert made.training
    assert torch.equal(made.blocks[1].attn.qkv.weight, files[1]["blocks.1.attn.qkv.weight"])


def test_a_localized_checkpoint_path_is_that_of_the_localized_model(tmp_path):
    model = timm.create_model("localized", base="vit_tiny_patch16_224", **SMALL)
    save_file(model.state_dict(), tmp_path / "x.safetensors")
    args = {**SMALL, "checkpoint_path": str(tmp_path / "x.safetensors")}
    made = build_model(ModelConfig(name="vit_tiny_patch16_224", locality=LocalityConfig(), args=args), 5)
    assert same(made.state_dict(), model.state_dict())
    with pytest.raises(ConfigError, match=r"the file does not fit .*missing.*unexpected"):
        build_model(ModelConfig(name="vit_tiny_patch16_224", args=args), 5)


@pytest.mark.parametrize("place", ["local-dir", "hf-hub"])
def test_a_model_from_a_reference_is_self_contained(tmp_path, monkeypatch, place):
    def download(repo_id, filename, **_options):
        return str(tmp_path / repo_id.partition("/")[2] / filename)

    monkeypatch.setattr("timm.models._hub.hf_hub_download", download)
    source = save(timm.create_model("vit_tiny_patch16_224", **SMALL), tmp_path / "A")
    source = "hf-hub:someone/A" if place == "hf-hub" else source
    made = build_model(ModelConfig(name=source, pretrained=True, locality=LocalityConfig(**PRESERVE)), 5)
    again = save(made, tmp_path / "B")
    assert (
        json.loads((tmp_path / "B/config.json").read_text())["model_args"]["base"] == "vit_tiny_patch16_224"
    )
    with pytest.raises(ConfigError, match=rf"base='{place}:.*' is a reference.*use localvit\.localize"):
        timm.create_model("localized", base=source)
    third = save(build_model(ModelConfig(name=again, pretrained=True), 5), tmp_path / "C")
    shutil.rmtree(tmp_path / "A")
    shutil.rmtree(tmp_path / "B")
    assert same(timm.create_model(third, pretrained=True).state_dict(), made.state_dict())


def test_a_reference_that_0_3_saved_opens_and_is_resolved_when_it_is_saved_anew(tmp_path):
    source = save(timm.create_model("vit_tiny_patch16_224", **SMALL), tmp_path / "A")
    old = timm.create_model("localized", base="vit_tiny_patch16_224", locality=PRESERVE, **SMALL)
    again, file = save(old, tmp_path / "B"), tmp_path / "B/config.json"
    config = json.loads(file.read_text())
    config["model_args"] = {"base": source, "locality": PRESERVE, "num_classes": 5}
    file.write_text(json.dumps(config))
    third = save(build_model(ModelConfig(name=again, pretrained=True), 5), tmp_path / "C")
    shutil.rmtree(tmp_path / "A")
    assert same(timm.create_model(third, pretrained=True).state_dict(), old.state_dict())


FOREIGN = {
    "truncated": (lambda data: data[:-50], "truncated or not a checkpoint"),
    "header cut": (lambda data: data[:20], "truncated or not a checkpoint"),
    "pointer": (lambda data: b"version https://git-lfs.github.com/spec/v1\noid sha256:0\n", "git lfs pull"),
    "page": (lambda data: b"\n<!DOCTYPE html><html>Not found</html>", "HTML page"),
    "empty": (lambda data: b"", "the file is empty"),
}


@pytest.mark.parametrize("name", ["model.safetensors", "pytorch_model.bin"])
@pytest.mark.parametrize("damage", FOREIGN)
def test_what_is_no_weights_is_one_line(tmp_path, damage, name):
    model = timm.create_model("vit_tiny_patch16_224", **SMALL)
    source, file = save(model, tmp_path), tmp_path / name
    if name.endswith(".bin"):
        (tmp_path / "model.safetensors").unlink()
        torch.save(model.state_dict(), file)
    spoil, message = FOREIGN[damage]
    file.write_bytes(spoil(file.read_bytes()))
    for use in (
        lambda: open_model(source, "cpu"),
        lambda: build_model(ModelConfig(name=source, pretrained=True), 5),
        lambda: build_model(
            ModelConfig(name="vit_tiny_patch16_224", args={**SMALL, "checkpoint_path": str(file)}), 5
        ),
    ):
        with pytest.raises(
            ConfigError, match=message.replace("damaged", "(damaged|not a checkpoint)")
        ) as error:
            use()
        assert "\n" not in str(error.value)
        assert name in str(error.value)


@pytest.mark.parametrize(
    ("arg", "value"),
    [
        *((name, value) for name in ("img_size", "patch_size", "in_chans", "embed_dim") for value in (0, -1)),
        *((name, value) for name in ("depth", "num_heads", "mlp_ratio", "num_classes") for value in (0, -1)),
        *(("reg_tokens", -1), ("drop_path_rate", -0.1), ("proj_drop_rate", 1.5), ("img_size", [32, 0])),
        *(
            ("mlp_ratio", float("nan")),
            ("mlp_ratio", float("inf")),
            ("num_classes", None),
            ("num_classes", 5.5),
        ),
        *(
            ("num_heads", 5),
            ("num_heads", "three"),
            ("device", "cuda"),
            ("dtype", "float16"),
            ("depths", [1]),
        ),
        *(("checkpoint_path", "/nowhere.pth"), ("features_only", True), ("also", 3), ("embed_dim", 10**12)),
    ],
)
@pytest.mark.parametrize("locality", [None, LocalityConfig()])
def test_values_that_a_model_cannot_have_are_one_line(arg, value, locality):
    args = {"img_size": 32, **VIT.args, arg: value}
    with pytest.raises(ConfigError, match=f"{arg}|vit_tiny_patch16_224") as error:
        build_model(ModelConfig(name="vit_tiny_patch16_224", locality=locality, args=args), 5)
    assert "\n" not in str(error.value)
    assert str(error.value).count("is not accepted") <= 1
    assert "check its files" not in str(error.value)
