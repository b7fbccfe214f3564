"""Every class that localize accepts: exactness, true grid, gradients, undo; adapters as an interface."""

import copy
import os
import re
from collections.abc import Callable
from dataclasses import replace

import pytest
import timm
import torch
from timm.layers import PatchEmbed
from torch import Tensor, nn

import localvit
from localvit import ConfigError, LocalityConfig, UnsupportedModelError
from localvit.locality import (
    Grid,
    GridRecord,
    HiddenLocality,
    LocalityFeedForward,
    from_raster_order,
    to_raster_order,
)
from localvit.surgery.adapters import adapter_for, adapters, groups_of
from localvit.surgery.ffns import class_name
from localvit.surgery.orders import CHANNELS_FIRST, CHANNELS_LAST, strided, token_order
from tests.surgery.abilities import total
from tests.surgery.cases import CASES, QUICK

PRESERVE = LocalityConfig(init="preserve")
HEAVY = "LOCALVIT_SUPPORTED" in os.environ  # set by `make supported`
every_case = pytest.mark.parametrize("name", [n for n, case in CASES.items() if HEAVY or not case.heavy])


def kernels(model: nn.Module) -> dict[str, nn.Parameter]:
    return dict(localvit.locality_parameters(model))


@every_case
def test_it_is_exact_and_sees_the_grid(name):
    case = CASES[name]
    report = localvit.check_adapter(case.make(), image_size=case.size)
    assert report.ffns >= 2


@every_case
def test_kernels_learn_and_are_removed(name):
    case = CASES[name]
    model = case.make().train()
    before = {key: value.clone() for key, value in model.state_dict().items()}
    classes = [type(m) for m in model.modules()]
    plan = localvit.localize(model, PRESERVE, count_macs=False).plan
    assert set(before) < set(model.state_dict())
    total(model(case.images())).backward()
    silent = {n for n, p in kernels(model).items() if p.grad is None or p.grad.abs().max() == 0}
    assert silent == set(plan.dead_parameters)

    clone = copy.deepcopy(model).eval()
    with torch.no_grad():
        for parameter in kernels(model).values():
            parameter.normal_()
        assert not torch.equal(total(model.eval()(case.images())), total(clone(case.images())))
    localvit.restore(model)
    assert [type(m) for m in model.modules()] == classes
    hooks = [h for m in model.modules() for h in (*m._forward_hooks.values(), *m._forward_pre_hooks.values())]
    assert not any(h.__module__.startswith("localvit") for h in hooks)
    assert model.state_dict().keys() == before.keys()
    parameters = dict(model.named_parameters())
    assert all(torch.equal(before[key], parameters[key]) for key in parameters)


@every_case
def test_replaced_networks_learn(name):
    case = CASES[name]
    model = case.make().train()
    if not groups_of(model, adapter_for(model))["blocks"][0].row.ffn:
        with pytest.raises(UnsupportedModelError, match="shares its layers"):
            localvit.localize(model, count_macs=False)
        return
    if name == "mvit v2 with class token":  # made with an FFN that widens the tokens
        with pytest.raises(UnsupportedModelError, match="changes the width"):
            localvit.localize(model, count_macs=False)
        return
    dead = set(localvit.localize(model, LocalityConfig(gate="none"), count_macs=False).plan.dead_parameters)
    total(model(case.images())).backward()
    assert all(p.grad is not None for n, p in kernels(model).items() if n not in dead)
    localvit.restore(model)
    assert total(model(case.images())).isfinite()


@pytest.mark.filterwarnings("ignore:.*stay plain")
@every_case
def test_a_fused_model_computes_the_same(name):
    case = CASES[name]
    model = case.make().eval()
    localvit.localize(model, PRESERVE, count_macs=False)
    with torch.no_grad():
        for parameter in kernels(model).values():
            parameter.normal_(std=0.1)
        try:
            fused = localvit.fuse(model)
        except ValueError as error:
            assert "no fast form" in str(error) or "are the same module" in str(error)  # noqa: PT017
            return
        expected, got = total(model(case.images())), total(fused(case.images()))
    torch.testing.assert_close(got, expected, rtol=1e-4, atol=1e-5)


