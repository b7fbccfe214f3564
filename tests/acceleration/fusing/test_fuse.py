"""The fused form of every family computes what the plain one does, and is a model like it otherwise."""

import copy
import os
import pickle
import platform
import subprocess
import sys
import warnings
from pathlib import Path

import pytest
import timm
import torch
import torch.nn.functional as F
from hypothesis import given, settings, strategies as st
from timm.layers import DropPath
from timm.models import vision_transformer
from torch import Tensor, nn

import localvit
from localvit import Grid, LocalityConfig, LocalityFeedForward, UnsupportedModelError
from localvit.acceleration.fusing import feed_forward as fast, linear as packing
from localvit.acceleration.fusing.blocks import FastBlock
from localvit.acceleration.fusing.linear import PackedLinear, packed_available, packed_rows
from localvit.locality.feed_forward import HiddenLocality

from ...locality.test_feed_forward import configurations
from ...models.test_names import CASES, SAME, images, make
from ..test_build import needs_compiler
from .conftest import set_packed

# One name of each structure; the others differ in numbers.
NAMES = [
    key
    for key in CASES
    if key not in SAME and not key.startswith(("localvit_tiny_", "localvit_small", "localvit_base"))
] + ["localvit_tiny_patch16_224", "localvit_tiny_patch16_224_matched"]
VIT = {"img_size": 32, "patch_size": 8, "embed_dim": 32, "depth": 2, "num_heads": 2, "num_classes": 5}
PLAIN = {
    "deit": ("deit_tiny_patch16_224", {}),
    "distilled": ("deit_tiny_distilled_patch16_224", {}),
    "registers": ("vit_tiny_patch16_224", {"reg_tokens": 2, "no_embed_class": True, "init_values": 0.3}),
    "average": ("vit_tiny_patch16_224", {"class_token": False, "global_pool": "avg", "fc_norm": True}),
    "average with class token": ("vit_tiny_patch16_224", {"global_pool": "avg"}),
    "attention pooling": ("vit_tiny_patch16_224", {"global_pool": "map"}),
    "norms inside": (
        "vit_tiny_patch16_224",
        {"qk_norm": True, "scale_attn_norm": True, "scale_mlp_norm": True},
    ),
    "swiglu": ("vit_tiny_patch16_224", {"mlp_layer": timm.layers.SwiGLU, "init_values": 0.3}),
    "packed swiglu": ("vit_tiny_patch16_224", {"mlp_layer": timm.layers.SwiGLUPacked}),
    "norms behind": ("vit_tiny_patch16_224", {"block_fn": vision_transformer.ResPostBlock}),
    "parallel": ("vit_tiny_patch16_224", {"block_fn": vision_transformer.ParallelThingsBlock}),
}


needs_packed = pytest.mark.skipif(not packed_available(), reason="this PyTorch has no packed linear layers")
# No layer, all layers for any input, or all layers for inputs of two rows or more (as the rule for Intel's).
plain_and_packed = pytest.mark.parametrize(
    "packed", [None, *(pytest.param(rows, marks=needs_packed) for rows in (1, 2))]
)


def random_weights(model: nn.Module) -> nn.Module:
    """Statistics, scales and shifts at which folding shows, and outputs of about 1."""
    generator = torch.Generator().manual_seed(4)
    with torch.no_grad():
        for name, tensor in model.state_dict().items():
            noise = torch.randn(tensor.shape, generator=generator) if tensor.is_floating_point() else None
            if name.endswith("running_var"):
                tensor.copy_(0.5 + noise.abs())
            elif noise is not None and tensor.dim() <= 1:
                tensor.add_(0.3 * noise.to(tensor.dtype))
            elif noise is not None and ".drop1.conv" in name:
                tensor.copy_(0.3 * noise)
    return model


