"""Plan of a localization, made without changing the model."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any, NamedTuple

import torch
from timm.layers import DropPath
from torch import nn

from localvit.cost import count_parameters, macs_of, on_meta
from localvit.errors import ConfigError, UnsupportedModelError
from localvit.locality import Grid, HiddenLocality, LocalityConfig, LocalityFeedForward
from localvit.surgery.adapters import (
    MAIN_GROUP,
    FeedForwardSite,
    ModelAdapter,
    adapter_for,
    groups_of,
    image_size_of,
    note_of,
    runner,
)
from localvit.surgery.observation import Tokens, observe
from localvit.surgery.placement import BlockSpec, select_blocks


@dataclass(frozen=True)
class SitePlan:
    """Planned change of one FFN.

    Attributes:
        name: Path of the FFN in the model.
        action: `"replace"` the FFN (`init="paper"`) or `"insert"` a convolution (`init="preserve"`).
        old, new: Class names before and after.
        weights: Sentence on the old and new weights.
        parameters, macs: (before, after), including the block's residual branch of the FFN.
        dead_parameters: Full names of trainable parameters that no output of the model depends on. The head
            of many models reads prefix tokens only, so nothing reads the patch tokens of the last block.
            These parameters are kept for compatibility with published weights.
        num_prefix_tokens: Number of class, distillation and register tokens in the FFN's input.
    """

    name: str
    action: str
    old: str
    new: str
    weights: str
    parameters: tuple[int, int]
    macs: tuple[int, int] | None
    dead_parameters: tuple[str, ...]
    num_prefix_tokens: int


@dataclass(frozen=True)
class Plan:
    """Plan of a localization; `print` shows it, and `to_dict` returns JSON values.

    Attributes:
        model: Class of the model.
        config: Configuration of the chosen blocks.
        blocks: Indices of the chosen blocks.
        depth: Number of blocks of the model.
        also: Configurations of further groups.
        sites: Planned changes, one per FFN.
        parameters: Parameters of the model (before, after).
        macs: Multiply-accumulates for one image of the configured size (before, after); `None` if they were
            not counted.
        notes: Sentences on the family.
    """

    model: str
    config: LocalityConfig
    blocks: tuple[int, ...]
    depth: int
    also: dict[str, LocalityConfig]
    sites: tuple[SitePlan, ...]
    parameters: tuple[int, int]
    macs: tuple[int, int] | None
    notes: tuple[str, ...] = ()

    @property
    def dead_parameters(self) -> tuple[str, ...]:
        return tuple(name for site in self.sites for name in site.dead_parameters)

    def to_dict(self) -> dict[str, Any]:
        also = {name: config.to_dict() for name, config in self.also.items()}
        return {**asdict(self), "config": self.config.to_dict(), "also": also}

    def __str__(self) -> str:
        elsewhere = "".join(f", and in {group}" for group in self.also)
        lines = [f"{self.model}: locality in {len(self.blocks)} of {self.depth} blocks{elsewhere}"]
        for site in self.sites:
            dead = _dead(site.dead_parameters)
            lines.append(f"  {site.name}: {site.old} -> {site.new} ({site.weights}){dead}")
        macs = f", {_change(self.macs, 1e9, 'GMACs')}" if self.macs else ""
        lines.append(f"  parameters {_change(self.parameters, 1e6, 'M')}{macs}")
        if self.dead_parameters:
            lines.append("  dead parameters: no output depends on the patch tokens of the last block")
        lines += [f"  note: {note}" for note in self.notes]
        return "\n".join(lines)


class PlannedChange(NamedTuple):
    """One FFN, and the configuration of its locality."""

    site: FeedForwardSite
    config: LocalityConfig


def plan(
    model: nn.Module,
    config: LocalityConfig | None = None,
    blocks: BlockSpec = "all",
    *,
    also: Mapping[str, LocalityConfig] | None = None,
    adapter: ModelAdapter | None = None,
) -> Plan:
    """Return the plan of `localvit.localize` with the same arguments; the model does not change.

    The plan runs the model on the meta device, so that weights are neither read nor copied, and compares the
    tokens of every FFN with its grid.

    Raises:
        UnsupportedModelError: if the model cannot be localized.
        ValueError: if `blocks` or `also` does not fit it, or if `config` gives an impossible width.
    """
    return plan_changes(model, config, blocks, also, adapter)[0]


def plan_changes(
    model: nn.Module,
    config: LocalityConfig | None,
    blocks: BlockSpec,
    also: Mapping[str, LocalityConfig] | None,
    adapter: ModelAdapter | None = None,
    *,
    count: bool = True,
) -> tuple[Plan, list[PlannedChange]]:
    """Return the plan and its changes, after all checks of `plan`.

    Args:
        model, config, blocks, also, adapter: As for `plan`.
        count: Run the model on the meta device, which takes most of the time. Without that run,
            multiply-accumulates are not counted and tokens are checked in the first forward pass only.
    """
    config, also = LocalityConfig() if config is None else config, dict(also or {})
    for value in (config, *also.values()):
        if not isinstance(value, LocalityConfig):
            raise ConfigError(f"config={value!r} is not accepted; use a localvit.LocalityConfig")
    refuse_wrapped(model)
    if any(isinstance(m, (LocalityFeedForward, HiddenLocality)) for m in model.modules()):
        way = (
            "localvit.restore undoes that"
            if hasattr(model, "localization")
            else "take the model before it was fused"
        )
        raise UnsupportedModelError(f"the model is localized already; {way}")
    adapter = adapter_for(model, adapter)
    groups = groups_of(model, adapter)
    _refuse_shared([site for sites in groups.values() for site in sites])
    chosen = select_blocks(blocks, len(groups[MAIN_GROUP]))
    changes = [PlannedChange(groups[MAIN_GROUP][i], config) for i in chosen] + _elsewhere(groups, also)
    for change in changes:
        _refuse_impossible(change)

    macs, tokens = None, dict[str, Tokens]()
    if count:
        runs, size = runner(model, adapter), image_size_of(model, adapter)
        macs, tokens = observe(runs, size, [site for site, _ in changes])
    costs: dict[Any, Any] = {}
    sites = tuple(_plan_site(change, costs, tokens.get(change.site.path)) for change in changes)
    the_plan = Plan(
        model=type(model).__name__,
        config=config,
        blocks=chosen,
        depth=len(groups[MAIN_GROUP]),
        also=also,
        sites=sites,
        parameters=_total(count_parameters(model), [s.parameters for s in sites]),
        macs=None if macs is None else _total(macs, [s.macs for s in sites]),
        notes=tuple(_notes(note_of(model, adapter), changes)),
    )
    return the_plan, changes


def _dead(names: Sequence[str]) -> str:
    if not names:
        return ""
    more = f" and {len(names) - 1} more" if len(names) > 1 else ""
    return f"; dead: {names[0]}{more}"


def _refuse_impossible(change: PlannedChange) -> None:
    site, config = change
    if config.init != "paper":
        return
    if not site.row.ffn:
        raise UnsupportedModelError(
            f"the FFN of {site.name} shares its layers with attention, or is not a module of its own, so it "
            "cannot be replaced; use init='preserve'"
        )
    width, _, out = site.dims
    if width != out:
        raise UnsupportedModelError(
            f"{site.path} changes the width from {width} to {out}, but init='paper' keeps it; "
            "use init='preserve' or other blocks"
        )


def _notes(family: str | None, changes: Sequence[PlannedChange]) -> Iterator[str]:
    yield from dict.fromkeys(note for note in (family, *(s.structure.note for s, _ in changes)) if note)
    shared = [
        site
        for site, config in changes
        if config.init == "paper"
        and not config.resolve().drop_path
        and site.around[2] is None
        and isinstance(getattr(site.block, "drop_path", None), DropPath)
    ]
    if shared:
        yield f"the drop-path of {len(shared)} FFNs serves other branches too, so it stays"


def refuse_wrapped(model: nn.Module, action: str = "localize") -> None:
    """Raise `UnsupportedModelError` for a wrapped or compiled model, which would keep the old graph, and for
    anything but a model.
    """
    if not isinstance(model, nn.Module):
        raise UnsupportedModelError(f"{model!r} is not a model; {action} takes a torch.nn.Module")
    wrappers: dict[type, str] = {
        nn.parallel.DistributedDataParallel: "wrapped in DistributedDataParallel",
        nn.DataParallel: "wrapped in DataParallel",
        torch.jit.ScriptModule: "scripted",
        torch.fx.GraphModule: "an fx graph",
        torch._dynamo.OptimizedModule: "compiled",
    }
    for wrapper, state in wrappers.items():
        if isinstance(model, wrapper):
            raise UnsupportedModelError(f"the model is {state}; {action} it before that")
    if model._compiled_call_impl is not None:
        raise UnsupportedModelError(f"the model is compiled; {action} it before that")


def replacement(change: PlannedChange) -> nn.Module:
    """Build the new module of a site."""
    site, config = change
    width, hidden, _ = site.dims
    common: dict[str, Any] = {"num_prefix_tokens": site.num_prefix_tokens, "grid_record": site.record}
    common["order"] = site.order
    if config.init == "paper":
        return LocalityFeedForward(width, config, hidden_dim=hidden, **common)
    slot = site.module.get_submodule(site.structure.slot)
    then = slot if site.slot == site.structure.slot else nn.Identity()
    return HiddenLocality(hidden, then, config, **common)


def discarded_layers(change: PlannedChange) -> tuple[str, ...]:
    """Return the attributes of the block that the configured locality removes."""
    site, config = change.site, change.config.resolve()
    if config.init == "preserve":
        return ()
    keep = zip(site.around, (config.prenorm, config.layer_scale, config.drop_path), strict=True)
    return tuple(name for name, kept in keep if name is not None and not kept)


def _plan_site(change: PlannedChange, costs: dict[Any, Any], tokens: Tokens | None) -> SitePlan:
    """Return the plan of one FFN; `costs` keeps results of `_cost`, so that equal FFNs are counted once."""
    site, config = change
    replaces = config.init == "paper"
    shape = tokens and (tokens.input.shape, tokens.grid)
    key = (repr(site.module), site.dims, repr(site.order), shape, config)
    if key not in costs:
        costs[key] = _cost(change, tokens)
    new, parameters, macs = costs[key]
    old_class = type(site.module).__name__
    layers = [getattr(site.block, name, None) for name in discarded_layers(change)]
    dropped = sum(_size(layer) for layer in layers if layer is not None)
    return SitePlan(
        name=site.path,
        action="replace" if replaces else "insert",
        old=old_class,
        new=type(new).__name__ if replaces else f"{old_class} + {type(new).__name__}",
        weights="discarded, new ones drawn" if replaces else "kept, a zero kernel inserted",
        parameters=(parameters[0] + dropped, parameters[1]),
        macs=macs,
        dead_parameters=tuple(_dead_parameters(change, new)) if site.dead_patches else (),
        num_prefix_tokens=site.num_prefix_tokens,
    )


def _size(layer: nn.Module | nn.Parameter) -> int:
    return layer.numel() if isinstance(layer, nn.Parameter) else count_parameters(layer)


def _cost(
    change: PlannedChange, tokens: Tokens | None
) -> tuple[nn.Module, tuple[int, int], tuple[int, int] | None]:
    """Return the new module, and parameters and multiply-accumulates before and after."""
    site, config = change
    new = on_meta(lambda: replacement(change))
    kept = 0 if config.init == "paper" else 1  # the old FFN stays, and the new module gets its hidden map
    old = count_parameters(site.module)
    macs = None
    if tokens is not None:
        before = macs_of(site.module, tokens.input, *tokens.further) if site.row.ffn else 0
        x = tokens.hidden if kept else tokens.input
        macs = before, macs_of(new, x, Grid(*tokens.grid, site.num_prefix_tokens)) + kept * before
    return new, (old, count_parameters(new) + kept * old), macs


def _total(before: int, changes: list[Any]) -> tuple[int, int]:
    return before, before + sum(new - old for old, new in changes)


def _dead_parameters(change: PlannedChange, new: nn.Module) -> list[str]:
    site, config = change.site, change.config.resolve()
    path = f"{site.path}." + ("" if config.init == "paper" else f"{site.slot}.")
    names = [name for name, _ in new.named_parameters()]
    if config.prefix == "pointwise":  # prefix tokens still use the point-wise path
        norms = config.norm if isinstance(config.norm, tuple) else (config.norm,) * 3
        # batch and group statistics are over prefix and patch tokens, so these norms tie them together
        tied = [norm in ("batch", "group") for norm in norms]
        past = ("gate",) if config.position == "first" and tied[0] else ("conv", "norm2", "gate")
        return [] if tied[2] else [path + name for name in names if name.split(".")[0] in past]
    around = site.around[:2] if config.prefix == "skip" else ()
    kept = [name for name in around if name is not None and name not in discarded_layers(change)]
    outside = [f"{site.name}.{n}" for n, _ in site.block.named_parameters() if n.split(".")[0] in kept]
    return outside + [path + name for name in names]


def _elsewhere(
    groups: Mapping[str, Sequence[FeedForwardSite]], also: Mapping[str, LocalityConfig]
) -> list[PlannedChange]:
    further = {name: sites for name, sites in groups.items() if name != MAIN_GROUP}
    for name in also:
        if name not in further:
            known = ", ".join(map(repr, further)) or "none in this model"
            raise ConfigError(f"also={name!r} is not a further group of FFNs; accepted: {known}")
    return [PlannedChange(site, config) for name, config in also.items() for site in further[name]]


def _refuse_shared(sites: list[FeedForwardSite]) -> None:
    modules = [id(site.module) for site in sites]
    if len(set(modules)) < len(modules):
        raise UnsupportedModelError(
            "two blocks share one FFN, so one cannot change without the other; give each block its own"
        )


def _change(values: tuple[int, int], unit: float, name: str) -> str:
    before, after = values
    return f"{before / unit:.3f} -> {after / unit:.3f} {name} ({(after - before) / before:+.1%})"
