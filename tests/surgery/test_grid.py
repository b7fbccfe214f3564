"""The grid reaches the feed-forward networks: every way a model is copied, resized, traced, exported.

The two non-square sizes have equally many tokens, so a grid that is stale, or another model's, gives
wrong numbers without an error. Each test compares with a model whose grid cannot be anything else.
"""

import copy
import io
import pickle
import threading

import pytest
import timm
import torch
from timm.utils import ModelEmaV3
from torch import Tensor, nn
from torch.export import Dim

import localvit
from localvit import LocalityConfig

WIDE, TALL = (32, 48), (48, 32)  # 8-pixel patches: 4 x 6 and 6 x 4


def make(
    base: str = "deit_tiny_patch16_224", init: str = "paper", img_size: tuple[int, int] = WIDE, **kwargs
) -> nn.Module:
    torch.manual_seed(1)
    model = timm.create_model(
        base, img_size=img_size, patch_size=8, embed_dim=24, num_heads=3, depth=2, num_classes=5, **kwargs
    )
    localvit.localize(model, LocalityConfig(init=init))
    with torch.no_grad():
        for module in model.modules():
            if isinstance(module, nn.Conv2d) and module.groups > 1:
                module.weight.normal_()  # a grid is only seen through a kernel that is not zero
    return model.eval()


def images(size: tuple[int, int], batch: int = 2) -> Tensor:
    return torch.randn(batch, 3, *size, generator=torch.Generator().manual_seed(7))


@pytest.fixture(params=["paper", "preserve"])
def init(request) -> str:
    return request.param


@pytest.fixture
def dynamic(init) -> nn.Module:
    return make(init=init, dynamic_img_size=True)


def fresh(model: nn.Module, x: Tensor) -> Tensor:
    """Return the output of a model that has seen only `x`."""
    other = make(init=model.localization.plan.config.init, dynamic_img_size=True)
    other.load_state_dict(model.state_dict())
    with torch.no_grad():
        return other(x)


@torch.no_grad()
def test_the_two_sizes_are_told_apart(dynamic):
    wide, tall = images(WIDE), images(TALL)
    torch.testing.assert_close(dynamic(wide), fresh(dynamic, wide))
    torch.testing.assert_close(dynamic(tall), fresh(dynamic, tall))
    grid = dynamic.patch_embed.grid_record
    assert grid.size == (6, 4)
    grid.size = (4, 6)
    hidden = torch.randn(1, 25, 24)
    right = dynamic.blocks[0](hidden)
    grid.size = (6, 4)
    assert not torch.allclose(dynamic.blocks[0](hidden), right)  # so a mistake would show


@torch.no_grad()
@pytest.mark.parametrize(
    "clone",
    [
        copy.deepcopy,
        lambda model: ModelEmaV3(model).module,
        lambda model: pickle.loads(pickle.dumps(model)),
        lambda model: torch.load(_saved(model), weights_only=False),
    ],
    ids=["deepcopy", "ema", "pickle", "torch.save"],
)
def test_a_copy_has_its_own_grid(dynamic, clone):
    wide, tall = images(WIDE), images(TALL)
    expected = {size: fresh(dynamic, x) for size, x in (("wide", wide), ("tall", tall))}
    dynamic(wide)
    other = clone(dynamic)
    for first, second in ((dynamic, other), (other, dynamic)):
        first(wide)
        torch.testing.assert_close(second(tall), expected["tall"])
        torch.testing.assert_close(first(wide), expected["wide"])
        torch.testing.assert_close(second(tall), expected["tall"])


def _saved(model: nn.Module) -> io.BytesIO:
    buffer = io.BytesIO()
    torch.save(model, buffer)
    buffer.seek(0)
    return buffer


@torch.no_grad()
def test_set_input_size(init):
    model = make(init=init)
    model(images(WIDE))
    clone = copy.deepcopy(model)
    model.set_input_size(TALL)
    other = make(init=init, img_size=TALL)
    other.load_state_dict(model.state_dict())
    torch.testing.assert_close(model(images(TALL)), other(images(TALL)))
    clone(images(WIDE))
    model.set_input_size(img_size=(64, 32), patch_size=16)
    assert model(images((64, 32))).shape == (2, 5)
    assert model.patch_embed.grid_record.size == (4, 2)


