"""Delta files: what is in one, where it can be loaded, and what is refused."""

import copy
import json

import pytest
import timm
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import nn

import localvit
from localvit import ConfigError, LocalityConfig, load_locality, save_locality
from localvit.surgery import locality_parameters

SMALL = {"img_size": 32, "patch_size": 8, "embed_dim": 24, "num_heads": 3, "depth": 3, "num_classes": 5}
PRESERVE = LocalityConfig(init="preserve")
SWIN = {
    "img_size": 32,
    "patch_size": 2,
    "window_size": 4,
    "embed_dim": 12,
    "depths": (1, 1),
    "num_heads": (1, 2),
}
TNT = {"img_size": 32, "patch_size": 16, "embed_dim": 12, "inner_dim": 4, "depth": 2, "num_heads_outer": 2}


def base(name="vit_tiny_patch16_224", seed=3, **args) -> nn.Module:
    torch.manual_seed(seed)
    return timm.create_model(name, **(args or SMALL)).eval()


def learnt(model, config=PRESERVE, seed=0, **options) -> nn.Module:
    """Localize a model, and give the new weights and statistics values that a training might."""
    localvit.localize(model, config, count_macs=False, **options)
    generator = torch.Generator().manual_seed(seed)
    for _, parameter in locality_parameters(model):
        parameter.data += 0.1 * torch.randn(parameter.shape, generator=generator).to(parameter)
    model.train()(images())
    return model.eval()


def images(dtype=torch.float32):
    return torch.randn(2, 3, 32, 32, generator=torch.Generator().manual_seed(5)).to(dtype)


def logits(model, dtype=torch.float32):
    with torch.no_grad():
        return model(images(dtype))


def assert_untouched(model, before):
    assert repr(model) == repr(before)
    assert not hasattr(model, "localization") or hasattr(before, "localization")
    one, other = model.state_dict(), before.state_dict()
    assert one.keys() == other.keys()
    assert all(torch.equal(one[key], other[key]) for key in one)


@pytest.mark.parametrize(
    ("model", "config", "options"),
    [
        ({}, PRESERVE, {}),
        ({}, LocalityConfig(), {"blocks": [0, 2]}),
        ({"name": "swin_tiny_patch4_window7_224", **SWIN}, PRESERVE, {"blocks": "lower-half"}),
        ({"name": "tnt_s_patch16_224", **TNT}, LocalityConfig(), {"also": {"inner": PRESERVE}}),
    ],
)
def test_a_delta_makes_the_same_model_of_its_base_and_goes_again(model, config, options, tmp_path):
    trained, plain = learnt(base(**model), config, **options), base(**model)
    before = copy.deepcopy(plain)
    save_locality(trained, tmp_path / "delta.safetensors")
    random = torch.get_rng_state()
    load_locality(plain, tmp_path / "delta.safetensors")
    assert torch.equal(random, torch.get_rng_state())
    assert torch.equal(logits(plain), logits(trained))
    assert not torch.equal(logits(plain), logits(before))
    localvit.restore(plain)
    assert_untouched(plain, before)


def test_several_deltas_with_their_classifiers_take_turns_on_one_base(tmp_path):
    trained = [learnt(base(), seed=seed) for seed in (1, 2)]
    trained[1].reset_classifier(7)
    for i, model in enumerate(trained):
        save_locality(model, tmp_path / f"{i}", head=True)
    plain = base()
    plain.reset_classifier(0)
    for i in (0, 1, 1, 0):
        load_locality(plain, tmp_path / f"{i}")
        assert torch.equal(logits(plain), logits(trained[i]))


def test_the_head_stays_where_the_file_has_none(tmp_path):
    trained, plain = learnt(base()), base()
    nn.init.ones_(plain.head.weight)
    save_locality(trained, tmp_path / "delta")
    load_locality(plain, tmp_path / "delta")
    assert (plain.head.weight == 1).all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_only_the_new_weights_are_in_the_file_in_the_models_dtype(dtype, tmp_path):
    model = base(**SMALL | {"embed_dim": 384, "depth": 2}).to(dtype)  # a sixth of ViT-S, which has 0.66 MB
    localvit.localize(model, PRESERVE, count_macs=False)
    save_locality(model, tmp_path / "delta")
    assert {value.dtype for value in load_file(tmp_path / "delta").values()} == {dtype}
    assert 0 < (tmp_path / "delta").stat().st_size - 2 * 4 * 384 * 9 * dtype.itemsize < 2000


