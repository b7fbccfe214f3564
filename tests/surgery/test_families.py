"""Surgery on every family with an adapter: what is replaced, what is kept, and that locality is local."""

import copy

import pytest
import timm
import torch
from timm.layers import DropPath
from timm.models import tnt
from torch import Tensor, nn

import localvit
from localvit import ConfigError, LocalityConfig
from localvit.cost import count_macs, count_parameters
from localvit.locality.feed_forward import LocalityFeedForward
from localvit.surgery.drop_path import BlockWithOwnDropPath

PRESERVE = LocalityConfig(init="preserve")
# timm name -> arguments that make it small; and its further groups of FFNs
MODELS = {
    "deit_tiny_patch16_224": {"patch_size": 8, "embed_dim": 24, "depth": 3, "num_heads": 3},
    "t2t_vit_7": {"embed_dim": 24, "depth": 3, "num_heads": 3, "token_dim": 16},
    "t2t_vit_t_14": {"embed_dim": 24, "depth": 3, "num_heads": 3, "token_dim": 16},
    "pvt_tiny": {"embed_dims": (8, 16, 20, 32), "depths": (1, 1, 1, 2)},
    "tnt_t_legacy_patch16_224": {"embed_dim": 24, "inner_dim": 12, "depth": 3}
    | {"num_heads_outer": 3, "num_heads_inner": 3},
    "tnt_s_patch16_224": {"embed_dim": 24, "inner_dim": 12, "depth": 3}  # the other form of TNT
    | {"num_heads_outer": 3, "num_heads_inner": 3},
    "swin_tiny_patch4_window7_224": {"embed_dim": 16, "depths": (2, 1, 1, 1), "num_heads": (1, 2, 2, 2)},
}
GROUPS = {"t2t_vit_7": "tokens_to_token", "t2t_vit_t_14": "tokens_to_token"} | {
    "tnt_t_legacy_patch16_224": "inner",
    "tnt_s_patch16_224": "inner",
}
DROPOUT = {"proj_drop_rate": 0.1, "drop_path_rate": 0.2}
every_model = pytest.mark.parametrize("name", MODELS)


def make(name: str, **kwargs) -> nn.Module:
    torch.manual_seed(3)
    return timm.create_model(name, **{"img_size": 64, "num_classes": 5, **MODELS[name], **kwargs})


def images(batch: int = 2) -> Tensor:
    return torch.randn(batch, 3, 64, 64, generator=torch.Generator().manual_seed(5))


def everywhere(name: str, config: LocalityConfig) -> dict[str, LocalityConfig]:
    return {GROUPS[name]: config} if name in GROUPS else {}


def state(model: nn.Module) -> dict[str, Tensor]:
    return {k: v.clone() for k, v in model.state_dict().items()}


@every_model
@pytest.mark.parametrize("training", [False, True])
def test_preserve_starts_as_exactly_the_same_function(name, training):
    model = make(name, **DROPOUT).train(training)
    plain = copy.deepcopy(model)
    localvit.localize(model, PRESERVE, also=everywhere(name, PRESERVE))
    outputs = []
    for m in (plain, model):
        torch.manual_seed(0)
        outputs.append(m(images()))
    assert torch.equal(*outputs)
    assert set(plain.state_dict()) < set(model.state_dict())


@every_model
def test_the_plan_counts_what_then_happens(name):
    config = LocalityConfig(gate_reduction="dim")
    also = everywhere(name, LocalityConfig(gate="none"))
    model = make(name)
    plan = localvit.plan(model, config, also=also)
    assert localvit.localize(model, config, also=also).plan == plan
    assert plan.parameters[1] == count_parameters(model)
    assert plan.macs[1] == count_macs(model, (3, 64, 64))
    inside = sum(isinstance(m, LocalityFeedForward) for m in model.modules())
    assert inside == len(plan.sites)
    if also:
        assert f"and in {GROUPS[name]}" in str(plan)


@every_model
@pytest.mark.parametrize(  # with more squeeze units than a few images can silence
    "config", [LocalityConfig(gate_width=32), LocalityConfig(gate_width=32, prefix="pointwise", norm="layer")]
)
def test_parameters_learn_except_those_the_plan_calls_dead(name, config):
    model = make(name).train()
    dead = set(localvit.localize(model, config).plan.dead_parameters)
    model(images()).square().sum().backward()
    silent = {n for n, p in model.named_parameters() if p.grad is None or p.grad.abs().max() == 0}
    assert silent == dead
    assert bool(dead) == ("swin" not in name)  # where the head reads a class token