@pytest.mark.parametrize("base", ["deit_tiny_patch16_224", "deit_tiny_distilled_patch16_224"])
def test_gradient_checkpointing(init, base):
    model = make(base, init, dynamic_img_size=True).train()
    plain = copy.deepcopy(model)
    model.set_grad_checkpointing()
    for size in (WIDE, TALL):
        outputs = []
        for m in (plain, model):
            m.zero_grad()
            out = m(images(size))
            out.square().sum().backward()
            outputs.append([out.detach()] + [p.grad.clone() for p in m.parameters()])
        for a, b in zip(*outputs, strict=True):
            torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)


def test_checkpointing_two_sizes_before_one_backward_fails_loudly():
    model = make(dynamic_img_size=True).train()
    model.set_grad_checkpointing()
    loss = model(images(WIDE)).sum() + model(images(TALL)).sum()
    with pytest.raises((torch.utils.checkpoint.CheckpointError, RuntimeError)):
        loss.backward()


@torch.no_grad()
@pytest.mark.parametrize("dynamic_shapes", [None, True], ids=["static", "dynamic"])
def test_compile_fullgraph(dynamic, dynamic_shapes):
    torch._dynamo.reset()
    compiled = torch.compile(dynamic, fullgraph=True, backend="eager", dynamic=dynamic_shapes)
    for size in (WIDE, TALL, WIDE):
        torch.testing.assert_close(compiled(images(size)), fresh(dynamic, images(size)))


@torch.no_grad()
def test_export_with_dynamic_batch_and_size(dynamic):
    shapes = (
        {0: Dim("batch", min=1, max=64), 2: 8 * Dim("h", min=2, max=40), 3: 8 * Dim("w", min=2, max=40)},
    )
    program = torch.export.export(dynamic, (images(WIDE),), dynamic_shapes=shapes, strict=False)
    for size, batch in ((TALL, 3), ((64, 24), 1), (WIDE, 2)):
        x = images(size, batch)
        torch.testing.assert_close(program.module()(x), fresh(dynamic, x))
    # the export left symbols in the record: the model still runs, copies and pickles
    torch.testing.assert_close(copy.deepcopy(dynamic)(images(TALL)), fresh(dynamic, images(TALL)))
    torch.testing.assert_close(
        pickle.loads(pickle.dumps(dynamic))(images(TALL)), fresh(dynamic, images(TALL))
    )
    torch.testing.assert_close(dynamic(images(TALL)), fresh(dynamic, images(TALL)))


@torch.no_grad()
@pytest.mark.parametrize("after_forward", [False, True])
def test_torchscript(init, after_forward):
    model = make(init=init)
    if after_forward:
        model(images(WIDE))
    torch.testing.assert_close(torch.jit.script(model)(images(WIDE)), model(images(WIDE)))
    model.set_input_size(TALL)
    torch.testing.assert_close(torch.jit.script(model)(images(TALL)), model(images(TALL)))


@torch.no_grad()
@pytest.mark.parametrize("after_forward", [False, True])
def test_fx(init, after_forward):
    from timm.models._features_fx import create_feature_extractor

    model = make(init=init)
    if after_forward:
        model(images(WIDE))
    graph = create_feature_extractor(model, {"head": "out"})
    torch.testing.assert_close(graph(images(WIDE))["out"], model(images(WIDE)))  # a graph of plain modules
    assert torch.equal(copy.deepcopy(model)(images(WIDE)), model(images(WIDE)))


@torch.no_grad()
def test_threads_with_an_instance_each(dynamic):
    """One forward at a time per instance is the documented contract; copies are independent."""
    models = [copy.deepcopy(dynamic), copy.deepcopy(dynamic)]
    inputs = [images(WIDE), images(TALL)]
    expected = [fresh(dynamic, x) for x in inputs]
    wrong: list[int] = []

    def work(i: int) -> None:
        with torch.no_grad():
            wrong.extend(
                i for _ in range(30) if not torch.allclose(models[i](inputs[i]), expected[i], atol=1e-5)
            )

    threads = [threading.Thread(target=work, args=(i,)) for i in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert wrong == []


@torch.no_grad()
@pytest.mark.parametrize(
    ("base", "prefix"), [("vit_tiny_patch16_224", 1), ("deit_tiny_distilled_patch16_224", 2)]
)
def test_prefix_tokens_are_counted_from_the_model(base, prefix):
    model = make(base)
    assert model.blocks[0].mlp.num_prefix_tokens == prefix
    assert model(images(WIDE)).shape == (2, 5)
    registers = make(reg_tokens=4, class_token=False, global_pool="avg")
    assert registers.blocks[0].mlp.num_prefix_tokens == 4
    assert registers(images(WIDE)).shape == (2, 5)
