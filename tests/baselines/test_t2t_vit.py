"""T2T-ViT: the authors' numbers, timm's contracts, and safety in low precision."""

import argparse
import copy
import math
from typing import Any

import numpy as np
import pytest
import timm
import torch
from timm.models import get_notrace_functions, get_notrace_modules
from timm.utils import ModelEmaV3
from torch import Tensor, nn
from torchvision.models.feature_extraction import create_feature_extractor

from localvit.baselines import t2t_vit
from localvit.baselines.t2t_vit import T2TViT, checkpoint_filter_fn, sinusoid_table, to_own_key
from localvit.baselines.tokens_to_token import SoftSplit, TokenPerformer, performer_attention
from localvit.cost import count_macs, count_parameters

from .. import golden
from ..models.test_golden import check_taps, taps

FLAVOURS = ("performer", "transformer")

# Name among the golden numbers -> name here, and arguments in which it differs.
REFERENCES: dict[str, tuple[str, dict[str, Any]]] = {
    **{name.replace("t2t", "T2t", 1): (name, {}) for name in t2t_vit.VARIANTS},
    "T2t_vit_14_resnext": ("t2t_vit_14", {"num_heads": 32}),
    "T2t_vit_14_wide": ("t2t_vit_14", {"embed_dim": 768, "depth": 4, "num_heads": 12}),
}


def small(tokens_type: str = "performer", **args: Any) -> T2TViT:
    """Everything that the large ones have, in little."""
    torch.manual_seed(0)
    sizes = {"img_size": 48, "num_classes": 5, "embed_dim": 32, "depth": 2, "num_heads": 2, "token_dim": 8}
    return T2TViT(**{**sizes, "tokens_type": tokens_type, **args}).eval()


def images(*size: int, batch: int = 2) -> Tensor:
    return torch.randn(batch, 3, *size, generator=torch.Generator().manual_seed(1))


def load(model: T2TViT, weights: dict[str, Tensor]) -> T2TViT:
    model.load_state_dict(checkpoint_filter_fn(weights, model))
    return model


def authors_key(key: str) -> str:
    for own, theirs in (
        ("patch_embed.", "tokens_to_token."),
        (".mlp.fc1.", ".mlp.0."),
        (".mlp.fc2.", ".mlp.2."),
    ):
        key = key.replace(own, theirs) if own == "patch_embed." or "attention" in key else key
    return key


def authors_checkpoint(model: T2TViT) -> dict[str, Tensor]:
    return {authors_key(key): value for key, value in model.state_dict().items()}


# --- the authors' numbers -------------------------------------------------------------------------------


@pytest.mark.parametrize("reference", REFERENCES)
def test_registered_model_equals_the_authors_code(reference):
    facts, want = golden.facts(reference), golden.arrays(reference)
    name, args = REFERENCES[reference]
    model = timm.create_model(name, **args).double().eval()
    weights = golden.filled(facts["state_dict"])
    load(model, weights)
    frozen = sum(weights[key].numel() for key in facts["frozen_params"])  # buffers here
    del weights
    with torch.no_grad():
        logits, seen = taps(model, torch.from_numpy(golden.make_input())[:1])
    np.testing.assert_allclose(logits.numpy(), want["logits"][:1], rtol=0, atol=1e-10)
    check_taps(seen, want, facts)
    assert count_parameters(model) == facts["params_total"] - frozen == facts["params_trainable"]
    assert count_macs(model, (3, 224, 224)) / 1e9 == pytest.approx(facts["gmacs_matmul_conv"], abs=1e-6)
    assert dropouts(model) == facts["default_nonzero_drop"]


def dropouts(model: nn.Module) -> dict[str, float]:
    """Rates above zero, by the reference's names."""
    names = {".proj_drop": ".dp", ".mlp.drop2": ".mlp.3", "patch_embed": "tokens_to_token"}
    rates = {}
    for name, module in model.named_modules():
        if isinstance(module, nn.Dropout) and module.p:
            for own, theirs in names.items():
                name = name.replace(own, theirs)
            rates[name] = module.p
    return rates


@pytest.mark.parametrize("reference", ["T2t_vit_7", "T2t_vit_t_14"])
def test_in_single_precision(reference):
    facts, want = golden.facts(reference), golden.arrays(reference)
    model = timm.create_model(REFERENCES[reference][0]).eval()
    load(model, golden.filled(facts["state_dict"]))
    with torch.no_grad():
        logits = model(torch.from_numpy(golden.make_input()).float())
    np.testing.assert_allclose(logits.numpy(), want["logits"], rtol=0, atol=5e-5)


