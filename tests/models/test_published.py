import argparse
import pickle

import pytest
import timm
import torch
from safetensors.torch import save_file

import localvit
from localvit import CheckpointError

from .. import golden

REFERENCE = "localvit_tiny_mlp4_act3_r192"


@pytest.fixture(scope="module")
def weights() -> dict[str, torch.Tensor]:
    tensors = golden.filled(golden.facts(REFERENCE)["state_dict"])
    return {k: v.float() if v.is_floating_point() else v for k, v in tensors.items()}


@pytest.fixture
def checkpoint(weights, tmp_path):
    """A file as the authors' training script leaves it."""
    path = tmp_path / "localvit_t.pth"
    settings = argparse.Namespace(model="localvit_tiny_mlp4_act3_r192", lr=5e-4)
    torch.save({"model": weights, "optimizer": {"state": {}}, "epoch": 299, "args": settings}, path)
    return path


def test_a_released_file_is_recognised_loaded_and_reported(checkpoint, weights):
    model = localvit.load_official(checkpoint)
    report = model.load_report
    assert report.model == "localvit_tiny_patch16_224"
    assert set(report.matched) == set(weights)
    assert set(report.dropped) == {"optimizer", "epoch", "args"}
    assert report.missing == report.unexpected == ()
    assert not model.training
    assert "344 tensors loaded, 3 dropped (optimizer, epoch, args)" in str(report)
    ours, theirs = model.blocks[3].mlp.gate.fc1.weight, weights["blocks.3.conv.conv.6.fc.0.weight"]
    assert torch.equal(ours.flatten(1), theirs)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float16])
def test_the_model_comes_back_in_the_file_s_dtype(weights, dtype):
    cast = {k: v.to(dtype) if v.is_floating_point() else v for k, v in weights.items()}
    model = localvit.load_official(cast, "localvit_tiny_patch16_224")
    assert {p.dtype for p in model.parameters()} == {dtype}


def test_safetensors_and_another_class_count(weights, tmp_path):
    fine_tuned = {**weights, "head.weight": torch.randn(7, 192), "head.bias": torch.zeros(7)}
    save_file(fine_tuned, tmp_path / "weights.safetensors")
    model = localvit.load_official(tmp_path / "weights.safetensors")
    assert model.num_classes == 7
    assert torch.equal(model.head.weight, fine_tuned["head.weight"])


def test_a_plain_deit_file_is_recognised():
    tensors = timm.create_model("deit_small_distilled_patch16_224").state_dict()
    assert localvit.load_official({"model": tensors}).load_report.model == "deit_small_distilled_patch16_224"


def test_derived_buffers_are_dropped_not_compared(weights):
    extra = {**weights, "layers.0.blocks.1.attn_mask": torch.zeros(3)}
    report = localvit.load_official(extra).load_report
    assert report.dropped == {"layers.0.blocks.1.attn_mask": "computed by the model"}


def test_strictness(weights):
    partial = {k: v for k, v in weights.items() if not k.startswith("blocks.11.attn.proj")}
    wrong = {**partial, "blocks.0.attn.qkv.weight": torch.zeros(3, 192), "stranger": torch.zeros(1)}
    with pytest.raises(CheckpointError) as error:
        localvit.load_official(wrong, "localvit_tiny_patch16_224")
    for word in ("blocks.11.attn.proj.weight", "stranger", "[3, 192], not [576, 192]"):
        assert word in str(error.value)
    report = localvit.load_official(wrong, "localvit_tiny_patch16_224", strict=False).load_report
    assert len(report.missing) == 3
    assert len(report.unexpected) == 2


def test_another_architecture_names_the_nearest_and_the_differences(weights):
    with pytest.raises(
        CheckpointError, match=r"nearest is localvit_tiny_patch16_224.*1 missing \(norm.weight\)"
    ):
        localvit.load_official({k: v for k, v in weights.items() if k != "norm.weight"})


class _Harm:
    def __reduce__(self):
        return exec, ("raise SystemExit('executed')",)


def test_bad_files_are_clear_errors_and_nothing_in_them_runs(checkpoint, tmp_path):
    with pytest.raises(FileNotFoundError, match="no checkpoint at"):
        localvit.load_official(tmp_path / "absent.pth")
    truncated = tmp_path / "truncated.pth"
    truncated.write_bytes(checkpoint.read_bytes()[:5000])
    garbage = tmp_path / "garbage.pth"
    garbage.write_bytes(b"<html>404</html>")
    damaged = tmp_path / "damaged.safetensors"
    damaged.write_bytes(b"\x00" * 64)
    harmful = tmp_path / "harmful.pth"
    harmful.write_bytes(pickle.dumps({"model": _Harm()}, protocol=2))
    torch.save({"model": _Harm()}, tmp_path / "harmful_too.pth")
    torch.save([1, 2], tmp_path / "list.pth")
    for name in (
        "truncated.pth",
        "garbage.pth",
        "damaged.safetensors",
        "harmful.pth",
        "harmful_too.pth",
        "list.pth",
    ):
        with pytest.raises(CheckpointError, match=name):
            localvit.load_official(tmp_path / name)


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        ({}, "no tensors"),
        ({"model": {}}, "no tensors"),
        ({"model": 3}, "'model' has a int"),
        ({"model": {"a": 3}}, "'a' has a int"),
    ],
)
def test_contents_that_are_not_weights(content, reason):
    with pytest.raises(CheckpointError, match=reason):
        localvit.load_official(content)


# --- every family --------------------------------------------------------------------------------------

