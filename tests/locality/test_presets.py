"""Published designs are equal to timm's modules, and to plain references where timm has none."""

import dataclasses
import json

import pytest
import torch
from timm.models.efficientformer_v2 import ConvMlpWithNorm
from timm.models.efficientvit_mit import MBConv
from timm.models.fastvit import ConvMlp
from timm.models.pvt_v2 import MlpWithDepthwiseConv
from torch import Tensor, nn

import localvit
from localvit import PRESETS, ConfigError, Grid, LocalityConfig, LocalityFeedForward

from ..reference.designs import DESIGNS, gelu, pw
from .test_feed_forward import random_weights

DIM, HIDDEN, HEIGHT, WIDTH = 12, 48, 5, 4
training_or_not = pytest.mark.parametrize("training", [False, True])


def make(config: LocalityConfig) -> LocalityFeedForward:
    torch.manual_seed(0)
    ffn = LocalityFeedForward(DIM, config, hidden_dim=HIDDEN).double()
    random_weights(ffn)
    return ffn


def tokens(prefix: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(1)
    return torch.randn(3, prefix + HEIGHT * WIDTH, DIM, dtype=torch.float64, generator=generator)


def as_map(x: Tensor) -> Tensor:
    return x.transpose(1, 2).unflatten(2, (HEIGHT, WIDTH))


def as_tokens(x: Tensor) -> Tensor:
    return x.flatten(2).transpose(1, 2)


def close(got: Tensor, want: Tensor) -> None:
    torch.testing.assert_close(got, want, rtol=0, atol=1e-10)


def copy_weights(ffn: LocalityFeedForward, names: dict[str, str], theirs: nn.Module) -> nn.Module:
    """Give ``theirs`` the weights of ``ffn``: every one of both has a counterpart."""
    shapes, state = theirs.state_dict(), {}
    for key, value in ffn.state_dict().items():
        layer, _, leaf = key.rpartition(".")
        target = f"{names[layer]}.{leaf}"
        state[target] = value.reshape(shapes[target].shape)
    theirs.double().load_state_dict(state, strict=True)
    return theirs


@training_or_not
@pytest.mark.parametrize("linear", [False, True])
def test_mix_ffn_equals_timm_s(linear, training):
    changes = {"activation": ("relu", "gelu")} if linear else {}  # of the "linear" PVT v2
    ffn = make(localvit.preset("mix_ffn", **changes)).train(training)
    names = {"fc1": "fc1", "conv": "dwconv", "fc2": "fc2"}
    theirs = copy_weights(ffn, names, MlpWithDepthwiseConv(DIM, HIDDEN, extra_relu=linear))
    close(ffn(tokens(), Grid(HEIGHT, WIDTH)), theirs.train(training)(tokens(), [HEIGHT, WIDTH]))


EFFICIENTFORMER = {"fc1": "fc1.conv", "norm1": "fc1.bn", "conv": "mid.conv", "norm2": "mid.bn"} | {
    "fc2": "fc2.conv",
    "norm3": "fc2.bn",
}
EFFICIENTVIT = {"fc1": "inverted_conv.conv", "conv": "depth_conv.conv", "fc2": "point_conv.conv"} | {
    "norm3": "point_conv.norm"
}


def mbconv() -> nn.Module:
    norms, acts = (None, None, nn.BatchNorm2d), (nn.Hardswish, nn.Hardswish, None)
    return MBConv(DIM, DIM, 3, 1, HIDDEN, use_bias=(True, True, False), norm_layer=norms, act_layer=acts)


FASTVIT = {"conv": "conv.conv", "norm2": "conv.bn", "fc1": "fc1", "fc2": "fc2"}


@training_or_not
@pytest.mark.parametrize(
    ("name", "names", "build"),
    [
        ("efficientformerv2", EFFICIENTFORMER, lambda: ConvMlpWithNorm(DIM, HIDDEN, mid_conv=True)),
        ("efficientvit_mbconv", EFFICIENTVIT, mbconv),
        ("fastvit_conv_ffn", FASTVIT, lambda: ConvMlp(DIM, HIDDEN)),
    ],
)
def test_equals_timm_s_module(name, names, build, training):
    ffn = make(PRESETS[name])
    theirs = copy_weights(ffn, names, build()).train(training)
    want = as_tokens(theirs(as_map(tokens())))
    close(ffn.train(training)(tokens(), Grid(HEIGHT, WIDTH)), want)
    statistics = dict(theirs.named_buffers())
    for key, value in ffn.named_buffers():
        layer, _, leaf = key.rpartition(".")
        close(value.double(), statistics[f"{names[layer]}.{leaf}"].double())


@training_or_not
@pytest.mark.parametrize("name", DESIGNS)
def test_equals_the_formula(name, training):
    ffn = make(PRESETS[name]).train(training)
    weights = {key: value.clone() for key, value in ffn.state_dict().items()}
    got = ffn(tokens(), Grid(HEIGHT, WIDTH))
    close(got, as_tokens(DESIGNS[name](weights, as_map(tokens()), training)))
    reader = Reader(weights)
    DESIGNS[name](reader, as_map(tokens()), False)
    assert reader.seen | {key for key in weights if key.endswith("num_batches_tracked")} == set(weights)


class Reader(dict[str, Tensor]):
    """Notes what a formula reads: none of the weights may be there without a part in it."""

    def __init__(self, weights: dict[str, Tensor]) -> None:
        super().__init__(weights)
        self.seen: set[str] = set()

    def __getitem__(self, key: str) -> Tensor:
        self.seen.add(key)
        return super().__getitem__(key)


def test_every_preset_is_held_to_something():
    timm_s = {"mix_ffn", "efficientformerv2", "efficientvit_mbconv", "fastvit_conv_ffn"}
    held = {"localvit"} | timm_s | set(DESIGNS)
    assert held == set(PRESETS)  # localvit: the authors' code and timm's, in test_feed_forward.py


def plain_path(name: str, weights: dict[str, Tensor], x: Tensor) -> Tensor:
    """Compute the class token by the point-wise layers of a design without norms: an ordinary MLP."""
    hidden = pw(weights, "fc1", x)
    if PRESETS[name].glu == "none":
        return pw(weights, "fc2", gelu(hidden))
    return pw(weights, "fc2", gelu(hidden[:, : HIDDEN * 2 // 3]) * hidden[:, HIDDEN * 2 // 3 :])


@pytest.mark.parametrize("name", PRESETS)
@torch.no_grad()
def test_prefix_tokens(name):
    """They do not change the patches; CeiT returns them, LocalViT's get nothing, the others an MLP."""
    ffn, x = make(PRESETS[name]).eval(), tokens(prefix=2)
    out = ffn(x, Grid(HEIGHT, WIDTH, 2))
    close(out[:, 2:], ffn(x[:, 2:], Grid(HEIGHT, WIDTH)))
    if name == "localvit":
        assert out[:, :2].abs().max() == 0
    elif name == "ceit_leff":
        assert torch.equal(out[:, :2], x[:, :2])
    elif PRESETS[name].norm == "none":
        prefix = x[:, :2].transpose(1, 2)[..., None]
        close(out[:, :2], as_tokens(plain_path(name, ffn.state_dict(), prefix)))
    else:
        path = [ffn.fc1, ffn.norm1, ffn.act1, ffn.fc2, ffn.norm3]
        if PRESETS[name].norm_order == "act-norm":
            path[1], path[2] = path[2], path[1]
        close(out[:, :2], as_tokens(nn.Sequential(*path)(x[:, :2].transpose(1, 2)[..., None])))


@pytest.mark.parametrize("name", ["conv_glu", "gdfn"])
def test_a_gated_linear_unit_keeps_the_parameters_of_the_point_wise_layers(name):
    ffn = make(PRESETS[name])
    assert ffn.fc1.weight.shape == (64, DIM, 1, 1)  # TransNeXt: int(2 * 48 / 3) = 32 for gate and value each
    assert ffn.fc2.weight.shape == (DIM, 32, 1, 1)
    assert ffn.conv.weight.shape[0] == {"conv_glu": 32, "gdfn": 64}[name]
    assert ffn.fc1.weight.numel() + ffn.fc2.weight.numel() == 2 * DIM * HIDDEN
    explicit = LocalityFeedForward(48, localvit.preset(name, expansion=2.66))  # Restormer's width at dim 48
    assert explicit.fc2.in_channels == 127
    assert LocalityFeedForward(48, PRESETS[name]).fc2.in_channels == 128


@pytest.mark.parametrize("name", PRESETS)
@pytest.mark.parametrize("depthwise", [True, False])
@torch.no_grad()
def test_scripts_compiles_and_exports_with_and_without_the_convolution(name, depthwise):
    changes = {} if depthwise else {"position": "mid", "kernel_size": 3, "inner_skip": False}
    ffn = make(localvit.preset(name, depthwise=depthwise, **changes)).eval()
    grid, x = Grid(HEIGHT, WIDTH, 1), tokens(prefix=1)
    want = ffn(x, grid)
    close(torch.jit.script(ffn)(x, grid), want)
    torch._dynamo.reset()
    close(torch.compile(ffn, fullgraph=True, backend="eager")(x, grid), want)
    close(torch.export.export(ffn, (x, grid), strict=False).module()(x, grid), want)


def test_a_preset_is_saved_as_plain_fields():
    for config in PRESETS.values():
        values = json.loads(json.dumps(config.to_dict()))
        assert LocalityConfig.from_dict(values) == config
        assert set(values) <= {f.name for f in dataclasses.fields(LocalityConfig)}


def test_a_preset_stands_among_the_fields_of_a_file():
    values = {"preset": "mix_ffn", "kernel_size": 5}
    assert LocalityConfig.from_dict(values) == localvit.preset("mix_ffn", kernel_size=5)
    with pytest.raises(ConfigError, match=r"the preset 3 does not exist"):
        LocalityConfig.from_dict({"preset": 3})


def test_a_preset_with_changes():
    assert localvit.preset("irffn") == PRESETS["irffn"]
    changed = localvit.preset("irffn", kernel_size=5, norm=["batch", "none", "none"])
    assert changed == dataclasses.replace(PRESETS["irffn"], kernel_size=5, norm=("batch", "none", "none"))
    with pytest.raises(TypeError):
        PRESETS["irffn"] = LocalityConfig()


@pytest.mark.parametrize(
    ("name", "changes", "named"),
    [
        ("mixffn", {}, ["'mixffn'", "did you mean 'mix_ffn'"]),
        ("peg", {}, ["'peg'", "accepted: localvit, ceit_leff"]),
        ("mix_ffn", {"kernel": 5}, ["'kernel'", "kernel_size"]),
        ("conv_glu", {"position": "first"}, ["position='first'", "glu='gate'"]),
        ("gdfn", {"init": "preserve"}, ["init='preserve'"]),
    ],
)
def test_bad_names_and_changes_are_named(name, changes, named):
    with pytest.raises(ConfigError) as error:
        localvit.preset(name, **changes)
    assert all(word in str(error.value) for word in named), str(error.value)
