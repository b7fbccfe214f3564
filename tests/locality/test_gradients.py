"""Gradients of single images, by finite differences.

At batch size 1 a view may give the batch axis any stride, and the CPU's batch norm misreads some of them in
its backward pass (docs/upstream.md). So each design is checked there, by its plain modules.
"""

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

from localvit import PRESETS, Grid, LocalityConfig, LocalityFeedForward
from localvit.locality.grid import map_to_tokens, tokens_to_map, tokens_to_row

from .test_feed_forward import random_weights

GRID = Grid(2, 3, 1)
DESIGNS = {
    **PRESETS,
    "inner_skip": LocalityConfig(inner_skip=True),
    "pointwise": LocalityConfig(depthwise=False),
    "first": LocalityConfig(position="first"),
    "act-norm": LocalityConfig(norm_order="act-norm"),
    "first, act-norm": LocalityConfig(position="first", norm_order="act-norm", gate="eca"),
    "prefix rides along": LocalityConfig(prefix="pointwise", gate="eca_hard"),
    "glu gate": LocalityConfig(glu="gate", gate="none"),
    "glu both": LocalityConfig(glu="both", activation="gelu"),
    "norm 1 only": LocalityConfig(norm=("batch", "none", "none")),
    "norm 2 only": LocalityConfig(norm=("none", "batch", "none")),
    "norm 3 only": LocalityConfig(norm=("none", "none", "batch")),
    "group norms": LocalityConfig(norm="group", norm_groups=2),
}


def hooked_feed_forward(config: LocalityConfig, dim: int = 4) -> LocalityFeedForward:
    """A feed-forward network whose hooks keep it to its plain modules."""
    ffn = LocalityFeedForward(dim, config, hidden_dim=6).double()
    random_weights(ffn)
    for module in ffn.children():
        module.register_forward_hook(lambda *_: None)
    for module in ffn.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.momentum = 0.0  # the function that is differentiated must not change between calls
    return ffn


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("config", DESIGNS.values(), ids=DESIGNS)
def test_gradients_of_one_image(config, training):
    ffn = hooked_feed_forward(config).train(training)
    tokens = torch.randn(1, 7, 4, dtype=torch.float64, requires_grad=True)
    weights = [p for p in ffn.parameters() if p.requires_grad]
    assert torch.autograd.gradcheck(lambda x, *_: ffn(x, GRID), (tokens, *weights), fast_mode=True)


STRIDES: dict[str, Callable[[Tensor], Tensor]] = {
    "dense": lambda g: g.contiguous(),
    "without the first token": lambda g: nn.functional.pad(g, (0, 0, 1, 0))[:, 1:],
    "channel by channel": lambda g: g.transpose(1, 2).contiguous().transpose(1, 2),
    "one value": lambda g: g[:, :1, :1].expand_as(g),
    "a batch stride of one": lambda g: g.as_strided(g.shape, (1, g.shape[2], 1)),
}


@pytest.mark.parametrize("change", STRIDES.values(), ids=STRIDES)
@pytest.mark.parametrize("view", [lambda x: tokens_to_map(x, Grid(2, 3)), tokens_to_row], ids=["map", "row"])
def test_gradients_through_a_norm_do_not_depend_on_strides(view, change):
    """A batch norm between the two views, given one gradient in several layouts."""
    norm = nn.BatchNorm2d(4).double()
    tokens = torch.randn(1, 6, 4, dtype=torch.float64, requires_grad=True)
    gradient = torch.randn(1, 6, 4, dtype=torch.float64)

    def through(gradient: Tensor) -> Tensor:
        return torch.autograd.grad(map_to_tokens(norm(view(tokens))), tokens, gradient)[0]

    gradient = change(gradient)
    plain = nn.functional.batch_norm(
        tokens.transpose(1, 2).contiguous(), None, None, norm.weight, norm.bias, True
    )
    (expected,) = torch.autograd.grad(plain, tokens, gradient.transpose(1, 2).contiguous())
    torch.testing.assert_close(through(gradient), expected)
