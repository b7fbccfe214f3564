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
        ({"model": 3}, "'model' holds a int"),
        ({"model": {"a": 3}}, "'a' holds a int"),
    ],
)
def test_contents_that_are_not_weights(content, reason):
    with pytest.raises(CheckpointError, match=reason):
        localvit.load_official(content)
