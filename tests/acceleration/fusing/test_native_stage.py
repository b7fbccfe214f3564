"""The native kernel in fused models: where it computes, and where it must stand back."""

import copy
import pickle
import warnings
from collections.abc import Callable

import pytest
import timm
import torch
import torch.nn.functional as F
from timm.layers import SqueezeExcite
from torch import nn
from torch.overrides import TorchFunctionMode

import localvit
from localvit import Grid, LocalityConfig
from localvit.acceleration.fusing import feed_forward as fast
from localvit.locality.layers import HardSigmoid

from ..test_build import needs_compiler
from .test_fuse import assert_same, local, photos, random_weights, vit

pytestmark = needs_compiler


@pytest.fixture
def stages(monkeypatch) -> list[tuple]:
    """Arguments of each stage that the kernel computes from now on."""
    seen: list[tuple] = []
    stage: Callable = fast.mix_in_place

    def noted(*arguments):
        seen.append(arguments)
        return stage(*arguments)

    monkeypatch.setattr(fast, "mix_in_place", noted)
    return seen


def gates_of(stages: list[tuple]) -> list[tuple[int, ...]]:
    """Shapes of the first layer of each gate that the kernel computed."""
    return [tuple(form.parameters[6].shape[:2]) for form, *_, gate in stages if gate]


# The last of two blocks computes no patches.
@pytest.mark.parametrize(
    ("config", "acts"),
    [
        (LocalityConfig(), [(3, 3)]),
        (LocalityConfig(kernel_size=5, gate="none", activation=("none", "relu6")), [(0, 2)]),
        (LocalityConfig(activation=("gelu", "relu"), gate="eca"), [(0, 1)]),
        (LocalityConfig(activation=("relu", "silu"), kernel_size=7), [(1, 0)]),
        (LocalityConfig(norm="none", norm_order="act-norm"), [(3, 3)]),
        (LocalityConfig(init="preserve"), [(0, 0)]),
        (LocalityConfig(kernel_size=1), []),
        (LocalityConfig(kernel_size=9), []),
        (LocalityConfig(norm="layer"), []),
        (LocalityConfig(norm_order="act-norm"), []),
        (LocalityConfig(norm_order="act-norm", norm=("batch", "none", "batch")), []),
        (LocalityConfig(norm=("layer", "batch", "batch")), []),
        (LocalityConfig(glu="gate"), []),
        (LocalityConfig(position="first"), []),
        (LocalityConfig(depthwise=False), []),
    ],
    ids=str,
)
@torch.no_grad()
def test_stages_that_it_computes(stages, config, acts):
    model = local(config)
    assert_same(localvit.fuse(model)(photos()), model(photos()))
    assert [arguments[-3:-1] for arguments in stages] == acts


@torch.no_grad()
@pytest.mark.parametrize(
    ("config", "gates"),
    [
        (LocalityConfig(), [(4, 128)]),
        (LocalityConfig(gate_reduction=2), [(64, 128)]),
        (LocalityConfig(gate="eca"), [(1, 1)]),
        (LocalityConfig(gate="none"), []),
        (LocalityConfig(activation=("hardswish", "silu")), []),
        (LocalityConfig(kernel_size=9), []),
    ],
    ids=str,
)
def test_gates_that_it_computes(stages, config, gates):
    model = local(config)
    assert_same(localvit.fuse(model)(photos()), model(photos()))
    assert gates_of(stages) == gates


def other_gate(gate: SqueezeExcite) -> None:
    gate.gate = nn.Sigmoid()


def other_activation(gate: SqueezeExcite) -> None:
    gate.act = nn.SiLU()


@torch.no_grad()
def test_gates_that_somebody_changed(stages):
    model = local()
    hooked, replaced = (localvit.fuse(model) for _ in range(2))
    seen = []
    hooked.blocks[0].mlp.gate.fc2.register_forward_hook(lambda *arguments: seen.append(arguments[2].shape))
    assert_same(hooked(photos()), model(photos()))
    assert len(seen) == 1
    other = nn.Sequential(replaced.blocks[0].mlp.gate.fc1)  # as a quantised layer, without weights of its own
    replaced.blocks[0].mlp.gate.fc1 = other
    assert_same(replaced(photos()), model(photos()))
    assert len(stages) == 1  # hooks see single layers
    assert not gates_of(stages)


