"""The Triton kernels in Triton's interpreter, against the plain formula in float64.

Run by test_triton.py in a process of its own: Triton decides at import whether it interprets.
"""

import itertools

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from localvit import Grid, LocalityConfig
from localvit.locality.kernels import triton_ops
from localvit.locality.kernels.lean import _LeanPass

from .test_lean import feed_forward, run

ACTS = {0: lambda x: x, 1: F.relu, 2: F.relu6, 3: F.hardswish, 4: F.silu}
TOLERANCE = {torch.float32: 2e-5, torch.float16: 4e-3, torch.bfloat16: 3e-2}
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


def vectors(*shape: int) -> list[Tensor]:
    return [torch.randn(*shape) * 0.5 + 0.3 for _ in range(4)]


def tokens(batch: int, n: int, channels: int, dtype: torch.dtype, gap: int = 0) -> Tensor:
    """Tokens as a slice, with ``gap`` tokens of something else in front of each image."""
    x = torch.randn(batch, gap + n, channels).to(dtype)
    x[:, :gap] = float("nan")
    return x[:, gap:]


def as_map(x: Tensor, height: int, width: int) -> Tensor:
    return x.double().transpose(1, 2).unflatten(2, (height, width))


def close(got: Tensor, want: Tensor, dtype: torch.dtype) -> None:
    want = want.detach().to(torch.float64)
    assert got.shape == want.shape
    error = (got.double() - want).abs().max()
    assert error <= TOLERANCE[dtype] * (1 + want.abs().max()), float(error)


def per_channel(v: Tensor) -> Tensor:
    return v.double()[:, None, None]


@pytest.mark.parametrize("case", SHAPES, ids=str)
def test_depthwise_and_its_statistics(case, monkeypatch):
    *case, enough = case
    batch, height, width, channels, k, act, act2, dtype = case
    monkeypatch.setattr(triton_ops, "_ENOUGH", enough)
    x = tokens(batch, height * width, channels, dtype, gap=1)
    weight, bias = torch.randn(channels, 1, k, k).to(dtype), torch.randn(channels)
    scale, shift, scale2, shift2 = vectors(channels)
    inner = ACTS[act](as_map(x, height, width) * per_channel(scale) + per_channel(shift))
    for offset in (None, bias):
        want = F.conv2d(
            inner,
            weight.double(),
            None if offset is None else offset.double(),
            padding=k // 2,
            groups=channels,
        )
        y, mean, var = triton_ops.depthwise(x, weight, offset, scale, shift, height, width, act)
        close(y, want.flatten(2).transpose(1, 2), dtype)
        close(mean, want.mean((0, 2, 3)), dtype)
        close(var, want.var((0, 2, 3), correction=0), dtype)
    want = ACTS[act2](want * per_channel(scale2) + per_channel(shift2))
    y, pooled = triton_ops.depthwise_inference(
        x, weight, bias, scale, shift, scale2, shift2, height, width, act, act2
    )
    close(y, want.flatten(2).transpose(1, 2), dtype)
    close(pooled, want.mean((2, 3)), dtype)


def test_a_variance_far_from_zero_does_not_cancel():
    """Mean 1000, deviation 0.1: a sum of squares in float32 would lose all of it."""
    x = 1000 + 0.1 * torch.randn(1, 63, 16)
    one = torch.ones(16)
    *_, var = triton_ops.depthwise(x, torch.ones(16, 1, 1, 1), None, one, 0 * one, 9, 7, 0)
    torch.testing.assert_close(var, x.double().var((0, 1), correction=0).float(), rtol=1e-3, atol=0)


@pytest.mark.parametrize("act", ACTS)
def test_slopes_at_corners_are_those_of_pytorch(act):
    x = torch.tensor([-7.0, -3.0, 0.0, 3.0, 6.0, 7.0], requires_grad=True)
    one, zero = torch.ones(1), torch.zeros(1)
    maps = x.detach()[:, None, None]  # an image of one pixel for each
    sums = triton_ops.gate_sums(torch.ones_like(maps), maps, one, zero, zero, one, act)
    ACTS[act](x).sum().backward()
    torch.testing.assert_close(sums[1, :, 0], x.grad)


