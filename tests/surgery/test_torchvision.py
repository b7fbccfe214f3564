"""torchvision's transformers: the proofs of every class, on its own models."""

import pytest
from torch import nn
from torchvision.models import maxvit, swin_transformer, vision_transformer
from torchvision.models.swin_transformer import PatchMergingV2, SwinTransformerBlockV2

from localvit.surgery.adapters import adapters
from localvit.surgery.ffns import class_name
from tests.surgery import test_adapters as proofs
from tests.surgery.cases import Case


def _vit(**kwargs: object) -> nn.Module:
    sizes = {"image_size": 32, "patch_size": 8, "num_layers": 2, "num_heads": 3, "hidden_dim": 24}
    return _nonzero_head(vision_transformer.VisionTransformer(**sizes, mlp_dim=48, dropout=0.1, **kwargs))


def _nonzero_head(model: nn.Module) -> nn.Module:
    nn.init.normal_(model.heads.head.weight)  # torchvision starts from zero, which gives no gradients
    return model


def _swin(**kwargs: object) -> nn.Module:
    sizes = {"patch_size": [4, 4], "embed_dim": 16, "depths": [2, 2], "num_heads": [1, 2]}
    return swin_transformer.SwinTransformer(
        **sizes, window_size=[2, 3], stochastic_depth_prob=0.1, dropout=0.1, **kwargs
    )


def _swin2(**kwargs: object) -> nn.Module:
    return _swin(block=SwinTransformerBlockV2, downsample_layer=PatchMergingV2, **kwargs)


def _maxvit(**kwargs: object) -> nn.Module:
    return maxvit.MaxVit(
        input_size=(32, 32),
        stem_channels=8,
        partition_size=2,
        block_channels=[16, 24],
        block_layers=[1, 1],
        head_dim=8,
        stochastic_depth_prob=0.1,
        **kwargs,
    )


CASES = {
    "vit": Case(_vit, {}, (32, 32)),
    "swin": Case(_swin, {}, (16, 24)),
    "swin v2": Case(_swin2, {}, (16, 24)),
    "maxvit": Case(_maxvit, {}, (32, 32)),
}
PROOFS = (
    proofs.test_it_is_exact_and_sees_the_grid,
    proofs.test_kernels_learn_and_are_removed,
    proofs.test_replaced_networks_learn,
    proofs.test_a_fused_model_computes_the_same,
    *([proofs.test_gradients_of_one_image] if proofs.HEAVY else []),
)


@pytest.mark.filterwarnings("ignore:.*stay plain")
@pytest.mark.parametrize("proof", PROOFS, ids=lambda proof: proof.__name__.removeprefix("test_"))
@pytest.mark.parametrize("name", CASES)
def test_torchvision(name, proof, monkeypatch):
    monkeypatch.setattr(proofs, "CASES", CASES)
    proof(name)


def test_every_class_has_a_case():
    tested = {class_name(type(case.make())) for case in CASES.values()}
    listed = {name for adapter in adapters() for name in adapter.classes}
    assert {name for name in listed if name.startswith("torchvision.")} == tested