def assert_same(got: Tensor, want: Tensor) -> None:
    """To 1e-10 in float64, 1e-5 in float32, of the largest value."""
    limit = {torch.float64: 1e-10, torch.float32: 1e-5}[want.dtype]
    assert got.shape == want.shape
    assert got.dtype == want.dtype
    assert (got - want).abs().max() <= limit * want.abs().max()


def vit(kind: str = "deit", **changes) -> nn.Module:
    name, args = PLAIN[kind]
    torch.manual_seed(1)
    return random_weights(timm.create_model(name, **{**VIT, **args, **changes})).eval()


def local(config: LocalityConfig | None = None, kind: str = "deit", **changes) -> nn.Module:
    model = vit(kind, **changes)
    localvit.localize(model, config, count_macs=False)
    return random_weights(model).eval()


def photos(batch: int = 2, size: tuple[int, int] = (32, 32)) -> Tensor:
    return torch.randn(batch, 3, *size, generator=torch.Generator().manual_seed(5))


# --- the same numbers ----------------------------------------------------------------------------------


@pytest.mark.parametrize("key", NAMES)
@torch.no_grad()
def test_every_family_has_the_same_logits_and_features(key):
    shrunk = CASES[key].shrunk
    model = random_weights(make(key, num_classes=7, img_size=shrunk.wide)).eval()
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    x = images(key, 2, shrunk.wide)
    want = model(x)
    fused = localvit.fuse(model)
    assert_same(fused(x), want)
    features, maps = fused.forward_intermediates(x)
    assert_same(features, model.forward_features(x))
    for got, plain in zip(maps, model.forward_intermediates(x)[1], strict=True):
        assert_same(got, plain)
    assert torch.equal(model(x), want)
    after = model.state_dict()
    assert all(torch.equal(before[name], after[name]) for name in before)
    assert not any(isinstance(module, fast.FastFeedForward) for module in model.modules())

    if shrunk.resize is not None:
        for other in (model, fused):
            other.set_input_size(shrunk.tall, **shrunk.resize)
    wide = shrunk.wide if shrunk.resize is None else shrunk.tall
    x = images(key, 1, wide).double()
    assert_same(localvit.fuse(model.double())(x), model(x))
    assert_same(fused(x.float()), model(x).float())


@pytest.mark.parametrize("kind", PLAIN)
@torch.no_grad()
def test_plain_transformers_have_the_same_logits_and_features(kind):
    model, x = vit(kind, dynamic_img_size=True).double(), photos().double()
    fused = localvit.fuse(model)
    assert_same(fused(x), model(x))
    assert_same(fused.forward_features(x), model.forward_features(x))
    wide = photos(1, (24, 48)).double()
    assert_same(fused(wide), model(wide))
    mask = torch.zeros(1, 1, 1, 1, dtype=torch.float64)
    if kind != "parallel":
        assert_same(fused(x, attn_mask=mask), model(x))


# The native kernels compute in float32, and of channels in sixteens.
@pytest.mark.parametrize(("dim", "dtype", "limit"), [(8, torch.float64, 1e-10), (16, torch.float32, 2e-5)])
@settings(deadline=None, max_examples=80)
@given(config=configurations(), prefix=st.integers(0, 2), chunk=st.sampled_from([1, 2**30]))
@torch.no_grad()
def test_the_whole_design_space(dim, dtype, limit, config, prefix, chunk):
    ffn = random_weights(LocalityFeedForward(dim, config)).to(dtype).eval()
    quick = copy.deepcopy(ffn)
    reason = fast.fuse_locality(quick)
    norms = config.norm if isinstance(config.norm, tuple) else (config.norm,) * 3
    used = [norm for norm, there in zip(norms, (True, config.depthwise, True), strict=True) if there]
    assert (reason is not None) == ("group" in used)
    tokens, residual = torch.randn(2, 3, prefix + 12, dim, dtype=dtype)
    grid = Grid(3, 4, prefix)
    want = ffn(tokens, grid)

    def check(got: Tensor, want: Tensor) -> None:
        torch.testing.assert_close(got, want, rtol=limit, atol=limit * float(1 + want.abs().max()))

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(fast, "CHUNK_BYTES", chunk)
        check(quick(tokens, grid), want)
        if reason is None:
            check(quick.add_to(residual.clone(), tokens, grid), residual + want)
            alone = quick.on_prefix(tokens[:, :prefix]) if prefix else None
            if alone is not None:
                check(alone, want[:, :prefix])
            own = tokens.clone()  # as in a block without a norm in front
            check(quick.add_to(own, own, grid), tokens + want)


