"""Every registered name, shrunk, through timm's factory and what timm's models can do."""

import copy
import json
import subprocess
import sys

import pytest
import timm
import torch
from timm.models import save_for_hf
from torch import nn

import localvit
from localvit.locality import LocalityFeedForward
from localvit.models import BASELINES, VARIANTS

# Wide enough that the small model's gate, hidden width // 384, still has a unit.
SHRUNK = {"img_size": 32, "patch_size": 8, "embed_dim": 96, "depth": 2, "num_heads": 4}
PRESERVED = {"base": "deit_tiny_distilled_patch16_224", "locality": {"init": "preserve"}, "blocks": [1]}
# Names and the arguments that make them small; `localized` stands for every model by its parts.
MODELS = {
    **{name: (name, SHRUNK) for name in VARIANTS},
    "localized": ("localized", {"base": "vit_tiny_patch16_224", **SHRUNK}),
    "localized preserve": ("localized", {**PRESERVED, **SHRUNK}),
}
every_name = pytest.mark.parametrize("key", MODELS)


def make(key: str, **kwargs) -> nn.Module:
    name, args = MODELS[key]
    torch.manual_seed(0)
    return timm.create_model(name, **{**args, **kwargs})


def images(batch: int = 2, size: tuple[int, int] = (32, 32), channels: int = 3) -> torch.Tensor:
    return torch.randn(batch, channels, *size)


@every_name
def test_it_is_registered(key):
    name = MODELS[key][0]
    assert timm.is_model(name)
    assert name in timm.list_models(module="variants")


@every_name
def test_forward_backward_every_parameter_has_a_gradient(key):
    model = make(key, num_classes=7).train()
    out = model(images())
    assert out.shape == (2, 7)
    out.sum().backward()
    assert all(p.grad is not None for p in model.parameters())


@every_name
def test_factory_options(key):
    model = make(key, num_classes=7, in_chans=1, img_size=(32, 48), drop_path_rate=0.1)
    assert model(images(2, (32, 48), 1)).shape == (2, 7)
    model.reset_classifier(3)
    assert model(images(2, (32, 48), 1)).shape == (2, 3)
    model.set_input_size((48, 32))
    assert model(images(2, (48, 32), 1)).shape == (2, 3)


@every_name
def test_features_only_and_intermediates(key):
    features = make(key, features_only=True, out_indices=(0, 1)).eval()
    assert [tuple(f.shape) for f in features(images())] == [(2, 96, 4, 4)] * 2
    assert features.feature_info.channels() == [96, 96]
    model = make(key).eval()
    final, maps = model.forward_intermediates(images())
    assert [tuple(m.shape) for m in maps] == [(2, 96, 4, 4)] * 2
    assert final.shape[1] == 16 + model.num_prefix_tokens


@every_name
def test_checkpointing_changes_nothing(key):
    model = make(key).eval()
    x = images()
    plain = model(x)
    model.set_grad_checkpointing()
    torch.testing.assert_close(model(x), plain)


@every_name
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_autocast(key, dtype):
    model = make(key).train()
    with torch.autocast("cpu", dtype=dtype):
        out = model(images())
    assert torch.isfinite(out).all()
    out.float().sum().backward()


@every_name
@torch.no_grad()
def test_script_compile_and_deepcopy(key):
    model = make(key).eval()
    x = images()
    expected = model(x)
    torch.testing.assert_close(copy.deepcopy(model)(x), expected)
    torch._dynamo.reset()
    torch.testing.assert_close(torch.compile(model, fullgraph=True, backend="eager")(x), expected)
    torch.testing.assert_close(torch.jit.script(model)(x), expected)


@every_name
def test_saved_and_loaded_from_its_configuration_alone(key, tmp_path):
    model = make(key, num_classes=7, img_size=(32, 48)).eval()
    with torch.no_grad():
        for tensor in model.state_dict().values():
            if tensor.is_floating_point():
                tensor.normal_().abs_()
    save_for_hf(model, str(tmp_path), safe_serialization=True)
    config = json.loads((tmp_path / "config.json").read_text())
    assert config["architecture"] == MODELS[key][0]
    again = timm.create_model(f"local-dir:{tmp_path}", pretrained=True).eval()
    x = images(2, (32, 48))
    assert torch.equal(again(x), model(x))
    features = timm.create_model(
        f"local-dir:{tmp_path}", pretrained=True, features_only=True, out_indices=(1,)
    )
    assert features(x)[0].shape == (2, 96, 4, 6)
    assert timm.create_model(f"local-dir:{tmp_path}", pretrained=True, num_classes=3)(x).shape == (2, 3)


@every_name
def test_optimizer_groups_and_no_weight_decay(key):
    model = make(key)
    assert "pos_embed" in model.no_weight_decay()
    from timm.optim import param_groups_layer_decay

    groups = param_groups_layer_decay(model, layer_decay=0.5, weight_decay=0.05)
    assert sum(len(g["params"]) for g in groups) == len(list(model.parameters()))


@pytest.mark.parametrize("key", list(VARIANTS))
def test_baseline_and_variant_share_the_initial_values_of_what_they_share(key):
    torch.manual_seed(4)
    local = timm.create_model(key, **SHRUNK)
    torch.manual_seed(4)
    plain = timm.create_model(VARIANTS[key].base, **SHRUNK)
    shared = set(plain.state_dict()) & {k for k in local.state_dict() if ".mlp." not in k}
    assert "blocks.1.attn.qkv.weight" in shared
    assert all(torch.equal(plain.state_dict()[k], local.state_dict()[k]) for k in shared)


@pytest.mark.parametrize("key", ["localized"])
def test_surgery_on_any_timm_model_is_saved_with_it(key, tmp_path):
    model = timm.create_model("vit_tiny_patch16_224", num_classes=5, **SHRUNK).eval()
    localvit.localize(model, localvit.LocalityConfig(kernel_size=5), "lower-half")
    save_for_hf(model, str(tmp_path), safe_serialization=True)
    again = timm.create_model(f"local-dir:{tmp_path}", pretrained=True).eval()
    assert isinstance(again.blocks[0].mlp, LocalityFeedForward)
    assert not isinstance(again.blocks[1].mlp, LocalityFeedForward)
    x = images()
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