def test_the_file_says_what_it_is(tmp_path):
    save_locality(learnt(base(), blocks=[1]), tmp_path / "delta", head=True)
    with safe_open(tmp_path / "delta", "pt") as file:
        delta = json.loads(file.metadata()["localvit"])
    assert delta["recipe"]["blocks"] == [1]
    assert LocalityConfig.from_dict(delta["recipe"]["locality"]) == PRESERVE.resolve()
    assert (delta["num_classes"], set(delta["versions"])) == (5, {"localvit", "timm", "torch"})


class LoraLinear(nn.Module):
    """A linear layer as PEFT wraps it: same names, same formula."""

    def __init__(self, base_layer):
        super().__init__()
        self.base_layer = base_layer
        self.lora_A = nn.ModuleDict({"default": nn.Linear(base_layer.in_features, 2, bias=False)})
        self.lora_B = nn.ModuleDict({"default": nn.Linear(2, base_layer.out_features, bias=False)})

    def forward(self, tokens):
        return self.base_layer(tokens) + self.lora_B["default"](self.lora_A["default"](tokens))


class PeftModel(nn.Module):
    """PEFT's wrapper of a model, as far as it matters here."""

    def __init__(self, model):
        super().__init__()
        self.base_model = model
        for block in model.blocks:
            block.attn.qkv = LoraLinear(block.attn.qkv)
            block.mlp.fc2 = LoraLinear(block.mlp.fc2)

    def get_base_model(self):
        return self.base_model

    def forward(self, images):
        return self.base_model(images)


def test_a_delta_and_lora_share_a_base(tmp_path):
    both = PeftModel(learnt(base()))
    save_locality(both, tmp_path / "beside")
    save_locality(learnt(base()), tmp_path / "alone")
    assert load_file(tmp_path / "beside").keys() == load_file(tmp_path / "alone").keys()
    plain = base()
    load_locality(plain, tmp_path / "beside")  # the base without LoRA
    assert torch.equal(logits(plain), logits(learnt(base())))
    other = learnt(base(), seed=9)
    save_locality(other, tmp_path / "other")
    before = logits(both)
    load_locality(both, tmp_path / "other")  # LoRA stays, and the delta is switched
    assert not torch.equal(before, logits(both))
    load_locality(both, tmp_path / "beside")
    assert torch.equal(before, logits(both))


# --- refusals ------------------------------------------------------------------------------------------


def rewritten(file, change):
    """Write a delta again with other metadata, as a forger would."""
    with safe_open(file, "pt") as content:
        delta = json.loads(content.metadata()["localvit"])
    change(delta)
    save_file(load_file(file), file, {"localvit": json.dumps(delta)})


def cut(file):
    file.write_bytes(file.read_bytes()[:-10])


def flip(file):
    content = bytearray(file.read_bytes())
    content[-1] ^= 1
    file.write_bytes(content)