@pytest.mark.parametrize("name", localvit.PRESETS)
@torch.no_grad()
def test_every_published_design(name):
    ffn = random_weights(LocalityFeedForward(9, localvit.preset(name, expansion=2))).double().eval()
    tokens, grid = torch.randn(2, 14, 9, dtype=torch.float64), Grid(3, 4, 2)
    want = ffn(tokens, grid)
    assert fast.fuse_locality(ffn) is None
    torch.testing.assert_close(ffn(tokens, grid), want, rtol=1e-10, atol=1e-11)


def test_batch_norms_are_gone_where_they_can_be():
    fused = localvit.fuse(local())
    assert not any(isinstance(module, nn.BatchNorm2d) for module in fused.modules())
    kept = localvit.fuse(local(LocalityConfig(norm_order="act-norm", prefix="pointwise")))
    batch_norms = [name for name, m in kept.named_modules() if isinstance(m, nn.BatchNorm2d)]
    assert batch_norms == [f"blocks.{i}.mlp.{norm}" for i in (0, 1) for norm in ("norm1", "norm2")]


def test_layer_scale_and_dropout_are_gone():
    fused = localvit.fuse(vit("registers", proj_drop_rate=0.1, drop_path_rate=0.1).train())
    kinds = {type(module) for module in fused.modules()}
    assert not kinds & {nn.Dropout, DropPath, timm.layers.LayerScale}
    assert not fused.training


@torch.no_grad()
def test_batch_norm_that_has_no_statistics_stays_as_it_is():
    model = local()
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.running_mean = module.running_var = None
    with pytest.warns(UserWarning, match=r"2 FFN\(s\) stay plain: BatchNorm2d.*blocks\.0\.mlp"):
        fused = localvit.fuse(model)
    assert_same(fused(photos()), model(photos()))


@pytest.mark.parametrize("frozen", [True, False])
@torch.no_grad()
def test_other_batch_norms_are_folded_too(frozen):
    from timm.utils.model import freeze_batch_norm_2d

    model = local()
    want = model(photos())
    model = freeze_batch_norm_2d(model) if frozen else nn.SyncBatchNorm.convert_sync_batchnorm(model)
    fused = localvit.fuse(model)
    assert_same(fused(photos()), want)
    assert all(isinstance(block.mlp.norm1, nn.Identity) for block in fused.blocks)


@torch.no_grad()
def test_group_norm_keeps_the_plain_form_with_one_warning():
    model = local(LocalityConfig(norm="group", norm_groups=4))
    with pytest.warns(UserWarning, match=r"2 FFN\(s\) stay plain: GroupNorm") as seen:
        fused = localvit.fuse(model)
    assert len(seen) == 1
    assert_same(fused(photos()), model(photos()))


@pytest.mark.parametrize(
    ("config", "folded"),
    [
        (LocalityConfig(layer_scale=True), True),
        (LocalityConfig(layer_scale=True, prefix="identity"), False),
        (LocalityConfig(layer_scale=True, prefix="pointwise", norm=("batch", "batch", "layer")), False),
        (LocalityConfig(init="preserve"), True),
    ],
)
@torch.no_grad()
def test_layer_scale_is_folded_where_the_projection_comes_last(config, folded):
    model = local(config, "registers")
    fused = localvit.fuse(model)
    assert_same(fused(photos()), model(photos()))
    assert_same(fused.forward_features(photos()), model.forward_features(photos()))
    assert all(isinstance(block.ls1, nn.Identity) for block in fused.blocks)
    assert all(isinstance(block.ls2, nn.Identity) == folded for block in fused.blocks)