@pytest.mark.parametrize("name", ["t2t_performer", "t2t_transformer"])
def test_miniature_and_its_training_step_equal_the_authors_code(name):
    case, want = golden.facts("variants")["variants"][name], golden.arrays("variants")
    keep = ("tokens_type", "num_classes", "embed_dim", "depth", "num_heads", "mlp_ratio", "token_dim")
    model = T2TViT(**{key: case["constructor"][key] for key in keep}).double().eval()
    weights = golden.filled(case["keys"])
    load(model, weights)
    frozen = sum(value.numel() for key, value in weights.items() if key.endswith(("pos_embed", ".w")))
    assert count_parameters(model) == case["params_total"] - frozen
    assert dropouts(model) == case["default_nonzero_drop"]
    image = torch.from_numpy(golden.make_input()).requires_grad_()
    with torch.no_grad():
        logits, seen = taps(model, image)
    np.testing.assert_allclose(logits.numpy(), want[f"{name}/eval"], rtol=0, atol=1e-10)
    check_taps(seen, want, case, f"{name}/", count=127)

    model.train()
    for module in model.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0
    logits = model(image)
    np.testing.assert_allclose(logits.detach().numpy(), want[f"{name}/train"], rtol=0, atol=1e-10)
    loss = logits.square().mean()
    loss.backward()
    assert loss.item() == pytest.approx(case["train_loss"], rel=1e-11)
    gradient = golden.tap(image.grad.numpy(), count=127)
    np.testing.assert_allclose(gradient, want[f"{name}/grad_x"], rtol=0, atol=1e-10)
    norms = {to_own_key(key): norm for key, norm in case["grad_norms"].items()}
    parameters = dict(model.named_parameters())
    assert parameters.keys() == {key for key, norm in norms.items() if norm is not None}
    for key, parameter in parameters.items():
        assert parameter.grad.norm().item() == pytest.approx(norms[key], rel=1e-9, abs=1e-12), key


@pytest.mark.parametrize("dim", [32, 256, 384, 448, 512, 768])
def test_sinusoid_equals_the_authors_table(dim):
    table = sinusoid_table(197, dim).float().numpy()
    name = f"t2t_pos_embed_197x{dim}"
    sums = golden.facts("variants")["tables"][name]
    np.testing.assert_array_equal(golden.tap(table, count=257), golden.arrays("variants")[f"table/{name}"])
    assert list(table.shape) == sums["shape"]
    assert table.astype(np.float64).sum() == pytest.approx(sums["sum"], rel=1e-9)


# --- parts, against plain code --------------------------------------------------------------------------


def test_soft_split_is_a_loop_over_windows():
    split, image = SoftSplit(3, stride=2, padding=1), images(5, 8, batch=1)
    padded = nn.functional.pad(image, (1, 1, 1, 1))[0]
    height, width = split.dynamic_feat_size((5, 8))
    windows = [
        padded[:, 2 * i : 2 * i + 3, 2 * j : 2 * j + 3].flatten() for i in range(height) for j in range(width)
    ]
    torch.testing.assert_close(split(image)[0], torch.stack(windows))


@pytest.mark.parametrize("size", [(3, 3), (48, 48), (33, 95), (224, 64)])
def test_grid_is_known_before_and_after(size):
    stem = small(img_size=size).patch_embed
    assert stem.grid_size == stem.dynamic_feat_size(size)
    assert stem.num_patches == math.prod(stem.grid_size) == stem(images(*size)).shape[1]
    x: Tensor = images(*size)
    for split in (stem.soft_split0, stem.soft_split1, stem.soft_split2):
        assert split.dynamic_feat_size(x.shape[-2:]) == split.grid_size
        assert math.prod(split.grid_size) == split(x).shape[1]
        x = x.new_zeros(1, 2, *split.grid_size)


@pytest.mark.parametrize("tokens_type", FLAVOURS)
def test_stem_keeps_rows_and_columns_apart(tokens_type):
    def as_map(tokens: Tensor, height: int, width: int) -> Tensor:
        rows = [tokens[:, i * width : (i + 1) * width].transpose(1, 2) for i in range(height)]
        return torch.stack(rows, dim=2)

    stem, image = small(tokens_type, img_size=(48, 80)).patch_embed, images(48, 80)
    x = as_map(stem.attention1(stem.soft_split0(image)), 12, 20)
    x = as_map(stem.attention2(stem.soft_split1(x)), 6, 10)
    x = stem.project(stem.soft_split2(x))
    torch.testing.assert_close(stem(image), x)
    cells = small(tokens_type, img_size=(48, 80), dynamic_img_size=True).patch_embed(image)
    torch.testing.assert_close(cells, x.unflatten(1, (3, 5)))


