"""PVT v1 against the numbers of the authors' own code, and against what timm asks of a model."""

import copy

import numpy as np
import pytest
import timm
import torch
from timm.layers import set_fused_attn
from timm.models import FeatureInfo, group_parameters
from timm.optim import param_groups_weight_decay
from torch import Tensor, nn

from localvit.baselines.pvt import (
    DEPTHS,
    PUBLISHED,
    PyramidVisionTransformer,
    checkpoint_filter_fn,
    to_own_key,
)
from localvit.cost import count_macs, count_parameters, on_meta

from .. import golden
from ..models.test_golden import check_taps, taps

SMALL = {
    "img_size": 64,
    "num_classes": 10,
    "embed_dims": (8, 16, 20, 32),
    "depths": (1, 1, 2, 2),
}


def small(**kwargs) -> PyramidVisionTransformer:
    torch.manual_seed(0)
    return PyramidVisionTransformer(**{**SMALL, **kwargs}).eval()


def images(batch: int = 2, height: int = 64, width: int = 64) -> Tensor:
    return torch.randn(batch, 3, height, width, generator=torch.Generator().manual_seed(1))


# --- golden numbers ------------------------------------------------------------------------------------

# The reference's largest model has no published weights and so no name here.
HUGE = {"embed_dims": (128, 256, 512, 768), "depths": (3, 10, 60, 3), "num_heads": (2, 4, 8, 12)}


@pytest.mark.parametrize("reference", [*DEPTHS, pytest.param("pvt_huge_v2", marks=pytest.mark.slow)])
def test_equals_the_authors_code(reference):
    facts, want = golden.facts(reference), golden.arrays(reference)
    model = on_meta(
        lambda: (
            PyramidVisionTransformer(**HUGE) if reference == "pvt_huge_v2" else timm.create_model(reference)
        )
    ).eval()
    weights = checkpoint_filter_fn(golden.filled(facts["state_dict"]), model)
    model.load_state_dict(weights, assign=True)
    image = torch.from_numpy(golden.make_input())[:1]  # evaluation treats images one by one
    with torch.no_grad():
        logits, seen = taps(model, image)
    np.testing.assert_allclose(logits.numpy(), want["logits"][:1], rtol=0, atol=1e-10)
    check_taps(seen, want, facts)
    assert count_parameters(model) == facts["params_total"]
    assert count_macs(model, (3, 224, 224)) / 1e9 == pytest.approx(facts["gmacs_matmul_conv"], abs=1e-6)


def miniature(**kwargs) -> tuple[PyramidVisionTransformer, dict]:
    case = golden.facts("variants")["variants"]["pvt"]
    reference = case["constructor"]
    args = {key: reference[key] for key in ("img_size", "num_classes", "embed_dims", "depths", "num_heads")}
    model = PyramidVisionTransformer(**args, norm_layer=nn.LayerNorm, **kwargs).double().eval()
    model.load_state_dict(checkpoint_filter_fn(golden.filled(case["keys"]), model))
    return model, case


@pytest.mark.parametrize("fused", [True, False])
def test_miniature_equals_the_authors_code_in_training_too(fused):
    set_fused_attn(fused)
    model, case = miniature()
    set_fused_attn(True)
    assert {stage.blocks[0].attn.fused_attn for stage in model.stages} == {fused}
    want = golden.arrays("variants")
    image = torch.from_numpy(golden.make_input(size=64)).requires_grad_()
    with torch.no_grad():
        logits, seen = taps(model, image)
    np.testing.assert_allclose(logits.numpy(), want["pvt/eval"], rtol=0, atol=1e-10)
    check_taps(seen, want, case, "pvt/", count=127)

    out = model.train()(image)
    np.testing.assert_allclose(out.detach().numpy(), want["pvt/train"], rtol=0, atol=1e-10)
    loss = out.square().mean()
    loss.backward()
    assert loss.item() == pytest.approx(case["train_loss"], rel=1e-11)
    gradient = golden.tap(image.grad.numpy(), count=127)
    np.testing.assert_allclose(gradient, want["pvt/grad_x"], rtol=0, atol=1e-10)
    parameters = dict(model.named_parameters())
    assert {to_own_key(key) for key in case["grad_norms"]} == set(parameters)
    for key, norm in case["grad_norms"].items():
        assert parameters[to_own_key(key)].grad.norm().item() == pytest.approx(norm, rel=1e-9), key


