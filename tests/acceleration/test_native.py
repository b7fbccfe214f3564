"""The native kernels against the plain modules in float64, and when they stand back."""

import copy
import pickle
import warnings
from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings, strategies as st
from torch import Tensor, nn
from torch.autograd import forward_ad
from torch.overrides import TorchFunctionMode
from torch.utils.checkpoint import checkpoint
from torch.utils.flop_counter import FlopCounterMode

from localvit import Grid, LocalityConfig, LocalityFeedForward
from localvit.acceleration.dispatch import accelerated, training_form
from localvit.acceleration.kernels import VARIABLE
from localvit.acceleration.native.mix import mix_, mixed

from .steps import GRID, assert_close, assigned, feed_forward, images, plain_step, spy, step
from .test_build import needs_compiler

pytestmark = needs_compiler

COVERED = [
    LocalityConfig(),
    LocalityConfig(gate_reduction=4),
    LocalityConfig(gate="eca", kernel_size=5),
    LocalityConfig(gate="eca_hard", prefix="identity", activation="relu6"),
    LocalityConfig(gate="none", activation=("none", "relu"), kernel_size=7),
    LocalityConfig(norm="none", bias=True, activation=("relu", "none")),
    LocalityConfig(norm=("none", "batch", "none"), bias=(True, True, False)),
    LocalityConfig(norm=("batch", "none", "batch"), gate="eca"),
    LocalityConfig(norm=("batch", "batch", "group"), norm_groups=4),
    LocalityConfig(norm=("batch", "batch", "layer")),
]
OTHERS = [
    LocalityConfig(kernel_size=1),
    LocalityConfig(activation="silu"),
    LocalityConfig(norm="layer"),
    LocalityConfig(norm_order="act-norm"),
    LocalityConfig(position="first"),
    LocalityConfig(glu="gate"),
    LocalityConfig(inner_skip=True),
    LocalityConfig(depthwise=False),
    LocalityConfig(prefix="pointwise"),
]


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("config", COVERED, ids=str)
def test_a_step_equals_the_plain_modules(monkeypatch, config, training):
    ffn, tokens = feed_forward(config).train(training), images()
    used = spy(monkeypatch)
    got = step(ffn, tokens)
    assert used == ["native"]
    assert_close(got, plain_step(monkeypatch, ffn, tokens))


@settings(deadline=None, max_examples=60)
@given(
    config=st.sampled_from(COVERED),
    batch=st.integers(1, 5),
    height=st.integers(1, 9),
    width=st.integers(1, 23),
    hidden=st.sampled_from([16, 48, 144, 272]),
    threads=st.sampled_from([1, 2, 3, 11]),
    seed=st.integers(0, 2**16),
)
def test_any_shape_and_number_of_threads(config, batch, height, width, hidden, threads, seed):
    """One thread and several give equal bits."""
    torch.manual_seed(seed)
    grid = Grid(height, width, 1)
    if batch * height * width < 2:
        return
    ffn, tokens = feed_forward(config, 8, hidden), images(batch, 8, grid)
    # Of two values per channel a batch norm makes 1 and -1: derivatives are differences of near numbers.
    values = batch * height * width
    with pytest.MonkeyPatch.context() as patch:
        got, want = step(ffn, tokens, grid=grid), plain_step(patch, ffn, tokens, grid=grid)
    if values > 3:
        assert_close(got, want, 1e-2 if values < 16 else 2e-4)
    else:
        torch.testing.assert_close(got["out"], want["out"].float(), rtol=1e-3, atol=1e-3)
    got = stage(ffn, tokens[:, 1:], grid)
    try:
        torch.set_num_threads(threads)
        torch.testing.assert_close(stage(ffn, tokens[:, 1:], grid), got, rtol=0, atol=0)
    finally:
        torch.set_num_threads(1)