# --- the last block ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("kind", "config", "skips"),
    [
        ("deit", None, True),
        ("distilled", LocalityConfig(), True),
        ("registers", LocalityConfig(prefix="pointwise", prenorm=True, layer_scale=True), True),
        ("deit", LocalityConfig(prefix="identity"), True),
        ("deit", LocalityConfig(init="preserve"), True),
        ("average with class token", None, False),
        ("attention pooling", None, False),
        ("norms behind", None, False),
    ],
)
@torch.no_grad()
def test_the_last_block_computes_what_is_read(kind, config, skips, monkeypatch):
    model = vit(kind) if config is None else local(config, kind)
    calls = []
    read_out = FastBlock.prefix_tokens
    monkeypatch.setattr(FastBlock, "prefix_tokens", lambda *a: calls.append(1) or read_out(*a))
    fused = localvit.fuse(model)
    assert_same(fused(photos()), model(photos()))
    assert bool(calls) == skips
    if skips:
        tokens = torch.randn(2, 19, 32)
        last = fused.blocks[-1]
        assert_same(last.prefix_tokens(tokens, 2), all_tokens(last, tokens)[:, :2])
    calls.clear()
    fused.forward_features(photos())
    assert not calls


def all_tokens(block: nn.Module, x: Tensor) -> Tensor:
    """A block without locality's patches, in the plain order."""
    y = x + block.attn(block.norm1(x))
    branch = block.mlp.on_prefix(block.norm2(y))
    return y if branch is None else y + branch


@torch.no_grad()
def test_a_hook_on_the_last_block_sees_all_tokens():
    model = local()
    fused, seen = localvit.fuse(model), []
    fused.blocks[-1].register_forward_hook(lambda _m, _i, out: seen.append(out))
    assert_same(fused(photos()), model(photos()))
    assert seen[0].shape == (2, 17, 32)


@torch.no_grad()
def test_hooks_of_the_original_see_what_they_saw():
    model, seen = local(LocalityConfig(gate="none")), []
    model.blocks[0].mlp.act1.register_forward_hook(lambda _m, _i, out: seen.append(out.clone()))
    model.blocks[1].mlp.register_forward_hook(lambda _m, _i, out: seen.append(out.clone()))
    model(photos())
    with pytest.warns(UserWarning, match=r"1 FFN\(s\) stay plain: hooks"):
        fused = localvit.fuse(model)
    fused(photos())
    assert len(seen) == 4
    assert_same(seen[2], seen[0])
    assert_same(seen[3], seen[1])


# --- a model like any other ----------------------------------------------------------------------------


@torch.no_grad()
def test_images_in_parts(monkeypatch):
    model = local(LocalityConfig(prefix="pointwise", prenorm=True))
    fused = localvit.fuse(model)
    sizes = []
    on_patches = fast.FastLocalityFeedForward.on_patches

    def noted(self, x, noted_grid):
        sizes.append(len(x))
        return on_patches(self, x, noted_grid)

    monkeypatch.setattr(fast.FastLocalityFeedForward, "on_patches", noted)
    hidden_map = 17 * 128 * 4
    for chunk, want in ((1, [1] * 5), (2 * hidden_map, [2, 2, 1]), (2**30, [5])):
        monkeypatch.setattr(fast, "CHUNK_BYTES", chunk)
        sizes.clear()
        assert_same(fused(photos(5)), model(photos(5)))
        assert sizes == want  # the last of two blocks computes no patches