@every_model
def test_restore_gives_back_what_was_there(name):
    model = make(name, **DROPOUT).eval()
    before, classes = state(model), [type(m) for m in model.modules()]
    logits = model(images())
    localvit.localize(model, also=everywhere(name, LocalityConfig()))
    assert [type(m) for m in model.modules()] != classes
    localvit.restore(model)
    assert [type(m) for m in model.modules()] == classes
    after = state(model)
    assert after.keys() == before.keys()
    assert all(torch.equal(before[k], after[k]) for k in before)
    assert torch.equal(model(images()), logits)
    assert not any(m._forward_hooks for m in model.modules())
    assert not any(hasattr(m, "grid_record") for m in model.modules())


@every_model
def test_chosen_blocks_are_counted_through_all_stages(name):
    model = make(name)
    plan = localvit.localize(model, blocks=[1, 2]).plan
    local = [path for path, m in model.named_modules() if isinstance(m, LocalityFeedForward)]
    assert [site.name for site in plan.sites] == local
    first, second = {
        "pvt_tiny": ("stages.1.blocks.0.mlp", "stages.2.blocks.0.mlp"),
        "swin_tiny_patch4_window7_224": ("layers.0.blocks.1.mlp", "layers.1.blocks.0.mlp"),
    }.get(name, ("blocks.1.mlp", "blocks.2.mlp"))
    assert local == [first, second]


@every_model
def test_what_one_half_of_the_depth_draws_does_not_depend_on_the_other(name):
    weights = []
    for blocks in ("all", [1]):
        model = make(name)
        localvit.localize(model, blocks=blocks, seed=7)
        weights.append([m.fc1.weight for m in model.modules() if isinstance(m, LocalityFeedForward)])
    assert torch.equal(weights[0][1], weights[1][0])


def test_groups_that_a_model_lacks_are_named():
    with pytest.raises(ConfigError, match=r"also='inner' is not a further group of FFNs; accepted: none"):
        localvit.localize(make("swin_tiny_patch4_window7_224"), also={"inner": LocalityConfig()})
    with pytest.raises(ConfigError, match=r"also='blocks' is not a further group.*'tokens_to_token'"):
        localvit.localize(make("t2t_vit_7"), also={"blocks": LocalityConfig()})


@every_model
def test_a_model_saved_with_a_further_group_comes_back(name, tmp_path):
    from timm.models import save_for_hf

    model = make(name).eval()
    localvit.localize(model, LocalityConfig(kernel_size=5), also=everywhere(name, LocalityConfig(gate="eca")))
    save_for_hf(model, str(tmp_path), safe_serialization=True)
    again = timm.create_model(f"local-dir:{tmp_path}", pretrained=True).eval()
    assert torch.equal(again(images()), model(images()))


# --- TNT's one drop-path for four branches -------------------------------------------------------------


@pytest.mark.parametrize("legacy", [True, False])
@pytest.mark.parametrize("training", [True, False])
def test_a_tnt_block_with_own_drop_paths_computes_the_same(legacy, training):
    from localvit.surgery.drop_path import join_drop_path, separate_drop_path

    torch.manual_seed(0)
    block = tnt.Block(12, 24, 4, 3, 3, drop_path=0.4, legacy=legacy).train(training)
    pixels, patches = torch.randn(6 * 9, 4, 12), torch.randn(6, 10, 24)
    outputs = []
    for change in (lambda _: None, separate_drop_path, join_drop_path):
        change(block)
        torch.manual_seed(1)
        outputs.append(block(pixels, patches))
    for other in outputs[1:]:
        assert torch.equal(other[0], outputs[0][0])
        assert torch.equal(other[1], outputs[0][1])
    assert type(block) is tnt.Block


def test_each_branch_has_the_drop_path_it_should():
    """With everything dropped but the two FFNs, only they are left; and the other way round."""
    from localvit.surgery.drop_path import separate_drop_path

    torch.manual_seed(0)
    block = tnt.Block(12, 24, 4, 3, 3, legacy=True)
    separate_drop_path(block)
    pixels, patches = torch.randn(6 * 9, 4, 12), torch.randn(6, 10, 24)
    drop, keep = nn.Hardtanh(0.0, 1e-30), nn.Identity()  # nearly nothing, whatever comes in

    block.drop_path, block.drop_path_mlp, block.drop_path_mlp_in = drop, keep, keep
    inner = pixels + block.mlp_in(block.norm_mlp_in(pixels))
    outer = patches.clone()
    outer[:, 1:] += block.proj(block.norm1_proj(inner).reshape(6, 9, -1))
    outer = outer + block.mlp(block.norm_mlp(outer))
    for got, expected in zip(block(pixels, patches), (inner, outer), strict=True):
        torch.testing.assert_close(got, expected)

    block.drop_path, block.drop_path_mlp, block.drop_path_mlp_in = keep, drop, drop
    inner = pixels + block.attn_in(block.norm_in(pixels))
    outer = patches.clone()
    outer[:, 1:] += block.proj(block.norm1_proj(inner).reshape(6, 9, -1))
    outer = outer + block.attn_out(block.norm_out(outer))
    for got, expected in zip(block(pixels, patches), (inner, outer), strict=True):
        torch.testing.assert_close(got, expected)