def stage(ffn: LocalityFeedForward, tokens: Tensor, grid: Grid) -> tuple[Tensor, ...]:
    """Return the middle stage's output and gradients, and its output in evaluation mode."""
    ffn = copy.deepcopy(ffn)
    hidden = tokens.detach().repeat(1, 1, ffn.fc1.out_channels // tokens.shape[2]).requires_grad_()
    grid = Grid(grid.height, grid.width)
    form = training_form(ffn, hidden)
    out = mixed(form, ffn, hidden, grid)
    wanted = [
        hidden,
        *(p for n, p in ffn.named_parameters() if n.startswith(("norm1", "norm2", "conv", "gate"))),
    ]
    gradients = torch.autograd.grad(out, wanted, out.detach().cos())
    ffn.eval()
    return out.detach(), *gradients, mixed(training_form(ffn, hidden), ffn, hidden.detach(), grid).detach()


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("config", COVERED, ids=str)
@torch.no_grad()
def test_inference_equals_the_plain_modules(monkeypatch, config, training):
    ffn, tokens = feed_forward(config).train(training), images().detach()
    used = spy(monkeypatch)
    got = copy.deepcopy(ffn)(tokens, GRID)
    assert used == ["native"]
    monkeypatch.setenv(VARIABLE, "plain")
    torch.testing.assert_close(
        got, copy.deepcopy(ffn).double()(tokens.double(), GRID).float(), rtol=1e-4, atol=1e-4
    )


@torch.no_grad()
def test_models_of_real_size_are_evaluated_by_plain_modules(monkeypatch):
    ffn, tokens = feed_forward(dim=96).eval(), images(dim=96).detach()
    used = spy(monkeypatch)
    got = ffn(tokens, GRID)
    assert not used
    monkeypatch.setenv(VARIABLE, "plain")
    assert torch.equal(got, ffn(tokens, GRID))


def test_a_variance_far_from_zero_does_not_cancel(monkeypatch):
    ffn, tokens = feed_forward(LocalityConfig(bias=True)), images()
    with torch.no_grad():
        ffn.fc1.bias.fill_(1000.0)
    assert_close(step(ffn, tokens), plain_step(monkeypatch, ffn, tokens), 1e-2)


@pytest.mark.parametrize("config", OTHERS, ids=str)
def test_other_designs_stay_plain(monkeypatch, config):
    ffn, tokens = feed_forward(config), images()
    used = spy(monkeypatch)
    got = step(ffn, tokens)
    assert not used
    monkeypatch.setenv(VARIABLE, "plain")
    torch.testing.assert_close(got, step(ffn, tokens), rtol=0, atol=0)


class Doubled(LocalityFeedForward):
    def mix(self, x: Tensor, grid: Grid) -> Tensor:
        return 2 * super().mix(x, grid)


class _Twice(nn.Module):
    def forward(self, weight: Tensor) -> Tensor:
        return 2 * weight


def changes() -> dict[str, Callable[[LocalityFeedForward], object]]:
    """Return what may happen to a network after its form was chosen."""

    def replace(name: str, layer: nn.Module) -> Callable:
        return lambda ffn: setattr(ffn, name, layer)

    def patched(ffn: LocalityFeedForward) -> None:
        ffn.act2.forward = lambda x: 2 * x  # type: ignore[method-assign]

    def doubled(name: str) -> Callable:
        """Patch a stage of one instance."""

        def patch(ffn: LocalityFeedForward) -> None:
            stage = getattr(ffn, name)
            setattr(ffn, name, lambda *args: 2 * stage(*args))

        return patch

    def narrower_gate(ffn: LocalityFeedForward) -> None:
        ffn.gate.fc1.weight = nn.Parameter(ffn.gate.fc1.weight.detach()[:2].clone())

    def of_layer(name: str, attribute: str, value: object) -> Callable:
        return lambda ffn: setattr(ffn.get_submodule(name), attribute, value)

    def freed(name: str) -> Callable:
        return lambda ffn: ffn.get_parameter(name).untyped_storage().resize_(0)

    return {
        "a patched mix": doubled("mix"),
        "a patched transform": doubled("transform"),
        "a patched convolution": doubled("_convolve"),
        "a patched expansion": doubled("expand"),
        "a patched projection": doubled("project"),
        "another class": lambda ffn: setattr(ffn, "__class__", Doubled),
        "a transposed kernel in the same memory": assigned("conv.weight", lambda t: t.transpose(2, 3)),
        "a gate of other shapes": narrower_gate,
        "a transposed gate in the same memory": assigned(
            "gate.fc2.weight", lambda t: t.view(4, 64, 1, 1).transpose(0, 1)
        ),
        "one value for a norm": assigned("norm1.weight", lambda t: t[:1].expand(64)),
        "fewer kernels": assigned("conv.weight", lambda t: t[:16]),
        "a kernel of another size": assigned("conv.weight", lambda t: torch.ones(64, 1, 5, 5)),
        "a kernel without memory": freed("conv.weight"),
        "a norm without memory": freed("norm1.weight"),
        "no variance": of_layer("norm1", "running_var", None),
        "no mean": of_layer("norm2", "running_mean", None),
        "a negative view": lambda ffn: setattr(
            ffn.conv, "weight", nn.Parameter(torch._neg_view(ffn.conv.weight.detach()))
        ),
        "settings of the gate": of_layer("gate.fc1", "padding", (1, 1)),
        "a gate of maxima": of_layer("gate", "add_maxpool", True),
        "an inner skip": of_layer("", "inner_skip", True),
        "another order": of_layer("", "norm_before_act", False),
        "a hook": lambda ffn: ffn.act2.register_forward_hook(lambda *_: None),
        "a hook that changes": lambda ffn: ffn.norm1.register_forward_hook(lambda _m, _i, out: 2 * out),
        "a pre-hook in the gate": lambda ffn: ffn.gate.fc1.register_forward_pre_hook(lambda *_: None),
        "a hook on the gate": lambda ffn: ffn.gate.register_forward_hook(lambda _m, _i, out: 2 * out),
        "a backward hook": lambda ffn: ffn.norm2.register_full_backward_hook(lambda *_: None),
        "a backward pre-hook": lambda ffn: ffn.conv.register_full_backward_pre_hook(lambda *_: None),
        "a patched forward": patched,
        "another norm": replace("norm2", nn.GroupNorm(1, 64)),
        "another activation": replace("act1", nn.Tanh()),
        "another gate function": lambda ffn: setattr(ffn.gate, "gate", nn.Sigmoid()),
        "dilation": replace("conv", nn.Conv2d(64, 64, 3, padding=2, dilation=2, groups=64)),
        "a parametrization": lambda ffn: nn.utils.parametrize.register_parametrization(
            ffn.conv, "weight", _Twice()
        ),
        "float64": lambda ffn: ffn.double(),
        "bfloat16": lambda ffn: ffn.bfloat16(),
        "another device": lambda ffn: ffn.conv.weight.__setattr__("data", ffn.conv.weight.data.double()),
    }


@pytest.mark.parametrize("change", changes().values(), ids=changes())
def test_it_stands_back_after_a_change(monkeypatch, change):
    ffn, tokens = feed_forward(), images()
    used = spy(monkeypatch)
    step(ffn, tokens)
    ffn(tokens.detach(), GRID)
    assert used == ["native", "native"]
    used.clear()
    change(ffn)
    dtype = ffn.fc1.weight.dtype
    tokens = tokens.detach().to(dtype).requires_grad_()

    def outcome(net: LocalityFeedForward) -> Tensor | str:
        try:
            return net(tokens, GRID)
        except (RuntimeError, ValueError) as error:
            return str(error)

    got = outcome(ffn)
    assert not used
    monkeypatch.setenv(VARIABLE, "plain")
    want = outcome(ffn)
    assert torch.equal(got, want) if isinstance(got, Tensor) else got == want


@pytest.mark.parametrize(
    "change",
    [
        lambda ffn: ffn.norm1.eval(),
        lambda ffn: setattr(ffn.norm2, "momentum", None),
        lambda ffn: setattr(ffn.norm2, "eps", 0.1),
        lambda ffn: setattr(ffn.norm1, "running_mean", torch.ones(64)),
        lambda ffn: ffn.conv.requires_grad_(False),
        lambda ffn: setattr(ffn.norm1, "weight", nn.Parameter(torch.ones(64))),
        lambda ffn: ffn.to(memory_format=torch.channels_last),
        lambda ffn: ffn.eval(),
        lambda ffn: setattr(ffn, "gate", None),
        lambda ffn: setattr(ffn, "gate", feed_forward(LocalityConfig(gate="eca")).gate),
        lambda ffn: setattr(ffn.conv.weight, "data", ffn.conv.weight.data * 2),
        lambda ffn: setattr(ffn, "conv", nn.Conv2d(64, 64, 5, padding=2, groups=64)),
        lambda ffn: setattr(ffn, "fc1", nn.Sequential(nn.Conv2d(16, 64, 1), nn.Tanh())),
        lambda ffn: ffn.fc2.register_forward_hook(lambda _m, _i, out: 2 * out),
        lambda ffn: ffn.fc1.register_forward_pre_hook(lambda _m, inputs: (2 * inputs[0],)),
        lambda ffn: setattr(ffn.fc1, "forward", lambda x: torch.cat(4 * [x], 1)),
        lambda ffn: nn.utils.parametrize.register_parametrization(ffn.fc2, "weight", _Twice()),
        lambda ffn: setattr(ffn, "norm3", nn.BatchNorm2d(16, affine=False)),
    ],
)
def test_changes_that_it_follows(monkeypatch, change):
    ffn, tokens = feed_forward(), images()
    used = spy(monkeypatch)
    ffn(tokens, GRID)
    change(ffn)
    got = step(ffn, tokens)
    assert used == ["native", "native"]
    assert_close(got, plain_step(monkeypatch, ffn, tokens))


def contexts() -> dict[str, Callable[[Callable[[Tensor], Tensor], Tensor], object]]:
    """Return ways to call a network in which something wants to see single operations."""

    def autocast(f, x):
        with torch.autocast("cpu", torch.bfloat16):
            return f(x)

    def dual(f, x):
        with forward_ad.dual_level():
            return f(forward_ad.make_dual(x, torch.ones_like(x)))

    def dispatch_mode(f, x):
        with FlopCounterMode(display=False):
            return f(x)

    def function_mode(f, x):
        class Mode(TorchFunctionMode):
            def __torch_function__(self, function, types, args=(), kwargs=None):
                out = function(*args, **(kwargs or {}))
                return 2 * out if function is F.conv2d else out

        with Mode():
            return f(x)

    def trace(f, x):
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            return torch.jit.trace(f, x, check_trace=False)(x)

    def tensor_subclass(f, x):
        class Own(Tensor):
            pass

        return f(x.as_subclass(Own)).as_subclass(Tensor)

    return {
        "autocast": autocast,
        "forward AD": dual,
        "a dispatch mode": dispatch_mode,
        "a function mode": function_mode,
        "vmap": lambda f, x: torch.vmap(lambda one: f(one[None])[0])(x),
        "grad": lambda f, x: torch.func.grad(lambda t: f(t).sum())(x),
        "jvp": lambda f, x: torch.func.jvp(f, (x,), (torch.ones_like(x),))[1],
        "a tensor subclass": tensor_subclass,
        "trace": trace,
        "compile": lambda f, x: torch.compile(f, backend="eager", fullgraph=True)(x),
        "make_fx": lambda f, x: torch.fx.experimental.proxy_tensor.make_fx(f)(x)(x),
    }


@pytest.mark.parametrize("way", contexts().values(), ids=contexts())
def test_it_stands_back_for_what_wants_single_operations(monkeypatch, way):
    ffn, tokens = feed_forward().eval().requires_grad_(False), images().detach()
    ffn(tokens, GRID)
    used = spy(monkeypatch)
    got = way(lambda x: ffn(x, GRID), tokens)
    assert not used
    monkeypatch.setenv(VARIABLE, "plain")
    want = way(lambda x: ffn(x, GRID), tokens)
    torch.testing.assert_close(got, want, rtol=0, atol=0)


def test_a_default_device_is_no_reason_to_stand_back(monkeypatch):
    """It is a function mode as well."""
    ffn, used = feed_forward(), spy(monkeypatch)
    with torch.device("cpu"):
        ffn(images(), GRID)
    assert used == ["native"]


def test_global_hooks_see_every_layer(monkeypatch):
    ffn, seen = feed_forward(), []
    handle = nn.modules.module.register_module_forward_hook(lambda module, *_: seen.append(type(module)))
    try:
        ffn(images(), GRID)
    finally:
        handle.remove()
    assert nn.Hardswish in seen


def test_second_derivatives_are_those_of_the_plain_modules(monkeypatch):
    ffn, tokens = feed_forward(LocalityConfig(activation="relu6")), images()

    def twice(ffn: nn.Module, tokens: Tensor) -> list[Tensor]:
        ffn = copy.deepcopy(ffn)
        inputs = [tokens, *ffn.parameters()]
        first = torch.autograd.grad(ffn(tokens, GRID).square().sum(), inputs, create_graph=True)
        assert all(g.requires_grad for g in first)
        return list(torch.autograd.grad(sum(g.square().sum() for g in first), inputs, allow_unused=True))

    got = twice(ffn, tokens)
    monkeypatch.setenv(VARIABLE, "plain")
    want = twice(ffn.double(), tokens.detach().double().requires_grad_())
    for g, w in zip(got, want, strict=True):
        scale = float(w.abs().max()) + 1e-2 * max(float(t.abs().max()) for t in want)
        assert float((g.double() - w).abs().max()) <= 1e-3 * scale


def test_a_graph_that_is_kept_gives_the_same_twice():
    ffn, tokens = feed_forward(), images()
    out = ffn(tokens, GRID).sum()
    first = torch.autograd.grad(out, [tokens, ffn.fc2.weight], retain_graph=True)
    again = torch.autograd.grad(out, [tokens, ffn.fc2.weight])
    torch.testing.assert_close(first, again, rtol=0, atol=0)
    with pytest.raises(RuntimeError, match="second time"):
        torch.autograd.grad(out, ffn.fc2.weight)


def test_parameters_from_elsewhere(monkeypatch):
    """As `torch.func.functional_call` gives them."""
    ffn, tokens = feed_forward(), images()
    other = {n: (p * 1.5).detach().requires_grad_() for n, p in ffn.named_parameters()}
    used = spy(monkeypatch)
    out = torch.func.functional_call(ffn, other, (tokens, GRID))
    got = torch.autograd.grad(out.square().sum(), list(other.values()))
    assert used == ["native"]
    monkeypatch.setenv(VARIABLE, "plain")
    out = torch.func.functional_call(ffn, other, (tokens, GRID))
    torch.testing.assert_close(
        got, torch.autograd.grad(out.square().sum(), list(other.values())), rtol=1e-3, atol=1e-2
    )


def test_a_parameter_changed_before_the_backward_pass_is_an_error():
    ffn, tokens = feed_forward(), images()
    out = ffn(tokens, GRID)
    with torch.no_grad():
        ffn.norm2.weight.add_(1)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        out.sum().backward()


def kept(ffn: nn.Module, tokens: Tensor) -> int:
    """Return the elements of what the graph of a forward pass holds, parameters and buffers apart."""
    ffn = copy.deepcopy(ffn)
    own = {t.untyped_storage().data_ptr() for t in (*ffn.parameters(), *ffn.buffers())}
    out, found, seen = ffn(tokens, GRID), {}, set()
    nodes = [out.grad_fn]
    while nodes:
        node = nodes.pop()
        if node is None or node in seen:
            continue
        seen.add(node)
        nodes += [next_node for next_node, _ in node.next_functions]
        raw = [getattr(node, name) for name in dir(node) if name.startswith("_raw_saved_")]
        raw = [saved for each in raw for saved in (each if isinstance(each, (tuple, list)) else [each])]
        tensors = list(getattr(node, "saved_tensors", ()))
        tensors += [saved.data for saved in raw if isinstance(getattr(saved, "data", None), Tensor)]
        for tensor in tensors:
            if tensor is not None and tensor.untyped_storage().data_ptr() not in own:
                found[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes() // 4
    return sum(found.values())


def test_what_it_keeps(monkeypatch):
    """B = 3, N = 12, C = 16, D = 64: inputs of fc1, of the stage and of norm3, and the convolved map;
    (8 + B, D) for norms and gate of the stage; the statistics of norm3.
    """
    ffn, tokens = feed_forward(), images()
    maps = 3 * 12 * (16 + 2 * 64 + 16)
    assert kept(ffn, tokens) == maps + (8 + 3) * 64 + 2 * 16
    monkeypatch.setenv(VARIABLE, "plain")
    assert kept(ffn, tokens) > 1.8 * maps


@pytest.mark.parametrize("reentrant", [True, False])
@pytest.mark.parametrize("kernels", ["auto", "plain"])
@pytest.mark.parametrize(
    "config", [LocalityConfig(), LocalityConfig(norm_order="act-norm"), LocalityConfig(prefix="pointwise")]
)
def test_checkpointing_moves_statistics_once(monkeypatch, config, kernels, reentrant):
    """As timm's and Hugging Face's own checkpointing call it."""

    def call(ffn, tokens, grid):
        return checkpoint(ffn, tokens, grid, use_reentrant=reentrant)

    monkeypatch.setenv(VARIABLE, kernels)
    ffn, tokens = feed_forward(config), images()
    ffn.norm3.momentum = None
    got = step(ffn, tokens, call)
    assert got["buffer norm1.num_batches_tracked"] == 1
    torch.testing.assert_close(got, step(ffn, tokens), rtol=0, atol=0)


def test_hooks_on_saved_tensors_see_what_is_kept():
    """As offloading has them. The projection's input is not kept, and so is none of theirs."""
    ffn, tokens, saved = feed_forward(), images(), []
    want = step(ffn, tokens)

    def call(ffn, tokens, grid):
        with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t) or [t], lambda box: box[0]):
            return ffn(tokens, grid)

    torch.testing.assert_close(step(ffn, tokens, call), want, rtol=0, atol=0)
    maps = [t for t in saved if t.numel() == 3 * 12 * 64]
    assert len({t.untyped_storage().data_ptr() for t in maps}) == 2
    with torch.autograd.graph.disable_saved_tensors_hooks("none here"):
        ffn(tokens, GRID).sum().backward()