def test_names_and_their_configuration():
    assert timm.list_models(module="pvt") == sorted(DEPTHS) == sorted(PUBLISHED)
    assert timm.list_pretrained("pvt_tiny*") == ["pvt_tiny.in1k"]
    cfg = timm.get_pretrained_cfg("pvt_large")
    assert cfg.url == "https://github.com/whai362/PVT/releases/download/v2/pvt_large.pth"
    model = on_meta(lambda: timm.create_model("pvt_large", num_classes=7))
    assert cfg.classifier + ".weight" in model.state_dict()
    assert model.get_parameter(cfg.first_conv + ".weight").shape == (64, 3, 4, 4)
    assert model.head.out_features == 7


# --- image sizes ---------------------------------------------------------------------------------------


def test_a_table_of_its_own_gives_each_position_its_row():
    """Permuting rows and columns of image patches and tables alike leaves the logits as they are."""
    model, moved = small(img_size=(64, 96)), small(img_size=(96, 64))
    x = images(height=64, width=96)
    for stage, other in zip(model.stages, moved.stages, strict=True):
        prefix, (height, width) = stage.num_prefix_tokens, stage.patch_embed.grid_size
        assert other.patch_embed.grid_size == (width, height)
        table = stage.pos_embed.data[:, prefix:].unflatten(1, (height, width)).transpose(1, 2).flatten(1, 2)
        other.pos_embed.data = torch.cat([stage.pos_embed.data[:, :prefix], table], dim=1)
    for module in moved.modules():
        if isinstance(module, nn.Conv2d):
            module.weight.data = module.weight.data.transpose(2, 3)
    torch.testing.assert_close(moved(x.transpose(2, 3)), model(x), rtol=0, atol=1e-6)
    assert not torch.allclose(moved(x.transpose(2, 3).flip(3)), model(x), atol=1e-4)


def test_set_input_size_resamples_every_table():
    model, x = small(), images()
    before = copy.deepcopy(model)
    model.set_input_size((128, 96))
    assert [stage.patch_embed.grid_size for stage in model.stages] == [(32, 24), (16, 12), (8, 6), (4, 3)]
    assert [stage.pos_embed.shape[1] for stage in model.stages] == [768, 192, 48, 13]
    assert model.stages[3].pos_embed[:, 0].equal(before.stages[3].pos_embed[:, 0])
    assert model(images(height=128, width=96)).shape == (2, 10)
    for stage in model.stages:  # bicubic interpolation keeps constants
        stage.pos_embed.data[:, stage.num_prefix_tokens :] = 0.5
    model.set_input_size(64)
    for stage in model.stages:
        table = stage.pos_embed[:, stage.num_prefix_tokens :]
        torch.testing.assert_close(table, torch.full_like(table, 0.5))
        assert stage.pos_embed.requires_grad
    before.set_input_size(64)
    assert before(x).equal(small()(x))  # the same size changes nothing


@pytest.mark.parametrize("configured", [(64, 64), (32, 96)])
def test_dynamic_size_equals_a_model_of_that_size(configured):
    model, fixed = small(img_size=configured, dynamic_img_size=True), small(img_size=configured)
    x = images(2, *configured)
    assert model(x).equal(fixed(x))
    for size in ((96, 128), (96, 32)):  # the second has as many patches as one of the configured
        fixed = small(img_size=configured)
        fixed.set_input_size(size)
        x = images(2, *size)
        torch.testing.assert_close(model(x), fixed(x))
        torch.testing.assert_close(torch.jit.script(model)(x), fixed(x))


def test_a_resized_model_is_saved_with_its_size(tmp_path):
    model = timm.create_model("pvt_tiny", **SMALL).eval()
    model.set_input_size((32, 128))  # as many patches as 64 x 64
    timm.models.save_for_hf(model, tmp_path)
    again, x = timm.create_model(f"local-dir:{tmp_path}", pretrained=True).eval(), images(2, 32, 128)
    assert again(x).equal(model(x))
    args = {**SMALL, "img_size": (128, 32)}
    turned = timm.create_model(f"local-dir:{tmp_path}", pretrained=True, **args).eval()
    model.set_input_size((128, 32))
    assert turned(images(2, 128, 32)).equal(model(images(2, 128, 32)))


