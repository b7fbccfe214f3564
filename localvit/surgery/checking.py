"""Proof that an adapter is right: exactness, and the shift test.

The shift test does not use what the adapter says about the order of tokens. With a kernel that shifts by one
cell, the convolution brings the hidden state of one token to another. The pixels that the two depend on,
found by a backward pass, must be one cell apart in the image.
"""

import copy
from collections.abc import Iterable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from localvit.errors import UnsupportedModelError
from localvit.locality import HiddenLocality, LocalityConfig
from localvit.surgery.adapters import (
    FeedForwardSite,
    ModelAdapter,
    adapter_for,
    groups_of,
    image_size_of,
    runner,
)
from localvit.surgery.observation import observe
from localvit.surgery.operation import localize

_PRESERVE = LocalityConfig(init="preserve")
_SHIFT = 1e-3
_TOKENS = 6  # tokens of an FFN that are compared with their neighbours
_IMAGES = 2  # random images over which the pixels that a token depends on are averaged


@dataclass(frozen=True)
class AdapterReport:
    """Result of `check_adapter`.

    Attributes:
        model: Class of the model.
        ffns: Number of FFNs that were tested.
        grids: Their grids (rows, columns).
    """

    model: str
    ffns: int
    grids: tuple[tuple[int, int], ...]

    def __str__(self) -> str:
        grids = ", ".join(f"{h} x {w}" for h, w in self.grids)
        return f"{self.model}: {self.ffns} FFNs exact and in the order of their grids ({grids})"


def check_adapter(
    model: nn.Module, adapter: ModelAdapter | None = None, *, image_size: tuple[int, int] | None = None
) -> AdapterReport:
    """Prove that locality in a model is exact and sees the true grid; the model does not change.

    Use a small model with random weights, and images that are *not* square. Two properties are tested:

    * With `init="preserve"` the outputs are bit for bit those of the plain model, in evaluation and training.
    * One cell further in the image is one cell further in the convolution, to the right and down: for the
      first and the last FFN of each grid.

    Args:
        model: A model on the CPU.
        adapter: Adapter to test; default: that of the model's class.
        image_size: Height and width of the images; default: the configured ones.

    Raises:
        UnsupportedModelError: if the adapter does not fit the model, or one of the tests fails.
    """
    adapter = adapter_for(model, adapter)
    size = image_size_of(model, adapter)
    size = (size[0], *(image_size or size[1:]))
    groups = groups_of(model, adapter)
    also = dict.fromkeys(list(groups)[1:], _PRESERVE)
    _, tokens = observe(runner(model, adapter), size, groups["blocks"])
    local = copy.deepcopy(model)
    localize(local, _PRESERVE, also=also, adapter=adapter, count_macs=False)
    _check_exact(runner(model, adapter), runner(local, adapter), size)
    grids = {site.path: tokens[site.path].grid for site in groups["blocks"]}
    _check_order(model, adapter, groups["blocks"], grids, size)
    return AdapterReport(
        type(model).__name__, sum(map(len, groups.values())), tuple(dict.fromkeys(grids.values()))
    )


def _check_exact(plain: nn.Module, local: nn.Module, size: tuple[int, int, int]) -> None:
    images = torch.randn(2, *size, generator=torch.Generator().manual_seed(0))
    for training in (False, True):
        outputs = []
        for model in (copy.deepcopy(plain), local):
            with torch.random.fork_rng(devices=[]), torch.no_grad():
                torch.manual_seed(0)
                outputs.append(_tensors(model.float().train(training)(images)))
        if not all(torch.equal(a, b) for a, b in zip(*outputs, strict=True)):
            mode = "training" if training else "evaluation"
            raise UnsupportedModelError(
                f"{type(plain).__name__}: a zero kernel changes the outputs in {mode} mode"
            )


def _tensors(output: Any) -> list[Tensor]:
    if isinstance(output, Tensor):
        return [output]
    values: Iterable[Any] = output.values() if isinstance(output, Mapping) else output
    return [tensor for value in values for tensor in _tensors(value)]


# --- the shift test ------------------------------------------------------------------------------------


