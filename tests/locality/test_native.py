"""The native kernels against the plain formula in float64, and when they are chosen."""

import copy

import pytest
import torch
import torch.nn.functional as F
from localvit.locality.kernels import backend, native_ops
from torch import nn

from localvit import LocalityConfig

from .kernel_cases import (
    ACTS,
    as_map,
    check_backward,
    check_depthwise,
    check_slopes,
    check_variance_far_from_zero,
    close,
    tokens,
    vectors,
)
from .test_lean import GRID, check_step, feed_forward, run, spy
from .test_native_build import needs_compiler

pytestmark = needs_compiler

FLOAT = torch.float32
# Batch, height, width, channels, kernel, act, act2: lattices smaller than the kernel, widths that groups of
# columns do not divide, channels of one vector, of more than one block, and of a block and a rest.
SHAPES = [
    (1, 1, 1, 16, 3, 3, 0, FLOAT),
    (2, 5, 7, 48, 3, 3, 3, FLOAT),
    (2, 4, 5, 32, 3, 3, 1, FLOAT),
    (3, 4, 6, 272, 3, 2, 1, FLOAT),
    (2, 3, 12, 16, 5, 1, 2, FLOAT),
    (1, 2, 9, 32, 7, 0, 3, FLOAT),
    (1, 9, 3, 144, 7, 3, 2, FLOAT),
    (1, 40, 33, 64, 3, 3, 3, FLOAT),
    (2, 3, 200, 128, 3, 3, 3, FLOAT),
    (1, 2, 200, 80, 7, 1, 0, FLOAT),
]


@pytest.mark.parametrize("case", SHAPES, ids=str)
def test_depthwise_and_its_statistics(case):
    check_depthwise(native_ops, case)


def test_a_variance_far_from_zero_does_not_cancel():
    check_variance_far_from_zero(native_ops, 3)
    x = 1000 + 0.1 * torch.randn(2, 63, 16)
    mean, var = native_ops.moments(x)
    torch.testing.assert_close(var, x.double().var((0, 1), correction=0).float(), rtol=1e-3, atol=0)
    torch.testing.assert_close(mean, x.double().mean((0, 1)).float())


@pytest.mark.parametrize("act", [0, 1, 2, 3])
def test_slopes_at_corners_are_those_of_pytorch(act):
    check_slopes(native_ops, act, 16)


@pytest.mark.parametrize("case", SHAPES, ids=str)
def test_backward_through_gate_norms_and_convolution(case):
    check_backward(native_ops, case)