@pytest.mark.parametrize("size", [40, (64, 80), 16, 0, (64, 64, 64)])
def test_a_size_that_would_lose_pixels_is_refused(size):
    with pytest.raises(ValueError, match=r"img_size .* multiples of 32"):
        small(img_size=size)
    model = small()
    with pytest.raises(ValueError, match=r"img_size .* multiples of 32"):
        model.set_input_size(size)
    assert model(images()).equal(small()(images()))


def test_other_images_than_configured_are_refused():
    with pytest.raises(AssertionError, match=r"Input height \(32\) doesn't match model \(64\)"):
        small()(images(height=32))
    with pytest.raises(AssertionError, match=r"should be divisible by patch size \(2\)"):
        small(dynamic_img_size=True)(images(height=80))


@pytest.mark.parametrize(
    ("args", "message"),
    [
        ({"depths": (1, 1, 2)}, r"embed_dims \(8, 16, 20, 32\): 4 values for 3 stages"),
        ({"num_heads": (1, 2)}, r"num_heads \(1, 2\): 2 values for 4 stages"),
        ({"embed_dims": (8, 16)}, r"embed_dims \(8, 16\): 2 values for 4 stages"),
        ({"num_heads": 3}, "num_heads 3 does not divide the embedding width 8"),
        ({"sr_ratios": (8, 4, 2, 2)}, "sr_ratio 2 is not accepted in the stage with the class token"),
        ({"global_pool": "max"}, r"global_pool 'max' is not accepted; use one of \('', 'token', 'avg'\)"),
    ],
)
def test_wrong_arguments_are_named(args, message):
    with pytest.raises(ValueError, match=message):
        small(**args)


# --- checkpoints ---------------------------------------------------------------------------------------


def test_every_key_of_the_reference_is_renamed_once():
    keys = [key for key, *_ in golden.facts("pvt_tiny")["state_dict"]]
    own = on_meta(lambda: timm.create_model("pvt_tiny")).state_dict()
    assert {to_own_key(key) for key in keys} == set(own)
    assert [to_own_key(key) for key in own] == list(own)


def test_own_state_dict_passes_unchanged():
    for size in (64, (32, 96)):
        model = small(img_size=size)
        own = model.state_dict()
        filtered = checkpoint_filter_fn(own, model)
        assert list(filtered) == list(own)
        assert all(filtered[key] is own[key] for key in own)


def test_checkpoint_of_another_size_is_resampled():
    model, other = small(), small(img_size=(96, 64))
    as_saved = {"model": model.state_dict(), "epoch": 3}
    other.load_state_dict(checkpoint_filter_fn(as_saved, other))
    model.set_input_size((96, 64))
    x = images(height=96)
    torch.testing.assert_close(other(x), model(x))


def test_checkpoint_that_is_not_square_needs_its_size():
    wide, model = small(img_size=(64, 96)), small()
    with pytest.raises(ValueError, match="384 patches, of unknown rows and columns"):
        checkpoint_filter_fn(wide.state_dict(), model)
    model.pretrained_model_args = {"img_size": (64, 96)}
    model.load_state_dict(checkpoint_filter_fn(wide.state_dict(), model))
    wide.set_input_size(64)
    torch.testing.assert_close(model(images()), wide(images()))


def test_loading_through_timm_adapts_classes_and_channels(tmp_path):
    case = golden.facts("variants")["variants"]["pvt"]
    torch.save(golden.filled(case["keys"]), tmp_path / "pvt.pth")
    args = {**SMALL, "num_classes": 3, "in_chans": 1}
    overlay = {"file": str(tmp_path / "pvt.pth"), "num_classes": 10}
    model = timm.create_model("pvt_tiny", pretrained=True, pretrained_cfg_overlay=overlay, **args)
    kernel = golden.filled(case["keys"])["patch_embed1.proj.weight"]
    torch.testing.assert_close(
        model.stages[0].patch_embed.proj.weight.data, kernel.sum(1, keepdim=True).float()
    )
    assert model.head.out_features == 3


# --- what timm asks of a model -------------------------------------------------------------------------