@torch.no_grad()
@pytest.mark.parametrize("change", [other_gate, other_activation])
def test_a_changed_gate_is_another_one(stages, monkeypatch, change):
    """And the same one with and without the kernel."""
    model = local()
    for layer in (model.blocks[0].mlp.gate.fc1, model.blocks[0].mlp.gate.fc2):
        layer.weight.normal_(std=0.2)
    changed, original = (localvit.fuse(model).blocks[0].mlp for _ in range(2))
    change(changed.gate)
    tokens, grid = torch.randn(2, 17, 32), Grid(4, 4, 1)
    before, after = original(tokens, grid), changed(tokens, grid)
    assert gates_of(stages) == [(4, 128)]  # of the original
    assert len(stages) == 2
    assert (after - before).abs().max() > 1e-3 * before.abs().max()
    monkeypatch.setattr(fast, "library", lambda: None)
    assert_same(changed(tokens, grid), after)
    assert len(stages) == 2


@torch.no_grad()
@pytest.mark.parametrize("kernel", [True, False])
@pytest.mark.parametrize(
    ("layers", "computed"),
    [
        ({"gate_layer": HardSigmoid}, True),
        ({"gate_layer": HardSigmoid, "act_layer": nn.SiLU}, False),
        ({"gate_layer": nn.Hardsigmoid}, False),
        ({"gate_layer": nn.Sigmoid}, False),
        ({"gate_layer": nn.Sigmoid, "bias": False}, False),
        ({"gate_layer": HardSigmoid, "bias": False}, False),
    ],
    ids=str,
)
def test_gates_that_somebody_changed_before(stages, monkeypatch, layers, computed, kernel):
    model = local()
    for block in model.blocks:
        block.mlp.gate = SqueezeExcite(128, rd_channels=8, **layers)
    random_weights(model).eval()
    if not kernel:
        monkeypatch.setattr(fast, "library", lambda: None)
    assert_same(localvit.fuse(model).forward_features(photos()), model.forward_features(photos()))
    assert len(stages) == 2 * kernel
    assert gates_of(stages) == [(8, 128)] * 2 * (kernel and computed)


@torch.no_grad()
def test_models_of_other_types_and_under_autocast_do_without(stages):
    fused = localvit.fuse(local())
    want = fused(photos())
    stages.clear()
    assert_same(copy.deepcopy(fused).double()(photos().double()).float(), want)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        fused(photos())
    copy.deepcopy(fused).bfloat16()(photos().bfloat16())
    assert not stages


def test_gradients_of_the_input(stages):
    """As for a saliency map: parameters of a fused model need none."""
    model, gradients = local(), []
    for net in (model, localvit.fuse(model)):
        x = photos().requires_grad_()
        net(x).square().sum().backward()
        gradients.append(x.grad)
    torch.testing.assert_close(*gradients, rtol=1e-4, atol=1e-5)
    assert not stages


@torch.no_grad()
@pytest.mark.parametrize(
    ("layer", "shape"),
    [
        ("fc1", (16, 128)),
        ("act1", (128, 1, 16)),
        ("conv", (128, 4, 4)),
        ("act2", (128, 4, 4)),
        ("fc2", (16, 32)),
    ],
)
def test_hooks_see_what_they_would_see_without_it(stages, monkeypatch, layer, shape):
    model = local()
    fused, seen = localvit.fuse(model), []
    hooked = getattr(fused.blocks[0].mlp, layer)
    hooked.register_forward_hook(lambda *arguments: seen.append(arguments[2].clone()))
    assert_same(fused(photos()), model(photos()))
    assert [out.shape for out in seen] == [(2, *shape)]
    assert len(stages) == (layer in ("fc1", "fc2"))  # the kernel stands in for the layers between
    monkeypatch.setattr(fast, "library", lambda: None)
    fused(photos())
    assert_same(*seen)


