import copy
import json
import pickle

import pytest
import timm
import torch
from timm.layers import GluMlp, LayerNorm, Mlp, SwiGLU, SwiGLUPacked
from timm.models.vision_transformer import Block, VisionTransformer
from torch import nn

import localvit
from localvit import ConfigError, LocalityConfig, RestoreError, UnsupportedModelError
from localvit.locality.feed_forward import HiddenLocality, LocalityFeedForward

SMALL = {"img_size": 32, "patch_size": 8, "embed_dim": 24, "num_heads": 3, "depth": 3, "num_classes": 5}
PRESERVE = LocalityConfig(init="preserve")


def make(base: str = "deit_tiny_patch16_224", **kwargs) -> nn.Module:
    torch.manual_seed(3)
    return timm.create_model(base, **{**SMALL, **kwargs})


def images() -> torch.Tensor:
    return torch.randn(4, 3, 32, 32, generator=torch.Generator().manual_seed(5))


def state(model: nn.Module) -> dict[str, torch.Tensor]:
    return {k: v.clone() for k, v in model.state_dict().items()}


def same(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[k], b[k]) for k in a)


# --- the plan ------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "config", [LocalityConfig(), PRESERVE, LocalityConfig(prenorm=True, prefix="pointwise")]
)
@pytest.mark.parametrize("kwargs", [{}, {"init_values": 1e-5}, {"global_pool": "avg"}])
def test_the_plan_counts_what_then_happens(config, kwargs):
    model = make(**kwargs)
    before = state(model)
    plan = localvit.plan(model, config, [0, 2])
    assert same(before, state(model))
    assert not any(isinstance(m, (LocalityFeedForward, HiddenLocality)) for m in model.modules())
    assert plan.parameters[0] == localvit.cost.count_parameters(model)
    assert plan.macs[0] == localvit.cost.count_macs(model, (3, 32, 32))
    report = localvit.localize(model, config, [0, 2])
    assert report.plan == plan
    assert plan.parameters[1] == localvit.cost.count_parameters(model)
    assert plan.macs[1] == localvit.cost.count_macs(model, (3, 32, 32))
    assert [s.name for s in plan.sites] == ["blocks.0.mlp", "blocks.2.mlp"]


def test_planning_leaves_the_random_state_and_mode_alone():
    model = make().train()
    torch.manual_seed(11)
    expected = torch.randn(3)
    torch.manual_seed(11)
    localvit.plan(model)
    localvit.localize(model)
    assert torch.equal(torch.randn(3), expected)
    assert all(m.training for m in model.modules())


def test_a_plan_prints_and_is_json():
    plan = localvit.plan(make(), PRESERVE, "lower-third")
    assert json.loads(json.dumps(plan.to_dict()))["config"] == {"init": "preserve"}
    text = str(plan)
    assert "1 of 3 blocks" in text
    assert "blocks.0.mlp: Mlp -> Mlp + HiddenLocality" in text
    assert "GMACs" in text


@pytest.mark.parametrize(
    ("blocks", "expected"),
    [
        ("all", range(12)),
        ("lower-half", range(6)),
        ("lower-third", range(4)),
        ("middle-third", range(4, 8)),
        ("upper-third", range(8, 12)),
        ([3, 1], [1, 3]),
        ([[0, 2], [10, 12]], [0, 1, 10, 11]),
        ([[0, 2], 5], [0, 1, 5]),
    ],
)
def test_block_selection(blocks, expected):
    assert localvit.surgery.select_blocks(blocks, 12) == tuple(expected)


def test_thirds_are_a_partition_at_any_depth():
    for depth in range(3, 40):
        parts = [localvit.surgery.select_blocks(f"{p}-third", depth) for p in ("lower", "middle", "upper")]
        assert sum(parts, ()) == tuple(range(depth))


@pytest.mark.parametrize(
    ("blocks", "named"),
    [
        ("lower", ["'lower'", "lower-half"]),
        ([], ["[]", "no block"]),
        ([12], ["12", "0 to 11"]),
        ([-1], ["-1", "0 to 11"]),
        ([1, 1], ["more than once"]),
        ([[0, 3], 2], ["more than once"]),
        ([[0, 3, 1]], ["[0, 3, 1]", "[start, stop]"]),
        ([1.5], ["1.5"]),
        ([True], ["True"]),
        (3, ["3", "list"]),
    ],
)
def test_bad_blocks_are_named(blocks, named):
    with pytest.raises(ValueError, match="blocks=") as error:
        localvit.surgery.select_blocks(blocks, 12)
    assert all(word in str(error.value) for word in named), str(error.value)


# --- init="preserve" -----------------------------------------------------------------------------------

FFNS = {
    "Mlp": {},
    "Mlp+norm": {"scale_mlp_norm": True},
    "GluMlp": {"mlp_layer": GluMlp},
    "SwiGLUPacked": {"mlp_layer": SwiGLUPacked},
    "SwiGLUPacked+norm": {"mlp_layer": SwiGLUPacked, "scale_mlp_norm": True},
    "SwiGLU": {"mlp_layer": SwiGLU},
    "SwiGLU+norm": {"mlp_layer": SwiGLU, "scale_mlp_norm": True},
}