@pytest.mark.parametrize(
    "clone", [copy.deepcopy, lambda m: pickle.loads(pickle.dumps(m))], ids=["copy", "pickle"]
)
def test_a_copy_finds_its_own_form(clone):
    ffn, tokens = feed_forward().eval(), images().detach()
    ffn(tokens, GRID)
    other = clone(ffn)
    assert other.noted is None
    with torch.no_grad():
        other.conv.weight.zero_()
        assert not torch.equal(other(tokens, GRID), ffn(tokens, GRID))


def test_the_environment_chooses(monkeypatch):
    ffn, x = feed_forward(), images()
    used = spy(monkeypatch)
    for value, native in {"": True, "auto": True, "plain": False}.items():
        monkeypatch.setenv(VARIABLE, value)
        used.clear()
        ffn(x, GRID)
        assert bool(used) is native
    monkeypatch.setenv(VARIABLE, "cuda")
    for other in (ffn, feed_forward(LocalityConfig(glu="gate")), feed_forward().double()):
        with pytest.raises(ValueError, match=r"LOCALVIT_KERNELS='cuda' is not accepted; use auto or plain"):
            other(images().to(other.fc1.weight.dtype), GRID)


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_the_default_type_is_not_that_of_the_kernels(monkeypatch, dtype):
    ffn, tokens = feed_forward(), images()
    want = step(ffn, tokens)
    try:
        torch.set_default_dtype(dtype)
        got = step(ffn, tokens)
    finally:
        torch.set_default_dtype(torch.float32)
    del want["out"], got["out"]  # the cotangent is drawn in the default type
    assert got.keys() == want.keys()
    assert all(g.dtype == want[n].dtype and g.isfinite().all() for n, g in got.items())