def plain_attention(k: Tensor, q: Tensor, v: Tensor, w: Tensor, eps: float) -> Tensor:
    """As token_performer.py of the reference states it, one query at a time, in float64."""
    k, q, v, w = (t.double() for t in (k, q, v, w))

    def features(x: Tensor) -> Tensor:
        return torch.stack([(w @ t - t.square().sum() / 2).exp() / math.sqrt(len(w)) for t in x])

    out = torch.zeros_like(v)
    for b in range(len(k)):
        kp, qp = features(k[b]), features(q[b])
        for t in range(len(qp)):
            weights = kp @ qp[t]
            out[b, t] = weights @ v[b] / (weights.sum() + eps)
    return out


def kqv(scale: float, dtype: torch.dtype) -> list[Tensor]:
    """Keys, queries and values around the random directions, where features are largest, and those."""
    torch.manual_seed(0)
    w = TokenPerformer(dim=6, token_dim=64).w
    k, q = (torch.cat([w, torch.randn(8, 64)]).unsqueeze(0) * scale for _ in range(2))
    v = scale * torch.randn_like(k)
    return [t.to(dtype) for t in (k, q, v, w)]


# From exp(16) for every feature to attention that vanishes; 0.02 is what the weights start with.
SCALES = (0.02, 0.3, 1.0, 1.5, 2.0, 10.0, 100.0)


@pytest.mark.parametrize("scale", SCALES)
@pytest.mark.parametrize(
    ("dtype", "tolerance"),
    [(torch.float64, 1e-13), (torch.float32, 2e-5), (torch.bfloat16, 1e-2), (torch.float16, 1e-3)],
)
def test_performer_attention_equals_the_plain_formula(scale, dtype, tolerance):
    k, q, v, w = kqv(scale, dtype)
    want = plain_attention(k, q, v, w, 1e-8)
    for enabled in (False, True):
        with torch.autocast("cpu", dtype=torch.float16, enabled=enabled):
            got = performer_attention(k, q, v, w)
        assert got.dtype == dtype
        torch.testing.assert_close(got.double(), want, rtol=tolerance, atol=tolerance * scale)


def test_attention_between_far_away_keys_and_queries_is_zero_as_in_the_reference():
    """If float32 underflows, the epsilon has already made the result zero."""
    k, q, v, w = kqv(10.0, torch.float32)
    assert performer_attention(k, q, v, w).abs().max() == 0
    assert plain_attention(k, q, v, w, 1e-8).abs().max() < 1e-30


def test_directions_are_orthogonal_and_never_redrawn():
    model = small(token_dim=64)
    stages = (model.patch_embed.attention1, model.patch_embed.attention2)
    before = [stage.w.clone() for stage in stages]
    for w in before:
        torch.testing.assert_close(w @ w.t(), 32 * torch.eye(32), rtol=0, atol=1e-4)
    assert not torch.equal(*before)
    model.train()(images(48, 48)).sum().backward()
    model.load_state_dict(model.state_dict())
    assert all(torch.equal(stage.w, w) for stage, w in zip(stages, before, strict=True))


# --- low precision --------------------------------------------------------------------------------------


@pytest.mark.parametrize("factor", [1, 10, 100])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("mode", ["autocast", "weights"])
@pytest.mark.parametrize("tokens_type", FLAVOURS)
def test_no_nan_in_low_precision(tokens_type, mode, dtype, factor):
    """Forward and backward, with inputs and the weights in front of the exponential scaled up.

    The loss is scaled as a ``GradScaler`` would, or float16 gradients vanish.
    """
    model = small(tokens_type, token_dim=64).train()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith(("kqv.weight", "patch_embed.attention1.attn.qkv.weight")):
                parameter.mul_(factor)
    image = images(48, 48) * factor
    if mode == "weights":
        model, image = model.to(dtype), image.to(dtype)
    image.requires_grad_()
    with torch.autocast("cpu", dtype=dtype, enabled=mode == "autocast"):
        logits = model(image)
    (1024 * logits.float().square().mean()).backward()
    gradients = [p.grad for p in (*model.parameters(), image)]
    assert all(torch.isfinite(t).all() for t in (logits, *gradients))
    assert image.grad.any()


