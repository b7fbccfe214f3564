"""Every registered name, shrunk, through timm's factory and what timm's models can do."""

import copy
import json
import subprocess
import sys
from dataclasses import dataclass, field
from typing import Any

import pytest
import timm
import torch
from timm.models import get_pretrained_cfg, save_for_hf
from timm.models._features_fx import create_feature_extractor
from torch import nn

import localvit
from localvit.errors import ConfigError
from localvit.locality.feed_forward import HiddenLocality, LocalityFeedForward
from localvit.models.table import BASELINES, VARIANTS


@dataclass(frozen=True)
class Shrunk:
    """A family made small.

    Attributes:
        args: Constructor arguments.
        size, wide, tall: Of images, the last two with equally many tokens.
        levels: Channels and reduction of the feature maps that `features_only` gives.
        resize: Arguments of `set_input_size` besides the size; ``None`` where a model keeps its size.
    """

    args: dict[str, Any]
    size: tuple[int, int]
    wide: tuple[int, int]
    levels: tuple[tuple[int, int], ...]
    resize: dict[str, Any] | None = field(default_factory=dict)

    @property
    def tall(self) -> tuple[int, int]:
        return self.wide[::-1]


# Wide enough that the small model's gate, hidden width // 384, still has a unit.
VIT = Shrunk(
    args={"patch_size": 8, "embed_dim": 96, "depth": 2, "num_heads": 4},
    size=(32, 32),
    wide=(32, 48),
    levels=((96, 8), (96, 8)),
)
FAMILIES = {
    "t2t": Shrunk(
        args={"embed_dim": 96, "depth": 2, "num_heads": 4, "token_dim": 16},
        size=(64, 64),
        wide=(64, 96),
        levels=((96, 16), (96, 16)),
    ),
    "pvt": Shrunk(
        args={"embed_dims": (8, 16, 20, 32), "depths": (1, 1, 1, 1)},
        size=(64, 64),
        wide=(64, 96),
        levels=((8, 4), (16, 8), (20, 16), (32, 32)),
    ),
    "tnt": Shrunk(
        args={"embed_dim": 24, "inner_dim": 12, "depth": 2, "num_heads_outer": 3, "num_heads_inner": 3},
        size=(64, 64),
        wide=(64, 96),
        levels=((24, 16), (24, 16)),
        resize=None,
    ),
    "swin": Shrunk(
        args={"embed_dim": 16, "depths": (2, 1, 1, 1), "num_heads": (1, 2, 2, 2), "window_size": 4},
        size=(64, 64),
        wide=(64, 96),
        levels=((16, 4), (32, 8), (64, 16), (128, 32)),
        resize={"window_size": 4},  # timm scales the windows otherwise
    ),
}


def family(base: str) -> Shrunk:
    return next((shrunk for start, shrunk in FAMILIES.items() if base.startswith(start)), VIT)


PRESERVED = (
    "deit_tiny_distilled_patch16_224",
    "t2t_vit_7",
    "t2t_vit_t_14",
    "pvt_tiny",
    "tnt_t_legacy_patch16_224",
    "swin_tiny_patch4_window7_224",
)


@dataclass(frozen=True)
class Case:
    name: str
    shrunk: Shrunk
    args: dict[str, Any] = field(default_factory=dict)


CASES = {
    **{name: Case(name, family(variant.base)) for name, variant in VARIANTS.items()},
    "localized": Case("localized", VIT, {"base": "vit_tiny_patch16_224"}),
    # Every baseline keeps its function under init="preserve".
    **{
        f"localized {base}": Case("localized", family(base), {"base": base, "locality": {"init": "preserve"}})
        for base in PRESERVED
    },
    "localized inner": Case(
        "localized",
        FAMILIES["tnt"],
        {"base": "tnt_t_legacy_patch16_224", "also": {"inner": {"gate": "none", "drop_path": True}}},
    ),
}
# A further size differs from the paper's only in numbers that are shrunk away, so that it is tested in it.
SAME = {
    "localvit_t2t_vit_19": "localvit_t2t_vit_14",
    "localvit_t2t_vit_24": "localvit_t2t_vit_14",
    **{f"localvit_pvt_{size}": "localvit_pvt_tiny" for size in ("small", "medium", "large")},
    "localvit_tnt_small_patch16_224": "localvit_tnt_tiny_patch16_224",
    **{
        f"localvit_swin_{size}_patch4_window7_224": "localvit_swin_tiny_patch4_window7_224"
        for size in ("small", "base")
    },
}
# These differ from another name in widths only.
NUMBERS_ONLY = (
    "localvit_tiny_se4_patch16_224",
    "localvit_small_patch16_224",
    "localvit_base_patch16_224",
    "localvit_t2t_vit_14",
)
every_name = pytest.mark.parametrize("key", [key for key in CASES if key not in SAME])