def test_an_expansion_of_another_width_or_type_is_that_of_the_plain_modules(monkeypatch):
    config = LocalityConfig(norm="none", bias=True, gate="none")
    ffn, tokens = feed_forward(config), images()
    ffn(tokens, GRID)
    ffn.fc1 = nn.Conv2d(16, 128, 1)
    with pytest.raises(RuntimeError, match="channels"):
        ffn(tokens, GRID)
    ffn.fc1 = nn.Sequential(nn.Conv2d(16, 64, 1), Cast(torch.float64))
    with pytest.raises(RuntimeError, match=r"dtype|type"):
        ffn(tokens, GRID)


class Cast(nn.Module):
    def __init__(self, dtype: torch.dtype) -> None:
        super().__init__()
        self.dtype = dtype

    def forward(self, x: Tensor) -> Tensor:
        return x.to(self.dtype)


@pytest.mark.parametrize(
    ("name", "change"),
    [
        ("running_mean", lambda t: t.repeat_interleave(2)[::2]),
        ("num_batches_tracked", lambda t: t.to(torch.int32)),
    ],
)
def test_buffers_of_another_kind(monkeypatch, name, change):
    """As `load_state_dict(assign=True)` may bring them."""
    ffn, tokens = feed_forward(), images()
    ffn.norm1._buffers[name] = change(ffn.norm1._buffers[name])
    used = spy(monkeypatch)
    step(ffn, tokens)
    assert not used