# --- sizes ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("size", [(32, 128), (128, 32), (64, 64), (70, 50)])
def test_dynamic_size_equals_a_model_set_to_that_size(size):
    fixed, dynamic = small(), small(dynamic_img_size=True)
    dynamic.load_state_dict(fixed.state_dict())
    fixed.set_input_size(size)
    assert fixed.patch_embed.img_size == size
    with torch.no_grad():
        want = fixed(images(*size))
        torch.testing.assert_close(dynamic(images(*size)), want)
        maps = dynamic.forward_intermediates(images(*size), intermediates_only=True)
    assert maps[-1].shape == (2, 32, *fixed.patch_embed.grid_size)
    assert isinstance(dict(fixed.named_buffers())["pos_embed"], Tensor)
    assert "pos_embed" not in dict(fixed.named_parameters())
    again = small(img_size=size)
    for name in ("soft_split0", "soft_split1", "soft_split2"):
        assert getattr(fixed.patch_embed, name).grid_size == getattr(again.patch_embed, name).grid_size
    again.load_state_dict(fixed.state_dict())
    torch.testing.assert_close(again(images(*size)), want)


def test_sizes_that_are_refused():
    model = small()
    with pytest.raises(AssertionError, match=r"Input height \(64\) doesn't match model \(48\)"):
        model(images(64, 48))
    with pytest.raises(
        ValueError, match="patch_size 8 is not accepted; the strides of the soft splits make it 16"
    ):
        model.set_input_size((64, 64), patch_size=8)
    with pytest.raises(ValueError, match="patch_size 8 is not"):
        small(patch_size=8)
    with pytest.raises(ValueError, match="img_size 2 is not accepted; use at least 3 pixels"):
        small(img_size=2)
    assert model.patch_embed.grid_size == (3, 3)


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (
            {"tokens_type": "convolution"},
            "tokens_type 'convolution' is not accepted; use 'performer' or 'transformer'",
        ),
        ({"token_dim": 1}, "token_dim 1 is not accepted; use at least 2"),
        ({"dynamic_img_pad": True}, "dynamic_img_pad=True is not accepted"),
    ],
)
def test_arguments_that_are_refused(args, message):
    with pytest.raises(ValueError, match=message):
        small(**args)


# --- checkpoints ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("tokens_type", FLAVOURS)
@pytest.mark.parametrize("prefix", ["", "module."])
def test_authors_checkpoint_loads_and_our_own_passes_unchanged(tokens_type, prefix):
    source, target = small(tokens_type), small(tokens_type)
    nn.init.normal_(source.pos_embed)
    theirs = {prefix + key: value for key, value in authors_checkpoint(source).items()}
    stale = {key: torch.zeros_like(value) for key, value in theirs.items()}
    for checkpoint in (theirs, {"state_dict": theirs}, {"state_dict": stale, "state_dict_ema": theirs}):
        target.load_state_dict({key: torch.ones_like(value) for key, value in source.state_dict().items()})
        load(target, checkpoint)
        for key, value in target.state_dict().items():
            assert torch.equal(value, source.state_dict()[key]), key
    own = source.state_dict()
    passed = checkpoint_filter_fn(own, target)
    assert list(passed) == list(own) == [to_own_key(key) for key in own]
    assert all(passed[key] is own[key] for key in own)


def test_positions_of_a_checkpoint_are_resampled():
    source = small()
    for size in ((80, 80), (48, 80), (16, 144)):  # the last has as many tokens
        model = load(small(img_size=size), authors_checkpoint(source))
        resized = copy.deepcopy(source)
        resized.set_input_size(size)
        torch.testing.assert_close(model(images(*size)), resized(images(*size)))
        same = load(small(img_size=size), resized.state_dict())  # our own: unchanged
        assert torch.equal(same.pos_embed, resized.pos_embed)
    with pytest.raises(ValueError, match="pos_embed has 15 image positions, which form no square"):
        checkpoint_filter_fn(small(img_size=(48, 80)).state_dict(), source)