@pytest.mark.parametrize("case", SHAPES, ids=str)
def test_the_stage_of_inference_is_in_place(case):
    batch, height, width, channels, k, act, act2, dtype = case
    weight, none = torch.randn(channels, 1, k, k), torch.zeros(channels)
    for bias, shift, prefix in ((None, None, 0), (torch.randn(channels), torch.randn(channels), 2)):
        x = tokens(batch, prefix + height * width, channels, dtype)
        inner = ACTS[act](as_map(x[:, prefix:] + (none if shift is None else shift), height, width))
        outer = F.conv2d(inner, weight.double(), None, padding=k // 2, groups=channels)
        want = ACTS[act2](outer + (none if bias is None else bias)[:, None, None])
        y = x.clone()
        means = native_ops.depthwise_stage_(y, shift, weight, bias, [], height, width, act, act2)
        close(y[:, prefix:], want.flatten(2).transpose(1, 2), dtype)
        close(means, want.mean((2, 3)), dtype)
        assert torch.equal(y[:, :prefix], x[:, :prefix])


def squeeze_layers(channels: int, reduced: int) -> list[torch.Tensor]:
    shapes = (reduced, channels), (reduced,), (channels, reduced), (channels,)
    return [torch.randn(shape) / shape[-1] ** 0.5 for shape in shapes]


@pytest.mark.parametrize(
    ("batch", "height", "width", "channels", "reduced", "prefix"),
    [(1, 1, 1, 16, 1, 0), (3, 3, 11, 48, 4, 1), (2, 10, 7, 16, 37, 2), (1, 40, 33, 80, 4, 0)],
)
def test_squeeze_and_excitation(batch, height, width, channels, reduced, prefix):
    x, weight = torch.randn(batch, prefix + height * width, channels), torch.randn(channels, 1, 3, 3)
    layers = squeeze_layers(channels, reduced)
    y, z = x.clone(), x.clone()
    means = native_ops.depthwise_stage_(y, None, weight, None, [], height, width, 1, 0)
    first, bias, second, bias2 = (layer.double() for layer in layers)
    gate = (F.relu(means.double() @ first.t() + bias) @ second.t() + bias2).clamp(0, 1)
    assert gate.numel() < 20 or gate.unique().numel() > 2  # not only its ends
    gated_means = native_ops.depthwise_stage_(z, None, weight, None, layers, height, width, 1, 0)
    close(z[:, prefix:], y[:, prefix:] * gate[:, None], FLOAT)
    assert torch.equal(gated_means, means)
    assert torch.equal(z[:, :prefix], x[:, :prefix])


@pytest.mark.parametrize("act", [0, 1, 2, 3])
def test_steps_on_single_tokens(act):
    x, grad = torch.randn(2, 2, 37, 144)
    scale, shift, third, _ = vectors(144)
    gate = torch.rand(2, 144)
    value = ACTS[act](x.double() * scale + shift)
    close(native_ops.activated(x, scale, shift, gate, act), value * gate[:, None], FLOAT)
    close(native_ops.pooled(x, scale, shift, act), value.mean(1), FLOAT)
    weight = torch.randn(5, 144)
    projected = (value * gate[:, None]) @ weight.double().t()
    close(native_ops.gated_projection(x, scale, shift, gate, weight, act), projected, FLOAT)
    want = grad.double() * scale + x.double() * shift + third
    native_ops.combine_(grad, x, scale, shift, third)
    close(grad, want, FLOAT)


@pytest.mark.parametrize("batch", [1, 5, 12])
@pytest.mark.parametrize("threads", [2, 3, 11])
@pytest.mark.parametrize(("height", "width", "k"), [(3, 4, 3), (13, 5, 7), (30, 3, 5)])
def test_the_number_of_threads_changes_nothing(batch, threads, height, width, k):
    """An image that threads share, in parts of no row, of one and of more; kernels reach across them."""
    x, below, grad = torch.randn(3, batch, height * width, 272)
    weight, vector = torch.randn(272, 1, k, k), [torch.rand(272) for _ in range(9)]
    gate = [torch.rand(batch, 272) for _ in range(2)]
    layers = squeeze_layers(272, 4)

    def everything() -> list[torch.Tensor]:
        back = native_ops.depthwise_backward(
            grad.clone(), x, below, weight, gate, vector[:5], vector[5:], height, width, 3, 3
        )
        sums = native_ops.gate_sums(grad, x, *vector[:4], 3)
        gated = x.clone()
        means = native_ops.depthwise_stage_(gated, None, weight, None, layers, height, width, 3, 3)
        forward = native_ops.depthwise(x, weight, None, *vector[:2], height, width, 3)
        return [*forward, *back, sums, gated, means]

    torch.set_num_threads(1)
    one = everything()
    torch.set_num_threads(threads)
    torch.testing.assert_close(everything(), one, rtol=0, atol=0)


def test_not_a_number_stays_one():
    x = torch.zeros(1, 9, 16)
    x[0, 4, 3] = float("nan")
    for act in (1, 2, 3):
        y = x.clone()
        native_ops.depthwise_stage_(y, None, torch.ones(16, 1, 3, 3), None, [], 3, 3, act, act)
        assert y[0, :, 3].isnan().all()
        assert not y[0, :, 4].isnan().any()
    layers = [torch.zeros(4, 16), torch.zeros(4), torch.ones(16, 4), torch.zeros(16)]
    native_ops.depthwise_stage_(x, None, torch.ones(16, 1, 3, 3), None, layers, 3, 3, 0, 0)
    assert x.isnan().all()  # as 0 * nan is one


@pytest.mark.parametrize(
    "x", [torch.zeros(1, 32, 9).mT, torch.zeros(1, 9, 32).double()], ids=["gaps", "float64"]
)
def test_other_tensors_are_an_error_before_memory_is_touched(x):
    with pytest.raises(ValueError, match=r"moments: torch.float.* is not accepted \(accepted: dense float32"):
        native_ops.moments(x)


def test_a_lattice_of_more_tokens_than_there_are_is_an_error():
    with pytest.raises(ValueError, match="12 tokens for a lattice of 3 x 5"):
        native_ops.depthwise_stage_(
            torch.zeros(1, 12, 16), None, torch.ones(16, 1, 3, 3), None, [], 3, 5, 0, 0
        )


def test_operators_are_registered_with_their_shapes():
    x, weight = torch.randn(2, 12, 16), torch.randn(16, 1, 3, 3)
    for vector, gate in ((None, []), (torch.randn(16), squeeze_layers(16, 4))):
        arguments = (x, vector, weight, vector, gate, 3, 4, 3, 3)
        torch.library.opcheck(
            native_ops.depthwise_stage_, arguments, test_utils=("test_schema", "test_faketensor")
        )


def depthwise_conv(**changes) -> nn.Conv2d:
    return nn.Conv2d(
        **{"in_channels": 16, "out_channels": 16, "kernel_size": 3, "padding": 1, "groups": 16} | changes
    )


@pytest.mark.parametrize(
    ("changes", "covered"),
    [
        ({}, True),
        ({"kernel_size": 7, "padding": 3, "bias": False}, True),
        ({"kernel_size": 1, "padding": 0}, False),
        ({"kernel_size": 9, "padding": 4}, False),
        ({"kernel_size": (3, 5), "padding": (1, 2)}, False),
        ({"padding": 0}, False),
        ({"stride": 2}, False),
        ({"dilation": 2, "padding": 2}, False),
        ({"groups": 8}, False),
        ({"padding_mode": "circular"}, False),
        ({"in_channels": 24, "out_channels": 24, "groups": 24}, False),
        ({"out_channels": 32}, False),
    ],
    ids=str,
)
def test_convolutions_that_are_covered(changes, covered):
    assert native_ops.covers_convolution(depthwise_conv(**changes)) is covered


def test_a_subclass_of_a_convolution_is_not_covered():
    class Other(nn.Conv2d):
        pass

    assert not native_ops.covers_convolution(Other(16, 16, 3, padding=1, groups=16))


CONFIGS = [
    LocalityConfig(),
    LocalityConfig(gate="eca", activation="relu6", prefix="passthrough", kernel_size=5, bias=True),
    LocalityConfig(gate="none", activation=("none", "relu"), norm=("batch", "batch", "none"), kernel_size=7),
    LocalityConfig(norm=("batch", "batch", "none"), bias=(False, False, True)),
    LocalityConfig(gate="eca_hard", activation=("relu6", "none"), bias=(True, False, True)),
]


@pytest.mark.parametrize("config", CONFIGS, ids=str)
def test_a_training_step_equals_the_plain_modules(monkeypatch, config):
    ffn, x = feed_forward(config, dim=16).float(), torch.randn(3, 14, 16, requires_grad=True)
    check_step(monkeypatch, ffn, x, "NativeSteps")


def test_frozen_parameters_get_no_gradient(monkeypatch):
    ffn, x = feed_forward(dim=16).float(), torch.randn(3, 14, 16)
    for layer in (ffn.conv, ffn.norm2, ffn.fc1):
        layer.requires_grad_(False)
    used = spy(monkeypatch)
    fast = run(ffn, x)
    assert used == ["NativeSteps"]
    assert not {"tokens", "conv.weight", "norm2.bias", "fc1.weight"} & fast.keys()
    monkeypatch.setenv("LOCALVIT_PLAIN", "1")
    torch.testing.assert_close(fast, run(ffn, x), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(
    ("config", "dim", "dtype"),
    [
        (LocalityConfig(), 16, torch.float64),
        (LocalityConfig(), 6, FLOAT),
        (LocalityConfig(kernel_size=1), 16, FLOAT),
        (LocalityConfig(activation="silu"), 16, FLOAT),
        (LocalityConfig(activation="gelu"), 16, FLOAT),
        (LocalityConfig(norm="none"), 16, FLOAT),
        (LocalityConfig(prefix="mlp"), 16, FLOAT),
    ],
    ids=str,
)
def test_other_designs_keep_pytorchs_operators(monkeypatch, config, dim, dtype):
    used = spy(monkeypatch)
    feed_forward(config, dim).to(dtype)(torch.randn(2, 14, dim, dtype=dtype), GRID)
    assert used == ["Steps"]


def test_statistics_that_are_constants_keep_pytorchs_operators(monkeypatch):
    used = spy(monkeypatch)
    feed_forward(dim=16).float().eval()(torch.randn(2, 14, 16, requires_grad=True), GRID)
    assert used == ["Steps"]


def test_autocast_keeps_pytorchs_operators(monkeypatch):
    used = spy(monkeypatch)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        feed_forward(dim=16).float()(torch.randn(2, 14, 16), GRID)
    assert used == ["Steps"]


def test_weights_in_channels_last_memory(monkeypatch):
    ffn, x = feed_forward(dim=16).float(), torch.randn(3, 14, 16, requires_grad=True)
    want = run(ffn, x)
    used = spy(monkeypatch)
    torch.testing.assert_close(run(copy.deepcopy(ffn).to(memory_format=torch.channels_last), x), want)
    assert used == ["NativeSteps"]


# --- which kernels -----------------------------------------------------------------------------------------


def test_the_environment_chooses(monkeypatch):
    x = torch.zeros(1)
    for asked, chosen in {"": "native", "native": "native", "torch": "torch"}.items():
        monkeypatch.setenv("LOCALVIT_KERNELS", asked)
        assert backend.backend_for(x) == chosen
        assert backend.backend_for(x.double()) == "torch"
    monkeypatch.setenv("LOCALVIT_KERNELS", "cuda")
    with pytest.raises(ValueError, match=r"LOCALVIT_KERNELS='cuda'.*native, triton, torch"):
        backend.backend_for(x)


def test_elsewhere_than_on_a_cpu(monkeypatch):
    x = torch.zeros(1, device="meta")
    monkeypatch.setattr(backend, "_warned", set())
    assert backend.backend_for(x) == "torch"
    monkeypatch.setenv("LOCALVIT_KERNELS", "native")
    with pytest.warns(RuntimeWarning, match="LOCALVIT_KERNELS=native has no effect: the tensors are on meta"):
        assert backend.backend_for(x) == "torch"
    assert backend.backend_for(x) == "torch"  # a warning would be an error


def test_an_image_does_not_see_its_neighbours():
    both, weight = torch.randn(2, 12, 64), torch.randn(64, 1, 3, 3)
    first = both[:1].clone()
    for x in (both, first):
        native_ops.depthwise_stage_(x, None, weight, None, [], 3, 4, 3, 3)
    assert torch.equal(both[:1], first)