def test_layers_in_front_of_the_projection_that_work_in_place(monkeypatch):
    ffn, tokens = feed_forward(), images()
    ffn.fc2 = nn.Sequential(nn.Hardswish(inplace=True), ffn.fc2)
    used = spy(monkeypatch)
    got = step(ffn, tokens)
    assert used == ["native"]
    assert_close(got, plain_step(monkeypatch, ffn, tokens))


@pytest.mark.parametrize(
    ("config", "layer", "settings"),
    [
        (LocalityConfig(gate="eca"), "gate.conv", {"dilation": (2,), "padding": (2,)}),
        (LocalityConfig(activation="relu6"), "act1", {"max_val": 1.0}),
        (LocalityConfig(), "gate.fc2", {"padding": (1, 1)}),
        (LocalityConfig(), "fc2", {"stride": (1, 2)}),
        (LocalityConfig(), "conv", {"stride": (2, 2)}),
    ],
    ids=str,
)
@pytest.mark.parametrize("when", ["before", "after"])
def test_layers_with_other_settings(monkeypatch, config, layer, settings, when):
    def outcome() -> Tensor | str:
        torch.manual_seed(0)
        ffn, tokens = feed_forward(config), images()
        if when == "after":
            ffn(tokens, GRID)
        for name, value in settings.items():
            setattr(ffn.get_submodule(layer), name, value)
        try:
            return ffn(tokens, GRID)
        except RuntimeError as error:
            return str(error)

    got = outcome()
    monkeypatch.setenv(VARIABLE, "plain")
    want = outcome()
    if isinstance(want, str):
        assert got == want
    else:
        torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("dim", [16, 96])