@plain_and_packed
@torch.no_grad()
def test_copies_pickles_and_moves(monkeypatch, packed):
    set_packed(monkeypatch, packed)
    fused = localvit.fuse(local())
    assert packs(fused) == {bool(packed)}
    x = photos()
    want = fused(x)
    for other in (copy.deepcopy(fused), pickle.loads(pickle.dumps(fused))):
        assert torch.equal(other(x), want)
        assert other.blocks[0].mlp.grid_record is not fused.blocks[0].mlp.grid_record
    state = fused.state_dict()
    other.load_state_dict({**state, "head.weight": -state["head.weight"]})
    assert_same(other(x) - fused.head.bias, fused.head.bias - want)  # packed weights are packed again
    assert_same(copy.deepcopy(fused).double()(x.double()).float(), want)
    for dtype in (torch.bfloat16, torch.float16):
        low = copy.deepcopy(fused).to(dtype)(x.to(dtype))
        assert low.dtype == dtype
        assert (low.float() - want).abs().max() < 0.1 * want.abs().max()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert (fused(x).float() - want).abs().max() < 0.1 * want.abs().max()


@torch.no_grad()
def test_a_new_classifier():
    model, fused = vit(), localvit.fuse(vit())
    fused.reset_classifier(3, global_pool="avg")
    assert fused(photos()).shape == (2, 3)
    fused.reset_classifier(0)
    model.reset_classifier(0, global_pool="avg")
    assert_same(fused(photos()), model(photos()))


@pytest.mark.parametrize(
    ("key", "changes"),
    [
        ("localvit_tiny_patch16_224", {"depth": 2}),
        ("localvit_swin_tiny_patch4_window7_224", {"depths": (1,), "num_heads": (1,)}),
    ],
)
@plain_and_packed
@torch.no_grad()
def test_export_for_any_batch_size(monkeypatch, key, changes, packed):
    set_packed(monkeypatch, packed)
    model = random_weights(make(key, **changes)).eval()
    x = images(key, 2)
    program = torch.export.export(
        localvit.fuse(model), (x,), dynamic_shapes=({0: torch.export.Dim("batch", min=1)},), strict=False
    ).module()
    for batch in (2, 5):
        assert_same(program(images(key, batch)), model(images(key, batch)))


@needs_compiler
@torch.inference_mode()
def test_compiled():
    model = local()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)
        fused = localvit.fuse(model, compile=True)
        assert_same(fused(photos()), model(photos()))
    assert_same(fused.forward_features(photos()), model.forward_features(photos()))


def test_training_is_refused():
    fused = localvit.fuse(local())
    with pytest.raises(
        RuntimeError, match=r"FastVisionTransformer is for inference only; train the original model"
    ):
        fused.train()
    assert fused.eval() is fused
    assert not any(module.training for module in fused.modules())
    assert not any(parameter.requires_grad for parameter in fused.parameters())
    with pytest.raises(RuntimeError, match="for inference only"):
        localvit.fuse(make("localvit_swin_tiny_patch4_window7_224")).train()


def test_a_fused_model_cannot_be_restored_or_localized():
    fused = localvit.fuse(local())
    with pytest.raises(localvit.RestoreError, match="not localized"):
        localvit.restore(fused)
    with pytest.raises(UnsupportedModelError, match="localized already; take the model before it was fused"):
        localvit.localize(fused)


def test_models_that_cannot_be_fused_are_named():
    with pytest.raises(ValueError, match=r"Sequential has no fast form; accepted are models with Local"):
        localvit.fuse(nn.Sequential(nn.Linear(2, 2), nn.GELU()))
    with pytest.raises(ValueError, match="FastVisionTransformer has no fast form; it is fused already"):
        localvit.fuse(localvit.fuse(vit()))
    model = vit()
    model.blocks[1].mlp = model.blocks[0].mlp
    with pytest.raises(ValueError, match=r"blocks\.1\.mlp and blocks\.0\.mlp are the same module"):
        localvit.fuse(model)
    with pytest.raises(UnsupportedModelError, match="wrapped in DataParallel"):
        localvit.fuse(nn.DataParallel(vit()))


