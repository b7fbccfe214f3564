"""Whole models against the numbers of the authors' own code, in float64."""

import re

import numpy as np
import pytest
import timm
import torch
from torch import Tensor, nn

import localvit
from localvit import LocalityConfig
from localvit.baselines.t2t_vit import T2TViT
from localvit.cost import count_macs, count_parameters
from localvit.models.published import _own_names

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
    "localvit_T2t_conv7": "localvit_t2t_vit_7",
    "localvit_pvt_tiny": "localvit_pvt_tiny",
    "localvit_tnt_t_patch16_224": "localvit_tnt_tiny_patch16_224",
    "localvit_tnt_s_patch16_224": "localvit_tnt_small_patch16_224",
    "localvit_swin_tiny_patch4_window7_224": "localvit_swin_tiny_patch4_window7_224",
    "tnt_t_patch16_224": "tnt_t_legacy_patch16_224",
    "tnt_s_patch16_224": "tnt_s_legacy_patch16_224",
    "swin_tiny_patch4_window7_224": "swin_tiny_patch4_window7_224",
}


# Reference models without a name of ours: timm's name and constructor arguments. (PVT and T2T-ViT without
# locality are in tests/baselines.)
BY_ARGUMENTS = {
    "deit_tiny_patch16_224_ex6": ("deit_tiny_patch16_224", {"mlp_ratio": 6}),
    "tnt_b_patch16_224": (
        "tnt_s_legacy_patch16_224",
        {"embed_dim": 640, "inner_dim": 40, "num_heads_outer": 10},
    ),
}


