"""Changes between a native forward pass and its backward pass, and memory of the gradients."""

import subprocess
import sys
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn
from torch.autograd.graph import saved_tensors_hooks
from torch.utils.checkpoint import checkpoint

from localvit import Grid, LocalityConfig, LocalityFeedForward
from localvit.acceleration.dispatch import training_form
from localvit.acceleration.kernels import VARIABLE
from localvit.acceleration.native.mix import mixed

from .steps import GRID, assert_close, assigned, feed_forward, images, plain_step, spy, step
from .test_build import needs_compiler

pytestmark = needs_compiler


class Own(Tensor):
    pass


@pytest.mark.parametrize(
    ("pack", "unpack"),
    [
        (lambda t: t.transpose(0, -1).contiguous(), lambda t: t.transpose(0, -1)),
        (lambda t: t.double(), lambda t: t.float()),
        (lambda t: t.detach(), lambda t: t.as_subclass(Own)),
        (lambda t: torch.stack([t, t], -1), lambda t: t[..., 0]),
    ],
    ids=["transposed", "converted", "subclass", "strided"],
)
@pytest.mark.parametrize("checkpointing", [False, True])
def test_hooks_may_give_saved_tensors_another_layout(monkeypatch, pack, unpack, checkpointing):
    """They may return any tensor with the same values. Checkpointing allows to read each of them once."""
    ffn, tokens = feed_forward(), images()
    used = spy(monkeypatch)

    def hooked(ffn, tokens, grid):
        with saved_tensors_hooks(pack, unpack):
            return ffn(tokens, grid)

    def call(*arguments):
        return checkpoint(hooked, *arguments, use_reentrant=False) if checkpointing else hooked(*arguments)

    got = step(ffn, tokens, call)
    assert set(used) == {"native"}
    assert_close(got, plain_step(monkeypatch, ffn, tokens), 2e-4)


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize(
    "change",
    [
        assigned("conv.weight", lambda t: t.transpose(2, 3).contiguous().transpose(2, 3)),
        assigned("gate.fc1.weight", lambda t: t.transpose(0, 1).contiguous().transpose(0, 1)),
        assigned("gate.fc1.weight", lambda t: torch.empty(0)),
        assigned("conv.weight", lambda t: t.half()),
        assigned("conv.weight", lambda t: t.double()),
    ],
    ids=["strides", "strides of the gate", "empty", "half", "double"],
)
def test_data_that_is_assigned_between_the_passes(monkeypatch, change, training):
    def outcome() -> list[Tensor] | None:
        torch.manual_seed(0)
        ffn, tokens = feed_forward().train(training), images()
        out = ffn(tokens, GRID)
        change(ffn)
        try:
            return [*torch.autograd.grad(out.square().sum(), [tokens, *ffn.parameters()])]
        except RuntimeError:
            return None

    got = outcome()
    monkeypatch.setenv(VARIABLE, "plain")
    want = outcome()
    assert (got is None) == (want is None)
    for g, w in zip(got or [], want or [], strict=True):
        torch.testing.assert_close(g, w, rtol=1e-3, atol=1e-3 * float(w.abs().max()) + 1e-2)


@pytest.mark.parametrize(
    "cotangent",
    [
        lambda y: torch._neg_view(torch.ones_like(y)),
        lambda y: torch._efficientzerotensor(y.shape),
        lambda y: torch.ones(1).expand_as(y),
    ],
    ids=["negative view", "zeros without memory", "expanded"],
)
def test_gradients_of_any_kind(cotangent):
    ffn = feed_forward(LocalityConfig(norm="none", bias=True))
    hidden, grid = torch.randn(3, 12, 64, requires_grad=True), Grid(3, 4)
    results = []
    for y in (mixed(training_form(ffn, hidden), ffn, hidden, grid), ffn.mix(hidden, grid)):
        assert y is not None
        results.append(torch.autograd.grad(y, [hidden, ffn.conv.weight, ffn.gate.fc1.bias], cotangent(y)))
    for got, want in zip(*results, strict=True):
        torch.testing.assert_close(got.clone(), want.clone(), rtol=1e-4, atol=1e-4)