def test_locality_leaves_drop_path_to_attention_and_the_inner_branches():
    """As in the reference: without drop-path on the feed-forward branch, with it on the three others."""
    model = make("tnt_t_legacy_patch16_224", drop_path_rate=0.3)
    localvit.localize(model)
    block = model.blocks[-1]
    assert type(block) is BlockWithOwnDropPath
    assert isinstance(block.drop_path, DropPath)
    assert isinstance(block.drop_path_mlp_in, DropPath)
    assert isinstance(block.drop_path_mlp, nn.Identity)
    kept = make("tnt_t_legacy_patch16_224", drop_path_rate=0.3)
    localvit.localize(kept, LocalityConfig(drop_path=True))
    assert type(kept.blocks[-1]) is tnt.Block


# --- locality is local ---------------------------------------------------------------------------------


def local_ffns(model: nn.Module) -> list[LocalityFeedForward]:
    return [m for m in model.modules() if isinstance(m, LocalityFeedForward)]


@every_model
@torch.no_grad()
def test_shifting_the_grid_shifts_the_branch(name):
    """One cell further in, one cell further out, away from the border; the gate sees the whole map."""
    model = make(name)
    localvit.localize(model, LocalityConfig(gate="none"), also=everywhere(name, LocalityConfig(gate="none")))
    model.double().eval()(images().double())
    for ffn in local_ffns(model):
        grid = ffn.current_grid()
        if min(grid.height, grid.width) < 4:
            continue
        dim = ffn.fc1.in_channels
        prefix = torch.randn(1, grid.num_prefix_tokens, dim, dtype=torch.float64)
        cells = torch.randn(1, grid.height, grid.width, dim, dtype=torch.float64)
        shifted = cells.roll((1, 1), dims=(1, 2))
        outs = [ffn(torch.cat([prefix, x.flatten(1, 2)], 1), grid) for x in (cells, shifted)]
        maps = [out[:, grid.num_prefix_tokens :].unflatten(1, grid[:2]) for out in outs]
        torch.testing.assert_close(maps[1][:, 2:-1, 2:-1], maps[0][:, 1:-2, 1:-2])
        assert not torch.allclose(maps[1][:, 2:-1, 2:-1], maps[0][:, 2:-1, 2:-1])


@every_model
@torch.no_grad()
def test_a_zero_kernel_is_no_locality(name):
    """Then a token's branch is the same wherever its neighbours are (without gate and batch statistics)."""
    model = make(name)
    localvit.localize(model, LocalityConfig(gate="none"))
    model.double().eval()(images().double())
    ffn = local_ffns(model)[0]
    grid = ffn.current_grid()
    tokens = torch.randn(1, grid.height * grid.width + grid.num_prefix_tokens, ffn.fc1.in_channels).double()
    order = torch.randperm(grid.height * grid.width) + grid.num_prefix_tokens
    order = torch.cat([torch.arange(grid.num_prefix_tokens), order])
    assert not torch.allclose(ffn(tokens[:, order], grid), ffn(tokens, grid)[:, order])
    ffn.conv.weight.zero_()
    torch.testing.assert_close(ffn(tokens[:, order], grid), ffn(tokens, grid)[:, order])


@pytest.mark.parametrize("local", [False, True])
@torch.no_grad()
def test_the_order_of_patches_matters_to_a_local_model_only(local):
    """Without a position table a plain transformer cannot tell an image from one with patches shuffled."""
    model = make("deit_tiny_patch16_224")
    if local:
        localvit.localize(model)
    model.double().eval()
    model.pos_embed.zero_()
    image = images().double()
    patches = image.unfold(2, 8, 8).unfold(3, 8, 8).flatten(2, 3)
    order = torch.randperm(64, generator=torch.Generator().manual_seed(2))
    shuffled = patches[:, :, order].unflatten(2, (8, 8)).permute(0, 1, 2, 4, 3, 5).reshape(image.shape)
    assert torch.allclose(model(shuffled), model(image), atol=1e-10) == (not local)