def taps(model: nn.Module, image: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
    """Output, and of the first image the tokens after the first and last block and after a T2T stem."""
    places = [
        module
        for path, module in model.named_modules()
        if "mlp" in module._modules and ".attention" not in path
    ]
    places = {"first_block": places[0], "last_block": places[-1]}
    if isinstance(model, T2TViT):
        places["tokens_to_token"] = model.patch_embed
    seen: dict[str, Tensor] = {}
    hooks = [
        module.register_forward_hook(lambda _m, _i, out, key=key: seen.update(_tapped(key, out, len(image))))
        for key, module in places.items()
    ]
    out = model(image)
    for hook in hooks:
        hook.remove()
    return out, seen


def _tapped(key: str, out: Tensor | tuple[Tensor, Tensor], images: int) -> dict[str, Tensor]:
    if isinstance(out, tuple):  # TNT: pixels of every patch, and patches
        pixels, patches = out
        return {
            f"{key}.pixel": pixels[: len(pixels) // images].detach(),
            f"{key}.patch": patches[:1].detach(),
        }
    return {key: out[0].detach().flatten(0, -2)}  # Swin keeps rows and columns apart


def check_taps(seen: dict[str, Tensor], want: dict, facts: dict, prefix: str = "", **tap: int) -> None:
    assert {f"{prefix}tap.{key}" for key in seen} == {k for k in want if k.startswith(f"{prefix}tap.")}
    for key, tokens in seen.items():
        first_image = tokens.numpy()
        sampled = golden.tap(first_image, **tap)
        np.testing.assert_allclose(
            sampled, want[f"{prefix}tap.{key}"], rtol=2e-7, atol=1e-10
        )  # kept as float32
        sums = facts["taps"][key]
        assert list(first_image.shape) == sums["shape"]
        assert abs(first_image.sum() - sums["sum"]) < 1e-11 * sums["abs_sum"]


def marked(names):
    """Mark the largest ones."""
    return [pytest.param(name, marks=pytest.mark.slow) if "deit_base" in name else name for name in names]


@pytest.mark.parametrize("reference", marked([*NAMES, *BY_ARGUMENTS]))
def test_model_equals_the_authors_code(reference):
    facts, want = golden.facts(reference), golden.arrays(reference)
    name, args = BY_ARGUMENTS.get(reference, (NAMES.get(reference), {}))
    model = localvit.load_official(golden.filled(facts["state_dict"]), timm.create_model(name, **args))
    assert not model.load_report.missing
    size = facts["image_size"]
    image = torch.from_numpy(golden.make_input(size=size))[:1]  # evaluation treats images one by one
    with torch.no_grad():
        logits, seen = taps(model, image)
    both = [want[f"logits_{head}"] for head in ("cls", "dist") if f"logits_{head}" in want]
    expected = sum(both) / 2 if both else want["logits"]
    np.testing.assert_allclose(logits.numpy(), expected[:1], rtol=0, atol=1e-10)
    check_taps(seen, want, facts)
    assert count_parameters(model) == facts["params_total"] - not_parameters(facts["state_dict"])
    assert count_macs(model, (3, size, size)) / 1e9 == pytest.approx(facts["gmacs_matmul_conv"], abs=1e-6)


def not_parameters(state_dict: list) -> int:
    """Parameters of the reference that are not parameters here: fixed tables, and T2T's unused norms."""
    local = any(".conv.conv." in key for key, *_ in state_dict)
    unused = re.compile(r"^(tokens_to_token\.attention\d\.norm2\..*)$" if local else r"^$")
    fixed = re.compile(r"^(tokens_to_token\.attention\d\.w)$")
    is_t2t = any(key.startswith("tokens_to_token.") for key, *_ in state_dict)
    return sum(
        int(np.prod(shape))
        for key, shape, *_ in state_dict
        if unused.match(key) or fixed.match(key) or (is_t2t and key == "pos_embed")
    )


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
    if case["class"] not in ("models.localvit.Attention", "PyramidVisionTransformer", "T2T_ViT")
]
COMMON = ("img_size", "num_classes", "qkv_bias", "mlp_ratio")
# Class of the reference -> our plain model, and its argument -> the reference's where they differ.
PLAIN = {
    "VisionTransformer": (
        "deit_tiny_patch16_224",
        {k: k for k in ("patch_size", "embed_dim", "depth", "num_heads")},
    ),
    "TNT": (
        "tnt_s_legacy_patch16_224",
        {"embed_dim": "embed_dim", "inner_dim": "in_dim", "depth": "depth"}
        | {"num_heads_outer": "num_heads", "num_heads_inner": "in_num_head"},
    ),
    "SwinTransformer": (
        "swin_tiny_patch4_window7_224",
        {k: k for k in ("embed_dim", "depths", "num_heads", "window_size", "drop_path_rate")},
    ),
    "PyramidVisionTransformer": (
        "pvt_tiny",
        {k: k for k in ("embed_dims", "depths", "num_heads", "sr_ratios", "mlp_ratios")},
    ),
    "T2T_ViT": (
        "t2t_vit_7",
        {k: k for k in ("tokens_type", "embed_dim", "depth", "num_heads", "token_dim")},
    ),
}
LOCAL = {
    "LocalVisionTransformer": "VisionTransformer",
    "LocalViT_TNT": "TNT",
    "LocalViT_swin": "SwinTransformer",
    "LocalViT_PVT": "PyramidVisionTransformer",
    "LocalViT_T2T": "T2T_ViT",
}
GATES = {"LocalViT_TNT": {"gate_reduction": "dim"}, "LocalViT_PVT": {"gate_reduction": "dim"}} | {
    "LocalViT_swin": {"gate_width": 16}
}


def plain(kind: str, args: dict) -> nn.Module:
    distilled = kind == "DistilledVisionTransformer"
    name, names = PLAIN["VisionTransformer" if distilled else kind]
    name = "deit_tiny_distilled_patch16_224" if distilled else name
    common = {k: args[k] for k in COMMON if k in args}
    more = {"token_drop_rate": 0.0} if kind == "T2T_ViT" else {}
    ours = {ours: args[theirs] for ours, theirs in names.items()}
    return timm.create_model(name, **common, **ours, **more, norm_layer=nn.LayerNorm)  # eps 1e-5


def miniature(case: dict) -> nn.Module:
    kind, args = case["class"], case["constructor"]
    model = plain(LOCAL.get(kind, kind), args)
    if kind == "LocalVisionTransformer":
        localvit.localize(model, by_code(args))
        if args["qk_scale"]:
            for block in model.blocks:
                block.attn.scale, block.attn.fused_attn = args["qk_scale"], False
    elif kind == "LocalViT_T2T":
        also = {"tokens_to_token": LocalityConfig(gate="none")}
        localvit.localize(model, LocalityConfig(gate_reduction=args["reduction"]), also=also)
    elif kind in LOCAL:
        localvit.localize(model, LocalityConfig(**GATES[kind]))
    return model


def by_code(args: dict) -> LocalityConfig:
    """The options of the reference's DeiT version."""
    code = args["act"]
    gate = {1: "none", 2: "none", 3: "se", 4: "eca"}.get(code, "eca_hard")
    return LocalityConfig(
        activation="relu6" if code == 1 else "hardswish",
        gate=gate,
        gate_reduction=args["reduction"] if gate == "se" else None,
        expansion=args["mlp_ratio"],
        depthwise=not args["wo_dp_conv"],
        position="first" if args["dp_first"] else "mid",
    )


@pytest.mark.parametrize("name", MINIATURES)
def test_miniature_equals_the_authors_code(name):
    case, want = golden.facts("variants")["variants"][name], golden.arrays("variants")
    model = miniature(case)
    weights = golden.filled(case["keys"])
    localvit.load_official(weights, model)
    assert count_parameters(model) == case["params_total"] - not_parameters(case["keys"])
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
    own_names = _own_names(weights, model)
    parameters, buffers = dict(model.named_parameters()), dict(model.named_buffers())
    for key, norm in case["grad_norms"].items():
        if norm is None or own_names[key] not in parameters:  # frozen or unused in the reference
            assert not norm, key
            continue
        gradient = parameters[own_names[key]].grad
        assert gradient.norm().item() == pytest.approx(norm, rel=1e-9, abs=1e-12), key
    for key, (total, squares) in case.get("bn_after_sum_sqsum", {}).items():
        value = buffers[own_names[key]]
        assert value.sum().item() == pytest.approx(total, rel=1e-9, abs=1e-11), key
        assert value.square().sum().item() == pytest.approx(squares, rel=1e-9), key