@pytest.mark.parametrize("case", SHAPES, ids=str)
def test_backward_through_gate_norms_and_convolution(case, monkeypatch):
    """All of it against autograd in float64: gate sums, norm 2, the convolution and norm 1's sums."""
    *case, enough = case
    batch, height, width, channels, k, act, act2, dtype = case
    monkeypatch.setattr(triton_ops, "_ENOUGH", enough)
    count = height * width
    below, grad = tokens(batch, count, channels, dtype), tokens(batch, count, channels, dtype, gap=2)
    weight = torch.randn(channels, 1, k, k).to(dtype)
    scale, shift, mean, deviation = vectors(channels)
    weight2, bias2, mean2, _ = vectors(channels)
    deviation2, gate = torch.rand(channels) + 0.5, torch.rand(batch, channels)
    x = tokens(batch, count, channels, dtype)
    term, by_x, rest = torch.randn(batch, channels), *torch.randn(2, channels)

    convolved = as_map(x, height, width).requires_grad_()
    normal = (convolved - per_channel(mean2)) * per_channel(deviation2)
    value = ACTS[act2](normal * per_channel(weight2) + per_channel(bias2))
    upward = as_map(grad, height, width)
    scale2 = weight2 * deviation2
    affine2 = (scale2, bias2 - mean2 * scale2)
    sums = triton_ops.gate_sums(grad, x, *affine2, mean2, deviation2, act2)
    close(sums[0], (upward * value).sum((2, 3)), dtype)
    inward = upward * gate.double()[:, :, None, None] + term.double()[:, :, None, None]
    (of_value,) = torch.autograd.grad(value, convolved, inward)
    of_normal = of_value / per_channel(scale2)  # in front of act2
    close((gate * sums[1] + term * sums[2]), of_normal.sum((2, 3)), dtype)
    close((gate * sums[3] + term * sums[4]), (of_normal * normal).sum((2, 3)), dtype)

    by_grad = vectors(channels)[0]
    outward = of_normal * per_channel(by_grad) + convolved.detach() * per_channel(by_x) + per_channel(rest)
    lower = (as_map(below, height, width) * per_channel(scale) + per_channel(shift)).requires_grad_()
    kernel = weight.double().requires_grad_()
    y = F.conv2d(ACTS[act](lower), kernel, padding=k // 2, groups=channels)
    want, of_kernel = torch.autograd.grad(y, (lower, kernel), outward)
    out, of_norm, of_weight = triton_ops.depthwise_backward(
        grad, x, below, weight, [gate, term], [*affine2, by_grad, by_x, rest],
        [scale, shift, mean, deviation], height, width, act, act2,
    )  # fmt: skip
    close(out, want.flatten(2).transpose(1, 2), dtype)
    close(of_weight, of_kernel, dtype)
    standard = (as_map(below, height, width) - per_channel(mean)) * per_channel(deviation)
    close(of_norm, torch.stack([want.sum((0, 2, 3)), (want * standard).sum((0, 2, 3))]), dtype)


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
    monkeypatch.setenv("LOCALVIT_PLAIN", "1")
    plain = run(ffn, x)
    monkeypatch.setenv("LOCALVIT_PLAIN", "0")
    monkeypatch.setenv("LOCALVIT_KERNELS", "triton")
    used = []
    monkeypatch.setattr(_LeanPass, "apply", spy(_LeanPass.apply, used))
    fast = run(ffn, x)
    assert used == ["TritonSteps"]
    assert fast.keys() == plain.keys()
    torch.testing.assert_close(fast, plain, rtol=1e-4, atol=1e-4)


def spy(apply, used: list[str]):
    def wrapped(x, how, *parameters):
        used.append(how.form.__name__)
        return apply(x, how, *parameters)

    return wrapped


@pytest.mark.parametrize(
    "config",
    [LocalityConfig(prefix="mlp"), LocalityConfig(activation="gelu"), LocalityConfig(norm="none")],
    ids=str,
)
def test_other_designs_keep_the_lean_pass(monkeypatch, config):
    monkeypatch.setenv("LOCALVIT_KERNELS", "triton")
    used = []
    monkeypatch.setattr(_LeanPass, "apply", spy(_LeanPass.apply, used))
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