# --- switches ------------------------------------------------------------------------------------------


@torch.no_grad()
def test_plain_forms_everywhere(monkeypatch):
    model = local().train()
    set_packed(monkeypatch, 1)
    monkeypatch.setenv("LOCALVIT_KERNELS", "plain")
    plain = localvit.fuse(model)
    assert type(plain) is type(model)
    assert not plain.training
    assert [type(m) for m in plain.modules()] == [type(m) for m in model.modules()]
    assert torch.equal(plain(photos()), model.eval()(photos()))
    for value in ("", "auto"):
        monkeypatch.setenv("LOCALVIT_KERNELS", value)
        assert type(localvit.fuse(model)) is not type(model)
    for value in ("yes", "torch"):
        monkeypatch.setenv("LOCALVIT_KERNELS", value)
        with pytest.raises(
            ValueError, match=rf"LOCALVIT_KERNELS='{value}' is not accepted; use auto or plain"
        ):
            localvit.fuse(model)


def packs(model: nn.Module) -> set[bool]:
    """Return if linear layers have packed weights: both values if only some have."""
    kinds = {type(m) for m in model.modules() if isinstance(m, nn.Linear)}
    assert kinds <= {nn.Linear, PackedLinear}
    return {kind is PackedLinear for kind in kinds}


@plain_and_packed
@torch.no_grad()
def test_packed_weights_give_the_same(monkeypatch, packed):
    model, x = local(LocalityConfig(prefix="pointwise")), photos()
    set_packed(monkeypatch, packed)
    packed_linear, calls = packing.packed_linear, []
    monkeypatch.setattr(packing, "packed_linear", lambda *a: calls.append(1) or packed_linear(*a))
    fused = localvit.fuse(model)
    assert packs(fused) == {bool(packed)}
    assert_same(fused(x), model(x))
    assert bool(calls) == bool(packed)
    assert fused(photos(0)).shape == model(photos(0)).shape
    again = localvit.fuse(model)
    assert packs(again) == {bool(packed)}
    assert torch.equal(again(x), fused(x))


@plain_and_packed
@torch.inference_mode()
def test_models_made_and_copied_in_inference_mode(monkeypatch, packed):
    """Tensors made in inference mode do not show when they change."""
    model, x = local(), photos()
    set_packed(monkeypatch, packed)
    fused = localvit.fuse(model)
    assert packs(fused) == {bool(packed)}
    assert not any(tensor.is_inference() for tensor in fused.parameters())
    assert_same(fused(x), model(x))
    assert_same(copy.deepcopy(fused)(x), model(x))


@needs_packed
@needs_compiler  # which takes the gate's two layers
@torch.no_grad()
def test_compiled_graphs_pack_weights_by_an_operator(monkeypatch):
    model, x = local(), photos()
    set_packed(monkeypatch, 1)
    fused = localvit.fuse(model)
    graphs = []
    compiled = torch.compile(fused, backend=lambda graph, _: graphs.append(graph) or graph.forward)
    assert_same(compiled(x), model(x))
    targets = [node.target for graph in graphs for node in graph.graph.nodes]
    assert (
        targets.count(packing.frozen_linear) == 6
    )  # two blocks and the head, but one sliced and two not read
    monkeypatch.setattr(packing, "pack", None)
    assert_same(compiled(x), model(x))  # they are packed already


