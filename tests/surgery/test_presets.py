"""Every published design in every family of models."""

import pytest
import timm
import torch
from timm.models import save_for_hf
from torch import nn

import localvit
from localvit import PRESETS
from localvit.cost import count_macs, count_parameters
from localvit.locality import LocalityFeedForward

from .test_families import images, make

FAMILIES = (
    "deit_tiny_patch16_224",
    "t2t_vit_7",
    "pvt_tiny",
    "tnt_t_legacy_patch16_224",
    "swin_tiny_patch4_window7_224",
)
every_preset = pytest.mark.parametrize("preset", PRESETS)
every_family = pytest.mark.parametrize("name", FAMILIES)


def localized(name: str, preset: str) -> nn.Module:
    model = make(name).double()
    localvit.localize(model, PRESETS[preset], seed=1)
    return model


def cancelled(model: nn.Module) -> set[str]:
    """Biases that the mean of a batch norm takes out again: they have no effect in training."""
    names = set()
    for path, ffn in model.named_modules():
        if isinstance(ffn, LocalityFeedForward) and ffn.norm_before_act:
            after = {"fc1": ffn.norm1, "conv": ffn.norm2, "fc2": ffn.norm3}
            names |= {f"{path}.{layer}.bias" for layer, n in after.items() if isinstance(n, nn.BatchNorm2d)}
        elif isinstance(ffn, LocalityFeedForward):
            names |= {f"{path}.fc2.bias"}  # of CMT, the only one without an activation in between
    return names & {name for name, _ in model.named_parameters()}


@every_preset
@every_family
def test_the_plan_is_right_and_what_it_calls_alive_learns(name, preset):
    model = localized(name, preset).train()
    plan = model.localization.plan
    assert plan == localvit.plan(make(name), PRESETS[preset])
    assert plan.parameters[1] == count_parameters(model)
    assert plan.macs[1] == count_macs(model, (3, 64, 64))
    model(images().double()).square().sum().backward()
    silent = {n for n, p in model.named_parameters() if p.grad is None or p.grad.abs().max() < 1e-12}
    assert silent - cancelled(model) == set(plan.dead_parameters) - cancelled(model)


@every_preset
@every_family
@torch.no_grad()
def test_script_export_and_save(name, preset, tmp_path):
    model = localized(name, preset).float().eval()
    want = model(images())
    torch.testing.assert_close(torch.jit.script(model)(images()), want)
    batch = {0: torch.export.Dim("batch", min=1, max=64)}
    program = torch.export.export(model, (images(),), dynamic_shapes=(batch,), strict=False)
    torch.testing.assert_close(program.module()(images()), want)
    save_for_hf(model, str(tmp_path), safe_serialization=True)
    again = timm.create_model(f"local-dir:{tmp_path}", pretrained=True).eval()
    assert torch.equal(again(images()), want)
