"""The lean training pass against the plain modules, and where it must stand back."""

import copy
from collections.abc import Callable

import pytest
import torch
from localvit.locality.kernels import lean_applies, pieces
from localvit.locality.kernels.lean import _LeanPass
from torch import Tensor, nn
from torch.autograd import forward_ad
from torch.utils.checkpoint import checkpoint

from localvit import Grid, LocalityConfig, LocalityFeedForward

from .test_feed_forward import random_weights

GRID = Grid(3, 4, 2)
CONFIGS = [
    LocalityConfig(),
    LocalityConfig(gate="eca", prefix="mlp", kernel_size=5),
    LocalityConfig(gate="eca_hard", prefix="passthrough", activation="relu6"),
    LocalityConfig(gate="none", norm="none", prefix="mlp", activation=("none", "gelu"), bias=True),
    LocalityConfig(gate="se", norm=("none", "none", "batch"), bias=(True, True, False)),
    LocalityConfig(gate="se", norm="none", activation="none"),
    LocalityConfig(gate="none", norm=("none", "batch", "none"), activation=("silu", "relu"), kernel_size=1),
    LocalityConfig(gate="se", activation="gelu_tanh", prefix="mlp", gate_width=1),
]


def feed_forward(config: LocalityConfig | None = None, dim: int = 6) -> LocalityFeedForward:
    ffn = LocalityFeedForward(dim, config).double()
    random_weights(ffn)
    return ffn


def images(batch: int = 3, dim: int = 6) -> Tensor:
    return torch.randn(batch, 14, dim, dtype=torch.double, requires_grad=True)


def run(ffn: nn.Module, tokens: Tensor, call: Callable[..., Tensor] | None = None) -> dict[str, Tensor]:
    """Output, gradients and buffers of one training step, by name; the module stays as it was."""
    ffn, tokens = copy.deepcopy(ffn), tokens.detach().clone().requires_grad_(tokens.requires_grad)
    out = ffn(tokens, GRID) if call is None else call(ffn, tokens, GRID)
    cotangent = torch.randn(out.shape, generator=torch.Generator().manual_seed(1), dtype=torch.double)
    (out * cotangent).sum().backward()
    named = {"tokens": tokens, **dict(ffn.named_parameters())}
    gradients = {name: t.grad for name, t in named.items() if t.grad is not None}
    return {"out": out.detach(), **gradients, **{f"buffer {n}": b for n, b in ffn.named_buffers()}}


def spy(monkeypatch) -> list[str]:
    """Names of the forms that lean passes take from now on."""
    used, apply = [], _LeanPass.apply

    def wrapped(x, how, *parameters):
        used.append(how.form.__name__)
        return apply(x, how, *parameters)

    monkeypatch.setattr(_LeanPass, "apply", wrapped)
    return used


def check_step(monkeypatch, ffn: nn.Module, tokens: Tensor, form: str, atol: float = 1e-4) -> None:
    """A training step by ``form`` of the lean pass equals one by the plain modules, in single precision."""
    monkeypatch.setenv("LOCALVIT_PLAIN", "1")
    plain = run(ffn, tokens)
    monkeypatch.setenv("LOCALVIT_PLAIN", "0")
    used = spy(monkeypatch)
    fast = run(ffn, tokens)
    assert used == [form]
    assert fast.keys() == plain.keys()
    # A norm by batch statistics takes a constant away: zero, of which plain modules leave rounding.
    for name in {"conv.bias"} & fast.keys():
        torch.testing.assert_close(fast.pop(name), plain.pop(name), rtol=0, atol=2e-3)
    torch.testing.assert_close(fast, plain, rtol=1e-4, atol=atol)


def both(monkeypatch, ffn: nn.Module, tokens: Tensor, call=None) -> tuple[dict, dict]:
    """A step by the lean pass and one by the plain modules."""
    assert lean_applies(ffn, tokens)
    lean = run(ffn, tokens, call)
    monkeypatch.setenv("LOCALVIT_PLAIN", "1")
    assert not lean_applies(ffn, tokens)
    plain = run(ffn, tokens, call)
    monkeypatch.delenv("LOCALVIT_PLAIN")
    return lean, plain


@pytest.mark.parametrize("piece", [1, 2**19])
@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("config", CONFIGS, ids=str)
def test_equals_the_plain_modules(monkeypatch, config, training, piece):
    monkeypatch.setattr(pieces, "_PIECE", piece)
    lean, plain = both(monkeypatch, feed_forward(config).train(training), images())
    assert lean.keys() == plain.keys()
    torch.testing.assert_close(lean, plain, rtol=1e-11, atol=1e-11)