@pytest.mark.parametrize("grad_checkpointing", [False, True])
def test_intermediate_maps(grad_checkpointing):
    model, x = small(img_size=(64, 96)), images(width=96)
    features = model.forward_features(x)
    model.set_grad_checkpointing(grad_checkpointing)
    final, maps = model.forward_intermediates(x)
    assert final.equal(features)
    info = FeatureInfo(model.feature_info, (0, 1, 2, 3))
    sizes = [(2, c, 64 // r, 96 // r) for c, r in zip(info.channels(), info.reduction(), strict=True)]
    assert [tuple(m.shape) for m in maps] == sizes
    normed = model.forward_intermediates(x, indices=[-1], norm=True, intermediates_only=True)
    assert normed[0].flatten(2).transpose(1, 2).equal(features[:, 1:])
    early, [first] = model.forward_intermediates(x, indices=[0], stop_early=True)
    assert first.equal(maps[0])
    assert early.equal(maps[0])
    with pytest.raises(ValueError, match="output_fmt 'NLC'"):
        model.forward_intermediates(x, output_fmt="NLC")


@pytest.mark.parametrize("indices", [(0, 1, 2, 3), (0, 2), (-1,)])
def test_features_only_and_pruning(indices):
    torch.manual_seed(0)
    backbone = timm.create_model("pvt_tiny", features_only=True, out_indices=indices, **SMALL).eval()
    maps = small().forward_intermediates(images(), indices=list(indices), intermediates_only=True)
    for got, expected in zip(backbone(images()), maps, strict=True):
        assert got.equal(expected)
    pruned = backbone.model
    pruned(images())
    assert pruned.num_classes == 0
    if max(indices) == 2:
        assert len(pruned.stages) == 3
        assert (pruned.cls_token, pruned.num_prefix_tokens, pruned.num_features) == (None, 0, 20)
        pruned.reset_classifier(5, "avg")
        assert pruned(images()).shape == (2, 5)
        with pytest.raises(ValueError, match="global_pool 'token'"):
            pruned.reset_classifier(5, "token")
        assert torch.jit.script(pruned)(images()).equal(pruned(images()))
        assert "cls_token" not in dict(pruned.named_parameters())


def test_head():
    model, x = small(drop_rate=0.5), images()
    tokens = model.forward_features(x)
    assert tokens.shape == (2, 1 + 4, 32)
    assert model.forward_head(tokens, pre_logits=True).equal(tokens[:, 0])
    assert model(x).equal(model.get_classifier()(tokens[:, 0]))
    model.reset_classifier(7, "avg")
    torch.testing.assert_close(model(x), model.head(tokens[:, 1:].mean(1)))
    model.reset_classifier(0, "")
    assert model(x).equal(tokens)
    with pytest.raises(ValueError, match="global_pool 'map'"):
        model.reset_classifier(0, "map")


def test_rates_reach_their_layers():
    model = small(
        depths=(1, 2, 1, 1),
        drop_rate=0.1,
        pos_drop_rate=0.2,
        proj_drop_rate=0.3,
        attn_drop_rate=0.4,
        drop_path_rate=0.8,
    )
    blocks = [block for stage in model.stages for block in stage.blocks]
    rates = [getattr(drop, "drop_prob", 0.0) for b in blocks for drop in (b.drop_path1, b.drop_path2)]
    assert rates == pytest.approx([0, 0, 0.2, 0.2, 0.4, 0.4, 0.6, 0.6, 0.8, 0.8])
    assert {stage.pos_drop.p for stage in model.stages} == {0.2}
    assert {(b.mlp.drop1.p, b.mlp.drop2.p, b.attn.proj_drop.p, b.attn.attn_drop.p) for b in blocks} == {
        (0.3, 0.3, 0.3, 0.4)
    }
    assert model.head_drop.p == 0.1


def test_each_drop_acts_where_it_should():
    model, x = small(drop_path_rate=0.1).train(), images()
    block, tokens = model.stages[3].blocks[1], torch.randn(2, 5, 32)
    block.drop_path1.drop_prob = block.drop_path2.drop_prob = 1.0
    assert block(tokens, (2, 2)).equal(tokens)
    block.drop_path1.drop_prob = 0.0
    assert block(tokens, (2, 2)).equal(tokens + block.attn(block.norm1(tokens), (2, 2)))
    stage = model.stages[0]
    stage.pos_drop.p = 1.0
    assert stage(x)[0].equal(stage.blocks[0](torch.zeros(2, 256, 8), (16, 16)))
    model.head_drop.p = 1.0
    assert model(x).equal(model.head.bias.expand(2, -1))


def test_weight_decay_spares_the_class_token_and_vectors_only():
    model = small()
    names = {id(p): name for name, p in model.named_parameters()}
    groups = param_groups_weight_decay(model, 0.05, no_weight_decay_list=model.no_weight_decay())
    spared = {names[id(p)] for group in groups if not group["weight_decay"] for p in group["params"]}
    assert spared == {name for name, p in model.named_parameters() if p.ndim == 1} | {"cls_token"}


def test_groups_follow_depth():
    model = small(depths=(1, 2, 1, 1))
    groups = group_parameters(model, model.group_matcher())
    where = {name: i for i, names in groups.items() for name in names}
    assert where["stages.0.pos_embed"] == where["stages.0.patch_embed.proj.weight"] == 0
    assert where["stages.1.patch_embed.norm.bias"] == where["stages.1.blocks.0.mlp.fc1.weight"] == 2
    assert where["stages.1.blocks.1.mlp.fc1.weight"] == 3
    assert where["cls_token"] == where["stages.3.pos_embed"] == where["stages.3.blocks.0.norm1.bias"] == 5
    assert where["norm.weight"] == 5  # timm's way to say: with the last block
    assert where["head.weight"] == 6
    coarse = {n: i for i, ns in group_parameters(model, model.group_matcher(coarse=True)).items() for n in ns}
    assert coarse["stages.0.blocks.0.norm1.bias"] == 1
    assert coarse["cls_token"] == coarse["stages.3.pos_embed"] == coarse["stages.3.blocks.0.norm1.bias"] == 4


def initial_weights_follow_the_reference(model: nn.Module) -> None:
    for module in model.modules():
        if isinstance(module, nn.Linear):
            assert module.weight.std().item() == pytest.approx(0.02, rel=0.1)
            assert not module.bias.any()
        elif isinstance(module, nn.LayerNorm):
            assert (module.weight == 1).all()
            assert not module.bias.any()
        elif isinstance(module, nn.Conv2d):  # PyTorch's default: uniform within 1 / sqrt(fan in)
            bound = module.weight[0].numel() ** -0.5
            assert 0.9 * bound < module.weight.abs().max() <= bound
            assert 0.5 * bound < module.bias.abs().max() <= bound
    for table in (*(stage.pos_embed for stage in model.stages), model.cls_token):
        assert table.std().item() == pytest.approx(0.02, rel=0.1)


def test_initial_weights_also_of_a_model_from_the_meta_device():
    initial_weights_follow_the_reference(small(embed_dims=(64, 128, 320, 512)))
    model = on_meta(lambda: small(embed_dims=(64, 128, 320, 512))).to_empty(device="cpu")
    for p in model.parameters():
        p.data.fill_(torch.nan)
    torch.manual_seed(0)
    model.init_weights()
    initial_weights_follow_the_reference(model)


def test_checkpointing_runs_blocks_twice_and_keeps_gradients():
    gradients, calls = [], []
    for enable in (False, True):
        model = small().train()
        model.set_grad_checkpointing(enable)
        calls.append(0)
        for stage in model.stages:
            for block in stage.blocks:  # checkpointing calls the module anew, so hooks see it
                block.mlp.register_forward_pre_hook(lambda *_: calls.append(calls.pop() + 1))
        model(images()).square().mean().backward()
        gradients.append({name: p.grad for name, p in model.named_parameters()})
    assert calls == [6, 12]
    for name, gradient in gradients[0].items():
        torch.testing.assert_close(gradients[1][name], gradient, msg=name)


def test_copies_scripts_and_bfloat16():
    model, x = small(), images()
    expected = model(x)
    assert copy.deepcopy(model)(x).equal(expected)
    assert torch.jit.script(model)(x).equal(expected)
    with torch.autocast("cpu", torch.bfloat16):
        torch.testing.assert_close(model(x).float(), expected, rtol=0.05, atol=0.05)
    assert small(dtype=torch.bfloat16)(x.bfloat16()).dtype == torch.bfloat16


def test_compiles_to_one_graph():
    model, x = small(), images()
    with torch.no_grad():
        compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
        torch.testing.assert_close(compiled(x), model(x))


def test_exports_with_any_batch_size():
    model = small()
    program = torch.export.export(
        model, (images(),), dynamic_shapes=({0: torch.export.Dim("batch")},), strict=False
    ).module()
    for batch in (1, 2, 5):
        torch.testing.assert_close(program(images(batch)), model(images(batch)))