@pytest.mark.parametrize("training", [False, True])
@pytest.mark.parametrize("base", ["vit_tiny_patch16_224", "deit_tiny_distilled_patch16_224"])
@pytest.mark.parametrize("kind", FFNS)
def test_preserve_starts_as_exactly_the_same_function(kind, base, training):
    rates = {"proj_drop_rate": 0.1, "drop_path_rate": 0.2, "init_values": 0.1}
    model = make(base, **FFNS[kind], **rates).train(training)
    plain = copy.deepcopy(model)
    localvit.localize(model, PRESERVE)
    outputs = []
    for m in (plain, model):
        torch.manual_seed(0)
        outputs.append(m(images()))
    assert torch.equal(*outputs)
    assert set(plain.state_dict()) < set(model.state_dict())  # plain checkpoints still load
    model.load_state_dict(plain.state_dict(), strict=True)


@pytest.mark.parametrize(
    ("config", "names"),
    [
        (LocalityConfig(init="preserve"), "dead: blocks.1.mlp.drop1.conv.weight"),
        (LocalityConfig(), "dead: blocks.1.mlp.fc1.weight and 12 more"),
    ],
    ids=str,
)
def test_a_plan_names_what_is_dead(config, names):
    model = timm.create_model("vit_tiny_patch16_224", img_size=32, embed_dim=24, depth=2, num_heads=2)
    lines = str(localvit.plan(model, config)).splitlines()
    assert [line.partition("; ")[2] for line in lines if "; dead" in line] == [names]


@pytest.mark.parametrize("kind", FFNS)
@pytest.mark.parametrize("kwargs", [{}, {"global_pool": "avg"}], ids=["token", "avg"])
@pytest.mark.parametrize(
    "config",
    [
        PRESERVE,
        LocalityConfig(),
        LocalityConfig(prefix="pointwise"),
        LocalityConfig(prefix="pointwise", norm="layer"),
        LocalityConfig(prefix="pointwise", norm=("batch", "layer", "none"), position="first", gate_width=32),
        LocalityConfig(prefix="identity", prenorm=True),
        LocalityConfig(prenorm=True, layer_scale=True),
    ],
    ids=["preserve", "paper", "pointwise", "pointwise+layer", "pointwise+first", "identity", "prenorm"],
)
def test_new_parameters_learn_except_those_the_plan_calls_dead(kind, kwargs, config):
    model = make(**FFNS[kind], **kwargs, init_values=0.1).train()
    dead = set(localvit.localize(model, config).plan.dead_parameters)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    model(images()).square().sum().backward()
    optimizer.step()
    optimizer.zero_grad()
    model(images()).square().sum().backward()
    silent = {n for n, p in model.named_parameters() if p.grad is None or p.grad.abs().max() == 0}
    assert silent == dead
    shared_statistics = config == LocalityConfig(prefix="pointwise")  # of its last batch norm
    assert bool(dead) == (kwargs == {} and not shared_statistics)
    assert all(n.startswith("blocks.2.") for n in dead)


# --- taking and giving back ----------------------------------------------------------------------------


@pytest.mark.parametrize("kwargs", [{}, {"init_values": 0.1, "drop_path_rate": 0.1}])
def test_restore_after_paper_gives_back_what_was_there(kwargs):
    model = make(**kwargs).eval()
    before, logits = state(model), model(images())
    localvit.localize(model)
    assert not same(before, state(model))
    localvit.restore(model)
    assert same(before, state(model))
    assert torch.equal(model(images()), logits)
    assert not model.patch_embed._forward_hooks
    assert not hasattr(model.patch_embed, "grid_record")
    assert not hasattr(model, "localization")
    localvit.localize(model, PRESERVE)  # and it can be localized again


def test_restore_after_preserve_keeps_the_current_weights():
    model = make()
    localvit.localize(model, PRESERVE)
    with torch.no_grad():
        for p in model.parameters():
            p.normal_()
    trained = state(model)
    localvit.restore(model)
    assert same({k: v for k, v in trained.items() if "drop1" not in k}, state(model))
    assert type(model.blocks[0].mlp.drop1) is nn.Dropout


def test_restored_layers_take_the_model_s_dtype_and_mode():
    model = make().train()
    localvit.localize(model)
    model.double().eval()
    localvit.restore(model)
    assert model.blocks[0].mlp.fc1.weight.dtype == torch.float64
    assert not model.blocks[0].mlp.training


@pytest.mark.parametrize("clone", [copy.deepcopy, lambda m: pickle.loads(pickle.dumps(m))])
def test_a_copy_can_be_restored_alone(clone):
    model = make()
    before = state(model)
    localvit.localize(model)
    other = clone(model)
    localvit.restore(other)
    assert same(state(other), before)
    assert isinstance(model.blocks[0].mlp, LocalityFeedForward)


def test_originals_are_not_in_the_state_dict_nor_among_parameters():
    model = make()
    localvit.localize(model)
    assert not any("localization" in key or key.startswith("blocks.0.norm2") for key in model.state_dict())
    assert isinstance(model.blocks[0].norm2, nn.Identity)