@pytest.mark.parametrize("config", CONFIGS[:5], ids=str)
def test_first_and_second_derivatives(config):
    ffn = LocalityFeedForward(3, config, hidden_dim=4).double()
    random_weights(ffn)
    names, parameters = zip(*ffn.named_parameters(), strict=True)
    tokens = torch.randn(2, 1 + 6, 3, dtype=torch.double, requires_grad=True)

    def branch(tokens: Tensor, *parameters: Tensor) -> Tensor:
        state = {**dict(zip(names, parameters, strict=True)), **dict(ffn.named_buffers())}
        return torch.func.functional_call(ffn, state, (tokens, Grid(2, 3, 1)))

    inputs = (tokens, *(p.detach().clone().requires_grad_() for p in parameters))
    assert torch.autograd.gradcheck(branch, inputs)
    lean = torch.autograd.grad(branch(*inputs).square().sum(), inputs, create_graph=True)
    if config == CONFIGS[0]:
        assert torch.autograd.gradgradcheck(branch, inputs, atol=1e-4, fast_mode=True)
    assert all(gradient.requires_grad for gradient in lean)


def test_a_second_derivative_after_a_change_of_mode_is_an_error():
    ffn, tokens = feed_forward(), images()
    out = ffn(tokens, GRID)
    ffn.eval()
    with pytest.raises(RuntimeError, match="mode was changed"):
        torch.autograd.grad(out.sum(), tokens, create_graph=True)


def test_a_frozen_batch_norm_inside_training(monkeypatch):
    ffn = feed_forward()
    ffn.norm1.eval()
    ffn.norm2.requires_grad_(False)
    ffn.conv.requires_grad_(False)
    ffn.norm3.momentum = None  # a plain average
    lean, plain = both(monkeypatch, ffn, images())
    assert lean.keys() == plain.keys()
    assert not {"conv.weight", "norm2.weight"} & lean.keys()
    assert lean["buffer norm1.num_batches_tracked"] == 0
    torch.testing.assert_close(lean, plain, rtol=1e-11, atol=1e-11)


def test_without_running_statistics(monkeypatch):
    ffn = feed_forward()
    ffn.norm2 = nn.BatchNorm2d(24, track_running_stats=False).double()
    torch.testing.assert_close(*both(monkeypatch, ffn, images()), rtol=1e-11, atol=1e-11)
    torch.testing.assert_close(*both(monkeypatch, ffn.eval(), images()), rtol=1e-11, atol=1e-11)


def test_inputs_that_want_no_gradient_and_memory_with_gaps(monkeypatch):
    tokens = images(dim=12)[:, :, ::2].detach()
    lean, plain = both(monkeypatch, feed_forward(), tokens)
    assert "tokens" not in lean
    torch.testing.assert_close(lean, plain, rtol=1e-11, atol=1e-11)


@pytest.mark.parametrize("reentrant", [True, False])
def test_activation_checkpointing(monkeypatch, reentrant):
    def call(ffn, tokens, grid):
        return checkpoint(ffn, tokens, grid, use_reentrant=reentrant)

    torch.testing.assert_close(*both(monkeypatch, feed_forward(), images(), call), rtol=1e-11, atol=1e-11)


def test_bfloat16_by_autocast(monkeypatch):
    ffn = LocalityFeedForward(16, LocalityConfig(prefix="mlp"))
    tokens = torch.randn(4, 14, 16, requires_grad=True)

    def call(ffn, tokens, grid):
        with torch.autocast("cpu", torch.bfloat16):
            return ffn(tokens, grid)

    wide = run(ffn, tokens)
    lean, plain = both(monkeypatch, ffn, tokens, call)
    assert {n: t.dtype for n, t in lean.items()} == {n: t.dtype for n, t in plain.items()}
    assert lean["out"].dtype == torch.bfloat16
    assert torch.equal(lean["out"], plain["out"])
    for name, value in wide.items():
        scale = value.double().norm() + 1e-6
        errors = [(form[name].double() - value.double()).norm() / scale for form in (lean, plain)]
        assert errors[0] <= 1.5 * errors[1] + 1e-3, (name, errors)


def kept(ffn: nn.Module, tokens: Tensor) -> list[int]:
    """Elements of the tensors that autograd keeps, parameters and buffers apart."""
    own = {t.untyped_storage().data_ptr() for t in (*ffn.parameters(), *ffn.buffers())}
    found: dict[int, int] = {}

    def pack(tensor: Tensor) -> Tensor:
        if tensor.untyped_storage().data_ptr() not in own:
            found[tensor.untyped_storage().data_ptr()] = tensor.numel()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        out = ffn(tokens, GRID)
    assert out.requires_grad
    return sorted(found.values(), reverse=True)


