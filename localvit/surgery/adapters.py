"""Adapters: rows that say where a family of models has its feed-forward networks (FFNs), and their tokens.

A class without a row is refused, because many classes look alike and order or drop their tokens differently.
timm's rows are in `localvit.surgery.families`; `register_adapter` adds others.
"""

import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cache
from typing import Any, Literal

from timm.models._input import get_model_input_config
from torch import nn

from localvit.errors import ConfigError, UnsupportedModelError
from localvit.locality import GridRecord, TokenOrder
from localvit.surgery.drop_path import separable
from localvit.surgery.ffns import Ffn, class_name, ffn_of, is_conv, weight_of
from localvit.surgery.grids import GridFrom
from localvit.surgery.orders import CHANNELS_FIRST, CHANNELS_LAST
from localvit.surgery.refusals import REASONS

# The group of FFNs that `localize` changes by default.
MAIN_GROUP = "blocks"


Attends = Literal["all", "windows", "pooled", "none"]


@dataclass(frozen=True)
class Block:
    """Row of one class of transformer blocks.

    Attributes:
        kind: Full name of the class. Subclasses do not count.
        at: Paths of these blocks in the model; `#` is any number.
        ffn: Name of the FFN in the block; `""` if the block itself has the layers.
        norm, layer_scale, drop_path: Names of the layers (or parameters) around the FFN in its residual
            branch; `None` if other branches use it too. A block that lacks the name has no such layer.
        order: Order of the tokens in the FFN; `None`: `(B, P + N, C)` in raster order. (A convolutional FFN
            has maps `(B, C, H, W)` in any case.)
        prefix: Number of prefix tokens in the FFN's input, or the model's attribute with it.
        grid: Source of the grid; `None` if the order reads it from the shape.
        parallel: True if FFNs have the same input where only the last number of their paths differs.
        attention: Paths of the attention layers in the block, separated by spaces.
        attends: Tokens that its attention sees.
        layers: Structure of an FFN that is an `nn.Sequential`, of linear layers, norms, activations and
            dropouts.

    `order`, `prefix` and `grid` may also be functions of the model and the numbers in the path of the block.
    """

    kind: str
    at: tuple[str, ...] = ("blocks.#",)
    ffn: str = "mlp"
    norm: str | None = "norm2"
    layer_scale: str | None = None
    drop_path: str | None = "drop_path2"
    order: TokenOrder | Callable[..., TokenOrder | None] | None = None
    prefix: int | str | Callable[..., int] = 0
    grid: GridFrom | Callable[..., GridFrom] | None = None
    parallel: bool = False
    attention: str | None = "attn"
    attends: Attends = "all"
    layers: Ffn | None = None


@dataclass(frozen=True)
class ModelAdapter:
    """Row of one family.

    Attributes:
        classes: Full names of the model classes.
        groups: Name of a group -> rows of its blocks. The first group is `"blocks"`.
        others: Full names of the classes of blocks at the same paths that have no FFN.
        image_size: Path of the attribute with the configured (height, width) or (channels, height, width).
        dead: True if the head may read prefix tokens only (`global_pool="token"`, or no such attribute), so
            that no later layer reads the patch tokens of the last block. `None`: as the inner model.
        note: Sentence for the plan.
        inner: Path of the inner model that has the blocks, if this model contains one. The adapter of
            the inner model's class is used; this one has no groups.
        inner_runs: True if the inner model runs on images alone, because the whole model needs more
            (CLIP: text).

    `image_size`, `dead` and `note` may also be functions of the model.
    """

    classes: tuple[str, ...]
    groups: Mapping[str, tuple[Block, ...]] = field(default_factory=lambda: {MAIN_GROUP: ()})
    others: tuple[str, ...] = ()
    image_size: str | Callable[[Any], Any] = "patch_embed.img_size"
    dead: bool | Callable[[Any], bool] | None = False
    note: str | Callable[[Any], str | None] | None = None
    inner: str = ""
    inner_runs: bool = False


