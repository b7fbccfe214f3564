"""The Triton kernels in Triton's interpreter, against the plain formula in float64.

Run by test_triton.py in a process of its own: Triton decides at import whether it interprets.
"""

import itertools

import pytest
import torch
import torch.nn.functional as F

from localvit import Grid, LocalityConfig
from localvit.locality.kernels import triton_ops

from .kernel_cases import (
    ACTS,
    TOLERANCE,
    as_map,
    check_backward,
    check_depthwise,
    check_slopes,
    check_variance_far_from_zero,
    close,
    per_channel,
    tokens,
    vectors,
)
from .test_lean import check_step, feed_forward, spy

# Batch, height, width, channels, kernel, act, act2, data type, and programs that are enough (so that one
# program has one tile of 32 tokens, all tiles of its image, or two of three).
SHAPES = [
    (1, 1, 1, 1, 3, 3, 0, torch.float32, 512),
    (1, 5, 7, 17, 3, 3, 3, torch.float32, 1),
    (2, 3, 12, 66, 3, 4, 1, torch.float32, 512),
    (2, 3, 5, 16, 1, 1, 2, torch.float32, 512),
    (2, 6, 6, 20, 3, 2, 4, torch.bfloat16, 1),
    (1, 3, 4, 8, 5, 3, 3, torch.float16, 512),
    (1, 2, 40, 3, 3, 0, 3, torch.float32, 2),
]


@pytest.mark.parametrize("case", SHAPES, ids=str)
def test_depthwise_and_its_statistics(case, monkeypatch):
    *case, enough = case
    batch, height, width, channels, k, act, act2, dtype = case
    monkeypatch.setattr(triton_ops, "_ENOUGH", enough)
    check_depthwise(triton_ops, case, gap=1)

    x = tokens(batch, height * width, channels, dtype, gap=1)
    weight, bias = torch.randn(channels, 1, k, k).to(dtype), torch.randn(channels)
    scale, shift, scale2, shift2 = vectors(channels)
    inner = ACTS[act](as_map(x, height, width) * per_channel(scale) + per_channel(shift))
    y = F.conv2d(inner, weight.double(), bias.double(), padding=k // 2, groups=channels)
    want = ACTS[act2](y * per_channel(scale2) + per_channel(shift2))
    y, pooled = triton_ops.depthwise_inference(
        x, weight, bias, scale, shift, scale2, shift2, height, width, act, act2
    )
    close(y, want.flatten(2).transpose(1, 2), dtype)
    close(pooled, want.mean((2, 3)), dtype)


def test_a_variance_far_from_zero_does_not_cancel():
    check_variance_far_from_zero(triton_ops, 1)


@pytest.mark.parametrize("act", ACTS)
def test_slopes_at_corners_are_those_of_pytorch(act):
    check_slopes(triton_ops, act, 1)


@pytest.mark.parametrize("case", SHAPES, ids=str)
def test_backward_through_gate_norms_and_convolution(case, monkeypatch):
    *case, enough = case
    monkeypatch.setattr(triton_ops, "_ENOUGH", enough)
    check_backward(triton_ops, case, gap=2)


@pytest.mark.parametrize(("batch", "count", "channels", "width"), [(1, 1, 1, 1), (3, 35, 70, 17)])
@pytest.mark.parametrize(("dtype", "act"), [*zip(TOLERANCE, (3, 2, 4), strict=True)])
def test_gated_projection(batch, count, channels, width, dtype, act):
    x = tokens(batch, count, channels, dtype)
    weight, gate = torch.randn(width, channels).to(dtype), torch.rand(batch, channels)
    scale, shift, *_ = vectors(channels)
    value = ACTS[act](x.double() * scale + shift) * gate.double()[:, None]
    out = triton_ops.gated_projection(x, scale, shift, gate, weight, act)
    close(out, value.to(dtype).double() @ weight.double().t(), dtype)


def test_maps_with_gaps_along_the_channels_are_an_error():
    x = torch.randn(2, 6, 16)[:, :, ::2]
    with pytest.raises(ValueError, match="dense along N and D"):
        triton_ops.gate_sums(x, x, *vectors(8), 3)


CONFIGS = [
    LocalityConfig(),
    LocalityConfig(gate="eca", activation="relu6", prefix="passthrough", kernel_size=5, bias=True),
    LocalityConfig(gate="none", activation=("silu", "relu"), norm=("batch", "batch", "none")),
    LocalityConfig(gate="none", activation=("none", "relu6"), bias=True),
]


@pytest.mark.parametrize("config", CONFIGS, ids=str)
def test_a_training_step_equals_the_plain_modules(monkeypatch, config):
    ffn, x = feed_forward(config).float(), torch.randn(3, 14, 6, requires_grad=True)
    monkeypatch.setenv("LOCALVIT_KERNELS", "triton")
    check_step(monkeypatch, ffn, x, "TritonSteps")


@pytest.mark.parametrize(
    "config",
    [LocalityConfig(prefix="mlp"), LocalityConfig(activation="gelu"), LocalityConfig(norm="none")],
    ids=str,
)
def test_other_designs_keep_the_lean_pass(monkeypatch, config):
    monkeypatch.setenv("LOCALVIT_KERNELS", "triton")
    used = spy(monkeypatch)
    feed_forward(config).float()(torch.randn(2, 14, 6), Grid(3, 4, 2))
    assert used == ["Steps"]


def test_operators_are_registered_with_their_shapes():
    x, weight = torch.randn(2, 12, 16), torch.randn(16, 1, 1, 1)
    a, b, c, d = vectors(16)
    gate = torch.rand(2, 16)
    tests = ("test_schema", "test_faketensor")
    calls = {
        torch.ops.localvit.depthwise: (x, weight, None, a, b, 3, 4, 3),
        torch.ops.localvit.depthwise_inference: (x, weight, a, a, b, c, d, 3, 4, 3, 2),
        torch.ops.localvit.gate_sums: (x, x, a, b, c, d, 3),
        torch.ops.localvit.depthwise_backward: (
            x, x, x, weight, [gate, gate], [a, b, c, d, a], [a, b, c, d], 3, 4, 3, 3,
        ),
        torch.ops.localvit.gated_projection: (x, a, b, gate, torch.randn(5, 16), 3),
    }  # fmt: skip
    for operator, arguments in calls.items():
        torch.library.opcheck(operator.default, arguments, test_utils=tests)
        outputs = itertools.chain(operator(*arguments) for _ in range(2))
        torch.testing.assert_close(*outputs, rtol=0, atol=0)