WRONG_ALONE = ("xcit", "levit", "efficientformer")  # the plain ones too: docs/upstream.md


@pytest.mark.parametrize("name", list(CASES) if HEAVY else QUICK)
def test_gradients_of_one_image(name):
    """Compare derivatives in a random direction of the image, and of the new weights, with differences."""
    case = CASES[name]
    for init in ("preserve", "paper"):
        model = case.make().eval().double()
        try:
            localvit.localize(model, LocalityConfig(init=init), count_macs=False)
        except UnsupportedModelError:
            assert init == "paper"  # test_replaced_networks_learn has the reasons
            continue
        images = case.images(batch=2 if name in WRONG_ALONE else 1).double()
        new = list(kernels(model).values())
        for parameter in new:
            parameter.data += 0.02 * torch.randn_like(parameter)
        for point in ([images], new):
            _check_derivative(
                lambda model=model, images=images: total(model(images)),
                point,
                most=0.05 if name == "deepseek" else 1e-3,
            )


def _check_derivative(value: Callable[[], Tensor], point: list[Tensor], most: float = 1e-3) -> None:
    """Compare the derivative of `value` in a random direction with a central difference.

    One of several steps must agree: ReLU has kinks, and DeepSeek's network computes in float32 in places.
    """
    for x in point:
        x.requires_grad_()
    grads = torch.autograd.grad(value(), point, materialize_grads=True)
    directions = [torch.randn_like(x) for x in point]
    found = sum((g * d).sum() for g, d in zip(grads, directions, strict=True))
    assert found != 0
    errors = []
    for step in (1e-3, 1e-4, 1e-5, 1e-6, 1e-7):
        values = []
        with torch.no_grad():
            for sign in (1, -2, 1):
                for x, direction in zip(point, directions, strict=True):
                    x += sign * step * direction
                values.append(value())
        errors.append(float(abs((values[0] - values[1]) / (2 * step * found) - 1)))
    assert min(errors) < most, errors


def test_every_row_has_a_case():
    """A class without the shift test is not in the table; heavy cases are looked up by module only."""
    heavy = [case for case in CASES.values() if case.heavy and not HEAVY]
    tested = {class_name(type(case.make())) for case in CASES.values() if case not in heavy}
    entries = [timm.models.model_entrypoint(case.base) for case in heavy]
    modules = {getattr(e.__annotations__.get("return"), "__module__", e.__module__) for e in entries}
    ours = ("timm.", "localvit.")  # others: test_torchvision, test_hf
    left = {name for adapter in adapters() for name in adapter.classes if name.startswith(ours)} - tested
    # Of an encoder and the classifier around it, one is tested.
    assert not [n for n in left if n.rpartition(".")[0] not in modules and not n.endswith("Encoder")]


# --- orders of tokens ----------------------------------------------------------------------------------

ORDERS = {
    "maps, channels last": (CHANNELS_LAST, (2, 8, 12, 3)),
    "maps, channels first": (CHANNELS_FIRST, (2, 3, 8, 12)),
    "windows": (token_order("b (h1 w1) (h2 w2) c", h2=4, w2=2), (2, 12, 8, 3)),
    "windows, counted last": (token_order("b (h2 w2) (h1 w1) c", h2=4, w2=2), (2, 8, 12, 3)),
    "mask units": (strided([(2, 2), (2, 2)]), (2, 96, 3)),
    "mask units, not square": (strided([(2, 3), (4, 1)]), (2, 96, 3)),
    "patches, folded": (strided([(2, 2)], "(b {}) (h w) c"), (8, 24, 3)),
    "patches, map": (strided([(2, 4)], "b c ({}) (h w)"), (2, 3, 8, 12)),
    "transposed": (token_order("b (w h) c"), (2, 96, 3)),
}


