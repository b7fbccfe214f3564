import pytest
import torch
from hypothesis import given, settings, strategies as st
from timm.models._efficientnet_blocks import InvertedResidual, SqueezeExcite as TimmSqueezeExcite
from torch import nn

from localvit import ConfigError, Grid, LocalityConfig, LocalityFeedForward
from localvit.locality.feed_forward import HiddenLocality
from localvit.models.published import reference_layers

from .. import golden
from ..reference.feed_forward import feed_forward, taps


def random_weights(module: nn.Module) -> None:
    """Random parameters and statistics, so that no layer is at a value that hides it."""
    with torch.no_grad():
        for name, tensor in module.state_dict().items():
            if tensor.is_floating_point():
                tensor.normal_().mul_(0.5)
            if name.endswith("running_var"):
                tensor.abs_().add_(0.5)


def test_by_hand():
    """Two channels, a 2 x 3 grid, one prefix token: expand by identity, sum over neighbours, project."""
    config = LocalityConfig(
        kernel_size=3, activation="none", gate="none", expansion=1, norm="none", prefix="identity"
    )
    ffn = LocalityFeedForward(2, config)
    with torch.no_grad():
        ffn.fc1.weight.copy_(torch.eye(2)[:, :, None, None])
        ffn.fc2.weight.copy_(torch.tensor([[1.0, 0.0], [0.0, 10.0]])[:, :, None, None])
        ffn.conv.weight.zero_()
        ffn.conv.weight[0, 0, 1, 0] = 1  # channel 0: the left neighbour
        ffn.conv.weight[1, 0, 0, 1] = 1  # channel 1: the neighbour above
    tokens = torch.tensor([[[9, 9], [1, 1], [2, 2], [3, 3], [4, 4], [5, 5], [6, 6]]], dtype=torch.float32)
    expected = [[9, 9], [0, 0], [1, 0], [2, 0], [0, 10], [4, 20], [5, 30]]
    assert ffn(tokens, Grid(2, 3, 1))[0].tolist() == expected


@st.composite
def configurations(draw) -> LocalityConfig:
    depthwise = draw(st.booleans())
    gate = draw(st.sampled_from(["none", "se", "eca", "eca_hard"]))
    glu = draw(st.sampled_from(["none", "none", "gate", "both"]))
    act = st.sampled_from(["none", "relu", "relu6", "hardswish", "gelu", "gelu_tanh", "silu"])
    norm = st.sampled_from(["none", "batch", "layer", "group"])
    return LocalityConfig(
        depthwise=depthwise,
        kernel_size=draw(st.sampled_from([1, 3, 5])) if depthwise else 3,
        position=draw(st.sampled_from(["mid", "first"])) if depthwise and glu == "none" else "mid",
        inner_skip=draw(st.booleans()) if depthwise else None,
        activation=draw(st.one_of(act, st.tuples(act, act)) if glu == "none" else act),
        glu=glu,
        gate=gate,
        gate_width=draw(st.integers(1, 5)) if gate == "se" else None,
        expansion=draw(st.sampled_from([1, 2, 3])),
        norm=draw(st.one_of(norm, st.tuples(norm, norm, norm))),
        norm_groups=4,
        norm_order=draw(st.sampled_from(["norm-act", "act-norm"])) if glu == "none" else "norm-act",
        bias=draw(st.one_of(st.booleans(), st.tuples(*[st.booleans()] * 3))),
        prefix=draw(st.sampled_from(["skip", "pointwise", "identity"])),
    )


@settings(deadline=None, max_examples=150)
@given(
    config=configurations(),
    height=st.integers(1, 4),
    width=st.integers(1, 4),
    prefix=st.integers(0, 2),
    seed=st.integers(0, 2**16),
)
def test_equals_the_plain_reference(config, height, width, prefix, seed):
    torch.manual_seed(seed)
    ffn = LocalityFeedForward(8, config).double().eval()
    random_weights(ffn)
    tokens = torch.randn(2, prefix + height * width, 8, dtype=torch.float64)
    with torch.no_grad():
        got = ffn(tokens, Grid(height, width, prefix))
    want = feed_forward(ffn.state_dict(), config, tokens, height, width, prefix)
    torch.testing.assert_close(got, want, rtol=1e-9, atol=1e-10)


def golden_cases() -> list[str]:
    return [name for name, case in golden.facts("feedforward")["cases"].items() if "error" not in case]