@needs_packed
def test_the_operator_of_compiled_graphs():
    x, weight, bias = torch.randn(2, 3, 5), torch.randn(4, 5), torch.randn(4)
    torch.library.opcheck(
        packing.frozen_linear, (x, weight, bias), test_utils=("test_schema", "test_faketensor")
    )
    torch.testing.assert_close(packing.frozen_linear(x, weight, bias), F.linear(x, weight, bias))
    weight.mul_(2)
    torch.testing.assert_close(packing.frozen_linear(x, weight, None), F.linear(x, weight))
    weight.data = weight * 2  # as a module that is moved does: other memory, of the same version
    torch.testing.assert_close(packing.frozen_linear(x, weight, None), F.linear(x, weight))
    with torch.inference_mode():
        constant = torch.randn(4, 5)
        for _ in range(2):
            torch.testing.assert_close(packing.frozen_linear(x, constant, None), F.linear(x, constant))
    held = len(packing._packs)
    del constant
    assert len(packing._packs) == held - 1


INTEL, AMD = "vendor_id\t: GenuineIntel\n", "vendor_id\t: AuthenticAMD\nmodel name\t: AMD EPYC\n"


def set_processor(monkeypatch, text: str | None) -> None:
    """Let the system say `text` about the processor; `None`: the file does not exist."""

    def read_text(self, encoding):
        if text is None:
            raise FileNotFoundError
        return text

    monkeypatch.setattr(Path, "read_text", read_text)


@pytest.mark.parametrize(
    ("text", "want"),
    [
        (AMD, [1, 1, 1]),
        (INTEL, [None, 512, None]),
        ("CPU implementer\t: 0x41\n", [None] * 3),  # ARM says no vendor
        (None, [None] * 3),
    ],
    ids=["AMD", "Intel", "ARM", "unknown"],
)
@pytest.mark.parametrize(
    "weight",
    [
        torch.zeros(64, 127),
        torch.zeros(256, 128, dtype=torch.float64),
        torch.zeros(256, 128, dtype=torch.bfloat16),
        torch.zeros(256, 128, device="meta"),
    ],
    ids=["small", "double", "bfloat16", "meta"],
)
def test_a_rule_decides(monkeypatch, text, want, weight):
    sizes = [torch.zeros(64, 128), torch.zeros(256, 128), torch.zeros(1025, 1024)]
    set_processor(monkeypatch, text)
    monkeypatch.setattr(packing, "packed_available", lambda: True)
    for _ in range(2):
        assert [packed_rows(size) for size in sizes] == want
        assert packed_rows(weight) is None
    monkeypatch.setattr(packing, "packed_available", lambda: False)
    assert {packed_rows(size) for size in sizes} == {None}


@needs_packed
@torch.no_grad()
def test_inputs_of_few_rows_are_not_packed(monkeypatch):
    set_packed(monkeypatch, 12)
    layer = localvit.fuse(local()).blocks[0].mlp.fc1
    packed_linear, calls = packing.packed_linear, []
    monkeypatch.setattr(packing, "packed_linear", lambda *a: calls.append(1) or packed_linear(*a))
    width = layer.in_features
    for shape, want in (((11, width), 0), ((3, 4, width), 1), ((0, width), 0), ((width,), 0)):
        x = torch.randn(shape)
        torch.testing.assert_close(layer(x), F.linear(x, layer.weight, layer.bias))
        assert len(calls) == want
        calls.clear()


@needs_packed
@pytest.mark.parametrize("text", [AMD, INTEL])
@torch.no_grad()
def test_the_rule_is_asked_for_each_layer(monkeypatch, text):
    set_processor(monkeypatch, text)
    asked = []
    set_packed(monkeypatch, lambda weight: asked.append(tuple(weight.shape)) or packed_rows(weight))
    model = local(embed_dim=64)
    first, second = (localvit.fuse(model) for _ in range(2))
    assert {(192, 64), (64, 64), (256, 64), (64, 256), (5, 64)} <= set(asked)
    large = PackedLinear if text == AMD else nn.Linear
    for fused in (first, second):
        mlp = fused.blocks[0].mlp
        assert {type(layer) for layer in (fused.blocks[0].attn.qkv, mlp.fc1, mlp.fc2)} == {large}
        assert {type(layer) for layer in (fused.blocks[0].attn.proj, fused.head)} == {nn.Linear}  # too small
    assert_same(first(photos()), model(photos()))
    assert torch.equal(first(photos()), second(photos()))
    assert packs(localvit.fuse(model.double())) == {False}