@torch.no_grad()
def test_plain_modules_where_they_are_asked_for(stages, monkeypatch):
    monkeypatch.setenv("LOCALVIT_KERNELS", "plain")
    model = local()
    assert_same(localvit.fuse(model)(photos()), model(photos()))
    assert not stages


@torch.no_grad()
@pytest.mark.parametrize("design", [{}, {"init": "preserve"}], ids=str)
def test_pytorchs_operators_where_there_is_no_compiler(stages, monkeypatch, design):
    monkeypatch.setattr(fast, "library", lambda: None)
    model = local(LocalityConfig(**design))
    fused = localvit.fuse(model)
    assert not any(getattr(module, "native", False) for module in fused.modules())
    assert_same(fused(photos()), model(photos()))
    assert not stages


@torch.no_grad()
@pytest.mark.parametrize(
    "design", [{"activation": ("relu6", "hardswish"), "kernel_size": 5}, {"init": "preserve"}], ids=str
)
def test_a_model_that_came_to_a_machine_without_compiler(stages, monkeypatch, design):
    model = local(LocalityConfig(**design))
    fused = localvit.fuse(model)
    assert any(getattr(module, "native", False) for module in fused.modules())
    sent = pickle.dumps(fused)
    monkeypatch.setattr(fast, "library", lambda: None)
    assert_same(pickle.loads(sent)(photos()), model(photos()))
    assert not stages


def graph_targets(graph: torch.fx.Graph) -> str:
    return " ".join(str(node.target) for node in graph.nodes)


@torch.no_grad()
def test_exported_graphs_are_for_any_machine(stages):
    model = local()
    program = torch.export.export(localvit.fuse(model), (photos(),), strict=False)
    assert "localvit" not in graph_targets(program.graph)
    assert_same(program.module()(photos()), model(photos()))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        traced = torch.jit.trace(localvit.fuse(model), photos(), check_trace=False)
    assert not stages
    graph = str(traced.inlined_graph)
    assert "aten::" in graph
    assert "localvit::" not in graph
    assert_same(traced(photos()), model(photos()))


@torch.inference_mode()
def test_a_compiled_graph_has_it_as_one_operator():
    model, graphs = local(), []

    def backend(graph: torch.fx.GraphModule, inputs: list) -> Callable:
        graphs.append(graph_targets(graph.graph))
        return graph.forward

    compiled = torch.compile(localvit.fuse(model), backend=backend, fullgraph=True)
    assert_same(compiled(photos()), model(photos()))
    assert graphs[0].count("localvit.mix_") == 1  # the last of two blocks computes no patches
    assert "conv2d" not in graphs[0].replace("conv2d", "", 1)  # that of the patch embedding


@torch.no_grad()
def test_tokens_that_are_not_dense(stages):
    """A layer in the place of a linear one may return any layout."""

    class Strided(nn.Linear):
        def forward(self, x):
            return super().forward(x).transpose(1, 2).contiguous().transpose(1, 2)

    model = local()
    fused = localvit.fuse(model)
    fused.blocks[0].mlp.fc1.__class__ = Strided
    assert_same(fused(photos()), model(photos()))
    assert len(stages) == 1
    apart = torch.randn(2, 32, 17).transpose(1, 2)
    mlps = [net.blocks[0].mlp for net in (localvit.fuse(model), model)]
    assert_same(mlps[0](apart, Grid(4, 4, 1)), mlps[1](apart, Grid(4, 4, 1)))
    assert len(stages) == 2


@torch.no_grad()
def test_hidden_locality_on_timms_mlps(stages):
    model = vit(mlp_layer=timm.layers.SwiGLU)
    localvit.localize(model, LocalityConfig(init="preserve", kernel_size=7), count_macs=False)
    random_weights(model).eval()
    assert_same(localvit.fuse(model)(photos()), model(photos()))
    assert [arguments[-3:-1] for arguments in stages] == [(0, 0)]
    assert isinstance(localvit.fuse(model).blocks[0].mlp.drop1, fast.FoldedHiddenLocality)