def golden_config(constructor: dict) -> LocalityConfig:
    """Translate the reference's constructor arguments (golden facts: the activation string decides)."""
    act, depthwise = constructor["act"], not constructor["wo_dp_conv"]
    gate = {"se": "se", "eca": "eca", "ecah": "eca_hard"}.get(act.partition("+")[2], "none")
    return LocalityConfig(
        depthwise=depthwise,
        position="first" if constructor["dp_first"] and depthwise else "mid",
        activation="hardswish" if "hs" in act else "relu6",
        gate=gate,
        gate_reduction=constructor["reduction"] if gate == "se" else None,
        expansion=constructor["expand_ratio"],
    )


def from_reference(weights: dict, config: LocalityConfig, prefix: str = "conv") -> dict:
    """Reference weights of one feed-forward network under our names."""
    own = {}
    for position, layer in reference_layers(config).items():
        for key, value in weights.items():
            if key.rpartition(".")[0] in (f"{prefix}.{position}", f"{prefix}.{position}.conv"):
                name = f"{layer}.conv" if key.rpartition(".")[0].endswith(".conv") else layer
                is_linear = value.ndim == 2
                own[f"{name}.{key.rpartition('.')[2]}"] = value[..., None, None] if is_linear else value
    return own


@pytest.mark.parametrize("name", golden_cases())
def test_equals_the_authors_code(name):
    case, want = golden.facts("feedforward")["cases"][name], golden.arrays("feedforward")
    config = golden_config(case["constructor"])
    ffn = LocalityFeedForward(24, config).double()
    ffn.load_state_dict(from_reference(golden.filled(case["keys"]), config))
    image = 3.0 * torch.from_numpy(golden.noise("feedforward.input", (2, 24, 6, 6), 0))
    cotangent = torch.from_numpy(golden.noise("feedforward.cotangent", (2, 24, 6, 6), 0))
    tokens = image.flatten(2).transpose(1, 2).contiguous().requires_grad_()

    def run() -> torch.Tensor:  # the authors' module adds its input itself
        return (tokens + ffn(tokens, Grid(6, 6))).transpose(1, 2).unflatten(2, (6, 6))

    def close(got: torch.Tensor, key: str) -> None:
        sampled = golden.tap(got.detach().numpy(), count=257)
        torch.testing.assert_close(sampled, want[f"{name}/{key}"], rtol=0, atol=1e-10)

    close(
        ffn.eval().requires_grad_(False)(tokens, Grid(6, 6)).transpose(1, 2).unflatten(2, (6, 6)) + image,
        "eval",
    )
    ffn.train().requires_grad_(True)
    out = run()
    close(out, "train")
    (gradient,) = torch.autograd.grad((out * cotangent).sum(), tokens)
    close(gradient.transpose(1, 2).unflatten(2, (6, 6)), "grad_x")
    inverse = {f"conv.{p}": ours for p, ours in reference_layers(config).items()}
    state = ffn.state_dict()
    statistics = [state[inverse[k.rpartition(".")[0]] + "." + k.rpartition(".")[2]] for k in case["bn_order"]]
    torch.testing.assert_close(torch.cat(statistics).numpy(), want[f"{name}/bn"], rtol=0, atol=1e-10)


def test_all_runnable_golden_cases_are_covered():
    assert len(golden_cases()) == 50


@pytest.mark.parametrize("reduction", [4, 192])
@pytest.mark.parametrize("training", [False, True])
def test_equals_timm_s_inverted_residual(reduction, training):
    ffn = LocalityFeedForward(192, LocalityConfig(gate_reduction=reduction)).double().train(training)
    random_weights(ffn)

    def gate(channels: int, **_: object) -> nn.Module:
        return TimmSqueezeExcite(
            channels,
            rd_ratio=1 / reduction,
            rd_round_fn=round,
            force_act_layer=nn.ReLU,
            gate_layer=nn.Hardsigmoid,
        )

    theirs = InvertedResidual(192, 192, exp_ratio=4, act_layer=nn.Hardswish, se_layer=gate).double()
    names = {
        "conv_pw": "fc1",
        "bn1": "norm1",
        "conv_dw": "conv",
        "bn2": "norm2",
        "se.conv_reduce": "gate.fc1",
        "se.conv_expand": "gate.fc2",
        "conv_pwl": "fc2",
        "bn3": "norm3",
    }
    own = ffn.state_dict()
    theirs.load_state_dict(
        {
            f"{t}.{k.rpartition('.')[2]}": own[k]
            for k in own
            for t, o in names.items()
            if k.rpartition(".")[0] == o
        }
    )
    theirs.train(training)
    tokens = torch.randn(2, 35, 192, dtype=torch.float64)
    want = theirs(tokens.transpose(1, 2).unflatten(2, (5, 7))).flatten(2).transpose(1, 2)
    torch.testing.assert_close(tokens + ffn(tokens, Grid(5, 7)), want, rtol=0, atol=1e-9)