def _check_order(
    model: nn.Module,
    adapter: ModelAdapter,
    sites: list[FeedForwardSite],
    grids: dict[str, tuple[int, int]],
    size: tuple[int, int, int],
) -> None:
    local = copy.deepcopy(model)
    localize(local, _PRESERVE, adapter=adapter, count_macs=False)
    local.double().eval().requires_grad_(False)
    ours = [module.conv for module in local.modules() if isinstance(module, HiddenLocality)]
    for module in local.modules():
        if isinstance(module, nn.Conv2d):
            _set_shift(module.weight) if module in ours else _focus(module)
        elif isinstance(module, nn.MaxPool2d):
            module.register_forward_hook(_average)
    images = torch.randn(_IMAGES, *size, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    images = images.repeat(_TOKENS, 1, 1, 1).requires_grad_()
    with _recorded(local, sites) as states:
        runner(local, adapter)(images)
    ends: dict[Any, list[FeedForwardSite]] = {}
    for site in sites:
        ends.setdefault((site.row, site.order, grids[site.path]), []).append(site)
    for (_, _, grid), alike in ends.items():
        for site in {alike[0].path: alike[0], alike[-1].path: alike[-1]}.values():
            _check_site(site, grid, images, states[site.path])


def _focus(conv: nn.Conv2d) -> None:
    """Let a convolution with overlapping windows see mostly their centres, where their tokens are."""
    for axis in (0, 1):
        size, stride = conv.kernel_size[axis], conv.stride[axis]
        if size > stride:
            distance = torch.arange(size, dtype=conv.weight.dtype) - (size - 1) / 2
            window = torch.exp(-((distance / (0.25 * stride)) ** 2))
            conv.weight.mul_(window.view(-1, 1) if axis == 0 else window)


def _average(pool: nn.MaxPool2d, inputs: tuple[Tensor], output: Tensor) -> Tensor:
    """Replace the maximum, which may be anywhere in its window, by the mean."""
    return F.adaptive_avg_pool2d(inputs[0], (output.shape[-2], output.shape[-1]))


def _set_shift(kernel: Tensor) -> None:
    """Shift even channels to the right and odd ones down, too little to matter for later layers."""
    kernel.zero_()
    kernel[0::2, :, 1, 0] = _SHIFT
    kernel[1::2, :, 0, 1] = _SHIFT


def _check_site(site: FeedForwardSite, grid: tuple[int, int], images: Tensor, states: list[Tensor]) -> None:
    before, after = (_by_token(site, state, len(images)) for state in states)
    moved = (after - before).detach()[0] / _SHIFT
    for axis, direction in ((1, "right"), (0, "down")):
        part = slice(1 - axis, None, 2)
        expected = (grid[0] - 1) * grid[1] if axis == 0 else grid[0] * (grid[1] - 1)
        tokens = moved[:, part].abs().amax(1).gt(1e-9).nonzero().flatten()
        if len(tokens) != expected:
            raise UnsupportedModelError(
                f"{site.path}: a shift to the {direction} moves {len(tokens)} tokens, not {expected}"
            )
        if expected == 0:  # one row or column
            continue
        order = torch.randperm(len(tokens), generator=torch.Generator().manual_seed(axis))
        tokens = tokens[order[:_TOKENS]]
        sources = torch.cdist(moved[tokens, part], before.detach()[0, :, part]).argmin(1)
        distance = _place(before, images, tokens, grid) - _place(before, images, sources, grid)
        for token, source, (down, right) in zip(
            tokens.tolist(), sources.tolist(), distance.tolist(), strict=True
        ):
            along, across = (down, right) if axis == 0 else (right, down)
            if not (0.25 < along < 1.75 and abs(across) < 0.75):
                raise UnsupportedModelError(
                    f"{site.path}: a shift to the {direction} by one cell of the {grid[0]} x {grid[1]} grid "
                    f"brings token {source} to token {token}, which is {down:.2f} cells below and "
                    f"{right:.2f} cells right of it"
                )


def _place(states: Tensor, images: Tensor, tokens: Tensor, grid: tuple[int, int]) -> Tensor:
    """Return the place in the image (row, column), in cells, that each token depends on most."""
    each = tokens.repeat_interleave(_IMAGES)
    chosen = states[torch.arange(len(each)), each]
    signs = torch.ones_like(chosen[0])
    signs[::2] = -1  # the same sum of channels for every token, so that their pixels can be compared
    grad = torch.autograd.grad((chosen @ signs).sum(), images, retain_graph=True)[0]
    energy = grad[: len(each)].square().sum(1).unflatten(0, (-1, _IMAGES)).sum(1)
    energy = F.adaptive_avg_pool2d(energy, grid).square()
    energy = energy / energy.sum((1, 2), keepdim=True)
    rows, columns = (torch.arange(n, dtype=energy.dtype) for n in grid)
    return torch.stack([(energy.sum(2) * rows).sum(1), (energy.sum(1) * columns).sum(1)], dim=1)


def _by_token(site: FeedForwardSite, state: Tensor, images: int) -> Tensor:
    """View a state in the order of memory as (images, tokens, channels)."""
    axis = -1 if site.order is None else site.order.channel_axis
    state = state.movedim(axis, -1)
    return state.reshape(images, -1, state.shape[-1])


@contextmanager
def _recorded(model: nn.Module, sites: list[FeedForwardSite]) -> Iterator[dict[str, list[Tensor]]]:
    """Record the states around the convolutions; attention returns zero, so that tokens do not mix."""
    states: dict[str, list[Tensor]] = {site.path: [] for site in sites}
    modules = dict(model.named_modules())
    with ExitStack() as stack:
        for site in sites:
            local: Any = model.get_submodule(f"{site.path}.{site.slot}")
            for layer in (local, local.then):
                stack.enter_context(
                    layer.register_forward_pre_hook(lambda _, args, to=states[site.path]: to.append(args[0]))
                )
            for path in (site.row.attention or "").split():
                attention = modules.get(f"{site.name}.{path}")
                if attention is not None:  # some blocks have none
                    stack.enter_context(attention.register_forward_hook(_silence))
        yield states


def _silence(_: nn.Module, __: Any, output: Any) -> Any:
    return (output[0] * 0, *output[1:]) if isinstance(output, tuple) else output * 0
