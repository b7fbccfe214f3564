"""Whole models against the numbers of the authors' own code, in float64."""

import numpy as np
import pytest
import timm
import torch
from torch import Tensor, nn

import localvit
from localvit import LocalityConfig
from localvit.cost import count_macs, count_parameters

from .. import golden

NAMES = {
    "localvit_tiny_mlp4_act3_r192": "localvit_tiny_patch16_224",
    "localvit_tiny_mlp4_act3_r4": "localvit_tiny_se4_patch16_224",
    "localvit_tiny_mlp6_act1": "localvit_tiny_relu6_x6_patch16_224",
    "localvit_small_mlp4_act3_r384": "localvit_small_patch16_224",
    **{
        name: name
        for size in ("tiny", "small", "base")
        for name in (f"deit_{size}_patch16_224", f"deit_{size}_distilled_patch16_224")
    },
    "deit_base_patch16_384": "deit_base_patch16_384",
    "deit_base_distilled_patch16_384": "deit_base_distilled_patch16_384",
}


def taps(model: nn.Module, image: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
    """Output, and the tokens after the first and last block."""
    seen: dict[str, Tensor] = {}
    hooks = [
        model.blocks[i].register_forward_hook(lambda _m, _i, out, key=key: seen.update({key: out.detach()}))
        for i, key in ((0, "first_block"), (-1, "last_block"))
    ]
    out = model(image)
    for hook in hooks:
        hook.remove()
    return out, seen


def check_taps(seen: dict[str, Tensor], want: dict, facts: dict, prefix: str = "", **tap: int) -> None:
    for key, tokens in seen.items():
        first_image = tokens[0].numpy()
        sampled = golden.tap(first_image, **tap)
        np.testing.assert_allclose(
            sampled, want[f"{prefix}tap.{key}"], rtol=2e-7, atol=1e-10
        )  # kept as float32
        sums = facts["taps"][key]
        assert list(first_image.shape) == sums["shape"]
        assert abs(first_image.sum() - sums["sum"]) < 1e-11 * sums["abs_sum"]


@pytest.mark.parametrize("reference", NAMES)
def test_registered_model_equals_the_authors_code(reference):
    facts, want = golden.facts(reference), golden.arrays(reference)
    model = localvit.load_official(golden.filled(facts["state_dict"]), NAMES[reference])
    assert not model.load_report.missing
    size = facts["image_size"]
    image = torch.from_numpy(golden.make_input(size=size))[:1]  # evaluation treats images one by one
    with torch.no_grad():
        logits, seen = taps(model, image)
    both = [want[f"logits_{head}"] for head in ("cls", "dist") if f"logits_{head}" in want]
    expected = sum(both) / 2 if both else want["logits"]
    np.testing.assert_allclose(logits.numpy(), expected[:1], rtol=0, atol=1e-10)
    check_taps(seen, want, facts)
    assert count_parameters(model) == facts["params_total"]
    assert count_macs(model, (3, size, size)) / 1e9 == pytest.approx(facts["gmacs_matmul_conv"], abs=1e-6)


@pytest.mark.parametrize("reference", ["localvit_tiny_mlp4_act3_r4", "localvit_small_mlp4_act3_r384"])
def test_in_single_precision(reference):
    facts, want = golden.facts(reference), golden.arrays(reference)
    weights = {
        key: value.float() if value.is_floating_point() else value
        for key, value in golden.filled(facts["state_dict"]).items()
    }
    model = localvit.load_official(weights, NAMES[reference])
    assert {p.dtype for p in model.parameters()} == {torch.float32}
    with torch.no_grad():
        logits = model(torch.from_numpy(golden.make_input()).float())
    np.testing.assert_allclose(logits.numpy(), want["logits"], rtol=0, atol=5e-5)


# --- miniature models: every option of the reference, with a training step -----------------------------

MINIATURES = [
    name
    for name, case in golden.facts("variants")["variants"].items()
    if case["class"] in ("LocalVisionTransformer", "VisionTransformer", "DistilledVisionTransformer")
]


def miniature(case: dict) -> nn.Module:
    args = case["constructor"]
    keep = ("img_size", "patch_size", "num_classes", "embed_dim", "depth", "num_heads", "qkv_bias")
    base = "deit_tiny_distilled_patch16_224" if "Distilled" in case["class"] else "deit_tiny_patch16_224"
    model = timm.create_model(base, **{k: args[k] for k in keep}, norm_layer=nn.LayerNorm)  # eps 1e-5
    if case["class"] != "LocalVisionTransformer":
        return model
    code = args["act"]
    gate = {1: "none", 2: "none", 3: "se", 4: "eca"}.get(code, "eca_hard")
    config = LocalityConfig(
        activation="relu6" if code == 1 else "hardswish",
        gate=gate,
        gate_reduction=args["reduction"] if gate == "se" else None,
        expansion=args["mlp_ratio"],
        depthwise=not args["wo_dp_conv"],
        position="first" if args["dp_first"] else "mid",
    )
    localvit.localize(model, config)
    if args["qk_scale"]:
        for block in model.blocks:
            block.attn.scale, block.attn.fused_attn = args["qk_scale"], False
    return model


@pytest.mark.parametrize("name", MINIATURES)
def test_miniature_equals_the_authors_code(name):
    case, want = golden.facts("variants")["variants"][name], golden.arrays("variants")
    model = miniature(case)
    weights = golden.filled(case["keys"])
    localvit.load_official(weights, model)
    if "params_total" in case:
        assert count_parameters(model) == case["params_total"]
    size = case["constructor"]["img_size"]
    image = torch.from_numpy(golden.make_input(size=size)).requires_grad_()
    with torch.no_grad():
        logits, seen = taps(model, image)
    np.testing.assert_allclose(logits.numpy(), want[f"{name}/eval"], rtol=0, atol=1e-10)
    check_taps(seen, want, case, f"{name}/", count=127)

    model.train()
    distilled = "Distilled" in case["class"]
    if distilled:
        model.set_distilled_training(True)
    out = model(image)
    outputs = torch.stack(out) if distilled else out
    np.testing.assert_allclose(outputs.detach().numpy(), want[f"{name}/train"], rtol=0, atol=1e-10)
    loss = sum(o.square().mean() for o in out) if distilled else out.square().mean()
    loss.backward()
    assert loss.item() == pytest.approx(case["train_loss"], rel=1e-11)
    np.testing.assert_allclose(
        golden.tap(image.grad.numpy(), count=127), want[f"{name}/grad_x"], rtol=0, atol=1e-10
    )
    check_parameters(model, case, weights)


def check_parameters(model: nn.Module, case: dict, weights: dict[str, Tensor]) -> None:
    from localvit.models.published import to_own_keys

    own_names = dict(zip(weights, to_own_keys(weights, model), strict=True))
    parameters, buffers = dict(model.named_parameters()), dict(model.named_buffers())
    for key, norm in case["grad_norms"].items():
        gradient = parameters[own_names[key]].grad
        assert gradient.norm().item() == pytest.approx(norm, rel=1e-9, abs=1e-12), key
    for key, (total, squares) in case.get("bn_after_sum_sqsum", {}).items():
        value = buffers[own_names[key]]
        assert value.sum().item() == pytest.approx(total, rel=1e-9, abs=1e-11), key
        assert value.square().sum().item() == pytest.approx(squares, rel=1e-9), key