class _Twice(TorchFunctionMode):
    """Doubles what a convolution of maps of 128 channels gives."""

    def __torch_function__(self, function, types, args=(), kwargs=None):
        out = function(*args, **(kwargs or {}))
        return 2 * out if function is F.conv2d and args[0].shape[1] == 128 else out


def later() -> dict[str, Callable]:
    """Return what may happen to a feed-forward network that is fused already."""

    def conv(**changes) -> Callable:
        settings = {"kernel_size": 3, "padding": 1, "groups": 128, "bias": True} | changes
        return lambda mlp: setattr(mlp, "conv", random_weights(nn.Conv2d(128, 128, **settings)).eval())

    def doubled(name: str) -> Callable:
        def patch(mlp: nn.Module) -> None:
            stage = getattr(mlp, name)
            setattr(mlp, name, lambda *args: 2 * stage(*args))

        return patch

    return {
        "dilation": conv(padding=2, dilation=2),
        "padding": conv(padding="same"),
        "another padding mode": conv(padding_mode="circular"),
        "a kernel that is not covered": conv(kernel_size=9, padding=4),
        "groups": conv(groups=64),
        "settings": lambda mlp: (setattr(mlp.conv, "dilation", (2, 2)), setattr(mlp.conv, "padding", (2, 2))),
        "float64": lambda mlp: mlp.conv.double(),
        "a patched mix": doubled("mix"),
        "a patched transform": doubled("transform"),
        "a patched convolution": doubled("_convolve"),
        "a patched forward": lambda mlp: setattr(mlp.conv, "forward", lambda x: 2 * x),
        "another activation": lambda mlp: setattr(mlp, "act2", nn.Tanh()),
        "another norm": lambda mlp: setattr(mlp, "norm2", nn.LocalResponseNorm(2)),
        "another norm in front": lambda mlp: setattr(mlp, "norm1", nn.LocalResponseNorm(2)),
        "a hook": lambda mlp: mlp.conv.register_forward_hook(lambda _m, _i, out: 2 * out),
        "a hook on an activation": lambda mlp: mlp.act2.register_forward_hook(lambda _m, _i, out: 2 * out),
        "a hook on the gate": lambda mlp: mlp.gate.register_forward_hook(lambda _m, _i, out: 2 * out),
        "a hook in the gate": lambda mlp: mlp.gate.fc2.register_forward_hook(lambda _m, _i, out: 9 + out),
        "a patched activation": lambda mlp: setattr(mlp.act2, "forward", lambda x: 2 * x),
        "groups in the gate": lambda mlp: setattr(mlp.gate, "fc1", nn.Conv2d(128, 4, 1, groups=2).eval()),
        "an inner skip": lambda mlp: setattr(mlp, "inner_skip", True),
    }


@torch.no_grad()
@pytest.mark.parametrize("compiled", [False, True])
@pytest.mark.parametrize("change", later().values(), ids=later())
def test_changes_of_a_fused_network(monkeypatch, change, compiled):
    """With and without the kernels it computes the same."""
    mlp = localvit.fuse(local()).blocks[0].mlp
    tokens, grid = torch.randn(2, 17, 32), Grid(4, 4, 1)

    def outcome() -> torch.Tensor | str:
        torch.compiler.reset()
        try:
            return (torch.compile(mlp, backend="eager") if compiled else mlp)(tokens, grid)
        except RuntimeError as error:
            return type(error).__name__ if compiled else str(error)  # a compiler's message names its trace

    before = outcome()
    change(mlp)
    after = outcome()
    monkeypatch.setattr(mlp, "native", False)
    want = outcome()
    if isinstance(want, str):
        assert after == want
    else:
        assert_same(after, want)
        assert not torch.allclose(after, before)


@torch.no_grad()
def test_a_function_mode_sees_the_convolution():
    mlp = localvit.fuse(local()).blocks[0].mlp
    tokens, grid = torch.randn(2, 17, 32), Grid(4, 4, 1)
    before = mlp(tokens, grid)
    with _Twice():
        assert not torch.allclose(mlp(tokens, grid), before)