@dataclass(frozen=True)
class FeedForwardSite:
    """One FFN of a model, with the layers of its residual branch.

    Attributes:
        name: Path of the block in the model, e.g. `"blocks.3"`.
        block: The block.
        row: The row of the block. Layers around the FFN that this block lacks are `None` in it.
        structure: Structure of the FFN.
        order: Order of its tokens; `None` for raster order.
        num_prefix_tokens: Number of prefix tokens in its input.
        record: Record of the grid, which FFNs on one grid share; `None` if the order reads it from the shape.
        dead_patches: True if no later layer reads the patch tokens of this block's output.
    """

    name: str
    block: nn.Module
    row: Block
    structure: Ffn
    order: TokenOrder | None
    num_prefix_tokens: int
    record: GridRecord | None
    dead_patches: bool = False

    @property
    def path(self) -> str:
        """Path of the FFN in the model."""
        return f"{self.name}.{self.row.ffn}" if self.row.ffn else self.name

    @property
    def depth(self) -> str:
        """Path of what runs at one depth: parallel FFNs share it."""
        return self.name.rpartition(".")[0] if self.row.parallel else self.name

    @property
    def module(self) -> nn.Module:
        return self.block.get_submodule(self.row.ffn)

    @property
    def around(self) -> tuple[str | None, str | None, str | None]:
        """Names of norm, LayerScale and drop-path; `None` for those that this block lacks."""
        norm, scale, drop = (
            n if isinstance(getattr(self.block, n or "", None), (nn.Module, nn.Parameter)) else None
            for n in (self.row.norm, self.row.layer_scale, self.row.drop_path)
        )
        return norm, scale, self.row.drop_path if separable(self.block) else drop

    @property
    def slot(self) -> str:
        """Path in the FFN of the module that `init="preserve"` adds."""
        name = self.structure.slot
        return (
            name if next(self.module.get_submodule(name).parameters(), None) is None else f"{name}.locality"
        )

    @property
    def dims(self) -> tuple[int, int, int]:
        """Width of the FFN's input, hidden state and output."""
        structure = self.structure
        first, last = (weight_of(self.module.get_submodule(n)) for n in (structure.first, structure.last))
        hidden = structure.hidden(self.module) if structure.hidden else last.shape[1]
        return first.shape[1], hidden, last.shape[0]


_registered: list[ModelAdapter] = []


@cache
def _shipped() -> tuple[ModelAdapter, ...]:
    from localvit.surgery import families, families_hf, families_torchvision

    return (*families.ADAPTERS, *families_torchvision.ADAPTERS, *families_hf.ADAPTERS)


def adapters() -> Iterator[ModelAdapter]:
    """Iterate over all adapters, registered ones first."""
    yield from (*_registered, *_shipped())


def accepted_classes() -> tuple[str, ...]:
    """Return the full names of all classes of models with an adapter."""
    return tuple(name for adapter in adapters() for name in adapter.classes)


def register_adapter(adapter: ModelAdapter) -> None:
    """Let `localize` accept the classes of `adapter`; test it first with `localvit.check_adapter`.

    Raises:
        ConfigError: if one of the classes already has an adapter.
    """
    for name in adapter.classes:
        if name in accepted_classes():
            raise ConfigError(f"{name} already has an adapter; pass adapter= to localize to use another")
    _check_row(adapter)
    _registered.append(adapter)


def _check_row(adapter: ModelAdapter) -> None:
    if next(iter(adapter.groups), None) != MAIN_GROUP:
        raise ConfigError(f"groups={list(adapter.groups)} is not accepted; use {MAIN_GROUP!r} first")
    for row in (row for rows in adapter.groups.values() for row in rows):
        if row.grid is None and not callable(row.order) and not (row.order and row.order.grid_axes):
            raise ConfigError(f"{row.kind}: grid=None is not accepted; use a grid, or an order that reads it")


def adapter_for(model: nn.Module, adapter: ModelAdapter | None = None) -> ModelAdapter:
    """Return the adapter of exactly this class (a subclass may order its tokens differently).

    Raises:
        UnsupportedModelError: if the class has no adapter, or its adapter does not describe the model.
    """
    name = class_name(type(model))
    if adapter is None:
        adapter = next((a for a in adapters() if name in a.classes), None)
        if adapter is None:
            raise UnsupportedModelError(_reason(name))
    if "forward" in vars(model):
        raise UnsupportedModelError(
            f"forward of the {type(model).__name__} was replaced; only that of its class is accepted"
        )
    rate = max(
        [getattr(model, "patch_drop_rate", 0) or 0]
        + [m.prob for m in model.modules() if type(m).__name__ == "PatchDropout"]
    )
    if rate > 0:
        raise UnsupportedModelError(
            f"patch_drop_rate={rate} removes tokens in training, so they have no grid; use patch_drop_rate=0"
        )
    return adapter


def _reason(name: str) -> str:
    module = name.rpartition(".")[0]
    reason = REASONS.get(module.removeprefix("timm.models.")) if module.startswith("timm.models.") else None
    reason = reason or (
        "it has no adapter; `localvit models --supported` lists the accepted classes, and "
        "localvit.register_adapter adds one"
    )
    return f"{name} cannot be localized: {reason}"


def groups_of(model: nn.Module, adapter: ModelAdapter) -> dict[str, list[FeedForwardSite]]:
    """Return name of a group -> its FFNs by depth.

    Raises:
        UnsupportedModelError: if a block or FFN is not of a class that the adapter knows.
    """
    if adapter.inner:
        inner, its = _inner(model, adapter)
        its = its if adapter.dead is None else replace(its, dead=adapter.dead)
        return {
            name: [replace(site, name=f"{adapter.inner}.{site.name}") for site in sites]
            for name, sites in groups_of(inner, its).items()
        }
    modules = dict(model.named_modules(remove_duplicate=False))
    records: Records = {}
    groups = {name: _sites(model, modules, records, adapter, rows) for name, rows in adapter.groups.items()}
    if not groups[MAIN_GROUP]:
        raise UnsupportedModelError(
            f"this {type(model).__name__} has no feed-forward network on a token grid"
        )
    if _of(adapter.dead, model) and getattr(model, "global_pool", "token") == "token":
        sites = groups[MAIN_GROUP]
        last = sites[-1].depth
        groups[MAIN_GROUP] = [replace(s, dead_patches=True) if s.depth == last else s for s in sites]
    return groups