def make(key: str, **kwargs) -> nn.Module:
    case = CASES[key]
    torch.manual_seed(0)
    return timm.create_model(
        case.name, **{**case.args, **case.shrunk.args, "img_size": case.shrunk.size, **kwargs}
    )


def images(key: str, batch: int = 2, size: tuple[int, int] | None = None, channels: int = 3) -> torch.Tensor:
    generator = torch.Generator().manual_seed(1)
    return torch.randn(batch, channels, *(size or CASES[key].shrunk.size), generator=generator)


def stirred(model: nn.Module) -> nn.Module:
    """With kernels that are not zero, so that locality shows."""
    with torch.no_grad():
        for module in model.modules():
            if isinstance(module, HiddenLocality):
                module.conv.weight.normal_()
    return model


@pytest.mark.parametrize("key", SAME)
def test_a_further_size_shrinks_to_the_paper_s(key):
    assert repr(make(key)) == repr(make(SAME[key]))


@every_name
def test_it_is_registered(key):
    name = CASES[key].name
    assert timm.is_model(name)
    assert name in timm.list_models(module="variants")


@every_name
def test_forward_backward_every_parameter_has_a_gradient(key):
    model = make(key, num_classes=7).train()
    out = model(images(key))
    assert out.shape == (2, 7)
    out.sum().backward()
    assert all(p.grad is not None for p in model.parameters())


@every_name
def test_factory_options(key):
    wide, tall = CASES[key].shrunk.wide, CASES[key].shrunk.tall
    model = make(key, num_classes=7, in_chans=1, img_size=wide, drop_path_rate=0.1)
    assert model(images(key, 2, wide, 1)).shape == (2, 7)
    model.reset_classifier(3)
    assert model(images(key, 2, wide, 1)).shape == (2, 3)
    if CASES[key].shrunk.resize is not None:
        model.set_input_size(tall)
        assert model(images(key, 2, tall, 1)).shape == (2, 3)


@every_name
@torch.no_grad()
def test_two_sizes_of_equally_many_tokens(key):
    """A model resized, a copy of it, and one built for the size agree; the sizes are told apart."""
    shrunk = CASES[key].shrunk
    built = stirred(make(key, img_size=shrunk.tall)).eval()
    if shrunk.resize is not None:
        model = stirred(make(key, img_size=shrunk.wide)).eval()
        model(images(key, 2, shrunk.wide))
        model.set_input_size(shrunk.tall, **shrunk.resize)
        built.load_state_dict(model.state_dict())
        torch.testing.assert_close(model(images(key, 2, shrunk.tall)), built(images(key, 2, shrunk.tall)))
    expected = built(images(key, 2, shrunk.tall))
    torch.testing.assert_close(copy.deepcopy(built)(images(key, 2, shrunk.tall)), expected)
    records = {id(m.grid_record): m.grid_record for m in built.modules() if hasattr(m, "grid_record")}
    assert all(record.size[0] > record.size[1] for record in records.values() if not record.constant)
    assert all(record.size == record.static_size for record in records.values())