@pytest.mark.parametrize("kind", ORDERS)
def test_views_are_inverse(kind):
    order, shape = ORDERS[kind]
    grid = Grid(8, 12)
    for images, x in ((2, torch.randn(shape)), (0, torch.randn(0, *shape[1:]))):
        tokens = to_raster_order(x, order, grid)
        assert tokens.shape == (images, 96, 3)
        assert torch.equal(from_raster_order(tokens, order, grid), x)


@pytest.mark.parametrize("kind", ORDERS)
def test_patterns_are_those_of_einops(kind):
    """By hand: the token in row 5 and column 7."""
    order, shape = ORDERS[kind]
    tokens = from_raster_order(torch.arange(2 * 96 * 3).view(2, 96, 3), order, Grid(8, 12))
    at = {
        "maps, channels last": (1, 5, 7, 2),
        "maps, channels first": (1, 2, 5, 7),
        "windows": (1, 1 * 6 + 3, 1 * 2 + 1, 2),
        "windows, counted last": (1, 1 * 2 + 1, 1 * 6 + 3, 2),
        "mask units": (1, (1 * 2 + 1) * 24 + (0 * 2 + 1) * 6 + 1 * 3 + 1, 2),
        "mask units, not square": (1, (1 * 3 + 1) * 16 + (2 * 1 + 0) * 4 + 0 * 4 + 2, 2),
        "patches, folded": (1 * 4 + 1 * 2 + 1, 2 * 6 + 3, 2),
        "patches, map": (1, 2, 1 * 4 + 3, 2 * 3 + 1),
        "transposed": (1, 7 * 8 + 5, 2),
    }[kind]
    assert tokens.shape == shape
    assert tokens[at] == (96 + 5 * 12 + 7) * 3 + 2


@pytest.mark.parametrize("init", ["paper", "preserve"])
@pytest.mark.parametrize("kind", ORDERS)
def test_every_order_in_torchscript(kind, init):
    """Also against the plain order of the same tokens."""
    order, shape = ORDERS[kind]
    record, config = GridRecord(), LocalityConfig(init=init)
    record.size = (8, 12)
    ffn = {
        "paper": lambda **kw: LocalityFeedForward(3, config, hidden_dim=8, **kw),
        "preserve": lambda **kw: HiddenLocality(3, nn.Identity(), config, **kw),
    }[init]
    ours, plain = ffn(grid_record=record, order=order).eval(), ffn(grid_record=record).eval()
    for parameter in ours.parameters():
        nn.init.normal_(parameter, std=0.5)
    plain.load_state_dict(ours.state_dict())
    x, grid = torch.randn(shape), Grid(8, 12)
    expected = from_raster_order(plain(to_raster_order(x, order, grid)), order, grid)
    torch.testing.assert_close(ours(x), expected)
    torch.testing.assert_close(torch.jit.script(ours)(x), expected)


@pytest.mark.parametrize(
    ("pattern", "sizes", "message"),
    [
        ("b h c", {}, "pattern='b h c' with sizes {} is not accepted; use b, c, h and w"),
        ("b h w w c", {}, "pattern='b h w w c'"),
        ("b h w c d", {}, "pattern='b h w c d'"),
        ("b h, w c", {}, "pattern='b h, w c'"),
        ("b h (w c)", {}, "c alone"),
        ("(b h w c", {}, "pattern='(b h w c'"),
        ("", {}, "pattern=''"),
        ("b (h1 w1) (h2 w2) c", {}, "is not accepted; use b, c, h and w"),
        ("b (h1 w1) (h2 w2) c", {"h2": 2}, "is not accepted; use b, c, h and w"),
        ("b h w c", {"h": 2}, "is not accepted; use b, c, h and w"),
        ("b (h1 w) h2 c", {"h2": 0}, "h2=0 is not accepted for pattern"),
        ("b h w c", {"h3": 2}, "h3=2 is not accepted for pattern='b h w c'; use sizes of its h and w"),
    ],
)
def test_bad_patterns_are_refused(pattern, sizes, message):
    with pytest.raises(ConfigError, match=re.escape(message)):
        token_order(pattern, **sizes)


