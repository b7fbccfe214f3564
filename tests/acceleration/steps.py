"""One training step of a feed-forward network, by the form that is chosen and by the plain modules."""

import copy
from collections.abc import Callable

import torch
from torch import Tensor, nn

from localvit import Grid, LocalityConfig, LocalityFeedForward
from localvit.acceleration import dispatch
from localvit.acceleration.kernels import VARIABLE

from ..locality.test_feed_forward import random_weights

GRID = Grid(3, 4, 2)


def feed_forward(
    config: LocalityConfig | None = None, dim: int = 16, hidden_dim: int | None = None
) -> LocalityFeedForward:
    """A feed-forward network with random weights and statistics in float32."""
    ffn = LocalityFeedForward(dim, config, hidden_dim=hidden_dim)
    random_weights(ffn)
    return ffn


def images(batch: int = 3, dim: int = 16, grid: Grid = GRID) -> Tensor:
    """Tokens that want a gradient."""
    count = grid.num_prefix_tokens + grid.height * grid.width
    return torch.randn(batch, count, dim, requires_grad=True)


def step(
    ffn: nn.Module, tokens: Tensor, call: Callable[..., Tensor] | None = None, grid: Grid = GRID
) -> dict[str, Tensor]:
    """Return output, gradients and buffers of one training step, by name; the module stays as it was."""
    ffn, tokens = copy.deepcopy(ffn), tokens.detach().clone().requires_grad_(tokens.requires_grad)
    out = ffn(tokens, grid) if call is None else call(ffn, tokens, grid)
    cotangent = torch.randn(out.shape, generator=torch.Generator().manual_seed(1)).to(out)
    (out * cotangent).sum().backward()
    named = {"tokens": tokens, **dict(ffn.named_parameters())}
    gradients = {name: t.grad for name, t in named.items() if t.grad is not None}
    return {"out": out.detach(), **gradients, **{f"buffer {n}": b for n, b in ffn.named_buffers()}}


def plain_step(monkeypatch, ffn: nn.Module, tokens: Tensor, *args, exact: bool = True, **kwargs) -> dict:
    """Do the same by the plain modules, in float64 with `exact`."""
    with monkeypatch.context() as patch:
        patch.setenv(VARIABLE, "plain")
        if exact:
            ffn, tokens = (
                copy.deepcopy(ffn).double(),
                tokens.detach().double().requires_grad_(tokens.requires_grad),
            )
        return step(ffn, tokens, *args, **kwargs)


def assert_close(got: dict[str, Tensor], want: dict[str, Tensor], rtol: float = 5e-5) -> None:
    """Compare the tensors of two steps, each with the largest value of its kind as the scale.

    A gradient that is zero in exact arithmetic, as that of a bias in front of a batch norm, has the scale of
    the largest gradient.
    """
    assert got.keys() == want.keys()
    largest = max(float(t.abs().max()) for n, t in want.items() if n.endswith(("weight", "bias")))
    for name in want:
        scale = max(float(want[name].double().abs().max()), 1e-3 * largest if name.endswith("bias") else 0.0)
        error = float((got[name].double() - want[name].double()).abs().max()) if want[name].numel() else 0.0
        assert error <= rtol * scale + 1e-12, f"{name}: {error} of {scale}"


def assigned(name: str, change: Callable[[Tensor], Tensor]) -> Callable[[nn.Module], None]:
    """Return a function that assigns to the `.data` of a parameter, which its version does not show."""

    def assign(ffn: nn.Module) -> None:
        parameter = ffn.get_parameter(name)
        parameter.data = change(parameter.data)

    return assign


def spy(monkeypatch) -> list[str]:
    """Return the forms that compute from now on: `native`, `checkpointed`."""
    used: list[str] = []

    def note(name: str, label: str) -> None:
        compute = getattr(dispatch, name)

        def noted(*args: object) -> Tensor | None:
            y = compute(*args)
            used.extend([label] * (y is not None))
            return y

        monkeypatch.setattr(dispatch, name, noted)

    note("mixed", "native")
    note("checkpointed", "checkpointed")
    return used