def test_restore_says_why_it_cannot():
    with pytest.raises(RestoreError, match="not localized"):
        localvit.restore(make())
    created = timm.create_model("localized", base="deit_tiny_patch16_224", **SMALL)
    with pytest.raises(RestoreError, match="created or loaded in localized form"):
        localvit.restore(created)
    preserved = timm.create_model(
        "localized", base="deit_tiny_patch16_224", locality={"init": "preserve"}, **SMALL
    )
    localvit.restore(preserved)
    assert type(preserved.blocks[0].mlp.drop1) is nn.Dropout


def test_new_modules_inherit_dtype_device_and_mode():
    model = make().to(torch.bfloat16).eval()
    localvit.localize(model)
    assert {p.dtype for p in model.parameters()} == {torch.bfloat16}
    assert not any(m.training for m in model.modules())
    with torch.device("meta"):
        model = make()
    localvit.localize(model)
    assert {p.device.type for p in model.parameters()} == {"meta"}


def test_seeds_are_paired():
    def weight(seed: int | None, blocks, manual: int = 0, block: int = 2) -> torch.Tensor:
        model = make()
        torch.manual_seed(manual)
        localvit.localize(model, blocks=blocks, seed=seed)
        return model.blocks[block].mlp.fc1.weight

    assert torch.equal(weight(5, "all"), weight(5, [2]))  # whatever else is localized
    assert not torch.equal(weight(5, "all"), weight(6, "all"))
    assert not torch.equal(weight(5, "all"), weight(5, "all", block=1))
    assert torch.equal(weight(None, "all", manual=5), weight(5, "all"))


# --- what is refused -----------------------------------------------------------------------------------

REFUSED = {
    "localized twice": (lambda: _localized(), "localized already; localvit.restore undoes that"),
    "data parallel": (lambda: nn.DataParallel(make()), "DataParallel"),
    "compiled": (lambda: torch.compile(make(), backend="eager"), "compiled"),
    "compiled in place": (lambda: _compiled(make()), "compiled"),
    "patch dropout": (lambda: make(patch_drop_rate=0.2), "patch_drop_rate=0.2"),
    "features only": (lambda: make(features_only=True), "FeatureGetterNet"),
    "another mlp": (lambda: make(mlp_layer=_OtherMlp), "_OtherMlp"),
    "a subclass": (lambda: _Subclass(**SMALL), "_Subclass"),
    "not a transformer": (lambda: timm.create_model("resnet10t"), "ResNet"),
}


class _OtherMlp(Mlp):
    pass


def test_arguments_of_other_types_are_named():
    with pytest.raises(
        UnsupportedModelError, match="'vit_tiny_patch16_224' is not a model; localize takes a"
    ):
        localvit.localize("vit_tiny_patch16_224")
    with pytest.raises(ValueError, match=r"config={'init': 'preserve'} is not accepted; use a localvit"):
        localvit.localize(make(), {"init": "preserve"})


class _Subclass(VisionTransformer):
    pass


def _localized() -> nn.Module:
    model = make()
    localvit.localize(model)
    return model


def _compiled(model: nn.Module) -> nn.Module:
    model.compile(backend="eager")
    return model


@pytest.mark.parametrize("case", REFUSED)
def test_what_cannot_be_localized_is_refused_untouched(case):
    build, reason = REFUSED[case]
    model = build()
    before = state(model)
    for act in (localvit.plan, localvit.localize):
        with pytest.raises(UnsupportedModelError, match=reason):
            act(model)
    assert same(before, state(model))


def test_a_shared_ffn_is_refused():
    model = make()
    model.blocks[1].mlp = model.blocks[0].mlp
    with pytest.raises(UnsupportedModelError, match="share one FFN"):
        localvit.localize(model)


def test_a_distributed_model_is_refused(tmp_path):
    torch.distributed.init_process_group("gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
    try:
        model = nn.parallel.DistributedDataParallel(make())
        with pytest.raises(UnsupportedModelError, match="DistributedDataParallel"):
            localvit.localize(model)
    finally:
        torch.distributed.destroy_process_group()


@pytest.mark.parametrize(
    ("config", "blocks"),
    [
        (LocalityConfig(gate_reduction=1000), "all"),
        (LocalityConfig(norm="group", norm_groups=7), "all"),
        (LocalityConfig(), [7]),
    ],
)
def test_a_plan_that_does_not_fit_leaves_the_model_untouched(config, blocks):
    model = make()
    before, classes = state(model), [type(m) for m in model.modules()]
    with pytest.raises((ConfigError, ValueError)):
        localvit.localize(model, config, blocks)
    assert same(before, state(model))
    assert classes == [type(m) for m in model.modules()]
    assert not model.patch_embed._forward_hooks


def test_the_model_stays_the_class_it_was():
    model = make(norm_layer=LayerNorm)
    localvit.localize(model)
    assert type(model) is VisionTransformer
    assert all(type(block) is Block for block in model.blocks)