def test_mask_units_are_those_of_hiera():
    from timm.models.hiera import Unroll

    tokens = torch.arange(192.0).view(1, 96, 2)
    for strides in ([(2, 2), (2, 2)], [(2, 3)], [(2, 2), (4, 3)]):
        expected = Unroll((8, 12), (1, 1), strides)(tokens)
        assert torch.equal(from_raster_order(tokens, strided(strides), Grid(8, 12)), expected)


def test_windows_are_those_of_nest():
    from timm.models.nest import blockify

    tokens = torch.arange(192.0).view(1, 96, 2)
    expected = blockify(tokens.unflatten(1, (8, 12)), 4)
    order = token_order("b (h1 w1) (h2 w2) c", h2=4, w2=4)
    assert torch.equal(from_raster_order(tokens, order, Grid(8, 12)), expected)


# --- the interface -------------------------------------------------------------------------------------


def test_a_wrong_order_is_found():
    """Rows that say something else than the model does fail the shift test, or before."""
    case = CASES["hiera"]
    adapter = adapter_for(case.make())
    row = adapter.groups["blocks"][0]
    raster = replace(adapter, groups={"blocks": (replace(row, order=None),)})
    with pytest.raises(UnsupportedModelError, match="a shift to the right by one cell"):
        localvit.check_adapter(case.make(), raster)


def test_a_wrong_number_of_prefix_tokens_is_found():
    case = CASES["dinov3"]
    adapter = adapter_for(case.make())
    rows = tuple(replace(row, prefix=1) for row in adapter.groups["blocks"])
    with pytest.raises(UnsupportedModelError, match="1 prefix tokens and a grid of 4 x 6"):
        localvit.plan(case.make(), PRESERVE, adapter=replace(adapter, groups={"blocks": rows}))


def test_a_transposed_grid_is_found():
    case = CASES["swin v2"]
    adapter = adapter_for(case.make())
    rows = tuple(replace(row, order=token_order("b (w h) c")) for row in adapter.groups["blocks"])
    with pytest.raises(UnsupportedModelError, match="a shift to the"):
        localvit.check_adapter(case.make(), replace(adapter, groups={"blocks": rows}))


def test_bad_adapters_are_refused():
    adapter = next(iter(adapters()))
    with pytest.raises(ConfigError, match="has an adapter"):
        localvit.register_adapter(adapter)
    with pytest.raises(ConfigError, match=r"groups=\['others'\] is not accepted; use 'blocks' first"):
        localvit.register_adapter(replace(adapter, classes=("a.B",), groups={"others": ()}))
    message = "grid=None is not accepted; use a grid, or an order that reads it"
    for order in (None, token_order("b (h1 w1) (h2 w2) c", h2=2, w2=2)):
        row = replace(adapter.groups["blocks"][0], grid=None, order=order)
        with pytest.raises(ConfigError, match=message):
            localvit.register_adapter(replace(adapter, classes=("a.B",), groups={"blocks": (row,)}))


# --- bad input -----------------------------------------------------------------------------------------