def test_hooks_on_an_identity_after_the_projection(dim):
    ffn, tokens = feed_forward(LocalityConfig(norm=("batch", "batch", "none")), dim).eval(), images(dim=dim)
    before = ffn(tokens, GRID)
    ffn.norm3.register_forward_hook(lambda _module, _inputs, out: 2 * out)
    torch.testing.assert_close(ffn(tokens, GRID), 2 * before)
    with torch.no_grad():
        torch.testing.assert_close(ffn(tokens, GRID), 2 * before, rtol=1e-4, atol=1e-4)


def test_settings_that_change(monkeypatch):
    for change in (
        lambda ffn: setattr(ffn.conv, "padding_mode", "circular"),
        lambda ffn: (setattr(ffn.conv, "dilation", (2, 2)), setattr(ffn.conv, "padding", (2, 2))),
    ):
        ffn, tokens = feed_forward(), images()
        before = ffn(tokens, GRID)
        change(ffn)
        if ffn.conv.padding_mode == "circular":
            ffn.conv._reversed_padding_repeated_twice = [1, 1, 1, 1]
        used = spy(monkeypatch)
        got = ffn(tokens, GRID)
        assert not used
        assert not torch.equal(got, before)


def test_a_subclass_computes_what_it_says():
    ffn = feed_forward(LocalityConfig(norm="none", bias=True)).eval()
    tokens, before = images(), ffn(images(), GRID)
    before = ffn(tokens, GRID)
    ffn.noted, ffn.__class__ = None, Doubled
    assert not torch.allclose(ffn(tokens, GRID), before)