def test_it_keeps_three_maps_the_input_and_statistics(monkeypatch):
    """In numbers for B = 3, N = 12, C = 6, D = 24: 2 B N D + 2 B N C, pooled means B D, six statistics."""
    ffn, tokens = feed_forward(LocalityConfig(), 6), images()
    assert kept(ffn, tokens) == [864, 864, 216, 216, 72, 24, 24, 24, 24, 6, 6]
    monkeypatch.setenv("LOCALVIT_PLAIN", "1")
    assert sum(kept(ffn, tokens)) > 2.5 * (2 * 864 + 2 * 216)


def standing_back() -> dict[str, Callable[[LocalityFeedForward], object]]:
    def replace(name: str, layer: nn.Module) -> Callable:
        return lambda ffn: setattr(ffn, name, layer)

    class Wider(nn.Conv2d):
        pass

    return {
        "a hook": lambda ffn: ffn.act2.register_forward_hook(lambda *_: None),
        "a pre-hook in the gate": lambda ffn: ffn.gate.fc1.register_forward_pre_hook(lambda *_: None),
        "a backward hook": lambda ffn: ffn.norm2.register_full_backward_hook(lambda *_: None),
        "a patched forward": lambda ffn: setattr(ffn.fc1, "forward", ffn.fc1.forward),
        "a replaced norm": replace("norm2", nn.GroupNorm(1, 24)),
        "synchronised norms": lambda ffn: setattr(ffn, "norm1", nn.SyncBatchNorm(24)),
        "a subclass": replace("fc2", Wider(24, 6, 1)),
        "a replaced activation": replace("act1", nn.Tanh()),
        "another gate": lambda ffn: setattr(ffn.gate, "gate", nn.Sigmoid()),
        "a weight norm": lambda ffn: nn.utils.parametrizations.weight_norm(ffn.fc1),
        "no gradient": lambda ffn: ffn.requires_grad_(False),
        "half of it in half": lambda ffn: ffn.fc1.bfloat16(),
    }


@pytest.mark.parametrize("change", standing_back().values(), ids=standing_back().keys())
def test_it_stands_back_where_layers_are_not_the_plain_ones(change):
    ffn, tokens = feed_forward(), images().detach()
    assert lean_applies(ffn, tokens)
    change(ffn)
    assert not lean_applies(ffn, tokens)


@pytest.mark.parametrize(
    "changes",
    [
        {"norm": "layer"},
        {"norm_order": "act-norm"},
        {"position": "first"},
        {"glu": "gate"},
        {"inner_skip": True},
        {"depthwise": False},
    ],
    ids=str,
)
def test_it_stands_back_for_other_designs(changes):
    assert not lean_applies(feed_forward(LocalityConfig(**changes)), images())


def test_it_stands_back_for_what_wants_single_operations():
    ffn, tokens = feed_forward(), images()
    with torch.no_grad():
        assert not lean_applies(ffn, tokens)
    with forward_ad.dual_level():
        assert not lean_applies(ffn, tokens)
    assert not lean_applies(
        ffn, torch.fx.Proxy(torch.fx.Node(torch.fx.Graph(), "x", "placeholder", "x", (), {}))
    )
    seen = []
    torch.vmap(lambda x: seen.append(lean_applies(ffn, tokens)) or x)(torch.zeros(2))
    torch.jit.trace(lambda x: seen.append(lean_applies(ffn, tokens)) or x + 1, torch.zeros(2))
    assert seen
    assert not any(seen)


def test_hooks_inside_still_run():
    ffn, seen = feed_forward(), []
    ffn.act2.register_forward_hook(lambda module, inputs, output: seen.append(output.shape))
    ffn(images(), GRID)
    assert seen == [(3, 24, 3, 4)]


def test_one_value_per_channel_is_still_an_error():
    with pytest.raises(ValueError, match="more than 1 value per channel"):
        feed_forward()(images(1)[:, :1], Grid(1, 1, 0))


def test_the_whole_graph_compiles_and_equals():
    ffn = feed_forward(LocalityConfig(prefix="mlp"))
    compiled = torch.compile(lambda f, x, g: f(x, g), fullgraph=True, backend="aot_eager")
    tokens = images()
    torch.testing.assert_close(run(ffn, tokens, compiled), run(ffn, tokens), rtol=1e-11, atol=1e-11)


def test_a_switch_with_another_value_is_an_error(monkeypatch):
    monkeypatch.setenv("LOCALVIT_PLAIN", "yes")
    with pytest.raises(ValueError, match=r"LOCALVIT_PLAIN='yes'.*0, 1"):
        feed_forward()(images(), GRID)