DAMAGE = {
    "cut": (cut, "cannot be read as safetensors"),
    "empty": (lambda file: file.write_bytes(b""), "cannot be read as safetensors"),
    "gone": (lambda file: file.unlink(), "cannot be read as safetensors: .*No such file"),
    "pickle": (lambda file: torch.save({"a": torch.ones(1)}, file), "cannot be read as safetensors"),
    "flip": (flip, "is damaged"),
    "foreign": (lambda file: save_file({"a": torch.ones(1)}, file), "is not a delta file"),
    "no JSON": (lambda file: save_file({"a": torch.ones(1)}, file, {"localvit": "{"}), "is not JSON"),
    "field": (lambda file: rewritten(file, lambda d: d.update(bases="")), "does not exist; did you mean"),
    "missing": (lambda file: rewritten(file, lambda d: d.pop("base")), "base is missing"),
    "base": (
        lambda file: rewritten(file, lambda d: d.update(base="0" * 64)),
        "base with the weights 000000000000",
    ),
    "block": (lambda file: rewritten(file, lambda d: d["recipe"].update(blocks=[0, 3])), "selects block 3"),
    "fewer": (
        lambda file: rewritten(file, lambda d: d["recipe"].update(blocks=[0])),
        r"blocks\.1\.mlp.* is missing, unk",
    ),
    "huge": (
        lambda file: rewritten(file, lambda d: d["recipe"]["locality"].update(kernel_size=10**8 + 1)),
        "its recipe needs more weights",
    ),
    "group": (lambda file: rewritten(file, lambda d: d["recipe"].update(also={"inner": {}})), "also='inner'"),
    "classes": (lambda file: rewritten(file, lambda d: d.update(num_classes=10**9)), "is damaged"),
    "no head": (lambda file: rewritten(file, lambda d: d.update(num_classes=96)), "head.bias is missing"),
}


@pytest.mark.parametrize("num_classes", [0, 5])
@pytest.mark.parametrize(("spoil", "message"), DAMAGE.values(), ids=DAMAGE)
def test_a_damaged_or_foreign_file_changes_nothing(spoil, message, num_classes, tmp_path):
    file = tmp_path / "delta"
    save_locality(learnt(base()), file)
    spoil(file)
    plain = base()
    plain.reset_classifier(num_classes)
    before = copy.deepcopy(plain)
    with pytest.raises(ConfigError, match=message) as caught:
        load_locality(plain, file)
    assert "\n" not in str(caught.value)
    assert_untouched(plain, before)


@pytest.mark.parametrize(
    ("model", "message"),
    [
        (lambda: base(seed=4), "belongs to a base with the weights"),
        (lambda: base(**SMALL | {"img_size": 40}), "built for the same image size"),
        (lambda: base().half(), "belongs to a base with the weights"),
        (lambda: learnt(base(), blocks=[0]), "does not have the recipe of the model"),
        (lambda: learnt(base(), LocalityConfig()), "does not have the recipe of the model"),
        (lambda: timm.create_model("resnet10t"), "does not fit the model: .*ResNet cannot be localized"),
    ],
)
def test_a_model_that_is_not_the_base_is_refused_and_unchanged(model, message, tmp_path):
    save_locality(learnt(base()), tmp_path / "delta", head=True)
    model = model()
    before = copy.deepcopy(model)
    with pytest.raises(ConfigError, match=message):
        load_locality(model, tmp_path / "delta")
    assert_untouched(model, before)


def test_a_base_that_may_have_been_trained_is_a_warning(tmp_path):
    model = learnt(base())
    model(images()).sum().backward()
    with pytest.warns(UserWarning, match=r"weights of the base have gradients.*does not load"):
        localvit.save_locality(model, tmp_path / "a.safetensors")
    for name, parameter in model.named_parameters():
        if name not in dict(locality_parameters(model)):
            parameter.grad = None
    localvit.save_locality(model, tmp_path / "b.safetensors")


def test_what_cannot_be_saved(tmp_path):
    file = tmp_path / "delta"
    with pytest.raises(ConfigError, match="is not localized"):
        save_locality(base(), file)
    with pytest.raises(ConfigError, match="has no classifier"):
        save_locality(learnt(base(**SMALL | {"num_classes": 0})), file, head=True)
    with pytest.raises(localvit.UnsupportedModelError, match="DataParallel; save it before"):
        save_locality(nn.DataParallel(learnt(base())), file)
    assert not file.exists()
    with pytest.raises(ConfigError, match="nowhere' does not exist; choose another"):
        save_locality(learnt(base()), file.parent / "nowhere" / file.name)
    save_locality(learnt(base()), file)
    old = file.read_bytes()
    with pytest.raises(ConfigError, match="exists"):
        save_locality(learnt(base(), seed=9), file)
    assert file.read_bytes() == old
    save_locality(learnt(base(), seed=9), file, overwrite=True)
    assert file.read_bytes() != old
