"""One forward pass on the meta device: multiply-accumulates, and the tokens and grid of every FFN."""

from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn

from localvit.cost import count_macs
from localvit.errors import UnsupportedModelError
from localvit.locality import Grid, to_raster_order
from localvit.surgery.adapters import FeedForwardSite
from localvit.surgery.grids import hook, unhook


@dataclass(frozen=True)
class Tokens:
    """Tokens of one FFN for one image.

    Attributes:
        input, hidden: The FFN's input and hidden state, on the meta device.
        grid: Rows and columns.
        further: Further arguments of the FFN's forward.
    """

    input: Tensor
    hidden: Tensor
    grid: tuple[int, int]
    further: tuple[Any, ...] = ()


def observe(
    model: nn.Module, image_size: tuple[int, int, int], sites: Sequence[FeedForwardSite]
) -> tuple[int, dict[str, Tokens]]:
    """Run the model on the meta device for one image of `image_size` (channels, height, width).

    Returns:
        Multiply-accumulates of the model, and path of an FFN -> its tokens.

    Raises:
        UnsupportedModelError: if the tokens of an FFN are not those of its grid, or the model does not run it
            exactly once.
    """
    calls: dict[str, list[Any]] = {site.path: [] for site in sites}
    with _evaluating(model), ExitStack() as stack:
        stack.callback(unhook, model.modules())
        for record in dict.fromkeys(site.record for site in sites):
            if record is not None:
                hook(record)
        for site in sites:
            _watch(site, calls[site.path], stack)
        macs = count_macs(model, image_size)
    return macs, {site.path: _tokens(site, calls[site.path]) for site in sites}


@contextmanager
def _evaluating(model: nn.Module) -> Iterator[None]:
    """Put the model in evaluation mode (a batch norm refuses to train on one image).

    Attributes return, also those that a forward pass sets (Hugging Face's Swin shrinks its windows).
    """
    before = [(module, dict(vars(module))) for module in model.modules()]
    try:
        for module, _ in before:
            module.training = False
        yield
    finally:
        for module, attributes in before:
            vars(module).update(attributes)


def _watch(site: FeedForwardSite, calls: list[Any], stack: ExitStack) -> None:
    """Append arguments, grid and hidden state of the site's FFN to `calls` until `stack` closes."""

    def on_input(_: nn.Module, args: Any) -> None:
        axes = site.order.grid_axes if site.order else ()
        grid = tuple(args[0].shape[axis] for axis in axes)
        calls.append([args, grid or (site.record and site.record.size)])

    def on_hidden(_: nn.Module, args: Any) -> None:
        if calls:
            calls[-1].append(args[0])

    stack.enter_context(site.module.register_forward_pre_hook(on_input))
    slot = site.module.get_submodule(site.structure.slot)
    stack.enter_context(slot.register_forward_pre_hook(on_hidden))


def _tokens(site: FeedForwardSite, calls: list[Any]) -> Tokens:
    if len(calls) != 1 or len(calls[0]) != 3:
        raise UnsupportedModelError(f"{site.path} runs {len(calls)} times in a forward pass; accepted: once")
    (x, *further), grid, hidden = calls[0]
    if grid is None:
        raise UnsupportedModelError(f"{site.path} runs before its grid is known")
    grid = (int(grid[0]), int(grid[1]))
    for tensor in (x, hidden):
        _check_tokens(site, tensor, grid)
    return Tokens(x, hidden, grid, tuple(further))


def _check_tokens(site: FeedForwardSite, x: Tensor, grid: tuple[int, int]) -> None:
    shape, tokens = tuple(x.shape), x
    try:
        if site.order is not None:
            tokens = to_raster_order(x, site.order, Grid(*grid, site.num_prefix_tokens))
        fits = tokens.ndim == 3 and tokens.shape[1] == site.num_prefix_tokens + grid[0] * grid[1]
    except (RuntimeError, ValueError, IndexError):
        fits = False
    if not fits:
        raise UnsupportedModelError(
            f"{site.path} gets tokens of shape {shape}, which are not {site.num_prefix_tokens} prefix tokens "
            f"and a grid of {grid[0]} x {grid[1]} in {site.order.pattern if site.order else 'raster order'}"
        )
