"""Parameters of locality, compared with the difference of two models."""

import pytest
import timm
import torch

from localvit import LocalityConfig, LocalityFeedForward, locality_parameters, localize, restore

SMALL = {"img_size": 32, "patch_size": 8, "embed_dim": 16, "depth": 3, "num_heads": 2}


def build(name="deit_tiny_patch16_224"):
    return timm.create_model(name, **SMALL)


@pytest.mark.parametrize("blocks", ["all", [1]])
@pytest.mark.parametrize(
    "config", [LocalityConfig(), LocalityConfig(init="preserve"), LocalityConfig(gate="eca", bias=True)]
)
def test_they_are_what_the_plain_model_lacks(config, blocks):
    model = build()
    plain = {id(p) for p in model.parameters()}
    localize(model, config, blocks)
    expected = [(name, id(p)) for name, p in model.named_parameters() if id(p) not in plain]
    found = locality_parameters(model)
    assert [(name, id(p)) for name, p in found] == expected
    assert found
    if blocks != "all":
        assert all(name.startswith("blocks.1.mlp.") for name, _ in found)


def test_by_hand():
    model = build()
    localize(model, LocalityConfig(init="preserve"))
    names = [name for name, _ in locality_parameters(model)]
    assert names == [f"blocks.{i}.mlp.drop1.conv.weight" for i in range(3)]
    model.blocks[0].mlp.drop1.then = torch.nn.PReLU()  # a layer of the original network may have some
    assert [name for name, _ in locality_parameters(model)] == names


@pytest.mark.parametrize("init", ["paper", "preserve"])
def test_none_before_and_after(init):
    model = build()
    assert locality_parameters(model) == []
    localize(model, LocalityConfig(init=init))
    assert locality_parameters(model)
    restore(model)
    assert locality_parameters(model) == []


def test_models_by_name_and_single_networks():
    named = timm.create_model("localvit_tiny_patch16_224", depth=2)
    ours = timm.create_model("deit_tiny_patch16_224", depth=2)
    localize(ours)
    assert [n for n, _ in locality_parameters(named)] == [n for n, _ in locality_parameters(ours)]
    ffn = LocalityFeedForward(8)
    assert [n for n, _ in locality_parameters(ffn)] == [n for n, _ in ffn.named_parameters()]