RELEASED = {
    "localvit_tiny_mlp4_act3_r192": "localvit_tiny_patch16_224",
    "localvit_tiny_mlp4_act3_r4": "localvit_tiny_se4_patch16_224",
    "localvit_small_mlp4_act3_r384": "localvit_small_patch16_224",
    "localvit_pvt_tiny": "localvit_pvt_tiny",
    "localvit_tnt_t_patch16_224": "localvit_tnt_tiny_patch16_224",
    "localvit_swin_tiny_patch4_window7_224": "localvit_swin_tiny_patch4_window7_224",
    "localvit_T2t_conv7": "localvit_t2t_vit_7",
    "deit_base_patch16_384": "deit_base_patch16_384",
    "pvt_medium": "pvt_medium",
    "T2t_vit_14": "t2t_vit_14",
    "T2t_vit_t_19": "t2t_vit_t_19",
    "tnt_s_patch16_224": "tnt_s_legacy_patch16_224",
    "swin_tiny_patch4_window7_224": "swin_tiny_patch4_window7_224",
}


def as_published(reference: str) -> dict[str, torch.Tensor]:
    """A file in the authors' layout; what is in the tensors does not matter."""
    return {key: torch.empty(shape) for key, shape, *_ in golden.facts(reference)["state_dict"]}


@pytest.mark.parametrize("reference", RELEASED)
def test_files_of_every_family_are_recognised(reference, monkeypatch):
    weights = as_published(reference)
    monkeypatch.setattr(torch.nn.Module, "load_state_dict", lambda *_a, **_k: None)  # the contents are noise
    report = localvit.load_official({"model": weights}).load_report
    assert report.model == RELEASED[reference]
    assert set(report.matched) | (set(report.dropped) & set(weights)) == set(weights)
    unused = {k for k, why in report.dropped.items() if "never used" in why}
    assert unused == {
        k for k in weights if reference == "localvit_T2t_conv7" and "attention" in k and "norm2" in k
    }


def test_containers_of_other_authors():
    weights = as_published("T2t_vit_7")
    for container in ("state_dict", "state_dict_ema"):
        report = localvit.load_official({container: weights, "epoch": 1}, "t2t_vit_7").load_report
        assert report.dropped == {"epoch": "not the model's weights"}


def test_names_of_the_tnt_authors_equal_timm_s_own_reading():
    """Their newer file: other names, and pixel positions as a table of tokens."""
    model = timm.create_model("tnt_s_patch16_224")
    names = {"patch_pos": "outer_pos", "pixel_pos": "inner_pos", "pixel_embed": "patch_embed"} | {
        "norm1_proj": "proj_norm1",
        "norm2_proj": "proj_norm2",
        "norm_in": "inner_norm1",
        "attn_in": "inner_attn",
        "norm_mlp_in": "inner_norm2",
        "mlp_in": "inner_mlp",
        "norm_out": "outer_norm1",
        "attn_out": "outer_attn",
        "norm_mlp": "outer_norm2",
        "mlp": "outer_mlp",
    }
    theirs = {
        ".".join(names.get(part, part) for part in key.split(".")): value.clone()
        for key, value in model.state_dict().items()
    }
    theirs["inner_pos"] = theirs["inner_pos"].flatten(2).transpose(1, 2)
    theirs["outer_tokens"] = torch.zeros(1)
    loaded = localvit.load_official(theirs)
    assert loaded.load_report.model == "tnt_s_patch16_224"
    assert loaded.load_report.dropped == {"outer_tokens": "stored by the reference, never used by it"}
    timms = timm.models.tnt.checkpoint_filter_fn(dict(theirs), model)
    assert all(torch.equal(loaded.state_dict()[key], value) for key, value in timms.items())


def test_the_swin_authors_file_equals_timm_s_own_reading():
    theirs = golden.filled(golden.facts("swin_tiny_patch4_window7_224")["state_dict"])
    loaded = localvit.load_official(theirs, "swin_tiny_patch4_window7_224")
    timms = timm.models.swin_transformer.checkpoint_filter_fn(dict(theirs), loaded)
    assert timms.keys() == loaded.state_dict().keys()
    assert all(torch.equal(loaded.state_dict()[key], value) for key, value in timms.items())


@pytest.mark.parametrize(
    ("reference", "size"),
    [
        ("localvit_tiny_mlp4_act3_r192", (192, 256)),
        ("localvit_pvt_tiny", (192, 256)),
        ("localvit_tnt_t_patch16_224", (192, 256)),
        ("localvit_swin_tiny_patch4_window7_224", (192, 256)),
    ],
)
def test_pretrained_weights_fit_another_size_and_class_count(reference, size, monkeypatch):
    weights = {
        k: v.float() if v.is_floating_point() else v
        for k, v in golden.filled(golden.facts(reference)["state_dict"]).items()
    }
    monkeypatch.setattr("timm.models._builder.load_state_dict_from_url", lambda *_a, **_k: {"model": weights})
    model = timm.create_model(RELEASED[reference], pretrained=True, img_size=size, num_classes=7).eval()
    assert model(torch.randn(1, 3, *size)).shape == (1, 7)
    square = timm.create_model(RELEASED[reference], pretrained=True).eval()
    local = next(name for name, _ in square.named_parameters() if name.endswith("mlp.conv.weight"))
    assert torch.equal(model.get_parameter(local), square.get_parameter(local))


def test_a_file_of_another_family_names_what_is_wrong():
    with pytest.raises(CheckpointError, match=r"does not fit swin_tiny.*missing.*unexpected .cls_token"):
        localvit.load_official(as_published("tnt_t_patch16_224"), "swin_tiny_patch4_window7_224")
    damaged = as_published("localvit_pvt_tiny")
    del damaged["norm.weight"]
    with pytest.raises(CheckpointError, match=r"nearest is localvit_pvt_tiny.*1 missing \(norm.weight\)"):
        localvit.load_official(damaged)