def note_of(model: nn.Module, adapter: ModelAdapter) -> str | None:
    """Return the note of the adapter on this model."""
    notes = [_of(adapter.note, model), note_of(*_inner(model, adapter)) if adapter.inner else None]
    return "; ".join(note for note in notes if note) or None


def _inner(model: nn.Module, adapter: ModelAdapter) -> tuple[nn.Module, ModelAdapter]:
    inner = model.get_submodule(adapter.inner)
    return inner, adapter_for(inner)


def runner(model: nn.Module, adapter: ModelAdapter) -> nn.Module:
    """Return the module that a forward pass on images alone runs."""
    return model.get_submodule(adapter.inner) if adapter.inner_runs else model


def _of(value: Any, *args: Any) -> Any:
    return value(*args) if callable(value) else value


Records = dict[tuple[nn.Module, GridFrom], GridRecord]


def _sites(
    model: nn.Module,
    modules: Mapping[str, nn.Module],
    records: Records,
    adapter: ModelAdapter,
    rows: Sequence[Block],
) -> list[FeedForwardSite]:
    sites = []
    for path, block in modules.items():
        matching = [(row, numbers) for row in rows if (numbers := _numbers(row, path)) is not None]
        if not matching:
            continue
        kind = class_name(type(block))
        chosen = next(((row, numbers) for row, numbers in matching if row.kind == kind), None)
        if chosen is not None:
            site = _site(model, modules, records, path, *chosen)
            sites += [] if site is None else [site]
        elif kind not in adapter.others:
            accepted = ", ".join(dict.fromkeys(row.kind.rpartition(".")[2] for row, _ in matching))
            raise UnsupportedModelError(f"{path} is a {type(block).__name__}; accepted: {accepted}")
    return sites


def _numbers(row: Block, path: str) -> tuple[int, ...] | None:
    for pattern in row.at:
        match = _compiled(pattern).fullmatch(path)
        if match:
            return tuple(map(int, match.groups()))
    return None


@cache
def _compiled(pattern: str) -> re.Pattern[str]:
    return re.compile(re.escape(pattern).replace(r"\#", r"(\d+)"))


def _site(
    model: nn.Module,
    modules: Mapping[str, nn.Module],
    records: Records,
    path: str,
    row: Block,
    numbers: tuple[int, ...],
) -> FeedForwardSite | None:
    block = modules[path]
    if "forward" in vars(block):
        raise UnsupportedModelError(
            f"{path}.forward was replaced; accepted: the one of {type(block).__name__}"
        )
    if row.ffn and not hasattr(block, row.ffn.partition(".")[0]):
        raise UnsupportedModelError(f"{path} has no {row.ffn!r}; correct ffn= in the row of {row.kind}")
    ffn = modules.get(f"{path}.{row.ffn}") if row.ffn else block
    if ffn is None or isinstance(ffn, nn.Identity):
        return None  # a block without an FFN, which is an option of DaViT
    structure = ffn_of(ffn, f"{path}.{row.ffn}", row.layers)
    order, prefix, grid = (_of(value, model, numbers) for value in (row.order, row.prefix, row.grid))
    if is_conv(ffn, structure) and order in (None, CHANNELS_LAST):
        order = CHANNELS_FIRST
    record = None
    if grid is not None and not (order and order.grid_axes):
        at = grid.at.format(*numbers)
        source = modules[f"{path}{at}".removesuffix(".") if at.startswith(".") else at]
        new = GridRecord(source, grid.static or "", grid.reads == "attribute", grid)
        record = records.setdefault((source, grid), new)
    if isinstance(prefix, str):
        prefix = int(getattr(model, prefix))
    return FeedForwardSite(path, block, row, structure, order, prefix, record)


def image_size_of(model: nn.Module, adapter: ModelAdapter) -> tuple[int, int, int]:
    """Return the configured channels, height and width."""
    if adapter.inner:
        return image_size_of(*_inner(model, adapter))
    channels, height, width = get_model_input_config(model)["input_size"]
    value: Any = model
    if callable(adapter.image_size):
        value = adapter.image_size(model)
    else:
        for name in adapter.image_size.split("."):
            value = getattr(value, name, None) if not name.isdigit() else value[int(name)]
    if value is not None:
        *more, height, width = (value, value) if isinstance(value, int) else value
        channels = more[0] if more else channels
    return int(channels), int(height), int(width)