@pytest.mark.parametrize("tokens_type", FLAVOURS)
def test_checkpoint_of_another_number_of_input_channels(tokens_type):
    """A grey image gives what its three equal channels gave; exact as long as the norm treats them alike."""
    source = small(tokens_type)
    for name, weight in source.patch_embed.attention1.named_parameters():
        if name.endswith("qkv.weight"):
            nn.init.normal_(weight)  # attention that is far from uniform
    nn.init.normal_(source.patch_embed.attention1.norm1.weight.data[:49], 1, 0.1)
    for values in (source.patch_embed.attention1.norm1.weight, source.patch_embed.attention1.norm1.bias):
        values.data.copy_(values.data[:49].repeat(3))
    grey = load(small(tokens_type, in_chans=1), authors_checkpoint(source))
    image = images(48, 48)[:, :1]
    first_stage = [
        stem.attention1(stem.soft_split0(image.expand(-1, channels, -1, -1)))
        for stem, channels in ((grey.patch_embed, 1), (source.patch_embed, 3))
    ]
    torch.testing.assert_close(*first_stage, rtol=1e-3, atol=1e-5)
    load(small(tokens_type, in_chans=4), authors_checkpoint(source))


def test_released_file_is_fetched_and_read(tmp_path):
    """The authors' files also hold the arguments of their run, which weights-only loading must let pass."""
    shape = {"embed_dim": 16, "depth": 1, "num_heads": 2, "token_dim": 4}
    source = timm.create_model("t2t_vit_7", **shape)
    file = tmp_path / "71.7_T2T_ViT_7.pth.tar"
    checkpoint = {"state_dict_ema": authors_checkpoint(source), "args": argparse.Namespace(lr=1e-3)}
    torch.save(checkpoint, file)
    overlay = {"url": file.as_uri()}
    for classes in (1000, 7, 0):
        model = timm.create_model(
            "t2t_vit_7",
            pretrained=True,
            pretrained_cfg_overlay=overlay,
            cache_dir=tmp_path / "cache",
            num_classes=classes,
            in_chans=1 if classes == 7 else 3,
            **shape,
        )
        assert torch.equal(model.blocks[0].mlp.fc1.weight, source.blocks[0].mlp.fc1.weight)
    assert model.head_hidden_size == 16


def test_buffers_live_in_state_dicts_and_averages(tmp_path):
    model = small()
    fixed = {"pos_embed", "patch_embed.attention1.w", "patch_embed.attention2.w"}
    assert {name for name, _ in model.named_buffers()} == fixed <= set(model.state_dict())
    torch.save(model.state_dict(), tmp_path / "weights.pt")
    torch.manual_seed(1)
    other = T2TViT(48, embed_dim=32, depth=2, num_heads=2, num_classes=5, token_dim=8).eval()
    assert not torch.equal(other.patch_embed.attention1.w, model.patch_embed.attention1.w)
    ema = ModelEmaV3(other, decay=0.5)
    other.load_state_dict(torch.load(tmp_path / "weights.pt", weights_only=True))
    assert torch.equal(other(images(48, 48)), model(images(48, 48)))
    for _ in range(60):
        ema.update(other)
    torch.testing.assert_close(ema.module.state_dict(), other.state_dict())
    torch.testing.assert_close(ema.module(images(48, 48)), model(images(48, 48)))


# --- timm's interface -----------------------------------------------------------------------------------


def test_names_and_configurations():
    names = timm.list_models(module="t2t_vit")
    assert set(names) == set(t2t_vit.PUBLISHED) == set(t2t_vit.VARIANTS)
    cfg = timm.get_pretrained_cfg("t2t_vit_t_14")
    assert cfg.url.endswith("/releases/download/main/81.7_T2T_ViTt_14.pth.tar")
    assert (cfg.crop_pct, cfg.interpolation, cfg.tag) == (0.9, "bicubic", "in1k")
    assert cfg.mean == timm.data.IMAGENET_DEFAULT_MEAN


def test_training_groups():
    model = small()
    assert model.no_weight_decay() == {"cls_token"}
    groups = timm.optim.param_groups_weight_decay(model, 0.05, model.no_weight_decay())
    assert sum(p.numel() for g in groups for p in g["params"]) == count_parameters(model)
    layers = timm.models.group_parameters(model, model.group_matcher(), reverse=True)
    assert {layers[name] for name, _ in model.named_parameters() if name.startswith("patch_embed")} == {0}