def test_each_gradient_has_memory_of_its_own():
    """Otherwise one that is kept keeps all, and a change of one counts as a change of all."""
    ffn = feed_forward()
    ffn(images(), GRID).sum().backward()
    parameters = [*ffn.parameters()]
    assert len({p.grad.untyped_storage().data_ptr() for p in parameters}) == len(parameters)
    assert all(p.grad.untyped_storage().nbytes() == p.grad.nbytes for p in parameters)
    sum((p * p.grad).sum() for p in parameters).backward()


def later() -> dict[str, Callable[[LocalityFeedForward], object]]:
    """Return changes after which the plain modules would compute something else."""
    return {
        "mode": lambda ffn: ffn.eval(),
        "another activation": lambda ffn: setattr(ffn, "act1", nn.Tanh()),
        "another eps": lambda ffn: setattr(ffn.norm2, "eps", 0.5),
        "a hook": lambda ffn: ffn.conv.register_forward_hook(lambda _m, _i, out: 2 * out),
        "a patched forward": lambda ffn: setattr(ffn.act2, "forward", lambda x: 2 * x),
        "dilation": lambda ffn: (setattr(ffn.conv, "dilation", (2, 2)), setattr(ffn.conv, "padding", (2, 2))),
    }


@pytest.mark.parametrize("change", later().values(), ids=later())
def test_a_second_derivative_after_a_change_is_an_error(change):
    ffn, tokens = feed_forward(), images()
    out = ffn(tokens, GRID)
    change(ffn)
    with pytest.raises(RuntimeError, match="has changed since the forward pass"):
        torch.autograd.grad(out.sum(), tokens, create_graph=True)


def test_second_derivatives_under_autocast_are_those_of_the_forward_pass():
    ffn, hidden = feed_forward().eval(), torch.randn(3, 12, 64, requires_grad=True)
    inputs = [hidden, ffn.conv.weight]
    out = mixed(training_form(ffn, hidden), ffn, hidden, Grid(3, 4)).square().sum()
    want = torch.autograd.grad(out, inputs, create_graph=True)
    with torch.autocast("cpu", torch.bfloat16):
        got = torch.autograd.grad(out, inputs, create_graph=True)
    torch.testing.assert_close(got, want, rtol=0, atol=0)


OUT_OF_MEMORY = """
import resource, torch
from localvit import Grid, LocalityConfig, LocalityFeedForward

torch.set_num_threads(1)
ffn = LocalityFeedForward(768, LocalityConfig(kernel_size=7))
grid = Grid(2, 2)
ffn(torch.randn(2, 4, 768), grid).sum().backward()
out = ffn(torch.randn(256, 4, 768), grid).sum()
with open("/proc/self/statm") as file:
    now = int(file.read().split()[0]) * resource.getpagesize()
limits = resource.getrlimit(resource.RLIMIT_AS)
resource.setrlimit(resource.RLIMIT_AS, (now + 2**26, limits[1]))
try:
    out.backward()
except RuntimeError as error:
    print(error)
resource.setrlimit(resource.RLIMIT_AS, limits)
ffn(torch.randn(2, 4, 768), grid).sum().backward()
print("goes on")
"""


@pytest.mark.skipif(sys.platform != "linux", reason="reads the size of the process from /proc")
def test_too_little_memory_is_an_error():
    """The gradient of the kernels has 147 MiB for 256 images, of which 64 can be had."""
    done = subprocess.run([sys.executable, "-c", OUT_OF_MEMORY], capture_output=True, text=True, check=True)
    message, last = done.stdout.splitlines()
    assert "memory" in message
    assert last == "goes on"