def test_a_shallow_copy_has_layers_of_its_own():
    ffn, tokens = feed_forward().eval(), images()
    ffn(tokens, GRID)
    other = copy.copy(ffn)
    other._modules = dict(ffn._modules)
    other._modules["conv"] = copy.deepcopy(ffn.conv)
    with torch.no_grad():
        other._modules["conv"].weight.zero_()
    assert not torch.equal(other(tokens, GRID), ffn(tokens, GRID))


def test_a_plain_average_without_a_count(monkeypatch):
    ffn, tokens = feed_forward(), images()
    ffn.norm1.momentum = ffn.norm1.num_batches_tracked = None
    assert_close(step(ffn, tokens), plain_step(monkeypatch, ffn, tokens))


def test_plain_and_native_before_one_backward_pass(monkeypatch):
    ffn, tokens = feed_forward(), images()
    first = ffn(tokens, GRID)
    monkeypatch.setenv(VARIABLE, "plain")
    second = ffn(tokens, GRID)
    monkeypatch.delenv(VARIABLE)
    (first + second + ffn(tokens, GRID)).sum().backward()


def test_many_cotangents_at_once():
    ffn, tokens = feed_forward(), images(2)
    out = ffn(tokens, GRID)[:, 2:, 0].sum(1)
    (got,) = torch.autograd.grad(out, tokens, torch.eye(2), is_grads_batched=True, retain_graph=True)
    for i in range(2):
        (want,) = torch.autograd.grad(out[i], tokens, retain_graph=True)
        torch.testing.assert_close(got[i], want, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize(("name", "native"), [("conv", False), ("fc1", True), ("fc2", True)])
def test_a_weight_that_is_no_parameter_any_more(monkeypatch, name, native):
    ffn, tokens = feed_forward().eval(), images()
    ffn(tokens, GRID)
    layer = ffn.get_submodule(name)
    weight = layer.weight.detach() * 2
    del layer.weight
    layer.weight = weight
    used = spy(monkeypatch)
    got = ffn(tokens, GRID)
    assert bool(used) is native
    monkeypatch.setenv(VARIABLE, "plain")
    torch.testing.assert_close(got, ffn(tokens, GRID), rtol=1e-4, atol=1e-4)


NO_GATE = [None] * 4
GATE = [torch.ones(4, 64, 1, 1), torch.ones(4), torch.ones(64, 4, 1, 1), torch.ones(64)]


@pytest.mark.parametrize(
    ("kernel", "bias", "gate", "numbers"),
    [
        ((32, 1, 3, 3), None, NO_GATE, (3, 4, 0, 0, 0)),
        ((64, 1, 4, 4), None, NO_GATE, (3, 4, 0, 0, 0)),
        ((64, 1, 9, 9), None, NO_GATE, (3, 4, 0, 0, 0)),
        ((64, 1, 3, 3), torch.ones(3), NO_GATE, (3, 4, 0, 0, 0)),
        ((64, 1, 3, 3), torch.ones(64).double(), NO_GATE, (3, 4, 0, 0, 0)),
        ((64, 1, 3, 3), None, NO_GATE, (3, 4, 0, 0, 1)),
        ((64, 1, 3, 3), None, NO_GATE, (3, 4, 0, 0, 2)),
        ((64, 1, 3, 3), None, [GATE[0], GATE[1][:2], *GATE[2:]], (3, 4, 0, 0, 1)),
        ((64, 1, 3, 3), None, [GATE[0][:, :32].clone(), *GATE[1:]], (3, 4, 0, 0, 1)),
        ((64, 1, 3, 3), None, GATE, (3, 4, 0, 0, 9)),
        ((64, 1, 3, 3), None, GATE, (3, 4, 4, 0, 1)),
        ((64, 1, 3, 3), None, GATE, (3, 4, 0, -1, 1)),
        ((64, 1, 3, 3), None, GATE, (-3, -4, 0, 0, 1)),
        ((64, 1, 3, 3), None, GATE, (3, 5, 0, 0, 1)),
    ],
    ids=lambda value: str(value) if isinstance(value, tuple) else None,
)
def test_the_operator_refuses_what_it_cannot_read(kernel, bias, gate, numbers):
    with pytest.raises(ValueError, match="not accepted"):
        mix_(torch.randn(1, 12, 64), torch.randn(kernel), bias, gate, *numbers)


def test_one_value_per_channel_is_still_an_error():
    with pytest.raises(ValueError, match="more than 1 value per channel"):
        feed_forward()(images(1)[:, :1], Grid(1, 1, 0))


@pytest.mark.parametrize(
    ("batch", "height", "width", "channels", "reduced"),
    [(1, 1, 1, 16, 1), (3, 3, 11, 48, 4), (2, 10, 7, 16, 37), (1, 40, 33, 80, 4)],
)
def test_the_operator_of_fused_models(batch, height, width, channels, reduced):
    """In place, between two activations, with and without the gate."""
    x, weight, bias = (
        torch.randn(shape) for shape in ((batch, height * width, channels), (channels, 1, 3, 3), (channels,))
    )
    shapes = (reduced, channels, 1, 1), (reduced,), (channels, reduced, 1, 1), (channels,)
    layers = [torch.randn(shape) / shape[1 if len(shape) == 4 else 0] ** 0.5 for shape in shapes]
    y, z = x.clone(), x.clone()
    mix_(y, weight, bias, [None] * 4, height, width, 1, 3, 0)
    patches = F.relu(x.double()).transpose(1, 2).unflatten(2, (height, width))
    want = F.hardswish(F.conv2d(patches, weight.double(), bias.double(), padding=1, groups=channels))
    torch.testing.assert_close(y.double(), want.flatten(2).mT, rtol=1e-5, atol=1e-5)
    first, first_bias, second, second_bias = (layer.double() for layer in layers)
    squeezed = F.relu(F.conv2d(want.mean((2, 3), keepdim=True), first, first_bias))
    want = want * F.hardsigmoid(F.conv2d(squeezed, second, second_bias))
    mix_(z, weight, bias, layers, height, width, 1, 3, 1)
    torch.testing.assert_close(z.double(), want.flatten(2).mT, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("act", ["none", "relu", "relu6", "hardswish"])
def test_slopes_at_corners_are_those_of_pytorch(monkeypatch, act):
    """All hidden values are corners of the activation: 0, 3, -3, 6."""
    config = LocalityConfig(activation=act, norm="none", gate="none", prefix="skip")
    ffn, tokens = feed_forward(config), images()
    with torch.no_grad():
        ffn.fc1.weight.zero_()
        ffn.fc1.weight[:, 0].fill_(1.0)
        tokens[..., 0] = torch.tensor([0.0, 3.0, -3.0, 6.0, -0.0]).repeat(9)[: 3 * 14].view(3, 14)
        ffn.conv.weight.zero_()
        ffn.conv.weight[:, :, 1, 1] = 1.0
    assert_close(step(ffn, tokens), plain_step(monkeypatch, ffn, tokens))


def test_not_a_number_stays_one():
    ffn, tokens = feed_forward().eval(), images().detach()
    tokens[0, 5, 0] = float("nan")
    out = ffn(tokens, GRID)
    assert out[0, 2:].isnan().all()  # the gate takes the mean of the whole image
    assert not out[1:].isnan().any()


@pytest.mark.parametrize("act", ["hardswish", "relu", "relu6", "none"])
@pytest.mark.parametrize("gate", ["se", "eca", "eca_hard"])
def test_not_a_number_in_gradients_of_the_gate(monkeypatch, act, gate):
    ffn, tokens = feed_forward(LocalityConfig(activation=act, gate=gate)).eval(), images()
    with torch.no_grad():
        tokens[0, 5, 0] = float("nan")
    got, want = step(ffn, tokens), plain_step(monkeypatch, ffn, tokens, exact=False)
    for name in (name for name in want if name.startswith("gate")):
        assert torch.equal(got[name].isnan(), want[name].isnan()), name


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("grad", [True, False])
@pytest.mark.parametrize(("batch", "height", "width"), [(0, 3, 4), (2, 0, 0), (2, 0, 4), (0, 0, 0)])
def test_nothing_to_compute(monkeypatch, training, grad, batch, height, width):
    """No images or an empty grid give what the plain modules give, errors included."""
    grid = Grid(height, width, 2)

    def outcome() -> object:
        ffn = feed_forward().train(training)
        try:
            with torch.set_grad_enabled(grad):
                return tuple(ffn(images(batch, grid=grid), grid).shape)
        except (RuntimeError, ValueError) as error:
            return type(error), str(error)

    used = spy(monkeypatch)
    got = outcome()
    assert not used
    monkeypatch.setenv(VARIABLE, "plain")
    assert got == outcome()


@needs_compiler
@pytest.mark.parametrize(("side", "native"), [(4, True), (16, True), (17, False)])
def test_in_evaluation_a_narrow_network_is_native_for_few_tokens_only(side, native):
    """Traced graphs are plain: with many tokens, as in T2T-ViT's first stage, the bits are equal."""
    ffn, grid = LocalityFeedForward(8, config=LocalityConfig(gate="none")).eval(), Grid(side, side)
    x = torch.randn(2, side * side, 8)
    with torch.inference_mode():
        assert (accelerated(ffn, x, grid) is not None) == native
    assert accelerated(ffn, x, grid) is not None  # with gradients