@pytest.mark.parametrize("tokens_type", FLAVOURS)
def test_heads_pooling_and_checkpointing(tokens_type):
    model, image = small(tokens_type), images(48, 48)
    want = model(image)
    model.set_grad_checkpointing()
    torch.testing.assert_close(model(image), want)
    model.reset_classifier(3)
    assert model(image).shape == (2, 3)
    assert {name for name, _ in model.named_parameters() if name.startswith("head")} == {
        "head.weight",
        "head.bias",
    }
    model.reset_classifier(0, "avg")
    assert model(image).shape == (2, 32)
    assert small(tokens_type, global_pool="avg", class_token=False)(image).shape == (2, 5)
    assert small(tokens_type, reg_tokens=2).pos_embed.shape == (1, 9 + 3, 32)


def test_features_only():
    args = {"embed_dim": 32, "depth": 3, "num_heads": 2, "token_dim": 8, "img_size": (48, 64)}
    model = timm.create_model("t2t_vit_7", features_only=True, **args)
    assert model.feature_info.channels() == [32, 32, 32]
    assert model.feature_info.reduction() == [16, 16, 16]
    assert [tuple(m.shape) for m in model(images(48, 64))] == [(2, 32, 3, 4)] * 3


@pytest.mark.parametrize("tokens_type", FLAVOURS)
def test_start_and_meta_device(tokens_type):
    with torch.device("meta"):
        model = small(tokens_type)
    assert {t.device.type for t in model.state_dict().values()} == {"meta"}
    model.to_empty(device="cpu")
    model.init_weights()
    with torch.no_grad():
        assert torch.isfinite(model(images(48, 48))).all()
    for started in (model, small(tokens_type), small(tokens_type, weight_init="skip")):
        assert torch.equal(started.pos_embed, sinusoid_table(10, 32).float())
    large = small(tokens_type, embed_dim=512, dtype=torch.float64)
    assert large.cls_token.std().item() == pytest.approx(0.02, rel=0.2)
    assert large.patch_embed.project.weight.std().item() == pytest.approx(0.02, rel=0.1)
    assert {t.dtype for t in large.state_dict().values()} == {torch.float64}


# --- torch's ways to carry a model elsewhere ------------------------------------------------------------


def outputs(model: Any, batch: int = 2) -> Tensor:
    with torch.no_grad():
        return model(images(48, 32, batch=batch))


@pytest.fixture(params=FLAVOURS)
def portable(request) -> T2TViT:
    return small(request.param, img_size=(48, 32))


@pytest.mark.parametrize("fused", [True, False])
def test_scripted(portable, fused):
    if hasattr(portable.patch_embed.attention1, "attn"):
        portable.patch_embed.attention1.attn.fused_attn = fused
    scripted = torch.jit.script(portable)
    torch.testing.assert_close(outputs(scripted), outputs(portable))
    torch.testing.assert_close(outputs(copy.deepcopy(portable).double().float()), outputs(portable))
    with torch.no_grad():
        half = torch.jit.script(copy.deepcopy(portable).half())(images(48, 32).half())
    torch.testing.assert_close(half.float(), outputs(portable), rtol=0.05, atol=0.01)


def test_compiled_without_a_break(portable):
    compiled = torch.compile(portable, backend="eager", fullgraph=True)
    torch.testing.assert_close(outputs(compiled), outputs(portable))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        torch.testing.assert_close(outputs(compiled), outputs(portable))


def test_exported_with_any_batch(portable):
    batch = torch.export.Dim("batch", min=1, max=8)
    exported = torch.export.export(portable, (images(48, 32),), dynamic_shapes=({0: batch},), strict=False)
    for size in (1, 2, 5):
        torch.testing.assert_close(outputs(exported.module(), size), outputs(portable, size))


def test_traced_by_fx(portable):
    leaves = {"leaf_modules": get_notrace_modules(), "autowrap_functions": get_notrace_functions()}
    traced = create_feature_extractor(
        portable, ["head", "patch_embed.attention1.mlp.fc1"], tracer_kwargs=leaves
    )
    got = outputs(traced)
    assert torch.equal(got["head"], outputs(portable))
    assert got["patch_embed.attention1.mlp.fc1"].shape == (2, 12 * 8, 8)


def test_fused_and_plain_attention_agree():
    stage = small("transformer").patch_embed.attention1.attn
    nn.init.normal_(stage.qkv.weight)  # attention that is far from uniform
    tokens = torch.randn(2, 9, 147)
    assert stage.fused_attn
    fused = stage(tokens)
    stage.fused_attn = False
    torch.testing.assert_close(stage(tokens), fused, rtol=1e-4, atol=1e-4)
    stage.scale *= 1.1
    assert not torch.allclose(stage(tokens), fused, rtol=1e-2, atol=1e-2)