@settings(deadline=None, max_examples=25)
@given(seed=st.integers(0, 2**16), kernel_size=st.sampled_from([1, 3, 5]))
def test_shifting_the_input_shifts_the_output_away_from_borders(seed, kernel_size):
    torch.manual_seed(seed)
    ffn = LocalityFeedForward(6, LocalityConfig(gate="none", kernel_size=kernel_size)).double().eval()
    random_weights(ffn)
    image = torch.randn(1, 10, 10, 6, dtype=torch.float64)
    tokens, shifted = (x.reshape(1, 100, 6) for x in (image, image.roll((1, 1), (1, 2))))
    with torch.no_grad():
        a, b = (ffn(x, Grid(10, 10)).reshape(10, 10, 6) for x in (tokens, shifted))
    m = kernel_size // 2 + 1
    torch.testing.assert_close(b[m:-m, m:-m], a[m - 1 : -m - 1, m - 1 : -m - 1])


@pytest.mark.parametrize("prefix", ["skip", "pointwise", "identity"])
def test_prefix_tokens_do_not_mix_with_patches(prefix):
    ffn = LocalityFeedForward(8, LocalityConfig(prefix=prefix)).eval()
    random_weights(ffn)
    tokens = torch.randn(1, 2 + 12, 8)
    other = tokens.clone()
    other[:, :2] += 1
    with torch.no_grad():
        a, b = ffn(tokens, Grid(3, 4, 2)), ffn(other, Grid(3, 4, 2))
    assert torch.equal(a[:, 2:], b[:, 2:])
    if prefix == "skip":
        assert a[:, :2].abs().max() == 0
    else:
        assert not torch.equal(a[:, :2], b[:, :2])


def test_a_wrong_number_of_tokens_is_an_error_that_says_both():
    with pytest.raises(AssertionError, match=r"13 tokens, 1 of them.*12 patch tokens.*2 x 5 = 10"):
        LocalityFeedForward(8)(torch.randn(1, 13, 8), Grid(2, 5, 1))


def test_without_a_grid_it_does_not_guess():
    with pytest.raises(RuntimeError, match="does not know the grid"):
        LocalityFeedForward(8)(torch.randn(1, 16, 8))


@pytest.mark.parametrize(
    ("config", "named"),
    [
        (LocalityConfig(gate_reduction=100), ["gate_reduction", "100", "32"]),
        (LocalityConfig(norm="group", norm_groups=5), ["norm_groups", "5", "32"]),
        (LocalityConfig(expansion=0.1), ["expansion", "0.1", "8"]),
        (LocalityConfig(init="preserve"), ["preserve", "paper"]),
    ],
)
def test_widths_that_do_not_work_out_are_errors(config, named):
    with pytest.raises(ConfigError) as error:
        LocalityFeedForward(8, config)
    assert all(word in str(error.value) for word in named), str(error.value)


def test_initial_values_are_the_reference_s():
    ffn = LocalityFeedForward(192, LocalityConfig(gate_reduction=4))
    assert 0.018 < ffn.gate.fc1.weight.std() < 0.022
    assert ffn.gate.fc1.bias.abs().max() == 0
    assert ffn.fc1.weight.abs().max() <= 192**-0.5
    assert ffn.fc1.weight.abs().max() > 0.9 * 192**-0.5
    assert ffn.conv.weight.abs().max() <= 1 / 3
    assert ffn.norm3.weight.min() == 1


def test_hidden_locality_is_a_no_op_that_learns():
    layer = HiddenLocality(8, nn.Identity(), LocalityConfig(init="preserve"))
    hidden = torch.randn(2, 1 + 12, 8)
    out = layer(hidden, Grid(3, 4, 1))
    assert torch.equal(out, hidden)
    (out[:, 1:] ** 2).sum().backward()
    assert (layer.conv.weight.grad != 0).all()
    with pytest.raises(ConfigError, match="preserve"):
        HiddenLocality(8, nn.Identity(), LocalityConfig())


def test_hidden_locality_with_a_kernel_equals_thetaps():
    layer = HiddenLocality(8, nn.Identity(), LocalityConfig(init="preserve", kernel_size=5)).double()
    random_weights(layer)
    hidden = torch.randn(2, 2 + 12, 8, dtype=torch.float64)
    want = torch.cat([hidden[:, :2], hidden[:, 2:] + taps(hidden[:, 2:], layer.conv.weight, None, 4, 3)], 1)
    torch.testing.assert_close(layer(hidden, Grid(4, 3, 2)), want)