@every_name
@torch.no_grad()
def test_features_only_and_intermediates(key):
    shrunk = CASES[key].shrunk
    wide = shrunk.wide
    features = make(
        key, img_size=wide, features_only=True, out_indices=tuple(range(len(shrunk.levels)))
    ).eval()
    expected = [(2, channels, wide[0] // step, wide[1] // step) for channels, step in shrunk.levels]
    assert [tuple(f.shape) for f in features(images(key, 2, wide))] == expected
    assert features.feature_info.channels() == [channels for channels, _ in shrunk.levels]
    assert features.feature_info.reduction() == [step for _, step in shrunk.levels]
    model = make(key, img_size=wide).eval()
    final, maps = model.forward_intermediates(images(key, 2, wide))
    assert [tuple(m.shape) for m in maps] == expected
    torch.testing.assert_close(final, model.forward_features(images(key, 2, wide)))


@every_name
def test_checkpointing_changes_nothing(key):
    model = stirred(make(key)).train()
    x, outputs = images(key), []
    for enabled in (False, True):
        model.set_grad_checkpointing(enabled)
        model.zero_grad()
        torch.manual_seed(0)
        out = model(x)
        out.square().sum().backward()
        outputs.append([out.detach(), *(p.grad.clone() for p in model.parameters())])
    for plain, checkpointed in zip(*outputs, strict=True):
        torch.testing.assert_close(checkpointed, plain, rtol=1e-4, atol=1e-5)


@every_name
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_autocast(key, dtype):
    model = make(key).train()
    with torch.autocast("cpu", dtype=dtype):
        out = model(images(key))
    assert torch.isfinite(out).all()
    out.float().sum().backward()


# What follows is slow, and blind to numbers in a configuration: one name of each structure. Baselines under
# init="preserve" but the one with windows are traced in tests/surgery.
TRACED = [
    key
    for key in CASES
    if key not in SAME
    and not key.endswith("_matched")
    and key not in NUMBERS_ONLY
    and (not key.startswith("localized ") or "swin" in key or "inner" in key)
]


@pytest.mark.parametrize("key", TRACED)
@pytest.mark.filterwarnings("ignore:NOTE. The nodes obtained by tracing")  # drop-path: in training only
@torch.no_grad()
def test_script_compile_export_and_deepcopy(key):
    model = stirred(make(key, img_size=CASES[key].shrunk.wide)).eval()
    x = images(key, 2, CASES[key].shrunk.wide)
    heads = [name for name in ("head", "head_dist") if hasattr(model, name)]
    graph = create_feature_extractor(model, heads)  # before any forward pass left a grid
    expected = model(x)
    torch.testing.assert_close(torch.stack(list(graph(x).values())).mean(0), expected)
    torch.testing.assert_close(copy.deepcopy(model)(x), expected)
    torch.testing.assert_close(torch.jit.script(model)(x), expected)
    torch._dynamo.reset()
    torch.testing.assert_close(torch.compile(model, fullgraph=True, backend="eager")(x), expected)
    batch = {0: torch.export.Dim("batch", min=1, max=64)}
    program = torch.export.export(model, (x,), dynamic_shapes=(batch,), strict=False)
    torch.testing.assert_close(program.module()(x[:1].repeat(3, 1, 1, 1)), expected[:1].repeat(3, 1))


@every_name
def test_saved_and_loaded_from_its_configuration_alone(key, tmp_path):
    shrunk = CASES[key].shrunk
    model = make(key, num_classes=7, img_size=shrunk.wide).eval()
    with torch.no_grad():
        for tensor in model.state_dict().values():
            if tensor.is_floating_point():
                tensor.normal_(std=0.1).abs_()
    save_for_hf(model, str(tmp_path), safe_serialization=True)
    config = json.loads((tmp_path / "config.json").read_text())
    assert config["architecture"] == CASES[key].name
    again = timm.create_model(f"local-dir:{tmp_path}", pretrained=True).eval()
    x = images(key, 2, shrunk.wide)
    assert torch.equal(again(x), model(x))
    features = timm.create_model(
        f"local-dir:{tmp_path}", pretrained=True, features_only=True, out_indices=(1,)
    )
    channels, step = shrunk.levels[1]
    assert features(x)[0].shape == (2, channels, shrunk.wide[0] // step, shrunk.wide[1] // step)
    assert timm.create_model(f"local-dir:{tmp_path}", pretrained=True, num_classes=3)(x).shape == (2, 3)


@every_name
def test_optimizer_groups(key):
    from timm.optim import param_groups_layer_decay

    model = make(key)
    groups = param_groups_layer_decay(model, layer_decay=0.5, weight_decay=0.05)
    assert sum(len(g["params"]) for g in groups) == len(list(model.parameters()))


@pytest.mark.parametrize("key", [key for key in VARIANTS if key not in SAME])
def test_configuration_names_layers_that_exist(key):
    cfg, model = get_pretrained_cfg(key), make(key)
    assert f"{cfg.classifier}.weight" in model.state_dict()
    first = [cfg.first_conv] if isinstance(cfg.first_conv, str) else cfg.first_conv
    assert all(f"{name}.weight" in model.state_dict() for name in first)


@pytest.mark.parametrize("key", [key for key in VARIANTS if key not in SAME])
def test_baseline_and_variant_share_the_initial_values_of_what_they_share(key):
    local = make(key)
    torch.manual_seed(0)
    shrunk = CASES[key].shrunk
    plain = timm.create_model(VARIANTS[key].base, **shrunk.args, img_size=shrunk.size).state_dict()
    local = {k: v for k, v in local.state_dict().items() if ".mlp." not in k}
    shared = set(plain) & set(local)
    assert any("attn" in k for k in shared)
    assert all(torch.equal(plain[k], local[k]) for k in shared)


@pytest.mark.parametrize("key", ["localized"])
def test_surgery_on_any_timm_model_is_saved_with_it(key, tmp_path):
    model = timm.create_model("vit_tiny_patch16_224", num_classes=5, img_size=32, **VIT.args).eval()
    localvit.localize(model, localvit.LocalityConfig(kernel_size=5), "lower-half")
    save_for_hf(model, str(tmp_path), safe_serialization=True)
    again = timm.create_model(f"local-dir:{tmp_path}", pretrained=True).eval()
    assert isinstance(again.blocks[0].mlp, LocalityFeedForward)
    assert not isinstance(again.blocks[1].mlp, LocalityFeedForward)
    x = images(key)
    assert torch.equal(again(x), model(x))
    localvit.restore(model)
    save_for_hf(model, str(tmp_path), safe_serialization=True)
    assert json.loads((tmp_path / "config.json").read_text())["architecture"] == "vit_tiny_patch16_224"
    plain = timm.create_model(f"local-dir:{tmp_path}", pretrained=True).eval()
    assert torch.equal(plain(x), model(x))


@pytest.mark.parametrize("key", ["localvit_tiny_patch16_224"])
def test_without_import_localvit_the_name_is_unknown_and_with_it_known(key, tmp_path):
    code = f"import timm; print(timm.is_model({key!r})); import localvit; print(timm.is_model({key!r}))"
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    assert out.split() == ["False", "True"]


@pytest.mark.parametrize("key", list(BASELINES))
def test_baselines_exist(key):
    assert timm.is_model(key)


@pytest.mark.parametrize("key", ["localvit_tiny_patch16_224"])
def test_pretrained_says_what_is_missing_where_there_is_no_network(key, monkeypatch):
    from urllib.error import URLError

    def refuse(*_args, **_kwargs):
        raise URLError("no network")

    monkeypatch.setattr("timm.models._builder.load_state_dict_from_url", refuse)
    with pytest.raises(
        RuntimeError, match=r"localvit_t\.pth could not be fetched \(no network\).*load_official"
    ):
        timm.create_model(key, pretrained=True)


@pytest.mark.parametrize("key", ["localvit_tiny_patch16_224"])
def test_pretrained_reads_the_authors_layout(key, monkeypatch):
    from .. import golden

    facts = golden.facts("localvit_tiny_mlp4_act3_r192")
    weights = {
        k: v.float() if v.is_floating_point() else v for k, v in golden.filled(facts["state_dict"]).items()
    }
    monkeypatch.setattr("timm.models._builder.load_state_dict_from_url", lambda *_a, **_k: {"model": weights})
    model = timm.create_model(key, pretrained=True).eval()
    with torch.no_grad():
        logits = model(torch.from_numpy(golden.make_input()).float()).numpy()
    assert abs(logits - golden.arrays("localvit_tiny_mlp4_act3_r192")["logits"]).max() < 5e-5
    other = timm.create_model(key, pretrained=True, num_classes=10)
    assert torch.equal(other.blocks[3].mlp.conv.weight, model.blocks[3].mlp.conv.weight)


@pytest.mark.parametrize("key", ["localvit_tiny_relu6_x6_patch16_224"])
def test_a_name_without_published_weights_says_so(key):
    with pytest.raises(RuntimeError, match="No pretrained weights exist"):
        timm.create_model(key, pretrained=True)


def test_a_saved_model_of_0_3_opens_under_its_old_words(tmp_path):
    model = timm.create_model(
        "localized", base="deit_tiny_patch16_224", locality={"prefix": "pointwise"}, blocks=[0], depth=1
    )
    save_for_hf(model, str(tmp_path), safe_serialization=True)
    file = tmp_path / "config.json"
    file.write_text(file.read_text().replace('"pointwise"', '"mlp"'))
    opened = timm.create_model(f"local-dir:{tmp_path}", pretrained=True)
    assert opened.blocks[0].mlp.prefix == "pointwise"
    with pytest.raises(ConfigError, match="write prefix='pointwise'"):
        timm.create_model("localized", base="deit_tiny_patch16_224", locality={"prefix": "mlp"})