class _Rotated(nn.Linear):
    """A layer that looks like a linear one and mixes tokens."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x.roll(1, dims=1))


class _LowRank(nn.Module):
    """A wrapped layer, as LoRA makes it."""

    def __init__(self, base: nn.Linear) -> None:
        super().__init__()
        self.base_layer = base
        self.down = nn.Linear(base.in_features, 2, bias=False)
        self.up = nn.Linear(2, base.out_features, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.base_layer(x) + self.up(self.down(x))


def test_wrapped_layers_are_accepted_after_a_test():
    model = CASES["vit"].make().eval()
    for block in model.blocks:
        block.mlp.fc1, block.mlp.fc2 = _LowRank(block.mlp.fc1), _LowRank(block.mlp.fc2)
    expected = model(CASES["vit"].images())
    localvit.localize(model, PRESERVE)
    assert torch.equal(model(CASES["vit"].images()), expected)


def test_layers_that_mix_tokens_are_refused():
    model = CASES["vit"].make()
    model.blocks[1].mlp.fc1.__class__ = _Rotated
    with pytest.raises(
        UnsupportedModelError, match=r"blocks\.1\.mlp\.fc1 is a _Rotated: the FFN is not a function"
    ):
        localvit.localize(model)
    model.to("meta")
    with pytest.raises(UnsupportedModelError, match="cannot be tested on the meta device"):
        localvit.plan(model)


@pytest.mark.parametrize("part", ["", "blocks.1", "blocks.1.mlp"])
def test_a_replaced_forward_is_refused(part):
    model = CASES["vit"].make()
    target = model.get_submodule(part)
    target.forward = lambda x: x
    with pytest.raises(UnsupportedModelError, match=r"forward.*was replaced"):
        localvit.localize(model)
    assert not any(isinstance(m, HiddenLocality) or m._forward_hooks for m in model.modules())


def test_a_replaced_block_is_refused_by_its_path():
    model = CASES["swin v2"].make()
    model.layers[1].blocks[0] = nn.Identity()
    with pytest.raises(
        UnsupportedModelError, match=r"layers\.1\.blocks\.0 is a Identity; accepted: SwinTransformerV2Block"
    ):
        localvit.localize(model)


def test_a_batch_of_several_sizes_is_refused():
    model = CASES["naflexvit"].make().eval()
    localvit.localize(model, PRESERVE)
    patches = {"patches": torch.randn(1, 6, 192), "patch_coord": torch.zeros(1, 6, 2, dtype=torch.long)}
    with pytest.raises(RuntimeError, match="no common grid"):
        model({**patches, "patch_valid": torch.ones(1, 6, dtype=torch.bool)})


def test_a_plan_on_the_meta_device_reads_no_weights():
    with torch.device("meta"):
        model = timm.create_model("vit_large_patch16_dinov3")
    plan = localvit.plan(model, PRESERVE)
    assert len(plan.sites) == 24
    assert plan.macs[0] > 5e10
    assert type(model.patch_embed) is PatchEmbed
    assert all(p.is_meta for p in model.parameters())


# --- documents and tables ------------------------------------------------------------------------------


def test_the_example_of_the_documentation_runs(monkeypatch, capsys):
    from pathlib import Path

    from localvit.surgery import adapters as registry

    monkeypatch.setattr(registry, "_registered", [])
    text = (Path(__file__).parents[2] / "docs/adapters.md").read_text()
    code = "\n".join(part.partition("```")[0] for part in text.split("```python\n")[1:])
    names: dict[str, object] = {"__name__": "documented"}
    exec(code, names)
    assert capsys.readouterr().out.strip() in text
    assert sum(isinstance(m, HiddenLocality) for m in names["model"].modules()) == 2
    row = replace(names["adapter"].groups["blocks"][0], prefix=0)
    wrong = replace(names["adapter"], groups={"blocks": (row,)})
    with pytest.raises(UnsupportedModelError, match="0 prefix tokens and a grid of 4 x 6"):
        localvit.check_adapter(names["MyTransformer"](), wrong, image_size=(32, 48))


def test_the_table_has_every_architecture_of_timm():
    """Fails by name when a release of timm adds or removes one: run `make supported`."""
    from localvit.surgery import supported_models, timm_architectures

    entries = supported_models()
    assert {entry.architecture for entry in entries} ^ set(timm_architectures()) == set()
    assert all(entry.note for entry in entries if not entry.accepted)
    assert [e.accepted for e in supported_models("vit_small_patch16_dinov3")] == [True]


def test_the_classes_of_all_rows_exist():
    """Fails by name when a release of timm renames a model, a block or an FFN."""
    from pkgutil import resolve_name

    from localvit.surgery.ffns import FFNS

    blocks = {row.kind for adapter in adapters() for rows in adapter.groups.values() for row in rows}
    listed = {name for adapter in adapters() for name in (*adapter.classes, *adapter.others)}
    for name in blocks | listed | set(FFNS):
        module, _, kind = name.rpartition(".")
        assert class_name(resolve_name(f"{module}:{kind}")) == name
