"""Every published design in every family of models."""

import pytest
import timm
import torch
from timm.models import save_for_hf
from torch import Tensor, nn

import localvit
from localvit import PRESETS
from localvit.cost import count_macs, count_parameters
from localvit.surgery import confounders

from .test_families import images, make

FAMILIES = (
    "deit_tiny_patch16_224",
    "t2t_vit_7",
    "pvt_tiny",
    "tnt_t_legacy_patch16_224",
    "swin_tiny_patch4_window7_224",
)
OTHERS = [name for name in PRESETS if name != "localvit"]  # which has test_families.py
# One family for each, so that every preset and every family has its turn.
TURNS = [(FAMILIES[i % len(FAMILIES)], preset) for i, preset in enumerate(OTHERS)]


def localized(name: str, preset: str) -> nn.Module:
    model = make(name)
    localvit.localize(model, PRESETS[preset], seed=1)
    return model


def silent(model: nn.Module, x: Tensor) -> set[str]:
    """Parameters that the output does not depend on, up to rounding."""
    model.zero_grad()
    model(x).square().sum().backward()
    return {n for n, p in model.named_parameters() if p.grad is None or p.grad.abs().max() < 1e-12}


@pytest.mark.parametrize("preset", OTHERS)
@pytest.mark.parametrize("name", FAMILIES)
def test_the_plan_is_right_and_what_it_calls_alive_learns(name, preset):
    model = localized(name, preset).double()
    plan = model.localization.plan
    assert plan.parameters[1] == count_parameters(model)
    assert plan.macs[1] == count_macs(model, (3, 64, 64))
    dead = set(plan.dead_parameters)
    # The mean that a batch norm subtracts in training takes all biases in front of it out again.
    in_training = silent(model.train(), images().double())
    assert {n for n in in_training ^ dead if n.endswith(".weight")} == set()
    in_evaluation = silent(model.eval(), images().double())
    assert dead <= in_evaluation
    last = plan.sites[-1].name  # without batch statistics the last block's convolution may be out of reach
    assert {n for n in in_evaluation - dead if not n.startswith(f"{last}.")} == set()


@pytest.mark.parametrize(("name", "preset"), TURNS)
@torch.no_grad()
def test_script_export_and_save(name, preset, tmp_path):
    model = localized(name, preset).eval()
    want = model(images())
    torch.testing.assert_close(torch.jit.script(model)(images()), want)
    batch = {0: torch.export.Dim("batch", min=1, max=64)}
    program = torch.export.export(model, (images(),), dynamic_shapes=(batch,), strict=False)
    torch.testing.assert_close(program.module()(images()), want)
    save_for_hf(model, str(tmp_path), safe_serialization=True)
    again = timm.create_model(f"local-dir:{tmp_path}", pretrained=True).eval()
    assert torch.equal(again(images()), want)


def test_what_a_design_changes_besides_the_convolution_is_said():
    model = make("deit_tiny_patch16_224")
    said = {preset: " ".join(confounders(localvit.plan(model, PRESETS[preset]))) for preset in PRESETS}
    assert "return the class token unchanged" in said["ceit_leff"]
    assert "Norm (batch)" in said["ceit_leff"]
    for preset in PRESETS:
        assert ("gated linear unit" in said[preset]) == (preset in ("conv_glu", "gdfn"))
    without_norm = {preset for preset in PRESETS if "No pre-norm" in said[preset]}
    assert without_norm == {"localvit", "efficientformerv2", "efficientvit_mbconv", "fastvit_conv_ffn"}