@pytest.mark.parametrize("error", [None, AttributeError, RuntimeError, TypeError, NotImplementedError])
def test_private_operators_that_are_not_what_they_were(monkeypatch, error):
    def changed(x, packed, bias):
        if error is not None:
            raise error
        return F.linear(x, torch.zeros(4, 5), bias)

    monkeypatch.setattr(packing, "packed_linear", changed)
    assert packed_available.__wrapped__() is False


@torch.no_grad()
def test_maps_of_one_image_are_channels_last_for_pytorch():
    from localvit.locality.grid import tokens_to_map

    for batch in (1, 2):
        for tokens in (torch.randn(batch, 13, 8), torch.randn(batch, 12, 8)):
            patches = tokens_to_map(tokens, Grid(3, 4, tokens.shape[1] - 12))
            out = nn.Conv2d(8, 8, 3, padding=1, groups=8)(patches)
            assert out.stride()[1] == 1  # not copied to channels-first
            assert patches.data_ptr() == tokens[:, tokens.shape[1] - 12 :].data_ptr()


def test_hidden_locality_is_folded():
    fused = localvit.fuse(local(LocalityConfig(init="preserve")))
    assert all(type(block.mlp.drop1) is fast.FoldedHiddenLocality for block in fused.blocks)
    assert all(isinstance(block.mlp.drop1, HiddenLocality) for block in fused.blocks)


@pytest.mark.filterwarnings("ignore:.*(deprecated|torchao|quantized.*Linear in place of a linear layer)")
@pytest.mark.parametrize("order", ["fuse, then quantize", "quantize, then fuse"])
@pytest.mark.parametrize(
    "key",
    [
        *("localvit_tiny_patch16_224", "localized", "localized deit_tiny_distilled_patch16_224"),
        *("localvit_t2t_vit_7", "localized t2t_vit_7", "localvit_pvt_tiny", "localized pvt_tiny"),
        *("localvit_swin_tiny_patch4_window7_224", "localized swin_tiny_patch4_window7_224"),
    ],
)
def test_dynamic_quantization_goes_with_fusing(key, order):
    model, x = make(key).eval(), images(key)

    def quantize(module):
        return torch.ao.quantization.quantize_dynamic(module, {nn.Linear}, torch.qint8)

    fused_first = order.startswith("fuse")
    found = quantize(localvit.fuse(model)) if fused_first else localvit.fuse(quantize(copy.deepcopy(model)))
    assert any(isinstance(module, torch.ao.nn.quantized.dynamic.Linear) for module in found.modules())
    with torch.inference_mode():
        expected = model(x)
        assert (found(x) - expected).abs().max() < 0.1 * expected.abs().max()


PAGES = """
import resource, timm, torch, localvit

def cleared():
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    blocks = [torch.ones(2**19) for _ in range(16)]  # 32 MiB, freed together
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before

torch.set_num_threads(1)
sizes = {"img_size": 32, "patch_size": 8, "embed_dim": 32, "depth": 1, "num_heads": 2}
model = timm.create_model("deit_tiny_patch16_224", **sizes)
fused = localvit.fuse(model)
print([cleared() for _ in range(3)][-1])
"""


@pytest.mark.skipif(
    platform.libc_ver()[0] != "glibc", reason="other C libraries keep freed memory by other rules"
)
def test_memory_of_one_call_stays_for_the_next():
    names = ("MALLOC_", "GLIBC_", "LD_PRELOAD")
    environment = {name: value for name, value in os.environ.items() if not name.startswith(names)}
    done = subprocess.run(
        [sys.executable, "-c", PAGES], env=environment, capture_output=True, text=True, check=True
    )
    assert int(done.stdout) < 100  # pages that the system had to clear; without `fuse` 8,160 of 4 KiB
