"""Hugging Face's and open_clip's transformers: the proofs of every class, on small models."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn

import localvit
from localvit import LocalityConfig, UnsupportedModelError
from localvit.surgery.adapters import adapters
from localvit.surgery.ffns import class_name
from tests.surgery import test_adapters as proofs
from tests.surgery.cases import CASES as timm_cases, Case
from tests.surgery.test_torchvision import PROOFS

transformers = pytest.importorskip("transformers")
PRESERVE = LocalityConfig(init="preserve")
_BODY = {
    "image_size": (32, 48),
    "patch_size": 8,
    "hidden_size": 24,
    "num_hidden_layers": 2,
    "num_attention_heads": 3,
    "intermediate_size": 48,
    "mlp_ratio": 2,
    "initializer_range": 0.2,
}
_WINDOWS = {
    "image_size": (32, 48),
    "patch_size": 4,
    "embed_dim": 16,
    "depths": [2, 2],
    "num_heads": [1, 2],
    "window_size": 3,
    "initializer_range": 0.2,
}
_STAGES = {
    "num_encoder_blocks": 2,
    "depths": [2, 1],
    "hidden_sizes": [16, 24],
    "num_attention_heads": [1, 2],
    "patch_sizes": [7, 3],
    "strides": [4, 2],
    "sr_ratios": [2, 1],
    "mlp_ratios": [2, 2],
    "decoder_hidden_size": 16,
    "initializer_range": 0.2,
}
_TEXT = {"hidden_size": 24, "num_hidden_layers": 1, "num_attention_heads": 3, "vocab_size": 99}


def _hf(name: str, config: str, **settings: Any) -> Callable[..., nn.Module]:
    """Return a function that makes the model `name`; size and head come from the case."""

    def make(num_classes: int = 5, **given: Any) -> nn.Module:
        kind = getattr(transformers, f"{config}Config")
        return getattr(transformers, name)(kind(**{**settings, "num_labels": num_classes, **given}))

    return make


def _case(
    name: str, config: str, common: dict[str, Any], size: tuple[int, int] = (32, 48), **settings: Any
) -> Case:
    return Case(_hf(name, config, **common, **settings), {}, size)


def _tower(name: str, config: str, **settings: Any) -> Case:
    """Return CLIP's or SigLIP's vision model; its images are square unless it interpolates."""
    vision = {**_BODY, "image_size": 32, **settings}
    if config.endswith("Vision"):
        return Case(_hf(name, config, **vision), {}, (32, 32))
    return Case(_hf(name, config, vision_config=vision, text_config=_TEXT, projection_dim=16), {}, (32, 32))


def _timm(name: str, architecture: str) -> Case:
    args = {"img_size": (32, 48), "patch_size": 8, "embed_dim": 24, "num_heads": 3, "depth": 2}
    config = {"architecture": architecture, "model_args": args, "do_pooling": True}
    return Case(_hf(name, "TimmWrapper", **config), {}, (32, 48))


_DROP = {"drop_path_rate": 0.1}
_STAGE2 = {**_BODY, "out_features": ["stage1", "stage2"], "reshape_hidden_states": True}
CASES = {
    "vit": _case("ViTModel", "ViT", _BODY, hidden_dropout_prob=0.1),
    "vit classifier": _case("ViTForImageClassification", "ViT", _BODY),
    "deit": _case("DeiTModel", "DeiT", _BODY),
    "deit classifier": _case("DeiTForImageClassification", "DeiT", _BODY),
    "deit with teacher": _case("DeiTForImageClassificationWithTeacher", "DeiT", _BODY),
    "beit": _case(
        "BeitModel", "Beit", _BODY, use_relative_position_bias=True, layer_scale_init_value=1.0, **_DROP
    ),
    "beit without LayerScale": _case("BeitModel", "Beit", _BODY, layer_scale_init_value=0.0),
    "beit classifier": _case("BeitForImageClassification", "Beit", _BODY, use_mean_pooling=False),
    "beit classifier, mean": _case("BeitForImageClassification", "Beit", _BODY),
    "beit backbone": _case("BeitBackbone", "Beit", _STAGE2),
    "dinov2": _case("Dinov2Model", "Dinov2", {**_BODY, "image_size": 32}, **_DROP),
    "dinov2 gated": _case("Dinov2Model", "Dinov2", {**_BODY, "image_size": 32}, use_swiglu_ffn=True),
    "dinov2 classifier": _case("Dinov2ForImageClassification", "Dinov2", {**_BODY, "image_size": 32}),
    "dinov2 backbone": _case("Dinov2Backbone", "Dinov2", {**_STAGE2, "image_size": 32}),
    "registers": _case("Dinov2WithRegistersModel", "Dinov2WithRegisters", {**_BODY, "image_size": 32}),
    "registers gated": _case(
        "Dinov2WithRegistersModel", "Dinov2WithRegisters", {**_BODY, "image_size": 32}, use_swiglu_ffn=True
    ),
    "registers classifier": _case(
        "Dinov2WithRegistersForImageClassification", "Dinov2WithRegisters", {**_BODY, "image_size": 32}
    ),
    "registers backbone": _case(
        "Dinov2WithRegistersBackbone", "Dinov2WithRegisters", {**_STAGE2, "image_size": 32}
    ),
    "dinov3": _case("DINOv3ViTModel", "DINOv3ViT", _BODY, num_register_tokens=4, **_DROP),
    "dinov3 gated": _case("DINOv3ViTModel", "DINOv3ViT", _BODY, use_gated_mlp=True, num_register_tokens=4),
    "dinov3 backbone": _case("DINOv3ViTBackbone", "DINOv3ViT", _STAGE2, num_register_tokens=4),
    "clip": _tower("CLIPVisionModel", "CLIPVision"),
    "clip projection": _tower("CLIPVisionModelWithProjection", "CLIPVision", projection_dim=16),
    "clip classifier": _tower("CLIPForImageClassification", "CLIP"),
    "siglip": _tower("SiglipVisionModel", "SiglipVision"),
    "siglip classifier": _tower("SiglipForImageClassification", "Siglip"),
    "swin": _case("SwinModel", "Swin", _WINDOWS, **_DROP),
    "swin classifier": _case("SwinForImageClassification", "Swin", _WINDOWS),
    "swin backbone": _case("SwinBackbone", "Swin", _WINDOWS, out_features=["stage1", "stage2"]),
    "swin v2": _case("Swinv2Model", "Swinv2", _WINDOWS, **_DROP),
    "swin v2 classifier": _case("Swinv2ForImageClassification", "Swinv2", _WINDOWS),
    "swin v2 backbone": _case("Swinv2Backbone", "Swinv2", _WINDOWS, out_features=["stage1", "stage2"]),
    "segformer": _case("SegformerModel", "Segformer", _STAGES, **_DROP),
    "segformer classifier": _case("SegformerForImageClassification", "Segformer", _STAGES),
    "segformer segmentation": _case("SegformerForSemanticSegmentation", "Segformer", _STAGES),
    "timm": _timm("TimmWrapperModel", "vit_tiny_patch16_224"),
    "timm classifier": _timm("TimmWrapperForImageClassification", "vit_tiny_patch16_224"),
}


AROUND = ("classifier", "backbone", "projection", "teacher", "segmentation")  # models around those above
PAIRS = [
    pytest.param(name, proof, id=f"{name}-{proof.__name__.removeprefix('test_')}")
    for name in CASES
    for proof in (PROOFS[:2] if any(word in name for word in AROUND) else PROOFS)
]


@pytest.mark.filterwarnings("ignore:.*stay plain")
@pytest.mark.parametrize(("name", "proof"), PAIRS)
def test_hf(name, proof, monkeypatch):
    monkeypatch.setattr(proofs, "CASES", CASES)
    proof(name)


def _clip_with_text(
    name: str = "CLIPModel", config: str = "CLIP"
) -> tuple[nn.Module, dict[str, torch.Tensor]]:
    case = _tower(name, config)
    inputs = {"pixel_values": case.images(), "input_ids": torch.arange(10).view(2, 5) % 7}
    return case.make().eval(), inputs


@pytest.mark.parametrize(("name", "config"), [("CLIPModel", "CLIP"), ("SiglipModel", "Siglip")])
def test_the_vision_model_next_to_a_text_model_is_localized(name, config):
    model, inputs = _clip_with_text(name, config)
    assert localvit.check_adapter(model, image_size=(32, 32)).ffns == 2
    before = model(**inputs)
    report = localvit.localize(model, PRESERVE)
    assert [site.name for site in report.plan.sites] == [
        f"vision_model.encoder.layers.{i}.mlp" for i in (0, 1)
    ]
    assert "of the vision model" in report.plan.notes[0]
    assert torch.equal(model(**inputs).logits_per_image, before.logits_per_image)
    nn.init.normal_(proofs.kernels(model)["vision_model.encoder.layers.0.mlp.fc2.locality.conv.weight"])
    after = model(**inputs)
    assert not torch.equal(after.image_embeds, before.image_embeds)
    assert torch.equal(after.text_embeds, before.text_embeds)


@pytest.mark.parametrize("name", ["vit", "deit", "clip", "siglip"])
def test_other_sizes_have_their_grid(name):
    model = CASES[name].make(image_size=32).eval()
    images, sized = torch.randn(2, 3, 40, 24), {"interpolate_pos_encoding": True}
    expected = model(images, **sized).last_hidden_state
    localvit.localize(model, PRESERVE)
    assert torch.equal(model(images, **sized).last_hidden_state, expected)
    record = next(m for m in model.modules() if hasattr(m, "grid_record")).grid_record
    assert tuple(record.size) == (5, 3)


@pytest.mark.parametrize("case", [CASES["segformer"], timm_cases["pvt v2"]], ids=["segformer", "pvt v2"])
def test_replaced_ffns_that_get_the_size_as_arguments_are_fused(case):
    model = case.make().eval()
    localvit.localize(model, LocalityConfig(), count_macs=False)
    with torch.no_grad():
        expected = proofs.total(model(case.images()))
        torch.testing.assert_close(proofs.total(localvit.fuse(model)(case.images())), expected)


def test_a_plan_leaves_the_windows_of_swin():
    model = _case("SwinModel", "Swin", {**_WINDOWS, "window_size": 4}).make().eval()
    localvit.plan(model, PRESERVE)  # a forward pass at 32 x 48 takes the shift
    assert [(b.window_size, b.shift_size) for b in model.encoder.layers[1].blocks] == [(4, 0), (4, 2)]


def test_lora_is_accepted_after_a_test():
    peft = pytest.importorskip("peft")
    model = CASES["dinov2"].make().eval()
    lora = peft.LoraConfig(target_modules=["fc1", "fc2"], r=2, init_lora_weights=False)
    model = peft.inject_adapter_in_model(lora, model)
    images = CASES["dinov2"].images()
    expected = model(images).last_hidden_state
    localvit.localize(model, PRESERVE)
    assert torch.equal(model(images).last_hidden_state, expected)


def test_features_of_timm_are_refused():
    config = {"architecture": "vit_tiny_patch16_224", "model_args": {"features_only": True, "img_size": 32}}
    with pytest.raises(UnsupportedModelError, match="FeatureGetterNet cannot be localized"):
        localvit.localize(_hf("TimmWrapperModel", "TimmWrapper", **config)(), PRESERVE)


# --- open_clip -------------------------------------------------------------------------------------------


def _open_clip(**given: Any) -> Callable[..., nn.Module]:
    def make(num_classes: int = 5) -> nn.Module:
        from open_clip.transformer import VisionTransformer

        sizes = {
            "image_size": (32, 48),
            "patch_size": 8,
            "width": 24,
            "layers": 2,
            "heads": 3,
            "mlp_ratio": 2,
        }
        return VisionTransformer(**sizes, output_dim=num_classes, **given)

    return make


def _open_clip_timm(num_classes: int = 5) -> nn.Module:
    from open_clip.timm_model import TimmModel

    model = TimmModel("vit_tiny_patch16_224", num_classes, pool="")
    model.trunk.set_input_size((32, 48), patch_size=8)
    model.trunk.blocks = model.trunk.blocks[:2]
    return model


OPEN_CLIP = {
    "class token": Case(_open_clip(), {}),
    "mean, LayerScale": Case(_open_clip(pool_type="avg", ls_init_value=1.0), {}),
    "custom blocks": Case(_open_clip(block_type="custom", scale_fc=True, output_tokens=True), {}),
    "timm": Case(_open_clip_timm, {}),
}


@pytest.mark.filterwarnings("ignore:.*stay plain")
@pytest.mark.parametrize("proof", PROOFS, ids=lambda proof: proof.__name__.removeprefix("test_"))
@pytest.mark.parametrize("name", OPEN_CLIP)
def test_open_clip(name, proof, monkeypatch):
    pytest.importorskip("open_clip")
    monkeypatch.setattr(proofs, "CASES", OPEN_CLIP)
    proof(name)


@pytest.mark.parametrize("custom", [False, True])
def test_open_clip_with_text(custom):
    open_clip = pytest.importorskip("open_clip")
    vision = {"image_size": 32, "patch_size": 8, "width": 24, "layers": 2, "head_width": 8}
    text = {"context_length": 5, "vocab_size": 99, "width": 24, "heads": 3, "layers": 1}
    model = (open_clip.CustomTextCLIP if custom else open_clip.CLIP)(16, vision, text).eval()
    assert localvit.check_adapter(model, image_size=(32, 32)).ffns == 2
    inputs = torch.randn(2, 3, 32, 32), torch.arange(10).view(2, 5)
    before = model(*inputs)
    localvit.localize(model, PRESERVE)
    after = model(*inputs)
    assert torch.equal(after[0], before[0])
    assert (
        next(iter(proofs.kernels(model))) == "visual.transformer.resblocks.0.mlp.c_proj.locality.conv.weight"
    )


def test_patch_dropout_of_open_clip_is_refused():
    pytest.importorskip("open_clip")
    with pytest.raises(UnsupportedModelError, match=r"patch_drop_rate=0\.5 removes tokens"):
        localvit.localize(_open_clip(patch_dropout=0.5)(), PRESERVE)


def test_other_sequentials_are_refused():
    """The FFN of open_clip is a Sequential, so its layers are looked at."""
    pytest.importorskip("open_clip")
    model = _open_clip()()
    model.transformer.resblocks[1].mlp.gelu = nn.Conv1d(48, 48, 3)
    with pytest.raises(UnsupportedModelError, match=r"resblocks\.1\.mlp is a Sequential"):
        localvit.localize(model, PRESERVE)


def test_every_class_has_a_case():
    tested = {class_name(type(case.make())) for case in (*CASES.values(), *OPEN_CLIP.values())}
    ours = ("transformers.", "open_clip.")
    listed = {name for adapter in adapters() for name in adapter.classes if name.startswith(ours)}
    with_text = {"CLIPModel", "SiglipModel", "CLIP", "CustomTextCLIP"}  # their own tests are above
    assert {name.rpartition(".")[2] for name in listed - tested} == with_text
